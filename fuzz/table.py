"""Every fuzz target, by name.

To add one: a function that takes a scratch folder, makes small valid inputs (bytes), and returns `Prepared(seeds, read)`, where `read` writes its input
to a file in that folder and reads it with the toolchain; its docstring is the line that `--list` shows. Put `Target("name", function)` into the TARGETS of its
file, and that file's TARGETS here. Mutators for the format (see `mutate`) go deeper than those of bytes, which are always there; so does
`drawn`, a hypothesis strategy of bytes. Try it: `python -m fuzz --target name --inputs 2000 --jobs 1`.
"""

from __future__ import annotations

from fuzz import artefacts, data, exchange, runs
from fuzz.planted import PLANTED
from fuzz.target import Target

TARGETS: tuple[Target, ...] = (*artefacts.TARGETS, *runs.TARGETS, *data.TARGETS, *exchange.TARGETS)


def target(name: str) -> Target:
    """The target called `name`; SystemExit lists the names."""
    for each in (*TARGETS, PLANTED):
        if each.name == name:
            return each
    raise SystemExit(f"unknown target '{name}': choose one of {', '.join(each.name for each in TARGETS)}")
