"""Inference as an ONNX file: the forward phase of a float graph, its time steps one after the other, with every weight once.

    input -> step 0 -> step 1 -> ... -> step T - 1 -> logits, and the firing rates of every population

A step is the model step of `toolchain.ir`: add, fire (a comparison), subtract, leak. Long phases are written as a Loop over the steps, whose body is one of them; both forms compute the
same. The feedback phase is not part of the file. ONNX's operators are those of opset 17 (https://onnx.ai/onnx/operators), which onnxruntime 1.20 and later read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

import toolchain
from toolchain import fixed
from toolchain.errors import DesignRuleError, GraphError
from toolchain.exchange.onnx_nodes import Sheet, connect
from toolchain.ir import Drive, Graph, Shape, Synapse

Form = Literal["auto", "unrolled", "loop"]
Numbers = Literal["float32", "float64"]

OPSET = 17
IR_VERSION = 8
"""What every onnxruntime since 1.12 reads."""

UNROLLED_NODES = 20_000
"""A phase of more nodes is written as a Loop."""

LARGEST_FILE = 2**31 - 2**20
"""Protocol buffers end at 2 GiB."""

INFERENCE_ONLY = (
    "inference only: the feedback phase, whose signed spikes carry the gradient, is not part of the file; export --format nir keeps it"
)

INPUT, LOGITS = "input", "logits"


@dataclass(frozen=True)
class Written:
    """An ONNX file's bytes, the graph it computes, whether its steps are unrolled or a loop, and how many nodes there are."""

    graph: Graph
    content: bytes = field(repr=False)
    form: str
    nodes: int
    opset: int = OPSET


def encoded(graph: Graph, *, numbers: Numbers = "float32", form: Form = "auto") -> Written:
    """The ONNX file of the forward phase of `graph` (floats, in model steps), the same bytes whenever it is made.

    Input `input` (samples, *shape) in [0, 1], of events (samples, *shape, T). Outputs `logits` (samples, classes) and `rate.NAME` (samples, *shape) of each population of couples.
    GraphError for a graph of integers or in hardware time; DesignRuleError where the file would pass 2 GiB.
    """
    from onnx import checker, helper, numpy_helper

    phase = graph.phase("forward")
    if graph.integer or phase.timing.mode != "step":
        raise GraphError(
            f"an ONNX file holds the float graph in model steps, and that of '{graph.provenance.model}' is compiled: give the model"
        )
    size = sum(graph.tensors[name].size for name in graph.tensors) * np.dtype(numbers).itemsize
    if size > LARGEST_FILE:
        raise DesignRuleError(
            f"'{graph.provenance.model}' has {size:,} bytes of weights and an ONNX file holds 2 GiB: export a smaller network"
        )
    made = _Unrolled(graph, numbers)
    looped = form == "loop" or (form == "auto" and made.estimate * phase.time_steps > UNROLLED_NODES)
    (made.loop if looped else made.unroll)()
    (source,) = graph.of_kind("input")
    frames = (phase.time_steps,) if source.events else ()
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(numbers))
    sheet = made.sheet
    content = helper.make_graph(
        sheet.nodes,
        graph.provenance.model,
        [helper.make_tensor_value_info(INPUT, kind, ["samples", *source.shape, *frames])],
        [helper.make_tensor_value_info(name, kind, ["samples", *shape]) for name, shape in made.outputs.items()],
        [numpy_helper.from_array(values, name) for name, values in sheet.constants.items()],
        doc_string=f"{phase.time_steps} time steps of a spiking network, {'a loop' if looped else 'unrolled'}; {INFERENCE_ONLY}",
    )
    model = helper.make_model(
        content,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="fsnn-toolchain",
        producer_version=toolchain.__version__,
    )
    helper.set_model_props(model, _facts(graph, numbers, looped))
    checker.check_model(model)
    return Written(graph, model.SerializeToString(deterministic=True), "loop" if looped else "unrolled", len(sheet.nodes))


def _facts(graph: Graph, numbers: str, looped: bool) -> dict[str, str]:
    """What the file says of itself, in ONNX's metadata."""
    phase, events = graph.phase("forward"), graph.of_kind("input")[0].events
    return {
        "toolchain": toolchain.__version__,
        "model": graph.provenance.model,
        "source_sha256": graph.provenance.source_sha256,
        "time_steps": str(phase.time_steps),
        "form": "loop" if looped else "unrolled",
        "numbers": numbers,
        "carries": INFERENCE_ONLY,
        "input": "events in [0, 1], time last" if events else "values in [0, 1], held for all time steps; normalisation is in the file",
        "notes": "; ".join(graph.provenance.notes),
    }


