"""The accuracy budget as a person reads it: a chain without gaps, intervals, five lines, advice, and how it fails."""

from __future__ import annotations

import json
from dataclasses import replace

import msgspec
import numpy as np
import pytest

import toolchain
from toolchain import codec, data, models
from toolchain.analysis.accuracy import Answers, accuracy_budget, default_samples, settling_steps
from toolchain.analysis.advice import advice, weight_bits
from toolchain.analysis.factors import SWITCHES
from toolchain.analysis.intervals import Z95, paired_interval
from toolchain.comparison import Comparison
from toolchain.compiler import lowered
from toolchain.errors import GraphError, UsageError
from toolchain.ir import Calibration
from toolchain.passes import FLOAT_PIPELINE, LOIHI_PIPELINE
from toolchain.report import budget as section
from toolchain.report.page import Page
from toolchain.source import find


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", samples=200)


@pytest.fixture(scope="module")
def artefact():
    """Three bits, two steps: something is lost by more than one factor."""
    return toolchain.compile("digits-fc", target="sim", weight_bits=3, time_steps=2).artifact


@pytest.fixture(scope="module")
def compared(artefact):
    return toolchain.compare(artefact, targets=("torch", "sim", "reference"), dataset="digits", samples=200, budget_samples=150)


def test_the_chain_has_no_gap_and_ends_in_the_target(compared):
    found, first, last = compared.budget, compared.rows[0].deployment, compared.rows[1].deployment
    assert found.samples == 150
    level = found.baseline.accuracy
    for row in found.rows:
        level -= row.cumulative.drop
        assert row.accuracy == pytest.approx(level, abs=1e-12)
        assert row.interaction == pytest.approx(row.cumulative.drop - row.alone.drop)
        assert row.cumulative.low <= row.cumulative.drop <= row.cumulative.high
        assert row.cumulative.drop == (row.cumulative.to_wrong - row.cumulative.to_right) / 150
    right = last.predictions[:150] == last.labels[:150]
    assert found.accuracy == pytest.approx(right.mean())
    # the comparison's first row hangs on the state behind "time steps" by what float32 does
    assert found.rows[0].name == "time steps"
    torch_right = first.predictions[:150] == first.labels[:150]
    assert found.rows[0].accuracy - found.arithmetic.drop == pytest.approx(torch_right.mean())
    assert found.remainder == pytest.approx(found.total.drop - sum(row.alone.drop for row in found.rows))
    assert {row.name for row in found.rows} | set(found.none) == {"time steps", *SWITCHES}


def test_the_closing_check_holds_every_target_to_the_last_state(compared):
    closing = compared.budget.closing
    assert closing.passed
    assert closing.targets == {"sim": 0, "reference": 0}
    assert "are the integer graph's, as are the logits of sim, reference" in compared.summary[3]
    assert closing.compared > 150 * 2 * 32


def test_five_lines_name_the_drop_the_factors_the_population_the_check_and_what_to_try(compared):
    lines = compared.summary
    assert [line.split(":")[0] for line in lines] == ["accuracy", "by factor", "worst population", "check", "try"]
    assert "n = 150 of digits" in lines[0]
    assert lines[2].startswith("worst population: hidden1, mean |rate difference|")  # time steps cost most, in which integers have no part
    coarse = replace(compared, budget=replace(compared.budget, rows=compared.budget.rows[1:]))
    assert "worst population: 'readout' (single error" in coarse.summary[2]
    assert "rates moved most in hidden1" in coarse.summary[2]
    assert compared.to_text().count("worst population") == 1  # integers err most in the readout, which is another thing
    assert compared.to_text().count("\nforward: ") == 2  # a sentence on errors, and one on settling
    assert "\n".join(compared.summary) in compared.to_text()
    assert all("\n" not in line for line in lines)


