"""OTTT: online training through time (Xiao et al., NeurIPS 2022), at each step in space only.

    u[t] = leak (u[t-1] - A s[t-1]) + I[t];   s = 1[u >= V];   trace a[t] = leak a[t-1] + s[t]

The previous step's potential is a constant, so delta[t] runs back through the layers of one step, with ds/du = alpha sg (1 - sg), sg = sigmoid(alpha (u - V)),
alpha 4. A connection's current is that of the spikes, its gradient that of the trace: grad W = sum over t of delta[t] a[t]^T, and W^T delta goes on to the spikes.
Graded values, the input and what relays pass on, count as themselves, or with `trace_input` as traces too (which SAF-E equals). A feedback connection carries
spikes and trace of the step before, and no gradient back to them.

The loss of each step is ((1 - loss_lambda) CE + loss_lambda MSE with the one-hot label) / T; a prediction sums the logits of all steps. OTTT_A adds the
gradients up, OTTT_O lets the optimiser step at every t. Memory does not grow with T.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolchain.layers import FeedbackSNN, current
from toolchain.methods import Batch, common
from toolchain.methods.common import dropout_factors

__all__ = ["OtttA", "OtttO", "Pass", "run"]

ALPHA = 4.0


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, over: Tensor) -> Tensor:
        ctx.save_for_backward(over)
        return (over >= 0).to(over)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        slope = torch.sigmoid(ALPHA * ctx.saved_tensors[0])
        through: Tensor = grads[0] * ALPHA * slope * (1 - slope)
        return through


class _Replace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def spike(over: Tensor) -> Tensor:
    """1 where the potential over its threshold is at least 0, with the surrogate gradient."""
    fired: Tensor = _Spike.apply(over)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return fired


def replace(gradient: Tensor, value: Tensor) -> Tensor:
    """`value`, whose gradient goes to `gradient` unchanged."""
    found: Tensor = _Replace.apply(gradient, value)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return found


def traced_current(module: nn.Module, spikes: Tensor, trace: Tensor, where: str) -> Tensor:
    """The current of `spikes`; parameters get the gradient they would have for `trace`, spikes that of the connection.

    Within torch.autocast, what a connection makes of the trace is rounded, and with it the gradient, but never the current that spikes come from.
    """
    with torch.autocast(spikes.device.type, enabled=False):
        if trace is spikes:
            return current(module, spikes, where)
        with torch.no_grad():
            value = current(module, spikes, where)
    return replace(current(module, replace(spikes, trace), where), value)


def step_loss(logits: Tensor, labels: Tensor, loss_lambda: float, time_steps: int) -> Tensor:
    """A time step's share of the loss."""
    loss = (1 - loss_lambda) * functional.cross_entropy(logits, labels)
    if loss_lambda:
        wanted = functional.one_hot(labels, logits.shape[1]).to(logits)
        loss = loss + loss_lambda * functional.mse_loss(logits, wanted)
    return loss / time_steps


@dataclass
class Gradients:
    """Gradients of one batch by parameter name: added up, or handed to `step` at every time step but the last (online)."""

    model: FeedbackSNN
    step: Callable[[], object] | None
    found: dict[str, Tensor] = field(default_factory=dict)

    def take(self, loss: Tensor, last: bool) -> None:
        parameters = common.trained(self.model)
        made: Sequence[Tensor | None] = torch.autograd.grad(common.share(loss), list(parameters.values()), allow_unused=True)
        grads = dict(zip(parameters, made, strict=True))
        if self.step is None:
            for name, grad in grads.items():
                if grad is not None:
                    self.found[name] = self.found[name] + grad if name in self.found else grad
            return
        self.found = {name: grad for name, grad in grads.items() if grad is not None}
        if not last:
            self.leave()
            self.step()

    def leave(self) -> None:
        """Put what was found into `.grad`; a parameter that had no part gets None."""
        common.leave(self.model, self.found)


@dataclass(frozen=True)
class Pass:
    """One batch: logits (T, samples, classes), losses (T,), spike counts (samples, *shape) a layer (of a relay the sum of what it passes on), gradients by
    parameter name, and with `trace` each layer's traces (T, samples, *shape). Online, the gradients are the last step's."""

    logits: Tensor
    losses: Tensor
    counts: tuple[Tensor, ...]
    gradients: dict[str, Tensor]
    traces: tuple[Tensor, ...] = ()


