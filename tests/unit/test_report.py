"""The report of a comparison, from made-up numbers: everything in the page, the same bytes twice, one sentence where it cannot be written."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from toolchain.compare import cosine
from toolchain.comparison import Comparison, Gradient, Row, Trace
from toolchain.deploy import Deployment
from toolchain.errors import UsageError
from toolchain.feedback import Feedback
from toolchain.report import write
from toolchain.report.sections import wilson
from toolchain.target import History, Result

T, T_B = 8, 12
SHAPES = {"hidden": (6,), "grid": (2, 3)}


def comparison(
    targets=("torch", "sim", "lava-sim"), *, feedback=True, shapes=SHAPES, samples=20, fallback=None, silent=False, model="net", seed=0
) -> tuple[Comparison, list[Trace]]:
    """Random results of the right shapes: rates on the grid of T, integer potentials on all targets but the first."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 10, samples)
    base = {
        name: 0 * draw.integers(0, T + 1, (samples, *s)) if silent else draw.integers(0, T + 1, (samples, *s)) for name, s in shapes.items()
    }
    rows, traces = [], []
    for i, target in enumerate(targets):
        rates = {name: np.clip(b + draw.integers(-1, 2, b.shape) * (i > 0), 0, 0 if silent else T) / T for name, b in base.items()}
        predictions = np.where(draw.random(samples) < 0.1, draw.integers(0, 10, samples), labels)
        correct = int((predictions == labels).sum())
        ran_on = fallback if fallback and i == len(targets) - 1 else target
        deployment = Deployment(
            model, target, ran_on, "cpu", "mnist-1k", samples, correct, correct / samples, T, "step" if i == 0 else "exact",
            0.5, 1.25, samples / 1.25, 33.0, 4567.0, 0, 0, {"toolchain": "0.1.0", "torch": "2.3.1"}, predictions, labels, np.zeros((samples, 10)), rates,
        )  # fmt: skip
        found = _feedback(draw, shapes, samples, silent) if feedback else None
        first = rows[0] if rows else None
        rows.append(
            Row(
                deployment,
                float((predictions == (first.deployment.predictions if first else predictions)).mean()),
                {name: float(np.abs(r - (first.deployment.rates if first else rates)[name]).mean()) for name, r in rates.items()},
                None if found is None else _gradient(found, first.gradient.found if first and first.gradient else found),
            )
        )
        traces.append(_trace(draw, target, shapes, feedback, silent, integer=i > 0))
    drop = max(rows[0].deployment.accuracy - row.deployment.accuracy for row in rows)
    return Comparison(model, tuple(rows), drop, None), traces


def _feedback(draw, shapes, samples, silent) -> Feedback:
    scale = 0.0 if silent else 1.0
    beta = {name: scale * draw.integers(-3, 4, (samples, *s)) / T_B for name, s in shapes.items()}
    gradients = {"input.weight": scale * draw.normal(size=(6, 9)), "input.bias": scale * draw.normal(size=6)}
    activity = {name: draw.integers(0, T_B + 1, (samples, *s)).astype(np.int32) for name, s in shapes.items()}
    result = Result("feedback", T_B, activity, activity, {}, {}, {})
    return Feedback(beta, {}, gradients, {}, np.zeros((samples, 10)), 0.25, 100.0, 0.0, 0, result, result)


def _gradient(found: Feedback, first: Feedback) -> Gradient:
    pairs = {name: (g, first.gradients[name]) for name, g in found.gradients.items()}
    cosines = {name: cosine(a, b) for name, (a, b) in pairs.items()}
    errors = {name: float(np.linalg.norm(a - b)) for name, (a, b) in pairs.items()}
    return Gradient(
        len(found.logits), found.loss, found.scale_factor, cosines, errors, 12.0, found.clipped, found.silent, found.clipped_errors, found
    )


