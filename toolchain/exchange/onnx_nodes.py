"""Nodes of an ONNX graph, and the operations of `toolchain.ir` made of them; `toolchain.fixed` is their definition.

Every value has the samples as its first axis, whatever their number. Only operators that onnxruntime has on every machine are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from toolchain.ir import (
    Array,
    AvgPool2d,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Identity,
    Op,
    Scale,
    Shape,
    Upsample,
    entry_shape,
    shapes_along,
)


class Names:
    """Names that are given once, as ONNX asks of a file."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def new(self, wanted: str) -> str:
        """`wanted`, with a number behind it where it is taken."""
        name, n = wanted, 1
        while name in self._given:
            n += 1
            name = f"{wanted}~{n}"
        self._given.add(name)
        return name


class Sheet:
    """The nodes of one graph, in the order of their work, and the file's constants. The body of a loop is a sheet too: its constants are those of the sheet around it.

    `numbers` is the type of all values but shapes and counts: float32 or float64.
    """

    def __init__(self, numbers: str, around: Sheet | None = None) -> None:
        self.numbers = np.dtype(numbers)
        self.nodes: list[Any] = []
        self.names: Names = Names() if around is None else around.names
        self.constants: dict[str, Array] = {} if around is None else around.constants
        self._known: dict[tuple[object, ...], str] = {} if around is None else around._known

    def add(self, kind: str, *inputs: str, name: str, **attributes: Any) -> str:
        """A node of operator `kind`; the name of its output, which is `name` unless that is taken."""
        from onnx import helper

        made = self.names.new(name)
        self.nodes.append(helper.make_node(kind, list(inputs), [made], name=made, **attributes))
        return made

    def weights(self, name: str, values: Array, shape: Shape | None = None) -> str:
        """The graph's tensor `name` in the file's numbers, once however many nodes read it, in another `shape` under a name of its own."""
        wanted = values.shape if shape is None else shape
        key = ("weights", name, wanted)
        if key not in self._known:
            self._known[key] = self._store(name, np.asarray(values, self.numbers).reshape(wanted))
        return self._known[key]

    def number(self, value: float) -> str:
        """One number, in the file's numbers."""
        return self._constant(np.asarray(value, self.numbers))

    def scales(self, values: Sequence[float]) -> str:
        """Factors of axes, which ONNX wants in float32 whatever the values are."""
        return self._constant(np.asarray(values, np.float32))

    def whole(self, values: int | Sequence[int]) -> str:
        """Whole numbers: a shape, an axis, a step."""
        return self._constant(np.asarray(values, np.int64))

    def filled(self, value: float, shape: Shape) -> str:
        """An array of one value."""
        return self._constant(np.full(shape, value, self.numbers))

    def _constant(self, values: Array) -> str:
        key = (values.dtype.str, values.shape, values.tobytes())
        if key not in self._known:
            self._known[key] = self._store(f"constant.{len(self.constants)}", values)
        return self._known[key]

    def _store(self, name: str, values: Array) -> str:
        kept = self.names.new(name)
        self.constants[kept] = values
        return kept

    def cast(self, values: str, name: str) -> str:
        """Truth values as 1 and 0 in the file's numbers."""
        from onnx import helper

        return self.add("Cast", values, name=name, to=helper.np_dtype_to_tensor_dtype(self.numbers))

    def shaped(self, values: str, now: Shape, wanted: Shape, name: str) -> str:
        """`values` (samples, *now) as (samples, *wanted)."""
        return values if now == wanted else self.add("Reshape", values, self.whole([0, *wanted]), name=f"{name}.shaped")

    def total(self, values: Sequence[str], name: str) -> str | None:
        """The sum of `values`, added one after the other from the first; None where there is none."""
        made = values[0] if values else None
        for value in values[1:]:
            made = self.add("Add", str(made), value, name=name)
        return made


def connect(sheet: Sheet, ops: Sequence[Op], tensors: Mapping[str, Array], source: Shape, target: Shape, values: str, name: str) -> str:
    """`ops`, applied left to right to `values` (samples, *source): the name of what they make, (samples, *target)."""
    now, entry = source, entry_shape(ops, source, target, tensors)
    values, now = sheet.shaped(values, now, entry, name), entry
    for op, made in zip(ops, shapes_along(ops, source, target, tensors), strict=True):
        values, now = _applied(sheet, op, tensors, now, made, values, name)
        values, now = sheet.shaped(values, now, made, name), made
    return sheet.shaped(values, now, target, name)


