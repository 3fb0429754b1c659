"""Where the places of an image lead along one axis, through any chain of convolutions, pools and upsamplings: rows and columns go their ways apart from each other."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from toolchain.ir import Array, AvgPool2d, Conv2d, ConvTranspose2d, Identity, Op, Scale, Shape, Upsample

Pairs = list[list[tuple[int, int]]]
"""Along one axis, for each place of the source: the places of the target it reaches, each with the place of the kernel that leads there."""

Runs = list[list[tuple[int, int, int]]]
"""The same as runs (target, slot, length): neighbouring places of the target by neighbouring slots of the kernel."""


def image(shape: Shape) -> tuple[int, int, int]:
    """`shape` as (channels, rows, columns)."""
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else (shape[0], prod(shape[1:]), 1)


def gathers(op: Op) -> bool:
    """Whether windows of the source make each target (else each source is spread over a window of the target)."""
    return isinstance(op, (Conv2d, AvgPool2d)) != getattr(op, "transpose", False)


def window(op: Any, axis: int, weight: Array | None) -> tuple[int, int, int, int]:
    """Stride, kernel, padding and dilation of an operation along an axis."""
    if isinstance(op, Upsample):
        return op.factor, op.factor, 0, 1
    if isinstance(op, AvgPool2d):
        return op.stride[axis], op.kernel[axis], op.padding[axis], 1
    assert weight is not None
    return op.stride[axis], weight.shape[2 + axis], op.padding[axis], op.dilation[axis]


def pairs(op: Op, axis: int, size: int, made: int, weight: Array | None) -> Pairs:
    """The pairs of one operation that makes `made` places of `size`."""
    if isinstance(op, (Scale, Identity)):
        return [[(place, 0)] for place in range(size)]
    stride, kernel, padding, dilation = window(op, axis, weight)
    if isinstance(op, Upsample) and op.transpose:
        return [[(place // stride, place % stride)] for place in range(size)]
    if not gathers(op):
        reached = [[(place * stride + k * dilation - padding, k) for k in range(kernel)] for place in range(size)]
        return [[(target, k) for target, k in found if 0 <= target < made] for found in reached]
    found: Pairs = [[] for _ in range(size)]
    for target in range(made):
        for k in range(kernel):
            place = target * stride + k * dilation - padding
            if 0 <= place < size:
                found[place].append((target, k))
    return found


def chained(first: Pairs, then: Pairs, *, keep_slots: bool) -> Pairs:
    """Two operations one after the other, with the slots of the second, or of the first where it `keep_slots`: only one has a kernel of weights."""
    return [[(target, a if keep_slots else b) for place, a in found for target, b in then[place]] for found in first]


def slot_order(op: Conv2d | ConvTranspose2d, kernel: int, axis: int) -> list[int]:
    """The places of a kernel in an order in which those that neighbouring targets need lie side by side."""
    if not gathers(op):
        return list(range(kernel))
    step = max(1, op.stride[axis] // op.dilation[axis])
    return [k for first in range(step) for k in reversed(range(first, kernel, step))]


def runs(found: Pairs, order: Sequence[int] | None) -> Runs:
    """`found` as runs; `order` has the kernel's places in the order of their slots, None where slots do not count."""
    slot = None if order is None else {k: i for i, k in enumerate(order)}
    made: Runs = []
    for reached in found:
        made.append([])
        last: list[int] | None = None
        for target, k in sorted((target, 0 if slot is None else slot[k]) for target, k in reached):
            step = 0 if slot is None else 1
            if last is not None and target == last[0] + last[2] and k == last[1] + step * last[2]:
                last[2] += 1
                made[-1][-1] = (last[0], last[1], last[2])
            else:
                last = [target, k, 1]
                made[-1].append((target, k, 1))
    return made


def taken(found: Pairs, made: int) -> Pairs:
    """For each of `made` places of the target, the places of the source that lead there, each with its slot."""
    back: Pairs = [[] for _ in range(made)]
    for place, reached in enumerate(found):
        for target, slot in reached:
            back[target].append((place, slot))
    return back
