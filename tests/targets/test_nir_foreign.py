"""NIR files of snnTorch and of NIR's own examples as networks of ours: snnTorch's spikes at every step, and a refusal that names the node where a network of ours cannot be the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import toolchain
from toolchain import codec
from toolchain.compiler import lowered
from toolchain.errors import GraphError, UsageError
from toolchain.source import find
from toolchain.targets.reference import Reference

nir = pytest.importorskip("nir", reason="nir is not installed: pip install nir")

STEPS = 15


def traced(folder, inputs):
    """The imported network's graph and what the reference makes of it."""
    graph = lowered(find(folder))
    with Reference(trace=True).compile(graph) as run:
        return graph, run.run(inputs)


# snnTorch.


def leaky(shape, *, delayed, **options):
    snn = pytest.importorskip("snntorch", reason="snnTorch is not installed: pip install snntorch")
    size = torch.Size(shape)
    return snn.Leaky(beta=torch.full(size, 0.75), threshold=torch.full(size, 1.0), reset_delay=delayed, init_hidden=True, **options)


class Recurrent(nn.Module):
    """A layer that feeds itself, and a readout of spikes."""

    def __init__(self, *, delayed):
        snn = pytest.importorskip("snntorch", reason="snnTorch is not installed: pip install snntorch")
        super().__init__()
        self.fc1 = nn.Linear(16, 12)
        self.lif1 = snn.RLeaky(beta=0.75, linear_features=12, all_to_all=True, reset_delay=delayed, init_hidden=True)
        self.fc2 = nn.Linear(12, 4)
        self.lif2 = leaky((4,), delayed=delayed, output=True)

    def forward(self, x):
        return self.lif2(self.fc2(self.lif1(self.fc1(x))))


def theirs(kind, *, delayed):
    torch.manual_seed(11)
    if kind == "dense":
        made = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 12), leaky((12,), delayed=delayed), nn.Linear(12, 4), leaky((4,), delayed=delayed, output=True)
        )
        return made, (1, 4, 4)
    if kind == "conv":
        layers = [nn.Conv2d(1, 3, 3, padding=1), leaky((3, 6, 6), delayed=delayed), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 4)]
        return nn.Sequential(*layers, leaky((4,), delayed=delayed, output=True)), (1, 6, 6)
    return Recurrent(delayed=delayed), (16,)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["dense", "conv", "recurrent"])
@pytest.mark.parametrize(("delayed", "reset"), [(True, "subtract-delayed"), (False, "subtract")])
def test_spikes_of_snntorch(tmp_path, kind, delayed, reset):
    """snnTorch's Leaky with reset by subtraction, a step late by default: v = beta v + I - threshold s[t-1].

    Without the delay it subtracts a second time before the next step fires where a potential is still above the threshold, which ours do not: smaller weights keep all below twice the threshold.
    """
    export = pytest.importorskip("snntorch.export_nir", reason="snnTorch is not installed: pip install snntorch")
    from snntorch import utils

    net, shape = theirs(kind, delayed=delayed)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim > 1:
                weight *= 2 if delayed else 1.3
    inputs = torch.from_numpy(np.random.default_rng(3).integers(0, 17, (5, *shape)) / 16).float()
    nir.write(tmp_path / "net.nir", export.export_to_nir(net, inputs[:1], ignore_dims=[0]))
    outcome = toolchain.import_(tmp_path / "net.nir", output=tmp_path / "run", time_steps=STEPS, reset=reset)
    assert any("soft reset may have been lost" in sentence for sentence in outcome.warnings)
    assert any("subtracts once more" in sentence for sentence in outcome.warnings) == (reset == "subtract")
    if kind == "recurrent":
        assert any("closed one step late" in sentence for sentence in outcome.warnings)
    utils.reset(net)
    seen = {}
    first = net.lif1 if kind == "recurrent" else next(part for part in net if type(part).__name__ == "Leaky")
    first.register_forward_hook(
        lambda module, given, made: seen.setdefault("hidden", []).append((made[0] if isinstance(made, tuple) else made).numpy().copy())
    )
    trains = []
    with torch.no_grad():
        for _ in range(STEPS):
            made = net(inputs)
            trains.append((made[0] if isinstance(made, tuple) else made).numpy())
    graph, result = traced(tmp_path / "run", inputs.numpy())
    assert 0 < np.mean(seen["hidden"]) < 1
    np.testing.assert_array_equal(result.history["hidden1"].spikes, np.stack(seen["hidden"]))
    np.testing.assert_array_equal(result.history["hidden2"].spikes, np.stack(trains))
    np.testing.assert_allclose(codec.logits(graph, result), np.mean(trains, axis=0), atol=1e-12)


