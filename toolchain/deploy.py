"""Run a data set through a target and record what came out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain import codec, data, devices
from toolchain.compiler import executable, forward_only, graph_for, lowered
from toolchain.errors import UsageError
from toolchain.files import ready_folder, replace_file
from toolchain.module_run import ModuleRun, carries_feedback, outline
from toolchain.passes import FLOAT_PIPELINE, Fold
from toolchain.progress import say, track
from toolchain.source import Model, Source, find
from toolchain.target import Executable, Target, get
from toolchain.versions import versions

CHUNK = 256
"""Samples handed to a target at a time: a progress bar's step."""

RATE_VALUES = 2**26
"""Most rates that a record keeps, half a GiB: of large networks those of the first samples."""


@dataclass(frozen=True)
class Deployment:
    """One data set on one target. Accuracies are fractions of 1; `seconds` leaves out start-up and compilation (`startup_seconds`).

    Synaptic operations are None where target torch ran a network that has no graph: they are counted on graphs. `rates` of couples, (samples, *shape),
    have the first samples only where all would be more than `RATE_VALUES`.
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

    def to_json(self) -> dict[str, Any]:
        hidden = ("predictions", "labels", "logits", "rates")
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
    synapses: str = "own",
    device: str = "auto",
    fallback: str | None = None,
    predictions: str | Path | None = None,
    data_dir: str | Path | None = None,
) -> Deployment:
    """Classify `dataset` (its first `samples` test samples) with `model` on `target`.

    Where the target is missing here, `fallback` names the one to run instead: said on stderr and recorded in `ran_on`. `predictions` writes an
    .npz with predictions, labels, logits and rates. Raises UsageError for a bad name or option, DesignRuleError where the graph does not fit.
    """
    source = find(model)
    chosen = available(target, fallback)
    time_steps, size = sample_shape(source, dataset)
    loaded = data.load(dataset, samples=samples, data_dir=data_dir, time_steps=time_steps, image_size=size)
    if predictions is not None:
        _require_place(Path(predictions))
    deployment = classify(source, chosen, target, loaded, Options(batch, synapses, device))
    if predictions is not None:
        write_predictions(deployment, Path(predictions))
    return deployment


def classify(source: Source, chosen: Target, asked: str, dataset: data.Dataset, options: Options) -> Deployment:
    """The forward phase of every sample of `dataset` on `chosen`; `asked` is the target the user named."""
    began = time.perf_counter()
    with started(source, chosen, options, phases=("forward",)) as run:
        ready = time.perf_counter()
        seen = _seen(run, dataset, f"{source.name} on {chosen.name}")
        graph = run.graph
    predicted = np.asarray(seen.logits.argmax(axis=1), np.int64)
    correct = int((predicted == dataset.labels).sum())
    phase = graph.phase("forward")
    return Deployment(
        model=source.name,
        target=asked,
        ran_on=chosen.name,
        device=device_of(chosen, options),
        dataset=dataset.name,
        samples=len(predicted),
        correct=correct,
        accuracy=correct / len(predicted),
        time_steps=phase.time_steps,
        timing=phase.timing.mode,
        startup_seconds=ready - began,
        seconds=seen.seconds,
        samples_per_second=len(predicted) / seen.seconds,
        spikes_per_sample=seen.spikes / len(predicted),
        synaptic_operations_per_sample=None if seen.operations is None else seen.operations / len(predicted),
        saturations=seen.saturations,
        clipped_currents=seen.clipped_currents,
        versions=versions(),
        predictions=predicted,
        labels=np.asarray(dataset.labels, np.int64),
        logits=seen.logits,
        rates=seen.rates,
    )


@dataclass(frozen=True)
class _Seen:
    """What a data set left behind on a target; sums over all samples, `seconds` of the target alone."""

    logits: npt.NDArray[np.float64]
    rates: dict[str, npt.NDArray[np.float64]]
    spikes: float
    operations: float | None
    saturations: int
    clipped_currents: int
    seconds: float


def _seen(run: Executable, dataset: data.Dataset, label: str) -> _Seen:
    """Every sample through a target, `CHUNK` at a time: of large networks no more is kept than fits in memory."""
    graph = run.graph
    phase = graph.phase("forward")
    couples = graph.of_kind("couple")
    kept = max(1, RATE_VALUES // sum(prod(population.shape) for population in couples))
    fan_outs = codec.weights_met(graph, phase) if phase.synapses else None
    logits: list[Any] = []
    rates: dict[str, list[Any]] = {population.name: [] for population in couples}
    spikes = operations = seconds = 0.0
    saturations = clipped = 0
    starts = range(0, len(dataset), CHUNK)
    for first in track(starts, label, total=len(starts)):
        images = dataset.images[first : first + CHUNK]
        began = time.perf_counter()
        result = run.run(images)
        seconds += time.perf_counter() - began
        logits.append(codec.logits(graph, result))
        for name, found in rates.items():
            spikes += float(result.activity[name].sum())
            if first < kept:
                found.append(codec.rates(graph, result, name)[: kept - first])
        if fan_outs is not None:
            operations += float(codec.synaptic_operations(graph, result, inputs=images, fan_outs=fan_outs).sum())
        saturations += sum(int(s.sum()) for s in result.saturations.values())
        clipped += codec.clipped_currents(graph, images)
    return _Seen(
        np.concatenate(logits),
        {name: np.concatenate(found) for name, found in rates.items()},
        spikes,
        None if fan_outs is None else operations,
        saturations,
        clipped,
        seconds,
    )


def sample_shape(source: Source, dataset: str) -> tuple[int | None, int | None]:
    """The number of frames and the size, as `data.load` takes them, that a data set of events or large images is brought to for this model."""
    if source.module is not None:
        return source.module.time_steps, data.size_for(dataset, source.module.input_shape)
    if source.artifact is None:
        return None, None
    graph = source.artifact.graph
    return graph.phase("forward").time_steps, data.size_for(dataset, graph.of_kind("input")[0].shape)


def available(target: str, fallback: str | None = None, *, instead: str = "add --fallback sim to run there instead") -> Target:
    """The target called `target`, or `fallback` where it is missing here (said on stderr).

    UsageError where neither can run: it ends in `instead`, what to do where the target cannot be installed.
    """
    chosen = get(target)
    other = None if fallback is None else get(fallback)
    missing = chosen.available()
    if missing is None:
        return chosen
    if other is None:
        raise UsageError(f"{missing}; or {instead}")
    still = other.available()
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
    """The module itself, where target torch is asked for what the module can do: counts and rates, no traces."""
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
        graph = outline(source.module)
    else:
        graph = lowered(source)
        graph = Fold()(forward_only(graph)) if forward else FLOAT_PIPELINE.until("adjoint")(graph)
    batch = None if options.batch == "auto" else _batch(options.batch)
    return ModuleRun(source.module, graph, device=options.device, batch=batch)


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
