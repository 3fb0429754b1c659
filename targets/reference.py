"""The definition: the model step of `toolchain.ir` in NumPy, one tick after another, integers or floats. Every other target is measured against it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toolchain import codec, fixed
from toolchain.ir import Array, Graph, Phase
from toolchain.limits import LOIHI2, Limits
from toolchain.passes import LOIHI_PIPELINE, Pipeline
from toolchain.target import History, Latch, Result


@dataclass(frozen=True)
class Reference:
    """NumPy in int64 (integer graphs) or float64 (float graphs)."""

    trace: bool = False
    name: str = "reference"
    limits: Limits = LOIHI2
    pipeline: Pipeline = LOIHI_PIPELINE

    def available(self) -> str | None:
        return None

    def check(self, graph: Graph) -> list[str]:
        return []

    def compile(self, graph: Graph) -> Run:
        return Run(graph, self.trace)


REFERENCE = Reference()


class Run:
    """An executable of the reference target."""

    def __init__(self, graph: Graph, trace: bool) -> None:
        self.graph = graph
        self._trace = trace
        self._latch = Latch()

    def run(self, inputs: Array, *, phase: str = "forward") -> Result:
        graph, plan = self.graph, self.graph.phase(phase)
        if phase == "forward":
            encoded = codec.encode_input(graph, codec.check_inputs(graph, inputs))
            currents = {d.population: codec.input_current(graph, d, encoded) for d in plan.drive}
            masks = {}
        else:
            encoded = None
            error = codec.check_error(graph, inputs)
            forward = self._latch.forward(len(error))
            currents = {d.population: codec.error_current(graph, error) for d in plan.drive}
            masks = {s.gate: codec.mask(graph, forward, s.gate) for s in plan.synapses if s.gate is not None}
        result = simulate(graph, plan, len(inputs), encoded, currents, masks, trace=self._trace)
        if phase == "forward":
            self._latch.keep(result)
        return result

    def close(self) -> None:
        pass

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def simulate(
    graph: Graph, phase: Phase, samples: int, encoded: Array | None, currents: dict[str, Array], masks: dict[str, Array], *, trace: bool
) -> Result:
    """Run `phase` tick by tick. `encoded` is what input populations emit; `currents` are injected; `masks` gate synapses by population."""
    wide = np.int64 if graph.integer else np.float64
    shape = {name: (samples, *graph.population(name).shape) for name in phase.order}
    neurons = [name for name in phase.order if graph.population(name).kind != "input"]
    bias = codec.bias_currents(graph, phase)
    graded = {name for name in neurons if graph.population(name).kind == "linear"}
    potential = {name: np.zeros(shape[name], wide) for name in neurons}
    waiting = {name: np.zeros(shape[name], wide) for name in neurons}
    emitted: dict[str, dict[int, Array]] = {name: {} for name in phase.order}
    counts: dict[str, Array] = {name: np.zeros(shape[name], wide if name in graded else np.int32) for name in neurons}
    activity = {name: np.zeros(shape[name], np.int32) for name in neurons}
    traces = {name: np.zeros(shape[name]) for name in neurons}
    saturations = {name: np.zeros(shape[name], np.int32) for name in neurons}
    history: dict[str, list[tuple[Array, Array]]] = {name: [] for name in neurons}
    for tick in range(phase.ticks - phase.timing.flush):
        for name in phase.order:
            model_step = phase.step_at(name, tick)
            if encoded is not None and graph.population(name).kind == "input":
                if model_step is not None:
                    emitted[name][tick] = encoded[..., model_step] if graph.population(name).events else encoded
                continue
            for synapse in phase.synapses:
                if synapse.target == name and (tick - synapse.delay) in emitted[synapse.source]:
                    spikes = emitted[synapse.source][tick - synapse.delay]
                    gated = spikes if synapse.gate is None else spikes * masks[synapse.gate]
                    waiting[name] = waiting[name] + fixed.apply(synapse.ops, graph.tensors, gated, shape[name][1:], integer=graph.integer)
            if model_step is None:
                continue
            current = waiting[name] + currents.get(name, 0)
            for start, constant in bias.get(name, ()):
                current = current + (constant if model_step >= start else 0)
            after = fixed.step(potential[name], current, phase.dynamics[name], integer=graph.integer)
            waiting[name] = np.zeros(shape[name], wide)
            potential[name] = after.potential
            emitted[name][tick] = after.spikes
            counts[name] += after.spikes
            activity[name] += (after.spikes != 0).astype(np.int32)
            traces[name] = traces[name] * phase.dynamics[name].leak + after.spikes
            saturations[name] += after.saturated
            if trace:
                history[name].append((after.spikes, after.potential))
    full = {name: History(np.stack([s for s, _ in rows]), np.stack([u for _, u in rows])) for name, rows in history.items() if rows}
    return Result(phase.name, phase.time_steps, counts, activity, traces, potential, saturations, full)
