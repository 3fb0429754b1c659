"""Lava's own synapse processes carry every operation: spikes, potentials and saturations are the reference's, and what they cannot carry is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from toolchain import data as datasets
from toolchain.compiler import lowered
from toolchain.errors import DesignRuleError, UsageError
from toolchain.ir import Array, Conv2d, ConvTranspose2d, Dense, Graph, Synapse, frozen, weight_of
from toolchain.passes import Adjoint
from toolchain.passes.retime import Retime
from toolchain.source import find
from toolchain.targets.lava_sim import LAVA_SIM, LavaSim
from toolchain.targets.lava_sim.stock import Stock, composed, digits
from toolchain.targets.reference import Reference

lava = pytest.mark.skipif(LAVA_SIM.available() is not None, reason=str(LAVA_SIM.available()))
STOCK = LavaSim(synapses="stock", trace=True)
REFERENCE = Reference(trace=True)


def _compared(graph: Graph, sim: LavaSim, inputs: Array, errors: Array, assert_identical: Callable[..., None]) -> None:
    expected = REFERENCE.compile(graph)
    with sim.compile(graph) as run:
        assert_identical(run.run(inputs), expected.run(inputs))
        assert_identical(run.run(errors, phase="feedback"), expected.run(errors, phase="feedback"))


@lava
@pytest.mark.lava
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
)
@given(
    data=st.data(),
    integer=st.booleans(),
    extreme=st.booleans(),
    host=st.booleans(),
    mode=st.sampled_from(["exact", "pipelined"]),
    synapses=st.sampled_from(["stock", "stock", "sparse"]),
)
def test_any_drawn_graph_is_identical(
    drawn: Any, assert_identical: Any, data: Any, integer: bool, extreme: bool, host: bool, mode: Any, synapses: Any
) -> None:
    """Branches, skips, relays, events, loops and compositions of every operation."""
    graph = data.draw(drawn.graphs(integer=integer, extreme=extreme, host=host))
    inputs, errors = data.draw(drawn.values(graph, samples=2))
    sim = LavaSim(synapses=synapses, trace=True)
    graph = Retime(mode)(graph if integer else Adjoint()(graph))
    assume(not sim.check(graph))  # relays in a loop may reach more than 32 bits
    _compared(graph, sim, inputs, errors, assert_identical)


@lava
@pytest.mark.lava
@pytest.mark.parametrize(
    ("name", "numbers", "leak", "mode", "synapses"),
    [
        ("strides", "positive", 1.0, "exact", "stock"),
        ("strides", "negative", 0.75, "pipelined", "stock"),
        ("strides", "saturating", 1.0, "pipelined", "stock"),
        ("strides", "extreme", 1.0, "exact", "sparse"),
        ("pools", "extreme", 1.0, "exact", "stock"),
        ("pools", "saturating", 0.75, "pipelined", "stock"),
        ("events", "always", 1.0, "exact", "stock"),
        ("events", "negative", 1.0, "pipelined", "sparse"),
        ("single", "extreme", 0.75, "exact", "stock"),
    ],
)
def test_every_operation_at_its_limits_is_identical(
    network_graph: Any, network_inputs: Any, assert_identical: Any, name: str, numbers: str, leak: float, mode: Any, synapses: Any
) -> None:
    graph = Retime(mode)(network_graph(name, numbers, leak=leak))
    _compared(graph, LavaSim(synapses=synapses, trace=True), *network_inputs(graph, 3), assert_identical)


@lava
@pytest.mark.lava
@pytest.mark.parametrize(("name", "numbers"), [("strides", "extreme"), ("pools", "positive"), ("events", "saturating")])
def test_late_synapses_are_identical(network_graph: Any, network_inputs: Any, assert_identical: Any, name: str, numbers: str) -> None:
    graph = _late(Retime("pipelined")(network_graph(name, numbers)))
    _compared(graph, STOCK, *network_inputs(graph, 3), assert_identical)


@lava
@pytest.mark.lava
@pytest.mark.parametrize("mode", ["exact", "pipelined"])
def test_a_stream_of_relays_is_identical(network_graph: Any, network_inputs: Any, assert_identical: Any, mode: Any) -> None:
    """Graded values of 24 bit that saturate, under weights of 1 and -1 that keep their sums below 32 bit."""
    graph = network_graph("residual", "extreme")
    graded = [s for phase in graph.phases for s in phase.synapses if graph.population(s.source).kind == "linear"]
    signs = {name: frozen(np.sign(graph.tensors[name])) for s in graded for op in s.ops if (name := weight_of(op)) is not None}
    graph = Retime(mode)(msgspec.structs.replace(graph, tensors=graph.tensors | signs))
    inputs, errors = network_inputs(graph, 3)
    assert sum(int(s.sum()) for s in REFERENCE.compile(graph).run(inputs).saturations.values()) > 0
    _compared(graph, STOCK, inputs, errors, assert_identical)


@lava
@pytest.mark.lava
def test_a_trained_convolutional_network_is_identical(assert_identical: Any) -> None:
    """ConvNet-F on images, its first connection on the chip: three Conv and a Sparse forward, a few steps of both phases."""
    pipeline = STOCK.pipeline.with_options(retime={"mode": "pipelined"}, inject={"mode": "graded"})
    graph = pipeline(lowered(find("convnet-f"), 6, 4))
    images = datasets.load("mnist-1k", samples=2).images
    errors = np.random.default_rng(0).normal(size=(2, *graph.population(graph.phase("feedback").drive[0].population).shape))
    _compared(graph, STOCK, images, errors, assert_identical)


@lava
@pytest.mark.lava
def test_each_operation_has_its_process(network_graph: Any) -> None:
    from lava.magma.core.process.ports.ports import InPort, OutPort

    def kinds(graph: Graph, **options: Any) -> dict[str, list[str]]:
        size = {p.name: (int(np.prod(p.shape)),) for p in graph.populations}
        phase = graph.phase("forward")
        stock = Stock(graph, phase, **options)
        made = [(s, stock.joined(s, "", OutPort(size[s.source]), InPort(size[s.target]))) for s in phase.synapses]
        return {f"{s.source} {s.target}": [type(process).__name__ for process in processes] for s, processes in made}

    strides, pools = (Retime("pipelined")(network_graph(name, "plain")) for name in ("strides", "pools"))
    carried = kinds(strides)
    assert carried["a b"] == carried["b b"] == carried["a c"] == ["Conv"]
    assert carried["c a"] == ["Sparse"]
    assert carried["c readout"] == ["Dense"]
    late = kinds(_late(strides))
    assert late["a b"] == ["DelaySparse"]
    assert late["c readout"] == ["DelayDense"]
    assert kinds(pools)["b c"] == ["Sparse", "Sparse"]  # four 8-bit weights added up by the pool take two digits
    assert {process for several in kinds(strides, sparse=True).values() for process in several} == {"Sparse"}
    graded = Retime("pipelined")(network_graph("strides", "saturating"))
    assert kinds(graded)["input a"] == ["Sparse"]  # graded values times large weights pass the 24 bits of a Conv


def _late(graph: Graph) -> Graph:
    """The graph with three ticks in every synapse."""
    phases = tuple(
        msgspec.structs.replace(phase, synapses=tuple(msgspec.structs.replace(s, delay=3) for s in phase.synapses))
        for phase in graph.phases
    )
    return msgspec.structs.replace(graph, phases=phases)


@pytest.mark.parametrize("operation", ["conv", "spread"])
def test_the_matrix_of_a_convolution_is_its_own_products(operation: str, reference_products: Any) -> None:
    pytest.importorskip("scipy")
    draw = np.random.default_rng(3)
    if operation == "conv":
        op, shape, made = Conv2d("w", (2, 1), (1, 2), (1, 2), 2), (4, 6, 5), (6, 3, 5)
        weight = draw.integers(-9, 10, (6, 2, 3, 3))
    else:
        op, shape, made = ConvTranspose2d("w", (2, 1), (1, 0), (1, 0), (1, 2), 2), (4, 3, 4), (6, 6, 8)
        weight = draw.integers(-9, 10, (4, 3, 3, 3))
    graph = reference_products(op, weight)
    matrix = composed(graph, (op,), (shape, made))
    values = draw.integers(-5, 6, (3, *shape))
    from toolchain import fixed

    expected = fixed.apply((op,), graph.tensors, values, made, integer=True)
    np.testing.assert_array_equal((matrix @ values.reshape(3, -1).T).T.reshape(expected.shape), expected)
    back = msgspec.structs.replace(op, transpose=True)
    np.testing.assert_array_equal(composed(graph, (back,), (made, shape)).toarray(), matrix.toarray().T)


@pytest.fixture
def reference_products(network_graph: Any) -> Callable[..., Graph]:
    def made(op: Any, weight: Array) -> Graph:
        return msgspec.structs.replace(network_graph("single", "plain"), tensors={op.weight: frozen(weight, np.int8)})

    return made


@given(st.lists(st.integers(-(2**31) + 1, 2**31 - 1), min_size=1, max_size=6))
def test_digits_add_up_within_eight_bits(values: list[int]) -> None:
    whole = np.array([values])
    parts = digits(whole)
    assert all(part.min() >= -128 and part.max() <= 127 for part in parts)
    np.testing.assert_array_equal(sum(part << 7 * i for i, part in enumerate(parts)), whole)
    assert all((np.abs(part << 7 * i) <= np.abs(whole)).all() for i, part in enumerate(parts))


def test_eight_bits_are_one_digit() -> None:
    assert len(digits(np.array([[-128, 127]]))) == 1
    assert len(digits(np.array([[-129, 127]]))) == 2
    assert len(digits(np.zeros((2, 0)))) == 1


def test_check_says_what_stock_synapses_cannot_carry(network_graph: Any, random_graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("strides", "pools", "events", "single"):
        assert STOCK.check(Retime("exact")(network_graph(name, "extreme"))) == []
    problems = STOCK.check(Retime("exact")(network_graph("residual", "plain")))
    assert any(
        "synapse 'stream1' -> 'stream2' in phase 'forward' can reach sums beyond the 32 bits" in problem and "use synapses own" in problem
        for problem in problems
    )
    assert not any("'a' -> 'b'" in problem for problem in problems)
    graph = Retime("exact")(random_graph(3, couples=3, skips=False))
    late = _with_first_synapse(graph, delay=65)
    assert LAVA_SIM.check(late) == []
    assert "takes 65 ticks, and Lava's stock synapses at most 64" in STOCK.check(late)[0]
    assert STOCK.check(_with_first_synapse(graph, delay=64)) == []
    (op,) = graph.phase("forward").synapses[0].ops
    assert isinstance(op, Dense)
    wide = msgspec.structs.replace(graph, tensors=graph.tensors | {op.weight: graph.tensors[op.weight].astype(np.int64) * 10**8})
    assert "beyond the 32 bits" in STOCK.check(wide)[0]
    monkeypatch.setattr("toolchain.targets.lava_sim.stock.MATRIX_LIMIT", 100)
    problems = STOCK.check(Retime("exact")(network_graph("strides", "plain")))
    assert "synapse 'c' -> 'a' in phase 'forward' is a matrix of up to 2,520 weights, too many" in problems[0]
    assert not any("'a' -> 'b'" in problem for problem in problems)  # a convolution needs no matrix


def test_one_sample_at_a_time() -> None:
    with pytest.raises(UsageError, match="use batch 1"):
        LavaSim(synapses="sparse", batch=2)


@lava
@pytest.mark.lava
def test_compile_refuses_what_check_finds(network_graph: Any) -> None:
    with pytest.raises(DesignRuleError, match="beyond the 32 bits"):
        STOCK.compile(Retime("exact")(network_graph("residual", "plain")))


def _with_first_synapse(graph: Graph, **fields: Any) -> Graph:
    """The graph with fields of the first forward synapse replaced."""

    def changed(synapses: tuple[Synapse, ...]) -> tuple[Synapse, ...]:
        return (msgspec.structs.replace(synapses[0], **fields), *synapses[1:])

    phases = tuple(msgspec.structs.replace(p, synapses=changed(p.synapses)) if p.name == "forward" else p for p in graph.phases)
    return msgspec.structs.replace(graph, phases=phases)
