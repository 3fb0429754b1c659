"""A network for readers that know NIR's own nodes only, such as snnTorch and SpikingJelly: an approximation, whose loss is listed and measured.

The folded float network in Affine, Linear, Conv2d, AvgPool2d, Flatten, IF and LIF nodes. NIR's neurons are set to v_reset = 0 where they fire, ours subtract; so that they keep their rates, v_threshold lies
halfway between our threshold and the amount we subtract (as in netx files, see docs/exchange.md). A loop has no Delay: such readers close it a step late by themselves. The last node is the
readout's connection; the answer is the largest sum of its outputs over the time steps.

What is measured is NIR's equations, in Euler steps of `DT` by nirtorch:

    IF   v += dt r I                        v > v_threshold: a spike, and v = v_reset
    LIF  v += dt / tau (v_leak - v + r I)   the same
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

import toolchain
from toolchain import codec, data
from toolchain.compiler import lowered
from toolchain.deploy import deploy, sample_shape
from toolchain.errors import DesignRuleError, UsageError
from toolchain.exchange import nir, nir_files
from toolchain.exchange.nir_nodes import DT, Writer, narrow, steps_late
from toolchain.files import ready_folder
from toolchain.ir import LARGEST_MATRIX, Array, Graph, Population, Scale, Shape, Synapse, frozen
from toolchain.passes import Fold
from toolchain.progress import track
from toolchain.seen import CHUNK
from toolchain.source import Model, Source

if TYPE_CHECKING:
    import nir as nir_package

HARD_RESET = "hard-reset approximation"


@dataclass(frozen=True)
class Approximated:
    """A NIR file for readers of NIR's own nodes: what it lost, and on `samples` samples its accuracy beside that of the exact network (fractions of 1).

    `accuracy` is that of the file by NIR's equations in nirtorch, `exact_accuracy` that of the network on target torch; `agreement` how many answers are the same.
    """

    model: str
    output: str
    bytes: int
    approximation: str
    lost: tuple[str, ...]
    nodes: int
    edges: int
    time_steps: int
    dt: float
    dataset: str
    samples: int
    correct: int
    accuracy: float
    exact_correct: int
    exact_accuracy: float
    agreement: float
    versions: dict[str, str]
    predictions: npt.NDArray[np.int64] = field(repr=False)
    kind: str = "approximation"
    format: str = "nir"

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            **{name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("format", "predictions")},
        }

    def to_text(self) -> str:
        here = f"{100 * self.accuracy:.2f} % ({self.correct:,}) of the file, by NIR's equations in nirtorch"
        exact = f"{100 * self.exact_accuracy:.2f} % ({self.exact_correct:,}) of the exact network"
        return "\n".join(
            [
                f"{self.model} as nir, a {self.approximation}: {self.nodes} nodes, {self.edges} edges, T {self.time_steps}",
                "lost:",
                *(f"- {sentence}" for sentence in self.lost),
                f"accuracy on the first {self.samples:,} samples of {self.dataset}: {here}; {exact}; the same answer on {100 * self.agreement:.2f} %",
                f"wrote {self.output} ({self.bytes:,} bytes) in time constants of dt = {self.dt:g} s",
            ]
        )


def export(model: Model, source: Source, path: Path, *, dataset: str, samples: int, data_dir: str | Path | None) -> Approximated:
    """Write `source` to `path` for readers of NIR's own nodes, and measure it; DesignRuleError, with every reason, where such nodes cannot say it at all."""
    from toolchain.exchange import nir_torch

    nir_torch.require()
    made = stock(source)
    made.sheet()  # refuses what nodes cannot say, before data are looked at
    time_steps, size = sample_shape(source, dataset)
    loaded = data.load(dataset, samples=samples, data_dir=data_dir, time_steps=time_steps, image_size=size)
    codec.check_inputs(made.graph, np.asarray(loaded.images[:1]))
    ready_folder(path.parent)
    entry = made.entry(source.name)
    graph = nir.whole(made.sheet(), entry, {}, {})
    predicted = answers(graph, made.graph, loaded.images)
    exact = deploy(model, target="torch", dataset=dataset, samples=samples, data_dir=data_dir)
    correct = int((predicted == loaded.labels).sum())
    return Approximated(
        model=source.name,
        output=str(path),
        bytes=nir_files.write(path, graph),
        approximation=HARD_RESET,
        lost=entry.lost,
        nodes=len(graph.nodes),
        edges=len(graph.edges),
        time_steps=entry.time_steps,
        dt=DT,
        dataset=loaded.name,
        samples=samples,
        correct=correct,
        accuracy=correct / samples,
        exact_correct=exact.correct,
        exact_accuracy=exact.accuracy,
        agreement=float((predicted == exact.predictions).mean()),
        versions=nir.recorded(),
        predictions=predicted,
    )


