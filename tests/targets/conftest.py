"""Networks of every operation as integer graphs, and inputs that go to their limits."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pytest

from toolchain.fixed import CURRENT_MANTISSA
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
    Units,
    Upsample,
    adjoint,
    frozen,
    verify,
    weight_of,
)

Edge = tuple[str, str, tuple[Op, ...], int]


class Network:
    """Gathers a network of couples and relays, and gives it numbers.

    numbers   "plain": rates in between; "extreme": every weight +127 or -128; "positive", "negative": every weight 127, -128; "always": everything fires at
              every step; "saturating": exponents, biases and thresholds at their limits; "silent": thresholds that nothing reaches
    """

    def __init__(self, numbers: str, seed: int, input_shape: Shape, *, events: bool = False) -> None:
        self.numbers, self.draw = numbers, np.random.default_rng(seed)
        self.events = events
        self.populations = [Population("input", input_shape, "input", events=events)]
        self.edges: list[Edge] = []
        self.tensors: dict[str, Array] = {}

    def add(self, name: str, shape: Shape, kind: str = "couple") -> None:
        self.populations.append(Population(name, shape, kind))  # type: ignore[arg-type]  # one of the kinds

    def shape(self, name: str) -> Shape:
        return next(p.shape for p in self.populations if p.name == name)

    def join(self, source: str, target: str, *ops: Op, delay: int = 0) -> None:
        self.edges.append((source, target, ops, delay))

    def weight(self, *shape: int) -> str:
        name = f"weight{len(self.tensors)}"
        fixed = {"positive": 127, "always": 127, "negative": -128}.get(self.numbers)
        values = self.draw.choice([127, -128], shape) if self.numbers in ("extreme", "saturating") else self.draw.integers(-128, 128, shape)
        self.tensors[name] = frozen(values if fixed is None else np.full(shape, fixed), np.int8)
        return name

    def graph(self, *, last: str, classes: int = 3, leak: float = 1.0, time_steps: int = 5, feedback_steps: int = 6) -> Graph:
        """With a readout behind `last`, both phases, in model steps."""
        inner = [p for p in self.populations if p.kind != "input"]
        synapses = [Synapse(a, b, self._with_exponents(ops), delay) for a, b, ops, delay in self.edges]
        into = Dense(self.weight(classes, int(np.prod(self.shape(last)))))
        readout = Synapse(last, "readout", (into,))
        forward = {p.name: self._dynamics(p, leak, "plus") for p in inner} | {"readout": Dynamics(leak)}
        feedback = {p.name: self._dynamics(p, leak, "both") for p in inner}
        bias = {p.name: self._biases(p, time_steps) for p in inner}
        self.tensors["readout.bias"] = frozen(self.draw.integers(-64, 64, classes) / 64)
        kinds = {p.name: p.kind for p in self.populations}
        between = [s for s in synapses if kinds[s.source] != "input"]
        back = tuple(
            Synapse(s.target, s.source, adjoint(s.ops), s.delay, gate=s.target if kinds[s.target] == "couple" else None)
            for s in reversed(between)
        )
        names = [p.name for p in inner]
        phases = (
            Phase(
                "forward",
                time_steps,
                ("input", *names, "readout"),
                forward,
                (*synapses, readout),
                {**bias, "readout": (Bias("readout.bias"),)},
            ),
            Phase(
                "feedback",
                feedback_steps,
                tuple(reversed(names)),
                feedback,
                back,
                drive=(Drive(last, "error", gain=2.0, exponent=self._exponent(7)),),
            ),
        )
        unit = 2.0**19 if self.numbers == "saturating" else 300.0
        scale = {"forward": {"input": 255.0} | dict.fromkeys([*names, "readout"], unit), "feedback": dict.fromkeys(names, unit)}
        graph = Graph(
            (*self.populations, Population("readout", (classes,), "readout")),
            phases,
            self.tensors,
            Units("integer", scale),
            Provenance("network"),
        )
        verify(graph)
        return graph

    def _exponent(self, largest: int) -> int:
        return largest if self.numbers == "saturating" else int(self.draw.integers(0, 3))

    def _with_exponents(self, ops: tuple[Op, ...]) -> tuple[Op, ...]:
        return tuple(op if weight_of(op) is None else msgspec.structs.replace(op, exponent=self._exponent(7)) for op in ops)

    def _dynamics(self, population: Population, leak: float, members: str) -> Dynamics:
        if population.kind == "linear":
            return Dynamics(1.0, members="graded")
        threshold, reset = int(self.draw.integers(200, 900)), int(self.draw.integers(200, 900))
        if self.numbers == "always":
            threshold, reset = 1, 0
        if self.numbers == "silent":
            threshold = POTENTIAL_LIMIT
        if self.numbers == "saturating":
            threshold, reset = int(self.draw.choice([2**20, POTENTIAL_LIMIT])), int(self.draw.integers(1, 2**18))
        return Dynamics(leak, threshold, reset, members)  # type: ignore[arg-type]  # one of the members

    def _biases(self, population: Population, time_steps: int) -> tuple[Bias, ...]:
        """Two: from the start, and from a later step on."""
        found = []
        for start in (0, min(2, time_steps - 1)):
            name = f"{population.name}.bias{start}"
            values = self.draw.integers(-60, 90, population.shape)
            if self.numbers == "saturating":
                values = self.draw.choice(CURRENT_MANTISSA, population.shape)
            if self.numbers == "always":
                values = np.ones(population.shape)
            self.tensors[name] = frozen(values, np.int16)
            found.append(Bias(name, self._exponent(7), start))
        return tuple(found)


def strides(numbers: str, seed: int) -> Network:
    """Odd sizes, strides, groups, dilation, uneven padding; a transposed convolution closes one loop, a 1x1 kernel the other."""
    net = Network(numbers, seed, (2, 7, 5))
    net.add("a", (4, 7, 5))
    net.add("b", (6, 4, 3))
    net.add("c", (4, 4, 5))
    net.join("input", "a", Conv2d(net.weight(4, 2, 3, 3), (1, 1), (1, 1)))
    net.join("a", "b", Conv2d(net.weight(6, 2, 3, 3), (2, 2), (1, 1), groups=2))
    net.join("b", "c", Conv2d(net.weight(4, 6, 3, 2), (1, 1), (2, 2), (2, 2)))
    net.join("c", "a", ConvTranspose2d(net.weight(4, 2, 3, 3), (2, 1), (1, 1), (0, 0), groups=2), delay=1)
    net.join("b", "b", Conv2d(net.weight(6, 6, 1, 1)), delay=1)
    net.join("a", "c", Conv2d(net.weight(4, 4, 3, 3), (2, 1), (1, 1)))
    return net


def pools(numbers: str, seed: int) -> Network:
    """Pools that overlap, pad and leave rows out, before and behind weights; upsampling, and a factor a channel."""
    net = Network(numbers, seed, (1, 9, 6))
    net.add("a", (3, 9, 6))
    net.add("b", (3, 5, 3))
    net.add("c", (2, 4, 3))
    net.add("d", (7,))
    net.join("input", "a", Conv2d(net.weight(3, 1, 3, 3), (1, 1), (1, 1)))
    net.join("a", "b", AvgPool2d((3, 3), (2, 2), (1, 1)), Scale(weight=net.weight(3)))
    net.join("b", "c", Conv2d(net.weight(2, 3, 2, 2), (1, 1), (2, 2)), AvgPool2d((2, 4), (2, 2), (0, 1)))
    net.join("a", "c", AvgPool2d((2, 2), (2, 2)), Conv2d(net.weight(2, 3, 1, 1)))
    net.join("c", "d", Upsample(2), Dense(net.weight(7, 2 * 8 * 6)))
    net.join("d", "c", Dense(net.weight(24, 7)), delay=1)
    net.join("c", "a", Upsample(3), Conv2d(net.weight(3, 2, 4, 4)), delay=1)
    return net


def residual(numbers: str, seed: int) -> Network:
    """A stream of relays with two blocks and a 1x1 shortcut, biases on relays, and a loop from the end of the stream to its start."""
    net = Network(numbers, seed, (2, 5, 5))
    net.add("stream0", (4, 5, 5), "linear")
    net.add("n1", (4, 5, 5))
    net.add("n2", (4, 5, 5))
    net.add("stream1", (4, 5, 5), "linear")
    net.add("n3", (4, 5, 5))
    net.add("stream2", (2, 3, 3), "linear")
    net.add("n4", (2, 3, 3))
    net.join("input", "stream0", Conv2d(net.weight(4, 2, 3, 3), (1, 1), (1, 1)))
    net.join("stream0", "n1", Scale(weight=net.weight(4)))
    net.join("n1", "n2", Conv2d(net.weight(4, 4, 3, 3), (1, 1), (1, 1)))
    net.join("stream0", "stream1", Identity())
    net.join("n2", "stream1", Conv2d(net.weight(4, 1, 3, 3), (1, 1), (1, 1), groups=4))
    net.join("stream1", "n3", Scale(weight=net.weight(4)))
    net.join("n3", "stream2", Conv2d(net.weight(2, 4, 1, 1), (2, 2)))
    net.join("stream1", "stream2", AvgPool2d((3, 3), (1, 1)), Conv2d(net.weight(2, 4, 1, 1)))
    net.join("stream2", "n4", Scale(weight=net.weight(2)))
    net.join("n4", "n1", ConvTranspose2d(net.weight(2, 4, 3, 3), (2, 2), (1, 1)), delay=1)
    net.join("stream2", "stream1", ConvTranspose2d(net.weight(2, 4, 2, 2), (2, 2), (1, 1), (1, 1)), delay=1)
    return net


def events(numbers: str, seed: int) -> Network:
    """Frames that change at every step, into a convolution and past it; a loop over two populations."""
    net = Network(numbers, seed, (2, 6, 7), events=True)
    net.add("a", (3, 3, 3))
    net.add("b", (5,))
    net.join("input", "a", Conv2d(net.weight(3, 2, 3, 3), (2, 2), (1, 0)))
    net.join("a", "b", Dense(net.weight(5, 27)))
    net.join("input", "b", AvgPool2d((3, 3), (3, 2)), Dense(net.weight(5, 2 * 2 * 3)))
    net.join("b", "a", Dense(net.weight(27, 5)), delay=1)
    return net


def single(numbers: str, seed: int) -> Network:
    """One neuron everywhere."""
    net = Network(numbers, seed, (1, 1, 1))
    net.add("relay", (1, 1, 1), "linear")
    net.add("a", (1, 1, 1))
    net.add("b", (1,))
    net.join("input", "relay", Conv2d(net.weight(1, 1, 1, 1)))
    net.join("relay", "a", Scale(weight=net.weight(1)))
    net.join("a", "b", Conv2d(net.weight(1, 1, 3, 3), (1, 1), (1, 1)))
    net.join("b", "a", Dense(net.weight(1, 1)), delay=1)
    return net


MAKERS: dict[str, tuple[Callable[[str, int], Network], str]] = {
    "strides": (strides, "c"),
    "pools": (pools, "d"),
    "residual": (residual, "n4"),
    "relay at the end": (residual, "stream2"),
    "events": (events, "b"),
    "single": (single, "b"),
}


@pytest.fixture(scope="session")
def network_graph() -> Callable[..., Graph]:
    """`network_graph(name, numbers, seed, **options)`: one of `MAKERS` as a step-timed integer graph; see `Network` for the numbers."""

    def made(name: str, numbers: str, seed: int = 0, **options: float) -> Graph:
        maker, last = MAKERS[name]
        return maker(numbers, seed).graph(last=last, **options)  # type: ignore[arg-type]  # options of Network.graph

    return made


@pytest.fixture(scope="session")
def network_inputs() -> Callable[[Graph, int, int], tuple[Array, Array]]:
    """`network_inputs(graph, samples, seed)`: inputs in [0, 1] and errors; the first sample is all ones, the second silent."""

    def made(graph: Graph, samples: int, seed: int = 0) -> tuple[Array, Array]:
        draw = np.random.default_rng(seed)
        source = graph.of_kind("input")[0]
        frames = (graph.phase("forward").time_steps,) if source.events else ()
        inputs = draw.integers(0, 256, (samples, *source.shape, *frames)) / 255 * (draw.random((samples, *source.shape, *frames)) < 0.7)
        driven = graph.population(graph.phase("feedback").drive[0].population)
        errors = draw.normal(size=(samples, *driven.shape))
        inputs[0], errors[0] = 1, 10
        if samples > 1:
            inputs[1], errors[1] = 0, 0
        return inputs, errors

    return made


@pytest.fixture(scope="session")
def drawn() -> ModuleType:
    """The strategies of tests/property: random graphs of every operation."""
    spec = importlib.util.spec_from_file_location("targets_drawn_graphs", Path(__file__).parents[1] / "property" / "drawn_graphs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
