"""Writing files so that nothing half-written ever has a name, and folders that one run at a time writes."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from toolchain.errors import ArtifactError, ToolchainError, UsageError

LOCK = ".lock"
"""The file of a folder that its run holds locked, with the run's process and machine in it."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What befalls a command on a good place: no space, a quota or a limit on a file's size reached, a failing disk."""


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, then rename: `path` holds either the old or the new content, never a part, and keeps it through a loss of power."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a killed process that had this one's number, or a link that somebody laid
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise unwritten(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _settle(path.parent)


def read_plain(path: Path, most: int) -> bytes:
    """The bytes of a file; ArtifactError where it has more than `most`, also while it grows, or is no plain file: a pipe waits for its writer, a device has no end."""
    require_plain(path)
    with path.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ArtifactError(f"'{path}' has more than {most:,} bytes: it is another kind of file, or still grows")
    return content


def require_short_numbers(found: object, path: Path) -> None:
    """ArtifactError where what `path` held as JSON has a whole number beyond 64 bits: nothing here counts so far, and messages could not show what is made of it."""
    waiting = [found]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)
        elif isinstance(one, int) and one.bit_length() > 64:
            raise ArtifactError(f"'{path}' has a whole number of {one.bit_length():,} bits: restore the file, or make it again")


def require_plain(path: Path) -> None:
    """ArtifactError where `path` is something else than a file: opening it could wait for ever."""
    try:
        kind = path.stat().st_mode
    except OSError:
        return  # what opens it says why it cannot
    if not stat.S_ISREG(kind):
        raise ArtifactError(f"'{path}' is a folder, pipe, socket or device: give a file")


def unwritten(path: Path, error: OSError) -> ToolchainError:
    """What to raise where `path` could not be written: exit code 1 where the disk took no more, 2 where the place is none to write to."""
    if error.errno in FULL:
        return ToolchainError(f"cannot write '{path}' ({error.strerror}): make room there, then give the command again")
    return ArtifactError(f"cannot write '{path}' ({error.strerror}): choose a writable place")


def ready_folder(path: Path) -> None:
    """Make the folder `path` now, before work whose result goes there; ToolchainError where it cannot be written."""
    probe = path / f".{os.getpid()}.part"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise unwritten(path, error) from None


@contextlib.contextmanager
def held(folder: Path, names: Iterable[str] = (), *, otherwise: str = "choose another folder") -> Iterator[None]:
    """Make the folder and keep every other run out of it until the block or the process ends; UsageError where another one is in it.

    The lock is the kernel's: that of a killed process holds nobody up. What such a process had half-written of the files `names` is removed.
    `otherwise` ends the sentence that refuses: what to do instead of waiting.
    """
    path = folder / LOCK
    descriptor = _locked(path, otherwise)
    try:
        with contextlib.suppress(OSError):  # where nothing can be removed, nothing can be written, which is said then
            for part in (part for name in names for part in folder.glob(f".{name}.*.part")):
                part.unlink()
        yield
    finally:
        # removed while still locked: a run that opened it meanwhile sees that its file is no longer the folder's
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _locked(path: Path, otherwise: str) -> int:
    """The open and locked file `path`, with this process's name in it."""
    import fcntl

    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise unwritten(path.parent, error) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_open(descriptor, path):
                with contextlib.suppress(OSError):  # on a full disk the lock holds as well without a name
                    os.truncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
                return descriptor
        except BlockingIOError:
            taken = True
        except OSError as error:
            os.close(descriptor)
            raise UsageError(f"'{path.parent}' cannot be locked ({error.strerror}): choose a folder on another file system") from None
        else:
            taken = False  # the run that held this file has just removed it: try again with the next
        who = _holder(descriptor)
        os.close(descriptor)
        if taken:  # raised here, where what the kernel said, "temporarily unavailable", is not behind it: nothing is short
            raise UsageError(f"another run is writing '{path.parent}'{who}: wait for its end, or {otherwise}")


def _holder(descriptor: int) -> str:
    """Who holds the lock, in brackets; nothing where the file does not say."""
    with contextlib.suppress(OSError):
        found = os.pread(descriptor, 300, 0).decode(errors="replace").strip()
        if re.fullmatch(r"process \d+ on [\w.-]+", found):
            return f" ({found})"
    return ""


def _is_open(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has the name `path` now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _settle(folder: Path) -> None:
    """Have the folder's names outlive a loss of power, where the file system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
