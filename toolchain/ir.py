"""The graph: populations of ternary neuron couples, synapses, and the phases that run on them.

Everything here is frozen data; `verify` is the only judge of what is valid. No arithmetic happens in this module (see `fixed`), and neither
torch nor lava is imported.

The model step, for floats and integers alike. A phase runs on ticks 0, 1, 2, ...; population p updates on the ticks
`timing.start[p] + k * timing.period`, k = 0 .. time_steps - 1, and is silent on all others. On each tick, populations in `phase.order`:

1. what arrives is added to the population's waiting current: each synapse carries the spikes its source emitted `delay` ticks earlier;
2. on its own ticks the population adds the waiting current, bias and drive to its potential (integers: one clamp to 24 bit signed), and empties it;
3. it fires: +1 at potential >= threshold; -1 at potential <= -threshold where both members are enabled;
4. `reset` times the spike is subtracted;
5. it leaks: floats multiply, integers as in `fixed.decay`. The recorded potential is the one after this step.

A `readout` never fires, and leaks before it adds. Before `retime` period is 1, every start is 0 and delays are 0 (same step) or 1 (feedback).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite, prod
from typing import Any, Literal, Union

import msgspec
import numpy as np
import numpy.typing as npt

from toolchain.errors import GraphError

Array = npt.NDArray[Any]
Number = Union[int, float]
Shape = tuple[int, ...]

POTENTIAL_LIMIT = 2**23 - 1
"""Largest membrane potential of an integer graph: 24 bit signed, symmetric (Loihi)."""

EXPONENT_LIMIT = 7
"""Largest weight or current exponent of an integer graph (3 bits; Loihi)."""

MANTISSA_LIMIT = 2**12
"""A current's mantissa has 13 bits signed: -4096 .. 4095."""

SHIFT_LIMIT = 20
"""Largest number of extra fractional bits in the host's sums."""

LARGEST_STEPS = 100_000
"""Most time steps of a phase, and most ticks of its delays, starts and period: a larger number is a mistake."""

DECAY_ONE = 4096
"""A leak of an integer graph is (4096 - decay) / 4096 (Loihi's 12-bit decay)."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything a graph is made of: immutable, and strict when it is read from a file."""


class Dense(Part, frozen=True, tag="dense", tag_field="op"):
    """y = W x (or W^T x where `transpose`), W of shape (out, in). In integer graphs W holds mantissas and y is shifted left by `exponent`."""

    weight: str
    transpose: bool = False
    exponent: int = 0


class Conv2d(Part, frozen=True, tag="conv2d", tag_field="op"):
    """Cross-correlation, weight (out, in / groups, kh, kw), on (channels, height, width)."""

    weight: str
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    transpose: bool = False
    exponent: int = 0


class ConvTranspose2d(Part, frozen=True, tag="conv_transpose2d", tag_field="op"):
    """Transposed convolution, weight (in, out / groups, kh, kw), on (channels, height, width)."""

    weight: str
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    output_padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    transpose: bool = False
    exponent: int = 0


