"""Hostile checkpoints, and files of a run folder: what `inspect`, `train` and `train --resume` read."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from of_artefacts import RUN_ME, Made, safetensors

SHAPES = {"input.weight": (3, 64), "input.bias": (3,), "feedback.0.weight": (3, 3), "readout.weight": (10, 3), "readout.bias": (10,)}
"""The weights of the small network that the files speak of."""

KINDS = {"<f4": "F32", "<f8": "F64", "|u1": "U8", "<i4": "I32"}
RANDOM = np.frombuffer(struct.pack("<QiiQ", 0, 1, 1, 0) + bytes(5032), np.uint8)
"""A random state of torch's on a CPU: a seed, how far its 624 numbers are used, and the numbers."""

LINE = ("loss", "accuracy", "held_out_accuracy", "forward_rate", "feedback_rate", "clipped", "silent", "scale_factor", "lr", "seconds")
"""The numbers of an epoch's line of metrics.jsonl, beside its epoch."""


def network(**changes: Any) -> dict[str, Any]:
    """64 inputs, 3 couples that feed themselves, 10 classes."""
    own: dict[str, Any] = {
        "name": "small",
        "input_shape": [1, 8, 8],
        "input": {"type": "linear", "inputs": 64, "outputs": 3},
        "readout": {"type": "linear", "inputs": 3, "outputs": 10},
        "feedback": [{"source": 0, "target": 0, "connection": {"type": "linear", "inputs": 3, "outputs": 3, "bias": False}}],
        "time_steps": 4,
        "feedback_steps": 4,
    }
    return {**own, **changes}


