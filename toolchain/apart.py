"""Work in a child process that may crash, hang or want too much memory: what a library in C does with a stranger's file is no matter of trust."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import resource
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from toolchain.children import forking
from toolchain.errors import ToolchainError

T = TypeVar("T")

PATIENCE = 30
"""How many times the processor time may pass by the clock, on a machine that has much else to do."""


class Died(Exception):
    """The child ended before its work did. `slow`: it used up its time."""

    def __init__(self, *, slow: bool) -> None:
        super().__init__("it took too long" if slow else "it crashed")
        self.slow = slow


def run(work: Callable[[BinaryIO], None], receive: Callable[[BinaryIO], T], *, seconds: int, memory: int) -> T:
    """What `receive` makes, in this process, of what `work` writes in a child forked from it.

    The child may use `seconds` of processor time and `memory` bytes beyond what this process holds. `receive` takes nothing of what it reads on trust: EOFError, ValueError, TypeError and
    LookupError of its own count as the child's end. Died where the child fails, ToolchainError where none can be started. It leaves no child and no open file behind.
    """
    reading, writing = os.pipe()
    try:
        child = _forked(work, reading, writing, seconds, memory)
    except OSError as error:
        os.close(reading)
        raise ToolchainError(f"no process could be started ({error.strerror}): free memory or end other processes") from None
    finally:
        os.close(writing)
    died, status = False, 0
    try:
        with os.fdopen(reading, "rb") as stream:
            return receive(stream)
    except (EOFError, ValueError, TypeError, LookupError):
        died = True
    finally:
        if not died:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    raise Died(slow=os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM))


def _forked(work: Callable[[BinaryIO], None], reading: int, writing: int, seconds: int, memory: int) -> int:
    """Start the child; the number of its process."""
    with forking(), warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads, whose locks nobody opens in the child: it takes only those that are made for it (h5py's, the allocator's)
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
        if child == 0:
            _live(work, reading, writing, seconds, memory)
    return child


def _live(work: Callable[[BinaryIO], None], reading: int, writing: int, seconds: int, memory: int) -> None:
    """The child's life: it never returns, whatever happens."""
    try:
        gc.disable()  # what there is to tidy up is the parent's
        faulthandler.disable()
        for ends in (signal.SIGTERM, signal.SIGXCPU, signal.SIGALRM):
            signal.signal(ends, signal.SIG_DFL)
        silent = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(silent, stream)
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        signal.alarm(PATIENCE * seconds)
        with contextlib.suppress(OSError, ValueError):  # where there is no /proc, or a lower limit already, this one is left out
            held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (held + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
        with os.fdopen(writing, "wb") as out:
            work(out)
        os._exit(0)
    finally:
        os._exit(1)
