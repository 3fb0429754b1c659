"""Networks in the formats of other libraries: `export` writes what a format carries, and says and measures what it loses; `import_` reads files, ours and those of
others. docs/exchange.md has the formats."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from toolchain import checkpoint, codec, data
from toolchain.deploy import deploy, sample_shape
from toolchain.errors import UsageError, unknown
from toolchain.exchange import lava_dl, netx
from toolchain.files import ready_folder, replace_file
from toolchain.progress import track
from toolchain.seen import CHUNK
from toolchain.source import Model, Source, find
from toolchain.versions import installed, versions

FORMATS = ("netx", "nir", "onnx")
READ = ("nir", "onnx")
"""Formats that `import_` reads; a file's ending says which, where nobody does."""

OPTIONS = {"nir": ("reset", "dt"), "onnx": ("feedback", "normalize", "calibrate", "dataset", "samples", "data_dir")}
"""Options of `import_` that belong to one format."""

CALIBRATION = 64
"""Training samples that set thresholds, where they are to."""

SAMPLES = 200
"""Samples that say how good an approximation is, where nobody says how many: Lava's stock processes take one at a time."""


class Outcome(Protocol):
    """What `export` and `import_` return, each format its own."""

    def to_json(self) -> dict[str, Any]: ...

    def to_text(self) -> str: ...


@dataclass(frozen=True)
class Exported:
    """What `export` wrote as netx: what the file lost, and on `samples` samples its accuracy beside that of the exact graph (fractions of 1).

    `accuracy` is that of the file, read by lava-dl and run in Lava; `exact_accuracy` that of the integer graph of `deploy --target sim` with its defaults; `agreement` how
    many answers are the same. `blocks` are the file's, with their types, shapes and thresholds.
    """

    model: str
    format: str
    output: str
    bytes: int
    approximation: str
    lost: tuple[str, ...]
    blocks: tuple[dict[str, Any], ...]
    time_steps: int
    input_levels: int
    input_message_bits: int
    calibration: str | None
    dataset: str
    samples: int
    correct: int
    accuracy: float
    exact_correct: int
    exact_accuracy: float
    agreement: float
    versions: dict[str, str]
    predictions: npt.NDArray[np.int64] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "predictions"}

    def to_text(self) -> str:
        rows = [f"{block['type']} {'x'.join(map(str, block['shape']))}" for block in self.blocks]
        here = f"{100 * self.accuracy:.2f} % ({self.correct:,}) of the file, read by lava-dl and run in Lava"
        exact = f"{100 * self.exact_accuracy:.2f} % ({self.exact_correct:,}) of the exact graph"
        how = f"input_message_bits={self.input_message_bits}, reset_interval={self.time_steps}, reset_offset={netx.RESET_OFFSET}"
        return "\n".join(
            [
                f"{self.model} as {self.format}, a {self.approximation}: {', '.join(rows)}, T {self.time_steps}",
                "lost:",
                *(f"- {sentence}" for sentence in self.lost),
                f"accuracy on the first {self.samples:,} samples of {self.dataset}: {here}; {exact}; the same answer on {100 * self.agreement:.2f} %",
                f"wrote {self.output} ({self.bytes:,} bytes); lava-dl reads it with {how}",
            ]
        )


