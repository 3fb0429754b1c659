"""A fault planted in one target's copy of a network is found by `verify` and named to the right population: six kinds, 50 random trials each.

A trial draws a small network (dense with loops, skips and delays, or images with strides, groups, pools and spreading convolutions; both timings; the input on the
host or on the chip; leaks), or takes digits-fc or mnist-fc, and plants one fault at a random place of either phase. Nothing that could be seen is drawn again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from unittest.mock import patch

import msgspec
import numpy as np
import pytest

import toolchain
from toolchain import fixed
from toolchain import target as targets
from toolchain.artifact import Artifact, Golden
from toolchain.compiler import compile as compile_model
from toolchain.coverage import Counter
from toolchain.ir import (
    AvgPool2d,
    Bias,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Drive,
    Dynamics,
    Graph,
    Phase,
    Population,
    Provenance,
    Synapse,
    Units,
    Upsample,
    adjoint,
    frozen,
    weight_of,
)
from toolchain.ir import verify as require_valid
from toolchain.passes import LOIHI_PIPELINE, Retime
from toolchain.targets import reference
from toolchain.targets.reference import REFERENCE
from toolchain.targets.sim import SIM

TRIALS = 50


@dataclass(frozen=True)
class Fault:
    """`change` is what the target's copy of any graph suffers, `step` another arithmetic of the population whose dynamics `change` marks. `where` are the phases and
    populations that may be named; `what` is for people."""

    what: str
    where: frozenset[tuple[str, str]]
    change: Callable[[Graph], Graph]
    step: Callable[..., fixed.Step] | None = None


@dataclass(frozen=True)
class Faulty:
    """A target that compiles its own copy with a fault in it: the simulator, or the definition where the arithmetic is wrong or the graph is one that `sim` refuses."""

    fault: Fault
    by: object = SIM
    trace: bool = False
    name: str = "faulty"
    limits = SIM.limits
    pipeline = LOIHI_PIPELINE

    def available(self):
        return None

    def check(self, graph):
        return []

    def compile(self, graph):
        changed = self.fault.change(graph)
        if self.fault.step is None:
            options = {"device": "cpu"} if self.by is SIM else {}
            return replace(self.by, trace=self.trace, **options).compile(changed)
        return WrongSteps(changed, self.trace, self.fault.step)


class WrongSteps(reference.Run):
    """The definition with another step for populations whose dynamics are marked (a type of their own)."""

    def __init__(self, graph, trace, step):
        super().__init__(graph, trace)
        self._step = step

    def run(self, inputs, *, phase="forward"):
        def step(potential, current, dynamics, *, integer):
            chosen = self._step if isinstance(dynamics, Marked) else fixed.step
            return chosen(potential, current, dynamics, integer=integer)

        class Arithmetic:
            step = staticmethod(lambda *a, **k: None)
            apply = staticmethod(fixed.apply)

        Arithmetic.step = staticmethod(step)
        with patch.object(reference, "fixed", Arithmetic):
            return super().run(inputs, phase=phase)


class Marked(Dynamics, frozen=True):
    """Dynamics whose population computes wrongly."""


# Networks


def artifact(graph: Graph) -> Artifact:
    passes = tuple(p.name for p in LOIHI_PIPELINE.passes)
    graph = msgspec.structs.replace(graph, provenance=Provenance("drawn", passes=passes))
    require_valid(graph)
    return Artifact(graph, None, "sim", str(LOIHI_PIPELINE), "test", Golden(1, 0, ()), {})


def image_graph(draw: np.random.Generator) -> Graph:
    """Input 1 x 8 x 8 -> couples by a strided convolution -> couples by another, a pool or a spreading convolution -> readout; a loop back and one onto itself."""
    tensors: dict[str, np.ndarray] = {}

    def weight(name, shape, low=-90, high=128, kind=np.int8):
        tensors[name] = frozen(draw.integers(low, high, shape), kind)
        return name

    stride = (2, 1) if draw.random() < 0.5 else (1, 2)
    size = (4, 8) if stride == (2, 1) else (8, 4)
    channels, groups = 2, int(draw.choice([1, 2]))
    first = (channels, *size)
    host = bool(draw.random() < 0.5)
    entry = Conv2d(weight("input.weight", (channels, 1, 3, 3), *((-3000, 5000, np.int32) if host else (-60, 90, np.int8))), stride, (1, 1))
    if draw.random() < 0.4:  # a pool with unequal strides, of a square image
        first, square = (channels, 8, 8), (1, 1)
        entry = msgspec.structs.replace(entry, stride=square)
        between = (AvgPool2d((3, 3), stride, (1, 1)), Conv2d(weight("between", (channels, channels // groups, 1, 1)), groups=groups))
        second = (channels, *size)
        if draw.random() < 0.5:
            between = (Conv2d("between", groups=groups), AvgPool2d((3, 3), stride, (1, 1)))
    elif draw.random() < 0.5:
        between = (
            Conv2d(
                weight("between", (channels, channels // groups, 3, 3)), padding=(1, 1), groups=groups, exponent=int(draw.integers(0, 2))
            ),
        )
        second = first
    else:
        between = (Upsample(2), Conv2d(weight("between", (3, channels, 2, 2)), (2, 2)))
        second = (3, *size)
    back = (Dense(weight("back", (int(np.prod(first)), int(np.prod(second)))), exponent=0),)
    if second == first and draw.random() < 0.6:
        back = (ConvTranspose2d(weight("back", (channels, channels // groups, 3, 3)), padding=(1, 1), groups=groups),)
    own = (Dense(weight("own", (int(np.prod(second)),) * 2, -20, 20)),)
    readout = (Dense(weight("readout.weight", (3, int(np.prod(second)))), exponent=1),)
    leak = lambda: float(draw.choice([1.0, 0.75, 3686 / 4096]))  # noqa: E731
    names = ("a", "b")
    forward = {n: Dynamics(leak(), int(draw.integers(150, 500)), int(draw.integers(150, 700)), "plus") for n in names}
    feedback = {n: Dynamics(forward[n].leak, int(draw.integers(80, 300)), forward[n].reset, "both") for n in names}
    forward["readout"] = Dynamics(leak())
    tensors["b.bias"] = frozen(draw.integers(-60, 60, second), np.int16)
    tensors["readout.bias"] = frozen(draw.integers(-60, 60, 3) / 64)
    bias = {"b": (Bias("b.bias", 1, int(draw.integers(0, 2))),), "readout": (Bias("readout.bias"),)}
    drives, synapses = (), []
    if host:
        tensors["host.bias"] = frozen(draw.integers(-40000, 60000, first), np.int64)
        drives = (Drive("a", "input", (entry,), "host.bias", shift=int(draw.integers(6, 14)), exponent=1),)
    else:
        synapses.append(Synapse("input", "a", (entry,)))
    synapses += [Synapse("a", "b", between), Synapse("b", "a", back, 1), Synapse("b", "b", own, 1), Synapse("b", "readout", readout)]
    if draw.random() < 0.5:
        skip = (Dense(weight("skip", (int(np.prod(second)), int(np.prod(first))), -10, 10)),)
        synapses.append(Synapse("a", "b", skip, 1))
    inner = [s for s in reversed(synapses) if s.source in names and s.target in names]
    steps = {"forward": int(draw.integers(5, 10)), "feedback": int(draw.integers(5, 10))}
    order = (*(() if host else ("input",)), *names, "readout")
    phases = (
        Phase("forward", steps["forward"], order, forward, tuple(synapses), bias, drives),
        Phase(
            "feedback",
            steps["feedback"],
            names[::-1],
            feedback,
            tuple(Synapse(s.target, s.source, adjoint(s.ops), s.delay, gate=s.target) for s in inner),
            drive=(Drive("b", "error", gain=4.0, exponent=1),),
        ),
    )
    populations = (
        Population("input", (1, 8, 8), "input"),
        Population("a", first, "couple"),
        Population("b", second, "couple"),
        Population("readout", (3,), "readout"),
    )
    units = Units("integer", {"forward": {"input": 15.0, "a": 256.0, "b": 256.0, "readout": 256.0}, "feedback": {"a": 256.0, "b": 256.0}})
    return Graph(populations, phases, tensors, units, Provenance("image"))


@cache
def shipped(name: str, timing: str) -> Artifact:
    return compile_model(name, timing=timing, time_steps=12, feedback_steps=12).artifact


def network(random_graph, draw: np.random.Generator, trial: int, kind: str) -> Artifact:
    """Mostly drawn ones; every tenth trial digits-fc or mnist-fc where they can have the fault."""
    timing = "pipelined" if draw.random() < 0.4 else "exact"
    if trial % 10 == 9 and kind not in ("stride", "delay"):
        return shipped("mnist-fc" if trial % 20 == 19 else "digits-fc", timing)
    if kind == "stride" or draw.random() < 0.4:
        return artifact(Retime(timing)(image_graph(draw)))
    options = {
        "couples": int(draw.integers(1, 4)),
        "leak": bool(draw.random() < 0.5) or kind == "leak",
        "graded": bool(draw.random() < 0.4),
    }
    steps = {"time_steps": int(draw.integers(5, 12)), "feedback_steps": int(draw.integers(5, 12))}
    return artifact(Retime(timing)(random_graph(int(draw.integers(2**31)), inputs=64, **options, **steps)))


# Faults


def in_phase(graph: Graph, phase: str, **fields) -> Graph:
    changed = msgspec.structs.replace(graph.phase(phase), **fields)
    return msgspec.structs.replace(graph, phases=tuple(changed if p.name == phase else p for p in graph.phases))


def with_dynamics(graph: Graph, phase: str, population: str, dynamics: Dynamics) -> Graph:
    return in_phase(graph, phase, dynamics={**graph.phase(phase).dynamics, population: dynamics})


def with_synapse(graph: Graph, phase: str, i: int, **fields) -> Graph:
    synapses = list(graph.phase(phase).synapses)
    synapses[i] = msgspec.structs.replace(synapses[i], **fields)
    return in_phase(graph, phase, synapses=tuple(synapses))


def readers(graph: Graph, key: str) -> frozenset[tuple[str, str]]:
    """Phases and populations that a tensor's values reach first."""
    found = set()
    for phase in graph.phases:
        found |= {(phase.name, s.target) for s in phase.synapses if key in map(weight_of, s.ops)}
        found |= {(phase.name, d.population) for d in phase.drive if key == d.bias or key in map(weight_of, d.ops)}
        found |= {(phase.name, p) for p, biases in phase.bias.items() if any(b.tensor == key for b in biases)}
    return frozenset(found)


