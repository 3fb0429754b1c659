"""The switchable run: a network between its float graph and its integer graph, with what the chip does to numbers and to time switched on one by one.

Everything happens in the units of the integer graph, in float64, where the chip's integers are exact: a weight that is not rounded yet is its real number of chip steps,
one that is rounded a whole number. With every switch on nothing but whole numbers is left, and the run is the integer graph's, spike for spike and potential for
potential, which `differences` checks. What the switches do (docs/compare.md):

    weights     mantissas and exponents of all weights, also of those that the host applies
    input       the levels of the input, and the rounding of injected currents (of the input, and of the error in the feedback phase) to whole mantissas
    clipping    the 13 bits of a current's mantissa: what passes them is cut
    thresholds  thresholds, resets and biases as integers
    leak        the 12-bit decay nearest to the leak, and potentials that leak in whole steps, towards zero
    timing      pipelined timing: every synapse takes a step, populations are shifted by their depth (exact timing is the model's own step and changes nothing)
    saturation  potentials held at 24 bit
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from toolchain import codec, fixed
from toolchain.errors import GraphError
from toolchain.ir import (
    DECAY_ONE,
    POTENTIAL_LIMIT,
    Array,
    Bias,
    Drive,
    Dynamics,
    Graph,
    Op,
    Phase,
    Shape,
    Synapse,
    Units,
    exponent_of,
    frozen,
    weight_of,
)
from toolchain.passes import grids, injected_like
from toolchain.target import Result

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from toolchain.targets.torch_operations import Composition

    Watch = Callable[[str, Tensor, Tensor], None]

STEPS = "time steps"
"""The factor before all switches: from the equilibrium to the target's number of steps. It is no switch of one run but another number of steps."""

SWITCHES = ("weights", "input", "clipping", "thresholds", "leak", "timing", "saturation")
"""What can be switched on, in the order in which budgets do it."""

MEANINGS = {
    "weights": "weights rounded",
    "input": "input levels and injected currents rounded",
    "clipping": "injected currents cut at 13 bit",
    "thresholds": "thresholds, resets and biases rounded",
    "leak": "leak rounded, potentials leak whole steps",
    "timing": "pipelined timing",
    "saturation": "potentials held at 24 bit",
}

SAME = 1e-12
"""Numbers that differ by less, relatively, are one number that was computed in two ways."""


class Pair(NamedTuple):
    """A tensor in chip steps: its real numbers, and the whole ones that they were rounded to."""

    real: npt.NDArray[np.float64]
    whole: npt.NDArray[np.float64]

    def rounded(self, on: bool) -> npt.NDArray[np.float64]:
        return self.whole if on else self.real

    @property
    def differs(self) -> bool:
        return not np.array_equal(self.real, self.whole)


