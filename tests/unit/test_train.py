"""Training on the small digits: it learns, resumes bit for bit, keeps nothing half-written, and says what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from toolchain import checkpoint, config, data, methods, models
from toolchain.checkpoint import load
from toolchain.config import Training
from toolchain.errors import ArtifactError, ToolchainError, UsageError
from toolchain.layers import Spectral, describe
from toolchain.train import learning_rate, train

training = sys.modules["toolchain.train"]  # `toolchain.train` is the function

SHORT = {"train.epochs": 3, "train.held_out": 200, "network.time_steps": 10, "network.feedback_steps": 30, "network.dropout": 0.1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "short"
    train("digits-fc", settings=SHORT, output=folder, device="cpu")
    return folder


def test_a_short_run_learns_and_keeps_its_folder(run: Path) -> None:
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint.safetensors", "config.yaml", "last.safetensors", "metrics.jsonl"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert 0 < lines[-1]["feedback_rate"] < 1
    assert {"clipped", "silent", "forward_rate", "seconds", "held_out_accuracy"} <= lines[0].keys()
    test = data.load("digits")
    with torch.no_grad():
        accuracy = float((load(run)(torch.from_numpy(test.images)).argmax(1).numpy() == test.labels).mean())
    assert accuracy > 0.6, "chance is 0.1"


def test_the_run_says_what_it_came_to(tmp_path: Path) -> None:
    outcome = train("digits-fc", settings={**SHORT, "train.epochs": 1}, output=tmp_path / "run", device="cpu")
    assert outcome.to_json()["held_out"] == 200
    assert outcome.to_json()["device"] == "cpu"
    assert "of 200 held-out training images" in outcome.to_text()


def test_an_interrupted_run_resumes_bit_for_bit(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "broken"
    original = training.progress.track

    def breaks(items: Any, label: str, total: int | None = None) -> Any:
        for index, item in enumerate(original(items, label, total)):
            if label.startswith("epoch 3") and index == 5:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(training.progress, "track", breaks)
    with pytest.raises(KeyboardInterrupt):
        train("digits-fc", settings=SHORT, output=folder, device="cpu")
    monkeypatch.setattr(training.progress, "track", original)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    outcome = train("digits-fc", settings=SHORT, output=folder, device="cpu", resume=True)
    assert outcome.epochs == 3
    for name in ("last.safetensors", "checkpoint.safetensors"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()
    for ours, theirs in zip(*((place / "metrics.jsonl").read_text().splitlines() for place in (folder, run)), strict=True):
        assert {**json.loads(ours), "seconds": 0} == {**json.loads(theirs), "seconds": 0}


def test_a_config_repeats_its_run(run: Path, tmp_path: Path) -> None:
    train(run / "config.yaml", output=tmp_path / "again", device="cpu")
    assert (tmp_path / "again" / "last.safetensors").read_bytes() == (run / "last.safetensors").read_bytes()


def test_a_flag_wins_over_the_config_and_its_absence_does_not(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: digits-fc\nseed: 7\ntrain: {epochs: 1, batch: 100}\nnetwork: {time_steps: 5, feedback_steps: 5}")
    assert train(path, output=tmp_path / "file", device="cpu").seed == 7
    assert train(path, seed=0, output=tmp_path / "flag", device="cpu").seed == 0


def test_a_resumed_run_keeps_its_settings(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train.lr = 0.1, not 0.2"):
        train("digits-fc", settings={**SHORT, "train.lr": 0.2}, output=run, resume=True)
    with pytest.raises(UsageError, match="already holds a run"):
        train("digits-fc", settings=SHORT, output=run)
    with pytest.raises(UsageError, match=r"holds no last.safetensors"):
        train("digits-fc", settings=SHORT, output=tmp_path / "new", resume=True)


def test_a_module_trains_from_its_own_weights(tmp_path: Path) -> None:
    module = models.get("digits-fc").build()
    outcome = train(
        module,
        dataset="digits",
        settings={"train.epochs": 1, "train.held_out": 200, "train.lr": 1e-9},
        output=tmp_path / "run",
        device="cpu",
    )
    assert outcome.model == "digits-fc"
    fresh = models.get("digits-fc").build()
    assert torch.allclose(load(tmp_path / "run").input.weight, fresh.input.weight, atol=1e-6)
    with pytest.raises(UsageError, match="change the module"):
        train(module, settings=["network.time_steps=5"], output=tmp_path / "other")


def test_a_run_begins_with_the_weights_of_another(run: Path, tmp_path: Path) -> None:
    """Of a run folder or a checkpoint; the config says so, so that it repeats the run."""
    still = {"train.epochs": 1, "train.lr": 1e-9}
    for number, start in enumerate((run, run / "checkpoint.safetensors")):
        outcome = train(start, settings=still, output=tmp_path / str(number), device="cpu")
        assert (outcome.model, outcome.dataset) == ("digits-fc", "digits")
        assert torch.allclose(load(tmp_path / str(number)).input.weight, load(run).input.weight, atol=1e-6)
    train(tmp_path / "0" / "config.yaml", output=tmp_path / "again", device="cpu")
    assert (tmp_path / "again" / "checkpoint.safetensors").read_bytes() == (tmp_path / "0" / "checkpoint.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"unknown readout\.bias"):
        train(run, settings={"network.readout.bias": False}, output=tmp_path / "other", device="cpu")
    with pytest.raises(UsageError, match="there is no checkpoint"):
        train("digits-fc", settings={"start": str(tmp_path / "nowhere")}, output=tmp_path / "lost", device="cpu")


def test_the_automatic_scale_factor_survives_a_resume(tmp_path: Path) -> None:
    settings = {**SHORT, "train.epochs": 1, "train.scale_factor": "auto"}
    train("digits-fc", settings=settings, output=tmp_path / "run", device="cpu")
    assert checkpoint.read(tmp_path / "run" / "last.safetensors").about.progress["scale_factor"] > 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: digits-fc\ntrain: {learning: 1}", "unknown setting 'train.learning'.*train.lr"),
        ("model: digits-fc\noptimiser: adam", "unknown setting 'optimiser'.*choose one of method, model, network, seed, start, train"),
        ("model: digits-fc\ntrain: {lr: fast}", "in 'train.lr'"),
        ("model: digits-fc\ntrain: {epochs: 0}", "in 'train.epochs'"),
        ("model: digits-fc\nnetwork: {neuron: {leak: 1.5}}", "leak 1.5"),
        ("model: resnet", "unknown model 'resnet'"),
        ("train: {lr: 0.1}", "names no model"),
        ("network: {name: mine}", "missing setting `input_shape`"),
        ("- a\n- b", "no mapping"),
        ("model: !!python/object/apply:os.system [ls]", "not plain YAML"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("model: [", "not plain YAML"),
    ],
)
def test_bad_configs_are_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        train(path, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "resnet"}, "neither a network"),
        ({"model": "absent.yaml"}, "cannot be read"),
        ({"model": "digits-fc", "method": "dsr"}, "method 'dsr' does not fit 'digits-fc': every layer fires at a fixed threshold"),
        ({"model": "digits-fc", "method": "saf-f"}, "'saf-f' does not fit 'digits-fc': feedback 0 leads from layer 0 to layer 0"),
        ({"model": "digits-fc", "dataset": "mnist-1k"}, "give 'mnist', which has their training images"),
        ({"model": "mnist-fc", "dataset": "digits", "settings": ["train.held_out=200"]}, r"takes \(1, 28, 28\)"),
        ({"model": "digits-fc", "settings": ["train.lr"]}, "name=value"),
        ({"model": "digits-fc", "settings": ["train.lr=[1"]}, "not plain YAML"),
        ({"model": "digits-fc", "settings": ["train.held_out=1297"]}, "cannot be held out"),
        ({"model": "digits-fc", "settings": ["lr=1"]}, "unknown setting 'lr'"),
    ],
)
def test_requests_that_cannot_be_met_are_explained(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(**arguments, output=tmp_path / "run")


def test_a_loss_that_stops_being_a_number_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Diverging:
        def fits(self, _: object) -> None:
            return

        def gradients(self, *_: object) -> methods.Batch:
            return methods.Batch(float("nan"), 0, 0, 0, 0, 0)

    monkeypatch.setattr(methods, "get", lambda *_: Diverging())
    with pytest.raises(ToolchainError, match=r"lower train.lr"):
        train("digits-fc", settings=SHORT, output=tmp_path / "run")


def test_checkpoints_are_refused_unless_whole(run: Path, tmp_path: Path) -> None:
    whole = run / "checkpoint.safetensors"
    broken = tmp_path / "broken.safetensors"
    with pytest.raises(UsageError, match="no checkpoint"):
        load(tmp_path)
    for content in (b"", b"\x93NUMPY", whole.read_bytes()[:-100], whole.read_bytes()[:50]):
        broken.write_bytes(content)
        with pytest.raises(ArtifactError, match="damaged"):
            load(broken)
    tensors, about = load_file(whole), {"toolchain": _about(whole)}
    save_file(tensors, broken)
    with pytest.raises(ArtifactError, match="does not say what network"):
        load(broken)
    save_file({k: v for k, v in tensors.items() if k != "readout.bias"}, broken, about)
    with pytest.raises(ArtifactError, match=r"lacks readout.bias"):
        load(broken)
    save_file({**tensors, "extra": torch.zeros(1)}, broken, about)
    with pytest.raises(ArtifactError, match="unknown extra"):
        load(broken)
    save_file({**tensors, "readout.bias": torch.zeros(3)}, broken, about)
    with pytest.raises(ArtifactError, match=r"\(3,\) but 'digits-fc' needs \(10,\)"):
        load(broken)
    save_file({**tensors, "input.bias": torch.full((32,), float("nan"))}, broken, about)
    with pytest.raises(ArtifactError, match=r"'input.bias' holds NaN"):
        load(broken)
    save_file(tensors, broken, {"toolchain": '{"format": 99}'})
    with pytest.raises(ArtifactError, match="format 99"):
        load(broken)
    save_file(tensors, broken, {"toolchain": "[]"})
    with pytest.raises(ArtifactError, match="does not read"):
        load(broken)


def _about(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as stored:
        found: str = stored.metadata()["toolchain"]
    return found


def test_a_run_folder_and_its_checkpoint_load_the_same(run: Path) -> None:
    one, other = load(run), load(str(run / "checkpoint.safetensors"))
    assert describe(one) == describe(other)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert describe(one).time_steps == 10
    assert not one.training


def test_a_convolutional_network_is_described_in_yaml(tmp_path: Path) -> None:
    described = tmp_path / "convolutions.yaml"
    described.write_text(
        """
