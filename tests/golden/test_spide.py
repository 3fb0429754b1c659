"""SPIDE against arrays made with its authors' code: rates and spikes exactly, gradients to 1e-9 in float64."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from toolchain.layers import FeedbackSNN, Frobenius, Limited, Neuron
from toolchain.methods import spide

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden arrays are not here ({GOLDEN})")

Case = dict[str, npt.NDArray[Any]]
NAMES = {
    "input.weight": "network_x.fc.weight",
    "input.bias": "network_x.fc.bias",
    "feedback.0.weight": "network_s.fc.weight",
    "readout.weight": "classifier.weight",
    "readout.bias": "classifier.bias",
}


CONV_NAMES = {
    "input.weight": "network_x.conv.weight",
    "input.bias": "network_x.conv.bias",
    "hidden.0.weight": "network_s1.conv.weight",
    "hidden.0.bias": "network_s1.conv.bias",
    "hidden.1.weight": "network_s2.conv.weight",
    "hidden.1.bias": "network_s2.conv.bias",
    "feedback.0.op.weight": "network_s3.convT.weight_w",
    "readout.weight": "classifier.weight",
    "readout.bias": "classifier.bias",
}


def case(name: str) -> tuple[Case, dict[str, Any]]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    return arrays, json.loads(str(arrays["meta_json"]))


def neuron(settings: dict[str, Any]) -> Neuron:
    return Neuron(settings["vth"], settings["u_rest"], settings["vth_back"], settings["u_rest_back"], settings.get("leaky") or 1.0)


def network(arrays: Case, settings: dict[str, Any], dtype: torch.dtype) -> FeedbackSNN:
    """12-16(F16)-5 with the case's weights."""
    found = FeedbackSNN(
        name="golden",
        input_shape=(12,),
        input=nn.Linear(12, 16),
        feedback=[(0, 0, nn.Linear(16, 16, bias=False))],
        readout=nn.Linear(16, 5),
        neuron=neuron(settings),
        time_steps=settings["T"],
        feedback_steps=settings["TB"],
    ).to(dtype)
    found.load_state_dict({name: torch.from_numpy(arrays[f"p.{theirs}"]) for name, theirs in NAMES.items()})
    return found


def convolutions(arrays: Case, settings: dict[str, Any], dtype: torch.dtype) -> FeedbackSNN:
    """8x8: 4C5s-4C5s-4C5(F4C3u)-5 with the case's weights, the feedback limited as in the authors' code."""
    found = FeedbackSNN(
        name="golden",
        input_shape=(1, 8, 8),
        input=nn.Conv2d(1, 4, 5, 2, 2),
        hidden=[nn.Conv2d(4, 4, 5, 2, 2), nn.Conv2d(4, 4, 5, 1, 2)],
        feedback=[(2, 0, Limited(nn.ConvTranspose2d(4, 4, 3, 2, 1, 1, bias=False), Frobenius(norm=2.0)))],
        readout=nn.Linear(16, 5),
        neuron=neuron(settings),
        time_steps=settings["T"],
        feedback_steps=settings["TB"],
    ).to(dtype)
    found.load_state_dict({name: torch.from_numpy(arrays[f"p.{theirs}"]) for name, theirs in CONV_NAMES.items()})
    return found


def chain(arrays: Case, settings: dict[str, Any], dtype: torch.dtype) -> FeedbackSNN:
    """The fully connected chain of a spike-exact case: its last connection feeds back to layer 0; the readout is not used."""
    inputs, *widths = settings["dims"]
    last = len(widths) - 1
    found = FeedbackSNN(
        name="exact",
        input_shape=(inputs,),
        input=nn.Linear(inputs, widths[0]),
        hidden=[nn.Linear(a, b) for a, b in pairwise(widths)],
        feedback=[(last, 0, nn.Linear(widths[-1], widths[0], bias=False))],
        readout=nn.Linear(widths[-1], 2),
        neuron=neuron(settings),
        time_steps=settings["T"],
        feedback_steps=settings["TB"],
    ).to(dtype)
    weights = {"input.weight": arrays["W.x"], "input.bias": arrays["b.x"], "feedback.0.weight": arrays[f"W.s{last}"]}
    for i in range(last):
        weights |= {f"hidden.{i}.weight": arrays[f"W.s{i}"], f"hidden.{i}.bias": arrays[f"b.s{i}"]}
    found.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=False)
    return found


def same(ours: Tensor, theirs: npt.NDArray[Any]) -> bool:
    return bool(np.array_equal(ours.numpy(), theirs))


