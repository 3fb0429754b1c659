"""The implicit gradient on a target: forward equilibrium, error, feedback equilibrium by signed spikes, local updates (SPIDE, METHODS 3.2-3.3)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from toolchain import codec
from toolchain.analysis.equilibrium import Precision, feedback_equilibrium, forward_equilibrium
from toolchain.analysis.fidelity import Solved
from toolchain.compiler import lowered
from toolchain.deploy import Options, available, started
from toolchain.errors import UsageError
from toolchain.ir import Array, Graph, Op, leak_sum, weight_of
from toolchain.network import CLIPPED_FROM
from toolchain.notation import step_products
from toolchain.passes import FLOAT_PIPELINE
from toolchain.source import Model, Source, find
from toolchain.target import Executable, Result, get

if TYPE_CHECKING:
    from torch import Tensor, nn

    from toolchain.layers import FeedbackSNN

Floats = npt.NDArray[np.float64]

COARSE_WORK, COARSE_TOLERANCE = 2**28, 1e-5
"""Products of a step, of all samples together, above which equilibria are solved in float32, and to what."""


@dataclass(frozen=True)
class Feedback:
    """What both phases give for one batch.

    beta       feedback equilibrium by population, (samples, *shape), of the loss times `scale_factor`; unmasked
    masks      m = 1[0 < spike count < T] by population
    gradients  d(mean cross entropy)/d(parameter) at its true scale, by parameter name ("input.weight", "hidden.0.bias", ...). Of an artefact the
               parameters are its folded tensors, in the model's unit (normalisation and factors are part of the weights)
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
    labels = codec.plain(labels, "what is given as labels")
    forward = run.run(images)
    error = codec.output_error(graph, forward, labels, gain)
    return _found(graph, source, images, labels, forward, run.run(error, phase="feedback"), error, gain)


def exact(source: Source, images: Array, labels: Array) -> tuple[Feedback | None, Solved]:
    """The exact implicit gradient, without spikes: the equilibrium of the rates solved, then the linear equation of beta there, in float64 (in float32, to a coarser
    tolerance, where a step takes more than `COARSE_WORK` products), and how well they are solved; None, with the reason, where they are not."""
    graph = float_graph(source)
    if graph is None:
        return None, Solved(
            np.inf, np.inf, (0, 0), f"'{source.name}' was compiled without its float tensors, so nothing exact can be solved"
        )
    labels = codec.plain(labels, "what is given as labels")
    coarse = len(labels) * max(step_products(graph, phase) for phase in graph.phases) > COARSE_WORK
    precision = Precision("float32", COARSE_TOLERANCE) if coarse else Precision()
    forward, rates = forward_equilibrium(graph, images, precision)
    if not rates.converged:
        reason = f"the rates of '{source.name}' do not come to an equilibrium: residual {rates.residual:.2g} after {rates.iterations} iterations, so it has no implicit gradient there"
        return None, Solved(rates.residual, np.inf, (rates.iterations, 0), reason)
    gain = codec.error_drive(graph).gain
    error = codec.output_error(graph, forward, labels, gain)
    masks = {p.name: codec.mask(graph, forward, p.name) for p in graph.of_kind("couple")}
    back, beta = feedback_equilibrium(graph, masks, error, precision)
    reason = (
        f"the linear equation of '{source.name}' was not solved: relative residual {beta.residual:.2g} after {beta.iterations} iterations"
    )
    solved = Solved(rates.residual, beta.residual, (rates.iterations, beta.iterations), None if beta.converged else reason)
    return (_found(graph, source, images, labels, forward, back, error, gain) if beta.converged else None), solved


def in_floats(source: Source, images: Array, labels: Array) -> Feedback:
    """SPIDE in floats: both phases of target torch on a CPU."""
    with started(source, get("torch"), Options(device="cpu"), ("forward", "feedback")) as run:
        return both_phases(run, source, images, labels)


def float_graph(source: Source) -> Graph | None:
    """The folded float graph with its feedback phase, in the model's own time; None where an artefact was compiled without it, and for a network that has no graph."""
    from toolchain.lower import not_compiled

    if source.artifact is not None:
        return source.artifact.float_graph
    if source.module is None or not_compiled(source.module) is not None:
        return None
    return FLOAT_PIPELINE.until("adjoint")(lowered(source))


