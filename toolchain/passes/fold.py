"""Fold what a chip does not have (scales, identities, matrices in a row) into one operation with weights a connection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Union

import msgspec
import numpy as np

from toolchain.errors import GraphError
from toolchain.ir import (
    LARGEST_MATRIX,
    Array,
    AvgPool2d,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Drive,
    Graph,
    Identity,
    Op,
    Phase,
    Scale,
    Shape,
    Synapse,
    Upsample,
    adjoint,
    frozen,
    shapes_along,
    tensor_names,
)

Weighted = Union[Dense, Conv2d, ConvTranspose2d]


@dataclass(frozen=True)
class Fold:
    """Leave every connection exactly one operation with weights (Dense, Conv2d, ConvTranspose2d, or Scale with a weight), pools and upsampling before or behind it.

    Factors, of all values or one a channel, pass through pools and upsampling, which treat all channels alike, into the weights: as factors of the outputs where they come
    behind them, of the inputs where they come before. Dense operations in a row become their product. A connection without weights gets one factor a channel, at its end; where it also changes the shape (images read as rows), a diagonal matrix.
    A folded tensor is called NAME.scaled; others keep their names and their bytes, and tensors that nothing reads any more are dropped. The folded float graph computes the same
    currents as the module up to rounding in the last place; its spikes are the module's own (tested). Integer graphs have nothing to fold.
    """

    name: str = "fold"

    def __call__(self, graph: Graph) -> Graph:
        if graph.integer:
            return graph
        folder = _Folder(graph)
        phases = tuple(folder.phase(phase) for phase in graph.phases)
        used = {name for phase in phases for name in tensor_names(phase)}
        return msgspec.structs.replace(graph, phases=phases, tensors={name: t for name, t in folder.tensors.items() if name in used})


class _Folder:
    """One run of the pass: gathers folded tensors, which a connection and its adjoint share."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.tensors = dict(graph.tensors)
        self.known: dict[tuple[tuple[Op, ...], str, str], tuple[Op, ...]] = {}

    def phase(self, phase: Phase) -> Phase:
        synapses = tuple(self._synapse(phase, synapse) for synapse in phase.synapses)
        return msgspec.structs.replace(phase, synapses=synapses, drive=tuple(self._drive(drive) for drive in phase.drive))

    def _synapse(self, phase: Phase, synapse: Synapse) -> Synapse:
        ends = (synapse.source, synapse.target)
        # an adjoint is folded as what it is the adjoint of; where there are only factors, which are their own, the phase tells
        turned = [op.transpose for op in synapse.ops if not isinstance(op, (Scale, Identity))] or [phase.name == "feedback"]
        if any(turned):
            return msgspec.structs.replace(synapse, ops=adjoint(self._folded(adjoint(synapse.ops), *reversed(ends))))
        return msgspec.structs.replace(synapse, ops=self._folded(synapse.ops, *ends))

    def _drive(self, drive: Drive) -> Drive:
        if drive.source == "error":
            return drive
        return msgspec.structs.replace(drive, ops=self._folded(drive.ops, self.graph.of_kind("input")[0].name, drive.population))

    def _folded(self, ops: tuple[Op, ...], source: str, target: str) -> tuple[Op, ...]:
        shape = self.graph.population(source).shape
        key = (ops, source, target)
        if key not in self.known:
            where = f"synapse '{source}' -> '{target}'"
            shapes = shapes_along(ops, shape, self.graph.population(target).shape, self.graph.tensors)
            reshapes = shapes[-1] != self.graph.population(target).shape
            self.known[key] = self._fold(ops, (shape, *shapes), where, f"{source}.{target}.scale", reshapes)
        return self.known[key]

    def _fold(self, ops: Sequence[Op], shapes: Sequence[Shape], where: str, fallback: str, reshapes: bool) -> tuple[Op, ...]:
        """`shapes[i]` is what operation i takes, `shapes[i + 1]` what it makes; `fallback` names the factors of a connection without weights, and
        `reshapes` says whether its target has the values in another shape."""
        before: list[Op] = []
        behind: list[Op] = []
        core: Weighted | None = None
        weight = np.empty(0)
        factors = np.ones(shapes[0][0])  # one a channel, of the inputs while there is no core, of its outputs afterwards
        names: list[str] = []
        for op, taken, made in zip(ops, shapes, shapes[1:], strict=False):
            if isinstance(op, Scale):
                factors = factors * op.factor * (1.0 if op.weight is None else self.tensors[op.weight])
                names += [] if op.weight is None else [op.weight]
            elif isinstance(op, (AvgPool2d, Upsample)):
                (before if core is None else behind).append(op)
            elif isinstance(op, (Dense, Conv2d, ConvTranspose2d)):
                following = _of_inputs(op, self.tensors[op.weight], factors, prod(taken))
                if core is None:
                    weight = following
                elif isinstance(core, Dense) and isinstance(op, Dense) and not behind:
                    weight = following @ weight
                else:
                    raise GraphError(
                        f"{where} has {type(core).__name__} and {type(op).__name__}: one operation with weights goes into a connection, put a relay between"
                    )
                core, factors = op, np.ones(made[0])
                names.append(op.weight)
        if core is None:
            kept = names[0] if len(names) == 1 else None
            if reshapes:
                return (*before, Dense(self._kept(_diagonal(factors, prod(shapes[-1]), where), kept, fallback)))
            return (*before, Scale(weight=self._kept(factors, kept, fallback)))
        weight = _of_outputs(core, weight, factors)
        return (*before, msgspec.structs.replace(core, weight=self._kept(weight, core.weight, core.weight)), *behind)

    def _kept(self, tensor: Array, name: str | None, fallback: str) -> str:
        """The name of `tensor`: `name` where that holds the same values, else a new one."""
        if name is not None and np.array_equal(self.tensors[name], tensor):
            return name
        new = _new_name(fallback if name is None else f"{name}.scaled", self.tensors)
        self.tensors[new] = frozen(tensor)
        return new


