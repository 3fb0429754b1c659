"""The report's section on where accuracy goes: the waterfall from the float equilibrium to the chip, its table, the populations, and what to try."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from toolchain.analysis.drops import AccuracyBudget, Change, interval, points
from toolchain.analysis.factors import STEPS
from toolchain.report.page import Page, table
from toolchain.report.pictures import GREY, LEAST_SPAN, WIDTH, Picture, drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from toolchain.comparison import Comparison

LOST, WON = "#D55E00", "#0072B2"
"""Accuracy lost and won, of the pictures' colours."""

LABEL = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}


def section(page: Page, comparison: Comparison) -> str:
    """Where the accuracy of the first target that runs integers goes; a sentence where that cannot be said, nothing where nobody asked."""
    budget = comparison.budget
    if budget is None:
        return ""
    if isinstance(budget, str):
        return f"<section>\n<h2>Where accuracy goes</h2>\n<p>No accuracy budget: {escape(budget)}.</p>\n</section>"
    *said, check, advice = (escape(f"{line[0].upper()}{line[1:]}.") for line in comparison.summary)
    parts = [
        "<section>\n<h2>Where accuracy goes</h2>",
        *(f"<p>{line}</p>" for line in said),
        f'<p class="{"good" if budget.closing.passed else "bad"}">{check}</p>',
        f'<p class="lead">{_flags(advice, " ".join(budget.advice.options))}</p>',
        page.panels([_waterfall(budget)]),
        _table(budget),
        _rates(budget),
        f'<p class="soft">{escape(_NOTE)}</p>',
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _flags(advice: str, flags: str) -> str:
    """The advice with its flags as code, which no line breaks behind a hyphen."""
    each = [f"--{flag}" for flag in escape(flags).split("--")[1:]]
    shown = " ".join(f"<code>{flag.strip()}</code>" for flag in each)
    return advice.replace(escape(flags), shown) if flags else advice


_NOTE = (
    "Factors are switched on one after the other, from the float model in many steps to the chip's integers. A drop is accuracy lost, in points, negative where it is won, with "
    "Tango's 95 % interval over images. Alone is the same factor switched on by itself in the float model; the interaction is the drop less that, what the factor costs only "
    "because of those before it. Logit differences are means over the mean margin between the two largest logits."
)


def _table(budget: AccuracyBudget) -> str:
    head = [
        "",
        "accuracy %",
        "drop",
        "95 % interval",
        "alone",
        "interaction",
        "to wrong",
        "to right",
        "answers changed",
        "|logit difference|",
    ]
    start = "float model" if budget.baseline.residual is None else "equilibrium"
    rows = [[start, f"{100 * budget.baseline.accuracy:.2f}", *[""] * 8]]
    for row in budget.rows:
        cells = _cells(row.cumulative, points(row.alone.drop), points(row.interaction))
        rows.append([escape(row.name), f"{100 * row.accuracy:.2f}", *cells])
    together = _cells(budget.total, points(budget.total.drop - budget.remainder), points(budget.remainder))
    rows.append(["in all", f"{100 * budget.accuracy:.2f}", *together])
    if budget.arithmetic is not None:
        accuracy = next((row.accuracy for row in budget.rows if row.name == STEPS), budget.baseline.accuracy) - budget.arithmetic.drop
        rows.append([f"beside it: {escape(str(budget.first))}", f"{100 * accuracy:.2f}", *_cells(budget.arithmetic, "", "")])
    return table(head, rows, _caption(budget))


def _caption(budget: AccuracyBudget) -> str:
    said = f"{budget.target} on the first {budget.samples:,} samples of {budget.dataset}; drops in points of accuracy."
    if budget.rows:
        said += f" What is switched on: {', '.join(f'{row.name} ({row.meaning})' for row in budget.rows)}."
    if budget.none:
        said += f" Without a row, because nothing changed: {', '.join(budget.none)}."
    if budget.arithmetic is not None:
        said += f" Beside it, no part of the sum: the same float model in float32, as many time steps, on {budget.first}, the comparison's first row."
    return said


def _cells(change: Change, alone: str, interaction: str) -> list[str]:
    return [
        points(change.drop),
        interval(change),
        alone,
        interaction,
        f"{change.to_wrong:,}",
        f"{change.to_right:,}",
        f"{change.changed:,}",
        f"{change.logit_difference:.4f}",
    ]


def _rates(budget: AccuracyBudget) -> str:
    """Mean |rate difference| by population and factor."""
    if not budget.rows:
        return ""
    head = ["population", *(escape(row.name) for row in budget.rows), "in all"]
    rows = [
        [escape(name), *(f"{row.cumulative.rate_difference.get(name, 0.0):.5f}" for row in budget.rows), f"{whole:.5f}"]
        for name, whole in budget.total.rate_difference.items()
    ]
    return table(head, rows, "Mean |rate difference| that each factor makes, on top of those before it, by population of couples.")


def _waterfall(budget: AccuracyBudget) -> Picture:
    start = "float model" if budget.baseline.residual is None else f"equilibrium\n({budget.baseline.time_steps:,} steps)"
    names = [start, *(row.name for row in budget.rows), budget.target]
    levels = [budget.baseline.accuracy, *(row.accuracy for row in budget.rows)]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot([100 * levels[0]], [0], "o", color=GREY, markersize=11)
        axes.plot([100 * levels[-1]], [len(names) - 1], "o", color=GREY, markersize=11)
        low, high = _span(budget, levels)
        for y, row in enumerate(budget.rows, 1):
            before, after, change = 100 * levels[y - 1], 100 * levels[y], row.cumulative
            colour = LOST if change.drop > 0 else WON
            axes.plot([before, before], [y - 1, y], color=GREY, linewidth=1, zorder=0)
            axes.barh(y, after - before, left=before, height=0.5, color=colour)
            axes.barh(y, -100 * row.alone.drop, left=before, height=0.72, facecolor="none", edgecolor="black", linewidth=1.1)
            axes.plot([before - 100 * change.low, before - 100 * change.high], [y, y], color=GREY, linewidth=2, alpha=0.8)
            axes.plot([after], [y], "|", color=colour, markersize=16, markeredgewidth=2.5)
            axes.annotate(_signed(change.drop), (after, y - 0.38), (0, 4), textcoords="offset points", ha="center", fontsize=12, bbox=LABEL)
        axes.plot([100 * levels[-1]] * 2, [len(names) - 2, len(names) - 1], color=GREY, linewidth=1, zorder=0)
        for y, value in ((0, levels[0]), (len(names) - 1, levels[-1])):
            axes.annotate(f"{100 * value:.2f}", (100 * value, y), (0, 12), textcoords="offset points", ha="center", fontsize=13, bbox=LABEL)
        axes.set_xlim(low, high)
        axes.set_ylim(len(names) - 0.5, -0.7)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.locator_params(axis="x", nbins=5)
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.set_xlabel("accuracy (%)")

    said = ", ".join(f"{row.name} {points(row.cumulative.drop)}" for row in budget.rows) or "no factor changes anything"
    return drawn(
        "accuracy-budget",
        draw,
        (WIDTH, 1.3 + 0.95 * len(names)),
        f"Accuracy from {100 * levels[0]:.2f} % in equilibrium to {100 * levels[-1]:.2f} % on {budget.target}, points lost: {said}",
        "Accuracy, factor by factor. Bars: what each changes on top of those above it; black outlines: alone; grey: 95 % interval of the change.",
    )


def _span(budget: AccuracyBudget, levels: Sequence[float]) -> tuple[float, float]:
    """The percents that the axis covers: all levels and, as far as they do not dwarf those, their intervals."""
    ends = [
        100 * (level - end)
        for level, row in zip(levels, budget.rows, strict=False)
        for end in (row.cumulative.low, row.cumulative.high, row.alone.drop)
    ]
    low, high = min([*(100 * level for level in levels), *ends]), max([*(100 * level for level in levels), *ends])
    low, high = max(0.0, low), min(100.0, high)
    low -= max(0.0, LEAST_SPAN - (high - low))
    margin = 0.1 * (high - low)
    return low - margin, high + margin


def _signed(drop: float) -> str:
    """What happened to the accuracy, in points."""
    return "0.00" if drop == 0 else f"{-100 * drop:+.2f}".replace("-", "\N{MINUS SIGN}")
