"""The implicit gradient on a target: forward equilibrium, error, feedback equilibrium by signed spikes, local updates (SPIDE, METHODS 3.2-3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain import codec
from toolchain.deploy import Options, available, started
from toolchain.errors import UsageError
from toolchain.ir import Array, Graph, Op, Synapse, weight_of
from toolchain.network import CLIPPED_FROM
from toolchain.source import Model, Source, find
from toolchain.target import Executable, Result

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Feedback:
    """What both phases give for one batch.

    beta       feedback equilibrium by population, (samples, *shape), of the loss times `scale_factor`; unmasked
    masks      m = 1[0 < spike count < T] by population
    gradients  d(mean cross entropy)/d(parameter) at its true scale, by parameter name ("input.weight", "hidden.0.bias", ...). Of an artefact the
               input's parameters are the folded ones (input normalisation is part of the weights)
    rates      forward rates by population; `loss` the mean cross entropy; `logits` (samples, classes)
    clipped    share of couples whose |beta| met its bound: lower the scale factor where it is not near 0
    clipped_errors   how many error currents were cut at the chip's 13-bit mantissa: lower the scale factor where there are any
    """

    beta: dict[str, Floats]
    masks: dict[str, npt.NDArray[np.bool_]]
    gradients: dict[str, Floats]
    rates: dict[str, Floats]
    logits: Floats
    loss: float
    scale_factor: float
    clipped: float
    clipped_errors: int
    forward: Result
    feedback: Result

    @property
    def silent(self) -> float:
        """Share of couples that never fired: raise the scale factor where it is near 1."""
        return _share([a == 0 for a in self.feedback.activity.values()])


def feedback(
    model: Model,
    images: Array,
    labels: Array,
    *,
    target: str = "lava-sim",
    scale_factor: float | None = None,
    device: str = "auto",
    fallback: str | None = None,
) -> Feedback:
    """The implicit gradient of the mean cross entropy of `images` (samples, *input shape, in [0, 1]) and `labels` (samples,) on `target`.

    `scale_factor` multiplies the loss for the feedback phase (default: the model's own); the gradients returned are divided by it again. Target torch
    runs the module itself, or the folded float graph of an artefact. Raises UsageError for inputs and labels that do not fit, and where the
    target is missing here and no `fallback` is named.
    """
    source = find(model)
    chosen = available(target, fallback)
    with started(source, chosen, Options(device=device), ("forward", "feedback")) as run:
        return both_phases(run, source, images, labels, scale_factor)


def both_phases(run: Executable, source: Source, images: Array, labels: Array, scale_factor: float | None = None) -> Feedback:
    """Forward, error from the target's own rates, feedback, local gradients, on a running executable."""
    graph = run.graph
    gain = codec.error_drive(graph).gain if scale_factor is None else _positive(scale_factor)
    labels = np.asarray(labels)
    forward = run.run(images)
    error = codec.output_error(graph, forward, labels, gain)
    back = run.run(error, phase="feedback")
    couples = [p.name for p in graph.of_kind("couple")]
    beta = {name: codec.beta(graph, back, name) for name in couples}
    masks = {name: codec.mask(graph, forward, name) for name in couples}
    scores = codec.logits(graph, forward)
    return Feedback(
        beta=beta,
        masks=masks,
        gradients=_gradients(graph, source, images, labels, forward, beta, masks, gain),
        rates={name: codec.rates(graph, forward, name) for name in couples},
        logits=scores,
        loss=_cross_entropy(scores, labels),
        scale_factor=gain,
        clipped=_share([np.abs(codec.rates(graph, back, name)) >= CLIPPED_FROM for name in couples]),
        clipped_errors=codec.clipped_errors(graph, error),
        forward=forward,
        feedback=back,
    )


def _positive(scale_factor: float) -> float:
    try:
        value = float(scale_factor)
    except (TypeError, ValueError):
        value = np.nan
    if not (np.isfinite(value) and value > 0):
        raise UsageError(f"scale_factor is {scale_factor!r}: it must be a positive number")
    return value


def _gradients(
    graph: Graph, source: Source, images: Array, labels: Array, forward: Result, beta: dict[str, Floats], masks: dict[str, Any], gain: float
) -> dict[str, Floats]:
    """Every connection learns from its own two ends: grad W = (1/A) sum over the batch of (m beta) a^T (METHODS 3.3)."""
    phase = graph.phase("forward")
    post = {name: _rows(beta[name] * masks[name]) / codec.amplitude(graph, "forward", name) / gain for name in beta}
    found: dict[str, Floats] = {}
    for drive in phase.drive:
        found[_parameter(drive.ops[0], source)] = post[drive.population].T @ _rows(_input(source, images))
        if drive.bias is not None:
            found[drive.bias] = post[drive.population].sum(axis=0)
    for synapse in phase.synapses:
        if synapse.target in post:
            found[_parameter(synapse.ops[0], source)] = post[synapse.target].T @ _rows(
                _presynaptic(graph, source, images, forward, synapse)
            )
    for name, biases in phase.bias.items():
        if name in post:
            found |= {bias.tensor: post[name].sum(axis=0) for bias in biases}
    return found | _readout_gradients(graph, source, forward, labels)


def _readout_gradients(graph: Graph, source: Source, forward: Result, labels: Array) -> dict[str, Floats]:
    phase = graph.phase("forward")
    readout = graph.of_kind("readout")[0].name
    (synapse,) = (s for s in phase.synapses if s.target == readout)
    delta = codec.logit_error(graph, forward, labels)
    found = {_parameter(synapse.ops[0], source): delta.T @ _rows(codec.rates(graph, forward, synapse.source))}
    return found | {bias.tensor: delta.sum(axis=0) for bias in phase.bias.get(readout, ())}


def _presynaptic(graph: Graph, source: Source, images: Array, forward: Result, synapse: Synapse) -> Floats:
    if graph.population(synapse.source).kind == "input":
        return _input(source, images)
    return codec.rates(graph, forward, synapse.source)


def _input(source: Source, images: Array) -> Floats:
    """What the input connection's weights saw: the normalised image for a module, the image itself for folded weights."""
    values = np.asarray(images, np.float64)
    module = source.module
    if module is None or module.normalize is None:
        return values
    channels = (1, -1) + (1,) * (len(module.input_shape) - 1)
    settings = module.normalize.settings
    mean, std = (np.asarray(v, np.float64).reshape(channels) for v in (settings.mean, settings.std))
    normalized: Floats = (values.reshape(len(values), *module.input_shape) - mean) / std
    return normalized


def _parameter(op: Op, source: Source) -> str:
    """The torch parameter behind a weight: lowering keeps its name as the tensor's. An artefact's folded weight keeps its own name, `.scaled`."""
    name = str(weight_of(op))
    return name if source.module is None else name.removesuffix(".scaled")


def _rows(values: Array) -> Floats:
    return values.reshape(len(values), -1).astype(np.float64)


def _share(parts: list[npt.NDArray[np.bool_]]) -> float:
    return float(np.concatenate([part.ravel() for part in parts]).mean())


def _cross_entropy(scores: Floats, labels: Array) -> float:
    top = scores.max(axis=1, keepdims=True)
    logs = scores - top - np.log(np.exp(scores - top).sum(axis=1, keepdims=True))
    return float(-logs[np.arange(len(labels)), labels].mean())
