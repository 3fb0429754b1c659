"""The implicit gradient of integer graphs beside float SPIDE's: the cosine of every weight's gradient, at the batch and the steps that are trained with.

python benchmarks/feedback_gradient.py [--models mnist-fc,mnist-fc2] [--bits 8] [--batch 128] [--feedback-steps 250] [--data-dir DIR] [--json]

Each network that was trained with feedback is compiled for `sim` and given the first batch of its training set. Float SPIDE is target torch: the folded float graph
in float32, with masks, rates and errors of its own, on the same samples. The scale factor is the largest power of two (2^16, then half, and so on down to 2^-4) at which
neither side has a couple within 2 % of its bound. Beside it stands how well float SPIDE agrees with itself at a scale factor 1 % larger: its own noise, which is that of single
spikes (leaky couples forget all but the last of them, so more steps do not help). A row says by itself whether
all its cosines are at least 0.99, and whether all are within that noise: at most 0.005 below it. Exit code 4 where a row at 8 bits is neither, 2 where some couple
clips at every scale factor.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import toolchain
from toolchain import data, models
from toolchain.errors import ToolchainError, UsageError
from toolchain.versions import versions

LEAST = 0.99
NETWORKS = ("mnist-fc", "mnist-fc2", "digits-fc", "convnet-f", "mnist-ide", "fashion-fc")
"""The trained networks of the catalogue that have feedback connections."""

NUDGE = 1.01
"""Of the scale factor, for float SPIDE beside itself."""

SLACK = 0.005

LARGEST, SMALLEST = 2.0**16, 2.0**-4


def measured(name: str, bits: int, batch: int, feedback_steps: int, data_dir: str | None) -> dict[str, Any]:
    """One row: cosines by parameter at the chosen scale factor."""
    dataset = models.get(name).training.dataset
    loaded = data.load(dataset, split="train", samples=batch, data_dir=data_dir)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.fsnn"
        toolchain.compile(name, target="sim", weight_bits=bits, feedback_steps=feedback_steps, output=file)
        factor, integer, exact = unclipped(file, loaded)
        nudged = toolchain.feedback(file, loaded.images, loaded.labels, target="torch", scale_factor=factor * NUDGE, device="cpu")
    keys = [key for key in exact.gradients if "weight" in key]
    cosines = {key: cosine(integer.gradients[key], exact.gradients[key]) for key in keys}
    itself = {key: cosine(nudged.gradients[key], exact.gradients[key]) for key in keys}
    return {
        "model": name,
        "dataset": dataset,
        "samples": len(loaded),
        "weight_bits": bits,
        "feedback_steps": feedback_steps,
        "scale_factor": factor,
        "clipped": max(integer.clipped, exact.clipped),
        "silent": max(integer.silent, exact.silent),
        "clipped_errors": integer.clipped_errors,
        "cosine": cosines,
        "float_beside_itself": itself,
        "at_least_0_99": all(cosines[key] >= LEAST for key in keys),
        "within_float_noise": all(cosines[key] >= itself[key] - SLACK for key in keys),
    }


def unclipped(file: Path, loaded: data.Dataset) -> tuple[float, toolchain.Feedback, toolchain.Feedback]:
    """The largest power of two at which no couple of either side meets its bound, and both gradients there; UsageError where there is none."""
    factor = LARGEST
    while factor >= SMALLEST:
        integer, exact = (
            toolchain.feedback(file, loaded.images, loaded.labels, target=target, scale_factor=factor, device="cpu")
            for target in ("sim", "torch")
        )
        if max(integer.clipped, exact.clipped) == 0 and integer.clipped_errors == 0:
            return factor, integer, exact
        factor /= 2
    raise UsageError(
        f"couples of '{file.stem}' clip at every scale factor from {LARGEST:g} down to {SMALLEST:g}: give other samples, or leave it out of --models"
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the angle between two gradients: 0 where all of one is lost, 1 where both are zero."""
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a.ravel() @ b.ravel()) / lengths if lengths > 0 else float(not a.any() and not b.any())


def text(rows: list[dict[str, Any]]) -> str:
    return "\n".join(line for row in rows for line in lines(row))


def lines(row: dict[str, Any]) -> list[str]:
    """A row as text, and where a cosine is below 0.99 a second line with the least one."""
    cosines, itself = row["cosine"], row["float_beside_itself"]
    first = (
        f"{row['model']} ({row['weight_bits']} bits, {row['dataset']}, n {row['samples']}, T_B {row['feedback_steps']}, scale factor "
        f"{row['scale_factor']:g}, silent couples {100 * row['silent']:.0f} %): "
        + ", ".join(f"{key} {value:.4f} (float beside itself {itself[key]:.4f})" for key, value in cosines.items())
    )
    if row["at_least_0_99"]:
        return [first]
    worst = min(cosines, key=cosines.__getitem__)
    return [first, f"  below {LEAST:g}: {cosines[worst]:.4f} ({worst}); float beside itself {itself[worst]:.4f}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(NETWORKS))
    parser.add_argument("--bits", default="8")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--feedback-steps", type=int, default=250)
    parser.add_argument("--data-dir")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    try:
        rows = [
            measured(name, int(bits), given.batch, given.feedback_steps, given.data_dir)
            for name in given.models.split(",")
            for bits in given.bits.split(",")
        ]
    except ToolchainError as error:
        print(f"feedback_gradient: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({"rows": rows, "versions": versions()}) if given.json else text(rows))
    return 4 if any(row["weight_bits"] == 8 and not (row["at_least_0_99"] or row["within_float_noise"]) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
