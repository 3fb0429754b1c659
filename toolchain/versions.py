"""What ran: the versions that every result records, read from the installed packages' metadata without importing them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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


def processor() -> str:
    """The kind of processor, on which sums of floats depend in their last bits; the machine's name where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.node()
