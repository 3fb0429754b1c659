"""Hostile numbers: NaN, infinities, denormals, nothing but zeros, dead and saturated populations, thresholds at the limits, T = 1, no samples at all.

Each has one defined result, the same on every target, or one sentence, the same on every target: spikes, potentials, counts, traces and saturations are
compared with the reference's, in both phases, and errors word for word. Where a target takes fewer graphs than others by its own rules (SANA-FE), it says so.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

import toolchain
from toolchain import codec
from toolchain.errors import DesignRuleError, ToolchainError, UsageError
from toolchain.ir import (
    POTENTIAL_LIMIT,
    Array,
    Bias,
    Dense,
    Drive,
    Dynamics,
    Graph,
    Phase,
    Population,
    Provenance,
    Synapse,
    Units,
    adjoint,
    frozen,
    verify,
)
from toolchain.layers import FeedbackSNN, Limited, Neuron
from toolchain.lower import lower
from toolchain.network import Frobenius, Limit, Spectral
from toolchain.passes import LOIHI_PIPELINE, Retime
from toolchain.target import Result, Target, get
from toolchain.targets.reference import REFERENCE
from toolchain.targets.sim import SIM
from toolchain.targets.torch_float import TORCH

Same = Callable[[Result, Result], None]

TOP = POTENTIAL_LIMIT
FLOAT32_MAX = float(np.finfo(np.float32).max)

INTEGERS: dict[str, Target] = {
    "core": replace(SIM, device="cpu", kernel="native"),
    "core without vectors": replace(SIM, device="cpu", kernel="native", instructions=0),
    "core by events": replace(SIM, device="cpu", kernel="native", currents="events"),
    "core by products": replace(SIM, device="cpu", kernel="native", currents="dense"),
    "torch": replace(SIM, device="cpu", kernel="torch", batch=4),
}
"""Every way in which `sim` computes on a CPU."""


# Integer graphs at the limits of a chip.


def at_limits(
    *,
    width: int = 3,
    inputs: int = 2,
    classes: int = 2,
    threshold: int = 100,
    reset: int = 200,
    back: int = 50,
    leak: float = 1.0,
    readout_leak: float = 1.0,
    weights: tuple[int, ...] = (64,),
    biases: tuple[int, ...] = (0,),
    host: int = 100,
    host_bias: int = 0,
    shift: int = 0,
    exponent: int = 0,
    levels: float = 255.0,
    steps: int = 4,
    relay: bool = False,
    graded: bool = False,
) -> Graph:
    """input -> a (-> relay) -> b -> readout and b -> a a step late; `weights` and `biases` repeat over each tensor, `exponent` is everyone's."""
    tensors: dict[str, Array] = {}

    def dense(name: str, out: int, into: int) -> Dense:
        tensors[name] = frozen(np.resize(weights, (out, into)), np.int8)
        return Dense(name, exponent=exponent)

    inner = ["a", "relay", "b"] if relay else ["a", "b"]
    populations = (
        Population("input", (inputs,), "input"),
        *(Population(name, (width,), "linear" if name == "relay" else "couple") for name in inner),
        Population("readout", (classes,), "readout"),
    )
    edges = [*((s, t, 0) for s, t in itertools.pairwise(inner)), ("b", "a", 1)]
    between = [Synapse(s, t, (dense(f"{s}.{t}", width, width),), delay) for s, t, delay in edges]
    back_again = tuple(
        Synapse(s.target, s.source, adjoint(s.ops), s.delay, gate=None if s.target == "relay" else s.target) for s in reversed(between)
    )
    synapses = [*between, Synapse("b", "readout", (dense("readout", classes, width),))]
    drives: tuple[Drive, ...] = ()
    if graded:
        synapses.insert(0, Synapse("input", "a", (dense("input", width, inputs),)))
    else:
        tensors |= {"input": frozen(np.full((width, inputs), host), np.int32), "host.bias": frozen(np.full(width, host_bias), np.int64)}
        drives = (Drive("a", "input", (Dense("input"),), "host.bias", shift=shift, exponent=exponent),)
    for name in inner:
        tensors[f"{name}.bias"] = frozen(np.resize(biases, (width,)), np.int16)
    graded_value = Dynamics(1.0, members="graded")
    forward = Phase(
        "forward",
        steps,
        (*(["input"] if graded else []), *inner, "readout"),
        {n: graded_value if n == "relay" else Dynamics(leak, threshold, reset, "plus") for n in inner}
        | {"readout": Dynamics(readout_leak)},
        tuple(synapses),
        {name: (Bias(f"{name}.bias", exponent),) for name in inner},
        drives,
    )
    feedback = Phase(
        "feedback",
        steps,
        tuple(reversed(inner)),
        {n: graded_value if n == "relay" else Dynamics(leak, back, reset, "both") for n in inner},
        back_again,
        drive=(Drive("b", "error", gain=4.0, exponent=exponent),),
    )
    unit = 256.0 * 2**exponent
    scale = {
        "forward": {"input": levels} | dict.fromkeys([*inner, "readout"], unit),
        "feedback": {name: 1.0 if name == "relay" else unit for name in inner},
    }
    graph = Graph(populations, (forward, feedback), tensors, Units("integer", scale), Provenance("at-limits"))
    verify(graph)
    return graph


