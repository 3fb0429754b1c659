"""Confidence intervals of what two runs on the same images differ by."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

Z95 = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""

HALVINGS = 60


def paired_interval(losses: int, gains: int, samples: int, z: float = Z95) -> tuple[float, float]:
    """The interval of (losses - gains) / samples, the difference of two accuracies on the same images, where `losses` answers went from right to wrong and `gains` from
    wrong to right.

    Tango's score interval for paired proportions (Statistics in Medicine 17, 891, 1998): the differences d that a score test does not refuse. It asks for no draws and no
    seed, and unlike a bootstrap or Wald's interval it has a width where no answer changed: +- z^2 / (samples + z^2).
    """

    def score(d: float) -> float:
        a = 2 * samples
        b = -losses - gains + (2 * samples - losses + gains) * d
        c = -gains * d * (1 - d)
        rest = (sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # the share of gains that is likeliest at this difference
        spread = samples * (2 * rest + d * (1 - d))
        gap = losses - gains - samples * d
        return gap / sqrt(spread) if spread > 0 else (float("inf") if gap > 0 else float("-inf") if gap < 0 else 0.0)

    middle = (losses - gains) / samples
    return _edge(score, middle, -1.0, z), _edge(score, middle, 1.0, z)


def _edge(score: Callable[[float], float], inside: float, outside: float, z: float) -> float:
    """The difference between `inside` and `outside` at which the score reaches `z`, of either sign."""
    for _ in range(HALVINGS):
        middle = (inside + outside) / 2
        if abs(score(middle)) < z:
            inside = middle
        else:
            outside = middle
    return inside
