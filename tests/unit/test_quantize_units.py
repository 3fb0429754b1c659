"""Units a population: relays, pools, connections of very different sizes, calibration. Small graphs built by hand."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from toolchain import fixed
from toolchain.errors import DesignRuleError, GraphError
from toolchain.ir import (
    AvgPool2d,
    Bias,
    Calibration,
    Conv2d,
    Dense,
    Drive,
    Dynamics,
    Graph,
    Phase,
    Population,
    Provenance,
    Scale,
    Synapse,
    Units,
    frozen,
    verify,
)
from toolchain.passes import Adjoint, Inject, Quantize, Retime
from toolchain.passes.ranges import ranges
from toolchain.targets.reference import REFERENCE

SHAPE = (4, 7, 7)
PLUS, RELAY = Dynamics(1.0, 0.5, 1.0, "plus"), Dynamics(1.0, members="graded")


def residual(step: float = 1 / 16, seed: int = 0) -> Graph:
    """The network ready to be quantized."""
    return Retime()(Inject()(Adjoint()(drawn(step, seed))))


def drawn(step: float = 1 / 16, seed: int = 0) -> Graph:
    """Input -> stream -> couples -> couples -> stream -> couples -> readout, the stream beside the couples, and a loop from the last to the first couples."""
    draw = np.random.default_rng(seed)
    around = ((1, 1), (1, 1))

    def grid(*shape: int, most: int = 4):
        return frozen(draw.integers(-most, most + 1, shape) * step)

    tensors = {
        "in": grid(4, 2, 3, 3, most=2),
        "norm1": frozen(draw.integers(8, 17, 4) / 16),
        "conv1": grid(4, 4, 3, 3),
        "conv2": grid(4, 4, 3, 3),
        "one": frozen(np.ones(4)),
        "norm2": frozen(draw.integers(8, 17, 4) / 16),
        "loop": grid(4, 4, 3, 3, most=1),
        "readout": grid(3, 4),
        "steady": grid(*SHAPE),
        "late": grid(*SHAPE),
    }
    names = ("input", "stream0", "a", "b", "stream1", "c", "readout")
    kinds = ("input", "linear", "couple", "couple", "linear", "couple", "readout")
    shapes = ((2, 7, 7), *[SHAPE] * 5, (3,))
    dynamics = {n: {"linear": RELAY, "couple": PLUS, "readout": Dynamics(1.0)}[k] for n, k in zip(names[1:], kinds[1:], strict=True)}
    synapses = (
        Synapse("input", "stream0", (Conv2d("in", *around),)),
        Synapse("stream0", "a", (Scale(weight="norm1"),)),
        Synapse("a", "b", (Conv2d("conv1", *around),)),
        Synapse("b", "stream1", (Conv2d("conv2", *around),)),
        Synapse("stream0", "stream1", (Scale(weight="one"),)),
        Synapse("stream1", "c", (Scale(weight="norm2"),)),
        Synapse("c", "a", (Conv2d("loop", *around),), delay=1),
        Synapse("c", "readout", (AvgPool2d((7, 7), (7, 7)), Dense("readout"))),
    )
    back = {n: RELAY if d is RELAY else Dynamics(1.0, 0.25, 0.5, "both") for n, d in dynamics.items() if n != "readout"}
    forward = Phase("forward", 12, names, dynamics, synapses, bias={"a": (Bias("steady"), Bias("late", start=1))})
    feedback = Phase("feedback", 30, tuple(reversed(names[1:-1])), back, (), drive=(Drive("c", "error", gain=20.0),))
    populations = tuple(Population(n, s, k) for n, s, k in zip(names, shapes, kinds, strict=True))
    return Graph(populations, (forward, feedback), tensors, Units("float", {}), Provenance("residual"))


def runs(graph: Graph, x: np.ndarray, error: np.ndarray):
    with replace(REFERENCE, trace=True).compile(graph) as run:
        return run.run(x), run.run(error, phase="feedback")


def test_relays_carry_a_binary_grid_without_any_rounding():
    """Stream, normalisation, loop and both phases: the integers have the float graph's spikes, and relays its very values."""
    graph = residual()
    quantized = Quantize(input_levels=4)(graph)
    verify(quantized)
    draw = np.random.default_rng(1)
    x, error = draw.integers(0, 5, (3, 2, 7, 7)) / 4, draw.integers(-4, 5, (3, *SHAPE)) / 64
    for phase, floats, integers in zip(("forward", "feedback"), runs(graph, x, error), runs(quantized, x, error), strict=True):
        assert sum(int(s.sum()) for s in integers.saturations.values()) == 0
        for name in ("a", "b", "c"):
            np.testing.assert_array_equal(floats.history[name].spikes, integers.history[name].spikes)
            assert floats.activity[name].any()
        for name in ("stream0", "stream1"):
            units = quantized.scale(phase, name) / graph.scale(phase, name)
            np.testing.assert_array_equal(floats.history[name].spikes * units, integers.history[name].spikes)


