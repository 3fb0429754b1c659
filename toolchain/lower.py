"""Lower a torch module to the graph: its own numbers in float64, one population a layer, one synapse a connection, nothing folded yet.

    input -> hidden1 -> hidden2 -> ... -> readout        same step, as skips are;   feedback connections arrive one step late

A connection becomes its parts' linear operations, in order. What it makes without any spikes (biases, batch normalisation's shift, the normalisation of the
input) becomes a bias of full shape, so that padded borders are exact; a feedback connection's acts from the second step on. Spikes of another amplitude than 1
scale what leaves their layer, a neuron's gain what reaches it (DSR). Dropout is left out, batch normalisation has its running statistics, restricted weights
their exact norm. The feedback phase is declared with its neurons and its injected error; pass `adjoint` gives it synapses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from hashlib import sha256
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from toolchain import ir
from toolchain.errors import GraphError
from toolchain.ir import Array, Bias, Drive, Dynamics, Graph, Phase, Population, Provenance, Synapse, Units, frozen
from toolchain.layers import FeedbackSNN, Gain, Limited, Normalize, Scale, Standardized, connections
from toolchain.layers.weights import weighted
from toolchain.network import output_shape, windows


class Place(NamedTuple):
    """Where a part of a connection stands: its name in the state dict, what reaches it and what it makes (without the samples), and whether a matrix came
    before it, so that its images are rows of values in the graph."""

    path: str
    source: ir.Shape
    made: ir.Shape
    flat: bool


class Made(NamedTuple):
    """Operations and the tensors they brought with them."""

    ops: tuple[ir.Op, ...]
    tensors: dict[str, Array]


class Connection(NamedTuple):
    """A connection in float64: its operations, their tensors, and the current that it makes without spikes, if any (target shape)."""

    ops: tuple[ir.Op, ...]
    tensors: dict[str, Array]
    constant: Array | None


def lower(model: FeedbackSNN) -> Graph:
    """The float graph of `model` in evaluation mode; GraphError names a part that cannot be lowered and the nearest that can."""
    reason = not_compiled(model)
    if reason is not None:
        raise GraphError(reason)
    require_finite(model)
    layers = [f"hidden{layer + 1}" for layer in range(model.layers)]
    shapes = model.layer_shapes()
    found = {name: _connection(model, name, source, module) for name, (source, _, module) in model.connections().items()}
    readout = Connection((), {}, None)
    if model.readout is not None:
        readout = _connection(model, "readout", model.layers - 1, model.readout)
    tensors = {key: tensor for made in (*found.values(), readout) for key, tensor in made.tensors.items()}
    bias = _biases(model, found, shapes, tensors)
    if readout.constant is not None:
        tensors["readout.bias"] = frozen(readout.constant.reshape(model.classes))
        bias["readout"] = (Bias("readout.bias"),)
    if model.normalize is not None:
        tensors |= {"normalize.scale": frozen(1 / _values(model.normalize.settings.std))}
    forward = Phase(
        name="forward",
        time_steps=model.time_steps,
        order=("input", *layers, "readout"),
        dynamics=_forward_dynamics(model, layers),
        synapses=_synapses(model, found, readout, layers),
        bias=bias,
    )
    used = ir.tensor_names(forward)
    graph = Graph(
        populations=(
            Population("input", model.input_shape, "input", events=takes_events(model)),
            *(
                Population(name, shape, "linear" if layer in model.relays else "couple")
                for layer, (name, shape) in enumerate(zip(layers, shapes, strict=True))
            ),
            Population("readout", (model.classes,), "readout"),
        ),
        phases=(forward, _feedback(model, layers)),
        tensors={name: tensor for name, tensor in tensors.items() if name in used},
        units=Units("float", {}),
        provenance=Provenance(model=model.name, source_sha256=fingerprint(model)),
    )
    ir.verify(graph)
    return graph


def takes_events(model: FeedbackSNN) -> bool:
    """Whether the data of `model` change from step to step: as its attribute `events` says; where it has none, whether its samples are images of the two
    channels of an event camera (off and on), as those of all event sets are and of no set of still images."""
    return len(model.input_shape) == 3 and model.input_shape[0] == 2 if model.events is None else model.events


def fingerprint(model: FeedbackSNN) -> str:
    """sha256 of the weights: names, shapes, types and bytes, in the order of their names."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = _array(tensor)
        digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


# What cannot be compiled.


