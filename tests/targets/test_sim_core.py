"""`sim` in every form it has (torch, and the compiled core by event, by product and as measured, with each instruction set) gives the reference's whole numbers.

Graphs are made to go wrong: sums that 16 bits cannot hold, potentials beyond 24, rates of 1, one pixel, one neuron, odd sizes, windows larger than the image.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolchain import codec, fixed, native
from toolchain.errors import UsageError
from toolchain.ir import (
    POTENTIAL_LIMIT,
    Array,
    AvgPool2d,
    Bias,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Drive,
    Dynamics,
    Graph,
    Identity,
    Op,
    Phase,
    Population,
    Provenance,
    Scale,
    Shape,
    Synapse,
    Timing,
    Units,
    Upsample,
    adjoint,
    frozen,
    verify,
    weight_of,
)
from toolchain.native import phases
from toolchain.passes.retime import Retime
from toolchain.target import Result
from toolchain.targets.reference import REFERENCE
from toolchain.targets.sim import CURRENTS, SIM, Sim
from toolchain.targets.sim_native import NativeRun

ROOT = Path(__file__).resolve().parents[2]

FORMS: dict[str, dict[str, Any]] = {"torch": {"kernel": "torch"}}
if phases.missing() is None:
    FORMS |= {
        f"{currents}, {phases.INSTRUCTION_SETS[i]}": {"kernel": "native", "currents": currents, "instructions": i}
        for currents in CURRENTS
        for i in range(phases.widest() + 1)
        if currents != "measured" or i == phases.widest()
    }

compiled = pytest.mark.skipif(phases.missing() is not None, reason=str(phases.missing()))

TWO, ONE, NONE = (2, 2), (1, 1), (0, 0)
Case = tuple[Graph, Array, Array]


def simulator(form: str) -> Sim:
    return replace(SIM, device="cpu", trace=True, **FORMS[form])


def both_phases(target: Any, case: Case) -> tuple[Result, Result]:
    graph, inputs, errors = case
    with replace(target, trace=True).compile(graph) as run:
        return run.run(inputs), run.run(errors, phase="feedback")


@pytest.fixture(scope="session")
def assert_same(assert_identical: Any) -> Callable[[Case, Sequence[Result]], None]:
    """`assert_same(case, expected)`: every form gives the expected results of both phases; else the first difference of each that does not."""

    def asserted(case: Case, expected: Sequence[Result]) -> None:
        differing = {}
        for form in FORMS:
            try:
                for ours, theirs in zip(both_phases(simulator(form), case), expected, strict=True):
                    assert_identical(ours, theirs)
            except AssertionError as difference:
                differing[form] = " ".join(str(difference).split())[:200]
        assert not differing, "\n".join(f"DIFFERS <{form}>: {difference}" for form, difference in differing.items())

    return asserted


# One connection and its adjoint, between two populations of couples that feed each other, in both phases.

Connection = tuple[tuple[Op, ...], Shape, Shape, dict[str, Shape]]

CONNECTIONS: dict[str, Connection] = {
    "conv, 16 bits overflow": ((Conv2d("w", ONE, TWO),), (64, 5, 5), (32, 5, 5), {"w": (32, 64, 5, 5)}),
    "conv, 64 to 33 channels": ((Conv2d("w", ONE, TWO),), (64, 4, 3), (33, 4, 3), {"w": (33, 64, 5, 5)}),
    "conv, stride 2": ((Conv2d("w", TWO, TWO, exponent=4),), (3, 7, 9), (5, 4, 5), {"w": (5, 3, 5, 5)}),
    "conv, stride 3": ((Conv2d("w", (3, 3), ONE),), (31, 8, 5), (2, 3, 2), {"w": (2, 31, 3, 3)}),
    "conv, stride 3 by 2, dilated": ((Conv2d("w", (3, 2), (2, 1), (1, 2)),), (2, 11, 10), (4, 4, 4), {"w": (4, 2, 4, 3)}),
    "conv, dilated beyond its stride": ((Conv2d("w", TWO, (3, 2), (3, 3)),), (4, 7, 5), (2, 4, 2), {"w": (2, 4, 3, 3)}),
    "conv, windows larger than the image": ((Conv2d("w", ONE, (4, 4)),), (3, 2, 3), (2, 6, 7), {"w": (2, 3, 5, 5)}),
    "conv, windows far beyond the image": ((Conv2d("w", TWO, (6, 5)),), (2, 1, 2), (3, 5, 5), {"w": (3, 2, 5, 4)}),
    "conv, one pixel": ((Conv2d("w", ONE, ONE),), (8, 1, 1), (9, 1, 1), {"w": (9, 8, 3, 3)}),
    "conv, one row": ((Conv2d("w", ONE, (0, 1)),), (3, 1, 17), (4, 1, 17), {"w": (4, 3, 1, 3)}),
    "conv, one column": ((Conv2d("w", (3, 1), (1, 0)),), (3, 17, 1), (4, 6, 1), {"w": (4, 3, 3, 1)}),
    "conv, one place": ((Conv2d("w", ONE, NONE),), (2, 3, 3), (1, 1, 1), {"w": (1, 2, 3, 3)}),
    "conv, groups": ((Conv2d("w", ONE, ONE, groups=2),), (6, 4, 5), (4, 4, 5), {"w": (4, 3, 3, 3)}),
    "conv, a group a channel": ((Conv2d("w", TWO, ONE, groups=33),), (33, 4, 5), (33, 2, 3), {"w": (33, 1, 3, 3)}),
    "conv, 1 to 64 channels": ((Conv2d("w", ONE, ONE),), (1, 4, 3), (64, 4, 3), {"w": (64, 1, 3, 3)}),
    "conv, 3 to 31 channels": ((Conv2d("w", ONE, ONE),), (3, 3, 4), (31, 3, 4), {"w": (31, 3, 3, 3)}),
    "conv, 31 to 32 channels": ((Conv2d("w", ONE, ONE),), (31, 3, 3), (32, 3, 3), {"w": (32, 31, 3, 3)}),
    "conv, 32 to 65 channels": ((Conv2d("w", ONE, NONE),), (32, 3, 2), (65, 3, 2), {"w": (65, 32, 1, 1)}),
    "conv, 63 to 1 channels": ((Conv2d("w", ONE, NONE),), (63, 3, 3), (1, 2, 2), {"w": (1, 63, 2, 2)}),
    "conv, 65 to 129 channels": ((Conv2d("w", ONE, ONE),), (65, 2, 2), (129, 2, 2), {"w": (129, 65, 3, 3)}),
    "transposed conv": ((ConvTranspose2d("w", TWO, ONE, output_padding=ONE, exponent=2),), (3, 4, 3), (4, 8, 6), {"w": (3, 4, 3, 3)}),
    "transposed conv, targets that nothing reaches": ((ConvTranspose2d("w", (3, 3), NONE),), (4, 3, 2), (5, 8, 5), {"w": (4, 5, 2, 2)}),
    "transposed conv, dilated, groups": (
        (ConvTranspose2d("w", (2, 1), ONE, NONE, (2, 1), groups=2),),
        (4, 4, 5),
        (6, 9, 5),
        {"w": (4, 3, 3, 3)},
    ),
    "transposed conv, padded beyond its windows": (
        (ConvTranspose2d("w", (1, 2), (1, 1), (3, 4)),),
        (2, 3, 3),
        (3, 6, 9),
        {"w": (2, 3, 3, 3)},
    ),
    "dense, 16 bits overflow": ((Dense("w", exponent=1),), (384,), (64,), {"w": (64, 384)}),
    "dense, 400 to 65": ((Dense("w", exponent=1),), (400,), (65,), {"w": (65, 400)}),
    "dense, 256 spikes": ((Dense("w"),), (256,), (3,), {"w": (3, 256)}),
    "dense, 257 spikes": ((Dense("w"),), (257,), (3,), {"w": (3, 257)}),
    "dense, 258 spikes": ((Dense("w"),), (258,), (33,), {"w": (33, 258)}),
    "dense, 515 spikes": ((Dense("w"),), (515,), (3,), {"w": (3, 515)}),
    "dense, to 1,100 neurons": ((Dense("w"),), (9,), (1100,), {"w": (1100, 9)}),
    "dense, of images": ((Dense("w", exponent=1),), (2, 3, 3), (37,), {"w": (37, 18)}),
    "dense, to images": ((Dense("w"),), (33,), (3, 5, 1), {"w": (15, 33)}),
    "dense, two axes": ((Dense("w"),), (5, 2), (7, 2), {"w": (14, 10)}),
    "single neurons": ((Dense("w"),), (1,), (1,), {"w": (1, 1)}),
    "from one neuron": ((Dense("w"),), (1,), (65,), {"w": (65, 1)}),
    "to one neuron": ((Dense("w"),), (63,), (1,), {"w": (1, 63)}),
    "pool": ((AvgPool2d((3, 2), TWO, (1, 0)),), (3, 7, 6), (3, 4, 3), {}),
    "pools that overlap": ((AvgPool2d((3, 3), ONE, ONE), Scale(exponent=3)), (33, 4, 3), (33, 4, 3), {}),
    "pool, then conv": ((AvgPool2d(TWO, TWO, NONE), Identity(), Conv2d("w", ONE, TWO)), (2, 8, 6), (3, 4, 3), {"w": (3, 2, 5, 5)}),
    "pools that overlap, then conv": (
        (AvgPool2d((3, 3), TWO, ONE), Conv2d("w", TWO, ONE)),
        (33, 7, 7),
        (2, 2, 2),
        {"w": (2, 33, 3, 3)},
    ),
    "conv, then pool": ((Conv2d("w", ONE, TWO, exponent=1), AvgPool2d((2, 4), TWO, (0, 1))), (3, 5, 3), (2, 4, 3), {"w": (2, 3, 2, 2)}),
    "pool, then dense": ((AvgPool2d(TWO, TWO), Dense("w")), (3, 4, 5), (7,), {"w": (7, 12)}),
    "upsampling": ((Upsample(2),), (2, 3, 4), (2, 6, 8), {}),
    "upsampling, then conv": ((Upsample(3), Conv2d("w", ONE, NONE)), (2, 3, 2), (3, 6, 3), {"w": (3, 2, 4, 4)}),
    "conv, then upsampling": ((Conv2d("w", TWO, ONE), Upsample(2)), (3, 5, 4), (2, 6, 4), {"w": (2, 3, 3, 3)}),
    "upsampling, then dense": ((Upsample(2), Dense("w")), (2, 2, 1), (5,), {"w": (5, 16)}),
    "factors": ((Scale(1.0, "w", exponent=5),), (3, 2, 5), (3, 2, 5), {"w": (3,)}),
    "factors of a row": ((Scale(1.0, "w"),), (65,), (65,), {"w": (65,)}),
    "factors, then pool": ((Scale(1.0, "w"), AvgPool2d((2, 3), (1, 2))), (33, 3, 5), (33, 2, 2), {"w": (33,)}),
    "factors, then conv": ((Scale(1.0, "v"), Conv2d("w", ONE, ONE)), (3, 3, 3), (4, 3, 3), {"v": (3,), "w": (4, 3, 3, 3)}),
    "nothing but delay": ((Identity(),), (3, 2, 5), (3, 2, 5), {}),
    "shifts of 28 bits, then dense": ((*(Scale(exponent=7) for _ in range(3)), Dense("w", exponent=7)), (3,), (5,), {"w": (5, 3)}),
    "shifts of 30 bits": ((*(Scale(exponent=7) for _ in range(4)), Scale(exponent=2)), (3,), (3,), {}),
}

NUMBERS = {
    "drawn": lambda draw, shape: draw.integers(-128, 128, shape),
    "largest": lambda draw, shape: np.full(shape, 127),
    "smallest": lambda draw, shape: np.full(shape, -128),
}
NUMBERS_OF_A_FEW = {
    "extreme": lambda draw, shape: draw.choice([127, -128], shape),
    "16 bits": lambda draw, shape: draw.choice([2**15 - 1, 1 - 2**15, 0, 3], shape),
    "16 bits, all": lambda draw, shape: np.full(shape, -(2**15)),
    "zeros": lambda draw, shape: np.zeros(shape, np.int64),
    "saturating": lambda draw, shape: np.full(shape, 127),
}


def pair(
    name: str,
    numbers: str,
    *,
    leak: float = 1.0,
    mode: Any = "exact",
    steps: int = 3,
    feedback_steps: int | None = None,
    samples: int = 4,
    members: Any = "plus",
) -> Case:
    """`input` -> a -> b by the connection, b -> a by its adjoint; the feedback phase is both transposed, without gates where everything always fires."""
    ops, source, target, shapes = CONNECTIONS[name]
    draw = np.random.default_rng(len(name))
    made = (NUMBERS | NUMBERS_OF_A_FEW)[numbers]
    kind = np.int16 if numbers.startswith("16 bits") else np.int8
    tensors = {key: frozen(made(draw, shape), kind) for key, shape in shapes.items()}
    if numbers in ("saturating", "zeros"):
        ops = tuple(op if weight_of(op) is None else msgspec.structs.replace(op, exponent=7) for op in ops)
    always = numbers in ("largest", "smallest", "saturating")
    back = adjoint(ops)

    def dynamics(into: tuple[Op, ...], at: Shape, come_from: Shape, members: Any) -> Dynamics:
        """A threshold that some currents pass; everything from 1 on where all fire at every step."""
        if always:
            return Dynamics(leak, 1, 0, members)
        spikes = draw.random((8, *come_from)) < 0.3
        currents = np.abs(fixed.apply(into, tensors, spikes.astype(np.int64), at, integer=True))
        threshold = int(np.clip(np.quantile(currents, 0.6), 1, POTENTIAL_LIMIT))
        return Dynamics(leak, threshold, threshold, members)

    tensors["readout"] = frozen(made(draw, (3, int(np.prod(target)))), kind)
    plus = {"a": dynamics(back, source, target, members), "b": dynamics(ops, target, source, members), "readout": Dynamics(leak)}
    both = {key: dynamics(into, at, other, "both") for key, into, at, other in (("a", back, source, target), ("b", ops, target, source))}
    readout = Synapse("b", "readout", (Dense("readout"),))
    forward = (Synapse("input", "a", (Identity(),)), Synapse("a", "b", ops), Synapse("b", "a", back, 1), readout)
    gates = {} if always else {"a": "a", "b": "b"}
    feedback = (Synapse("b", "a", back, 0, gates.get("b")), Synapse("a", "b", ops, 1, gates.get("a")))
    top = float(2 * int(plus["a"].threshold) + 1)
    unit = float(2 * int(both["b"].threshold))
    graph = Graph(
        (
            Population("input", source, "input"),
            Population("a", source, "couple"),
            Population("b", target, "couple"),
            Population("readout", (3,), "readout"),
        ),
        (
            Phase("forward", steps, ("input", "a", "b", "readout"), plus, forward),
            Phase(
                "feedback",
                feedback_steps or steps + 1,
                ("b", "a"),
                both,
                feedback,
                drive=(Drive("b", "error", exponent=7 if unit > 4095 else 0),),
            ),
        ),
        tensors,
        Units("integer", {"forward": {"input": top, "a": 1.0, "b": 1.0, "readout": 1.0}, "feedback": {"a": unit, "b": unit}}),
        Provenance(f"{name}, {numbers}"),
    )
    verify(graph)
    inputs = draw.random((samples, *source)) * (draw.random((samples, *source)) < 0.5)
    errors = draw.normal(size=(samples, *target))
    for sample, (value, error) in enumerate(((1, 2), (0, 0), (1, -2))):
        inputs[sample % samples], errors[sample % samples] = value, error
    return Retime(mode)(graph), inputs, errors


@cache
def pair_and_result(name: str, numbers: str) -> tuple[Case, tuple[Result, Result]]:
    case = pair(name, numbers)
    return case, both_phases(REFERENCE, case)


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", CONNECTIONS)
def test_every_connection(name: str, numbers: str, assert_same: Any) -> None:
    case, expected = pair_and_result(name, numbers)
    assert_same(case, expected)


WITH_OTHER_NUMBERS = (
    "conv, 16 bits overflow",
    "conv, stride 2",
    "transposed conv",
    "dense, 16 bits overflow",
    "single neurons",
    "pools that overlap, then conv",
    "factors",
    "shifts of 28 bits, then dense",
)


@pytest.mark.parametrize("numbers", NUMBERS_OF_A_FEW)
@pytest.mark.parametrize("name", WITH_OTHER_NUMBERS)
def test_every_connection_with_other_numbers(name: str, numbers: str, assert_same: Any) -> None:
    case, expected = pair_and_result(name, numbers)
    assert_same(case, expected)


def test_the_connections_go_to_the_limits() -> None:
    """Otherwise the tests above would prove nothing about them: sums of 16 bits overflow forwards and back, with both signs; potentials saturate at both ends."""
    for name in ("conv, 16 bits overflow", "dense, 16 bits overflow"):
        for numbers, sign in (("largest", 1), ("smallest", -1)):
            (graph, _, _), (forward, back) = pair_and_result(name, numbers)
            shift = graph.phase("forward").synapses[1].ops[0].exponent  # type: ignore[union-attr]  # of a weight
            assert np.abs(forward.history["b"].potentials[0, 0]).max() >> shift > 2**15
            assert (forward.history["a"].spikes[0, 0] == 1).all()
            assert {int(n) for n in np.unique(back.history["b"].spikes[:, 0])} == {1}
            assert int(np.sign(back.history["a"].potentials[0, 0]).max()) == sign
            assert int(np.sign(back.history["a"].potentials[0, 2]).max()) == -sign
    _, (forward, back) = pair_and_result("conv, 16 bits overflow", "saturating")
    assert all(result.saturations[population].any() for result in (forward, back) for population in "ab")
    assert back.history["a"].potentials.min() == -POTENTIAL_LIMIT == -back.history["a"].potentials.max()


@compiled
def test_the_core_takes_the_form_that_it_is_told_and_both_where_it_measures() -> None:
    """Or the tests above would compare one form with the reference several times."""
    (graph, inputs, _), _ = batch_of_257()
    last = f", {phases.INSTRUCTION_SETS[phases.widest()]}"
    taken = {}
    for currents in CURRENTS:
        run = simulator(currents + last).compile(graph)
        assert isinstance(run, NativeRun)
        run.run(inputs)
        taken[currents] = run._phases["forward"].taken[1:].sum(axis=0) > 0  # but the input's, whose values are neither
    assert taken["events"].tolist() == [True, False]
    assert taken["dense"].tolist() == [False, True]
    assert taken["measured"].tolist() == [True, True]


# What whole graphs add to connections.


def network(
    shapes: dict[str, Shape],
    edges: Sequence[tuple[str, str, tuple[Op, ...], int]],
    tensors: dict[str, Array],
    *,
    relays: Sequence[str] = (),
    threshold: int = 300,
    feedback_threshold: int = 300,
    reset: int = 250,
    leak: float = 1.0,
    levels: float = 255.0,
    events: bool = False,
    steps: int = 5,
) -> Graph:
    """Populations in the order of `shapes`, the first the input, the last but the readout the driven one; the feedback phase is the forward one transposed."""
    source, *names, last = shapes
    inner = [*names, last]
    kinds = {name: "linear" if name in relays else "couple" for name in inner}

    def dynamics(name: str, members: Any) -> Dynamics:
        if name in relays:
            return Dynamics(1.0, members="graded")
        if members == "both":
            return Dynamics(leak, feedback_threshold, min(reset, feedback_threshold), members)
        return Dynamics(leak, threshold, reset, members)

    tensors = {
        **tensors,
        "readout": frozen(np.arange(-3, 4).repeat(int(np.prod(shapes[last])))[None], np.int8)[:, : int(np.prod(shapes[last]))],
    }
    forward = [Synapse(*edge[:2], edge[2], edge[3]) for edge in edges]
    back = [
        Synapse(s.target, s.source, adjoint(s.ops), s.delay, gate=s.target if kinds[s.target] == "couple" else None)
        for s in reversed(forward)
        if s.source != source
    ]
    graph = Graph(
        (
            Population(source, shapes[source], "input", events=events),
            *(Population(name, shapes[name], kinds[name]) for name in inner),  # type: ignore[arg-type]  # one of the kinds
            Population("readout", (1,), "readout"),
        ),
        (
            Phase(
                "forward",
                steps,
                (*shapes, "readout"),
                {name: dynamics(name, "plus") for name in inner} | {"readout": Dynamics(leak)},
                (*forward, Synapse(last, "readout", (Dense("readout"),))),
            ),
            Phase(
                "feedback",
                steps + 2,
                tuple(reversed(inner)),
                {name: dynamics(name, "both") for name in inner},
                tuple(back),
                drive=(Drive(last, "error"),),
            ),
        ),
        tensors,
        Units(
            "integer",
            {
                "forward": {source: levels} | dict.fromkeys([*inner, "readout"], 300.0),
                "feedback": dict.fromkeys(inner, float(feedback_threshold)),
            },
        ),
        Provenance("network"),
    )
    verify(graph)
    return graph


def values(graph: Graph, samples: int = 4) -> tuple[Array, Array]:
    """Inputs and errors; the first of all ones, the second of none."""
    draw = np.random.default_rng(7)
    source = graph.of_kind("input")[0]
    frames = (graph.phase("forward").time_steps,) if source.events else ()
    inputs = draw.random((samples, *source.shape, *frames)) * (draw.random((samples, *source.shape, *frames)) < 0.6)
    errors = draw.normal(size=(samples, *graph.population(graph.phase("feedback").drive[0].population).shape))
    inputs[0], errors[0] = 1, 3
    if samples > 1:
        inputs[1], errors[1] = 0, 0
    return inputs, errors


def retimed(graph: Graph, mode: Any = "exact") -> Case:
    return Retime(mode)(graph), *values(graph)


def weight(*shape: int, seed: int = 0) -> Array:
    return frozen(np.random.default_rng(seed + sum(shape)).integers(-128, 128, shape), np.int8)


def ring(**options: Any) -> Graph:
    """Two populations of images and one of a row."""
    shapes: dict[str, Shape] = {"input": (2, 4, 3), "a": (5, 4, 3), "b": (33, 2, 3), "c": (7,)}
    tensors = {"ia": weight(5, 2, 3, 3), "ab": weight(33, 5, 3, 3), "bc": weight(7, 198), "ca": weight(60, 7), "bb": weight(33, 33, 1, 1)}
    edges: list[tuple[str, str, tuple[Op, ...], int]] = [
        ("input", "a", (Conv2d("ia", ONE, ONE),), 0),
        ("a", "b", (Conv2d("ab", (2, 1), ONE),), 0),
        ("b", "c", (Dense("bc"),), 0),
        ("c", "a", (Dense("ca"),), 1),
        ("b", "b", (Conv2d("bb"),), 1),
    ]
    return network(shapes, edges, tensors, **options)


def crowd() -> Graph:
    """Ten connections of every form lead to one population, of which some arrive as products, some by event and some as values; one comes from a relay."""
    images = [f"c{i}" for i in range(8)]
    shapes: dict[str, Shape] = {"input": (3, 2, 2)} | dict.fromkeys(images, (3, 2, 2)) | {"relay": (5,), "hub": (5,)}
    tensors = {f"i{i}": frozen(np.array([40 + 9 * i, 90 - i, 20 * i]), np.int8) for i in range(8)}
    tensors |= {f"h{i}": weight(5, 12, seed=i) for i in range(8)} | {"pooled": weight(5, 3), "wide": weight(5, 12, seed=9)}
    edges: list[tuple[str, str, tuple[Op, ...], int]] = [("input", name, (Scale(weight=f"i{i}"),), 0) for i, name in enumerate(images)]
    edges += [(name, "hub", (Dense(f"h{i}", exponent=i % 3),), i % 2) for i, name in enumerate(images)]
    edges += [
        ("input", "relay", (Dense("wide"),), 0),
        ("relay", "hub", (Identity(),), 0),
        ("c3", "relay", (AvgPool2d(TWO, TWO), Dense("pooled")), 0),
    ]
    return network(shapes, edges, tensors, relays=("relay",), threshold=9000, reset=9000)


def slow() -> Graph:
    """Populations that step every third tick from ticks of their own, and connections of up to ten ticks: spikes of several steps are on their way at once."""
    graph = ring(steps=9)

    def timed(phase: Phase) -> Phase:
        start = {name: 2 * i for i, name in enumerate(phase.order)}
        delays = itertools.cycle((7, 1, 10, 4))
        synapses = tuple(msgspec.structs.replace(synapse, delay=next(delays)) for synapse in phase.synapses)
        return msgspec.structs.replace(phase, synapses=synapses, timing=Timing("exact", 3, start, 2))

    graph = msgspec.structs.replace(graph, phases=tuple(timed(phase) for phase in graph.phases))
    verify(graph)
    return graph


def biased() -> Graph:
    """Biases of the largest mantissas and exponents that start one after the other, one of them never."""
    graph = ring(threshold=POTENTIAL_LIMIT, reset=2**20, steps=20)
    tensors = dict(graph.tensors)
    bias = {}
    for name, sign in (("a", 1), ("b", -1), ("c", 1)):
        shape = graph.population(name).shape
        tensors[f"{name}.first"] = frozen(np.full(shape, 4095 if sign > 0 else -4096), np.int16)
        tensors[f"{name}.then"] = frozen(np.random.default_rng(3).integers(-4096, 4096, shape), np.int16)
        bias[name] = (Bias(f"{name}.first", 7), Bias(f"{name}.then", 7, 2), Bias(f"{name}.then", 3, 2), Bias(f"{name}.first", 7, 99))
    forward, feedback = graph.phases
    return msgspec.structs.replace(graph, tensors=tensors, phases=(msgspec.structs.replace(forward, bias=bias), feedback))


def gated_by_another() -> Graph:
    """The feedback phase leaves out a population whose mask it uses all the same."""
    graph = ring()
    forward, feedback = graph.phases
    extra = Population("aside", graph.population("b").shape, "couple")
    populations = (*graph.populations[:-1], extra, graph.populations[-1])
    forward = msgspec.structs.replace(
        forward,
        order=(*forward.order[:-1], "aside", "readout"),
        dynamics={**forward.dynamics, "aside": Dynamics(1.0, 2, 2, "plus")},
        synapses=(*forward.synapses, Synapse("b", "aside", (Identity(),))),
    )
    gated = tuple(msgspec.structs.replace(s, gate="aside") if s.source == "b" else s for s in feedback.synapses)
    graph = msgspec.structs.replace(graph, populations=populations, phases=(forward, msgspec.structs.replace(feedback, synapses=gated)))
    verify(graph)
    return graph


def in_pieces(graph: Graph, inputs: Array, errors: Array) -> Case:
    """Channels last, every second of twice as many, and narrower than what they are computed in."""
    return graph, np.asfortranarray(inputs.astype(np.float32)), errors.repeat(2, axis=0).astype(np.float32)[::2]


CASES: dict[str, Callable[[], Case]] = {
    "one step": lambda: pair("conv, stride 2", "drawn", steps=1, feedback_steps=1),
    "one step of events": lambda: retimed(ring(events=True, steps=1)),
    "always, 300 steps": lambda: pair("dense, two axes", "largest", steps=300),
    "never up again, 130 steps": lambda: pair("to one neuron", "smallest", steps=130),
    "drawn, 128 steps": lambda: pair("dense, of images", "extreme", steps=128, feedback_steps=255),
    "leaks of 3/4": lambda: pair("conv, stride 2", "extreme", leak=0.75, steps=6),
    "leaks of 1/4096": lambda: pair("conv, 31 to 32 channels", "extreme", leak=1 / 4096, steps=6),
    "leaks of 4095/4096": lambda: pair("dense, 16 bits overflow", "saturating", leak=4095 / 4096, steps=20),
    "leaks, always, 140 steps": lambda: pair("single neurons", "largest", leak=0.5, steps=140),
    "signed spikes forward": lambda: pair("conv, 3 to 31 channels", "extreme", members="both", steps=6),
    "pipelined": lambda: pair("conv, stride 2", "extreme", mode="pipelined", steps=9),
    "pipelined, saturating": lambda: pair("dense, 16 bits overflow", "saturating", mode="pipelined", steps=5),
    "a ring": lambda: retimed(ring()),
    "a ring, pipelined, with leaks": lambda: retimed(ring(leak=0.75), "pipelined"),
    "events": lambda: retimed(ring(events=True)),
    "events, pipelined": lambda: retimed(ring(events=True, levels=1.0, steps=9), "pipelined"),
    "one input level": lambda: retimed(ring(levels=1.0)),
    "inputs of 24 bits": lambda: retimed(ring(levels=2.0**24 + 1)),
    "inputs of 31 bits": lambda: retimed(ring(levels=2.0**31 - 1)),
    "ten connections": lambda: retimed(crowd()),
    "ten connections, pipelined": lambda: retimed(crowd(), "pipelined"),
    "delays of several steps": lambda: (graph := slow(), *values(graph)),
    "biases": lambda: retimed(biased()),
    "masks of another population": lambda: retimed(gated_by_another()),
    "numbers in pieces, of 32 bits": lambda: in_pieces(*retimed(ring())),
    "one sample": lambda: pair("conv, stride 2", "drawn", samples=1),
}


@cache
def case_and_result(name: str) -> tuple[Case, tuple[Result, Result]]:
    case = CASES[name]()
    return case, both_phases(REFERENCE, case)


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_graph(name: str, assert_same: Any) -> None:
    case, expected = case_and_result(name)
    assert_same(case, expected)


def piled_up() -> Graph:
    """A population whose first step is 500 ticks behind its source's, so that the currents of 500 steps wait for it, past 32 bits."""
    neurons = 1000
    tensors = {
        "i": frozen(np.full(neurons, 120), np.int8),
        "w": frozen(np.full((3, neurons), 127), np.int8),
        "o": frozen(np.ones((2, 3)), np.int8),
    }
    dynamics = {"a": Dynamics(1.0, 120, 120, "plus"), "b": Dynamics(1.0, POTENTIAL_LIMIT, 2**20, "plus"), "readout": Dynamics(1.0)}
    synapses = (
        Synapse("input", "a", (Scale(weight="i"),)),
        Synapse("a", "b", (Dense("w", exponent=7),)),
        Synapse("b", "readout", (Dense("o"),)),
    )
    timing = Timing("exact", 1, {"b": 500, "readout": 500})
    populations = (Population("input", (neurons,), "input"), Population("a", (neurons,), "couple"), Population("b", (3,), "couple"))
    scale = dict.fromkeys(("input", "a", "b", "readout"), 1.0)
    graph = Graph(
        (*populations, Population("readout", (2,), "readout")),
        (Phase("forward", 600, ("input", "a", "b", "readout"), dynamics, synapses, timing=timing),),
        tensors,
        Units("integer", {"forward": scale}),
        Provenance("piled up"),
    )
    verify(graph)
    return graph


