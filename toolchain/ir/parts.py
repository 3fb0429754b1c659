"""What a graph is made of: frozen data, and the model step that it stands for. No arithmetic happens here (see `fixed`).

The model step, for floats and integers alike. A phase runs on ticks 0, 1, 2, ...; population p updates on the ticks
`timing.start[p] + k * timing.period`, k = 0 .. time_steps - 1, and is silent on all others. On each tick, populations in `phase.order`:

1. what arrives is added to the population's waiting current: each synapse carries the spikes its source emitted `delay` ticks earlier;
2. on its own ticks the population adds the waiting current, bias and drive to its potential (integers: one clamp to 24 bit signed), and empties it;
3. it fires: +1 at potential >= threshold; -1 at potential <= -threshold where both members are enabled;
4. `reset` times the spike is subtracted;
5. it leaks: floats multiply, integers as in `fixed.decay`. The recorded potential is the one after this step.

A `readout` never fires, and leaks before it adds. A `linear` population keeps nothing: what arrives on its own tick is what it emits (integers: clamped to
24 bit signed), a graded value in place of a spike. Before `retime` period is 1, every start is 0 and delays are 0 (same step) or 1 (feedback).
"""

from __future__ import annotations

from collections.abc import Mapping
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

MOST_NEURONS = 2**31
"""Neurons of a graph, and values between two operations of a connection: refused before anything of that size is asked for."""

MOST_AXES = 8
"""Axes of a population's shape."""

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
    """Mean over windows of `kernel`, zeros of the padding counted; its transpose spreads each value evenly over its window.

    In integer graphs the sum instead of the mean, and the value itself instead of its share: `quantize` moves 1 / (kernel area) into the weights.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    transpose: bool = False


class Upsample(Part, frozen=True, tag="upsample", tag_field="op"):
    """Nearest-neighbour upsampling by a whole factor; its transpose sums each block."""

    factor: int
    transpose: bool = False


class Scale(Part, frozen=True, tag="scale", tag_field="op"):
    """y = factor * x, and also times one factor a channel (the first axis) where `weight` names a tensor (channels,).

    In integer graphs `factor` is 1, the weight holds mantissas, and y is shifted left by `exponent`.
    """

    factor: float = 1.0
    weight: Union[str, None] = None
    exponent: int = 0


class Identity(Part, frozen=True, tag="identity", tag_field="op"):
    """y = x."""


Op = Union[Dense, Conv2d, ConvTranspose2d, AvgPool2d, Upsample, Scale, Identity]


class Population(Part, frozen=True):
    """`shape` counts neurons (or couples) per sample; `kind` as in the words of the design: couple, input, readout, linear.

    An input with `events` emits other values at every time step: its data have time as their last axis.
    """

    name: str
    shape: Shape
    kind: Literal["couple", "input", "readout", "linear"]
    events: bool = False


class Dynamics(Part, frozen=True):
    """What a population does in one phase.

    `threshold` and `reset` are in the population's unit, `reset` is the amount subtracted on a spike (A = Vth - u_rest), `leak` lies in (0, 1].
    `members="plus"`: a binary neuron; `"both"`: signed spikes in {-1, 0, +1}; `"none"`: a readout, which only integrates; `"graded"`: a linear relay,
    which emits what arrives.
    """

    leak: float
    threshold: Number = 0
    reset: Number = 0
    members: Literal["plus", "both", "none", "graded"] = "none"


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
    """A current of full population shape, added at every step of the population from step `start` (counted from 0); a population may have several.

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
    bias: dict[str, tuple[Bias, ...]] = {}
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


class Calibration(Part, frozen=True):
    """What a float graph did on real inputs, in its own units: the largest |potential| before firing by phase and population, the largest |current| of each input
    drive by population, over `samples` samples of `dataset` (its training split, from the first on)."""

    dataset: str
    samples: int
    potential: dict[str, dict[str, float]]
    current: dict[str, float]


class Provenance(Part, frozen=True):
    """Where a graph comes from: model name, sha256 of the source weights, the passes applied, what rounding did to each tensor, what calibration saw, and
    notes for people."""

    model: str
    source_sha256: str = ""
    passes: tuple[str, ...] = ()
    rounding: dict[str, Rounding] = {}
    calibration: Union[Calibration, None] = None
    notes: tuple[str, ...] = ()


class Slice(Part, frozen=True):
    """A box of a population's neurons: `start` to `stop` (exclusive) along every axis of its shape."""

    population: str
    start: Shape
    stop: Shape


class Core(Part, frozen=True):
    """One neuron core: which chip it is on, its number there, and the neurons it holds."""

    chip: int
    core: int
    slices: tuple[Slice, ...]


class Placement(Part, frozen=True):
    """Where every couple, relay and readout lives: each neuron in exactly one slice, on chips of the kind `chip` (a file of `targets/limits`)."""

    chip: str
    cores: tuple[Core, ...]


class Graph(Part, frozen=True):
    """A network: populations, phases, tensors (read-only arrays by name), units, provenance, and after `partition` a placement. Treat every part as
    immutable."""

    populations: tuple[Population, ...]
    phases: tuple[Phase, ...]
    tensors: dict[str, Array]
    units: Units
    provenance: Provenance
    placement: Union[Placement, None] = None

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

    def in_steps(self, time_steps: Mapping[str, int]) -> Graph:
        """The same graph with other numbers of time steps, by phase; a phase without an entry keeps its own."""
        phases = tuple(msgspec.structs.replace(phase, time_steps=time_steps.get(phase.name, phase.time_steps)) for phase in self.phases)
        return msgspec.structs.replace(self, phases=phases)

    def scale(self, phase: str, population: str) -> float:
        """Graph units per 1.0 of the model's potential."""
        return self.units.scale.get(phase, {}).get(population, 1.0)


def frozen(array: npt.ArrayLike, dtype: npt.DTypeLike = None) -> Array:
    """A contiguous read-only copy, as graphs hold their tensors."""
    copy = np.array(array, dtype=dtype, order="C")
    copy.setflags(write=False)
    return copy


def leak_sum(leak: float, time_steps: int) -> float:
    """sum of leak^k for k < T: what a leak-weighted spike count is divided by to give a rate (T without leak)."""
    return float(time_steps) if leak == 1 else (1 - leak**time_steps) / (1 - leak)
