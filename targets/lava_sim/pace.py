"""How our Lava processes keep time and speak: by their channels alone, from one command of the host to the next."""

from __future__ import annotations

from typing import Any

from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.runtime.mgmt_token_enums import MGMT_COMMAND

from toolchain.ir import Array
from toolchain.targets.lava_sim.channel import ReceivePort


class OwnPace(PyLoihiProcessModel):  # type: ignore[misc]  # Lava carries no types
    """A Loihi model that also takes Lava's command RUN with a number of ticks, as its asynchronous models do.

    Every tick waits for the messages it needs, so nothing else has to hold processes together: Lava's service, which does so for
    stock processes, would ask each one for an answer on every tick. A channel that belongs to a phase is used in that phase only.
    """

    phase_index: int
    """The phase that the network is in, as an index of PHASES"""

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self._cmd_handlers[MGMT_COMMAND.RUN[0]] = self._run_ticks

    def takes_part(self) -> bool:
        """Whether this process has anything to do in the run that the host has ordered."""
        return True

    def send(self, port: PyOutPort, message: Array | None, count: int | None = None) -> None:
        """Copy a message to every synapse of the port that listens in this phase; None is silence, `count` how many values are not zero, if known."""
        for out in port.csp_ports:
            if not out.speaks(self.phase_index):
                continue
            if message is None:
                out.silence()
            else:
                narrower = message.dtype.itemsize <= out.d_type.itemsize
                out.room(message.dtype if narrower else out.d_type, count)[...] = message.reshape(out.shape)
            out.post()

    def arriving(self, port: PyInPort) -> list[ReceivePort]:
        """The channels of the port on which something is sent in this phase, silence or not."""
        return [channel for channel in port.csp_ports if channel.speaks(self.phase_index)]

    def _run_ticks(self) -> None:
        ticks = int(self.service_to_process.recv()[0].item())
        if self.takes_part():
            for _ in range(ticks):
                self.time_step += 1
                self.run_spk()
        self.process_to_service.send(PyLoihiProcessModel.Response.STATUS_DONE)
