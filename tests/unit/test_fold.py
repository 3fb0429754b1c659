"""Fold: any connection becomes one operation with weights that computes the same, its adjoint too."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain import fixed, ir
from toolchain.errors import GraphError
from toolchain.ir import AvgPool2d, Conv2d, ConvTranspose2d, Dense, Graph, Identity, Op, Scale, Shape, Upsample, frozen, weight_of
from toolchain.passes import Fold, Inject

change = msgspec.structs.replace
CORES = ("dense", "conv", "transposed", "none", "matrices")


def graph_of(ops: tuple[Op, ...], source: Shape, tensors: dict[str, ir.Array]) -> Graph:
    """input of `source` -> ops -> couples -> readout."""
    made = ir.operations.shapes_along(ops, source, shape_behind(ops, source, tensors), tensors)[-1]
    tensors = {**tensors, "out": frozen(np.ones((2, int(np.prod(made)))))}
    populations = (
        ir.Population("input", source, "input"),
        ir.Population("hidden1", made, "couple"),
        ir.Population("readout", (2,), "readout"),
    )
    phase = ir.Phase(
        name="forward",
        time_steps=4,
        order=("input", "hidden1", "readout"),
        dynamics={"hidden1": ir.Dynamics(leak=1.0, threshold=1.0, reset=1.0, members="plus"), "readout": ir.Dynamics(leak=1.0)},
        synapses=(ir.Synapse("input", "hidden1", ops), ir.Synapse("hidden1", "readout", (Dense("out"),))),
    )
    graph = Graph(populations, (phase,), tensors, ir.Units("float", {}), ir.Provenance("drawn"))
    ir.verify(graph)
    return graph


def shape_behind(ops: tuple[Op, ...], shape: Shape, tensors: dict[str, ir.Array]) -> Shape:
    for op in ops:
        shape = ir.operations.output_shape(op, shape, tensors)
    return shape


@st.composite
def connections(draw: st.DrawFn) -> tuple[tuple[Op, ...], Shape, dict[str, ir.Array]]:
    """Factors, pools and upsampling around one operation with weights, of any groups, dilation, stride and padding; or around none; or matrices in a row."""
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups = draw(st.integers(1, 3))
    source = (groups * draw(st.integers(1, 2)), draw(st.integers(5, 8)), draw(st.integers(5, 8)))
    ops: list[Op] = []
    tensors: dict[str, ir.Array] = {}

    def weight(*shape: int) -> str:
        name = f"w{len(tensors)}"
        tensors[name] = frozen(numbers.normal(size=shape))
        return name

    def shape() -> Shape:
        return shape_behind(tuple(ops), source, tensors)

    def around() -> None:
        for kind in draw(st.lists(st.sampled_from(["factor", "channels", "both", "identity", "pool", "up"]), max_size=4)):
            if kind in ("pool", "up") and len(shape()) == 1:
                continue
            if kind == "pool":
                kernel = draw(st.integers(1, 2)), draw(st.integers(1, 2))
                step = draw(st.integers(1, 2)), draw(st.integers(1, 2))
                ops.append(AvgPool2d(kernel, step, (kernel[0] // 2, kernel[1] // 2)))
            elif kind == "up":
                ops.append(Upsample(2))
            else:
                factor = 1.0 if kind == "channels" else draw(st.sampled_from([1.0, 0.5, -2.74]))
                ops.append(Identity() if kind == "identity" else Scale(factor, None if kind == "factor" else weight(shape()[0])))

    around()
    core = draw(st.sampled_from(CORES))
    pairs = st.tuples(st.integers(1, 2), st.integers(1, 2))
    if core == "conv":
        kernel, dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), draw(pairs)
        each = groups * draw(st.integers(1, 2))
        ops.append(Conv2d(weight(each, source[0] // groups, *kernel), draw(pairs), (2, 2), dilation, groups))
    elif core == "transposed":
        kernel, dilation = draw(st.tuples(st.integers(2, 3), st.integers(2, 3))), draw(pairs)
        ops.append(ConvTranspose2d(weight(source[0], draw(st.integers(1, 2)), *kernel), draw(pairs), (0, 1), (0, 0), dilation, groups))
    elif core != "none":
        for size in draw(st.lists(st.integers(1, 6), min_size=1, max_size=1 if core == "dense" else 3)):
            ops.append(Dense(weight(size, int(np.prod(shape())))))
            ops.append(Scale(0.5, weight(size)))
    around()
    return tuple(ops) or (Identity(),), source, tensors


@settings(max_examples=150, deadline=None)
@given(connections())
def test_a_folded_connection_has_one_weight_and_computes_the_same(drawn: tuple[tuple[Op, ...], Shape, dict[str, ir.Array]]) -> None:
    ops, source, tensors = drawn
    graph = graph_of(ops, source, tensors)
    folded = Fold()(graph)
    ir.verify(folded)
    (made,) = (s.ops for s in folded.phase("forward").synapses if s.target == "hidden1")
    weighing = [op for op in made if weight_of(op) is not None]
    assert len(weighing) == 1
    assert all(isinstance(op, (AvgPool2d, Upsample)) for op in made if op not in weighing)
    values = np.random.default_rng(0).normal(size=(2, *source))
    target = graph.population("hidden1").shape
    before, after = (fixed.apply(o, g.tensors, values, target, integer=False) for o, g in ((ops, graph), (made, folded)))
    assert np.abs(before - after).max() <= 1e-12 * max(1, np.abs(before).max())
    assert folded.tensors.keys() == {weighing[0].weight, "out"}  # type: ignore[union-attr]  # it has a weight


@settings(max_examples=60, deadline=None)
@given(connections())
def test_an_adjoint_is_folded_to_the_adjoint_and_shares_its_weight(drawn: tuple[tuple[Op, ...], Shape, dict[str, ir.Array]]) -> None:
    ops, source, tensors = drawn
    graph = graph_of(ops, source, tensors)
    forward = graph.phase("forward")
    hidden = change(graph.population("input"), name="hidden0", kind="couple")
    couples = (graph.populations[0], hidden, *graph.populations[1:])
    same = ir.Synapse("input", "hidden0", (Identity(),))
    order = ("input", "hidden0", "hidden1", "readout")
    forward = change(
        forward,
        order=order,
        dynamics={**forward.dynamics, "hidden0": forward.dynamics["hidden1"]},
        synapses=(same, change(forward.synapses[0], source="hidden0"), forward.synapses[1]),
    )
    both = change(forward.dynamics["hidden1"], members="both")
    back = ir.Phase(
        name="feedback",
        time_steps=3,
        order=("hidden1", "hidden0"),
        dynamics={"hidden0": both, "hidden1": both},
        synapses=(ir.Synapse("hidden1", "hidden0", ir.adjoint(ops), gate="hidden1"),),
        drive=(ir.Drive("hidden1", "error"),),
    )
    graph = change(graph, populations=couples, phases=(forward, back))
    ir.verify(graph)
    folded = Fold()(graph)
    ir.verify(folded)
    (made,) = (s.ops for s in folded.phase("forward").synapses if s.target == "hidden1")
    assert folded.phase("feedback").synapses[0].ops == ir.adjoint(made)


def test_what_has_nothing_to_fold_keeps_its_name_and_its_bytes() -> None:
    weight = frozen(np.random.default_rng(0).normal(size=(4, 3, 3, 3)))
    ops = (AvgPool2d((2, 2), (2, 2)), Identity(), Conv2d("w", padding=(1, 1)), Scale(1.0))
    folded = Fold()(graph_of(ops, (3, 6, 6), {"w": weight}))
    assert folded.phase("forward").synapses[0].ops == (AvgPool2d((2, 2), (2, 2)), Conv2d("w", padding=(1, 1)))
    assert folded.tensors["w"] is weight


def test_folded_weights_belong_to_one_pair_of_populations_and_others_keep_theirs() -> None:
    """Each target may have a unit of its own: what quantize rounds must not be read by connections into two of them."""
    ops = (Scale(0.5), Dense("w"))
    graph = graph_of(ops, (3,), {"w": frozen(np.ones((3, 3)))})
    phase = graph.phase("forward")
    loops = [ir.Synapse("hidden1", "hidden1", again, delay=1) for again in (ops, ops, (Dense("w"),), (Identity(),))]
    alone = ir.Synapse("input", "hidden1", (Identity(),))
    folded = Fold()(change(graph, phases=(change(phase, synapses=(*phase.synapses, *loops, alone)),)))
    found = [weight_of(synapse.ops[0]) for synapse in folded.phase("forward").synapses]
    assert found == ["w.scaled", "out", "w.scaled2", "w.scaled2", "w", "hidden1.hidden1.scale", "input.hidden1.scale"]
    assert np.array_equal(folded.tensors["w.scaled"], np.full((3, 3), 0.5))
    assert np.array_equal(folded.tensors["w.scaled2"], folded.tensors["w.scaled"])


def test_a_current_of_the_host_is_folded_as_the_connection_is() -> None:
    graph = graph_of((Scale(0.5), Dense("w")), (3,), {"w": frozen(np.ones((3, 3)))})
    late, early = Fold()(Inject()(graph)), Inject()(Fold()(graph))
    assert late.phase("forward") == early.phase("forward")
    assert np.array_equal(late.tensors["w.scaled"], early.tensors["w.scaled"])


@pytest.mark.parametrize(
    "ops",
    [
        (Conv2d("w", padding=(1, 1)), Conv2d("w", padding=(1, 1))),
        (Conv2d("w", padding=(1, 1)), AvgPool2d((6, 6), (6, 6)), Dense("d")),
    ],
)
def test_two_weights_that_make_no_product_are_refused(ops: tuple[Op, ...]) -> None:
    tensors = {"w": frozen(np.ones((3, 3, 3, 3))), "d": frozen(np.ones((2, 3)))}
    with pytest.raises(GraphError, match=r"synapse 'input' -> 'hidden1' has Conv2d and (Conv2d|Dense): .*put a relay between"):
        Fold()(graph_of(ops, (3, 6, 6), tensors))


def test_factors_that_change_the_shape_become_a_diagonal_matrix() -> None:
    """Factors a channel could not be transposed: a row of values does not tell its channels."""
    graph = graph_of((AvgPool2d((2, 2), (2, 2)), Scale(2.0, "w")), (2, 4, 4), {"w": frozen(np.array([1.0, -3.0]))})
    rows = change(graph, populations=(graph.populations[0], change(graph.populations[1], shape=(8,)), graph.populations[2]))
    folded = Fold()(rows)
    assert folded.phase("forward").synapses[0].ops == (AvgPool2d((2, 2), (2, 2)), Dense("w.scaled"))
    assert np.array_equal(folded.tensors["w.scaled"], np.diag([2.0] * 4 + [-6.0] * 4))
    values = np.random.default_rng(0).normal(size=(3, 8))
    back = fixed.apply(ir.adjoint(folded.phase("forward").synapses[0].ops), folded.tensors, values, (2, 4, 4), integer=False)
    assert np.array_equal(back[:, 0, ::2, ::2].reshape(3, 4), values[:, :4] / 2)


def test_a_diagonal_matrix_that_would_be_huge_is_refused() -> None:
    graph = graph_of((Identity(),), (2, 64, 65), {})
    rows = change(graph, populations=(graph.populations[0], change(graph.populations[1], shape=(8320,)), graph.populations[2]))
    with pytest.raises(GraphError, match=r"'input' -> 'hidden1' has no weights and leads 8,320 values .* give both ends one shape"):
        Fold()(rows)
