"""A lesson: batches in the order that the seed gives, what is done with each, and the file from which a lesson that was interrupted goes on.

After every update a lesson holds all that the next one needs: the number of updates, the learned tensors as they are stored, and the lines so far. The order of
the samples, the learning rate and the random numbers follow from seed and update number, so a lesson that goes on gives the same weights, bit for bit.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from math import cos, isfinite, pi
from pathlib import Path
from typing import Any, Protocol, Union

import msgspec
import numpy as np
import numpy.typing as npt

from toolchain import codec, data, plasticity
from toolchain.errors import ArtifactError, ToolchainError, UsageError
from toolchain.files import replace_file, require_plain
from toolchain.ir import Array, Graph, frozen
from toolchain.network import CLIPPED_FROM
from toolchain.plasticity import Plastic
from toolchain.progress import track
from toolchain.target import Result

STATE = "last.safetensors"
"""The file of a run folder that a lesson goes on from."""

FORMAT = 1

LARGEST_HEADER = 2**27
"""Bytes: safetensors takes no longer one."""

EVERY = 10.0
"""Seconds between two writings of where an epoch is: so much is lost at most where the command is killed. Any other end loses nothing."""

EVALUATED = 512
"""Samples that are classified at a time."""


@dataclass(frozen=True)
class Rule:
    """What `--set learn.NAME=VALUE` sets.

    lr             learning rate of every connection: gradient descent without momentum
    schedule       "cosine": from lr down to 0 over the whole run, "constant": lr throughout
    readout_lr     that of the readout; None: the same
    scale_factor   what the loss is multiplied by in the feedback phase; None: the number of samples in a batch
    reach          largest weight in thresholds that 8-bit mantissas make room for, if the first weights are not larger
    start          where weights come from: "random" (drawn from the seed), "model" (those it has), None: random for a name of the catalogue
    """

    lr: float = 1.0
    schedule: str = "cosine"
    readout_lr: float | None = None
    scale_factor: float | None = None
    reach: float = 2.0
    start: str | None = None


class Epoch(msgspec.Struct, frozen=True):
    """A line of metrics.jsonl: epoch 0 is before the first update. Means over the epoch's batches; `test_accuracy` on the test samples after it."""

    epoch: int
    updates: int
    test_accuracy: float
    loss: float | None = None
    accuracy: float | None = None
    forward_rate: float | None = None
    feedback_rate: float | None = None
    clipped: float | None = None
    silent: float | None = None
    saturations: int = 0
    seconds: float = 0.0


def sentence(line: Epoch) -> str:
    if line.loss is None or line.accuracy is None:
        return f"before: {line.test_accuracy:.2%} of the test samples"
    loss = f"{line.loss:.4f}" if line.loss < 1e4 else f"{line.loss:.3g}"
    said = f"epoch {line.epoch}: loss {loss}, {line.accuracy:.2%} of its samples, {line.test_accuracy:.2%} of the test samples"
    if line.feedback_rate is not None and line.clipped is not None and line.silent is not None:
        said += f", firing rates {line.forward_rate:.3f} forward and {line.feedback_rate:.4f} feedback, {line.clipped:.2%} of couples clipped, {line.silent:.1%} silent"
    return f"{said}, {line.seconds:.1f} s"


SEEN = {"loss", "accuracy", "forward_rate", "feedback_rate", "clipped", "silent", "saturations"}
"""What is seen of every batch: means of it are a line of the curve."""


class Learner(AbstractContextManager["Learner"], Protocol):
    """A network on a target whose weights change there. `graph` holds the weights it has now."""

    graph: Graph

    def forward(self, images: Array) -> Result:
        """The forward phase of any number of samples."""

    def update(self, error: Array, message: Array, rates: Mapping[int, float], number: int) -> Result:
        """The feedback phase of the samples of the forward run before, at most a batch, driven by `error`, and then update `number` by the tensors' rates."""

    def set_bias(self, tensors: Mapping[str, Array]) -> None:
        """Change what the host keeps: a readout's bias."""


class Diverged(ToolchainError):
    """A loss that is no number: going on would change nothing."""


