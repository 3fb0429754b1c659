"""Learning on Lava processes beside PyTorch: readout alone, all connections in floats and with 8-bit weights, and SPIDE on the torch module.

python benchmarks/learning.py [--model digits-fc] [--dataset digits] [--samples N] [--test-samples N] [--epochs 10] [--batch 16] [--lr 1.0] [--seeds 3]
                              [--data-dir DIR] [--picture FILE.png] [--json]

Every arm starts from the same random weights of its seed and takes the same samples in the same order, by plain gradient descent at one learning rate, which falls to 0 as a cosine. The
torch arm is `toolchain.methods.spide` on the module in float32, its input normalisation moved into its weights, as a chip has none; nothing of `toolchain.learn`
is in it but the order. Accuracies are of the data set's test part, which no choice was made by, after the last epoch: means over seeds, then each seed. `--picture` plots all arms together.
Exit code 4 where all connections are not 5 points better than the readout alone, or 8 bits, floats and PyTorch lie further apart than 1 point.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import msgspec
import numpy as np
import torch

import toolchain
from toolchain import data, models
from toolchain.errors import ToolchainError, UsageError
from toolchain.files import replace_file
from toolchain.layers import FeedbackSNN, build, describe
from toolchain.lesson import decayed, order_of
from toolchain.methods import spide
from toolchain.notation import table
from toolchain.report.curves import Arm, curves
from toolchain.versions import versions

READOUT, FLOATS, BITS, TORCH = (
    "readout only, 8 bits, lava-sim",
    "all, floats, lava-sim",
    "all, 8 bits, lava-sim",
    "all, floats, PyTorch SPIDE",
)
GAIN, APART = 0.05, 0.01


def on_chip(asked: argparse.Namespace, seed: int, **options: object) -> tuple[tuple[float, ...], float]:
    """Accuracies before learning and after each epoch, and seconds."""
    found = toolchain.learn(
        asked.model,
        target="lava-sim",
        dataset=asked.dataset,
        samples=asked.samples,
        test_samples=asked.test_samples,
        epochs=asked.epochs,
        batch=asked.batch,
        seed=seed,
        settings=[f"learn.lr={asked.lr}"],
        data_dir=asked.data_dir,
        **options,  # type: ignore[arg-type]
    )
    return tuple(line.test_accuracy for line in found.curve), found.seconds


def in_torch(asked: argparse.Namespace, seed: int) -> tuple[tuple[float, ...], float]:
    """The same by SPIDE on the module."""
    train, test = (
        data.load(asked.dataset, split=split, samples=samples, data_dir=asked.data_dir)
        for split, samples in (("train", asked.samples), ("test", asked.test_samples))
    )
    module = without_normalization(models.get(asked.model).build(seed))
    began, found = time.perf_counter(), [accuracy(module, test)]
    update, updates = 0, asked.epochs * -(-len(train) // asked.batch)
    for epoch in range(1, asked.epochs + 1):
        order = order_of(len(train), seed, epoch)
        for first in range(0, len(train), asked.batch):
            rows = order[first : first + asked.batch]
            images, labels = torch.from_numpy(train.images[rows]), torch.from_numpy(train.labels[rows])
            rate = asked.lr * decayed("cosine", update, updates)
            update += 1
            made = spide.run(module, images, labels, scale_factor=float(len(rows)))
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    parameter -= rate * len(rows) / asked.batch / made.scale_factor * made.gradients[name]
        found.append(accuracy(module, test))
    return tuple(found), time.perf_counter() - began


def without_normalization(module: FeedbackSNN) -> FeedbackSNN:
    """The same network for plain images: W (x - mean) / std + b with the constants in W and b; of a convolution without padding only, where that is exact."""
    network = describe(module)
    plain = build(msgspec.structs.replace(network, normalize=None)).eval()
    weights = module.state_dict()
    if network.normalize is not None:
        weight = weights["input.weight"]
        mean, std = (torch.tensor(v).reshape(-1, *[1] * (weight.ndim - 2)) for v in (network.normalize.mean, network.normalize.std))
        if len(network.normalize.mean) > 1 or (weight.ndim > 2 and any(module.input.padding)):  # type: ignore[union-attr, arg-type]
            raise UsageError(
                f"the normalisation of '{module.name}' cannot be moved into its weights here: choose a fully connected network for grey images"
            )
        weights["input.weight"] = weight / std
        weights["input.bias"] = weights["input.bias"] - (weight * mean / std).flatten(1).sum(1)
    plain.load_state_dict(weights)
    return plain


def accuracy(module: FeedbackSNN, test: data.Dataset) -> float:
    with torch.no_grad():
        return float((module(torch.from_numpy(np.asarray(test.images))).argmax(1).numpy() == test.labels).mean())


def measured(asked: argparse.Namespace) -> tuple[list[Arm], dict[str, float]]:
    """All arms, seed by seed, and the seconds of each."""
    ways = {
        READOUT: lambda seed: on_chip(asked, seed, weights="int8", readout_only=True),
        FLOATS: lambda seed: on_chip(asked, seed, weights="float"),
        BITS: lambda seed: on_chip(asked, seed, weights="int8"),
        TORCH: lambda seed: in_torch(asked, seed),
    }
    arms, seconds = [], {}
    for name, run in ways.items():
        runs = [run(seed) for seed in range(asked.seeds)]
        arms.append(Arm(name, tuple(curve for curve, _ in runs)))
        seconds[name] = sum(spent for _, spent in runs)
    return arms, seconds


def judged(arms: list[Arm]) -> tuple[bool, str]:
    """Whether the arms are as far apart, and as near, as they are to be."""
    last = {arm.name: arm.mean[-1] for arm in arms}
    gains = {name: last[name] - last[READOUT] for name in (FLOATS, BITS)}
    apart = {f"{a} and {b}": last[a] - last[b] for a, b in ((BITS, FLOATS), (FLOATS, TORCH), (BITS, TORCH))}
    passed = all(gain >= GAIN for gain in gains.values()) and all(abs(d) <= APART for d in apart.values())
    said = [f"{name} beats the readout alone by {100 * gain:.1f} points" for name, gain in gains.items()]
    said += [f"{names} differ by {100 * d:+.1f} points" for names, d in apart.items()]
    return passed, "; ".join(said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-fc")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--test-samples", type=int)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-dir")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    try:
        arms, seconds = measured(asked)
        if asked.picture is not None:
            test = data.load(asked.dataset, samples=asked.test_samples, data_dir=asked.data_dir)
            picture = curves(arms, title=f"{asked.model} learns {asked.dataset}", samples=f"{len(test):,} test samples")
            asked.picture.parent.mkdir(parents=True, exist_ok=True)
            replace_file(asked.picture, picture.svg if asked.picture.suffix == ".svg" else picture.png)
    except ToolchainError as error:
        print(f"learning: {error}", file=sys.stderr)
        return error.exit_code
    passed, said = judged(arms)
    if asked.json:
        print(json.dumps({"arms": [asdict(arm) for arm in arms], "seconds": seconds, "passed": passed, "versions": versions()}))
        return 0 if passed else 4
    rows = [
        [
            arm.name,
            f"{100 * arm.mean[-1]:.1f}",
            ", ".join(f"{100 * run[-1]:.1f}" for run in arm.runs),
            f"{100 * arm.mean[0]:.1f}",
            f"{seconds[arm.name]:.0f}",
        ]
        for arm in arms
    ]
    print("\n".join(table(["arm", "accuracy %", "each seed", "before", "seconds"], rows)))
    print(said)
    print(
        f"{asked.model} on {asked.dataset}, {asked.epochs} epochs of batches of {asked.batch}, lr {asked.lr:g}, seeds 0 to {asked.seeds - 1}; "
        f"{platform.machine()}, {os.cpu_count()} CPUs; " + ", ".join(f"{name} {version}" for name, version in versions().items())
    )
    return 0 if passed else 4


if __name__ == "__main__":
    sys.exit(main())
