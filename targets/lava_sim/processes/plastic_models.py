"""What a synapse that learns does on each tick, and at the end of a feedback phase."""

from __future__ import annotations

from collections import deque
from math import prod
from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol

from toolchain import plasticity
from toolchain.ir import Array
from toolchain.targets.lava_sim.composition import Composition
from toolchain.targets.lava_sim.plan import PlasticPart
from toolchain.targets.lava_sim.processes.clock import FORWARD, ClockedModel
from toolchain.targets.lava_sim.processes.plastic import Plastic


class _Direction:
    """One way through the synapse: what is in flight (None: silence), and the trace of what has set out."""

    def __init__(self, neurons: int, batch: int, delay: int, leak: float) -> None:
        self.flight: deque[Array | None] = deque([None] * delay)
        self.trace = np.zeros((batch, neurons))
        self.leak = leak
        self.composition: Composition | None = None

    def take(self, spikes: Array | None, *, counted: bool, step: bool) -> None:
        """Put what leaves the source now under way. `counted`: the phase whose trace it is goes on, and `step`: the source makes a time step of it."""
        self.flight.append(None if spikes is None or self.composition is None else self.composition(spikes))
        if counted:
            if step and self.leak != 1:
                self.trace *= self.leak
            if spikes is not None:
                self.trace += spikes


class _PlasticModel(ClockedModel):
    """Both directions through one set of weights, and the update."""

    def __init__(self, proc_params: Any) -> None:
        self.part: PlasticPart = proc_params["part"]
        part = self.part
        super().__init__(proc_params, part.board, part.line, part.ticks)
        graph, learned = part.graph, part.learned
        sent_leak, post_leak = (1.0, 1.0) if learned is None else (learned.plastic.sent_leak, learned.plastic.post_leak)
        inputs, outputs = (prod(graph.population(name).shape) for name in (part.forward.source, part.forward.target))
        back = 1 if part.backward is None else part.backward.delay
        self.forward = _Direction(inputs, part.batch, part.forward.delay, sent_leak)
        self.backward = _Direction(outputs, part.batch, back, post_leak)
        self.phases = {phase.name: phase for phase in graph.phases}
        self._prepare()

    def _prepare(self) -> None:
        """Make the weights ready for both directions."""
        part = self.part
        graph = (
            part.graph if part.learned is None else plasticity.with_tensors(part.graph, {part.learned.plastic.tensor: part.learned.values})
        )
        self.forward.composition = Composition(graph, part.forward)
        self.backward.composition = None if part.backward is None else Composition(graph, part.backward)

    def _begin_sample(self) -> None:
        (self.forward if self.phase_index == FORWARD else self.backward).trace[...] = 0

    def _advance(self) -> None:
        self.send(self.a_out, self.forward.flight.popleft())
        self.send(self.c_out, self.backward.flight.popleft())
        ahead, part = self.phase_index == FORWARD, self.part
        for direction, port, name, phase in (
            (self.forward, self.s_in, part.forward.source, "forward"),
            (self.backward, self.b_in, part.forward.target, "feedback"),
        ):
            channels = self.arriving(port)  # one, or none in a phase in which the sender rests
            spikes = channels[0].take() if channels else None
            direction.take(spikes, counted=ahead == (phase == "forward"), step=self._steps(phase, name))
            for channel in channels:
                channel.done()

    def _steps(self, phase: str, name: str) -> bool:
        """Whether population `name` makes a time step of `phase` at this tick."""
        found = self.phases.get(phase)
        return found is not None and name in found.order and found.step_at(name, self.tick) is not None

    def _end_sample(self) -> None:
        part, learned = self.part, self.part.learned
        if self.phase_index == FORWARD or learned is None or not learned.lesson.on():
            return
        update, rate = learned.lesson.read(learned.plastic.number)
        r, q = (
            plasticity.whole(direction.trace, direction.leak, integer=part.graph.integer) for direction in (self.forward, self.backward)
        )
        product = plasticity.correlation(part.graph, learned.plastic, r, q)
        learned.values[...] = plasticity.changed(learned.plastic, learned.values, product, rate, learned.lesson.seed, update)
        self._prepare()


@implements(proc=Plastic, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PlasticFixed(_PlasticModel):
    s_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int32)
    a_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int64, precision=24)
    b_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int32)
    c_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int64, precision=24)


@implements(proc=Plastic, protocol=LoihiProtocol)
@requires(CPU)
@tag("floating_pt")
class PlasticFloat(_PlasticModel):
    s_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, float)
    a_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, float)
    b_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, float)
    c_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, float)
