"""Derive the feedback phase: the same synapses transposed, gated by the forward masks, driven by the error."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from toolchain.errors import GraphError
from toolchain.ir import Dynamics, Graph, Identity, Op, Phase, Scale, Synapse


@dataclass(frozen=True)
class Adjoint:
    """Fill the declared feedback phase with transposed, gated synapses (SPIDE's backward stage, METHODS 3.2).

    The backward stage of population l is y += (1/A_t) W^T (m Ab_t q) over its forward targets t, firing at +-Vb and subtracting Ab. Measured in
    units of A_t/Ab_t this is y' += W^T (m q) with threshold Vb A_t/Ab_t and reset Ab A_t/Ab_t, so both phases read the very same weights.
    `graph.units` keeps the factor A_t/Ab_t as the population's feedback scale. A graph that declares no feedback phase passes unchanged.
    """

    name: str = "adjoint"

    def __call__(self, graph: Graph) -> Graph:
        if not graph.has_phase("feedback"):
            return graph
        forward, declared = graph.phase("forward"), graph.phase("feedback")
        if declared.synapses:
            raise GraphError("the feedback phase already has synapses: run adjoint once, on a lowered graph")
        couples = {population.name for population in graph.of_kind("couple")}
        between = [s for s in forward.synapses if s.source in couples and s.target in couples]
        order = tuple(name for name in reversed(forward.order) if name in couples)
        scale = {name: _scale(graph, declared, [s.target for s in between if s.source == name] or [name], name) for name in order}
        feedback = msgspec.structs.replace(
            declared,
            order=order,
            dynamics={name: _in_units(declared.dynamics[name], scale[name]) for name in order},
            synapses=tuple(_transposed(synapse) for synapse in reversed(between)),
        )
        phases = tuple(feedback if phase.name == "feedback" else phase for phase in graph.phases)
        units = msgspec.structs.replace(graph.units, scale={**graph.units.scale, "feedback": scale})
        return msgspec.structs.replace(graph, phases=phases, units=units)


def _scale(graph: Graph, declared: Phase, targets: list[str], name: str) -> float:
    """A_t / Ab_t of the forward targets t of population `name`, which must agree on it."""
    forward = graph.phase("forward")
    ratios = {t: forward.dynamics[t].reset / declared.dynamics[t].reset for t in targets}
    if len(set(ratios.values())) > 1:
        found = ", ".join(f"'{t}' {ratio:g}" for t, ratio in ratios.items())
        raise GraphError(
            f"population '{name}' feeds populations whose resets have different ratios A/Ab ({found}): give them one reset ratio"
        )
    return float(next(iter(ratios.values())))


def _in_units(dynamics: Dynamics, scale: float) -> Dynamics:
    return msgspec.structs.replace(dynamics, threshold=dynamics.threshold * scale, reset=dynamics.reset * scale)


def _transposed(synapse: Synapse) -> Synapse:
    """The adjoint of a forward synapse. Its delay stays: in the reversed order a same-step edge is again same-step, a delayed one delayed."""
    ops = tuple(_transposed_op(op) for op in reversed(synapse.ops))
    return Synapse(source=synapse.target, target=synapse.source, ops=ops, delay=synapse.delay, gate=synapse.target)


def _transposed_op(op: Op) -> Op:
    """Self-adjoint operations stay; the others flip their `transpose` flag and keep their tensor."""
    return op if isinstance(op, (Scale, Identity)) else msgspec.structs.replace(op, transpose=not op.transpose)
