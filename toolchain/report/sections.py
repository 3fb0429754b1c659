"""The sections of the report about whole data sets: accuracy, rates, mistakes, the implicit gradient, and the footnotes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from html import escape
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from toolchain.report import pictures
from toolchain.report.page import Page, table
from toolchain.report.pictures import Picture

if TYPE_CHECKING:
    from toolchain.comparison import Comparison, Gradient, Row
    from toolchain.deploy import Deployment

TENSORS = 6
"""Weights whose gradients get pictures of their own."""


def headline(page: Page, comparison: Comparison) -> str:
    """What ran, how well, how alike, and what it took."""
    first, steps = comparison.rows[0].deployment, _feedback_steps(comparison)
    results = ", ".join(f"{100 * row.deployment.accuracy:.2f} % on {_called(row.deployment)}" for row in comparison.rows)
    facts = f"{first.dataset}, n = {first.samples:,}, T = {first.time_steps}" + (f", T_B = {steps}" if steps else "")
    notes = "".join(
        f'<p class="bad">Target {escape(d.target)} is missing on this machine: its row ran on {escape(d.ran_on)} instead, as --fallback asked.</p>\n'
        for d in (row.deployment for row in comparison.rows)
        if d.ran_on != d.target
    )
    notes += "".join(f'<p class="bad">{escape(warning)}.</p>\n' for warning in comparison.warnings)
    return (
        f'<header>\n<h1>{escape(comparison.model)}: {escape(results)}</h1>\n<p class="lead">{escape(facts)}</p>\n{_verdict(comparison)}\n{notes}</header>\n'
        f"<section>\n<h2>Accuracy and agreement</h2>\n{_accuracy_table(page, comparison)}\n"
        f"{page.panels(_share_pictures(page, comparison))}\n<h3>What it took</h3>\n{_cost_table(page, comparison)}\n</section>"
    )


def rates(page: Page, comparison: Comparison) -> str:
    """Every couple's rate on every target over its rate on the first; empty where there is one target."""
    first, others = comparison.rows[0].deployment, comparison.rows[1:]
    if not others:
        return ""
    shown = list(first.rates)[: pictures.POPULATIONS]
    parts = [
        f"<section>\n<h2>Firing rates against {escape(first.target)}</h2>",
        f"<p>Every couple on every sample: its rate on a target over its rate on {escape(first.target)}. On the grey line they are equal."
        + (f" Pictures show the first {len(shown)} populations; the table has all." if len(first.rates) > len(shown) else "")
        + "</p>",
    ]
    for name in shown:
        shape = " x ".join(map(str, first.rates[name].shape[1:]))
        drawn = [_rate_picture(page, name, row, first) for row in others]
        parts.append(f'<h3>{escape(name)} <span class="soft">({shape} couples)</span></h3>\n{page.panels(drawn)}')
    cells = [[escape(name), *(f"{row.rate_difference[name]:.5f}" for row in others)] for name in first.rates]
    head = ["population", *(page.target(row.deployment.target) for row in others)]
    return "\n".join([*parts, table(head, cells, f"Mean |rate difference| from {first.target}."), "</section>"])


def confusion(page: Page, comparison: Comparison) -> str:
    """Labels against answers, a matrix a target."""
    deployments = [row.deployment for row in comparison.rows]
    classes = 1 + max(int(values.max(initial=0)) for d in deployments for values in (d.labels, d.predictions))
    drawn = []
    for d in deployments:
        matrix = np.bincount(d.labels * classes + d.predictions, minlength=classes * classes).reshape(classes, classes)
        drawn.append(
            pictures.confusion(
                f"confusion-{d.target}",
                matrix,
                title=f"{d.target}: {_counted(d.samples - d.correct, 'mistake')}",
                colour=page.palette[d.target],
                alt=f"Confusion matrix of {d.target}: {d.correct:,} of {d.samples:,} right",
                caption=_most_frequent(matrix),
            )
        )
    text = "Samples by label and answer. Right answers, on the diagonal, are grey; colour is for mistakes."
    return f"<section>\n<h2>Confusion</h2>\n<p>{text}</p>\n{page.panels(drawn)}\n</section>"


