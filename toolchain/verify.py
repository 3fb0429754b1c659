"""Are targets identical? Every spike, every potential, every saturation, step by step, in both phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from toolchain import codec, data
from toolchain.artifact import Artifact
from toolchain.compiler import golden_record, graph_for
from toolchain.deploy import Options, available, device_of, sample_shape, started
from toolchain.errors import UsageError
from toolchain.ir import Array, Graph
from toolchain.progress import track
from toolchain.source import Model, Source, find
from toolchain.target import History, Result, Target
from toolchain.versions import versions

FORWARD_SAMPLES = 100
FEEDBACK_SAMPLES = 20
CHUNK = 20
"""Samples compared at a time: full histories are large."""

SENDING = ("couple", "linear")
"""The kinds of populations whose spikes are compared; of relays the values that they pass on."""

INSTEAD = "leave it out: --targets reference,sim"
"""What to do where a target is missing: a fallback would be compared with itself."""


@dataclass(frozen=True)
class Difference:
    """The first place where two targets part: earliest step, then population in update order, then neuron (flat index) of the sample."""

    phase: str
    population: str
    neuron: int
    step: int
    sample: int
    kind: str
    a: int | float
    b: int | float

    def to_text(self) -> str:
        return (
            f"first difference: {self.phase} phase, sample {self.sample}, population '{self.population}', neuron {self.neuron}, step {self.step}: "
            f"{self.kind} {self.a} against {self.b}"
        )


@dataclass(frozen=True)
class Pair:
    """Two targets compared; all zero means identical on everything compared."""

    a: str
    b: str
    spikes_compared: int = 0
    spike_differences: int = 0
    potential_differences: int = 0
    saturation_differences: int = 0
    first_difference: Difference | None = None

    @property
    def identical(self) -> bool:
        return not (self.spike_differences or self.potential_differences or self.saturation_differences)

    def to_json(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "first_difference"}
        first = None if self.first_difference is None else dict(vars(self.first_difference))
        return {**found, "first_difference": first}

    def plus(self, other: Pair) -> Pair:
        """Both comparisons of the same two targets together."""
        return replace(
            self,
            spikes_compared=self.spikes_compared + other.spikes_compared,
            spike_differences=self.spike_differences + other.spike_differences,
            potential_differences=self.potential_differences + other.potential_differences,
            saturation_differences=self.saturation_differences + other.saturation_differences,
            first_difference=self.first_difference or other.first_difference,
        )


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `activity` is the number of spikes seen per phase: identical silence would prove little."""

    model: str
    dataset: str
    samples: dict[str, int]
    timing: str
    pairs: tuple[Pair, ...]
    activity: dict[str, int]
    device: str
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        return all(pair.identical for pair in self.pairs)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "dataset": self.dataset,
            "samples": self.samples,
            "timing": self.timing,
            "passed": self.passed,
            "pairs": [pair.to_json() for pair in self.pairs],
            "activity": self.activity,
            "device": self.device,
            "versions": self.versions,
        }

    def to_text(self) -> str:
        what = ", ".join(f"{phase} on {n} samples ({self.activity.get(phase, 0):,} spikes)" for phase, n in self.samples.items())
        lines = [f"{self.model}, {self.timing} timing, {self.dataset}: {what}"]
        for pair in self.pairs:
            lines.append(
                f"{pair.a} = {pair.b}: " * pair.identical
                + f"{pair.a} and {pair.b} differ: " * (not pair.identical)
                + f"{pair.spike_differences:,} of {pair.spikes_compared:,} spikes, {pair.potential_differences:,} potentials and "
                f"{pair.saturation_differences:,} saturations differ"
            )
            if pair.first_difference is not None:
                lines.append(pair.first_difference.to_text())
        return "\n".join(lines)


