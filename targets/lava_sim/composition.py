"""The operations of a connection in NumPy, made ready for a Lava process: final weights, one float type in which every sum is exact, no threads of torch.

Spikes of whole numbers take the native kernel (`events`) where there is one. `toolchain.fixed` defines the operations; here windows are laid out a place of the kernel at a time, channels last, which is two to three times faster.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from toolchain.fixed import EXACT_FLOAT32, Grid, largest_product
from toolchain.ir import (
    Array,
    AvgPool2d,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Graph,
    Identity,
    Op,
    Scale,
    Shape,
    Synapse,
    Upsample,
    entry_shape,
    shapes_along,
    weight_of,
)
from toolchain.targets.lava_sim.events import events

if TYPE_CHECKING:
    from toolchain.targets.lava_sim.channel import SendPort

Operation = Callable[[Array], Array]

ROWS = 2**20
"""Values of windows laid out at once: more leave the cache."""


class Composition:
    """What a synapse does to spikes: called with (batch, source neurons), it returns (batch, target neurons) as currents of `dtype`.

    Exponents are multiplied into the weights. A copy of the network without spikes costs no product where others have some.
    """

    def __init__(self, graph: Graph, synapse: Synapse) -> None:
        source, target = graph.population(synapse.source).shape, graph.population(synapse.target).shape
        shapes = shapes_along(synapse.ops, source, target, graph.tensors)
        self.dtype = exact_type(graph, synapse)
        self.message = message_type(graph, synapse)
        self.inputs, self.outputs = prod(source), prod(target)
        self._entry = entry_shape(synapse.ops, source, target, graph.tensors)
        steps = [(op, made) for op, made in zip(synapse.ops, shapes, strict=True) if not isinstance(op, Identity)]
        self._graph, self._made = graph, steps
        self._copies = not steps
        self._still = graph.population(synapse.source).kind == "input"
        self._last: tuple[Array, Array] | None = None
        self._dense = len(steps) == 1 and isinstance(steps[0][0], Dense)
        self._events = events(graph, synapse, shapes, self._entry, self.message)

    @cached_property
    def _steps(self) -> list[tuple[Operation, Shape]]:
        """Made where they are first needed: in the process, and not in a host that forks many."""
        graph = self._graph
        return [(_prepared(op, shape, _final(graph, op, self.dtype), graph.integer), shape) for op, shape in self._made]

    def __call__(self, spikes: Array) -> Array:
        """The currents (batch, target neurons) of `spikes` (batch, source neurons)."""
        made = np.empty((len(spikes), self.outputs), self.message)
        self._fill(made, spikes)
        return made

    def into(self, spikes: Array, out: SendPort, count: int | None) -> None:
        """Make them the next message of a port. `count`: how many spikes there are, if known."""
        self._fill(out.room(self.message), spikes, count)

    def _fill(self, currents: Array, spikes: Array, count: int | None = None) -> None:
        if self._events is not None and spikes.dtype == np.int8 and self._events.worth(spikes, count):
            self._events(spikes, currents)
            return
        if self._copies:
            currents[...] = spikes
            return
        if self._still:
            currents[...] = self._remembered(spikes)
            return
        self._multiply(currents, spikes)

    def _remembered(self, values: Array) -> Array:
        """Of an input: its image is the same at every step, and so are its currents."""
        if self._last is None or not np.array_equal(self._last[0], values):
            made = np.empty((len(values), self.outputs), self.message)
            self._multiply(made, values)
            self._last = values.copy(), made
        return self._last[1]

    def _multiply(self, currents: Array, spikes: Array) -> None:
        if self._dense:
            currents[...] = self._through(spikes)
            return
        active = spikes.any(axis=1)
        if active.all():
            currents[...] = self._through(spikes)
            return
        currents[...] = 0
        if active.any():
            currents[active] = self._through(spikes[active])

    def _through(self, spikes: Array) -> Array:
        made = spikes.astype(self.dtype).reshape(-1, *self._entry)
        for step, shape in self._steps:
            made = step(made).reshape(-1, *shape)
        return made.reshape(len(spikes), -1)


def exact_type(graph: Graph, synapse: Synapse) -> npt.DTypeLike:
    """The float type whose sums are exact whatever their order: every partial sum is a whole number below 2^24 or 2^53.

    An exponent multiplies weights by a power of two, which rounds nothing. Float graphs take float64.
    """
    return np.float32 if graph.integer and largest_product(graph, synapse)[0] < EXACT_FLOAT32 else np.float64


def message_type(graph: Graph, synapse: Synapse) -> npt.DTypeLike:
    """The narrowest type that holds every current this synapse can deliver."""
    if not graph.integer:
        return np.float64
    largest = largest_product(graph, synapse)[1]
    return next(kind for kind in (np.int8, np.int16, np.int32, np.int64) if largest <= np.iinfo(kind).max)


def _final(graph: Graph, op: Op, dtype: npt.DTypeLike) -> Array:
    """The weight of an operation, its exponent multiplied in; 1 where it has none."""
    name = weight_of(op)
    weight = np.ones(()) if name is None else graph.tensors[name]
    return np.ldexp(weight.astype(dtype), getattr(op, "exponent", 0) if graph.integer else 0)


def _prepared(op: Op, shape: Shape, weight: Array, sums: bool) -> Operation:
    """One operation that makes `shape` of each sample. `sums`: pools add instead of averaging. A new operation is one more branch."""
    if isinstance(op, Scale):
        factor = weight if sums else weight * op.factor
        return lambda values: values * factor.reshape(-1, *[1] * (values.ndim - 2))
    if isinstance(op, Upsample):
        factor_ = op.factor
        return (
            (lambda values: _block_sums(values, factor_)) if op.transpose else lambda values: values.repeat(factor_, 2).repeat(factor_, 3)
        )
    if isinstance(op, AvgPool2d):
        return _pool(op, shape, weight.dtype, sums)
    if isinstance(op, Dense):
        matrix = np.ascontiguousarray(weight if op.transpose else weight.T)
        return lambda values: values.reshape(len(values), -1) @ matrix
    assert isinstance(op, (Conv2d, ConvTranspose2d))
    grid = Grid(op.stride, op.padding, op.dilation, op.groups)
    return _gather(weight, grid, shape) if isinstance(op, Conv2d) != op.transpose else _spread(weight, grid, shape)


def _block_sums(values: Array, factor: int) -> Array:
    batch, channels, height, width = values.shape
    sums: Array = values.reshape(batch, channels, height // factor, factor, width // factor, factor).sum(axis=(3, 5))
    return sums


def _pool(op: AvgPool2d, shape: Shape, dtype: npt.DTypeLike, sums: bool) -> Operation:
    """A window of ones on each channel by itself."""
    grid, area = Grid(op.stride, op.padding, (1, 1), 1), 1 if sums else prod(op.kernel)
    form = _spread if op.transpose else _gather
    pooled = form(np.ones((1, 1, *op.kernel), dtype), grid, (1, *shape[1:]))

    def through(values: Array) -> Array:
        made = pooled(values.reshape(-1, 1, *values.shape[2:])).reshape(len(values), *shape)
        return made if area == 1 else made / area

    return through


def _gather(weight: Array, grid: Grid, shape: Shape) -> Operation:
    """`fixed.convolve`: the windows of some samples as rows (place of the kernel, channel), times the weights as a matrix."""
    (sy, sx), (py, px), (dy, dx), groups = grid
    out, into, kh, kw = weight.shape
    height, width = shape[1:]
    matrix = np.ascontiguousarray(weight.reshape(groups, out // groups, into, kh, kw).transpose(0, 3, 4, 2, 1)).reshape(
        groups, -1, out // groups
    )
    at_once = max(1, ROWS // (height * width * kh * kw * into * groups))

    def convolved(values: Array) -> Array:
        samples, channels, rows, columns = values.shape
        padded = np.zeros((samples, rows + 2 * py, columns + 2 * px, channels), values.dtype)
        padded[:, py : py + rows, px : px + columns] = values.transpose(0, 2, 3, 1)
        made = np.empty((samples, height, width, groups, out // groups), values.dtype)
        windows = np.empty((min(at_once, samples), height, width, groups, kh, kw, into), values.dtype)
        for first in range(0, samples, at_once):
            piece = padded[first : first + at_once]
            found = windows[: len(piece)]
            for y in range(kh):
                for x in range(kw):
                    lying = piece[:, y * dy : y * dy + (height - 1) * sy + 1 : sy, x * dx : x * dx + (width - 1) * sx + 1 : sx]
                    found[:, :, :, :, y, x] = lying.reshape(*found.shape[:4], into)
            by_group = np.moveaxis(found, 3, 0).reshape(groups, len(piece) * height * width, -1)
            products = by_group @ matrix
            made[first : first + at_once] = np.moveaxis(products.reshape(groups, len(piece), height, width, -1), 0, 3)
        return made.reshape(samples, height, width, out).transpose(0, 3, 1, 2)

    return convolved


def _spread(weight: Array, grid: Grid, shape: Shape) -> Operation:
    """`fixed.convolve_transposed`: what each value makes at every place of the kernel, added up where it lies."""
    (sy, sx), (py, px), (dy, dx), groups = grid
    into, out, kh, kw = weight.shape
    matrix = np.ascontiguousarray(weight.reshape(groups, into // groups, out, kh, kw).transpose(0, 1, 3, 4, 2)).reshape(
        groups, into // groups, -1
    )

    def spread(values: Array) -> Array:
        samples, _, rows, columns = values.shape
        by_group = np.moveaxis(values.transpose(0, 2, 3, 1).reshape(samples * rows * columns, groups, -1), 1, 0)
        made = (by_group @ matrix).reshape(groups, samples, rows, columns, kh, kw, out)
        height = max(shape[1] + 2 * py, (rows - 1) * sy + (kh - 1) * dy + 1)
        width = max(shape[2] + 2 * px, (columns - 1) * sx + (kw - 1) * dx + 1)
        canvas = np.zeros((groups, samples, height, width, out), values.dtype)
        for y in range(kh):
            for x in range(kw):
                lying = canvas[:, :, y * dy : y * dy + (rows - 1) * sy + 1 : sy, x * dx : x * dx + (columns - 1) * sx + 1 : sx]
                lying += made[:, :, :, :, y, x]
        image = canvas[:, :, py : py + shape[1], px : px + shape[2]]
        return image.transpose(1, 0, 4, 2, 3).reshape(samples, groups * out, *shape[1:])

    return spread
