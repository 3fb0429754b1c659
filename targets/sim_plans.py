"""Connections laid out for the compiled core of `sim` (`toolchain.native.phases`), and the bounds that make its sums exact.

Neurons of a population are in order (place, channel), channels padded to `LANES`. Where spikes meet weights of 8 bits, each target place adds up the rows of weights that
reach it, in 16 bits for as many rows as cannot overflow them, then in 32; or, where many spike, products of whole windows: both make the same whole numbers.
Everything else (values of inputs and relays, larger weights, one factor a channel) goes value by value, in 64 bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from toolchain import fixed
from toolchain.fixed import INT32_SAFE, largest_mantissa
from toolchain.ir import (
    Array,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Graph,
    Identity,
    Op,
    Population,
    Scale,
    Shape,
    adjoint,
    entry_shape,
    exponent_of,
    shapes_along,
    weight_of,
)
from toolchain.native import phases
from toolchain.native.phases import LANES, DenseClass, SynapsePlan
from toolchain.targets import sim_bounds, windows
from toolchain.targets.windows import Pairs

NEVER = 2**62
LARGEST_TABLE = 2**27
"""Most weights of one connection as it is laid out."""

LARGEST_IDENTITY = 2**13
"""Most neurons of a side that a chain of operations is tried on, one by one, to make a matrix of it."""

A_TARGET, A_TAKE, A_ROW, A_FAR_ROW = 30.0, 6.0, 1.9, 2.5
"""What sums by event cost, in cycles: for every target place, every source place that it takes from, every 64 lanes of a row, and of a row from a table larger than `NEAR`.
Only the choice between two exact forms hangs on these: found with `perf` on one AMD EPYC with AVX-512 VNNI, to about a quarter, on W2 and W3 of `make bench`."""

NEAR = 2**19
"""Bytes of weights that stay in the cache of a core."""

A_BLOCK, A_PLACE, A_REST = 13.0, 2.0, 1.5
"""What products cost, in cycles for four source channels and 64 lanes: for `phases.ABREAST` target places at once, for each of the rest, and for having one."""

SLOWER_EVENTS, SLOWER_PRODUCTS = (4.0, 2.0, 1.0, 1.0), (50.0, 8.0, 2.5, 1.0)
"""The same with other instruction sets, by their place in `phases.INSTRUCTION_SETS`: times as many."""


class Unfit(Exception):
    """What of a graph the core cannot run, in a few words."""


@dataclass(frozen=True)
class Layout:
    """How a population lies in memory."""

    shape: Shape
    lanes: int

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def places(self) -> int:
        return prod(self.shape[1:])

    @property
    def size(self) -> int:
        return -(-self.places * self.lanes // 64) * 64

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Where each neuron lies, neurons in the graph's order (channel, place)."""
        return (np.arange(self.channels)[:, None] + np.arange(self.places)[None, :] * self.lanes).ravel()

    def packed(self, values: Array, dtype: npt.DTypeLike) -> Array:
        """(n, *shape) as (n, size)."""
        made = aligned((len(values), self.size), dtype)
        inner = made[:, : self.places * self.lanes].reshape(len(values), self.places, self.lanes)
        inner[:, :, : self.channels] = values.reshape(len(values), self.channels, self.places).transpose(0, 2, 1)
        return made


