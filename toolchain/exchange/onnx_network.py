"""A ReLU network as a spiking one of ours: rates in place of activations (Diehl et al., IJCNN 2015; Rueckauer et al., Frontiers in Neuroscience 2017).

With L the largest activation of a layer, a = ReLU(z) becomes the firing rate r = a / L of neurons that subtract A on a spike: in the equilibrium of soft reset r = clip(I / A, 0, 1), so the current
has to be I = A z / L. A weight between layers with L1 and L2 is therefore multiplied by A L1 / L2, a bias by A / L2, the readout's weights by its layer's L. Nothing else changes. L is the share
`PERCENTILE` of the layer's activations on training samples, or a bound that no input in [0, 1] passes; where a Clip ends lower, there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from toolchain import network as plain
from toolchain.errors import UsageError
from toolchain.exchange.onnx_branches import Branch, Layer, Step
from toolchain.exchange.onnx_relu import Relu
from toolchain.ir import Array

if TYPE_CHECKING:
    import torch

PERCENTILE = 99.9
"""Percent of a layer's activations on training samples that lie below its largest rate (Rueckauer et al. 2017)."""

EPS = 1e-5
"""Of the batch normalisation that stands for factors and shifts by channel; its variance is 1 less that."""

TIME_STEPS = 30
"""Where nobody says how many: rates are rounded to multiples of 1 / 30."""

LARGEST_LOOP = 2**24
"""Most weights of the feedback connection that is added where one is asked for."""


@dataclass(frozen=True)
class Made:
    """The network, its tensors by their names in the state dict, and the largest activation of each layer, which a rate of 1 stands for."""

    network: plain.Network
    tensors: dict[str, torch.Tensor]
    largest: tuple[float, ...]


def spiking(
    relu: Relu, largest: Sequence[float], *, name: str, time_steps: int | None, feedback: bool, normalize: plain.Normalization | None
) -> Made:
    """`relu` with firing rates that stand for activations up to `largest`, one number a layer.

    `feedback` adds a connection from the last layer to the first whose weights are 0: training can begin with it. `normalize` is what images go through before the file.
    """
    relu, own = _normalized(relu) if normalize is None else (relu, normalize)
    neuron = plain.Neuron()
    scale = {None: 1.0} | dict(enumerate(largest))
    connections: dict[str, plain.Connection] = {}
    skips: list[plain.Skip] = []
    tensors: dict[str, Array] = {}
    for number, layer in enumerate(relu.layers):
        before = number - 1 if number else None
        chain = next(i for i, branch in enumerate(layer.branches) if branch.source == before)
        for i, branch in enumerate(layer.branches):
            key = f"skip.{len(skips)}" if i != chain else "input" if number == 0 else f"hidden.{number - 1}"
            made = _connection(branch.steps, key, scale[branch.source], neuron.reset / largest[number], tensors)
            if i == chain:
                connections[key] = made
            else:
                skips.append(plain.Skip(branch.source, number, made))
    readout = _connection(relu.readout.steps, "readout", scale[relu.readout.source], 1.0, tensors)
    loops: tuple[plain.Feedback, ...] = ()
    if feedback:
        loops = (_loop(relu.layers, tensors),)
    network = plain.Network(
        name=name,
        input_shape=relu.input_shape,
        input=connections["input"],
        readout=readout,
        hidden=tuple(connections[f"hidden.{i}"] for i in range(len(relu.layers) - 1)),
        feedback=loops,
        neuron=neuron,
        normalize=own,
        skips=tuple(skips),
        time_steps=TIME_STEPS if time_steps is None else time_steps,
    )
    plain.check(network)
    return Made(network, _as_torch(tensors), tuple(largest))


def _connection(steps: Sequence[Step], key: str, before: float, behind: float, tensors: dict[str, Array]) -> plain.Connection:
    """The parts of a branch whose source's values are to be multiplied by `before` and what it makes by `behind`; its tensors are put into `tensors`."""
    numbers = [i for i, step in enumerate(steps) if step.weight is not None]
    scaled = list(steps)
    if numbers:
        first, last = numbers[0], numbers[-1]
        scaled[first] = replace(scaled[first], weight=np.asarray(scaled[first].weight, np.float64) * before)
        end = scaled[last]
        scaled[last] = replace(
            end,
            weight=np.asarray(end.weight, np.float64) * behind,
            bias=None if end.bias is None else np.asarray(end.bias, np.float64) * behind,
        )
    parts = [_part(step) for step in scaled]
    if not numbers and before * behind != 1:
        parts.append(plain.Scale(before * behind))
    if not parts:
        parts.append(plain.Identity())
    for i, step in enumerate(scaled):
        name = f"{key}.{i}" if len(parts) > 1 else key
        if step.affine:
            tensors |= {f"{name}.running_mean": np.zeros(len(_weight(step))), f"{name}.running_var": np.full(len(_weight(step)), 1 - EPS)}
            tensors[f"{name}.num_batches_tracked"] = np.zeros((), np.int64)
        if step.weight is not None:
            tensors[f"{name}.weight"] = _weight(step)
        if step.bias is not None:
            tensors[f"{name}.bias"] = np.asarray(step.bias)
    return parts[0] if len(parts) == 1 else plain.Chain(tuple(parts))


def _weight(step: Step) -> Array:
    assert step.weight is not None
    return step.weight


def _part(step: Step) -> plain.Part:
    return plain.BatchNorm(len(_weight(step)), images=step.image, eps=EPS) if step.part is None else step.part


