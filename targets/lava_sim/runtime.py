"""A Lava network that always ends: its processes, the watch over them, and their memory.

What Lava 0.10 leaves to chance is settled here. Channels live in anonymous memory instead of a manager process with files under /dev/shm. A
child that raises leaves its traceback where the host looks while it waits (Lava's own `run` never returns where the network has a loop). A
child whose parent is gone ends itself. Ctrl-C reaches the host alone, and never in the middle of starting or ending processes. Closing kills:
nothing of ours is worth a farewell.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import signal
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Iterator
from multiprocessing import Process
from queue import Empty
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from toolchain import shortage
from toolchain.children import end_with, forking
from toolchain.errors import ToolchainError
from toolchain.targets.lava_sim.plan import shared

if TYPE_CHECKING:
    from lava.magma.core.process.process import AbstractProcess

FAULT_BYTES = 4096
"""Room for one process's traceback; the end of it is kept."""

LOOK = 0.05
"""Seconds between two looks at the children while the host waits."""

LAST_WORDS = 5.0
"""Seconds that a process which has reported an error has to leave its traceback and end."""

_BUILDING = threading.RLock()
"""Lava's lists of processes and the warning filters belong to the whole program: networks are built one at a time."""


class _AnonymousMemory:
    """Hands out what Lava's channels ask of a shared memory manager: objects with a `buf`."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []

    def create_shared_memory(self, size: int) -> _Block:
        self._blocks.append(_Block(size))
        return self._blocks[-1]

    def shutdown(self) -> None:
        self._blocks.clear()


class _Block:
    def __init__(self, size: int) -> None:
        self.buf = memoryview(mmap.mmap(-1, max(size, 1)))


class Network:
    """Connected Lava processes, started; `run` advances them, `close` ends them. Start and run it in one thread or several, but one at a time.

    `deadline` is how many seconds may pass without a tick of any population before the network counts as stuck.
    """

    def __init__(self, processes: list[AbstractProcess], tag: str, ticks: npt.NDArray[np.int64], deadline: float) -> None:
        self._ticks = ticks
        self._deadline = deadline
        self._failure: str | None = None
        try:
            with quiet():
                self._runtime = _compiled(processes, tag)
        except BaseException:
            _forget(processes)
            raise
        self._names = list(self._runtime.names)
        self._faults = self._runtime.faults
        self._kill = weakref.finalize(self, _kill, self._runtime, processes, os.getpid())
        self._start()

    def run(self, steps: int) -> None:
        """Advance all processes by `steps` ticks; ToolchainError, within seconds, where one raised, died, or nothing moves any more."""
        self.require_alive()
        from lava.magma.runtime.mgmt_token_enums import MGMT_RESPONSE, enum_equal, enum_to_np

        (to_service,), (from_service,) = self._runtime.runtime_to_service, self._runtime.service_to_runtime
        try:
            to_service.send(enum_to_np(steps))
            self._wait(from_service)
            answer = from_service.recv()
            self._look()
            if not enum_equal(answer, MGMT_RESPONSE.DONE):
                self._await_last_words()
        except BaseException:
            self.close()
            raise

    def open_variables(self) -> None:
        """From now on, between runs, `get` and `set` of the processes' variables speak to the processes: those of Lava's own, ours need none."""
        self._runtime._is_started = True

    def require_alive(self) -> None:
        if not self._kill.alive:
            raise ToolchainError(self._failure or "this lava-sim network is closed: compile the graph again")

    def close(self) -> None:
        """End every process; safe to call twice."""
        self._kill()

    def _start(self) -> None:
        try:
            with quiet(), _signals_later():
                self._runtime.initialize()
        except OSError as error:
            self._kill()
            semaphores = error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT)
            remedy = (
                "make room in /dev/shm, where semaphores are"
                if semaphores
                else "raise what `ulimit -n` and `ulimit -u` allow, or free memory"
            )
            raise ToolchainError(
                f"cannot start the {len(self._names)} processes of this Lava network ({error.strerror}): {remedy}"
            ) from error
        except BaseException:
            self._kill()
            raise

    def _wait(self, port: Any) -> None:
        moved, seen = time.monotonic(), int(self._ticks.sum())
        while True:
            with contextlib.suppress(Empty):
                port._queue.get(timeout=LOOK, peek=True)
                return
            self._look()
            ticks, now = int(self._ticks.sum()), time.monotonic()
            if ticks != seen:
                moved, seen = now, ticks
            elif now - moved > self._deadline:
                self._fail(
                    f"the Lava network stood still for {self._deadline:g} s after {ticks} ticks of its populations: raise the deadline, or report the network"
                )

    def _look(self) -> None:
        """Raise what the children that ended have left. One that ended well was told to by Lava, for another that did not."""
        if not all(child.is_alive() for child in self._runtime.children):
            self._await_last_words()

    def _await_last_words(self) -> None:
        """Lava hears of an exception before the process that raised it has left its traceback and ended."""
        until = time.monotonic() + LAST_WORDS
        while time.monotonic() < until:
            self._report()
            time.sleep(LOOK)
        self._fail("Lava ended the run for a process that does not say why: run again with --debug, and report the network")

    def _report(self) -> None:
        """Tracebacks first, then deaths without one."""
        codes = [child.exitcode for child in self._runtime.children]
        bad = [i for i, code in enumerate(codes) if code]
        for i in bad:
            text = bytes(self._faults[i]).rstrip(b"\0").decode(errors="replace").strip()
            if text:
                last = text.splitlines()[-1]
                missing = shortage.told(last)
                said = (
                    f"raised {last}: see the cause with --debug"
                    if missing is None
                    else f"{missing.sentence}: {missing.remedy(['--batch'])}"
                )
                self._fail(f"Lava process '{self._names[i]}' {said}", text)
        for i in bad:
            code = codes[i] or 0
            how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            self._fail(
                f"Lava process '{self._names[i]}' {how} in the middle of a run: check the machine's memory, then run again with a smaller batch"
            )

    def _fail(self, message: str, detail: str = "") -> None:
        self._failure = message
        raise ToolchainError(message) from (RuntimeError(detail) if detail else None)


def _configuration(processes: list[AbstractProcess], tag: str) -> Any:
    """Lava's run configuration with the model of every process named: it would look for one process after the other, by executing all files beside it."""
    from lava.magma.compiler.compiler_graphs import ProcGroupDiGraphs
    from lava.magma.core.run_configs import Loihi2SimCfg

    configuration = Loihi2SimCfg(select_tag=tag)
    first = {type(process): process for process in processes}
    models = {kind: configuration.select(process, ProcGroupDiGraphs._find_proc_models(process)) for kind, process in first.items()}
    configuration.exception_proc_model_map = {process: models[type(process)] for process in processes}
    return configuration


