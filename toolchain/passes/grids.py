"""The units of an integer graph: how many integer steps make 1.0 of each population's potential, in both phases.

All units are one graph scale b times powers of two, g_p = b 2^k_p. A connection s -> t with weights W delivers W g_t / v_s to the integers of its target for each unit of
its message: v_s is 1 for a couple's spike, the number of levels for an input, g_s for a relay's graded value. That is mantissa << e with e in 0 .. 7, so a
connection that is much smaller than its neighbour at the same target bounds what both can have. Per population, in the order of the forward phase, k_p is

    the smallest at which what rounding adds to p's current is about as little as mantissas allow, or lost beside p's threshold, and the threshold is not too coarse;
    raised while there are exponents left and neither potentials nor currents pass what the chip holds (powers of two never change a spike);
    at most where the largest connection still has an exponent; of a relay, at most where those that read it still have room for weights.

The feedback phase reads the same integers from the other side. What W^T delivers to s is in steps of (g_t / v_s) u_t 2^d, u_t being 1 for a couple's spike and the
feedback unit of a relay's graded value; the exponent e + d must lie in 0 .. 7 again, which bounds the feedback units of neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor, inf, log2, prod

import numpy as np

from toolchain import fixed
from toolchain.ir import POTENTIAL_LIMIT, AvgPool2d, ConvTranspose2d, Graph, Op, Synapse, weight_of

FINEST = 2**13
"""No threshold needs a finer grid than this: 13-bit currents end there."""

COARSEST = 2**8
"""A threshold of fewer steps would round by more than weights do: worth exponents where there are any."""

FINE_CURRENT = 2**11
"""A current into a relay should have at least so many steps: nothing raises its unit otherwise."""

LARGEST_CURRENT = fixed.CURRENT_MANTISSA[1] << fixed.CURRENT_EXPONENT_MAX
"""What a bias register can inject at most."""

RESETS = 16
"""A membrane should hold this many resets, or all that it can need: a silent neuron that saturates forgets how silent it was. Worth at most `BITS_FOR_ROOM` of the weights."""

BITS_FOR_ROOM = 1

CANDIDATES = 64
"""Scales tried in the octave of b."""

LOOKED_AT = 2**14
"""Values of a weight that the search for b looks at (all of smaller ones)."""

NEARLY_BEST = 1.05
"""A rounding error this close to the best one that connections can have is good enough."""

LOST = 2.0**-10
"""Of the threshold: rounding errors of a step's current below this do not matter, however large they are beside small weights."""

LOWEST_POWER = 48
"""Powers of two below full mantissas at which the search for enough of them ends: all of them are 0 long before."""


NEGLIGIBLE = 1e-30
"""Weights and currents that are nowhere as large as this, denormal ones among them, are as good as none: every unit rounds them to 0."""

LARGEST_POWER = 38
"""No unit is finer than 2^39, which is still among the scales that graphs may have: weights that would need a finer one round to 0, and a note says so."""


@dataclass(frozen=True)
class Grids:
    """Integer steps per unit of the float graph: `forward` and `feedback` by population (inputs: levels); exponents by weight tensor, of all that is not `NEGLIGIBLE`.

    Weights in `apart` are too much finer than those they are added to in the feedback phase: they are rounded again for it.
    """

    forward: dict[str, float]
    feedback: dict[str, float]
    exponents: dict[str, int]
    apart: frozenset[str] = frozenset()


def area(ops: tuple[Op, ...]) -> int:
    """By how much integers sum where floats average: the product of the pools' windows."""
    return prod(prod(op.kernel) for op in ops if isinstance(op, AvgPool2d))


def the_weight(ops: tuple[Op, ...]) -> str | None:
    """The one tensor of a folded connection; None where there is none or more than one."""
    names = [name for op in ops if (name := weight_of(op)) is not None]
    return names[0] if len(names) == 1 else None


