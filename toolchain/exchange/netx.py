"""A feed-forward network, or one with a single recurrent dense layer, as a netx file: the HDF5 that lava-dl's `lava.lib.dl.netx.hdf5.Network` reads.

What netx has are LIF neurons that fire above a threshold and are reset to zero, so every file is a HARD-RESET APPROXIMATION of our neurons, which subtract. A block is a
connection and its neurons; their unit is one step of the connection's integer weights:

    u = sum of weight * message                      never wraps: the worst case of any input stays below 2^17 (Lava shifts it left by 6 into 24 bit)
    v = decay(v) + u + bias                          saturates at 2^17
    fires where v > vThMant, and then v = 0          vThMant + 1 = (threshold + reset) / 2 of ours, which keeps rates (see docs/exchange.md)

The first block takes the image as graded messages 0 .. `levels`, held for all time steps; the last one is a block of the same kind whose threshold nothing reaches: a non-spiking
integrator, whose potentials are the class scores.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import msgspec
import numpy as np

import toolchain
from toolchain import codec, fixed
from toolchain.compiler import forward_only, lowered
from toolchain.errors import DesignRuleError, GraphError, UsageError
from toolchain.ir import (
    DECAY_ONE,
    Array,
    AvgPool2d,
    Conv2d,
    Dense,
    Graph,
    Identity,
    Op,
    Phase,
    Scale,
    Shape,
    Synapse,
    Upsample,
    exponent_of,
    output_shape,
    weight_of,
)
from toolchain.passes import Adjoint, Fold, Inject, Pipeline, Quantize, Retime
from toolchain.source import Source
from toolchain.target import get

STEP_BITS = 6
"""Lava's potentials count 2^-6 of a step of the weights."""

LARGEST = 2**17 - 1
"""Largest threshold, and largest current or potential, in steps of a weight: Lava's 24 bit less the 6 by which it shifts them."""

WEIGHTS = (-128, 127)
"""What lava-dl's reader and Lava's fixed-point connections carry unchanged, whatever the signs."""

LARGEST_BIAS = 2**12 - 1
"""A bias has 13 bits signed, and netx gives it the weights' unit."""

LEVELS = (255, 127, 63, 31, 15, 7, 3, 1)
"""Input levels to choose from, finest first: whole numbers of bits."""

RESET_OFFSET = 1
"""lava-dl's `reset_offset` at which each block starts a sample with the first message that reaches it."""

TOLD = 8
"""Reasons that a refusal names, of a network that has more."""

HARD_RESET = "hard-reset approximation"


@dataclass(frozen=True)
class Block:
    """A connection and the neurons it feeds. `shape` is (channels, height, width) or (neurons,); `weight` is (out, in), or of a convolution (out, in / groups, kh, kw).

    `grid` is where a convolution's windows lie, None for a dense block; `recurrent` (out, out) is what the neurons send themselves. One step of the weights is 2^`exponent` units of the
    graph's population. `lost` says what rounding the block's numbers once more took.
    """

    population: str
    shape: Shape
    weight: Array
    bias: Array
    threshold: int
    decay: int
    exponent: int
    grid: fixed.Grid | None = None
    recurrent: Array | None = None
    lost: tuple[str, ...] = ()

    @property
    def type(self) -> str:
        return "conv" if self.grid is not None else "dense" if self.recurrent is None else "dense_rec"


@dataclass(frozen=True)
class Chain:
    """A network as netx has it: its blocks in order, the last one the readout, and what the file does not carry of `graph` (integers, in model steps)."""

    graph: Graph
    blocks: tuple[Block, ...]
    lost: tuple[str, ...]

    @property
    def levels(self) -> int:
        """The largest input message."""
        return round(self.graph.scale("forward", self.graph.of_kind("input")[0].name))

    @property
    def message_bits(self) -> int:
        """What lava-dl's reader is to be told as `input_message_bits`."""
        return self.levels.bit_length()

    @property
    def time_steps(self) -> int:
        return self.graph.phase("forward").time_steps

    @property
    def input_shape(self) -> Shape:
        return self.graph.of_kind("input")[0].shape

    @property
    def events(self) -> bool:
        """Whether messages differ from step to step."""
        return self.graph.of_kind("input")[0].events

    def frames(self, images: Array) -> Array:
        """Messages for `images` in [0, 1] (samples, channels, height, width), events with time last: as the first block takes them, images as (samples, width, height, channels)."""
        messages = codec.encode_input(self.graph, codec.check_inputs(self.graph, images))
        return messages if self.blocks[0].grid is None else np.moveaxis(messages, (1, 3), (3, 1))


