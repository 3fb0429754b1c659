"""One sample in full: spike rasters of every target beside each other, and the membrane potentials of a few telling neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from toolchain.report import pictures
from toolchain.report.page import Page
from toolchain.report.pictures import Lines, Picture, Train

if TYPE_CHECKING:
    from toolchain.comparison import Comparison, Trace
    from toolchain.target import History

RASTER_ROWS = 80
"""Couples that a raster shows, over all its populations."""
NEURONS = 4
"""Neurons whose potentials are drawn."""

Spikes = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float64]
Order = npt.NDArray[np.intp]


def section(page: Page, comparison: Comparison, traces: Sequence[Trace], phase: str) -> str:
    """HTML of the section for one phase; empty where no target recorded it."""
    traces = [trace for trace in traces if _histories(trace, phase)]
    if not traces:
        return ""
    populations = [name for name in _histories(traces[0], phase) if all(name in _histories(trace, phase) for trace in traces)]
    populations = populations[: pictures.POPULATIONS]
    sample, label = traces[0].sample, int(comparison.rows[0].deployment.labels[traces[0].sample])
    if phase == "forward":
        heading = f"One sample, forward phase: sample {sample}, label {label}"
        text = "Spikes of inference. Every target shows the same couples in the same order, those that fire most often on the first target on top."
    else:
        heading = f"The same sample, feedback phase, driven by its own error{_gain(comparison)}"
        text = "Signed spikes carry the implicit gradient: their mean is the feedback equilibrium beta. It is the count that matters, not the step. Positive couples on top, negative ones below."
    chosen = {name: _raster_order([_spikes(trace, phase, name) for trace in traces]) for name in populations}
    limit = max(RASTER_ROWS // len(populations), 12)
    rasters = [_raster(page, comparison, trace, traces[0], phase, chosen, limit) for trace in traces]
    parts = [f"<section>\n<h2>{escape(heading)}</h2>\n<p>{text} Couples silent on every target are left out.</p>", page.panels(rasters)]
    neurons = _neurons(traces, phase, populations)
    half = (len(neurons) + 1) // 2
    drawn = [_potentials(page, part, phase) for part in (neurons[:half], neurons[half:]) if part]
    parts.append(f"<h3>Membrane potentials</h3>\n<p>{POTENTIALS_TEXT}</p>\n{page.panels(drawn)}\n</section>")
    return "\n".join(parts)


POTENTIALS_TEXT = (
    "In units of the threshold, so that targets with different units compare; dashed lines mark the threshold. The potential is the one after reset "
    "and leak, so a spike shows as a drop and the line need not be crossed. In turn: neurons of middling activity, and those on which the targets differ most."
)


def _raster(page: Page, comparison: Comparison, trace: Trace, first: Trace, phase: str, chosen: Mapping[str, Order], limit: int) -> Picture:
    trains = []
    for name, order in chosen.items():
        spikes = _spikes(trace, phase, name)
        some = order[_spread(len(order), limit)]
        trains.append(Train(f"{name}: {len(some)} of {spikes.shape[1]} couples", spikes[:, some]))
    count = sum(int(np.abs(_spikes(trace, phase, name)).sum()) for name in chosen)
    row = comparison.rows[page.targets.index(trace.target)]
    answer = f" answers {int(row.deployment.predictions[trace.sample])}" if phase == "forward" else ""
    alike = "" if trace is first else _alike(trace, first, phase, chosen)
    return pictures.raster(
        f"raster-{phase}-{trace.target}",
        trains,
        title=trace.target + answer,
        colour=page.palette[trace.target] if phase == "forward" else None,
        alt=f"Spike raster of the {phase} phase of sample {trace.sample} on {trace.target}: {count:,} spikes",
        caption=f"{count:,} spikes{alike}.",
    )


def _potentials(page: Page, neurons: Sequence[Lines], phase: str) -> Picture:
    down = " (pointing down: \N{MINUS SIGN}1)" if phase == "feedback" else ""
    return pictures.potentials(
        f"potentials-{phase}",
        neurons,
        page.palette,
        signed=phase == "feedback",
        alt=f"Membrane potentials over the threshold in the {phase} phase on {', '.join(neurons[0].potentials)}, of "
        + ", ".join(neuron.label for neuron in neurons),
        caption=f"Triangles above the traces are spikes{down}, a line a target.",
    )


def _alike(trace: Trace, first: Trace, phase: str, names: Mapping[str, Order]) -> str:
    """How like the first target's spikes these are: share of couples with the same spike count, and of spikes at the same couple and step."""
    pairs = [(_spikes(trace, phase, name), _spikes(first, phase, name)) for name in names]
    same = np.concatenate([a.sum(axis=0, dtype=np.int64) == b.sum(axis=0, dtype=np.int64) for a, b in pairs])
    both = sum(int(((a == b) & (a != 0)).sum()) for a, b in pairs)
    either = sum(int(((a != 0) | (b != 0)).sum()) for a, b in pairs)
    shared = f", and {100 * both / either:.0f} % of the spikes at the same step" if either else ""
    return f"; as on {first.target}: the spike count of {100 * same.mean():.1f} % of all couples{shared}"