def _loop(layers: Sequence[Layer], tensors: dict[str, Array]) -> plain.Feedback:
    """From the last layer to the first, all to all, with weights of 0: inference stays as it is."""
    into, out = prod(layers[-1].shape), prod(layers[0].shape)
    if into * out > LARGEST_LOOP:
        raise UsageError(
            f"a feedback connection from the last layer ({into:,} neurons) to the first ({out:,}) has {into * out:,} weights, more than {LARGEST_LOOP:,}: "
            "leave --feedback out, and add one of your own in PyTorch"
        )
    tensors["feedback.0.weight"] = np.zeros((out, into))
    return plain.Feedback(len(layers) - 1, 0, plain.Linear(into, out, bias=False))


def _normalized(relu: Relu) -> tuple[Relu, plain.Normalization | None]:
    """The file without factors and shifts that all it does with the input begins with, and these as normalisation."""
    branches = [branch for layer in relu.layers for branch in layer.branches if branch.source is None]
    firsts = [branch.steps[0] if branch.steps else None for branch in branches]
    step = firsts[0] if firsts else None
    if step is None or not step.affine or step.bias is None or any(other is not step for other in firsts):
        return relu, None
    factor = _weight(step)
    if not (factor > 0).all():
        return relu, None
    mean, std = -step.bias / factor, 1 / factor
    few = [values[:1] if (values == values[0]).all() else values for values in (mean, std)]
    if not (np.abs(mean) <= plain.LARGEST_INPUT).all() or not ((std >= 1 / plain.LARGEST_INPUT) & (std <= plain.LARGEST_INPUT)).all():
        return relu, None

    def without(branch: Branch) -> Branch:
        return replace(branch, steps=branch.steps[1:]) if branch.source is None else branch

    layers = tuple(replace(layer, branches=tuple(without(branch) for branch in layer.branches)) for layer in relu.layers)
    return replace(relu, layers=layers), plain.Normalization(*(tuple(float(n) for n in values) for values in few))


def _as_torch(tensors: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """In the types of a module's own; UsageError for what float32 does not hold."""
    import torch

    found = {}
    for name, tensor in tensors.items():
        with np.errstate(over="ignore"):
            values = np.array(tensor, np.int64 if tensor.dtype.kind == "i" else np.float32)
        if not np.isfinite(values).all():
            raise UsageError(f"'{name}' would hold numbers that are NaN, infinite or too large for float32: correct the network's weights")
        found[name] = torch.from_numpy(values)
    return found


# how large activations are


def bounds(relu: Relu, path: Path, normalize: plain.Normalization | None) -> tuple[float, ...]:
    """A bound on each layer's activations for inputs in [0, 1], by interval arithmetic (Diehl et al. 2015 take the sum of positive weights): no rate is ever cut, but rates are low."""
    import torch

    low, high = torch.zeros(1, *relu.input_shape, dtype=torch.float64), torch.ones(1, *relu.input_shape, dtype=torch.float64)
    if normalize is not None:
        shape = (1, -1, *[1] * (len(relu.input_shape) - 1))
        mean, std = (torch.tensor(values, dtype=torch.float64).reshape(shape) for values in (normalize.mean, normalize.std))
        low, high = (low - mean) / std, (high - mean) / std
    reached: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = {None: (low, high)}
    found: list[float] = []
    for number, layer in enumerate(relu.layers):
        sums = [_interval(branch, *reached[branch.source]) for branch in layer.branches]
        low, high = (torch.stack([ends[i].reshape(1, *layer.shape) for ends in sums]).sum(0).clamp(min=0) for i in (0, 1))
        if layer.limit is not None:
            low, high = low.clamp(max=layer.limit), high.clamp(max=layer.limit)
        reached[number] = low, high
        found.append(usable(float(high.max()), layer, path))
    return tuple(found)


def usable(value: float, layer: Layer, path: Path) -> float:
    """The largest activation of a layer, 1 where none is active; UsageError where it is no number that weights can be divided by."""
    capped = value if layer.limit is None else min(value, layer.limit)
    if not np.isfinite(capped) or capped > plain.LARGEST**0.5:
        raise UsageError(f"'{path}': the activations of ReLU '{layer.node}' reach {capped:g}: correct the network's weights")
    return capped if capped > 1 / plain.LARGEST**0.5 else 1.0


def _interval(branch: Branch, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a branch makes of values between `low` and `high`, (1, *shape)."""
    import torch

    for step in branch.steps:
        weight = None if step.weight is None else torch.from_numpy(np.asarray(step.weight, np.float64).copy())
        if weight is None:
            low, high = _computed(step, low, None), _computed(step, high, None)
            continue
        plus, minus = weight.clamp(min=0), weight.clamp(max=0)
        low, high = (
            _computed(step, low, plus) + _computed(step, high, minus),
            _computed(step, high, plus) + _computed(step, low, minus),
        )
        if step.bias is not None:
            shift = torch.from_numpy(np.asarray(step.bias, np.float64).copy()).reshape(1, -1, *[1] * (low.ndim - 2))
            low, high = low + shift, high + shift
    return low, high


def _computed(step: Step, values: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """A step, with `weight` in place of its own and without its bias."""
    import torch
    from torch import nn

    from toolchain.layers import connections

    if step.part is None:
        assert weight is not None
        return values * weight.reshape(1, -1, *[1] * (values.ndim - 2))
    module = connections.build(step.part).to(torch.float64)
    with torch.no_grad():
        if weight is not None:
            module.weight.copy_(weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        flat = values.flatten(1) if isinstance(step.part, plain.Linear) else values
        made: torch.Tensor = module(flat)
    return made