def _of_inputs(op: Weighted, weight: Array, factors: Array, values: int) -> Array:
    """The weight that takes channel i times factors[i]; `values` is how many values arrive in all."""
    if isinstance(op, Dense):
        return _times(weight, np.repeat(factors, values // len(factors)), 1)
    if isinstance(op, ConvTranspose2d):
        return _times(weight, factors, 0)
    return _times_grouped(weight, factors, op.groups)


def _of_outputs(op: Weighted, weight: Array, factors: Array) -> Array:
    """The weight that makes channel i times factors[i]."""
    return _times_grouped(weight, factors, op.groups) if isinstance(op, ConvTranspose2d) else _times(weight, factors, 0)


def _times(weight: Array, factors: Array, axis: int) -> Array:
    """`weight` with its parts along `axis` times their factors."""
    made: Array = weight * factors.reshape(*[1] * axis, -1, *[1] * (weight.ndim - axis - 1))
    return made


def _times_grouped(weight: Array, factors: Array, groups: int) -> Array:
    """The same along the second axis, which counts the channels of one group: the groups lie one after the other along the first."""
    each = factors.reshape(groups, -1).repeat(len(weight) // groups, axis=0)
    made: Array = weight * each.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    return made


def _diagonal(factors: Array, values: int, where: str) -> Array:
    """Factors of channels as a matrix: its adjoint, unlike theirs, does not need the shape that the other end has forgotten."""
    if values**2 > LARGEST_MATRIX:
        raise GraphError(
            f"{where} has no weights and leads {values:,} values into another shape, a matrix of more than {LARGEST_MATRIX:,} entries: give both ends one shape"
        )
    return np.diag(np.repeat(factors, values // len(factors)))


def _new_name(name: str, tensors: Mapping[str, Array]) -> str:
    candidate, n = name, 1
    while candidate in tensors:
        n += 1
        candidate = f"{name}{n}"
    return candidate
