"""Points of a sweep over weight bits and time steps: one network compiled at each, run on the same samples, and the front that no other point beats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Protocol, TypeVar

import numpy as np

from toolchain import codec, data
from toolchain.compiler import compiled_as, executable, forward_only, lowered
from toolchain.deploy import Options, classify, configure
from toolchain.errors import DesignRuleError, UsageError
from toolchain.ir import Array, Graph
from toolchain.passes import FLOAT_PIPELINE, Pipeline
from toolchain.progress import track
from toolchain.seen import CHUNK
from toolchain.source import Source
from toolchain.target import Result, Target, get

SEARCHED_ON = "sim"
"""Bit-exact with every other integer target, and the fastest."""


@dataclass(frozen=True)
class Point:
    """One number of weight bits and of time steps, as it did on the held-out samples. `accuracy` is a fraction of 1, `drop` in points against
    the float model; `pareto`: no other point is at least as accurate with fewer synaptic operations."""

    weight_bits: int
    time_steps: int
    accuracy: float
    drop: float
    synaptic_operations_per_sample: float
    spikes_per_sample: float
    saturations: int
    pareto: bool = False

    @property
    def name(self) -> str:
        return f"{self.weight_bits} bits, T {self.time_steps}"


@dataclass(frozen=True)
class Reference:
    """The float model at its own number of time steps, on the same held-out samples."""

    time_steps: int
    accuracy: float
    spikes_per_sample: float
    synaptic_operations_per_sample: float | None


def folded_and_rest(source: Source, input: str | None) -> tuple[Graph, Pipeline]:
    """The folded float graph with its adjoint, and what the search's target does from there on."""
    pipeline = get(SEARCHED_ON).pipeline
    if source.artifact is None:
        base = FLOAT_PIPELINE.until("adjoint")(lowered(source))
    elif input is not None:
        raise UsageError(
            f"'{source.name}' is compiled already, with an input of its own: leave --input out, or tune the model it was made of"
        )
    elif source.artifact.float_graph is None:
        raise UsageError(
            f"'{source.name}' was compiled without its float tensors, which tune starts from: compile it again without --no-float"
        )
    else:
        base = source.artifact.float_graph
    return base, rest_of(pipeline, base, source, input)


def rest_of(pipeline: Pipeline, base: Graph, source: Source, input: str | None) -> Pipeline:
    """The passes of `pipeline` that `base` has not been through, with the input asked for, or all that a .fsnn file was compiled with."""
    rest = replace(pipeline, passes=tuple(p for p in pipeline.passes if p.name not in base.provenance.passes))
    if source.artifact is not None:
        return compiled_as(rest, source.artifact.graph)
    return rest if input is None else rest.with_options(inject={"mode": input})


def cost_of(point: Point) -> tuple[float, float, int, int]:
    """The order of choice: fewest synaptic operations, then the higher accuracy, then fewer bits and steps."""
    return (point.synaptic_operations_per_sample, -point.accuracy, point.weight_bits, point.time_steps)


