"""What `estimate` found, as text and as JSON: every figure is `simulated` (a simulator counted it on real samples) or `declared` (it rests on a published
price or a chosen schedule), and has its source."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from toolchain.analysis.prices import (
    BACKWARD,
    FORWARD,
    INFERENCE_WITHOUT_SPIKES,
    TRAINING_WITHOUT_SPIKES,
    UPDATE,
    Inference,
    Prices,
    Training,
    connection_energy,
)
from toolchain.analysis.workload import HOST, Footprint, PhaseCounts
from toolchain.notation import table

if TYPE_CHECKING:
    from toolchain.targets.sanafe.charges import Charges

COUNTED_ON = "sim"
"""Bit-exact with every other integer target, and the fastest."""

TICKS = "the schedule of the compiled graph, flush included; targets/limits has no published seconds a tick, so none are given"

Tag = Literal["simulated", "declared"]


@dataclass(frozen=True)
class Figure:
    """A number (None: there is none), its unit, whether it was `simulated` or rests on what was `declared`, and by whom."""

    value: float | None
    unit: str
    tag: Tag
    source: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Charged:
    """What SANA-FE charged for each phase that it ran, by phase; `missing` says in a sentence what did not run, and why."""

    phases: dict[str, Charges] = field(default_factory=dict)
    missing: str | None = None


@dataclass(frozen=True)
class Estimate:
    """What a network costs; the numbers of `forward` and `feedback` are means over the samples. `feedback` and `training` are None where the network has no
    feedback phase. `ticks` are those of one sample, by timing and phase. `batch` is the size of the batch whose mean loss drives the feedback phase."""

    model: str
    dataset: str
    samples: int
    accuracy: float
    time_steps: int
    feedback_steps: int | None
    timing: str
    input: str
    batch: int | None
    footprint: Footprint
    connection_sparsity: float
    forward: PhaseCounts
    feedback: PhaseCounts | None
    prices: Prices
    inference: Inference
    training: Training | None
    ticks: dict[str, dict[str, int]]
    charged: Charged
    notes: tuple[str, ...]
    device: str
    seconds: float
    versions: dict[str, str]

    @property
    def phases(self) -> tuple[PhaseCounts, ...]:
        return (self.forward,) if self.feedback is None else (self.forward, self.feedback)

    @property
    def counted(self) -> str:
        """The source of what was counted."""
        return f"{COUNTED_ON}, the first {self.samples:,} samples of {self.dataset}"

    @property
    def not_charged(self) -> tuple[str, ...]:
        """What the counts and SPIDE's estimate leave out."""
        left = [
            "neurons: adding to a potential, comparing, resetting and leaking",
            "memory, communication and whatever a chip does while idle",
        ]
        if self.input == "bias":
            left.append("injecting the input current at every time step (the products behind it are charged once a sample)")
        left.append("the readout's division and bias, which the host applies once a sample")
        if self.feedback is not None:
            left.append("the error that drives the feedback phase: softmax and one product with the readout's weights, on the host")
        return tuple(left)

    def to_json(self) -> dict[str, Any]:
        return {
            **{
                name: getattr(self, name)
                for name in ("model", "dataset", "samples", "time_steps", "feedback_steps", "timing", "input", "batch")
            },
            "target": COUNTED_ON,
            "accuracy": self._simulated(self.accuracy, "fraction of 1"),
            "neurobench": self._neurobench(),
            "connections": [row for phase in self.phases for row in self._connections(phase)],
            "populations": [
                {"phase": phase.phase, **asdict(population), "tag": "simulated", "source": self.counted}
                for phase in self.phases
                for population in phase.populations
            ],
            "spide": self._spide(),
            "latency": {
                timing: {phase: Figure(ticks, "ticks a sample", "declared", TICKS).to_json() for phase, ticks in phases.items()}
                for timing, phases in self.ticks.items()
            },
            "sanafe": {name: _charges_json(charges) for name, charges in self.charged.phases.items()},
            "sanafe_missing": self.charged.missing,
            "not_charged": list(self.not_charged),
            "notes": list(self.notes),
            "device": self.device,
            "seconds": self.seconds,
            "versions": self.versions,
        }

    def _simulated(self, value: float, unit: str, source: str = "") -> dict[str, Any]:
        return Figure(value, unit, "simulated", source or self.counted).to_json()

    def _neurobench(self) -> dict[str, Any]:
        held = "the tensors of the integer graph, each once"
        found: dict[str, Any] = {
            "footprint": self._simulated(self.footprint.total, "bytes", held),
            "footprint_chip": self._simulated(self.footprint.chip, "bytes", held),
            "footprint_host": self._simulated(self.footprint.host, "bytes", held),
            "potentials": self._simulated(self.footprint.potentials, "numbers of 24 bits", "couples and readouts of the graph"),
            "connection_sparsity": self._simulated(self.connection_sparsity, "fraction of weights", held),
        }
        for phase in self.phases:
            found[phase.phase] = {
                "activation_sparsity": self._simulated(phase.activation_sparsity, "fraction of couples and time steps"),
                "effective_macs": self._simulated(phase.effective_macs, "products a sample"),
                "effective_acs": self._simulated(phase.effective_acs, "additions a sample"),
                "dense": self._simulated(phase.dense, "operations a sample"),
                "membrane_updates": self._simulated(phase.membrane_updates, "updates a sample"),
                "spikes": self._simulated(phase.spikes, "spikes a sample"),
                "rate": self._simulated(phase.rate, "spikes a couple and time step"),
                "synaptic_operations": self._simulated(phase.synaptic_operations, "synaptic operations a sample"),
            }
        return found

    def _connections(self, phase: PhaseCounts) -> list[dict[str, Any]]:
        return [
            {
                "phase": phase.phase,
                **asdict(connection),
                "dense": connection.dense,
                "tag": "simulated",
                "source": self.counted,
                "energy": self._declared(sum(connection_energy(connection, self.prices))),
            }
            for connection in phase.connections
        ]

    def _declared(self, joules: float | None, unit: str = "J a sample") -> dict[str, Any]:
        return Figure(joules, unit, "declared", f"{self.prices.source}; counts: {self.counted}").to_json()

    def _spide(self) -> dict[str, Any]:
        price = {
            name: Figure(joules, "J", "declared", self.prices.source).to_json()
            for name, joules in (("mac", self.prices.mac), ("accumulate", self.prices.accumulate))
        }
        found: dict[str, Any] = {
            **price,
            "forward": {"formula": FORWARD, **self._declared(self.inference.forward)},
            "forward_without_spikes": {"formula": INFERENCE_WITHOUT_SPIKES, **self._declared(self.inference.without_spikes)},
            "forward_ratio": self._declared(self.inference.ratio, "times, without spikes over with"),
            "forward_even": self._declared(self.inference.even, "times the spikes at which both cost the same"),
        }
        if self.training is not None:
            found |= {
                "backward": {"formula": BACKWARD, **self._declared(self.training.backward)},
                "update": {"formula": UPDATE, **self._declared(self.training.update)},
                "training": self._declared(self.training.total),
                "training_without_spikes": {"formula": TRAINING_WITHOUT_SPIKES, **self._declared(self.training.without_spikes)},
                "training_ratio": self._declared(self.training.ratio, "times, without spikes over with"),
                "training_even": self._declared(self.training.even, "times the spikes at which both cost the same"),
            }
        return found

    def to_text(self) -> str:
        steps = f"T {self.time_steps}" + ("" if self.feedback_steps is None else f", T_B {self.feedback_steps}")
        lines = [
            f"{self.model} on {self.counted}: {steps}, {self.timing} timing, --input {self.input}; accuracy {100 * self.accuracy:.2f} % (simulated)",
            "",
            f"operations a sample, by NeuroBench's definitions (simulated: {self.counted})",
            *self._operations_table(),
            "",
            "products and spikes by connection, a sample (simulated), and what SPIDE's estimate charges for them (declared)",
            *self._connection_table(),
            "",
            f"SPIDE's theoretical energy a sample (declared: E_MAC {in_joules(self.prices.mac)}, E_AC {in_joules(self.prices.accumulate)}, {self.prices.source})",
            *self._energy_lines(),
            "",
            f"latency in ticks of a chip a sample (declared: {TICKS})",
            *self._tick_table(),
            "",
            *_charged_lines(self.charged),
            "",
            *(f"counts and SPIDE's estimate leave out: {sentence}" for sentence in self.not_charged),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _operations_table(self) -> list[str]:
        rows = [
            ["effective MACs", *(_count(p.effective_macs) for p in self.phases)],
            ["effective ACs", *(_count(p.effective_acs) for p in self.phases)],
            ["dense operations", *(_count(p.dense) for p in self.phases)],
            ["activation sparsity", *(f"{p.activation_sparsity:.4f}" for p in self.phases)],
            ["membrane updates", *(_count(p.membrane_updates) for p in self.phases)],
            ["spikes", *(_count(p.spikes) for p in self.phases)],
            ["synaptic operations on the chip", *(_count(p.synaptic_operations) for p in self.phases)],
        ]
        return [
            *table(["", *(p.phase for p in self.phases)], rows),
            f"footprint {self.footprint.total:,} bytes ({self.footprint.chip:,} of the chip, {self.footprint.host:,} of the host), {self.footprint.potentials:,} potentials",
            f"connection sparsity {self.connection_sparsity:.4f}",
        ]

    def _connection_table(self) -> list[str]:
        rows = []
        for phase in self.phases:
            rate = "r" if phase.phase == "forward" else "rb"
            for c in phase.connections:
                name = f"{c.name} (host)" if c.where == HOST else c.name
                measured = "-" if c.rate is None else f"{rate} {c.rate:.5f}"
                mask = "-" if c.mask is None else f"{c.mask:.4f}"
                joules = in_joules(sum(connection_energy(c, self.prices)))
                rows.append([phase.phase, name, f"{c.products:,}", f"{c.reach:,}", measured, mask, _count(c.met), joules])
        return table(["phase", "connection", "M", "fan-out", "rate", "mask m", "weights met", "energy"], rows, left=2)

    def _energy_lines(self) -> list[str]:
        found, more = self.inference, self.training
        rows = [
            [FORWARD, in_joules(found.forward), f"{in_joules(found.macs)} + {in_joules(found.acs)}"],
            [
                f"without spikes: {INFERENCE_WITHOUT_SPIKES}",
                in_joules(found.without_spikes),
                _beside(found.ratio, found.even, "forward spikes"),
            ],
        ]
        if more is not None:
            rows[1:1] = [[BACKWARD, in_joules(more.backward), ""], [UPDATE, in_joules(more.update), ""]]
            rows += [
                ["training: E_fwd + E_bwd + E_upd", in_joules(more.total), ""],
                [
                    f"training without spikes: {TRAINING_WITHOUT_SPIKES}",
                    in_joules(more.without_spikes),
                    _beside(more.ratio, more.even, "spikes of both phases"),
                ],
            ]
        lines = table(["", "energy"], [row[:2] for row in rows])[1:]
        width = max(map(len, lines))
        hinges = "the ratios are of the rates above, on these samples: they hinge on how sparsely this network fires"
        if more is not None:
            hinges += ", and rb on its errors, which are larger while it learns"
        return [f"{line:<{width}}  {row[2]}".rstrip() for line, row in zip(lines, rows, strict=True)] + [hinges]

    def _tick_table(self) -> list[str]:
        names = [phase.phase for phase in self.phases]
        rows = [[timing, *(f"{ticks[name]:,}" for name in names)] for timing, ticks in self.ticks.items()]
        return table(["timing", *names], rows)


def _beside(ratio: float | None, even: float | None, spikes: str) -> str:
    """How a cost without spikes stands to the one with them."""
    more = "where spikes cost nothing" if ratio is None else f"{ratio:.3g} times as much as with spikes"
    if even is None:
        return more
    return f"{more}; equal at {even:.3g} times the {spikes}" if even > 0 else f"{more}; the products alone cost more than that"


def _charged_lines(charged: Charged) -> list[str]:
    if not charged.phases:
        return [f"SANA-FE: {charged.missing}"]
    first = next(iter(charged.phases.values()))
    units = list(first.energy_joules)
    head = ["phase", "samples", *units, "latency", *first.counts]
    rows = [
        [
            name,
            f"{charges.samples:,}",
            *(in_joules(charges.energy_per_sample()[unit]) for unit in units),
            f"{in_seconds(charges.seconds_per_sample())}",
            *(_count(count / charges.samples) for count in charges.counts.values()),
        ]
        for name, charges in charged.phases.items()
    ]
    left_out = dict.fromkeys(sentence for charges in charged.phases.values() for sentence in charges.not_charged)
    return [
        f"energy by unit and latency a sample (simulated: {first.architecture})",
        *table(head, rows),
        f"its prices: {first.source}",
        *([] if charged.missing is None else [f"SANA-FE: {charged.missing}"]),
        *(f"SANA-FE does not charge: {sentence}" for sentence in left_out),
    ]


def _charges_json(charges: Charges) -> dict[str, Any]:
    source = f"SANA-FE, {charges.architecture}; prices: {charges.source}"

    def figure(value: float, unit: str) -> dict[str, Any]:
        return Figure(value, unit, "simulated", source).to_json()

    return {
        "samples": charges.samples,
        "time_steps": charges.time_steps,
        "energy": {unit: figure(joules, "J a sample") for unit, joules in charges.energy_per_sample().items()},
        "latency": figure(charges.seconds_per_sample(), "s a sample"),
        "counts": {name: figure(count / charges.samples, f"{name} a sample") for name, count in charges.counts.items()},
        "not_charged": list(charges.not_charged),
        "architecture": charges.architecture,
    }


def _count(value: float) -> str:
    """A mean count: with decimals where it is small."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.2f}"


def _scaled(value: float, unit: str, digits: int = 3) -> str:
    """`1.23 nJ`: so many digits and the prefix that fits."""
    if value == 0:
        return f"0 {unit}"
    place = next((p for p in (0, -3, -6, -9, -12) if abs(value) >= 10.0**p * 0.9995), -12)
    prefix = {0: "", -3: "m", -6: "µ", -9: "n", -12: "p"}[place]
    return f"{value / 10.0**place:.{digits}g} {prefix}{unit}"


def in_joules(value: float, digits: int = 3) -> str:
    return _scaled(value, "J", digits)


def in_seconds(value: float) -> str:
    return _scaled(value, "s")
