"""Where in the network integers err, and when rates settle, from one run of the float graph and the integer graph side by side."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from toolchain import codec
from toolchain.analysis.lockstep import COPIES, Copy, Kept, Lockstep, alike
from toolchain.analysis.populations import Gaps, Populations
from toolchain.analysis.settling import Residuals, Settling
from toolchain.errors import UsageError
from toolchain.ir import Array, Graph
from toolchain.notation import sample_products
from toolchain.progress import track
from toolchain.target import Result

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SideBySide", "side_by_side"]

SAMPLES = 128
"""Samples that are run where nobody says how many, and the size of the batch that errors are divided by: what the zoo's scale factors are meant for."""

LEAST_SAMPLES = 4

LONGER, LEAST_STEPS = 2, 50
"""Runs go on for this many times the model's time steps, and for so many at least, so that it shows what more would bring; events end with their frames."""

WORK, NEURON_WORK = 2**37, 100
"""Products that all copies may take together, a neuron's step counted as so many: of large networks runs end at the model's own time steps, and then fewer samples are
run, at least `LEAST_SAMPLES`."""

COPIED = len(COPIES)

AT_ONCE = 2**22
"""Neurons, of all samples and copies together, that advance side by side."""


@dataclass(frozen=True)
class SideBySide:
    """`populations` is None without an integer graph to look at."""

    populations: Populations | None
    settling: Settling

    def to_text(self) -> str:
        return "\n\n".join(part.to_text() for part in (self.populations, self.settling) if part is not None)

    def to_json(self) -> dict[str, Any]:
        return {
            "populations": None if self.populations is None else self.populations.to_json(),
            "settling": self.settling.to_json(),
        }


def side_by_side(float_graph: Graph, graph: Graph | None, inputs: Array, labels: Array, *, samples: int = SAMPLES) -> SideBySide:
    """Run folded `float_graph` and the integer `graph` made of it (None: the floats alone) on the first `samples` of `inputs` (samples, *input shape, in
    [0, 1]) with `labels` (samples,), both phases where there are two. UsageError where samples and labels do not fit."""
    values, labels = codec.check_inputs(float_graph, inputs), np.asarray(labels)
    if labels.shape != (len(values),):
        raise UsageError(f"{len(values)} samples came with labels of shape {labels.shape}: give one label a sample")
    floats = float_graph if graph is None else alike(float_graph, graph)
    samples, horizon = _size(floats, min(samples, len(values)))
    run = Lockstep(floats, graph, dtype="float64")
    phases: list[str] = [phase.name for phase in floats.phases]
    gaps = {name: Gaps(run, name) for name in phases} if graph is not None else {}
    residuals = {name: Residuals(run, name, horizon[name]) for name in phases}
    at_once = max(1, AT_ONCE // (len(run.copies) * sum(prod(p.shape) for p in floats.populations)))
    starts = range(0, samples, at_once)
    for start in track(starts, f"{floats.provenance.model} side by side", total=len(starts)):
        part = slice(start, min(start + at_once, samples))
        _advance(run, values[part], labels[part], horizon, gaps, residuals)
    rows = tuple(row for name in phases if name in gaps for row in gaps[name].rows())
    steps: dict[str, int] = {phase.name: phase.time_steps for phase in floats.phases}
    populations = Populations(rows, samples, steps) if graph is not None else None
    return SideBySide(populations, Settling(tuple(c for name in phases for c in residuals[name].curves()), samples))


def _advance(
    run: Lockstep, values: Array, labels: Array, horizon: dict[str, int], gaps: dict[str, Gaps], residuals: dict[str, Residuals]
) -> None:
    """Both phases of one chunk."""
    kept = Kept(run, "forward")
    residuals["forward"].begin_forward(values, labels)
    run.forward(values, _Watching(kept, gaps.get("forward"), residuals["forward"]), horizon["forward"])
    if "forward" in gaps:
        gaps["forward"].add(kept)
    if "feedback" not in residuals:
        return
    owners: list[Copy] = [copy for copy in run.copies if copy != "single"]
    results = {copy: kept.result(copy) for copy in owners}
    errors = {copy: error(run.graph(copy), results[copy], labels) for copy in owners}
    kept = Kept(run, "feedback")
    residuals["feedback"].begin_feedback(results, errors)
    run.feedback(results, errors, _Watching(kept, gaps.get("feedback"), residuals["feedback"]), horizon["feedback"])
    if "feedback" in gaps:
        gaps["feedback"].add(kept)


def error(graph: Graph, forward: Result, labels: Array) -> Array:
    """The error of each sample, of the loss times the model's own scale factor, in a batch of `SAMPLES`: alone it would clip."""
    made: Array = codec.output_error(graph, forward, labels) * (len(labels) / SAMPLES)
    return made


class _Watching:
    """Several that look on as one."""

    def __init__(self, *watching: Kept | Gaps | Residuals | None) -> None:
        self._watching = [watch for watch in watching if watch is not None]

    def __call__(self, copy: Copy, name: str, potential: Tensor, emitted: Tensor) -> None:
        for watch in self._watching:
            watch.watch(copy, name, potential, emitted)


def _size(graph: Graph, samples: int) -> tuple[int, dict[str, int]]:
    """How many samples, and how many time steps of each phase: longer than the model's own where the work allows it for all samples."""
    own: dict[str, int] = {phase.name: phase.time_steps for phase in graph.phases}
    longer = {name: max(LONGER * steps, LEAST_STEPS) for name, steps in own.items()}
    if any(population.events for population in graph.of_kind("input")):
        longer["forward"] = own["forward"]
    if COPIED * samples * _work(graph, longer) <= WORK:
        return samples, longer
    return min(samples, max(LEAST_SAMPLES, WORK // (COPIED * _work(graph, own)))), own


def _work(graph: Graph, steps: dict[str, int]) -> int:
    """What one sample takes in so many time steps."""
    short = graph.in_steps(steps)
    return sample_products(short) + NEURON_WORK * sum(
        phase.time_steps * sum(prod(graph.population(name).shape) for name in phase.order) for phase in short.phases
    )
