"""Integers for the chip: one scale for all units, mantissas and exponents for weights and currents, and a record of what rounding did."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log2, sqrt
from typing import Union

import msgspec
import numpy as np

from toolchain import fixed
from toolchain.errors import DesignRuleError, GraphError, UsageError
from toolchain.ir import (
    DECAY_ONE,
    POTENTIAL_LIMIT,
    SHIFT_LIMIT,
    Array,
    Bias,
    Calibration,
    Conv2d,
    Dense,
    Drive,
    Dynamics,
    Graph,
    Op,
    Phase,
    Rounding,
    Synapse,
    Units,
    frozen,
    largest_rows,
    largest_sum,
    weight_of,
)
from toolchain.limits import LOIHI2
from toolchain.passes import grids
from toolchain.passes.grids import LARGEST_CURRENT
from toolchain.passes.ranges import Range, Ranges, drive_range, ranges

LARGEST_LEVELS = 2**16 - 1
"""Finer inputs than these would leave the host's integers too few bits for the weights."""

LARGEST_PIXEL = 255
"""An input sent on the chip is an 8-bit graded spike."""

EVENT_LEVELS = 15
"""Events are spikes or few-valued frames: a coarser message leaves the weights that meet it more room."""

HOST_LIMIT = 2**52
"""Host sums stay below this, so that float64 products of whole numbers are exact."""

COARSE = 5.0
"""Over the largest mantissa: four times what weights of a bell curve, the largest four deviations out, lose of their mean size to rounding."""

MARGIN = 1.25
"""What calibration saw, times this, is made room for: other inputs go a little further."""


@dataclass(frozen=True)
class Quantize:
    """Float graph to integer graph for one chip.

    Units and exponents are those of `passes.grids`: one scale times powers of two, in both phases, so the feedback phase reads the forward integers. Each
    connection's mantissas are rounded to `weight_bits` at the exponent of least error. A readout, outside all loops, has a unit of its own. Thresholds,
    resets, biases, leaks and the host's input connection are rounded likewise. Weights that meet the pixels of an image on the chip are not rounded one by one: what
    rounding changes at one is made up for at its neighbours (`fixed.diffused`). What the worst case of any input needs room for is worked out by `passes.ranges`;
    `calibration` replaces it by what real inputs needed, which leaves finer units and currents, and what passes the room is cut, saturated and counted.
    `input_levels` is what an input of 1.0 is sent or multiplied as (None: 255, events 15).
    """

    weight_bits: int = 8
    input_levels: Union[int, None] = None
    calibration: Union[Calibration, None] = None
    name: str = "quantize"

    def __call__(self, graph: Graph) -> Graph:
        if not 2 <= self.weight_bits <= LOIHI2.weight_bits.value:
            raise UsageError(f"weight_bits is {self.weight_bits}: the chip has 2 to {LOIHI2.weight_bits.value}")
        levels = self._levels(graph)
        if graph.integer:
            raise GraphError("the graph is already in integers: quantize a float graph")
        _require_folded(graph)
        return _Quantizer(graph, self.weight_bits, levels, self.calibration).graph()

    def _levels(self, graph: Graph) -> int:
        events = any(population.events for population in graph.of_kind("input"))
        levels = (EVENT_LEVELS if events else LARGEST_PIXEL) if self.input_levels is None else self.input_levels
        if not 1 <= levels <= LARGEST_LEVELS:
            raise UsageError(f"input_levels is {levels}: an input has 1 to {LARGEST_LEVELS:,} levels")
        inputs = {population.name for population in graph.of_kind("input")}
        if levels > LARGEST_PIXEL and any(s.source in inputs for s in graph.phase("forward").synapses):
            raise UsageError(f"input_levels is {levels}: pixels sent on the chip have 8 bits, so at most {LARGEST_PIXEL}")
        return levels


def _require_folded(graph: Graph) -> None:
    for phase in graph.phases:
        for synapse in phase.synapses:
            _one_weight(synapse.ops, f"synapse '{synapse.source}' -> '{synapse.target}' in phase '{phase.name}'")
        for drive in phase.drive:
            if drive.source == "input":
                _one_weight(drive.ops, f"drive of '{drive.population}'")
    readers: dict[str, Synapse] = {}
    for synapse in graph.phase("forward").synapses:
        name = _name(synapse)
        if name in readers:
            one = readers[name]
            raise GraphError(
                f"synapses '{one.source}' -> '{one.target}' and '{synapse.source}' -> '{synapse.target}' share weight '{name}', which each may need in another unit: "
                "give each its own"
            )
        readers[name] = synapse
    for synapse in graph.phase("feedback").synapses if graph.has_phase("feedback") else ():
        if _name(synapse) not in readers:
            raise GraphError(
                f"synapse '{synapse.source}' -> '{synapse.target}' of the feedback phase reads '{_name(synapse)}', which no forward synapse does: run adjoint"
            )


