"""What a piece of a population costs a core, counted from shapes alone: no matrix of neurons is ever built.

A slice is a box of a population: channels, rows, columns (a flat population has one row and one column). What it costs:

neurons       one each; a couple that fires in both directions (members "both" in some phase) is two, plus and minus; where the chip cannot subtract on a
              reset, each takes `members_with_subtraction`. The subtraction between plus and minus is inside the neuron and takes no synapse.
memory        the lists of synapses below; where the chip keeps them in the same memory also the state of its neurons (bias and current included) and its
              output axons
input axons   one for each source neuron of a flat population; else one for each source position (row, column) and `axon_sources` channels: the spike
              says which channel it comes from (population axons)
output axons  one entry for each source neuron and core that it sends to; population axons take `population_axon_slots`, and where the chip shares
              fan-out lists, the channels of a position share their entries

A list holds the synapses behind one axon, in blocks of `list_synapses` with a header, rounded up to whole words, weights in as many bits as the largest of
the tensor needs (7 take 8). Fully connected: a weight for each source neuron and each neuron of the slice. Convolutions, pools and whatever else
moves with the position: positions that see the same weights share their list. With `shared_kernels` a slice stores the kernel once, for each source channel
and each of its own channels; else once for each way in which borders and strides cut the kernel, each weight with the index of its target (6 to 12
bits). A composition is one synapse: pool, then convolve is a convolution with a larger kernel. Where an image is flattened without being fully connected
(convolve, then pool into a flat readout), it counts as fully connected within each block of channels that stays apart.

The forward phase joins plus members. In the feedback phase both members of a target listen, to lists that they share: an axon for each of them, of which
one carries the opposite sign. Both members of a source send: with a payload of +1 or -1 on the same axons, without on axons and lists of their own
(W and -W). Both phases' synapses are stored, the transposed ones at their own target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import ceil, gcd, log2, prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from toolchain.ir import (
    Array,
    AvgPool2d,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Graph,
    Op,
    Phase,
    Population,
    Shape,
    Slice,
    Synapse,
    Upsample,
    entry_shape,
    shapes_along,
    weight_of,
)
from toolchain.limits import Limits

Interval = tuple[int, int]
Cut = tuple[Interval, ...]
"""One axis in pieces, `start` to `stop` each."""

SMALLEST_INDEX, WIDTHS = 6, (1, 2, 3, 4, 5, 6, 8)
"""Bits that Loihi stores of an index, at least, and of a weight."""

UNIT_BITS = 2
"""A connection without a tensor has weights of 1."""

LARGEST_TABLE = 2**22
"""Slices on no common grid are summed one by one instead of in a table."""

NEURONS, MEMORY, INPUTS, OUTPUTS = range(4)
"""Columns of a table of costs: neurons, memory in bits, input axons, output axons."""


class Box(NamedTuple):
    """A slice in channels, rows and columns."""

    channels: Interval
    rows: Interval
    columns: Interval


def image(shape: Shape) -> tuple[int, int, int]:
    """`shape` as channels, rows, columns: missing ones are 1, further ones count as columns."""
    channels, rows, *rest = (*shape, 1, 1)[: max(3, len(shape))]
    return channels, rows, prod(rest)


def box(part: Slice) -> Box:
    """A slice as channels, rows, columns; of more than three axes the further ones are whole."""
    start, stop = (*part.start, 0, 0), (*part.stop, 1, 1)
    if len(part.stop) > 3:
        return Box((start[0], stop[0]), (start[1], stop[1]), (0, prod(part.stop[2:])))
    return Box((start[0], stop[0]), (start[1], stop[1]), (start[2], stop[2]))


def cut(length: int, pieces: int) -> Cut:
    """0 .. length in `pieces` as equal as can be."""
    edges = [i * length // pieces for i in range(pieces + 1)]
    return tuple(pairwise(edges))


class Axis:
    """How source positions feed target positions along rows, or along columns: `codes[i, j]` is 0 where i does not feed j; equal codes, equal weights."""

    def __init__(self, codes: Array) -> None:
        self.codes = codes
        self.wired = codes != 0
        self._reached: dict[Interval, npt.NDArray[np.bool_]] = {}
        self._lists: dict[Interval, tuple[tuple[int, int], ...]] = {}
        self._positions: dict[Interval, int] = {}

    def reached(self, piece: Interval) -> npt.NDArray[np.bool_]:
        """Which source positions feed the target positions of `piece`."""
        if piece not in self._reached:
            self._reached[piece] = self.wired[:, piece[0] : piece[1]].any(axis=1)
        return self._reached[piece]

    def positions(self, piece: Interval) -> int:
        """How many source positions feed `piece`."""
        if piece not in self._positions:
            self._positions[piece] = int(self.reached(piece).sum())
        return self._positions[piece]

    def lists(self, piece: Interval) -> tuple[tuple[int, int], ...]:
        """The different lists of weights that source positions have for `piece`: how long, and how many of that length."""
        if piece not in self._lists:
            rows = {_trimmed(row) for row in self.codes[:, piece[0] : piece[1]]} - {()}
            self._lists[piece] = tuple(sorted(Counter(sum(code != 0 for code in row) for row in rows).items()))
        return self._lists[piece]

    @cached_property
    def kernel(self) -> int:
        """Weights of all lists that no border cuts: those that are no part of another one."""
        whole = sorted({_trimmed(row) for row in self.codes}, key=len, reverse=True)
        kept: list[tuple[int, ...]] = []
        for row in whole:
            if not any(row == other[i : i + len(row)] for other in kept for i in range(len(other) - len(row) + 1)):
                kept.append(row)
        return sum(sum(code != 0 for code in row) for row in kept)

    def fed(self, pieces: Iterable[Interval]) -> npt.NDArray[np.int64]:
        """For each source position, how many of `pieces` it feeds."""
        total = np.zeros(len(self.wired), np.int64)
        for piece in pieces:
            total += self.reached(piece)
        return total


def _trimmed(row: Array) -> tuple[int, ...]:
    """A row of codes from its first connection to its last: what is left is the same list, wherever it lies."""
    (used,) = np.nonzero(row)
    return tuple(row[used[0] : used[-1] + 1].tolist()) if len(used) else ()


@dataclass(frozen=True, eq=False)
class Wiring:
    """One synapse as a core sees it. Channels come in `groups` of `into` source and `out` target channels.

    `dense`: every neuron has weights of its own; `discrete`: every source neuron has an axon of its own. `senders` neurons of a source couple send, to
    `signs` lists; `listeners` members of a target couple have an axon each to every list.
    """

    synapse: Synapse
    phase: str
    groups: int
    into: int
    out: int
    rows: Axis
    columns: Axis
    limits: Limits
    bits: int
    dense: bool
    discrete: bool
    signs: int
    senders: int
    listeners: int

    @property
    def source(self) -> str:
        return self.synapse.source

    @property
    def target(self) -> str:
        return self.synapse.target

    def sources(self, channels: Interval) -> Interval:
        """The source channels that feed target `channels`."""
        return channels[0] // self.out * self.into, -(-channels[1] // self.out) * self.into

    def line(self, axis: int) -> Axis:
        """Rows (1) or columns (2)."""
        return self.rows if axis == 1 else self.columns

    @property
    def shared(self) -> bool:
        """The kernel is stored once, whatever borders cut off."""
        return bool(self.limits.shared_kernels.value) and not self.dense

    def kind(self, axis: int, piece: Interval) -> object:
        """What tells pieces of one length apart along channels (0), rows (1) or columns (2)."""
        if axis == 0:
            first, last = self.sources(piece)
            return last - first
        line = self.line(axis)
        return line.positions(piece), None if self.shared else line.lists(piece)

    def unlike(self, axis: int, pieces: Cut) -> list[Interval]:
        """One of each kind and length of `pieces`."""
        return list({(stop - start, self.kind(axis, (start, stop))): (start, stop) for start, stop in pieces}.values())

    def inputs(self, part: Box) -> int:
        """Input axons of a slice of the target."""
        return self.rows.positions(part.rows) * self.columns.positions(part.columns) * self.axons(part.channels)

    def axons(self, channels: Interval) -> int:
        """Input axons of target `channels` for each source position."""
        first, last = self.sources(channels)
        return self.listeners * self.signs * (last - first if self.discrete else ceil((last - first) / self.limits.axon_sources.value))

    def entries(self, own: Cut, targets: Cut) -> npt.NDArray[np.int64]:
        """Output axons that one position of a source slice with channels `own` takes for a target slice: (own, targets)."""
        first, last = np.array(own).T
        start, stop = np.array([self.sources(channels) for channels in targets]).T
        channels = np.maximum(np.minimum(last[:, None], stop) - np.maximum(first[:, None], start), 0)
        if not self.discrete and self.limits.shared_fan_out.value:
            channels = -(-channels // self.limits.axon_sources.value) * self.signs
        else:
            channels = channels * self.senders
        slots = 1 if self.discrete else self.limits.population_axon_slots.value
        made: npt.NDArray[np.int64] = channels * slots * self.listeners
        return made

    def memory(self, part: Box) -> int:
        """Bits of the lists of a slice of the target."""
        first, last = self.sources(part.channels)
        each = min(self.out, part.channels[1] - part.channels[0])
        if self.shared:
            return self.signs * self._lists(last - first, self.rows.kernel * self.columns.kernel * each, self.bits)
        width = self.bits if self.dense else self.bits + max(SMALLEST_INDEX, ceil(log2(prod(stop - start for start, stop in part))))
        total = sum(
            down * across * self._lists(last - first, high * wide * each, width)
            for high, down in self.rows.lists(part.rows)
            for wide, across in self.columns.lists(part.columns)
        )
        return self.signs * total

    def _lists(self, channels: int, synapses: int, width: int) -> int:
        """Bits of the lists of one position: `channels` sources with so many synapses each."""
        if self.discrete:
            return channels * list_bits(self.limits, synapses, width)
        full, rest = divmod(channels, self.limits.axon_sources.value)
        return full * list_bits(self.limits, self.limits.axon_sources.value * synapses, width) + list_bits(
            self.limits, rest * synapses, width
        )


def list_bits(limits: Limits, synapses: int, width: int) -> int:
    """Memory of one list of synapses, each `width` bits."""
    blocks, rest = divmod(synapses, limits.list_synapses.value)
    return blocks * _words(limits, limits.list_synapses.value * width) + (_words(limits, rest * width) if rest else 0)


def _words(limits: Limits, bits: int) -> int:
    word = limits.memory_word_bits.value
    return -(-(bits + limits.list_header_bits.value) // word) * word


class Costs:
    """The costs of slices of one graph on one chip."""

    def __init__(self, graph: Graph, limits: Limits, host: Iterable[str] = ()) -> None:
        """`host` names readouts that have no core: the host adds up what their source sends."""
        self.graph = graph
        self.limits = limits
        left_out = {*host, *(population.name for population in graph.of_kind("input"))}
        self.placed = {name: graph.population(name) for name in graph.phase("forward").order if name not in left_out}
        self.neurons = {name: _neurons(graph, population, limits) for name, population in self.placed.items()}
        self.wirings = [wiring for wiring in _wirings(graph, limits) if wiring.target in self.placed]
        self.into = {name: [w for w in self.wirings if w.target == name] for name in self.placed}
        self.out_of = {name: [w for w in self.wirings if w.source == name] for name in self.placed}
        self._own: dict[tuple[object, ...], tuple[int, int, int]] = {}

    def own(self, name: str, part: Box) -> tuple[int, int, int]:
        """`counted`, once for all slices that cannot differ."""
        key = (
            name,
            *(stop - start for start, stop in part),
            *(w.kind(axis, piece) for w in self.into[name] for axis, piece in enumerate(part)),
        )
        if key not in self._own:
            self._own[key] = self.counted(name, part)
        return self._own[key]

    def counted(self, name: str, part: Box) -> tuple[int, int, int]:
        """Neurons, memory and input axons of one slice."""
        neurons = prod(stop - start for start, stop in part) * self.neurons[name]
        memory = neurons * self.limits.neuron_state_bits.value + sum(w.memory(part) for w in self.into[name])
        return neurons, memory, sum(w.inputs(part) for w in self.into[name])

    def table(self, boxes: Mapping[str, Sequence[Box]]) -> dict[str, npt.NDArray[np.int64]]:
        """The costs of all slices, (slices, 4) by population, columns as NEURONS .. OUTPUTS; `boxes` holds every slice of the graph."""
        made = {name: np.array([(*self.own(name, part), 0) for part in parts], np.int64).reshape(-1, 4) for name, parts in boxes.items()}
        for wiring in self.wirings:
            if wiring.source in made:
                made[wiring.source][:, OUTPUTS] += self._outputs(wiring, boxes[wiring.source], boxes[wiring.target])
        for costs in made.values():
            costs[:, MEMORY] += costs[:, OUTPUTS] * self.limits.output_axon_bits.value
        return made

    def _outputs(self, wiring: Wiring, sources: Sequence[Box], targets: Sequence[Box]) -> npt.NDArray[np.int64]:
        """Output axons that each source slice takes for all target slices: the sum over targets of rows times columns times channels that they share."""
        axes = [_shared(wiring, axis, [part[axis] for part in sources], [part[axis] for part in targets]) for axis in (0, 1, 2)]
        if max(prod(len(table) for table, _, _ in axes), prod(table.shape[1] for table, _, _ in axes)) > LARGEST_TABLE:
            return np.array([prod(table[of[i], to] for table, of, to in axes).sum() for i in range(len(sources))], np.int64)
        (deep, deep_of, deep_to), (down, down_of, down_to), (across, across_of, across_to) = axes
        number = np.zeros((deep.shape[1], down.shape[1], across.shape[1]), np.int64)
        np.add.at(number, (deep_to, down_to, across_to), 1)
        summed = np.einsum("ix,xyz,jy,kz->ijk", deep, number, down, across, optimize=True)
        found: npt.NDArray[np.int64] = summed[deep_of, down_of, across_of]
        return found


def _shared(
    wiring: Wiring, axis: int, sources: Sequence[Interval], targets: Sequence[Interval]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Along one axis: a table of what different source and target slices share (positions that feed, output axons of channels), and where each slice
    finds itself in it."""
    own, of_source = different(sources)
    wanted, of_target = different(targets)
    if axis == 0:
        return wiring.entries(tuple(own), tuple(wanted)), of_source, of_target
    sums = np.stack([np.concatenate(([0], np.cumsum(wiring.line(axis).reached(piece)))) for piece in wanted])
    return np.stack([sums[:, stop] - sums[:, start] for start, stop in own]), of_source, of_target


