"""What samples leave behind on a target, a piece of the data set at a time, and into which pieces it is cut."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import msgspec
import numpy as np
import numpy.typing as npt

from toolchain import codec, shards
from toolchain.ir import Array, Graph
from toolchain.shards import Message
from toolchain.target import Executable

CHUNK = 256
"""Most samples handed to a target at a time: a progress bar's step, and what may be lost."""

STEP = 1.0
"""Seconds that a piece may take: pieces of targets that are slower get fewer samples, down to one batch."""

RATE_VALUES = 2**26
"""Most rates that a record keeps, half a GiB: of large networks those of the first samples."""


class Sums(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is counted over samples; `seconds` of the target alone."""

    spikes: float
    operations: float | None
    saturations: int
    clipped_currents: int
    seconds: float


@dataclass(frozen=True)
class Seen:
    """What samples left behind on a target: logits (samples, classes), rates of couples (samples, *shape), and sums."""

    logits: npt.NDArray[np.float64]
    rates: dict[str, npt.NDArray[np.float64]]
    sums: Sums

    def message(self) -> Message:
        return Message(
            msgspec.to_builtins(self.sums), {"logits": self.logits} | {f"rates.{name}": rates for name, rates in self.rates.items()}
        )

    @classmethod
    def of(cls, message: Message) -> Seen:
        """msgspec.ValidationError or KeyError where the message is not what `message` made."""
        rates = {name.removeprefix("rates."): rates for name, rates in message.arrays.items() if name != "logits"}
        return cls(message.arrays["logits"], rates, msgspec.convert(message.facts, Sums))


class Watch:
    """Reads what a target makes of samples: of large networks no more is kept than fits in memory."""

    def __init__(self, run: Executable) -> None:
        self._run = run
        phase = run.graph.phase("forward")
        self._fan_outs = codec.weights_met(run.graph, phase) if phase.synapses else None

    def see(self, images: Array, first: int) -> Seen:
        """Run `images`, the samples of the data set from number `first`."""
        graph = self._run.graph
        began = time.perf_counter()
        result = self._run.run(images)
        seconds = time.perf_counter() - began
        names = [population.name for population in graph.of_kind("couple")]
        operations = None
        if self._fan_outs is not None:
            operations = float(codec.synaptic_operations(graph, result, inputs=images, fan_outs=self._fan_outs).sum())
        return Seen(
            codec.logits(graph, result),
            {name: codec.rates(graph, result, name)[: max(0, kept(graph) - first)] for name in names},
            Sums(
                sum(float(result.activity[name].sum()) for name in names),
                operations,
                sum(int(s.sum()) for s in result.saturations.values()),
                codec.clipped_currents(graph, images),
                seconds,
            ),
        )


def kept(graph: Graph) -> int:
    """Of how many samples the rates are kept."""
    return max(1, RATE_VALUES // sum(prod(population.shape) for population in graph.of_kind("couple")))


def fits(graph: Graph, part: slice, message: Message) -> bool:
    """Whether `message` is what `Watch` makes of the samples `part`, as far as its form says."""
    try:
        seen = Seen.of(message)
    except (msgspec.ValidationError, KeyError):
        return False
    count = part.stop - part.start
    rates = min(count, max(0, kept(graph) - part.start))
    wanted = {"logits": (count, *graph.of_kind("readout")[0].shape)} | {
        f"rates.{population.name}": (rates, *population.shape) for population in graph.of_kind("couple")
    }
    return (
        {name: array.shape for name, array in message.arrays.items()} == wanted
        and all(array.dtype == np.float64 for array in message.arrays.values())
        and (seen.sums.operations is None) == (not graph.phase("forward").synapses)
    )


def largest(graph: Graph, samples: int) -> int:
    """More bytes than the messages of all samples take together."""
    couples = sum(prod(population.shape) for population in graph.of_kind("couple"))
    values = samples * prod(graph.of_kind("readout")[0].shape) + min(samples, kept(graph)) * couples
    return 8 * values + samples * (4096 + 64 * len(graph.populations))


def joined(pieces: Sequence[Seen]) -> Seen:
    """The pieces of a data set, in order, as one."""
    operations = [piece.sums.operations for piece in pieces if piece.sums.operations is not None]
    return Seen(
        np.concatenate([piece.logits for piece in pieces]),
        {name: np.concatenate([piece.rates[name] for piece in pieces]) for name in pieces[0].rates},
        Sums(
            sum(piece.sums.spikes for piece in pieces),
            sum(operations) if operations else None,
            sum(piece.sums.saturations for piece in pieces),
            sum(piece.sums.clipped_currents for piece in pieces),
            sum(piece.sums.seconds for piece in pieces),
        ),
    )


def cut(parts: Iterable[slice], unit: int) -> Iterator[slice]:
    """`parts` in pieces of 1, 2, 4, ... units, as many as one process runs in `STEP` seconds, up to `CHUNK`.

    The time between two pieces is taken for the first one's.
    """
    size = unit
    for part in parts:
        first = part.start
        while first < part.stop:
            began = time.perf_counter()
            piece = slice(first, min(first + size, part.stop))
            yield piece
            seconds, first = time.perf_counter() - began, piece.stop
            if 2 * seconds < STEP and 2 * size <= CHUNK:
                size *= 2
            elif seconds > STEP and size > unit:
                size //= 2


def unit(neurons: int, *, batch: int | None, exact: bool, alone: bool) -> int:
    """The fewest samples of a piece in one process: a batch. Sums of floats are cut where they always are (see `shards.dealt`); `alone`: samples run one by one."""
    if not exact:
        return batch if batch is not None and CHUNK % batch == 0 else CHUNK
    return 1 if alone else min(CHUNK, shards.least(neurons, batch))
