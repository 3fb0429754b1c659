"""Data sets: two that come with the package, two read from their published IDX files.

Files of `mnist` and `fashion-mnist` are looked for in DIR/<name>/ and in DIR itself, where DIR is the `data_dir` given, else $TOOLCHAIN_DATA, else the
cache; what the cache lacks is downloaded where there is a network and accepted by checksum only.
"""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.resources import files
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from toolchain.errors import ArtifactError, UsageError, unknown
from toolchain.files import replace_file

DIGITS = tuple(str(digit) for digit in range(10))
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

DIGITS_TRAINING = 1297
"""`digits`: the first 1,297 images are for training, the last 500 for testing."""

LARGEST_FILE = 1 << 28
"""No file of a data set here holds more than this many bytes once unpacked."""


@dataclass(frozen=True)
class Dataset:
    """Images in [0, 1], float32 (samples, channels, height, width); labels int64 (samples,); class names."""

    name: str
    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> Dataset:
        """The samples from `start` up to `stop`."""
        return replace(self, images=self.images[start:stop], labels=self.labels[start:stop])


@dataclass(frozen=True)
class Published:
    """A data set in IDX form: where it is published, and the sha256 of its four files once unpacked."""

    mirror: str
    classes: tuple[str, ...]
    checksums: dict[str, str]