def different(pieces: Sequence[Interval]) -> tuple[list[Interval], npt.NDArray[np.int64]]:
    """The different intervals, and which of them each one is."""
    found = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return list(found), np.array([found[piece] for piece in pieces], np.int64)


def _neurons(graph: Graph, population: Population, limits: Limits) -> int:
    """Neurons of the chip that one of a population takes."""
    if population.kind != "couple":
        return 1
    return members(graph, population.name) * limits.members_with_subtraction.value


def members(graph: Graph, name: str) -> int:
    """2 where a population's couples fire in both directions in some phase, else 1."""
    found = [phase.dynamics[name].members for phase in graph.phases if name in phase.dynamics]
    return 2 if "both" in found else 1


def _wirings(graph: Graph, limits: Limits) -> list[Wiring]:
    bits: dict[str, int] = {}
    shapes: dict[tuple[object, ...], _Geometry] = {}
    made = []
    for phase in graph.phases:
        for synapse in phase.synapses:
            key = (synapse.ops, graph.population(synapse.source).shape, graph.population(synapse.target).shape)
            if key not in shapes:
                shapes[key] = _geometry(graph, synapse)
            names = [name for op in synapse.ops if (name := weight_of(op)) is not None]
            for name in names:
                bits.setdefault(name, weight_bits(graph.tensors[name]))
            width = max((bits[name] for name in names), default=UNIT_BITS)
            made.append(_wired(graph, phase, synapse, shapes[key], stored_bits(width), limits))
    return made


