"""Convolutions with groups, dilation and rectangular kernels are the matrices that they are: spikes, gradients of every method, costs, configs."""

from __future__ import annotations

import copy
from math import prod
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from toolchain import methods, native, notation
from toolchain import network as plain
from toolchain.errors import UsageError
from toolchain.layers import FeedbackSNN, Limited, Neuron, Spectral, Standardized, TrainedThreshold, build, describe
from toolchain.lower import lower
from toolchain.methods import spide

SHAPES = (2, 7, 6), (4, 4, 6), (6, 5, 3), (4, 6, 9)
"""The input's and the layers'."""


def network(**changes: Any) -> FeedbackSNN:
    """A convolution and a transposed one in groups, another with dilation, loops back and within a layer; float64."""
    torch.manual_seed(2)
    settings: dict[str, Any] = {
        "name": "shapes",
        "input_shape": SHAPES[0],
        "input": nn.Conv2d(2, 4, 3, (2, 1), (2, 1), dilation=(2, 1), groups=2),
        "hidden": [nn.Conv2d(4, 6, (2, 3), (1, 2), 1, groups=2), nn.ConvTranspose2d(6, 4, 2, (1, 3), 0, (0, 1), groups=2)],
        "feedback": [
            (1, 0, nn.ConvTranspose2d(6, 4, 2, (1, 2), (1, 0), groups=2, bias=False)),
            (2, 2, nn.Conv2d(4, 4, 3, 1, (2, 3), dilation=(2, 3), groups=4, bias=False)),
        ],
        "readout": nn.Linear(prod(SHAPES[-1]), 3),
        "time_steps": 14,
        "feedback_steps": 20,
    }
    model = FeedbackSNN(**{**settings, **changes}).double()
    with torch.no_grad():
        for module in (model.input, *model.hidden):
            module.weight.mul_(3)
            module.bias.add_(0.2)
    return model


def matrix(op: nn.Module, source: tuple[int, ...]) -> Tensor:
    """What `op` does without its bias, (outputs, inputs), as torch has it; with a gradient."""
    singles = torch.eye(prod(source), dtype=torch.float64).reshape(-1, *source)
    return (op(singles) - op(torch.zeros_like(singles[:1]))).flatten(1).t()


def convolutions(model: FeedbackSNN) -> dict[str, tuple[tuple[int, ...], nn.Module]]:
    """The source's shape and the module of each connection that is a convolution."""
    shapes = (model.input_shape, *model.layer_shapes())
    found = {name: (shapes[0 if source is None else source + 1], module) for name, (source, _, module) in model.connections().items()}
    return {name: ends for name, ends in found.items() if isinstance(ends[1], (nn.Conv2d, nn.ConvTranspose2d))}


