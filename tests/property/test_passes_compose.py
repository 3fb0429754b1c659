"""Passes over drawn graphs: each leaves a graph that `verify` accepts, with the same spikes at every model step wherever exactness is claimed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import msgspec
import numpy as np
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st

from toolchain import codec, ir
from toolchain.errors import DesignRuleError
from toolchain.passes import Adjoint, Fold, Inject, Partition, Pipeline, Quantize, Retime
from toolchain.targets.reference import REFERENCE

SETTINGS = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def verified(rewrite, graph):
    made = rewrite(graph)
    ir.verify(made)
    return made


def histories(graph, inputs, error=None):
    """What every couple, relay and readout did at each step of the forward phase, and of the feedback phase where there is an `error`."""
    with replace(REFERENCE, trace=True).compile(graph) as run:
        phases = [run.run(inputs)]
        if error is not None:
            phases.append(run.run(error, phase="feedback"))
    return [phase.history for phase in phases]


def assert_same(before, after):
    for phase, (one, two) in enumerate(zip(before, after, strict=True)):
        assert one.keys() == two.keys()
        for name in one:
            where = f"of '{name}' in the {'feedback' if phase else 'forward'} phase"
            np.testing.assert_array_equal(one[name].spikes, two[name].spikes, err_msg=f"spikes {where}")
            np.testing.assert_array_equal(one[name].potentials, two[name].potentials, err_msg=f"potentials {where}")


def assert_same_spikes(graph, before, after):
    couples = {p.name for p in graph.of_kind("couple")}
    for phase, (one, two) in enumerate(zip(before, after, strict=True)):
        for name in couples:
            np.testing.assert_array_equal(
                one[name].spikes, two[name].spikes, err_msg=f"'{name}' in the {'feedback' if phase else 'forward'} phase"
            )


@SETTINGS
@given(data=st.data())
def test_fold_keeps_every_number(drawn, data):
    raw = data.draw(drawn.graphs(raw=True))
    inputs, error = data.draw(drawn.values(raw))
    folded = verified(Fold(), raw)
    assert_same(histories(Adjoint()(raw), inputs, error), histories(verified(Adjoint(), folded), inputs, error))
    for synapse in folded.phase("forward").synapses:
        assert len([op for op in synapse.ops if ir.weight_of(op) is not None]) == 1
        assert not any(isinstance(op, ir.Identity) or (isinstance(op, ir.Scale) and op.factor != 1) for op in synapse.ops)


@SETTINGS
@given(data=st.data())
def test_adjoint_is_the_backward_stage(drawn, independent, data):
    """In the model's own unit, y_s += (Ab_t / A_t) W^T (m q), firing at Vb and subtracting Ab (SPIDE); the pass measures the same in A / Ab."""
    graph = data.draw(drawn.graphs())
    inputs, error = data.draw(drawn.values(graph))
    made = verified(Adjoint(), graph)
    forward, feedback = histories(made, inputs, error)
    ours = independent.forward(graph, inputs)
    expected = independent.backward(graph, independent.masks(graph, ours), error)
    for found, trains in ((forward, ours), (feedback, expected)):
        for name in (p.name for p in graph.of_kind("couple")):
            stacked = np.stack(trains.spikes[name])
            np.testing.assert_array_equal(found[name].spikes.reshape(stacked.shape), stacked, err_msg=name)
    for name, trains in expected.potentials.items():
        stacked = np.stack(trains) * made.scale("feedback", name)
        np.testing.assert_array_equal(feedback[name].potentials.reshape(stacked.shape), stacked, err_msg=name)


@SETTINGS
@given(data=st.data())
def test_inject_keeps_every_number(drawn, data):
    declared = data.draw(drawn.graphs())
    inputs, error = data.draw(drawn.values(declared))
    graph = Adjoint()(declared)
    for mode in ("bias", "graded"):
        assert_same(histories(graph, inputs, error), histories(verified(Inject(mode), graph), inputs, error))


@SETTINGS
@given(data=st.data(), integer=st.booleans(), host=st.booleans())
def test_exact_timing_is_the_model_step(drawn, data, integer, host):
    """Skips of any length, relays, several loops, self-loops, delayed connections that run forward, events: the same at every step, clamps included."""
    graph = data.draw(drawn.graphs(integer=integer, extreme=integer and data.draw(st.booleans()), host=host))
    inputs, error = data.draw(drawn.values(graph))
    graph = graph if integer else Adjoint()(graph)
    retimed = verified(Retime("exact"), graph)
    assert all(synapse.delay >= 1 for phase in retimed.phases for synapse in phase.synapses)
    assert_same(histories(graph, inputs, error), histories(retimed, inputs, error))


CHIP = Pipeline((Fold(), Adjoint(), Inject(), Retime(), Quantize(input_levels=16), Partition()))


