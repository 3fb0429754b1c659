"""Targets: data sets in their published files: IDX, events, CIFAR in both versions and packed, pictures."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz import mutate
from fuzz.target import MIB, Mutator, Prepared, Target
from toolchain import data
from toolchain.data import cifar, cifar10_dvs, idx, nmnist
from toolchain.ir import Array


def _idx(values: Array) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


def _header(data: bytes, random: Random) -> bytes:
    """Another length in an IDX header."""
    at = 4 * random.randrange(1, 4)
    return data[:at] + struct.pack(">I", random.choice((0, 1, 2, 3, 7, 28, 255, 2**14, 2**16, 2**28, 2**31, 2**32 - 1))) + data[at + 4 :]


def _repacked(change: Mutator) -> Mutator:
    """`change` within gzip, whose checksum fits again."""

    def mutate_within(packed: bytes, random: Random) -> bytes:
        try:
            content = zlib.decompressobj(31).decompress(packed, 1 << 20)
        except zlib.error:
            return packed
        return gzip.compress(change(content, random), 1)

    return mutate_within


ZEROS = tuple(gzip.compress(bytes(size)) for size in (1, 2**16, 2**20, 2**24))


def _bomb(packed: bytes, random: Random) -> bytes:
    """Much that unfolds from little, behind or in place of what was there."""
    zeros = random.choice(ZEROS)
    return random.choice((packed + zeros, zeros, packed + gzip.compress(b"") * random.choice((1, 1000))))


def idx_files(folder: Path) -> Prepared:
    """An IDX file, read by itself."""
    images, labels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.array([3, 9], np.uint8)
    file = folder / "t10k-images-idx3-ubyte"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        idx.read_idx(file, dimensions=1 if content[3:4] == b"\x01" else 3)

    return Prepared((_idx(images), _idx(labels)), read, (_header,))


def idx_packed(folder: Path) -> Prepared:
    """A packed IDX file beside its labels, as a data set."""
    file = folder / "t10k-images-idx3-ubyte.gz"
    (folder / "t10k-labels-idx1-ubyte").write_bytes(_idx(np.array([3, 9], np.uint8)))

    def read(content: bytes) -> None:
        file.write_bytes(content)
        found = data.load("mnist", data_dir=folder)
        assert found.images.shape[:2] == (2, 1)

    seed = gzip.compress(_idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4)))
    return Prepared((seed,), read, (_repacked(_header), *(_repacked(each) for each in mutate.BYTES), _bomb))


def events(folder: Path) -> Prepared:
    """A recording of N-MNIST."""
    draw = np.random.default_rng(0)
    whole = np.column_stack(
        [draw.integers(0, 34, (40, 2)), draw.integers(0, 2, 40) << 7 | np.arange(40) // 10, draw.integers(0, 256, (40, 2))]
    )
    whole[::9, 1] = nmnist.OVERFLOW_Y

    def read(content: bytes) -> None:
        found = nmnist.frames(content, 30, "recording.bin")
        assert found.shape == (2, 34, 34, 30)
        assert found.max(initial=0) <= 1

    return Prepared((whole.astype(np.uint8).tobytes(), bytes((1, 2, 128, 0, 9))), read)


def recordings(folder: Path) -> Prepared:
    """A recording of CIFAR10-DVS, in its own size and in another."""
    draw = np.random.default_rng(0)
    whole = np.column_stack([draw.integers(0, 2**15, 50), np.arange(50) * 1000]).astype(">u4").tobytes()
    resize = cifar10_dvs._resize(cifar10_dvs.SENSOR, 8)

    def read(content: bytes) -> None:
        for size in (None, resize):
            cifar10_dvs.frames(content, 3, "recording.aedat", size)

    def headers(content: bytes, random: Random) -> bytes:
        line = random.choice((b"#!AER-DAT3.1\r\n", b"#", b"#" * 70_000, b"# a\n" * 20_000, b"\n", b"#\xff\n", b"#!AER-DAT2.0\r\n"))
        return random.choice((line + content, content[:16] + line + content[16:], line + content[content.find(b"\n") + 1 :]))

    return Prepared((b"#!AER-DAT2.0\r\n# a line\r\n" + whole, b"#\n" + whole[:8]), read, (headers,))


# ---- CIFAR


def _images(count: int) -> Array:
    return np.random.default_rng(0).integers(0, 256, (count, cifar.PIXELS), np.uint8)


def _batch(protocol: int, labels: str = "labels") -> bytes:
    content = {"data": _images(2), labels: [3, 9], "batch_label": "testing batch 1 of 1", "filenames": ["a.png", "b.png"]}
    return pickle.dumps({key.encode(): value for key, value in content.items()} if protocol == 2 else content, protocol)


def _instructions(content: bytes, random: Random) -> bytes:
    """Pickle instructions put in, taken out or exchanged."""
    code = random.choice(
        (
            *(
                b"(",
                b".",
                b"0",
                b"1",
                b"2",
                b"N",
                b"\x88",
                b"]",
                b"}",
                b")",
                b"e",
                b"a",
                b"s",
                b"u",
                b"t",
                b"\x85",
                b"\x86",
                b"\x87",
                b"R",
                b"b",
                b"\x93",
                b"\x94",
            ),
            *(
                b"cos\nsystem\n",
                b"cnumpy\ndtype\n",
                b"c_codecs\nencode\n",
                b"\x8c\x02u1",
                b"K\xff",
                b"J\xff\xff\xff\xff",
                b"h\x00",
                b"j\xff\xff\xff\xff",
            ),
            *(
                b"q\x00",
                b"r\xff\xff\xff\xff",
                b"B\xff\xff\xff\x7f",
                b"X\xff\xff\xff\xff",
                b"\x80\x05",
                b"\x95" + b"\xff" * 8,
                b"T\x00\x00\x00\x00",
                b"(" * 300,
                b"](e" * 100,
            ),
        )
    )
    at = random.choice((0, 2, random.randrange(min(len(content), 200) + 1), len(content) - min(len(content), random.randrange(1, 120))))
    return content[:at] + code + content[at + random.choice((0, 0, 1, len(code))) :]


def pickled(folder: Path) -> Prepared:
    """A batch of CIFAR's python version, which is a pickle."""
    parse = cifar.PUBLISHED["cifar10"].forms[0].parse

    def read(content: bytes) -> None:
        pixels, labels = parse(content, "'data_batch_1'")
        assert pixels.dtype == np.uint8
        assert pixels.shape == (len(labels), *cifar.SHAPE)

    return Prepared([_batch(protocol) for protocol in (2, 3, 4)], read, (_instructions,) * 3)


