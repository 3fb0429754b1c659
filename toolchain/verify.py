"""Are targets identical? Every spike, every potential, every saturation, step by step, in both phases; on images, on probes, and on variants (docs/verify.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from toolchain import codec, data, probing
from toolchain.artifact import Artifact
from toolchain.compiler import executable, forward_only, graph_for
from toolchain.coverage import GATE_STATES, Counter, Coverage
from toolchain.deploy import Options, available, configure, device_of, sample_shape
from toolchain.differences import Difference, Pair, Samples, compared, total_of
from toolchain.errors import DesignRuleError, UsageError
from toolchain.ir import Array, Graph
from toolchain.notation import sample_products, table
from toolchain.probing import Variant
from toolchain.progress import track
from toolchain.source import Model, Source, find
from toolchain.target import Executable, Result, Target, get
from toolchain.versions import versions

FORWARD_SAMPLES = 100
FEEDBACK_SAMPLES = 20
PROBES = 16
PROBES_WORK = 2**38
"""Products that the probes may take in all where nobody says how many: of large networks fewer are run, at least `FEWEST_PROBES`."""

FEWEST_PROBES = 4

CHUNK = 20
HISTORY_BYTES = 2**31
"""At most `CHUNK` images are compared at a time, and fewer where the histories of all targets would take more memory than this."""

IMAGE = "image"

INSTEAD = "leave it out: --targets reference,sim"
"""What to do where a target is missing: a fallback would be compared with itself."""

LARGEST_JUDGEMENT = 2**32
"""Products up to which the definition is run again on the sample of a first difference, to say which target is right."""


@dataclass(frozen=True)
class VariantFound:
    """What one variant of the network showed. `not_run` says why a target did not run it."""

    variant: Variant
    pairs: tuple[Pair, ...]
    not_run: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.variant.name,
            "samples": len(self.variant.inputs),
            "time_steps": {phase.name: phase.time_steps for phase in self.variant.graph.phases},
            "pairs": [pair.to_json() for pair in self.pairs],
            "not_run": self.not_run,
        }

    def to_text(self) -> str:
        lines = [f"{self.variant.to_text()}, {len(self.variant.inputs)} probes"]
        lines += [f"  {line}" for pair in self.pairs for line in pair.to_text().splitlines()]
        return "\n".join([*lines, *(f"  not run on {target}: {reason}" for target, reason in self.not_run.items())])


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `samples` are images by phase, `probes` the probing inputs, each in every phase compared; `pairs` cover both, `variants` stand apart.
    `activity` is the number of spikes seen per phase: identical silence would prove little. `coverage` is None for a replay; `fewer_probes`: the network is large."""

    model: str
    dataset: str
    samples: dict[str, int]
    timing: str
    pairs: tuple[Pair, ...]
    activity: dict[str, int]
    device: str
    versions: dict[str, str]
    probes: int = 0
    variants: tuple[VariantFound, ...] = ()
    coverage: Coverage | None = None
    fewer_probes: bool = False

    @property
    def passed(self) -> bool:
        return all(pair.identical for pair in self._all_pairs)

    @property
    def first_difference(self) -> Difference | None:
        """The first difference of the first pair that has one; of a variant only where the network itself shows none."""
        return next((pair.first_difference for pair in self._all_pairs if pair.first_difference is not None), None)

    @property
    def _all_pairs(self) -> tuple[Pair, ...]:
        return (*self.pairs, *(pair for found in self.variants for pair in found.pairs))

    def to_json(self) -> dict[str, Any]:
        first = self.first_difference
        return {
            "model": self.model,
            "dataset": self.dataset,
            "samples": self.samples,
            "probes": self.probes,
            "timing": self.timing,
            "passed": self.passed,
            "pairs": [pair.to_json() for pair in self.pairs],
            "variants": [found.to_json() for found in self.variants],
            "first_difference": None if first is None else first.to_json(),
            "coverage": None if self.coverage is None else self.coverage.to_json(),
            "activity": self.activity,
            "device": self.device,
            "versions": self.versions,
        }

    def to_text(self) -> str:
        what = ", ".join(f"{phase} on {n} samples ({self.activity.get(phase, 0):,} spikes)" for phase, n in self.samples.items())
        probes = f", and {self.probes} probes" if self.probes else ""
        probes += f" (fewer than {PROBES}, since the network is large)" if self.fewer_probes else ""
        lines = [f"{self.model}, {self.timing} timing, {self.dataset}: {what}{probes}"]
        lines += [pair.to_text() for pair in self.pairs]
        lines += [found.to_text() for found in self.variants]
        return "\n".join([*lines, *([] if self.coverage is None else coverage_text(self.coverage))])


