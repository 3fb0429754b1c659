"""`sim` on a CPU by the compiled core (`toolchain.native.phases`): a phase becomes one plan, samples are shared out among threads, results are read back."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from toolchain import codec, native
from toolchain.errors import ToolchainError
from toolchain.fixed import INT32_SAFE, decay, largest_constant, largest_total
from toolchain.ir import DECAY_ONE, Array, Drive, Graph, Identity, Phase, Synapse
from toolchain.native import phases
from toolchain.native.phases import HostPlan, PhasePlan, PopulationPlan, SynapsePlan
from toolchain.target import History, Latch, Result
from toolchain.targets.sim_plans import Connection, Layout, Plan, Unfit, layout

KINDS = {"plus": phases.PLUS, "both": phases.BOTH, "none": phases.READOUT, "graded": phases.RELAY}
AT_A_TIME = 2**27
"""Steps of neurons in one call of the core, about a tenth of a second, unless a single sample has more."""

LARGEST_SUM = 2**62
"""Sums of 64 bits hold whatever stays below."""

LARGEST_SIZE = 2**28
"""Most neurons of a population, padded."""

LARGEST_RING = 2**28
"""Most neurons of a population times the steps for which its spikes are kept."""


class PhaseLayout:
    """One phase of a graph as the core takes it, without samples. Unfit where it cannot."""

    def __init__(self, graph: Graph, phase: Phase, *, currents: str, instructions: int) -> None:
        self.graph, self.phase = graph, phase
        self.layouts = {name: layout(graph.population(name)) for name in phase.order}
        self._currents, self._instructions = currents, instructions
        ranks = {name: rank for rank, name in enumerate(phase.order)}
        self.synapses = sorted(phase.synapses, key=lambda s: ranks[s.target])
        self._synapses = [self._synapse(synapse, ranks) for synapse in self.synapses]
        self._populations = [self._population(name) for name in phase.order]
        hosts = {drive.population: self._host(drive, ranks) for drive in phase.drive if drive.source == "input"}
        self._hosts = [made for made in hosts.values() if made is not None]
        self.computed = frozenset(name for name, made in hosts.items() if made is not None)
        self.taken = np.zeros((len(self.synapses), 2), np.int64)

    def _synapse(self, synapse: Synapse, ranks: Mapping[str, int]) -> Plan:
        source = self.graph.population(synapse.source)
        dynamics = self.phase.dynamics.get(synapse.source)
        way = Connection(
            self.graph,
            synapse.ops,
            self.layouts[synapse.source],
            self.layouts[synapse.target],
            graded=source.kind != "couple",
            signed=dynamics is None or dynamics.members != "plus",
        )
        made = way.laid(self._currents, self._instructions)
        made.plan.source, made.plan.target = ranks[synapse.source], ranks[synapse.target]
        made.plan.delay = synapse.delay
        made.plan.still = int(source.kind == "input" and not source.events)
        return made

    def _population(self, name: str) -> Plan:
        graph, phase, found = self.graph, self.phase, self.graph.population(name)
        dynamics, place = phase.dynamics.get(name), self.layouts[name]
        longest = max((s.delay for s in phase.synapses if s.source == name), default=0)
        slots = longest // phase.timing.period + 1
        if place.size > LARGEST_SIZE or place.size * slots > LARGEST_RING:
            raise Unfit(f"population '{name}' with its delays is too large")
        plan = PopulationPlan(
            kind=phases.INPUT if found.kind == "input" or dynamics is None else KINDS[dynamics.members],
            channels=place.channels,
            places=place.places,
            lanes=place.lanes,
            start=phase.timing.start.get(name, 0),
            slots=slots,
            keep=DECAY_ONE,
            frames=phase.time_steps if found.events else 1,
            neurons=prod(place.shape),
            size=place.size,
            leak=1,
        )
        made = Plan(plan)
        into = [i for i, synapse in enumerate(self.synapses) if synapse.target == name]
        if into:
            plan.first_in, plan.last_in = into[0], into[-1] + 1
        if found.kind == "input" or dynamics is None:
            return made
        largest = largest_total(graph, phase, name)
        if largest_constant(graph, phase, name) > INT32_SAFE or largest >= LARGEST_SUM:
            raise Unfit(f"what population '{name}' adds up can reach {largest:,}")
        plan.wide = int(largest > INT32_SAFE)
        plan.threshold, plan.reset, plan.leak = int(dynamics.threshold), int(dynamics.reset), dynamics.leak
        plan.keep = DECAY_ONE if dynamics.leak == 1 else DECAY_ONE - decay(dynamics.leak)
        biases = codec.bias_currents(graph, phase).get(name, [])
        if biases:
            plan.biases = len(biases)
            made.point("bias", place.packed(np.stack([current for _, current in biases]), np.int32))
            made.point("bias_start", np.array([start for start, _ in biases], np.int32))
        return made

    def _host(self, drive: Drive, ranks: Mapping[str, int]) -> Plan | None:
        """The host's connection by the core's wide sums; None where they cannot hold it."""
        (source,) = self.graph.of_kind("input")
        target = self.layouts[drive.population]
        if source.events:
            return None
        try:
            way = Connection(self.graph, drive.ops or (Identity(),), layout(source), target, graded=True, signed=True).laid("events", 0)
        except Unfit:
            return None
        way.plan.target = ranks[drive.population]
        place = layout(source)
        made = Plan(HostPlan(way=way.plan, channels=place.channels, places=place.places, shift=drive.shift, exponent=drive.exponent))
        made.parts = (way,)
        if drive.bias is not None:
            made.point("bias", target.packed(self.graph.tensors[drive.bias][None].astype(np.int64), np.int64))
        return made

    def run(
        self, samples: int, encoded: Array | None, drives: Mapping[str, Array], masks: Mapping[str, Array], threads: int, trace: bool
    ) -> Result:
        """All `samples`. `encoded` is what inputs emit, drives and masks are (samples, *shape) by population."""
        phase, order = self.phase, self.phase.order
        self._check(samples, encoded, drives, masks)
        try:
            outputs = {name: Output(self, name, samples, trace) for name in order if self._plan(name).kind != phases.INPUT}
        except MemoryError:
            raise ToolchainError(f"there is not enough memory for the results of {samples:,} samples: run fewer at a time") from None
        values = None if encoded is None else np.ascontiguousarray(encoded.reshape(samples, -1), np.int32)
        currents = {name: self.layouts[name].packed(drive, np.int32) for name, drive in drives.items()}
        gates = self._gates(masks)
        populations = (PopulationPlan * len(order))(*(made.plan for made in self._populations))
        for plan, name in zip(populations, order, strict=True):
            plan.values = None if values is None or plan.kind != phases.INPUT else values.ctypes.data
            plan.drive = currents[name].ctypes.data if name in currents else None
            if name in outputs:
                outputs[name].point(plan)
        synapses = (SynapsePlan * max(1, len(self.synapses)))(*(made.plan for made in self._synapses))
        for i, gate in enumerate(gates):
            synapses[i].taken = self.taken[i].ctypes.data
            synapses[i].mask = None if gate is None else gate.ctypes.data
        hosts = (HostPlan * max(1, len(self._hosts)))(*(made.plan for made in self._hosts))
        for host in hosts:
            host.values = None if values is None else values.ctypes.data
        plan = PhasePlan(
            samples=samples,
            time_steps=phase.time_steps,
            period=phase.timing.period,
            ticks=phase.ticks - phase.timing.flush,
            n_populations=len(order),
            n_synapses=len(self.synapses),
            n_hosts=len(self._hosts),
            populations=populations,
            synapses=synapses,
            hosts=hosts,
        )
        steps = phase.time_steps * sum(made.plan.size for made in self._populations)
        at_most = max(1, AT_A_TIME // steps)
        native.in_pieces(
            samples, threads, lambda first, last: phases.run(plan, first, last, instructions=self._instructions), at_most=at_most
        )
        return _result(phase, outputs)

    def _gates(self, masks: Mapping[str, Array]) -> list[Array | None]:
        """Each synapse's mask as its source lies in memory, the same one once."""
        packed: dict[tuple[str, Layout], Array] = {}
        found: list[Array | None] = []
        for synapse in self.synapses:
            key = synapse.gate or "", self.layouts[synapse.source]
            if synapse.gate is not None and key not in packed:
                packed[key] = key[1].packed(masks[synapse.gate], np.uint8)
            found.append(packed.get(key))
        return found

    def _check(self, samples: int, encoded: Array | None, drives: Mapping[str, Array], masks: Mapping[str, Array]) -> None:
        """ToolchainError unless everything has one entry a sample and neuron."""
        frames = (self.phase.time_steps,)
        for source in self.graph.of_kind("input"):
            if source.name in self.phase.order or self._hosts:
                shape = (samples, *source.shape, *(frames if source.events else ()))
                if encoded is None or encoded.shape != shape:
                    raise ToolchainError(f"the input needs shape {shape} and has {None if encoded is None else encoded.shape}")
        for name, array in drives.items():
            if array.shape != (samples, *self.layouts[name].shape):
                raise ToolchainError(
                    f"what population '{name}' gets needs shape {(samples, *self.layouts[name].shape)} and has {array.shape}"
                )
        for drive in self.phase.drive:
            if drive.population not in drives and drive.population not in self.computed:
                raise ToolchainError(f"population '{drive.population}' needs its current")
        for synapse in self.synapses:
            mask = None if synapse.gate is None else masks.get(synapse.gate)
            if synapse.gate is not None and (mask is None or mask.size != samples * prod(self.layouts[synapse.source].shape)):
                raise ToolchainError(
                    f"synapse '{synapse.source}' -> '{synapse.target}' needs a mask of '{synapse.gate}' as large as its source"
                )

    def _plan(self, name: str) -> PopulationPlan:
        made: PopulationPlan = self._populations[self.phase.order.index(name)].plan
        return made


