"""The networks of the papers on Lava processes: in whole numbers every spike and potential is the reference's, in floats the rates, beta and gradients are
those of the PyTorch module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from toolchain import codec, data, models
from toolchain.compiler import lowered
from toolchain.feedback import both_phases
from toolchain.ir import Graph
from toolchain.layers import FeedbackSNN, Neuron, Normalize, Scale, Standardized
from toolchain.methods import spide
from toolchain.passes import FLOAT_PIPELINE, LOIHI_PIPELINE, Retime
from toolchain.source import find
from toolchain.target import Result
from toolchain.targets.lava_sim import LAVA_SIM_FLOAT, LavaSim
from toolchain.targets.reference import Reference
from toolchain.targets.sim import SIM

pytestmark = pytest.mark.lava

NETWORKS = ("mnist-fc", "mnist-fc2", "lenet", "convnet-f")
IMAGES, AT_ONCE, BATCH = 20, 10, 4
"""Images in all, compared at a time (full histories are large), and copies of the network: 4, 4 and 2 of them advance."""


def module(name: str) -> FeedbackSNN:
    """With its trained weights, or random ones where none are shipped."""
    return models.load(name) if models.get(name).shipped else models.get(name).build(0).eval()


def integer_graph(name: str, timing: str, inputs: str = "bias") -> Graph:
    pipeline = LOIHI_PIPELINE.with_options(retime={"mode": timing}, inject={"mode": inputs}).until("quantize")
    return pipeline(lowered(find(module(name))))


def assert_same_images(
    graph: Graph, sim: LavaSim, images: Any, labels: Any, assert_identical: Callable[[Result, Result], None]
) -> dict[str, int]:
    """Both phases; the error is that of answers one class off, so that trained networks have one. Returns the spikes of each phase."""
    seen = {"forward": 0, "feedback": 0}
    expected = Reference(trace=True).compile(graph)
    with replace(sim, trace=True).compile(graph) as run:
        for first in range(0, len(images), AT_ONCE):
            piece = slice(first, first + AT_ONCE)
            forward, found = expected.run(images[piece]), run.run(images[piece])
            assert_identical(found, forward)
            for couple in (p.name for p in graph.of_kind("couple")):
                np.testing.assert_array_equal(codec.mask(graph, found, couple), codec.mask(graph, forward, couple))
            error = codec.output_error(graph, forward, (labels[piece] + 1) % 10)
            back = expected.run(error, phase="feedback")
            assert_identical(run.run(error, phase="feedback"), back)
            for phase, result in (("forward", forward), ("feedback", back)):
                seen[phase] += sum(int(result.activity[p.name].sum()) for p in graph.of_kind("couple") if p.name in result.activity)
            assert min(int(history.spikes.min()) for history in back.history.values()) == -1
    return seen


@pytest.mark.parametrize("timing", ["exact", "pipelined"])
@pytest.mark.parametrize(
    "name", ["mnist-fc", "mnist-fc2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lenet", "convnet-f"))]
)
def test_twenty_images_are_the_reference_s(assert_identical: Any, name: str, timing: str) -> None:
    loaded = data.load("mnist-1k", samples=IMAGES)
    seen = assert_same_images(integer_graph(name, timing), LavaSim(batch=BATCH), loaded.images, loaded.labels, assert_identical)
    assert seen["forward"] > 50_000
    assert seen["feedback"] > 10_000


@pytest.mark.parametrize(
    ("name", "timing", "inputs"),
    [("mnist-fc", "pipelined", "graded"), ("mnist-fc2", "exact", "bias"), ("lenet", "exact", "graded"), ("convnet-f", "pipelined", "bias")],
)
def test_a_few_images_in_a_few_steps_are_the_reference_s(assert_identical: Any, name: str, timing: str, inputs: str) -> None:
    """The same networks and weights, briefly; three images in batches of two."""
    loaded = data.load("mnist-1k", samples=3)
    graph = integer_graph(name, timing, inputs).in_steps({"forward": 12, "feedback": 12})
    seen = assert_same_images(graph, LavaSim(batch=2), loaded.images, loaded.labels, assert_identical)
    assert min(seen.values()) > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifarnet-f", "alexnet-f-bn", "vgg-f", "nmnist-conv", "preactresnet-18"])
def test_larger_networks_with_random_weights_are_the_simulator_s(assert_identical: Any, name: str) -> None:
    """Residual streams, events, standardised weights and over a hundred processes; three steps of one sample."""
    graph = integer_graph(name, "exact").in_steps({"forward": 3, "feedback": 3})
    source, draw = graph.of_kind("input")[0], np.random.default_rng(0)
    images = draw.random((1, *source.shape))
    if source.events:
        images = (draw.random((1, *source.shape, 3)) < 0.3).astype(np.float64)
    driven = graph.population(codec.error_drive(graph).population)
    error = 3 * draw.normal(size=(1, *driven.shape))
    with replace(SIM, device="cpu", trace=True).compile(graph) as sim, LavaSim(batch=1, trace=True).compile(graph) as lava:
        forward, back = sim.run(images), sim.run(error, phase="feedback")
        assert_identical(lava.run(images), forward)
        assert_identical(lava.run(error, phase="feedback"), back)
    for result in (forward, back):
        assert any(result.activity[p.name].any() for p in graph.of_kind("couple"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(pick=st.data(), host=st.booleans(), timing=st.sampled_from(["exact", "pipelined"]))
def test_no_compiled_graph_is_refused(drawn: Any, pick: Any, host: bool, timing: str) -> None:
    """Whatever the passes leave, with its own synapses: branches, relays, loops, parallel connections, events."""
    pipeline = LOIHI_PIPELINE.with_options(retime={"mode": timing}).until("quantize")
    assert LavaSim().check(pipeline(pick.draw(drawn.graphs(raw=True, host=host)))) == []


def assert_equal_to_the_module(net: FeedbackSNN, images: Any, labels: Any, *, batch: int) -> None:
    """Rates, masks, beta, loss and the gradient of every parameter, to 1e-12."""
    assert next(net.parameters()).dtype == torch.float64
    with torch.no_grad():
        expected = spide.run(net, torch.as_tensor(images), torch.as_tensor(labels), net.scale_factor)
    graph = FLOAT_PIPELINE(lowered(find(net)))
    assert {phase.timing.mode for phase in graph.phases} == {"exact"}
    with replace(LAVA_SIM_FLOAT, batch=batch).compile(graph) as run:
        found = both_phases(run, find(net), images, labels)
    for layer in range(net.layers):
        name = f"hidden{layer + 1}"
        np.testing.assert_array_equal(found.forward.counts[name], expected.forward.equilibrium.counts[layer].numpy(), err_msg=name)
        np.testing.assert_allclose(found.rates[name], expected.forward.equilibrium.rates[layer].numpy(), rtol=0, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(found.beta[name], expected.feedback.beta[layer].numpy(), rtol=0, atol=1e-12, err_msg=name)
        np.testing.assert_array_equal(found.masks[name], expected.forward.masks[layer].numpy() == 1, err_msg=name)
    assert found.gradients.keys() == {name for name, _ in net.named_parameters()}
    for name, gradient in expected.gradients.items():
        np.testing.assert_allclose(found.gradients[name], gradient.numpy() / net.scale_factor, rtol=0, atol=1e-12, err_msg=name)
    assert found.loss == pytest.approx(float(expected.readout.loss), abs=1e-12)


@pytest.mark.parametrize("name", ["digits-fc", *NETWORKS])
def test_floating_point_is_the_module_in_float64(name: str) -> None:
    loaded = data.load("digits" if name == "digits-fc" else "mnist-1k", samples=5)
    net = module(name).double()
    assert_equal_to_the_module(net, loaded.images, (loaded.labels + 1) % 10, batch=3)


Shape = tuple[int, ...]


class Drawn:
    """Connections of a network drawn by hypothesis; each fits the shape it comes from."""

    def __init__(self, pick: st.DataObject) -> None:
        self.pick = pick

    def number(self, low: int, high: int) -> int:
        return int(self.pick.draw(st.integers(low, high)))

    def one_of(self, options: Any) -> Any:
        return self.pick.draw(st.sampled_from(list(options)))

    def next(self, shape: Shape) -> tuple[nn.Module, Shape]:
        """A connection within the step, and the shape it makes."""
        if len(shape) == 1:
            return self.dense(shape)
        channels, height, width = shape
        options = ["conv", "conv", "deconv", "dense"] + ["pool"] * (min(height, width) >= 2) + ["up"] * (max(height, width) <= 4)
        kind = self.one_of(options)
        if kind == "dense":
            return self.dense(shape)
        if kind == "pool":
            return nn.AvgPool2d(2), (channels, height // 2, width // 2)
        if kind == "up":
            return nn.Upsample(scale_factor=2, mode="nearest"), (channels, 2 * height, 2 * width)
        kernel, stride, padding = self.number(1, min(3, height, width)), self.number(1, 2), self.number(0, 1)
        groups = self.one_of([n for n in (1, 2) if channels % n == 0])
        out = groups * self.number(1, 2)
        if kind == "deconv":
            spread = nn.ConvTranspose2d(channels, out, kernel, stride, 0, groups=groups)
            return spread, (out, *((n - 1) * stride + kernel for n in (height, width)))
        conv = nn.Conv2d(channels, out, kernel, stride, min(padding, kernel // 2), groups=groups)
        made = tuple((n + 2 * min(padding, kernel // 2) - kernel) // stride + 1 for n in (height, width))
        wrapped = nn.Sequential(Scale(1.5), Standardized(conv)) if conv.weight[0].numel() > 1 and self.one_of([True, False]) else conv
        return wrapped, (out, *made)

    def dense(self, shape: Shape) -> tuple[nn.Module, Shape]:
        width = self.number(1, 7)
        return nn.Linear(int(np.prod(shape)), width), (width,)

    def back(self, source: Shape, target: Shape) -> nn.Module | None:
        """A feedback connection, None where none of the few kinds fits."""
        if len(source) == 1 and len(target) == 1:
            return nn.Linear(source[0], target[0], bias=False)
        if len(source) == len(target) == 3:
            if source[1:] == target[1:]:
                return nn.Conv2d(source[0], target[0], 3, 1, 1, bias=False)
            grown = tuple((n - 1) * 2 + 2 for n in source[1:])
            if grown == target[1:]:
                return nn.ConvTranspose2d(source[0], target[0], 2, 2, bias=False)
        return None

    def module(self) -> FeedbackSNN:
        torch.manual_seed(self.number(0, 2**16))
        shape = start = (self.number(1, 2), self.number(2, 6), self.number(2, 6))
        chain, shapes = [], []
        for _ in range(self.number(1, 4)):
            connection, shape = self.next(shape)
            chain.append(connection)
            shapes.append(shape)
        pairs = [(a, b) for a in range(len(shapes)) for b in range(a + 1)]
        wanted = self.pick.draw(st.lists(st.sampled_from(pairs), max_size=3))
        loops = [(a, b, back) for a, b in wanted if (back := self.back(shapes[a], shapes[b])) is not None]
        net = FeedbackSNN(
            name="drawn",
            input_shape=start,
            input=chain[0],
            hidden=chain[1:],
            feedback=loops,
            readout=nn.Linear(int(np.prod(shape)), 3),
            neuron=Neuron(**self.one_of(NEURONS), leak=self.one_of([1.0, 1.0, 0.95, 0.7])),
            time_steps=self.number(1, 20),
            feedback_steps=self.number(1, 30),
            scale_factor=20.0,
            normalize=self.one_of([None, Normalize(mean=0.3, std=0.4)]),
        ).double()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name.endswith("weight"):
                    parameter.mul_(2.0)
        return net.eval()


NEURONS = (
    {"threshold": 1.0, "u_rest": -1.0, "threshold_back": 0.5, "u_rest_back": -0.5},
    {"threshold": 1.0, "u_rest": 0.0, "threshold_back": 1.0, "u_rest_back": 0.0},
    {"threshold": 0.6180339887, "u_rest": -0.4142135623, "threshold_back": 0.3819660112, "u_rest_back": -0.1732050807},
)
"""The papers', resting at zero, and numbers without a pattern."""


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pick=st.data())
def test_floating_point_is_any_drawn_module_in_float64(pick: Any) -> None:
    """Convolutions with strides, groups and standardised weights, transposed ones, pools, several feedback connections, leaks, a single neuron."""
    net = Drawn(pick).module()
    draw = np.random.default_rng(0)
    images, labels = draw.random((5, *net.input_shape)), draw.integers(0, net.classes, 5)
    assert_equal_to_the_module(net, images, labels, batch=2)


@pytest.mark.parametrize("timing", ["exact", "pipelined"])
def test_all_or_nothing(network_graph: Any, network_inputs: Any, assert_identical: Any, timing: Any) -> None:
    """Rates of 0 and of 1: no spike in one network, one at every step in the other, and masks that let nothing through in either."""
    for numbers, rate in (("silent", 0), ("always", 5)):
        graph = Retime(timing)(network_graph("strides", numbers))
        inputs, errors = network_inputs(graph, 3)
        with LavaSim(batch=2, trace=True).compile(graph) as run:
            forward, back = run.run(inputs), run.run(errors, phase="feedback")
        expected = Reference(trace=True).compile(graph)
        assert_identical(forward, expected.run(inputs))
        assert_identical(back, expected.run(errors, phase="feedback"))
        assert all((forward.counts[p.name] == rate).all() for p in graph.of_kind("couple"))
        assert not any(codec.mask(graph, forward, p.name).any() for p in graph.of_kind("couple"))
