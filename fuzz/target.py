"""What a fuzz target is: valid inputs to begin with, and the reader that gets what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

MIB = 2**20

Mutator = Callable[[bytes, Random], bytes]
"""Makes another input of one; it takes any bytes, also those that another mutator has spoiled."""


@dataclass(frozen=True)
class Prepared:
    """A target in a process: `read` takes an input and returns, or raises ToolchainError. Everything else is a finding.

    `seeds` are valid inputs, small ones, which `read` accepts. `mutators` know the format; those of bytes are always there.
    `drawn` draws structured inputs by hypothesis; a share of the inputs comes from it.
    """

    seeds: Sequence[bytes]
    read: Callable[[bytes], object]
    mutators: Sequence[Mutator] = ()
    drawn: Union[SearchStrategy[bytes], None] = None


@dataclass(frozen=True)
class Target:
    """`prepare` gets a scratch folder of the process's own. An input may take `seconds` of CPU time and the process `memory` bytes beyond what
    it held after reading its seeds. `share`: its part of a campaign's inputs, beside the others'."""

    name: str
    prepare: Callable[[Path], Prepared]
    share: int = 1
    seconds: float = 10.0
    memory: int = 512 * MIB
