"""Fixtures shared by the whole suite."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from toolchain import partial
from toolchain.fixed import CURRENT_MANTISSA, WEIGHT_EXPONENT_MAX, nearest_leak
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
    frozen,
    verify,
)
from toolchain.target import Result

RandomGraph = Callable[..., Graph]


def pytest_configure(config: pytest.Config) -> None:
    """The whole suite leaves the slow tests out (`-m slow` runs them); who names a file or a test gets all of it."""
    if not config.option.markexpr and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        config.option.markexpr = "not slow"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of what this machine lacks skip, visibly, with the reason."""
    if item.get_closest_marker("lava") and importlib.util.find_spec("lava") is None:
        pytest.skip("Lava is not installed (it needs Python 3.10)")
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA GPU here")


@pytest.fixture(autouse=True, scope="session")
def _nothing_is_saved_in_the_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What runs that fail save for --resume, none of the user's is touched."""
    folder = tmp_path_factory.mktemp("partial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial, "_root", lambda: folder)
        yield


@pytest.fixture(scope="session")
def random_graph() -> RandomGraph:
    """`random_graph(seed, couples=1..4, ...)`: a valid step-timed graph with a forward and a feedback phase; see `_random_graph` for the options."""
    return _random_graph


@pytest.fixture(scope="session")
def random_inputs() -> Callable[[Graph, int, int], tuple[Array, Array]]:
    """`random_inputs(graph, samples, seed)`: inputs in [0, 1] (multiples of 1/256) and errors for the feedback phase."""
    return _random_inputs


@pytest.fixture(scope="session")
def assert_identical() -> Callable[[Result, Result], None]:
    """`assert_identical(a, b)`: same populations, types and shapes, and every spike, count, trace, potential and saturation equal."""
    return _assert_identical


def _assert_identical(a: Result, b: Result) -> None:
    assert (a.phase, a.time_steps) == (b.phase, b.time_steps)
    for field in ("counts", "activity", "traces", "potentials", "saturations"):
        ours, theirs = getattr(a, field), getattr(b, field)
        assert ours.keys() == theirs.keys(), field
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype, (field, name)
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=f"{a.phase} {field} of '{name}'")
    assert a.history.keys() == b.history.keys()
    for name, steps in a.history.items():
        np.testing.assert_array_equal(steps.spikes, b.history[name].spikes, err_msg=f"{a.phase} spikes of '{name}'")
        np.testing.assert_array_equal(steps.potentials, b.history[name].potentials, err_msg=f"{a.phase} potentials of '{name}'")


def _random_inputs(graph: Graph, samples: int, seed: int = 0) -> tuple[Array, Array]:
    draw = np.random.default_rng(seed)
    inputs = draw.integers(0, 257, (samples, *graph.of_kind("input")[0].shape)) / 256
    driven = graph.population(graph.phase("feedback").drive[0].population)
    errors = draw.integers(-64, 65, (samples, *driven.shape)) / 64
    return inputs, errors


