"""CIFAR in its published forms, written here byte by byte, and files that are not: no file runs code, and none costs more than its size."""

from __future__ import annotations

import contextlib
import gzip
import os
import pickle
import struct
import tracemalloc
from hashlib import sha256
from pathlib import Path
from time import process_time

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain import data
from toolchain.data import archives, cifar, pickles
from toolchain.errors import ArtifactError, UsageError

Bytes = npt.NDArray[np.uint8]


class Python2:
    """Writes what cPickle of Python 2 writes at protocol 2: every object kept in the memo under the next number."""

    def __init__(self) -> None:
        self.kept = 0

    def keep(self) -> bytes:
        self.kept += 1
        return b"q" + bytes([self.kept]) if self.kept < 256 else b"r" + struct.pack("<I", self.kept)

    def text(self, value: bytes) -> bytes:
        short = len(value) < 256
        return (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))) + value + self.keep()

    def integer(self, value: int) -> bytes:
        if 0 <= value < 256:
            return b"K" + bytes([value])
        return b"M" + struct.pack("<H", value) if 0 <= value < 65536 else b"J" + struct.pack("<i", value)

    def list(self, items: list[bytes]) -> bytes:
        return b"]" + self.keep() + b"(" + b"".join(items) + b"e"

    def array(self, values: Bytes, *, fortran: bool = False) -> bytes:
        start = b"cnumpy.core.multiarray\n_reconstruct\n" + self.keep() + b"cnumpy\nndarray\n" + self.keep()
        start += b"K\x00\x85" + self.keep() + self.text(b"b") + b"\x87" + self.keep() + b"R" + self.keep()
        shape = b"".join(self.integer(n) for n in values.shape) + b"\x86" + self.keep()
        kind = b"cnumpy\ndtype\n" + self.keep() + self.text(b"u1") + b"K\x00K\x01\x87" + self.keep() + b"R" + self.keep()
        kind += b"(K\x03" + self.text(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00t" + self.keep() + b"b"
        content = values.tobytes("F" if fortran else "C")
        return start + b"(K\x01" + shape + kind + (b"\x88" if fortran else b"\x89") + self.text(content) + b"t" + self.keep() + b"b"

    def batch(self, pairs: list[tuple[bytes, bytes]]) -> bytes:
        return b"\x80\x02}q\x00(" + b"".join(self.text(key) + value for key, value in pairs) + b"u."


def batch(pixels: Bytes, labels: list[int], key: bytes = b"labels", *, fortran: bool = False) -> bytes:
    """A batch file of the python version, as cs.toronto.edu has it."""
    w = Python2()
    names = [w.text(f"image_s_{i:06d}.png".encode()) for i in range(len(labels))]
    pairs = [
        (b"batch_label", w.text(b"training batch 1 of 5")),
        (key, w.list([w.integer(n) for n in labels])),
        (b"data", w.array(pixels.reshape(len(pixels), -1), fortran=fortran)),
        (b"filenames", w.list(names)),
    ]
    return w.batch(pairs)


def tar(files: dict[str, bytes]) -> bytes:
    """A POSIX ustar archive, gzipped, with the folder as a member of its own."""
    content = b""
    for name, held in {"./" + next(iter(files)).split("/")[0] + "/": None, **files}.items():
        size = 0 if held is None else len(held)
        header = bytearray(512)
        header[: len(name)] = name.encode()
        header[100:136] = b"0000644\0000001750\0000001750\0%011o\0" % size
        header[136:148] = b"%011o\0" % 1234567890
        header[156:157] = b"5" if held is None else b"0"
        header[257:265] = b"ustar\00000"
        header[148:156] = b"        "
        header[148:156] = b"%06o\0 " % sum(header)
        content += bytes(header) + (held or b"") + bytes(-size % 512)
    return gzip.compress(content + bytes(1024))


@pytest.fixture
def pixels() -> Bytes:
    return np.random.default_rng(0).integers(0, 256, (10, 3, 32, 32)).astype(np.uint8)


LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def cifar10(pixels: Bytes) -> dict[str, bytes]:
    """Five training batches of two images, and a test batch of the last three."""
    files = {f"cifar-10-batches-py/data_batch_{i + 1}": batch(pixels[2 * i : 2 * i + 2], LABELS[2 * i : 2 * i + 2]) for i in range(5)}
    return files | {"cifar-10-batches-py/test_batch": batch(pixels[7:], LABELS[7:])}


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def check(folder: Path, pixels: Bytes) -> None:
    train, test = (data.load("cifar10", split=split, data_dir=folder) for split in ("train", "test"))
    assert isinstance(train.images, np.ndarray)
    assert train.images.dtype == np.float32
    assert np.array_equal(train.images, pixels.astype(np.float32) / np.float32(255))
    assert train.labels.tolist() == LABELS
    assert np.array_equal(np.rint(np.asarray(test.images) * 255), pixels[7:])
    assert test.labels.tolist() == LABELS[7:]
    assert test.classes[9] == "truck"
    assert data.found("cifar10", folder)


@pytest.mark.parametrize("place", ["", "cifar10"])
def test_the_python_version_is_read_unpacked_and_packed(tmp_path: Path, pixels: Bytes, place: str) -> None:
    put(tmp_path / "unpacked" / place, cifar10(pixels))
    check(tmp_path / "unpacked", pixels)
    put(tmp_path / "packed" / place, {"cifar-10-python.tar.gz": tar(cifar10(pixels))})
    check(tmp_path / "packed", pixels)


def test_the_binary_version_is_read(tmp_path: Path, pixels: Bytes) -> None:
    records = [bytes([label]) + image.tobytes() for label, image in zip(LABELS, pixels, strict=True)]
    files = {f"cifar-10-batches-bin/data_batch_{i + 1}.bin": b"".join(records[2 * i : 2 * i + 2]) for i in range(5)}
    put(tmp_path, files | {"cifar-10-batches-bin/test_batch.bin": b"".join(records[7:])})
    check(tmp_path, pixels)
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(b"".join(records)[:-1])
    with pytest.raises(ArtifactError, match="30729 bytes, which are not records of 3073"):
        data.load("cifar10", data_dir=tmp_path)


def test_cifar100_has_its_fine_labels(tmp_path: Path, pixels: Bytes) -> None:
    fine = [99, 0, 51, 7, 8, 9, 10, 11, 12, 13]
    python = {f"cifar-100-python/{part}": batch(pixels, fine, b"fine_labels") for part in ("train", "test")}
    binary = b"".join(bytes([label // 5, label]) + image.tobytes() for label, image in zip(fine, pixels, strict=True))
    put(tmp_path / "python", python)
    put(tmp_path / "binary", {f"cifar-100-binary/{part}.bin": binary for part in ("train", "test")})
    for folder in ("python", "binary"):
        for split in ("train", "test"):
            found = data.load("cifar100", split=split, data_dir=tmp_path / folder)
            assert found.labels.tolist() == fine
            assert np.array_equal(np.rint(np.asarray(found.images) * 255), pixels)
            assert (len(found.classes), found.classes[0], found.classes[51], found.classes[99]) == (100, "apple", "mushroom", "worm")
    assert cifar.PUBLISHED["cifar100"].classes == tuple(sorted(cifar.PUBLISHED["cifar100"].classes))


def test_columns_first_arrays_are_read(pixels: Bytes) -> None:
    held = pickles.read(batch(pixels, LABELS, fortran=True), "it")
    assert np.array_equal(held["data"], pixels.reshape(10, -1))


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("key", ["data", b"data"])
def test_what_other_pythons_write_of_the_same_is_read(pixels: Bytes, protocol: int, key: str | bytes) -> None:
    wanted = pixels.reshape(10, -1)
    content = pickle.dumps({key: wanted, "labels": LABELS, "batch_label": b"one", "none": None, "many": list(range(1000))}, protocol)
    held = pickles.read(content, "it")
    assert np.array_equal(held["data"], wanted)
    assert (held["labels"], held["batch_label"], held["many"]) == (LABELS, b"one", list(range(1000)))


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}",)


REFUSED = {
    "os.system at protocol 0": (b"cos\nsystem\n(S'touch it'\ntR.", r"names 'os' 'system'"),
    "os.system": (b"\x80\x02cposix\nsystem\nX\x08\x00\x00\x00touch it\x85R.", r"names 'posix' 'system'"),
    "names on the stack": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", r"names 'posix' 'system'"),
    "a module of NumPy": (b"\x80\x02cnumpy.testing._private.utils\nrunstring\n.", "names 'numpy.testing"),
    "eval": (b"\x80\x02c__builtin__\neval\n.", "names '__builtin__' 'eval'"),
    "a name without end": (b"\x80\x02c" + b"a" * 1000, "too long or has no end"),
    "an instance": (b"\x80\x02(ios\nsystem\n.", "instruction 0x69"),
    "a new object": (b"\x80\x02cnumpy\nndarray\n)\x81.", "instruction 0x81"),
    "an extension": (b"\x80\x02\x82\x01.", "instruction 0x82"),
    "a persistent id": (b"\x80\x02K\x00Q.", "instruction 0x51"),
    "a call of nothing": (b"\x80\x02K\x00K\x01R.", "do not fit together"),
    "an array of objects": (b"\x80\x02cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R.", "another type than unsigned bytes"),
    "an array of floats": (pickle.dumps({"data": np.zeros(3)}, 2), "another type than unsigned bytes"),
    "a state for a dictionary": (b"\x80\x02})b.", "do not fit together"),
    "a huge length": (b"\x80\x02T\xff\xff\xff\x7f", "claims 2147483647 bytes where 0 are left"),
    "a negative length": (b"\x80\x02T\xff\xff\xff\xff", "claims 4294967295 bytes"),
    "a huge frame of text": (b"\x80\x02X\x00\x00\x00\xf0ab", "claims 4026531840 bytes"),
    "text beyond Latin-1": (b"\x80\x02X\x04\x00\x00\x00\xf0\x9f\x98\x80.", "not Latin-1"),
    "text that is no text": (b"\x80\x02X\x01\x00\x00\x00\xc3.", "not UTF-8"),
    "a part that is not there": (b"\x80\x02h\x07.", "refers to part 7"),
    "a list for a key": (b"\x80\x02}]K\x01s.", "no short text"),
    "a long key": (b"\x80\x02}X\x00\x01\x00\x00" + b"k" * 256 + b"K\x01s.", "no short text"),
    "a key without its value": (b"\x80\x02}(U\x01au.", "lacks its value"),
    "items without a start": (b"\x80\x02]K\x01e.", "do not fit together"),
    "nothing": (b"\x80\x02.", "not complete"),
    "too much": (b"\x80\x02K\x01K\x02.", "not complete"),
    "more after the end": (b"\x80\x02K\x01.K\x02.", "goes on for 3 bytes"),
    "another protocol": (b"\x80\x05K\x01.", "protocol 5"),
    "no bytes": (b"", "ends inside its pickle"),
    "endless work": (b"\x80\x02" + b"K\x00" * (pickles.MOST_INSTRUCTIONS + 1), "more than 524288 pickle instructions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_pickle_that_is_no_batch_is_refused_in_one_sentence(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = REFUSED[case]
    began = process_time()
    with pytest.raises(ArtifactError, match=message) as caught:
        pickles.read(content, "'the file'")
    assert process_time() - began < 5
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("'the file' ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("protocol", range(6))
def test_code_in_a_batch_does_not_run(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    put(tmp_path, {"cifar-100-python/test": pickle.dumps({"data": Evil(trace), "fine_labels": [1]}, protocol)})
    with pytest.raises(ArtifactError, match="cifar-100-python/test"):
        data.load("cifar100", data_dir=tmp_path)
    assert not trace.exists()


def bombs() -> dict[str, bytes]:
    """Files of at most half a megabyte that would unfold into gigabytes."""
    nested = b"\x80\x02]q\x00" + b"".join(b"(" + b"h\x00" * 100 + b"tq\x00" for _ in range(2000)) + b"K\x01a."
    kept = b"\x80\x02X" + struct.pack("<I", 200_000) + b"a" * 200_000 + b"q\x000"
    call = b"c_codecs\nencode\nh\x00U\x06latin1\x86R"
    return {
        "lists of lists": nested,
        "text encoded again and again": kept.replace(b"q\x000", b"q\x00") + call * 5000 + b".",
        "an array of claims": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87RK\x00U\x01at b.",
        "a huge memo number": b"\x80\x02K\x00r\xff\xff\xff\xff" * 3,
        "marks": b"\x80\x02" + b"(" * 400_000 + b"t" * 400_000 + b".",
    }


@pytest.mark.parametrize("case", bombs())
def test_hostile_files_cost_little_memory_and_time(case: str) -> None:
    content = bombs()[case]
    tracemalloc.start()
    began = process_time()
    try:
        with pytest.raises(ArtifactError):
            pickles.read(content, "it")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert process_time() - began < 20


SMALL = batch(np.arange(2 * 3072, dtype=np.uint8), [1, 2])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(SMALL) - 1), st.binary(max_size=4), st.integers(0, 4))
def test_a_changed_batch_is_read_or_refused(place: int, written: bytes, dropped: int) -> None:
    changed = SMALL[:place] + written + SMALL[place + dropped :]
    with contextlib.suppress(ArtifactError):
        pickles.read(changed, "it")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(SMALL) - 1))
def test_a_truncated_batch_says_so(length: int) -> None:
    with pytest.raises(ArtifactError, match=r"ends inside its pickle|claims .* bytes where|no end"):
        pickles.read(SMALL[:length], "it")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(ArtifactError):
        pickles.read(b"\x80\x02" + noise + b"\xff", "it")


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"labels": [1]}, "holds no 'data'"),
        ({"data": np.zeros((2, 3071), np.uint8), "labels": [1, 2]}, "holds no 'data' of n x 3072"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "shape does not fit its 0 bytes"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "holds no 'labels'.* each of its 2 images"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1, True]}, "holds no 'labels'"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10]}, "labels from 1 to 10"),
        ([1, 2], "holds no 'data'"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, held: object, message: str) -> None:
    put(tmp_path, {"cifar-10-batches-py/test_batch": pickle.dumps(held, 4)})
    with pytest.raises(ArtifactError, match=message):
        data.load("cifar10", data_dir=tmp_path)


