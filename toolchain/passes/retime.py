"""Hardware time: every synapse takes one tick, so populations take turns (`exact`) or run shifted by their depth (`pipelined`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from toolchain.errors import GraphError, UsageError
from toolchain.ir import Graph, Phase, Synapse, Timing


@dataclass(frozen=True)
class Retime:
    """Give every population a start tick and every synapse a delay in ticks.

    `exact`: population p makes model step k at tick depth(p) + k * period; what arrives earlier waits, unclamped. Identical to the model step
    for any graph without over-long delays, because every spike arrives after the target's previous step and no later than the step
    that needs it. `period` is the smallest that keeps both: the depth a feedback connection spans plus one (1 without loops).
    `pipelined`: period 1, count windows shifted by depth; not identical (rates move by about 1/T), `period` times faster.
    One closed-gate tick ends each phase, so nothing in flight reaches the next one.
    """

    mode: Literal["exact", "pipelined"] = "exact"
    name: str = "retime"

    def __call__(self, graph: Graph) -> Graph:
        if self.mode not in ("exact", "pipelined"):
            raise UsageError(f"unknown timing '{self.mode}': choose exact or pipelined")
        return msgspec.structs.replace(graph, phases=tuple(self._retimed(phase) for phase in graph.phases))

    def _retimed(self, phase: Phase) -> Phase:
        if phase.timing.mode != "step":
            raise GraphError(f"phase '{phase.name}' is already in {phase.timing.mode} timing: retime a graph once")
        start = _depths(phase)
        period = max((_period_for(synapse, start) for synapse in phase.synapses), default=1) if self.mode == "exact" else 1
        timing = Timing(mode=self.mode, period=period, start=start, flush=1)
        synapses = tuple(msgspec.structs.replace(s, delay=self._ticks(s, start)) for s in phase.synapses)
        return msgspec.structs.replace(phase, synapses=synapses, timing=timing)

    def _ticks(self, synapse: Synapse, start: dict[str, int]) -> int:
        """One tick, but a delayed synapse that runs forward must not overtake the target's step of the same turn."""
        if self.mode == "pipelined" or synapse.delay == 0:
            return 1
        return max(1, start[synapse.target] - start[synapse.source] + 1)


def _depths(phase: Phase) -> dict[str, int]:
    """The longest same-step path that ends at each population (`verify` has made sure that the order is one)."""
    depth = dict.fromkeys(phase.order, 0)
    for name in phase.order:
        for synapse in phase.synapses:
            if synapse.target == name and synapse.delay == 0:
                depth[name] = max(depth[name], depth[synapse.source] + 1)
    return depth


def _period_for(synapse: Synapse, start: dict[str, int]) -> int:
    """The shortest turn in which this synapse's spikes arrive in the model step they belong to."""
    span = start[synapse.target] - start[synapse.source]
    return span if synapse.delay == 0 else max(1, 1 - span)
