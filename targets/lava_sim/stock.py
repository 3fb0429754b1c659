"""Lava's own synapse processes (`lava.proc`) for the connections of a graph, and what they cannot carry.

A dense connection is a Dense; a convolution is a Conv; every other operation, and every composition, is a Sparse with the matrix of the whole. A delay above
one tick takes DelayDense or DelaySparse; Lava has no Conv with a delay. What Lava 0.10's models do to numbers decides the rest (fixed point):

- Dense and Sparse force weights of both signs to even numbers in -256..254. So they get twice the weight and one exponent less; at exponent 0 that is a right
  shift of an even sum, which is exact.
- Weights beyond -128..127 (a pool behind a convolution adds several up) are split into digits: w = sum of d_k 128^k, each with the sign of w and below 128, one
  process a digit with 7 more of weight exponent for each, all into the same port. A chip's exponents end at 7; the simulation has no end.
- Dense and Sparse add, shift and send in 32 bit. No digit's sum is larger than the whole's, so a bound on the whole is enough.
- Conv has no exponent and cuts no weight, but what it sends wraps at 24 bit, and its kernel's sizes and groups are held in 8 bit. Beyond either, a Sparse carries the convolution.
- Spikes of a process without message bits count as 0 and 1. Signed and graded ones need bits. Sparse always gets some: without, it picks columns anew at every tick,
  which takes many times as long as the product.

Floating point has none of these limits; a merged matrix rounds as its own products do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from toolchain.fixed import Grid, largest_constant
from toolchain.ir import (
    POTENTIAL_LIMIT,
    Array,
    AvgPool2d,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Graph,
    Identity,
    Op,
    Phase,
    Scale,
    Shape,
    Synapse,
    Upsample,
    entry_shape,
    exponent_of,
    largest_rows,
    largest_sum,
    shapes_along,
    weight_of,
)

if TYPE_CHECKING:
    from lava.magma.core.process.ports.ports import InPort, OutPort
    from lava.magma.core.process.process import AbstractProcess

DIGIT_BITS = 7
"""A weight has 8 bits, its sign among them."""

SUM_LIMIT = 2**31
"""Dense and Sparse add, shift and send int32."""

CONV_LIMIT = 2**23
"""Conv sends 24 bit."""

SIZE_LIMIT = 127
"""Conv keeps kernel, stride, padding, dilation and groups as int8."""

DELAY_LIMIT = 64
"""Ticks: 6 bits, and the tick that every connection takes."""

MATRIX_LIMIT = 2**25
"""Most weights of one Sparse: a quarter of a GiB, of which Lava makes several copies."""


@dataclass(frozen=True)
class Convolution:
    """What Lava's Conv can carry: weight (out, in / groups, kh, kw), and the images before and behind it."""

    weight: Array
    grid: Grid
    before: Shape
    after: Shape


