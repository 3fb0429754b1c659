"""How far currents and membrane potentials can go: interval arithmetic on a graph, floats or integers alike, neuron by neuron.

A spike lies in {0, 1} (plus members) or {-1, 0, 1} (both), an input in [0, its scale]. What arrives is bounded by the positive and the negative weights apart, at every
neuron of its own (borders of padded convolutions see fewer). A membrane between its steps is then bounded by what arrives in the worst case at every step:

    upwards      a plus member fires at the threshold Vth and loses A: u <= Vth + J and, where J > A, T (J - A) more; and u <= T J, with a leak J sum of leak^k
    downwards    nothing stops a silent neuron, and one that has just fired may start at Vth - A: u >= min(0, Vth - A) - T |J|
    both members either way as upwards, from Vth or, where that is more, from the A - Vth that a spike of the other sign leaves

They hold before a neuron fires and behind it. For integers what the host rounds and what its registers hold is counted in: an error is bounded by its register, in float
graphs, which have none, by one spike's amplitude. The bounds hold for every input; calibration (`--calibrate`) stands beside them with what real inputs did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from toolchain import fixed
from toolchain.fixed import CURRENT_MANTISSA
from toolchain.ir import Array, Drive, Graph, Op, Phase, Shape, Synapse, leak_sum, weight_of

LARGEST = 1e100
"""Values of a loop of relays beyond this are as good as any larger one."""


@dataclass(frozen=True)
class Range:
    """Lowest and highest value of each neuron of a population, (*shape) each, in graph units."""

    low: Array
    high: Array

    @property
    def largest(self) -> float:
        return float(max(self.high.max(initial=0), -self.low.min(initial=0), 0))


@dataclass(frozen=True)
class Ranges:
    """One phase: what arrives at each population in a step (synapses, biases and drives), and how far its potential can go before it fires."""

    arriving: dict[str, Range]
    potential: dict[str, Range]


def ranges(graph: Graph, phase: Phase, injected: Mapping[str, Range] | None = None) -> Ranges:
    """The bounds of one phase. `injected` bounds the drives' currents by population; those of the input are worked out where they are not given."""
    currents = dict(injected or {})
    for drive in phase.drive:
        if drive.population not in currents:
            currents[drive.population] = drive_range(graph, phase, drive)
    emitted = {name: _emitted(graph, phase, name) for name in phase.order}
    arriving: dict[str, Range] = {}
    for _ in range(phase.time_steps + 1):  # a relay that feeds an earlier one is bounded by as many turns as there are steps
        before = {name: r for name, r in emitted.items() if graph.population(name).kind == "linear"}
        for name in phase.order:
            if graph.population(name).kind == "input":
                continue
            arriving[name] = _arriving(graph, phase, name, emitted, currents)
            if graph.population(name).kind == "linear":
                emitted[name] = arriving[name]
        if all(_same(emitted[name], old) for name, old in before.items()) or _overflown(emitted):
            break
    return Ranges(arriving, {name: _potential(phase, name, found) for name, found in arriving.items()})


def drive_range(graph: Graph, phase: Phase, drive: Drive) -> Range:
    """What a drive injects, in graph units: any input in [0, 1]; an error of one spike's amplitude either way (of relays: the largest couple's)."""
    shape = graph.population(drive.population).shape
    if drive.source == "error":
        couples = [d.reset for d in phase.dynamics.values() if d.members == "both"]
        driven = phase.dynamics[drive.population]
        bound = np.full(shape, float(driven.reset if driven.members == "both" else max(couples, default=0)))
        register = np.full(shape, 2.0**drive.exponent)
        return Range(CURRENT_MANTISSA[0] * register, CURRENT_MANTISSA[1] * register) if graph.integer else Range(-bound, bound)
    (source,) = graph.of_kind("input")
    ones = np.ones((1, *source.shape)) * (graph.scale("forward", source.name) if graph.integer else 1.0)
    high = _signed(graph, drive.ops, ones, shape, 1)
    low = _signed(graph, drive.ops, ones, shape, -1)
    bias = np.zeros(shape) if drive.bias is None else graph.tensors[drive.bias].astype(np.float64)
    if not graph.integer:
        return Range(low + bias, high + bias)
    step = 2.0**drive.exponent
    ends = ((total + bias) / 2.0**drive.shift for total in (low, high))
    return Range(*(np.clip(np.floor(end + 0.5), *CURRENT_MANTISSA) * step for end in ends))


