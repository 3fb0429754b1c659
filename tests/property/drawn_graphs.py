"""Random networks as graphs: branches, skips, relays, several loops, odd image sizes, every operation and composition that `fold` leaves.

A drawn graph is what `lower` makes, in canonical form: its connections have one operation with a weight, with a pool or an upsampling before or behind it, and
its feedback phase is declared. All numbers are whole multiples of powers of two with few bits, so that every sum is exact in float64 in whatever order,
and two runs can be compared spike for spike and bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, log2, prod, sqrt

import msgspec
import numpy as np
from hypothesis import strategies as st

from toolchain import ir
from toolchain.ir import (
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
    frozen,
)

Draw = Callable[..., object]
Chain = tuple[Op, ...]

STEPS = 7
"""Longest drawn phase: a leak of 3/4 costs two bits a step, and 53 are all there are."""


@dataclass
class Tensors:
    """Gathers the tensors of one graph, with values from `random`."""

    random: np.random.Generator
    integer: bool
    extreme: bool
    found: dict[str, Array] = field(default_factory=dict)

    def weight(self, name: str, shape: Shape, meeting: int) -> str:
        """A weight with sums of `meeting` spikes near 1 in floats; in integers 8-bit mantissas, the largest ones where `extreme`."""
        if self.integer:
            values = self.random.choice([127, -128], shape) if self.extreme else self.random.integers(-128, 128, shape)
            self.found[name] = frozen(values, np.int8)
        else:
            fine = 3 + ceil(log2(sqrt(meeting)))
            self.found[name] = frozen(self.random.integers(-15, 16, shape) / 2.0**fine)
        return name

    def constant(self, name: str, shape: Shape) -> str:
        values = self.random.integers(-40, 60, shape)
        self.found[name] = frozen(values * 8, np.int16) if self.integer else frozen(values / 64)
        return name


def _conv_axis(size: int, made: int) -> list[tuple[int, int, int, int]]:
    """(kernel, stride, padding, dilation) that make `made` of `size` values."""
    options = itertools.product((1, 2, 3), (1, 2, 3), (0, 1, 2), (1, 2))
    return [(k, s, p, d) for k, s, p, d in options if size + 2 * p > d * (k - 1) and (size + 2 * p - d * (k - 1) - 1) // s + 1 == made]


def _spread_axis(size: int, made: int) -> list[tuple[int, int, int, int, int]]:
    """(kernel, stride, padding, dilation, output padding) of a transposed convolution that makes `made` of `size` values."""
    options = itertools.product((1, 2, 3), (1, 2, 3), (0, 1), (1, 2), (0, 1))
    return [o for o in options if o[4] < max(o[1], o[3]) and (size - 1) * o[1] - 2 * o[2] + o[3] * (o[0] - 1) + o[4] + 1 == made]


def _pool_axis(size: int, made: int, kernels: Sequence[int]) -> list[tuple[int, int, int]]:
    """(kernel, stride, padding) of a pool that makes `made` of `size` values; strides below the kernel overlap."""
    options = itertools.product(kernels, (1, 2, 3), (0, 1))
    return [(k, s, p) for k, s, p in options if 2 * p <= k <= size + 2 * p and (size + 2 * p - k) // s + 1 == made]


@st.composite
def connections(draw: Draw, tensors: Tensors, name: str, source: Shape, target: Shape) -> Chain:
    """Operations from `source` to `target`, one of them with a weight called `name`; images may be flattened behind them."""
    kinds = ["dense"] + ["scale"] * (source == target)
    images = [target] if len(target) == 3 else _images_of(prod(target), source)
    if len(source) == 3:
        kinds += [
            "pool dense",
            "up dense",
            *["conv", "spread", "pool conv", "conv pool", "up conv", "conv up", "scale pool", "scale up"] * bool(images),
        ]
        kinds += ["pool scale"] * (len(target) == 3)
    for kind in draw(st.permutations(kinds)):
        ops = draw(_CHAINS[kind](tensors, name, source, target if kind.endswith("dense") or not images else draw(st.sampled_from(images))))
        if ops is not None:
            return ops
    raise AssertionError("a dense connection fits everywhere")


def _images_of(neurons: int, source: Shape) -> list[Shape]:
    """Images with as many values as a flat population, of sizes that a source image can become."""
    if len(source) != 3:
        return []
    sizes = itertools.product(range(1, source[1] + 2), range(1, source[2] + 2))
    return [(neurons // (h * w), h, w) for h, w in sizes if neurons % (h * w) == 0]


@st.composite
def _dense(draw: Draw, tensors: Tensors, name: str, source: Shape, target: Shape) -> Chain | None:
    return (Dense(tensors.weight(name, (prod(target), prod(source)), prod(source)), exponent=draw(_exponents(tensors))),)


@st.composite
def _scale(draw: Draw, tensors: Tensors, name: str, source: Shape, target: Shape) -> Chain | None:
    if source != target:
        return None
    return (Scale(weight=tensors.weight(name, source[:1], 1), exponent=draw(_exponents(tensors))),)


@st.composite
def _conv(draw: Draw, tensors: Tensors, name: str, source: Shape, target: Shape) -> Chain | None:
    axes = [_conv_axis(source[i], target[i]) for i in (1, 2)]
    if not all(axes):
        return None
    (kh, sh, ph, dh), (kw, sw, pw, dw) = (draw(st.sampled_from(axis)) for axis in axes)
    groups = draw(_groups(source[0], target[0]))
    weight = tensors.weight(name, (target[0], source[0] // groups, kh, kw), source[0] // groups * kh * kw)
    return (Conv2d(weight, (sh, sw), (ph, pw), (dh, dw), groups, exponent=draw(_exponents(tensors))),)


@st.composite
def _spread(draw: Draw, tensors: Tensors, name: str, source: Shape, target: Shape) -> Chain | None:
    axes = [_spread_axis(source[i], target[i]) for i in (1, 2)]
    if not all(axes):
        return None
    (kh, sh, ph, dh, oh), (kw, sw, pw, dw, ow) = (draw(st.sampled_from(axis)) for axis in axes)
    groups = draw(_groups(source[0], target[0]))
    weight = tensors.weight(name, (source[0], target[0] // groups, kh, kw), source[0] // groups * kh * kw)
    return (ConvTranspose2d(weight, (sh, sw), (ph, pw), (oh, ow), (dh, dw), groups, exponent=draw(_exponents(tensors))),)


def _groups(into: int, out: int) -> st.SearchStrategy[int]:
    return st.sampled_from([n for n in (1, 2, 3, 4) if into % n == 0 and out % n == 0])


def _exponents(tensors: Tensors) -> st.SearchStrategy[int]:
    return st.integers(0, 3) if tensors.integer else st.just(0)


@st.composite
def _pool(draw: Draw, tensors: Tensors, source: Shape, target: Shape) -> AvgPool2d | None:
    kernels = (1, 2, 3) if tensors.integer else (1, 2)  # the mean over three values is no multiple of a power of two
    axes = [_pool_axis(source[i], target[i], kernels) for i in (1, 2)]
    if not all(axes):
        return None
    (kh, sh, ph), (kw, sw, pw) = (draw(st.sampled_from(axis)) for axis in axes)
    return AvgPool2d((kh, kw), (sh, sw), (ph, pw))


@st.composite
def _pooled_first(draw: Draw, tensors: Tensors, name: str, source: Shape, target: Shape, then: str) -> Chain | None:
    between = (source[0], *(draw(st.integers(1, n)) for n in source[1:]))
    between = (*target[:1], *target[1:]) if then == "scale" else between
    pool = draw(_pool(tensors, source, between)) if between[0] == source[0] else None
    rest = None if pool is None else draw(_CHAINS[then](tensors, name, between, target))
    return None if rest is None else (pool, *rest)


@st.composite
def _pooled_last(draw: Draw, tensors: Tensors, name: str, source: Shape, target: Shape, first: str) -> Chain | None:
    between = source if first == "scale" else (target[0], *(n + draw(st.integers(0, 2)) for n in target[1:]))
    pool = draw(_pool(tensors, between, target)) if between[0] == target[0] else None
    start = None if pool is None else draw(_CHAINS[first](tensors, name, source, between))
    return None if start is None else (*start, pool)


@st.composite
def _upsampled_first(draw: Draw, tensors: Tensors, name: str, source: Shape, target: Shape, then: str) -> Chain | None:
    factor = draw(st.integers(2, 3))
    rest = draw(_CHAINS[then](tensors, name, (source[0], source[1] * factor, source[2] * factor), target))
    return None if rest is None else (Upsample(factor), *rest)


@st.composite
def _upsampled_last(draw: Draw, tensors: Tensors, name: str, source: Shape, target: Shape, first: str) -> Chain | None:
    factors = [n for n in (2, 3) if target[1] % n == 0 and target[2] % n == 0]
    if not factors:
        return None
    factor = draw(st.sampled_from(factors))
    start = draw(_CHAINS[first](tensors, name, source, (target[0], target[1] // factor, target[2] // factor)))
    return None if start is None else (*start, Upsample(factor))


_CHAINS: dict[str, Callable[[Tensors, str, Shape, Shape], st.SearchStrategy[Chain | None]]] = {
    "dense": _dense,
    "scale": _scale,
    "conv": _conv,
    "spread": _spread,
    "pool dense": lambda *found: _pooled_first(*found, "dense"),
    "pool conv": lambda *found: _pooled_first(*found, "conv"),
    "pool scale": lambda *found: _pooled_first(*found, "scale"),
    "conv pool": lambda *found: _pooled_last(*found, "conv"),
    "scale pool": lambda *found: _pooled_last(*found, "scale"),
    "up dense": lambda *found: _upsampled_first(*found, "dense"),
    "up conv": lambda *found: _upsampled_first(*found, "conv"),
    "conv up": lambda *found: _upsampled_last(*found, "conv"),
    "scale up": lambda *found: _upsampled_last(*found, "scale"),
}

shapes = st.one_of(
    st.tuples(st.integers(1, 8)),
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    st.sampled_from([(4, 5, 5), (2, 7, 3), (4, 4, 4), (2, 5, 4)]),
)


@st.composite
def graphs(
    draw: Draw,
    *,
    integer: bool = False,
    extreme: bool = False,
    raw: bool = False,
    host: bool = False,
    leaks: bool = True,
    relays: bool = True,
) -> Graph:
    """A graph in model steps with a declared feedback phase (of an integer graph with its synapses too, as `adjoint` makes them).

    integer   mantissas, exponents and thresholds of a chip instead of floats; `extreme`: every weight 127 or -128, thresholds that saturate
    raw       the float graph before `fold`: identities, scales and a factor a channel around the weights
    host      the still input enters as currents that the host computes, as behind `inject`; else through synapses, still or as events
    leaks     some graphs have couples or readouts that leak; `relays`: some have linear relays
    """
    tensors = Tensors(np.random.default_rng(draw(st.integers(0, 2**32 - 1))), integer, extreme)
    inner = _inner(draw, relays=relays)
    events = not host and draw(st.booleans())
    source = Population("input", draw(shapes), "input", events=events)
    readout = Population("readout", (draw(st.integers(1, 4)),), "readout")
    populations = (source, *inner, readout)
    edges = _edges(draw, inner, relay_loops=integer)
    synapses = [
        Synapse(a.name, b.name, draw(connections(tensors, f"{a.name}.{b.name}.{delay}", a.shape, b.shape)), delay) for a, b, delay in edges
    ]
    entries = [p for i, p in enumerate(inner) if i == 0 or draw(st.integers(0, 4)) == 0]
    drives = []
    for p in entries:
        ops = draw(connections(tensors, f"input.{p.name}", source.shape, p.shape))
        if host:
            drives.append(_input_drive(draw, tensors, p, ops))
        else:
            synapses.append(Synapse("input", p.name, ops))
    last = draw(st.sampled_from([p for p in inner if p.kind == "couple" or p is inner[-1]][-2:]))
    synapses.append(Synapse(last.name, "readout", draw(connections(tensors, "readout", last.shape, readout.shape))))
    synapses = list(draw(st.permutations(synapses)))
    if integer:
        synapses = [msgspec.structs.replace(s, ops=_shifted(draw, s.ops)) for s in synapses]
    if raw:
        synapses = [msgspec.structs.replace(s, ops=_decorated(draw, tensors, s.ops, s, populations)) for s in synapses]
    time_steps = draw(st.integers(1, STEPS))
    forward_dynamics, feedback_dynamics = _dynamics(draw, inner, synapses, _leak(draw) if leaks else 1.0, integer=integer, extreme=extreme)
    forward_dynamics["readout"] = Dynamics(_leak(draw) if leaks else 1.0)
    order = (*([] if host else ["input"]), *(p.name for p in inner), "readout")
    bias = {p.name: _biases(draw, tensors, p, time_steps) for p in inner if draw(st.integers(0, 3))}
    tensors.found["readout.bias"] = frozen(tensors.random.integers(-32, 32, readout.shape) / 64)
    bias["readout"] = (Bias("readout.bias"),)
    forward = Phase("forward", time_steps, order, forward_dynamics, tuple(synapses), bias, tuple(drives))
    back = tuple(reversed([p.name for p in inner]))
    error = Drive(last.name, "error", gain=2.0, exponent=draw(st.integers(0, 3)) if integer else 0)
    feedback = Phase(
        "feedback", draw(st.integers(1, STEPS)), back, feedback_dynamics, _transposed(synapses, inner) if integer else (), drive=(error,)
    )
    used = ir.tensor_names(forward) | ir.tensor_names(feedback)
    graph = Graph(
        populations,
        (forward, feedback),
        {name: tensor for name, tensor in tensors.found.items() if name in used},
        _integer_units(inner, extreme) if integer else Units("float", {}),
        Provenance("drawn"),
    )
    ir.verify(graph)
    return graph


def _inner(draw: Draw, *, relays: bool) -> list[Population]:
    """One to five populations of couples, up to two relays between them or at the end."""
    kinds = ["couple"] * draw(st.integers(1, 5))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2] if relays else [0]))):
        kinds.insert(draw(st.integers(0, len(kinds))), "linear")
    found: list[Population] = []
    for i, kind in enumerate(kinds):
        same = found and draw(st.booleans())  # residual networks keep their shapes
        found.append(Population(f"{'relay' if kind == 'linear' else 'couple'}{i}", found[-1].shape if same else draw(shapes), kind))
    return found


def _edges(draw: Draw, inner: list[Population], *, relay_loops: bool) -> list[tuple[Population, Population, int]]:
    """Same-step connections that reach every population, skips of any length, loops back and to itself, and delayed connections that run forward.

    A loop of relays alone adds bits at every step, so floats have none; integers clamp.
    """
    edges = [(inner[draw(st.integers(max(0, i - 2), i - 1))], p, 0) for i, p in enumerate(inner) if i]
    for _ in range(draw(st.integers(0, 4))):
        a, b, delay = draw(st.integers(0, len(inner) - 1)), draw(st.integers(0, len(inner) - 1)), draw(st.integers(0, 1))
        a, b = (min(a, b), max(a, b)) if delay == 0 else (a, b)
        edge = (inner[a], inner[b], delay)
        graded = inner[a].kind == inner[b].kind == "linear"
        if (a == b and delay == 0) or edge in edges or (graded and a >= b and not relay_loops):
            continue
        edges.append(edge)
    return edges


def _leak(draw: Draw) -> float:
    return draw(st.sampled_from([1.0, 1.0, 0.5, 0.75]))


def _dynamics(
    draw: Draw, inner: list[Population], synapses: list[Synapse], leak: float, *, integer: bool, extreme: bool
) -> tuple[dict[str, Dynamics], dict[str, Dynamics]]:
    """What populations do forward and, as declared, in the feedback phase; A / Ab is one for all, or one each where no population feeds two."""
    shared = draw(st.sampled_from([1.0, 2.0, 4.0]))
    reached = [len({s.target for s in synapses if s.source == p.name and s.target != "readout"}) for p in inner]
    own = max(reached) <= 1 and all(p.kind == "couple" for p in inner) and not integer and draw(st.booleans())
    forward: dict[str, Dynamics] = {}
    feedback: dict[str, Dynamics] = {}
    for p in inner:
        if p.kind == "linear":
            forward[p.name] = feedback[p.name] = Dynamics(1.0, members="graded")
            continue
        if integer:
            top = ir.POTENTIAL_LIMIT - 40 if extreme else 900
            threshold, reset, back = (draw(st.sampled_from([n, top])) for n in (150, 300, 70))
            forward[p.name], feedback[p.name] = Dynamics(leak, threshold, reset, "plus"), Dynamics(leak, back, reset, "both")
            continue
        threshold, reset, back = (draw(st.sampled_from(n)) for n in ([0.5, 0.75, 1.0], [0.5, 1.0, 2.0], [0.125, 0.25, 0.5]))
        ratio = draw(st.sampled_from([1.0, 2.0, 4.0])) if own else shared
        forward[p.name] = Dynamics(leak, threshold, reset, "plus")
        feedback[p.name] = Dynamics(leak, back, reset / ratio, "both")
    return forward, feedback


def _biases(draw: Draw, tensors: Tensors, population: Population, time_steps: int) -> tuple[Bias, ...]:
    starts = draw(st.lists(st.integers(0, min(1, time_steps - 1)), min_size=1, max_size=2))
    exponents = [draw(st.integers(0, 2)) if tensors.integer else 0 for _ in starts]
    names = [tensors.constant(f"{population.name}.bias{i}", population.shape) for i in range(len(starts))]
    return tuple(Bias(name, exponent, start) for name, exponent, start in zip(names, exponents, starts, strict=True))


def _input_drive(draw: Draw, tensors: Tensors, population: Population, ops: Chain) -> Drive:
    """A current of the host; exponents are a chip's, so its operations have none."""
    bias = tensors.constant(f"{population.name}.drive", population.shape) if draw(st.booleans()) else None
    if not tensors.integer:
        return Drive(population.name, "input", ops, bias)
    plain = tuple(msgspec.structs.replace(op, exponent=0) if ir.weight_of(op) is not None else op for op in ops)
    for name in (name for op in ops if (name := ir.weight_of(op)) is not None):
        tensors.found[name] = frozen(tensors.random.integers(-300, 500, tensors.found[name].shape), np.int32)
    return Drive(population.name, "input", plain, bias, shift=draw(st.integers(6, 11)), exponent=draw(st.integers(0, 3)))


