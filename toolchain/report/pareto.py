"""The picture of a search: accuracy against what it costs, synaptic operations or energy, every point that was run, and the front that no other point beats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from toolchain.report.pictures import COLOURS, GREY, Picture, drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (9.0, 5.4)
"""Inches: one picture on a page of its own, room for a name at every point of the front."""

LEAST_SPAN = 1.0
"""Points of accuracy that the picture covers at least, below the float model."""

ALLOWED_SHARE = 4.0
"""It covers so many times the allowed drop, at least: what lies deeper is counted in a note, not drawn."""

LEFT = 0.22
"""Room left of the cheapest point, for its name, as a share of the (logarithmic) width."""

NAMED = 14
"""Points of the front that are named; of longer ones the most accurate."""


class Point(Protocol):
    """What is drawn of a point; see `toolchain.sweep.Point`."""

    @property
    def weight_bits(self) -> int: ...
    @property
    def time_steps(self) -> int: ...
    @property
    def accuracy(self) -> float: ...
    @property
    def synaptic_operations_per_sample(self) -> float: ...
    @property
    def pareto(self) -> bool: ...


P = TypeVar("P", bound=Point)


def synaptic_operations(point: Point) -> float:
    """What a point costs, where nothing else is said."""
    return point.synaptic_operations_per_sample


def pareto(
    points: Sequence[P],
    chosen: P | None,
    *,
    model: str,
    samples: str,
    time_steps: int,
    reference: float,
    max_drop: float | None,
    cost: Callable[[P], float] = synaptic_operations,
    what: str = "synaptic operations",
    unit: str = "synaptic operations a sample",
) -> Picture:
    """`points` of `model`, judged on `samples` (words), beside the float model's accuracy `reference` (a fraction of 1) at `time_steps`, with the line
    `max_drop` points below it (None: without). Across is `cost`, which is `what` in `unit`, as the axis names it ("energy", "nJ a sample")."""

    def across(point: P) -> float:
        return max(cost(point), 1.0)

    front = sorted((p for p in points if p.pareto), key=cost)
    lowest = 100 * reference - max(LEAST_SPAN, ALLOWED_SHARE * (max_drop or 0.0))
    lowest = min([lowest, *(100 * p.accuracy for p in ([chosen] if chosen else front[-1:]))]) - 0.1
    shown = [p for p in points if 100 * p.accuracy >= lowest]

    marks = [(100 * reference, f"float, T {time_steps}")]
    if max_drop is not None:
        marks.append((100 * reference - max_drop, f"{counted(max_drop, 'point')} lower"))

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axes = figure.add_subplot()
        axes.axhline(100 * reference, color=GREY, linewidth=1.2)
        for height, _ in marks[1:]:
            axes.axhline(height, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xscale("log")  # a silent network costs nothing: it is drawn at one
        steps = [p for p in front if p in shown]
        axes.plot(
            [across(p) for p in steps],
            [100 * p.accuracy for p in steps],
            drawstyle="steps-post",
            color="#333333",
            linewidth=1.6,
            zorder=2,
        )
        bits = sorted({p.weight_bits for p in points}, reverse=True)
        for number, colour in zip(bits, COLOURS[1:] + COLOURS[:1], strict=False):
            own = [p for p in shown if p.weight_bits == number]
            axes.plot(
                [across(p) for p in own],
                [100 * p.accuracy for p in own],
                "o",
                color=colour,
                markersize=7.5,
                markeredgecolor="white",
                markeredgewidth=0.7,
                zorder=3,
                label=f"{number} bits",
            )
        if chosen is not None:
            axes.plot(
                [across(chosen)],
                [100 * chosen.accuracy],
                "o",
                markersize=16,
                markerfacecolor="none",
                markeredgecolor="#333333",
                markeredgewidth=1.8,
                zorder=4,
                label="chosen",
            )
        for point in steps[-NAMED:]:
            axes.annotate(
                f"{point.weight_bits} bits, T {point.time_steps}",
                (across(point), 100 * point.accuracy),
                (-10, 7),
                textcoords="offset points",
                ha="right",
                fontsize=11,
                fontweight="bold" if point == chosen else "normal",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
            )
        for height, words in marks:
            axes.annotate(
                words, (0, height), (5, 4), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=11, color="#555555"
            )
        bounds = [*(height for height, _ in marks), *(100 * p.accuracy for p in shown)]
        low, high = min(bounds), max(bounds)
        span = (high - low) or LEAST_SPAN  # all as accurate as the float model
        axes.set_ylim(low - 0.1 * span, high + 0.13 * span)
        cheapest, dearest = (edge(across(p) for p in shown) for edge in (min, max))
        axes.set_xlim(cheapest * (cheapest / dearest) ** LEFT if dearest > cheapest else cheapest / 2, dearest * 1.25)
        axes.xaxis.set_major_locator(
            LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if dearest < 6 * cheapest else (1, 2, 5) if dearest < 200 * cheapest else (1,))
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set_xlabel(unit)
        axes.set_ylabel(f"accuracy %, {samples}", fontsize=12)
        axes.set_title(f"{model}: accuracy against {what}")
        figure.legend(loc="outside right upper", frameon=False, fontsize=11, handletextpad=0.3)
        below = len(points) - len(shown)
        if below:
            axes.text(0.01, 0.02, f"{below} more below", transform=axes.transAxes, fontsize=11, color="#555555")

    names = ", ".join(f"{p.weight_bits} bits and T {p.time_steps} ({100 * p.accuracy:.2f} %)" for p in front)
    return drawn(
        "pareto",
        draw,
        SIZE,
        alt=f"Accuracy of {model} against {what}, {unit}; the front: {names}.",
        caption="The line joins the points that no other beats at both. Grey: the float model"
        + ("." if max_drop is None else f", and {counted(max_drop, 'point')} below it."),
    )


def counted(number: float, noun: str) -> str:
    """`1 point`, `0.5 points`."""
    return f"{number:g} {noun}" + "s" * (number != 1)
