"""The simulator: integer graphs, batched, bit-exact with `reference`, on CPU or CUDA.

Products run in the narrowest float type in which every partial sum is a whole number the type holds exactly (float32 below 2^24, float64 below
2^53); the bound comes from the weights themselves, before the run. Everything else is whole numbers: int32 where a proven bound
allows it, int64 elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from toolchain import codec
from toolchain.errors import GraphError
from toolchain.fixed import EXACT_FLOAT32, EXACT_FLOAT64, decay, largest_product
from toolchain.ir import DECAY_ONE, POTENTIAL_LIMIT, Array, Dense, Dynamics, Graph, Identity, Phase, Synapse
from toolchain.limits import LOIHI2, Limits
from toolchain.passes import LOIHI_PIPELINE, Pipeline

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from toolchain.targets.torch_ticks import Arithmetic, TickRun

INT32_SAFE = 2**31 - 1


@dataclass(frozen=True)
class Sim:
    """`device` is auto, cpu or cuda; `batch` samples advance together (more only costs memory)."""

    device: str = "auto"
    batch: int = 256
    trace: bool = False
    name: str = "sim"
    limits: Limits = LOIHI2
    pipeline: Pipeline = LOIHI_PIPELINE

    def available(self) -> str | None:
        return None

    def check(self, graph: Graph) -> list[str]:
        return (
            []
            if graph.integer
            else ["target 'sim' runs integer graphs and this one is in floats: add the quantize pass, or use target 'torch'"]
        )

    def compile(self, graph: Graph) -> TickRun:
        from toolchain import devices
        from toolchain.targets.torch_ticks import TickRun

        device = devices.pick(self.device)
        arithmetic: dict[str, Arithmetic] = {phase.name: _Integers(graph, phase, device) for phase in graph.phases}
        return TickRun(graph, arithmetic, batch=self.batch, trace=self.trace)


class _Integers:
    """Loihi's arithmetic (see `toolchain.fixed`) for one phase of one graph."""

    def __init__(self, graph: Graph, phase: Phase, device: torch.device) -> None:
        import torch

        self._device = device
        bounds = {id(s): largest_product(graph, s) for s in phase.synapses}
        widest = max((partial for partial, _ in bounds.values()), default=0)
        if widest >= EXACT_FLOAT64:
            raise GraphError(f"a sum of phase '{phase.name}' can reach {widest}, above 2^53: lower the weights or the input levels")
        # All products of a phase share one type, so a spike vector is made once for all its synapses.
        shortened = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        self.spike: torch.dtype = torch.float32 if widest < EXACT_FLOAT32 and not shortened else torch.float64
        # A source fires at most once between two steps of its target, but its spikes may pile up before the target's first step.
        timing = phase.timing
        piled = 1 + max(timing.start.values(), default=0) // timing.period
        arriving = [piled * sum(bounds[id(s)][1] for s in phase.synapses if s.target == name) for name in phase.order]
        largest = POTENTIAL_LIMIT + max(arriving, default=0) + _constant_bound(graph, phase)
        self.potential: torch.dtype = (
            torch.int32 if largest <= INT32_SAFE and all(d.leak == 1 for d in phase.dynamics.values()) else torch.int64
        )
        self._weights = {op: self._oriented(graph, op) for s in phase.synapses for op in s.ops if isinstance(op, Dense)}

    def _oriented(self, graph: Graph, op: Dense) -> Tensor:
        import torch

        weight = torch.as_tensor(graph.tensors[op.weight].astype(np.float64), dtype=self.spike, device=self._device)
        return (weight if op.transpose else weight.T).contiguous()

    def tensor(self, values: Array) -> Tensor:
        import torch

        return torch.as_tensor(values.astype(np.int64), dtype=self.potential, device=self._device)

    def product(self, synapse: Synapse, spikes: Tensor) -> Tensor:
        result = spikes
        exponent = 0
        for op in synapse.ops:
            if isinstance(op, Dense):
                result = result @ self._weights[op]
                exponent += op.exponent
            elif not isinstance(op, Identity):
                raise GraphError(f"operation {type(op).__name__} is not simulated yet: fully connected networks are")
        return result.to(self.potential) << exponent

    def step(self, potential: Tensor, current: Tensor, dynamics: Dynamics) -> tuple[Tensor, Tensor, Tensor]:
        before = self._leaked(potential, dynamics.leak) if dynamics.members == "none" else potential
        total = before + current
        saturated = total.abs() > POTENTIAL_LIMIT
        total = total.clamp(-POTENTIAL_LIMIT, POTENTIAL_LIMIT)
        if dynamics.members == "none":
            return total, total.new_zeros(total.shape), saturated
        fired = (total >= dynamics.threshold).to(self.potential)
        if dynamics.members == "both":
            fired -= (total <= -dynamics.threshold).to(self.potential)
        return self._leaked(total - dynamics.reset * fired, dynamics.leak), fired.to(self.spike), saturated

    def _leaked(self, potential: Tensor, leak: float) -> Tensor:
        if leak == 1:
            return potential
        return potential.sign() * ((potential.abs() * (DECAY_ONE - decay(leak))) >> 12)


def _constant_bound(graph: Graph, phase: Phase) -> int:
    """The largest bias plus injected current of any population."""
    from toolchain.fixed import CURRENT_MANTISSA

    currents = codec.bias_currents(graph, phase).values()
    largest = max((sum(int(np.abs(c).max(initial=0)) for _, c in biases) for biases in currents), default=0)
    return largest + max((-CURRENT_MANTISSA[0] << drive.exponent for drive in phase.drive), default=0)


SIM = Sim()
