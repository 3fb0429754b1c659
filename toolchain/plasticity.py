"""The local rule by which connections learn on a target: SPIDE's update from the two equilibria (METHODS 3.3), in floats, or in integers rounded at random.

Every connection learns from what arrived at its own two ends, r in the forward phase and q in the feedback phase:

    W <- W - lr * c * P,   P = sum over the batch of q_target r_source^T       (of convolutions: their correlation)

r is the (leak-weighted) sum of what the source sent, q that of the target's gated signed spikes, and c turns both into a_source = r / sum of leaks
and (1/A) m beta, over the scale factor of the loss. A readout has no feedback phase: its q is the output error, softmax - onehot, which the
host works out from the rates on the target and sends to it as a message. A bias learns from q alone.

In floats W takes the change as it is. In integers r and q are whole numbers, so P is exact and the same on every target; W is a mantissa of 8 bits and nothing finer
is kept of it: its change is rounded up or down at random, so that its mean is right (stochastic rounding), and cut at the ends of the range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from toolchain import codec, fixed
from toolchain.errors import GraphError
from toolchain.ir import (
    Array,
    AvgPool2d,
    Conv2d,
    Dense,
    Graph,
    Identity,
    Op,
    Population,
    Scale,
    Synapse,
    adjoint,
    entry_shape,
    exponent_of,
    leak_sum,
    shapes_along,
    weight_of,
)
from toolchain.target import Result

MESSAGE_LEVELS = 2**15
"""An output error of 1 as a graded message."""

TRACE_LEVELS = 2**12
"""Steps of 1.0 of a leaky trace in integer graphs; without leak traces are whole numbers."""

WEIGHTS = fixed.weight_range(8)
BIASES = fixed.CURRENT_MANTISSA


@dataclass(frozen=True)
class Plastic:
    """A tensor that learns.

    number    its place among those of a graph: its own random numbers
    source    population whose messages meet the weights; None for a bias
    ops       of the forward synapse, empty for a bias
    bounds    of its mantissas; None where it is in floats
    worth     change of the stored number, for P = 1 at a learning rate of 1 and a scale factor of 1 (of a readout: a batch of 1)
    step      what a stored 1 is in the model's unit
    sent_leak, post_leak   leak of r and q, a factor for each time step of source and target
    """

    number: int
    tensor: str
    source: str | None
    target: str
    ops: tuple[Op, ...]
    bounds: tuple[int, int] | None
    worth: float
    step: float
    sent_leak: float = 1.0
    post_leak: float = 1.0
    taught: bool = False
    """Whether it is of the readout, and learns from the output error."""

    @property
    def on_host(self) -> bool:
        """A readout's bias is added to the logits by the host, which therefore keeps it, in floats."""
        return self.taught and self.source is None


def plastics(graph: Graph, *, hidden: bool = True, readout: bool = True) -> tuple[Plastic, ...]:
    """Every weight and bias of a graph in hardware time that learns: those of the couples and relays, of the readout, or both. Pools stay as they are.

    GraphError where the host applies a connection, where one has no weight or more than one, or where the feedback phase has integers of its own.
    """
    forward, outputs = graph.phase("forward"), {population.name for population in graph.of_kind("readout")}
    if any(drive.source == "input" for drive in forward.drive):
        raise GraphError("the host applies the first connection, which therefore cannot learn on the target: inject graded input")
    if hidden and not graph.has_phase("feedback"):
        raise GraphError("the graph has no feedback phase, by which hidden connections learn: train the network by a method that has one")
    backward = {
        name for phase in graph.phases if phase.name == "feedback" for s in phase.synapses for op in s.ops if (name := weight_of(op))
    }
    shared = {name for s in forward.synapses for op in s.ops if (name := weight_of(op))}
    if backward - shared:
        raise GraphError(
            f"weight '{min(backward - shared)}' has integers of its own in the feedback phase: a synapse that learns holds one weight for both"
        )
    for synapse in forward.synapses:
        _the_weight(synapse)  # also of those that stay as they are: one process carries both phases, which the weight joins
    found: list[Plastic] = []
    for synapse in forward.synapses:
        if (readout if synapse.target in outputs else hidden) and not _fixed(synapse):
            found.append(_of_synapse(graph, synapse, len(found)))
    for name, biases in forward.bias.items():
        if readout if name in outputs else hidden:
            for bias in biases:
                found.append(_of_bias(graph, name, bias.tensor, len(found)))
    return tuple(found)


def _of_synapse(graph: Graph, synapse: Synapse, number: int) -> Plastic:
    source, target = graph.population(synapse.source), graph.population(synapse.target)
    name = _the_weight(synapse)
    post_leak, sent_leak = _post_leak(graph, target), _sent_leak(graph, source, target)
    area = prod(prod(op.kernel) for op in synapse.ops if isinstance(op, AvgPool2d)) if graph.integer else 1
    step = _step(graph, synapse, name, area)
    worth = _sent_worth(graph, source, sent_leak) * _post_worth(graph, target, post_leak) / area / step
    return Plastic(
        number,
        name,
        source.name,
        target.name,
        synapse.ops,
        WEIGHTS if graph.integer else None,
        worth,
        step,
        sent_leak,
        post_leak,
        target.kind == "readout",
    )


