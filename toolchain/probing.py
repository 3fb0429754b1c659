"""Inputs that no data set has, and variants of a network, which make every weight matter: what `verify` adds to images.

Images leave border pixels dark and some neurons silent or firing at every step (a gate is closed on both); a weight there could be wrong on one of two targets and
nobody would see it. Probes are seeded inputs and errors for the network as it is. Two variants go further: the same weights, thresholds, resets, leaks, delays and
operations, with constant currents added so that every couple fires at some steps of some sample, in both phases, and with the host's bias moved by less than one
step of its current so that a change by one in the last place of any host weight passes a rounding edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from toolchain import codec, fixed
from toolchain.ir import Array, Bias, Drive, Dynamics, Graph, Op, Phase, Synapse, adjoint, frozen
from toolchain.notation import sample_products
from toolchain.target import Result, get

SEED = 0x50524F42
"""Everything random here is drawn from it, so that probes are the same everywhere."""

VARIANT_STEPS = 16
"""Time steps of a variant's phases, where the network has more: enough for every couple to fire and every delay to pass."""

ROUNDS = 12
"""How often the currents of a variant are corrected by what a run showed."""

ROUNDS_WORK = 2**40
"""Products that the runs of one phase's corrections may take in all; large networks are corrected less often, but `FEWEST` times."""

FEWEST = 4
"""The least corrections of a phase."""

TURNS = 3
"""After so many rounds a neuron that still does not fire is tried in another sample."""

LATE = 2
"""The step in which a variant's late neurons get their current."""

COARSE = fixed.CURRENT_EXPONENT_MAX
"""Exponent of the coarse part of an added current; the fine part has exponent 0, so that every whole number is made exactly."""

LARGEST_PARTS = 16
"""Most coarse biases that one added current is made of: 16 reach 2^23, the largest potential."""

SMALL = 2**25
"""Products up to which the definition says what a variant does, and the simulator beyond; they are bit-exact."""

SAMPLES = 64
SAMPLES_WORK = 2**26
"""A variant has as many samples as there are probes, and up to `SAMPLES` while they take no more products than this: small networks repeat themselves."""

LARGE_WORK = 2**36
"""Fewer, but at least 2, where they would take more products than this."""

Silent = dict[str, npt.NDArray[np.bool_]]
"""By population of couples: neurons that no sample so far made fire, (*shape)."""


@dataclass(frozen=True)
class Variant:
    """One variant with the inputs and errors it is run on. `edge` is what an added current makes the first neuron of every couple population meet in the first step of
    the first sample: a potential of exactly its threshold (0), or one less (-1), and the last neuron of it minus that, where there is a minus member; `met` says by phase
    and population where that worked."""

    name: str
    graph: Graph
    inputs: Array
    errors: Array | None
    edge: int
    met: dict[tuple[str, str], bool]

    def to_text(self) -> str:
        steps = ", ".join(f"{phase.name} {phase.time_steps} steps" for phase in self.graph.phases)
        return f"variant {self.name} (currents added so that couples fire; {steps})"


