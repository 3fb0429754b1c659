"""IDE: implicit differentiation at the equilibrium of the rates (Xiao et al., NeurIPS 2021).

1. T steps of the network give rates a (`FeedbackSNN.equilibrium`; hidden batch normalisation uses its running statistics).
2. One application of the rate map with gradients, a~ = f(a): layer by layer clip(current / A, 0, 1) (of a relay the current), feedback from a. This also
   updates batch statistics.
3. The loss reads the spiking rates a; its gradient g = dL/da passes to a~ as if a~ were a. `solve` finds beta with (I - J^T) beta = g, J = df/da,
   from vector-Jacobian products only; beta then goes back through a~ = f(a) to every parameter.

J is taken at a for one layer and at f(a) for several, as the authors do. The state a holds the last layer and every layer that feeds back.

Solvers: "broyden" (theirs); "iter", beta <- beta + G(beta)/2 with G(beta) = J^T beta - beta + g, until the residual is gone;
"iter-compat", the authors' 30 steps of beta <- (beta + G(beta))/2, which end at (2 I - J^T)^-1 g: no gradient of this loss, but what their N-MNIST
script trains with. threshold 0 leaves beta = g (phantom gradient).

Where the authors' code departs from the method, this is what we do (`as_published=True` gives theirs):
- J uses the running statistics of batch normalisation, as the simulation does. Published: for several layers J uses the batch's, which couples samples.
- Running statistics take in each batch once. Published: those of the input connection take in a constant input twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from toolchain import processes
from toolchain.errors import unknown
from toolchain.layers import Equilibrium, FeedbackSNN, advance, current
from toolchain.layers.connections import Statistics
from toolchain.methods import Batch, common
from toolchain.methods.common import ReadoutError, dropout_factors, readout_error

__all__ = ["Ide", "Pass", "Solution", "broyden", "run", "solve"]

SOLVERS = ("broyden", "iter", "iter-compat")
TOLERANCE = 2e-10
"""Broyden's method is done where the residual's norm is below this times the root of the number of its values, or at float32's resolution."""

EXACT = 1e-12
"""The damped iteration is done where the residual's norm is below this times that of the error."""

ITERATIONS = 10
"""The damped iteration may take this many times the steps of Broyden's method, which converges faster."""


@dataclass(frozen=True)
class Solution:
    """beta (samples, values), the norm of its residual over the batch (of all processes), and after how many steps it was found."""

    beta: Tensor
    residual: float
    steps: int


@dataclass(frozen=True)
class Pass:
    """One batch: the forward equilibrium, the loss, g and beta in the state, and the gradients by parameter name.

    state      the layers whose rates make up the state, in order
    point      where J was taken; `error` g; `beta` the solution: a tensor (samples, *shape) for each of them
    """

    equilibrium: Equilibrium
    readout: ReadoutError
    state: tuple[int, ...]
    point: tuple[Tensor, ...]
    error: tuple[Tensor, ...]
    beta: tuple[Tensor, ...]
    solution: Solution
    gradients: dict[str, Tensor]


def rate_map(
    model: FeedbackSNN,
    mean_input: Tensor,
    rates: Mapping[int, Tensor],
    dropout: Mapping[str, Tensor],
    statistics: tuple[Statistics, Statistics],
) -> list[Tensor]:
    """f: every layer's rate, clip(current / A, 0, 1), given the `rates` (by layer) of those that feed back.

    `statistics`: what batch normalisation uses in the input connection and in the others.
    """
    made: list[Tensor] = []
    arriving: dict[int, Tensor] = {}
    for name, (source, target, module) in model.connections().items():
        if name.startswith("feedback."):
            shape = (len(mean_input), *model.layer_shapes()[target])
            back = _dropped(current(module, rates[source or 0], f"connection '{name}'").reshape(shape), dropout.get(name))
            arriving[target] = arriving[target] + back if target in arriving else back
    for layer, found in enumerate(model.arriving()):
        shape = (len(mean_input), *model.layer_shapes()[layer])
        total = mean_input.new_zeros(shape)
        for name, source, module in found:
            made_of = mean_input if source is None else made[source]
            one = current(module, made_of, f"connection '{name}'", statistics[source is not None]).reshape(shape)
            total = total + _dropped(one, dropout.get(name))
        total = total + arriving[layer] if layer in arriving else total
        made.append(total if layer in model.relays else (total / model.neuron.reset).clamp(0, 1))
    return made


