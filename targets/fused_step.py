"""A population's model step as one Triton kernel: add, clamp, fire, reset, leak and count, each neuron read and written once.

The rule is `toolchain.fixed.step`; this is its form on a GPU, and `cuda_ticks` has the same in torch operations where Triton is missing. Triton is imported with this
module, so import it only where the kernel is wanted. Whole numbers only.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads annotations as values, so they are not put off here, and a kernel has none but those of its constants.

from importlib import import_module
from typing import Any

from torch import Tensor

from toolchain.ir import POTENTIAL_LIMIT

triton: Any = import_module("triton")
tl: Any = import_module("triton.language")

NEURONS_AT_ONCE = 1024
"""Neurons of one program of the kernel."""

SPLIT = 12
"""|u| * keep passes 32 bits, so |u| is taken apart at this bit: (|u| * keep) >> 12 = (|u| >> 12) * keep + (((|u| & 4095) * keep) >> 12), exactly."""


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _leaked(u, keep, SPLIT_AT: tl.constexpr):  # noqa: N803  # constants of a kernel are capitals
    """sign(u) * ((|u| * keep) >> 12), without the product."""
    size = tl.where(u < 0, -u, u)
    size = (size >> SPLIT_AT) * keep + (((size & ((1 << SPLIT_AT) - 1)) * keep) >> SPLIT_AT)
    return tl.where(u < 0, -size, size)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _integers(
    potential,
    waiting,
    constant,
    spikes,
    counts,
    activity,
    saturations,
    elements,
    span,
    threshold,
    reset,
    keep,
    LIMIT: tl.constexpr,  # noqa: N803
    SPLIT_AT: tl.constexpr,  # noqa: N803
    WAITS: tl.constexpr,  # noqa: N803
    CONSTANT: tl.constexpr,  # noqa: N803
    REPEATS: tl.constexpr,  # noqa: N803
    MEMBERS: tl.constexpr,  # noqa: N803
    LEAKS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """MEMBERS: 0 a readout, 1 the plus member, 2 both, 3 a relay. `constant` is one current a neuron and sample, or, where it REPEATS, one a neuron (`span` of them)."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = place < elements
    u = tl.load(potential + place, mask=live, other=0)
    if MEMBERS == 3:
        u = u - u  # a relay keeps nothing
    if MEMBERS == 0 and LEAKS:
        u = _leaked(u, keep, SPLIT_AT)
    if WAITS:
        u = u + tl.load(waiting + place, mask=live, other=0)
    if CONSTANT:
        u = u + tl.load(constant + (place % span if REPEATS else place), mask=live, other=0)
    over = live & ((u > LIMIT) | (u < -LIMIT))
    u = tl.where(u > LIMIT, LIMIT, u)
    u = tl.where(u < -LIMIT, -LIMIT, u)
    # saturations, spikes and what is counted are rare: only the neurons concerned are read and written
    times = tl.load(saturations + place, mask=over, other=0)
    tl.store(saturations + place, times + 1, mask=over)
    if MEMBERS != 0:
        fired = u
        if MEMBERS != 3:
            fired = tl.where(u >= threshold, 1, 0)
            if MEMBERS == 2:
                fired = fired - tl.where(u <= -threshold, 1, 0)
            u = u - fired * reset
            if LEAKS:
                u = _leaked(u, keep, SPLIT_AT)
        tl.store(spikes + place, fired, mask=live)
        sent = live & (fired != 0)
        total = tl.load(counts + place, mask=sent, other=0)
        tl.store(counts + place, total + fired, mask=sent)
        if MEMBERS != 1:  # of the plus member alone the count says it
            active = tl.load(activity + place, mask=sent, other=0)
            tl.store(activity + place, active + 1, mask=sent)
    tl.store(potential + place, u, mask=live)


def integer_step(
    potential: Tensor,
    waiting: Tensor | None,
    constant: Tensor | None,
    spikes: Tensor,
    counts: Tensor,
    activity: Tensor,
    saturations: Tensor,
    *,
    members: int,
    threshold: int,
    reset: int,
    keep: int,
) -> None:
    """Advance a population in place, all samples at once.

    Contiguous tensors of (samples, neurons) in one order of neurons: `potential`, `waiting` (what arrived) and `constant` (what is injected; or (neurons,) for all
    samples) int32, or all three int64; `spikes` int8, of a relay the type of its potential; `counts` int32, of a relay int64; `activity` and `saturations` int32.
    `members`: 0 a readout, 1 the plus member, 2 both, 3 a relay. `keep` is 4096 - decay; the caller proves that no sum passes the type of `potential`.
    """
    elements = potential.numel()
    _integers[(triton.cdiv(elements, NEURONS_AT_ONCE),)](
        potential,
        potential if waiting is None else waiting,
        potential if constant is None else constant,
        spikes,
        counts,
        activity,
        saturations,
        elements,
        elements if constant is None else constant.numel(),
        threshold,
        reset,
        keep,
        LIMIT=POTENTIAL_LIMIT,
        SPLIT_AT=SPLIT,
        WAITS=waiting is not None,
        CONSTANT=constant is not None,
        REPEATS=constant is not None and constant.numel() != elements,
        MEMBERS=members,
        LEAKS=keep != 1 << SPLIT,
        BLOCK=NEURONS_AT_ONCE,
        enable_fp_fusion=False,  # nothing here is a float; left to Triton's default, some versions warn
    )