def inputs(graph: Graph, count: int, silent: Silent | None = None, *, seed: int = 0) -> Array:
    """`count` probing inputs in [0, 1], (count, *input shape), of events with time last.

    The first is dark, the second at full scale; then by turns ones that push the `silent` neurons (1 where the weights on the way to them sum to
    more than 0), dense ones at odd levels, sparse ones at full scale, and dense ones at few levels.
    """
    population = graph.of_kind("input")[0]
    levels = int(graph.scale("forward", population.name)) if graph.integer else 255
    frames = (graph.phase("forward").time_steps,) * population.events
    shape = (*population.shape, *frames)
    asleep = _listed(silent or {})
    made = [np.zeros(shape), np.ones(shape)]
    for number in range(2, count):
        draw = np.random.default_rng([SEED, seed, number])
        kind = number % 4 if asleep or number % 4 else 1 + number // 4 % 3
        if kind == 0:
            made.append(_pushing(graph, silent or {}, _some(draw, asleep, number // 4), shape))
        elif kind == 1:
            made.append(np.minimum(draw.integers(0, levels + 1, shape) | 1, levels) / levels)
        elif kind == 2:
            made.append((draw.random(shape) < draw.choice([0.02, 0.1, 0.3])).astype(np.float64))
        else:
            made.append(draw.integers(0, 4, shape) / 3)
    return np.stack(made[:count]) if count else np.zeros((0, *shape))


def errors(graph: Graph, count: int, *, seed: int = 0) -> Array:
    """`count` seeded signed errors of the driven population, (count, *shape), in the model's unit: by turns of any size, of the largest size that is not
    cut, and sparse; the first is 0 where there are several."""
    shape = graph.population(codec.error_drive(graph).population).shape
    bound = codec.error_bound(graph)
    made = []
    for number in range(count):
        draw = np.random.default_rng([SEED, seed, number, 1])
        sign = draw.choice([-1.0, 1.0], shape)
        size = (draw.random(shape), np.ones(shape), (draw.random(shape) < 0.3) * 1.0)[number % 3]
        made.append(bound * sign * size * (number > 0 or count == 1))
    return np.stack(made) if made else np.zeros((0, *shape))


def silent(graph: Graph, forward: Result) -> Silent:
    """The neurons of couples that fired in no sample of a forward result."""
    return {population.name: (forward.activity[population.name] == 0).all(axis=0) for population in graph.of_kind("couple")}


def _listed(silent: Silent) -> list[tuple[str, int]]:
    """Silent neurons one by one: population and flat index."""
    return [(name, int(i)) for name, mask in silent.items() for i in np.flatnonzero(mask)]


def _some(draw: np.random.Generator, asleep: list[tuple[str, int]], turn: int) -> list[tuple[str, int]]:
    """Fewer of the silent neurons at every turn: all, a quarter, a sixteenth, at last one."""
    size = max(1, len(asleep) >> (2 * (turn - 1)))
    return [asleep[i] for i in draw.choice(len(asleep), size, replace=False)]


def _pushing(graph: Graph, silent: Silent, chosen: list[tuple[str, int]], shape: tuple[int, ...]) -> Array:
    """An input that is 1 where its way to the `chosen` neurons adds up to more than 0: the gradient of their currents through the connections alone, spikes taken
    for real numbers."""
    phase = graph.phase("forward")
    wanted = {name: np.zeros((1, *graph.population(name).shape)) for name in phase.order if graph.population(name).kind != "input"}
    for name, i in chosen:
        wanted[name].reshape(-1)[i] = 1.0
    source = graph.of_kind("input")[0]
    pull = np.zeros((1, *source.shape))
    for name in reversed(phase.order):
        if name not in wanted:
            continue
        for synapse in phase.synapses:
            if synapse.target == name and synapse.source in wanted and phase.order.index(synapse.source) < phase.order.index(name):
                wanted[synapse.source] = wanted[synapse.source] + _back(graph, synapse.ops, wanted[name], synapse.source)
            elif synapse.target == name and synapse.source == source.name:
                pull = pull + _back(graph, synapse.ops, wanted[name], source.name)
    for drive in phase.drive:
        pull = pull + _back(graph, drive.ops, wanted[drive.population], source.name)
    return np.broadcast_to((pull[0] > 0).astype(np.float64).reshape(*source.shape, *[1] * (len(shape) - len(source.shape))), shape)


def _back(graph: Graph, ops: Sequence[Op], values: Array, population: str) -> Array:
    """`values` through a connection the other way, scaled so that the largest is 1."""
    made = fixed.apply(adjoint(ops), graph.tensors, values, graph.population(population).shape, integer=False)
    largest = float(np.abs(made).max(initial=0))
    return made / largest if largest else made


def variants(graph: Graph, count: int) -> tuple[Variant, ...]:
    """Two variants of an integer graph, each with about `count` samples (more of small networks, fewer of large ones, at least 2) in at most `VARIANT_STEPS` time steps a phase."""
    steps: dict[str, int] = {phase.name: _steps(phase) for phase in graph.phases}
    short = graph.in_steps(steps)
    each = sample_products(short)
    samples = max(2, min(count, LARGE_WORK // each), min(SAMPLES, SAMPLES_WORK // each))
    return tuple(_variant(short, samples, edge) for edge in (0, -1))


def _steps(phase: Phase) -> int:
    """Enough for all biases to start as well."""
    latest = max((bias.start for several in phase.bias.values() for bias in several), default=0)
    return min(phase.time_steps, max(VARIANT_STEPS, latest + 2))


def _variant(graph: Graph, count: int, edge: int) -> Variant:
    given = inputs(graph, count, seed=1 - edge)
    wrong = errors(graph, count, seed=1 - edge) if graph.has_phase("feedback") else None
    graph = _at_rounding_edges(graph, given, edge)
    met: dict[tuple[str, str], bool] = {}
    for phase in graph.phases:
        graph = _awake(graph, phase.name, given, wrong, edge, met)
    return Variant("at-threshold" if edge == 0 else "below-threshold", graph, given, wrong, edge, met)


def _at_rounding_edges(graph: Graph, given: Array, edge: int) -> Graph:
    """The host's biases lowered by less than one step of the current, so that in one sample (the one at full scale, of neurons whose current is cut there another one)
    each neuron's exact sum lies where one less (edge 0), or one more (-1), gives another current."""
    encoded = (
        codec.encode_input(graph, codec.check_inputs(graph, given))
        if any(d.source == "input" for d in graph.phase("forward").drive)
        else None
    )
    tensors, drives = dict(graph.tensors), []
    for drive in graph.phase("forward").drive:
        if drive.source != "input" or encoded is None or drive.shift == 0:
            drives.append(drive)
            continue
        rest = host_rest(graph, drive, encoded)
        home = np.argmax(np.concatenate([rest.inside[1:], rest.inside[:1]]), axis=0)[
            None
        ]  # the first sample that is not cut; the dark one last
        at = np.take_along_axis(np.concatenate([rest.low_bits[1:], rest.low_bits[:1]]), home, axis=0)[0]
        shape = graph.population(drive.population).shape
        before = tensors[drive.bias].astype(np.int64) if drive.bias is not None else np.zeros(shape, np.int64)
        key = drive.bias or f"probe.{drive.population}.host"
        tensors[key] = frozen(before - ((at - edge % (1 << drive.shift)) % (1 << drive.shift)), np.int64)
        drives.append(msgspec.structs.replace(drive, bias=key))
    return _changed(graph, "forward", tensors, drive=tuple(drives))


class HostRest(NamedTuple):
    """What the host's rounding leaves of its exact sums, (samples, *shape): the bits that are cut off (with a half added), and where the rounded current lies inside
    13 bits by at least one, so that one more or one less is another current."""

    low_bits: npt.NDArray[np.int64]
    inside: npt.NDArray[np.bool_]


def host_rest(graph: Graph, drive: Drive, encoded: Array) -> HostRest:
    """See `fixed.host_current`, whose rounding this takes apart."""
    total = fixed.apply(drive.ops, graph.tensors, encoded, graph.population(drive.population).shape, integer=True)
    total = total if drive.bias is None else total + graph.tensors[drive.bias]
    half = 1 << (drive.shift - 1) if drive.shift else 0
    low, high = fixed.CURRENT_MANTISSA
    rounded = (total + half) >> drive.shift
    return HostRest((total + half) & ((1 << drive.shift) - 1), (rounded > low) & (rounded < high))


@dataclass
class _Current:
    """What a variant adds to one population: a `constant` current (from step `LATE` on where `late`), and a `pulse` in the first step alone."""

    constant: Array
    pulse: npt.NDArray[np.int64]
    late: npt.NDArray[np.bool_]


def _awake(graph: Graph, name: str, given: Array, wrong: Array | None, edge: int, met: dict[tuple[str, str], bool]) -> Graph:
    """The graph with currents added to the couples of phase `name`; enters in `met` which of their thresholds are met as they should.

    Every neuron has a sample of its own in which its mean current is aimed at a firing rate between 0 and 1, by what a run showed of the currents that reach it; neurons
    that fire as they should in any sample stay as they are. Forward, those whose weight into the first neuron behind them is of one sign are held down in the first
    step and start late (the other sign in the other variant), so that potentials go both ways; feedback signs are drawn.
    """
    phase = graph.phase(name)
    couples = [p for p in phase.order if graph.population(p).kind == "couple"]
    draw = np.random.default_rng([SEED, 2, -edge, len(name)])
    signs = {p: draw.choice([-1, 1], graph.population(p).shape) if phase.dynamics[p].members == "both" else 1 for p in couples}
    added = {p: _unmoved(graph, phase, p, edge) for p in couples}
    rounds = max(FEWEST, min(ROUNDS, ROUNDS_WORK // (len(given) * sample_products(graph))))
    for number in range(rounds):
        forward, result = _run(_with_currents(graph, name, added), name, given, wrong)
        fine = True
        for p in couples:
            wanted = _as_wanted(graph, forward, result, p)
            fine &= bool(wanted.all())
            aim = signs[p] * _aim(phase.dynamics[p], _useful_steps(phase, p), draw, wanted.shape)
            change = aim - _mean_current(graph, forward, result, p, number // TURNS)
            acting = np.where(added[p].late, phase.time_steps / max(1, phase.time_steps - LATE), 1)
            added[p].constant = np.where(wanted, added[p].constant, added[p].constant + change * acting)
        if fine:
            break
    return _with_anchors(graph, name, added, given, wrong, edge, met, rounds)


def _unmoved(graph: Graph, phase: Phase, p: str, edge: int) -> _Current:
    """No current but what holds the late neurons down."""
    shape = graph.population(p).shape
    late = np.zeros(shape, np.bool_)
    behind = sorted(
        (s for s in phase.synapses if s.source == p and s.target != p), key=lambda s: graph.population(s.target).kind != "readout"
    )
    if phase.name == "forward" and phase.time_steps > LATE and behind:
        first = np.zeros((1, *graph.population(behind[0].target).shape))
        first.reshape(-1)[0] = 1
        pull = _back(graph, behind[0].ops, first, p)[0]
        late = pull < 0 if edge == 0 else pull > 0
        late.reshape(-1)[0] = False  # it meets the threshold in the first step
    return _Current(np.zeros(shape), late * -np.int64(phase.dynamics[p].threshold), late)


def steps_in_time(phase: Phase, synapse: Synapse) -> int:
    """How many of the source's steps send what arrives by the target's last step."""
    start, period = phase.timing.start, phase.timing.period
    ticks = start.get(synapse.target, 0) - start.get(synapse.source, 0) - synapse.delay + (phase.time_steps - 1) * period
    return min(phase.time_steps, max(0, ticks // period + 1))


def _useful_steps(phase: Phase, p: str) -> int:
    """The steps whose spikes all synapses of a population deliver in time, but for synapses that deliver none at all."""
    found = [steps for synapse in phase.synapses if synapse.source == p and (steps := steps_in_time(phase, synapse)) > 0]
    return min(found, default=phase.time_steps)


def _as_wanted(graph: Graph, forward: Result, result: Result, p: str) -> npt.NDArray[np.bool_]:
    """Neurons that fire while their gate is open, in some sample and in time to be heard; in the forward phase those that open it (one step opens none: then any that fire)."""
    opened = codec.mask(graph, forward, p)
    if graph.phase("forward").time_steps == 1:
        opened = forward.counts[p] > 0
    sent = (result.history[p].spikes[: _useful_steps(graph.phase(result.phase), p)] != 0).any(axis=0)
    found: npt.NDArray[np.bool_] = (opened & sent).any(axis=0)
    return found


def _aim(dynamics: Dynamics, time_steps: int, draw: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """A mean current at which a couple fires at some steps and not at all: between the steps' share of what a spike takes and what reaches the threshold a few steps in."""
    share = draw.uniform(0.3, 0.8, shape)
    window = min(time_steps, 1 / (1 - dynamics.leak)) if dynamics.leak < 1 else time_steps
    late = dynamics.threshold / (1 + share * (window - 1))
    return np.maximum(share * dynamics.reset + (1 - dynamics.leak) * dynamics.threshold, late)


def _mean_current(graph: Graph, forward: Result, result: Result, p: str, turn: int) -> Array:
    """The mean current of every neuron in the sample that is its own (another one every `turn`), by its history: what it holds, took and gave away."""
    phase = graph.phase(result.phase)
    history, dynamics = result.history[p], phase.dynamics[p]
    kept = history.potentials.astype(np.float64).sum(axis=0) / dynamics.leak - history.potentials[:-1].sum(axis=0)
    current = (kept + dynamics.reset * history.spikes.sum(axis=0, dtype=np.int64)) / phase.time_steps
    samples, neurons = len(current), prod(current.shape[1:])
    own = (np.arange(neurons) + 5 * turn) % samples
    if result.phase == "feedback":  # a sample in which its gate is open, where there is one
        opened = np.roll(codec.mask(graph, forward, p).reshape(samples, neurons), -turn, axis=0)
        own = np.where(opened.any(axis=0), (opened.argmax(axis=0) + turn) % samples, own)
    return np.asarray(current.reshape(samples, neurons)[own, np.arange(neurons)].reshape(current.shape[1:]))


def _with_anchors(
    graph: Graph,
    name: str,
    added: dict[str, _Current],
    given: Array,
    wrong: Array | None,
    edge: int,
    met: dict[tuple[str, str], bool],
    rounds: int,
) -> Graph:
    """`added`, with a pulse for the first neuron of every couple population: in the first sample it meets its threshold exactly, or misses it by one. Where there is a minus
    member, the last neuron meets that one's, or misses it."""
    sought: dict[tuple[str, int], int] = {}
    for p in added:
        dynamics = graph.phase(name).dynamics[p]
        sought[p, 0] = int(dynamics.threshold) + edge
        if dynamics.members == "both" and prod(graph.population(p).shape) > 1:
            sought[p, -1] = -sought[p, 0]
    for _ in range(min(2 + len(added), rounds)):
        made = _with_currents(graph, name, added)
        totals = first_totals(made, name, given[:1], None if wrong is None else wrong[:1])
        off = {(p, neuron): total - int(totals[p].reshape(-1)[neuron]) for (p, neuron), total in sought.items()}
        met |= {(name, p): not any(by for (of, _), by in off.items() if of == p) for p in added}
        if not any(off.values()):
            return made
        for (p, neuron), by in off.items():
            added[p].pulse.reshape(-1)[neuron] += by
    return made


def first_totals(graph: Graph, name: str, given: Array, wrong: Array | None) -> dict[str, Array]:
    """By couple population of a phase: the potential, (samples, *shape), that is compared with the threshold in the first step.

    Read where nothing leaks, since a leak's rounding hides it. Where leaks of other populations come into play (pipelined timing, in which skips arrive earlier) each
    population is read in a run of its own.
    """
    phase = graph.phase(name)
    couples = [p for p in phase.order if graph.population(p).kind == "couple"]
    leaky = [p for p in couples if phase.dynamics[p].leak < 1]
    groups = [[p] for p in couples] if leaky and phase.timing.mode == "pipelined" else [couples]
    found: dict[str, Array] = {}
    for group in groups:
        tight = {p: msgspec.structs.replace(phase.dynamics[p], leak=1.0) for p in group}
        _, result = _run(_changed(graph, name, graph.tensors, dynamics={**phase.dynamics, **tight}), name, given, wrong)
        for p in group:
            steps = result.history[p]
            found[p] = steps.potentials[0].astype(np.int64) + phase.dynamics[p].reset * steps.spikes[0].astype(np.int64)
    return found


def _run(graph: Graph, name: str, given: Array, wrong: Array | None) -> tuple[Result, Result]:
    """The forward result, and that of phase `name`, of the simulator."""
    work = len(given) * sample_products(graph)
    # the simulator lays a graph out before it runs it, which takes longer than a small one runs in NumPy
    found = replace(get("reference"), trace=True) if work <= SMALL else replace(get("sim"), device="cpu", trace=True)  # type: ignore[type-var]  # dataclasses
    with found.compile(graph if name == "feedback" else msgspec.structs.replace(graph, phases=(graph.phase("forward"),))) as run:
        forward = run.run(given)
        return forward, forward if name == "forward" or wrong is None else run.run(wrong, phase="feedback")


def _with_currents(graph: Graph, name: str, added: dict[str, _Current]) -> Graph:
    phase, tensors = graph.phase(name), dict(graph.tensors)
    bias = dict(phase.bias)
    for p, current in added.items():
        constant = np.rint(current.constant).astype(np.int64)
        starts = (
            (0, np.where(current.late, 0, constant) + current.pulse),
            (1, -current.pulse),
            (LATE, np.where(current.late, constant, 0)),
        )
        for start, values in starts:
            for i, (mantissa, exponent) in enumerate(_parts(values)):
                key = f"probe.{name}.{p}.{start}.{i}"
                tensors[key] = frozen(mantissa, np.int16)
                bias[p] = (*bias.get(p, ()), Bias(key, exponent, start))
    return _changed(graph, name, tensors, bias=bias)


def _parts(current: Array) -> list[tuple[Array, int]]:
    """Mantissas and exponents whose biases add up to `current`, up to what `LARGEST_PARTS` reach; none where it is 0."""
    fine, coarse = current & ((1 << COARSE) - 1), current >> COARSE
    parts = [(fine, 0)] if fine.any() else []
    while coarse.any() and len(parts) <= LARGEST_PARTS:
        part = np.clip(coarse, *fixed.CURRENT_MANTISSA)
        parts.append((part, COARSE))
        coarse = coarse - part
    return parts


def _changed(graph: Graph, name: str, tensors: dict[str, Array], **fields: Any) -> Graph:
    """The graph with other tensors, and other fields of phase `name`."""
    changed = msgspec.structs.replace(graph.phase(name), **fields)
    return msgspec.structs.replace(graph, phases=tuple(changed if p.name == name else p for p in graph.phases), tensors=tensors)