def _one_weight(ops: tuple[Op, ...], where: str) -> None:
    factors = [op for op in ops if getattr(op, "factor", 1) != 1 and type(op).__name__ == "Scale"]
    if grids.the_weight(ops) is None or factors:
        found = ", ".join(type(op).__name__ for op in ops) or "no operation"
        raise GraphError(f"{where} has operations {found}: a connection with exactly one weight and no bare scale is quantized; run fold")


def _name(synapse: Synapse) -> str:
    (name,) = [name for op in synapse.ops if (name := weight_of(op)) is not None]
    return name


class _Quantizer:
    """One run of the pass: gathers integer tensors and the record while it rewrites the phases."""

    def __init__(self, graph: Graph, weight_bits: int, levels: int, calibration: Calibration | None) -> None:
        self.source = graph
        self.low, self.high = fixed.weight_range(weight_bits)
        self.levels = levels
        self.calibration = calibration
        self.kinds = {population.name: population.kind for population in graph.populations}
        self.tensors: dict[str, Array] = {}
        self.rounding: dict[str, Rounding] = {}
        self.lost: dict[str, float] = {}  # mean |rounding error| over mean |value|
        self.worst: dict[tuple[str, str], Range] = {
            (phase.name, drive.population): drive_range(graph, phase, drive) for phase in graph.phases for drive in phase.drive
        }
        self.ranges: dict[str, Ranges] = {phase.name: ranges(graph, phase, self._injected(phase)) for phase in graph.phases}
        self.drives = {key: self._observed_current(key, found.largest) for key, found in self.worst.items()}
        self.potentials: dict[tuple[str, str], float] = {
            (phase, name): self._observed_potential(phase, name, found.largest)
            for phase, bounds in self.ranges.items()
            for name, found in bounds.potential.items()
        }
        self.grids = grids.choose(graph, self.low, self.high, levels, self.potentials, self.drives)
        self.readouts = {readout.name: self._readout_grid(readout.name) for readout in graph.of_kind("readout")}

    def _injected(self, phase: Phase) -> dict[str, Range]:
        return {drive.population: self.worst[phase.name, drive.population] for drive in phase.drive}

    def _observed_current(self, key: tuple[str, str], worst: float) -> float:
        phase, name = key
        if self.calibration is None or phase != "forward" or name not in self.calibration.current:
            return worst
        return min(worst, self.calibration.current[name] * MARGIN)

    def _observed_potential(self, phase: str, name: str, worst: float) -> float:
        if self.calibration is None or name not in self.calibration.potential.get(phase, {}):
            return worst
        return min(worst, self.calibration.potential[phase][name] * MARGIN)

    def graph(self) -> Graph:
        for synapse in self.source.phase("forward").synapses:
            self._round_weight(synapse)
        phases = tuple(self._phase(phase) for phase in self.source.phases)
        provenance = msgspec.structs.replace(
            self.source.provenance,
            rounding=dict(sorted(self.rounding.items())),
            calibration=self.calibration,
            notes=(*self.source.provenance.notes, *self._notes()),
        )
        units = Units("integer", self._scales())
        return msgspec.structs.replace(self.source, phases=phases, tensors=self.tensors, units=units, provenance=provenance)

    def _grid(self, phase: str, name: str) -> float:
        """Integer steps per unit of the float graph."""
        if name in self.readouts:
            return self.readouts[name]
        return (self.grids.feedback if phase == "feedback" else self.grids.forward)[name]

    def _notes(self) -> list[str]:
        """What the worst case, or an input beyond those that were seen, may cost, in sentences."""
        when = "in the worst case" if self.calibration is None else "beyond what calibration saw, in the worst case"
        notes = [
            f"leak {exact:g} is {DECAY_ONE - fixed.decay(exact)}/{DECAY_ONE} on the chip, {fixed.nearest_leak(exact) - exact:+.2g}, and rounds towards zero"
            for exact in sorted({d.leak for phase in self.source.phases for d in phase.dynamics.values() if d.leak != 1})
        ]
        notes += [
            f"weight '{name}' has integers of its own in the feedback phase, where its forward ones are too fine to be added to those of larger connections"
            for name in sorted(self.grids.apart)
        ]
        notes += self._notes_on_biases() + self._notes_on_weights()
        full = {(p, n): v * self._grid(p, n) / POTENTIAL_LIMIT for (p, n), v in self._worst_potentials().items()}
        over = sorted(name for (_, name), share in full.items() if share > 1 and self.kinds[name] in ("couple", "linear"))
        if over:
            listed = ", ".join(f"'{name}'" for name in dict.fromkeys(over))
            notes.append(f"{when} a membrane of {listed} passes 24 bit and saturates: saturations are counted in every run")
        notes += [
            f"{when} readout '{name}' passes 24 bit and saturates: fewer time steps avoid it; saturations are counted in every run"
            for (_, name), share in full.items()
            if share > 1 and self.kinds[name] == "readout"
        ]
        if any(record.clipped for name, record in self.rounding.items() if name.endswith(".current")):
            notes.append(f"{when} an injected current passes its 13-bit mantissa and is cut: cut currents are counted in every run")
        return notes

    def _notes_on_biases(self) -> list[str]:
        cut = {
            bias.tensor: n
            for phase in self.source.phases
            for n, biases in phase.bias.items()
            if self.kinds[n] != "readout"
            for bias in biases
        }
        return [
            f"bias '{tensor}' of '{name}' passes its 13-bit mantissa and is cut in {self.rounding[tensor].clipped:,} of {self.tensors[tensor].size:,} neurons, by up to "
            f"{self.rounding[tensor].max_error:.3g}: lower it, or raise the threshold with it"
            for tensor, name in sorted(cut.items())
            if self.rounding[tensor].clipped
        ]

    def _notes_on_weights(self) -> list[str]:
        """Weights that lose more to rounding than their bits make one expect of a bell curve's."""
        notes = []
        sent = {_name(s) for s in self.source.phase("forward").synapses if self.kinds[s.source] == "input"}
        for name in sorted(set(self.rounding) & {_name(s) for phase in self.source.phases for s in phase.synapses}):
            exact = np.abs(self.source.tensors[name])
            if exact.any() and not self.tensors[name].any():
                notes.append(f"weight '{name}' rounds to 0 everywhere: beside what else reaches its target it is too small for these bits")
            elif self.lost[name] > COARSE / self.high:
                notes.append(
                    f"weight '{name}' loses {100 * self.lost[name]:.0f} % of its mean size to rounding (its largest value is {exact.max() / exact.mean():.0f} times that size): "
                    + (
                        "send fewer input levels (--set quantize.input_levels=15), or use --input bias"
                        if name in sent
                        else "clip it, or use more bits"
                    )
                )
        return notes

    def _worst_potentials(self) -> dict[tuple[str, str], float]:
        return {(phase, name): r.largest for phase, bounds in self.ranges.items() for name, r in bounds.potential.items()}

    def _scales(self) -> dict[str, dict[str, float]]:
        inputs = {name: float(self.levels) for name, kind in self.kinds.items() if kind == "input"}
        forward = {**self.grids.forward, **self.readouts, **inputs}
        feedback = self.grids.feedback
        return {
            phase: {name: found[name] * self.source.scale(phase, name) for name in sorted(found)}
            for phase, found in (("forward", forward), ("feedback", feedback))
            if self.source.has_phase(phase)
        }

    def _message(self, name: str) -> float:
        """v_s: what a forward message of 1.0 is in integers."""
        return {"input": float(self.levels), "linear": self.grids.forward.get(name, 1.0)}.get(self.kinds[name], 1.0)

    def _readout_grid(self, name: str) -> float:
        """The readout's own unit: of those at which its largest weight nearly takes the largest mantissa, at exponent 0, the one with the least rounding error."""
        (synapse,) = (s for s in self.source.phase("forward").synapses if s.target == name)
        connection = grids.Connection(self.source, synapse, self.low, self.high)
        if connection.peak == 0:
            return 1.0
        full = self.high / connection.peak
        unit = min((full * factor for factor in (1.0, *np.arange(1.05, 2.0, 0.05))), key=lambda unit: connection.error(unit, 0))
        return float(min(unit * self._message(synapse.source), 2.0**grids.LARGEST_POWER))

    def _round_weight(self, synapse: Synapse) -> None:
        name = _name(synapse)
        target = self._grid("forward", synapse.target)
        unit = target / self._message(synapse.source) / grids.area(synapse.ops)
        exponent = self.grids.exponents.get(name, 0)
        weight = self.source.tensors[name]
        image = self._image(synapse, weight)
        if image is None:
            rounded = fixed.mantissas(weight * unit, exponent, self.low, self.high)
        else:
            rounded = fixed.diffused((weight * unit).reshape(image), exponent, self.low, self.high)
            rounded = rounded._replace(mantissa=rounded.mantissa.reshape(weight.shape))
        self._keep(name, rounded, unit, np.int8)

    def _image(self, synapse: Synapse, weight: Array) -> tuple[int, ...] | None:
        """The shape (..., height, width) in which a weight meets the pixels of an image; None where it meets anything else."""
        source, first = self.source.population(synapse.source), synapse.ops[0]
        if source.kind != "input" or source.events or len(source.shape) != 3:
            return None
        if isinstance(first, Conv2d):
            return weight.shape
        return (len(weight), *source.shape) if isinstance(first, Dense) else None

    def _phase(self, phase: Phase) -> Phase:
        return msgspec.structs.replace(
            phase,
            dynamics={name: self._dynamics(phase.name, name, dynamics) for name, dynamics in phase.dynamics.items()},
            synapses=tuple(self._synapse(phase, synapse) for synapse in phase.synapses),
            bias={name: tuple(self._bias(phase, name, bias) for bias in biases) for name, biases in phase.bias.items()},
            drive=tuple(self._drive(phase, drive) for drive in phase.drive),
        )

    def _dynamics(self, phase: str, name: str, dynamics: Dynamics) -> Dynamics:
        leak = fixed.nearest_leak(dynamics.leak)
        if leak != dynamics.leak:
            self.rounding[f"{phase}.{name}.leak"] = Rounding(0, abs(leak - dynamics.leak), abs(leak - dynamics.leak), 0)
        if dynamics.members in ("none", "graded"):
            return Dynamics(leak=leak, members=dynamics.members)
        grid = self._grid(phase, name)
        # A float graph's dynamics are already in feedback units (A/Ab), so the grid alone turns them into integers.
        threshold, reset = round(dynamics.threshold * grid), round(dynamics.reset * grid)
        if not 1 <= threshold <= POTENTIAL_LIMIT or reset > POTENTIAL_LIMIT or (reset == 0) != (dynamics.reset == 0):
            heaviest, weight, beside = self._heaviest()
            raise DesignRuleError(
                f"population '{name}' needs threshold {threshold:g} and reset {reset:g} in phase '{phase}': the 24-bit membrane holds 1 to {POTENTIAL_LIMIT}, "
                f"and the weights of {'this one' if heaviest == name else repr(heaviest)}, up to {weight:.3g} where the threshold is {beside:.3g}, leave no unit for both: "
                "bring weights and threshold closer together"
            )
        for label, exact, whole in (("threshold", dynamics.threshold, threshold), ("reset", dynamics.reset, reset)):
            error = abs(whole / grid - exact)
            if error > 0:
                self.rounding[f"{phase}.{name}.{label}"] = Rounding(0, error, error, 0)
        return Dynamics(leak=leak, threshold=threshold, reset=reset, members=dynamics.members)

    def _heaviest(self) -> tuple[str, float, float]:
        """Whose largest weight is the most thresholds in the forward phase, that weight, and the threshold: all units hang together, so another population may fit no more for it."""
        forward = self.source.phase("forward")
        found = []
        for name, dynamics in forward.dynamics.items():
            if dynamics.members not in ("none", "graded"):
                into = (self.source.tensors[_name(s)] for s in forward.synapses if s.target == name)
                largest = max((float(np.abs(weight).max(initial=0)) for weight in into), default=0.0)
                found.append((largest / dynamics.threshold, name, largest, dynamics.threshold))
        return max(found)[1:]

    def _synapse(self, phase: Phase, synapse: Synapse) -> Synapse:
        name = _name(synapse)
        exponent = self.grids.exponents.get(name, 0)
        if phase.name == "feedback" and name in self.grids.apart:
            name, exponent = self._rounded_apart(synapse)
        elif phase.name == "feedback" and name in self.grids.exponents:
            step = grids.step_of(self.kinds, synapse, self.grids.forward, self.grids.feedback)
            exponent += round(log2(self.grids.feedback[synapse.target] / step))
        ops = tuple(msgspec.structs.replace(op, weight=name, exponent=exponent) if weight_of(op) is not None else op for op in synapse.ops)
        return msgspec.structs.replace(synapse, ops=ops)

    def _rounded_apart(self, synapse: Synapse) -> tuple[str, int]:
        """The integers of a connection in the feedback phase alone: its forward ones are too fine to be added to those of its neighbours."""
        name = _name(synapse)
        graded = self.grids.feedback[synapse.source] if self.kinds[synapse.source] == "linear" else 1.0
        unit = self.grids.feedback[synapse.target] / graded / grids.area(synapse.ops)
        connection = grids.Connection(self.source, synapse, self.low, self.high)
        exponent = connection.best_exponent(unit * grids.area(synapse.ops))
        own = f"{name}.feedback"
        self._keep(own, fixed.mantissas(self.source.tensors[name] * unit, exponent, self.low, self.high), unit, np.int8, name)
        return own, exponent

    def _bias(self, phase: Phase, name: str, bias: Bias) -> Bias:
        value = self.source.tensors[bias.tensor]
        if self.kinds[name] == "readout":
            self.tensors[bias.tensor] = frozen(value)
            return bias
        unit = self._grid(phase.name, name)
        exponent = fixed.exponent_for(float(np.abs(value).max()) * unit, fixed.CURRENT_MANTISSA[1], fixed.CURRENT_EXPONENT_MAX)
        self._keep(bias.tensor, fixed.injected(value * unit, exponent), unit, np.int16)
        return msgspec.structs.replace(bias, exponent=exponent)

    def _drive(self, phase: Phase, drive: Drive) -> Drive:
        unit = self._grid(phase.name, drive.population)
        clipped = int(self.worst[phase.name, drive.population].largest * unit > LARGEST_CURRENT)
        bound = self.drives[phase.name, drive.population] * unit
        exponent = fixed.exponent_for(bound, fixed.CURRENT_MANTISSA[1], fixed.CURRENT_EXPONENT_MAX)
        clipped |= int(self.worst[phase.name, drive.population].largest * unit > fixed.CURRENT_MANTISSA[1] * 2.0**exponent)
        half = 2.0**exponent / unit / 2
        self.rounding[f"{phase.name}.{drive.population}.current"] = Rounding(exponent, half, half / sqrt(3), clipped)
        if drive.source == "error":
            return msgspec.structs.replace(drive, exponent=exponent)
        name = grids.the_weight(drive.ops)
        assert name is not None  # `_require_folded` has seen to it
        factor = unit / self.levels / 2.0**exponent / grids.area(drive.ops)
        weight = self.source.tensors[name] * factor
        bias = np.zeros(1) if drive.bias is None else self.source.tensors[drive.bias] * unit / 2.0**exponent
        shift = self._host_shift(drive.ops, name, weight, bias)
        self._keep(name, fixed.mantissas(weight * 2.0**shift, 0, -(2**31), 2**31 - 1), factor * 2.0**shift, np.int32)
        if drive.bias is not None:
            self._keep(
                drive.bias,
                fixed.mantissas(bias * 2.0**shift, 0, 1 - HOST_LIMIT, HOST_LIMIT - 1),
                unit / 2.0 ** (exponent - shift),
                np.int64,
            )
        return msgspec.structs.replace(drive, shift=shift, exponent=exponent)

    def _host_shift(self, ops: tuple[Op, ...], name: str, weight: Array, bias: Array) -> int:
        """Extra fractional bits of the host's integers: as many as keep them in 32 bit and every sum below `HOST_LIMIT`, at most `SHIFT_LIMIT`."""
        peak = max(float(np.abs(weight).max(initial=0)), 1e-100)
        largest = float(self.levels)
        for op in ops:
            largest *= largest_rows(op, {name: weight}) if weight_of(op) is not None else largest_sum(op, {}, 1)[0]
        total = max(largest + float(np.abs(bias).max(initial=0)), 1e-100)
        return max(0, min(SHIFT_LIMIT, floor(log2((2**31 - 1) / peak)), floor(log2(HOST_LIMIT / total)) - 1))

    def _keep(self, name: str, rounded: fixed.Mantissas, unit: float, dtype: type[np.signedinteger], source: str = "") -> None:  # type: ignore[type-arg]
        exact = self.source.tensors[source or name]
        error = rounded.mantissa * (2.0**rounded.exponent / unit) - exact
        self.lost[name] = float(np.abs(error).mean() / max(np.abs(exact).mean(), 1e-300))
        self.rounding[name] = Rounding(rounded.exponent, float(np.abs(error).max()), float(np.sqrt(np.mean(error**2))), rounded.clipped)
        self.tensors[name] = frozen(rounded.mantissa, dtype)
