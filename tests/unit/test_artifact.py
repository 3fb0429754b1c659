"""The artefact: the same bytes twice, everything back as it was, and every damaged file named."""

from __future__ import annotations

import json
import struct

import msgspec
import numpy as np
import pytest

from toolchain import artifact
from toolchain.artifact import Artifact, Golden
from toolchain.errors import ArtifactError
from toolchain.passes import Retime


@pytest.fixture
def made(random_graph):
    graph = Retime()(random_graph(4, couples=3, leak=True))
    return Artifact(
        graph,
        random_graph(4, integer=False),
        "lava-sim",
        "fold -> retime",
        "0.1.0",
        Golden(1, 0, ("forward",)),
        {"inputs": np.ones((1, 7))},
    )


def test_it_comes_back_as_it_was(made, tmp_path):
    path = tmp_path / "net.fsnn"
    artifact.write(made, path)
    back = artifact.read(path)
    for graph, found in ((made.graph, back.graph), (made.float_graph, back.float_graph)):
        assert (graph.populations, graph.phases, graph.units, graph.provenance) == (
            found.populations,
            found.phases,
            found.units,
            found.provenance,
        )
        for name, tensor in graph.tensors.items():
            assert found.tensors[name].dtype == tensor.dtype
            np.testing.assert_array_equal(found.tensors[name], tensor)
    assert back.golden == made.golden
    artifact.write(back, tmp_path / "again.fsnn")
    assert (tmp_path / "again.fsnn").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.fsnn", "net.fsnn"]


def header_edit(data: bytes, edit) -> bytes:
    """The file with its 'fsnn' entry changed by `edit`."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    inner = json.loads(header["__metadata__"]["fsnn"])
    edit(inner)
    header["__metadata__"]["fsnn"] = json.dumps(inner)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


DAMAGE = {
    "truncated": (lambda d: d[: len(d) // 2], "no readable artefact, perhaps cut short"),
    "empty": (lambda d: b"", "no readable artefact, perhaps cut short"),
    "text": (lambda d: b"hello there, this is no artefact", "no readable artefact"),
    "one bit": (lambda d: d[:-1] + bytes([d[-1] ^ 1]), "was changed after it was compiled"),
    "version": (lambda d: header_edit(d, lambda h: h.update(version=99)), "has artefact format 99, this toolchain reads 2"),
    "unknown field": (lambda d: header_edit(d, lambda h: h.update(extra=1)), "unknown field `extra`"),
    "changed threshold": (
        lambda d: header_edit(d, lambda h: h["graph"]["phases"][0]["dynamics"]["couple0"].update(threshold=7)),
        "was changed after it was compiled",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_sentence(made, tmp_path, case):
    damage, message = DAMAGE[case]
    path = tmp_path / "net.fsnn"
    artifact.write(made, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtifactError, match=message) as caught:
        artifact.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_that_contradict_the_graph(made, tmp_path):
    extra = msgspec.structs.replace(made.graph, tensors={**made.graph.tensors, "stray": np.ones(3)})
    artifact.write(msgspec.structs.replace(made, graph=extra), tmp_path / "net.fsnn")
    with pytest.raises(ArtifactError, match="has tensor 'graph/stray', which its graph does not read"):
        artifact.read(tmp_path / "net.fsnn")


def test_other_files(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a": np.ones(3)}, tmp_path / "weights.fsnn")
    with pytest.raises(ArtifactError, match="a safetensors file but no artefact"):
        artifact.read(tmp_path / "weights.fsnn")
    with pytest.raises(ArtifactError, match="there is no file"):
        artifact.read(tmp_path / "missing.fsnn")


def test_an_unwritable_place_is_one_sentence(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        artifact.write(made, tmp_path / "file" / "net.fsnn")