def _wired(graph: Graph, phase: Phase, synapse: Synapse, shape: _Geometry, bits: int, limits: Limits) -> Wiring:
    source = graph.population(synapse.source)
    senders = 2 if source.name in phase.dynamics and phase.dynamics[source.name].members == "both" else 1
    return Wiring(
        synapse,
        phase.name,
        *shape[:-1],
        limits=limits,
        bits=bits,
        dense=shape.flattened or any(isinstance(op, Dense) for op in synapse.ops),
        discrete=len(source.shape) == 1,
        signs=1 if limits.graded_spike_bits.value else senders,
        senders=senders,
        listeners=2 if phase.dynamics[synapse.target].members == "both" else 1,
    )


def weight_bits(weight: Array) -> int:
    """The signed width that holds every value of an integer tensor."""
    low, high = int(weight.min(initial=0)), int(weight.max(initial=0))
    return max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0) + 1


def stored_bits(width: int) -> int:
    """The width in which weights of `width` bits are stored."""
    return next((stored for stored in WIDTHS if stored >= width), width)


class _Geometry(NamedTuple):
    groups: int
    into: int
    out: int
    rows: Axis
    columns: Axis
    flattened: bool


def _geometry(graph: Graph, synapse: Synapse) -> _Geometry:
    """What a synapse's operations come to: channel groups, and codes along rows and columns.

    An image that meets a flat population (or the reverse) without a fully connected operation is counted as fully connected within blocks of channels,
    zeros included: never less than what it takes.
    """
    source, target = graph.population(synapse.source).shape, graph.population(synapse.target).shape
    after = shapes_along(synapse.ops, source, target, graph.tensors)
    entry = entry_shape(synapse.ops, source, target, graph.tensors)
    here = image(source)
    groups = (here[0], 1, 1)
    lines = [np.eye(n, dtype=np.int64) for n in here[1:]]
    flattened = False

    def follow(channels: tuple[int, int, int], codes: Sequence[Array]) -> None:
        nonlocal groups, lines
        groups = _grouped(groups, channels)
        lines = [_along(line, found) for line, found in zip(lines, codes, strict=True)]

    def reach(shape: tuple[int, int, int]) -> None:
        """Go on in `shape`: other rows and columns than before are flattened, or an image again."""
        nonlocal here, flattened
        if here != shape:
            follow(_regrouped(here[0], shape[0]), [_all_to_all(here[axis], shape[axis]) for axis in (1, 2)])
            here, flattened = shape, True

    for i, (op, taken, made) in enumerate(zip(synapse.ops, (entry, *after), after, strict=False)):
        if isinstance(op, Dense):  # takes and makes any shape: everything to everything
            stop = image(target if i == len(after) - 1 else made)
        else:
            reach(image(taken))
            stop = image(made)
        follow(_channels(op, here, stop), [_codes(op, graph, axis, here[1 + axis], stop[1 + axis]) for axis in (0, 1)])
        here = stop
    reach(image(target))
    rows, columns = (_apart(line) for line in lines) if flattened else lines
    return _Geometry(*groups, Axis(rows), Axis(columns), flattened)


