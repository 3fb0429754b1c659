"""Where in the network the integers err: by population, the error that is made there beside the error that shows there.

`entire` is the integer graph against the float graph on the same samples, errors of all populations before and round all loops included. `single` is one
population by itself in the integer graph's arithmetic, fed with what the float graph's populations sent at every step (`analysis.lockstep`): the error
made in it. In the feedback phase the integer graph has its own masks and its own error from its own logits in `entire`, the float graph's in `single`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from toolchain import codec
from toolchain.analysis.lockstep import Copy, Kept, Lockstep
from toolchain.ir import Array, Graph
from toolchain.notation import table
from toolchain.target import Result

if TYPE_CHECKING:
    from torch import Tensor

WORST = 5
"""Neurons of a population that are named."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Neuron:
    """A neuron by its place in the population, and its mean |difference| over samples."""

    place: tuple[int, ...]
    difference: float

    @property
    def shown(self) -> str:
        return f"[{','.join(map(str, self.place))}] {self.difference:.2g}"


@dataclass(frozen=True)
class Gap:
    """How far a population is from the float graph's.

    difference  mean |rate difference| over samples and neurons; of a relay of its mean values in the model's unit, of a readout of its logits
    relative    the same over the float graph's mean |rate|
    off         share of couples (over samples) whose spike count is off by more than one; None for relays and readouts, which do not spike
    potential   mean |difference| of a couple's potentials over all steps, in thresholds, counted as one threshold at most (far below it nothing is decided); of relays and
                readouts the root mean square difference over that of the float graph's own
    worst       the neurons with the largest differences, the largest first
    """

    difference: float
    relative: float
    off: float | None
    potential: float
    worst: tuple[Neuron, ...]

    def to_json(self) -> dict[str, Any]:
        worst = [{"neuron": list(n.place), "difference": n.difference} for n in self.worst]
        return {
            "difference": self.difference,
            "relative": self.relative,
            "off_by_more_than_one_spike": self.off,
            "potential": self.potential,
            "worst_neurons": worst,
        }


@dataclass(frozen=True)
class PopulationError:
    """One population in one phase; `mean` is the float graph's mean |rate| (of a relay |value|, of the readout |logit|)."""

    phase: str
    population: str
    kind: str
    mean: float
    entire: Gap
    single: Gap

    def to_json(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "population": self.population,
            "kind": self.kind,
            "mean": self.mean,
            "entire": self.entire.to_json(),
            "single": self.single.to_json(),
        }


@dataclass(frozen=True)
class Populations:
    """Every population that adds something up, phase after phase, on the first `samples` samples."""

    rows: tuple[PopulationError, ...]
    samples: int
    time_steps: dict[str, int]

    def made(self, phase: str = "forward") -> PopulationError | None:
        """Where the error is made: the population with the largest relative `single` error; None where none errs."""
        return self._worst(phase, single=True)

    def shows(self, phase: str = "forward") -> PopulationError | None:
        """Where it shows: the population with the largest relative `entire` error; None where none errs."""
        return self._worst(phase, single=False)

    def _worst(self, phase: str, *, single: bool) -> PopulationError | None:
        def size(row: PopulationError) -> float:
            return (row.single if single else row.entire).relative

        found = [row for row in self.rows if row.phase == phase and size(row) > 0]
        return max(found, key=size, default=None)

    def sentence(self, phase: str = "forward") -> str:
        """Where integers err most in a phase. How far rates are from the equilibrium, which time steps also move, is the accuracy budget's to say."""
        return f"integers err most in {self.worst(phase)}" if self.made(phase) is not None else self.worst(phase)

    def worst(self, phase: str = "forward") -> str:
        """The population in which integers err most by themselves, and the one in which that shows, in words."""
        made, shows = self.made(phase), self.shows(phase)
        if made is None and shows is None:
            return f"no population errs in the {phase} phase: integers and floats agree on {self.samples:,} samples"
        made_in = "no population errs by itself" if made is None else f"'{made.population}' (single error {_both(made, made.single)})"
        if shows is None:
            return f"{made_in}; no error shows"
        if made is not None and shows.population == made.population:
            return f"{made_in}, where the error also shows most (entire {_both(shows, shows.entire)})"
        return f"{made_in}; the error shows most in '{shows.population}' (entire {_both(shows, shows.entire)})"

    def to_text(self) -> str:
        steps = ", ".join(f"{name} {count} time steps" for name, count in self.time_steps.items())
        title = f"error by population against the float graph (relays: of values; readout: of logits), {self.samples:,} samples, {steps}"
        head = ["phase", "population", "mean |rate|", "single", "%", "off", "potential", "entire", "%", "off", "potential"]
        cells = [[r.phase, r.population, f"{r.mean:.3g}", *_cells(r.single), *_cells(r.entire)] for r in self.rows]
        names = {r.phase: None for r in self.rows}
        return "\n".join([title, *table(head, cells, left=2), *(f"{name}: {self.sentence(name)}" for name in names)])

    def to_json(self) -> dict[str, Any]:
        phases = {row.phase: None for row in self.rows}
        worst = {
            name: {"single": None if made is None else made.population, "entire": None if shows is None else shows.population}
            for name, made, shows in ((name, self.made(name), self.shows(name)) for name in phases)
        }
        return {
            "samples": self.samples,
            "time_steps": self.time_steps,
            "worst": worst,
            "populations": [row.to_json() for row in self.rows],
        }


