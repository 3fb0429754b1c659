"""Errors by population: the copies are what they are said to be, and a fault planted in one connection is found where it is."""

from __future__ import annotations

import json
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain import codec, fixed
from toolchain.analysis.lockstep import Kept, Lockstep, alike
from toolchain.analysis.side_by_side import error, side_by_side
from toolchain.compiler import forward_only
from toolchain.errors import GraphError, UsageError
from toolchain.ir import Dense, Drive, Dynamics, Graph, Phase, Population, Provenance, Synapse, Units, frozen, verify
from toolchain.passes import Adjoint, Inject, Quantize, Retime
from toolchain.targets.reference import REFERENCE

MODES = ("step", "exact", "pipelined")


def both(graph, mode="step", bits=8):
    """The float graph in a timing, and the integer one made of it."""
    floats = graph if mode == "step" else Retime(mode)(graph)
    return floats, Quantize(weight_bits=bits)(floats)


def copies(floats, integers, inputs, labels):
    """What each copy leaves behind, by phase and copy, and the errors of the feedback phase."""
    run = Lockstep(floats, integers)
    kept = {phase.name: Kept(run, phase.name) for phase in floats.phases}
    run.forward(inputs, kept["forward"].watch, floats.phase("forward").time_steps)
    owners = ("float", "entire")
    results = {copy: kept["forward"].result(copy) for copy in owners}
    errors = {copy: error(run.graph(copy), results[copy], labels) for copy in owners}
    run.feedback(results, errors, kept["feedback"].watch, floats.phase("feedback").time_steps)
    return {name: {copy: one.result(copy) for copy in run.copies} for name, one in kept.items()}, errors


def assert_same(found, expected, *, exactly=True):
    for field in ("counts", "traces", "potentials"):
        ours, theirs = getattr(found, field), getattr(expected, field)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(
                ours[name], theirs[name], rtol=0 if exactly else 1e-9, atol=0 if exactly else 1e-9, err_msg=f"{field} of '{name}'"
            )


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    couples=st.integers(1, 4),
    leak=st.booleans(),
    graded=st.booleans(),
    mode=st.sampled_from(MODES),
    bits=st.integers(2, 8),
)
def test_each_copy_is_what_a_run_of_its_graph_returns(random_graph, random_inputs, seed, couples, leak, graded, mode, bits):
    floats, integers = both(random_graph(seed, couples=couples, leak=leak, graded=graded, integer=False), mode, bits)
    inputs, _ = random_inputs(floats, 3, seed)
    found, errors = copies(floats, integers, inputs, np.arange(3))
    for copy, graph in (("float", floats), ("entire", integers)):
        with REFERENCE.compile(graph) as run:
            # Leaks are no binary fractions: their products differ in the last bits between NumPy and torch.
            exactly = graph.integer or not leak
            assert_same(found["forward"][copy], run.run(inputs), exactly=exactly)
            assert_same(found["feedback"][copy], run.run(errors[copy], phase="feedback"), exactly=exactly)


def fed(graph, phase, heard, current, masks, samples):
    """Every population by itself in integer arithmetic, fed with the spikes `heard` of step-timed populations: counts and final potentials."""
    plan, made = graph.phase(phase), {}
    bias = codec.bias_currents(graph, plan)
    for name in plan.order:
        population = graph.population(name)
        if population.kind == "input":
            continue
        potential, count = np.zeros((samples, *population.shape), np.int64), 0
        for t in range(plan.time_steps):
            total = current.get(name, np.zeros_like(potential)) + sum((c for start, c in bias.get(name, ()) if t >= start), 0)
            for s in plan.synapses:
                if s.target == name and t >= s.delay:
                    spikes = heard[s.source][t - s.delay] * (1 if s.gate is None else masks[s.gate])
                    total = total + fixed.apply(s.ops, graph.tensors, spikes, population.shape, integer=True)
            step = fixed.step(potential, total, plan.dynamics[name], integer=True)
            potential, count = step.potential, count + step.spikes.astype(int)
        made[name] = count, potential
    return made


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**16), couples=st.integers(1, 4), leak=st.booleans(), graded=st.booleans(), mode=st.sampled_from(("step", "exact"))
)
def test_single_hears_the_float_graph_at_every_step_and_computes_in_integers(
    random_graph, random_inputs, seed, couples, leak, graded, mode
):
    """Against a loop of its own: also own loops, masks and errors are the float graph's."""
    graph = random_graph(seed, couples=couples, leak=leak, graded=graded, integer=False)
    inputs, _ = random_inputs(graph, 3, seed)
    found, errors = copies(*both(graph, mode, 4), inputs, np.arange(3))
    integers = Quantize(weight_bits=4)(graph)
    with replace(REFERENCE, trace=True).compile(graph) as run:
        forward = run.run(inputs)
        histories = {"forward": forward.history, "feedback": run.run(errors["float"], phase="feedback").history}
    encoded = codec.encode_input(integers, inputs)
    heard = {phase: {name: history.spikes for name, history in each.items()} for phase, each in histories.items()}
    heard["forward"]["input"] = np.repeat(encoded[None], graph.phase("forward").time_steps, axis=0)
    currents = {
        "forward": {d.population: codec.input_current(integers, d, encoded) for d in integers.phase("forward").drive},
        "feedback": {d.population: codec.error_current(integers, errors["float"]) for d in integers.phase("feedback").drive},
    }
    masks = {p.name: codec.mask(graph, forward, p.name) for p in graph.of_kind("couple")}
    for phase, each in currents.items():
        for name, (count, potential) in fed(integers, phase, heard[phase], each, masks if phase == "feedback" else {}, 3).items():
            np.testing.assert_array_equal(found[phase]["single"].counts[name], count, err_msg=f"{phase} {name}")
            np.testing.assert_array_equal(found[phase]["single"].potentials[name], potential, err_msg=f"{phase} {name}")