class _Clock(Protocol):
    """Where in time the nodes of a step are: `behind` ends the names of its nodes."""

    behind: str

    def number(self) -> str:
        """The name of the step's number."""

    def since(self, start: int, values: str, name: str) -> tuple[str, ...]:
        """`values` from step `start` on; before it nothing, or zeros."""


class _Unfolded:
    """One step of many, whose number is known."""

    def __init__(self, sheet: Sheet, step: int) -> None:
        self.behind, self._sheet, self._step = f".{step}", sheet, step

    def number(self) -> str:
        return self._sheet.whole(self._step)

    def since(self, start: int, values: str, name: str) -> tuple[str, ...]:
        return (values,) if self._step >= start else ()


class _Looping:
    """The step of a loop's body, whose number is a value."""

    def __init__(self, sheet: Sheet, number: str) -> None:
        self.behind, self._sheet, self._number = "", sheet, number
        self._factors: dict[int, str] = {}

    def number(self) -> str:
        return self._number

    def since(self, start: int, values: str, name: str) -> tuple[str, ...]:
        if start == 0:
            return (values,)
        if start not in self._factors:
            began = self._sheet.add("GreaterOrEqual", self._number, self._sheet.whole(start), name=f"since.{start}")
            self._factors[start] = self._sheet.cast(began, f"since.{start}.factor")
        return (self._sheet.add("Mul", values, self._factors[start], name=name),)


