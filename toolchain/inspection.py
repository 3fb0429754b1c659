"""Show the graph of a model at any stage of its pipeline."""

from __future__ import annotations

from toolchain.compiler import graph_for, lowered
from toolchain.describe import Inspection
from toolchain.source import Model, find
from toolchain.target import get


def inspect(model: Model, *, after: str | None = None) -> Inspection:
    """The compiled graph of `model` (of a .fsnn file the one it holds), or the graph after pass `after` of the default pipeline."""
    source = find(model)
    chosen = get("lava-sim")
    if after is None:
        return Inspection(graph_for(source, chosen), chosen.name)
    return Inspection(chosen.pipeline.until(after)(lowered(source)), chosen.name)
