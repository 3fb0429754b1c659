"""Lowering: a valid graph with the module's own spikes, and refusals that name the layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from toolchain import codec, ir, models
from toolchain.errors import GraphError, UsageError
from toolchain.layers import FeedbackSNN, Neuron, Normalize
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


def test_a_module_put_in_later_is_refused_by_name() -> None:
    model = network()
    model.hidden[0] = nn.Sequential(nn.Linear(9, 8))
    with pytest.raises(UsageError, match=r"hidden.0.*Sequential.*use Linear"):
        lower(model)


def test_a_normalisation_with_many_deviations_is_refused() -> None:
    torch.manual_seed(0)
    model = FeedbackSNN(
        name="colour",
        input_shape=(3, 1, 1),
        input=nn.Linear(3, 4),
        readout=nn.Linear(4, 2),
        normalize=Normalize((0.1, 0.2, 0.3), (1.0, 2.0, 3.0)),
    )
    assert model(torch.rand(2, 3, 1, 1)).shape == (2, 2)
    with pytest.raises(GraphError, match="normalisation of 'colour'"):
        lower(model)
