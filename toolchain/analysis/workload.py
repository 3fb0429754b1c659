"""What a phase computes, counted by NeuroBench's definitions on every spike and potential of a run.

The definitions are those of Yik et al., "The NeuroBench framework for benchmarking neuromorphic computing algorithms and systems" (Nature Communications 16,
2025), as the package neurobench 2.3 computes them for torch modules; a test holds the counts here to the package's, equal. What they mean for a graph of
ternary couples is in docs/estimate.md. Counts are whole numbers, summed over the samples in float64, which is exact below 2^53.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from toolchain import codec, fixed
from toolchain.errors import GraphError
from toolchain.ir import (
    Array,
    Conv2d,
    ConvTranspose2d,
    Dense,
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
from toolchain.notation import operations, process_names, route
from toolchain.target import History, Result

Floats = npt.NDArray[np.float64]

WEIGHTED = (Dense, Conv2d, ConvTranspose2d)
"""Operations whose products count. NeuroBench counts torch's Linear and Conv layers; it leaves out transposed convolutions, which count as convolutions here."""

HOST: Final = "host"
CHIP: Final = "chip"


@dataclass(frozen=True)
class ConnectionCounts:
    """One connection in one phase; numbers a sample are means over the samples.

    name          its ends, and a number where several join the same two
    where         "chip", or "host": applied once a sample, its result injected as a current
    weights       of its tensors, each entry once; `zero_weights` of them are 0
    products      multiply-adds of one application, what padding adds left out; of the operations with weights, so 0 of a pool or a skip
    reach         weights (zero ones too) that one spike of every neuron of the source meets, all ways through the connection: `products` unless there is a pool or
                  an upsampling in it
    applied       time steps in which it is applied: of a delayed connection those whose spikes still arrive
    spiking       it carries spikes (or an input of zeros and ones), and no graded values
    acs, macs     products of what is not 0 with weights that are not 0, a sample: with spikes, and with graded values, as behind a pool (NeuroBench)
    sent          spikes (values other than 0) that it carries a sample, the last time step's too; after its gate
    met           weights that those meet, zero ones too, a sample
    rate          of the source, as `reach` weights its neurons: spikes a neuron and time step before the gate; None of the host's
    mask          share of those spikes that pass the gate; None without a gate, or without spikes
    """

    name: str
    operations: str
    where: Literal["chip", "host"]
    weights: int
    zero_weights: int
    products: int
    reach: int
    applied: int
    spiking: bool
    acs: float
    macs: float
    sent: float
    met: float
    rate: float | None
    mask: float | None

    @property
    def dense(self) -> int:
        """Products a sample, zeros counted (NeuroBench)."""
        return self.products * self.applied


@dataclass(frozen=True)
class PopulationCounts:
    """One population in one phase, a couple as one neuron. `spikes` of either sign, and `updates` of the potential, are a sample's: a time step updates a
    neuron where its potential is another than a step before, and the first step always does (NeuroBench)."""

    name: str
    kind: str
    neurons: int
    spikes: float
    updates: float


@dataclass(frozen=True)
class PhaseCounts:
    """A phase over `samples` samples; numbers a sample are sums over them, divided once.

    effective_macs       products of graded values and of spikes (`effective_acs`) that are not 0 with weights that are not 0, a sample (NeuroBench)
    activation_sparsity  share of all couples and time steps without a spike (NeuroBench)
    spikes               of couples, a sample
    membrane_updates     of couples, a sample (NeuroBench); a readout's are in `populations`
    synaptic_operations  a sample, those of `codec.synaptic_operations`, as `deploy` and `tune` print them
    """

    phase: str
    time_steps: int
    samples: int
    connections: tuple[ConnectionCounts, ...]
    populations: tuple[PopulationCounts, ...]
    effective_macs: float
    effective_acs: float
    activation_sparsity: float
    spikes: float
    membrane_updates: float
    synaptic_operations: float

    @property
    def dense(self) -> int:
        """Products a sample if nothing were 0 (NeuroBench)."""
        return sum(c.dense for c in self.connections)

    @property
    def neurons(self) -> int:
        return sum(p.neurons for p in self.populations if p.kind == "couple")

    @property
    def rate(self) -> float:
        """Spikes a couple and time step."""
        return self.spikes / (self.neurons * self.time_steps)


