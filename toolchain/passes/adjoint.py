"""Derive the feedback phase: the same synapses transposed, gated by the forward masks, driven by the error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from toolchain.errors import GraphError
from toolchain.ir import Dynamics, Graph, Synapse, adjoint


@dataclass(frozen=True)
class Adjoint:
    """Fill the declared feedback phase with transposed, gated synapses (SPIDE's backward stage, METHODS 3.2).

    The backward stage of population l is y += (1/A_t) W^T (m Ab_t q) over its forward targets t, firing at +-Vb and subtracting Ab. Measured in
    units of A_t/Ab_t this is y' += W^T (m q) with threshold Vb A_t/Ab_t and reset Ab A_t/Ab_t, so both phases read the very same weights.
    A relay passes on W^T of what reaches it, in the same unit, ungated: it has no spikes to count. `graph.units` keeps the factor A_t/Ab_t as the population's feedback scale. A graph that declares no feedback phase passes unchanged.
    """

    name: str = "adjoint"

    def __call__(self, graph: Graph) -> Graph:
        if not graph.has_phase("feedback"):
            return graph
        forward, declared = graph.phase("forward"), graph.phase("feedback")
        if declared.synapses:
            raise GraphError("the feedback phase already has synapses: run adjoint once, on a lowered graph")
        inner = {population.name: population.kind for population in graph.populations if population.kind in ("couple", "linear")}
        between = [s for s in forward.synapses if s.source in inner and s.target in inner]
        order = tuple(name for name in reversed(forward.order) if name in inner)
        ratios = {name: forward.dynamics[name].reset / declared.dynamics[name].reset for name in order if inner[name] == "couple"}
        scale = {name: _scale(name, _reached(name, between, ratios), ratios) for name in order}
        feedback = msgspec.structs.replace(
            declared,
            order=order,
            dynamics={name: _in_units(declared.dynamics[name], scale[name]) for name in order},
            synapses=tuple(_transposed(synapse, inner) for synapse in reversed(between)),
        )
        phases = tuple(feedback if phase.name == "feedback" else phase for phase in graph.phases)
        units = msgspec.structs.replace(graph.units, scale={**graph.units.scale, "feedback": scale})
        return msgspec.structs.replace(graph, phases=phases, units=units)


def _reached(name: str, between: list[Synapse], ratios: dict[str, float]) -> list[str]:
    """The couples that population `name` feeds, directly or through relays: those whose A/Ab its feedback is measured in."""
    found: list[str] = []
    seen, fresh = {name}, [name]
    while fresh:
        targets = [s.target for s in between if s.source == fresh[0]]
        found += [t for t in targets if t in ratios and t not in found]
        relays = [t for t in targets if t not in ratios and t not in seen]
        seen.update(relays)
        fresh = [*fresh[1:], *relays]
    return found or ([name] if name in ratios else list(ratios))


def _scale(name: str, targets: list[str], ratios: dict[str, float]) -> float:
    """A_t / Ab_t of the couples t that population `name` feeds, which must agree on it up to rounding."""
    found = {t: ratios[t] for t in targets}
    first = next(iter(found.values()))
    if any(abs(ratio - first) > 1e-9 * first for ratio in found.values()):
        listed = ", ".join(f"'{t}' {ratio:g}" for t, ratio in found.items())
        raise GraphError(
            f"population '{name}' feeds populations whose resets have different ratios A/Ab ({listed}): give them one reset ratio"
        )
    return float(first)


def _in_units(dynamics: Dynamics, scale: float) -> Dynamics:
    return msgspec.structs.replace(dynamics, threshold=dynamics.threshold * scale, reset=dynamics.reset * scale)


def _transposed(synapse: Synapse, kinds: Mapping[str, str]) -> Synapse:
    """The adjoint of a forward synapse, gated where it leaves couples. Its delay stays: in the reversed order a same-step edge is again same-step, a
    delayed one delayed."""
    gate = synapse.target if kinds[synapse.target] == "couple" else None
    return Synapse(source=synapse.target, target=synapse.source, ops=adjoint(synapse.ops), delay=synapse.delay, gate=gate)
