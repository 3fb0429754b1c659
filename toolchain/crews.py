"""Where shards run: processes of this machine by joblib, or the workers of a Dask scheduler.

Both need the extra `cluster`. A worker that dies takes its shard with it and nothing else: on this machine another process takes its place, on a cluster the
other workers take over. All of ours are gone when a crew is closed, and they end by themselves when the process that started them is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import time
import uuid
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from multiprocessing import resource_tracker
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Protocol

import toolchain
from toolchain import shards, target
from toolchain.children import end_with
from toolchain.errors import ToolchainError, UsageError
from toolchain.shards import Failure, Message, Opener, Tries
from toolchain.shortage import THREADS

INSTALL = 'pip install "fsnn-toolchain[cluster]"'

ANSWER = 5.0
"""Seconds in which a scheduler has to answer, and a worker to have joined it."""

GONE = 30.0
"""Seconds without any worker, or without the scheduler, after which a run gives up."""

LOOK = 2.0
"""Seconds between two looks at which workers a scheduler has, and at whether ours are watched."""


class OpenCrew(shards.Crew, Protocol):
    """A crew as `deploy` uses it: entered, asked what it lacks, made ready for one job, and closed."""

    def lacks(self, name: str) -> str | None:
        """What target `name` lacks where it would run, a sentence; None where it can run."""

    def ready(self, job: Message, most: int, tries: Tries) -> list[Message]:
        """Open `job` in up to `most` workers; what each says of itself."""

    def run_again(self) -> int:
        """How often the crew ran a shard again without being told to."""

    def __enter__(self) -> OpenCrew: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def crew(opener: Opener, jobs: int, scheduler: str | None) -> OpenCrew:
    """`jobs` processes of this machine, or the workers of `scheduler`; UsageError where what that needs is not installed."""
    flag, packages = ("--jobs", ("joblib",)) if scheduler is None else ("--scheduler", ("dask", "distributed"))
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UsageError(f"{flag} needs {' and '.join(missing)}, which this environment lacks: run {INSTALL}")
    return LocalCrew(opener, jobs) if scheduler is None else DaskCrew(opener, scheduler)


class LocalCrew:
    """Processes of this machine, each in an executor of joblib's loky by itself: so the death of one leaves the others alone."""

    def __init__(self, opener: Opener, jobs: int) -> None:
        self.size = jobs
        self._opener = opener
        self._name = uuid.uuid4().hex
        self._job = b""
        self._executors: dict[int, Any] = {}
        self._free: deque[int] = deque()
        self._answered: SimpleQueue[tuple[int, int, Any]] = SimpleQueue()

    def __enter__(self) -> LocalCrew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Kill every worker and what it started: nothing of theirs is worth a farewell."""
        places, self._executors = list(self._executors.values()), {}
        for executor in places:  # a first round without waiting would leave nothing to wait for in a second
            if _unwatched(executor):
                for number in list(executor._processes or ()):  # by process number; loky's processes have no `kill` of their own
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(number, signal.SIGKILL)
            executor.shutdown(wait=True, kill_workers=True)

    def lacks(self, name: str) -> str | None:
        return target.get(name).available()

    def ready(self, job: Message, most: int, tries: Tries) -> list[Message]:
        self._job = job.packed()
        self.size = min(self.size, most)
        self._free = deque(range(self.size))
        names = [f"starting worker {number + 1} of {self.size}" for number in range(self.size)]
        return [hello for _, hello in shards.answers(self, [bytes] * self.size, names, tries)]

    def room(self) -> bool:
        return bool(self._free)

    def give(self, number: int, question: bytes) -> None:
        place = self._free.popleft()
        try:
            future = self._submit(place, question)
        except RuntimeError:  # it died between two shards
            self._drop(place)
            future = self._submit(place, question)
        future.add_done_callback(lambda done: self._answered.put((number, place, done)))

    def take(self) -> tuple[int, Message | Failure]:
        from joblib.externals.loky import BrokenProcessPool
        from joblib.externals.loky.process_executor import PicklingError

        number, place, future = self._answer()
        self._free.append(place)
        try:
            return number, shards.read_answer(future.result())
        except PicklingError as error:  # of plain bytes: for want of memory alone
            raise MemoryError("a shard could not be sent to its worker") from error
        except BrokenProcessPool as error:
            self._drop(place)
            ended = re.search(r"exit codes of the workers are \{([A-Z]+)\((-?\d+)\)", str(error))
            how = f"was ended ({ended[1]} {ended[2]})" if ended else "was ended"
            return number, Failure(
                f"its worker process {how}: check the machine's memory, then run again with fewer jobs or a smaller batch"
            )

    def run_again(self) -> int:
        return 0

    def _answer(self) -> tuple[int, int, Any]:
        """The next answer; MemoryError where it would never come, since the thread that watches a worker ended: it could not start another."""
        while True:
            busy = (executor for place, executor in self._executors.items() if place not in self._free)
            unwatched = any(map(_unwatched, busy))  # before the look: what it still said is there
            with contextlib.suppress(Empty):
                return self._answered.get(timeout=LOOK)
            if unwatched:
                raise MemoryError("a worker is watched no more, for want of threads or memory")

    def _submit(self, place: int, question: bytes) -> Any:
        from joblib.externals.loky import ProcessPoolExecutor

        if place not in self._executors:
            self._executors[place] = ProcessPoolExecutor(
                max_workers=1, initializer=_begin, initargs=(os.getpid(),), env=_threads(self.size)
            )
        resource_tracker.ensure_running()  # here, since it lets signals through when it starts
        with _signals_held():
            return self._executors[place].submit(shards.ask, self._opener, self._name, self._job, question)

    def _drop(self, place: int) -> None:
        executor = self._executors.pop(place, None)
        if executor is not None:
            executor.shutdown(wait=False, kill_workers=True)


def _unwatched(executor: Any) -> bool:
    """Whether loky's own thread, which hands answers on and ends workers, is dead."""
    watching = executor._executor_manager_thread
    return watching is not None and not watching.is_alive()


