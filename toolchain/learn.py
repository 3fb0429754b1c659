"""Learning on a target: both equilibria run there as spikes, and every connection changes by what reached its own two ends (`toolchain.plasticity`).

For each batch the host sends images, reads the rates, works out the output error from them, sends it, and orders an update; it changes nothing on the target but a
readout's bias, which lives on the host. Lava processes hold their weights and change them themselves; on other targets the host applies the same rule to what they recorded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np

from toolchain import artifact, codec, config, data, fixed, plasticity, questions, shortage
from toolchain.compiler import assembled, executable, lowered
from toolchain.data.dataset import fingerprint
from toolchain.deploy import Options, available, device_of, sample_shape
from toolchain.errors import ArtifactError, ToolchainError, UsageError, unknown
from toolchain.files import held, replace_file
from toolchain.ir import Array, Graph, Rounding
from toolchain.lesson import ANEW, STATE, Diverged, Epoch, Kept, Learner, Lesson, Rule, digest, sentence
from toolchain.passes import Adjoint, Fold, Inject, Partition, Pipeline, Quantize, Retime
from toolchain.plasticity import Plastic
from toolchain.progress import say
from toolchain.source import LEARNED, Model, Source, find
from toolchain.target import Executable, Result, Target
from toolchain.versions import versions

METRICS = "metrics.jsonl"
FILES = (LEARNED, METRICS, STATE)
WEIGHTS = ("float", "int8")
FULL = 0.99
"""Of a power of two: pixels have 255 levels and not 256, which must not cost their weights a bit."""


@dataclass(frozen=True)
class Learned:
    """What a network learned on a target; accuracies are fractions of 1, of the `test_samples` first test samples.

    `seconds` leaves out start-up. `tensors` are the weights and biases that were learned, in the model's unit.
    """

    model: str
    target: str
    ran_on: str
    device: str
    dataset: str
    samples: int
    epochs: int
    batch: int
    seed: int
    weights: str
    learned: str
    start: str
    lr: float
    schedule: str
    scale_factor: float
    updates: int
    test_samples: int
    test_accuracy: float
    curve: tuple[Epoch, ...]
    startup_seconds: float
    seconds: float
    samples_per_second: float
    run: str | None
    versions: dict[str, str]
    tensors: dict[str, Array] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "tensors"}
        return found | {"curve": [msgspec.to_builtins(line) for line in self.curve]}

    def to_text(self) -> str:
        where = self.target if self.target == self.ran_on else f"{self.target} (ran on {self.ran_on})"
        began = (
            f"{self.model} learned {self.learned} on {where} from {self.start} weights, {self.weights} weights, {self.samples:,} {self.dataset} samples, "
            f"{self.epochs} epochs of batches of {self.batch} (seed {self.seed}, lr {self.lr:g} {self.schedule}, scale factor {self.scale_factor:g})"
        )
        ended = (
            f"{100 * self.test_accuracy:.2f} % of {self.test_samples:,} test samples after {self.updates:,} updates; {self.seconds:.1f} s, "
            f"{self.samples_per_second:,.0f} samples/s, start-up {self.startup_seconds:.2f} s"
        )
        kept = [] if self.run is None else [f"the network is in {self.run}/{LEARNED}"]
        return "\n".join([began, *(sentence(line) for line in self.curve), ended, *kept])


@runtime_checkable
class LearningTarget(Protocol):
    """A target whose own processes learn."""

    def learner(self, graph: Graph, plastics: Sequence[Plastic], *, batch: int, seed: int) -> Learner: ...


def learn(
    model: Model,
    *,
    target: str,
    dataset: str,
    samples: int | None = None,
    epochs: int = 5,
    batch: int = 16,
    seed: int = 0,
    weights: str = "int8",
    hidden_only: bool = False,
    readout_only: bool = False,
    settings: Sequence[str] = (),
    test_samples: int | None = None,
    fallback: str | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
) -> Learned:
    """Train `model` on `target` by SPIDE's local rule, on the first `samples` training samples of `dataset`, and test it after each epoch.

    A name of the catalogue starts from random weights, drawn from `seed`, anything else from the weights it has (`learn.start` chooses). `weights`
    are "float" (targets lava-sim, reference, torch) or "int8" (lava-sim, reference, sim): mantissas of 8 bits, of biases 13, rounded at random, of
    which no finer copy is kept. `settings` are `learn.NAME=VALUE`, see `Rule`. `output` names a folder that gets the learned network and metrics.jsonl, after every epoch, and all that
    `resume` needs to go on where the run ended, however it did, with the same settings and to the same result, bit for bit. Raises UsageError for a bad option,
    GraphError and DesignRuleError where the network cannot learn or does not fit, ToolchainError where the target fails: it says what was done and what is kept.
    """
    rule = _rule(settings)
    _require(epochs, batch, weights, hidden_only, readout_only, seed)
    folder = None if output is None else Path(output)
    _require_folder(folder, resume=resume)
    source, start = _started_from(model, rule, seed)
    chosen = _configured(available(target, fallback), weights)
    time_steps, size = sample_shape(source, dataset)
    load = {"data_dir": data_dir, "time_steps": time_steps, "image_size": size}
    train = data.load(dataset, split="train", samples=samples, **load)  # type: ignore[arg-type]  # a dictionary of several types
    test = data.load(dataset, split="test", samples=test_samples, **load)  # type: ignore[arg-type]
    _require_fitting(source, train)
    stages = _stages(source, rule, weights, feedback=not readout_only)
    found = plasticity.plastics(stages.graph, hidden=not readout_only, readout=not hidden_only)
    part = "the readout" if readout_only else "the hidden connections" if hidden_only else "all connections"
    lesson = Lesson(rule, found, stages.graph, len(train), epochs, batch, seed)
    terms = {
        "model": source.name,
        "first weights (sha256)": digest(stages.adjoint.tensors),
        "network (sha256)": questions.digest(stages.adjoint, None),  # its time steps, thresholds and leaks too
        "target": chosen.name,
        "dataset": dataset,
        "samples": len(train),
        "training samples (sha256)": fingerprint(train),
        "test samples (sha256)": fingerprint(test),
        "epochs": epochs,
        "batch": batch,
        "seed": seed,
        "weights": weights,
        "what learns": part,
        **{f"learn.{name}": getattr(rule, name) for name in Rule.__dataclass_fields__},
    }
    kept = Kept(folder, lesson, terms)

    def told(line: Epoch) -> None:
        if line.epoch:
            say(f"toolchain: {sentence(line)}")
        if line.epoch == 1:
            _say_what_rests(found, stages.graph, learner.graph, silent=line.silent == 1 and not readout_only)
        if line.epoch and folder is not None:
            note = f"learned on {chosen.name}, {lesson.sentence(train, weights)}"
            _write(folder, stages, learner.graph, found, note, lesson.curve, warn=line.epoch == epochs)
        kept.now()

    began = time.perf_counter()
    with nullcontext() if folder is None else held(folder, FILES):
        _require_folder(folder, resume=resume)  # again: another run may have been here before the folder was ours
        if resume:
            assert folder is not None  # as _require_folder says
            kept.restore()
            _require_whole(folder, lesson)
        else:
            kept.now()
        first = plasticity.with_tensors(stages.graph, lesson.done.tensors)
        try:
            with _learner(chosen, first, found, min(batch, len(train)), seed) as learner:
                ready = time.perf_counter()
                lesson.run(learner, train, test, kept.when_due, told)
                graph = learner.graph
        except BaseException as error:
            kept.at_last()
            failed = _failed(error, kept)
            if failed is None:
                raise
            raise failed from error
    curve = lesson.curve
    seconds = sum(line.seconds for line in curve)
    floats = _in_floats(found, graph)
    return Learned(
        model=source.name,
        target=target,
        ran_on=chosen.name,
        device=device_of(chosen, Options()),
        dataset=dataset,
        samples=len(train),
        epochs=epochs,
        batch=batch,
        seed=seed,
        weights=weights,
        learned=part,
        start=start,
        lr=rule.lr,
        schedule=rule.schedule,
        scale_factor=lesson.scale_factor(batch),
        updates=lesson.updates,
        test_samples=len(test),
        test_accuracy=curve[-1].test_accuracy,
        curve=tuple(curve),
        startup_seconds=ready - began,
        seconds=seconds,
        samples_per_second=epochs * len(train) / seconds,
        run=None if folder is None else str(folder),
        versions=versions(),
        tensors=floats,
    )


def _rule(settings: Sequence[str]) -> Rule:
    """The rule that settings ask for."""
    wanted: dict[str, Any] = {}
    for name, value in config.assignments(settings).items():
        section, _, key = name.partition(".")
        if section != "learn" or key not in Rule.__dataclass_fields__:
            raise unknown("setting", name, [f"learn.{known}" for known in Rule.__dataclass_fields__])
        wanted[key] = value
    for key, known in (("start", ("random", "model")), ("schedule", ("cosine", "constant"))):
        if key in wanted and wanted[key] not in known:
            raise unknown(f"learn.{key}", str(wanted[key]), known)
    for key, value in wanted.items():
        if key not in ("start", "schedule"):
            wanted[key] = _positive(f"learn.{key}", value)
    return Rule(**wanted)


SMALLEST, LARGEST = 1e-6, 1e6
"""Of the numbers that settings give."""


def _positive(name: str, value: object) -> float:
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else -1.0
    if not SMALLEST <= number <= LARGEST:
        said = "nothing" if value is None else value
        raise UsageError(f"{name} is {said}: it must be a positive number, {SMALLEST:g} to {LARGEST:g}")
    return number


def _require(epochs: int, batch: int, weights: str, hidden_only: bool, readout_only: bool, seed: int) -> None:
    if weights not in WEIGHTS:
        raise unknown("weights", weights, WEIGHTS)
    if not 1 <= epochs <= 1_000_000:
        raise UsageError(f"{epochs} epochs cannot be learned: give 1 to 1,000,000")
    if not 1 <= batch <= 65_536:
        raise UsageError(f"batch is {batch}: give a whole number from 1 to 65,536")
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed is {seed}: give a whole number from 0, below 2^63")
    if hidden_only and readout_only:
        raise UsageError("--hidden-only and --readout-only leave nothing to learn: give one of the two, or none")


def _require_fitting(source: Source, train: data.Dataset) -> None:
    """Found out before anything is built: the samples are of the size that the network takes."""
    if source.module is not None:
        takes: tuple[int, ...] = source.module.input_shape
    else:
        assert source.artifact is not None  # a source has one of the two
        takes = source.artifact.graph.of_kind("input")[0].shape
    shape = train.images.shape[1:]
    events = len(shape) == len(takes) + 1 and shape[:-1] == takes
    if not events and prod(shape) != prod(takes):
        raise UsageError(
            f"samples of '{train.name}' have shape {shape} but '{source.name}' takes {takes}: choose another data set or network"
        )


def _require_folder(folder: Path | None, *, resume: bool) -> None:
    """A folder without a run, or to resume one with a run; nothing is made yet."""
    if folder is None:
        if resume:
            raise UsageError("--resume goes on with a run folder: name it with -o RUN")
        return
    if resume and not (folder / STATE).exists():
        raise UsageError(f"'{folder}' holds no {STATE} to resume from: start without --resume")
    for name in () if resume else FILES:
        if (folder / name).exists():
            raise UsageError(f"'{folder}' already holds a run ({name}): go on with --resume, or choose another folder")


def _require_whole(folder: Path, lesson: Lesson) -> None:
    """UsageError where a run folder lacks what its whole epochs have left, ArtifactError where the learned network is damaged."""
    if len(lesson.curve) < 2:
        return
    for name in FILES:
        if not (folder / name).exists():
            raise UsageError(f"'{folder}' lacks {name}: {ANEW}")
    try:
        artifact.read(folder / LEARNED)
    except ArtifactError as error:
        raise ArtifactError(f"'{folder / LEARNED}' is no artefact that can be read: {ANEW}") from error


def _failed(error: BaseException, kept: Kept) -> ToolchainError | None:
    """What happened, with what was done and what is kept; None for an error that going on would meet again, or that is the user's."""
    missing = shortage.found(error)
    if missing is not None:
        said = f"learning {missing.sentence}: {missing.remedy(['--batch', '--samples'])}"
    elif isinstance(error, ToolchainError) and error.exit_code == ToolchainError.exit_code and not isinstance(error, Diverged):
        said = str(error)
    else:
        return None
    done, planned = kept.lesson.updates, kept.lesson.planned
    if kept.folder is None:
        return ToolchainError(f"{said} ({done:,} of {planned:,} updates were done, and are lost: give -o RUN to keep them)")
    return ToolchainError(f"{said} ('{kept.folder}' holds {kept.updates:,} of {planned:,} updates: --resume goes on from there)")


