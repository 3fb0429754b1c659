"""Data sets: two that come with the package, the others read from their published files; docs/data.md says what is expected where.

Files are looked for in DIR/<name>/ and in DIR itself, where DIR is the `data_dir` given, else $TOOLCHAIN_DATA, else the cache. What the cache lacks of
`mnist`, `fashion-mnist`, `cifar10` and `cifar100` is downloaded where there is a network and accepted by checksum only.
"""

from __future__ import annotations

import os
from pathlib import Path

from toolchain.data import cifar, cifar10_dvs, idx, imagenet, nmnist, packaged
from toolchain.data.dataset import Dataset, Images, LazyImages, hold_out
from toolchain.data.idx import PUBLISHED
from toolchain.errors import UsageError, unknown
from toolchain.ir import LARGEST_STEPS

__all__ = ["Dataset", "Images", "LazyImages", "found", "hold_out", "load", "names", "size_for"]

EVENTS = ("nmnist", "cifar10-dvs")
SIZES = ("cifar10-dvs", "imagenet")
LARGEST_SIZE = 1024


def names() -> list[str]:
    """The data sets that `load` takes."""
    return [*packaged.NAMES, *PUBLISHED, *cifar.PUBLISHED, *EVENTS, "imagenet"]


def found(name: str, data_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether `load` can read the test images of `name` here without a download."""
    if name in packaged.NAMES:
        return True
    if name in PUBLISHED:
        return idx.found(name, data_dir)
    if name in cifar.PUBLISHED:
        return cifar.found(name, data_dir)
    folders = {"nmnist": nmnist.found, "cifar10-dvs": cifar10_dvs.found, "imagenet": imagenet.found}
    return name in folders and folders[name](data_dir)


def load(
    name: str,
    *,
    split: str = "test",
    data_dir: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    time_steps: int | None = None,
    image_size: int | None = None,
) -> Dataset:
    """The `split` ("test" or "train") of a data set, or its first `samples`; UsageError says what is missing and where to put it.

    time_steps   frames of an event set (30 for nmnist, 10 for cifar10-dvs); sets of still images have none and ignore it
    image_size   width and height of cifar10-dvs (48) and imagenet (224); the other sets have one size only
    """
    if split not in ("test", "train"):
        raise unknown("split", split, ("test", "train"))
    if name not in names():
        raise unknown("data set", name, names())
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UsageError(f"data folder '{data_dir}' does not exist: give one that holds {name}/ or its files")
    if time_steps is not None and not 1 <= time_steps <= LARGEST_STEPS:
        raise UsageError(f"{time_steps} time steps were asked of '{name}': ask for 1 to {LARGEST_STEPS}")
    if image_size is not None and name not in SIZES:
        raise UsageError(f"images of '{name}' have one size only: leave image_size out ({' and '.join(SIZES)} take it)")
    if image_size is not None and not 1 <= image_size <= LARGEST_SIZE:
        raise UsageError(f"images of size {image_size} were asked of '{name}': ask for 1 to {LARGEST_SIZE}")
    dataset = _load(name, split, data_dir, time_steps, image_size)
    if samples is None:
        return dataset
    if not 1 <= samples <= len(dataset):
        raise UsageError(
            f"{samples} samples were asked for but the {split} part of '{name}' has {len(dataset)}: ask for 1 to {len(dataset)}"
        )
    return dataset.part(0, samples)


def size_for(name: str, input_shape: tuple[int, ...]) -> int | None:
    """The `image_size` that brings `name` to a network which takes samples of `input_shape`; None where the set has one size only."""
    return input_shape[-1] if name in SIZES else None


def _load(name: str, split: str, data_dir: str | os.PathLike[str] | None, time_steps: int | None, image_size: int | None) -> Dataset:
    if name in packaged.NAMES:
        return packaged.load(name, split)
    if name in PUBLISHED:
        return idx.load(name, split, data_dir)
    if name in cifar.PUBLISHED:
        return cifar.load(name, split, data_dir)
    if name == "nmnist":
        return nmnist.load(split, data_dir, time_steps)
    if name == "cifar10-dvs":
        return cifar10_dvs.load(split, data_dir, time_steps, image_size)
    return imagenet.load(split, data_dir, image_size)
