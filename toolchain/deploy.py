"""Run a data set through a target and record what came out: in this process, or in shards by workers here and elsewhere (`toolchain.crews`)."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

import toolchain
from toolchain import checkpoint, crews, data, devices, seen, shards
from toolchain.compiler import executable, forward_only, graph_for, lowered
from toolchain.errors import UsageError
from toolchain.files import ready_folder, replace_file
from toolchain.ir import Array, Graph
from toolchain.module_run import ModuleRun, carries_feedback, outline
from toolchain.partial import Partial, Partials, Question
from toolchain.passes import FLOAT_PIPELINE, Fold
from toolchain.progress import say, track
from toolchain.questions import asked
from toolchain.seen import Seen, Watch
from toolchain.shards import Message
from toolchain.source import Model, Source, find
from toolchain.target import Executable, Target, get
from toolchain.versions import versions


@dataclass(frozen=True)
class Deployment:
    """One data set on one target. Accuracies are fractions of 1; `seconds` leaves out start-up and compilation (`startup_seconds`).

    Synaptic operations are None where target torch ran a network that has no graph: they are counted on graphs. `rates` of couples, (samples, *shape),
    have the first samples only where all would be more than `seen.RATE_VALUES`. Where several `jobs` shared the samples, `seconds` is the time of all of
    them together, and `device` and `versions` are theirs; `retries` counts shards that were run again.
    """

    model: str
    target: str
    ran_on: str
    device: str
    dataset: str
    samples: int
    correct: int
    accuracy: float
    time_steps: int
    timing: str
    startup_seconds: float
    seconds: float
    samples_per_second: float
    spikes_per_sample: float
    synaptic_operations_per_sample: float | None
    saturations: int
    clipped_currents: int
    versions: dict[str, str]
    predictions: npt.NDArray[np.int64] = field(repr=False)
    labels: npt.NDArray[np.int64] = field(repr=False)
    logits: npt.NDArray[np.float64] = field(repr=False)
    rates: dict[str, npt.NDArray[np.float64]] = field(repr=False)
    jobs: int = 1
    retries: int = 0

    def to_json(self) -> dict[str, Any]:
        hidden = ("predictions", "labels", "logits", "rates", *(() if self.retries else ("retries",)))
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in hidden}

    def to_text(self) -> str:
        operations = "no count of" if self.synaptic_operations_per_sample is None else f"{self.synaptic_operations_per_sample:,.0f}"
        where = self.target if self.ran_on == self.target else f"{self.target} (ran on {self.ran_on})"
        return (
            f"{self.model} on {where}, {self.device}: {100 * self.accuracy:.2f} % of {self.samples:,} {self.dataset} samples "
            f"({self.correct:,} correct), T {self.time_steps}, {self.timing} timing\n"
            f"{self.samples_per_second:,.0f} samples/s ({self.seconds:.2f} s, start-up {self.startup_seconds:.2f} s), {self.spikes_per_sample:,.0f} spikes and "
            f"{operations} synaptic operations per sample, {self.saturations:,} saturations"
            + (f", {self.clipped_currents:,} input currents clipped" if self.clipped_currents else "")
            + (f"\n{self.jobs} jobs shared the samples" if self.jobs > 1 else "")
            + (f", {self.retries:,} shards were run again" if self.retries else "")
        )


@dataclass(frozen=True)
class Options:
    """How a target is to run, as the command line says it; None and "auto" leave the target's own choice."""

    batch: str | int = "auto"
    synapses: str = "own"
    device: str = "auto"
    trace: bool = False


