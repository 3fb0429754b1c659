"""What a training run reports after each epoch, and the files that hold it: metrics.jsonl always, metrics.csv and TensorBoard's where they are asked for."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Union

import msgspec

from toolchain.errors import ArtifactError, UsageError
from toolchain.files import read_plain, replace_file, unwritten

LINES, TABLE, EVENTS = "metrics.jsonl", "metrics.csv", "tensorboard"
LARGEST = 2**28
"""Bytes of metrics.jsonl: 100,000 epochs of a network with 100 layers."""
LONGEST = 2**20
"""Bytes of a line: rates of some 20,000 layers."""


class Epoch(msgspec.Struct, frozen=True):
    """A line of metrics.jsonl: means over the epoch's batches (see `methods.Batch`), and the accuracy on the held-out images, if any, after it.

    `forward_rates` and `feedback_rates` hold a rate for each layer; `stopped` marks the epoch after which train.early_stop ended the run.
    """

    epoch: int
    loss: float
    accuracy: float
    held_out_accuracy: Union[float, None]
    forward_rate: float
    feedback_rate: float
    clipped: float
    silent: float
    scale_factor: float
    lr: float
    seconds: float
    forward_rates: tuple[float, ...] = ()
    feedback_rates: tuple[float, ...] = ()
    stopped: bool = False


def _line(line: bytes) -> Epoch:
    """An epoch; DecodeError where it is none."""
    if len(line) > LONGEST:  # a number of two bytes takes 32 in memory
        raise msgspec.DecodeError(f"a line of {len(line):,} bytes")
    return msgspec.json.decode(line, type=Epoch)


def best(lines: Sequence[Epoch]) -> Epoch:
    """The first epoch with the highest held-out accuracy; the last epoch where nothing is held out."""
    chosen = [line for line in lines if line.held_out_accuracy is not None]
    return max(chosen, key=lambda line: (line.held_out_accuracy, -line.epoch)) if chosen else lines[-1]


def read(path: Path, epochs: int) -> list[Epoch]:
    """The first `epochs` lines of metrics.jsonl; ArtifactError where they are not there."""
    try:
        lines = [_line(line) for line in io.BytesIO(read_plain(path, LARGEST))]
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise ArtifactError(f"'{path}' cannot be read ({error}): restore it, or train again into another folder") from None
    if len(lines) < epochs:
        raise ArtifactError(
            f"'{path}' has {len(lines)} epochs but the run has done {epochs}: restore it, or train again into another folder"
        )
    numbers = [line.epoch for line in lines[:epochs]]
    if numbers != list(range(1, epochs + 1)):
        wrong = next(i for i, number in enumerate(numbers, 1) if number != i)
        raise ArtifactError(f"'{path}' has epoch {numbers[wrong - 1]} in line {wrong}: restore it, or train again into another folder")
    return lines[:epochs]


def check(forms: Sequence[str]) -> None:
    """UsageError where a form asked for needs a package that is not installed."""
    if "tensorboard" in forms and find_spec("tensorboard") is None:
        raise UsageError("train.metrics asks for tensorboard, which is not installed: run `pip install tensorboard`, or choose csv")


def sentence(line: Epoch, epochs: int) -> str:
    """What the terminal says after an epoch."""
    accuracy = f"accuracy {line.accuracy:.2%}" if line.held_out_accuracy is None else f"held-out accuracy {line.held_out_accuracy:.2%}"
    said = f"epoch {line.epoch}/{epochs}: loss {line.loss:.4f}, {accuracy}, firing rates {line.forward_rate:.3f} forward"
    if line.feedback_rates:
        said += f" and {line.feedback_rate:.4f} feedback, {line.clipped:.2%} of couples clipped, {line.silent:.1%} silent"
    return f"{said}, {line.seconds:.0f} s"


class Writer:
    """Keeps the files of a run folder in step with its lines."""

    def __init__(self, folder: Path, forms: Sequence[str]) -> None:
        check(forms)
        self.folder, self.forms = folder, forms
        self.events: Any = None  # TensorBoard's writer, which torch leaves untyped

    def write(self, lines: Sequence[Epoch]) -> None:
        """All files after the epoch of the last line; ToolchainError where the disk does not take them."""
        replace_file(self.folder / LINES, b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        if "csv" in self.forms:
            replace_file(self.folder / TABLE, _table(lines).encode())
        if "tensorboard" in self.forms:
            self._add_events(lines)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()

    def _add_events(self, lines: Sequence[Epoch]) -> None:
        new = list(lines[-1:])
        try:
            if self.events is None:
                self.events, new = self._open_events(), list(lines)
            for line in new:
                for name, value in _columns(line).items():
                    if name not in ("epoch", "stopped") and value is not None:
                        self.events.add_scalar(name, value, line.epoch)
            self.events.flush()
        except OSError as error:
            raise unwritten(self.folder / EVENTS, error) from None

    def _open_events(self) -> Any:
        """A new event file that will hold the whole run: those of an interrupted one go, so that no epoch is shown twice."""
        for old in (self.folder / EVENTS).glob("events.out.tfevents.*"):
            old.unlink()
        return import_module("torch.utils.tensorboard").SummaryWriter(str(self.folder / EVENTS))


def _table(lines: Sequence[Epoch]) -> str:
    if not lines:
        return ""
    rows, stream = [_columns(line) for line in lines], io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)  # a file that is resumed may have more layers in one line than in another
    table = csv.DictWriter(stream, list(names), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return stream.getvalue()


def _columns(line: Epoch) -> dict[str, Any]:
    """A line without nesting: forward_rates become forward_rate/0, forward_rate/1 and so on."""
    plain: dict[str, Any] = msgspec.to_builtins(line)
    layers = {f"{name}/{layer}": rate for name in ("forward_rate", "feedback_rate") for layer, rate in enumerate(plain.pop(f"{name}s"))}
    return plain | layers
