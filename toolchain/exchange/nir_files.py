"""NIR files: written in one go, and read from the plain values that `hdf5_tree` finds in them: `node/nodes/NAME/FIELD`."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ArtifactError
from toolchain.exchange import hdf5_tree, packages
from toolchain.files import replace_file

if TYPE_CHECKING:
    import nir

MOST_NODES = 2_000
"""Nodes of a file, nested ones too: far more than our networks have, and few enough for nir, which compares each with every other."""


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

    held = hdf5_tree.read(path, "node", "NIR")
    nodes = _nodes(held)
    if nodes > MOST_NODES:
        raise ArtifactError(f"'{path}' has {nodes:,} nodes, more than {MOST_NODES:,}: it is no network of layers")
    try:
        tree = _texts(held)
        if "type_check" in tree:  # an argument of nir's own, which no file is to give
            raise ValueError("it has a field 'type_check'")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("error", RuntimeWarning)  # a division by a stride of 0 is no number to go on with
            found = nir.dict2NIRNode(tree)
    # nir asserts, and its nodes' constructors index, compare and compute with whatever the file holds
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ArtifactError(f"'{path}' holds no network that nir reads ({said}): write it again with the library that made it") from None
    if not isinstance(found, nir.NIRGraph):
        raise ArtifactError(f"'{path}' holds a {type(found).__name__} and no graph of nodes: export a whole network")
    return found


def _nodes(value: Any) -> int:
    """How many nodes a tree has."""
    return ("type" in value) + sum(map(_nodes, value.values())) if isinstance(value, dict) else 0


def _texts(value: Any) -> Any:
    """A tree with texts where it has bytes, as `nir.read` gives it to nir's nodes."""
    if isinstance(value, dict):
        return {name: _texts(part) for name, part in value.items()}
    return value.decode() if isinstance(value, bytes) else value
