"""Where data sets lie, and how one comes here: by checksum only."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Union, cast

from toolchain.errors import ArtifactError, UsageError
from toolchain.files import replace_file

LARGEST_FILE = 1 << 28
"""No file of a data set here holds more than this many bytes, packed or unpacked."""

DataDir = Union[str, "os.PathLike[str]", None]


def cache() -> Path:
    """Where downloads go: $XDG_CACHE_HOME/toolchain, else ~/.cache/toolchain."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toolchain"


def folder(data_dir: DataDir) -> Path:
    """Where data sets are looked for: the folder given, else $TOOLCHAIN_DATA, else the cache."""
    return Path(data_dir or os.environ.get("TOOLCHAIN_DATA") or cache())


def places(name: str, data_dir: DataDir) -> tuple[Path, Path]:
    """The two folders that may hold a data set's files: DIR/<name> and DIR itself."""
    return folder(data_dir) / name, folder(data_dir)


def first_file(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def most_unpacked(packed: int) -> int:
    """The most bytes that so many bytes of gzip hold: DEFLATE packs 258 into two bits at best."""
    return 1032 * packed


def read_whole(path: Path, largest: int, what: str) -> bytes:
    """The bytes of a file; ArtifactError where it is larger than `what` ever is, or cannot be read."""
    try:
        with path.open("rb") as stream:
            content = stream.read(min(largest, os.fstat(stream.fileno()).st_size) + 1)  # Python sets aside what it is asked to read
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read ({error.strerror or error}): check the file") from error
    if len(content) > largest:
        raise ArtifactError(f"'{path}' has more than {largest} bytes, which no {what} has: it is another kind of file")
    return content


def fetch(url: str, path: Path, checksum: str, advice: str, unpacked: Callable[[bytes], bytes] | None = None) -> Path:
    """Download `url` to `path`; kept only where the sha256 (of what `unpacked` makes of it) is the published one. UsageError ends in `advice`."""
    import urllib.request

    file, site = path.name, url.rpartition("/")[0]
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            packed = cast(bytes, answer.read(LARGEST_FILE))
        digest = sha256(packed if unpacked is None else unpacked(packed)).hexdigest()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{file} is not here and {site} did not deliver it ({error}): {advice}") from error
    if digest != checksum:
        raise UsageError(f"{site} delivered another {file} than the published one (sha256 {digest[:12]}...): {advice}")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, packed)
    return path
