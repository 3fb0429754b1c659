"""Data sets: what is shipped, IDX files good and bad, and the sentences for everything that is not there."""

from __future__ import annotations

import gzip
import re
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from toolchain import data
from toolchain.data import idx as idx_files
from toolchain.errors import ArtifactError, UsageError


def idx(values: npt.NDArray[np.uint8]) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


def write(folder: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], *, stem: str = "t10k", packed: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, values in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
        content = idx(values)
        (folder / f"{stem}-{part}{'.gz' if packed else ''}").write_bytes(gzip.compress(content) if packed else content)


@pytest.fixture
def images() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (6, 28, 28)).astype(np.uint8)


@pytest.fixture
def labels() -> npt.NDArray[np.uint8]:
    return np.array([3, 1, 4, 1, 5, 9], np.uint8)


def test_the_shipped_mnist_images_are_a_hundred_a_class() -> None:
    found = data.load("mnist-1k")
    assert found.images.shape == (1000, 1, 28, 28)
    assert found.images.dtype == np.float32
    assert found.labels.dtype == np.int64
    assert (found.images.min(), found.images.max()) == (0.0, 1.0)
    assert np.bincount(found.labels).tolist() == [100] * 10


def test_the_shipped_mnist_images_are_the_first_of_each_class_of_the_published_test_set() -> None:
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the published files are not here ({folder})")
    whole, shipped = data.load("mnist", data_dir=folder), data.load("mnist-1k")
    first = np.sort(np.concatenate([np.flatnonzero(whole.labels == label)[:100] for label in range(10)]))
    assert np.array_equal(shipped.images, whole.images[first])
    assert np.array_equal(shipped.labels, whole.labels[first])


def test_digits_are_split_as_stated() -> None:
    train, test = data.load("digits", split="train"), data.load("digits")
    assert (len(train), len(test)) == (1297, 500)
    assert train.images.shape[1:] == (1, 8, 8)
    assert train.images.max() == 1.0


def test_shipped_arrays_hold_no_pickles() -> None:
    for path in (Path(data.__file__).parents[1] / "samples").glob("*.npz"):
        with np.load(path, allow_pickle=False) as arrays:
            assert all(arrays[name].dtype.kind in "ui" for name in arrays.files)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_idx_files_are_read_in_their_published_form(
    tmp_path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], packed: bool, nested: bool
) -> None:
    write(tmp_path / "fashion-mnist" if nested else tmp_path, images, labels, packed=packed)
    found = data.load("fashion-mnist", data_dir=tmp_path)
    assert np.array_equal(np.rint(found.images[:, 0] * 255), images)
    assert found.labels.tolist() == labels.tolist()
    assert found.classes[9] == "Ankle boot"


def test_the_environment_names_the_folder(
    tmp_path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "mnist", images, labels)
    assert not data.found("mnist", tmp_path / "mnist" / "absent")
    monkeypatch.setenv("TOOLCHAIN_DATA", str(tmp_path))
    assert data.found("mnist")
    assert len(data.load("mnist", samples=4)) == 4


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("keep", [0, 3, 9, 16, 100])
def test_truncated_files_say_so(
    tmp_path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], packed: bool, keep: int
) -> None:
    write(tmp_path, images, labels, packed=packed)
    path = tmp_path / f"t10k-images-idx3-ubyte{'.gz' if packed else ''}"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="t10k-images-idx3-ubyte"):
        data.load("mnist", data_dir=tmp_path)


def test_nothing_is_set_aside_on_the_word_of_a_header(tmp_path: Path) -> None:
    """A file of a few bytes that claims 256 MiB costs no memory, and one of terabytes no time."""
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(bytes((0, 0, 8, 3)) + (1 << 14).to_bytes(4, "big") * 2 + (1).to_bytes(4, "big") + bytes(9))
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="holds 9 values but its header says 268435456"):
        idx_files.read_idx(path, dimensions=3)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 20
    huge = tmp_path / "t10k-images-idx3-ubyte.gz"
    with huge.open("wb") as stream:
        stream.truncate(1 << 40)  # it takes no room on the disk
    with pytest.raises(ArtifactError, match="has 1099511627776 bytes"):
        idx_files.read_idx(huge, dimensions=3)


