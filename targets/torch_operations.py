"""The operations of `toolchain.ir` on torch tensors; `toolchain.fixed` is their definition.

Whole numbers come out exact: sums are plain sums of products, in a type that holds each of them. What torch chooses for a convolution is not always one:
NNPACK's fast transforms (wrong by 0.04 on weights of 8 bits), cuDNN's, and TF32 round. So `sim` asks for `EXACT` convolutions: oneDNN's direct ones, or products of
a matrix with the windows laid out as its rows.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from toolchain.fixed import Grid
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
    weight_of,
)

Operation = Callable[[Tensor], Tensor]

ROWS = 2**20
"""Values of windows laid out at once: more leave the cache on a CPU, and gain nothing on a GPU that samples in pieces would not."""

ROWS_CUDA = 2**27


class Convolutions(Protocol):
    """How convolutions are computed. Values and what they make are (samples, channels, height, width); `shape` is what one sample makes."""

    def gather(self, values: Tensor, weight: Tensor, grid: Grid, shape: Shape) -> Tensor:
        """Cross-correlation with `weight` (out, in / groups, kh, kw), cut to `shape` (`fixed.convolve`)."""

    def spread(self, values: Tensor, weight: Tensor, grid: Grid, shape: Shape) -> Tensor:
        """The adjoint of `gather`, `weight` (in, out / groups, kh, kw), into images of `shape` (`fixed.convolve_transposed`)."""


class Composition:
    """The operations of one connection, made ready: shapes found and weights converted once. Called with (samples, source neurons) in the type of its
    weights, it returns (samples, target neurons); exponents are left to the caller.

    `sums`: pools add instead of averaging, and a pool's transpose copies instead of sharing out, as in integer graphs.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        source: Shape,
        target: Shape,
        tensors: Mapping[str, Array],
        weights: Callable[[str], Tensor],
        *,
        convolutions: Convolutions,
        sums: bool,
    ) -> None:
        shapes = shapes_along(ops, source, target, tensors)
        self._entry = entry_shape(ops, source, target, tensors)
        self._steps = [
            (_prepared(op, made, weights, convolutions, sums), made)
            for op, made in zip(ops, shapes, strict=True)
            if not isinstance(op, Identity)
        ]

    def __call__(self, values: Tensor) -> Tensor:
        made = values.reshape(-1, *self._entry)
        for step, shape in self._steps:
            made = step(made).reshape(-1, *shape)
        return made.reshape(len(values), -1)


def _prepared(op: Op, shape: Shape, weights: Callable[[str], Tensor], convolutions: Convolutions, sums: bool) -> Operation:
    """One operation that makes `shape` of each sample. A new operation is one more branch."""
    name = weight_of(op)
    weight = None if name is None else weights(name)
    if isinstance(op, Scale):
        return _scale(1.0 if sums else op.factor, weight)
    if isinstance(op, Upsample):
        factor = op.factor
        if op.transpose:
            return lambda values: _block_sums(values, factor)
        return lambda values: values.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    if isinstance(op, AvgPool2d):
        pool = op
        area = 1 if sums else prod(pool.kernel)
        if pool.transpose:
            return lambda values: _copied(values if area == 1 else values / area, pool, shape)
        return lambda values: _pooled(values, pool, area)
    assert weight is not None
    if isinstance(op, Dense):
        matrix = weight if op.transpose else weight.t().contiguous()
        return lambda values: values.flatten(1) @ matrix
    assert isinstance(op, (Conv2d, ConvTranspose2d))
    grid, kernel = Grid(op.stride, op.padding, op.dilation, op.groups), weight.contiguous()
    form = convolutions.gather if isinstance(op, Conv2d) != op.transpose else convolutions.spread
    return lambda values: form(values, kernel, grid, shape)


def _scale(factor: float, weight: Tensor | None) -> Operation:
    def scaled(values: Tensor) -> Tensor:
        made = values if factor == 1 else values * factor
        return made if weight is None else made * weight.reshape(-1, *[1] * (values.ndim - 2))

    return scaled


def _block_sums(values: Tensor, factor: int) -> Tensor:
    samples, channels, height, width = values.shape
    return values.reshape(samples, channels, height // factor, factor, width // factor, factor).sum(dim=(3, 5))


def _pooled(values: Tensor, op: AvgPool2d, area: int) -> Tensor:
    """Sums over windows, divided by `area`."""
    padded = functional.pad(values, _around(op.padding)) if any(op.padding) else values  # torch's own padding stops at half a window
    return functional.avg_pool2d(padded, op.kernel, op.stride, divisor_override=area)


def _copied(values: Tensor, op: AvgPool2d, shape: Shape) -> Tensor:
    """Each value at every place of its window, added up where windows overlap."""
    samples, channels, height, width = values.shape
    kh, kw = op.kernel
    if op.stride == op.kernel:
        canvas = values[:, :, :, None, :, None].expand(-1, -1, -1, kh, -1, kw).reshape(samples, channels, height * kh, width * kw)
    else:
        rows = values.reshape(samples, channels, 1, height * width).expand(-1, -1, kh * kw, -1).reshape(samples, channels * kh * kw, -1)
        canvas = _folded(rows, op.kernel, Grid(op.stride, op.padding, (1, 1), 1), (height, width))
    return _cut(canvas, op.padding, shape)


def _folded(rows: Tensor, kernel: tuple[int, int], grid: Grid, windows: tuple[int, int]) -> Tensor:
    """Windows (samples, channels * kh * kw, windows) added up where they lie, on the smallest canvas that holds them all."""
    height, width = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(windows, grid.stride, grid.dilation, kernel, strict=True)]
    return functional.fold(rows, (height, width), kernel, dilation=grid.dilation, stride=grid.stride)


