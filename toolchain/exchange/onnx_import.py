"""`import --format onnx`: a plain ReLU network as a spiking one to start from, measured beside the file in onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from toolchain import checkpoint, data
from toolchain.checkpoint import About, Checkpoint
from toolchain.config import Config, Training
from toolchain.deploy import deploy
from toolchain.errors import UsageError
from toolchain.exchange import onnx_network, onnx_relu, onnx_session
from toolchain.exchange.nir import require_new, write_run
from toolchain.exchange.onnx_relu import Relu
from toolchain.ir import Array
from toolchain.network import Normalization
from toolchain.versions import installed, versions

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from toolchain.layers import FeedbackSNN

CALIBRATION = 256
"""Training samples that say how large activations are."""

MOST_AT_ONCE = 2**28
"""Most activations of all samples that a file runs together: 1 GiB."""

KEPT = 2**22
"""Most activations of a layer that are looked at, evenly picked."""


@dataclass(frozen=True)
class Measured:
    """Accuracies on the first `samples` test samples of `dataset` (fractions of 1): of the file in onnxruntime, and of the spiking network in floats and in sim's integers, with how often
    their answers are those of the file."""

    dataset: str
    samples: int
    relu_correct: int
    relu_accuracy: float
    torch_correct: int
    torch_accuracy: float
    torch_agreement: float
    sim_correct: int
    sim_accuracy: float
    sim_agreement: float

    def to_text(self) -> str:
        def share(accuracy: float, correct: int) -> str:
            return f"{100 * accuracy:.2f} % ({correct:,})"

        return (
            f"accuracy on the first {self.samples:,} samples of {self.dataset}: {share(self.relu_accuracy, self.relu_correct)} of the ReLU network in onnxruntime; "
            f"of the spiking one {share(self.torch_accuracy, self.torch_correct)} on torch, the same answer on {100 * self.torch_agreement:.2f} %, "
            f"and {share(self.sim_accuracy, self.sim_correct)} on sim, the same on {100 * self.sim_agreement:.2f} %"
        )


@dataclass(frozen=True)
class Imported:
    """The spiking network made of a ReLU network, and where it was written.

    `layers` say of each ReLU its node, its shape, and `largest`, the activation that a firing rate of 1 stands for. `changes` are what the network does otherwise than the file;
    `measured` says what that costs, where a data set was given.
    """

    path: str
    model: str
    output: str | None
    time_steps: int
    neurons: int
    parameters: int
    layers: tuple[dict[str, Any], ...]
    feedback: bool
    calibration: str | None
    calibration_samples: int
    changes: tuple[str, ...]
    measured: Measured | None
    versions: dict[str, str]
    module: FeedbackSNN = field(repr=False)
    format: str = "onnx"

    def to_json(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("module", "measured")}
        return found | {"measured": None if self.measured is None else vars(self.measured)}

    def to_text(self) -> str:
        rows = [f"{'x'.join(map(str, layer['shape']))} of '{layer['node']}', rate 1 for {layer['largest']:.4g}" for layer in self.layers]
        lines = [
            f"{self.path} holds a ReLU network, here the spiking network '{self.model}': {self.neurons:,} neurons, {self.parameters:,} parameters, T {self.time_steps}",
            "layers:",
            *(f"- {row}" for row in rows),
            "what changes:",
            *(f"- {sentence}" for sentence in self.changes),
        ]
        lines.append("nothing was measured: give --dataset" if self.measured is None else self.measured.to_text())
        lines.append(
            "nothing was written: give -o RUN" if self.output is None else f"wrote {self.output}: compile, deploy and train take it"
        )
        return "\n".join(lines)


def import_(
    path: Path,
    output: Path | None,
    *,
    time_steps: int | None = None,
    feedback: bool = False,
    normalize: str | None = None,
    calibrate: str | None = None,
    dataset: str | None = None,
    samples: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Imported:
    """Make a spiking network of the ReLU network in `path`, and write it to the run folder `output`.

    The first 256 training samples of `calibrate` say how large activations are; without it a bound that no image passes, at which neurons seldom fire. `normalize` is MEAN/STD, a number
    each or one a channel with commas, where images were normalised outside the file. `feedback` adds a connection from the last layer to the first, whose weights are 0. With `dataset` the file and
    the network are measured on its first `samples` test samples. UsageError names every node without a counterpart; ArtifactError says how the file is damaged.
    """
    onnx_session.require()
    if samples is not None and dataset is None:
        raise UsageError("--samples says how many samples of --dataset are measured: give both, or neither")
    if output is not None:
        require_new(output)
    ahead = None if normalize is None else _normalization(normalize)
    relu = onnx_relu.read(path)
    if ahead is not None and any(len(values) not in (1, relu.input_shape[0]) for values in (ahead.mean, ahead.std)):
        raise UsageError(
            f"--normalize {normalize} has another number of values than the {relu.input_shape[0]} channels of '{path}': give one, or one a channel"
        )
    file = _File(path, relu, ahead)
    seen = None if calibrate is None else file.load(calibrate, "train", None, data_dir)
    tested = None if dataset is None else file.load(dataset, "test", samples, data_dir)
    largest = onnx_network.bounds(relu, path, ahead) if seen is None else file.activations(seen)
    made = onnx_network.spiking(relu, largest, name=path.stem or "imported", time_steps=time_steps, feedback=feedback, normalize=ahead)
    training = Training() if seen is None else Training(dataset=seen.name, held_out=min(Training().held_out, len(seen) // 5))
    method = "ide" if made.network.skips else "spide"  # SPIDE knows no skips
    about = About(checkpoint.FORMAT, Config(network=made.network, train=training, model=made.network.name, method=method), 0, None)
    module = checkpoint.module(Checkpoint(made.tensors, about), path)
    measured = None if tested is None else file.measured(tested, module, data_dir)
    from toolchain.layers import counts

    counted = counts(module)
    if output is not None:  # last: a network that was refused leaves no folder
        write_run(output, about, made.tensors)
    return Imported(
        path=str(path),
        model=made.network.name,
        output=None if output is None else str(output),
        time_steps=made.network.time_steps,
        neurons=sum(counted.neurons),
        parameters=counted.parameters,
        layers=tuple(
            {"node": layer.node, "shape": list(layer.shape), "largest": largest}
            for layer, largest in zip(relu.layers, made.largest, strict=True)
        ),
        feedback=feedback,
        calibration=None if seen is None else seen.name,
        calibration_samples=0 if seen is None else min(len(seen), CALIBRATION),
        changes=_changes(relu, made, None if seen is None else f"{min(len(seen), CALIBRATION)} training samples of {seen.name}"),
        measured=measured,
        versions=versions() | {name: installed(name) or "not installed" for name in ("onnx", "onnxruntime")},
        module=module,
    )


def _normalization(text: str) -> Normalization:
    """MEAN/STD as numbers."""
    mean, slash, std = text.partition("/")
    try:
        found = Normalization(*(tuple(float(number) for number in part.split(",")) for part in (mean, std)))
    except ValueError:
        found = Normalization((), ())
    if not slash or not found.mean or not all(isfinite(n) for n in (*found.mean, *found.std)) or not all(n > 0 for n in found.std):
        raise UsageError(
            f"--normalize takes MEAN/STD, as 0.1307/0.3081 or 0.5,0.5,0.5/0.2,0.2,0.2 with standard deviations above 0, not '{text}'"
        )
    return found


def _changes(relu: Relu, made: onnx_network.Made, source: str | None) -> tuple[str, ...]:
    """What the spiking network does otherwise than the file, a sentence each."""
    said = (
        f"activations above a layer's rate 1 are cut there: {onnx_network.PERCENTILE:g} % of those on {source} lie below"
        if source is not None
        else "a layer's rate 1 stands for a bound that no image reaches, so neurons seldom fire: --calibrate with training data makes rates, and answers, finer"
    )
    changes = [
        "a ReLU is the firing rate of neurons that reset by subtraction; weights and biases are scaled so that a rate of 1 stands for the layer's largest activation",
        said,
        f"T {made.network.time_steps} rounds every rate to a multiple of 1/{made.network.time_steps}: more time steps, finer rates",
    ]
    if made.network.feedback:
        changes.append(
            "a feedback connection with weights of 0 leads from the last layer to the first: nothing changes until it is trained"
        )
    return (*changes, *(f"left out: {what}" for what in relu.left_out))


class _File:
    """The ONNX file in onnxruntime, with the outputs of its ReLUs."""

    def __init__(self, path: Path, relu: Relu, ahead: Normalization | None) -> None:
        self.path, self.relu = path, relu
        self._ahead = ahead
        self._session: InferenceSession | None = None

    def load(self, name: str, split: str, samples: int | None, data_dir: str | os.PathLike[str] | None) -> data.Dataset:
        """A data set whose samples the file takes; UsageError where it does not, or takes more together than fit into memory."""
        wide = (self.relu.samples or 0) * sum(prod(layer.shape) for layer in self.relu.layers)
        if wide > MOST_AT_ONCE:
            raise UsageError(
                f"'{self.path}' runs {self.relu.samples:,} samples together, which have {wide:,} activations: export it for fewer, or for any number (dynamic axes)"
            )
        loaded = data.load(name, split=split, samples=samples, data_dir=data_dir, image_size=data.size_for(name, self.relu.input_shape))
        if prod(loaded.images.shape[1:]) != prod(self.relu.input_shape):
            raise UsageError(
                f"samples of '{loaded.name}' have the shape {loaded.images.shape[1:]} and '{self.path}' takes {self.relu.input_shape}: choose another data set"
            )
        return loaded

    def activations(self, seen: data.Dataset) -> tuple[float, ...]:
        """The activation of each layer below which `PERCENTILE` percent lie."""
        names = [layer.output for layer in self.relu.layers]
        images = np.asarray(seen.images[:CALIBRATION])
        parts: dict[str, list[Array]] = {name: [] for name in names}
        per = max(1, self._batch)
        for first in range(0, len(images), per):
            made = self._outputs(names, images[first : first + per])
            for name, values in made.items():
                flat = values.reshape(-1)
                parts[name].append(flat[:: max(1, -(-flat.size * -(-len(images) // per) // KEPT))])
        found = []
        for layer in self.relu.layers:
            values = np.concatenate(parts[layer.output])
            if not np.isfinite(values).all():
                raise UsageError(
                    f"'{self.path}': the activations of ReLU '{layer.node}' are no finite numbers: correct the network's weights"
                )
            found.append(
                onnx_network.usable(float(np.percentile(values, onnx_network.PERCENTILE)) or float(values.max()), layer, self.path)
            )
        return tuple(found)

    def measured(self, tested: data.Dataset, module: FeedbackSNN, data_dir: str | os.PathLike[str] | None) -> Measured:
        """The file and the spiking network on the same samples."""
        wanted = self.answers(tested.images)
        correct = int((wanted == tested.labels).sum())
        runs = [
            deploy(module, target=target, dataset=tested.name, samples=len(tested), data_dir=None if data_dir is None else Path(data_dir))
            for target in ("torch", "sim")
        ]
        floats, integers = runs
        return Measured(
            dataset=tested.name,
            samples=len(tested),
            relu_correct=correct,
            relu_accuracy=correct / len(tested),
            torch_correct=floats.correct,
            torch_accuracy=floats.accuracy,
            torch_agreement=float((floats.predictions == wanted).mean()),
            sim_correct=integers.correct,
            sim_accuracy=integers.accuracy,
            sim_agreement=float((integers.predictions == wanted).mean()),
        )

    def answers(self, images: data.Images) -> npt.NDArray[np.int64]:
        """The class that the file gives each image, (samples,)."""
        scores = self._outputs([self.relu.output], images)[self.relu.output]
        return np.asarray(scores.reshape(len(scores), -1).argmax(axis=1), np.int64)

    @property
    def _batch(self) -> int:
        return self.relu.samples or onnx_session.batch_for(sum(prod(layer.shape) for layer in self.relu.layers))

    def _outputs(self, names: Sequence[str], images: data.Images) -> dict[str, Array]:
        session = self._opened()
        return onnx_session.outputs(
            session,
            names,
            images,
            prepared=self._prepared(session),
            batch=self._batch,
            where=f"{self.path.name} in onnxruntime",
            exactly=self.relu.samples is not None,
        )

    def _prepared(self, session: InferenceSession) -> Callable[[Array], Array]:
        """Images in [0, 1] as the file takes them."""
        shape = session.get_inputs()[0].shape[1:]
        axes = (1, -1, *[1] * (len(self.relu.input_shape) - 1))
        ahead = self._ahead

        def rows(images: Array) -> Array:
            values = images.reshape(len(images), *self.relu.input_shape)
            if ahead is not None:
                values = (values - np.asarray(ahead.mean).reshape(axes)) / np.asarray(ahead.std).reshape(axes)
            return values.reshape(len(images), *shape)

        return rows

    def _opened(self) -> InferenceSession:
        if self._session is None:
            from onnx import ModelProto, helper

            told = ModelProto()
            told.CopyFrom(self.relu.model)
            # nodes that the scores do not need were not looked at, and shapes are not the file's to say
            for part in (told.graph.node, told.graph.value_info, told.graph.sparse_initializer, told.graph.quantization_annotation):
                del part[:]
            told.graph.node.extend(self.relu.nodes)
            kind = told.graph.output[0].type.tensor_type.elem_type
            have = {output.name for output in told.graph.output}
            told.graph.output.extend(
                helper.make_tensor_value_info(layer.output, kind, None) for layer in self.relu.layers if layer.output not in have
            )
            self._session = onnx_session.opened(told.SerializeToString(), f"'{self.path}'")
        return self._session
