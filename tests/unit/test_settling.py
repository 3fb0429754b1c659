"""Equilibria and gradients where the truth is known: chains, contractions of a known factor, finite differences."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import msgspec
import numpy as np
import pytest

import toolchain
from toolchain import codec
from toolchain.analysis.equilibrium import feedback_equilibrium, forward_equilibrium
from toolchain.analysis.fidelity import Closeness, Found, Solved, closeness, cosine, fidelity
from toolchain.analysis.settling import Curve, checkpoints, first_for_good
from toolchain.analysis.side_by_side import side_by_side
from toolchain.compiler import lowered
from toolchain.data import load
from toolchain.feedback import exact, float_graph, in_floats
from toolchain.ir import Bias, Dense, Drive, Dynamics, Graph, Phase, Population, Provenance, Synapse, Units, frozen, leak_sum, verify
from toolchain.passes import FLOAT_PIPELINE, Adjoint, Fold, Inject, Pipeline, Quantize, Retime
from toolchain.source import find


def network(weights, *, loops=(), leak=1.0, threshold=0.5, reset=1.0, bias=None, time_steps=40, feedback_steps=60, gain=1.0):
    """couple0 -> couple1 -> ... -> readout with `weights` (first: from the input, last: into the readout) and `loops` (from, to, matrix)."""
    names = [f"couple{i}" for i in range(len(weights) - 1)]
    ends = ["input", *names, "readout"]
    tensors = {f"w{i}": frozen(w) for i, w in enumerate(weights)} | {f"loop{i}": frozen(w) for i, (_, _, w) in enumerate(loops)}
    synapses = [Synapse(a, b, (Dense(f"w{i}"),)) for i, (a, b) in enumerate(itertools.pairwise(ends))]
    synapses += [Synapse(names[a], names[b], (Dense(f"loop{i}"),), 1) for i, (a, b, _) in enumerate(loops)]
    tensors |= {} if bias is None else {"bias": frozen(bias)}
    forward = Phase(
        "forward",
        time_steps,
        tuple(ends),
        dict.fromkeys(names, Dynamics(leak, threshold, reset, "plus")) | {"readout": Dynamics(leak)},
        tuple(synapses),
        {} if bias is None else {names[0]: (Bias("bias"),)},
    )
    driven = Drive(names[-1], "error", gain=gain)
    feedback = Phase(
        "feedback", feedback_steps, tuple(reversed(names)), dict.fromkeys(names, Dynamics(leak, 0.5, 1.0, "both")), (), drive=(driven,)
    )
    sizes = [np.shape(w)[0] for w in weights]
    populations = (
        Population("input", (np.shape(weights[0])[1],), "input"),
        *(Population(n, (s,), "couple") for n, s in zip(names, sizes, strict=False)),
        Population("readout", (sizes[-1],), "readout"),
    )
    graph = Pipeline((Fold(), Adjoint()))(
        Graph(populations, (forward, feedback), tensors, Units("float", {"forward": {"input": 1.0}}), Provenance("known"))
    )
    verify(graph)
    return graph


def rates_of(graph, inputs):
    result, solution = forward_equilibrium(graph, inputs)
    return {name: codec.rates(graph, result, name) for name in result.traces}, solution, result


def test_the_equilibrium_of_a_chain_is_its_formula():
    """a0 = clip((W x + b) / A), a1 = clip(W a0 / A), with a neuron that cannot fire and one that always does."""
    first, second = np.array([[0.5], [2.5], [-1.0]]), np.array([[0.5, 0.25, 7.0]])
    graph = network([first, second, np.eye(1)], reset=2.0, threshold=1.0, bias=np.array([0.1, 0.0, 0.0]))
    found, solution, result = rates_of(graph, np.array([[1.0]]))
    np.testing.assert_allclose(found["couple0"], [[0.3, 1.0, 0.0]])
    np.testing.assert_allclose(found["couple1"], [[(0.5 * 0.3 + 0.25) / 2]])
    np.testing.assert_allclose(codec.logits(graph, result), found["couple1"])
    assert (solution.converged, solution.iterations, solution.residual) == (True, 1, 0.0)
    assert codec.mask(graph, result, "couple0").tolist() == [[True, False, False]]


@pytest.mark.parametrize("leak", [1.0, 0.9])
def test_the_equilibrium_of_a_loop_solves_its_equation_whatever_the_leak(leak):
    draw = np.random.default_rng(0)
    loop = draw.normal(size=(6, 6))
    loop *= 0.6 / np.linalg.svd(loop)[1].max()
    graph = network([draw.random((6, 4)) * 0.3, draw.normal(size=(3, 6))], loops=[(0, 0, loop)], leak=leak)
    inputs = draw.random((5, 4))
    found, solution, _ = rates_of(graph, inputs)
    solved = np.linalg.solve(np.eye(6) - loop, graph.tensors["w0"] @ inputs.T).T
    assert ((solved > 0) & (solved < 1)).all(axis=1).any()
    inside = ((solved > 0) & (solved < 1)).all(axis=1)
    np.testing.assert_allclose(found["couple0"][inside], solved[inside], atol=1e-9)
    again = np.clip(found["couple0"] @ loop.T + inputs @ graph.tensors["w0"].T, 0, 1)
    np.testing.assert_allclose(found["couple0"], again, atol=1e-9)
    assert solution.converged


@pytest.mark.parametrize("factor", [0.3, 0.7])
def test_a_contraction_is_solved_in_the_steps_that_its_factor_says(factor):
    """One neuron with loop weight c: the distance falls by c a step, from c times the first rate to 1e-10."""
    graph = network([[[0.1]], [[1.0]]], loops=[(0, 0, [[factor]])])
    found, solution, _ = rates_of(graph, np.array([[1.0]]))
    assert found["couple0"][0, 0] == pytest.approx(0.1 / (1 - factor))
    expected = np.log(1e-10 / 0.1) / np.log(factor)
    assert abs(solution.iterations - expected) <= 2


def test_a_loop_that_swings_is_damped_and_one_that_runs_away_meets_its_bound():
    swinging = network([[[0.9]], [[1.0]]], loops=[(0, 0, [[-1.5]])])
    found, solution, _ = rates_of(swinging, np.array([[1.0]]))
    assert solution.converged
    assert found["couple0"][0, 0] == pytest.approx(0.9 / 2.5)
    away = network([[[0.2]], [[1.0]]], loops=[(0, 0, [[3.0]])])
    found, solution, _ = rates_of(away, np.array([[1.0]]))
    assert (found["couple0"][0, 0], solution.converged) == (1.0, True)


def ring():
    """Three neurons, each exciting itself and stopping the next: rates go round in circles."""
    loop = -8.0 * np.roll(np.eye(3), 1, axis=0) + 6.0 * np.eye(3)
    return network([[[1.5], [1.4], [1.3]], np.eye(3)], loops=[(0, 0, loop)])


def test_what_does_not_come_to_rest_says_so_with_its_residual():
    _, solution, _ = rates_of(ring(), np.array([[0.9]]))
    assert not solution.converged
    assert solution.residual > 1e-3


def test_the_feedback_equilibrium_is_the_transposed_linear_system():
    draw = np.random.default_rng(1)
    loop = draw.normal(size=(5, 5)) * 0.2
    graph = network(
        [draw.normal(size=(5, 3)), draw.normal(size=(4, 5)) * 0.5, draw.normal(size=(2, 4))],
        loops=[(1, 0, loop[:, :4])],
        reset=2.0,
        threshold=1.0,
    )
    masks = {"couple0": draw.random((3, 5)) < 0.7, "couple1": draw.random((3, 4)) < 0.7}
    error = draw.normal(size=(3, 4)) * 5  # larger than spikes carry: the linear equation has no bound
    result, solution = feedback_equilibrium(graph, masks, error)
    assert solution.converged
    for i in range(3):
        jacobian = np.zeros((9, 9))
        jacobian[5:, :5] = graph.tensors["w1"] / 2
        jacobian[:5, 5:] = loop[:, :4] / 2
        gate = np.concatenate([masks["couple0"][i], masks["couple1"][i]])
        drive = np.concatenate([np.zeros(5), error[i]])
        beta = np.linalg.solve(np.eye(9) - jacobian.T * gate, drive)
        np.testing.assert_allclose(codec.beta(graph, result, "couple0")[i], beta[:5], atol=1e-8)
        np.testing.assert_allclose(codec.beta(graph, result, "couple1")[i], beta[5:], atol=1e-8)
    clipped, _ = feedback_equilibrium(graph, masks, error, clip=True)
    assert np.abs(codec.beta(graph, clipped, "couple1")).max() == pytest.approx(1.0)


def settled(graph, inputs, labels=None, integers=None):
    labels = np.zeros(len(inputs), int) if labels is None else labels
    return side_by_side(graph, integers, inputs, labels)


def test_the_residual_of_a_neuron_is_what_its_potential_still_holds():
    """Without a loop f(a) - a = u_T / (T A) exactly: 0.3 a step, a spike at 0.5 and more, 1 less."""
    graph = network([[[0.3]], [[1.0]]], time_steps=10)
    (curve, _) = settled(graph, np.array([[1.0]])).settling.curves
    potential, residuals = 0.0, []
    for t in range(1, 21):
        potential += 0.3
        potential -= potential >= 0.5 - 1e-12
        residuals.append(abs(potential) / t)
    np.testing.assert_allclose(curve.residual["couple0"][:20], residuals, atol=1e-6)
    assert curve.whole == curve.residual["couple0"]
    assert curve.steps_to(0.0251) == next(t for t in range(1, 21) if all(r <= 0.0251 for r in residuals[t - 1 :]))


@pytest.mark.parametrize("leak", [1.0, 0.9])
def test_residuals_fall_as_one_over_t_but_for_what_a_leak_leaves(leak):
    draw = np.random.default_rng(2)
    loop = draw.normal(size=(40, 40))
    loop *= 0.7 / np.linalg.svd(loop)[1].max()
    graph = network([draw.random((40, 10)) * 0.15, draw.normal(size=(3, 40))], loops=[(0, 0, loop)], leak=leak, time_steps=100, gain=50.0)
    inputs, labels = draw.random((20, 10)), draw.integers(0, 3, 20)
    forward, feedback = settled(graph, inputs, labels).settling.curves
    early, late = forward.at(20, forward.whole), forward.at(200, forward.whole)
    assert late < early / 5 if leak == 1 else late > early / 5
    found, _, _ = rates_of(graph, inputs)
    assert feedback.cosine is not None
    assert feedback.at(120, feedback.cosine) > feedback.at(20, feedback.cosine) > feedback.at(5, feedback.cosine)
    assert feedback.at(120, feedback.cosine) > 0.97
    with toolchain.target.get("torch").compile(graph.in_steps({"forward": 400})) as run:
        rates = codec.rates(run.graph, run.run(inputs), "couple0")
    assert np.abs(rates - found["couple0"]).mean() < (0.01 if leak == 1 else 0.06)


def test_accuracy_after_t_steps_is_that_of_a_run_of_t_steps():
    """Of digits-fc: also integers, and the readout's bias counted once."""
    source, digits = find("digits-fc"), load("digits", samples=60)
    start = lowered(source)
    found = settled(
        FLOAT_PIPELINE.until("adjoint")(start),
        digits.images,
        digits.labels,
        Quantize()(Retime()(Inject()(FLOAT_PIPELINE.until("adjoint")(start)))),
    )
    for graph in ("float", "integer"):
        curve = found.settling.curve("forward", graph)
        for steps in (1, 2, 7, 30):
            compiled = toolchain.compile("digits-fc", target="sim", time_steps=steps).artifact
            deployed = toolchain.deploy(
                compiled, target={"float": "torch", "integer": "sim"}[graph], dataset="digits", samples=60, device="cpu"
            )
            assert curve.at(steps, curve.accuracy) == pytest.approx(deployed.accuracy), (graph, steps)


