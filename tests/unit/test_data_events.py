"""N-MNIST and CIFAR10-DVS in their published binary forms, written here event by event, and recordings that are damaged."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain import data
from toolchain.data import cifar10_dvs, dataset, nmnist
from toolchain.errors import ArtifactError, UsageError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def atis(*events: tuple[int, int, int, int]) -> bytes:
    """(x, y, polarity, microseconds) as 40 bits each: x, y, polarity and 23 bits of time."""
    return b"".join(((x << 32) | (y << 24) | (p << 23) | t).to_bytes(5, "big") for x, y, p, t in events)


def aedat(*events: tuple[int, int, int, int], header: bytes = b"#!AER-DAT2.0\r\n# This is a raw AE data file\r\n# 32 bits\r\n") -> bytes:
    """(column, row, brighter, microseconds) as a DVS128 sends them: the column counted from the right, polarity 0 for brighter."""
    return header + b"".join(
        struct.pack(">II", (row << 8) | ((127 - column) << 1) | (1 - brighter), t) for column, row, brighter, t in events
    )


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def recordings(split: str) -> dict[str, bytes]:
    """Two recordings of each digit, numbered as in MNIST; recording n has one event at x n, y its digit."""
    return {f"{split}/{i % 10}/{i + 1:05d}.bin": atis((i, i % 10, i % 2, 10)) for i in range(20)}


@pytest.mark.parametrize("place", ["", "nmnist"])
def test_nmnist_is_read_in_its_published_form(tmp_path: Path, place: str) -> None:
    put(tmp_path / place, {**recordings("Train"), **{k: v for k, v in recordings("Test").items() if int(k[-9:-4]) <= 10}})
    train, test = (data.load("nmnist", split=split, data_dir=tmp_path, time_steps=5) for split in ("train", "test"))
    assert (train.images.shape, test.images.shape) == ((20, 2, 34, 34, 5), (10, 2, 34, 34, 5))
    assert train.labels.tolist() == [*range(10), *range(10)]
    images = np.asarray(train.images)
    assert images.dtype == np.float32
    assert np.argwhere(images).tolist() == [[i, i % 2, i % 10, i, 0] for i in range(20)]
    assert images.max() == 1
    assert data.load("nmnist", data_dir=tmp_path).images.shape[-1] == 30
    assert data.found("nmnist", tmp_path)


def test_a_time_step_of_nmnist_has_three_milliseconds() -> None:
    steps = [(0, 0), (1, 0), (3000, 0), (3001, 1), (6000, 1), (6001, 2)]
    for time, step in steps:
        assert np.argwhere(nmnist.frames(atis((3, 5, 1, time)), 4, "it")).tolist() == [[1, 5, 3, step]]
    assert not nmnist.frames(atis((3, 5, 1, 12_001)), 4, "it").any()
    twice = nmnist.frames(atis((3, 5, 0, 1), (3, 5, 0, 2)), 4, "it")
    assert twice.sum() == 1


def test_time_goes_on_where_the_timestamp_overflows() -> None:
    events = atis((3, 5, 1, 100), (0, 240, 0, 0), (3, 15, 1, 100), (0, 240, 0, 0), (3, 25, 1, 100))
    assert np.argwhere(nmnist.frames(events, 8, "it"))[:, 3].tolist() == [0, 2, 5]


def test_events_move_back_with_the_sensor() -> None:
    """Orchard's stabilize: 3.5 pixels in x and 7 in y over the first saccade of 105 ms, y back over the second, x over the third."""
    for time, (dx, dy) in {0: (0, 0), 30_000: (1, 2), 105_000: (3.5, 7), 157_500: (5.25, 3.5), 210_000: (7, 0), 315_000: (0, 0)}.items():
        (where,) = np.argwhere(nmnist.frames(atis((20, 20, 1, time)), 105, "it"))
        assert abs(20 - where[2] - dx) <= 0.5
        assert abs(20 - where[1] - dy) <= 0.5
    assert not nmnist.frames(atis((1, 1, 1, 105_000)), 105, "it").any()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 33), st.integers(0, 33), st.integers(0, 1), st.integers(0, 7000)), min_size=1, max_size=30))
