"""Connections of every kind: their linear parts against autograd, their descriptions, and sentences for what does not fit."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from toolchain import network as plain
from toolchain.errors import GraphError, UsageError
from toolchain.layers import (
    FeedbackSNN,
    Frobenius,
    Gain,
    Limited,
    Neuron,
    Scale,
    Spectral,
    Standardized,
    TrainedThreshold,
    build,
    current,
    describe,
)
from toolchain.layers import connections as kinds
from toolchain.lower import lower

CONNECTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(12, 5), (3, 2, 2)),
    "convolution": (nn.Conv2d(3, 4, 3, 2, 1), (3, 7, 6)),
    "wide stride": (nn.Conv2d(3, 4, 2, 3), (3, 7, 6)),
    "groups": (nn.Conv2d(6, 9, 3, 2, 1, groups=3), (6, 7, 6)),
    "channel by channel": (nn.Conv2d(3, 6, 3, 1, 1, groups=3, bias=False), (3, 4, 5)),
    "dilation": (nn.Conv2d(3, 4, 3, 2, 2, dilation=2), (3, 8, 7)),
    "rectangles": (nn.Conv2d(4, 6, (3, 2), (1, 3), (2, 0), dilation=(3, 1), groups=2), (4, 7, 9)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), (3, 4, 5)),
    "transposed in groups": (nn.ConvTranspose2d(6, 9, 3, 2, 1, 1, groups=3), (6, 4, 5)),
    "transposed with dilation": (nn.ConvTranspose2d(3, 4, 3, 2, 2, 2, dilation=3), (3, 4, 5)),
    "transposed rectangles": (nn.ConvTranspose2d(4, 6, (3, 2), (1, 3), (2, 0), (1, 2), groups=2, dilation=(3, 1)), (4, 4, 5)),
    "pool": (nn.AvgPool2d(2), (3, 5, 4)),
    "overlapping pool": (nn.AvgPool2d(3, 2, 1), (3, 5, 4)),
    "spaced pool": (nn.AvgPool2d(2, 3), (3, 7, 6)),
    "shrinking pool": (nn.AdaptiveAvgPool2d(2), (3, 5, 4)),
    "growing pool": (nn.Sequential(nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(7)), (3, 3, 2)),
    "identity": (nn.Identity(), (3, 3, 2)),
    "gain": (nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), Gain(0.7), Scale(0.2)), (3, 3, 2)),
    "upsample": (nn.Upsample(scale_factor=2, mode="nearest"), (3, 3, 2)),
    "scale": (Scale(2.74), (3, 3, 2)),
    "normalised": (nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4)), (3, 5, 5)),
    "normalised values": (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), (6,)),
    "normalised alone": (nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(2)), (3, 4, 4)),
    "standardised": (nn.Sequential(Scale(2.74), nn.AvgPool2d(2), Standardized(nn.Conv2d(3, 4, 3, 1, 1))), (3, 6, 6)),
    "groups normalised": (nn.Sequential(nn.Conv2d(4, 6, 3, 1, 1, groups=2), nn.BatchNorm2d(6)), (4, 5, 5)),
    "transposed groups normalised": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2, dilation=2), nn.BatchNorm2d(6)), (4, 3, 5)),
    "groups standardised": (Standardized(nn.Conv2d(4, 6, (3, 1), 1, (2, 0), dilation=(2, 1), groups=2)), (4, 6, 5)),
    "groups limited": (Limited(nn.Conv2d(4, 6, 3, 1, 1, groups=2, bias=False), Spectral(0.5)), (4, 5, 5)),
    "transposed groups limited": (Limited(nn.ConvTranspose2d(4, 6, (2, 3), 2, groups=2), Frobenius(0.5)), (4, 3, 3)),
    "standardised values": (Standardized(nn.Linear(12, 5)), (3, 2, 2)),
    "spectral": (Limited(nn.Conv2d(3, 4, 3, 1, 1, bias=False), Spectral(0.5)), (3, 5, 5)),
    "frobenius": (Limited(nn.ConvTranspose2d(3, 4, 3, 2, 1, 1, bias=False), Frobenius(0.5)), (3, 4, 4)),
    "grown": (nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, 3, 1, 1)), (3, 3, 3)),
}


@pytest.fixture(params=CONNECTIONS, name="connection")
def _connection(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    module, shape = CONNECTIONS[request.param]
    module = module.double().eval()
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.weight)
    return module, shape


def test_the_linear_part_and_its_transpose(connection: tuple[nn.Module, tuple[int, ...]]) -> None:
    module, shape = connection
    x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    made = current(module, x)
    assert made.shape[1:] == plain.output_shape(kinds.describe(module, "it"), shape, "it")
    assert torch.allclose(made, module(x.flatten(1) if made.ndim == 2 and len(shape) == 3 else x))
    linear = made - current(module, torch.zeros_like(x))
    back = torch.randn_like(made)
    (transposed,) = torch.autograd.grad(made, x, back)
    alone = kinds.constant(module, shape)
    assert torch.allclose(current(module, torch.zeros_like(x))[:1], torch.zeros(()).double() if alone is None else alone, atol=1e-14)
    prepared = kinds.prepare(module, shape, "it", 1.5)
    total, spread = torch.ones_like(made), torch.ones_like(x)
    prepared.add(total, x.detach())
    prepared.add_transposed(spread.detach_(), back)
    assert torch.allclose(total, 1 + 1.5 * linear, atol=1e-12)
    assert torch.allclose(spread, 1 + 1.5 * transposed, atol=1e-12)


def test_a_connection_is_built_again_from_its_description(connection: tuple[nn.Module, tuple[int, ...]]) -> None:
    module, _ = connection
    described = kinds.describe(module, "it")
    stored = msgspec.json.decode(msgspec.json.encode(described), type=plain.Connection)
    again = kinds.build(stored)
    assert kinds.describe(again, "it") == described
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in module.state_dict().items()}


def network(**changes: Any) -> FeedbackSNN:
    settings: dict[str, Any] = {
        "name": "images",
        "input_shape": (2, 8, 8),
        "input": nn.Conv2d(2, 3, 3, 2, 1),
        "hidden": [nn.AvgPool2d(2), nn.Linear(12, 6)],
        "feedback": [(0, 0, Limited(nn.Conv2d(3, 3, 3, 1, 1, bias=False), Spectral())), (2, 0, nn.Linear(6, 48, bias=False))],
        "readout": nn.Linear(6, 4),
        "time_steps": 12,
    }
    return FeedbackSNN(**{**settings, **changes})


def test_a_network_of_every_kind_is_built_again() -> None:
    model = network(
        dropout=0.1,
        dropout_of={"hidden.1": 0.5},
        weighted_readout=False,
        trained_threshold=TrainedThreshold(0.3, 0.3, tau=1.0),
        readout=None,
    )
    again = build(msgspec.json.decode(msgspec.json.encode(describe(model)), type=plain.Network))
    assert describe(again) == describe(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert model.dropout_shares() == {"input": 0.1, "hidden.0": 0.1, "hidden.1": 0.5, "feedback.0": 0.1, "feedback.1": 0.1}
    assert model.layer_shapes() == ((3, 4, 4), (3, 2, 2), (6,))
    assert model.classes == 6


def test_pooling_is_a_spiking_layer() -> None:
    model = network().double()
    counts = model.equilibrium(torch.rand(3, 2, 8, 8) * 4).counts
    assert counts[1].shape == (3, 3, 2, 2)
    assert 0 < int(counts[1].sum()) < 12 * counts[1].numel()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": nn.Conv2d(1, 3, 3)}, r"input connection takes 1 channels but its source has shape \(2, 8, 8\)"),
        ({"hidden": [nn.Linear(48, 12), nn.Conv2d(3, 3, 3)]}, r"hidden connection 1 needs a source of shape \(channels, height, width\)"),
        ({"hidden": [nn.AvgPool2d(8), nn.Linear(12, 6)]}, "leaves nothing of its source"),
        ({"hidden": [nn.AvgPool2d(3, 2, ceil_mode=True), nn.Linear(12, 6)]}, "pools with ceil_mode"),
        ({"hidden": [nn.AvgPool2d(2, 1, 1, count_include_pad=False), nn.Linear(12, 6)]}, "without the padding's zeros"),
        ({"hidden": [nn.AdaptiveAvgPool2d((2, 3)), nn.Linear(12, 6)]}, "give one number for height and width"),
        ({"input": nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), Gain(float("nan")))}, "scales by nan"),
        ({"hidden": [nn.AvgPool2d((2, 1)), nn.Linear(24, 6)]}, "give one number for height and width"),
        ({"input": nn.Conv2d(2, 3, 3, 2, 1, padding_mode="reflect")}, "pads with 'reflect': leave padding_mode at 'zeros'"),
        ({"input": nn.Conv2d(2, 3, 3, 1, "same")}, "a kernel, stride or padding of 'same': give whole numbers"),
        ({"input": nn.Conv2d(2, 3, 3, 2, 1, dilation=0)}, "dilation 0 and padding 1: give at least 1"),
        ({"input": nn.Conv2d(2, 3, 3, 2, 0, dilation=(1, 4))}, "leaves nothing of its source"),
        (
            {"input": nn.ConvTranspose2d(2, 3, 3, 2, 1, (1, 2))},
            r"output padding \(1, 2\), stride 2 and dilation 1: keep the output padding",
        ),
        ({"input": nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU())}, "ReLU, which is not supported yet"),
        ({"input": nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.BatchNorm2d(4))}, "normalises 4 features"),
        ({"input": nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.BatchNorm1d(3))}, "BatchNorm1d: use the other"),
        (
            {"feedback": [(0, 0, nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1, bias=False), nn.BatchNorm2d(3)))]},
            "feedback 0 has batch normalisation",
        ),
        ({"feedback": [(1, 0, nn.Conv2d(3, 3, 3, 1, 1, bias=False))]}, r"makes shape \(3, 2, 2\) but layer 0 has \(3, 4, 4\)"),
        ({"feedback": [(0, 0, Limited(nn.Conv2d(3, 3, 3, 1, 1, bias=False), Spectral(0.0)))]}, "limited to norm 0.0"),
        ({"readout": nn.AvgPool2d(2), "hidden": []}, "readout makes shape"),
        ({"dropout_of": {"hidden.7": 0.1}}, "drops out of 'hidden.7': choose one of input, hidden.0"),
        ({"dropout_of": {"input": 1.0}}, r"has dropout 1.0 of 'input'"),
        ({"skips": [(1, 0, nn.Identity())]}, "skip 0 joins layer 1 and layer 0: lead to a later layer"),
        ({"skips": [(0, 3, nn.Identity())]}, "skip 0 joins layer 0 and layer 3: lead to a later layer, of 0 to 2"),
        ({"skips": [(-1, 1, nn.Identity())]}, "skip 0 joins layer -1"),
        ({"skips": [(0, 1, nn.Identity())]}, r"skip 0 makes shape \(3, 4, 4\) but layer 1 has \(3, 2, 2\)"),
        ({"relays": [3]}, r"has relays \[3\]: name layers of 0 to 2"),
        ({"relays": [1, 0]}, "each once, in order"),
        ({"relays": [0, 1, 2]}, "has relays only"),
        ({"trained_threshold": TrainedThreshold(alpha=1.5)}, "alpha = 1.5"),
        ({"trained_threshold": TrainedThreshold(threshold=0.0)}, "not above 0"),
        (
            {"input": Standardized(nn.Conv2d(2, 3, 3, 2, 1)), "hidden": [Standardized(nn.Linear(48, 1)), Standardized(nn.Linear(1, 6))]},
            "no variance",
        ),
        ({"input": nn.Conv2d(2, 3, 3, 2, 1), "hidden": [nn.Linear(48, 6), *2 * [nn.Linear(6, 6)]], "feedback": []}, "one module for two"),
    ],
)
def test_parts_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        network(**changes)


SEVERAL = "has several parts with weights, {}: put a layer of neurons or a relay between them"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"input": nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), Standardized(nn.Conv2d(3, 3, 1)))},
            r"connection 'input' of 'images' " + SEVERAL.format(r"'input.0' \(Conv2d\), 'input.1' \(Standardized\)"),
        ),
        (
            {"hidden": [nn.AvgPool2d(2), nn.Sequential(nn.ConvTranspose2d(3, 2, 2, 2), nn.Linear(32, 6))]},
            "'hidden.1' of 'images' " + SEVERAL.format(r"'hidden.1.0' \(ConvTranspose2d\), 'hidden.1.1' \(Linear\)"),
        ),
        (
            {"hidden": [nn.Sequential(nn.Conv2d(3, 3, 2, 1, 1), nn.AdaptiveAvgPool2d(3)), nn.Linear(27, 6)]},
            "'hidden.0' of 'images' " + SEVERAL.format(r"'hidden.0.0' \(Conv2d\), 'hidden.0.1' \(AdaptiveAvgPool2d\)"),
        ),
        (
            {"input_shape": (2, 90, 90), "input": nn.Identity(), "hidden": [nn.AdaptiveAvgPool2d(52), nn.Linear(5408, 6)], "feedback": []},
            r"'hidden.0' of 'images' makes \(2, 52, 52\) of \(2, 90, 90\) in unequal windows, .* choose a size that divides 90 x 90",
        ),
    ],
)
def test_what_is_not_compiled_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        lower(network(**changes))


def test_plain_readouts_count_spikes() -> None:
    torch.manual_seed(0)
    weighted, plainly = (network(neuron=Neuron(0.5, 0.0, leak=0.5), weighted_readout=w).double() for w in (True, False))
    plainly.load_state_dict(weighted.state_dict())
    x = torch.rand(3, 2, 8, 8) * 4
    found = plainly.equilibrium(x)
    assert torch.equal(plainly(x), plainly.readout(found.counts[-1].double() / 12))
    assert torch.equal(weighted(x), weighted.readout(found.rates[-1]))


def test_a_plain_readout_does_not_leak_in_the_graph() -> None:
    model = FeedbackSNN(
        name="plain", input_shape=(3,), input=nn.Linear(3, 4), readout=nn.Linear(4, 2), neuron=Neuron(leak=0.5), weighted_readout=False
    )
    assert lower(model).phase("forward").dynamics["readout"].leak == 1.0


def test_a_limited_weight_of_zeros_stays_zero_with_finite_gradients() -> None:
    limited = Limited(nn.Linear(5, 5, bias=False), Spectral(1.0))
    with torch.no_grad():
        limited.op.weight.zero_()
    for module in (limited.train(), limited.eval()):
        out = module(torch.rand(3, 5))
        assert torch.equal(out, torch.zeros(3, 5))
        (grad,) = torch.autograd.grad(out.sum(), module.op.weight)
        assert grad.isfinite().all()
