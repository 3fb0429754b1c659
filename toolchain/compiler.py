"""From a trained model to an artefact: lower, run the target's passes, check the chip's rules, record golden vectors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import numpy as np

import toolchain
from toolchain import analysis, artifact, codec, config
from toolchain.artifact import Artifact, Golden
from toolchain.describe import Inspection
from toolchain.errors import DesignRuleError, UsageError, unknown
from toolchain.ir import LARGEST_STEPS, Array, Graph, Phase
from toolchain.notation import step_products
from toolchain.passes import FLOAT_PIPELINE, Inject, Pipeline, Retime
from toolchain.progress import say
from toolchain.source import Model, Source, find
from toolchain.target import Executable, Result, Target, get

__all__ = ["executable", "forward_only", "graph_for"]

FLAGS = {"quantize.weight_bits": 8, "retime.mode": "exact", "inject.mode": "bias", "partition.chip": "loihi2"}
"""Pass options that flags set, and the flags' defaults: a setting may replace a default, not a choice."""

FIRST_STAGE = "lower"
"""What the graph is called before any pass."""

GOLDEN_SEED = 0
GOLDEN_SAMPLES = 16
GOLDEN_WORK = 2**36
"""Products that a phase's golden vectors may take: large nets get fewer samples, at least 1, and then fewer time steps."""
REFERENCE_WORK = 2**31
"""Above this many the simulator computes them: it is bit-exact with the reference, and many times as fast."""
NEURON_WORK = 100
"""A neuron's time step takes about as long as so many products."""


@dataclass(frozen=True)
class Compiled:
    """What `compile` made, and where it wrote it. `dumped` is the graph after pass `dump_after`."""

    artifact: Artifact
    output: Path | None
    dumped: Inspection | None = None

    @property
    def graph(self) -> Graph:
        return self.artifact.graph

    def to_json(self) -> dict[str, Any]:
        dumped = {} if self.dumped is None else {"dumped": self.dumped.to_json()}
        output = None if self.output is None else str(self.output)
        return {"output": output, **Inspection(self.graph, self.artifact.target).to_json(), **dumped}

    def to_text(self) -> str:
        lines = [] if self.dumped is None else [f"after {self.dumped.stage}:", self.dumped.to_text(), ""]
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
    calibrate: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    settings: Sequence[str] = (),
    dump_after: str | None = None,
    float_tensors: bool = True,
    output: str | os.PathLike[str] | None = None,
) -> Compiled:
    """Compile `model` (zoo name, run folder, checkpoint or module) for an integer `target`.

    A network of the catalogue without trained weights is compiled with random ones, and the graph's notes say so. `time_steps` and `feedback_steps`
    default to the model's own. `calibrate` names a data set whose training samples say how far potentials and
    currents go; without it they get room for the worst case. `settings` are `pass.option=value` for the target's passes.
    `dump_after` keeps the graph after that pass, or after "lower". `float_tensors=False` leaves the folded float graph out, so target torch cannot run
    the artefact. With `output` the artefact is written there.
    Raises UsageError for a bad option, DesignRuleError (all violations at once) where the graph does not fit.
    """
    source, notes = uncompiled(model)
    if source.module is None:
        raise UsageError(f"'{source.name}' is compiled already: give compile the model it was made of")
    path = None if output is None else Path(output)
    if path is not None and path.suffix != ".fsnn":
        raise UsageError(f"the artefact '{path}' needs the ending .fsnn, by which every command knows it")
    chosen = get(target)
    if "quantize" not in {p.name for p in chosen.pipeline.passes}:
        raise UsageError(
            f"target '{target}' runs float graphs, which need no artefact: deploy the model itself, or compile for lava-sim, sim or reference"
        )
    pipeline = chosen.pipeline.with_options(**_options(weight_bits, timing, input, chip, settings, chosen.pipeline))
    if dump_after is not None:
        until(pipeline, dump_after)  # an unknown pass is refused before any work
    start = lowered(source, time_steps, feedback_steps, notes)
    if calibrate is not None:
        pipeline = analysis.calibrated(pipeline, start, calibrate, data_dir=data_dir)
    kept = {FIRST_STAGE: start}
    wanted = {dump_after, "adjoint"}

    def keep(name: str, before: Graph, after: Graph) -> None:
        if name in wanted:
            kept[name] = after

    graph = replace(pipeline, watch=keep)(start)
    made = assembled(target, _folded(start, kept.get("adjoint")), graph, float_tensors=float_tensors)
    if path is not None:
        artifact.write(made, path)
    return Compiled(made, path, None if dump_after is None else Inspection(kept[dump_after], target))


