"""The catalogue: every network has its file, its weights and its card."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import toolchain
from toolchain import data, methods, models
from toolchain.errors import UsageError
from toolchain.layers import describe

PARAMETERS = {"mnist-fc": 478_010, "mnist-fc2": 418_810, "digits-fc": 3_434, "fashion-fc": 478_811} | {
    "fashion-r400": 478_010,
    "mnist-ide": 478_010,
    "mnist-dsr": 318_811,
    **dict.fromkeys(("mnist-ottt-a", "mnist-ottt-o", "mnist-saf-e"), 318_010),
    "mnist-saf-f": 636_010,
}
SHIPPED = [name for name in models.names() if models.get(name).shipped]
ACCURACY = {name: ("mnist-1k", 0.97) for name in SHIPPED if name.startswith("mnist-")} | {
    "digits-fc": ("digits", 0.88),
    "convnet-f": ("mnist-1k", 0.985),
    "lenet": ("mnist-1k", 0.98),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_networks_have_their_size(name: str) -> None:
    built = models.get(name).build(seed=3)
    assert sum(p.numel() for p in built.parameters()) == PARAMETERS[name]
    again = models.get(name).build(seed=3).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in built.state_dict().items())
    assert not torch.equal(next(models.get(name).build(seed=4).parameters()), next(built.parameters()))


@pytest.mark.parametrize("name", [name for name in SHIPPED if name in ACCURACY])
def test_shipped_weights_do_what_the_card_says(name: str) -> None:
    model = models.load(name)
    assert describe(model) == describe(models.get(name).build())
    dataset, least = ACCURACY[name]
    images = data.load(dataset)
    with torch.no_grad():
        predicted = model(torch.from_numpy(images.images)).argmax(1).numpy()
    assert (predicted == images.labels).mean() >= least
    card = models.get(name).weights.with_suffix(".md").read_text()
    assert f"`toolchain train {name} -o RUN" in card
    assert "Licence" in card


@pytest.mark.parametrize("name", [name for name in SHIPPED if name in ACCURACY])
def test_weights_have_no_outliers_that_cost_8_bit_precision(name: str) -> None:
    for key, weight in models.load(name).state_dict().items():
        if weight.ndim == 2:
            assert float(weight.abs().max()) < 20 * float(weight.std()), key


def test_a_trained_network_of_every_method_is_shipped() -> None:
    assert {models.get(name).method for name in SHIPPED} == set(methods.NAMES)
    assert describe(models.load("fashion-fc")) == describe(models.get("fashion-fc").build())


def test_unknown_networks_list_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"digits-fc.*mnist-fc, mnist-fc2"):
        models.get("resnet")


def test_networks_without_shipped_weights_say_so() -> None:
    assert not models.get("vgg-f").shipped
    for use in (models.load, toolchain.deploy):
        with pytest.raises(UsageError, match="no trained weights are shipped for 'vgg-f': train it with `toolchain train vgg-f -o RUN`"):
            use("vgg-f", **({"target": "sim"} if use is toolchain.deploy else {}))


def test_the_catalogue_is_listed_without_torch() -> None:
    code = "import sys\nfrom toolchain.doctor import list_models\nassert len(list_models().models) > 20\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).resolve().parents[2])


def test_every_network_is_described_in_one_line() -> None:
    for name in models.names():
        spec = models.get(name)
        assert "\n" not in spec.description
        assert (Path(models.__file__).parent / f"{spec.module}.py").is_file()
        assert np.isfinite(spec.training.lr)
