"""What several methods share: dropout, the readout's exact gradients, firing rates, and the sentences for networks that a method does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolchain import processes
from toolchain.errors import UsageError
from toolchain.layers import FeedbackSNN


class Stateless:
    """A method that carries nothing from one batch to the next, so that a checkpoint holds nothing of it."""

    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: dict[str, float]) -> None:
        return


def dropout_factors(model: FeedbackSNN, samples: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """One factor, 0 or 1/(1-p), per connection, sample and target neuron, shared by all time steps; empty without dropout.

    Of several processes, each draws for the whole batch and keeps its rows.
    """
    weight, shapes, shares = next(model.parameters()), model.layer_shapes(), model.dropout_shares()
    generator, whole = _on(weight.device, generator), samples * processes.size()
    factors = {}
    for name, (_, target, _) in model.connections().items():
        if shares[name] > 0:
            keep = 1 - shares[name]
            drawn = torch.rand((whole, *shapes[target]), generator=generator, device=weight.device)[processes.rows(whole)]
            factors[name] = (drawn < keep).to(weight) / keep
    return factors


def _on(device: torch.device, generator: torch.Generator | None) -> torch.Generator | None:
    """A generator on `device`, seeded from one on the CPU: draws by the million there, a state that fits any machine here."""
    if generator is None or device.type == generator.device.type:
        return generator
    seed = int(torch.randint(2**63 - 1, (1,), generator=generator))
    return torch.Generator(device).manual_seed(seed)


@dataclass(frozen=True)
class ReadoutError:
    """The loss and its exact gradients: mean cross entropy (unscaled), logits, and everything times the scale factor else.

    Of several processes, each has the loss of its samples, and the error and gradients of its share of the whole batch's.
    """

    loss: Tensor
    logits: Tensor
    error: Tensor
    gradients: dict[str, Tensor]


def readout_error(model: FeedbackSNN, rates: Tensor, labels: Tensor, scale_factor: float) -> ReadoutError:
    """Loss of the last layer's `rates`, its error d(scale_factor * loss)/d rates, and the readout's gradients of the scaled loss."""
    parameters = {} if model.readout is None else trained(model.readout)
    leaf = rates.detach().requires_grad_()
    with torch.set_grad_enabled(True):
        logits = model.logits(leaf)
        loss = functional.cross_entropy(logits, labels)
        error, *grads = torch.autograd.grad(loss * (scale_factor / processes.size()), [leaf, *parameters.values()])
    return ReadoutError(
        loss.detach(), logits.detach(), error, {f"readout.{key}": grad for key, grad in zip(parameters, grads, strict=True)}
    )


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name: those that `requires_grad_(False)` has frozen are left out."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def leave(model: FeedbackSNN, gradients: Mapping[str, Tensor], factor: float = 1.0) -> None:
    """Put the gradients, divided by `factor`, into `.grad`; a parameter that has none, or is frozen, gets None."""
    for name, parameter in model.named_parameters():
        found = gradients.get(name)
        parameter.grad = found if found is None or factor == 1 else found / factor


def refuse_untrained(model: FeedbackSNN, method: str) -> None:
    """For networks in which nothing learns."""
    if not trained(model):
        raise refuse(model, method, "every layer", "is without a parameter that learns: give one weights, or unfreeze them")


def of_neurons(model: FeedbackSNN, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Those of `values`, one a layer, that belong to layers with neurons."""
    return tuple(values[layer] for layer in model.spiking)


def firing_rate(counts: Sequence[Tensor], time_steps: int) -> float:
    """Spikes per neuron and step over all layers."""
    return float(torch.cat([c.flatten() for c in counts]).float().mean()) / time_steps


def firing_rates(counts: Sequence[Tensor], time_steps: int) -> tuple[float, ...]:
    """Spikes per neuron and step, layer by layer."""
    return tuple((torch.stack([c.float().mean() for c in counts]) / time_steps).tolist())


def share(loss: Tensor) -> Tensor:
    """What this process's mean loss adds to that of the whole batch."""
    return loss if processes.size() == 1 else loss / processes.size()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of the batch that is classified right."""
    return float((logits.argmax(1) == labels).float().mean())


def refuse(model: FeedbackSNN, method: str, layer: str, why: str) -> UsageError:
    """The error for a layer that a method cannot train."""
    return UsageError(f"method '{method}' does not fit '{model.name}': {layer} {why}")


def fits_equilibrium(model: FeedbackSNN, method: str) -> None:
    """For methods whose loss is read from equilibrium rates of ordinary neurons."""
    refuse_untrained(model, method)
    if model.trained_threshold is not None:
        raise refuse(model, method, "every layer", "has a trained threshold, which only dsr trains: leave trained_threshold out")
    if model.leak < 1 and not model.weighted_readout:
        raise refuse(
            model, method, "the readout", "sees plain rates, but equilibria hold for leak-weighted ones: set weighted_readout to true"
        )


def fits_time(model: FeedbackSNN, method: str) -> None:
    """For methods that train from one time step to the next (OTTT, SAF-E)."""
    refuse_untrained(model, method)
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
