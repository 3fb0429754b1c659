"""Where accuracy goes: what the factors of `analysis.factors` do to the answers, one after the other and each alone, and what to try."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """What one switch did to the answers of the same images. `drop` is a fraction of 1, lost accuracy positive, `low` and `high` its 95 % confidence
    interval over images (`metrics.paired_interval`).

    to_wrong, to_right  answers that were right before and are wrong behind, and the other way round; `changed` counts all other answers
    rate_difference     by couple population, mean |rate difference|
    logit_difference    mean |logit difference| over the mean margin (best less second best logit) before the switch
    """

    drop: float
    low: float
    high: float
    to_wrong: int
    to_right: int
    changed: int
    rate_difference: dict[str, float]
    logit_difference: float

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Factor:
    """One row: `cumulative` behind all rows before it, `alone` from the float model in as many steps as the target has."""

    name: str
    meaning: str
    accuracy: float
    cumulative: Change
    alone: Change

    @property
    def interaction(self) -> float:
        """The cumulative drop less the one alone: what the factor costs only because of those before it."""
        return self.cumulative.drop - self.alone.drop

    def to_json(self) -> dict[str, Any]:
        return {
            "factor": self.name,
            "meaning": self.meaning,
            "accuracy": self.accuracy,
            "cumulative": self.cumulative.to_json(),
            "alone": self.alone.to_json(),
            "interaction": self.interaction,
        }


@dataclass(frozen=True)
class AccuracyBudget:
    """From the float equilibrium to the target, on `samples` images: rows in the order in which factors are switched on, each on top of the one before."""

    target: str
    samples: int
    rows: tuple[Factor, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "samples": self.samples,
            "order": [r.name for r in self.rows],
            "rows": [r.to_json() for r in self.rows],
        }
