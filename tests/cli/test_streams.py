"""Closed and full streams, signals in the shell's terms, and flags that would mean nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import toolchain

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["deploy", "mnist-fc", "--target", "sim", "--jobs", "0"], "--jobs takes a whole number from 1"),
        (["compare", "mnist-fc", "--report", ""], "path is empty"),
        (["train", "digits-fc", "-o", ""], "path is empty"),
        (["train", "digits-fc", "-o", "run", "--set", "model=mnist-fc"], "'model' is no setting"),
        (["verify", "x.fsnn", "--replay", "--samples", "3", "--phase", "both"], "--samples and --phase would not be used by --replay"),
        (["verify", "x.fsnn", "--replay", "--dataset", "digits"], "--dataset would not be used by --replay"),
    ],
)
def test_what_would_mean_nothing_is_refused(command, tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    answer = command(*words)
    assert (answer.code, answer.out) == (2, "")
    assert named in answer.err
    assert answer.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["models --json", "--help"])
def test_a_closed_stdout_is_quiet(words):
    line = f"{sys.executable} -m toolchain {words} >&-"
    done = subprocess.run(["bash", "-c", line], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["models", "models --json", "--help"])
def test_a_full_stdout_is_one_sentence(words):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "toolchain", *words.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("toolchain: cannot read or write stdout")
    assert done.stderr.count("\n") == 1


def test_an_interrupt_says_so(command, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(toolchain, "inspect", interrupted)
    answer = command("inspect", "mnist-fc")
    assert (answer.code, answer.out, answer.err) == (130, "", "toolchain: interrupted\n")


@pytest.mark.parametrize(
    ("sent", "code", "said"), [(signal.SIGINT, 130, "toolchain: interrupted\n"), (signal.SIGTERM, 143, "toolchain: terminated\n")]
)
def test_signals_are_one_line_and_their_exit_code(tmp_path, sent, code, said):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "toolchain", "train", "digits-fc", "-o", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    end = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert [line for line in err.splitlines(keepends=True) if not line.startswith("epoch ")] == [said]
    assert not (run / ".lock").exists()
