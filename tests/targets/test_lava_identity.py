"""lava-sim computes what `reference` computes: every spike, potential and saturation, both phases, fixed and floating point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolchain import target
from toolchain.errors import DesignRuleError, UsageError
from toolchain.ir import Dense, Graph, Synapse
from toolchain.passes import Adjoint
from toolchain.passes.retime import Retime
from toolchain.targets.lava_sim import LAVA_SIM, LAVA_SIM_FLOAT, LavaSim
from toolchain.targets.reference import Reference

lava = pytest.mark.skipif(LAVA_SIM.available() is not None, reason=str(LAVA_SIM.available()))
REFERENCE = Reference(trace=True)
KINDS = ("plain", "extreme", "positive", "saturating", "silent")


def _compared(graph: Graph, sim: LavaSim, inputs: Any, errors: Any, assert_identical: Callable[..., None], rounds: int = 1) -> None:
    expected = REFERENCE.compile(graph)
    with sim.compile(graph) as run:
        for _ in range(rounds):
            assert_identical(run.run(inputs), expected.run(inputs))
            assert_identical(run.run(errors, phase="feedback"), expected.run(errors, phase="feedback"))


@lava
@pytest.mark.lava
@pytest.mark.parametrize("synapses", ["own", "stock"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10_000),
    couples=st.integers(1, 4),
    integer=st.booleans(),
    leak=st.booleans(),
    numbers=st.sampled_from(KINDS),
    graded=st.booleans(),
    mode=st.sampled_from(["exact", "pipelined"]),
)
def test_any_graph_is_identical(
    random_graph: Any,
    random_inputs: Any,
    assert_identical: Any,
    synapses: Any,
    seed: int,
    couples: int,
    integer: bool,
    leak: bool,
    numbers: str,
    graded: bool,
    mode: Any,
) -> None:
    graph = random_graph(seed, couples=couples, integer=integer, leak=leak, numbers=numbers, graded=graded, time_steps=5, feedback_steps=6)
    inputs, errors = random_inputs(graph, 4, seed)
    sim = LavaSim(batch=3 if synapses == "own" else 1, synapses=synapses, trace=True)
    _compared(Retime(mode)(graph), sim, inputs, errors, assert_identical)


@lava
@pytest.mark.lava
@pytest.mark.parametrize("synapses", ["own", "stock"])
def test_saturation_is_reached_and_identical(random_graph: Any, random_inputs: Any, assert_identical: Any, synapses: Any) -> None:
    graph = Retime("exact")(random_graph(1, couples=2, numbers="saturating"))
    inputs, errors = random_inputs(graph, 3)
    assert sum(int(s.sum()) for s in REFERENCE.compile(graph).run(inputs).saturations.values()) > 0
    _compared(graph, LavaSim(synapses=synapses, trace=True), inputs, errors, assert_identical)


@lava
@pytest.mark.lava
@pytest.mark.parametrize("integer", [True, False])
def test_phases_alternate_over_ragged_batches(random_graph: Any, random_inputs: Any, assert_identical: Any, integer: bool) -> None:
    """11 samples in batches of 4, twice: nothing of one phase, sample or round reaches the next."""
    graph = Retime("exact")(random_graph(6, couples=2, integer=integer, leak=True))
    inputs, errors = random_inputs(graph, 11)
    _compared(graph, LavaSim(batch=4, trace=True), inputs, errors, assert_identical, rounds=2)


@lava
@pytest.mark.lava
@pytest.mark.parametrize("slots", [1, 2])
def test_long_calls_take_several_runs(
    random_graph: Any, random_inputs: Any, assert_identical: Any, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    from toolchain.targets.lava_sim import compile as lava_compile

    monkeypatch.setattr(lava_compile, "MAX_SLOTS", slots)
    graph = Retime("pipelined")(random_graph(7, couples=2))
    inputs, errors = random_inputs(graph, 23)
    _compared(graph, LavaSim(batch=3, trace=True), inputs, errors, assert_identical)


@lava
@pytest.mark.lava
def test_single_neurons(random_graph: Any, random_inputs: Any, assert_identical: Any) -> None:
    graph = Retime("exact")(random_graph(2, couples=3, widths=(1, 1, 1), inputs=1, classes=1))
    inputs, errors = random_inputs(graph, 5)
    _compared(graph, LavaSim(trace=True), inputs, errors, assert_identical)


@lava
@pytest.mark.lava
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("leak", [True, False])
def test_exact_float_equals_the_model_step(random_graph: Any, random_inputs: Any, seed: int, leak: bool) -> None:
    """Floating-point processes in exact timing give the spikes of the graph before retime, computed in float64 on the host."""
    graph = random_graph(seed, couples=seed, integer=False, leak=leak)
    inputs, errors = random_inputs(graph, 6, seed)
    model = REFERENCE.compile(graph)
    with LavaSim(name="lava-sim-float", trace=True).compile(Retime("exact")(graph)) as run:
        for phase, given_ in (("forward", inputs), ("feedback", errors)):
            ours, theirs = run.run(given_, phase=phase), model.run(given_, phase=phase)
            for name, history in theirs.history.items():
                np.testing.assert_array_equal(ours.history[name].spikes, history.spikes)
                np.testing.assert_allclose(ours.history[name].potentials, history.potentials, rtol=0, atol=1e-12)
                np.testing.assert_allclose(ours.traces[name], theirs.traces[name], rtol=0, atol=1e-12)


@lava
@pytest.mark.lava
def test_forward_only_network(random_graph: Any, random_inputs: Any, assert_identical: Any) -> None:
    graph = Retime("exact")(random_graph(4, couples=2))
    inputs, errors = random_inputs(graph, 5)
    with LavaSim(phases=("forward",), trace=True).compile(graph) as run:
        assert_identical(run.run(inputs), REFERENCE.compile(graph).run(inputs))
        with pytest.raises(UsageError, match="compile it with phase 'feedback'"):
            run.run(errors, phase="feedback")


@lava
@pytest.mark.lava
def test_feedback_needs_the_same_samples(random_graph: Any, random_inputs: Any) -> None:
    graph = Retime("exact")(random_graph(4, couples=1))
    inputs, errors = random_inputs(graph, 5)
    with LAVA_SIM.compile(graph) as run:
        with pytest.raises(UsageError, match="run phase 'forward'"):
            run.run(errors, phase="feedback")
        run.run(inputs)
        with pytest.raises(UsageError, match="had 5"):
            run.run(errors[:4], phase="feedback")


@lava
@pytest.mark.lava
def test_lava_works_after_torch_ran_in_the_parent(random_graph: Any, random_inputs: Any, assert_identical: Any) -> None:
    import torch

    torch.randn(256, 256) @ torch.randn(256, 256)
    graph = Retime("exact")(random_graph(8, couples=2))
    inputs, errors = random_inputs(graph, 5)
    _compared(graph, LavaSim(trace=True), inputs, errors, assert_identical)


@lava
@pytest.mark.lava
def test_two_networks_at_once(random_graph: Any, random_inputs: Any, assert_identical: Any) -> None:
    graphs = [Retime("exact")(random_graph(seed, couples=1)) for seed in (1, 2)]
    inputs = [random_inputs(graph, 3)[0] for graph in graphs]
    sim = LavaSim(trace=True, phases=("forward",))
    with sim.compile(graphs[0]) as first, sim.compile(graphs[1]) as second:
        for run, graph, given_ in ((first, graphs[0], inputs[0]), (second, graphs[1], inputs[1]), (first, graphs[0], inputs[0])):
            assert_identical(run.run(given_), REFERENCE.compile(graph).run(given_))


@lava
@pytest.mark.lava
@pytest.mark.parametrize(
    ("name", "numbers", "leak", "mode"),
    [
        ("strides", "extreme", 1.0, "exact"),
        ("strides", "negative", 0.75, "pipelined"),
        ("pools", "positive", 1.0, "exact"),
        ("pools", "saturating", 1.0, "pipelined"),
        ("residual", "extreme", 0.75, "exact"),
        ("relay at the end", "saturating", 1.0, "exact"),
        ("events", "always", 1.0, "exact"),
        ("events", "silent", 1.0, "exact"),
        ("single", "saturating", 0.75, "exact"),
    ],
)
def test_every_operation_at_its_limits_is_identical(
    network_graph: Any, network_inputs: Any, assert_identical: Any, name: str, numbers: str, leak: float, mode: Any
) -> None:
    graph = Retime(mode)(network_graph(name, numbers, leak=leak))
    _compared(graph, LavaSim(batch=2, trace=True), *network_inputs(graph, 5), assert_identical)


@lava
@pytest.mark.lava
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data(), integer=st.booleans(), extreme=st.booleans(), host=st.booleans(), mode=st.sampled_from(["exact", "pipelined"]))
def test_any_drawn_graph_is_identical(
    drawn: Any, assert_identical: Any, data: Any, integer: bool, extreme: bool, host: bool, mode: Any
) -> None:
    """Branches, skips, relays, loops and compositions of every operation, in integers and in floats of few bits."""
    graph = data.draw(drawn.graphs(integer=integer, extreme=extreme, host=host))
    inputs, errors = data.draw(drawn.values(graph))
    _compared(Retime(mode)(graph if integer else Adjoint()(graph)), LavaSim(batch=2, trace=True), inputs, errors, assert_identical)


def test_targets_are_found_by_name_without_importing_lava() -> None:
    assert target.get("lava-sim") is LAVA_SIM
    assert target.get("lava-sim-float") is LAVA_SIM_FLOAT
    with pytest.raises(UsageError, match="lava-sim-float"):
        target.get("lava")


def _with_synapse(graph: Graph, phase: str, **fields: Any) -> Graph:
    """The graph with fields of the first synapse of a phase replaced."""

    def changed(synapses: tuple[Synapse, ...]) -> tuple[Synapse, ...]:
        return (msgspec.structs.replace(synapses[0], **fields), *synapses[1:])

    phases = tuple(msgspec.structs.replace(p, synapses=changed(p.synapses)) if p.name == phase else p for p in graph.phases)
    return msgspec.structs.replace(graph, phases=phases)


def test_check_says_what_does_not_fit(random_graph: Any) -> None:
    stepwise = random_graph(3, couples=3, skips=False)
    graph = Retime("exact")(stepwise)
    assert LAVA_SIM.check(graph) == []
    assert "run the retime pass" in LAVA_SIM.check(stepwise)[0]
    with pytest.raises(UsageError, match="use batch 1"):
        LavaSim(synapses="stock", batch=2)
    assert "can only gate its own" in " ".join(LAVA_SIM.check(_with_synapse(graph, "feedback", gate="couple1")))
    assert "at least one tick" in LAVA_SIM.check(_with_synapse(graph, "forward", delay=0))[0]
    (op,) = graph.phase("forward").synapses[0].ops
    assert isinstance(op, Dense)
    assert "must lie in 0..7" in LAVA_SIM.check(_with_synapse(graph, "forward", ops=(msgspec.structs.replace(op, exponent=9),)))[0]
    forward_only = msgspec.structs.replace(graph, phases=graph.phases[:1])
    assert LAVA_SIM.check(forward_only) == []
    assert "no feedback phase to build" in LavaSim(phases=("forward", "feedback")).check(forward_only)[0]


@lava
@pytest.mark.lava
def test_compile_refuses_what_check_finds(random_graph: Any) -> None:
    with pytest.raises(DesignRuleError, match="run the retime pass"):
        LAVA_SIM.compile(random_graph(3))


def test_missing_lava_is_one_sentence_with_the_command(monkeypatch: pytest.MonkeyPatch, random_graph: Any) -> None:
    monkeypatch.setattr("toolchain.targets.lava_sim.find_spec", lambda name: None)
    sentence = LAVA_SIM.available()
    assert sentence is not None
    assert "pip install" in sentence
    with pytest.raises(UsageError, match="pip install"):
        LAVA_SIM.compile(Retime()(random_graph(3)))
