"""Networks as NIR files (Pedersen et al., Nature Communications 2024): HDF5 that the package `nir` reads and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.errors import UsageError
from toolchain.source import Source


def export(source: Source, path: Path, **measured: Any) -> Any:
    """Write `source` to `path`."""
    raise UsageError("export to nir is not part of this version of the toolchain: choose netx")


def import_(path: Path, output: Path | None, *, time_steps: int | None = None, **options: Any) -> Any:
    """Read the network of `path`."""
    raise UsageError("import of nir is not part of this version of the toolchain: leave it out")
