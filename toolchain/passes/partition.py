"""Put couples, relays and readouts onto the cores of one or several chips."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import msgspec
import numpy as np
import numpy.typing as npt

from toolchain import limits
from toolchain.errors import DesignRuleError, GraphError
from toolchain.ir import Graph, Placement, Population, Synapse, weight_of
from toolchain.limits import Limits
from toolchain.planning import Plan, Sizes, best_plan, cores, uncut
from toolchain.wiring import INPUTS, MEMORY, NEURONS, OUTPUTS, Costs, weight_bits


@dataclass(frozen=True)
class Partition:
    """Fill `Graph.placement`: which neurons of which population are on which core of which chip.

    A population that fits is one slice. Another is cut into channels, rows, and columns, whatever takes the fewest cores; the output axons that its pieces
    cost its sources count as the cores they fill. Slices share a core where they fit together. Cores fill chips in the network's order, so neighbours
    are close. `toolchain.wiring` says what a slice costs. A readout of which no core holds a single neuron stays on the host, which then adds up its source's
    spikes; the graph's notes say so. What else no cut can cure is said of all populations in one DesignRuleError. With `split` off nothing is cut.
    """

    chip: str = "loihi2"
    split: bool = True
    name: str = "partition"

    def __call__(self, graph: Graph) -> Graph:
        chip = limits.load(self.chip)
        if not graph.integer:
            raise GraphError("the graph is in floats, which no chip holds: quantize it before partition")
        notes = _notes_of_host(Sizes(Costs(graph, chip)))
        sizes = Sizes(Costs(graph, chip, host=notes))
        plan = best_plan(sizes) if self.split else uncut(sizes)
        violations = [*_violated_formats(graph, chip), *_violated_sizes(plan, self.split)]
        placed = () if violations else cores(plan)
        if not violations and placed[-1].chip >= chip.largest_system.value:
            violations = [_too_many_chips(graph, chip, placed[-1].chip + 1)]
        if violations:
            raise DesignRuleError(_all(violations, graph, chip))
        provenance = msgspec.structs.replace(graph.provenance, notes=(*graph.provenance.notes, *notes.values()))
        return msgspec.structs.replace(graph, placement=Placement(chip.chip, placed), provenance=provenance)


def _notes_of_host(sizes: Sizes) -> dict[str, str]:
    """Readouts that no core can hold a neuron of, with a note for people."""
    notes = {}
    for name in (population.name for population in sizes.costs.graph.of_kind("readout")):
        worst = sizes.worst(name, sizes.finest(name), {})
        if (worst > sizes.most).any():
            notes[name] = (
                f"readout '{name}' stays on the host, which adds up its source's spikes: one of its neurons takes {worst[MEMORY]:,} bits of "
                f"memory and {worst[INPUTS]:,} input axons, a core of {sizes.chip.chip} has {sizes.most[MEMORY]:,} and {sizes.most[INPUTS]:,}"
            )
    return notes


def _all(violations: list[str], graph: Graph, chip: Limits) -> str:
    if len(violations) == 1:
        return violations[0]
    head = f"'{graph.provenance.model}' does not fit {chip.chip}, for {len(violations)} reasons:"
    return "\n".join([head, *(f"- {violation}" for violation in violations)])


def _too_many_chips(graph: Graph, chip: Limits, chips: int) -> str:
    largest = chip.largest_system.value
    return f"'{graph.provenance.model}' takes {chips:,} chips; the largest system of {chip.chip} has {largest:,}: lower the width of its populations"


def _violated_formats(graph: Graph, chip: Limits) -> Iterator[str]:
    """What the chip cannot represent, wherever it lies."""
    yield from (sentence for phase in graph.phases for synapse in phase.synapses for sentence in _violated_weights(graph, synapse, chip))
    if not chip.graded_spike_bits.value:
        for population in graph.of_kind("linear"):
            yield (
                f"population '{population.name}' is a relay, whose spikes carry graded values; {chip.chip} has binary spikes only: "
                "compile for loihi2 (--chip loihi2), or train a network without residual streams"
            )
    for population in graph.of_kind("input"):
        yield from _violated_input(graph, population, chip)
    for phase in graph.phases:
        exponents = [
            (name, bias.exponent) for name, biases in phase.bias.items() if graph.population(name).kind != "readout" for bias in biases
        ]
        for name, exponent in [*exponents, *((drive.population, drive.exponent) for drive in phase.drive)]:
            if exponent > chip.current_exponent.value:
                yield (
                    f"population '{name}' gets a current with exponent {exponent} in the {phase.name} phase; {chip.chip} has "
                    f"0 to {chip.current_exponent.value}: lower the scale of its unit"
                )


def _violated_weights(graph: Graph, synapse: Synapse, chip: Limits) -> Iterator[str]:
    for op in synapse.ops:
        key, exponent = weight_of(op), getattr(op, "exponent", 0)
        if key is not None and (bits := weight_bits(graph.tensors[key])) > chip.weight_bits.value:
            yield (
                f"population '{synapse.target}' gets weights of {bits} bits ('{key}'); {chip.chip} stores {chip.weight_bits.value}: "
                f"quantize to fewer (--weight-bits {chip.weight_bits.value})"
            )
        if exponent > chip.weight_exponent.value:
            yield (
                f"population '{synapse.target}' gets weights with exponent {exponent} ('{key}'); {chip.chip} has "
                f"0 to {chip.weight_exponent.value}: lower the scale of its unit"
            )


def _violated_input(graph: Graph, population: Population, chip: Limits) -> Iterator[str]:
    """Inputs that are sent on the chip need as many bits as they have levels; the host's currents need none."""
    levels = int(graph.scale("forward", population.name))
    bits = levels.bit_length() if levels > 1 else 0
    if bits <= chip.graded_spike_bits.value or not any(s.source == population.name for s in graph.phase("forward").synapses):
        return
    can = f"spikes with {chip.graded_spike_bits.value} bits" if chip.graded_spike_bits.value else "binary spikes only"
    way_out = "compile for loihi2 (--chip loihi2)" if population.events else "let the host send currents (--input bias)"
    yield f"input '{population.name}' sends graded spikes of {bits} bits; {chip.chip} has {can}: {way_out}"


