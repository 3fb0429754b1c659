"""What a run asks of a data set, so that its saved answers are known again and no others are taken for them."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np

from toolchain import seen
from toolchain.data import Dataset
from toolchain.ir import Graph
from toolchain.partial import Question
from toolchain.source import Source
from toolchain.versions import processor


def asked(
    source: Source, graph: Graph, dataset: Dataset, *, target: str, synapses: str, batch: str, device: str, versions: dict[str, str]
) -> Question:
    """The forward phase of `graph` on every sample of `dataset`; of target torch that of the source's module, where it has one.

    What cannot change an answer is no part of the question: jobs, and of integers the batch and the processor.
    """

    def facts() -> dict[str, str | int]:
        summed = {} if graph.integer else {"batch": batch, "processor": processor()}
        return {
            "model": source.name,
            "target": target,
            "dataset": dataset.name,
            "samples": len(dataset),
            "device": device,
            "synapses": synapses,
            "network": digest(graph, source if target == "torch" else None),
            **{f"version of {name}": version for name, version in versions.items()},
            **summed,
        }

    return Question(
        model=source.name,
        target=target,
        dataset=dataset.name,
        samples=len(dataset),
        facts=facts,
        inputs=lambda part: np.asarray(dataset.images[part]),
        fits=lambda part, answer: seen.fits(graph, part, answer),
        largest=seen.largest(graph, len(dataset)),
    )


def digest(graph: Graph, source: Source | None) -> str:
    """A sum over everything in a graph, and over every weight and setting in the module of `source`."""
    sum_ = hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(graph, tensors={}), order="deterministic"))
    tensors = dict(graph.tensors)
    if source is not None and source.module is not None:
        parts = source.module.named_modules()
        plain = [(name, {key: value for key, value in vars(part).items() if not key.startswith("_")}) for name, part in parts]
        sum_.update(repr((source.module, plain)).encode())
        for name, tensor in (*source.module.named_parameters(), *source.module.named_buffers()):
            tensors[f"module.{name}"] = tensor.detach().cpu().numpy()
    for name in sorted(tensors):
        sum_.update(f"{name}:{tensors[name].dtype.str}:{tensors[name].shape}".encode())
        sum_.update(np.ascontiguousarray(tensors[name]).tobytes())
    return sum_.hexdigest()
