"""What a run carries from epoch to epoch, optimiser, augmentation, early stop and reports, is whole after a resume; images may stay in their files."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from toolchain import data, methods, metrics, models
from toolchain.checkpoint import read
from toolchain.config import Training
from toolchain.data.dataset import LazyImages
from toolchain.errors import ArtifactError, UsageError
from toolchain.layers import FeedbackSNN, Limited, Neuron, Spectral, Standardized, describe
from toolchain.train import train

training = sys.modules["toolchain.train"]  # `toolchain.train` is the function

SHORT = {"train.epochs": 3, "train.held_out": 200, "network.time_steps": 5, "network.feedback_steps": 10, "network.dropout": 0.1}


class Stopped(BaseException):
    pass


def stop_in(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends in the fifth batch of `epoch`, as if it were killed."""
    original = training.progress.track

    def breaks(items: Any, label: str, total: int | None = None) -> Any:
        for index, item in enumerate(original(items, label, total)):
            if label.startswith(f"epoch {epoch}/") and index == 4:
                raise Stopped
            yield item

    monkeypatch.setattr(training.progress, "track", breaks)


def lines(run: Path) -> list[dict[str, Any]]:
    return [{**json.loads(line), "seconds": 0} for line in (run / "metrics.jsonl").read_text().splitlines()]


EVERYTHING = {
    "train.optimizer": "adam",
    "train.lr": 0.01,
    "train.weight_decay": 1e-4,
    "train.augment": {"crop": 1, "flip": True, "cutout": 0.5},
    "train.early_stop": 2,
    "train.scale_factor": "auto",
    "train.metrics": ["jsonl", "csv"],
}


