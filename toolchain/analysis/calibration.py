"""What a network does on real inputs: how far its potentials and currents go, for `quantize` to choose units by."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from toolchain import codec, data
from toolchain.analysis.floats import FloatRun
from toolchain.errors import UsageError
from toolchain.ir import Array, Calibration, Drive, Graph, Phase
from toolchain.notation import sample_products
from toolchain.passes import Pipeline
from toolchain.target import Result

if TYPE_CHECKING:
    from torch import Tensor

    from toolchain.targets.torch_ticks import Arithmetic

SAMPLES = 256
"""Training samples that are run, where nobody says how many."""

LEAST_SAMPLES = 8

WORK = 2**39
"""Products that calibration may take: of large networks fewer samples are run, at least `LEAST_SAMPLES`."""

BATCH = 64
"""Samples that advance together."""


def calibrated(
    pipeline: Pipeline, lowered: Graph, name: str, *, samples: int | None = None, data_dir: str | os.PathLike[str] | None = None
) -> Pipeline:
    """`pipeline` with what training samples of data set `name` reach in the graph that its quantize pass will get. UsageError where the set is not here."""
    before = Pipeline(pipeline.passes[: [rewrite.name for rewrite in pipeline.passes].index("quantize")])
    graph = before(lowered)
    return pipeline.with_options(
        quantize={"calibration": calibrate(graph, training_samples(graph, name, samples=samples, data_dir=data_dir))}
    )


def training_samples(
    graph: Graph, name: str, *, samples: int | None = None, data_dir: str | os.PathLike[str] | None = None
) -> data.Dataset:
    """The first `samples` of the training split of data set `name`, in the size and number of frames that `graph` takes; by default `SAMPLES`, fewer
    where the set has no more or the network is large. UsageError where the set is not here."""
    source = graph.of_kind("input")[0]
    steps = graph.phase("forward").time_steps if source.events else None
    whole = data.load(name, split="train", data_dir=data_dir, time_steps=steps, image_size=data.size_for(name, source.shape))
    if samples is None:
        samples = min(len(whole), SAMPLES, max(LEAST_SAMPLES, WORK // sample_products(graph)))
    if not 1 <= samples <= len(whole):
        raise UsageError(
            f"calibration was asked for {samples:,} samples and the training part of '{name}' has {len(whole):,}: ask for 1 to {len(whole):,}"
        )
    return whole.part(0, samples)


def calibrate(graph: Graph, dataset: data.Dataset) -> Calibration:
    """Run the folded float `graph` on all samples of `dataset` (see `training_samples`) and keep how far it goes, in its own units.

    Forward, the potentials of couples and readouts before they fire, what relays pass on, and the currents that the host injects. In the feedback
    phase each sample's error has the direction of its label's cross entropy and the largest size that is carried without clipping, whatever the
    scale factor: errors of any batch then stay inside. Deterministic on one machine.
    """
    seen: dict[str, dict[str, float]] = {
        phase.name: dict.fromkeys((n for n in phase.order if graph.population(n).kind != "input"), 0.0) for phase in graph.phases
    }
    current = {drive.population: 0.0 for drive in graph.phase("forward").drive}

    def watched(phase: Phase, arithmetic: Arithmetic) -> Arithmetic:
        return _Watching(phase, arithmetic, seen[phase.name])

    run = FloatRun(graph, wrap=watched, inject=lambda drive, values: _noted(current, drive, values))
    for start in range(0, len(dataset), BATCH):
        part = dataset.part(start, start + BATCH)
        forward = run.forward(np.asarray(part.images))
        if graph.has_phase("feedback"):
            run.feedback(forward, full_errors(graph, forward, part.labels))
    return Calibration(dataset.name, len(dataset), seen, current)


def full_errors(graph: Graph, forward: Result, labels: Array) -> Array:
    """The errors of `labels`, each sample's scaled to the largest that the feedback phase carries without clipping; a sample without error keeps none."""
    error = codec.output_error(graph, forward, labels)
    largest = np.abs(error).reshape(len(error), -1).max(axis=1).reshape(-1, *[1] * (error.ndim - 1))
    scaled: Array = error * (codec.error_bound(graph) / np.where(largest > 0, largest, 1.0))
    return scaled


def _noted(current: dict[str, float], drive: Drive, values: Array) -> Array:
    if drive.source == "input":  # errors are bounded by `full_errors`
        current[drive.population] = max(current[drive.population], float(np.abs(values).max(initial=0)))
    return values


class _Watching:
    """An arithmetic that also keeps, by population, the largest |potential| before firing (of a relay the largest value)."""

    def __init__(self, phase: Phase, arithmetic: Arithmetic, seen: dict[str, float]) -> None:
        self._phase, self._arithmetic, self._seen = phase, arithmetic, seen
        self.product, self.current, self.emitted = arithmetic.product, arithmetic.current, arithmetic.emitted

    def step(self, population: str, potential: Tensor, current: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        dynamics = self._phase.dynamics[population]
        kept = {"graded": 0.0, "none": dynamics.leak}.get(dynamics.members, 1.0)
        low, high = (potential * kept + current).aminmax()
        self._seen[population] = max(self._seen[population], float(high), -float(low))
        return self._arithmetic.step(population, potential, current)
