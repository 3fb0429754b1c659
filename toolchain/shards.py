"""Samples dealt to workers in shards: what travels, what a worker keeps open between two of them, and what happens to one that failed.

A worker is a process here or on another machine; `toolchain.crews` starts or finds them. Facts and arrays travel as MessagePack, never as a pickle.
A worker opens a job once (for a target: compiles the graph and starts it), answers shard after shard, and closes it when the job ends or nobody asks any more.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import socket
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np

import toolchain
from toolchain import shortage
from toolchain.errors import DesignRuleError, ToolchainError, UsageError
from toolchain.ir import Array

RETRIES = 3
"""How often a shard that failed is run again."""

SHARDS_EACH = 4
"""Shards a worker gets where there are samples enough: so many steps has its progress, and so little is run again."""

FEWEST, MOST = 128, 256
"""Samples of a shard: fewer do not fill a batch, more only make steps coarse. Large networks get smaller ones."""

AT_ONCE = 2**22
"""Neurons of a small shard's samples together."""

IDLE = 60.0
"""Seconds after which a worker that is not asked any more closes what it has open: the one who asked may be gone."""

LOWER = ("--jobs", "--batch", "--samples")
"""The settings by which a run takes less of the machine."""

PATIENCE = 3.0
"""Seconds that a shard which is running may take before a job's end closes what it runs on."""


NUMBERS = re.compile(r"[<>|][biuf][1248]")
"""The types of arrays that travel, as NumPy writes them."""


@dataclass(frozen=True)
class Message:
    """What travels between a job and its workers."""

    facts: dict[str, Any]
    arrays: Mapping[str, Array] = field(default_factory=dict)

    def packed(self) -> bytes:
        arrays = {
            name: (array.dtype.str, array.shape, np.ascontiguousarray(array).data.cast("B"))
            for name, array in self.arrays.items()
            if array.size
        }
        empty = {name: (array.dtype.str, array.shape, b"") for name, array in self.arrays.items() if not array.size}
        return msgspec.msgpack.encode((self.facts, arrays | empty))

    @classmethod
    def unpacked(cls, data: bytes) -> Message:
        """ValueError or msgspec.MsgspecError where `data` is no such message; other arrays than plain numbers are none."""
        facts, arrays = msgspec.msgpack.decode(data, type=tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...], bytes]]])
        if not all(NUMBERS.fullmatch(kind) for kind, _, _ in arrays.values()):
            raise ValueError("an array holds no plain numbers")
        return cls(facts, {name: np.frombuffer(raw, np.dtype(kind)).reshape(shape) for name, (kind, shape, raw) in arrays.items()})


@dataclass(frozen=True)
class Failure:
    """Why a worker gave no answer. `again`: another try may succeed; `detail` is a traceback."""

    message: str
    exit_code: int = 1
    again: bool = True
    detail: str = ""


class Session(Protocol):
    """A job that a worker has open."""

    def greeting(self) -> Message:
        """What the worker says of itself before the first shard."""

    def answer(self, question: Message) -> Message: ...

    def close(self) -> None: ...


Opener = Callable[[Message], Session]
"""Opens a job in a worker. A function of a module, since workers find it by its name."""


class Crew(Protocol):
    """Workers that answer, each one shard at a time. Answers come back in any order."""

    size: int

    def room(self) -> bool:
        """Whether another question can be given now."""

    def give(self, number: int, question: bytes) -> None: ...

    def take(self) -> tuple[int, Message | Failure]:
        """The next answer, whatever its number; waits for it. ToolchainError where nobody is left who could answer."""