class Stock:
    """How the connections of one phase become processes of Lava's own; `sparse` takes a Sparse for all of them."""

    def __init__(self, graph: Graph, phase: Phase, *, sparse: bool = False) -> None:
        self._graph, self._phase, self._sparse = graph, phase, sparse
        self._currents = _largest_currents(graph, phase) if graph.integer else {}

    def problems(self) -> list[str]:
        """A sentence for every connection that Lava's processes cannot carry exactly."""
        return [problem for synapse in self._phase.synapses for problem in self._problems_of(synapse)]

    def joined(self, synapse: Synapse, name: str, source: OutPort, target: InPort) -> list[AbstractProcess]:
        """The processes of `synapse`, which are called `name`, connected to its two populations."""
        convolution = self._convolution(synapse)
        if convolution is not None:
            return [self._conv(synapse, name, convolution, source, target)]
        made = [self._product(synapse, *piece) for piece in self._pieces(synapse, name)]
        for process in made:
            source.connect(process.s_in)
            process.a_out.connect(target)
        return made

    def _problems_of(self, synapse: Synapse) -> list[str]:
        where = f"synapse '{synapse.source}' -> '{synapse.target}' in phase '{self._phase.name}'"
        if self._convolution(synapse) is not None:
            return []
        problems = []
        weights = self._most_weights(synapse)
        if weights > MATRIX_LIMIT:
            problems.append(f"{where} is a matrix of up to {weights:,} weights, too many for Lava's stock synapses: use synapses own")
        if not self._graph.integer:
            return problems
        if synapse.delay > DELAY_LIMIT:
            problems.append(
                f"{where} takes {synapse.delay} ticks, and Lava's stock synapses at most {DELAY_LIMIT}: use synapses own, or timing pipelined"
            )
        shift = exponent_of(synapse.ops)
        current = self._currents[synapse]
        if max(2 * current >> shift, current) >= SUM_LIMIT:
            problems.append(
                f"{where} can reach sums beyond the 32 bits of Lava's stock synapses: use synapses own, or lower the weights or the graded values"
            )
        return problems

    def _shapes(self, synapse: Synapse) -> tuple[Shape, ...]:
        """The images before, between and behind the operations."""
        tensors = self._graph.tensors
        source, target = (self._graph.population(name).shape for name in (synapse.source, synapse.target))
        return entry_shape(synapse.ops, source, target, tensors), *shapes_along(synapse.ops, source, target, tensors)

    def _convolution(self, synapse: Synapse) -> Convolution | None:
        """The connection as one convolution that Lava's Conv computes exactly, if it is one."""
        ops = [(op, i) for i, op in enumerate(synapse.ops) if not isinstance(op, Identity)]
        if self._sparse or synapse.delay != 1 or len(ops) != 1:
            return None
        ((op, place),) = ops
        if not isinstance(op, (Conv2d, ConvTranspose2d)) or isinstance(op, Conv2d) == op.transpose:
            return None
        shapes = self._shapes(synapse)
        weight, grid = self._graph.tensors[op.weight], Grid(op.stride, op.padding, op.dilation, op.groups)
        made = Convolution(weight, grid, shapes[place], shapes[place + 1])
        if not _fits_conv(made) or (self._graph.integer and self._currents[synapse] >= CONV_LIMIT):
            return None
        if self._graph.integer:
            return Convolution(np.left_shift(weight.astype(np.int32), op.exponent), grid, made.before, made.after)
        return made

    def _conv(self, synapse: Synapse, name: str, made: Convolution, source: OutPort, target: InPort) -> AbstractProcess:
        """Lava's Conv flips its kernels and puts channels last."""
        from lava.proc.conv.process import Conv

        (height, width), kernel = made.before[1:], made.weight[:, :, ::-1, ::-1].transpose(0, 2, 3, 1)
        process = Conv(
            weight=np.ascontiguousarray(kernel),
            input_shape=(height, width, made.before[0]),
            stride=made.grid.stride,
            padding=made.grid.padding,
            dilation=made.grid.dilation,
            groups=made.grid.groups,
            num_message_bits=self._message_bits(synapse),
            name=name,
        )
        source.reshape(made.before).transpose((1, 2, 0)).connect(process.s_in)
        process.a_out.transpose((2, 0, 1)).reshape((prod(made.after),)).connect(target)
        return process

    def _pieces(self, synapse: Synapse, name: str) -> list[tuple[Any, int, str]]:
        """The matrix, a NumPy array for a Dense or a SciPy one for a Sparse, as digits, each with its exponent and its process's name."""
        dense = [op for op in synapse.ops if not isinstance(op, Identity)]
        if len(dense) == 1 and isinstance(dense[0], Dense) and not self._sparse:
            weight = self._graph.tensors[dense[0].weight]
            matrix = weight.T if dense[0].transpose else weight
        else:
            matrix = composed(self._graph, synapse.ops, self._shapes(synapse))
        if not self._graph.integer:
            return [(matrix.astype(np.float64), 0, name)]
        exponent = exponent_of(synapse.ops)
        parts = digits(matrix)
        names = [name] if len(parts) == 1 else [f"{name}, digit {i + 1} of {len(parts)}" for i in range(len(parts))]
        return [(part, exponent + DIGIT_BITS * i, made) for i, (part, made) in enumerate(zip(parts, names, strict=True))]

    def _product(self, synapse: Synapse, matrix: Any, exponent: int, name: str) -> AbstractProcess:
        """Lava's Dense or Sparse, with a delay where it has one."""
        from lava.proc.dense.process import DelayDense
        from lava.proc.dense.process import Dense as LavaDense
        from lava.proc.sparse.process import DelaySparse, Sparse
        from lava.utils.weightutils import SignMode

        sparse = not isinstance(matrix, np.ndarray)
        options: dict[str, Any] = {"weights": matrix, "num_message_bits": self._message_bits(synapse, sparse=sparse), "name": name}
        if self._graph.integer:
            options |= {"weights": 2 * matrix.astype(np.int32), "weight_exp": exponent - 1, "sign_mode": SignMode.MIXED}
        if synapse.delay == 1:
            return Sparse(**options) if sparse else LavaDense(**options)
        extra = synapse.delay - 1
        if not sparse:
            return DelayDense(delays=np.full(matrix.shape, extra), **options)
        delays = matrix.astype(np.int64)
        delays.data[:] = extra
        return DelaySparse(delays=delays, max_delay=extra, **options)

    def _message_bits(self, synapse: Synapse, *, sparse: bool = False) -> int:
        """None where spikes are 0 or 1 (see above)."""
        kind = self._graph.population(synapse.source).kind
        if kind == "linear":
            return 24
        return 8 if sparse or kind == "input" or self._phase.name == "feedback" else 0

    def _most_weights(self, synapse: Synapse) -> int:
        """A bound on how many weights the matrix of a connection has."""
        source, target = (prod(self._graph.population(name).shape) for name in (synapse.source, synapse.target))
        met = prod(_fan_in(op, self._graph.tensors) for op in synapse.ops)
        return target * min(source, met)