def test_the_suggested_steps_give_the_accuracy_they_promise():
    source, digits = find("digits-fc"), load("digits", samples=128)
    curve = settled(float_graph(source), digits.images, digits.labels).settling.curve("forward", "float")
    assert curve.suggested is not None
    assert curve.suggested < curve.time_steps
    assert curve.at(curve.suggested, curve.whole) <= 0.01
    assert abs(curve.at(curve.suggested, curve.accuracy) - curve.accuracy[-1]) <= 0.01
    assert f"suggested T {curve.suggested} (float graph: residual" in curve.sentence


def curve_of(values, **changed):
    count = len(values)
    steps, values = tuple(range(1, count + 1)), tuple(values)
    made = Curve("forward", "float", 4, 100, False, steps, {}, values, values, (0.5,) * count, (1.0,) * count)
    return replace(made, **changed)


def test_steps_to_a_tolerance_are_those_after_which_it_holds_for_good():
    assert first_for_good((1, 2, 3, 4), [True, False, True, True]) == 3
    assert first_for_good((1, 2), [True, False]) is None
    assert checkpoints(30, 60)[:32] == tuple(range(1, 33))
    assert {30, 60} <= set(checkpoints(30, 60))
    found = curve_of([0.2, 0.009, 0.02, 0.01, 0.001])
    assert (found.steps_to(0.01), found.suggested) == (4, 4)
    assert curve_of([0.2, 0.009, 0.02, 0.01, 0.02, 0.001]).suggested is None  # that it holds at the last step alone says little
    short = curve_of([0.2, 0.1, 0.05])
    assert short.suggested is None
    assert short.sentence.startswith("no T up to 3 suggested: the float graph's residual does not stay within 0.01")
    assert "answers settle at T 1" in short.sentence
    assert "a leak leaves some for good" in replace(short, leaks=True).sentence


