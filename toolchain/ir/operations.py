"""What operations do to shapes and to bounds; `toolchain.fixed` has their arithmetic. A new operation is one struct in `parts`, one branch in
`output_shape` and in `largest_sum` here, and one in `fixed`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod

import msgspec
import numpy as np

from toolchain.errors import GraphError
from toolchain.ir.parts import (
    Array,
    AvgPool2d,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Identity,
    Op,
    Phase,
    Scale,
    Shape,
    Upsample,
)

LARGEST_MATRIX = 2**26
"""Most entries of a matrix that stands for something without weights, such as a pool with unequal windows: half a GiB in float64."""


def weight_of(op: Op) -> str | None:
    """The tensor an operation reads, if any."""
    return getattr(op, "weight", None)


def exponent_of(ops: Sequence[Op]) -> int:
    """By how many bits a composition shifts what it makes: operations are linear, so their exponents add up."""
    return sum(getattr(op, "exponent", 0) for op in ops)


def transposed(op: Op) -> Op:
    """The adjoint of one operation, on the same tensor. `Scale` and `Identity` are their own."""
    return op if isinstance(op, (Scale, Identity)) else msgspec.structs.replace(op, transpose=not op.transpose)


def adjoint(ops: Sequence[Op]) -> tuple[Op, ...]:
    """The adjoint of a composition: the operations' adjoints, last to first."""
    return tuple(transposed(op) for op in reversed(ops))


def tensor_names(phase: Phase) -> set[str]:
    """Every tensor that a phase reads."""
    ops = [op for synapse in phase.synapses for op in synapse.ops] + [op for drive in phase.drive for op in drive.ops]
    names = {name for op in ops if (name := weight_of(op)) is not None}
    names |= {bias.tensor for biases in phase.bias.values() for bias in biases}
    return names | {drive.bias for drive in phase.drive if drive.bias is not None}


def shapes_along(ops: Sequence[Op], source: Shape, target: Shape, tensors: Mapping[str, Array]) -> tuple[Shape, ...]:
    """The shape after each operation of a connection from `source` to `target`; the last one has as many values as `target`.

    Forward operations tell their shapes from the source on. A transposed one does not (a stride forgets how large its image was), so shapes of transposed
    operations come from the target backwards. GraphError where they do not meet, or a forward operation follows a transposed one.
    """
    first = _first_backwards(ops)
    found: list[Shape] = [source]
    for op in ops[:first]:
        found.append(output_shape(op, found[-1], tensors))
    if first < len(ops):
        behind = [target]
        for op in reversed(ops[first:]):
            if not getattr(op, "transpose", isinstance(op, (Scale, Identity))):
                raise GraphError(f"{type(op).__name__} follows a transposed operation: transpose all that follow, or none")
            behind.append(output_shape(transposed(op), behind[-1], tensors))
        if prod(behind[-1]) != prod(found[-1]):
            raise GraphError(
                f"transposed operations take {behind[-1]} to make {target}, but get {found[-1]}: correct the weights or the population"
            )
        found[-1] = behind[-1]
        found.extend(reversed(behind[:-1]))
    if prod(found[-1]) != prod(target):
        raise GraphError(f"it makes shape {found[-1]}, not {target}: correct the weights or the population")
    return tuple(found[1:])


def _first_backwards(ops: Sequence[Op]) -> int:
    """Where the shapes of a chain come from its target on: at its first transposed operation, or at scales and identities that lead to it."""
    first = next((i for i, op in enumerate(ops) if getattr(op, "transpose", False)), len(ops))
    leads = first < len(ops) and all(isinstance(op, (Scale, Identity)) for op in ops[:first])
    return 0 if leads else first


def entry_shape(ops: Sequence[Op], source: Shape, target: Shape, tensors: Mapping[str, Array]) -> Shape:
    """The shape in which the first operation takes the source: another than the source's own only where that is transposed."""
    if ops and _first_backwards(ops) == 0:
        after = shapes_along(ops, source, target, tensors)[0]
        return output_shape(transposed(ops[0]), after, tensors)
    return source


def output_shape(op: Op, shape: Shape, tensors: Mapping[str, Array]) -> Shape:
    """The shape a forward operation makes of `shape`; GraphError where it does not fit."""
    if isinstance(op, Identity):
        return shape
    if isinstance(op, Scale):
        if op.weight is not None and tensors[op.weight].shape != shape[:1]:
            raise GraphError(f"scale '{op.weight}' has shape {tensors[op.weight].shape}, not one factor for each of {shape[0]} channels")
        return shape
    if isinstance(op, Dense):
        if tensors[op.weight].ndim != 2:
            raise GraphError(f"weight '{op.weight}' has shape {tensors[op.weight].shape}: a dense connection needs (outputs, inputs)")
        out, into = tensors[op.weight].shape
        if op.transpose:
            out, into = into, out
        if prod(shape) != into:
            raise GraphError(f"weight '{op.weight}' takes {into} inputs but its source has {prod(shape)}: correct the shape of one of them")
        return (out,)
    if len(shape) != 3:
        raise GraphError(f"{type(op).__name__} takes (channels, height, width) but gets {shape}: flatten behind it, not before")
    if isinstance(op, Upsample):
        if op.factor < 1:
            raise GraphError(f"Upsample has factor {op.factor}: it must be at least 1")
        return shape[0], shape[1] * op.factor, shape[2] * op.factor
    if isinstance(op, AvgPool2d):
        return (shape[0], *(_windows(shape[1 + i], op.kernel[i], op.stride[i], op.padding[i], 1, "AvgPool2d") for i in (0, 1)))
    return _convolved(op, shape, tensors[op.weight])