def binary(folder: Path) -> Prepared:
    """CIFAR-100's binary version, as a data set."""
    file = folder / "cifar-100-binary" / "test.bin"
    file.parent.mkdir()

    def read(content: bytes) -> None:
        file.write_bytes(content)
        found = data.load("cifar100", data_dir=folder)
        assert found.labels.max() < 100

    pixels = _images(2)
    return Prepared((b"".join(bytes((1, label)) + row.tobytes() for label, row in zip((7, 99), pixels, strict=True)),), read)


def _tar(content: bytes, random: Random) -> bytes:
    """Another field in a header of a tar archive, whose checksum fits again."""
    if len(content) < 512:
        return content
    at = 512 * random.choice((0, 1, random.randrange(len(content) // 512)))
    header = bytearray(content[at : at + 512])
    place, size = random.choice(((0, 100), (100, 8), (124, 12), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
    value = random.choice(
        (
            *(
                b"../../x",
                b"/etc/passwd",
                b"./cifar-10-batches-py/test_batch",
                b"00000000000",
                b"77777777777",
                b"-1",
                b"+0001",
                b"0_7",
                b"9",
                b"x",
                b"L",
                b"g",
                b"1",
                b"2",
            ),
            *(b"\x80" + b"\xff" * 11, b"\x80" + bytes(10) + b"\x10", b"", b"\xff" * 12),
        )
    )
    header[place : place + size] = value[:size].ljust(size, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + 512 :]


def packed(folder: Path) -> Prepared:
    """CIFAR-10's archive (.tar.gz), as a data set."""
    file = folder / "cifar-10-python.tar.gz"

    def archive(names: tuple[str, ...], kind: int) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
            for name in names:
                entry = tarfile.TarInfo(name)
                entry.size = len(batch)
                tar.addfile(entry, io.BytesIO(batch))
        return gzip.compress(stream.getvalue(), 1)

    def read(content: bytes) -> None:
        file.write_bytes(content)
        assert len(data.load("cifar10", data_dir=folder)) == 2

    batch = _batch(2)
    test = "cifar-10-batches-py/test_batch"
    seeds = (archive((test,), tarfile.USTAR_FORMAT), archive(("cifar-10-batches-py/readme", test), tarfile.GNU_FORMAT))
    return Prepared(seeds, read, (*(_repacked(_tar),) * 3, _repacked(_instructions), *(_repacked(each) for each in mutate.BYTES), _bomb))


# ---- pictures


def _chunks(content: bytes, random: Random) -> bytes:
    """A PNG with a chunk changed, doubled or taken out, whose checksum fits again; other bytes stay."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    chunks, at = [], 8
    while at + 12 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    if not chunks:
        return content
    number = random.randrange(len(chunks))
    name, body = chunks[number]
    kind = random.randrange(5)
    if kind == 0:
        chunks[number] = (name, random.choice(mutate.BYTES)(body, random))
    elif kind == 1:
        chunks.insert(number, random.choice(chunks))
    elif kind == 2:
        del chunks[number]
    elif kind == 3:
        text = zlib.compress(bytes(random.choice((1, 2**16, 2**23))))
        chunks.insert(
            1,
            random.choice(
                (
                    (b"zTXt", b"a\0\0" + text),
                    (b"iCCP", b"a\0\0" + text),
                    (b"IDAT", text),
                    (b"tRNS", b"\0" * 600),
                    (b"eXIf", b"MM\0*" + b"\xff" * 40),
                )
            ),
        )
    else:
        chunks[number] = (random.choice((b"IHDR", b"PLTE", b"IDAT", b"IEND", b"acTL", b"fdAT", b"tRNS", b"iCCP")), body)
    return content[:8] + b"".join(struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)


def _segments(content: bytes, random: Random) -> bytes:
    """A JPEG with another size, a segment put in, or its last scan again and again; other bytes stay."""
    if not content.startswith(b"\xff\xd8"):
        return content
    kind = random.randrange(3)
    frame = next((at for at in range(2, len(content) - 9) if content[at] == 0xFF and content[at + 1] in (0xC0, 0xC1, 0xC2)), None)
    if kind == 0 and frame is not None:
        sizes = struct.pack(">HH", *(random.choice((0, 1, 2, 16, 1000, 8000, 65_535)) for _ in range(2)))
        return content[: frame + 5] + sizes + content[frame + 9 :]
    if kind == 1:
        body = random.choice(
            (
                b"Exif\0\0MM\0*" + random.randbytes(40),
                b"MPF\0II*\0" + random.randbytes(60),
                b"ICC_PROFILE\0\1\1" + random.randbytes(30),
                b"Adobe\0d\0\0\0\0\2",
                b"8BIM" * 9,
            )
        )
        return content[:2] + b"\xff" + bytes([random.randrange(0xE0, 0xF0)]) + struct.pack(">H", len(body) + 2) + body + content[2:]
    last = content.rfind(b"\xff\xda")
    return content[:-2] + content[last:-2] * random.choice((1, 50, 500)) + content[-2:] if 0 < last < len(content) - 2 else content


def pictures(folder: Path) -> Prepared:
    """A picture of ImageNet, cropped at its centre and at random. What Pillow says of pictures that it mends (UserWarning) is fine."""
    from PIL import Image

    file = folder / "val" / "n00000001" / "a.JPEG"
    file.parent.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    colours = Image.fromarray(pixels)
    seeds = []
    kept: tuple[tuple[str, str, dict[str, Any]], ...] = (
        *(("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "L", {}), ("JPEG", "CMYK", {"quality": 30})),
        *(("PNG", "RGB", {}), ("PNG", "P", {"transparency": 0}), ("PNG", "RGBA", {}), ("PNG", "I;16", {}), ("PNG", "1", {})),
    )
    for kind, mode, options in kept:
        stream = io.BytesIO()
        (Image.fromarray(pixels[..., 0].astype(np.uint16) << 8) if mode == "I;16" else colours.convert(mode)).save(stream, kind, **options)
        seeds.append(stream.getvalue())
    file.write_bytes(seeds[0])
    found = data.load("imagenet", data_dir=folder, image_size=8)
    drawn = found.augmented(3)

    def read(content: bytes) -> None:
        file.write_bytes(content)
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        for images in (found.images, drawn.images):
            picture = images[0]
            assert picture.shape == (3, 8, 8)
            assert 0 <= picture.min() <= picture.max() <= 1

    return Prepared(seeds, read, (_chunks, _segments))


def _target(name: str, prepare: Callable[[Path], Prepared], share: int, memory: int) -> Target:
    return Target(name, prepare, share=share, memory=memory * MIB)


TARGETS = (
    _target("idx", idx_files, 2, 64),
    _target("idx-packed", idx_packed, 2, 64),
    _target("nmnist", events, 2, 64),
    _target("cifar10-dvs", recordings, 2, 64),
    _target("cifar-pickle", pickled, 4, 128),
    _target("cifar-binary", binary, 1, 64),
    _target("cifar-archive", packed, 3, 640),
    _target("picture", pictures, 3, 768),
)
