"""One phase of a network on SANA-FE's Loihi: the neurons and synapses that are programmed, and a run of one sample."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain import codec
from toolchain.errors import DesignRuleError
from toolchain.ir import Array, Graph, Phase, Synapse
from toolchain.targets.sanafe.architecture import DENDRITE, DENSE, HOST_INPUT, NEURON, Architecture
from toolchain.targets.sanafe.edges import Edges, Ints, edges, unit
from toolchain.targets.sanafe.numbers import IDLE, INPUT_THRESHOLD, NEVER, Numbers, numbers

Floats = npt.NDArray[np.float64]
ENERGIES = ("synapse", "dendrite", "soma", "network", "total")
COUNTS = {"spikes": "neurons_fired", "packets": "packets_sent", "synapses": "spikes", "updates": "neurons_updated"}
"""Our words for what SANA-FE counts; hops come from its performance trace."""


@dataclass
class Meter:
    """What SANA-FE charged since it was made."""

    energy: dict[str, float]
    seconds: float
    counts: dict[str, int]
    time_steps: int

    @classmethod
    def new(cls) -> Meter:
        return cls(dict.fromkeys(ENERGIES, 0.0), 0.0, dict.fromkeys((*COUNTS, "hops"), 0), 0)

    def add(self, told: Mapping[str, Any]) -> None:
        for name in ENERGIES:
            self.energy[name] += told["energy"][name]
        for ours, theirs in COUNTS.items():
            self.counts[ours] += told[theirs]
        self.counts["hops"] += sum(told["perf_trace"]["hops"])
        self.seconds += told["sim_time"]
        self.time_steps += told["timesteps_executed"]


@dataclass(frozen=True)
class Recording:
    """By population, a row a tick: spikes (0 or 1) and potentials in the graph's unit, after the reset."""

    spikes: dict[str, Ints]
    potentials: dict[str, Ints]


@dataclass(frozen=True)
class _State:
    """What the neurons of a population are set to at a tick: whether they may fire, their currents, their leak."""

    on: bool
    current: Array
    leak: float


class Program:
    """A phase of the expanded graph, ready to be put on a chip.

    `cores` says on which core each neuron of a population lives. Populations without an entry are the host's: relays of its currents, and a readout that no
    core can hold.
    """

    def __init__(self, graph: Graph, phase: Phase, cores: Mapping[str, Ints], architecture: Architecture) -> None:
        self.graph, self.phase, self.cores, self.architecture = graph, phase, dict(cores), architecture
        self.names = [name for name in phase.order if name in cores]
        reached = (
            {s.target for s in phase.synapses} | {d.population for d in phase.drive} | {name for name, each in phase.bias.items() if each}
        )
        self.numbers = {
            name: numbers(phase.dynamics[name]) if name in reached else IDLE for name in self.names if self.kind(name) != "input"
        }
        self.biases = codec.bias_currents(graph, phase)
        self._edges = [(s, edges(graph, s)) for s in phase.synapses if s.source in cores and s.target in cores]
        self._unit = self._only_unit()

    def kind(self, name: str) -> str:
        return self.graph.population(name).kind

    def size(self, name: str) -> int:
        return prod(self.graph.population(name).shape)

    def chip(self, masks: Mapping[str, Array]) -> Chip:
        """The chip with the connections whose gates `masks`, of one sample, open: a gated spike is sent nowhere, so its synapses are not there."""
        return Chip(self, [(s, self._unit or unit(s.ops), found.behind(masks.get(s.gate or ""))) for s, found in self._edges])

    def _only_unit(self) -> str | None:
        """The synapse unit of all connections where some spikes are held back: a dendrite looks delays up by a synapse's number within its unit, so a second unit's
        would be taken for the first's. It is that of the connection with the most synapses."""
        if all(synapse.delay == 1 for synapse, _ in self._edges):
            return None
        largest, _ = max(self._edges, key=lambda found: len(found[1].weights))
        return unit(largest.ops)


