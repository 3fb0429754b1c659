"""Whether feedback loops must settle: the largest singular value of one trip around them, rates to rates.

At the equilibrium a couple's rate is the sum of what arrives over its reset A, clipped to [0, 1], so the linear map

    rates of the sources of delayed synapses -> those synapses and all same-step paths behind them, each sum over its target's A -> the same rates

says what a trip makes of a small difference where no neuron is clipped. Of a loop through one population of couples, whose own rates are delayed, clipping only shrinks that: where the largest
singular value is below 1, the rates have one equilibrium and must converge to it (Banach; Xiao et al., NeurIPS 2021, theorem 1), with a leak the weighted rates up to a
residue. Through several populations (or back from a relay), clipping in between may take away what cancelled: there a value below 1 is a good sign, and no proof. At 1 and above nothing is proven either
way.

The value is found by Lanczos iteration on the map and its adjoint, from a seeded start: a power iteration that forgets nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from toolchain import ir
from toolchain.ir import Array, Graph, Phase, Synapse, weight_of
from toolchain.notation import synapse_products

if TYPE_CHECKING:
    from torch import Tensor

    from toolchain.targets.torch_operations import Operation

TOLERANCE = 1e-3
"""Relative error at which the iteration stops."""

LEAST = 32
"""Iterations before which it does not stop, where so many can be afforded and the map has so many directions."""

ALONE = 1e-12
"""A new direction shorter than this, relatively, is what rounding left."""

ITERATIONS = 60

LEAST_ITERATIONS = 4
"""Fewer than these say nothing: the check is left out."""

WORK = 2**35
"""Products that one graph's check may take."""

SEED = 0

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Loops:
    """The feedback loops of one graph. `populations` are on a loop, loop by loop; `singular_value` is None where there is no loop, or `skipped` says why it was not
    found. Where `converged` is false it is a lower bound. `proves`: a value below 1 means that rates must settle (see the module)."""

    populations: tuple[tuple[str, ...], ...]
    singular_value: float | None = None
    iterations: int = 0
    converged: bool = True
    proves: bool = True
    skipped: str | None = None

    @property
    def shown(self) -> str:
        if self.singular_value is None:
            return "not found"
        return f"{'' if self.converged else 'at least '}{self.singular_value:.3f}"

    def to_json(self) -> dict[str, Any]:
        return {
            "singular_value": self.singular_value,
            "iterations": self.iterations,
            "converged": self.converged,
            "proves": self.proves,
            "skipped": self.skipped,
        }


@dataclass(frozen=True)
class Contraction:
    """The check before (the float graph; None where it is not at hand) and after quantization."""

    before: Loops | None
    after: Loops

    @property
    def warnings(self) -> list[str]:
        """A sentence where the quantized loops are not proven to settle, or were not checked."""
        if self.after.skipped is not None:
            verb = "was" if len(self.after.populations) == 1 else "were"
            return [
                f"the {_named(self.after)} {verb} not checked: {self.after.skipped}; whether rates settle shows when you compare the accuracy at twice the time steps"
            ]
        value = self.after.singular_value
        if value is None or value < 1:
            return []
        before = "" if self.before is None or self.before.singular_value is None else f" ({self.before.shown} before quantization)"
        warning = (
            f"the {_named(self.after)} may not settle: largest singular value {self.after.shown}{before}, not below 1, so rates need not converge to one equilibrium "
            "(many trained loops settle all the same): compare the accuracy at twice the time steps"
        )
        return [warning]

    def to_text(self) -> str:
        if not self.after.populations:
            return "feedback loops: none"
        if self.after.skipped is not None:
            return "\n".join(f"warning: {warning}" for warning in self.warnings)
        before = "" if self.before is None else f"{self.before.shown} in floats, "
        sure = "below 1 rates must settle" if self.after.proves else "below 1 rates settle where no neuron is clipped"
        meaning = sure if self.after.converged else f"a lower bound, found in {self.after.iterations} iterations"
        line = f"largest singular value of the {_named(self.after)}: {before}{self.after.shown} in integers ({meaning})"
        return "\n".join([line, *(f"warning: {warning}" for warning in self.warnings)])

    def to_json(self) -> dict[str, Any]:
        return {
            "loops": [list(loop) for loop in self.after.populations],
            "before": None if self.before is None else self.before.to_json(),
            "after": self.after.to_json(),
            "warnings": self.warnings,
        }


