"""Learning on targets: the same rule gives the same weights everywhere, it is SPIDE's, and what was learned can be deployed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import toolchain
from toolchain import artifact, data, models, plasticity
from toolchain.errors import GraphError, UsageError
from toolchain.layers import FeedbackSNN, Neuron
from toolchain.learn import Learned
from toolchain.lesson import order_of
from toolchain.methods import spide

lava = pytest.mark.lava


def learned(target: str, model: object = "digits-fc", **options: object) -> Learned:
    given = {"dataset": "digits", "samples": 40, "epochs": 1, "batch": 16, "test_samples": 10, "settings": ["learn.lr=1.0"], **options}
    return toolchain.learn(model, target=target, **given)  # type: ignore[arg-type]


def small(leak: float = 1.0, *, images: bool = False) -> FeedbackSNN:
    """Two layers with feedback across both, on 8 x 8 images; with `images` convolutions, a pool and a transposed convolution."""
    torch.manual_seed(5)
    if images:
        input = nn.Conv2d(1, 3, 3, 2, 1)
        hidden = [nn.AvgPool2d(2), nn.Conv2d(3, 4, 3, 1, 1)]
        feedback = [(2, 0, nn.ConvTranspose2d(4, 3, 2, 2, bias=False))]
        with torch.no_grad():
            input.weight *= 3
            hidden[1].weight *= 3
            hidden[1].bias += 0.3
    else:
        input, hidden, feedback = nn.Linear(64, 12), [nn.Linear(12, 9)], [(1, 0, nn.Linear(9, 12))]
    return FeedbackSNN(
        name="small",
        input_shape=(1, 8, 8),
        input=input,
        hidden=hidden,
        feedback=feedback,
        readout=nn.Linear(16 if images else 9, 10),
        neuron=Neuron(threshold=1.0, u_rest=-1.0, threshold_back=0.5, u_rest_back=-0.5, leak=leak),
        time_steps=10,
        feedback_steps=25,
        scale_factor=16.0,
    ).eval()


def assert_same(a: Learned, b: Learned) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    for name, values in a.tensors.items():
        np.testing.assert_array_equal(values, b.tensors[name], err_msg=name)
    assert [line.test_accuracy for line in a.curve] == [line.test_accuracy for line in b.curve]
    assert [line.loss for line in a.curve] == [line.loss for line in b.curve]
    assert a.curve[-1].saturations == b.curve[-1].saturations


def moved(a: Learned, before: Learned) -> set[str]:
    return {name for name, values in a.tensors.items() if not np.array_equal(values, before.tensors[name])}


@lava
@pytest.mark.parametrize("network", ["digits-fc", "dense", "leaky", "images"])
def test_lava_and_the_simulator_learn_the_same_weights(network: str) -> None:
    """Ragged last batch, every mantissa and bias after every update that follows from the ones before."""
    model = {"digits-fc": "digits-fc", "dense": small(), "leaky": small(0.9), "images": small(images=True)}[network]
    found = learned("lava-sim", model, epochs=2)
    assert_same(found, learned("sim", model, epochs=2))
    if network != "digits-fc":
        assert_same(found, learned("reference", model, epochs=2))
    assert found.updates == 6
    assert all(np.abs(values).max() > 0 for values in found.tensors.values())


@lava
@pytest.mark.parametrize("part", ["hidden_only", "readout_only"])
def test_parts_learn_alone(part: str) -> None:
    found = learned("lava-sim", **{part: True})
    assert_same(found, learned("sim", **{part: True}))
    assert {name.startswith("readout") for name in found.tensors} == {part == "readout_only"}


@lava
@pytest.mark.parametrize("leak", [1.0, 0.9])
def test_floating_point_lava_learns_what_torch_learns(leak: float) -> None:
    found, torch_found = (learned(target, small(leak), weights="float", epochs=2) for target in ("lava-sim", "torch"))
    for name, values in found.tensors.items():
        np.testing.assert_allclose(values, torch_found.tensors[name], rtol=0, atol=1e-12, err_msg=name)


def test_the_rule_is_spides_training_by_gradient_descent() -> None:
    """The module trained by `toolchain.methods.spide`, samples in the same order, plain steps of -lr times the gradient."""
    module, batch, lr = small().double(), 16, 0.5
    train = data.load("digits", split="train", samples=40)
    found = learned("torch", small(), weights="float", settings=[f"learn.lr={lr}", "learn.schedule=constant"], epochs=2)
    for epoch in (1, 2):
        order = order_of(len(train), 0, epoch)
        for first in range(0, len(train), batch):
            rows = order[first : first + batch]
            images, labels = torch.from_numpy(train.images[rows]).double(), torch.from_numpy(train.labels[rows])
            gradients = spide.run(module, images, labels, scale_factor=float(len(rows))).gradients
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    if name in gradients:
                        parameter -= lr * len(rows) / batch * gradients[name] / len(rows)  # SPIDE leaves the scale factor in
    compared = 0
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(found.tensors[name], parameter.detach().numpy(), rtol=0, atol=1e-9, err_msg=name)
        compared += 1
    assert compared == len(found.tensors) == 8


def test_hidden_connections_learn_what_the_readout_alone_cannot() -> None:
    """The full experiment, three seeds and both number types on Lava, is `make bench-learning`."""
    options = {"samples": 1297, "epochs": 3, "test_samples": 500}
    both, readout = learned("sim", **options), learned("sim", readout_only=True, **options)
    assert both.test_accuracy > readout.test_accuracy + 0.05
    assert both.curve[0].test_accuracy < 0.3


def test_a_seed_repeats_a_run_and_another_does_not() -> None:
    first, again, other = learned("sim"), learned("sim"), learned("sim", seed=1)
    assert_same(first, again)
    assert moved(other, first) == set(first.tensors)


@pytest.mark.parametrize("weights", ["int8", "float"])
def test_what_was_learned_is_kept_and_runs(weights: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    found = learned("sim" if weights == "int8" else "torch", weights=weights, output=folder, test_samples=100)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines[-1]["test_accuracy"] == found.test_accuracy
    deployed = toolchain.deploy(folder, target="sim" if weights == "int8" else "torch", dataset="digits", samples=100)
    assert deployed.accuracy == found.test_accuracy
    kept = artifact.read(folder / "learned.fsnn")
    assert any(note.startswith("learned on") for note in kept.graph.provenance.notes)
    if weights == "int8":
        steps = {p.tensor: p for p in plasticity.plastics(kept.graph)}
        for name, values in found.tensors.items():
            np.testing.assert_array_equal(plasticity.in_floats(steps[name], kept.graph.tensors[name]), values)
    else:  # chips get the 8-bit graph that compiling the learned floats gives
        assert toolchain.deploy(folder, target="sim", dataset="digits", samples=100).accuracy >= found.test_accuracy - 0.05
    assert toolchain.verify(folder, replay=True, targets=("reference", "sim")).passed


def test_a_run_that_is_stopped_keeps_its_last_whole_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sys.modules["toolchain.lesson"]._accuracy
    called: list[float] = []

    def stopping(learner: object, test: object) -> float:
        if len(called) == 2:
            raise KeyboardInterrupt
        called.append(whole(learner, test))
        return called[-1]

    monkeypatch.setattr(sys.modules["toolchain.lesson"], "_accuracy", stopping)
    with pytest.raises(KeyboardInterrupt):
        learned("sim", output=tmp_path / "run", epochs=3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["test_accuracy"] for line in lines] == called
    assert toolchain.deploy(tmp_path / "run", target="sim", dataset="digits", samples=10).accuracy == called[-1]


def test_learning_goes_on_from_what_was_learned(tmp_path: Path) -> None:
    first = learned("sim", output=tmp_path / "a")
    second = learned("sim", tmp_path / "a", seed=3)
    assert second.start == "its own"
    assert moved(second, first) == set(first.tensors)
    largest = max(np.abs(second.tensors[name] - values).max() for name, values in first.tensors.items())
    assert largest < 0.6, "it started from other weights"


def test_a_name_of_the_catalogue_starts_anew_unless_asked_otherwise() -> None:
    anew, shipped = learned("sim"), learned("sim", settings=["learn.lr=0.001", "learn.start=model"])
    assert (anew.start, shipped.start) == ("random", "its own")
    weight = models.load("digits-fc").get_parameter("feedback.0.weight").detach().numpy()
    assert np.abs(shipped.tensors["feedback.0.weight"] - weight).max() < 0.2 < np.abs(anew.tensors["feedback.0.weight"] - weight).max()


def test_stock_synapses_do_not_learn() -> None:
    from toolchain.targets.lava_sim import LavaSim

    graph = toolchain.compile("digits-fc", target="sim", input="graded").graph
    with pytest.raises(UsageError, match="stock synapses do not learn by this rule: use synapses own"):
        LavaSim(synapses="stock").learner(graph, plasticity.plastics(graph), batch=1, seed=0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weights": "float"}, "target 'sim' runs integers only: give --weights int8, or target torch, reference or lava-sim"),
        ({"weights": "int4"}, "unknown weights 'int4': "),
        ({"epochs": 0}, "0 epochs cannot be learned: give 1 to 1,000,000"),
        ({"batch": 0}, "batch is 0: give a whole number from 1 to 65,536"),
        ({"seed": -1}, "seed is -1: "),
        ({"hidden_only": True, "readout_only": True}, "leave nothing to learn: give one of the two, or none"),
        ({"settings": ["learn.lr=-1"]}, "learn.lr is -1: it must be a positive number, 1e-06 to 1e+06"),
        ({"settings": ["learn.scale_factor=1e-310"]}, "learn.scale_factor is 1e-310: it must be a positive number"),
        ({"settings": ["learn.lr="]}, "learn.lr is nothing: it must be a positive number"),
        ({"settings": ["learn.rate=1"]}, "unknown setting 'learn.rate'"),
        ({"settings": ["learn.start=here"]}, "unknown learn.start 'here'"),
        (
            {"model": "mnist-fc"},
            "samples of 'digits' have shape (1, 8, 8) but 'mnist-fc' takes (1, 28, 28): choose another data set or network",
        ),
        ({"dataset": "mnist-1k"}, "mnist-1k"),
    ],
)
def test_what_cannot_be_learned_is_said(options: dict, sentence: str) -> None:
    with pytest.raises((UsageError, GraphError)) as error:
        learned("sim", **{"model": "digits-fc", **options})
    assert sentence in str(error.value)


def test_a_silent_feedback_phase_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = learned("sim", settings=["learn.scale_factor=0.001"])
    assert found.curve[1].silent == 1
    assert found.device == "cpu"
    assert "no couple fired in a feedback phase, so hidden connections learned nothing: raise learn.scale_factor" in capsys.readouterr().err


def test_a_connection_that_rests_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    learned("sim", settings=["learn.lr=0.00001", "learn.readout_lr=1.0"])
    said = capsys.readouterr().err
    assert "feedback.0.weight" in said
    assert "did not change in the first epoch: raise learn.scale_factor or learn.lr, or give more samples" in said


def test_a_usage_error_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        learned("sim", dataset="mnist-1k", output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    learned("sim", output=tmp_path)
    with pytest.raises(UsageError, match="already holds a run"):
        learned("sim", output=tmp_path)
