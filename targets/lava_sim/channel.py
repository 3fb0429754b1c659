"""The channels between our Lava processes: Lava's ports with a few slots of shared memory, without threads, where silence is one number.

Lava's own channel keeps 64 slots, which a message of every tick takes out of the caches one after the other, copies a message when it is sent and
again when it is received, and has a thread at either end. Here a message is made and read where it lies, and one of zeros is never written.
"""

from __future__ import annotations

import mmap
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt
from lava.magma.compiler.builders.channel_builder import ChannelBuilderMp
from lava.magma.compiler.channels.interfaces import Channel
from lava.magma.compiler.channels.pypychannel import CspRecvPort, CspSendPort

from toolchain.ir import Array

SILENCE = 0
UNKNOWN = -1
TYPES: tuple[npt.DTypeLike, ...] = (np.bool_, np.int8, np.int16, np.int32, np.int64, np.float32, np.float64)
"""What a message may hold; its place here plus one is written before it."""

KINDS = {np.dtype(kind): place + 1 for place, kind in enumerate(TYPES)}
ALIGNED = 64


class LightBuilder(ChannelBuilderMp):  # type: ignore[misc]  # Lava carries no types
    """Lava's order for a channel, carried out with one of ours: room for what its source sends ahead and one message more.

    A process with `sends` has output ports that carry something in one phase only: by the port's name, the phase's index. Where such channels
    rest in other phases (`rests`), both ends leave them alone then.
    """

    rests: bool = False

    def build(self, infrastructure: Any, watchdogs: Any) -> LightChannel:
        port = self.src_port_initializer
        phase = getattr(self.src_process, "sends", {}).get(port.name) if self.rests else None
        ahead = getattr(self.src_process, "delay", 1)
        return LightChannel(port.name, self.dst_port_initializer.name, _Memory(port.shape, np.dtype(port.d_type), ahead + 1, phase))


class LightChannel(Channel):  # type: ignore[misc]  # Lava carries no types
    """One channel; messages may have any of TYPES that is not wider than its own type."""

    def __init__(self, source: str, target: str, memory: _Memory) -> None:
        self._src_port = SendPort(source, memory)
        self._dst_port = ReceivePort(target, memory)

    @property
    def src_port(self) -> SendPort:
        return self._src_port

    @property
    def dst_port(self) -> ReceivePort:
        return self._dst_port


class _Memory:
    """Shared by both ends, which are forked after it is made."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], size: int, phase: int | None) -> None:
        self.shape, self.dtype, self.size, self.phase = tuple(int(n) for n in shape), dtype, size, phase
        values = int(np.prod(self.shape, dtype=np.int64))
        slot = -(-max(values * dtype.itemsize, 1) // ALIGNED) * ALIGNED
        first = -(-16 * size // ALIGNED) * ALIGNED
        block = mmap.mmap(-1, first + slot * size)
        self.kinds = np.frombuffer(block, np.int64, size)
        self.counts = np.frombuffer(block, np.int64, size, 8 * size)
        self.views = [
            {
                kind: np.frombuffer(block, kind, values, first + i * slot).reshape(self.shape)
                for kind in KINDS
                if kind.itemsize <= dtype.itemsize
            }
            for i in range(size)
        ]
        context = get_context("fork")  # by name: the default one is Lava's to set
        self.free, self.ready = context.Semaphore(size), context.Semaphore(0)


class _Port:
    """What Lava asks of both ends."""

    def __init__(self, name: str, memory: _Memory) -> None:
        self._name = name
        self._memory = memory
        self._next = 0

    @property
    def name(self) -> str:
        return self._name

    @property
    def d_type(self) -> np.dtype[Any]:
        return self._memory.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._memory.shape

    @property
    def size(self) -> int:
        return self._memory.size

    def speaks(self, phase: int) -> bool:
        """Whether the channel is used in a phase."""
        return self._memory.phase in (None, phase)

    def start(self) -> None:
        """There is nothing to start."""

    def join(self) -> None:
        """There is nothing to wait for: processes of ours are killed."""


class SendPort(_Port, CspSendPort):  # type: ignore[misc]  # Lava carries no types
    """`send` as Lava's. Ours are `room` (where to make a message) or `silence`, as far ahead as there are slots, and `post`, in their order."""

    def room(self, kind: npt.DTypeLike, count: int | None = None) -> Array:
        """Where the next message is to be made, all of it; waits for the slot to be free. `count`: how many of its values are not zero, if known."""
        dtype = np.dtype(kind)
        slot = self._claim(KINDS[dtype])
        self._memory.counts[slot] = UNKNOWN if count is None else count
        return self._memory.views[slot][dtype]

    def silence(self) -> None:
        """The next message is nothing but zeros; waits for its slot to be free."""
        self._memory.counts[self._claim(SILENCE)] = 0

    def post(self) -> None:
        """Let the receiver have the oldest message that was made and not yet posted."""
        self._memory.ready.release()

    def send(self, data: Array) -> None:
        """Wait for a free slot, copy `data` there in the type of the port, and post it."""
        if data.shape != self.shape:
            raise ValueError(f"port '{self.name}' carries messages of shape {self.shape}, not {data.shape}")
        self.room(self.d_type)[...] = data
        self.post()

    def probe(self) -> bool:
        """Whether a message can be made without waiting."""
        return _count(self._memory.free)

    def _claim(self, kind: int) -> int:
        slot = self._next
        self._memory.free.acquire()
        self._memory.kinds[slot] = kind
        self._next = (slot + 1) % self._memory.size
        return slot


class ReceivePort(_Port, CspRecvPort):  # type: ignore[misc]  # Lava carries no types
    """`recv`, `peek` and `probe` as Lava's. Ours are `take` (the message where it lies) and then `done`."""

    def take(self) -> Array | None:
        """The next message, or None for silence; waits for it. It is valid, and its slot taken, until `done`."""
        memory = self._memory
        memory.ready.acquire()
        kind = int(memory.kinds[self._next])
        return None if kind == SILENCE else memory.views[self._next][np.dtype(TYPES[kind - 1])]

    def count(self) -> int | None:
        """How many values of the message taken are not zero, where its sender said so."""
        count = int(self._memory.counts[self._next])
        return None if count == UNKNOWN else count

    def done(self) -> None:
        """Give the slot of the message taken back to the sender."""
        self._next = (self._next + 1) % self._memory.size
        self._memory.free.release()

    def recv(self) -> Array:
        """Wait for the next message and return a copy."""
        message = self._copied()
        self.done()
        return message

    def peek(self) -> Array:
        """The next message, which stays; waits for it."""
        message = self._copied()
        self._memory.ready.release()
        return message

    def probe(self) -> bool:
        """Whether a message is there."""
        return _count(self._memory.ready)

    def _copied(self) -> Array:
        message = self.take()
        return np.zeros(self.shape, self.d_type) if message is None else message.astype(self.d_type)


def _count(semaphore: Any) -> bool:
    """Whether a semaphore can be taken at once."""
    if not semaphore.acquire(False):
        return False
    semaphore.release()
    return True