class AvgPool2d(Part, frozen=True, tag="avg_pool2d", tag_field="op"):
    """Mean over windows of `kernel`; its transpose spreads each value evenly over its window."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    transpose: bool = False


class Upsample(Part, frozen=True, tag="upsample", tag_field="op"):
    """Nearest-neighbour upsampling by a whole factor; its transpose sums each block."""

    factor: int
    transpose: bool = False


class Scale(Part, frozen=True, tag="scale", tag_field="op"):
    """y = factor * x."""

    factor: float


class Identity(Part, frozen=True, tag="identity", tag_field="op"):
    """y = x."""


Op = Union[Dense, Conv2d, ConvTranspose2d, AvgPool2d, Upsample, Scale, Identity]


class Population(Part, frozen=True):
    """`shape` counts neurons (or couples) per sample; `kind` as in the words of the design: couple, input, readout, linear."""

    name: str
    shape: Shape
    kind: Literal["couple", "input", "readout", "linear"]


class Dynamics(Part, frozen=True):
    """What a population does in one phase.

    `threshold` and `reset` are in the population's unit, `reset` is the amount subtracted on a spike (A = Vth - u_rest), `leak` lies in (0, 1].
    `members="plus"`: a binary neuron; `"both"`: signed spikes in {-1, 0, +1}; `"none"`: a readout, which only integrates.
    """

    leak: float
    threshold: Number = 0
    reset: Number = 0
    members: Literal["plus", "both", "none"] = "none"


class Synapse(Part, frozen=True):
    """A linear connection: `ops` are applied left to right to the source's spikes of `delay` ticks ago.

    `gate` names the population whose mask m = 1[0 < spike count of the forward phase < time_steps] multiplies the source's spikes first.
    """

    source: str
    target: str
    ops: tuple[Op, ...]
    delay: int = 0
    gate: Union[str, None] = None


class Bias(Part, frozen=True):
    """A current of full population shape, added at every step of the population from step `start` (counted from 0).

    In integer graphs the tensor holds mantissas and the current is mantissa << exponent. A readout's bias is a float tensor that the host
    adds to the logits once (`codec.logits`); it is never injected.
    """

    tensor: str
    exponent: int = 0
    start: int = 0


class Drive(Part, frozen=True):
    """A current that the host computes once per sample and the population adds at each of its steps.

    `source="input"`: the host applies `ops` and `bias` to the encoded input. `source="error"`: the current is the loss gradient with respect
    to the population's rate, times `gain` (SPIDE's scale factor). In integer graphs the current is mantissa << exponent with a
    13-bit mantissa; host weights carry `shift` extra fractional bits, so the host's sum is exact before its one rounding.
    """

    population: str
    source: Literal["input", "error"]
    ops: tuple[Op, ...] = ()
    bias: Union[str, None] = None
    gain: float = 1.0
    shift: int = 0
    exponent: int = 0


class Timing(Part, frozen=True):
    """When populations update, in ticks (hardware steps). See the module's docstring; `flush` closed-gate ticks end the phase."""

    mode: Literal["step", "exact", "pipelined"] = "step"
    period: int = 1
    start: dict[str, int] = {}
    flush: int = 0


class Phase(Part, frozen=True):
    """One run over the graph. `order` lists the populations that take part, in update order; targets count the spikes of all."""

    name: Literal["forward", "feedback"]
    time_steps: int
    order: tuple[str, ...]
    dynamics: dict[str, Dynamics]
    synapses: tuple[Synapse, ...]
    bias: dict[str, Bias] = {}
    drive: tuple[Drive, ...] = ()
    timing: Timing = Timing()

    @property
    def ticks(self) -> int:
        """Hardware steps of the whole phase, flush included."""
        last = max((self.timing.start.get(p, 0) for p in self.order), default=0)
        return last + (self.time_steps - 1) * self.timing.period + 1 + self.timing.flush

    def step_at(self, population: str, tick: int) -> int | None:
        """The model step (from 0) that `population` makes at `tick`, or None where it only listens."""
        offset = tick - self.timing.start.get(population, 0)
        step, rest = divmod(offset, self.timing.period)
        return step if rest == 0 and 0 <= step < self.time_steps else None


class Units(Part, frozen=True):
    """How the graph's numbers relate to the model's: `scale[phase][population]` graph units make 1.0 of the model's potential.

    For an input population the scale is the integer that stands for an input of 1.0. Float graphs scale the feedback phase by A / Ab
    (see `passes.adjoint`), integer graphs by the chip's grid as well.
    """

    numbers: Literal["float", "integer"]
    scale: dict[str, dict[str, float]]


class Rounding(Part, frozen=True):
    """What quantization did to one tensor: its exponent, the largest and root mean square error in the model's unit, and how many values clipped."""

    exponent: int
    max_error: float
    rms_error: float
    clipped: int


class Provenance(Part, frozen=True):
    """Where a graph comes from: model name, sha256 of the source weights, the passes applied, what rounding did to each tensor, and notes for people."""

    model: str
    source_sha256: str = ""
    passes: tuple[str, ...] = ()
    rounding: dict[str, Rounding] = {}
    notes: tuple[str, ...] = ()