def coverage_text(coverage: Coverage) -> list[str]:
    """Which share of the weights was exercised, in all and by connection."""
    stages = list(coverage.rows[0].exercised) if coverage.rows else []
    of = coverage.total(coverage.last)[1]
    parts = ", ".join(f"{_percent(coverage.total(stage)[0], of)} with {stage}" for stage in stages)
    apart = sum(row.weights - row.reachable for row in coverage.rows)
    lines = [
        f"weights exercised, of {of:,} (each counted in both phases): {parts}" + (f"; {apart:,} more meet no value ever" if apart else "")
    ]
    cells = [
        [row.phase, row.where, row.tensor, f"{row.reachable:,}", *(_percent(row.exercised[stage], row.reachable) for stage in stages)]
        for row in coverage.rows
    ]
    lines += [f"  {line}" for line in table(["phase", "connection", "tensor", "weights", *stages], cells, left=3)]
    if any(row.where.startswith("host") for row in coverage.rows):
        lines.append("  (of the host: a weight counts where its last place, one up and one down, changes a rounded current)")
    if coverage.thresholds:
        lines.append(f"thresholds met exactly and missed by one: {coverage.thresholds_met} of {coverage.thresholds}")
    if coverage.gates:
        whole = sum(len(states) == len(GATE_STATES) for states in coverage.gates.values())
        never = [f"'{name}' was never {state}" for name, states in coverage.gates.items() for state in GATE_STATES if state not in states]
        lines.append(f"gates that spikes met {', '.join(GATE_STATES[:-1])} and {GATE_STATES[-1]}: {whole} of {len(coverage.gates)}")
        lines += [f"  {sentence}" for sentence in never]
    if not coverage.saturations:
        lines.append("no potential saturated, so how targets hold them to 24 bit was not compared")
    return lines


def _percent(part: int, whole: int) -> str:
    """Never 100 % where one is missing."""
    if not whole:
        return "-"
    return "100 %" if part == whole else f"{min(100 * part / whole, 99.99):.2f} %"


def verify(
    model: Model,
    *,
    targets: Sequence[str] = ("reference", "sim", "lava-sim"),
    dataset: str = "mnist-1k",
    samples: int | None = None,
    phase: str = "both",
    probes: int | None = None,
    replay: bool = False,
    data_dir: str | Path | None = None,
) -> Verification:
    """Compare `targets` with the first of them on the same samples: 100 images forward and 20 feedback by default, `samples` of each where given.

    `probes` seeded inputs and errors are added (16 by default, of large networks fewer), and as many to each of two variants of the network, so that weights count that
    no image exercises (0: images only); `coverage` says how many did. `replay` compares every target with the golden vectors in the artefact instead. Raises UsageError
    for targets whose graphs differ, for float targets, for one that is named twice, and for a first target that lacks a phase.
    """
    if phase not in ("forward", "feedback", "both"):
        raise UsageError(f"unknown phase '{phase}': choose forward, feedback or both")
    if not targets:
        raise UsageError("verify needs at least one target")
    if probes is not None and not 0 <= probes <= 10_000:
        raise UsageError(f"{probes} probes are asked for: give 0 to 10,000")
    source = find(model)
    chosen = [available(name, instead=INSTEAD) for name in targets]
    graph = _common_graph(source, chosen)
    for name in targets:
        if list(targets).count(name) > 1:
            raise UsageError(f"target '{name}' is named twice, and with itself it agrees: name each target once")
    if replay:
        return _replayed(source, chosen, graph)
    if len(chosen) < 2:
        raise UsageError("verify compares targets with each other: name at least two, or add --replay")
    if phase != "forward" and not graph.has_phase("feedback"):
        if phase == "feedback":
            raise UsageError(f"'{source.name}' has no feedback phase: verify it with --phase forward")
        phase = "forward"
    forward = FORWARD_SAMPLES if samples is None else samples
    feedback = 0 if phase == "forward" else (FEEDBACK_SAMPLES if samples is None else samples)
    if phase == "feedback":
        forward = feedback
    time_steps, size = sample_shape(source, dataset)
    loaded = data.load(dataset, samples=forward, data_dir=data_dir, time_steps=time_steps, image_size=size)
    phases = {"forward": ("forward",), "feedback": ("feedback",), "both": ("forward", "feedback")}[phase]
    return _Session(source, chosen, graph if feedback else forward_only(graph), phases, probes).run(loaded, feedback)