@dataclass(frozen=True)
class Done:
    """After an update: how many there have been, and the learned tensors as they are stored. Replaced whole, so no interruption finds half of it."""

    updates: int
    tensors: Mapping[str, Array]


class Begun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the file of an interrupted lesson says beside its tensors: what it was begun with, the updates done, the lines of whole epochs, and the
    batches and seconds of the epoch under way."""

    format: int
    terms: dict[str, Union[str, float, int, None]]
    updates: int
    curve: tuple[Epoch, ...]
    seen: tuple[dict[str, float], ...]
    seconds: float


class Lesson:
    """A run of learning, from its first update or from where it was interrupted. `keep` is called after every update."""

    def __init__(self, rule: Rule, plastics: Sequence[Plastic], graph: Graph, samples: int, epochs: int, batch: int, seed: int) -> None:
        self.rule, self.plastics, self.batch, self.seed = rule, plastics, batch, seed
        self.samples, self.last = samples, epochs
        self.each = -(-samples // batch)
        """Updates of an epoch"""
        self.planned = epochs * self.each
        """Updates of the whole run"""
        self.done = Done(0, {p.tensor: graph.tensors[p.tensor] for p in plastics})
        self.curve: list[Epoch] = []
        self._seen: list[dict[str, float]] = []
        self._began, self._spent = time.perf_counter(), 0.0

    @property
    def updates(self) -> int:
        return self.done.updates

    def sentence(self, train: data.Dataset, weights: str) -> str:
        """What has been done so far."""
        return f"{weights} weights: {self.updates:,} updates by {len(train):,} samples of {train.name}, seed {self.seed}"

    def scale_factor(self, samples: int) -> float:
        return float(samples) if self.rule.scale_factor is None else self.rule.scale_factor

    def run(
        self, learner: Learner, train: data.Dataset, test: data.Dataset, keep: Callable[[], None], told: Callable[[Epoch], None]
    ) -> None:
        """All that is left of the lesson; `told` hears of every epoch."""
        self._began = time.perf_counter()
        if not self.curve:
            self._add(Epoch(epoch=0, updates=0, test_accuracy=_accuracy(learner, test), seconds=self._seconds()), told)
        for epoch in range(len(self.curve), self.last + 1):
            order = order_of(self.samples, self.seed, epoch)
            starts = range(0, self.samples, self.batch)[self.updates - (epoch - 1) * self.each :]
            for first in track(starts, f"epoch {epoch}/{self.last}", len(starts)):
                rows = order[first : first + self.batch]
                self._batch(learner, train.images[rows], np.asarray(train.labels[rows], np.int64))
                keep()
            self._add(self._line(epoch, _accuracy(learner, test)), told)

    def _add(self, line: Epoch, told: Callable[[Epoch], None]) -> None:
        self.curve.append(line)
        self._seen, self._spent, self._began = [], 0.0, time.perf_counter()
        told(line)

    def _seconds(self) -> float:
        """Those of the epoch under way."""
        return self._spent + time.perf_counter() - self._began

    def _batch(self, learner: Learner, images: Array, labels: Array) -> None:
        """Both phases of a batch, and an update: every number that the update needs comes from the target."""
        graph, samples, updates = learner.graph, len(labels), self.updates
        forward = learner.forward(images)
        gain = self.scale_factor(samples)
        scores = codec.logits(graph, forward)
        error = codec.output_error(graph, forward, labels, gain)
        message = plasticity.error_message(graph, forward, labels)
        share = (
            samples / self.batch * decayed(self.rule.schedule, updates, self.planned)
        )  # what is left over from full batches moves the weights as little as it is
        rates = {p.number: plasticity.rate(p, share * self._lr(p), gain, samples) for p in self.plastics}
        back = learner.update(error, message, {p.number: rates[p.number] for p in self.plastics if not p.on_host}, updates)
        on_host = [p for p in self.plastics if p.on_host]
        learner.set_bias(
            {
                p.tensor: plasticity.changed(
                    p,
                    learner.graph.tensors[p.tensor],
                    plasticity.correlation(graph, p, message, message),
                    rates[p.number],
                    self.seed,
                    updates,
                )
                for p in on_host
            }
        )
        loss = codec.cross_entropy(scores, labels)
        if not isfinite(loss):
            raise Diverged(f"the loss is {loss} at update {updates + 1}: lower learn.lr (it is {self.rule.lr:g})")
        self._seen.append({"loss": loss, "accuracy": float((scores.argmax(axis=1) == labels).mean()), **_seen(graph, forward, back)})
        self.done = Done(updates + 1, {p.tensor: learner.graph.tensors[p.tensor] for p in self.plastics})

    def _lr(self, plastic: Plastic) -> float:
        return self.rule.lr if self.rule.readout_lr is None or not plastic.taught else self.rule.readout_lr

    def _line(self, epoch: int, accuracy: float) -> Epoch:
        mean = {name: float(np.mean([batch[name] for batch in self._seen])) for name in self._seen[0]}
        mean["saturations"] = sum(int(batch["saturations"]) for batch in self._seen)
        return Epoch(epoch=epoch, updates=self.updates, test_accuracy=accuracy, seconds=self._seconds(), **mean)  # type: ignore[arg-type]

    def write(self, path: Path, terms: Mapping[str, Any]) -> int:
        """Write where the lesson is, to go on from there; the number of updates that `path` then holds."""
        from safetensors.numpy import save

        done, curve = self.done, tuple(self.curve)
        under_way = done.updates - max(0, len(curve) - 1) * self.each
        begun = Begun(FORMAT, dict(terms), done.updates, curve, tuple(self._seen[:under_way]), self._seconds())
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in done.tensors.items()}
        replace_file(path, save(tensors, {"lesson": msgspec.json.encode(begun).decode()}))
        return done.updates

    def restore(self, begun: Begun, tensors: Mapping[str, Array], path: Path) -> None:
        """Take up the lesson that `path` holds, which was begun on the same terms; ArtifactError where its parts contradict each other."""
        whole = max(0, len(begun.curve) - 1)
        under_way = begun.updates - whole * self.each
        fits = (
            [line.epoch for line in begun.curve] == list(range(len(begun.curve)))
            and (bool(begun.curve) or begun.updates == 0)
            and 0 <= under_way <= self.each
            and len(begun.seen) == under_way
            and all(set(batch) == SEEN for batch in begun.seen)
            and whole + (under_way > 0) <= self.last
            and isfinite(begun.seconds)
        )
        if not fits:
            raise ArtifactError(f"'{path}' counts {begun.updates:,} updates in a way that no lesson does: {ANEW}")
        for plastic in self.plastics:
            _require_stored(plastic, self.done.tensors[plastic.tensor], tensors.get(plastic.tensor), path)
        if len(tensors) != len(self.plastics):
            raise ArtifactError(f"'{path}' holds tensors that this network does not learn: {ANEW}")
        self.done = Done(begun.updates, {name: frozen(values) for name, values in tensors.items()})
        self.curve, self._seen, self._spent = list(begun.curve), list(begun.seen), begun.seconds


class Kept:
    """What the run folder holds of a lesson, if there is one: `updates` of them at last."""

    def __init__(self, folder: Path | None, lesson: Lesson, terms: Mapping[str, Any]) -> None:
        self.folder, self.lesson = folder, lesson
        self.updates = 0
        self._terms = terms
        self._due = 0.0

    def restore(self) -> None:
        """Take the lesson up where the folder left it; UsageError where it was begun otherwise."""
        assert self.folder is not None
        path = self.folder / STATE
        begun, tensors = _begun_in(path, LARGEST_HEADER + sum(first.nbytes for first in self.lesson.done.tensors.values()))
        _require_same(begun.terms, self._terms, self.folder)
        self.lesson.restore(begun, tensors, path)
        self.updates = begun.updates

    def now(self) -> None:
        """Write where the lesson is; ToolchainError where the disk does not take it."""
        if self.folder is None:
            return
        began = time.monotonic()
        self.updates = self.lesson.write(self.folder / STATE, self._terms)
        self._due = time.monotonic() + max(EVERY, 20 * (time.monotonic() - began))  # a slow disk does not slow the lesson

    def when_due(self) -> None:
        """Write, where the last time is long ago."""
        if time.monotonic() >= self._due:
            self.now()

    def at_last(self) -> None:
        """Write what is done before the command ends, if that can be done."""
        with suppress(ToolchainError, MemoryError):
            if self.updates < self.lesson.updates:
                self.now()


ANEW = "restore the file, or learn again into another folder"


def _begun_in(path: Path, most: int) -> tuple[Begun, dict[str, Array]]:
    """What `Lesson.write` wrote; ArtifactError in one sentence where that is not what `path` holds, or more than `most` bytes."""
    from safetensors import SafetensorError, safe_open

    require_plain(path)
    try:
        size = path.stat().st_size
        if size > most:  # a file with holes takes no room on the disk, and all of it in memory
            raise ArtifactError(f"'{path}' has {size:,} bytes, and a lesson of this network at most {most:,}: {ANEW}")
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dictionary: it has no other way)
        begun = msgspec.json.decode(metadata["lesson"], type=Begun)
    except (SafetensorError, msgspec.MsgspecError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"'{path}' is no lesson that can go on ({error}): {ANEW}") from None
    if begun.format != FORMAT:
        raise ArtifactError(f"'{path}' has format {begun.format} and this version reads {FORMAT}: go on with the version that wrote it")
    return begun, tensors


def _require_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """UsageError, naming the first difference, where a run in `folder` was begun with something else."""
    for name, value in now.items():
        if before.get(name) != value:
            raise UsageError(
                f"the run in '{folder}' has {name} = {before.get(name)}, not {value}: go on with its own settings, or choose another folder"
            )


def _require_stored(plastic: Plastic, first: Array, values: Array | None, path: Path) -> None:
    if values is None or values.shape != first.shape or values.dtype != first.dtype:
        raise ArtifactError(f"'{path}' lacks tensor '{plastic.tensor}' of shape {first.shape} and type {first.dtype}: {ANEW}")
    low, high = plastic.bounds or (-np.finfo(np.float64).max, np.finfo(np.float64).max)
    if not bool(((values >= low) & (values <= high)).all()):
        raise ArtifactError(f"'{path}': tensor '{plastic.tensor}' holds numbers that no lesson gives: {ANEW}")


def digest(tensors: Mapping[str, Array]) -> str:
    """sha256 over every tensor with its name."""
    sum_ = hashlib.sha256()
    for name in sorted(tensors):
        values = np.ascontiguousarray(tensors[name])
        sum_.update(f"{name} {values.dtype.str} {values.shape} ".encode() + values.tobytes())
    return sum_.hexdigest()


def order_of(samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch, from 1, takes its samples."""
    return np.random.default_rng([seed, epoch]).permutation(samples)


