"""The local rule: what is learned equals the gradient that torch derives, rounding at random is fair, and who can learn is said."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from toolchain import codec, plasticity
from toolchain.compiler import lowered
from toolchain.errors import GraphError
from toolchain.feedback import both_phases
from toolchain.ir import Graph, Identity
from toolchain.layers import FeedbackSNN, Neuron
from toolchain.learn import in_integers
from toolchain.passes import FLOAT_PIPELINE
from toolchain.source import Source
from toolchain.targets.reference import REFERENCE


def neuron(leak: float = 1.0) -> Neuron:
    return Neuron(threshold=1.0, u_rest=-1.0, threshold_back=0.5, u_rest_back=-0.5, leak=leak)


def dense(leak: float = 1.0) -> FeedbackSNN:
    torch.manual_seed(1)
    return FeedbackSNN(
        name="dense",
        input_shape=(6,),
        input=nn.Linear(6, 8),
        hidden=[nn.Linear(8, 5)],
        feedback=[(1, 0, nn.Linear(5, 8, bias=False))],
        readout=nn.Linear(5, 3),
        neuron=neuron(leak),
        time_steps=30,
        feedback_steps=100,
        scale_factor=8.0,
    ).eval()


def convolved() -> FeedbackSNN:
    """Stride 2, an odd size, groups, dilation, a pool, and a transposed convolution across two layers."""
    torch.manual_seed(2)
    input, readout = nn.Conv2d(2, 4, 3, 2, 1), nn.Linear(3 * 3 * 2, 3)
    hidden = [nn.Conv2d(4, 4, 3, 1, 2, dilation=2, groups=2), nn.AvgPool2d(2, 1), nn.Conv2d(4, 3, 2)]
    with torch.no_grad():
        for connection in (input, hidden[0], hidden[2]):
            connection.weight *= 3
            connection.bias += 0.3
    return FeedbackSNN(
        name="convolved",
        input_shape=(2, 9, 7),
        input=input,
        hidden=hidden,
        feedback=[(3, 0, nn.ConvTranspose2d(3, 4, 3, bias=False))],
        readout=readout,
        neuron=neuron(),
        time_steps=30,
        feedback_steps=100,
        scale_factor=16.0,
    ).eval()


NETWORKS = {"dense": dense, "leaky": lambda: dense(0.9), "convolved": convolved}


def graded(module: FeedbackSNN) -> Graph:
    return FLOAT_PIPELINE.with_options(inject={"mode": "graded"})(lowered(Source(module.name, module, None)))


def batch(module: FeedbackSNN, samples: int = 5) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(3)
    return draw.random((samples, *module.input_shape)), draw.integers(0, 3, samples)


def gradients_by_the_rule(graph: Graph, images: np.ndarray, labels: np.ndarray, gain: float) -> dict[str, np.ndarray]:
    """-(change of each tensor) at a learning rate of 1, in the model's unit and not rounded."""
    with REFERENCE.compile(graph) as run:
        forward = run.run(images)
        back = run.run(codec.output_error(graph, forward, labels, gain), phase="feedback")
    message, encoded = plasticity.error_message(graph, forward, labels), codec.encode_input(graph, codec.check_inputs(graph, images))
    found = {}
    for plastic in plasticity.plastics(graph):
        r = np.zeros(0) if plastic.source is None else plasticity.sent(graph, plastic, forward, encoded)
        product = plasticity.correlation(graph, plastic, r, plasticity.post(graph, plastic, forward, back, message))
        found[plastic.tensor] = product * plasticity.rate(plastic, 1.0, gain, len(labels)) * plastic.step
    return found


