"""A graph as a table and as JSON: populations, phases, synapses, units, where neurons live, and what rounding did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol

import msgspec

from toolchain.errors import UsageError
from toolchain.ir import Bias, Drive, Dynamics, Graph, Op, Phase, Population, Shape, Synapse, tensor_names, weight_of
from toolchain.notation import operation, operations, process_names, route, size, synapse_products, table
from toolchain.utilisation import utilisation
from toolchain.versions import versions

EXACT = 1e-12
"""An error this small is that of float64, not of whole numbers."""


@dataclass(frozen=True)
class Process:
    """What will run as one Lava process: a population, or a synapse of one phase.

    `ticks` has an entry a phase: of a population its first tick, the ticks from one of its time steps to the next, and how many steps it makes; of a
    synapse the delay in ticks between a spike of its source and its arrival. In the phases of `idle` it does nothing: a population without a part in them, a
    synapse of another phase, to which nothing is sent then (to Lava's own synapses silence). `connects` are the two ports that a synapse joins (None of
    a population), `gate` is the population whose mask multiplies what it carries.
    """

    name: str
    kind: str
    shape: str
    ticks: dict[str, dict[str, int]]
    ports: tuple[str, ...]
    connects: tuple[str, str] | None = None
    gate: str | None = None
    idle: tuple[str, ...] = ()


PORTS = {"couple": ("a_in", "s_out", "b_out"), "linear": ("a_in", "s_out", "b_out"), "readout": ("a_in",), "input": ("s_out",)}
"""Of a population's process: what arrives, what it sends in the forward phase and, times its mask, in the feedback phase."""

SYNAPSE_PORTS = ("s_in", "a_out")


def out_port(phase: str) -> str:
    """The port by which a population sends in a phase."""
    return "s_out" if phase == "forward" else "b_out"


def processes(graph: Graph) -> tuple[Process, ...]:
    """The processes of a graph in hardware time, populations first; UsageError before `retime`, where no ticks are set."""
    early = [phase.name for phase in graph.phases if phase.timing.mode == "step"]
    if early:
        raise UsageError(
            f"the {early[0]} phase has no ticks yet: processes exist from pass retime on, so leave --after out or name a later pass"
        )
    used = [p for p in graph.populations if any(p.name in phase.order for phase in graph.phases)]
    return (
        *(_population_process(graph, population) for population in used),
        *(
            _synapse_process(graph, phase, synapse, name)
            for phase in graph.phases
            for synapse, name in zip(phase.synapses, process_names(phase.synapses, phase.name), strict=True)
        ),
    )


def _population_process(graph: Graph, population: Population) -> Process:
    name = population.name
    ticks: dict[str, dict[str, int]] = {phase.name: _turns(phase, name) for phase in graph.phases if name in phase.order}
    idle = tuple(phase.name for phase in graph.phases if name not in phase.order)
    return Process(name, _kind(population.kind), size(population.shape), ticks, PORTS[population.kind], idle=idle)


def _synapse_process(graph: Graph, phase: Phase, synapse: Synapse, name: str) -> Process:
    return Process(
        name,
        "synapse",
        operations(graph, synapse.ops),
        {phase.name: {"delay": synapse.delay}},
        SYNAPSE_PORTS,
        (f"{synapse.source}.{out_port(phase.name)}", f"{synapse.target}.a_in"),
        synapse.gate,
        tuple(other.name for other in graph.phases if other is not phase),
    )


def _turns(phase: Phase, name: str) -> dict[str, int]:
    return {"start": phase.timing.start.get(name, 0), "period": phase.timing.period, "time_steps": phase.time_steps}


