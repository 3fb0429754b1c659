"""Linear parts of pools whose squares overlap, are padded, or fit the image (`layers.maps` has the plain ones)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from toolchain.layers.maps import Map
from toolchain.network import windows


@dataclass(frozen=True)
class WindowMap:
    """Means over kernel x kernel squares, `stride` apart, zeros of the padding included, times `factor`."""

    kernel: int
    stride: int
    padding: int
    factor: float = 1.0

    def add(self, total: Tensor, spikes: Tensor) -> None:
        total.add_(functional.avg_pool2d(spikes, self.kernel, self.stride, self.padding), alpha=self.factor)

    def add_transposed(self, total: Tensor, spikes: Tensor) -> None:
        channels = spikes.shape[1]
        weight = spikes.new_full((channels, 1, self.kernel, self.kernel), self.factor / self.kernel**2)
        made = [(spikes.shape[axis] - 1) * self.stride - 2 * self.padding + self.kernel for axis in (2, 3)]
        missing = [total.shape[2 + i] - made[i] for i in (0, 1)]
        total += functional.conv_transpose2d(spikes, weight, None, self.stride, self.padding, (missing[0], missing[1]), channels)

    def scaled(self, factor: float) -> Map:
        return WindowMap(self.kernel, self.stride, self.padding, self.factor * factor)


@dataclass(frozen=True)
class AdaptivePoolMap:
    """Means that leave size x size values, times `factor`."""

    size: int
    factor: float = 1.0

    def add(self, total: Tensor, spikes: Tensor) -> None:
        total.add_(functional.adaptive_avg_pool2d(spikes, self.size), alpha=self.factor)

    def add_transposed(self, total: Tensor, spikes: Tensor) -> None:
        high, wide = (means(total.shape[axis], self.size, spikes) for axis in (2, 3))
        total.add_(high.t() @ spikes @ wide, alpha=self.factor)

    def scaled(self, factor: float) -> Map:
        return AdaptivePoolMap(self.size, self.factor * factor)


def means(size: int, wanted: int, like: Tensor) -> Tensor:
    """The matrix (wanted, size) of adaptive means along one axis, of the type of `like`."""
    matrix = torch.zeros(wanted, size, dtype=like.dtype, device=like.device)
    for row, (start, stop) in enumerate(windows(size, wanted)):
        matrix[row, start:stop] = 1 / (stop - start)
    return matrix
