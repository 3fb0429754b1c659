"""Hostile artefacts: safetensors that lie about themselves, and signed graphs that contradict themselves.

`signed` files carry the right digest, so that what is behind the digest is reached: whoever can write a file can sign it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np

from toolchain import artifact
from toolchain.artifact import Artifact, Golden
from toolchain.ir import Dense, Drive, Dynamics, Graph, Phase, Population, Provenance, Synapse, Units, frozen
from toolchain.passes import Retime
from toolchain.target import get

Made = Iterator[tuple[str, str, bytes]]
"""(name, what is hostile about it, bytes) of each file."""

RUN_ME = b"cposix\nsystem\n(S'touch canary'\ntR."
"""A pickle that runs a command when it is loaded."""


def safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header, given as text or as what JSON makes of it; `length` lies about the header's."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(first: int, last: int, kind: str = "I8", shape: tuple[int, ...] | None = None) -> dict[str, object]:
    """A header's entry for bytes `first` to `last`."""
    return {"dtype": kind, "shape": list(shape or (last - first,)), "data_offsets": [first, last]}


def graph(inputs: tuple[int, ...] = (4,), *, events: bool = False) -> Graph:
    """A small valid integer graph: three couples that feed themselves a step later, and two classes."""
    size = int(np.prod(inputs))
    draw = np.random.default_rng(0)
    tensors = {
        "input.weight": frozen(draw.integers(-30, 30, (3, size)), np.int64),
        "loop.weight": frozen(draw.integers(-30, 30, (3, 3)), np.int8),
        "readout.weight": frozen(draw.integers(-30, 30, (2, 3)), np.int8),
    }
    order = ("hidden", "readout")
    forward = Phase(
        "forward",
        4,
        order,
        {"hidden": Dynamics(1.0, 200, 200, "plus"), "readout": Dynamics(1.0)},
        (Synapse("hidden", "hidden", (Dense("loop.weight"),), 1), Synapse("hidden", "readout", (Dense("readout.weight"),))),
        drive=(Drive("hidden", "input", (Dense("input.weight"),)),),
    )
    populations = (
        Population("input", inputs, "input", events),
        Population("hidden", (3,), "couple"),
        Population("readout", (2,), "readout"),
    )
    units = Units("integer", {"forward": {"input": 255.0, "hidden": 256.0, "readout": 256.0}})
    return Graph(populations, (forward,), tensors, units, Provenance("small"))


def whole(of: Graph) -> Artifact:
    """An artefact of a graph, valid or not; its golden vectors are those of silence."""
    golden = {
        "inputs": np.zeros((1, *of.populations[0].shape)),
        "forward.counts.hidden": np.zeros((1, 3), np.int64),
        "forward.counts.readout": np.zeros((1, 2), np.int64),
        "forward.potentials.hidden": np.zeros((1, 3), np.int64),
        "forward.potentials.readout": np.zeros((1, 2), np.int64),
        "forward.saturations.hidden": np.zeros((1, 3), np.int64),
        "forward.saturations.readout": np.zeros((1, 2), np.int64),
    }
    return Artifact(of, None, "lava-sim", "none", "0.1.0", Golden(1, 0, ("forward",)), {k: frozen(v) for k, v in golden.items()})


def runnable(of: Graph) -> Graph:
    """The graph as simulators run it: in exact timing, with nothing left for a pass to do."""
    provenance = msgspec.structs.replace(of.provenance, passes=tuple(step.name for step in get("reference").pipeline.passes))
    return msgspec.structs.replace(Retime()(of), provenance=provenance)


def signed(made: Artifact) -> bytes:
    """The file, with the digest of its content."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "made.fsnn"
        artifact.write(made, path)
        return path.read_bytes()


def edited(content: bytes, edit: Any) -> bytes:
    """The file with its 'fsnn' entry changed by `edit`; the digest stays what it was."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    inner = json.loads(header["__metadata__"]["fsnn"])
    header["__metadata__"]["fsnn"] = json.dumps(edit(inner) or inner)
    return safetensors(header, content[8 + size :])


