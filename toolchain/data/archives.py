"""Members of a .tar.gz, read as the bytes go by: nothing is unpacked onto the disk, no name in the archive becomes a path, and the size is bounded."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO, cast

from toolchain.data.places import LARGEST_FILE
from toolchain.errors import ArtifactError

BLOCK = 512
REGULAR = (b"0", b"\0")


def members(path: Path, wanted: Collection[str]) -> dict[str, bytes]:
    """The content of the wanted members that a gzipped tar archive has; ArtifactError where it is damaged or unfolds beyond 256 MiB."""
    try:
        packed = path.stat().st_size
        if packed > LARGEST_FILE:  # gzip lets a file of any size hold nothing at all
            raise ArtifactError(f"'{path}' has {packed} bytes, more than {LARGEST_FILE}: take the published file")
        with cast(BinaryIO, gzip.open(path, "rb")) as stream:
            return _members(stream, path, wanted)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ArtifactError(f"'{path}' is damaged ({error}): restore the file") from error
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read ({error.strerror or error}): check the file") from error


def _members(stream: BinaryIO, path: Path, wanted: Collection[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    left = LARGEST_FILE
    while len(found) < len(wanted):
        header = _take(stream, BLOCK, path)
        if not any(header):
            return found
        name, size = _header(header, path)
        padded = -(-size // BLOCK) * BLOCK
        left -= BLOCK + padded
        if left < 0:
            raise ArtifactError(f"'{path}' unfolds into more than {LARGEST_FILE} bytes: take the published file")
        if header[156:157] in REGULAR and name in wanted:
            found[name] = _take(stream, padded, path)[:size]
        else:
            _skip(stream, padded, path)
    return found


def _header(header: bytes, path: Path) -> tuple[str, int]:
    """Name and size of a member (POSIX ustar); the sum of the header's bytes is checked."""
    try:
        size, written = int(header[124:136].strip(b" \0") or b"0", 8), int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        size = written = -1
    if size < 0 or sum(header[:148]) + 8 * ord(" ") + sum(header[156:]) != written:
        raise ArtifactError(f"'{path}' holds a damaged tar header: restore the file")
    return header[:100].partition(b"\0")[0].decode("latin-1").removeprefix("./"), size


def _take(stream: BinaryIO, size: int, path: Path) -> bytes:
    taken = stream.read(size)
    if len(taken) < size:
        raise ArtifactError(f"'{path}' ends inside a member: restore the file")
    return taken


def _skip(stream: BinaryIO, size: int, path: Path) -> None:
    while size:
        size -= len(_take(stream, min(size, 1 << 20), path))
