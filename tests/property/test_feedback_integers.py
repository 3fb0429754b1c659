"""Both phases against a second spelling of them, spike for spike: drawn integer graphs, quantized float graphs, and trained networks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from toolchain import codec
from toolchain.compiler import lowered
from toolchain.data import load
from toolchain.errors import DesignRuleError
from toolchain.passes import LOIHI_PIPELINE, Adjoint, Fold, Inject, Pipeline, Quantize, Retime
from toolchain.source import find
from toolchain.targets.reference import REFERENCE

SETTINGS = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def assert_same(found, expected):
    """`found` is a Result with its history, `expected` the trains of `independent`: every spike, potential and clamp of every step."""
    assert set(found.history) == set(expected.spikes)
    for name, trains in expected.spikes.items():
        for label, ours, theirs in (
            ("spikes", found.history[name].spikes, trains),
            ("potentials", found.history[name].potentials, expected.potentials[name]),
        ):
            stacked = np.stack(theirs)
            np.testing.assert_array_equal(ours.reshape(stacked.shape), stacked, err_msg=f"{found.phase} {label} of '{name}'")
        clamped = expected.clamped[name]
        np.testing.assert_array_equal(
            found.saturations[name].reshape(clamped.shape), clamped, err_msg=f"{found.phase} saturations of '{name}'"
        )


def both_phases(graph, inputs, error):
    with replace(REFERENCE, trace=True).compile(graph) as run:
        return run.run(inputs), run.run(error, phase="feedback")


def assert_both_phases(independent, graph, found, inputs, error):
    forward, feedback = found
    expected = independent.forward(graph, inputs)
    assert_same(forward, expected)
    assert_same(feedback, independent.backward(graph, independent.masks(graph, expected), error))


@SETTINGS
@given(data=st.data(), extreme=st.booleans(), host=st.booleans())
def test_integer_graphs(drawn, independent, data, extreme, host):
    graph = data.draw(drawn.graphs(integer=True, extreme=extreme, host=host))
    inputs, error = data.draw(drawn.values(graph))
    assert_both_phases(independent, graph, both_phases(graph, inputs, error), inputs, error)


@SETTINGS
@given(data=st.data(), bits=st.sampled_from([2, 4, 8]))
def test_quantized_graphs(drawn, independent, data, bits):
    """Whatever rounding did to a graph: its two phases in hardware time are those of its own integers in model steps, leaks, relays and units that differ included."""
    declared = data.draw(drawn.graphs())
    inputs, error = data.draw(drawn.values(declared))
    passes = (Fold(), Adjoint(), Inject(), Quantize(weight_bits=bits))
    try:
        graph = Pipeline(passes)(declared)
        retimed = Pipeline((*passes[:3], Retime(), passes[3]))(declared)
    except DesignRuleError:
        reject()
    assert_thresholds(graph, declared)
    assert_both_phases(independent, graph, both_phases(retimed, inputs, error), inputs, error)


def assert_thresholds(graph, declared):
    """Thresholds and resets are the model's own in the integers' units, rounded once; feedback units hold A / Ab."""
    for phase in declared.phases:
        for name, dynamics in phase.dynamics.items():
            if dynamics.members in ("plus", "both"):
                unit, found = graph.scale(phase.name, name), graph.phase(phase.name).dynamics[name]
                assert (found.threshold, found.reset) == (round(dynamics.threshold * unit), round(dynamics.reset * unit))


TRAINED = {"digits-fc": "digits", "fashion-fc": "mnist-1k"} | dict.fromkeys(
    ["mnist-fc", "mnist-fc2", "mnist-ide", "mnist-dsr", "mnist-ottt-o"], "mnist-1k"
)


@pytest.mark.parametrize("name", TRAINED)
def test_trained_networks(independent, name):
    """Networks that come with weights, on test images and the errors of their labels."""
    source = find(name)
    images = load(TRAINED[name], samples=3)
    inputs, labels = images.images, images.labels
    declared = lowered(source)
    passes = LOIHI_PIPELINE.until("quantize").passes
    graph = Pipeline(tuple(p for p in passes if p.name != "retime"))(declared)
    with replace(REFERENCE, trace=True).compile(Pipeline(passes)(declared)) as run:
        forward = run.run(inputs)
        error = codec.output_error(graph, forward, labels)
        error = error * codec.error_bound(graph) / np.abs(error).max()  # as large as couples carry: trained networks are seldom so wrong
        feedback = run.run(error, phase="feedback")
    assert sum(int(feedback.activity[p.name].sum()) for p in graph.of_kind("couple")) > 100
    assert_thresholds(graph, declared)
    assert_both_phases(independent, graph, (forward, feedback), inputs, error)
