"""`make bench`: workloads that fire as often as they say, a table whose last line is JSON, and differences that are found."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from toolchain.targets.reference import REFERENCE
from toolchain.targets.sim import Sim

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = ("simulation", "costs", "workloads", "peers", "lava_sim")


@pytest.fixture(scope="module")
def bench():
    """The benchmark's files as it imports them itself."""
    threads = torch.get_num_threads()
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("simulation")
    sys.path.remove(str(FOLDER))
    for name in NAMES:
        sys.modules.pop(name, None)
    torch.set_num_threads(threads)


@pytest.fixture
def run(bench, monkeypatch, capsys):
    """`run(*flags)`: exit code and output of the smallest table."""

    def main(*flags):
        few = ("--parts", "table", "--workloads", "W1", "--batches", "1,3", "--rounds", "1", "--seconds", "0")
        monkeypatch.setattr(sys, "argv", ["simulation.py", *few, *flags])
        return bench.main(), capsys.readouterr().out

    return main


@dataclass(frozen=True)
class Wrong(Sim):
    """`sim` with one spike too many in one neuron of its last sample."""

    def compile(self, graph):
        made = super().compile(graph)
        correct = made.run

        def wrong(inputs, *, phase="forward"):
            result = correct(inputs, phase=phase)
            result.counts["hidden1"][-1, 7] += 1
            return result

        made.run = wrong
        return made


@pytest.mark.parametrize(("name", "density"), [("W1", 0.1), ("W1", 0.05), ("W2", 0.07)])
def test_random_weights_spike_as_often_as_asked(bench, name, density):
    work = bench.workloads.random(name, density, steps=10)
    with Sim(device="cpu").compile(work.exact) as run:
        result = run.run(work.images[: bench.workloads.DENSITY_SAMPLES])
    assert work.density(result) == pytest.approx(density, abs=0.02)
    assert all(one == pytest.approx(density, abs=0.02) for one in work.densities(result).values())
    assert bench.workloads.random(name, density, steps=10).gains == work.gains


def test_the_table_ends_with_what_it_shows_as_json(run, tmp_path):
    code, said = run("--weights", "random", "--density", "10", "--peers", str(tmp_path / "none"), "--json", str(tmp_path / "made.json"))
    assert code == 0
    made = json.loads(said.splitlines()[-1])
    assert made == json.loads((tmp_path / "made.json").read_text())
    (table,) = made["tables"]
    assert (table["workload"], table["model"], made["seed"]) == ("W1", "mnist-fc", 0)
    assert table["density"] == pytest.approx(0.1, abs=0.02)
    assert {"sim", "sim, torch path", "sim, pipelined"} <= table["differences"].keys()
    for speeds in table["samples_per_second"].values():
        assert speeds.keys() == table["differences"].keys()
        assert all(speed > 0 for speed in speeds.values())
    assert list(table["samples_per_second"]) == ["1", "3"]
    assert "spike density" in said
    assert "make peers" in said


def test_a_wrong_count_is_told_and_ends_the_benchmark_with_1(bench, run, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "FORMS", {"sim": Wrong(device="cpu")})
    code, said = run("--weights", "trained", "--peers", str(tmp_path / "none"))
    assert code == 1
    found = json.loads(said.splitlines()[-1])["tables"][0]["differences"]
    assert found["sim"]["counts"] == 2  # with and without a trace
    assert sum(found["sim, pipelined"].values()) == 0


@pytest.mark.parametrize("field", ["counts", "potentials", "saturations"])
def test_differences_are_counted_in_every_field(bench, field):
    work = bench.workloads.trained("W1", steps=3)
    with replace(REFERENCE, trace=True).compile(work.exact) as run:
        expected, other = run.run(work.images[:2]), run.run(work.images[:2])
    assert sum(bench.differences(other, expected).values()) == 0
    getattr(other, field)["hidden1"][0, 3] += 1
    assert bench.differences(other, expected)[field] == 1
    other.history["hidden1"].spikes[1, 0, 5] ^= 1
    assert bench.differences(other, expected)["spikes of every step"] == 1


@pytest.mark.parametrize("name", ["W1", "W2"])
def test_a_peer_gets_the_network_that_sim_runs(bench, name, tmp_path):
    work = bench.workloads.trained(name, steps=6)
    bench.workloads.write(work, tmp_path / "workload.npz", 2)
    peers = importlib.import_module("peers")
    network, images, currents = peers.read(str(tmp_path / "workload.npz"))
    with Sim(device="cpu").compile(work.exact) as run:
        expected = run.run(work.images[:2])
    with torch.inference_mode():
        _, counts = peers.eager(network)(images, currents, True)
        own = network.first(images) + network.offset
    for population, count in zip(work.exact.of_kind("couple"), counts, strict=True):
        assert np.array_equal(count.numpy(), expected.counts[population.name])
        assert count.sum() > 0
    # what the peer makes of the image itself is the host's current before it is rounded to a multiple of 2^exponent
    assert (own - currents).abs().max() <= 2.0 ** work.exact.phase("forward").drive[0].exponent / 2 + 0.1


def test_a_peer_that_is_not_installed_says_so_and_the_others_run(bench, tmp_path):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    bench.workloads.write(bench.workloads.trained("W1", steps=5), tmp_path / "workload.npz", 2)
    peers = bench.Peers(tmp_path)
    assert peers.missing is None
    assert peers.names == ["SpikingJelly", "snnTorch", "plain torch", "plain torch, compiled"]
    peers.ask("load", path=str(tmp_path / "workload.npz"))
    assert peers.seconds("plain torch", 2, 1) > 0
    if peers.versions["spikingjelly"] == "not installed":
        with pytest.raises(RuntimeError, match="No module named 'spikingjelly'"):
            peers.seconds("SpikingJelly", 1, 1)
    peers.close()
