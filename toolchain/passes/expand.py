"""Ternary couples as pairs of binary neurons, for whatever only knows those (SANA-FE, NIR). Targets of ours run couples whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np

from toolchain.errors import GraphError
from toolchain.ir import (
    MANTISSA_LIMIT,
    Array,
    Bias,
    Drive,
    Dynamics,
    Graph,
    Identity,
    Op,
    Phase,
    Population,
    Provenance,
    Scale,
    Synapse,
    Timing,
    frozen,
    shapes_along,
    weight_of,
)

Value = TypeVar("Value", int, float)

WIDE_RESET = 2**16
"""Lateral connections of smaller resets are sums of 8-bit weights, those of larger ones of 16-bit weights."""


class Pair(NamedTuple):
    """The names of a couple's members, and of the relay that brings them the host's error with either sign."""

    plus: str
    minus: str
    drive: str


@dataclass(frozen=True)
class ExpandCouples:
    """Rewrite every population that fires with both members in the feedback phase into two populations of binary neurons, `NAME.plus` and `NAME.minus`.

    Members get inputs +J and -J, so each synapse between couples becomes four (w, -w, -w, w), and each tells the other of its spikes by a lateral synapse
    of weight +reset (METHODS 3.6). That correction arrives one step late, which changes no spike: at leak 1 potentials only add, and the step that needs it
    has it. With a leak the reset is leaked by one and not by the other, so the pass refuses. In the forward phase nothing reaches the minus members, which
    never fire there. The host's error goes through a linear relay `NAME.drive`, which passes it on with either sign.

    Spikes, and what each population adds up, are those of the couples; `joined` gives the couples' spikes and potentials back. Works on graphs before and
    after `retime`. The placement is dropped: its slices name couples.
    """

    name: str = "expand"

    def __call__(self, graph: Graph) -> Graph:
        pairs = pairs_of(graph)
        if not pairs:
            return graph
        for phase in graph.phases:
            _require_exact(phase)
        made = _Rewrite(graph, pairs)
        driven = {drive.population for phase in graph.phases for drive in phase.drive if drive.population in made.both(phase)}
        phases = tuple(made.phase(phase, driven) for phase in graph.phases)
        scale = {phase: _each(scales, pairs, driven) for phase, scales in graph.units.scale.items()}
        return msgspec.structs.replace(
            graph,
            populations=tuple(p for population in graph.populations for p in _members(population, pairs, driven)),
            phases=phases,
            tensors=made.tensors,
            units=msgspec.structs.replace(graph.units, scale=scale),
            provenance=_renamed(graph.provenance, pairs),
            placement=None,
        )


def pairs_of(graph: Graph) -> dict[str, Pair]:
    """The names that the pass gives: by couple that fires with both members in some phase."""
    both = {name for phase in graph.phases for name, dynamics in phase.dynamics.items() if dynamics.members == "both"}
    pairs = {p.name: Pair(f"{p.name}.plus", f"{p.name}.minus", f"{p.name}.drive") for p in graph.populations if p.name in both}
    taken = {p.name for p in graph.populations} & {name for pair in pairs.values() for name in pair}
    if taken:
        raise GraphError(f"population '{min(taken)}' has a name that expanding couples needs for a member: rename it")
    return pairs


def joined(plus: Array, minus: Array, potential: Array, reset: float) -> tuple[Array, Array]:
    """What a couple did, from its members' spikes and the plus member's recorded potential, all (time_steps, ...): its spikes in {-1, 0, 1}, and its
    potential, which has the minus member's reset of the very step, not one step late."""
    return plus - minus, potential + (minus.astype(potential.dtype) * reset).astype(potential.dtype)


def _require_exact(phase: Phase) -> None:
    for name, dynamics in phase.dynamics.items():
        if dynamics.members != "both":
            continue
        if dynamics.leak != 1:
            raise GraphError(
                f"population '{name}' leaks ({dynamics.leak:g}) and fires with both members in phase '{phase.name}': as a pair of binary neurons each would "
                "learn of the other's reset one leak late, which is not exact; keep the couples whole, or train with leak 1"
            )
        if phase.name == "forward":
            raise GraphError(
                f"population '{name}' fires with both members in the forward phase, where the readout takes one connection and not one from each member: "
                "give it members 'plus' there"
            )


