"""The picture of learning: accuracy after each epoch, a line an arm (the mean over its seeds) in a band from its worst seed to its best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.report.pictures import COLOURS, Picture, drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (9.0, 5.4)
MARKS = "osD^v"


@dataclass(frozen=True)
class Arm:
    """What is compared: `runs` holds the accuracies of one seed each, fractions of 1, before learning and after each epoch."""

    name: str
    runs: tuple[tuple[float, ...], ...]

    @property
    def mean(self) -> tuple[float, ...]:
        return tuple(sum(values) / len(values) for values in zip(*self.runs, strict=True))


def curves(arms: Sequence[Arm], *, title: str, samples: str) -> Picture:
    """`arms` of equal length together; `samples` says in words what accuracy is of."""

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        for arm, colour, mark in zip(arms, COLOURS[1:] + COLOURS[:1], MARKS * len(arms), strict=False):
            epochs = range(len(arm.mean))
            low, high = zip(*((100 * min(values), 100 * max(values)) for values in zip(*arm.runs, strict=True)), strict=True)
            axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(epochs, [100 * value for value in arm.mean], marker=mark, markersize=6, color=colour, linewidth=1.8, label=arm.name)
        later = [100 * value for arm in arms for run in arm.runs for value in run[1:]]
        if later:  # what differs is after the first epoch; how all of them began stands in the caption
            margin = max(1.0, 0.06 * (max(later) - min(later)))
            axes.set_ylim(min(later) - margin, max(later) + margin)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(f"accuracy %, {samples}", fontsize=12)
        axes.set_title(title)
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(loc="lower right", frameon=False, fontsize=11)

    last = "; ".join(f"{arm.name} {100 * arm.mean[-1]:.1f} %" for arm in arms)
    seeds = len(arms[0].runs)
    return drawn(
        "learning",
        draw,
        SIZE,
        alt=f"{title}: accuracy after each epoch. At the end: {last}.",
        caption=f"Lines: means over {seeds} seed{'s' * (seeds != 1)}; bands: from the worst to the best of them. Before learning: {100 * arms[0].mean[0]:.1f} %.",
    )
