"""Couples as pairs of binary neurons do what the couples do: every spike, potential and saturation, in both phases and any timing."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolchain import codec, ir
from toolchain.errors import GraphError
from toolchain.passes import Adjoint, ExpandCouples, Pipeline, Retime
from toolchain.passes.expand import joined, pairs_of
from toolchain.targets.reference import REFERENCE
from toolchain.targets.sim import SIM

MODES = st.sampled_from(["step", "exact", "pipelined"])
QUIET = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}


def both_phases(target, graph, x, error):
    with replace(target, trace=True).compile(graph) as executable:
        return executable.run(x), executable.run(error, phase="feedback")


def assert_couples(graph, whole, apart):
    """`apart`, a result of the expanded graph, holds what the couples did in `whole`."""
    pairs, phase = pairs_of(graph), graph.phase(whole.phase)
    for name, steps in whole.history.items():
        plus = apart.history[pairs[name].plus] if name in pairs else apart.history[name]
        spikes, potentials = plus.spikes, plus.potentials
        member = pairs[name].plus if name in pairs else name
        counts, activity = apart.counts[member], apart.activity[member]
        if name in pairs:
            minus = apart.history[pairs[name].minus]
            spikes, potentials = joined(plus.spikes, minus.spikes, plus.potentials, phase.dynamics[name].reset)
            counts, activity = counts - apart.counts[pairs[name].minus], activity + apart.activity[pairs[name].minus]
            if phase.dynamics[name].members == "both":
                np.testing.assert_array_equal(whole.saturations[name], apart.saturations[pairs[name].minus])
            else:
                assert not apart.activity[pairs[name].minus].any()
        np.testing.assert_array_equal(steps.spikes, spikes, err_msg=f"{whole.phase} spikes of {name}")
        np.testing.assert_array_equal(steps.potentials, potentials, err_msg=f"{whole.phase} potentials of {name}")
        np.testing.assert_array_equal(whole.saturations[name], apart.saturations[member], err_msg=f"{whole.phase} saturations of {name}")
        np.testing.assert_array_equal(whole.counts[name], counts)
        np.testing.assert_array_equal(whole.activity[name], activity)
    if whole.phase == "forward":
        np.testing.assert_array_equal(codec.logits(graph, whole), codec.logits(graph, apart))


def assert_same_couples(graph, x, error, target=REFERENCE):
    expanded = Pipeline((ExpandCouples(),))(graph)
    assert {p.name for p in expanded.of_kind("couple")} == {m for pair in pairs_of(graph).values() for m in pair[:2]}
    assert all(d.members != "both" for phase in expanded.phases for d in phase.dynamics.values())
    for whole, apart in zip(both_phases(REFERENCE, graph, x, error), both_phases(target, expanded, x, error), strict=True):
        assert_couples(graph, whole, apart)


@settings(max_examples=25, **QUIET)
@given(
    seed=st.integers(0, 2**16),
    couples=st.integers(1, 4),
    numbers=st.sampled_from(["plain", "extreme", "positive", "saturating", "silent"]),
    graded=st.booleans(),
    mode=MODES,
)
def test_integer_pairs_are_the_couples(random_graph, random_inputs, seed, couples, numbers, graded, mode):
    """Extreme weights and saturation included: the clamp is symmetric, so both members meet it together."""
    graph = random_graph(seed, couples=couples, numbers=numbers, graded=graded)
    graph = graph if mode == "step" else Retime(mode)(graph)
    assert_same_couples(graph, *random_inputs(graph, 3))


@settings(max_examples=25, **QUIET)
@given(data=st.data(), extreme=st.booleans(), host=st.booleans(), mode=MODES, fast=st.booleans())
def test_every_operation_of_integers_changes_its_sign(drawn, data, extreme, host, mode, fast):
    """Convolutions, pools, upsampling, relays, connections without a weight; the simulator runs pairs as well."""
    graph = data.draw(drawn.graphs(integer=True, extreme=extreme, host=host, leaks=False))
    x, error = data.draw(drawn.values(graph))
    graph = graph if mode == "step" else Retime(mode)(graph)
    assert_same_couples(graph, x, error, replace(SIM, device="cpu") if fast else REFERENCE)


@settings(max_examples=15, **QUIET)
@given(data=st.data(), host=st.booleans(), mode=MODES)
def test_float_pairs_are_the_couples(drawn, data, host, mode):
    graph = data.draw(drawn.graphs(host=host, leaks=False))
    x, error = data.draw(drawn.values(graph))
    graph = Adjoint()(graph)
    graph = graph if mode == "step" else Retime(mode)(graph)
    assert_same_couples(graph, x, error)


def test_timing_may_come_after_expanding(random_graph, random_inputs):
    graph = random_graph(3, couples=3)
    x, error = random_inputs(graph, 4)
    expanded = Pipeline((ExpandCouples(), Retime()))(graph)
    for whole, apart in zip(both_phases(REFERENCE, graph, x, error), both_phases(REFERENCE, expanded, x, error), strict=True):
        assert_couples(graph, whole, apart)


def test_a_feedback_bias_of_the_smallest_mantissa_has_its_opposite(random_graph, random_inputs):
    graph = random_graph(5, couples=2)
    values = ir.frozen(np.resize([-4096, 4095, 0], graph.population("couple0").shape), np.int16)
    feedback = graph.phase("feedback")
    feedback = msgspec.structs.replace(feedback, bias={"couple0": (ir.Bias("back", exponent=1, start=2),)})
    graph = msgspec.structs.replace(graph, phases=(graph.phase("forward"), feedback), tensors=graph.tensors | {"back": values})
    ir.verify(graph)
    assert_same_couples(graph, *random_inputs(graph, 3))


def test_pairs_of_leaky_couples_are_refused(random_graph):
    graph = random_graph(1, couples=2, leak=True)
    with pytest.raises(GraphError, match=r"'couple0' leaks .* not exact; keep the couples whole"):
        ExpandCouples()(graph)
    forward = msgspec.structs.replace(graph, phases=graph.phases[:1])
    assert ExpandCouples()(forward) is forward  # binary neurons already


def test_a_name_that_is_taken_is_refused(random_graph):
    graph = random_graph(1, couples=1)
    populations = tuple(msgspec.structs.replace(p, name="couple0.plus") if p.kind == "readout" else p for p in graph.populations)
    with pytest.raises(GraphError, match=r"'couple0\.plus' has a name that expanding couples needs"):
        ExpandCouples()(msgspec.structs.replace(graph, populations=populations))
