"""An executable of target sanafe: samples one after another, and what couples did from what their members did."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from toolchain import codec, fixed, limits
from toolchain.errors import DesignRuleError
from toolchain.ir import POTENTIAL_LIMIT, Array, Graph, Phase, Placement
from toolchain.passes import ExpandCouples, Pipeline
from toolchain.passes.expand import joined, pairs_of
from toolchain.target import History, Latch, Result, join
from toolchain.targets.sanafe.architecture import SOURCE, loihi
from toolchain.targets.sanafe.charges import Charges
from toolchain.targets.sanafe.chip import Chip, Meter, Program, Recording
from toolchain.targets.sanafe.edges import Ints

NOT_CHARGED = (
    "what the host computes and writes: input and error currents, potentials at the start of a sample, and where populations take turns, thresholds at every time step",
    "the host's reading of spike counts and of the readout's potentials",
    "input neurons of events, but their packets are charged",
    "programming the chip, which the feedback phase does anew for every sample: masked spikes are sent nowhere because their connections are left out",
    "idle power, the management processors, and whatever lies off the chip",
)


class Run:
    """An executable. `charges` is the bill of the last `run`, None before."""

    def __init__(self, graph: Graph, placement: Placement, *, trace: bool) -> None:
        self.graph = graph
        self.charges: Charges | None = None
        self._trace = trace
        self._latch = Latch()
        self._expanded = Pipeline((ExpandCouples(),))(graph)
        self._pairs = pairs_of(graph)
        self._architecture = loihi()
        cores = _cores(graph, placement)
        for name, pair in self._pairs.items():
            cores[pair.plus] = cores[pair.minus] = cores.pop(name)
        inputs = input_cores(graph, placement)
        self._programs = {phase.name: Program(self._expanded, phase, inputs | cores, self._architecture) for phase in self._expanded.phases}
        self._chips: dict[str, tuple[bytes, Chip]] = {}
        self._chip("forward", {})

    def run(self, inputs: Array, *, phase: str = "forward") -> Result:
        """See `toolchain.target.Executable`. DesignRuleError where a potential passes 24 bits: the chip clamps it, SANA-FE does not."""
        graph, plan = self.graph, self.graph.phase(phase)
        frames: dict[str, Array] = {}
        masks: dict[str, Array] = {}
        if phase == "forward":
            encoded = codec.encode_input(graph, codec.check_inputs(graph, inputs))
            currents = {d.population: codec.input_current(graph, d, encoded) for d in plan.drive}
            frames = {p.name: _frames(encoded, plan, events=p.events) for p in graph.of_kind("input") if p.name in plan.order}
        else:
            error = codec.check_error(graph, inputs)
            forward = self._latch.forward(len(error))
            currents = {d.population: codec.error_current(graph, error) for d in plan.drive}
            masks = {s.gate: codec.mask(graph, forward, s.gate) for s in plan.synapses if s.gate is not None}
        meter = Meter.new()
        parts = []
        for sample in range(len(inputs)):
            chip = self._chip(phase, {name: mask[sample] for name, mask in masks.items()})
            flat = {
                member: sign * current[sample].reshape(-1) for name, current in currents.items() for member, sign in self._ends(plan, name)
            }
            recording = chip.run(flat, {name: frame[sample] for name, frame in frames.items()}, meter)
            parts.append(self._result(plan, recording, sample))
        result = join(parts)
        if phase == "forward":
            self._latch.keep(result)
        self.charges = Charges(
            len(inputs), meter.time_steps, meter.energy, meter.seconds, meter.counts, NOT_CHARGED, self._architecture.name, SOURCE, phase
        )
        return result

    def close(self) -> None:
        self._chips.clear()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _chip(self, phase: str, masks: Mapping[str, Array]) -> Chip:
        """The chip of a phase; programmed anew where the last sample had other masks."""
        key = b"".join(np.packbits(mask).tobytes() for mask in masks.values())
        if phase not in self._chips or self._chips[phase][0] != key:
            gates = {self._pairs[name].plus if name in self._pairs else name: mask for name, mask in masks.items()}
            self._chips[phase] = key, self._programs[self.graph.phase(phase).name].chip(gates)
        return self._chips[phase][1]

    def _ends(self, plan: Phase, name: str) -> tuple[tuple[str, int], ...]:
        """The members of a population that get its current, with its sign."""
        if name not in self._pairs:
            return ((name, 1),)
        pair = self._pairs[name]
        return ((pair.plus, 1), (pair.minus, -1)) if plan.dynamics[name].members == "both" else ((pair.plus, 1),)

    def _result(self, plan: Phase, recording: Recording, sample: int) -> Result:
        """What one sample did, as couples."""
        steps: dict[str, History] = {}
        for name in plan.order:
            if self.graph.population(name).kind == "input":
                continue
            member = self._pairs[name].plus if name in self._pairs else name
            if member not in recording.potentials:
                continue  # a readout on the host, below
            steps[name] = self._couple(plan, name, recording, sample)
        for name in plan.order:
            if name not in steps and self.graph.population(name).kind == "readout":
                steps[name] = self._host_readout(plan, name, steps, sample)
        return _summed(plan, {name: steps[name] for name in plan.order if name in steps}, trace=self._trace)

    def _couple(self, plan: Phase, name: str, recording: Recording, sample: int) -> History:
        """The model steps of a population: its own ticks, both members in one, and leaked as the model records it."""
        dynamics, population = plan.dynamics[name], self.graph.population(name)
        ticks = np.arange(plan.time_steps) * plan.timing.period + plan.timing.start.get(name, 0)
        pair = self._pairs.get(name)
        member = name if pair is None else pair.plus
        spikes, potentials = recording.spikes[member][ticks], recording.potentials[member][ticks]
        if pair is not None and dynamics.members == "both":
            spikes, potentials = joined(spikes, recording.spikes[pair.minus][ticks], potentials, int(dynamics.reset))
        _require_room(plan, name, potentials + int(dynamics.reset) * spikes, sample)
        if dynamics.members != "none":
            potentials = fixed.leak(potentials, dynamics.leak, integer=True)
        shape = (plan.time_steps, 1, *population.shape)
        return History(spikes.astype(np.int8).reshape(shape), potentials.reshape(shape))

    def _host_readout(self, plan: Phase, name: str, steps: Mapping[str, History], sample: int) -> History:
        """A readout of which no core holds a neuron: the host adds up what its source sent."""
        population, dynamics, timing = self.graph.population(name), plan.dynamics[name], plan.timing
        (synapse,) = (s for s in plan.synapses if s.target == name)
        sent = steps[synapse.source].spikes[:, 0]
        made = fixed.apply(synapse.ops, self.graph.tensors, sent, population.shape, integer=True)
        arrived = timing.start.get(synapse.source, 0) + np.arange(plan.time_steps) * timing.period + synapse.delay
        own = timing.start.get(name, 0) + np.arange(plan.time_steps) * timing.period
        potential, rows, totals = np.zeros((1, *population.shape), np.int64), [], []
        for last, now in zip((-1, *own[:-1]), own, strict=True):
            current = made[(arrived > last) & (arrived <= now)].sum(axis=0, dtype=np.int64, keepdims=True)
            after = fixed.step(potential, current, dynamics, integer=True)
            potential = after.potential
            rows.append(potential)
            totals.append(potential + after.saturated * np.sign(potential))
        _require_room(plan, name, np.stack(totals), sample)
        return History(np.zeros((plan.time_steps, 1, *population.shape), np.int8), np.stack(rows))


def _cores(graph: Graph, placement: Placement) -> dict[str, Ints]:
    """The core of each neuron, by population that is placed."""
    found: dict[str, Ints] = {}
    for core in placement.cores:
        for part in core.slices:
            shape = graph.population(part.population).shape
            held = found.setdefault(part.population, np.zeros(prod(shape), np.int64)).reshape(shape)
            held[tuple(slice(start, stop) for start, stop in zip(part.start, part.stop, strict=True))] = core.core
    return found


def input_cores(graph: Graph, placement: Placement) -> dict[str, Ints]:
    """Where input neurons enter: on cores that the network leaves free, from the last one down. DesignRuleError where there are too few."""
    chip = limits.load(placement.chip)
    most, taken = chip.neurons_per_core.value, {core.core for core in placement.cores}
    free = [core for core in reversed(range(chip.cores_per_chip.value)) if core not in taken]
    made: dict[str, Ints] = {}
    for population in graph.of_kind("input"):
        if not any(synapse.source == population.name for synapse in graph.phase("forward").synapses):
            continue  # the host applies its connection
        neurons = np.arange(prod(population.shape)) // most
        if neurons[-1] >= len(free):
            raise DesignRuleError(
                f"input '{population.name}' of {len(neurons):,} neurons needs {neurons[-1] + 1} cores to enter the chip, and the network leaves {len(free)}: lower its width"
            )
        made[population.name] = np.array(free)[neurons]
        free = free[neurons[-1] + 1 :]
    return made


def _frames(encoded: Array, plan: Phase, *, events: bool) -> Array:
    """What input neurons send at each time step, (samples, neurons, time steps)."""
    flat: Array = encoded.reshape(len(encoded), -1, plan.time_steps) if events else encoded.reshape(len(encoded), -1, 1)
    return flat if events else np.repeat(flat, plan.time_steps, axis=2)


def _require_room(plan: Phase, name: str, totals: Array, sample: int) -> None:
    """Nothing that the chip would clamp."""
    over = np.argwhere(np.abs(totals) > POTENTIAL_LIMIT)
    if len(over):
        raise DesignRuleError(
            f"population '{name}' passes 24 bits at step {over[0][0] + 1} of the {plan.name} phase, sample {sample} (from 0) of those given: the chip clamps there and SANA-FE does not, so its "
            "spikes would differ; compile without --calibrate, which leaves room for any input, or run target sim"
        )


def _summed(plan: Phase, steps: Mapping[str, History], *, trace: bool) -> Result:
    """The sums of a phase over its steps, as `reference` makes them."""
    traces = {}
    for name, history in steps.items():
        trace_of = np.zeros(history.spikes.shape[1:])
        for spikes in history.spikes:
            trace_of = trace_of * plan.dynamics[name].leak + spikes
        traces[name] = trace_of
    return Result(
        plan.name,
        plan.time_steps,
        {name: h.spikes.sum(axis=0, dtype=np.int32) for name, h in steps.items()},
        {name: (h.spikes != 0).sum(axis=0, dtype=np.int32) for name, h in steps.items()},
        traces,
        {name: h.potentials[-1] for name, h in steps.items()},
        {name: np.zeros(h.spikes.shape[1:], np.int32) for name, h in steps.items()},
        dict(steps) if trace else {},
    )
