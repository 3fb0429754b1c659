"""The interfaces of population processes; `population_models` holds what they do."""

from __future__ import annotations

from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess

from toolchain.targets.lava_sim.plan import PHASES, Part

SENDS = {"s_out": PHASES.index("forward"), "b_out": PHASES.index("feedback")}
"""The phase in which each output port has something to say."""


class Couple(AbstractProcess):  # type: ignore[misc]  # Lava carries no types
    """A population of ternary neuron couples, `batch` copies side by side.

    On a tick that is its own (see `toolchain.ir`), with a[t] the sum of all that arrived since its last own tick:

        u <- clamp(u + a[t] + bias + drive)
        s <- [u >= threshold] - [u <= -threshold]      (the second term where the minus member is enabled: feedback phase)
        u <- leak(u - reset * s)

    `a_in` takes all synapses, of both phases. Spikes leave by `s_out` in the forward phase and, times the mask latched from the forward
    phase's spike counts, by `b_out` in the feedback phase; by the other port then nothing, or silence where the synapses are Lava's own. Ports have
    the shape `port_shape`.
    """

    def __init__(self, *, part: Part, port_shape: tuple[int, ...], name: str) -> None:
        super().__init__(part=part, port_shape=port_shape, name=name)
        self.a_in = InPort(shape=port_shape)
        self.s_out = OutPort(shape=port_shape)
        self.b_out = OutPort(shape=port_shape)
        self.sends = SENDS


class Relay(AbstractProcess):  # type: ignore[misc]  # Lava carries no types
    """A linear relay, which passes on what arrives as graded spikes (Loihi 2): on its own ticks it emits clamp(a[t] + bias + drive).

    Ports are those of `Couple`; nothing gates a relay.
    """

    def __init__(self, *, part: Part, port_shape: tuple[int, ...], name: str) -> None:
        super().__init__(part=part, port_shape=port_shape, name=name)
        self.a_in = InPort(shape=port_shape)
        self.s_out = OutPort(shape=port_shape)
        self.b_out = OutPort(shape=port_shape)
        self.sends = SENDS


class Readout(AbstractProcess):  # type: ignore[misc]  # Lava carries no types
    """A population that never fires: on its own ticks u <- clamp(leak(u) + a[t])."""

    def __init__(self, *, part: Part, port_shape: tuple[int, ...], name: str) -> None:
        super().__init__(part=part, port_shape=port_shape, name=name)
        self.a_in = InPort(shape=port_shape)


class TaughtReadout(AbstractProcess):  # type: ignore[misc]  # Lava carries no types
    """A readout whose weights learn: besides, on the first tick of a feedback phase with an update it sends the output error, a graded message, by `b_out`."""

    def __init__(self, *, part: Part, port_shape: tuple[int, ...], name: str) -> None:
        super().__init__(part=part, port_shape=port_shape, name=name)
        self.a_in = InPort(shape=port_shape)
        self.b_out = OutPort(shape=port_shape)
        self.sends = SENDS


class Input(AbstractProcess):  # type: ignore[misc]  # Lava carries no types
    """The input as graded spikes: on its own ticks of the forward phase it emits the sample's values (of events those of the step), on all others silence."""

    def __init__(self, *, part: Part, port_shape: tuple[int, ...], name: str) -> None:
        super().__init__(part=part, port_shape=port_shape, name=name)
        self.s_out = OutPort(shape=port_shape)
        self.sends = SENDS