def weight_fault(graph: Graph, draw: np.random.Generator) -> Fault | None:
    """One entry of any tensor but the readout's bias, which the host adds to the logits: weights on the chip and of the host, and biases. Every other time only the
    copy that one synapse of one phase reads is wrong, as where a target lays the feedback phase's transposed weights out anew."""
    keys = [key for key in sorted(graph.tensors) if np.issubdtype(graph.tensors[key].dtype, np.integer)]
    key = str(draw.choice(keys))
    i = int(draw.integers(graph.tensors[key].size))
    places = [(phase.name, n) for phase in graph.phases for n, s in enumerate(phase.synapses) if key in map(weight_of, s.ops)]
    only = places[int(draw.integers(len(places)))] if places and draw.random() < 0.5 else None
    if not any(entry_reachable(graph, key, i, only)):
        return None  # it lies in the padding at every place, or its spikes come too late: no arithmetic sees it
    limits = np.iinfo(graph.tensors[key].dtype)
    value, by = int(graph.tensors[key].reshape(-1)[i]), int(draw.choice([-1, 1]))
    low, high = (-4096, 4095) if key.endswith("bias") and graph.tensors[key].dtype == np.int16 else (limits.min, limits.max)
    by = by if low <= value + by <= high else -by

    def change(g: Graph) -> Graph:
        tensor = g.tensors[key].copy()
        tensor.reshape(-1)[i] += by
        if only is None:
            return msgspec.structs.replace(g, tensors={**g.tensors, key: frozen(tensor)})
        phase, n = only
        ops = tuple(msgspec.structs.replace(op, weight="copy") if weight_of(op) == key else op for op in g.phase(phase).synapses[n].ops)
        return with_synapse(msgspec.structs.replace(g, tensors={**g.tensors, "copy": frozen(tensor)}), phase, n, ops=ops)

    where = readers(graph, key) if only is None else frozenset({(only[0], graph.phase(only[0]).synapses[only[1]].target)})
    return Fault(f"{key}[{i}] {by:+d}" + (f" in {only[0]} only" if only else ""), where, change)


