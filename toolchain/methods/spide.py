"""SPIDE: both stages of implicit differentiation by spikes (Xiao et al., Neural Networks 2023).

1. `forward_stage`: T steps of the network give rates a_l, spike counts, and masks m_l = 1[0 < count < T].
2. `feedback_stage`: the same synapses transposed, g = d(scale_factor * loss)/d a_last as a constant current into the last layer, T_B steps:

       J_l[t] = (1/A) W_l^T (m_{l+1} s_{l+1}[t])  (+ g at the last layer)  (+ (1/A) W_f^T (m_k s_k[t-1]) for a feedback connection l -> k)
       v = y + J;   q = 1[v >= Vb] - 1[v <= -Vb];   s = Ab q;   y = leak (v - s);   beta_l = (leak-weighted) mean of s

3. `local_gradients`: every connection learns from its own two ends, grad W = (1/A) sum over the batch of (m beta)_target a_source^T.

Where the authors' code departs from the method, this is what we do (`as_published=True` gives theirs, for comparison):
- Masks come from spike counts. Comparing a weighted LIF rate with 1 depends on rounding; both agree where no neuron fires at every step.
- A dropped synapse learns nothing: the dropout factor multiplies the local update too. Published: the factor acts in the dynamics only.
- Event inputs to leaky neurons are averaged with the leak's weights, as the equilibrium does. Published: plain mean over time.
- Gradients leave at their true scale (divided by scale_factor), so learning rate and weight decay mean what they say. Published: the scaled gradients
  meet lr / scale_factor, which divides the weight decay by scale_factor without saying so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from toolchain import processes
from toolchain.ir import leak_sum
from toolchain.layers import Equilibrium, FeedbackSNN, Map, advance, current
from toolchain.layers.stepping import Current, Kernel, Neurons, Stage, chosen
from toolchain.methods import Batch, common
from toolchain.methods.common import ReadoutError, dropout_factors, readout_error
from toolchain.network import CLIPPED_FROM

__all__ = [
    "Feedback",
    "Forward",
    "Pass",
    "Spide",
    "dropout_factors",
    "feedback_stage",
    "forward_stage",
    "local_gradients",
    "readout_error",
    "run",
]

AIM = 0.8
"""Of Ab: where the automatic scale factor wants the largest |beta| of a batch. From 0.98 a couple counts as clipped."""

FIRST_REACH = 1.6
"""How far beta exceeds g, at first: between 1.4 and 1.9 on trained networks with feedback, where the automatic scale factor learns it."""

LARGEST_FACTOR = 1e5

SURELY_SILENT = 0.99
"""Of the threshold: what T_B equal currents may add up to without firing, however their sum is rounded."""

AT_ONCE = 300_000
"""Neurons whose feedback steps torch runs together on a CPU: their state fits the second-level cache or nearly so."""


@dataclass(frozen=True)
class Forward:
    """The forward equilibrium with what the feedback stage and the updates need: masks (as floats) and dropout factors by connection name."""

    equilibrium: Equilibrium
    masks: tuple[Tensor, ...]
    dropout: Mapping[str, Tensor]


@dataclass(frozen=True)
class Feedback:
    """The feedback equilibrium, a tensor (samples, *shape) a layer.

    beta      (leak-weighted) mean of the signed spikes with their amplitude Ab; unmasked
    activity  int32, spikes of either sign
    clipped   bool, couples that fired with one sign at 98 % of the steps or more: beta is at its bound Ab, so scale_factor is too large
    trains    (T_B, samples, *shape) int8 in {-1, 0, 1}, where they were asked for
    """

    beta: tuple[Tensor, ...]
    activity: tuple[Tensor, ...]
    clipped: tuple[Tensor, ...]
    trains: tuple[Tensor, ...] = ()


def forward_stage(
    model: FeedbackSNN,
    x: Tensor,
    *,
    dropout: Mapping[str, Tensor] | None = None,
    as_published: bool = False,
    trace: bool = False,
    kernel: Kernel = "auto",
) -> Forward:
    """Stage 1 on inputs (samples, *input_shape) or events (time last): rates, counts, masks, and spike trains with `trace`."""
    dropout = dropout or {}
    found = model.equilibrium(x, dropout=dropout, trace=trace, kernel=kernel)
    if not as_published:
        found = replace(found, mean_input=model.weighted_input(x))
    dtype = found.rates[0].dtype
    masks = tuple(((c > 0) & (c < model.time_steps)).to(dtype) for c in found.counts)
    return Forward(found, masks, dropout)


@torch.no_grad()
def feedback_stage(
    model: FeedbackSNN, forward: Forward, error: Tensor, *, leak_back: bool = True, trace: bool = False, kernel: Kernel = "auto"
) -> Feedback:
    """Stage 2: `error` = d(scale_factor * loss)/d(last rates), (samples, *last shape), drives the transposed network for T_B steps.

    Without `leak_back` leaky neurons carry the gradient without leak. `kernel` says what runs the steps (see `layers.stepping`): the same equations,
    currents summed in another order.
    """
    leak = model.neuron.leak if leak_back else 1.0
    maps = model.maps()
    run_steps = _native_steps if chosen(kernel, list(maps.values()), error) else _torch_steps
    weighted, activity, trains = run_steps(model, maps, forward, error, leak, trace)
    norm = leak_sum(leak, model.feedback_steps)
    beta = tuple(w * model.neuron.reset_back / norm for w in weighted)
    return Feedback(
        beta=beta,
        activity=activity,
        clipped=tuple(b.abs() >= CLIPPED_FROM * model.neuron.reset_back for b in beta),
        trains=trains,
    )


Steps = tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]
"""(Leak-weighted) sums of signed spikes, spikes of either sign as int32, and trains where they were asked for, a layer each."""


def _native_steps(model: FeedbackSNN, maps: Mapping[str, Map], forward: Forward, error: Tensor, leak: float, trace: bool) -> Steps:
    """The feedback steps on the native kernel, layers in the order last to first."""
    neuron, last, shapes = model.neuron, model.layers - 1, model.layer_shapes()
    gates = [mask * (neuron.reset_back / neuron.reset) for mask in forward.masks]
    layers = [
        Neurons(shape, neuron.threshold_back, neuron.reset_back, error if layer == last else None)
        for layer, shape in reversed(list(enumerate(shapes)))
    ]
    currents = []
    for name, (source, target, _) in model.connections().items():
        if source is None:
            continue
        amplitude = gates[target] * forward.dropout[name] if name in forward.dropout else gates[target]
        late = name.startswith("feedback")
        currents.append(Current(last - target, last - source, maps[name], transposed=True, late=late, amplitude=amplitude))
    stage = Stage(layers, currents, len(error), leak=leak, signed=True, dtype=error.dtype)
    trains: list[list[Tensor]] = [[] for _ in shapes]
    for steps in [1] * model.feedback_steps if trace else [model.feedback_steps]:
        stage.run(steps)
        for layer, train in enumerate(trains if trace else []):
            train.append(stage.unpacked(stage.spikes[last - layer], last - layer).clone())
    weighted, activity = (
        tuple(stage.unpacked(values[last - layer], last - layer) for layer in range(model.layers)) for values in (stage.sums, stage.counts)
    )
    return weighted, activity, tuple(torch.stack(train) for train in trains) if trace else ()


def _torch_steps(model: FeedbackSNN, maps: Mapping[str, Map], forward: Forward, error: Tensor, leak: float, trace: bool) -> Steps:
    """The feedback steps in torch, on a CPU some samples at a time, so that their potentials stay in the cache.

    A sample whose error could not make one couple fire in all T_B steps stays silent, as nothing else drives it: it is left out, exactly.
    """
    neuron = model.neuron
    gates = [mask * (neuron.reset_back / neuron.reset) for mask in forward.masks]
    strongest = error.flatten(1).abs().amax(1)
    pieces: tuple[Tensor, ...] = (torch.arange(len(error), device=error.device),)
    if error.device.type == "cpu":
        order = strongest.argsort(descending=True)
        awake = order[~(strongest[order] * model.feedback_steps < SURELY_SILENT * neuron.threshold_back)]
        pieces = torch.split(awake, max(1, AT_ONCE // sum(prod(shape) for shape in model.layer_shapes())))
    weighted = tuple(torch.zeros_like(gate) for gate in gates)
    activity = tuple(torch.zeros_like(gate, dtype=torch.int32) for gate in gates)
    trains = (
        tuple(torch.zeros((model.feedback_steps, *gate.shape), dtype=torch.int8, device=gate.device) for gate in gates) if trace else ()
    )
    for rows in pieces:
        if len(rows) == 0:
            continue
        dropout = {name: factor[rows] for name, factor in forward.dropout.items()}
        sums, spikes, fired = _torch_piece(model, maps, [gate[rows] for gate in gates], dropout, error[rows], leak, trace)
        for layer in range(model.layers):
            weighted[layer][rows], activity[layer][rows] = sums[layer], spikes[layer].to(torch.int32)
            if trace:
                trains[layer][:, rows] = torch.stack(fired[layer])
    return weighted, activity, trains


def _torch_piece(
    model: FeedbackSNN,
    maps: Mapping[str, Map],
    gates: list[Tensor],
    dropout: Mapping[str, Tensor],
    error: Tensor,
    leak: float,
    trace: bool,
) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    """Sums, activity and trains of some samples. Where nothing fires nothing is multiplied; without leak a layer that nothing reaches does not move."""
    neuron, last = model.neuron, model.layers - 1
    potentials = [torch.zeros_like(gate) for gate in gates]
    spikes, below = [torch.zeros_like(p) for p in potentials], [torch.zeros_like(p) for p in potentials]
    sent, previous = [[torch.zeros_like(p) for p in potentials] for _ in range(2)]
    weighted = [torch.zeros_like(p) for p in potentials]
    activity = [torch.zeros_like(p) for p in potentials]
    trains: list[list[Tensor]] = [[] for _ in potentials]
    on_cpu = error.device.type == "cpu"  # elsewhere asking whether anything fired would wait for the device at every step
    fires, fired = [False] * len(gates), [False] * len(gates)
    for _ in range(model.feedback_steps):
        sent, previous = previous, sent
        fires, fired = [False] * len(gates), fires
        for layer in range(last, -1, -1):
            potential, spike = potentials[layer], spikes[layer]
            moved = layer == last or leak < 1 or fired[layer]
            if layer == last:
                potential += error
            elif fires[layer + 1]:
                _add_transposed(maps, f"hidden.{layer}", potential, sent[layer + 1], dropout)
                moved = True
            for index, (source, target) in enumerate(model.loops):
                if source == layer and fired[target]:
                    _add_transposed(maps, f"feedback.{index}", potential, previous[target], dropout)
                    moved = True
            if not moved:
                spike.zero_()
            else:
                torch.ge(potential, neuron.threshold_back, out=spike)
                torch.le(potential, -neuron.threshold_back, out=below[layer])
                spike -= below[layer]
                fires[layer] = not on_cpu or bool(spike.any())
                if fires[layer]:
                    potential.sub_(spike, alpha=neuron.reset_back)
                    activity[layer] += spike.abs()
                torch.mul(spike, gates[layer], out=sent[layer])
            if leak < 1:
                potential *= leak
                weighted[layer] *= leak
            if fires[layer]:
                weighted[layer] += spike
            if trace:
                trains[layer].append(spike.to(torch.int8))
    return weighted, activity, trains


def _add_transposed(maps: Mapping[str, Map], name: str, total: Tensor, spikes: Tensor, dropout: Mapping[str, Tensor]) -> None:
    """total += W^T (factor * spikes): the transpose of a connection whose currents were multiplied by its dropout factor."""
    maps[name].add_transposed(total, spikes * dropout[name] if name in dropout else spikes)


def local_gradients(model: FeedbackSNN, forward: Forward, beta: tuple[Tensor, ...], *, as_published: bool = False) -> dict[str, Tensor]:
    """Gradients of every parameter but the readout's, by name, of the scaled loss whose feedback equilibrium is `beta`."""
    found = forward.equilibrium
    gradients: dict[str, Tensor] = {}
    for name, (source, target, module) in model.connections().items():
        post = forward.masks[target] * beta[target] / model.neuron.reset
        if name in forward.dropout and not as_published:
            post = post * forward.dropout[name]
        pre = found.mean_input if source is None else found.rates[source]
        parameters = common.trained(module)
        if not parameters:
            continue
        with torch.set_grad_enabled(True):
            made = current(module, pre, f"connection '{name}'").reshape(post.shape)
        grads = torch.autograd.grad(made, list(parameters.values()), post)
        gradients |= {f"{name}.{key}": grad for key, grad in zip(parameters, grads, strict=True)}
    return gradients


