"""DSR against arrays made with its authors' code: neuron functions and a small network, gradients to 1e-9 in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from toolchain.layers import FeedbackSNN, TrainedThreshold
from toolchain.methods import dsr

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden arrays are not here ({GOLDEN})")

NAMES = {"input.0": "0", "input.1": "1", "thresholds.0": "2.Vth", "hidden.0.0": "3", "hidden.0.1": "4", "thresholds.1": "5.Vth"}


def case(name: str) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any], TrainedThreshold]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    settings = json.loads(str(arrays["meta_json"]))
    tau = settings["tau"] if settings["neuron"] == "LIF" else None
    neuron = TrainedThreshold(settings["Vth"], settings["alpha"], settings["Vth_bound"], tau, settings["delta_t"])
    return arrays, settings, neuron


@pytest.mark.parametrize("name", ["dsr_if_fn", "dsr_lif_fn"])
def test_a_layer_is_the_authors(name: str) -> None:
    arrays, settings, neuron = case(name)
    x = torch.from_numpy(arrays["x"]).requires_grad_()
    threshold = torch.tensor(neuron.threshold, dtype=torch.float64, requires_grad=True)
    out = dsr.fire(x, threshold, settings["T"], neuron)
    out.backward(torch.from_numpy(arrays["grad_out"]))
    assert np.array_equal(out.detach().numpy() != 0, arrays["out"] != 0)
    assert np.abs(out.detach().numpy() - arrays["out"]).max() < 1e-12
    assert np.abs(x.grad.numpy() - arrays["grad_x"]).max() < 1e-12
    assert abs(float(threshold.grad) - float(arrays["grad_Vth"])) < 1e-12
    weighted = "w" if settings["neuron"] == "LIF" else ""
    for kind, values in (("in", x), ("out", out)):
        mean = dsr.representation(values.detach(), settings["T"], neuron)
        assert np.abs(mean.numpy() - arrays[f"{weighted}rate_{kind}"]).max() < 1e-12


def network(arrays: dict[str, npt.NDArray[Any]], settings: dict[str, Any], neuron: TrainedThreshold) -> FeedbackSNN:
    """8-10-5, each connection with batch normalisation, the last layer's representation as logits."""
    model = FeedbackSNN(
        name="golden",
        input_shape=(8,),
        input=nn.Sequential(nn.Linear(8, 10), nn.BatchNorm1d(10)),
        hidden=[nn.Sequential(nn.Linear(10, 5), nn.BatchNorm1d(5))],
        readout=None,
        trained_threshold=neuron,
        time_steps=settings["T"],
    ).double()
    state = {name: torch.from_numpy(arrays[f"init.{theirs(name)}"]) for name in model.state_dict()}
    model.load_state_dict(state)
    return model


def theirs(name: str) -> str:
    return next(name.replace(ours, other) for ours, other in NAMES.items() if name.startswith(ours))


@pytest.mark.parametrize("name", ["dsr_if_net", "dsr_lif_net"])
def test_a_network_is_the_authors(name: str) -> None:
    arrays, settings, neuron = case(name)
    model = network(arrays, settings, neuron)
    done = dsr.run(model, torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]))
    assert np.abs(done.logits.numpy() - arrays["rep"]).max() < 1e-12
    assert abs(float(done.loss) - float(arrays["loss"])) < 1e-12
    for ours, gradient in done.gradients.items():
        assert np.abs(gradient.numpy() - arrays[f"g.{theirs(ours)}"]).max() < 1e-9, ours


@pytest.mark.parametrize("name", ["dsr_if_net", "dsr_lif_net"])
def test_the_module_in_evaluation_spikes_alike(name: str) -> None:
    arrays, settings, neuron = case(name)
    model = network(arrays, settings, neuron).eval()
    x = torch.from_numpy(arrays["x"])
    done = dsr.run(model, x, torch.from_numpy(arrays["y"]))
    assert (model(x) - done.logits).abs().max() < 1e-12
    for layer, (firing, rate) in enumerate(zip(model.firing(), model.equilibrium(x).rates, strict=True)):
        assert (rate * firing.amplitude - done.representations[layer]).abs().max() < 1e-12
    assert done.forward_rate > 0
