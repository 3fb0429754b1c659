"""The sections of the report about what happens inside the network: errors by population, settling, and how true gradients are."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from toolchain.analysis.fidelity import shown_ratio
from toolchain.report import lines
from toolchain.report.page import Page, table
from toolchain.report.pictures import Picture

if TYPE_CHECKING:
    from toolchain.analysis.fidelity import Closeness, Fidelity
    from toolchain.analysis.populations import Gap, Populations
    from toolchain.analysis.settling import Curve, Settling
    from toolchain.comparison import Comparison

NAMED = 3
"""Worst neurons that a row of the table names."""


def populations(page: Page, comparison: Comparison) -> str:
    """Where the error of integers is made, and where it shows; empty without an integer target or a float graph."""
    found = None if comparison.inside is None else comparison.inside.populations
    if found is None:
        return ""
    phases = list(dict.fromkeys(row.phase for row in found.rows))
    sentences = [f"<p><b>{escape(name)}</b>: {escape(found.sentence(name))}.</p>" for name in phases]
    drawn = [_error_picture(found, name) for name in phases]
    return "\n".join(
        [
            "<section>\n<h2>Where in the network integers err</h2>",
            (
                f"<p>The float graph and the integer graph side by side on {found.samples:,} samples. Single: one population by itself in integers, fed with the float graph's "
                "spikes at every step, its own loops included, so that what it errs is made there. Entire: the integer graph as it runs, where errors add up.</p>"
            ),
            *sentences,
            page.panels(drawn),
            _population_table(found),
            _neuron_table(found),
            "</section>",
        ]
    )


def settling(page: Page, comparison: Comparison) -> str:
    """Residuals over time steps, what they suggest, and the answers that back it; empty for a model without a float graph."""
    found = None if comparison.inside is None else comparison.inside.settling
    if found is None:
        return ""
    phases = list(dict.fromkeys(curve.phase for curve in found.curves))
    sentences = [f"<p><b>{escape(name)}</b>: {escape(found.sentence(name) or '')}.</p>" for name in phases]
    drawn = [page.panels(_settling_pictures(found, name)) for name in phases]
    return "\n".join(
        [
            "<section>\n<h2>When rates settle</h2>",
            (
                f"<p>Rates after t steps beside the rates that they would make in equilibrium, f, on {found.samples:,} samples: the float graph with its own f and the integer graph "
                "with its own. What is left falls as 1/t, the share of a whole spike; with a leak it stays at what the last potentials hold. Feedback rates have no size of "
                "their own, so theirs is relative, and beta is compared with the linear equation solved without spikes.</p>"
            ),
            *sentences,
            *drawn,
            _settling_table(found),
            "</section>",
        ]
    )


def fidelity(page: Page, comparison: Comparison) -> str:
    """Every tensor's gradient on every target beside SPIDE's in floats and the exact one; empty without a feedback phase or a float graph."""
    found = comparison.fidelity
    if found is None:
        return ""
    against = (
        "Two yardsticks: SPIDE in floats (target torch on a CPU), which says what the target adds; and the exact implicit gradient, solved without spikes, "
        "which says what finite time, spikes and masks cost all of them."
    )
    ran = ", ".join(f"{target} on {device}" for target, device in found.devices.items())
    parts = [
        "<section>\n<h2>How true the gradient is</h2>",
        f"<p>{escape(against)} {found.samples:,} samples; {escape(ran)}.</p>",
        f"<p>{escape(_capital(found.sentence))}.</p>",
    ]
    if found.solved.reason is None:
        forward, feedback = found.solved.iterations
        parts.append(
            f'<p class="soft">Solved to a residual of {found.solved.forward_residual:.1g} (rates, {forward} iterations) and {found.solved.feedback_residual:.1g} '
            f"(beta, {feedback} iterations).</p>"
        )
    else:
        parts.append(f'<p class="bad">No exact gradient: {escape(found.solved.reason)}.</p>')
    return "\n".join([*parts, page.panels(_cosine_pictures(page, found)), _fidelity_table(page, found), "</section>"])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _error_picture(found: Populations, phase: str) -> Picture:
    rows = [row for row in found.rows if row.phase == phase]
    words = ", ".join(
        f"{row.population} single {100 * row.single.relative:.2g} % entire {100 * row.entire.relative:.2g} %" for row in rows[: lines.ROWS]
    )
    left_out = f" The first {lines.ROWS} of {len(rows)} populations; the table has all." if len(rows) > lines.ROWS else ""
    return lines.errors(
        f"populations-{phase}",
        rows,
        title=f"{phase} phase",
        alt=f"Relative error by population in the {phase} phase: {words}",
        caption=f"Mean |difference| from the float graph over its own mean (rates; readout: logits; relays: values).{left_out}",
    )


def _population_table(found: Populations) -> str:
    head = ["population", "phase", "single<br>relative %", "entire<br>relative %", "mean |rate|"]
    head += [f"{which}<br>{what}" for which in ("single", "entire") for what in ("|difference|", "off by &gt; 1 spike %", "potential %")]
    cells = [
        [
            escape(row.population),
            escape(row.phase),
            f"{100 * row.single.relative:.2f}",
            f"{100 * row.entire.relative:.2f}",
            f"{row.mean:.3g}",
            *_gap_cells(row.single),
            *_gap_cells(row.entire),
        ]
        for row in found.rows
    ]
    caption = (
        "Readout: of logits, relays: of values. Potential: mean |difference| at all steps in thresholds, one at most (readout, relays: root mean square over their own size); "
        "spikes that come a step early or late move it without moving rates."
    )
    return table(head, cells, caption)


def _gap_cells(gap: Gap) -> list[str]:
    off = "" if gap.off is None else f"{100 * gap.off:.2f}"
    return [f"{gap.difference:.2g}", off, f"{100 * gap.potential:.2f}"]


def _neuron_table(found: Populations) -> str:
    """Which neurons err most; empty where none does."""
    cells = [
        [escape(row.population), escape(row.phase), *(_named(gap) for gap in (row.single, row.entire))]
        for row in found.rows
        if row.single.worst or row.entire.worst
    ]
    if not cells:
        return ""
    return table(["population", "phase", "single", "entire"], cells, "The neurons that err most, by place, with their mean |difference|.")


def _named(gap: Gap) -> str:
    return escape(", ".join(neuron.shown for neuron in gap.worst[:NAMED]))


def _settling_pictures(found: Settling, phase: str) -> list[Picture]:
    curves = [curve for curve in found.curves if curve.phase == phase]
    last = curves[-1]
    suggested = f"suggested {last.suggested}" if last.suggested is not None else "no number of steps suggested"
    drawn = [
        lines.residuals(
            f"residual-{phase}",
            curves,
            title=f"{phase} phase: residual",
            alt=f"Residual of the {phase} phase over time steps, logarithmic: {_ends(curves)}; tolerance {last.tolerance:g}, {suggested}",
            caption="All couples"
            + (" (thin: each population of the last graph)" if phase == "forward" and len(last.residual) > 1 else "")
            + f"; the steps suggested are those of the {last.graph} graph.",
        )
    ]
    known = [curve for curve in curves if curve.accuracy is not None or curve.cosine is not None]
    if known:
        what = "accuracy" if phase == "forward" else "cosine with the solved equation"
        drawn.append(
            lines.answers(
                f"answers-{phase}",
                known,
                title=f"{phase} phase: {'accuracy' if phase == 'forward' else 'beta'} after t steps",
                alt=f"{what} after each number of time steps of the {phase} phase, {suggested}",
                caption=f"{what[0].upper()}{what[1:]} where the run ends after t steps.",
            )
        )
    return drawn


def _ends(curves: Sequence[Curve]) -> str:
    return ", ".join(f"{c.graph} graph {c.judged[0]:.2g} after 1 step, {c.judged[-1]:.2g} after {c.steps[-1]}" for c in curves)


def _settling_table(found: Settling) -> str:
    head = ["phase", "graph", "suggested", "steps now", "residual now", "within 1/T at", "within tolerance at", "answers settle at"]
    cells = [
        [
            escape(curve.phase),
            escape(curve.graph),
            f"<b>{_number(curve.suggested)}</b>",
            str(curve.time_steps),
            f"{curve.at(curve.time_steps, curve.judged):.4f}",
            _number(curve.steps_to(1 / curve.time_steps)) if curve.phase == "forward" else "",
            f"{_number(curve.steps_to(curve.tolerance))} ({curve.tolerance:g})",
            _number(curve.answered),
        ]
        for curve in found.curves
    ]
    return table(
        head,
        cells,
        "From that step on the residual stays within. Forward: mean |f(a) - a| of couples; feedback: norm relative to f's. Suggested: tolerance met and answers settled.",
    )


def _number(steps: int | None) -> str:
    return "none" if steps is None else str(steps)


def _cosine_pictures(page: Page, found: Fidelity) -> list[Picture]:
    tensors = [name for name in found.tensors if _telling(found, name)][:12]
    drawn = []
    for what, closeness in (("SPIDE in floats", found.spide), ("the exact gradient", found.exact)):
        values = {target: {name: close[name].cosine for name in tensors} for target, close in closeness.items()}
        if values and tensors:
            worst = {target: min(each.values()) for target, each in values.items()}
            drawn.append(
                lines.cosines(
                    f"fidelity-{'spide' if closeness is found.spide else 'exact'}",
                    values,
                    page.palette,
                    title=f"against {what}",
                    alt=f"Cosine of each tensor's gradient with {what}; least: "
                    + ", ".join(f"{target} {value:.4f}" for target, value in worst.items()),
                    caption=f"Cosine with {what}, a dot a target and tensor; 1 is the same direction.",
                )
            )
    return drawn


def _telling(found: Fidelity, name: str) -> bool:
    """A tensor whose gradient is not zero everywhere."""
    return any(close[name].norm_ratio is not None for close in (found.exact or found.spide).values())


def _fidelity_table(page: Page, found: Fidelity) -> str:
    yards = [("SPIDE", found.spide), *([("exact", found.exact)] if found.exact else [])]
    head = ["tensor", "target", *(f"{yard}<br>{what}" for yard, _ in yards for what in ("cosine", "|g| / |g0|"))]
    cells = [
        [escape(name), page.target(target), *(text for _, yard in yards for text in _close(yard[target][name]))]
        for name in found.tensors
        for target in found.spide
    ]
    return table(
        head,
        cells,
        "Gradient g of each tensor on each target beside g0, which is SPIDE's in floats or the exact one; a dash where g0 is zero.",
    )


def _close(close: Closeness) -> list[str]:
    return [f"{close.cosine:.4f}", shown_ratio(close)]
