"""Weight gradients of every operation: convolutions, pools, relays and events against SPIDE's module, autograd, and networks that are the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import toolchain
from toolchain import codec
from toolchain.compiler import lowered
from toolchain.feedback import both_phases
from toolchain.layers import FeedbackSNN, Neuron, Normalize, Scale, Standardized
from toolchain.methods import spide
from toolchain.passes import FLOAT_PIPELINE
from toolchain.source import Source, find
from toolchain.targets.reference import REFERENCE
from toolchain.targets.sim import SIM
from toolchain.targets.torch_float import TORCH

NEURON = {"threshold": 1.0, "u_rest": -1.0, "threshold_back": 0.5, "u_rest_back": -0.5}


def network(leak: float = 1.0, *, plain: bool = False) -> FeedbackSNN:
    """Strides, odd sizes, padding, a pool, weight standardisation, a transposed convolution that feeds back, and one value a channel of normalisation."""
    torch.manual_seed(3)
    second = nn.Conv2d(4, 3, 3, 1, 1)
    net = FeedbackSNN(
        name="convolutions",
        input_shape=(2, 7, 5),
        input=nn.Conv2d(2, 4, 3, 2, 1),
        hidden=[second if plain else nn.Sequential(Scale(1.5), Standardized(second)), nn.AvgPool2d(2, 2, 1), nn.Linear(18, 6)],
        feedback=[(1, 0, nn.ConvTranspose2d(3, 4, 3, 1, 1, bias=False)), (3, 3, nn.Linear(6, 6, bias=False))],
        readout=nn.Linear(6, 3),
        neuron=Neuron(**NEURON, leak=leak),
        time_steps=20,
        feedback_steps=40,
        scale_factor=150.0,
        normalize=None if plain else Normalize(mean=(0.2, 0.4), std=(0.5, 0.25)),
    ).double()
    net.events = False
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(2.0) if name.endswith("weight") else parameter.add_(0.2)
    return net.eval()


def batch(net: FeedbackSNN, samples: int = 5, frames: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(1)
    return draw.random((samples, *net.input_shape, *([] if frames is None else [frames]))), draw.integers(0, net.classes, samples)


@pytest.mark.parametrize("leak", [1.0, 0.95])
@pytest.mark.parametrize("target", [REFERENCE, replace(TORCH, dtype="float64", device="cpu")], ids=lambda t: t.name)
def test_gradients_of_convolutions_are_the_module_s(leak: float, target) -> None:
    net = network(leak)
    x, y = batch(net)
    expected = spide.run(net, torch.as_tensor(x), torch.as_tensor(y), net.scale_factor)
    with target.compile(FLOAT_PIPELINE(lowered(find(net)))) as run:
        found = both_phases(run, find(net), x, y)
    assert found.feedback.activity["hidden1"].sum() > 0
    assert found.gradients.keys() == {name for name, _ in net.named_parameters()}
    for name, gradient in expected.gradients.items():
        np.testing.assert_allclose(found.gradients[name], gradient.numpy() / net.scale_factor, rtol=0, atol=1e-12, err_msg=name)


def test_gradients_of_folded_tensors_are_those_of_the_parameters_behind_them() -> None:
    """Without factors to fold, a tensor is the parameter itself; biases are full maps in the graph, and sum up to the parameter's."""
    net = network(plain=True)
    x, y = batch(net)
    compiled = toolchain.compile(net, target="sim").artifact
    with TORCH.compile(FLOAT_PIPELINE(lowered(find(net)))) as run:
        parameters = both_phases(run, find(net), x, y).gradients
        tensors = both_phases(run, Source("convolutions", None, compiled), x, y).gradients
    for name, gradient in parameters.items():
        folded = tensors[name]
        full = folded.sum(axis=(1, 2)) if name.endswith("bias") and folded.ndim == 3 else folded
        np.testing.assert_allclose(full, gradient, rtol=0, atol=1e-9, err_msg=name)


def test_gradients_of_integers_point_where_those_of_floats_do() -> None:
    net = network(plain=True)
    net.time_steps, net.feedback_steps, net.scale_factor = 60, 400, 40.0
    x, y = batch(net, 16)
    compiled = toolchain.compile(net, target="sim").artifact
    floats = toolchain.feedback(compiled, x, y, target="torch").gradients
    integers = toolchain.feedback(compiled, x, y, target="sim").gradients
    assert floats.keys() == integers.keys()
    for name, gradient in floats.items():
        other = integers[name]
        assert np.vdot(gradient, other) > 0.95 * np.linalg.norm(gradient) * np.linalg.norm(other), name