def injects_exactly(whole, floats, inputs, error):
    """Whether the 13-bit currents of both phases are the float ones."""
    pairs = [(codec.error_current(whole, error), codec.error_current(floats, error), "feedback", codec.error_drive(floats).population)]
    for one, two in zip(whole.phase("forward").drive, floats.phase("forward").drive, strict=True):
        pairs.append(
            (
                codec.input_current(whole, one, codec.encode_input(whole, inputs)),
                codec.input_current(floats, two, inputs),
                "forward",
                two.population,
            )
        )
    return all(np.array_equal(a, b * (whole.scale(phase, name) / floats.scale(phase, name))) for a, b, phase, name in pairs)


@SETTINGS
@given(data=st.data(), relays=st.booleans())
def test_quantize_keeps_every_spike_where_it_rounds_nothing(drawn, data, relays):
    """Weights of few bits and no leak: whole numbers hold them all, and the error. Relays, and connections of very different size, may leave too little room."""
    graph = data.draw(drawn.graphs(leaks=False, relays=relays))
    inputs, error = data.draw(drawn.values(graph, levels=1))
    try:
        whole = CHIP(graph)
    except DesignRuleError:
        reject()
    floats = Adjoint()(graph)
    rounded = [
        n for n, r in whole.provenance.rounding.items() if r.max_error and not n.startswith("readout") and not n.endswith(".current")
    ]
    exact = not rounded and injects_exactly(whole, Inject()(floats), inputs, error)
    if relays:
        assume(exact)
    assert exact
    assert_same_spikes(graph, histories(floats, inputs, error), histories(whole, inputs, error))


@SETTINGS
@given(data=st.data())
def test_every_prefix_of_the_pipeline_is_valid_and_deterministic(drawn, data):
    graph = data.draw(drawn.graphs(raw=True))
    seen = []

    def watch(name, before, after):
        ir.verify(after)
        seen.append(name)

    try:
        made = replace(CHIP, watch=watch)(graph)
    except DesignRuleError:  # weights or currents that no exponent of the chip holds
        assert seen in (["fold", "adjoint", "inject", "retime"], ["fold", "adjoint", "inject", "retime", "quantize"])
        return
    ir.verify(made)
    placed = {part.population for core in made.placement.cores for part in core.slices}
    assert placed == {population.name for population in made.populations if population.kind != "input"}
    assert seen == [p.name for p in CHIP.passes] == list(made.provenance.passes)
    again = CHIP(graph)
    assert msgspec.structs.replace(again, tensors={}) == msgspec.structs.replace(made, tensors={})
    for name, tensor in made.tensors.items():
        np.testing.assert_array_equal(tensor, again.tensors[name])
    for name, tensor in graph.tensors.items():
        assert not tensor.flags.writeable, f"{name} may be changed by a pass"


@SETTINGS
@given(data=st.data())
def test_partition_counts_whatever_is_connected(drawn, data):
    """Images flattened and made again, pooled, upsampled or transposed: graphs this small fit both chips, relays the second one."""
    graph = data.draw(drawn.graphs(integer=True, relays=False, host=True))
    assert verified(Partition("loihi1"), graph).placement.chip == "loihi1"
    graph = data.draw(drawn.graphs(integer=True))
    placed = verified(Partition("loihi2"), graph)
    assert msgspec.structs.replace(placed, placement=None) == graph


def test_the_draws_have_everything(drawn):
    """Otherwise the tests above would prove nothing about what is missing: each operation, relays, events, skips, every kind of delay, and masks of both kinds."""
    seen = Counter()

    @settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def look(data):
        graph = data.draw(drawn.graphs())
        inputs, error = data.draw(drawn.values(graph))
        place = {name: i for i, name in enumerate(graph.phase("forward").order)}
        seen.update(type(op).__name__ for s in graph.phase("forward").synapses for op in s.ops)
        seen["events"] += graph.of_kind("input")[0].events
        seen["relays"] += len(graph.of_kind("linear"))
        for synapse in graph.phase("forward").synapses:
            span = place[synapse.target] - place[synapse.source]
            seen["skip" if span > 1 else "step"] += synapse.delay == 0
            seen["self-loop" if span == 0 else "loop" if span < 0 else "late"] += synapse.delay
        forward, feedback = histories(Adjoint()(graph), inputs, error)
        for couple in graph.of_kind("couple"):
            counts = forward[couple.name].spikes.sum(axis=0)
            seen["open gates"] += int(((counts > 0) & (counts < len(forward[couple.name].spikes))).sum())
            seen["full rates"] += int((counts == len(forward[couple.name].spikes)).sum())
            seen["negative spikes"] += int((feedback[couple.name].spikes < 0).sum())

    look()
    operations = ["Dense", "Conv2d", "ConvTranspose2d", "AvgPool2d", "Upsample", "Scale"]
    wanted = [*operations, "events", "relays", "skip", "self-loop", "loop", "late", "open gates", "full rates", "negative spikes"]
    assert {name: seen[name] for name in wanted if seen[name] < 5} == {}