def _started_from(model: Model, rule: Rule, seed: int) -> tuple[Source, str]:
    """The network with its first weights, and what these are."""
    from toolchain import models

    named = isinstance(model, str) and model in models.names()
    if rule.start != "model" and (named or rule.start == "random"):
        if not named:
            raise UsageError("learn.start=random draws the weights of a network of the catalogue: give its name, or leave the setting out")
        return Source(str(model), models.get(str(model)).build(seed).eval(), None), "random"
    return find(model), "its own"


def _configured(chosen: Target, weights: str) -> Target:
    """The target with the passes and numbers for these weights."""
    from toolchain.passes import FLOAT_PIPELINE

    fields: dict[str, Any] = getattr(chosen, "__dataclass_fields__", {})
    if weights == "float" and chosen.name == "sim":
        raise UsageError("target 'sim' runs integers only: give --weights int8, or target torch, reference or lava-sim")
    if weights == "int8" and chosen.name == "torch":
        raise UsageError("target 'torch' runs floats only: give --weights float, or target sim, reference or lava-sim")
    if "dtype" in fields:
        chosen = replace(chosen, dtype="float64")  # type: ignore[type-var]  # a protocol cannot say that it is a dataclass
    if weights == "float" and "pipeline" in fields and chosen.name in ("lava-sim", "reference"):
        chosen = replace(chosen, pipeline=FLOAT_PIPELINE)  # type: ignore[type-var]
    return chosen


