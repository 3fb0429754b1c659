"""What a comparison of targets is: rows, gradients, traces of one sample, and how they read as text and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.analysis.drops import AccuracyBudget
from toolchain.analysis.fidelity import Fidelity
from toolchain.analysis.side_by_side import SAMPLES, SideBySide
from toolchain.deploy import Deployment
from toolchain.feedback import Feedback
from toolchain.notation import table
from toolchain.target import History


@dataclass(frozen=True)
class Gradient:
    """The feedback phase of one target on a batch, against the first target's.

    cosine          by parameter, cosine of the gradients with the first target's (1 where both are zero)
    relative_error  by parameter, |g - g_first| / |g_first|
    spikes_per_sample, clipped and silent (shares of couples) describe the feedback phase itself
    """

    samples: int
    loss: float
    scale_factor: float
    cosine: dict[str, float]
    relative_error: dict[str, float]
    spikes_per_sample: float
    clipped: float
    silent: float
    clipped_errors: int
    found: Feedback

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "found"}


@dataclass(frozen=True)
class Row:
    """One target: its deploy record, its agreement with the first row (share of equal predictions), and how far its rates are from the first row's."""

    deployment: Deployment
    agreement: float
    rate_difference: dict[str, float]
    gradient: Gradient | None

    def to_json(self) -> dict[str, Any]:
        gradient = None if self.gradient is None else self.gradient.to_json()
        return {**self.deployment.to_json(), "agreement": self.agreement, "rate_difference": self.rate_difference, "feedback": gradient}


@dataclass(frozen=True)
class Trace:
    """Every spike and potential of one sample on one target, by population, arrays (time_steps, *shape).

    `thresholds` of each phase, by population, are in the unit of its potentials, which differs from graph to graph: their quotient compares.
    """

    target: str
    sample: int
    forward: dict[str, History]
    feedback: dict[str, History]
    thresholds: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `drop` is the largest loss of accuracy against the first row, a fraction of 1. `budget` may be a sentence that says why there is none."""

    model: str
    rows: tuple[Row, ...]
    drop: float
    max_drop: float | None
    report: Path | None = None
    budget: AccuracyBudget | str | None = None
    inside: SideBySide | None = None
    fidelity: Fidelity | None = None

    @property
    def reference(self) -> str:
        return self.rows[0].deployment.target

    @property
    def warnings(self) -> list[str]:
        """A sentence for each kind of value that did not fit the chip, with the targets it concerns; empty where all fitted."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            for sentence in _cuts(row):
                found.setdefault(sentence, []).append(row.deployment.target)
        return [f"{', '.join(targets)}: {sentence}" for sentence, targets in found.items()]

    @property
    def summary(self) -> tuple[str, ...]:
        """The five lines of the accuracy budget; none without one."""
        return self.budget.summary(self._made) if isinstance(self.budget, AccuracyBudget) else ()

    @property
    def _made(self) -> str | None:
        """In which population integers err by themselves, in words."""
        return None if self.inside is None or self.inside.populations is None else self.inside.populations.worst()

    @property
    def passed(self) -> bool:
        return self.max_drop is None or 100 * self.drop <= self.max_drop + 1e-9

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "reference": self.reference,
            "drop": self.drop,
            "max_drop_points": self.max_drop,
            "passed": self.passed,
            "device": self.rows[0].deployment.device,
            "versions": self.rows[0].deployment.versions,
            "report": None if self.report is None else str(self.report),
            "rows": [row.to_json() for row in self.rows],
            "budget": self.budget.to_json() | {"summary": list(self.summary)} if isinstance(self.budget, AccuracyBudget) else None,
            "no_budget": self.budget if isinstance(self.budget, str) else None,
            **({"populations": None, "settling": None} if self.inside is None else self.inside.to_json()),
            "fidelity": None if self.fidelity is None else self.fidelity.to_json(),
        }

    def to_text(self) -> str:
        first = self.rows[0].deployment
        lines = [f"{self.model} on {first.dataset}, n = {first.samples:,}, T = {first.time_steps}", "", "forward equilibrium (inference)"]
        lines += table(
            ["target", "accuracy %", "agreement %", "mean rate difference", "samples/s", "SynOps/sample", "saturations"],
            [_forward_cells(row) for row in self.rows],
        )
        gradients = [row for row in self.rows if row.gradient is not None]
        if gradients and gradients[0].gradient is not None:
            lines += [
                "",
                f"feedback equilibrium (implicit gradient by signed spikes), n = {gradients[0].gradient.samples}, scale factor {gradients[0].gradient.scale_factor:g}",
            ]
            head = ["target", f"least cosine with {self.reference}", "of", "spikes/sample", "silent %", "clipped %"]
            lines += table(head, [_gradient_cells(row) for row in gradients])
        for part in (self.fidelity, self.inside):
            lines += [] if part is None else ["", part.to_text()]
        if self.budget is not None:
            lines += ["", f"no accuracy budget: {self.budget}" if isinstance(self.budget, str) else self.budget.to_text(self._made)]
        for row in self.rows:
            if row.deployment.ran_on != row.deployment.target:
                lines.append(f"note: target '{row.deployment.target}' is missing here; its row ran on '{row.deployment.ran_on}'")
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines.append(
            f"\nlargest drop against {self.reference}: {100 * self.drop:.2f} points"
            + ("" if self.max_drop is None else f" (allowed: {self.max_drop:g})")
        )
        return "\n".join(lines) + (f"\nreport: {self.report}" if self.report is not None else "")


