"""What makes a placement valid: every neuron on exactly one core."""

from __future__ import annotations

from math import prod

import numpy as np

from toolchain.errors import GraphError
from toolchain.ir.parts import Graph, Population, Slice

MOST_CORES = 2**16
"""Cores of one chip."""

MOST_BOXES = 2**26
"""Boxes into which the edges of a population's slices cut it."""


def verify_placement(graph: Graph) -> None:
    """Raise GraphError, naming the population and what is wrong, unless the graph has no placement or a valid one: every couple and relay in exactly one
    slice of one core; a readout likewise, or in none (the host adds up what its source sends); inputs in none."""
    if graph.placement is None:
        return
    seen: set[tuple[int, int]] = set()
    slices: dict[str, list[Slice]] = {}
    for core in graph.placement.cores:
        where = f"core {core.core} of chip {core.chip}"
        _require(core.chip >= 0 and core.core >= 0, f"the placement has a {where}: both are numbered from 0")
        _require(
            core.chip < len(graph.placement.cores) and core.core < MOST_CORES,
            f"the placement has a {where}, of {len(graph.placement.cores)} cores in all: number chips one after another, cores below {MOST_CORES:,}",
        )
        _require((core.chip, core.core) not in seen, f"the placement has {where} twice: join its slices")
        seen.add((core.chip, core.core))
        for part in core.slices:
            slices.setdefault(part.population, []).append(part)
            _require(_inside(graph.population(part.population), part), f"{where} holds {_told(part)}, which is no box of the population")
    for population in graph.populations:
        parts = slices.get(population.name, [])
        if population.kind == "input":
            _require(not parts, f"input '{population.name}' is placed on a core: the host sends it")
        elif parts or population.kind != "readout":
            _verify_cover(population, parts)


def _inside(population: Population, part: Slice) -> bool:
    if not len(part.start) == len(part.stop) == len(population.shape):
        return False
    return all(0 <= start < stop <= n for start, stop, n in zip(part.start, part.stop, population.shape, strict=True))


def _verify_cover(population: Population, parts: list[Slice]) -> None:
    """Boxes that hold as many neurons as there are, none of them twice."""
    held, neurons = sum(_size(part) for part in parts), prod(population.shape)
    _require(
        held == neurons, f"population '{population.name}' has {neurons:,} neurons and the placement holds {held:,}: run partition again"
    )
    if len(parts) == 1:
        return
    edges = [np.unique([axis for part in parts for axis in (part.start[i], part.stop[i])]) for i in range(len(population.shape))]
    places = [len(several) - 1 for several in edges]  # boxes between the edges: fewer than neurons
    _require(
        prod(places) <= MOST_BOXES, f"the placement cuts population '{population.name}' in ways that no partition does: run partition again"
    )
    taken = np.zeros(places, np.bool_)
    for part in parts:
        ends = zip(edges, part.start, part.stop, strict=True)
        region = taken[tuple(slice(*np.searchsorted(several, (start, stop))) for several, start, stop in ends)]
        _require(not region.any(), f"the placement holds neurons of {_told(part)} twice: run partition again")
        region[...] = True


def _size(part: Slice) -> int:
    return prod(stop - start for start, stop in zip(part.start, part.stop, strict=True))


def _told(part: Slice) -> str:
    return f"population '{part.population}' from {part.start} to {part.stop}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise GraphError(message)
