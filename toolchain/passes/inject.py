"""Where the first connection runs: on the host, its result injected as a current, or on the chip, fed with graded spikes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from toolchain.errors import GraphError, UsageError
from toolchain.ir import Drive, Graph, Phase


@dataclass(frozen=True)
class Inject:
    """`bias`: the host applies each connection that leaves the input once per sample, and the population's bias with it; the sum is a constant
    current, as the input of a feedback spiking network is (METHODS 1.1: no spike encoder). `graded`: the connection stays on the chip, as that of
    events always does: they change at every step."""

    mode: Literal["bias", "graded"] = "bias"
    name: str = "inject"

    def __call__(self, graph: Graph) -> Graph:
        if self.mode not in ("bias", "graded"):
            raise UsageError(f"unknown input '{self.mode}': choose bias or graded")
        if self.mode == "graded" or any(population.events for population in graph.of_kind("input")):
            return graph
        forward = _injected(graph, graph.phase("forward"))
        return msgspec.structs.replace(graph, phases=tuple(forward if p.name == "forward" else p for p in graph.phases))


def injected_like(floats: Graph, integers: Graph) -> Graph:
    """The float graph with its input where the integer graph has it."""
    hosted, there = (any(drive.source == "input" for drive in graph.phase("forward").drive) for graph in (integers, floats))
    return Inject()(floats) if hosted and not there else floats


def _injected(graph: Graph, phase: Phase) -> Phase:
    inputs = {population.name for population in graph.of_kind("input")}
    drives = list(phase.drive)
    bias = dict(phase.bias)
    for synapse in phase.synapses:
        if synapse.source not in inputs:
            continue
        if synapse.delay:
            raise GraphError(
                f"the connection from the input to '{synapse.target}' is delayed: a current of the host starts with the first step, so give it delay 0"
            )
        if any(drive.population == synapse.target for drive in drives):
            raise GraphError(f"population '{synapse.target}' has two connections from the input: join them into one")
        steady = [b for b in bias.get(synapse.target, ()) if b.start == 0]
        joined = steady[0] if len(steady) == 1 else None
        if joined is not None:
            bias[synapse.target] = tuple(b for b in bias[synapse.target] if b is not joined)
        drives.append(Drive(synapse.target, "input", synapse.ops, bias=None if joined is None else joined.tensor))
    return msgspec.structs.replace(
        phase,
        order=tuple(name for name in phase.order if name not in inputs),
        synapses=tuple(s for s in phase.synapses if s.source not in inputs),
        drive=tuple(drives),
        bias={name: biases for name, biases in bias.items() if biases},
    )
