"""Whole phases of whole numbers in C (`core.c`): its structs, and the call. Who lays them out proves every bound (`targets.sim_native`); no torch here."""

from __future__ import annotations

import ctypes
from functools import cache

from toolchain import native
from toolchain.errors import ToolchainError

INSTRUCTION_SETS = (*native.INSTRUCTION_SETS, "AVX-512 VNNI")
"""What the core is compiled for."""

INPUT, PLUS, BOTH, READOUT, RELAY = range(5)
"""Kinds of populations."""

WINDOW, MATRIX, DIAGONAL = range(3)
"""Forms of connections."""

ABREAST = 6
"""Target places whose products are summed at once."""

LANES = 32
"""Channels are padded to a multiple of this: a vector of 16 bits each."""

_int, _long, _address = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class DenseClass(ctypes.Structure):
    """Targets whose windows look alike; see `core.h`. Pointers are addresses, here and below."""

    _fields_ = (
        ("targets", _int),
        ("taps", _int),
        ("target", _address),
        ("base", _address),
        ("tap", _address),
        ("slot", _address),
        ("start", _address),
    )


class SynapsePlan(ctypes.Structure):
    """A connection: by values, or by rows and by products; see `core.h`."""

    _fields_ = (
        ("source", _int),
        ("target", _int),
        ("delay", _int),
        ("form", _int),
        ("exponent", _int),
        ("wide", _int),
        ("still", _int),
        ("lanes", _int),
        ("slab", _long),
        ("row_to", _long),
        ("row_from", _long),
        ("begin", _address),
        ("patches", _address),
        ("weight", _address),
        ("targets", _int),
        ("take_begin", _address),
        ("takes", _address),
        ("rows", _address),
        ("row_bytes", _long),
        ("dense_from", _long),
        ("dense_classes", _int),
        ("quads", _int),
        ("slots", _int),
        ("background", _int),
        ("image_size", _long),
        ("image_place", _address),
        ("dense", _address),
        ("packed", _address),
        ("mask", _address),
        ("taken", _address),
    )


class PopulationPlan(ctypes.Structure):
    """A population, what is injected into it, and where its results go; see `core.h`."""

    _fields_ = (
        ("kind", _int),
        ("wide", _int),
        ("channels", _int),
        ("places", _int),
        ("lanes", _int),
        ("start", _int),
        ("slots", _int),
        ("biases", _int),
        ("threshold", _int),
        ("reset", _int),
        ("keep", _int),
        ("frames", _int),
        ("first_in", _int),
        ("last_in", _int),
        ("neurons", _long),
        ("size", _long),
        ("leak", ctypes.c_double),
        ("values", _address),
        ("drive", _address),
        ("bias", _address),
        ("bias_start", _address),
        ("counts", _address),
        ("activity", _address),
        ("traces", _address),
        ("potentials", _address),
        ("saturations", _address),
        ("history_spikes", _address),
        ("history_potentials", _address),
    )


class HostPlan(ctypes.Structure):
    """A current that the host computes once a sample; see `core.h`."""

    _fields_ = (
        ("way", SynapsePlan),
        ("channels", _int),
        ("places", _int),
        ("shift", _int),
        ("exponent", _int),
        ("values", _address),
        ("bias", _address),
    )


class PhasePlan(ctypes.Structure):
    """A phase of some samples; see `core.h`."""

    _fields_ = (
        ("samples", _long),
        ("time_steps", _long),
        ("period", _long),
        ("ticks", _long),
        ("n_populations", _int),
        ("n_synapses", _int),
        ("n_hosts", _int),
        ("populations", ctypes.POINTER(PopulationPlan)),
        ("synapses", ctypes.POINTER(SynapsePlan)),
        ("hosts", ctypes.POINTER(HostPlan)),
    )


EDITION = 1
"""Of what the structs' fields mean: one more whenever a field changes its meaning; core.h has it too."""

STRUCTS = (PhasePlan, PopulationPlan, SynapsePlan, HostPlan, DenseClass)


def _core() -> ctypes.CDLL | str:
    """The library with its functions of this module described, or why there is none."""
    return native.missing() or _described(native.loaded())


@cache
def _described(library: ctypes.CDLL) -> ctypes.CDLL | str:
    try:
        sizes = [library.toolchain_core_size(which) for which in range(len(STRUCTS) + 1)]
        library.toolchain_core_widest.restype = library.toolchain_phase.restype = _int
        library.toolchain_phase.argtypes = (ctypes.POINTER(PhasePlan), _long, _long, _int)
    except AttributeError:
        sizes = []
    if sizes != [*(ctypes.sizeof(part) for part in STRUCTS), EDITION]:
        return f"the native kernel was built from other sources than these: {native.remedy()}"
    return library


def missing() -> str | None:
    """What the core lacks here, and the way to get it; None where it can run."""
    found = _core()
    return found if isinstance(found, str) else None


def _loaded() -> ctypes.CDLL:
    found = _core()
    if isinstance(found, str):
        raise ToolchainError(found)
    return found


def widest() -> int:
    """The best of INSTRUCTION_SETS that both this machine and the core have, by its place there; ToolchainError without the library."""
    return int(_loaded().toolchain_core_widest())


def run(plan: PhasePlan, first: int, last: int, *, instructions: int) -> None:
    """All ticks of the samples from `first` to before `last`; other threads run meanwhile. ToolchainError where memory runs out."""
    if not 0 <= first <= last <= plan.samples:
        raise ToolchainError(f"samples {first} to {last} of {plan.samples}: give a span of them")
    if _loaded().toolchain_phase(ctypes.byref(plan), first, last, min(instructions, widest())):
        raise ToolchainError("there is not enough memory to simulate one sample: close other programs, or use a smaller network")
