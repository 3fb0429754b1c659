"""What population processes do on each tick, in integers (fixed_pt) and float64 (floating_pt); the arithmetic is `toolchain.fixed.step`."""

from __future__ import annotations

from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol

from toolchain import fixed
from toolchain.ir import Array
from toolchain.targets.lava_sim.plan import Part, Record, Role
from toolchain.targets.lava_sim.processes.clock import FORWARD, ClockedModel
from toolchain.targets.lava_sim.processes.population import Couple, Input, Readout, Relay


class _PopulationModel(ClockedModel):
    """A process that has a role in each phase, or only listens."""

    def __init__(self, proc_params: Any) -> None:
        self.part: Part = proc_params["part"]
        super().__init__(proc_params, self.part.board, self.part.index, self.part.ticks)
        self.port_shape: tuple[int, ...] = proc_params["port_shape"]
        self.role: Role | None = None

    def _begin_sample(self) -> None:
        self.role = self.part.roles[self.current]


class _Integrating(_PopulationModel):
    """A population with a potential: collects, steps, records."""

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        wide = np.int64 if self.part.integer else np.float64
        self.waiting: Array = np.zeros(self.part.shape, wide)
        self.potential: Array = np.zeros(self.part.shape, wide)
        self.silence = np.zeros(self.port_shape, np.int8)
        self.spikes: Array = self.silence
        self.masks: dict[int, Array] = {}
        self.mask: Array | None = None

    def _begin_sample(self) -> None:
        super()._begin_sample()
        self.potential = np.zeros_like(self.potential)
        if self.current == FORWARD and self.batch == 0:
            self.masks.clear()
        if self.role is None or self.role.record is None:
            return
        record = self.role.record
        for counter in (record.counts, record.activity, record.traces, record.saturations):
            counter[self.slot] = 0
        self.mask = self.masks[self.batch] if self.role.gated else None

    def _collect(self) -> None:
        """Add what arrives to the waiting current; on the first tick it still belongs to the phase before and is dropped."""
        keep = self.role is not None and self.tick > 0
        for port in self.a_in.csp_ports:
            current = self.a_in._transformer.transform(port.recv(), port)  # as the connection says: Lava's Conv has channels last
            if keep:
                self.waiting += current.reshape(self.part.shape)

    def _advance(self) -> None:
        if self.tick == 0:
            self.waiting[...] = 0
        self._collect()
        step = None if self.role is None else self.role.step_at(self.tick)
        self.spikes = self.silence
        if self.role is not None and self.role.record is not None and step is not None:
            self._step(self.role, self.role.record, step)
        self._emit()

    def _step(self, role: Role, record: Record, step: int) -> None:
        assert role.dynamics is not None
        arrived, self.waiting = self.waiting, np.zeros_like(self.waiting)  # a relay keeps what arrived as what it emits
        current = arrived if role.drive is None else arrived + role.drive[self.slot]
        for start, bias in role.bias:
            if step >= start:
                current = current + bias
        after = fixed.step(self.potential, current, role.dynamics, integer=self.part.integer)
        self.potential = after.potential
        if self.part.integer:
            record.saturations[self.slot] += after.saturated
        if role.dynamics.members != "none":
            self._count(role, record, after.spikes)
        if record.spikes is not None and record.history is not None:
            record.spikes[self.slot, step] = after.spikes
            record.history[self.slot, step] = after.potential

    def _count(self, role: Role, record: Record, spikes: Array) -> None:
        """Only what cannot be told at the end: without leak the trace is the count, and a binary neuron's activity is its count."""
        assert role.dynamics is not None
        record.counts[self.slot] += spikes
        if role.dynamics.members != "plus":
            record.activity[self.slot] += spikes != 0
        if role.dynamics.leak != 1:
            record.traces[self.slot] = record.traces[self.slot] * role.dynamics.leak + spikes
        gated = spikes if self.mask is None else spikes * self.mask
        self.spikes = gated.reshape(self.port_shape)

    def _end_sample(self) -> None:
        if self.role is None or self.role.record is None or self.role.dynamics is None:
            return
        record, dynamics = self.role.record, self.role.dynamics
        counts = record.counts[self.slot]
        record.potentials[self.slot] = self.potential
        if dynamics.leak == 1:
            record.traces[self.slot] = counts
        if dynamics.members == "plus":
            record.activity[self.slot] = counts
        if self.part.latches and self.current == FORWARD:
            self.masks[self.batch] = (counts > 0) & (counts < self.role.phase.time_steps)

    def _emit(self) -> None:
        pass


class _SendingModel(_Integrating):
    def _emit(self) -> None:
        forward = self.current == FORWARD
        self.s_out.send(self.spikes if forward else self.silence)
        self.b_out.send(self.silence if forward else self.spikes)


class _InputModel(_PopulationModel):
    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.silence = np.zeros(self.port_shape)

    def _advance(self) -> None:
        step = None if self.role is None else self.role.step_at(self.tick)
        if self.role is None or self.role.drive is None or step is None:
            self.s_out.send(self.silence)
            return
        sample = self.role.drive[self.slot]
        self.s_out.send((sample[step] if self.role.events else sample).reshape(self.port_shape))


@implements(proc=Couple, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class CoupleFixed(_SendingModel):
    a_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int64, precision=24)
    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int8, precision=2)
    b_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int8, precision=2)


@implements(proc=Couple, protocol=LoihiProtocol)
@requires(CPU)
@tag("floating_pt")
class CoupleFloat(_SendingModel):
    a_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, float)
    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int8)
    b_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int8)


@implements(proc=Relay, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class RelayFixed(_SendingModel):
    a_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int64, precision=24)
    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)
    b_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)


@implements(proc=Relay, protocol=LoihiProtocol)
@requires(CPU)
@tag("floating_pt")
class RelayFloat(_SendingModel):
    a_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, float)
    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, float)
    b_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, float)


@implements(proc=Readout, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class ReadoutFixed(_Integrating):
    a_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int64, precision=24)


@implements(proc=Readout, protocol=LoihiProtocol)
@requires(CPU)
@tag("floating_pt")
class ReadoutFloat(_Integrating):
    a_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, float)


@implements(proc=Input, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class InputFixed(_InputModel):
    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)


@implements(proc=Input, protocol=LoihiProtocol)
@requires(CPU)
@tag("floating_pt")
class InputFloat(_InputModel):
    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, float)