def relayed(*, relay: bool) -> FeedbackSNN:
    """A chain whose middle connection is W2 W1: through a relay, or as one matrix."""
    torch.manual_seed(5)
    first, second = nn.Linear(6, 7, bias=False), nn.Linear(7, 5, bias=False)
    joined = nn.Linear(6, 5, bias=False)
    with torch.no_grad():
        for linear in (first, second):
            linear.weight.copy_((linear.weight * 512).round() / 256)  # few bits: sums are exact in whatever order
        joined.weight.copy_(second.weight @ first.weight)
    into, readout = nn.Linear(4, 6), nn.Linear(5, 3)
    back = nn.Linear(5, 6, bias=False)
    return FeedbackSNN(
        name="relayed" if relay else "joined",
        input_shape=(4,),
        input=into,
        hidden=[first, second] if relay else [joined],
        feedback=[(2 if relay else 1, 0, back)],
        relays=(1,) if relay else (),
        readout=readout,
        neuron=Neuron(**NEURON),
        time_steps=20,
        feedback_steps=40,
        scale_factor=12.0,
    ).double()


def test_a_relay_learns_from_the_mean_of_what_reaches_it() -> None:
    """The network in which W2 W1 is one matrix has the same spikes in both phases; its gradient G gives W2^T G and G W1^T."""
    net, other = relayed(relay=True), relayed(relay=False)
    other.input.load_state_dict(net.input.state_dict())
    other.feedback.load_state_dict(net.feedback.state_dict())
    x, y = batch(net)
    results = []
    for model in (net, other):
        with REFERENCE.compile(FLOAT_PIPELINE(lowered(find(model)))) as run:
            results.append(both_phases(run, find(model), x, y))
    ours, theirs = results
    np.testing.assert_array_equal(ours.beta["hidden1"], theirs.beta["hidden1"])
    assert np.abs(ours.beta["hidden1"]).sum() > 0
    joined = theirs.gradients["hidden.0.weight"]
    first, second = (module.weight.detach().numpy() for module in net.hidden)
    np.testing.assert_allclose(ours.gradients["hidden.0.weight"], second.T @ joined, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.gradients["hidden.1.weight"], joined @ first.T, rtol=0, atol=1e-12)
    for name in ("input.weight", "input.bias", "feedback.0.weight", "readout.weight"):
        np.testing.assert_allclose(ours.gradients[name], theirs.gradients[name], rtol=0, atol=1e-12, err_msg=name)
    as_artefact = Source("relayed", None, toolchain.compile(net, target="sim").artifact)
    with REFERENCE.compile(FLOAT_PIPELINE(lowered(find(net)))) as run:
        tensors = both_phases(run, as_artefact, x, y).gradients
    np.testing.assert_allclose(tensors["hidden.0.weight"], ours.gradients["hidden.0.weight"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(tensors["hidden.1.weight"], ours.gradients["hidden.1.weight"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("leak", [1.0, 0.9])
def test_events_are_averaged_as_the_neurons_average_them(leak: float) -> None:
    torch.manual_seed(7)
    net = FeedbackSNN(
        name="events",
        input_shape=(2, 5, 5),
        input=nn.Conv2d(2, 3, 3, 2),
        feedback=[(0, 0, nn.Conv2d(3, 3, 1, bias=False))],
        readout=nn.Linear(12, 3),
        neuron=Neuron(**NEURON, leak=leak),
        time_steps=20,
        feedback_steps=60,
        scale_factor=20.0,
    ).double()
    with torch.no_grad():
        net.input.weight.abs_().mul_(2)
    x, y = batch(net, frames=net.time_steps)
    expected = spide.run(net, torch.as_tensor(x), torch.as_tensor(y), net.scale_factor)
    graph = FLOAT_PIPELINE(lowered(find(net)))
    assert graph.of_kind("input")[0].events
    with REFERENCE.compile(graph) as run:
        of_module = both_phases(run, find(net), x, y).gradients
        of_tensors = both_phases(run, Source("events", None, toolchain.compile(net, target="sim").artifact), x, y).gradients
    gradient = expected.gradients["input.weight"].numpy() / net.scale_factor
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(of_module["input.weight"], gradient, rtol=0, atol=1e-12)
    np.testing.assert_allclose(of_tensors["input.weight"], gradient, rtol=0, atol=1e-12)


def test_integer_feedback_of_relays_says_what_floats_say() -> None:
    """The relay's unit in integers is another than in floats; its signal in the model's unit is the same up to rounding."""
    net = relayed(relay=True)
    x, y = batch(net, 16)
    compiled = toolchain.compile(net, target="sim").artifact
    with replace(SIM, device="cpu").compile(compiled.graph) as run:
        integers = both_phases(run, find(compiled), x, y)
    floats = toolchain.feedback(compiled, x, y, target="torch", device="cpu")
    assert codec.error_drive(compiled.graph).population == "hidden3"
    for name in ("hidden.0.weight", "hidden.1.weight"):
        a, b = integers.gradients[name], floats.gradients[name]
        assert np.linalg.norm(a - b) < 0.25 * np.linalg.norm(b), name
