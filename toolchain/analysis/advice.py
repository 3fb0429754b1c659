"""What to try where accuracy goes: of the largest factor, the options of `toolchain compile` that take it away or make it smaller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.analysis.factors import STEPS
from toolchain.data.packaged import TEST_ONLY
from toolchain.ir import Graph
from toolchain.limits import LOIHI2
from toolchain.passes.grids import the_weight
from toolchain.passes.quantize import LARGEST_PIXEL

FINE_LEVELS = 4095
"""Levels of an input that the host multiplies: sixteen times those of a pixel, and as exact."""


@dataclass(frozen=True)
class Advice:
    """One thing to try: `options` are flags for `toolchain compile`, empty where none of them makes it better; `factor` is what they are against."""

    factor: str | None
    sentence: str
    options: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"factor": self.factor, "sentence": self.sentence, "options": list(self.options)}


def advice(factor: str, graph: Graph, *, enough: int | None, dataset: str, saturations: Mapping[str, int]) -> Advice:
    """What to try against `factor` in integer `graph`. `enough` are time steps in which the float model loses little, `saturations` counts them by population;
    `dataset` is the one that was compared on, whose training images calibrate."""
    options, why = _options(factor, graph, enough, TEST_ONLY.get(dataset, dataset), saturations)
    if not options:
        return Advice(factor, why)
    return Advice(factor, f"compile with {' '.join(options)}, the rest as it is: {why}", options)


def nothing(why: str) -> Advice:
    """No advice, and why none."""
    return Advice(None, why)


def weight_bits(graph: Graph) -> int:
    """The fewest bits that hold every weight on the chip of an integer graph."""
    names = {str(the_weight(synapse.ops)) for phase in graph.phases for synapse in phase.synapses}
    low = min((int(graph.tensors[name].min(initial=0)) for name in names), default=0)
    high = max((int(graph.tensors[name].max(initial=0)) for name in names), default=0)
    return next(bits for bits in range(2, 65) if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1))


def _options(factor: str, graph: Graph, enough: int | None, dataset: str, saturations: Mapping[str, int]) -> tuple[tuple[str, ...], str]:
    forward = graph.phase("forward")
    calibrated = graph.provenance.calibration is not None
    hosted = any(drive.source == "input" for drive in forward.drive)
    graded = hosted and (graph.placement is None or graph.placement.chip != "loihi1")  # which has binary spikes only
    bits, most = weight_bits(graph), LOIHI2.weight_bits.value
    if factor == STEPS:
        if enough is None:
            return (), "more time steps do not bring it back: train the network in as few as it has here"
        return ("--time-steps", str(enough)), f"T {forward.time_steps} is too few to settle"
    if factor == "weights":
        if bits < most:
            return ("--weight-bits", str(most)), f"{bits} bits round too much"
        if not hosted:
            return ("--input", "bias"), "the host's integers hold the first connection more finely than 8 bits"
        return (), f"the chip has no more than {most} bits: clip the largest weights in training, which leaves the others finer steps"
    if factor == "input":
        return _input_options(graph, calibrated, dataset, hosted=hosted, graded=graded)
    if factor == "clipping":
        if graded:
            return ("--input", "graded"), "pixels on the chip meet no 13-bit register"
        return (
            (),
            "compile without --calibrate, which made room for smaller currents"
            if calibrated
            else "make the first connection's weights smaller",
        )
    if factor == "timing":
        return ("--timing", "exact"), "every population then makes the model's own steps, at more ticks"
    if factor == "saturation":
        return _saturation_options(graph, saturations, bits, calibrated)
    if not calibrated:
        return ("--calibrate", dataset), "room for real inputs instead of the worst case leaves finer units"
    wish = "a leak of k/4096 and larger thresholds" if factor == "leak" else "larger thresholds"
    return (), f"units are as fine as the images allow: train with {wish}"


def _input_options(graph: Graph, calibrated: bool, dataset: str, *, hosted: bool, graded: bool) -> tuple[tuple[str, ...], str]:
    source = graph.of_kind("input")[0]
    levels = round(graph.scale("forward", source.name))
    if levels < LARGEST_PIXEL:
        return ("--set", f"quantize.input_levels={LARGEST_PIXEL}"), f"an input of whole numbers from 0 to {levels} is coarse"
    if not hosted:
        if source.events:
            return (), f"events on the chip have no more than {levels} levels: scale them to fill these"
        return ("--input", "bias", "--set", f"quantize.input_levels={FINE_LEVELS}"), "the host multiplies finer levels than 8 bits"
    if not calibrated:
        return ("--calibrate", dataset), "room for real currents instead of the worst case leaves finer steps"
    if graded:
        return ("--input", "graded"), "pixels on the chip are not rounded to 13-bit currents"
    return ("--chip", "loihi2", "--input", "graded"), "pixels on that chip are not rounded to 13-bit currents"


def _saturation_options(graph: Graph, saturations: Mapping[str, int], bits: int, calibrated: bool) -> tuple[tuple[str, ...], str]:
    worst = max(saturations, key=lambda name: saturations[name], default="")
    steps = graph.phase("forward").time_steps
    if calibrated:
        return (), f"compile without --calibrate, which left '{worst}' too little room"
    if worst and graph.population(worst).kind == "readout" and steps > 1:
        return ("--time-steps", str(max(1, steps // 2))), f"the sums of '{worst}' pass 24 bit"
    return ("--weight-bits", str(max(2, bits - 1))), f"potentials of '{worst}' pass 24 bit, and coarser weights need smaller ones"