def entry_reachable(graph: Graph, key: str, i: int, only: tuple[str, int] | None) -> list[bool]:
    rows = Counter(graph, [phase.name for phase in graph.phases])._entries.items()
    return [
        bool(row.reachable.reshape(-1)[i])
        for (phase, where, number, _), row in rows
        if row.tensor == key and (only is None or ((phase, number) == only and " -> " in where and "host" not in where))
    ]


def couple_of(graph: Graph, draw: np.random.Generator, *, readout: bool = False) -> tuple[str, str]:
    kinds = {p.name: p.kind for p in graph.populations}
    places = [(phase.name, name) for phase in graph.phases for name in phase.dynamics if kinds[name] == "couple" or readout]
    return places[int(draw.integers(len(places)))]


def threshold_fault(graph: Graph, draw: np.random.Generator) -> Fault:
    phase, name = couple_of(graph, draw)
    by = int(draw.choice([-1, 1]))

    def change(g: Graph) -> Graph:
        old = g.phase(phase).dynamics[name]
        return with_dynamics(g, phase, name, msgspec.structs.replace(old, threshold=old.threshold + by))

    return Fault(f"threshold of {name} {by:+d} in {phase}", frozenset({(phase, name)}), change)


def stride_fault(graph: Graph, draw: np.random.Generator) -> Fault:
    """The two strides of one convolution or pool exchanged, in one phase or on the host."""
    places = [
        (phase.name, i, k)
        for phase in graph.phases
        for i, synapse in enumerate(phase.synapses)
        for k, op in enumerate(synapse.ops)
        if getattr(op, "stride", (1, 1))[0] != getattr(op, "stride", (1, 1))[1] and exchangeable(graph, phase.name, i, k)
    ]
    drives = [(i, 0) for i, d in enumerate(graph.phase("forward").drive) if d.ops[0].stride[0] != d.ops[0].stride[1]]
    number = int(draw.integers(len(places) + len(drives)))
    if number >= len(places):
        i, _ = drives[number - len(places)]

        def on_host(g: Graph) -> Graph:
            drives = list(g.phase("forward").drive)
            drives[i] = msgspec.structs.replace(drives[i], ops=exchanged(drives[i].ops, 0))
            return in_phase(g, "forward", drive=tuple(drives))

        return Fault("stride on the host", frozenset({("forward", graph.phase("forward").drive[i].population)}), on_host)
    phase, i, k = places[number]
    synapse = graph.phase(phase).synapses[i]

    def change(g: Graph) -> Graph:
        return with_synapse(g, phase, i, ops=exchanged(g.phase(phase).synapses[i].ops, k))

    return Fault(f"stride of {synapse.source} -> {synapse.target} in {phase}", frozenset({(phase, synapse.target)}), change)