# Graphs as NIR has them.


def neurons(size, *, tau=None, threshold=1.0, reset=0.0, r=None):
    full = np.full(size, 1.0)
    if tau is None:
        return nir.IF(full * (1e4 if r is None else r), full * threshold, full * reset)
    return nir.LIF(full * tau, full * (tau / 1e-4 if r is None else r), full * 0, full * threshold, full * reset)


def weight(out, into, seed=0):
    return np.random.default_rng(seed).normal(0, 1, (out, into)).astype(np.float32)


def graph_of(**changes):
    """Two layers with a loop over both, and a readout that integrates."""
    nodes = {
        "input": nir.Input(np.array([6])),
        "fc1": nir.Affine(weight(5, 6), weight(5, 1)[:, 0]),
        "one": neurons(5),
        "fc2": nir.Linear(weight(4, 5, 1)),
        "two": neurons(4),
        "back": nir.Linear(weight(5, 4, 2)),
        "late": nir.Delay(np.full(5, 1e-4)),
        "fc3": nir.Affine(weight(3, 4, 3), weight(3, 1, 3)[:, 0]),
        "sum": nir.I(np.full(3, 1e4)),
        "output": nir.Output(np.array([3])),
    }
    edges = [("input", "fc1"), ("fc1", "one"), ("one", "fc2"), ("fc2", "two"), ("two", "back"), ("back", "late"), ("late", "one")]
    edges += [("two", "fc3"), ("fc3", "sum"), ("sum", "output")]
    nodes |= changes.pop("nodes", {})
    edges = [edge for edge in edges if edge not in changes.pop("without", ())] + changes.pop("edges", [])
    return nir.NIRGraph(nodes, edges, type_check=False)


def imported(graph, tmp_path, **options):
    nir.write(tmp_path / "graph.nir", graph)
    return toolchain.import_(tmp_path / "graph.nir", output=tmp_path / "run", **{"time_steps": 8} | options)


def test_a_loop_over_two_layers(tmp_path):
    """v += W s[t] in the order of the layers, the loop one step late; the readout sums, and the logits are its mean."""
    graph = graph_of()
    imported(graph, tmp_path)
    x = np.random.default_rng(0).integers(0, 17, (4, 6)) / 16
    lowered_graph, result = traced(tmp_path / "run", x)
    w = {name: np.asarray(node.weight, np.float64) for name, node in graph.nodes.items() if hasattr(node, "weight")}
    one, two, total = np.zeros((4, 5)), np.zeros((4, 4)), np.zeros((4, 3))
    fired_two = np.zeros((4, 4))
    for step in range(8):
        one = one + x @ w["fc1"].T + graph.nodes["fc1"].bias + fired_two @ w["back"].T
        fired_one = (one >= 1).astype(float)
        one -= fired_one
        two = two + fired_one @ w["fc2"].T
        fired_two = (two >= 1).astype(float)
        two -= fired_two
        total = total + fired_two @ w["fc3"].T + graph.nodes["fc3"].bias
        np.testing.assert_array_equal(result.history["hidden1"].spikes[step], fired_one)
        np.testing.assert_array_equal(result.history["hidden2"].spikes[step], fired_two)
    np.testing.assert_allclose(codec.logits(lowered_graph, result), total / 8, atol=1e-9)


def test_thresholds_and_gains_become_weights(tmp_path):
    outcome = imported(graph_of(nodes={"two": neurons(4, threshold=0.5, r=2e4)}), tmp_path)
    assert any("weights into 'two' were multiplied by 4" in sentence for sentence in outcome.warnings)
    model = find(tmp_path / "run").module
    np.testing.assert_array_equal(model.hidden[0].weight.detach().numpy(), 4 * weight(4, 5, 1))


def test_resets_below_zero_subtract_more(tmp_path):
    imported(graph_of(nodes={"one": neurons(5, reset=-1.0), "two": neurons(4, reset=-1.0)}), tmp_path)
    assert find(tmp_path / "run").module.neuron.reset == 2.0


def test_without_time_steps_the_default_is_told(tmp_path):
    outcome = imported(graph_of(), tmp_path, time_steps=None)
    assert outcome.time_steps == 30
    assert any("give others with --time-steps" in sentence for sentence in outcome.warnings)


