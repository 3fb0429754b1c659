"""`verify`, `deploy` and `compare` as functions: what they find, count and refuse, on a small network with a planted fault."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec
import numpy as np
import pytest
import torch

import toolchain
from toolchain import target as targets
from toolchain.compiler import compile as compile_model
from toolchain.compiler import graph_for
from toolchain.errors import UsageError
from toolchain.ir import frozen
from toolchain.models import digits_fc
from toolchain.passes import LOIHI_PIPELINE
from toolchain.source import find
from toolchain.targets.sim import SIM


@dataclass(frozen=True)
class Faulty:
    """The simulator with one fault in its copy of the graph."""

    fault: str
    trace: bool = False
    name: str = "faulty"
    limits = SIM.limits
    pipeline = LOIHI_PIPELINE

    def available(self):
        return None

    def check(self, graph):
        return []

    def compile(self, graph):
        return replace(SIM, trace=self.trace, device="cpu").compile(FAULTS[self.fault](graph))


def in_phase(graph, phase, **fields):
    changed = msgspec.structs.replace(graph.phase(phase), **fields)
    return msgspec.structs.replace(graph, phases=tuple(changed if p.name == phase else p for p in graph.phases))


def dynamics(graph, phase, **fields):
    old = graph.phase(phase).dynamics
    return in_phase(graph, phase, dynamics={**old, "hidden1": msgspec.structs.replace(old["hidden1"], **fields)})


def weight(graph):
    tensor = graph.tensors["feedback.0.weight"].copy()
    tensor[3, 5] += 1 if tensor[3, 5] < 127 else -1
    return msgspec.structs.replace(graph, tensors={**graph.tensors, "feedback.0.weight": frozen(tensor)})


FAULTS = {
    "a weight off by one": weight,
    "a threshold one percent off": lambda g: dynamics(
        g, "forward", threshold=g.phase("forward").dynamics["hidden1"].threshold * 101 // 100
    ),
    "a reset of zero": lambda g: dynamics(g, "forward", reset=0),
    "a leak": lambda g: dynamics(g, "forward", leak=4095 / 4096),
    "a feedback threshold one percent off": lambda g: dynamics(
        g, "feedback", threshold=g.phase("feedback").dynamics["hidden1"].threshold * 99 // 100
    ),
    "a bias start": lambda g: in_phase(g, "feedback", drive=(msgspec.structs.replace(g.phase("feedback").drive[0], exponent=7),)),
}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return digits_fc.build(0)


@dataclass(frozen=True)
class Entry:
    """What an installed package's entry point looks like."""

    found: object
    name: str = "faulty"

    def load(self):
        return self.found


@pytest.fixture
def faulty(monkeypatch):
    """Install target 'faulty' as another package would, with a fault of the test's choice."""

    def plant(fault):
        monkeypatch.setattr(targets, "entry_points", lambda group: [Entry(Faulty(fault))])

    return plant


def test_targets_of_other_packages_are_found_and_checked(monkeypatch, faulty):
    faulty("a leak")
    assert "faulty" in targets.names()
    assert targets.get("faulty").name == "faulty"
    monkeypatch.setattr(targets, "entry_points", lambda group: [Entry(object())])
    with pytest.raises(UsageError, match="has not all members of toolchain"):
        targets.get("faulty")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(net, faulty, fault):
    faulty(fault)
    found = toolchain.verify(net, targets=("reference", "faulty"), dataset="digits", samples=10)
    (pair,) = found.pairs
    assert not found.passed
    assert pair.spike_differences + pair.potential_differences > 0
    assert pair.first_difference.population == "hidden1"
    assert pair.first_difference.phase == ("feedback" if "feedback" in fault or fault == "a bias start" else "forward")
    assert pair.first_difference.a != pair.first_difference.b
    assert "first difference" in found.to_text()


def test_the_first_difference_is_the_earliest_step(net, faulty):
    faulty("a reset of zero")
    found = toolchain.verify(net, targets=("reference", "faulty"), dataset="digits", samples=10, phase="forward", probes=0)
    first = found.pairs[0].first_difference
    assert first.step >= 1
    assert found.samples == {"forward": 10}
    assert found.pairs[0].spikes_compared == 10 * 30 * 32


def test_identical_targets_pass_and_count_what_they_compared(net):
    found = toolchain.verify(net, targets=("reference", "sim"), dataset="digits", samples=25)
    assert found.passed
    assert found.activity["forward"] > 0
    assert found.activity["feedback"] > 0
    assert found.pairs[0].spikes_compared == (25 + found.probes) * 32 * (30 + 100)
    assert all(found.pairs[0].spikes_compared == len(found.variant.inputs) * 32 * (16 + 16) for found in found.variants)


