"""What a synapse process does on each tick."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol

from toolchain.ir import Array
from toolchain.targets.lava_sim.composition import Composition
from toolchain.targets.lava_sim.processes.synapse import Synapse


class _SynapseModel(PyLoihiProcessModel):  # type: ignore[misc]  # Lava carries no types
    """Sends what left the source `delay` ticks ago, then takes in what leaves it now; silence costs no product."""

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.composition: Composition = proc_params["composition"]
        self.silence = np.zeros((proc_params["batch"], self.composition.outputs), self.composition.dtype)
        self.flight: deque[Array] = deque([self.silence] * proc_params["delay"])

    def run_spk(self) -> None:
        self.a_out.send(self.flight.popleft())
        spikes = self.s_in.csp_ports[0].recv()
        self.flight.append(self.composition(spikes) if spikes.any() else self.silence)


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
