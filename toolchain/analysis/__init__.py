"""What can be said of a compiled network before it runs: what real inputs reach, how far integers can go, whether loops settle, where rounding costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolchain.analysis.calibration import calibrate, calibrated, training_samples
from toolchain.analysis.error_budget import Budget, Share, budget
from toolchain.analysis.feedback_loops import Contraction, Loops, contraction, loops
from toolchain.analysis.reach import Reach, Saturation, saturation
from toolchain.artifact import Artifact
from toolchain.ir import Array

__all__ = [
    "Budget",
    "Contraction",
    "Loops",
    "Reach",
    "Report",
    "Saturation",
    "Share",
    "budget",
    "calibrate",
    "calibrated",
    "contraction",
    "loops",
    "report",
    "saturation",
    "training_samples",
]


@dataclass(frozen=True)
class Report:
    """All of it for one artefact. `budget` is None where the artefact has no float graph."""

    saturation: Saturation
    contraction: Contraction
    budget: Budget | None

    @property
    def warnings(self) -> list[str]:
        """What a person should know before the network runs, a sentence each."""
        return [*self.contraction.warnings, *self.saturation.warnings]

    def to_text(self) -> str:
        without = "error budget: the artefact has no float graph to compare with (compile without --no-float)"
        parts = [self.saturation.to_text(), self.contraction.to_text(), without if self.budget is None else self.budget.to_text()]
        return "\n\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {
            "saturation": self.saturation.to_json(),
            "contraction": self.contraction.to_json(),
            "budget": None if self.budget is None else self.budget.to_json(),
        }


def report(artifact: Artifact, inputs: Array | None = None, error: Array | None = None) -> Report:
    """The analysis of a compiled network. The budget runs `inputs` (samples, *input shape) and `error`, by default the artefact's golden ones."""
    graph, floats = artifact.graph, artifact.float_graph
    if inputs is None:
        inputs, error = artifact.golden_tensors["inputs"], artifact.golden_tensors.get("error")
    return Report(
        saturation=saturation(graph, floats),
        contraction=contraction(floats, graph),
        budget=None if floats is None else budget(floats, graph, inputs, error),
    )
