"""Runs the accuracy budget: the same images through every state between the float equilibrium and the chip, some at a time, and what each switch does to the answers.

The states, cumulatively: the float graph in many steps (its equilibrium), in the target's own number, then with the switches of `factors.SWITCHES` one on top of the other.
Each switch is also run alone, in the target's number of steps. States that a switch cannot change (nothing is cut, nothing passes 24 bit) are not run again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from toolchain import codec, fixed
from toolchain.analysis.advice import Advice, advice, nothing
from toolchain.analysis.drops import AccuracyBudget, Baseline, Change, Closing, Factor, largest
from toolchain.analysis.factors import MEANINGS, STEPS, SWITCHES, Switchboard, differences
from toolchain.analysis.intervals import paired_interval
from toolchain.ir import Array, Graph
from toolchain.notation import step_products
from toolchain.progress import track
from toolchain.target import Result, get

if TYPE_CHECKING:
    from torch import Tensor

EQUILIBRIUM_STEPS = 256
"""In so many steps the float graph counts as settled, or in `LONGER` times the target's where that is more: rates are then known to 1/256."""

LONGER = 4

WORK = 10**11
"""Products that a budget may take where nobody says how many images, in float64: about 15 seconds on one core."""

LEAST_SAMPLES = 8

RUNS = 9
"""States in the target's number of steps that are counted on for `WORK`."""

AT_ONCE = 2**22
"""Neurons times steps whose spikes and potentials are compared at once."""

STILL_LOST = 0.1
"""Of what too few time steps cost, what the number that is suggested may still cost."""


@dataclass(frozen=True)
class Answers:
    """What a run says: logits (samples, classes), and rates of couples by population, (samples, neurons)."""

    logits: npt.NDArray[np.float64]
    rates: Mapping[str, npt.NDArray[np.floating[Any]]]

    def part(self, rows: slice) -> Answers:
        return Answers(self.logits[rows], {name: rates[rows] for name, rates in self.rates.items()})


@dataclass(frozen=True)
class Settled:
    """The float graph in many steps: its `answers`, how many were `right` after each step, and how far rates still moved in the second half of the steps (the mean
    over neurons and images of the population that moved most)."""

    answers: Answers
    right: npt.NDArray[np.int64]
    residual: float

    def enough(self, time_steps: int) -> int | None:
        """The fewest steps, more than `time_steps`, in which the float graph loses no more than `STILL_LOST` of what these lose; None where more do not help."""
        lost = int(self.right[-1] - self.right[time_steps - 1])
        if lost <= 0:
            return None
        good = np.flatnonzero(self.right >= self.right[-1] - STILL_LOST * lost) + 1
        return int(good[good > time_steps].min())