def exchanged(ops, k):
    return tuple(msgspec.structs.replace(op, stride=op.stride[::-1]) if i == k else op for i, op in enumerate(ops))


def exchangeable(graph: Graph, phase: str, i: int, k: int) -> bool:
    """Shapes still meet: elsewhere a target could not even build it."""
    try:
        require_valid(with_synapse(graph, phase, i, ops=exchanged(graph.phase(phase).synapses[i].ops, k)))
    except toolchain.errors.GraphError:
        return False
    return True


def reset_fault(graph: Graph, draw: np.random.Generator) -> Fault:
    """A spike sets the potential to 0."""
    phase, name = couple_of(graph, draw)

    def step(potential, current, dynamics, *, integer):
        right = fixed.step(potential, current, dynamics, integer=integer)
        return right._replace(potential=np.where(right.spikes != 0, 0, right.potential))

    return Fault(f"reset of {name} to zero in {phase}", frozenset({(phase, name)}), marked(phase, name), step)


def marked(phase: str, name: str) -> Callable[[Graph], Graph]:
    def change(g: Graph) -> Graph:
        old = g.phase(phase).dynamics[name]
        return with_dynamics(g, phase, name, Marked(old.leak, old.threshold, old.reset, old.members))

    return change


def leak_fault(graph: Graph, draw: np.random.Generator) -> Fault:
    """A leak that is one 4096th off; or rounding away from zero, or down, in place of towards zero."""
    phase, name = couple_of(graph, draw, readout=True)
    old = graph.phase(phase).dynamics[name].leak
    way = str(draw.choice(["off", "away", "down"])) if old < 1 else "off"
    if way == "off":
        by = int(draw.choice([-1, 1])) if old < 1 else -1

        def change(g: Graph) -> Graph:
            found = g.phase(phase).dynamics[name]
            return with_dynamics(g, phase, name, msgspec.structs.replace(found, leak=found.leak + by / 4096))

        return Fault(f"leak of {name} {by:+d}/4096 in {phase}", frozenset({(phase, name)}), change)

    def leak(potential, factor, *, integer):
        product = np.abs(potential) * round(factor * 4096)
        if way == "away":
            return np.sign(potential) * -(-product >> 12)
        return (potential * round(factor * 4096)) >> 12

    def step(potential, current, dynamics, *, integer):
        with patch.object(fixed, "leak", leak):
            return fixed.step(potential, current, dynamics, integer=integer)

    return Fault(f"leak of {name} rounded {way} in {phase}", frozenset({(phase, name)}), marked(phase, name), step)