PUBLISHED = {
    "mnist": Published(
        mirror="https://ossci-datasets.s3.amazonaws.com/mnist",
        classes=DIGITS,
        checksums={
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
    ),
    "fashion-mnist": Published(
        mirror="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        classes=CLOTHES,
        checksums={
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
    ),
}
PACKAGED = ("digits", "mnist-1k")
LATER = ("nmnist", "cifar10", "cifar100", "cifar10-dvs", "imagenet")


def names() -> list[str]:
    """The data sets that `load` takes."""
    return [*PACKAGED, *PUBLISHED]


def found(name: str, data_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether `load` can read the test images of `name` here without a download."""
    if name in PACKAGED:
        return True
    return name in PUBLISHED and all(
        _locate(name, f"t10k-{part}", data_dir) is not None for part in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )


def load(name: str, *, split: str = "test", data_dir: str | os.PathLike[str] | None = None, samples: int | None = None) -> Dataset:
    """The `split` ("test" or "train") of a data set, or its first `samples`; UsageError says what is missing and where to put it."""
    if split not in ("test", "train"):
        raise unknown("split", split, ("test", "train"))
    if name in LATER:
        raise UsageError(f"data set '{name}' comes with a later version: use {', '.join(names())}")
    if name not in names():
        raise unknown("data set", name, names())
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UsageError(f"data folder '{data_dir}' does not exist: give one that holds {name}/ or its files")
    dataset = _packaged(name, split) if name in PACKAGED else _published(name, split, data_dir)
    if samples is None:
        return dataset
    if not 1 <= samples <= len(dataset):
        raise UsageError(
            f"{samples} samples were asked for but the {split} part of '{name}' has {len(dataset)}: ask for 1 to {len(dataset)}"
        )
    return dataset.part(0, samples)


def hold_out(dataset: Dataset, count: int) -> tuple[Dataset, Dataset]:
    """(to learn from, to choose by): the last `count` samples are held out, always the same ones; UsageError where too few would remain."""
    if not 1 <= count < len(dataset):
        raise UsageError(f"{count} samples cannot be held out of the {len(dataset)} of '{dataset.name}': hold out 1 to {len(dataset) - 1}")
    return dataset.part(0, len(dataset) - count), dataset.part(len(dataset) - count, len(dataset))


def _packaged(name: str, split: str) -> Dataset:
    if name == "mnist-1k" and split == "train":
        raise UsageError("'mnist-1k' holds test images only: train on 'mnist'")
    content = (files("toolchain") / "samples" / f"{name}.npz").read_bytes()
    with np.load(BytesIO(content), allow_pickle=False) as arrays:
        pixels, labels = arrays["images"], arrays["labels"]
    largest = 16 if name == "digits" else 255
    dataset = Dataset(name, (pixels.astype(np.float32) / np.float32(largest))[:, None], labels.astype(np.int64), DIGITS)
    if name == "mnist-1k":
        return dataset
    return dataset.part(0, DIGITS_TRAINING) if split == "train" else dataset.part(DIGITS_TRAINING, len(dataset))


def _published(name: str, split: str, data_dir: str | os.PathLike[str] | None) -> Dataset:
    stem = "t10k" if split == "test" else "train"
    pixels = _read(name, f"{stem}-images-idx3-ubyte", data_dir)
    labels = _read(name, f"{stem}-labels-idx1-ubyte", data_dir)
    if len(pixels) != len(labels):
        raise ArtifactError(f"the {split} part of '{name}' has {len(pixels)} images but {len(labels)} labels: restore both files")
    classes = PUBLISHED[name].classes
    if labels.max(initial=0) >= len(classes):
        raise ArtifactError(
            f"the {split} part of '{name}' has label {labels.max()}, but the classes are 0 to {len(classes) - 1}: restore its labels file"
        )
    return Dataset(name, (pixels.astype(np.float32) / np.float32(255))[:, None], labels.astype(np.int64), classes)


def cache() -> Path:
    """Where downloads go: $XDG_CACHE_HOME/toolchain, else ~/.cache/toolchain."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toolchain"


def _folder(data_dir: str | os.PathLike[str] | None) -> Path:
    return Path(data_dir or os.environ.get("TOOLCHAIN_DATA") or cache())


def _locate(name: str, file: str, data_dir: str | os.PathLike[str] | None) -> Path | None:
    folder = _folder(data_dir)
    candidates = (place / f"{file}{ending}" for place in (folder / name, folder) for ending in (".gz", ""))
    return next((path for path in candidates if path.is_file()), None)


def _read(name: str, file: str, data_dir: str | os.PathLike[str] | None) -> npt.NDArray[np.uint8]:
    path = _locate(name, file, data_dir)
    if path is None and _folder(data_dir) == cache():
        path = _download(name, file)
    if path is None:
        raise UsageError(
            f"data set '{name}' needs {file}.gz (or unpacked) in '{_folder(data_dir) / name}': put it there, or give --data-dir"
        )
    return read_idx(path, dimensions=3 if "idx3" in file else 1)


def read_idx(path: Path, *, dimensions: int) -> npt.NDArray[np.uint8]:
    """The bytes of an IDX file (plain, or gzip where it ends in .gz) of `dimensions` axes, read-only.

    ArtifactError where it is not unsigned-byte IDX, claims more than 256 MiB, or is shorter or longer than it claims; nothing is allocated on the word of the header alone.
    """
    try:
        with cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb") as stream:
            return _parse_idx(stream, dimensions, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ArtifactError(f"'{path}' is damaged ({error}): restore the file") from error
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read ({error.strerror or error}): check the file") from error


def _parse_idx(stream: BinaryIO, dimensions: int, path: Path) -> npt.NDArray[np.uint8]:
    header = stream.read(4 + 4 * dimensions)
    magic = bytes((0, 0, 8, dimensions))
    if header[:4] != magic:
        raise ArtifactError(
            f"'{path}' starts with {header[:4].hex() or 'nothing'}, not {magic.hex()} (IDX, unsigned bytes, {dimensions} axes): it is another kind of file"
        )
    if len(header) < 4 + 4 * dimensions:
        raise ArtifactError(f"'{path}' ends inside its header: restore the file")
    shape = tuple(int.from_bytes(header[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    size = prod(shape)
    if not 1 <= size <= LARGEST_FILE:
        raise ArtifactError(f"'{path}' claims {' x '.join(map(str, shape))} values: an IDX file here holds 1 to {LARGEST_FILE}")
    content = stream.read(size + 1)
    if len(content) != size:
        raise ArtifactError(
            f"'{path}' holds {'more than ' if len(content) > size else ''}{min(len(content), size)} values but its header says {size}: restore the file"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def _download(name: str, file: str) -> Path:
    """Fetch one file into the cache; kept only where its unpacked checksum is the published one."""
    import urllib.request

    published, path = PUBLISHED[name], cache() / name / f"{file}.gz"
    place = f"put the files of '{name}' ({', '.join(f'{f}.gz' for f in published.checksums)}) into '{path.parent}', or give --data-dir"
    try:
        with urllib.request.urlopen(f"{published.mirror}/{file}.gz", timeout=30) as answer:
            packed = cast(bytes, answer.read(LARGEST_FILE))
        with cast(Any, gzip.open(BytesIO(packed))) as stream:
            digest = sha256(stream.read(LARGEST_FILE)).hexdigest()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{file}.gz of '{name}' is not here and {published.mirror} did not deliver it ({error}): {place}") from error
    if digest != published.checksums[file]:
        raise UsageError(f"{published.mirror} delivered another {file}.gz than the published one (sha256 {digest[:12]}...): {place}")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, packed)
    return path
