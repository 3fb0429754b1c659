"""The float graph on torch, CPU or CUDA: what the GPU computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from toolchain.errors import GraphError
from toolchain.ir import Array, Dense, Dynamics, Graph, Identity, Scale, Synapse
from toolchain.limits import LOIHI2, Limits
from toolchain.passes import Adjoint, Fold, Pipeline

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from toolchain.targets.torch_ticks import TickRun


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

        arithmetic = _Floats(graph, devices.pick(self.device), self.dtype)
        return TickRun(graph, {phase.name: arithmetic for phase in graph.phases}, batch=self.batch, trace=self.trace)


class _Floats:
    """Plain floating point: the same rule as `fixed.step`, in the chosen type."""

    def __init__(self, graph: Graph, device: torch.device, dtype: str) -> None:
        import torch

        self.potential: torch.dtype = getattr(torch, dtype)
        self.spike: torch.dtype = self.potential
        self._device = device
        self._weights = {name: self.tensor(tensor) for name, tensor in graph.tensors.items()}

    def tensor(self, values: Array) -> Tensor:
        import torch

        return torch.as_tensor(values.copy(), dtype=self.potential, device=self._device)

    def product(self, synapse: Synapse, spikes: Tensor) -> Tensor:
        for op in synapse.ops:
            if isinstance(op, Dense):
                weight = self._weights[op.weight]
                spikes = spikes @ (weight if op.transpose else weight.T)
            elif isinstance(op, Scale):
                spikes = spikes * op.factor
            elif not isinstance(op, Identity):
                raise GraphError(f"operation {type(op).__name__} has no torch form yet: fully connected networks have")
        return spikes

    def step(self, potential: Tensor, current: Tensor, dynamics: Dynamics) -> tuple[Tensor, Tensor, None]:
        if dynamics.members == "none":
            total = potential * dynamics.leak + current
            return total, total.new_zeros(total.shape), None
        total = potential + current
        spikes = (total >= dynamics.threshold).to(self.spike)
        if dynamics.members == "both":
            spikes = spikes - (total <= -dynamics.threshold).to(self.spike)
        return (total - dynamics.reset * spikes) * dynamics.leak, spikes, None


TORCH = TorchFloat()