@dataclass(frozen=True)
class Footprint:
    """Bytes of the tensors as the graph holds them: `chip` what the chip's connections and biases read, `host` what the host reads, the same
    tensors for both phases. `potentials` counts neurons (couples and readouts), each of which keeps one."""

    chip: int
    host: int
    potentials: int

    @property
    def total(self) -> int:
        """NeuroBench's footprint: all parameters."""
        return self.chip + self.host


def footprint(graph: Graph) -> Footprint:
    """What the whole graph takes, every tensor once."""
    chip = {name for phase in graph.phases for s in phase.synapses for op in s.ops if (name := weight_of(op)) is not None}
    host = {name for phase in graph.phases for d in phase.drive for op in d.ops if (name := weight_of(op)) is not None}
    host |= {d.bias for phase in graph.phases for d in phase.drive if d.bias is not None}
    for phase in graph.phases:
        for population, biases in phase.bias.items():
            (host if graph.population(population).kind == "readout" else chip).update(bias.tensor for bias in biases)
    size = {name: int(graph.tensors[name].nbytes) for name in chip | host}
    kept = sum(prod(p.shape) for p in graph.populations if p.kind in ("couple", "readout"))
    return Footprint(sum(size[name] for name in chip), sum(size[name] for name in host - chip), kept)


def connection_sparsity(graph: Graph) -> float:
    """Share of zeros among the weights of dense and convolutional operations, each entry of each tensor once, biases left out (NeuroBench)."""
    names = {op.weight for phase in graph.phases for ops in _compositions(phase) for op in ops if isinstance(op, WEIGHTED)}
    weights, zeros = _weights(graph, sorted(names))
    return zeros / weights if weights else 0.0


def _compositions(phase: Phase) -> Iterable[Sequence[Op]]:
    yield from (synapse.ops for synapse in phase.synapses)
    yield from (drive.ops for drive in phase.drive)


def _weights(graph: Graph, names: Iterable[str]) -> tuple[int, int]:
    """How many weights the tensors have, and how many of them are 0."""
    tensors = [graph.tensors[name] for name in names]
    return sum(int(t.size) for t in tensors), sum(int((t == 0).sum()) for t in tensors)