def dealt(samples: int, workers: int, *, neurons: int, batch: int | None, exact: bool) -> list[slice]:
    """The samples of each shard, in order.

    Shards are whole batches where the user chose a `batch`. Sums of floats depend on how many rows are multiplied together: where
    arithmetic is not `exact`, shards are cut where one process cuts its batches.
    """
    fewest = least(neurons, batch)
    size = min(max(-(-samples // (SHARDS_EACH * workers)), fewest), max(fewest, 2 * fewest if batch is None else MOST))
    if batch is not None:
        size = -(-size // batch) * batch
    if exact:
        size = min(size, -(-samples // workers))
    elif batch is None or MOST % batch:
        size = MOST
    return [slice(first, min(first + size, samples)) for first in range(0, samples, size)]


def least(neurons: int, batch: int | None) -> int:
    """The fewest samples that keep a target busy: a batch."""
    return batch or max(1, min(FEWEST, AT_ONCE // neurons))


class Tries:
    """Counts how often what failed was tried, and gives up in one sentence."""

    def __init__(self) -> None:
        self.again = 0
        self._failed: Counter[str] = Counter()

    def count(self, what: str, failure: Failure) -> None:
        """Return where `what` is to be tried again; raise the failure's own error where that would not help, ToolchainError where it did not."""
        if not failure.again:
            own = failure.exit_code != ToolchainError.exit_code  # the user's, whatever the samples
            raise _error(failure.message if own else f"{what}: {failure.message}", failure) from _cause(failure)
        self._failed[what] += 1
        if self._failed[what] > RETRIES:
            raise ToolchainError(f"{what} failed {self._failed[what]} times, the last time because {failure.message}") from _cause(failure)
        self.again += 1


def answers(crew: Crew, questions: Sequence[Callable[[], bytes]], names: Sequence[str], tries: Tries) -> Iterator[tuple[int, Message]]:
    """The answer to each question with its number, as they come; `names` say in an error what a question is about."""
    waiting = deque(range(len(questions)))
    missing = len(questions)
    while missing:
        while waiting and crew.room():
            crew.give(waiting[0], questions[waiting[0]]())
            waiting.popleft()
        number, answer = crew.take()
        if isinstance(answer, Failure):
            tries.count(names[number], answer)
            waiting.append(number)
        else:
            missing -= 1
            yield number, answer


def read_answer(data: bytes) -> Message | Failure:
    """What `ask` returned."""
    message = Message.unpacked(data)
    failure = message.facts.get("failure")
    return message if failure is None else Failure(**failure)


def _error(message: str, failure: Failure) -> ToolchainError:
    kinds = {kind.exit_code: kind for kind in (UsageError, DesignRuleError)}
    return kinds.get(failure.exit_code, ToolchainError)(message)


def _cause(failure: Failure) -> Exception | None:
    return RuntimeError(failure.detail) if failure.detail else None


# ---- what runs in a worker


class _Open:
    """The jobs that this process has open, by name. One question at a time: a process hosts its runtimes politely."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sessions: dict[str, Session] = {}
        self.timers: dict[str, threading.Timer] = {}


_OPEN = _Open()


def ask(opener: Opener, name: str, job: bytes, question: bytes) -> bytes:
    """Answer one shard of the job called `name`, or say hello where `question` is empty. The job is opened where this process has not done so before.

    Nothing is raised: what went wrong is the answer.
    """
    with _OPEN.lock:
        _stop_timer(name)
        try:
            with _hosting():
                session = _session(opener, name, job)
                answer = session.answer(Message.unpacked(question)) if question else session.greeting()
        except Exception as error:  # the boundary of this process
            _close(name)
            answer = Message({"failure": msgspec.to_builtins(_failure(error))})
        _start_timer(name)
    return answer.packed()


def end(name: str) -> None:
    """Close the job called `name` in this process; a shard that is running has `PATIENCE` seconds to end."""
    waited = _OPEN.lock.acquire(timeout=PATIENCE)
    try:
        _stop_timer(name)
        _close(name)
    finally:
        if waited:
            _OPEN.lock.release()


def where() -> str:
    """This worker, as messages name it."""
    return f"{socket.gethostname()}, process {os.getpid()}"


def _session(opener: Opener, name: str, job: bytes) -> Session:
    if name not in _OPEN.sessions:
        given = Message.unpacked(job)
        theirs = given.facts["toolchain"]
        if theirs != toolchain.__version__:
            raise UsageError(
                f"the worker on {where()} has toolchain {toolchain.__version__} and the job comes from {theirs}: install the same version on both"
            )
        shortage.hold_blas()
        _OPEN.sessions[name] = opener(given)
    return _OPEN.sessions[name]


def _close(name: str) -> None:
    session = _OPEN.sessions.pop(name, None)
    if session is not None:
        session.close()


def _end_idle(name: str) -> None:
    """What a timer does: close the job, unless somebody asked for it while the timer waited for its turn."""
    with _OPEN.lock:
        if _OPEN.timers.get(name) is threading.current_thread():
            del _OPEN.timers[name]
            _close(name)


def _start_timer(name: str) -> None:
    timer = _OPEN.timers[name] = threading.Timer(IDLE, _end_idle, (name,))
    timer.daemon = True
    timer.start()


def _stop_timer(name: str) -> None:
    timer = _OPEN.timers.pop(name, None)
    if timer is not None:
        timer.cancel()


def _failure(error: Exception) -> Failure:
    detail = "".join(traceback.format_exception(error))
    if isinstance(error, ToolchainError):
        return Failure(str(error), error.exit_code, again=error.exit_code == ToolchainError.exit_code, detail=detail)
    missing = shortage.found(error)
    if missing is not None:
        return Failure(f"the worker on {where()} {missing.sentence}: {missing.remedy(LOWER)}", detail=detail)
    said = f"the worker on {where()} failed with {type(error).__name__}: {error}: see the cause with --debug"
    return Failure(said, again=isinstance(error, OSError), detail=detail)


@contextlib.contextmanager
def _hosting() -> Iterator[None]:
    """Children of this process are forked, as Lava needs: a Dask worker under a Nanny was spawned, and multiprocessing then spawns what it starts too."""
    method = multiprocessing.get_start_method(allow_none=True)
    forks = method not in (None, "fork") and "fork" in multiprocessing.get_all_start_methods()
    if forks:
        multiprocessing.set_start_method("fork", force=True)
    try:
        yield
    finally:
        if forks:
            multiprocessing.set_start_method(method, force=True)
