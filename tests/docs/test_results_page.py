"""Every command on the results page is one that this version takes, and every network it names fits the method and the data set it is given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from toolchain import config, data, methods, models
from toolchain.train import configure

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results.md"
COMMANDS = sorted(set(re.findall(r"`toolchain train ([^`]+)`", PAGE.read_text())))
SIZES = {"mnist": 28 * 28, "fashion-mnist": 28 * 28, "nmnist": 2 * 34 * 34, "cifar10": 3 * 32 * 32, "cifar100": 3 * 32 * 32}


def read(command: str) -> config.Config:
    """The resolved config of a command's words after `toolchain train`."""
    model, *words = shlex.split(command)
    flags: dict[str, object] = {}
    settings: list[str] = []
    names = {"--method": "method", "--dataset": "train.dataset", "--epochs": "train.epochs", "--seed": "seed"}
    for word, value in zip(words[::2], words[1::2], strict=True):
        if word == "--set":
            settings.append(value)
        elif word in names:
            flags[names[word]] = int(value) if value.isdigit() else 0 if value == "S" else value
        else:
            assert word in ("-o", "--device"), word
    return configure(model, flags, settings)


def test_the_page_has_a_row_for_every_network_of_the_papers() -> None:
    named = {command.split()[0] for command in COMMANDS}
    assert set(models.names()) - {"digits-fc"} <= named


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_taken(command: str) -> None:
    chosen = read(command)
    assert chosen.train.dataset in data.names()
    if chosen.train.dataset in SIZES:
        channels, height, width = chosen.network.input_shape
        assert channels * height * width == SIZES[chosen.train.dataset]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "fc" in c or "r400" in c or c.startswith("mnist-")])
def test_methods_fit_the_networks_they_are_given(command: str) -> None:
    chosen = read(command)
    from toolchain.layers import build

    methods.get(chosen.method, chosen.network.scale_factor, chosen.train.options).fits(build(chosen.network))
