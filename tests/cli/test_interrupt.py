"""A command that runs Lava ends at once when asked to, says so, and which samples are saved, in a line each, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ["deploy", "mnist-fc", "--target", "lava-sim", "--synapses", "stock", "--dataset", "mnist-1k"]

ENDED = {130: ["toolchain: interrupted"], 143: ["toolchain: terminated"], -9: []}


def children(pid: int) -> set[int]:
    return {int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def within(seconds: float, condition) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.lava
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=["ctrl-c", "term", "kill"]
)
def test_no_process_outlives_the_command(sent, code, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "toolchain", *COMMAND],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert within(60, lambda: len(children(process.pid)) >= 4), process.communicate()
    time.sleep(0.5)
    started = children(process.pid)
    process.send_signal(sent)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if "are done on lava-sim and saved for --resume" not in line] == ENDED[code], err
    assert within(5, lambda: not any(alive(child) for child in started))


FINALIZED = """
import signal, sys, time
from multiprocessing.util import Finalize
from weakref import finalize
from toolchain import endings

def slow(name):
    for _ in range(30):
        time.sleep(0.01)
    print(name, flush=True)

class Thing:
    pass

class Kept:
    def __del__(self):
        slow("del")

endings.watch()
thing, other, kept = Thing(), Thing(), Kept()
Finalize(thing, slow, ("multiprocessing",))
finalize(other, slow, "weakref")
print("ready", flush=True)
try:
    if sys.argv[1] == "multiprocessing":
        del thing
    elif sys.argv[1] == "weakref":
        del other
    else:
        del kept
    for _ in range(500):
        time.sleep(0.01)
except SystemExit:
    endings.arrived()
    print("ended", flush=True)
    endings.leave(0)
"""


@pytest.mark.parametrize("kind", ["multiprocessing", "weakref", "del"])
def test_a_signal_lets_a_finalizer_finish(kind):
    """What tidies up does all of it, and the wish to end arrives after."""
    process = subprocess.Popen(
        [sys.executable, "-c", FINALIZED, kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (out.splitlines()[:2], err, process.returncode) == ([kind, "ended"], "", 0)