def default_samples(graph: Graph, samples: int) -> int:
    """How many of `samples` images a budget runs where nobody says: what `WORK` allows, at least `LEAST_SAMPLES`."""
    forward = graph.phase("forward")
    steps = RUNS * forward.time_steps + (0 if graph.of_kind("input")[0].events else settling_steps(graph))
    return min(samples, max(LEAST_SAMPLES, WORK // max(1, steps * step_products(graph, forward))))


def settling_steps(graph: Graph) -> int:
    """Steps in which the float graph counts as settled."""
    return max(EQUILIBRIUM_STEPS, LONGER * graph.phase("forward").time_steps)


def accuracy_budget(
    floats: Graph,
    integers: Graph,
    images: Array,
    labels: Array,
    *,
    target: str = "sim",
    dataset: str = "these images",
    first: tuple[str, Answers] | None = None,
    logits: Mapping[str, Array] | None = None,
    settled: Settled | None = None,
) -> AccuracyBudget:
    """Where the accuracy of `integers`, made of the folded `floats`, goes on `images` (samples, *input shape) with `labels`.

    `first` names the torch row and holds its answers to the same images; `logits` are those of every target that runs the integer graph, by name, which are held against the
    last state. `dataset` is what a suggestion calibrates on. `settled` is the float graph's equilibrium on the same images where somebody has it already (`settle`).
    GraphError where the graphs are given the wrong way round.
    """
    board = Switchboard(_forward_only(floats), _forward_only(integers))
    values = codec.check_inputs(integers, images)
    phase = integers.phase("forward")
    if settled is None and not integers.of_kind("input")[0].events:
        settled = _settled(board, values, np.asarray(labels))
    run = _Run(board)
    for rows in track(_pieces(integers, len(values), phase.time_steps), f"budget of {integers.provenance.model}"):
        theirs = None if first is None else first[1].part(rows)
        run.see(values[rows], np.asarray(labels)[rows], None if settled is None else settled.answers.part(rows), theirs)
    rows_found = [row for row in map(run.row, (STEPS, *SWITCHES)) if not (row.cumulative.nothing and row.alone.nothing)]
    total = run.total.change()
    worst, cause = _worst(total, rows_found)
    last = np.concatenate(run.last)
    return AccuracyBudget(
        target=target,
        dataset=dataset,
        samples=len(values),
        time_steps=phase.time_steps,
        baseline=Baseline(run.total.before, phase.time_steps, None)
        if settled is None
        else Baseline(run.total.before, len(settled.right), settled.residual),
        rows=tuple(rows_found),
        none=tuple(name for name in (STEPS, *SWITCHES) if name not in {row.name for row in rows_found}),
        total=total,
        first=None if first is None else first[0],
        arithmetic=None if first is None else run.arithmetic.change(),
        closing=Closing(
            run.compared, run.differing, {name: int((last != other[: len(last)]).sum()) for name, other in (logits or {}).items()}
        ),
        worst_population=worst,
        worst_cause=cause,
        advice=_advice(rows_found, integers, settled, dataset, run.saturations),
    )


def settle(floats: Graph, integers: Graph, images: Array, labels: Array) -> Settled:
    """The equilibrium that budgets of `floats` start from, for several integer graphs of it: any one of them gives the units to run in."""
    board = Switchboard(_forward_only(floats), _forward_only(integers))
    return _settled(board, codec.check_inputs(integers, images), np.asarray(labels))


def _settled(board: Switchboard, values: Array, labels: Array) -> Settled:
    watched = _Settling(board)
    pieces = _pieces(board.integers, len(values), board.integers.phase("forward").time_steps)
    found = [watched.run(values[rows], labels[rows]) for rows in track(pieces, f"equilibrium of {board.integers.provenance.model}")]
    rates = {name: np.concatenate([part.rates[name] for part in found]) for name in found[0].rates}
    answers = Answers(np.concatenate([part.logits for part in found]), rates)
    return Settled(answers, watched.right, max(watched.moved.values()) / len(values))


def _pieces(graph: Graph, samples: int, time_steps: int) -> list[slice]:
    """Which samples run together."""
    neurons = sum(prod(population.shape) for population in graph.populations)
    at_once = max(1, AT_ONCE // (neurons * time_steps))
    return [slice(start, start + at_once) for start in range(0, samples, at_once)]


def _forward_only(graph: Graph) -> Graph:
    return msgspec.structs.replace(graph, phases=(graph.phase("forward"),))


def _worst(total: Change, rows: Sequence[Factor]) -> tuple[str | None, str | None]:
    """The population whose rates end up farthest from the baseline's, and the factor that moves them most."""
    name = max(total.rate_difference, key=lambda name: total.rate_difference[name], default=None)
    if name is None or total.rate_difference[name] == 0:
        return None, None
    return name, max(rows, key=lambda row: row.cumulative.rate_difference.get(name, 0.0)).name


def _advice(rows: Sequence[Factor], integers: Graph, settled: Settled | None, dataset: str, saturations: Mapping[str, int]) -> Advice:
    worst = largest(rows)
    if worst is None:
        return nothing("nothing, every answer, rate and logit is the float model's")
    if worst.cumulative.drop <= 0:
        most = max(rows, key=lambda row: row.cumulative.changed)
        answers = f"{most.name} changes most answers: {most.cumulative.changed:,}" if most.cumulative.changed else "none changes an answer"
        return nothing(f"nothing, no factor costs accuracy on these images ({answers})")
    enough = None if settled is None else settled.enough(integers.phase("forward").time_steps)
    found = advice(worst.name, integers, enough=enough, dataset=dataset, saturations=saturations)
    if worst.cumulative.low > 0:
        return found
    return replace(found, sentence=f"more images first, since on these {worst.name} costs no more than chance may ({found.sentence})")


class _Tally:
    """What one switch did, summed over pieces of the images."""

    def __init__(self) -> None:
        self.right: list[npt.NDArray[np.int8]] = []
        self.changed = 0
        self.rates: dict[str, float] = {}
        self.seen: dict[str, int] = {}
        self.logits = self.margins = 0.0

    def see(self, before: Answers, after: Answers, labels: Array) -> None:
        a, b = before.logits.argmax(axis=1), after.logits.argmax(axis=1)
        self.right.append(np.stack([a == labels, b == labels]).astype(np.int8))
        self.changed += int((a != b).sum())
        for name, rates in before.rates.items():
            other = after.rates.get(name)
            if other is not None and len(other):
                both = min(len(rates), len(other))
                self.rates[name] = self.rates.get(name, 0.0) + float(np.abs(rates[:both] - other[:both]).sum())
                self.seen[name] = self.seen.get(name, 0) + other[:both].size
        self.logits += float(np.abs(before.logits - after.logits).mean(axis=1).sum())
        self.margins += float(_margins(before.logits).sum())

    @property
    def accuracy(self) -> float:
        """Behind the switch."""
        return float(np.concatenate(self.right, axis=1)[1].mean())

    @property
    def before(self) -> float:
        return float(np.concatenate(self.right, axis=1)[0].mean())

    def change(self) -> Change:
        before, after = np.concatenate(self.right, axis=1)
        to_wrong, to_right = int((before > after).sum()), int((before < after).sum())
        low, high = paired_interval(to_wrong, to_right, len(before))
        return Change(
            drop=(to_wrong - to_right) / len(before),
            low=low,
            high=high,
            to_wrong=to_wrong,
            to_right=to_right,
            changed=self.changed,
            rate_difference={name: total / max(1, self.seen[name]) for name, total in self.rates.items()},
            logit_difference=self.logits / self.margins if self.margins else 0.0,
        )


class _Run:
    """All states of a piece of the images, and the tallies between them."""

    def __init__(self, board: Switchboard) -> None:
        self._board = board
        self._cumulative = {name: _Tally() for name in (STEPS, *SWITCHES)}
        self._alone = {name: _Tally() for name in (STEPS, *SWITCHES)}
        self.total, self.arithmetic = _Tally(), _Tally()
        self.last: list[npt.NDArray[np.float64]] = []
        self.compared = self.differing = 0
        self.saturations: dict[str, int] = {}

    def see(self, values: Array, labels: Array, settled: Answers | None, first: Answers | None) -> None:
        """Run a piece of the images through every state but the equilibrium; `first` is what the torch row says of it."""
        states = _States(self._board, values)
        self._close(states, values)
        own = states.answers(())
        start = own if settled is None else settled
        self._cumulative[STEPS].see(start, own, labels)
        self._alone[STEPS].see(start, own, labels)
        if first is not None:
            self.arithmetic.see(own, first, labels)
        before = own
        for i, switch in enumerate(SWITCHES):
            after = states.answers(SWITCHES[: i + 1])
            self._cumulative[switch].see(before, after, labels)
            self._alone[switch].see(own, states.answers((switch,)), labels)
            before = after
        self.total.see(start, before, labels)
        self.last.append(before.logits)

    def row(self, name: str) -> Factor:
        meaning = f"T {self._board.integers.phase('forward').time_steps} instead of many" if name == STEPS else MEANINGS[name]
        tally = self._cumulative[name]
        return Factor(name, meaning, tally.accuracy, tally.change(), self._alone[name].change())

    def _close(self, states: _States, values: Array) -> None:
        """Hold every spike and potential of the run with every switch on against the integer graph's."""
        sim = replace(get("sim"), device="cpu", trace=True)  # type: ignore[type-var]  # a target is a dataclass
        with sim.compile(self._board.integers) as run:
            whole = run.run(values)
        differing, compared = differences(states.closing(), whole)
        self.differing += differing
        self.compared += compared
        for name, held in whole.saturations.items():
            self.saturations[name] = self.saturations.get(name, 0) + int(held.sum())


class _States:
    """The states of one piece of the images, each run once. A switch without effect on these images is left off: nothing to cut, nothing to hold."""

    def __init__(self, board: Switchboard, values: Array) -> None:
        self._board, self._values = board, values
        self._found: dict[frozenset[str], tuple[Answers, bool]] = {}

    def closing(self) -> Result:
        """Everything that happens with every switch on."""
        on = self._acting(SWITCHES)
        result = self._run(on, trace=True)
        return self._run(on | {"saturation"}, trace=True) if self._found[on][1] else result

    def answers(self, on: Collection[str]) -> Answers:
        acting = self._acting(on)
        if acting not in self._found:
            self._run(acting)
        answers, passed = self._found[acting]
        if "saturation" not in on or not passed:
            return answers
        acting |= {"saturation"}
        if acting not in self._found:
            self._run(acting)
        return self._found[acting][0]

    def _acting(self, on: Collection[str]) -> frozenset[str]:
        """The switches of `on` that can change something here, but for saturation, which only a run tells."""
        board = self._board
        acting = {switch for switch in on if switch in board.static or switch == "input"}
        if "clipping" in on:
            encoded = board.encoded(on, self._values)
            if any(board.injected(drive, on, encoded)[1] for drive in board.integers.phase("forward").drive):
                acting.add("clipping")
        return frozenset(acting)

    def _run(self, on: frozenset[str], *, trace: bool = False) -> Result:
        result = self._board.forward(on, self._values, trace=trace)
        passed = any(bool(held.any()) for held in result.saturations.values())
        self._found[on] = _answers(self._board.graph(on), result), passed
        return result


class _Settling:
    """Watches the float graph in many steps, a piece of the images at a time."""

    def __init__(self, board: Switchboard) -> None:
        self._board, self.steps = board, settling_steps(board.integers)
        self._graph = board.graph(()).in_steps({"forward": self.steps})
        self._readout = self._graph.of_kind("readout")[0].name
        self._couples = [population.name for population in self._graph.of_kind("couple")]
        self.right = np.zeros(self.steps, np.int64)
        self.moved = dict.fromkeys(self._couples, 0.0)

    def run(self, values: Array, labels: Array) -> Answers:
        phase, done = self._graph.phase("forward"), dict.fromkeys((self._readout, *self._couples), 0)
        traces: dict[str, Tensor] = {}
        halfway: dict[str, npt.NDArray[np.float64]] = {}
        half = self.steps // 2

        def watch(name: str, spikes: Tensor, potential: Tensor) -> None:
            if name not in done:
                return
            done[name] += 1
            leak = phase.dynamics[name].leak
            if name == self._readout:
                scores = potential.numpy() / (fixed.leak_sum(leak, done[name]) * self._graph.scale("forward", name))
                for bias in phase.bias.get(name, ()):
                    scores = scores + self._graph.tensors[bias.tensor]
                self.right[done[name] - 1] += int((scores.argmax(axis=1) == labels).sum())
            elif done[name] <= half:
                traces[name] = spikes.clone() if name not in traces else traces[name] * leak + spikes
                if done[name] == half:
                    halfway[name] = traces[name].numpy() / fixed.leak_sum(leak, half)

        found = _answers(self._graph, self._board.forward((), values, time_steps=self.steps, watch=watch))
        for name in self._couples:
            self.moved[name] += float(np.abs(found.rates[name].reshape(len(values), -1) - halfway[name]).mean(axis=1).sum())
        return Answers(found.logits, {name: rates.astype(np.float32) for name, rates in found.rates.items()})


def _answers(graph: Graph, result: Result) -> Answers:
    """What a run of `graph` says; the graph may have other numbers of steps than the run."""
    timed = graph.in_steps({"forward": result.time_steps})
    rates = {population.name: codec.rates(timed, result, population.name) for population in graph.of_kind("couple")}
    return Answers(codec.logits(timed, result), rates)


def _margins(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """By image, the largest logit less the second largest."""
    if logits.shape[1] < 2:
        return np.asarray(np.abs(logits[:, 0]))
    ordered = np.sort(logits, axis=1)
    margins: npt.NDArray[np.float64] = ordered[:, -1] - ordered[:, -2]
    return margins