@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize("name", ["spide_fc_if", "spide_fc_lif095"])
def test_both_stages_and_the_gradients_are_the_authors(name: str, as_published: bool) -> None:
    arrays, settings = case(name)
    model = network(arrays, settings, torch.float64)
    done = spide.run(
        model, torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]), settings["scale_factor"], as_published=as_published, trace=True
    )
    found = done.forward.equilibrium
    assert same(found.rates[0], arrays["rate.0"])
    assert same(found.counts[0].double() / settings["T"], arrays["fire_fwd.0"])
    assert same(done.forward.masks[0], arrays["mask.0"])
    assert same(done.feedback.activity[0].double() / settings["TB"], arrays["fire_bwd.0"])
    assert "train_fwd.0" not in arrays or same(found.trains[0], arrays["train_fwd.0"])
    assert np.allclose(float(done.readout.loss), arrays["loss"], rtol=0, atol=1e-12)
    assert np.abs(done.readout.logits.numpy() - arrays["logits"]).max() < 1e-12
    assert np.abs(done.readout.error.numpy() - arrays["grad_z_scaled"]).max() < 1e-12
    assert np.abs((done.forward.masks[0] * done.feedback.beta[0]).numpy() - arrays["mbeta.s0"]).max() < 1e-12
    for ours, theirs in NAMES.items():
        assert np.abs(done.gradients[ours].numpy() - arrays[f"g.{theirs}"]).max() < 1e-9


@pytest.mark.parametrize("name", ["spide_fc_if", "spide_fc_lif095"])
def test_float32_fires_the_same_spikes(name: str) -> None:
    arrays, settings = case(name)
    model = network(arrays, settings, torch.float32)
    done = spide.run(model, torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]), settings["scale_factor"])
    assert same(done.forward.equilibrium.counts[0], np.rint(arrays["fire_fwd.0"] * settings["T"]))
    assert np.abs(done.forward.equilibrium.rates[0].numpy() - arrays["f32.rate.0"]).max() < 1e-6
    for ours, theirs in NAMES.items():
        assert np.abs(done.gradients[ours].numpy() - arrays[f"f32.g.{theirs}"]).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["spide_exact_fc1_if", "spide_exact_fc3_if"])
def test_exact_chains_fire_every_spike_of_both_stages(name: str, dtype: torch.dtype) -> None:
    arrays, settings = case(name)
    model = chain(arrays, settings, dtype)
    forward = spide.forward_stage(model, torch.from_numpy(arrays["x"]), trace=True)
    feedback = spide.feedback_stage(model, forward, torch.from_numpy(arrays["grad_z"]).to(dtype), trace=True)
    for layer in range(model.layers):
        assert same(forward.equilibrium.trains[layer], arrays[f"train_fwd.{layer}"])
        assert same(forward.equilibrium.rates[layer], arrays[f"rate.{layer}"].astype(np.float32 if dtype == torch.float32 else np.float64))
        assert same(forward.masks[layer], arrays[f"mask.{layer}"])
        assert same(feedback.trains[layer], arrays[f"train_bwd.{layer}"])
        assert np.abs(feedback.beta[layer].numpy() - arrays[f"beta.{layer}"]).max() < (1e-6 if dtype == torch.float32 else 1e-12)
    if dtype == torch.float64:
        gradients = spide.local_gradients(model, forward, feedback.beta)
        last = model.layers - 1
        names = {"input.weight": "x.weight", "input.bias": "x.bias", "feedback.0.weight": f"s{last}.weight"}
        names |= {f"hidden.{i}.{kind}": f"s{i}.{kind}" for i in range(last) for kind in ("weight", "bias")}
        for ours, theirs in names.items():
            assert np.abs(gradients[ours].numpy() - arrays[f"g.{theirs}"]).max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["spide_conv3_if", "spide_conv3_lif099"])
def test_convolutions_and_a_limited_transposed_feedback(name: str, dtype: torch.dtype) -> None:
    arrays, settings = case(name)
    exact, prefix = dtype == torch.float64, "" if dtype == torch.float64 else "f32."
    model = convolutions(arrays, settings, dtype)
    done = spide.run(model, torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]), settings["scale_factor"], trace=True)
    found = done.forward.equilibrium
    for layer in range(3):
        assert same(found.counts[layer], np.rint(arrays[f"fire_fwd.{layer}"] * settings["T"]))
        assert same(done.feedback.activity[layer], np.rint(arrays[f"fire_bwd.{layer}"] * settings["TB"])) or not exact
        assert same(found.rates[layer], arrays[f"rate.{layer}"]) if exact else True
        assert np.abs(found.rates[layer].numpy() - arrays[f"{prefix}rate.{layer}"]).max() < 1e-6
        assert same(done.forward.masks[layer], arrays[f"mask.{layer}"])
        assert f"train_fwd.{layer}" not in arrays or same(found.trains[layer], arrays[f"train_fwd.{layer}"])
        beta = (done.forward.masks[layer] * done.feedback.beta[layer]).numpy()
        theirs = f"{prefix}mbeta.{('s2', 's0', 's1')[layer]}"
        assert np.abs(beta - arrays[theirs]).max() < (1e-12 if exact else 1e-5)
    for ours, theirs in CONV_NAMES.items():
        gap = np.abs(done.gradients[ours].numpy() - arrays[f"{prefix}g.{theirs}"]).max()
        assert gap < (1e-9 if exact else 1e-4), ours
