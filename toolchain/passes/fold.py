"""Fold what a chip does not have (scales, identities) into the weights beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from toolchain.ir import Array, Dense, Graph, Identity, Op, Phase, Scale, Synapse, frozen, tensor_names


@dataclass(frozen=True)
class Fold:
    """Merge `Scale` and `Identity` into the neighbouring weights, and drop tensors that nothing reads any more.

    The folded float graph computes the same currents as the module up to rounding in the last place; its spikes are the module's own (tested).
    """

    name: str = "fold"

    def __call__(self, graph: Graph) -> Graph:
        tensors = dict(graph.tensors)
        phases = tuple(_folded_phase(phase, tensors) for phase in graph.phases)
        used = {name for phase in phases for name in tensor_names(phase)}
        return msgspec.structs.replace(graph, phases=phases, tensors={name: t for name, t in tensors.items() if name in used})


def _folded_phase(phase: Phase, tensors: dict[str, Array]) -> Phase:
    return msgspec.structs.replace(phase, synapses=tuple(_folded_synapse(s, tensors) for s in phase.synapses))


def _folded_synapse(synapse: Synapse, tensors: dict[str, Array]) -> Synapse:
    factor = 1.0
    kept: list[Op] = []
    for op in synapse.ops:
        if isinstance(op, Scale):
            factor *= op.factor
        elif not isinstance(op, Identity):
            kept.append(op)
    if factor != 1.0:
        kept = _scaled(kept, factor, tensors)
    return msgspec.structs.replace(synapse, ops=tuple(kept) or (Identity(),))


def _scaled(ops: list[Op], factor: float, tensors: dict[str, Array]) -> list[Op]:
    """`ops` with the factor in the first weight, as a tensor of its own: others may share the unscaled one."""
    for i, op in enumerate(ops):
        if isinstance(op, Dense):
            name = _new_name(f"{op.weight}.scaled", tensors)
            tensors[name] = frozen(tensors[op.weight] * factor)
            return [*ops[:i], msgspec.structs.replace(op, weight=name), *ops[i + 1 :]]
    return [Scale(factor), *ops]


def _new_name(name: str, tensors: Mapping[str, Array]) -> str:
    candidate, n = name, 1
    while candidate in tensors:
        n += 1
        candidate = f"{name}{n}"
    return candidate