def stock(source: Source) -> Stock:
    """What draws `source` in NIR's own nodes; UsageError for an artefact without its float tensors."""
    if source.artifact is None:
        return Stock(Fold()(lowered(source)))
    if source.artifact.float_graph is None:
        raise UsageError(
            f"'{source.name}' was compiled without its float tensors, which an approximation starts from: compile it again without --no-float"
        )
    return Stock(source.artifact.float_graph)


class Stock(Writer):
    """Draws a folded float graph without anything in metadata, and gathers what that loses."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(_by_channel(graph))
        self.evened = [name for name, tensor in graph.tensors.items() if not np.array_equal(tensor, self.graph.tensors[name])]
        self.drawn = False

    def sheet(self) -> Any:
        if not self.drawn:
            super().sheet()
            self.drawn = True
        for node in self.made.nodes.values():
            node.metadata = {}
        return self.made

    def entry(self, model: str) -> nir.Entry:
        """The file's entry, whose `lost` is the whole of it."""
        phase = self.graph.phase("forward")
        return nir.Entry(nir.FORMAT, "approximation", toolchain.__version__, model, phase.time_steps, DT, tuple(self.lost()))

    def lost(self) -> list[str]:
        forward = self.graph.phase("forward")
        found = ["reset by subtraction: a neuron that fires is set to 0 and forgets by how much it passed the threshold"]
        if any(d.threshold != d.reset for d in forward.dynamics.values() if d.members == "plus"):
            found.append("the threshold: it lies halfway between ours and the amount we subtract, which keeps rates")
        if self.graph.has_phase("feedback"):
            found.append("the feedback phase: NIR has neither signed spikes nor a second phase, so the file does inference only")
        if any(steps_late(forward, s) for s in forward.synapses):
            found.append("the delay of feedback: a loop is closed as its reader does, in nirtorch a step late")
        readout = forward.dynamics[self.graph.of_kind("readout")[0].name]
        if readout.leak != 1:
            found.append(f"the leak of the readout ({readout.leak:g} a step): outputs are added up as they are")
        found += [f"the differences of bias '{name}' within a channel: a node has one value a channel, the mean" for name in self.evened]
        found.append(f"the number of time steps ({forward.time_steps}), and that the answer is the largest sum of the outputs")
        return found

    def population(self, population: Population) -> str:
        import nir

        dynamics, shape = self.phase.dynamics[population.name], population.shape
        if population.kind == "readout":
            return self.made.add("logits", nir.Output(np.array(shape)))
        if population.kind == "linear":
            raise DesignRuleError(
                f"'{self.graph.provenance.model}' cannot be approximated as NIR: population '{population.name}' is a graded relay, which NIR's own neurons are not; export it without --approximate"
            )
        threshold = np.full(shape, (dynamics.threshold + dynamics.reset) / 2)
        if dynamics.leak == 1:
            return self.made.add(population.name, nir.IF(np.full(shape, 1 / DT), threshold, np.zeros(shape)))
        tau = DT / (1 - dynamics.leak)
        zeros = np.zeros(shape)
        return self.made.add(population.name, nir.LIF(np.full(shape, tau), np.full(shape, tau / DT), zeros, threshold, zeros))

    def finish(self, ends: Mapping[str, str]) -> None:
        left = [
            f"the bias of '{name}' that begins with step {bias.start}"
            for name, biases in self.phase.bias.items()
            for bias in biases
            if f"{name}:{bias.start}" not in self.placed
        ]
        if left:
            raise DesignRuleError(f"'{self.graph.provenance.model}' cannot be approximated as NIR: no node holds {' or '.join(left)}")

    def settled(self, population: Population, arriving: list[str]) -> list[str]:
        """A bias that no connection has room for goes into a connection of ones behind the first."""
        bias = self._bias_for(population.name, 0)
        if bias is None or not arriving:
            return arriving
        self.placed.add(bias.key)
        return [self._even(population.shape, np.ones(population.shape[0]), bias.values, population.name, arriving[0]), *arriving[1:]]

    def delayed(self, synapse: Synapse, source: str, *, loop: bool) -> str:
        if not loop:
            raise DesignRuleError(
                f"'{self.graph.provenance.model}' cannot be approximated as NIR: connection '{synapse.source}' -> '{synapse.target}' is late without closing a loop"
            )
        bias = self._bias_for(synapse.target, 1)
        return self._chain(synapse.ops, synapse.source, synapse.target, source, bias)

    def scale(self, op: Scale, shape: Shape, what: str, node: str, exponent: int) -> str:
        factors = np.full(shape[0], op.factor) * (1.0 if op.weight is None else self.graph.tensors[op.weight])
        return self._even(shape, factors, np.zeros(shape), what, node)

    def _even(self, shape: Shape, factors: Array, bias: Array, what: str, node: str) -> str:
        """Values times one factor a channel, plus a bias: a diagonal matrix, or of images a kernel of one value."""
        import nir

        values = np.asarray(bias, np.float64).reshape(shape[0], -1)
        if len(shape) == 3:
            kernel = np.diag(factors)[:, :, None, None]
            return self.made.add(
                what, nir.Conv2d((shape[1], shape[2]), narrow(kernel), (1, 1), (0, 0), (1, 1), 1, narrow(values[:, 0])), node
            )
        if prod(shape) ** 2 > LARGEST_MATRIX:
            raise DesignRuleError(
                f"'{what}' scales {prod(shape):,} values, a matrix of more than {LARGEST_MATRIX:,} entries in NIR's own nodes"
            )
        return self.made.add(what, nir.Affine(narrow(np.diag(factors)), narrow(values.reshape(-1))), node)


