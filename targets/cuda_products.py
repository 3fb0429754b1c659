"""What a connection adds to the currents of its target, on static buffers, whole numbers exactly: the products of `cuda_ticks`.

Two forms. `Int8Product` lays windows out as rows of int8 and multiplies them by int8 weights into int32, which is exact whatever the sums up to 2^31: on CUDA cuBLAS's
tensor cores through `torch._int_mm`. It takes spikes, and input levels up to 127, through one operation with weights: fully connected, a convolution, or a transposed one
(whose image is spread with zeros in between first, so that it becomes a convolution). `FloatProduct` takes everything else, in float32 where every partial sum stays below 2^24
and in float64 below 2^53, never in TF32. 16-bit floats are no form: torch rounds what they make to 11 bits or fewer, however wide it adds.

Images are held channels last, (samples, height, width, channels) flattened, so that a window's row is made of long runs and a product lands where its target keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from toolchain.ir import (
    Array,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Graph,
    Identity,
    Scale,
    Shape,
    Synapse,
    entry_shape,
    exponent_of,
    shapes_along,
)
from toolchain.targets import torch_operations

INT8 = (-128, 127)

ROWS_AT_ONCE = 2**27
"""Bytes of windows laid out at once."""

FEWEST_ROWS = 32
"""cuBLAS takes no fewer than 17 rows of int8, and computes some multiples of less than 8 wrongly: rows come in eights, from here on."""

WIDTH = 16
"""Rows and columns of int8 matrices are padded to multiples of this many bytes, as tensor cores take them."""

MANY_GROUPS = 16
"""A convolution of more channel groups is left to floats, all groups at once: one small product for each would only cost launches."""

Pair = tuple[int, int]


class Product(Protocol):
    """Adds the currents of `spikes` (samples, source neurons), times a mask of 0 and 1 where there is one, to `waiting` (samples, target neurons); `first` overwrites it."""

    def __call__(self, spikes: Tensor, mask: Tensor | None, waiting: Tensor, *, first: bool) -> None: ...


def inward(values: Tensor, shape: Shape) -> Tensor:
    """Values (samples, *shape) or flattened, as this module holds them: images channels last."""
    if len(shape) != 3:
        return values.reshape(len(values), -1)
    return values.reshape(len(values), *shape).permute(0, 2, 3, 1).reshape(len(values), -1)


def outward(values: Tensor, shape: Shape) -> Tensor:
    """The inverse of `inward`, flattened."""
    if len(shape) != 3:
        return values
    channels, height, width = shape
    return values.reshape(len(values), height, width, channels).permute(0, 3, 1, 2).reshape(len(values), -1)


@contextmanager
def unshortened() -> Iterator[None]:
    """Within it torch multiplies float32 as float32, on CPU and on CUDA, whatever shorter type the user has allowed."""
    places: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    if all(hasattr(place, "fp32_precision") for place in places):  # torch 2.9 and later, which raise where both ways of saying it are mixed
        before = [place.fp32_precision for place in places]
        try:
            for place in places:
                place.fp32_precision = "ieee"
            yield
        finally:
            for place, precision in zip(places, before, strict=True):
                place.fp32_precision = precision
        return
    allowed = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


class Windows(NamedTuple):
    """A connection as one product of matrices: rows are windows of an image (height, width, channels) that the source is laid out on.

    canvas      its rows and columns; source pixel y lies at row offset[0] + y * spread[0], what falls outside is never read
    kernel, stride, dilation    of the windows, of which there are `made` down and across
    matrix      int8, (groups, kernel rows * kernel columns * channels / groups, target channels / groups)
    """

    source: tuple[int, int, int]
    canvas: Pair
    offset: Pair
    spread: Pair
    kernel: Pair
    stride: Pair
    dilation: Pair
    made: Pair
    matrix: Array

    @property
    def in_place(self) -> bool:
        """Whether the source is its own canvas."""
        return self.source[:2] == self.canvas and self.offset == (0, 0) and self.spread == (1, 1)

    @property
    def are_rows(self) -> bool:
        """Whether the pixels of the canvas are the rows already."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and len(self.matrix) == 1 and self.made == self.canvas