@pytest.mark.parametrize("bits", [8, 6, 4, 2])
def test_every_exponent_keeps_to_the_chip_and_both_phases_share_one_tensor(bits):
    quantized = Quantize(weight_bits=bits)(residual(step=0.0371, seed=bits))
    verify(quantized)
    low, high = fixed.weight_range(bits)
    forward, feedback = quantized.phases
    for synapse in (*forward.synapses, *feedback.synapses):
        (op,) = [op for op in synapse.ops if getattr(op, "weight", None)]
        assert low <= quantized.tensors[op.weight].min()
        assert quantized.tensors[op.weight].max() <= high
        assert 0 <= op.exponent <= fixed.WEIGHT_EXPONENT_MAX
    assert {op.weight for s in feedback.synapses for op in s.ops} <= {
        op.weight for s in forward.synapses for op in s.ops if hasattr(op, "weight")
    }


def test_fewer_bits_round_more_and_say_so():
    errors = [Quantize(weight_bits=bits)(residual(step=0.0371)).provenance.rounding["conv1"].rms_error for bits in (8, 6, 4, 2)]
    assert errors == sorted(errors)
    assert errors[0] > 0


def test_a_pool_is_a_sum_whose_share_is_in_the_weights():
    """Integers add over windows; the readout still means the mean."""
    graph = residual()
    x = np.ones((1, 2, 7, 7))
    quantized = Quantize()(graph)
    floats, integers = runs(graph, x, np.zeros((1, *SHAPE)))[0], runs(quantized, x, np.zeros((1, *SHAPE)))[0]
    scale = quantized.scale("forward", "readout")
    assert np.abs(floats.potentials["readout"]).max() > 0
    weights = quantized.tensors["readout"] / scale * 49
    np.testing.assert_allclose(
        integers.potentials["readout"][0] / scale, weights @ integers.counts["c"][0].sum(axis=(1, 2)) / 49, rtol=1e-12
    )
    np.testing.assert_allclose(weights, graph.tensors["readout"], atol=1 / 64)


def test_calibration_leaves_finer_currents_and_says_what_may_be_cut():
    graph = residual()
    seen = Calibration("mnist", 8, {"forward": {"a": 1.0}}, {"stream0": 0.01})
    plain, calibrated = Quantize()(graph), Quantize(calibration=seen)(graph)
    assert calibrated.provenance.calibration == seen
    error = "forward.stream0.current"
    assert calibrated.provenance.rounding[error].max_error < plain.provenance.rounding[error].max_error / 3
    assert any("injected current" in note and "beyond what calibration saw" in note for note in calibrated.provenance.notes)
    assert not any("injected current" in note for note in plain.provenance.notes)


def test_the_nearest_leak_of_twelve_bits_is_named():
    graph = residual()
    leaky = tuple(
        msgspec.structs.replace(
            phase,
            dynamics={n: msgspec.structs.replace(d, leak=0.95) if d.members in ("plus", "both") else d for n, d in phase.dynamics.items()},
        )
        for phase in graph.phases
    )
    quantized = Quantize()(msgspec.structs.replace(graph, phases=leaky))
    assert quantized.phase("forward").dynamics["a"].leak == 3891 / 4096
    assert any(note.startswith("leak 0.95 is 3891/4096 on the chip, -4.9e-05") for note in quantized.provenance.notes)


