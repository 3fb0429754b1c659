"""SPIDE's theoretical estimate: what a sample costs in additions and products, from counted spikes, beside the same network without spikes.

With M_c products of one application of connection c, r_c the rate of its source over T time steps, rb_c the rate of its signed spikes over T_B steps and m_c the share
of them that pass the mask:

    E_fwd = E_MAC M_x + E_AC T sum r_c M_c                 the input connection once a sample; every other one as spikes arrive, the readout's too
    E_bwd = E_AC T_B sum rb_c m_c M_c                      the adjoints of the connections between couples
    E_upd = E_MAC sum M_c                                  every weight learns once a sample from two rates
    without spikes: E_MAC sum M_c to infer, 3 E_MAC sum M_c to train (forward, back to the values, to the weights)

They follow from what SPIDE's two phases do (Xiao et al., Neural Networks 2023); they are not copied from the paper's section on energy. Where a connection carries
graded values (an input on the chip, a relay), each meeting with a weight is a product, E_MAC. Neurons are free.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.analysis.workload import HOST, ConnectionCounts, PhaseCounts
from toolchain.errors import UsageError

PICOJOULE = 1e-12

FORWARD = "E_fwd = E_MAC M_x + E_AC T sum r M"
BACKWARD = "E_bwd = E_AC T_B sum rb m M"
UPDATE = "E_upd = E_MAC sum M"
INFERENCE_WITHOUT_SPIKES = "E_MAC sum M"
TRAINING_WITHOUT_SPIKES = "3 E_MAC sum M"


@dataclass(frozen=True)
class Prices:
    """Joules of one product with its addition (`mac`) and of one addition (`accumulate`), and where they come from."""

    mac: float = 4.6 * PICOJOULE
    accumulate: float = 0.9 * PICOJOULE
    source: str = "45 nm, 32-bit floats: Horowitz, ISSCC 2014, as commonly cited; not confirmed to be SPIDE's own"


DEAREST = 1e9
"""In picojoules, a millijoule: no operation costs as much, and sums stay finite."""


def prices(mac: float | None = None, accumulate: float | None = None) -> Prices:
    """The usual prices, or others in picojoules; UsageError where one is no price."""
    usual = Prices()
    if mac is None and accumulate is None:
        return usual
    for name, value in (("mac_pj", mac), ("ac_pj", accumulate)):
        if value is not None and not 0 < value < DEAREST:
            raise UsageError(f"{name} is {value:g}: give the price of one operation in picojoules, above 0 and below {DEAREST:g}")
    given = [f"{name} as given" for name, value in (("E_MAC", mac), ("E_AC", accumulate)) if value is not None]
    rest = f"; the other: {usual.source}" if len(given) == 1 else ""
    return Prices(
        usual.mac if mac is None else mac * PICOJOULE,
        usual.accumulate if accumulate is None else accumulate * PICOJOULE,
        f"{', '.join(given)}{rest}",
    )


@dataclass(frozen=True)
class Inference:
    """Joules a sample of the forward phase: of the products (`macs`: the host's, and graded values) and of the additions of spikes (`acs`); `without_spikes` is
    one application of every connection."""

    macs: float
    acs: float
    without_spikes: float

    @property
    def forward(self) -> float:
        """E_fwd."""
        return self.macs + self.acs

    @property
    def ratio(self) -> float | None:
        """How many times as much it costs without spikes; None where spikes cost nothing."""
        return _ratio(self.without_spikes, self.forward)

    @property
    def even(self) -> float | None:
        """With so many times the spikes both would cost the same; 0 or less: even without one; None where there are none."""
        return _ratio(self.without_spikes - self.macs, self.acs)


@dataclass(frozen=True)
class Training:
    """Joules a sample of one step of training: `backward` is the feedback phase (its spikes' additions, `macs` of graded values apart), `update` the weights'."""

    inference: Inference
    acs: float
    macs: float
    update: float
    without_spikes: float

    @property
    def backward(self) -> float:
        """E_bwd."""
        return self.acs + self.macs

    @property
    def total(self) -> float:
        return self.inference.forward + self.backward + self.update

    @property
    def ratio(self) -> float | None:
        """How many times as much it costs without spikes; None where spikes cost nothing."""
        return _ratio(self.without_spikes, self.total)

    @property
    def even(self) -> float | None:
        """With so many times the spikes in both phases both would cost the same; None where there are none."""
        spikes = self.inference.acs + self.acs
        return _ratio(self.without_spikes - (self.total - spikes), spikes)


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


def connection_energy(connection: ConnectionCounts, cost: Prices) -> tuple[float, float]:
    """Joules a sample for products and for additions. The host applies its connection once, every weight; a connection without weights only adds."""
    if connection.where == HOST:
        return cost.mac * connection.products, 0.0
    if connection.spiking or not connection.weights:
        return 0.0, cost.accumulate * connection.met
    return cost.mac * connection.met, 0.0


def inference(forward: PhaseCounts, cost: Prices) -> Inference:
    """E_fwd and one application without spikes."""
    macs, acs = _phase_energy(forward, cost)
    return Inference(macs, acs, cost.mac * _products(forward))


def training(forward: PhaseCounts, feedback: PhaseCounts, cost: Prices) -> Training:
    """E_fwd + E_bwd + E_upd and the training step without spikes."""
    macs, acs = _phase_energy(feedback, cost)
    products = _products(forward)
    return Training(inference(forward, cost), acs, macs, cost.mac * products, 3 * cost.mac * products)


def _phase_energy(phase: PhaseCounts, cost: Prices) -> tuple[float, float]:
    energies = [connection_energy(connection, cost) for connection in phase.connections]
    return sum(macs for macs, _ in energies), sum(acs for _, acs in energies)


def _products(forward: PhaseCounts) -> int:
    """sum M_c: multiply-adds of one application of every connection with weights."""
    return sum(connection.products for connection in forward.connections)
