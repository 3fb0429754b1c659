"""Where integers part from floats: the float graph run with one kind of rounding switched on at a time, its rates beside its own without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from toolchain import codec, fixed
from toolchain.analysis.floats import Dtype, FloatRun
from toolchain.errors import GraphError
from toolchain.ir import Array, Drive, Dynamics, Graph, Phase, Synapse, weight_of
from toolchain.notation import sample_products, table
from toolchain.passes import Inject, Retime, grids
from toolchain.target import Result, get

if TYPE_CHECKING:
    from torch import Tensor

    from toolchain.targets.torch_ticks import Arithmetic

KINDS = ("weights", "currents", "thresholds", "leak", "inputs")
"""What is rounded: weights, also those of the host; biases and injected currents; thresholds and resets; leaks, and what they leave of a potential; input levels."""

WORK = 2**36
"""Products that one run may take: of large networks fewer samples are run, and then fewer time steps."""

EXACT_WORK = 2**32
"""Up to so many, runs are in float64, so that nothing but rounding differs; beyond, in float32, of which a few spikes tell."""

SEED = 0


@dataclass(frozen=True)
class Share:
    """One population in one phase: the mean |rate difference| from the float graph, over samples and neurons.

    A relay has values in place of rates, the readout (population's kind `readout`) logits. `integer` is the whole difference of the integer graph, `by_kind` what each kind of
    rounding makes alone. `weight_error` is the root mean square error of the weights on the chip that reach it, over that of the weights themselves.
    """

    phase: str
    population: str
    rate: float
    integer: float
    by_kind: dict[str, float]
    weight_error: float | None
    saturations: int


@dataclass(frozen=True)
class Budget:
    """The error budget of a compiled network on `samples` inputs, over `time_steps` by phase."""

    shares: tuple[Share, ...]
    samples: int
    time_steps: dict[str, int]

    def to_text(self) -> str:
        steps = ", ".join(f"{name} {count} time steps" for name, count in self.time_steps.items())
        head = ["phase", "population", "mean |rate|", "integers", *(f"{kind} alone" for kind in KINDS), "weights' rms error"]
        cells = [
            [
                s.phase,
                s.population,
                f"{s.rate:.4f}",
                f"{s.integer:.5f}",
                *(f"{s.by_kind[kind]:.5f}" for kind in KINDS),
                "-" if s.weight_error is None else f"{100 * s.weight_error:.2f} %",
            ]
            for s in self.shares
        ]
        title = f"mean |rate difference| from the float graph (readout: of logits), {self.samples:,} inputs, {steps}"
        return "\n".join([title, *table(head, cells, left=2)])

    def to_json(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "time_steps": self.time_steps,
            "populations": [
                {
                    "phase": s.phase,
                    "population": s.population,
                    "mean_rate": s.rate,
                    "rate_difference": s.integer,
                    "by_kind": s.by_kind,
                    "weight_error": s.weight_error,
                    "saturations": s.saturations,
                }
                for s in self.shares
            ],
        }


def budget(float_graph: Graph, graph: Graph, inputs: Array, error: Array | None = None) -> Budget:
    """What each kind of rounding costs each population of integer `graph`, made of the folded `float_graph` (injected and retimed or not).

    `inputs` (samples, *input shape) in [0, 1]. The feedback phase has the same `error` in every run (samples, *shape of the driven population), by default a seeded one
    of the size that is carried without clipping. Kinds interact, and saturation is none of them: the columns need not add up.
    """
    if float_graph.integer or not graph.integer:
        raise GraphError("an error budget compares the float graph with the integer one: give them in this order")
    samples, steps = _size(graph, len(inputs))
    floats, integers = _like(float_graph, graph).in_steps(steps), graph.in_steps(steps)
    values = codec.check_inputs(graph, inputs)[:samples]
    values = values[..., : steps["forward"]] if graph.of_kind("input")[0].events else values
    errors = None
    if graph.has_phase("feedback"):
        errors = _seeded(floats, samples) if error is None else codec.check_error(floats, error)[:samples]
    dtype: Dtype = "float64" if samples * sample_products(integers) <= EXACT_WORK else "float32"
    plain = _rounded(floats, integers, (), values, errors, dtype)
    whole = _integer(integers, values, errors)
    alone = {kind: _rounded(floats, integers, (kind,), values, errors, dtype) for kind in KINDS if _matters(kind, integers)}
    shares = tuple(
        _share(floats, integers, plain, whole, alone, phase, name)
        for phase in floats.phases
        for name in phase.order
        if floats.population(name).kind != "input"
    )
    return Budget(shares, samples, steps)


def _size(graph: Graph, samples: int) -> tuple[int, dict[str, int]]:
    """How many samples, and how many time steps of each phase, come to `WORK` products."""
    whole = sample_products(graph)
    samples = max(1, min(samples, WORK // whole))
    part = min(1.0, WORK / (samples * whole))
    least = {phase.name: 1 + max((bias.start for several in phase.bias.values() for bias in several), default=0) for phase in graph.phases}
    return samples, {phase.name: max(least[phase.name], int(phase.time_steps * part)) for phase in graph.phases}


def _like(float_graph: Graph, graph: Graph) -> Graph:
    """The float graph with its input where the integer graph has it, and in a timing that computes the same."""
    hosted = any(drive.source == "input" for drive in graph.phase("forward").drive)
    if hosted and not any(drive.source == "input" for drive in float_graph.phase("forward").drive):
        float_graph = Inject()(float_graph)
    if graph.phase("forward").timing.mode == "pipelined" and float_graph.phase("forward").timing.mode == "step":
        float_graph = Retime("pipelined")(float_graph)
    return float_graph


def _seeded(graph: Graph, samples: int) -> Array:
    shape = graph.population(codec.error_drive(graph).population).shape
    drawn: Array = np.random.default_rng(SEED).normal(size=(samples, *shape)) * codec.error_bound(graph) / 4
    return drawn


def _matters(kind: str, graph: Graph) -> bool:
    """Whether a kind of rounding changed anything at all."""
    if kind == "leak":
        return any(dynamics.leak != 1 for phase in graph.phases for dynamics in phase.dynamics.values())
    return kind != "thresholds" or any(name.endswith((".threshold", ".reset")) for name in graph.provenance.rounding)


def _integer(graph: Graph, values: Array, errors: Array | None) -> dict[str, Result]:
    sim = replace(get("sim"), device="cpu")  # type: ignore[type-var]  # a target is a dataclass
    with sim.compile(graph) as run:
        found = {"forward": run.run(values)}
        return found if errors is None else found | {"feedback": run.run(errors, phase="feedback")}


def _rounded(floats: Graph, integers: Graph, kinds: Sequence[str], values: Array, errors: Array | None, dtype: Dtype) -> dict[str, Result]:
    """Both phases of the float graph with some kinds of rounding."""
    units = _Units(floats, integers)
    graph = units.rounded(kinds)
    if "inputs" in kinds:
        values = codec.encode_input(integers, values) / units.levels
    run = FloatRun(
        graph,
        wrap=(lambda phase, arithmetic: _Truncating(phase, arithmetic, units.steps[phase.name])) if "leak" in kinds else None,
        inject=units.injected if "currents" in kinds else None,
        dtype=dtype,
    )
    forward = run.forward(values)
    return {"forward": forward} if errors is None else {"forward": forward, "feedback": run.feedback(forward, errors)}


class _Units:
    """Integers turned back into floats: how many integer steps make one unit of the float graph, population by population."""

    def __init__(self, floats: Graph, integers: Graph) -> None:
        self._floats, self._integers = floats, integers
        self.steps: dict[str, dict[str, float]] = {
            phase.name: {name: integers.scale(phase.name, name) / floats.scale(phase.name, name) for name in phase.order}
            for phase in integers.phases
        }
        source = integers.of_kind("input")[0].name
        self.levels = integers.scale("forward", source)
        self._kinds = {population.name: population.kind for population in integers.populations}

    def rounded(self, kinds: Sequence[str]) -> Graph:
        tensors = dict(self._floats.tensors)
        tensors |= self._weights() if "weights" in kinds else {}
        tensors |= self._biases() if "currents" in kinds else {}
        phases = tuple(self._phase(phase, kinds) for phase in self._floats.phases)
        return msgspec.structs.replace(self._floats, tensors=tensors, phases=phases)

    def _weights(self) -> dict[str, Array]:
        phase = self._integers.phase("forward")
        made: dict[str, Array] = {}
        for synapse in phase.synapses:
            self._add(made, synapse, self.steps["forward"][synapse.target] / self._message(synapse))
        for _, synapse in self._apart():
            graded = self.steps["feedback"][synapse.source] if self._kinds[synapse.source] == "linear" else 1.0
            self._add(made, synapse, self.steps["feedback"][synapse.target] / graded)
        for drive in phase.drive:
            op = _weighing(drive.ops)
            unit = self.steps["forward"][drive.population] / self.levels / grids.area(drive.ops)
            made[op.weight] = self._integers.tensors[op.weight] * (2.0 ** (drive.exponent - drive.shift) / unit)
        return made

    def _add(self, made: dict[str, Array], synapse: Synapse, unit: float) -> None:
        op = _weighing(synapse.ops)
        made[op.weight] = self._integers.tensors[op.weight] * (2.0**op.exponent * grids.area(synapse.ops) / unit)

    def _apart(self) -> list[tuple[Synapse, Synapse]]:
        """The feedback phase's synapses, float and integer, that quantize gave integers of their own: the float graph has no such tensor."""
        if not self._integers.has_phase("feedback"):
            return []
        pairs = _paired(self._floats, self._integers, "feedback")
        return [(ours, own) for ours, own in pairs if _weighing(own.ops).weight not in self._floats.tensors]

    def _message(self, synapse: Synapse) -> float:
        kind = self._kinds[synapse.source]
        return {"input": self.levels, "linear": self.steps["forward"].get(synapse.source, 1.0)}.get(kind, 1.0)

    def _biases(self) -> dict[str, Array]:
        made: dict[str, Array] = {}
        for phase in self._integers.phases:
            for name, biases in phase.bias.items():
                if self._kinds[name] != "readout":
                    made |= {b.tensor: self._integers.tensors[b.tensor] * (2.0**b.exponent / self.steps[phase.name][name]) for b in biases}
            for drive in phase.drive:
                if drive.bias is not None:
                    unit = self.steps[phase.name][drive.population]
                    made[drive.bias] = self._integers.tensors[drive.bias] * (2.0 ** (drive.exponent - drive.shift) / unit)
        return made

    def injected(self, drive: Drive, current: Array) -> Array:
        """A current as the 13-bit mantissa that the host would round it to."""
        name = "forward" if drive.source == "input" else "feedback"
        exponent = next(d.exponent for d in self._integers.phase(name).drive if d.population == drive.population)
        unit = self.steps[name][drive.population]
        held = fixed.injected(current * unit, exponent)
        return held.mantissa * (2.0**held.exponent / unit)

    def _phase(self, phase: Phase, kinds: Sequence[str]) -> Phase:
        own = self._integers.phase(phase.name).dynamics
        dynamics = {name: self._dynamics(phase.name, name, d, own[name], kinds) for name, d in phase.dynamics.items()}
        synapses = phase.synapses
        if "weights" in kinds and phase.name == "feedback":
            names = {id(ours): _weighing(own.ops).weight for ours, own in self._apart()}
            synapses = tuple(_reading(s, names[id(s)]) if id(s) in names else s for s in synapses)
        return msgspec.structs.replace(phase, dynamics=dynamics, synapses=synapses)

    def _dynamics(self, phase: str, name: str, dynamics: Dynamics, own: Dynamics, kinds: Sequence[str]) -> Dynamics:
        if "leak" in kinds:
            dynamics = msgspec.structs.replace(dynamics, leak=own.leak)
        if "thresholds" in kinds and dynamics.members in ("plus", "both"):
            unit = self.steps[phase][name]
            dynamics = msgspec.structs.replace(dynamics, threshold=own.threshold / unit, reset=own.reset / unit)
        return dynamics


def _weighing(ops: Sequence[Any]) -> Any:
    """The one operation of a quantized connection that reads a tensor."""
    (op,) = [op for op in ops if weight_of(op) is not None]
    return op


def _paired(floats: Graph, integers: Graph, phase: str) -> list[tuple[Synapse, Synapse]]:
    """The synapses of a phase, float and integer: quantize keeps their order."""
    return list(zip(floats.phase(phase).synapses, integers.phase(phase).synapses, strict=True))


def _reading(synapse: Synapse, name: str) -> Synapse:
    """The synapse with tensor `name` as its weight."""
    ops = tuple(op if weight_of(op) is None else msgspec.structs.replace(op, weight=name) for op in synapse.ops)
    return msgspec.structs.replace(synapse, ops=ops)


class _Truncating:
    """An arithmetic whose leaks leave whole steps of a potential, rounded towards zero as the chip's do."""

    def __init__(self, phase: Phase, arithmetic: Arithmetic, steps: Mapping[str, float]) -> None:
        self._phase, self._arithmetic, self._steps = phase, arithmetic, steps
        self.product, self.current, self.emitted = arithmetic.product, arithmetic.current, arithmetic.emitted

    def step(self, population: str, potential: Tensor, current: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        dynamics, steps = self._phase.dynamics[population], self._steps[population]
        if dynamics.leak == 1 or dynamics.members == "graded":
            return self._arithmetic.step(population, potential, current)
        if dynamics.members == "none":  # leaks before it adds
            return self._arithmetic.step(population, _whole(potential * dynamics.leak, steps) / dynamics.leak, current)
        after, spikes, saturated = self._arithmetic.step(population, potential, current)
        return _whole(after, steps), spikes, saturated


def _whole(potential: Tensor, steps: float) -> Tensor:
    """Rounded towards zero to whole steps; what is a whole number of them but for the last bits stays one."""
    scaled = potential * steps
    return (scaled + scaled.sign() * 1e-6).trunc() / steps


def _share(
    floats: Graph,
    integers: Graph,
    plain: Mapping[str, Result],
    whole: Mapping[str, Result],
    alone: Mapping[str, Mapping[str, Result]],
    phase: Phase,
    name: str,
) -> Share:
    own = _rates(floats, plain[phase.name], name)

    def difference(graph: Graph, results: Mapping[str, Result]) -> float:
        return float(np.abs(_rates(graph, results[phase.name], name) - own).mean())

    return Share(
        phase=phase.name,
        population=name,
        rate=float(np.abs(own).mean()),
        integer=difference(integers, whole),
        by_kind={kind: difference(floats, alone[kind]) if kind in alone else 0.0 for kind in KINDS},
        weight_error=_weight_error(floats, integers, phase.name, name),
        saturations=int(whole[phase.name].saturations[name].sum()),
    )


def _rates(graph: Graph, result: Result, name: str) -> Array:
    """Rates; of a relay its mean values in the model's unit, of the readout logits."""
    kind = graph.population(name).kind
    if kind == "readout":
        return codec.logits(graph, result)
    found = codec.rates(graph, result, name)
    return found / graph.scale(result.phase, name) if kind == "linear" else found


def _weight_error(floats: Graph, integers: Graph, phase: str, name: str) -> float | None:
    """sqrt(sum of squared errors / sum of squares) over the weights on the chip that reach a population, from the record of quantize."""
    pairs = [(ours, own) for ours, own in _paired(floats, integers, phase) if own.target == name]
    weights = [(floats.tensors[_weighing(ours.ops).weight], _weighing(own.ops).weight) for ours, own in pairs]
    squares = sum(float(np.sum(np.square(weight, dtype=np.float64))) for weight, _ in weights)
    records = integers.provenance.rounding
    if squares == 0 or any(tensor not in records for _, tensor in weights):
        return None
    return sqrt(sum(weight.size * records[tensor].rms_error ** 2 for weight, tensor in weights) / squares)