def _applied(sheet: Sheet, op: Op, tensors: Mapping[str, Array], now: Shape, made: Shape, values: str, name: str) -> tuple[str, Shape]:
    """One operation on `values` of shape `now`: what it makes, and in which shape. A new operation is one more branch."""
    if isinstance(op, Identity):
        return values, now
    if isinstance(op, Scale):
        return _scaled(sheet, op, tensors, now, values, name), now
    if isinstance(op, Upsample):
        return (
            (_block_sums(sheet, op.factor, now, values, name), made) if op.transpose else (_repeated(sheet, op.factor, values, name), made)
        )
    if isinstance(op, AvgPool2d):
        return (_spread_means(sheet, op, now, made, values, name) if op.transpose else _means(sheet, op, values, name)), made
    weight = sheet.weights(op.weight, tensors[op.weight])
    if isinstance(op, Dense):
        flat = sheet.shaped(values, now, (prod(now),), name)
        return sheet.add("Gemm", flat, weight, name=name, transB=0 if op.transpose else 1), (prod(made),)
    return _convolved(sheet, op, tensors, now, made, values, name), made


def _scaled(sheet: Sheet, op: Scale, tensors: Mapping[str, Array], now: Shape, values: str, name: str) -> str:
    if op.factor != 1:
        values = sheet.add("Mul", values, sheet.number(op.factor), name=name)
    if op.weight is None:
        return values
    factors = sheet.weights(op.weight, tensors[op.weight], (now[0], *[1] * (len(now) - 1)))
    return sheet.add("Mul", values, factors, name=name)


def _repeated(sheet: Sheet, factor: int, values: str, name: str) -> str:
    return sheet.add(
        "Resize",
        values,
        "",
        sheet.scales([1, 1, factor, factor]),
        name=name,
        mode="nearest",
        nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )


def _block_sums(sheet: Sheet, factor: int, now: Shape, values: str, name: str) -> str:
    """Upsampling's transpose: each block of factor x factor values as their sum."""
    channels, height, width = now
    blocks = sheet.shaped(values, now, (channels, height // factor, factor, width // factor, factor), name)
    return sheet.add("ReduceSum", blocks, sheet.whole([3, 5]), name=name, keepdims=0)


def _means(sheet: Sheet, op: AvgPool2d, values: str, name: str) -> str:
    """Means over windows; zeros are laid around the image first, as padding may be wider than onnxruntime's pools take."""
    if any(op.padding):
        around = [0, 0, *op.padding]
        values = sheet.add("Pad", values, sheet.whole([*around, *around]), name=f"{name}.padded")
    return sheet.add("AveragePool", values, name=name, kernel_shape=list(op.kernel), strides=list(op.stride))


def _spread_means(sheet: Sheet, op: AvgPool2d, now: Shape, made: Shape, values: str, name: str) -> str:
    """A pool's transpose: a convolution, transposed, of every channel for itself."""
    share = sheet.filled(1 / prod(op.kernel), (now[0], 1, *op.kernel))
    grid = Conv2d("", op.stride, op.padding, groups=now[0])
    return _spread(sheet, grid, op.kernel, share, now, made, values, name)


def _convolved(
    sheet: Sheet, op: Conv2d | ConvTranspose2d, tensors: Mapping[str, Array], now: Shape, made: Shape, values: str, name: str
) -> str:
    weight, kernel = sheet.weights(op.weight, tensors[op.weight]), tensors[op.weight].shape[2:]
    if isinstance(op, Conv2d) == op.transpose:
        return _spread(sheet, op, (kernel[0], kernel[1]), weight, now, made, values, name)
    windows = sheet.add("Conv", values, weight, name=name, **_grid(op, (kernel[0], kernel[1])))
    found = [
        (now[1 + i] + 2 * op.padding[i] - op.dilation[i] * (kernel[i] - 1) - 1) // op.stride[i] + 1 for i in (0, 1)
    ]  # the adjoint of a transposed convolution may find more windows than there were values
    if tuple(found) == made[1:]:
        return windows
    return sheet.add("Slice", windows, sheet.whole([0, 0]), sheet.whole(list(made[1:])), sheet.whole([2, 3]), name=f"{name}.cut")


def _spread(
    sheet: Sheet, op: Conv2d | ConvTranspose2d, kernel: tuple[int, int], weight: str, now: Shape, made: Shape, values: str, name: str
) -> str:
    """A transposed convolution into images of `made`: what its windows do not reach is 0.

    The end of the image is set by how much is cut there, and zeros behind that, not by ONNX's output_padding: onnxruntime 1.23 computes other values with one that is not below the stride.
    """
    whole = [(now[1 + i] - 1) * op.stride[i] + op.dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    behind = [made[1 + i] + op.padding[i] - whole[i] for i in (0, 1)]  # missing where above 0, too many where below
    cut = {"pads": [*op.padding, *(max(0, -n) for n in behind)]}
    spread = sheet.add("ConvTranspose", values, weight, name=name, **(_grid(op, kernel) | cut))
    if max(behind) <= 0:
        return spread
    return sheet.add("Pad", spread, sheet.whole([0] * 6 + [max(0, n) for n in behind]), name=f"{name}.padded")


def _grid(op: Conv2d | ConvTranspose2d, kernel: tuple[int, int]) -> dict[str, Any]:
    return {
        "kernel_shape": list(kernel),
        "strides": list(op.stride),
        "pads": [*op.padding, *op.padding],
        "dilations": list(op.dilation),
        "group": op.groups,
    }
