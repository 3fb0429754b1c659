"""What whole numbers cost: every network that comes trained, on its full test set, in floats and at 8 to 2 weight bits.

python benchmarks/quantization.py [--models mnist-fc,...] [--bits 8,6,5,4,3,2] [--input bias|graded] [--samples N] [--data-dir DIR] [--json]

Float accuracy is the module's own (target torch, float32); the integer graph runs on `sim`. Both see the same samples in the same order, so the answers are paired: a row
counts those that went from right to wrong and from wrong to right, and p is McNemar's exact test of the two (two-sided). Nothing is drawn at random; the seed is that
of the training run. With --input bias the host computes the first connection in integers of its own, and the bits are those of all others; with graded they are those of
all. Saturations are potentials held at 24 bit, cut currents injected ones beyond 13 bit of mantissa, both over all samples. SynOps a sample leave out weights that round to 0.

Held to: at 8 bits a drop of at most 0.1 points, or p above 0.05; at 4 bits at most 0.5 points. Exit code 4 where a row fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import toolchain
from toolchain import checkpoint, data, models
from toolchain.deploy import Deployment, Options, classify
from toolchain.errors import ToolchainError, UsageError
from toolchain.notation import table
from toolchain.source import Source, find
from toolchain.target import get
from toolchain.versions import versions

DROP = {8: 0.1, 4: 0.5}
"""Points that accuracy may drop by, by weight bits; at bits without an entry rows are printed and not judged."""

SIGNIFICANT = 0.05
"""At 8 bits a larger drop is held against a row only where McNemar's p is at most this."""


@dataclass(frozen=True)
class Row:
    """One network at one number of weight bits; accuracies are fractions of 1, `drop` is in points."""

    model: str
    dataset: str
    samples: int
    seed: int
    time_steps: int
    weight_bits: int
    float_accuracy: float
    accuracy: float
    drop: float
    right_to_wrong: int
    wrong_to_right: int
    p: float
    saturations: int
    clipped_currents: int
    synaptic_operations_per_sample: float | None

    @property
    def passed(self) -> bool | None:
        """Whether the row keeps to its limit; None where there is none."""
        if self.weight_bits not in DROP:
            return None
        return self.drop <= DROP[self.weight_bits] + 1e-9 or (self.weight_bits == 8 and self.p > SIGNIFICANT)

    def cells(self) -> list[str]:
        verdict = {None: "", True: "pass", False: "FAIL"}[self.passed]
        operations = "" if self.synaptic_operations_per_sample is None else f"{self.synaptic_operations_per_sample:,.0f}"
        return [
            self.model,
            f"{self.weight_bits}",
            f"{100 * self.float_accuracy:.2f}",
            f"{100 * self.accuracy:.2f}",
            f"{self.drop:+.2f}",
            f"{self.right_to_wrong}",
            f"{self.wrong_to_right}",
            f"{self.p:.3f}",
            f"{self.saturations:,}",
            f"{self.clipped_currents:,}",
            operations,
            verdict,
        ]


HEAD = ("network", "bits", "float %", "sim %", "drop", "right->wrong", "wrong->right", "p", "saturations", "cut currents", "SynOps", "")


def mcnemar(one: int, other: int) -> float:
    """Two-sided p of McNemar's exact test: how likely `one` and `other` changed answers are at least as unequal, were either way as likely."""
    changed, term, tail = one + other, 1, 1
    for k in range(min(one, other)):  # C(n, k + 1) = C(n, k) (n - k) / (k + 1), exactly
        term = term * (changed - k) // (k + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**changed))


