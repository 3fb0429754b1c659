"""The report of a comparison: one HTML page that holds everything it shows, and the same pictures as PNG and SVG beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.files import replace_file
from toolchain.report import budget, inside, one_sample, sections
from toolchain.report.page import Page

if TYPE_CHECKING:
    from toolchain.comparison import Comparison, Trace


def write(comparison: Comparison, traces: Sequence[Trace], folder: Path) -> Path:
    """Write FOLDER/index.html and its pictures; returns the page's path.

    `traces` holds one sample in full on each target, in the order of the rows (empty: no rasters, no potentials). Everything is drawn before the
    first file is written, and the page comes last. Equal numbers give equal bytes. UsageError where the folder cannot be written.
    """
    page = Page(tuple(row.deployment.target for row in comparison.rows))
    parts = [
        sections.headline(page, comparison),
        budget.section(page, comparison),
        inside.populations(page, comparison),
        inside.settling(page, comparison),
        sections.rates(page, comparison),
        one_sample.section(page, comparison, traces, "forward"),
        one_sample.section(page, comparison, traces, "feedback"),
        sections.confusion(page, comparison),
        sections.gradients(page, comparison),
        inside.fidelity(page, comparison),
        sections.footnotes(comparison, bool(traces)),
    ]
    html = page.document(f"{comparison.model}: {', '.join(page.targets)}", parts)
    for name, picture in page.drawn.items():
        replace_file(folder / f"{name}.png", picture.png)
        replace_file(folder / f"{name}.svg", picture.svg)
    replace_file(folder / "index.html", html.encode())
    return folder / "index.html"
