"""Every method behind the one interface: it trains a network that fits it, and refuses one that does not by naming the layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from toolchain import methods
from toolchain.checkpoint import load
from toolchain.errors import UsageError
from toolchain.layers import FeedbackSNN, Limited, Neuron, Spectral, Standardized, TrainedThreshold
from toolchain.methods import dsr
from toolchain.train import train

SHORT = {"train.batch": 50, "train.held_out": 200, "train.dataset": "digits", "train.epochs": 4, "train.schedule": "constant"}


def network(**changes: Any) -> FeedbackSNN:
    """64-40-40-10 for the digits."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "name": "small",
        "input_shape": (1, 8, 8),
        "input": nn.Linear(64, 40),
        "hidden": [nn.Linear(40, 40)],
        "readout": nn.Linear(40, 10),
        "time_steps": 6,
        "feedback_steps": 30,
    }
    model = FeedbackSNN(**{**settings, **changes})
    with torch.no_grad():
        for module in (model.input, *model.hidden):
            for part in module.modules():
                if isinstance(part, nn.Linear):
                    part.weight.mul_(2)
    return model


def normed(a: int, b: int) -> nn.Module:
    return nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b))


def fitting(method: str) -> FeedbackSNN:
    """A network that `method` trains."""
    torch.manual_seed(0)
    back = (1, 0, Limited(nn.Linear(40, 40, bias=False), Spectral()))
    online = {"neuron": Neuron(1.0, 0.0, leak=0.5), "weighted_readout": False, "input": Standardized(nn.Linear(64, 40))}
    changes: dict[str, dict[str, Any]] = {
        "ide": {"input": normed(64, 40), "hidden": [normed(40, 40)], "feedback": [back], "neuron": Neuron(1.0, 0.0), "dropout": 0.1},
        "spide": {"feedback": [back], "time_steps": 20},
        "dsr": {
            "input": normed(64, 40),
            "hidden": [normed(40, 10)],
            "readout": None,
            "trained_threshold": TrainedThreshold(2.0),
            "dropout": 0.1,
        },
        "ottt-a": {**online, "feedback": [back], "dropout": 0.1},
        "ottt-o": {**online, "feedback": [back]},
        "saf-e": {**online, "feedback": [back], "dropout": 0.1},
        "saf-f": {"neuron": Neuron(1.0, 0.0, leak=0.9), "dropout": 0.1},
    }
    return network(**changes[method])


RATES = {"ide": 0.1, "spide": 0.1, "dsr": 0.1, "ottt-a": 0.1, "ottt-o": 0.05, "saf-e": 0.05, "saf-f": 0.1}