class Output:
    """The arrays that a population's results go to, (samples, *shape)."""

    def __init__(self, laid: PhaseLayout, name: str, samples: int, trace: bool) -> None:
        dynamics = laid.phase.dynamics[name]
        shape = (samples, *laid.layouts[name].shape)
        self.spikes = dynamics.members in ("plus", "both")
        relay = dynamics.members == "graded"
        self.counts = np.zeros(shape, np.int64 if relay else np.int32)
        self.activity = np.zeros(shape, np.int32) if dynamics.members in ("both", "graded") else None
        self.weighted = np.zeros(shape) if self.spikes and dynamics.leak != 1 else None
        self.potentials = np.zeros(shape, np.int64)
        self.saturations = np.zeros(shape, np.int32)
        steps = (laid.phase.time_steps, *shape)
        self.history = History(np.zeros(steps, np.int64 if relay else np.int8), np.zeros(steps, np.int64)) if trace else None

    def point(self, plan: PopulationPlan) -> None:
        plan.counts, plan.potentials, plan.saturations = (a.ctypes.data for a in (self.counts, self.potentials, self.saturations))
        plan.activity = None if self.activity is None else self.activity.ctypes.data
        plan.traces = None if self.weighted is None else self.weighted.ctypes.data
        if self.history is not None:
            plan.history_spikes, plan.history_potentials = self.history.spikes.ctypes.data, self.history.potentials.ctypes.data


