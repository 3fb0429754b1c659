"""Run a data set through a target and record what came out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from toolchain import codec, data, devices
from toolchain.compiler import executable, forward_only, graph_for, lowered
from toolchain.errors import UsageError
from toolchain.files import ready_folder, replace_file
from toolchain.module_run import ModuleRun
from toolchain.passes import FLOAT_PIPELINE
from toolchain.progress import say, track
from toolchain.source import Model, Source, find
from toolchain.target import Executable, Result, Target, get, join
from toolchain.versions import versions

if TYPE_CHECKING:
    from toolchain.layers import FeedbackSNN

CHUNK = 256
"""Samples handed to a target at a time: a progress bar's step."""


@dataclass(frozen=True)
class Deployment:
    """One data set on one target. Accuracies are fractions of 1; `seconds` leaves out start-up and compilation (`startup_seconds`).

    Synaptic operations are None where target torch ran a network that has no graph yet: they are counted on graphs.
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
    time_steps, size = _shape_of(source, dataset)
    loaded = data.load(dataset, samples=samples, data_dir=data_dir, time_steps=time_steps, image_size=size)
    if predictions is not None:
        _require_place(Path(predictions))
    deployment = classify(source, chosen, target, loaded, Options(batch, synapses, device))
    if predictions is not None:
        write_predictions(deployment, Path(predictions))
    return deployment


def classify(source: Source, chosen: Target, asked: str, dataset: data.Dataset, options: Options) -> Deployment:
    """The forward phase of every sample of `dataset` on `chosen`; `asked` is the target the user named."""
    if chosen.name == "torch" and source.module is not None:
        from toolchain.lower import not_compiled

        reason = not_compiled(source.module)
        if reason is not None:
            say(f"toolchain: {reason}; target torch runs the module all the same, without a count of synaptic operations")
            return _module_alone(source, chosen, asked, dataset, options)
    began = time.perf_counter()
    with started(source, chosen, options, phases=("forward",)) as run:
        ready = time.perf_counter()
        result = _all(run, dataset.images, f"{source.name} on {chosen.name}")
        done = time.perf_counter()
        graph = run.graph
    scores = codec.logits(graph, result)
    predicted = np.asarray(scores.argmax(axis=1), np.int64)
    correct = int((predicted == dataset.labels).sum())
    couples = [p.name for p in graph.of_kind("couple")]
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
        seconds=done - ready,
        samples_per_second=len(predicted) / (done - ready),
        spikes_per_sample=float(sum(result.activity[name].sum() for name in couples) / len(predicted)),
        synaptic_operations_per_sample=float(codec.synaptic_operations(graph, result, inputs=dataset.images).mean()),
        saturations=int(sum(int(s.sum()) for s in result.saturations.values())),
        clipped_currents=sum(codec.clipped_currents(graph, dataset.images[i : i + CHUNK]) for i in range(0, len(predicted), CHUNK)),
        versions=versions(),
        predictions=predicted,
        labels=np.asarray(dataset.labels, np.int64),
        logits=scores,
        rates={name: codec.rates(graph, result, name).astype(np.float64) for name in couples},
    )


def _module_alone(source: Source, chosen: Target, asked: str, dataset: data.Dataset, options: Options) -> Deployment:
    """A module that has no graph yet, on torch."""
    import copy

    import torch

    began = time.perf_counter()
    module = copy.deepcopy(cast("FeedbackSNN", source.module)).to(devices.pick(options.device)).eval()
    size = CHUNK if options.batch == "auto" else _batch(options.batch)
    starts = range(0, len(dataset), size)
    ready = time.perf_counter()
    scores, rates, spikes = [], [], 0
    with torch.no_grad():
        for start in track(starts, f"{source.name} on {chosen.name}", total=len(starts)):
            images = torch.from_numpy(np.ascontiguousarray(dataset.images[start : start + size]))
            found = module.equilibrium(images.to(next(module.parameters()).device))
            scores.append(module.logits(module.readout_rates(found)).double().cpu().numpy())
            rates.append([found.rates[layer].double().cpu().numpy() for layer in module.spiking])
            spikes += sum(int(found.counts[layer].sum()) for layer in module.spiking)
    done = time.perf_counter()
    logits = np.concatenate(scores)
    predicted = np.asarray(logits.argmax(axis=1), np.int64)
    correct = int((predicted == dataset.labels).sum())
    return Deployment(
        model=source.name,
        target=asked,
        ran_on=chosen.name,
        device=device_of(chosen, options),
        dataset=dataset.name,
        samples=len(predicted),
        correct=correct,
        accuracy=correct / len(predicted),
        time_steps=module.time_steps,
        timing="step",
        startup_seconds=ready - began,
        seconds=done - ready,
        samples_per_second=len(predicted) / (done - ready),
        spikes_per_sample=spikes / len(predicted),
        synaptic_operations_per_sample=None,
        saturations=0,
        clipped_currents=0,
        versions=versions(),
        predictions=predicted,
        labels=np.asarray(dataset.labels, np.int64),
        logits=logits,
        rates={f"hidden{layer + 1}": np.concatenate(parts) for layer, parts in zip(module.spiking, zip(*rates, strict=True), strict=True)},
    )


def _shape_of(source: Source, dataset: str) -> tuple[int | None, int | None]:
    """The number of frames and the size that a data set of events or large images is brought to for this model."""
    if source.module is None:
        return None, None
    return source.module.time_steps, data.size_for(dataset, source.module.input_shape)


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
    if chosen.name == "torch" and source.module is not None and not options.trace:
        batch = {} if options.batch == "auto" else {"batch": _batch(options.batch)}
        run: Executable = ModuleRun(source.module, FLOAT_PIPELINE.until("adjoint")(lowered(source)), device=options.device, **batch)
    else:
        graph = graph_for(source, configured)
        run = executable(configured, forward_only(graph) if phases == ("forward",) else graph)
    with run:
        yield run


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


def _all(run: Executable, images: data.Images, label: str) -> Result:
    starts = range(0, len(images), CHUNK)
    return join([run.run(images[i : i + CHUNK]) for i in track(starts, label, total=len(starts))])


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