def test_replay_finds_a_target_that_computes_something_else(net, faulty):
    artifact = compile_model(net).artifact
    assert toolchain.verify(artifact, targets=("reference", "sim"), replay=True).passed
    faulty("a threshold one percent off")
    found = toolchain.verify(artifact, targets=("faulty",), replay=True)
    assert not found.passed
    assert found.pairs[0].first_difference.population == "hidden1"


def test_what_cannot_be_compared_is_refused(net):
    with pytest.raises(UsageError, match="run different graphs"):
        toolchain.verify(net, targets=("reference", "torch"), dataset="digits", samples=2)
    with pytest.raises(UsageError, match="golden vectors are in artefacts"):
        toolchain.verify(net, targets=("sim",), replay=True)
    with pytest.raises(UsageError, match="name at least two"):
        toolchain.verify(net, targets=("sim",), dataset="digits")
    with pytest.raises(UsageError, match="unknown target 'loihi': choose one of"):
        toolchain.verify(net, targets=("sim", "loihi"), dataset="digits")


def test_a_deployment_says_what_ran(net, tmp_path):
    found = toolchain.deploy(net, target="sim", dataset="digits", samples=50, predictions=tmp_path / "p.npz")
    record = found.to_json()
    assert record["ran_on"] == "sim"
    assert record["samples"] == 50
    assert record["accuracy"] == record["correct"] / 50
    assert record["timing"] == "exact"
    stored = np.load(tmp_path / "p.npz", allow_pickle=False)
    assert (stored["predictions"] == stored["labels"]).sum() == record["correct"]
    assert stored["rates.hidden1"].shape == (50, 32)
    assert ((stored["rates.hidden1"] * 30) % 1 < 1e-5).mean() > 0.4


def test_a_missing_target_falls_back_loudly_or_not_at_all(net, monkeypatch, capsys):
    missing = "Lava is not installed: run pip install 'fsnn-toolchain[lava]'"
    monkeypatch.setattr("toolchain.targets.lava_sim.LavaSim.available", lambda self: missing)
    with pytest.raises(UsageError, match="or add --fallback sim"):
        toolchain.deploy(net, target="lava-sim", dataset="digits", samples=5)
    found = toolchain.deploy(net, target="lava-sim", dataset="digits", samples=5, fallback="sim")
    assert (found.target, found.ran_on) == ("lava-sim", "sim")
    assert "running on 'sim' instead" in capsys.readouterr().err


def test_a_comparison_has_both_phases(net):
    found = toolchain.compare(net, targets=("torch", "sim"), dataset="digits", samples=64, device="cpu")
    first, second = found.rows
    assert first.agreement == 1
    assert first.rate_difference == {"hidden1": 0.0}
    assert second.agreement > 0.8
    assert 0 < second.rate_difference["hidden1"] < 0.05
    assert set(second.gradient.cosine) == {name for name, _ in net.named_parameters()}
    assert all(c > 0.9 for c in second.gradient.cosine.values())
    assert found.passed
    assert not replace(found, max_drop=0.0, drop=0.01).passed


def test_artefacts_run_on_torch_too_unless_left_without_floats(net):
    whole = compile_model(net).artifact
    bare = compile_model(net, float_tensors=False).artifact
    model = toolchain.deploy(net, target="torch", dataset="digits", samples=100, device="cpu")
    folded = toolchain.deploy(whole, target="torch", dataset="digits", samples=100, device="cpu")
    assert (model.predictions == folded.predictions).mean() > 0.97
    with pytest.raises(UsageError, match="compiled without its float tensors"):
        toolchain.deploy(bare, target="torch", dataset="digits", samples=5)
    assert toolchain.deploy(bare, target="sim", dataset="digits", samples=5).samples == 5


def test_compiled_twice_gives_the_same_bytes(net, tmp_path):
    for name in ("a", "b"):
        toolchain.compile(net, output=tmp_path / f"{name}.fsnn")
    assert (tmp_path / "a.fsnn").read_bytes() == (tmp_path / "b.fsnn").read_bytes()


@pytest.mark.parametrize("timing", ["exact", "pipelined"])
def test_both_timing_modes_are_identical_on_their_targets(net, timing):
    artifact = toolchain.compile(net, timing=timing).artifact
    found = toolchain.verify(artifact, targets=("reference", "sim"), dataset="digits", samples=10)
    assert found.passed
    assert found.timing == timing


def test_inputs_outside_the_unit_interval_are_refused_everywhere(net):
    images, labels = np.full((2, 1, 8, 8), 1.5), np.zeros(2, np.int64)
    for target in ("torch", "sim", "reference"):
        with pytest.raises(UsageError, match=r"the input holds values from 1.5 to 1.5: give it in \[0, 1\]"):
            toolchain.feedback(net, images, labels, target=target)


