"""Initial weights of the papers' networks that torch.nn.init does not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def unit_rows(weight: Tensor, axis: int = 0) -> None:
    """U(-1, 1), then norm 1 for each index of `axis`: the outputs of a Linear or Conv2d (0), of a ConvTranspose2d (1). What IDE's and SPIDE's code starts from."""
    weight.uniform_(-1, 1)
    axes = tuple(a for a in range(weight.ndim) if a != axis)
    weight.div_(torch.linalg.vector_norm(weight, dim=axes, keepdim=True))


@torch.no_grad()
def zero_bias(module: nn.Module) -> None:
    """Bias 0 in every convolution and linear map of `module`."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) and part.bias is not None:
            part.bias.zero_()
