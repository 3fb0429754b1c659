"""An HDF5 file's numbers and texts, read by a child process that may fail: the HDF5 library crashes on some damaged files and never returns from others.

The child is bounded in time and memory, looks at the whole tree before it loads anything, and hands over plain bytes: nothing that it sends is more than numbers, texts and
names to the process that asked. HDF5 can say more than a network needs, such as links to other files, loops of groups, packing by plug-ins, or data sets of petabytes in a few bytes: all that is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from toolchain import apart
from toolchain.errors import ArtifactError

LARGEST = 2 * 2**30
"""Bytes of all data sets of a file, unpacked; a larger file is refused before it is loaded."""

PACKED = 1100
"""A byte of gzip holds at most 1032: data sets that claim more than the file can hold are fill values."""

MOST_ENTRIES = 200_000
"""Groups and data sets of a file."""

DEEPEST = 16
"""Groups within groups."""

FILTERS = (1, 2, 3)
"""Of HDF5: gzip, shuffle, a checksum. Any other could be a plug-in, which HDF5 loads from where the environment says."""

SECONDS = 10.0
"""Of processor time for a file of a few bytes; each MiB more has one more."""

ROOM = 256 * 2**20
"""Bytes of memory for the child beyond what the file may unpack to."""

LARGEST_HEADER = 2**28
"""Bytes of the list of entries that the child sends: their names, and the lengths of their texts."""

Tree = dict[str, Any]
"""Groups as dictionaries; data sets as HDF5 gives them: numbers, arrays of numbers, bytes, arrays of bytes."""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A group (no `dtype`), or a data set: the next `size` bytes are its numbers, or its texts of `lengths` one after the other."""

    path: tuple[str, ...]
    dtype: str = ""
    shape: tuple[int, ...] = ()
    size: int = 0
    lengths: tuple[int, ...] | None = None


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the child found: `damage` that HDF5 tells, a `problem` of the tree, or the entries, whose bytes follow."""

    damage: str = ""
    problem: str = ""
    entries: tuple[Entry, ...] = ()


def read(path: Path, group: str, kind: str) -> Tree:
    """What lies in `group` of the HDF5 file `path`; ArtifactError in one sentence, which calls it a file of `kind`, where it is damaged, larger than it can be, or no plain tree."""
    try:
        bytes_there = path.stat().st_size
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read ({error.strerror}): check the path") from None
    most = min(LARGEST, 2**20 + PACKED * bytes_there)
    seconds = int(SECONDS + bytes_there / 2**20)
    import h5py  # so that no child has to  # noqa: F401

    try:
        answer, tree = apart.run(
            lambda out: _send(out, path, group, most), lambda stream: _received(stream, most), seconds=seconds, memory=most + ROOM
        )
    except apart.Died as died:
        why = f"takes more than {seconds} s to read" if died.slow else "makes the HDF5 library fail"
        raise ArtifactError(f"'{path}' {why}, so it is damaged or no {kind} file: restore it, or export the network again") from None
    if answer.damage:
        raise ArtifactError(
            f"'{path}' is damaged or no HDF5 file, which {kind} files are ({answer.damage}): restore it, or export the network again"
        )
    if answer.problem:
        raise ArtifactError(f"'{path}' {answer.problem}: this is no {kind} file to load")
    return tree


# ---- the parent's side


def _received(stream: BinaryIO, most: int) -> tuple[Answer, Tree]:
    """What the child sends; ValueError and the like where it is not what a child sends."""
    size = int.from_bytes(_exactly(stream, 8), "little")
    if size > LARGEST_HEADER:
        raise ValueError(size)
    try:
        answer = msgspec.msgpack.decode(_exactly(stream, size), type=Answer)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
    if sum(entry.size for entry in answer.entries) > most or any(entry.size < 0 for entry in answer.entries):
        raise ValueError("more than it may send")
    tree: Tree = {}
    for entry in answer.entries:
        *groups, name = entry.path
        inside = tree
        for part in groups:
            inside = inside[part]
        inside[name] = _value(entry, _exactly(stream, entry.size)) if entry.dtype else {}
    return answer, tree


def _exactly(stream: BinaryIO, size: int) -> bytearray:
    taken = bytearray(size)
    if stream.readinto(taken) < size:  # type: ignore[attr-defined]  # every stream of a pipe has it
        raise EOFError
    return taken


def _value(entry: Entry, data: bytearray) -> Any:
    if entry.lengths is None:
        dtype = np.dtype(entry.dtype)
        if dtype.kind not in "biufS":
            raise ValueError(entry.dtype)
        return np.frombuffer(data, dtype).reshape(entry.shape)[()]
    texts = np.empty(len(entry.lengths), object)
    start = 0
    for i, length in enumerate(entry.lengths):
        texts[i] = bytes(data[start : start + length])
        start += length
    return texts.reshape(entry.shape)[()]


# ---- the child's side


def _send(stream: BinaryIO, path: Path, group: str, most: int) -> None:
    import h5py

    blocks: list[Any] = []
    entries: list[Entry] = []
    try:
        with h5py.File(path, "r") as file:
            problem = _problem(h5py, file, group, most)
            left = most
            for place, value in _values(h5py, file[group], ()) if problem is None else ():
                entry, own = _packed(place, value)
                left -= entry.size
                if left < 0:  # texts may share one place in the file
                    problem = f"unpacks to more than {most:,} bytes, at '{'/'.join(place)[:200]}'"
                    break
                entries.append(entry)
                blocks += own
        answer = Answer(problem=problem) if problem else Answer(entries=tuple(entries))
    except MemoryError:
        answer = Answer(problem=f"needs more memory to read than a file of its size holds ({most:,} bytes)")
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        answer = Answer(damage=" ".join(str(error).split())[:300] or type(error).__name__)
    header = msgspec.msgpack.encode(answer)
    stream.write(len(header).to_bytes(8, "little"))
    stream.write(header)
    for block in blocks if answer.entries else ():
        stream.write(block)


def _problem(h5py: Any, file: Any, group: str, most: int) -> str | None:
    """Why the tree is not to be loaded; nothing is loaded to find that."""
    if group in file and not isinstance(file.get(group, getlink=True), h5py.HardLink):
        return f"links to another place at '{group}'"
    if group not in file or not isinstance(file.get(group), h5py.Group):
        return f"is an HDF5 file without the group '{group}' that such files have"
    seen, total = set(), 0
    waiting = [(group, file[group], 1)]
    while waiting:
        name, found, depth = waiting.pop()
        if depth > DEEPEST:
            return f"has groups {DEEPEST} deep, at '{name[:200]}'"
        for key in found:
            where = f"{name}/{key}"[:200]
            if not isinstance(found.get(key, getlink=True), h5py.HardLink):
                return f"links to another place at '{where}'"
            entry = found[key]
            key.encode()  # ValueError where the name is no text
            address = h5py.h5o.get_info(entry.id).addr
            if address in seen:
                return f"has one entry twice, at '{where}'"
            seen.add(address)
            if len(seen) > MOST_ENTRIES:
                return f"has more than {MOST_ENTRIES:,} entries"
            if isinstance(entry, h5py.Group):
                waiting.append((where, entry, depth + 1))
            elif isinstance(entry, h5py.Dataset):
                problem = _strange(h5py, entry, where)
                if problem is not None:
                    return problem
                total += entry.nbytes
                if total > most:
                    return f"unpacks to more than {most:,} bytes, at '{where}' of shape {entry.shape}"
            else:
                return f"has a {type(entry).__name__} at '{where}'"
    return None


def _strange(h5py: Any, entry: Any, where: str) -> str | None:
    """Why a data set is none of plain numbers or texts in the file itself."""
    if entry.external or entry.is_virtual:
        return f"keeps '{where}' in another file"
    if entry.dtype.kind not in "biufS" and h5py.check_string_dtype(entry.dtype) is None:
        return f"has values that are neither real numbers nor texts (HDF5's {entry.dtype}) at '{where}'"
    if entry.shape is None:
        return f"has nothing at '{where}'"
    settings = entry.id.get_create_plist()
    packed = [settings.get_filter(i)[0] for i in range(settings.get_nfilters())]
    unknown = next((number for number in packed if number not in FILTERS), None)
    return None if unknown is None else f"packs '{where}' with HDF5's filter {unknown}, where gzip is read"


def _values(h5py: Any, group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(place, value) of all that lies in a group without a problem, groups before what lies in them; the value of a group is None."""
    for key in group:
        entry, place = group[key], (*path, key)
        if isinstance(entry, h5py.Group):
            yield place, None
            yield from _values(h5py, entry, place)
        else:
            yield place, entry[()]


def _packed(place: tuple[str, ...], value: Any) -> tuple[Entry, list[Any]]:
    """What is sent of a value: its entry, and its bytes."""
    if value is None:
        return Entry(place), []
    if isinstance(value, bytes) or np.asarray(value).dtype.kind == "O":
        texts = [bytes(text) for text in np.asarray(value, object).reshape(-1)]
        lengths = tuple(len(text) for text in texts)
        return Entry(place, "O", np.shape(value), sum(lengths), lengths), texts
    numbers = np.ascontiguousarray(value)
    return Entry(place, numbers.dtype.str, np.shape(value), numbers.nbytes), [numbers.data] if numbers.size else []