@pytest.mark.parametrize("method", methods.NAMES)
def test_a_method_trains_and_resumes_bit_for_bit(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SHORT, "train.lr": RATES[method]}
    whole = train(fitting(method), method=method, settings=settings, output=tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert whole.held_out_accuracy > 0.6
    assert 0 < lines[-1]["forward_rate"] < 1
    assert load(tmp_path / "whole").layers == 2

    class Stopped(BaseException):
        pass

    class StopsLate:
        """The method, stopped in the first batch of the third epoch."""

        def __init__(self) -> None:
            self.inner, self.batches = get(method, 100.0), 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def gradients(self, *arguments: Any) -> methods.Batch:
            self.batches += 1
            if self.batches == 2 * 21 + 1:
                raise Stopped
            return self.inner.gradients(*arguments)

    get = methods.get
    monkeypatch.setattr(methods, "get", lambda *_: StopsLate())
    with pytest.raises(Stopped):
        train(fitting(method), method=method, settings=settings, output=tmp_path / "parts")
    monkeypatch.undo()
    train(fitting(method), method=method, settings=settings, output=tmp_path / "parts", resume=True)
    for name in ("checkpoint.safetensors", "last.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.parametrize("method", ["ottt-o", "saf-e"])
def test_online_methods_step_at_every_time_step(method: str) -> None:
    model, steps = fitting(method), []
    x, y = torch.rand(8, 64), torch.arange(8)
    made = methods.get(method)
    made.gradients(model, x, y, torch.Generator(), lambda: steps.append(model.readout.weight.grad.clone()))
    last = model.readout.weight.grad
    assert len(steps) == 5
    made.gradients(model, x, y, torch.Generator())
    assert torch.allclose(sum(steps) + last, model.readout.weight.grad, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("ide", {"trained_threshold": TrainedThreshold()}, "every layer has a trained threshold"),
        ("ide", {"neuron": Neuron(leak=0.9), "weighted_readout": False}, "the readout sees plain rates"),
        ("spide", {"hidden": [normed(40, 40)]}, "connection 'hidden.0' has batch normalisation"),
        ("dsr", {}, "every layer fires at a fixed threshold"),
        ("dsr", {"trained_threshold": TrainedThreshold(), "feedback": [(0, 0, nn.Linear(40, 40, bias=False))]}, "feedback 0 leads from"),
        ("dsr", {"trained_threshold": TrainedThreshold(tau=1.0), "weighted_readout": False}, "representations are leak-weighted"),
        ("ottt-a", {"neuron": Neuron(leak=0.5)}, "the readout sees leak-weighted rates"),
        ("ottt-o", {"input": normed(64, 40)}, "connection 'input' has batch normalisation.*standardise the weights"),
        ("saf-e", {"hidden": [nn.Linear(40, 10)], "readout": None}, "the readout is missing"),
        ("saf-e", {"readout": nn.Sequential(nn.Linear(40, 10), nn.BatchNorm1d(10))}, "connection 'readout' has batch normalisation"),
        ("saf-f", {"feedback": [(0, 0, nn.Linear(40, 40, bias=False))]}, "knows no feedback"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_before_the_run(method: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"'{method}' does not fit 'small': .*{message}|{message}"):
        train(network(**changes), method=method, settings=SHORT, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_options_reach_the_method_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown solver 'newton'"):
        train(fitting("ide"), method="ide", settings={**SHORT, "train.options": {"solver": "newton"}}, output=tmp_path / "run")
    with pytest.raises(UsageError, match="method 'saf-f' has no option 'loss_lambda': it has none"):
        train(fitting("saf-f"), method="saf-f", settings={**SHORT, "train.options.loss_lambda": 0.1}, output=tmp_path / "run")


@pytest.mark.parametrize("method", methods.NAMES)
def test_gradients_do_not_depend_on_how_the_module_got_its_batch(method: str) -> None:
    """float64, no dropout: the same batch twice gives the same gradients, and every parameter has its own."""
    model = fitting(method).double()
    model.dropout = 0.0
    x, y = torch.rand(12, 64, dtype=torch.float64), torch.arange(12) % 10
    model.eval()
    found = []
    for _ in range(2):
        methods.get(method, 20.0).gradients(model, x, y, torch.Generator())
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class Meter:
    """Bytes that autograd keeps alive for a backward pass: now, and at the most."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> Kept:
        return Kept(tensor, self)


class Kept:
    def __init__(self, tensor: torch.Tensor, meter: Meter) -> None:
        self.tensor, self.meter, self.size = tensor, meter, tensor.numel() * tensor.element_size()
        meter.now += self.size
        meter.peak = max(meter.peak, meter.now)

    def __del__(self) -> None:
        self.meter.now -= self.size


@pytest.mark.parametrize("method", methods.NAMES)
def test_memory_does_not_grow_with_time_but_where_the_method_needs_it(method: str) -> None:
    peaks = []
    for time_steps in (5, 25):
        model, meter = fitting(method), Meter()
        model.time_steps = time_steps
        with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda kept: kept.tensor):
            methods.get(method, 20.0).gradients(model, torch.rand(16, 64), torch.arange(16) % 10, torch.Generator())
        peaks.append(meter.peak)
    assert peaks[0] > 0
    assert (peaks[1] == peaks[0]) == (method != "dsr")  # batch normalisation over all steps at once


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ide", {"threshold": "foo"}, "option 'threshold' of method 'ide' is 'foo': give a value of the kind of its default, 30"),
        ("ide", {"threshold": 2.5}, "kind of its default, 30"),
        ("ide", {"threshold": -3}, "give a number from 0 up"),
        ("ottt-a", {"loss_lambda": 7}, "give a number from 0 to 1"),
        ("saf-e", {"loss_lambda": "x"}, "kind of its default, 0.05"),
        ("spide", {"leak_back": 5}, "kind of its default, True"),
    ],
)
def test_options_of_another_kind_or_range_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        methods.get(name, options=options)


def test_whole_numbers_are_taken_for_options_with_fractions() -> None:
    methods.get("ottt-a", options={"loss_lambda": 0})
    methods.get("dsr", options={"threshold_gradient": 1})


def test_a_threshold_below_its_bound_fires_as_it_does_in_training() -> None:
    model = network(trained_threshold=TrainedThreshold(threshold=1.0, bound=0.01), neuron=None)
    with torch.no_grad():
        model.thresholds[0].fill_(-0.5)
    images = torch.rand(4, 1, 8, 8)
    before = model(images)
    assert torch.equal(before, dsr.run(model, images, torch.arange(4)).logits)
    assert float(model.thresholds[0].detach()) == pytest.approx(0.01)


@pytest.mark.parametrize("method", methods.NAMES)
def test_frozen_parameters_get_no_gradient_and_the_others_the_same(method: str) -> None:
    """float64, no dropout: freezing a connection, or all but the last, changes nothing for what still learns."""
    model = fitting(method).double().eval()
    model.dropout = 0.0
    x, y = torch.rand(12, 64, dtype=torch.float64), torch.arange(12) % 10
    methods.get(method, 20.0).gradients(model, x, y, torch.Generator())
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    last = "hidden.0." if model.readout is None else "readout."
    for frozen in (("input.",), tuple(name for name in whole if not name.startswith(last))):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        methods.get(method, 20.0).gradients(model, x, y, torch.Generator())
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == name.startswith(frozen), name
            assert parameter.grad is None or torch.equal(parameter.grad, whole[name]), name


@pytest.mark.parametrize("method", methods.NAMES)
def test_a_network_in_which_nothing_learns_is_refused(method: str) -> None:
    model = fitting(method).requires_grad_(False)
    with pytest.raises(UsageError, match="without a parameter that learns"):
        methods.get(method, 20.0).fits(model)
