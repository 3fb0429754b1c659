"""The simulator computes what the reference computes, whichever form of a convolution it takes; wide convolutions stay exact up to the bound of their type."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from toolchain import fixed
from toolchain.fixed import EXACT_FLOAT32, Grid
from toolchain.ir import POTENTIAL_LIMIT, Conv2d, ConvTranspose2d
from toolchain.passes.retime import Retime
from toolchain.targets import torch_operations
from toolchain.targets.reference import Reference
from toolchain.targets.sim import SIM
from toolchain.targets.torch_ticks import _Emissions

NAMES = ("strides", "pools", "residual", "relay at the end", "events", "single")
NUMBERS = ("plain", "extreme", "positive", "negative", "always", "saturating", "silent")


def both_phases(target, graph, x, error):
    with replace(target, trace=True).compile(graph) as run:
        return run.run(x), run.run(error, phase="feedback")


@pytest.mark.parametrize("form", ["chosen", "matrix"])
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", NAMES)
def test_sim_is_the_reference(network_graph, network_inputs, assert_identical, monkeypatch, name, numbers, form):
    sim = SIM if form == "chosen" else replace(SIM, kernel="torch")
    if form == "matrix":  # what other processors and GPUs take, some samples at a time
        monkeypatch.setattr(torch_operations, "exact", lambda dtype, device: torch_operations._Matrix())
        monkeypatch.setattr(torch_operations, "ROWS", 200)
    for leak, mode in ((1.0, "exact"), (0.75, "pipelined")):
        graph = network_graph(name, numbers, leak=leak)
        x, error = network_inputs(graph, 4)
        graph = Retime(mode)(graph)
        expected = both_phases(Reference(), graph, x, error)
        for a, b in zip(both_phases(replace(sim, device="cpu", batch=3), graph, x, error), expected, strict=True):
            assert_identical(a, b)


def test_the_limits_are_reached(network_graph, network_inputs):
    """Otherwise the test above would prove nothing about them: saturation in both phases, rates of 0 and 1, both signs, relays at their limit."""
    graph = Retime()(network_graph("relay at the end", "saturating"))
    forward, back = both_phases(Reference(), graph, *network_inputs(graph, 4))
    for result in (forward, back):
        assert sum(int(s.sum()) for s in result.saturations.values()) > 0
    assert max(int(np.abs(forward.history[name].spikes).max()) for name in ("stream0", "stream1", "stream2")) == POTENTIAL_LIMIT
    graph = Retime()(network_graph("strides", "always"))
    forward, _ = both_phases(Reference(), graph, *network_inputs(graph, 4))
    assert all((forward.counts[name] == 5).all() for name in ("a", "b", "c"))
    graph = Retime()(network_graph("pools", "silent"))
    forward, back = both_phases(Reference(), graph, *network_inputs(graph, 4))
    assert not any(result.activity[name].any() for result in (forward, back) for name in "abcd")
    graph = Retime()(network_graph("pools", "plain"))
    _, back = both_phases(Reference(), graph, *network_inputs(graph, 4))
    assert {-1, 1} <= {int(n) for history in back.history.values() for n in np.unique(history.spikes)}


FORMS = {"chosen": lambda: torch_operations.exact(torch.float32, torch.device("cpu")), "matrix": torch_operations._Matrix}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", ["largest", "random"])
@pytest.mark.parametrize("samples", [1, 20])  # from 16 on torch may choose fast transforms
def test_wide_convolutions_are_exact_in_float32(form, weights, samples):
    """64 channels of 3 x 3 kernels, with inputs so large that sums come within 0.2 % of 2^24, where one rounded product would show."""
    draw = np.random.default_rng(0)
    top = (EXACT_FLOAT32 - 1) // (64 * 9 * 128)
    assert top * 64 * 9 * 128 > 0.99 * EXACT_FLOAT32
    weight = draw.integers(-128, 128, (64, 64, 3, 3))
    if weights == "largest":
        weight[::2], weight[1::2] = 127, -128
    values = draw.integers(0, top + 1, (samples, 64, 9, 8))
    values[0] = top
    for grid in (Grid((1, 1), (1, 1), (1, 1), 1), Grid((2, 2), (1, 1), (1, 1), 1), Grid((1, 2), (2, 2), (2, 1), 1)):
        shape = (
            64,
            *((n + 2 * p - d * 2 - 1) // s + 1 for n, p, d, s in zip((9, 8), grid.padding, grid.dilation, grid.stride, strict=True)),
        )
        expected = fixed.convolve(values, weight, grid, shape)
        assert weights == "random" or np.abs(expected).max() > 0.99 * EXACT_FLOAT32
        ours, kernel = FORMS[form](), torch.tensor(weight, dtype=torch.float32)
        found = ours.gather(torch.tensor(values, dtype=torch.float32), kernel, grid, shape)
        np.testing.assert_array_equal(found.numpy(), expected)
        back = values if shape[1:] == (9, 8) else values[:, :, : shape[1], : shape[2]]
        expected = fixed.convolve_transposed(back, weight, grid, (64, 9, 8))
        found = ours.spread(torch.tensor(back, dtype=torch.float32), kernel, grid, (64, 9, 8))
        np.testing.assert_array_equal(found.numpy(), expected)


def test_output_padding_beyond_what_torch_takes():
    """The graph knows output padding up to any size: rows behind the last window are zero, or what the padding would have cut off."""
    draw = np.random.default_rng(1)
    values, weight = draw.integers(-3, 4, (2, 2, 3, 3)), draw.integers(-9, 10, (2, 3, 3, 3))
    for op in (ConvTranspose2d("w", (1, 2), (1, 1), (3, 4)), ConvTranspose2d("w", (3, 1), (2, 0), (0, 5), (1, 2))):
        made = fixed.apply((op,), {"w": weight}, values, _made(op, values, weight), integer=True)
        for form in FORMS.values():
            kernel, given = torch.tensor(weight, dtype=torch.float32), torch.tensor(values, dtype=torch.float32)
            grid = Grid(op.stride, op.padding, op.dilation, 1)
            np.testing.assert_array_equal(form().spread(given, kernel, grid, made.shape[1:]).numpy(), made)
            back = fixed.convolve(made, weight, grid, (2, 3, 3))
            np.testing.assert_array_equal(form().gather(torch.tensor(made, dtype=torch.float32), kernel, grid, (2, 3, 3)).numpy(), back)


def _made(op, values, weight):
    from toolchain.ir import output_shape

    return output_shape(op, values.shape[1:], {"w": weight})


def test_products_leave_float32_where_somebody_shortened_it(network_graph, network_inputs, assert_identical):
    """torch.set_float32_matmul_precision("medium") allows bfloat16: whole numbers then go through float64."""
    graph = Retime()(network_graph("strides", "extreme"))
    x, error = network_inputs(graph, 3)
    expected = both_phases(Reference(), graph, x, error)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = both_phases(replace(SIM, device="cpu"), graph, x, error)
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b in zip(found, expected, strict=True):
        assert_identical(a, b)


def test_emissions_are_kept_no_longer_than_a_synapse_carries_them(network_graph):
    graph = Retime()(network_graph("residual", "plain"))
    phase = graph.phase("forward")
    emissions = _Emissions(phase)
    for tick in range(200):
        for name in phase.order:
            emissions.keep(name, tick, torch.ones(1))
    for name in phase.order:
        longest = max((s.delay for s in phase.synapses if s.source == name), default=-1)
        assert len(emissions._found[name]) == longest + 1
    emissions.keep("n1", 200, torch.zeros(1))
    assert emissions.at("n1", 200) is None  # silence makes no current


def test_large_networks_advance_fewer_samples_at_once(network_graph, network_inputs, assert_identical, monkeypatch):
    graph = Retime()(network_graph("strides", "plain"))
    x, error = network_inputs(graph, 5)
    expected = both_phases(replace(SIM, device="cpu"), graph, x, error)
    monkeypatch.setattr("toolchain.targets.torch_ticks.AT_ONCE", {"cpu": 800})
    run = replace(SIM, device="cpu", trace=True, kernel="torch").compile(graph)
    assert run._batch == 2
    assert_identical(run.run(x), expected[0])
    assert_identical(run.run(error, phase="feedback"), expected[1])


@pytest.mark.cuda
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", NAMES)
def test_sim_on_a_gpu_is_the_reference(network_graph, network_inputs, assert_identical, name, numbers):
    graph = Retime()(network_graph(name, numbers))
    x, error = network_inputs(graph, 20)
    for a, b in zip(both_phases(replace(SIM, device="cuda"), graph, x, error), both_phases(Reference(), graph, x, error), strict=True):
        assert_identical(a, b)


def test_a_convolution_and_its_adjoint_agree():
    """<W x, y> = <x, W^T y> in whole numbers, of both forms."""
    draw = np.random.default_rng(2)
    op = Conv2d("w", (2, 1), (1, 2), (1, 2), 2)
    weight = draw.integers(-128, 128, (4, 3, 3, 2)).astype(np.int8)
    x, shape = draw.integers(-5, 6, (3, 6, 7, 5)), (4, 4, 7)
    y = draw.integers(-5, 6, (3, *shape))
    grid, kernel = Grid(op.stride, op.padding, op.dilation, op.groups), torch.tensor(weight, dtype=torch.float32)
    for form in FORMS.values():
        forward = form().gather(torch.tensor(x, dtype=torch.float32), kernel, grid, shape).numpy()
        back = form().spread(torch.tensor(y, dtype=torch.float32), kernel, grid, x.shape[1:]).numpy()
        assert (forward * y).sum() == (back * x).sum() != 0
