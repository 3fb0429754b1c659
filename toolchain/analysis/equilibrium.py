"""The equilibrium that rates settle to: the map f from rates to the rates that they make, how far rates are from it, and its solution without spikes.

Summing the model step over time and dividing by the sum of leaks (METHODS 1.3, 3.2; Xiao et al., NeurIPS 2021 and Neural Networks 2023) gives, up to what
potentials still hold,

    forward    a_l = clip((sum W a + b + Fx) / A, 0, 1)             a: (weighted) rates; Fx the mean current of the input
    feedback   b_l = clip((g + sum W^T (m b)) / A, -1, 1)           b: rates of signed spikes; m the masks of the forward phase, g the error

in the graph's own units, floats or integers; A is a couple's reset. Relays pass on the sum. The mean of what a source sent is weighted with the leak
of its target, which is what the target makes of it. The feedback equation is linear but for the clip, so that without it it is the implicit gradient's.
What f leaves out: saturation, the first step's missing feedback and late biases (both vanish as 1/T), and what an integer leak rounds away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal

import numpy as np

from toolchain import codec, fixed
from toolchain.analysis.feedback_loops import composition, delayed, float_weights
from toolchain.ir import Array, Graph, Synapse
from toolchain.target import Result

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-10
"""Largest |f(a) - a| of any neuron at which an equilibrium counts as solved; of the feedback equation relative to its largest drive."""

ITERATIONS = 1000

LEAST_DAMPING = 1 / 64

Sent = Callable[[Synapse], "Tensor"]
"""What a synapse's source sends on average, gated, (samples, neurons)."""


@dataclass(frozen=True)
class Precision:
    """What an equilibrium is solved in, and to which residual (`TOLERANCE`)."""

    dtype: Literal["float32", "float64"] = "float64"
    tolerance: float = TOLERANCE


class RateMap:
    """f of one phase of a graph. Tensors are (samples, neurons) in the graph's units, of integer graphs too in floats."""

    def __init__(self, graph: Graph, phase: str, dtype: Literal["float32", "float64"] = "float64") -> None:
        import torch

        self.graph, self.phase = graph, graph.phase(phase)
        self._type = getattr(torch, dtype)
        weights = float_weights(graph, self.phase.synapses, dtype)
        self._connections = [(s, composition(graph, s.source, s.target, s.ops, weights)) for s in self.phase.synapses]
        self.inner = [name for name in self.phase.order if graph.population(name).kind in ("couple", "linear")]
        self._bias = {
            name: self.tensor(np.sum([values for _, values in found], axis=0)[None])
            for name, found in codec.bias_currents(graph, self.phase).items()
        }

    def tensor(self, values: Array) -> Tensor:
        import torch

        return torch.as_tensor(np.ascontiguousarray(values)).to(self._type).reshape(len(values), -1)

    def held(self, currents: Mapping[str, Array]) -> dict[str, Tensor]:
        """By population the constant part of its current: `currents` of drives (samples, *shape), and biases."""
        found = dict(self._bias)
        for name, current in currents.items():
            made = self.tensor(current)
            found[name] = found[name] + made if name in found else made
        return found

    def total(self, name: str, sent: Sent, held: Mapping[str, Tensor], samples: int) -> Tensor:
        """The mean current of a population."""
        made = held[name].expand(samples, -1) if name in held else self.zeros(name, samples)
        for synapse, connection in self._connections:
            if synapse.target == name:
                made = made + connection(sent(synapse))
        return made

    def zeros(self, name: str, samples: int) -> Tensor:
        import torch

        return torch.zeros((samples, prod(self.graph.population(name).shape)), dtype=self._type)

    def rate(self, name: str, total: Tensor) -> Tensor:
        """The rate that a mean current makes in equilibrium; of a relay the current itself."""
        dynamics = self.phase.dynamics[name]
        if dynamics.members == "graded":
            return total
        return (total / dynamics.reset).clamp(-1.0 if dynamics.members == "both" else 0.0, 1.0)


@dataclass(frozen=True)
class Solution:
    """An equilibrium that was solved for, or not.

    rates       by population (samples, neurons): rates, of a relay its values in graph units
    currents    by population the mean currents over the reset: rates before they are clipped
    residual    the largest |f(a) - a| of any neuron of a delayed source; `converged` whether it is within the tolerance, after `iterations`
    """

    rates: dict[str, Tensor]
    currents: dict[str, Tensor]
    residual: float
    converged: bool
    iterations: int


def solve(
    rates: RateMap,
    held: Mapping[str, Tensor],
    inputs: Callable[[Synapse], Tensor] | None,
    masks: Mapping[str, Tensor],
    samples: int,
    *,
    clip: bool = True,
    tolerance: float = TOLERANCE,
    iterations: int = ITERATIONS,
) -> Solution:
    """The fixed point of f by damped iteration from 0, a <- a + d (f(a) - a), on the rates of the sources of delayed synapses, in which one step goes
    through all populations in order.

    d halves, from 1, whenever three steps bring nothing; so it converges wherever the slope of f has no eigenvalue with a real part of 1 or more, which
    is where the spiking network settles too. Without delayed synapses one step is exact. `inputs` gives the mean of what input populations send.
    """
    import torch

    phase = rates.phase
    states = sorted({s.source for s in phase.synapses if delayed(phase, s)}, key=phase.order.index)
    before = {name: rates.zeros(name, samples) for name in states}
    damping, idle, best, residual, found = 1.0, 0, float("inf"), float("inf"), _Sweep({}, {})
    for count in range(1, iterations + 1):
        found = _sweep(rates, held, inputs, masks, before, samples, clip)
        residual = max((float((found.rates[name] - before[name]).abs().max()) for name in states), default=0.0)
        if residual <= tolerance or not np.isfinite(residual):
            return Solution(found.rates, found.currents, residual, residual <= tolerance, count)
        idle = 0 if residual < 0.99 * best else idle + 1
        best = min(best, residual)
        if idle == 3 and damping > LEAST_DAMPING:
            damping, idle, best = damping / 2, 0, residual
        before = {name: torch.lerp(before[name], found.rates[name], damping) for name in states}
    return Solution(found.rates, found.currents, residual, False, iterations)


