"""The arithmetic of the model step: Loihi's integers, and the same rule in floats. Nothing else in the project adds, shifts or rounds spikes.

Sources: Loihi's decay and 24-bit membrane as published in Lava's LIF process (bit-accurate model); the couple's rule is SPIDE's ternary neuron
(Xiao et al., Neural Networks 2023) with reset by subtraction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil, log2
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from toolchain.errors import GraphError
from toolchain.ir import (
    DECAY_ONE,
    EXPONENT_LIMIT,
    MANTISSA_LIMIT,
    POTENTIAL_LIMIT,
    Array,
    Dense,
    Dynamics,
    Graph,
    Identity,
    Op,
    Scale,
    Synapse,
)
from toolchain.ir import leak_sum as leak_sum

CURRENT_MANTISSA = (-MANTISSA_LIMIT, MANTISSA_LIMIT - 1)
"""Range of a bias mantissa: 13 bit signed."""

CURRENT_EXPONENT_MAX = EXPONENT_LIMIT
"""A bias exponent has 3 bits."""

EXACT_FLOAT32 = 2**24
"""Whole numbers below this are exact in float32, whatever order they are added in."""

EXACT_FLOAT64 = 2**53
"""The same for float64."""

WEIGHT_EXPONENT_MAX = EXPONENT_LIMIT
"""A weight exponent is 4 bit signed; negative ones floor and are never used."""


class Step(NamedTuple):
    """One model step of a population: potential after reset and leak, spikes in {-1, 0, 1}, and which neurons saturated."""

    potential: Array
    spikes: npt.NDArray[np.int8]
    saturated: npt.NDArray[np.bool_]


def step(potential: Array, current: Array, dynamics: Dynamics, *, integer: bool) -> Step:
    """Advance a population by one model step (see `ir`): add, clamp, fire, reset, leak. Shapes are free but equal.

    `current` is the sum of everything that arrived, bias and drive, in a wide type (int64 or float64).
    """
    if dynamics.members == "none":
        total = leak(potential, dynamics.leak, integer=integer) + current
        total, saturated = clamp(total) if integer else (total, np.zeros(total.shape, np.bool_))
        return Step(total, np.zeros(total.shape, np.int8), saturated)
    total = potential + current
    total, saturated = clamp(total) if integer else (total, np.zeros(total.shape, np.bool_))
    spikes = (total >= dynamics.threshold).astype(np.int8)
    if dynamics.members == "both":
        spikes -= (total <= -dynamics.threshold).astype(np.int8)
    return Step(leak(total - dynamics.reset * spikes.astype(total.dtype), dynamics.leak, integer=integer), spikes, saturated)


def clamp(total: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
    """`total` held to 24 bit signed, and which entries were outside."""
    saturated = (total > POTENTIAL_LIMIT) | (total < -POTENTIAL_LIMIT)
    return np.clip(total, -POTENTIAL_LIMIT, POTENTIAL_LIMIT), saturated


def leak(potential: Array, factor: float, *, integer: bool) -> Array:
    """Floats: factor * u. Integers: sign(u) * ((|u| * (4096 - decay)) >> 12), which rounds towards zero."""
    if factor == 1:
        return potential
    if not integer:
        return potential * factor
    keep = DECAY_ONE - decay(factor)
    leaked: Array = np.sign(potential) * ((np.abs(potential) * keep) >> 12)
    return leaked


def decay(factor: float) -> int:
    """The 12-bit decay nearest to a leak: leak = (4096 - decay) / 4096."""
    return DECAY_ONE - max(1, round(factor * DECAY_ONE))


def nearest_leak(factor: float) -> float:
    """The representable leak nearest to `factor`."""
    return (DECAY_ONE - decay(factor)) / DECAY_ONE


def apply(ops: Iterable[Op], tensors: Mapping[str, Array], values: Array, shape: tuple[int, ...], *, integer: bool) -> Array:
    """Apply linear operations left to right to `values` (batch, *source) and return (batch, *shape), int64 or float64.

    New operations are added here and in `ir.output_shape`; this is their definition, not their fastest form.
    """
    wide = np.int64 if integer else np.float64
    result = values.astype(wide)
    for op in ops:
        if isinstance(op, Dense):
            weight = tensors[op.weight].astype(wide)
            result = result.reshape(len(result), -1) @ (weight if op.transpose else weight.T)
            result = np.left_shift(result, op.exponent) if integer else result
        elif isinstance(op, Scale):
            result = result * op.factor
        elif not isinstance(op, Identity):
            raise GraphError(f"operation {type(op).__name__} has no arithmetic yet: fully connected networks have")
    return result.reshape(len(values), *shape)


def largest_product(graph: Graph, synapse: Synapse) -> tuple[int, int]:
    """For an integer graph: the largest partial sum of mantissas a product of this synapse can meet, in whatever order, and the largest current it delivers.

    A float type holds all partial sums exactly while the first is below `EXACT_FLOAT32` or `EXACT_FLOAT64`.
    """
    source = graph.population(synapse.source)
    partial = delivered = int(graph.scale("forward", source.name)) if source.kind == "input" else 1
    for op in synapse.ops:
        if isinstance(op, Dense):
            magnitude = np.abs(graph.tensors[op.weight].astype(np.int64)).sum(axis=0 if op.transpose else 1)
            partial = delivered * int(magnitude.max(initial=0))
            delivered = partial << op.exponent
    return partial, delivered


class Mantissas(NamedTuple):
    """Integers with a shared exponent: value = mantissa << exponent; `clipped` counts values outside the range."""

    mantissa: npt.NDArray[np.int64]
    exponent: int
    clipped: int


def mantissas(values: Array, exponent: int, low: int, high: int) -> Mantissas:
    """Round float `values` (in graph units) to the nearest multiple of 2^exponent within [low, high] mantissas; ties go to even."""
    rounded = np.rint(values / 2.0**exponent)
    clipped = int(((rounded < low) | (rounded > high)).sum())
    return Mantissas(np.clip(rounded, low, high).astype(np.int64), exponent, clipped)


def exponent_for(bound: float, high: float, largest: int) -> int:
    """The smallest exponent e in 0..largest with bound <= high * 2^e (`largest` where none suffices)."""
    if bound <= high:
        return 0
    return min(largest, ceil(log2(bound / high)))


def weight_range(bits: int) -> tuple[int, int]:
    """Mantissas of a signed weight of `bits` bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def injected(values: Array, exponent: int) -> Mantissas:
    """An injected current: float `values` in graph units as 13-bit mantissas at `exponent`."""
    return mantissas(values, exponent, *CURRENT_MANTISSA)


def host_current(total: npt.NDArray[np.int64], shift: int, exponent: int) -> Mantissas:
    """Round an exact host sum that carries `shift` extra bits to a 13-bit mantissa (half up), saturating."""
    rounded = (total + (1 << (shift - 1) if shift else 0)) >> shift
    low, high = CURRENT_MANTISSA
    clipped = int(((rounded < low) | (rounded > high)).sum())
    return Mantissas(np.clip(rounded, low, high), exponent, clipped)
