"""A Lava network that always ends: its processes, the watch over them, and their memory.

What Lava 0.10 leaves to chance is settled here. Channels live in anonymous memory instead of a manager process with files under /dev/shm. A
child that raises leaves its traceback where the host looks while it waits (Lava's own `run` never returns where the network has a loop). A
child whose parent is gone ends itself. Ctrl-C reaches the host alone, and closing kills: nothing of ours is worth a farewell.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Iterator
from queue import Empty
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from toolchain.errors import ToolchainError
from toolchain.targets.lava_sim.plan import shared

if TYPE_CHECKING:
    from lava.magma.core.process.process import AbstractProcess

FAULT_BYTES = 4096
"""Room for one process's traceback; the end of it is kept."""

LOOK = 0.05
"""Seconds between two looks at the children while the host waits."""

ORPHAN_LOOK = 0.25
"""Seconds between two looks of a child at its parent."""


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
        with quiet():
            self._runtime = _started(processes, tag)
        self._names = list(self._runtime.names)
        self._faults = self._runtime.faults
        self._kill = weakref.finalize(self, _kill, self._runtime, processes)

    def run(self, steps: int) -> None:
        """Advance all processes by `steps` ticks; ToolchainError, within seconds, where one raised, died, or nothing moves any more."""
        self.require_alive()
        from lava.magma.runtime.mgmt_token_enums import enum_to_np

        (to_service,), (from_service,) = self._runtime.runtime_to_service, self._runtime.service_to_runtime
        try:
            to_service.send(enum_to_np(steps))
            self._wait(from_service)
            from_service.recv()
            self._look()
        except BaseException:
            self.close()
            raise

    def require_alive(self) -> None:
        if not self._kill.alive:
            raise ToolchainError(self._failure or "this lava-sim network is closed: compile the graph again")

    def close(self) -> None:
        """End every process; safe to call twice."""
        self._kill()

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
        """Raise what the children have left: tracebacks first, then deaths without one."""
        self._report_faults()
        dead = next(((name, child) for name, child in zip(self._names, self._runtime.children, strict=True) if not child.is_alive()), None)
        if dead is None:
            return
        self._report_faults()  # it may have raised between the two looks
        name, code = dead[0], dead[1].exitcode
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        self._fail(f"Lava process '{name}' {how} in the middle of a run: check the machine's memory, then run again with a smaller batch")

    def _report_faults(self) -> None:
        for name, text in zip(self._names, self._texts(), strict=True):
            if text:
                cause = text.strip().splitlines()[-1]
                self._fail(f"Lava process '{name}' raised {cause}: see the cause with --debug", text)

    def _texts(self) -> list[str]:
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in self._faults]

    def _fail(self, message: str, detail: str = "") -> None:
        self._failure = message
        raise ToolchainError(message) from (RuntimeError(detail) if detail else None)


def _started(processes: list[AbstractProcess], tag: str) -> Any:
    """Compile and start a runtime of ours for the processes."""
    from lava.magma.core.process.message_interface_enum import ActorType
    from lava.magma.core.run_configs import Loihi2SimCfg
    from lava.magma.runtime.message_infrastructure.multiprocessing import MultiProcessing, SystemProcess
    from lava.magma.runtime.runtime import Runtime

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

    executable = processes[0].compile(Loihi2SimCfg(select_tag=tag))
    position = {id(process): i for i, process in enumerate(processes)}
    executable.channel_builders.sort(key=lambda channel: position[id(channel.src_process)])  # float sums in the same order in every run
    runtime = OwnRuntime(executable)
    executable.assign_runtime_to_all_processes(runtime)
    try:
        with _signals_blocked():
            runtime.initialize()
    except BaseException:
        _kill(runtime, processes)
        raise
    return runtime


def _live(builder: Any, fault: npt.NDArray[np.uint8], parent: int) -> None:
    """The life of a child: build its part of the network, run it, and leave a traceback in `fault` where that fails."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        one_blas_thread()
        builder.build().start()
    except BaseException:  # whatever it was, the host must hear of it
        text = traceback.format_exc().encode()[-FAULT_BYTES:]
        fault[: len(text)] = np.frombuffer(text, np.uint8)
        os._exit(1)


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, however the parent went."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_LOOK)
    os._exit(1)


def _kill(runtime: Any, processes: list[Any]) -> None:
    """Kill and reap the children, end the host's port threads, and let go of what Lava would keep until the interpreter ends."""
    for child in runtime.children:
        child.kill()
    for child in runtime.children:
        child.join()
    runtime.children = []
    for port in (*runtime.runtime_to_service, *runtime.service_to_runtime):
        port.join()
    _forget(processes)


def _forget(processes: list[Any]) -> None:
    """Lava's process server holds every process ever made, with its weights and memory."""
    from lava.magma.core.process.process import ProcessServer

    server = ProcessServer()
    ours = {id(process) for process in processes}
    server.processes = [process for process in server.processes if id(process) not in ours]
    for process in processes:
        process.runtime = None


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Children forked here never see Ctrl-C; the host sees it right after."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lava's own deprecations are not the user's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
