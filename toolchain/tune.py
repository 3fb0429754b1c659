"""Fewer weight bits and time steps: the cheapest network that still answers nearly as well, and what each step towards it costs."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from toolchain import artifact, checkpoint, data, models
from toolchain.artifact import Artifact
from toolchain.compiler import assembled
from toolchain.deploy import Options, classify, device_of
from toolchain.errors import UsageError
from toolchain.files import ready_folder, replace_file
from toolchain.ir import Graph
from toolchain.notation import table
from toolchain.source import Model, Source, find
from toolchain.sweep import Point, Reference, Search, cost_of, folded_and_rest, rest_of
from toolchain.target import get
from toolchain.versions import versions

WEIGHT_BITS = (8, 7, 6, 5, 4, 3, 2)
"""What is searched: all that the chip takes."""

WRITTEN_FOR = "lava-sim"
"""The target of the artefact that is written, as `compile` has it by default."""

HELD_OUT = 5000
"""Samples that points are judged by where training held none out; of small sets a fifth."""

PICTURES = (".png", ".svg")


@dataclass(frozen=True)
class Check:
    """The chosen point once on the test set, which the search never sees."""

    samples: int
    reference_accuracy: float
    accuracy: float
    drop: float


@dataclass(frozen=True)
class Tuned:
    """What `tune` found. `samples` held-out training samples judged all points; `chosen` is None where no point is within `max_drop` points, and
    `nearest` is then the one that came closest. `refused` says which points do not fit the chip. `notes` are for the reader."""

    model: str
    dataset: str
    samples: int
    input: str
    timing: str
    max_drop: float
    reference: Reference
    points: tuple[Point, ...]
    chosen: Point | None
    nearest: Point
    test: Check | None
    refused: tuple[str, ...]
    notes: tuple[str, ...]
    output: Path | None
    picture: Path | None
    device: str
    seconds: float
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        return self.chosen is not None

    @property
    def shortfall(self) -> str:
        """What to say where no point is within the drop."""
        return (
            f"no point of '{self.model}' is within {self.max_drop:g} points of the float model's {100 * self.reference.accuracy:.2f} %: the nearest is "
            f"{self.nearest.name} with {100 * self.nearest.accuracy:.2f} %, so allow --max-drop {ceil(100 * self.nearest.drop) / 100:g}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "dataset": self.dataset,
            "split": "train",
            "samples": self.samples,
            "input": self.input,
            "timing": self.timing,
            "max_drop_points": self.max_drop,
            "passed": self.passed,
            "reference": {"target": "torch", **asdict(self.reference)},
            "chosen": None if self.chosen is None else asdict(self.chosen),
            "nearest": asdict(self.nearest),
            "test": None if self.test is None else asdict(self.test),
            "points": [asdict(point) for point in self.points],
            "refused": list(self.refused),
            "notes": list(self.notes),
            "output": None if self.output is None else str(self.output),
            "picture": None if self.picture is None else str(self.picture),
            "device": self.device,
            "seconds": self.seconds,
            "versions": self.versions,
        }

    def to_text(self) -> str:
        lines = [
            f"{self.model}, judged on the last {self.samples:,} training samples of {self.dataset}, --input {self.input}",
            f"float model: {100 * self.reference.accuracy:.2f} % at T {self.reference.time_steps}",
            "",
            f"points that no other beats at both accuracy and synaptic operations, of {len(self.points)} that were run:",
            *table(
                ["bits", "T", "accuracy %", "drop", "SynOps/sample", "spikes/sample", ""],
                [_cells(p, self.chosen) for p in sorted(self.points, key=cost_of) if p.pareto],
                left=0,
            ),
            "",
        ]
        if self.chosen is not None:
            first = next((p for p in self.points if (p.weight_bits, p.time_steps) == (8, self.reference.time_steps)), None)
            share = (
                ""
                if first is None
                else f", {_share(self.chosen, first)} of those at 8 bits and T {first.time_steps} ({first.synaptic_operations_per_sample:,.0f})"
            )
            lines.append(
                f"chosen: {self.chosen.name}: {self.chosen.synaptic_operations_per_sample:,.0f} synaptic operations a sample{share}"
            )
        if self.test is not None:
            lines.append(
                f"on {self.test.samples:,} test samples, which the search did not see: {100 * self.test.accuracy:.2f} %, "
                f"the float model {100 * self.test.reference_accuracy:.2f} % (drop {self.test.drop:.2f} points)"
            )
        if self.chosen is None:
            lines.append(f"nothing chosen: {self.shortfall}")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"does not fit: {sentence}" for sentence in self.refused]
        lines += [f"wrote {path}" for path in (self.output, self.picture) if path is not None]
        return "\n".join(lines)


def _cells(point: Point, chosen: Point | None) -> list[str]:
    return [
        f"{point.weight_bits}",
        f"{point.time_steps}",
        f"{100 * point.accuracy:.2f}",
        f"{point.drop:+.2f}",
        f"{point.synaptic_operations_per_sample:,.0f}",
        f"{point.spikes_per_sample:,.0f}",
        "chosen" if point == chosen else "",
    ]


def _share(point: Point, whole: Point) -> str:
    return f"{100 * point.synaptic_operations_per_sample / max(whole.synaptic_operations_per_sample, 1e-300):.1f} %"


def tune(
    model: Model,
    *,
    dataset: str | None = None,
    max_drop: float = 0.5,
    samples: int | None = None,
    input: str | None = None,
    output: str | os.PathLike[str] | None = None,
    picture: str | os.PathLike[str] | None = None,
    device: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
) -> Tuned:
    """Find the weight bits (8 to 2) and time steps (the model's own and fewer) with the fewest synaptic operations a sample at an accuracy at most
    `max_drop` points below the float model's at its own time steps.

    Points are judged by the last `samples` of the training split of `dataset`, never by test samples: by default as many as training held out, and the
    data set it trained on. All bits are run at T, T/2, T/4, ... 1; then, bits by bits, the fewest time steps within the drop are found by halving, taking accuracy
    and cost to rise with the time steps. Nothing is drawn at random. The chosen point is then run once on the test set (its first `samples`).
    A network of events keeps its time steps: they are its frames. `input` is "bias" or "graded"; a .fsnn file keeps its own, its levels, timing, calibration and chip.

    `output` writes the chosen network as an artefact (FILE.fsnn), `picture` the Pareto front (.png or .svg); nothing is written to `output` where no
    point is within the drop. Raises UsageError for a bad option, a missing data set, or one of other samples than the model takes.
    """
    if not 0 <= max_drop <= 100:
        raise UsageError(f"max_drop is {max_drop}: give points of accuracy from 0 to 100")
    places = [place_for(output, (".fsnn",), "artefact"), place_for(picture, PICTURES, "picture")]
    source = find(model)
    base, rest = folded_and_rest(source, input)
    name, held_out = _trained_on(model, source, base)
    chosen_set = name if dataset is None else dataset
    if chosen_set is None:
        raise UsageError(f"'{source.name}' does not say what it was trained on: name the data set with --dataset")
    judged_by, notes = _held_out(base, chosen_set, samples, held_out if chosen_set == name else None, data_dir)
    began = time.perf_counter()
    search = Search(source, base, rest, judged_by, max_drop, Options(device=device))
    search.run(WEIGHT_BITS)
    best = search.chosen()
    check = None if best is None else _check(search, best, chosen_set, samples, data_dir)
    if name not in (None, chosen_set):
        notes = (*notes, f"'{source.name}' was trained on {name}")
    if base.of_kind("input")[0].events:
        notes = (*notes, f"the time steps are the {search.steps} frames of its events: fewer are not searched")
    if best is not None and places[0] is not None:
        made = _artifact(source, base, input, best)
        artifact.write(made, places[0])
        notes = notes if source.artifact is None else (*notes, *_cut_anew(source.artifact.graph, made.graph))
    forward = search.compiled(best or search.nearest()).phase("forward")
    tuned = Tuned(
        model=source.name,
        dataset=chosen_set,
        samples=len(judged_by),
        input="bias" if any(drive.source == "input" for drive in forward.drive) else "graded",
        timing=forward.timing.mode,
        max_drop=float(max_drop),
        reference=search.reference,
        points=search.points(),
        chosen=best,
        nearest=search.nearest(),
        test=check,
        refused=tuple(search.refused),
        notes=notes,
        output=None if best is None else places[0],
        picture=places[1],
        device=device_of(search.target, Options(device=device)),
        seconds=time.perf_counter() - began,
        versions=versions(),
    )
    if places[1] is not None:
        _draw(tuned, places[1])
    return tuned


def place_for(path: str | os.PathLike[str] | None, endings: Sequence[str], what: str) -> Path | None:
    """A file can be written at `path`: found out before the work, not after."""
    if path is None:
        return None
    place = Path(path)
    if place.suffix not in endings:
        raise UsageError(f"the {what} '{place}' needs the ending {' or '.join(endings)}")
    if place.is_dir():
        raise UsageError(f"the {what} '{place}' is a folder: give the name of a file")
    ready_folder(place.parent)
    return place


def _trained_on(model: Model, source: Source, base: Graph) -> tuple[str | None, int | None]:
    """The data set a model was trained on and how many of its last training samples were held out; None where nothing says so."""
    if isinstance(model, (str, os.PathLike)) and source.module is not None:
        path = models.get(str(model)).weights if str(model) in models.names() else Path(model)
        train = checkpoint.read(path / checkpoint.NAME if path.is_dir() else path).about.config.train
        return train.dataset, train.held_out
    name = base.provenance.model
    return (models.get(name).training.dataset, None) if name in models.names() else (None, None)


def _held_out(
    base: Graph, name: str, samples: int | None, held_out: int | None, data_dir: str | os.PathLike[str] | None
) -> tuple[data.Dataset, tuple[str, ...]]:
    """The samples that points are judged by, and what to know of them."""
    whole = _load(base, name, "train", data_dir)
    count = samples if samples is not None else (held_out or min(HELD_OUT, len(whole) // 5))
    judged_by = data.hold_out(whole, count)[1]
    if held_out is not None and count > held_out:
        kept = "all of these samples" if held_out == 0 else f"these samples, but the last {held_out:,}"
        return judged_by, (f"training learned from {kept}: accuracies on them are too good, and drops may be",)
    return judged_by, ()


def _load(base: Graph, name: str, split: str, data_dir: str | os.PathLike[str] | None) -> data.Dataset:
    """A split of the data set in the model's size and frames; UsageError where its samples or classes are others than the model's."""
    source, model = base.of_kind("input")[0], base.provenance.model
    steps = base.phase("forward").time_steps if source.events else None
    loaded = data.load(name, split=split, data_dir=data_dir, time_steps=steps, image_size=data.size_for(name, source.shape))
    shape = loaded.images.shape[1 : 1 + len(source.shape)]
    if int(np.prod(shape)) != int(np.prod(source.shape)):
        raise UsageError(
            f"'{model}' takes samples of shape {source.shape} and those of '{name}' have {shape}: give the data set it was made for"
        )
    classes = int(np.prod(base.of_kind("readout")[0].shape))
    if int(loaded.labels.max()) >= classes:
        raise UsageError(
            f"'{model}' tells {classes} classes apart and '{name}' has {len(loaded.classes)}: give the data set it was made for"
        )
    return loaded


def _check(search: Search, point: Point, name: str, samples: int | None, data_dir: str | os.PathLike[str] | None) -> Check:
    whole = _load(search.base, name, "test", data_dir)
    tested = whole if samples is None else whole.part(0, min(samples, len(whole)))
    floats = classify(search.source, get("torch"), "torch", tested, search.options)
    right = search.judged(search.compiled(point), tested)[0]
    return Check(len(tested), floats.accuracy, right / len(tested), 100 * (floats.correct - right) / len(tested))


def _artifact(source: Source, base: Graph, input: str | None, point: Point) -> Artifact:
    """The artefact that `compile` makes of the same model with these bits and steps."""
    target = WRITTEN_FOR if source.artifact is None else source.artifact.target
    start = base.in_steps({"forward": point.time_steps})
    graph = rest_of(get(target).pipeline, base, source, input).with_options(quantize={"weight_bits": point.weight_bits})(start)
    return assembled(target, start, graph)


def _cut_anew(before: Graph, after: Graph) -> tuple[str, ...]:
    """A note where `after` spreads populations over several cores and `before`, which may have been compiled not to, spreads none."""
    cut = _cut(after)
    if not cut or before.placement is None or _cut(before):
        return ()
    named = ", ".join(f"'{name}'" for name in cut)
    return (f"partition cut {named} over several cores: a .fsnn file does not say whether it was compiled with partition.split=false",)


def _cut(graph: Graph) -> list[str]:
    """The populations of which no core holds all neurons."""
    cores = () if graph.placement is None else graph.placement.cores
    slices = Counter(piece.population for core in cores for piece in core.slices)
    return [population.name for population in graph.populations if slices[population.name] > 1]


def _draw(tuned: Tuned, place: Path) -> None:
    from toolchain.report.pareto import pareto

    drawn = pareto(
        tuned.points,
        tuned.chosen,
        model=tuned.model,
        samples=f"last {tuned.samples:,} training samples of {tuned.dataset}",
        time_steps=tuned.reference.time_steps,
        reference=tuned.reference.accuracy,
        max_drop=tuned.max_drop,
    )
    replace_file(place, drawn.svg if place.suffix == ".svg" else drawn.png)