def test_what_piles_up_before_a_first_step() -> None:
    graph, inputs = piled_up(), np.ones((2, 1000))
    with REFERENCE.compile(graph) as run:
        expected = run.run(inputs)
    assert expected.saturations["b"].sum() > 0
    for options in FORMS.values():
        with replace(SIM, device="cpu", **options).compile(graph) as run:
            found = run.run(inputs)
        for field in ("counts", "potentials", "saturations"):
            for name, values in getattr(expected, field).items():
                np.testing.assert_array_equal(getattr(found, field)[name], values, err_msg=f"{field} of {name}, {options}")


def injected(shift: int, exponent: int) -> Graph:
    """Currents of the host that are cut at 13 bits on both sides, and rounded at one half."""
    draw = np.random.default_rng(shift)
    weights = draw.integers(-(2**12) << shift, 2**12 << shift, (70, 6)) // 128
    bias = draw.integers(-64 << shift, 64 << shift, 70)
    bias[:8] = (np.arange(-4, 4) << shift) + ((1 << shift) >> 1)  # without an input: halves, and what lies next to them
    bias[8:16] = bias[:8] - 1
    graph = Graph(
        (Population("input", (6,), "input"), Population("a", (70,), "couple"), Population("readout", (2,), "readout")),
        (
            Phase(
                "forward",
                2,
                ("a", "readout"),
                {"a": Dynamics(1.0, POTENTIAL_LIMIT, 1, "plus"), "readout": Dynamics(1.0)},
                (Synapse("a", "readout", (Dense("o"),)),),
                drive=(Drive("a", "input", (Dense("w"),), "b", shift=shift, exponent=exponent),),
            ),
        ),
        {"w": frozen(weights, np.int64), "b": frozen(bias, np.int64), "o": weight(2, 70)},
        Units("integer", {"forward": {"input": 255.0, "a": 1.0, "readout": 1.0}}),
        Provenance("injected"),
    )
    verify(graph)
    return graph