class _Rewrite:
    """Gathers the tensors that signs need while it rewrites the phases."""

    def __init__(self, graph: Graph, pairs: Mapping[str, Pair]) -> None:
        self.graph, self.pairs = graph, pairs
        self.tensors: dict[str, Array] = dict(graph.tensors)

    def both(self, phase: Phase) -> set[str]:
        return {name for name, dynamics in phase.dynamics.items() if dynamics.members == "both"}

    def phase(self, phase: Phase, driven: set[str]) -> Phase:
        both = self.both(phase)
        synapses = [made for synapse in phase.synapses for made in self._signed(synapse, both)]
        synapses += [made for name in phase.order if name in both for made in self._lateral(phase, name)]
        synapses += [made for drive in phase.drive if drive.population in both for made in self._fed(drive.population)]
        timing = phase.timing
        return msgspec.structs.replace(
            phase,
            order=tuple(member for name in phase.order for member in self._ordered(phase, name, driven)),
            dynamics=self._dynamics(phase, driven),
            synapses=tuple(synapses),
            bias={member: biases for name, each in phase.bias.items() for member, biases in self._biases(name, each, both)},
            drive=tuple(self._drive(drive, both) for drive in phase.drive),
            timing=msgspec.structs.replace(timing, start=_each(timing.start, self.pairs, driven)) if timing.start else Timing(),
        )

    def _ordered(self, phase: Phase, name: str, driven: set[str]) -> tuple[str, ...]:
        """The members in the place of their couple, behind the relay that feeds them; all take part in the forward phase, as every population must."""
        if name not in self.pairs:
            return (name,)
        pair = self.pairs[name]
        if phase.name != "forward" and name not in self.both(phase):
            return (pair.plus,)
        return (pair.drive, pair.plus, pair.minus) if name in driven else (pair.plus, pair.minus)

    def _dynamics(self, phase: Phase, driven: set[str]) -> dict[str, Dynamics]:
        made: dict[str, Dynamics] = {}
        for name, dynamics in phase.dynamics.items():
            binary = msgspec.structs.replace(dynamics, members="plus") if name in self.pairs else dynamics
            for member in self._ordered(phase, name, driven):
                relay = name in self.pairs and member == self.pairs[name].drive
                made[member] = Dynamics(1.0, members="graded") if relay else binary
        return made

    def _ends(self, name: str, both: set[str]) -> tuple[tuple[str, int], ...]:
        """The members of a population that take part, with the sign of what they send and of what they add."""
        if name not in self.pairs:
            return ((name, 1),)
        pair = self.pairs[name]
        return ((pair.plus, 1), (pair.minus, -1)) if name in both else ((pair.plus, 1),)

    def _signed(self, synapse: Synapse, both: set[str]) -> Iterator[Synapse]:
        gated = None if synapse.gate is None else self.pairs.get(synapse.gate)
        gate = synapse.gate if gated is None else gated.plus
        for source, sent in self._ends(synapse.source, both):
            for target, added in self._ends(synapse.target, both):
                ops = synapse.ops if sent * added > 0 else self._negated(synapse)
                yield Synapse(source, target, ops, synapse.delay, gate)

    def _negated(self, synapse: Synapse) -> tuple[Op, ...]:
        """The connection times -1: one of its weights changes sign; one without weights gets a factor."""
        ops = synapse.ops
        for i, op in enumerate(ops):
            key = weight_of(op)
            if key is not None:
                return (*ops[:i], msgspec.structs.replace(op, weight=self._minus(key)), *ops[i + 1 :])
        if not self.graph.integer:
            return (*ops, Scale(-1.0))
        source, target = self.graph.population(synapse.source).shape, self.graph.population(synapse.target).shape
        made = shapes_along(ops, source, target, self.graph.tensors)
        return (*ops, self._constant(-1, (made[-1] if made else target)[0]))

    def _minus(self, key: str) -> str:
        """The name of tensor `key` times -1, in a type one size up where its own has no room for the opposite of its smallest number."""
        name = f"{key}.minus"
        if name not in self.tensors:
            values = self.tensors[key]
            narrow = np.issubdtype(values.dtype, np.integer) and values.size and values.min() == np.iinfo(values.dtype).min
            wide = np.promote_types(values.dtype, np.dtype(f"i{2 * values.dtype.itemsize}")) if narrow else values.dtype
            self.tensors[name] = frozen(-values.astype(wide), wide)
        return name

    def _constant(self, value: int, channels: int, exponent: int = 0) -> Scale:
        """An integer graph's factor for every channel."""
        name = f"{value}.times.{channels}"
        self.tensors.setdefault(name, frozen(np.full(channels, value), np.int16))
        return Scale(weight=name, exponent=exponent)

    def _lateral(self, phase: Phase, name: str) -> Iterator[Synapse]:
        """Each member adds the reset to the other, a step later."""
        reset, channels = phase.dynamics[name].reset, self.graph.population(name).shape[0]
        pieces = [Scale(reset)] if not self.graph.integer and reset else []
        if self.graph.integer:
            pieces = [self._constant(mantissa, channels, exponent) for mantissa, exponent in _pieces(int(reset))]
        pair = self.pairs[name]
        for piece in pieces:
            yield Synapse(pair.plus, pair.minus, (piece,), delay=1)
            yield Synapse(pair.minus, pair.plus, (piece,), delay=1)

    def _fed(self, name: str) -> Iterator[Synapse]:
        """From the relay of the host's current to both members, in the same step."""
        pair = self.pairs[name]
        minus = self._constant(-1, self.graph.population(name).shape[0]) if self.graph.integer else Scale(-1.0)
        yield Synapse(pair.drive, pair.plus, (Identity(),))
        yield Synapse(pair.drive, pair.minus, (minus,))

    def _drive(self, drive: Drive, both: set[str]) -> Drive:
        if drive.population not in self.pairs:
            return drive
        pair = self.pairs[drive.population]
        return msgspec.structs.replace(drive, population=pair.drive if drive.population in both else pair.plus)

    def _biases(self, name: str, biases: tuple[Bias, ...], both: set[str]) -> Iterator[tuple[str, tuple[Bias, ...]]]:
        if name not in self.pairs:
            yield name, biases
            return
        yield self.pairs[name].plus, biases
        if name in both:
            yield self.pairs[name].minus, tuple(made for bias in biases for made in self._opposite(bias))

    def _opposite(self, bias: Bias) -> Iterator[Bias]:
        """A bias times -1. A 13-bit mantissa of -4096 has no opposite: those neurons get 4095 and 1."""
        name, values = f"{bias.tensor}.minus", -self.graph.tensors[bias.tensor].astype(np.int64 if self.graph.integer else np.float64)
        high = values > MANTISSA_LIMIT - 1 if self.graph.integer else np.zeros(values.shape, np.bool_)
        self.tensors[name] = frozen(values - high, np.int16 if self.graph.integer else values.dtype)
        yield msgspec.structs.replace(bias, tensor=name)
        if high.any():
            self.tensors[f"{name}.rest"] = frozen(high, np.int16)
            yield msgspec.structs.replace(bias, tensor=f"{name}.rest")


