"""The interface of a synapse that learns; `plastic_models` holds what it does."""

from __future__ import annotations

from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess

from toolchain.targets.lava_sim.plan import PlasticPart


class Plastic(AbstractProcess):  # type: ignore[misc]  # Lava carries no types
    """A connection that holds its weights once, for both phases, and changes them from what passes its own ports.

        a_out[t] = W s_in[t - delay]        forward spikes of the source, to the target
        c_out[t] = W^T b_in[t - delay]      gated signed spikes of the target in the feedback phase, to the source

    It keeps a trace of each end: r of s_in over a forward phase, q of b_in over a feedback phase. On the last tick of a feedback phase for which the host has
    ordered an update, W <- W - rate * q r^T, summed over the `batch` copies of the network (`toolchain.plasticity`).
    """

    def __init__(self, *, part: PlasticPart, inputs: int, outputs: int, name: str) -> None:
        super().__init__(part=part, name=name)
        batch = part.batch
        self.s_in = InPort(shape=(batch, inputs))
        self.a_out = OutPort(shape=(batch, outputs))
        self.b_in = InPort(shape=(batch, outputs))
        self.c_out = OutPort(shape=(batch, inputs))