def _by_channel(graph: Graph) -> Graph:
    """The graph with every bias of images the same all over a channel, its mean."""
    tensors = dict(graph.tensors)
    for biases in graph.phase("forward").bias.values():
        for bias in biases:
            values = tensors[bias.tensor]
            if values.ndim == 3 and not (values == values[:, :1, :1]).all():
                tensors[bias.tensor] = frozen(np.broadcast_to(values.mean(axis=(1, 2), keepdims=True), values.shape))
    return msgspec.structs.replace(graph, tensors=tensors)


def answers(graph: nir_package.NIRGraph, exact: Graph, images: data.Images) -> npt.NDArray[np.int64]:
    """The class of each image, (samples,): the largest sum of what the file's nodes make in the time steps of `exact`, by NIR's equations."""
    import nirtorch
    import torch

    from toolchain.exchange import nir_torch

    steps, events = exact.phase("forward").time_steps, exact.of_kind("input")[0].events
    shape = exact.of_kind("input")[0].shape
    network = nirtorch.nir_to_torch(graph, nir_torch.stock_map(DT), dtype=torch.float64)
    found = []
    with torch.no_grad():
        for first in track(range(0, len(images), CHUNK), "NIR in nirtorch", total=-(-len(images) // CHUNK)):
            part = torch.from_numpy(np.asarray(images[first : first + CHUNK], np.float64))
            part = part.reshape(len(part), *shape, *part.shape[-1:] * events)
            total, state = torch.zeros(1, dtype=torch.float64), None
            for step in range(steps):
                made, state = network(part[..., step] if events else part, state)
                total = total + made
            found.append(total.argmax(dim=1).numpy())
    return np.asarray(np.concatenate(found), np.int64)