def assembled(target: str, folded: Graph, graph: Graph, *, float_tensors: bool = True, warn: bool = True) -> Artifact:
    """The artefact of `graph`, which the passes of `target` made of `folded`, with golden vectors; with `warn`, warnings about its loops go to stderr.

    DesignRuleError, with every violation, where the graph does not fit.
    """
    chosen = get(target)
    _require_fit(chosen, graph)
    golden, golden_tensors = golden_vectors(graph)
    for warning in analysis.contraction(folded, graph).warnings if warn else ():
        say(f"toolchain: {warning}")
    return Artifact(
        graph=graph,
        float_graph=folded if float_tensors else None,
        target=target,
        pipeline=str(chosen.pipeline),
        toolchain=toolchain.__version__,
        golden=golden,
        golden_tensors=golden_tensors,
    )


def uncompiled(model: Model) -> tuple[Source, tuple[str, ...]]:
    """What `model` names, and what a person should know of it; unlike `source.find` also a network of the catalogue that nobody has trained."""
    from toolchain import models

    if not isinstance(model, str) or model not in models.names() or models.get(model).shipped:
        return find(model), ()
    return Source(model, models.get(model).build().eval(), None), (
        f"no trained weights are shipped for '{model}': these are random (seed 0)",
    )


def lowered(source: Source, time_steps: int | None = None, feedback_steps: int | None = None, notes: tuple[str, ...] = ()) -> Graph:
    """The model's graph before any pass, in the model's own or the given numbers of steps, with `notes`."""
    from toolchain.lower import lower

    if source.module is None:
        raise UsageError(f"'{source.name}' is compiled already, and no earlier stages are in it: give the model that it was made of")
    wanted = {"forward": time_steps, "feedback": feedback_steps}
    for name, steps in wanted.items():
        if steps is not None and not 1 <= steps <= LARGEST_STEPS:
            raise UsageError(f"the {name} phase cannot have {steps} time steps: choose 1 to {LARGEST_STEPS:,}")
    graph = lower(source.module).in_steps({name: steps for name, steps in wanted.items() if steps is not None})
    return msgspec.structs.replace(graph, provenance=msgspec.structs.replace(graph.provenance, notes=(*graph.provenance.notes, *notes)))


def until(pipeline: Pipeline, name: str) -> Pipeline:
    """The passes of `pipeline` up to and including `name`, none for "lower"; UsageError lists the known names."""
    names = [p.name for p in pipeline.passes]
    if name not in (FIRST_STAGE, *names):
        raise unknown("pass", name, [FIRST_STAGE, *names])
    return Pipeline(()) if name == FIRST_STAGE else pipeline.until(name)


def graph_for(source: Source, chosen: Target) -> Graph:
    """The graph that `chosen` runs: of the artefact, or compiled from the module with the defaults."""
    if source.artifact is None:
        return chosen.pipeline(lowered(source))
    candidates = [g for g in (source.artifact.graph, source.artifact.float_graph) if g is not None]
    for graph in candidates:
        rest = _remaining(chosen.pipeline, graph)
        if rest is not None:
            return compiled_as(rest, source.artifact.graph)(graph)
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


def _folded(start: Graph, adjoint: Graph | None) -> Graph:
    """The float graph that an artefact keeps: that of the target's own pipeline where it begins as every float one does."""
    rest = FLOAT_PIPELINE.until("adjoint")
    if adjoint is not None and adjoint.provenance.passes == tuple(p.name for p in rest.passes):
        return adjoint
    return rest(start)


def _options(
    weight_bits: int, timing: str, input: str, chip: str, settings: Sequence[str], pipeline: Pipeline
) -> dict[str, dict[str, Any]]:
    """The pass options that flags and settings ask for."""
    for flag, asked, chosen in (("timing", timing, Retime), ("input", input, Inject)):
        known = get_args(get_type_hints(chosen)["mode"])
        if asked not in known:
            raise unknown(flag, asked, known)
    options: dict[str, dict[str, Any]] = {"quantize": {"weight_bits": weight_bits}, "retime": {"mode": timing}, "inject": {"mode": input}}
    if "partition" in {p.name for p in pipeline.passes}:
        options["partition"] = {"chip": chip}
    elif chip != "loihi2":
        raise UsageError(f"--chip {chip} chooses limits for pass partition, which this target does not run: leave it out")
    for name, value in config.assignments(settings).items():
        rewrite, dot, option = name.partition(".")
        if not dot:
            raise UsageError(f"setting '{name}' names no pass: write PASS.OPTION=VALUE, for example quantize.input_levels=255")
        said: Any = options.get(rewrite, {}).get(option)
        if said is not None and said != value and said != FLAGS[name]:
            raise UsageError(f"setting '{name}={value}' contradicts the flag that says {said}: give one of the two")
        options.setdefault(rewrite, {})[option] = value
    return options