def test_answers_may_change_on_one_sample_and_no_more():
    values, answers = [0.2, 0.009, 0.001, 0.001, 0.001], (0.90, 0.90, 0.92, 0.92, 0.92)
    assert curve_of(values, accuracy=answers).suggested == 3
    assert curve_of(values, accuracy=answers, samples=50).suggested == 2


def test_a_phase_in_which_nothing_fires_suggests_no_number_of_steps():
    graph = network([[[0.3]], [[1.0], [0.5]]], time_steps=10, gain=1e-6)
    _, curve = settled(graph, np.array([[1.0]])).settling.curves
    assert (curve.silent, curve.suggested) == (True, None)
    assert "in the float graph's feedback phase nothing fires in" in curve.sentence
    assert "raise the scale factor" in curve.sentence


def test_settling_is_plain_json_and_text():
    graph = network([[[0.3]], [[1.0], [0.5]]], time_steps=10)
    found = settled(graph, np.array([[1.0]])).settling
    read = json.loads(json.dumps(found.to_json()))
    assert [(c["phase"], c["graph"]) for c in read["curves"]] == [("forward", "float"), ("feedback", "float")]
    assert read["curves"][0]["steps_to_tolerance"][0]["tolerance"] == pytest.approx(0.1)
    assert "settling: mean |f(a) - a|" in found.to_text()
    assert found.sentence() == found.curves[0].sentence
    assert found.sentence("none") is None