def not_compiled(model: FeedbackSNN) -> str | None:
    """Why the graph cannot say what `model` is, one sentence; None where it can."""
    modules = {name: module for name, (_, _, module) in model.connections().items()}
    for name, module in {**modules, **({} if model.readout is None else {"readout": model.readout})}.items():
        where = f"connection '{name}' of '{model.name}'"
        for path, part in _parts(name, module):
            if type(part) not in OPERATIONS:
                kind = type(part).__name__
                named = where if path == name else f"part '{path}' of {where}"
                return f"{named} is a {kind}, which is not compiled: {connections.nearest(kind)}"
    ends = {name: source for name, (source, _, _) in model.connections().items()} | {"readout": model.layers - 1}
    shapes = model.layer_shapes()
    for name, module in {**modules, **({} if model.readout is None else {"readout": model.readout})}.items():
        source = ends[name]
        reason = _not_one_weight(name, module, model.input_shape if source is None else shapes[source])
        if reason is not None:
            return f"connection '{name}' of '{model.name}' {reason}"
    return None


def _not_one_weight(name: str, module: nn.Module, shape: ir.Shape) -> str | None:
    """A connection has one operation with weights on the chip; matrices in a row are one."""
    weights: list[tuple[str, nn.Module]] = []
    for place, part in _places(name, module, shape):
        matrix = not isinstance(part, nn.Linear) and _becomes_matrix(part, place)
        if matrix and prod(place.source) * prod(place.made) > ir.LARGEST_MATRIX:
            return (
                f"makes {place.made} of {place.source} in unequal windows, a matrix of {prod(place.source) * prod(place.made):,} entries, more than "
                f"{ir.LARGEST_MATRIX:,}: choose a size that divides {place.source[1]} x {place.source[2]}"
            )
        if matrix or isinstance(part, WEIGHTED):
            weights.append((place.path, part))
    if len(weights) < 2 or all(not _convolves(part) for _, part in weights):
        return None
    listed = ", ".join(f"'{path}' ({type(part).__name__})" for path, part in weights)
    return f"has several parts with weights, {listed}: put a layer of neurons or a relay between them"


def _convolves(part: nn.Module) -> bool:
    return isinstance(_weighing(part), (nn.Conv2d, nn.ConvTranspose2d))


def require_finite(model: FeedbackSNN) -> None:
    """GraphError names a weight that holds NaN or infinite values."""
    for name, value in model.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise GraphError(
                f"tensor '{name}' of '{model.name}' holds NaN or infinite values: train again with a lower learning rate, or restore the checkpoint"
            )


# Connections.


@torch.no_grad()
def _connection(model: FeedbackSNN, name: str, source: int | None, module: nn.Module) -> Connection:
    exact = _exact(module)
    shape = model.input_shape if source is None else model.layer_shapes()[source]
    ops: list[ir.Op] = []
    tensors: dict[str, Array] = {}
    for place, part in _places(name, exact, shape):
        made = OPERATIONS[type(part)](part, place)
        ops.extend(made.ops)
        tensors |= made.tensors
    if source is None and model.normalize is not None:
        image = _constant_image(model.normalize, model.input_shape)
        constant: Tensor | None = connections.current(exact, image, f"connection '{name}'")
    else:
        constant = connections.constant(exact, shape, f"connection '{name}'")
    return Connection(tuple(ops), tensors, None if constant is None else _array(constant)[0])


def _exact(module: nn.Module) -> nn.Module:
    """A copy in float64, on the CPU and in evaluation mode: restricted weights by their exact norm, batch normalisation by its running statistics."""
    return deepcopy(module).to("cpu", torch.float64).eval()


