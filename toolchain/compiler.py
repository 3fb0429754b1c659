"""From a trained model to an artefact: lower, run the target's passes, check the chip's rules, record golden vectors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import toolchain
from toolchain import artifact, codec, config
from toolchain.artifact import Artifact, Golden
from toolchain.describe import Inspection
from toolchain.errors import DesignRuleError, UsageError
from toolchain.ir import Array, Graph
from toolchain.passes import FLOAT_PIPELINE, Pipeline
from toolchain.source import Model, Source, find
from toolchain.target import Executable, Target, get

GOLDEN_SEED = 0
GOLDEN_SAMPLES = 4
GOLDEN_SPIKE_BUDGET = 2**24
"""Neurons times steps times samples; large nets get fewer golden samples, at least 1."""


@dataclass(frozen=True)
class Compiled:
    """What `compile` made, and where it wrote it. `dumped` is the graph after `dump_after`, as text."""

    artifact: Artifact
    output: Path | None
    dumped: str | None = None

    @property
    def graph(self) -> Graph:
        return self.artifact.graph

    def to_json(self) -> dict[str, Any]:
        return {"output": None if self.output is None else str(self.output), **Inspection(self.graph, self.artifact.target).to_json()}

    def to_text(self) -> str:
        lines = [self.dumped] if self.dumped else []
        lines.append(Inspection(self.graph, self.artifact.target).to_text())
        if self.output is not None:
            lines.append(f"wrote {self.output} ({self.output.stat().st_size:,} bytes)")
        return "\n".join(lines)


def compile(
    model: Model,
    *,
    target: str = "lava-sim",
    chip: str = "loihi2",
    weight_bits: int = 8,
    time_steps: int | None = None,
    feedback_steps: int | None = None,
    timing: str = "exact",
    input: str = "bias",
    settings: Sequence[str] = (),
    dump_after: str | None = None,
    float_tensors: bool = True,
    output: str | os.PathLike[str] | None = None,
) -> Compiled:
    """Compile `model` (zoo name, run folder, checkpoint or module) for an integer `target`.

    `time_steps` and `feedback_steps` default to the model's own. `settings` are `pass.option=value` for the target's passes. `float_tensors=False`
    leaves the folded float graph out, so target torch cannot run the artefact. With `output` the artefact is written there.
    Raises UsageError for a bad option, DesignRuleError (all violations at once) where the graph does not fit.
    """
    source = find(model)
    if source.module is None:
        raise UsageError(f"'{source.name}' is compiled already: give compile the model it was made of")
    _only("chip", chip, "loihi2")
    chosen = get(target)
    options = _options(weight_bits, timing, input, settings)
    graph, float_graph = _build(source, chosen, options, time_steps, feedback_steps)
    dumped = None
    if dump_after is not None:
        dumped = describe_after(source, chosen, options, dump_after, time_steps, feedback_steps)
    made = Artifact(
        graph=graph,
        float_graph=float_graph if float_tensors else None,
        target=target,
        pipeline=str(chosen.pipeline),
        toolchain=toolchain.__version__,
        **_golden(graph),
    )
    path = None if output is None else Path(output)
    if path is not None:
        if path.suffix != ".fsnn":
            raise UsageError(f"the artefact '{path}' needs the ending .fsnn, by which every command knows it")
        artifact.write(made, path)
    return Compiled(made, path, dumped)


def lowered(source: Source, time_steps: int | None = None, feedback_steps: int | None = None) -> Graph:
    """The model's graph before any pass, in the model's own or the given numbers of steps."""
    from toolchain.lower import lower

    if source.module is None:
        raise UsageError(f"'{source.name}' is an artefact: only a model can be lowered")
    graph = lower(source.module)
    steps = {"forward": time_steps, "feedback": feedback_steps}
    for name, wanted in steps.items():
        if wanted is not None and not 1 <= wanted <= 100_000:
            raise UsageError(f"the {name} phase cannot have {wanted} time steps: choose 1 to 100,000")
    phases = tuple(msgspec.structs.replace(p, time_steps=steps[p.name] or p.time_steps) for p in graph.phases)
    return msgspec.structs.replace(graph, phases=phases)


def graph_for(source: Source, chosen: Target) -> Graph:
    """The graph that `chosen` runs: of the artefact, or compiled from the module with the defaults."""
    if source.artifact is None:
        return chosen.pipeline(lowered(source))
    candidates = [g for g in (source.artifact.graph, source.artifact.float_graph) if g is not None]
    for graph in candidates:
        rest = _remaining(chosen.pipeline, graph)
        if rest is not None:
            return rest(graph)
    if source.artifact.float_graph is None:
        raise UsageError(
            f"'{source.name}' was compiled without its float tensors, which target '{chosen.name}' needs: compile it again without --no-float"
        )
    raise UsageError(
        f"'{source.name}' was compiled by {source.artifact.pipeline}, but target '{chosen.name}' needs {chosen.pipeline}: compile the model for it"
    )


def executable(chosen: Target, graph: Graph) -> Executable:
    """Check and compile `graph`; UsageError where the target is missing here, DesignRuleError with every violation where it does not fit."""
    missing = chosen.available()
    if missing is not None:
        raise UsageError(missing)
    violations = chosen.check(graph)
    if violations:
        raise DesignRuleError(f"'{graph.provenance.model}' does not fit target '{chosen.name}': " + "; ".join(violations))
    return chosen.compile(graph)


def forward_only(graph: Graph) -> Graph:
    """`graph` without its feedback phase: inference needs no more, and a target then builds no more."""
    return msgspec.structs.replace(graph, phases=(graph.phase("forward"),))


def describe_after(
    source: Source,
    chosen: Target,
    options: dict[str, dict[str, Any]],
    name: str,
    time_steps: int | None = None,
    feedback_steps: int | None = None,
) -> str:
    """The graph after pass `name`, as text."""
    graph = chosen.pipeline.with_options(**options).until(name)(lowered(source, time_steps, feedback_steps))
    return f"after {name}:\n{Inspection(graph, chosen.name).to_text()}"


def _build(
    source: Source, chosen: Target, options: dict[str, dict[str, Any]], time_steps: int | None, feedback_steps: int | None
) -> tuple[Graph, Graph]:
    start = lowered(source, time_steps, feedback_steps)
    graph = chosen.pipeline.with_options(**options)(start)
    if not graph.integer:
        raise UsageError(
            f"target '{chosen.name}' runs float graphs, which need no artefact: deploy the model itself, or compile for lava-sim, sim or reference"
        )
    violations = chosen.check(graph)
    if violations:
        raise DesignRuleError(f"'{source.name}' does not fit target '{chosen.name}': " + "; ".join(violations))
    return graph, FLOAT_PIPELINE.until("adjoint")(start)


def _options(weight_bits: int, timing: str, input: str, settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The pass options that flags and settings ask for."""
    options: dict[str, dict[str, Any]] = {"quantize": {"weight_bits": weight_bits}, "retime": {"mode": timing}, "inject": {"mode": input}}
    for name, value in config.assignments(settings).items():
        rewrite, dot, option = name.partition(".")
        if not dot:
            raise UsageError(f"setting '{name}' names no pass: write PASS.OPTION=VALUE, for example quantize.input_levels=255")
        options.setdefault(rewrite, {})[option] = value
    return options