def test_every_early_event_is_seen_once(events: list[tuple[int, int, int, int]]) -> None:
    found = nmnist.frames(atis(*events), 3, "it")
    assert {tuple(place) for place in np.argwhere(found).tolist()} == {(p, y, x, max(t - 1, 0) // 3000) for x, y, p, t in events}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, which are not events of 5 bytes"),
        (atis((1, 2, 0, 3))[:4], "4 bytes"),
        (atis((1, 2, 0, 3), (34, 2, 0, 4)), "event at x 34, y 2, outside 34 x 34"),
        (atis((1, 2, 0, 3), (3, 239, 0, 4)), "event at x 3, y 239"),
        (bytes(nmnist.LARGEST_RECORDING + 5), "more than 4194304 bytes"),
    ],
)
def test_damaged_recordings_of_nmnist_say_so_when_asked_for(tmp_path: Path, content: bytes, message: str) -> None:
    put(tmp_path, recordings("Test"))
    (tmp_path / "Test" / "4" / "00005.bin").write_bytes(content)
    images = data.load("nmnist", data_dir=tmp_path, time_steps=2).images
    images[:4]
    with pytest.raises(ArtifactError, match=f"00005.bin' has .*{message}"):
        images[4]


def test_a_folder_of_nmnist_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    put(tmp_path, {name: content for name, content in recordings("Test").items() if "/7/" not in name})
    with pytest.raises(UsageError, match=r"Test/7' is missing"):
        data.load("nmnist", data_dir=tmp_path)
    put(tmp_path, {"Test/7/readme.txt": b"1", "Test/7/._00008.bin": b"1"})
    with pytest.raises(ArtifactError, match=r"Test/7' holds no .bin file"):
        data.load("nmnist", data_dir=tmp_path)
    with pytest.raises(UsageError, match=r"needs the folders Train/0 to Train/9 in .*get Train.zip"):
        data.load("nmnist", split="train", data_dir=tmp_path)


def test_tonic_reads_the_same_events(tmp_path: Path) -> None:
    reader = pytest.importorskip("tonic.io", reason="tonic is not installed")
    draw = np.random.default_rng(0)
    times = np.sort(draw.integers(0, 7000, 500))
    events = [(int(x), int(y), int(p), int(t)) for x, y, p, t in zip(*draw.integers(0, (34, 34, 2), (500, 3)).T, times, strict=True)]
    (tmp_path / "one.bin").write_bytes(atis(*events))
    kind = np.dtype([("x", int), ("y", int), ("t", int), ("p", int)])
    seen = reader.read_mnist_file(str(tmp_path / "one.bin"), kind)
    wanted = np.zeros((2, 34, 34, 3), np.uint8)
    wanted[seen["p"], seen["y"], seen["x"], np.maximum(seen["t"] - 1, 0) // 3000] = 1
    assert np.array_equal(nmnist.frames(atis(*events), 3, "it"), wanted)


def dvs(counts: range, header: bytes = b"#!AER-DAT2.0\r\n") -> dict[str, bytes]:
    """Recordings of every class with the given numbers; each has four events at column = its number, row = its class."""
    return {
        f"{name}/cifar10_{name}_{i}.aedat": aedat(*[(i % 128, label, t % 2, t) for t in range(4)], header=header)
        for label, name in enumerate(CLASSES)
        for i in counts
    }


@pytest.mark.parametrize("place", ["", "cifar10-dvs"])
def test_cifar10_dvs_is_read_in_its_published_form(tmp_path: Path, place: str) -> None:
    put(tmp_path / place, dvs(range(897, 902)))
    train, test = (data.load("cifar10-dvs", split=split, data_dir=tmp_path, time_steps=2, image_size=128) for split in ("train", "test"))
    assert (train.images.shape, test.images.shape) == ((30, 2, 128, 128, 2), (20, 2, 128, 128, 2))
    assert train.labels.tolist() == [*range(10)] * 3
    assert test.labels.tolist() == [*range(10)] * 2
    column, row = 900 % 128, 3
    # events 0 and 2 are darker, 1 and 3 brighter; two events a frame
    assert np.argwhere(test.images[3]).tolist() == [[0, row, column, 0], [0, row, column, 1], [1, row, column, 0], [1, row, column, 1]]
    assert test.images[3].max() == 1
    usual = data.load("cifar10-dvs", data_dir=tmp_path)
    assert usual.images.shape == (20, 2, 48, 48, 10)
    assert data.found("cifar10-dvs", tmp_path)


def test_frames_have_equal_numbers_of_events_and_the_last_takes_the_rest() -> None:
    found = cifar10_dvs.frames(aedat(*[(column, 0, 1, 10**6 * column) for column in range(11)]), 3, "it")
    assert [np.flatnonzero(found[1, 0, :, step]).tolist() for step in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9, 10]]
    few = cifar10_dvs.frames(aedat((1, 2, 0, 3)), 3, "it")
    assert np.argwhere(few).tolist() == [[0, 2, 1, 2]]


def test_frames_are_resized_as_pillow_does() -> None:
    from PIL import Image

    draw = np.random.default_rng(0)
    frame = (draw.random((128, 128)) < 0.3).astype(np.float32) * 255
    for size in (48, 32, 128, 200):
        by = cifar10_dvs._resize(128, size)
        wanted = np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR))
        assert np.abs(by @ frame @ by.T - wanted).max() < 0.01