def delay_fault(graph: Graph, draw: np.random.Generator) -> Fault | None:
    """A shorter delay, by which spikes come in another step, or (a loop without delay) never; one by which they come in the same step is the same network."""
    places = [
        (phase.name, i, delay)
        for phase in graph.phases
        for i, synapse in enumerate(phase.synapses)
        for delay in range(synapse.delay)
        if lag(phase, synapse, delay) != lag(phase, synapse, synapse.delay) and any_reachable(graph, phase.name, i)
    ]
    if not places:
        return None
    phase, i, delay = places[int(draw.integers(len(places)))]
    synapse = graph.phase(phase).synapses[i]

    def change(g: Graph) -> Graph:
        return with_synapse(g, phase, i, delay=delay)

    return Fault(
        f"delay of {synapse.source} -> {synapse.target} {synapse.delay} to {delay} in {phase}", frozenset({(phase, synapse.target)}), change
    )


def lag(phase: Phase, synapse: Synapse, delay: int) -> int | None:
    """In how many of the target's steps a spike arrives."""
    ticks = phase.timing.start[synapse.source] + delay - phase.timing.start[synapse.target]
    if delay == 0 and ticks % phase.timing.period == 0 and phase.order.index(synapse.source) >= phase.order.index(synapse.target):
        return None
    return -(-ticks // phase.timing.period)


def any_reachable(graph: Graph, phase: str, i: int) -> bool:
    entries = Counter(graph, [phase])._entries
    return any(bool(entry.reachable.any()) for key, entry in entries.items() if key[0] == phase and "->" in key[1] and key[2] == i)


KINDS = {
    "weight": weight_fault,
    "threshold": threshold_fault,
    "stride": stride_fault,
    "reset": reset_fault,
    "leak": leak_fault,
    "delay": delay_fault,
}


@dataclass(frozen=True)
class Entry:
    found: object
    name: str = "faulty"

    def load(self):
        return self.found


def drawn(random_graph, kind: str, trial: int) -> tuple[Artifact, Fault, int]:
    """A network and a fault in it; how often a place was drawn that no network of this structure can show."""
    for again in range(100):
        draw = np.random.default_rng([trial, again, len(kind), ord(kind[0])])
        made = network(random_graph, draw, trial, kind)
        fault = KINDS[kind](made.graph, draw)
        if fault is not None:
            return made, fault, again
    raise AssertionError("no network of 100 can have this fault")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_planted_fault_is_found_and_named(kind, random_graph, monkeypatch):
    missed = []
    for trial in range(TRIALS):
        made, fault, _ = drawn(random_graph, kind, trial)
        by = REFERENCE if kind in ("stride", "delay") or trial % 2 else SIM
        planted = Faulty(fault, by)
        monkeypatch.setattr(targets, "entry_points", lambda group, planted=planted: [Entry(planted)])
        names = ("sim", "faulty") if planted.by is REFERENCE else ("reference", "faulty")
        dataset = "mnist-1k" if made.graph.provenance.model == "mnist-fc" else "digits"
        found = toolchain.verify(made, targets=names, dataset=dataset, samples=3, probes=8)
        first = found.first_difference
        named = first is not None and (first.phase, first.population) in fault.where
        if found.passed or not named:
            missed.append(
                (trial, made.graph.provenance.model, fault.what, None if first is None else first.to_text("a", "b"), found.coverage.share)
            )
    assert missed == []


@pytest.mark.lava
@pytest.mark.parametrize(("kind", "trial"), [("weight", 0), ("threshold", 1), ("stride", 3), ("leak", 5), ("delay", 4)])
def test_lava_with_a_fault_in_its_copy_is_found_out(kind, trial, random_graph, monkeypatch):
    from toolchain.targets.lava_sim import LAVA_SIM

    for number in range(trial, trial + 20):
        made, fault, _ = drawn(random_graph, kind, number)
        if fault.step is None and not LAVA_SIM.check(fault.change(made.graph)):
            break  # Lava has no delay below one tick, and its leak cannot be told to round otherwise
    monkeypatch.setattr(targets, "entry_points", lambda group: [Entry(Faulty(fault, LAVA_SIM))])
    found = toolchain.verify(made, targets=("sim", "faulty"), dataset="digits", samples=2, probes=4)
    assert not found.passed
    assert (found.first_difference.phase, found.first_difference.population) in fault.where