def _channels(op: Op, taken: tuple[int, ...], made: tuple[int, ...]) -> tuple[int, int, int]:
    """Groups of an operation, and the channels of each that go in and come out."""
    if isinstance(op, Dense):
        return 1, taken[0], made[0]
    if isinstance(op, (Conv2d, ConvTranspose2d)):
        return op.groups, taken[0] // op.groups, made[0] // op.groups
    return taken[0], 1, 1


def _grouped(first: tuple[int, int, int], second: tuple[int, int, int]) -> tuple[int, int, int]:
    """Groups of two operations in a row: blocks of channels that both keep apart, exact where the groups of one are within those of the other."""
    groups = gcd(first[0], second[0])
    return groups, first[0] * first[1] // groups, second[0] * second[2] // groups


def _regrouped(taken: int, made: int) -> tuple[int, int, int]:
    """Groups of a reshape between `taken` and `made` channels, which keeps the order of values: as many blocks as divide both."""
    groups = gcd(taken, made)
    return groups, taken // groups, made // groups


def _all_to_all(taken: int, made: int) -> Array:
    """Codes of positions that each have a weight of their own to every one, (taken, made)."""
    return np.arange(1, taken * made + 1, dtype=np.int64).reshape(taken, made)


def _apart(codes: Array) -> Array:
    """The same connections, no two of them with the same weights."""
    return np.where(codes != 0, _all_to_all(*codes.shape), 0)


