"""Lava in a notebook's kernel: cells run again, cells are interrupted, and a kernel that shuts down takes its processes along."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from toolchain.targets.lava_sim import LAVA_SIM

pytestmark = [
    pytest.mark.lava,
    pytest.mark.skipif(LAVA_SIM.available() is not None, reason=str(LAVA_SIM.available())),
    pytest.mark.skipif(find_spec("ipykernel") is None or find_spec("jupyter_client") is None, reason="ipykernel is not installed"),
    pytest.mark.filterwarnings("default"),  # jupyter_client's and its event loop's own
]

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120
SECONDS = 10.0

DEPLOY = 'toolchain.deploy("digits-fc", target="lava-sim", dataset="digits", samples={samples}).correct'


def _session(pid: int) -> set[int]:
    """The living processes of a session; those that wait for their parent are none."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] not in "ZX" and int(fields[3]) == pid:
            found.add(int(name))
    return found


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


class Notebook:
    """A kernel with a client; `cell` runs code and returns what its last line showed, or the name of the exception."""

    def __init__(self) -> None:
        from jupyter_client.manager import start_new_kernel

        self.kernel, self.client = start_new_kernel(kernel_name="python3", startup_timeout=PATIENCE)
        self.pid = self.kernel.provisioner.process.pid

    def cell(self, code: str) -> str:
        shown: list[str] = []

        def show(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "execute_result":
                shown.append(content["data"]["text/plain"])
            if message["msg_type"] == "stream":
                shown.append(f"{content['name']}: {content['text']}")

        while True:
            reply = self.client.execute_interactive(code, timeout=PATIENCE, output_hook=show, store_history=False)["content"]
            if reply["status"] != "aborted":  # for a moment after an error the kernel skips what it is sent, as a notebook's queued cells
                break
            time.sleep(0.1)
        return "".join(shown) if reply["status"] == "ok" else f"{reply['ename']}: {reply['evalue']}"


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notebook]:
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # torch takes all cores, as it does for a person
    opened = Notebook()
    try:
        yield opened
    finally:
        opened.client.stop_channels()
        if opened.kernel.is_alive():
            opened.kernel.shutdown_kernel(now=True)


def test_cells_run_are_interrupted_and_run_again(notebook: Notebook) -> None:
    assert notebook.cell("import toolchain, torch; (torch.ones(600, 600) @ torch.ones(600, 600)).sum().item()") == "216000000.0"
    alone = _session(notebook.pid)
    first = notebook.cell(DEPLOY.format(samples=20))
    assert 15 <= int(first) <= 20
    assert notebook.cell(DEPLOY.format(samples=20)) == first
    assert _within(SECONDS, lambda: _session(notebook.pid) == alone)

    # a cell that would take minutes, interrupted once Lava's processes run
    notebook.client.execute(f"while True: {DEPLOY.format(samples=200)}", store_history=False)
    assert _within(60, lambda: len(_session(notebook.pid)) > len(alone) + 3)
    time.sleep(0.2)
    notebook.kernel.interrupt_kernel()
    reply = notebook.client.get_shell_msg(timeout=PATIENCE)["content"]
    assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
    assert _within(SECONDS, lambda: _session(notebook.pid) == alone)
    assert notebook.cell(DEPLOY.format(samples=20)) == first

    # in another thread, as servers do; what is left open goes with the kernel
    in_thread = (
        f"from concurrent.futures import ThreadPoolExecutor\nThreadPoolExecutor(1).submit(lambda: {DEPLOY.format(samples=20)}).result()"
    )
    assert notebook.cell(in_thread) == first
    left_open = (
        "from toolchain.compiler import graph_for\nfrom toolchain.source import find\nfrom toolchain.targets.lava_sim import LAVA_SIM\n"
        'run = LAVA_SIM.compile(graph_for(find("digits-fc"), LAVA_SIM))'
    )
    assert notebook.cell(left_open) == ""
    assert len(_session(notebook.pid)) > len(alone) + 3
    notebook.kernel.shutdown_kernel()
    assert _within(SECONDS, lambda: not _session(notebook.pid))
