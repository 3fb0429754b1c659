"""Show the graph of a model at any stage of its pipeline: as a table, as JSON, as pictures."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from toolchain.analysis import report
from toolchain.artifact import Artifact
from toolchain.compiler import FIRST_STAGE, compile, compiled_as, lowered, uncompiled, until
from toolchain.describe import Inspection
from toolchain.describe import processes as processes_of
from toolchain.drawing import draw
from toolchain.errors import UsageError, unknown
from toolchain.files import replace_file
from toolchain.ir import Graph
from toolchain.passes import Pipeline
from toolchain.process_drawing import draw as draw_processes
from toolchain.source import Model
from toolchain.target import get
from toolchain.utilisation import render, utilisation

TARGET = "lava-sim"
"""Whose passes are shown of a model that is not compiled yet."""


def inspect(
    model: Model,
    *,
    after: str | None = None,
    processes: bool = False,
    svg: str | os.PathLike[str] | None = None,
    chip_svg: str | os.PathLike[str] | None = None,
    analysis: bool = False,
) -> Inspection:
    """The compiled graph of `model` (of a .fsnn file the one it holds), or the graph after pass `after` of its pipeline ("lower": before any).

    `processes` adds what will run as Lava processes, `svg` writes a picture of the graph there (with `processes` of those), `chip_svg` one of its cores. `analysis` adds how
    far potentials can go, whether loops settle, and what rounding costs each population (`toolchain.analysis.report`). A network of the catalogue without trained weights is shown with random ones. Raises UsageError for an unknown pass, or a stage that a .fsnn file does not hold;
    DesignRuleError where the graph does not fit the chip.
    """
    source, notes = uncompiled(model)
    if analysis and after is not None:
        raise UsageError("--analysis is of the compiled graph beside the float one: leave --after out")
    analysed = None
    if analysis:
        compiled = source.artifact or compile(model).artifact
        analysed = report(compiled)
        target, graph = compiled.target, compiled.graph
    elif source.artifact is not None:
        target, graph = source.artifact.target, _stage_of(source.artifact, source.name, after)
    else:
        pipeline = get(TARGET).pipeline if after is None else until(get(TARGET).pipeline, after)
        target, graph = TARGET, pipeline(lowered(source, notes=notes))
    if processes:
        processes_of(graph)  # refused before any picture is written
    return Inspection(graph, target, processes, _pictures(graph, svg, chip_svg, draw_processes if processes else draw), analysed)


def _stage_of(compiled: Artifact, name: str, after: str | None) -> Graph:
    """The graph of an artefact as pass `after` left it: kept as it is, or made again of the float graph; what rounding did is not made again."""
    graph, passes = compiled.graph, compiled.graph.provenance.passes
    if after is None or after == passes[-1]:
        return graph
    if after != FIRST_STAGE and after not in passes:
        raise unknown("pass", after, [FIRST_STAGE, *passes])
    behind = passes[passes.index(after) + 1 :] if after in passes else passes
    if behind == ("partition",):
        provenance = msgspec.structs.replace(graph.provenance, passes=passes[:-1])
        return msgspec.structs.replace(graph, placement=None, provenance=provenance)
    float_graph = compiled.float_graph
    done = () if float_graph is None else float_graph.provenance.passes
    if float_graph is None or after == FIRST_STAGE or passes.index(after) < len(done) - 1 or "quantize" not in behind:
        raise UsageError(f"'{name}.fsnn' does not hold the graph after '{after}': inspect the model that it was compiled from")
    rest = passes[len(done) : passes.index(after) + 1]
    pipeline = compiled_as(Pipeline(tuple(p for p in get(compiled.target).pipeline.passes if p.name in rest)), graph)
    return pipeline(float_graph)


def _pictures(
    graph: Graph, svg: str | os.PathLike[str] | None, chip_svg: str | os.PathLike[str] | None, painted: Callable[[Graph], bytes]
) -> dict[str, Path]:
    """Draw what was asked for; by flag where it was written. `painted` makes the picture of the graph."""
    asked = {flag: _svg_path(place) for flag, place in (("svg", svg), ("chip_svg", chip_svg)) if place is not None}
    if "chip_svg" in asked and graph.placement is None:
        raise UsageError("this graph is on no cores yet: --chip-svg draws it from pass partition on, so leave --after out")
    for flag, path in asked.items():
        replace_file(path, painted(graph) if flag == "svg" else render(utilisation(graph)))
    return asked


def _svg_path(place: str | os.PathLike[str]) -> Path:
    path = Path(place)
    if path.suffix != ".svg":
        raise UsageError(f"the picture '{path}' needs the ending .svg: that is the format it is written in")
    return path