class Search:
    """Runs points, each once, and remembers them. `watch` sees every graph that runs, with what it gives and the images it is given."""

    def __init__(
        self,
        source: Source,
        base: Graph,
        rest: Pipeline,
        dataset: data.Dataset,
        max_drop: float,
        options: Options,
        watch: Callable[[Graph, Result, Array], None] | None = None,
    ) -> None:
        self.base, self.rest, self.dataset, self.max_drop, self.options = base, rest, dataset, max_drop, options
        self.watch = watch
        self.source = source
        self.target: Target = configure(get(SEARCHED_ON), options)
        self.steps = base.phase("forward").time_steps
        floats = classify(source, get("torch"), "torch", dataset, options)
        self._correct = floats.correct
        self.reference = Reference(floats.time_steps, floats.accuracy, floats.spikes_per_sample, floats.synaptic_operations_per_sample)
        self.refused: list[str] = []
        self._found: dict[tuple[int, int], Point | None] = {}

    def run(self, weight_bits: Sequence[int]) -> None:
        """The coarse grid, then for each number of bits the fewest time steps within the drop."""
        grid = [(bits, steps) for steps in self.coarse() for bits in weight_bits]
        for bits, steps in track(grid, f"tuning {self.source.name}"):
            self.point(bits, steps)
        self.require_points()
        for bits in track(weight_bits, f"tuning {self.source.name}, fewer time steps"):
            self._refine(bits)

    def require_points(self) -> None:
        """DesignRuleError where no point that was run fits the chip."""
        if not self._found or all(point is None for point in self._found.values()):
            raise DesignRuleError(f"'{self.source.name}' fits the chip at no number of weight bits: {self.refused[0]}")

    def coarse(self) -> list[int]:
        """T, T/2, T/4, ... 1, rounded up."""
        if self.base.of_kind("input")[0].events:
            return [self.steps]
        found = [self.steps]
        while found[-1] > 1:
            found.append(ceil(found[-1] / 2))
        return found

    def _refine(self, bits: int) -> None:
        """Halve between the fewest steps within the drop and the most below them that are not, while a point in between could still be the cheapest."""
        run = sorted((p for p in self.points() if p.weight_bits == bits), key=lambda p: p.time_steps)
        within = next((p for p in run if self._within(p)), None)
        beyond = None if within is None else next((p for p in reversed(run) if p.time_steps < within.time_steps), None)
        while within is not None and beyond is not None and within.time_steps - beyond.time_steps > 1:
            best = self.chosen()
            if best is not None and beyond.synaptic_operations_per_sample >= best.synaptic_operations_per_sample:
                return
            middle = self.point(bits, (within.time_steps + beyond.time_steps) // 2)
            if middle is None:
                return
            within, beyond = (middle, beyond) if self._within(middle) else (within, middle)

    def point(self, bits: int, steps: int) -> Point | None:
        """The point at `bits` and `steps`; None where it does not fit the chip."""
        if (bits, steps) not in self._found:
            try:
                self._found[bits, steps] = self._measured(bits, steps)
            except DesignRuleError as error:
                self.refused.append(f"{bits} bits, T {steps}: {error}")
                self._found[bits, steps] = None
        return self._found[bits, steps]

    def _measured(self, bits: int, steps: int) -> Point:
        right, operations, spikes, saturations = self.judged(self._graph(bits, steps), self.dataset)
        return Point(
            weight_bits=bits,
            time_steps=steps,
            accuracy=right / len(self.dataset),
            drop=100 * (self._correct - right) / len(self.dataset),
            synaptic_operations_per_sample=operations / len(self.dataset),
            spikes_per_sample=spikes / len(self.dataset),
            saturations=saturations,
        )

    def _graph(self, bits: int, steps: int) -> Graph:
        return self.rest.with_options(quantize={"weight_bits": bits})(self.base.in_steps({"forward": steps}))

    def compiled(self, point: Point) -> Graph:
        """The integer graph of a point."""
        return self._graph(point.weight_bits, point.time_steps)

    def judged(self, graph: Graph, dataset: data.Dataset) -> tuple[int, float, int, int]:
        """Right answers, synaptic operations, spikes of couples and saturations of `graph`, over all samples."""
        right, operations, spikes, saturations = 0, 0.0, 0, 0
        couples = [population.name for population in graph.of_kind("couple")]
        with executable(self.target, forward_only(graph)) as run:
            for start in range(0, len(dataset), CHUNK):
                part = dataset.part(start, min(start + CHUNK, len(dataset)))
                images = np.asarray(part.images)
                result = run.run(images)
                if self.watch is not None:
                    self.watch(run.graph, result, images)
                right += int((codec.logits(run.graph, result).argmax(axis=1) == part.labels).sum())
                operations += float(codec.synaptic_operations(run.graph, result, inputs=images).sum())
                spikes += sum(int(result.activity[name].sum()) for name in couples)
                saturations += sum(int(counted.sum()) for counted in result.saturations.values())
        return right, operations, spikes, saturations

    def points(self) -> tuple[Point, ...]:
        """All points run, most bits and steps first, those of the Pareto front marked."""
        found = [self._found[key] for key in sorted(self._found, reverse=True)]
        return marked([point for point in found if point is not None])

    def chosen(self) -> Point | None:
        """The cheapest point within the drop."""
        return min((p for p in self.points() if self._within(p)), key=cost_of, default=None)

    def nearest(self) -> Point:
        """The point with the least drop, the cheapest of equals."""
        return min(self.points(), key=lambda p: (p.drop, cost_of(p)))

    def _within(self, point: Point) -> bool:
        return point.drop <= self.max_drop + 1e-9


def marked(points: Iterable[Point]) -> tuple[Point, ...]:
    """The same points, those that no other beats marked."""
    best = front(points := list(points), cost_of)
    return tuple(replace(point, pareto=(point.weight_bits, point.time_steps) in best) for point in points)


class Judged(Protocol):
    """What the front needs to know of a point."""

    @property
    def weight_bits(self) -> int: ...
    @property
    def time_steps(self) -> int: ...
    @property
    def accuracy(self) -> float: ...


J = TypeVar("J", bound=Judged)


def front(points: Iterable[J], cost: Callable[[J], Any]) -> set[tuple[int, int]]:
    """Weight bits and time steps of the points that no other beats: it is cheaper and at least as accurate. Of equal accuracies the first by `cost` counts."""
    highest, found = -1.0, set()
    for point in sorted(points, key=cost):
        if point.accuracy > highest:
            highest = point.accuracy
            found.add((point.weight_bits, point.time_steps))
    return found