def gradients(page: Page, comparison: Comparison) -> str:
    """The feedback phase: its gradients and equilibria against the first target's; one sentence where the model has none."""
    found = {row.deployment.target: row.gradient for row in comparison.rows if row.gradient is not None}
    if not found:
        return "<section>\n<h2>Implicit gradient</h2>\n<p>This model was compiled for inference only: it has no feedback phase to compare.</p>\n</section>"
    first_name, first = next(iter(found.items()))
    others = {name: gradient for name, gradient in found.items() if name != first_name}
    parts = [
        f"<section>\n<h2>Implicit gradient against {escape(first_name)}</h2>",
        (
            f"<p>The feedback phase on {_counted(first.samples, 'sample')}: {_feedback_steps(comparison)} steps of signed spikes, scale factor {first.scale_factor:g}. "
            "Gradients are of the mean cross entropy, at its true scale.</p>"
        ),
        _feedback_table(page, found),
    ]
    if others:
        parts.append(_tensor_table(first_name, first, others))
    weights = [name for name, g in first.found.gradients.items() if g.ndim > 1][:TENSORS]
    for target, gradient in others.items():
        drawn = [_gradient_picture(page, name, target, gradient, first_name, first) for name in weights]
        parts.append(f"<h3>{page.target(target)}: gradient of each weight</h3>\n{page.panels(drawn)}")
    for name in list(first.found.beta)[: pictures.POPULATIONS] if others else ():
        drawn = [_beta_picture(page, name, target, gradient, first_name, first) for target, gradient in others.items()]
        parts.append(f"<h3>Feedback equilibrium beta of {escape(name)}</h3>\n{page.panels(drawn)}")
    return "\n".join([*parts, "</section>"])


def footnotes(comparison: Comparison, traced: bool) -> str:
    """Where it ran, what the words mean, and the command that gives the same numbers again."""
    deployments = [row.deployment for row in comparison.rows]
    gain = next((row.gradient.scale_factor for row in comparison.rows if row.gradient is not None), None)
    terms = {
        "Ran": "; ".join(f"{d.target} on {d.ran_on} ({d.device}, timing {d.timing})" for d in deployments) + ".",
        "Versions": ", ".join(f"{name} {version}" for name, version in deployments[0].versions.items()) + ".",
        **TERMS,
        **({} if gain is None else {"Scale factor": SCALE_FACTOR.format(gain=f"{gain:g}"), **FEEDBACK_TERMS}),
        **({"Single sample": SINGLE_SAMPLE} if traced else {}),
    }
    body = "\n".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms.items())
    return (
        f"<footer>\n<h2>Footnotes</h2>\n<p>The same numbers again:</p>\n<pre>{escape(_command(comparison))}</pre>\n"
        '<p class="soft">A model that was read from a file is named by its stem: give its path. '
        "Every picture lies beside this page as .png and .svg under the name below it.</p>\n"
        f"<dl>\n{body}\n</dl>\n</footer>"
    )


TERMS = {
    "Accuracy": "Share of right answers; its interval is Wilson's at 95 %. All targets saw the same samples, so their differences are paired.",
    "Timing": "step: the model's own time steps. exact: several hardware steps a time step, with the spikes of step. pipelined: one hardware step a "
    "time step, where rates move by about 1/T.",
    "Synaptic operations": "Spikes between populations times the nonzero weights they meet; the input's connection, which the host computes, is not "
    "counted. In the forward phase a spike meets each weight once; in the feedback phase twice, at the plus and the minus member of its target. Gated "
    "spikes are not sent.",
    "Saturations": "Membrane potentials clamped at 24 bit, counted once a neuron and step.",
}
SCALE_FACTOR = "The loss is multiplied by {gain} for the feedback phase, so that errors are large enough to make spikes; gradients are divided by it again."
FEEDBACK_TERMS = {
    "Silent": "Share of couples, over all samples, that never fired in the feedback phase, so that their beta is 0. Near 100 %: raise the scale factor.",
    "Clipped": "Share of couples that fired at (nearly) every step, so that |beta| met its bound. Not near 0 %: lower the scale factor.",
}
SINGLE_SAMPLE = (
    "Rasters and potentials of target torch are those of the folded float graph in float32, which has the module's own spikes up to rounding: the "
    "module keeps no history. The sample is the one whose error makes the most feedback spikes. Its error is the one it has in a batch of the size that the gradient is taken over; alone it would be larger, and clip."
)


def wilson(correct: int, samples: int) -> tuple[float, float]:
    """The 95 % interval of the share `correct` / `samples`, fractions of 1 (Wilson 1927, score interval)."""
    z = 1.959964
    share, square = correct / samples, z * z / samples
    centre, half = share + square / 2, sqrt(square * share * (1 - share) + square * square / 4)
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))


