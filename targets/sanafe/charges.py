"""What a simulated chip charged for one run: energy by unit, time, and the events behind them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Charges:
    """The bill of one phase over `samples` samples; every figure is the sum over them, so divide by `samples` for one.

    samples            samples that ran, one after another
    time_steps         time steps of the chip in all: with `--timing exact` L of them make one model step, flush steps included
    energy_joules      by unit: synapse, dendrite, soma, network, and `total`, their sum
    seconds_simulated  time the simulated chip would take (latency), not the time the simulator took
    counts             events by name: spikes (neurons that fired), packets (messages between cores), hops (of packets between tiles), synapses (weights
                       that were read), updates (neurons that were updated)
    not_charged        what the figures leave out, a sentence each
    architecture       the description of the chip that was simulated
    source             where its energies and times are published
    """

    samples: int
    time_steps: int
    energy_joules: dict[str, float]
    seconds_simulated: float
    counts: dict[str, int]
    not_charged: tuple[str, ...]
    architecture: str
    source: str
    phase: str = field(default="forward")

    def energy_per_sample(self) -> dict[str, float]:
        """Joules a sample, by unit."""
        return {unit: joules / self.samples for unit, joules in self.energy_joules.items()}

    def seconds_per_sample(self) -> float:
        """Simulated time of one sample (latency), in seconds."""
        return self.seconds_simulated / self.samples
