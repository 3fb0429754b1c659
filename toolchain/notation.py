"""Operations as people write them (`conv 3x3/2 p1`), how many products they take, and text in tables and in little room."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from toolchain.ir import (
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
    shapes_along,
    weight_of,
)


def size(shape: Sequence[int]) -> str:
    """A shape as in `64x8x8`."""
    return "x".join(map(str, shape))


def geometry(graph: Graph, op: Op) -> str:
    """What an operation does, without its weights: kernel, then `/stride`, `p`adding, `op` output padding, `d`ilation and `g`roups where they are not
    the usual ones; `^T` marks the adjoint."""
    mark = "^T" if getattr(op, "transpose", False) else ""
    if isinstance(op, (Conv2d, ConvTranspose2d)):
        kernel = graph.tensors[op.weight].shape[2:]
        extra = [_pair(" p", op.padding, 0)]
        extra += [_pair(" op", op.output_padding, 0)] if isinstance(op, ConvTranspose2d) else []
        extra += [_pair(" d", op.dilation, 1), f" g{op.groups}" if op.groups > 1 else ""]
        word = "conv" if isinstance(op, Conv2d) else "deconv"
        return f"{word}{mark} {size(kernel)}{_pair('/', op.stride, 1)}{''.join(extra)}"
    if isinstance(op, AvgPool2d):
        stride = "" if op.stride == op.kernel else _pair("/", op.stride, 1) or "/1"
        return f"pool{mark} {size(op.kernel)}{stride}{_pair(' p', op.padding, 0)}"
    if isinstance(op, Upsample):
        return f"up{mark} x{op.factor}"
    if isinstance(op, Scale):
        return " ".join(["scale"] * (op.weight is not None) + [f"times {op.factor:g}"] * (op.factor != 1 or op.weight is None))
    return f"dense{mark}" if isinstance(op, Dense) else "as it is"


def _pair(mark: str, pair: tuple[int, int], usual: int) -> str:
    """Both numbers, one where they are equal, nothing where they are the usual ones."""
    if pair == (usual, usual):
        return ""
    return f"{mark}{pair[0]}" if pair[0] == pair[1] else f"{mark}{size(pair)}"


def process_names(synapses: Sequence[Synapse], does: str) -> list[str]:
    """The name of each synapse's process, in their order: its ends and what it `does` (a phase's name), and a number where several join the same two."""
    ends = [(synapse.source, synapse.target) for synapse in synapses]
    return [
        f"{source} -> {target} ({does})" + (f" {ends[: i + 1].count((source, target))}" if ends.count((source, target)) > 1 else "")
        for i, (source, target) in enumerate(ends)
    ]


def operation(graph: Graph, op: Op) -> str:
    """An operation with the tensor it reads and, in integer graphs, the shift behind it: `conv 3x3/2 p1 hidden.0.weight << 3`."""
    exponent = getattr(op, "exponent", 0)
    return " ".join([geometry(graph, op), *([str(weight_of(op))] if weight_of(op) else []), *([f"<< {exponent}"] if exponent else [])])


def operations(graph: Graph, ops: Sequence[Op]) -> str:
    """Operations in the order in which they are applied."""
    return ", ".join(operation(graph, op) for op in ops) or "as it is"


def route(graph: Graph, ops: Sequence[Op], source: Shape, target: Shape) -> tuple[Shape, ...]:
    """The shapes along a connection, from the one its first operation takes to the one its last makes."""
    return (entry_shape(ops, source, target, graph.tensors), *shapes_along(ops, source, target, graph.tensors))


def products(graph: Graph, ops: Sequence[Op], source: Shape, target: Shape) -> int:
    """How many products (and sums) a connection takes when every neuron of its source fires, zeros of the padding counted."""
    shapes = route(graph, ops, source, target)
    return sum(_products(graph, op, into, made) for op, into, made in zip(ops, shapes, shapes[1:], strict=False))


def _products(graph: Graph, op: Op, into: Shape, made: Shape) -> int:
    if isinstance(op, Identity):
        return 0
    if isinstance(op, Scale):
        return prod(made)
    if isinstance(op, Upsample):
        return max(prod(made), prod(into))
    if isinstance(op, Dense):
        return int(graph.tensors[op.weight].size)
    gathers = op.transpose if isinstance(op, ConvTranspose2d) else not op.transpose
    windows = made if gathers else into  # a window for each neuron on the side that has one value a window
    return prod(op.kernel) * prod(windows) if isinstance(op, AvgPool2d) else int(graph.tensors[op.weight].size) * prod(windows[1:])


def synapse_products(graph: Graph, synapse: Synapse) -> int:
    """`products` of a synapse."""
    return products(graph, synapse.ops, graph.population(synapse.source).shape, graph.population(synapse.target).shape)


def step_products(graph: Graph, phase: Phase) -> int:
    """`products` of all synapses of a phase: the most that one of its time steps can take."""
    return sum(synapse_products(graph, synapse) for synapse in phase.synapses)


def sample_products(graph: Graph) -> int:
    """`products` of all time steps of all phases, at least 1: the most that one sample can take."""
    return max(1, sum(step_products(graph, phase) * phase.time_steps for phase in graph.phases))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Aligned columns of text: the first `left` columns left, the others right."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in cells
    ]


def wrapped(words: Sequence[str], letters: int, lines: int) -> tuple[str, ...]:
    """The words in as many lines as they need, none longer than `letters` where words allow it; what is too much becomes an ellipsis."""
    found: list[str] = []
    for word in ", ".join(words).split(" "):
        if found and len(found[-1]) + 1 + len(word) <= letters and not found[-1].endswith(","):
            found[-1] += f" {word}"
        else:
            found.append(word)
    found = [cut(line, letters + 2) for line in found]
    return tuple(found) if len(found) <= lines else (*found[: lines - 1], "…")


def cut(text: str, letters: int) -> str:
    """`text`, without its middle where it is too long."""
    if len(text) <= letters:
        return text
    half = (letters - 1) // 2
    return f"{text[: letters - 1 - half]}…{text[-half:]}"
