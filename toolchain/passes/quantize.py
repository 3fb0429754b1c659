"""Integers for the chip: one grid for all couples, mantissas and exponents for weights and currents, and a record of what rounding did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, floor, log2, sqrt

import msgspec
import numpy as np

from toolchain import fixed
from toolchain.errors import DesignRuleError, GraphError, UsageError
from toolchain.ir import POTENTIAL_LIMIT, SHIFT_LIMIT, Array, Bias, Dense, Drive, Dynamics, Graph, Phase, Rounding, Synapse, Units, frozen
from toolchain.limits import LOIHI2

FINEST = 2**13
"""No threshold needs a finer grid than this: 13-bit currents end there."""

LARGEST_LEVELS = 2**16 - 1
"""Finer inputs than these would leave the host's integers too few bits for the weights."""

LARGEST_PIXEL = 255
"""An input sent on the chip is an 8-bit graded spike."""

LARGEST_CURRENT = fixed.CURRENT_MANTISSA[1] << fixed.CURRENT_EXPONENT_MAX
"""What a bias register can inject at most."""

HOST_LIMIT = 2**52
"""Host sums stay below this, so that float64 products of whole numbers are exact."""


@dataclass(frozen=True)
class Quantize:
    """Float graph to integer graph for one chip.

    All couples share one unit q (grid steps per 1.0 of membrane potential), in both phases up to the factor A/Ab of `adjoint`, so the feedback
    phase reads the forward integers. Each connection has its own exponent e >= 0: its mantissas are W q / 2^e rounded to `weight_bits`. q is
    searched for the least relative rounding error over all connections, then raised by powers of two (which never change a spike) until
    currents are fine enough, exponents reach the chip's limit, or a worst-case bound on the membrane would pass 24 bit. A readout, outside all
    loops, has a unit of its own. Thresholds, resets, biases, leaks and the host's input connection are rounded likewise.
    """

    weight_bits: int = 8
    input_levels: int = 255
    name: str = "quantize"

    def __call__(self, graph: Graph) -> Graph:
        if not 2 <= self.weight_bits <= LOIHI2.weight_bits.value:
            raise UsageError(f"weight_bits is {self.weight_bits}: the chip has 2 to {LOIHI2.weight_bits.value}")
        if not 1 <= self.input_levels <= LARGEST_LEVELS:
            raise UsageError(f"input_levels is {self.input_levels}: an input has 1 to {LARGEST_LEVELS:,} levels")
        if self.input_levels > LARGEST_PIXEL and any(
            s.source in {p.name for p in graph.of_kind("input")} for s in graph.phase("forward").synapses
        ):
            raise UsageError(f"input_levels is {self.input_levels}: pixels sent on the chip have 8 bits, so at most {LARGEST_PIXEL}")
        if graph.integer:
            raise GraphError("the graph is already in integers: quantize a float graph")
        return _Quantizer(graph, self.weight_bits, self.input_levels).graph()


