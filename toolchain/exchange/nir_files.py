"""NIR files: written in one go, and read with the package `nir` once their size and shape are known to be sound.

A NIR file is HDF5: `node/nodes/NAME/FIELD`. HDF5 can say more than NIR does, such as links to other files, loops of groups, or a data set of petabytes in a few bytes,
so nothing is loaded before a look at the file's tree.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ArtifactError
from toolchain.exchange import packages
from toolchain.files import replace_file

if TYPE_CHECKING:
    import nir

LARGEST = 4 * 2**30
"""Bytes of all data sets of a file, unpacked; a larger file is refused before it is loaded."""

PACKED = 1100
"""A byte of gzip holds at most 1032: data sets that claim more than the file can hold are fill values."""

MOST_ENTRIES = 200_000
"""Groups and data sets of a file."""

DEEPEST = 16
"""Groups within groups: graphs within graphs take two each."""


def require() -> None:
    """UsageError where NIR files cannot be read and written here."""
    packages.require("nir", "nir", "h5py")


def write(path: Path, graph: nir.NIRGraph) -> int:
    """Write `graph` to `path`, whole or not at all; how many bytes that took. The same graph gives the same bytes."""
    import nir

    stream = io.BytesIO()
    nir.write(stream, graph)
    data = stream.getvalue()
    replace_file(path, data)
    return len(data)


def read(path: Path) -> nir.NIRGraph:
    """The graph of a NIR file; ArtifactError in one sentence where it is damaged, no NIR, or too large to be one."""
    import nir

    _require_sound(path)
    try:
        found = nir.read(path)
    # nir asserts, and its nodes' constructors index, compare and compute with whatever the file holds
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ArtifactError(f"'{path}' holds no network that nir reads ({said}): write it again with the library that made it") from None
    if not isinstance(found, nir.NIRGraph):
        raise ArtifactError(f"'{path}' holds a {type(found).__name__} and no graph of nodes: export a whole network")
    return found


def _require_sound(path: Path) -> None:
    """Look at a file's tree, and load nothing."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            problem = _problem(h5py, file, min(LARGEST, 2**20 + PACKED * path.stat().st_size))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = " ".join(str(error).split())[:300]
        raise ArtifactError(
            f"'{path}' is damaged or no HDF5 file, which NIR files are ({said}): restore it, or export the network again"
        ) from None
    if problem is not None:
        raise ArtifactError(f"'{path}' {problem}: this is no NIR file to load")


def _problem(h5py: Any, file: Any, most: int) -> str | None:
    if "node" in file and not isinstance(file.get("node", getlink=True), h5py.HardLink):
        return "links to another place at 'node'"
    if "node" not in file or not isinstance(file.get("node"), h5py.Group):
        return "is an HDF5 file without the group 'node' that NIR files have"
    seen, total = set(), 0
    waiting = [("node", file["node"], 1)]
    while waiting:
        name, group, depth = waiting.pop()
        if depth > DEEPEST:
            return f"has groups {DEEPEST} deep, at '{name[:200]}'"
        for key in group:
            where = f"{name}/{key}"[:200]
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                return f"links to another place at '{where}'"
            entry = group[key]
            address = h5py.h5o.get_info(entry.id).addr
            if address in seen:
                return f"has one entry twice, at '{where}'"
            seen.add(address)
            if len(seen) > MOST_ENTRIES:
                return f"has more than {MOST_ENTRIES:,} entries"
            if isinstance(entry, h5py.Group):
                waiting.append((where, entry, depth + 1))
            elif isinstance(entry, h5py.Dataset):
                if entry.external or entry.is_virtual:
                    return f"keeps '{where}' in another file"
                total += entry.nbytes
                if total > most:
                    return f"unpacks to more than {most:,} bytes, at '{where}' of shape {entry.shape}"
            else:
                return f"has a {type(entry).__name__} at '{where}'"
    return None
