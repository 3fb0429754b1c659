"""What a run has found so far, saved as it goes: `--resume` goes on from there (docs/scaling.md).

    CACHE/partial/KEY/question.json     what was asked; KEY is its sha256
    CACHE/partial/KEY/N-COUNT.answers   the answers to COUNT samples: the sha256 of the rest, then MessagePack

An answer is used again only where everything is the same that decides it, to the last weight and version, and the inputs of its samples too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from toolchain import shortage
from toolchain.data.places import cache
from toolchain.errors import ArtifactError, ToolchainError, UsageError
from toolchain.files import held, read_plain, replace_file
from toolchain.ir import Array
from toolchain.progress import say
from toolchain.shards import Message

EVERY, LATEST = 2.0, 10.0
"""Seconds between two saves: at least, and at most where a sample takes no longer."""

SHARE = 0.02
"""The part of a run's time that saving takes, unless `LATEST` has passed."""

BYTES_PER_SECOND = 2e8
"""How fast answers are saved, until a save has shown it."""

KEPT = 30 * 86_400
"""Seconds after which what nobody went on with is removed."""

PATIENCE = 3.0
"""Seconds that what a killed run had started may take to end; they hold its lock."""

LARGEST_QUESTION = 1 << 16
SAID = 3
"""So many stretches of samples are named one by one."""


@dataclass(frozen=True)
class Question:
    """What is asked of every sample of a data set.

    model    the network, and `target` where it runs, as messages say it
    facts    everything that decides the answers and the record, by name; computed where it is needed only, since it sums up every weight
    inputs   the inputs of some samples
    fits     whether an answer to some samples has the form that they give
    largest  more bytes than all answers together take
    """

    model: str
    target: str
    dataset: str
    samples: int
    facts: Callable[[], dict[str, str | int]]
    inputs: Callable[[slice], Array]
    fits: Callable[[slice, Message], bool]
    largest: int

    @property
    def what(self) -> str:
        return f"{self.model} on {self.target}"


@dataclass(frozen=True)
class _Piece:
    part: slice
    answer: Message


class Partials:
    """The questions of one command: what is saved of them is removed where it ends well, and completed and told where it does not."""

    def __init__(self, *, resume: bool, lower: Sequence[str]) -> None:
        """`lower` are the settings by which the command takes less memory."""
        self._resume = resume
        self._lower = lower
        self._all: list[Partial] = []

    def of(self, question: Question) -> Partial:
        """The answers to `question`, with those of an earlier run where this one is to go on from them."""
        if any(each.question.what == question.what for each in self._all):  # of two targets where one runs in the other's place
            return Partial(question)
        self._all.append(Partial(question, saves=True))
        self._all[-1].begin(resume=self._resume)
        return self._all[-1]

    def __enter__(self) -> Partials:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                for each in self._all:
                    each.remove()
            else:
                self._tell(error)
        finally:
            for each in self._all:
                each.close()

    def _tell(self, error: BaseException) -> None:
        """Save what is not saved yet, and have the error say what was done and what was not."""
        missing = shortage.found(error)
        if missing is not None:
            shortage.free(error)
        for each in self._all:
            each.save()
        worth = [each for each in self._all if each.done or missing is not None or getattr(error, "exit_code", 0) == 1]
        said = "; ".join(each.said() for each in worth)
        if missing is not None and self._all:
            raise ToolchainError(f"{self._all[-1].question.what} {missing.sentence}: {missing.remedy(self._lower)}; {said}") from error
        if isinstance(error, ToolchainError):
            error.args = ("; ".join(filter(None, (str(error), said))),)
        elif said and not isinstance(error, GeneratorExit):
            say(f"toolchain: {said}")


