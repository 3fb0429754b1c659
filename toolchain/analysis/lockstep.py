"""The float graph and the integer graph side by side, tick by tick, and each integer population a second time, fed with the float graph's spikes.

One loop advances three copies of every population:

    float   the float graph, as it is
    entire  the integer graph, as it is: errors accumulate from population to population and round its loops
    single  each integer population by itself: all that arrives, also round its own loops, is what the float graph's populations sent (teacher
            forcing), so that what is left is its own weights', currents', thresholds' and leak's error. A relay's float values reach it rounded to
            its integer steps.

Nobody's history is kept: who wants to know something looks on while the steps are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from toolchain import codec
from toolchain.errors import GraphError
from toolchain.ir import POTENTIAL_LIMIT, Array, Bias, Drive, Graph, Synapse
from toolchain.passes import Retime, injected_like
from toolchain.target import Result

if TYPE_CHECKING:
    from torch import Tensor

    from toolchain.targets.torch_ticks import Arithmetic

Copy = Literal["float", "entire", "single"]

COPIES: tuple[Copy, ...] = ("float", "entire", "single")

Watch = Callable[[Copy, str, "Tensor", "Tensor"], None]
"""Told of every step of every copy of a population: its potentials and what it emitted, (samples, neurons). On each tick the float copy comes first."""


def alike(float_graph: Graph, graph: Graph) -> Graph:
    """The float graph with its input where integer `graph` has it, and in the same timing, so that both make the same steps on the same ticks."""
    float_graph = injected_like(float_graph, graph)
    mode = graph.phase("forward").timing.mode
    if mode != "step" and float_graph.phase("forward").timing.mode == "step":
        float_graph = Retime(mode)(float_graph)
    for phase in graph.phases:
        own = float_graph.phase(phase.name)
        ends = [[(s.source, s.target, s.delay) for s in p.synapses] for p in (own, phase)]
        if own.order != phase.order or own.timing != phase.timing or ends[0] != ends[1]:
            raise GraphError(
                f"the float graph and the integer graph of '{graph.provenance.model}' differ in the {phase.name} phase by more than numbers: give the float graph that "
                "the integer one was made of"
            )
    return float_graph


class Lockstep:
    """`floats` and `integers` (None: floats alone), which are `alike`, run together on the CPU; floats in float64, or in float32 as on a GPU."""

    def __init__(self, floats: Graph, integers: Graph | None, *, dtype: Literal["float32", "float64"] = "float64") -> None:
        import torch

        from toolchain.targets.sim import Integers
        from toolchain.targets.torch_float import Floats

        if floats.integer or (integers is not None and not integers.integer):
            raise GraphError("a float graph and an integer one run side by side: give them in this order")
        self.floats, self.integers = floats, integers
        self.copies = COPIES if integers is not None else COPIES[:1]
        cpu = torch.device("cpu")
        self._arithmetic: dict[str, tuple[Arithmetic, Arithmetic | None]] = {
            phase.name: (
                Floats(floats, phase, cpu, dtype),
                None if integers is None else Integers(integers, integers.phase(phase.name), cpu),
            )
            for phase in floats.phases
        }

    def graph(self, copy: Copy) -> Graph:
        """The graph that reads what a copy made."""
        if copy == "float":
            return self.floats
        assert self.integers is not None
        return self.integers

    def forward(self, inputs: Array, watch: Watch, time_steps: int) -> None:
        """`time_steps` of the forward phase on `inputs` (samples, *input shape), in [0, 1]; of events as many as they have frames."""
        encoded = {copy: codec.encode_input(self.graph(copy), inputs) for copy in self.copies}
        currents = {
            copy: {d: codec.input_current(self.graph(copy), d, encoded[copy]) for d in self.graph(copy).phase("forward").drive}
            for copy in self.copies
        }
        self._run("forward", time_steps, len(inputs), encoded, currents, {}, watch)

    def feedback(self, forward: Mapping[Copy, Result], errors: Mapping[Copy, Array], watch: Watch, time_steps: int) -> None:
        """`time_steps` of the feedback phase behind the forward phase's results. A copy has masks and errors (samples, *shape of the driven population)
        of its own, but for `single`, which has the float graph's."""
        known: dict[Copy, Copy] = {"float": "float", "entire": "entire", "single": "float"}
        currents = {
            copy: {d: codec.error_current(self.graph(copy), errors[known[copy]]) for d in self.graph(copy).phase("feedback").drive}
            for copy in self.copies
        }
        self._run("feedback", time_steps, len(errors["float"]), {}, currents, masks_of(self, forward), watch)

    def _run(
        self,
        phase: str,
        time_steps: int,
        samples: int,
        encoded: Mapping[Copy, Array],
        currents: Mapping[Copy, Mapping[Drive, Array]],
        masks: Mapping[str, Array],
        watch: Watch,
    ) -> None:
        import torch

        from toolchain.targets.torch_ticks import simulate

        joint = _Joint(self, phase, self._arithmetic[phase], encoded, watch)
        with torch.inference_mode():
            held = {
                _called(copy, drive.population): _rows(joint.current(current, _called(copy, drive.population)))
                for copy, found in currents.items()
                for drive, current in found.items()
            }
            gates = {name: _rows(joint.emitted(mask, name)) for name, mask in masks.items()}
            plan = msgspec.structs.replace(joint.graph.phase(phase), time_steps=time_steps)
            simulate(joint.graph, plan, joint, samples, encoded.get("float"), held, gates, trace=False)


