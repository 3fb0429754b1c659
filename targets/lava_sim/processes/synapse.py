"""The interface of our synapse process; `synapse_models` holds what it does."""

from __future__ import annotations

from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess

from toolchain.targets.lava_sim.composition import Composition
from toolchain.targets.lava_sim.plan import PHASES, Board


class Synapse(AbstractProcess):  # type: ignore[misc]  # Lava carries no types
    """A connection for `batch` copies of the network: a_out[t] = W s_in[t - delay], with delay at least 1; W is a composition of linear operations.

    Like Lava's own connections it sends before it receives, so that loops cannot wait for themselves. It rests in runs of another phase than its own.
    """

    def __init__(self, *, composition: Composition, board: Board, phase: str, batch: int, delay: int, name: str) -> None:
        super().__init__(composition=composition, board=board, phase=phase, delay=delay, name=name)
        self.delay = delay
        self.sends = {"a_out": PHASES.index(phase)}
        self.s_in = InPort(shape=(batch, composition.inputs))
        self.a_out = OutPort(shape=(batch, composition.outputs))
