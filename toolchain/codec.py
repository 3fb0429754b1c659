"""What the host does around a target: inputs into currents, errors into currents, spike counts back into rates, logits and gradients.

Every target uses these functions, so a difference between two targets is never a difference of the host; only `sim`'s compiled core makes `input_current` itself, and is
held to it by tests. All host sums over integers are exact (below 2^53 in float64), hence the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from toolchain import fixed
from toolchain.errors import GraphError, UsageError
from toolchain.ir import Array, Drive, Graph, Op, Phase, Scale, Synapse, adjoint, weight_of
from toolchain.target import Result

LARGEST_ERROR = 1e24
"""Errors stay below this, in the model's unit: times the largest scale of a graph they are still far from the end of float32."""


def encode_input(graph: Graph, inputs: Array) -> Array:
    """Inputs in [0, 1] of shape (samples, *input shape), events with time last, as the graph's input values: float64, or whole numbers 0 .. scale
    (int64, clipped)."""
    if not graph.integer:
        return inputs.astype(np.float64)
    levels = graph.scale("forward", graph.of_kind("input")[0].name)
    encoded: Array = np.clip(np.rint(inputs.astype(np.float64) * levels), 0, levels).astype(np.int64)
    return encoded


def check_inputs(graph: Graph, inputs: Array) -> Array:
    """`inputs` as an array of shape (samples, *input shape), of events (samples, *input shape, T); UsageError where the size is wrong or a value is
    not finite."""
    array = _numbers(inputs, "the input")
    population = graph.of_kind("input")[0]
    array = _in_steps(graph, array) if population.events else array
    shape = array.shape[1:-1] if population.events else array.shape[1:]
    if array.ndim < 2 or prod(shape) != prod(population.shape):
        raise UsageError(
            f"'{graph.provenance.model}' takes samples of {prod(population.shape)} values, shape {population.shape}, but the input has shape {array.shape}: give one sample a row, from the data set that it was made for"
        )
    _require_samples(array)
    if not np.isfinite(array).all():
        raise UsageError("the input holds NaN or infinite values: clean the data first")
    if not (array.min() >= 0 and array.max() <= 1):
        raise UsageError(
            f"the input holds values from {array.min():g} to {array.max():g}: give it in [0, 1], as `toolchain.data` does; normalisation is part of the network"
        )
    return array.reshape(len(array), *population.shape, *array.shape[-1:] * population.events)


def _in_steps(graph: Graph, array: Array) -> Array:
    """Events as they are, one frame a time step; a still image is held for all of them."""
    population, steps = graph.of_kind("input")[0], graph.phase("forward").time_steps
    if array.ndim >= 2 and prod(array.shape[1:]) == prod(population.shape):
        return np.repeat(array[..., None], steps, axis=-1)
    if array.ndim < 2 or array.shape[-1] != steps:
        raise UsageError(
            f"'{graph.provenance.model}' takes events in {steps} frames, one a time step, as the last axis, but the input has shape {array.shape}: cut them to {steps} frames"
        )
    return array


def plain(values: object, what: str) -> Array:
    """`values` as an array of any type; UsageError where they are ragged, a tensor that NumPy cannot see, or masked, since no target knows of a mask."""
    if isinstance(values, np.ma.MaskedArray) and np.any(values.mask):
        raise UsageError(f"{what} has masked values: fill them first")
    try:
        return np.asarray(values)
    except ValueError:
        raise UsageError(f"{what} is ragged: give samples of one shape") from None
    except (RuntimeError, TypeError):  # torch's words for one that requires a gradient, and for one on a GPU
        raise UsageError(f"{what} is a {type(values).__name__} that NumPy cannot read: give tensor.detach().cpu().numpy()") from None


def _numbers(values: Array, what: str) -> Array:
    """`values` as an array of real numbers, of a type that torch has too."""
    array = plain(values, what)
    if array.dtype.kind not in "biuf":
        raise UsageError(f"{what} holds values of type {array.dtype}: give real numbers")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:  # 80 or 128 bits
        return array.astype(np.float64)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _require_samples(array: Array) -> None:
    if len(array) == 0:
        raise UsageError("there are no samples to run: give at least 1")


def input_current(graph: Graph, drive: Drive, encoded: Array) -> Array:
    """The current (samples, *population shape) that a drive injects at every step, in graph units (int64 or float64)."""
    if not graph.integer:
        return _host_total(graph, drive, encoded)
    current = _host_current(graph, drive, encoded)
    return current.mantissa << current.exponent


