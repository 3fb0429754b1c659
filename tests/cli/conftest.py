"""Two ways to give a command: in this process (fast), and as a person does it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from toolchain import cli

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Answer:
    """What a command left: its exit code and both streams."""

    code: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Give a command in this process; sys.exit is caught, the signal handler put back."""

    def give(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["toolchain", *map(str, words)])
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        for number, action in before.items():
            signal.signal(number, action)
        out, err = capfd.readouterr()
        return Answer(left.value.code or 0, out, err)

    return give


@pytest.fixture
def shell() -> Command:
    """Give a command in a process of its own, outside the source tree."""

    def give(*words: object, code: str | None = None) -> Answer:
        start = ["-m", "toolchain", *map(str, words)] if code is None else ["-c", code]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *start], capture_output=True, text=True, timeout=120, env=environment, check=False)
        return Answer(done.returncode, done.stdout, done.stderr)

    return give
