"""Accuracy against energy: points that are what `estimate` and `deploy` say of the compiled network, the front, and what is refused."""

from __future__ import annotations

import json

import msgspec
import pytest

import toolchain
from toolchain import deploy, estimate
from toolchain.errors import UsageError
from toolchain.tradeoff import tradeoff


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    picture = tmp_path_factory.mktemp("tradeoff") / "front.png"
    return tradeoff("digits-fc", dataset="digits", samples=80, weight_bits=(4, 8), time_steps=(2, 10), picture=picture, device="cpu")


def test_the_grid_is_what_was_asked_for(found):
    assert [(p.weight_bits, p.time_steps) for p in found.points] == [(8, 10), (4, 10), (8, 2), (4, 2)]


def test_a_point_is_what_estimate_and_deploy_say(found, tmp_path):
    point = next(p for p in found.points if (p.weight_bits, p.time_steps) == (4, 10))
    toolchain.compile("digits-fc", target="sim", weight_bits=4, time_steps=10, output=tmp_path / "same.fsnn")
    said = estimate(tmp_path / "same.fsnn", dataset="digits", samples=80, chip_samples=0, device="cpu")
    assert point.energy == pytest.approx(said.inference.forward, rel=1e-12)
    assert point.accuracy == said.accuracy
    ran = deploy(tmp_path / "same.fsnn", target="sim", dataset="digits", samples=80, device="cpu")
    assert (point.accuracy, point.spikes_per_sample) == (ran.accuracy, ran.spikes_per_sample)
    assert point.synaptic_operations_per_sample == ran.synaptic_operations_per_sample


def test_the_reference_is_the_float_model_at_its_own_time_steps(found):
    ran = deploy("digits-fc", target="torch", dataset="digits", samples=80, device="cpu")
    assert (found.reference, found.time_steps) == (ran.accuracy, ran.time_steps)
    assert all(p.drop == pytest.approx(100 * (ran.accuracy - p.accuracy)) for p in found.points)


def test_the_front_is_what_no_point_beats_at_accuracy_and_energy(found):
    def beaten(point):
        return any(
            other.accuracy >= point.accuracy
            and other.energy <= point.energy
            and (other.accuracy, other.energy) != (point.accuracy, point.energy)
            for other in found.points
        )

    assert {p.name for p in found.points if p.pareto} == {p.name for p in found.points if not beaten(p)}


def test_without_time_steps_they_are_halved():
    whole = tradeoff("digits-fc", dataset="digits", samples=5, weight_bits=(8,), device="cpu")
    assert [p.time_steps for p in whole.points] == [30, 15, 8, 4, 2, 1]


def test_text_json_and_picture_say_the_same(found):
    text, record = found.to_text(), json.loads(msgspec.json.encode(found.to_json()))
    assert found.picture.read_bytes().startswith(b"\x89PNG")
    assert str(found.picture) in text
    assert text.count("front") >= 2
    assert "commonly cited" in text
    for entry, point in zip(record["points"], found.points, strict=True):
        assert entry["energy"] == {"value": point.energy, "unit": "J a sample", "tag": "declared", "source": entry["energy"]["source"]}
        assert entry["accuracy"]["tag"] == "simulated"
        assert entry["sanafe"] is None
        assert f"{100 * point.accuracy:.2f}" in text


def test_twice_is_the_same(found):
    again = tradeoff("digits-fc", dataset="digits", samples=80, weight_bits=(4, 8), time_steps=(2, 10), device="cpu")
    assert again.points == found.points


def test_sana_fe_charges_each_point():
    pytest.importorskip("sanafe", reason="SANA-FE is not installed (extra energy)")
    whole = tradeoff("digits-fc", dataset="digits", samples=4, weight_bits=(8,), time_steps=(2, 8), chip_samples=2, device="cpu")
    long, short = whole.points
    assert long.chip_energy > short.chip_energy > 0
    assert long.chip_seconds > short.chip_seconds > 0
    said = whole.to_json()["points"][0]["sanafe"]
    assert (said["energy"]["tag"], said["latency"]["unit"]) == ("simulated", "s a sample")
    assert "SANA-FE" in whole.to_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight_bits": (1,)}, "weight_bits are 1: give whole numbers from 2 to 8"),
        ({"weight_bits": ()}, "weight_bits are none"),
        ({"time_steps": (0,)}, "time_steps are 0"),
        ({"chip_samples": -1}, "chip_samples is -1"),
        ({"ac_pj": 0.0}, "ac_pj is 0"),
        ({"picture": "front.pdf"}, r"\.png or \.svg"),
        ({"dataset": "mnist-1k"}, "64 values"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        tradeoff("digits-fc", **{"dataset": "digits", "samples": 2, "device": "cpu"} | options)


def test_an_artefact_without_floats_cannot_be_rounded_anew(tmp_path):
    toolchain.compile("digits-fc", target="sim", float_tensors=False, output=tmp_path / "bare.fsnn")
    with pytest.raises(UsageError, match="without its float tensors"):
        tradeoff(tmp_path / "bare.fsnn", dataset="digits", samples=2, device="cpu")
