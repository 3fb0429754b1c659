"""How true the feedback phase's gradient is, target by target: against SPIDE in floats, and against the exact implicit gradient.

SPIDE in floats is target torch on a CPU: what training computed, with spikes of its own. The exact implicit gradient has none: rates from the equilibrium
solved to a tolerance in float64, beta from the linear equation at that point (`analysis.equilibrium`; I - J^T of IDE with J = m W / A), then the same local
rule. So a target's distance from the exact one holds all that finite T and T_B, spikes and integers cost; that of torch from it what spikes alone do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain.notation import table

Floats = npt.NDArray[np.float64]

SHOWN = 6
"""Tensors that the text has."""

Gradients = Mapping[str, Floats]
"""d(mean cross entropy)/d(tensor) by name."""


@dataclass(frozen=True)
class Closeness:
    """One tensor's gradient g beside g0: the cosine of their angle (1 where both vanish, 0 where one does) and |g| / |g0| (None where g0 vanishes)."""

    cosine: float
    norm_ratio: float | None

    def to_json(self) -> dict[str, Any]:
        return {"cosine": self.cosine, "norm_ratio": self.norm_ratio}


@dataclass(frozen=True)
class Solved:
    """How the exact implicit gradient was come by: the residuals of both equilibria (of the feedback one relative to its largest drive) and the iterations they took;
    `reason` says why there is none, where there is none."""

    forward_residual: float
    feedback_residual: float
    iterations: tuple[int, int]
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "forward_residual": _finite(self.forward_residual),
            "feedback_residual": _finite(self.feedback_residual),
            "iterations": list(self.iterations),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Fidelity:
    """By target, in the order of the rows, and by tensor. `exact` is empty where `solved` says that there is no exact gradient.

    `masks` by target is the share of couples (over samples) whose mask is not that of the solved equilibrium: one spike on the way to a rate of 0 opens it, and more time
    steps never close it again.
    """

    spide: dict[str, dict[str, Closeness]]
    exact: dict[str, dict[str, Closeness]]
    solved: Solved
    samples: int
    devices: dict[str, str]
    masks: dict[str, float]

    @property
    def tensors(self) -> list[str]:
        return list(next(iter(self.spide.values()), {}))

    def worst(self, target: str) -> tuple[str, Closeness] | None:
        """The tensor of a target that is farthest from the exact gradient, from SPIDE in floats where there is none."""
        found = self.exact.get(target) or self.spide.get(target) or {}
        return min(found.items(), key=lambda pair: pair[1].cosine, default=None)

    @property
    def against(self) -> str:
        """What gradients are ranked by."""
        return "the exact implicit gradient" if self.exact else "SPIDE in floats"

    def farthest(self, count: int) -> list[str]:
        """The tensors that are farthest from that, on whichever target, in the network's order."""
        yardstick = self.exact or self.spide
        least = {name: min(found[name].cosine for found in yardstick.values()) for name in self.tensors}
        kept = sorted(self.tensors, key=lambda name: least[name])[:count]
        return [name for name in self.tensors if name in kept]

    @property
    def sentence(self) -> str:
        """Every target's least cosine, in words."""
        each = [(target, self.worst(target)) for target in self.spide]
        listed = ", ".join(f"{target} {worst[1].cosine:.4f} ('{worst[0]}')" for target, worst in each if worst is not None)
        left_out = "" if self.solved.reason is None else f"; {self.solved.reason}"
        masks = ", ".join(f"{target} {100 * share:.2f} %" for target, share in self.masks.items())
        opened = f"; masks that are not the equilibrium's: {masks}" if masks else ""
        return f"least cosine with {self.against}: {listed}{opened}{left_out}"

    def to_text(self) -> str:
        head = ["tensor", "target", "SPIDE", "|g|/|g0|", *(["exact", "|g|/|g0|"] if self.exact else [])]
        shown = self.farthest(SHOWN)
        cells = [
            [name if target == next(iter(self.spide)) else "", target, *self._cells(target, name)]
            for name in shown
            for target in self.spide
        ]
        others = len(self.tensors) - len(shown)
        rest = [f"{others} other tensors are no farther from {self.against}: --json and --report have all"] if others else []
        title = f"gradient of each tensor: cosine and ratio of norms with SPIDE in floats{' and with the exact implicit gradient' * bool(self.exact)}, {self.samples:,} samples"
        return "\n".join([title, *table(head, cells, left=2), *rest, self.sentence])

    def _cells(self, target: str, name: str) -> list[str]:
        found = [self.spide[target][name], *([self.exact[target][name]] if self.exact else [])]
        return [text for c in found for text in (f"{c.cosine:.4f}", shown_ratio(c))]

    def to_json(self) -> dict[str, Any]:
        def named(found: Mapping[str, Mapping[str, Closeness]]) -> dict[str, Any]:
            return {target: {name: close.to_json() for name, close in tensors.items()} for target, tensors in found.items()}

        return {
            "samples": self.samples,
            "devices": self.devices,
            "against_spide": named(self.spide),
            "against_exact": named(self.exact) or None,
            "exact": self.solved.to_json(),
            "mask_differences": self.masks,
        }


@dataclass(frozen=True)
class Found:
    """What a phase of feedback found: gradients by tensor, masks by population, both of one batch."""

    gradients: Gradients
    masks: Mapping[str, npt.NDArray[np.bool_]]


def fidelity(
    targets: Mapping[str, Found], spide: Found, exact: Found | None, solved: Solved, *, samples: int, devices: Mapping[str, str]
) -> Fidelity:
    """Every target's gradients beside SPIDE's in floats and the exact ones; `devices` says where each ran."""

    def beside(others: Gradients) -> dict[str, dict[str, Closeness]]:
        return {target: {name: closeness(g, others[name]) for name, g in found.gradients.items()} for target, found in targets.items()}

    return Fidelity(
        spide=beside(spide.gradients),
        exact={} if exact is None else beside(exact.gradients),
        solved=solved,
        samples=samples,
        devices=dict(devices),
        masks={} if exact is None else {target: _differ(found.masks, exact.masks) for target, found in targets.items()},
    )


def _differ(masks: Mapping[str, npt.NDArray[np.bool_]], others: Mapping[str, npt.NDArray[np.bool_]]) -> float:
    return float(np.concatenate([(mask != others[name]).ravel() for name, mask in masks.items()]).mean())


def closeness(found: Floats, other: Floats) -> Closeness:
    size = float(np.linalg.norm(other))
    return Closeness(cosine(found, other), float(np.linalg.norm(found)) / size if size > 0 else None)


def cosine(a: Floats, b: Floats) -> float:
    """Cosine of two tensors; 1 where both vanish, 0 where one does."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norms == 0:
        return float(not a.any() and not b.any())
    return float(np.vdot(a, b) / norms)


def shown_ratio(close: Closeness) -> str:
    return "-" if close.norm_ratio is None else f"{close.norm_ratio:.3f}"


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