def test_a_cut_error_current_is_counted(net):
    images, labels = np.zeros((1, 1, 8, 8)), np.zeros(1, np.int64)
    assert toolchain.feedback(net, images, labels, target="sim", scale_factor=1.0).clipped_errors == 0
    assert toolchain.feedback(net, images, labels, target="sim", scale_factor=1e6).clipped_errors > 0


def test_a_cut_input_current_is_counted(net):
    with torch.no_grad():
        net.input.weight.mul_(300)
    found = toolchain.deploy(net, target="sim", dataset="digits", samples=20)
    assert found.clipped_currents > 0
    assert "input currents clipped" in found.to_text()


@pytest.mark.cuda
def test_the_torch_row_runs_on_a_gpu(net):
    gpu = toolchain.deploy(net, target="torch", dataset="digits", samples=100, device="cuda")
    cpu = toolchain.deploy(net, target="torch", dataset="digits", samples=100, device="cpu")
    assert gpu.device != "cpu"
    assert (gpu.predictions == cpu.predictions).mean() >= 0.99


@pytest.mark.parametrize("labels", [[3, 99], [0.5, 1.0], ["a", "b"], None, [1], [[0], [1]]])
def test_labels_that_are_none_are_refused(net, labels):
    with pytest.raises(UsageError, match="labels must be 2 whole numbers from 0 to 9"):
        toolchain.feedback(net, np.zeros((2, 1, 8, 8)), labels, target="sim")


def test_labels_may_be_a_list_or_a_tensor(net):
    images = np.full((2, 1, 8, 8), 0.5)
    gradients = [
        toolchain.feedback(net, images, labels, target="sim").gradients for labels in ([3, 4], torch.tensor([3, 4]), np.array([3, 4]))
    ]
    for name, gradient in gradients[0].items():
        np.testing.assert_array_equal(gradient, gradients[1][name])
        np.testing.assert_array_equal(gradient, gradients[2][name])


@pytest.mark.parametrize("factor", ["auto", 0, -1.0, float("inf")])
def test_scale_factors_are_positive_numbers(net, factor):
    with pytest.raises(UsageError, match="it must be a positive number"):
        toolchain.feedback(net, np.zeros((1, 1, 8, 8)), [0], target="sim", scale_factor=factor)


def test_worst_cases_are_noted_at_compile_time(net):
    assert compile_model(net).graph.provenance.notes == ()
    long = compile_model(net, time_steps=50_000, feedback_steps=1)
    assert any("readout 'readout' passes 24 bit" in note for note in long.graph.provenance.notes)
    assert "note: in the worst case" in long.to_text()


def test_a_prediction_file_is_refused_before_the_work(net, tmp_path):
    for path in (tmp_path, "", "."):
        with pytest.raises(UsageError, match="is no file name"):
            toolchain.deploy(net, target="sim", dataset="digits", samples=5, predictions=path)


@pytest.mark.parametrize(("timing", "input"), [("exact", "bias"), ("pipelined", "bias"), ("exact", "graded"), ("pipelined", "graded")])
def test_targets_that_start_from_the_float_graph_keep_the_timing_and_the_input(net, timing, input):
    """lava-sim-float runs an artefact as it was compiled, not in its own defaults."""
    artifact = compile_model(net, timing=timing, input=input).artifact
    graph = graph_for(find(artifact), targets.get("lava-sim-float"))
    assert not graph.integer
    assert graph.phase("forward").timing == artifact.graph.phase("forward").timing
    assert ("input" in graph.phase("forward").order) == (input == "graded")


def test_a_setting_may_not_contradict_a_flag(net):
    with pytest.raises(UsageError, match="contradicts the flag that says graded"):
        compile_model(net, input="graded", settings=["inject.mode=bias"])
    with pytest.raises(UsageError, match=r"option 'weight_bits' of pass 'quantize' cannot be 4\.5"):
        compile_model(net, settings=["quantize.weight_bits=4.5"])


@pytest.mark.parametrize("target", ["sim", "reference"])
def test_graded_inputs_count_their_synaptic_operations(net, target):
    """What the chip's first connection costs is not left out: nonzero pixels times fan-out times steps."""
    host = toolchain.deploy(compile_model(net).artifact, target=target, dataset="digits", samples=20)
    chip = toolchain.deploy(compile_model(net, input="graded").artifact, target=target, dataset="digits", samples=20)
    assert chip.synaptic_operations_per_sample > host.synaptic_operations_per_sample + 20 * 32 * 30