def verify(
    model: Model,
    *,
    targets: Sequence[str] = ("reference", "sim", "lava-sim"),
    dataset: str = "mnist-1k",
    samples: int | None = None,
    phase: str = "both",
    replay: bool = False,
    data_dir: str | Path | None = None,
) -> Verification:
    """Compare `targets` with the first of them on the same samples: 100 forward and 20 feedback by default, `samples` of each where given.

    `replay` compares every target with the golden vectors in the artefact instead. Raises UsageError for targets whose graphs differ (a float
    target beside an integer one).
    """
    if phase not in ("forward", "feedback", "both"):
        raise UsageError(f"unknown phase '{phase}': choose forward, feedback or both")
    if not targets:
        raise UsageError("verify needs at least one target")
    source = find(model)
    chosen = [available(name, instead=INSTEAD) for name in targets]
    graph = _common_graph(source, chosen)
    if replay:
        return _replayed(source, chosen, graph)
    if len(chosen) < 2:
        raise UsageError("verify compares targets with each other: name at least two, or add --replay")
    forward = FORWARD_SAMPLES if samples is None else samples
    feedback = 0 if phase == "forward" or not graph.has_phase("feedback") else (FEEDBACK_SAMPLES if samples is None else samples)
    if phase == "feedback":
        forward = feedback
    if phase != "forward" and not graph.has_phase("feedback"):
        raise UsageError(f"'{source.name}' has no feedback phase: verify it with --phase forward")
    time_steps, size = sample_shape(source, dataset)
    loaded = data.load(dataset, samples=forward, data_dir=data_dir, time_steps=time_steps, image_size=size)
    return _compared(source, chosen, graph, loaded, feedback, forward_counts=phase != "feedback")


def _common_graph(source: Source, chosen: Sequence[Target]) -> Graph:
    graphs = [graph_for(source, target) for target in chosen]
    for target, graph in zip(chosen[1:], graphs[1:], strict=True):
        if graph.units != graphs[0].units or graph.phases != graphs[0].phases:
            raise UsageError(
                f"targets '{chosen[0].name}' and '{target.name}' run different graphs (floats, integers or timing), so spikes cannot be identical: use compare"
            )
    return graphs[0]


def _compared(
    source: Source, chosen: Sequence[Target], graph: Graph, loaded: data.Dataset, feedback: int, *, forward_counts: bool
) -> Verification:
    """Chunk by chunk, so that the full histories fit in memory; every target is started once."""
    from contextlib import ExitStack

    phases = ("forward", "feedback") if feedback else ("forward",)
    pairs = [Pair(chosen[0].name, other.name) for other in chosen[1:]]
    activity = dict.fromkeys(phases, 0)
    with ExitStack() as stack:
        runs = [stack.enter_context(started(source, target, Options(trace=True), phases)) for target in chosen]
        starts = range(0, len(loaded.images), CHUNK)
        for first in track(starts, f"verify {source.name}", total=len(starts)):
            images, labels = loaded.images[first : first + CHUNK], loaded.labels[first : first + CHUNK]
            results = [run.run(images) for run in runs]
            activity["forward"] += _spikes(graph, results[0])
            if forward_counts:
                pairs = [p.plus(_difference(graph, p, results[0], other, first)) for p, other in zip(pairs, results[1:], strict=True)]
            if first < feedback:
                error = codec.output_error(graph, results[0], labels)
                error[max(0, feedback - first) :] = 0
                backs = [run.run(error, phase="feedback") for run in runs]
                activity["feedback"] += _spikes(graph, backs[0])
                pairs = [p.plus(_difference(graph, p, backs[0], other, first)) for p, other in zip(pairs, backs[1:], strict=True)]
    samples = ({"forward": len(loaded.images)} if forward_counts else {}) | ({"feedback": feedback} if feedback else {})
    return Verification(
        source.name, loaded.name, samples, graph.phase("forward").timing.mode, tuple(pairs), activity, _devices(chosen), versions()
    )


def _difference(graph: Graph, pair: Pair, a: Result, b: Result, first_sample: int) -> Pair:
    """Everything two results of one phase disagree about."""
    order = [name for name in graph.phase(a.phase).order if name in a.history]
    found: list[Difference] = []
    compared = spikes = potentials = saturations = 0
    for name in order:
        one, two = a.history[name], b.history[name]
        compared += one.spikes.size if graph.population(name).kind in SENDING else 0
        spikes += int((one.spikes != two.spikes).sum())
        potentials += int((one.potentials != two.potentials).sum())
        saturations += int((a.saturations[name] != b.saturations[name]).sum())
        sent = "value" if graph.population(name).kind == "linear" else "spike"
        found += _first(a.phase, name, sent, one, two, first_sample)
        found += _first_saturation(a, b, name, first_sample)
    earliest = min(found, key=lambda d: (d.step, order.index(d.population)), default=None)
    return Pair(pair.a, pair.b, compared, spikes, potentials, saturations, earliest)