def loss_at(graph, inputs, labels):
    result, _ = forward_equilibrium(graph, inputs)
    return codec.cross_entropy(codec.logits(graph, result), labels)


@pytest.mark.parametrize("leak", [1.0, 0.9])
def test_the_exact_gradient_is_that_of_finite_differences(leak):
    """Of the loss at the equilibrium, weight by weight, in float64: loops, clipped neurons, biases and the readout included."""
    draw = np.random.default_rng(3)
    loop = draw.normal(size=(5, 4)) * 0.3
    weights = [draw.normal(size=(5, 3)) * 0.6 + 0.3, draw.normal(size=(4, 5)) * 0.6 + 0.3, draw.normal(size=(3, 4)) * 2]
    graph = network(weights, loops=[(1, 0, loop)], leak=leak, bias=draw.normal(size=5) * 0.1)
    inputs, labels = draw.random((6, 3)), draw.integers(0, 3, 6)
    found, solved = exact(artifact_of(graph), inputs, labels)
    assert solved.reason is None
    assert not found.masks["couple0"].all()
    assert found.loss == pytest.approx(loss_at(graph, inputs, labels))
    assert set(found.gradients) == {"w0", "w1", "w2", "loop0", "bias"}
    for name, gradient in found.gradients.items():
        assert np.abs(gradient).max() > 1e-3, name
        np.testing.assert_allclose(gradient, differences(graph, name, inputs, labels), atol=2e-7, err_msg=name)