class Switchboard:
    """Both graphs of one network, and runs between them. `floats` is the folded float graph (injected or not, in model steps), `integers` what `quantize` made of it.

    `static` are the switches that change numbers or times whatever the input; "input", "clipping" and "saturation" depend on it.
    """

    def __init__(self, floats: Graph, integers: Graph) -> None:
        if floats.integer or not integers.integer:
            raise GraphError("an error budget compares the float graph with the integer one: give them in this order")
        self.integers, self.floats = integers, injected_like(floats, integers)
        self._kinds = {population.name: population.kind for population in integers.populations}
        self.steps: dict[str, dict[str, float]] = {
            phase.name: {name: integers.scale(phase.name, name) / floats.scale(phase.name, name) for name in phase.order}
            for phase in integers.phases
        }
        self._levels = integers.scale("forward", integers.of_kind("input")[0].name)
        self._phases = list(zip(self.floats.phases, integers.phases, strict=True))
        self._weights = {own.name: [self._weight(ours, own, i) for i in range(len(own.synapses))] for ours, own in self._phases}
        self._biases = {own.name: self._bias_pairs(own) for own in integers.phases}
        drives = [drive for drive in integers.phase("forward").drive if drive.source == "input"]
        self._host_weights = {drive.population: self._host_weight(drive) for drive in drives}
        self._host_biases = {drive.population: self._host_bias(drive) for drive in drives if drive.bias is not None}
        self._compositions: dict[tuple[str, int | str, bool], Composition] = {}
        self.static = frozenset(switch for switch in SWITCHES if self._changes(switch))

    def graph(self, on: Collection[str]) -> Graph:
        """The float graph in chip units with the switches in `on`; without drives, which `injected` computes."""
        tensors: dict[str, Array] = {}
        phases = []
        for ours, own in self._phases:
            timed = own if "timing" in on else ours
            synapses = []
            for i, synapse in enumerate(own.synapses):
                tensors[_key(own, i)] = self._weights[own.name][i].rounded("weights" in on)
                synapses.append(msgspec.structs.replace(synapse, ops=_reading(synapse.ops, _key(own, i)), delay=timed.synapses[i].delay))
            tensors |= {f"{own.name} {name}": pair.rounded("thresholds" in on) for name, pair in self._biases[own.name].items()}
            bias = {name: tuple(Bias(f"{own.name} {b.tensor}", start=b.start) for b in several) for name, several in own.bias.items()}
            dynamics = {name: self._dynamics(own.name, name, d, own.dynamics[name], on) for name, d in ours.dynamics.items()}
            phases.append(
                msgspec.structs.replace(own, synapses=tuple(synapses), bias=bias, dynamics=dynamics, drive=(), timing=timed.timing)
            )
        units = Units("float", self.integers.units.scale)
        return msgspec.structs.replace(self.integers, phases=tuple(phases), tensors=tensors, units=units, placement=None)

    def encoded(self, on: Collection[str], values: Array) -> npt.NDArray[np.float64]:
        """Inputs in [0, 1] as what the graph's input emits or the host multiplies: in levels, whole ones where "input" is on."""
        if "input" in on:
            return codec.encode_input(self.integers, values).astype(np.float64)
        return values.astype(np.float64) * self._levels

    def forward(
        self, on: Collection[str], values: Array, *, time_steps: int | None = None, trace: bool = False, watch: Watch | None = None
    ) -> Result:
        """The forward phase on `values` (samples, *input shape) in [0, 1], events with time last, in chip units; all samples at once.

        Where "saturation" is off, the result's saturations count the steps that would have been held. `watch` sees population, spikes and potential of every step.
        """
        encoded = self.encoded(on, values)
        currents = {drive.population: self.injected(drive, on, encoded)[0] for drive in self.integers.phase("forward").drive}
        graph = self.graph(on)
        plan = graph.phase("forward")
        plan = plan if time_steps is None else msgspec.structs.replace(plan, time_steps=time_steps)
        return self._run(graph, plan, on, len(values), encoded, currents, {}, trace=trace, watch=watch)

    def feedback(self, on: Collection[str], forward: Result, error: Array, *, trace: bool = False) -> Result:
        """The feedback phase behind a `forward` run with the same switches; `error` (samples, *shape of the driven population)."""
        graph = self.graph(on)
        plan = graph.phase("feedback")
        currents = {drive.population: self.injected(drive, on, error)[0] for drive in self.integers.phase("feedback").drive}
        masks = {s.gate: codec.mask(self.integers, forward, s.gate) for s in plan.synapses if s.gate is not None}
        return self._run(graph, plan, on, len(error), None, currents, masks, trace=trace, watch=None)

    def _run(
        self,
        graph: Graph,
        plan: Phase,
        on: Collection[str],
        samples: int,
        encoded: Array | None,
        currents: Mapping[str, Array],
        masks: Mapping[str, Array],
        *,
        trace: bool,
        watch: Watch | None,
    ) -> Result:
        import torch

        from toolchain.targets.torch_ticks import simulate

        products = {id(s): self._composition(graph, plan, i, "weights" in on) for i, s in enumerate(plan.synapses)}
        arithmetic = _Chip(plan, products, on, watch)
        with torch.inference_mode():
            injected = {name: arithmetic.current(current, name).reshape(samples, -1) for name, current in currents.items()}
            gates = {name: arithmetic.emitted(mask, name).reshape(samples, -1) for name, mask in masks.items()}
            return simulate(graph, plan, arithmetic, samples, encoded, injected, gates, trace=trace)

    def injected(self, drive: Drive, on: Collection[str], values: Array) -> tuple[npt.NDArray[np.float64], int]:
        """What a drive of the integer graph injects, (samples, *shape) in chip units, and how many of these currents pass 13 bit. `values` are the encoded
        input or the error. The arithmetic is that of `fixed.host_current` and `fixed.injected`."""
        name = drive.population
        shape = self.integers.population(name).shape
        if drive.source == "error":
            mantissa = values.astype(np.float64).reshape(len(values), *shape) * (
                self.integers.scale("feedback", name) / 2.0**drive.exponent
            )
            mantissa = np.rint(mantissa) if "input" in on else mantissa
        else:
            made = self._hosted(drive, "weights" in on)(_tensor(values).flatten(1)).numpy().reshape(len(values), *shape)
            if name in self._host_biases:
                made = made + self._host_biases[name].rounded("thresholds" in on)
            mantissa = made / 2.0**drive.shift
            mantissa = np.floor(mantissa + 0.5) if "input" in on else mantissa
        low, high = fixed.CURRENT_MANTISSA
        cut = int(((mantissa < low) | (mantissa > high)).sum())
        return (np.clip(mantissa, low, high) if "clipping" in on else mantissa) * 2.0**drive.exponent, cut

    def _composition(self, graph: Graph, plan: Phase, i: int, rounded: bool) -> Composition:
        key = (plan.name, i, rounded)
        if key not in self._compositions:
            synapse = plan.synapses[i]
            source, target = graph.population(synapse.source).shape, graph.population(synapse.target).shape
            self._compositions[key] = _composition(synapse.ops, source, target, graph.tensors)
        return self._compositions[key]

    def _hosted(self, drive: Drive, rounded: bool) -> Composition:
        key = ("drive", drive.population, rounded)
        if key not in self._compositions:
            source, target = self.integers.of_kind("input")[0].shape, self.integers.population(drive.population).shape
            tensors = {"weight": self._host_weights[drive.population].rounded(rounded)}
            self._compositions[key] = _composition(_reading(drive.ops, "weight"), source, target, tensors)
        return self._compositions[key]

    def _weight(self, ours: Phase, own: Phase, i: int) -> Pair:
        """The weight of synapse `i`, exponents multiplied in."""
        synapse = own.synapses[i]
        unit = self.steps[own.name][synapse.target] / self._message(own.name, synapse) / grids.area(synapse.ops)
        whole = self.integers.tensors[str(grids.the_weight(synapse.ops))]
        return _pair(self.floats.tensors[str(grids.the_weight(ours.synapses[i].ops))] * unit, whole, exponent_of(synapse.ops))

    def _message(self, phase: str, synapse: Synapse) -> float:
        """What 1.0 of a source's message is in integers: a spike is 1."""
        kind = self._kinds[synapse.source]
        if kind == "input":
            return self._levels
        return self.steps[phase][synapse.source] if kind == "linear" else 1.0

    def _bias_pairs(self, phase: Phase) -> dict[str, Pair]:
        """Bias currents by tensor; a readout's is what the host adds to the logits, which nothing rounds."""
        made: dict[str, Pair] = {}
        for name, several in phase.bias.items():
            for bias in several:
                held = self.integers.tensors[bias.tensor]
                if self._kinds[name] == "readout":
                    made[bias.tensor] = Pair(held.astype(np.float64), held.astype(np.float64))
                else:
                    made[bias.tensor] = _pair(self.floats.tensors[bias.tensor] * self.steps[phase.name][name], held, bias.exponent)
        return made

    def _host_weight(self, drive: Drive) -> Pair:
        """The host's weight with its `shift` extra bits."""
        name = str(grids.the_weight(drive.ops))
        factor = self.steps["forward"][drive.population] / self._levels / grids.area(drive.ops) * 2.0 ** (drive.shift - drive.exponent)
        return _pair(self.floats.tensors[name] * factor, self.integers.tensors[name], 0)

    def _host_bias(self, drive: Drive) -> Pair:
        assert drive.bias is not None
        factor = self.steps["forward"][drive.population] * 2.0 ** (drive.shift - drive.exponent)
        return _pair(self.floats.tensors[drive.bias] * factor, self.integers.tensors[drive.bias], 0)

    def _dynamics(self, phase: str, name: str, ours: Dynamics, own: Dynamics, on: Collection[str]) -> Dynamics:
        leak = own.leak if "leak" in on else ours.leak
        if own.members in ("none", "graded"):
            return Dynamics(leak, members=own.members)
        if "thresholds" in on:
            return Dynamics(leak, float(own.threshold), float(own.reset), own.members)
        steps = self.steps[phase][name]
        return Dynamics(leak, _near(ours.threshold * steps, own.threshold), _near(ours.reset * steps, own.reset), own.members)

    def _changes(self, switch: str) -> bool:
        """Whether a switch changes a number of the graph or its times."""
        if switch == "weights":
            pairs = [*self._host_weights.values(), *(pair for several in self._weights.values() for pair in several)]
            return any(pair.differs for pair in pairs)
        if switch == "thresholds":
            pairs = [*self._host_biases.values(), *(pair for several in self._biases.values() for pair in several.values())]
            return any(pair.differs for pair in pairs) or self.graph(()).phases != self.graph((switch,)).phases
        if switch == "timing":
            return any(own.timing.mode == "pipelined" and ours.timing != own.timing for ours, own in self._phases)
        return switch == "leak" and any(d.leak != 1 for pair in self._phases for phase in pair for d in phase.dynamics.values())


