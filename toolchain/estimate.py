"""What a network costs: operations by NeuroBench's definitions, SPIDE's theoretical energy, SANA-FE's simulated energy and time, and ticks on a chip."""

from __future__ import annotations

import os
import time
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from toolchain import checkpoint, codec, data, models
from toolchain.analysis.prices import inference, prices, training
from toolchain.analysis.workload import PhaseCounts, Tally, connection_sparsity, footprint
from toolchain.compiler import executable, forward_only, graph_for, uncompiled
from toolchain.deploy import Options, configure, device_of, sample_shape
from toolchain.errors import ToolchainError, UsageError
from toolchain.estimation import COUNTED_ON, Charged, Estimate
from toolchain.ir import Graph
from toolchain.progress import track
from toolchain.seen import CHUNK
from toolchain.source import Model, Source
from toolchain.sweep import folded_and_rest
from toolchain.target import Target, get
from toolchain.versions import versions

if TYPE_CHECKING:
    from toolchain.targets.sanafe.charges import Charges

HISTORY_BYTES = 2**28
"""Spikes and potentials of every step that are kept at a time, for both phases."""

USUAL_BATCH = 128
"""Samples of one update where nothing says how a model was trained: the papers' number."""

CHIP = "sanafe"
CHIP_SAMPLES = 10
"""Samples that SANA-FE runs: it takes them one after another."""


def estimate(
    model: Model,
    *,
    dataset: str = "mnist-1k",
    samples: int | None = None,
    batch: int | None = None,
    chip_samples: int = CHIP_SAMPLES,
    mac_pj: float | None = None,
    ac_pj: float | None = None,
    device: str = "auto",
    data_dir: str | Path | None = None,
) -> Estimate:
    """What `model` costs on the first `samples` test samples of `dataset` (all by default), both phases where it has them, run on `sim`.

    The feedback phase is driven by the mean cross entropy of batches of `batch` samples, by default as many as the model was trained with: its spikes depend on it.
    `mac_pj` and `ac_pj` are the prices of a product and of an addition in picojoules (4.6 and 0.9 by default). SANA-FE runs the first
    `chip_samples` of the samples, where it is installed and the network fits; 0 leaves it out. A network of the catalogue without trained weights gets random ones, and
    a note says so. Raises UsageError for a bad option, a missing data set, or one of other samples than the model takes.
    """
    cost = prices(mac_pj, ac_pj)
    for name, value, least in (("batch", batch, 1), ("chip_samples", chip_samples, 0)):
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}: give a whole number from {least}")
    source, notes = uncompiled(model)
    target = configure(get(COUNTED_ON), Options(device=device, trace=True))
    graph = graph_for(source, target)
    loaded = load_for(source, graph, dataset, samples, data_dir)
    size = (batch or trained_batch(model, source, graph)) if graph.has_phase("feedback") else None
    began = time.perf_counter()
    correct, clipped, counts = _run(target, graph, loaded, size)
    seconds = time.perf_counter() - began
    ticks, left_out = _ticks(source, graph)
    forward, feedback = counts["forward"], counts.get("feedback")
    if feedback is None:
        left_out = (*left_out, f"'{source.name}' has no feedback phase, so training is not estimated")
    if clipped:
        left_out = (*left_out, f"{clipped:,} error currents were cut at the chip's 13 bits: give a larger --batch")
    return Estimate(
        model=source.name,
        dataset=loaded.name,
        samples=len(loaded),
        accuracy=correct / len(loaded),
        time_steps=forward.time_steps,
        feedback_steps=None if feedback is None else feedback.time_steps,
        timing=graph.phase("forward").timing.mode,
        input="bias" if any(drive.source == "input" for drive in graph.phase("forward").drive) else "graded",
        batch=size,
        footprint=footprint(graph),
        connection_sparsity=connection_sparsity(graph),
        forward=forward,
        feedback=feedback,
        prices=cost,
        inference=inference(forward, cost),
        training=None if feedback is None else training(forward, feedback, cost),
        ticks=ticks,
        charged=charge(source, loaded, chip_samples, size),
        notes=(*notes, *left_out),
        device=device_of(target, Options(device=device)),
        seconds=seconds,
        versions=versions(),
    )


def load_for(source: Source, graph: Graph, dataset: str, samples: int | None, data_dir: str | os.PathLike[str] | None) -> data.Dataset:
    """Test samples in the model's size and frames; UsageError where they are others than the model's."""
    time_steps, size = sample_shape(source, dataset)
    loaded = data.load(dataset, samples=samples, data_dir=data_dir, time_steps=time_steps, image_size=size)
    classes = prod(graph.of_kind("readout")[0].shape)
    codec.check_inputs(graph, np.asarray(loaded.images[:1]))
    if int(loaded.labels.max()) >= classes:
        raise UsageError(f"'{source.name}' tells {classes} classes apart and '{dataset}' has more: give the data set it was made for")
    return loaded