@pytest.mark.parametrize(
    ("nodes", "edges", "said"),
    [
        ({"alone": nir.Linear(np.eye(5))}, [("alone", "alone")], "node 'alone' was left out: no way"),
        ({}, [("one", "one")], "the loop 'one' -> 'one' has no Delay: it is closed one step late"),
    ],
)
def test_what_is_left_out_or_closed_late_is_said(tmp_path, nodes, edges, said):
    """A node that is joined to itself alone has no part in the network; neurons that feed themselves are a loop."""
    outcome = imported(graph_of(nodes=nodes, edges=edges), tmp_path)
    assert sum(said in sentence for sentence in outcome.warnings) == 1
    assert len(find(tmp_path / "run").module.feedback) == 1 + (edges == [("one", "one")])


CUBA = {"tau_syn": 2e-4, "tau_mem": 2e-4, "r": 2.0, "v_leak": 0.0, "v_threshold": 1.0, "v_reset": 0.0, "w_in": 2.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nodes": {"two": neurons(4, tau=2e-4)}}, "node 'two' keeps 0.5 of its potential a step and 'one' 1"),
        ({"nodes": {"two": nir.IF(np.full(4, 1e4), np.array([1, 1, 1, 2.0]), np.zeros(4))}}, "node 'two' has v_threshold from 1 to 2"),
        ({"nodes": {"two": nir.CubaLIF(**{k: np.full(4, v) for k, v in CUBA.items()})}}, "node 'two' is a CubaLIF whose current lasts"),
        ({"nodes": {"two": neurons(4, reset=-1.0)}}, "node 'two' resets by 2 thresholds"),
        ({"nodes": {"late": nir.Delay(np.full(5, 3e-4))}}, "node 'late' delays by 3 steps"),
        ({"nodes": {"fc2": nir.Threshold(np.ones(5))}}, "node 'fc2' is of type Threshold"),
        ({"nodes": {"one": neurons(5, tau=5e-5)}}, "node 'one' keeps -1 of its potential"),
        ({"edges": [("one", "fc3")]}, "node 'fc3' adds up 2 sources"),
        ({"nodes": {"fc1": nir.Affine(np.full((5, 6), np.nan), np.zeros(5))}}, "holds NaN"),
        ({"nodes": {"fc1": nir.Affine(np.full((5, 6), 1e300), np.zeros(5))}}, "beyond float32"),
        ({"nodes": {"fc1": nir.Affine(np.full((5, 6), b"a"), np.zeros(5))}}, "node 'fc1' holds other values .* no real numbers"),
        ({"nodes": {"fc2": nir.Scale(np.ones((5,)))}}, "make them equal"),
        ({"nodes": {"more": nir.Input(np.array([6]))}, "edges": [("more", "fc2")]}, "2 nodes of type Input|adds up"),
    ],
)
def test_what_a_network_of_ours_cannot_be_is_refused_by_name(tmp_path, changes, said):
    from toolchain.exchange import nir_foreign

    graph = graph_of(**changes)
    with pytest.raises((GraphError, UsageError), match=said) as raised:
        nir_foreign.import_(tmp_path / "x.nir", graph, tmp_path / "run", time_steps=5, reset=None, dt=None)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def passing():
    """A graph that gives on what it takes."""
    return nir.NIRGraph({"input": nir.Input(np.array([6])), "output": nir.Output(np.array([6]))}, [("input", "output")])


@pytest.mark.parametrize(
    ("edges", "said"),
    [
        ([("input", "q0"), ("q0", "q0"), ("q0", "fc")], "is in a loop without neurons"),
        ([("input", "q0"), ("q0", "q1"), ("q1", "q0"), ("q1", "fc")], "is in a loop without neurons"),
        (
            [
                ("input", "q0"),
                *((f"q{i}", f"{side}{i}") for i in range(29) for side in "ab"),
                *((f"{side}{i}", f"q{i + 1}") for i in range(29) for side in "ab"),
                ("q29", "fc"),
            ],
            "more than 10,000 ways begin at node 'input'",
        ),
    ],
)
def test_ways_through_graphs_within_end(tmp_path, edges, said):
    """Loops of graphs that only pass on, and 2^29 ways side by side."""
    nodes = {"input": nir.Input(np.array([6])), "fc": nir.Linear(np.eye(6)), "one": neurons(6), "output": nir.Output(np.array([6]))}
    nodes |= {name: passing() for edge in edges for name in edge if name not in nodes}
    graph = nir.NIRGraph(nodes, [*edges, ("fc", "one"), ("one", "output")], type_check=False)
    with pytest.raises(GraphError, match=said):
        imported(graph, tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"reset": "zero"}, "subtract-delayed"), ({"dt": 0.0}, "--dt is 0.0"), ({"time_steps": 0}, "--time-steps is 0")],
)
def test_options_are_checked(tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        imported(graph_of(), tmp_path, **options)
