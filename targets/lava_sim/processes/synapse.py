"""The interface of our synapse process; `synapse_models` holds what it does."""

from __future__ import annotations

from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess

from toolchain.ir import Array


class Synapse(AbstractProcess):  # type: ignore[misc]  # Lava carries no types
    """A dense connection for `batch` copies of the network: a_out[t] = s_in[t - delay] @ weights, with delay at least 1.

    `weights` (inputs, outputs) are final: exponents are multiplied in, and the type is one in which every sum is exact
    (`compile.exact_type`). Like Lava's own connections it sends before it receives, so that loops cannot wait for themselves.
    """

    def __init__(self, *, weights: Array, batch: int, delay: int, name: str) -> None:
        super().__init__(weights=weights, batch=batch, delay=delay, name=name)
        self.s_in = InPort(shape=(batch, weights.shape[0]))
        self.a_out = OutPort(shape=(batch, weights.shape[1]))
