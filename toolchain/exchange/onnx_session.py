"""ONNX files run by onnxruntime, on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from toolchain import data
from toolchain.errors import ToolchainError
from toolchain.exchange import packages
from toolchain.ir import Array
from toolchain.progress import track

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

AT_ONCE = 2**22
"""Neurons of all samples that run together."""

LARGEST_BATCH = 256

QUIET = 4
"""onnxruntime's severity above errors: what it says of a file that it does not take comes as an exception, and a person reads it once."""


def require() -> None:
    """UsageError where an ONNX file cannot be read, written or run here.

    Newer versions of onnxruntime tell their maker how they are used, from the moment they are loaded on; that is off here, unless the environment says otherwise.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    packages.require("onnx", "onnx", "onnxruntime")


def opened(content: bytes, where: str) -> InferenceSession:
    """The file `content`, ready to run; ToolchainError starts with `where`, in one sentence, if onnxruntime does not take it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class of their own in common
        raise ToolchainError(f"{where}: onnxruntime does not take the file ({' '.join(str(error).split())[:300]})") from None


def batch_for(neurons: int) -> int:
    """How many samples of a network of so many neurons run together."""
    return max(1, min(LARGEST_BATCH, AT_ONCE // max(1, neurons)))


def outputs(
    session: InferenceSession,
    names: Sequence[str],
    images: data.Images,
    *,
    prepared: Callable[[Array], Array],
    batch: int,
    where: str,
    exactly: bool = False,
) -> dict[str, Array]:
    """What the file makes of `images` (samples, ...), `batch` at a time and as `prepared` leaves them: by name of an output, (samples, ...).

    `exactly`: the file takes no other number of samples, so the last ones are filled up with zeros.
    """
    (taken,) = session.get_inputs()
    kind = np.float64 if taken.type == "tensor(double)" else np.float32
    parts: list[list[Array]] = []
    starts = range(0, len(images), batch)
    for first in track(starts, where, total=len(starts)):
        rows = prepared(np.asarray(images[first : first + batch])).astype(kind)
        short = batch - len(rows) if exactly else 0
        given = np.concatenate([rows, np.zeros((short, *rows.shape[1:]), kind)]) if short else rows
        try:
            made = session.run(list(names), {taken.name: given})
        except Exception as error:  # as above
            raise ToolchainError(f"{where}: onnxruntime cannot run the file ({' '.join(str(error).split())[:300]})") from None
        parts.append([np.asarray(values)[: len(rows)] for values in made])
    return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}
