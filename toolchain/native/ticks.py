"""Ticks of whole numbers in C (`ticks.c`): currents of a connection, and model steps of couples. Every bound is the caller's to prove; no torch here."""

from __future__ import annotations

import ctypes

from toolchain import native
from toolchain.errors import ToolchainError
from toolchain.native import Connection, Couples


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
