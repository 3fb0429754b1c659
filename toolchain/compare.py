"""The same samples on several targets: accuracy, agreement, rates, and the implicit gradient, side by side with the first target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from toolchain import codec, data
from toolchain.analysis.drops import AccuracyBudget
from toolchain.comparison import Comparison, Gradient, Row, Trace
from toolchain.deploy import Deployment, Options, available, classify, sample_shape, started
from toolchain.errors import UsageError
from toolchain.feedback import Feedback, both_phases
from toolchain.files import ready_folder
from toolchain.ir import Graph
from toolchain.progress import track
from toolchain.source import Model, Source, find
from toolchain.target import History, Target

GRADIENT_SAMPLES = 128
"""Images whose implicit gradient is compared: the batch the scale factor of the zoo's models is meant for."""


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
) -> Comparison:
    """Run `dataset` on every target and compare each with the first, the feedback phase too where the model has one.

    `max_drop` in points of accuracy decides `passed`. `report` names a folder for index.html and pictures. A target missing here is an error, or
    runs on `fallback`, which the result records.
    """
    if not targets or len(set(targets)) != len(targets):
        raise UsageError(f"compare needs different targets, not '{','.join(targets)}'")
    if max_drop is not None and not max_drop >= 0:
        raise UsageError(f"max_drop is {max_drop}: give points of accuracy, 0 or more")
    if report is not None:
        ready_folder(Path(report))
    source = find(model)
    chosen = [(name, available(name, fallback)) for name in targets]
    time_steps, size = sample_shape(source, dataset)
    loaded = data.load(dataset, samples=samples, data_dir=data_dir, time_steps=time_steps, image_size=size)
    deployments = [classify(source, target, name, loaded, _options(target, device)) for name, target in chosen]
    gradients = [_feedback(source, target, loaded, device) for _, target in track(chosen, f"feedback of {source.name}")]
    rows = tuple(_row(d, deployments[0], g, gradients[0]) for d, g in zip(deployments, gradients, strict=True))
    drop = max(deployments[0].accuracy - d.accuracy for d in deployments)
    comparison = Comparison(source.name, rows, drop, max_drop, budget=_budget(source, chosen, deployments, loaded, budget_samples))
    if report is None:
        return comparison
    from toolchain.report import write

    sample = _telling(gradients[0])
    traces = [trace(source, target, name, loaded, device, sample) for name, target in chosen]
    return replace(comparison, report=write(comparison, traces, Path(report)))


def _budget(
    source: Source, chosen: Sequence[tuple[str, Target]], deployments: Sequence[Deployment], dataset: data.Dataset, samples: int | None
) -> AccuracyBudget | None:
    """Where the accuracy of the first integer target goes (docs/compare.md)."""
    return None


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
            error = codec.output_error(graph, forward, labels) / GRADIENT_SAMPLES
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
        return both_phases(run, source, dataset.images[:GRADIENT_SAMPLES], dataset.labels[:GRADIENT_SAMPLES])


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


def cosine(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Cosine of two tensors; 1 where both vanish, 0 where one does."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norms == 0:
        return float(not a.any() and not b.any())
    return float(np.vdot(a, b) / norms)


def _relative(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-300))


def _single(history: dict[str, History]) -> dict[str, History]:
    return {name: History(h.spikes[:, 0], h.potentials[:, 0]) for name, h in history.items()}
