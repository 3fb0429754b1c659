"""Ticks of whole numbers in C (`ticks.c`): currents of a connection, and model steps of couples. No torch here.

Whatever would make the kernel read or write outside its arrays is a ToolchainError here: a connection is looked at once, when it is made, and the arrays of
a call at each call. That no sum leaves its type is the caller's to prove: it would be a wrong number, not a wrong address.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np

from toolchain import native
from toolchain.errors import ToolchainError
from toolchain.native.arrays import INT8, INT16, INT32, LARGEST, Array, address, checked, require

CURRENTS = (INT8, INT16, INT32)
"""What currents and messages may be integers of."""

_FLAGS = (np.dtype(np.bool_), np.dtype(np.uint8))
LARGEST_EXPONENT = 30


class Way:
    """A connection that the kernel can follow; `Connection` in ticks.c says what each number and array means.

    source     channels and places; of one place every channel is a neuron
    made       channels, rows and columns of the target
    slots      rows and columns of the kernel
    rows       where the runs of each source row begin (source rows + 1), and the runs (target, slot, length), both int32; `columns` alike
    places     each place's row and column, and the places in the order in which they are looked at, int32
    weight     int16 (channel, slot row, slot column, made); or (channels,): each goes to itself alone, with one weight for all slots
    """

    def __init__(
        self,
        source: tuple[int, int],
        made: tuple[int, int, int],
        slots: tuple[int, int],
        *,
        rows: tuple[Array, Array],
        columns: tuple[Array, Array],
        places: tuple[Array, Array, Array],
        weight: Array,
        exponent: int = 0,
    ) -> None:
        (channels, count), (out, height, width) = source, made
        diagonal = np.ndim(weight) == 1
        require(min(*source, *made, *slots) > 0, f"sizes {source}, {made} and {slots} must all be above 0")
        require(max(channels * count, out * height * width) <= LARGEST, f"{source} or {made} has more neurons than 32 bits can count")
        require(0 <= exponent <= LARGEST_EXPONENT, f"exponent {exponent} is not within 0 to {LARGEST_EXPONENT}")
        require(not diagonal or out == channels, f"weights of a channel each cannot take {channels} channels to {out}")
        sizes = (channels,) if diagonal else (channels, *slots, out)
        kept = [checked("weight", weight, sizes, INT16)]
        for axis, (begin, runs), size, taps in zip(("rows", "columns"), (rows, columns), (height, width), slots, strict=True):
            kept += _runs(axis, begin, runs, size, taps)
        kept += _places(places, count, (np.size(rows[0]) - 1, np.size(columns[0]) - 1))
        self.inputs, self.outputs = channels * count, out * height * width
        self._kept = kept  # what the addresses below point into
        weights, row_begin, row_runs, column_begin, column_runs, place_row, place_column, place_order = (a.ctypes.data for a in kept)
        self._connection = native.Connection(
            channels=channels,
            places=count,
            made=out,
            made_places=height * width,
            made_width=width,
            slot_rows=slots[0],
            slot_columns=slots[1],
            diagonal=int(diagonal),
            exponent=exponent,
            place_row=place_row,
            place_column=place_column,
            place_order=place_order,
            row_begin=row_begin,
            column_begin=column_begin,
            rows=row_runs,
            columns=column_runs,
            weight=weights,
        )
        self._at = ctypes.byref(self._connection)

    def deliver(self, values: Array, out: Array, *, sums: int, instructions: int) -> int:
        """Currents of `values`, (samples, source neurons) of int8, into `out`, (samples, target neurons), added up in integers of `sums` bytes (2 or 4).

        How many values were not zero.
        """
        require(sums in (2, 4), f"sums of {sums} bytes are none of 2 and 4")
        samples = np.shape(out)[0] if np.ndim(out) else 0
        from_ = address("values", values, (samples, self.inputs), INT8)
        to = address("currents", out, (samples, self.outputs), *CURRENTS, written=True)
        found = int(native.loaded().toolchain_deliver(self._at, from_, samples, to, out.itemsize, sums, _usable(instructions)))
        if found < 0:
            raise ToolchainError("there is not enough memory for one sample's currents: run fewer processes")
        return found


class State:
    """Where a population's state lies through one phase; `Couples` in ticks.c says what each array is.

    Arrays are (samples, neurons) of int32; `spikes` and `sent` (what is sent of them: the same where nothing masks) of int8, `mask` of 0 and 1.
    """

    def __init__(
        self,
        *,
        threshold: int,
        reset: int,
        both: bool,
        potential: Array,
        counts: Array,
        saturations: Array,
        spikes: Array,
        sent: Array,
        activity: Array | None = None,
        drive: Array | None = None,
        mask: Array | None = None,
    ) -> None:
        require(np.ndim(potential) == 2, f"potentials are (samples, neurons), not {np.shape(potential)}")
        require(0 < threshold <= LARGEST, f"threshold {threshold} is not within 1 to {LARGEST}")
        require(0 <= reset <= LARGEST, f"reset {reset} is not within 0 to {LARGEST}")
        self.shape: tuple[int, ...] = potential.shape
        self._samples, neurons = self.shape
        self._kept = (potential, counts, saturations, spikes, sent, activity, drive, mask)
        self._couples = native.Couples(neurons=neurons, threshold=threshold, reset=reset, both=int(both))
        for name, array, kind in (
            ("potential", potential, INT32),
            ("counts", counts, INT32),
            ("saturations", saturations, INT32),
            ("spikes", spikes, INT8),
            ("sent", sent, INT8),
            ("activity", activity, INT32),
        ):
            if array is not None:
                setattr(self._couples, name, address(name, array, self.shape, kind, written=True))
        if drive is not None:
            self._couples.drive = address("drive", drive, self.shape, INT32)
        if mask is not None:
            self._couples.mask = address("mask", mask, self.shape, *_FLAGS)
        self._at = ctypes.byref(self._couples)

    def advance(self, messages: Sequence[Array], *, waiting: Array | None = None, bias: Array | None = None, instructions: int) -> int:
        """One model step in place, with messages of 1, 2 or 4 bytes, what has waited (zeroed here) and a bias (neurons,) of int32; how many spikes are sent."""
        couples = self._couples
        require(len(messages) <= native.MOST_MESSAGES, f"{len(messages)} messages are more than the {native.MOST_MESSAGES} of a step")
        for place, message in enumerate(messages):
            couples.message[place] = address("message", message, self.shape, *CURRENTS)
            couples.bytes[place] = message.itemsize
        couples.messages = len(messages)
        couples.waiting = None if waiting is None else address("waiting", waiting, self.shape, INT32, written=True)
        couples.bias = None if bias is None else address("bias", bias, self.shape[1:], INT32)
        return int(native.loaded().toolchain_couples(self._at, self._samples, _usable(instructions)))


def collect(waiting: Array, message: Array, *, instructions: int) -> None:
    """Add a message of 1, 2 or 4 bytes to what waits, an int32 for each of its values."""
    to = address("waiting", waiting, message.shape, INT32, written=True)
    from_ = address("message", message, message.shape, *CURRENTS)
    native.loaded().toolchain_collect(to, from_, message.itemsize, message.size, _usable(instructions))


def _runs(axis: str, begin: Array, runs: Array, size: int, slots: int) -> list[Array]:
    """Where runs begin and the runs themselves, of which none leaves `size` targets or `slots` of the kernel."""
    require(np.size(begin) > 1, f"its {axis} begin nowhere")
    found = [checked(f"{axis} begin", begin, (np.size(begin),), INT32), checked(axis, runs, (*np.shape(runs)[:1], 3), INT32)]
    steps = np.diff(begin)
    require(begin[0] >= 0 and bool((steps >= 0).all()) and begin[-1] <= len(runs), f"its {axis} begin outside {len(runs)} runs")
    target, slot, length = runs.astype(np.int64).T
    inside = (runs >= 0).all() and (target + length <= size).all() and (slot + length <= slots).all()
    require(bool(inside), f"a run of its {axis} leaves the {size} of the target or the {slots} of the kernel")
    return found


def _places(places: tuple[Array, Array, Array], count: int, sizes: tuple[int, int]) -> list[Array]:
    names = ("place's row", "place's column", "order of places")
    found = [checked(name, array, (count,), INT32) for name, array in zip(names, places, strict=True)]
    for name, array, size in zip(names, found, (*sizes, count), strict=True):
        require(bool(((array >= 0) & (array < size)).all()), f"a {name} is not within 0 to {size - 1}")
    return found


def _usable(instructions: int) -> int:
    """A place in INSTRUCTION_SETS that this machine has: another would end the process."""
    require(0 <= instructions <= _widest(), f"instruction set {instructions} is not within 0 to {_widest()}")
    return instructions


@cache
def _widest() -> int:
    return native.widest()