def _of_bias(graph: Graph, name: str, tensor: str, number: int) -> Plastic:
    phase, target = graph.phase("forward"), graph.population(name)
    bias = next(bias for bias in phase.bias[name] if bias.tensor == tensor)
    taught = target.kind == "readout"
    on_chip = graph.integer and not taught
    step = 2.0**bias.exponent / graph.scale("forward", name) if on_chip else 1.0
    post_leak = _post_leak(graph, target)
    worth = _post_worth(graph, target, post_leak) / step  # also where it starts a step late: at the equilibrium that is no difference
    return Plastic(number, tensor, None, name, (), BIASES if on_chip else None, worth, step, 1.0, post_leak, taught)


def _fixed(synapse: Synapse) -> bool:
    """A pool or another connection that has only the factors which folding gave it."""
    weighted = [op for op in synapse.ops if weight_of(op) is not None]
    return bool(weighted) and all(isinstance(op, Scale) for op in weighted)


def _the_weight(synapse: Synapse) -> str:
    names = [name for op in synapse.ops if (name := weight_of(op)) is not None]
    bare = any(isinstance(op, Scale) and op.factor != 1 for op in synapse.ops)
    if len(names) != 1 or bare:
        raise GraphError(
            f"synapse '{synapse.source}' -> '{synapse.target}' has {len(names)} weights: one that learns has exactly one, fold the graph"
        )
    return names[0]


def _step(graph: Graph, synapse: Synapse, name: str, area: int) -> float:
    """What a mantissa of 1 is in the model's unit (see `passes.grids`)."""
    if not graph.integer:
        return 1.0
    exponent = exponent_of(synapse.ops)
    kind = graph.population(synapse.source).kind
    message = 1.0 if kind == "couple" else graph.scale("forward", synapse.source)
    return 2.0**exponent * message * area / graph.scale("forward", synapse.target)


def _sent_leak(graph: Graph, source: Population, target: Population) -> float:
    """The target's leak weights what reaches it; a source's spikes are weighted by its own, which is the same but for a readout without leak."""
    dynamics = graph.phase("forward").dynamics
    leak = dynamics[target.name].leak
    return leak if leak == 1 or source.kind == "input" else dynamics[source.name].leak


def _post_leak(graph: Graph, target: Population) -> float:
    return 1.0 if target.kind == "readout" else graph.phase("feedback").dynamics[target.name].leak


def _levels(leak: float, integer: bool) -> float:
    return TRACE_LEVELS if integer and leak != 1 else 1.0


def _sent_worth(graph: Graph, source: Population, leak: float) -> float:
    """1.0 of r in spikes per step, or in the model's unit."""
    unit = 1.0 if source.kind == "couple" else graph.scale("forward", source.name)
    if source.kind == "input" and not graph.integer:
        unit = 1.0
    return 1 / (leak_sum(leak, graph.phase("forward").time_steps) * unit * _levels(leak, graph.integer))


def _post_worth(graph: Graph, target: Population, leak: float) -> float:
    """1.0 of q in d(scale factor * loss)/d(mean current) in the model's unit: (1/A) Ab / sum of leaks."""
    if target.kind == "readout":
        return 1 / MESSAGE_LEVELS if graph.integer else 1.0
    mean = 1 / (leak_sum(leak, graph.phase("feedback").time_steps) * _levels(leak, graph.integer))
    if target.kind == "linear":
        return mean / graph.scale("feedback", target.name)
    return mean * codec.amplitude(graph, "feedback", target.name) / codec.amplitude(graph, "forward", target.name)


def whole(trace: Array, leak: float, *, integer: bool) -> Array:
    """A trace as the rule takes it: in integer graphs whole numbers, of which a leaky one has `TRACE_LEVELS` in 1.0."""
    return np.rint(trace * _levels(leak, True)).astype(np.int64) if integer else np.asarray(trace, np.float64)


def error_message(graph: Graph, forward: Result, labels: Array) -> Array:
    """softmax - onehot of each sample, (samples, classes), as it is sent to the readout: float64, or whole numbers of `MESSAGE_LEVELS`."""
    error = codec.logit_error(graph, forward, labels) * len(labels)
    return np.rint(error * MESSAGE_LEVELS).astype(np.int64) if graph.integer else error


