"""Ctrl-C and SIGTERM end a command through every `finally`, wherever they find it.

Python raises them in the middle of whatever runs. An import is no place for that: compiled modules that are starting swallow the exception, or stay
half made. Nor is a finalizer, which then leaves half of its work undone (a semaphore that is gone but still on a list), or any callback, where it is printed and forgotten.
So a wish to end waits while something is imported or finalized, and is repeated until it arrives.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import time
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes, as shells give them."""

AGAIN = 0.1
"""Seconds until a wish is repeated that has not arrived."""

LONGEST_WAIT = 3.0
"""Seconds that a wish waits for an import or a finalizer at most; then the command leaves from where it is."""

WORDS = {INTERRUPTED: "interrupted", TERMINATED: "terminated"}

_wish: tuple[int, float] | None = None
"""The signal that came first, and when."""


def watch() -> None:
    """From now on SIGINT raises KeyboardInterrupt and SIGTERM SystemExit(TERMINATED) in the main thread. A signal that the shell had ignored stays so."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _asked)


def arrived() -> None:
    """The command knows, and is about to leave: nothing is repeated."""
    global _wish
    signal.setitimer(signal.ITIMER_REAL, 0)
    _wish = None


def say(code: int) -> None:
    print(f"toolchain: {WORDS[code]}", file=sys.stderr)


def leave(code: int) -> NoReturn:
    """End without the interpreter's own end, which takes long where torch is loaded, and in the middle of a start may never come.

    What was registered for that end runs all the same.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _asked(number: int, frame: FrameType | None) -> None:
    global _wish
    if _wish is None:
        _wish = number, time.monotonic()
        sys.unraisablehook = _unless_asked
    _raise(frame)


def _repeat(number: int, frame: FrameType | None) -> None:
    if not _under_way(sys.exc_info()[1]):
        _raise(frame)


def _raise(frame: FrameType | None) -> None:
    if _wish is None:
        return
    number, since = _wish
    signal.signal(signal.SIGALRM, _repeat)
    signal.setitimer(signal.ITIMER_REAL, AGAIN)
    if _busy(frame):
        if time.monotonic() - since < LONGEST_WAIT:
            return
        say(128 + number)
        leave(128 + number)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(TERMINATED)


def _busy(frame: FrameType | None) -> bool:
    """Whether something is being imported or finalized."""
    while frame is not None:
        code = frame.f_code
        file = code.co_filename.replace(os.sep, "/")
        finalizer = code.co_name == "__del__" or (code.co_name == "__call__" and file.endswith(("/weakref.py", "/multiprocessing/util.py")))
        if finalizer or file.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _under_way(error: BaseException | None) -> bool:
    """Whether the wish, or what somebody made of it, is what is being handled: then some `finally` takes its time."""
    while error is not None:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            return True
        error = error.__context__
    return False


def _unless_asked(lost: Any) -> None:
    """What Python cannot raise it prints; a wish that is repeated is none of that."""
    if not isinstance(lost.exc_value, (KeyboardInterrupt, SystemExit)):
        sys.__unraisablehook__(lost)