def _cuts(row: Row) -> list[str]:
    """What was cut to fit the chip: input currents, error currents, and potentials of either phase."""
    found = []
    if row.deployment.clipped_currents:
        found.append(
            f"{_counted(row.deployment.clipped_currents, 'input current')} clipped at the 13-bit mantissa: "
            "compile with --input graded, or make the first connection's weights smaller"
        )
    if row.deployment.saturations:
        found.append(
            f"{_counted(row.deployment.saturations, 'saturation')} in the forward phase, potentials held at 24 bit: compile with fewer --weight-bits"
        )
    if row.gradient is None:
        return found
    if row.gradient.clipped_errors:
        fewer = row.gradient.samples < SAMPLES
        found.append(
            f"{_counted(row.gradient.clipped_errors, 'error current')} clipped at the 13-bit mantissa: "
            + (f"give {SAMPLES} samples, since the mean loss of {row.gradient.samples:,} makes larger errors, or " if fewer else "")
            + f"lower the scale factor, which is {row.gradient.scale_factor:g}"
        )
    saturations = sum(int(s.sum()) for s in row.gradient.found.feedback.saturations.values())
    if saturations:
        found.append(
            f"{_counted(saturations, 'saturation')} in the feedback phase, potentials held at 24 bit: "
            f"lower the scale factor, which is {row.gradient.scale_factor:g}, or compile with fewer --weight-bits"
        )
    return found


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + "s" * (count != 1)


def _forward_cells(row: Row) -> list[str]:
    d = row.deployment
    difference = ", ".join(f"{name} {value:.4f}" for name, value in row.rate_difference.items())
    name = d.target if d.ran_on == d.target else f"{d.target} (on {d.ran_on})"
    return [
        f"{name} [{device_name(d)}]",
        f"{100 * d.accuracy:.2f}",
        f"{100 * row.agreement:.2f}",
        difference,
        f"{d.samples_per_second:,.0f}",
        "" if d.synaptic_operations_per_sample is None else f"{d.synaptic_operations_per_sample:,.0f}",
        f"{d.saturations:,}",
    ]


def device_name(deployment: Deployment) -> str:
    """Where a row ran: its device, and its timing where that is not the model's own."""
    return deployment.device if deployment.timing == "step" else f"{deployment.device}, {deployment.timing}"


def _gradient_cells(row: Row) -> list[str]:
    """A row of the feedback phase: of its gradients the one that is farthest from the first row's."""
    assert row.gradient is not None
    cosines = row.gradient.cosine
    least = min(cosines, key=lambda name: cosines[name])
    return [
        row.deployment.target,
        f"{cosines[least]:.4f}",
        least,
        f"{row.gradient.spikes_per_sample:,.0f}",
        f"{100 * row.gradient.silent:.1f}",
        f"{100 * row.gradient.clipped:.2f}",
    ]
