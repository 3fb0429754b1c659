"""What the machine would not give: memory, or another thread or process. The same want has many names, and this is the one place that knows them.

Python says MemoryError, NumPy and the C core too, torch RuntimeError in words of its own, the system ENOMEM or EAGAIN, the dynamic loader ImportError.
A command also prepares for it: a reserve lets it say what happened, and it takes one thread where there are not enough.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from toolchain.errors import ToolchainError, UsageError

MEMORY_WORDS = (
    "out of memory",  # CUDA, sqlite, ...
    "not enough memory",  # torch's allocator of the CPU
    "can't allocate memory",
    "cannot allocate memory",
    "unable to allocate",
    "allocation failed",
    "failed to map segment",  # the dynamic loader
    "bad_alloc",
    "bad allocation",
    "unable to mmap",
)
THREAD_WORDS = ("can't start new thread", "resource temporarily unavailable", "thread creation failed", "cannot fork")


THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""The environment variables by which libraries know how many threads to start, before they are loaded."""

RESERVE = 1 << 23
"""Bytes of addresses kept for the last sentence; nobody touches them, so they take no memory."""

BLAS_BYTES = 36 << 20
"""What a thread of OpenBLAS takes once, and keeps; a little more than its 32 MiB."""

MOST_THREADS = 64
"""Of NumPy's OpenBLAS."""

BLAS_SIDE = 512
"""Rows and columns of a product that it deals to all its threads."""

_reserve: list[mmap.mmap] = []


@dataclass(frozen=True)
class Shortage:
    """Of what there was not enough, "memory" or "threads and processes", what said so in one line ("" where it said nothing), and what the user can do."""

    of: str
    said: str

    @property
    def sentence(self) -> str:
        """To follow "NAME ": what happened, without a full stop."""
        return f"ran out of {self.of}" + (f" ({self.said})" if self.said else "")

    def remedy(self, lower: Sequence[str]) -> str:
        """What to do: `lower` are the settings that take less, as the user writes them."""
        limits = "`ulimit -v`" if self.of == "memory" else "`ulimit -u`, `ulimit -v`"  # a thread wants a stack
        less = [setting for setting in lower if self.of == "memory" or "jobs" in setting]
        asked = f"lower {' or '.join(less)}, " if less else ""
        return f"{asked}end other programs, or raise what {limits} or the container allows"


def found(error: BaseException | None) -> Shortage | None:
    """The shortage that `error` tells of, itself or what it was raised from; None where it tells of something else, or in a sentence of ours already.

    One that blames what the user gave (exit code 2: a file that could not be read, a package that could not be loaded) is not of ours if a shortage is behind it.
    """
    blames = isinstance(error, UsageError)
    if isinstance(error, ToolchainError) and not blames:
        return None
    for each in _chain(error, hidden=blames):
        of = _of(each)
        if of is not None:
            return Shortage(of, _first_line(each))
    return None


def told(line: str) -> Shortage | None:
    """The shortage that the last line of another process's traceback tells of, as `TYPE: what it says`."""
    kind, _, said = line.partition(": ")
    of = "memory" if kind.endswith("MemoryError") else _of_words(line)
    return None if of is None else Shortage(of, said)


def keep_reserve() -> None:
    """Keep room for what is said at the end."""
    _reserve[:] = [mmap.mmap(-1, RESERVE)]


def free(error: BaseException) -> None:
    """Give back the reserve, and all that the calls which ended in `error` still hold: now there is room to say so."""
    _reserve.clear()
    for each in _chain(error):
        traceback.clear_frames(each.__traceback__)


def hold_blas() -> None:
    """Where a limit on addresses is set, have NumPy's OpenBLAS take its working memory now; MemoryError where there is none.

    Later, at the first product of matrices, it would ask for it again and again, for ever.
    """
    if not _addresses_are_limited():
        return
    import numpy as np

    asked = [int(value) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS") if (value := os.environ.get(name, "")).isdecimal()]
    threads = min([_cores(), MOST_THREADS, *asked[:1]])
    try:
        mmap.mmap(-1, (threads + 1) * BLAS_BYTES).close()
    except OSError as error:
        raise MemoryError(error.strerror) from None
    square = np.ones((BLAS_SIDE, BLAS_SIDE))
    square @ square  # large enough for all its threads


def _addresses_are_limited() -> bool:
    try:
        import resource
    except ImportError:  # no such limits on this system
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _cores() -> int:
    """Those that this process may use, as the libraries count them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quiet_threads() -> None:
    """From now on a library's own thread that ends for a shortage prints no traceback; whoever waits for it says what happened."""
    threading.excepthook = lambda ended: None if found(ended.exc_value) else threading.__excepthook__(ended)


def one_thread_if_short() -> bool:
    """Whether the libraries that are loaded from now on have to do with one thread each, and are told so: elsewhere OpenBLAS interrupts the program, and
    OpenMP ends it, where the threads that they want cannot be started."""
    cores = _cores()
    if cores == 1 or _startable(2 * cores) == 2 * cores:  # each of the two has its own
        return False
    os.environ.update(dict.fromkeys(THREADS, "1"))
    return True


def _startable(most: int) -> int:
    """How many threads can be started now, beside each other, up to `most`."""
    enough = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(most):
            thread = threading.Thread(target=enough.wait, daemon=True)
            thread.start()
            started.append(thread)
    except (RuntimeError, MemoryError):
        pass
    finally:
        enough.set()
        for thread in started:
            thread.join()
    return len(started)


def _of(error: BaseException) -> str | None:
    words = str(error).lower()
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno == errno.ENOMEM:
            return "memory"
        return "threads and processes" if error.errno == errno.EAGAIN and "blocking" not in words else None
    if not isinstance(error, (RuntimeError, ImportError, OSError, SystemError)):
        return None
    return _of_words(words)


def _of_words(said: str) -> str | None:
    words = said.lower()
    if any(word in words for word in MEMORY_WORDS):
        return "memory"
    return "threads and processes" if any(word in words for word in THREAD_WORDS) else None


def _chain(error: BaseException | None, *, hidden: bool = False) -> Iterator[BaseException]:
    """`error` and what it was raised from, or while, as a traceback shows them; with `hidden` also what it was raised `from None` in spite of."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        shown = error.__cause__ if error.__cause__ is not None or error.__suppress_context__ else error.__context__
        error = error.__context__ if hidden and shown is None else shown


def _first_line(error: BaseException) -> str:
    lines = (" ".join(line.split()) for line in str(error).splitlines())
    return next((line for line in lines if line), "").rstrip(".:")
