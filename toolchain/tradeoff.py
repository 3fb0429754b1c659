"""Accuracy, energy and time steps against each other: one network at several weight bits and time steps, and the front that no other point beats."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolchain import data
from toolchain.analysis.prices import Prices, inference, prices
from toolchain.analysis.workload import Tally
from toolchain.compiler import uncompiled
from toolchain.deploy import Options, device_of
from toolchain.errors import ToolchainError, UsageError
from toolchain.estimate import CHIP, charge_graph, load_for
from toolchain.estimation import COUNTED_ON, Charged, Figure, in_joules, in_seconds
from toolchain.files import replace_file
from toolchain.ir import LARGEST_STEPS, Array, Graph
from toolchain.notation import table
from toolchain.progress import track
from toolchain.source import Model, Source
from toolchain.sweep import Search, folded_and_rest, front, rest_of
from toolchain.target import Result, get
from toolchain.tune import PICTURES, WEIGHT_BITS, place_for
from toolchain.versions import versions

__all__ = ["PricedPoint", "Tradeoff", "tradeoff"]

NANOJOULE = 1e-9

USUAL_BITS = (8, 6, 4, 3)


@dataclass(frozen=True)
class PricedPoint:
    """One number of weight bits and of time steps. `energy` is SPIDE's E_fwd, joules a sample; `chip_energy` and `chip_seconds` are SANA-FE's, None where it did not
    run; `drop` in points against the float model. `pareto`: no other point is at least as accurate with less `energy`."""

    weight_bits: int
    time_steps: int
    accuracy: float
    drop: float
    energy: float
    synaptic_operations_per_sample: float
    spikes_per_sample: float
    chip_energy: float | None
    chip_seconds: float | None
    pareto: bool = False

    @property
    def name(self) -> str:
        return f"{self.weight_bits} bits, T {self.time_steps}"


@dataclass(frozen=True)
class Tradeoff:
    """What `tradeoff` found. `reference` is the float model's accuracy at its own `time_steps`; `chip_missing` says in a sentence why SANA-FE charged nothing."""

    model: str
    dataset: str
    samples: int
    input: str
    timing: str
    time_steps: int
    reference: float
    points: tuple[PricedPoint, ...]
    prices: Prices
    chip_samples: int
    chip_source: str | None
    chip_missing: str | None
    refused: tuple[str, ...]
    notes: tuple[str, ...]
    picture: Path | None
    device: str
    seconds: float
    versions: dict[str, str]

    @property
    def counted(self) -> str:
        return f"{COUNTED_ON}, the first {self.samples:,} samples of {self.dataset}"

    def to_json(self) -> dict[str, Any]:
        names = ("model", "dataset", "samples", "input", "timing", "time_steps", "chip_samples", "device", "seconds", "versions")
        return {
            **{name: getattr(self, name) for name in names},
            "target": COUNTED_ON,
            "reference": Figure(self.reference, "fraction of 1", "simulated", f"torch, the same samples at T {self.time_steps}").to_json(),
            "points": [self._point(point) for point in self.points],
            "sanafe_missing": self.chip_missing,
            "refused": list(self.refused),
            "notes": list(self.notes),
            "picture": None if self.picture is None else str(self.picture),
        }

    def _point(self, point: PricedPoint) -> dict[str, Any]:
        def simulated(value: float, unit: str, source: str = self.counted) -> dict[str, Any]:
            return Figure(value, unit, "simulated", source).to_json()

        chip = None
        if point.chip_energy is not None and point.chip_seconds is not None and self.chip_source is not None:
            chip = {
                "energy": simulated(point.chip_energy, "J a sample", self.chip_source),
                "latency": simulated(point.chip_seconds, "s a sample", self.chip_source),
            }
        return {
            "weight_bits": point.weight_bits,
            "time_steps": point.time_steps,
            "accuracy": simulated(point.accuracy, "fraction of 1"),
            "drop": simulated(point.drop, "points below the float model"),
            "energy": Figure(point.energy, "J a sample", "declared", f"{self.prices.source}; counts: {self.counted}").to_json(),
            "synaptic_operations": simulated(point.synaptic_operations_per_sample, "synaptic operations a sample"),
            "spikes": simulated(point.spikes_per_sample, "spikes a sample"),
            "sanafe": chip,
            "pareto": point.pareto,
        }

    def to_text(self) -> str:
        charged = any(point.chip_energy is not None for point in self.points)
        head = [
            "bits",
            "T",
            "accuracy %",
            "drop",
            "E_fwd",
            "SynOps/sample",
            "spikes/sample",
            *(["SANA-FE", "latency"] if charged else []),
            "",
        ]
        rows = [_cells(point, charged) for point in sorted(self.points, key=_cost)]
        lines = [
            f"{self.model} on {self.counted}, --input {self.input}, {self.timing} timing",
            f"float model: {100 * self.reference:.2f} % at T {self.time_steps} (simulated: torch, the same samples)",
            "",
            *table(head, rows, left=0),
            "",
            "front: no other point is at least as accurate with less energy",
            f"E_fwd a sample, declared: {self.prices.source}; E_MAC {in_joules(self.prices.mac)} and E_AC {in_joules(self.prices.accumulate)} at all bits",
            f"everything else, simulated: {self.counted}",
        ]
        if charged:
            lines.append(f"SANA-FE and latency a sample, simulated on the first {self.chip_samples:,}: {self.chip_source}")
        if self.chip_missing is not None:
            lines.append(f"SANA-FE: {self.chip_missing}")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"does not fit: {sentence}" for sentence in self.refused]
        lines += [] if self.picture is None else [f"wrote {self.picture}"]
        return "\n".join(lines)


