"""What MODEL may be: a zoo name, a run folder, a checkpoint, a .fsnn file, or the object itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Union

from toolchain import artifact
from toolchain.artifact import Artifact
from toolchain.errors import UsageError
from toolchain.progress import visible

if TYPE_CHECKING:
    from toolchain.layers import FeedbackSNN

__all__ = ["Model", "Source", "find"]

LEARNED = "learned.fsnn"
"""The file of a run folder of `toolchain learn` that holds the network."""

Model = Union[str, "os.PathLike[str]", "FeedbackSNN", Artifact]


@dataclass(frozen=True)
class Source:
    """A model that was found: the torch module, or the artefact compiled from one (exactly one of the two)."""

    name: str
    module: FeedbackSNN | None
    artifact: Artifact | None


def find(model: Model) -> Source:
    """Resolve MODEL; UsageError says what was looked for where nothing is found."""
    if isinstance(model, Artifact):
        return Source(model.graph.provenance.model, None, model)
    if not isinstance(model, (str, os.PathLike)):
        return Source(model.name, model, None)
    path = Path(model)
    if path.suffix == ".fsnn":
        return Source(visible(path.stem), None, artifact.read(path))
    from toolchain import models

    if str(model) in models.names():
        return Source(str(model), models.load(str(model)), None)
    if not _exists(path):
        raise UsageError(
            f"there is no model '{str(model)[:200]}': give a file or run folder that exists, or one of {', '.join(models.names())}"
        )
    if (path / LEARNED).is_file():
        return Source(visible(path.name), None, artifact.read(path / LEARNED))
    from toolchain.checkpoint import load

    return Source(visible(path.stem or path.name), load(path), None)


def _exists(path: Path) -> bool:
    """Whether there is such a file or folder; a name no file system takes is none."""
    try:
        return str(path) != "." and path.exists()
    except OSError:
        return False