def _trace(draw, target, shapes, feedback, silent, *, integer) -> Trace:
    unit = 640 if integer else 1.0

    def history(steps, low):
        made = {}
        for name, shape in shapes.items():
            spikes = np.zeros((steps, *shape), np.int8) if silent else draw.integers(low, 2, (steps, *shape)).astype(np.int8)
            potentials = unit * draw.uniform(low, 1, (steps, *shape))
            made[name] = History(spikes, potentials.astype(np.int32) if integer else potentials)
        made["readout"] = History(np.zeros((steps, 10), np.int8), np.zeros((steps, 10)))
        return made

    thresholds = {phase: dict.fromkeys(shapes, float(unit)) for phase in ("forward", "feedback")}
    return Trace(target, 0, history(T, 0), history(T_B, -1) if feedback else {}, thresholds)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return write(*comparison(), tmp_path_factory.mktemp("report") / "new" / "folder")


def html(*arguments, tmp_path, **named) -> str:
    return write(*comparison(*arguments, **named), tmp_path).read_text()


def test_the_page_names_what_ran_and_how_it_went(report):
    text = report.read_text()
    for words in (
        "torch",
        "sim",
        "lava-sim",
        "n = 20",
        "T = 8",
        "T_B = 12",
        "scale factor 100",
        "2.3.1",
        "exact",
        "cosine",
        "hidden",
        "grid",
    ):
        assert words in text
    assert "toolchain compare net --targets torch,sim,lava-sim --dataset mnist-1k --samples 20 --device cpu --report report" in text


def test_the_page_is_well_formed(report):
    class Checker(HTMLParser):
        stack: list[str] = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "link", "img", "br"):
                self.stack.append(tag)

        def handle_endtag(self, tag):
            assert self.stack.pop() == tag

    checker = Checker()
    checker.feed(report.read_text())
    assert checker.stack == []


