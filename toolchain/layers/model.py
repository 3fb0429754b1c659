"""A feedback spiking neural network as a module, and the time steps that take it to its forward equilibrium.

    v = u_l + I_l[t];   s_l[t] = 1[v >= Vth];   u_l = leak * (v - A s_l[t])   (IDE, Xiao et al., NeurIPS 2021)
    I_0[t] = Fx(x),   I_l[t] = W_l s_{l-1}[t] + b_l,   plus W_f s_k[t-1] for every feedback connection from layer k

A network is a chain of connections (see `layers.connections`), feedback connections from any layer to any layer, and a readout. Skips lead to later layers
beside the chain, within the same step; a relay is a layer without neurons, r_l[t] = I_l[t], the stream of a residual network. Nothing here knows the insides
of a connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from math import inf, prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from toolchain import network as plain
from toolchain.errors import UsageError
from toolchain.ir import leak_sum
from toolchain.layers import connections, stepping
from toolchain.layers.connections import Statistics, current
from toolchain.layers.maps import Map
from toolchain.layers.stepping import Kernel, Stage
from toolchain.network import Counts, Network, Neuron, Normalization, TrainedThreshold


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
    """How a layer fires: at `threshold`, losing `reset`, with spikes of `amplitude`, its current multiplied by `gain`. A relay never does."""

    threshold: float
    reset: float
    amplitude: float
    gain: float


RELAY = Firing(inf, 0.0, 1.0, 1.0)


class Arriving(NamedTuple):
    """A connection that reaches a layer within the step: its name, the layer it comes from (None: the input), and the module."""

    name: str
    source: int | None
    module: nn.Module


@dataclass(frozen=True)
class Equilibrium:
    """What T steps leave behind, a tensor a layer.

    rates       (samples, *shape), (leak-weighted) average firing rates; of a relay the (leak-weighted) mean of what it passes on
    counts      (samples, *shape), spike counts as int32; of a relay the sum of what it passes on
    mean_input  (samples, *input shape), the normalised input, averaged over time for events
    trains      (T, samples, *shape) int8, where they were asked for; of a relay what it passes on
    """

    rates: tuple[Tensor, ...]
    counts: tuple[Tensor, ...]
    mean_input: Tensor
    trains: tuple[Tensor, ...] = ()


class FeedbackSNN(nn.Module):
    """A chain of spiking layers with feedback and a linear readout of the last layer's rates.

    `input` makes the current of layer 0, `hidden[i]` joins layer i to i + 1, `feedback` lists (source layer, target layer, connection), one step late,
    `skips` (source layer or None for the input, later layer, connection), within the step, and `relays` the layers that have no neurons.
    `readout` turns the last rates into logits (None: they are the logits). `weighted_readout`, `dropout_of` and `trained_threshold` are those of
    `network.Network`; with the last, `thresholds` has one number for each layer that fires, in order. Inputs are (samples, *input_shape), flattened or not, held for all T steps; or events with time
    as the last axis, (samples, *input_shape, T). `events` says which of both, where it is known (None: the input's shape tells, see `lower.takes_events`); it is not part of
    the description. Raises UsageError where the parts do not fit.
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
        skips: Sequence[tuple[int | None, int, nn.Module]] = (),
        relays: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.name = name
        self.input_shape = tuple(input_shape)
        self.input = input
        self.hidden = nn.ModuleList(hidden)
        self.feedback = nn.ModuleList(module for _, _, module in feedback)
        self.loops = tuple((source, target) for source, target, _ in feedback)
        self.skip = nn.ModuleList(module for _, _, module in skips)
        self.shortcuts = tuple((source, target) for source, target, _ in skips)
        self.relays = tuple(relays)
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
        self.events: bool | None = None
        self.thresholds = nn.ParameterList()
        if trained_threshold is not None:
            self.thresholds.extend(nn.Parameter(torch.tensor(trained_threshold.threshold)) for _ in self.spiking)
        plain.check(describe(self))
        used = [module for _, _, module in self.connections().values()] + ([] if readout is None else [readout])
        weights = [id(weight) for module in used for weight in module.parameters()]
        if len(set(weights)) < len(weights):  # a gradient would miss a part, and a description has no word for it
            raise UsageError(f"network '{name}' uses one module for two connections: give each weights of its own")

    @property
    def layers(self) -> int:
        """Number of layers, relays included."""
        return 1 + len(self.hidden)

    @property
    def spiking(self) -> tuple[int, ...]:
        """The layers that have neurons."""
        return tuple(layer for layer in range(self.layers) if layer not in self.relays)

    def connections(self) -> dict[str, tuple[int | None, int, nn.Module]]:
        """Every connection between layers by its name in the state dict: (source layer, None for the input; target layer; module)."""
        chain: dict[str, tuple[int | None, int, nn.Module]] = {"input": (None, 0, self.input)}
        chain |= {f"hidden.{i}": (i, i + 1, module) for i, module in enumerate(self.hidden)}
        chain |= {f"feedback.{i}": (*ends, module) for i, (ends, module) in enumerate(zip(self.loops, self.feedback, strict=True))}
        return chain | {f"skip.{i}": (*ends, module) for i, (ends, module) in enumerate(zip(self.shortcuts, self.skip, strict=True))}

    def arriving(self) -> tuple[tuple[Arriving, ...], ...]:
        """What reaches each layer within the step: the chain's connection, then the skips."""
        found: list[list[Arriving]] = [[] for _ in range(self.layers)]
        for name, (source, target, module) in self.connections().items():
            if not name.startswith("feedback."):
                found[target].append(Arriving(name, source, module))
        return tuple(tuple(layer) for layer in found)

    def layer_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each layer, without the samples."""
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
            fixed = Firing(neuron.threshold, neuron.reset, 1.0, 1.0)
            return tuple(RELAY if layer in self.relays else fixed for layer in range(self.layers))
        per_step, gain = (1.0, 1.0) if trained.tau is None else (trained.dt, 1 - trained.leak)
        found = dict.fromkeys(range(self.layers), RELAY)
        for layer, threshold in self.layer_thresholds().items():
            v = float(threshold.detach().clamp(min=trained.bound))  # as DSR does before a batch: the last update may have gone below
            found[layer] = Firing(trained.alpha * v, v, v / per_step, gain)
        return tuple(found.values())

    def layer_thresholds(self) -> dict[int, nn.Parameter]:
        """The trained threshold of each layer that fires."""
        return dict(zip(self.spiking, self.thresholds, strict=True))

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
                f"'{self.name}' takes samples of shape {self.input_shape} ({prod(self.input_shape)} values) but the input has shape {tuple(x.shape)}: give one sample a row, from the data set that it was made for"
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
        arriving, maps = self.arriving(), self.maps()
        statistics = self._input_statistics(values, events)
        steady, late = self._biases(dropped), self._late_biases(dropped)
        driven = self._driven(values[..., 0] if events else values, statistics, dropped)
        if self._native(kernel, maps, driven[0], late):
            stage = self._stage(maps, {**steady, **driven}, dropped, driven[0])
            currents = (self._driven(values[..., t], statistics, dropped)[0] for t in range(self.time_steps)) if events else None
            return self._native_equilibrium(stage, values, currents, trace=trace)
        potentials = [driven[0].new_zeros(len(values), *shape) for shape in self.layer_shapes()]
        spikes, previous = [[torch.zeros_like(p) for p in potentials] for _ in range(2)]
        counts = [torch.zeros_like(p) for p in potentials]
        weighted = [torch.zeros_like(p) for p in potentials] if leak < 1 else counts
        trains: list[list[Tensor]] = [[] for _ in potentials]
        for step in range(self.time_steps):
            spikes, previous = previous, spikes
            if events and step > 0:
                driven = self._driven(values[..., step], statistics, dropped)
            for layer, potential in enumerate(potentials):
                relay = layer in self.relays
                if relay:
                    potential.zero_()
                for constant in (steady.get(layer), driven.get(layer), late.get(layer) if step > 0 else None):
                    if constant is not None:
                        potential.add_(constant, alpha=firing[layer].gain)
                for name, source, _ in arriving[layer]:
                    if source is not None:
                        _add(maps[name], potential, spikes[source], dropped.get(name))
                for index, (source, target) in enumerate(self.loops):
                    if target == layer and step > 0:
                        _add(maps[f"feedback.{index}"], potential, previous[source], dropped.get(f"feedback.{index}"))
                if relay:
                    spikes[layer].copy_(potential)
                else:
                    torch.ge(potential, firing[layer].threshold, out=spikes[layer])
                    potential.sub_(spikes[layer], alpha=firing[layer].reset)
                    if leak < 1:
                        potential *= leak
                counts[layer] += spikes[layer]
                if leak < 1:
                    weighted[layer].mul_(leak).add_(spikes[layer])
                if trace:
                    trains[layer].append(spikes[layer].clone() if relay else spikes[layer].to(torch.int8))
        norm = leak_sum(leak, self.time_steps)
        return Equilibrium(
            rates=tuple(w / norm for w in weighted),
            counts=tuple(c if layer in self.relays else c.to(torch.int32) for layer, c in enumerate(counts)),
            mean_input=values.mean(-1) if events else values,
            trains=tuple(torch.stack(train) for train in trains) if trace else (),
        )

    @torch.no_grad()
    def check_kernel(self, kernel: Kernel) -> None:
        """UsageError where `kernel` is none, or is the native one and cannot run the time steps where the weights are now."""
        self._native(kernel, self.maps(), next(self.parameters()), self._late_biases({}))

    def _native(self, kernel: Kernel, maps: Mapping[str, Map], like: Tensor, late: Mapping[int, Tensor]) -> bool:
        """Whether the native kernel runs the time steps on tensors like `like`: it knows neurons only, and currents of the input for layer 0 only."""
        plain_chain = not self.relays and not late and all(source is not None for source, _ in self.shortcuts)
        if kernel == "native" and not plain_chain:
            raise UsageError(
                f"the native kernel cannot run '{self.name}': it has relays, skips from the input or feedback with a bias; leave kernel at 'auto'"
            )
        able = stepping.chosen(kernel, list(maps.values()), like)  # refuses an unknown kernel, whatever the network
        return able and plain_chain

    def _stage(self, maps: Mapping[str, Map], bias: Mapping[int, Tensor], dropped: Mapping[str, Tensor], like: Tensor) -> Stage:
        """The forward time steps laid out for the native kernel; `like` has a row a sample."""
        layers = [
            stepping.Neurons(shape, firing.threshold, firing.reset, bias[layer] * firing.gain if layer in bias else None)
            for layer, (shape, firing) in enumerate(zip(self.layer_shapes(), self.firing(), strict=True))
        ]
        currents = [
            stepping.Current(source, target, maps[name], late=name.startswith("feedback"), factor=dropped.get(name))
            for name, (source, target, _) in self.connections().items()
            if source is not None
        ]
        return Stage(layers, currents, len(like), leak=self.leak, signed=False, dtype=like.dtype)

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

    def _input_statistics(self, values: Tensor, events: bool) -> dict[str, Statistics]:
        """What batch normalisation of the input's connections uses: running statistics, while training the batch's, for events those of the mean's current."""
        mean = self._weighted_mean(values) if events and self.training else values
        found: dict[str, Statistics] = {}
        for name, (source, _, module) in self.connections().items():
            if source is None:
                given = connections.event_statistics(module, mean, f"connection '{name}'") if events and self.training else None
                found[name] = given or ("batch" if self.training else "running")
        return found

    def _driven(self, frame: Tensor, statistics: Mapping[str, Statistics], dropped: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """The current that the input's connections make of one frame, by layer."""
        shapes, found = self.layer_shapes(), dict[int, Tensor]()
        for name, (source, target, module) in self.connections().items():
            if source is None:
                made = current(module, frame, f"connection '{name}'", statistics[name]).reshape(len(frame), *shapes[target])
                made = _dropped(made, dropped.get(name))
                found[target] = found[target] + made if target in found else made
        return found

    def _biases(self, dropped: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """What layers receive at every step whatever spikes arrive, by layer."""
        return self._constants([(a.name, a.source, layer, a.module) for layer, found in enumerate(self.arriving()) for a in found], dropped)

    def _late_biases(self, dropped: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """What feedback connections bring from the second step on whatever spikes arrive, by layer."""
        ends = enumerate(zip(self.loops, self.feedback, strict=True))
        return self._constants([(f"feedback.{i}", source, target, module) for i, ((source, target), module) in ends], dropped)

    def _constants(self, found: Sequence[tuple[str, int | None, int, nn.Module]], dropped: Mapping[str, Tensor]) -> dict[int, Tensor]:
        shapes, sums = self.layer_shapes(), dict[int, Tensor]()
        for name, source, target, module in found:
            made = None if source is None else connections.constant(module, shapes[source], f"connection '{name}'")
            if made is not None:
                made = _dropped(made.reshape(1, *shapes[target]), dropped.get(name))
                sums[target] = sums[target] + made if target in sums else made
        return sums


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
        skips=tuple(
            plain.Skip(source, target, plain_of(module, f"skip connection {i}"))
            for i, ((source, target), module) in enumerate(zip(model.shortcuts, model.skip, strict=True))
        ),
        relays=model.relays,
    )


def counts(model: FeedbackSNN) -> Counts:
    """Parameters, neurons of each layer, and multiply-adds a sample and step by connection; see `network.Counts`."""
    return plain.counts(describe(model))


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
        skips=[(skip.source, skip.target, connections.build(skip.connection)) for skip in network.skips],
        relays=network.relays,
    )