def _violated_sizes(plan: Plan, split: bool) -> Iterator[str]:
    """A sentence for every limit that a population passes, whole or cut down to single neurons."""
    for name, population in plan.costs.placed.items():
        worst = plan.hopeless[name] if name in plan.hopeless else plan.sizes.worst(name, plan.pieces[name], plan.pieces)
        broken = [column for column in range(4) if worst[column] > plan.sizes.most[column]]
        for column in broken:
            most = f"{plan.chip.chip} holds {plan.sizes.most[column]:,} per core"
            if split:
                yield (
                    f"a single neuron of population '{name}' {_takes(plan, population, column, worst)}; {most}, "
                    f"and no partition helps: {_cure(plan, name, column)}"
                )
            else:
                yield (
                    f"population '{name}' {_takes(plan, population, column, worst)}; {most}: "
                    "partition it (--set partition.split=true) or lower the width"
                )
        if name in plan.hopeless and not broken:
            yield (
                f"population '{name}' fits no core of {plan.chip.chip} however it is cut: the smaller its pieces, the more output axons its sources "
                f"need ({worst[OUTPUTS]:,} for a single neuron of it): {_cure(plan, name, OUTPUTS)}"
            )


def _takes(plan: Plan, population: Population, column: int, worst: npt.NDArray[np.int64]) -> str:
    each = plan.costs.neurons[population.name]
    if column == NEURONS:
        return f"has {worst[column]:,} neurons" + (f", {each} for each of its {prod(population.shape):,} couples" if each > 1 else "")
    return f"takes {worst[column]:,} {('neurons', 'bits of memory', 'input axons', 'output axons')[column]}"


def _cure(plan: Plan, name: str, column: int) -> str:
    sources = ", ".join(sorted({f"'{wiring.source}'" for wiring in plan.costs.into[name]}))
    targets = ", ".join(sorted({f"'{wiring.target}'" for wiring in plan.costs.out_of[name]}))
    return f"lower the width of what it feeds ({targets})" if column == OUTPUTS else f"lower the width of what feeds it ({sources})"