def dense(model: FeedbackSNN) -> FeedbackSNN:
    """The same network of matrices."""
    made = copy.deepcopy(model)
    for name, (source, op) in convolutions(model).items():
        with torch.no_grad():
            linear = nn.Linear(prod(source), len(matrix(op, source)), bias=op.bias is not None).double()
            linear.weight.copy_(matrix(op, source))
            if op.bias is not None:
                linear.bias.copy_(op.bias.repeat_interleave(linear.out_features // len(op.bias)))
        where, _, index = name.partition(".")
        if index:
            getattr(made, where)[int(index)] = linear
        else:
            setattr(made, where, linear)
    return made


ONLINE = {"neuron": Neuron(1.0, 0.0, leak=0.5), "weighted_readout": False}
FITTING: dict[str, dict[str, Any]] = {
    "ide": {"neuron": Neuron(1.0, 0.0), "time_steps": 40},
    "spide": {"dropout": 0.2},
    "dsr": {"trained_threshold": TrainedThreshold(0.7), "feedback": []},
    **dict.fromkeys(("ottt-a", "ottt-o", "saf-e"), ONLINE),
    "saf-f": {"neuron": Neuron(1.0, 0.0, leak=0.9), "feedback": []},
}


@pytest.mark.parametrize("method", methods.NAMES)
def test_every_method_learns_them_as_it_learns_their_matrices(method: str) -> None:
    model = network(**FITTING[method]).train()
    same = dense(model)
    images, labels = torch.rand(5, *SHAPES[0], generator=torch.Generator().manual_seed(1)).double() * 3, torch.arange(5) % 3
    batches = []
    for one in (model, same):
        learned = methods.get(method, 100.0, {"solver": "iter"} if method == "ide" else None)
        learned.fits(one)
        batches.append(learned.gradients(one, images, labels, torch.Generator().manual_seed(4)))
    assert batches[0].loss == pytest.approx(batches[1].loss, rel=1e-12)
    assert 0.02 < batches[0].forward_rate == batches[1].forward_rate
    assert len(convolutions(model)) == 3 + len(model.feedback)
    for name, (source, op) in convolutions(model).items():
        found = same.get_submodule(name)
        (expected,) = torch.autograd.grad(matrix(op, source), op.weight, found.weight.grad)
        assert expected.abs().max() > 1e-6, name
        assert (op.weight.grad - expected).abs().max() <= 1e-9 * expected.abs().max(), name
        if op.bias is not None:
            summed = found.bias.grad.reshape(len(op.bias), -1).sum(1)
            assert (op.bias.grad - summed).abs().max() <= 1e-9 * summed.abs().max(), name


@pytest.mark.parametrize("leak", [1.0, 0.9])
def test_both_stages_fire_the_spikes_of_their_matrices_whatever_steps_them(leak: float) -> None:
    """Weights are multiples of 1/64, so that sums are exact in any order."""
    model = network(neuron=Neuron(leak=leak))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 4 * 64).round() / 64)
    same = dense(model)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(-64, 128, (3, *SHAPES[0]), generator=draw).double() / 32
    error = torch.randint(-64, 128, (3, *SHAPES[-1]), generator=draw).double() / 4
    runs = [(model, "auto"), (model, "torch"), (same, "torch"), *([(same, "native")] if native.missing() is None else [])]
    forwards = [spide.forward_stage(one, images, trace=True, kernel=kernel) for one, kernel in runs]
    backs = [
        spide.feedback_stage(one, forward, error.reshape(forward.equilibrium.rates[-1].shape), trace=True, kernel=kernel)
        for (one, kernel), forward in zip(runs, forwards, strict=True)
    ]
    for layer in range(model.layers):
        for trains in ([found.equilibrium.trains[layer] for found in forwards], [found.trains[layer] for found in backs]):
            assert trains[0].any()
            assert all(torch.equal(trains[0].flatten(2), other.flatten(2)) for other in trains[1:])


CHANGED: dict[str, dict[str, Any]] = {
    "groups": {"groups": 2},
    "dilation": {"dilation": 2, "padding": 2},
    "a rectangle": {"kernel_size": (3, 1), "padding": (1, 0)},
    "one way of padding": {"kernel_size": (1, 1), "padding": (0, 1), "stride": (1, 1)},
    "one way of striding": {"stride": (1, 2)},
}


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_the_native_kernel_leaves_them_to_torch_and_says_so_where_it_is_asked_for(kind: type[nn.Module], change: str) -> None:
    op = kind(4, 4, **{"kernel_size": 3, "padding": 1, **CHANGED[change]})
    first = nn.Conv2d(2, 4, 3, 2, 1, groups=2)  # its current is the same at every step: no kernel steps it
    chain = FeedbackSNN(name="chain", input_shape=SHAPES[0], input=first, hidden=[op], readout=None)
    assert int(chain.equilibrium(torch.rand(2, *SHAPES[0]) * 4).counts[0].sum()) > 0
    with pytest.raises(
        UsageError, match=r"no convolution with groups, dilation, or another kernel, stride or padding for height .*leave kernel at 'auto'"
    ):
        chain.equilibrium(torch.rand(2, *SHAPES[0]), kernel="native")


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_an_input_connection_in_groups_does_not_keep_the_native_kernel_away() -> None:
    hidden = nn.Conv2d(4, 4, 3, 1, 1)
    chain = FeedbackSNN(name="chain", input_shape=(2, 6, 6), input=nn.Conv2d(2, 4, 3, 2, 1, groups=2), hidden=[hidden], readout=None)
    assert int(chain.equilibrium(torch.rand(2, 2, 6, 6) * 4, kernel="native").counts[0].sum()) > 0