def _host_current(graph: Graph, drive: Drive, encoded: Array) -> fixed.Mantissas:
    return fixed.host_current(_host_total(graph, drive, encoded), drive.shift, drive.exponent)


def _host_total(graph: Graph, drive: Drive, encoded: Array) -> Array:
    """The host's connection and bias."""
    total = fixed.apply(drive.ops, graph.tensors, encoded, graph.population(drive.population).shape, integer=graph.integer)
    return total if drive.bias is None else total + graph.tensors[drive.bias]


def clipped_currents(graph: Graph, inputs: Array) -> int:
    """How many injected input currents of `inputs` pass the 13-bit mantissa and are cut: 0 wherever `passes.quantize` found room for the worst case."""
    tight = [drive for drive in graph.phase("forward").drive if graph.integer and not _fits(graph, drive)]
    if not tight:
        return 0
    encoded = encode_input(graph, check_inputs(graph, inputs))
    return sum(_host_current(graph, drive, encoded).clipped for drive in tight)


def _fits(graph: Graph, drive: Drive) -> bool:
    """Whether no input at all can cut this drive's current."""
    record = graph.provenance.rounding.get(f"forward.{drive.population}.current")
    return record is not None and record.clipped == 0


def check_error(graph: Graph, error: Array) -> Array:
    """`error` as (samples, *shape of the driven population); UsageError where the size is wrong, or a value is not finite or beyond `LARGEST_ERROR`."""
    array = _numbers(error, "the error")
    population = graph.population(error_drive(graph).population)
    if array.ndim < 2 or prod(array.shape[1:]) != prod(population.shape):
        raise UsageError(
            f"the feedback phase takes the error of population '{population.name}', shape {population.shape} a sample, but got shape {array.shape}"
        )
    _require_samples(array)
    if not np.isfinite(array).all():
        raise UsageError("the error holds NaN or infinite values: check the loss")
    if np.abs(array).max() > LARGEST_ERROR:
        raise UsageError(f"the error passes {LARGEST_ERROR:g}, the most that targets take: lower the scale factor")
    return array.reshape(len(array), *population.shape)


def bias_currents(graph: Graph, phase: Phase) -> dict[str, list[tuple[int, Array]]]:
    """The currents (population shape) that biases inject, in graph units, each with the step it starts at; readouts have none (see `logits`)."""
    wide = np.int64 if graph.integer else np.float64
    currents: dict[str, list[tuple[int, Array]]] = {}
    for name, biases in phase.bias.items():
        if graph.population(name).kind != "readout":
            values = [(bias, graph.tensors[bias.tensor].astype(wide)) for bias in biases]
            currents[name] = [(bias.start, np.left_shift(v, bias.exponent) if graph.integer else v) for bias, v in values]
    return currents


def error_current(graph: Graph, error: Array) -> Array:
    """The feedback phase's injected current (samples, *population shape) from `error` = d(gain * loss)/d(rate), in the model's unit."""
    if not graph.integer:
        return _scaled_error(graph, error)
    injected = fixed.injected(_scaled_error(graph, error), error_drive(graph).exponent)
    return injected.mantissa << injected.exponent


def clipped_errors(graph: Graph, error: Array) -> int:
    """How many error currents pass the 13-bit mantissa and are cut: with |error| up to one spike's amplitude none."""
    return fixed.injected(_scaled_error(graph, error), error_drive(graph).exponent).clipped if graph.integer else 0


def _scaled_error(graph: Graph, error: Array) -> Array:
    """`error` in graph units, (samples, *population shape)."""
    population = error_drive(graph).population
    shape = graph.population(population).shape
    return error.astype(np.float64).reshape(len(error), *shape) * graph.scale("feedback", population)


def mask(graph: Graph, forward: Result, population: str) -> npt.NDArray[np.bool_]:
    """m = 1[0 < spike count < T], by counts and never by comparing a float with 1 (METHODS: the mask quirk of LIF rates)."""
    counts = forward.counts[population]
    return (counts > 0) & (counts < graph.phase("forward").time_steps)


