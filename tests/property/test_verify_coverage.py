"""What `coverage` counts as exercised is what a change by one in the last place shows, on graphs of every operation: tried weight by weight."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from toolchain import probing
from toolchain.coverage import Counter
from toolchain.ir import frozen, verify, weight_of
from toolchain.passes import Retime
from toolchain.targets.reference import REFERENCE

TRIED = 24
"""Weights that are changed, of those of one graph."""


def both_phases(graph, x, error):
    with replace(REFERENCE, trace=True).compile(graph) as run:
        return run.run(x), run.run(error, phase="feedback")


def same(ones, others):
    """Every spike, potential and saturation of both phases."""
    for a, b in zip(ones, others, strict=True):
        for name, steps in a.history.items():
            if (steps.spikes != b.history[name].spikes).any() or (steps.potentials != b.history[name].potentials).any():
                return False
            if (a.saturations[name] != b.saturations[name]).any():
                return False
    return True


def changed(graph, key, i, by):
    tensor = graph.tensors[key].astype(np.int64)
    tensor.reshape(-1)[i] += by
    return msgspec.structs.replace(graph, tensors={**graph.tensors, key: frozen(tensor)})


def sums_behind(graph, key):
    """Whether windows are summed behind a weight that signed spikes meet: those may cancel there, which is not told apart."""
    ops = [s.ops for s in graph.phase("feedback").synapses if key in map(weight_of, s.ops)]
    ops += [s.ops for s in graph.phase("forward").synapses if key in map(weight_of, s.ops) and graph.population(s.source).kind == "linear"]
    return any(weight_of(chain[-1]) != key for chain in ops)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(data=st.data(), host=st.booleans(), mode=st.sampled_from(["exact", "pipelined"]))
def test_exercised_weights_are_those_whose_change_is_seen(drawn, data, host, mode):
    graph = Retime(mode)(data.draw(drawn.graphs(integer=True, host=host, leaks=False)))
    x, error = data.draw(drawn.values(graph, samples=4))
    right = both_phases(graph, x, error)
    assume(not any(s.any() for result in right for s in result.saturations.values()))
    counter = Counter(graph, ("forward", "feedback"))
    for result in right:
        counter.see(graph, result, x, right[0], sorted(result.potentials))
    entries = list(counter._entries.values())
    draw = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    places = [(key, i) for key in sorted({e.tensor for e in entries}) for i in range(graph.tensors[key].size)]
    for n in draw.permutation(len(places))[:TRIED]:
        key, i = places[n]
        rows = [
            (bool(e.up.reshape(-1)[i]), bool(e.down.reshape(-1)[i]), bool(e.reachable.reshape(-1)[i])) for e in entries if e.tensor == key
        ]
        for by, counts in ((1, any(up for up, _, _ in rows)), (-1, any(down for _, down, _ in rows))):
            seen = not same(right, both_phases(changed(graph, key, i, by), x, error))
            assert counts == seen or (counts and sums_behind(graph, key)), (key, i, by, counts, seen)
            assert any(reachable for _, _, reachable in rows) or not seen, (key, i)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), host=st.booleans(), mode=st.sampled_from(["exact", "pipelined"]))
def test_variants_are_valid_and_meet_their_thresholds(drawn, data, host, mode):
    """Also of relays, events, leaks and single neurons; the weights that the network has are untouched."""
    graph = Retime(mode)(data.draw(drawn.graphs(integer=True, host=host)))
    host_biases = {drive.bias for drive in graph.phase("forward").drive}
    for variant in probing.variants(graph, 4):
        verify(variant.graph)
        for key, tensor in graph.tensors.items():
            assert key in host_biases or (variant.graph.tensors[key] == tensor).all(), key
        for phase in graph.phases:
            other = variant.graph.phase(phase.name)
            assert (other.dynamics, other.synapses, other.timing) == (phase.dynamics, phase.synapses, phase.timing)
            totals = probing.first_totals(variant.graph, phase.name, variant.inputs[:1], variant.errors[:1])
            for name, total in totals.items():
                meets = int(total.reshape(-1)[0]) == phase.dynamics[name].threshold + variant.edge
                assert meets == variant.met[phase.name, name]


@pytest.mark.parametrize("count", [0, 1, 2, 7, 16])
def test_probes_are_the_same_every_time_and_lie_in_range(random_graph, count):
    graph = Retime()(random_graph(3))
    silent = {"couple0": np.ones(graph.population("couple0").shape, np.bool_)}
    once, again = (probing.inputs(graph, count, silent) for _ in range(2))
    assert once.shape == (count, 7)
    np.testing.assert_array_equal(once, again)
    assert ((once >= 0) & (once <= 1)).all()
    errors = probing.errors(graph, count)
    np.testing.assert_array_equal(errors, probing.errors(graph, count))
    assert len(errors) == count
    assert count < 4 or ((errors > 0).any() and (errors < 0).any())