def _both(row: PopulationError, gap: Gap) -> str:
    unit = {"readout": " of logits", "linear": " of values"}.get(row.kind, " of rates")
    return f"{gap.difference:.2g}{unit}, {100 * gap.relative:.1f} %"


def _cells(gap: Gap) -> list[str]:
    off = "-" if gap.off is None else f"{100 * gap.off:.2f} %"
    return [f"{gap.difference:.2g}", f"{100 * gap.relative:.2f}", off, f"{100 * gap.potential:.2f} %"]


@dataclass
class _Sums:
    """What is added up of one population, chunk after chunk: by neuron, and of its potentials over all steps."""

    apart: Floats
    far: Floats
    potentials: float = 0.0


@dataclass
class _Row:
    mean: float = 0.0
    squares: float = 0.0
    copies: dict[Copy, _Sums] = field(default_factory=dict)


class Gaps:
    """Adds up the errors of one phase while the copies run, chunk of samples after chunk."""

    def __init__(self, run: Lockstep, phase: str) -> None:
        self._run, self._phase = run, run.floats.phase(phase)
        self._samples = 0
        self._rows: dict[str, _Row] = {}
        for name in self._phase.order:
            if run.floats.population(name).kind != "input":
                size = prod(run.floats.population(name).shape)
                self._rows[name] = _Row(copies={c: _Sums(np.zeros(size), np.zeros(size)) for c in run.copies if c != "float"})
        self._last: dict[str, Tensor] = {}
        self._made: dict[tuple[Copy, str], int] = {}

    def watch(self, copy: Copy, name: str, potential: Tensor, emitted: Tensor) -> None:
        """A step of one copy: of relays potentials are what they pass on."""
        import torch

        key = (copy, name)
        self._made[key] = self._made.get(key, 0) + 1
        if self._made[key] > self._phase.time_steps:
            return
        if copy == "float":
            self._last[name] = potential.to(torch.float64)
            self._rows[name].squares += float(self._last[name].square().sum())
        else:
            steps = self._run.graph(copy).scale(self._phase.name, name) / self._run.floats.scale(self._phase.name, name)
            apart = potential.to(torch.float64) / steps - self._last[name]
            couple = self._run.floats.population(name).kind == "couple"
            threshold = float(self._phase.dynamics[name].threshold)
            measured = apart.abs().div(threshold).clamp(max=1) if couple else apart.square()
            self._rows[name].copies[copy].potentials += float(measured.sum())

    def add(self, kept: Kept) -> None:
        """A chunk is done: `kept` has what each copy left behind."""
        self._made.clear()
        results = {copy: kept.result(copy) for copy in self._run.copies}
        self._samples += len(next(iter(results["float"].counts.values())))
        for name, row in self._rows.items():
            own = rates(self._run.floats, results["float"], name)
            row.mean += float(np.abs(own).sum())
            for copy, sums in row.copies.items():
                theirs = rates(self._run.graph(copy), results[copy], name)
                sums.apart += np.abs(theirs - own).reshape(len(own), -1).sum(axis=0)
                off = np.abs(results[copy].counts[name] - results["float"].counts[name]) > 1
                sums.far += off.reshape(len(own), -1).sum(axis=0)

    def rows(self) -> tuple[PopulationError, ...]:
        return tuple(self._row(name, row) for name, row in self._rows.items())

    def _row(self, name: str, row: _Row) -> PopulationError:
        population = self._run.floats.population(name)
        mean = row.mean / (self._samples * prod(population.shape))
        gaps: Mapping[Copy, Gap] = {copy: self._gap(name, row, mean, sums) for copy, sums in row.copies.items()}
        return PopulationError(self._phase.name, name, population.kind, mean, gaps["entire"], gaps["single"])

    def _potential(self, name: str, row: _Row, sums: _Sums) -> float:
        if self._run.floats.population(name).kind != "couple":
            return sqrt(_over(sums.potentials, row.squares))
        return sums.potentials / (self._samples * self._phase.time_steps * len(sums.apart))

    def _gap(self, name: str, row: _Row, mean: float, sums: _Sums) -> Gap:
        population = self._run.floats.population(name)
        apart = sums.apart / self._samples
        order = np.argsort(-apart, kind="stable")[:WORST]
        return Gap(
            difference=float(apart.mean()),
            relative=_over(float(apart.mean()), mean),
            off=float(sums.far.mean()) / self._samples if population.kind == "couple" else None,
            potential=self._potential(name, row, sums),
            worst=tuple(Neuron(_place(int(i), population.shape), float(apart[i])) for i in order if apart[i] > 0),
        )


def rates(graph: Graph, result: Result, name: str) -> Array:
    """Rates of a population; of a relay its mean values in the model's unit, of the readout logits."""
    kind = graph.population(name).kind
    if kind == "readout":
        return codec.logits(graph, result)
    found = codec.rates(graph, result, name)
    return found / graph.scale(result.phase, name) if kind == "linear" else found


def _over(part: float, whole: float) -> float:
    """part / whole; 0 / 0 is 0, and what comes of nothing is 1."""
    return part / whole if whole > 0 else float(part > 0)


def _place(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(index, shape))