def deploy(
    model: Model,
    *,
    target: str,
    dataset: str = "mnist-1k",
    samples: int | None = None,
    batch: str | int = "auto",
    jobs: int = 1,
    scheduler: str | None = None,
    synapses: str = "own",
    device: str = "auto",
    fallback: str | None = None,
    predictions: str | Path | None = None,
    resume: bool = False,
    data_dir: str | Path | None = None,
) -> Deployment:
    """Classify `dataset` (its first `samples` test samples) with `model` on `target`.

    `jobs` processes of this machine share the samples, or the workers of the Dask `scheduler` at an address; the result is the same (docs/scaling.md).
    Where the target is missing (on the machines that would run it), `fallback` names the one to run instead: said on stderr and recorded in `ran_on`.
    `predictions` writes an .npz with predictions, labels, logits and rates. What a run that failed or was ended has found is saved, and the same call with
    `resume` goes on from it. Raises UsageError for a bad name or option, DesignRuleError where the graph does not fit, ToolchainError, with what was done,
    where the run itself fails.
    """
    if jobs < 1:
        raise UsageError(f"jobs is {jobs}: give a whole number from 1")
    if scheduler is not None and jobs > 1:
        raise UsageError(f"the workers of '{scheduler}' are the jobs, and {jobs} more are asked for: give jobs or a scheduler")
    source = find(model)
    get(target)
    time_steps, size = sample_shape(source, dataset)
    loaded = data.load(dataset, samples=samples, data_dir=data_dir, time_steps=time_steps, image_size=size)
    if predictions is not None:
        _require_place(Path(predictions))
    options = Options(batch, synapses, device)
    with Partials(resume=resume, lower=shards.LOWER if jobs > 1 else shards.LOWER[1:]) as partials:
        if jobs == 1 and scheduler is None:
            deployment = classify(source, available(target, fallback), target, loaded, options, partials)
        else:
            with crews.crew(opened, jobs, scheduler) as crew:
                deployment = shared(model, source, available(target, fallback, lacks=crew.lacks), target, loaded, options, crew, partials)
        if predictions is not None:
            write_predictions(deployment, Path(predictions))
    return deployment


def classify(
    source: Source, chosen: Target, asked: str, dataset: data.Dataset, options: Options, partials: Partials | None = None
) -> Deployment:
    """The forward phase of every sample of `dataset` on `chosen`; `asked` is the target the user named, `partials` where the answers so far are saved."""
    began = time.perf_counter()
    with started(source, chosen, options, phases=("forward",)) as run:
        graph, device, watch = run.graph, device_of(chosen, options), Watch(run)
        question = _asked(source, chosen, dataset, options, graph, device, versions())
        partial = Partial(question) if partials is None else partials.of(question)
        ready = time.perf_counter()
        unit = seen.unit(_neurons(graph), batch=_chosen_batch(options), exact=graph.integer, alone=options.synapses != "own")
        todo = partial.missing([slice(0, len(dataset))])
        label = f"{source.name} on {chosen.name}"
        for part in track(seen.cut(todo, unit), label, total=sum(map(_length, todo)), weight=_length):
            images = dataset.images[part]
            partial.add(part, watch.see(images, part.start).message(), images)
    found = seen.joined([Seen.of(answer) for answer in partial.answers()])
    return _deployment(source, chosen, asked, dataset, graph, found, device=device, startup=ready - began, seconds=found.sums.seconds)


