"""How a population's whole numbers are written in SANA-FE's Loihi neuron, so that it computes the model step exactly.

That neuron (model `leaky_integrate_fire` of SANA-FE 2.2.9) keeps a double v and at every time step

1. v <- v * leak_decay, cut towards zero to a multiple of 1/64
2. v <- v + bias + what arrived
3. where v > threshold it fires, and v <- v - threshold (reset mode soft)

while the model step fires at u >= threshold and subtracts a reset that may be another number. Attributes are read as single precision. So:

without leak   v = (u + reset - threshold + 1/2) / 32: then v > reset / 32 exactly where u >= threshold, and subtracting that same number is the reset. The
               constant is the neuron's potential at the start. Everything is a multiple of 1/64, so the cut changes nothing, at any |u| < 2^29.
with leak      v = u / 64, so the cut is the chip's own rounding of the leak (`fixed.leak`). A constant would leak too, hence the reset must be the threshold; the
               largest single below it serves as threshold, which leaves v too high by so little that the cut takes it away (`_survives` has the bound).

A readout leaks before it adds, as here, and never fires. Couples leak at the end of a step and here at the start of the next: what is recorded is leaked
once more on reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np

from toolchain.fixed import decay
from toolchain.ir import DECAY_ONE, Dynamics

NEVER = 2.0**40
"""A threshold that nothing reaches."""

LARGEST_SUM = 2**29
"""The cut goes through a 32-bit integer of 64 v = 2 u."""

COARSE = 64
"""Leaks that are multiples of 1/64 are exact up to thresholds of 2^18."""

INPUT_THRESHOLD = 0.5
"""Input neurons fire on a bias of 1, and start from 0 again."""


@dataclass(frozen=True)
class Numbers:
    """`v = (u + offset) * scale`; `threshold` and `leak` in SANA-FE's own terms."""

    scale: float
    offset: float
    threshold: float
    leak: float


IDLE = Numbers(1 / 32, 0.0, NEVER, 1.0)
"""Neurons that nothing reaches, as the minus members of couples in the forward phase: they rest at 0, and are charged as resting."""


def numbers(dynamics: Dynamics) -> Numbers:
    """The numbers of a population that `problem` finds no fault with."""
    leaks = dynamics.leak != 1
    if dynamics.members == "none":
        return Numbers(1 / 64 if leaks else 1 / 32, 0.0, NEVER, dynamics.leak)
    if leaks:
        return Numbers(1 / 64, 0.0, _below(int(dynamics.reset)) / 64, dynamics.leak)
    return Numbers(1 / 32, dynamics.reset - dynamics.threshold + 0.5, dynamics.reset / 32, 1.0)


def problem(name: str, dynamics: Dynamics) -> str | None:
    """Why a population of couples cannot be exact with these dynamics, if so."""
    if dynamics.leak == 1 or dynamics.members == "none":
        return None
    where = f"population '{name}' leaks ({dynamics.leak:g})"
    if dynamics.members == "both":
        return (
            f"{where} and fires with both members: as pairs of binary neurons leaky couples are not exact, so run the forward phase alone (deploy, or verify --phase "
            "forward), or another target"
        )
    if dynamics.threshold != dynamics.reset:
        return (
            f"{where} with threshold {dynamics.threshold} and reset {dynamics.reset}: SANA-FE's neuron subtracts its threshold, and only without leak can another "
            "reset be written; train with u_rest 0, or run another target"
        )
    if not _survives(int(dynamics.reset), dynamics.leak):
        return (
            f"{where} with threshold {dynamics.threshold}: SANA-FE reads thresholds in single precision, too coarse for so fine a leak to be exact; train with leak "
            f"{round(dynamics.leak * COARSE) / COARSE:g} (a multiple of 1/{COARSE}), or run another target"
        )
    return None


def _below(threshold: int) -> float:
    """The largest single-precision number below `threshold`."""
    return float(np.nextafter(np.float32(threshold), np.float32(0)))


def _survives(threshold: int, leak: float) -> bool:
    """Whether what is left of `threshold` after a reset is cut away again by the leak.

    With k = 4096 leak, (u - A) k is a multiple of g = gcd(k, 4096), so it lies g or more below the next multiple of 4096, and (u - A + d) k / 4096 is cut to the
    same whole number while d k < g. Doubles round by less than the rest of that gap.
    """
    keep = DECAY_ONE - decay(leak)
    return (threshold - _below(threshold)) * keep < gcd(keep, DECAY_ONE)