def _cut(canvas: Tensor, padding: tuple[int, int], shape: Shape) -> Tensor:
    """The image of `shape` on a padded canvas, with zeros where the canvas ends before it."""
    (top, left), (height, width) = padding, shape[1:]
    missing = (max(0, left + width - canvas.shape[3]), max(0, top + height - canvas.shape[2]))
    whole = functional.pad(canvas, (0, missing[0], 0, missing[1])) if any(missing) else canvas
    return whole[:, :, top : top + height, left : left + width]


def _around(padding: tuple[int, int]) -> tuple[int, int, int, int]:
    return padding[1], padding[1], padding[0], padding[0]


class _Torch:
    """What torch chooses: for floats."""

    def gather(self, values: Tensor, weight: Tensor, grid: Grid, shape: Shape) -> Tensor:
        return functional.conv2d(values, weight, None, *grid)[:, :, : shape[1], : shape[2]]

    def spread(self, values: Tensor, weight: Tensor, grid: Grid, shape: Shape) -> Tensor:
        return _torch_spread(values, weight, grid, shape)


class _Direct:
    """oneDNN's direct convolutions on a CPU in float32: multiply and add, no transforms. Torch asks it for no other kind on x86 processors."""

    def gather(self, values: Tensor, weight: Tensor, grid: Grid, shape: Shape) -> Tensor:
        # not conv2d, which may choose NNPACK
        made = torch.mkldnn_convolution(values.contiguous(), weight, None, grid.padding, grid.stride, grid.dilation, grid.groups)
        return made[:, :, : shape[1], : shape[2]]

    def spread(self, values: Tensor, weight: Tensor, grid: Grid, shape: Shape) -> Tensor:
        return _torch_spread(values, weight, grid, shape)


class _Matrix:
    """Windows as the rows of a matrix, some samples at a time: exact wherever a product of matrices is."""

    def gather(self, values: Tensor, weight: Tensor, grid: Grid, shape: Shape) -> Tensor:
        kernel, groups = tuple(weight.shape[2:]), grid.groups
        matrix = weight.reshape(groups, len(weight) // groups, -1)
        pieces = []
        for piece in torch.split(values, _at_once(values, weight, shape)):
            rows = functional.unfold(piece, kernel, grid.dilation, grid.padding, grid.stride)
            made = torch.matmul(matrix, rows.reshape(len(piece), groups, -1, rows.shape[-1])).reshape(len(piece), len(weight), -1)
            down = _windows(piece.shape[2], 0, kernel, grid)
            pieces.append(made.reshape(len(piece), len(weight), down, -1)[:, :, : shape[1], : shape[2]])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def spread(self, values: Tensor, weight: Tensor, grid: Grid, shape: Shape) -> Tensor:
        kernel, groups = (weight.shape[2], weight.shape[3]), grid.groups
        height, width = values.shape[2:]
        matrix = weight.reshape(groups, len(weight) // groups, -1).transpose(1, 2)
        pieces = []
        for piece in torch.split(values, _at_once(values, weight, (groups * weight.shape[1], height, width))):
            rows = torch.matmul(matrix, piece.reshape(len(piece), groups, -1, height * width)).reshape(len(piece), -1, height * width)
            pieces.append(_cut(_folded(rows, kernel, grid, (height, width)), grid.padding, shape))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _windows(size: int, axis: int, kernel: Sequence[int], grid: Grid) -> int:
    """How many windows fit along one axis."""
    return (size + 2 * grid.padding[axis] - grid.dilation[axis] * (kernel[axis] - 1) - 1) // grid.stride[axis] + 1


def _at_once(values: Tensor, weight: Tensor, windows: Shape) -> int:
    """How many samples to lay out together."""
    budget = ROWS_CUDA if values.device.type == "cuda" else ROWS
    return max(1, budget // (max(values.shape[1], windows[0]) * prod(weight.shape[2:]) * prod(windows[1:])))


def _torch_spread(values: Tensor, weight: Tensor, grid: Grid, shape: Shape) -> Tensor:
    """torch's transposed convolution: on a CPU oneDNN's direct one, or a product of matrices."""
    kernel, steps = weight.shape[2:], zip(grid.stride, grid.dilation, strict=True)
    reach = [(values.shape[2 + i] - 1) * grid.stride[i] + grid.dilation[i] * (kernel[i] - 1) + 1 - 2 * grid.padding[i] for i in (0, 1)]
    missing = (shape[1] - reach[0], shape[2] - reach[1])
    if all(0 <= m < max(step) for m, step in zip(missing, steps, strict=True)) and min(reach) >= 1:
        return functional.conv_transpose2d(values, weight, None, grid.stride, grid.padding, missing, grid.groups, grid.dilation)
    canvas = functional.conv_transpose2d(values, weight, None, grid.stride, 0, 0, grid.groups, grid.dilation)
    return _cut(canvas, grid.padding, shape)


TORCH: Convolutions = _Torch()


def exact(dtype: torch.dtype, device: torch.device) -> Convolutions:
    """The fastest convolutions that are exact on whole numbers which `dtype` holds."""
    direct = (
        dtype == torch.float32
        and device.type == "cpu"
        and platform.machine().lower() in ("x86_64", "amd64")  # elsewhere oneDNN may choose fast transforms
        and bool(torch._C._has_mkldnn)
    )
    return _Direct() if direct else _Matrix()


def shortened(device: torch.device) -> bool:
    """Whether somebody has allowed products of float32 to be computed in a shorter type here."""
    return torch.get_float32_matmul_precision() != "highest" or (device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32)
