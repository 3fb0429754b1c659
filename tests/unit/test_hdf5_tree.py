"""HDF5 files of strangers: what they say comes back as it is, and whatever they do to the HDF5 library is one sentence."""

from __future__ import annotations

import os
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest

from toolchain.errors import ArtifactError
from toolchain.exchange import hdf5_tree

h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install h5py")


def written(path, fill):
    with h5py.File(path, "w") as file:
        fill(file.create_group("node"), file)
    return path


def plain(node, file):
    node["number"], node["text"], node["bytes"] = 3.5, "é", np.bytes_(b"abc")
    node["words"] = np.array([["a", "bb"], ["", "c"]], dtype=h5py.string_dtype())
    node["fixed"] = np.array([b"x", b"yz"])
    node["inner/empty"], node["inner/image"] = np.zeros((0, 3)), np.arange(6, dtype=">f4").reshape(2, 3)
    node.create_dataset("packed", data=np.ones((50, 40), bool), compression="gzip", shuffle=True, fletcher32=True)
    node.create_group("nothing")


def test_values_come_back_as_hdf5_gives_them(tmp_path):
    path = written(tmp_path / "a.h5", plain)
    found = hdf5_tree.read(path, "node", "NIR")
    with h5py.File(path, "r") as file:
        wanted = {name: entry[()] for name, entry in file["node"].items() if isinstance(entry, h5py.Dataset)}
        inner = {name: entry[()] for name, entry in file["node/inner"].items()}
    assert found["nothing"] == {}
    assert found.keys() == wanted.keys() | {"nothing", "inner"}
    for there, here in ((found, wanted), (found["inner"], inner)):
        for name, value in here.items():
            assert type(there[name]) is type(value) or isinstance(value, np.bytes_), name
            assert np.asarray(there[name]).dtype.kind == np.asarray(value).dtype.kind, name
            np.testing.assert_array_equal(there[name], value)
    found["packed"][0] = False  # as an array that h5py reads


def shared_texts(node, file):
    """Many texts that are one in the file: a megabyte of references to 100 kB, which would be 50 GB."""
    words = node.create_dataset("words", (500_000,), h5py.string_dtype(), chunks=(50_000,), compression="gzip")
    words[0] = "x" * 100_000
    _, chunk = words.id.read_direct_chunk((0,))
    length_and_place = zlib.decompress(chunk)[:16]
    for first in range(0, 500_000, 50_000):
        words.id.write_direct_chunk((first,), zlib.compress(length_and_place * 50_000))


def virtual(node, file):
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (3,))
    node.create_virtual_dataset("weight", layout)


def unknown_filter(node, file):
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk((4,))
    made.set_filter(32_015, h5py.h5z.FLAG_OPTIONAL, ())  # zstd, a plug-in
    h5py.h5d.create(node.id, b"weight", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((4,)), made)


@pytest.mark.parametrize(
    ("fill", "said"),
    [
        (shared_texts, "unpacks to more than|memory"),
        (virtual, "keeps 'node/weight' in another file"),
        (lambda node, file: node.create_dataset("weight", (8,), "u1", external=[("/etc/passwd", 0, 8)]), "in another file"),
        (unknown_filter, "packs 'node/weight' with HDF5's filter 32015"),
        (lambda node, file: node.create_dataset("r", data=node.ref, dtype=h5py.ref_dtype), "neither real numbers nor texts"),
        (lambda node, file: node.create_dataset("r", (2,), h5py.vlen_dtype("f8")), "neither real numbers nor texts"),
        (lambda node, file: node.create_dataset("r", (2,), [("a", "f8"), ("b", "i4")]), "neither real numbers nor texts"),
        (lambda node, file: node.create_dataset("r", data=h5py.Empty("f4")), "has nothing at 'node/r'"),
        (lambda node, file: node.create_dataset("r", (2**40, 2**20), "f4", chunks=(1, 1024)), "unpacks to more than"),
        (lambda node, file: node.__setitem__("t", np.dtype("f4")), "has a Datatype at 'node/t'"),
        (lambda node, file: node.__setitem__("a", h5py.SoftLink("/node/a")), "links to another place"),
        (lambda node, file: node.__setitem__("again", node), "has one entry twice|groups 16 deep"),
        (lambda node, file: node.create_group("/".join("a" * 40)), "groups 16 deep"),
    ],
)
def test_what_no_network_needs_is_refused_before_it_is_read(tmp_path, fill, said):
    with pytest.raises(ArtifactError, match=said) as raised:
        hdf5_tree.read(written(tmp_path / "a.h5", fill), "node", "NIR")
    assert "\n" not in str(raised.value)


def crash(*_):
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(*_):
    while True:
        pass


def swell(*_):
    return np.ones(2**31).size


def children():
    """This process's own, by number, ended ones that nobody asked after too; of other tests there may be some."""
    return {child for task in Path("/proc/self/task").glob("*/children") for child in task.read_text().split()}


@pytest.mark.parametrize(
    ("fault", "said"), [(crash, "makes the HDF5 library fail"), (hang, "takes more than 1 s"), (swell, "needs more memory")]
)
def test_what_befalls_the_library_is_one_sentence(tmp_path, monkeypatch, fault, said):
    """Each of these, but for the memory, was seen at files with a few changed bytes."""
    path = written(tmp_path / "a.h5", plain)
    monkeypatch.setattr(hdf5_tree, "_problem", fault)
    monkeypatch.setattr(hdf5_tree, "SECONDS", 1.0)
    before, already = set(os.listdir("/proc/self/fd")), children()
    with pytest.raises(ArtifactError, match=said):
        hdf5_tree.read(path, "node", "NIR")
    assert len(set(os.listdir("/proc/self/fd")) - before) == 0
    assert children() <= already


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(ArtifactError, match="cannot be read"):
        hdf5_tree.read(tmp_path / "none.h5", "node", "NIR")
