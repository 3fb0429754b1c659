"""ONNX files of others, read with care: no array is larger than the bytes that are there for it, and of other files only FILE.onnx.data, where PyTorch puts the weights of FILE.onnx."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from toolchain import apart
from toolchain.errors import ArtifactError
from toolchain.files import read_plain
from toolchain.ir import Array

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

LARGEST_FILE = 2**31
"""Protocol buffers end there."""

MOST_NODES = 100_000
"""More than any network of neurons, fewer than a hostile file can hold."""

SECONDS, ROOM, UNFOLDED = 10.0, 2**28, 8
"""Bounds on reading a file: of processor time, with one second more for each MiB; of memory, with that many bytes more for each of the file's (parsed, checked and held at once)."""

LONGEST_SENTENCE = 2000
FINE = "fine"


def read(path: Path) -> ModelProto:
    """The model in `path`, without functions and training of its own; ArtifactError, in one sentence, where it is too large, damaged, not valid ONNX, or keeps weights in other files.

    A child process reads it first: a few bytes of protocol buffers may unfold into hundreds of times as much, and ONNX's checker is a library in C++.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ArtifactError(f"'{path}' has {size:,} bytes and an ONNX file ends at 2 GiB: it is another kind of file")
        content = read_plain(path, size)  # not more, also of a file that grows meanwhile
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read ({error.strerror}): check the path") from None
    beside = path.with_name(f"{path.name}.data")
    there = size + (beside.stat().st_size if beside.is_file() else 0)
    try:
        said = apart.run(
            lambda out: _try(out, content, path),
            _told,
            seconds=int(SECONDS + there / 2**20),
            memory=ROOM + UNFOLDED * min(there, LARGEST_FILE),
        )
    except apart.Died as died:
        why = "takes too long to read" if died.slow else "makes the ONNX library fail"
        raise ArtifactError(f"'{path}' {why}, so it is damaged or no ONNX file: export it again") from None
    if said != FINE:
        raise ArtifactError(said)
    return _read(content, path)


def _try(out: BinaryIO, content: bytes, path: Path) -> None:
    """Read the file, and write what is wrong with it, or that it is fine."""
    try:
        _read(content, path)
        said = FINE
    except ArtifactError as error:
        said = str(error)
    except MemoryError:
        said = f"'{path}' needs more memory to read than a network of its size does: it is damaged or no ONNX file, export it again"
    out.write(said.encode()[:LONGEST_SENTENCE])


def _told(stream: BinaryIO) -> str:
    """What `_try` has written."""
    said = stream.read(LONGEST_SENTENCE).decode(errors="replace")
    if not said:
        raise EOFError
    return said


def _read(content: bytes, path: Path) -> ModelProto:
    import onnx

    try:
        model: ModelProto = onnx.load_model_from_string(content)
    except MemoryError:
        raise
    except Exception:  # protocol buffers' own errors
        raise ArtifactError(f"'{path}' is damaged or no ONNX file: export it again") from None
    nodes = sum(len(graph.node) for graph in _graphs(model.graph))
    if not nodes:
        raise ArtifactError(f"'{path}' holds no nodes: it is damaged or no ONNX file, export it again")
    if nodes > MOST_NODES:
        raise ArtifactError(f"'{path}' has {nodes:,} nodes, more than {MOST_NODES:,}: it is no network of neurons")
    own = [function for function in model.functions if function.domain in ("", "ai.onnx")]
    if own:
        raise ArtifactError(f"'{path}' says anew what ONNX's own operator '{own[0].name}' does: export it with the operators as they are")
    del model.functions[:]  # a node that calls one is refused by its name
    del model.training_info[:]
    total = len(content)
    for tensor in _tensors(model.graph):
        total += _fetch(tensor, path, LARGEST_FILE - total)
        _check_tensor(tensor, path)
    try:
        onnx.checker.check_model(model)
    except MemoryError:
        raise
    except Exception as error:  # its errors have no class of their own in common
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ArtifactError(f"'{path}' is not valid ONNX ({said}): export it again") from None
    return model


def array(tensor: TensorProto, path: Path) -> Array:
    """The values of a tensor that `read` has passed."""
    from onnx import numpy_helper

    try:
        values = np.asarray(numpy_helper.to_array(tensor))
        if values.dtype.kind == "f" and np.isnan(values).any():
            values = np.where(np.isnan(values), np.nan, values).astype(values.dtype)  # signalling ones would make NumPy warn of every sum
        return values
    except Exception as error:  # as above
        said = " ".join(str(error).split())[:200]
        raise ArtifactError(f"'{path}': tensor '{tensor.name}' cannot be read ({said}): export the file again") from None


def attributes(node: NodeProto, path: Path) -> dict[str, Any]:
    """A node's attributes by name: numbers, lists, text, arrays."""
    from onnx import TensorProto, helper

    found: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            raise ArtifactError(
                f"'{path}': node '{node.name}' takes '{attribute.name}' from a function, and lies in none: export the file again"
            )
        try:
            value = helper.get_attribute_value(attribute)
        except ValueError:
            raise ArtifactError(
                f"'{path}': '{attribute.name}' of node '{node.name}' is of an unknown kind: export the file again"
            ) from None
        value = value.decode(errors="replace") if isinstance(value, bytes) else value
        found[attribute.name] = array(value, path) if isinstance(value, TensorProto) else value
    return found