def _transposed(synapses: Sequence[Synapse], inner: Sequence[Population]) -> tuple[Synapse, ...]:
    """The feedback phase of an integer graph whose units need no alignment."""
    kinds = {p.name: p.kind for p in inner}
    between = [s for s in reversed(synapses) if s.source in kinds and s.target in kinds]
    return tuple(
        Synapse(s.target, s.source, ir.adjoint(s.ops), s.delay, gate=s.target if kinds[s.target] == "couple" else None) for s in between
    )


def _integer_units(inner: Sequence[Population], extreme: bool) -> Units:
    """One unit for all. Backwards a relay's values are in units of 1: W^T of a spike, which stands for 1, is what W has made of it."""
    unit = 4000.0 if extreme else 256.0
    names = [p.name for p in inner]
    feedback = {p.name: unit if p.kind == "couple" else 1.0 for p in inner}
    return Units("integer", {"forward": {"input": 15.0} | dict.fromkeys([*names, "readout"], unit), "feedback": feedback})


def _decorated(draw: Draw, tensors: Tensors, ops: Chain, synapse: Synapse, populations: Sequence[Population]) -> Chain:
    """`ops` as `lower` may leave them: an identity, a scale, or a factor a channel before or behind."""
    shape = {p.name: p.shape for p in populations}
    made = ir.shapes_along(ops, shape[synapse.source], shape[synapse.target], tensors.found)[-1]
    name = f"{synapse.source}.{synapse.target}.{synapse.delay}"
    extras: list[tuple[Chain, Chain]] = [
        ((), ()),
        ((Identity(),), ()),
        ((Scale(0.5),), (Identity(), Scale(2.0))),
        ((Scale(0.25), Scale(4.0)), ()),
    ]
    before = Scale(weight=f"{name}.before")
    behind = Scale(weight=f"{name}.behind")
    extras += [((before,), ()), ((before, Scale(2.0)), ())]
    if len(made) == len(shape[synapse.target]):
        extras += [((), (behind,)), ((before,), (Scale(4.0), behind))]
    head, tail = draw(st.sampled_from(extras))
    if before in head:
        tensors.found[f"{name}.before"] = frozen(tensors.random.choice([0.5, 1.0, 2.0, -1.0], shape[synapse.source][:1]))
    if behind in tail:
        tensors.found[f"{name}.behind"] = frozen(tensors.random.choice([0.5, 1.0, 2.0, -1.0], made[:1]))
    return (*head, *ops, *tail)


def _shifted(draw: Draw, ops: Chain) -> Chain:
    """`ops` with a shift by itself before or behind, now and then."""
    return draw(st.sampled_from([ops, ops, ops, (Scale(exponent=2), *ops), (*ops, Scale(exponent=1))]))


@st.composite
def values(draw: Draw, graph: Graph, samples: int = 3, levels: int = 16) -> tuple[Array, Array]:
    """Inputs in [0, 1] (multiples of 1 / `levels`; events are 0 or 1, with time last) and errors of the driven population, for `samples`. Of a float
    graph, as declared, before `adjoint` measures it in other units."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    source = graph.of_kind("input")[0]
    frames = (graph.phase("forward").time_steps,) if source.events else ()
    top = 1 if source.events else levels
    inputs = random.integers(0, top + 1, (samples, *source.shape, *frames)) / top
    driven = graph.population(graph.phase("feedback").drive[0].population)
    if graph.integer:
        amplitude = 1.0 if driven.kind == "couple" else 256.0
    else:  # in the model's unit: more than a spike carries is cut on a chip
        amplitude = min(d.reset for d in graph.phase("feedback").dynamics.values() if d.members == "both")
    return inputs, random.integers(-48, 49, (samples, *driven.shape)) / 64 * amplitude
