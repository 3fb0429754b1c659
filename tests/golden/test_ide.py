"""IDE against arrays made with its authors' code: rates exactly, equilibrium gradients and parameter gradients to 1e-9 in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from toolchain.layers import FeedbackSNN, Limited, Neuron, Spectral
from toolchain.methods import ide

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden arrays are not here ({GOLDEN})")

Case = dict[str, npt.NDArray[Any]]
CASES = ["ide_fc_if_broy", "ide_fc_if_iter", "ide_conv1_lif095_broy", "ide_convml_if_broy"]


def case(name: str) -> tuple[Case, dict[str, Any]]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    return arrays, json.loads(str(arrays["meta_json"]))


def names(arrays: Case) -> dict[str, str]:
    """Our state dict's names for the authors' ("network_s1.conv.weight"); the last network_s is the feedback connection."""
    theirs = [key.removeprefix("init.") for key in arrays if key.startswith("init.")]
    connections = sorted({name.split(".")[0] for name in theirs} - {"classifier"})
    ours = {"network_x": "input", "classifier": "readout", max(connections[:-1]): "feedback.0"}
    ours |= {connection: f"hidden.{i}" for i, connection in enumerate(connections[:-2])}
    parts = {"fc": "0", "conv": "0", "convT": "0", "bn": "1"}
    kinds = {"weight_w": "op.weight", "weight_g": "gain", "weight_u": "u", "weight_v": "v"}
    found = {}
    for name in theirs:
        connection, *part, kind = name.split(".")
        middle = [parts[p] for p in part] if ours[connection] != "feedback.0" else []
        found[".".join([ours[connection], *middle, kinds.get(kind, kind)])] = name
    return found


def network(arrays: Case, settings: dict[str, Any]) -> FeedbackSNN:
    """The case's network with its weights, in training mode, float64."""
    neuron = Neuron(settings["vth"], 0.0, leak=settings.get("leaky") or 1.0)
    if settings["net"].startswith("FC"):
        input: nn.Module = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16))
        hidden: list[nn.Module] = []
        feedback: nn.Linear | nn.Conv2d | nn.ConvTranspose2d = nn.Linear(16, 16, bias=False)
        shape, values = (12,), 16
    elif settings["net"].startswith("4C5s"):
        input, hidden = nn.Sequential(nn.Conv2d(1, 4, 5, 2, 2), nn.BatchNorm2d(4)), []
        feedback, shape, values = nn.Conv2d(4, 4, 5, 1, 2, bias=False), (1, 8, 8), 64
    else:
        convolutions = [nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)]
        hidden = [nn.Sequential(convolution, nn.BatchNorm2d(4)) for convolution in convolutions]
        input = nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.BatchNorm2d(3))
        feedback, shape, values = nn.ConvTranspose2d(4, 3, 3, 2, 1, 1, bias=False), (1, 8, 8), 16
    found = FeedbackSNN(
        name="golden",
        input_shape=shape,
        input=input,
        hidden=hidden,
        feedback=[(len(hidden), 0, Limited(feedback, Spectral(norm=1.0)))],
        readout=nn.Linear(values, 5),
        neuron=neuron,
        time_steps=settings["T"],
    ).double()
    found.load_state_dict({ours: torch.from_numpy(arrays[f"init.{theirs}"]) for ours, theirs in names(arrays).items()})
    return found


def masks(arrays: Case) -> dict[str, torch.Tensor]:
    connections = {".".join(ours.split(".")[: 1 + (ours[0] in "hf")]): theirs.split(".")[0] for ours, theirs in names(arrays).items()}
    return {c: torch.from_numpy(arrays[f"dropmask.{theirs}"]) for c, theirs in connections.items() if f"dropmask.{theirs}" in arrays}


def run(arrays: Case, settings: dict[str, Any], **options: Any) -> tuple[FeedbackSNN, ide.Pass]:
    model = network(arrays, settings)
    x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    return model, ide.run(model, x, y, dropout=masks(arrays), threshold=settings["threshold"], **options)


def gap(ours: torch.Tensor, theirs: npt.NDArray[Any]) -> float:
    return float(np.abs(ours.detach().numpy().reshape(theirs.shape) - theirs).max())


@pytest.mark.parametrize("name", CASES)
def test_rates_solution_gradients_and_statistics_are_the_authors(name: str) -> None:
    arrays, settings = case(name)
    solver = {"broy": "broyden", "iter": "iter-compat"}[settings["solver"]]
    model, done = run(arrays, settings, solver=solver, as_published=True)
    assert np.array_equal(done.equilibrium.rates[-1].numpy(), arrays["rate_last"])
    assert "rate_first" not in arrays or np.array_equal(done.equilibrium.rates[0].numpy(), arrays["rate_first"])
    assert gap(done.readout.logits, arrays["logits"]) < 1e-12
    assert abs(float(done.readout.loss) - arrays["loss"]) < 1e-12
    assert gap(done.error[0], arrays["bwd_grad_in"]) < 1e-12
    assert gap(done.point[0], arrays["bwd_lin_point"]) < 1e-12
    assert gap(done.beta[0], arrays["bwd_grad_solved"]) < 1e-9
    if solver == "broyden":
        assert done.solution.steps == arrays["broyden.lowest_step"]
        assert done.solution.residual == pytest.approx(float(arrays["broyden.diff"]), rel=1e-3)
    for ours, theirs in names(arrays).items():
        assert f"g.{theirs}" not in arrays or gap(done.gradients[ours], arrays[f"g.{theirs}"]) < 1e-9, ours
        assert f"after.{theirs}" not in arrays or gap(model.state_dict()[ours], arrays[f"after.{theirs}"]) < 1e-12, ours


@pytest.mark.parametrize("solver", ["broyden", "iter"])
@pytest.mark.parametrize("name", CASES)
def test_solvers_reach_the_exact_solution(name: str, solver: str) -> None:
    arrays, settings = case(name)
    _, done = run(arrays, settings, solver=solver, as_published=True)
    assert gap(done.beta[0], arrays["bwd_grad_exact"]) < 1e-9


def test_the_published_iteration_solves_another_system() -> None:
    arrays, settings = case("ide_fc_if_iter")
    _, done = run(arrays, settings, solver="iter-compat")
    assert gap(done.beta[0], arrays["bwd_grad_2I_minus_JT"]) < 1e-12