def _emitted(graph: Graph, phase: Phase, name: str) -> Range:
    population = graph.population(name)
    ones = np.ones(population.shape)
    if population.kind == "input":
        return Range(0 * ones, ones * (graph.scale("forward", name) if graph.integer else 1.0))
    members = phase.dynamics[name].members
    return Range(-ones if members == "both" else 0 * ones, ones if members in ("plus", "both") else 0 * ones)


def _arriving(graph: Graph, phase: Phase, name: str, emitted: Mapping[str, Range], injected: Mapping[str, Range]) -> Range:
    shape = graph.population(name).shape
    low, high = np.zeros(shape), np.zeros(shape)
    for synapse in phase.synapses:
        if synapse.target == name:
            made = arrival(graph, synapse, emitted[synapse.source])
            low, high = low + made.low, high + made.high
    for bias in phase.bias.get(name, ()) if graph.population(name).kind != "readout" else ():
        values = graph.tensors[bias.tensor].astype(np.float64) * 2.0**bias.exponent
        late = bias.start > 0
        low, high = low + (np.minimum(values, 0) if late else values), high + (np.maximum(values, 0) if late else values)
    if name in injected:
        low, high = low + injected[name].low, high + injected[name].high
    return Range(low, high)


def arrival(graph: Graph, synapse: Synapse, source: Range) -> Range:
    """The current that a synapse delivers where its source's values lie in `source`."""
    shape = graph.population(synapse.target).shape
    low, high = source.low[None].astype(np.float64), source.high[None].astype(np.float64)
    ups, downs = _signed(graph, synapse.ops, high, shape, 1), _signed(graph, synapse.ops, high, shape, -1)
    if not low.any():
        return Range(downs, ups)
    return Range(downs + _signed(graph, synapse.ops, low, shape, 1), ups + _signed(graph, synapse.ops, low, shape, -1))


def _signed(graph: Graph, ops: Sequence[Op], values: Array, shape: Shape, sign: int) -> Array:
    """The operations with their positive (or negative) weights only, on values of one sign; exponents multiplied in."""
    tensors = {}
    for op in ops:
        name = weight_of(op)
        if name is not None:
            weight = graph.tensors[name].astype(np.float64) * 2.0 ** getattr(op, "exponent", 0)
            tensors[name] = np.maximum(weight, 0) if sign > 0 else np.minimum(weight, 0)
    if not tensors and sign < 0:
        return np.zeros(shape)
    made: Array = fixed.apply(fixed.summed(ops) if graph.integer else ops, tensors, values, shape, integer=False)[0]
    return made


def _potential(phase: Phase, name: str, arriving: Range) -> Range:
    dynamics = phase.dynamics[name]
    steps = leak_sum(dynamics.leak, phase.time_steps)
    if dynamics.members == "graded":
        return arriving
    up, down = np.maximum(arriving.high, 0), np.maximum(-arriving.low, 0)
    if dynamics.members == "none":
        return Range(-down * steps, up * steps)
    threshold, reset = dynamics.threshold, dynamics.reset
    left = max(reset - threshold, 0)  # behind a spike, beyond rest
    if dynamics.members == "plus":
        return Range(-(left + down * steps), _fired(up, threshold, reset, 0, steps))
    return Range(-_fired(down, threshold, reset, left, steps), _fired(up, threshold, reset, left, steps))


def _fired(current: Array, threshold: float, reset: float, left: float, steps: float) -> Array:
    """The highest potential, before it fires, of a neuron that gets at most `current` a step and may start at `left`."""
    made: Array = np.minimum(left + current * steps, max(threshold, left) + current + np.maximum(current - reset, 0) * steps)
    return made


def _overflown(emitted: Mapping[str, Range]) -> bool:
    """Whether a loop of relays has gone beyond any number that is needed."""
    return any(found.largest > LARGEST for found in emitted.values())


def _same(a: Range, b: Range) -> bool:
    return bool(np.array_equal(a.low, b.low) and np.array_equal(a.high, b.high))