def _named(loops: Loops) -> str:
    each = [", ".join(f"'{name}'" for name in loop) for loop in loops.populations]
    return f"feedback loop{'s' * (len(each) > 1)} through {' and through '.join(each)}"


def contraction(float_graph: Graph | None, graph: Graph) -> Contraction:
    """The check of both graphs, in whatever timing; either may be in floats."""
    return Contraction(None if float_graph is None else loops(float_graph), loops(graph))


def loops(graph: Graph) -> Loops:
    """The largest singular value of one trip around the feedback loops of the forward phase, all loops at once."""
    phase = graph.phase("forward")
    around = _on_loops(graph, phase)
    if not around:
        return Loops(())
    trip = _synapses(phase, around)
    products = sum(synapse_products(graph, synapse) for synapse in trip)
    affordable = min(ITERATIONS, WORK // max(1, 2 * products))
    couples = {name for group in around for name in group if graph.population(name).kind == "couple"}
    proves = len(couples) == len(around) and all(synapse.source in couples for synapse in trip if delayed(phase, synapse))
    if affordable < LEAST_ITERATIONS:
        return Loops(around, skipped=f"one trip takes {products:,} products, too large for the check")
    found = _largest(_Trip(graph, phase, trip), affordable)
    if found is None:
        return Loops(around, skipped="one trip makes values that float32 does not hold")
    value, iterations, converged = found
    return Loops(around, value, iterations, converged, proves)


def _on_loops(graph: Graph, phase: Phase) -> tuple[tuple[str, ...], ...]:
    """Populations that reach each other, in groups, in the phase's order."""
    reached = {name: {s.target for s in phase.synapses if s.source == name} for name in phase.order}
    for via in phase.order:
        for found in reached.values():
            if via in found:
                found |= reached[via]
    groups: list[tuple[str, ...]] = []
    for name in phase.order:
        group = tuple(other for other in phase.order if other in reached[name] and name in reached[other])
        if group and group not in groups:
            groups.append(group)
    return tuple(groups)


def _synapses(phase: Phase, groups: tuple[tuple[str, ...], ...]) -> list[Synapse]:
    return [s for s in phase.synapses if any(s.source in group and s.target in group for group in groups)]


def delayed(phase: Phase, synapse: Synapse) -> bool:
    """Whether spikes arrive in the model step after theirs, in hardware time or before."""
    start = phase.timing.start
    return start.get(synapse.source, 0) + synapse.delay > start.get(synapse.target, 0)


class _Trip:
    """The linear map and its adjoint, on vectors that hold the rates of the sources of delayed synapses."""

    def __init__(self, graph: Graph, phase: Phase, synapses: list[Synapse]) -> None:
        import torch

        self._torch = torch
        self._order = [name for name in phase.order if any(name == s.target for s in synapses)]
        self._into = {name: [(i, s.source, delayed(phase, s)) for i, s in enumerate(synapses) if s.target == name] for name in self._order}
        self._sizes = {name: prod(graph.population(name).shape) for name in self._order}
        self._states = [name for name in self._order if any(s.source == name and delayed(phase, s) for s in synapses)]
        # A relay's integers stand for its values in steps of its unit; a couple's spikes are ones.
        relays = {name: graph.scale("forward", name) for name in self._order if graph.population(name).kind == "linear"}
        self._divide = {name: relays.get(name, float(phase.dynamics[name].reset)) for name in self._order}
        self._messages = {name: relays.get(name, 1.0) for name in self._order}
        weights = float_weights(graph, synapses)
        self._forward = [composition(graph, s.source, s.target, s.ops, weights) for s in synapses]
        self._adjoint = [composition(graph, s.target, s.source, ir.adjoint(s.ops), weights) for s in synapses]

    @property
    def size(self) -> int:
        return sum(self._sizes[name] for name in self._states)

    def apply(self, vector: Vector) -> Vector:
        before = self._split(vector)
        now: dict[str, Tensor] = {}
        for name in self._order:
            total = self._zeros(name)
            for index, source, late in self._into[name]:
                total = total + self._forward[index]((before if late else now)[source] * self._messages[source])
            now[name] = total / self._divide[name]
        return self._joined(now)

    def transposed(self, vector: Vector) -> Vector:
        late_sum = {name: self._zeros(name) for name in self._states}
        now = {name: self._zeros(name) for name in self._order} | self._split(vector)
        for name in reversed(self._order):
            share = now[name] / self._divide[name]
            for index, source, late in self._into[name]:
                found = late_sum if late else now
                found[source] = found[source] + self._adjoint[index](share) * self._messages[source]
        return self._joined(late_sum)

    def _zeros(self, name: str) -> Tensor:
        return self._torch.zeros((1, self._sizes[name]), dtype=self._torch.float32)

    def _split(self, vector: Vector) -> dict[str, Tensor]:
        parts = np.split(vector.astype(np.float32)[None], np.cumsum([self._sizes[name] for name in self._states])[:-1], axis=1)
        return {name: self._torch.from_numpy(np.ascontiguousarray(part)) for name, part in zip(self._states, parts, strict=True)}

    def _joined(self, found: Mapping[str, Tensor]) -> Vector:
        joined: Vector = np.concatenate([found[name].numpy().ravel() for name in self._states]).astype(np.float64)
        return joined


def float_weights(graph: Graph, synapses: Sequence[Synapse], dtype: npt.DTypeLike = np.float32) -> dict[str, Tensor]:
    """Every tensor that the synapses read, exponents multiplied in, in floats."""
    import torch

    exponents = {name: getattr(op, "exponent", 0) for s in synapses for op in s.ops if (name := weight_of(op)) is not None}
    return {name: torch.from_numpy(np.ldexp(graph.tensors[name].astype(dtype), e)) for name, e in exponents.items()}


def composition(graph: Graph, source: str, target: str, ops: tuple[ir.Op, ...], weights: Mapping[str, Tensor]) -> Operation:
    """A connection of an integer or a float graph on real numbers, with the weights that `float_weights` made."""
    from toolchain.targets import torch_operations

    made = torch_operations.Composition(
        ops,
        graph.population(source).shape,
        graph.population(target).shape,
        graph.tensors,
        weights.__getitem__,
        convolutions=torch_operations.TORCH,
        sums=graph.integer,
    )
    shift = ir.exponent_of([op for op in ops if weight_of(op) is None])  # those with weights have theirs multiplied in
    return made if shift == 0 else lambda values: made(values) * 2.0**shift


def _largest(trip: _Trip, iterations: int) -> tuple[float, int, bool] | None:
    """(the largest singular value, iterations, whether it is within `TOLERANCE`), by Lanczos iteration on the adjoint of the map times the map; every new
    direction is made orthogonal to all before. None where a trip leaves float32."""
    import torch

    draw = np.random.default_rng(SEED)
    start = draw.normal(size=trip.size)
    directions: list[Vector] = [start / np.linalg.norm(start)]
    diagonal: list[float] = []
    beside: list[float] = []
    top = 0.0
    with torch.inference_mode():
        for count in range(1, min(iterations, trip.size) + 1):
            made = trip.transposed(trip.apply(directions[-1]))
            if not np.isfinite(made).all():
                return None
            diagonal.append(float(made @ directions[-1]))
            known = np.stack(directions)
            for _ in range(2):  # once leaves what rounding leaves
                made = made - known.T @ (known @ made)
            length = float(np.linalg.norm(made))
            values, vectors = np.linalg.eigh(_tridiagonal(diagonal, beside))
            top = max(float(values[-1]), 0.0)
            # An eigenvalue lies within this distance, of a singular value half as far, relatively. Its square over the gap to the next one would be a tighter bound, but
            # of two close values the iteration sees one at first, and no gap.
            distance = length * abs(float(vectors[-1, -1]))
            # Nor does it say which eigenvalue: a start almost at right angles to the largest one's direction settles on a smaller one first, so it goes on for a while.
            if (distance <= 2 * TOLERANCE * top and count >= min(LEAST, iterations)) or count == trip.size:
                return sqrt(top), count, True
            if length <= ALONE * max(top, 1.0):  # what was seen maps into itself: go on with what was not
                made, length = _new(draw, known), 0.0
            beside.append(length)
            directions.append(made / np.linalg.norm(made))
    return sqrt(top), iterations, False


def _new(draw: np.random.Generator, known: Array) -> Vector:
    """A direction orthogonal to all `known` ones."""
    made: Vector = draw.normal(size=known.shape[1])
    for _ in range(2):
        made = made - known.T @ (known @ made)
    return made


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Array:
    matrix: Array = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    return matrix