def _remaining(pipeline: Pipeline, graph: Graph) -> Pipeline | None:
    """The passes of `pipeline` that `graph` has not been through; None where it went another way."""
    names = tuple(p.name for p in pipeline.passes)
    done = graph.provenance.passes
    if names[: len(done)] != done:
        return None
    return Pipeline(pipeline.passes[len(done) :])


def compiled_as(rest: Pipeline, compiled: Graph) -> Pipeline:
    """`rest` with what the artefact was compiled with, for targets that start from its float graph: timing, input and its levels, calibration, chip.

    Weight bits are not among it, which each tensor of the artefact shows only as a bound, nor is `partition.split`, which a placement does not say.
    """
    forward = compiled.phase("forward")
    chosen: dict[str, dict[str, Any]] = {
        "retime": {"mode": forward.timing.mode},
        "inject": {"mode": "bias" if any(d.source == "input" for d in forward.drive) else "graded"},
    }
    if compiled.integer:
        levels = round(compiled.scale("forward", compiled.of_kind("input")[0].name))
        chosen["quantize"] = {"input_levels": levels, "calibration": compiled.provenance.calibration}
    if compiled.placement is not None:
        chosen["partition"] = {"chip": compiled.placement.chip}
    names = {p.name for p in rest.passes}
    return rest.with_options(**{name: options for name, options in chosen.items() if name in names})


def golden_vectors(graph: Graph) -> tuple[Golden, dict[str, Array]]:
    """Seeded inputs and what they become: what any target must compute again.

    The numbers are the reference's. Where it would take long, `sim` computes them, which is bit-exact with it, and where that would take long too, each
    phase runs its first time steps only; `Golden.time_steps` says how many.
    """
    samples, steps = _golden_size(graph)
    short = graph.in_steps(steps)
    draw = np.random.default_rng(GOLDEN_SEED)
    population = graph.of_kind("input")[0]
    shape = (samples, *population.shape, *(short.phase("forward").time_steps,) * population.events)
    inputs = draw.integers(0, 256, shape) / 255 * (draw.random(shape) < 0.3)
    tensors: dict[str, Array] = {"inputs": inputs}
    with _golden_target(short, samples).compile(short) as run:
        tensors |= golden_record(run.run(inputs))
        if graph.has_phase("feedback"):
            driven = graph.population(codec.error_drive(graph).population)
            tensors["error"] = draw.uniform(-1, 1, (samples, *driven.shape)) * codec.error_bound(graph)
            tensors |= golden_record(run.run(tensors["error"], phase="feedback"))
    return Golden(samples, GOLDEN_SEED, tuple(steps), steps), {name: _narrow(tensor) for name, tensor in tensors.items()}


def _golden_size(graph: Graph) -> tuple[int, dict[str, int]]:
    """How many golden samples, and how many time steps of each phase."""
    whole = sum(_work(graph, phase) * phase.time_steps for phase in graph.phases)
    samples = max(1, min(GOLDEN_SAMPLES, GOLDEN_WORK // whole))
    return samples, {phase.name: _golden_steps(graph, phase, samples) for phase in graph.phases}


def _golden_steps(graph: Graph, phase: Phase, samples: int) -> int:
    """At least as many as all biases need to start."""
    least = 1 + max((bias.start for several in phase.bias.values() for bias in several), default=0)
    return max(least, min(phase.time_steps, GOLDEN_WORK // (samples * _work(graph, phase))))


def _work(graph: Graph, phase: Phase) -> int:
    """What a time step of one sample takes, in products."""
    return step_products(graph, phase) + NEURON_WORK * sum(prod(graph.population(name).shape) for name in phase.order)


def _golden_target(graph: Graph, samples: int) -> Target:
    work = samples * sum(_work(graph, phase) * phase.time_steps for phase in graph.phases)
    return replace(get("sim"), device="cpu") if work > REFERENCE_WORK else get("reference")  # type: ignore[type-var]  # a target is a dataclass


def _narrow(tensor: Array) -> Array:
    """Whole numbers in the narrowest type that holds them."""
    if np.issubdtype(tensor.dtype, np.signedinteger):
        for kind in (np.int8, np.int16, np.int32):
            if np.iinfo(kind).min <= tensor.min() and tensor.max() <= np.iinfo(kind).max:
                return tensor.astype(kind)
    return tensor


def golden_record(result: Result) -> dict[str, Array]:
    """Counts, final potentials and saturations under the names an artefact keeps them by."""
    kept: dict[str, Array] = {}
    for kind in ("counts", "potentials", "saturations"):
        kept |= {f"{result.phase}.{kind}.{name}": value for name, value in getattr(result, kind).items()}
    return kept
