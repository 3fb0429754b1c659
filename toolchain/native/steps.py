"""Event-driven time steps in C (`spikes.c`): what a layer and an edge are made of, and the steps. No torch here.

Whatever would make the kernel read or write outside its arrays is a ToolchainError: arrays and sizes when the steps are laid out, samples and a new
drive when they are given. Arrays are laid out row after row; those of one stage hold the same kind of floats, float32 or float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toolchain import native
from toolchain.errors import ToolchainError
from toolchain.native.arrays import INT8, INT32, LARGEST, Array, address, require

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


@dataclass(frozen=True)
class State:
    """A layer: spikes at `threshold` that subtract `reset`; its state, (samples, neurons), is changed in place.

    potential, sum  floats; the sum is of spikes with their signs, weighted by the leak
    count           int32, spikes of either sign
    spikes          int8, those of the last step
    drive           floats (samples or 1, neurons), a current added at every step
    """

    threshold: float
    reset: float
    potential: Array
    sum: Array
    count: Array
    spikes: Array
    drive: Array | None = None


@dataclass(frozen=True)
class Way:
    """Where the spikes of the layer at place `source` go, in the layer at place `target`; `Edge` in spikes.c says what each array is.

    rows, columns  int32 (source rows or columns, 3)
    weight         floats (channels, slots, slots, made), or (channels,) where each channel goes to itself alone
    made_width     columns of the target
    late           whether the spikes are those of the step before; else the source comes before the target
    amplitude      floats (samples, source neurons), what a spike carries; factor (samples, target neurons), multiplies what arrives; None for 1
    """

    source: int
    target: int
    rows: Array
    columns: Array
    weight: Array
    made_width: int
    late: bool = False
    amplitude: Array | None = None
    factor: Array | None = None


class Steps:
    """Layers in the order of processing, and ways in the order in which their currents are added, laid out for the kernel."""

    def __init__(self, states: Sequence[State], ways: Sequence[Way], *, leak: float, signed: bool) -> None:
        require(len(states) > 0, "there is no layer")
        first, shapes = states[0].potential, [np.shape(state.potential) for state in states]
        require(all(len(shape) == 2 for shape in shapes), f"potentials {shapes} are not (samples, neurons) each")
        require(np.result_type(first) in _FLOATS, f"potentials of {np.result_type(first)} are neither float32 nor float64")
        self._samples, self._real, self._leak, self._signed = shapes[0][0], first.dtype, leak, signed
        self._sizes = [neurons for _, neurons in shapes]
        self._kept = (tuple(states), tuple(ways))  # what the addresses below point into
        self._drives: dict[int, Array] = {}
        self._layers = (native.Layer * len(states))(*map(self._layer, states, self._sizes))
        self._edges = (native.Edge * max(len(ways), 1))(*map(self._edge, ways))
        for place, state in enumerate(states):
            if state.drive is not None:
                self.drive(place, state.drive)

    def drive(self, place: int, drive: Array) -> None:
        """Give the layer at `place` another current for the steps to come, (samples or 1, neurons)."""
        require(0 <= place < len(self._sizes), f"layer {place} is none of {len(self._sizes)}")
        rows = 1 if np.shape(drive)[:1] == (1,) else self._samples
        layer = self._layers[place]
        layer.drive = address("drive", drive, (rows, self._sizes[place]), self._real)
        layer.drive_stride = 0 if rows == 1 else self._sizes[place]
        self._drives[place] = drive

    def run(self, first: int, last: int, steps: int, instructions: int | None = None) -> None:
        """`steps` time steps of the samples from the first to before the last; other threads run meanwhile.

        `instructions` is the best of INSTRUCTION_SETS to use, by its place there; None for the best there is.
        """
        require(0 <= first <= last <= self._samples, f"samples {first} to {last} are no span of {self._samples}")
        require(0 <= steps <= LARGEST, f"{steps} time steps are not within 0 to {LARGEST}")
        best = native.widest()
        chosen = best if instructions is None else instructions
        require(
            0 <= chosen < len(native.INSTRUCTION_SETS), f"instruction set {chosen} is not within 0 to {len(native.INSTRUCTION_SETS) - 1}"
        )
        failed = native.loaded().toolchain_stage(
            self._layers,
            len(self._layers),
            self._edges,
            len(self._kept[1]),
            self._leak,
            int(self._signed),
            first,
            last,
            steps,
            int(self._real == np.float64),
            min(chosen, best),
        )
        if failed:
            raise ToolchainError("there is not enough memory for the spike lists of the native kernel: use smaller batches")

    def _layer(self, state: State, neurons: int) -> native.Layer:
        require(
            0 < neurons <= LARGEST, f"a layer with potentials {np.shape(state.potential)} has no neurons, or more than 32 bits can count"
        )
        shape = (self._samples, neurons)
        return native.Layer(
            neurons=neurons,
            threshold=state.threshold,
            reset=state.reset,
            potential=address("potential", state.potential, shape, self._real, written=True),
            sum=address("sum", state.sum, shape, self._real, written=True),
            count=address("count", state.count, shape, INT32, written=True),
            spikes=address("spikes", state.spikes, shape, INT8, written=True),
        )

    def _edge(self, way: Way) -> native.Edge:
        source, target, weight = way.source, way.target, np.shape(way.weight)
        for end in (source, target):
            require(0 <= end < len(self._sizes), f"layer {end} is none of {len(self._sizes)}")
        require(
            way.late or source < target,
            f"a current from layer {source} reaches layer {target} in the same step, before its source has fired",
        )
        before, after = self._sizes[source], self._sizes[target]
        diagonal = len(weight) == 1
        require(
            diagonal or (len(weight) == 4 and weight[1] == weight[2]),
            f"weights {weight} are neither (channels,) nor (channels, slots, slots, made)",
        )
        rows, columns = (np.shape(axis)[0] if np.ndim(axis) == 2 else 0 for axis in (way.rows, way.columns))
        places, width = rows * columns, way.made_width
        require(
            min(*weight, places, width) > 0 and weight[0] * places == before and after % (weight[-1] * width) == 0,
            f"weights {weight} cannot lead from {before} neurons in {rows} rows and {columns} columns to {after} neurons in {width} columns",
        )
        slots = None if diagonal else weight[1]
        return native.Edge(
            source=source,
            target=target,
            late=int(way.late),
            diagonal=int(diagonal),
            channels=weight[0],
            width=columns,
            made=weight[-1],
            made_width=width,
            slots=slots or 1,
            rows=_runs("rows", way.rows, rows, after // weight[-1] // width, slots),
            columns=_runs("columns", way.columns, columns, width, slots),
            weight=address("weight", way.weight, weight, self._real),
            amplitude=None if way.amplitude is None else address("amplitude", way.amplitude, (self._samples, before), self._real),
            factor=None if way.factor is None else address("factor", way.factor, (self._samples, after), self._real),
        )


def _runs(name: str, axis: Array, sources: int, size: int, slots: int | None) -> int:
    """The address of what each source row (or column) reaches: never more than `size` targets, nor, where there is a kernel, its `slots`."""
    lies = address(name, axis, (sources, 3), INT32)
    target, slot, length = axis.astype(np.int64).T
    reached = length > 0
    inside = (axis >= 0).all() and ((target + length)[reached] <= size).all()
    if slots is not None:
        inside = inside and ((slot + length)[reached] <= slots).all()
    require(bool(inside), f"what its {name} reach leaves the {size} of the target or the {slots or 'any number'} of the kernel")
    return lies
