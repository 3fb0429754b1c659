"""The model step of `toolchain.ir` on torch tensors, all samples of a chunk at once. `sim` and `torch` differ only in the arithmetic they pass in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from toolchain import codec
from toolchain.ir import Array, Dynamics, Graph, Phase, Synapse
from toolchain.target import History, Latch, Result, join

AT_ONCE = {"cpu": 2**24, "cuda": 2**28}
"""Neurons, of all samples together, that advance side by side: about 40 bytes each."""


class Arithmetic(Protocol):
    """The numbers a tick of one phase is computed in. Tensors are (samples, neurons)."""

    def product(self, synapse: Synapse, spikes: Tensor) -> Tensor:
        """The current of the target that `spikes` of the source cause."""

    def step(self, population: str, potential: Tensor, current: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Potential after reset and leak, spikes (of a relay its graded values), and which neurons saturated (None: nobody can)."""

    def current(self, values: Array, population: str) -> Tensor:
        """Injected or bias currents of a population, in the type of its potentials."""

    def emitted(self, values: Array, population: str) -> Tensor:
        """What a population emits, or a mask on it, in the type of its spikes."""


class TickRun:
    """An executable that runs a graph's phases in chunks of `batch` samples, fewer where that is more neurons than `AT_ONCE`."""

    def __init__(self, graph: Graph, arithmetic: Mapping[str, Arithmetic], *, batch: int, trace: bool, device: torch.device) -> None:
        self.graph = graph
        self._arithmetic = arithmetic
        neurons = sum(prod(population.shape) for population in graph.populations)
        self._batch = max(1, min(batch, AT_ONCE.get(device.type, AT_ONCE["cpu"]) // neurons))
        self._trace = trace
        self._latch = Latch()

    def run(self, inputs: Array, *, phase: str = "forward") -> Result:
        plan = self.graph.phase(phase)
        if phase == "forward":
            values = codec.check_inputs(self.graph, inputs)
            forward = None
        else:
            values = codec.check_error(self.graph, inputs)
            forward = self._latch.forward(len(values))
        with torch.inference_mode():
            parts = [self._chunk(plan, values[i : i + self._batch], forward, i) for i in range(0, len(values), self._batch)]
        result = join(parts)
        if phase == "forward":
            self._latch.keep(result)
        return result

    def _chunk(self, plan: Phase, values: Array, forward: Result | None, first: int) -> Result:
        graph, arithmetic = self.graph, self._arithmetic[plan.name]
        masks: dict[str, Tensor] = {}
        encoded = None
        if forward is None:
            encoded = codec.encode_input(graph, values)
            currents = {drive.population: codec.input_current(graph, drive, encoded) for drive in plan.drive}
        else:
            currents = {drive.population: codec.error_current(graph, values) for drive in plan.drive}
            gates = {s.gate for s in plan.synapses if s.gate is not None}
            masks = {g: _flat(arithmetic.emitted(codec.mask(graph, forward, g)[first : first + len(values)], g)) for g in gates}
        injected = {name: _flat(arithmetic.current(current, name)) for name, current in currents.items()}
        return simulate(graph, plan, arithmetic, len(values), encoded, injected, masks, trace=self._trace)

    def close(self) -> None:
        pass

    def __enter__(self) -> TickRun:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Input:
    """An input population: what it emits, at each step anew for events."""

    def __init__(self, graph: Graph, name: str, arithmetic: Arithmetic, encoded: Array) -> None:
        self.events = graph.population(name).events
        self._name, self._arithmetic, self._encoded = name, arithmetic, encoded
        self._still = None if self.events else _flat(arithmetic.emitted(encoded, name))

    def frame(self, step: int) -> Tensor:
        return _flat(self._arithmetic.emitted(self._encoded[..., step], self._name)) if self._still is None else self._still


class _State:
    """What one population carries through a phase."""

    def __init__(self, like: Tensor, dynamics: Dynamics, counts: torch.dtype) -> None:
        self.dynamics = dynamics
        self.potential = like
        self.waiting: Tensor | None = None
        self.counts = torch.zeros_like(like, dtype=counts)
        self.activity = self.counts if dynamics.members == "plus" else torch.zeros_like(like, dtype=torch.int32)
        self.trace = torch.zeros_like(like, dtype=torch.float64) if dynamics.leak != 1 and dynamics.members != "none" else None
        self.saturations = torch.zeros_like(like, dtype=torch.int32)
        self.history: list[tuple[Tensor, Tensor]] = []

    def count(self, spikes: Tensor) -> None:
        self.counts += spikes.to(self.counts.dtype)
        if self.activity is not self.counts:
            self.activity += (spikes != 0).to(torch.int32)
        if self.trace is not None:
            self.trace = self.trace * self.dynamics.leak + spikes


class _Emissions:
    """What populations emitted, by tick, for as long as a synapse still carries it; silence is not kept."""

    def __init__(self, phase: Phase) -> None:
        self._longest = {name: max((s.delay for s in phase.synapses if s.source == name), default=-1) for name in phase.order}
        self._found: dict[str, dict[int, Tensor]] = {name: {} for name in phase.order}

    def keep(self, name: str, tick: int, spikes: Tensor) -> None:
        found, longest = self._found[name], self._longest[name]
        for old in [earlier for earlier in found if earlier < tick - longest]:
            del found[old]
        # Elsewhere than on a CPU the question would wait for the device.
        if longest >= 0 and (spikes.device.type != "cpu" or bool(spikes.any())):
            found[tick] = spikes

    def at(self, name: str, tick: int) -> Tensor | None:
        return self._found[name].get(tick)


def simulate(
    graph: Graph,
    phase: Phase,
    arithmetic: Arithmetic,
    samples: int,
    encoded: Array | None,
    currents: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    trace: bool,
) -> Result:
    """Run `phase` tick by tick. `encoded` is what input populations emit, (samples, *shape) and for events time last; currents and masks are
    (samples, neurons)."""
    kinds = {name: graph.population(name).kind for name in phase.order}
    inputs = {name: _Input(graph, name, arithmetic, encoded) for name in phase.order if kinds[name] == "input" and encoded is not None}
    states = {name: _state(graph, phase, name, arithmetic, samples) for name in phase.order if kinds[name] != "input"}
    constant = {
        name: [(start, arithmetic.current(current, name).reshape(-1)) for start, current in biases]
        for name, biases in codec.bias_currents(graph, phase).items()
        if name in states
    }
    incoming = {name: [(i, s) for i, s in enumerate(phase.synapses) if s.target == name] for name in states}
    emissions = _Emissions(phase)
    steady: dict[int, Tensor] = {}
    for tick in range(phase.ticks - phase.timing.flush):
        for name in phase.order:
            model_step = phase.step_at(name, tick)
            if name in inputs and model_step is not None:
                emissions.keep(name, tick, inputs[name].frame(model_step))
            if name not in states:
                continue
            state = states[name]
            for index, synapse in incoming[name]:
                spikes = emissions.at(synapse.source, tick - synapse.delay)
                if spikes is None:
                    continue
                arriving = steady.get(index)
                if arriving is None:
                    arriving = arithmetic.product(synapse, spikes if synapse.gate is None else spikes * masks[synapse.gate])
                if synapse.source in inputs and not inputs[synapse.source].events:
                    steady[index] = arriving  # a still image makes the same current at every step
                state.waiting = arriving if state.waiting is None else state.waiting + arriving
            if model_step is not None:
                current = _sum(state.waiting, currents.get(name), _from_step(constant.get(name, ()), model_step))
                spikes = _advance(state, arithmetic, name, current, trace)
                if state.dynamics.members != "none":
                    emissions.keep(name, tick, spikes)
    return _result(graph, phase, states)


def _state(graph: Graph, phase: Phase, name: str, arithmetic: Arithmetic, samples: int) -> _State:
    relayed = torch.int64 if graph.integer else torch.float64
    empty = arithmetic.current(np.zeros((samples, prod(graph.population(name).shape))), name)
    return _State(empty, phase.dynamics[name], relayed if phase.dynamics[name].members == "graded" else torch.int32)


def _advance(state: _State, arithmetic: Arithmetic, name: str, current: Tensor | None, trace: bool) -> Tensor:
    total = torch.zeros_like(state.potential) if current is None else current.expand_as(state.potential)
    state.potential, spikes, saturated = arithmetic.step(name, state.potential, total)
    state.waiting = None
    if saturated is not None:
        state.saturations += saturated.to(torch.int32)
    if state.dynamics.members != "none":
        state.count(spikes)
    if trace:
        shown = spikes if state.dynamics.members == "graded" else spikes.to(torch.int8)
        state.history.append((shown, state.potential))
    return spikes


def _from_step(biases: Sequence[tuple[int, Tensor]], model_step: int) -> Tensor | None:
    return _sum(*(current for start, current in biases if model_step >= start))


def _sum(*parts: Tensor | None) -> Tensor | None:
    total = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part
    return total


def _flat(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)


def _result(graph: Graph, phase: Phase, states: Mapping[str, _State]) -> Result:
    wide = np.int64 if graph.integer else np.float64

    def array(name: str, values: Tensor, dtype: Any) -> Array:
        shape = graph.population(name).shape
        found: Array = values.cpu().numpy().astype(dtype, copy=False)
        return found.reshape(*values.shape[:-1], *shape)

    def history(name: str, state: _State) -> History:
        spikes, potentials = (torch.stack(rows) for rows in zip(*state.history, strict=True))
        return History(array(name, spikes, wide if state.dynamics.members == "graded" else np.int8), array(name, potentials, wide))

    return Result(
        phase=phase.name,
        time_steps=phase.time_steps,
        counts={name: array(name, s.counts, wide if s.dynamics.members == "graded" else np.int32) for name, s in states.items()},
        activity={name: array(name, s.activity, np.int32) for name, s in states.items()},
        traces={name: array(name, s.counts if s.trace is None else s.trace, np.float64) for name, s in states.items()},
        potentials={name: array(name, s.potential, wide) for name, s in states.items()},
        saturations={name: array(name, s.saturations, np.int32) for name, s in states.items()},
        history={name: history(name, s) for name, s in states.items() if s.history},
    )
