"""Time steps that cost what their spikes cost: a stage of couples laid out for the native kernel (`toolchain.native`), on a CPU.

A `Stage` is layers in the order of processing and currents between them, forward or transposed; the equilibria of `layers.model` and of SPIDE are
two of them. Within a stage neurons are in order (row, column, channel), so that a spike adds whole runs of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Union

import torch
from torch import Tensor

from toolchain import native
from toolchain.errors import ToolchainError, UsageError, unknown
from toolchain.layers.maps import ConvMap, ConvTransposeMap, DenseMap, Map, PoolMap, ScaleMap, Shape, UpsampleMap
from toolchain.native import steps
from toolchain.native.arrays import Array

Kernel = Literal["auto", "native", "torch"]
"""What runs time steps: the native kernel wherever it can and else torch, the native kernel or an error, torch."""

KERNELS = ("auto", "native", "torch")
Axis = list[tuple[int, int, int]]
"""For each source row (or column): the first target row, the first kernel slot, and how many of both follow."""


@dataclass(frozen=True)
class Neurons:
    """A layer of a stage: spikes at `threshold` that subtract `reset`; `drive` (samples or 1, *shape) is added at every step."""

    shape: Shape
    threshold: float
    reset: float
    drive: Tensor | None


@dataclass(frozen=True)
class Current:
    """What the spikes of layer `source` add to layer `target` (places in the stage's order): factor * (W (amplitude * spikes)).

    `transposed` takes W^T, `late` the spikes of the step before; amplitude (samples, *source shape), factor (samples, *target shape), None for 1.
    """

    source: int
    target: int
    map: Map
    transposed: bool = False
    late: bool = False
    amplitude: Tensor | None = None
    factor: Tensor | None = None


@dataclass(frozen=True)
class Link:
    """A map as the kernel takes it: weight (channels, slots, slots, made), or (channels,) for a diagonal one, and where each source row and column leads."""

    weight: Tensor
    rows: Tensor
    columns: Tensor
    made_width: int


def chosen(kernel: str, maps: Sequence[Map], like: Tensor) -> bool:
    """Whether the native kernel runs these maps on tensors like `like`; UsageError where it was asked for and cannot."""
    if kernel not in KERNELS:
        raise unknown("kernel", kernel, KERNELS)
    if kernel == "torch":
        return False
    obstacle = _obstacle(maps, like)
    if obstacle is None or kernel == "auto":
        return obstacle is None
    raise UsageError(f"{obstacle}, or leave kernel at 'auto'")


def _obstacle(maps: Sequence[Map], like: Tensor) -> str | None:
    """Why the native kernel cannot run these maps here, and the way out; None where it can."""
    cannot = "the native kernel cannot run this network: "
    if like.device.type != "cpu":
        return f"{cannot}it runs on the CPU and the network is on {like.device.type}: move it"
    if like.dtype not in (torch.float32, torch.float64):
        return f"{cannot}it has {like.dtype}, not float32 or float64: convert it"
    for step in maps:
        if type(step) not in LINKS:
            return f"{cannot}it has no {type(step).__name__}: make each part a layer of its own"
        if isinstance(step, (ConvMap, ConvTransposeMap)) and not _square(step):
            return f"{cannot}it has no convolution with groups, dilation, or another kernel, stride or padding for height than for width: use torch"
    return native.missing()


def _square(step: Union[ConvMap, ConvTransposeMap]) -> bool:
    """Whether a convolution is one that `_conv` lays out: the same along both axes, all channels in one group, nothing between the kernel's values."""
    alike = all(down == across for down, across in (step.weight.shape[2:], step.stride, step.padding))
    return alike and step.groups == 1 and step.dilation == (1, 1)


class Stage:
    """Layers and currents with their state, all zeros at first, for `samples` samples. Raises ToolchainError where the parts contradict each other."""

    def __init__(
        self, layers: Sequence[Neurons], currents: Sequence[Current], samples: int, *, leak: float, signed: bool, dtype: torch.dtype
    ) -> None:
        self.shapes, self.samples, self.dtype = [layer.shape for layer in layers], samples, dtype
        for shape in self.shapes:
            if len(shape) not in (1, 3):
                raise ToolchainError(f"a layer of shape {shape} is none of the native kernel's: (neurons,) or (channels, rows, columns)")
        sizes = [prod(shape) for shape in self.shapes]
        self.potentials = [torch.zeros(samples, size, dtype=dtype) for size in sizes]
        self.sums = [torch.zeros(samples, size, dtype=dtype) for size in sizes]
        self.counts = [torch.zeros(samples, size, dtype=torch.int32) for size in sizes]
        self.spikes = [torch.zeros(samples, size, dtype=torch.int8) for size in sizes]
        states = [self._state(place, layer) for place, layer in enumerate(layers)]
        self._steps = steps.Steps(states, [self._way(current) for current in currents], leak=leak, signed=signed)

    def drive(self, place: int, drive: Tensor) -> None:
        """Give the layer at `place` another current for the steps to come, (samples or 1, *shape)."""
        self._steps.drive(place, self._drive(place, drive))

    def run(self, time_steps: int, instructions: int | None = None) -> None:
        """Go on for `time_steps` steps; samples are shared out among torch's threads, of which none starts for fewer samples."""
        native.in_pieces(self.samples, torch.get_num_threads(), lambda first, last: self._steps.run(first, last, time_steps, instructions))

    def unpacked(self, values: Tensor, place: int) -> Tensor:
        """State of the layer at `place` as (samples, *shape)."""
        shape = self.shapes[place]
        if len(shape) != 3:
            return values.reshape(-1, *shape)
        return values.reshape(-1, shape[1], shape[2], shape[0]).permute(0, 3, 1, 2).contiguous()

    def _packed(self, values: Tensor, place: int, samples: int) -> Array:
        shape = self.shapes[place]
        if tuple(values.shape) != (samples, *shape) or values.device.type != "cpu":
            raise ToolchainError(f"values of shape {tuple(values.shape)} on {values.device.type} meet a layer of shape {shape} on the CPU")
        ordered = values.to(self.dtype).permute(0, 2, 3, 1) if len(shape) == 3 else values.to(self.dtype)
        return _array(ordered.reshape(samples, prod(shape)))

    def _drive(self, place: int, drive: Tensor) -> Array:
        if len(drive) not in (1, self.samples):
            raise ToolchainError(f"a drive for {len(drive)} samples meets a stage of {self.samples}: give one for each")
        return self._packed(drive, place, len(drive))

    def _state(self, place: int, layer: Neurons) -> steps.State:
        return steps.State(
            threshold=layer.threshold,
            reset=layer.reset,
            potential=self.potentials[place].numpy(),
            sum=self.sums[place].numpy(),
            count=self.counts[place].numpy(),
            spikes=self.spikes[place].numpy(),
            drive=None if layer.drive is None else self._drive(place, layer.drive),
        )

    def _way(self, current: Current) -> steps.Way:
        source, target = current.source, current.target
        link = linked(current.map, self.shapes[source], self.shapes[target], current.transposed)
        return steps.Way(
            source,
            target,
            rows=_array(link.rows),
            columns=_array(link.columns),
            weight=_array(link.weight.to(self.dtype)),
            made_width=link.made_width,
            late=current.late,
            amplitude=None if current.amplitude is None else self._packed(current.amplitude, source, self.samples),
            factor=None if current.factor is None else self._packed(current.factor, target, self.samples),
        )


def _array(values: Tensor) -> Array:
    found: Array = values.contiguous().numpy()
    return found


def linked(step: Map, source: Shape, target: Shape, transposed: bool) -> Link:
    """The link that does `step.add` (or `add_transposed`) from a layer of shape `source` to one of shape `target`."""
    return LINKS[type(step)](step, source, target, transposed)


def _dense(step: DenseMap, source: Shape, target: Shape, transposed: bool) -> Link:
    weight = (step.weight if transposed else step.transposed)[_order(source)][:, _order(target)]
    once = _axis([(0, 0, 1)])
    return Link(weight.reshape(len(weight), 1, 1, -1), once, once, 1)


def _order(shape: Shape) -> Tensor:
    """The neurons of a layer in the order (row, column, channel)."""
    order = torch.arange(prod(shape)).reshape(shape)
    return (order.permute(1, 2, 0) if len(shape) == 3 else order).flatten()


def _conv(step: Union[ConvMap, ConvTransposeMap], source: Shape, target: Shape, transposed: bool) -> Link:
    """Towards the smaller image (a convolution, or the transpose of a transposed one), or towards the larger."""
    down = isinstance(step, ConvMap) != transposed
    kernel, stride, padding = step.weight.shape[2], step.stride[0], step.padding[0]  # `_square`: the others are the same
    if down:
        slots = torch.tensor([slot for group in _groups(kernel, stride) for slot in group])
        weight = step.weight.permute(1, 2, 3, 0)[:, slots][:, :, slots]
    else:
        weight = step.weight.permute(0, 2, 3, 1)
    axis = _axis_down if down else _axis_up
    rows, columns = (_axis(axis(source[i], target[i], kernel, stride, padding)) for i in (1, 2))
    return Link(weight, rows, columns, target[2])


def _groups(kernel: int, stride: int) -> list[list[int]]:
    """Kernel slots by remainder, those that reach later targets last: what one source reaches then lies side by side."""
    return [list(range(remainder, kernel, stride))[::-1] for remainder in range(stride)]


def _axis_down(source: int, target: int, kernel: int, stride: int, padding: int) -> Axis:
    groups, found = _groups(kernel, stride), []
    for place in range(source):
        top, remainder = divmod(place + padding, stride)
        lowest = top - len(groups[remainder]) + 1
        first = max(0, lowest)
        begin = sum(len(group) for group in groups[:remainder])
        found.append((first, begin + first - lowest, max(0, min(target - 1, top) - first + 1)))
    return found


def _axis_up(source: int, target: int, kernel: int, stride: int, padding: int) -> Axis:
    found = []
    for place in range(source):
        lowest = place * stride - padding
        first = max(0, lowest)
        found.append((first, first - lowest, max(0, min(target, lowest + kernel) - first)))
    return found


def _pool(step: PoolMap, source: Shape, target: Shape, transposed: bool) -> Link:
    return _squares(step.kernel, step.factor / step.kernel**2, source, target, spread=transposed)


def _upsample(step: UpsampleMap, source: Shape, target: Shape, transposed: bool) -> Link:
    return _squares(step.repeat, step.factor, source, target, spread=not transposed)


def _squares(size: int, weight: float, source: Shape, target: Shape, *, spread: bool) -> Link:
    """Every value to the whole of its square, or every square to its value."""
    axes = []
    for i in (1, 2):
        if spread:
            axes.append(_axis([(place * size, 0, size) for place in range(source[i])]))
        else:
            axes.append(_axis([(place // size, 0, int(place // size < target[i])) for place in range(source[i])]))
    return _diagonal(torch.full((source[0],), weight, dtype=torch.float64), axes[0], axes[1], target)


def _scale(step: ScaleMap, source: Shape, target: Shape, _: bool) -> Link:
    rows, columns = (_axis([(place, 0, 1) for place in range(source[i] if len(source) == 3 else 1)]) for i in (1, -1))
    weight = step.factor.flatten() if isinstance(step.factor, Tensor) else torch.full((source[0],), step.factor, dtype=torch.float64)
    return _diagonal(weight, rows, columns, target)


def _diagonal(weight: Tensor, rows: Tensor, columns: Tensor, target: Shape) -> Link:
    return Link(weight, rows, columns, target[2] if len(target) == 3 else 1)


def _axis(axis: Axis) -> Tensor:
    return torch.tensor(axis, dtype=torch.int32)


LINKS: dict[type, Callable[[Any, Shape, Shape, bool], Link]] = {
    DenseMap: _dense,
    ConvMap: _conv,
    ConvTransposeMap: _conv,
    PoolMap: _pool,
    UpsampleMap: _upsample,
    ScaleMap: _scale,
}
"""How each kind of map is laid out; a chain of maps has no entry, and runs on torch."""