@pytest.mark.parametrize("name", list(NETWORKS))
def test_in_floats_every_tensor_learns_by_spides_gradient(name: str) -> None:
    module = NETWORKS[name]()
    graph, (images, labels) = graded(module), batch(module)
    with REFERENCE.compile(graph) as run:
        expected = both_phases(run, Source(module.name, module, None), images, labels, 16.0)
    found = gradients_by_the_rule(graph, images, labels, 16.0)
    assert found.keys() == expected.gradients.keys()
    for tensor, gradient in expected.gradients.items():
        assert np.abs(gradient).max() > 0, f"nothing to compare in {tensor}"
        learned = found[tensor]
        if learned.size != gradient.size:  # a bias of a convolution: on the chip every neuron has its own
            learned = learned.reshape(len(gradient), -1).sum(axis=1)
        np.testing.assert_allclose(learned.reshape(gradient.shape), gradient, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_in_integers_the_rule_is_that_of_the_floats_they_stand_for(name: str) -> None:
    """Units, exponents and pools are right: what is left are thresholds, inputs and errors rounded, which move a spike here and there."""
    module = NETWORKS[name]()
    floats, (images, labels) = graded(module), batch(module, 40)
    graph = in_integers(floats, reach=1.0)
    stored = {p.tensor: plasticity.in_floats(p, graph.tensors[p.tensor]) for p in plasticity.plastics(graph)}
    exact = gradients_by_the_rule(plasticity.with_tensors(floats, stored), images, labels, 120.0)
    rounded = gradients_by_the_rule(graph, images, labels, 120.0)
    for tensor, gradient in exact.items():
        a, b = gradient.ravel(), rounded[tensor].ravel()
        assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.95, tensor
        assert 0.85 < np.sqrt((b @ b) / (a @ a)) < 1.15, tensor


def test_products_of_integers_are_exact() -> None:
    graph = in_integers(graded(convolved()), reach=1.0)
    draw = np.random.default_rng(0)
    for plastic in plasticity.plastics(graph):
        if plastic.source is None:
            continue
        r = draw.integers(-(2**20), 2**20, (3, *graph.population(plastic.source).shape))
        q = draw.integers(-(2**18), 2**18, (3, *graph.population(plastic.target).shape))
        product = plasticity.correlation(graph, plastic, r, q)
        assert product.dtype == np.int64
        parts = sum(plasticity.correlation(graph, plastic, r[i : i + 1], q[i : i + 1]) for i in range(3))
        np.testing.assert_array_equal(product, parts)
        np.testing.assert_array_equal(plasticity.correlation(graph, plastic, r, 2 * q), 2 * product)


def plastic_weight(bounds: tuple[int, int] | None = (-128, 127)) -> plasticity.Plastic:
    return plasticity.Plastic(0, "w", "a", "b", (), bounds, 1.0, 1.0)


def test_rounding_at_random_is_fair_and_repeatable() -> None:
    values, product = np.zeros((200, 200), np.int64), np.full((200, 200), 1)
    made = plasticity.changed(plastic_weight(), values, product, 0.3, seed=1, update=0)
    assert set(np.unique(made)) == {-1, 0}
    assert abs(made.mean() + 0.3) < 4 * np.sqrt(0.3 * 0.7 / values.size)
    np.testing.assert_array_equal(made, plasticity.changed(plastic_weight(), values, product, 0.3, seed=1, update=0))
    for seed, update in ((1, 1), (2, 0)):
        assert not np.array_equal(made, plasticity.changed(plastic_weight(), values, product, 0.3, seed=seed, update=update))


def test_a_change_of_whole_steps_is_not_rounded_and_mantissas_stay_in_bounds() -> None:
    values, product = np.array([0, 120, -120]), np.array([-3, -50, 50])
    assert plasticity.changed(plastic_weight(), values, product, 1.0, 0, 0).tolist() == [3, 127, -128]
    assert plasticity.changed(plastic_weight(None), values / 1.0, product, 1.0, 0, 0).tolist() == [3.0, 170.0, -170.0]


def test_room_to_learn() -> None:
    """A grid for weights that reach two thresholds, and no finer copy: what is stored stands for the weight to half a step."""
    floats = graded(dense())
    graph = in_integers(floats, reach=2.0)
    for plastic in plasticity.plastics(graph):
        if plastic.bounds is not None and plastic.source is not None:
            assert 1.98 <= plastic.step * 128 <= 4.2, plastic.tensor
            stored = plasticity.in_floats(plastic, graph.tensors[plastic.tensor])
            assert np.abs(stored - floats.tensors[plastic.tensor]).max() <= plastic.step / 2 * 1.0001


def test_hidden_and_readout_learn_apart() -> None:
    graph = graded(dense())
    hidden, readout = plasticity.plastics(graph, readout=False), plasticity.plastics(graph, hidden=False)
    assert {p.tensor for p in readout} == {"readout.weight", "readout.bias"}
    assert {p.tensor for p in hidden} == {"input.weight", "input.bias", "hidden.0.weight", "hidden.0.bias", "feedback.0.weight"}
    assert [p.on_host for p in readout] == [False, True]


def test_a_connection_of_the_host_cannot_learn_on_the_target() -> None:
    graph = FLOAT_PIPELINE(lowered(Source("dense", dense(), None)))
    with pytest.raises(
        GraphError, match="the host applies the first connection, which therefore cannot learn on the target: inject graded input"
    ):
        plasticity.plastics(graph)


def test_a_connection_without_a_weight_is_refused_also_where_it_would_not_learn() -> None:
    graph = graded(dense())
    forward = graph.phase("forward")
    first = msgspec.structs.replace(forward.synapses[0], ops=(Identity(),))
    bare = msgspec.structs.replace(forward, synapses=(first, *forward.synapses[1:]))
    broken = msgspec.structs.replace(graph, phases=(bare, graph.phase("feedback")))
    with pytest.raises(GraphError, match="has 0 weights: one that learns has exactly one, fold the graph"):
        plasticity.plastics(broken, hidden=False)
