"""What a feedback spiking network is, as plain data: enough to build its modules again, to check a config, to travel in a checkpoint.

No torch here; `layers.build` makes the modules and `layers.describe` reads them back. A new kind of connection is one more struct in `Connection`.
"""

from __future__ import annotations

from math import isfinite, prod
from typing import Annotated, Union

import msgspec

from toolchain.errors import UsageError

Count = Annotated[int, msgspec.Meta(ge=1)]
Shape = tuple[int, ...]

MOST_AXES = 8
MOST_WEIGHTS = 2**31
"""No connection has more weights than this: 8 GiB in float32."""
MOST_STEPS = 100_000
LARGEST = 1e30
"""Potentials are float32 while they are trained; settings up to this size, and down to its inverse, leave them room."""
LARGEST_INPUT = 1e6
"""Inputs are of the order of 1 to 255; a mean or standard deviation beyond this (or below its inverse) is a mistake."""

CLIPPED_FROM = 0.98
"""A couple counts as clipped from this fraction of the largest |beta| on: the first steps, before the error arrives, may pass without a spike."""


class Neuron(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ternary couple of one network (IDE, Xiao et al., NeurIPS 2021; SPIDE, Xiao et al., Neural Networks 2023), in the model's unit of potential.

    forward stage:  v = u + I;  s = 1[v >= threshold];                           u = leak * (v - reset * s)
    feedback stage: v = y + J;  q = 1[v >= threshold_back] - 1[v <= -threshold_back];  y = leak * (v - reset_back * q)

    `leak` is 1 for IF neurons, below 1 for LIF. The resting potentials set the amounts that a spike subtracts; resting at -threshold makes the
    rate's rounding error symmetric.
    """

    threshold: float = 1.0
    u_rest: float = -1.0
    threshold_back: float = 0.5
    u_rest_back: float = -0.5
    leak: float = 1.0

    @property
    def reset(self) -> float:
        """A = Vth - u_rest, subtracted from the potential on a forward spike."""
        return self.threshold - self.u_rest

    @property
    def reset_back(self) -> float:
        """Ab = Vb - u_rest_back: subtracted on a feedback spike, and that spike's amplitude."""
        return self.threshold_back - self.u_rest_back


class Normalization(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """(x - mean) / std, one value a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Linear(msgspec.Struct, frozen=True, tag="linear", tag_field="type", forbid_unknown_fields=True):
    """A fully connected connection, weight (outputs, inputs)."""

    inputs: Count
    outputs: Count
    bias: bool = True


Connection = Union[Linear]  # one more struct here, one more entry in `layers.KINDS`


class Feedback(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A connection without bias from layer `source` to layer `target` (counted from 0), one step late."""

    source: int
    target: int
    connection: Connection


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A chain of couples: `input` feeds layer 0, `hidden[i]` joins layer i to i + 1, `readout` reads the last; `feedback` closes the loops."""

    name: str
    input_shape: tuple[Count, ...]
    input: Connection
    readout: Linear
    hidden: tuple[Connection, ...] = ()
    feedback: tuple[Feedback, ...] = ()
    neuron: Neuron = Neuron()
    time_steps: Count = 30
    feedback_steps: Count = 100
    scale_factor: float = 100.0
    dropout: float = 0.0
    normalize: Union[Normalization, None] = None


def check(network: Network) -> None:
    """UsageError, naming the layer and the fix, unless the numbers of `network` make sense together."""
    where = f"network '{network.name}'"
    neuron = network.neuron
    _require(
        all(isfinite(v) for v in (neuron.threshold, neuron.u_rest, neuron.threshold_back, neuron.u_rest_back, neuron.leak)),
        f"{where} has a NaN or infinite neuron setting: give every one a number",
    )
    _require(
        neuron.threshold > 0 and neuron.threshold_back > 0,
        f"{where} has thresholds {neuron.threshold} and {neuron.threshold_back}: both must be above 0",
    )
    _require(
        all(1 / LARGEST <= v <= LARGEST for v in (neuron.threshold, neuron.threshold_back))
        and all(abs(v) <= LARGEST for v in (neuron.u_rest, neuron.u_rest_back)),
        f"{where} has neuron settings that float32 cannot hold: keep thresholds and resting potentials between {1 / LARGEST:g} and {LARGEST:g}",
    )
    _require(
        neuron.reset > 0 and neuron.reset_back > 0,
        f"{where} subtracts {neuron.reset} (forward) and {neuron.reset_back} (feedback) on a spike: rest below the threshold",
    )
    _require(0 < neuron.leak <= 1, f"{where} has leak {neuron.leak}: it must lie in (0, 1], where 1 is an IF neuron")
    _require(0 <= network.dropout < 1, f"{where} has dropout {network.dropout}: it must lie in [0, 1)")
    _require(
        1 / LARGEST <= network.scale_factor <= LARGEST,
        f"{where} has scale factor {network.scale_factor}: it must be above 0 (from {1 / LARGEST:g} to {LARGEST:g})",
    )
    for label, steps in (("time_steps", network.time_steps), ("feedback_steps", network.feedback_steps)):
        _require(1 <= steps <= MOST_STEPS, f"{where} has {label} {steps}: give 1 to {MOST_STEPS}")
    _require(
        1 <= len(network.input_shape) <= MOST_AXES and all(n >= 1 for n in network.input_shape),
        f"{where} has an input_shape with {len(network.input_shape)} axes: give 1 to {MOST_AXES}, each of length 1 or more",
    )
    _check_sizes(network, where)
    if network.normalize is not None:
        _check_normalization(network.normalize, network.input_shape[0], where)
    _check_shapes(network, where)


def _check_normalization(normalize: Normalization, channels: int, where: str) -> None:
    for label, values in (("means", normalize.mean), ("standard deviations", normalize.std)):
        _require(
            len(values) in (1, channels), f"{where} normalises with {len(values)} {label}: give one, or one for each of {channels} channels"
        )
        _require(all(isfinite(v) for v in values), f"{where} normalises with NaN or infinite {label}: give numbers")
    _require(all(v > 0 for v in normalize.std), f"{where} normalises with standard deviation {min(normalize.std)}: it must be above 0")
    _require(
        all(abs(v) <= LARGEST_INPUT for v in normalize.mean) and all(1 / LARGEST_INPUT <= v <= LARGEST_INPUT for v in normalize.std),
        f"{where} normalises with means {normalize.mean} and standard deviations {normalize.std}: "
        f"give means up to {LARGEST_INPUT:g} and standard deviations from {1 / LARGEST_INPUT:g} to {LARGEST_INPUT:g}",
    )


def _check_sizes(network: Network, where: str) -> None:
    named = [("the input connection", network.input), ("the readout", network.readout)]
    named += [(f"hidden connection {index}", connection) for index, connection in enumerate(network.hidden)]
    named += [(f"feedback {index}", loop.connection) for index, loop in enumerate(network.feedback)]
    for name, connection in named:
        _require(
            connection.inputs * connection.outputs <= MOST_WEIGHTS,
            f"{where}: {name} joins {connection.inputs} values to {connection.outputs}, more than {MOST_WEIGHTS} weights: make it smaller",
        )


def layer_shapes(network: Network) -> tuple[Shape, ...]:
    """The shape of each layer, without the samples; UsageError names the connection that does not fit its source."""
    where = f"network '{network.name}'"
    shapes = [output_shape(network.input, network.input_shape, f"{where}: the input connection")]
    for index, connection in enumerate(network.hidden):
        shapes.append(output_shape(connection, shapes[-1], f"{where}: hidden connection {index}"))
    return tuple(shapes)


def output_shape(connection: Connection, shape: Shape, where: str) -> Shape:
    """What a connection makes of `shape`; a new kind of connection is one more branch."""
    _require(
        prod(shape) == connection.inputs,
        f"{where} takes {connection.inputs} values but its source of shape {shape} has {prod(shape)}: make them equal",
    )
    return (connection.outputs,)


def _check_shapes(network: Network, where: str) -> None:
    shapes = layer_shapes(network)
    output_shape(network.readout, shapes[-1], f"{where}: the readout")
    for index, loop in enumerate(network.feedback):
        name = f"{where}: feedback {index}"
        ends = (loop.source, loop.target)
        _require(
            all(0 <= end < len(shapes) for end in ends),
            f"{name} joins layers {loop.source} and {loop.target}, but the layers are 0 to {len(shapes) - 1}",
        )
        _require(not loop.connection.bias, f"{name} has a bias: give bias to the forward connections only")
        made = output_shape(loop.connection, shapes[loop.source], name)
        _require(
            prod(made) == prod(shapes[loop.target]),
            f"{name} makes shape {made} but layer {loop.target} has {shapes[loop.target]}: make them equal",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)