def _verdict(comparison: Comparison) -> str:
    others = comparison.rows[1:]
    if not others:
        return '<p class="soft">One target ran, so there is nothing to compare it with.</p>'
    differ = ", ".join(f"{_called(r.deployment)} on {round((1 - r.agreement) * r.deployment.samples):,}" for r in others)
    text = (
        f"Of {others[0].deployment.samples:,} answers, those that differ from {comparison.reference}'s: {differ}. "
        f"Largest drop in accuracy: {100 * comparison.drop:.2f} points"
    )
    if comparison.max_drop is None:
        return f"<p>{escape(text)}.</p>"
    verdict, kind = ("within", "good") if comparison.passed else ("above", "bad")
    return f'<p>{escape(text)}, <span class="{kind}">{verdict} the {comparison.max_drop:g} allowed</span>.</p>'


def _accuracy_table(page: Page, comparison: Comparison) -> str:
    head = ["target", "accuracy %", "agreement %", "drop, points", "mean |rate difference|", "correct", "95 % interval"]
    first = comparison.rows[0].deployment
    cells = []
    for row in comparison.rows:
        d = row.deployment
        low, high = wilson(d.correct, d.samples)
        cells.append(
            [
                page.target(d.target),
                f"{100 * d.accuracy:.2f}",
                f"{100 * row.agreement:.2f}",
                f"{100 * (first.accuracy - d.accuracy):.2f}",
                f"{np.mean(list(row.rate_difference.values()) or [0.0]):.4f}",
                f"{d.correct:,} of {d.samples:,}",
                f"{100 * low:.1f} to {100 * high:.1f}",
            ]
        )
    return table(head, cells, f"n = {first.samples:,}. Agreement (same answers), drop and rate difference are against {first.target}.")


def _cost_table(page: Page, comparison: Comparison) -> str:
    head = ["target", "ran on", "samples/s", "seconds", "start-up, s", "timing", "spikes/sample", "SynOps/sample", "saturations"]
    cells = [
        [
            page.target(d.target),
            escape(f"{d.ran_on}, {d.device}"),
            f"{d.samples_per_second:,.0f}",
            f"{d.seconds:.2f}",
            f"{d.startup_seconds:.2f}",
            escape(d.timing),
            f"{d.spikes_per_sample:,.0f}",
            "" if d.synaptic_operations_per_sample is None else f"{d.synaptic_operations_per_sample:,.0f}",
            f"{d.saturations:,}",
        ]
        for d in (row.deployment for row in comparison.rows)
    ]
    return table(head, cells, "Forward phase. Speeds are those of this machine, not of a chip.")


def _share_pictures(page: Page, comparison: Comparison) -> list[Picture]:
    first = comparison.rows[0].deployment
    accuracy = {row.deployment.target: row.deployment.accuracy for row in comparison.rows}
    drawn = [
        pictures.shares(
            "accuracy",
            accuracy,
            {row.deployment.target: wilson(row.deployment.correct, row.deployment.samples) for row in comparison.rows},
            page.palette,
            unit="accuracy (%)",
            alt=f"Accuracy by target: {_percentages(accuracy)}",
            caption=f"Right answers among {_counted(first.samples, 'sample')}, with 95 % intervals.",
        )
    ]
    agreement = {row.deployment.target: row.agreement for row in comparison.rows[1:]}
    if agreement:
        drawn.append(
            pictures.shares(
                "agreement",
                agreement,
                {},
                page.palette,
                unit=f"same answer as {first.target} (%)",
                alt=f"Agreement with {first.target} by target: {_percentages(agreement)}",
                caption=f"Samples on which a target answers as {first.target} does, rightly or wrongly.",
            )
        )
    return drawn


def _rate_picture(page: Page, name: str, row: Row, first: Deployment) -> Picture:
    d = row.deployment
    within = float((np.abs(d.rates[name] - first.rates[name]) < 1.5 / d.time_steps).mean())
    note = f"mean |difference| {row.rate_difference[name]:.4f}"
    return pictures.density(
        f"rates-{name}-{d.target}",
        first.rates[name],
        d.rates[name],
        (f"rate on {first.target}", f"rate on {d.target}"),
        title=d.target,
        note=note,
        colour=page.palette[d.target],
        alt=f"Firing rates of population {name} on {d.target} over those on {first.target}: {note}",
        caption=f"{d.rates[name].size:,} pairs; {100 * within:.1f} % differ by one spike in {d.time_steps} steps or less.",
    )