def sent(graph: Graph, plastic: Plastic, forward: Result, encoded: Array) -> Array:
    """r of what a source sent in the forward phase, (samples, *shape), from what a target recorded; `encoded` is what the input emits."""
    assert plastic.source is not None
    population = graph.population(plastic.source)
    if population.kind != "input":
        return whole(_trace(forward, plastic.source, plastic.sent_leak), plastic.sent_leak, integer=graph.integer)
    steps = graph.phase("forward").time_steps
    total = np.zeros((len(encoded), *population.shape))
    for step in range(steps):
        total = total * plastic.sent_leak + (encoded[..., step] if population.events else encoded)
    return whole(total, plastic.sent_leak, integer=graph.integer)


def post(graph: Graph, plastic: Plastic, forward: Result, feedback: Result | None, message: Array) -> Array:
    """q of a target, (samples, *shape): its gated spikes of the feedback phase, or the output error."""
    if plastic.taught:
        return message
    assert feedback is not None
    found = whole(_trace(feedback, plastic.target, plastic.post_leak), plastic.post_leak, integer=graph.integer)
    return found * codec.mask(graph, forward, plastic.target) if graph.population(plastic.target).kind == "couple" else found


def _trace(result: Result, name: str, leak: float) -> Array:
    return result.counts[name] if leak == 1 else result.traces[name]


def correlation(graph: Graph, plastic: Plastic, r: Array, q: Array) -> Array:
    """P, of the tensor's shape: d<q, ops(r)>/dW; exact in integers. `r` (batch, *source shape) and `q` (batch, *target shape)."""
    shape = graph.population(plastic.target).shape
    q = q.reshape(len(q), *shape)
    if plastic.source is None:
        return np.asarray(q.sum(axis=0))
    source, tensors, integer = graph.population(plastic.source).shape, graph.tensors, graph.integer
    r = r.reshape(len(r), *source)
    at = next(i for i, op in enumerate(plastic.ops) if weight_of(op) is not None)
    before, op, behind = plastic.ops[:at], plastic.ops[at], plastic.ops[at + 1 :]
    into, made = [entry_shape(plastic.ops, source, shape, tensors), *shapes_along(plastic.ops, source, shape, tensors)][at : at + 2]
    r = fixed.apply(before, tensors, r, into, integer=integer) if before else r.reshape(len(r), *into)
    q = fixed.apply(adjoint(behind), tensors, q, made, integer=integer) if behind else q.reshape(len(q), *made)
    return _met(op, tensors, r, q).reshape(tensors[plastic.tensor].shape)


def _met(op: Op, tensors: Mapping[str, Array], r: Array, q: Array) -> Array:
    """d<q, op(r)>/dW of one operation; a transposed one has the roles of its ends exchanged."""
    if getattr(op, "transpose", False):
        r, q = q, r
    if isinstance(op, Dense):
        return fixed.product(q.reshape(len(q), -1).T, r.reshape(len(r), -1))
    if isinstance(op, Scale):
        return np.asarray((q * r).sum(axis=(0, *range(2, r.ndim))))
    assert not isinstance(op, (Identity, AvgPool2d))
    gathers = isinstance(op, Conv2d)
    values, windows = (q, r) if gathers else (r, q)  # one value a window, and the image that the windows lie in
    kernel = tensors[str(weight_of(op))].shape[2:]
    grid = fixed.Grid(op.stride, op.padding, op.dilation, op.groups)  # type: ignore[union-attr]  # a convolution of either kind
    return fixed.window_products(values, windows, kernel, grid)


def rate(plastic: Plastic, lr: float, scale_factor: float, samples: int) -> float:
    """What P is multiplied by: of hidden connections the scale factor is taken out again, of the readout the mean over the batch is made here."""
    return lr * plastic.worth / (samples if plastic.taught else scale_factor)


def changed(plastic: Plastic, values: Array, product: Array, factor: float, seed: int, update: int) -> Array:
    """`values` after an update, -factor * P; mantissas are rounded at random, by numbers that seed, tensor and update number give, and cut at their bounds."""
    with np.errstate(over="ignore"):  # a loss that is no number is said, and mantissas have bounds
        change = -factor * product.astype(np.float64)
    if plastic.bounds is None:
        return np.asarray(values + change)
    chance = np.random.Generator(np.random.Philox(key=[seed, plastic.number], counter=[0, 0, 0, update]))
    steps = np.floor(change + chance.random(values.shape))
    kept: Array = np.clip(values + steps, *plastic.bounds).astype(np.int64)
    return kept


def in_floats(plastic: Plastic, values: Array) -> npt.NDArray[np.float64]:
    """Stored numbers in the model's unit."""
    return np.asarray(values, np.float64) * plastic.step


def with_tensors(graph: Graph, tensors: Mapping[str, Array]) -> Graph:
    """`graph` with other numbers in some tensors, in the types it has."""
    import msgspec

    from toolchain.ir import frozen

    return msgspec.structs.replace(
        graph, tensors={**graph.tensors, **{name: frozen(v, graph.tensors[name].dtype) for name, v in tensors.items()}}
    )
