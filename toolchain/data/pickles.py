"""The pickled batches of CIFAR read as plain data: a small interpreter of the instructions those files hold.

Nothing is imported, looked up or called. A name in the file is compared with the seven below and stands for nothing but itself; a "call" of one of them
makes an array of bytes, or bytes from text. Every other instruction, name or type is an ArtifactError. Work and memory are bounded by the size of the
file: an instruction makes no more than it reads, and there are at most `MOST_INSTRUCTIONS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain.errors import ArtifactError

MOST_INSTRUCTIONS = 1 << 19
"""The largest published file, CIFAR-100's training images, has about 200,000: 50,000 file names, each kept for later, and 100,000 labels."""

LONGEST_NAME = 64
RECONSTRUCT, NDARRAY, DTYPE, ENCODE = "reconstruct", "ndarray", "dtype", "encode"
NAMES = {
    "numpy.core.multiarray _reconstruct": RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": RECONSTRUCT,  # as NumPy 2 writes it
    "numpy ndarray": NDARRAY,
    "numpy dtype": DTYPE,
    "_codecs encode": ENCODE,  # how Python 3 writes bytes for Python 2
}


def read(content: bytes, where: str) -> Any:
    """What a pickle of dictionaries (their keys as str), lists, tuples, bytes, str, small ints and uint8 arrays holds.

    ArtifactError, starting with `where`, for anything else, for a file that ends too soon, and for one that goes on after its end.
    """
    return _Reader(content, where).value()


@dataclass(frozen=True)
class _Name:
    """A name of `NAMES`; it is never looked up."""

    what: str


@dataclass
class _Array:
    """An array under construction: its values come with the instruction that builds it."""

    values: npt.NDArray[np.uint8] | None = None


class _Bytes8:
    """The type of unsigned bytes, the only one that arrays may have."""


class _Mark:
    """Where a run of items starts on the stack."""


