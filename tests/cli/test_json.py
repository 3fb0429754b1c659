"""`--json` is exactly one JSON object with the contract's keys; text is the same result for people; codes follow the result."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

import toolchain
from toolchain import models, target
from toolchain.versions import versions

DEPLOYMENT = [
    "target",
    "ran_on",
    "device",
    "dataset",
    "samples",
    "correct",
    "accuracy",
    "time_steps",
    "timing",
    "startup_seconds",
    "seconds",
    "samples_per_second",
    "spikes_per_sample",
    "synaptic_operations_per_sample",
    "saturations",
]


def parsed(answer, code=0):
    assert answer.code == code, answer.err
    return json.loads(answer.out)


@pytest.mark.parametrize(
    "words",
    [
        "doctor",
        "models",
        "targets",
        "inspect digits-fc",
        "deploy digits-fc --target sim --dataset digits --samples 3",
        "compare digits-fc --targets reference,sim --dataset digits --samples 3",
        "verify digits-fc --targets reference,sim --dataset digits --samples 3",
        "estimate digits-fc --dataset digits --samples 3 --chip-samples 0",
        "estimate digits-fc --dataset digits --samples 3 --pareto --weight-bits 8 --time-steps 4,2",
    ],
)
def test_every_json_names_device_and_versions(command, words):
    found = parsed(command(*words.split(), "--json"))
    assert found["device"]
    assert found["versions"] == versions()


def test_doctor(command):
    found = parsed(command("doctor", "--json"))
    assert found["toolchain"] == toolchain.__version__
    assert {"python", "platform", "packages", "cuda", "targets", "datasets"} <= found.keys()
    assert found["packages"]["numpy"] == np.__version__
    assert found["datasets"]["mnist-1k"] is True
    text = command("doctor").out
    assert all(word in text for word in ("python", "lava-sim", "mnist-1k", "cuda"))


def test_doctor_says_how_to_get_a_missing_target(command, monkeypatch):
    lacking = SimpleNamespace(available=lambda: "Lava is not installed: pip install lava-nc")
    monkeypatch.setattr(target, "get", lambda name: lacking)
    assert {row["missing"] for row in parsed(command("targets", "--json"))["targets"]} == {"Lava is not installed: pip install lava-nc"}
    assert "pip install lava-nc" in command("targets").out


def test_models(command):
    assert [row["name"] for row in parsed(command("models", "--json"))["models"]] == models.names()
    assert all(row["description"] for row in parsed(command("models", "--json"))["models"])
    assert "mnist-fc " in command("models").out


def test_targets(command):
    rows = {row["name"]: row for row in parsed(command("targets", "--json"))["targets"]}
    assert {"torch", "reference", "sim", "lava-sim"} <= rows.keys()
    assert rows["sim"] == {"name": "sim", "available": True, "missing": None}


def test_deploy(shell):
    found = parsed(shell("deploy", "mnist-fc", "--target", "sim", "--samples", 5, "--json"))
    assert set(DEPLOYMENT) <= found.keys()
    assert (found["target"], found["ran_on"], found["dataset"], found["samples"]) == ("sim", "sim", "mnist-1k", 5)
    assert found["accuracy"] == found["correct"] / 5
    assert found["versions"]


def test_deploy_writes_predictions(command, tmp_path):
    path = tmp_path / "out.npz"
    assert command("deploy", "mnist-fc", "--target", "sim", "--samples", 5, "--predictions", path).code == 0
    with np.load(path, allow_pickle=False) as kept:
        assert kept.keys() == {"predictions", "labels", "logits", "rates.hidden1"}
        assert kept["logits"].shape == (5, 10)
        np.testing.assert_array_equal(kept["logits"].argmax(axis=1), kept["predictions"])


def test_compare(command):
    found = parsed(command("compare", "mnist-fc", "--targets", "torch,sim", "--samples", 5, "--json"))
    assert found["reference"] == "torch"
    assert [row["target"] for row in found["rows"]] == ["torch", "sim"]
    for row in found["rows"]:
        assert {*DEPLOYMENT, "agreement", "rate_difference"} <= row.keys()
    assert found["rows"][0]["agreement"] == 1


def test_verify(command):
    found = parsed(command("verify", "mnist-fc", "--targets", "reference,sim", "--samples", 2, "--json"))
    (pair,) = found["pairs"]
    assert (pair["a"], pair["b"]) == ("reference", "sim")
    assert pair["spikes_compared"] > 0
    assert (pair["spike_differences"], pair["potential_differences"], pair["saturation_differences"]) == (0, 0, 0)
    assert pair["first_difference"] is None


def test_estimate(command):
    found = parsed(command("estimate", "digits-fc", "--dataset", "digits", "--samples", 5, "--chip-samples", 0, "--json"))
    assert (found["target"], found["dataset"], found["samples"], found["time_steps"]) == ("sim", "digits", 5, 30)
    assert {found["neurobench"][phase]["effective_acs"]["tag"] for phase in ("forward", "feedback")} == {"simulated"}
    assert {found["spide"][name]["tag"] for name in ("forward", "backward", "update", "training_without_spikes")} == {"declared"}
    assert found["sanafe"] == {}
    assert found["sanafe_missing"]


def test_estimate_draws_accuracy_against_energy(command, tmp_path):
    path = tmp_path / "front.svg"
    words = ["estimate", "digits-fc", "--dataset", "digits", "--samples", 20, "--pareto", "--weight-bits", "8,4", "--time-steps", "8,2"]
    found = parsed(command(*words, "--picture", path, "--json"))
    assert [(p["weight_bits"], p["time_steps"]) for p in found["points"]] == [(8, 8), (4, 8), (8, 2), (4, 2)]
    assert path.read_bytes().startswith(b"<?xml")


def test_compile_inspect_and_deploy_the_same_file(command, tmp_path):
    path = tmp_path / "small.fsnn"
    made = command("compile", "mnist-fc", "--time-steps", 8, "--feedback-steps", 8, "--weight-bits", 6, "-o", path)
    assert made.code == 0, made.err
    assert str(path) in made.out
    shown = parsed(command("inspect", path, "--json"))
    assert [phase["name"] for phase in shown["phases"]] == ["forward", "feedback"]
    assert parsed(command("deploy", path, "--target", "sim", "--samples", 3, "--json"))["time_steps"] == 8
    assert command("verify", path, "--targets", "sim", "--replay").code == 0


def test_compile_prints_the_stage_asked_for_first(command, tmp_path):
    words = ["compile", "digits-fc", "--target", "sim", "-o", tmp_path / "digits.fsnn", "--dump-after", "lower"]
    found = parsed(command(*words, "--json"))
    assert found["dumped"]["stage"] == "lower"
    assert found["output"] == str(tmp_path / "digits.fsnn")
    text = command(*words).out
    assert text.startswith("after lower:\ndigits-fc for sim: float graph, passes none;")
    assert text.index("float graph") < text.index("integer graph")


def test_compile_calibrates_with_training_samples(command, tmp_path):
    words = ["compile", "digits-fc", "--target", "sim", "--json", "-o", tmp_path / "digits.fsnn"]
    without, found = parsed(command(*words)), parsed(command(*words, "--calibrate", "digits"))
    thresholds = [entry["phases"][0]["dynamics"]["hidden1"]["threshold"] for entry in (without, found)]
    assert thresholds[0] <= thresholds[1]  # what real inputs reach leaves room for a finer unit
    assert any("beyond what calibration saw" in note for note in found["notes"])


def test_inspect_writes_pictures_and_lists_processes(command, tmp_path):
    path = tmp_path / "made" / "graph.svg"
    found = parsed(command("inspect", "digits-fc", "--after", "retime", "--processes", "--svg", path, "--json"))
    assert found["pictures"] == {"svg": str(path)}
    assert {"hidden1", "hidden1 -> hidden1 (forward)"} <= {process["name"] for process in found["processes"]}
    assert path.read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize("verb", ["compare", "verify"])
@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_a_result_outside_its_tolerance_is_printed_and_exits_with_4(command, monkeypatch, verb, flag):
    outcome = SimpleNamespace(passed=False, to_json=lambda: {"passed": False}, to_text=lambda: "the table")
    monkeypatch.setattr(toolchain, verb, lambda *_, **__: outcome)
    answer = command(verb, "mnist-fc", *flag)
    assert answer.code == 4
    assert "passed" in answer.out if flag else answer.out == "the table\n"
    assert answer.err.count("\n") == 1


def test_numbers_that_json_lacks_become_null(command, monkeypatch):
    monkeypatch.setattr(toolchain, "inspect", lambda *_, **__: SimpleNamespace(to_json=lambda: {"rate": float("nan")}))
    assert parsed(command("inspect", "mnist-fc", "--json")) == {"rate": None}
