"""Lower a torch module to the graph: its own numbers in float64, one population a layer, one synapse a connection, nothing folded yet.

    input -> hidden1 -> hidden2 -> ... -> readout        same step;   feedback connections arrive one step late

Normalisation becomes a scale before the first weight and a bias; dropout is left out. The feedback phase is declared with its neurons and its injected
error; pass `adjoint` gives it synapses.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from toolchain import ir
from toolchain.errors import GraphError
from toolchain.ir import Array, Bias, Drive, Dynamics, Graph, Phase, Population, Provenance, Scale, Synapse, Units, frozen
from toolchain.layers import FeedbackSNN, Normalize, connections
from toolchain.network import has_bias

Lowered = Callable[[Any, str], tuple[ir.Op, ...]]

OPERATIONS: dict[type[nn.Module], Lowered] = {nn.Linear: lambda module, name: (ir.Dense(f"{name}.weight"),)}
"""What a connection of each kind becomes; a new kind of connection is one more entry."""


def lower(model: FeedbackSNN) -> Graph:
    """The float graph of `model`; GraphError names a layer that cannot be lowered and the nearest that can."""
    reason = not_compiled(model)
    if reason is not None:
        raise GraphError(reason)
    operations = {name: OPERATIONS[type(module)](module, name) for name, module in _modules(model).items()}
    tensors = {name: frozen(_array(value), np.float64) for name, value in model.state_dict().items()}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise GraphError(
                f"tensor '{name}' of '{model.name}' holds NaN or infinite values: train again with a lower learning rate, or restore the checkpoint"
            )
    shapes = model.layer_shapes()
    couples = [f"hidden{layer + 1}" for layer in range(model.layers)]
    order = ("input", *couples, "readout")
    forward = Phase(
        name="forward",
        time_steps=model.time_steps,
        order=order,
        dynamics=_forward_dynamics(model, couples),
        synapses=_synapses(model, operations, couples),
        bias=_biases(model, tensors, shapes, couples),
    )
    graph = Graph(
        populations=(
            Population("input", model.input_shape, "input"),
            *(Population(name, shape, "couple") for name, shape in zip(couples, shapes, strict=True)),
            Population("readout", (model.classes,), "readout"),
        ),
        phases=(forward, _feedback(model, couples)),
        tensors=tensors,
        units=Units("float", {}),
        provenance=Provenance(model=model.name, source_sha256=fingerprint(model)),
    )
    ir.verify(graph)
    return graph


def not_compiled(model: FeedbackSNN) -> str | None:
    """Why the graph cannot say what `model` is, one sentence; None where it can."""
    if model.trained_threshold is not None:
        return f"the neurons of '{model.name}' have trained thresholds (DSR), which are not compiled yet: use couples (network.neuron)"
    if model.readout is None:
        return f"'{model.name}' has no readout, which is not compiled yet: end it with a Linear"
    for layer in model.relays:
        return f"layer {layer} of '{model.name}' is a relay, which is not compiled yet: use layers of neurons"
    for index, (source, target) in enumerate(model.shortcuts):
        start = "the input" if source is None else f"layer {source}"
        return f"skip {index} of '{model.name}' leads from {start} to layer {target}, which is not compiled yet: leave it out"
    for index, module in enumerate(model.feedback):
        if has_bias(connections.describe(module, f"feedback {index}")):
            return f"feedback {index} of '{model.name}' has a bias, which is not compiled yet: give bias to the forward connections only"
    for name, module in _modules(model).items():
        if type(module) not in OPERATIONS:
            kinds = " or ".join(kind.__name__ for kind in OPERATIONS)
            return f"connection '{name}' of '{model.name}' is a {type(module).__name__}, which is not compiled yet: use {kinds}"
    return _normalization_not_compiled(model)


def _normalization_not_compiled(model: FeedbackSNN) -> str | None:
    if model.normalize is None or len(set(model.normalize.settings.std)) == 1:
        return None
    return f"the normalisation of '{model.name}' has a standard deviation a channel, which is not compiled yet: use one for all channels"


def fingerprint(model: FeedbackSNN) -> str:
    """sha256 of the weights: names, shapes, types and bytes, in the order of their names."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = _array(tensor)
        digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _array(tensor: Tensor) -> Array:
    found: Array = tensor.detach().cpu().numpy()
    return found


def _modules(model: FeedbackSNN) -> dict[str, nn.Module]:
    return {**{name: module for name, (_, _, module) in model.connections().items()}, "readout": cast(nn.Module, model.readout)}


def _forward_dynamics(model: FeedbackSNN, couples: list[str]) -> dict[str, Dynamics]:
    neuron = model.neuron
    found = {name: Dynamics(leak=neuron.leak, threshold=neuron.threshold, reset=neuron.reset, members="plus") for name in couples}
    return {**found, "readout": Dynamics(leak=neuron.leak if model.weighted_readout else 1.0)}


def _synapses(model: FeedbackSNN, operations: dict[str, tuple[ir.Op, ...]], couples: list[str]) -> tuple[Synapse, ...]:
    found = []
    for name, (source, target, _) in model.connections().items():
        ops = operations[name] if name != "input" else (*_scale(model.normalize), *operations[name])
        delay = 1 if name.startswith("feedback.") else 0
        found.append(Synapse("input" if source is None else couples[source], couples[target], ops, delay=delay))
    return (*found, Synapse(couples[-1], "readout", operations["readout"]))


def _scale(normalize: Normalize | None) -> tuple[ir.Op, ...]:
    return () if normalize is None else (Scale(1 / normalize.settings.std[0]),)


def _biases(model: FeedbackSNN, tensors: dict[str, Array], shapes: tuple[tuple[int, ...], ...], couples: list[str]) -> dict[str, tuple[Bias, ...]]:
    """What each layer receives at every step without a spike: full-shape tensors under their parameters' names; layer 0's holds the constant
    part of the normalisation too."""
    chain = [name for name in model.connections() if not name.startswith("feedback.")]
    constants = {name: tensors.get(f"{name}.bias") for name in chain} | {"input": _input_bias(model, tensors)}
    found = {}
    for couple, shape, (name, constant) in zip(couples, shapes, constants.items(), strict=True):
        if constant is not None:
            found[couple] = (Bias(f"{name}.bias"),)
            tensors[f"{name}.bias"] = frozen(np.broadcast_to(constant, shape))
    return {**found, "readout": (Bias("readout.bias"),)} if "readout.bias" in tensors else found


def _input_bias(model: FeedbackSNN, tensors: dict[str, Array]) -> Array | None:
    bias = tensors.get("input.bias")
    if model.normalize is None:
        return bias
    mean, std = (np.asarray(values) for values in (model.normalize.settings.mean, model.normalize.settings.std))
    channels = (-1,) + (1,) * (len(model.input_shape) - 1)
    offset = np.broadcast_to((mean / std).reshape(channels), model.input_shape).ravel()
    constant: Array = -(tensors["input.weight"] @ offset)
    return constant if bias is None else bias + constant


def _feedback(model: FeedbackSNN, couples: list[str]) -> Phase:
    neuron = model.neuron
    dynamics = Dynamics(leak=neuron.leak, threshold=neuron.threshold_back, reset=neuron.reset_back, members="both")
    return Phase(
        name="feedback",
        time_steps=model.feedback_steps,
        order=tuple(reversed(couples)),
        dynamics=dict.fromkeys(couples, dynamics),
        synapses=(),
        drive=(Drive(couples[-1], "error", gain=model.scale_factor),),
    )
