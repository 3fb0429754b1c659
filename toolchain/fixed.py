"""The arithmetic of the model step: Loihi's integers, and the same rule in floats. Nothing else in the project adds, shifts or rounds spikes.

Sources: Loihi's decay and 24-bit membrane as published in Lava's LIF process (bit-accurate model); the couple's rule is SPIDE's ternary neuron
(Xiao et al., Neural Networks 2023) with reset by subtraction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, log2, prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from toolchain.ir import (
    DECAY_ONE,
    EXPONENT_LIMIT,
    MANTISSA_LIMIT,
    POTENTIAL_LIMIT,
    Array,
    AvgPool2d,
    Conv2d,
    Dense,
    Dynamics,
    Graph,
    Identity,
    Op,
    Phase,
    Scale,
    Shape,
    Synapse,
    Upsample,
    entry_shape,
    exponent_of,
    largest_sum,
    shapes_along,
)
from toolchain.ir import leak_sum as leak_sum

CURRENT_MANTISSA = (-MANTISSA_LIMIT, MANTISSA_LIMIT - 1)
"""Range of a bias mantissa: 13 bit signed."""

CURRENT_EXPONENT_MAX = EXPONENT_LIMIT
"""A bias exponent has 3 bits."""

EXACT_FLOAT32 = 2**24
"""Whole numbers below this are exact in float32, whatever order they are added in."""

EXACT_FLOAT64 = 2**53
"""The same for float64."""

INT32_SAFE = 2**31 - 1
"""The largest sum that int32 holds."""

WEIGHT_EXPONENT_MAX = EXPONENT_LIMIT
"""A weight exponent is 4 bit signed; negative ones floor and are never used."""


class Step(NamedTuple):
    """One model step of a population: potential after reset and leak, spikes in {-1, 0, 1} (of a relay the graded values), and which neurons saturated."""

    potential: Array
    spikes: Array
    saturated: npt.NDArray[np.bool_]


def step(potential: Array, current: Array, dynamics: Dynamics, *, integer: bool) -> Step:
    """Advance a population by one model step (see `ir`): add, clamp, fire, reset, leak. Shapes are free but equal.

    `current` is the sum of everything that arrived, bias and drive, in a wide type (int64 or float64).
    """
    if dynamics.members == "graded":
        total, saturated = clamp(current) if integer else (current, np.zeros(current.shape, np.bool_))
        return Step(total, total, saturated)
    if dynamics.members == "none":
        total = leak(potential, dynamics.leak, integer=integer) + current
        total, saturated = clamp(total) if integer else (total, np.zeros(total.shape, np.bool_))
        return Step(total, np.zeros(total.shape, np.int8), saturated)
    total = potential + current
    total, saturated = clamp(total) if integer else (total, np.zeros(total.shape, np.bool_))
    spikes = (total >= dynamics.threshold).astype(np.int8)
    if dynamics.members == "both":
        spikes -= (total <= -dynamics.threshold).astype(np.int8)
    return Step(leak(total - dynamics.reset * spikes.astype(total.dtype), dynamics.leak, integer=integer), spikes, saturated)


def clamp(total: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
    """`total` held to 24 bit signed, and which entries were outside."""
    saturated = (total > POTENTIAL_LIMIT) | (total < -POTENTIAL_LIMIT)
    return np.clip(total, -POTENTIAL_LIMIT, POTENTIAL_LIMIT), saturated


def leak(potential: Array, factor: float, *, integer: bool) -> Array:
    """Floats: factor * u. Integers: sign(u) * ((|u| * (4096 - decay)) >> 12), which rounds towards zero."""
    if factor == 1:
        return potential
    if not integer:
        return potential * factor
    keep = DECAY_ONE - decay(factor)
    leaked: Array = np.sign(potential) * ((np.abs(potential) * keep) >> 12)
    return leaked


def decay(factor: float) -> int:
    """The 12-bit decay nearest to a leak: leak = (4096 - decay) / 4096."""
    return DECAY_ONE - max(1, round(factor * DECAY_ONE))


def nearest_leak(factor: float) -> float:
    """The representable leak nearest to `factor`."""
    return (DECAY_ONE - decay(factor)) / DECAY_ONE


def apply(ops: Sequence[Op], tensors: Mapping[str, Array], values: Array, shape: Shape, *, integer: bool) -> Array:
    """Apply linear operations left to right to `values` (batch, *source) and return (batch, *shape), int64 or float64.

    New operations are added here and in `ir.operations`; this is their definition, not their fastest form.
    """
    result = values.astype(np.int64 if integer else np.float64)
    source = values.shape[1:]
    result = result.reshape(len(values), *entry_shape(ops, source, shape, tensors))
    for op, made in zip(ops, shapes_along(ops, source, shape, tensors), strict=True):
        result = _applied(op, tensors, result, made, integer).reshape(len(values), *made)
        exponent = getattr(op, "exponent", 0)
        result = np.left_shift(result, exponent) if integer and exponent else result
    return result.reshape(len(values), *shape)


def summed(ops: Sequence[Op]) -> tuple[Op, ...]:
    """`ops` for `apply` in floats with windows summed instead of averaged, as integer graphs have them."""
    made: list[Op] = []
    for op in ops:
        made.append(op)
        if isinstance(op, AvgPool2d):
            made.append(Scale(float(prod(op.kernel))))
    return tuple(made)


def _applied(op: Op, tensors: Mapping[str, Array], values: Array, shape: Shape, integer: bool) -> Array:
    """One operation, without its exponent; `shape` is what it makes."""
    if isinstance(op, Identity):
        return values
    if isinstance(op, Scale):
        scaled = values if integer else values * op.factor
        if op.weight is None:
            return scaled
        factors = tensors[op.weight].astype(values.dtype)
        return np.asarray(scaled * factors.reshape(-1, *[1] * (values.ndim - 2)))
    if isinstance(op, Upsample):
        return _block_sums(values, op.factor) if op.transpose else values.repeat(op.factor, 2).repeat(op.factor, 3)
    if isinstance(op, AvgPool2d):
        pooled: Array = _spread(values, op, shape) if op.transpose else _window_sums(values, op)
        return pooled if integer else pooled / prod(op.kernel)
    weight = tensors[op.weight].astype(values.dtype)
    if isinstance(op, Dense):
        return product(values.reshape(len(values), -1), weight if op.transpose else weight.T)
    grid = Grid(op.stride, op.padding, op.dilation, op.groups)
    gathers = isinstance(op, Conv2d) != op.transpose
    return convolve(values, weight, grid, shape) if gathers else convolve_transposed(values, weight, grid, shape)


class Grid(NamedTuple):
    """Where the windows of a convolution lie: stride, padding and dilation in rows and columns, and the number of channel groups."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def convolve(values: Array, weight: Array, grid: Grid, shape: Shape) -> Array:
    """Cross-correlation of `values` (batch, channels, height, width) with `weight` (out, in / groups, kh, kw), cut to `shape`."""
    kh, kw = weight.shape[2:]
    rows = _rows(values, (kh, kw), grid)[:, :, : shape[1], : shape[2]]
    batch, _, height, width, _, _ = rows.shape
    groups = grid.groups
    grouped = rows.reshape(batch, groups, -1, height, width, *weight.shape[2:]).transpose(1, 0, 3, 4, 2, 5, 6)
    matrix = grouped.reshape(groups, batch * height * width, -1)
    kernel = weight.reshape(groups, len(weight) // groups, -1).transpose(0, 2, 1)
    made = product(matrix, kernel).reshape(groups, batch, height, width, -1)
    return made.transpose(1, 0, 4, 2, 3).reshape(batch, len(weight), height, width)


def window_products(values: Array, images: Array, kernel: tuple[int, ...], grid: Grid) -> Array:
    """What the weights of a convolution learn from: the sum over samples and windows of each value (batch, out, height, width) times the window of `images` (batch, in,
    rows, columns) that it belongs to, (out, in / groups, kh, kw). Exact in integers."""
    batch, out, height, width = values.shape
    rows = _rows(images, (kernel[0], kernel[1]), grid)[:, :, :height, :width]
    groups = grid.groups
    grouped = rows.reshape(batch, groups, -1, height, width, *kernel).transpose(1, 0, 3, 4, 2, 5, 6)
    matrix = grouped.reshape(groups, batch * height * width, -1)
    by_group = values.reshape(batch, groups, out // groups, height, width).transpose(1, 2, 0, 3, 4).reshape(groups, out // groups, -1)
    return product(by_group, matrix).reshape(out, -1, *kernel)


def _rows(values: Array, kernel: tuple[int, int], grid: Grid) -> Array:
    """A view (batch, channels, windows down, windows across, kh, kw) of the padded values."""
    padded = np.pad(values, ((0, 0), (0, 0), *((p, p) for p in grid.padding)))
    down, across = (d * (k - 1) + 1 for d, k in zip(grid.dilation, kernel, strict=True))
    view: Array = np.lib.stride_tricks.sliding_window_view(padded, (down, across), axis=(2, 3))  # type: ignore[call-overload]  # NumPy's stub takes one axis only
    return view[:, :, :: grid.stride[0], :: grid.stride[1], :: grid.dilation[0], :: grid.dilation[1]]


def convolve_transposed(values: Array, weight: Array, grid: Grid, shape: Shape) -> Array:
    """The adjoint of `convolve`: `values` (batch, channels, height, width) with `weight` (in, out / groups, kh, kw) spread into images of `shape`."""
    batch, channels, height, width = values.shape
    groups = grid.groups
    rows = (
        values.reshape(batch, groups, channels // groups, height * width).transpose(1, 0, 3, 2).reshape(groups, batch * height * width, -1)
    )
    made = product(rows, weight.reshape(groups, channels // groups, -1)).reshape(groups, batch, height, width, *weight.shape[1:])
    made = made.transpose(1, 0, 4, 2, 3, 5, 6).reshape(batch, -1, height, width, *weight.shape[2:])
    return _gathered(made, grid, shape)


def _gathered(windows: Array, grid: Grid, shape: Shape) -> Array:
    """Add windows (batch, channels, down, across, kh, kw) up where they lie in an image of `shape`."""
    batch, channels, down, across, kh, kw = windows.shape
    (sy, sx), (py, px), (dy, dx) = grid.stride, grid.padding, grid.dilation
    height = max(shape[1] + 2 * py, (down - 1) * sy + (kh - 1) * dy + 1)
    width = max(shape[2] + 2 * px, (across - 1) * sx + (kw - 1) * dx + 1)
    image = np.zeros((batch, channels, height, width), windows.dtype)
    for y in range(kh):
        for x in range(kw):
            image[:, :, y * dy : y * dy + (down - 1) * sy + 1 : sy, x * dx : x * dx + (across - 1) * sx + 1 : sx] += windows[..., y, x]
    return image[:, :, py : py + shape[1], px : px + shape[2]]


def _window_sums(values: Array, op: AvgPool2d) -> Array:
    rows: Array = _rows(values, op.kernel, Grid(op.stride, op.padding, (1, 1), 1)).sum(axis=(4, 5))
    return rows


def _spread(values: Array, op: AvgPool2d, shape: Shape) -> Array:
    windows = np.broadcast_to(values[..., None, None], (*values.shape, *op.kernel))
    return _gathered(windows, Grid(op.stride, op.padding, (1, 1), 1), shape)


def _block_sums(values: Array, factor: int) -> Array:
    batch, channels, height, width = values.shape
    blocks: Array = values.reshape(batch, channels, height // factor, factor, width // factor, factor).sum(axis=(3, 5))
    return blocks


def product(rows: Array, matrix: Array) -> Array:
    """rows @ matrix (also of stacks). Whole numbers go through float64 where no sum can pass 2^53: exact, and many times faster than int64."""
    if not np.issubdtype(rows.dtype, np.integer) or rows.size == 0:
        return np.asarray(rows @ matrix)
    largest = float(np.abs(rows).max()) * float(np.abs(matrix).sum(axis=-2).max(initial=0))
    if largest < EXACT_FLOAT64:
        return (rows.astype(np.float64) @ matrix.astype(np.float64)).astype(np.int64)
    return np.asarray(rows @ matrix)


def largest_product(graph: Graph, synapse: Synapse) -> tuple[int, int]:
    """For an integer graph: the largest partial sum of mantissas a product of this synapse can meet, in whatever order, and the largest current it delivers.

    A float type holds all partial sums exactly while the first is below `EXACT_FLOAT32` or `EXACT_FLOAT64`.
    """
    source = graph.population(synapse.source)
    delivered = {"input": int(graph.scale("forward", source.name)), "linear": POTENTIAL_LIMIT}.get(source.kind, 1)
    partial, delivered = largest_mantissa(synapse.ops, graph.tensors, delivered)
    return partial, delivered << exponent_of(synapse.ops)


def largest_mantissa(ops: Sequence[Op], tensors: Mapping[str, Array], incoming: int) -> tuple[int, int]:
    """The largest partial sum of mantissas that a composition can meet where no value it takes exceeds `incoming`, and the largest it delivers: a shift rounds nothing,
    so exponents do not count."""
    partial = incoming
    for op in ops:
        incoming = largest_sum(op, tensors, incoming)[0]
        partial = max(partial, incoming)
    return partial, incoming


def largest_total(graph: Graph, phase: Phase, name: str) -> int:
    """For an integer graph: a bound on everything that a population adds up in a step, its potential, all that can arrive, biases and injected current."""
    # A source fires at most once between two steps of its target, but its spikes may pile up before the target's first step.
    piled = 1 + max(phase.timing.start.values(), default=0) // phase.timing.period
    arriving = piled * sum(largest_product(graph, synapse)[1] for synapse in phase.synapses if synapse.target == name)
    return POTENTIAL_LIMIT + arriving + largest_constant(graph, phase, name)


def largest_constant(graph: Graph, phase: Phase, name: str) -> int:
    """For an integer graph: a bound on bias and injected current of a population. A readout's bias is the host's (`codec.logits`) and does not count."""
    biases = () if graph.population(name).kind == "readout" else phase.bias.get(name, ())
    largest = sum(int(np.abs(graph.tensors[b.tensor].astype(np.int64)).max(initial=0)) << b.exponent for b in biases)
    return largest + sum(-CURRENT_MANTISSA[0] << drive.exponent for drive in phase.drive if drive.population == name)


class Mantissas(NamedTuple):
    """Integers with a shared exponent: value = mantissa << exponent; `clipped` counts values outside the range."""

    mantissa: npt.NDArray[np.int64]
    exponent: int
    clipped: int


def mantissas(values: Array, exponent: int, low: int, high: int) -> Mantissas:
    """Round float `values` (in graph units) to the nearest multiple of 2^exponent within [low, high] mantissas; ties go to even."""
    rounded = np.rint(values / 2.0**exponent)
    clipped = int(((rounded < low) | (rounded > high)).sum())
    return Mantissas(np.clip(rounded, low, high).astype(np.int64), exponent, clipped)


def diffused(values: Array, exponent: int, low: int, high: int) -> Mantissas:
    """As `mantissas`, for weights of images, (..., height, width): what rounding changes at a pixel is made up for at its neighbours that come later, row by row to
    and fro (Floyd and Steinberg 1976). Neighbouring pixels are alike, so the errors cancel in the sum; what cutting at `low` or `high` costs is passed on up to one step."""
    wanted = values / 2.0**exponent
    made = np.empty_like(wanted)
    height, width = values.shape[-2:]
    clipped = 0
    for y in range(height):
        ahead = 1 if y % 2 == 0 else -1
        for x in range(width)[::ahead]:
            nearest = np.rint(wanted[..., y, x])
            made[..., y, x] = nearest.clip(low, high)
            clipped += int((nearest != made[..., y, x]).sum())
            error = (wanted[..., y, x] - made[..., y, x]).clip(-1, 1)
            for dy, dx, share in ((0, ahead, 7 / 16), (1, -ahead, 3 / 16), (1, 0, 5 / 16), (1, ahead, 1 / 16)):
                if y + dy < height and 0 <= x + dx < width:
                    wanted[..., y + dy, x + dx] += share * error
    return Mantissas(made.astype(np.int64), exponent, clipped)


def exponent_for(bound: float, high: float, largest: int) -> int:
    """The smallest exponent e in 0..largest with bound <= high * 2^e (`largest` where none suffices)."""
    if bound <= high:
        return 0
    return min(largest, ceil(log2(bound / high)))


def weight_range(bits: int) -> tuple[int, int]:
    """Mantissas of a signed weight of `bits` bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def injected(values: Array, exponent: int) -> Mantissas:
    """An injected current: float `values` in graph units as 13-bit mantissas at `exponent`."""
    return mantissas(values, exponent, *CURRENT_MANTISSA)


def host_current(total: npt.NDArray[np.int64], shift: int, exponent: int) -> Mantissas:
    """Round an exact host sum that carries `shift` extra bits to a 13-bit mantissa (half up), saturating."""
    rounded = (total + (1 << (shift - 1) if shift else 0)) >> shift
    low, high = CURRENT_MANTISSA
    clipped = int(((rounded < low) | (rounded > high)).sum())
    return Mantissas(np.clip(rounded, low, high), exponent, clipped)
