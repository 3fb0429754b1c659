"""Targets: networks in the formats of other libraries, as `toolchain import` reads them: NIR (HDF5) and ONNX (protocol buffers)."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, BinaryIO
from unittest.mock import patch

import numpy as np

import toolchain
from fuzz import mutate
from fuzz.target import MIB, Mutator, Prepared, Target
from toolchain import apart
from toolchain.ir import Array


def _tree(group: Any) -> Any:
    """An HDF5 tree as JSON has it: groups as dictionaries, numbers and texts with their types."""
    found: dict[str, Any] = {}
    for name, entry in group.items():
        if hasattr(entry, "items"):
            found[name] = _tree(entry)
            continue
        value = entry[()]
        if isinstance(value, bytes):
            found[name] = value.decode()
        elif entry.dtype.kind == "O":
            found[name] = {"texts": np.vectorize(bytes.decode)(value).tolist()}
        else:
            found[name] = {"type": np.asarray(value).dtype.str, "shape": list(np.shape(value)), "values": np.ravel(value).tolist()}
    return found


def _fill(h5py: Any, group: Any, tree: Any) -> None:
    for name, value in tree.items():
        if isinstance(value, dict) and "values" in value:
            values = np.array(value["values"], np.dtype(value["type"]))
            shape = tuple(value["shape"])
            settings = {"chunks": True, "compression": "gzip"} if values.size < np.prod(shape, dtype=float) < 2**40 else {}
            made = group.create_dataset(name, shape, values.dtype, **settings)  # those that are missing are fill values
            if not settings:
                made[...] = values.reshape(shape)
        elif isinstance(value, dict) and "texts" in value:
            group.create_dataset(name, data=np.array(value["texts"], object), dtype=h5py.string_dtype())
        elif isinstance(value, dict) and "link" in value:
            group[name] = group.file[value["link"]] if random_of(name).random() < 0.5 else h5py.SoftLink(value["link"])
        elif isinstance(value, dict):
            _fill(h5py, group.create_group(name), value)
        else:
            group[name] = value


def random_of(name: str) -> Random:
    return Random(name)


def _encoded(tree: Any) -> bytes | None:
    """The HDF5 file of a tree; None where h5py makes none of it."""
    import h5py

    stream = io.BytesIO()
    try:
        with warnings.catch_warnings(), h5py.File(stream, "w") as file:
            warnings.simplefilter("ignore")
            _fill(h5py, file, tree)
    except (TypeError, ValueError, KeyError, OSError, RuntimeError, OverflowError, AttributeError, MemoryError, RecursionError, IndexError):
        return None
    return stream.getvalue()


def _files(folder: Path) -> list[bytes]:
    """Small NIR files: one of another library, one with a loop, and two of ours, an artefact and a run."""
    import nir
    import torch
    from torch import nn

    from toolchain.layers import FeedbackSNN, Neuron

    draw = np.random.default_rng(0)

    def neurons(count: int) -> dict[str, Array]:
        one = np.ones(count, np.float32)
        return {"r": one, "v_threshold": one, "v_reset": 0 * one}

    def weights(*shape: int) -> Array:
        return draw.normal(size=shape).astype(np.float32)

    row = {
        "input": nir.Input(np.array([3])),
        "first": nir.Affine(weights(2, 3), weights(2)),
        "lif": nir.LIF(tau=np.full(2, 2e-4), v_leak=np.zeros(2), **{**neurons(2), "r": np.full(2, 2.0)}),
        "back": nir.Linear(weights(2, 2)),
        "late": nir.Delay(np.full(2, 1e-4)),
        "last": nir.Linear(weights(2, 2)),
        "output": nir.Output(np.array([2])),
    }
    image = {
        "input": nir.Input(np.array([1, 6, 6])),
        "conv": nir.Conv2d((6, 6), weights(2, 1, 3, 3), 1, 1, 1, 1, weights(2)),
        "if": nir.IF(**{name: value.reshape(2, 1, 1) * np.ones((2, 6, 6), np.float32) for name, value in neurons(2).items()}),
        "pool": nir.AvgPool2d(np.array([2, 2]), np.array([2, 2]), np.array([0, 0])),
        "flat": nir.Flatten({"input": np.array([2, 3, 3])}, 0, -1),
        "last": nir.Affine(weights(2, 18), weights(2)),
        "output": nir.Output(np.array([2])),
    }
    loop = [("input", "first"), ("first", "lif"), ("lif", "back"), ("back", "late"), ("late", "lif"), ("lif", "last"), ("last", "output")]
    chain = list(image)
    found = []
    for nodes, edges in ((row, loop), (image, list(pairwise(chain)))):
        stream = io.BytesIO()
        nir.write(stream, nir.NIRGraph(nodes, edges), compression=None)
        found.append(stream.getvalue())
    torch.manual_seed(0)
    network = FeedbackSNN(
        name="small", input_shape=(4,), input=nn.Linear(4, 3), hidden=[], feedback=[(0, 0, nn.Linear(3, 3))], readout=nn.Linear(3, 2),
        neuron=Neuron(threshold=1.0, u_rest=0.0, leak=0.5), time_steps=3, feedback_steps=2,
    )  # fmt: skip
    toolchain.export(network, format="nir", output=folder / "own.nir")
    found.append((folder / "own.nir").read_bytes())
    return found


def _here(work: Callable[[BinaryIO], None], receive: Callable[[BinaryIO], Any], *, seconds: int, memory: int) -> Any:
    """`apart.run` without its child: the process that reads inputs is bounded itself, and a fork for each would take most of the time."""
    stream = io.BytesIO()
    work(stream)
    stream.seek(0)
    return receive(stream)


def _reader(file: Path, *, here: bool = False) -> Callable[[bytes], None]:
    def read(content: bytes) -> None:
        file.write_bytes(content)
        with patch.object(apart, "run", _here) if here else nullcontext():
            toolchain.import_(file).to_json()

    return read


def nir_bytes(folder: Path) -> Prepared:
    """A NIR file whose bytes change: what HDF5 itself makes of it."""
    return Prepared(_files(folder), _reader(folder / "a.nir"))


def nir_values(folder: Path) -> Prepared:
    """A NIR file whose names, types, shapes, numbers and texts change. The input is its tree as JSON."""
    import h5py

    read, seeds = _reader(folder / "a.nir", here=True), []
    for content in _files(folder):
        with h5py.File(io.BytesIO(content)) as file:
            seeds.append(json.dumps(_tree(file)).encode())

    def read_tree(text: bytes) -> None:
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError):
            return
        content = _encoded(tree) if isinstance(tree, dict) else None
        if content is not None:
            read(content)

    def fields(text: bytes, random: Random) -> bytes:
        """Another shape, type or number of one field, or another type of node."""
        try:
            tree = json.loads(text)
            nodes = tree["node"]["nodes"]
            node = nodes[random.choice(sorted(nodes))]
            name = random.choice(sorted(node))
            field = node[name]
            kind = random.randrange(5)
            if isinstance(field, str) or kind == 0:
                node["type"] = random.choice(
                    (
                        "IF",
                        "LIF",
                        "CubaLIF",
                        "I",
                        "LI",
                        "Affine",
                        "Linear",
                        "Scale",
                        "Flatten",
                        "Delay",
                        "Threshold",
                        "Conv2d",
                        "Conv1d",
                        "SumPool2d",
                        "Input",
                        "Output",
                        "NIRGraph",
                    )
                )
            elif kind == 1:
                field["type"] = random.choice(("<f4", "<f8", "<f2", "<i8", "|u1", "|b1", "|S5", "<c8", ">f4", "<M8[s]"))
            elif kind == 2:
                field["shape"] = random.choice(
                    ([], [0], [1], [2**20], [2**31, 2**31], [1, *field["shape"]], field["shape"][::-1], [*field["shape"], 0])
                )
            elif kind == 3 and field["values"]:
                field["values"][random.randrange(len(field["values"]))] = random.choice(mutate.NUMBERS[10:])
            else:
                tree["node"]["nodes"][random.choice(sorted(nodes))] = {"link": f"/node/nodes/{random.choice(sorted(nodes))}"}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return text
        return json.dumps(tree).encode()

    def edges(text: bytes, random: Random) -> bytes:
        """An edge more or less, also of a node to itself."""
        try:
            tree = json.loads(text)
            names, found = sorted(tree["node"]["nodes"]), tree["node"]["edges"]["texts"]
            ends = [random.choice(names), random.choice(names)]
            kind = random.randrange(3)
            if kind == 0:
                found.append(ends)
            elif kind == 1:
                found.append([ends[0], ends[0]])
            else:
                del found[random.randrange(len(found))]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return text
        return json.dumps(tree).encode()

    return Prepared(seeds, read_tree, (mutate.json_text, fields, fields, edges))


# ---- ONNX


def _models() -> list[bytes]:
    """Small ReLU networks: images with a skip, rows, and shapes computed by the file."""
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)

    def weights(*shape: int) -> Array:
        return (draw.normal(size=shape) / 2).astype(np.float32)

    def model(shape: tuple[int, ...], nodes: list[Any], values: dict[str, Array]) -> bytes:
        graph = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])], [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()],
        )  # fmt: skip
        return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())

    def node(kind: str, inputs: str, output: str, **settings: Any) -> Any:
        return helper.make_node(kind, inputs.split(), [output], name=f"{kind}-{output}", **settings)

    images = [
        node("Conv", "x c cb", "a", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("BatchNormalization", "a s s s v", "b"),
        node("Relu", "b", "r"),
        node("Conv", "r c2", "d", kernel_shape=[1, 1]),
        node("Add", "d r", "e"),
        node("Relu", "e", "f"),
        node("AveragePool", "f", "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Flatten", "p", "q"),
        node("Gemm", "q w wb", "y", transB=1),
    ]
    rows = [
        node("Shape", "x", "n"),
        node("Gather", "n zero", "count"),
        node("Unsqueeze", "count axes", "first"),
        node("Concat", "first minus", "wanted", axis=0),
        node("Reshape", "x wanted", "a"),
        node("MatMul", "a m", "b"),
        node("Clip", "b lo hi", "c"),
        node("Mul", "c two", "d"),
        node("MatMul", "d m2", "e"),
        node("Softmax", "e", "y", axis=1),
    ]
    whole: dict[str, Any] = {
        "zero": np.int64(0),
        "axes": np.array([0]),
        "minus": np.array([-1]),
        "lo": np.float32(0),
        "hi": np.float32(6),
        "two": np.float32(2),
    }
    return [
        model((1, 4, 4), images, {"c": weights(2, 1, 3, 3), "cb": weights(2), "s": weights(2), "v": np.ones(2, np.float32), "c2": weights(2, 2, 1, 1), "w": weights(3, 8), "wb": weights(3)}),
        model((1, 2, 2), rows, {**whole, "m": weights(4, 3), "m2": weights(3, 3)}),
    ]  # fmt: skip


def _messages(message: Any) -> list[Any]:
    """A message of protocol buffers and all those within."""
    found = [message]
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in value if hasattr(value, "append") or hasattr(value, "add") else (value,):
                found += _messages(inner)
    return found


def _spoiled(message: Any, random: Random) -> None:
    """Another value of one field of a message."""
    field = random.choice(
        message.DESCRIPTOR.fields if random.random() < 0.3 else [f for f, _ in message.ListFields()] or message.DESCRIPTOR.fields
    )
    value = getattr(message, field.name)
    many = hasattr(value, "extend")
    kind = random.random()
    if kind < 0.15:
        message.ClearField(field.name)
    elif field.type == field.TYPE_MESSAGE:
        if many and len(value):
            at = random.randrange(len(value))
            if kind < 0.6:
                value.add().CopyFrom(value[at])
            else:
                del value[at]
        elif not many:
            value.SetInParent()
    elif field.type in (field.TYPE_STRING, field.TYPE_BYTES):
        word = random.choice((*mutate.WORDS, "x", "y", "a", "Relu", "Loop", "net.onnx.data", "/etc/passwd"))
        data = word.encode("utf-8", "replace")
        found: Any = (
            data.decode()
            if field.type == field.TYPE_STRING
            else random.choice((data, value[:-1] if value and not many else b"", random.randbytes(8)))
        )
        if many:
            value[random.randrange(len(value)) :] = [found] if len(value) else []
        else:
            setattr(message, field.name, found)
    else:
        numbers = (*mutate.NUMBERS, *range(20))
        found = random.choice(numbers)
        if many and len(value) and kind < 0.6:
            value[random.randrange(len(value))] = found
        elif many:
            value.append(found)
        else:
            setattr(message, field.name, found)


def _message_of(content: bytes, random: Random) -> bytes:
    """An ONNX file with one field of one of its messages changed."""
    from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]
    from onnx import ModelProto

    try:
        model = ModelProto.FromString(content)
        _spoiled(random.choice(_messages(model)), random)
        return bytes(model.SerializeToString())
    except (DecodeError, EncodeError, ValueError, TypeError, IndexError, OverflowError, RecursionError):
        return content


def onnx_files(folder: Path) -> Prepared:
    """An ONNX file, made a spiking network. Of the other files here it may read one only."""
    file = folder / "net.onnx"
    (folder / "net.onnx.data").write_bytes(bytes(64))
    spoil: Mutator = _message_of
    return Prepared(_models(), _reader(file, here=True), (spoil,) * 4)


TARGETS = (
    Target("nir-bytes", nir_bytes, share=1, seconds=60, memory=512 * MIB),
    Target("nir-values", nir_values, share=2, seconds=60, memory=512 * MIB),
    Target("onnx", onnx_files, share=3, seconds=60, memory=512 * MIB),
)
