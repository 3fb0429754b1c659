"""The networks of the papers: counts exactly as published or summed by hand, one pass, and gradients by their own method."""

from __future__ import annotations

from importlib import import_module

import msgspec
import pytest
import torch

from toolchain import methods, models
from toolchain.layers import counts, describe
from toolchain.network import Counts

EVENTS = ("nmnist", "cifar10-dvs")
LARGE = ("convnet-f-dvs", "nf-resnet-34")
NAMES = [name for name in models.names() if name not in ("mnist-fc", "mnist-fc2", "digits-fc", "fashion-fc")]

PUBLISHED = {
    "mnist-conv": (229_643, 12_544, 20.5e6),
    "nmnist-conv": (269_643, 16_384, None),
    "lenet": (606_740, 24_800, 3.85e6),
    "convnet-f": (274_826, 18_816, 12.2e6),
    "alexnet-f": (3_706_762, 155_648, 269.8e6),
    "alexnet-f-100": (5_181_412, 155_648, None),
    "alexnet-f-bn": (3_709_515, 155_648, 269.8e6),
    "alexnet-f-bn-100": (5_181_412 + 2_753, 155_648, None),
    "cifarnet-f": (11_835_146, 229_376, 793.9e6),
    "cifarnet-f-100": (14_784_356, 229_376, None),
    "cifarnet-f-bn": (11_835_146 + 4_865, 229_376, 793.9e6),
    "cifarnet-f-bn-100": (14_784_356 + 4_865, 229_376, None),
    "convnet-f-dvs": (9_586_186, 294_912, 3.83e9),
}
"""Parameters, neurons, multiply-adds a step. LeNet's published 3.85M rounds what we count as 3.8446M."""


def counted(name: str) -> Counts:
    model = models.get(name).build()
    found = counts(model)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.neurons == tuple(0 if layer in model.relays else torch.zeros(s).numel() for layer, s in enumerate(model.layer_shapes()))
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    parameters, neurons, products = PUBLISHED[name]
    found = counted(name)
    assert found.parameters == parameters
    assert sum(found.neurons) == neurons
    if products is not None:
        assert sum(found.multiply_adds.values()) == pytest.approx(products, rel=3e-3)


def test_multiply_adds_are_exact() -> None:
    assert counted("mnist-conv").multiply_adds == {"input": 25 * 64 * 196, "feedback.0": 64 * 64 * 25 * 196, "readout": 125_440}
    lenet = {"input": 15 * 25 * 784, "hidden.0": 15 * 784, "hidden.1": 40 * 15 * 25 * 196, "hidden.2": 40 * 196, "hidden.3": 1960 * 300}
    assert counted("lenet").multiply_adds == {**lenet, "readout": 3000}
    convnet = {"input": 25 * 64 * 196, "hidden.0": 64 * 64 * 25 * 49, "hidden.1": 64 * 64 * 25 * 49, "feedback.0": 64 * 64 * 9 * 49}
    assert counted("convnet-f").multiply_adds == {**convnet, "readout": 31_360}


def test_preactresnet_18_counts_as_summed_by_hand() -> None:
    """(inputs, outputs, side of the block's images): BN and conv and BN and conv, a projection where the size changes."""
    blocks = [(64, 64, 32), (64, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 8), (256, 256, 8), (256, 512, 4), (512, 512, 4)]
    for name, classes in (("preactresnet-18", 10), ("preactresnet-18-100", 100)):
        parameters, neurons, products, side = 3 * 64 * 9, [0], 3 * 64 * 9 * 32 * 32, 32
        for a, b, new in blocks:
            parameters += 2 * a + (9 * a * b + b) + 2 * b + (9 * b * b + b) + (a * b + b if a != b else 0)
            neurons += [a * side * side, b * new * new, 0]
            products += (9 * a * b + 9 * b * b + (a * b if a != b else 0)) * new * new
            side = new
        parameters += 2 * 512 + 512 * classes + classes + 2 * classes + (2 * 8 + 3)
        neurons += [512 * 16, 512, classes]
        products += 512 * 16 + 512 * classes
        found = counted(name)
        assert found.parameters == parameters
        assert found.neurons == tuple(neurons)
        assert sum(found.multiply_adds.values()) == products
        assert round(parameters / 1e6, 1) == 11.2


def test_vgg_11_counts_as_summed_by_hand() -> None:
    layers = [(2, 64, 48), (64, 128, 24), (128, 256, 12), (256, 256, 12), (256, 512, 6), (512, 512, 6), (512, 512, 3), (512, 512, 3)]
    found = counted("vgg-11-dvs")
    assert found.parameters == sum(9 * a * b + b + 2 * b for a, b, _ in layers) + 512 * 49 * 10 + 10 + 20 + 9
    assert found.neurons == (*(b * side * side for _, b, side in layers), 10)
    pools = 64 * 48 * 48 + 128 * 24 * 24 + 256 * 12 * 12 + 512 * 6 * 6 + 512 * 4 + 512 * 49
    pools -= 512 * 6 * 6 - 512 * 9 * 4  # behind 3 x 3, the last pool takes 2 x 2 of the 9 values; behind 6 x 6, all
    products = sum(9 * a * b * side * side for a, b, side in layers) + 512 * 49 * 10
    assert sum(found.multiply_adds.values()) == products + pools


