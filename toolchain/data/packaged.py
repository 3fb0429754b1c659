"""`digits` and `mnist-1k`: the data sets that come with the package."""

from __future__ import annotations

from importlib.resources import files
from io import BytesIO

import numpy as np

from toolchain.data.dataset import Dataset, plain
from toolchain.data.idx import DIGITS
from toolchain.errors import UsageError

NAMES = ("digits", "mnist-1k")

DIGITS_TRAINING = 1297
"""`digits`: the first 1,297 images are for training, the last 500 for testing."""

TEST_ONLY = {"mnist-1k": "mnist"}
"""Sets of test images, and the set that their training images are in."""


def load(name: str, split: str) -> Dataset:
    if name in TEST_ONLY and split == "train":
        raise UsageError(f"'{name}' holds test images only: give '{TEST_ONLY[name]}', which has their training images")
    content = (files("toolchain") / "samples" / f"{name}.npz").read_bytes()
    with np.load(BytesIO(content), allow_pickle=False) as arrays:
        pixels, labels = arrays["images"], arrays["labels"]
    dataset = plain(name, pixels[:, None], labels, DIGITS, largest=16 if name == "digits" else 255)
    if name == "mnist-1k":
        return dataset
    return dataset.part(0, DIGITS_TRAINING) if split == "train" else dataset.part(DIGITS_TRAINING, len(dataset))