@dataclass(frozen=True)
class Pass:
    """One batch through both stages: gradients of the scaled loss by parameter name (divide by `scale_factor` for the true ones)."""

    scale_factor: float
    forward: Forward
    readout: ReadoutError
    feedback: Feedback
    gradients: dict[str, Tensor]


def fits(model: FeedbackSNN) -> None:
    """UsageError, naming the layer, unless SPIDE can train `model`."""
    common.fits_equilibrium(model, "spide")
    common.refuse_batch_norm(model, "spide", "train with ide, or leave it out")
    common.refuse_streams(model, "spide", "train with ide, or leave it out")


def run(
    model: FeedbackSNN,
    x: Tensor,
    labels: Tensor,
    scale_factor: float | Callable[[Tensor], float],
    *,
    dropout: Mapping[str, Tensor] | None = None,
    as_published: bool = False,
    trace: bool = False,
    leak_back: bool = True,
    kernel: Kernel = "auto",
) -> Pass:
    """Forward stage, loss, feedback stage and local updates of one batch; UsageError where a layer does not fit.

    `scale_factor`: a number, or what chooses it given the unscaled error dL/d(last rates), (samples, *last shape).
    """
    fits(model)
    if model.training:
        advance(model)
    forward = forward_stage(model, x, dropout=dropout, as_published=as_published, trace=trace, kernel=kernel)
    last = forward.equilibrium.rates[-1]
    factor = scale_factor(readout_error(model, last, labels, 1.0).error) if callable(scale_factor) else scale_factor
    readout = readout_error(model, last, labels, factor)
    feedback = feedback_stage(model, forward, readout.error, leak_back=leak_back, trace=trace, kernel=kernel)
    gradients = local_gradients(model, forward, feedback.beta, as_published=as_published) | readout.gradients
    return Pass(factor, forward, readout, feedback, gradients)