def chain(source: Source) -> Chain:
    """`source` as netx has it, at the input levels that leave the least rounding in its first block.

    DesignRuleError, with every reason, where netx cannot carry it; UsageError for an artefact without its float tensors.
    """
    found: list[Chain] = []
    problems: list[str] = []
    for graph in _integer_graphs(source):
        blocks, problems = blocks_of(graph)
        if not problems:
            found.append(Chain(graph, blocks, _lost(graph, blocks)))
    if not found:
        raise _refusal(source.name, problems)
    return min(found, key=_coarseness)


def calibrated(made: Chain, images: Array, source: str) -> Chain:
    """`made` with the lowest thresholds at which no population fires more often than in the exact graph, all `images` in [0, 1] of `source` taken together.

    Block by block from the input on, so that what earlier blocks lose is made up for by later ones; the blocks are simulated here in Lava's integers.
    """
    with get("sim").compile(Retime()(forward_only(made.graph))) as run:
        counts = run.run(images).counts
    messages = codec.encode_input(made.graph, codec.check_inputs(made.graph, images))
    arriving = [messages[..., step] for step in range(made.time_steps)] if made.events else [messages]
    blocks = []
    for block in made.blocks[:-1]:
        currents = [_current(block, sent) for sent in arriving]
        wanted = int(counts[block.population].sum())
        low, high = 0, min(LARGEST, 4 * block.threshold + 4)
        while wanted and high - low > 1:
            middle = (low + high) // 2
            fired = sum(int(spikes.sum()) for spikes in _fired(replace(block, threshold=middle), currents, made.time_steps))
            low, high = (middle, high) if fired > wanted else (low, middle)
        blocks.append(replace(block, threshold=high) if wanted else block)
        arriving = _fired(blocks[-1], currents, made.time_steps)
    whole = (*blocks, made.blocks[-1])
    return replace(made, blocks=whole, lost=_lost(made.graph, whole, f"{len(images)} training samples of {source}"))


def _current(block: Block, sent: Array) -> Array:
    """What messages (samples, *source shape) make of a block's weights and bias, (samples, *shape)."""
    wide = sent.astype(np.int64)
    if block.grid is None:
        made = fixed.product(wide.reshape(len(sent), -1), block.weight.T).reshape(len(sent), *block.shape)
    else:
        made = fixed.convolve(wide, block.weight, block.grid, block.shape)
    return np.asarray(made + block.bias)


def _fired(block: Block, currents: Sequence[Array], time_steps: int) -> list[Array]:
    """The spikes of each step, int8, where `currents` hold one for each or the same for all: Lava's LIF, in its integers."""
    potential = np.zeros(currents[0].shape, np.int64)
    spikes = [np.zeros(currents[0].shape, np.int8)]
    for step in range(time_steps):
        current = currents[step % len(currents)]
        if block.recurrent is not None:
            current = current + fixed.product(spikes[-1].astype(np.int64), block.recurrent.T)
        potential = np.sign(potential) * (np.abs(potential) * (DECAY_ONE - block.decay) >> 12)
        potential = np.clip(potential + (current << STEP_BITS), -(LARGEST << STEP_BITS), LARGEST << STEP_BITS)
        spikes.append((potential > block.threshold << STEP_BITS).astype(np.int8))
        potential[spikes[-1] != 0] = 0
    return spikes[1:]


def _coarseness(made: Chain) -> float:
    """The squared steps of messages and of weights in the first block, as fractions of the largest: finer messages need coarser weights, or their sum would wrap."""
    first = made.blocks[0]
    peaks = [made.levels, *(np.abs(weight).max() for weight in (first.weight, first.recurrent) if weight is not None)]
    return float(sum(1 / float(peak) ** 2 for peak in peaks))


