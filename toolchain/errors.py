"""Every error of the toolchain: one base class, one exit code each.

A message says what is wrong, where, and what to do, with names and numbers, in one sentence. The command line prints it and exits with
`exit_code`; a library user catches `ToolchainError`.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["ArtifactError", "DesignRuleError", "GraphError", "ToleranceError", "ToolchainError", "UsageError"]


LONGEST = 2000
"""Characters of a message that quotes what was given; of a longer one the beginning and the end are kept."""


class ToolchainError(Exception):
    """Something went wrong while the tool ran (a target died, a deadline passed)."""

    exit_code = 1


class UsageError(ToolchainError):
    """What was asked for cannot be done: an unknown name, a missing or damaged file, a wrong shape, a missing dependency."""

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        parts = str(message).split("\n- ")  # a list of reasons keeps its lines; what a library or a name brought does not
        text = "\n- ".join(" ".join(line.strip() for line in part.splitlines()) for part in parts)
        if len(text) > LONGEST:
            text = f"{text[: LONGEST - 600]} [and {len(text) - LONGEST + 100:,} more characters] {text[-500:]}"
        super().__init__(text)


class GraphError(UsageError):
    """A graph that breaks a rule of `ir.verify`, or that a pass cannot take."""


class ArtifactError(UsageError):
    """A .fsnn file, checkpoint or data file that cannot be read, or whose parts contradict each other."""


class DesignRuleError(ToolchainError):
    """The graph does not fit the chip or the target."""

    exit_code = 3


class ToleranceError(ToolchainError):
    """A comparison or verification outside its tolerance."""

    exit_code = 4


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name nobody knows: it lists the names that are known."""
    return UsageError(f"unknown {kind} '{name}': choose one of {', '.join(sorted(known))}")
