"""The model step of `toolchain.ir` on torch tensors, all samples of a chunk at once. `sim` and `torch` differ only in the arithmetic they pass in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from toolchain import codec
from toolchain.ir import Array, Dynamics, Graph, Phase, Synapse
from toolchain.target import History, Latch, Result, join


class Arithmetic(Protocol):
    """The numbers a tick is computed in."""

    potential: torch.dtype
    spike: torch.dtype

    def product(self, synapse: Synapse, spikes: Tensor) -> Tensor:
        """The current (samples, neurons) that `spikes` (samples, source neurons) cause."""

    def step(self, potential: Tensor, current: Tensor, dynamics: Dynamics) -> tuple[Tensor, Tensor, Tensor | None]:
        """Potential after reset and leak, spikes, and which neurons saturated (None: nobody can)."""

    def tensor(self, values: Array) -> Tensor:
        """Injected or bias currents as this arithmetic holds them, on its device."""


class TickRun:
    """An executable that runs a graph's phases in chunks of `batch` samples."""

    def __init__(self, graph: Graph, arithmetic: Mapping[str, Arithmetic], *, batch: int, trace: bool) -> None:
        self.graph = graph
        self._arithmetic = arithmetic
        self._batch = batch
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
            masks = {
                g: _flat(arithmetic.tensor(codec.mask(graph, forward, g)[first : first + len(values)])).to(arithmetic.spike) for g in gates
            }
        injected = {name: _flat(arithmetic.tensor(current)) for name, current in currents.items()}
        seen = None if encoded is None else _flat(arithmetic.tensor(encoded)).to(arithmetic.spike)
        return simulate(graph, plan, arithmetic, len(values), seen, injected, masks, trace=self._trace)

    def close(self) -> None:
        pass

    def __enter__(self) -> TickRun:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _State:
    """What one population carries through a phase."""

    def __init__(self, like: Tensor, dynamics: Dynamics, arithmetic: Arithmetic) -> None:
        self.dynamics = dynamics
        self.potential = torch.zeros_like(like, dtype=arithmetic.potential)
        self.waiting: Tensor | None = None
        self.counts = torch.zeros_like(like, dtype=torch.int32)
        self.activity = self.counts if dynamics.members == "plus" else torch.zeros_like(self.counts)
        self.trace = torch.zeros_like(like, dtype=torch.float64) if dynamics.leak != 1 and dynamics.members != "none" else None
        self.saturations = torch.zeros_like(self.counts)
        self.emitted: dict[int, Tensor] = {}
        self.history: list[tuple[Tensor, Tensor]] = []

    def count(self, spikes: Tensor) -> None:
        self.counts += spikes.to(torch.int32)
        if self.activity is not self.counts:
            self.activity += spikes.abs().to(torch.int32)
        if self.trace is not None:
            self.trace = self.trace * self.dynamics.leak + spikes


def simulate(
    graph: Graph,
    phase: Phase,
    arithmetic: Arithmetic,
    samples: int,
    encoded: Tensor | None,
    currents: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    trace: bool,
) -> Result:
    """Run `phase` tick by tick; tensors are (samples, neurons)."""
    neurons = [name for name in phase.order if graph.population(name).kind != "input"]
    empty = {name: arithmetic.tensor(np.zeros((samples, int(np.prod(graph.population(name).shape))))) for name in neurons}
    states = {name: _State(empty[name], phase.dynamics[name], arithmetic) for name in neurons}
    constant = {
        name: [(start, arithmetic.tensor(current).reshape(-1)) for start, current in biases]
        for name, biases in codec.bias_currents(graph, phase).items()
    }
    incoming = {name: [s for s in phase.synapses if s.target == name] for name in neurons}
    longest = max((s.delay for s in phase.synapses), default=0)
    inputs: dict[int, Tensor] = {}
    for tick in range(phase.ticks - phase.timing.flush):
        for name in phase.order:
            model_step = phase.step_at(name, tick)
            if name not in states:
                if model_step is not None and encoded is not None:
                    inputs[tick] = encoded
                continue
            state = states[name]
            for synapse in incoming[name]:
                source = states[synapse.source].emitted if synapse.source in states else inputs
                if (tick - synapse.delay) in source:
                    spikes = source[tick - synapse.delay]
                    gated = spikes if synapse.gate is None else spikes * masks[synapse.gate]
                    arriving = arithmetic.product(synapse, gated)
                    state.waiting = arriving if state.waiting is None else state.waiting + arriving
            if model_step is not None:
                _advance(
                    state, arithmetic, _sum(state.waiting, currents.get(name), _from_step(constant.get(name, ()), model_step)), tick, trace
                )
                for old in [earlier for earlier in state.emitted if earlier < tick - longest]:
                    del state.emitted[old]
    return _result(graph, phase, states)


def _advance(state: _State, arithmetic: Arithmetic, current: Tensor | None, tick: int, trace: bool) -> None:
    total = torch.zeros_like(state.potential) if current is None else current
    state.potential, spikes, saturated = arithmetic.step(state.potential, total, state.dynamics)
    state.waiting = None
    if saturated is not None:
        state.saturations += saturated.to(torch.int32)
    if state.dynamics.members != "none":
        state.emitted[tick] = spikes
        state.count(spikes)
    if trace:
        state.history.append((spikes.to(torch.int8), state.potential))


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

    return Result(
        phase=phase.name,
        time_steps=phase.time_steps,
        counts={name: array(name, s.counts, np.int32) for name, s in states.items()},
        activity={name: array(name, s.activity, np.int32) for name, s in states.items()},
        traces={name: array(name, s.counts if s.trace is None else s.trace, np.float64) for name, s in states.items()},
        potentials={name: array(name, s.potential, wide) for name, s in states.items()},
        saturations={name: array(name, s.saturations, np.int32) for name, s in states.items()},
        history={
            name: History(
                array(name, torch.stack([a for a, _ in s.history]), np.int8), array(name, torch.stack([b for _, b in s.history]), wide)
            )
            for name, s in states.items()
            if s.history
        },
    )
