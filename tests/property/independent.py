"""Both phases of a graph once more, from the definitions alone: explicit matrices, neuron by neuron, and the model step in plain arithmetic.

Nothing here uses `toolchain.fixed`, `toolchain.codec`, a pass or a target. A connection is a matrix built by index loops from the definition of its
forward operations; the feedback phase (SPIDE's backward stage) uses the same matrices transposed. Only the parts of a graph are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log2

import numpy as np
import numpy.typing as npt

from toolchain.ir import AvgPool2d, Conv2d, ConvTranspose2d, Dense, Graph, Identity, Op, Scale, Shape, Synapse, Upsample

Matrix = npt.NDArray[np.generic]

LARGEST = 2**23 - 1


def size(shape: Shape) -> int:
    return int(np.prod(shape))


def matrix(ops: Sequence[Op], tensors: Mapping[str, Matrix], shape: Shape, *, integer: bool) -> Matrix:
    """The matrix (out, in) of forward operations from a source of `shape`."""
    found: Matrix = np.eye(size(shape), dtype=np.int64 if integer else np.float64)
    for op in ops:
        one, shape = _one(op, tensors, shape, integer)
        found = one.astype(found.dtype) @ found * (2**op.exponent if integer and hasattr(op, "exponent") else 1)
    return found


def _one(op: Op, tensors: Mapping[str, Matrix], shape: Shape, integer: bool) -> tuple[Matrix, Shape]:
    """The matrix of one operation without its exponent, and the shape that it makes."""
    if isinstance(op, Identity):
        return np.eye(size(shape)), shape
    if isinstance(op, Scale):
        factors = np.full(shape[0], op.factor) if op.weight is None else tensors[op.weight].astype(np.float64) * op.factor
        return np.diag(np.repeat(factors, size(shape[1:]))), shape
    if isinstance(op, Dense):
        return tensors[op.weight], (len(tensors[op.weight]),)
    if isinstance(op, Upsample):
        made = (shape[0], shape[1] * op.factor, shape[2] * op.factor)
        return _filled(made, shape, ((o, (o[0], o[1] // op.factor, o[2] // op.factor), 1) for o in _places(made))), made
    if isinstance(op, AvgPool2d):
        return _pool(op, shape, integer)
    return _convolution(op, tensors[op.weight], shape) if isinstance(op, Conv2d) else _spreading(op, tensors[op.weight], shape)


def _places(shape: Shape) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*map(range, shape))


def _filled(made: Shape, shape: Shape, entries) -> Matrix:
    """A matrix from (place in the target, place in the source, weight); places outside either image are padding."""
    found = np.zeros((*made, *shape))
    for out, into, weight in entries:
        if all(0 <= i < n for i, n in zip((*out, *into), (*made, *shape), strict=True)):
            found[(*out, *into)] += weight
    return found.reshape(size(made), size(shape))


def _pool(op: AvgPool2d, shape: Shape, integer: bool) -> tuple[Matrix, Shape]:
    (kh, kw), (sh, sw), (ph, pw) = op.kernel, op.stride, op.padding
    made = (shape[0], (shape[1] + 2 * ph - kh) // sh + 1, (shape[2] + 2 * pw - kw) // sw + 1)
    share = 1 if integer else 1 / (kh * kw)
    windows = itertools.product(_places(made), range(kh), range(kw))
    return _filled(made, shape, (((c, y, x), (c, y * sh - ph + i, x * sw - pw + j), share) for (c, y, x), i, j in windows)), made


def _convolution(op: Conv2d, weight: Matrix, shape: Shape) -> tuple[Matrix, Shape]:
    (sh, sw), (ph, pw), (dh, dw) = op.stride, op.padding, op.dilation
    channels, each, kh, kw = weight.shape
    made = (channels, (shape[1] + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (shape[2] + 2 * pw - dw * (kw - 1) - 1) // sw + 1)
    first = {c: c // (channels // op.groups) * each for c in range(channels)}
    meetings = itertools.product(_places(made), range(each), range(kh), range(kw))
    entries = (
        ((c, y, x), (first[c] + e, y * sh - ph + i * dh, x * sw - pw + j * dw), weight[c, e, i, j]) for (c, y, x), e, i, j in meetings
    )
    return _filled(made, shape, entries), made


def _spreading(op: ConvTranspose2d, weight: Matrix, shape: Shape) -> tuple[Matrix, Shape]:
    (sh, sw), (ph, pw), (dh, dw), (oh, ow) = op.stride, op.padding, op.dilation, op.output_padding
    channels, each, kh, kw = weight.shape
    made = (each * op.groups, (shape[1] - 1) * sh - 2 * ph + dh * (kh - 1) + oh + 1, (shape[2] - 1) * sw - 2 * pw + dw * (kw - 1) + ow + 1)
    first = {c: c // (channels // op.groups) * each for c in range(channels)}
    meetings = itertools.product(_places(shape), range(each), range(kh), range(kw))
    entries = (
        ((first[c] + e, y * sh - ph + i * dh, x * sw - pw + j * dw), (c, y, x), weight[c, e, i, j]) for (c, y, x), e, i, j in meetings
    )
    return _filled(made, shape, entries), made


@dataclass(frozen=True)
class Edge:
    """A connection as numbers: its matrix, its delay in model steps, and what multiplies the source's spikes (0 or 1), if anything does."""

    source: str
    target: str
    matrix: Matrix
    delay: int
    mask: Matrix | None = None