@pytest.mark.parametrize(
    ("name", "inputs", "classes", "side", "published"),
    [("vgg-sws", 3, 10, 32, "9.2"), ("vgg-sws-100", 3, 100, 32, "9.3"), ("vgg-sws-dvs", 2, 10, 48, "9.2"), ("vgg-f", 3, 100, 32, "9.6")],
)
def test_otttt_vggs_count_as_summed_by_hand(name: str, inputs: int, classes: int, side: int, published: str) -> None:
    widths = [inputs, 64, 128, 256, 256, 512, 512, 512, 512]
    sides = [side, side, side // 2, side // 2, side // 4, side // 4, side // 8, side // 8]
    pairs = list(zip(widths, widths[1:], sides, strict=False))
    parameters = sum(9 * a * b + b + b for a, b, _ in pairs) + 512 * classes + classes
    products = sum(9 * a * b * s * s for a, b, s in pairs) + 512 * classes
    products += 128 * sides[1] ** 2 + 256 * sides[3] ** 2 + 512 * sides[5] ** 2 + 512 * sides[7] ** 2  # the means
    if name == "vgg-f":
        parameters += 9 * 512 * 64 + 64
        products += 9 * 512 * 64 * 32 * 32
    found = counted(name)
    assert found.parameters == parameters
    assert f"{parameters / 1e6:.1f}" == published
    assert found.neurons == tuple(b * s * s for _, b, s in pairs)
    assert sum(found.multiply_adds.values()) == products


def test_nf_resnet_34_counts_as_summed_by_hand() -> None:
    parameters, products, neurons, width, side = 3 * 64 * 49 + 2 * 64, 3 * 64 * 49 * 112**2 + 64 * 56**2 * 9, [0], 64, 56
    for channels, blocks, new in ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)):
        for _ in range(blocks):
            weights = 9 * width * channels + 9 * channels**2
            biases_and_gains = 4 * channels + 1
            if width != channels:
                weights, biases_and_gains = weights + width * channels, biases_and_gains + 2 * channels
            parameters, products = parameters + weights + biases_and_gains, products + weights * new**2
            neurons += [width * side**2, channels * new**2, 0]
            width, side = channels, new
    found = counted("nf-resnet-34")
    assert found.parameters == parameters + 512 * 1000 + 1000
    assert round(found.parameters / 1e6) == 22
    assert found.neurons == tuple(neurons)
    assert sum(found.multiply_adds.values()) == products + 512 * 49 + 512 * 1000


@pytest.mark.parametrize("name", NAMES)
def test_every_network_runs_and_learns_by_its_method(name: str) -> None:
    spec = models.get(name)
    model = spec.build(1)
    again = spec.build(1)
    assert all(torch.equal(value, other) for value, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    del again
    model.time_steps, model.feedback_steps = (5 if name == "mnist-dsr" else 2), 2  # thresholds of 6 take more than two steps to reach
    draw = torch.Generator().manual_seed(0)
    samples = 1 if name in LARGE else 2
    shape = (samples, *model.input_shape, *([2] if spec.training.dataset in EVENTS else []))
    x = torch.rand(shape, generator=draw) * (3 if spec.training.dataset in EVENTS else 1)
    made = methods.get(spec.method, model.scale_factor, spec.training.options)
    made.fits(model)
    assert model.eval()(x).shape == (samples, model.classes)
    batch = made.gradients(model.train(), x, torch.arange(samples), draw)
    assert 0 < batch.loss < 100
    missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
    assert 0 < batch.forward_rate <= 1
    end = model.hidden[-1] if model.readout is None else model.readout
    assert max(float(parameter.grad.abs().max()) for parameter in end.parameters()) > 0


def test_the_if_network_of_dsr_starts_from_its_own_thresholds() -> None:
    """The setting that preactresnet_18.py names: other neurons, the same initial weights."""
    train = import_module("toolchain.train")
    setting = "network.trained_threshold={threshold: 6.0, alpha: 0.5, bound: 0.01, tau: null, dt: 0.05}"
    chosen = train.configure("preactresnet-18", {}, [setting])
    module = train._module("preactresnet-18", chosen)
    assert {float(threshold.detach()) for threshold in module.thresholds} == {6.0}
    assert module.leak == 1
    assert torch.equal(module.input.weight, models.get("preactresnet-18").build().input.weight)


def test_descriptions_survive_a_config() -> None:
    for name in ("lenet", "preactresnet-18", "nf-resnet-34", "vgg-f"):
        described = describe(models.get(name).build())
        assert msgspec.json.decode(msgspec.json.encode(described), type=type(described)) == described
