"""The torch module itself as an executable, so that target torch means what the researcher trained and not our rewriting of it."""

from __future__ import annotations

import copy
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from toolchain import codec, devices, fixed
from toolchain.errors import UsageError
from toolchain.ir import Array, Dynamics, Graph, Phase, Population, Provenance, Units
from toolchain.target import Result, join

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from toolchain.layers import Equilibrium, FeedbackSNN
    from toolchain.methods.spide import Forward

BATCH = 512
"""Samples that run together where nobody says how many and the network is small."""

AT_ONCE = {"cpu": 2**24, "cuda": 2**28}
"""Neurons of all those samples together, about 30 bytes each; a relay's spike trains count for themselves."""


class ModuleRun:
    """Both phases of a FeedbackSNN in its own dtype. `graph` (folded, float; or an `outline`) only names populations and decodes results.

    Membrane potentials stay inside the module: `Result.potentials` has the readout's alone.
    """

    def __init__(self, module: FeedbackSNN, graph: Graph, *, device: str = "auto", batch: int | None = None) -> None:
        self.graph = graph
        self._device = devices.pick(device)
        self._module = copy.deepcopy(module).to(self._device).eval()
        neurons = sum(prod(population.shape) for population in graph.populations)
        kept = graph.phase("forward").time_steps if module.relays else 1
        self._batch = batch or max(1, min(BATCH, AT_ONCE.get(self._device.type, AT_ONCE["cpu"]) // (neurons * kept)))
        self._inner = [p for p in graph.populations if p.kind in ("couple", "linear")]
        self._latched: list[Forward] = []

    def run(self, inputs: Array, *, phase: str = "forward") -> Result:
        if phase == "forward":
            values = codec.check_inputs(self.graph, inputs)
            self._latched = []
            return join([self._forward(values[i : i + self._batch]) for i in range(0, len(values), self._batch)])
        error = codec.check_error(self.graph, inputs)
        latched = sum(len(f.masks[0]) for f in self._latched)
        if latched != len(error):
            raise UsageError(
                f"the feedback phase got {len(error)} samples but the forward run before it had {latched}: give the errors of the same samples"
            )
        return join([self._feedback(f, error[i * self._batch : (i + 1) * self._batch]) for i, f in enumerate(self._latched)])

    def close(self) -> None:
        self._latched = []

    def __enter__(self) -> ModuleRun:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _forward(self, values: Array) -> Result:
        import torch

        from toolchain.methods import spide

        x = torch.as_tensor(np.ascontiguousarray(values), device=self._device)
        with torch.no_grad():
            if self.graph.has_phase("feedback"):
                stage = spide.forward_stage(self._module, x, trace=bool(self._module.relays))
                self._latched.append(stage)
                found = stage.equilibrium
            else:
                found = self._module.equilibrium(x, trace=bool(self._module.relays))
            scores = self._module.logits(self._module.readout_rates(found))
        return self._result("forward", found.counts, self._activity(found), found.rates, scores)

    def _activity(self, found: Equilibrium) -> Sequence[Tensor]:
        """Spikes of each layer; of a relay how many of its values were not 0."""
        relays = self._module.relays
        return [(found.trains[layer] != 0).sum(dim=0) if layer in relays else counts for layer, counts in enumerate(found.counts)]

    def _feedback(self, stage: Forward, error: Array) -> Result:
        import torch

        from toolchain.methods import spide

        with torch.no_grad():
            dtype = stage.masks[-1].dtype
            done = spide.feedback_stage(self._module, stage, torch.as_tensor(error, dtype=dtype, device=self._device), trace=True)
            counts = tuple(train.to(torch.int32).sum(dim=0) for train in done.trains)
            rates = tuple(beta / self._module.neuron.reset_back for beta in done.beta)
        return self._result("feedback", counts, done.activity, rates, None)

    def _result(
        self, phase: str, counts: Sequence[Tensor], activity: Sequence[Tensor], rates: Sequence[Tensor], scores: Tensor | None
    ) -> Result:
        plan = self.graph.phase(phase)
        counted: dict[str, Array] = {}
        active: dict[str, Array] = {}
        traces: dict[str, Array] = {}
        for population, count, spikes, rate in zip(self._inner, counts, activity, rates, strict=True):
            name, relay = population.name, population.kind == "linear"
            counted[name] = _array(count, population, np.float64 if relay else np.int32)
            active[name] = _array(spikes, population, np.int32)
            norm = fixed.leak_sum(plan.dynamics[name].leak, plan.time_steps)
            traces[name] = counted[name] if relay else _array(rate, population, np.float64) * norm
        potentials: dict[str, Array] = {}
        if scores is not None:
            potentials[self.graph.of_kind("readout")[0].name] = _held(self.graph, scores.double().cpu().numpy())
        return Result(
            phase=phase,
            time_steps=plan.time_steps,
            counts=counted,
            activity=active,
            traces=traces,
            potentials=potentials,
            saturations={name: np.zeros(count.shape, np.int32) for name, count in counted.items()},
        )


def _array(values: Tensor, population: Population, dtype: type[np.generic]) -> Array:
    found: Array = values.cpu().numpy().astype(dtype).reshape(len(values), *population.shape)
    return found


def _held(graph: Graph, scores: Array) -> Array:
    """What the readout's potential is where `codec.logits` makes `scores` of it."""
    plan, readout = graph.phase("forward"), graph.of_kind("readout")[0].name
    constant = sum((graph.tensors[bias.tensor] for bias in plan.bias.get(readout, ())), np.zeros(()))
    held: Array = (scores - constant) * fixed.leak_sum(plan.dynamics[readout].leak, plan.time_steps)
    return held


def outline(module: FeedbackSNN) -> Graph:
    """Populations and dynamics of a network that has no graph, without its connections: enough to read what a run of the module found. Its weights must be finite all the same."""
    from toolchain.lower import require_finite, takes_events

    require_finite(module)
    names = [f"hidden{layer + 1}" for layer in range(module.layers)]
    kinds = ["linear" if layer in module.relays else "couple" for layer in range(module.layers)]
    populations = (
        Population("input", module.input_shape, "input", events=takes_events(module)),
        *(
            Population(name, shape, "linear" if kind == "linear" else "couple")
            for name, shape, kind in zip(names, module.layer_shapes(), kinds, strict=True)
        ),
        Population("readout", (module.classes,), "readout"),
    )
    dynamics = {
        name: Dynamics(1.0, members="graded") if kind == "linear" else Dynamics(module.leak, firing.threshold, firing.reset, "plus")
        for name, kind, firing in zip(names, kinds, module.firing(), strict=True)
    }
    dynamics["readout"] = Dynamics(module.leak if module.weighted_readout else 1.0)
    forward = Phase("forward", module.time_steps, ("input", *names, "readout"), dynamics, ())
    return Graph(populations, (forward,), {}, Units("float", {}), Provenance(module.name))


def carries_feedback(module: FeedbackSNN) -> bool:
    """Whether SPIDE's feedback stage runs on the module itself: it follows the chain and the feedback connections, and knows one neuron."""
    return not module.relays and not module.shortcuts and module.trained_threshold is None