def arriving(phase: Phase, synapse: Synapse) -> int:
    """How many of its source's time steps, from the first on, send spikes that arrive no later than the target's last step: what arrives after it changes nothing."""
    timing = phase.timing
    last = timing.start.get(synapse.target, 0) + (phase.time_steps - 1) * timing.period
    room = last - synapse.delay - timing.start.get(synapse.source, 0)
    return max(0, min(phase.time_steps, room // timing.period + 1))


class Tally:
    """Adds a phase up, a piece of the data set at a time. The results need their history (`trace=True`); with `history=False` they need none, and `acs`, `macs`
    and `updates` are NaN: spikes, what they meet and SPIDE's energies need no more."""

    def __init__(self, graph: Graph, phase: str, *, history: bool = True) -> None:
        self._graph, self._history = graph, history
        self._phase = graph.phase(phase)
        self._samples = 0
        self._operations = 0.0
        self._fan_outs = codec.weights_met(graph, self._phase)
        entry = graph.of_kind("input")[0].name
        names = [name.removesuffix(f" ({phase})") for name in process_names(self._phase.synapses, phase)]
        self._carriers = [
            _Carrier(graph, f"{entry} -> {drive.population}", drive.ops, entry, drive.population, HOST, 1, None)
            for drive in self._phase.drive
            if drive.source == "input"
        ]
        self._carriers += [
            _Carrier(graph, name, s.ops, s.source, s.target, CHIP, arriving(self._phase, s), s.gate)
            for name, s in zip(names, self._phase.synapses, strict=True)
        ]
        self._spikes = dict.fromkeys(self._phase.order, 0)
        self._updates = dict.fromkeys(self._phase.order, 0.0)

    def see(self, result: Result, *, images: Array | None = None, forward: Result | None = None) -> None:
        """Add samples: the `images` of a forward phase, the `forward` result of a feedback phase."""
        graph = self._graph
        if self._history and not result.history:
            raise GraphError("counts need every spike and potential: run the target with trace=True")
        encoded = None if images is None else codec.encode_input(graph, codec.check_inputs(graph, images))
        masks = {}
        if forward is not None:
            masks = {gate: codec.mask(graph, forward, gate) for s in self._phase.synapses if (gate := s.gate) is not None}
        samples = len(next(iter(result.activity.values())))
        self._samples += samples
        self._operations += float(codec.synaptic_operations(graph, result, inputs=images, forward=forward, fan_outs=self._fan_outs).sum())
        for carrier in self._carriers:
            carrier.see(result, encoded, masks, self._phase.time_steps, history=self._history)
        for name in self._phase.order:
            if graph.population(name).kind == "input":
                continue
            self._spikes[name] += int(result.activity[name].sum(dtype=np.int64))
            self._updates[name] += _updates(result.history[name]) if self._history else np.nan

    def counts(self) -> PhaseCounts:
        """Everything seen so far."""
        graph, samples = self._graph, self._samples
        populations = tuple(
            PopulationCounts(name, kind, prod(graph.population(name).shape), self._spikes[name] / samples, self._updates[name] / samples)
            for name in self._phase.order
            if (kind := graph.population(name).kind) in ("couple", "readout")
        )
        steps = self._phase.time_steps
        couples = [p.name for p in populations if p.kind == "couple"]
        products = [carrier.effective() for carrier in self._carriers]
        spikes, chances = (
            sum(self._spikes[name] for name in couples),
            samples * steps * sum(p.neurons for p in populations if p.kind == "couple"),
        )
        return PhaseCounts(
            phase=self._phase.name,
            time_steps=steps,
            samples=samples,
            connections=tuple(carrier.counts(samples, steps) for carrier in self._carriers),
            populations=populations,
            effective_macs=sum(macs for _, macs in products) / samples,
            effective_acs=sum(acs for acs, _ in products) / samples,
            activation_sparsity=(chances - spikes) / chances,
            spikes=spikes / samples,
            membrane_updates=sum(self._updates[name] for name in couples) / samples,
            synaptic_operations=self._operations / samples,
        )


class _Stage:
    """One weighted operation of a connection: what comes before it, and how many weights each value that it takes meets."""

    def __init__(self, graph: Graph, ops: Sequence[Op], place: int, shapes: Sequence[Shape], spikes: bool) -> None:
        self.before, self.takes = tuple(ops[:place]), shapes[place]
        self.spikes = spikes and all(isinstance(op, Identity) or (isinstance(op, Upsample) and not op.transpose) for op in self.before)
        op = ops[place]
        self.present = fan_out(graph, (op,), shapes[place], shapes[place + 1], zeros=False)
        self.products = int(fan_out(graph, (op,), shapes[place], shapes[place + 1], zeros=True).sum())


def fan_out(graph: Graph, ops: Sequence[Op], source: Shape, target: Shape, *, zeros: bool) -> Floats:
    """How many weights one value of each neuron of the source meets, (neurons,): all ways through the composition, weights of 0 counted where `zeros`.
    Windows that reach beyond the image meet fewer."""
    names = [name for op in ops if (name := weight_of(op)) is not None]
    one = {name: (np.ones(graph.tensors[name].shape) if zeros else (graph.tensors[name] != 0).astype(np.float64)) for name in names}
    plain = fixed.summed([msgspec.structs.replace(op, factor=1.0) if isinstance(op, Scale) else op for op in ops])
    made = fixed.apply(adjoint(plain), one, np.ones((1, *target)), source, integer=False)
    return np.asarray(made.reshape(-1), np.float64)


class _Carrier:
    """A connection, and what it has carried so far."""

    def __init__(
        self,
        graph: Graph,
        name: str,
        ops: Sequence[Op],
        source: str,
        target: str,
        where: Literal["chip", "host"],
        applied: int,
        gate: str | None,
    ) -> None:
        self._graph, self._name, self._ops, self._source, self._where = graph, name, tuple(ops), source, where
        self._applied, self._gate = applied, gate
        kind, shapes = graph.population(source).kind, route(graph, ops, graph.population(source).shape, graph.population(target).shape)
        places = [i for i, op in enumerate(ops) if isinstance(op, WEIGHTED)]
        self._stages = [_Stage(graph, ops, place, shapes, kind == "couple") for place in places]
        self._reach = fan_out(graph, ops, graph.population(source).shape, graph.population(target).shape, zeros=True)
        self._binary = True  # an input whose values are all 0 or 1
        self._effective = [0.0] * len(self._stages)
        self._sent = self._met = self._ungated = 0.0

    def see(
        self, result: Result, encoded: Array | None, masks: dict[str, npt.NDArray[np.bool_]], time_steps: int, *, history: bool
    ) -> None:
        if self._graph.population(self._source).kind == "input":
            self._see_input(encoded, time_steps)
            return
        mask = None if self._gate is None else masks[self._gate]
        if history:
            values = result.history[self._source].spikes[: self._applied]
            gated = values if mask is None else values * mask
            self._meet(gated.reshape(-1, *gated.shape[2:]), 1)
        else:
            self._effective = [np.nan] * len(self._stages)
        activity = result.activity[self._source].astype(np.float64)
        self._ungated += float(_neurons(activity) @ self._reach)
        self._send(activity if mask is None else activity * mask)

    def _see_input(self, encoded: Array | None, time_steps: int) -> None:
        """The host's connection works once on each value, the chip's at every time step."""
        if encoded is None:
            raise GraphError(f"'{self._source}' sends: give the images to count its connections")
        full = self._graph.scale("forward", self._source)
        self._binary = self._binary and bool(((encoded == 0) | (encoded == full)).all())
        events = self._graph.population(self._source).events
        values = np.moveaxis(encoded, -1, 0)[: self._applied] if events else encoded[None]
        repeated = 1 if events else self._applied
        self._meet(values.reshape(-1, *values.shape[2:]), repeated)
        if self._where == CHIP:
            sent = (encoded != 0).sum(axis=-1) if events else (encoded != 0) * time_steps
            self._ungated += float(_neurons(sent) @ self._reach)
            self._send(sent)
        else:
            self._send(encoded != 0)

    def _meet(self, values: Array, times: int) -> None:
        """Effective products of `values` (batch, *source), of any time steps and samples, each sent so many `times`."""
        for number, stage in enumerate(self._stages if len(values) else ()):
            taken = values
            if stage.before:
                taken = fixed.apply(stage.before, self._graph.tensors, values, stage.takes, integer=self._graph.integer)
            nonzero = np.count_nonzero(taken.reshape(len(taken), -1), axis=0)
            self._effective[number] += times * float(nonzero @ stage.present)

    def _send(self, sent: Array) -> None:
        self._sent += float(sent.sum())
        self._met += float(_neurons(sent) @ self._reach)

    def effective(self) -> tuple[float, float]:
        """Additions and products of what is not 0, over all samples."""
        input = self._graph.population(self._source).kind == "input"
        spiking = [self._binary and not stage.before if input else stage.spikes for stage in self._stages]
        found = list(zip(self._effective, spiking, strict=True))
        return sum((number for number, spikes in found if spikes), 0.0), sum((number for number, spikes in found if not spikes), 0.0)

    def counts(self, samples: int, time_steps: int) -> ConnectionCounts:
        names = [name for op in self._ops if (name := weight_of(op)) is not None]
        weights, zeros = _weights(self._graph, dict.fromkeys(names))
        reach, input = int(self._reach.sum()), self._graph.population(self._source).kind == "input"
        acs, macs = self.effective()
        whole = reach * time_steps * samples
        return ConnectionCounts(
            name=self._name,
            operations=operations(self._graph, self._ops),
            where=self._where,
            weights=weights,
            zero_weights=zeros,
            products=sum(stage.products for stage in self._stages),
            reach=reach,
            applied=self._applied,
            spiking=self._binary if input else self._graph.population(self._source).kind == "couple",
            acs=acs / samples,
            macs=macs / samples,
            sent=self._sent / samples,
            met=self._met / samples,
            rate=None if self._where == HOST or not whole else self._ungated / whole,
            mask=None if self._gate is None or not self._ungated else self._met / self._ungated,
        )


def _updates(history: History) -> int:
    """Neurons and steps whose potential is another than a step before, the first step's all."""
    potentials = history.potentials
    return int(potentials[0].size) + int(np.count_nonzero(potentials[1:] != potentials[:-1]))


def _neurons(values: Array) -> Floats:
    """What each neuron sent, over all samples, (neurons,)."""
    total: Floats = values.reshape(len(values), -1).sum(axis=0, dtype=np.float64)
    return total