class _Unrolled:
    """The forward phase of one graph being written. What a still input makes is the same at every step and is computed once."""

    def __init__(self, graph: Graph, numbers: str) -> None:
        self.graph, self.phase = graph, graph.phase("forward")
        self.sheet = Sheet(numbers)
        self.shapes = {population.name: population.shape for population in graph.populations}
        self.kinds = {population.name: population.kind for population in graph.populations}
        (self.source,) = graph.of_kind("input")
        (self.readout,) = (population.name for population in graph.of_kind("readout"))
        self.neurons = [name for name in self.phase.order if self.kinds[name] != "input"]
        self.couples = [name for name in self.neurons if self.kinds[name] == "couple"]
        self.outputs: dict[str, Shape] = {LOGITS: self.shapes[self.readout]} | {f"rate.{name}": self.shapes[name] for name in self.couples}
        for name in (INPUT, *self.outputs):
            self.sheet.names.new(name)
        self.steady = {} if self.source.events else self._steady()

    @property
    def estimate(self) -> int:
        """About how many nodes a time step takes."""
        return sum(3 + len(synapse.ops) for synapse in self.phase.synapses) + 6 * len(self.neurons)

    def _steady(self) -> dict[int, str]:
        """By number: what the synapses of a still input make at every step."""
        return {
            number: self._product(self.sheet, synapse, INPUT, f"{synapse.source}.{synapse.target}")
            for number, synapse in enumerate(self.phase.synapses)
            if synapse.source == self.source.name
        }

    def _product(self, sheet: Sheet, synapse: Synapse, values: str, name: str) -> str:
        ends = self.shapes[synapse.source], self.shapes[synapse.target]
        return connect(sheet, synapse.ops, self.graph.tensors, *ends, values, name)

    def _driven(self) -> dict[str, str]:
        """The current that the host would inject, by population (see `codec.input_current`)."""
        return {drive.population: self._injected(drive) for drive in self.phase.drive}

    def _injected(self, drive: Drive) -> str:
        name, shape = f"{drive.population}.drive", self.shapes[drive.population]
        made = connect(self.sheet, drive.ops, self.graph.tensors, self.source.shape, shape, INPUT, name)
        return made if drive.bias is None else self.sheet.add("Add", made, self._spread(drive.bias, shape), name=name)

    def _spread(self, tensor: str, shape: Shape) -> str:
        """A tensor of full population shape that meets every sample."""
        return self.sheet.weights(tensor, self.graph.tensors[tensor], (1, *shape))

    # the two forms

    def unroll(self) -> None:
        """Every step's nodes, one step after the other."""
        sheet, driven = self.sheet, self._driven()
        held: dict[str, str] = {}
        traces: dict[str, str] = {}
        emitted: dict[str, str] = {}
        for step in range(self.phase.time_steps):
            emitted = self._step(sheet, _Unfolded(sheet, step), driven, held, traces, emitted)
        self._finish(held, traces)

    def loop(self) -> None:
        """One step as the body of a Loop, which hands on potentials, traces and what arrives a step later."""
        from onnx import TensorProto, helper

        body, driven = Sheet(self.sheet.numbers.name, self.sheet), self._driven()
        late = sorted({s.source for n, s in enumerate(self.phase.synapses) if s.delay and n not in self.steady})
        keeps = [("potential", name) for name in self.neurons if self.kinds[name] != "linear"]
        keeps += [("trace", name) for name in self.couples] + [("spikes", name) for name in late]
        entering = {keep: body.names.new(f"{keep[1]}.{keep[0]}.before") for keep in keeps}
        held, traces, before = ({n: name for (k, n), name in entering.items() if k == kind} for kind in ("potential", "trace", "spikes"))
        step, going = body.names.new("step"), body.names.new("going")
        emitted = self._step(body, _Looping(body, step), driven, held, traces, before)
        left = {"potential": held, "trace": traces, "spikes": emitted}
        on = body.add("Identity", going, name="on")
        leaving = [body.add("Identity", left[kind][name], name=f"{name}.{kind}.behind") for kind, name in keeps]
        numbers = helper.np_dtype_to_tensor_dtype(body.numbers)
        shapes: list[list[str | int | None]] = [["samples", *self.shapes[name]] for _, name in keeps]
        graph = helper.make_graph(
            body.nodes,
            "step",
            [
                helper.make_tensor_value_info(step, TensorProto.INT64, []),
                helper.make_tensor_value_info(going, TensorProto.BOOL, []),
                *(helper.make_tensor_value_info(entering[keep], numbers, shape) for keep, shape in zip(keeps, shapes, strict=True)),
            ],
            [
                helper.make_tensor_value_info(on, TensorProto.BOOL, []),
                *(helper.make_tensor_value_info(name, numbers, shape) for name, shape in zip(leaving, shapes, strict=True)),
            ],
        )
        zeros = [self._zeros(self.sheet, name) for _, name in keeps]
        ends = {keep: self.sheet.names.new(f"{keep[1]}.{keep[0]}.end") for keep in keeps}
        steps = self.sheet.whole(self.phase.time_steps)
        self.sheet.nodes.append(helper.make_node("Loop", [steps, "", *zeros], list(ends.values()), name="steps", body=graph))
        self._finish(*({n: name for (k, n), name in ends.items() if k == kind} for kind in ("potential", "trace")))

    # what both share

    def _step(
        self, sheet: Sheet, clock: _Clock, driven: dict[str, str], held: dict[str, str], traces: dict[str, str], before: dict[str, str]
    ) -> dict[str, str]:
        """One model step: what populations emit, by name; what they hold and their traces are replaced. `before` is what the step before emitted."""
        emitted = {self.source.name: self._frame(sheet, clock)}
        for name in self.neurons:
            current = sheet.total(
                [*self._currents(sheet, clock, name, emitted, before), *self._constant(clock, driven, name)],
                f"{name}.current{clock.behind}",
            )
            self._advance(sheet, name, current, held, emitted, traces, clock.behind)
        return emitted

    def _frame(self, sheet: Sheet, clock: _Clock) -> str:
        """What the input emits at a step: of events their frame."""
        if not self.source.events:
            return INPUT
        return sheet.add("Gather", INPUT, clock.number(), name=f"{self.source.name}.frame{clock.behind}", axis=1 + len(self.source.shape))

    def _currents(self, sheet: Sheet, clock: _Clock, target: str, emitted: dict[str, str], before: dict[str, str]) -> Iterator[str]:
        """What synapses bring to a population."""
        for number, synapse in enumerate(self.phase.synapses):
            if synapse.target != target:
                continue
            name = f"{synapse.source}.{target}{clock.behind}"
            if number in self.steady:
                yield from clock.since(synapse.delay, self.steady[number], name)
            elif not synapse.delay or synapse.source in before:  # nothing was emitted before the first step
                yield self._product(sheet, synapse, (before if synapse.delay else emitted)[synapse.source], name)

    def _constant(self, clock: _Clock, driven: dict[str, str], target: str) -> Iterator[str]:
        """The current of the host and the biases of a population; the readout's comes behind the last step."""
        if target in driven:
            yield driven[target]
        for bias in self.phase.bias.get(target, ()) if target != self.readout else ():
            yield from clock.since(bias.start, self._spread(bias.tensor, self.shapes[target]), f"{target}.bias{clock.behind}")

    def _zeros(self, sheet: Sheet, name: str) -> str:
        """0 for every sample and neuron of a population."""
        from onnx import numpy_helper

        samples = sheet.add("Shape", INPUT, name="samples", start=0, end=1)
        whole = sheet.add("Concat", samples, sheet.whole(list(self.shapes[name])), name=f"{name}.shape", axis=0)
        return sheet.add("ConstantOfShape", whole, name=f"{name}.zeros", value=numpy_helper.from_array(np.zeros(1, sheet.numbers)))

    def _advance(
        self,
        sheet: Sheet,
        name: str,
        current: str | None,
        held: dict[str, str],
        emitted: dict[str, str],
        traces: dict[str, str],
        behind: str,
    ) -> None:
        """One step of a population, as `fixed.step` has it: from what it `held` and its `current` to what it holds, and emits, and its trace."""
        dynamics = self.phase.dynamics[name]
        before = held.get(name)
        if before is not None and dynamics.members == "none" and dynamics.leak != 1:
            before = sheet.add("Mul", before, sheet.number(dynamics.leak), name=f"{name}.leaked{behind}")
        if dynamics.members == "graded":
            emitted[name] = current or self._zeros(sheet, name)
            return
        total = sheet.total([value for value in (before, current) if value is not None], f"{name}.total{behind}") or self._zeros(
            sheet, name
        )
        if dynamics.members == "none":
            held[name] = total
            return
        fires = sheet.add("GreaterOrEqual", total, sheet.number(dynamics.threshold), name=f"{name}.fires{behind}")
        spikes = sheet.cast(fires, f"{name}.{'plus' if dynamics.members == 'both' else 'spikes'}{behind}")
        if dynamics.members == "both":
            below = sheet.add("LessOrEqual", total, sheet.number(-dynamics.threshold), name=f"{name}.fires.minus{behind}")
            minus = sheet.cast(below, f"{name}.minus{behind}")
            spikes = sheet.add("Sub", spikes, minus, name=f"{name}.spikes{behind}")
        emitted[name] = spikes
        taken = sheet.add("Mul", spikes, sheet.number(dynamics.reset), name=f"{name}.reset{behind}")
        left = sheet.add("Sub", total, taken, name=f"{name}.left{behind}")
        leaks = dynamics.leak != 1
        held[name] = sheet.add("Mul", left, sheet.number(dynamics.leak), name=f"{name}.potential{behind}") if leaks else left
        if name not in traces:
            traces[name] = spikes
            return
        kept = sheet.add("Mul", traces[name], sheet.number(dynamics.leak), name=f"{name}.kept{behind}") if leaks else traces[name]
        traces[name] = sheet.add("Add", kept, spikes, name=f"{name}.trace{behind}")

    def _finish(self, held: Mapping[str, str], traces: Mapping[str, str]) -> None:
        """Logits and rates, as `codec.logits` and `codec.rates` have them."""
        steps, dynamics = self.phase.time_steps, self.phase.dynamics
        norm = fixed.leak_sum(dynamics[self.readout].leak, steps) * self.graph.scale("forward", self.readout)
        scores = self.sheet.add("Div", held[self.readout], self.sheet.number(norm), name="scores")
        for bias in self.phase.bias.get(self.readout, ()):
            scores = self.sheet.add("Add", scores, self._spread(bias.tensor, self.shapes[self.readout]), name="scores")
        self._output("Identity", LOGITS, scores)
        for name in self.couples:
            self._output("Div", f"rate.{name}", traces[name], self.sheet.number(fixed.leak_sum(dynamics[name].leak, steps)))

    def _output(self, kind: str, name: str, *inputs: str) -> None:
        from onnx import helper

        self.sheet.nodes.append(helper.make_node(kind, list(inputs), [name], name=name))
