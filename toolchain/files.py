"""Writing files so that nothing half-written ever has a name."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from toolchain.errors import ArtifactError


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, then rename: `path` holds either the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"cannot write '{path}' ({error.strerror}): choose a writable place with free space") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def ready_folder(path: Path) -> None:
    """Make the folder `path` now, before work whose result goes there; ArtifactError where it cannot be written."""
    probe = path / f".{os.getpid()}.part"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ArtifactError(f"cannot write into folder '{path}' ({error.strerror}): choose a writable place with free space") from None