@dataclass(frozen=True)
class _Sweep:
    rates: dict[str, Tensor]
    currents: dict[str, Tensor]


def _sweep(
    rates: RateMap,
    held: Mapping[str, Tensor],
    inputs: Callable[[Synapse], Tensor] | None,
    masks: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    samples: int,
    clip: bool,
) -> _Sweep:
    """f, population after population, with the rates `before` where spikes arrive a step late."""
    phase, graph = rates.phase, rates.graph
    made, currents = dict[str, "Tensor"](), dict[str, "Tensor"]()

    def sent(synapse: Synapse) -> Tensor:
        if graph.population(synapse.source).kind == "input":
            assert inputs is not None
            return inputs(synapse)
        values = (before if delayed(phase, synapse) else made)[synapse.source]
        return values if synapse.gate is None else values * masks[synapse.gate]

    for name in rates.inner:
        total = rates.total(name, sent, held, samples)
        reset = phase.dynamics[name].reset
        currents[name] = total if graph.population(name).kind == "linear" else total / reset
        made[name] = rates.rate(name, total) if clip else currents[name]
    return _Sweep(made, currents)


def mean_input(graph: Graph, encoded: Array, leak: float, steps: int | None = None) -> Array:
    """What the input sends on average over the first `steps` (None: all), (samples, *shape), weighted with its target's leak; a still image is its own mean."""
    if not graph.of_kind("input")[0].events:
        return encoded
    frames = encoded[..., :steps]
    count = frames.shape[-1]
    weights = leak ** np.arange(count - 1, -1, -1.0)
    mean: Array = frames @ (weights / fixed.leak_sum(leak, count))
    return mean


def forward_equilibrium(graph: Graph, inputs: Array, precision: Precision = Precision()) -> tuple[Result, Solution]:
    """The forward phase's equilibrium on `inputs` (samples, *input shape), as the result of a run that has come to it, which `codec` reads: traces hold
    the rates, counts T times the rates (so that masks are 0 < rate < 1), and the readout's potential what it would hold."""
    import torch

    values = codec.check_inputs(graph, inputs)
    encoded, samples = codec.encode_input(graph, values), len(values)
    rates = RateMap(graph, "forward", precision.dtype)
    phase = rates.phase

    def entering(synapse: Synapse) -> Tensor:
        return rates.tensor(mean_input(graph, encoded, phase.dynamics[synapse.target].leak))

    with torch.inference_mode():
        held = rates.held({d.population: codec.input_current(graph, d, encoded) for d in phase.drive})
        found = solve(rates, held, entering, {}, samples, tolerance=precision.tolerance)
        readout = graph.of_kind("readout")[0].name
        total = rates.total(readout, lambda synapse: found.rates[synapse.source], {}, samples)
    norm = fixed.leak_sum(phase.dynamics[readout].leak, phase.time_steps)
    potential = {readout: total.double().numpy().reshape(samples, *graph.population(readout).shape) * norm}
    return _result(graph, "forward", found, samples, potential), found


def feedback_equilibrium(
    graph: Graph, masks: Mapping[str, Array], error: Array, precision: Precision = Precision(), *, clip: bool = False
) -> tuple[Result, Solution]:
    """The feedback phase's equilibrium under `masks` by population and `error` (samples, *shape of the driven population), as `forward_equilibrium`;
    without `clip` the linear equation of the implicit gradient, whose rates may pass 1."""
    import torch

    rates, samples = RateMap(graph, "feedback", precision.dtype), len(error)
    with torch.inference_mode():
        held = rates.held({d.population: codec.error_current(graph, error) for d in rates.phase.drive})
        largest = max(
            (float(h.abs().max()) / rates.phase.dynamics[name].reset for name, h in held.items() if _fires(rates, name)), default=1.0
        )
        gates = {name: rates.tensor(mask) for name, mask in masks.items()}
        found = solve(rates, held, None, gates, samples, clip=clip, tolerance=precision.tolerance * (largest or 1.0))
    found = replace(found, residual=found.residual / (largest or 1.0))
    return _result(graph, "feedback", found, samples, {}), found


def _fires(rates: RateMap, name: str) -> bool:
    return rates.graph.population(name).kind == "couple"


def _result(graph: Graph, phase: str, found: Solution, samples: int, potentials: dict[str, Array]) -> Result:
    plan = graph.phase(phase)
    shaped = {name: values.double().numpy().reshape(samples, *graph.population(name).shape) for name, values in found.rates.items()}
    return Result(
        phase=phase,
        time_steps=plan.time_steps,
        counts={name: values * plan.time_steps for name, values in shaped.items()},
        activity={name: (values != 0).astype(np.int32) for name, values in shaped.items()},
        traces={name: values * fixed.leak_sum(plan.dynamics[name].leak, plan.time_steps) for name, values in shaped.items()},
        potentials=potentials,
        saturations={name: np.zeros(values.shape, np.int32) for name, values in shaped.items()},
    )
