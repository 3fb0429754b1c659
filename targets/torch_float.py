"""The float graph on torch, CPU or CUDA: what the GPU computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from toolchain.ir import Array, Graph, Phase, Synapse, tensor_names
from toolchain.limits import LOIHI2, Limits
from toolchain.passes import Adjoint, Fold, Pipeline

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from toolchain.targets.torch_ticks import Arithmetic, TickRun


@dataclass(frozen=True)
class TorchFloat:
    """float32 (as trained) or float64; `device` is auto, cpu or cuda. The graph keeps the model's own time: nothing is retimed or rounded."""

    device: str = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    batch: int = 512
    trace: bool = False
    name: str = "torch"
    limits: Limits = LOIHI2
    pipeline: Pipeline = Pipeline((Fold(), Adjoint()))

    def available(self) -> str | None:
        return None

    def check(self, graph: Graph) -> list[str]:
        return (
            ["target 'torch' runs float graphs and this one is in integers: give it the model, or an artefact with its float tensors"]
            if graph.integer
            else []
        )

    def compile(self, graph: Graph) -> TickRun:
        from toolchain import devices
        from toolchain.targets.torch_ticks import TickRun

        device = devices.pick(self.device)
        arithmetic: dict[str, Arithmetic] = {phase.name: Floats(graph, phase, device, self.dtype) for phase in graph.phases}
        return TickRun(graph, arithmetic, batch=self.batch, trace=self.trace, device=device)


class Floats:
    """Plain floating point for one phase of one float graph: the arithmetic that `torch_ticks.simulate` asks, tick by tick, by the same rule as `fixed.step`.

    `dtype` is float32 or float64. Populations are rows of neurons, (samples, neurons), in the graph's units; nothing is rounded and nothing saturates.
    """

    def __init__(self, graph: Graph, phase: Phase, device: torch.device, dtype: str) -> None:
        import torch

        from toolchain.targets import torch_operations

        self._type: torch.dtype = getattr(torch, dtype)
        self._device = device
        self._phase = phase
        weights = {name: self._tensor(graph.tensors[name]) for name in tensor_names(phase)}
        self._connections = {
            id(s): torch_operations.Composition(
                s.ops,
                graph.population(s.source).shape,
                graph.population(s.target).shape,
                graph.tensors,
                weights.__getitem__,
                convolutions=torch_operations.TORCH,
                sums=False,
            )
            for s in phase.synapses
        }

    def _tensor(self, values: Array) -> Tensor:
        import torch

        return torch.as_tensor(np.asarray(values).copy(), dtype=self._type, device=self._device)

    def current(self, values: Array, population: str) -> Tensor:
        return self._tensor(values)

    def emitted(self, values: Array, population: str) -> Tensor:
        return self._tensor(values)

    def product(self, synapse: Synapse, spikes: Tensor) -> Tensor:
        return self._connections[id(synapse)](spikes)

    def step(self, population: str, potential: Tensor, current: Tensor) -> tuple[Tensor, Tensor, None]:
        dynamics = self._phase.dynamics[population]
        if dynamics.members == "graded":
            return current, current, None
        if dynamics.members == "none":
            total = potential * dynamics.leak + current
            return total, total.new_zeros(total.shape), None
        total = potential + current
        spikes = (total >= dynamics.threshold).to(self._type)
        if dynamics.members == "both":
            spikes = spikes - (total <= -dynamics.threshold).to(self._type)
        return (total - dynamics.reset * spikes) * dynamics.leak, spikes, None


TORCH = TorchFloat()