def shared(
    model: Model,
    source: Source,
    chosen: Target,
    asked: str,
    dataset: data.Dataset,
    options: Options,
    crew: crews.OpenCrew,
    partials: Partials,
) -> Deployment:
    """`classify`, where the workers of `crew` share the samples: they get the compiled graph and their rows, and the answers are put in order."""
    began = time.perf_counter()
    job = _job(model, source, chosen, options)
    graph = _graph_of(job)
    dealt = shards.dealt(len(dataset), crew.size, neurons=_neurons(graph), batch=_chosen_batch(options), exact=graph.integer)
    tries = shards.Tries()
    greetings = crew.ready(job, len(dealt), tries)
    theirs = [hello.facts["versions"] for hello in greetings]
    ran = {name: ", ".join(sorted({versions[name] for versions in theirs})) for name in theirs[0]}
    device = ", ".join(sorted({hello.facts["device"] for hello in greetings}))
    partial = partials.of(_asked(source, chosen, dataset, options, graph, device, ran))
    todo = partial.missing(dealt)
    names = [f"samples {part.start:,} to {part.stop - 1:,} of {dataset.name}" for part in todo]
    asking = [_Asking(dataset, part) for part in todo]
    ready = time.perf_counter()
    label = f"{source.name} on {chosen.name}, {len(greetings)} jobs"
    answers = shards.answers(crew, [each.question for each in asking], names, tries)
    for number, answer in track(answers, label, total=sum(map(_length, todo)), weight=lambda found: _length(todo[found[0]])):
        partial.add(todo[number], answer, asking[number].images)
        asking[number].images = EMPTY
    deployment = _deployment(
        source,
        chosen,
        asked,
        dataset,
        graph,
        seen.joined([Seen.of(answer) for answer in partial.answers()]),
        device=device,
        startup=ready - began,
        seconds=partial.seconds + time.perf_counter() - ready,
    )
    return replace(deployment, versions=ran, jobs=len(greetings), retries=tries.again + crew.run_again())


def _deployment(
    source: Source,
    chosen: Target,
    asked: str,
    dataset: data.Dataset,
    graph: Graph,
    found: Seen,
    *,
    device: str,
    startup: float,
    seconds: float,
) -> Deployment:
    predicted = np.asarray(found.logits.argmax(axis=1), np.int64)
    correct = int((predicted == dataset.labels).sum())
    phase = graph.phase("forward")
    return Deployment(
        model=source.name,
        target=asked,
        ran_on=chosen.name,
        device=device,
        dataset=dataset.name,
        samples=len(predicted),
        correct=correct,
        accuracy=correct / len(predicted),
        time_steps=phase.time_steps,
        timing=phase.timing.mode,
        startup_seconds=startup,
        seconds=seconds,
        samples_per_second=len(predicted) / seconds,
        spikes_per_sample=found.sums.spikes / len(predicted),
        synaptic_operations_per_sample=None if found.sums.operations is None else found.sums.operations / len(predicted),
        saturations=found.sums.saturations,
        clipped_currents=found.sums.clipped_currents,
        versions=versions(),
        predictions=predicted,
        labels=np.asarray(dataset.labels, np.int64),
        logits=found.logits,
        rates=found.rates,
    )


def _job(model: Model, source: Source, chosen: Target, options: Options) -> Message:
    """What a worker needs to open the job: the compiled graph, the target's name and options, and for target torch where the module's weights are."""
    configured = configure(chosen, options)
    outlined = _module_graph(source, chosen, options, ("forward",))
    graph = forward_only(graph_for(source, configured)) if outlined is None else outlined
    facts: dict[str, Any] = {
        "toolchain": toolchain.__version__,
        "target": chosen.name,
        "options": {"batch": options.batch, "synapses": options.synapses, "device": options.device},
        "graph": msgspec.to_builtins(msgspec.structs.replace(graph, tensors={})),
    }
    arrays = {f"graph.{name}": tensor for name, tensor in graph.tensors.items()}
    if outlined is None:
        return Message(facts, arrays)
    file = _checkpoint_of(model, source)
    facts["module"] = None if file else source.name
    return Message(facts, arrays | ({"checkpoint": np.frombuffer(file, np.uint8)} if file else {}))


def _checkpoint_of(model: Model, source: Source) -> bytes:
    """The file that holds the module's weights; empty where the package has them."""
    from toolchain import models

    if not isinstance(model, (str, os.PathLike)):
        raise UsageError(
            f"'{source.name}' is a module of this program, and workers get no pickles: give a zoo name, a run folder, a checkpoint or an artefact, or leave jobs out"
        )
    if str(model) in models.names():
        return b""
    path = Path(model)
    return (path / checkpoint.NAME if path.is_dir() else path).read_bytes()


