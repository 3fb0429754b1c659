"""ONNX's operators as steps of branches: what each makes of the network's values, or of the constants that exporters compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from toolchain import network as plain
from toolchain.errors import UsageError
from toolchain.exchange import onnx_shapes
from toolchain.exchange.onnx_branches import Branch, Layer, Node, Reading, Step, Value, affine, appended
from toolchain.ir import Array, Shape

MOST_BRANCHES = 16
"""A sum of more is no residual network: every branch holds weights of its own."""

LARGEST_VALUES = 2**22
"""Most values of a layer, a sample."""


def _relu(reading: Reading, node: Node) -> Value:
    return _layer(reading, node, None)


def _clip(reading: Reading, node: Node) -> Value:
    low, high = (node.attributes.get(name, reading.constant(node, i)) for i, name in ((1, "min"), (2, "max")))
    if low is None or float(np.asarray(low).reshape(-1)[0]) != 0:
        raise node.refused("does not begin at 0, as a firing rate does: use Relu, or Clip from 0")
    limit = None if high is None else float(np.asarray(high).reshape(-1)[0])
    if limit is not None and not limit > 0:
        raise node.refused(f"ends at {limit}: give a number above 0")
    return _layer(reading, node, limit if limit is not None and limit < np.finfo(np.float32).max else None)


def _layer(reading: Reading, node: Node, limit: float | None) -> Value:
    branches = reading.data(node)
    (first, *_) = branches
    again = len(branches) == 1 and first.source is not None and not first.steps
    if again and (limit is None or reading.layers[first.source or 0].limit == limit):
        return branches  # of a ReLU: nothing changes
    if len({branch.shape for branch in branches}) > 1:
        raise node.refused("adds values of different shapes")
    reading.layers.append(Layer(node.name, node.outputs[0], branches, limit))
    return (Branch(len(reading.layers) - 1, (), first.shape, first.flat),)


def _dropout(reading: Reading, node: Node) -> Value:
    reading.left_out.append(f"'{node.name}' (Dropout), which does nothing at inference")
    return reading.data(node)


def _softmax(reading: Reading, node: Node) -> Value:
    if node.outputs[0] != reading.output:
        raise node.refused("lies inside the network: only at its end, where it changes no answer, can it be left out")
    reading.left_out.append(f"'{node.name}' ({node.kind}) at the end: class scores are what it was given")
    return reading.data(node)


def _gemm(reading: Reading, node: Node) -> Value:
    given = node.attributes
    if given.get("transA", 0):
        raise node.refused("transposes the network's values: give it samples as rows")
    weight = _times(reading.required(node, 1), given.get("alpha", 1.0))
    bias = reading.constant(node, 2)
    return _matrix(
        reading, node, weight if given.get("transB", 0) else weight.T, None if bias is None else _times(bias, given.get("beta", 1.0))
    )


def _times(values: Array, factor: float) -> Array:
    return values if factor == 1 else np.asarray(values * factor)


def _matmul(reading: Reading, node: Node) -> Value:
    return _matrix(reading, node, reading.required(node, 1).T, None)


def _matrix(reading: Reading, node: Node, weight: Array, bias: Array | None) -> Value:
    if weight.ndim != 2 or 0 in weight.shape:
        raise node.refused(f"has a weight of shape {weight.shape}: a matrix has two axes")
    out, into = weight.shape
    branches = reading.data(node)
    for branch in branches:
        if len(branch.seen) != 1 or branch.seen[0] != into:
            raise node.refused(f"takes {into} values and gets {branch.seen}: flatten images before it, and make both equal")
    added = None if bias is None else _vector(node, bias, out)
    part = plain.Linear(into, out, bias=added is not None)
    return appended(branches, lambda b: replace(b, shape=(out,), flat=False), Step(node.name, part, weight, added))


def _vector(node: Node, values: Array, size: int) -> Array:
    """One number for each of `size`."""
    flat = values.reshape(-1)
    if flat.size not in (1, size):
        raise node.refused(f"has {flat.size} biases for {size} neurons or channels: make them equal")
    return np.broadcast_to(flat, (size,)).copy()


def _convolution(reading: Reading, node: Node) -> Value:
    weight, bias = reading.required(node, 1), reading.constant(node, 2)
    if weight.ndim != 4 or 0 in weight.shape:
        raise node.refused(
            f"has a weight of shape {weight.shape}: only convolutions of images (channels, height, width) have a counterpart"
        )
    kernel, stride, dilation = (weight.shape[2], weight.shape[3]), node.pair("strides"), node.pair("dilations")
    groups = int(node.attributes.get("group", 1))
    branches = reading.data(node)
    turned = node.kind == "ConvTranspose"
    channels = (weight.shape[0], weight.shape[1] * groups) if turned else (weight.shape[1] * groups, weight.shape[0])
    _image(node, branches)
    padding = _padding(node, branches[0].shape, tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)), stride)
    added = None if bias is None else _vector(node, bias, channels[1])
    settings: dict[str, Any] = {"stride": stride, "padding": padding, "bias": added is not None, "groups": groups, "dilation": dilation}
    part: plain.Part
    if turned:
        if node.attributes.get("output_shape"):
            raise node.refused("gives its output's shape: give output_padding instead")
        part = plain.ConvTranspose2d(*channels, kernel, output_padding=node.pair("output_padding", 0), **settings)
    else:
        part = plain.Conv2d(*channels, kernel, **settings)
    return _placed(node, branches, Step(node.name, part, weight, added))


def _image(node: Node, branches: tuple[Branch, ...]) -> None:
    for branch in branches:
        if branch.flat or len(branch.shape) != 3:
            raise node.refused(f"gets values of shape {branch.seen}: only images of (channels, height, width) have a counterpart")


def _padding(node: Node, shape: Shape, spans: Sequence[int], stride: Sequence[int]) -> tuple[int, int]:
    """How many zeros lie around an image of `shape`, the same on both sides; UsageError where they are not."""
    mode = node.attributes.get("auto_pad", "NOTSET")
    if mode == "VALID":
        return 0, 0
    if mode == "NOTSET":
        pads = [int(n) for n in node.attributes.get("pads", [0, 0, 0, 0])]
    elif node.kind == "ConvTranspose":
        raise node.refused(f"pads by {mode}: give pads")
    else:
        missing = [max(0, (-(-size // s) - 1) * s + span - size) for size, s, span in zip(shape[1:], stride, spans, strict=True)]
        pads = [n // 2 for n in missing] + [n - n // 2 for n in missing]
    if len(pads) != 4 or pads[:2] != pads[2:] or min(pads) < 0:
        raise node.refused(f"pads by {pads}: only the same number of zeros on both sides has a counterpart")
    return pads[0], pads[1]


def _placed(node: Node, branches: tuple[Branch, ...], step: Step) -> Value:
    """`step`, whose part says what shape it makes, behind every branch."""
    assert step.part is not None

    def moved(branch: Branch) -> Branch:
        try:
            made = plain.output_shape(step.part, branch.shape, "it")  # type: ignore[arg-type]  # it has a part
        except UsageError as error:
            raise node.refused(f"does not fit its source: {error}") from None
        if prod(made) > LARGEST_VALUES:
            raise node.refused(f"makes {prod(made):,} values a sample, more than {LARGEST_VALUES:,}")
        return replace(branch, shape=made)

    return appended(branches, moved, step)


def _pool(reading: Reading, node: Node) -> Value:
    branches = reading.data(node)
    _image(node, branches)
    kernel, stride = node.pair("kernel_shape"), node.pair("strides")
    padding = _padding(node, branches[0].shape, kernel, stride)
    if kernel[0] != kernel[1] or stride[0] != stride[1] or padding[0] != padding[1]:
        raise node.refused(f"has windows of {kernel[0]} x {kernel[1]}: only squares, moved and padded alike, have a counterpart")
    if any(padding) and not node.attributes.get("count_include_pad", 0):
        raise node.refused("leaves the padding out of its means: set count_include_pad")
    if tuple(node.attributes.get("dilations", (1, 1))) != (1, 1):
        raise node.refused("has windows with gaps: leave dilations out")
    rest = [(size + 2 * padding[0] - kernel[0]) % stride[0] for size in branches[0].shape[1:]]
    if node.attributes.get("ceil_mode", 0) and any(rest):
        raise node.refused("rounds the number of windows up: leave ceil_mode out")
    part = plain.AvgPool2d(kernel[0], None if stride[0] == kernel[0] else stride[0], padding[0])
    return _placed(node, branches, Step(node.name, part))


def _global_pool(reading: Reading, node: Node) -> Value:
    branches = reading.data(node)
    _image(node, branches)
    return _placed(node, branches, Step(node.name, plain.AdaptiveAvgPool2d(1)))


def _mean(reading: Reading, node: Node) -> Value:
    """ReduceMean over height and width: a global pool."""
    axes = reading.numbers(node, "axes", 1)
    if axes is None or sorted(axis % 4 for axis in axes) != [2, 3]:
        raise node.refused(f"takes means over the axes {axes}: only those over height and width have a counterpart")
    made = _global_pool(reading, node)
    assert isinstance(made, tuple)
    return made if node.attributes.get("keepdims", 1) else tuple(replace(branch, flat=True) for branch in made)


def _resized(reading: Reading, node: Node) -> Value:
    branches = reading.data(node)
    _image(node, branches)
    scales = reading.constant(node, 1 if node.kind == "Upsample" else 2)
    given = node.attributes.get("scales") if scales is None or not scales.size else [float(n) for n in scales.reshape(-1)[:8]]
    factor = int(given[-1]) if given else 0
    whole = given is not None and len(given) == 4 and list(given) == [1, 1, factor, factor] and factor >= 1
    grid = node.attributes.get("coordinate_transformation_mode", "half_pixel")
    exact = grid == "asymmetric" and node.attributes.get("nearest_mode", "round_prefer_floor") == "floor"
    centred = grid == "half_pixel"  # the nearest of a whole factor is the same
    if node.attributes.get("mode", "nearest") != "nearest" or not whole or not (exact or centred or node.kind == "Upsample"):
        raise node.refused("resizes by other than whole repetition: use the nearest value and a whole factor for height and width")
    return _placed(node, branches, Step(node.name, plain.Upsample(factor)))


def _norm(reading: Reading, node: Node) -> Value:
    if len(node.outputs) > 1 and any(node.outputs[1:]):
        raise node.refused("is in training mode: export the network in evaluation mode")
    scale, shift, mean, variance = (np.asarray(reading.required(node, i), np.float64).reshape(-1) for i in (1, 2, 3, 4))
    if len({values.size for values in (scale, shift, mean, variance)}) != 1:
        raise node.refused("has weights, biases, means and variances of different lengths")
    if not (variance + node.attributes.get("epsilon", 1e-5) > 0).all():
        raise node.refused("has a variance that is not above 0")
    factor = scale / np.sqrt(variance + node.attributes.get("epsilon", 1e-5))
    return affine(node, reading.data(node), factor, shift - mean * factor)


def _added(reading: Reading, node: Node) -> Value:
    first, second = (reading.values.get(name) for name in node.inputs[:2])
    if isinstance(first, tuple) and isinstance(second, tuple) and node.kind in ("Add", "Sub"):
        return _sum(node, first, second, -1.0 if node.kind == "Sub" else 1.0)
    return _with_constant(reading, node, first, second)


def _sum(node: Node, first: tuple[Branch, ...], second: tuple[Branch, ...], sign: float) -> Value:
    if len({branch.seen for branch in (*first, *second)}) > 1:
        raise node.refused(f"joins values of shape {first[0].seen} and {second[0].seen}: make them equal")
    if len(first) + len(second) > MOST_BRANCHES:
        raise node.refused(f"adds up more than {MOST_BRANCHES} branches: put a ReLU between sums")
    turned = second if sign == 1 else affine(node, second, np.full(1, sign), np.zeros(1))
    return (*first, *turned)


def _with_constant(reading: Reading, node: Node, first: Value | None, second: Value | None) -> Value:
    """A sum, difference, product or quotient of the network's values and constants, or of two constants."""
    if first is None or second is None:
        raise node.refused("reads a value that nothing makes")
    if any(not isinstance(value, tuple) and value.dtype.kind not in "biuf" for value in (first, second)):
        raise node.refused("takes a constant that holds no real numbers")
    if not isinstance(first, tuple) and not isinstance(second, tuple):
        return onnx_shapes.computed(node, first, second)
    branches, values = (first, second) if isinstance(first, tuple) else (second, first)
    if isinstance(values, tuple) or not isinstance(branches, tuple):
        raise node.refused("multiplies or divides values of the network with each other: only constants have a counterpart")
    number, ahead = _by_axis(node, branches[0], values), isinstance(first, tuple)
    zero, one = np.zeros(1), np.ones(1)
    if node.kind == "Add":
        return affine(node, branches, one, number)
    if node.kind == "Sub":
        return affine(node, branches, one, -number) if ahead else affine(node, branches, -one, number)
    if node.kind == "Mul":
        return affine(node, branches, number, zero)
    if not ahead or not number.all():
        raise node.refused("divides by values of the network or by 0: only a constant other than 0 has a counterpart")
    return affine(node, branches, 1 / number, zero)


