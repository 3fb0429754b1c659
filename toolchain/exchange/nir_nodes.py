"""A graph's forward phase as nodes and edges of NIR (Pedersen et al., Nature Communications 2024), and where in them its tensors lie.

    input          Input; in integer graphs then a Scale by the number of levels that stand for 1
    couple         IF, or LIF where it leaks: tau = dt / (1 - leak), r = tau / dt, so that an Euler step of dt is the leak and a whole current
    readout        I or LI, the same without a threshold
    linear relay   Scale by 1
    connection     Flatten, Affine or Linear, Conv2d, AvgPool2d (in integer graphs SumPool2d), Scale
    feedback       its connection, then a Delay of dt for each model step: loops are cycles
    host's current its connection, then a Scale by 2^-shift

Weights are the graph's: in integer graphs mantissas times 2^exponent. What a node cannot say is a JSON object in its metadata under the name `fsnn`: of neurons the members, the
amount that a spike subtracts, whether numbers are integers (24 bit, leaks rounded towards zero), and a bias without a node of its own beside it as an array. NIR's neurons fire above their
threshold, ours at it, so a node's is the largest number below ours.

Nodes are numbered in an order in which every node follows those that it needs within the same step: HDF5 sorts by name, and readers take nodes in that order.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Any, Union

import msgspec
import numpy as np

from toolchain.errors import DesignRuleError
from toolchain.exchange.nir_places import Place
from toolchain.ir import (
    Array,
    AvgPool2d,
    Bias,
    Conv2d,
    Dense,
    Drive,
    Graph,
    Identity,
    Op,
    Phase,
    Population,
    Scale,
    Shape,
    Synapse,
    Upsample,
    exponent_of,
    shapes_along,
    weight_of,
)

if TYPE_CHECKING:
    import nir

DT = 1e-4
"""Seconds of a model step in the files' time constants, as snnTorch and SpikingJelly have it."""

KEY = "fsnn"
"""The name of our entry in a node's and in a file's metadata."""


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a node's metadata say. `kind` is couple, readout, linear or input (with its `population`), `levels` and `host` for the rounding of inputs and of the host's current,
    `delay` (`steps`, and whether it closes a `loop`, so that a reader that goes from node to node meets it after its target), or `logits` for a connection whose bias the host adds to the logits. `starts` are the steps at which the arrays `bias0`, `bias1`, ... begin to act."""

    kind: str
    population: str = ""
    integer: bool = False
    threshold: Union[int, float] = 0
    reset: Union[int, float] = 0
    leak: float = 1.0
    members: str = ""
    levels: int = 0
    events: bool = False
    shift: int = 0
    exponent: int = 0
    steps: int = 0
    loop: bool = False
    starts: tuple[int, ...] = ()


class Sheet:
    """The nodes of one graph: `nodes` and `edges` as `nir.NIRGraph` takes them, `places` of the tensors that nodes hold, and what readers of NIR's own nodes `lost`."""

    def __init__(self) -> None:
        self.nodes: dict[str, nir.NIRNode] = {}
        self.edges: list[tuple[str, str]] = []
        self.places: dict[str, Place] = {}
        self.lost: list[str] = []

    def add(self, what: str, node: nir.NIRNode, *sources: str) -> str:
        name = f"n{len(self.nodes):04d}_{''.join(c if c.isalnum() else '_' for c in what)}"
        self.nodes[name] = node
        for source in sources:
            self.join(source, name)
        return name

    def join(self, source: str, target: str) -> None:
        self.edges.append((source, target))


def draw(graph: Graph) -> Sheet:
    """The forward phase of `graph` as NIR nodes; DesignRuleError, with every reason, where a node cannot say what a connection does."""
    return Writer(graph).sheet()


