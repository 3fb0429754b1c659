"""The report's pictures, drawn from plain arrays: PNG for the page, SVG for a talk, the same bytes for the same numbers.

One panel a picture: the page sets them side by side, or below each other on a phone. Colours are those of Okabe and Ito, told apart with every kind
of colour vision. matplotlib is used without pyplot, so no global state of a caller's is touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import ceil, isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]

COLOURS = ("#333333", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""One a target, in the order of the rows."""
PLUS, MINUS = "#762A83", "#5AAE61"
"""Signed spikes, +1 and -1: no target's colours, and told apart by lightness too."""
GREY = "#8c8c8c"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.8,
    "axes.formatter.limits": (-3, 4),
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "figure.facecolor": "white",
    "figure.dpi": 150,
    "figure.constrained_layout.w_pad": 0.07,
    "figure.constrained_layout.h_pad": 0.07,
    "path.simplify": True,
    "svg.hashsalt": "fsnn-toolchain",
    "text.parse_math": False,
}
WIDTH = 5.4
"""Inches: at 150 dots an inch sharp on a phone and on a slide, with 13 point type legible on both."""
BINS = 101
LEAST_SPAN = 1.0
"""Points that the axis of shares covers at least, so that equal ones do not look far apart."""
POPULATIONS = 6
"""Populations that get pictures of their own."""
DOTS, INKED = 5, slice(1, 4)
"""A time step of a raster is so many dots wide; these are inked where spikes are dense, so that a couple firing at every step shows as a row of ticks."""
ANNOTATED_CLASSES = 12
"""A confusion matrix of more classes has no room for numbers."""


@dataclass(frozen=True)
class Picture:
    """One picture: `name` is the file name wanted, without ending, `alt` says in words what it shows, `caption` what to look for."""

    name: str
    alt: str
    caption: str
    png: bytes
    svg: bytes


@dataclass(frozen=True)
class Train:
    """Spikes of one population's chosen couples, int8 (time_steps, couples); `label` names it and says how many were chosen."""

    label: str
    spikes: npt.NDArray[np.int8]


@dataclass(frozen=True)
class Lines:
    """One neuron on every target: potentials over the threshold and spikes, each (time_steps,), by target."""

    label: str
    potentials: Mapping[str, Floats]
    spikes: Mapping[str, npt.NDArray[np.int8]]


