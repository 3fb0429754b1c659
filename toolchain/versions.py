"""What ran: the versions that every result records, read from the installed packages' metadata without importing them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import toolchain

RECORDED = ("torch", "numpy", "lava-nc")
"""The libraries whose arithmetic is used."""


def versions() -> dict[str, str]:
    """Versions of toolchain, Python, and the libraries whose arithmetic is used ("not installed" where one is missing), and the kind of machine."""
    found = {"toolchain": toolchain.__version__, "python": platform.python_version(), "machine": platform.machine()}
    return found | {name: installed(name) or "not installed" for name in RECORDED}


def installed(distribution: str) -> str | None:
    """The version of an installed distribution; None where there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