def test_a_file_that_is_missing_is_named(tmp_path: Path, pixels: Bytes) -> None:
    files = cifar10(pixels)
    del files["cifar-10-batches-py/data_batch_3"]
    put(tmp_path / "unpacked", files)
    put(tmp_path / "packed", {"cifar-10-python.tar.gz": tar(files)})
    with pytest.raises(UsageError, match="lacks data_batch_3"):
        data.load("cifar10", split="train", data_dir=tmp_path / "unpacked")
    with pytest.raises(ArtifactError, match="lacks cifar-10-batches-py/data_batch_3"):
        data.load("cifar10", split="train", data_dir=tmp_path / "packed")


def test_an_archive_that_is_damaged_or_a_bomb_says_so(tmp_path: Path, pixels: Bytes) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    whole = tar(cifar10(pixels))
    for content, message in [
        (whole[:-5000], "damaged|ends inside"),
        (gzip.compress(gzip.decompress(whole)[:1000]), "ends inside a member"),
        (b"PK\x03\x04" + bytes(50), "damaged"),
        (gzip.compress(b"x" * 2000), "damaged tar header"),
        (gzip.compress(gzip.decompress(whole).replace(b"0000644", b"0000666", 1)), "damaged tar header"),
        (gzip.compress(b""), "ends inside a member"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=message):
            data.load("cifar10", data_dir=tmp_path)


def test_an_archive_that_claims_gigabytes_is_refused_before_they_are_read(tmp_path: Path) -> None:
    header = bytearray(gzip.decompress(tar({"cifar-10-batches-py/test_batch": b"1"}))[512:1024])
    header[124:136] = b"%011o\0" % (6 << 30)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(gzip.compress(bytes(header) + bytes(1 << 20)))
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match="unfolds into more than 268435456 bytes"):
            archives.members(path, ["cifar-10-batches-py/test_batch"])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_names_in_an_archive_never_become_paths(tmp_path: Path, pixels: Bytes) -> None:
    files = {"../outside": b"1", "/etc/outside": b"1", **cifar10(pixels)}
    put(tmp_path / "in", {"cifar-10-python.tar.gz": tar(files)})
    check(tmp_path / "in", pixels)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["cifar-10-python.tar.gz"]


def test_a_download_is_kept_by_checksum_only(tmp_path: Path, pixels: Bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    content = tar(cifar10(pixels))
    put(tmp_path / "mirror", {"cifar-10-python.tar.gz": content})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TOOLCHAIN_DATA", raising=False)
    forms, classes = cifar.PUBLISHED["cifar10"].forms, cifar.PUBLISHED["cifar10"].classes
    for mirror, checksum, message in [("nowhere", "0", "did not deliver"), ("mirror", "0", "another cifar-10-python.tar.gz")]:
        monkeypatch.setitem(cifar.PUBLISHED, "cifar10", cifar.Published(forms, classes, (tmp_path / mirror).as_uri(), checksum))
        with pytest.raises(UsageError, match=rf"{message}.*put cifar-10-python.tar.gz of 'cifar10' into '.*toolchain/cifar10'"):
            data.load("cifar10")
        assert not data.found("cifar10")
    monkeypatch.setitem(
        cifar.PUBLISHED, "cifar10", cifar.Published(forms, classes, (tmp_path / "mirror").as_uri(), sha256(content).hexdigest())
    )
    assert len(data.load("cifar10", samples=2)) == 2
    assert data.found("cifar10")
