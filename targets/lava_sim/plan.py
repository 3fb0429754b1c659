"""What each Lava process does in each phase, and the memory through which the host and the processes talk.

The memory is anonymous and shared by fork: the host writes currents and a command before a run and reads what was recorded after it, so no
Var is read or written while a network runs (Lava moves those one element at a time), and nothing is left behind under /dev/shm.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from toolchain.ir import Array, Dynamics, Graph, Phase, Synapse
from toolchain.plasticity import Plastic

PHASES = ("forward", "feedback")


def shared(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Zeros in memory that processes forked later share with this one; pages cost nothing until they are written."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=kind, count=size // kind.itemsize).reshape(shape)


class Board:
    """The command the host gives and the ticks the populations report, one for a network."""

    def __init__(self, populations: int) -> None:
        self._command = shared((3,), np.int64)
        self.ticks = shared((populations,), np.int64)

    def order(self, phase: str, first: int) -> None:
        """Before a run: its phase, and the number of its first batch among those of the whole call."""
        self._command[:2] = PHASES.index(phase), first
        self._command[2] += 1

    def read(self) -> tuple[int, int, int]:
        """Phase (as an index of PHASES), first batch, and the number of the run."""
        phase, first, run = self._command.tolist()
        return phase, first, run


@dataclass(frozen=True)
class Record:
    """Shared memory for what a population did: slots (batches of a run) first, then the batch, then neurons."""

    counts: Array
    activity: npt.NDArray[np.int32]
    traces: npt.NDArray[np.float64]
    potentials: Array
    saturations: npt.NDArray[np.int32]
    spikes: Array | None
    """(slots, time_steps, batch, neurons), where the target traces"""
    history: Array | None

    @classmethod
    def of(cls, slots: int, batch: int, neurons: int, wide: npt.DTypeLike, steps: int, graded: bool) -> Record:
        """`steps` is 0 where nothing is traced; what a relay emits is `graded`."""
        shape = (slots, batch, neurons)
        every = (slots, steps, batch, neurons)
        return cls(
            shared(shape, wide if graded else np.int32),
            shared(shape, np.int32),
            shared(shape, np.float64),
            shared(shape, wide),
            shared(shape, np.int32),
            shared(every, wide if graded else np.int8) if steps else None,
            shared(every, wide) if steps else None,
        )


@dataclass(frozen=True)
class Role:
    """One population's part in one phase.

    bias     currents (1, neurons), each with the step it starts at
    drive    shared memory (slots, batch, neurons): an injected current, or what an input population emits, of `events` (slots, time_steps, batch, neurons)
    """

    phase: Phase
    name: str
    dynamics: Dynamics | None
    bias: tuple[tuple[int, Array], ...]
    drive: Array | None
    record: Record | None
    gated: bool
    events: bool

    def step_at(self, tick: int) -> int | None:
        return self.phase.step_at(self.name, tick)


class Lesson:
    """What the host says before a feedback phase that ends in an update: whether one does, its number, and each tensor's rate."""

    def __init__(self, plastics: int, seed: int) -> None:
        self.seed = seed
        self._command = shared((2,), np.int64)
        self._rates = shared((max(1, plastics),), np.float64)

    def give(self, update: int, rates: Mapping[int, float]) -> None:
        """`rates` by the tensors' numbers."""
        for number, rate in rates.items():
            self._rates[number] = rate
        self._command[:] = 1, update

    def end(self) -> None:
        """Feedback phases change nothing from now on."""
        self._command[0] = 0

    def on(self) -> bool:
        return bool(self._command[0])

    def read(self, number: int) -> tuple[int, float]:
        """The update's number, and the rate of a tensor."""
        return int(self._command[1]), float(self._rates[number])


@dataclass(frozen=True)
class Learned:
    """A tensor that its process changes and the host only reads: `values` is shared memory of the tensor's shape, int64 or float64."""

    plastic: Plastic
    lesson: Lesson
    values: Array


@dataclass(frozen=True)
class PlasticPart:
    """Everything a synapse process that learns needs: its line on the board and the phases' lengths in ticks, the forward synapse and its adjoint (None where
    nothing flows back), and what it learns (None: it stays as it is)."""

    board: Board
    line: int
    ticks: tuple[int, ...]
    graph: Graph
    forward: Synapse
    backward: Synapse | None
    learned: Learned | None
    batch: int


@dataclass(frozen=True)
class LearnedBias:
    """A bias that its population learns: the tensor, the current it injects, (1, neurons), which `Role.bias` holds as well, and its exponent."""

    learned: Learned
    current: Array
    exponent: int


@dataclass(frozen=True)
class Part:
    """Everything a population process needs: its place on the board, its number of neurons, and a role for each phase (None: it only listens).

    `ticks` is the length of each phase, which is the same for all processes of a network.
    """

    board: Board
    index: int
    shape: tuple[int, int]
    integer: bool
    ticks: tuple[int, ...]
    roles: tuple[Role | None, ...]
    latches: bool
    biases: tuple[LearnedBias, ...] = ()
    narrow: bool = False
    """Whether 32 bits hold all that the population adds up, with any input"""
    message: Array | None = None
    """Of a readout that is taught: shared memory (batch, neurons) for the output error"""
    lesson: Lesson | None = None