class Spide:
    """SPIDE as a training method. `scale_factor` brings the error into the couples' resolution, Vb / T_B << |g| < Ab.

    "auto" chooses it for every batch, from the largest |g| of its error: such that the largest |beta| comes to 0.8 Ab, given how far beta exceeded g in
    the batches before (`reach`, smoothed over about 10). No couple clips then, which late in training matters more than resolution: a few hard samples
    carry the gradient, and theirs are the couples that would clip. `leak_back`: leaky neurons leak in the feedback stage, too. `kernel` says what runs
    both stages (see `layers.stepping`).
    """

    def __init__(self, scale_factor: float | str, leak_back: bool = True, kernel: Kernel = "auto") -> None:
        self.automatic = scale_factor == "auto"
        self.scale_factor = 1.0 if self.automatic else float(scale_factor)
        self.reach = FIRST_REACH
        self.leak_back, self.kernel = leak_back, kernel

    def fits(self, model: FeedbackSNN) -> None:
        fits(model)
        model.check_kernel(self.kernel)

    def gradients(
        self, model: FeedbackSNN, images: Tensor, labels: Tensor, generator: torch.Generator, step: Callable[[], object] | None = None
    ) -> Batch:
        dropout = dropout_factors(model, len(images), generator)
        factor = (lambda error: self._factor(model, error)) if self.automatic else self.scale_factor
        done = run(model, images, labels, factor, dropout=dropout, leak_back=self.leak_back, kernel=self.kernel)
        self.scale_factor = done.scale_factor
        common.leave(model, done.gradients, done.scale_factor)
        if self.automatic:
            self._learn_reach(model, done)
        return _batch(model, done, labels)

    def _factor(self, model: FeedbackSNN, error: Tensor) -> float:
        """The factor for a batch whose unscaled error is `error`."""
        largest = processes.kth_largest(error.abs().flatten(), 1)
        if not 0 < largest < float("inf"):
            return 1.0
        return min(max(AIM * model.neuron.reset_back / (self.reach * largest), 1.0), LARGEST_FACTOR)

    def _learn_reach(self, model: FeedbackSNN, done: Pass) -> None:
        driven = processes.kth_largest(done.readout.error.abs().flatten(), 1)
        reached = processes.kth_largest(torch.cat([beta.abs().flatten() for beta in done.feedback.beta]), 1)
        if not 0 < driven < float("inf") or reached == 0:
            return
        beyond = (
            1.25 if reached >= CLIPPED_FROM * model.neuron.reset_back else 1.0
        )  # a clipped couple does not tell how far it would have gone
        self.reach = self.reach**0.9 * max(beyond * reached / driven, 1.0) ** 0.1

    def state(self) -> dict[str, float]:
        return {"scale_factor": self.scale_factor, "reach": self.reach}

    def restore(self, state: dict[str, float]) -> None:
        self.scale_factor = state["scale_factor"]
        self.reach = state.get("reach", FIRST_REACH)


def _batch(model: FeedbackSNN, done: Pass, labels: Tensor) -> Batch:
    counts, activity = done.forward.equilibrium.counts, done.feedback.activity
    clipped = torch.cat([c.flatten() for c in done.feedback.clipped])
    return Batch(
        loss=float(done.readout.loss),
        correct=common.accuracy(done.readout.logits, labels),
        forward_rate=common.firing_rate(counts, model.time_steps),
        feedback_rate=common.firing_rate(activity, model.feedback_steps),
        clipped=float(clipped.float().mean()),
        silent=float((torch.cat([a.flatten() for a in activity]) == 0).float().mean()),
        forward_rates=common.firing_rates(counts, model.time_steps),
        feedback_rates=common.firing_rates(activity, model.feedback_steps),
    )
