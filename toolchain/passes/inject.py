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
    current, as the input of a feedback spiking network is (METHODS 1.1: no spike encoder). `graded`: the connection stays on the chip."""

    mode: Literal["bias", "graded"] = "bias"
    name: str = "inject"

    def __call__(self, graph: Graph) -> Graph:
        if self.mode not in ("bias", "graded"):
            raise UsageError(f"unknown input '{self.mode}': choose bias or graded")
        if self.mode == "graded":
            return graph
        forward = _injected(graph, graph.phase("forward"))
        return msgspec.structs.replace(graph, phases=tuple(forward if p.name == "forward" else p for p in graph.phases))


def _injected(graph: Graph, phase: Phase) -> Phase:
    inputs = {population.name for population in graph.of_kind("input")}
    drives = list(phase.drive)
    bias = dict(phase.bias)
    for synapse in phase.synapses:
        if synapse.source not in inputs:
            continue
        if any(drive.population == synapse.target for drive in drives):
            raise GraphError(f"population '{synapse.target}' has two connections from the input: join them into one")
        own = bias.get(synapse.target)
        if own is not None and own.start == 0:
            del bias[synapse.target]
            drives.append(Drive(synapse.target, "input", synapse.ops, bias=own.tensor))
        else:
            drives.append(Drive(synapse.target, "input", synapse.ops))
    return msgspec.structs.replace(
        phase,
        order=tuple(name for name in phase.order if name not in inputs),
        synapses=tuple(s for s in phase.synapses if s.source not in inputs),
        drive=tuple(drives),
        bias=bias,
    )