def _found(
    graph: Graph, source: Source, images: Array, labels: Array, forward: Result, back: Result, error: Array, gain: float
) -> Feedback:
    """What the results of both phases say."""
    couples = [p.name for p in graph.of_kind("couple")]
    beta = {name: codec.beta(graph, back, name) for name in couples}
    masks = {name: codec.mask(graph, forward, name) for name in couples}
    scores = codec.logits(graph, forward)
    return Feedback(
        beta=beta,
        masks=masks,
        gradients=_gradients(graph, source, images, labels, forward, back, gain),
        rates={name: codec.rates(graph, forward, name) for name in couples},
        logits=scores,
        loss=codec.cross_entropy(scores, labels),
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


def _gradients(graph: Graph, source: Source, images: Array, labels: Array, forward: Result, back: Result, gain: float) -> dict[str, Floats]:
    """Every connection learns from its own two ends: the gradient of the sum over the batch of <post, W a>, where `a` is the mean of what the source
    sent and `post` what the target's current is worth (METHODS 3.3)."""
    post = {p.name: _post(graph, forward, back, p.name) / gain for p in graph.populations if p.kind in ("couple", "linear")}
    delta = codec.logit_error(graph, forward, labels)
    if source.module is not None:
        return _of_parameters(source.module, graph, images, forward, post, delta)
    return _of_tensors(graph, images, forward, {**post, graph.of_kind("readout")[0].name: delta})


def _post(graph: Graph, forward: Result, back: Result, name: str) -> Floats:
    """d(gain * loss)/d(mean current) of a population, (samples, *shape) in the model's unit: (1/A) m beta, of a relay the mean of what reached it in the
    feedback phase."""
    if graph.population(name).kind == "linear":
        return codec.rates(graph, back, name) / graph.scale("feedback", name)
    return codec.beta(graph, back, name) * codec.mask(graph, forward, name) / codec.amplitude(graph, "forward", name)


def _mean(graph: Graph, forward: Result, name: str, leak: float) -> Floats:
    """What a population sent, weighted as a target of this leak weights it, in spikes; of a relay in the model's unit."""
    phase = graph.phase("forward")
    if graph.population(name).kind == "linear":
        return codec.rates(graph, forward, name) / graph.scale("forward", name)
    if leak != phase.dynamics[name].leak and leak == 1:
        return forward.counts[name] / phase.time_steps
    return codec.rates(graph, forward, name)


def _of_parameters(
    module: FeedbackSNN, graph: Graph, images: Array, forward: Result, post: dict[str, Floats], delta: Floats
) -> dict[str, Floats]:
    """By parameter of the torch module, whose own connections say what a parameter does (a copy, in float64)."""
    import torch

    from toolchain.layers import connections

    net = copy.deepcopy(module).to("cpu", torch.float64).eval()
    firing, found = net.firing(), dict[str, Floats]()
    names = [f"hidden{layer + 1}" for layer in range(net.layers)]
    values = codec.check_inputs(graph, images)
    for name, (source, target, connection) in net.connections().items():
        if source is None:
            sent = net.weighted_input(torch.from_numpy(np.ascontiguousarray(values)))
        else:
            sent = torch.from_numpy(_mean(graph, forward, names[source], net.leak)) * firing[source].amplitude
        worth = torch.from_numpy(post[names[target]]) * firing[target].gain
        found |= _differentiated(connection, name, connections.current, sent, worth)
    if net.readout is not None:
        leak = graph.phase("forward").dynamics[graph.of_kind("readout")[0].name].leak
        seen = torch.from_numpy(_mean(graph, forward, names[-1], leak)) * firing[-1].amplitude
        found |= _differentiated(net.readout, "readout", connections.current, seen, torch.from_numpy(delta))
    return found


def _differentiated(connection: nn.Module, name: str, current: Callable[..., Tensor], sent: Tensor, worth: Tensor) -> dict[str, Floats]:
    """d<worth, connection(sent)> by parameter that learns."""
    import torch

    parameters = {key: parameter for key, parameter in connection.named_parameters() if parameter.requires_grad}
    if not parameters:
        return {}
    with torch.set_grad_enabled(True):
        made = current(connection, sent, f"connection '{name}'").reshape(worth.shape)
        # the gain of a restricted weight takes no part while that is all 0
        gradients = torch.autograd.grad(made, list(parameters.values()), worth, materialize_grads=True)
    return {f"{name}.{key}": gradient.detach().numpy() for key, gradient in zip(parameters, gradients, strict=True)}


def _of_tensors(graph: Graph, images: Array, forward: Result, post: dict[str, Floats]) -> dict[str, Floats]:
    """By tensor of a folded graph. Where it is in integers the gradient is that of the floats they stand for."""
    phase = graph.phase("forward")
    entry = graph.of_kind("input")[0].name
    found: dict[str, Floats] = {}
    connections = [(s.source, s.target, s.ops) for s in phase.synapses] + [(entry, d.population, d.ops) for d in phase.drive]
    for source, target, ops in connections:
        leak = phase.dynamics[target].leak
        sent = _image(graph, images, leak) if source == entry else _mean(graph, forward, source, leak)
        for name, gradient in _of_weights(graph, ops, sent, post[target]).items():
            found[name] = found[name] + gradient if name in found else gradient
    for drive in phase.drive:
        if drive.bias is not None:
            found[drive.bias] = post[drive.population].sum(axis=0)
    for name, biases in phase.bias.items():
        for bias in biases:
            found[bias.tensor] = post[name].sum(axis=0)  # also where it starts a step late: at the equilibrium that is no difference
    return found


def _image(graph: Graph, images: Array, leak: float) -> Floats:
    """The input as folded weights see it; events as a mean over time, weighted as the target weights its currents."""
    values = codec.check_inputs(graph, images).astype(np.float64)
    if not graph.of_kind("input")[0].events:
        return values
    steps = values.shape[-1]
    weights = leak ** np.arange(steps - 1, -1, -1.0) / leak_sum(leak, steps)
    mean: Floats = values @ weights
    return mean


def _of_weights(graph: Graph, ops: Sequence[Op], sent: Floats, post: Floats) -> dict[str, Floats]:
    """d<post, ops(sent)> by weight."""
    import torch

    from toolchain.targets.torch_operations import TORCH, Composition

    weights = {
        name: torch.from_numpy(graph.tensors[name].astype(np.float64)).requires_grad_() for op in ops if (name := weight_of(op)) is not None
    }
    if not weights:
        return {}
    with torch.set_grad_enabled(True):
        through = Composition(ops, sent.shape[1:], post.shape[1:], graph.tensors, weights.__getitem__, convolutions=TORCH, sums=False)
        made = through(torch.from_numpy(_rows(sent)))
        gradients = torch.autograd.grad(made, list(weights.values()), torch.from_numpy(_rows(post)))
    return {name: gradient.numpy() for name, gradient in zip(weights, gradients, strict=True)}


def _rows(values: Array) -> Floats:
    return np.ascontiguousarray(values.reshape(len(values), -1).astype(np.float64))


def _share(parts: list[npt.NDArray[np.bool_]]) -> float:
    return float(np.concatenate([part.ravel() for part in parts]).mean())