def _pieces(amount: int) -> Iterator[tuple[int, int]]:
    """`amount` as a sum of mantissa << exponent that a chip's synapses can carry."""
    largest = 127 if amount < WIDE_RESET else 2**15 - 1
    while amount:
        exponent = max(0, min(7, amount.bit_length() - largest.bit_length()))
        mantissa = min(amount >> exponent, largest)
        yield mantissa, exponent
        amount -= mantissa << exponent


def _members(population: Population, pairs: Mapping[str, Pair], driven: set[str]) -> Iterator[Population]:
    if population.name not in pairs:
        yield population
        return
    pair = pairs[population.name]
    if population.name in driven:
        yield Population(pair.drive, population.shape, "linear")
    yield msgspec.structs.replace(population, name=pair.plus)
    yield msgspec.structs.replace(population, name=pair.minus)


def _each(values: Mapping[str, Value], pairs: Mapping[str, Pair], driven: set[str]) -> dict[str, Value]:
    """What each couple has, for each of its members and its relay."""
    made: dict[str, Value] = {}
    for name, value in values.items():
        if name not in pairs:
            made[name] = value
            continue
        plus, minus, drive = pairs[name]
        made |= dict.fromkeys((plus, minus, drive) if name in driven else (plus, minus), value)
    return made


def _renamed(provenance: Provenance, pairs: Mapping[str, Pair]) -> Provenance:
    """What rounding did to a forward current is asked for by the name of the population that gets it."""
    currents = {f"forward.{name}.current": f"forward.{pair.plus}.current" for name, pair in pairs.items()}
    rounding = {currents.get(key, key): value for key, value in provenance.rounding.items()}
    return msgspec.structs.replace(provenance, rounding=rounding)
