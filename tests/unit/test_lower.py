"""Lowering: a valid graph with the module's own spikes, and refusals that name the layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from toolchain import checkpoint, codec, ir, models
from toolchain.config import Config, Training
from toolchain.errors import GraphError
from toolchain.layers import FeedbackSNN, Neuron, Normalize, describe
from toolchain.lower import fingerprint, lower
from toolchain.methods import spide
from toolchain.passes import Adjoint
from toolchain.targets.reference import REFERENCE


def network(leak: float = 1.0, normalize: Normalize | None = None, bias: bool = True) -> FeedbackSNN:
    """2 x 3 pixels, layers of 9, 8 and 7, feedback 2 -> 0, 0 -> 0 and 0 -> 2, float64."""
    torch.manual_seed(5)
    return FeedbackSNN(
        name="small",
        input_shape=(1, 2, 3),
        input=nn.Linear(6, 9, bias=bias),
        hidden=[nn.Linear(9, 8), nn.Linear(8, 7, bias=bias)],
        feedback=[(2, 0, nn.Linear(7, 9, bias=False)), (0, 0, nn.Linear(9, 9, bias=False)), (0, 2, nn.Linear(9, 7, bias=False))],
        readout=nn.Linear(7, 4, bias=bias),
        neuron=Neuron(threshold=0.3, u_rest=-0.3, threshold_back=0.2, u_rest_back=-0.1, leak=leak),
        time_steps=25,
        feedback_steps=40,
        scale_factor=30.0,
        dropout=0.2,
        normalize=normalize,
    ).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalize", [None, Normalize(0.4, 0.2)])
@pytest.mark.parametrize("leak", [1.0, 0.9])
def test_the_graph_fires_the_modules_spikes_in_both_phases(leak: float, normalize: Normalize | None, bias: bool) -> None:
    model = network(leak, normalize, bias)
    images = np.random.default_rng(1).random((20, 1, 2, 3))
    labels = torch.arange(20) % 4
    done = spide.run(model, torch.from_numpy(images), labels, model.scale_factor, trace=True)
    graph = Adjoint()(lower(model))
    ir.verify(graph)
    with replace(REFERENCE, trace=True).compile(graph) as executable:
        forward = executable.run(images)
        feedback = executable.run(codec.output_error(graph, forward, labels.numpy()), phase="feedback")
    spikes = 0
    for layer in range(3):
        couple = f"hidden{layer + 1}"
        spikes += int(forward.counts[couple].sum())
        assert np.array_equal(forward.history[couple].spikes, done.forward.equilibrium.trains[layer].numpy())
        assert np.array_equal(feedback.history[couple].spikes, done.feedback.trains[layer].numpy())
        assert np.abs(codec.rates(graph, forward, couple) - done.forward.equilibrium.rates[layer].numpy()).max() < 1e-12
        assert np.abs(codec.beta(graph, feedback, couple) - done.feedback.beta[layer].numpy()).max() < 1e-12
    assert spikes > 500
    assert np.abs(codec.logits(graph, forward) - done.readout.logits.numpy()).max() < 1e-12


def test_the_graph_says_what_the_network_is() -> None:
    graph = lower(models.get("mnist-fc2").build())
    forward, feedback = graph.phase("forward"), graph.phase("feedback")
    assert forward.order == ("input", "hidden1", "hidden2", "readout")
    assert feedback.order == ("hidden2", "hidden1")
    assert [(s.source, s.target, s.delay) for s in forward.synapses] == [
        ("input", "hidden1", 0),
        ("hidden1", "hidden2", 0),
        ("hidden2", "hidden1", 1),
        ("hidden2", "readout", 0),
    ]
    assert forward.synapses[0].ops == (ir.Scale(1 / 0.3081), ir.Dense("input.weight"))
    assert sorted(forward.bias) == ["hidden1", "hidden2", "readout"]
    assert feedback.synapses == ()
    assert feedback.drive == (ir.Drive("hidden2", "error", gain=100.0),)
    assert (forward.time_steps, feedback.time_steps) == (30, 100)
    assert graph.tensors["input.weight"].dtype == np.float64


def test_the_fingerprint_follows_the_weights() -> None:
    model = network()
    before = fingerprint(model)
    assert before == fingerprint(network()) == lower(model).provenance.source_sha256
    with torch.no_grad():
        model.input.weight[0, 0] += 1e-12
    assert fingerprint(model) != before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    model = network()
    with torch.no_grad():
        model.hidden[1].weight[2, 3] = value
    with pytest.raises(GraphError, match=r"'hidden.1.weight' of 'small'"):
        lower(model)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.MaxPool2d(2), "connection 'hidden.0' of 'small' is a MaxPool2d, which is not compiled: use AvgPool2d"),
        (
            nn.Sequential(nn.Linear(9, 8), nn.ReLU()),
            "part 'hidden.0.1' of connection 'hidden.0' of 'small' is a ReLU, .* neurons are its nonlinearity",
        ),
        (nn.Sequential(nn.Dropout(0.1), nn.Linear(9, 8)), "part 'hidden.0.0' .* is a Dropout, .* set the network's dropout"),
        (nn.Sequential(nn.Flatten(), nn.Linear(9, 8)), "is a Flatten, .* a Linear flattens by itself"),
        (nn.Sequential(nn.Sequential(nn.Linear(9, 8))), "is a Sequential, .* outer Sequential"),
        (nn.LayerNorm(9), "is a LayerNorm, .* BatchNorm1d or BatchNorm2d"),
        (nn.Conv1d(9, 8, 1), "is a Conv1d, .* use Conv2d"),
        (nn.Embedding(9, 8), "is a Embedding, .* use Linear or Conv2d or"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name_with_the_nearest_that_can(module: nn.Module, message: str) -> None:
    model = network()
    model.hidden[0] = module
    with pytest.raises(GraphError, match=message):
        lower(model)


def test_several_weights_in_a_connection_are_refused_unless_they_are_matrices() -> None:
    model = FeedbackSNN(
        name="two",
        input_shape=(3, 6, 6),
        input=nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), nn.Linear(16, 5)),
        readout=nn.Linear(5, 2),
    )
    message = r"connection 'input' of 'two' has several parts with weights, 'input.0' \(Conv2d\), 'input.2' \(Linear\): put a layer of neurons or a relay between them"
    with pytest.raises(GraphError, match=message):
        lower(model)


def test_a_pool_whose_matrix_would_be_huge_is_refused() -> None:
    model = FeedbackSNN(
        name="huge", input_shape=(64, 19, 19), input=nn.Identity(), hidden=[nn.AdaptiveAvgPool2d(7)], readout=nn.Linear(64 * 49, 2)
    )
    with pytest.raises(
        GraphError,
        match=r"'hidden.0' of 'huge' makes \(64, 7, 7\) of \(64, 19, 19\) .* 72,454,144 entries, more than 67,108,864: .*divides 19 x 19",
    ):
        lower(model)


@pytest.mark.parametrize(("dataset", "events"), [("nmnist", True), ("mnist", False), ("a set of my own", None)])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_checkpoint_takes_events_where_the_set_it_was_trained_on_has_them(
    channels: int, dataset: str, events: bool | None, tmp_path: Path
) -> None:
    model = FeedbackSNN(name="own", input_shape=(channels, 4, 4), input=nn.Linear(16 * channels, 5), readout=nn.Linear(5, 2))
    written = checkpoint.About(checkpoint.FORMAT, Config(describe(model), Training(dataset=dataset)), 1, 0.5)
    checkpoint.write(tmp_path / checkpoint.NAME, model.state_dict(), written)
    loaded = checkpoint.load(tmp_path)
    assert loaded.events is events
    assert lower(loaded).population("input").events == (channels == 2 if events is None else events)


def test_events_are_images_of_two_channels_unless_the_model_says_otherwise() -> None:
    model = FeedbackSNN(name="dvs", input_shape=(2, 4, 4), input=nn.Linear(32, 5), readout=nn.Linear(5, 2))
    assert lower(model).population("input").events
    model.events = False
    assert not lower(model).population("input").events
    assert not lower(network()).population("input").events
    still = network()
    still.events = True
    assert lower(still).population("input").events