def _raster_order(spikes: Sequence[Spikes]) -> Order:
    """Couples that fire on any target, by their signed spike count on the first, largest on top."""
    active = np.flatnonzero(np.any([s.any(axis=0) for s in spikes], axis=0))
    counts = spikes[0].sum(axis=0, dtype=np.int64)[active]
    return active[np.argsort(-counts, kind="stable")]


def _spread(length: int, limit: int) -> Order:
    """At most `limit` of `length` places, evenly spread."""
    return np.unique(np.linspace(0, max(length - 1, 0), min(length, limit)).round().astype(np.intp))


def _neurons(traces: Sequence[Trace], phase: str, populations: Sequence[str]) -> list[Lines]:
    """`NEURONS` of them, from each population in turn."""
    orders = {name: _telling(traces, phase, name) for name in populations}
    pairs = [(name, order[rank]) for rank in range(NEURONS) for name, order in orders.items() if rank < len(order)]
    return [_lines(traces, phase, name, neuron) for name, neuron in pairs[:NEURONS]]


def _telling(traces: Sequence[Trace], phase: str, name: str) -> list[int]:
    """Neurons of a population worth a look: in turn one of middling activity, and the one whose potentials differ most between the targets."""
    spikes = _spikes(traces[0], phase, name)
    activity = np.abs(spikes).sum(axis=0, dtype=np.int64)
    ranked = np.argsort(activity, kind="stable")
    active = ranked[activity[ranked] > 0]
    candidates = active if len(active) else ranked
    middling = candidates[np.argsort(np.abs(np.arange(len(candidates)) - len(candidates) // 2), kind="stable")]
    own = _scaled(traces[0], phase, name)
    gap = sum((np.abs(_scaled(trace, phase, name) - own).mean(axis=0) for trace in traces[1:]), np.zeros(own.shape[1]))
    differing = np.argsort(-gap, kind="stable")
    turns = [int(n) for pair in zip(middling[:NEURONS], differing[:NEURONS], strict=False) for n in pair]
    return list(dict.fromkeys(turns))


def _lines(traces: Sequence[Trace], phase: str, name: str, neuron: int) -> Lines:
    shape = _histories(traces[0], phase)[name].spikes.shape[1:]
    place = ",".join(str(int(i)) for i in np.unravel_index(neuron, shape))
    spikes = {trace.target: _spikes(trace, phase, name)[:, neuron] for trace in traces}
    counts = ", ".join(str(int(s.sum())) for s in spikes.values())
    return Lines(
        f"{name}[{place}], spike count {counts}", {trace.target: _scaled(trace, phase, name)[:, neuron] for trace in traces}, spikes
    )


def _histories(trace: Trace, phase: str) -> dict[str, History]:
    """What a trace holds of one phase, of populations that can fire."""
    kept = trace.forward if phase == "forward" else trace.feedback
    return {name: history for name, history in kept.items() if trace.thresholds.get(phase, {}).get(name)}


def _spikes(trace: Trace, phase: str, name: str) -> Spikes:
    """(time_steps, neurons)"""
    spikes = _histories(trace, phase)[name].spikes
    return spikes.reshape(len(spikes), -1)


def _scaled(trace: Trace, phase: str, name: str) -> Floats:
    """Potentials over the threshold, (time_steps, neurons)."""
    potentials = np.asarray(_histories(trace, phase)[name].potentials, np.float64)
    return potentials.reshape(len(potentials), -1) / trace.thresholds[phase][name]


def _gain(comparison: Comparison) -> str:
    found = next((row.gradient for row in comparison.rows if row.gradient is not None), None)
    return "" if found is None else f" times {found.scale_factor:g}"
