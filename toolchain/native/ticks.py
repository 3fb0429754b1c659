"""Ticks of whole numbers in C (`ticks.c`): currents of a connection, and model steps of couples. Every bound is the caller's to prove; no torch here."""

from __future__ import annotations

import ctypes

from toolchain import native
from toolchain.errors import ToolchainError

MOST_MESSAGES = 8
"""Messages that one step takes in; more wait before it."""


class Run(ctypes.Structure):
    """Targets that take a kernel's slots one after the other; see `ticks.c`."""

    _fields_ = (("target", ctypes.c_int32), ("slot", ctypes.c_int32), ("length", ctypes.c_int32))


class Connection(ctypes.Structure):
    """Where each value of a source goes, and by what weight; see `ticks.c`. Pointers are addresses."""

    _fields_ = (
        ("channels", ctypes.c_int32),
        ("places", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("made", ctypes.c_int32),
        ("made_places", ctypes.c_int32),
        ("made_width", ctypes.c_int32),
        ("slot_rows", ctypes.c_int32),
        ("slot_columns", ctypes.c_int32),
        ("diagonal", ctypes.c_int32),
        ("exponent", ctypes.c_int32),
        ("place_row", ctypes.c_void_p),
        ("place_column", ctypes.c_void_p),
        ("place_order", ctypes.c_void_p),
        ("row_begin", ctypes.c_void_p),
        ("column_begin", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
    )


class Couples(ctypes.Structure):
    """A population's state and what arrives; see `ticks.c`. Pointers are addresses."""

    _fields_ = (
        ("neurons", ctypes.c_int64),
        ("threshold", ctypes.c_int32),
        ("reset", ctypes.c_int32),
        ("both", ctypes.c_int32),
        ("messages", ctypes.c_int32),
        ("message", ctypes.c_void_p * MOST_MESSAGES),
        ("bytes", ctypes.c_int32 * MOST_MESSAGES),
        ("potential", ctypes.c_void_p),
        ("waiting", ctypes.c_void_p),
        ("drive", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("activity", ctypes.c_void_p),
        ("saturations", ctypes.c_void_p),
        ("spikes", ctypes.c_void_p),
        ("sent", ctypes.c_void_p),
    )


def deliver(way: Connection, values: int, samples: int, out: int, *, width: int, sums: int, instructions: int) -> int:
    """Currents of `samples` rows of int8 at address `values`, at `out` in integers of `width` bytes, added up in `sums` bytes; how many values were not zero."""
    found = int(native.loaded().toolchain_deliver(ctypes.byref(way), values, samples, out, width, sums, instructions))
    if found < 0:
        raise ToolchainError("there is not enough memory for one sample's currents: run fewer processes")
    return found


def advance(couples: Couples, samples: int, *, instructions: int) -> int:
    """One model step in place; how many spikes are sent."""
    return int(native.loaded().toolchain_couples(ctypes.byref(couples), samples, instructions))


def collect(waiting: int, message: int, *, width: int, length: int, instructions: int) -> None:
    """Add `length` integers of `width` bytes at address `message` to those of 4 bytes at `waiting`."""
    native.loaded().toolchain_collect(waiting, message, width, length, instructions)
