"""Settings that no run can use are one sentence and leave nothing behind; a run folder belongs to one run at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from toolchain import checkpoint, models
from toolchain.checkpoint import load
from toolchain.config import Config
from toolchain.errors import ArtifactError, UsageError
from toolchain.layers import build, describe
from toolchain.train import train

SHORT = {"train.epochs": 1, "train.held_out": 200, "network.time_steps": 3, "network.feedback_steps": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("network: 5", "in 'network'"),
        ("network: null", "in 'network'"),
        ("network: {input_shape: []}", "0 axes"),
        ("network: {input_shape: [1, 1, 1, 1, 1, 1, 1, 1, 1, 64]}", "10 axes"),
        ("network: {readout: {outputs: 300000000000}}", "more than 2147483648"),
        ("network: {time_steps: 100001}", "time_steps 100001"),
        ("network: {feedback_steps: 100001}", "feedback_steps 100001"),
        ("network: {scale_factor: .inf}", "'network.scale_factor' is inf"),
        ("network: {neuron: {threshold: .inf}}", "'network.neuron.threshold' is inf"),
        ("network: {neuron: {threshold: 1.0e+300}}", "float32"),
        ("network: {normalize: {mean: [0], std: [1.0e-308]}}", "standard deviations from"),
        ("network: {normalize: {mean: [1.0e+308], std: [1]}}", "means up to"),
        ("seed: 99999999999999999999999", "in 'seed'"),
        (f"train: {{lr: {'1' * 5000}}}", "not plain YAML"),
        (f"train: {{lr: {'1' * 500}}}", "in 'train.lr'"),
        ("train: {lr: .inf}", "'train.lr' is inf"),
        ("train: {weight_decay: .inf}", "'train.weight_decay' is inf"),
        ("train: {scale_factor: .nan}", "'train.scale_factor' is nan"),
        ("train: {schedule: steps, milestones: [-1]}", r"in 'train.milestones"),
        ("train: {schedule: steps, decay: 1.0e+300}", "in 'train.decay'"),
        ("train: 2001-99-99", "not plain YAML"),
        ("train: {lr: 0.1, lr: 0.2}", "'lr' is given twice"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
    ],
)
def test_settings_no_run_can_use_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"model: digits-fc\n{text}")
    with pytest.raises(UsageError, match=message):
        train(path, output=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [(["model=mnist-fc"], "'model' is no setting"), (["train.lr=1e400"], "is inf"), (["train.held_out=1297"], "held out")],
)
def test_refused_settings_leave_no_folder(tmp_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train("digits-fc", settings=settings, output=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_an_empty_output_is_refused() -> None:
    with pytest.raises(UsageError, match="empty name"):
        train("digits-fc", settings=SHORT, output="")


def test_a_run_without_its_best_weights_does_not_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train("digits-fc", settings=SHORT, output=run, device="cpu")
    (run / checkpoint.NAME).unlink()
    with pytest.raises(UsageError, match=r"lacks checkpoint.safetensors"):
        train("digits-fc", settings=SHORT, output=run, device="cpu", resume=True)


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with (run / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match=f"another run is writing '{run}'"):
            train("digits-fc", settings=SHORT, output=run, device="cpu")
        assert os.listdir(run) == [".lock"]
    # what a killed run leaves does not stand in the way
    train("digits-fc", settings=SHORT, output=run, device="cpu")
    assert ".lock" not in os.listdir(run)


def _written(path: Path, tensors: dict[str, torch.Tensor], network: dict[str, object]) -> Path:
    about = checkpoint.About(checkpoint.FORMAT, Config(network=describe(models.get("digits-fc").build())), 1, 0.5)
    plain = msgspec.to_builtins(about)
    plain["config"]["network"] |= network
    save_file(tensors, path, {"toolchain": msgspec.json.encode(plain).decode()})
    return path


@pytest.mark.parametrize(
    "network",
    [
        {"input_shape": []},
        {"input_shape": [1] * 61 + [64]},
        {"time_steps": 100001},
        {"normalize": {"mean": [0.0], "std": [1e-308]}},
        {"normalize": {"mean": [1e308], "std": [1.0]}},
    ],
)
def test_checkpoints_of_impossible_networks_are_refused(tmp_path: Path, network: dict[str, object]) -> None:
    tensors = dict(models.get("digits-fc").build().state_dict())
    with pytest.raises(UsageError, match="give"):
        load(_written(tmp_path / "made.safetensors", tensors, network))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int32])
def test_checkpoints_of_other_numbers_are_refused(tmp_path: Path, kind: torch.dtype) -> None:
    tensors = dict(models.get("digits-fc").build().state_dict())
    tensors["readout.bias"] = torch.zeros(10).to(kind)
    with pytest.raises(ArtifactError, match=r"'readout.bias' has type"):
        load(_written(tmp_path / "made.safetensors", tensors, {}))


def test_weights_beyond_float32_are_not_finite(tmp_path: Path) -> None:
    tensors = dict(build(describe(models.get("digits-fc").build())).state_dict())
    tensors["readout.bias"] = torch.full((10,), 1e300, dtype=torch.float64)
    with pytest.raises(ArtifactError, match="NaN or infinite"):
        load(_written(tmp_path / "made.safetensors", tensors, {}))