def test_connections_too_far_apart_to_share_a_source_are_rounded_again_for_the_feedback_phase():
    """The feedback phase adds both at their source, with 7 bits of exponent between them: the small one gets coarser integers there, and a note says so."""
    graph = residual()
    tensors = {**graph.tensors, "conv1": frozen(graph.tensors["conv1"] * 2.0**-18)}
    extra = (Synapse("a", "c", (Conv2d("far", (1, 1), (1, 1)),), delay=1),)
    back = (Synapse("c", "a", (Conv2d("far", (1, 1), (1, 1), transpose=True),), delay=1, gate="c"),)
    tensors["far"] = frozen(graph.tensors["loop"] * 2.0**4)
    tiny = Dynamics(1.0, 0.5 * 2.0**-18, 2.0**-18, "plus")  # for which the small weights are large
    phases = tuple(
        msgspec.structs.replace(
            p,
            synapses=p.synapses + (extra if p.name == "forward" else back),
            dynamics={**p.dynamics, "b": tiny} if p.name == "forward" else p.dynamics,
        )
        for p in graph.phases
    )
    quantized = Quantize()(msgspec.structs.replace(graph, tensors=tensors, phases=phases))
    verify(quantized)
    assert any("'conv1' has integers of its own in the feedback phase" in note for note in quantized.provenance.notes)
    forward, feedback = (quantized.phase(name) for name in ("forward", "feedback"))
    (small,) = (s.ops[0] for s in feedback.synapses if (s.source, s.target) == ("b", "a"))
    (large,) = (s.ops[0] for s in feedback.synapses if (s.source, s.target) == ("c", "a") and s.ops[0].weight == "far")
    assert small.weight == "conv1.feedback"
    unit = quantized.scale("feedback", "a") / graph.scale("feedback", "a")
    for op, exact in ((small, tensors["conv1"]), (large, tensors["far"])):
        found = quantized.tensors[op.weight] * 2.0**op.exponent / unit
        assert np.abs(found - exact).max() <= np.abs(tensors["far"]).max() / 127
    (kept,) = (s.ops[0] for s in forward.synapses if (s.source, s.target) == ("a", "b"))
    np.testing.assert_array_equal(quantized.tensors[kept.weight] * 2.0**kept.exponent / quantized.scale("forward", "b"), tensors["conv1"])


def test_one_weight_in_two_connections_is_refused():
    graph = residual()
    forward = graph.phase("forward")
    shared = tuple(
        msgspec.structs.replace(s, ops=(msgspec.structs.replace(s.ops[0], weight="conv1"),))
        if s.target == "stream1" and s.source == "b"
        else s
        for s in forward.synapses
    )
    bad = msgspec.structs.replace(graph, phases=(msgspec.structs.replace(forward, synapses=shared),))
    with pytest.raises(GraphError, match="share weight 'conv1'"):
        Quantize()(bad)


def test_events_are_sent_in_few_levels():
    graph = drawn()
    events = msgspec.structs.replace(
        graph, populations=tuple(msgspec.structs.replace(p, events=p.kind == "input") for p in graph.populations)
    )
    quantized = Quantize()(Retime()(Inject()(Adjoint()(events))))
    assert quantized.scale("forward", "input") == 15
    assert not quantized.phase("forward").drive
    x = np.random.default_rng(0).integers(0, 2, (2, 2, 7, 7, 12)).astype(float)
    with REFERENCE.compile(quantized) as run:
        result = run.run(x)
    assert result.counts["c"].any()


def test_a_connection_too_small_to_matter_rounds_to_nothing_and_a_note_says_so():
    """Its neighbours keep their bits, and the membrane its room."""
    graph = residual()
    small = Quantize()(msgspec.structs.replace(graph, tensors={**graph.tensors, "loop": frozen(graph.tensors["loop"] * 2.0**-20)}))
    assert not small.tensors["loop"].any()
    assert any(note.startswith("weight 'loop' rounds to 0 everywhere") for note in small.provenance.notes)
    whole = Quantize()(graph)
    assert small.scale("forward", "a") <= whole.scale("forward", "a") * 2
    assert not any("rounds to 0" in note for note in whole.provenance.notes)


def test_one_outlier_that_takes_the_bits_of_all_others_is_named():
    graph = residual(step=0.0371)
    spoilt = np.array(graph.tensors["conv1"])
    spoilt[0, 0, 0, 0] = 40.0
    notes = Quantize()(msgspec.structs.replace(graph, tensors={**graph.tensors, "conv1": frozen(spoilt)})).provenance.notes
    assert any(note.startswith("weight 'conv1' loses") and "times that size): clip it" in note for note in notes)
    assert not any("loses" in note for note in Quantize()(graph).provenance.notes)


