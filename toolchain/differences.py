"""Where two results of one phase part: every spike, potential and saturation compared, and the earliest difference with what it says of its cause."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from toolchain.errors import UsageError
from toolchain.ir import Array, Graph, Phase
from toolchain.target import Result

SENDING = ("couple", "linear")
"""The kinds of populations whose spikes are compared; of relays the values that they pass on."""


@dataclass(frozen=True)
class Difference:
    """The first place where two targets part: earliest tick, then population in update order, then sample and neuron.

    `neuron` is the flat number, `index` the same by axes. `inputs` says what the sample was (image, probe, golden input) and `sample` its number. `a` and `b` are the two
    targets' values of `kind`; `current_a` and `current_b` what arrived in that step (None where a leak's rounding hides it): where they are equal, the population's own
    arithmetic parted. `expected` is the value by the definition (`reference`), None where it was not run.
    """

    phase: str
    population: str
    neuron: int
    index: tuple[int, ...]
    step: int
    inputs: str
    sample: int
    kind: str
    a: int | float
    b: int | float
    current_a: int | None = None
    current_b: int | None = None
    expected: int | float | None = None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "index": list(self.index)}

    def to_text(self, a: str, b: str) -> str:
        text = (
            f"first difference: {self.phase} phase, {self.inputs} {self.sample}, population '{self.population}', neuron {self.neuron} {list(self.index)}, "
            f"step {self.step}: {self.kind} {self.a} ({a}) against {self.b} ({b})"
        )
        if self.current_a is not None and self.current_b is not None:
            text += (
                f"; current {self.current_a} against {self.current_b}"
                if self.current_a != self.current_b
                else f"; equal currents {self.current_a}"
            )
        if self.expected is not None and "reference" not in (a, b):
            right = {self.a: a, self.b: b}.get(self.expected)
            text += f"; reference has {self.expected}" + (f", as {right}" if right else "")
        return text


@dataclass(frozen=True)
class Pair:
    """Two targets compared; all zero means identical on everything compared. `not_compared` says, a sentence each, what one of them does not give."""

    a: str
    b: str
    spikes_compared: int = 0
    spike_differences: int = 0
    potential_differences: int = 0
    saturation_differences: int = 0
    first_difference: Difference | None = None
    not_compared: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        return not (self.spike_differences or self.potential_differences or self.saturation_differences)

    def to_json(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "first_difference"}
        first = None if self.first_difference is None else self.first_difference.to_json()
        return {**found, "not_compared": list(self.not_compared), "first_difference": first}

    def to_text(self) -> str:
        verdict = f"{self.a} = {self.b}" if self.identical else f"{self.a} and {self.b} differ"
        text = (
            f"{verdict}: {self.spike_differences:,} of {self.spikes_compared:,} spikes, {self.potential_differences:,} potentials and "
            f"{self.saturation_differences:,} saturations differ"
        )
        lines = [text]
        if self.first_difference is not None:
            lines.append(self.first_difference.to_text(self.a, self.b))
        return "\n".join([*lines, *(f"not compared: {sentence}" for sentence in self.not_compared)])

    def plus(self, other: Pair) -> Pair:
        """Both comparisons of the same two targets together."""
        return replace(
            self,
            spikes_compared=self.spikes_compared + other.spikes_compared,
            spike_differences=self.spike_differences + other.spike_differences,
            potential_differences=self.potential_differences + other.potential_differences,
            saturation_differences=self.saturation_differences + other.saturation_differences,
            first_difference=self.first_difference or other.first_difference,
            not_compared=tuple(dict.fromkeys([*self.not_compared, *other.not_compared])),
        )


class Samples(NamedTuple):
    """What the compared samples are called, and the number of the first of them."""

    inputs: str
    first: int = 0


class _Reading(NamedTuple):
    """One kind of numbers that results hold: its word, its field in a step's history (None: only totals are kept), the field of its totals, and what those are called."""

    kind: str
    history: str | None
    totals: str
    total: str


READINGS = (
    _Reading("spike", "spikes", "counts", "spike count"),
    _Reading("potential", "potentials", "potentials", "last potential"),
    _Reading("saturations", None, "saturations", "saturations"),
)

SUMS = (
    _Reading("spike", None, "counts", "spike count"),
    _Reading("spike", None, "activity", "number of spikes"),
    _Reading("spike", None, "traces", "leaky sum of spikes"),
    _Reading("potential", None, "potentials", "last potential"),
)
"""What gates, accuracies and learning read: targets add it up by themselves, so it may be wrong where every step is right."""


def compared(graph: Graph, pair: Pair, a: Result, b: Result, samples: Samples, *, totals: bool = False) -> Pair:
    """Everything that two results of one phase, of the targets that `pair` names, disagree about: step by step, or in total where one of them keeps no history (which is
    said) or where `totals` asks for no more."""
    phase = graph.phase(a.phase)
    total, found = Pair(pair.a, pair.b), []
    for place, name in enumerate(name for name in phase.order if graph.population(name).kind != "input"):
        kind = graph.population(name).kind
        for reading in READINGS if kind in SENDING else READINGS[1:]:
            values, by_step, lacking = _both(pair, a, b, name, reading._replace(history=None) if totals else reading)
            total = replace(total, not_compared=(*total.not_compared, *(f"{sentence} in the {a.phase} phase" for sentence in lacking)))
            if values is None:
                continue
            where = np.argwhere(values[0] != values[1])
            total = total.plus(_counted(pair, reading.kind, values[0].size, len(where)))
            if len(where):
                word = _word(reading.kind if by_step else reading.total, kind)
                first = _located(phase, name, word, values, where[0], samples, by_step)
                tick = phase.timing.start.get(name, 0) + (first.step - 1) * phase.timing.period if by_step else phase.ticks
                found.append((tick, place, first))
        if not found:  # a step that parts has other sums
            for reading in SUMS if kind in SENDING else SUMS[-1:]:
                parting = _sums(phase, name, kind, reading, pair, a, b, samples)
                if parting is not None:
                    total = total.plus(_counted(pair, reading.kind, 0, parting[0]))
                    found.append((phase.ticks, place, parting[1]))
    if not found:
        return total
    return replace(total, first_difference=_with_currents(graph, min(found, key=lambda item: item[:2])[2], a, b, samples))