def config(of: Mapping[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    """What a checkpoint says that it was trained with."""
    return {
        "network": of or network(),
        "train": {"dataset": "digits", "epochs": 2, "held_out": 200, **train},
        "model": "",
        "method": "spide",
    }


def about(**changes: Any) -> str:
    return json.dumps(
        {"format": 1, "config": config(), "epoch": 1, "held_out_accuracy": 0.5, "progress": {"scale_factor": 100.0}, **changes}
    )


def weights(**changes: Any) -> dict[str, Any]:
    """Small weights by name; a change to None leaves one out."""
    draw = np.random.default_rng(0)
    found: dict[str, Any] = {name: draw.normal(size=shape).astype("<f4") / 8 for name, shape in SHAPES.items()}
    return {
        name: values for name, values in {**found, **{k.replace("__", "."): v for k, v in changes.items()}}.items() if values is not None
    }


def checkpoint(tensors: Mapping[str, Any], said: str | None) -> bytes:
    """A checkpoint of these tensors that says `said` of itself."""
    header: dict[str, Any] = {} if said is None else {"__metadata__": {"toolchain": said}}
    data = b""
    for name, values in tensors.items():
        raw = np.ascontiguousarray(values).tobytes()
        header[name] = {"dtype": KINDS[values.dtype.str], "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return safetensors(header, data)


def last(**changes: Any) -> dict[str, Any]:
    """What --resume reads: weights, and the random state."""
    own = {f"model.{name}": values for name, values in weights().items()} | {"random": RANDOM}
    return {name: values for name, values in {**own, **changes}.items() if values is not None}


def zipped() -> bytes:
    """A checkpoint as torch.save writes it: a zip file with a pickle in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (("archive/data.pkl", RUN_ME), ("archive/version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
    return stream.getvalue()


def objects() -> bytes:
    """An .npz of one array of objects, which NumPy keeps as a pickle."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + RUN_ME
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("input.weight.npy", (1980, 1, 1, 0, 0, 0)), array)
    return stream.getvalue()


def files() -> Made:
    """Every file of a run."""
    yield from _checkpoints()
    yield from _lasts()
    yield from _lessons()
    yield from _configs()
    line = json.dumps(dict.fromkeys(LINE, 0.5) | {"epoch": 1})
    yield "metrics-no-json.jsonl", "a line that is Python", b"__import__('os').system('touch canary')\n"
    yield "metrics-short.jsonl", "no line for the epoch that was done", b""
    yield "metrics-deep.jsonl", "1,500 lists within lists", b"[" * 1_500 + b"]" * 1_500
    yield "metrics-text.jsonl", "a loss that is text", line.replace('"loss": 0.5', '"loss": "0.5"').encode()
    yield "metrics-other-epoch.jsonl", "the line of another epoch", line.replace('"epoch": 1', '"epoch": 7').encode()
    yield "metrics-binary.jsonl", "bytes that are no text", bytes(range(256))


def _checkpoints() -> Made:
    yield "pickle.safetensors", "a pickle that runs a command, renamed", RUN_ME
    yield "torch-zip.safetensors", "a checkpoint of torch.save, renamed", zipped()
    yield "torch-zip.pt", "a checkpoint of torch.save", zipped()
    yield "objects.npz", "an .npz of Python objects", objects()
    yield "empty.safetensors", "no byte at all", b""
    yield "says-nothing.safetensors", "weights of something else", checkpoint(weights(), None)
    yield "says-python.safetensors", "a description that is Python", checkpoint(weights(), "__import__('os').system('touch canary')")
    yield "says-deep.safetensors", "a description of 1,500 lists within lists", checkpoint({}, "[" * 1_500 + "]" * 1_500)
    yield "says-a-list.safetensors", "a description that is a list", checkpoint({}, "[1]")
    yield "format-future.safetensors", "the format of a later version", checkpoint(weights(), about(format=2))
    yield "unknown-field.safetensors", "a field that this version does not know", checkpoint(weights(), about(run="touch canary"))
    yield (
        "unknown-connection.safetensors",
        "a kind of connection that nobody has",
        checkpoint(weights(), about(config=config(network(input={"type": "os.system"})))),
    )
    yield "weights-nan.safetensors", "a weight that is NaN", checkpoint(weights(input__bias=np.full(3, np.nan, "<f4")), about())
    yield "weights-infinite.safetensors", "a weight that is infinite", checkpoint(weights(input__bias=np.full(3, np.inf, "<f4")), about())
    yield "weights-missing.safetensors", "no weights of the readout", checkpoint(weights(readout__weight=None), about())
    yield (
        "weights-more.safetensors",
        "a tensor named like a place outside",
        checkpoint(weights(**{"../../etc/canary": np.zeros(1, "<f4")}), about()),
    )
    yield (
        "weights-other-shape.safetensors",
        "weights of another shape",
        checkpoint(weights(input__weight=np.zeros((3, 65), "<f4")), about()),
    )
    yield (
        "layer-of-10-to-12.safetensors",
        "a layer of 10^12 neurons",
        checkpoint(weights(), about(config=config(network(input={"type": "linear", "inputs": 64, "outputs": 10**12})))),
    )
    yield "steps-0.safetensors", "T = 0", checkpoint(weights(), about(config=config(network(time_steps=0))))
    yield "steps-10-to-12.safetensors", "T = 10^12", checkpoint(weights(), about(config=config(network(time_steps=10**12))))
    yield "steps-beyond-64-bits.safetensors", "T = 10^40", checkpoint(weights(), about(config=config(network(time_steps=10**40))))
    loop = {"source": 0, "target": 9, "connection": {"type": "identity"}}
    yield (
        "loop-to-nowhere.safetensors",
        "a feedback connection to a layer that is not there",
        checkpoint(weights(), about(config=config(network(feedback=[loop])))),
    )
    yield (
        "name-escapes.safetensors",
        "a network whose name steers the terminal",
        checkpoint(weights(), about(config=config(network(name="\u001b[2Jsmall")))),
    )
    yield (
        "threshold-nan.safetensors",
        "a threshold that JSON cannot even say",
        checkpoint(weights(), about().replace('"time_steps": 4', '"neuron": {"threshold": NaN}')),
    )
    yield (
        "threshold-huge.safetensors",
        "a threshold of 10^300",
        checkpoint(weights(), about(config=config(network(neuron={"threshold": 1e300})))),
    )


def _lasts() -> Made:
    yield "last-no-random.safetensors", "no random state to go on from", checkpoint(last(random=None), about())
    yield "last-random-short.safetensors", "a random state of 3 bytes", checkpoint(last(random=np.zeros(3, np.uint8)), about())
    yield "last-random-floats.safetensors", "a random state of floats", checkpoint(last(random=np.zeros(1264, "<f4")), about())
    yield (
        "last-momentum-nan.safetensors",
        "a momentum that is NaN",
        checkpoint(last(**{"momentum.input.bias": np.full(3, np.nan, "<f4")}), about()),
    )
    yield "last-epoch-negative.safetensors", "epoch -1", checkpoint(last(), about(epoch=-1))
    yield "last-epoch-10-to-9.safetensors", "epoch 10^9 of 2", checkpoint(last(), about(epoch=10**9))
    yield "last-scale-negative.safetensors", "a scale factor below 0", checkpoint(last(), about(progress={"scale_factor": -1.0}))
    yield (
        "last-progress-text.safetensors",
        "a state of the method that is no number",
        checkpoint(last(), about(progress={"scale_factor": "touch canary"})),
    )
    yield "last-other-config.safetensors", "the state of another run", checkpoint(last(random=None), about(config=config(lr=0.7)))


def _lessons() -> Made:
    yield "lesson-pickle.safetensors", "a pickle that runs a command, where learning goes on from", RUN_ME
    yield "lesson-of-training.safetensors", "the state of another kind of run", checkpoint(last(random=None), about())
    yield "lesson-deep.safetensors", "a description of 1,500 lists within lists", safetensors({"__metadata__": {"lesson": "[" * 1_500}})
    yield "lesson-empty.safetensors", "no byte at all", b""


def _configs() -> Made:
    good = "network: " + json.dumps(network()) + "\ntrain: {dataset: digits, epochs: 1}\n"
    yield "python-object.yaml", "a tag that calls a function", b"model: !!python/object/apply:os.system ['touch canary']\n"
    yield "python-name.yaml", "a tag that imports a name", b"model: !!python/name:os.system\n"
    laughs = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
    )
    yield "billion-laughs.yaml", "ten lines that unfold into a billion words", laughs.encode()
    yield "alias-to-itself.yaml", "a list that holds itself", b"model: &a [*a]\n"
    yield "merge-key.yaml", "a merge of what is elsewhere", b"base: &b {model: digits-fc}\ntrain: {<<: *b}\n"
    yield "deep.yaml", "1,500 lists within lists", b"- " * 1_500
    yield "key-twice.yaml", "a key given twice, of which the last would win", b"model: digits-fc\nmodel: mnist-fc\n"
    yield "utf-16.yaml", "UTF-16 with its mark", good.encode("utf-16")
    yield "nul.yaml", "a NUL in a word", b"model: digits\0-fc\n"
    yield "a-list.yaml", "no mapping", b"- digits-fc\n"
    yield "empty.yaml", "no byte at all", b""
    yield "key-a-number.yaml", "a key that is no text", b"1: digits-fc\n"
    yield "unknown-setting.yaml", "a setting that nobody knows", b"model: digits-fc\ntrain: {on_start: touch canary}\n"
    yield "outside.yaml", "a network named like a place outside", b"model: ../../../../etc/passwd\n"
    yield "start-outside.yaml", "weights that come from a place outside", b"model: digits-fc\nstart: /etc/passwd\n"
    yield "infinite.yaml", "a learning rate that is infinite", b"model: digits-fc\ntrain: {lr: .inf}\n"
    yield "beyond-floats.yaml", "a learning rate beyond all floats", b"model: digits-fc\ntrain: {lr: 1e999}\n"
    yield "steps-0.yaml", "T = 0", b"model: digits-fc\nnetwork: {time_steps: 0}\n"
    yield "steps-10-to-12.yaml", "T = 10^12", b"model: digits-fc\nnetwork: {time_steps: 1000000000000}\n"
    yield "layer-of-10-to-12.yaml", "a layer of 10^12 neurons", good.replace('"outputs": 3}', '"outputs": 1000000000000}', 1).encode()
    yield "seed-beyond-64-bits.yaml", "a seed beyond 64 bits", b"model: digits-fc\nseed: 99999999999999999999999999\n"
    yield "a-date.yaml", "a date where a number belongs", b"model: digits-fc\nseed: 2026-11-23\n"
    yield "binary.yaml", "bytes where a name belongs", b"model: !!binary dG91Y2ggY2FuYXJ5\n"
