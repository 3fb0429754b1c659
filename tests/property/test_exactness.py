"""Every target computes the same spikes, potentials and saturations: random graphs, leaks, loops, skips, extreme weights, saturation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolchain.passes import Adjoint, Retime
from toolchain.target import Result
from toolchain.targets.reference import REFERENCE
from toolchain.targets.sim import SIM
from toolchain.targets.torch_float import TORCH

graphs = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**16),
        "couples": st.integers(1, 4),
        "leak": st.booleans(),
        "numbers": st.sampled_from(["plain", "extreme", "positive", "saturating", "silent"]),
        "graded": st.booleans(),
    }
)


def assert_same(a: Result, b: Result) -> None:
    """Every spike, potential and saturation of every step; messages name the population."""
    assert a.history.keys() == b.history.keys()
    for name in a.history:
        np.testing.assert_array_equal(a.history[name].spikes, b.history[name].spikes, err_msg=f"spikes of {name}")
        np.testing.assert_array_equal(a.history[name].potentials, b.history[name].potentials, err_msg=f"potentials of {name}")
        for field in ("counts", "activity", "traces", "potentials", "saturations"):
            np.testing.assert_array_equal(getattr(a, field)[name], getattr(b, field)[name], err_msg=f"{field} of {name}")


def both_phases(target, graph, x, error):
    with replace(target, trace=True).compile(graph) as executable:
        return executable.run(x), executable.run(error, phase="feedback")


@settings(max_examples=60, deadline=None)
@given(options=graphs, mode=st.sampled_from(["step", "exact", "pipelined"]), batch=st.sampled_from([1, 2, 5]))
def test_sim_equals_reference(random_graph, random_inputs, options, mode, batch):
    graph = random_graph(**options)
    graph = graph if mode == "step" else Retime(mode)(graph)
    x, error = random_inputs(graph, 5)
    expected = both_phases(REFERENCE, graph, x, error)
    found = both_phases(replace(SIM, batch=batch, device="cpu"), graph, x, error)
    for a, b in zip(expected, found, strict=True):
        assert_same(a, b)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), extreme=st.booleans(), host=st.booleans(), mode=st.sampled_from(["step", "exact", "pipelined"]))
def test_sim_equals_reference_on_every_operation(drawn, data, extreme, host, mode):
    """Convolutions, pools, upsampling, relays, events and several biases, in any timing."""
    graph = data.draw(drawn.graphs(integer=True, extreme=extreme, host=host))
    x, error = data.draw(drawn.values(graph))
    graph = graph if mode == "step" else Retime(mode)(graph)
    expected = both_phases(REFERENCE, graph, x, error)
    found = both_phases(replace(SIM, batch=2, device="cpu"), graph, x, error)
    for a, b in zip(expected, found, strict=True):
        assert_same(a, b)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), host=st.booleans(), mode=st.sampled_from(["step", "exact", "pipelined"]))
def test_torch_in_float64_equals_reference_on_every_operation(drawn, data, host, mode):
    """Few bits and powers of two, leaks included: every sum is exact in float64."""
    graph = data.draw(drawn.graphs(host=host))
    x, error = data.draw(drawn.values(graph))
    graph = Adjoint()(graph)
    graph = graph if mode == "step" else Retime(mode)(graph)
    expected = both_phases(REFERENCE, graph, x, error)
    found = both_phases(replace(TORCH, dtype="float64", device="cpu"), graph, x, error)
    for a, b in zip(expected, found, strict=True):
        assert_same(a, b)


@settings(max_examples=60, deadline=None)
@given(options=graphs, integer=st.booleans())
def test_exact_timing_is_the_model_step(random_graph, random_inputs, options, integer):
    graph = random_graph(**options, integer=integer)
    x, error = random_inputs(graph, 3)
    stepped = both_phases(REFERENCE, graph, x, error)
    exact = both_phases(REFERENCE, Retime("exact")(graph), x, error)
    for a, b in zip(stepped, exact, strict=True):
        assert_same(a, b)


@settings(max_examples=40, deadline=None)
@given(options=graphs, mode=st.sampled_from(["step", "exact", "pipelined"]))
def test_torch_in_float64_equals_reference_without_leak(random_graph, random_inputs, options, mode):
    """Weights are multiples of 1/1024, so without leak every sum is exact in float64 and nothing may differ."""
    graph = random_graph(**{**options, "leak": False}, integer=False)
    graph = graph if mode == "step" else Retime(mode)(graph)
    x, error = random_inputs(graph, 4)
    expected = both_phases(REFERENCE, graph, x, error)
    found = both_phases(replace(TORCH, dtype="float64", device="cpu"), graph, x, error)
    for a, b in zip(expected, found, strict=True):
        assert_same(a, b)


def test_adversarial_graphs_are_adversarial(random_graph, random_inputs):
    """Among a few draws each phase saturates and fires with both signs; otherwise the tests above would prove nothing about it."""
    results = []
    for seed in range(8):
        graph = random_graph(seed, numbers="saturating", couples=3)
        results.append(both_phases(REFERENCE, graph, *random_inputs(graph, 4, seed)))
    for phase in (0, 1):
        assert sum(int(s.sum()) for pair in results for s in pair[phase].saturations.values()) > 0
        assert sum(int(a.sum()) for pair in results for a in pair[phase].activity.values()) > 0
    assert min(int(h.spikes.min()) for pair in results for h in pair[1].history.values()) == -1


def test_pipelined_timing_differs_by_few_spikes_and_says_so(random_graph, random_inputs):
    """Pipelined counts are not the model step's, and stay close: the mode is part of the graph, never silent."""
    graph = random_graph(1, couples=3, widths=(9, 9, 9), skips=False, time_steps=60)
    pipelined, exact = Retime("pipelined")(graph), Retime("exact")(graph)
    assert pipelined.phase("forward").timing.mode == "pipelined"
    assert pipelined.phase("forward").ticks < exact.phase("forward").ticks
    x, error = random_inputs(graph, 20)
    one, two = both_phases(REFERENCE, pipelined, x, error)[0], both_phases(REFERENCE, exact, x, error)[0]
    differences = np.concatenate([(one.counts[name] - two.counts[name]).ravel() for name in ("couple0", "couple1", "couple2")])
    assert differences.any()
    assert np.abs(differences).mean() < 1  # of 60 steps


@pytest.mark.cuda
def test_sim_on_a_gpu_equals_reference(random_graph, random_inputs):
    graph = Retime("exact")(random_graph(5, couples=4, leak=True))
    x, error = random_inputs(graph, 6)
    for a, b in zip(both_phases(REFERENCE, graph, x, error), both_phases(replace(SIM, device="cuda"), graph, x, error), strict=True):
        assert_same(a, b)
