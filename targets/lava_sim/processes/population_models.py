"""What population processes do on each tick, in integers (fixed_pt) and float64 (floating_pt); the arithmetic is `toolchain.fixed.step`."""

from __future__ import annotations

from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol

from toolchain import fixed, plasticity
from toolchain.ir import Array
from toolchain.targets.lava_sim.couples import Couples
from toolchain.targets.lava_sim.plan import LearnedBias, Part, Record, Role
from toolchain.targets.lava_sim.processes.clock import FEEDBACK, FORWARD, ClockedModel
from toolchain.targets.lava_sim.processes.population import Couple, Input, Readout, Relay, TaughtReadout


class _PopulationModel(ClockedModel):
    """A process that has a role in each phase, or only listens."""

    def __init__(self, proc_params: Any) -> None:
        self.part: Part = proc_params["part"]
        super().__init__(proc_params, self.part.board, self.part.index, self.part.ticks)
        self.port_shape: tuple[int, ...] = proc_params["port_shape"]
        self.role: Role | None = None

    def _begin_sample(self) -> None:
        self.role = self.part.roles[self.phase_index]


class _Integrating(_PopulationModel):
    """A population with a potential: collects, steps, records."""

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        wide = np.int64 if self.part.integer else np.float64
        self.native = Couples(self.part) if Couples.serve(self.part) else None
        self.waiting: Array = np.zeros(self.part.shape if self.native is None else 0, wide)
        self.potential: Array = np.zeros(self.part.shape, wide) if self.native is None else self.native.potential
        self.spikes: Array | None = None
        self.sent = 0
        self.masks: dict[int, Array] = {}
        self.mask: Array | None = None

    def _begin_sample(self) -> None:
        super()._begin_sample()
        if self.native is None:
            self.potential = np.zeros_like(self.potential)
        if self.phase_index == FORWARD and self.batch == 0:
            self.masks.clear()
        if self.role is None or self.role.record is None:
            return
        record = self.role.record
        for counter in (record.counts, record.activity, record.traces, record.saturations):
            counter[self.slot] = 0
        self.mask = self.masks[self.batch] if self.role.gated else None
        if self.native is not None:
            self.native.begin(self.role, self.slot, self.mask)

    def _collect(self) -> None:
        """Add what arrives to the waiting current; on the first tick it still belongs to the phase before and is dropped."""
        keep = self.role is not None and self.tick > 0
        for port in self.arriving(self.a_in):
            current = port.take()
            if keep and current is not None:
                self.waiting += self.a_in._transformer.transform(current, port).reshape(
                    self.part.shape
                )  # as the connection says: Lava's Conv has channels last
            port.done()

    def _advance_native(self, native: Couples) -> None:
        """As `_advance`, in one pass."""
        step = None if self.role is None else self.role.step_at(self.tick)
        ports = self.arriving(self.a_in)
        listens = self.role is not None and self.tick > 0
        if self.tick == 0:
            native.forget()
        if step is None or not listens:
            for port in ports:
                current = port.take()
                if listens and current is not None:
                    native.collect(current)
                port.done()
            ports = []
        self.spikes, self.sent = None, 0
        if self.role is not None and self.role.record is not None and step is not None:
            self.sent = native.step(step, ports)
            native.keep(self.role.record, self.slot, step)
            self.spikes = native.sent if self.sent else None

    def _advance(self) -> None:
        if self.native is not None:
            self._advance_native(self.native)
            self._emit()
            return
        if self.tick == 0:
            self.waiting[...] = 0
        self._collect()
        step = None if self.role is None else self.role.step_at(self.tick)
        self.spikes = None
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
        self.sent = int(np.count_nonzero(gated))
        self.spikes = gated if self.sent else None

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
        if self.part.latches and self.phase_index == FORWARD:
            self.masks[self.batch] = (counts > 0) & (counts < self.role.phase.time_steps)
        if self.phase_index == FEEDBACK:
            for bias in self.part.biases:
                self._learn(bias, record)

    def _learn(self, bias: LearnedBias, record: Record) -> None:
        """Change a bias by what the feedback phase has brought, where the host has ordered an update."""
        plastic, lesson, values = bias.learned.plastic, bias.learned.lesson, bias.learned.values
        if not lesson.on():
            return
        update, rate = lesson.read(plastic.number)
        trace = plasticity.whole(record.traces[self.slot], plastic.post_leak, integer=self.part.integer)
        product = (trace if self.mask is None else trace * self.mask).sum(axis=0)
        values[...] = plasticity.changed(plastic, values, product.reshape(values.shape), rate, lesson.seed, update)
        flat = values.reshape(bias.current.shape)
        bias.current[...] = flat << bias.exponent if self.part.integer else flat

    def _emit(self) -> None:
        pass


class _SendingModel(_Integrating):
    def _emit(self) -> None:
        forward = self.phase_index == FORWARD
        self.send(self.s_out, self.spikes if forward else None, self.sent)
        self.send(self.b_out, None if forward else self.spikes, self.sent)


class _TaughtModel(_Integrating):
    """A readout that passes the output error on to its weights."""

    def _emit(self) -> None:
        lesson, message = self.part.lesson, self.part.message
        says = self.phase_index == FEEDBACK and self.tick == 0 and lesson is not None and message is not None and lesson.on()
        self.send(self.b_out, message if says else None)


class _InputModel(_PopulationModel):
    def _advance(self) -> None:
        step = None if self.role is None else self.role.step_at(self.tick)
        if self.role is None or self.role.drive is None or step is None:
            self.send(self.s_out, None)
            return
        sample = self.role.drive[self.slot]
        self.send(self.s_out, sample[step] if self.role.events else sample)


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


@implements(proc=TaughtReadout, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class TaughtReadoutFixed(_TaughtModel):
    a_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int64, precision=24)
    b_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)


@implements(proc=TaughtReadout, protocol=LoihiProtocol)
@requires(CPU)
@tag("floating_pt")
class TaughtReadoutFloat(_TaughtModel):
    a_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, float)
    b_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, float)


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