def compared(floats: Deployment, found: Deployment, weight_bits: int, seed: int) -> Row:
    """The row of two runs over the same samples."""
    right, still = (run.predictions == run.labels for run in (floats, found))
    lost, won = int((right & ~still).sum()), int((~right & still).sum())
    return Row(
        model=floats.model,
        dataset=floats.dataset,
        samples=floats.samples,
        seed=seed,
        time_steps=found.time_steps,
        weight_bits=weight_bits,
        float_accuracy=floats.accuracy,
        accuracy=found.accuracy,
        drop=100 * (floats.correct - found.correct) / floats.samples,
        right_to_wrong=lost,
        wrong_to_right=won,
        p=mcnemar(lost, won),
        saturations=found.saturations,
        clipped_currents=found.clipped_currents,
        synaptic_operations_per_sample=found.synaptic_operations_per_sample,
    )


def measure(name: str, bits: Sequence[int], *, input: str = "bias", samples: int | None = None, data_dir: str | None = None) -> list[Row]:
    """The rows of the trained network `name`, one a number of weight bits, over the first `samples` of its test set (all by default)."""
    spec = models.get(name)
    dataset = data.load(spec.training.dataset, samples=samples, data_dir=data_dir)
    seed = checkpoint.read(spec.weights).about.config.seed
    cpu = Options(device="cpu")
    floats = classify(find(name), get("torch"), "torch", dataset, cpu)
    rows = []
    for weight_bits in bits:
        made = toolchain.compile(name, target="sim", weight_bits=weight_bits, input=input, float_tensors=False).artifact
        rows.append(compared(floats, classify(Source(name, None, made), get("sim"), "sim", dataset, cpu), weight_bits, seed))
    return rows


def text(rows: Sequence[Row], input: str) -> str:
    """The table, a block a data set."""
    lines = [f"machine: {machine()}; {', '.join(f'{name} {version}' for name, version in versions().items())}; --input {input}"]
    for title in dict.fromkeys(_title(row) for row in rows):
        lines += ["", title, *table(HEAD, [row.cells() for row in rows if _title(row) == title])]
    failed = [row for row in rows if row.passed is False]
    judged = sum(row.passed is not None for row in rows)
    lines += ["", f"{judged - len(failed)} of {judged} rows with a limit keep to it (8 bits: 0.1 points, or p > 0.05; 4 bits: 0.5 points)"]
    return "\n".join(lines)


def _title(row: Row) -> str:
    return f"{row.dataset}, n = {row.samples:,}, weights of seed {row.seed}"


def machine() -> str:
    """What kind of machine this is."""
    return f"{platform.machine()}, {os.cpu_count()} cores"


def record(rows: Sequence[Row], input: str) -> dict[str, Any]:
    """Everything the table says, as JSON."""
    return {
        "input": input,
        "limits": {"drop_points": {str(bits): points for bits, points in DROP.items()}, "p": SIGNIFICANT},
        "passed": all(row.passed is not False for row in rows),
        "rows": [{**asdict(row), "passed": row.passed} for row in rows],
        "machine": machine(),
        "versions": versions(),
    }


def numbers(text: str) -> list[int]:
    """The weight bits of `8,6,4`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--bits takes whole numbers with commas between, not '{text}'") from None


def trained(text: str | None) -> list[str]:
    """The networks of `a,b`, or all that come trained; UsageError for one that does not."""
    shipped = [name for name in models.names() if models.get(name).shipped]
    asked = shipped if text is None else text.split(",")
    for name in asked:
        if not models.get(name).shipped:
            raise UsageError(f"no trained weights are shipped for '{name}': choose of {', '.join(shipped)}")
    return asked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="names with commas between; every network that comes trained by default")
    parser.add_argument("--bits", default="8,6,5,4,3,2")
    parser.add_argument("--input", default="bias", choices=("bias", "graded"))
    parser.add_argument("--samples", type=int, help="of each test set, from the first; all by default")
    parser.add_argument("--data-dir")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    try:
        rows = [
            row
            for name in trained(asked.models)
            for row in measure(name, numbers(asked.bits), input=asked.input, samples=asked.samples, data_dir=asked.data_dir)
        ]
    except ToolchainError as error:
        print(f"quantization: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(record(rows, asked.input)) if asked.json else text(rows, asked.input))
    return 0 if all(row.passed is not False for row in rows) else 4


if __name__ == "__main__":
    sys.exit(main())