def rates(graph: Graph, result: Result, population: str) -> npt.NDArray[np.float64]:
    """(Weighted) average firing rates, (samples, *shape): sum of leak^(T-t) s[t] over sum of leak^k."""
    phase = graph.phase(result.phase)
    return result.traces[population] / fixed.leak_sum(phase.dynamics[population].leak, phase.time_steps)


def beta(graph: Graph, feedback: Result, population: str) -> npt.NDArray[np.float64]:
    """The feedback equilibrium in the model's unit: (weighted) mean of spikes of amplitude Ab (SPIDE eq. for the backward stage), unmasked."""
    return amplitude(graph, "feedback", population) * rates(graph, feedback, population)


def amplitude(graph: Graph, phase: str, population: str) -> float:
    """What a spike subtracts, in the model's unit: A = Vth - u_rest (forward), Ab (feedback)."""
    return graph.phase(phase).dynamics[population].reset / graph.scale(phase, population)


def error_bound(graph: Graph) -> float:
    """The largest error that the feedback phase carries without clipping, in the model's unit: one spike's amplitude, of a driven relay that of the
    largest couple."""
    driven = graph.population(error_drive(graph).population)
    order = graph.phase("feedback").order
    sources = [driven.name] if driven.kind == "couple" else [p.name for p in graph.of_kind("couple") if p.name in order]
    return max(amplitude(graph, "feedback", name) for name in sources)


def logits(graph: Graph, forward: Result) -> npt.NDArray[np.float64]:
    """Class scores (samples, classes): the readout's potential over its unit and its own sum of leaks, plus its bias."""
    phase = graph.phase("forward")
    readout = graph.of_kind("readout")[0].name
    norm = fixed.leak_sum(phase.dynamics[readout].leak, phase.time_steps) * graph.scale("forward", readout)
    scores = forward.potentials[readout].astype(np.float64) / norm
    for bias in phase.bias.get(readout, ()):
        scores = scores + graph.tensors[bias.tensor]
    return scores


def output_error(graph: Graph, forward: Result, labels: Array, gain: float | None = None) -> npt.NDArray[np.float64]:
    """d(gain * mean cross entropy)/d(rate of the driven population), (samples, *shape): gain * (softmax - onehot)/samples through the readout.

    `gain` defaults to the drive's own.
    """
    factor = error_drive(graph).gain if gain is None else gain
    readout = graph.of_kind("readout")[0].name
    (synapse,) = (s for s in graph.phase("forward").synapses if s.target == readout)
    shape = graph.population(synapse.source).shape
    floats = _as_floats(graph, synapse.ops)
    made = fixed.apply(adjoint(floats.ops), floats.tensors, factor * logit_error(graph, forward, labels), shape, integer=False)
    return made * (1 if synapse.source in _couples(graph) else graph.scale("forward", synapse.source)) / graph.scale("forward", readout)


def logit_error(graph: Graph, forward: Result, labels: Array) -> npt.NDArray[np.float64]:
    """d(mean cross entropy)/d(logits), (samples, classes)."""
    scores = logits(graph, forward)
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(scores),):
        raise UsageError(
            f"labels must be {len(scores)} whole numbers from 0 to {scores.shape[1] - 1}, one a sample: these have type {labels.dtype}, shape {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise UsageError(
            f"labels must be {len(scores)} whole numbers from 0 to {scores.shape[1] - 1}, and these reach from {labels.min()} to {labels.max()}: give those of a data set with {scores.shape[1]} classes"
        )
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    softmax = shifted / shifted.sum(axis=1, keepdims=True)
    error: npt.NDArray[np.float64] = (softmax - np.eye(scores.shape[1])[labels]) / len(scores)
    return error


def cross_entropy(scores: npt.NDArray[np.float64], labels: Array) -> float:
    """The mean cross entropy of logits (samples, classes)."""
    top = scores.max(axis=1, keepdims=True)
    logs = scores - top - np.log(np.exp(scores - top).sum(axis=1, keepdims=True))
    return float(-logs[np.arange(len(labels)), labels].mean())


class _Floats(NamedTuple):
    """A connection as floats of the same values: exponents multiplied in, windows summed where the graph's integers sum them."""

    ops: tuple[Op, ...]
    tensors: dict[str, Array]