def _result(phase: Phase, outputs: Mapping[str, Output]) -> Result:
    return Result(
        phase=phase.name,
        time_steps=phase.time_steps,
        counts={name: o.counts for name, o in outputs.items()},
        activity={name: _activity(o) for name, o in outputs.items()},
        traces={name: o.counts.astype(np.float64) if o.weighted is None else o.weighted for name, o in outputs.items()},
        potentials={name: o.potentials for name, o in outputs.items()},
        saturations={name: o.saturations for name, o in outputs.items()},
        history={name: o.history for name, o in outputs.items() if o.history is not None},
    )


def _activity(output: Output) -> Array:
    return output.counts if output.activity is None else output.activity


class NativeRun:
    """An executable that runs whole phases in the core; Unfit where it cannot run the graph."""

    def __init__(self, graph: Graph, *, trace: bool, currents: str, instructions: int | None) -> None:
        if (missing := phases.missing()) is not None:
            raise Unfit(missing)
        chosen = phases.widest() if instructions is None else min(instructions, phases.widest())
        if any(graph.scale("forward", source.name) > INT32_SAFE for source in graph.of_kind("input")):
            raise Unfit("the input has values of more than 32 bits")
        self.graph = graph
        self._trace = trace
        self._phases: dict[str, PhaseLayout] = {
            phase.name: PhaseLayout(graph, phase, currents=currents, instructions=chosen) for phase in graph.phases
        }
        self._latch = Latch()

    def run(self, inputs: Array, *, phase: str = "forward") -> Result:
        import torch

        graph, plan = self.graph, self.graph.phase(phase)
        laid, threads = self._phases[phase], torch.get_num_threads()
        if phase == "forward":
            encoded = codec.encode_input(graph, codec.check_inputs(graph, inputs))
            drives = {d.population: codec.input_current(graph, d, encoded) for d in plan.drive if d.population not in laid.computed}
            result = laid.run(len(encoded), encoded, drives, {}, threads, self._trace)
            self._latch.keep(result)
            return result
        values = codec.check_error(graph, inputs)
        forward = self._latch.forward(len(values))
        drives = {d.population: codec.error_current(graph, values) for d in plan.drive}
        gates = {s.gate for s in plan.synapses if s.gate is not None}
        masks = {gate: codec.mask(graph, forward, gate) for gate in gates}
        return laid.run(len(values), None, drives, masks, threads, self._trace)

    def close(self) -> None:
        pass

    def __enter__(self) -> NativeRun:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
