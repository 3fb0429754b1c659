"""Linear parts of connections, prepared for many time steps: weights detached, factors folded in, both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Union

import torch
from torch import Tensor
from torch.nn import functional

Shape = tuple[int, ...]
Pair = tuple[int, int]
"""(height, width)."""

SPARSE_ONE_IN = 32
"""On a CPU, spikes sparser than one in this many are added row by row: measured 4 times faster than a dense product at 0.3 % spikes."""


class Map(Protocol):
    """W of one connection; currents and spikes are (samples, *target shape) and (samples, *source shape)."""

    def add(self, total: Tensor, spikes: Tensor) -> None:
        """total += W spikes, in place."""

    def add_transposed(self, total: Tensor, spikes: Tensor) -> None:
        """total += W^T spikes, in place; the shapes change places."""

    def scaled(self, factor: float) -> Map:
        """factor * W."""


@dataclass(frozen=True)
class DenseMap:
    """W of a fully connected connection, and its transpose laid out for speed."""

    weight: Tensor
    transposed: Tensor

    def add(self, total: Tensor, spikes: Tensor) -> None:
        _add_product(total, spikes, self.transposed)

    def add_transposed(self, total: Tensor, spikes: Tensor) -> None:
        _add_product(total, spikes, self.weight)

    def scaled(self, factor: Union[float, Tensor]) -> WeightedMap:
        """Also by one factor for each channel (or value) of the target."""
        weight = self.weight * (factor.reshape(-1, 1) if isinstance(factor, Tensor) else factor)
        return DenseMap(weight, weight.t().contiguous())


def _add_product(total: Tensor, spikes: Tensor, matrix: Tensor) -> None:
    """total += spikes @ matrix, flattened to one row a sample; few spikes on a CPU are added one row of the matrix at a time."""
    flat, rows = total.flatten(1), spikes.flatten(1)
    if rows.device.type != "cpu" or int(torch.count_nonzero(rows)) * SPARSE_ONE_IN >= rows.numel():
        flat.addmm_(rows, matrix)
        return
    sample, neuron = rows.nonzero().unbind(1)
    flat.index_add_(0, sample, matrix[neuron] * rows[sample, neuron].unsqueeze(1))


@dataclass(frozen=True)
class ConvMap:
    """A convolution, weight (target channels, source channels / groups, *kernel)."""

    weight: Tensor
    stride: Pair
    padding: Pair
    dilation: Pair = (1, 1)
    groups: int = 1

    def add(self, total: Tensor, spikes: Tensor) -> None:
        total += functional.conv2d(spikes, self.weight, None, self.stride, self.padding, self.dilation, self.groups)

    def add_transposed(self, total: Tensor, spikes: Tensor) -> None:
        total += _transposed(self, spikes, total.shape[2:])

    def scaled(self, factor: Union[float, Tensor]) -> WeightedMap:
        """Also by one factor for each channel (or value) of the target."""
        return replace(self, weight=self.weight * (factor.reshape(-1, 1, 1, 1) if isinstance(factor, Tensor) else factor))


@dataclass(frozen=True)
class ConvTransposeMap:
    """A transposed convolution, weight (source channels, target channels / groups, *kernel)."""

    weight: Tensor
    stride: Pair
    padding: Pair
    dilation: Pair = (1, 1)
    groups: int = 1

    def add(self, total: Tensor, spikes: Tensor) -> None:
        total += _transposed(self, spikes, total.shape[2:])

    def add_transposed(self, total: Tensor, spikes: Tensor) -> None:
        made = functional.conv2d(spikes, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        total += made[..., : total.shape[2], : total.shape[3]]

    def scaled(self, factor: Union[float, Tensor]) -> WeightedMap:
        """Also by one factor for each channel (or value) of the target."""
        if isinstance(factor, Tensor):  # the target's channels of one group lie along the second axis, the groups along the first
            factor = factor.reshape(self.groups, -1, 1, 1).repeat_interleave(len(self.weight) // self.groups, 0)
        return replace(self, weight=self.weight * factor)


def _transposed(step: Union[ConvMap, ConvTransposeMap], spikes: Tensor, size: torch.Size) -> Tensor:
    """The transposed convolution that makes images of `size`."""
    covered = [step.dilation[i] * (step.weight.shape[2 + i] - 1) + 1 for i in (0, 1)]
    missing = [size[i] - ((spikes.shape[2 + i] - 1) * step.stride[i] - 2 * step.padding[i] + covered[i]) for i in (0, 1)]
    ends = (missing[0], missing[1])
    return functional.conv_transpose2d(spikes, step.weight, None, step.stride, step.padding, ends, step.groups, step.dilation)


@dataclass(frozen=True)
class PoolMap:
    """Means over kernel x kernel squares, times `factor`; what does not fill a square is left out."""

    kernel: int
    factor: float = 1.0

    def add(self, total: Tensor, spikes: Tensor) -> None:
        total.add_(functional.avg_pool2d(spikes, self.kernel), alpha=self.factor)

    def add_transposed(self, total: Tensor, spikes: Tensor) -> None:
        spread = _repeat(spikes, self.kernel)
        total[..., : spread.shape[2], : spread.shape[3]].add_(spread, alpha=self.factor / self.kernel**2)

    def scaled(self, factor: float) -> Map:
        return PoolMap(self.kernel, self.factor * factor)


@dataclass(frozen=True)
class UpsampleMap:
    """Every value repeated repeat x repeat times, times `factor`."""

    repeat: int
    factor: float = 1.0

    def add(self, total: Tensor, spikes: Tensor) -> None:
        total.add_(_repeat(spikes, self.repeat), alpha=self.factor)

    def add_transposed(self, total: Tensor, spikes: Tensor) -> None:
        total.add_(functional.avg_pool2d(spikes, self.repeat), alpha=self.factor * self.repeat**2)

    def scaled(self, factor: float) -> Map:
        return UpsampleMap(self.repeat, self.factor * factor)


def _repeat(values: Tensor, times: int) -> Tensor:
    return values.repeat_interleave(times, 2).repeat_interleave(times, 3)


@dataclass(frozen=True)
class ScaleMap:
    """Values times one factor, or one a channel."""

    factor: Union[float, Tensor]

    def add(self, total: Tensor, spikes: Tensor) -> None:
        total += spikes * self._shaped(spikes)

    def add_transposed(self, total: Tensor, spikes: Tensor) -> None:
        self.add(total, spikes)

    def scaled(self, factor: Union[float, Tensor]) -> WeightedMap:
        """Also by one factor for each channel (or value) of the target."""
        return ScaleMap(self.factor * factor)

    def _shaped(self, spikes: Tensor) -> Union[float, Tensor]:
        return self.factor.reshape(-1, *[1] * (spikes.ndim - 2)) if isinstance(self.factor, Tensor) else self.factor


@dataclass(frozen=True)
class ChainMap:
    """Maps one after the other; `shapes[i]` is what map i makes of a sample."""

    maps: tuple[Map, ...]
    shapes: tuple[Shape, ...]

    def add(self, total: Tensor, spikes: Tensor) -> None:
        values = spikes
        for step, shape in zip(self.maps[:-1], self.shapes, strict=False):
            made = values.new_zeros(len(values), *shape)
            step.add(made, values)
            values = made
        self.maps[-1].add(total, values)

    def add_transposed(self, total: Tensor, spikes: Tensor) -> None:
        values = spikes
        for index in range(len(self.maps) - 1, 0, -1):
            made = values.new_zeros(len(values), *self.shapes[index - 1])
            self.maps[index].add_transposed(made, values)
            values = made
        self.maps[0].add_transposed(total, values)

    def scaled(self, factor: float) -> Map:
        return ChainMap((*self.maps[:-1], self.maps[-1].scaled(factor)), self.shapes)


WeightedMap = Union[DenseMap, ConvMap, ConvTransposeMap, ScaleMap]


def chain(maps: Sequence[Map], shapes: Sequence[Shape]) -> Map:
    """One map that does all; a scale after a map with weights is folded into its weights."""
    folded: list[Map] = []
    made: list[Shape] = []
    for step, shape in zip(maps, shapes, strict=True):
        last = folded[-1] if folded else None
        if isinstance(step, ScaleMap) and isinstance(last, (DenseMap, ConvMap, ConvTransposeMap, ScaleMap)):
            folded[-1] = last.scaled(step.factor)
            continue
        folded.append(step)
        made.append(shape)
    return folded[0] if len(folded) == 1 else ChainMap(tuple(folded), tuple(made))
