"""What share of a network's weights a set of runs exercised: a weight that nothing met could be wrong on one target without anybody seeing it.

A weight of a synapse counts as exercised where, in some sample and step, a value other than 0 met it (a spike after its gate, a graded input, a relay's value) in time
to reach its target neuron, whose potentials of that sample were compared and did not saturate. A weight or bias that the host applies counts where one more and
one less in its last place would both have changed an injected current: the host rounds exact sums to 13 bits, so most changes of a last place vanish there. A bias on
the chip counts where it started and its neuron did not saturate. Entries of 0 are weights too. Weights that no value can ever meet (a kernel's entry that lies in
the padding at every place, a delay longer than the phase) are not reachable, and stand apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain import codec, fixed, probing
from toolchain.ir import (
    Array,
    AvgPool2d,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Drive,
    Graph,
    Identity,
    Op,
    Phase,
    Scale,
    Shape,
    Synapse,
    Upsample,
    adjoint,
    weight_of,
)
from toolchain.notation import route
from toolchain.target import Result

Mask = npt.NDArray[np.bool_]

STAGES = ("images", "probes", "variants")
"""What was run, in this order; each counts what the ones before it exercised too."""

GATE_STATES = ("open", "closed by silence", "closed by firing at every step")
"""What a mask m = 1[0 < spike count < T] can be, and why."""

SINGLE_WEIGHTS = 4096
"""Up to so many weights of a host connection that is no dense one and no convolution are tried one by one; of larger ones none counts."""

HOST_SAMPLES = 64
"""Samples of one run whose host sums are looked at."""


@dataclass(frozen=True)
class Exercised:
    """The weights of one connection, or the biases of one population, in one phase. `where` is a synapse `a -> b`, `host -> b`, or `bias of b`; `exercised` counts by
    stage, each with those before it."""

    phase: str
    where: str
    tensor: str
    weights: int
    reachable: int
    exercised: dict[str, int]


@dataclass(frozen=True)
class Coverage:
    """All rows, and how many of the couple populations' thresholds (by phase) were met exactly and missed by one in some sample of a variant. `gates`: by population whose
    mask gates the feedback phase, which of `GATE_STATES` spikes of it met there; `saturations`: how many there were, on the first target."""

    rows: tuple[Exercised, ...]
    thresholds: int
    thresholds_met: int
    gates: dict[str, tuple[str, ...]] = field(default_factory=dict)
    saturations: int = 0

    def total(self, stage: str, phase: str | None = None) -> tuple[int, int]:
        """Exercised weights up to `stage`, and reachable ones."""
        rows = [row for row in self.rows if phase in (None, row.phase)]
        return sum(row.exercised[stage] for row in rows), sum(row.reachable for row in rows)

    @property
    def last(self) -> str:
        """The last stage that was run."""
        return list(self.rows[0].exercised)[-1] if self.rows else STAGES[0]

    @property
    def share(self) -> float:
        """Exercised weights over reachable ones, all stages."""
        found, of = self.total(self.last)
        return found / of if of else 1.0

    def to_json(self) -> dict[str, Any]:
        stages = list(self.rows[0].exercised) if self.rows else []
        return {
            "share": self.share,
            "weights": sum(row.weights for row in self.rows),
            "reachable": self.total(self.last)[1] if self.rows else 0,
            "exercised": {stage: self.total(stage)[0] for stage in stages},
            "thresholds": self.thresholds,
            "thresholds_met": self.thresholds_met,
            "gates": {name: list(states) for name, states in self.gates.items()},
            "saturations": self.saturations,
            "connections": [
                {
                    "phase": row.phase,
                    "where": row.where,
                    "tensor": row.tensor,
                    "weights": row.weights,
                    "reachable": row.reachable,
                    "exercised": row.exercised,
                }
                for row in self.rows
            ],
        }


@dataclass
class _Entry:
    """One weight tensor at one place of the graph. `up` and `down` are equal but for the host's: there a change by one has to be seen both ways."""

    phase: str
    where: str
    tensor: str
    reachable: Mask
    up: Mask
    down: Mask
    exercised: dict[str, int] = field(default_factory=dict)