class _Reader:
    def __init__(self, content: bytes, where: str) -> None:
        self.content, self.where = content, where
        self.position = 0
        self.encoded = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def value(self) -> Any:
        for _ in range(MOST_INSTRUCTIONS):
            code = self.take(1)[0]
            if code == STOP:
                return self.result()
            act = INSTRUCTIONS.get(code)
            if act is None:
                raise self.error(f"holds pickle instruction 0x{code:02x} at byte {self.position - 1}, which no batch of images needs")
            act(self)
        raise self.error(f"holds more than {MOST_INSTRUCTIONS} pickle instructions")

    def result(self) -> Any:
        if len(self.stack) != 1:
            raise self.error("ends with a pickle that is not complete")
        if self.position != len(self.content):
            raise self.error(f"goes on for {len(self.content) - self.position} bytes after its pickle")
        return _finished(self.stack[0])

    def error(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.where} {what}: it was not run; take the published file")

    # the file

    def take(self, count: int) -> bytes:
        taken = self.content[self.position : self.position + count]
        if len(taken) < count:
            raise ArtifactError(f"{self.where} ends inside its pickle, {count - len(taken)} bytes short: restore the file")
        self.position += count
        return taken

    def number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def raw(self, size: int) -> bytes:
        """Bytes after their length of `size` bytes; the file must hold them before anything is copied."""
        length = self.number(size)
        if length > len(self.content) - self.position:
            raise ArtifactError(f"{self.where} claims {length} bytes where {len(self.content) - self.position} are left: restore the file")
        return self.take(length)

    def text(self, size: int) -> str:
        raw = self.raw(size)
        if re.search(rb"[\xc4-\xff]", raw):  # from U+0100 on, a str would need up to four times the bytes
            raise self.error("holds text that is not Latin-1")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.error("holds text that is not UTF-8") from None

    def line(self) -> str:
        end = self.content.find(b"\n", self.position, self.position + LONGEST_NAME)
        if end < 0:
            raise self.error("holds a name that is too long or has no end")
        return self.take(end + 1 - self.position)[:-1].decode("latin-1")

    # the stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, kind: type | tuple[type, ...] = object) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise self.error(f"holds a pickle whose parts do not fit together at byte {self.position - 1}")
        return self.stack.pop()

    def top(self, kind: type | tuple[type, ...]) -> Any:
        found = self.pop(kind)
        self.push(found)
        return found

    def marked(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[place], _Mark):
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise self.error(f"holds a pickle whose parts do not fit together at byte {self.position - 1}")

    # instructions that do more than push

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def remember(self, place: int) -> None:
        self.memo[place] = self.top(object)

    def recall(self, place: int) -> None:
        if place not in self.memo:
            raise self.error(f"refers to part {place}, which it does not hold")
        self.push(self.memo[place])

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        found = self.top(dict)
        if len(items) % 2:
            raise self.error("holds a dictionary with a key that lacks its value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, bytes)) or len(key) > LONGEST_NAME:
                raise self.error("holds a dictionary with a key that is no short text")
            found[key if isinstance(key, str) else key.decode("latin-1")] = value

    def name(self, module: str, word: str) -> None:
        full = f"{module} {word}"
        if full not in NAMES:
            raise self.error(f"names {module[:LONGEST_NAME]!r} {word[:LONGEST_NAME]!r}, which no batch of images needs")
        self.push(_Name(NAMES[full]))

    def stack_name(self) -> None:
        word, module = self.pop(str), self.pop(str)
        self.name(module, word)

    def call(self) -> None:
        arguments, name = self.pop(tuple), self.pop(_Name)
        if name.what == RECONSTRUCT and len(arguments) == 3 and isinstance(arguments[0], _Name) and arguments[0].what == NDARRAY:
            self.push(_Array())
        elif name.what == DTYPE and len(arguments) == 3 and _is(arguments[0], "u1"):
            self.push(_Bytes8())
        elif name.what == ENCODE and len(arguments) == 2 and isinstance(arguments[0], str) and _is(arguments[1], "latin1"):
            self.push(self.encode(arguments[0]))
        else:
            raise self.error("holds values of another type than unsigned bytes")

    def encode(self, text: str) -> bytes:
        """The one instruction that makes bytes which it does not read: the file's own size bounds all of them together."""
        self.encoded += len(text)
        if self.encoded > len(self.content):
            raise self.error("unfolds into more bytes than it holds")
        return text.encode("latin-1")  # `text` let nothing else in

    def build(self) -> None:
        state = self.pop(tuple)
        found = self.top((_Array, _Bytes8))
        if isinstance(found, _Bytes8):
            return  # byte order and alignment: bytes have neither
        if len(state) != 5 or not isinstance(state[1], tuple) or not isinstance(state[2], _Bytes8) or not isinstance(state[4], bytes):
            raise self.error("holds an array of another type than unsigned bytes")
        _, shape, _, fortran, values = state
        if not all(isinstance(n, int) and 0 <= n <= len(values) for n in shape) or len(shape) > 4 or prod(shape) != len(values):
            raise self.error(f"holds an array whose shape does not fit its {len(values)} bytes")
        found.values = np.frombuffer(values, np.uint8).reshape(shape, order="F" if fortran == 1 else "C")


def _is(found: Any, word: str) -> bool:
    return isinstance(found, (str, bytes)) and found in (word, word.encode())


def _finished(value: Any) -> Any:
    """Arrays at the top of the dictionary as arrays; one that was never built is None."""
    if isinstance(value, dict):
        return {key: found.values if isinstance(found, _Array) else found for key, found in value.items()}
    return value


STOP = ord(".")
INSTRUCTIONS: dict[int, Callable[[_Reader], None]] = {
    0x80: lambda r: _check_protocol(r, r.number(1)),
    0x95: lambda r: _ignore(r.take(8)),  # length of a frame
    ord("("): lambda r: r.push(_Mark()),
    ord("}"): lambda r: r.push({}),
    ord("]"): lambda r: r.push([]),
    ord(")"): lambda r: r.push(()),
    ord("t"): lambda r: r.push(tuple(r.marked())),
    0x85: lambda r: r.tuple_of(1),
    0x86: lambda r: r.tuple_of(2),
    0x87: lambda r: r.tuple_of(3),
    ord("q"): lambda r: r.remember(r.number(1)),
    ord("r"): lambda r: r.remember(r.number(4)),
    0x94: lambda r: r.remember(len(r.memo)),
    ord("h"): lambda r: r.recall(r.number(1)),
    ord("j"): lambda r: r.recall(r.number(4)),
    ord("U"): lambda r: r.push(r.raw(1)),
    ord("T"): lambda r: r.push(r.raw(4)),
    ord("C"): lambda r: r.push(r.raw(1)),
    ord("B"): lambda r: r.push(r.raw(4)),
    ord("X"): lambda r: r.push(r.text(4)),
    0x8C: lambda r: r.push(r.text(1)),
    ord("K"): lambda r: r.push(r.number(1)),
    ord("M"): lambda r: r.push(r.number(2)),
    ord("J"): lambda r: r.push(r.number(4, signed=True)),
    ord("N"): lambda r: r.push(None),
    0x88: lambda r: r.push(True),
    0x89: lambda r: r.push(False),
    ord("a"): lambda r: r.append([r.pop()]),
    ord("e"): lambda r: r.append(r.marked()),
    ord("s"): lambda r: r.set_items([r.pop(), r.pop()][::-1]),
    ord("u"): lambda r: r.set_items(r.marked()),
    ord("c"): lambda r: r.name(r.line(), r.line()),
    0x93: lambda r: r.stack_name(),
    ord("R"): lambda r: r.call(),
    ord("b"): lambda r: r.build(),
}


def _check_protocol(reader: _Reader, version: int) -> None:
    if version not in (2, 3, 4):
        raise reader.error(f"is a pickle of protocol {version}, not 2 to 4")


def _ignore(_: bytes) -> None:
    """Nothing: what a frame says of its length, the file says better."""
