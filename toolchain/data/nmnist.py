"""`nmnist`: N-MNIST in its published binary form (Orchard et al. 2015), binned as by the authors of IDE.

    Train/0/00002.bin ... Train/9/*.bin, Test/0 ... Test/9

A file is a recording; an event is 5 bytes: x, y, and 24 bits, big-endian, of which the first is the polarity (1: brighter) and the others are microseconds.
y = 240 is no event: time goes on by 2^13 microseconds.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from toolchain.data import folders, places
from toolchain.data.dataset import Dataset, Kept, LazyImages
from toolchain.data.idx import DIGITS
from toolchain.data.places import DataDir
from toolchain.errors import ArtifactError, UsageError

SIZE = 34
TIME_STEPS = 30
STEP = 3000
"""Microseconds in a time step."""
LARGEST_RECORDING = 1 << 22
"""Bytes; recordings of N-MNIST have about 20,000."""
OVERFLOW_Y, OVERFLOW = 240, 1 << 13
SACCADES = np.array([0.0, 105_000.0, 210_000.0, 315_000.0])
"""Microseconds: the sensor moves along three sides of a triangle."""
DRIFT_X, DRIFT_Y = np.array([0.0, 3.5, 7.0, 0.0]), np.array([0.0, 7.0, 0.0, 0.0])
"""Pixels by which the picture has moved at the ends of the saccades (the data set's own `stabilize`)."""


def found(data_dir: DataDir) -> bool:
    return _place("Test", data_dir) is not None


def load(split: str, data_dir: DataDir, time_steps: int | None) -> Dataset:
    folder = "Test" if split == "test" else "Train"
    place = _place(folder, data_dir)
    if place is None:
        raise UsageError(
            f"data set 'nmnist' needs the folders {folder}/0 to {folder}/9 in '{places.folder(data_dir) / 'nmnist'}': "
            f"get {folder}.zip of N-MNIST (garrickorchard.com) and unpack it there, or give --data-dir"
        )
    listed = folders.listing([place / digit for digit in DIGITS], (".bin",))
    steps = time_steps or TIME_STEPS
    read = partial(_read, listed, steps)
    images = LazyImages(read, (2, SIZE, SIZE, steps), 1, np.arange(len(listed)), Kept())
    return Dataset("nmnist", images, listed.labels, DIGITS)


def frames(content: bytes, time_steps: int, where: str) -> npt.NDArray[np.uint8]:
    """(2, 34, 34, time_steps) in {0, 1}: channel (0 darker, 1 brighter), row, column, time step of 3 ms; 1 where at least one event fell.

    Events are moved back by the sensor's motion and dropped where that leaves the picture; what comes after the last step is dropped too.
    ArtifactError where the bytes are no recording.
    """
    if not content or len(content) % 5:
        raise ArtifactError(f"'{where}' has {len(content)} bytes, which are not events of 5 bytes: restore the file")
    x, y, high, middle, low = np.frombuffer(content, np.uint8).reshape(-1, 5).astype(np.int64).T
    overflow = y == OVERFLOW_Y
    time = ((high & 127) << 16 | middle << 8 | low) + OVERFLOW * np.cumsum(overflow)
    if (outside := (~overflow & ((x >= SIZE) | (y >= SIZE)))).any():
        first = int(outside.argmax())
        raise ArtifactError(f"'{where}' has an event at x {x[first]}, y {y[first]}, outside {SIZE} x {SIZE}: restore the file")
    column = np.floor(x - np.interp(time, SACCADES, DRIFT_X) + 0.5).astype(np.int64)
    row = np.floor(y - np.interp(time, SACCADES, DRIFT_Y) + 0.5).astype(np.int64)
    step = np.maximum(time - 1, 0) // STEP  # step t holds the microseconds above 3000 t, up to 3000 (t + 1)
    inside = ~overflow & (column >= 0) & (row >= 0) & (step < time_steps)
    filled = np.zeros((2, SIZE, SIZE, time_steps), np.uint8)
    filled[(high >> 7)[inside], row[inside], column[inside], step[inside]] = 1
    return filled


def _read(listed: folders.Listing, time_steps: int, number: int, _: np.random.Generator | None) -> npt.NDArray[np.uint8]:
    path = listed.path(number)
    return frames(places.read_whole(path, LARGEST_RECORDING, "recording of N-MNIST"), time_steps, str(path))


def _place(folder: str, data_dir: DataDir) -> Path | None:
    return next((place / folder for place in places.places("nmnist", data_dir) if (place / folder / "0").is_dir()), None)