def _remaining(pipeline: Pipeline, graph: Graph) -> Pipeline | None:
    """The passes of `pipeline` that `graph` has not been through; None where it went another way."""
    names = tuple(p.name for p in pipeline.passes)
    done = graph.provenance.passes
    if names[: len(done)] != done:
        return None
    return Pipeline(pipeline.passes[len(done) :])


def _only(flag: str, value: str, known: str) -> None:
    if value != known:
        raise UsageError(f"--{flag} {value} is not part of this version: use {known}")


def _golden(graph: Graph) -> dict[str, Any]:
    """Seeded inputs through the reference: what any target must compute again."""
    from toolchain.targets.reference import REFERENCE

    steps = sum(phase.time_steps for phase in graph.phases)
    neurons = sum(prod(population.shape) for population in graph.populations)
    samples = max(1, min(GOLDEN_SAMPLES, GOLDEN_SPIKE_BUDGET // (neurons * steps)))
    draw = np.random.default_rng(GOLDEN_SEED)
    shape = (samples, *graph.of_kind("input")[0].shape)
    inputs = draw.integers(0, 256, shape) / 255 * (draw.random(shape) < 0.3)
    tensors: dict[str, Array] = {"inputs": inputs}
    with REFERENCE.compile(graph) as run:
        forward = run.run(inputs)
        tensors |= golden_record("forward", forward.counts, forward.potentials)
        if graph.has_phase("feedback"):
            driven = codec.error_drive(graph).population
            tensors["error"] = draw.normal(size=(samples, *graph.population(driven).shape)) * codec.amplitude(graph, "feedback", driven) / 4
            feedback = run.run(tensors["error"], phase="feedback")
            tensors |= golden_record("feedback", feedback.counts, feedback.potentials)
    return {"golden": Golden(samples, GOLDEN_SEED, tuple(p.name for p in graph.phases)), "golden_tensors": tensors}


def golden_record(phase: str, counts: dict[str, Any], potentials: dict[str, Array]) -> dict[str, Array]:
    """Counts and final potentials under the names an artefact keeps them by."""
    kept = {f"{phase}.counts.{name}": value for name, value in counts.items()}
    return kept | {f"{phase}.potentials.{name}": value for name, value in potentials.items()}