FULL: dict[str, Any] = {"exponent": 7, "biases": (4095,), "host": 4095, "steps": 20}
LIMITS: dict[str, dict[str, Any]] = {
    "smallest threshold": {"threshold": 1, "reset": 1, "back": 1},
    "nothing subtracted": {"threshold": 1, "reset": 0, "back": 1},
    "largest threshold": {**FULL, "threshold": TOP, "reset": TOP, "back": TOP, "weights": (127,)},
    "largest threshold, smallest reset": {**FULL, "threshold": TOP, "reset": 1, "back": TOP, "weights": (127, -128)},
    "reset far above the threshold": {**FULL, "threshold": 1, "reset": TOP, "back": 1, "weights": (127,)},
    "all -128": {**FULL, "threshold": 1, "reset": TOP, "back": 1, "weights": (-128,), "biases": (-4096,), "host": -4096},
    "both ends of every range": {**FULL, "threshold": TOP, "reset": TOP // 2, "weights": (127, -128, 0), "biases": (4095, -4096, 1)},
    "never fires": {"threshold": TOP, "reset": 1, "back": TOP},
    "always fires": {"threshold": 1, "reset": 1, "back": 1, "biases": (100,)},
    "smallest leak": {"leak": 1 / 4096, "readout_leak": 1 / 4096, "biases": (4095,), "exponent": 7},
    "smallest leak, downwards": {"leak": 1 / 4096, "biases": (-4096,), "exponent": 7, "reset": TOP},
    "largest leak": {**FULL, "leak": 4095 / 4096, "readout_leak": 4095 / 4096, "threshold": TOP},
    "all zero": {"weights": (0,), "host": 0},
    "graded input, all 127": {"weights": (127,), "exponent": 7, "graded": True, "steps": 20},
    "graded input, all -128": {"weights": (-128,), "exponent": 7, "graded": True, "steps": 20},
    "input of one level": {"levels": 1.0, "graded": True},
    "relay, all 127": {**FULL, "relay": True, "weights": (127,)},
    "relay, all -128": {**FULL, "relay": True, "weights": (-128,), "biases": (-4096,), "threshold": TOP},
    "one step": {"steps": 1, "biases": (200,)},
    "one of each": {"width": 1, "inputs": 1, "classes": 1, "steps": 1},
    "largest host weights": {"host": 2**31 - 1, "host_bias": 2**52 - 1, "shift": 20},
    "smallest host weights": {"host": -(2**31), "host_bias": 1 - 2**52, "exponent": 7},
}


def values_for(graph: Graph) -> tuple[Array, Array]:
    """Inputs (all 0, all 1, -0.0, denormal, in between) and errors (0, both signs far beyond the register, denormal, in between)."""
    shape = graph.of_kind("input")[0].shape
    inputs = np.stack([np.zeros(shape), np.ones(shape), np.full(shape, -0.0), np.full(shape, 5e-324), np.full(shape, 0.5)])
    driven = graph.population(codec.error_drive(graph).population).shape
    errors = np.stack([np.zeros(driven), np.full(driven, 1e6), np.full(driven, -1e6), np.full(driven, 5e-324), np.full(driven, -0.4)])
    return inputs, errors


def both_phases(target: Target, graph: Graph, inputs: Array, error: Array) -> tuple[Result, Result]:
    with replace(target, trace=True).compile(graph) as executable:  # type: ignore[type-var]  # a target is a dataclass
        return executable.run(inputs), executable.run(error, phase="feedback")


def assert_same_as_reference(target: Target, graph: Graph, same: Same) -> tuple[Result, Result]:
    inputs, errors = values_for(graph)
    expected = both_phases(REFERENCE, graph, inputs, errors)
    for ours, theirs in zip(expected, both_phases(target, graph, inputs, errors), strict=True):
        same(ours, theirs)
    return expected


@pytest.mark.parametrize("mode", ["exact", "pipelined"])
@pytest.mark.parametrize("case", LIMITS)
def test_sim_is_the_reference_at_the_limits(case: str, mode: Literal["exact", "pipelined"], assert_identical: Same) -> None:
    graph = Retime(mode)(at_limits(**LIMITS[case]))
    for target in INTEGERS.values():
        assert_same_as_reference(target, graph, assert_identical)


@pytest.mark.cuda
@pytest.mark.parametrize("case", LIMITS)
def test_sim_on_a_gpu_is_the_reference_at_the_limits(case: str, assert_identical: Same) -> None:
    for graph in (at_limits(**LIMITS[case]), Retime("exact")(at_limits(**LIMITS[case]))):
        assert_same_as_reference(replace(SIM, device="cuda"), graph, assert_identical)


@pytest.mark.lava
@pytest.mark.parametrize("case", ["both ends of every range", "smallest leak, downwards", "relay, all 127", "one of each"])
def test_lava_is_the_reference_at_the_limits(case: str, assert_identical: Same) -> None:
    from toolchain.targets.lava_sim import LAVA_SIM

    assert_same_as_reference(LAVA_SIM, Retime("exact")(at_limits(**LIMITS[case])), assert_identical)


@pytest.mark.parametrize("case", ["smallest threshold", "nothing subtracted", "never fires", "always fires", "all zero", "one of each"])
def test_sanafe_is_the_reference_at_the_limits(case: str, assert_identical: Same) -> None:
    pytest.importorskip("sanafe")
    from toolchain.targets.sanafe import SANAFE

    assert_same_as_reference(SANAFE, Retime("exact")(at_limits(**LIMITS[case])), assert_identical)


def test_sanafe_refuses_what_it_would_not_clamp() -> None:
    pytest.importorskip("sanafe")
    from toolchain.targets.sanafe import SANAFE

    graph = Retime("exact")(at_limits(**LIMITS["largest threshold"]))
    with pytest.raises(DesignRuleError, match="population 'a' passes 24 bits at step"):
        both_phases(SANAFE, graph, *values_for(graph))


def test_the_limits_are_met() -> None:
    """Among these graphs potentials saturate at both ends and thresholds are met exactly; otherwise the tests above would prove little."""
    graphs = {case: at_limits(**options) for case, options in LIMITS.items()}
    found = {case: both_phases(REFERENCE, graph, *values_for(graph)) for case, graph in graphs.items()}
    low = min(int(h.potentials.min()) for pair in found.values() for r in pair for h in r.history.values())
    high = max(int(h.potentials.max()) for pair in found.values() for r in pair for h in r.history.values())
    assert (low, high) == (-TOP, TOP - 1)  # behind the smallest reset
    always, never = found["always fires"][0], found["never fires"][0]
    assert all((always.counts[name] == 4).all() for name in "ab")
    assert not any(never.counts[name].any() for name in "ab")
    assert sum(int(s.sum()) for pair in found.values() for s in pair[1].saturations.values()) > 0


# Networks with hostile weights, from the module on.


def network(
    weights: dict[str, float] | None = None,
    *,
    steps: int = 4,
    width: int = 4,
    scale_factor: float = 10.0,
    double: bool = False,
    **neuron: float,
) -> FeedbackSNN:
    """input -> hidden1 -> hidden2 -> readout with a loop; `weights` fills the parameters whose names begin so."""
    torch.manual_seed(0)
    about = {"threshold": 1.0, "u_rest": -1.0, "threshold_back": 0.5, "u_rest_back": -0.5, "leak": 1.0, **neuron}
    net = FeedbackSNN(
        name="hostile",
        input_shape=(1, 8, 8),
        input=nn.Linear(64, width),
        hidden=[nn.Linear(width, width)],
        feedback=[(1, 0, nn.Linear(width, width, bias=False))],
        readout=nn.Linear(width, 10),
        neuron=Neuron(**about),
        time_steps=steps,
        feedback_steps=steps,
        scale_factor=scale_factor,
    )
    net = net.double() if double else net
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            for start, value in (weights or {}).items():
                if name.startswith(start):
                    parameter.fill_(value)
    return net.eval()


DEFINED: dict[str, Callable[[], FeedbackSNN]] = {
    "all zero": lambda: network({"": 0.0}),
    "all -0.0": lambda: network({"": -0.0}),
    "all denormal": lambda: network({"": 1e-40}),
    "all the smallest float64": lambda: network({"": 5e-324}, double=True),
    "all tiny": lambda: network({"": 1e-38}),
    "tiny between populations": lambda: network({"hidden": 1e-38}),
    "denormal readout": lambda: network({"readout": 1e-45}),
    "all large": lambda: network({"": 1e11}),
    "large readout": lambda: network({"readout": 1e12}),
    "large input": lambda: network({"input": 1e11}),
    "large input bias": lambda: network({"input.bias": 1e12}),
    "dead": lambda: network({"input.bias": -50.0, "hidden.0.bias": -50.0}),
    "saturated": lambda: network({"input.bias": 50.0, "hidden.0.bias": 50.0}),
    "one step": lambda: network(steps=1),
    "one neuron each": lambda: network(width=1),
    "hardly any leak": lambda: network(leak=1 - 1e-12),
    "hardly anything left": lambda: network(leak=1e-9),
    "huge scale factor": lambda: network(scale_factor=1e20),
    "tiny scale factor": lambda: network(scale_factor=1e-30),
    "reset far above the threshold": lambda: network(threshold=0.01, u_rest=-5.0),
    "feedback never fires": lambda: network(threshold_back=1e6, u_rest_back=-1e6),
}

REFUSED: dict[str, tuple[Callable[[], FeedbackSNN], str]] = {
    "NaN": (lambda: network({"hidden": float("nan")}), "'hidden.0.weight' of 'hostile' holds NaN or infinite values"),
    "infinite": (lambda: network({"readout.weight": float("inf")}), "'readout.weight' of 'hostile' holds NaN or infinite values"),
    "-infinite": (lambda: network({"input.bias": float("-inf")}), "'input.bias' of 'hostile' holds NaN or infinite values"),
    "float32's largest": (lambda: network({"input.weight": FLOAT32_MAX}), r"'input.weight' reaches 3.4e\+38"),
    "beyond float32": (lambda: network({"readout.bias": 1e308}, double=True), r"'readout.bias' reaches 1e\+308"),
    "huge threshold": (lambda: network(threshold=1e29, u_rest=-1e29), r"'hidden1' in phase 'forward' has threshold 1e\+29"),
    "tiny threshold": (lambda: network(threshold=1e-30, u_rest=-1e-30), "'hidden1' in phase 'forward' has threshold 1e-30"),
    "huge error": (lambda: network(scale_factor=1e30), "the error passes .* lower the scale factor"),
}

TARGETS = ("torch", "reference", "sim", "lava-sim")

IMAGES = np.concatenate([np.zeros((1, 1, 8, 8)), np.ones((1, 1, 8, 8)), np.random.default_rng(0).random((2, 1, 8, 8))])
LABELS = np.array([0, 9, 3, 0])


NO_UNIT = {("large input", "graded")}
"""What no chip has units for: a weight 10^11 times the threshold beside one that is not."""


@pytest.mark.parametrize("mode", ["bias", "graded"])
@pytest.mark.parametrize("case", DEFINED)
def test_hostile_weights_compile_to_one_result(case: str, mode: str, assert_identical: Same) -> None:
    """Whatever way `sim` computes, it is the reference, to the class that wins."""
    pipeline = LOIHI_PIPELINE.with_options(inject={"mode": mode})
    graph = lower(DEFINED[case]())
    if (case, mode) in NO_UNIT:
        with pytest.raises(DesignRuleError, match="leave no unit for both: bring weights and threshold closer together"):
            pipeline(graph)
        return
    integers = pipeline(graph)
    forward, feedback, scores = _answers(REFERENCE, integers)
    assert np.isfinite(scores).all()
    for target in INTEGERS.values():
        found = _answers(target, integers)
        assert_identical(forward, found[0])
        assert_identical(feedback, found[1])
        np.testing.assert_array_equal(scores, found[2])


@pytest.mark.parametrize(
    ("weights", "whose"),
    [
        ({"feedback": 1e9}, "'hidden1', up to 1e.09"),
        ({"hidden": 1e12, "feedback": 0.0}, "'hidden2', up to 1e.12"),
        ({"readout": 1e-45, "feedback": 1e-45, "hidden": 1e12}, "'hidden2', up to"),
    ],
)
def test_what_leaves_no_unit_is_named_where_it_is(weights: dict[str, float], whose: str) -> None:
    """One population's weights can be what another has no unit for."""
    with pytest.raises(
        DesignRuleError, match=f"^population 'hidden.' needs threshold .* the weights of ({whose}|this one).* leave no unit"
    ) as error:
        LOIHI_PIPELINE(lower(network(weights)))
    named = whose.partition(",")[0]
    assert f"the weights of {named}" in str(error.value) or str(error.value).startswith(f"population {named} ")


def _answers(target: Target, graph: Graph) -> tuple[Result, Result, Array]:
    with replace(target, trace=True).compile(graph) as executable:  # type: ignore[type-var]  # a target is a dataclass
        forward = executable.run(IMAGES)
        feedback = executable.run(codec.output_error(graph, forward, LABELS), phase="feedback")
        return forward, feedback, codec.logits(graph, forward)


@pytest.mark.lava
def test_lava_in_floats_is_the_reference_on_dead_populations() -> None:
    """What float targets share: nothing is rounded, and nothing saturates."""
    graph = get("lava-sim-float").pipeline(lower(network({"hidden": 1e-38, "readout": 1e12}).double()))
    expected, found = _answers(REFERENCE, graph), _answers(get("lava-sim-float"), graph)
    for ours, theirs in zip(expected[:2], found[:2], strict=True):
        for name, history in ours.history.items():
            np.testing.assert_array_equal(history.spikes, theirs.history[name].spikes, err_msg=f"{ours.phase} spikes of '{name}'")
    assert np.isfinite(found[2]).all()


@pytest.mark.parametrize("case", DEFINED)
def test_floats_are_defined_too(case: str) -> None:
    """Target torch in both widths and the module itself give finite logits, and denormal numbers flushed to 0 change no spike of either."""
    graph = TORCH.pipeline(lower(DEFINED[case]()))
    kept = [_answers(replace(TORCH, dtype=dtype, device="cpu"), graph) for dtype in ("float32", "float64")]
    torch.set_flush_denormal(True)
    try:
        again = [_answers(replace(TORCH, dtype=dtype, device="cpu"), graph) for dtype in ("float32", "float64")]
    finally:
        torch.set_flush_denormal(False)
    for ours, theirs in zip(kept, again, strict=True):
        assert np.isfinite(ours[2]).all()
        for one, other in zip(ours[:2], theirs[:2], strict=True):
            for name, history in one.history.items():
                np.testing.assert_array_equal(history.spikes, other.history[name].spikes, err_msg=f"{one.phase} spikes of '{name}'")


@pytest.mark.parametrize("case", DEFINED)
def test_the_commands_say_numbers_of_hostile_networks(case: str) -> None:
    """JSON has no word for NaN or an infinity, so nothing may be one."""
    net = DEFINED[case]()
    for target in ("torch", "sim"):
        found = toolchain.feedback(net, IMAGES, LABELS, target=target)
        assert np.isfinite(found.loss)
        for values in (*found.gradients.values(), *found.beta.values(), *found.rates.values(), found.logits):
            assert np.isfinite(values).all()
    json.dumps(toolchain.deploy(net, target="sim", dataset="digits", samples=3).to_json(), allow_nan=False)
    json.dumps(toolchain.compile(net, target="sim").to_json(), allow_nan=False)


def test_an_estimate_of_silence_is_numbers() -> None:
    found = toolchain.estimate(DEFINED["all zero"](), dataset="digits", samples=1, chip_samples=0)
    json.dumps(found.to_json(), allow_nan=False)
    assert "where spikes cost nothing" not in found.to_text()  # its input still costs products
    assert "inf" not in found.to_text().replace("inference", "")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["all zero", "dead", "saturated"])
