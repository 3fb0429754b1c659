"""From a trained model to an artefact: lower, run the target's passes, check the chip's rules, record golden vectors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import toolchain
from toolchain import artifact, codec, config
from toolchain.artifact import Artifact, Golden
from toolchain.describe import Inspection
from toolchain.errors import DesignRuleError, UsageError, unknown
from toolchain.ir import LARGEST_STEPS, Array, Graph
from toolchain.passes import FLOAT_PIPELINE, Pipeline
from toolchain.source import Model, Source, find
from toolchain.target import Executable, Result, Target, get

FLAGS = {"quantize.weight_bits": 8, "retime.mode": "exact", "inject.mode": "bias"}
"""Pass options that flags set, and the flags' defaults: a setting may replace a default, not a choice."""

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
    path = None if output is None else Path(output)
    if path is not None and path.suffix != ".fsnn":
        raise UsageError(f"the artefact '{path}' needs the ending .fsnn, by which every command knows it")
    chosen = get(target)
    if "quantize" not in {p.name for p in chosen.pipeline.passes}:
        raise UsageError(
            f"target '{target}' runs float graphs, which need no artefact: deploy the model itself, or compile for lava-sim, sim or reference"
        )
    pipeline = chosen.pipeline.with_options(**_options(weight_bits, timing, input, settings))
    seen: dict[str, Graph] = {}
    start = lowered(source, time_steps, feedback_steps)
    graph = replace(pipeline, watch=lambda name, before, after: seen.update({name: after}))(start)
    dumped = None if dump_after is None else _dump(seen, dump_after, target)
    _require_fit(chosen, graph)
    made = Artifact(
        graph=graph,
        float_graph=FLOAT_PIPELINE.until("adjoint")(start) if float_tensors else None,
        target=target,
        pipeline=str(chosen.pipeline),
        toolchain=toolchain.__version__,
        **_golden(graph),
    )
    if path is not None:
        artifact.write(made, path)
    return Compiled(made, path, dumped)


def lowered(source: Source, time_steps: int | None = None, feedback_steps: int | None = None) -> Graph:
    """The model's graph before any pass, in the model's own or the given numbers of steps."""
    from toolchain.lower import lower

    if source.module is None:
        raise UsageError(f"'{source.name}' is compiled already: without the model there are no earlier stages, so leave --after out")
    graph = lower(source.module)
    steps = {"forward": time_steps, "feedback": feedback_steps}
    for name, wanted in steps.items():
        if wanted is not None and not 1 <= wanted <= LARGEST_STEPS:
            raise UsageError(f"the {name} phase cannot have {wanted} time steps: choose 1 to {LARGEST_STEPS:,}")
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
            return _as_compiled(rest, source.artifact.graph)(graph)
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
    _require_fit(chosen, graph)
    return chosen.compile(graph)


def forward_only(graph: Graph) -> Graph:
    """`graph` without its feedback phase: inference needs no more, and a target then builds no more."""
    return msgspec.structs.replace(graph, phases=(graph.phase("forward"),))


def _require_fit(chosen: Target, graph: Graph) -> None:
    violations = chosen.check(graph)
    if violations:
        raise DesignRuleError(f"'{graph.provenance.model}' does not fit target '{chosen.name}': " + "; ".join(violations))


def _dump(seen: dict[str, Graph], name: str, target: str) -> str:
    """The graph after pass `name`, as text."""
    if name not in seen:
        raise unknown("pass", name, seen)
    return f"after {name}:\n{Inspection(seen[name], target).to_text()}"


def _options(weight_bits: int, timing: str, input: str, settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The pass options that flags and settings ask for."""
    options: dict[str, dict[str, Any]] = {"quantize": {"weight_bits": weight_bits}, "retime": {"mode": timing}, "inject": {"mode": input}}
    for name, value in config.assignments(settings).items():
        rewrite, dot, option = name.partition(".")
        if not dot:
            raise UsageError(f"setting '{name}' names no pass: write PASS.OPTION=VALUE, for example quantize.input_levels=255")
        if options.get(rewrite, {}).get(option, value) != value and options[rewrite][option] != FLAGS[f"{rewrite}.{option}"]:
            raise UsageError(f"setting '{name}={value}' contradicts the flag that says {options[rewrite][option]}: give one of the two")
        options.setdefault(rewrite, {})[option] = value
    return options


def _remaining(pipeline: Pipeline, graph: Graph) -> Pipeline | None:
    """The passes of `pipeline` that `graph` has not been through; None where it went another way."""
    names = tuple(p.name for p in pipeline.passes)
    done = graph.provenance.passes
    if names[: len(done)] != done:
        return None
    return Pipeline(pipeline.passes[len(done) :])


def _as_compiled(rest: Pipeline, compiled: Graph) -> Pipeline:
    """`rest` with the timing and the input that the artefact was compiled with, for targets that start from its float graph."""
    forward = compiled.phase("forward")
    chosen: dict[str, dict[str, Any]] = {
        "retime": {"mode": forward.timing.mode},
        "inject": {"mode": "bias" if any(d.source == "input" for d in forward.drive) else "graded"},
    }
    names = {p.name for p in rest.passes}
    return rest.with_options(**{name: options for name, options in chosen.items() if name in names})


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
        tensors |= golden_record(forward)
        if graph.has_phase("feedback"):
            driven = codec.error_drive(graph).population
            tensors["error"] = draw.normal(size=(samples, *graph.population(driven).shape)) * codec.amplitude(graph, "feedback", driven) / 4
            tensors |= golden_record(run.run(tensors["error"], phase="feedback"))
    return {"golden": Golden(samples, GOLDEN_SEED, tuple(p.name for p in graph.phases)), "golden_tensors": tensors}


def golden_record(result: Result) -> dict[str, Array]:
    """Counts, final potentials and saturations under the names an artefact keeps them by."""
    kept: dict[str, Array] = {}
    for kind in ("counts", "potentials", "saturations"):
        kept |= {f"{result.phase}.{kind}.{name}": value for name, value in getattr(result, kind).items()}
    return kept