@dataclass(frozen=True)
class Neuron:
    """What one population does: `members` as in the graph, `threshold`, `reset`, and a leak as the integer that 4096 is left with, or as a float."""

    members: str
    threshold: float
    reset: float
    keep: float


@dataclass
class Trains:
    """What every population did: spikes (of relays values) and potentials of each step, (steps, samples, neurons), and how often it was clamped."""

    spikes: dict[str, list[Matrix]] = field(default_factory=dict)
    potentials: dict[str, list[Matrix]] = field(default_factory=dict)
    clamped: dict[str, Matrix] = field(default_factory=dict)


def run(
    steps: int,
    neurons: Mapping[str, Neuron],
    sizes: Mapping[str, int],
    edges: Sequence[Edge],
    emitted: Mapping[str, Callable[[int], Matrix]],
    current: Callable[[str, int], Matrix],
    *,
    samples: int,
    integer: bool,
) -> Trains:
    """The model step, `steps` times: populations in the order of `neurons`, sources seen in the same step or one step later, then
    add, clamp (integers), fire, subtract, leak. `emitted` is what inputs send at a step, `current` what is injected into a population."""
    trains = Trains()
    kind = np.int64 if integer else np.float64
    now = {name: np.zeros((samples, sizes[name]), kind) for name in neurons}
    last: dict[str, Matrix] = {}
    for name in neurons:
        trains.spikes[name], trains.potentials[name], trains.clamped[name] = [], [], np.zeros((samples, sizes[name]), np.int64)
    for step in range(steps):
        fired = {name: send(step) for name, send in emitted.items()}
        for name, neuron in neurons.items():
            total = np.zeros((samples, sizes[name]), kind) + current(name, step)
            for edge in (e for e in edges if e.target == name):
                if edge.delay and step == 0:
                    continue
                sent = (last if edge.delay else fired)[edge.source]
                total = total + (sent if edge.mask is None else sent * edge.mask) @ edge.matrix.T
            if neuron.members == "none":
                total = total + _leaked(now[name], neuron.keep, integer)
            elif neuron.members != "graded":
                total = total + now[name]
            if integer:
                trains.clamped[name] += np.abs(total) > LARGEST
                total = np.minimum(np.maximum(total, -LARGEST), LARGEST)
            spikes = np.zeros_like(total)
            if neuron.members == "graded":
                spikes = total
            elif neuron.members != "none":
                spikes = (total >= neuron.threshold).astype(kind)
                if neuron.members == "both":
                    spikes = spikes - (total <= -neuron.threshold)
                total = _leaked(total - spikes * kind(neuron.reset), neuron.keep, integer)
            fired[name], now[name] = spikes, total
            trains.spikes[name].append(spikes)
            trains.potentials[name].append(total)
        last = fired
    return trains


def _leaked(potential: Matrix, keep: float, integer: bool) -> Matrix:
    """Floats multiply; integers keep `keep` of 4096 parts, rounded towards zero."""
    if not integer:
        return potential * keep
    magnitude = np.abs(potential) * int(keep) // 4096
    return np.where(potential < 0, -magnitude, magnitude)


def forward(graph: Graph, inputs: Matrix) -> Trains:
    """The forward phase of a graph in model steps (before `retime`), whose input is on the chip or injected by the host."""
    phase, integer = graph.phase("forward"), graph.integer
    source = graph.of_kind("input")[0]
    levels = graph.units.scale["forward"][source.name] if integer else 1
    values = np.minimum(np.maximum(np.rint(inputs * levels), 0), levels).astype(np.int64) if integer else inputs
    frames = [values[..., t] if source.events else values for t in range(phase.time_steps)]
    frames = [frame.reshape(len(inputs), -1) for frame in frames]
    sizes = {p.name: size(p.shape) for p in graph.populations}
    edges = [Edge(s.source, s.target, _of(graph, s), s.delay) for s in phase.synapses]
    driven = {d.population: _host(graph, d, frames[0]) for d in phase.drive}

    def current(name: str, step: int) -> Matrix:
        total = driven.get(name, np.zeros(sizes[name], np.int64 if integer else np.float64))
        for bias in phase.bias.get(name, ()) if graph.population(name).kind != "readout" else ():
            value = graph.tensors[bias.tensor].reshape(-1)
            if step >= bias.start:
                total = total + (value.astype(np.int64) * 2**bias.exponent if integer else value)
        return total

    neurons = {n: _neuron(graph, "forward", n) for n in phase.order if graph.population(n).kind != "input"}
    sent = {source.name: lambda step: frames[step]} if source.name in phase.order else {}
    return run(phase.time_steps, neurons, sizes, edges, sent, current, samples=len(inputs), integer=integer)


