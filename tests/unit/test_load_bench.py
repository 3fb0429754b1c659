"""`make load` in short: passes of `deploy` on sim leave nothing behind, and what is left or grows is found."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


@pytest.fixture(scope="module")
def load() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("load")
    sys.path.remove(str(FOLDER))
    for name in ("load", "endurance"):
        sys.modules.pop(name, None)


def test_passes_on_sim_leave_nothing(load: ModuleType) -> None:
    held = load.part("sim", "mnist-1k", 200, 3)
    assert held.left == dict.fromkeys(load.KINDS, 0)
    assert len(held.accuracies) == 3
    assert len(set(held.accuracies)) == 1
    assert held.problems() == []


def test_what_is_left_is_found(load: ModuleType) -> None:
    """A handle, a thread, a temporary file and a figure a pass, accuracies that differ, and memory that grows."""
    from matplotlib.figure import Figure

    kept: list[Any] = []
    done = threading.Event()

    def leaks() -> float:
        thread = threading.Thread(target=done.wait)
        thread.start()
        _, path = tempfile.mkstemp()
        kept.extend(
            [os.open(os.devnull, os.O_RDONLY), thread, Figure(), bytearray(2**27), path]
        )  # 128 MiB: more than 5 % of what other tests left
        return len(kept) / 100

    def start() -> AbstractContextManager[Any]:
        return nullcontext(leaks)

    held = load.repeated("leaks", 1, 3, start)
    done.set()
    for handle in (one for one in kept if isinstance(one, int)):
        os.close(handle)
    found = " ".join(held.problems())
    assert held.left["threads"] == 3
    for what in (
        "3 threads left",
        "6 handles left",
        "4 temporary files left",
        "4 figures left",
        "accuracies differ",
        "memory of this process grew",
    ):
        assert what in found, found


def test_the_children_s_memory_is_watched(load: ModuleType) -> None:
    import subprocess

    def one_pass() -> float:
        subprocess.run([sys.executable, "-c", "import time; time.sleep(0.2)"], check=True)
        return 1.0

    held = load.repeated("child", 1, 2, lambda: nullcontext(one_pass))
    assert min(held.of_children) > 1
    assert held.left["children"] == 0


def test_a_small_leak_and_a_child_that_lost_its_parent_are_found(load: ModuleType) -> None:
    import subprocess

    held = load.Held("slow", 1, [1.0] * 6, [400.0 + 0.5 * n for n in range(6)], [0.0] * 6, [1.0] * 6, dict.fromkeys(load.KINDS, 0))
    assert held.problems() == ["slow: the memory of this process grew at every pass, from 400.0 to 402.5 MiB"]
    held.memory[3] = held.memory[2]
    assert held.problems() == []

    lost: list[int] = []

    def one_pass() -> float:
        done = subprocess.run(["sh", "-c", "sleep 60 >/dev/null & echo $!"], check=True, stdout=subprocess.PIPE)
        lost.append(int(done.stdout))
        return 1.0

    try:
        held = load.repeated("lost", 1, 2, lambda: nullcontext(one_pass))
        assert "lost: 2 children left" in held.problems()
    finally:
        for pid in lost:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