def test_json_holds_all_of_it(compared):
    plain = json.loads(json.dumps(compared.to_json(), allow_nan=False))["budget"]
    assert plain["order"] == [row["factor"] for row in plain["rows"]]
    assert plain["closing_check"]["passed"] is True
    assert plain["suggestion"]["sentence"] in plain["summary"][4]
    assert plain["first_row"]["name"] == "torch on cpu"
    assert plain["worst_population"] == "hidden1"
    assert plain["rows"][0]["cumulative"].keys() >= {"drop", "low", "high", "to_wrong", "to_right", "rate_difference", "logit_difference"}


def test_the_report_shows_the_budget_and_says_why_there_is_none(compared):
    page = Page(("torch", "sim", "reference"))
    html = section.section(page, compared)
    assert "Where accuracy goes" in html
    assert "accuracy-budget" in page.drawn
    assert section.section(page, replace(compared, budget=None)) == ""
    assert "No accuracy budget: too &lt;large&gt;." in section.section(page, replace(compared, budget="too <large>"))


def test_the_report_shows_flags_as_code(compared):
    options = ("--input", "bias", "--set", "quantize.input_levels=4095")
    advised = replace(compared.budget.advice, sentence=f"compile with {' '.join(options)}, the rest as it is: so", options=options)
    html = section.section(Page(("torch", "sim", "reference")), replace(compared, budget=replace(compared.budget, advice=advised)))
    assert "Try: compile with <code>--input bias</code> <code>--set quantize.input_levels=4095</code>, the rest as it is: so." in html


def test_a_target_with_other_logits_and_a_run_that_does_not_close_are_said_aloud(compared):
    failed = replace(compared.budget, closing=replace(compared.budget.closing, differing=7, targets={"sim": 3}))
    assert not failed.closing.passed
    assert "FAILED, 7 of" in failed.summary()[3]
    assert "sim (3 logits)" in failed.summary()[3]
    assert 'class="bad">Check' in section.section(Page(("torch", "sim", "reference")), replace(compared, budget=failed))


def test_a_changed_integer_weight_opens_the_closing_check_of_that_target(digits, artefact):
    images, labels = np.asarray(digits.images), digits.labels
    graph = artefact.graph
    with toolchain.target.get("sim").compile(graph) as run:
        logits = codec.logits(graph, run.run(images))
    found = accuracy_budget(artefact.float_graph, graph, images, labels, logits={"sim": logits, "mine": logits + 1})
    assert found.closing.targets == {"sim": 0, "mine": logits.size}
    assert not found.closing.passed


def test_no_budget_is_a_sentence(artefact):
    def asked(model, targets=("torch", "sim"), **more):
        return toolchain.compare(model, targets=targets, dataset="digits", samples=20, **more)

    without = msgspec.structs.replace(artefact, float_graph=None)
    assert "add sim to --targets" in asked("digits-fc", ("torch",)).budget
    assert "without" not in asked("digits-fc", budget_samples=0).budget
    assert asked("digits-fc", budget_samples=0).to_json()["budget"] is None
    assert "--budget-samples 0" in asked("digits-fc", budget_samples=0).to_json()["no_budget"]
    assert "no accuracy budget: the artefact has no float graph" in asked(without, ("sim",)).to_text()
    with pytest.raises(UsageError, match="budget_samples is -1"):
        asked("digits-fc", budget_samples=-1)


def test_graphs_in_the_wrong_order_are_refused(artefact, digits):
    with pytest.raises(GraphError, match="in this order"):
        accuracy_budget(artefact.graph, artefact.float_graph, np.asarray(digits.images), digits.labels)


def test_pieces_of_the_images_do_not_change_the_budget(artefact, digits, monkeypatch):
    images, labels = np.asarray(digits.images), digits.labels
    whole = accuracy_budget(artefact.float_graph, artefact.graph, images, labels)
    monkeypatch.setattr("toolchain.analysis.accuracy.AT_ONCE", 30 * 107 * 2)
    pieces = accuracy_budget(artefact.float_graph, artefact.graph, images, labels)
    assert pieces.closing.compared == whole.closing.compared
    for a, b in zip((*whole.rows, whole), (*pieces.rows, pieces), strict=True):
        one, two = getattr(a, "cumulative", whole.total), getattr(b, "cumulative", pieces.total)
        assert (one.drop, one.to_wrong, one.changed) == (two.drop, two.to_wrong, two.changed)
        assert one.logit_difference == pytest.approx(two.logit_difference)


