"""The simulator: integer graphs, batched, bit-exact with `reference`, on CPU or CUDA; docs/targets/sim.md says how.

On a CPU the compiled core runs whole phases (`sim_native`), on CUDA ticks on static buffers do (`cuda_ticks`); torch, tick by tick, serves everywhere else
(`Integers`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from toolchain.errors import GraphError, UsageError, unknown
from toolchain.fixed import EXACT_FLOAT32, EXACT_FLOAT64, INT32_SAFE, decay, largest_product, largest_total
from toolchain.ir import DECAY_ONE, POTENTIAL_LIMIT, Array, Graph, Phase, Synapse, exponent_of
from toolchain.limits import LOIHI2, Limits
from toolchain.passes import LOIHI_PIPELINE, Pipeline
from toolchain.target import Executable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from toolchain.targets.torch_operations import Operation
    from toolchain.targets.torch_ticks import Arithmetic


KERNELS = ("auto", "native", "torch")
"""What runs a graph on a CPU: the compiled core where it can, the core or an error, torch."""

CURRENTS = ("measured", "events", "dense")
"""How the core adds up what spikes cause: by event, by products, or whichever the spikes of a step make cheaper."""


@dataclass(frozen=True)
class Sim:
    """`device` is auto, cpu or cuda. On a CPU the compiled core runs whole phases, sample by sample (`kernel` auto or native); torch runs them tick by tick where there is
    no core or `kernel` is torch. Torch and a GPU advance up to `batch` samples together. `currents` is how the core adds up what spikes cause (`CURRENTS`), `instructions`
    an upper bound on its instruction set (a place in `phases.INSTRUCTION_SETS`). With `trace` every spike and potential of every step is kept."""

    device: str = "auto"
    batch: int = 256
    trace: bool = False
    kernel: str = "auto"
    currents: str = "measured"
    instructions: int | None = None
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

    def compile(self, graph: Graph) -> Executable:
        from toolchain import devices
        from toolchain.native import phases

        device = devices.pick(self.device)
        for what, chosen, known in (("kernel", self.kernel, KERNELS), ("currents", self.currents, CURRENTS)):
            if chosen not in known:
                raise unknown(what, chosen, known)
        if not _whole(self.batch, 1, None):
            raise UsageError(f"batch is {self.batch!r}: give a whole number from 1")
        sets = phases.INSTRUCTION_SETS
        if self.instructions is not None and not _whole(self.instructions, 0, len(sets) - 1):
            raise UsageError(f"instructions is {self.instructions!r}: give None, or 0 to {len(sets) - 1} for {', '.join(sets)}")
        if self.kernel == "native" and device.type != "cpu":
            raise UsageError(
                f"the compiled core of 'sim' runs on the CPU and not on {device.type}: leave kernel at 'auto', or choose the CPU"
            )
        if device.type == "cpu" and self.kernel != "torch":
            from toolchain.targets.sim_native import NativeRun
            from toolchain.targets.sim_plans import Unfit

            try:
                return NativeRun(graph, trace=self.trace, currents=self.currents, instructions=self.instructions)
            except Unfit as found:
                if self.kernel == "native":
                    raise UsageError(
                        f"the compiled core of 'sim' cannot run this graph: {found}; or leave kernel at 'auto' for torch"
                    ) from None
                _tell(f"sim runs in torch, exactly but more slowly: {found}")
        if device.type == "cuda" and self.kernel != "torch":
            from toolchain.targets import cuda_ticks

            return cuda_ticks.compile(graph, batch=self.batch, trace=self.trace, device=device)
        from toolchain.targets.torch_ticks import TickRun

        arithmetic: dict[str, Arithmetic] = {phase.name: Integers(graph, phase, device) for phase in graph.phases}
        return TickRun(graph, arithmetic, batch=self.batch, trace=self.trace, device=device)


def _whole(value: object, low: int, high: int | None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)


@cache
def _tell(message: str) -> None:
    """Once a process."""
    from toolchain.progress import say

    say(message)


class Integers:
    """Loihi's arithmetic (see `toolchain.fixed`) for one phase of one graph, in torch.

    Each connection's products run in the narrowest float type in which every partial sum is a whole number the type holds exactly (float32 below 2^24,
    float64 below 2^53); the bound comes from the weights themselves, before the run. Everything else is whole numbers: int32 where a proven bound
    allows it, int64 elsewhere.
    """

    def __init__(self, graph: Graph, phase: Phase, device: torch.device) -> None:
        import torch

        from toolchain.targets import torch_operations

        self._device = device
        self._phase = phase
        self._graph = graph
        bounds = {id(s): largest_product(graph, s) for s in phase.synapses}
        widest = max((partial for partial, _ in bounds.values()), default=0)
        if widest >= EXACT_FLOAT64:
            raise GraphError(f"a sum of phase '{phase.name}' can reach {widest}, above 2^53: lower the weights or the input levels")
        short = torch_operations.shortened(device)
        self._types = {
            key: torch.float32 if partial < EXACT_FLOAT32 and not short else torch.float64 for key, (partial, _) in bounds.items()
        }
        self._potentials = {name: self._potential(name) for name in phase.order}
        self._tensors: dict[tuple[str, torch.dtype], Tensor] = {}
        self._connections = {id(s): self._prepared(s) for s in phase.synapses}

    def _potential(self, name: str) -> torch.dtype:
        """int32 where nothing that the population adds up can pass it."""
        import torch

        phase = self._phase
        if self._graph.population(name).kind == "input":
            return torch.int64
        largest = largest_total(self._graph, phase, name)
        return torch.int32 if largest <= INT32_SAFE and phase.dynamics[name].leak == 1 else torch.int64

    def _prepared(self, synapse: Synapse) -> Operation:
        from toolchain.targets import torch_operations

        graph, kind = self._graph, self._types[id(synapse)]
        return torch_operations.Composition(
            synapse.ops,
            graph.population(synapse.source).shape,
            graph.population(synapse.target).shape,
            graph.tensors,
            lambda name: self._weight(name, kind),
            convolutions=torch_operations.exact(kind, self._device),
            sums=True,
        )

    def _weight(self, name: str, kind: torch.dtype) -> Tensor:
        """A tensor of mantissas, once for all synapses that read it in this type."""
        import torch

        if (name, kind) not in self._tensors:
            self._tensors[name, kind] = torch.as_tensor(self._graph.tensors[name].astype(np.float64), dtype=kind, device=self._device)
        return self._tensors[name, kind]

    def current(self, values: Array, population: str) -> Tensor:
        import torch

        return torch.as_tensor(values.astype(np.int64), dtype=self._potentials[population], device=self._device)

    def emitted(self, values: Array, population: str) -> Tensor:
        import torch

        return torch.as_tensor(values, device=self._device).to(self._spike(population))

    def _spike(self, population: str) -> torch.dtype:
        """float32 where it holds whatever the population emits."""
        import torch

        found = self._graph.population(population)
        return torch.float64 if found.kind == "input" and self._graph.scale("forward", population) >= EXACT_FLOAT32 else torch.float32

    def product(self, synapse: Synapse, spikes: Tensor) -> Tensor:
        made = self._connections[id(synapse)](spikes.to(self._types[id(synapse)])).to(self._potentials[synapse.target])
        exponent = exponent_of(synapse.ops)
        return made << exponent if exponent else made

    def step(self, population: str, potential: Tensor, current: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dynamics = self._phase.dynamics[population]
        if dynamics.members == "graded":
            passed = current.clamp(-POTENTIAL_LIMIT, POTENTIAL_LIMIT)
            return passed, passed.to(self._spike(population)), passed != current
        before = self._leaked(potential, dynamics.leak) if dynamics.members == "none" else potential
        total = before + current
        saturated = total.abs() > POTENTIAL_LIMIT
        total = total.clamp(-POTENTIAL_LIMIT, POTENTIAL_LIMIT)
        if dynamics.members == "none":
            return total, total.new_zeros(total.shape), saturated
        fired = (total >= dynamics.threshold).to(total.dtype)
        if dynamics.members == "both":
            fired -= (total <= -dynamics.threshold).to(total.dtype)
        return self._leaked(total - dynamics.reset * fired, dynamics.leak), fired.to(self._spike(population)), saturated

    def _leaked(self, potential: Tensor, leak: float) -> Tensor:
        if leak == 1:
            return potential
        return potential.sign() * ((potential.abs() * (DECAY_ONE - decay(leak))) >> 12)


SIM = Sim()
