"""A plain ReLU network in an ONNX file, read as layers of neurons with linear connections between them.

Every value of the file's graph is a sum of branches, and every branch a chain of linear steps from the input or from a ReLU. A ReLU (or Clip from 0) closes a sum: it becomes a layer. What is
not linear and no ReLU has no counterpart, and is refused by the name of its node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolchain import network as plain
from toolchain.errors import UsageError
from toolchain.exchange import onnx_files
from toolchain.exchange.onnx_branches import Branch, Layer, Node, Value, named
from toolchain.exchange.onnx_operators import INSTEAD, LARGEST_VALUES, NOTHING, OPERATORS
from toolchain.exchange.onnx_shapes import SMALL
from toolchain.exchange.onnx_steps import INFERENCE_ONLY
from toolchain.ir import MOST_AXES, Array, Shape

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

MOST_WEIGHTS = 2**28
"""Most weights of all steps together: a file may use one many times, and every use has its own."""

MOST_SAMPLES = 4096
"""Most samples that a file may want together."""

TOLD = 12
"""Nodes that a refusal names, of a file with more."""


@dataclass(frozen=True)
class Relu:
    """The whole file: the nodes that its scores need, its layers in order, the branch to the class scores, the input's name and shape (without samples), how many samples it takes where that is fixed, and what was left out."""

    model: ModelProto = field(repr=False)
    nodes: tuple[NodeProto, ...] = field(repr=False)
    input: str
    output: str
    input_shape: Shape
    samples: int | None
    layers: tuple[Layer, ...]
    readout: Branch
    left_out: tuple[str, ...]


def read(path: Path) -> Relu:
    """The network of `path`; UsageError names every node that has no counterpart, ArtifactError says where the file is damaged."""
    model = onnx_files.read(path)
    if any(entry.key == "carries" and entry.value == INFERENCE_ONLY for entry in model.metadata_props):
        raise UsageError(
            f"'{path}' is a spiking network that toolchain export wrote for inference: export it with --format nir, which import reads back"
        )
    return _Reading(model, path).whole()