def chain(widths=(24, 20, 16), inputs=12, seed=0, loop=0.4):
    """Couples one behind the other with a weak loop from the last to the first, in the model's unit; rates lie in the middle."""
    draw = np.random.default_rng(seed)
    names = [f"couple{i}" for i in range(len(widths))]
    tensors = {}

    def dense(key, out, into, size=1.0):
        tensors[key] = frozen(draw.normal(size=(out, into)) * size * 2 / np.sqrt(into) + size / into)
        return (Dense(key),)

    synapses = [Synapse("input", names[0], dense("first", widths[0], inputs))]
    synapses += [Synapse(a, b, dense(f"{a}-{b}", n, m)) for a, b, m, n in zip(names, names[1:], widths, widths[1:], strict=False)]
    synapses += [
        Synapse(names[-1], names[0], dense("loop", widths[0], widths[-1], loop), 1),
        Synapse(names[-1], "readout", dense("out", 5, widths[-1])),
    ]
    forward = Phase(
        "forward",
        40,
        ("input", *names, "readout"),
        dict.fromkeys(names, Dynamics(1.0, 0.5, 1.0, "plus")) | {"readout": Dynamics(1.0)},
        tuple(synapses),
    )
    feedback = Phase(
        "feedback",
        60,
        tuple(reversed(names)),
        dict.fromkeys(names, Dynamics(1.0, 0.25, 0.5, "both")),
        (),
        drive=(Drive(names[-1], "error", gain=100.0),),
    )
    populations = (
        Population("input", (inputs,), "input"),
        *(Population(n, (w,), "couple") for n, w in zip(names, widths, strict=True)),
        Population("readout", (5,), "readout"),
    )
    graph = Adjoint()(Graph(populations, (forward, feedback), tensors, Units("float", {"forward": {"input": 1.0}}), Provenance("chain")))
    verify(graph)
    return graph


def coarse(graph, name):
    """The graph with one tensor of 2 bits: -1, 0 or 1 times its largest value."""
    weight = graph.tensors[name]
    unit = np.abs(weight).max()
    return msgspec.structs.replace(graph, tensors={**graph.tensors, name: frozen(np.clip(np.rint(weight / unit * 2), -1, 1) * unit / 2)})


def planted(name, seed=0):
    """What is found where the integer graph of `chain` has one connection of 2 bits, all others 8."""
    graph = chain(seed=seed)
    faulty = Quantize()(Retime()(Inject()(coarse(graph, name))))
    draw = np.random.default_rng(seed)
    found = side_by_side(graph, faulty, draw.integers(0, 256, (32, 12)) / 255, draw.integers(0, 5, 32))
    return found.populations, {(row.phase, row.population): row for row in found.populations.rows}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("tensor", "population"),
    [("first", "couple0"), ("couple0-couple1", "couple1"), ("couple1-couple2", "couple2"), ("loop", "couple0"), ("out", "readout")],
)
def test_the_single_error_points_to_the_population_whose_connection_is_coarse(tensor, population, seed):
    found, rows = planted(tensor, seed)
    assert found.made().population == population
    faulty = rows["forward", population]
    others = [row.single.relative for (phase, name), row in rows.items() if phase == "forward" and name != population]
    assert faulty.single.relative > 5 * max(others)
    assert f"integers err most in '{population}' (single error" in found.sentence()


def test_the_entire_error_shows_in_all_that_comes_after_and_comes_round_the_loop():
    _, rows = planted("couple0-couple1")
    for name in ("couple1", "couple2", "readout"):
        assert rows["forward", name].entire.relative > 0.02
    for name in ("couple0", "couple2", "readout"):
        assert rows["forward", name].single.relative < 0.01
        assert rows["forward", name].entire.relative > 3 * rows["forward", name].single.relative


def test_the_feedback_phase_blames_the_population_that_the_transposed_connection_reaches():
    found, rows = planted("couple1-couple2")
    assert found.made("feedback").population == "couple1"
    assert rows["feedback", "couple2"].single.relative < 0.2 * rows["feedback", "couple1"].single.relative