def test_the_page_fetches_nothing(report):
    text = report.read_text()
    assert "<script" not in text
    assert "http:" not in text
    assert "https:" not in text
    assert all(address.startswith("data:") for address in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert "url(" not in text


def test_every_picture_is_in_the_page_beside_it_and_has_a_text(report):
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', report.read_text())]
    files = {path.stem: path.read_bytes() for path in report.parent.glob("*.png")}
    assert sorted(embedded) == sorted(files.values())
    assert all(data.startswith(b"\x89PNG") for data in files.values())
    assert {path.stem for path in report.parent.glob("*.svg")} == set(files)
    assert len(re.findall(r'alt="[^"]{10,}"', report.read_text())) == len(files)
    expected = ("accuracy", "agreement", "rates-hidden-sim", "rates-grid-lava-sim", "raster-forward-torch", "raster-feedback-lava-sim")
    assert {*expected, "potentials-forward", "potentials-feedback", "confusion-torch", "gradient-input.weight-sim", "beta-grid-sim"} <= set(
        files
    )


def test_equal_numbers_give_equal_bytes(report, tmp_path):
    again = write(*comparison(), tmp_path)
    names = sorted(path.name for path in report.parent.iterdir())
    assert sorted(path.name for path in again.parent.iterdir()) == names
    for name in names:
        assert (again.parent / name).read_bytes() == (report.parent / name).read_bytes(), name


def test_a_fallback_is_named(tmp_path):
    text = html(("torch", "lava-sim"), fallback="sim", feedback=False, shapes={"one": (2,)}, tmp_path=tmp_path)
    assert "Target lava-sim is missing on this machine: its row ran on sim instead" in text
    assert "lava-sim (ran on sim)" in text
    assert "--fallback sim" in text


def test_names_are_text_and_not_markup(tmp_path):
    name = "<b>&\"'$x$"
    text = html(("torch", name), shapes={"<i>$\\": (3,)}, model="<script>", tmp_path=tmp_path)
    assert "<b>" not in text
    assert "<i>" not in text
    assert "<script" not in text
    assert "&lt;b&gt;&amp;&quot;&#x27;$x$" in text
    assert all(re.fullmatch(r"[a-z0-9._-]+", path.name) for path in tmp_path.iterdir())


def test_a_model_without_feedback_phase_has_no_gradients_to_show(tmp_path):
    text = html(("torch", "sim"), feedback=False, shapes={"one": (2,)}, tmp_path=tmp_path)
    assert "no feedback phase" in text
    assert "Scale factor" not in text
    assert not list(tmp_path.glob("*feedback*"))
    assert not list(tmp_path.glob("gradient*"))
    assert list(tmp_path.glob("raster-forward-*.png"))


def test_one_target_and_one_sample(tmp_path):
    text = html(("reference",), samples=1, shapes={"only": (1,)}, tmp_path=tmp_path)
    assert "nothing to compare it with" in text
    assert not list(tmp_path.glob("rates-*"))


def test_five_targets_and_populations_that_never_spike(tmp_path):
    targets = ("torch", "reference", "sim", "lava-sim", "other")
    text = html(targets, shapes={"still": (2, 2, 2)}, silent=True, tmp_path=tmp_path)
    assert all(name in text for name in targets)


def test_no_traces_means_no_sections_of_one_sample(tmp_path):
    text = write(comparison(("torch", "sim"), feedback=False)[0], [], tmp_path).read_text()
    assert "One sample" not in text
    assert not list(tmp_path.glob("raster-*"))


def test_an_allowance_is_judged(tmp_path):
    rows = comparison(("torch", "sim"), feedback=False, shapes={"one": (2,)})[0].rows
    assert "within the 1 allowed" in write(Comparison("net", rows, 0.01, 1.0), [], tmp_path).read_text()
    assert "above the 0.5 allowed" in write(Comparison("net", rows, 0.01, 0.5), [], tmp_path).read_text()


def with_cuts(made: Comparison) -> Comparison:
    """`made` where every row but the first clipped 12 input currents and 1 error current, and saturated 3 times forward and twice back."""

    def cut(row: Row) -> Row:
        found = row.gradient.found
        back = replace(found.feedback, saturations={"hidden": np.array([[0, 2]])})
        gradient = replace(row.gradient, clipped_errors=1, found=replace(found, feedback=back))
        return replace(row, deployment=replace(row.deployment, clipped_currents=12, saturations=3), gradient=gradient)

    return replace(made, rows=(made.rows[0], *(cut(row) for row in made.rows[1:])))


CUTS = ("12 input currents clipped", "3 saturations in the forward phase", "1 error current clipped", "2 saturations in the feedback phase")


def test_what_was_cut_is_said_once_for_all_targets_it_concerns(tmp_path):
    whole, _ = comparison(shapes={"one": (2,)})
    assert whole.warnings == []
    assert "warning" not in whole.to_text()
    assert '<p class="bad">' not in write(whole, [], tmp_path / "whole").read_text()
    found = with_cuts(whole)
    text, page = found.to_text(), write(found, [], tmp_path / "cut").read_text()
    for words in CUTS:
        assert text.count(f"warning: sim, lava-sim: {words}") == 1
        assert page.count(f'<p class="bad">sim, lava-sim: {words}') == 1


@pytest.mark.parametrize(("samples", "more"), [(20, True), (128, False)])
def test_errors_that_are_cut_for_want_of_samples_ask_for_more(samples, more):
    """The zoo's scale factors are for batches of 128; the mean loss of fewer gives each sample a larger error."""
    found = with_cuts(comparison(shapes={"one": (2,)})[0])
    few = replace(found, rows=tuple(replace(row, gradient=replace(row.gradient, samples=samples)) for row in found.rows))
    assert any("give 128 samples, since the mean loss of 20 makes larger errors" in warning for warning in few.warnings) == more


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "taken").write_text("a file")
    result = comparison(("torch",), feedback=False)[0]
    with pytest.raises(UsageError, match=r"cannot write .*taken.*: choose a writable place"):
        write(result, [], tmp_path / "taken")


def test_wilson_interval_is_the_published_one():
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)  # Newcombe 1998, table I, method 3
    assert wilson(0, 10)[0] == pytest.approx(0)
    assert wilson(10, 10)[1] == pytest.approx(1)