def test_a_packed_file_that_lost_its_end_says_so(tmp_path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> None:
    write(tmp_path, images, labels)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ArtifactError, match="damaged"):
        data.load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(np.zeros(6, np.uint8)), "another kind of file"),
        (b"PK\x03\x04" + bytes(20), "504b0304, not 00000803"),
        (bytes((0, 0, 8, 3)) + b"\xff" * 12, "claims 4294967295 x"),
        (bytes((0, 0, 8, 3)) + bytes(12), "claims 0 x 0 x 0"),
        (idx(np.zeros((2, 28, 28), np.uint8)) + b"x", "more than 1568 values"),
        (idx(np.zeros((2, 28, 28), np.uint8)), "2 images but 6 labels"),
    ],
)
def test_files_of_another_kind_are_refused(
    tmp_path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], content: bytes, message: str
) -> None:
    write(tmp_path, images, labels, packed=False)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        data.load("mnist", data_dir=tmp_path)


def test_labels_beyond_the_classes_are_refused(tmp_path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> None:
    write(tmp_path, images, labels + 5)
    with pytest.raises(ArtifactError, match="label 14"):
        data.load("mnist", data_dir=tmp_path)


def test_what_is_not_there_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"10001.*has 1000"):
        data.load("mnist-1k", samples=10001)
    with pytest.raises(UsageError, match="1 to 1000"):
        data.load("mnist-1k", samples=0)
    with pytest.raises(UsageError, match="give 'mnist', which has their training images"):
        data.load("mnist-1k", split="train")
    with pytest.raises(UsageError, match="cifar10, cifar10-dvs, cifar100, digits, fashion-mnist, imagenet, mnist, mnist-1k, nmnist"):
        data.load("emnist")
    with pytest.raises(UsageError, match="test, train"):
        data.load("digits", split="validation")
    with pytest.raises(UsageError, match="does not exist"):
        data.load("mnist", data_dir=tmp_path / "absent")
    with pytest.raises(UsageError, match="'digits' have one size only"):
        data.load("digits", image_size=8)
    with pytest.raises(UsageError, match="0 time steps were asked of 'nmnist'"):
        data.load("nmnist", time_steps=0)
    with pytest.raises(UsageError, match=r"needs t10k-images-idx3-ubyte.gz .* in '.*mnist'"):
        data.load("mnist", data_dir=tmp_path)


def test_a_download_that_fails_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TOOLCHAIN_DATA", raising=False)
    monkeypatch.setitem(
        data.PUBLISHED, "mnist", idx_files.Published(tmp_path.as_uri() + "/nowhere", idx_files.DIGITS, data.PUBLISHED["mnist"].checksums)
    )
    with pytest.raises(UsageError, match=r"put the files of 'mnist' \(train-images-idx3-ubyte.gz.*toolchain/mnist"):
        data.load("mnist")


def test_a_download_is_kept_by_checksum_only(
    tmp_path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hashlib import sha256

    write(tmp_path / "mirror", images, labels)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TOOLCHAIN_DATA", raising=False)
    sums = {"t10k-images-idx3-ubyte": sha256(idx(images)).hexdigest(), "t10k-labels-idx1-ubyte": sha256(idx(labels)).hexdigest()}
    mirror = (tmp_path / "mirror").as_uri()
    monkeypatch.setitem(
        data.PUBLISHED, "mnist", idx_files.Published(mirror, idx_files.DIGITS, {**sums, "t10k-labels-idx1-ubyte": "0" * 64})
    )
    with pytest.raises(UsageError, match="another t10k-labels"):
        data.load("mnist")
    assert not list((tmp_path / "cache" / "toolchain" / "mnist").glob("*labels*"))
    monkeypatch.setitem(data.PUBLISHED, "mnist", idx_files.Published(mirror, idx_files.DIGITS, sums))
    assert len(data.load("mnist")) == 6
    assert data.found("mnist")


def test_the_held_out_images_are_the_last_ones() -> None:
    whole = data.load("digits", split="train")
    learn, choose = data.hold_out(whole, 200)
    assert (len(learn), len(choose)) == (1097, 200)
    assert np.array_equal(np.concatenate([learn.images, choose.images]), whole.images)
    assert whole.augmented(3) is whole
    with pytest.raises(UsageError, match="1297 samples cannot be held out"):
        data.hold_out(whole, 1297)


def test_the_page_names_every_set_and_its_code_runs() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page, re.M)
    assert sorted(name for row in rows for name in re.findall(r"`([^`]+)`", row)) == sorted(data.names())
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(block, "docs/data.md", "exec"), {"__name__": "page"})


def test_every_named_set_can_be_asked_for(tmp_path: Path) -> None:
    for name in set(data.names()) - {"digits", "mnist-1k"}:
        assert not data.found(name, tmp_path)
        for split in ("train", "test"):
            with pytest.raises(UsageError, match=f"data set '{name}' needs .* in '.*{name}': "):
                data.load(name, split=split, data_dir=tmp_path)