class _Chip:
    """The arithmetic of `torch_ticks.simulate` in chip units and float64: `fixed.step`, with leaks and limits that can be off."""

    def __init__(self, phase: Phase, products: Mapping[int, Composition], on: Collection[str], watch: Watch | None) -> None:
        self._phase, self._products, self._watch = phase, products, watch
        self._held, self._truncates = "saturation" in on, "leak" in on

    def product(self, synapse: Synapse, spikes: Tensor) -> Tensor:
        return self._products[id(synapse)](spikes)

    def current(self, values: Array, population: str) -> Tensor:
        return _tensor(values)

    def emitted(self, values: Array, population: str) -> Tensor:
        return _tensor(values)

    def step(self, population: str, potential: Tensor, current: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dynamics = self._phase.dynamics[population]
        if dynamics.members == "graded":
            total = current
        else:
            total = (self._leaked(potential, dynamics.leak) if dynamics.members == "none" else potential) + current
        saturated = total.abs() > POTENTIAL_LIMIT
        total = total.clamp(-POTENTIAL_LIMIT, POTENTIAL_LIMIT) if self._held else total
        spikes = total if dynamics.members == "graded" else total.new_zeros(total.shape)
        if dynamics.members in ("plus", "both"):
            spikes = (total >= dynamics.threshold).to(total.dtype)
            if dynamics.members == "both":
                spikes -= (total <= -dynamics.threshold).to(total.dtype)
            total = self._leaked(total - dynamics.reset * spikes, dynamics.leak)
        if self._watch is not None:
            self._watch(population, spikes, total)
        return total, spikes, saturated

    def _leaked(self, potential: Tensor, leak: float) -> Tensor:
        if leak == 1:
            return potential
        if not self._truncates:
            return potential * leak
        return potential.sign() * (potential.abs() * ((DECAY_ONE - fixed.decay(leak)) / DECAY_ONE)).floor()


def differences(ours: Result, integers: Result) -> tuple[int, int]:
    """How many spikes, potentials and saturations of a run with every switch on differ from the integer graph's, and how many were compared. Both with traces."""
    differing = compared = 0
    for name, history in integers.history.items():
        for a, b in ((ours.history[name].spikes, history.spikes), (ours.history[name].potentials, history.potentials)):
            differing += int((a != b).sum())
            compared += b.size
        differing += int((ours.saturations[name] != integers.saturations[name]).sum())
        compared += integers.saturations[name].size
    return differing, compared


def _pair(real: Array, mantissas: Array, exponent: int) -> Pair:
    """Real numbers that are whole but for the last bits of their own computation are taken as whole."""
    whole = np.ldexp(mantissas.astype(np.float64), exponent)
    exact = real.astype(np.float64)
    return Pair(frozen(np.where(np.abs(exact - whole) <= SAME * np.abs(whole), whole, exact)), frozen(whole))


def _near(value: float, whole: float) -> float:
    return float(whole) if abs(value - whole) <= SAME * abs(whole) else float(value)


def _key(phase: Phase, i: int) -> str:
    return f"{phase.name} {i}"


def _reading(ops: tuple[Op, ...], name: str) -> tuple[Op, ...]:
    """The operations with tensor `name` as their weight, and no shift."""
    return tuple(op if weight_of(op) is None else msgspec.structs.replace(op, weight=name, exponent=0) for op in ops)


def _composition(ops: tuple[Op, ...], source: Shape, target: Shape, tensors: Mapping[str, Array]) -> Composition:
    import torch

    from toolchain.targets import torch_operations

    return torch_operations.Composition(
        ops,
        source,
        target,
        tensors,
        lambda name: _tensor(tensors[name]),
        convolutions=torch_operations.exact(torch.float64, torch.device("cpu")),
        sums=True,
    )


def _tensor(values: Array) -> Tensor:
    import torch

    return torch.as_tensor(np.array(values, np.float64))