class Graph(Part, frozen=True):
    """A network: populations, phases, tensors (read-only arrays by name), units, provenance. Treat every part as immutable."""

    populations: tuple[Population, ...]
    phases: tuple[Phase, ...]
    tensors: dict[str, Array]
    units: Units
    provenance: Provenance

    def population(self, name: str) -> Population:
        """The population called `name`; GraphError where there is none."""
        for population in self.populations:
            if population.name == name:
                return population
        raise GraphError(f"unknown population '{name}': the graph has {', '.join(p.name for p in self.populations)}")

    def phase(self, name: str) -> Phase:
        """The phase called `name`; GraphError where the graph has none."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise GraphError(f"the graph of '{self.provenance.model}' has no {name} phase: it has {', '.join(p.name for p in self.phases)}")

    def has_phase(self, name: str) -> bool:
        return any(phase.name == name for phase in self.phases)

    def of_kind(self, kind: str) -> tuple[Population, ...]:
        return tuple(population for population in self.populations if population.kind == kind)

    @property
    def integer(self) -> bool:
        return self.units.numbers == "integer"

    def scale(self, phase: str, population: str) -> float:
        """Graph units per 1.0 of the model's potential."""
        return self.units.scale.get(phase, {}).get(population, 1.0)


def frozen(array: npt.ArrayLike, dtype: npt.DTypeLike = None) -> Array:
    """A contiguous read-only copy, as graphs hold their tensors."""
    copy = np.array(array, dtype=dtype, order="C")
    copy.setflags(write=False)
    return copy


def weight_of(op: Op) -> str | None:
    """The tensor an operation reads, if any."""
    return getattr(op, "weight", None)


def tensor_names(phase: Phase) -> set[str]:
    """Every tensor that a phase reads."""
    ops = [op for synapse in phase.synapses for op in synapse.ops] + [op for drive in phase.drive for op in drive.ops]
    names = {name for op in ops if (name := weight_of(op)) is not None}
    names |= {bias.tensor for bias in phase.bias.values()}
    return names | {drive.bias for drive in phase.drive if drive.bias is not None}


def output_shape(op: Op, shape: Shape, tensors: Mapping[str, Array]) -> Shape:
    """The shape an operation makes of `shape`; GraphError where it does not fit. New operations are added here and in `fixed.apply`."""
    if isinstance(op, (Scale, Identity)):
        return shape
    if isinstance(op, Dense):
        if tensors[op.weight].ndim != 2:
            raise GraphError(f"weight '{op.weight}' has shape {tensors[op.weight].shape}: a dense connection needs (outputs, inputs)")
        out, into = tensors[op.weight].shape
        if op.transpose:
            out, into = into, out
        if prod(shape) != into:
            raise GraphError(f"weight '{op.weight}' takes {into} inputs but its source has {prod(shape)}: correct the shape of one of them")
        return (out,)
    raise GraphError(f"operation {type(op).__name__} is not compiled yet: fully connected networks are")


def verify(graph: Graph) -> None:
    """Raise GraphError, naming the population or synapse and the fix, unless the graph is valid."""
    names = [population.name for population in graph.populations]
    _require(len(set(names)) == len(names), f"population names repeat: {', '.join(names)}; give each its own")
    for population in graph.populations:
        _require(
            bool(population.shape) and all(n >= 1 for n in population.shape),
            f"population '{population.name}' has shape {population.shape}: every axis needs at least 1 neuron",
        )
    for name, tensor in graph.tensors.items():
        _require(bool(np.isfinite(tensor).all()), f"tensor '{name}' holds NaN or infinite values: retrain, or restore the checkpoint")
    phases = [phase.name for phase in graph.phases]
    _require(
        len(set(phases)) == len(phases) and "forward" in phases,
        f"a graph needs one forward phase and at most one feedback phase, not {phases}",
    )
    _require(len(graph.of_kind("readout")) == 1, f"a graph needs one readout, not {len(graph.of_kind('readout'))}")
    _require(bool(graph.of_kind("couple")), "a graph needs at least one population of couples")
    for phase in graph.phases:
        _verify_phase(graph, phase)
    _verify_forward(graph, graph.phase("forward"))
    _verify_scales(graph)