@dataclass(frozen=True)
class _Stages:
    """A network on its way to the chip: folded with its feedback phase, as artefacts keep it; in hardware time with graded input; and as it learns."""

    adjoint: Graph
    timed: Graph
    graph: Graph


def _stages(source: Source, rule: Rule, weights: str, *, feedback: bool) -> _Stages:
    if source.artifact is None:
        folded = Pipeline((Fold(), Adjoint()))(lowered(source))
    elif source.artifact.float_graph is None:
        raise UsageError(
            f"'{source.name}' was compiled without its float tensors, which learning starts from: compile it again without --no-float"
        )
    else:
        folded = source.artifact.float_graph
    if not folded.has_phase("feedback"):
        raise UsageError(f"'{source.name}' has no feedback phase, in which connections learn: choose a network trained by spide or ide")
    timed = Pipeline((Inject("graded"), Retime()))(folded)
    if not feedback:  # the readout's own error is all that a feedback phase then brings
        timed = timed.in_steps({"feedback": 1})
    return _Stages(folded, timed, timed if weights == "float" else in_integers(timed, rule.reach))


def in_integers(graph: Graph, reach: float) -> Graph:
    """A float graph in hardware time as integers with room to learn: units and exponents are those of weights and biases that reach `reach` thresholds.

    What they are now is rounded to that grid. Weights larger than 2/3 of the reach get more room.
    """
    names = [p.tensor for p in plasticity.plastics(graph) if not p.on_host]
    threshold = max(float(d.threshold) for d in graph.phase("forward").dynamics.values())
    draw = np.random.default_rng(0)
    room: dict[str, Array] = {}
    for name in names:
        tensor = graph.tensors[name]
        largest = FULL * max(reach * threshold, 1.5 * float(np.abs(tensor).max(initial=0)))
        stand_in = draw.uniform(-largest, largest, tensor.shape)
        stand_in.reshape(-1)[:1] = largest
        room[name] = stand_in
    made = Pipeline((Quantize(),))(plasticity.with_tensors(graph, room))
    mantissas: dict[str, Array] = {}
    rounding = dict(made.provenance.rounding)
    for plastic in plasticity.plastics(made):
        if plastic.bounds is None:
            mantissas[plastic.tensor] = graph.tensors[plastic.tensor]
            continue
        exact = graph.tensors[plastic.tensor]
        found = fixed.mantissas(exact / plastic.step, 0, *plastic.bounds)
        error = np.abs(found.mantissa * plastic.step - exact)
        mantissas[plastic.tensor] = found.mantissa
        rounding[plastic.tensor] = Rounding(
            rounding[plastic.tensor].exponent, float(error.max()), float(np.sqrt(np.mean(error**2))), found.clipped
        )
    return _with_provenance(plasticity.with_tensors(made, mantissas), rounding=rounding, notes=graph.provenance.notes)


