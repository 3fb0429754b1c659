"""A target that does all that a reader must not: `python -m fuzz --target planted` shows that the campaign sees it. No part of a campaign."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path

from fuzz.target import MIB, Prepared, Target
from toolchain.errors import ArtifactError

KINDS = (b"fine", b"fine", b"refused", b"refused", b"raises", b"warns", b"swells", b"speaks", b"says two lines", b"crashes", b"computes")


def planted(folder: Path) -> Prepared:
    """What a reader could do wrong, one in a while."""

    def read(data: bytes) -> None:
        if data == b"refused":
            raise ArtifactError("it is damaged: restore it")
        if data == b"raises":
            raise KeyError(data)
        if data == b"warns":
            warnings.warn("it is old", stacklevel=1)
        if data == b"swells":
            bytearray(200 * MIB)
        if data == b"speaks":
            os.write(2, b"panic")
        if data == b"says two lines":
            raise Unplain
        if data == b"crashes":
            signal.raise_signal(signal.SIGSEGV)
        while data == b"computes":
            pass

    return Prepared([b"fine"], read, [lambda data, random: random.choice(KINDS)])


class Unplain(ArtifactError):
    def __str__(self) -> str:
        return "one\ntwo"


PLANTED = Target("planted", planted, seconds=0.3, memory=64 * MIB)
