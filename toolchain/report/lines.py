"""Pictures of what happens over time steps, and of errors by population, drawn from what `toolchain.analysis` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from toolchain.report.pictures import COLOURS, GREY, WIDTH, Picture, drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from toolchain.analysis.populations import PopulationError
    from toolchain.analysis.settling import Curve

OF_GRAPH = {"float": COLOURS[0], "integer": COLOURS[2]}
SINGLE, ENTIRE = COLOURS[2], COLOURS[1]
LEAST_POINTS = 4.0
"""Points of accuracy that an axis covers at least."""
ROWS = 24
"""Populations that a picture of errors has room for."""


def errors(name: str, rows: Sequence[PopulationError], *, title: str, alt: str, caption: str) -> Picture:
    """Two bars a population: the error made in it and the error that shows in it, relative to its own mean, in percent."""
    shown = rows[:ROWS]

    def draw(figure: Figure) -> None:
        from matplotlib.patches import Patch

        axes = figure.add_subplot()
        largest = max((100 * max(row.single.relative, row.entire.relative) for row in shown), default=0.0) or 1.0
        for y, row in enumerate(shown):
            for offset, gap, colour in ((-0.19, row.single, SINGLE), (0.19, row.entire, ENTIRE)):
                value = 100 * gap.relative
                axes.barh(y + offset, value, height=0.34, color=colour)
                axes.annotate(f"{value:.2g}", (value, y + offset), (4, 0), textcoords="offset points", va="center", fontsize=11)
        axes.set_yticks(range(len(shown)), [row.population for row in shown])
        axes.set_ylim(len(shown) - 0.45, -0.55)
        axes.set_xlim(0, 1.14 * largest)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("relative error (%)")
        axes.set_title(title)
        keys = [Patch(color=SINGLE, label="single: made here"), Patch(color=ENTIRE, label="entire: shows here")]
        figure.legend(handles=keys, loc="outside lower right", ncols=2, frameon=False, handlelength=0.9, columnspacing=1.2, fontsize=12)

    return drawn(name, draw, (WIDTH, 2.0 + 0.62 * max(len(shown), 2)), alt, caption)


def residuals(name: str, curves: Sequence[Curve], *, title: str, alt: str, caption: str) -> Picture:
    """What is left of |f(a) - a| after each time step, both axes logarithmic, with the tolerance, the steps suggested and the model's own; thin lines are populations."""

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axes = figure.add_subplot()
        last = curves[-1]
        if last.phase == "forward" and len(last.residual) > 1:
            for values in last.residual.values():
                axes.plot(last.steps, [value or np.nan for value in values], color=OF_GRAPH[last.graph], linewidth=0.8, alpha=0.4)
        for i, curve in enumerate(curves):
            _line(axes, curve, [value or np.nan for value in curve.judged], i, len(curves))
        axes.axhline(last.tolerance, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            f"tolerance {last.tolerance:g}",
            (0.01, last.tolerance),
            (0, 4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=11,
            color="#555555",
        )
        _marks(axes, last, top=True)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        _steps(axes, last)
        axes.set_ylabel("mean |f(a) \N{MINUS SIGN} a|" if last.phase == "forward" else "|f(b) \N{MINUS SIGN} b| / |f(b)|")
        axes.set_title(title)
        _legend(figure, len(curves))

    return drawn(name, draw, (WIDTH, 4.6), alt, caption)


def answers(name: str, curves: Sequence[Curve], *, title: str, alt: str, caption: str) -> Picture:
    """Accuracy after each time step, in percent; of the feedback phase the cosine with the solved equation."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, curve in enumerate(curves):
            values = [100 * v for v in curve.accuracy] if curve.accuracy is not None else curve.cosine or ()
            _line(axes, curve, values, i, len(curves))
        _marks(axes, curves[-1], top=False)
        axes.set_xscale("log")
        _steps(axes, curves[-1])
        axes.set_ylabel("accuracy (%)" if curves[-1].accuracy is not None else "cosine")
        axes.ticklabel_format(axis="y", useOffset=False)
        low, high = axes.get_ylim()
        if curves[-1].accuracy is not None and high - low < LEAST_POINTS:
            top = min((low + high + LEAST_POINTS) / 2, 100.2)
            axes.set_ylim(top - LEAST_POINTS, top)
        axes.set_title(title)
        _legend(figure, len(curves))

    return drawn(name, draw, (WIDTH, 4.6), alt, caption)


def cosines(
    name: str, values: Mapping[str, Mapping[str, float]], palette: Mapping[str, str], *, title: str, alt: str, caption: str
) -> Picture:
    """A dot a target and tensor: its cosine. `values` by target and tensor."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        tensors = list(next(iter(values.values())))
        for i, (target, found) in enumerate(values.items()):
            offset = 0.5 * (i - (len(values) - 1) / 2) / len(values)
            axes.plot(
                [found[t] for t in tensors],
                [y + offset for y in range(len(tensors))],
                "o",
                color=palette[target],
                markersize=8,
                label=target,
            )
        low = min(v for found in values.values() for v in found.values())
        axes.set_xlim(low - 0.06 * max(1 - low, 0.02), 1 + 0.04 * max(1 - low, 0.02))
        axes.set_yticks(range(len(tensors)), tensors, fontsize=11)
        axes.set_ylim(len(tensors) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.locator_params(axis="x", nbins=4)
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.set_xlabel("cosine")
        axes.set_title(title)
        figure.legend(loc="outside lower right", ncols=min(len(values), 3), frameon=False, handlelength=0.6, columnspacing=1.2, fontsize=12)

    return drawn(name, draw, (WIDTH, 2.0 + 0.42 * max(len(next(iter(values.values()))), 3)), alt, caption)


def _line(axes: Axes, curve: Curve, values: Sequence[float], place: int, count: int) -> None:
    """One graph's line: the first of two is wide and pale, so that the other shows on it."""
    below = place < count - 1
    axes.plot(
        curve.steps, values, color=OF_GRAPH[curve.graph], linewidth=4.5 if below else 1.9, alpha=0.45 if below else 1, label=curve.graph
    )


def _marks(axes: Axes, curve: Curve, *, top: bool) -> None:
    """Where the model is, and where it could be: upright words beside a line each, where the curves are not."""
    letter = "T" if curve.phase == "forward" else "T_B"
    marks: list[tuple[int, str, str, Any]] = [(curve.time_steps, "#555555", f"{letter} now: {curve.time_steps}", (0, (1, 1.2)))]
    if curve.suggested is not None:
        marks.append((curve.suggested, COLOURS[3], f"suggested: {curve.suggested}", (0, ())))
    first = min(step for step, _, _, _ in marks)
    for step, colour, words, style in marks:
        axes.axvline(step, color=colour, linewidth=1.6, linestyle=style, zorder=0)
        side, apart = ("right", -3) if step == first and step > 2 else ("left", 3)
        axes.annotate(
            words,
            (step, 0.97 if top else 0.03),
            (apart, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha=side,
            va="top" if top else "bottom",
            rotation=90,
            fontsize=11,
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
        )


def _steps(axes: Axes, curve: Curve) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    wanted = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if t <= curve.steps[-1]]
    axes.set_xlim(0.95, curve.steps[-1] * 1.05)
    axes.xaxis.set_major_locator(FixedLocator(wanted))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("time steps")
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)


def _legend(figure: Figure, count: int) -> None:
    if count > 1:
        figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=12, handlelength=1.4, columnspacing=1.2)