def shares(
    name: str,
    values: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    palette: Mapping[str, str],
    *,
    unit: str,
    alt: str,
    caption: str,
) -> Picture:
    """A dot a target, with its interval where there is one; `values` and `intervals` are fractions of 1, shown as percent."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        rows = list(values)
        bounds = [v for row in rows for v in (values[row], *intervals.get(row, ()))]
        low, high = 100 * min(bounds), 100 * max(bounds)
        low -= max(0.0, LEAST_SPAN - (high - low))
        margin = 0.12 * (high - low)
        for y, row in enumerate(rows):
            if row in intervals:
                axes.plot([100 * v for v in intervals[row]], [y, y], color=palette[row], linewidth=3, alpha=0.45, solid_capstyle="round")
            axes.plot([100 * values[row]], [y], "o", color=palette[row], markersize=11)
            axes.annotate(f"{100 * values[row]:.2f}", (100 * values[row], y), (0, 11), textcoords="offset points", ha="center", fontsize=14)
        axes.set_xlim(low - margin, high + margin)
        axes.set_ylim(len(rows) - 0.6, -0.75)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xticks([tick for tick in axes.get_xticks() if low - margin <= tick <= min(high + margin, 100)])
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.set_xlabel(unit)

    return drawn(name, draw, (WIDTH, 1.5 + 0.72 * max(len(values), 3)), alt, caption)


def density(
    name: str, x: Floats, y: Floats, labels: tuple[str, str], *, title: str, note: str, colour: str, alt: str, caption: str
) -> Picture:
    """How often each pair (x, y) occurs, on a logarithmic scale of colour, with the line of equality. `x` and `y` hold the same number of values."""

    def draw(figure: Figure) -> None:
        from matplotlib.colors import LinearSegmentedColormap, LogNorm
        from matplotlib.ticker import FuncFormatter, NullLocator

        edges = _edges(x, y)
        bins: Any = (edges, edges)  # the stubs of NumPy 1.26 know no tuple of edges
        counts, _, _ = np.histogram2d(x.ravel(), y.ravel(), bins=bins)
        ramp = LinearSegmentedColormap.from_list("count", [_mix(colour, "#ffffff", 0.72), colour, _mix(colour, "#000000", 0.55)])
        axes = figure.add_subplot()
        axes.plot(edges[[0, -1]], edges[[0, -1]], color=GREY, linewidth=1.2, zorder=1)
        mesh = axes.pcolormesh(
            edges,
            edges,
            np.where(counts.T > 0, counts.T, np.nan),
            cmap=ramp,
            norm=LogNorm(1, max(counts.max(), 10)),
            rasterized=True,
            zorder=2,
        )
        axes.set_aspect("equal")
        axes.locator_params(nbins=5)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.set_title(title)
        axes.text(
            0.03,
            0.97,
            note,
            transform=axes.transAxes,
            va="top",
            fontsize=12,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 2},
        )
        bar = figure.colorbar(mesh, ax=axes, shrink=0.75, aspect=22, pad=0.03, format=FuncFormatter(lambda value, _: f"{value:,.0f}"))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.spines["outline"].set_visible(False)
        bar.set_label("pairs")

    return drawn(name, draw, (WIDTH, 4.35), alt, caption)


def raster(name: str, trains: Sequence[Train], *, title: str, colour: str | None, alt: str, caption: str) -> Picture:
    """Spikes of every population of `trains` over the time steps, one row a couple. `colour` of +1; None: one colour for +1 and one for -1."""

    def draw(figure: Figure) -> None:
        from matplotlib.colors import to_rgb
        from matplotlib.patches import Patch

        sizes = [max(train.spikes.shape[1], 12) for train in trains]
        grid = figure.add_gridspec(len(trains), 1, height_ratios=sizes)
        above: Axes | None = None
        for row, train in enumerate(trains):
            axes = figure.add_subplot(grid[row], sharex=above)
            above = axes
            steps, couples = train.spikes.shape
            image = np.ones((max(couples, 1), steps, DOTS, 3))
            inked = image[:couples, :, slice(None) if colour is None else INKED]
            inked[train.spikes.T > 0] = to_rgb(colour or PLUS)
            inked[train.spikes.T < 0] = to_rgb(MINUS)
            image = image.reshape(len(image), -1, 3)
            axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0.5, steps + 0.5, len(image) + 0.5, 0.5))
            if colour is not None:
                axes.hlines(np.arange(1.5, couples), 0.5, steps + 0.5, color="white", linewidth=0.7)
            axes.set_title(train.label, fontsize=12, color="#555555", pad=5)
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(True)
            if not couples:
                axes.text(0.5, 0.5, "no spikes", transform=axes.transAxes, ha="center", va="center", color="#555555")
            axes.tick_params(axis="x", labelbottom=row == len(trains) - 1)
            axes.locator_params(axis="x", nbins=6, integer=True)
        figure.suptitle(title, x=0.013, ha="left", fontsize=14)
        figure.axes[-1].set_xlabel("time step")
        if colour is None:
            keys = [Patch(color=PLUS, label="+1"), Patch(color=MINUS, label="\N{MINUS SIGN}1")]
            figure.legend(handles=keys, loc="outside lower right", ncols=2, frameon=False, handlelength=0.9, columnspacing=1.2)

    return drawn(name, draw, (WIDTH, 4.7 + 0.9 * (len(trains) - 1)), alt, caption)


def potentials(name: str, neurons: Sequence[Lines], palette: Mapping[str, str], *, signed: bool, alt: str, caption: str) -> Picture:
    """Membrane potentials over the threshold, all targets over each other: the first widest and below; above them each target's spikes."""

    def draw(figure: Figure) -> None:
        from matplotlib.lines import Line2D

        names = list(neurons[0].potentials)
        widths = {target: max(6.5 - 2.3 * i, 1.1) for i, target in enumerate(names)}
        alphas = {target: 0.45 if i == 0 and len(names) > 1 else 1.0 for i, target in enumerate(names)}
        above: Axes | None = None
        for row, neuron in enumerate(neurons):
            axes = figure.add_subplot(len(neurons), 1, row + 1, sharex=above)
            above = axes
            steps = np.arange(1, len(neuron.potentials[names[0]]) + 1)
            for level in (1, -1) if signed else (1,):
                axes.axhline(level, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
            for target in names:
                axes.plot(steps, neuron.potentials[target], color=palette[target], linewidth=widths[target], alpha=alphas[target])
            _spike_marks(axes, neuron, names, palette)
            axes.set_title(neuron.label, fontsize=13)
            axes.locator_params(axis="y", nbins=4)
            axes.locator_params(axis="x", nbins=6, integer=True)
            axes.tick_params(axis="x", labelbottom=row == len(neurons) - 1)
        figure.axes[-1].set_xlabel("time step")
        figure.supylabel("potential / threshold", fontsize=13)
        keys = [Line2D([], [], color=palette[t], linewidth=widths[t], alpha=alphas[t], label=t) for t in names]
        figure.legend(handles=keys, loc="outside upper left", ncols=min(len(names), 3), frameon=False, handlelength=1.4)

    return drawn(name, draw, (WIDTH, 1.4 + 1.75 * len(neurons)), alt, caption)


def _spike_marks(axes: Axes, neuron: Lines, names: Sequence[str], palette: Mapping[str, str]) -> None:
    """A line of marks a target above the traces: up for +1, down for -1."""
    low, high = axes.get_ylim()
    line = 0.13 * (high - low)
    for i, target in enumerate(names):
        height = high + line * (len(names) - i - 0.4)
        for sign, marker in ((1, "^"), (-1, "v")):
            at = np.flatnonzero(np.sign(neuron.spikes[target]) == sign) + 1
            axes.plot(at, np.full(len(at), height), marker, color=palette[target], markersize=4.5, markeredgewidth=0)
    axes.set_ylim(low, high + line * (len(names) + 0.2))


def confusion(name: str, matrix: npt.NDArray[np.int64], *, title: str, colour: str, alt: str, caption: str) -> Picture:
    """Counts by label (rows) and prediction (columns). Only mistakes are coloured, so few among many stay visible."""

    def draw(figure: Figure) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        classes = len(matrix)
        mistakes = matrix * (1 - np.eye(classes, dtype=np.int64))
        axes = figure.add_subplot()
        ramp = LinearSegmentedColormap.from_list("mistakes", ["#ffffff", _mix(colour, "#ffffff", 0.15)])
        axes.imshow(mistakes, cmap=ramp, vmin=0, vmax=max(int(mistakes.max(initial=0)), 1), interpolation="nearest")
        if classes <= ANNOTATED_CLASSES:
            for label, predicted in np.argwhere(matrix > 0):
                right, count = label == predicted, int(matrix[label, predicted])
                dark = not right and count > 0.6 * mistakes.max()
                axes.text(
                    predicted,
                    label,
                    f"{count}",
                    ha="center",
                    va="center",
                    fontsize=11,
                    color="white" if dark else "#666666" if right else "black",
                )
        ticks = range(0, classes, max(1, ceil(classes / ANNOTATED_CLASSES)))
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)
        axes.set_xlabel("prediction")
        axes.set_ylabel("label")
        axes.set_title(title)

    return drawn(name, draw, (WIDTH, 5.2), alt, caption)