def _fits_conv(made: Convolution) -> bool:
    """Whether Lava's Conv holds the sizes, and makes an image of the size that is wanted (an output padding can ask for another)."""
    stride, padding, dilation, groups = made.grid
    kernel = made.weight.shape[2:]
    free = [made.before[1 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1 for i in (0, 1)]
    sizes = tuple(free[i] // stride[i] + 1 for i in (0, 1))
    return sizes == made.after[1:] and max(*kernel, *stride, *padding, *dilation, groups) <= SIZE_LIMIT


def _largest_currents(graph: Graph, phase: Phase) -> dict[Synapse, int]:
    """By connection of an integer graph, a bound on what one neuron of its target receives at a time; partial sums stay within it too.

    A relay emits what it receives, clamped to 24 bit: so bounds on relays stay bounds however often they are taken through all connections, and as many times
    as there are relays is enough where those form no loop.
    """
    gains = {synapse: _gain(graph, synapse) for synapse in phase.synapses}
    emitted = {p.name: int(graph.scale("forward", p.name)) if p.kind == "input" else 1 for p in graph.populations}
    relays = [p.name for p in graph.of_kind("linear") if p.name in phase.order]
    emitted |= dict.fromkeys(relays, POTENTIAL_LIMIT)
    own = {name: largest_constant(graph, phase, name) for name in relays}
    for _ in relays:
        received = {name: own[name] + sum(emitted[s.source] * gains[s] for s in phase.synapses if s.target == name) for name in relays}
        emitted |= {name: min(POTENTIAL_LIMIT, current) for name, current in received.items()}
    return {synapse: emitted[synapse.source] * gain for synapse, gain in gains.items()}


def _gain(graph: Graph, synapse: Synapse) -> int:
    """The largest sum of magnitudes of the weights, shifted by their exponents, through which a target neuron receives."""
    gain = 1
    for op in synapse.ops:
        gain = largest_sum(op, graph.tensors, gain)[1]
    return gain


def _fan_in(op: Op, tensors: dict[str, Array]) -> int:
    """A bound on how many values meet in one value that `op` makes."""
    if isinstance(op, (Identity, Scale)):
        return 1
    if isinstance(op, Upsample):
        return op.factor**2 if op.transpose else 1
    if isinstance(op, AvgPool2d):
        return prod(op.kernel)
    name = weight_of(op)
    assert name is not None
    return int(largest_rows(op, {name: np.ones(tensors[name].shape)}))


def digits(matrix: Any) -> list[Any]:
    """Whole numbers (NumPy or SciPy) as a sum of d_k 128^k, each within a weight's 8 bits, lowest first; one digit where that is enough."""
    low, high = -(1 << DIGIT_BITS), (1 << DIGIT_BITS) - 1
    if matrix.shape and (matrix.max() if matrix.size else 0) <= high and (matrix.min() if matrix.size else 0) >= low:
        return [matrix]
    values = matrix if isinstance(matrix, np.ndarray) else matrix.data
    found = []
    rest = np.abs(values.astype(np.int64))
    while rest.any():
        digit = np.sign(values) * (rest & high)
        rest >>= DIGIT_BITS
        found.append(digit if isinstance(matrix, np.ndarray) else _with_data(matrix, digit))
    return found


def _with_data(matrix: Any, data: Array) -> Any:
    """A sparse matrix with other values at the same places, zeros left out."""
    made = matrix.copy().astype(data.dtype)
    made.data[:] = data
    made.eliminate_zeros()
    return made


def composed(graph: Graph, ops: Sequence[Op], shapes: Sequence[Shape]) -> Any:
    """The matrix (target neurons, source neurons) of a composition in SciPy's compressed rows, without exponents; `shapes` are those before, between and behind `ops`."""
    from scipy import sparse

    kind = np.int64 if graph.integer else np.float64
    made = sparse.identity(prod(shapes[0]), kind, format="csr")
    for op, before, after in zip(ops, shapes[:-1], shapes[1:], strict=True):
        if getattr(op, "transpose", False):
            made = _matrix(graph, op, after, before, kind).T.tocsr() @ made
        else:
            made = _matrix(graph, op, before, after, kind) @ made
    made = sparse.csr_matrix(made)
    made.eliminate_zeros()
    made.sort_indices()
    return made


def _matrix(graph: Graph, op: Op, before: Shape, after: Shape, kind: type) -> Any:
    """The matrix of one operation in its forward form, which makes `after` of `before`."""
    from scipy import sparse

    if isinstance(op, Identity):
        return sparse.identity(prod(before), kind, format="csr")
    if isinstance(op, Scale):
        factors: Array = np.ones(before[0], kind) if op.weight is None else graph.tensors[op.weight].astype(kind)
        each = np.repeat(factors, prod(before[1:]))
        return sparse.diags(each if graph.integer else each * op.factor, format="csr", dtype=kind)
    if isinstance(op, Dense):
        return sparse.csr_matrix(graph.tensors[op.weight].astype(kind))
    channels = sparse.identity(before[0], kind)
    if isinstance(op, Upsample):
        down, across = (sparse.kron(sparse.identity(n, kind), np.ones((op.factor, 1), kind)) for n in before[1:])
        return sparse.kron(channels, sparse.kron(down, across), format="csr")
    if isinstance(op, AvgPool2d):
        down, across = (
            sum(_taken(before[i + 1], after[i + 1], op.stride[i], k - op.padding[i], kind) for k in range(op.kernel[i])) for i in (0, 1)
        )
        made = sparse.kron(channels, sparse.kron(down, across), format="csr")
        return made if graph.integer else made / prod(op.kernel)
    weight: Array = graph.tensors[op.weight].astype(kind)
    grid = Grid(op.stride, op.padding, op.dilation, op.groups)
    return _gathering(weight, grid, before, after) if isinstance(op, Conv2d) else _gathering(weight, grid, after, before).T.tocsr()


def _gathering(weight: Array, grid: Grid, before: Shape, after: Shape) -> Any:
    """The matrix of a convolution, weight (out, in / groups, kh, kw): for each place of the kernel the channels' matrix, times where that place lies."""
    from scipy import sparse

    groups = np.split(weight, grid.groups)
    places = []
    for y in range(weight.shape[2]):
        for x in range(weight.shape[3]):
            between = sparse.block_diag([group[:, :, y, x] for group in groups])
            down, across = (
                _taken(before[i + 1], after[i + 1], grid.stride[i], k * grid.dilation[i] - grid.padding[i], weight.dtype)
                for i, k in ((0, y), (1, x))
            )
            places.append(sparse.kron(between, sparse.kron(down, across), format="coo"))
    values, rows, columns = (np.concatenate([getattr(place, part) for place in places]) for part in ("data", "row", "col"))
    return sparse.csr_matrix((values, (rows, columns)), shape=(prod(after), prod(before)))


def _taken(size: int, made: int, stride: int, first: int, kind: Any) -> Any:
    """Along one axis: value i of `made` is value first + i * stride of `size`, or nothing where that lies outside."""
    from scipy import sparse

    rows = np.arange(made)
    columns = first + stride * rows
    inside = (columns >= 0) & (columns < size)
    return sparse.csr_matrix((np.ones(inside.sum(), kind), (rows[inside], columns[inside])), shape=(made, size))
