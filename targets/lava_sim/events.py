"""Currents of spikes by the native kernel: every spike adds its weights to its targets, so silence costs nothing. Whole numbers, exact by the bounds shown here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from toolchain import native
from toolchain.ir import Array, Conv2d, ConvTranspose2d, Dense, Graph, Identity, Op, Scale, Shape, Synapse, weight_of
from toolchain.ir.operations import largest_rows, largest_sum
from toolchain.native import ticks
from toolchain.targets import windows
from toolchain.targets.windows import Pairs

VALUE_LIMIT = 127
"""The kernel reads int8, and a mask of signs must not overflow."""

FEW = 0.1
CYCLES_A_RUN, CYCLES_A_SPIKE = 10, 10
ADDED_A_CYCLE, MULTIPLIED_A_CYCLE = 16, 8
"""What the choice between events and products reckons with; measured on AVX-512 to a factor of two."""

WEIGHT_LIMIT = 2**15 - 1
SUM_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Stage:
    """One operation for the kernel. `sums` are the bytes of its sums."""

    way: ticks.Way
    sums: int
    worth: float
    """The density of spikes at which a product of matrices takes as long, roughly"""


class Events:
    """A composition of operations on spikes, each an event-driven stage; called with (batch, source neurons) of int8 and where the currents are to lie."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages
        self._instructions = native.widest()
        self._worth = min(stage.worth for stage in stages)

    def worth(self, spikes: Array, count: int | None) -> bool:
        """Whether this takes less time than products of matrices, for `count` spikes (None: unknown, so as for few)."""
        density = FEW if count is None else count / max(spikes.size, 1)
        return density < self._worth and bool(spikes.flags.c_contiguous)

    def __call__(self, spikes: Array, out: Array) -> None:
        values, samples = spikes, len(spikes)
        for stage in self._stages:
            made = out if stage is self._stages[-1] else np.empty((samples, stage.way.outputs), np.int8)
            stage.way.deliver(values, made, sums=stage.sums, instructions=self._instructions)
            values = made


def events(graph: Graph, synapse: Synapse, shapes: Sequence[Shape], entry: Shape, message: npt.DTypeLike) -> Events | None:
    """The kernel's form of a synapse that delivers `message`; `shapes` are what each operation makes of `entry`. None where it has none: floats, graded
    sources, groups of channels, numbers beyond its types, or a package without its compiled part."""
    if not graph.integer or graph.population(synapse.source).kind != "couple" or native.missing() is not None:
        return None
    shape, largest, signed = entry, 1, _signed(graph, synapse)
    steps = [(op, made) for op, made in zip(synapse.ops, shapes, strict=True) if not _passes(op)]
    stages: list[Stage] = []
    for i, (op, made) in enumerate(steps):
        width = np.dtype(message).itemsize if i == len(steps) - 1 else 1
        sums = _largest_partial(op, graph, largest, signed)
        delivered = largest_sum(op, graph.tensors, largest)[1]
        fits = largest <= VALUE_LIMIT and sums <= SUM_LIMIT and delivered <= (VALUE_LIMIT if width == 1 else 2 ** (8 * width - 1) - 1)
        if width > 4 or not fits or getattr(op, "groups", 1) != 1:
            return None
        stage = _stage(op, graph, shape, made, 2 if sums < 2**15 else 4)
        if stage is None:
            return None
        stages.append(stage)
        shape, largest, signed = made, delivered, True
    return Events(stages) if stages else None


def _passes(op: Op) -> bool:
    """Whether an operation changes nothing in integers."""
    return isinstance(op, Identity) or (isinstance(op, Scale) and op.weight is None and op.exponent == 0)


def _signed(graph: Graph, synapse: Synapse) -> bool:
    """Whether the source of a synapse has minus members in a phase that has the synapse."""
    found = {phase.dynamics[synapse.source].members for phase in graph.phases if synapse in phase.synapses}
    return found != {"plus"}


