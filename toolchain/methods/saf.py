"""SAF: forward propagation of spike accumulations (arXiv 2310.02772), as derived from the abstract's claims: no code of the authors is public.

A layer keeps its accumulation a[t] = leak a[t-1] + s[t] alone; with L[t] = leak L[t-1] + 1,

    Uacc_l[t] = W_l a_{l-1}[t] + b_l L[t]  (+ W_f a_k[t-1] for feedback);   s_l[t] = 1[Uacc_l[t] >= A leak a_l[t-1] + V]

fires the spikes of the LIF network (u = Uacc - A leak a[t-1]) with one product a connection and step, where OTTT needs two. Inputs accumulate too, and a
relay's accumulation is its Uacc. A feedback connection's bias, silent in the first step, counts b L[t-1].

SAF-E   the loss of every step as in OTTT; da/ds = 1 and a[t-1] a constant, so its gradient is OTTT's with `trace_input`. The bias gets factor 1, not L.
SAF-F   the loss of the last step, CE of the readout of the rates a[T] / L[T]; differentiates clip(current / A, 0, 1) at these rates, layer by layer (spike
        representation). Without feedback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolchain.layers import FeedbackSNN, current
from toolchain.layers.connections import constant
from toolchain.methods import Batch, common
from toolchain.methods.common import dropout_factors
from toolchain.methods.ottt import Gradients, Pass, batch_of, replace, spike, step_loss

__all__ = ["FinalPass", "SafE", "SafF", "run_e", "run_f"]


class _Accumulation:
    """The state between time steps: `values` a_l (samples, *shape) of each layer, that of the input, and L."""

    def __init__(self, model: FeedbackSNN, x: Tensor, dropout: Mapping[str, Tensor]) -> None:
        self.model, self.dropout = model, dropout
        self.frames, self.events = model.prepared(x)
        self.shapes = model.layer_shapes()
        self.values = [self.frames.new_zeros(len(self.frames), *shape) for shape in self.shapes]
        self.counts = [torch.zeros_like(v) for v in self.values]
        self.input = torch.zeros_like(self.frames[..., 0] if self.events else self.frames)
        self.leaks = 0.0

    def advance(self, t: int) -> Tensor:
        """One time step of every layer, with gradients where they are enabled; the last layer's spikes (what it passes on, of a relay)."""
        neuron = self.model.neuron
        self.input = neuron.leak * self.input + (self.frames[..., t] if self.events else self.frames)
        arriving = self._feedback() if t else {}
        self.leaks = neuron.leak * self.leaks + 1
        sent = self.input
        for layer, found in enumerate(self.model.arriving()):
            total = torch.zeros_like(self.values[layer])
            for name, source, module in found:
                made = self._current(module, name, self.input if source is None else self.values[source], layer)
                total = total + self._dropped(name, made)
            total = total + arriving[layer] if layer in arriving else total
            before = neuron.leak * self.values[layer].detach()
            relay = layer in self.model.relays
            sent = total - before if relay else spike(total - neuron.reset * before - neuron.threshold)
            self.values[layer] = total if relay else before + sent
            self.counts[layer] += sent.detach()
        return sent

    def _current(self, module: nn.Module, name: str, accumulated: Tensor, layer: int) -> Tensor:
        """W a + b L, the bias with gradient factor 1."""
        where = f"connection '{name}'"
        made = current(module, accumulated, where).reshape(-1, *self.shapes[layer])
        bias = constant(module, tuple(accumulated.shape[1:]), where)
        return made if bias is None else made + (self.leaks - 1) * bias.reshape(1, *self.shapes[layer])

    def _feedback(self) -> dict[int, Tensor]:
        """What feedback connections have brought from the second step on, L still that of the step before."""
        found: dict[int, Tensor] = {}
        for index, ((source, target), module) in enumerate(zip(self.model.loops, self.model.feedback, strict=True)):
            name = f"feedback.{index}"
            made = self._dropped(name, self._current(module, name, self.values[source].detach(), target))
            found[target] = found[target] + made if target in found else made
        return found

    def _dropped(self, name: str, values: Tensor) -> Tensor:
        return values * self.dropout[name] if name in self.dropout else values