def problems(graph: Graph) -> list[str]:
    """What of the forward phase NIR has no nodes for, one sentence each."""
    phase = graph.phase("forward")
    found = []
    for source, target, ops in _connections(graph):
        where = f"connection '{source}' -> '{target}'"
        found += [f"{where} {reason}" for op in ops if (reason := _unknown(op, graph.tensors)) is not None]
        shape = graph.population(target).shape
        if any(isinstance(op, Dense) for op in ops) and len(shape) > 1:
            found.append(f"{where} makes an image {shape} of rows of values, and NIR has no node that folds rows into images")
    for synapse in phase.synapses:
        if steps_late(phase, synapse) < 0:
            found.append(
                f"connection '{synapse.source}' -> '{synapse.target}' runs ahead of the model step in pipelined timing: compile with --timing exact"
            )
    readout = graph.of_kind("readout")[0].name
    reaching = {name for name in phase.order if readout in _reached(phase, name)}
    found += [
        f"population '{name}' leads nowhere, and in NIR all that leads nowhere is an output" for name in phase.order if name not in reaching
    ]
    driven = {drive.population for drive in phase.drive} | {s.target for s in phase.synapses} | {p.name for p in graph.of_kind("input")}
    found += [
        f"nothing reaches population '{name}', and in NIR all that nothing reaches is an input"
        for name in phase.order
        if name not in driven
    ]
    order = update_order(phase)
    for name in order:
        sources = [s.source for s in phase.synapses if s.target == name]
        closing = [source for source in sources if order.index(source) >= order.index(name)]
        if len(sources) == len(closing) == 1 and not any(drive.population == name for drive in phase.drive):
            found.append(
                f"population '{name}' is reached by one feedback connection only, and readers of NIR's loops find no node to begin with"
            )
    return found


def update_order(phase: Phase) -> list[str]:
    """The phase's populations, each behind those that it needs within the same step, and behind those whose delayed spikes reach it without a loop."""
    ahead: dict[str, set[str]] = {name: set() for name in phase.order}
    reached = {name: _reached(phase, name) for name in phase.order}
    for synapse in phase.synapses:
        if steps_late(phase, synapse) == 0 or synapse.source not in reached[synapse.target]:
            ahead[synapse.target].add(synapse.source)
    found: list[str] = []
    while len(found) < len(phase.order):
        found.append(next(name for name in phase.order if name not in found and ahead[name] <= set(found)))
    return found


def _reached(phase: Phase, name: str) -> set[str]:
    """The populations that `name` reaches, itself included."""
    found, fresh = {name}, [name]
    while fresh:
        targets = {s.target for s in phase.synapses if s.source == fresh[0]} - found
        found |= targets
        fresh = [*fresh[1:], *targets]
    return found


def _connections(graph: Graph) -> list[tuple[str, str, tuple[Op, ...]]]:
    phase = graph.phase("forward")
    inputs = graph.of_kind("input")[0].name
    drives = [(inputs, drive.population, drive.ops) for drive in phase.drive]
    return [*drives, *((s.source, s.target, s.ops) for s in phase.synapses)]


def _unknown(op: Op, tensors: Mapping[str, Array]) -> str | None:
    if getattr(op, "transpose", False):
        return f"applies a transposed {type(op).__name__}, which NIR does not have"
    if isinstance(op, (Dense, AvgPool2d, Scale, Identity)):
        return None
    if isinstance(op, Conv2d):
        kernel = tensors[op.weight].shape[2:]
        square = kernel[0] == kernel[1]
        return None if square else f"has a kernel of {kernel[0]} x {kernel[1]}, and nir works out the images of square ones only"
    name = "an upsampling" if isinstance(op, Upsample) else "a transposed convolution"
    return f"has {name}, which NIR does not have"


def steps_late(phase: Phase, synapse: Synapse) -> int:
    """By how many model steps a synapse's spikes are late, whatever the graph's timing."""
    start, period = phase.timing.start, phase.timing.period
    return ceil((start.get(synapse.source, 0) + synapse.delay - start.get(synapse.target, 0)) / period)


