"""However a lava-sim run ends, it ends: one message, within seconds, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from toolchain.errors import ToolchainError, UsageError
from toolchain.passes.retime import Retime
from toolchain.targets.lava_sim import LAVA_SIM, LavaSim

pytestmark = [pytest.mark.lava, pytest.mark.skipif(LAVA_SIM.available() is not None, reason=str(LAVA_SIM.available()))]

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10.0


def _alive(pid: int) -> bool:
    """Whether a process still runs; one that ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(_alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(_alive(pid) for pid in pids)


def _shared_files() -> set[str]:
    return set(os.listdir("/dev/shm"))


def _nothing_new(before: set[str]) -> bool:
    """Semaphores have a name for an instant while anybody makes one: look again for a while."""
    end = time.monotonic() + 2
    while _shared_files() - before and time.monotonic() < end:
        time.sleep(0.05)
    return not _shared_files() - before


@pytest.fixture
def network(random_graph: Any, random_inputs: Any) -> tuple[Any, Any, Any]:
    graph = Retime()(random_graph(3, couples=2))
    return (graph, *random_inputs(graph, 4))


def test_an_exception_in_a_process_is_one_message(network: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from toolchain.targets.lava_sim.processes import population_models

    graph, inputs, _ = network
    step = population_models._Integrating._step

    def broken(self: Any, role: Any, record: Any, number: int) -> None:
        if role.name == "couple1" and number == 3:
            raise ValueError("injected on purpose")
        step(self, role, record, number)

    monkeypatch.setattr(population_models._Integrating, "_step", broken)
    before = time.monotonic()
    run = LAVA_SIM.compile(graph)
    children = [child.pid for child in run._network._runtime.children]
    with pytest.raises(ToolchainError, match=r"^Lava process 'couple1' raised ValueError: injected on purpose") as caught:
        run.run(inputs)
    assert "\n" not in str(caught.value)
    assert "in broken" in str(caught.value.__cause__)
    assert time.monotonic() - before < SECONDS
    assert _gone(children, 1)
    with pytest.raises(ToolchainError, match="injected on purpose"):
        run.run(inputs)
    run.close()
    assert capfd.readouterr().out == ""


def test_an_exception_in_a_synapse_and_in_the_building_of_one(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolchain.targets.lava_sim.processes import synapse_models

    graph, inputs, _ = network

    def broken(self: Any, *parameters: Any) -> None:
        raise MemoryError("injected on purpose")

    for method in ("run_spk", "__init__"):
        with monkeypatch.context() as patch:
            patch.setattr(synapse_models._SynapseModel, method, broken)
            with LAVA_SIM.compile(graph) as run, pytest.raises(ToolchainError, match=r"-> .* raised MemoryError: injected on purpose"):
                run.run(inputs)


@pytest.mark.parametrize("which", [0, 3, -1])
def test_a_killed_process_is_one_message(network: Any, which: int) -> None:
    """Also the runtime service, which is the last."""
    graph, inputs, _ = network
    with LavaSim(batch=2).compile(graph) as run:
        run.run(inputs)
        children = [child.pid for child in run._network._runtime.children]
        threading.Timer(0.3, os.kill, (children[which], signal.SIGKILL)).start()
        before = time.monotonic()
        with pytest.raises(ToolchainError, match="was ended by signal 9"):
            run.run(inputs.repeat(5000, axis=0))
        assert time.monotonic() - before < SECONDS
        assert _gone(children, 1)


def test_a_process_killed_between_runs(network: Any) -> None:
    graph, inputs, _ = network
    with LAVA_SIM.compile(graph) as run:
        run.run(inputs)
        os.kill(run._network._runtime.children[1].pid, signal.SIGKILL)
        with pytest.raises(ToolchainError, match="was ended by signal 9"):
            run.run(inputs)


def test_a_network_that_stands_still_passes_its_deadline(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolchain.targets.lava_sim.processes import synapse_models

    graph, inputs, _ = network
    monkeypatch.setattr(synapse_models._SynapseModel, "run_spk", lambda self: time.sleep(600))
    with LavaSim(deadline=0.5).compile(graph) as run, pytest.raises(ToolchainError, match=r"stood still for 0\.5 s"):
        run.run(inputs)


def test_closing_twice_and_running_after(network: Any) -> None:
    graph, inputs, _ = network
    run = LAVA_SIM.compile(graph)
    children = [child.pid for child in run._network._runtime.children]
    run.close()
    run.close()
    assert _gone(children, 1)
    with pytest.raises(ToolchainError, match="closed: compile the graph again"):
        run.run(inputs)


def test_nothing_is_left_open(network: Any) -> None:
    """File descriptors, threads, shared memory files, and Lava's own list of processes stay as they were."""
    from lava.magma.core.process.process import ProcessServer

    graph, inputs, _ = network

    def held() -> tuple[int, int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count(), len(ProcessServer().processes)

    def once() -> None:
        with LAVA_SIM.compile(graph) as run:
            run.run(inputs)

    once()
    time.sleep(0.2)
    before, files = held(), _shared_files()
    for _ in range(3):
        once()
    time.sleep(0.2)
    assert held() == before
    assert _nothing_new(files)


def _victim(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).parent / "lava_victim.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("to_group", [False, True])
def test_a_signal_ends_the_command_and_its_children(signum: signal.Signals, to_group: bool) -> None:
    """Ctrl-C goes to the whole group, other signals to the command alone: both ways for each."""
    files = _shared_files()
    victim = _victim("forever")
    assert victim.stdout is not None
    children = [int(word) for word in victim.stdout.readline().split()]
    assert len(children) > 3
    time.sleep(0.1)
    before = time.monotonic()
    (os.killpg if to_group else os.kill)(victim.pid, signum)
    try:
        out, err = victim.communicate(timeout=SECONDS)
    finally:
        for pid in [victim.pid, *children] if victim.poll() is None else []:  # what did not end would take the cores from every other test
            os.kill(pid, signal.SIGKILL)
    assert time.monotonic() - before < SECONDS
    assert victim.returncode in (-signum, 1, 130)
    assert _gone(children, 2)
    assert out == ""
    assert err.count("KeyboardInterrupt") == (1 if signum == signal.SIGINT else 0), err
    assert _nothing_new(files)


def test_an_unclosed_network_does_not_keep_the_interpreter() -> None:
    victim = _victim("unclosed")
    out, err = victim.communicate(timeout=SECONDS + 10)
    assert (victim.returncode, out, err) == (0, "ran\n", "")


def test_another_start_method_is_refused(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.get_start_method", lambda allow_none: "spawn")
    with pytest.raises(UsageError, match="start method 'fork'"):
        LAVA_SIM.compile(network[0])