class Shown(Protocol):
    """What more there is to say of a graph, as text and as JSON."""

    def to_text(self) -> str: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Inspection:
    """A graph, ready to be shown. `written` are the pictures that were drawn of it, by flag; `analysis` is what `toolchain.analysis` found."""

    graph: Graph
    target: str
    with_processes: bool = False
    written: dict[str, Path] = field(default_factory=dict)
    analysis: Shown | None = None

    @property
    def stage(self) -> str:
        """The last pass it has been through, or "lower"."""
        return self.graph.provenance.passes[-1] if self.graph.provenance.passes else "lower"

    def to_json(self) -> dict[str, Any]:
        """Everything but the tensors; docs/compiling.md lists the entries."""
        graph = self.graph
        found: dict[str, Any] = {
            "model": graph.provenance.model,
            "source_sha256": graph.provenance.source_sha256,
            "target": self.target,
            "stage": self.stage,
            "numbers": graph.units.numbers,
            "passes": list(graph.provenance.passes),
            "neurons": sum(prod(p.shape) for p in graph.of_kind("couple")),
            "weights": _weights(graph),
            "populations": [_population_json(graph, p.name) for p in graph.populations],
            "phases": [_phase_json(graph, phase) for phase in graph.phases],
            "placement": None if graph.placement is None else utilisation(graph).to_json(),
            "notes": list(graph.provenance.notes),
            "rounding": {name: msgspec.structs.asdict(rounding) for name, rounding in graph.provenance.rounding.items()},
        }
        if self.with_processes:
            found["processes"] = [vars(process) for process in processes(graph)]
        if self.analysis is not None:
            found["analysis"] = self.analysis.to_json()
        return {**found, "pictures": {flag: str(path) for flag, path in self.written.items()}, "device": "cpu", "versions": versions()}

    def to_text(self) -> str:
        graph = self.graph
        neurons = sum(prod(p.shape) for p in graph.of_kind("couple"))
        passes = " -> ".join(graph.provenance.passes) or "none"
        size_text = f"{neurons:,} neurons, {_weights(graph):,} weights"
        lines = [
            f"{graph.provenance.model} for {self.target}: {graph.units.numbers} graph, passes {passes}; {size_text}",
            *table(
                ["population", "kind", "shape", "neurons"],
                [[p.name, _kind(p.kind) + ", events" * p.events, size(p.shape), f"{prod(p.shape):,}"] for p in graph.populations],
            ),
        ]
        for phase in graph.phases:
            lines += ["", *_phase_lines(graph, phase)]
        if graph.placement is not None:
            lines += ["", utilisation(graph).to_text()]
        if self.with_processes:
            lines += ["", *_process_lines(graph)]
        if self.analysis is not None:
            lines += ["", self.analysis.to_text(), ""]
        lines += [f"note: {note}" for note in graph.provenance.notes]
        lines += _rounding_lines(graph)
        return "\n".join([*lines, *(f"wrote {path}" for path in self.written.values())])


def _rounding_lines(graph: Graph) -> list[str]:
    """What rounding changed; what it kept is only counted."""
    changed = {n: r for n, r in graph.provenance.rounding.items() if r.max_error > EXACT or r.clipped}
    rows = [[n, str(r.exponent), f"{r.max_error:.2g}", f"{r.rms_error:.2g}", f"{r.clipped:,}"] for n, r in changed.items()]
    lines = (
        ["", "rounding, in the model's units", *table(["tensor", "exponent", "largest error", "rms error", "clipped"], rows)]
        if rows
        else []
    )
    kept = len(graph.provenance.rounding) - len(changed)
    return [*lines, f"rounding left {kept} {'others' if rows else 'tensors'} as they were"] if kept else lines


def _kind(kind: str) -> str:
    return "relay" if kind == "linear" else kind


def _weights(graph: Graph) -> int:
    """How many weights the connections of all phases have, each tensor once."""
    biases = {bias.tensor for phase in graph.phases for several in phase.bias.values() for bias in several}
    biases |= {drive.bias for phase in graph.phases for drive in phase.drive if drive.bias is not None}
    names = {name for phase in graph.phases for name in tensor_names(phase)} - biases
    return sum(int(graph.tensors[name].size) for name in names)


def _population_json(graph: Graph, name: str) -> dict[str, Any]:
    population = graph.population(name)
    return {
        "name": name,
        "kind": _kind(population.kind),
        "shape": list(population.shape),
        "neurons": prod(population.shape),
        "events": population.events,
    }


def _phase_json(graph: Graph, phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "time_steps": phase.time_steps,
        "timing": phase.timing.mode,
        "period": phase.timing.period,
        "flush": phase.timing.flush,
        "ticks": phase.ticks,
        "order": list(phase.order),
        "synapses": [
            {
                "source": s.source,
                "target": s.target,
                "delay": s.delay,
                "gate": s.gate,
                "operations": _operations_json(graph, s.ops, graph.population(s.source).shape, graph.population(s.target).shape),
                "products": synapse_products(graph, s),
            }
            for s in phase.synapses
        ],
        "dynamics": {
            name: {
                "members": d.members,
                "start": phase.timing.start.get(name, 0),
                "threshold": d.threshold,
                "reset": d.reset,
                "leak": d.leak,
                "scale": graph.scale(phase.name, name),
            }
            for name, d in phase.dynamics.items()
        },
        "bias": [{"population": name, **msgspec.structs.asdict(bias)} for name, bias in _biases(phase)],
        "drive": [_drive_json(graph, drive) for drive in phase.drive],
    }


def _drive_json(graph: Graph, drive: Drive) -> dict[str, Any]:
    ops = _operations_json(graph, drive.ops, graph.of_kind("input")[0].shape, graph.population(drive.population).shape) if drive.ops else []
    plain = msgspec.structs.asdict(drive)
    return {**{name: plain[name] for name in ("population", "source", "bias", "gain", "shift", "exponent")}, "operations": ops}