def _with_provenance(graph: Graph, **changes: Any) -> Graph:
    return msgspec.structs.replace(graph, provenance=msgspec.structs.replace(graph.provenance, **changes))


@contextmanager
def _learner(chosen: Target, graph: Graph, plastics: Sequence[Plastic], batch: int, seed: int) -> Iterator[Learner]:
    """The network, ready to learn, closed at the end whatever happens."""
    learner = (
        chosen.learner(graph, plastics, batch=batch, seed=seed)
        if isinstance(chosen, LearningTarget)
        else OnHost(chosen, graph, plastics, seed)
    )
    with learner:
        yield learner


class OnHost:
    """Learning on a target whose processes cannot: it runs both phases, and the host changes the weights by what it recorded."""

    def __init__(self, target: Target, graph: Graph, plastics: Sequence[Plastic], seed: int) -> None:
        self.graph = graph
        self._target, self._plastics, self._seed = target, plastics, seed
        self._run: Executable | None = executable(target, graph)
        self._images: Array = np.zeros(0)
        self._forward: Result | None = None

    def forward(self, images: Array) -> Result:
        if self._run is None:
            self._run = self._target.compile(self.graph)
        self._images = images
        self._forward = self._run.run(images)
        return self._forward

    def update(self, error: Array, message: Array, rates: Mapping[int, float], number: int) -> Result:
        assert self._run is not None
        assert self._forward is not None
        graph, forward = self.graph, self._forward
        back = self._run.run(error, phase="feedback")
        encoded = codec.encode_input(graph, codec.check_inputs(graph, self._images))
        tensors = {}
        for plastic in self._plastics:
            if plastic.number in rates:
                r = np.zeros(0) if plastic.source is None else plasticity.sent(graph, plastic, forward, encoded)
                product = plasticity.correlation(graph, plastic, r, plasticity.post(graph, plastic, forward, back, message))
                values = graph.tensors[plastic.tensor]
                tensors[plastic.tensor] = plasticity.changed(plastic, values, product, rates[plastic.number], self._seed, number)
        self._replace(tensors)
        return back

    def set_bias(self, tensors: Mapping[str, Array]) -> None:
        self._replace(tensors)

    def _replace(self, tensors: Mapping[str, Array]) -> None:
        if tensors:
            self.graph = plasticity.with_tensors(self.graph, tensors)
            self.close()

    def close(self) -> None:
        if self._run is not None:
            self._run.close()
        self._run = None

    def __enter__(self) -> OnHost:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _say_what_rests(found: Sequence[Plastic], before: Graph, after: Graph, *, silent: bool) -> None:
    """Learning that does not happen is said once: where nothing fires back, or a change is always rounded away."""
    if silent:
        say("toolchain: no couple fired in a feedback phase, so hidden connections learned nothing: raise learn.scale_factor")
        return
    rest = [p.tensor for p in found if np.array_equal(before.tensors[p.tensor], after.tensors[p.tensor])]
    if rest:
        say(f"toolchain: {', '.join(rest)} did not change in the first epoch: raise learn.scale_factor or learn.lr, or give more samples")


def _in_floats(found: Sequence[Plastic], graph: Graph) -> dict[str, Array]:
    """What was learned, in the model's unit."""
    return {plastic.tensor: plasticity.in_floats(plastic, graph.tensors[plastic.tensor]) for plastic in found}


def _write(folder: Path, stages: _Stages, graph: Graph, found: Sequence[Plastic], note: str, curve: Sequence[Epoch], *, warn: bool) -> None:
    """The learned network as an artefact, then a line an epoch: a run that is stopped keeps its last whole epoch."""
    notes = (*stages.adjoint.provenance.notes, note)
    folded = _with_provenance(plasticity.with_tensors(stages.adjoint, _in_floats(found, graph)), notes=notes)
    if graph.integer:
        steps: dict[str, int] = {phase.name: phase.time_steps for phase in stages.adjoint.phases}
        made = Pipeline((Partition(),))(_with_provenance(graph.in_steps(steps), notes=notes))
    else:
        timed = Pipeline((Inject("graded"), Retime(), Quantize(), Partition()))
        made = timed(folded)
    artifact.write(assembled("lava-sim", folded, made, warn=warn), folder / LEARNED)
    replace_file(folder / METRICS, b"".join(msgspec.json.encode(line) + b"\n" for line in curve))
