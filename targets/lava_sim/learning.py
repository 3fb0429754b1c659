"""A network of Lava processes that learns: every synapse is one process for both phases, which holds its weights once and changes them itself.

What the host gives for an update goes through shared memory once a batch: the error current, the output error, each tensor's rate. What it reads are rates and, after
the update, the weights, which it needs for the error of the next batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from toolchain import plasticity
from toolchain.errors import UsageError
from toolchain.ir import Array, Bias, Graph, Population, Synapse, weight_of
from toolchain.notation import process_names
from toolchain.plasticity import Plastic
from toolchain.target import Result
from toolchain.targets.lava_sim.compile import Run
from toolchain.targets.lava_sim.plan import PHASES, Learned, LearnedBias, Lesson, Part, PlasticPart, Role, shared

if TYPE_CHECKING:
    from lava.magma.core.process.process import AbstractProcess

    from toolchain.targets.lava_sim import LavaSim


class LearningRun(Run):
    """An executable whose feedback phase can end in an update (`toolchain.lesson.Learner`); `target.batch` is the largest batch that learns together."""

    def __init__(self, graph: Graph, target: LavaSim, plastics: Sequence[Plastic], seed: int) -> None:
        self._lesson = Lesson(len(plastics), seed)
        self._learned = {p.tensor: Learned(p, self._lesson, _held(graph, p)) for p in plastics if not p.on_host}
        self._messages: dict[str, Array] = {}
        super().__init__(graph, target)

    def forward(self, images: Array) -> Result:
        return self.run(images)

    def update(self, error: Array, message: Array, rates: Mapping[int, float], number: int) -> Result:
        """The feedback phase of at most a batch of samples, and update `number` at its end."""
        if len(message) > self._batch:
            raise UsageError(
                f"{len(message)} samples are to learn together and the network was built for {self._batch}: give a smaller batch"
            )
        for held in self._messages.values():
            held[: len(message)], held[len(message) :] = message, 0
        self._lesson.give(number, rates)
        try:
            back = self.run(error, phase="feedback")
        finally:
            self._lesson.end()
        self.graph = plasticity.with_tensors(self.graph, {name: learned.values for name, learned in self._learned.items()})
        return back

    def set_bias(self, tensors: Mapping[str, Array]) -> None:
        self.graph = plasticity.with_tensors(self.graph, tensors)

    def __enter__(self) -> LearningRun:
        return self

    def _lines(self, used: Sequence[Population]) -> int:
        return len(used) + len(self.graph.phase("forward").synapses)

    def _part(self, population: Population, index: int) -> Part:
        """As of any network, but every synapse sends and listens in both phases, and what is learned is told."""
        part = super()._part(population, index)
        forward, feedback = part.roles
        if (
            feedback is not None and population.kind == "couple"
        ):  # its own incoming weights learn from its gated spikes, wherever else these go
            feedback = replace(feedback, gated=True)
        biases: tuple[LearnedBias, ...] = ()
        if forward is not None:
            forward, biases = self._with_learned_biases(population, forward)
        if population.kind == "readout":
            self._messages[population.name] = shared((self._batch, prod(population.shape)), np.int32 if part.integer else np.float64)
        return replace(
            part,
            roles=(forward, feedback),
            latches=feedback is not None and feedback.gated,
            narrow=False,
            biases=biases,
            message=self._messages.get(population.name),
            lesson=self._lesson,
        )

    def _with_learned_biases(self, population: Population, role: Role) -> tuple[Role, tuple[LearnedBias, ...]]:
        """Currents that the population can change, and what it learns for each; the order is that of `codec.bias_currents`."""
        declared: tuple[Bias, ...] = self.graph.phase("forward").bias.get(population.name, ()) if role.bias else ()
        currents = tuple((start, np.array(current)) for start, current in role.bias)
        found = tuple(
            LearnedBias(self._learned[bias.tensor], current, bias.exponent)
            for bias, (_, current) in zip(declared, currents, strict=True)
            if bias.tensor in self._learned
        )
        return replace(role, bias=currents), found

    def _processes(self, used: list[Population]) -> list[AbstractProcess]:
        """One process a population and one a synapse of the forward phase, through which the feedback phase runs the other way."""
        from toolchain.targets.lava_sim.processes.plastic import Plastic as PlasticProcess
        from toolchain.targets.lava_sim.processes.population import Couple, Input, Relay, TaughtReadout

        kinds = {"couple": Couple, "linear": Relay, "readout": TaughtReadout, "input": Input}
        populations: dict[str, Any] = {
            p.name: kinds[p.kind](part=self._parts[p.name], port_shape=self._port_shape(p), name=p.name) for p in used
        }
        synapses = []
        declared = self.graph.phase("forward").synapses
        for number, (synapse, name) in enumerate(zip(declared, process_names(declared, "learns"), strict=True)):
            back = self._backward(synapse)
            inputs, outputs = (prod(self.graph.population(name).shape) for name in (synapse.source, synapse.target))
            process = PlasticProcess(
                part=self._plastic_part(synapse, back, len(used) + number),
                inputs=inputs,
                outputs=outputs,
                name=name,
            )
            source, target = populations[synapse.source], populations[synapse.target]
            source.s_out.connect(process.s_in)
            process.a_out.connect(target.a_in)
            target.b_out.connect(process.b_in)
            if back is not None:
                process.c_out.connect(source.a_in)
            synapses.append(process)
        return [*populations.values(), *synapses]

    def _plastic_part(self, synapse: Synapse, back: Synapse | None, line: int) -> PlasticPart:
        (name,) = (name for op in synapse.ops if (name := weight_of(op)) is not None)
        lengths = tuple(self._ticks.get(phase, 0) for phase in PHASES)
        return PlasticPart(self._board, line, lengths, self.graph, synapse, back, self._learned.get(name), self._batch)

    def _backward(self, synapse: Synapse) -> Synapse | None:
        """The synapse of the feedback phase that is this one's adjoint, on the same tensor."""
        weights = {weight_of(op) for op in synapse.ops} - {None}
        found = [s for s in self._phases["feedback"].synapses if {weight_of(op) for op in s.ops} & weights]
        return found[0] if found else None


def _held(graph: Graph, plastic: Plastic) -> Array:
    """Shared memory with the first numbers of a tensor."""
    first = graph.tensors[plastic.tensor]
    values = shared(first.shape, np.int64 if graph.integer else np.float64)
    values[...] = first
    return values