def test_a_loop_of_relays_is_bounded_by_its_turns():
    """A relay that feeds itself one step late: its values grow by the loop's gain at every step, no further."""
    graph = drawn()
    forward, declared = graph.phases
    loop = Synapse("stream0", "stream0", (Scale(weight="gain"),), delay=1)
    phases = (msgspec.structs.replace(forward, synapses=(*forward.synapses, loop)), declared)
    looped = msgspec.structs.replace(graph, phases=phases, tensors={**graph.tensors, "gain": frozen(np.ones(4))})
    prepared = Retime()(Inject()(Adjoint()(looped)))
    quantized = Quantize()(prepared)
    verify(quantized)
    x = np.full((1, 2, 7, 7), 0.25)
    floats, integers = (runs(g, x, np.zeros((1, *SHAPE)))[0] for g in (prepared, quantized))
    units = quantized.scale("forward", "stream0")
    np.testing.assert_allclose(integers.potentials["stream0"] / units, floats.potentials["stream0"], atol=0.02)
    bound = ranges(prepared, prepared.phase("forward")).arriving["stream0"]
    assert (np.abs(floats.potentials["stream0"][0]) <= np.maximum(bound.high, -bound.low) + 1e-9).all()


def test_a_bias_that_no_register_holds_is_cut_with_a_note():
    graph = residual()
    biases = {**graph.tensors, "steady": frozen(graph.tensors["steady"] + 5000.0)}
    notes = Quantize()(msgspec.structs.replace(graph, tensors=biases)).provenance.notes
    assert any(note.startswith("bias 'steady' of 'a' passes its 13-bit mantissa and is cut in 196 of 196 neurons") for note in notes)
    assert not any("bias" in note for note in Quantize()(graph).provenance.notes)


def test_a_relay_keeps_its_bias_whole():
    """Of graded input too, whose unit would be finer than a bias register reaches."""
    graph = drawn()
    forward, declared = graph.phases
    tensors = {**graph.tensors, "offset": frozen(np.full(SHAPE, 9.0))}
    biased = msgspec.structs.replace(forward, bias={**forward.bias, "stream0": (Bias("offset"),)})
    quantized = Quantize()(Retime()(Adjoint()(msgspec.structs.replace(graph, phases=(biased, declared), tensors=tensors))))
    (bias,) = quantized.phase("forward").bias["stream0"]
    held = quantized.tensors[bias.tensor] * 2.0**bias.exponent / quantized.scale("forward", "stream0")
    np.testing.assert_allclose(held, 9.0, rtol=1e-3)


def test_a_reset_that_would_round_to_nothing_is_refused():
    graph = residual()
    tiny = tuple(
        msgspec.structs.replace(
            p,
            dynamics={n: msgspec.structs.replace(d, reset=1e-9) if n == "b" and p.name == "forward" else d for n, d in p.dynamics.items()},
        )
        for p in graph.phases
    )
    with pytest.raises(DesignRuleError, match=r"population 'b' needs threshold .* and reset 0 in phase 'forward'"):
        Quantize()(msgspec.structs.replace(graph, phases=tiny))


@pytest.mark.parametrize("reset", [0.25, 1.0, 2.0])
def test_no_potential_passes_its_bounds_at_any_step(reset):
    """Floats and integers, before a neuron fires and behind it, whatever the reset is beside the threshold of 0.5."""
    graph = residual(step=0.0371)
    changed = tuple(
        msgspec.structs.replace(
            p,
            dynamics={
                n: msgspec.structs.replace(d, reset=reset if p.name == "forward" else reset / 2) if n in "abc" else d
                for n, d in p.dynamics.items()
            },
        )
        for p in graph.phases
    )
    graph = msgspec.structs.replace(graph, phases=changed)
    draw = np.random.default_rng(2)
    amplitude = graph.phase("feedback").dynamics["c"].reset / graph.scale("feedback", "c")
    x, error = draw.random((6, 2, 7, 7)), draw.uniform(-amplitude, amplitude, (6, *SHAPE))
    for made in (graph, Quantize()(graph)):
        for phase, result in zip(made.phases, runs(made, x, error), strict=True):
            bounds = ranges(made, phase)
            for name in ("a", "b", "c"):
                bound = bounds.potential[name]
                after, fired = result.history[name].potentials, result.history[name].spikes
                before = after + phase.dynamics[name].reset * fired.astype(float)
                for potential in (before, after):
                    assert (potential <= bound.high + 1e-9).all()
                    assert (potential >= bound.low - 1e-9).all()