class Counter:
    """Counts while runs are compared: `see` results of the graph or of a variant of it (same populations and connections), `mark` the end of a stage."""

    def __init__(self, graph: Graph, phases: Sequence[str]) -> None:
        self._entries: dict[tuple[str, str, int, int], _Entry] = {}
        self._kinds = {population.name: population.kind for population in graph.populations}
        gated = [s.gate for name in phases if name == "feedback" for s in graph.phase(name).synapses if s.gate is not None]
        self._gates: dict[str, set[str]] = {name: set() for name in gated}
        self._saturations = 0
        for name in phases:
            phase = graph.phase(name)
            for i, synapse in enumerate(phase.synapses):
                self._enter_synapse(graph, phase, i, synapse)
            for i, drive in enumerate(phase.drive):
                self._enter_drive(graph, phase, i, drive)
            for population, biases in phase.bias.items():
                if self._kinds[population] != "readout":  # the host adds a readout's to the logits
                    for i, bias in enumerate(biases):
                        acts = np.full(graph.population(population).shape, bias.start < phase.time_steps)
                        self._enter((name, f"bias of {population}", i, 0), bias.tensor, acts)

    def _enter(self, key: tuple[str, str, int, int], tensor: str, reachable: Mask) -> None:
        blank = np.zeros(reachable.shape, np.bool_)
        self._entries[key] = _Entry(key[0], key[1], tensor, reachable, blank, blank.copy())

    def _enter_synapse(self, graph: Graph, phase: Phase, i: int, synapse: Synapse) -> None:
        source, target = graph.population(synapse.source).shape, graph.population(synapse.target).shape
        possible = probing.steps_in_time(phase, synapse) > 0 and not (synapse.gate is not None and graph.phase("forward").time_steps == 1)
        for k, op in enumerate(synapse.ops):
            name = weight_of(op)
            if name is not None:
                met = _met(graph, synapse.ops, k, [np.ones((1, *source))], np.ones((1, *target), np.bool_))
                self._enter((phase.name, f"{synapse.source} -> {synapse.target}", i, k), name, met & possible)

    def _enter_drive(self, graph: Graph, phase: Phase, i: int, drive: Drive) -> None:
        source, target = graph.of_kind("input"), graph.population(drive.population).shape
        if drive.source != "input":
            return
        for k, op in enumerate(drive.ops):
            name = weight_of(op)
            if name is not None:
                met = _met(graph, drive.ops, k, [np.ones((1, *source[0].shape))], np.ones((1, *target), np.bool_))
                self._enter((phase.name, f"host -> {drive.population}", i, k), name, met)
        if drive.bias is not None:
            self._enter((phase.name, f"host's bias of {drive.population}", i, -1), drive.bias, np.ones(target, np.bool_))

    def see(self, graph: Graph, result: Result, inputs: Array, forward: Result, compared: Sequence[str]) -> None:
        """Count what one phase exercised. `inputs` are those of the forward phase, `forward` its result; `compared` names the populations whose potentials were."""
        phase = graph.phase(result.phase)
        self._saturations += sum(int(counted.sum()) for counted in result.saturations.values())
        self._see_gates(graph, result, forward)
        seen = {name: (result.saturations[name] == 0) & (name in compared) for name in result.saturations}
        encoded = codec.encode_input(graph, codec.check_inputs(graph, inputs)) if phase.name == "forward" else None
        for (name, where, i, k), entry in self._entries.items():
            if name != phase.name or bool((entry.up & entry.down).sum() == entry.reachable.sum()):
                continue
            if where.startswith("bias of "):
                visible = seen[where.removeprefix("bias of ")].any(axis=0) & entry.reachable
                entry.up |= visible
                entry.down |= visible
            elif where.startswith("host"):
                assert encoded is not None  # only the forward phase has such drives
                _see_host(graph, phase.drive[i], k, entry, encoded[:HOST_SAMPLES], seen[phase.drive[i].population][:HOST_SAMPLES])
            else:
                synapse = phase.synapses[i]
                values = _delivered(graph, phase, synapse, result, encoded, forward)
                if values:
                    met = _met(graph, synapse.ops, k, values, seen[synapse.target]) & entry.reachable
                    entry.up |= met
                    entry.down |= met

    def _see_gates(self, graph: Graph, result: Result, forward: Result) -> None:
        """Which states of a gate a spike met that was sent in time to be heard."""
        phase, steps = graph.phase(result.phase), graph.phase("forward").time_steps
        for synapse in phase.synapses:
            if synapse.gate is None:
                continue
            sent = (result.history[synapse.source].spikes[: probing.steps_in_time(phase, synapse)] != 0).any(axis=0)
            silent, full = forward.counts[synapse.gate] == 0, forward.counts[synapse.gate] == steps
            for state, mask in zip(GATE_STATES, (~silent & ~full, silent, full), strict=True):
                if (sent & mask).any():
                    self._gates[synapse.gate].add(state)

    def mark(self, stage: str) -> None:
        """All that was seen so far belongs to `stage` or one before."""
        for entry in self._entries.values():
            entry.exercised[stage] = int((entry.up & entry.down).sum())

    def found(self, thresholds: int = 0, met: int = 0) -> Coverage:
        rows = (
            Exercised(e.phase, e.where, e.tensor, e.reachable.size, int(e.reachable.sum()), dict(e.exercised))
            for e in self._entries.values()
        )
        gates = {name: tuple(state for state in GATE_STATES if state in found) for name, found in self._gates.items()}
        return Coverage(tuple(rows), thresholds, met, gates, self._saturations)


