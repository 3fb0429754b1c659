"""Target torch runs every network that trains, also one that has no graph yet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import toolchain
from toolchain import data
from toolchain.errors import GraphError
from toolchain.layers import FeedbackSNN, Neuron


def normalised() -> FeedbackSNN:
    torch.manual_seed(0)
    return FeedbackSNN(
        name="normalised",
        input_shape=(1, 8, 8),
        input=nn.Sequential(nn.Linear(64, 20), nn.BatchNorm1d(20)),
        readout=nn.Linear(20, 10),
        neuron=Neuron(threshold=1.0, u_rest=0.0, leak=0.9),
        time_steps=7,
    )


def test_a_network_without_a_graph_runs_on_torch_and_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    model, images = normalised(), data.load("digits", samples=300)
    found = toolchain.deploy(model, target="torch", dataset="digits", samples=300, batch=128)
    assert "target torch runs the module all the same" in capsys.readouterr().err
    with torch.no_grad():
        stage = model.eval().equilibrium(torch.from_numpy(images.images))
        expected = model.logits(stage.rates[-1])
    assert np.array_equal(found.predictions, expected.argmax(1).numpy())
    assert found.correct == int((found.predictions == images.labels).sum())
    assert found.spikes_per_sample == pytest.approx(float(stage.counts[0].sum()) / 300)
    assert np.allclose(found.rates["hidden1"], stage.rates[0].numpy())
    assert found.synaptic_operations_per_sample is None
    assert "no count of synaptic operations" in found.to_text()


def test_other_targets_name_the_layer_that_has_no_graph() -> None:
    with pytest.raises(GraphError, match=r"connection 'input' of 'normalised' is a Sequential"):
        toolchain.deploy(normalised(), target="sim", dataset="digits", samples=5)
