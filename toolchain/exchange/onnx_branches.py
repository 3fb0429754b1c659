"""What a ReLU network's values are while it is read: sums of branches, each a chain of linear steps from the input or from a layer of neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Union

import msgspec
import numpy as np

from toolchain import network as plain
from toolchain.errors import UsageError
from toolchain.exchange import onnx_files
from toolchain.ir import Array, Shape

if TYPE_CHECKING:
    from onnx import NodeProto


@dataclass(frozen=True)
class Step:
    """A linear part of a branch. `part` is None for an affine one, weight * x + bias with one number a channel, of an `image` or of a row; a pool has no weight."""

    node: str
    part: plain.Part | None
    weight: Array | None = field(default=None, repr=False)
    bias: Array | None = field(default=None, repr=False)
    image: bool = False

    @property
    def affine(self) -> bool:
        return self.part is None

    @property
    def weighted(self) -> bool:
        return self.part is not None and self.weight is not None


@dataclass(frozen=True)
class Branch:
    """What `steps` make of the values of layer `source` (None: of the input). `shape` is theirs; `flat`: read as one row, as before a matrix."""

    source: int | None
    steps: tuple[Step, ...]
    shape: Shape
    flat: bool = False

    @property
    def seen(self) -> Shape:
        """The shape as the file has it."""
        return (prod(self.shape),) if self.flat else self.shape


@dataclass(frozen=True)
class Layer:
    """The neurons of one ReLU, `output` its value in the file; `limit` is where a Clip ends."""

    node: str
    output: str
    branches: tuple[Branch, ...]
    limit: float | None

    @property
    def shape(self) -> Shape:
        return self.branches[0].shape


Value = Union[Array, tuple[Branch, ...]]
"""A constant, or a sum of branches."""


class Node:
    """A node with its attributes."""

    def __init__(self, node: NodeProto, path: Path) -> None:
        self.kind, self.name = node.op_type, named(node)
        self.inputs, self.outputs = tuple(node.input), tuple(node.output)
        self.attributes = onnx_files.attributes(node, path)
        self._path = path

    def refused(self, why: str) -> UsageError:
        return UsageError(f"'{self._path}': node '{self.name}' ({self.kind}) {why}")

    def pair(self, name: str, default: int = 1) -> tuple[int, int]:
        """A setting of height and width."""
        given = self.attributes.get(name, [default, default])
        if len(given) != 2:
            raise self.refused(f"works on {len(given)} axes: only images of (channels, height, width) have a counterpart")
        return int(given[0]), int(given[1])


def named(node: NodeProto) -> str:
    """A node's name, or what it makes."""
    return str(node.name or (node.output[0] if node.output else "?"))


class Reading(Protocol):
    """The file that is being read, as far as an operator sees it: what it is given under a name, and the layers so far."""

    values: dict[str, Value]
    layers: list[Layer]
    left_out: list[str]
    input_shape: Shape
    shaped: Shape
    samples: int | None

    @property
    def output(self) -> str: ...

    def data(self, node: Node, number: int = 0) -> tuple[Branch, ...]: ...

    def constant(self, node: Node, number: int) -> Array | None: ...

    def required(self, node: Node, number: int) -> Array: ...

    def numbers(self, node: Node, name: str, number: int) -> list[int] | None: ...


def appended(branches: tuple[Branch, ...], moved: Callable[[Branch], Branch], step: Step) -> tuple[Branch, ...]:
    """`step` behind every branch of a sum: a linear step of a sum is the sum of steps, with the bias once."""
    made = []
    for number, branch in enumerate(branches):
        own = step if number == 0 or step.bias is None else replace(step, bias=None, part=_unbiased(step.part))
        made.append(replace(moved(branch), steps=(*branch.steps, own)))
    return tuple(made)


def _unbiased(part: plain.Part | None) -> plain.Part | None:
    return msgspec.structs.replace(part, bias=False) if isinstance(part, (plain.Linear, plain.Conv2d, plain.ConvTranspose2d)) else part


def affine(node: Node, branches: tuple[Branch, ...], factor: Array, shift: Array) -> tuple[Branch, ...]:
    """factor * x + shift, one number a channel, folded into the weights before it where there are any."""
    return tuple(_scaled(node, branch, factor, shift if number == 0 else np.zeros(1)) for number, branch in enumerate(branches))


def _scaled(node: Node, branch: Branch, factor: Array, shift: Array) -> Branch:
    factor, shift = (_channels(node, branch, values) for values in (factor, shift))
    behind: list[Step] = []
    steps = list(branch.steps)
    while steps and not steps[-1].affine and not steps[-1].weighted:
        if shift.any() and _padded(steps[-1]):
            break  # the zeros around an image take no shift
        behind.insert(0, steps.pop())
    if not steps or not (steps[-1].affine or steps[-1].weighted):
        return replace(branch, steps=(*branch.steps, Step(node.name, None, factor, shift, image=len(branch.shape) == 3)))
    last = steps[-1]
    assert last.weight is not None
    axis = 1 if isinstance(last.part, plain.ConvTranspose2d) else 0
    weight = _by_channel(last, factor, axis)
    before = np.zeros(1) if last.bias is None else last.bias
    bias = before * factor + shift
    if not bias.any() and last.bias is None:
        made = replace(last, weight=weight)
    else:
        made = replace(last, weight=weight, bias=bias, part=_biased(last.part))
    return replace(branch, steps=(*steps[:-1], made, *behind))


def _padded(step: Step) -> bool:
    """Whether a pool counts zeros around the image."""
    return isinstance(step.part, plain.AvgPool2d) and step.part.padding > 0


def _by_channel(step: Step, factor: Array, axis: int) -> Array:
    """A weight with each output channel times its factor; a transposed convolution counts the channels of one group along its second axis."""
    weight = np.asarray(step.weight, np.float64)
    if axis == 0:
        return np.asarray(weight * factor.reshape(-1, *[1] * (weight.ndim - 1)))
    groups = step.part.groups if isinstance(step.part, plain.ConvTranspose2d) else 1
    each = factor.reshape(groups, -1).repeat(len(weight) // groups, axis=0)
    return np.asarray(weight * each.reshape(*weight.shape[:2], 1, 1))


def _biased(part: plain.Part | None) -> plain.Part | None:
    return msgspec.structs.replace(part, bias=True) if isinstance(part, (plain.Linear, plain.Conv2d, plain.ConvTranspose2d)) else part


def _channels(node: Node, branch: Branch, values: Array) -> Array:
    """`values`, which meet what the branch makes, as one number for each channel of its shape."""
    wide, channels = np.asarray(values, np.float64), branch.shape[0]
    if wide.size == 1:
        return np.full(channels, wide.reshape(-1)[0])
    if branch.flat and len(branch.shape) > 1:
        rows = wide.reshape(channels, -1) if wide.size == prod(branch.shape) else wide.reshape(1, -1)
        if wide.size == prod(branch.shape) and (rows == rows[:, :1]).all():
            return rows[:, 0].copy()
    elif wide.size == channels:
        return wide.reshape(-1)
    raise node.refused(f"has {wide.size} numbers for values of shape {branch.seen}: only one for all, or one a channel, has a counterpart")