def _cells(point: PricedPoint, charged: bool) -> list[str]:
    chip = []
    if charged:
        chip = [
            "-" if point.chip_energy is None else in_joules(point.chip_energy),
            "-" if point.chip_seconds is None else in_seconds(point.chip_seconds),
        ]
    return [
        f"{point.weight_bits}",
        f"{point.time_steps}",
        f"{100 * point.accuracy:.2f}",
        f"{point.drop:+.2f}",
        in_joules(point.energy, 4),
        f"{point.synaptic_operations_per_sample:,.0f}",
        f"{point.spikes_per_sample:,.0f}",
        *chip,
        "front" if point.pareto else "",
    ]


def _cost(point: PricedPoint) -> tuple[float, float, int, int]:
    """The order of the front: least energy, then the higher accuracy, then fewer bits and steps."""
    return (point.energy, -point.accuracy, point.weight_bits, point.time_steps)


def tradeoff(
    model: Model,
    *,
    dataset: str = "mnist-1k",
    samples: int | None = None,
    weight_bits: Sequence[int] = USUAL_BITS,
    time_steps: Sequence[int] | None = None,
    chip_samples: int = 0,
    mac_pj: float | None = None,
    ac_pj: float | None = None,
    picture: str | os.PathLike[str] | None = None,
    device: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
) -> Tradeoff:
    """Accuracy, E_fwd and synaptic operations of `model` at every one of `weight_bits` and `time_steps` (by default T, T/2, T/4, ... 1), on the first `samples` test
    samples of `dataset` (all by default), run on `sim`; with `chip_samples` also SANA-FE's energy and latency of so many of them.

    It shows and chooses nothing: to choose, `tune` judges by samples that no accuracy is reported on. `picture` draws the points (.png or .svg). A .fsnn file keeps
    its input, timing, calibration and chip. Raises UsageError for a bad option and DesignRuleError where no point fits the chip.
    """
    cost = prices(mac_pj, ac_pj)
    place = place_for(picture, PICTURES, "picture")
    if chip_samples < 0:
        raise UsageError(f"chip_samples is {chip_samples}: give a whole number from 0")
    source, notes = uncompiled(model)
    base, rest = folded_and_rest(source, None)
    bits, steps = _whole("weight_bits", weight_bits, WEIGHT_BITS[-1], WEIGHT_BITS[0]), _steps(base, time_steps)
    loaded = load_for(source, base, dataset, samples, data_dir)
    meters: dict[int, Tally] = {}

    def watch(graph: Graph, result: Result, images: Array) -> None:
        meter = meters.setdefault(id(graph), Tally(graph, "forward", history=False))
        meter.see(result, images=images)

    began = time.perf_counter()
    search = Search(source, base, rest, loaded, 0.0, Options(device=device), watch)
    points, missing, chip_source = [], None, None
    grid = [(b, t) for t in steps or search.coarse() for b in bits]
    for b, t in track(grid, f"estimating {source.name}"):
        meters.clear()
        found = search.point(b, t)
        if found is None:
            continue
        (meter,) = meters.values()
        energy = inference(meter.counts(), cost).forward
        charged = _charged(source, base, loaded, b, t, chip_samples) if chip_samples else Charged()
        missing = charged.missing or missing
        charges = charged.phases.get("forward")
        if charges is not None:
            chip_source = f"{charges.architecture}; prices: {charges.source}"
        points.append(
            PricedPoint(
                b,
                t,
                found.accuracy,
                found.drop,
                energy,
                found.synaptic_operations_per_sample,
                found.spikes_per_sample,
                None if charges is None else charges.energy_per_sample()["total"],
                None if charges is None else charges.seconds_per_sample(),
            )
        )
    search.require_points()
    best = front(points, _cost)
    points = [replace(point, pareto=(point.weight_bits, point.time_steps) in best) for point in points]
    forward = rest(base).phase("forward")
    made = Tradeoff(
        model=source.name,
        dataset=loaded.name,
        samples=len(loaded),
        input="bias" if any(drive.source == "input" for drive in forward.drive) else "graded",
        timing=forward.timing.mode,
        time_steps=search.steps,
        reference=search.reference.accuracy,
        points=tuple(points),
        prices=cost,
        chip_samples=min(chip_samples, len(loaded)),
        chip_source=chip_source,
        chip_missing=missing,
        refused=tuple(search.refused),
        notes=notes,
        picture=place,
        device=device_of(search.target, Options(device=device)),
        seconds=time.perf_counter() - began,
        versions=versions(),
    )
    if place is not None:
        _draw(made, place)
    return made