def _largest_partial(op: Op, graph: Graph, largest: int, signed: bool) -> int:
    """The largest sum of mantissas in a target neuron, in whatever order: of values of one sign only positive or only negative weights add up."""
    name = weight_of(op)
    if name is None or signed:
        return largest_sum(op, graph.tensors, largest)[0]
    weight = graph.tensors[name].astype(np.int64)
    return largest * int(max(largest_rows(op, {name: np.maximum(sign * weight, 0)}) for sign in (1, -1)))


def _stage(op: Op, graph: Graph, shape: Shape, made: Shape, sums: int) -> Stage | None:
    name = weight_of(op)
    weight = None if name is None else graph.tensors[name]
    if weight is not None and (np.abs(weight).max(initial=0) > WEIGHT_LIMIT or not np.issubdtype(weight.dtype, np.integer)):
        return None
    if isinstance(op, Dense):
        assert weight is not None
        matrix = weight if op.transpose else weight.T
        one: Pairs = [[(0, 0)]]
        return _connection((prod(shape), 1, 1), (prod(made), 1, 1), one, one, ([0], [0]), matrix[:, None, None, :], op, sums)
    shape, made = windows.image(shape), windows.image(made)
    rows, columns = (windows.pairs(op, axis, shape[1 + axis], made[1 + axis], weight) for axis in (0, 1))
    if isinstance(op, (Conv2d, ConvTranspose2d)):
        assert weight is not None
        order = windows.slot_order(op, weight.shape[2], 0), windows.slot_order(op, weight.shape[3], 1)
        ordered = weight[:, :, order[0]][:, :, :, order[1]]
        return _connection(
            shape, made, rows, columns, order, ordered.transpose((1, 2, 3, 0) if windows.gathers(op) else (0, 2, 3, 1)), op, sums
        )
    factors = np.ones(shape[0], np.int64) if weight is None else weight
    places = [list(range(1 + max((k for found in pairs for _, k in found), default=0))) for pairs in (rows, columns)]
    return _connection(shape, made, rows, columns, (places[0], places[1]), factors, op, sums)


def _connection(
    shape: Shape, made: Shape, rows: Pairs, columns: Pairs, order: tuple[list[int], list[int]], weight: Array, op: Op, sums: int
) -> Stage:
    """`order` has the kernel's places in the order of their slots; `weight` is (channel, slot row, slot column, made), or one factor a channel."""
    row_runs, column_runs = _runs(rows, order[0]), _runs(columns, order[1])
    way = ticks.Way(
        (shape[0], shape[1] * shape[2]),
        (made[0], made[1], made[2]),
        (len(order[0]), len(order[1])),
        rows=row_runs,
        columns=column_runs,
        places=_places(rows, columns),
        weight=np.ascontiguousarray(weight, np.int16),
        exponent=getattr(op, "exponent", 0),
    )
    return Stage(way, sums, _worth(rows, columns, column_runs[1], made[0], weight))


def _worth(rows: Pairs, columns: Pairs, column_runs: Array, made: int, weight: Array) -> float:
    """See `Stage`: a spike's cost by its runs and targets, against that of one source neuron in a product."""
    if weight.ndim == 1:
        return np.inf
    reached = [sum(map(len, pairs)) / len(pairs) for pairs in (rows, columns)]
    runs = reached[0] * len(column_runs) / len(columns)
    targets = reached[0] * reached[1] * made
    return (targets / MULTIPLIED_A_CYCLE) / (CYCLES_A_SPIKE + CYCLES_A_RUN * runs + targets / ADDED_A_CYCLE)


def _places(rows: Pairs, columns: Pairs) -> tuple[Array, Array, Array]:
    """Each place's row and column, and the places in an order in which neighbours reach as many targets: the processor foresees their loops."""
    row, column = (part.ravel().astype(np.int32) for part in np.indices((len(rows), len(columns))))
    reached = np.array([len(found) for found in rows])[row], np.array([len(found) for found in columns])[column]
    return row, column, np.lexsort(reached).astype(np.int32)


def _runs(pairs: Pairs, order: list[int]) -> tuple[Array, Array]:
    """Where each source place's runs begin, and the runs (target, slot, length)."""
    found = windows.runs(pairs, order)
    flat = [run for runs in found for run in runs]
    return np.cumsum([0, *map(len, found)], dtype=np.int32), np.array(flat or [(0, 0, 0)], np.int32)
