"""`export --format onnx`: the float network for inference, written by `onnx_steps`, run in onnxruntime and compared with target torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain import codec, data
from toolchain.compiler import forward_only, lowered, uncompiled
from toolchain.deploy import Deployment, deploy, sample_shape
from toolchain.errors import UsageError
from toolchain.exchange import onnx_session, onnx_steps
from toolchain.files import ready_folder, replace_file
from toolchain.ir import Array, Graph
from toolchain.passes import Fold, Pipeline
from toolchain.source import Model, Source
from toolchain.versions import installed, versions

SAME_RATE = 1e-5
"""Firing rates closer than this are of the same spikes, added up in another order."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote as ONNX, and what onnxruntime made of it on `samples` samples beside target torch (accuracies are fractions of 1).

    `agreement` is the share of equal answers, `logit_difference` the largest |difference| of a class score. Of `rates_compared` firing rates, one a neuron and sample, `rates_different`
    differ by more than `SAME_RATE`: a sum that comes out at the threshold can fall on either side where it is added up in another order.
    """

    model: str
    format: str
    output: str
    bytes: int
    form: str
    nodes: int
    opset: int
    time_steps: int
    note: str
    outputs: tuple[str, ...]
    dataset: str
    samples: int
    correct: int
    accuracy: float
    torch_correct: int
    torch_accuracy: float
    agreement: float
    logit_difference: float
    rates_compared: int
    rates_different: int
    versions: dict[str, str]
    predictions: npt.NDArray[np.int64] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "predictions"}

    def to_text(self) -> str:
        here = f"{100 * self.accuracy:.2f} % ({self.correct:,}) of the file in onnxruntime"
        torch = f"{100 * self.torch_accuracy:.2f} % ({self.torch_correct:,}) of target torch"
        return "\n".join(
            [
                f"{self.model} as onnx, opset {self.opset}, T {self.time_steps} {'in a loop' if self.form == 'loop' else 'unrolled'}: {self.nodes:,} nodes",
                f"note: {self.note}",
                f"accuracy on the first {self.samples:,} samples of {self.dataset}: {here}; {torch}; the same answer on {100 * self.agreement:.2f} %",
                f"class scores differ by {self.logit_difference:.1e} at most, {self.rates_different:,} of {self.rates_compared:,} firing rates by more than {SAME_RATE:g}",
                f"wrote {self.output} ({self.bytes:,} bytes); outputs: {', '.join(self.outputs)}",
            ]
        )


def export(model: Model, path: Path, *, approximate: bool, dataset: str, samples: int, data_dir: str | Path | None) -> Exported:
    """Write the forward phase of `model` to the ONNX file `path`, run it on the first `samples` test samples of `dataset`, and compare it with target torch.

    UsageError for an artefact without its float tensors, for `approximate` (the file is exact for inference, and says that it is inference only), or where a package is missing.
    """
    if approximate:
        raise UsageError("an ONNX file computes the network's inference as it is, there is nothing to approximate: leave --approximate out")
    onnx_session.require()
    source, notes = uncompiled(model)
    graph = float_graph(source, notes)
    time_steps, size = sample_shape(source, dataset)
    loaded = data.load(dataset, samples=samples, data_dir=data_dir, time_steps=time_steps, image_size=size)
    codec.check_inputs(graph, np.asarray(loaded.images[:1]))
    ready_folder(path.parent)
    written = onnx_steps.encoded(graph)
    found = run(written, loaded.images)
    floats = deploy(source.artifact or source.module or model, target="torch", dataset=dataset, samples=samples, data_dir=data_dir)
    replace_file(path, written.content)
    predicted = np.asarray(found[onnx_steps.LOGITS].argmax(axis=1), np.int64)
    correct = int((predicted == loaded.labels).sum())
    compared, different = _rates(found, floats)
    return Exported(
        model=source.name,
        format="onnx",
        output=str(path),
        bytes=len(written.content),
        form=written.form,
        nodes=written.nodes,
        opset=written.opset,
        time_steps=graph.phase("forward").time_steps,
        note=onnx_steps.INFERENCE_ONLY,
        outputs=tuple(found),
        dataset=loaded.name,
        samples=len(predicted),
        correct=correct,
        accuracy=correct / len(predicted),
        torch_correct=floats.correct,
        torch_accuracy=floats.accuracy,
        agreement=float((predicted == floats.predictions).mean()),
        logit_difference=float(np.abs(found[onnx_steps.LOGITS] - floats.logits).max()),
        rates_compared=compared,
        rates_different=different,
        versions=versions() | {name: installed(name) or "not installed" for name in ("onnx", "onnxruntime")},
        predictions=predicted,
    )


def float_graph(source: Source, notes: tuple[str, ...] = ()) -> Graph:
    """The folded float graph of `source`, its forward phase in model steps; UsageError for an artefact without its float tensors."""
    if source.artifact is None:
        return forward_only(Pipeline((Fold(),))(lowered(source, notes=notes)))
    if source.artifact.float_graph is None:
        raise UsageError(
            f"'{source.name}' was compiled without its float tensors, which an ONNX file is made of: compile it again without --no-float"
        )
    return forward_only(source.artifact.float_graph)


def run(written: onnx_steps.Written, images: data.Images) -> dict[str, Array]:
    """Every output of the file, by name, for `images` in [0, 1] (samples, ...)."""
    graph = written.graph
    where = f"{graph.provenance.model} in onnxruntime"
    session = onnx_session.opened(written.content, where)
    batch = onnx_session.batch_for(sum(prod(population.shape) for population in graph.populations))
    names = [output.name for output in session.get_outputs()]
    return onnx_session.outputs(session, names, images, prepared=lambda rows: codec.check_inputs(graph, rows), batch=batch, where=where)


def _rates(found: dict[str, Array], floats: Deployment) -> tuple[int, int]:
    """How many firing rates were compared, and how many differ; of large networks deploy keeps those of the first samples."""
    compared = different = 0
    for name, rates in floats.rates.items():
        here = found[f"rate.{name}"][: len(rates)]
        compared += rates.size
        different += int((np.abs(here - rates) > SAME_RATE).sum())
    return compared, different
