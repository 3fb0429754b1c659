"""Whether what a reader did with an input is fine: it returned, or it raised ToolchainError with one plain sentence. All else is a finding."""

from __future__ import annotations

import resource
import time
import traceback
import unicodedata
import warnings
from dataclasses import dataclass, field

from fuzz.target import Prepared
from toolchain.errors import ToolchainError
from toolchain.progress import visible

LONGEST_SENTENCE = 2000
"""Characters of an error's message."""


@dataclass(frozen=True)
class Finding:
    """What is wrong, in short, and a traceback or the message."""

    what: str
    detail: str


@dataclass
class Tally:
    """What the judge has seen so far; `milliseconds` (of CPU time) is the longest that an input took."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    milliseconds: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)


class Judge:
    """Gives inputs to a target's reader, and hears its warnings, also those that would be lost as errors because the reader refuses whatever a library raises."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.tally = Tally()

    def __call__(self, data: bytes) -> Finding | None:
        began = time.process_time()
        self.tally.inputs += 1
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                try:
                    self.prepared.read(data)
                    self.tally.accepted += 1
                    found = None
                except ToolchainError as error:
                    self.tally.refused += 1
                    found = unsound(error)
            if heard:
                said = heard[0]
                found = Finding(f"{said.category.__name__}: {str(said.message)[:100]!r}", f"{said.filename}:{said.lineno}")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of a Rust extension is no Exception
            found = Finding(f"{type(error).__name__}: {str(error)[:100]!r}", traceback.format_exc())
        self.tally.milliseconds = max(self.tally.milliseconds, 1e3 * (time.process_time() - began))
        return found


def unsound(error: ToolchainError) -> Finding | None:
    """What is wrong with an error's sentence, if anything: empty, too long, of several lines, or one that no terminal can show."""
    sentence = str(error)
    if not sentence.strip():
        return Finding("an empty sentence", repr(error))
    if len(sentence) > LONGEST_SENTENCE:
        return Finding(f"a sentence of {len(sentence)} characters", sentence[:LONGEST_SENTENCE])
    if "\n" in sentence.replace("\n- ", ""):  # a list of reasons may have lines
        return Finding("a sentence of several lines", repr(sentence))
    shown = visible(sentence).encode("utf-8", "backslashreplace").decode()
    if any(unicodedata.category(character) == "Cc" for character in shown.replace("\n", "").replace("\t", "")):
        return Finding("a sentence with control characters", repr(sentence))
    return None


def held() -> int:
    """The most memory that the process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