def _dropped(values: Tensor, factor: Tensor | None) -> Tensor:
    return values if factor is None else values * factor


def solve(product: Callable[[Tensor], Tensor], error: Tensor, solver: str = "broyden", threshold: int = 30) -> Solution:
    """beta with (I - J^T) beta = error, (samples, values), given `product`: v -> J^T v; UsageError for an unknown solver."""
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)

    def residual(beta: Tensor) -> Tensor:
        return product(beta) - beta + error

    if threshold == 0:
        return Solution(error, processes.norm(residual(error)), 0)
    smallest = 4 * torch.finfo(error.dtype).eps * processes.norm(error)
    if solver == "broyden":
        return broyden(residual, torch.zeros_like(error), threshold, max(TOLERANCE * sqrt(error.numel() * processes.size()), smallest))
    if solver == "iter":
        return _damped(residual, error, threshold * ITERATIONS, max(EXACT * processes.norm(error), smallest))
    beta = error
    for _ in range(threshold):
        beta = (beta + residual(beta)) / 2
    return Solution(beta, processes.norm(residual(beta)), threshold)


def _damped(residual: Callable[[Tensor], Tensor], start: Tensor, steps: int, enough: float) -> Solution:
    beta, left = start, residual(start)
    for step in range(steps):
        if processes.norm(left) < enough:
            return Solution(beta, processes.norm(left), step)
        beta = beta + left / 2
        left = residual(beta)
    return Solution(beta, processes.norm(left), steps)


def broyden(residual: Callable[[Tensor], Tensor], start: Tensor, threshold: int, enough: float) -> Solution:
    """Broyden's "good" method for residual(beta) = 0, samples on their own; the best iterate is returned.

    The first step is -residual, as in the authors' code, though their first inverse Jacobian H = -I would have it +residual: the first update makes up
    for it. From then on every step is s = -H residual, so that one vector a step is all H needs (Kelley, Iterative Methods for Linear and Nonlinear
    Equations, 1995, section 7.3):  H' = (I + s' s^T / |s|^2) H.
    Stops at a residual below `enough`, after `threshold` steps, without progress over 30 steps near the goal, or where it blows up.
    """
    beta, left = start, residual(start)
    first = norm = processes.norm(left)
    norms, best = [norm], Solution(beta, norm, 0)
    began: tuple[Tensor, Tensor] | None = None
    steps: list[Tensor] = []
    weights: list[Tensor] = []
    for step in range(1, threshold + 1):
        if norm < enough:
            break
        if began is None:
            change = -left
        else:
            towards = torch.addcmul(left, began[0], -_along(began[1], left)).neg_()
            for before, after, weight in zip(steps, steps[1:], weights, strict=False):
                towards.addcmul_(after, _along(before, towards) * weight)
            change = -towards
            if steps:
                square = 1 / weights[-1]
                change *= square / (square + _along(steps[-1], towards))
                change.nan_to_num_(nan=0.0)  # a sample that is solved already divides 0 by 0
        beta, before = beta + change, left
        left = residual(beta)
        norm = processes.norm(left)
        norms.append(norm)
        if norm < best.residual:
            best = Solution(beta, norm, step)
        stuck = step > 30 and norm < 3 * enough and max(norms[-30:]) < 1.3 * min(norms[-30:])
        if norm < enough or stuck or norm > 1e6 * first:
            break
        if began is None:
            difference = left - before
            began = (change + difference) * _inverted(_along(change, difference)), change
        else:
            steps.append(change)
            weights.append(_inverted(_along(change, change)))
    return best