def test_every_comparison_of_hostile_networks_is_numbers(case: str, tmp_path: Path) -> None:
    net = DEFINED[case]()
    found = toolchain.compare(net, targets=("torch", "sim"), dataset="digits", samples=20, report=tmp_path / "report")
    json.dumps(found.to_json(), allow_nan=False)
    json.dumps(toolchain.verify(net, targets=("reference", "sim"), dataset="digits", samples=2, probes=2).to_json(), allow_nan=False)
    json.dumps(toolchain.tune(net, dataset="digits", samples=10).to_json(), allow_nan=False)


@pytest.mark.parametrize("case", REFUSED)
def test_every_target_refuses_with_the_same_sentence(case: str) -> None:
    make, sentence = REFUSED[case]
    said = {target: _refusal(partial(toolchain.feedback, make(), IMAGES, LABELS, target=target), sentence) for target in _here()}
    assert len(set(said.values())) == 1, said


def _here() -> list[str]:
    return [name for name in TARGETS if get(name).available() is None]


def _refusal(run: Callable[[], Any], sentence: str) -> str:
    with pytest.raises(ToolchainError, match=sentence) as error:
        run()
    return str(error.value)


# Hostile inputs, errors and labels.

INPUTS: dict[str, tuple[Any, str]] = {
    "no samples": (np.zeros((0, 1, 8, 8)), "there are no samples to run"),
    "no samples, flat": (np.zeros((0, 64)), "there are no samples to run"),
    "nothing at all": (np.zeros(0), "takes samples of 64 values"),
    "NaN": (np.full((2, 64), np.nan), "the input holds NaN or infinite values"),
    "infinite": (np.full((2, 64), np.inf), "the input holds NaN or infinite values"),
    "one NaN among many": (np.concatenate([np.zeros((3, 64)), np.full((1, 64), np.nan)]), "the input holds NaN or infinite values"),
    "a little below 0": (np.full((2, 64), -5e-324), r"give it in \[0, 1\]"),
    "a little above 1": (np.full((2, 64), np.nextafter(1, 2)), r"give it in \[0, 1\]"),
    "bytes": (np.full((2, 64), 255, np.uint8), r"give it in \[0, 1\]"),
    "complex": (np.zeros((2, 64), complex), "give real numbers"),
    "text": (np.full((2, 64), "0"), "give real numbers"),
    "ragged": ([[0.0] * 64, [0.0]], "the input is ragged"),
    "masked": (np.ma.array(np.full((2, 64), 0.5), mask=True), "the input has masked values"),  # type: ignore[no-untyped-call]
    "with a gradient": (torch.zeros(2, 64, requires_grad=True), "the input is a Tensor that NumPy cannot read"),
}
ERRORS: dict[str, tuple[Any, str]] = {
    "none": (np.zeros((0, 3)), "there are no samples to run"),
    "NaN": (np.full((2, 3), np.nan), "the error holds NaN or infinite values"),
    "infinite": (np.full((2, 3), -np.inf), "the error holds NaN or infinite values"),
    "beyond float32": (np.full((2, 3), 1e39), "the error passes"),
    "of other samples": (np.zeros((1, 3)), "the feedback phase got 1 samples but the forward run before it had 2"),
}
EQUAL: dict[str, Array] = {
    "bytes of 0": np.zeros((2, 64), np.uint8),
    "-0.0": np.full((2, 64), -0.0),
    "denormal": np.full((2, 64), 5e-324),
    "no": np.zeros((2, 64), bool),
    "half precision": np.zeros((2, 64), np.float16),
    "extended precision": np.zeros((2, 64), np.longdouble),
    "big-endian": np.zeros((2, 64), ">f4"),
}
"""All of them are 0."""


