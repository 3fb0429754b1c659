"""From a graph in hardware time to a network of Lava processes, and runs on it: one process a population, one a synapse, as on the chip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from toolchain import codec
from toolchain.errors import UsageError
from toolchain.fixed import INT32_SAFE, largest_total
from toolchain.ir import Array, Graph, Phase, Population, Synapse
from toolchain.notation import process_names
from toolchain.target import History, Latch, Result, join
from toolchain.targets.lava_sim.composition import Composition
from toolchain.targets.lava_sim.plan import PHASES, Board, Part, Record, Role, shared
from toolchain.targets.lava_sim.runtime import Network, quiet
from toolchain.targets.lava_sim.stock import Stock

if TYPE_CHECKING:
    from lava.magma.core.process.process import AbstractProcess

    from toolchain.targets.lava_sim import LavaSim

AUTO_BATCH = 128
"""Copies of the network side by side where nobody says how many: more gain little and fill the caches."""

AT_ONCE = 2**22
"""Neurons of all those copies together: each takes about 100 bytes in its processes. Larger networks get fewer copies."""

SLOT_BYTES = 2**27
"""Shared memory for what one run of several batches records; longer calls take several runs."""

MAX_SLOTS = 64


class Run:
    """An executable: the network is built and started once; phases and samples change inside it."""

    def __init__(self, graph: Graph, target: LavaSim) -> None:
        self.graph = graph
        self._stock = target.stock
        self._only_sparse = target.synapses == "sparse"
        neurons = sum(prod(population.shape) for population in graph.populations)
        self._batch = target.batch or (1 if self._stock else max(1, min(AUTO_BATCH, AT_ONCE // neurons)))
        self._trace = target.trace
        self._phases = {name: graph.phase(name) for name in target.phases_of(graph)}
        self._ticks = {name: phase.ticks + idle_ticks(phase) for name, phase in self._phases.items()}
        self._slots = self._affordable_slots()
        self._latch = Latch()
        used = [p for p in graph.populations if any(p.name in phase.order for phase in self._phases.values())]
        self._board = Board(self._lines(used))
        self._parts = {population.name: self._part(population, i) for i, population in enumerate(used)}
        tag = "fixed_pt" if graph.integer else "floating_pt"
        with quiet():
            processes = self._processes(used)
        self._network = Network(processes, tag, self._board.ticks, target.deadline)

    def run(self, inputs: Array, *, phase: str = "forward") -> Result:
        """Run one phase over any number of samples (`toolchain.target.Executable`); ToolchainError where a process fails."""
        self._network.require_alive()
        plan = self._phase(phase)
        given = codec.check_inputs(self.graph, inputs) if phase == "forward" else codec.check_error(self.graph, inputs)
        if phase == "feedback":
            self._latch.forward(len(given))
        size = self._batch * self._slots
        result = join(
            [self._chunk(plan, given[first : first + size], first // self._batch) for first in range(0, max(len(given), 1), size)]
        )
        if phase == "forward":
            self._latch.keep(replace(result, history={}))
        return result

    def close(self) -> None:
        """End all processes of the network."""
        self._network.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _lines(self, used: Sequence[Population]) -> int:
        """How many processes report their ticks."""
        return len(used)

    def _phase(self, name: str) -> Phase:
        phase = self.graph.phase(name)
        if name not in self._phases:
            raise UsageError(f"this lava-sim network was built for {', '.join(self._phases)} only: compile it with phase '{name}' as well")
        return phase

    def _chunk(self, plan: Phase, given: Array, first_batch: int) -> Result:
        """As many samples as the shared memory has slots for, in one run of Lava."""
        samples, batches = len(given), -(-len(given) // self._batch)
        if samples:
            for name, values in self._injected(plan, given).items():
                self._write(self._role(name, plan), values, batches)
            self._board.order(plan.name, first_batch)
            self._network.run(self._ticks[plan.name] * batches)
        return self._read(plan, samples)

    def _injected(self, plan: Phase, given: Array) -> dict[str, Array]:
        """By population: the current injected at every step, or what the input population emits."""
        if plan.name == "feedback":
            return {drive.population: codec.error_current(self.graph, given) for drive in plan.drive}
        encoded = codec.encode_input(self.graph, given)
        values = {drive.population: codec.input_current(self.graph, drive, encoded) for drive in plan.drive}
        return values | {p.name: encoded for p in self.graph.of_kind("input") if p.name in plan.order}

    def _write(self, role: Role, values: Array, batches: int) -> None:
        """Fill the slots of a run; the rest of a ragged last batch is zero and never read."""
        assert role.drive is not None
        if role.events:
            for slot in range(batches):
                frames = values[slot * self._batch : (slot + 1) * self._batch]
                frames = frames.reshape(len(frames), -1, role.phase.time_steps).transpose(2, 0, 1)
                role.drive[slot, :, : frames.shape[1]], role.drive[slot, :, frames.shape[1] :] = frames, 0
            return
        rows = role.drive.reshape(-1, role.drive.shape[-1])
        rows[: len(values)] = values.reshape(len(values), -1)
        rows[len(values) : batches * self._batch] = 0

    def _read(self, plan: Phase, samples: int) -> Result:
        found: dict[str, dict[str, Array]] = {"counts": {}, "activity": {}, "traces": {}, "potentials": {}, "saturations": {}}
        history = {}
        for name in plan.order:
            record = self._role(name, plan).record
            if record is None:
                continue
            shape = self.graph.population(name).shape
            for field, values in found.items():
                rows = getattr(record, field)
                values[name] = rows.reshape(-1, rows.shape[-1])[:samples].reshape(samples, *shape).copy()
            if record.spikes is not None and record.history is not None:
                history[name] = History(_steps_first(record.spikes, samples, shape), _steps_first(record.history, samples, shape))
        return Result(plan.name, plan.time_steps, **found, history=history)

    def _role(self, population: str, plan: Phase) -> Role:
        role = self._parts[population].roles[PHASES.index(plan.name)]
        assert role is not None
        return role

    def _part(self, population: Population, index: int) -> Part:
        roles = tuple(
            self._new_role(population, self._phases[name]) if name in self._phases and population.name in self._phases[name].order else None
            for name in PHASES
        )
        return Part(
            self._board,
            index,
            (self._batch, prod(population.shape)),
            self.graph.integer,
            tuple(self._ticks.get(name, 0) for name in PHASES),
            roles,
            latches=any(role is not None and role.gated for role in roles),
            narrow=not self._stock and self._narrow(population.name),
        )

    def _narrow(self, population: str) -> bool:
        """Whether 32 bits hold whatever a population adds up. Not where weights or biases change after they were looked at."""
        return self.graph.integer and all(
            largest_total(self.graph, phase, population) <= INT32_SAFE for phase in self._phases.values() if population in phase.dynamics
        )

    def _new_role(self, population: Population, phase: Phase) -> Role:
        name, neurons, wide = population.name, prod(population.shape), self._wide
        emits = population.kind == "input"
        driven = emits or any(drive.population == name for drive in phase.drive)
        frames = (phase.time_steps,) if population.events else ()
        graded = population.kind == "linear"
        bias = codec.bias_currents(self.graph, phase).get(name, [])
        return Role(
            phase,
            name,
            phase.dynamics.get(name),
            tuple((start, current.reshape(1, neurons)) for start, current in bias),
            shared((self._slots, *frames, self._batch, neurons), wide) if driven else None,
            None if emits else Record.of(self._slots, self._batch, neurons, wide, phase.time_steps if self._trace else 0, graded),
            events=population.events,
            gated=any(synapse.gate is not None for synapse in phase.synapses if synapse.source == name),
        )

    @property
    def _wide(self) -> type[np.int64] | type[np.float64]:
        return np.int64 if self.graph.integer else np.float64

    def _affordable_slots(self) -> int:
        batch_bytes = 0
        for phase in self._phases.values():
            for name in phase.order:
                population = self.graph.population(name)
                graded = 8 if population.kind == "linear" else 1
                a_neuron = 40 + ((graded + 8) * phase.time_steps if self._trace else 0) + (8 * phase.time_steps if population.events else 0)
                batch_bytes += self._batch * prod(population.shape) * a_neuron
        return max(1, min(MAX_SLOTS, SLOT_BYTES // batch_bytes))

    def _processes(self, used: list[Population]) -> list[AbstractProcess]:
        """Lava's processes, connected: forward-phase synapses leave a population by `s_out`, feedback-phase ones by `b_out`."""
        from toolchain.targets.lava_sim.processes.population import Couple, Input, Readout, Relay

        kinds = {"couple": Couple, "linear": Relay, "readout": Readout, "input": Input}
        populations: dict[str, Any] = {
            p.name: kinds[p.kind](part=self._parts[p.name], port_shape=self._port_shape(p), name=p.name) for p in used
        }
        synapses = []
        for phase in self._phases.values():
            stock = Stock(self.graph, phase, sparse=self._only_sparse) if self._stock else None
            for synapse, name in zip(phase.synapses, process_names(phase.synapses, phase.name), strict=True):
                source = populations[synapse.source]
                emits, takes = source.s_out if phase.name == "forward" else source.b_out, populations[synapse.target].a_in
                if stock is not None:
                    synapses += stock.joined(synapse, name, emits, takes)
                    continue
                process = self._own_synapse(phase, synapse, name)
                emits.connect(process.s_in)
                process.a_out.connect(takes)
                synapses.append(process)
        return [*populations.values(), *synapses]

    def _port_shape(self, population: Population) -> tuple[int, ...]:
        neurons = prod(population.shape)
        return (neurons,) if self._stock else (self._batch, neurons)

    def _own_synapse(self, phase: Phase, synapse: Synapse, name: str) -> AbstractProcess:
        from toolchain.targets.lava_sim.processes.synapse import Synapse as SynapseProcess

        composition = Composition(self.graph, synapse)
        return SynapseProcess(
            composition=composition,
            board=self._board,
            phase=phase.name,
            batch=self._batch,
            delay=synapse.delay,
            name=name,
        )


def idle_ticks(phase: Phase) -> int:
    """Ticks to wait after a phase until nothing is in flight: populations drop what arrives on the first tick of the next."""
    return max(0, max((synapse.delay for synapse in phase.synapses), default=0) - phase.timing.flush - 1)


def _steps_first(rows: Array, samples: int, shape: tuple[int, ...]) -> Array:
    """(slots, steps, batch, neurons) as (steps, samples, *shape)."""
    slots, steps, batch, neurons = rows.shape
    whole = np.moveaxis(rows, 1, 0).reshape(
        steps, slots * batch, neurons
    )  # of one slot a view of the shared memory, which the next run fills anew
    return whole[:, :samples].reshape(steps, samples, *shape).copy()