def _operations_json(graph: Graph, ops: Sequence[Op], source: Shape, target: Shape) -> list[dict[str, Any]]:
    """Every operation with its own fields, how people write it, and the shape it makes."""
    shapes = route(graph, ops, source, target)[1:]
    found = []
    for op, made in zip(ops, shapes, strict=True):
        name = weight_of(op)
        weights = {} if name is None else {"weight_shape": list(graph.tensors[name].shape)}
        found.append({**msgspec.to_builtins(op), **weights, "text": operation(graph, op), "makes": list(made)})
    return found


def _biases(phase: Phase) -> list[tuple[str, Bias]]:
    return [(name, bias) for name, several in phase.bias.items() for bias in several]


def _phase_lines(graph: Graph, phase: Phase) -> list[str]:
    turn = "tick" if phase.timing.period == 1 else f"{phase.timing.period} ticks"
    timed = f", {phase.timing.mode} timing, a step every {turn}, {phase.ticks:,} ticks"
    length = "" if phase.timing.mode == "step" else timed
    lines = [f"phase {phase.name}: {phase.time_steps} time steps{length}"]
    rows = [_dynamics_row(graph, phase, name, phase.dynamics[name]) for name in phase.order if name in phase.dynamics]
    lines += table(["neurons", "members", "first tick", "threshold", "reset", "leak", "units per 1.0"], rows)
    rows = [_synapse_row(graph, synapse) for synapse in phase.synapses]
    lines += ["", *table(["connection", "operations", "weights", "products", "delay", "gate"], rows, left=2)] if rows else []
    rows = [_bias_row(name, bias) for name, bias in _biases(phase)]
    lines += ["", *table(["bias of", "tensor", "exponent", "from step"], rows, left=2)] if rows else []
    rows = [_drive_row(graph, drive) for drive in phase.drive]
    return lines + (["", *table(["host drives", "with", "bias", "shift", "exponent", "gain"], rows, left=3)] if rows else [])


def _dynamics_row(graph: Graph, phase: Phase, name: str, dynamics: Dynamics) -> list[str]:
    fires = dynamics.members in ("plus", "both")
    return [
        name,
        dynamics.members,
        str(phase.timing.start.get(name, 0)),
        f"{dynamics.threshold:,}" if fires else "-",
        f"{dynamics.reset:,}" if fires else "-",
        f"{dynamics.leak:g}",
        f"{graph.scale(phase.name, name):.6g}",
    ]


def _synapse_row(graph: Graph, synapse: Synapse) -> list[str]:
    weights = sum(int(graph.tensors[name].size) for op in synapse.ops if (name := weight_of(op)) is not None)
    return [
        f"{synapse.source} -> {synapse.target}",
        operations(graph, synapse.ops),
        f"{weights:,}",
        f"{synapse_products(graph, synapse):,}",
        str(synapse.delay),
        synapse.gate or "-",
    ]


def _bias_row(name: str, bias: Bias) -> list[str]:
    return [name, bias.tensor, str(bias.exponent), str(bias.start)]


def _drive_row(graph: Graph, drive: Drive) -> list[str]:
    what = ", ".join(operation(graph, op) for op in drive.ops) or f"the {drive.source}"
    return [drive.population, what, drive.bias or "-", str(drive.shift), str(drive.exponent), f"{drive.gain:g}"]


def _process_lines(graph: Graph) -> list[str]:
    found = processes(graph)
    phases = [phase.name for phase in graph.phases]
    rows = [[p.name, p.kind, p.shape, _port_text(p), *(_turn_text(p, phase) for phase in phases)] for p in found]
    lines = [
        f"{len(found)} processes, one a population and one a synapse: a population makes a step at tick start + k * period and collects on all others",
        *(f"{phase.name} phase: {phase_ticks(phase)}" for phase in graph.phases),
    ]
    return lines + table(["process", "kind", "shape or operations", "ports", *phases], rows, left=4 + len(phases))


def phase_ticks(phase: Phase) -> str:
    """How a phase spends its ticks, in words."""
    flush = phase.timing.flush
    return f"{phase.timing.mode} timing, period {phase.timing.period}, {phase.ticks:,} ticks, the last {flush} for flush"


def _port_text(process: Process) -> str:
    return ", ".join(process.ports) if process.connects is None else " -> ".join(process.connects)


def _turn_text(process: Process, phase: str) -> str:
    if phase in process.idle:
        return "idle"
    ticks = process.ticks[phase]
    if "delay" in ticks:
        return f"delay {ticks['delay']}" + ("" if process.gate is None else f", gated by {process.gate}")
    return f"start {ticks['start']}, period {ticks['period']}, {ticks['time_steps']} steps"
