"""Mutations: of bytes, of JSON and YAML as values, and of safetensors files, whose header says where its tensors are."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from fuzz.target import Mutator, Prepared

LONGEST = 1 << 18
"""Bytes of an input; longer ones are cut: a small file that costs much is what is looked for."""

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 7, 8, 255, 256, 4096, 65_535, 65_536, 100_000, 100_001, 10**6, 10**9, 10**12),
    *(2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**31), -(2**63), -(2**63) - 1),
    *(0.0, -0.0, 0.5, 1.5, 1e-300, 5e-324, 1e30, 1e300, float("nan"), float("inf"), -float("inf")),
)
WORDS = (
    *(
        "",
        "a",
        "../../x",
        "/etc/passwd",
        "a/b",
        "..",
        "\x00",
        "\n",
        "\x1b[2J",
        "<script>alert(1)</script>",
        "'\"",
        "\ud800",
        "é",
        "\u202e",
        "nul",
    ),
    *(
        "x" * 300,
        "%s%n",
        "{0}",
        "NaN",
        "null",
        "true",
        "on",
        "1e999",
        "!!python/object/apply:os.system",
        "*a",
        "&a",
        "couple",
        "input",
        "readout",
    ),
)


def made(prepared: Prepared, random: Random) -> bytes:
    """An input: a seed after one to four mutations, of most inputs of their format only where there are mutators that know it."""
    data = random.choice(prepared.seeds)
    sound = random.random() < 0.6
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 4))):
        if prepared.mutators and (sound or random.random() < 0.5):
            with contextlib.suppress(RecursionError):  # newer versions of Python read JSON deeper than they walk it
                data = random.choice(prepared.mutators)(data, random)
        elif random.random() < 0.1:
            data = _spliced(data, random.choice(prepared.seeds), random)
        else:
            data = random.choice(BYTES)(data, random)
    return data[:LONGEST]


# ---- bytes


def _place(data: bytes, random: Random) -> int:
    """Beginnings, where headers are, are as likely as all the rest."""
    return random.randrange(min(len(data), 64) if random.random() < 0.5 else len(data)) if data else 0


def _flipped(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8)) if data else 0):
        changed[_place(data, random)] ^= 1 << random.randrange(8)
    return bytes(changed)


def _replaced(data: bytes, random: Random) -> bytes:
    at = _place(data, random)
    return data[:at] + bytes([random.choice((0, 1, 127, 128, 255, random.randrange(256)))]) + data[at + 1 :]


def _inserted(data: bytes, random: Random) -> bytes:
    at = _place(data, random)
    return data[:at] + random.choice((random.randbytes(random.randrange(1, 9)), b"\x00" * 64, b"\xff" * 8)) + data[at:]


def _deleted(data: bytes, random: Random) -> bytes:
    at = _place(data, random)
    return data[:at] + data[at + random.choice((1, 2, 4, 8, random.randrange(1, len(data) + 2))) :]


def _repeated(data: bytes, random: Random) -> bytes:
    at, size = _place(data, random), random.choice((1, 4, 16, 256))
    return data[:at] + data[at : at + size] * random.choice((2, 3, 50)) + data[at + size :]


def _cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _lengths(data: bytes, random: Random) -> bytes:
    """A number of 1 to 8 bytes, of either order, where a length may be."""
    form = random.choice(("<B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
    size = struct.calcsize(form)
    if len(data) < size:
        return data
    at = min(_place(data, random), len(data) - size)
    at -= at % random.choice((1, size))
    old = struct.unpack_from(form, data, at)[0]
    new = random.choice(
        (0, 1, old + 1, old - 1, old * 2, old // 2, 2**31, 2**32 - 1, 2**60, 2**63, len(data), len(data) + 1, 256**size - 1)
    )
    return data[:at] + struct.pack(form, new % 256**size) + data[at + size :]


def _spliced(data: bytes, other: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other) + 1) :]


BYTES: tuple[Mutator, ...] = (_flipped, _replaced, _inserted, _deleted, _repeated, _cut, _lengths, _lengths)


# ---- values


def value(found: Any, random: Random) -> Any:
    """`found` (dictionaries, lists, numbers, text) with one place changed: its value, its type, its key, its neighbours."""
    places: list[tuple[Any, Any]] = []
    walk(found, places)
    if not places:
        return extreme(random)
    parent, key = random.choice(places)
    kind = random.random()
    if kind < 0.6:
        parent[key] = _near(parent[key], random)
    elif kind < 0.7:
        parent[key] = extreme(random)
    elif kind < 0.8:
        other, name = random.choice(places)
        parent[key] = _copied(other[name])
    elif kind < 0.9:
        del parent[key]
    elif isinstance(parent, dict):
        other = random.choice((random.choice(WORDS), random.choice(list(parent)), str(key) + "x"))
        parent[other] = parent.pop(key)
    else:
        parent.insert(key, _copied(parent[key]))
    return found


def walk(found: Any, places: list[tuple[Any, Any]]) -> None:
    """Add every place of `found` to `places`, as its parent and the key there."""
    for key in list(found) if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ():
        places.append((found, key))
        walk(found[key], places)


def _copied(found: Any) -> Any:
    return json.loads(json.dumps(found))


def _near(old: Any, random: Random) -> Any:
    """Another value of the same type."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return random.choice((old + 1, old - 1, -old, old * 2, random.choice(NUMBERS)))
    if isinstance(old, float):
        return random.choice((old * 2, -old, old / 3, old + 1, random.choice(NUMBERS)))
    if isinstance(old, str):
        return random.choice((random.choice(WORDS), old + random.choice(WORDS), old[:-1], old.upper()))
    if isinstance(old, list):
        return random.choice((old[::-1], old * 2, old[:-1], [*old, extreme(random)], []))
    if isinstance(old, dict):
        return random.choice(({**old, random.choice(WORDS): extreme(random)}, {}, [old]))
    return extreme(random)


