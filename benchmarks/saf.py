"""SAF's own claim: forward multiply-adds, time a training step and peak memory of SAF-E and SAF-F beside OTTT_O, on one network in one run.

python benchmarks/saf.py [--model vgg-sws] [--batch 16] [--steps 3]

Random images of the network's size, the network's own T, its initial weights. Multiply-adds are counted operation by operation as torch runs them, outside
the backward pass, a sample and training step. Time is the median of --steps steps on one thread: quote the ratios. Memory is what the process grows by, at the most,
from before the first step (gradients and momentum included, alike for all), each method in a process of its own. The last line is the table as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from toolchain import methods, models
from toolchain.versions import versions

METHODS = ("ottt-o", "saf-e", "saf-f")


class ForwardCount(TorchDispatchMode):
    """Multiply-adds of every product that is not part of a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch._C._current_graph_task_id() == -1:  # -1: no backward pass is running
            self.products += multiply_adds(func.overloadpacket.__name__, args, out)
        return out


def multiply_adds(operation: str, args: Sequence[Any], out: Any) -> int:
    """Of one torch operation: matrix products and convolutions (groups 1)."""
    if operation in ("mm", "addmm", "addmm_"):
        left, right = args[-2:]
        return int(left.shape[0] * left.shape[1] * right.shape[1])
    if operation == "convolution":
        values, weight, transposed = args[0], args[1], args[6]
        return int((values if transposed else out).numel() * weight[0].numel())
    return 0


def measure(model: str, method: str, batch: int, steps: int) -> dict[str, float]:
    """Multiply-adds a sample, seconds a step, and bytes; in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = models.get(model).build()
    net.train()
    net.weighted_readout = method == "saf-f" or net.neuron.leak == 1
    chosen, generator = methods.get(method), torch.Generator().manual_seed(0)
    images, labels = torch.rand(batch, *net.input_shape), torch.arange(batch) % net.classes
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        chosen.gradients(net, images, labels, generator, optimizer.step)
        optimizer.step()

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with ForwardCount() as counted:
        step()
    seconds = []
    for _ in range(steps):
        began = perf_counter()
        step()
        seconds.append(perf_counter() - began)
    return {"products": counted.products / batch, "seconds": median(seconds), "bytes": resident("VmHWM") - before}


def resident(name: str) -> int:
    """A line of the process's own status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="vgg-sws")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", choices=METHODS, help="one method, in this process, as JSON")
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps(measure(asked.model, asked.only, asked.batch, asked.steps)))
        return
    found = {}
    for method in METHODS:
        command = [
            sys.executable,
            __file__,
            "--only",
            method,
            "--model",
            asked.model,
            "--batch",
            str(asked.batch),
            "--steps",
            str(asked.steps),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found[method] = json.loads(done.stdout)
    first = found[METHODS[0]]
    time_steps = models.get(asked.model).build().time_steps
    print(
        f"{asked.model}, T {time_steps}, batch {asked.batch}, median of {asked.steps} steps, one thread; {platform.machine()}; {versions()}"
    )
    print(
        "| method | forward multiply-adds a sample | ratio | seconds a step | ratio | peak memory | ratio |\n|---|---|---|---|---|---|---|"
    )
    for method, one in found.items():
        print(
            f"| {method} | {one['products']:,.0f} | {one['products'] / first['products']:.2f} | {one['seconds']:.3f} | {one['seconds'] / first['seconds']:.2f} "
            f"| {one['bytes'] / 2**20:.1f} MiB | {one['bytes'] / first['bytes']:.2f} |"
        )
    print(json.dumps({"model": asked.model, "batch": asked.batch, "rows": found, "versions": versions()}))


if __name__ == "__main__":
    main()