def _random_graph(
    seed: int = 0,
    *,
    couples: int = 2,
    integer: bool = True,
    leak: bool = False,
    numbers: str = "plain",
    widths: tuple[int, ...] | None = None,
    inputs: int = 7,
    classes: int = 3,
    skips: bool = True,
    graded: bool = False,
    time_steps: int = 9,
    feedback_steps: int = 11,
    exponents: bool = True,
) -> Graph:
    """A random network of `couples` populations of ternary couples between an input and a readout.

    Always: a chain, and a feedback connection from the last population to the first (a self-connection where there is one). With `skips`, at
    random: connections that skip a population, self-connections and delayed connections that run forward. The feedback phase holds
    every connection between couples transposed, gated by its source, in reverse order; the error enters at the last population.

    numbers   "plain": rates in between; "extreme": every weight +127 or -128; "positive": every weight +127; "saturating": thresholds near the
              24-bit limit, currents that pass it, 24 steps or more; "silent": thresholds that nothing reaches
    widths    neurons of each population, drawn from 1..9 where None; even ones may get two axes
    graded    the input population sends graded spikes on chip instead of a current computed by the host
    Floats are multiples of 2^-10, so that every sum of currents is exact in float64 and targets can be compared bit for bit.
    """
    draw = np.random.default_rng(seed)
    if numbers == "saturating":
        time_steps, feedback_steps = max(time_steps, 24), max(feedback_steps, 24)
    widths = tuple(int(n) for n in draw.integers(1, 10, couples)) if widths is None else widths
    names = [f"couple{i}" for i in range(couples)]
    shapes = {name: (n // 2, 2) if n % 2 == 0 and draw.random() < 0.5 else (n,) for name, n in zip(names, widths, strict=True)}
    size = dict(zip(names, widths, strict=True))
    tensors: dict[str, Array] = {}
    exponent = {name: int(draw.integers(0, 4)) if exponents else 0 for name in (*names, "readout", "input")}
    if numbers == "saturating":
        exponent = dict.fromkeys(exponent, WEIGHT_EXPONENT_MAX)

    def weight(key: str, out: int, into: int) -> str:
        tensors[key] = (
            frozen(_weights(draw, numbers, (out, into)), np.int8) if integer else frozen(_weights(draw, numbers, (out, into)) / 512)
        )
        return key

    def dense(source: str, target: str, into: int, out: int, delay: int) -> Synapse:
        op = Dense(weight(f"{source}-{target}-{delay}.weight", out, into), exponent=exponent[target] if integer else 0)
        return Synapse(source, target, (op,), delay)

    edges = [(a, b, 0) for a, b in itertools.pairwise(names)] + [(names[-1], names[0], 1)]
    if skips:
        edges += [(a, b, 0) for i, a in enumerate(names) for b in names[i + 2 :] if draw.random() < 0.5]
        edges += [(a, b, 1) for i, a in enumerate(names) for b in names[i:] if draw.random() < 0.25 and (a, b, 1) not in edges]
    synapses = [dense(a, b, size[a], size[b], delay) for a, b, delay in edges]
    between = tuple(synapses)
    synapses.append(dense(names[-1], "readout", size[names[-1]], classes, 0))
    if graded:
        synapses.insert(0, dense("input", names[0], inputs, size[names[0]], 0))

    factor = (nearest_leak(0.9) if integer else 0.9) if leak else 1.0
    forward_dynamics, feedback_dynamics = {}, {}
    for name in names:
        threshold, reset = _threshold(draw, numbers, integer)
        forward_dynamics[name] = Dynamics(factor, threshold, reset, "plus")
        feedback_threshold = (
            threshold if numbers in ("saturating", "silent") else threshold // 2 if isinstance(threshold, int) else threshold / 2
        )
        feedback_dynamics[name] = Dynamics(factor, feedback_threshold, reset, "both")
    forward_dynamics["readout"] = Dynamics(factor)
    bias = {}
    for name in names:
        mantissa = draw.choice(CURRENT_MANTISSA, shapes[name]) if numbers == "saturating" else draw.integers(-60, 90, shapes[name])
        tensors[f"{name}.bias"] = frozen(mantissa, np.int16) if integer else frozen(mantissa / 1024)
        bias[name] = (Bias(f"{name}.bias", exponent=exponent[name] if integer else 0, start=int(draw.integers(0, 2))),)
    tensors["readout.bias"] = frozen(draw.integers(-512, 512, classes) / 1024)
    bias["readout"] = (Bias("readout.bias"),)

    error_exponent = WEIGHT_EXPONENT_MAX if numbers == "saturating" else 0
    drive = () if graded else (_input_drive(draw, names[0], shapes[names[0]], inputs, tensors, numbers, integer),)
    head = ("input", *names) if graded else tuple(names)
    forward = Phase("forward", time_steps, (*head, "readout"), forward_dynamics, tuple(synapses), bias, drive)
    transposed = tuple(_transposed(synapse) for synapse in reversed(between))
    feedback = Phase(
        "feedback",
        feedback_steps,
        tuple(reversed(names)),
        feedback_dynamics,
        transposed,
        drive=(Drive(names[-1], "error", gain=4.0, exponent=error_exponent if integer else 0),),
    )
    step = 4095.0 * 2**WEIGHT_EXPONENT_MAX if numbers == "saturating" else 256.0
    unit = step if integer else 0.25
    units = Units(
        "integer" if integer else "float",
        {
            "forward": {"input": 255.0 if integer else 1.0} | dict.fromkeys((*names, "readout"), unit),
            "feedback": dict.fromkeys(names, unit),
        },
    )
    populations = (
        Population("input", (inputs,), "input"),
        *(Population(n, shapes[n], "couple") for n in names),
        Population("readout", (classes,), "readout"),
    )
    graph = Graph(populations, (forward, feedback), tensors, units, Provenance(f"random-{seed}"))
    verify(graph)
    return graph


def _weights(draw: np.random.Generator, numbers: str, shape: tuple[int, int]) -> Array:
    if numbers == "extreme":
        return draw.choice([127, -128], shape)
    if numbers == "positive":
        return np.full(shape, 127)
    return draw.integers(-128, 128, shape)


def _threshold(draw: np.random.Generator, numbers: str, integer: bool) -> tuple[int | float, int | float]:
    """Threshold and reset of one population."""
    if numbers == "silent":
        return (POTENTIAL_LIMIT, 1) if integer else (1e6, 1.0)
    if numbers == "saturating":
        threshold = int(draw.choice([POTENTIAL_LIMIT - 50, 2**20]))
        return (threshold, int(draw.integers(1, 2**18))) if integer else (threshold / 2**16, 1.0)
    threshold, reset = int(draw.integers(100, 400)), int(draw.integers(100, 600))
    return (threshold, reset) if integer else (threshold / 1024, reset / 1024)


def _input_drive(
    draw: np.random.Generator, target: str, shape: tuple[int, ...], inputs: int, tensors: dict[str, Array], numbers: str, integer: bool
) -> Drive:
    """A current the host computes; its bias is one number a neuron, and `shift` rounds the sum."""
    out = int(np.prod(shape))
    if not integer:
        tensors["input.weight"] = frozen(draw.integers(-200, 300, (out, inputs)) / 1024)
        tensors["input.bias"] = frozen(draw.integers(-100, 200, shape) / 1024)
        return Drive(target, "input", (Dense("input.weight"),), "input.bias")
    shift, exponent = (0, WEIGHT_EXPONENT_MAX) if numbers == "saturating" else (10, int(draw.integers(0, 2)))
    tensors["input.weight"] = frozen(draw.integers(-300, 500, (out, inputs)), np.int64)
    tensors["input.bias"] = frozen(draw.integers(CURRENT_MANTISSA[0], CURRENT_MANTISSA[1], shape), np.int64)
    return Drive(target, "input", (Dense("input.weight"),), "input.bias", shift=shift, exponent=exponent)


def _transposed(synapse: Synapse) -> Synapse:
    """The synapse of the feedback phase that reads the same tensor the other way, gated by its source."""
    (op,) = synapse.ops
    assert isinstance(op, Dense)
    return Synapse(
        synapse.target, synapse.source, (Dense(op.weight, transpose=True, exponent=op.exponent),), synapse.delay, gate=synapse.target
    )