def test_resized_frames_stay_between_0_and_1(tmp_path: Path) -> None:
    events = [(column, row, 1, 0) for column in range(128) for row in range(64)]
    put(tmp_path, dvs(range(900, 901)) | {"bird/cifar10_bird_900.aedat": aedat(*events)})
    image = data.load("cifar10-dvs", data_dir=tmp_path, time_steps=1).images[2]
    assert image.shape == (2, 48, 48, 1)
    assert (image[1, :23] == 1).all()
    assert not image[1, 26:].any()
    assert not image[0].any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not start with '#!AER-DAT2.0'"),
        (b"PK\x03\x04" + bytes(60), "another kind of file"),
        (aedat((1, 2, 0, 3), header=b"#!AER-DAT3.1\r\n"), "is 'AER-DAT3.1', not AER-DAT2.0"),
        (aedat((1, 2, 0, 3), header=b"#!AER-DAT4.0\r\n"), "is 'AER-DAT4.0'"),
        (aedat(), "0 bytes after its header"),
        (aedat((1, 2, 0, 3))[:-1], "7 bytes after its header"),
        (b"#" * 100, "header without an end"),
        (b"#\n" * (1 << 17), "header without an end"),
    ],
)
def test_damaged_recordings_of_cifar10_dvs_say_so(tmp_path: Path, content: bytes, message: str) -> None:
    put(tmp_path, dvs(range(900, 901)) | {"cat/cifar10_cat_900.aedat": content})
    images = data.load("cifar10-dvs", data_dir=tmp_path).images
    with pytest.raises(ArtifactError, match=rf"cifar10_cat_900.aedat' .*{message}"):
        images[2:5]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_noise_is_a_recording_or_refused(noise: bytes) -> None:
    for read, start in ((nmnist.frames, b""), (cifar10_dvs.frames, b""), (cifar10_dvs.frames, b"#!AER-DAT2.0\r\n")):
        try:
            assert read(start + noise, 2, "it").max() <= 255
        except ArtifactError as error:
            assert str(error).startswith("'it' ")  # noqa: PT017


def test_a_lazy_set_is_decoded_where_it_is_asked_for(tmp_path: Path) -> None:
    put(tmp_path, recordings("Test"))
    whole = data.load("nmnist", data_dir=tmp_path, time_steps=2)
    images = whole.images
    assert isinstance(images, data.LazyImages)
    everything = np.asarray(images)
    assert (len(images), images.ndim, images.dtype, images.shape) == (20, 5, np.float32, everything.shape)
    order = np.array([7, 0, 7, 19])
    mask = np.arange(20) % 3 == 0
    for index in (order, slice(3, 9), slice(None, None, -2), mask, [1, 2], np.array([], int)):
        assert np.array_equal(images[index], everything[index])
    assert np.array_equal(images[-1], everything[-1])
    assert images[0].shape == (2, 34, 34, 2)
    with pytest.raises(IndexError):
        images[20]
    learn, choose = data.hold_out(whole, 6)
    assert learn.images.shape == (14, 2, 34, 34, 2)
    assert np.array_equal(np.asarray(choose.images), everything[14:])
    assert np.array_equal(learn.part(2, 5).images[:], everything[2:5])
    assert choose.labels.tolist() == [4, 5, 6, 7, 8, 9]
    assert data.load("nmnist", data_dir=tmp_path, samples=3).images.shape[0] == 3
    assert whole.augmented(1) is whole


def test_what_is_kept_in_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, recordings("Test"))
    images = data.load("nmnist", data_dir=tmp_path, time_steps=2).images
    assert isinstance(images, data.LazyImages)
    assert images.kept is not None
    monkeypatch.setattr(dataset, "KEPT_BYTES", 5 * 2 * 34 * 34 * 2)
    everything = images[:]
    assert (len(images.kept.samples), images.kept.size) == (5, dataset.KEPT_BYTES)
    for path in tmp_path.rglob("*.bin"):
        path.unlink()
    kept = np.array(sorted(images.kept.samples))
    assert np.array_equal(images.part(0, 20)[kept], everything[kept])
    with pytest.raises(ArtifactError, match="cannot be read"):
        images[:]


def test_classes_are_interleaved_in_proportion(tmp_path: Path) -> None:
    put(tmp_path, {f"Test/{d}/{i:05d}.bin": atis((1, 1, 1, 1)) for d in range(10) for i in range(30 if d == 3 else 3)})
    labels: npt.NDArray[np.int64] = data.load("nmnist", data_dir=tmp_path).labels
    thirds = [np.bincount(labels[k * 19 : (k + 1) * 19], minlength=10).tolist() for k in range(3)]
    assert thirds == [[1, 1, 1, 10, 1, 1, 1, 1, 1, 1]] * 3