def drawn(name: str, draw: Callable[[Figure], None], size: tuple[float, float], alt: str, caption: str) -> Picture:
    """Draw once, save twice. No date, no version of anything goes into the files, so equal numbers give equal bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script the font lacks is drawn as boxes, not refused
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.draw_without_rendering()  # a first layout settles the tick labels that the second makes room for
        png, svg = BytesIO(), BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
        figure.set_layout_engine("none")  # the places found for the first are kept
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(name, alt, caption, png.getvalue(), svg.getvalue())


def _edges(x: Floats, y: Floats) -> Floats:
    """Bins for both axes. Values that lie on a grid (rates are spike counts over T) get bins centred on it, so no false stripes arise."""
    values = np.unique(np.concatenate([x.ravel(), y.ravel()]))
    low, high = float(values[0]), float(values[-1])
    if low == high:
        return np.linspace(low - 0.5, high + 0.5, 4)
    step = float(np.abs(values[np.abs(values) > 1e-6 * max(abs(low), abs(high))]).min())
    if not isfinite(step) or (high - low) / step > 2000 or np.abs(values / step - np.rint(values / step)).max() > 0.01:
        return np.linspace(low, high, BINS + 1)
    width = step * ceil((high - low) / step / BINS)
    first = np.floor(low / width + 0.5) * width
    return np.asarray(first + width * (np.arange(round((high - first) / width) + 2) - 0.5), np.float64)


def _mix(colour: str, other: str, share: float) -> Any:
    """`share` of `other` in `colour`, as RGB."""
    from matplotlib.colors import to_rgb

    return tuple((1 - share) * a + share * b for a, b in zip(to_rgb(colour), to_rgb(other), strict=True))