class Writer:
    """Draws one graph; `nir_stock` overrides what readers of NIR's own nodes need otherwise."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.phase = graph.phase("forward")
        self.made = Sheet()
        self.placed: set[str] = set()  # biases that have their place, as POPULATION:START
        self.direct: set[tuple[str, str]] = set()  # ends of connections without a node

    def sheet(self) -> Sheet:
        import nir

        found = problems(self.graph)
        if found:
            raise DesignRuleError(
                f"'{self.graph.provenance.model}' cannot be written as NIR: {'; '.join(found)}; give its .fsnn file away, which carries all of it"
            )
        (entry,) = self.graph.of_kind("input")
        levels = round(self.graph.scale("forward", entry.name)) if self.graph.integer else 0
        inputs = self.made.add(entry.name, nir.Input(np.array(entry.shape), metadata=noted(Note("input", entry.name, events=entry.events))))
        if levels:
            about = noted(Note("levels", entry.name, levels=levels))
            inputs = self.made.add("levels", nir.Scale(np.full(entry.shape, levels, np.float32), metadata=about), inputs)
            self.made.lost.append(f"inputs are whole numbers 0 to {levels}, which the host makes of [0, 1]")
        ends = {entry.name: inputs}
        late: dict[str, list[str]] = {}
        order = update_order(self.phase)
        for name in order:
            if name == entry.name:
                continue
            population = self.graph.population(name)
            arriving = [self._drive(drive, inputs) for drive in self.phase.drive if drive.population == name]
            same_step = [s for s in self.phase.synapses if s.target == name and steps_late(self.phase, s) == 0]
            arriving += [self._synapse(synapse, ends[synapse.source]) for synapse in same_step]
            arriving = self.settled(population, arriving)
            ends[name] = self.population(population)
            for node in arriving:
                self.made.join(node, ends[name])
            for node in late.pop(name, []):
                self.made.join(node, ends[name])
            for synapse in self.phase.synapses:
                if synapse.source == name and steps_late(self.phase, synapse) > 0:
                    node = self.delayed(synapse, ends[name], loop=synapse.target in ends)
                    if synapse.target in ends:
                        self.made.join(node, ends[synapse.target])
                    else:
                        late.setdefault(synapse.target, []).append(node)
        self.finish(ends)
        return self.made

    def settled(self, population: Population, arriving: list[str]) -> list[str]:
        """The nodes that join a population, of those that its connections within the step end with."""
        return arriving

    def finish(self, ends: Mapping[str, str]) -> None:
        import nir

        readout = self.graph.of_kind("readout")[0]
        self.made.add("logits", nir.Output(np.array(readout.shape)), ends[readout.name])
        self._keep_biases(ends)

    # connections

    def _synapse(self, synapse: Synapse, source: str) -> str:
        start = 0 if steps_late(self.phase, synapse) == 0 else 1
        bias = self._bias_for(synapse.target, start)
        logits = self.graph.population(synapse.target).kind == "readout"
        return self._chain(synapse.ops, synapse.source, synapse.target, source, bias, logits=logits)

    def delayed(self, synapse: Synapse, source: str, *, loop: bool) -> str:
        import nir

        steps = steps_late(self.phase, synapse)
        bias = self._bias_for(synapse.target, 1) if steps == 1 else None
        node = self._chain(synapse.ops, synapse.source, synapse.target, source, bias)
        shape = self.graph.population(synapse.target).shape
        about = noted(Note("delay", steps=steps, loop=loop))
        return self.made.add("delay", nir.Delay(np.full(shape, steps * DT), metadata=about), node)

    def _drive(self, drive: Drive, source: str) -> str:
        import nir

        if drive.source != "input":
            raise DesignRuleError(
                f"population '{drive.population}' is driven by the {drive.source} in the forward phase, which NIR has no node for"
            )
        entry = self.graph.of_kind("input")[0].name
        bias = None if drive.bias is None else _Wanted(drive.bias, self.graph.tensors[drive.bias].astype(np.float64), 0)
        node = self._chain(drive.ops, entry, drive.population, source, bias)
        placed = drive.bias is None or drive.bias in self.made.places
        if placed and not self.graph.integer:
            return node
        about = Note(
            "host", drive.population, self.graph.integer, shift=drive.shift, exponent=drive.exponent, starts=() if placed else (0,)
        )
        metadata = noted(about)
        shape = self.graph.population(drive.population).shape
        name = self.made.add("host", nir.Scale(np.full(shape, 2.0**-drive.shift), metadata=metadata), node)
        if bias is not None and not placed:
            metadata["bias0"] = narrow(bias.values)
            self.made.places[bias.tensor] = self.place(name, "bias0", bias.tensor)
            self.made.lost.append(
                f"the bias of '{drive.population}' differs within a channel, which no node says: it is in the metadata of node '{name}'"
            )
        if self.graph.integer:
            self.made.lost.append(f"the current of '{drive.population}' is rounded to 13 bits and an exponent of {drive.exponent}")
        return name

    def _bias_for(self, population: str, start: int) -> _Wanted | None:
        """The bias of a population that begins at `start`, where no connection has it yet."""
        fitting = [b for b in self.phase.bias.get(population, ()) if b.start == start]
        if len(fitting) != 1 or f"{population}:{start}" in self.placed:
            return None
        return _Wanted(fitting[0].tensor, self._current(population, fitting[0]), fitting[0].exponent, f"{population}:{start}")

    def _current(self, population: str, bias: Bias) -> Array:
        """A bias in graph units; that of a readout, which the host adds to the logits, as a current of each step, whose sum it is."""
        values = self.graph.tensors[bias.tensor].astype(np.float64)
        if self.graph.population(population).kind == "readout":
            return np.asarray(values * self.graph.scale("forward", population))
        return np.ldexp(values, bias.exponent) if self.graph.integer else values

    def _chain(self, ops: tuple[Op, ...], source: str, target: str, node: str, bias: _Wanted | None, *, logits: bool = False) -> str:
        """The nodes of one connection, joined to `node`; the last one's name."""
        import nir

        start, end = self.graph.population(source).shape, self.graph.population(target).shape
        shapes = (start, *shapes_along(ops, start, end, self.graph.tensors))
        what = f"{source}_{target}"
        last = max((i for i, op in enumerate(ops) if not _passes(op)), default=-1)
        shift = exponent_of(ops)
        # the whole shift of the connection, which is that of all its operations, goes into one node
        carrier = max((i for i, op in enumerate(ops) if weight_of(op) is not None), default=-1)
        carrier = max((i for i, op in enumerate(ops) if isinstance(op, Scale)), default=-1) if carrier < 0 else carrier
        entered = node
        for index, (op, taken, made) in enumerate(zip(ops, shapes, shapes[1:], strict=False)):
            exponent = shift if index == carrier else 0
            if _passes(op) and not exponent:
                continue
            own = bias if bias is not None and index == last and bias.fits(op, made, end) else None
            about = noted(Note("logits")) if logits and own is not None else {}
            if isinstance(op, Dense):
                if len(taken) > 1:
                    node = self.made.add(what, nir.Flatten({"input": np.array(taken)}, 0, -1), node)
                weight = self.weight(op.weight, exponent)
                made_node = nir.Linear(weight) if own is None else nir.Affine(weight, narrow(own.values.reshape(-1)), metadata=about)
                node = self._placed(self.made.add(what, made_node, node), op.weight, exponent, own)
            elif isinstance(op, Conv2d):
                weight = _ungrouped(self.weight(op.weight, exponent), op.groups)
                values = np.zeros(made[0]) if own is None else own.values.reshape(made[0], -1)[:, 0]
                conv = nir.Conv2d(
                    input_shape=(taken[1], taken[2]),
                    weight=weight,
                    stride=op.stride,
                    padding=op.padding,
                    dilation=op.dilation,
                    groups=1,
                    bias=narrow(values),
                    metadata=about,
                )
                node = self._placed(self.made.add(what, conv, node), op.weight, exponent, own, groups=op.groups)
            elif isinstance(op, AvgPool2d):
                kind = nir.SumPool2d if self.graph.integer else nir.AvgPool2d
                node = self.made.add(what, kind(np.array(op.kernel), np.array(op.stride), np.array(op.padding)), node)
            elif isinstance(op, Scale):
                node = self.scale(op, taken, what, node, exponent)
        if len(shapes[-1]) > len(end):
            node = self.made.add(what, nir.Flatten({"input": np.array(shapes[-1])}, 0, -1), node)
        if node == entered and (source, target) in self.direct:  # NIR has one edge from a node to another
            node = self.made.add(what, nir.Scale(np.ones(start, np.float32)), node)
        if node == entered:
            self.direct.add((source, target))
        return node

    def _placed(self, node: str, weight: str, exponent: int, bias: _Wanted | None, groups: int = 1) -> str:
        """Remember where a weight and the bias beside it lie."""
        form = "groups" if groups > 1 else "same"
        self.made.places.setdefault(weight, self.place(node, "weight", weight, form=form, exponent=exponent, groups=groups))
        if bias is not None:
            whole = self.graph.tensors[bias.tensor].size == self.made.nodes[node].bias.size
            form = "same" if whole else "spread"
            self.made.places.setdefault(bias.tensor, self.place(node, "bias", bias.tensor, form=form, exponent=bias.exponent))
            self.placed.add(bias.key)
        return node

    def scale(self, op: Scale, shape: Shape, what: str, node: str, exponent: int) -> str:
        import nir

        if op.weight is None:
            return self.made.add(what, nir.Scale(narrow(np.full(shape, op.factor * 2.0**exponent))), node)
        if op.factor != 1:
            node = self.made.add(what, nir.Scale(narrow(np.full(shape, op.factor))), node)
        factors = self.weight(op.weight, exponent)
        spread = np.broadcast_to(factors.reshape(-1, *[1] * (len(shape) - 1)), shape).copy()
        name = self.made.add(what, nir.Scale(spread), node)
        self.made.places.setdefault(op.weight, self.place(name, "scale", op.weight, form="channels", exponent=exponent))
        return name

    def weight(self, name: str, exponent: int) -> Array:
        return narrow(np.ldexp(self.graph.tensors[name].astype(np.float64), exponent))

    def place(self, node: str, field: str, tensor: str, **how: Any) -> Place:
        values = self.graph.tensors[tensor]
        return Place(node, field, values.dtype.str, values.shape, **how)

    # populations

    def population(self, population: Population) -> str:
        import nir

        dynamics = self.phase.dynamics[population.name]
        shape, integer = population.shape, self.graph.integer
        metadata = noted(
            Note(population.kind, population.name, integer, dynamics.threshold, dynamics.reset, dynamics.leak, dynamics.members)
        )
        tau = None if dynamics.leak == 1 else DT / (1 - dynamics.leak)
        r = np.full(shape, 1 / DT if tau is None else tau / DT)
        zeros = np.zeros(shape)
        node: nir.NIRNode
        if population.kind == "linear":
            node = nir.Scale(np.ones(shape, np.float32), metadata=metadata)
        elif population.kind == "readout":
            node = nir.I(r, metadata=metadata) if tau is None else nir.LI(np.full(shape, tau), r, zeros, metadata=metadata)
        else:
            below = np.full(shape, np.nextafter(float(dynamics.threshold), -np.inf))
            if tau is None:
                node = nir.IF(r, below, zeros, metadata=metadata)
            else:
                node = nir.LIF(np.full(shape, tau), r, zeros, below, zeros, metadata=metadata)
        return self.made.add(population.name, node)

    def _keep_biases(self, ends: Mapping[str, str]) -> None:
        """Biases that no connection has room for go to their neurons."""
        for name, biases in self.phase.bias.items():
            left = [bias for bias in biases if f"{name}:{bias.start}" not in self.placed]
            if not left:
                continue
            metadata = self.made.nodes[ends[name]].metadata
            note = msgspec.json.decode(metadata[KEY], type=Note)
            if note.kind != "readout":  # whose bias the host adds to the logits
                metadata |= noted(msgspec.structs.replace(note, starts=tuple(bias.start for bias in left)))
            for index, bias in enumerate(left):
                metadata[f"bias{index}"] = narrow(self._current(name, bias))
                self.made.places.setdefault(bias.tensor, self.place(ends[name], f"bias{index}", bias.tensor, exponent=bias.exponent))
            self.made.lost.append(f"a bias of '{name}' fits no node of its connections: it is in the metadata of node '{ends[name]}'")


