"""Which torch device to use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.errors import UsageError, unknown

if TYPE_CHECKING:
    import torch


def pick(name: str) -> torch.device:
    """The torch device for auto, cpu or cuda; UsageError where CUDA is asked for and absent."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise unknown("device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' was asked for but torch finds no CUDA GPU here: use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> str:
    """cpu, or the name of the GPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
