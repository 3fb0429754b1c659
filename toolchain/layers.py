"""The torch front end: a feedback spiking neural network as a module, and the time steps that take it to its forward equilibrium.

    v = u_l + I_l[t];   s_l[t] = 1[v >= Vth];   u_l = leak * (v - A s_l[t])   (IDE, Xiao et al., NeurIPS 2021)
    I_0[t] = Fx(x),   I_l[t] = W_l s_{l-1}[t] + b_l,   plus W_f s_k[t-1] for every feedback connection from layer k

A network is a chain of connections (any module of a kind in `KINDS`), feedback connections from any layer to any layer, and a linear readout.
A new kind of connection is one entry in `KINDS` and one struct in `network.Connection`; nothing here knows about its insides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from toolchain import network as plain
from toolchain.errors import UsageError
from toolchain.ir import leak_sum
from toolchain.network import Network, Neuron, Normalization

__all__ = ["KINDS", "Equilibrium", "FeedbackSNN", "Neuron", "Normalize", "build", "describe"]

SPARSE_ONE_IN = 32
"""On a CPU, spikes sparser than one in this many are added row by row: measured 4 times faster than a dense product at 0.3 % spikes."""


class Normalize(nn.Module):
    """(x - mean) / std with one value a channel, or one for all; `x` has shape (samples, channels, ...)."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        self.settings = Normalization(_values(mean), _values(std))
        self.register_buffer("mean", torch.tensor(self.settings.mean, dtype=torch.float64), persistent=False)
        self.register_buffer("std", torch.tensor(self.settings.std, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (x - self.mean.to(x.dtype).reshape(shape)) / self.std.to(x.dtype).reshape(shape)


def _values(numbers: float | Sequence[float]) -> tuple[float, ...]:
    return (float(numbers),) if isinstance(numbers, (int, float)) else tuple(float(n) for n in numbers)


class Map(Protocol):
    """A connection's linear part, prepared for many time steps."""

    def add(self, total: Tensor, spikes: Tensor) -> None:
        """total += W spikes, in place; (samples, *target shape) and (samples, *source shape)."""

    def add_transposed(self, total: Tensor, spikes: Tensor) -> None:
        """total += W^T spikes, in place; (samples, *source shape) and (samples, *target shape)."""


@dataclass(frozen=True)
class DenseMap:
    """W of a fully connected connection, and its transpose laid out for speed."""

    weight: Tensor
    transposed: Tensor

    def add(self, total: Tensor, spikes: Tensor) -> None:
        _add_product(total, spikes, self.transposed)

    def add_transposed(self, total: Tensor, spikes: Tensor) -> None:
        _add_product(total, spikes, self.weight)


def _add_product(total: Tensor, spikes: Tensor, matrix: Tensor) -> None:
    """total += spikes @ matrix, flattened to one row a sample; few spikes on a CPU are added one row of the matrix at a time."""
    flat, rows = total.flatten(1), spikes.flatten(1)
    if rows.device.type != "cpu" or int(torch.count_nonzero(rows)) * SPARSE_ONE_IN >= rows.numel():
        flat.addmm_(rows, matrix)
        return
    sample, neuron = rows.nonzero().unbind(1)
    flat.index_add_(0, sample, matrix[neuron] * rows[sample, neuron].unsqueeze(1))


@dataclass(frozen=True)
class Kind:
    """What the front end must know of one kind of connection."""

    describe: Callable[[Any], plain.Connection]
    build: Callable[[Any], nn.Module]
    current: Callable[[Any, Tensor], Tensor]
    prepare: Callable[[Any], Map]


KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: Kind(
        describe=lambda m: plain.Linear(m.in_features, m.out_features, m.bias is not None),
        build=lambda c: nn.Linear(c.inputs, c.outputs, bias=c.bias),
        current=lambda m, values: m(values.flatten(1)),
        prepare=lambda m: DenseMap(m.weight.detach(), m.weight.detach().t().contiguous()),
    ),
}

BUILDERS: dict[type, Callable[[Any], nn.Module]] = {plain.Linear: KINDS[nn.Linear].build}


def kind_of(module: nn.Module, where: str) -> Kind:
    """How to treat `module`; UsageError naming `where` and the nearest supported kinds."""
    if type(module) in KINDS:
        return KINDS[type(module)]
    raise UsageError(f"{where} is a {type(module).__name__}, which is not supported yet: use {' or '.join(k.__name__ for k in KINDS)}")


def current(module: nn.Module, values: Tensor, where: str = "a connection") -> Tensor:
    """The post-synaptic current, bias included, that a connection makes of `values` (samples, *source shape)."""
    return kind_of(module, where).current(module, values)


@dataclass(frozen=True)
class Equilibrium:
    """What T steps leave behind, a tensor a layer.

    rates       (samples, *shape), (leak-weighted) average firing rates
    counts      (samples, *shape), spike counts as int32
    mean_input  (samples, *input shape), the normalised input, averaged over time for events
    trains      (T, samples, *shape) int8, where they were asked for
    """

    rates: tuple[Tensor, ...]
    counts: tuple[Tensor, ...]
    mean_input: Tensor
    trains: tuple[Tensor, ...] = ()


class FeedbackSNN(nn.Module):
    """A chain of spiking layers with feedback and a linear readout of the last layer's rates.

    `input` makes the current of layer 0, `hidden[i]` joins layer i to i + 1, `feedback` lists (source layer, target layer, connection without bias),
    `readout` turns the last rates into logits. Inputs are (samples, *input_shape), flattened or not, held for all T steps; or events with time
    as the last axis, (samples, *input_shape, T). Raises UsageError where the parts do not fit.
    """

    def __init__(
        self,
        *,
        name: str,
        input_shape: Sequence[int],
        input: nn.Module,
        readout: nn.Linear,
        hidden: Sequence[nn.Module] = (),
        feedback: Sequence[tuple[int, int, nn.Module]] = (),
        neuron: Neuron | None = None,
        time_steps: int = 30,
        feedback_steps: int = 100,
        scale_factor: float = 100.0,
        dropout: float = 0.0,
        normalize: Normalize | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.input_shape = tuple(input_shape)
        self.input = input
        self.hidden = nn.ModuleList(hidden)
        self.feedback = nn.ModuleList(module for _, _, module in feedback)
        self.loops = tuple((source, target) for source, target, _ in feedback)
        self.readout = readout
        self.neuron = neuron or Neuron()
        self.time_steps = time_steps
        self.feedback_steps = feedback_steps
        self.scale_factor = scale_factor
        self.dropout = dropout
        self.normalize = normalize
        plain.check(describe(self))

    @property
    def layers(self) -> int:
        """Number of spiking layers."""
        return 1 + len(self.hidden)

    def connections(self) -> dict[str, tuple[int | None, int, nn.Module]]:
        """Every connection between layers by its name in the state dict: (source layer, None for the input; target layer; module)."""
        chain: dict[str, tuple[int | None, int, nn.Module]] = {"input": (None, 0, self.input)}
        chain |= {f"hidden.{i}": (i, i + 1, module) for i, module in enumerate(self.hidden)}
        return chain | {f"feedback.{i}": (*ends, module) for i, (ends, module) in enumerate(zip(self.loops, self.feedback, strict=True))}

    def layer_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each spiking layer, without the samples."""
        return plain.layer_shapes(describe(self))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (samples, classes) from the last layer's rates after T time steps. Dropout is the training method's affair, so both modes agree."""
        return cast(Tensor, self.readout(self.equilibrium(x).rates[-1].flatten(1)))

    def prepared(self, x: Tensor) -> tuple[Tensor, bool]:
        """The input in the network's dtype and shape, normalised, and whether it is events (time last); UsageError where it does not fit."""
        weight = next(self.parameters())
        events = x.ndim == len(self.input_shape) + 2 and tuple(x.shape[1:-1]) == self.input_shape
        if events and x.shape[-1] != self.time_steps:
            raise UsageError(
                f"'{self.name}' runs {self.time_steps} time steps but the events have {x.shape[-1]} frames: cut them to {self.time_steps}, or set time_steps"
            )
        if not events and (x.ndim < 2 or prod(x.shape[1:]) != prod(self.input_shape)):
            raise UsageError(
                f"'{self.name}' takes samples of shape {self.input_shape} ({prod(self.input_shape)} values) but the input has shape {tuple(x.shape)}: one sample a row"
            )
        values = x.to(weight.dtype) if events else x.to(weight.dtype).reshape(len(x), *self.input_shape)
        return (values if self.normalize is None else self.normalize(values)), events

    @torch.no_grad()
    def equilibrium(self, x: Tensor, *, dropout: Mapping[str, Tensor] | None = None, trace: bool = False) -> Equilibrium:
        """Run the T time steps (see the module) and return rates, counts and (with `trace`) spike trains.

        `dropout` holds one factor per connection name and neuron, (samples, *target shape), shared by all time steps.
        """
        neuron, dropped = self.neuron, dropout or {}
        values, events = self.prepared(x)
        maps = {name: kind_of(module, f"connection '{name}'").prepare(module) for name, (_, _, module) in self.connections().items()}
        frame = values[..., 0] if events else values
        constant = _dropped(current(self.input, frame, "the input connection"), dropped.get("input"))
        bias = self._biases(constant, dropped)
        potentials = [torch.zeros_like(constant), *(torch.zeros_like(b) for b in bias[1:])]
        spikes, previous = [[torch.zeros_like(p) for p in potentials] for _ in range(2)]
        counts = [torch.zeros_like(p) for p in potentials]
        weighted = [torch.zeros_like(p) for p in potentials] if neuron.leak < 1 else counts
        trains: list[list[Tensor]] = [[] for _ in potentials]
        for step in range(self.time_steps):
            spikes, previous = previous, spikes
            if events and step > 0:
                bias[0] = _dropped(current(self.input, values[..., step]), dropped.get("input"))
            for layer, potential in enumerate(potentials):
                potential += bias[layer]
                if layer > 0:
                    _add(maps[f"hidden.{layer - 1}"], potential, spikes[layer - 1], dropped.get(f"hidden.{layer - 1}"))
                for index, (source, target) in enumerate(self.loops):
                    if target == layer and step > 0:
                        _add(maps[f"feedback.{index}"], potential, previous[source], dropped.get(f"feedback.{index}"))
                torch.ge(potential, neuron.threshold, out=spikes[layer])
                potential.sub_(spikes[layer], alpha=neuron.reset)
                counts[layer] += spikes[layer]
                if neuron.leak < 1:
                    potential *= neuron.leak
                    weighted[layer].mul_(neuron.leak).add_(spikes[layer])
                if trace:
                    trains[layer].append(spikes[layer].to(torch.int8))
        norm = leak_sum(neuron.leak, self.time_steps)
        return Equilibrium(
            rates=tuple(w / norm for w in weighted),
            counts=tuple(c.to(torch.int32) for c in counts),
            mean_input=values.mean(-1) if events else values,
            trains=tuple(torch.stack(train) for train in trains) if trace else (),
        )

    def _biases(self, constant: Tensor, dropped: Mapping[str, Tensor]) -> list[Tensor]:
        """What each layer receives at every step whatever spikes arrive: layer 0 its input current, the others their bias, (samples, *shape)."""
        found, spikes = [constant], torch.zeros_like(constant)
        for index, module in enumerate(self.hidden):
            spikes = current(module, torch.zeros_like(spikes), f"hidden connection {index}")
            found.append(_dropped(spikes, dropped.get(f"hidden.{index}")))
        return found


def _dropped(values: Tensor, factor: Tensor | None) -> Tensor:
    return values if factor is None else values * factor


def _add(connection: Map, total: Tensor, spikes: Tensor, factor: Tensor | None) -> None:
    """total += factor * (W spikes), in place."""
    if factor is None:
        connection.add(total, spikes)
        return
    arrived = torch.zeros_like(total)
    connection.add(arrived, spikes)
    total.addcmul_(arrived, factor)


def describe(model: FeedbackSNN) -> Network:
    """The plain description that `build` makes the same (untrained) module of; UsageError for a connection of an unsupported kind."""

    def plain_of(module: nn.Module, where: str) -> plain.Connection:
        return kind_of(module, f"{where} of '{model.name}'").describe(module)

    loops = enumerate(zip(model.loops, model.feedback, strict=True))
    return Network(
        name=model.name,
        input_shape=model.input_shape,
        input=plain_of(model.input, "the input connection"),
        hidden=tuple(plain_of(module, f"hidden connection {i}") for i, module in enumerate(model.hidden)),
        feedback=tuple(
            plain.Feedback(source, target, plain_of(module, f"feedback connection {i}")) for i, ((source, target), module) in loops
        ),
        readout=plain.Linear(model.readout.in_features, model.readout.out_features, model.readout.bias is not None),
        neuron=model.neuron,
        time_steps=model.time_steps,
        feedback_steps=model.feedback_steps,
        scale_factor=model.scale_factor,
        dropout=model.dropout,
        normalize=None if model.normalize is None else model.normalize.settings,
    )


def build(network: Network) -> FeedbackSNN:
    """The untrained module of a description (torch's own initial weights); UsageError where its numbers contradict each other."""
    plain.check(network)

    def module_of(connection: plain.Connection) -> nn.Module:
        return BUILDERS[type(connection)](connection)

    return FeedbackSNN(
        name=network.name,
        input_shape=network.input_shape,
        input=module_of(network.input),
        hidden=[module_of(connection) for connection in network.hidden],
        feedback=[(loop.source, loop.target, module_of(loop.connection)) for loop in network.feedback],
        readout=cast(nn.Linear, module_of(network.readout)),
        neuron=network.neuron,
        time_steps=network.time_steps,
        feedback_steps=network.feedback_steps,
        scale_factor=network.scale_factor,
        dropout=network.dropout,
        normalize=None if network.normalize is None else Normalize(network.normalize.mean, network.normalize.std),
    )