def _verify_forward(graph: Graph, forward: Phase) -> None:
    readout = graph.of_kind("readout")[0].name
    into = [synapse for synapse in forward.synapses if synapse.target == readout]
    _require(len(into) == 1, f"readout '{readout}' has {len(into)} connections in the forward phase: give it one")
    for population in graph.populations:
        takes_part = population.kind == "input" or population.name in forward.order
        _require(takes_part, f"population '{population.name}' takes no part in the forward phase: add it to the order, or remove it")
    for synapse in forward.synapses:
        where = f"synapse '{synapse.source}' -> '{synapse.target}' in the forward phase"
        _require(synapse.gate is None, f"{where} is gated: masks exist after the forward phase only")


def _verify_scales(graph: Graph) -> None:
    for phase, scales in graph.units.scale.items():
        for name, scale in scales.items():
            sound = isfinite(scale) and 1e-12 < scale < 1e12
            _require(sound, f"population '{name}' has scale {scale} in phase '{phase}': units per 1.0 lie between 1e-12 and 1e12")


def _verify_phase(graph: Graph, phase: Phase) -> None:
    where = f"phase '{phase.name}'"
    kinds = {population.name: population.kind for population in graph.populations}
    shapes = {population.name: population.shape for population in graph.populations}
    _require(
        1 <= phase.time_steps <= LARGEST_STEPS, f"{where} has {phase.time_steps} time steps: it needs at least 1, at most {LARGEST_STEPS:,}"
    )
    _require(len(set(phase.order)) == len(phase.order), f"{where} lists a population twice in its order")
    for name in (*phase.order, *phase.dynamics, *phase.bias, *(drive.population for drive in phase.drive)):
        _require(name in kinds, f"{where} names population '{name}', which the graph lacks: it has {', '.join(kinds)}")
    for name in phase.order:
        if kinds[name] != "input":
            _require(name in phase.dynamics, f"population '{name}' takes part in {where} without dynamics: add them")
            _verify_dynamics(graph, phase, name, kinds[name])
    for key in sorted(tensor_names(phase)):
        _require(key in graph.tensors, f"{where} reads tensor '{key}', which the graph lacks")
    position = {name: i for i, name in enumerate(phase.order)}
    for synapse in phase.synapses:
        _verify_synapse(graph, phase, synapse, position, shapes)
    for name, bias in phase.bias.items():
        _require(
            graph.tensors[bias.tensor].shape == shapes[name],
            f"bias '{bias.tensor}' of population '{name}' has shape {graph.tensors[bias.tensor].shape}, not {shapes[name]}: make it the full shape",
        )
        _require(
            0 <= bias.start < phase.time_steps,
            f"bias of population '{name}' starts at step {bias.start}, outside the {phase.time_steps} steps of {where}",
        )
    driven = [drive.population for drive in phase.drive]
    _require(len(set(driven)) == len(driven), f"{where} drives a population twice: join the currents")
    for drive in phase.drive:
        _verify_drive(graph, phase, drive, shapes)
    for name in phase.order:
        kind = kinds[name]
        _require(kind != "linear", f"population '{name}' is a linear relay, which no target computes yet: fold it into its neighbours")
        _require(
            kind != "input" or phase.name == "forward",
            f"input population '{name}' takes part in {where}: inputs belong to the forward phase",
        )
    if graph.integer:
        _verify_integers(graph, phase, kinds)
    timing = phase.timing
    _require(
        1 <= timing.period <= LARGEST_STEPS
        and 0 <= timing.flush <= LARGEST_STEPS
        and all(0 <= start <= LARGEST_STEPS for start in timing.start.values())
        and phase.ticks <= LARGEST_STEPS * 100,
        f"{where} has a start, flush or period out of range: periods are at least 1 tick, starts and flushes at least 0, all at most {LARGEST_STEPS:,}",
    )


def _verify_dynamics(graph: Graph, phase: Phase, name: str, kind: str) -> None:
    dynamics = phase.dynamics[name]
    where = f"population '{name}' in phase '{phase.name}'"
    numbers = (dynamics.threshold, dynamics.reset, dynamics.leak)
    _require(all(isfinite(n) for n in numbers), f"{where} has a NaN or infinite threshold, reset or leak")
    _require(0 < dynamics.leak <= 1, f"{where} has leak {dynamics.leak}: it must lie in (0, 1]")
    _require(
        (kind == "readout") == (dynamics.members == "none"),
        f"{where} is a {kind} with members '{dynamics.members}': couples fire with 'plus' or 'both', readouts with 'none'",
    )
    if dynamics.members != "none":
        _require(dynamics.threshold > 0, f"{where} has threshold {dynamics.threshold}: it must be above 0")
        _require(dynamics.reset >= 0, f"{where} has reset {dynamics.reset}: the amount subtracted on a spike cannot be negative")
    if graph.integer:
        _require(
            float(dynamics.leak * DECAY_ONE).is_integer(),
            f"{where} has leak {dynamics.leak}: an integer graph needs a multiple of 1/{DECAY_ONE}",
        )
        for label, value in (("threshold", dynamics.threshold), ("reset", dynamics.reset)):
            _require(
                isinstance(value, int) and value <= POTENTIAL_LIMIT,
                f"{where} has {label} {value}: an integer graph needs a whole number up to {POTENTIAL_LIMIT}",
            )