def decayed(schedule: str, update: int, updates: int) -> float:
    """The share of the learning rate that update number `update`, from 0, of `updates` has."""
    return 1.0 if schedule == "constant" else (1 + cos(pi * update / updates)) / 2


def _seen(graph: Graph, forward: Result, back: Result) -> dict[str, float]:
    couples = [population.name for population in graph.of_kind("couple")]
    rates = {name: np.abs(codec.rates(graph, back, name)) for name in couples}
    return {
        "forward_rate": _mean([codec.rates(graph, forward, name) for name in couples]),
        "feedback_rate": _mean([back.activity[name] / back.time_steps for name in couples]),
        "clipped": _mean([rate >= CLIPPED_FROM for rate in rates.values()]),
        "silent": _mean([back.activity[name] == 0 for name in couples]),
        "saturations": sum(int(s.sum()) for result in (forward, back) for s in result.saturations.values()),
    }


def _mean(parts: Sequence[Array]) -> float:
    return float(np.concatenate([np.asarray(part, np.float64).ravel() for part in parts]).mean())


def _accuracy(learner: Learner, test: data.Dataset) -> float:
    correct = 0
    for first in range(0, len(test), EVALUATED):
        scores = codec.logits(learner.graph, learner.forward(np.asarray(test.images[first : first + EVALUATED])))
        correct += int((scores.argmax(axis=1) == test.labels[first : first + EVALUATED]).sum())
    return correct / len(test)