def layout(population: Population) -> Layout:
    """Inputs are lists of values: nothing is padded for them."""
    channels = population.shape[0]
    return Layout(population.shape, channels if population.kind == "input" else -(-channels // LANES) * LANES)


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Zeros that begin on a cache line."""
    kind = np.dtype(dtype)
    raw = np.zeros(prod(shape) * kind.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    made: Array = raw[start : start + prod(shape) * kind.itemsize].view(kind).reshape(shape)
    return made


@dataclass
class Plan:
    """A struct of the core, the arrays that it points to by the names of its fields, and the structs."""

    plan: Any
    arrays: dict[str, Array] = field(default_factory=dict)
    structs: Any = None
    parts: tuple[Plan, ...] = ()

    def point(self, name: str, array: Array) -> None:
        self.arrays[name] = array
        setattr(self.plan, name, array.ctypes.data)


@dataclass(frozen=True)
class Connection:
    """A connection between two populations: `graded` sources emit values, `signed` ones spikes of both signs."""

    graph: Graph
    ops: tuple[Op, ...]
    source: Layout
    target: Layout
    graded: bool
    signed: bool

    def laid(self, currents: str, instructions: int) -> Plan:
        """Its plan, but for populations and delay; Unfit where the core has no form for it."""
        shift = exponent_of(self.ops)
        if shift > sim_bounds.LARGEST_EXPONENT:
            raise Unfit(f"a connection shifts by {shift} bits")
        made = Plan(SynapsePlan(exponent=shift, lanes=self.target.lanes, dense_from=NEVER))
        path = self._path()
        if path is None:
            self._matrix(made)
        elif path.op is None or isinstance(path.op, Scale):
            self._diagonal(made, path)
        else:
            self._window(made, path)
        size = self.target.size
        sim_bounds.check(
            made.plan, made.arrays, source=(self.source.channels, self.source.places, self.source.size), target=(self.target.lanes, size)
        )
        if made.parts:
            classes = [(part.plan, part.arrays) for part in made.parts]
            sim_bounds.check_products(made.plan, made.arrays, classes, self.source.channels, size)
            made.plan.dense_from = self._products_from(made, currents, instructions)
        return made

    def _path(self) -> _ImagePath | None:
        """None where images do not move place by place: the connection is a matrix then."""
        tensors = self.graph.tensors
        shapes = shapes_along(self.ops, self.source.shape, self.target.shape, tensors)
        entry = entry_shape(self.ops, self.source.shape, self.target.shape, tensors)
        heavy = [op for op in self.ops if weight_of(op) is not None]
        ends = (windows.image(entry), windows.image(shapes[-1] if shapes else entry))
        if len(heavy) > 1 or any(isinstance(op, Dense) for op in heavy):
            return None
        if ends != (windows.image(self.source.shape), windows.image(self.target.shape)):
            return None
        axes: list[Pairs] = []
        for axis in (1, 2):
            size = ends[0][axis]
            found: Pairs = [[(place, 0)] for place in range(size)]
            passed = False
            for op, shape in zip(self.ops, shapes, strict=True):
                weight = None if weight_of(op) is None else tensors[str(weight_of(op))]
                step = windows.pairs(op, axis - 1, size, windows.image(shape)[axis], weight)
                found = windows.chained(found, step, keep_slots=passed)
                passed, size = passed or op in heavy, windows.image(shape)[axis]
            axes.append(found)
        return _ImagePath(axes[0], axes[1], heavy[0] if heavy else None)

    def _window(self, made: Plan, path: _ImagePath) -> None:
        op, target = path.op, self.target
        assert isinstance(op, (Conv2d, ConvTranspose2d))
        weight = self.graph.tensors[op.weight]
        full = _by_source(op, weight, self.source.channels, target.channels)
        if full.size // target.channels * target.lanes > LARGEST_TABLE:
            raise Unfit(f"weight '{op.weight}' takes too much memory")
        made.plan.form = phases.WINDOW
        if not self._narrow(full):
            orders = [windows.slot_order(op, weight.shape[2 + axis], axis) for axis in (0, 1)]
            self._values(made, full[:, orders[0]][:, :, orders[1]], target.lanes)
            made.plan.slab, made.plan.row_from = prod(full.shape[1:3]) * target.lanes, full.shape[2] * target.lanes
            self._patches(made, path, orders)
            return
        across = full.shape[2]
        self._rows_of(made, full.transpose(1, 2, 0, 3).reshape(-1, target.channels))
        found: list[list[tuple[int, int]]] = [[] for _ in range(target.places)]
        width, columns = windows.image(target.shape)[2], windows.image(self.source.shape)[2]
        for y, down in enumerate(path.rows):
            for x, right in enumerate(path.columns):
                for (row, i), (column, j) in product(down, right):
                    found[row * width + column].append((y * columns + x, (i * across + j) * self.source.channels))
        made.plan.targets = target.places
        made.point("take_begin", np.cumsum([0, *map(len, found)], dtype=np.int32))
        made.point("takes", np.array([take for takes in found for take in takes] or [(0, 0)], np.int32))
        alone = all(isinstance(other, (Identity, Scale)) for other in self.ops if other is not op)
        if alone and op.groups == 1:
            self._dense_window(made, path, full)

    def _diagonal(self, made: Plan, path: _ImagePath) -> None:
        ones = np.ones(self.source.channels, np.int64)
        factors = ones if path.op is None else self.graph.tensors[str(weight_of(path.op))].astype(np.int64)
        made.plan.form = phases.DIAGONAL
        self._values(made, factors, self.source.channels)
        self._patches(made, path, None)

    def _matrix(self, made: Plan) -> None:
        """A row of the whole target for every position of the source."""
        if self.source.size * self.target.size > LARGEST_TABLE:
            raise Unfit(f"a connection of {prod(self.source.shape):,} with {prod(self.target.shape):,} neurons takes too much memory")
        rows = self._rows()
        table = np.zeros((self.source.size, self.target.size), rows.dtype)
        table[np.ix_(self.source.positions, self.target.positions)] = rows
        made.plan.form, made.plan.lanes = phases.MATRIX, self.target.size
        if not self._narrow(rows):
            made.plan.slab = self.target.size
            self._values(made, table, self.target.size)
            return
        made.plan.targets = 1
        self._rows_of(made, table)
        one = np.zeros(1, np.int32)
        start = -table.sum(axis=0, dtype=np.int64) if self.signed else np.zeros(self.target.size, np.int64)
        whole = _dense_class(target=one, base=one, tap=one, slot=one, start=start, lanes=self.target.size)
        self._dense(made, [whole], table[None], self.source.size, np.arange(self.source.places, dtype=np.int32) * self.source.lanes)

    def _rows(self) -> Array:
        """What a spike of each neuron of the source adds to each neuron of the target, exponents left out."""
        ops, tensors = _unshifted(self.ops), self.graph.tensors
        heavy = [op for op in ops if not isinstance(op, Identity)]
        if len(heavy) == 1 and isinstance(heavy[0], Dense):
            weight = tensors[heavy[0].weight]
            return weight if heavy[0].transpose else weight.T
        forward, into, out = (ops, self.source.shape, self.target.shape), prod(self.source.shape), prod(self.target.shape)
        if min(into, out) > LARGEST_IDENTITY:
            raise Unfit(f"a composed connection of {into:,} with {out:,} neurons takes too long to lay out")
        if into <= out:
            return self._columns(*forward)
        return self._columns(adjoint(ops), self.target.shape, self.source.shape).T  # fewer images: backwards, from every target

    def _columns(self, ops: Sequence[Op], source: Shape, target: Shape) -> Array:
        """What `ops` make of a one in each neuron of `source`, (source neurons, target neurons)."""
        count, parts = prod(source), []
        for first in range(0, count, 256):
            ones = np.zeros((min(256, count - first), count), np.int64)
            ones[np.arange(len(ones)), first + np.arange(len(ones))] = 1
            found = fixed.apply(ops, self.graph.tensors, ones.reshape(-1, *source), target, integer=True).reshape(len(ones), -1)
            if np.abs(found).max(initial=0) > INT32_SAFE:
                raise Unfit("a weight needs more than 32 bits")
            parts.append(found.astype(np.int32))
        return np.concatenate(parts)

    def _narrow(self, weights: Array) -> bool:
        """Whether spikes meet weights of 8 bits and their sums fit 32: products store signed spikes as 0, 1, 2, which doubles them, and begin with the negative sum."""
        if self.graded or weights.min(initial=0) < -128 or weights.max(initial=0) > 127:
            return False
        return 3 * largest_mantissa(self.ops, self.graph.tensors, 1)[0] <= INT32_SAFE

    def _rows_of(self, made: Plan, weights: Array) -> None:
        """Lay rows of weights (rows, target channels) out in bytes, 128 larger than they are."""
        stride = -(-made.plan.lanes // 64) * 64
        table = aligned((len(weights), stride), np.uint8)
        table[:] = 128
        pairs = table.reshape(len(weights), -1, 32, 2)
        for first in range(0, weights.shape[1], 32):
            part = weights[:, first : first + 32]
            pairs[:, first // 64, : part.shape[1], first // 32 % 2] = part.astype(np.int16) + 128
        made.point("rows", table)
        made.plan.row_bytes = stride

    def _values(self, made: Plan, weights: Array, lanes: int) -> None:
        """Lay weights (..., targets) out over `lanes`, in 32 bits."""
        if max(int(weights.max(initial=0)), -int(weights.min(initial=0))) > INT32_SAFE:
            raise Unfit("a weight needs more than 32 bits")
        table = aligned((*weights.shape[:-1], lanes), np.int32)
        table[..., : weights.shape[-1]] = weights
        made.point("weight", table)
        made.plan.wide = 1

    def _patches(self, made: Plan, path: _ImagePath, orders: Sequence[Sequence[int]] | None) -> None:
        """The patches of every place of the source; `orders` of a kernel's places, None where there is none."""
        width, lanes = windows.image(self.target.shape)[2], self.target.lanes
        across = 0 if orders is None else len(orders[1])
        begin, found = [0], []
        columns = windows.runs(path.columns, None if orders is None else orders[1])
        for row_runs in windows.runs(path.rows, None if orders is None else orders[0]):
            for column_runs in columns:
                for r, c in product(row_runs, column_runs):
                    found.append(((r[0] * width + c[0]) * lanes, (r[1] * across + c[1]) * lanes, r[2], c[2]))
                begin.append(len(found))
        made.plan.row_to = width * lanes
        made.point("begin", np.array(begin, np.int32))
        made.point("patches", np.array(found or [(0, 0, 0, 0)], np.int32))

    def _dense_window(self, made: Plan, path: _ImagePath, full: Array) -> None:
        """Products of whole windows, without what lies beyond the border: targets by the slots of their kernel that meet the image."""
        source, width = windows.image(self.source.shape), windows.image(self.target.shape)[2]
        axes = [windows.taken(found, windows.image(self.target.shape)[i]) for i, found in ((1, path.rows), (2, path.columns))]
        fours = -(-source[0] // 4)
        step = (source[2] * 4 * fours, 4 * fours)
        weights = full.transpose(1, 2, 0, 3).reshape(-1, source[0], full.shape[3])
        classes = []
        for (row_slots, rows), (column_slots, columns) in product(*(_alike(axis).items() for axis in axes)):
            if not row_slots or not column_slots:
                continue
            slots = np.array([row * full.shape[2] + column for row in row_slots for column in column_slots], np.int32)
            down, across = ([place - found[0][0] for place, _ in found] for found in (axes[0][rows[0][0]], axes[1][columns[0][0]]))
            classes.append(
                _dense_class(
                    target=np.array([(t * width + u) * self.target.lanes for t, _ in rows for u, _ in columns], np.int32),
                    base=np.array([y * step[0] + x * step[1] for _, y in rows for _, x in columns], np.int32),
                    tap=np.array([y * step[0] + x * step[1] for y in down for x in across], np.int32),
                    slot=slots,
                    start=-weights[slots].sum(axis=(0, 1), dtype=np.int64) if self.signed else np.zeros(full.shape[3], np.int64),
                    lanes=self.target.lanes,
                )
            )
        if classes:
            self._dense(made, classes, weights, prod(source[1:]) * step[1], np.arange(self.source.places, dtype=np.int32) * step[1])

    def _dense(self, made: Plan, classes: Sequence[Plan], weights: Array, image: int, places: Array) -> None:
        """`weights` is (slots, source channels, target channels)."""
        plan, lanes = made.plan, made.plan.lanes
        slots, channels, targets = weights.shape
        plan.slots, plan.quads = slots, -(-channels // 4)
        plan.image_size, plan.background = image, int(self.signed)
        full = np.zeros((slots, 4 * plan.quads, lanes), np.int8)
        full[:, :channels, :targets] = weights
        packed = aligned((full.size,), np.int8)
        tiles = [full[:, :, first : first + 64].reshape(slots, plan.quads, 4, -1, 16) for first in range(0, lanes, 64)]
        np.concatenate([tile.transpose(0, 1, 3, 4, 2).ravel() for tile in tiles], out=packed)
        made.point("packed", packed)
        made.point("image_place", places)
        made.structs = (DenseClass * len(classes))(*(c.plan for c in classes))
        made.parts = tuple(classes)
        plan.dense, plan.dense_classes = ctypes.addressof(made.structs), len(classes)

    def _products_from(self, made: Plan, currents: str, instructions: int) -> int:
        """From how many events on products cost less."""
        if currents != "measured":
            return NEVER if currents == "events" else 0
        plan, tiles = made.plan, made.plan.lanes / 64
        windows_cost = 0.0
        for part in made.parts:
            blocks, rest = divmod(part.plan.targets, phases.ABREAST)
            windows_cost += part.plan.taps * (blocks * A_BLOCK + rest * A_PLACE + A_REST * (rest > 0))
        products = windows_cost * plan.quads * tiles * SLOWER_PRODUCTS[instructions]
        takes = self.source.places if plan.form == phases.MATRIX else len(made.arrays["takes"])
        row = A_FAR_ROW if made.arrays["rows"].nbytes > NEAR else A_ROW
        fixed_cost = plan.targets * A_TARGET + (0 if plan.form == phases.MATRIX else takes * A_TAKE)
        event = takes / self.source.places * tiles * row
        slower = SLOWER_EVENTS[instructions]
        return max(1, int((products - fixed_cost * slower) / (event * slower)))


@dataclass(frozen=True)
class _ImagePath:
    """A way through images, along rows and along columns, and the one operation with a weight."""

    rows: Pairs
    columns: Pairs
    op: Op | None


def _unshifted(ops: Sequence[Op]) -> tuple[Op, ...]:
    return tuple(msgspec.structs.replace(op, exponent=0) if hasattr(op, "exponent") else op for op in ops)


def _by_source(op: Conv2d | ConvTranspose2d, weight: Array, channels: int, made: int) -> Array:
    """(source channels, kernel rows, kernel columns, target channels); zeros between groups."""
    # of a Conv2d (out, in / groups, ...), of a ConvTranspose2d (in, out / groups, ...); a transpose goes the other way
    target_first = isinstance(op, Conv2d) != op.transpose
    full = np.zeros((channels, *weight.shape[2:], made), weight.dtype)
    into, out = channels // op.groups, made // op.groups
    for group, block in enumerate(np.split(weight, op.groups)):
        turned = block.transpose(1, 2, 3, 0) if target_first else block.transpose(0, 2, 3, 1)
        full[group * into : (group + 1) * into, :, :, group * out : (group + 1) * out] = turned
    return full


def _alike(axis: Pairs) -> dict[tuple[int, ...], list[tuple[int, int]]]:
    """Places of the target by the slots that lead there, each with the first place of the source that its window takes."""
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for target, found in enumerate(axis):
        groups.setdefault(tuple(slot for _, slot in found), []).append((target, found[0][0] if found else 0))
    return groups


def _dense_class(*, target: Array, base: Array, tap: Array, slot: Array, start: Array, lanes: int) -> Plan:
    found = Plan(DenseClass(targets=len(target), taps=len(tap)))
    begin = aligned((lanes,), np.int32)
    begin[: len(start)] = start
    for name, array in {"target": target, "base": base, "tap": tap, "slot": slot, "start": begin}.items():
        found.point(name, array)
    return found