def _of(graph: Graph, synapse: Synapse) -> Matrix:
    return matrix(synapse.ops, graph.tensors, graph.population(synapse.source).shape, integer=graph.integer)


def _neuron(graph: Graph, phase: str, name: str) -> Neuron:
    dynamics = graph.phase(phase).dynamics[name]
    return Neuron(dynamics.members, dynamics.threshold, dynamics.reset, dynamics.leak * (4096 if graph.integer else 1))


def _host(graph: Graph, drive, frame: Matrix) -> Matrix:
    """What the host injects at every step; integers round half up to 13 bits behind `shift` further bits."""
    total = frame @ matrix(drive.ops, graph.tensors, graph.of_kind("input")[0].shape, integer=graph.integer).T
    total = total if drive.bias is None else total + graph.tensors[drive.bias].reshape(-1)
    if not graph.integer:
        return total
    rounded = (2 * total + 2**drive.shift) // 2 ** (drive.shift + 1)
    return np.minimum(np.maximum(rounded, -4096), 4095) * 2**drive.exponent


def masks(graph: Graph, trains: Trains) -> dict[str, Matrix]:
    """m = 1 where a neuron fired at some step but not at every one."""
    counts = {p.name: sum(trains.spikes[p.name]) for p in graph.of_kind("couple")}
    return {name: ((count > 0) & (count < graph.phase("forward").time_steps)).astype(np.int64) for name, count in counts.items()}


def backward(graph: Graph, gates: Mapping[str, Matrix], error: Matrix) -> Trains:
    """The feedback phase in model steps, from the forward connections and the neurons of the feedback phase alone: its synapses are not read.

    Populations in reverse; what leaves t reaches s through the transpose of the connection s -> t, masked where t is a couple. A float graph is one whose feedback
    phase is declared in the model's unit, before `adjoint`: y_s gains (Ab_t / A_t) W^T q. An integer graph has its units; see `_alignment`.
    """
    phase, integer = graph.phase("feedback"), graph.integer
    kinds = {p.name: p.kind for p in graph.populations}
    sizes = {p.name: size(p.shape) for p in graph.populations}
    (drive,) = phase.drive
    edges = []
    for s in graph.phase("forward").synapses:
        if kinds[s.source] not in ("couple", "linear") or kinds[s.target] not in ("couple", "linear"):
            continue
        found = _of(graph, s).T
        if integer:
            found = _aligned(found, _alignment(graph, s))
        elif kinds[s.target] == "couple":
            found = found * (phase.dynamics[s.target].reset / graph.phase("forward").dynamics[s.target].reset)
        edges.append(Edge(s.target, s.source, found, s.delay, gates[s.target] if kinds[s.target] == "couple" else None))
    scaled = error.reshape(len(error), -1) * graph.units.scale.get("feedback", {}).get(drive.population, 1.0)
    if integer:
        scaled = np.minimum(np.maximum(np.rint(scaled / 2**drive.exponent), -4096), 4095).astype(np.int64) * 2**drive.exponent
    order = [name for name in reversed(graph.phase("forward").order) if kinds[name] in ("couple", "linear")]

    def current(name: str, step: int) -> Matrix:
        return scaled if name == drive.population else np.zeros(sizes[name], np.int64 if integer else np.float64)

    neurons = {name: _neuron(graph, "feedback", name) for name in order}
    return run(phase.time_steps, neurons, sizes, edges, {}, current, samples=len(error), integer=integer)


def _alignment(graph: Graph, synapse: Synapse) -> int:
    """By how many powers of two the feedback phase shifts the integers of a forward connection.

    In the model's unit the feedback potential of s gains (Ab_t / A_t) W^T q for a spike q of a couple t, or W^T v for a relay's value v. Spikes are
    1 in integers; Ab_t and A_t are what they subtract, in each phase's unit.
    """
    source, target = synapse.source, synapse.target
    weight = _unit(graph, "forward", target) / (_unit(graph, "forward", source) if graph.population(source).kind == "linear" else 1.0)
    amplitude = 1.0
    if graph.population(target).kind == "linear":
        amplitude = 1 / _unit(graph, "feedback", target)
    elif graph.population(target).kind == "couple":
        resets = [graph.phase(phase).dynamics[target].reset / _unit(graph, phase, target) for phase in ("feedback", "forward")]
        amplitude = resets[0] / resets[1]
    shift = log2(_unit(graph, "feedback", source) * amplitude / weight)
    assert abs(shift - round(shift)) < 0.1, f"'{source}' -> '{target}' cannot be aligned by a power of two: {shift}"
    return round(shift)


def _unit(graph: Graph, phase: str, population: str) -> float:
    return graph.units.scale[phase][population]


def _aligned(found: Matrix, shift: int) -> Matrix:
    if shift >= 0:
        return found * 2**shift
    assert not (found % 2**-shift).any(), "an alignment drops bits"
    return found // 2**-shift