def executables() -> dict[str, Target]:
    found: dict[str, Target] = {"reference": REFERENCE, **INTEGERS}
    if get("lava-sim").available() is None:
        found["lava-sim"] = get("lava-sim")
    if get("sanafe").available() is None:
        found["sanafe"] = get("sanafe")
    return found


def test_hostile_inputs_get_one_sentence_and_zeros_of_every_type_one_result(assert_identical: Same) -> None:
    graph = Retime("exact")(at_limits(inputs=64))
    expected: list[Result] = []
    for name, target in executables().items():
        with target.compile(graph) as run:
            for values, sentence in INPUTS.values():
                with pytest.raises(UsageError, match=sentence):
                    run.run(values)
            found = [run.run(values) for values in EQUAL.values()]
            for values, sentence in ERRORS.values():
                with pytest.raises(UsageError, match=sentence):
                    run.run(values, phase="feedback")
            silent = run.run(np.zeros((2, 3)), phase="feedback")
        expected = expected or found
        for result in found:
            assert_identical(expected[0], result)
        assert not any(activity.any() for activity in silent.activity.values()), name


@pytest.mark.parametrize("target", ["torch", "reference", "sim"])
def test_labels_out_of_range_get_one_sentence(target: str) -> None:
    with pytest.raises(UsageError, match="labels must be 4 whole numbers from 0 to 9, and these reach from 0 to 10"):
        toolchain.feedback(network(), IMAGES, np.array([0, 10, 1, 2]), target=target)
    with pytest.raises(UsageError, match="given as labels is ragged"):
        toolchain.feedback(network(), IMAGES, [[0], [1, 2], [3], [4]], target=target)  # type: ignore[arg-type]


