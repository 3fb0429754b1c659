"""The same samples on several targets: accuracy, agreement, rates, and the implicit gradient, side by side with the first target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from toolchain import codec, data
from toolchain.analysis.accuracy import Answers, accuracy_budget, default_samples
from toolchain.analysis.drops import AccuracyBudget
from toolchain.analysis.fidelity import Fidelity, Found, cosine, fidelity
from toolchain.analysis.side_by_side import SAMPLES, SideBySide, side_by_side
from toolchain.comparison import Comparison, Gradient, Row, Trace
from toolchain.compiler import graph_for
from toolchain.deploy import Deployment, Options, available, classify, sample_shape, started
from toolchain.errors import UsageError
from toolchain.feedback import Feedback, both_phases, exact, float_graph, in_floats
from toolchain.files import ready_folder
from toolchain.ir import Graph
from toolchain.partial import Partials
from toolchain.passes import Pass
from toolchain.progress import track
from toolchain.source import Model, Source, find
from toolchain.target import History, Target


def compare(
    model: Model,
    *,
    targets: Sequence[str] = ("torch", "sim", "lava-sim"),
    dataset: str = "mnist-1k",
    samples: int | None = None,
    device: str = "auto",
    max_drop: float | None = None,
    report: str | Path | None = None,
    fallback: str | None = None,
    data_dir: str | Path | None = None,
    budget_samples: int | None = None,
    resume: bool = False,
) -> Comparison:
    """Run `dataset` on every target and compare each with the first, the feedback phase too where the model has one.

    Where a target runs integers, the way of the accuracy from the float model to the first of them is split into factors on the first `budget_samples` samples (None: as
    many as take about 15 seconds, 0: not at all). `max_drop` in points of accuracy decides `passed`. `report` names a folder for index.html and pictures. A target missing here is an error, or
    runs on `fallback`, which the result records. Forward runs of a comparison that failed or was ended are saved as those of `deploy` are, and the same call with `resume`
    goes on from them; the feedback phase, the budget and the report are made anew.
    """
    if not targets or len(set(targets)) != len(targets):
        raise UsageError(f"compare needs different targets, not '{','.join(targets)}'")
    if max_drop is not None and not max_drop >= 0:
        raise UsageError(f"max_drop is {max_drop}: give points of accuracy, 0 or more")
    if budget_samples is not None and budget_samples < 0:
        raise UsageError(f"budget_samples is {budget_samples}: give how many samples, or 0 for no budget")
    if report is not None:
        ready_folder(Path(report))
    source = find(model)
    chosen = [(name, available(name, fallback)) for name in targets]
    time_steps, size = sample_shape(source, dataset)
    loaded = data.load(dataset, samples=samples, data_dir=data_dir, time_steps=time_steps, image_size=size)
    with Partials(resume=resume, lower=("--samples",)) as partials:
        deployments = [classify(source, target, name, loaded, _options(target, device), partials) for name, target in chosen]
        gradients = [_feedback(source, target, loaded, device) for _, target in track(chosen, f"feedback of {source.name}")]
        rows = tuple(_row(d, deployments[0], g, gradients[0]) for d, g in zip(deployments, gradients, strict=True))
        comparison = Comparison(
            source.name,
            rows,
            max(deployments[0].accuracy - d.accuracy for d in deployments),
            max_drop,
            budget=_budget(source, chosen, deployments, loaded, budget_samples),
            inside=_inside(source, chosen, loaded),
            fidelity=_fidelity(source, rows, loaded),
        )
        if report is None:
            return comparison
        from toolchain.report import write

        sample = _telling(gradients[0])
        traces = [trace(source, target, name, loaded, device, sample) for name, target in chosen]
        return replace(comparison, report=write(comparison, traces, Path(report)))


def _budget(
    source: Source, chosen: Sequence[tuple[str, Target]], deployments: Sequence[Deployment], dataset: data.Dataset, samples: int | None
) -> AccuracyBudget | str:
    """Where the accuracy of the first target that runs integers goes (docs/compare.md); a sentence where nothing can be said."""
    whole = [(target, d) for (_, target), d in zip(chosen, deployments, strict=True) if _quantizes(target)]
    if samples == 0:
        return "none was asked for (--budget-samples 0)"
    if not whole:
        return "no target here runs integers, add sim to --targets"
    floats = float_graph(source)
    if floats is None:
        return "the artefact has no float graph to start from, compile without --no-float"
    target, deployment = whole[0]
    graph = graph_for(source, target)
    count = default_samples(graph, len(dataset)) if samples is None else min(samples, len(dataset))
    first = deployments[0]
    return accuracy_budget(
        floats,
        graph,
        dataset.images[:count],
        dataset.labels[:count],
        target=deployment.target,
        dataset=dataset.name,
        first=(f"{first.target} on {first.device}", Answers(first.logits[:count], first.rates)) if first.ran_on == "torch" else None,
        logits={d.target: d.logits for other, d in whole if _integers(other) == _integers(target)},
    )


def _inside(source: Source, chosen: Sequence[tuple[str, Target]], dataset: data.Dataset) -> SideBySide | None:
    """Where the first target that runs integers errs, population by population, and when rates settle; None without a float graph."""
    floats = float_graph(source)
    if floats is None:
        return None
    whole = next((target for _, target in chosen if _quantizes(target)), None)
    graph = None if whole is None else graph_for(source, whole)
    return side_by_side(floats, graph, dataset.images[:SAMPLES], dataset.labels[:SAMPLES])


def _fidelity(source: Source, rows: Sequence[Row], dataset: data.Dataset) -> Fidelity | None:
    """Every target's gradient beside SPIDE's in floats and the exact one; None without a feedback phase or a float graph."""
    found = {row.deployment.target: row.gradient.found for row in rows if row.gradient is not None}
    if not found or float_graph(source) is None:
        return None
    images, labels = dataset.images[:SAMPLES], dataset.labels[:SAMPLES]
    plain = [row.deployment.target for row in rows if row.deployment.ran_on == "torch" and row.deployment.device == "cpu"]
    spide = found[plain[0]] if plain else in_floats(source, images, labels)
    best, solved = exact(source, images, labels)
    return fidelity(
        {target: Found(one.gradients, one.masks) for target, one in found.items()},
        Found(spide.gradients, spide.masks),
        None if best is None else Found(best.gradients, best.masks),
        solved,
        samples=len(images),
        devices={row.deployment.target: row.deployment.device for row in rows},
    )


def _quantizes(target: Target) -> bool:
    """Whether a target runs integers."""
    return any(rewrite.name == "quantize" for rewrite in target.pipeline.passes)


def _integers(target: Target) -> tuple[Pass, ...]:
    """What decides which integers a target runs: its passes but for the one that places them on cores."""
    return tuple(rewrite for rewrite in target.pipeline.passes if rewrite.name != "partition")


def trace(source: Source, target: Target, name: str, dataset: data.Dataset, device: str, sample: int = 0) -> Trace:
    """One sample in full on one target: both phases, every spike and potential."""
    asked = _options(target, device)
    with started(source, target, Options(device=asked.device, trace=True), ("forward", "feedback")) as run:
        graph = run.graph
        images, labels = dataset.images[sample : sample + 1], dataset.labels[sample : sample + 1]
        forward = run.run(images)
        feedback: dict[str, History] = {}
        if graph.has_phase("feedback"):
            # The error this sample has in a batch of the size the scale factor is meant for; alone it would clip.
            error = codec.output_error(graph, forward, labels) / SAMPLES
            feedback = _single(run.run(error, phase="feedback").history)
        return Trace(name, sample, _single(forward.history), feedback, thresholds(graph))


def _telling(first: Feedback | None) -> int:
    """The sample to show: the one whose error makes the most spikes in the feedback phase, since a sure answer has none to send back."""
    if first is None:
        return 0
    spikes = sum(activity.reshape(len(activity), -1).sum(axis=1) for activity in first.feedback.activity.values())
    return int(np.argmax(spikes))


def thresholds(graph: Graph) -> dict[str, dict[str, float]]:
    """By phase and population: the threshold of everything that spikes, in graph units."""
    return {p.name: {name: float(d.threshold) for name, d in p.dynamics.items() if d.members != "none"} for p in graph.phases}


def _options(target: Target, device: str) -> Options:
    """The device goes to targets that have one; the others run on the CPU whatever the first row does."""
    return Options(device=device if hasattr(target, "device") else "auto")


def _feedback(source: Source, target: Target, dataset: data.Dataset, device: str) -> Feedback | None:
    with started(source, target, _options(target, device), ("forward", "feedback")) as run:
        if not run.graph.has_phase("feedback"):
            return None
        return both_phases(run, source, dataset.images[:SAMPLES], dataset.labels[:SAMPLES])


def _row(deployment: Deployment, first: Deployment, found: Feedback | None, reference: Feedback | None) -> Row:
    difference = {name: float(np.abs(rate - first.rates[name]).mean()) for name, rate in deployment.rates.items()}
    gradient = None if found is None or reference is None else _gradient(found, reference)
    return Row(deployment, float((deployment.predictions == first.predictions).mean()), difference, gradient)


def _gradient(found: Feedback, reference: Feedback) -> Gradient:
    samples = len(found.logits)
    return Gradient(
        samples=samples,
        loss=found.loss,
        scale_factor=found.scale_factor,
        cosine={name: cosine(g, reference.gradients[name]) for name, g in found.gradients.items()},
        relative_error={name: _relative(g, reference.gradients[name]) for name, g in found.gradients.items()},
        spikes_per_sample=float(sum(int(a.sum()) for a in found.feedback.activity.values()) / samples),
        clipped=found.clipped,
        silent=found.silent,
        clipped_errors=found.clipped_errors,
        found=found,
    )


def _relative(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-300))


def _single(history: dict[str, History]) -> dict[str, History]:
    return {name: History(h.spikes[:, 0], h.potentials[:, 0]) for name, h in history.items()}