def extreme(random: Random) -> Any:
    """A value of any type."""
    kind = random.randrange(6)
    if kind == 0:
        return random.choice(WORDS)
    if kind == 1:
        return random.choice((None, True, False))
    if kind == 2:
        return random.choice(([], {}, [[]], {"a": {"a": {}}}, [1, 2], [random.choice(NUMBERS)] * 3))
    if kind == 3 and random.random() < 0.1:
        return _nested(random.choice((20, 200, 600)))
    return random.choice(NUMBERS)


def _nested(depth: int) -> Any:
    found: Any = 0
    for _ in range(depth):
        found = [found]
    return found


def json_text(data: bytes, random: Random) -> bytes:
    """JSON with a changed value, or what JSON written by hand may hold: a key twice, numbers of many digits, deep nesting. Other bytes stay."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return data
    return text_of(value(found, random), random)


def text_of(found: Any, random: Random) -> bytes:
    """`found` as JSON, now and then spoiled as text."""
    try:
        text = json.dumps(found)
    except (ValueError, RecursionError):
        return b"[" * 3000
    kind = random.random()
    if kind < 0.03 and '"' in text:
        at = text.index('"')
        text = text[:at] + '"twice": 1, "twice": 2, ' + text[at:]
    elif kind < 0.05:
        text = text.replace("1", "1" * random.choice((30, 5000)), 1)
    elif kind < 0.06:
        text = "[" * 5000 + text + "]" * 5000
    elif kind < 0.07:
        text = text.replace(":", ":" + '{"a":' * 2000, 1)
    elif kind < 0.09:
        return text.encode().replace(b"a", random.choice((b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\\u0000")), 1)
    return text.encode("utf-8", "surrogatepass")


def lines_of_json(data: bytes, random: Random) -> bytes:
    """`json_text` on one line of many."""
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    lines[at] = json_text(lines[at], random)
    return b"\n".join(lines)


def yaml_text(data: bytes, random: Random) -> bytes:
    """YAML with a changed value, or a changed line."""
    import yaml

    if random.random() < 0.5:
        try:
            return yaml.safe_dump(value(yaml.safe_load(data), random), sort_keys=False, allow_unicode=random.random() < 0.5).encode(
                "utf-8", "surrogatepass"
            )
        except (yaml.YAMLError, ValueError, LookupError, RecursionError, TypeError, AttributeError):  # tags break PyYAML in many ways
            return data
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    added = random.choice(YAML)
    kind = random.randrange(4)
    if kind == 0:
        lines.insert(at, added)
    elif kind == 1:
        lines[at] = lines[at].partition(b":")[0] + b": " + added
    elif kind == 2:
        lines[at] = b" " * random.randrange(9) + lines[at].lstrip()
    else:
        lines.insert(at, lines[at])
    return b"\n".join(lines)


YAML: tuple[bytes, ...] = (
    *(
        b"&a [*a]",
        b"*a",
        b"a: &a b",
        b"<<: {a: 1}",
        b"!!python/object/apply:os.system ['true']",
        b"!!binary aGFsbG8=",
        b"!!set {a, b}",
        b"!!float x",
    ),
    *(
        b"? [a]\n: b",
        b"--- a\n--- b",
        b"%YAML 9.9\n---",
        b"- - - - -",
        b"[" * 2000,
        b"{a: " * 500,
        b"? " * 500,
        b"\t- a",
        b"'",
        b'"\\ud800"',
        b'"\\0"',
    ),
    *(
        b"2001-01-01",
        b"9999-99-99",
        b"1:2:3:4",
        b"190:20:30.15",
        b"0o9",
        b"0x" + b"f" * 400,
        b"9" * 5000,
        b"1_0",
        b"1e5",
        b".nan",
        b"-.inf",
        b"~",
    ),
    *(
        b"2001-12-14t21:59:43.10-99:99",
        b"=",
        b"<<",
        b"|\n  a",
        b">-\n",
        b"\xff\xfe",
        b"\xc3\x28",
        b"\x00",
        b"#",
        b": :",
        b"!<x> y",
        b"!!int ''",
    ),
)


# ---- safetensors


def parts(data: bytes) -> tuple[Any, bytes] | None:
    """(header, tensors' bytes) of a safetensors file; None where it is none."""
    if len(data) < 8:
        return None
    size = struct.unpack_from("<Q", data)[0]
    try:
        header = json.loads(data[8 : 8 + size]) if size <= len(data) - 8 else None
    except (ValueError, RecursionError):
        return None
    return (header, data[8 + size :]) if isinstance(header, dict) else None


def joined(header: bytes, tensors: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + tensors


def tensor_header(data: bytes, random: Random) -> bytes:
    """A safetensors file whose table of tensors (types, shapes, places) is changed."""
    found = parts(data)
    if found is None:
        return data
    header, tensors = found
    names = [name for name in header if name != "__metadata__"]
    if names and random.random() < 0.7:
        entry = header[random.choice(names)]
        kind = random.randrange(4)
        if not isinstance(entry, dict):
            return data
        if kind == 0:
            entry["dtype"] = random.choice(
                ("BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "F64", "I64", "U64", "F8_E5M2", "F4", "C64", "x", 1)
            )
        elif kind == 1:
            entry["shape"] = value(entry.get("shape"), random) if entry.get("shape") else [random.choice(NUMBERS)]
        elif kind == 2:
            entry["shape"] = list(reversed(entry.get("shape") or [1]))
        else:
            entry["data_offsets"] = value(entry.get("data_offsets"), random)
        return joined(text_of(header, random), tensors)
    return joined(text_of(value(header, random), random), tensors)


def tensor_bytes(data: bytes, random: Random) -> bytes:
    """A safetensors file with other numbers in its tensors: single bytes, or NaN, infinities and extremes of a whole word."""
    found = parts(data)
    if found is None or not found[1]:
        return data
    changed = bytearray(found[1])
    for _ in range(random.choice((1, 3, 20))):
        word = random.choice(
            (
                b"\x00\x00\xc0\x7f",
                b"\x00\x00\x80\xff",
                b"\xff" * 8,
                b"\x00" * 8,
                b"\x80",
                b"\x7f",
                random.randbytes(4),
                struct.pack("<d", 1e300),
            )
        )
        at = random.randrange(len(changed))
        at -= at % len(word)
        changed[at : at + len(word)] = word[: len(changed) - at]
    return joined(text_of_exactly(found[0]), bytes(changed))


def text_of_exactly(header: Any) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode("utf-8", "surrogatepass")


def metadata(key: str, sign: Callable[[bytes], bytes] | None = None) -> Mutator:
    """A mutator of the JSON that a safetensors file keeps as text in its metadata entry `key`; `sign` mends what proves the file whole."""

    def mutate(data: bytes, random: Random) -> bytes:
        found = parts(data)
        about = found[0].get("__metadata__") if found is not None else None
        if found is None or not isinstance(about, dict) or not isinstance(about.get(key), str):
            return data
        changed = json_text(about[key].encode("utf-8", "surrogatepass"), random)
        about[key] = changed.decode("utf-8", "replace")
        whole = joined(text_of_exactly(found[0]), found[1])
        return whole if sign is None or random.random() < 0.1 else sign(whole)

    return mutate


def then(first: Mutator, mend: Callable[[bytes], bytes]) -> Mutator:
    """`first`, then `mend` on what it made."""
    return lambda data, random: mend(first(data, random))


def chosen(options: Sequence[bytes]) -> Mutator:
    """Any of `options` in place of the input."""
    return lambda data, random: random.choice(options)
