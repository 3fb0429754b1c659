"""The table of what whole numbers cost: what it counts, what it holds rows to, and how it ends."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from toolchain.deploy import Deployment

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "quantization.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("quantization_table", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def run(benchmark, monkeypatch, capsys):
    """`run(*flags)`: (exit code, stdout, stderr) of the command."""

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["quantization.py", *flags])
        code = benchmark.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return main


def deployment(predictions, labels) -> Deployment:
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    correct = int((predictions == labels).sum())
    given = {"predictions": predictions, "labels": labels, "samples": len(labels), "correct": correct, "accuracy": correct / len(labels)}
    words = dict.fromkeys(("model", "target", "ran_on", "device", "dataset", "timing"), "a")
    numbers = dict.fromkeys(("startup_seconds", "seconds", "samples_per_second", "spikes_per_sample"), 1.0)
    counts = {"time_steps": 3, "saturations": 5, "clipped_currents": 6, "synaptic_operations_per_sample": 7.0}
    return Deployment(**given, **words, **numbers, **counts, versions={}, logits=np.zeros((len(labels), 2)), rates={})


# Binomial tails written out: 2 (1) / 2^5, 2 (1 + 10) / 2^10, and the middle of a symmetric distribution.
@pytest.mark.parametrize(("one", "other", "p"), [(0, 5, 2 / 32), (9, 1, 22 / 1024), (4, 4, 1.0), (0, 0, 1.0), (3, 4, 1.0)])
def test_mcnemar_is_the_exact_binomial_test(benchmark, one, other, p):
    assert benchmark.mcnemar(one, other) == p
    assert benchmark.mcnemar(other, one) == p


def test_mcnemar_takes_thousands_of_changes(benchmark):
    assert benchmark.mcnemar(5000, 5000) == 1.0
    assert 0 < benchmark.mcnemar(4500, 5500) < 1e-20


def test_flips_are_counted_both_ways_and_a_wrong_answer_that_changes_is_none(benchmark):
    labels = [0, 0, 0, 0, 0]
    row = benchmark.compared(deployment([0, 0, 0, 1, 2], labels), deployment([0, 1, 1, 0, 1], labels), 8, 0)
    assert (row.right_to_wrong, row.wrong_to_right) == (2, 1)
    assert row.drop == pytest.approx(20)
    assert (row.saturations, row.clipped_currents, row.synaptic_operations_per_sample) == (5, 6, 7.0)


@pytest.mark.parametrize(
    ("bits", "drop", "p", "passed"),
    [
        (8, 0.1, 0.001, True),
        (8, 0.11, 0.05, False),
        (8, 0.11, 0.051, True),
        (4, 0.5, 0.0, True),
        (4, 0.51, 0.9, False),
        (4, -3.0, 0.0, True),
        (3, 40.0, 0.0, None),
    ],
)
def test_rows_are_held_to_their_limit(benchmark, bits, drop, p, passed):
    row = benchmark.compared(deployment([0], [0]), deployment([0], [0]), bits, 0)
    assert replace(row, drop=drop, p=p).passed is passed


def test_the_command_says_everything_as_text_and_as_json(run):
    code, out, _ = run("--models", "digits-fc", "--bits", "8,4,3", "--samples", "60")
    assert code == 0
    assert "digits, n = 60, weights of seed 0" in out
    assert out.count("pass") == 2
    assert "2 of 2 rows with a limit keep to it" in out
    assert "python" in out
    code, out, _ = run("--models", "digits-fc", "--bits", "8,4,3", "--samples", "60", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["passed"] is True
    assert [(row["weight_bits"], row["samples"], row["passed"]) for row in found["rows"]] == [(8, 60, True), (4, 60, True), (3, 60, None)]
    floats = {row["float_accuracy"] for row in found["rows"]}
    assert len(floats) == 1
    for row in found["rows"]:
        assert round(60 * (row["float_accuracy"] - row["accuracy"])) == row["right_to_wrong"] - row["wrong_to_right"]


def test_a_row_that_fails_is_exit_4(run, benchmark, monkeypatch):
    monkeypatch.setitem(benchmark.DROP, 8, -100.0)
    monkeypatch.setattr(benchmark, "SIGNIFICANT", 1.0)
    code, out, _ = run("--models", "digits-fc", "--bits", "8", "--samples", "20")
    assert code == 4
    assert "FAIL" in out
    assert "0 of 1 rows" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--models", "vgg-f"), "no trained weights are shipped for 'vgg-f'"),
        (("--models", "nothing"), "unknown model 'nothing'"),
        (("--models", "digits-fc", "--bits", "8,x"), "'8,x'"),
        (("--models", "digits-fc", "--bits", "9"), "weight_bits is 9"),
        (("--models", "digits-fc", "--samples", "501"), "1 to 500"),
    ],
)
def test_what_cannot_be_measured_is_exit_2_and_one_sentence(run, flags, said):
    code, out, err = run(*flags)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
