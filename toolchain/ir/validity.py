"""What makes a graph valid: one function, whose messages name the population or synapse and the fix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, prod

import numpy as np

from toolchain.errors import GraphError
from toolchain.ir.operations import adjoint, largest_sum, shapes_along, tensor_names, weight_of
from toolchain.ir.parts import (
    DECAY_ONE,
    EXPONENT_LIMIT,
    LARGEST_STEPS,
    MANTISSA_LIMIT,
    MOST_AXES,
    MOST_NEURONS,
    POTENTIAL_LIMIT,
    SHIFT_LIMIT,
    Array,
    Drive,
    Graph,
    Op,
    Phase,
    Scale,
    Shape,
    Synapse,
)
from toolchain.ir.placement import verify_placement

EXACT_ON_HOST = 2**53
"""The host adds whole numbers in float64, which is exact below this."""

LARGEST_FLOAT = 1e12
"""Weights, thresholds, resets and factors of float graphs stay below: no sum of theirs then comes near the end of float32, so a graph means the same in float32 and in float64."""

SMALLEST_THRESHOLD = 1e-12
"""Thresholds stay above: no sum of denormal numbers then comes near one, so spikes are the same on processors that flush those to 0."""


def verify(graph: Graph) -> None:
    """Raise GraphError, naming the population or synapse and the fix, unless the graph is valid."""
    names = [population.name for population in graph.populations]
    for name in (graph.provenance.model, *names, *graph.tensors):
        _require(name.isprintable(), f"the name {name!r} has characters that do not print: give the network, population or tensor another")
    _require(len(set(names)) == len(names), f"population names repeat: {', '.join(names)}; give each its own")
    for population in graph.populations:
        _require(
            1 <= len(population.shape) <= MOST_AXES and all(n >= 1 for n in population.shape),
            f"population '{population.name}' has shape {population.shape}: give 1 to {MOST_AXES} axes, every one of at least 1 neuron",
        )
        _require(population.kind == "input" or not population.events, f"population '{population.name}' has events: only inputs have")
    neurons = sum(prod(population.shape) for population in graph.populations)
    _require(neurons <= MOST_NEURONS, f"the graph has {neurons:,} neurons, more than {MOST_NEURONS:,}: make its populations smaller")
    for name, tensor in graph.tensors.items():
        _require(bool(np.isfinite(tensor).all()), f"tensor '{name}' holds NaN or infinite values: retrain, or restore the checkpoint")
        _verify_magnitude(name, tensor)
    phases = [phase.name for phase in graph.phases]
    _require(
        len(set(phases)) == len(phases) and "forward" in phases,
        f"a graph needs one forward phase and at most one feedback phase, not {phases}",
    )
    _require(len(graph.of_kind("readout")) == 1, f"a graph needs one readout, not {len(graph.of_kind('readout'))}")
    _require(bool(graph.of_kind("couple")), "a graph needs at least one population of couples")
    for phase in graph.phases:
        _verify_phase(graph, phase)
    _verify_forward(graph, graph.phase("forward"))
    _verify_scales(graph)
    verify_placement(graph)


def _verify_magnitude(name: str, tensor: Array) -> None:
    """Floats only: integers have the bounds of the chip."""
    if not np.issubdtype(tensor.dtype, np.floating):
        return
    largest = float(np.abs(tensor).max(initial=0))
    _require(
        largest <= LARGEST_FLOAT,
        f"tensor '{name}' reaches {largest:.3g}, and sums of values beyond {LARGEST_FLOAT:g} leave float32: train again with a lower learning rate, or restore the checkpoint",
    )


def _verify_forward(graph: Graph, forward: Phase) -> None:
    readout = graph.of_kind("readout")[0].name
    into = [synapse for synapse in forward.synapses if synapse.target == readout]
    _require(len(into) == 1, f"readout '{readout}' has {len(into)} connections in the forward phase: give it one")
    for population in graph.populations:
        takes_part = population.kind == "input" or population.name in forward.order
        _require(takes_part, f"population '{population.name}' takes no part in the forward phase: add it to the order, or remove it")
    for synapse in forward.synapses:
        where = f"synapse '{synapse.source}' -> '{synapse.target}' in the forward phase"
        _require(synapse.gate is None, f"{where} is gated: masks exist after the forward phase only")


def _verify_scales(graph: Graph) -> None:
    for phase, scales in graph.units.scale.items():
        for name, scale in scales.items():
            sound = isfinite(scale) and 1e-12 < scale < 1e12
            _require(
                sound,
                f"population '{name}' has scale {scale} in phase '{phase}': units per 1.0 lie between 1e-12 and 1e12, so bring its threshold, its reset and what reaches it "
                "nearer to 1",
            )


def _verify_phase(graph: Graph, phase: Phase) -> None:
    where = f"phase '{phase.name}'"
    kinds = {population.name: population.kind for population in graph.populations}
    shapes = {population.name: population.shape for population in graph.populations}
    _require(
        1 <= phase.time_steps <= LARGEST_STEPS, f"{where} has {phase.time_steps} time steps: it needs at least 1, at most {LARGEST_STEPS:,}"
    )
    _require(len(set(phase.order)) == len(phase.order), f"{where} lists a population twice in its order")
    for name in (*phase.order, *phase.dynamics, *phase.bias, *(drive.population for drive in phase.drive)):
        _require(name in kinds, f"{where} names population '{name}', which the graph lacks: it has {', '.join(kinds)}")
    for name in phase.order:
        if kinds[name] != "input":
            _require(name in phase.dynamics, f"population '{name}' takes part in {where} without dynamics: add them")
            _verify_dynamics(graph, phase, name, kinds[name])
    for key in sorted(tensor_names(phase)):
        _require(key in graph.tensors, f"{where} reads tensor '{key}', which the graph lacks")
    position = {name: i for i, name in enumerate(phase.order)}
    for synapse in phase.synapses:
        _verify_synapse(graph, phase, synapse, position, shapes)
    for name, bias in [(name, bias) for name, biases in phase.bias.items() for bias in biases]:
        _require(
            graph.tensors[bias.tensor].shape == shapes[name],
            f"bias '{bias.tensor}' of population '{name}' has shape {graph.tensors[bias.tensor].shape}, not {shapes[name]}: make it the full shape",
        )
        _require(
            0 <= bias.start <= LARGEST_STEPS,  # one that starts after the last step never acts: phases can be shortened
            f"bias of population '{name}' starts at step {bias.start}: give it a step from 0 to {LARGEST_STEPS:,}",
        )
    driven = [drive.population for drive in phase.drive]
    _require(len(set(driven)) == len(driven), f"{where} drives a population twice: join the currents")
    for drive in phase.drive:
        _verify_drive(graph, phase, drive, shapes)
    for name in phase.order:
        kind = kinds[name]
        _require(
            kind != "input" or phase.name == "forward",
            f"input population '{name}' takes part in {where}: inputs belong to the forward phase",
        )
    if graph.integer:
        _verify_integers(graph, phase, kinds)
    timing = phase.timing
    _require(
        1 <= timing.period <= LARGEST_STEPS
        and 0 <= timing.flush <= LARGEST_STEPS
        and all(0 <= start <= LARGEST_STEPS for start in timing.start.values())
        and phase.ticks <= LARGEST_STEPS * 100,
        f"{where} has a start, flush or period out of range: periods are at least 1 tick, starts and flushes at least 0, all at most {LARGEST_STEPS:,}",
    )


def _verify_dynamics(graph: Graph, phase: Phase, name: str, kind: str) -> None:
    dynamics = phase.dynamics[name]
    where = f"population '{name}' in phase '{phase.name}'"
    numbers = (dynamics.threshold, dynamics.reset, dynamics.leak)
    _require(all(isfinite(n) for n in numbers), f"{where} has a NaN or infinite threshold, reset or leak")
    _require(0 < dynamics.leak <= 1, f"{where} has leak {dynamics.leak}: it must lie in (0, 1]")
    allowed = {"readout": ("none",), "linear": ("graded",)}.get(kind, ("plus", "both"))
    _require(
        dynamics.members in allowed,
        f"{where} is a {kind} with members '{dynamics.members}': couples fire with 'plus' or 'both', readouts have 'none', linear relays 'graded'",
    )
    if kind == "linear":
        _require(dynamics.leak == 1, f"{where} is a linear relay with leak {dynamics.leak}: it keeps nothing that could leak, give it 1")
    if kind == "couple":
        _require(dynamics.threshold > 0, f"{where} has threshold {dynamics.threshold}: it must be above 0")
        _require(dynamics.reset >= 0, f"{where} has reset {dynamics.reset}: the amount subtracted on a spike cannot be negative")
    if kind == "couple" and not graph.integer:
        _require(
            SMALLEST_THRESHOLD <= dynamics.threshold <= LARGEST_FLOAT,
            f"{where} has threshold {dynamics.threshold:g}: floats keep apart what lies between {SMALLEST_THRESHOLD:g} and {LARGEST_FLOAT:g}, so bring it nearer to 1",
        )
        _require(
            dynamics.reset <= LARGEST_FLOAT,
            f"{where} has reset {dynamics.reset:g}: it may be at most {LARGEST_FLOAT:g}, so bring it nearer to the threshold",
        )
    if graph.integer:
        _require(
            float(dynamics.leak * DECAY_ONE).is_integer(),
            f"{where} has leak {dynamics.leak}: an integer graph needs a multiple of 1/{DECAY_ONE}",
        )
        for label, value in (("threshold", dynamics.threshold), ("reset", dynamics.reset)):
            _require(
                isinstance(value, int) and value <= POTENTIAL_LIMIT,
                f"{where} has {label} {value}: an integer graph needs a whole number up to {POTENTIAL_LIMIT}",
            )


def _verify_synapse(graph: Graph, phase: Phase, synapse: Synapse, position: Mapping[str, int], shapes: Mapping[str, Shape]) -> None:
    where = f"synapse '{synapse.source}' -> '{synapse.target}' in phase '{phase.name}'"
    for end in (synapse.source, synapse.target):
        _require(end in position, f"{where} ends at '{end}', which does not take part in the phase: add it to the order")
    _require(graph.population(synapse.target).kind != "input", f"{where} feeds an input population: reverse it")
    _require(
        graph.population(synapse.source).kind != "readout", f"{where} leaves a readout, which never fires: take its source from a couple"
    )
    if phase.timing.mode == "step":
        _require(synapse.delay in (0, 1), f"{where} has delay {synapse.delay}: before retime a delay is 0 (same step) or 1 (feedback)")
    if synapse.delay == 0:
        _require(
            position[synapse.source] < position[synapse.target],
            f"{where} closes a loop without delay: give it delay 1, or move its source before its target",
        )
    _require(0 <= synapse.delay <= LARGEST_STEPS, f"{where} has delay {synapse.delay}: it must lie in 0 to {LARGEST_STEPS:,}")
    if synapse.gate is not None:
        _require(
            synapse.gate in shapes and shapes[synapse.gate] == shapes[synapse.source],
            f"{where} is gated by '{synapse.gate}', which is no population of the source's shape {shapes[synapse.source]}",
        )
        _require(
            graph.population(synapse.gate).kind == "couple",
            f"{where} is gated by '{synapse.gate}', which has no spikes to count: gate by couples",
        )
    _verify_shapes(synapse.ops, shapes[synapse.source], shapes[synapse.target], graph.tensors, where)
    _verify_factors(synapse.ops, where)
    if graph.integer:
        for op in synapse.ops:
            _require(
                not isinstance(op, Scale) or op.factor == 1, f"{where} scales by a float in an integer graph: fold it into the weights"
            )
            _require(
                getattr(op, "exponent", 0) >= 0,
                f"{where} has a negative weight exponent, which floors sums on the chip: raise the graph's scale",
            )


def _verify_integers(graph: Graph, phase: Phase, kinds: Mapping[str, str]) -> None:
    """What integer graphs must keep to beside the rest, so that every target computes them alike."""
    floats = {bias.tensor for name, biases in phase.bias.items() for bias in biases if kinds[name] == "readout"}
    for key in sorted(tensor_names(phase) - floats):
        kind = graph.tensors[key].dtype
        _require(
            np.issubdtype(kind, np.signedinteger), f"tensor '{key}' is of type {kind} in an integer graph: quantize it to signed integers"
        )
    for op in [op for synapse in phase.synapses for op in synapse.ops]:
        _verify_range(graph, weight_of(op), 2**15)
    for drive in phase.drive:
        for op in drive.ops:
            plain = getattr(op, "exponent", 0) == 0 and not (isinstance(op, Scale) and op.factor != 1)
            _require(
                plain,
                f"drive of population '{drive.population}' in phase '{phase.name}' shifts or scales in {type(op).__name__}: the host's whole weights hold all of it",
            )
            _verify_range(graph, weight_of(op), 2**31)
        _verify_range(graph, drive.bias, 2**52)
        _verify_host_sum(graph, drive)
    for synapse in phase.synapses:
        largest = max((getattr(op, "exponent", 0) for op in synapse.ops), default=0)
        where = f"synapse '{synapse.source}' -> '{synapse.target}' in phase '{phase.name}'"
        _require(largest <= EXPONENT_LIMIT, f"{where} has weight exponent {largest}: the chip has 0 to {EXPONENT_LIMIT}")
    for name, bias in [(name, bias) for name, biases in phase.bias.items() for bias in biases]:
        where = f"bias of population '{name}' in phase '{phase.name}'"
        _require(0 <= bias.exponent <= EXPONENT_LIMIT, f"{where} has exponent {bias.exponent}: the chip has 0 to {EXPONENT_LIMIT}")
        if kinds[name] != "readout":
            mantissa = graph.tensors[bias.tensor]
            fits = int(mantissa.min()) >= -MANTISSA_LIMIT and int(mantissa.max()) < MANTISSA_LIMIT
            _require(fits, f"{where} does not fit a 13-bit mantissa ({mantissa.min()} to {mantissa.max()}): raise its exponent")
    for drive in phase.drive:
        where = f"drive of population '{drive.population}' in phase '{phase.name}'"
        _require(0 <= drive.exponent <= EXPONENT_LIMIT, f"{where} has exponent {drive.exponent}: the chip has 0 to {EXPONENT_LIMIT}")
        _require(0 <= drive.shift <= SHIFT_LIMIT, f"{where} has shift {drive.shift}: it must lie in 0 to {SHIFT_LIMIT}")
    for population in graph.of_kind("input"):
        levels = graph.scale("forward", population.name)
        whole = levels >= 1 and float(levels).is_integer()
        _require(whole, f"input '{population.name}' has scale {levels}: an integer graph needs a whole number of levels, at least 1")


def _verify_host_sum(graph: Graph, drive: Drive) -> None:
    """The host adds whole numbers in float64, which is exact below 2^53 only."""
    if drive.source != "input":
        return
    largest = int(graph.scale("forward", graph.of_kind("input")[0].name))
    highest = largest
    for op in drive.ops:
        partial, largest = largest_sum(op, graph.tensors, largest)
        highest = max(highest, partial, largest)
    highest += 0 if drive.bias is None else int(np.abs(graph.tensors[drive.bias]).max(initial=0))
    _require(
        highest < EXACT_ON_HOST,
        f"drive of population '{drive.population}' can sum to {highest}, beyond what the host adds exactly (2^53): lower its shift",
    )


def _verify_range(graph: Graph, key: str | None, limit: int) -> None:
    """Whole numbers small enough that every sum of them stays exact."""
    if key is None or graph.tensors[key].size == 0:
        return
    low, high = int(graph.tensors[key].min()), int(graph.tensors[key].max())
    _require(
        -limit <= low and high < limit,
        f"tensor '{key}' reaches from {low} to {high}: an integer graph needs it within {-limit} to {limit - 1}",
    )


def _verify_drive(graph: Graph, phase: Phase, drive: Drive, shapes: Mapping[str, Shape]) -> None:
    where = f"drive of population '{drive.population}' in phase '{phase.name}'"
    _require(drive.population in phase.order, f"{where} reaches a population that does not take part: add it to the order")
    _require(isfinite(drive.gain) and drive.gain > 0, f"{where} has gain {drive.gain}: it must be a positive number")
    expected = "input" if phase.name == "forward" else "error"
    _require(drive.source == expected, f"{where} carries the {drive.source}: the {phase.name} phase is driven by the {expected}")
    if drive.source == "error":
        return
    if drive.bias is not None:
        found, wanted = graph.tensors[drive.bias].shape, shapes[drive.population]
        _require(found == wanted, f"bias '{drive.bias}' of the {where} has shape {found}, not {wanted}: make it the full shape")
    inputs = graph.of_kind("input")
    _require(len(inputs) == 1, f"{where} needs exactly one input population, the graph has {len(inputs)}")
    _require(not inputs[0].events, f"{where} is one current for all steps and the input has events: keep its connection on the chip")
    _verify_shapes(drive.ops, inputs[0].shape, shapes[drive.population], graph.tensors, where)
    _verify_factors(drive.ops, where)


def _verify_factors(ops: Sequence[Op], where: str) -> None:
    for op in ops:
        factor = op.factor if isinstance(op, Scale) else 1.0
        _require(abs(factor) <= LARGEST_FLOAT, f"{where} scales by {factor:g}: a factor lies within {LARGEST_FLOAT:g} either way")


def _verify_shapes(ops: Sequence[Op], source: Shape, target: Shape, tensors: Mapping[str, Array], where: str) -> None:
    """Both ways: what a connection cannot take back would fail later, where the feedback phase is made of it."""
    try:
        between = [*shapes_along(ops, source, target, tensors), *shapes_along(adjoint(ops), target, source, tensors)]
    except GraphError as error:
        raise GraphError(f"{where}: {error}") from None
    largest = max(map(prod, between), default=0)
    _require(largest <= MOST_NEURONS, f"{where} makes {largest:,} values on its way, more than {MOST_NEURONS:,}: make it smaller")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise GraphError(message)