def _verify_synapse(graph: Graph, phase: Phase, synapse: Synapse, position: Mapping[str, int], shapes: Mapping[str, Shape]) -> None:
    where = f"synapse '{synapse.source}' -> '{synapse.target}' in phase '{phase.name}'"
    for end in (synapse.source, synapse.target):
        _require(end in position, f"{where} ends at '{end}', which does not take part in the phase: add it to the order")
    _require(graph.population(synapse.target).kind != "input", f"{where} feeds an input population: reverse it")
    _require(
        graph.population(synapse.source).kind != "readout", f"{where} leaves a readout, which never fires: take its source from a couple"
    )
    if phase.timing.mode == "step":
        _require(synapse.delay in (0, 1), f"{where} has delay {synapse.delay}: before retime a delay is 0 (same step) or 1 (feedback)")
    if synapse.delay == 0:
        _require(
            position[synapse.source] < position[synapse.target],
            f"{where} closes a loop without delay: give it delay 1, or move its source before its target",
        )
    _require(0 <= synapse.delay <= LARGEST_STEPS, f"{where} has delay {synapse.delay}: it must lie in 0 to {LARGEST_STEPS:,}")
    if synapse.gate is not None:
        _require(
            synapse.gate in shapes and shapes[synapse.gate] == shapes[synapse.source],
            f"{where} is gated by '{synapse.gate}', which is no population of the source's shape {shapes[synapse.source]}",
        )
    shape = _shape_after(synapse.ops, shapes[synapse.source], graph.tensors, where)
    _require(
        prod(shape) == prod(shapes[synapse.target]),
        f"{where} makes shape {shape} but '{synapse.target}' has {shapes[synapse.target]}: correct the weights or the population",
    )
    if graph.integer:
        for op in synapse.ops:
            _require(not isinstance(op, Scale), f"{where} scales by a float in an integer graph: fold it into the weights")
            _require(
                getattr(op, "exponent", 0) >= 0,
                f"{where} has a negative weight exponent, which floors sums on the chip: raise the graph's scale",
            )


def _verify_integers(graph: Graph, phase: Phase, kinds: Mapping[str, str]) -> None:
    """What integer graphs must keep to beside the rest, so that every target computes them alike."""
    floats = {bias.tensor for name, bias in phase.bias.items() if kinds[name] == "readout"}
    for key in sorted(tensor_names(phase) - floats):
        kind = graph.tensors[key].dtype
        _require(
            np.issubdtype(kind, np.signedinteger), f"tensor '{key}' is of type {kind} in an integer graph: quantize it to signed integers"
        )
    for op in [op for synapse in phase.synapses for op in synapse.ops]:
        _verify_range(graph, weight_of(op), 2**15)
    for drive in phase.drive:
        for op in drive.ops:
            _verify_range(graph, weight_of(op), 2**31)
        _verify_range(graph, drive.bias, 2**52)
        _verify_host_sum(graph, drive)
    for synapse in phase.synapses:
        largest = max((getattr(op, "exponent", 0) for op in synapse.ops), default=0)
        where = f"synapse '{synapse.source}' -> '{synapse.target}' in phase '{phase.name}'"
        _require(largest <= EXPONENT_LIMIT, f"{where} has weight exponent {largest}: the chip has 0 to {EXPONENT_LIMIT}")
    for name, bias in phase.bias.items():
        where = f"bias of population '{name}' in phase '{phase.name}'"
        _require(0 <= bias.exponent <= EXPONENT_LIMIT, f"{where} has exponent {bias.exponent}: the chip has 0 to {EXPONENT_LIMIT}")
        if kinds[name] != "readout":
            mantissa = graph.tensors[bias.tensor]
            fits = int(mantissa.min()) >= -MANTISSA_LIMIT and int(mantissa.max()) < MANTISSA_LIMIT
            _require(fits, f"{where} does not fit a 13-bit mantissa ({mantissa.min()} to {mantissa.max()}): raise its exponent")
    for drive in phase.drive:
        where = f"drive of population '{drive.population}' in phase '{phase.name}'"
        _require(0 <= drive.exponent <= EXPONENT_LIMIT, f"{where} has exponent {drive.exponent}: the chip has 0 to {EXPONENT_LIMIT}")
        _require(0 <= drive.shift <= SHIFT_LIMIT, f"{where} has shift {drive.shift}: it must lie in 0 to {SHIFT_LIMIT}")
    for population in graph.of_kind("input"):
        levels = graph.scale("forward", population.name)
        whole = levels >= 1 and float(levels).is_integer()
        _require(whole, f"input '{population.name}' has scale {levels}: an integer graph needs a whole number of levels, at least 1")