def windows_of(graph: Graph, synapse: Synapse) -> Windows | None:
    """`synapse` as a product of int8 matrices, or None where it is none: several operations, weights beyond 8 bits, an image that changes its shape on the way."""
    source, target = graph.population(synapse.source).shape, graph.population(synapse.target).shape
    found = [op for op in synapse.ops if not isinstance(op, Identity) and not (isinstance(op, Scale) and op.weight is None)]
    if len(found) != 1 or not isinstance(found[0], (Dense, Conv2d, ConvTranspose2d)):
        return None
    op = found[0]
    weight = graph.tensors[op.weight]
    if not np.issubdtype(weight.dtype, np.integer) or weight.min(initial=0) < INT8[0] or weight.max(initial=0) > INT8[1]:
        return None
    if isinstance(op, Dense):
        return _dense(weight if op.transpose else weight.T, source, target)
    entry, made = entry_shape(synapse.ops, source, target, graph.tensors), shapes_along(synapse.ops, source, target, graph.tensors)[-1]
    if entry != source or made != target or op.groups > MANY_GROUPS:
        return None
    return _gathered(op, weight, source, target) if isinstance(op, Conv2d) != op.transpose else _spread(op, weight, source, target)


def _dense(matrix: Array, source: Shape, target: Shape) -> Windows:
    """`matrix` is (inputs, outputs), in the order of the graph."""
    held = matrix[_order(source)][:, _order(target)]
    return Windows((1, 1, len(held)), (1, 1), (0, 0), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1), held[None].astype(np.int8))


def _order(shape: Shape) -> Array:
    """Where in the graph's order each neuron is that this module holds."""
    places = np.arange(prod(shape))
    return places.reshape(shape).transpose(1, 2, 0).reshape(-1) if len(shape) == 3 else places