def _common_graph(source: Source, chosen: Sequence[Target]) -> Graph:
    graphs = [graph_for(source, target) for target in chosen]
    for target, graph in zip(chosen, graphs, strict=True):
        if graph.units != graphs[0].units or graph.phases != graphs[0].phases:
            raise UsageError(
                f"targets '{chosen[0].name}' and '{target.name}' run different graphs (floats, integers or timing), so spikes cannot be identical: use compare"
            )
    if not graphs[0].integer:
        raise UsageError(
            f"target '{chosen[0].name}' computes in floats, whose sums depend on their order, so spikes need not be identical: use compare"
        )
    return graphs[0]


class _Running(NamedTuple):
    """A target at work."""

    name: str
    run: Executable


class _Session:
    """One verification: the targets, the phases that are compared, and what was seen so far."""

    def __init__(self, source: Source, chosen: Sequence[Target], graph: Graph, phases: tuple[str, ...], probes: int | None) -> None:
        self._source, self._chosen, self._graph, self._phases = source, chosen, graph, phases
        allowed = max(FEWEST_PROBES, min(PROBES, PROBES_WORK // sample_products(graph)))
        self._probes = allowed if probes is None else probes
        self._fewer = probes is None and allowed < PROBES
        self._lacks = {} if phases == ("forward",) else _without_feedback(chosen, graph)
        if self._lacks and (phases == ("feedback",) or chosen[0].name in self._lacks):
            target, reason = next(iter(self._lacks.items()))
            raise UsageError(
                f"target '{target}' cannot be compared in the feedback phase ({reason}): add --phase forward, or name it after one that can"
            )
        self._activity = dict.fromkeys(phases, 0)
        self._counter = Counter(graph, phases)
        self._silent: probing.Silent = {}

    def run(self, loaded: data.Dataset, feedback: int) -> Verification:
        """Chunk by chunk, so that the full histories fit in memory; every target is started once for the network and once for each variant."""
        with ExitStack() as stack:
            running = [stack.enter_context(self._started(target, self._graph)) for target in self._chosen]
            pairs = [Pair(running[0].name, other.name, not_compared=self._lacking(other.name)) for other in running[1:]]
            size = self._at_a_time(self._graph)
            starts = range(0, len(loaded.images), size)
            for first in track(starts, f"verify {self._source.name}", total=len(starts)):
                part = slice(first, first + size)
                labels = loaded.labels[part] if first < feedback else None
                pairs = self._chunk(
                    self._graph, pairs, running, loaded.images[part], Samples(IMAGE, first), labels=labels, kept=feedback - first
                )
            self._counter.mark("images")
            if self._probes:
                given = probing.inputs(self._graph, self._probes, self._silent)
                half = max(1, self._probes // 2)  # at least two runs: what a target keeps of the one before shows in the other
                pairs = self._chunks(self._graph, pairs, running, given, self._errors(self._graph), "probe", half)
                self._counter.mark("probes")
        variants, thresholds = self._variants() if self._probes else ((), (0, 0))
        return Verification(
            self._source.name,
            loaded.name,
            {name: len(loaded.images) if name == "forward" else feedback for name in self._phases},
            self._graph.phase("forward").timing.mode,
            tuple(pairs),
            self._activity,
            _devices(self._chosen),
            versions(),
            self._probes,
            variants,
            self._counter.found(*thresholds),
            self._fewer,
        )

    def _at_a_time(self, graph: Graph, most: int = CHUNK) -> int:
        """Up to `most` samples whose spikes (int8) and potentials (int64) of every step, on every target, fit in memory; relays send int64."""
        sent = {"couple": 1, "readout": 1, "linear": 8}
        steps = [(population, phase.time_steps) for phase in graph.phases for population in map(graph.population, phase.order)]
        each = sum(prod(p.shape) * count * (8 + sent[p.kind]) for p, count in steps if p.kind != "input")
        return max(1, min(most, HISTORY_BYTES // (len(self._chosen) * each)))

    def _errors(self, graph: Graph) -> Array | None:
        return probing.errors(graph, self._probes) if "feedback" in self._phases else None

    def _lacking(self, target: str) -> tuple[str, ...]:
        return (f"'{target}' has no feedback phase here ({self._lacks[target]})",) if target in self._lacks else ()

    @contextmanager
    def _started(self, target: Target, graph: Graph) -> Iterator[_Running]:
        """With every step's history where the target can keep one."""
        keeps = "trace" in getattr(target, "__dataclass_fields__", {})
        wanted = forward_only(graph) if target.name in self._lacks else graph
        with executable(configure(target, Options(trace=keeps)), wanted) as run:
            yield _Running(target.name, run)

    def _chunks(
        self, graph: Graph, pairs: list[Pair], running: Sequence[_Running], inputs: Array, wrong: Array | None, name: str, most: int
    ) -> list[Pair]:
        size = self._at_a_time(graph, most)
        for first in range(0, len(inputs), size):
            part = slice(first, first + size)
            pairs = self._chunk(graph, pairs, running, inputs[part], Samples(name, first), wrong=None if wrong is None else wrong[part])
        return pairs

    def _chunk(
        self,
        graph: Graph,
        pairs: Sequence[Pair],
        running: Sequence[_Running],
        inputs: Array,
        samples: Samples,
        *,
        wrong: Array | None = None,
        labels: Array | None = None,
        kept: int = 0,
    ) -> list[Pair]:
        """`pairs` with what some samples show: forward, and in the feedback phase where there are errors `wrong`, or `labels` that they follow from (of the first `kept`
        samples, the others' are 0)."""
        found = list(pairs)
        results = [on.run.run(inputs) for on in running]
        forward = results[0]
        if labels is not None:
            wrong = codec.output_error(graph, forward, labels)
            wrong[max(0, kept) :] = 0
        for name, mask in probing.silent(graph, forward).items():
            self._silent[name] = self._silent.get(name, np.True_) & mask
        case = _Case(graph, inputs, wrong, samples)
        if "forward" in self._phases:
            found = self._compared(case, found, forward, results[1:], forward)
        if wrong is not None:
            backs = [None if on.name in self._lacks else on.run.run(wrong, phase="feedback") for on in running]
            assert backs[0] is not None  # targets without the phase never come first
            found = self._compared(case, found, backs[0], backs[1:], forward)
        return found

    def _compared(self, case: _Case, pairs: list[Pair], base: Result, others: Sequence[Result | None], forward: Result) -> list[Pair]:
        """Compare one phase of every other target with the first one's, and count what it exercised."""
        if case.samples.inputs == IMAGE:
            self._activity[base.phase] += _spikes(case.graph, base)
        found, seen = [], set()
        for pair, other in zip(pairs, others, strict=True):
            new = Pair(pair.a, pair.b) if other is None else compared(case.graph, pair, base, other, case.samples)
            if new.first_difference is not None and pair.first_difference is None:
                new = replace(new, first_difference=_judged(case, pair, new.first_difference))
            found.append(pair.plus(new))
            seen |= set() if other is None else base.potentials.keys() & other.potentials.keys()
        if base.history:
            self._counter.see(case.graph, base, case.inputs, forward, sorted(seen))
        return found

    def _variants(self) -> tuple[tuple[VariantFound, ...], tuple[int, int]]:
        """Every variant on every target that takes it; and how many thresholds there are, and how many the variants met exactly and missed by one."""
        made = probing.variants(self._graph, self._probes)
        found = tuple(self._variant(variant) for variant in made)
        self._counter.mark("variants")
        both = [variant.met for variant in made]
        ran = all(variant.pairs for variant in found)
        return found, (len(both[0]), sum(ran and all(met[place] for met in both) for place in both[0]))

    def _variant(self, variant: Variant) -> VariantFound:
        pairs: list[Pair] = []
        not_run: dict[str, str] = {}
        running: list[_Running] = []
        with ExitStack() as stack:
            for target in sorted(self._chosen, key=lambda target: target.name in self._lacks):
                try:
                    running.append(stack.enter_context(self._started(target, variant.graph)))
                except DesignRuleError as refused:
                    not_run[target.name] = str(refused)
            if len(running) > 1 and running[0].name not in self._lacks:
                pairs = [Pair(running[0].name, other.name, not_compared=self._lacking(other.name)) for other in running[1:]]
                wrong = variant.errors if "feedback" in self._phases else None
                pairs = self._chunks(
                    variant.graph, pairs, running, variant.inputs, wrong, f"variant {variant.name}, probe", probing.SAMPLES
                )
        return VariantFound(variant, tuple(pairs), not_run)


class _Case(NamedTuple):
    """What was run: a graph, its inputs and errors, and what the samples are called."""

    graph: Graph
    inputs: Array
    wrong: Array | None
    samples: Samples


def _without_feedback(chosen: Sequence[Target], graph: Graph) -> dict[str, str]:
    """Targets that take the forward phase but not both, each with its reason."""
    found = {}
    for target in chosen:
        problems = target.check(graph)
        if problems and not target.check(forward_only(graph)):
            found[target.name] = problems[0]
    return found


def _judged(case: _Case, pair: Pair, found: Difference) -> Difference:
    """`found` with the value of the definition, which is run on this one sample where it takes no long."""
    if "reference" in (pair.a, pair.b):
        return replace(found, expected=found.a if pair.a == "reference" else found.b)
    if sample_products(case.graph) > LARGEST_JUDGEMENT:
        return found
    own = slice(found.sample - case.samples.first, found.sample - case.samples.first + 1)
    reference: Target = replace(get("reference"), trace=True)  # type: ignore[type-var]  # a target is a dataclass
    with reference.compile(case.graph) as run:
        result = run.run(case.inputs[own])
        if found.phase == "feedback" and case.wrong is not None:
            result = run.run(case.wrong[own], phase="feedback")
    history = result.history[found.population]
    by_step = {"spike": history.spikes, "value": history.spikes, "potential": history.potentials}
    if found.kind in by_step:
        return replace(found, expected=by_step[found.kind][found.step - 1].reshape(-1)[found.neuron].item())
    totals: dict[str, Array] = getattr(result, total_of(found.kind))
    return replace(found, expected=totals[found.population].reshape(-1)[found.neuron].item())


def _replayed(source: Source, chosen: Sequence[Target], graph: Graph) -> Verification:
    """Golden inputs of the artefact on every target against the counts and final potentials it carries."""
    if source.artifact is None:
        raise UsageError(f"'{source.name}' is a model, and golden vectors are in artefacts: compile it to a .fsnn file and replay that")
    golden, tensors = source.artifact.golden, source.artifact.golden_tensors
    short = graph.in_steps(golden.time_steps)
    lacks = _without_feedback(chosen, short) if "feedback" in golden.phases else {}
    pairs, activity = [], dict.fromkeys(golden.phases, 0)
    for target in chosen:
        phases = ("forward",) if target.name in lacks else golden.phases
        reason = (f"'{target.name}' has no feedback phase here ({lacks[target.name]})",) if target.name in lacks else ()
        pair = Pair("golden", target.name, not_compared=reason)
        with executable(configure(target, Options()), short if "feedback" in phases else forward_only(short)) as run:
            for phase in phases:
                result = run.run(tensors["inputs"] if phase == "forward" else tensors["error"], phase=phase)
                activity[phase] = max(activity[phase], _spikes(graph, result))
                pair = pair.plus(
                    compared(short, pair, _golden(source.artifact, phase, short), result, Samples("golden input"), totals=True)
                )
        pairs.append(pair)
    samples = dict.fromkeys(golden.phases, golden.samples)
    return Verification(
        source.name, "golden vectors", samples, graph.phase("forward").timing.mode, tuple(pairs), activity, _devices(chosen), versions()
    )


def _golden(compiled: Artifact, phase: str, graph: Graph) -> Result:
    """The golden vectors of one phase, as the result of a run that kept totals only."""
    kept: dict[str, dict[str, Array]] = {}
    for kind in ("counts", "potentials", "saturations"):
        kept[kind] = {}
        for name in graph.phase(phase).order:
            population, key = graph.population(name), f"{phase}.{kind}.{name}"
            if population.kind == "input":
                continue
            shape = (compiled.golden.samples, *population.shape)
            if key not in compiled.golden_tensors or compiled.golden_tensors[key].shape != shape:
                raise UsageError(f"the artefact's golden vectors lack '{key}' in shape {shape}: compile it again")
            kept[kind][name] = compiled.golden_tensors[key]
    steps = graph.phase(phase).time_steps
    return Result(phase, steps, kept["counts"], {}, {}, kept["potentials"], kept["saturations"])


def _devices(chosen: Sequence[Target]) -> str:
    """Where the targets ran, each device once."""
    return ", ".join(dict.fromkeys(device_of(target, Options()) for target in chosen))


def _spikes(graph: Graph, result: Result) -> int:
    return sum(int(activity.sum()) for name, activity in result.activity.items() if graph.population(name).kind == "couple")
