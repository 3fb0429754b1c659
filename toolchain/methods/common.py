"""What several methods share: dropout, the readout's exact gradients, firing rates, and the sentences for networks that a method does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolchain.errors import UsageError
from toolchain.layers import FeedbackSNN


def dropout_factors(model: FeedbackSNN, samples: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """One factor, 0 or 1/(1-p), per connection, sample and target neuron, shared by all time steps; empty without dropout."""
    weight, shapes, shares = next(model.parameters()), model.layer_shapes(), model.dropout_shares()
    factors = {}
    for name, (_, target, _) in model.connections().items():
        if shares[name] > 0:
            keep = 1 - shares[name]
            drawn = torch.rand((samples, *shapes[target]), generator=generator)
            factors[name] = (drawn < keep).to(weight) / keep
    return factors


@dataclass(frozen=True)
class ReadoutError:
    """The loss and its exact gradients: mean cross entropy (unscaled), logits, and everything times the scale factor else."""

    loss: Tensor
    logits: Tensor
    error: Tensor
    gradients: dict[str, Tensor]


def readout_error(model: FeedbackSNN, rates: Tensor, labels: Tensor, scale_factor: float) -> ReadoutError:
    """Loss of the last layer's `rates`, its error d(scale_factor * loss)/d rates, and the readout's gradients of the scaled loss."""
    parameters = {} if model.readout is None else dict(model.readout.named_parameters())
    leaf = rates.detach().requires_grad_()
    with torch.set_grad_enabled(True):
        logits = model.logits(leaf)
        loss = functional.cross_entropy(logits, labels)
        error, *grads = torch.autograd.grad(loss * scale_factor, [leaf, *parameters.values()])
    return ReadoutError(
        loss.detach(), logits.detach(), error, {f"readout.{key}": grad for key, grad in zip(parameters, grads, strict=True)}
    )


def firing_rate(model: FeedbackSNN, counts: Sequence[Tensor]) -> float:
    """Spikes per neuron and step over all layers that have neurons."""
    return float(torch.cat([counts[layer].flatten() for layer in model.spiking]).float().mean()) / model.time_steps


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of the batch that is classified right."""
    return float((logits.argmax(1) == labels).float().mean())


def refuse(model: FeedbackSNN, method: str, layer: str, why: str) -> UsageError:
    """The error for a layer that a method cannot train."""
    return UsageError(f"method '{method}' does not fit '{model.name}': {layer} {why}")


def fits_equilibrium(model: FeedbackSNN, method: str) -> None:
    """For methods whose loss is read from equilibrium rates of ordinary neurons."""
    if model.trained_threshold is not None:
        raise refuse(model, method, "every layer", "has a trained threshold, which only dsr trains: leave trained_threshold out")
    if model.leak < 1 and not model.weighted_readout:
        raise refuse(
            model, method, "the readout", "sees plain rates, but equilibria hold for leak-weighted ones: set weighted_readout to true"
        )


def fits_time(model: FeedbackSNN, method: str) -> None:
    """For methods that train from one time step to the next (OTTT, SAF-E)."""
    if model.trained_threshold is not None:
        raise refuse(model, method, "every layer", "has a trained threshold, which only dsr trains: leave trained_threshold out")
    if model.leak < 1 and model.weighted_readout:
        raise refuse(
            model,
            method,
            "the readout",
            "sees leak-weighted rates, but the loss sums the logits of all steps: set weighted_readout to false",
        )
    if model.readout is None:
        raise refuse(model, method, "the readout", "is missing: end the network with a Linear")
    refuse_batch_norm(model, method, "standardise the weights instead (layers.Standardized)")


def refuse_batch_norm(model: FeedbackSNN, method: str, advice: str) -> None:
    """For methods without batch statistics."""
    modules = {name: module for name, (_, _, module) in model.connections().items()}
    for name, module in {**modules, **({} if model.readout is None else {"readout": model.readout})}.items():
        if any(isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)) for part in module.modules()):
            raise refuse(model, method, f"connection '{name}'", f"has batch normalisation, which this method has not: {advice}")


def refuse_streams(model: FeedbackSNN, method: str, advice: str) -> None:
    """For methods of plain chains."""
    for layer in model.relays:
        raise refuse(model, method, f"layer {layer}", f"is a relay, but this method knows layers of neurons only: {advice}")
    for index, (source, target) in enumerate(model.shortcuts):
        start = "the input" if source is None else f"layer {source}"
        raise refuse(model, method, f"skip {index}", f"leads from {start} to layer {target}, but this method knows no skips: {advice}")


def refuse_feedback(model: FeedbackSNN, method: str, advice: str) -> None:
    """For methods of feed-forward networks."""
    for index, (source, target) in enumerate(model.loops):
        raise refuse(
            model, method, f"feedback {index}", f"leads from layer {source} to layer {target}, but this method knows no feedback: {advice}"
        )
