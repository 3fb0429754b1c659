"""One row of the results table for every kind of run: accuracy on the full test set over seeds, firing rates, wall time, and the command.

python benchmarks/results.py RUN [RUN ...] [--data-dir DIR]

RUN is a folder that `toolchain train` wrote. Runs that differ in their seed alone make one row. Accuracy is that of the float module (target torch) with the
run's checkpoint, on every test image; rates are those of the last training epoch, spikes per neuron and step; wall time is training alone. The last line is
the rows as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from statistics import mean, stdev
from typing import Any

import msgspec

from toolchain import checkpoint, config, deploy, models
from toolchain.config import Config
from toolchain.train import configure
from toolchain.versions import versions


@dataclass(frozen=True)
class Row:
    """One row: accuracies in percent, one a seed; `minutes` of training, one a seed."""

    data: str
    method: str
    network: str
    time_steps: str
    epochs: int
    chosen_by: str
    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]
    forward_rate: float
    feedback_rate: float
    minutes: tuple[float, ...]
    command: str

    def to_markdown(self) -> str:
        spread = f" ± {stdev(self.accuracies):.2f}" if len(self.accuracies) > 1 else ""
        rates = f"{self.forward_rate:.3f}" + (f" / {self.feedback_rate:.4f}" if self.feedback_rate else "")
        return (
            f"| {self.data} | {self.method} | {self.network} | {self.time_steps} | {', '.join(map(str, self.seeds))} "
            f"| {mean(self.accuracies):.2f}{spread} ({max(self.accuracies):.2f}) | {rates} | {mean(self.minutes):.0f} | `{self.command}` |"
        )


HEAD = (
    "| data | method | network | T (T_B) | seeds | test accuracy %, mean ± std (best) | rates forward / feedback | minutes a seed | command |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def settings(chosen: Config) -> str:
    """What a run changed of its network's defaults, as the flags that change it."""
    if chosen.model not in models.names():
        return ""
    flags = []
    before, now = (config.plain(c) for c in (configure(chosen.model, {"train.dataset": chosen.train.dataset}, None), chosen))
    if before["method"] != now["method"]:
        flags.append(f"--method {now['method']}")
    if models.get(chosen.model).training.dataset != chosen.train.dataset:
        flags.append(f"--dataset {now['train']['dataset']}")
    if before["train"]["epochs"] != now["train"]["epochs"]:
        flags.append(f"--epochs {now['train']['epochs']}")
    skip = {"method", "seed", "model", "train.dataset", "train.epochs"}
    changed = [(name, value) for name, value in flat(now).items() if name not in skip and flat(before).get(name) != value]
    flags += [f"--set {quote(f'{name}={json.dumps(value) if isinstance(value, (list, dict)) else value}')}" for name, value in changed]
    return "".join(f" {flag}" for flag in flags)


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        nested_names = isinstance(value, dict) and value and not any("." in name for name in value)
        found |= flat(value, f"{prefix}{key}.") if nested_names else {f"{prefix}{key}": value}
    return found


def row(folders: Sequence[Path], data_dir: str | None) -> Row:
    """The runs in `folders`, alike but for their seed, on the whole test set."""
    abouts = [checkpoint.read(folder / checkpoint.NAME).about for folder in folders]
    chosen = abouts[0].config
    lines = [[msgspec.json.decode(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()] for folder in folders]
    found = [deploy(folder, target="torch", dataset=chosen.train.dataset, data_dir=data_dir) for folder in folders]
    many = len(folders) > 1
    return Row(
        data=chosen.train.dataset,
        method=chosen.method,
        network=chosen.network.name + (f", leak {chosen.network.neuron.leak:g}" if chosen.network.trained_threshold is None else ""),
        time_steps=f"{chosen.network.time_steps}" + (f" ({chosen.network.feedback_steps})" if chosen.method == "spide" else ""),
        epochs=len(lines[0]),
        chosen_by="last epoch" if chosen.train.held_out == 0 else f"{chosen.train.held_out} held-out training images",
        seeds=tuple(about.config.seed for about in abouts),
        accuracies=tuple(100 * one.accuracy for one in found),
        forward_rate=mean(run[-1]["forward_rate"] for run in lines),
        feedback_rate=mean(run[-1]["feedback_rate"] for run in lines),
        minutes=tuple(sum(line["seconds"] for line in run) / 60 for run in lines),
        command=f"toolchain train {chosen.model or 'CONFIG.yaml'}{settings(chosen)} --seed {'S' if many else chosen.seed} -o RUN",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data-dir")
    asked = parser.parse_args()
    groups: dict[str, list[Path]] = {}
    for folder in asked.runs:
        same = config.plain(checkpoint.read(folder / checkpoint.NAME).about.config) | {"seed": None}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(folder)
    rows = [row(folders, asked.data_dir) for folders in groups.values()]
    print(
        f"machine: {platform.machine()}, {os.cpu_count()} cores; {', '.join(f'{name} {version}' for name, version in versions().items())}"
    )
    print(HEAD)
    for one in rows:
        print(one.to_markdown())
    print(json.dumps([asdict(one) for one in rows]))


if __name__ == "__main__":
    main()