def _integer_graphs(source: Source) -> Iterator[Graph]:
    """The network's integers with its first connection on the chip, at ever fewer input levels."""
    if source.artifact is None:
        folded = Pipeline((Fold(), Adjoint()))(lowered(source))
        bits, calibration = 8, None
    else:
        kept = source.artifact.float_graph
        if kept is None:
            raise UsageError(
                f"'{source.name}' was compiled without its float tensors, which export starts from: compile it again without --no-float"
            )
        folded, calibration = kept, source.artifact.graph.provenance.calibration
        bits = _weight_bits(source.artifact.graph)
    _require_chain(folded, source.name)
    finest = 15 if folded.of_kind("input")[0].events else 255
    for levels in (levels for levels in LEVELS if levels <= finest):
        quantize = Quantize(weight_bits=bits, input_levels=levels, calibration=calibration)
        yield Pipeline((Inject("graded"), quantize))(folded)


def _weight_bits(graph: Graph) -> int:
    """The fewest bits that hold every weight of the forward phase's connections: what the artefact was compiled to, or fewer."""
    weights = [graph.tensors[name] for s in graph.phase("forward").synapses for op in s.ops if (name := weight_of(op)) is not None]
    for bits in range(2, 8):
        low, high = fixed.weight_range(bits)
        if all(weight.min() >= low and weight.max() <= high for weight in weights if weight.size):
            return bits
    return 8


def _refusal(model: str, problems: Sequence[str]) -> DesignRuleError:
    told = [*problems[:TOLD], *([f"and {len(problems) - TOLD} more"] if len(problems) > TOLD else [])]
    return DesignRuleError(f"'{model}' cannot be written as netx: {'; '.join(told)}; deploy it with --target lava-sim, which carries it")


def _require_chain(graph: Graph, model: str) -> None:
    """The graph is one chain of populations, each feeding the next and at most one of them, densely, itself; DesignRuleError with every connection that is not so."""
    phase = graph.phase("forward")
    place = {name: i for i, name in enumerate(phase.order)}
    problems = [f"population '{p.name}' is a graded relay, which netx does not have" for p in graph.of_kind("linear") if p.name in place]
    itself = [s for s in phase.synapses if s.source == s.target]
    for synapse in phase.synapses:
        back = place[synapse.source] - place[synapse.target]
        where = f"connection '{synapse.source}' -> '{synapse.target}'"
        if back > 0:
            problems.append(
                f"feedback {where} leads back over {back} layer{'s' * (back > 1)}, and netx has loops within one dense layer only"
            )
        elif back < -1:
            problems.append(f"{where} skips {-back - 1} layer{'s' * (back < -2)}, and the blocks of netx are a chain")
        elif back == 0 and (len(itself) > 1 or not _only_dense(synapse)):
            what = "is not dense" if not _only_dense(synapse) else f"is one of {len(itself)}"
            problems.append(f"feedback {where} {what}, and netx is written with one recurrent dense layer only")
        elif synapse.delay != (back == 0):
            problems.append(f"{where} has a delay of {synapse.delay} steps, and that of netx is {int(back == 0)}")
    for name, biases in phase.bias.items():
        late = [bias.start for bias in biases if bias.start]
        if late:
            problems.append(f"the bias of '{name}' starts at step {late[0]}, and a netx bias with the first step")
    pairs = [(s.source, s.target) for s in phase.synapses]
    twice = {pair for pair in pairs if pairs.count(pair) > 1}
    problems += [
        f"'{source}' and '{target}' are joined by several connections, and a netx block has one" for source, target in sorted(twice)
    ]
    for synapse in phase.synapses:
        problem = _unmergeable(graph, synapse)
        if problem is not None:
            problems.append(f"connection '{synapse.source}' -> '{synapse.target}' {problem}")
    if problems:
        raise _refusal(model, problems)


def _only_dense(synapse: Synapse) -> bool:
    return all(isinstance(op, (Dense, Identity, Scale)) for op in synapse.ops)


def _unmergeable(graph: Graph, synapse: Synapse) -> str | None:
    """Why the operations of a connection are no single dense connection or convolution, if so."""
    for op in synapse.ops:
        known = isinstance(op, (Dense, Conv2d, AvgPool2d, Identity, Scale))
        if not known or (getattr(op, "transpose", False) and not isinstance(op, Dense)):
            names: dict[type, str] = {Upsample: "an upsampling", AvgPool2d: "a transposed pool"}
            return f"has {names.get(type(op), 'a transposed convolution')}, which lava-dl's reader does not make"
    try:
        joined(synapse, graph, exact=False)
    except GraphError as error:
        return str(error)
    return None


