"""Packages of an extra that a format needs: there, and able to load, before any work begins."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from toolchain.errors import UsageError


def require(extra: str, *names: str) -> None:
    """UsageError, with the command that installs it, where a package of `names` is missing or does not load; the others are loaded."""
    for name in names:
        if find_spec(name) is None:
            raise UsageError(f"{name} is not installed: run pip install 'fsnn-toolchain[{extra}]'")
        try:
            import_module(name)
        except ImportError as error:  # built for another Python, NumPy or system library
            said = " ".join(str(error).split())[:200]
            raise UsageError(
                f"{name} is installed and does not load ({said}): run pip install --force-reinstall 'fsnn-toolchain[{extra}]'"
            ) from None