def run_e(
    model: FeedbackSNN,
    x: Tensor,
    labels: Tensor,
    *,
    loss_lambda: float = 0.05,
    step: Callable[[], object] | None = None,
    dropout: Mapping[str, Tensor] | None = None,
    trace: bool = False,
) -> Pass:
    """SAF-E on one batch; the arguments and the result are those of `ottt.run`, traces being accumulations."""
    common.fits_time(model, "saf-e")
    state, gradients = _Accumulation(model, x, dropout or {}), Gradients(model, step)
    logits, losses = [], []
    kept: list[list[Tensor]] = [[] for _ in state.values]
    readout = model.readout
    assert readout is not None  # `common.fits_time` has seen to it
    for t in range(model.time_steps):
        with torch.set_grad_enabled(True):
            fired = state.advance(t)
            with torch.no_grad():
                value = current(readout, fired, "the readout")
            out = replace(current(readout, state.values[-1], "the readout"), value)
            loss = step_loss(out, labels, loss_lambda, model.time_steps)
        gradients.take(loss, last=t == model.time_steps - 1)
        state.values = [v.detach() for v in state.values]
        for layer, value in enumerate(state.values if trace else []):
            kept[layer].append(value)
        logits.append(out.detach())
        losses.append(loss.detach())
    found = tuple(torch.stack(k) for k in kept) if trace else ()
    return Pass(torch.stack(logits), torch.stack(losses), tuple(state.counts), gradients.found, found)


@dataclass(frozen=True)
class FinalPass:
    """One batch of SAF-F: rates a[T] / L[T] and spike counts (samples, *shape) a layer, logits, mean cross entropy, gradients by parameter name."""

    rates: tuple[Tensor, ...]
    counts: tuple[Tensor, ...]
    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def run_f(model: FeedbackSNN, x: Tensor, labels: Tensor, *, dropout: Mapping[str, Tensor] | None = None) -> FinalPass:
    """SAF-F on one batch of inputs (samples, *input_shape) or events (time last); UsageError where a layer does not fit."""
    _fits_f(model)
    dropout = dropout or {}
    state = _Accumulation(model, x, dropout)
    with torch.no_grad():
        for t in range(model.time_steps):
            state.advance(t)
    rates = tuple(v / state.leaks for v in state.values)
    with torch.set_grad_enabled(True):
        mean_input, carried = state.input / state.leaks, list[Tensor]()
        for layer, found in enumerate(model.arriving()):
            total = torch.zeros_like(rates[layer])
            for name, source, module in found:
                made = current(module, mean_input if source is None else carried[source], f"connection '{name}'").reshape(total.shape)
                total = total + (made * dropout[name] if name in dropout else made)
            carried.append(replace(total if layer in model.relays else (total / model.neuron.reset).clamp(0, 1), rates[layer]))
        logits = model.logits(carried[-1])
        loss = functional.cross_entropy(logits, labels)
        parameters = common.trained(model)
        grads = torch.autograd.grad(common.share(loss), list(parameters.values()))
    return FinalPass(rates, tuple(state.counts), logits.detach(), loss.detach(), dict(zip(parameters, grads, strict=True)))


def _fits_f(model: FeedbackSNN) -> None:
    common.fits_equilibrium(model, "saf-f")
    common.refuse_batch_norm(model, "saf-f", "standardise the weights instead (layers.Standardized)")
    common.refuse_feedback(model, "saf-f", "train with saf-e, ide or spide, or leave it out")


class SafE(common.Stateless):
    """SAF-E as a training method: a step of the optimiser at every time step."""

    def __init__(self, loss_lambda: float = 0.05) -> None:
        self.loss_lambda = loss_lambda

    def fits(self, model: FeedbackSNN) -> None:
        common.fits_time(model, "saf-e")

    def gradients(
        self, model: FeedbackSNN, images: Tensor, labels: Tensor, generator: torch.Generator, step: Callable[[], object] | None = None
    ) -> Batch:
        dropout = dropout_factors(model, len(images), generator)
        done = run_e(model, images, labels, loss_lambda=self.loss_lambda, step=step, dropout=dropout)
        common.leave(model, done.gradients)
        return batch_of(model, done.logits, done.losses, done.counts, labels)


class SafF(common.Stateless):
    """SAF-F as a training method: one step of the optimiser a batch, from the accumulations of the last time step."""

    def fits(self, model: FeedbackSNN) -> None:
        _fits_f(model)

    def gradients(
        self, model: FeedbackSNN, images: Tensor, labels: Tensor, generator: torch.Generator, step: Callable[[], object] | None = None
    ) -> Batch:
        done = run_f(model, images, labels, dropout=dropout_factors(model, len(images), generator))
        common.leave(model, done.gradients)
        return Batch(
            loss=float(done.loss),
            correct=common.accuracy(done.logits, labels),
            forward_rate=common.firing_rate(common.of_neurons(model, done.counts), model.time_steps),
            forward_rates=common.firing_rates(common.of_neurons(model, done.counts), model.time_steps),
        )
