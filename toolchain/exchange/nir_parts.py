"""What a node of a connection in a NIR file of another library becomes: parts of a network of ours, with their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from toolchain import network
from toolchain.errors import GraphError
from toolchain.ir import Array
from toolchain.network import Chain, Connection, Part


@dataclass(frozen=True)
class Made:
    """A part of a connection with its weights by their names in the part."""

    part: Part
    tensors: dict[str, Array]


def parts_of(node: str, value: Any) -> list[Made]:
    """What a node becomes; a new kind is one more branch."""
    kind = type(value).__name__
    if kind == "Flatten":
        shape, made = np.asarray(value.input_type["input"]).reshape(-1), np.asarray(value.output_type["output"]).reshape(-1)
        if len(made) != 1 and len(made) != len(shape):
            raise GraphError(f"node '{node}' folds {tuple(shape)} into {tuple(made)}: only a whole image becomes a row here")
        return []  # a Linear takes images as rows
    if kind in ("Affine", "Linear"):
        weight = np.asarray(value.weight)
        if weight.ndim != 2:
            raise GraphError(f"node '{node}' has a weight of shape {weight.shape}: a fully connected connection needs (outputs, inputs)")
        bias = {"bias": np.asarray(value.bias).reshape(-1)} if kind == "Affine" else {}
        if bias and bias["bias"].shape != weight.shape[:1]:
            raise GraphError(f"node '{node}' has {bias['bias'].size} biases for {weight.shape[0]} outputs: correct the file")
        return [Made(network.Linear(weight.shape[1], weight.shape[0], bias=bool(bias)), {"weight": weight, **bias})]
    if kind == "Conv2d":
        return [_convolution(node, value)]
    if kind == "Scale":
        return _scaled(node, value)
    sides = [_pair(node, value, field) for field in ("kernel_size", "stride", "padding")]
    if any(down != across for down, across in sides):
        raise GraphError(f"node '{node}' pools windows of {sides[0]}, steps {sides[1]}, padding {sides[2]}: pools are square here")
    (kernel, _), (stride, _), (padding, _) = sides
    if min(kernel, stride) < 1 or padding < 0:
        raise GraphError(f"node '{node}' pools windows of {kernel}, steps {stride}, padding {padding}: correct the file")
    pool = Made(network.AvgPool2d(kernel, stride, padding), {})
    return [pool] if kind == "AvgPool2d" else [pool, Made(network.Scale(float(kernel**2)), {})]


def _convolution(node: str, value: Any) -> Made:
    weight = np.asarray(value.weight)
    if weight.ndim != 4:
        raise GraphError(f"node '{node}' has a weight of shape {weight.shape}: a convolution needs four axes, channels and kernel")
    groups, _ = _pair(node, value, "groups")
    stride, dilation = _pair(node, value, "stride"), _pair(node, value, "dilation")
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    if isinstance(value.padding, str):
        spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if value.padding == "same" and (stride != (1, 1) or any(span % 2 for span in spans)):
            raise GraphError(f"node '{node}' pads unevenly ('same'): give it an odd kernel and stride 1, or numbers")
        padding = (spans[0] // 2, spans[1] // 2) if value.padding == "same" else (0, 0)
    else:
        padding = _pair(node, value, "padding")
    bias = np.asarray(value.bias, np.float64).reshape(-1)
    if bias.shape != weight.shape[:1] or groups < 1 or min(*stride, *dilation) < 1 or min(padding) < 0:
        raise GraphError(
            f"node '{node}' has {bias.size} biases, {groups} groups, stride {stride} and padding {padding}, which fit no convolution: correct the file"
        )
    part = network.Conv2d(
        weight.shape[1] * groups, weight.shape[0], kernel, stride, padding, bias=bool(bias.any()), groups=groups, dilation=dilation
    )
    return Made(part, {"weight": weight, **({"bias": bias} if bias.any() else {})})


def _scaled(node: str, value: Any) -> list[Made]:
    factors = np.asarray(value.scale, np.float64)
    if factors.size and (factors == factors.reshape(-1)[0]).all():
        return [Made(network.Scale(float(factors.reshape(-1)[0])), {})]
    if factors.ndim != 1:
        raise GraphError(f"node '{node}' scales each value of an image of shape {factors.shape} by itself: connections of ours do not")
    return [Made(network.Linear(factors.size, factors.size, bias=False), {"weight": np.diag(factors)})]


def _pair(node: str, value: Any, field: str) -> tuple[int, int]:
    values = np.asarray(getattr(value, field))
    if values.dtype.kind not in "iuf" or values.size not in (1, 2) or (values != np.floor(values)).any() or np.abs(values).max() > 2**20:
        said = " ".join(str(values.reshape(-1)[:4]).split())
        raise GraphError(f"node '{node}' has {field} {said}: correct the file")
    down, across = np.broadcast_to(values.reshape(-1), (2,)).tolist()
    return int(down), int(across)


def with_bias(part: Any, bias: bool) -> Part:
    made: Part = msgspec.structs.replace(part, bias=bias)
    return made


def joined(made: list[Made]) -> Connection:
    return made[0].part if len(made) == 1 else Chain(tuple(part.part for part in made))


def tensors_of(name: str, made: list[Made]) -> Iterator[tuple[str, str, Array]]:
    """(path in the state dict, field, values) of a connection's weights."""
    for index, part in enumerate(made):
        path = name if len(made) == 1 else f"{name}.{index}"
        for field, value in part.tensors.items():
            yield path, field, value
