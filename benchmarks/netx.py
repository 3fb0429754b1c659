"""What netx files lose: every network that comes trained and that netx carries, and two convolutional ones trained here, as files read by lava-dl and run in Lava.

python benchmarks/netx.py [--models mnist-fc,...] [--samples N] [--data-dir DIR] [--thresholds] [--json]

A row is `toolchain export MODEL --format netx --approximate`: accuracy of the file beside that of the exact graph (`deploy --target sim`) on the same samples, and on how many both answer the
same, and then the same with --calibrate, where the training data are here. digits-conv (OTTT_A) and digits-lenet (SPIDE; neurons behind every pool, as in lenet) are trained on the digits first, in a minute or two. --thresholds runs two more files of each network:
with the exact graph's own threshold in place of that halfway to the amount it subtracts, and with that amount. A network whose data are not here is left out, and that is said.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn

import toolchain
from toolchain import data, methods
from toolchain.errors import ToolchainError
from toolchain.exchange import answers, netx
from toolchain.layers import FeedbackSNN, Neuron, Normalize
from toolchain.progress import say
from toolchain.source import find
from toolchain.versions import versions

DATA = {
    "digits-fc": "digits",
    "mnist-fc": "mnist-1k",
    "mnist-ide": "mnist-1k",
    "fashion-fc": "fashion-mnist",
    "mnist-dsr": "mnist-1k",
    "mnist-ottt-a": "mnist-1k",
    "mnist-ottt-o": "mnist-1k",
    "mnist-saf-e": "mnist-1k",
    "mnist-saf-f": "mnist-1k",
    "digits-conv": "digits",
    "digits-lenet": "digits",
}


@dataclass(frozen=True)
class Row:
    """One file; accuracies and agreements are fractions of 1. The last three are accuracy and agreement of files with other thresholds: calibrated, the exact graph's, and the amount it
    subtracts; None where they were not made."""

    model: str
    blocks: str
    time_steps: int
    input_levels: int
    dataset: str
    samples: int
    exact_accuracy: float
    accuracy: float
    agreement: float
    calibrated: tuple[float, float] | None = None
    own_threshold: tuple[float, float] | None = None
    amount: tuple[float, float] | None = None

    def cells(self) -> list[str]:
        shown = [self.model, self.blocks, str(self.time_steps), f"0 to {self.input_levels}", self.dataset, f"{self.samples:,}"]
        shown += [f"{100 * part:.2f} %" for part in (self.exact_accuracy, self.accuracy, self.agreement)]
        others = (self.calibrated, self.own_threshold, self.amount)
        return shown + ["" if found is None else f"{100 * found[0]:.2f} % ({100 * found[1]:.2f} %)" for found in others]


HEAD = [
    "network",
    "blocks",
    "T",
    "input messages",
    "data",
    "n",
    "exact graph",
    "netx in Lava",
    "same answer",
    "calibrated",
    "our threshold",
    "the amount",
]
TRAINING = {"digits": "digits", "mnist-1k": "mnist", "fashion-mnist": "fashion-mnist"}
"""Whose training samples calibrate, by the data set of the row."""


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    rows = []
    for name in options.models.split(","):
        try:
            rows.append(measured(name, options))
        except ToolchainError as error:
            say(f"{name} is left out: {error}")
            continue
        if not options.json:
            if len(rows) == 1:
                print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
            print(f"| {' | '.join(rows[-1].cells())} |", flush=True)
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "versions": versions()}, indent=2))
    return 0 if rows else 1


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(DATA), help="names, with commas")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=24, help="of digits-conv and digits-lenet")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--thresholds", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def measured(name: str, options: argparse.Namespace) -> Row:
    dataset = DATA.get(name, "mnist-1k")
    loaded = data.load(dataset, samples=options.samples, data_dir=options.data_dir)
    model: Any = trained(name, options.epochs) if name in ("digits-conv", "digits-lenet") else name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.net"
        common: dict[str, Any] = {"dataset": dataset, "samples": options.samples, "data_dir": options.data_dir}
        told = toolchain.export(model, format="netx", output=path, approximate=True, **common)
        row = Row(
            name,
            ", ".join(f"{block['type']} {'x'.join(map(str, block['shape']))}" for block in told.blocks),
            told.time_steps,
            told.input_levels,
            dataset,
            told.samples,
            told.exact_accuracy,
            told.accuracy,
            told.agreement,
        )
        if data.found(TRAINING[dataset], options.data_dir):
            again = toolchain.export(model, format="netx", output=path, approximate=True, calibrate=TRAINING[dataset], **common)
            row = replace(row, calibrated=(again.accuracy, again.agreement))
        if not options.thresholds:
            return row
        exact = toolchain.deploy(model, target="sim", **common)
        found = []
        for which in ("threshold", "reset"):
            made = with_threshold(netx.chain(find(model)), which)
            path.write_bytes(netx.encoded(made))
            predicted = answers(path, made, loaded.images)
            found.append((float((predicted == loaded.labels).mean()), float((predicted == exact.predictions).mean())))
        return replace(row, own_threshold=found[0], amount=found[1])


def with_threshold(made: netx.Chain, which: str) -> netx.Chain:
    """The same blocks with the exact graph's `threshold` or `reset` (the amount it subtracts) as netx's."""
    dynamics = made.graph.phase("forward").dynamics
    firing = [replace(b, threshold=ceil(getattr(dynamics[b.population], which) / 2**b.exponent) - 1) for b in made.blocks[:-1]]
    return replace(made, blocks=(*firing, made.blocks[-1]))


def trained(name: str, epochs: int) -> FeedbackSNN:
    """A small convolutional network after `epochs` passes over the digits."""
    torch.manual_seed(0)
    first, second, full, readout = nn.Conv2d(1, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 1, 1), nn.Linear(64, 32), nn.Linear(32, 10)
    for connection in (first, second, full):
        nn.init.kaiming_normal_(connection.weight)
        nn.init.zeros_(connection.bias)
    pool = nn.AvgPool2d(2)
    common: dict[str, Any] = {"name": name, "input_shape": (1, 8, 8), "normalize": Normalize(mean=0.3, std=0.38)}
    if name == "digits-conv":
        hidden: list[nn.Module] = [nn.Sequential(pool, second), nn.Sequential(pool, full)]
        neuron = Neuron(threshold=1.0, u_rest=0.0, leak=0.5)
        model = FeedbackSNN(input=first, hidden=hidden, readout=readout, neuron=neuron, time_steps=6, weighted_readout=False, **common)
        method, rate = methods.get("ottt-a"), 0.2
    else:
        hidden = [pool, second, pool, full]
        neuron = Neuron(threshold=1.0, u_rest=-1.0, threshold_back=0.5, u_rest_back=-0.5, leak=1.0)
        model = FeedbackSNN(input=first, hidden=hidden, readout=readout, neuron=neuron, scale_factor=25.0, **common)
        method, rate = methods.get("spide", scale_factor=25.0), 0.3
    generator = torch.Generator().manual_seed(0)
    digits = data.load("digits", split="train")
    images, labels = torch.from_numpy(digits.images[:]), torch.from_numpy(digits.labels)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            method.gradients(model, images[rows], labels[rows], generator)
            optimizer.step()
    return model.eval()


if __name__ == "__main__":
    sys.exit(main())