def _verify_host_sum(graph: Graph, drive: Drive) -> None:
    """The host adds whole numbers in float64, which is exact below 2^53 only."""
    weights = [graph.tensors[name] for op in drive.ops if (name := weight_of(op)) is not None]
    if drive.source != "input" or not weights:
        return
    levels = int(graph.scale("forward", graph.of_kind("input")[0].name))
    largest = max(int(np.abs(weight.astype(np.int64)).sum(axis=1).max(initial=0)) for weight in weights) * levels
    exact = largest + (0 if drive.bias is None else int(np.abs(graph.tensors[drive.bias]).max(initial=0))) < 2**53
    _require(
        exact, f"drive of population '{drive.population}' can sum to {largest}, beyond what the host adds exactly (2^53): lower its shift"
    )


def _verify_range(graph: Graph, key: str | None, limit: int) -> None:
    """Whole numbers small enough that every sum of them stays exact."""
    if key is None or graph.tensors[key].size == 0:
        return
    low, high = int(graph.tensors[key].min()), int(graph.tensors[key].max())
    _require(
        -limit <= low and high < limit,
        f"tensor '{key}' reaches from {low} to {high}: an integer graph needs it within {-limit} to {limit - 1}",
    )


def _verify_drive(graph: Graph, phase: Phase, drive: Drive, shapes: Mapping[str, Shape]) -> None:
    where = f"drive of population '{drive.population}' in phase '{phase.name}'"
    _require(drive.population in phase.order, f"{where} reaches a population that does not take part: add it to the order")
    _require(isfinite(drive.gain) and drive.gain > 0, f"{where} has gain {drive.gain}: it must be a positive number")
    expected = "input" if phase.name == "forward" else "error"
    _require(drive.source == expected, f"{where} carries the {drive.source}: the {phase.name} phase is driven by the {expected}")
    if drive.source == "error":
        return
    if drive.bias is not None:
        found, wanted = graph.tensors[drive.bias].shape, shapes[drive.population]
        _require(found == wanted, f"bias '{drive.bias}' of the {where} has shape {found}, not {wanted}: make it the full shape")
    inputs = graph.of_kind("input")
    _require(len(inputs) == 1, f"{where} needs exactly one input population, the graph has {len(inputs)}")
    shape = _shape_after(drive.ops, inputs[0].shape, graph.tensors, where)
    _require(
        prod(shape) == prod(shapes[drive.population]), f"{where} makes shape {shape}, not {shapes[drive.population]}: correct the weights"
    )


def _shape_after(ops: Iterable[Op], shape: Shape, tensors: Mapping[str, Array], where: str) -> Shape:
    for op in ops:
        try:
            shape = output_shape(op, shape, tensors)
        except GraphError as error:
            raise GraphError(f"{where}: {error}") from None
    return shape


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise GraphError(message)


def leak_sum(leak: float, time_steps: int) -> float:
    """sum of leak^k for k < T: what a leak-weighted spike count is divided by to give a rate (T without leak)."""
    return float(time_steps) if leak == 1 else (1 - leak**time_steps) / (1 - leak)