def _along(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each sample, (samples, 1)."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).squeeze(2)


def _inverted(values: Tensor) -> Tensor:
    """1 / values, 0 for 0."""
    return torch.where(values == 0, values, 1 / values)


def run(
    model: FeedbackSNN,
    x: Tensor,
    labels: Tensor,
    *,
    solver: str = "broyden",
    threshold: int = 30,
    dropout: Mapping[str, Tensor] | None = None,
    as_published: bool = False,
) -> Pass:
    """The implicit gradient of the mean cross entropy of one batch; UsageError where a layer does not fit.

    `dropout` holds a factor (samples, *target shape) by connection name. While training, restricted weights advance by one power iteration and batch
    statistics are updated.
    """
    common.fits_equilibrium(model, "ide")
    dropout = dropout or {}
    if model.training:
        advance(model)
    found = model.equilibrium(x, dropout=dropout)
    readout = readout_error(model, found.rates[-1], labels, 1.0)
    last = model.layers - 1
    state = tuple(sorted({source for source, _ in model.loops} | {last}))
    mean = model.weighted_input(x)
    rates = {layer: found.rates[layer].detach().requires_grad_() for layer in state}
    if as_published and model.training and not model.prepared(x)[1]:
        with torch.no_grad():
            current(model.input, mean, "the input connection", "learn")
    with torch.set_grad_enabled(True):
        mapped = rate_map(model, mean, rates, dropout, ("learn", "learn") if model.training else ("running", "running"))
    if model.layers == 1:
        point = rates
        product = _transposed_jacobian([mapped[layer] for layer in state], [rates[layer] for layer in state])
    else:
        point = {layer: mapped[layer].detach().requires_grad_() for layer in state}
        with torch.set_grad_enabled(True):
            again = rate_map(model, mean, point, dropout, _linear_statistics(model, as_published))
        product = _transposed_jacobian([again[layer] for layer in state], [point[layer] for layer in state])
    error = {layer: readout.error if layer == last else torch.zeros_like(rates[layer]) for layer in state}
    solution = solve(product, _joined([error[layer] for layer in state]), solver, threshold)
    beta = _split(solution.beta, [rates[layer] for layer in state])
    parameters = {name: p for name, p in common.trained(model).items() if not name.startswith("readout.")}
    grads = _vector_jacobian([mapped[layer] for layer in state], list(parameters.values()), beta)
    gradients = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), grads, strict=True)}
    places = tuple(point[layer].detach() for layer in state)
    return Pass(found, readout, state, places, tuple(error[layer] for layer in state), tuple(beta), solution, gradients | readout.gradients)


def _linear_statistics(model: FeedbackSNN, as_published: bool) -> tuple[Statistics, Statistics]:
    """What J uses: for the input what the simulation used, for the others the running statistics."""
    if not model.training:
        return "running", "running"
    return "batch", "batch" if as_published else "running"


def _transposed_jacobian(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """v -> J^T v, J = d outputs/d inputs, both as (samples, values of the state)."""

    def product(v: Tensor) -> Tensor:
        grads = _vector_jacobian(outputs, inputs, _split(v, inputs), keep=True)
        return _joined([torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)])

    return product


def _vector_jacobian(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor], *, keep: bool = False
) -> Sequence[Tensor | None]:
    """The vectors times d outputs/d inputs; None for an input that no output depends on."""
    pairs = [(output, vector) for output, vector in zip(outputs, vectors, strict=True) if output.requires_grad]
    if not pairs or not inputs:
        return [None] * len(inputs)
    ends, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(ends, inputs, weights, retain_graph=keep, allow_unused=True)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts], 1)


def _split(whole: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    pieces = torch.split(whole, [part[0].numel() for part in like], 1)
    return [piece.reshape(part.shape) for piece, part in zip(pieces, like, strict=True)]


class Ide(common.Stateless):
    """IDE as a training method; the settings are those of `run`."""

    def __init__(self, solver: str = "broyden", threshold: int = 30, as_published: bool = False) -> None:
        if solver not in SOLVERS:
            raise unknown("solver", solver, SOLVERS)
        self.solver, self.threshold, self.as_published = solver, threshold, as_published

    def fits(self, model: FeedbackSNN) -> None:
        common.fits_equilibrium(model, "ide")

    def gradients(
        self, model: FeedbackSNN, images: Tensor, labels: Tensor, generator: torch.Generator, step: Callable[[], object] | None = None
    ) -> Batch:
        done = run(
            model,
            images,
            labels,
            solver=self.solver,
            threshold=self.threshold,
            dropout=dropout_factors(model, len(images), generator),
            as_published=self.as_published,
        )
        common.leave(model, done.gradients)
        return Batch(
            loss=float(done.readout.loss),
            correct=common.accuracy(done.readout.logits, labels),
            forward_rate=common.firing_rate(common.of_neurons(model, done.equilibrium.counts), model.time_steps),
            forward_rates=common.firing_rates(common.of_neurons(model, done.equilibrium.counts), model.time_steps),
        )
