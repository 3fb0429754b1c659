"""The switchable run at its two ends: with every switch on it is the integer graph, spike for spike and bit for bit; with none it is the float graph."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from toolchain import codec
from toolchain.analysis.factors import SWITCHES, Switchboard, differences
from toolchain.errors import DesignRuleError
from toolchain.ir import Bias, Calibration, Units, exponent_of, frozen, weight_of
from toolchain.passes import Adjoint, Fold, Inject, Pipeline, Quantize, Retime, grids
from toolchain.targets.reference import REFERENCE

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def both_ends(board, inputs, error):
    """Both phases of the run with every switch on, and of the integer graph on the reference."""
    forward = board.forward(SWITCHES, codec.check_inputs(board.integers, inputs), trace=True)
    feedback = board.feedback(SWITCHES, forward, codec.check_error(board.integers, error), trace=True)
    with replace(REFERENCE, trace=True).compile(board.integers) as run:
        return (forward, run.run(inputs)), (feedback, run.run(error, phase="feedback"))


def narrow(graph, room):
    """A calibration that saw `room` (of 1.0) of every potential and current: whatever goes farther is held and cut."""
    potential = {p.name: {n: room for n in p.order if graph.population(n).kind != "input"} for p in graph.phases}
    return Calibration("drawn", 1, potential, {drive.population: room for drive in graph.phase("forward").drive})


@SETTINGS
@given(
    data=st.data(),
    bits=st.sampled_from([2, 3, 5, 8]),
    levels=st.sampled_from([None, 1, 6]),
    mode=st.sampled_from(["exact", "pipelined"]),
    inject=st.sampled_from(["bias", "graded"]),
    room=st.sampled_from([None, 0.5, 2.0**-7]),
)
def test_with_every_switch_on_the_run_is_the_integer_graph(drawn, data, bits, levels, mode, inject, room):
    declared = data.draw(drawn.graphs())
    inputs, error = data.draw(drawn.values(declared))
    floats = Pipeline((Fold(), Adjoint()))(declared)
    timed = Pipeline((Inject(inject), Retime(mode)))(floats)
    try:
        integers = Quantize(bits, levels, None if room is None else narrow(timed, room))(timed)
    except DesignRuleError:
        reject()
    for ours, whole in both_ends(Switchboard(floats, integers), inputs, error * 3):
        assert differences(ours, whole)[0] == 0
        for name in whole.counts:
            np.testing.assert_array_equal(ours.counts[name], whole.counts[name])
            np.testing.assert_array_equal(ours.traces[name], whole.traces[name])


def decoded(graph, rough=None):
    """A float graph that a step-timed integer one could have been made of: its own numbers, or with `rough` others within a tenth of them."""
    tensors = dict(graph.tensors)
    (source,) = graph.of_kind("input")
    levels = graph.scale("forward", source.name)

    def keep(name, values):
        tensors[name] = frozen(values if rough is None else values * rough.uniform(0.9, 1.1, values.shape))
        return name

    def float_phase(phase):
        synapses = []
        for i, s in enumerate(phase.synapses):
            factor = 2.0 ** exponent_of(s.ops) * grids.area(s.ops) * (levels if s.source == source.name else 1)
            name = keep(f"{phase.name}.{i}", graph.tensors[grids.the_weight(s.ops)] * factor)
            ops = tuple(op if weight_of(op) is None else msgspec.structs.replace(op, weight=name) for op in s.ops)
            synapses.append(msgspec.structs.replace(s, ops=ops))
        bias = {
            name: tuple(Bias(keep(b.tensor, graph.tensors[b.tensor] * 2.0**b.exponent), start=b.start) for b in several)
            if name != "readout"
            else several
            for name, several in phase.bias.items()
        }
        for drive in phase.drive:
            if drive.source == "input":
                factor = 2.0 ** (drive.exponent - drive.shift)
                weight = grids.the_weight(drive.ops)
                keep(weight, graph.tensors[weight] * factor * levels * grids.area(drive.ops))
                if drive.bias is not None:
                    keep(drive.bias, graph.tensors[drive.bias] * factor)
        return msgspec.structs.replace(phase, synapses=tuple(synapses), bias=bias)

    units = Units("float", graph.units.scale)
    return msgspec.structs.replace(graph, phases=tuple(map(float_phase, graph.phases)), tensors=tensors, units=units)


@SETTINGS
@given(data=st.data(), extreme=st.booleans(), host=st.booleans(), mode=st.sampled_from(["exact", "pipelined"]))
def test_integers_that_no_quantizer_made_end_as_they_are(drawn, data, extreme, host, mode):
    """Thresholds at the 24-bit limit, shifts of their own, loops of relays that saturate."""
    integers = data.draw(drawn.graphs(integer=True, extreme=extreme, host=host))
    inputs, error = data.draw(drawn.values(integers))
    floats = decoded(integers, np.random.default_rng(0))
    for ours, whole in both_ends(Switchboard(floats, Retime(mode)(integers)), inputs, error):
        assert differences(ours, whole)[0] == 0


def test_where_integers_are_the_floats_no_switch_is_on(random_graph):
    assert Switchboard(decoded(random_graph(3)), random_graph(3)).static == frozenset()


@pytest.mark.parametrize("mode", ["exact", "pipelined"])
@pytest.mark.parametrize("leak", [False, True])
def test_currents_that_are_cut_and_potentials_that_saturate_are_the_integer_graphs_too(random_graph, random_inputs, mode, leak):
    cut = held = 0
    for seed in range(6):
        integers = random_graph(seed, leak=leak, numbers="saturating")
        inputs, error = random_inputs(integers, 4, seed)
        for ours, whole in both_ends(Switchboard(decoded(integers), Retime(mode)(integers)), inputs, error * 1e9):
            assert differences(ours, whole)[0] == 0
            held += sum(int(s.sum()) for s in whole.saturations.values())
        cut += codec.clipped_currents(integers, inputs)
    assert cut > 0
    assert held > 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    couples=st.integers(1, 3),
    leak=st.booleans(),
    graded=st.booleans(),
    mode=st.sampled_from(["exact", "pipelined"]),
)
def test_with_no_switch_on_the_run_is_the_float_graph(random_graph, random_inputs, seed, couples, leak, graded, mode):
    """In other units, so potentials agree up to the last bits of float64 and spikes do, since no potential of these lies on a threshold."""
    graph = random_graph(seed, couples=couples, leak=leak, graded=graded, integer=False)
    rough = np.random.default_rng(seed)
    tensors = {name: frozen(tensor * rough.uniform(0.9, 1.1, tensor.shape)) for name, tensor in graph.tensors.items()}
    floats = msgspec.structs.replace(graph, tensors=tensors)
    inputs, error = random_inputs(floats, 4, seed)
    board = Switchboard(floats, Quantize(4)(Retime(mode)(floats)))
    forward = board.forward((), codec.check_inputs(floats, inputs), trace=True)
    feedback = board.feedback((), forward, codec.check_error(floats, error), trace=True)
    with replace(REFERENCE, trace=True).compile(floats) as run:
        expected = (run.run(inputs), run.run(error, phase="feedback"))
    for ours, theirs in zip((forward, feedback), expected, strict=True):
        for name, history in theirs.history.items():
            np.testing.assert_array_equal(ours.history[name].spikes, history.spikes)
            unit = board.integers.scale(theirs.phase, name) / floats.scale(theirs.phase, name)
            np.testing.assert_allclose(ours.history[name].potentials / unit, history.potentials, atol=1e-9)
    np.testing.assert_allclose(codec.logits(board.graph(()), forward), codec.logits(floats, expected[0]), atol=1e-9)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_fault_in_any_switch_opens_the_closing_check(random_graph, random_inputs, switch):
    """The check is no formality: leave out one switch that matters here and it fails."""
    integers = random_graph(1, couples=3, leak=True, numbers="saturating" if switch in ("clipping", "saturation") else "plain")
    inputs, _ = random_inputs(integers, 6, 1)
    draw = np.random.default_rng(0)
    floats = decoded(integers, draw)
    forward = floats.phase("forward")
    other = {name: msgspec.structs.replace(d, leak=0.85, threshold=d.threshold * 1.1) for name, d in forward.dynamics.items()}
    floats = msgspec.structs.replace(floats, phases=(msgspec.structs.replace(forward, dynamics=other), *floats.phases[1:]))
    board = Switchboard(floats, Retime("pipelined")(integers))
    assert board.static == {"weights", "thresholds", "leak", "timing"}
    values = codec.check_inputs(integers, np.clip(inputs + draw.uniform(0, 1e-3, inputs.shape), 0, 1))
    with replace(REFERENCE, trace=True).compile(board.integers) as run:
        whole = run.run(values)
    assert differences(board.forward(SWITCHES, values, trace=True), whole)[0] == 0
    assert differences(board.forward([s for s in SWITCHES if s != switch], values, trace=True), whole)[0] > 0