class _Reading:
    """One file being read."""

    def __init__(self, model: ModelProto, path: Path) -> None:
        self.model, self.graph, self.path = model, model.graph, path
        self.values: dict[str, Value] = dict(onnx_files.initializers(model.graph, path))
        self.layers: list[Layer] = []
        self.left_out: list[str] = []
        self._weights, self._counted = 0, set[int]()
        self.nodes = self._needed()
        self.input, self.input_shape, self.samples = self._input()
        self.shaped = self.input_shape
        """The shape in which the network takes the input: a reshape at the very start changes it."""
        self.values[self.input] = (Branch(None, (), self.input_shape),)

    def whole(self) -> Relu:
        """Read every node, in order."""
        self._require_known()
        last = {name: number for number, node in enumerate(self.nodes) for name in node.input}
        for number, node in enumerate(self.nodes):
            made = self._made(Node(node, self.path))
            self._count(made)
            self.values[node.output[0]] = made
            for name in node.input:
                if last[name] == number and name != self.output:
                    self.values.pop(name, None)  # values that nobody reads any more take no memory
        output, found = self.output, self.values.get(self.output)
        if not isinstance(found, tuple):
            raise UsageError(f"'{self.path}': output '{output}' does not come from the input: export the network again")
        if not self.layers:
            raise UsageError(f"'{self.path}' has no ReLU, which neurons stand for: import a network with at least one hidden layer")
        if len(found) != 1 or found[0].source != len(self.layers) - 1:
            raise UsageError(
                f"'{self.path}': output '{output}' reads {_ends(found)}, and a network here reads its class scores from the last ReLU only, '{self.layers[-1].node}': "
                "leave the other branches out"
            )
        self._require_chain(found[0])
        return Relu(
            self.model, tuple(self.nodes), self.input, output, self.shaped, self.samples, tuple(self.layers), found[0], tuple(self.left_out)
        )

    def _made(self, node: Node) -> Value:
        """What a node makes; UsageError also where its settings are of another kind than its operator's, which ONNX's checker does not look at."""
        try:
            return OPERATORS[node.kind](self, node)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise node.refused(f"has settings that make no sense ({error}): export the network again") from None

    @property
    def output(self) -> str:
        """The name of the class scores."""
        return str(self.graph.output[0].name)

    def _count(self, made: Value) -> None:
        """UsageError where the weights of all steps come to more than fits."""
        steps = [branch.steps[-1] for branch in made if branch.steps] if isinstance(made, tuple) else []
        new = {id(step.weight): step.weight.size for step in steps if step.weight is not None and id(step.weight) not in self._counted}
        self._counted |= new.keys()
        self._weights += sum(new.values())
        if self._weights > MOST_WEIGHTS:
            raise UsageError(f"'{self.path}' uses its weights more often than {MOST_WEIGHTS:,} values hold: import a smaller network")

    def _needed(self) -> list[NodeProto]:
        """The nodes that the output depends on; UsageError where there are several outputs."""
        if len(self.graph.output) != 1:
            names = ", ".join(f"'{output.name}'" for output in self.graph.output)
            raise UsageError(f"'{self.path}' has the outputs {names or 'none'}: export the network with one, its class scores")
        wanted, kept = {self.graph.output[0].name}, []
        for node in reversed(self.graph.node):
            if wanted & set(node.output):
                wanted |= set(node.input)
                kept.append(node)
        return kept[::-1]

    def _input(self) -> tuple[str, Shape, int | None]:
        """Name, shape and number of samples of the one input."""
        from onnx import TensorProto

        inputs = [value for value in self.graph.input if value.name not in self.values]
        if len(inputs) != 1:
            names = ", ".join(f"'{value.name}'" for value in inputs)
            raise UsageError(f"'{self.path}' has the inputs {names or 'none'}: export the network with one, its images")
        kind = inputs[0].type.tensor_type
        if kind.elem_type not in (TensorProto.FLOAT, TensorProto.DOUBLE):
            raise UsageError(
                f"'{self.path}': input '{inputs[0].name}' takes no numbers of 32 or 64 bits with a point: export the network in float32"
            )
        sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        if len(sizes) < 2 or not all(size is not None and size > 0 for size in sizes[1:]):
            raise UsageError(
                f"'{self.path}': input '{inputs[0].name}' has the shape {_told(kind.shape)}: give all sizes but the first, which counts samples, as whole numbers"
            )
        shape = tuple(int(size) for size in sizes[1:] if size is not None)
        if prod(shape) > LARGEST_VALUES or len(shape) > MOST_AXES:
            raise UsageError(
                f"'{self.path}': input '{inputs[0].name}' has the shape {_told(kind.shape)}, more than {LARGEST_VALUES:,} values a sample"
            )
        samples = sizes[0] or None
        if samples is not None and not 1 <= samples <= MOST_SAMPLES:
            raise UsageError(
                f"'{self.path}' takes {samples:,} samples at a time: export it for 1 to {MOST_SAMPLES:,}, or for any number (dynamic axes)"
            )
        return inputs[0].name, shape, samples

    def _require_known(self) -> None:
        """UsageError with every node that has no counterpart."""
        strange = [node for node in self.nodes if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS]
        if strange:
            reasons = [f"node '{named(node)}' ({node.op_type}) {INSTEAD.get(node.op_type, NOTHING)}" for node in strange]
            more = [f"and {len(reasons) - TOLD} more nodes"] if len(reasons) > TOLD else []
            raise UsageError(f"'{self.path}' is no plain ReLU network:\n- " + "\n- ".join([*reasons[:TOLD], *more]))

    def _require_chain(self, readout: Branch) -> None:
        """A network here is a chain of layers, with skips beside it; and a connection has one weight, or matrices in a row."""
        for number, layer in enumerate(self.layers):
            before = number - 1 if number else None
            if all(branch.source != before for branch in layer.branches):
                ahead = "the input" if before is None else f"'{self.layers[before].node}'"
                raise UsageError(
                    f"'{self.path}': ReLU '{layer.node}' reads {_ends(layer.branches)} and not {ahead}, the one before it: networks here are a chain of layers with skips beside it"
                )
        for branch in (*(branch for layer in self.layers for branch in layer.branches), readout):
            weighted = [step for step in branch.steps if step.weighted]
            if len(weighted) > 1 and not all(isinstance(step.part, plain.Linear) for step in weighted):
                names = " and ".join(f"'{step.node}'" for step in weighted)
                raise UsageError(f"'{self.path}': nodes {names} have no ReLU between them: put one there, or make them one")

    # what nodes read

    def data(self, node: Node, number: int = 0) -> tuple[Branch, ...]:
        """A node's input that depends on the image; UsageError where it is a constant."""
        found = self.values.get(node.inputs[number]) if number < len(node.inputs) else None
        if not isinstance(found, tuple):
            raise node.refused("computes with constants only, where it should take the network's values")
        return found

    def constant(self, node: Node, number: int) -> Array | None:
        """A node's constant input; None where it is left out."""
        if number >= len(node.inputs) or not node.inputs[number]:
            return None
        found = self.values.get(node.inputs[number])
        if found is None or isinstance(found, tuple):
            raise node.refused(
                f"takes its input '{node.inputs[number]}' from other values of the network: only constants have a counterpart"
            )
        if found.dtype.kind not in "biuf":
            raise node.refused(f"takes '{node.inputs[number]}', which holds no real numbers")
        return found

    def required(self, node: Node, number: int) -> Array:
        found = self.constant(node, number)
        if found is None:
            raise node.refused(f"lacks its input {number}")
        return found

    def numbers(self, node: Node, name: str, number: int) -> list[int] | None:
        """Whole numbers that an older opset has as an attribute and a newer one as an input."""
        if name in node.attributes:
            return [int(value) for value in node.attributes[name]]
        found = self.constant(node, number)
        return None if found is None else [int(value) for value in np.asarray(found).reshape(-1)[:SMALL]]


def _told(shape: Any) -> str:
    return "(" + ", ".join(str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in shape.dim) + ")"


def _ends(branches: Sequence[Branch]) -> str:
    return " and ".join("the input" if branch.source is None else f"layer {branch.source + 1}" for branch in branches)
