"""How far the membranes of an integer graph can go, against the 24 bits that they have, beside what real inputs did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from toolchain.errors import GraphError
from toolchain.ir import POTENTIAL_LIMIT, Calibration, Graph
from toolchain.notation import table
from toolchain.passes.ranges import Range, ranges


@dataclass(frozen=True)
class Reach:
    """One population in one phase, in the integer graph's units.

    largest     the bound on |potential| (of a relay: on what it passes on) for any input and any error at all, and `share` of it of 24 bit
    arriving    the bound on what arrives in a step
    neurons     how many there are; `can_saturate` the fraction of 1 that can pass 24 bit at all
    seen        the largest |potential| on the calibration's inputs; None without calibration
    """

    phase: str
    population: str
    kind: str
    neurons: int
    largest: float
    arriving: float
    can_saturate: float
    seen: float | None

    @property
    def share(self) -> float:
        return self.largest / POTENTIAL_LIMIT

    @property
    def warning(self) -> str | None:
        if self.share <= 1:
            return None
        what = "a value of relay" if self.kind == "linear" else "the potential of"
        seen = (
            "no inputs were tried" if self.seen is None else f"the calibration's inputs reached {100 * self.seen / POTENTIAL_LIMIT:.1f} %"
        )
        return (
            f"in the worst case {what} '{self.population}' reaches {self.share:.2f} times 24 bit in phase '{self.phase}', which "
            f"{100 * self.can_saturate:.1f} % of its neurons can; {seen}"
        )


@dataclass(frozen=True)
class Saturation:
    """Every population that adds something up, phase after phase; the calibration that stands beside the bounds, if any."""

    rows: tuple[Reach, ...]
    calibration: Calibration | None

    @property
    def warnings(self) -> list[str]:
        return [row.warning for row in self.rows if row.warning is not None]

    def to_text(self) -> str:
        tried = "" if self.calibration is None else f"; seen: {self.calibration.samples:,} training samples of {self.calibration.dataset}"
        cells = [
            [
                row.phase,
                row.population,
                _of_limit(row.largest),
                _of_limit(row.arriving),
                f"{100 * row.can_saturate:.1f} %",
                _of_limit(row.seen),
            ]
            for row in self.rows
        ]
        head = ["phase", "population", "potential", "arriving", "can saturate", "seen"]
        lines = [f"worst case of any input and any error, in parts of 24 bit{tried}", *table(head, cells, left=2)]
        return "\n".join([*lines, *(f"note: {warning}" for warning in self.warnings)])

    def to_json(self) -> dict[str, Any]:
        return {
            "limit": POTENTIAL_LIMIT,
            "dataset": None if self.calibration is None else self.calibration.dataset,
            "samples": None if self.calibration is None else self.calibration.samples,
            "populations": [
                {
                    "phase": row.phase,
                    "population": row.population,
                    "neurons": row.neurons,
                    "potential_bound": _finite(row.largest),
                    "arriving_bound": _finite(row.arriving),
                    "can_saturate": row.can_saturate,
                    "seen": row.seen,
                }
                for row in self.rows
            ],
            "warnings": self.warnings,
        }


def _of_limit(value: float | None) -> str:
    if value is None:
        return "-"
    return "no bound" if np.isinf(value) else f"{value / POTENTIAL_LIMIT:.4f}"


def _finite(value: float) -> float | None:
    return None if np.isinf(value) else value


def saturation(graph: Graph, float_graph: Graph | None = None) -> Saturation:
    """The bounds of `passes.ranges` on every membrane of an integer graph, beside the calibration that its provenance keeps.

    `float_graph` tells the feedback phase's units, in which calibration saw it; without it only the forward phase has a `seen`.
    """
    if not graph.integer:
        raise GraphError("saturation is a question of integer graphs and this one is in floats: run the quantize pass")
    calibration = graph.provenance.calibration
    rows: list[Reach] = []
    for phase in graph.phases:
        bounds = ranges(graph, phase)
        for name in (name for name in phase.order if name in bounds.potential):
            potential = bounds.potential[name]
            rows.append(
                Reach(
                    phase=phase.name,
                    population=name,
                    kind=graph.population(name).kind,
                    neurons=int(np.prod(graph.population(name).shape)),
                    largest=potential.largest,
                    arriving=bounds.arriving[name].largest,
                    can_saturate=_can_saturate(potential),
                    seen=_seen(graph, float_graph, calibration, phase.name, name),
                )
            )
    return Saturation(tuple(rows), calibration)


def _can_saturate(potential: Range) -> float:
    return float(((potential.high > POTENTIAL_LIMIT) | (potential.low < -POTENTIAL_LIMIT)).mean())


def _seen(graph: Graph, float_graph: Graph | None, calibration: Calibration | None, phase: str, name: str) -> float | None:
    """What calibration saw, in the integer graph's units."""
    found = None if calibration is None else calibration.potential.get(phase, {}).get(name)
    if found is None or (float_graph is None and phase != "forward"):
        return None
    return found * graph.scale(phase, name) / (1.0 if float_graph is None else float_graph.scale(phase, name))