def twin(graph):
    """The forward phase of an integer graph with graded input, its whole numbers as floats."""
    plan = graph.phase("forward")
    exponents = {op.weight: op.exponent for s in plan.synapses for op in s.ops}
    levels = {op.weight: graph.scale("forward", "input") if s.source == "input" else 1 for s in plan.synapses for op in s.ops}
    tensors = {name: frozen(graph.tensors[name] * 2.0**e * levels[name]) for name, e in exponents.items()}
    synapses = tuple(msgspec.structs.replace(s, ops=tuple(msgspec.structs.replace(op, exponent=0) for op in s.ops)) for s in plan.synapses)
    phase = msgspec.structs.replace(plan, synapses=synapses)
    units = Units("float", {"forward": {**graph.units.scale["forward"], "input": 1.0}})
    return msgspec.structs.replace(graph, tensors=tensors, phases=(phase,), units=units, placement=None)


def test_integers_that_are_the_floats_err_nowhere():
    integers = forward_only(Quantize(weight_bits=5)(Retime()(chain())))
    draw = np.random.default_rng(1)
    found = side_by_side(twin(integers), integers, draw.integers(0, 2, (16, 12)), draw.integers(0, 5, 16))
    for row in found.populations.rows:
        assert row.mean > 0
        for gap in (row.entire, row.single):
            assert (gap.difference, gap.relative, gap.off or 0, gap.potential, gap.worst) == (0, 0, 0, 0, ())
    assert found.populations.made() is None
    assert found.populations.sentence() == "no population errs in the forward phase: integers and floats agree on 16 samples"
    one, other = found.settling.curves
    assert one.residual.keys() == other.residual.keys()
    for name, residual in one.residual.items():
        assert residual == pytest.approx(other.residual[name])


def test_the_worst_neuron_is_the_one_whose_weights_are_wrong():
    graph = chain()
    weight = graph.tensors["couple0-couple1"].copy()
    weight[13] = 0
    faulty = msgspec.structs.replace(graph, tensors={**graph.tensors, "couple0-couple1": frozen(weight)})
    draw = np.random.default_rng(0)
    found = side_by_side(graph, Quantize()(Retime()(Inject()(faulty))), draw.random((16, 12)), draw.integers(0, 5, 16)).populations
    row = next(r for r in found.rows if (r.phase, r.population) == ("forward", "couple1"))
    assert row.single.worst[0].place == (13,)
    assert row.single.worst[0].difference > 10 * row.single.worst[1].difference
    assert 0 < row.single.off <= 1 / 20 + 0.01  # one neuron of 20


def test_chunks_of_samples_add_up(monkeypatch):
    graph = chain()
    integers = Quantize(weight_bits=4)(Retime()(Inject()(graph)))
    draw = np.random.default_rng(0)
    inputs, labels = draw.random((10, 12)), draw.integers(0, 5, 10)
    whole = side_by_side(graph, integers, inputs, labels)
    monkeypatch.setattr("toolchain.analysis.side_by_side.AT_ONCE", 3 * 3 * sum(np.prod(p.shape) for p in graph.populations))
    pieces = side_by_side(graph, integers, inputs, labels)
    for a, b in zip(whole.populations.rows, pieces.populations.rows, strict=True):
        assert a.single.difference == pytest.approx(b.single.difference)
        assert a.entire.potential == pytest.approx(b.entire.potential)
    for one, other in zip(whole.settling.curves, pieces.settling.curves, strict=True):
        assert one.whole == pytest.approx(other.whole, rel=1e-4, abs=1e-7)
        assert one.accuracy == other.accuracy
        assert one.cosine is None or one.cosine == pytest.approx(other.cosine, abs=1e-4)


def test_what_is_found_is_plain_json_and_text():
    found, _ = planted("first")
    read = json.loads(json.dumps(found.to_json()))
    assert read["worst"]["forward"]["single"] == "couple0"
    assert {"phase", "population", "kind", "mean", "entire", "single"} == set(read["populations"][0])
    assert "error by population against the float graph" in found.to_text()
    assert "32 samples, forward 40 time steps, feedback 60 time steps" in found.to_text()


def test_graphs_that_differ_by_more_than_numbers_are_refused():
    graph = chain()
    other = Quantize()(Inject()(chain(widths=(24, 20))))
    with pytest.raises(GraphError, match="differ in the forward phase by more than numbers"):
        alike(graph, other)
    with pytest.raises(GraphError, match="in this order"):
        Lockstep(other, other)
    with pytest.raises(UsageError, match="one label a sample"):
        side_by_side(graph, None, np.zeros((3, 12)), np.zeros(2, int))


def test_large_networks_run_fewer_samples_in_their_own_time(monkeypatch):
    graph = chain()
    monkeypatch.setattr("toolchain.analysis.side_by_side.WORK", 1)
    draw = np.random.default_rng(0)
    found = side_by_side(graph, None, draw.random((10, 12)), draw.integers(0, 5, 10))
    assert found.populations is None
    assert found.settling.samples == 4
    assert [curve.steps[-1] for curve in found.settling.curves] == [40, 60]