def _threads(jobs: int) -> dict[str, str]:
    """The cores of this machine dealt to `jobs` processes, as environment variables; a smaller number that the user set stays."""
    import joblib

    share = max(1, joblib.cpu_count() // jobs)
    set_ = {name: os.environ.get(name, "") for name in THREADS}
    return {name: str(min(share, int(value)) if value.isdecimal() and int(value) else share) for name, value in set_.items()}


def _begin(parent: int) -> None:
    """The first words of a worker: Ctrl-C is not for it, stdout belongs to the command's result, and it ends with its parent."""
    from joblib.externals.loky import process_executor

    process_executor._USE_PSUTIL = (
        False  # it would restart a worker that has grown since its first answer, as one with a large network does
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.dup2(2, 1)
    end_with(parent)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """What starts here never sees Ctrl-C, and no signal interrupts the start halfway; the host sees both right after."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class DaskCrew:
    """The workers of a Dask scheduler. Dask itself runs the shards of a lost worker on the others; workers may join and leave."""

    def __init__(self, opener: Opener, address: str) -> None:
        self.size = 0
        self._opener = opener
        self._address = address
        self._name = f"toolchain-{uuid.uuid4().hex}"
        self._client: Any = None
        self._job: Any = None
        self._asked = False
        self._workers: list[str] = []
        self._most: int | None = None
        self._looked = 0.0
        self._running: dict[int, tuple[Any, str]] = {}
        self._tries = 0
        self._answered: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        self._quiet = contextlib.ExitStack()

    def __enter__(self) -> DaskCrew:
        self._quiet.enter_context(_quiet_dask())
        try:
            self._client = self._connected()
            self._await_workers()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Take back what is not done, close the job in every worker, and leave the cluster as it was."""
        with self._quiet:
            if self._client is None:
                return
            client, self._client = self._client, None
            with contextlib.suppress(Exception):  # the scheduler may be gone; the workers then close the job themselves, after a while
                client.cancel(
                    [*(future for future, _ in self._running.values()), *([self._job] if self._job is not None else [])], force=True
                )
                if self._asked:
                    client.run(_end_on_dask, self._name, on_error="ignore", callback_timeout=shards.PATIENCE + 1)
            with contextlib.suppress(Exception):
                client.close(timeout=1)

    def lacks(self, name: str) -> str | None:
        found = self._on_workers(_lacks, name)
        return next((f"the worker at {where} cannot run it: {missing}" for where, missing in found.items() if missing is not None), None)

    def ready(self, job: Message, most: int, tries: Tries) -> list[Message]:
        data = job.packed()
        self._asked = True
        self._most = most
        self._alive()
        greetings = []
        for where, answer in self._on_workers(_ask_on_dask, self._opener, self._name, data, workers=self._workers).items():
            found = shards.read_answer(answer)
            if isinstance(found, Message):
                greetings.append(found)
            else:
                tries.count(f"starting the worker at {where}", found)
        if not greetings:
            raise ToolchainError(f"no worker at '{self._address}' could start the job: see what the workers print")
        self._job = self._submit(_same, data, key=f"{self._name}-job")
        return greetings

    def room(self) -> bool:
        return len(self._running) < 2 * self.size  # one running and one waiting each

    def give(self, number: int, question: bytes) -> None:
        """Dask by itself would give all shards to the worker that has the job; where the chosen one is lost, it takes another."""
        if time.monotonic() - self._looked > LOOK:
            self._alive()
        self._tries += 1
        busy = Counter(worker for _, worker in self._running.values())
        worker = min(self._workers, key=lambda worker: busy[worker])
        future = self._submit(
            _shard_on_dask,
            self._opener,
            self._name,
            self._job,
            question,
            number,
            key=f"{self._name}-{number}-{self._tries}",
            workers=[worker],
            allow_other_workers=True,
        )
        self._running[number] = future, worker
        future.add_done_callback(lambda done: self._answered.put((number, done)))

    def take(self) -> tuple[int, Message | Failure]:
        seen = time.monotonic()
        while True:
            with contextlib.suppress(Empty):
                number, future = self._answered.get(timeout=1.0)
                break
            if self._alive():
                seen = time.monotonic()
            elif time.monotonic() - seen > GONE:
                raise ToolchainError(
                    f"the scheduler at '{self._address}' has had no worker for {GONE:g} s, or is gone: look at what it prints, then run again"
                )
        self._running.pop(number, None)
        return number, self._read(future)

    def run_again(self) -> int:
        """Every start of a shard is an event on the scheduler; ours to start again are not counted here."""
        with contextlib.suppress(Exception):
            return max(0, len(self._client.get_events(self._name)) - self._tries)
        return 0

    def _connected(self) -> Any:
        from distributed import Client

        try:
            with ThreadPoolExecutor(1) as thread:  # a notebook has a loop of its own in this one
                thread.submit(asyncio.run, _greet(self._address)).result()
            return Client(self._address, timeout=ANSWER, set_as_default=False, name="toolchain")
        except (OSError, ValueError, TypeError, ImportError, RuntimeError, asyncio.TimeoutError) as error:
            raise UsageError(
                f"no Dask scheduler answers at '{self._address}' ({_first_line(error)}): start one with `dask scheduler`, or correct --scheduler"
            ) from None

    def _await_workers(self) -> None:
        end = time.monotonic() + ANSWER
        while not self._alive():
            if time.monotonic() > end:
                raise UsageError(
                    f"the scheduler at '{self._address}' has no workers: start some with `dask worker {self._address} --nthreads 1`"
                )
            time.sleep(0.1)

    def _alive(self) -> bool:
        """Whether the scheduler answers and has workers; those we use are kept, and others join them where more may."""
        self._looked = time.monotonic()
        try:
            found = sorted(self._client.scheduler_info(n_workers=-1, callback_timeout=ANSWER)["workers"])
        except Exception:  # in whatever words: it does not answer
            return False
        if found:
            known = [worker for worker in self._workers if worker in found]
            self._workers = [*known, *(worker for worker in found if worker not in known)][: self._most]
            self.size = len(self._workers)
        return bool(found)

    def _on_workers(self, function: Any, *arguments: object, workers: list[str] | None = None) -> dict[str, Any]:
        """What `function` returns on each of `workers` (None: all) that is still there; UsageError where one cannot run our functions."""
        found = self._client.run(function, *arguments, on_error="return", workers=workers)
        gone = {where: error for where, error in found.items() if isinstance(error, OSError)}
        for where, error in found.items():
            if isinstance(error, ToolchainError):
                raise type(error)(f"the worker at {where} says: {error}")
            if isinstance(error, Exception) and where not in gone:
                raise UsageError(
                    f"the worker at {where} cannot take part ({_first_line(error)}): install toolchain {toolchain.__version__} there and start it again"
                )
        return {where: answer for where, answer in found.items() if where not in gone}

    def _submit(self, function: Any, *arguments: object, **options: object) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dask finds large arguments unusual
            try:
                return self._client.submit(function, *arguments, pure=False, **options)
            except Exception as error:  # in whatever words: it is gone
                raise ToolchainError(
                    f"the scheduler at '{self._address}' takes no more shards ({_first_line(error)}): look at what it prints, then run again"
                ) from error

    def _read(self, future: Any) -> Message | Failure:
        from distributed import KilledWorker

        try:
            return shards.read_answer(future.result(timeout=GONE))
        except KilledWorker as error:
            lost = error.allowed_failures + 1
            return Failure(
                f"{lost} workers were lost while they ran this: check their memory, then run again with a smaller batch", again=False
            )
        except Exception as error:
            if future.status in ("cancelled", "lost") or isinstance(error, (OSError, TimeoutError)):
                return Failure(f"the scheduler at '{self._address}' lost it ({_first_line(error)}): look at what the scheduler prints")
            return Failure(f"a worker could not run it ({_first_line(error)}): see what the workers print", again=False)


async def _greet(address: str) -> None:
    """Return where a scheduler is at `address`. Dask's client would wait for ever where something listens that is none."""
    from distributed.core import rpc
    from distributed.security import Security

    async def greet() -> None:
        async with rpc(address, timeout=ANSWER, connection_args=Security().get_connection_args("client")) as scheduler:
            await scheduler.identity()

    await asyncio.wait_for(greet(), ANSWER)


def _lacks(name: str) -> str | None:
    return target.get(name).available()


async def _ask_on_dask(opener: Opener, name: str, job: bytes) -> bytes:
    """Open a job, in a thread: the worker goes on telling the scheduler that it is alive."""
    return await asyncio.get_running_loop().run_in_executor(None, shards.ask, opener, name, job, b"")


async def _end_on_dask(name: str) -> None:
    await asyncio.get_running_loop().run_in_executor(None, shards.end, name)


def _same(job: bytes) -> bytes:
    """The job as a result of its own, which Dask hands to every worker that needs it, and makes again where it was lost."""
    return job


def _shard_on_dask(opener: Opener, name: str, job: bytes, question: bytes, number: int) -> bytes:
    from distributed import get_worker

    get_worker().log_event(name, {"shard": number})
    return shards.ask(opener, name, job, question)


@contextlib.contextmanager
def _quiet_dask() -> Iterator[None]:
    """Dask tells of every lost connection; the user hears one sentence of ours. Where the program uses Dask itself, its words are left alone."""
    if "distributed" in sys.modules:
        yield
        return
    import distributed  # noqa: F401  (its own settings come first)

    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "distributed"]
    levels = {log: log.level for log in map(logging.getLogger, names)}
    for log in levels:
        log.setLevel(logging.CRITICAL + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for log, level in levels.items():
        log.setLevel(level)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")