def _graph_of(job: Message) -> Graph:
    tensors = {name.removeprefix("graph."): array for name, array in job.arrays.items() if name != "checkpoint"}
    return msgspec.structs.replace(msgspec.convert(job.facts["graph"], Graph), tensors=tensors)


EMPTY = np.zeros(0, np.float32)


class _Asking:
    """The question about the samples `part`, which keeps their images until the answer is there: of some data sets they are decoded anew."""

    def __init__(self, dataset: data.Dataset, part: slice) -> None:
        self._dataset = dataset
        self._part = part
        self.images: Array = EMPTY

    def question(self) -> bytes:
        self.images = np.asarray(self._dataset.images[self._part])
        return Message({"first": self._part.start}, {"images": self.images}).packed()


def _asked(
    source: Source, chosen: Target, dataset: data.Dataset, options: Options, graph: Graph, device: str, ran: dict[str, str]
) -> Question:
    batch = str(options.batch)
    return asked(source, graph, dataset, target=chosen.name, synapses=options.synapses, batch=batch, device=device, versions=ran)


def _neurons(graph: Graph) -> int:
    return sum(prod(population.shape) for population in graph.populations)


def _chosen_batch(options: Options) -> int | None:
    return None if options.batch == "auto" else _batch(options.batch)


def _length(part: slice) -> int:
    return int(part.stop - part.start)


class _Opened:
    """A job as a worker has it open: the target, running."""

    def __init__(self, run: Executable, device: str) -> None:
        self._run = run
        self._device = device
        self._watch = Watch(run)

    def greeting(self) -> Message:
        return Message({"device": self._device, "versions": versions()})

    def answer(self, question: Message) -> Message:
        # copied, since torch wants arrays that it could write to
        return self._watch.see(question.arrays["images"].copy(), question.facts["first"]).message()

    def close(self) -> None:
        self._run.close()


def opened(job: Message) -> _Opened:
    """Start what `_job` described; runs in a worker."""
    chosen, options, graph = get(job.facts["target"]), Options(**job.facts["options"]), _graph_of(job)
    if "module" in job.facts:
        run: Executable = _module_executable(_module_of(job), graph, options)
    else:
        run = executable(configure(chosen, options), graph)
    try:
        return _Opened(run, device_of(chosen, options))
    except BaseException:
        run.close()
        raise