def trained_batch(model: Model, source: Source, graph: Graph) -> int:
    """Samples of one update in training: of a run or checkpoint its own, of the catalogue's networks theirs, else the papers' 128."""
    if isinstance(model, (str, os.PathLike)) and source.module is not None and str(model) not in models.names():
        path = Path(model)
        return checkpoint.read(path / checkpoint.NAME if path.is_dir() else path).about.config.train.batch
    name = graph.provenance.model
    return models.get(name).training.batch if name in models.names() else USUAL_BATCH


def _run(target: Target, graph: Graph, dataset: data.Dataset, batch: int | None) -> tuple[int, int, dict[str, PhaseCounts]]:
    """Right answers, error currents that were cut, and what both phases counted; `batch` is None where there is no feedback phase."""
    tallies = {phase.name: Tally(graph, phase.name) for phase in graph.phases}
    size = max(1, min(CHUNK, HISTORY_BYTES // _history_bytes(graph)))
    correct = clipped = 0
    starts = range(0, len(dataset), size)
    with executable(target, graph) as run:
        for first in track(starts, f"estimating {graph.provenance.model}", total=len(starts)):
            part = dataset.part(first, min(first + size, len(dataset)))
            images = np.asarray(part.images)
            forward = run.run(images)
            tallies["forward"].see(forward, images=images)
            correct += int((codec.logits(graph, forward).argmax(axis=1) == part.labels).sum())
            if batch is not None:
                # the error of samples in a batch of that size: the mean of the loss divides by it, not by how many run side by side
                error = codec.output_error(graph, forward, part.labels) * (len(part) / batch)
                clipped += codec.clipped_errors(graph, error)
                tallies["feedback"].see(run.run(error, phase="feedback"), forward=forward)
    return correct, clipped, {name: tally.counts() for name, tally in tallies.items()}


def _history_bytes(graph: Graph) -> int:
    """Of one sample: a spike (of a relay a value) and a potential, every neuron and step."""
    return sum(
        phase.time_steps * prod(graph.population(name).shape) * (16 if graph.population(name).kind == "linear" else 9)
        for phase in graph.phases
        for name in phase.order
    )


def _ticks(source: Source, graph: Graph) -> tuple[dict[str, dict[str, int]], tuple[str, ...]]:
    """Ticks of one sample by timing and phase, those of the graph's own timing first, and what could not be said."""
    own: str = graph.phase("forward").timing.mode
    found = {own: _phase_ticks(graph)}
    other = "pipelined" if own == "exact" else "exact"
    if source.artifact is not None and source.artifact.float_graph is None:
        return found, (f"'{source.name}' was compiled without its float tensors: ticks of {other} timing are not known",)
    base, rest = folded_and_rest(source, None)
    timed = rest.with_options(retime={"mode": other}).until("retime")(base)
    return {**found, other: _phase_ticks(timed)}, ()


def _phase_ticks(graph: Graph) -> dict[str, int]:
    return {phase.name: phase.ticks for phase in graph.phases}


def charge(source: Source, dataset: data.Dataset, samples: int, batch: int | None) -> Charged:
    """What SANA-FE charges for the first `samples` of `dataset`: both phases where they fit, else the forward phase."""
    if samples == 0:
        return Charged(missing="not asked for (--chip-samples 0)")
    target = get(CHIP)
    missing = target.available()
    if missing is not None:
        return Charged(missing=missing)
    try:
        graph = graph_for(source, target)
    except ToolchainError as refusal:
        return Charged(missing=str(refusal))
    return charge_graph(target, graph, dataset, samples, batch)


def charge_graph(target: Target, graph: Graph, dataset: data.Dataset, samples: int, batch: int | None) -> Charged:
    """`charge` of a graph that `target` (SANA-FE) takes; the forward phase only where `batch` is None."""
    whole = [] if batch is None else target.check(graph)
    chosen = graph if batch is not None and not whole else forward_only(graph)
    refused = target.check(chosen) if chosen is not graph else []
    if refused:
        return Charged(missing="; ".join(refused))
    part = dataset.part(0, min(samples, len(dataset)))
    found: dict[str, Charges] = {}
    try:
        with target.compile(chosen) as run:
            forward = run.run(np.asarray(part.images))
            found["forward"] = run.charges  # type: ignore[attr-defined]  # SANA-FE's executables have them, the protocol does not ask for them
            if batch is not None and chosen.has_phase("feedback"):
                error = codec.output_error(chosen, forward, part.labels) * (len(part) / batch)
                run.run(error, phase="feedback")
                found["feedback"] = run.charges  # type: ignore[attr-defined]
    except ToolchainError as refusal:  # a potential that passes 24 bits shows only when it runs
        return Charged(found, str(refusal))
    return Charged(found, f"the feedback phase does not fit: {'; '.join(whole)}" if whole else None)