def initializers(graph: GraphProto, path: Path) -> Mapping[str, Array]:
    """The graph's constants by name."""
    return {tensor.name: array(tensor, path) for tensor in graph.initializer}


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph, and those inside its nodes (protocol buffers nest no deeper than 100)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") or attribute.graphs else ():
                yield from _graphs(inner)


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every array the file holds."""
    for inner in _graphs(graph):
        yield from inner.initializer
        for sparse in inner.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for node in inner.node:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors) if attribute.HasField("t") or attribute.tensors else ()


def _fetch(tensor: TensorProto, path: Path, room: int) -> int:
    """Bring the bytes of a tensor that lies in FILE.onnx.data into the tensor itself, and say how many they are, at most `room`; ArtifactError for any other place."""
    from onnx import TensorProto

    if tensor.data_location != TensorProto.EXTERNAL and not tensor.external_data:
        return 0
    where, own = f"'{path}': tensor '{tensor.name}'", path.with_name(f"{path.name}.data")
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if entries.get("location") != own.name:
        raise ArtifactError(
            f"{where} lies in another file, and beside '{path.name}' only '{own.name}' is read: export it in one file (torch.onnx.export(..., external_data=False))"
        )
    try:
        offset = int(entries.get("offset", "0"))
        with os.fdopen(os.open(own, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
            there = os.fstat(stream.fileno()).st_size
            length = int(entries.get("length", there - offset))  # ONNX leaves it out where the rest of the file is meant
            if not (0 <= offset <= there and 0 <= length <= there - offset):
                raise ArtifactError(
                    f"{where} should lie at byte {offset:,} of '{own}', {length:,} bytes long, which has {there:,}: export it again"
                )
            if length > room:
                raise ArtifactError(f"'{path}' and its weights have more than 2 GiB: import a smaller network")
            stream.seek(offset)
            tensor.raw_data = stream.read(length)
    except ValueError:
        raise ArtifactError(f"{where} does not say where it lies in '{own}': export it again") from None
    except OSError as error:
        raise ArtifactError(f"{where} lies in '{own}', which cannot be read ({error.strerror}): put it beside '{path.name}'") from None
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]
    return length


def _check_tensor(tensor: TensorProto, path: Path) -> None:
    """Its shape and its bytes agree, before anything is made of them."""
    from onnx import TensorProto, helper

    where = f"'{path}': tensor '{tensor.name}'"
    if any(size < 0 for size in tensor.dims):
        raise ArtifactError(f"{where} has the shape {list(tensor.dims)}: export the file again")
    if tensor.data_type == TensorProto.STRING or not tensor.HasField("raw_data"):
        return _check_listed(tensor, where)
    try:
        item = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    except (KeyError, TypeError, ValueError):
        raise ArtifactError(f"{where} is of an unknown type: export the file again") from None
    if tensor.data_type in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.INT32):
        wanted = prod(tensor.dims) * item
        if wanted != len(tensor.raw_data):
            raise ArtifactError(
                f"{where} of shape {list(tensor.dims)} needs {wanted:,} bytes and has {len(tensor.raw_data):,}: export the file again"
            )
    elif prod(tensor.dims) > 16 * max(1, len(tensor.raw_data)):
        raise ArtifactError(f"{where} of shape {list(tensor.dims)} has only {len(tensor.raw_data):,} bytes: export the file again")
    return None


def _check_listed(tensor: TensorProto, where: str) -> None:
    """Values that are written one by one: as many as the shape says (complex ones are two)."""
    given = max(
        len(values)
        for values in (tensor.float_data, tensor.double_data, tensor.int32_data, tensor.int64_data, tensor.uint64_data, tensor.string_data)
    )
    if prod(tensor.dims) > 16 * max(1, given) or (given == 0 and prod(tensor.dims)):
        raise ArtifactError(f"{where} of shape {list(tensor.dims)} has {given:,} values: export the file again")