class Kept:
    """Looks on, and keeps what each copy has left behind after the graphs' own number of time steps: what runs of it would have returned."""

    def __init__(self, run: Lockstep, phase: str) -> None:
        self._run, self._phase = run, phase
        self._steps: dict[tuple[Copy, str], int] = {}
        self._counts: dict[tuple[Copy, str], Tensor] = {}
        self._traces: dict[tuple[Copy, str], Tensor] = {}
        self._potentials: dict[tuple[Copy, str], Tensor] = {}

    def watch(self, copy: Copy, name: str, potential: Tensor, emitted: Tensor) -> None:
        import torch

        key, plan = (copy, name), self._run.graph(copy).phase(self._phase)
        step = self._steps[key] = self._steps.get(key, 0) + 1
        if step > plan.time_steps:
            return
        leak, sent = plan.dynamics[name].leak, emitted.to(torch.float64)
        self._counts[key] = self._counts[key] + sent if step > 1 else sent
        self._traces[key] = self._counts[key] if leak == 1 else self._traces[key] * leak + sent if step > 1 else sent
        if step == plan.time_steps:
            self._potentials[key] = potential

    def result(self, copy: Copy) -> Result:
        """What is kept of a copy. Activity and saturations are not."""
        graph = self._run.graph(copy)
        plan = graph.phase(self._phase)

        def shaped(kept: Mapping[tuple[Copy, str], Tensor], dtype: npt.DTypeLike) -> dict[str, Array]:
            return {
                name: values.numpy().astype(dtype).reshape(len(values), *graph.population(name).shape)
                for (owner, name), values in kept.items()
                if owner == copy
            }

        counts = shaped(self._counts, np.float64)
        return Result(
            phase=self._phase,
            time_steps=plan.time_steps,
            counts=counts,
            activity={},
            traces=shaped(self._traces, np.float64),
            potentials=shaped(self._potentials, np.float64),
            saturations={},
        )


def masks_of(run: Lockstep, forward: Mapping[Copy, Result]) -> dict[str, Array]:
    """Masks of the float graph and of the integer graph by the name of the copy they gate."""
    gates = {s.gate for s in run.floats.phase("feedback").synapses if s.gate is not None}
    return {
        _called(copy, gate): codec.mask(run.graph(copy), forward[copy], gate) for copy in run.copies if copy != "single" for gate in gates
    }


def _called(copy: Copy, name: str) -> str:
    return name if copy == "float" else f"{name} ({copy})"


@dataclass(frozen=True)
class _Connection:
    """Whose products a synapse of the joint graph takes, and by how many integer steps a float source's values are multiplied first (None: not)."""

    arithmetic: Arithmetic
    synapse: Synapse
    steps: float | None = None