class Chip:
    """A programmed chip, which runs one sample after another."""

    def __init__(self, program: Program, connections: list[tuple[Synapse, str, Edges]]) -> None:
        import sanafe

        self._program = program
        # SANA-FE orders its traces by the names of groups
        self._group = {name: f"{i:04}" for i, name in enumerate(program.names)}
        network = sanafe.Network()
        hardware = program.architecture.chip.cores()
        groups = {name: self._made(network, name) for name in program.names}
        for name, group in groups.items():
            for neuron, core in zip(group.neurons, program.cores[name].tolist(), strict=True):
                neuron.map_to_core(hardware[core])
        for synapse, where, found in connections:
            if len(found.weights) == 0:
                continue
            for neuron in groups[synapse.target].neurons:
                neuron.set_attributes(default_synapse_hw_name=where)
            weights = found.weights * program.numbers[synapse.target].scale
            values = {"w": weights.tolist(), "delay": [synapse.delay - 1] * len(weights)}
            ends = list(zip(found.sources.tolist(), found.targets.tolist(), strict=True))
            groups[synapse.source].connect_neurons_sparse(groups[synapse.target], values, ends)
        self._chip = sanafe.SpikingChip(program.architecture.chip)
        self._chip.load(network)
        self._neurons = {name: self._chip.mapped_neuron_groups[group] for name, group in self._group.items()}
        self._written = {name: _State(False, np.zeros(program.size(name)), 1.0) for name in program.names}

    def run(self, currents: Mapping[str, Array], frames: Mapping[str, Array], meter: Meter) -> Recording:
        """One sample from rest. `currents` are injected at every step, (neurons,) by population; `frames` are what input populations send, 0 or 1, (neurons, time
        steps). What the chip charges is added to `meter`; the potentials at the start are written before, at no charge."""
        with contextlib.redirect_stdout(io.StringIO()):  # it prints each run's progress
            self._chip.reset()
            self._start()
            told = list(self._stretches(currents, frames))
        for stretch in told:
            meter.add(stretch)
        return self._recording(told)

    def _made(self, network: Any, name: str) -> Any:
        program = self._program
        own = {"reset_mode": "hard", "reset": 0.0} if name not in program.numbers else {"reset_mode": "soft"}
        return network.create_neuron_group(
            self._group[name],
            program.size(name),
            model_attributes={"threshold": NEVER, "leak_decay": 1.0, "input_decay": 0.0, **own},
            default_synapse_hw_name=DENSE,
            default_dendrite_hw_name=DENDRITE,
            soma_hw_name=NEURON if name in program.numbers else HOST_INPUT,
            log_potential=True,
            log_spikes=True,
        )

    def _start(self) -> None:
        """Potentials from which `numbers` wants the neurons to start: a time step of its own, with nothing else in it."""
        for name in self._program.names:
            offset = self._program.numbers[name].offset if name in self._program.numbers else 0.0
            self._write(name, _State(False, np.full(self._program.size(name), offset), 1.0))
        self._chip.sim(1, processing_threads=1)

    def _stretches(self, currents: Mapping[str, Array], frames: Mapping[str, Array]) -> Iterator[Mapping[str, Any]]:
        """What SANA-FE tells of the phase, in stretches of ticks between which the host writes something."""
        pending = 0
        for tick in range(self._program.phase.ticks):
            changes = {name: state for name in self._program.names if (state := self._at(name, tick, currents, frames)) is not None}
            if changes and pending:
                yield self._sim(pending)
                pending = 0
            for name, state in changes.items():
                self._write(name, state)
            pending += 1
        yield self._sim(pending)

    def _sim(self, ticks: int) -> Mapping[str, Any]:
        told: Mapping[str, Any] = self._chip.sim(ticks, processing_threads=1, spike_trace=True, potential_trace=True, perf_trace=True)
        return told

    def _at(self, name: str, tick: int, currents: Mapping[str, Array], frames: Mapping[str, Array]) -> _State | None:
        """The state of a population at `tick`; None where it is that of the tick before."""
        program = self._program
        key, before = self._key(name, tick), self._key(name, tick - 1) if tick else None
        if key == before:
            return None
        step, leaks, _ = key
        if name in frames:
            return _State(step, frames[name][:, program.phase.step_at(name, tick) or 0] * float(step), 1.0)
        leak = program.numbers[name].leak if leaks else 1.0
        if not step:
            return _State(False, np.zeros(program.size(name)), leak)
        current = np.zeros(program.size(name), np.int64) + currents.get(name, 0)
        now = program.phase.step_at(name, tick)
        for start, constant in program.biases.get(name, ()):
            current = current + (constant.reshape(-1) if now is not None and now >= start else 0)
        return _State(True, current, leak)

    def _key(self, name: str, tick: int) -> tuple[bool, bool, int]:
        """What tells the states of a population apart: whether it makes a step, whether it leaks (at the tick after a step), how many biases have begun, or which frame it is."""
        program = self._program
        step = program.phase.step_at(name, tick)
        if program.kind(name) == "input":
            return step is not None, False, -1 if step is None else step
        leaks = program.numbers[name].leak != 1 and program.phase.step_at(name, tick - 1) is not None
        if program.kind(name) == "readout":
            return False, leaks, 0
        begun = -1 if step is None else sum(step >= start for start, _ in program.biases.get(name, ()))
        return step is not None, leaks, begun

    def _write(self, name: str, state: _State) -> None:
        """Set what differs from what the neurons have."""
        found, own = self._written[name], self._program.numbers.get(name)
        scale = 1.0 if own is None else own.scale
        bias = np.asarray(state.current, np.float64) * scale
        if (bias.astype(np.float32) != bias).any():
            raise DesignRuleError(
                f"population '{name}' gets a current of more than 24 bits, and SANA-FE reads currents in single precision: join its biases into smaller ones"
            )
        common: dict[str, float] = {}
        if state.on != found.on:
            common["threshold"] = self._threshold(own) if state.on else NEVER
        if state.leak != found.leak:
            common["leak_decay"] = state.leak
        differs = bias != np.asarray(found.current, np.float64) * scale
        neurons = self._neurons[name]
        if common:
            for neuron in (neurons[i] for i in np.flatnonzero(~differs).tolist()):
                neuron.set_attributes(model_attributes=common)
        for i in np.flatnonzero(differs).tolist():
            neurons[i].set_attributes(model_attributes=common | {"bias": float(bias[i])})
        self._written[name] = state

    def _threshold(self, own: Numbers | None) -> float:
        return INPUT_THRESHOLD if own is None else own.threshold

    def _recording(self, told: list[Mapping[str, Any]]) -> Recording:
        program = self._program
        ticks = program.phase.ticks
        spikes = {group: np.zeros((ticks, program.size(name)), np.int64) for name, group in self._group.items()}
        fired = [row for stretch in told for row in stretch["spike_trace"]]
        for tick, row in enumerate(fired):
            for address in row:
                spikes[address.group_name][tick, address.neuron_offset] = 1
        values = np.array([row for stretch in told for row in stretch["potential_trace"]])
        ends = np.cumsum([program.size(name) for name in program.names])
        columns = dict(zip(program.names, np.split(values, ends[:-1], axis=1), strict=True))
        potentials = {name: np.rint(columns[name] / own.scale - own.offset).astype(np.int64) for name, own in program.numbers.items()}
        return Recording({name: spikes[group] for name, group in self._group.items()}, potentials)
