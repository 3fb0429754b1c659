"""Quantization: what is representable stays exact, what is not is recorded, and the chip's ranges hold."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from toolchain import fixed
from toolchain.errors import GraphError, UsageError
from toolchain.ir import frozen, verify
from toolchain.passes import Quantize, Retime
from toolchain.targets.reference import REFERENCE


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), couples=st.integers(1, 4), bits=st.integers(2, 8), leak=st.booleans(), graded=st.booleans())
def test_integers_keep_to_the_chip(random_graph, seed, couples, bits, leak, graded):
    graph = Quantize(weight_bits=bits)(Retime()(random_graph(seed, couples=couples, leak=leak, graded=graded, integer=False)))
    verify(graph)
    low, high = fixed.weight_range(bits)
    for phase in graph.phases:
        for synapse in phase.synapses:
            (op,) = synapse.ops
            assert low <= graph.tensors[op.weight].min()
            assert graph.tensors[op.weight].max() <= high
            assert 0 <= op.exponent <= fixed.WEIGHT_EXPONENT_MAX
        for drive in phase.drive:
            assert 0 <= drive.exponent <= fixed.CURRENT_EXPONENT_MAX


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), couples=st.integers(1, 4))
@example(seed=6123, couples=1)
def test_what_is_on_the_grid_does_not_change_a_spike(random_graph, random_inputs, seed, couples):
    """Weights k/64 with |k| <= 127, thresholds and currents on a binary grid: integer and float graph have the same spikes in both phases."""
    graph = on_a_binary_grid(random_graph(seed, couples=couples, integer=False), seed)
    x, error = random_inputs(graph, 4)
    x, error = np.rint(x * 4) / 4, error / 4  # errors beyond one spike's amplitude would be cut, and counted
    quantized = Quantize(input_levels=4)(graph)
    traced = replace(REFERENCE, trace=True)
    with traced.compile(graph) as floats, traced.compile(quantized) as integers:
        for inputs, phase in ((x, "forward"), (error, "feedback")):
            a, b = floats.run(inputs, phase=phase), integers.run(inputs, phase=phase)
            assert sum(int(s.sum()) for s in b.saturations.values()) == 0
            for name, history in a.history.items():
                if name != "readout":
                    np.testing.assert_array_equal(history.spikes, b.history[name].spikes)


def on_a_binary_grid(graph, seed):
    draw = np.random.default_rng(seed)
    couples = {p.name for p in graph.of_kind("couple")}
    weights = {s.ops[0].weight for s in graph.phase("forward").synapses if s.target in couples}
    tensors = {
        name: frozen(draw.integers(-127, 128, t.shape) / 64 if name in weights else np.rint(t * 16) / 16)
        for name, t in graph.tensors.items()
    }

    def rounded(dynamics):
        if dynamics.members == "none":
            return dynamics
        return msgspec.structs.replace(
            dynamics, threshold=np.ceil(dynamics.threshold * 16) / 16 * 4, reset=np.ceil(dynamics.reset * 16) / 16 * 4
        )

    phases = tuple(msgspec.structs.replace(p, dynamics={n: rounded(d) for n, d in p.dynamics.items()}) for p in graph.phases)
    units = msgspec.structs.replace(graph.units, scale={"feedback": dict.fromkeys(couples, 1.0)})
    return msgspec.structs.replace(graph, tensors=tensors, phases=phases, units=units)


def test_rounding_is_recorded(random_graph):
    graph = Quantize(weight_bits=3)(random_graph(2, integer=False))
    record = graph.provenance.rounding["couple0-couple1-0.weight"]
    assert record.max_error > 0
    assert record.rms_error <= record.max_error
    assert record.clipped == 0


def test_all_zero_weights_are_defined(random_graph):
    graph = random_graph(0, integer=False)
    zero = msgspec.structs.replace(graph, tensors={name: frozen(np.zeros_like(t)) for name, t in graph.tensors.items()})
    verify(Quantize()(zero))


def test_options_out_of_range_are_refused(random_graph):
    graph = random_graph(0, integer=False)
    with pytest.raises(UsageError, match="weight_bits is 9: the chip has 2 to 8"):
        Quantize(weight_bits=9)(graph)
    with pytest.raises(GraphError, match="already in integers"):
        Quantize()(Quantize()(graph))