def _delivered(graph: Graph, phase: Phase, synapse: Synapse, result: Result, encoded: Array | None, forward: Result) -> list[Array]:
    """What a synapse's source sent, a step an item (samples, *shape): those that arrive in time, gated. Steps are joined where no sum of theirs can cancel."""
    steps = probing.steps_in_time(phase, synapse)
    if graph.population(synapse.source).kind == "input":
        assert encoded is not None  # only the forward phase has inputs
        values = np.moveaxis(encoded, -1, 0)[:steps] if graph.population(synapse.source).events else encoded[None][: min(steps, 1)]
    else:
        values = result.history[synapse.source].spikes[:steps]
    if len(values) == 0:
        return []
    gate = True if synapse.gate is None else codec.mask(graph, forward, synapse.gate)
    weights = [k for k, op in enumerate(synapse.ops) if weight_of(op) is not None]
    signless = graph.population(synapse.source).kind == "input" or phase.dynamics[synapse.source].members == "plus"
    if weights == [0] or (len(weights) == 1 and signless):
        return [(values != 0).any(axis=0) & gate]
    return [step * gate for step in values]


def _met(graph: Graph, ops: Sequence[Op], k: int, steps: Sequence[Array], seen: Mask) -> Mask:
    """Which weights of operation `k` met a value of `steps` (samples, *source) on the way to a neuron of `seen` (samples, *target)."""
    source, target = steps[0].shape[1:], seen.shape[1:]
    shapes = route(graph, ops, source, target)
    into, made = shapes[k], shapes[k + 1]
    arrived = np.zeros((len(seen), *into), np.bool_)
    for values in steps:
        before = fixed.apply(ops[:k], graph.tensors, values, into, integer=True) if k else values
        arrived |= before.reshape(arrived.shape) != 0
    present = {name: (graph.tensors[name] != 0).astype(np.float64) for op in ops[k + 1 :] if (name := weight_of(op)) is not None}
    after = _plain(ops[k + 1 :])
    back = fixed.apply(adjoint(after), present, seen, made, integer=False) if after else seen
    reaching = back.reshape(len(seen), *made) != 0
    if reaching.all():  # one image of all samples says the same
        arrived, reaching = arrived.any(axis=0, keepdims=True), reaching[:1]
    return _weights_between(graph, ops[k], arrived, reaching)


def _plain(ops: Sequence[Op]) -> tuple[Op, ...]:
    """Operations in floats without factors that could be 0 in a float."""
    return fixed.summed([Scale(weight=op.weight) if isinstance(op, Scale) else op for op in ops])


