"""A netx file read by lava-dl's own `Network` and run in Lava, in fixed point (Loihi2SimCfg), one sample after another.

lava-dl resets each block's potentials where a sample begins (`reset_interval`); what a recurrent connection still carries then is not reset, so it is cleared from here. Its
0.6.0 reads recurrent blocks but brings no process model for them: one is added while it runs, the same as that of its dense blocks.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolchain.exchange.netx import RESET_OFFSET
from toolchain.ir import Array
from toolchain.targets import lava_sim
from toolchain.targets.lava_sim.runtime import Network, quiet

if TYPE_CHECKING:
    from lava.lib.dl.netx.hdf5 import Network as NetxNetwork

DEADLINE = 600.0
"""Seconds that a sample may take before the network counts as stuck: Lava's convolutions are slow."""


def missing() -> str | None:
    """None where netx files can be written, read and run here, else what is missing and the command that installs it. Imports nothing heavy."""
    lava = lava_sim.LAVA_SIM.available()
    if lava is not None:
        return lava
    if find_spec("h5py") is None or find_spec("lava.lib") is None or find_spec("lava.lib.dl") is None:
        return "lava-dl is not installed: run pip install lava-dl==0.6.0"
    return None


class Reading:
    """The network of a netx file, built by lava-dl and started in Lava; a context manager that always ends its processes.

    time_steps    how long a sample is held
    message_bits  bits of an input message, lava-dl's `input_message_bits`
    events        frames have time as their last axis
    blocks        build only that many, and give the spikes of the last of them instead of the readout's potentials
    """

    def __init__(self, path: Path, *, time_steps: int, message_bits: int, events: bool = False, blocks: int | None = None) -> None:
        self._steps = time_steps
        self._tick = 0
        with _lava():
            from lava.magma.core.process.process import ProcessServer
            from lava.proc.io.sink import RingBuffer as Sink
            from lava.proc.io.source import RingBuffer as Source

            known = len(ProcessServer().processes)
            self.network = _opened(path, time_steps, message_bits, blocks)
            self._source = Source(data=np.zeros((*self.network.inp.shape, time_steps if events else 1), np.int32))
            self._source.s_out.connect(self.network.inp)
            self._sink = None if blocks is None else Sink(shape=self.network.out.shape, buffer=time_steps)
            if self._sink is not None:
                self.network.out.connect(self._sink.a_in)
            made = ProcessServer().processes[known:]
        self._lava = Network(made, "fixed_pt", np.zeros(1, np.int64), DEADLINE)
        self._lava.open_variables()

    def samples(self, frames: Array) -> Iterator[Array]:
        """For each of `frames`, whole numbers (samples, *input shape as lava-dl has it): the readout's potentials (classes,), in steps of 2^-6 of its weights, or with
        `blocks` spikes (time_steps, *shape as lava-dl has it)."""
        for tick, what, frame in self._agenda(frames):
            if tick > self._tick:
                self._lava.run(tick - self._tick)
                self._tick = tick
            if what == "send":
                self._source.data.set(np.asarray(frame, np.int32).reshape(self._source.data.shape))
            elif what == "read":
                yield self._read()
            else:
                for block in self.network.layers:
                    if hasattr(block, "synapse_rec"):
                        block.synapse_rec.a_buff.set(np.zeros(block.synapse_rec.a_buff.shape, np.int32))

    def close(self) -> None:
        """End all processes."""
        self._lava.close()

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _agenda(self, frames: Array) -> list[tuple[int, str, Array | None]]:
        """What the host does after which tick. A message takes a tick to each block, so block i (from 0) makes its first step of a sample sent after tick t on tick t + 2 + i."""
        begin = -(-self._tick // self._steps) * self._steps  # lava-dl's resets come in whole samples
        agenda: list[tuple[int, str, Array | None]] = []
        for number, frame in enumerate(frames):
            sent = begin + number * self._steps
            agenda.append((sent, "send", frame))
            agenda += [(sent + 1 + i, "clear", None) for i, block in enumerate(self.network.layers) if hasattr(block, "synapse_rec")]
            agenda.append((sent + self._steps + len(self.network.layers), "read", None))
        return sorted(agenda, key=lambda entry: entry[0])

    def _read(self) -> Array:
        if self._sink is None:
            return np.asarray(self.network.layers[-1].neuron.v.get()).astype(np.int64)
        recorded = np.moveaxis(np.asarray(self._sink.data.get()), -1, 0)  # a ring: row (tick - 1) % time_steps
        return np.roll(recorded, -len(self.network.layers), axis=0).astype(np.int8)


@contextlib.contextmanager
def _lava() -> Iterator[None]:
    """Where lava-dl is imported and its processes are made: without what it prints, and with the process model it lacks."""
    lava_sim.allow_fork()
    with quiet(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import lava.lib.dl.netx.blocks.process as blocks
        from lava.lib.dl.netx.blocks.models import AbstractPyBlockModel
        from lava.magma.core.decorator import implements, requires, tag
        from lava.magma.core.resources import CPU
        from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol

        if not hasattr(blocks, "PyRecurrentDenseModel"):
            # Lava looks for models among the classes of the process's own module
            model = type("PyRecurrentDenseModel", (AbstractPyBlockModel,), {"__module__": blocks.__name__})
            decorate: Any = implements(proc=blocks.RecurrentDense, protocol=LoihiProtocol)
            blocks.PyRecurrentDenseModel = decorate(requires(CPU)(tag("fixed_pt")(model)))
        yield


def _opened(path: Path, time_steps: int, message_bits: int, blocks: int | None) -> NetxNetwork:
    """lava-dl's network of the whole file or of its first `blocks` blocks."""
    import h5py
    from lava.lib.dl.netx.hdf5 import Network as NetxNetwork

    entries = None
    if blocks is not None:
        with h5py.File(path, "r") as file:
            types = [file[f"layer/{i}/type"][()].decode() for i in range(len(file["layer"]))]
        entries = [i for i, kind in enumerate(types) if kind not in ("input", "flatten")][blocks - 1] + 1
    network = NetxNetwork(
        str(path), num_layers=entries, input_message_bits=message_bits, reset_interval=time_steps, reset_offset=RESET_OFFSET
    )
    network.net_config.f.close()
    return network