class Partial:
    """The answers to one question, found or saved; without `saves` they stay in memory."""

    def __init__(self, question: Question, *, saves: bool = False) -> None:
        self.question = question
        self.seconds = 0.0
        """What the earlier runs took that this one goes on from."""
        self._saves = saves
        self._pieces: list[_Piece] = []
        self._unsaved: list[tuple[_Piece, Array]] = []
        self._others = 0
        """Samples that an earlier run saved, which this one does not go on from."""
        self._number = 0
        self._began = self._saved_at = time.monotonic()
        self._speed = BYTES_PER_SECOND
        self._lock = contextlib.ExitStack()
        self._locked = False
        self._owned = False
        self._failed: str | None = None

    @property
    def done(self) -> int:
        """How many samples are answered."""
        return sum(_count(piece.part) for piece in self._pieces)

    def begin(self, *, resume: bool) -> None:
        """Look for what an earlier run saved: go on from it, or say that one could."""
        if resume:
            self._go_on()
        elif any(_saved(_root())):
            self._others = sum(int(file.stem.partition("-")[2]) for file in _saved(self._folder))
            if self._others:
                say(
                    f"toolchain: {self._others:,} of the {self.question.samples:,} samples on {self.question.what} are saved from an earlier run; --resume goes on from them"
                )
        self._began = self._saved_at = time.monotonic()

    def missing(self, parts: Iterable[slice]) -> list[slice]:
        """What of `parts` has no answer yet, in order."""
        gaps = list(_between([piece.part for piece in self._pieces], self.question.samples))
        met = (slice(max(part.start, gap.start), min(part.stop, gap.stop)) for part in parts for gap in gaps)
        return [part for part in met if part.start < part.stop]

    def answers(self) -> list[Message]:
        """All answers found, in the order of their samples."""
        return [piece.answer for piece in sorted(self._pieces, key=lambda piece: piece.part.start)]

    def add(self, part: slice, answer: Message, inputs: Array) -> None:
        """Keep the answer to the samples `part`, whose inputs are `inputs`; every few seconds what came is saved."""
        piece = _Piece(part, answer)
        self._pieces.append(piece)
        if self._saves:
            self._unsaved.append((piece, inputs))
            if self._due():
                self.save()

    def save(self) -> None:
        """Write the answers that are not written yet. Where that cannot be done, say so once and go on."""
        if not self._unsaved or self._failed is not None or (not self._owned and self.done <= self._others):
            return
        began = time.monotonic()
        try:
            old = self._own()
            rows = [(piece.part.start, piece.part.stop, _sum(inputs), piece.answer.packed()) for piece, inputs in self._unsaved]
            body = msgspec.msgpack.encode((self.seconds + began - self._began, rows))
            count = sum(_count(piece.part) for piece, _ in self._unsaved)
            replace_file(self._folder / f"{self._number:06}-{count}.answers", hashlib.sha256(body).digest() + body)
            for file in old:
                file.unlink(missing_ok=True)
        except (ToolchainError, OSError, MemoryError) as error:
            self._failed = str(error) or "there is no memory left for it"
            say(f"toolchain: the answers so far are not saved: {error}")
            return
        self._number += 1
        self._saved_at = time.monotonic()
        self._speed = self._size() / max(self._saved_at - began, 1e-6)
        self._unsaved = []

    def said(self) -> str:
        """What is done and what is not, in words."""
        asked, gaps = self.question, list(_between([piece.part for piece in self._pieces], self.question.samples))
        if not self._pieces:
            return f"none of the {asked.samples:,} samples of {asked.dataset} is done on {asked.target}"
        done = f"samples {_named(list(_between(gaps, asked.samples)))}" if gaps else f"all {asked.samples:,} samples"
        said = f"{done} of {asked.dataset} are done on {asked.target}"
        if self._failed is None:
            said += " and saved for --resume" if not self._unsaved else " (as many are saved for --resume by an earlier run)"
        return f"{said}, samples {_named(gaps)} are not done" if gaps else said

    def remove(self) -> None:
        """The command is done: nothing of this question stays saved."""
        if self._locked or self._others:
            with contextlib.suppress(ToolchainError):  # another run goes on from it at this moment
                self._hold(0)
                shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        self._lock.close()

    def _due(self) -> bool:
        passed = time.monotonic() - self._saved_at
        return passed >= EVERY and passed >= min(self._size() / self._speed / SHARE, LATEST)

    def _size(self) -> int:
        """Bytes of what is not saved yet and of its inputs, which are summed up."""
        return sum(inputs.nbytes + sum(array.nbytes for array in piece.answer.arrays.values()) for piece, inputs in self._unsaved)

    @cached_property
    def _facts(self) -> dict[str, str | int]:
        return self.question.facts()

    @cached_property
    def _folder(self) -> Path:
        return _root() / hashlib.sha256(self._described).hexdigest()[:32]

    @property
    def _described(self) -> bytes:
        return json.dumps(self._facts, sort_keys=True, separators=(",", ":")).encode()  # in ASCII: a model's file may have any name

    def _own(self) -> list[Path]:
        """Make the folder this run's, locked; the files of an earlier run that this one replaces."""
        if self._owned:
            return []
        _forget_old()
        old = [] if self._locked else list(_saved(self._folder))
        self._hold(PATIENCE)
        self._number = max([self._number, *(_number(file) + 1 for file in old)])
        replace_file(self._folder / "question.json", self._described)
        self._owned = True
        return old

    def _hold(self, patience: float) -> None:
        """Lock the folder; UsageError where another run has it for longer than `patience`."""
        until = time.monotonic() + patience
        while not self._locked:
            try:
                self._lock.enter_context(held(self._folder, otherwise="give the command without --resume"))
                self._locked = True
            except UsageError as error:
                if isinstance(error, ArtifactError) or time.monotonic() > until:
                    raise
                time.sleep(0.1)

    def _go_on(self) -> None:
        if not any(_saved(self._folder)):
            say(f"toolchain: nothing is saved of {self.question.what}{self._why()}: it starts with the first sample")
            return
        self._hold(PATIENCE)
        for file in sorted(_saved(self._folder)):
            self._number = max(self._number, _number(file) + 1)
            rows = self._read(file)
            taken = sum(self._take(*row) for row in rows)
            if not rows or taken < len(rows):
                say(f"toolchain: '{file}' is damaged or answers other inputs: samples in it run again")
        say(f"toolchain: {self.question.what} goes on with {self.done:,} of {self.question.samples:,} samples done")

    def _read(self, file: Path) -> list[tuple[int, int, bytes, bytes]]:
        """The rows of an answer file; none where it is not whole."""
        rows: list[tuple[int, int, bytes, bytes]] = []
        with contextlib.suppress(OSError, ArtifactError, ValueError, msgspec.MsgspecError):
            content = read_plain(file, self.question.largest)
            if hashlib.sha256(content[32:]).digest() == content[:32]:
                seconds, rows = msgspec.msgpack.decode(content[32:], type=tuple[float, list[tuple[int, int, bytes, bytes]]])
                self.seconds = max(self.seconds, seconds)
        return rows

    def _take(self, start: int, stop: int, digest: bytes, packed: bytes) -> bool:
        """Take a saved answer over, unless its samples are answered already; False where it is none to these samples."""
        part = slice(start, stop)
        if not 0 <= start < stop <= self.question.samples:
            return False
        if self.missing([part]) != [part]:
            return True
        try:
            answer = Message.unpacked(packed)
        except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
            return False
        if not self.question.fits(part, answer) or _sum(self.question.inputs(part)) != digest:
            return False
        self._pieces.append(_Piece(part, answer))
        return True

    def _why(self) -> str:
        """In what the saved answers of such a run differ, to follow "nothing is saved of ..."; empty where there are none."""
        near = [found for found in map(_asked, _root().glob("*/question.json")) if _same(found, self._facts, "model", "target", "dataset")]
        other = [[name for name in self._facts | found if found.get(name) != self._facts.get(name)] for found in near]
        other = [names for names in other if names]  # none: of this very question, without an answer
        if not other:
            return ""
        names = {"samples": "number of samples"}
        return f" with this {' and '.join(names.get(name, name) for name in sorted(other, key=len)[0])}"