def _parts(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The parts of a connection by their names in the state dict."""
    if type(module) is nn.Sequential:
        return [(f"{name}.{i}", part) for i, part in enumerate(module)]
    return [(name, module)]


def _places(name: str, module: nn.Module, shape: ir.Shape) -> list[tuple[Place, nn.Module]]:
    """The parts of a connection whose source has `shape`, each with its place."""
    found, flat = [], False
    for path, part in _parts(name, module):
        place = Place(path, shape, _shape_of(part, shape, f"connection '{name}'"), flat)
        found.append((place, part))
        shape, flat = place.made, len(place.made) == 3 and (flat or _becomes_matrix(part, place))
    return found


def _shape_of(part: nn.Module, shape: ir.Shape, where: str) -> ir.Shape:
    return output_shape(connections.describe(part, where), shape, where)


def _constant_image(normalize: Normalize, shape: ir.Shape) -> Tensor:
    """What normalisation adds to every sample, (1, *input shape): -mean / std in every channel."""
    offset = _values(normalize.settings.mean) / _values(normalize.settings.std)
    image = np.broadcast_to(-offset.reshape(-1, *[1] * (len(shape) - 1)), shape)
    return torch.from_numpy(image[None].copy())


def _values(numbers: tuple[float, ...]) -> Array:
    return np.asarray(numbers, np.float64)


def _array(tensor: Tensor) -> Array:
    values = tensor.detach().cpu()
    found: Array = (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # NumPy has no bfloat16
    return found


# Parts.


def _weighing(part: nn.Module) -> nn.Module:
    """The operation behind a restricted or standardised weight."""
    return part.op if isinstance(part, (Limited, Standardized)) else part


def _weighted(part: nn.Module, place: Place) -> Made:
    """A connection with weights; its weight's name is the parameter's, of a restricted or standardised one the module's."""
    op, weight = weighted(part, f"connection '{place.path}'")
    name = f"{place.path}.weight"
    tensors = {name: frozen(_array(weight))}
    if isinstance(op, nn.Linear):
        return Made((ir.Dense(name),), tensors)
    stride, padding, dilation = _pair(op.stride), _pair(op.padding), _pair(op.dilation)
    if isinstance(op, nn.Conv2d):
        return Made((ir.Conv2d(name, stride, padding, dilation, op.groups),), tensors)
    return Made((ir.ConvTranspose2d(name, stride, padding, _pair(op.output_padding), dilation, op.groups),), tensors)


def _pair(value: Any) -> tuple[int, int]:
    down, across = (value, value) if isinstance(value, int) else value
    return int(down), int(across)


def _pool(part: nn.AvgPool2d, place: Place) -> Made:
    if place.flat:
        return _matrix(part, place)
    return Made((ir.AvgPool2d(_pair(part.kernel_size), _pair(part.stride), _pair(part.padding)),), {})


def _adaptive(part: nn.AdaptiveAvgPool2d, place: Place) -> Made:
    op = _fitted(place)
    return _matrix(part, place) if place.flat or op is None else Made((op,), {})


def _fitted(place: Place) -> ir.Op | None:
    """Adaptive pooling as one operation: windows of one size, one step apart, are a plain pool, repeated values an upsampling. None for all others."""
    axes = list(zip(place.source[1:], place.made[1:], strict=True))
    repeats = {made // source for source, made in axes if made % source == 0}
    if len(repeats) == 1 and all(made % source == 0 for source, made in axes):
        return ir.Upsample(repeats.pop())
    pooled = [_regular(source, made) for source, made in axes]
    down, across = pooled
    return None if down is None or across is None else ir.AvgPool2d((down[0], across[0]), (down[1], across[1]))


def _regular(size: int, wanted: int) -> tuple[int, int] | None:
    """(window, step) of an adaptive pool along one axis, or None where windows or steps differ."""
    found = windows(size, wanted)
    sizes = {stop - start for start, stop in found}
    steps = {after[0] - before[0] for before, after in pairwise(found)} or {size}
    return (sizes.pop(), steps.pop()) if len(sizes) == len(steps) == 1 and min(steps) >= 1 else None


def _upsample(part: nn.Upsample, place: Place) -> Made:
    return _matrix(part, place) if place.flat else Made((ir.Upsample(int(cast(float, part.scale_factor))),), {})


def _becomes_matrix(part: nn.Module, place: Place) -> bool:
    """Whether a pool or an upsampling is a matrix in the graph: where its windows differ, or a matrix came before it."""
    if isinstance(part, nn.AdaptiveAvgPool2d):
        return place.flat or _fitted(place) is None
    return place.flat and isinstance(part, (nn.AvgPool2d, nn.Upsample))


def _matrix(part: nn.Module, place: Place) -> Made:
    """A pool or an upsampling as a matrix from all values to all values: the same for every channel, read off the images of single values."""
    channels, height, width = place.source
    singles = torch.eye(height * width, dtype=torch.float64).reshape(-1, 1, height, width)
    plane = _array(part(singles)).reshape(height * width, -1).T
    name = f"{place.path}.weight"
    return Made((ir.Dense(name),), {name: frozen(np.kron(np.eye(channels), plane))})


def _norm(part: nn.BatchNorm1d | nn.BatchNorm2d, place: Place) -> Made:
    """Batch normalisation's factor a channel; its shift is part of the connection's constant."""
    assert part.running_var is not None  # the front end refuses modules without running statistics
    factor = _array(part.weight / (part.running_var + part.eps).sqrt())
    name = f"{place.path}.scale"
    return Made((ir.Scale(weight=name),), {name: frozen(np.repeat(factor, prod(place.made[1:])) if place.flat else factor)})


WEIGHTED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, Limited, Standardized)

OPERATIONS: dict[type[nn.Module], Callable[[Any, Place], Made]] = {
    **dict.fromkeys(WEIGHTED, _weighted),
    nn.AvgPool2d: _pool,
    nn.AdaptiveAvgPool2d: _adaptive,
    nn.Upsample: _upsample,
    nn.BatchNorm1d: _norm,
    nn.BatchNorm2d: _norm,
    Scale: lambda part, _: Made((ir.Scale(part.factor),), {}),
    Gain: lambda part, _: Made((ir.Scale(float(part.gain)),), {}),
    nn.Identity: lambda part, _: Made((ir.Identity(),), {}),
}
"""What a part of a connection becomes; a new kind is one more entry."""


# The graph.


def _forward_dynamics(model: FeedbackSNN, layers: list[str]) -> dict[str, Dynamics]:
    found = {}
    for layer, (name, firing) in enumerate(zip(layers, model.firing(), strict=True)):
        neurons = Dynamics(leak=model.leak, threshold=firing.threshold, reset=firing.reset, members="plus")
        found[name] = RELAY if layer in model.relays else neurons
    return {**found, "readout": Dynamics(leak=model.leak if model.weighted_readout else 1.0)}


RELAY = Dynamics(leak=1, members="graded")


def _synapses(model: FeedbackSNN, found: Mapping[str, Connection], readout: Connection, layers: list[str]) -> tuple[Synapse, ...]:
    firing = model.firing()
    made = []
    for name, (source, target, _) in model.connections().items():
        before = _normalization(model.normalize) if source is None else _factor(firing[source].amplitude)
        ops = (*before, *found[name].ops, *_factor(firing[target].gain))
        delay = 1 if name.startswith("feedback.") else 0
        made.append(Synapse("input" if source is None else layers[source], layers[target], ops, delay=delay))
    ops = (*_factor(firing[-1].amplitude), *(readout.ops or (ir.Identity(),)))
    return (*made, Synapse(layers[-1], "readout", ops))


def _factor(value: float) -> tuple[ir.Op, ...]:
    return () if value == 1 else (ir.Scale(value),)


def _normalization(normalize: Normalize | None) -> tuple[ir.Op, ...]:
    """One factor for all channels, or one a channel."""
    if normalize is None:
        return ()
    std = normalize.settings.std
    return (ir.Scale(1 / std[0]),) if len(set(std)) == 1 else (ir.Scale(weight="normalize.scale"),)


def _biases(
    model: FeedbackSNN, found: Mapping[str, Connection], shapes: tuple[ir.Shape, ...], tensors: dict[str, Array]
) -> dict[str, tuple[Bias, ...]]:
    """What each layer receives at every step without a spike, and from the second step on by feedback. The tensors are put into `tensors` under
    the connection's name, where several connections share one under the population's."""
    bias: dict[str, tuple[Bias, ...]] = {}
    firing = model.firing()
    for layer, shape in enumerate(shapes):
        for start, kind in ((0, "bias"), (1, "late_bias")):
            named = {
                name: found[name].constant
                for name, (_, target, _) in model.connections().items()
                if target == layer and name.startswith("feedback.") == (start == 1) and found[name].constant is not None
            }
            if named and start < model.time_steps:
                population = f"hidden{layer + 1}"
                key = f"{next(iter(named))}.bias" if len(named) == 1 else f"{population}.{kind}"
                total = sum(cast(Array, constant).reshape(shape) for constant in named.values())
                tensors[key] = frozen(total * firing[layer].gain, np.float64)
                bias[population] = (*bias.get(population, ()), Bias(key, start=start))
    return bias


def _feedback(model: FeedbackSNN, layers: list[str]) -> Phase:
    """The feedback phase as `adjoint` takes it. A layer whose forward spikes subtract V (DSR) has its feedback threshold and reset times V / A, A being the
    reset of `model.neuron`: all layers keep one ratio of forward to feedback reset, the unit that `adjoint` measures in."""
    neuron, dynamics = model.neuron, {}
    for layer, (name, firing) in enumerate(zip(layers, model.firing(), strict=True)):
        share = firing.reset / neuron.reset
        neurons = Dynamics(leak=model.leak, threshold=neuron.threshold_back * share, reset=neuron.reset_back * share, members="both")
        dynamics[name] = RELAY if layer in model.relays else neurons
    return Phase(
        name="feedback",
        time_steps=model.feedback_steps,
        order=tuple(reversed(layers)),
        dynamics=dynamics,
        synapses=(),
        drive=(Drive(layers[-1], "error", gain=model.scale_factor),),
    )
