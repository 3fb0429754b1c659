"""Hostile files of data sets: IDX, N-MNIST, AEDAT, CIFAR's pickles, records and archives."""

from __future__ import annotations

import struct
import zlib

from of_artefacts import RUN_ME, Made

IMAGE = 28 * 28


def idx(shape: tuple[int, ...], data: bytes, *, kind: int = 8) -> bytes:
    """An IDX file that claims this shape."""
    return bytes((0, 0, kind, len(shape))) + b"".join(struct.pack(">I", n) for n in shape) + data


def packed(content: bytes) -> bytes:
    """A gzip file without time or system, which Pythons write in different ways."""
    deflate = zlib.compressobj(9, wbits=-15)
    body = deflate.compress(content) + deflate.flush()
    return b"\x1f\x8b\x08" + bytes(6) + b"\xff" + body + struct.pack("<II", zlib.crc32(content), len(content))


def batch(data: bytes, shape: bytes, labels: bytes = b"K\x00", key: bytes = b"labels") -> bytes:
    """A CIFAR batch as Python 2 pickled it: a dictionary of an array of bytes, and a list."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01"
        + shape
        + b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    )
    held = b"T" + struct.pack("<I", len(data)) + data
    return b"\x80\x02}(U\x04data" + array + held + b"tbU" + bytes((len(key),)) + key + b"](" + labels + b"eu."


def member(name: str, data: bytes = b"", *, size: int | None = None, kind: bytes = b"0", link: str = "") -> bytes:
    """A member of a tar archive; `size` lies about how much of it there is."""
    length = len(data) if size is None else size
    fields = [name.encode().ljust(100, b"\0"), b"0000644\0", b"0000000\0" * 2, b"%011o\0" % length, b"%011o\0" % 0, b" " * 8, kind]
    header = b"".join(fields) + link.encode().ljust(100, b"\0") + b"ustar\x0000"
    header = header.ljust(512, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:] + data + bytes(-len(data) % 512)


def files() -> Made:
    """Every file of a data set."""
    damaged = packed(idx((1, 28, 28), bytes(IMAGE)))
    yield "idx-wrong-magic", "floats, not bytes", idx((1, 28, 28), bytes(4 * IMAGE), kind=0x0D)
    yield "idx-pickle", "a pickle that runs a command", RUN_ME
    yield "idx-empty", "no byte at all", b""
    yield "idx-cut-header", "a file that ends inside its header", idx((1, 28, 28), b"")[:9]
    yield "idx-claims-2-to-96", "2^32 - 1 images of 2^32 - 1 squared", idx((2**32 - 1,) * 3, bytes(IMAGE))
    yield "idx-claims-0", "no images", idx((0, 28, 28), b"")
    yield "idx-short", "ten images, of which one is there", idx((10, 28, 28), bytes(IMAGE))
    yield "idx-long", "one image, and bytes after it", idx((1, 28, 28), bytes(IMAGE + 1))
    yield "idx-other-size", "images of 27 x 28", idx((1, 27, 28), bytes(27 * 28))
    yield "idx-bomb.gz", "4 KiB that unfold to 4 MiB and claim one image", packed(idx((1, 28, 28), bytes(1 << 22)))
    yield (
        "idx-damaged.gz",
        "a gzip file with a wrong byte",
        damaged[:12] + b"\xff" + damaged[13:],
    )
    yield "idx-cut.gz", "a gzip file cut short", packed(idx((1, 28, 28), bytes(range(256)) * 4))[:60]
    yield "idx-no-gzip.gz", "a file that is not gzipped", idx((1, 28, 28), bytes(IMAGE))
    yield "labels-of-200", "a label beyond all classes", idx((1,), b"\xc8")
    yield "labels-two", "two labels for one image", idx((2,), bytes(2))
    yield "nmnist-empty.bin", "no byte at all", b""
    yield "nmnist-cut.bin", "an event without its last byte", bytes(9)
    yield "nmnist-outside.bin", "an event outside the picture", bytes((200, 100, 0, 0, 1))
    yield "aedat-other.aedat", "no line that says what it is", bytes(64)
    yield "aedat-version-3.aedat", "a later version of the format", b"#!AER-DAT3.1\r\n" + bytes(64)
    yield "aedat-endless.aedat", "a header without an end", b"#!AER-DAT2.0\r\n#" + b"." * 2_000
    yield "aedat-cut.aedat", "an event without its last byte", b"#!AER-DAT2.0\r\n" + bytes(15)
    yield "aedat-escapes.aedat", "a version that steers the terminal", b"#!AER-DAT\x1b[2J9\r\n" + bytes(16)
    yield from _batches()
    yield from _archives()


def _batches() -> Made:
    row = bytes(3072)
    one = b"K\x01M\x00\x0c\x86"
    yield "batch-runs.pickle", "a pickle that runs a command", RUN_ME
    yield (
        "batch-runs-4.pickle",
        "the same by protocol 4's instructions",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch canary\x85R.",
    )
    yield (
        "batch-reduces.pickle",
        "a class that is built by what it names",
        b"\x80\x02c__builtin__\neval\nU\x20__import__('os').system('touch')\x85R.",
    )
    yield "batch-persistent.pickle", "a reference to something outside", b"\x80\x02U\x01aQ."
    yield "batch-protocol-5.pickle", "a protocol that no published file has", b"\x80\x05}."
    yield "batch-claims-2-to-31.pickle", "2^31 bytes of which eight are there", b"\x80\x02}U\x04dataT\xff\xff\xff\x7f" + bytes(8)
    yield "batch-shape-lies.pickle", "an array of 10 x 3072 made of one row", batch(row, b"K\x0aM\x00\x0c\x86")
    yield "batch-grows.pickle", "a list that is put into itself, over and over", b"\x80\x02]q\x00" + b"(h\x00h\x00e" * 12 + b"."
    yield "batch-objects.pickle", "an array of Python objects", batch(row, one).replace(b"U\x02u1", b"U\x02O8")
    yield "batch-label-200.pickle", "a label beyond all classes", batch(row, one, b"K\xc8")
    yield "batch-label-text.pickle", "a label that is text", batch(row, one, b"U\x01a")
    yield "batch-goes-on.pickle", "a second pickle after the first", batch(row, one) + RUN_ME
    yield "batch-cut.pickle", "a batch without its end", batch(row, one)[:-9]
    yield "records-cut.bin", "a record without its last byte", bytes(3072)
    yield "records-label-200.bin", "a label beyond all classes", b"\xc8" + row


def _archives() -> Made:
    good = batch(bytes(3072), b"K\x01M\x00\x0c\x86")
    end = bytes(1024)
    yield (
        "outside.tar.gz",
        "members that would lie outside, and absolute ones",
        packed(member("../../canary", b"x") + member("/tmp/canary", b"x") + end),
    )
    link = member("cifar-10-batches-py/test_batch", kind=b"2", link="/etc/passwd")
    yield "symlink.tar.gz", "a member that is a link to a file of this machine", packed(link + end)
    yield "device.tar.gz", "a member that is a device", packed(member("cifar-10-batches-py/test_batch", kind=b"3") + end)
    yield "claims-8-gib.tar.gz", "a member that claims 8 GiB", packed(member("cifar-10-batches-py/test_batch", b"x", size=2**33 - 1) + end)
    yield (
        "negative.tar.gz",
        "a member of negative size",
        packed(member("cifar-10-batches-py/test_batch", b"x").replace(b"00000000001\0", b"-0000000001\0", 1) + end),
    )
    yield (
        "checksum.tar.gz",
        "a header whose sum is another",
        packed(member("cifar-10-batches-py/test_batch", b"x").replace(b"0000644", b"0000777", 1) + end),
    )
    yield "runs.tar.gz", "a member that is a pickle that runs a command", packed(member("cifar-10-batches-py/test_batch", RUN_ME) + end)
    yield "cut.tar.gz", "an archive cut inside a member", packed(member("cifar-10-batches-py/test_batch", good)[:900])
    yield "no-end.tar.gz", "an archive that ends without its end", packed(member("cifar-10-batches-py/readme", b"x"))