def _gathered(op: Conv2d | ConvTranspose2d, weight: Array, source: Shape, target: Shape) -> Windows:
    """A convolution, weight (out, in / groups, kh, kw)."""
    channels, *size = source
    kernel, made = weight.shape[2:], target[1:]
    reach = [(made[i] - 1) * op.stride[i] + op.dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    canvas = [max(op.padding[i] + size[i], reach[i]) for i in (0, 1)]
    matrix = weight.reshape(op.groups, len(weight) // op.groups, -1, *kernel).transpose(0, 3, 4, 2, 1)
    return _windows((size[0], size[1], channels), canvas, op.padding, (1, 1), op.stride, op.dilation, made, matrix)


def _spread(op: Conv2d | ConvTranspose2d, weight: Array, source: Shape, target: Shape) -> Windows:
    """A transposed convolution, weight (in, out / groups, kh, kw): the same as a convolution with the kernel turned round, of an image with zeros between its pixels."""
    channels, *size = source
    kernel, made = weight.shape[2:], target[1:]
    offset = [op.dilation[i] * (kernel[i] - 1) - op.padding[i] for i in (0, 1)]
    canvas = [made[i] + op.dilation[i] * (kernel[i] - 1) for i in (0, 1)]
    turned = weight[:, :, ::-1, ::-1].reshape(op.groups, channels // op.groups, -1, *kernel)
    return _windows((size[0], size[1], channels), canvas, offset, op.stride, (1, 1), op.dilation, made, turned.transpose(0, 3, 4, 1, 2))


def _windows(
    source: tuple[int, int, int],
    canvas: list[int],
    offset: list[int] | Pair,
    spread: Pair,
    stride: Pair,
    dilation: Pair,
    made: Shape,
    matrix: Array,
) -> Windows:
    """`matrix` is (groups, kh, kw, in / groups, out / groups)."""
    groups, kh, kw, into, out = matrix.shape
    held = np.ascontiguousarray(matrix.reshape(groups, kh * kw * into, out)).astype(np.int8)
    return Windows(source, (canvas[0], canvas[1]), (offset[0], offset[1]), spread, (kh, kw), stride, dilation, (made[0], made[1]), held)


class Scratch:
    """Rows and products of all connections of a chunk, one after the other in the same two buffers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bytes, self._sums = 0, 0
        self._rows = self._products = torch.empty(0, device=device)

    def reserve(self, rows: int, width: int, columns: int) -> None:
        self._bytes, self._sums = max(self._bytes, rows * width), max(self._sums, rows * columns)

    def allocate(self) -> None:
        self._rows = torch.zeros(self._bytes, dtype=torch.int8, device=self._device)
        self._products = torch.zeros(self._sums, dtype=torch.int32, device=self._device)

    def rows(self, count: int, width: int) -> Tensor:
        return self._rows[: count * width].view(count, width)

    def products(self, count: int, columns: int) -> Tensor:
        return self._products[: count * columns].view(count, columns)


class Int8Product:
    """See the module. `columns`: the weights lie column by column, which tensor cores read best, instead of row by row; `masked`: calls may come with a mask."""

    def __init__(
        self, windows: Windows, samples: int, exponent: int, scratch: Scratch, device: torch.device, *, columns: bool, masked: bool
    ) -> None:
        self._windows, self._samples, self._exponent, self._scratch = windows, samples, exponent, scratch
        groups, width, out = windows.matrix.shape
        self._width, self._out = width, out
        padded = np.zeros((groups, _up(width, WIDTH), _up(out, WIDTH)), np.int8)
        padded[:, :width, :out] = windows.matrix
        held = np.ascontiguousarray(padded.transpose(0, 2, 1)) if columns else padded
        matrix = torch.as_tensor(held, device=device)
        self._matrices = list(matrix.transpose(1, 2) if columns else matrix)
        self._places = prod(windows.made)
        self._at_once = max(1, min(samples, ROWS_AT_ONCE // (self._places * padded.shape[1])))
        scratch.reserve(_rows(self._at_once * self._places), *padded.shape[1:])
        canvas = (samples, *windows.canvas, windows.source[2]) if masked or not windows.in_place else (0,)
        self._canvas = torch.zeros(canvas, dtype=torch.int8, device=device)

    def __call__(self, spikes: Tensor, mask: Tensor | None, waiting: Tensor, *, first: bool) -> None:
        canvas = self._laid_out(spikes, mask)
        current = waiting.view(self._samples * self._places, len(self._matrices), self._out)
        for start in range(0, self._samples, self._at_once):
            count = min(self._at_once, self._samples - start)
            part = current[start * self._places : (start + count) * self._places]
            for group, matrix in enumerate(self._matrices):
                rows = self._rows(canvas, start, count, group)
                mine = part[:, group]
                if (
                    first
                    and self._exponent == 0
                    and mine.is_contiguous()
                    and mine.dtype == torch.int32
                    and mine.shape == (len(rows), matrix.shape[1])
                ):
                    multiply(rows, matrix, mine)
                    continue
                made = self._scratch.products(len(rows), matrix.shape[1])
                multiply(rows, matrix, made)
                deposit(made[: len(part), : self._out], mine, self._exponent, first=first)

    def _laid_out(self, spikes: Tensor, mask: Tensor | None) -> Tensor:
        """The source on its canvas, whose other pixels stay 0."""
        windows = self._windows
        source = spikes.view(self._samples, *windows.source)
        if mask is None and windows.in_place:
            return source
        (top, here), (left, there) = (_placed(windows.source[i], windows.offset[i], windows.spread[i], windows.canvas[i]) for i in (0, 1))
        inner = self._canvas[:, top, left]
        if mask is None:
            inner.copy_(source[:, here, there])
        else:
            torch.mul(source[:, here, there], mask.view(source.shape)[:, here, there], out=inner)
        return self._canvas

    def _rows(self, canvas: Tensor, start: int, count: int, group: int) -> Tensor:
        """Windows of some samples as rows, padded; what the padding holds meets weights of 0, or makes rows that nobody reads."""
        windows, total = self._windows, count * self._places
        padded = _up(self._width, WIDTH)
        if windows.are_rows and padded == self._width and total == _rows(total):
            return canvas[start : start + count].view(total, padded)
        rows = self._scratch.rows(_rows(total), padded)
        into = self._width // prod(windows.kernel)
        word = next(w for w in (torch.int64, torch.int32, torch.int16, torch.int8) if into % w.itemsize == 0)  # several channels at once
        image, length = canvas[start : start + count].view(word), into // word.itemsize
        by_sample, by_row, by_pixel, _ = image.stride()
        (sy, sx), (dy, dx) = windows.stride, windows.dilation
        found = image.as_strided(
            (count, *windows.made, *windows.kernel, length),
            (by_sample, sy * by_row, sx * by_pixel, dy * by_row, dx * by_pixel, 1),
            image.storage_offset() + group * length,
        )
        own = rows[:total].view(word)[:, : self._width // word.itemsize]
        own.view(found.shape).copy_(found)
        return rows


def _placed(size: int, offset: int, spread: int, canvas: int) -> tuple[slice, slice]:
    """Where the pixels of one axis lie on a canvas, and which of them do."""
    first = max(0, -(offset // spread))
    last = min(size, (canvas - 1 - offset) // spread + 1)
    if last <= first:
        return slice(0, 0), slice(0, 0)
    return slice(offset + first * spread, offset + (last - 1) * spread + 1, spread), slice(first, last)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _rows(count: int) -> int:
    """Rows of a product that holds `count` of them."""
    return max(FEWEST_ROWS, _up(count, 8))


def multiply(rows: Tensor, matrix: Tensor, made: Tensor) -> None:
    """made = rows @ matrix, int8 into int32."""
    if rows.device.type == "cuda":
        torch._int_mm(rows, matrix, out=made)
    else:
        torch.mm(rows.to(torch.int32), matrix.to(torch.int32), out=made)


def deposit(made: Tensor, waiting: Tensor, exponent: int, *, first: bool) -> None:
    """Add `made` << `exponent` to `waiting`; where it is the first, put it there."""
    if not first:
        waiting.add_(made, alpha=1 << exponent)
    elif exponent and made.dtype == waiting.dtype:
        torch.mul(made, 1 << exponent, out=waiting)
    else:
        waiting.copy_(made)
        if exponent:
            waiting.mul_(1 << exponent)


class FloatProduct:
    """See the module. `kind` holds every partial sum exactly; call it within `unshortened`."""

    def __init__(self, graph: Graph, synapse: Synapse, kind: torch.dtype, weights: Callable[[str], Tensor], device: torch.device) -> None:
        self._source, self._target = graph.population(synapse.source).shape, graph.population(synapse.target).shape
        self._kind, self._exponent = kind, exponent_of(synapse.ops)
        convolutions = torch_operations.exact(kind, device)
        self._operations = torch_operations.Composition(
            synapse.ops, self._source, self._target, graph.tensors, weights, convolutions=convolutions, sums=True
        )

    def __call__(self, spikes: Tensor, mask: Tensor | None, waiting: Tensor, *, first: bool) -> None:
        values = spikes.to(self._kind) if mask is None else spikes.to(self._kind) * mask
        made = inward(self._operations(outward(values, self._source)), self._target)
        deposit(made.to(waiting.dtype), waiting, self._exponent, first=first)


def agrees(product: Product, sure: Product, spikes: Tensor, waiting: Tensor) -> bool:
    """Whether `product` makes of `spikes` what `sure` makes of them; False too where the device refuses it."""
    found, expected = torch.zeros_like(waiting), torch.zeros_like(waiting)
    try:
        product(spikes, None, found, first=True)
    except RuntimeError:  # cuBLAS knows no kernel for these shapes on this GPU
        return False
    sure(spikes, None, expected, first=True)
    return bool(torch.equal(found, expected))
