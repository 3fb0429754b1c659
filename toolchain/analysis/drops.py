"""Where accuracy goes: what the switches of `analysis.factors` do to answers, one after the other and each alone. `analysis.accuracy` runs them; docs/compare.md reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.analysis.advice import Advice
from toolchain.analysis.factors import STEPS
from toolchain.notation import table


@dataclass(frozen=True)
class Change:
    """What one switch did to the answers to the same images. `drop` is a fraction of 1, lost accuracy positive; `low` and `high` are its 95 % confidence interval over
    images (`intervals.paired_interval`).

    to_wrong, to_right  answers that were right before and are wrong behind, and the other way round; `changed` counts all that differ
    rate_difference     by couple population, mean |rate difference|
    logit_difference    mean |logit difference| over the mean margin (largest less second largest logit) before the switch
    """

    drop: float
    low: float
    high: float
    to_wrong: int
    to_right: int
    changed: int
    rate_difference: dict[str, float]
    logit_difference: float

    @property
    def nothing(self) -> bool:
        """No answer, rate or logit moved."""
        return self.changed == 0 and self.logit_difference == 0 and not any(self.rate_difference.values())

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Factor:
    """One row: `cumulative` on top of all rows before it, `alone` in the float model of as many steps as the target has (time steps: of the equilibrium)."""

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
class Baseline:
    """What the budget starts from: the float graph in float64, in `time_steps` steps. `residual` is how far the rates still moved in the second half of them (mean over
    neurons and images, the largest population's); None where the input has no more steps than the target's and nothing settles (events)."""

    accuracy: float
    time_steps: int
    residual: float | None

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Closing:
    """Whether the run with every switch on was the integer graph's: `differing` of `compared` spikes, potentials and saturations. `targets` says of each target
    that runs integers how many of its logits differ from that run's."""

    compared: int
    differing: int
    targets: dict[str, int]

    @property
    def passed(self) -> bool:
        return self.differing == 0 and not any(self.targets.values())

    def to_json(self) -> dict[str, Any]:
        return {"compared": self.compared, "differing": self.differing, "targets": self.targets, "passed": self.passed}


@dataclass(frozen=True)
class AccuracyBudget:
    """From the float equilibrium to the integer graph that `target` runs, on `samples` images: `rows` in the order in which factors are switched on.

    `none` lists the factors that changed nothing and have no row. `arithmetic` is what float32 and its device do to the answers of the same float model in the target's
    time steps (from float64 on the CPU to the comparison's first row, called `first`); it is no part of the sum, since integers have no such rounding. `total` goes from
    the baseline to the last row.
    """

    target: str
    dataset: str
    samples: int
    time_steps: int
    baseline: Baseline
    rows: tuple[Factor, ...]
    none: tuple[str, ...]
    total: Change
    first: str | None
    arithmetic: Change | None
    closing: Closing
    worst_population: str | None
    worst_cause: str | None
    advice: Advice

    @property
    def accuracy(self) -> float:
        return self.baseline.accuracy - self.total.drop

    @property
    def remainder(self) -> float:
        """The whole drop less the factors' drops alone: what they cost only together."""
        return self.total.drop - sum(row.alone.drop for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "dataset": self.dataset,
            "samples": self.samples,
            "time_steps": self.time_steps,
            "order": [row.name for row in self.rows],
            "none": list(self.none),
            "baseline": self.baseline.to_json(),
            "rows": [row.to_json() for row in self.rows],
            "accuracy": self.accuracy,
            "total": self.total.to_json(),
            "remainder": self.remainder,
            "first_row": None if self.arithmetic is None else {"name": self.first, "arithmetic": self.arithmetic.to_json()},
            "closing_check": self.closing.to_json(),
            "worst_population": self.worst_population,
            "worst_population_cause": self.worst_cause,
            "suggestion": self.advice.to_json(),
            "summary": list(self.summary()),
        }

    def to_text(self, made: str | None = None) -> str:
        """The table, and behind it the summary of five lines; `made` as in `summary`."""
        head = [
            "where accuracy goes",
            "accuracy %",
            "drop",
            "95 % interval",
            "alone",
            "interaction",
            "to wrong",
            "to right",
            "|rate|",
            "|logit|",
        ]
        steps = f"float equilibrium ({self.baseline.time_steps:,} steps)" if self.baseline.residual is not None else "float model"
        rows = [[steps, f"{100 * self.baseline.accuracy:.2f}", *[""] * 8], *(_cells(row) for row in self.rows)]
        rows.append(
            _change_cells("in all", self.accuracy, self.total, f"{points(self.total.drop - self.remainder)}", points(self.remainder))
        )
        if self.arithmetic is not None and not self.arithmetic.nothing:
            name = f"beside it: float32 of {self.first}"
            rows.append(_change_cells(name, None, self.arithmetic, "", ""))
        return "\n".join([*table(head, rows), "", *self.summary(made)])

    def summary(self, made: str | None = None) -> tuple[str, str, str, str, str]:
        """Five lines: the drop, the factors, the worst population, whether the check closed, what to try.

        `made` says in which population integers err by themselves (`populations.Populations.worst`). It is the worst one unless time steps cost most, in which integers
        have no part; without it, and then, the worst is the population whose rates moved most.
        """
        return self._drop_line(), self._factors_line(), self._population_line(made), self._check_line(), f"try: {self.advice.sentence}"

    def _drop_line(self) -> str:
        start = f"in equilibrium ({self.baseline.time_steps:,} float steps)" if self.baseline.residual is not None else "in floats"
        return (
            f"accuracy: {100 * self.baseline.accuracy:.2f} % {start}, {100 * self.accuracy:.2f} % on {self.target}, T {self.time_steps}: "
            f"{points(self.total.drop)} points lost {interval(self.total)}, n = {self.samples:,} of {self.dataset}"
        )

    def _factors_line(self) -> str:
        if not self.rows:
            return "by factor: none changes anything"
        ranked = sorted(self.rows, key=lambda row: weight(row.cumulative), reverse=True)
        first = ranked[0]
        answers = f"answers to wrong {first.cumulative.to_wrong:,}, to right {first.cumulative.to_right:,}"
        rest = "".join(f"; {row.name} {points(row.cumulative.drop)}" for row in ranked[1:])
        return f"by factor: {first.name} {points(first.cumulative.drop)} {interval(first.cumulative)}, alone {points(first.alone.drop)}, {answers}{rest}"

    def _population_line(self, made: str | None) -> str:
        worst = largest(self.rows)
        shift = "every rate is the float model's"
        if self.worst_population is not None:
            start = "equilibrium" if self.baseline.residual is not None else "floats"
            shift = f"mean |rate difference| {self.total.rate_difference[self.worst_population]:.4f} from {start}, most of it by {self.worst_cause}"
        if made is None or worst is None or worst.name == STEPS:
            return f"worst population: {'none' if self.worst_population is None else self.worst_population}, {shift}"
        where = "" if self.worst_population is None else f"rates moved most in {self.worst_population}, "
        return f"worst population: {made}; {where}{shift}"

    def _check_line(self) -> str:
        c = self.closing
        said = f"all {c.compared:,} spikes, potentials and saturations are the integer graph's"
        if c.differing:
            said = f"FAILED, {c.differing:,} of {c.compared:,} spikes, potentials and saturations are not the integer graph's: the rows above are not to be trusted"
        same = [name for name, count in c.targets.items() if not count]
        said += f", as are the logits of {', '.join(same)}" if same and not c.differing else ""
        other = [f"{name} ({count:,} logits)" for name, count in c.targets.items() if count]
        said += f"; FAILED, other logits on {', '.join(other)}" if other else ""
        if self.arithmetic is not None:
            said += f"; float32 of {self.first} changes {self.arithmetic.changed:,} answers"
        return f"check: every switch on, {said}"


def weight(change: Change) -> tuple[float, int, float]:
    """By what changes are ranked: the drop where there is one, then answers that changed, then logits."""
    return max(change.drop, 0.0), change.changed, change.logit_difference


def points(drop: float) -> str:
    """A fraction of 1 as points of accuracy; what rounds to 0 has no sign."""
    return f"{round(100 * drop, 2) + 0.0:.2f}"


def interval(change: Change) -> str:
    return f"[{points(change.low)}, {points(change.high)}]"


def moved(change: Change) -> float:
    """The mean |rate difference| of the population that moved most."""
    return max(change.rate_difference.values(), default=0.0)


def _cells(row: Factor) -> list[str]:
    return _change_cells(f"+ {row.name}: {row.meaning}", row.accuracy, row.cumulative, points(row.alone.drop), points(row.interaction))


def _change_cells(name: str, accuracy: float | None, change: Change, alone: str, interaction: str) -> list[str]:
    return [
        name,
        "" if accuracy is None else f"{100 * accuracy:.2f}",
        points(change.drop),
        interval(change),
        alone,
        interaction,
        f"{change.to_wrong:,}",
        f"{change.to_right:,}",
        f"{moved(change):.4f}",
        f"{change.logit_difference:.4f}",
    ]


def largest(rows: Sequence[Factor]) -> Factor | None:
    """The row that costs most."""
    return max(rows, key=lambda row: weight(row.cumulative), default=None)