def test_a_target_that_places_the_same_integers_elsewhere_is_held_too(artefact):
    """Target sanafe's pipeline differs from sim's in the chip it places on; the artefact's integers are both's."""
    pytest.importorskip("sanafe", reason="SANA-FE is not installed (extra energy)")
    found = toolchain.compare(artefact, targets=("sim", "sanafe"), dataset="digits", samples=4)
    assert found.budget.closing.targets == {"sim": 0, "sanafe": 0}


def test_where_nothing_is_lost_nothing_is_advised(digits):
    start = lowered(find("digits-fc"))
    images = np.asarray(digits.images)
    found = accuracy_budget(FLOAT_PIPELINE.until("adjoint")(start), LOIHI_PIPELINE(start), images, digits.labels)
    assert found.total.drop <= 0
    assert found.advice.factor is None
    assert found.summary()[4].startswith("try: nothing")
    assert "most answers: 0" not in found.summary()[4]


def test_large_networks_run_fewer_images():
    graph = LOIHI_PIPELINE(lowered(find("digits-fc")))
    assert default_samples(graph, 100) == 100
    assert settling_steps(graph) == 256
    assert settling_steps(graph.in_steps({"forward": 100})) == 400
    long = graph.in_steps({"forward": 100_000})
    assert 8 <= default_samples(long, 10_000) < 100


@pytest.mark.parametrize(("losses", "gains", "samples"), [(12, 2, 50), (0, 0, 100), (3, 0, 1000), (0, 5, 20), (1, 1, 2), (40, 40, 200)])
def test_intervals_hold_the_difference_and_are_as_wide_the_other_way(losses, gains, samples):
    low, high = paired_interval(losses, gains, samples)
    assert low < (losses - gains) / samples < high
    assert paired_interval(gains, losses, samples) == pytest.approx((-high, -low))
    assert -1 <= low <= high <= 1


def test_an_interval_has_a_width_where_no_answer_changed():
    assert paired_interval(0, 0, 1000)[1] == pytest.approx(Z95**2 / (1000 + Z95**2))


def test_intervals_hold_the_truth_as_often_as_they_say():
    """4,000 draws of 200 images whose answers get worse in 6 % and better in 2 %: 95 of 100 intervals hold 4 points, give or take."""
    draws = np.random.default_rng(0).multinomial(200, [0.06, 0.02, 0.92], size=4000)
    known = {}
    for losses, gains, _ in draws:
        key = (int(losses), int(gains))
        if key not in known:
            known[key] = paired_interval(*key, 200)
    held = [known[int(losses), int(gains)][0] <= 0.04 <= known[int(losses), int(gains)][1] for losses, gains, _ in draws]
    assert 0.94 <= np.mean(held) <= 0.965


