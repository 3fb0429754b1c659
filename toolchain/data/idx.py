"""`mnist` and `fashion-mnist`: four IDX files each, as published."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from toolchain.data import places
from toolchain.data.dataset import Dataset, plain
from toolchain.data.places import LARGEST_FILE, DataDir
from toolchain.errors import ArtifactError, UsageError

DIGITS = tuple(str(digit) for digit in range(10))
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


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


def found(name: str, data_dir: DataDir) -> bool:
    return all(_locate(name, f"t10k-{part}", data_dir) is not None for part in ("images-idx3-ubyte", "labels-idx1-ubyte"))


def load(name: str, split: str, data_dir: DataDir) -> Dataset:
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
    return plain(name, pixels[:, None], labels, classes)


def _locate(name: str, file: str, data_dir: DataDir) -> Path | None:
    return places.first_file(place / f"{file}{ending}" for place in places.places(name, data_dir) for ending in (".gz", ""))


def _read(name: str, file: str, data_dir: DataDir) -> npt.NDArray[np.uint8]:
    path = _locate(name, file, data_dir)
    if path is None and places.folder(data_dir) == places.cache():
        path = _download(name, file)
    if path is None:
        raise UsageError(
            f"data set '{name}' needs {file}.gz (or unpacked) in '{places.folder(data_dir) / name}': put it there, or give --data-dir"
        )
    return read_idx(path, dimensions=3 if "idx3" in file else 1)


def read_idx(path: Path, *, dimensions: int) -> npt.NDArray[np.uint8]:
    """The bytes of an IDX file (plain, or gzip where it ends in .gz) of `dimensions` axes, read-only.

    ArtifactError where it is not unsigned-byte IDX, claims more than 256 MiB, or is shorter or longer than it claims; nothing is allocated on the word of the header alone.
    """
    try:
        packed = path.stat().st_size
        if packed > LARGEST_FILE:  # gzip lets a file of any size hold nothing at all
            raise ArtifactError(f"'{path}' has {packed} bytes: an IDX file here has at most {LARGEST_FILE}")
        with cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb") as stream:
            return _parse_idx(stream, dimensions, path, places.most_unpacked(packed) if path.suffix == ".gz" else packed)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ArtifactError(f"'{path}' is damaged ({error}): restore the file") from error
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read ({error.strerror or error}): check the file") from error


def _parse_idx(stream: BinaryIO, dimensions: int, path: Path, most: int) -> npt.NDArray[np.uint8]:
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
        raise ArtifactError(
            f"'{path}' claims {' x '.join(map(str, shape))} values: an IDX file here holds 1 to {LARGEST_FILE}: restore the file"
        )
    content = stream.read(min(size, most) + 1)  # Python sets aside what it is asked to read
    if len(content) != size:
        raise ArtifactError(
            f"'{path}' holds {'more than ' if len(content) > size else ''}{min(len(content), size)} values but its header says {size}: restore the file"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def _download(name: str, file: str) -> Path:
    published, path = PUBLISHED[name], places.cache() / name / f"{file}.gz"
    place = f"put the files of '{name}' ({', '.join(f'{f}.gz' for f in published.checksums)}) into '{path.parent}', or give --data-dir"
    return places.fetch(f"{published.mirror}/{file}.gz", path, published.checksums[file], place, _unpacked)


def _unpacked(packed: bytes) -> bytes:
    with cast(Any, gzip.open(BytesIO(packed))) as stream:
        return cast(bytes, stream.read(LARGEST_FILE))
