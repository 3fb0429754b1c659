"""`cifar10-dvs`: CIFAR10-DVS in its published AEDAT 2.0 form (Li et al. 2017), in frames as by the authors of SPIDE, DSR and OTTT.

    airplane/cifar10_airplane_0.aedat ... truck/cifar10_truck_999.aedat

A file is lines that start with '#', then 8 bytes an event, big-endian: a 32-bit address and 32 bits of microseconds. Of the address, bits 8 to 14 are y,
bits 1 to 7 are 127 - x, and bit 0 is the polarity (0: brighter). Recordings 0 to 899 of each class are for training, 900 to 999 for testing.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from toolchain.data import cifar, folders, places
from toolchain.data.dataset import Dataset, Kept, LazyImages
from toolchain.data.places import DataDir
from toolchain.errors import ArtifactError, UsageError

SENSOR = 128
TIME_STEPS = 10
SIZE = 48
TRAINING = 900
CLASSES = cifar.PUBLISHED["cifar10"].classes
LARGEST_RECORDING = 1 << 26
"""Bytes; recordings of CIFAR10-DVS have about 1,600,000."""
LONGEST_HEADER = 1 << 16


def found(data_dir: DataDir) -> bool:
    return _place(data_dir) is not None


def load(split: str, data_dir: DataDir, time_steps: int | None, image_size: int | None) -> Dataset:
    place = _place(data_dir)
    if place is None:
        raise UsageError(
            f"data set 'cifar10-dvs' needs the folders {CLASSES[0]}/ to {CLASSES[-1]}/ in '{places.folder(data_dir) / 'cifar10-dvs'}': "
            "get CIFAR10-DVS (figshare.com, item 4724671) and unpack its ten archives there, or give --data-dir"
        )
    listed = folders.listing([place / name for name in CLASSES], (".aedat",), lambda n: (n < TRAINING) == (split == "train"))
    steps, size = time_steps or TIME_STEPS, image_size or SIZE
    read = partial(_read, listed, steps, _resize(SENSOR, size))
    return Dataset("cifar10-dvs", LazyImages(read, (2, size, size, steps), 255, np.arange(len(listed)), Kept()), listed.labels, CLASSES)


def frames(content: bytes, time_steps: int, where: str, resize: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.uint8]:
    """(2, 128, 128, time_steps), or what `resize` makes of it: channel (0 darker, 1 brighter), row, column, frame; 255 where at least one event fell.

    Each frame has the same number of events, in the order of the file; the last one takes what is left over. ArtifactError where the bytes are no recording.
    """
    address = np.frombuffer(content, ">u4", offset=_header(content, where))[::2].astype(np.int64)
    pixel = (1 - (address & 1)) * SENSOR * SENSOR + (address >> 8 & 127) * SENSOR + 127 - (address >> 1 & 127)
    size = SENSOR if resize is None else len(resize)
    shown = np.empty((2, size, size, time_steps), np.uint8)
    count = len(pixel) // time_steps
    for step in range(time_steps):
        frame = np.zeros(2 * SENSOR * SENSOR, np.float32)
        frame[pixel[step * count : None if step == time_steps - 1 else (step + 1) * count]] = 255
        frame = frame.reshape(2, SENSOR, SENSOR)
        shown[..., step] = frame if resize is None else np.rint(resize @ frame @ resize.T)
    return shown


def _header(content: bytes, where: str) -> int:
    """How many bytes of header there are; ArtifactError where what follows is not at least one event."""
    if not content.startswith(b"#"):
        raise ArtifactError(f"'{where}' does not start with '#!AER-DAT2.0': it is another kind of file")
    first = content[:32].split(b"\n")[0].strip()
    if first.startswith(b"#!AER-DAT") and not first.startswith(b"#!AER-DAT2"):
        raise ArtifactError(f"'{where}' is {first.decode('latin-1')[2:]!r}, not AER-DAT2.0: take the published recording")
    start = 0
    while content[start : start + 1] == b"#":
        start = content.find(b"\n", start, LONGEST_HEADER) + 1
        if start == 0:
            raise ArtifactError(f"'{where}' has a header without an end: restore the file")
    events = len(content) - start
    if events == 0 or events % 8:
        raise ArtifactError(f"'{where}' has {events} bytes after its header, which are not events of 8 bytes: restore the file")
    return start


def _resize(before: int, after: int) -> npt.NDArray[np.float32]:
    """(after, before): rows that sum to 1, a bilinear filter widened by the scale when it shrinks (Pillow's, which the authors use)."""
    scale = before / after
    centre = (np.arange(after)[:, None] + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(before) - centre) / max(scale, 1))
    weights /= weights.sum(1, keepdims=True)
    return np.asarray(weights, np.float32)


def _read(
    listed: folders.Listing, time_steps: int, resize: npt.NDArray[np.float32], number: int, _: np.random.Generator | None
) -> npt.NDArray[np.uint8]:
    path = listed.path(number)
    return frames(places.read_whole(path, LARGEST_RECORDING, "recording of CIFAR10-DVS"), time_steps, str(path), resize)


def _place(data_dir: DataDir) -> Path | None:
    return next((place for place in places.places("cifar10-dvs", data_dir) if (place / CLASSES[0]).is_dir()), None)