def total_of(kind: str) -> str:
    """The field of a result that holds the totals of a difference's `kind`."""
    return next(reading.totals for reading in (*READINGS, *SUMS) if kind in (reading.total, _word(reading.total, "linear")))


def _word(kind: str, population: str) -> str:
    """What numbers are called; a relay sends values and no spikes."""
    return kind.replace("spike", "value") if population == "linear" else kind


def _sums(
    phase: Phase, name: str, kind: str, reading: _Reading, pair: Pair, a: Result, b: Result, samples: Samples
) -> tuple[int, Difference] | None:
    """How many totals differ, and the first of them; None where none does, or one target gives none."""
    values, _, _ = _both(pair, a, b, name, reading)
    if values is None or not len(where := np.argwhere(values[0] != values[1])):
        return None
    return len(where), _located(phase, name, _word(reading.total, kind), values, where[0], samples, False)


def _both(pair: Pair, a: Result, b: Result, name: str, reading: _Reading) -> tuple[tuple[Array, Array] | None, bool, list[str]]:
    """The values of both targets, whether they are by step, and what either lacks."""
    what = "values" if reading.kind == "spike" and name not in a.activity else reading.history or reading.totals
    lacking: list[str] = []
    if reading.history is not None:
        steps = [_of_history(result, name, reading.history) for result in (a, b)]
        if steps[0] is not None and steps[1] is not None:
            return _same_shape(pair, name, steps[0], steps[1]), True, []
        lacking = [
            f"'{target}' gives no {what} of '{name}' by step"
            for target, value in zip((pair.a, pair.b), steps, strict=True)
            if value is None
        ]
    totals = [_filled(getattr(result, reading.totals).get(name)) for result in (a, b)]
    if totals[0] is not None and totals[1] is not None:
        return _same_shape(pair, name, totals[0], totals[1]), False, lacking
    missing = [f"'{target}' gives no {what} of '{name}'" for target, value in zip((pair.a, pair.b), totals, strict=True) if value is None]
    return None, False, missing


def _of_history(result: Result, name: str, member: str) -> Array | None:
    history = result.history.get(name)
    return None if history is None else _filled(getattr(history, member))


def _filled(values: Array | None) -> Array | None:
    """None also where a target gives an empty array for what it does not know."""
    return None if values is None or values.size == 0 else values


def _same_shape(pair: Pair, name: str, a: Array, b: Array) -> tuple[Array, Array]:
    if a.shape != b.shape:
        raise UsageError(
            f"population '{name}' has values of shape {a.shape} on '{pair.a}' and {b.shape} on '{pair.b}': one of the targets returns no valid result"
        )
    return a, b


def _counted(pair: Pair, kind: str, size: int, differences: int) -> Pair:
    if kind == "spike":
        return Pair(pair.a, pair.b, spikes_compared=size, spike_differences=differences)
    if kind == "potential":
        return Pair(pair.a, pair.b, potential_differences=differences)
    return Pair(pair.a, pair.b, saturation_differences=differences)


def _located(phase: Phase, name: str, kind: str, values: tuple[Array, Array], at: Array, samples: Samples, by_step: bool) -> Difference:
    """The difference at `at`: (step, sample, *index), without the step where totals are compared; those part at the phase's end."""
    place = tuple(int(i) for i in at)
    step, (sample, *index) = (place[0] + 1, place[1:]) if by_step else (phase.time_steps, place)
    flat = int(np.ravel_multi_index(tuple(index), values[0].shape[2 if by_step else 1 :]))
    found = (values[0][place].item(), values[1][place].item())
    return Difference(phase.name, name, flat, tuple(index), step, samples.inputs, samples.first + sample, kind, *found)


def _with_currents(graph: Graph, found: Difference, a: Result, b: Result, samples: Samples) -> Difference:
    sample = found.sample - samples.first
    return replace(found, current_a=_current(graph, found, a, sample), current_b=_current(graph, found, b, sample))


def _current(graph: Graph, found: Difference, result: Result, sample: int) -> int | None:
    """What arrived at a neuron in the step of a difference, by what it held before, took and gave away; None where that cannot be told."""
    history = result.history.get(found.population)
    dynamics = graph.phase(found.phase).dynamics[found.population]
    if found.kind not in ("spike", "potential") or history is None or not np.size(history.spikes) or not np.size(history.potentials):
        return None
    held = history.potentials[:, sample].reshape(len(history.potentials), -1)[:, found.neuron].astype(np.int64)
    spike = int(history.spikes[:, sample].reshape(len(history.spikes), -1)[found.step - 1, found.neuron])
    now, before = int(held[found.step - 1]), int(held[found.step - 2]) if found.step > 1 else 0
    if dynamics.members == "graded":
        return now
    return now + int(dynamics.reset) * spike - before if dynamics.leak == 1 else None
