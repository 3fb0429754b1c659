"""The implicit gradient on targets against the PyTorch module's own: rates, beta, masks and every parameter's gradient."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from toolchain.compiler import lowered
from toolchain.feedback import both_phases
from toolchain.layers import FeedbackSNN, Neuron, Normalize
from toolchain.methods import spide
from toolchain.module_run import ModuleRun
from toolchain.passes import FLOAT_PIPELINE
from toolchain.source import find
from toolchain.targets.reference import REFERENCE
from toolchain.targets.torch_float import TORCH

CLASSES = 4


def network(
    seed: int, widths: tuple[int, ...], leak: float, loops: tuple[tuple[int, int], ...], neuron: dict[str, float] | None = None
) -> FeedbackSNN:
    torch.manual_seed(seed)
    inputs = 9
    sizes = (inputs, *widths)
    linears = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    with torch.no_grad():
        for linear in linears:
            linear.weight.mul_(2.5)
    return FeedbackSNN(
        name="small",
        input_shape=(1, 3, 3),
        input=linears[0],
        hidden=linears[1:],
        feedback=[(a, b, nn.Linear(widths[a], widths[b], bias=False)) for a, b in loops],
        readout=nn.Linear(widths[-1], CLASSES),
        neuron=Neuron(**{"threshold": 1.0, "u_rest": -1.0, "threshold_back": 0.5, "u_rest_back": -0.5, "leak": leak, **(neuron or {})}),
        time_steps=30,
        feedback_steps=60,
        scale_factor=12.0,
        normalize=Normalize(mean=0.25, std=0.5),
    ).double()


def batch(seed: int, samples: int = 5):
    draw = np.random.default_rng(seed)
    return draw.random((samples, 1, 3, 3)), draw.integers(0, CLASSES, samples)


def assert_equal_to_the_module(net: FeedbackSNN, run, seed: int) -> None:
    x, y = batch(seed)
    expected = spide.run(net, torch.as_tensor(x), torch.as_tensor(y), net.scale_factor)
    found = both_phases(run, find(net), x, y)
    assert found.forward.counts["hidden1"].sum() > 0
    for layer in range(net.layers):
        name = f"hidden{layer + 1}"
        np.testing.assert_allclose(found.rates[name], expected.forward.equilibrium.rates[layer].numpy(), rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.beta[name], expected.feedback.beta[layer].numpy(), rtol=0, atol=1e-12)
        np.testing.assert_array_equal(found.masks[name], expected.forward.masks[layer].numpy() == 1)
    assert found.gradients.keys() == {name for name, _ in net.named_parameters()}
    for name, gradient in expected.gradients.items():
        np.testing.assert_allclose(found.gradients[name], gradient.numpy() / net.scale_factor, rtol=0, atol=1e-12, err_msg=name)
    assert found.loss == pytest.approx(float(expected.readout.loss), abs=1e-12)


CASES = {
    "one layer, IF": ((8,), 1.0, ((0, 0),), None),
    "one layer, LIF": ((8,), 0.95, ((0, 0),), None),
    "three layers, IF": ((8, 5, 7), 1.0, ((2, 0),), None),
    "three layers, LIF, two loops": ((8, 5, 7), 0.9, ((2, 0), (1, 1)), None),
    "rest at zero": ((8, 6), 1.0, ((1, 0),), {"u_rest": 0.0, "threshold_back": 1.0, "u_rest_back": 0.0}),
    "one neuron": ((1,), 1.0, ((0, 0),), None),
    "no feedback connection": ((6, 5), 1.0, (), None),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", [REFERENCE, replace(TORCH, dtype="float64", device="cpu")], ids=lambda t: t.name)
def test_float_targets_equal_the_module(case, target):
    net = network(1, *CASES[case])
    for graph in (FLOAT_PIPELINE.until("adjoint")(lowered(find(net))), FLOAT_PIPELINE(lowered(find(net)))):
        with target.compile(graph) as run:
            assert_equal_to_the_module(net, run, 1)


@pytest.mark.lava
@pytest.mark.parametrize("case", CASES)
def test_floating_point_lava_equals_the_module(case):
    """The promise of `exact` timing: real Lava processes, both phases, and PyTorch's numbers to 1e-12."""
    from toolchain.targets.lava_sim import LAVA_SIM_FLOAT

    net = network(1, *CASES[case])
    with LAVA_SIM_FLOAT.compile(LAVA_SIM_FLOAT.pipeline(lowered(find(net)))) as run:
        assert_equal_to_the_module(net, run, 1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), layers=st.integers(1, 4), leak=st.sampled_from([1.0, 0.95, 0.5]))
def test_the_module_run_is_the_module(seed, layers, leak):
    draw = np.random.default_rng(seed)
    widths = tuple(int(n) for n in draw.integers(1, 9, layers))
    net = network(seed, widths, leak, ((layers - 1, 0),))
    with ModuleRun(net, FLOAT_PIPELINE.until("adjoint")(lowered(find(net))), device="cpu", batch=2) as run:
        x, y = batch(seed)
        expected = spide.run(net, torch.as_tensor(x), torch.as_tensor(y), net.scale_factor)
        found = both_phases(run, find(net), x, y)
    for name, gradient in expected.gradients.items():
        np.testing.assert_allclose(found.gradients[name], gradient.numpy() / net.scale_factor, rtol=0, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(found.logits, expected.readout.logits.numpy(), rtol=0, atol=1e-12)


@pytest.mark.cuda
def test_the_module_on_a_gpu_agrees_with_the_cpu():
    net = network(1, *CASES["three layers, IF"])
    x, y = batch(1)
    graph = FLOAT_PIPELINE.until("adjoint")(lowered(find(net)))
    with ModuleRun(net, graph, device="cpu") as cpu:
        a = both_phases(cpu, find(net), x, y)
    with ModuleRun(net, graph, device="cuda") as gpu:
        b = both_phases(gpu, find(net), x, y)
    for name, gradient in a.gradients.items():
        np.testing.assert_allclose(b.gradients[name], gradient, rtol=0, atol=1e-9)
