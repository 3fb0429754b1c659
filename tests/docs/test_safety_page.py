"""What docs/safety.md says of bounds, files and commands is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from toolchain import artifact, config, metrics, network
from toolchain.data import cifar10_dvs, imagenet, nmnist, places
from toolchain.exchange import hdf5_tree, onnx_files
from toolchain.ir import LARGEST_STEPS, MOST_AXES, MOST_NEURONS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "safety.md").read_text()
ROWS = {row.split("|")[1].strip(): row for row in re.findall(r"^\| .*$", PAGE, re.M)}


def size(count: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count >> power} {unit}"
    return f"{count} bytes"


@pytest.mark.parametrize(
    ("row", "bounds"),
    [
        ("`.fsnn`", [size(artifact.LARGEST_FILE), f"{LARGEST_STEPS:,} time steps", f"{MOST_NEURONS:,} neurons", f"{MOST_AXES} axes"]),
        ("checkpoints, `last.safetensors`", [f"{network.MOST_WEIGHTS:,} weights"]),
        ("`config.yaml`, `--set`", [size(config.LARGEST_CONFIG)]),
        ("`metrics.jsonl`", [size(metrics.LARGEST)]),
        (
            "IDX, CIFAR, N-MNIST, CIFAR10-DVS",
            [size(places.LARGEST_FILE), f"{size(nmnist.LARGEST_RECORDING)} a recording", f"{size(cifar10_dvs.LARGEST_RECORDING)} of"],
        ),
        ("ImageNet's pictures", [f"{imagenet.MOST_PIXELS:,} pixels"]),
        (
            "NIR (HDF5)",
            [size(hdf5_tree.LARGEST), f"{hdf5_tree.PACKED:,} times", f"{hdf5_tree.MOST_ENTRIES:,} entries", f"{hdf5_tree.DEEPEST} groups"],
        ),
        ("ONNX", [size(onnx_files.LARGEST_FILE), f"{onnx_files.MOST_NODES:,} nodes"]),
    ],
)
def test_the_bounds_are_those_of_the_code(row: str, bounds: list[str]) -> None:
    assert [bound for bound in bounds if bound not in ROWS[row]] == []


def test_the_corpus_is_as_large_as_the_page_says() -> None:
    (count,) = re.findall(r"holds (\d+) small files", PAGE)
    assert len(list((ROOT / "tests" / "hostile" / "files").iterdir())) == int(count)


def test_what_the_page_names_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert [goal for goal in re.findall(r"`make ([a-z-]+)`", PAGE) if f"\n{goal}:" not in makefile] == []
    assert [path for path in re.findall(r"`((?:tests|toolchain)/[\w/.]+)`", PAGE) if not (ROOT / path).exists()] == []
    assert [page for page in re.findall(r"\]\((\w+\.md)", PAGE) if not (ROOT / "docs" / page).exists()] == []


def test_the_campaign_is_as_large_as_the_page_says() -> None:
    (inputs,) = re.findall(r"^INPUTS = ([\d_]+)", (ROOT / "fuzz" / "__main__.py").read_text(), re.M)
    assert f"gives {int(inputs):,} mutated" in PAGE