def _by_axis(node: Node, branch: Branch, values: Array) -> Array:
    """A constant that numpy's rules join with (samples, *shape), as one number for all or one a channel."""
    wide = np.asarray(values, np.float64)
    if wide.size == 1:
        return wide.reshape(-1)
    shape = (1, *branch.seen)
    full = (*[1] * (len(shape) - wide.ndim), *wide.shape)
    if wide.ndim > len(shape) or full[0] != 1 or full[1] != shape[1] or any(n != 1 for n in full[2:]):
        raise node.refused(
            f"joins a constant of shape {wide.shape} with values of shape {branch.seen}: only one number, or one a channel, has a counterpart"
        )
    return wide.reshape(-1)


OPERATORS: Mapping[str, Callable[[Reading, Node], Value]] = {
    "Add": _added,
    "AveragePool": _pool,
    "BatchNormalization": _norm,
    "Cast": onnx_shapes.cast,
    "Clip": _clip,
    "Concat": onnx_shapes.joined,
    "Constant": onnx_shapes.constant,
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "Div": _added,
    "Dropout": _dropout,
    "Flatten": onnx_shapes.flattened,
    "Gather": onnx_shapes.gathered,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool,
    "Identity": onnx_shapes.same,
    "LogSoftmax": _softmax,
    "MatMul": _matmul,
    "Mul": _added,
    "ReduceMean": _mean,
    "Relu": _relu,
    "Reshape": onnx_shapes.reshaped,
    "Resize": _resized,
    "Shape": onnx_shapes.shape_of,
    "Slice": onnx_shapes.sliced,
    "Softmax": _softmax,
    "Squeeze": onnx_shapes.squeezed,
    "Sub": _added,
    "Transpose": onnx_shapes.transposed,
    "Unsqueeze": onnx_shapes.squeezed,
    "Upsample": _resized,
}

NOTHING = "has no counterpart: linear operations and ReLU have"
_ACTIVATION = "is no ReLU, and neurons that fire follow that alone: train the network with Relu, or Clip from 0"
INSTEAD = {
    "MaxPool": "takes maxima, which sums of spikes do not: train the network with AveragePool",
    "GlobalMaxPool": "takes maxima, which sums of spikes do not: train the network with GlobalAveragePool",
    "LSTM": "is a recurrent cell: import from NIR, or train a network with feedback connections here",
    "GRU": "is a recurrent cell: import from NIR, or train a network with feedback connections here",
    "ArgMax": "picks the answer: export the network up to its class scores",
    "QuantizeLinear": "is of a quantized network: import the one in float32, compile quantizes it",
    "DequantizeLinear": "is of a quantized network: import the one in float32, compile quantizes it",
    "Pad": "pads apart from its convolution: pad in the convolution",
} | dict.fromkeys(
    (
        "LeakyRelu",
        "PRelu",
        "Elu",
        "Selu",
        "Celu",
        "Gelu",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "Tanh",
        "Softplus",
        "Softsign",
        "Mish",
        "Erf",
    ),
    _ACTIVATION,
)