# from operations to one block


@dataclass(frozen=True)
class Connection:
    """One dense matrix (out, in), or one convolution; integers, to be shifted left by `exponent`."""

    weight: Array
    grid: fixed.Grid | None
    exponent: int


def joined(synapse: Synapse, graph: Graph, *, exact: bool = True) -> Connection:
    """The operations of a connection as one: pools become part of a kernel or matrix. GraphError where that would not be the same."""
    source, target = graph.population(synapse.source).shape, graph.population(synapse.target).shape
    ops = [
        op for op in synapse.ops if not isinstance(op, Identity) and not (isinstance(op, Scale) and op.weight is None and op.factor == 1)
    ]
    exponent = exponent_of(synapse.ops)  # of scales left out too
    wide = np.int64 if exact else np.float64
    dense = next((i for i, op in enumerate(ops) if isinstance(op, Dense)), None)
    if dense is not None:
        if any(not isinstance(op, AvgPool2d) for op in ops[:dense]) or dense != len(ops) - 1:
            raise GraphError(f"is {', '.join(type(op).__name__ for op in ops)}, which no netx block is")
        op = ops[dense]
        assert isinstance(op, Dense)  # `dense` is where one is
        weight = graph.tensors[op.weight].astype(wide)
        weight = weight.T if op.transpose else weight
        pools = tuple(reversed([msgspec.structs.replace(pool, transpose=True) for pool in ops[:dense] if isinstance(pool, AvgPool2d)]))
        if pools:
            before = _pooled_shape(ops[:dense], source, graph)
            weight = fixed.apply(pools, {}, weight.reshape(len(weight), *before), source, integer=exact).reshape(len(weight), -1)
        return Connection(weight, None, exponent)
    if len(source) != 3:
        raise GraphError(f"is {', '.join(type(op).__name__ for op in ops) or 'the identity'} of a flat population, which no netx block is")
    made: Connection | None = None
    for op in ops:
        kernel = _kernel(op, graph, source[0] if made is None else len(made.weight), wide)
        made = kernel if made is None else _chained(made, kernel)
    if made is None:
        raise GraphError("has no weights, and a netx block needs them")
    connection = replace(made, exponent=exponent)
    _require_same(connection, synapse, graph, source, target)
    return connection


def _pooled_shape(pools: Sequence[Op], source: Shape, graph: Graph) -> Shape:
    shape = source
    for pool in pools:
        shape = output_shape(pool, shape, graph.tensors)
    return shape


def _kernel(op: Op, graph: Graph, channels: int, wide: type[Any]) -> Connection:
    """One operation as a convolution; pools and scales treat each channel for itself."""
    if isinstance(op, Conv2d):
        return Connection(graph.tensors[op.weight].astype(wide), fixed.Grid(op.stride, op.padding, op.dilation, op.groups), 0)
    if isinstance(op, AvgPool2d):
        return Connection(np.ones((channels, 1, *op.kernel), wide), fixed.Grid(op.stride, op.padding, (1, 1), channels), 0)
    if isinstance(op, Scale) and op.weight is not None:
        factors = graph.tensors[op.weight].astype(wide)
        return Connection(factors.reshape(-1, 1, 1, 1), fixed.Grid((1, 1), (0, 0), (1, 1), channels), 0)
    raise GraphError(f"has {type(op).__name__}, which no netx block is")