def test_the_exact_gradient_goes_through_relays_and_round_several_loops():
    """couple0 -> relay -> couple1, a skip past the relay, and loops back to both couples: finite differences again."""
    draw = np.random.default_rng(7)
    shapes = {"first": (4, 3), "into": (5, 4), "outof": (3, 5), "skip": (3, 4), "back": (4, 3), "self": (3, 3), "last": (2, 3)}
    tensors = {name: frozen(draw.normal(size=shape) * 0.3 + (0.15 if name == "first" else 0.05)) for name, shape in shapes.items()}
    ends = {
        "first": ("input", "a"),
        "into": ("a", "r"),
        "outof": ("r", "b"),
        "skip": ("a", "b"),
        "back": ("b", "a"),
        "self": ("b", "b"),
        "last": ("b", "readout"),
    }
    synapses = tuple(Synapse(s, t, (Dense(n),), int(n in ("back", "self"))) for n, (s, t) in ends.items())
    couple = Dynamics(1.0, 0.5, 1.0, "plus")
    forward = Phase(
        "forward",
        20,
        ("input", "a", "r", "b", "readout"),
        {"a": couple, "r": Dynamics(1.0, members="graded"), "b": couple, "readout": Dynamics(1.0)},
        synapses,
    )
    both = Dynamics(1.0, 0.25, 0.5, "both")
    feedback = Phase(
        "feedback",
        20,
        ("b", "r", "a"),
        {"a": both, "r": Dynamics(1.0, members="graded"), "b": both},
        (),
        drive=(Drive("b", "error", gain=3.0),),
    )
    kinds = {"input": "input", "a": "couple", "r": "linear", "b": "couple", "readout": "readout"}
    sizes = {"input": 3, "a": 4, "r": 5, "b": 3, "readout": 2}
    populations = tuple(Population(name, (sizes[name],), kind) for name, kind in kinds.items())
    declared = Graph(populations, (forward, feedback), tensors, Units("float", {"forward": {"input": 1.0}}), Provenance("relayed"))
    graph = Pipeline((Fold(), Adjoint()))(declared)
    inputs, labels = draw.random((5, 3)), draw.integers(0, 2, 5)
    found, solved = exact(artifact_of(graph), inputs, labels)
    assert solved.reason is None
    assert set(found.gradients) == set(tensors)
    for name, gradient in found.gradients.items():
        assert np.abs(gradient).max() > 1e-4, name
        np.testing.assert_allclose(gradient, differences(graph, name, inputs, labels), atol=2e-7, err_msg=name)


def differences(graph, name, inputs, labels):
    """Central differences of the loss at the equilibrium, by one tensor."""
    numeric = np.zeros(graph.tensors[name].shape)
    for place in np.ndindex(numeric.shape):
        ends = []
        for sign in (1, -1):
            moved = graph.tensors[name].astype(float).copy()
            moved[place] += sign * 1e-6
            ends.append(loss_at(msgspec.structs.replace(graph, tensors={**graph.tensors, name: frozen(moved)}), inputs, labels))
        numeric[place] = (ends[0] - ends[1]) / 2e-6
    return numeric


def artifact_of(graph):
    """A source whose float graph is this one."""
    from toolchain.compiler import assembled
    from toolchain.source import Source

    made = assembled("sim", graph, Pipeline((Inject(), Retime(), Quantize()))(graph), warn=False)
    return Source("known", None, made)


def beside(source, inputs, labels):
    """SPIDE in floats, as a target, beside the exact gradient."""
    solved, how = exact(source, inputs, labels)
    spide = in_floats(source, inputs, labels)
    ours = Found(spide.gradients, spide.masks)
    theirs = None if solved is None else Found(solved.gradients, solved.masks)
    return fidelity({"torch": ours}, ours, theirs, how, samples=len(inputs), devices={"torch": "cpu"})


def test_spide_in_floats_comes_to_the_exact_gradient_with_time():
    """More steps of both phases, no couple at its bounds: the cosine of every tensor rises to 1."""
    draw = np.random.default_rng(5)
    weights = [draw.random((12, 6)) * 0.1 + 0.05, draw.normal(size=(3, 12)) * 2]
    loops = [(0, 0, draw.normal(size=(12, 12)) * 0.03)]
    inputs, labels = draw.random((20, 6)), draw.integers(0, 3, 20)
    least = []
    for steps in (10, 1000):
        close = beside(artifact_of(network(weights, loops=loops, time_steps=steps, feedback_steps=steps, gain=2.0)), inputs, labels)
        assert all(c.cosine == pytest.approx(1) and c.norm_ratio == pytest.approx(1) for c in close.spide["torch"].values())
        least.append(close.worst("torch")[1].cosine)
    assert close.masks == {"torch": 0.0}
    assert all(abs(c.norm_ratio - 1) < 0.01 for c in close.exact["torch"].values())
    assert least[1] > 0.9995
    assert least[1] > least[0]