def _root() -> Path:
    return cache() / "partial"


def _saved(folder: Path) -> Iterator[Path]:
    """The answer files of a folder; of the folder of all, those of every one."""
    found = folder.glob("*/*.answers" if folder == _root() else "*.answers")
    return (file for file in found if re.fullmatch(r"[0-9]+-[0-9]+", file.stem))


def _number(file: Path) -> int:
    return int(file.stem.partition("-")[0])


def _asked(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ArtifactError, ValueError, msgspec.MsgspecError, RecursionError):
        return msgspec.json.decode(read_plain(path, LARGEST_QUESTION), type=dict[str, Any])
    return {}


def _same(one: dict[str, Any], other: dict[str, str | int], *names: str) -> bool:
    return all(one.get(name) == other.get(name) for name in names)


def _forget_old() -> None:
    """Remove what runs left a long time ago."""
    for folder in _root().glob("*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > KEPT:
                shutil.rmtree(folder, ignore_errors=True)


def _sum(inputs: Array) -> bytes:
    """The sha256 of inputs."""
    found = hashlib.sha256(f"{inputs.dtype.str}{inputs.shape}".encode())
    found.update(np.ascontiguousarray(inputs).data.cast("B") if inputs.size else b"")
    return found.digest()


def _count(part: slice) -> int:
    return int(part.stop - part.start)


def _between(parts: Iterable[slice], samples: int) -> Iterator[slice]:
    """The stretches of 0 to `samples` - 1 that no part has."""
    first = 0
    for part in sorted(parts, key=lambda part: int(part.start)):
        if part.start > first:
            yield slice(first, part.start)
        first = part.stop
    if first < samples:
        yield slice(first, samples)


def _named(parts: Sequence[slice]) -> str:
    """Samples in words: "0 to 255, 512 and 600 to 999"."""
    words = [f"{part.start:,}" if _count(part) == 1 else f"{part.start:,} to {part.stop - 1:,}" for part in parts[:SAID]]
    rest = sum(_count(part) for part in parts[SAID:])
    return ", ".join(words) + (f" and {rest:,} more" if rest else "")