def _whole(name: str, numbers: Sequence[int], least: int, most: int) -> list[int]:
    """The numbers, each once, largest first; UsageError unless all are whole numbers from `least` to `most`."""
    if len(numbers) == 0 or not all(least <= n <= most for n in numbers):
        raise UsageError(f"{name} are {', '.join(map(str, numbers)) or 'none'}: give whole numbers from {least} to {most:,}")
    return sorted(set(numbers), reverse=True)


def _steps(base: Graph, asked: Sequence[int] | None) -> list[int] | None:
    """The time steps asked for; None: the search's own."""
    if asked is None:
        return None
    steps, own = _whole("time_steps", asked, 1, LARGEST_STEPS), base.phase("forward").time_steps
    if base.of_kind("input")[0].events and steps != [own]:
        raise UsageError(f"the time steps of '{base.provenance.model}' are the {own} frames of its events: leave --time-steps out")
    return steps


def _charged(source: Source, base: Graph, dataset: data.Dataset, bits: int, steps: int, samples: int) -> Charged:
    """What SANA-FE charges for the forward phase of one point."""
    target = get(CHIP)
    missing = target.available()
    if missing is not None:
        return Charged(missing=missing)
    pipeline = rest_of(target.pipeline, base, source, None).with_options(quantize={"weight_bits": bits})
    try:
        graph = pipeline(base.in_steps({"forward": steps}))
    except ToolchainError as refusal:
        return Charged(missing=str(refusal))
    return charge_graph(target, graph, dataset, samples, None)


def _draw(made: Tradeoff, place: Path) -> None:
    from toolchain.report.pareto import pareto

    drawn = pareto(
        made.points,
        None,
        model=made.model,
        samples=f"first {made.samples:,} test samples of {made.dataset}",
        time_steps=made.time_steps,
        reference=made.reference,
        max_drop=None,
        cost=lambda point: point.energy / NANOJOULE,
        what="energy",
        unit="E_fwd, nJ a sample (SPIDE's estimate)",
    )
    replace_file(place, drawn.svg if place.suffix == ".svg" else drawn.png)
