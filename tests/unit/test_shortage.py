"""Whatever says that the machine gives no more is recognised, and nothing else is."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from toolchain import native, shortage
from toolchain.errors import ArtifactError, ToolchainError


def raised(make: object) -> BaseException:
    try:
        make()  # type: ignore[operator]
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def of_numpy() -> None:
    np.empty(2**62, np.uint8)


def of_torch() -> None:
    import torch

    torch.empty(2**62, dtype=torch.uint8)


def wrapped() -> None:
    try:
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")
    except ImportError as error:
        raise ImportError("you should not try to import numpy from its source directory") from error


@pytest.mark.parametrize("make", [of_numpy, of_torch, wrapped])
def test_what_libraries_say_of_memory(make: object) -> None:
    found = shortage.found(raised(make))
    assert found is not None
    assert found.of == "memory"
    assert "\n" not in found.sentence
    assert found.sentence.startswith("ran out of memory (")


@pytest.mark.parametrize(
    ("error", "of"),
    [
        (MemoryError(), "memory"),
        (MemoryError("std::bad_alloc"), "memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
        (OSError("libgomp.so.1: cannot allocate memory in static TLS block"), "memory"),
        (RuntimeError("can't start new thread"), "threads and processes"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "threads and processes"),
        (BlockingIOError(errno.EAGAIN, "write could not complete without blocking"), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (RuntimeError("shapes (3,4) and (5,6) differ"), None),
        (ValueError("out of memory"), None),
        (ToolchainError("there is not enough memory for the results: run fewer at a time"), None),
        (None, None),
    ],
)
def test_every_name_of_a_shortage(error: BaseException | None, of: str | None) -> None:
    found = shortage.found(error)
    assert (found.of if found is not None else None) == of


def test_an_error_that_hides_its_cause_is_judged_by_its_own_words() -> None:
    def make() -> None:
        try:
            raise MemoryError
        except MemoryError:
            raise ValueError("a size is wrong") from None

    assert shortage.found(raised(make)) is None


def test_a_file_is_not_blamed_for_a_shortage() -> None:
    def make(kind: type[ToolchainError]) -> None:
        try:
            raise RuntimeError("unable to mmap 1913656 bytes from file <x.safetensors>: Cannot allocate memory (12)")
        except RuntimeError as error:
            raise kind(f"'x.safetensors' is damaged ({error}): restore it") from None

    assert shortage.found(raised(lambda: make(ArtifactError))) is not None
    assert shortage.found(raised(lambda: make(ToolchainError))) is None


def test_the_remedy_names_what_to_lower() -> None:
    memory = shortage.found(MemoryError())
    threads = shortage.found(OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)))
    assert memory is not None
    assert threads is not None
    assert memory.sentence == "ran out of memory"
    assert threads.remedy(["--batch", "--jobs"]).startswith("lower --jobs, end other programs")
    assert memory.remedy(["--batch", "--jobs"]).startswith("lower --batch or --jobs, end other programs, or raise what `ulimit -v`")
    assert threads.remedy([]) == "end other programs, or raise what `ulimit -u`, `ulimit -v` or the container allows"


def test_what_failed_calls_hold_is_given_back() -> None:
    held: list[bytearray] = []

    class Large(bytearray):
        def __del__(self) -> None:
            held.append(self)

    def failing() -> None:
        large = Large(10)
        assert large is not None
        raise MemoryError

    error = raised(failing)
    assert not held
    shortage.keep_reserve()
    shortage.free(error)
    assert held
    assert not shortage._reserve


@pytest.mark.parametrize(("startable", "short"), [(1000, False), (1, True)])
def test_too_few_threads_make_every_library_run_in_one(startable: int, short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in shortage.THREADS:
        monkeypatch.setenv(name, "7")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr(shortage, "_startable", lambda most: min(most, startable))
    assert shortage.one_thread_if_short() is short
    assert {os.environ[name] for name in shortage.THREADS} == {"1" if short else "7"}


def test_working_memory_is_taken_in_time_or_missed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenBLAS would try for ever."""
    shortage.hold_blas()  # no limit: nothing to do
    monkeypatch.setattr(shortage, "_addresses_are_limited", lambda: True)
    shortage.hold_blas()

    def full(*_: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", full)
    with pytest.raises(MemoryError, match="Cannot allocate memory"):
        shortage.hold_blas()


def test_threads_are_counted_until_one_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shortage._startable(5) == 5
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def third_fails(self: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", third_fails)
    assert shortage._startable(5) == 2
    assert not any(thread.is_alive() for thread in started)


CRASH = """
import os, sys
from toolchain import native
native.last_words("toolchain: the last words\\n", 1)
if sys.argv[1] == "fork":
    child = os.fork()
    if not child:
        os.abort()
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) + 100)
os.kill(os.getpid(), int(sys.argv[1]))
"""


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        (str(int(signal.SIGABRT)), 1, "toolchain: the last words\n"),
        (str(int(signal.SIGSEGV)), 1, "toolchain: the last words\n"),
        ("fork", 100 - signal.SIGABRT, ""),
    ],
)
def test_a_crash_has_last_words_and_a_fork_s_has_not(how: str, code: int, said: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", CRASH, how], capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_thread_that_ends_for_a_shortage_prints_nothing_and_another_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)

    def ending(error: Exception) -> None:
        raise error

    shortage.quiet_threads()
    for error in (RuntimeError("can't start new thread"), ValueError("a fault of ours")):
        thread = threading.Thread(target=ending, args=(error,))
        thread.start()
        thread.join()
    said = capsys.readouterr().err
    assert "a fault of ours" in said
    assert "can't start" not in said
