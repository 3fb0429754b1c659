"""ImageNet folders of small pictures, cropped as the papers do, and pictures that are damaged or hostile."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from toolchain import data
from toolchain.data import imagenet
from toolchain.errors import ArtifactError, UsageError

WNIDS = ("n01440764", "n01443537", "n15075141")


def ramp(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Red grows with the column, green with the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels).convert(mode)


def encoded(picture: Image.Image, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return stream.getvalue()


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put(tmp_path, {f"train/{wnid}/{wnid}_{i}.JPEG": encoded(ramp(60, 40 + i)) for wnid in WNIDS for i in (0, 1, 10)})
    put(tmp_path, {f"val/{wnid}/ILSVRC2012_val_0000000{i}.JPEG": encoded(ramp(50, 40)) for i, wnid in enumerate(WNIDS)})
    put(tmp_path, {"val/.DS_Store": b"1", "val/other/x.JPEG": b"1"})
    return tmp_path


def test_both_parts_are_read_lazily(folder: Path) -> None:
    train, test = (data.load("imagenet", split=split, data_dir=folder) for split in ("train", "test"))
    assert (train.images.shape, test.images.shape) == ((9, 3, 224, 224), (3, 3, 224, 224))
    assert train.classes == test.classes == WNIDS
    assert train.labels.tolist() == [0, 1, 2] * 3
    images = test.images[np.array([2, 0])]
    assert images.dtype == np.float32
    assert 0 <= images.min() <= images.max() <= 1
    assert data.found("imagenet", folder)
    put(folder / "again" / "imagenet", {f"val/{WNIDS[0]}/1.JPEG": encoded(ramp(9, 9))})
    assert data.load("imagenet", data_dir=folder / "again", image_size=32).images.shape == (1, 3, 32, 32)


def test_test_images_are_the_centre_as_torchvision_takes_it(folder: Path) -> None:
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is not installed")
    take = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()])
    for size in ((50, 40), (40, 61), (224, 224), (300, 500)):
        (folder / f"val/{WNIDS[0]}/ILSVRC2012_val_00000000.JPEG").write_bytes(encoded(ramp(*size)))
        with Image.open(folder / f"val/{WNIDS[0]}/ILSVRC2012_val_00000000.JPEG") as picture:
            wanted = take(picture.convert("RGB")).numpy()
        assert np.array_equal(data.load("imagenet", data_dir=folder).images[0], wanted)


def test_training_images_are_cropped_at_random_only_where_a_seed_is_given(folder: Path) -> None:
    whole = data.load("imagenet", split="train", data_dir=folder, image_size=16)
    plain = whole.images[:]
    assert np.array_equal(plain, whole.images[:])
    first, again, other = (whole.augmented(seed).images[:] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, plain)
    learn, choose = data.hold_out(whole, 3)
    assert np.array_equal(learn.augmented(1).images[2:4], first[2:4])
    assert np.array_equal(choose.images[:], plain[6:])
    assert learn.augmented(-5).images[:].shape == (6, 3, 16, 16)


def test_random_crops_have_the_area_and_aspect_of_the_papers(folder: Path) -> None:
    draw = np.random.default_rng(0)
    boxes = np.array([imagenet._box(300, 200, draw) for _ in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes[:, :2].min() >= 0
    assert (boxes[:, 2].max(), boxes[:, 3].max()) == (300, 200)
    area, aspect = width * height / 60_000, width / height
    assert 0.07 < area.min() < 0.1
    assert 0.8 < area.max() <= 1
    assert 0.72 < aspect.min() < aspect.max() < 1.38
    assert imagenet._box(1, 64, draw)[2] == 1
    wide = imagenet._box(640, 10, np.random.default_rng(1))
    assert wide[3] - wide[1] <= 10
    whole = data.load("imagenet", split="train", data_dir=folder, image_size=16)
    mirrored = [bool(np.diff(whole.augmented(seed).images[0][0].mean(0)).sum() < 0) for seed in range(200)]
    assert 70 < sum(mirrored) < 130


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("L", "JPEG"), ("RGBA", "PNG"), ("P", "PNG")])
def test_the_odd_pictures_of_imagenet_are_read(folder: Path, mode: str, kind: str) -> None:
    """A few are in CMYK, grey, or PNG under the name .JPEG."""
    (folder / f"val/{WNIDS[0]}/ILSVRC2012_val_00000000.JPEG").write_bytes(encoded(ramp(50, 40, mode), kind))
    assert data.load("imagenet", data_dir=folder).images[0].shape == (3, 224, 224)


def png(width: int, height: int) -> bytes:
    """A PNG that claims this size and holds nothing."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def without_palette() -> bytes:
    """A PNG of numbers of colours, one of them transparent, that names no colours."""
    stream = io.BytesIO()
    picture = Image.new("P", (50, 40))
    picture.putpalette([1, 2, 3] * 4)
    picture.save(stream, "PNG", transparency=0)
    content = stream.getvalue()
    at = content.index(b"PLTE") - 4
    return content[:at] + content[at + 12 + int.from_bytes(content[at : at + 4], "big") :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be decoded"),
        (without_palette(), "cannot be decoded"),
        (b"no picture", "cannot be decoded"),
        (encoded(ramp(50, 40))[:-300], "cannot be decoded"),
        (encoded(ramp(50, 40), "GIF"), "cannot be decoded"),
        (png(50, 40), "cannot be decoded"),
        (png(8000, 9000), "8000 x 9000 pixels"),
        (png(8000, 12_000), "8000 x 12000 pixels"),  # of which Pillow warns
        (png(10_000, 10_000), "10000 x 10000 pixels"),
        (png(100_000, 100_000), "cannot be decoded"),
        (png(1, 65), "1 x 65 pixels"),
    ],
)
def test_damaged_and_hostile_pictures_say_so_in_little_memory(folder: Path, content: bytes, message: str) -> None:
    (folder / f"val/{WNIDS[1]}/ILSVRC2012_val_00000001.JPEG").write_bytes(content)
    images = data.load("imagenet", data_dir=folder).images
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match=rf"ILSVRC2012_val_00000001.JPEG' .*{message}"):
            images[0:2]
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_a_picture_of_many_scans_is_refused_before_it_is_decoded(folder: Path) -> None:
    """A progressive JPEG goes over the whole picture with every scan: a thousand scans of 95 bytes each would take minutes."""
    stream = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    last = content[content.rfind(b"\xff\xda") : -2]
    put(folder, {f"val/{WNIDS[0]}/ILSVRC2012_val_00000000.JPEG": content[:-2] + 300 * last + content[-2:]})
    with pytest.raises(ArtifactError, match="has 310 scans of 2000 x 2000 pixels"):
        data.load("imagenet", data_dir=folder).images[0]