def test_among_equal_scores_the_first_class_wins_everywhere() -> None:
    net = network({"": 0.0})
    for name in _here():
        found = toolchain.deploy(net, target=name, dataset="digits", samples=4)
        assert (found.predictions == 0).all(), name
        assert (found.spikes_per_sample, found.saturations) == (0, 0)


@pytest.mark.parametrize("limit", [Spectral(norm=1.0), Frobenius(norm=1.0)])
def test_a_restricted_weight_of_zeros_has_a_gradient(limit: Limit) -> None:
    """There is no direction to restrict, and nothing is divided by its norm."""
    loop = Limited(nn.Linear(4, 4, bias=False), limit)
    with torch.no_grad():
        for parameter in loop.parameters():
            parameter.zero_()
    torch.manual_seed(0)
    net = FeedbackSNN(
        name="restricted", input_shape=(64,), input=nn.Linear(64, 4), feedback=[(0, 0, loop)], readout=nn.Linear(4, 10), time_steps=4
    )
    found = toolchain.feedback(net.eval(), IMAGES, LABELS, target="sim")
    assert all(np.isfinite(gradient).all() for gradient in found.gradients.values())


# Small and odd shapes.


@pytest.mark.parametrize(
    ("input_shape", "operations"),
    [
        ((1, 1, 1), lambda: (nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Linear(1, 2))),
        ((1, 1, 1), lambda: (nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 2))),
        ((2, 7, 5), lambda: (nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Conv2d(3, 2, 2, stride=2), nn.Linear(4, 2))),
        ((1, 5, 3), lambda: (nn.Conv2d(1, 2, (3, 1), stride=(2, 1), padding=(0, 1)), nn.AvgPool2d(2), nn.Linear(4, 2))),
    ],
    ids=["1 x 1", "1 x 1 padded", "7 x 5 by 2", "5 x 3 by 2"],
)
def test_small_and_odd_images(
    input_shape: tuple[int, ...], operations: Callable[[], tuple[nn.Module, ...]], assert_identical: Same
) -> None:
    torch.manual_seed(1)
    entry, between, readout = operations()
    net = FeedbackSNN(
        name="odd",
        input_shape=input_shape,
        input=entry,
        hidden=[between],
        readout=readout,
        neuron=Neuron(threshold=0.2, u_rest=0.0, threshold_back=0.1, u_rest_back=0.0),
        time_steps=4,
        feedback_steps=4,
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.abs_()  # all fire
    integers = LOIHI_PIPELINE(lower(net))
    inputs = np.concatenate([np.zeros((1, *input_shape)), np.ones((1, *input_shape)), np.random.default_rng(0).random((1, *input_shape))])
    error = np.random.default_rng(1).uniform(-1, 1, (3, *integers.population("hidden2").shape))
    expected = both_phases(REFERENCE, integers, inputs, error)
    assert expected[0].activity["hidden2"].any()
    for target in INTEGERS.values():
        for ours, theirs in zip(expected, both_phases(target, integers, inputs, error), strict=True):
            assert_identical(ours, theirs)


# Calibration and training.


def test_calibration_on_constant_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that are all 0 need no room at all, and what other images then need is cut and counted."""
    from toolchain import data

    def constant(*arguments: Any, **options: Any) -> data.Dataset:
        return replace(real(*arguments, **options), images=np.zeros((8, 1, 8, 8), np.float32), labels=np.zeros(8, np.int64))

    real = data.load
    monkeypatch.setattr(data, "load", constant)
    compiled = toolchain.compile(network(), target="sim", calibrate="digits").graph
    monkeypatch.undo()
    forward, _, scores = _answers(REFERENCE, compiled)
    assert np.isfinite(scores).all()
    for target in INTEGERS.values():
        np.testing.assert_array_equal(_answers(target, compiled)[2], scores)
    assert forward.activity["hidden1"].shape == (4, 4)


@pytest.mark.parametrize(
    ("rate", "decay", "sentence", "kept"),
    [
        (3e38, 0.0, "the loss is (inf|nan) in epoch 2, batch 1: lower train.lr", True),
        (1e30, 1e10, "'input.weight' holds NaN or infinite values after epoch 1: lower train.lr", False),
    ],
)
def test_training_that_diverges_says_so_and_keeps_the_last_checkpoint(
    rate: float, decay: float, sentence: str, kept: bool, tmp_path: Path
) -> None:
    settings = {
        "train.epochs": 2,
        "train.lr": rate,
        "train.weight_decay": decay,
        "train.batch": 800,
        "train.warmup": 0,
        "train.held_out": 100,
        "network.time_steps": 3,
        "network.feedback_steps": 3,
    }
    with pytest.raises(ToolchainError, match=sentence):
        toolchain.train("digits-fc", dataset="digits", settings=settings, output=tmp_path / "run", device="cpu")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert ("checkpoint.safetensors" in names) == kept
    if kept:
        from toolchain import checkpoint

        about = checkpoint.read(tmp_path / "run" / "checkpoint.safetensors")
        assert about.about.epoch == 1
        assert all(bool(torch.isfinite(tensor).all()) for tensor in about.tensors.values())