def test_each_factor_has_its_advice():
    start = lowered(find("digits-fc"))

    def said(factor, *, enough=None, saturations=None, **options):
        graph = LOIHI_PIPELINE.with_options(**options)(start)
        return advice(factor, graph, enough=enough, dataset="digits", saturations=saturations or {})

    seen = Calibration("digits", 8, {"forward": {}, "feedback": {}}, {})
    assert said("time steps", enough=12).options == ("--time-steps", "12")
    assert said("time steps").options == ()
    assert said("weights", quantize={"weight_bits": 4}).options == ("--weight-bits", "8")
    assert "no more than 8 bits" in said("weights").sentence
    assert said("weights", inject={"mode": "graded"}).options == ("--input", "bias")
    assert said("input", quantize={"input_levels": 3}).options == ("--set", "quantize.input_levels=255")
    assert said("input").options == ("--calibrate", "digits")
    tests_only = advice("input", LOIHI_PIPELINE(start), enough=None, dataset="mnist-1k", saturations={})
    assert tests_only.options == ("--calibrate", "mnist")
    assert said("input", quantize={"calibration": seen}).options == ("--input", "graded")
    assert said("input", inject={"mode": "graded"}).options == ("--input", "bias", "--set", "quantize.input_levels=4095")
    assert said("clipping").options == ("--input", "graded")
    older = {"quantize": {"calibration": seen}, "partition": {"chip": "loihi1"}}  # loihi1 refuses graded input
    assert said("input", **older).options == ("--chip", "loihi2", "--input", "graded")
    assert said("clipping", **older).options == ()
    assert said("timing", retime={"mode": "pipelined"}).options == ("--timing", "exact")
    assert said("saturation", saturations={"hidden1": 5, "readout": 2}).options == ("--weight-bits", "7")
    assert said("saturation", saturations={"readout": 2}).options == ("--time-steps", "15")
    assert "without --calibrate" in said("saturation", saturations={"hidden1": 1}, quantize={"calibration": seen}).sentence
    assert said("leak").options == ("--calibrate", "digits")
    assert said("thresholds", quantize={"calibration": seen}).options == ()
    assert [weight_bits(LOIHI_PIPELINE.with_options(quantize={"weight_bits": b})(start)) for b in (2, 3, 5, 8)] == [2, 3, 5, 8]


def test_events_have_no_equilibrium():
    module = models.get("nmnist-conv").build().eval()
    start = lowered(find(module), 4)
    floats, integers = FLOAT_PIPELINE.until("adjoint")(start), LOIHI_PIPELINE(start)
    shape = integers.of_kind("input")[0].shape
    frames = (np.random.default_rng(0).random((3, *shape, 4)) < 0.1).astype(np.float64)
    found = accuracy_budget(floats, integers, frames, np.zeros(3, np.int64))
    assert found.closing.passed
    assert found.baseline.residual is None
    assert found.baseline.time_steps == 4
    assert "time steps" in found.none
    assert "in floats" in found.summary()[0]


def test_the_first_row_is_beside_the_chain(artefact, digits):
    images, labels = np.asarray(digits.images), digits.labels
    classes = int(labels.max()) + 1
    first = ("torch on a GPU", Answers(np.eye(classes)[(labels + 1) % classes], {}))
    found = accuracy_budget(artefact.float_graph, artefact.graph, images, labels, first=first)
    assert found.arithmetic.to_right == 0
    assert found.arithmetic.drop == found.rows[0].accuracy
    plain = accuracy_budget(artefact.float_graph, artefact.graph, images, labels)
    assert plain.total == found.total
    assert plain.arithmetic is None
    assert "beside it: float32 of torch on a GPU" in found.to_text()
    assert isinstance(Comparison("x", (), 0.0, None, budget=found).budget, type(found))


@pytest.mark.parametrize(
    ("name", "timing"),
    [
        ("mnist-dsr", "exact"),
        ("mnist-ottt-a", "pipelined"),
        ("mnist-saf-e", "exact"),
        ("fashion-fc", "pipelined"),
        ("mnist-fc2", "pipelined"),
        ("lenet", "pipelined"),
    ],
)
def test_trained_networks_close(name, timing):
    """Units that differ between layers (DSR), leaks, weighted readouts, loops across layers, convolutions and pools."""
    images = data.load("mnist-1k", samples=4)
    start = lowered(find(name))
    integers = LOIHI_PIPELINE.with_options(quantize={"weight_bits": 4}, retime={"mode": timing})(start)
    found = accuracy_budget(FLOAT_PIPELINE.until("adjoint")(start), integers, np.asarray(images.images), images.labels)
    assert found.closing.passed
    assert found.closing.compared > 0
    assert sum(row.cumulative.drop for row in found.rows) == pytest.approx(found.total.drop)
