"""SAF against the derived arrays: spikes and accumulations exactly, gradients to 1e-9 in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from toolchain.layers import FeedbackSNN, Neuron
from toolchain.methods import ottt, saf

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden arrays are not here ({GOLDEN})")

NAMES = {
    "input.weight": "W0",
    "input.bias": "b0",
    "hidden.0.weight": "W1",
    "hidden.0.bias": "b1",
    "readout.weight": "Wout",
    "readout.bias": "bout",
}


def case(weighted_readout: bool) -> tuple[dict[str, npt.NDArray[Any]], FeedbackSNN, Tensor, Tensor]:
    """The arrays, their network 8-10-5-3, events (time last) and labels."""
    with np.load(GOLDEN / "saf_derived.npz", allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    settings = json.loads(str(arrays["meta_json"]))
    model = FeedbackSNN(
        name="golden",
        input_shape=(8,),
        input=nn.Linear(8, 10),
        hidden=[nn.Linear(10, 5)],
        readout=nn.Linear(5, 3),
        neuron=Neuron(settings["vth"], 0.0, leak=settings["lam"]),
        time_steps=settings["T"],
        weighted_readout=weighted_readout,
    ).double()
    model.load_state_dict({ours: torch.from_numpy(arrays[f"p.{theirs}"]) for ours, theirs in NAMES.items()})
    return arrays, model, torch.from_numpy(arrays["x"]).movedim(0, -1), torch.from_numpy(arrays["y"])


def check(gradients: dict[str, Tensor], arrays: dict[str, npt.NDArray[Any]], kind: str) -> None:
    for ours, theirs in NAMES.items():
        assert np.abs(gradients[ours].numpy() - arrays[f"g_{kind}.{theirs}"]).max() < 1e-9, ours


def test_accumulations_and_spikes() -> None:
    arrays, model, x, y = case(False)
    done = saf.run_e(model, x, y, loss_lambda=0.0, trace=True)
    found = model.equilibrium(x, trace=True)
    for layer in range(2):
        assert np.abs(done.traces[layer].numpy() - arrays[f"acc.{layer}"]).max() < 1e-12
        assert np.array_equal(found.trains[layer].numpy(), arrays[f"spikes.{layer}"])
        assert np.array_equal(done.counts[layer].numpy(), arrays[f"spikes.{layer}"].sum(0))


def test_the_gradient_of_every_step() -> None:
    arrays, model, x, y = case(False)
    check(saf.run_e(model, x, y, loss_lambda=0.0).gradients, arrays, "E")


def test_ottt_gets_the_same_when_it_traces_its_input() -> None:
    arrays, model, x, y = case(False)
    check(ottt.run(model, x, y, loss_lambda=0.0, trace_input=True).gradients, arrays, "E")


def test_the_gradient_of_the_last_step() -> None:
    arrays, model, x, y = case(True)
    done = saf.run_f(model, x, y)
    assert abs(float(done.loss) - float(arrays["lossF"])) < 1e-12
    check(done.gradients, arrays, "F")
