"""Data sets that are a folder for each class and a file for each sample: what is there, in an order that mixes the classes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from toolchain.errors import ArtifactError, UsageError


@dataclass(frozen=True)
class Listing:
    """The files of a data set by number; paths are made when asked for, since a million of them would fill the memory."""

    folders: tuple[Path, ...]
    files: list[str]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.files)

    def path(self, number: int) -> Path:
        return self.folders[int(self.labels[number])] / self.files[number]


def listing(folders: Sequence[Path], endings: tuple[str, ...], keep: Callable[[int], bool] = lambda number: True) -> Listing:
    """The files with one of `endings` (any case) in each folder, whose place is its label; `keep` chooses by the number in a file's name.

    Within a class, files are in the order of those numbers. Classes are interleaved in proportion to their sizes, so that the first and the last n
    samples hold every class: `hold_out` takes the last ones. UsageError where a folder is missing, ArtifactError where it holds no such file.
    """
    classes = [sorted((n, file) for n, file in _numbered(folder, endings) if keep(n)) for folder in folders]
    for folder, held in zip(folders, classes, strict=True):
        if not held:
            raise ArtifactError(f"'{folder}' holds no {' or '.join(endings)} file of this part: unpack the data set there again")
    labels = np.repeat(np.arange(len(classes)), [len(held) for held in classes])
    position = np.concatenate([(np.arange(len(held)) + 0.5) / len(held) for held in classes])
    order = np.lexsort((labels, position))
    files = [file for held in classes for _, file in held]
    return Listing(tuple(folders), [files[i] for i in order], labels[order].astype(np.int64))


def _numbered(folder: Path, endings: tuple[str, ...]) -> list[tuple[int, str]]:
    """(last number in its name, name) of every file."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.lower().endswith(endings) and entry.is_file()]
    except FileNotFoundError:
        raise UsageError(f"folder '{folder}' is missing: unpack the data set there again") from None
    except OSError as error:
        raise ArtifactError(f"folder '{folder}' cannot be read ({error.strerror or error}): check it") from error
    return [(_number(name), name) for name in names if not name.startswith(".")]


def _number(name: str) -> int:
    found = re.search(r"(\d{1,18})\D*$", name.rpartition(".")[0])
    return int(found[1]) if found else 0
