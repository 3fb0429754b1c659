"""`imagenet`: folders of pictures, train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, decoded a batch at a time.

Without a seed a picture is resized until its shorter side is 256 (in proportion for other sizes than 224) and cropped at its centre. With one
(`Dataset.augmented`), a part of 8 to 100 % of the area and an aspect ratio of 3:4 to 4:3 is drawn, resized, and mirrored half of the time.
"""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from functools import partial
from io import BytesIO
from math import exp, log, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from toolchain.data import folders, places
from toolchain.data.dataset import Dataset, LazyImages
from toolchain.data.places import DataDir
from toolchain.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SIZE = 224
ENDINGS = (".jpeg", ".jpg", ".png")
MOST_PIXELS = 1 << 26
"""A picture with more is refused before it is decoded; the largest of ImageNet has 61 million."""
LARGEST_PICTURE = 1 << 26
"""Bytes; those of ImageNet have at most 16 million."""
MOST_DECODED = 16 * MOST_PIXELS
"""Pixels times scans: a progressive JPEG goes over the whole picture with every scan, ten times as a rule, and a scan may take as little as a hundred bytes."""
LONGEST = 64
"""So is one whose longer side is more than this many times the shorter: resized, it would fill the memory."""
DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    EOFError,
    struct.error,
    zlib.error,
)
"""What Pillow raises for damaged pictures: SyntaxError for a PNG, and whatever a value that is not there leads to (a palette without colours: TypeError, from
version 13 on AssertionError)."""
AREA, ASPECT, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10


def found(data_dir: DataDir) -> bool:
    return _place("val", data_dir) is not None


def load(split: str, data_dir: DataDir, image_size: int | None) -> Dataset:
    part = "val" if split == "test" else "train"
    place = _place(part, data_dir)
    if place is None:
        raise UsageError(
            f"data set 'imagenet' needs the folders {part}/n01440764/ and so on in '{places.folder(data_dir) / 'imagenet'}': "
            "get ImageNet (image-net.org), give each class its folder there, or give --data-dir"
        )
    classes = _wnids(place)
    training = place.parent / "train"
    if part == "val" and training.is_dir():
        known = _wnids(training)
        if strange := next((wnid for wnid in classes if wnid not in known), None):
            raise ArtifactError(f"'{place / strange}' is a class that '{training}' lacks: restore both folders")
    else:
        known = classes
    listed = folders.listing([place / wnid for wnid in classes], ENDINGS)
    labels = np.array([known.index(wnid) for wnid in classes], np.int64)[listed.labels]
    size = image_size or SIZE
    images = LazyImages(partial(_read, listed, size), (3, size, size), 255, np.arange(len(listed)), random=True)
    return Dataset("imagenet", images, labels, tuple(known))


def _read(listed: folders.Listing, size: int, number: int, generator: np.random.Generator | None) -> npt.NDArray[np.uint8]:
    picture = _open(listed.path(number))
    cropped = _centre(picture, size) if generator is None else _drawn(picture, size, generator)
    return np.ascontiguousarray(np.asarray(cropped, np.uint8).transpose(2, 0, 1))


def _open(path: Path) -> Picture:
    """The picture in RGB; ArtifactError where it cannot be decoded or is unreasonably large."""
    from PIL import Image

    content = places.read_whole(path, LARGEST_PICTURE, "picture of ImageNet")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is narrower
            opened = Image.open(BytesIO(content), formats=("JPEG", "PNG"))
        with opened as picture:
            width, height = picture.size
            if width * height > MOST_PIXELS or max(width, height) > LONGEST * min(width, height):
                raise ArtifactError(f"'{path}' has {width} x {height} pixels, more than any picture of ImageNet: restore the file")
            if picture.format == "JPEG" and (scans := content.count(b"\xff\xda")) * width * height > MOST_DECODED:
                raise ArtifactError(
                    f"'{path}' has {scans} scans of {width} x {height} pixels, more than any picture of ImageNet: restore the file"
                )
            decoded: Picture = picture.convert("RGB")
            return decoded
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise ArtifactError(f"'{path}' cannot be decoded ({error}): restore the file") from error


def _centre(picture: Picture, size: int) -> Picture:
    from PIL import Image

    width, height = picture.size
    short = round(size * 256 / SIZE)
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    left, top = round((width - size) / 2), round((height - size) / 2)
    return picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def _drawn(picture: Picture, size: int, generator: np.random.Generator) -> Picture:
    from PIL import Image

    crop = picture.crop(_box(*picture.size, generator)).resize((size, size), Image.Resampling.BILINEAR)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else crop


def _box(width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a crop; where ten draws do not fit, the largest at the centre whose aspect ratio is allowed."""
    for _ in range(ATTEMPTS):
        area = width * height * generator.uniform(*AREA)
        aspect = exp(generator.uniform(log(ASPECT[0]), log(ASPECT[1])))
        w, h = round(sqrt(area * aspect)), round(sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(0, width - w + 1)), int(generator.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ASPECT[1])))
    h = min(height, max(1, round(width / ASPECT[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _wnids(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if re.fullmatch(r"n\d{8}", path.name) and path.is_dir())


def _place(part: str, data_dir: DataDir) -> Path | None:
    candidates = (place / part for place in places.places("imagenet", data_dir))
    return next((folder for folder in candidates if folder.is_dir() and _wnids(folder)), None)
