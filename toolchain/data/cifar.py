"""`cifar10` and `cifar100` as published (cs.toronto.edu/~kriz): the python or the binary version, unpacked or still in its .tar.gz."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from toolchain.data import pickles, places
from toolchain.data.archives import members
from toolchain.data.dataset import Dataset, plain
from toolchain.data.places import LARGEST_FILE, DataDir
from toolchain.errors import ArtifactError, UsageError

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32

Batch = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Form:
    """One of the forms a set is published in: its folder, its archive, and the files of each part."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    parse: Callable[[bytes, str], Batch]

    def files(self, split: str) -> tuple[str, ...]:
        return self.train if split == "train" else self.test


@dataclass(frozen=True)
class Published:
    """A CIFAR set: its forms (the first is the one to download), its classes, where it is published, and the sha256 of the first archive."""

    forms: tuple[Form, ...]
    classes: tuple[str, ...]
    mirror: str
    checksum: str


def pickled(key: str) -> Callable[[bytes, str], Batch]:
    """A batch of the python version: a pickled dictionary with `data`, uint8 (n, 3072), red, green, blue, each row by row, and labels under `key`."""

    def parse(content: bytes, where: str) -> Batch:
        held = pickles.read(content, where)
        pixels, labels = (held.get("data"), held.get(key)) if isinstance(held, dict) else (None, None)
        if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != PIXELS or not len(pixels):
            raise ArtifactError(f"{where} holds no 'data' of n x {PIXELS} bytes: take the published file")
        if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(n) is int for n in labels):
            raise ArtifactError(f"{where} holds no '{key}', a whole number for each of its {len(pixels)} images: take the published file")
        return pixels.reshape(-1, *SHAPE), np.array(labels, np.int64)

    return parse


def binary(label_bytes: int) -> Callable[[bytes, str], Batch]:
    """A batch of the binary version: for each image its labels, a byte each (the last one counts: CIFAR-100 has coarse, then fine), and 3,072 bytes."""

    def parse(content: bytes, where: str) -> Batch:
        record = label_bytes + PIXELS
        if not content or len(content) % record:
            raise ArtifactError(f"{where} has {len(content)} bytes, which are not records of {record}: restore the file")
        records = np.frombuffer(content, np.uint8).reshape(-1, record)
        return records[:, label_bytes:].reshape(-1, *SHAPE), records[:, label_bytes - 1].astype(np.int64)

    return parse


BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
PUBLISHED = {
    "cifar10": Published(
        forms=(
            Form("cifar-10-batches-py", "cifar-10-python.tar.gz", BATCHES, ("test_batch",), pickled("labels")),
            Form("cifar-10-batches-bin", "cifar-10-binary.tar.gz", tuple(f"{b}.bin" for b in BATCHES), ("test_batch.bin",), binary(1)),
        ),
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        mirror="https://www.cs.toronto.edu/~kriz",
        checksum="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    ),
    "cifar100": Published(
        forms=(
            Form("cifar-100-python", "cifar-100-python.tar.gz", ("train",), ("test",), pickled("fine_labels")),
            Form("cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), ("test.bin",), binary(2)),
        ),
        classes=tuple(
            """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle caterpillar
            cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster
            house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange
            orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
            shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
            tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split()  # noqa: SIM905  # a hundred names are read more easily as text
        ),
        mirror="https://www.cs.toronto.edu/~kriz",
        checksum="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    ),
}


def found(name: str, data_dir: DataDir) -> bool:
    held = _locate(name, data_dir)
    return held is not None and (held[1].is_file() or all((held[1] / file).is_file() for file in held[0].test))


def load(name: str, split: str, data_dir: DataDir) -> Dataset:
    held = _locate(name, data_dir)
    published = PUBLISHED[name]
    if held is None and places.folder(data_dir) == places.cache():
        held = published.forms[0], _download(name)
    if held is None:
        form = published.forms[0]
        raise UsageError(
            f"data set '{name}' needs {form.archive} or the folder {form.folder}/ in '{places.folder(data_dir) / name}': put it there, or give --data-dir"
        )
    form, path = held
    parsed = [form.parse(content, where) for where, content in _contents(form, path, split)]
    labels = np.concatenate([found for _, found in parsed])
    if not 0 <= labels.min() <= labels.max() < len(published.classes):
        raise ArtifactError(
            f"'{path}' has labels from {labels.min()} to {labels.max()}, but the classes of '{name}' are 0 to {len(published.classes) - 1}: restore it"
        )
    return plain(name, np.concatenate([pixels for pixels, _ in parsed]), labels, published.classes)


def _locate(name: str, data_dir: DataDir) -> tuple[Form, Path] | None:
    """The first folder or archive of the set that is here."""
    for place in places.places(name, data_dir):
        for form in PUBLISHED[name].forms:
            if (place / form.folder).is_dir():
                return form, place / form.folder
            if (place / form.archive).is_file():
                return form, place / form.archive
    return None


def _contents(form: Form, path: Path, split: str) -> list[tuple[str, bytes]]:
    """(where, bytes) of each file of a part, from its folder or its archive."""
    files = form.files(split)
    if path.is_dir():
        missing = next((file for file in files if not (path / file).is_file()), None)
        if missing is not None:
            raise UsageError(f"'{path}' lacks {missing}: unpack {form.archive} again")
        largest = LARGEST_FILE // len(files)  # together no more than an archive unfolds into
        return [(f"'{path / file}'", places.read_whole(path / file, largest, "batch of images")) for file in files]
    held = members(path, [f"{form.folder}/{file}" for file in files])
    contents: list[tuple[str, bytes]] = []
    for file in files:
        member = f"{form.folder}/{file}"
        if member not in held:
            raise ArtifactError(f"'{path}' lacks {member}: restore the file")
        contents.append((f"'{path}', {member},", held[member]))
    return contents


def _download(name: str) -> Path:
    published = PUBLISHED[name]
    archive = published.forms[0].archive
    path = places.cache() / name / archive
    advice = f"put {archive} of '{name}' into '{path.parent}', or give --data-dir"
    return places.fetch(f"{published.mirror}/{archive}", path, published.checksum, advice)