def _weights_between(graph: Graph, op: Op, arrived: Mask, reaching: Mask) -> Mask:
    """The weights of `op` between values that arrived (samples, *into) and neurons that are looked at (samples, *made), in the shape of its tensor."""
    weight = graph.tensors[str(weight_of(op))]
    if isinstance(op, Scale):
        found: Mask = (arrived & reaching).any(axis=(0, *range(2, arrived.ndim)))
        return found
    into, made = arrived.astype(np.float32), reaching.astype(np.float32)
    if isinstance(op, Dense):
        rows, columns = (into, made) if op.transpose else (made, into)
        return np.asarray(rows.reshape(len(rows), -1).T @ columns.reshape(len(columns), -1) > 0)
    if not isinstance(op, (Conv2d, ConvTranspose2d)):
        raise TypeError(f"{type(op).__name__} has no weight")
    gathers = isinstance(op, Conv2d) != op.transpose  # a window for each value that it makes, else for each that it takes
    windows, images = (made, into) if gathers else (into, made)
    grid = fixed.Grid(op.stride, op.padding, op.dilation, op.groups)
    return np.asarray(fixed.window_products(windows, images, weight.shape[2:], grid) > 0)


def _see_host(graph: Graph, drive: Drive, k: int, entry: _Entry, encoded: Array, seen: Mask) -> None:
    """Host weights whose change by one, up or down, changes an injected current: what they are multiplied with has to carry the cut bits over an edge."""
    rest = probing.host_rest(graph, drive, encoded)
    never = np.int64(2**62)
    needed = (
        np.where(rest.inside & seen, (1 << drive.shift) - rest.low_bits, never),
        np.where(rest.inside & seen, rest.low_bits + 1, never),
    )
    if k == -1:
        entry.up |= (needed[0] <= 1).any(axis=0)
        entry.down |= (needed[1] <= 1).any(axis=0)
        return
    for mask, need in zip((entry.up, entry.down), needed, strict=True):
        for sample in range(len(encoded)):
            if (mask == entry.reachable).all():
                break
            if (need[sample] < never).any():
                mask |= _carried(graph, drive, k, encoded[sample : sample + 1], need[sample], entry.reachable)


def _carried(graph: Graph, drive: Drive, k: int, encoded: Array, need: Array, reachable: Mask) -> Mask:
    """The weights of operation `k` of a host connection that one sample multiplies with at least what some neuron needs, in the shape of the tensor."""
    ops, op = drive.ops, drive.ops[k]
    shapes = route(graph, ops, encoded.shape[1:], need.shape)
    values = fixed.apply(ops[:k], graph.tensors, encoded, shapes[k], integer=True).reshape(1, *shapes[k]) if k else encoded
    behind = all(isinstance(o, (Identity, AvgPool2d, Upsample)) for o in ops[k + 1 :])
    if isinstance(op, Dense) and k == len(ops) - 1 and not op.transpose:
        return np.asarray(values.reshape(1, -1) >= need.reshape(-1, 1))
    if isinstance(op, Conv2d) and behind and not op.transpose:
        return _carried_by_windows(ops[k + 1 :], op, graph.tensors[op.weight].shape, values, shapes[k + 1], need.reshape(shapes[-1]))
    if reachable.size > SINGLE_WEIGHTS:
        return np.zeros(reachable.shape, np.bool_)
    found = np.zeros(reachable.shape, np.bool_)
    for i in np.flatnonzero(reachable):
        one = np.zeros(reachable.size, np.int64)
        one[i] = 1
        tensors = {**graph.tensors, str(weight_of(op)): one.reshape(reachable.shape)}
        found.reshape(-1)[i] = bool((fixed.apply(ops[k:], tensors, values, need.shape, integer=True)[0] >= need).any())
    return found


def _carried_by_windows(after: Sequence[Op], op: Conv2d, kernel: Shape, values: Array, made: Shape, need: Array) -> Mask:
    """`_carried` for a convolution: each input channel by itself, seen through each place of the kernel, and through what sums windows or spreads values behind it."""
    out, into, height, width = kernel
    each = np.eye(height * width, dtype=np.int64).reshape(-1, 1, height, width)
    grid = fixed.Grid(op.stride, op.padding, op.dilation, 1)
    found = np.zeros((out, into, height * width), np.bool_)
    per_group = out // op.groups
    for channel in range(values.shape[1]):
        patches = fixed.convolve(values[:, channel : channel + 1], each, grid, (height * width, *made[1:]))
        shape = (height * width, *need.shape[1:])
        moved = (fixed.apply(after, {}, patches, shape, integer=True) if after else patches)[0].reshape(height * width, -1)
        group, within = divmod(channel, into)
        for o in range(group * per_group, (group + 1) * per_group):
            found[o, within] = (moved >= need[o].reshape(1, -1)).any(axis=1)
    return found.reshape(kernel)
