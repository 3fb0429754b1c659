"""`verify` refuses every invalid graph with one sentence that names the place."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from toolchain.errors import GraphError
from toolchain.ir import AvgPool2d, Dense, Dynamics, Graph, Phase, Population, Provenance, Scale, Synapse, Units, frozen, verify

change = msgspec.structs.replace


def with_phase(graph, **fields):
    phase = change(graph.phase("forward"), **fields)
    return change(graph, phases=tuple(phase if p.name == "forward" else p for p in graph.phases))


def with_dynamics(graph, name, **fields):
    phase = graph.phase("forward")
    return with_phase(graph, dynamics={**phase.dynamics, name: change(phase.dynamics[name], **fields)})


def synapse(graph, **fields):
    phase = graph.phase("forward")
    return with_phase(graph, synapses=(change(phase.synapses[0], **fields), *phase.synapses[1:]))


def with_bias(graph, **fields):
    bias = graph.phase("forward").bias
    return with_phase(graph, bias={**bias, "couple0": (change(bias["couple0"][0], **fields),)})


def with_drive(graph, **fields):
    return with_phase(graph, drive=(change(graph.phase("forward").drive[0], **fields),))


def with_relay(graph, leak=1.0, feedback="graded"):
    """The graph with its first couples made a relay: its gates and feedback dynamics are as given."""
    relay = tuple(change(p, kind="linear") if p.name == "couple0" else p for p in graph.populations)
    members = {"forward": "graded", "feedback": feedback}
    phases = tuple(
        change(p, dynamics={**p.dynamics, "couple0": Dynamics(leak if p.name == "forward" else 1.0, members=members[p.name])})
        for p in graph.phases
    )
    return change(graph, populations=relay, phases=phases)


def with_events(graph):
    return change(graph, populations=tuple(change(p, events=True) if p.kind == "input" else p for p in graph.populations))


def weight(graph):
    return graph.phase("forward").synapses[0].ops[0].weight


CASES = {
    "NaN": (
        lambda g: change(g, tensors={**g.tensors, "couple0.bias": np.full_like(g.tensors["readout.bias"], np.nan)}),
        "'couple0.bias' holds NaN",
    ),
    "threshold": (lambda g: with_dynamics(g, "couple0", threshold=0), "population 'couple0'.*threshold 0: it must be above 0"),
    "leak": (lambda g: with_dynamics(g, "couple0", leak=1.5), r"leak 1.5: it must lie in \(0, 1\]"),
    "leak grid": (lambda g: with_dynamics(g, "couple0", leak=0.9), "leak 0.9: an integer graph needs a multiple of 1/4096"),
    "float threshold": (lambda g: with_dynamics(g, "couple0", threshold=2.5), "threshold 2.5: an integer graph needs a whole number"),
    "members": (lambda g: with_dynamics(g, "couple0", members="none"), "is a couple with members 'none'"),
    "unknown end": (lambda g: synapse(g, target="nobody"), "ends at 'nobody', which does not take part"),
    "loop without delay": (lambda g: synapse(g, source="couple1", target="couple0", delay=0), "closes a loop without delay"),
    "shape": (lambda g: synapse(g, target="couple0", delay=1), "makes shape"),
    "missing tensor": (lambda g: synapse(g, ops=(Dense("nowhere"),)), "reads tensor 'nowhere', which the graph lacks"),
    "negative exponent": (
        lambda g: synapse(g, ops=(change(g.phase("forward").synapses[0].ops[0], exponent=-1),)),
        "negative weight exponent",
    ),
    "steps": (lambda g: with_phase(g, time_steps=0), "0 time steps: it needs at least 1"),
    "float tensor": (
        lambda g: change(g, tensors={n: t + 0.5 if n == weight(g) else t for n, t in g.tensors.items()}),
        "is of type float64 in an integer graph: quantize it",
    ),
    "unsigned tensor": (
        lambda g: change(g, tensors={n: np.abs(t).astype(np.uint8) if n == weight(g) else t for n, t in g.tensors.items()}),
        "is of type uint8 in an integer graph",
    ),
    "weight exponent": (
        lambda g: synapse(g, ops=(change(g.phase("forward").synapses[0].ops[0], exponent=8),)),
        "weight exponent 8: the chip has 0 to 7",
    ),
    "bias exponent": (lambda g: with_bias(g, exponent=20), "bias of population 'couple0'.*exponent 20: the chip has 0 to 7"),
    "bias mantissa": (
        lambda g: change(g, tensors={n: (t + 5000).astype(np.int16) if n == "couple0.bias" else t for n, t in g.tensors.items()}),
        "does not fit a 13-bit mantissa",
    ),
    "drive exponent": (lambda g: with_drive(g, exponent=64), "drive of population 'couple0'.*exponent 64: the chip has 0 to 7"),
    "drive shift": (lambda g: with_drive(g, shift=-1), "shift -1: it must lie in 0 to 20"),
    "input scale": (
        lambda g: change(g, units=change(g.units, scale={**g.units.scale, "forward": {**g.units.scale["forward"], "input": 0.5}})),
        "input 'input' has scale 0.5: an integer graph needs a whole number of levels",
    ),
    "linear": (
        lambda g: change(g, populations=tuple(change(p, kind="linear") if p.name == "couple0" else p for p in g.populations)),
        "population 'couple0'.* is a linear with members 'plus': .* linear relays 'graded'",
    ),
    "relay with a leak": (lambda g: with_relay(g, leak=0.5), "population 'couple0' in phase 'forward' is a linear relay with leak 0.5"),
    "relay that fires": (
        lambda g: with_relay(g, feedback="both"),
        "population 'couple0' in phase 'feedback' is a linear with members 'both'",
    ),
    "gate of a relay": (
        with_relay,
        "synapse 'couple0' -> 'couple1' in phase 'feedback' is gated by 'couple0', which has no spikes to count: gate by couples",
    ),
    "gate of another shape": (
        lambda g: change(g, phases=(g.phases[0], change(g.phases[1], synapses=(change(g.phases[1].synapses[0], gate="couple1"),)))),
        "is gated by 'couple1', which is no population of the source's shape",
    ),
    "host current of events": (with_events, "is one current for all steps and the input has events: keep its connection on the chip"),
    "order against a connection": (
        lambda g: with_phase(g, order=(*reversed(g.phase("forward").order[:-1]), "readout")),
        "synapse 'couple0' -> 'couple1' in phase 'forward' closes a loop without delay: give it delay 1, or move its source before its target",
    ),
    "self-loop without delay": (lambda g: synapse(g, target="couple0"), "synapse 'couple0' -> 'couple0'.* closes a loop without delay"),
    "delay of two steps": (lambda g: synapse(g, delay=2), r"before retime a delay is 0 \(same step\) or 1 \(feedback\)"),
    "image of a flat population": (
        lambda g: synapse(g, ops=(AvgPool2d((2, 2), (2, 2)), *g.phase("forward").synapses[0].ops)),
        r"synapse 'couple0' -> 'couple1' in phase 'forward': AvgPool2d takes \(channels, height, width\) but gets",
    ),
    "float scale": (
        lambda g: synapse(g, ops=(Scale(0.5), *g.phase("forward").synapses[0].ops)),
        "scales by a float in an integer graph: fold it into the weights",
    ),
    "two drives of one population": (lambda g: with_phase(g, drive=g.phase("forward").drive * 2), "drives a population twice"),
    "late bias": (lambda g: with_bias(g, start=-1), "bias of population 'couple0' starts at step -1: give it a step from 0"),
    "input in the feedback phase": (
        lambda g: change(g, phases=(g.phases[0], change(g.phases[1], order=("input", *g.phases[1].order)))),
        "inputs belong to the forward phase",
    ),
    "steps without end": (lambda g: with_phase(g, time_steps=2**62), "at most 100,000"),
    "delay without end": (lambda g: synapse(g, delay=10**9), "before retime a delay is 0|must lie in 0 to 100,000"),
    "weights without end": (
        lambda g: change(g, tensors={n: np.full(t.shape, 2**62) if n == weight(g) else t for n, t in g.tensors.items()}),
        "an integer graph needs it within -32768 to 32767",
    ),
    "flat weight": (
        lambda g: change(g, tensors={n: t.ravel() if n == weight(g) else t for n, t in g.tensors.items()}),
        r"a dense connection needs \(outputs, inputs\)",
    ),
    "drive bias": (
        lambda g: change(g, tensors={n: t[:1] if n == "input.bias" else t for n, t in g.tensors.items()}),
        "bias 'input.bias' .* make it the full shape",
    ),
    "host sum": (
        lambda g: change(
            g,
            tensors={**g.tensors, "input.weight": np.full_like(g.tensors["input.weight"], 2**31 - 1)},
            units=change(g.units, scale={**g.units.scale, "forward": {**g.units.scale["forward"], "input": 2.0**24}}),
        ),
        "beyond what the host adds exactly",
    ),
    "idle population": (
        lambda g: change(g, populations=(*g.populations, change(g.populations[1], name="extra"))),
        "population 'extra' takes no part in the forward phase",
    ),
    "no readout": (lambda g: change(g, populations=g.populations[:-1]), "a graph needs one readout, not 0"),
    "gated forward": (lambda g: synapse(g, gate=g.phase("forward").synapses[0].source), "masks exist after the forward phase only"),
    "scale": (
        lambda g: change(g, units=change(g.units, scale={**g.units.scale, "feedback": {"couple0": 0.0}})),
        "population 'couple0' has scale 0.0 in phase 'feedback'",
    ),
    "gain": (
        lambda g: change(g, phases=(g.phases[0], change(g.phases[1], drive=(change(g.phases[1].drive[0], gain=-1.0),)))),
        "gain -1.0: it must be a positive number",
    ),
    "from readout": (lambda g: with_phase(g, synapses=(Synapse("readout", "couple0", (Dense("x"),), 1),)), "lacks|leaves a readout"),
}


@pytest.mark.parametrize("case", CASES)
def test_invalid_graphs_are_named(random_graph, case):
    damage, message = CASES[case]
    graph = random_graph(0, couples=2, widths=(3, 4), skips=False)
    verify(graph)
    with pytest.raises(GraphError, match=message):
        verify(damage(graph))


def test_several_biases_of_one_population_are_each_verified(random_graph):
    graph = random_graph(0, couples=2, widths=(3, 4), skips=False)
    (bias,) = graph.phase("forward").bias["couple0"]
    verify(with_phase(graph, bias={"couple0": (bias, change(bias, start=1))}))
    with pytest.raises(GraphError, match=r"bias of population 'couple0'.* exponent 9: the chip has 0 to 7"):
        verify(with_phase(graph, bias={"couple0": (bias, change(bias, exponent=9))}))
    with pytest.raises(GraphError, match=r"bias 'couple1.bias' of population 'couple0' has shape"):
        verify(with_phase(graph, bias={"couple0": (bias, change(bias, tensor="couple1.bias"))}))


def test_a_connection_that_cannot_be_taken_back_is_refused_at_once():
    """One factor for each of 4 channels makes 24 values, but none of 6 channels takes them back."""

    def graph(shape):
        populations = (Population("a", (4, 3, 2), "couple"), Population("b", shape, "couple"), Population("out", (2,), "readout"))
        fires = Dynamics(1.0, 0.5, 1.0, "plus")
        synapses = (Synapse("a", "b", (Scale(weight="factors"),)), Synapse("b", "out", (Dense("readout"),)))
        phase = Phase("forward", 3, ("a", "b", "out"), {"a": fires, "b": fires, "out": Dynamics(1.0)}, synapses)
        tensors = {"factors": frozen(np.ones(4)), "readout": frozen(np.ones((2, 24)))}
        return Graph(populations, (phase,), tensors, Units("float", {}), Provenance("small"))

    verify(graph((4, 3, 2)))
    with pytest.raises(
        GraphError, match=r"synapse 'a' -> 'b' in phase 'forward': scale 'factors' has shape \(4,\), not one factor for each of 6"
    ):
        verify(graph((6, 4)))


def test_graphs_are_immutable(random_graph):
    graph = random_graph(0)
    with pytest.raises(AttributeError):
        graph.units = None
    with pytest.raises(ValueError, match="read-only"):
        next(iter(graph.tensors.values()))[...] = 0