def test_a_file_that_is_no_picture_by_its_size_is_not_read_whole(folder: Path) -> None:
    with (folder / f"val/{WNIDS[0]}/ILSVRC2012_val_00000000.JPEG").open("wb") as stream:
        stream.truncate(1 << 36)  # it takes no room on the disk
    with pytest.raises(ArtifactError, match="more than 67108864 bytes"):
        data.load("imagenet", data_dir=folder).images[0]


def test_folders_that_are_missing_or_strange_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"needs the folders train/n01440764/ .* in '.*imagenet'"):
        data.load("imagenet", split="train", data_dir=folder / "val")
    put(folder, {"val/n99999999/1.JPEG": b"1"})
    with pytest.raises(ArtifactError, match=r"n99999999' is a class that '.*train' lacks"):
        data.load("imagenet", data_dir=folder)
    (folder / "train/n12345678").mkdir()
    with pytest.raises(ArtifactError, match=r"n12345678' holds no .jpeg or .jpg or .png file"):
        data.load("imagenet", split="train", data_dir=folder)


def test_a_part_without_training_folders_names_its_own_classes(tmp_path: Path) -> None:
    put(tmp_path, {f"val/{wnid}/1.JPEG": encoded(ramp(30, 30)) for wnid in WNIDS[1:]})
    found = data.load("imagenet", data_dir=tmp_path)
    labels: npt.NDArray[np.int64] = found.labels
    assert (found.classes, labels.tolist()) == (WNIDS[1:], [0, 1])