def files() -> Made:
    """Every artefact."""
    good = signed(whole(graph()))
    yield "empty.fsnn", "no byte at all", b""
    yield "cut-in-header.fsnn", "the first 40 bytes of a good file", good[:40]
    yield "cut-in-tensors.fsnn", "a good file without its last byte", good[:-1]
    yield "longer.fsnn", "a good file and 64 bytes more, a place to hide something", good + bytes(64)
    yield "header-of-2-to-63.fsnn", "a header that claims 2^63 bytes", safetensors({}, length=2**63)
    yield "header-past-the-end.fsnn", "a header that claims more bytes than there are", safetensors({}, length=4096)
    yield "header-no-json.fsnn", "a header that is no JSON", safetensors("{'a': os.system('touch canary')}")
    yield "header-deep.fsnn", "a header of 1,500 lists within lists", safetensors("[" * 1_500 + "]" * 1_500)
    yield "offsets-out-of-range.fsnn", "a tensor whose bytes lie past the end", safetensors({"graph/a": tensor(0, 1 << 40)}, bytes(8))
    yield (
        "offsets-overlap.fsnn",
        "two tensors in the same bytes",
        safetensors({"graph/a": tensor(0, 8), "graph/b": tensor(4, 12)}, bytes(12)),
    )
    twice = '{"graph/a":' + json.dumps(tensor(0, 4)) + ',"graph/a":' + json.dumps(tensor(4, 8)) + "}"
    yield "tensor-twice.fsnn", "one name for two tensors", safetensors(twice, bytes(8))
    yield "dtype-lies.fsnn", "a type that needs more bytes than are claimed", safetensors({"graph/a": tensor(0, 8, "F64", (8,))}, bytes(8))
    yield "dtype-unknown.fsnn", "a type of number that nobody has", safetensors({"graph/a": tensor(0, 8, "PY")}, bytes(8))
    yield (
        "shape-overflows.fsnn",
        "a shape whose product passes 64 bits",
        safetensors({"graph/a": tensor(0, 8, "I8", (1 << 40, 1 << 40))}, bytes(8)),
    )
    yield "foreign.fsnn", "weights of something else", safetensors({"weight": tensor(0, 8)}, bytes(8))
    yield "pickle.fsnn", "a pickle that runs a command", RUN_ME
    yield (
        "entry-no-json.fsnn",
        "an entry that is Python, not JSON",
        safetensors({"__metadata__": {"fsnn": "__import__('os').system('touch canary')"}}),
    )
    yield "entry-a-list.fsnn", "an entry that is a list", safetensors({"__metadata__": {"fsnn": "[]"}})
    yield "entry-deep.fsnn", "an entry of 1,500 lists within lists", safetensors({"__metadata__": {"fsnn": "[" * 1_500 + "]" * 1_500}})
    yield "version-old.fsnn", "the format of an earlier version", edited(good, lambda found: found.update(version=1))
    yield "version-future.fsnn", "the format of a later version", edited(good, lambda found: found.update(version=99))
    yield "version-a-text.fsnn", "a version that is no number", edited(good, lambda found: found.update(version="\u001b[2J2"))
    yield "unknown-field.fsnn", "a field that this version does not know", edited(good, lambda found: found.update(run="touch canary"))
    yield "weight-changed.fsnn", "a weight that was changed after the file was signed", good[:-1] + bytes([good[-1] ^ 1])
    yield "digest-changed.fsnn", "a digest that is not the file's", edited(good, lambda found: found.update(digest="0" * 64))
    yield (
        "number-beyond-64-bits.fsnn",
        "10^40 time steps",
        edited(good, lambda found: found["graph"]["phases"][0].update(time_steps=10**40)),
    )
    yield from _contradictions()
    yield from _names()


