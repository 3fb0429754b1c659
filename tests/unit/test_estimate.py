"""What `estimate` says: figures that carry their tag and source, energies by the formulas it prints, and what it refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import msgspec
import numpy as np
import pytest

import toolchain
from toolchain import artifact, deploy, estimate, models, target
from toolchain.analysis.prices import PICOJOULE, Inference, Training, inference, prices, training
from toolchain.analysis.workload import ConnectionCounts, PhaseCounts
from toolchain.compiler import forward_only
from toolchain.errors import DesignRuleError, UsageError

MAC, AC = 4.6 * PICOJOULE, 0.9 * PICOJOULE


@pytest.fixture(scope="module")
def digits():
    """digits-fc, 60 samples, both phases; SANA-FE left out."""
    return estimate("digits-fc", dataset="digits", samples=60, chip_samples=0, device="cpu")


@pytest.fixture(scope="module")
def record(digits):
    return json.loads(msgspec.json.encode(digits.to_json()))


def figures(found, path=()):
    """Every number with a tag, and every other entry that holds a "value", by its place."""
    if isinstance(found, dict):
        if "value" in found or "tag" in found:
            yield path, found
        for name, inner in found.items():
            yield from figures(inner, (*path, name))
    elif isinstance(found, list):
        for number, inner in enumerate(found):
            yield from figures(inner, (*path, number))


def test_every_figure_has_its_tag_and_its_source(record):
    found = dict(figures(record))
    assert len(found) > 40
    assert {figure["tag"] for figure in found.values()} == {"simulated", "declared"}
    assert all(figure["source"] for figure in found.values())
    assert all(figure["unit"] for figure in found.values() if "value" in figure)
    declared = {path[0] for path, figure in found.items() if figure["tag"] == "declared"}
    assert declared == {"connections", "spide", "latency"}
    for place in ("accuracy", "neurobench", "connections", "spide", "latency"):
        assert [path for path in found if path[0] == place]


def test_horowitz_is_said_to_be_commonly_cited(record, digits):
    assert "commonly cited" in record["spide"]["mac"]["source"]
    assert "not confirmed" in digits.to_text()
    assert (record["spide"]["mac"]["value"], record["spide"]["accumulate"]["value"]) == (MAC, AC)


def test_accuracy_spikes_and_operations_are_those_of_deploy(digits):
    said = deploy("digits-fc", target="sim", dataset="digits", samples=60, device="cpu")
    assert digits.accuracy == said.accuracy
    assert digits.forward.spikes == said.spikes_per_sample
    assert digits.forward.synaptic_operations == said.synaptic_operations_per_sample


def test_energies_follow_from_the_rates_by_the_formulas(record, digits):
    """By hand from the table that is printed: rates, masks and products of every connection."""
    rows, steps, back = record["connections"], digits.time_steps, digits.feedback_steps
    host = [row for row in rows if row["where"] == "host"]
    forward = [row for row in rows if row["phase"] == "forward" and row["where"] == "chip"]
    feedback = [row for row in rows if row["phase"] == "feedback"]
    products = sum(row["products"] for row in (*host, *forward))
    spide = {name: entry["value"] for name, entry in record["spide"].items()}
    e_fwd = MAC * sum(row["products"] for row in host) + AC * steps * sum(row["rate"] * row["reach"] for row in forward)
    e_bwd = AC * back * sum(row["rate"] * row["mask"] * row["reach"] for row in feedback)
    assert spide["forward"] == pytest.approx(e_fwd, rel=1e-12)
    assert spide["backward"] == pytest.approx(e_bwd, rel=1e-12)
    assert spide["update"] == pytest.approx(MAC * products, rel=1e-12)
    assert spide["training"] == pytest.approx(e_fwd + e_bwd + MAC * products, rel=1e-12)
    assert spide["forward_without_spikes"] == pytest.approx(MAC * products, rel=1e-12)
    assert spide["training_without_spikes"] == pytest.approx(3 * MAC * products, rel=1e-12)
    assert spide["forward_ratio"] == pytest.approx(spide["forward_without_spikes"] / e_fwd, rel=1e-12)
    assert spide["training_ratio"] == pytest.approx(spide["training_without_spikes"] / spide["training"], rel=1e-12)
    assert sum(row["energy"]["value"] for row in rows) == pytest.approx(e_fwd + e_bwd, rel=1e-12)
    # a dense connection's rate is the plain one: spikes a couple and time step
    assert forward[0]["rate"] == pytest.approx(record["neurobench"]["forward"]["rate"]["value"], rel=1e-12)


def test_the_text_shows_formulas_rates_and_what_the_ratio_hinges_on(digits):
    text = digits.to_text()
    for line in (
        "E_fwd = E_MAC M_x + E_AC T sum r M",
        "E_bwd = E_AC T_B sum rb m M",
        "3 E_MAC sum M",
        "hinge on how sparsely",
        "leave out: neurons",
    ):
        assert line in text
    loop = digits.forward.connections[1]
    assert f"r {loop.rate:.5f}" in text
    assert "SANA-FE: not asked for (--chip-samples 0)" in text


def test_ticks_of_both_timings_are_those_that_compile_makes(digits):
    for timing in ("exact", "pipelined"):
        graph = toolchain.compile("digits-fc", timing=timing).graph
        assert digits.ticks[timing] == {phase.name: phase.ticks for phase in graph.phases}


def test_a_larger_batch_sends_smaller_errors():
    few, many = (estimate("digits-fc", dataset="digits", samples=40, batch=size, chip_samples=0, device="cpu") for size in (4, 400))
    assert (few.batch, many.batch) == (4, 400)
    assert few.forward == many.forward
    assert few.feedback.spikes > many.feedback.spikes


def test_the_batch_is_that_of_training(digits):
    assert digits.batch == models.get("digits-fc").training.batch


def test_a_run_folder_says_its_own_batch(tmp_path):
    toolchain.train("digits-fc", epochs=1, settings=["train.batch=16"], device="cpu", output=tmp_path / "run")
    found = estimate(tmp_path / "run", dataset="digits", samples=2, chip_samples=0, device="cpu")
    assert (found.batch, found.model) == (16, "run")


def test_pieces_of_the_data_set_give_the_same(digits, monkeypatch):
    monkeypatch.setattr(sys.modules["toolchain.estimate"], "HISTORY_BYTES", 1)  # a sample at a time
    again = estimate("digits-fc", dataset="digits", samples=60, chip_samples=0, device="cpu")
    assert (again.forward, again.feedback) == (digits.forward, digits.feedback)


def test_other_prices_are_named_as_given():
    found = estimate("digits-fc", dataset="digits", samples=5, chip_samples=0, mac_pj=3.1, ac_pj=0.1, device="cpu")
    usual = estimate("digits-fc", dataset="digits", samples=5, chip_samples=0, device="cpu")
    assert found.prices.source == "E_MAC as given, E_AC as given"
    assert "Horowitz" not in found.to_text()
    assert found.inference.acs == pytest.approx(usual.inference.acs / 9)
    assert "Horowitz" in prices(None, 0.1).source  # the other one's


def test_an_artefact_is_estimated_as_it_was_compiled(tmp_path):
    toolchain.compile("digits-fc", target="sim", input="graded", weight_bits=4, time_steps=6, output=tmp_path / "small.fsnn")
    found = estimate(tmp_path / "small.fsnn", dataset="digits", samples=10, chip_samples=0, device="cpu")
    assert (found.input, found.time_steps) == ("graded", 6)
    entry = found.forward.connections[0]
    assert (entry.where, entry.applied, entry.spiking) == ("chip", 6, False)
    assert entry.macs > 0
    # graded pixels are products at every time step
    assert found.inference.macs == pytest.approx(MAC * entry.met)


def test_an_artefact_without_floats_lacks_only_the_other_timing(tmp_path):
    toolchain.compile("digits-fc", target="sim", float_tensors=False, output=tmp_path / "bare.fsnn")
    found = estimate(tmp_path / "bare.fsnn", dataset="digits", samples=3, chip_samples=0, device="cpu")
    assert list(found.ticks) == ["exact"]
    assert any("without its float tensors" in note for note in found.notes)


def test_without_a_feedback_phase_only_inference_is_estimated():
    made = toolchain.compile("digits-fc", target="sim").artifact
    bare = msgspec.structs.replace(made, graph=forward_only(made.graph), float_graph=forward_only(made.float_graph))
    found = estimate(bare, dataset="digits", samples=3, chip_samples=0, device="cpu")
    assert (found.feedback, found.training, found.feedback_steps, found.batch) == (None, None, None, None)
    assert "E_bwd" not in found.to_text()
    assert found.to_json()["feedback_steps"] is None
    assert any("no feedback phase" in note for note in found.notes)


def test_random_weights_are_said():
    found = estimate("fashion-r400", samples=2, chip_samples=0, device="cpu")
    assert any("random (seed 0)" in note for note in found.notes)
    assert "note: no trained weights are shipped for 'fashion-r400'" in found.to_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "no-such-model"}, "no-such-model"),
        ({"dataset": "no-such-data"}, "mnist-1k"),
        ({"dataset": "mnist-1k"}, "64 values"),
        ({"samples": 0}, "samples"),
        ({"batch": 0}, "batch is 0"),
        ({"chip_samples": -1}, "chip_samples is -1"),
        ({"mac_pj": -1.0}, "mac_pj is -1"),
        ({"ac_pj": float("nan")}, "ac_pj is nan"),
        ({"mac_pj": 1e300}, "mac_pj is 1e.300: .* above 0 and below 1e.09"),
        ({"device": "no-such-device"}, "device"),
    ],
)
def test_what_cannot_be_is_one_sentence(options, said):
    chosen = {"model": "digits-fc", "dataset": "digits", "samples": 2, "chip_samples": 0, "device": "cpu"} | options
    with pytest.raises(UsageError, match=said) as caught:
        estimate(chosen.pop("model"), **chosen)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "bad.fsnn").write_bytes(b"\x00" * 40)
    with pytest.raises(artifact.ArtifactError, match=r"bad\.fsnn"):
        estimate(tmp_path / "bad.fsnn", dataset="digits")


# --- SANA-FE ---


def test_without_sana_fe_a_line_says_how_to_get_it(monkeypatch):
    chip = target.get("sanafe")
    monkeypatch.setattr(type(chip), "available", lambda _: 'SANA-FE is not installed: run pip install "fsnn-toolchain[energy]"')
    found = estimate("digits-fc", dataset="digits", samples=2, device="cpu")
    assert found.charged.phases == {}
    assert 'SANA-FE: SANA-FE is not installed: run pip install "fsnn-toolchain[energy]"' in found.to_text()
    assert found.to_json()["sanafe_missing"].startswith("SANA-FE is not installed")
    assert found.forward.spikes > 0


def test_what_sana_fe_charges_is_of_the_spikes_that_sim_counts():
    pytest.importorskip("sanafe", reason="SANA-FE is not installed (extra energy)")
    found = estimate("digits-fc", dataset="digits", samples=3, chip_samples=3, device="cpu")
    forward, feedback = found.charged.phases["forward"], found.charged.phases["feedback"]
    assert forward.samples == feedback.samples == 3
    assert forward.counts["spikes"] == round(3 * found.forward.spikes)
    assert forward.counts["synapses"] == round(3 * found.forward.synaptic_operations)
    assert feedback.counts["spikes"] == round(3 * found.feedback.spikes)
    assert forward.energy_joules["total"] > 0
    entry = found.to_json()["sanafe"]["forward"]
    assert entry["energy"]["total"] == {
        "value": forward.energy_joules["total"] / 3,
        "unit": "J a sample",
        "tag": "simulated",
        "source": entry["latency"]["source"],
    }
    assert "Davies" in entry["latency"]["source"]
    assert "energy by unit and latency" in found.to_text()


def test_what_does_not_fit_sana_fe_is_said():
    pytest.importorskip("sanafe", reason="SANA-FE is not installed (extra energy)")
    found = estimate("fashion-fc", dataset="mnist-1k", samples=2, device="cpu")  # it leaks
    assert "feedback" not in found.charged.phases
    assert found.charged.missing
    assert f"SANA-FE: {found.charged.missing}" in found.to_text()


def test_what_goes_wrong_on_sana_fe_costs_only_its_part(monkeypatch):
    def passes(*_):
        raise DesignRuleError("a potential passes 24 bits")

    chip = target.get("sanafe")
    monkeypatch.setattr(type(chip), "available", lambda _: None)
    monkeypatch.setattr(type(chip), "check", lambda *_: [])
    monkeypatch.setattr(type(chip), "compile", passes)
    found = estimate("digits-fc", dataset="digits", samples=2, device="cpu")
    assert found.charged.missing == "a potential passes 24 bits"
    assert "SANA-FE: a potential passes 24 bits" in found.to_text()
    assert found.inference.forward > 0


# --- prices, from numbers chosen by hand ---


def one_weight(phase, steps, rate, **changes):
    """A connection of one weight whose source fires at `rate`."""
    plain = ConnectionCounts("a -> b", "dense", "chip", 1, 0, 1, 1, steps, True, 0.0, 0.0, rate * steps, rate * steps, rate, None)
    return PhaseCounts(phase, steps, 1, (replace(plain, **changes),), (), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_one_weight_by_hand():
    """T 30 at a rate of 0.10 and T_B 250 at 0.02: 3 + 5 additions of 0.9 pJ and one product of 4.6 pJ, beside three products."""
    found = training(one_weight("forward", 30, 0.10), one_weight("feedback", 250, 0.02), prices())
    assert found.total == pytest.approx(11.8 * PICOJOULE)
    assert found.without_spikes == pytest.approx(13.8 * PICOJOULE)
    assert found.backward == pytest.approx(4.5 * PICOJOULE)
    assert found.ratio == pytest.approx(13.8 / 11.8)
    assert found.even == pytest.approx((13.8 - 4.6) / 7.2)
    assert found.inference.ratio == pytest.approx(4.6 / 2.7)


def test_graded_values_cost_products_and_skips_additions():
    graded = one_weight("forward", 10, 0.5, spiking=False)
    assert inference(graded, prices()) == Inference(macs=pytest.approx(5 * MAC), acs=0, without_spikes=MAC)
    skip = one_weight("forward", 10, 0.5, spiking=False, weights=0, products=0)
    assert inference(skip, prices()) == Inference(macs=0, acs=pytest.approx(5 * AC), without_spikes=0)
    host = one_weight("forward", 10, 0.5, where="host", products=7)
    assert inference(host, prices()) == Inference(macs=7 * MAC, acs=0, without_spikes=7 * MAC)


def test_silence_costs_the_products_alone():
    found = inference(one_weight("forward", 10, 0.0), prices())
    assert (found.forward, found.ratio, found.even) == (0, None, None)
    assert Training(found, 0.0, 0.0, MAC, 3 * MAC).ratio == pytest.approx(3)


def test_products_alone_may_cost_more_than_a_network_without_spikes():
    assert Inference(macs=3.0, acs=1.0, without_spikes=2.0).even == -1
    assert np.isclose(Inference(macs=3.0, acs=1.0, without_spikes=2.0).ratio, 0.5)


def test_a_pipelined_artefact_keeps_its_timing(tmp_path):
    toolchain.compile("mnist-fc2", target="sim", timing="pipelined", output=tmp_path / "fast.fsnn")
    found = estimate(tmp_path / "fast.fsnn", samples=3, chip_samples=0, device="cpu")
    assert (found.timing, list(found.ticks)) == ("pipelined", ["pipelined", "exact"])
    assert found.ticks["pipelined"]["forward"] < found.ticks["exact"]["forward"]
    # one tick a step: the last layer's loop back comes round later, and loses more steps
    loop = next(c for c in found.forward.connections if c.name == "hidden2 -> hidden1")
    assert loop.applied < found.time_steps - 1
