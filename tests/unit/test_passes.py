"""The pipeline and its passes: valid in, valid out, and every failure says where."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from toolchain.errors import GraphError, UsageError
from toolchain.ir import Dense, Identity, Scale, frozen
from toolchain.passes import LOIHI_PIPELINE, Adjoint, Fold, Inject, Pipeline, Retime

change = msgspec.structs.replace


def forward_only_declared(graph):
    """The float graph as `lower` makes it: the feedback phase declared, without synapses."""
    feedback = change(graph.phase("feedback"), synapses=())
    return change(graph, phases=(graph.phase("forward"), feedback), units=change(graph.units, scale={}))


def test_adjoint_transposes_every_connection_between_couples(random_graph):
    graph = forward_only_declared(random_graph(3, couples=3, integer=False, numbers="silent"))
    adjoint = Adjoint()(graph)
    couples = {p.name for p in graph.of_kind("couple")}
    forward = [s for s in graph.phase("forward").synapses if s.source in couples and s.target in couples]
    found = adjoint.phase("feedback").synapses
    assert {(s.target, s.source, s.delay, s.ops[0].weight) for s in found} == {
        (s.source, s.target, s.delay, s.ops[0].weight) for s in forward
    }
    assert all(s.gate == s.source and s.ops[0].transpose for s in found)
    assert adjoint.phase("feedback").order == tuple(reversed([n for n in graph.phase("forward").order if n in couples]))


def test_adjoint_needs_one_reset_ratio(random_graph):
    graph = forward_only_declared(random_graph(3, couples=3, widths=(4, 4, 4), skips=False, integer=False))
    phase = graph.phase("forward")
    dynamics = {n: change(d, reset=float(i + 1)) for i, (n, d) in enumerate(phase.dynamics.items())}
    loops = (*phase.synapses, change(phase.synapses[1], source="couple0", target="couple2"))
    uneven = change(graph, phases=(change(phase, dynamics=dynamics, synapses=loops), graph.phase("feedback")))
    with pytest.raises(GraphError, match="feeds populations whose resets have different ratios"):
        Adjoint()(uneven)


def test_fold_merges_scales_and_keeps_shared_tensors(random_graph):
    graph = random_graph(1, couples=1, widths=(3,), integer=False, skips=False, graded=True)
    phase = graph.phase("forward")
    first = phase.synapses[0]
    scaled = change(first, ops=(Scale(0.5), Identity(), *first.ops))
    folded = Fold()(change(graph, phases=(change(phase, synapses=(scaled, *phase.synapses[1:])), *graph.phases[1:])))
    (op,) = folded.phase("forward").synapses[0].ops
    assert isinstance(op, Dense)
    np.testing.assert_array_equal(folded.tensors[op.weight], graph.tensors[first.ops[0].weight] * 0.5)
    assert first.ops[0].weight not in folded.tensors


def test_inject_moves_the_first_connection_and_its_bias_to_the_host(random_graph):
    graph = random_graph(1, couples=2, integer=False, graded=True, skips=False)
    start = {name: tuple(change(b, start=0) for b in biases) for name, biases in graph.phase("forward").bias.items()}
    graph = change(graph, phases=(change(graph.phase("forward"), bias=start), *graph.phases[1:]))
    injected = Inject()(graph).phase("forward")
    assert "input" not in injected.order
    assert injected.drive[0].population == "couple0"
    assert injected.drive[0].bias == "couple0.bias"
    assert "couple0" not in injected.bias
    assert Inject("graded")(graph) == graph


def test_retime_runs_once_and_gives_loops_their_turns(random_graph):
    graph = random_graph(0, couples=3, skips=False)
    exact = Retime()(graph)
    assert exact.phase("forward").timing.period == 3
    assert exact.phase("forward").ticks == 2 + 3 * (graph.phase("forward").time_steps - 1) + 1 + 1 + 1
    assert all(s.delay >= 1 for phase in exact.phases for s in phase.synapses)
    with pytest.raises(GraphError, match="already in exact timing"):
        Retime()(exact)


def test_a_failing_pass_is_named_with_those_before_it(random_graph):
    def broken(graph):
        return change(graph, tensors={name: frozen(np.full_like(t, np.nan)) for name, t in graph.tensors.items()})

    class Broken:
        name = "broken"

        def __call__(self, graph):
            return broken(graph)

    with pytest.raises(GraphError, match=r"pass 'broken' \(after fold, retime\): tensor .* NaN"):
        Pipeline((Fold(), Retime(), Broken()))(random_graph(0, integer=False))


def test_unknown_passes_and_options_list_the_known(random_graph):
    with pytest.raises(UsageError, match="unknown pass 'quantise': choose one of adjoint, fold, inject, partition, quantize, retime"):
        LOIHI_PIPELINE.with_options(quantise={"weight_bits": 4})
    with pytest.raises(UsageError, match="pass 'quantize' has no option 'bits': it has weight_bits, input_levels"):
        LOIHI_PIPELINE.with_options(quantize={"bits": 4})


def test_watch_sees_every_pass(random_graph):
    seen = []
    pipeline = Pipeline((Fold(), Retime()), watch=lambda name, before, after: seen.append((name, before is not after)))
    pipeline(random_graph(0))
    assert seen == [("fold", True), ("retime", True)]
