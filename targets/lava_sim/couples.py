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

TYPES = tuple(np.dtype(kind) for kind in (np.int8, np.int16, np.int32))


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
        self._state = native.Couples()
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
        record, dynamics, state = role.record, role.dynamics, self._state
        state.neurons = self.potential.shape[1]
        state.threshold, state.reset, state.both = int(dynamics.threshold), int(dynamics.reset), dynamics.members == "both"
        state.potential = self.potential.ctypes.data
        state.drive = None if role.drive is None else self._drive.ctypes.data
        state.mask = None if mask is None else mask.ctypes.data
        state.counts = record.counts[slot].ctypes.data
        state.activity = record.activity[slot].ctypes.data if dynamics.members == "both" else None
        state.saturations = record.saturations[slot].ctypes.data
        state.spikes, state.sent = self.spikes.ctypes.data, self.sent.ctypes.data

    def forget(self) -> None:
        """Drop what waits."""
        if self._waits:
            self._waiting.fill(0)
            self._waits = False

    def collect(self, message: Array) -> None:
        """Let a message wait for the next step."""
        if message.dtype not in TYPES:
            message = message.astype(np.int32)
        length, width = message.size, message.dtype.itemsize
        ticks.collect(self._waiting.ctypes.data, message.ctypes.data, width=width, length=length, instructions=self._instructions)
        self._waits = True

    def step(self, number: int, ports: Sequence[ReceivePort]) -> int:
        """Model step `number`: take what the ports bring and what waited; how many spikes are sent."""
        assert self._role is not None
        state, taken = self._state, 0
        for port in ports:
            message = port.take()
            if message is None:
                continue
            if taken == native.MOST_MESSAGES or message.dtype not in TYPES:
                self.collect(message)
                continue
            state.message[taken], state.bytes[taken] = message.ctypes.data, message.dtype.itemsize
            taken += 1
        state.messages = taken
        state.waiting = self._waiting.ctypes.data if self._waits else None
        bias = self._bias(self._role, number)
        state.bias = None if bias is None else bias.ctypes.data
        sent = ticks.advance(state, len(self.potential), instructions=self._instructions)
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
            self._biases[started] = np.sum([bias for start, bias in role.bias if number >= start], axis=0).astype(np.int32)
        return self._biases[started]
