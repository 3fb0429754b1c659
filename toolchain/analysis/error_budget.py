"""Where integers part from floats, population by population: the float graph with one switch of `analysis.factors` on at a time, its rates beside its own without."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import Any

import numpy as np

from toolchain import codec
from toolchain.analysis.factors import SWITCHES, Switchboard
from toolchain.analysis.floats import AT_ONCE
from toolchain.analysis.populations import rates
from toolchain.ir import Array, Graph, Phase, Synapse
from toolchain.notation import sample_products, table
from toolchain.passes.grids import the_weight
from toolchain.target import Result, get, join

WORK = 2**35
"""Products that one run may take, in float64: of large networks fewer samples are run, and then fewer time steps."""

SEED = 0


@dataclass(frozen=True)
class Share:
    """One population in one phase: the mean |rate difference| from the float graph, over samples and neurons.

    A relay has values in place of rates, the readout (population's kind `readout`) logits. `integer` is the whole difference of the integer graph, `by_kind` what each
    switch makes alone (0 where it has no effect). `weight_error` is the root mean square error of the weights on the chip that reach it, over that of the weights themselves.
    """

    phase: str
    population: str
    rate: float
    integer: float
    by_kind: dict[str, float]
    weight_error: float | None
    saturations: int


@dataclass(frozen=True)
class Budget:
    """The error budget of a compiled network on `samples` inputs, over `time_steps` by phase."""

    shares: tuple[Share, ...]
    samples: int
    time_steps: dict[str, int]

    def to_text(self) -> str:
        steps = ", ".join(f"{name} {count} time steps" for name, count in self.time_steps.items())
        head = ["phase", "population", "mean |rate|", "integers", *(f"{kind} alone" for kind in SWITCHES), "weights' rms error"]
        cells = [
            [
                s.phase,
                s.population,
                f"{s.rate:.4f}",
                f"{s.integer:.5f}",
                *(f"{s.by_kind[kind]:.5f}" for kind in SWITCHES),
                "-" if s.weight_error is None else f"{100 * s.weight_error:.2f} %",
            ]
            for s in self.shares
        ]
        title = f"mean |rate difference| from the float graph (readout: of logits), {self.samples:,} inputs, {steps}"
        return "\n".join([title, *table(head, cells, left=2)])

    def to_json(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "time_steps": self.time_steps,
            "populations": [
                {
                    "phase": s.phase,
                    "population": s.population,
                    "mean_rate": s.rate,
                    "rate_difference": s.integer,
                    "by_kind": s.by_kind,
                    "weight_error": s.weight_error,
                    "saturations": s.saturations,
                }
                for s in self.shares
            ],
        }


def budget(float_graph: Graph, graph: Graph, inputs: Array, error: Array | None = None) -> Budget:
    """What each switch costs each population of integer `graph`, made of the folded `float_graph` (injected or not, in model steps).

    `inputs` (samples, *input shape) in [0, 1]. The feedback phase has the same `error` in every run (samples, *shape of the driven population), by default a seeded one
    of the size that is carried without clipping. Switches interact: the columns need not add up.
    """
    samples, steps = _size(graph, len(inputs)) if graph.integer else (0, {})
    integers = graph.in_steps(steps)
    board = Switchboard(float_graph.in_steps(steps), integers)
    values = codec.check_inputs(graph, inputs)[:samples]
    values = values[..., : steps["forward"]] if graph.of_kind("input")[0].events else values
    errors = None
    if graph.has_phase("feedback"):
        errors = _seeded(board.floats, samples) if error is None else codec.check_error(board.floats, error)[:samples]
    plain = _run(board, (), values, errors)
    alone = {kind: _run(board, (kind,), values, errors) for kind in SWITCHES if _acts(board, kind, values, errors, plain)}
    whole = _integer(integers, values, errors)
    shares = tuple(
        _share(board, plain, whole, alone, phase, name)
        for phase in integers.phases
        for name in phase.order
        if integers.population(name).kind != "input"
    )
    return Budget(shares, samples, steps)


def _size(graph: Graph, samples: int) -> tuple[int, dict[str, int]]:
    """How many samples, and how many time steps of each phase, come to `WORK` products."""
    whole = sample_products(graph)
    samples = max(1, min(samples, WORK // whole))
    part = min(1.0, WORK / (samples * whole))
    least = {phase.name: 1 + max((bias.start for several in phase.bias.values() for bias in several), default=0) for phase in graph.phases}
    return samples, {phase.name: max(least[phase.name], int(phase.time_steps * part)) for phase in graph.phases}


def _seeded(graph: Graph, samples: int) -> Array:
    shape = graph.population(codec.error_drive(graph).population).shape
    drawn: Array = np.random.default_rng(SEED).normal(size=(samples, *shape)) * codec.error_bound(graph) / 4
    return drawn


def _acts(board: Switchboard, switch: str, values: Array, errors: Array | None, plain: Mapping[str, Result]) -> bool:
    """Whether a switch alone can change anything on these inputs."""
    if switch == "saturation":
        return any(held.any() for result in plain.values() for held in result.saturations.values())
    if switch == "clipping":
        encoded = board.encoded((), values)
        drives = [(drive, errors if drive.source == "error" else encoded) for phase in board.integers.phases for drive in phase.drive]
        return any(board.injected(drive, (), injected)[1] for drive, injected in drives if injected is not None)
    return switch == "input" or switch in board.static


def _run(board: Switchboard, on: Collection[str], values: Array, errors: Array | None) -> dict[str, Result]:
    """Both phases with some switches on, some samples at a time."""
    at_once = max(1, AT_ONCE // sum(prod(population.shape) for population in board.integers.populations))
    parts: dict[str, list[Result]] = {}
    for i in range(0, len(values), at_once):
        forward = board.forward(on, values[i : i + at_once])
        parts.setdefault("forward", []).append(forward)
        if errors is not None:
            parts.setdefault("feedback", []).append(board.feedback(on, forward, errors[i : i + at_once]))
    return {phase: join(found) for phase, found in parts.items()}


def _integer(graph: Graph, values: Array, errors: Array | None) -> dict[str, Result]:
    sim = replace(get("sim"), device="cpu")  # type: ignore[type-var]  # a target is a dataclass
    with sim.compile(graph) as run:
        found = {"forward": run.run(values)}
        return found if errors is None else found | {"feedback": run.run(errors, phase="feedback")}


def _share(
    board: Switchboard,
    plain: Mapping[str, Result],
    whole: Mapping[str, Result],
    alone: Mapping[str, Mapping[str, Result]],
    phase: Phase,
    name: str,
) -> Share:
    own = rates(board.graph(()), plain[phase.name], name)

    def difference(graph: Graph, results: Mapping[str, Result]) -> float:
        return float(np.abs(rates(graph, results[phase.name], name) - own).mean())

    return Share(
        phase=phase.name,
        population=name,
        rate=float(np.abs(own).mean()),
        integer=difference(board.integers, whole),
        by_kind={kind: difference(board.graph((kind,)), alone[kind]) if kind in alone else 0.0 for kind in SWITCHES},
        weight_error=_weight_error(board.floats, board.integers, phase.name, name),
        saturations=int(whole[phase.name].saturations[name].sum()),
    )


def _paired(floats: Graph, integers: Graph, phase: str) -> list[tuple[Synapse, Synapse]]:
    """The synapses of a phase, float and integer: quantize keeps their order."""
    return list(zip(floats.phase(phase).synapses, integers.phase(phase).synapses, strict=True))


def _weight_error(floats: Graph, integers: Graph, phase: str, name: str) -> float | None:
    """sqrt(sum of squared errors / sum of squares) over the weights on the chip that reach a population, from the record of quantize."""
    pairs = [(ours, own) for ours, own in _paired(floats, integers, phase) if own.target == name]
    weights = [(floats.tensors[str(the_weight(ours.ops))], str(the_weight(own.ops))) for ours, own in pairs]
    squares = sum(float(np.sum(np.square(weight, dtype=np.float64))) for weight, _ in weights)
    records = integers.provenance.rounding
    if squares == 0 or any(tensor not in records for _, tensor in weights):
        return None
    return sqrt(sum(weight.size * records[tensor].rms_error ** 2 for weight, tensor in weights) / squares)
