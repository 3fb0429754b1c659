"""Every kind of connection: its plain description, its current with gradients, and its linear part for many time steps.

A new kind is one entry in `KINDS`, one in `BUILDERS`, one struct and one branch in `toolchain.network`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolchain import network as plain
from toolchain import processes
from toolchain.errors import UsageError
from toolchain.layers.maps import ConvMap, ConvTransposeMap, DenseMap, Map, PoolMap, ScaleMap, Shape, UpsampleMap, chain
from toolchain.layers.pools import AdaptivePoolMap, WindowMap
from toolchain.layers.weights import Gain, Limited, Scale, Standardized, linear, weighted, weighted_bias

EVENT_EPS = 1e-8
"""Added to the variance of an event input's mean current, in place of batch normalisation's own eps (IDE's authors)."""

Given = Mapping[nn.Module, tuple[Tensor, Tensor]]
Statistics = Union[Literal["running", "batch", "learn"], Given]
"""What batch normalisation uses: running statistics; the batch's; the batch's, which also update the running ones; or a given (mean, variance + eps)."""


NEAREST = {
    "Dropout": "leave it out and set the network's dropout, which training alone uses",
    "MaxPool": "use AvgPool2d, which spikes can do",
    "MaxUnpool": "use Upsample",
    "LPPool": "use AvgPool2d",
    "FractionalMaxPool": "use AvgPool2d",
    "AvgPool": "use AvgPool2d or AdaptiveAvgPool2d on (channels, height, width)",
    "Norm": "use BatchNorm1d or BatchNorm2d, whose running statistics are constants",
    "Flatten": "leave it out, a Linear flattens by itself",
    "Sequential": "put its parts into the outer Sequential",
    "ConvTranspose": "use ConvTranspose2d",
    "Conv": "use Conv2d",
    "Upsampl": "use Upsample(scale_factor=2, mode='nearest')",
    "PixelShuffle": "use Upsample(scale_factor=2, mode='nearest') or ConvTranspose2d",
    "Linear": "use Linear",
    "LU": "leave it out, a layer's neurons are its nonlinearity",
    "Tanh": "leave it out, a layer's neurons are its nonlinearity",
    "Sigmoid": "leave it out, a layer's neurons are its nonlinearity",
    "Softmax": "leave it out, the loss applies it to the logits",
}
"""The nearest supported thing, by a part of a module's name; the first that fits."""


@dataclass(frozen=True)
class Kind:
    """What the front end must know of one kind of connection."""

    describe: Callable[[Any, str], plain.Part]
    current: Callable[[Any, Tensor, Statistics], Tensor]
    prepare: Callable[[Any], Map]


def current(module: nn.Module, values: Tensor, where: str = "a connection", statistics: Statistics = "running") -> Tensor:
    """The post-synaptic current, bias included, that a connection makes of `values` (samples, *source shape)."""
    for part in parts(module):
        values = kind_of(part, where).current(part, values, statistics)
    return values


@torch.no_grad()
def constant(module: nn.Module, shape: Shape, where: str = "a connection") -> Tensor | None:
    """The current without any spikes from a source of `shape`, (1, *target shape) with running statistics, or None for nothing; no product with a weight."""
    made: Tensor | None = None
    for part in parts(module):
        described = kind_of(part, where).describe(part, where)
        source, shape = shape, plain.output_shape(described, shape, where)
        if made is not None:
            made = current(part, made, where)
        elif isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            made = current(part, part.weight.new_zeros(1, *source), where)
        elif plain.has_bias(described):
            made = weighted_bias(part, where).reshape(1, -1, *[1] * (len(shape) - 1)).expand(1, *shape)
    return made


def prepare(module: nn.Module, shape: Shape, where: str, factor: float = 1.0) -> Map:
    """The linear part of a connection whose source has `shape`, times `factor`, with running statistics."""
    with torch.no_grad():
        maps = [kind_of(part, where).prepare(part) for part in parts(module)]
    described = plain.parts_of(describe(module, where))
    made = []
    for part in described:
        shape = plain.output_shape(part, shape, where)
        made.append(shape)
    whole = chain(maps, made)
    return whole if factor == 1 else whole.scaled(factor)


def parts(module: nn.Module) -> tuple[nn.Module, ...]:
    """The parts of a connection, in order."""
    return tuple(module) if type(module) is nn.Sequential else (module,)


def describe(module: nn.Module, where: str) -> plain.Connection:
    """The plain description of a connection; UsageError, starting with `where`, for a kind that is not supported."""
    found = tuple(kind_of(part, where).describe(part, where) for part in parts(module))
    return plain.Chain(found) if type(module) is nn.Sequential else found[0]


def build(connection: plain.Connection) -> nn.Module:
    """The untrained module of a description (torch's own initial weights)."""
    if isinstance(connection, plain.Chain):
        return nn.Sequential(*(build(part) for part in connection.parts))
    return BUILDERS[type(connection)](connection)


def kind_of(module: nn.Module, where: str) -> Kind:
    """How to treat `module`; UsageError naming `where` and the supported kinds."""
    if type(module) in KINDS:
        return KINDS[type(module)]
    raise UsageError(f"{where} is a {type(module).__name__}, which is not supported yet: {nearest(type(module).__name__)}")


def nearest(kind: str) -> str:
    """What to use in place of a module called `kind`: the nearest supported thing, else all of them."""
    return next((instead for part, instead in NEAREST.items() if part in kind), f"use {' or '.join(k.__name__ for k in KINDS)}")


def advance(module: nn.Module) -> None:
    """Start a training batch: restricted weights measure themselves again."""
    for part in module.modules():
        if isinstance(part, Limited):
            part.advance()


def event_statistics(module: nn.Module, mean_input: Tensor, where: str) -> Given:
    """(mean, variance) of each batch normalisation, from the current of the mean input, for all time steps of events (IDE's authors)."""
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    values = mean_input
    for part in parts(module):
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            mean, variance = _moments(values, unbiased=True)
            found[part] = mean, variance + EVENT_EPS
        values = kind_of(part, where).current(part, values, found)
    return found


def _weighted_current(module: nn.Module, values: Tensor, _: Statistics) -> Tensor:
    op, weight = weighted(module, "a connection")
    return linear(op, weight, values)


def _weighted_map(module: nn.Module) -> Map:
    op, weight = weighted(module, "a connection")
    weight = weight.detach()
    if isinstance(op, nn.Linear):
        return DenseMap(weight, weight.t().contiguous())
    stride, padding, dilation = (plain.pair(_sides(value, "a connection")) for value in (op.stride, op.padding, op.dilation))
    return (ConvMap if isinstance(op, nn.Conv2d) else ConvTransposeMap)(weight, stride, padding, dilation, op.groups)


def _describe_weighted(module: Any, where: str) -> plain.Part:
    """nn.Linear, nn.Conv2d or nn.ConvTranspose2d, alone or standardised or limited."""
    op = module.op if isinstance(module, (Limited, Standardized)) else module
    standardized = isinstance(module, Standardized)
    limit = module.limit if isinstance(module, Limited) else None
    if isinstance(op, nn.Linear):
        return plain.Linear(op.in_features, op.out_features, op.bias is not None, standardized, limit)
    if op.padding_mode != "zeros":
        raise UsageError(f"{where} pads with '{op.padding_mode}': leave padding_mode at 'zeros', the only one there is")
    channels, biased = (op.in_channels, op.out_channels), op.bias is not None
    kernel, stride, padding, dilation = (_sides(value, where) for value in (op.kernel_size, op.stride, op.padding, op.dilation))
    if isinstance(op, nn.Conv2d):
        return plain.Conv2d(*channels, kernel, stride, padding, biased, standardized, limit, op.groups, dilation)
    extra = _sides(op.output_padding, where)
    return plain.ConvTranspose2d(*channels, kernel, stride, padding, extra, biased, limit, op.groups, dilation)


def _sides(value: Any, where: str) -> Union[int, tuple[int, int]]:
    """n for (n, n) and n, else (height, width)."""
    sides = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise UsageError(f"{where} has a kernel, stride or padding of {value!r}: give whole numbers, one or (height, width)")
    return int(sides[0]) if sides[0] == sides[1] else (int(sides[0]), int(sides[1]))


def _number(value: Any, where: str) -> int:
    """The one number behind (n, n) or n."""
    found = _sides(value, where)
    if isinstance(found, int):
        return found
    raise UsageError(f"{where} pools with windows, strides or padding {value}: give one number for height and width")


def _describe_pool(module: nn.AvgPool2d, where: str) -> plain.AvgPool2d:
    kernel = _number(module.kernel_size, where)
    stride, padding = _number(module.stride, where), _number(module.padding, where)
    if module.ceil_mode or module.divisor_override is not None or (padding and not module.count_include_pad):
        raise UsageError(f"{where} pools with ceil_mode, a divisor or without the padding's zeros: keep torch's defaults")
    return plain.AvgPool2d(kernel, None if stride == kernel else stride, padding)


def _pool_map(module: nn.AvgPool2d) -> Map:
    pool = _describe_pool(module, "a pool")
    return PoolMap(pool.kernel) if pool.step == pool.kernel and pool.padding == 0 else WindowMap(pool.kernel, pool.step, pool.padding)


def _describe_adaptive(module: nn.AdaptiveAvgPool2d, where: str) -> plain.Part:
    return plain.AdaptiveAvgPool2d(_number(module.output_size, where))


def _describe_upsample(module: nn.Upsample, where: str) -> plain.Part:
    if module.mode != "nearest" or not isinstance(module.scale_factor, (int, float)) or module.scale_factor != int(module.scale_factor):
        raise UsageError(f"{where} upsamples by other than whole repetition: use nn.Upsample(scale_factor=2, mode='nearest')")
    return plain.Upsample(int(module.scale_factor))


def _describe_norm(module: Union[nn.BatchNorm1d, nn.BatchNorm2d], where: str) -> plain.Part:
    if not module.affine or not module.track_running_stats or module.momentum is None:
        raise UsageError(f"{where} has batch normalisation without weight, running statistics or momentum: keep torch's defaults")
    return plain.BatchNorm(module.num_features, isinstance(module, nn.BatchNorm2d), module.eps, module.momentum)


def _normalized(module: Union[nn.BatchNorm1d, nn.BatchNorm2d], values: Tensor, statistics: Statistics) -> Tensor:
    weight, bias = module.weight, module.bias
    if statistics == "running":
        return functional.batch_norm(values, module.running_mean, module.running_var, weight, bias, False, 0.0, module.eps)
    if isinstance(statistics, Mapping):
        mean, variance = (v.reshape(-1, *[1] * (values.ndim - 2)) for v in statistics[module])
        scale, shift = (v.reshape(mean.shape) for v in (weight, bias))
        return (values - mean) / variance.sqrt() * scale + shift
    if values.numel() * processes.size() == values.shape[1]:
        raise UsageError("batch normalisation needs more than one value for each feature: use batches of two samples or more")
    if processes.size() > 1:
        return _jointly_normalized(module, values, statistics == "learn")
    if statistics == "batch":
        return functional.batch_norm(values, None, None, weight, bias, True, 0.0, module.eps)
    assert module.num_batches_tracked is not None  # `describe` refuses modules without running statistics
    module.num_batches_tracked.add_(1)
    return functional.batch_norm(values, module.running_mean, module.running_var, weight, bias, True, module.momentum, module.eps)


def _moments(values: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    """(mean, variance) of each feature, over the samples of all processes that train together."""
    axes = (0, *range(2, values.ndim))
    if processes.size() == 1:
        return values.mean(axes), values.var(axes, unbiased=unbiased)
    count = values.numel() // values.shape[1] * processes.size()
    mean = processes.joint_sum(values.sum(axes)) / count
    apart = values - mean.reshape(-1, *[1] * (values.ndim - 2))
    return mean, processes.joint_sum(apart.square().sum(axes)) / (count - unbiased)


def _jointly_normalized(module: Union[nn.BatchNorm1d, nn.BatchNorm2d], values: Tensor, learn: bool) -> Tensor:
    """Batch normalisation by the statistics of the whole batch, of which this process has some samples."""
    mean, variance = _moments(values, unbiased=False)
    if learn:
        assert module.num_batches_tracked is not None  # `describe` refuses modules without running statistics
        assert module.running_mean is not None
        assert module.running_var is not None
        assert module.momentum is not None
        count = values.numel() // values.shape[1] * processes.size()
        module.num_batches_tracked.add_(1)
        module.running_mean.lerp_(mean.detach(), module.momentum)
        module.running_var.lerp_(variance.detach() * (count / (count - 1)), module.momentum)
    mean, variance, weight, bias = (v.reshape(-1, *[1] * (values.ndim - 2)) for v in (mean, variance, module.weight, module.bias))
    return (values - mean) / (variance + module.eps).sqrt() * weight + bias


def _norm_map(module: Union[nn.BatchNorm1d, nn.BatchNorm2d]) -> Map:
    assert module.running_var is not None  # `describe` refuses modules without running statistics
    return ScaleMap(module.weight.detach() / (module.running_var + module.eps).sqrt())


_WEIGHTED = Kind(_describe_weighted, _weighted_current, _weighted_map)
_NORM = Kind(_describe_norm, _normalized, _norm_map)

KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: _WEIGHTED,
    nn.Conv2d: _WEIGHTED,
    nn.ConvTranspose2d: _WEIGHTED,
    nn.AvgPool2d: Kind(_describe_pool, lambda m, values, _: m(values), _pool_map),
    nn.AdaptiveAvgPool2d: Kind(
        _describe_adaptive, lambda m, values, _: m(values), lambda m: AdaptivePoolMap(_number(m.output_size, "a pool"))
    ),
    nn.Upsample: Kind(_describe_upsample, lambda m, values, _: m(values), lambda m: UpsampleMap(int(m.scale_factor))),
    nn.BatchNorm1d: _NORM,
    nn.BatchNorm2d: _NORM,
    Scale: Kind(lambda m, _: plain.Scale(m.factor), lambda m, values, _: m(values), lambda m: ScaleMap(m.factor)),
    Gain: Kind(lambda m, _: plain.Gain(m.start), lambda m, values, _: m(values), lambda m: ScaleMap(float(m.gain.detach()))),
    nn.Identity: Kind(lambda m, _: plain.Identity(), lambda m, values, _: values, lambda m: ScaleMap(1.0)),
    Standardized: _WEIGHTED,
    Limited: _WEIGHTED,
}


def _build_weighted(part: Union[plain.Linear, plain.Conv2d, plain.ConvTranspose2d]) -> nn.Module:
    op: Union[nn.Linear, nn.Conv2d, nn.ConvTranspose2d]
    if isinstance(part, plain.Linear):
        op = nn.Linear(part.inputs, part.outputs, bias=part.bias)
    else:
        kernel, stride, padding, dilation = (plain.pair(sides) for sides in (part.kernel, part.stride, part.padding, part.dilation))
        if isinstance(part, plain.Conv2d):
            op = nn.Conv2d(part.inputs, part.outputs, kernel, stride, padding, dilation, part.groups, part.bias)
        else:
            extra = plain.pair(part.output_padding)
            op = nn.ConvTranspose2d(part.inputs, part.outputs, kernel, stride, padding, extra, part.groups, part.bias, dilation)
    if not isinstance(op, nn.ConvTranspose2d) and getattr(part, "standardized", False):
        return Standardized(op)
    return op if part.limit is None else Limited(op, part.limit)


def _build_norm(part: plain.BatchNorm) -> nn.Module:
    kind = nn.BatchNorm2d if part.images else nn.BatchNorm1d
    return kind(part.features, eps=part.eps, momentum=part.momentum)


BUILDERS: dict[type, Callable[[Any], nn.Module]] = {
    plain.Linear: _build_weighted,
    plain.Conv2d: _build_weighted,
    plain.ConvTranspose2d: _build_weighted,
    plain.AvgPool2d: lambda part: nn.AvgPool2d(part.kernel, part.stride, part.padding),
    plain.AdaptiveAvgPool2d: lambda part: nn.AdaptiveAvgPool2d(part.size),
    plain.Upsample: lambda part: nn.Upsample(scale_factor=part.factor, mode="nearest"),
    plain.Scale: lambda part: Scale(part.factor),
    plain.Gain: lambda part: Gain(part.start),
    plain.Identity: lambda part: nn.Identity(),
    plain.BatchNorm: _build_norm,
}
