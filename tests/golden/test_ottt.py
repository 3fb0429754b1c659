"""OTTT_A and OTTT_O against arrays made with their authors' code: traces, logits, gradients and weights after SGD's steps to 1e-9 in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from toolchain.layers import FeedbackSNN, Neuron, Scale, Standardized
from toolchain.methods import get, ottt

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden arrays are not here ({GOLDEN})")

Case = dict[str, npt.NDArray[Any]]
NAMES = {
    "input.op.weight": "features.0.weight",
    "input.op.bias": "features.0.bias",
    "input.gain": "features.0.gain",
    "hidden.0.2.op.weight": "features.4.op.weight",
    "hidden.0.2.op.bias": "features.4.op.bias",
    "hidden.0.2.gain": "features.4.op.gain",
    "readout.2.weight": "classifier.0.op.weight",
    "readout.2.bias": "classifier.0.op.bias",
}


def case(name: str) -> tuple[Case, dict[str, Any]]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    return arrays, json.loads(str(arrays["meta_json"]))


def network(arrays: Case, settings: dict[str, Any]) -> FeedbackSNN:
    """Standardised conv 1->4, x2.74, pool 2, standardised conv 4->6, x2.74, pool 2, linear 24->5."""
    model = FeedbackSNN(
        name="golden",
        input_shape=(1, 8, 8),
        input=Standardized(nn.Conv2d(1, 4, 3, 1, 1)),
        hidden=[nn.Sequential(Scale(2.74), nn.AvgPool2d(2), Standardized(nn.Conv2d(4, 6, 3, 1, 1)))],
        readout=nn.Sequential(Scale(2.74), nn.AvgPool2d(2), nn.Linear(24, 5)),
        neuron=Neuron(1.0, 0.0, leak=1 - 1 / settings["tau"]),
        time_steps=settings["T"],
        weighted_readout=False,
    ).double()
    model.load_state_dict({ours: torch.from_numpy(arrays[f"init.{theirs}"]) for ours, theirs in NAMES.items()})
    return model


def differences(model: FeedbackSNN, arrays: Case, prefix: str) -> float:
    state = model.state_dict()
    return max(float(np.abs(state[ours].numpy() - arrays[f"{prefix}.{theirs}"]).max()) for ours, theirs in NAMES.items())


def sgd(model: FeedbackSNN, settings: dict[str, Any]) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=settings["lr"], momentum=settings["momentum"])


@pytest.mark.parametrize("name", ["ottt_a", "ottt_o"])
def test_each_step_is_the_authors(name: str) -> None:
    arrays, settings = case(name)
    model = network(arrays, settings)
    optimizer = sgd(model, settings)
    first: dict[str, torch.Tensor] = {}

    def step() -> None:
        first.update({} if first else {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()

    x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    online = name == "ottt_o"
    done = ottt.run(model, x, y, loss_lambda=settings["loss_lambda"], step=step if online else None, trace=True)
    assert np.abs(done.logits.numpy() - arrays["out"]).max() < 1e-12
    assert np.abs(done.losses.numpy() - arrays["losses"]).max() < 1e-12
    for layer in range(2):
        assert np.array_equal(done.traces[layer].numpy(), arrays[f"trace.{layer}"])
    for ours, theirs in NAMES.items():
        found, wanted = (first, "g_t0") if online else (done.gradients, "g_total")
        assert np.abs(found[ours].numpy() - arrays[f"{wanted}.{theirs}"]).max() < 1e-9, ours


def test_the_first_step_alone_has_the_authors_gradient() -> None:
    arrays, settings = case("ottt_a")
    model = network(arrays, settings)
    shares = []

    def step() -> None:
        shares.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    ottt.run(model, torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]), loss_lambda=settings["loss_lambda"], step=step)
    for ours, theirs in NAMES.items():
        assert np.abs(shares[0][ours].numpy() - arrays[f"g_t0.{theirs}"]).max() < 1e-9, ours


@pytest.mark.parametrize("name", ["ottt_a", "ottt_o"])
def test_the_weights_after_a_batch_are_the_authors(name: str) -> None:
    arrays, settings = case(name)
    model = network(arrays, settings)
    optimizer, method = sgd(model, settings), get(name.replace("_", "-"), options={"loss_lambda": settings["loss_lambda"]})
    after = []

    def step() -> None:
        optimizer.step()
        after.append(differences(model, arrays, f"p_after_t{len(after)}") if len(after) < 2 else 0.0)

    method.gradients(model, torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]), torch.Generator(), step)
    optimizer.step()
    assert differences(model, arrays, "p_after_last" if name == "ottt_o" else "after") < 1e-9
    assert len(after) == (settings["T"] - 1 if name == "ottt_o" else 0)
    assert max(after, default=0.0) < 1e-9


def test_the_module_in_evaluation_spikes_alike() -> None:
    arrays, settings = case("ottt_a")
    model = network(arrays, settings).eval()
    x = torch.from_numpy(arrays["x"])
    found = model.equilibrium(x, trace=True)
    trace = np.zeros(arrays["trace.0"].shape[1:])
    for step, fired in enumerate(found.trains[0].numpy()):
        trace = 0.5 * trace + fired
        assert np.array_equal(trace, arrays["trace.0"][step])
    assert np.abs(model(x).detach().numpy() - arrays["out"].mean(0)).max() < 1e-12
