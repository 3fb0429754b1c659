"""Couples of whole numbers by the native kernel: a model step is one pass over the potentials. `toolchain.fixed.step` is its definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from toolchain import native
from toolchain.ir import Array
from toolchain.native import ticks
from toolchain.targets.lava_sim.plan import Part, Record, Role

if TYPE_CHECKING:
    from toolchain.targets.lava_sim.channel import ReceivePort


class Couples:
    """A population of `part.shape` (batch, neurons): its potential, what waits, and the spikes of its last step, raw and as sent (gated)."""

    def __init__(self, part: Part) -> None:
        self.potential = np.zeros(part.shape, np.int32)
        self.spikes = np.zeros(part.shape, np.int8)
        self.sent = self.spikes
        self._gated = np.zeros(part.shape, np.int8)
        self._waiting = np.zeros(part.shape, np.int32)
        self._waits = False
        self._drive = np.zeros(part.shape, np.int32)
        self._instructions = native.widest()
        self._role: Role | None = None
        self._state: ticks.State | None = None
        self._biases: dict[int, Array] = {}

    @staticmethod
    def serve(part: Part) -> bool:
        """Whether the kernel can run a population: 32 bits hold all that it adds up, and none of its phases has a leak, a relay or a readout."""
        dynamics = [role.dynamics for role in part.roles if role is not None and role.record is not None]
        simple = bool(dynamics) and all(d is not None and d.leak == 1 and d.members in ("plus", "both") for d in dynamics)
        return part.integer and part.narrow and simple and native.missing() is None

    def begin(self, role: Role | None, slot: int, mask: Array | None) -> None:
        """A sample starts in a phase."""
        self._role = role
        if role is None or role.record is None or role.dynamics is None:
            return
        self.potential.fill(0)
        self.sent = self.spikes if mask is None else self._gated
        if role.drive is not None:
            np.copyto(self._drive, role.drive[slot], casting="unsafe")
        self._biases = {}
        record, dynamics, both = role.record, role.dynamics, role.dynamics.members == "both"
        self._state = ticks.State(
            threshold=int(dynamics.threshold),
            reset=int(dynamics.reset),
            both=both,
            potential=self.potential,
            counts=record.counts[slot],
            saturations=record.saturations[slot],
            spikes=self.spikes,
            sent=self.sent,
            activity=record.activity[slot] if both else None,
            drive=None if role.drive is None else self._drive,
            mask=mask,
        )

    def forget(self) -> None:
        """Drop what waits."""
        if self._waits:
            self._waiting.fill(0)
            self._waits = False

    def collect(self, message: Array) -> None:
        """Let a message wait for the next step."""
        if message.dtype not in ticks.CURRENTS:
            message = message.astype(np.int32)
        ticks.collect(self._waiting, message, instructions=self._instructions)
        self._waits = True

    def step(self, number: int, ports: Sequence[ReceivePort]) -> int:
        """Model step `number`: take what the ports bring and what waited; how many spikes are sent."""
        assert self._role is not None
        assert self._state is not None
        taken: list[Array] = []
        for port in ports:
            message = port.take()
            if message is None:
                continue
            if len(taken) == native.MOST_MESSAGES or message.dtype not in ticks.CURRENTS:
                self.collect(message)
                continue
            taken.append(message)
        waiting, bias = self._waiting if self._waits else None, self._bias(self._role, number)
        sent = self._state.advance(taken, waiting=waiting, bias=bias, instructions=self._instructions)
        self._waits = False
        for port in ports:
            port.done()
        return sent

    def keep(self, record: Record, slot: int, number: int) -> None:
        """Write a step down where the target traces."""
        if record.spikes is not None and record.history is not None:
            record.spikes[slot, number] = self.spikes
            record.history[slot, number] = self.potential

    def _bias(self, role: Role, number: int) -> Array | None:
        """The sum of the biases that have started."""
        started = sum(number >= start for start, _ in role.bias)
        if not started:
            return None
        if started not in self._biases:
            self._biases[started] = np.sum([bias for start, bias in role.bias if number >= start], axis=0).astype(np.int32).reshape(-1)
        return self._biases[started]