def _along(first: Array, second: Array) -> Array:
    """Codes of two operations in a row."""
    if first.shape[0] == first.shape[1] and np.array_equal(first, np.eye(len(first), dtype=np.int64)):
        return second
    made: Array = first @ second
    return made


def _codes(op: Op, graph: Graph, axis: int, taken: int, made: int) -> Array:
    """Codes of one operation along rows (`axis` 0) or columns (1), (taken, made)."""
    if isinstance(op, Dense):
        return _all_to_all(taken, made)
    if isinstance(op, (Conv2d, ConvTranspose2d)):
        kernel = graph.tensors[op.weight].shape[2 + axis]
        codes = [1 << (tap % 50) for tap in range(kernel)]
        window = _Window(op.stride[axis], op.padding[axis], op.dilation[axis])
        gathers = isinstance(op, Conv2d) != op.transpose
    elif isinstance(op, AvgPool2d):
        codes = [1] * op.kernel[axis]
        window, gathers = _Window(op.stride[axis], op.padding[axis], 1), not op.transpose
    elif isinstance(op, Upsample):
        codes, window, gathers = [1] * op.factor, _Window(op.factor, 0, 1), op.transpose
    else:
        return np.eye(taken, dtype=np.int64)
    return _windows(codes, window, taken, made) if gathers else _windows(codes, window, made, taken).T


class _Window(NamedTuple):
    stride: int
    padding: int
    dilation: int


def _windows(codes: Sequence[int], window: _Window, taken: int, made: int) -> Array:
    """`made` windows over `taken` positions: codes[t] where a window's tap t lies, (taken, made)."""
    found = np.zeros((taken, made), np.int64)
    for tap, code in enumerate(codes):
        place = np.arange(made) * window.stride - window.padding + tap * window.dilation
        inside = (place >= 0) & (place < taken)
        found[place[inside], np.flatnonzero(inside)] += code
    return found