def test_their_costs_are_those_of_the_module_and_of_its_graph() -> None:
    model = network()
    costs, graph = plain.counts(describe(model)), lower(model)
    assert costs.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert costs.neurons == tuple(prod(shape) for shape in SHAPES[1:])
    names = (*model.connections(), "readout")
    synapses = {next(op.weight for op in synapse.ops): synapse for synapse in graph.phase("forward").synapses}
    assert costs.multiply_adds == {name: notation.synapse_products(graph, synapses[f"{name}.weight"]) for name in names}


def test_a_config_says_them_in_few_words_and_older_ones_still_load() -> None:
    model = network()
    description = describe(model)
    text = msgspec.json.encode(description)
    again = msgspec.json.decode(text, type=plain.Network)
    assert again == description == describe(build(again))
    assert {key: tensor.shape for key, tensor in build(again).state_dict().items()} == {
        key: tensor.shape for key, tensor in model.state_dict().items()
    }
    assert description.hidden[0] == plain.Conv2d(4, 6, (2, 3), (1, 2), 1, groups=2)
    older = b'{"type": "conv-transpose2d", "inputs": 4, "outputs": 3, "kernel": 3, "stride": 2, "padding": 1, "output_padding": 1, "bias": false, "limit": null}'
    found = msgspec.json.decode(older, type=plain.Connection)
    assert (found.groups, found.dilation) == (1, 1)
    assert plain.output_shape(found, (4, 5, 5), "it") == (3, 10, 10)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('"kernel": 0', r"Expected `int` >= 1 - at `\$.kernel`"),
        ('"kernel": [3, 0]', r"Expected `int` >= 1 - at `\$.kernel\[1\]`"),
        ('"kernel": [3]', r"Expected `array` of length >= 2 - at `\$.kernel`"),
        ('"kernel": [3, 3, 3]', r"Expected `array` of length <= 2 - at `\$.kernel`"),
        ('"kernel": 3, "padding": [0, -1]', r"Expected `int` >= 0 - at `\$.padding\[1\]`"),
        ('"kernel": 3, "groups": 0', r"Expected `int` >= 1 - at `\$.groups`"),
    ],
)
def test_a_config_of_impossible_sizes_is_refused(setting: str, message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.json.decode(f'{{"type": "conv2d", "inputs": 4, "outputs": 3, {setting}}}', type=plain.Connection)


def test_groups_must_divide_channels() -> None:
    with pytest.raises(UsageError, match="the input has 4 channels in and 6 out in 4 groups: groups must divide both"):
        plain.output_shape(plain.Conv2d(4, 6, 3, groups=4), (4, 5, 5), "the input")


def test_restricted_and_standardised_weights_measure_what_they_hold() -> None:
    """The norm of (first axis, rest), as without groups, and the variance over each output's own inputs."""
    torch.manual_seed(0)
    op = nn.Conv2d(4, 6, 3, groups=2)
    limited = Limited(op, Spectral(0.5)).double().eval()
    assert float(torch.linalg.matrix_norm(limited.effective().detach().flatten(1), 2)) == pytest.approx(0.5, rel=1e-9)
    rows = Standardized(op, eps=0.0).double().effective().detach().flatten(1)
    assert rows.shape == (6, 18)
    assert torch.allclose(rows.mean(1), torch.zeros(6).double(), atol=1e-12)
    assert torch.allclose(rows.var(1) * 18, torch.ones(6).double())
