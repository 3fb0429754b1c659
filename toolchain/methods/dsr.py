"""DSR: differentiation on spike representations (Meng et al., CVPR 2022), for networks without feedback whose thresholds are trained.

A layer's representation is the (for LIF neurons: weighted) mean of its output over time. As a function of the mean input r it is clip(r, 0, V) for IF and
clip(r / tau, 0, V / dt) for LIF; that is what is differentiated, so no gradient runs through time:

    r = rep(x),  G = T rep(grad of output)
    IF    grad x[t] = G 1[0 <= r <= V] / T             grad V = sum of G 1[r > V]
    LIF   grad x[t] = G 1[0 < r < V tau / dt] / (tau T)   grad V = dt sum of G 1[r > V tau / dt]

Tensors are time-major, (T * samples, ...): a connection sees all steps as one batch, and so does batch normalisation. The neurons are those of
`network.TrainedThreshold`; tau is not trained (a comment in the authors' code says otherwise). Relays pass their currents on, step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from toolchain.layers import FeedbackSNN, current
from toolchain.layers.connections import Statistics
from toolchain.methods import Batch, common
from toolchain.methods.common import dropout_factors
from toolchain.network import TrainedThreshold

__all__ = ["Dsr", "Pass", "fire", "representation", "run"]


def representation(values: Tensor, time_steps: int, neuron: TrainedThreshold) -> Tensor:
    """(samples, ...) from time-major (T * samples, ...): the mean over time, weighted by exp(-(T - t) dt / tau) for LIF neurons."""
    frames = values.reshape(time_steps, -1, *values.shape[1:])
    if neuron.tau is None:
        return frames.mean(0)
    powers = torch.arange(time_steps - 1, -1, -1, dtype=values.dtype, device=values.device)
    weights = (-powers * neuron.dt / neuron.tau).exp()
    mean: Tensor = torch.tensordot(weights / weights.sum(), frames, 1)
    return mean


class _Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, time_steps: int, neuron: TrainedThreshold) -> Tensor:
        v = float(threshold.detach())
        leak, gain, amplitude = 1.0, 1.0, 1.0
        if neuron.tau is not None:
            leak = exp(-neuron.dt / neuron.tau)
            gain, amplitude = 1 - leak, 1 / neuron.dt
        frames = x.reshape(time_steps, -1, *x.shape[1:])
        potential = torch.zeros_like(frames[0])
        out = torch.empty_like(frames)
        for frame, fired in zip(frames, out, strict=True):
            potential = leak * potential + gain * frame
            fired.copy_(potential >= neuron.alpha * v).mul_(v)
            potential = potential - fired
        ctx.save_for_backward(representation(x, time_steps, neuron), threshold)
        ctx.settings = time_steps, neuron
        return (out * amplitude).reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        mean, threshold = ctx.saved_tensors
        time_steps, neuron = ctx.settings
        whole = time_steps * representation(grads[0], time_steps, neuron)
        if neuron.tau is None:
            passed, above = (mean >= 0) & (mean <= threshold), (whole * (mean > threshold)).sum()
            each = whole * passed / time_steps
        else:
            top = threshold * neuron.tau / neuron.dt
            passed, above = (mean > 0) & (mean < top), neuron.dt * (whole * (mean > top)).sum()
            each = whole * passed / (neuron.tau * time_steps)
        return each.repeat(time_steps, *[1] * (each.ndim - 1)), above.reshape(threshold.shape), None, None


def fire(x: Tensor, threshold: Tensor, time_steps: int, neuron: TrainedThreshold) -> Tensor:
    """One layer's output for its time-major input (T * samples, ...), with DSR's gradients for `x` and the scalar `threshold`."""
    out: Tensor = _Fire.apply(x, threshold, time_steps, neuron)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return out


@dataclass(frozen=True)
class Pass:
    """One batch: each layer's representation (samples, *shape; of a relay that of its currents), logits, mean cross entropy, spikes per neuron and step (of
    all, and by layer of neurons), gradients by parameter name."""

    representations: tuple[Tensor, ...]
    logits: Tensor
    loss: Tensor
    forward_rate: float
    forward_rates: tuple[float, ...]
    gradients: dict[str, Tensor]


def fits(model: FeedbackSNN) -> None:
    """UsageError, naming the layer, unless DSR can train `model`."""
    common.refuse_untrained(model, "dsr")
    if model.trained_threshold is None:
        raise common.refuse(model, "dsr", "every layer", "fires at a fixed threshold: give the network trained_threshold")
    if model.leak < 1 and not model.weighted_readout:
        raise common.refuse(
            model, "dsr", "the readout", "sees plain rates, but representations are leak-weighted: set weighted_readout to true"
        )
    common.refuse_feedback(model, "dsr", "train with ide or spide, or leave it out")


def run(
    model: FeedbackSNN, x: Tensor, labels: Tensor, *, dropout: Mapping[str, Tensor] | None = None, threshold_gradient: float = 1.0
) -> Pass:
    """Forward, loss and gradients of one batch of inputs (samples, *input_shape) or events (time last).

    Thresholds below the bound are raised to it first. `threshold_gradient` multiplies the thresholds' gradients (0.001 for ImageNet in the paper's code);
    `dropout` holds a factor (samples, *target shape) by connection name.
    """
    fits(model)
    neuron, steps, dropout = model.trained_threshold, model.time_steps, dropout or {}
    assert neuron is not None  # `fits` has seen to it
    statistics: Statistics = "learn" if model.training else "running"
    with torch.no_grad():
        for threshold in model.thresholds:
            threshold.clamp_(min=neuron.bound)
    values, events = model.prepared(x)
    frames = values.movedim(-1, 0) if events else values.expand(steps, *values.shape)
    images = frames.reshape(-1, *model.input_shape)
    shapes, thresholds = model.layer_shapes(), model.layer_thresholds()
    outputs, representations, fired = list[Tensor](), list[Tensor](), list[Tensor]()
    with torch.set_grad_enabled(True):
        for layer, found in enumerate(model.arriving()):
            currents = []
            for name, source, module in found:
                made = current(module, images if source is None else outputs[source], f"connection '{name}'", statistics)
                made = made.reshape(len(images), *shapes[layer])
                currents.append(made * dropout[name].repeat(steps, *[1] * len(shapes[layer])) if name in dropout else made)
            total = sum(currents[1:], start=currents[0])
            outputs.append(fire(total, thresholds[layer], steps, neuron) if layer in thresholds else total)
            representations.append(representation(outputs[-1], steps, neuron))
            if layer in thresholds:
                fired.append((outputs[-1].detach() != 0).float().mean())
        logits = model.logits(representations[-1])
        loss = functional.cross_entropy(logits, labels)
        parameters = common.trained(model)
        grads = torch.autograd.grad(common.share(loss), list(parameters.values()))
    gradients = {name: g * threshold_gradient if name.startswith("thresholds.") else g for name, g in zip(parameters, grads, strict=True)}
    rates, sizes = torch.stack(fired).tolist(), [representations[layer][0].numel() for layer in thresholds]
    rate = sum(r * n for r, n in zip(rates, sizes, strict=True)) / sum(sizes)
    return Pass(tuple(r.detach() for r in representations), logits.detach(), loss.detach(), rate, tuple(rates), gradients)


class Dsr(common.Stateless):
    """DSR as a training method."""

    def __init__(self, threshold_gradient: float = 1.0) -> None:
        self.threshold_gradient = threshold_gradient

    def fits(self, model: FeedbackSNN) -> None:
        fits(model)

    def gradients(
        self, model: FeedbackSNN, images: Tensor, labels: Tensor, generator: torch.Generator, step: Callable[[], object] | None = None
    ) -> Batch:
        dropout = dropout_factors(model, len(images), generator)
        done = run(model, images, labels, dropout=dropout, threshold_gradient=self.threshold_gradient)
        common.leave(model, done.gradients)
        return Batch(
            loss=float(done.loss),
            correct=common.accuracy(done.logits, labels),
            forward_rate=done.forward_rate,
            forward_rates=done.forward_rates,
        )