def run(
    model: FeedbackSNN,
    x: Tensor,
    labels: Tensor,
    *,
    loss_lambda: float = 0.05,
    step: Callable[[], object] | None = None,
    trace_input: bool = False,
    dropout: Mapping[str, Tensor] | None = None,
    trace: bool = False,
) -> Pass:
    """All time steps of one batch of inputs (samples, *input_shape) or events (time last); UsageError where a layer does not fit.

    With `step` (OTTT_O) the gradients of each time step but the last go to `.grad` and `step` is called. `dropout` holds a factor (samples, *target shape)
    by connection name.
    """
    common.fits_time(model, "ottt-o" if step else "ottt-a")
    values, events = model.prepared(x)
    shapes, neuron, dropout = model.layer_shapes(), model.neuron, dropout or {}
    potentials = [values.new_zeros(len(values), *shape) for shape in shapes]
    spikes, traces, counts = ([torch.zeros_like(p) for p in potentials] for _ in range(3))
    seen = torch.zeros_like(values[..., 0] if events else values)
    gradients, logits, losses = Gradients(model, step), [], []
    kept: list[list[Tensor]] = [[] for _ in shapes]
    incoming = model.arriving()
    for t in range(model.time_steps):
        frame = values[..., t] if events else values
        seen = neuron.leak * seen + frame
        with torch.set_grad_enabled(True):
            arriving = _feedback(model, shapes, spikes, traces, dropout) if t else {}
            given = (frame, seen if trace_input else frame)
            sent: list[tuple[Tensor, Tensor]] = []  # what each layer sends on, and its trace
            for layer, streams in enumerate(incoming):
                total = torch.zeros_like(potentials[layer])
                for name, source, module in streams:
                    made = traced_current(module, *(given if source is None else sent[source]), f"connection '{name}'").reshape(total.shape)
                    total = total + (made * dropout[name] if name in dropout else made)
                total = total + arriving[layer] if layer in arriving else total
                relay = layer in model.relays
                potential = potentials[layer] + total
                out = total if relay else spike(potential - neuron.threshold)
                spikes[layer] = out.detach()
                graded = relay and not trace_input
                traces[layer] = spikes[layer] if graded else neuron.leak * traces[layer] + spikes[layer]
                sent.append((out, out if graded else traces[layer]))
                if not relay:
                    potentials[layer] = neuron.leak * (potential.detach() - neuron.reset * spikes[layer])
                counts[layer] += spikes[layer]
                if trace:
                    kept[layer].append(traces[layer])
            out = traced_current(_readout(model), *sent[-1], "the readout")
            loss = step_loss(out, labels, loss_lambda, model.time_steps)
        gradients.take(loss, last=t == model.time_steps - 1)
        logits.append(out.detach())
        losses.append(loss.detach())
    found = tuple(torch.stack(k) for k in kept) if trace else ()
    return Pass(torch.stack(logits), torch.stack(losses), tuple(counts), gradients.found, found)


def _readout(model: FeedbackSNN) -> nn.Module:
    assert model.readout is not None  # `common.fits_time` has seen to it
    return model.readout


def _feedback(
    model: FeedbackSNN, shapes: tuple[tuple[int, ...], ...], spikes: list[Tensor], traces: list[Tensor], dropout: Mapping[str, Tensor]
) -> dict[int, Tensor]:
    """What feedback connections bring to each layer from the step before."""
    found: dict[int, Tensor] = {}
    for index, ((source, target), module) in enumerate(zip(model.loops, model.feedback, strict=True)):
        name = f"feedback.{index}"
        made = traced_current(module, spikes[source], traces[source], f"connection '{name}'").reshape(-1, *shapes[target])
        made = made * dropout[name] if name in dropout else made
        found[target] = found[target] + made if target in found else made
    return found


class OtttA(common.Stateless):
    """OTTT_A as a training method: one step of the optimiser a batch."""

    online = False

    def __init__(self, loss_lambda: float = 0.05, trace_input: bool = False) -> None:
        self.loss_lambda, self.trace_input = loss_lambda, trace_input

    def fits(self, model: FeedbackSNN) -> None:
        common.fits_time(model, "ottt-o" if self.online else "ottt-a")

    def gradients(
        self, model: FeedbackSNN, images: Tensor, labels: Tensor, generator: torch.Generator, step: Callable[[], object] | None = None
    ) -> Batch:
        done = run(
            model,
            images,
            labels,
            loss_lambda=self.loss_lambda,
            step=step if self.online else None,
            trace_input=self.trace_input,
            dropout=dropout_factors(model, len(images), generator),
        )
        common.leave(model, done.gradients)
        return batch_of(model, done.logits, done.losses, done.counts, labels)


class OtttO(OtttA):
    """OTTT_O as a training method: a step of the optimiser at every time step."""

    online = True


def batch_of(model: FeedbackSNN, logits: Tensor, losses: Tensor, counts: tuple[Tensor, ...], labels: Tensor) -> Batch:
    """What methods with a loss at every step leave behind."""
    return Batch(
        loss=float(losses.sum()),
        correct=common.accuracy(logits.sum(0), labels),
        forward_rate=common.firing_rate(common.of_neurons(model, counts), model.time_steps),
        forward_rates=common.firing_rates(common.of_neurons(model, counts), model.time_steps),
    )