@pytest.mark.parametrize(
    "changes", [{}, {"train.optimizer": "sgd", "train.lr": 0.05}, {"train.schedule": "steps", "train.milestones": [1]}]
)
def test_every_state_is_whole_after_a_resume(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SHORT, **EVERYTHING, **changes}
    train("digits-fc", settings=settings, output=tmp_path / "whole", device="cpu")
    stop_in(3, monkeypatch)
    with pytest.raises(Stopped):
        train("digits-fc", settings=settings, output=tmp_path / "parts", device="cpu")
    monkeypatch.undo()
    train("digits-fc", settings=settings, output=tmp_path / "parts", device="cpu", resume=True)
    for name in ("last.safetensors", "checkpoint.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_the_optimisers_state_is_kept_by_name_and_checked(tmp_path: Path) -> None:
    settings = {**SHORT, "train.epochs": 2, "train.optimizer": "adam", "train.lr": 0.01}
    run = tmp_path / "run"
    train("digits-fc", settings=settings, output=run, device="cpu")
    stored = read(run / "last.safetensors").tensors
    for name, parameter in models.get("digits-fc").build().named_parameters():
        assert stored[f"mean.{name}"].shape == stored[f"square.{name}"].shape == parameter.shape
        assert float(stored[f"steps.{name}"]) == 2 * (1097 // 32)
    broken = load_file(run / "last.safetensors")
    broken["mean.readout.bias"] = torch.zeros(3)
    from safetensors import safe_open

    with safe_open(str(run / "last.safetensors"), framework="pt") as whole:
        about = whole.metadata()
    save_file(broken, run / "last.safetensors", about)
    with pytest.raises(ArtifactError, match=r"tensor 'mean.readout.bias' does not fit its weight"):
        train("digits-fc", settings=settings, output=run, device="cpu", resume=True)


def test_a_run_that_no_longer_improves_stops_and_stays_stopped(tmp_path: Path) -> None:
    settings = {**SHORT, "train.epochs": 9, "train.lr": 1e-12, "train.early_stop": 2, "train.schedule": "constant"}
    run = tmp_path / "run"
    outcome = train("digits-fc", settings=settings, output=run, device="cpu")
    assert (outcome.epochs, outcome.best_epoch, outcome.stopped_early) == (3, 1, True)
    assert "(epoch 1 of 3, then stopped early)" in outcome.to_text()
    assert [line["stopped"] for line in lines(run)] == [False, False, True]
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    again = train("digits-fc", settings=settings, output=run, device="cpu", resume=True)
    assert again == outcome
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_run_that_reaches_its_last_epoch_has_not_stopped_early(tmp_path: Path) -> None:
    settings = {**SHORT, "train.lr": 1e-12, "train.early_stop": 2, "train.schedule": "constant"}
    assert not train("digits-fc", settings=settings, output=tmp_path / "run", device="cpu").stopped_early


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.early_stop": 1, "train.held_out": 0}, "train.held_out is 0"),
        ({"train.optimizer": "lamb"}, "in 'train.optimizer'"),
        ({"train.metrics": ["xml"]}, r"in 'train.metrics"),
        ({"train.augment.crop": -1}, "in 'train.augment.crop'"),
        ({"train.augment.rotate": 1}, "unknown setting 'train.augment.rotate'"),
    ],
)
def test_settings_no_epoch_could_use_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        train("digits-fc", settings={**SHORT, **settings}, output=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_reports_have_a_rate_for_each_layer(tmp_path: Path) -> None:
    model = models.get("mnist-fc2").build()
    deep = {"hidden": [torch.nn.Linear(12, 6)], "feedback": [(1, 0, Limited(torch.nn.Linear(6, 12, bias=False), Spectral()))]}
    small = type(model)(
        name="small", input_shape=(1, 8, 8), input=torch.nn.Linear(64, 12), readout=torch.nn.Linear(6, 10), time_steps=5, **deep
    )
    settings = {"train.epochs": 2, "train.held_out": 200, "train.dataset": "digits", "train.metrics": ["csv"]}
    train(small, settings=settings, output=tmp_path / "run", device="cpu")
    found = lines(tmp_path / "run")
    for line in found:
        first, second = line["forward_rates"]
        assert (12 * first + 6 * second) / 18 == pytest.approx(line["forward_rate"], abs=1e-6)
        first, second = line["feedback_rates"]
        assert (12 * first + 6 * second) / 18 == pytest.approx(line["feedback_rate"], abs=1e-6)
    with (tmp_path / "run" / "metrics.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [int(row["epoch"]) for row in rows] == [1, 2]
    assert [float(row["loss"]) for row in rows] == [line["loss"] for line in found]
    assert [float(row["forward_rate/1"]) for row in rows] == [line["forward_rates"][1] for line in found]


def test_tensorboard_is_written_or_its_absence_said_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SHORT, "train.metrics": ["tensorboard"]}
    monkeypatch.setattr(metrics, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        train("digits-fc", settings=settings, output=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            Path(folder).mkdir(exist_ok=True)

        def add_scalar(self, name: str, value: float, epoch: int) -> None:
            written.append((name, value, epoch))

        def flush(self) -> None:
            return

        def close(self) -> None:
            return

    monkeypatch.setattr(metrics, "find_spec", lambda _: True)
    monkeypatch.setattr(metrics, "import_module", lambda _: sys.modules[__name__])
    monkeypatch.setitem(globals(), "SummaryWriter", SummaryWriter)
    train("digits-fc", settings=settings, output=tmp_path / "run", device="cpu")
    assert [(epoch, value) for name, value, epoch in written if name == "loss"] == [
        (line["epoch"], line["loss"]) for line in lines(tmp_path / "run")
    ]
    assert {"forward_rate/0", "feedback_rate/0", "held_out_accuracy", "lr"} <= {name for name, _, _ in written}


def test_images_that_stay_in_their_files_train_the_same_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data.load("digits", split="train")
    pixels = np.rint(whole.images * 16).astype(np.uint8)
    largest: list[int] = []

    def decode(number: int, _: Any) -> npt.NDArray[np.uint8]:
        return pixels[number]

    class Counted(LazyImages):
        def __getitem__(self, index: Any) -> npt.NDArray[np.float32]:
            largest.append(len(index))
            return super().__getitem__(index)

    lazy = replace(whole, images=Counted(decode, (1, 8, 8), 16, np.arange(len(whole))))
    train("digits-fc", settings=SHORT, output=tmp_path / "arrays", device="cpu")
    monkeypatch.setattr(data, "load", lambda *_, **__: lazy)
    train("digits-fc", settings=SHORT, output=tmp_path / "files", device="cpu")
    assert (tmp_path / "files" / "last.safetensors").read_bytes() == (tmp_path / "arrays" / "last.safetensors").read_bytes()
    assert max(largest) == 200, "the held-out images, fewer than a chunk of the evaluation"
    assert largest.count(32) == 3 * (1097 // 32)


def test_a_data_set_may_have_defaults_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolchain.models import digits_fc

    other = Training(dataset="digits", epochs=1, lr=0.025, held_out=100)
    monkeypatch.setattr(digits_fc, "TRAINING_ON", {"digits": other}, raising=False)
    spec = models.get("digits-fc")
    assert spec.training_on("digits") == other
    assert spec.training_on("mnist") == spec.training_on(None) == spec.training
    small = {"network.time_steps": 3, "network.feedback_steps": 3}
    outcome = train("digits-fc", dataset="digits", settings=small, output=tmp_path / "run", device="cpu")
    assert (outcome.epochs, outcome.held_out) == (1, 100)
    path = tmp_path / "config.yaml"
    path.write_text("model: digits-fc\ntrain: {dataset: digits, lr: 0.5}\nnetwork: {time_steps: 3, feedback_steps: 3}")
    train(path, output=tmp_path / "file", device="cpu")
    assert read(tmp_path / "file" / "last.safetensors").about.config.train == Training(dataset="digits", epochs=1, lr=0.5, held_out=100)


def online() -> FeedbackSNN:
    """64-20-20-10 for OTTT, whose layers all fire."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 20), Standardized(torch.nn.Linear(20, 20)), torch.nn.Linear(20, 10)]
    with torch.no_grad():
        layers[0].weight.mul_(3)
        layers[1].gain.mul_(2)
    shape = {"input": layers[0], "hidden": [layers[1]], "readout": layers[2]}
    neuron = Neuron(1.0, 0.0, leak=0.5)
    return FeedbackSNN(name="small", input_shape=(1, 8, 8), neuron=neuron, time_steps=6, weighted_readout=False, **shape)


@pytest.mark.parametrize("method", ["ottt-a", "ottt-o"])
def test_bfloat16_rounds_gradients_and_never_a_spike(method: str) -> None:
    digits = data.load("digits")
    x, y = torch.from_numpy(digits.images[:64]), torch.from_numpy(digits.labels[:64])
    found = []
    for reduced in (False, True):
        model, made = online(), methods.get(method)
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced, cache_enabled=False):
            # the optimiser that is never stepped lets every time step see the same weights
            batch = made.gradients(model, x, y, torch.Generator(), lambda: None)
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
        found.append((batch, {name: p.grad for name, p in model.named_parameters()}))
    (exact, true), (rounded, rough) = found
    assert rounded.forward_rates == exact.forward_rates
    assert (rounded.loss, rounded.correct) == (exact.loss, exact.correct)
    for name, grad in true.items():
        cosine = torch.nn.functional.cosine_similarity(grad.flatten(), rough[name].flatten(), dim=0)
        assert cosine > 0.999, name
    assert any(not torch.equal(grad, rough[name]) for name, grad in true.items())


def test_bfloat16_is_refused_by_name_where_it_is_unsound(tmp_path: Path) -> None:
    settings = {"train.amp": "bf16", "train.dataset": "digits", "train.held_out": 200, "train.epochs": 1}
    with pytest.raises(UsageError, match="method 'spide' needs float32, since its feedback stage counts"):
        train("digits-fc", settings=settings, output=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    assert set(methods.FLOAT32) | {"ottt-a", "ottt-o"} == set(methods.NAMES)
    outcome = train(online(), method="ottt-o", settings=settings, output=tmp_path / "run", device="cpu")
    assert outcome.held_out_accuracy is not None
    assert outcome.held_out_accuracy > 0.2


@pytest.mark.cuda
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_gpu_trains_and_resumes(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SHORT, **EVERYTHING, "train.optimizer": optimizer}
    stop_in(3, monkeypatch)
    with pytest.raises(Stopped):
        train("digits-fc", settings=settings, output=tmp_path / "run", device="cuda")
    monkeypatch.undo()
    outcome = train("digits-fc", settings=settings, output=tmp_path / "run", device="cuda", resume=True)
    assert outcome.epochs == 3
    assert outcome.held_out_accuracy is not None
    assert outcome.held_out_accuracy > 0.3
    assert describe(training.load(tmp_path / "run")).time_steps == 5