def _chained(first: Connection, second: Connection) -> Connection:
    """Two convolutions as one, where at least one of them treats each channel for itself; the borders are `_require_same`'s to judge."""
    a, b = first.grid, second.grid
    assert a is not None  # dense connections come last and do not get here
    assert b is not None
    depthwise = [g.groups == len(w) and w.shape[1] == 1 for g, w in ((a, first.weight), (b, second.weight))]
    if not any(depthwise):
        raise GraphError("is two convolutions in a row, which no netx block is")
    kernel = tuple(
        b_grid * (k2 - 1) * s1 + d1 * (k1 - 1) + 1
        for k1, k2, s1, d1, b_grid in zip(first.weight.shape[2:], second.weight.shape[2:], a.stride, a.dilation, b.dilation, strict=True)
    )
    outs = len(second.weight)
    inner = second.weight.shape[1] if depthwise[0] else first.weight.shape[1]
    weight = np.zeros((outs, inner, *kernel), first.weight.dtype)
    for y2, x2 in np.ndindex(*second.weight.shape[2:]):
        for y1, x1 in np.ndindex(*first.weight.shape[2:]):
            y, x = y2 * b.dilation[0] * a.stride[0] + y1 * a.dilation[0], x2 * b.dilation[1] * a.stride[1] + x1 * a.dilation[1]
            weight[:, :, y, x] += _met(first.weight[..., y1, x1], second.weight[..., y2, x2], b.groups, after=depthwise[1])
    stride = a.stride[0] * b.stride[0], a.stride[1] * b.stride[1]
    padding = a.padding[0] + a.stride[0] * b.padding[0], a.padding[1] + a.stride[1] * b.padding[1]
    return Connection(weight, fixed.Grid(stride, padding, (1, 1), b.groups if depthwise[0] else a.groups), 0)


def _met(first: Array, second: Array, groups: int, *, after: bool) -> Array:
    """(outs, in / groups) of two maps of channels, one of which treats each for itself: `second` where `after`, else `first`."""
    if after:
        return np.asarray(second * first)
    # the second map's groups say which of the first's channels an output meets
    per = second.shape[1]
    group = np.arange(len(second)) // (len(second) // groups)
    return np.asarray(second * first[:, 0][group[:, None] * per + np.arange(per)])


def _require_same(connection: Connection, synapse: Synapse, graph: Graph, source: Shape, target: Shape) -> None:
    """The joined convolution gives what the operations give, borders included: tried where every pixel counts differently."""
    assert connection.grid is not None  # only convolutions are joined
    image = np.random.default_rng(0).integers(0, 256, (1, *source)).astype(np.float64)
    tensors = {name: graph.tensors[name].astype(np.float64) for op in synapse.ops if (name := weight_of(op)) is not None}
    wanted = fixed.apply(fixed.summed(synapse.ops), tensors, image, target, integer=False)
    found = fixed.convolve(image, connection.weight.astype(np.float64), connection.grid, target)
    if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-9, atol=1e-9 * max(1.0, float(np.abs(wanted).max(initial=0)))):
        raise GraphError("pools an image of odd size or with padding, which as one convolution is another at the borders")


# from the integer graph to blocks


def blocks_of(graph: Graph) -> tuple[tuple[Block, ...], list[str]]:
    """The blocks, and what of them does not fit netx's numbers."""
    phase = graph.phase("forward")
    into = {s.target: s for s in phase.synapses if s.source != s.target}
    around = {s.target: s for s in phase.synapses if s.source == s.target}
    blocks, problems = [], []
    message = round(graph.scale("forward", phase.order[0]))
    for name in phase.order[1:]:
        connection = joined(into[name], graph)
        loop = joined(around[name], graph) if name in around else None
        readout = graph.population(name).kind == "readout"
        block = _readout(graph, phase, name, connection) if readout else _hidden(graph, phase, name, connection, loop, message)
        problems += _problems(block, message)
        blocks.append(block)
        message = 1
    return tuple(blocks), problems


def _hidden(graph: Graph, phase: Phase, name: str, connection: Connection, loop: Connection | None, message: int) -> Block:
    """The neurons of a couple population, in the finest steps at which both connections have one step and no current can wrap."""
    dynamics = phase.dynamics[name]
    firing = (dynamics.threshold + dynamics.reset) / 2 if dynamics.reset else dynamics.threshold
    bias = np.zeros(graph.population(name).shape)
    for part in phase.bias.get(name, ()):
        bias = bias + np.ldexp(graph.tensors[part.tensor].astype(np.float64), part.exponent)
    exponent = max(connection.exponent, 0 if loop is None else loop.exponent)
    while True:
        block = Block(
            population=name,
            shape=graph.population(name).shape,
            weight=_in_steps(connection, exponent),
            bias=np.rint(np.ldexp(bias, -exponent)).astype(np.int64),
            threshold=ceil(firing / 2**exponent) - 1,
            decay=_decay(dynamics.leak),
            exponent=exponent,
            grid=connection.grid,
            recurrent=None if loop is None else _in_steps(loop, exponent),
            lost=_bits_lost(f"into '{name}'", connection, exponent)
            + (() if loop is None else _bits_lost(f"of '{name}' to itself", loop, exponent)),
        )
        if not _too_large(block, message):
            return block
        exponent += 1