def _feedback_table(page: Page, found: Mapping[str, Gradient]) -> str:
    head = ["target", "loss", "spikes/sample", "silent %", "clipped %"]
    cells = [
        [page.target(target), f"{g.loss:.4f}", f"{g.spikes_per_sample:,.0f}", f"{100 * g.silent:.1f}", f"{100 * g.clipped:.2f}"]
        for target, g in found.items()
    ]
    return table(head, cells, "The feedback phase itself. The footnotes say what silent and clipped mean.")


def _tensor_table(first_name: str, first: Gradient, others: Mapping[str, Gradient]) -> str:
    head = ["parameter", *(f"{escape(target)}<br>{what}" for target in others for what in ("cosine", "relative error"))]
    cells = [
        [escape(name), *(text for g in others.values() for text in (f"{g.cosine[name]:.4f}", f"{g.relative_error[name]:.4f}"))]
        for name in first.cosine
    ]
    return table(head, cells, f"Gradient g of each parameter against {first_name}'s g0: cosine, and relative error |g - g0| / |g0|.")


def _gradient_picture(page: Page, name: str, target: str, gradient: Gradient, first_name: str, first: Gradient) -> Picture:
    mine, theirs = gradient.found.gradients[name], first.found.gradients[name]
    cosine, error = f"cosine {gradient.cosine[name]:.4f}", f"relative error {gradient.relative_error[name]:.3f}"
    return pictures.density(
        f"gradient-{name}-{target}",
        theirs,
        mine,
        (f"gradient on {first_name}", f"gradient on {target}"),
        title=name,
        note=f"{cosine}\n{error}",
        colour=page.palette[target],
        alt=f"Gradient of {name} on {target} over that on {first_name}: {cosine}, {error}",
        caption=f"{_counted(mine.size, 'weight')}.",
    )


def _beta_picture(page: Page, name: str, target: str, gradient: Gradient, first_name: str, first: Gradient) -> Picture:
    mine, theirs = gradient.found.beta[name], first.found.beta[name]
    note = f"mean |difference| {np.abs(mine - theirs).mean():.2g}\nof mean |beta| {np.abs(theirs).mean():.2g}"
    return pictures.density(
        f"beta-{name}-{target}",
        theirs,
        mine,
        (f"beta on {first_name}", f"beta on {target}"),
        title=target,
        note=note,
        colour=page.palette[target],
        alt=f"Feedback equilibrium of population {name} on {target} over that on {first_name}: {note}",
        caption=f"{mine.size:,} pairs: every couple on every sample, of the loss times the scale factor, before masks.",
    )


def _command(comparison: Comparison) -> str:
    deployments = [row.deployment for row in comparison.rows]
    first = deployments[0]
    words = ["toolchain", "compare", comparison.model, "--targets", ",".join(d.target for d in deployments)]
    words += ["--dataset", first.dataset, "--samples", str(first.samples), "--device", "cpu" if first.device == "cpu" else "cuda"]
    fallback = next((d.ran_on for d in deployments if d.ran_on != d.target), None)
    words += [] if fallback is None else ["--fallback", fallback]
    words += [] if comparison.max_drop is None else ["--max-drop", f"{comparison.max_drop:g}"]
    if comparison.budget is not None:
        words += ["--budget-samples", "0" if isinstance(comparison.budget, str) else str(comparison.budget.samples)]
    return shlex.join([*words, "--report", "report"])


def _feedback_steps(comparison: Comparison) -> int | None:
    return next((row.gradient.found.feedback.time_steps for row in comparison.rows if row.gradient is not None), None)


def _most_frequent(matrix: npt.NDArray[np.int64]) -> str:
    mistakes = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    if not mistakes.any():
        return "No mistakes."
    label, answer = np.unravel_index(mistakes.argmax(), mistakes.shape)
    return f"Most frequent mistake: {label} taken for {answer}, {_counted(int(mistakes[label, answer]), 'time')}."


def _called(deployment: Deployment) -> str:
    return deployment.target if deployment.ran_on == deployment.target else f"{deployment.target} (ran on {deployment.ran_on})"


def _percentages(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.2f} %" for name, value in values.items())


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
