"""Checkpoints: one safetensors file that holds weights and, as JSON in its metadata, the config that the module is built from again. No pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import msgspec

from toolchain import data, network
from toolchain.config import Config
from toolchain.errors import ArtifactError, UsageError
from toolchain.files import replace_file, require_short_numbers

if TYPE_CHECKING:
    from torch import Tensor

    from toolchain.layers import FeedbackSNN

FORMAT = 1
NAME = "checkpoint.safetensors"
"""The file of a run folder that holds its best weights."""
CHEAP = 2**20
"""Weights of a network that is built first, so that the error can name the tensor that its file lacks."""


class About(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a checkpoint says of itself: the config, the epoch it is from (from 1), and its accuracy on the held-out training images."""

    format: int
    config: Config
    epoch: int
    held_out_accuracy: Union[float, None]
    progress: dict[str, float] = {}


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and what the file says of itself."""

    tensors: dict[str, Tensor]
    about: About


def write(path: Path, tensors: Mapping[str, Tensor], about: About) -> None:
    """Write atomically: a temporary file beside `path`, then a rename. The same content gives the same bytes."""
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace_file(path, save(whole, {"toolchain": msgspec.json.encode(about).decode()}))


def read(path: Path) -> Checkpoint:
    """Everything in a checkpoint; ArtifactError in one sentence where it is missing, damaged, or from something else."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UsageError(f"there is no checkpoint '{path}': train one with `toolchain train MODEL -o RUN`")
    try:
        with safe_open(str(path), framework="pt") as stored:
            metadata: dict[str, str] = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no dictionary: it has no other way)
    # a type of number that this torch does not know is an AttributeError or a RuntimeError of safetensors
    except (SafetensorError, OSError, ValueError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"'{path}' is damaged or no safetensors file ({error}): restore it, or train again") from None
    return Checkpoint(tensors, _about(path, metadata))


def _about(path: Path, metadata: Mapping[str, str]) -> About:
    if "toolchain" not in metadata:
        raise ArtifactError(f"'{path}' does not say what network its weights belong to: give a checkpoint that `toolchain train` wrote")
    try:
        found = msgspec.json.decode(metadata["toolchain"], type=dict[str, Any])
        require_short_numbers(found, path)
        if found.get("format") != FORMAT:
            raise ArtifactError(
                f"'{path}' has checkpoint format {found.get('format')} but this version reads {FORMAT}: use the version that wrote it"
            )
        return msgspec.convert(found, About, strict=True)
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:
        raise ArtifactError(
            f"'{path}' describes its network in a way this version does not read ({error}): use the version that wrote it"
        ) from None


def load(path: str | os.PathLike[str]) -> FeedbackSNN:
    """The trained network of a run folder or a .safetensors file, on the CPU and in evaluation mode; ArtifactError where the file is not whole."""
    place = Path(path)
    file = place / NAME if place.is_dir() else place
    return module(read(file), file)


def module(checkpoint: Checkpoint, path: Path) -> FeedbackSNN:
    """The module of a checkpoint read from `path`, with its weights; whether its data are events, the set it was trained on says."""
    from toolchain.layers import build

    config = checkpoint.about.config
    network.check(config.network)
    held, needed = sum(tensor.numel() for tensor in checkpoint.tensors.values()), network.counts(config.network).parameters
    if needed > max(held, CHEAP):  # before memory is asked for that the file does not account for
        raise ArtifactError(f"'{path}' holds {held:,} numbers but its network has {needed:,} weights: give its own checkpoint")
    model = build(config.network)
    load_weights(model, checkpoint.tensors, path)
    if config.train.dataset in data.names():
        model.events = config.train.dataset in data.EVENTS
    return model.eval()


def load_weights(model: FeedbackSNN, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put `tensors` into `model`; ArtifactError, naming the tensor, where one is missing, superfluous, of another shape, or not finite."""
    import torch

    wanted = model.state_dict()
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise ArtifactError(f"'{path}' {_difference(missing, extra)} for network '{model.name}': give its own checkpoint")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ArtifactError(
                f"'{path}': tensor '{name}' has shape {tuple(tensor.shape)} but '{model.name}' needs {tuple(wanted[name].shape)}: give its own checkpoint"
            )
        floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        if tensor.dtype not in (floats if wanted[name].is_floating_point() else (wanted[name].dtype,)):
            raise ArtifactError(f"'{path}': tensor '{name}' has type {tensor.dtype}: give a checkpoint with {wanted[name].dtype} there")
        if not bool(tensor.to(wanted[name].dtype).isfinite().all()):
            raise ArtifactError(
                f"'{path}': tensor '{name}' holds NaN or infinite values: restore the file, or train again with a lower train.lr"
            )
    model.load_state_dict(dict(tensors))


def _difference(missing: list[str], extra: list[str]) -> str:
    parts = [f"lacks {', '.join(missing)}"] if missing else []
    return " and ".join([*parts, f"holds the unknown {', '.join(extra)}"] if extra else parts)