def _convolved(op: Conv2d | ConvTranspose2d, shape: Shape, weight: Array) -> Shape:
    if weight.ndim != 4:
        raise GraphError(f"weight '{op.weight}' has shape {weight.shape}: a convolution needs four axes, channels and kernel")
    kernel = weight.shape[2:]
    if min(*op.stride, *op.dilation, op.groups) < 1 or min(*op.padding, *getattr(op, "output_padding", ())) < 0:
        raise GraphError(
            f"'{op.weight}' has stride {op.stride}, dilation {op.dilation}, groups {op.groups}: at least 1, paddings at least 0"
        )
    if isinstance(op, Conv2d):
        channels, into = weight.shape[0], weight.shape[1] * op.groups
        made = [_windows(shape[1 + i], kernel[i], op.stride[i], op.padding[i], op.dilation[i], f"'{op.weight}'") for i in (0, 1)]
    else:
        channels, into = weight.shape[1] * op.groups, weight.shape[0]
        made = [
            (shape[1 + i] - 1) * op.stride[i] - 2 * op.padding[i] + op.dilation[i] * (kernel[i] - 1) + op.output_padding[i] + 1
            for i in (0, 1)
        ]
    if shape[0] != into:
        raise GraphError(f"weight '{op.weight}' takes {into} channels but its source has {shape[0]}: correct the shape of one of them")
    if weight.shape[0] % op.groups:
        raise GraphError(f"weight '{op.weight}' has {weight.shape[0]} channels in {op.groups} groups: groups must divide them")
    if min(made) < 1:
        raise GraphError(
            f"weight '{op.weight}' makes an image of {made[0]} x {made[1]} of {shape[1]} x {shape[2]}: lower its padding or kernel"
        )
    return (channels, made[0], made[1])


def _windows(size: int, kernel: int, stride: int, padding: int, dilation: int, what: str) -> int:
    """How many windows fit along one axis."""
    if min(kernel, stride, dilation) < 1 or padding < 0:
        raise GraphError(
            f"{what} has kernel {kernel}, stride {stride}, dilation {dilation}, padding {padding}: at least 1, padding at least 0"
        )
    span = dilation * (kernel - 1) + 1
    if size + 2 * padding < span:
        raise GraphError(
            f"{what} needs {span} values in a row and its padded source has {size + 2 * padding}: lower its kernel or pad more"
        )
    return (size + 2 * padding - span) // stride + 1


def largest_sum(op: Op, tensors: Mapping[str, Array], incoming: int) -> tuple[int, int]:
    """For integer graphs: the largest partial sum that `op` can meet, in whatever order, where no value it takes exceeds `incoming`, and the
    largest value it delivers."""
    if isinstance(op, Identity):
        return incoming, incoming
    if isinstance(op, Upsample):
        made = incoming * (op.factor**2 if op.transpose else 1)
        return made, made
    if isinstance(op, AvgPool2d):
        overlap = prod(ceil(k / s) for k, s in zip(op.kernel, op.stride, strict=True))
        made = incoming * (overlap if op.transpose else prod(op.kernel))
        return made, made
    if isinstance(op, Scale) and op.weight is None:
        return incoming, incoming << op.exponent
    made = incoming * int(largest_rows(op, tensors))
    return made, made << op.exponent


def largest_rows(op: Op, tensors: Mapping[str, Array]) -> float:
    """The largest sum of magnitudes of the weights that meet in one target neuron (of a transposed convolution a bound on it)."""
    weight = np.abs(
        tensors[str(weight_of(op))].astype(np.int64 if np.issubdtype(tensors[str(weight_of(op))].dtype, np.integer) else np.float64)
    )
    if isinstance(op, Scale):
        return float(weight.max(initial=0))
    gathers = not op.transpose if isinstance(op, (Dense, Conv2d)) else op.transpose  # type: ignore[union-attr]  # has a weight, hence one of three
    if gathers:  # each target neuron meets one row (out, ...)
        return float(weight.reshape(len(weight), -1).sum(axis=1).max(initial=0))
    groups = getattr(op, "groups", 1)
    columns = weight.reshape(groups, -1, *weight.shape[1:]).sum(axis=1)  # over the sources of each group
    return float(columns.reshape(columns.shape[0] * columns.shape[1], -1).sum(axis=1).max(initial=0))