class _Joint:
    """All copies as one graph, and the arithmetic that gives each its own numbers."""

    def __init__(
        self, run: Lockstep, phase: str, arithmetic: tuple[Arithmetic, Arithmetic | None], encoded: Mapping[Copy, Array], watch: Watch
    ) -> None:
        self._run, self._encoded, self._watch = run, encoded, watch
        self._arithmetic: dict[Copy, Arithmetic | None] = {"float": arithmetic[0], "entire": arithmetic[1], "single": arithmetic[1]}
        self._phase = run.floats.phase(phase)
        self._inputs = {population.name for population in run.floats.of_kind("input")}
        self._owner: dict[str, tuple[Copy, str]] = {
            _called(copy, name): (copy, name) for name in self._phase.order for copy in run.copies if self._copied(copy, name)
        }
        self._connections: dict[int, _Connection] = {}
        synapses = tuple(s for copy in run.copies for s in self._synapses(copy))
        self.graph = self._joined(synapses)

    def _copied(self, copy: Copy, name: str) -> bool:
        """An input has no error of its own: that of the integer graph feeds both of its copies."""
        return copy != "single" or name not in self._inputs

    def _synapses(self, copy: Copy) -> list[Synapse]:
        arithmetic, graph = self._arithmetic[copy], self._run.graph(copy)
        assert arithmetic is not None
        made = []
        for synapse in graph.phase(self._phase.name).synapses:
            heard: Copy = "float" if copy == "single" and synapse.source not in self._inputs else "entire" if copy == "single" else copy
            joined = msgspec.structs.replace(
                synapse,
                source=_called(heard, synapse.source),
                target=_called(copy, synapse.target),
                gate=None if synapse.gate is None else _called(heard, synapse.gate),
            )
            relayed = copy == "single" and graph.population(synapse.source).kind == "linear"
            self._connections[id(joined)] = _Connection(arithmetic, synapse, self.steps(synapse.source) if relayed else None)
            made.append(joined)
        return made

    def steps(self, name: str) -> float:
        """How many steps of the integer graph make one unit of the float graph."""
        return self._run.graph("entire").scale(self._phase.name, name) / self._run.floats.scale(self._phase.name, name)

    def _joined(self, synapses: Sequence[Synapse]) -> Graph:
        """The graph that the loop sees. Its numbers are the arithmetic's business, so what it holds as floats may be whole numbers."""
        floats, phase = self._run.floats, self._phase
        populations = tuple(msgspec.structs.replace(floats.population(name), name=called) for called, (_, name) in self._owner.items())
        bias: dict[str, tuple[Bias, ...]] = {}
        tensors: dict[str, Array] = {}
        for called, (copy, name) in self._owner.items():
            graph = self._run.graph(copy)
            constants = codec.bias_currents(graph, graph.phase(phase.name)).get(name, [])
            for i, (start, values) in enumerate(constants):
                tensors[f"{called} {i}"] = values
                bias[called] = (*bias.get(called, ()), Bias(f"{called} {i}", start=start))
        joint = msgspec.structs.replace(
            phase,
            order=tuple(self._owner),
            dynamics={
                called: self._run.graph(copy).phase(phase.name).dynamics[name]
                for called, (copy, name) in self._owner.items()
                if name in phase.dynamics
            },
            synapses=tuple(synapses),
            bias=bias,
            drive=(),
            timing=msgspec.structs.replace(
                phase.timing,
                start={called: phase.timing.start[name] for called, (_, name) in self._owner.items() if name in phase.timing.start},
            ),
        )
        return msgspec.structs.replace(floats, populations=populations, phases=(joint,), tensors=tensors, placement=None)

    def _own(self, called: str) -> tuple[Arithmetic, Copy, str]:
        copy, name = self._owner[called]
        arithmetic = self._arithmetic[copy]
        assert arithmetic is not None
        return arithmetic, copy, name

    def product(self, synapse: Synapse, spikes: Tensor) -> Tensor:
        found = self._connections[id(synapse)]
        if found.steps is not None:
            spikes = (spikes * found.steps).round().clamp(-POTENTIAL_LIMIT, POTENTIAL_LIMIT)
        return found.arithmetic.product(found.synapse, spikes)

    def step(self, population: str, potential: Tensor, current: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        arithmetic, copy, name = self._own(population)
        made = arithmetic.step(name, potential, current)
        self._watch(copy, name, made[0], made[1])
        return made

    def current(self, values: Array, population: str) -> Tensor:
        arithmetic, _, name = self._own(population)
        return arithmetic.current(values, name)

    def emitted(self, values: Array, population: str) -> Tensor:
        arithmetic, copy, name = self._own(population)
        if copy == "entire" and name in self._inputs:
            # The loop hands every input what the float graph's is given; of events a frame at a time.
            values = codec.encode_input(self._run.graph(copy), values)
        return arithmetic.emitted(values, name)


def _rows(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)
