"""Where accuracy goes on the networks that come trained: the accuracy budget of `toolchain compare` on full test sets, at 8, 4 and 3 weight bits.

python benchmarks/budget.py [--models mnist-fc,...] [--bits 8,4,3] [--input bias|graded] [--samples N] [--data-dir DIR] [--json]

From the float model in its equilibrium to the integers of the chip, factor by factor (docs/compare.md): accuracy lost in points on top of the factors before, with Tango's 95 %
interval over the images, and alone. Every table closes with a check: with every factor on, the run has the integer graph's spikes, potentials and saturations. Nothing is drawn at
random; the seed is that of the training run. Exit code 4 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
from quantization import machine, numbers, trained

import toolchain
from toolchain import checkpoint, data, models
from toolchain.analysis.accuracy import Answers, accuracy_budget, settle
from toolchain.analysis.drops import AccuracyBudget
from toolchain.deploy import Options, classify
from toolchain.errors import ToolchainError
from toolchain.source import find
from toolchain.target import get
from toolchain.versions import versions

MODELS = ("mnist-fc", "mnist-fc2", "fashion-fc")


def measure(
    name: str, bits: Sequence[int], *, input: str = "bias", samples: int | None = None, data_dir: str | None = None
) -> Iterator[tuple[int, AccuracyBudget]]:
    """The budgets of the trained network `name`, one a number of weight bits, over the first `samples` of its test set (all by default)."""
    dataset = data.load(models.get(name).training.dataset, samples=samples, data_dir=data_dir)
    images, labels = np.asarray(dataset.images), dataset.labels
    torch = classify(find(name), get("torch"), "torch", dataset, Options(device="cpu"))
    settled = None
    for weight_bits in bits:
        made = toolchain.compile(name, target="sim", weight_bits=weight_bits, input=input).artifact
        assert made.float_graph is not None  # compiled with it
        settled = settled or settle(made.float_graph, made.graph, images, labels)
        yield (
            weight_bits,
            accuracy_budget(
                made.float_graph,
                made.graph,
                images,
                labels,
                dataset=dataset.name,
                first=("torch on cpu", Answers(torch.logits, torch.rates)),
                settled=settled,
            ),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--bits", default="8,4,3")
    parser.add_argument("--input", default="bias", choices=("bias", "graded"))
    parser.add_argument("--samples", type=int)
    parser.add_argument("--data-dir")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found, passed = [], True
    if not asked.json:
        print(f"machine: {machine()}; {', '.join(f'{name} {version}' for name, version in versions().items())}; --input {asked.input}")
    try:
        for name in trained(asked.models):
            seed = checkpoint.read(models.get(name).weights).about.config.seed
            began = time.perf_counter()
            for weight_bits, budget in measure(
                name, numbers(asked.bits), input=asked.input, samples=asked.samples, data_dir=asked.data_dir
            ):
                passed &= budget.closing.passed
                found.append({"model": name, "seed": seed, "weight_bits": weight_bits, **budget.to_json()})
                if not asked.json:
                    seconds = time.perf_counter() - began
                    print(
                        f"\n{name} at {weight_bits} bits, T {budget.time_steps}, seed {seed}, n = {budget.samples:,} ({seconds:.0f} s)\n{budget.to_text()}",
                        flush=True,
                    )
                    began = time.perf_counter()
    except ToolchainError as error:
        print(f"budget: {error}", file=sys.stderr)
        return error.exit_code
    if asked.json:
        print(json.dumps({"machine": machine(), "versions": versions(), "input": asked.input, "budgets": found}))
    return 0 if passed else 4


if __name__ == "__main__":
    sys.exit(main())