def _compiled(processes: list[AbstractProcess], tag: str) -> Any:
    """A runtime of ours for the processes, not started yet."""
    from lava.magma.core.process.message_interface_enum import ActorType
    from lava.magma.runtime.message_infrastructure.multiprocessing import MultiProcessing, SystemProcess
    from lava.magma.runtime.runtime import Runtime
    from lava.magma.runtime.runtime_services.runtime_service import AsyncPyRuntimeService

    from toolchain.targets.lava_sim.channel import LightBuilder
    from toolchain.targets.lava_sim.pace import OwnPace

    class Infrastructure(MultiProcessing):  # type: ignore[misc]  # Lava carries no types
        """Lava's processes with our memory and our first and last words in each child."""

        def __init__(self, names: list[str], faults: npt.NDArray[np.uint8]) -> None:
            super().__init__()
            self._waiting = list(zip(names, faults, strict=True))

        def start(self) -> None:
            self._smm = _AnonymousMemory()

        def build_actor(self, target_fn: Any, builder: Any, exception_q: Any = None) -> Any:
            name, fault = self._waiting.pop(0)
            child = SystemProcess(target=_live, args=(builder, fault, os.getpid()), name=name, daemon=True)
            with forking():
                child.start()
            self._actors.append(child)
            return child

        def stop(self) -> None:
            self._smm.shutdown()

    class OwnRuntime(Runtime):  # type: ignore[misc]  # Lava carries no types
        def __init__(self, executable: Any) -> None:
            super().__init__(executable, ActorType.MultiProcessing)
            self.names = [*(p.name for p in executable.proc_builders), "runtime service"]
            self.faults = shared((len(self.names), FAULT_BYTES), np.uint8)
            self.children: list[SystemProcess] = []

        def _build_message_infrastructure(self) -> None:
            self._messaging_infrastructure = Infrastructure(self.names, self.faults)
            self._messaging_infrastructure.start()
            self.children = self._messaging_infrastructure.actors

        def initialize(self, node_cfg_idx: int = 0) -> None:
            """Lava's, without its print and without waiting for children: `Network` watches those."""
            self._build_watchdog_manager()
            self._build_message_infrastructure()
            self._build_channels()
            self._build_sync_channels()
            self._build_processes()
            self._build_runtime_services()
            self._start_ports()
            self.exception_q: list[Any] = []
            self._is_initialized = True

    executable = processes[0].compile(_configuration(processes, tag))
    position = {id(process): i for i, process in enumerate(processes)}
    executable.channel_builders.sort(key=lambda channel: position[id(channel.src_process)])  # float sums in the same order in every run
    free = all(issubclass(builder.proc_model, OwnPace) for builder in executable.proc_builders.values())
    for channel in executable.channel_builders:  # those of the host and the service, which they use once a run, stay Lava's own
        channel.__class__ = LightBuilder
        channel.rests = free
    if free:
        for service in executable.runtime_service_builders.values():
            service.rs_class = AsyncPyRuntimeService
    runtime = OwnRuntime(executable)
    executable.assign_runtime_to_all_processes(runtime)
    return runtime