def _decay(leak: float) -> int:
    return 0 if leak == 1 else fixed.decay(leak)


def _in_steps(connection: Connection, exponent: int) -> Array:
    """The connection's integers in steps of 2^`exponent`, rounded where they are finer."""
    steps: Array = np.rint(np.ldexp(connection.weight.astype(np.float64), connection.exponent - exponent)).astype(np.int64)
    return steps


def _bits_lost(where: str, connection: Connection, exponent: int) -> tuple[str, ...]:
    finer = exponent - connection.exponent
    if finer <= 0 or not np.any(connection.weight % 2**finer):
        return ()
    return (
        f"the last {'bit' if finer == 1 else f'{finer} bits'} of the weights {where}: coarser steps keep its currents and weights in netx's range",
    )


def _readout(graph: Graph, phase: Phase, name: str, connection: Connection) -> Block:
    """The readout as neurons that never fire, in the finest steps at which its sum of all time steps stays below their threshold, whatever fires before it."""
    leak, population = phase.dynamics[name].leak, graph.population(name)
    bias = np.zeros(population.shape)
    for part in phase.bias.get(name, ()):
        bias = bias + graph.tensors[part.tensor].astype(np.float64) * graph.scale("forward", name)
    exponent = connection.exponent
    while True:
        weight, whole = _in_steps(connection, exponent), np.rint(np.ldexp(bias, -exponent)).astype(np.int64)
        if fixed.leak_sum(leak, phase.time_steps) * (_largest_sum(weight) + int(np.abs(whole).max(initial=0))) < LARGEST:
            break
        exponent += 1
    lost = _bits_lost(f"into '{name}'", connection, exponent)
    return Block(name, population.shape, weight, whole, LARGEST, _decay(leak), exponent, connection.grid, lost=lost)


def _largest_sum(weight: Array) -> int:
    """The largest current that messages of 0 and 1 can make of the weights, of either sign."""
    rows = weight.reshape(len(weight), -1)
    return int(max(np.maximum(rows, 0).sum(axis=1).max(initial=0), np.maximum(-rows, 0).sum(axis=1).max(initial=0)))


def _too_large(block: Block, message: int) -> bool:
    """Whether coarser steps would help: a current can wrap, or a weight, a bias or the threshold is out of range."""
    weights = [weight for weight in (block.weight, block.recurrent) if weight is not None]
    current = message * _largest_sum(block.weight) + (0 if block.recurrent is None else _largest_sum(block.recurrent))
    wide = any(weight.min(initial=0) < WEIGHTS[0] or weight.max(initial=0) > WEIGHTS[1] for weight in weights)
    return wide or current > LARGEST or block.threshold > LARGEST or np.abs(block.bias).max(initial=0) > LARGEST_BIAS


def _problems(block: Block, message: int) -> list[str]:
    """What of a block netx's numbers do not hold in any steps."""
    problems = []
    for what, weight in (("into", block.weight), ("of itself to", block.recurrent)):
        if weight is not None and not weight.any():
            problems.append(
                f"the weights {what} population '{block.population}' are all 0 in netx's steps, and lava-dl's reader divides by the largest"
            )
    if block.threshold < 1:
        problems.append(
            f"the threshold of population '{block.population}' is less than 2 steps of its weights, and netx knows nothing finer"
        )
    return problems


