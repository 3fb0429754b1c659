"""The search for fewer bits and steps: what it judges by, what it chooses, what it writes, and what it refuses."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from torch import nn

import toolchain
from toolchain import artifact, cli, data, deploy, models, tune
from toolchain.deploy import Options, classify
from toolchain.errors import UsageError
from toolchain.ir import Core, Placement, Slice
from toolchain.layers import FeedbackSNN, Neuron
from toolchain.report.pareto import pareto
from toolchain.source import find
from toolchain.sweep import Point, marked
from toolchain.target import get
from toolchain.tune import _cut_anew


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """digits-fc, one point of drop, with everything that can be written."""
    folder = tmp_path_factory.mktemp("tuned")
    return tune("digits-fc", max_drop=1.0, output=folder / "small.fsnn", picture=folder / "front.png", device="cpu")


def test_the_samples_that_training_held_out_judge_and_the_test_set_does_not(monkeypatch):
    asked = []
    load = data.load

    def watched(name, **options):
        asked.append((name, options["split"]))
        return load(name, **options)

    monkeypatch.setattr(data, "load", watched)
    found = tune("digits-fc", max_drop=1.0, device="cpu")
    assert found.samples == 200
    assert found.notes == ()
    assert asked == [("digits", "train"), ("digits", "test")]  # the second once all is decided
    assert found.test.samples == 500


def test_the_reference_is_the_float_model_at_its_own_time_steps_on_those_samples(tuned):
    learned, judged_by = data.hold_out(data.load("digits", split="train"), 200)
    assert len(learned) == 1097
    floats = classify(find("digits-fc"), get("torch"), "torch", judged_by, Options(device="cpu"))
    assert tuned.reference.time_steps == 30
    assert tuned.reference.accuracy == floats.accuracy


def test_the_grid_is_all_bits_at_halved_time_steps(tuned):
    run = {(p.weight_bits, p.time_steps) for p in tuned.points}
    assert {(bits, steps) for bits in range(2, 9) for steps in (30, 15, 8, 4, 2, 1)} <= run


def test_a_point_is_what_compile_and_deploy_say(tuned, tmp_path):
    whole = data.load("digits", split="train")
    judged_by = data.hold_out(whole, 200)[1]
    point = next(p for p in tuned.points if (p.weight_bits, p.time_steps) == (4, 8))
    made = toolchain.compile("digits-fc", target="sim", weight_bits=4, time_steps=8).artifact
    record = classify(find(made), get("sim"), "sim", judged_by, Options(device="cpu"))
    assert point.accuracy == record.accuracy
    assert point.synaptic_operations_per_sample == pytest.approx(record.synaptic_operations_per_sample, rel=1e-12)
    assert point.spikes_per_sample == record.spikes_per_sample
    assert point.drop == pytest.approx(100 * (tuned.reference.accuracy - record.accuracy))


def test_the_chosen_point_is_the_cheapest_within_the_drop(tuned):
    within = [p for p in tuned.points if p.drop <= 1.0]
    assert within
    assert tuned.chosen.synaptic_operations_per_sample == min(p.synaptic_operations_per_sample for p in within)
    assert tuned.chosen.pareto
    assert tuned.passed


def test_the_front_is_what_no_point_beats_at_both(tuned):
    def beaten(point):
        return any(
            other.accuracy >= point.accuracy
            and other.synaptic_operations_per_sample <= point.synaptic_operations_per_sample
            and (other.accuracy, other.synaptic_operations_per_sample) != (point.accuracy, point.synaptic_operations_per_sample)
            for other in tuned.points
        )

    assert {p.name for p in tuned.points if p.pareto} == {p.name for p in tuned.points if not beaten(p)}


def point(bits, steps, accuracy, operations):
    return Point(bits, steps, accuracy, 100 * (1 - accuracy), operations, 1.0, 0)


def test_of_equal_points_the_one_with_fewer_bits_is_on_the_front():
    found = marked([point(8, 4, 0.9, 10.0), point(2, 4, 0.9, 10.0), point(4, 4, 0.8, 20.0)])
    assert [p.pareto for p in found] == [False, True, False]


def test_time_steps_between_the_halves_are_found():
    found = tune("digits-fc", max_drop=0.0, device="cpu")
    coarse = {30, 15, 8, 4, 2, 1}
    assert {p.time_steps for p in found.points} - coarse
    best = found.chosen
    rivals = [p for p in found.points if p.weight_bits == best.weight_bits and p.time_steps < best.time_steps]
    assert all(p.drop > 0 for p in rivals)
    assert best.time_steps - max(p.time_steps for p in rivals) == 1


def test_fewer_time_steps_cost_less(tuned):
    for bits in range(2, 9):
        run = sorted((p for p in tuned.points if p.weight_bits == bits), key=lambda p: p.time_steps)
        assert all(a.synaptic_operations_per_sample < b.synaptic_operations_per_sample for a, b in pairwise(run))


def test_twice_is_the_same(tuned):
    again = tune("digits-fc", max_drop=1.0, device="cpu")
    assert again.points == tuned.points
    assert again.chosen == tuned.chosen


def test_the_artefact_is_the_one_that_compile_writes(tuned, tmp_path):
    chosen = tuned.chosen
    toolchain.compile("digits-fc", weight_bits=chosen.weight_bits, time_steps=chosen.time_steps, output=tmp_path / "same.fsnn")
    assert tuned.output.read_bytes() == (tmp_path / "same.fsnn").read_bytes()
    record = deploy(tuned.output, target="sim", dataset="digits", device="cpu")
    assert record.accuracy == tuned.test.accuracy
    assert record.time_steps == chosen.time_steps


def test_an_artefact_is_tuned_from_the_floats_it_holds(tuned, tmp_path):
    toolchain.compile("digits-fc", output=tmp_path / "whole.fsnn")
    found = tune(tmp_path / "whole.fsnn", max_drop=1.0, samples=200, output=tmp_path / "small.fsnn", device="cpu")
    assert found.chosen == tuned.chosen
    assert found.points == tuned.points
    assert (tmp_path / "small.fsnn").read_bytes() == tuned.output.read_bytes()


def test_an_artefact_keeps_its_input(tmp_path):
    toolchain.compile("digits-fc", input="graded", output=tmp_path / "graded.fsnn")
    found = tune(tmp_path / "graded.fsnn", samples=50, max_drop=10, device="cpu")
    assert found.input == "graded"
    asked = tune("digits-fc", input="graded", samples=50, max_drop=10, device="cpu")
    assert asked.points == found.points
    assert min(p.synaptic_operations_per_sample for p in asked.points) > 500  # the pixels' own are among them


def test_an_artefact_keeps_what_it_was_compiled_with(tmp_path):
    whole = toolchain.compile(
        "digits-fc", chip="loihi1", settings=["quantize.input_levels=15"], calibrate="digits", output=tmp_path / "whole.fsnn"
    ).graph
    found = tune(tmp_path / "whole.fsnn", samples=50, max_drop=10, output=tmp_path / "small.fsnn", device="cpu")
    graph = artifact.read(tmp_path / "small.fsnn").graph
    assert (graph.placement.chip, graph.scale("forward", "input")) == ("loihi1", 15)
    assert graph.provenance.calibration == whole.provenance.calibration is not None
    bits, steps = found.chosen.weight_bits, found.chosen.time_steps
    again = tune(tmp_path / "small.fsnn", samples=50, max_drop=100, device="cpu").points
    same = next(p for p in again if (p.weight_bits, p.time_steps) == (bits, steps))
    assert same.synaptic_operations_per_sample == found.chosen.synaptic_operations_per_sample
    assert not any("split" in note for note in found.notes)


def test_a_population_that_tuning_cuts_is_said():
    def placed(*cores):
        pieces = (Core(0, number, (Slice("hidden1", (start,), (stop,)),)) for number, (start, stop) in enumerate(cores))
        return msgspec.structs.replace(graph, placement=Placement("loihi2", tuple(pieces)))

    graph = toolchain.compile("digits-fc", target="sim").graph
    whole, cut = placed((0, 64)), placed((0, 32), (32, 64))
    (note,) = _cut_anew(whole, cut)
    assert "cut 'hidden1' over several cores" in note
    assert "partition.split=false" in note
    assert _cut_anew(cut, cut) == _cut_anew(whole, whole) == ()


def test_the_picture_is_drawn_and_names_the_chosen_point(tuned, tmp_path):
    assert tuned.picture.read_bytes().startswith(b"\x89PNG")
    drawn = pareto(
        tuned.points,
        tuned.chosen,
        model="digits-fc",
        samples="200 samples",
        time_steps=30,
        reference=tuned.reference.accuracy,
        max_drop=1.0,
    )
    words = drawn.svg.decode()
    again = pareto(
        tuned.points,
        tuned.chosen,
        model="digits-fc",
        samples="200 samples",
        time_steps=30,
        reference=tuned.reference.accuracy,
        max_drop=1.0,
    )
    assert again.svg == drawn.svg
    assert tuned.chosen.name.replace(" bits, T ", " bits and T ") in drawn.alt
    assert words.startswith("<?xml")


@pytest.mark.parametrize("points", [[point(8, 1, 0.5, 0.0)], [point(8, 1, 0.0, 0.0), point(8, 2, 0.9, 30.0)]])
def test_silent_networks_are_drawn(points):
    points = marked(points)
    drawn = pareto(points, None, model="still", samples="1 sample", time_steps=2, reference=0.95, max_drop=0.0)
    assert drawn.png.startswith(b"\x89PNG")


def test_points_as_accurate_as_the_float_model_are_drawn():
    points = marked([point(8, 2, 0.95, 30.0), point(4, 2, 0.95, 20.0)])
    drawn = pareto(points, None, model="even", samples="20 samples", time_steps=2, reference=0.95, max_drop=None)
    assert drawn.png.startswith(b"\x89PNG")  # warnings are errors here: a picture needs some height


def test_the_text_shows_the_front_and_the_choice(tuned):
    text = tuned.to_text()
    chosen = tuned.chosen
    assert f"chosen: {chosen.name}: {chosen.synaptic_operations_per_sample:,.0f} synaptic operations" in text
    assert "on 500 test samples, which the search did not see" in text
    assert str(tuned.output) in text
    assert text.count("chosen") == 2


def test_json_says_all(tuned):
    record = json.loads(msgspec.json.encode(tuned.to_json()))
    keys = {"weight_bits", "time_steps", "accuracy", "drop", "synaptic_operations_per_sample", "spikes_per_sample", "pareto"}
    assert all(keys <= set(p) for p in record["points"])
    assert {p["weight_bits"] for p in record["points"]} == set(range(2, 9))
    assert record["chosen"] in record["points"]
    assert record["reference"]["time_steps"] == 30
    assert (record["samples"], record["split"], record["test"]["samples"]) == (200, "train", 500)
    assert {"device", "versions", "seconds"} <= set(record)


def test_samples_that_training_learned_from_are_said():
    found = tune("digits-fc", samples=250, max_drop=5, device="cpu")
    assert found.samples == 250
    assert "but the last 200" in found.notes[0]


def test_where_nothing_is_within_the_drop_the_nearest_is_said_and_nothing_written(tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("toolchain.tune"), "WEIGHT_BITS", (2,))
    found = tune("digits-fc", max_drop=0.0, output=tmp_path / "none.fsnn", picture=tmp_path / "front.svg", device="cpu")
    assert (found.chosen, found.test, found.output, found.passed) == (None, None, None, False)
    assert not (tmp_path / "none.fsnn").exists()
    assert (tmp_path / "front.svg").is_file()
    assert found.nearest.drop == min(p.drop for p in found.points)
    assert found.nearest.name in found.shortfall
    allowed = float(found.shortfall.rpartition("--max-drop ")[2])
    assert tune("digits-fc", max_drop=allowed, device="cpu").passed
    assert found.to_json()["chosen"] is None
    assert "nothing chosen" in found.to_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_drop": -0.1}, "max_drop is -0.1"),
        ({"max_drop": float("nan")}, "max_drop is nan"),
        ({"max_drop": float("inf")}, "max_drop is inf"),
        ({"dataset": "mnist-1k"}, "holds test images only"),
        ({"dataset": "nothing"}, "unknown data set 'nothing'"),
        ({"samples": 0}, "0 samples cannot be held out"),
        ({"samples": 1297}, "1297 samples cannot be held out"),
        ({"output": "small.bin"}, "needs the ending .fsnn"),
        ({"picture": "front.jpg"}, "needs the ending .png or .svg"),
        ({"input": "spikes"}, "choose one of bias, graded"),
    ],
)
def test_bad_options_are_one_sentence(options, said):
    with pytest.raises(UsageError, match=said) as raised:
        tune("digits-fc", **options)
    assert "\n" not in str(raised.value)


def test_a_data_set_of_other_samples_is_refused(monkeypatch):
    digits = data.load("digits", split="train")
    monkeypatch.setattr(data, "load", lambda *args, **options: digits)
    with pytest.raises(UsageError, match=r"'mnist-fc' takes samples of shape \(1, 28, 28\) and those of 'digits' have \(1, 8, 8\)"):
        tune("mnist-fc", dataset="digits")


def test_another_data_set_than_the_one_trained_on_is_said(monkeypatch):
    digits = {split: data.load("digits", split=split) for split in ("train", "test")}
    monkeypatch.setattr(data, "load", lambda name, *, split, **options: digits[split])
    found = tune("digits-fc", dataset="mnist", samples=20, max_drop=50, device="cpu")
    assert found.notes == ("'digits-fc' was trained on digits",)


def test_a_network_of_events_keeps_its_frames(monkeypatch):
    module = FeedbackSNN(
        name="moving",
        input_shape=(2, 3, 3),
        input=nn.Linear(18, 6),
        feedback=[(0, 0, nn.Linear(6, 6, bias=False))],
        readout=nn.Linear(6, 3),
        neuron=Neuron(threshold=1.0, u_rest=0.0, threshold_back=0.5, u_rest_back=0.0, leak=1.0),
        time_steps=5,
        feedback_steps=5,
        scale_factor=1.0,
    ).eval()
    module.events = True
    draw = np.random.default_rng(0)
    events = data.Dataset("moving", draw.integers(0, 2, (40, 2, 3, 3, 5)).astype(np.float32), draw.integers(0, 3, 40), ("a", "b", "c"))
    asked = []
    monkeypatch.setattr(data, "load", lambda name, **options: asked.append(options["time_steps"]) or events)
    found = tune(module, dataset="moving", samples=30, max_drop=100, device="cpu")
    assert {(p.weight_bits, p.time_steps) for p in found.points} == {(bits, 5) for bits in range(2, 9)}
    assert set(asked) == {5}
    assert "the 5 frames of its events" in found.notes[0]


def test_an_artefact_without_floats_or_with_another_input_is_refused(tmp_path):
    toolchain.compile("digits-fc", float_tensors=False, output=tmp_path / "whole.fsnn")
    with pytest.raises(UsageError, match="without its float tensors"):
        tune(tmp_path / "whole.fsnn")
    toolchain.compile("digits-fc", output=tmp_path / "whole.fsnn")
    with pytest.raises(UsageError, match="leave --input out"):
        tune(tmp_path / "whole.fsnn", input="graded")


def test_a_network_that_does_not_say_its_data_needs_them_named():
    module = models.load("digits-fc")
    module.name = "mine"
    with pytest.raises(UsageError, match="name the data set with --dataset"):
        tune(module)
    assert tune(module, dataset="digits", samples=20, max_drop=50, device="cpu").passed


@pytest.fixture
def command(monkeypatch, capfd):
    """`command(*words)`: (exit code, stdout, stderr) of `toolchain tune`."""

    def give(*words):
        monkeypatch.setattr(sys, "argv", ["toolchain", "tune", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        return (left.value.code or 0, *capfd.readouterr())

    return give


def test_the_command_prints_one_json_object_and_writes_what_it_was_asked_for(command, tmp_path):
    flags = ["--max-drop", "3", "--samples", "100", "-o", str(tmp_path / "small.fsnn"), "--picture", str(tmp_path / "front.svg")]
    code, out, err = command("digits-fc", *flags, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["max_drop_points"] == 3
    assert found["samples"] == found["test"]["samples"] == 100
    assert (tmp_path / "small.fsnn").is_file()
    assert (tmp_path / "front.svg").is_file()


def test_the_command_ends_with_4_where_nothing_is_within_the_drop(command, monkeypatch):
    monkeypatch.setattr(import_module("toolchain.tune"), "WEIGHT_BITS", (2,))
    code, out, err = command("digits-fc", "--max-drop", "0")
    assert code == 4
    assert "nothing chosen" in out
    assert "the nearest is 2 bits, T" in err
    assert err.count("\n") == 1


def test_the_command_ends_with_2_where_the_drop_is_none(command):
    code, out, err = command("digits-fc", "--max-drop", "nan")
    assert (code, out) == (2, "")
    assert "max_drop is nan: give points of accuracy from 0 to 100" in err