def test_a_spike_on_the_way_to_silence_leaves_a_mask_open_and_is_counted():
    """The second neuron fires once before the first, which stops it, has begun: its rate goes to 0, its mask stays open."""
    loop = np.array([[0.0, 0.0], [-2.0, 0.0]])
    source = artifact_of(network([[[0.6], [0.6]], np.eye(2)], loops=[(0, 0, loop)], time_steps=500, feedback_steps=500, gain=0.5))
    close = beside(source, np.array([[1.0]]), np.array([1]))
    assert close.masks == {"torch": 0.5}
    assert close.exact["torch"]["w0"].cosine < 0.95
    assert "masks that are not the equilibrium's: torch 50.00 %" in close.sentence


def test_no_equilibrium_no_exact_gradient_and_the_reason_names_the_residual():
    source = artifact_of(ring())
    found, solved = exact(source, np.array([[0.9]]), np.array([0]))
    assert found is None
    assert "do not come to an equilibrium: residual" in solved.reason
    close = beside(source, np.array([[0.9]]), np.array([0]))
    assert close.exact == {}
    assert "do not come to an equilibrium" in close.sentence
    assert json.loads(json.dumps(close.to_json()))["against_exact"] is None
    assert "exact implicit" not in close.to_text().splitlines()[0]


def test_an_artefact_without_floats_has_no_exact_gradient():
    compiled = toolchain.compile("digits-fc", target="sim", float_tensors=False).artifact
    found, solved = exact(find(compiled), np.zeros((1, 1, 8, 8)), np.array([0]))
    assert found is None
    assert "without its float tensors" in solved.reason


def test_closeness_of_what_vanishes():
    one, none = np.array([3.0, 4.0]), np.zeros(2)
    assert closeness(2 * one, one) == Closeness(pytest.approx(1.0), 2.0)
    assert closeness(one, none) == Closeness(0.0, None)
    assert closeness(none, none) == Closeness(1.0, None)
    assert cosine(one, -one) == pytest.approx(-1)
    assert leak_sum(0.5, 2) == 1.5
    assert json.loads(json.dumps(Solved(np.inf, 1.0, (0, 0), "so").to_json()))["forward_residual"] is None


def test_compare_has_all_of_it_and_the_digits_gradient_is_near_the_exact_one():
    found = toolchain.compare("digits-fc", targets=("torch", "sim"), dataset="digits", samples=128, device="cpu", budget_samples=0)
    read = json.loads(json.dumps(found.to_json()))
    assert read["populations"]["worst"]["forward"]["entire"] in ("hidden1", "readout")
    assert {c["graph"] for c in read["settling"]["curves"]} == {"float", "integer"}
    assert read["fidelity"]["against_spide"]["torch"]["input.weight"]["cosine"] == pytest.approx(1)
    assert read["fidelity"]["against_exact"]["sim"]["feedback.0.weight"]["cosine"] > 0.9
    for words in ("least cosine with torch", "error by population", "settling:", "least cosine with the exact implicit gradient"):
        assert words in found.to_text()


def test_the_text_of_many_tensors_has_the_farthest():
    """Of eight tensors the two nearest are left to the JSON, whichever target they are near on."""
    true, none = Solved(0.0, 0.0, (1, 1)), {}
    draw = np.random.default_rng(0)
    exact_ones = {f"tensor{i}": draw.normal(size=50) for i in range(8)}
    noise = {"tensor2": 1e-3, "tensor5": 1e-3}
    near = {name: g + noise.get(name, 0.3) * draw.normal(size=50) for name, g in exact_ones.items()}
    own, other = Found(exact_ones, none), Found(near, none)
    text = fidelity({"torch": own, "sim": other}, own, None, true, samples=4, devices={}).to_text()
    assert [name for name in exact_ones if f"\n{name} " in text] == [f"tensor{i}" for i in (0, 1, 3, 4, 6, 7)]
    assert "2 other tensors are no farther from SPIDE in floats" in text


def test_compare_of_floats_alone_settles_without_populations():
    found = toolchain.compare("digits-fc", targets=("torch",), dataset="digits", samples=16, device="cpu")
    assert found.to_json()["populations"] is None
    assert [c.graph for c in found.inside.settling.curves] == ["float", "float"]


@pytest.mark.cuda
def test_a_gpu_stands_beside_the_cpu():
    """Target torch on CUDA against SPIDE in floats on the CPU: the same gradient up to spikes that float32 sums in another order move."""
    found = toolchain.compare(
        "digits-fc", targets=("torch", "sim"), dataset="digits", samples=128, device="cuda", budget_samples=0
    ).fidelity
    assert found.devices["torch"] != "cpu"
    assert min(close.cosine for close in found.spide["torch"].values()) > 0.99