def _lost(graph: Graph, blocks: Sequence[Block], calibration: str = "") -> tuple[str, ...]:
    """What a person who has the file only no longer has, in sentences."""
    phase = graph.phase("forward")
    couples = [block.population for block in blocks[:-1]]
    apart = [name for name in couples if phase.dynamics[name].reset != phase.dynamics[name].threshold]
    thresholds = f"; their threshold lies halfway between ours and the amount we subtract ({', '.join(apart)})" if apart else ""
    if calibration:
        thresholds = f"; their thresholds make populations fire as often as ours on {calibration}"
    lost = [
        f"reset by subtraction: netx neurons are reset to 0 when they fire and forget by how much they passed the threshold{thresholds}"
    ]
    if graph.has_phase("feedback"):
        lost.append("the feedback phase: netx has neither signed spikes nor a second phase, so no implicit gradient runs on the file")
    finest = 15 if graph.of_kind("input")[0].events else 255
    levels = round(graph.scale("forward", phase.order[0]))
    if levels < finest:
        lost.append(f"input levels: messages of 0 to {levels} instead of {finest}, so that no current can wrap at Lava's 24 bit")
    if any(np.any(b.bias) for b in blocks):
        lost.append("fractions of biases: netx has whole steps of the weights")
    if any(block.decay for block in blocks):
        lost.append("the rounding of leaks: netx leaks with 6 more bits")
    lost.append("saturation: netx potentials end at 2^17 steps of the weights, ours at 2^23")
    return (*lost, *(sentence for block in blocks for sentence in block.lost))


# the file


def encoded(made: Chain) -> bytes:
    """The HDF5 file, the same bytes whenever it is made."""
    import h5py

    stream = io.BytesIO()
    with h5py.File(stream, "w", track_order=False) as file:
        for name, value in _attributes(made).items():
            file.attrs[name] = value
        entries: list[dict[str, Any]] = [{"type": np.bytes_("input"), "shape": np.array(made.input_shape)}]
        flat = True  # the first dense block gets flat messages
        for block in made.blocks:
            if block.grid is None and not flat:
                entries.append({"type": np.bytes_("flatten")})
            entries.append(_entry(block))
            flat = block.grid is None
        for number, entry in enumerate(entries):
            _write(file, f"layer/{number}", entry)
    return stream.getvalue()


def _attributes(made: Chain) -> dict[str, Any]:
    """Beside what lava-dl reads: what a person or program must know to run the file."""
    return {
        "toolchain": toolchain.__version__,
        "model": made.graph.provenance.model,
        "approximation": HARD_RESET,
        "lost": np.array([sentence.encode("ascii") for sentence in made.lost]),
        "time_steps": made.time_steps,
        "input_levels": made.levels,
        "input_message_bits": made.message_bits,
        "reset_interval": made.time_steps,
        "reset_offset": RESET_OFFSET,
        "readout": "neuron.v of the last block after time_steps steps of its own: the largest is the answer",
    }


def _entry(block: Block) -> dict[str, Any]:
    neuron = {
        "type": np.bytes_("CUBA"),
        "vThMant": block.threshold,
        "iDecay": 4096,
        "vDecay": block.decay,
        "refDelay": 1,
        "gradedSpike": False,
    }
    if block.grid is None:
        made = {
            "type": np.bytes_(block.type),
            "shape": np.array([prod(block.shape)]),
            "inFeatures": block.weight.shape[1],
            "outFeatures": block.weight.shape[0],
            "bias": block.bias.reshape(-1).astype(np.int32),
        }
    else:
        grid = block.grid
        made = {
            "type": np.bytes_(block.type),
            "shape": np.array(block.shape),
            "inChannels": block.weight.shape[1] * grid.groups,
            "outChannels": block.weight.shape[0],
            "kernelSize": np.array(block.weight.shape[2:]),
            "stride": np.array(grid.stride),
            "padding": np.array(grid.padding),
            "dilation": np.array(grid.dilation),
            "groups": grid.groups,
            "bias": block.bias.transpose(2, 1, 0).astype(np.int32),  # lava-dl takes a bias for each neuron as (width, height, channels)
        }
    made |= {"weight": block.weight.astype(np.int16), "neuron": neuron}
    if block.recurrent is not None:
        made["weight_rec"] = block.recurrent.astype(np.int16)
    return made


def _write(file: Any, path: str, entry: dict[str, Any]) -> None:
    for name, value in entry.items():
        if isinstance(value, dict):
            _write(file, f"{path}/{name}", value)
        else:
            file.create_dataset(f"{path}/{name}", data=value, track_times=False)