def _module_of(job: Message) -> Source:
    if job.facts["module"] is not None:
        return find(job.facts["module"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / checkpoint.NAME
        path.write_bytes(job.arrays["checkpoint"].tobytes())
        return find(path)


def sample_shape(source: Source, dataset: str) -> tuple[int | None, int | None]:
    """The number of frames and the size, as `data.load` takes them, that a data set of events or large images is brought to for this model."""
    if source.module is not None:
        return source.module.time_steps, data.size_for(dataset, source.module.input_shape)
    if source.artifact is None:
        return None, None
    graph = source.artifact.graph
    return graph.phase("forward").time_steps, data.size_for(dataset, graph.of_kind("input")[0].shape)


def available(
    target: str,
    fallback: str | None = None,
    *,
    instead: str = "add --fallback sim to run there instead",
    lacks: Callable[[str], str | None] | None = None,
) -> Target:
    """The target called `target`, or `fallback` where it is missing here (said on stderr).

    `lacks` says what a target of some name lacks where it would run, this process by default. UsageError where neither can run: it ends in `instead`,
    what to do where the target cannot be installed.
    """
    chosen = get(target)
    other = None if fallback is None else get(fallback)
    missing = chosen.available() if lacks is None else lacks(target)
    if missing is None:
        return chosen
    if other is None:
        raise UsageError(f"{missing}; or {instead}")
    still = other.available() if lacks is None else lacks(other.name)
    if still is not None:
        raise UsageError(f"{missing}; the fallback cannot run either: {still}")
    say(f"toolchain: {missing}; running on '{fallback}' instead, as --fallback says")
    return other


@contextmanager
def started(source: Source, chosen: Target, options: Options, phases: tuple[str, ...]) -> Iterator[Executable]:
    """A running executable of `source` on `chosen`, closed at the end whatever happens."""
    configured = configure(chosen, options)
    run = _module_run(source, chosen, options, phases)
    if run is None:
        graph = graph_for(source, configured)
        run = executable(configured, forward_only(graph) if phases == ("forward",) else graph)
    with run:
        yield run


def _module_run(source: Source, chosen: Target, options: Options, phases: tuple[str, ...]) -> Executable | None:
    graph = _module_graph(source, chosen, options, phases)
    return None if graph is None else _module_executable(source, graph, options)


def _module_executable(source: Source, graph: Graph, options: Options) -> Executable:
    assert source.module is not None
    return ModuleRun(source.module, graph, device=options.device, batch=_chosen_batch(options))


def _module_graph(source: Source, chosen: Target, options: Options, phases: tuple[str, ...]) -> Graph | None:
    """What names the populations of the module itself, where target torch is asked for what that can do: counts and rates, no traces."""
    if chosen.name != "torch" or source.module is None or options.trace:
        return None
    from toolchain.lower import not_compiled

    forward, reason = phases == ("forward",), not_compiled(source.module)
    if not forward and not carries_feedback(source.module):
        say(
            f"toolchain: SPIDE's feedback stage knows chains of couples only; target torch runs the graph of '{source.name}' instead of the module"
        )
        return None
    if reason is not None and forward:
        say(f"toolchain: {reason}; target torch runs the module all the same, without a count of synaptic operations")
        return outline(source.module)
    graph = lowered(source)
    return Fold()(forward_only(graph)) if forward else FLOAT_PIPELINE.until("adjoint")(graph)


def configure(chosen: Target, options: Options) -> Target:
    """`chosen` with the options it has; UsageError where one was asked for that it lacks."""
    fields: dict[str, Any] = getattr(chosen, "__dataclass_fields__", {})
    wanted: dict[str, Any] = {}
    if options.batch != "auto":
        wanted["batch"] = _batch(options.batch)
    if options.synapses != "own":
        wanted["synapses"] = options.synapses
    if options.trace:
        wanted["trace"] = True
    for name in wanted:
        if name not in fields:
            raise UsageError(f"target '{chosen.name}' has no option '{name}': leave it out")
    if "device" in fields:
        wanted["device"] = options.device
    elif devices.pick(options.device).type == "cuda" and options.device != "auto":
        raise UsageError(f"target '{chosen.name}' runs on the CPU only: leave --device out")
    if not wanted:
        return chosen
    changed: Target = replace(chosen, **wanted)  # type: ignore[type-var]  # a protocol cannot say that it is a dataclass
    return changed


def device_of(chosen: Target, options: Options) -> str:
    """The device a target runs on, as reports name it."""
    return devices.describe(devices.pick(options.device)) if hasattr(chosen, "device") else "cpu"


def write_predictions(deployment: Deployment, path: Path) -> None:
    """Predictions, labels, logits and rates as an .npz without pickles."""
    import io

    stream = io.BytesIO()
    arrays: dict[str, Any] = {f"rates.{name}": rate.astype(np.float32) for name, rate in deployment.rates.items()}
    np.savez_compressed(stream, predictions=deployment.predictions, labels=deployment.labels, logits=deployment.logits, **arrays)
    replace_file(path, stream.getvalue())


def _require_place(path: Path) -> None:
    """A file can be written at `path`: found out before the work, not after."""
    if path.name in ("", ".", "..") or path.is_dir():
        raise UsageError(f"'{path}' is no file name: give --predictions FILE.npz")
    ready_folder(path.parent)


def _batch(value: str | int) -> int:
    try:
        batch = int(value)
    except ValueError:
        batch = 0
    if not 1 <= batch <= 65_536:
        raise UsageError(f"batch is '{value}': give auto, or a whole number from 1 to 65,536")
    return batch
