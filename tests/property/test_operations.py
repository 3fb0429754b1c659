"""Every operation against PyTorch's in whole numbers, transposes against the inner product that defines them, and bounds against the worst inputs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from toolchain import fixed, ir
from toolchain.errors import GraphError
from toolchain.ir import AvgPool2d, Conv2d, ConvTranspose2d, Dense, Identity, Scale, Upsample

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
margins = st.tuples(st.integers(0, 2), st.integers(0, 2))
images = st.tuples(st.sampled_from([1, 2, 4, 6]), st.integers(1, 8), st.integers(1, 8))
seeds = st.integers(0, 2**32 - 1)


def whole(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 128, shape)


def both_ways(op, tensors, values, made):
    """`op` on whole numbers and on floats, which must agree where nothing is averaged."""
    integers = fixed.apply((op,), tensors, values, made, integer=True)
    floats = fixed.apply((op,), tensors, values, made, integer=False)
    assert integers.dtype == np.int64
    assert floats.dtype == np.float64
    return integers, floats


def as_tensor(values: np.ndarray) -> Tensor:
    return torch.as_tensor(values.astype(np.float64))


@SETTINGS
@given(
    seed=seeds,
    shape=images,
    out=st.sampled_from([2, 4]),
    kernel=pairs,
    stride=pairs,
    padding=margins,
    dilation=pairs,
    groups=st.sampled_from([1, 2]),
)
def test_convolutions_are_torchs(seed, shape, out, kernel, stride, padding, dilation, groups):
    groups = groups if shape[0] % groups == 0 else 1
    if any(shape[1 + i] + 2 * padding[i] <= dilation[i] * (kernel[i] - 1) for i in (0, 1)):
        with pytest.raises(GraphError, match="its padded source has"):
            ir.output_shape(Conv2d("w", stride, padding, dilation, groups), shape, {"w": np.zeros((out, shape[0] // groups, *kernel))})
        return
    values, weight = whole(seed, 2, *shape), whole(seed + 1, out, shape[0] // groups, *kernel)
    expected = functional.conv2d(as_tensor(values), as_tensor(weight), None, stride, padding, dilation, groups).numpy()
    op = Conv2d("w", stride, padding, dilation, groups)
    assert ir.output_shape(op, shape, {"w": weight}) == expected.shape[1:]
    for found in both_ways(op, {"w": weight}, values, expected.shape[1:]):
        np.testing.assert_array_equal(found, expected)


@SETTINGS
@given(
    seed=seeds,
    shape=images,
    out=st.sampled_from([2, 4]),
    kernel=pairs,
    stride=pairs,
    padding=margins,
    extra=margins,
    dilation=pairs,
    groups=st.sampled_from([1, 2]),
)
def test_transposed_convolutions_are_torchs(seed, shape, out, kernel, stride, padding, extra, dilation, groups):
    groups = groups if shape[0] % groups == 0 else 1
    extra = tuple(min(e, max(s, d) - 1) for e, s, d in zip(extra, stride, dilation, strict=True))  # torch has no more
    values, weight = whole(seed, 2, *shape), whole(seed + 1, shape[0], out // groups, *kernel)
    op = ConvTranspose2d("w", stride, padding, extra, dilation, groups)
    made = [(shape[1 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + extra[i] + 1 for i in (0, 1)]
    if min(made) < 1:
        with pytest.raises(GraphError, match="lower its padding or kernel"):
            ir.output_shape(op, shape, {"w": weight})
        return
    expected = functional.conv_transpose2d(as_tensor(values), as_tensor(weight), None, stride, padding, extra, groups, dilation).numpy()
    assert ir.output_shape(op, shape, {"w": weight}) == expected.shape[1:] == (out, *made)
    for found in both_ways(op, {"w": weight}, values, expected.shape[1:]):
        np.testing.assert_array_equal(found, expected)


@SETTINGS
@given(seed=seeds, shape=images, kernel=pairs, stride=pairs, padding=margins)
def test_pools_are_torchs_and_sums_in_whole_numbers(seed, shape, kernel, stride, padding):
    """Strides below the kernel overlap; the padding's zeros count in the mean."""
    padding = tuple(min(p, k // 2, k) for p, k in zip(padding, kernel, strict=True))
    op = AvgPool2d(kernel, stride, padding)
    if any(shape[1 + i] + 2 * padding[i] < kernel[i] for i in (0, 1)):
        with pytest.raises(GraphError, match="AvgPool2d needs"):
            ir.output_shape(op, shape, {})
        return
    values = whole(seed, 2, *shape)
    mean = functional.avg_pool2d(as_tensor(values), kernel, stride, padding).numpy()
    sums = functional.avg_pool2d(as_tensor(values), kernel, stride, padding, divisor_override=1).numpy()
    assert ir.output_shape(op, shape, {}) == mean.shape[1:]
    integers, floats = both_ways(op, {}, values, mean.shape[1:])
    np.testing.assert_array_equal(integers, sums)
    np.testing.assert_array_equal(floats, sums / np.prod(kernel))


@SETTINGS
@given(seed=seeds, shape=images, factor=st.integers(1, 3), exponent=st.integers(0, 7))
def test_upsampling_and_scales(seed, shape, factor, exponent):
    values, factors = whole(seed, 2, *shape), whole(seed + 1, shape[0])
    expected = functional.interpolate(as_tensor(values), scale_factor=factor, mode="nearest").numpy()
    for found in both_ways(Upsample(factor), {}, values, expected.shape[1:]):
        np.testing.assert_array_equal(found, expected)
    scaled = values * factors[:, None, None]
    integers, floats = both_ways(Scale(weight="s", exponent=exponent), {"s": factors}, values, shape)
    np.testing.assert_array_equal(integers, scaled * 2**exponent)
    np.testing.assert_array_equal(floats, scaled)
    flat = values.reshape(2, -1)
    np.testing.assert_array_equal(
        fixed.apply((Scale(weight="s"),), {"s": np.full(flat.shape[1], 3)}, flat, flat.shape[1:], integer=True), 3 * flat
    )
    np.testing.assert_array_equal(fixed.apply((Scale(0.25), Identity()), {}, values, shape, integer=False), values / 4)


@SETTINGS
@given(data=st.data())
def test_transposes_satisfy_their_inner_product(drawn, data):
    """<A x, y> = <x, A^T y> in whole numbers, of single operations and compositions, flattened or not, and in floats with means instead of sums."""
    tensors = drawn.Tensors(np.random.default_rng(data.draw(seeds)), integer=True, extreme=False)
    source, target = data.draw(drawn.shapes), data.draw(drawn.shapes)
    ops = data.draw(drawn.connections(tensors, "w", source, target))
    x, y = whole(1, 3, *source), whole(2, 3, *target)
    for integer in (True, False):
        there = fixed.apply(ops, tensors.found, x, target, integer=integer)
        back = fixed.apply(ir.adjoint(ops), tensors.found, y, source, integer=integer)
        assert back.shape == x.shape
        left, right = (there * y).reshape(3, -1).sum(axis=1), (x * back).reshape(3, -1).sum(axis=1)
        if integer:
            np.testing.assert_array_equal(left, right)
        else:
            np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-6)
    assert ir.adjoint(ir.adjoint(ops)) == ops


@SETTINGS
@given(data=st.data())
def test_shapes_of_a_transposed_chain_are_those_forward_in_reverse(drawn, data):
    """A stride forgets how large its image was: sizes of transposed operations come from the population they end in."""
    tensors = drawn.Tensors(np.random.default_rng(0), integer=True, extreme=False)
    source, target = data.draw(drawn.shapes), data.draw(drawn.shapes)
    ops = data.draw(drawn.connections(tensors, "w", source, target))
    forward = (source, *ir.shapes_along(ops, source, target, tensors.found))
    backward = ir.shapes_along(ir.adjoint(ops), target, source, tensors.found)
    assert [np.prod(shape) for shape in backward] == [np.prod(shape) for shape in reversed(forward[:-1])]
    assert np.prod(ir.entry_shape(ir.adjoint(ops), target, source, tensors.found)) == np.prod(target)
    assert all(one == two for one, two in zip(backward, reversed(forward[:-1]), strict=True) if len(one) == len(two))


@SETTINGS
@given(data=st.data(), incoming=st.sampled_from([1, 15, 255, 2**23 - 1]), transposed=st.booleans(), extreme=st.booleans())
def test_bounds_hold_for_the_worst_input(drawn, independent, data, incoming, transposed, extreme):
    """No input, every value at its largest with the sign that hurts, passes `largest_sum`; of a fully connected weight one reaches it."""
    tensors = drawn.Tensors(np.random.default_rng(data.draw(seeds)), integer=True, extreme=extreme)
    source, target = data.draw(drawn.shapes), data.draw(drawn.shapes)
    ops = data.draw(drawn.connections(tensors, "w", source, target))
    matrix = independent.matrix(ops, tensors.found, source, integer=True)
    matrix, ops = (matrix.T, ir.adjoint(ops)) if transposed else (matrix, ops)
    worst = int(np.abs(matrix).sum(axis=1).max()) * incoming
    bound, partial = incoming, 0
    for op in ops:
        met, bound = ir.largest_sum(op, tensors.found, bound)
        partial = max(partial, met)
    assert worst <= bound
    assert worst <= partial << max(getattr(op, "exponent", 0) for op in ops)
    if len(ops) == 1 and isinstance(ops[0], (Dense, Scale)):
        assert worst == bound


def test_the_largest_kernel_of_all_the_largest_weights_is_met_exactly():
    """Nine 127s over 64 channels of spikes, and back: what a simulator relies on when it picks a type."""
    tensors = {"w": np.full((8, 64, 3, 3), 127, np.int8)}
    for op, worst in ((Conv2d("w", padding=(1, 1)), 127 * 64 * 9), (Conv2d("w", padding=(1, 1), transpose=True), 127 * 8 * 9)):
        assert ir.largest_sum(op, tensors, 1) == (worst, worst)
        into, out = ((64, 5, 5), (8, 5, 5)) if not op.transpose else ((8, 5, 5), (64, 5, 5))
        assert fixed.apply((op,), tensors, np.ones((1, *into), np.int8), out, integer=True).max() == worst


BAD = {
    "groups": (Conv2d("w", groups=3), (6, 5, 5), {"w": np.zeros((4, 2, 3, 3))}, "has 4 channels in 3 groups: groups must divide them"),
    "channels": (Conv2d("w"), (3, 5, 5), {"w": np.zeros((4, 2, 3, 3))}, "takes 2 channels but its source has 3"),
    "transposed channels": (ConvTranspose2d("w"), (3, 5, 5), {"w": np.zeros((2, 4, 3, 3))}, "takes 2 channels but its source has 3"),
    "flat": (Conv2d("w"), (75,), {"w": np.zeros((4, 3, 3, 3))}, r"takes \(channels, height, width\) but gets \(75,\): flatten behind it"),
    "flat pool": (AvgPool2d((2, 2), (2, 2)), (16,), {}, "AvgPool2d takes"),
    "flat upsampling": (Upsample(2), (16,), {}, "Upsample takes"),
    "kernel axes": (Conv2d("w"), (3, 5, 5), {"w": np.zeros((4, 3, 3))}, "a convolution needs four axes"),
    "dense axes": (Dense("w"), (3,), {"w": np.zeros(3)}, r"needs \(outputs, inputs\)"),
    "inputs": (Dense("w"), (3, 2), {"w": np.zeros((4, 5))}, "takes 5 inputs but its source has 6"),
    "factors": (Scale(weight="s"), (3, 2, 2), {"s": np.zeros(2)}, "not one factor for each of 3 channels"),
    "stride": (Conv2d("w", stride=(0, 1)), (1, 5, 5), {"w": np.zeros((1, 1, 3, 3))}, r"stride \(?0.*: at least 1"),
    "padding": (AvgPool2d((2, 2), (2, 2), (-1, 0)), (1, 5, 5), {}, "padding -1: at least 1, padding at least 0"),
    "large kernel": (
        Conv2d("w", dilation=(3, 1)),
        (1, 5, 5),
        {"w": np.zeros((1, 1, 3, 3))},
        "needs 7 values in a row and its padded source has 5",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_shapes_that_do_not_meet_are_one_sentence(case):
    op, shape, tensors, message = BAD[case]
    with pytest.raises(GraphError, match=message):
        ir.shapes_along((op,), shape, (1,), tensors)


def test_chains_that_do_not_meet_are_one_sentence():
    tensors = {"w": np.zeros((4, 2, 3, 3)), "d": np.zeros((5, 36))}
    down = (Conv2d("w"), Dense("d"))
    assert ir.shapes_along(down, (2, 5, 5), (5,), tensors) == ((4, 3, 3), (5,))
    assert ir.shapes_along(ir.adjoint(down), (5,), (2, 5, 5), tensors) == ((4, 3, 3), (2, 5, 5))
    with pytest.raises(GraphError, match=r"it makes shape \(5,\), not \(6,\)"):
        ir.shapes_along(down, (2, 5, 5), (6,), tensors)
    with pytest.raises(GraphError, match=r"transposed operations take \(5,\) to make \(2, 5, 5\), but get \(6,\)"):
        ir.shapes_along(ir.adjoint(down), (6,), (2, 5, 5), tensors)
    with pytest.raises(GraphError, match="Conv2d follows a transposed operation: transpose all that follow, or none"):
        ir.shapes_along((Dense("d", transpose=True), Conv2d("w")), (5,), (4, 3, 3), tensors)


@pytest.mark.parametrize(("size", "stride"), list(product([4, 5, 6, 7], [1, 2, 3])))
def test_every_size_of_a_strided_convolution_comes_back(size, stride):
    """Sizes 5 and 6 at stride 2 make the same image: each adjoint finds its own."""
    tensors = {"w": whole(0, 3, 2, 3, 3)}
    op = Conv2d("w", (stride, stride), (1, 1))
    made = ir.output_shape(op, (2, size, size), tensors)
    assert ir.shapes_along(ir.adjoint((op,)), made, (2, size, size), tensors) == ((2, size, size),)
    back = fixed.apply(ir.adjoint((op,)), tensors, whole(1, 1, *made), (2, size, size), integer=True)
    padding = size - ((made[1] - 1) * stride + 1)
    expected = functional.conv_transpose2d(
        as_tensor(whole(1, 1, *made)), as_tensor(tensors["w"]), stride=stride, padding=1, output_padding=padding
    )
    np.testing.assert_array_equal(back, expected.numpy())