def export(
    model: Model,
    *,
    format: str,
    output: str | os.PathLike[str],
    approximate: bool = False,
    dataset: str = "mnist-1k",
    samples: int = SAMPLES,
    calibrate: str | None = None,
    data_dir: str | Path | None = None,
) -> Outcome:
    """Write `model` to the file `output` in another library's format; what is measured, is on the first `samples` test samples of `dataset`.

    `nir`    the exact network: NIR's own nodes, and what they cannot say in metadata. With `approximate` a file for readers that know only NIR's nodes, which reset to
             zero: what it loses is listed, and measured
    `onnx`   the float network for inference, unrolled over its time steps
    `netx`   lava-dl's: neurons reset to zero, so its files are approximations: without `approximate` nothing is written, and the error says what would be lost.
             `calibrate` names a data set whose first training samples set thresholds, so that populations fire as often as in the exact graph; else a rule sets them

    DesignRuleError, with every reason, where the format cannot carry the network at all; UsageError for a bad option, or where a package is missing.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    path = Path(output)
    if path.name in ("", ".", "..") or path.is_dir():
        raise UsageError(f"'{path}' is no file name: give -o FILE.{'net' if format == 'netx' else format}")
    _require_other(model, path)
    if calibrate is not None and format != "netx":
        raise UsageError(f"--calibrate sets the thresholds of netx files, and {format} has the network's own: leave it out")
    measured: dict[str, Any] = {"approximate": approximate, "dataset": dataset, "samples": samples, "data_dir": data_dir}
    if format == "nir":
        from toolchain.exchange import nir

        return nir.export(model, find(model), path, **measured)
    if format == "onnx":
        from toolchain.exchange import onnx_export

        return onnx_export.export(model, path, **measured)
    return _export_netx(model, find(model), path, calibrate=calibrate, **measured)


def import_(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    output: str | os.PathLike[str] | None = None,
    time_steps: int | None = None,
    **options: Any,
) -> Outcome:
    """Read a network from `path`, a file of another library or one that `export` wrote; the verb `import`, which Python keeps for itself, hence the underscore.

    `format` is nir or onnx, by default what the file's ending says. `output` is what to write: a run folder, which compile, deploy and train take, or for a file made from an
    artefact FILE.fsnn; without it the file is only read and described. `time_steps` is how long the network runs, where the file does not say. `options` are those of one
    format: of nir `reset` and `dt` (`toolchain.exchange.nir.import_`), of onnx `feedback`, `normalize`, `calibrate`, `dataset`, `samples` and `data_dir`
    (`toolchain.exchange.onnx_import.import_`).
    """
    file = Path(path)
    named = file.suffix.removeprefix(".") if format is None else format
    if named not in READ:
        raise (
            UsageError(f"'{file}' does not end in .nir or .onnx: say what it is with --format nir or onnx")
            if format is None
            else unknown("format", named, READ)
        )
    if not file.is_file():
        raise UsageError(f"there is no file '{file}': check the path")
    target = None if output is None else Path(output)
    if target is not None and target.resolve() == file.resolve():
        raise UsageError(f"'{target}' is the file that is read: write the network to another place")
    strange = [f"--{name.replace('_', '-')}" for name in options if name not in OPTIONS[named]]
    if strange:
        raise UsageError(f"{' and '.join(strange)} would not be used for {named} files: leave {'it' if len(strange) == 1 else 'them'} out")
    if named == "nir":
        from toolchain.exchange import nir

        return nir.import_(file, target, time_steps=time_steps, **options)
    from toolchain.exchange import onnx_import

    return onnx_import.import_(file, target, time_steps=time_steps, **options)


def _export_netx(
    model: Model,
    source: Source,
    path: Path,
    *,
    approximate: bool,
    dataset: str,
    samples: int,
    calibrate: str | None,
    data_dir: str | Path | None,
) -> Exported:
    made = netx.chain(source)
    if not approximate:
        raise UsageError(
            f"netx cannot carry '{source.name}' exactly: add --approximate to write a {netx.HARD_RESET}, which loses\n- "
            + "\n- ".join(made.lost)
        )
    missing = lava_dl.missing()
    if missing is not None:
        raise UsageError(missing)
    time_steps, size = sample_shape(source, dataset)
    loaded = data.load(dataset, samples=samples, data_dir=data_dir, time_steps=time_steps, image_size=size)
    codec.check_inputs(made.graph, loaded.images[:1])
    if calibrate is not None:
        seen = data.load(calibrate, split="train", samples=CALIBRATION, data_dir=data_dir, time_steps=time_steps, image_size=size)
        made = netx.calibrated(made, np.asarray(seen.images[:]), seen.name)
    ready_folder(path.parent)
    written = netx.encoded(made)
    exact = deploy(model, target="sim", dataset=dataset, samples=samples, data_dir=data_dir)
    with tempfile.TemporaryDirectory() as folder:  # nothing is left behind where the run fails
        tried = Path(folder) / "network.net"
        tried.write_bytes(written)
        predicted = answers(tried, made, loaded.images)
    replace_file(path, written)
    correct = int((predicted == loaded.labels).sum())
    return Exported(
        model=source.name,
        format="netx",
        output=str(path),
        bytes=len(written),
        approximation=netx.HARD_RESET,
        lost=made.lost,
        blocks=tuple(_told(block) for block in made.blocks),
        time_steps=made.time_steps,
        input_levels=made.levels,
        input_message_bits=made.message_bits,
        calibration=calibrate,
        dataset=loaded.name,
        samples=samples,
        correct=correct,
        accuracy=correct / samples,
        exact_correct=exact.correct,
        exact_accuracy=exact.accuracy,
        agreement=float((predicted == exact.predictions).mean()),
        versions=versions() | {name: installed(name) or "not installed" for name in ("lava-dl", "h5py")},
        predictions=predicted,
    )


def _require_other(model: Model, path: Path) -> None:
    """The file is neither the model itself nor one of its run folder, in which a checkpoint lies beside its config.yaml."""
    if isinstance(model, (str, os.PathLike)):
        own, output = Path(model).resolve(), path.resolve()
        run = own.parent if own.name == checkpoint.NAME else own
        if own == output or (run.is_dir() and run in output.parents and output.exists()):
            raise UsageError(f"'{path}' belongs to the model itself: write the export to another file")


def answers(path: Path, made: netx.Chain, images: data.Images) -> npt.NDArray[np.int64]:
    """The class of each image, (samples,): the largest potential of the last block of the file at `path`, which lava-dl reads and Lava runs."""
    with lava_dl.Reading(path, time_steps=made.time_steps, message_bits=made.message_bits, events=made.events) as reading:
        parts = (made.frames(np.asarray(images[first : first + CHUNK])) for first in range(0, len(images), CHUNK))
        potentials = (row for part in parts for row in reading.samples(part))
        return np.array([row.argmax() for row in track(potentials, "netx in Lava", total=len(images))], np.int64)


def _told(block: netx.Block) -> dict[str, Any]:
    return {
        "population": block.population,
        "type": block.type,
        "shape": list(block.shape),
        "vThMant": block.threshold,
        "vDecay": block.decay,
    }
