"""Connections as lists of single synapses."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from toolchain import fixed
from toolchain.errors import DesignRuleError
from toolchain.ir import Array, Conv2d, ConvTranspose2d, Dense, Graph, Op, Synapse
from toolchain.targets.sanafe.architecture import CONVOLUTION, DENSE, SPARSE

Ints = npt.NDArray[np.int64]

VALUES = 2**22
"""Entries of the matrix that are made at a time."""


class Edges(NamedTuple):
    """The synapses of one connection: numbers of source and target neurons, and what the target adds for a spike. Weights of 0 are left out."""

    sources: Ints
    targets: Ints
    weights: Ints

    def behind(self, gate: Array | None) -> Edges:
        """Those whose source neuron `gate` lets through."""
        if gate is None:
            return self
        kept = np.asarray(gate, np.bool_).reshape(-1)[self.sources]
        return Edges(self.sources[kept], self.targets[kept], self.weights[kept])


def edges(graph: Graph, synapse: Synapse) -> Edges:
    """The connection's whole weights, by what it makes of single spikes."""
    source, target = graph.population(synapse.source).shape, graph.population(synapse.target).shape
    neurons, rows = prod(source), max(1, VALUES // prod(target))
    found = [_rows(graph, synapse, range(first, min(first + rows, neurons)), neurons) for first in range(0, neurons, rows)]
    made = Edges(*(np.concatenate(column) for column in zip(*found, strict=True)))
    if (made.weights.astype(np.float32) != made.weights).any():
        raise DesignRuleError(
            f"synapse '{synapse.source}' -> '{synapse.target}' has weights of more than 24 bits, and SANA-FE reads them in single precision: use fewer weight bits"
        )
    return made


def _rows(graph: Graph, synapse: Synapse, sources: range, neurons: int) -> Edges:
    shape = graph.population(synapse.source).shape
    spikes = np.zeros((len(sources), neurons), np.int64)
    spikes[np.arange(len(sources)), np.asarray(sources)] = 1
    made = fixed.apply(
        synapse.ops, graph.tensors, spikes.reshape(-1, *shape), graph.population(synapse.target).shape, integer=True
    ).reshape(len(sources), -1)
    row, target = np.nonzero(made)
    return Edges(row + sources.start, target, made[row, target])


def unit(ops: Sequence[Op]) -> str:
    """The synapse unit that holds a connection: SANA-FE charges dense, sparse and convolutional ones differently. Compositions (pools, factors) are sparse."""
    if len(ops) == 1:
        return {Dense: DENSE, Conv2d: CONVOLUTION, ConvTranspose2d: CONVOLUTION}.get(type(ops[0]), SPARSE)
    return SPARSE