def _contradictions() -> Made:
    of = graph()
    forward = of.phases[0]
    hidden = forward.dynamics["hidden"]

    def phase(**changes: Any) -> bytes:
        return signed(whole(msgspec.structs.replace(of, phases=(msgspec.structs.replace(forward, **changes),))))

    def dynamics(**changes: Any) -> bytes:
        return phase(dynamics={**forward.dynamics, "hidden": msgspec.structs.replace(hidden, **changes)})

    yield "steps-0.fsnn", "T = 0", phase(time_steps=0)
    yield "steps-negative.fsnn", "T = -1", phase(time_steps=-1)
    yield "steps-10-to-12.fsnn", "T = 10^12", phase(time_steps=10**12)
    cycle = (Synapse("hidden", "hidden", (Dense("loop.weight"),), 0), forward.synapses[1])
    yield "cyclic.fsnn", "a loop without delay, which no order of updates can serve", phase(synapses=cycle)
    yield "threshold-0.fsnn", "couples that fire for ever", dynamics(threshold=0)
    yield "leak-2.fsnn", "potentials that grow by themselves", dynamics(leak=2.0)
    yield "threshold-past-24-bits.fsnn", "a threshold that the chip cannot hold", dynamics(threshold=2**40)
    wide = {**of.tensors, "loop.weight": frozen(np.ones((30, 30)), np.int8)}
    yield "weights-too-wide.fsnn", "30 x 30 weights for 3 x 3 couples", signed(whole(msgspec.structs.replace(of, tensors=wide)))
    float_weights = {**of.tensors, "loop.weight": frozen(np.full((3, 3), np.nan))}
    yield "weights-nan.fsnn", "weights that are NaN", signed(whole(msgspec.structs.replace(of, tensors=float_weights)))
    fewer = {name: tensor for name, tensor in of.tensors.items() if name != "loop.weight"}
    yield "tensor-missing.fsnn", "a graph whose weights are not there", signed(whole(msgspec.structs.replace(of, tensors=fewer)))
    outside = {**of.tensors, "../../../etc/cron.d/canary": frozen([0], np.int8)}
    yield "tensor-outside.fsnn", "a tensor named like a place outside", signed(whole(msgspec.structs.replace(of, tensors=outside)))
    huge = (of.populations[0], msgspec.structs.replace(of.populations[1], shape=(2**31, 2**31)), of.populations[2])
    yield "population-huge.fsnn", "a population of 2^62 couples", signed(whole(msgspec.structs.replace(of, populations=huge)))
    negative = (of.populations[0], msgspec.structs.replace(of.populations[1], shape=(-1, -3)), of.populations[2])
    yield "population-negative.fsnn", "a population of -1 x -3 couples", signed(whole(msgspec.structs.replace(of, populations=negative)))
    yield (
        "golden-many.fsnn",
        "10^9 golden samples in a file of one",
        signed(msgspec.structs.replace(whole(of), golden=Golden(10**9, 0, ("forward",)))),
    )
    edited_golden = whole(runnable(of))
    counts = {**edited_golden.golden_tensors, "forward.counts.hidden": frozen(np.full((1, 3), 4, np.int64))}
    yield (
        "golden-changed.fsnn",
        "golden vectors that say something else than the graph does, signed",
        signed(msgspec.structs.replace(edited_golden, golden_tensors=counts)),
    )


def _names() -> Made:
    of = runnable(graph((1, 8, 8)))
    escape = "\u001b]0;owned\u0007\u001b[31mhidden\u0000\u202e"
    page = "../../<script>alert(1)</script>"
    for name, what, called in (
        ("name-escapes.fsnn", "a population whose name steers the terminal", escape),
        ("name-script.fsnn", "a population whose name is a script for a page, in a folder above", page),
    ):
        text = msgspec.json.encode(msgspec.structs.replace(of, tensors={})).replace(b'"hidden"', json.dumps(called).encode())
        renamed = msgspec.structs.replace(msgspec.json.decode(text, type=Graph), tensors=of.tensors)
        notes = msgspec.structs.replace(of.provenance, model=called, notes=(called,))
        made = whole(msgspec.structs.replace(renamed, provenance=notes))
        golden = {key.replace("hidden", called): value for key, value in made.golden_tensors.items()}
        yield name, what, signed(msgspec.structs.replace(made, golden_tensors=golden))
