"""The largest CIFAR network of the papers compiles within the time and memory of a laptop."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the kernel says of a process")
def test_cifarnet_f_compiles_in_20_seconds_and_2_gb(tmp_path):
    """11.8 million parameters, T 30, T_B 250; processor time, so that a busy machine does not count."""
    command = [sys.executable, "-m", "toolchain", "compile", "cifarnet-f", "--target", "sim", "-o", str(tmp_path / "cifarnet-f.fsnn")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w") as said:
        started = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        memory = _highest_memory(started.pid)
        _, status, used = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)
    assert started.returncode == 0, (tmp_path / "said").read_text()
    assert used.ru_utime + used.ru_stime < 20
    assert 2**18 < memory < 2 * 2**20  # KiB


def _highest_memory(pid: int) -> int:
    """KiB that a process had at most, up to an instant before its end. (What `wait4` says of it begins with the memory of this process, which started it.)"""
    highest = 0
    while True:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
        if not found:  # ended, and waits for its parent
            return highest
        highest = max(highest, *found)
        time.sleep(0.02)
