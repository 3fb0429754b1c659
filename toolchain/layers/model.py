"""A feedback spiking neural network as a module, and the time steps that take it to its forward equilibrium.

    v = u_l + I_l[t];   s_l[t] = 1[v >= Vth];   u_l = leak * (v - A s_l[t])   (IDE, Xiao et al., NeurIPS 2021)
    I_0[t] = Fx(x),   I_l[t] = W_l s_{l-1}[t] + b_l,   plus W_f s_k[t-1] for every feedback connection from layer k

A network is a chain of connections (see `layers.connections`), feedback connections from any layer to any layer, and a readout. Nothing here knows
the insides of a connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from math import prod

import torch
from torch import Tensor, nn

from toolchain import network as plain
from toolchain.errors import UsageError
from toolchain.ir import leak_sum
from toolchain.layers import connections
from toolchain.layers import events as stepping
from toolchain.layers.connections import Statistics, current
from toolchain.layers.events import Kernel, Stage
from toolchain.layers.maps import Map
from toolchain.network import Network, Neuron, Normalization, TrainedThreshold


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


@dataclass(frozen=True)
class Firing:
    """How a layer fires: at `threshold`, losing `reset`, with spikes of `amplitude`, its current multiplied by `gain`."""

    threshold: float
    reset: float
    amplitude: float
    gain: float


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
    `readout` turns the last rates into logits (None: they are the logits). `weighted_readout`, `dropout_of` and `trained_threshold` are those of
    `network.Network`; with the last, `thresholds[l]` is layer l's. Inputs are (samples, *input_shape), flattened or not, held for all T steps; or events with time
    as the last axis, (samples, *input_shape, T). Raises UsageError where the parts do not fit.
    """

    def __init__(
        self,
        *,
        name: str,
        input_shape: Sequence[int],
        input: nn.Module,
        readout: nn.Module | None,
        hidden: Sequence[nn.Module] = (),
        feedback: Sequence[tuple[int, int, nn.Module]] = (),
        neuron: Neuron | None = None,
        time_steps: int = 30,
        feedback_steps: int = 100,
        scale_factor: float = 100.0,
        dropout: float = 0.0,
        normalize: Normalize | None = None,
        dropout_of: Mapping[str, float] | None = None,
        weighted_readout: bool = True,
        trained_threshold: TrainedThreshold | None = None,
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
        self.dropout_of = dict(dropout_of or {})
        self.weighted_readout = weighted_readout
        self.trained_threshold = trained_threshold
        self.thresholds = nn.ParameterList()
        if trained_threshold is not None:
            self.thresholds.extend(nn.Parameter(torch.tensor(trained_threshold.threshold)) for _ in range(self.layers))
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

    @property
    def leak(self) -> float:
        """What a potential keeps from one step to the next: 1 for IF neurons."""
        return self.neuron.leak if self.trained_threshold is None else self.trained_threshold.leak

    @property
    def classes(self) -> int:
        """How many logits there are."""
        return describe(self).classes

    def firing(self) -> tuple[Firing, ...]:
        """How each layer fires, with trained thresholds as they are now."""
        neuron, trained = self.neuron, self.trained_threshold
        if trained is None:
            return (Firing(neuron.threshold, neuron.reset, 1.0, 1.0),) * self.layers
        thresholds = [float(v.detach()) for v in self.thresholds]
        if trained.tau is None:
            return tuple(Firing(trained.alpha * v, v, v, 1.0) for v in thresholds)
        return tuple(Firing(trained.alpha * v, v, v / trained.dt, 1 - trained.leak) for v in thresholds)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (samples, classes) after T time steps. Dropout is the training method's affair; batch normalisation of the input, while training,
        uses the batch."""
        return self.logits(self.readout_rates(self.equilibrium(x)))

    def readout_rates(self, found: Equilibrium) -> Tensor:
        """What the readout sees of the last layer, (samples, *shape): rates, leak-weighted or plain, times the amplitude of a spike."""
        rates = found.rates[-1] if self.weighted_readout else found.counts[-1].to(found.rates[-1]) / self.time_steps
        amplitude = self.firing()[-1].amplitude
        return rates if amplitude == 1 else rates * amplitude

    def logits(self, rates: Tensor) -> Tensor:
        """Logits (samples, classes) of what the readout sees."""
        return rates.flatten(1) if self.readout is None else current(self.readout, rates, "the readout")

    def dropout_shares(self) -> dict[str, float]:
        """The share of neurons that each connection, by name, drops out of its target's current."""
        return {name: self.dropout_of.get(name, self.dropout) for name in self.connections()}

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
    def equilibrium(
        self, x: Tensor, *, dropout: Mapping[str, Tensor] | None = None, trace: bool = False, kernel: Kernel = "auto"
    ) -> Equilibrium:
        """Run the T time steps (see the module) and return rates, counts and (with `trace`) spike trains.

        `dropout` holds one factor per connection name and neuron, (samples, *target shape), shared by all time steps. `kernel` says what runs the
        steps: the same equations, currents summed in another order.
        """
        dropped, firing, leak = dropout or {}, self.firing(), self.leak
        values, events = self.prepared(x)
        shapes, maps = self.layer_shapes(), self.maps()
        statistics = self._input_statistics(values, events)
        frame = values[..., 0] if events else values
        constant = self._input_current(frame, statistics, shapes[0], dropped)
        bias = self._biases(constant, shapes, dropped)
        if stepping.chosen(kernel, list(maps.values()), constant):
            stage = self._stage(maps, bias, dropped, len(constant))
            currents = (
                (self._input_current(values[..., t], statistics, shapes[0], dropped) for t in range(self.time_steps)) if events else None
            )
            return self._native_equilibrium(stage, values, currents, trace=trace)
        potentials = [constant.new_zeros(len(constant), *shape) for shape in shapes]
        spikes, previous = [[torch.zeros_like(p) for p in potentials] for _ in range(2)]
        counts = [torch.zeros_like(p) for p in potentials]
        weighted = [torch.zeros_like(p) for p in potentials] if leak < 1 else counts
        trains: list[list[Tensor]] = [[] for _ in potentials]
        for step in range(self.time_steps):
            spikes, previous = previous, spikes
            if events and step > 0:
                bias[0] = self._input_current(values[..., step], statistics, shapes[0], dropped)
            for layer, potential in enumerate(potentials):
                potential.add_(bias[layer], alpha=firing[layer].gain)
                if layer > 0:
                    _add(maps[f"hidden.{layer - 1}"], potential, spikes[layer - 1], dropped.get(f"hidden.{layer - 1}"))
                for index, (source, target) in enumerate(self.loops):
                    if target == layer and step > 0:
                        _add(maps[f"feedback.{index}"], potential, previous[source], dropped.get(f"feedback.{index}"))
                torch.ge(potential, firing[layer].threshold, out=spikes[layer])
                potential.sub_(spikes[layer], alpha=firing[layer].reset)
                counts[layer] += spikes[layer]
                if leak < 1:
                    potential *= leak
                    weighted[layer].mul_(leak).add_(spikes[layer])
                if trace:
                    trains[layer].append(spikes[layer].to(torch.int8))
        norm = leak_sum(leak, self.time_steps)
        return Equilibrium(
            rates=tuple(w / norm for w in weighted),
            counts=tuple(c.to(torch.int32) for c in counts),
            mean_input=values.mean(-1) if events else values,
            trains=tuple(torch.stack(train) for train in trains) if trace else (),
        )

    def _stage(self, maps: Mapping[str, Map], bias: Sequence[Tensor], dropped: Mapping[str, Tensor], samples: int) -> Stage:
        """The forward time steps laid out for the native kernel."""
        layers = [
            stepping.Neurons(shape, firing.threshold, firing.reset, current * firing.gain)
            for shape, firing, current in zip(self.layer_shapes(), self.firing(), bias, strict=True)
        ]
        currents = [
            stepping.Current(source, target, maps[name], late=name.startswith("feedback"), factor=dropped.get(name))
            for name, (source, target, _) in self.connections().items()
            if source is not None
        ]
        return Stage(layers, currents, samples, leak=self.leak, signed=False, dtype=bias[0].dtype)

    def _native_equilibrium(self, stage: Stage, values: Tensor, currents: Iterable[Tensor] | None, *, trace: bool) -> Equilibrium:
        """The equilibrium that `stage` reaches; `currents` are those of the input at each step, where they change."""
        trains: list[list[Tensor]] = [[] for _ in range(self.layers)]
        if currents is None and not trace:
            stage.run(self.time_steps)
        else:
            gain = self.firing()[0].gain
            for current in repeat(None, self.time_steps) if currents is None else currents:
                if current is not None:
                    stage.drive(0, current * gain)
                stage.run(1)
                for layer, train in enumerate(trains if trace else []):
                    train.append(stage.unpacked(stage.spikes[layer], layer).clone())
        norm = leak_sum(self.leak, self.time_steps)
        return Equilibrium(
            rates=tuple(stage.unpacked(total, layer) / norm for layer, total in enumerate(stage.sums)),
            counts=tuple(stage.unpacked(count, layer) for layer, count in enumerate(stage.counts)),
            mean_input=values if currents is None else values.mean(-1),
            trains=tuple(torch.stack(train) for train in trains) if trace else (),
        )

    def maps(self) -> dict[str, Map]:
        """The linear part of every connection but the input's, by name, prepared for spikes of amplitude 1."""
        shapes, firing = self.layer_shapes(), self.firing()
        found = {}
        for name, (source, target, module) in self.connections().items():
            if source is not None:
                factor = firing[source].amplitude * firing[target].gain
                found[name] = connections.prepare(module, shapes[source], f"connection '{name}'", factor)
        return found

    def weighted_input(self, x: Tensor) -> Tensor:
        """The normalised input; events weighted as the leak weights currents, sum leak^(T-t) x[t] / sum leak^k."""
        values, events = self.prepared(x)
        return self._weighted_mean(values) if events else values

    def _weighted_mean(self, frames: Tensor) -> Tensor:
        if self.leak == 1:
            return frames.mean(-1)
        powers = torch.arange(self.time_steps - 1, -1, -1, dtype=frames.dtype, device=frames.device)
        weights: Tensor = self.leak**powers / leak_sum(self.leak, self.time_steps)
        return frames @ weights

    def _input_statistics(self, values: Tensor, events: bool) -> Statistics:
        """What batch normalisation of the input uses: running statistics, while training the batch's, for events those of the mean's current."""
        if not self.training:
            return "running"
        if not events:
            return "batch"
        return connections.event_statistics(self.input, self._weighted_mean(values), "the input connection")

    def _input_current(self, frame: Tensor, statistics: Statistics, shape: tuple[int, ...], dropped: Mapping[str, Tensor]) -> Tensor:
        made = current(self.input, frame, "the input connection", statistics).reshape(len(frame), *shape)
        return _dropped(made, dropped.get("input"))

    def _biases(self, constant: Tensor, shapes: tuple[tuple[int, ...], ...], dropped: Mapping[str, Tensor]) -> list[Tensor]:
        """What each layer receives at every step whatever spikes arrive: layer 0 its input current, the others their bias, (samples or 1, *shape)."""
        found = [constant]
        for index, module in enumerate(self.hidden):
            made = connections.constant(module, shapes[index], f"hidden connection {index}")
            if made is None:
                made = constant.new_zeros(1, *shapes[index + 1])
            found.append(_dropped(made.reshape(1, *shapes[index + 1]), dropped.get(f"hidden.{index}")))
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
        return connections.describe(module, f"{where} of '{model.name}'")

    loops = enumerate(zip(model.loops, model.feedback, strict=True))
    return Network(
        name=model.name,
        input_shape=model.input_shape,
        input=plain_of(model.input, "the input connection"),
        hidden=tuple(plain_of(module, f"hidden connection {i}") for i, module in enumerate(model.hidden)),
        feedback=tuple(
            plain.Feedback(source, target, plain_of(module, f"feedback connection {i}")) for i, ((source, target), module) in loops
        ),
        readout=None if model.readout is None else plain_of(model.readout, "the readout"),
        neuron=model.neuron,
        time_steps=model.time_steps,
        feedback_steps=model.feedback_steps,
        scale_factor=model.scale_factor,
        dropout=model.dropout,
        normalize=None if model.normalize is None else model.normalize.settings,
        dropout_of=model.dropout_of,
        weighted_readout=model.weighted_readout,
        trained_threshold=model.trained_threshold,
    )


def build(network: Network) -> FeedbackSNN:
    """The untrained module of a description (torch's own initial weights); UsageError where its numbers contradict each other."""
    plain.check(network)
    return FeedbackSNN(
        name=network.name,
        input_shape=network.input_shape,
        input=connections.build(network.input),
        hidden=[connections.build(connection) for connection in network.hidden],
        feedback=[(loop.source, loop.target, connections.build(loop.connection)) for loop in network.feedback],
        readout=None if network.readout is None else connections.build(network.readout),
        neuron=network.neuron,
        time_steps=network.time_steps,
        feedback_steps=network.feedback_steps,
        scale_factor=network.scale_factor,
        dropout=network.dropout,
        normalize=None if network.normalize is None else Normalize(network.normalize.mean, network.normalize.std),
        dropout_of=network.dropout_of,
        weighted_readout=network.weighted_readout,
        trained_threshold=network.trained_threshold,
    )
