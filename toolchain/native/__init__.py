"""The compiled part in C, built with the package where there is a compiler, and never needed: `spikes.c` has event-driven time steps in floats,
`ticks.c` ticks of whole numbers, and `core.c` whole phases of them. `ending.c` has the last words of a program that crashes.

This module finds the library and describes what the first two take; `steps` and `ticks` check it and call them. `phases` does both for the third. No torch here.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import pairwise
from pathlib import Path

from toolchain.errors import ToolchainError

INSTRUCTION_SETS = ("plain", "AVX2", "AVX-512")

LIBRARY_VARIABLE = "TOOLCHAIN_NATIVE_LIBRARY"
"""The environment variable that names another build of the library to load instead, such as one with sanitizers (`.ci/build-native`). Who can set it can
set LD_PRELOAD as well, so it opens no door."""

PIECES_A_THREAD = 4
"""Spans of samples for each thread: who has finished early takes another."""

MOST_MESSAGES = 8
"""Messages that one step takes in; more wait before it."""


class Edge(ctypes.Structure):
    """A connection from the spikes of one layer to the potential of another; see `spikes.c`. Pointers are addresses."""

    _fields_ = (
        ("source", ctypes.c_int32),
        ("target", ctypes.c_int32),
        ("late", ctypes.c_int32),
        ("diagonal", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("made", ctypes.c_int32),
        ("made_width", ctypes.c_int32),
        ("slots", ctypes.c_int32),
        ("rows", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("amplitude", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
    )


class Layer(ctypes.Structure):
    """A layer and where its state is; see `spikes.c`. Pointers are addresses."""

    _fields_ = (
        ("neurons", ctypes.c_int64),
        ("threshold", ctypes.c_double),
        ("reset", ctypes.c_double),
        ("drive", ctypes.c_void_p),
        ("drive_stride", ctypes.c_int64),
        ("potential", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("spikes", ctypes.c_void_p),
    )


class Connection(ctypes.Structure):
    """Where each value of a source goes, and by what weight; see `ticks.c`. Pointers are addresses."""

    _fields_ = (
        ("channels", ctypes.c_int32),
        ("places", ctypes.c_int32),
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


@cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    named = other_library()
    if named is not None:
        return _load(named)
    folder = Path(__file__).parent
    for path in (folder / f"_spikes{suffix}" for suffix in EXTENSION_SUFFIXES):
        if path.exists():
            return _load(path)
    return "the native kernel is not built: install a C compiler (gcc or clang), then the package again"


def other_library() -> Path | None:
    """The build that the environment names, if any."""
    named = os.environ.get(LIBRARY_VARIABLE)
    return Path(named).absolute() if named else None


def remedy() -> str:
    """What to do about a library that is not of these sources."""
    named = other_library() is not None
    return f"give {LIBRARY_VARIABLE} the path of a build of these sources, or unset it" if named else "install the package again"


def _load(path: Path) -> ctypes.CDLL | str:
    """The library of a file with its functions described, or why it is none of these sources'."""
    try:
        found = ctypes.CDLL(str(path))
        found.toolchain_widest.restype = ctypes.c_int32
        found.toolchain_stage.restype = ctypes.c_int32
        found.toolchain_deliver.restype = ctypes.c_int64
        found.toolchain_couples.restype = ctypes.c_int64
        found.toolchain_collect.restype = found.toolchain_last_words.restype = None
        sizes = [
            found.toolchain_stage_size(0),
            found.toolchain_stage_size(1),
            found.toolchain_ticks_size(0),
            found.toolchain_ticks_size(1),
        ]
    except (OSError, AttributeError) as error:
        return f"the native kernel cannot be loaded ({error}): {remedy()}"
    if sizes != [ctypes.sizeof(part) for part in (Layer, Edge, Connection, Couples)]:
        return f"the native kernel was built from other sources than these: {remedy()}"
    found.toolchain_stage.argtypes = (
        ctypes.POINTER(Layer),
        ctypes.c_int32,
        ctypes.POINTER(Edge),
        ctypes.c_int32,
        ctypes.c_double,
        ctypes.c_int32,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int32,
        ctypes.c_int32,
    )
    pointer, wide, narrow = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    found.toolchain_deliver.argtypes = (pointer, pointer, wide, pointer, narrow, narrow, narrow)
    found.toolchain_couples.argtypes = (pointer, wide, narrow)
    found.toolchain_last_words.argtypes = (ctypes.c_char_p, narrow)
    found.toolchain_collect.argtypes = (pointer, pointer, narrow, wide, narrow)
    return found


def missing() -> str | None:
    """What the native kernel lacks here, and the way to get it; None where it can run."""
    found = _library()
    return found if isinstance(found, str) else None


def widest() -> int:
    """The best of INSTRUCTION_SETS that both this machine and the library have, by its place there; ToolchainError without the library."""
    return int(loaded().toolchain_widest())


def loaded() -> ctypes.CDLL:
    """The library; ToolchainError where there is none."""
    found = _library()
    if isinstance(found, str):
        raise ToolchainError(found)
    return found


def last_words(text: str, code: int) -> None:
    """From now on this process, where a library aborts it or it crashes, says `text` and ends with `code`; without a text, or where there is no library of ours, it ends as it would."""
    found = _library()
    if text and not isinstance(found, str):
        found.toolchain_last_words(text.encode(errors="backslashreplace"), code)


def in_pieces(samples: int, threads: int, run: Callable[[int, int], object], *, at_most: int | None = None) -> None:
    """`run` for spans of samples (first, last exclusive) that together are all, by up to `threads` threads at once; a single one is this thread.

    A span has `at_most` so many samples: an interruption waits for the end of a span.
    """
    threads = max(1, min(samples, threads))
    pieces = max(1, PIECES_A_THREAD * threads if threads > 1 else 1, -(-samples // (at_most or samples or 1)))
    pieces = min(pieces, max(samples, 1))
    bounds = [samples * piece // pieces for piece in range(pieces + 1)]
    if threads == 1:
        for first, last in pairwise(bounds):
            run(first, last)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, bounds[:-1], bounds[1:]))
