"""A graph as a table and as JSON: populations, phases, synapses, units, and what rounding did."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from toolchain.ir import Graph, Phase, Synapse, weight_of
from toolchain.versions import versions


@dataclass(frozen=True)
class Inspection:
    """A graph, ready to be shown."""

    graph: Graph
    target: str

    def to_json(self) -> dict[str, Any]:
        graph = self.graph
        return {
            "model": graph.provenance.model,
            "source_sha256": graph.provenance.source_sha256,
            "target": self.target,
            "numbers": graph.units.numbers,
            "passes": list(graph.provenance.passes),
            "neurons": sum(prod(p.shape) for p in graph.of_kind("couple")),
            "parameters": sum(graph.tensors[name].size for name in graph.tensors),
            "populations": [{"name": p.name, "kind": p.kind, "shape": list(p.shape)} for p in graph.populations],
            "phases": [_phase_json(graph, phase) for phase in graph.phases],
            "notes": list(graph.provenance.notes),
            "rounding": {
                name: {"exponent": r.exponent, "max_error": r.max_error, "rms_error": r.rms_error, "clipped": r.clipped}
                for name, r in graph.provenance.rounding.items()
            },
            "device": "cpu",
            "versions": versions(),
        }

    def to_text(self) -> str:
        graph = self.graph
        lines = [
            f"{graph.provenance.model} for {self.target}: {graph.units.numbers} graph, passes {' -> '.join(graph.provenance.passes) or 'none'}",
            *table(
                ["population", "kind", "shape", "neurons"],
                [[p.name, p.kind, "x".join(map(str, p.shape)), f"{prod(p.shape):,}"] for p in graph.populations],
            ),
        ]
        for phase in graph.phases:
            lines += ["", *_phase_lines(graph, phase)]
        lines += [f"note: {note}" for note in graph.provenance.notes]
        if graph.provenance.rounding:
            rows = [
                [n, str(r.exponent), f"{r.max_error:.2g}", f"{r.rms_error:.2g}", str(r.clipped)]
                for n, r in graph.provenance.rounding.items()
            ]
            lines += ["", "rounding, in the model's units", *table(["tensor", "exponent", "largest error", "rms error", "clipped"], rows)]
        return "\n".join(lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Aligned columns of text: first column left, the others right."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in cells
    ]


def _phase_json(graph: Graph, phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "time_steps": phase.time_steps,
        "timing": phase.timing.mode,
        "ticks": phase.ticks,
        "order": list(phase.order),
        "synapses": [
            {
                "source": s.source,
                "target": s.target,
                "delay": s.delay,
                "gate": s.gate,
                "operations": _operations(s),
                "weights": _weights(graph, s),
            }
            for s in phase.synapses
        ],
        "dynamics": {
            name: {"members": d.members, "threshold": d.threshold, "reset": d.reset, "leak": d.leak, "scale": graph.scale(phase.name, name)}
            for name, d in phase.dynamics.items()
        },
        "drive": [{"population": d.population, "source": d.source, "exponent": d.exponent, "gain": d.gain} for d in phase.drive],
    }


def _phase_lines(graph: Graph, phase: Phase) -> list[str]:
    unit = "ticks" if phase.timing.mode != "step" else "steps"
    lines = [f"phase {phase.name}: {phase.time_steps} time steps, {phase.timing.mode} timing, {phase.ticks} {unit}"]
    neurons = [n for n in phase.order if n in phase.dynamics]
    rows = [
        [n, (d := phase.dynamics[n]).members, f"{d.threshold:,}", f"{d.reset:,}", f"{d.leak:g}", f"{graph.scale(phase.name, n):.6g}"]
        for n in neurons
    ]
    lines += table(["neurons", "members", "threshold", "reset", "leak", "units per 1.0"], rows)
    synapses = [
        [f"{s.source} -> {s.target}", _operations(s), f"{_weights(graph, s):,}", str(s.delay), s.gate or "-"] for s in phase.synapses
    ]
    for drive in phase.drive:
        ops = " ".join(str(weight_of(op)) for op in drive.ops) or "error"
        synapses.append([f"host -> {drive.population}", ops, f"exponent {drive.exponent}", "-", "-"])
    return lines + table(["connection", "operations", "weights", "delay", "gate"], synapses)


def _operations(synapse: Synapse) -> str:
    names = []
    for op in synapse.ops:
        exponent = getattr(op, "exponent", 0)
        weight = weight_of(op)
        mark = "^T" if getattr(op, "transpose", False) else ""
        names.append(type(op).__name__ if weight is None else f"{weight}{mark}" + (f" << {exponent}" if exponent else ""))
    return ", ".join(names)


def _weights(graph: Graph, synapse: Synapse) -> int:
    return sum(int(graph.tensors[name].size) for op in synapse.ops if (name := weight_of(op)) is not None)
