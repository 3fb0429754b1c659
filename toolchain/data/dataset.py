"""What a data set is: images, plain or decoded as they are asked for, and their labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Union

import numpy as np
import numpy.typing as npt

from toolchain.errors import UsageError

KEPT_BYTES = 1 << 30
"""Decoded samples stay in memory until they come to this many bytes; the rest is decoded again whenever it is asked for."""

SUMMED = 256
"""Images by which a data set is known again: to decode all would take long."""

Read = Callable[[int, Union[np.random.Generator, None]], npt.NDArray[np.uint8]]


@dataclass
class Kept:
    """Decoded samples by number, up to `KEPT_BYTES`; none is ever dropped, since in random order every sample is as likely to come next."""

    samples: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    size: int = 0

    def add(self, number: int, sample: npt.NDArray[np.uint8]) -> None:
        if self.size + sample.nbytes <= KEPT_BYTES and number not in self.samples:
            self.samples[number] = sample
            self.size += sample.nbytes


@dataclass(frozen=True)
class LazyImages:
    """Images that stay in their files: `images[index]` reads, decodes and returns float32, for an int, a slice, a mask or an array of ints.

    An int gives one sample of `shape[1:]`, anything else (count, *shape[1:]), in the order asked for; `np.asarray(images)` decodes everything. A
    damaged file is an ArtifactError when its sample is asked for.

    read      decodes sample `number` to uint8; the generator, where it is given, draws the crop
    sample    shape of one sample; events have time as the last axis
    largest   what uint8 values are divided by
    numbers   which samples these are, so that a part draws and keeps what the whole would
    kept      where decoded samples stay, shared by all parts; None keeps none
    random    whether `augmented` changes anything
    """

    read: Read
    sample: tuple[int, ...]
    largest: int
    numbers: npt.NDArray[np.int64]
    kept: Kept | None = None
    random: bool = False
    seed: int | None = None

    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.numbers), *self.sample)

    @property
    def ndim(self) -> int:
        return 1 + len(self.sample)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Union[int, slice, Sequence[int], npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        chosen = self.numbers[index]
        if np.ndim(chosen) == 0:
            return self._scaled(self._decoded(int(chosen)))
        images = np.empty((len(chosen), *self.sample), np.float32)
        for place, sample in enumerate(_all_of(self._decoded, chosen.tolist())):
            images[place] = self._scaled(sample)
        return images

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)

    def part(self, start: int, stop: int) -> LazyImages:
        """The samples from `start` up to `stop`, not decoded yet."""
        return replace(self, numbers=self.numbers[start:stop])

    def _decoded(self, number: int) -> npt.NDArray[np.uint8]:
        if self.kept is not None and number in self.kept.samples:
            return self.kept.samples[number]
        generator = None if self.seed is None else np.random.default_rng((self.seed, number))
        sample = self.read(number, generator)
        if self.kept is not None:
            self.kept.add(number, sample)
        return sample

    def _scaled(self, sample: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return sample.astype(np.float32) / np.float32(self.largest)


def _all_of(decode: Callable[[int], npt.NDArray[np.uint8]], numbers: list[int]) -> Any:
    """Decoded in threads, where decoding leaves Python, and yielded in order; at most a few samples wait at a time."""
    threads = min(8, os.cpu_count() or 1)
    if threads == 1 or len(numbers) == 1:
        yield from map(decode, numbers)
        return
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(numbers), 4 * threads):
            yield from pool.map(decode, numbers[start : start + 4 * threads])


Images = Union[npt.NDArray[np.float32], LazyImages]


@dataclass(frozen=True)
class Dataset:
    """Images in [0, 1], float32 (samples, channels, height, width), events (samples, channels, height, width, time steps); labels int64 (samples,); class names.

    `images` is an array where the whole set fits in memory, else a `LazyImages`: index it by slices or arrays of ints, a batch at a time, and either
    gives a float32 array; ask `images.shape` for its shape. Only `np.asarray(images)` makes an array of the whole.
    """

    name: str
    images: Images
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> Dataset:
        """The samples from `start` up to `stop`; nothing is decoded."""
        images = self.images.part(start, stop) if isinstance(self.images, LazyImages) else self.images[start:stop]
        return replace(self, images=images, labels=self.labels[start:stop])

    def augmented(self, seed: int) -> Dataset:
        """The same samples seen through random crops drawn from `seed` and the sample's number: give another seed each epoch.

        Only `imagenet` is cropped while it is decoded; every other set returns itself, and `toolchain.augment` does the rest.
        """
        if not isinstance(self.images, LazyImages) or not self.images.random:
            return self
        return replace(self, images=replace(self.images, seed=seed % (1 << 64)))


def fingerprint(dataset: Dataset) -> str:
    """sha256 by which a run that goes on knows its data again: over all labels, and `SUMMED` images evenly spread from the first to the last."""
    rows = np.linspace(0, len(dataset) - 1, min(SUMMED, len(dataset))).astype(np.int64)
    found = hashlib.sha256(f"{dataset.images.shape}".encode())
    found.update(np.ascontiguousarray(dataset.labels).data)
    for some in np.array_split(rows, 4):  # decoded images are large
        found.update(np.ascontiguousarray(dataset.images[some]).data)
    return found.hexdigest()


def hold_out(dataset: Dataset, count: int) -> tuple[Dataset, Dataset]:
    """(to learn from, to choose by): the last `count` samples are held out, always the same ones; UsageError where too few would remain."""
    if not 1 <= count < len(dataset):
        raise UsageError(f"{count} samples cannot be held out of the {len(dataset)} of '{dataset.name}': hold out 1 to {len(dataset) - 1}")
    return dataset.part(0, len(dataset) - count), dataset.part(len(dataset) - count, len(dataset))


def plain(name: str, pixels: npt.NDArray[np.uint8], labels: npt.NDArray[Any], classes: tuple[str, ...], *, largest: int = 255) -> Dataset:
    """A data set whose images fit in memory: `pixels` of (samples, channels, height, width) divided by `largest`."""
    images = pixels.astype(np.float32)
    images /= np.float32(largest)
    return Dataset(name, images, labels.astype(np.int64), classes)
