"""The optimisers of a training run, and their state as tensors by parameter name, so that a checkpoint can hold it without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.config import Training
from toolchain.errors import ArtifactError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PARTS = {"momentum": "momentum_buffer", "mean": "exp_avg", "square": "exp_avg_sq", "steps": "step"}
"""What a checkpoint calls each part of a parameter's state, and what torch calls it: SGD has the first, Adam the others."""

SQUARE_DECAY = 0.999
"""Adam's second beta; the first is train.momentum."""


def make(settings: Training, module: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of `settings` over the parameters of `module`; weight decay is added to the gradient (L2) in both."""
    import torch

    parameters = list(module.parameters())
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=settings.lr, betas=(settings.momentum, SQUARE_DECAY), weight_decay=settings.weight_decay)
    return torch.optim.SGD(parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)


def tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The state by name, as `momentum.input.weight`; a parameter that has never been updated has none."""
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        state = optimizer.state.get(parameter, {})
        found |= {f"{part}.{name}": state[key] for part, key in PARTS.items() if state.get(key) is not None}
    return found


def restore(optimizer: torch.optim.Optimizer, module: nn.Module, stored: Mapping[str, Tensor], path: Path) -> None:
    """Take up the state that `tensors` named; ArtifactError, naming the tensor, where one does not fit its parameter."""
    for name, parameter in module.named_parameters():
        for part, key in PARTS.items():
            tensor = stored.get(f"{part}.{name}")
            if tensor is None:
                continue
            wanted = () if part == "steps" else tuple(parameter.shape)
            if tuple(tensor.shape) != wanted or not bool(tensor.isfinite().all()):
                raise ArtifactError(f"'{path}': tensor '{part}.{name}' does not fit its weight: train again into another folder")
            optimizer.state[parameter][key] = tensor if part == "steps" else tensor.to(parameter)