class _Wanted:
    """A bias that looks for a node: its tensor, its values in graph units (target's shape), the exponent that made them, and its key."""

    def __init__(self, tensor: str, values: Array, exponent: int, key: str = "") -> None:
        self.tensor, self.values, self.exponent, self.key = tensor, values, exponent, key

    def fits(self, op: Op, made: Shape, target: Shape) -> bool:
        """Whether a node of `op` holds it: one value a row, or one a channel."""
        if isinstance(op, Dense):
            return True
        by_channel = self.values.reshape(made[0], -1) if isinstance(op, Conv2d) else self.values
        return isinstance(op, Conv2d) and bool((by_channel == by_channel[:, :1]).all())


def _passes(op: Op) -> bool:
    """Whether an operation changes nothing."""
    return isinstance(op, Identity) or (isinstance(op, Scale) and op.weight is None and op.factor == 1)


def noted(note: Note) -> dict[str, Any]:
    return {KEY: msgspec.json.encode(note).decode()}


def narrow(values: Array) -> Array:
    """float32 where it holds every value, else float64."""
    single = values.astype(np.float32)
    return single if np.array_equal(single.astype(np.float64), values) else np.asarray(values, np.float64)


def _ungrouped(weight: Array, groups: int) -> Array:
    """The kernel of a convolution in groups as one without: nir takes the channels of an image from the kernel's second axis."""
    if groups == 1:
        return weight
    out, into = weight.shape[:2]
    whole = np.zeros((out, into * groups, *weight.shape[2:]), weight.dtype)
    for group in range(groups):
        rows = slice(group * out // groups, (group + 1) * out // groups)
        whole[rows, group * into : (group + 1) * into] = weight[rows]
    return whole