class _Quantizer:
    """One run of the pass: gathers integer tensors and the record while it rewrites the phases."""

    def __init__(self, graph: Graph, weight_bits: int, input_levels: int) -> None:
        self.source = graph
        self.low, self.high = fixed.weight_range(weight_bits)
        self.levels = input_levels
        self.couples = {population.name for population in graph.of_kind("couple")}
        self.inputs = {population.name for population in graph.of_kind("input")}
        self.tensors: dict[str, Array] = {}
        self.exponents: dict[str, int] = {}
        self.rounding: dict[str, Rounding] = {}
        self.grid = self._grid()
        self.grids = self._grids()

    def graph(self) -> Graph:
        phases = tuple(self._phase(phase) for phase in self.source.phases)
        provenance = msgspec.structs.replace(self.source.provenance, rounding=dict(sorted(self.rounding.items())), notes=self._notes())
        units = Units("integer", self._scales())
        return msgspec.structs.replace(self.source, phases=phases, tensors=self.tensors, units=units, provenance=provenance)

    def _notes(self) -> tuple[str, ...]:
        """What the worst case may cost, in sentences."""
        notes = []
        if self._largest_potential() * self.grid > POTENTIAL_LIMIT:
            notes.append("in the worst case a membrane passes 24 bit and saturates: saturations are counted in every run")
        full = [r.name for r in self.source.of_kind("readout") if self._largest_readout(r.name) * self.grids[r.name] > POTENTIAL_LIMIT]
        notes += [
            f"in the worst case readout '{name}' passes 24 bit and saturates: fewer time steps avoid it; saturations are counted in every run"
            for name in full
        ]
        if self._largest_current() * self.grid > LARGEST_CURRENT:
            notes.append(
                "in the worst case an injected current passes its 13-bit mantissa and is cut: cut currents are counted in every run"
            )
        return tuple(notes)

    def _grid(self) -> float:
        """q: grid steps per 1.0 of membrane potential."""
        shared = [weight for weight in self._weights_on_the_grid() if weight.any()]
        threshold = float(max(self.source.phase("forward").dynamics[name].threshold for name in self.couples))
        if not shared:
            return self._whole(FINEST / threshold, threshold)
        # Where the smallest connection fills its mantissas at exponent 0, all others do at exponents above.
        full = max(self.high / float(np.abs(weight).max()) for weight in shared)
        # The power of two among the candidates represents weights on a binary grid without any error.
        candidates = [2.0 ** ceil(log2(full)), *(full * 2.0 ** (np.arange(64) / 64))]
        base = min(candidates, key=lambda grid: sum(self._relative_error(weight, grid) for weight in shared))
        spare = fixed.WEIGHT_EXPONENT_MAX - max(self._exponent(weight, base, 64) for weight in shared)
        if spare < 0:
            return self._whole(base * 2.0**spare, threshold)
        wanted = (POTENTIAL_LIMIT / self._largest_potential(), LARGEST_CURRENT / self._largest_current(), FINEST / threshold)
        shift = min(spare, *(floor(log2(max(1.0, largest / base))) for largest in wanted))
        return self._whole(base * 2.0**shift, threshold)

    def _weights_on_the_grid(self) -> list[Array]:
        """Weights into couples, an input's per level of the input: all must be representable at one q."""
        synapses = [s for s in self.source.phase("forward").synapses if s.target in self.couples]
        return [self._weight(s) / (self.levels if s.source in self.inputs else 1) for s in synapses]

    def _exponent(self, weight: Array, unit: float, largest: int = fixed.WEIGHT_EXPONENT_MAX) -> int:
        """The weight exponent at which the largest mantissa still rounds into range."""
        return fixed.exponent_for(float(np.abs(weight).max()) * unit, self.high + 0.25, largest)

    def _relative_error(self, weight: Array, grid: float) -> float:
        exponent = self._exponent(weight, grid, 64)
        rounded = fixed.mantissas(weight * grid, exponent, self.low, self.high)
        return float(np.sum((rounded.mantissa * 2.0**exponent / grid - weight) ** 2) / np.sum(weight**2))

    def _whole(self, grid: float, threshold: float) -> float:
        """The nearest grid on which the threshold is a whole number."""
        return max(1, round(grid * threshold)) / threshold

    def _largest_potential(self) -> float:
        """A worst-case bound on any membrane in the model's unit: everything that can arrive, all of one sign, for the whole phase."""
        bound = 1e-30
        for phase in self.source.phases:
            for name in (n for n in phase.order if n in self.couples):
                arriving = sum(float(np.abs(_oriented(self._weight(s), s)).sum(axis=1).max()) for s in phase.synapses if s.target == name)
                arriving += float(np.abs(self._bias_tensor(phase, name)).max())
                arriving += sum(self._drive_bound(phase, drive) for drive in phase.drive if drive.population == name)
                bound = max(bound, arriving * phase.time_steps)
        return bound

    def _largest_current(self) -> float:
        """The largest current any drive can inject."""
        return max((self._drive_bound(phase, drive) for phase in self.source.phases for drive in phase.drive), default=0.0) or 1e-30

    def _drive_bound(self, phase: Phase, drive: Drive) -> float:
        """The largest current a drive can inject, in graph units of the float graph: any input in [0, 1]; an error up to one spike's amplitude."""
        if drive.source == "error":
            return float(phase.dynamics[drive.population].reset)
        weight = self.source.tensors[_dense(drive.ops, f"drive of '{drive.population}'").weight]
        bias = np.zeros(len(weight)) if drive.bias is None else self.source.tensors[drive.bias].ravel()
        return float(max((bias + np.maximum(weight, 0).sum(axis=1)).max(), -(bias + np.minimum(weight, 0).sum(axis=1)).min(), 0))

    def _grids(self) -> dict[str, float]:
        """Integer steps per unit of the float graph, by population: one for all couples, one of its own for a readout."""
        grids = dict.fromkeys(self.couples, self.grid) | dict.fromkeys(self.inputs, float(self.levels))
        return grids | {readout.name: self._readout_grid(readout.name) for readout in self.source.of_kind("readout")}

    def _scales(self) -> dict[str, dict[str, float]]:
        phases = [("forward", sorted(self.grids)), ("feedback", sorted(self.couples))]
        return {
            phase: {name: self.grids[name] * self.source.scale(phase, name) for name in names}
            for phase, names in phases
            if self.source.has_phase(phase)
        }

    def _readout_grid(self, name: str) -> float:
        """The readout's own unit: its largest weight takes the largest mantissa, at exponent 0."""
        peak = max((float(np.abs(self._weight(s)).max()) for s in self.source.phase("forward").synapses if s.target == name), default=0.0)
        return self.high / peak if peak > 0 else 1.0

    def _largest_readout(self, name: str) -> float:
        """What a readout holds if every neuron of its source fires at every step."""
        forward = self.source.phase("forward")
        return sum(float(np.abs(self._weight(s)).sum(axis=1).max()) for s in forward.synapses if s.target == name) * forward.time_steps

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
        if dynamics.members == "none":
            return Dynamics(leak=leak)
        # A float graph's dynamics are already in feedback units (A/Ab), so the grid alone turns them into integers.
        threshold, reset = round(dynamics.threshold * self.grid), round(dynamics.reset * self.grid)
        if not 1 <= threshold <= POTENTIAL_LIMIT or reset > POTENTIAL_LIMIT:
            raise DesignRuleError(
                f"population '{name}' needs threshold {threshold:g} and reset {reset:g} in phase '{phase}': the 24-bit membrane holds 1 to {POTENTIAL_LIMIT}; scale its weights and threshold together"
            )
        for label, exact, whole in (("threshold", dynamics.threshold, threshold), ("reset", dynamics.reset, reset)):
            error = abs(whole / self.grid - exact)
            if error > 0:
                self.rounding[f"{phase}.{name}.{label}"] = Rounding(0, error, error, 0)
        return Dynamics(leak=leak, threshold=threshold, reset=reset, members=dynamics.members)

    def _synapse(self, phase: Phase, synapse: Synapse) -> Synapse:
        op = _dense(synapse.ops, f"synapse '{synapse.source}' -> '{synapse.target}'")
        if op.weight not in self.exponents:
            if phase.name != "forward":
                raise GraphError(
                    f"synapse '{synapse.source}' -> '{synapse.target}' of the feedback phase reads '{op.weight}', which no forward synapse does: run adjoint"
                )
            levels = self.levels if synapse.source in self.inputs else 1
            self._round_weight(op.weight, self.grids[synapse.target] / levels)
        return msgspec.structs.replace(synapse, ops=(msgspec.structs.replace(op, exponent=self.exponents[op.weight]),))

    def _round_weight(self, name: str, unit: float) -> None:
        weight = self.source.tensors[name]
        exponent = self._exponent(weight, unit)
        rounded = fixed.mantissas(weight * unit, exponent, self.low, self.high)
        self.exponents[name] = exponent
        self._keep(name, rounded, unit, np.int8)

    def _bias(self, phase: Phase, name: str, bias: Bias) -> Bias:
        value = self.source.tensors[bias.tensor]
        if name not in self.couples:
            self.tensors[bias.tensor] = frozen(value)
            return bias
        unit = self.grid
        exponent = fixed.exponent_for(float(np.abs(value).max()) * unit, fixed.CURRENT_MANTISSA[1], fixed.CURRENT_EXPONENT_MAX)
        self._keep(bias.tensor, fixed.injected(value * unit, exponent), unit, np.int16)
        return msgspec.structs.replace(bias, exponent=exponent)

    def _drive(self, phase: Phase, drive: Drive) -> Drive:
        unit = self.grid
        bound = self._drive_bound(phase, drive) * unit
        clipped = int(bound > LARGEST_CURRENT)
        exponent = fixed.exponent_for(bound, fixed.CURRENT_MANTISSA[1], fixed.CURRENT_EXPONENT_MAX)
        half = 2.0**exponent / unit / 2
        self.rounding[f"{phase.name}.{drive.population}.current"] = Rounding(exponent, half, half / sqrt(3), clipped)
        if drive.source == "error":
            return msgspec.structs.replace(drive, exponent=exponent)
        op = _dense(drive.ops, f"drive of '{drive.population}'")
        weight = self.source.tensors[op.weight] * unit / self.levels / 2.0**exponent
        bias = np.zeros(len(weight)) if drive.bias is None else self.source.tensors[drive.bias] * unit / 2.0**exponent
        shift = _host_shift(weight, bias.ravel(), self.levels)
        self._keep(
            op.weight,
            fixed.mantissas(weight * 2.0**shift, 0, -(2**31), 2**31 - 1),
            unit / self.levels / 2.0 ** (exponent - shift),
            np.int32,
        )
        if drive.bias is not None:
            self._keep(
                drive.bias, fixed.mantissas(bias * 2.0**shift, 0, -HOST_LIMIT, HOST_LIMIT), unit / 2.0 ** (exponent - shift), np.int64
            )
        return msgspec.structs.replace(drive, shift=shift, exponent=exponent)

    def _keep(self, name: str, rounded: fixed.Mantissas, unit: float, dtype: type[np.signedinteger]) -> None:  # type: ignore[type-arg]
        error = rounded.mantissa * 2.0**rounded.exponent / unit - self.source.tensors[name]
        self.rounding[name] = Rounding(rounded.exponent, float(np.abs(error).max()), float(np.sqrt(np.mean(error**2))), rounded.clipped)
        self.tensors[name] = frozen(rounded.mantissa, dtype)

    def _weight(self, synapse: Synapse) -> Array:
        return self.source.tensors[_dense(synapse.ops, f"synapse '{synapse.source}' -> '{synapse.target}'").weight]

    def _bias_tensor(self, phase: Phase, name: str) -> Array:
        return sum((self.source.tensors[bias.tensor] for bias in phase.bias.get(name, ())), np.zeros(1))


def _dense(ops: Iterable[object], where: str) -> Dense:
    """The one weight of a folded connection."""
    match tuple(ops):
        case (Dense() as op,):
            return op
        case found:
            raise GraphError(
                f"{where} has operations {', '.join(type(op).__name__ for op in found)}: one Dense is quantized; run fold, and use fully connected layers"
            )


def _oriented(weight: Array, synapse: Synapse) -> Array:
    (op,) = synapse.ops
    return weight.T if getattr(op, "transpose", False) else weight


def _host_shift(weight: Array, bias: Array, levels: int) -> int:
    """Extra fractional bits of the host's integers: as many as keep them in 32 bit and every sum below `HOST_LIMIT`, at most `SHIFT_LIMIT`."""
    peak = max(float(np.abs(weight).max(initial=0)), 1e-100)
    total = max(float((np.abs(weight).sum(axis=1) * levels + np.abs(bias)).max(initial=0)), 1e-100)
    return max(0, min(SHIFT_LIMIT, floor(log2((2**31 - 1) / peak)), floor(log2(HOST_LIMIT / total)) - 1))
