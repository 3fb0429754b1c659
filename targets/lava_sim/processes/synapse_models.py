"""What a synapse process does on each tick."""

from __future__ import annotations

from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol

from toolchain.targets.lava_sim.composition import Composition
from toolchain.targets.lava_sim.pace import OwnPace
from toolchain.targets.lava_sim.plan import PHASES, Board
from toolchain.targets.lava_sim.processes.synapse import Synapse


class _SynapseModel(OwnPace):
    """Sends what left the source `delay` ticks ago, then takes in what leaves it now; silence costs nothing."""

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.composition: Composition = proc_params["composition"]
        self.board: Board = proc_params["board"]
        self.own_phase = PHASES.index(proc_params["phase"])
        self.delay: int = proc_params["delay"]
        self.ahead = 0
        self.phase_index = self.own_phase

    def takes_part(self) -> bool:
        return self.board.read()[0] == self.own_phase

    def run_spk(self) -> None:
        (out,), (into,) = self.a_out.csp_ports, self.s_in.csp_ports
        while self.ahead < self.delay:  # before the first tick
            out.silence()
            self.ahead += 1
        out.post()
        spikes = into.take()
        if spikes is None:
            out.silence()
        else:
            self.composition.into(spikes, out, into.count())
        into.done()


@implements(proc=Synapse, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class SynapseFixed(_SynapseModel):
    s_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int32)
    a_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int64, precision=24)


@implements(proc=Synapse, protocol=LoihiProtocol)
@requires(CPU)
@tag("floating_pt")
class SynapseFloat(_SynapseModel):
    s_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, float)
    a_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, float)