def _first(phase: str, name: str, sent: str, one: History, two: History, first_sample: int) -> list[Difference]:
    """The first difference of each kind; `sent` is what the population sends."""
    differences = []
    for kind in ("spikes", "potentials"):
        a, b = getattr(one, kind), getattr(two, kind)
        where = np.argwhere(a != b)
        if len(where):
            step, sample, *neuron = (int(i) for i in where[0])
            at = tuple(where[0])
            flat = int(np.ravel_multi_index(tuple(neuron), a.shape[2:]))
            word = sent if kind == "spikes" else "potential"
            differences.append(Difference(phase, name, flat, step + 1, first_sample + sample, word, a[at].item(), b[at].item()))
    return differences


def _first_saturation(a: Result, b: Result, name: str, first_sample: int) -> list[Difference]:
    """Saturations are counted over a phase, so they part at its end."""
    where = np.argwhere(a.saturations[name] != b.saturations[name])
    if len(where) == 0:
        return []
    at = tuple(where[0])
    flat = int(np.ravel_multi_index(at[1:], a.saturations[name].shape[1:]))
    sample = first_sample + int(at[0])
    return [
        Difference(a.phase, name, flat, a.time_steps, sample, "saturations", a.saturations[name][at].item(), b.saturations[name][at].item())
    ]


def _replayed(source: Source, chosen: Sequence[Target], graph: Graph) -> Verification:
    """Golden inputs of the artefact on every target against the counts and final potentials it carries."""
    if source.artifact is None:
        raise UsageError(f"'{source.name}' is a model, and golden vectors are in artefacts: compile it to a .fsnn file and replay that")
    golden, tensors = source.artifact.golden, source.artifact.golden_tensors
    source = _in_golden_steps(source, source.artifact)
    pairs, activity = [], dict.fromkeys(golden.phases, 0)
    for target in chosen:
        pair = Pair("golden", target.name)
        with started(source, target, Options(), golden.phases) as run:
            for phase in golden.phases:
                result = run.run(tensors["inputs"] if phase == "forward" else tensors["error"], phase=phase)
                activity[phase] = _spikes(graph, result)
                pair = pair.plus(_golden_difference(graph, pair, result, tensors))
        pairs.append(pair)
    samples = dict.fromkeys(golden.phases, golden.samples)
    return Verification(
        source.name, "golden vectors", samples, graph.phase("forward").timing.mode, tuple(pairs), activity, _devices(chosen), versions()
    )


def _in_golden_steps(source: Source, compiled: Artifact) -> Source:
    """The artefact in as many time steps as its golden vectors were run for."""
    steps = compiled.golden.time_steps
    float_graph = None if compiled.float_graph is None else compiled.float_graph.in_steps(steps)
    return replace(source, artifact=msgspec.structs.replace(compiled, graph=compiled.graph.in_steps(steps), float_graph=float_graph))


def _golden_difference(graph: Graph, pair: Pair, result: Result, tensors: dict[str, Array]) -> Pair:
    """Counts differ where some spike did; the step is the last, since golden vectors keep totals only."""
    total = Pair(pair.a, pair.b)
    for key, found in golden_record(result).items():
        _, kind, name = key.split(".", 2)
        if key not in tensors or tensors[key].shape != found.shape:
            raise UsageError(f"the artefact's golden vectors lack '{key}' in shape {found.shape}: compile it again")
        where = np.argwhere(tensors[key] != found)
        first = None
        if len(where):
            at = tuple(where[0])
            flat = int(np.ravel_multi_index(at[1:], found.shape[1:]))
            word = {"counts": "spike count", "potentials": "potential", "saturations": "saturations"}[kind]
            first = Difference(result.phase, name, flat, result.time_steps, int(at[0]), word, tensors[key][at].item(), found[at].item())
        spiking = kind == "counts"
        total = total.plus(
            Pair(
                pair.a,
                pair.b,
                found.size if spiking and graph.population(name).kind in SENDING else 0,
                len(where) if spiking else 0,
                len(where) if kind == "potentials" else 0,
                len(where) if kind == "saturations" else 0,
                first,
            )
        )
    return total


def _devices(chosen: Sequence[Target]) -> str:
    """Where the targets ran, each device once."""
    return ", ".join(dict.fromkeys(device_of(target, Options()) for target in chosen))


def _spikes(graph: Graph, result: Result) -> int:
    return sum(int(activity.sum()) for name, activity in result.activity.items() if graph.population(name).kind == "couple")