model: digits-fc
method: ide
network:
  input: {type: chain, parts: [{type: conv2d, inputs: 1, outputs: 4, kernel: 3, stride: 2, padding: 1}, {type: batch-norm, features: 4, images: true}]}
  hidden: [{type: avg-pool2d, kernel: 2}]
  feedback: [{source: 0, target: 0, connection: {type: conv2d, inputs: 4, outputs: 4, kernel: 3, padding: 1, bias: false, limit: {type: spectral}}}]
  readout: {type: linear, inputs: 16, outputs: 10}
  neuron: {threshold: 0.5, u_rest: 0}
  time_steps: 5
train: {epochs: 3, options: {solver: iter, threshold: 3}}
"""
    )
    outcome = train(described, output=tmp_path / "run")
    assert outcome.held_out_accuracy > 0.2
    assert describe(load(tmp_path / "run")).feedback[0].connection.limit == Spectral()


def test_settings_are_read_as_yaml() -> None:
    assert config.assignments(["a.b=1e-3", "c=[1, 2]", "d=auto", "e=null", "f=a=b"]) == {
        "a.b": 1e-3,
        "c": [1, 2],
        "d": "auto",
        "e": None,
        "f": "a=b",
    }


def test_learning_rates_follow_their_schedule() -> None:
    cosine = Training(epochs=10, lr=1.0, warmup=4)
    assert learning_rate(cosine, 0, 10) == 0.25
    assert learning_rate(cosine, 50, 10) == pytest.approx(0.5)
    steps = Training(epochs=10, lr=1.0, schedule="steps", milestones=(2, 5), decay=0.1)
    assert [learning_rate(steps, batch, 10) for batch in (19, 20, 50)] == pytest.approx([1.0, 0.1, 0.01])
    assert learning_rate(Training(schedule="constant", lr=0.3), 999, 10) == 0.3


def test_off_is_a_word_in_settings() -> None:
    assert config.assignments(["train.amp=off", "train.augment={flip: yes}"]) == {"train.amp": "off", "train.augment": {"flip": True}}