class Connection:
    """A forward synapse as rounding sees it: some of its weights over their pools' windows, and the message unit of its source."""

    def __init__(self, graph: Graph, synapse: Synapse, low: int, high: int) -> None:
        name = the_weight(synapse.ops)
        assert name is not None  # quantize has refused what is not folded
        whole = graph.tensors[name].ravel() / area(synapse.ops)
        self.tensor, self.source, self.target = name, synapse.source, synapse.target
        self.peak = _counted(float(np.abs(whole).max(initial=0)))
        self.values = whole[:: max(1, len(whole) // LOOKED_AT)]
        self._low, self._high = low, high
        self._power = float(np.sum(self.values**2))
        self.per_target = float(np.sum(whole**2)) / _targets(synapse.ops, graph.tensors[name].shape)

    def error(self, unit: float, exponent: int) -> float:
        """Squared rounding error over the squared weights, at `unit` integer steps per 1.0."""
        if self._power == 0:
            return 0.0
        rounded = fixed.mantissas(self.values * unit, exponent, self._low, self._high)
        return float(np.sum((rounded.mantissa * (2.0**exponent / unit) - self.values) ** 2) / self._power)

    def best_exponent(self, unit: float, least: int = 0, most: int = fixed.WEIGHT_EXPONENT_MAX) -> int:
        """The exponent of least error: the smallest one that holds every weight, or below it where cutting the largest weights costs less than rounding all."""
        fits = _fitting(self.peak * unit, self._high)
        tried = [e for e in (fits, fits - 1, fits - 2) if least <= e <= most] or [min(max(fits, least), most)]
        return min(tried, key=lambda e: (self.error(unit, e), -e))

    def fits_at(self, unit: float) -> int:
        """The exponent, of either sign, at which the largest mantissa just fits."""
        return _fitting(self.peak * unit, self._high)

    def modest_unit(self) -> float:
        """A unit that asks little of what comes before: the smallest power of two at which nothing is rounded, else full mantissas but for `BITS_FOR_ROOM`."""
        power = -self.fits_at(1.0)
        if self.error(2.0**power, 0) > 0:
            return 2.0 ** (power - BITS_FOR_ROOM)
        while self.error(2.0 ** (power - 1), 0) == 0:
            power -= 1
        return 2.0**power

    def largest_unit(self) -> float:
        """The largest unit at which its weights still have an exponent."""
        return (self._high + 0.25) * 2.0**fixed.WEIGHT_EXPONENT_MAX / self.peak


def _targets(ops: tuple[Op, ...], shape: tuple[int, ...]) -> int:
    """How many target neurons (of images: channels) share out the weights of a connection."""
    (op,) = (op for op in ops if weight_of(op) is not None)
    return shape[1] * op.groups if isinstance(op, ConvTranspose2d) else shape[0]


def _fitting(bound: float, high: int) -> int:
    return ceil(log2(bound / (high + 0.25))) if bound > 0 else -64


def _counted(largest: float) -> float:
    return largest if largest >= NEGLIGIBLE else 0.0


def choose(
    graph: Graph,
    low: int,
    high: int,
    levels: int,
    potentials: Mapping[tuple[str, str], float],
    drives: Mapping[tuple[str, str], float],
) -> Grids:
    """The units and exponents of a folded float graph with weights of `low` to `high`. `potentials` and `drives` are the largest |potential| and |injected
    current| to make room for, by phase and population, in the graph's units."""
    forward = graph.phase("forward")
    inner = [name for name in forward.order if graph.population(name).kind in ("couple", "linear")]
    connections = [Connection(graph, s, low, high) for s in forward.synapses if s.target in inner and the_weight(s.ops) is not None]
    search = _Search(graph, [c for c in connections if c.peak > 0], inner, levels, potentials, drives)
    grids = search.forward()
    exponents = {c.tensor: search.exponent(c, grids) for c in connections if c.peak > 0}
    feedback, apart = search.feedback(grids, exponents)
    return Grids(grids, feedback, exponents, apart)


class _Search:
    def __init__(
        self,
        graph: Graph,
        connections: list[Connection],
        inner: list[str],
        levels: int,
        potentials: Mapping[tuple[str, str], float],
        drives: Mapping[tuple[str, str], float],
    ) -> None:
        self.graph, self.connections, self.inner, self.levels = graph, connections, inner, levels
        self.potentials, self.drives = potentials, drives
        self.kinds = {population.name: population.kind for population in graph.populations}
        self.inputs = {name for name, kind in self.kinds.items() if kind == "input"}
        self.limits = self._limits()

    def forward(self) -> dict[str, float]:
        """g_p of every population of the forward phase but the readout."""
        base = self._base()
        grids = dict.fromkeys(self.inputs, float(self.levels))
        for _ in range(len(self.inner) + 1):  # relays that feed earlier populations are known from the second time on
            before = dict(grids)
            for name in self.inner:
                grids[name] = base * 2.0 ** min(self._power(name, base, grids), LARGEST_POWER)
            if grids == before:
                break
        return self._whole(grids)

    def exponent(self, connection: Connection, grids: Mapping[str, float]) -> int:
        return connection.best_exponent(self._unit(connection, grids))

    def _unit(self, connection: Connection, grids: Mapping[str, float]) -> float:
        """Integer steps per 1.0 of the weight: g_t / v_s."""
        kind = self.kinds[connection.source]
        message = 1.0 if kind == "couple" else grids.get(connection.source, grids[connection.target])
        return grids[connection.target] / message

    def _base(self) -> float:
        """b in [1, 2): the candidate with the least relative rounding error over all connections, each at the power of two that suits it. 1 represents weights on a
        binary grid without any error."""
        free = [c for c in self.connections if self.kinds[c.source] != "linear"]
        if not free:
            return 1.0

        def cost(base: float) -> float:
            total = 0.0
            for c in free:
                unit = base / (self.levels if c.source in self.inputs else 1)
                total += c.error(unit * 2.0 ** -c.fits_at(unit), 0)
            return total

        return min((float(b) for b in 2.0 ** (np.arange(CANDIDATES) / CANDIDATES)), key=cost)

    def _power(self, name: str, base: float, grids: Mapping[str, float]) -> int:
        """k_p: see the module."""
        trial = {**grids, name: base}
        into = {c: self._unit(c, trial) for c in self.connections if c.target == name}
        most = min((-c.fits_at(unit) + fixed.WEIGHT_EXPONENT_MAX for c, unit in into.items()), default=64)
        dynamics = self.graph.phase("forward").dynamics[name]
        current = self._largest_current(name)
        if self.kinds[name] == "linear":
            needed = self._needed(into, 0.0)
            fine = ceil(log2(FINE_CURRENT / (current * base))) if current > 0 else None
            held = floor(log2(POTENTIAL_LIMIT / (self._largest_potential(name) * base)))
            wanted = [power for power in (needed, None if fine is None else min(fine, held)) if power is not None]
            if current > 0:  # a value that is cut is a wrong one
                most = min(most, floor(log2(LARGEST_CURRENT / (current * base))))
            readable = floor(log2(self.limits[name] / base)) if self.limits[name] < inf else most
            return min(most, max(wanted, default=0), readable)
        threshold = float(dynamics.threshold)
        coarse = ceil(log2(COARSEST / (threshold * base)))
        bias = self._largest_bias(name)
        if bias > 0:  # beyond the register only where it is hundreds of thresholds anyway
            most = min(most, max(coarse, floor(log2(LARGEST_CURRENT / (bias * base)))))
        wished = [FINEST / threshold, POTENTIAL_LIMIT / self._largest_potential(name)] + (
            [LARGEST_CURRENT / current] if current > 0 else []
        )
        finest = floor(log2(min(wished) / base))
        room = floor(log2(self._room(name) / base))
        needed = self._needed(into, threshold * LOST)
        enough = coarse if needed is None else min(needed, max(room, most - fixed.WEIGHT_EXPONENT_MAX - BITS_FOR_ROOM))
        return min(most, max(coarse, finest, enough))

    def _needed(self, into: Mapping[Connection, float], lost: float) -> int | None:
        """The smallest power of two at which what rounding adds to a target's current, over all connections with their units, is nearly the least that mantissas
        allow, or `lost`; None where no connection adds more than that. What a connection has beyond full mantissas its exponent takes away again."""
        if sum(c.per_target for c in into) <= lost**2:
            return None

        def added(power: int) -> float:
            return sum(c.error(unit * 2.0 ** min(power, -c.fits_at(unit)), 0) * c.per_target for c, unit in into.items())

        power = max(-c.fits_at(unit) for c, unit in into.items())
        enough = max(added(power) * NEARLY_BEST, lost**2)
        lowest = power - LOWEST_POWER
        while power > lowest and added(power - 1) <= enough:
            power -= 1
        return power

    def _room(self, name: str) -> float:
        """The unit at which a couple's membrane holds `RESETS` resets, or all that it can need."""
        reset, potential = self.graph.phase("forward").dynamics[name].reset, self._largest_potential(name)
        return POTENTIAL_LIMIT / (min(potential, RESETS * reset) if reset else potential)

    def _limits(self) -> dict[str, float]:
        """The largest unit of each population: what its exponents and its membrane hold, of a relay also what its readers can take."""
        found: dict[str, float] = {}
        for name in reversed(self.inner):
            bounds = [c.largest_unit() * (self.levels if c.source in self.inputs else 1) for c in self._into_from_spikes(name)]
            if self.kinds[name] == "couple":
                bounds.append(self._room(name))
            else:
                bounds += [found.get(c.target, inf) / c.modest_unit() for c in self.connections if c.source == name]
            found[name] = min(bounds, default=inf)
        return found

    def _into_from_spikes(self, name: str) -> list[Connection]:
        return [c for c in self.connections if c.target == name and self.kinds[c.source] != "linear"]

    def _largest_current(self, name: str) -> float:
        """The largest drive or bias that population `name` gets, in the float graph's units; of couples in either phase (relays have a unit for each)."""
        phases = ("forward",) if self.kinds[name] == "linear" else ("forward", "feedback")
        found = [bound for (phase, population), bound in self.drives.items() if population == name and phase in phases]
        return _counted(max([*found, self._largest_bias(name)], default=0.0))

    def _largest_bias(self, name: str) -> float:
        biases = [bias for phase in self.graph.phases for bias in phase.bias.get(name, ())]
        return _counted(max((float(np.abs(self.graph.tensors[bias.tensor]).max(initial=0)) for bias in biases), default=0.0))

    def _largest_potential(self, name: str) -> float:
        return max(self.potentials["forward", name], NEGLIGIBLE)

    def _whole(self, grids: dict[str, float]) -> dict[str, float]:
        """All units moved together by less than half a step, so that the largest threshold of the coarsest couples is a whole number."""
        couples = [name for name in self.inner if self.kinds[name] == "couple"]
        dynamics = self.graph.phase("forward").dynamics
        coarsest = min(couples, key=lambda name: (grids[name], -dynamics[name].threshold))
        threshold = dynamics[coarsest].threshold * grids[coarsest]
        factor = max(1, round(threshold)) / threshold
        return {name: grid if name in self.inputs else grid * factor for name, grid in grids.items()}

    def feedback(self, grids: Mapping[str, float], exponents: Mapping[str, int]) -> tuple[dict[str, float], frozenset[str]]:
        """gb_p of every population of the feedback phase, and the weights that need integers of their own there.

        In powers of two every connection is a constraint on the units of its two ends, or on one where the other is a couple. Coarser ones come first; one that contradicts
        them is set apart. The closure of the others says what is left to choose: couples stay as near to their forward unit as they can, a driven relay has its
        current in enough steps, other relays carry small integers.
        """
        if not self.graph.has_phase("feedback"):
            return {}, frozenset()
        phase = self.graph.phase("feedback")
        couple = next(name for name in phase.order if self.kinds[name] == "couple")
        odd = log2(grids[couple]) % 1  # what is no power of two in the units of couples
        system = _Differences(phase.order)
        finest = []
        for synapse in phase.synapses:
            weight = the_weight(synapse.ops)
            if weight in exponents:
                step = step_of(self.kinds, synapse, grids, {})
                at_zero = round(log2(step) - (odd if self.kinds[synapse.target] == "couple" else 0)) - exponents[str(weight)]
                other = synapse.source if self.kinds[synapse.source] == "linear" else None
                finest.append((at_zero, synapse.target, other, str(weight)))
        apart = frozenset(
            weight
            for at_zero, target, other, weight in sorted(finest, key=lambda entry: entry[0])
            if not system.between(target, other, at_zero, at_zero + fixed.WEIGHT_EXPONENT_MAX)
        )
        found = {}
        driven = {drive.population for drive in phase.drive}
        for name in sorted(phase.order, key=lambda name: (self.kinds[name] == "linear", name not in driven)):
            if self.kinds[name] == "couple":
                room = POTENTIAL_LIMIT / (RESETS * max(phase.dynamics[name].reset, phase.dynamics[name].threshold))
                found[name] = 2.0 ** (system.settle(name, floor(log2(min(grids[name], room)) - odd + 1e-9)) + odd)
            elif name in driven:
                found[name] = 2.0 ** system.settle(name, round(log2(FINE_CURRENT / max(self.drives["feedback", name], NEGLIGIBLE))))
            else:
                found[name] = 2.0 ** system.settle(name, None)
        return found, apart


class _Differences:
    """Whole numbers x_p with bounds on their differences, settled one after the other as near to a wish as the bounds on all others allow."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._place = {name: i + 1 for i, name in enumerate(names)}  # 0 stands for the number 0
        self._most = np.full((len(names) + 1, len(names) + 1), inf)  # x_j - x_i is at most this
        np.fill_diagonal(self._most, 0)

    def between(self, name: str, other: str | None, low: int, high: int) -> bool:
        """low <= x_name - x_other <= high, unless that contradicts what is known already."""
        i, j = 0 if other is None else self._place[other], self._place[name]
        if high + self._most[j, i] < 0 or self._most[i, j] - low < 0:
            return False
        self._add(i, j, high)
        self._add(j, i, -low)
        return True

    def settle(self, name: str, wish: int | None) -> int:
        """Choose x_name; without a wish the least it can be, or 0 where nothing bounds it."""
        place = self._place[name]
        low, high = -self._most[place, 0], self._most[0, place]
        chosen = (low if low > -inf else min(0, high)) if wish is None else min(max(wish, low), high)
        self.between(name, None, int(chosen), int(chosen))
        return int(chosen)

    def _add(self, i: int, j: int, most: float) -> None:
        self._most = np.minimum(self._most, self._most[:, i, None] + most + self._most[None, j, :])


def step_of(kinds: Mapping[str, str], feedback: Synapse, grids: Mapping[str, float], found: Mapping[str, float]) -> float:
    """(g_t / v_s) u_t for a feedback synapse t -> s: the steps that 1.0 of W^T makes at exponent 0 beyond the forward one."""
    message = grids[feedback.target] if kinds[feedback.target] == "linear" else 1.0
    graded = found.get(feedback.source, 1.0) if kinds[feedback.source] == "linear" else 1.0
    return grids[feedback.source] / message * graded