def _as_floats(graph: Graph, ops: Sequence[Op]) -> _Floats:
    """`ops` with the tensors they read in float64, so that `fixed.apply` computes them in floats: what a target's own weights make of real numbers."""
    if not graph.integer:
        return _Floats(tuple(ops), dict(graph.tensors))
    exponents = {name: getattr(op, "exponent", 0) for op in ops if (name := weight_of(op)) is not None}
    tensors = {name: np.ldexp(graph.tensors[name].astype(np.float64), exponent) for name, exponent in exponents.items()}
    shifted = [msgspec.structs.replace(op, factor=2.0**op.exponent) if isinstance(op, Scale) and op.weight is None else op for op in ops]
    return _Floats(fixed.summed(shifted), tensors)


def _couples(graph: Graph) -> set[str]:
    return {population.name for population in graph.of_kind("couple")}


def error_drive(graph: Graph) -> Drive:
    """The drive through which the error enters; GraphError where the graph has no feedback phase."""
    for drive in graph.phase("feedback").drive:
        if drive.source == "error":
            return drive
    raise GraphError("the feedback phase has no error drive: run the adjoint pass")


def synaptic_operations(
    graph: Graph,
    result: Result,
    *,
    inputs: npt.ArrayLike | None = None,
    forward: Result | None = None,
    fan_outs: Sequence[npt.NDArray[np.float64]] | None = None,
) -> npt.NDArray[np.float64]:
    """Synaptic operations of each sample, (samples,): spikes that are sent on the chip times the nonzero weights they meet.

    A ternary spike is a spike of one member of the couple. With only the plus members on (forward) it meets each weight once; with both
    members on (feedback) it meets it twice, at the plus and the minus member of its target. Gated spikes are not sent: a feedback phase needs the
    `forward` result for its masks. An input population on the chip (`--input graded`) sends every nonzero value at every step: `inputs` are counted
    then; a connection that the host applies costs the chip none. `fan_outs` saves counting the weights anew for every part of a data set.
    """
    phase = graph.phase(result.phase)
    samples = len(next(iter(result.activity.values())))
    total = np.zeros(samples)
    for synapse, fan_out in zip(phase.synapses, fan_outs or weights_met(graph, phase), strict=True):
        if graph.population(synapse.source).kind == "input" and not graph.integer:
            continue  # a float graph runs on no chip: its first connection counts as the host's
        members = 2 if phase.dynamics[synapse.target].members == "both" else 1
        sent = _sent(graph, result, synapse, inputs, forward)
        total += members * (sent.reshape(samples, -1) @ fan_out)
    return total


def weights_met(graph: Graph, phase: Phase) -> tuple[npt.NDArray[np.float64], ...]:
    """By synapse: how many weights a spike of each neuron of its source meets, (neurons,)."""
    return tuple(_fan_out(graph, synapse) for synapse in phase.synapses)


def _sent(graph: Graph, result: Result, synapse: Synapse, inputs: npt.ArrayLike | None, forward: Result | None) -> Array:
    """How often each neuron of a synapse's source sends, (samples, *shape)."""
    if graph.population(synapse.source).kind == "input":
        if inputs is None:
            raise GraphError(f"input population '{synapse.source}' sends on the chip: give the inputs to count its synaptic operations")
        nonzero = encode_input(graph, check_inputs(graph, np.asarray(inputs))) != 0
        still = not graph.population(synapse.source).events
        sent: Array = nonzero * graph.phase(result.phase).time_steps if still else nonzero.sum(axis=-1)
        return sent
    activity = result.activity[synapse.source]
    if synapse.gate is None:
        return activity
    if forward is None:
        raise GraphError(
            f"synapse '{synapse.source}' -> '{synapse.target}' is gated: give the forward result to count its synaptic operations"
        )
    return activity * mask(graph, forward, synapse.gate)


def _fan_out(graph: Graph, synapse: Synapse) -> npt.NDArray[np.float64]:
    """Weights that leave each neuron of the source, (neurons,): the nonzero ones of a single operation; of a composed connection all ways from the
    source to a target neuron through operations with nonzero weights."""
    source, target = graph.population(synapse.source).shape, graph.population(synapse.target).shape
    present = {name: (graph.tensors[name] != 0).astype(np.float64) for op in synapse.ops if (name := weight_of(op)) is not None}
    counted = fixed.summed([msgspec.structs.replace(op, factor=1.0) if isinstance(op, Scale) else op for op in synapse.ops])
    reached = fixed.apply(adjoint(counted), present, np.ones((1, *target)), source, integer=False)
    return np.asarray(reached.reshape(-1), np.float64)
