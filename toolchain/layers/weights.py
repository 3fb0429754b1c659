"""Modules of our own that connections are made of: limited and standardised weights, a fixed and a trained factor."""

from __future__ import annotations

from typing import Union, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolchain.errors import UsageError
from toolchain.network import Frobenius, Limit

Weighted = Union[nn.Linear, nn.Conv2d, nn.ConvTranspose2d]

INITIAL_ITERATIONS = 10
"""Power iterations at construction, as the authors of IDE do."""


class Limited(nn.Module):
    """A connection whose weight has a restricted norm, so that the feedback loop contracts (IDE 2.5 and SPIDE in the papers' code).

    Spectral:   W = clip(gain, -norm, norm) w / sigma(w), sigma = u^T w v of w as (first axis, rest); `gain` is trained and starts at sigma.
                While training, u and v follow w by one power iteration a batch (`advance`); in evaluation sigma is exact.
    Frobenius:  W = w min(|w|, norm) / |w|, |w| exact and a constant for the gradient. The authors use a random estimate of |w| that is drawn at every
                pass; set `measured` to a number to use that number instead (None again: exact).
    """

    gain: nn.Parameter
    u: Tensor
    v: Tensor

    def __init__(self, op: Weighted, limit: Limit) -> None:
        super().__init__()
        self.op, self.limit = op, limit
        self.measured: float | None = None
        if isinstance(limit, Frobenius):
            return
        rows, columns = self._matrix().shape
        self.register_buffer("u", functional.normalize(torch.randn(rows), dim=0))
        self.register_buffer("v", functional.normalize(torch.randn(columns), dim=0))
        self.advance(INITIAL_ITERATIONS)
        self.gain = nn.Parameter(self._sigma().detach().clone())

    def effective(self) -> Tensor:
        """The weight in use, with its gradient."""
        weight = self.op.weight
        if isinstance(self.limit, Frobenius):
            norm = float(weight.detach().norm()) if self.measured is None else self.measured
            return weight * (min(norm, self.limit.norm) / norm) if norm > 0 else weight
        sigma = self._sigma()
        # a weight of zeros has no direction to keep: it stays as it is
        return self.gain.clamp(-self.limit.norm, self.limit.norm) * weight / sigma if float(sigma.detach()) > 0 else weight

    @torch.no_grad()
    def advance(self, iterations: int = 1) -> None:
        """Let u and v follow the weight; called once at the start of each training batch."""
        if isinstance(self.limit, Frobenius):
            return
        matrix = self._matrix()
        for _ in range(iterations):
            self.v.copy_(functional.normalize(matrix.t() @ self.u, dim=0, eps=1e-12))
            self.u.copy_(functional.normalize(matrix @ self.v, dim=0, eps=1e-12))

    def forward(self, values: Tensor) -> Tensor:
        """The current that `values` (samples, *source shape) make."""
        return linear(self.op, self.effective(), values)

    def _matrix(self) -> Tensor:
        return self.op.weight.flatten(1)

    def _sigma(self) -> Tensor:
        matrix = self._matrix()
        if self.training:
            return self.u @ (matrix @ self.v)
        small = matrix @ matrix.t() if matrix.shape[0] <= matrix.shape[1] else matrix.t() @ matrix
        return cast(Tensor, torch.linalg.eigvalsh(small)[-1].clamp_min(0).sqrt())


class Standardized(nn.Module):
    """Scaled weight standardisation (Brock et al., ICLR 2021; OTTT): W = gain (w - mean) / sqrt(variance fan_in + eps) for each output.

    The variance is unbiased; `gain`, one for each output, is trained and starts at 1.
    """

    def __init__(self, op: Union[nn.Linear, nn.Conv2d], eps: float = 1e-4) -> None:
        super().__init__()
        self.op, self.eps = op, eps
        self.gain = nn.Parameter(torch.ones(op.weight.shape[0], *[1] * (op.weight.ndim - 1)))

    def effective(self) -> Tensor:
        """The weight in use, with its gradient."""
        weight = self.op.weight
        axes = tuple(range(1, weight.ndim))
        mean = weight.mean(axes, keepdim=True)
        variance = weight.var(axes, keepdim=True)
        return self.gain * (weight - mean) / (variance * weight[0].numel() + self.eps).sqrt()

    def forward(self, values: Tensor) -> Tensor:
        """The current that `values` (samples, *source shape) make."""
        return linear(self.op, self.effective(), values)


class Scale(nn.Module):
    """Values times a fixed factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = float(factor)

    def forward(self, values: Tensor) -> Tensor:
        return values * self.factor


class Gain(nn.Module):
    """Values times one trained number, at first `start`: skip-init's 0 makes a residual branch start silent (De and Smith, NeurIPS 2020)."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.start = float(start)
        self.gain = nn.Parameter(torch.tensor(self.start))

    def forward(self, values: Tensor) -> Tensor:
        return values * self.gain


def linear(op: Weighted, weight: Tensor, values: Tensor) -> Tensor:
    """What `op` makes of `values` with `weight` in place of its own."""
    if isinstance(op, nn.Linear):
        return functional.linear(values.flatten(1), weight, op.bias)
    if isinstance(op, nn.Conv2d):
        return functional.conv2d(values, weight, op.bias, op.stride, op.padding, op.dilation, op.groups)
    padding = cast(tuple[int, int], op.padding)
    return functional.conv_transpose2d(values, weight, op.bias, op.stride, padding, op.output_padding, op.groups, op.dilation)


def weighted(module: nn.Module, where: str) -> tuple[Weighted, Tensor]:
    """The operation of a module with weights, and the weight in use."""
    if isinstance(module, (Limited, Standardized)):
        return module.op, module.effective()
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        return module, module.weight
    raise UsageError(f"{where} is a {type(module).__name__}, which has no weight of its own")


def weighted_bias(module: nn.Module, where: str) -> Tensor:
    """The bias of a module with weights; UsageError where it has none."""
    bias = (module.op if isinstance(module, (Limited, Standardized)) else module).bias
    if isinstance(bias, Tensor):
        return bias
    raise UsageError(f"{where} is a {type(module).__name__} without a bias")