@pytest.mark.parametrize(("shift", "exponent"), [(0, 0), (1, 7), (12, 3), (18, 5)])
def test_the_host_s_currents_are_codec_s(shift: int, exponent: int) -> None:
    graph = injected(shift, exponent)
    inputs = np.random.default_rng(1).random((9, 6))
    inputs[0], inputs[1] = 0, 1
    (drive,) = graph.phase("forward").drive
    current = codec.input_current(graph, drive, codec.encode_input(graph, inputs))
    assert {-4096 << exponent, 4095 << exponent} <= set(current.ravel().tolist()), "nothing is cut"
    for options in FORMS.values():
        with replace(SIM, device="cpu", **options).compile(graph) as run:
            np.testing.assert_array_equal(run.run(inputs).potentials["a"], 2 * current)


LEFT_TO_TORCH: dict[str, Callable[[], Case]] = {
    "inputs of 33 bits": lambda: retimed(ring(levels=2.0**33)),
    "events of 33 bits": lambda: retimed(ring(levels=2.0**33, events=True)),
    "shifts of 35 bits": lambda: retimed(shifted(35)),
}


def shifted(bits: int) -> Graph:
    shapes: dict[str, Shape] = {"input": (3,), "a": (3,), "b": (3,)}
    ops = tuple(Scale(exponent=7) for _ in range(bits // 7))
    return network(shapes, [("input", "a", (Scale(exponent=2),), 0), ("a", "b", ops, 0), ("b", "a", (Identity(),), 1)], {})


@pytest.mark.parametrize("name", LEFT_TO_TORCH)
def test_what_the_core_cannot_hold_is_left_to_torch(name: str, assert_identical: Any) -> None:
    case = LEFT_TO_TORCH[name]()
    expected = both_phases(REFERENCE, case)
    for form in FORMS:
        sim = simulator(form)
        for ours, theirs in zip(both_phases(replace(sim, kernel="auto"), case), expected, strict=True):
            assert_identical(ours, theirs)
        if sim.kernel == "native":
            with pytest.raises(UsageError, match=r"cannot run this graph: .*leave kernel at 'auto'"):
                sim.compile(case[0])


def test_the_graphs_go_to_the_limits() -> None:
    """Counts that pass 8 bits with both signs, leaks that matter, spikes of both signs forward, many steps on their way, populations that fire."""
    _, (forward, back) = case_and_result("always, 300 steps")
    assert forward.counts["a"].max() == 300
    assert (back.counts["a"].min(), back.counts["a"].max()) == (-301, 301)
    _, (forward, _) = case_and_result("leaks of 3/4")
    assert not np.array_equal(forward.traces["a"], forward.counts["a"])
    _, (forward, back) = case_and_result("leaks of 4095/4096")
    assert forward.saturations["a"].any()
    assert back.saturations["b"].any()
    _, (forward, _) = case_and_result("signed spikes forward")
    assert {-1, 1} <= {int(n) for n in np.unique(forward.history["b"].spikes)}
    _, (forward, _) = case_and_result("biases")
    assert all(forward.saturations[name].any() for name in "abc")
    for name in ("events", "ten connections", "delays of several steps", "masks of another population"):
        (graph, _, _), (forward, back) = case_and_result(name)
        for phase, result in (("forward", forward), ("feedback", back)):
            inner = [n for n in graph.phase(phase).order if graph.population(n).kind == "couple"]
            fired = {n: int(result.activity[n].sum()) for n in inner}
            assert sum(n > 0 for n in fired.values()) > len(inner) // 2, (name, phase, fired)


ACROSS = ("strides", "pools", "residual", "relay at the end", "events", "single")


@pytest.fixture(scope="module")
def network_and_result(network_graph: Any, network_inputs: Any) -> Callable[[str, str, str], tuple[Case, tuple[Result, Result]]]:
    @cache
    def made(name: str, numbers: str, mode: Any) -> tuple[Case, tuple[Result, Result]]:
        graph = network_graph(name, numbers, leak=1.0 if mode == "exact" else 0.75)
        case = Retime(mode)(graph), *network_inputs(graph, 3)
        return case, both_phases(REFERENCE, case)

    return made


@pytest.mark.parametrize("mode", ["exact", "pipelined"])
@pytest.mark.parametrize("numbers", ["extreme", "saturating", "always"])
@pytest.mark.parametrize("name", ACROSS)
def test_networks_with_relays_and_loops(name: str, numbers: str, mode: str, network_and_result: Any, assert_same: Any) -> None:
    case, expected = network_and_result(name, numbers, mode)
    assert_same(case, expected)


@pytest.mark.parametrize("numbers", ["plain", "saturating"])
def test_currents_of_the_host(numbers: str, random_graph: Any, random_inputs: Any, assert_same: Any) -> None:
    """A current computed once a sample, rounded to 13 bits, beside biases and skips."""
    for seed in range(3):
        graph = random_graph(seed, couples=3, leak=seed == 1, numbers=numbers)
        case = Retime()(graph), *random_inputs(graph, 3, seed)
        assert_same(case, both_phases(REFERENCE, case))


@cache
def batch_of_257() -> tuple[Case, tuple[Result, Result]]:
    case = pair("conv, stride 2", "drawn", samples=257)
    return case, both_phases(REFERENCE, case)


def first_samples(result: Result, samples: int) -> Result:
    parts = {
        field: {name: array[:samples] for name, array in getattr(result, field).items()}
        for field in ("counts", "activity", "traces", "potentials", "saturations")
    }
    history = {name: replace(h, spikes=h.spikes[:, :samples], potentials=h.potentials[:, :samples]) for name, h in result.history.items()}
    return replace(result, **parts, history=history)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("samples", [1, 2, 65, 257])
def test_any_batch_by_any_number_of_threads(samples: int, threads: int, assert_same: Any) -> None:
    (graph, inputs, errors), expected = batch_of_257()
    case = graph, inputs[:samples], errors[:samples]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(case, [first_samples(result, samples) for result in expected])
    finally:
        torch.set_num_threads(before)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_graphs(data: st.DataObject, drawn: Any, assert_same: Any) -> None:
    """Every operation, loop, relay and leak that tests/property can draw, in every form."""
    graph = data.draw(drawn.graphs(integer=True, extreme=data.draw(st.booleans()), host=data.draw(st.booleans())))
    case = Retime(data.draw(st.sampled_from(["exact", "pipelined"])))(graph), *data.draw(drawn.values(graph, 3))
    expected = both_phases(REFERENCE, case)
    assert_same(case, expected)


@pytest.mark.parametrize("name", ["a ring", "leaks of 4095/4096"])
def test_without_the_core_torch_serves_and_says_so_where_it_may_not(
    name: str, assert_identical: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "the native kernel is not built: install a C compiler (gcc or clang), then the package again"
    monkeypatch.setattr(phases, "missing", lambda: said)
    case, expected = case_and_result(name)
    sim = replace(SIM, device="cpu", trace=True)
    for ours, theirs in zip(both_phases(sim, case), expected, strict=True):
        assert_identical(ours, theirs)
    assert not isinstance(sim.compile(case[0]), NativeRun)
    with pytest.raises(UsageError, match=f"{re.escape(said)}; or leave kernel at 'auto'"):
        replace(sim, kernel="native").compile(case[0])


# The suite finds a core that is wrong: tests above, run on builds with a fault.

FAULTS = {"": "", "-DFAULT_NO_FLUSH": "events, ", "-DFAULT_NO_SATURATION": ""}
"""Compiler flags, and how the forms begin that the fault must show in: sums of 16 bits are those of events."""


@pytest.mark.slow
@compiled
@pytest.mark.skipif(not (shutil.which("cc") or os.environ.get("CC")), reason="no C compiler here")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_core_with_a_fault_is_caught(fault: str, tmp_path: Path) -> None:
    built = tmp_path / "built.so"
    flags = ["-O1", fault] if fault else ["-O1"]
    subprocess.run([sys.executable, ROOT / ".ci" / "build-native", built, *flags], timeout=200, check=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            __file__,
            "-k",
            "overflow or (loops and saturating)",
        ],
        cwd=ROOT,
        env={**environment, native.LIBRARY_VARIABLE: str(built)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    told = re.search(r"(?:(\d+) failed, )?(\d+) passed", done.stdout)
    assert told is not None, done.stdout + done.stderr
    failed, passed = (int(count or 0) for count in told.groups())
    differing = set(re.findall(r"DIFFERS <([^>]+)>", done.stdout))
    if not fault:
        assert (failed, differing) == (0, set())
        assert passed > 20
        return
    assert failed > 2
    assert "torch" not in differing
    assert {form for form in FORMS if form != "torch" and form.startswith(FAULTS[fault])} <= differing