def _live(builder: Any, fault: npt.NDArray[np.uint8], parent: int) -> None:
    """The life of a child: build its part of the network, run it, and leave a traceback in `fault` where that fails."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_with(parent)
        one_blas_thread()
        builder.build().start()
    except BaseException:  # whatever it was, the host must hear of it
        text = traceback.format_exc().encode()[-FAULT_BYTES:]
        fault[: len(text)] = np.frombuffer(text, np.uint8)
        os._exit(1)


def _kill(runtime: Any, processes: list[Any], owner: int) -> None:
    """Kill and reap the children, end the host's port threads, and let go of what Lava would keep until the interpreter ends.

    A process forked by somebody else holds the same objects as their `owner`, and must leave the children alone.
    """
    runtime._is_started = False  # Lava stops a started one when it is forgotten, in its own way
    if os.getpid() != owner:
        return
    with _signals_later():
        children = [child for child in runtime.children if not child._is_done]  # multiprocessing ends them too, when the interpreter does
        for child in children:
            child.kill()
        for child in children:
            _reap(child)
        runtime.children = []
        for port in (*runtime.runtime_to_service, *runtime.service_to_runtime):
            port.join()
        _forget(processes)


def _reap(child: Any) -> None:
    """Wait for a child that was killed, and let go of what is open for it, as Lava's `join` does.

    That one closes the process, too, and multiprocessing then falls over it in another thread that starts a process of its own at this moment.
    """
    Process.join(child)
    for opened in (child._popen, child._pconn, child._cconn):
        opened.close()
    child._is_done = True


def _forget(processes: list[Any]) -> None:
    """Lava's process server holds every process ever made, with its weights and memory."""
    from lava.magma.core.process.process import ProcessServer

    known = ProcessServer().processes
    for process in processes:
        with contextlib.suppress(ValueError):
            known.remove(process)
        process.runtime = None


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """What Ctrl-C and SIGTERM raise in the main thread is raised at the end, whatever else was raised: no child is lost between its fork and its entry in a list."""
    came: list[int] = []
    numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}
    deferred = [number for number in numbers if callable(before[number])]
    try:
        for number in deferred:
            signal.signal(number, lambda sent, frame: came.append(sent))
        yield
    finally:
        for number in reversed(deferred):  # SIGINT last: its handler raises
            signal.signal(number, before[number])
        for number in came:
            signal.raise_signal(number)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """For Lava's building, by one thread at a time. Its deprecations are not the user's business, nor are the handlers that each of its processes adds to
    the root logger: every message of the program would be printed once more for each."""
    with _BUILDING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loggers = logging.getLogger(), logging.getLogger("lava.magma.compiler.compiler")
        before = [list(logger.handlers) for logger in loggers]
        try:
            yield
        finally:
            for logger, known in zip(loggers, before, strict=True):
                for added in [each for each in logger.handlers if each not in known]:
                    logger.removeHandler(added)


def one_blas_thread() -> None:
    """Processes are the parallelism here: NumPy's OpenBLAS uses one thread in each (no effect on other libraries, or where there is no /proc)."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "openblas" in line}
    except OSError:
        return
    for path in paths:
        library = ctypes.CDLL(path)
        for name in (
            "scipy_openblas_set_num_threads64_",
            "openblas_set_num_threads64_",
            "scipy_openblas_set_num_threads",
            "openblas_set_num_threads",
        ):
            if hasattr(library, name):
                getattr(library, name)(1)
