"""What a feedback spiking network is, as plain data: enough to build its modules again, to check a config, to travel in a checkpoint.

No torch here; `layers.build` makes the modules and `layers.describe` reads them back. A new kind of connection is one more struct in `Connection`.
"""

from __future__ import annotations

from math import exp, isfinite, prod
from typing import Annotated, Union

import msgspec

from toolchain.errors import UsageError
from toolchain.ir import LARGEST_STEPS, MOST_AXES, MOST_NEURONS

__all__ = [
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm",
    "Chain",
    "Conv2d",
    "ConvTranspose2d",
    "Feedback",
    "Frobenius",
    "Gain",
    "Identity",
    "Linear",
    "Network",
    "Neuron",
    "Normalization",
    "Scale",
    "Skip",
    "Spectral",
    "TrainedThreshold",
    "Upsample",
]

Count = Annotated[int, msgspec.Meta(ge=1)]
Size = Annotated[int, msgspec.Meta(ge=0)]
Shape = tuple[int, ...]
TWO = msgspec.Meta(min_length=2, max_length=2)  # msgspec 0.22 reads wrong memory for tuple[Count, Count] beside a bounded int
Sides = Union[Count, Annotated[tuple[Count, ...], TWO]]
"""One number for height and width, or (height, width)."""
Margins = Union[Size, Annotated[tuple[Size, ...], TWO]]

MOST_WEIGHTS = 2**31
"""No network has more weights than this: 8 GiB in float32."""
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


class Spectral(msgspec.Struct, frozen=True, tag="spectral", tag_field="type", forbid_unknown_fields=True):
    """W = clip(gain, -norm, norm) w / sigma(w) with a trained scalar gain; sigma is the largest singular value of w as (first axis, rest) (IDE)."""

    norm: float = 1.0


class Frobenius(msgspec.Struct, frozen=True, tag="frobenius", tag_field="type", forbid_unknown_fields=True):
    """W = w min(|w|, norm) / |w| with the Frobenius norm |w|, a constant for the gradient (SPIDE)."""

    norm: float = 2.0


Limit = Union[Spectral, Frobenius]


class Linear(msgspec.Struct, frozen=True, tag="linear", tag_field="type", forbid_unknown_fields=True):
    """A fully connected connection, weight (outputs, inputs). `standardized`: scaled weight standardisation; `limit`: the weight's norm is restricted."""

    inputs: Count
    outputs: Count
    bias: bool = True
    standardized: bool = False
    limit: Union[Limit, None] = None


class Conv2d(msgspec.Struct, frozen=True, tag="conv2d", tag_field="type", forbid_unknown_fields=True):
    """A convolution, weight (outputs, inputs / groups, *kernel); inputs and outputs count channels, the rest is one number or (height, width).

    Each of `groups` equal shares of the inputs makes a share of the outputs; `dilation` is from one value under the kernel to the next.
    """

    inputs: Count
    outputs: Count
    kernel: Sides
    stride: Sides = 1
    padding: Margins = 0
    bias: bool = True
    standardized: bool = False
    limit: Union[Limit, None] = None
    groups: Count = 1
    dilation: Sides = 1


class ConvTranspose2d(msgspec.Struct, frozen=True, tag="conv-transpose2d", tag_field="type", forbid_unknown_fields=True):
    """A transposed convolution, weight (inputs, outputs / groups, *kernel): what feeds a small layer back to a large one. Settings as of `Conv2d`."""

    inputs: Count
    outputs: Count
    kernel: Sides
    stride: Sides = 1
    padding: Margins = 0
    output_padding: Margins = 0
    bias: bool = True
    limit: Union[Limit, None] = None
    groups: Count = 1
    dilation: Sides = 1


class AvgPool2d(msgspec.Struct, frozen=True, tag="avg-pool2d", tag_field="type", forbid_unknown_fields=True):
    """Means over squares of `kernel` x `kernel`, side by side unless `stride` says otherwise; `padding` zeros around the image count in the means.

    As a whole connection it makes a spiking pooling layer (LeNet).
    """

    kernel: Count
    stride: Union[Count, None] = None
    padding: Size = 0

    @property
    def step(self) -> int:
        """From one square to the next."""
        return self.kernel if self.stride is None else self.stride


class AdaptiveAvgPool2d(msgspec.Struct, frozen=True, tag="adaptive-avg-pool2d", tag_field="type", forbid_unknown_fields=True):
    """Means that leave an image of `size` x `size`, whatever the source's size: value i covers floor(i n / size) to ceil((i + 1) n / size) of n."""

    size: Count


class Upsample(msgspec.Struct, frozen=True, tag="upsample", tag_field="type", forbid_unknown_fields=True):
    """Every value repeated `factor` x `factor` times."""

    factor: Count


class Scale(msgspec.Struct, frozen=True, tag="scale", tag_field="type", forbid_unknown_fields=True):
    """Values times `factor` (OTTT's 2.74 after each neuron)."""

    factor: float


class Gain(msgspec.Struct, frozen=True, tag="gain", tag_field="type", forbid_unknown_fields=True):
    """Values times one trained number, at first `start` (skip-init's 0 in normaliser-free residual networks)."""

    start: float = 0.0


class Identity(msgspec.Struct, frozen=True, tag="identity", tag_field="type", forbid_unknown_fields=True):
    """Values as they are: the plain skip of a residual stream."""


class BatchNorm(msgspec.Struct, frozen=True, tag="batch-norm", tag_field="type", forbid_unknown_fields=True):
    """Batch normalisation of `features` channels (images) or values; simulations use the running statistics."""

    features: Count
    images: bool = False
    eps: float = 1e-5
    momentum: float = 0.1


Part = Union[Linear, Conv2d, ConvTranspose2d, AvgPool2d, AdaptiveAvgPool2d, Upsample, Scale, Gain, Identity, BatchNorm]


class Chain(msgspec.Struct, frozen=True, tag="chain", tag_field="type", forbid_unknown_fields=True):
    """Parts one after the other within a time step, with no neurons between: a torch.nn.Sequential."""

    parts: Annotated[tuple[Part, ...], msgspec.Meta(min_length=1)]


Connection = Union[Part, Chain]  # one more struct here, one more entry in `layers.connections`


class TrainedThreshold(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """DSR's neuron (Meng et al., CVPR 2022), whose threshold V is trained, one a layer. It fires at alpha V and subtracts V.

    IF (tau null):  v = u + x;                                    o = V 1[v >= alpha V];       u = v - o;  output o
    LIF:            v = beta u + (1 - beta) x, beta = exp(-dt/tau);  o = V 1[v >= alpha V];    u = v - o;  output o / dt

    Before each batch, V is raised to `bound` where it is lower.
    """

    threshold: float = 6.0
    alpha: float = 0.5
    bound: float = 0.01
    tau: Union[float, None] = None
    dt: float = 0.05

    @property
    def leak(self) -> float:
        """beta, 1 for IF."""
        return 1.0 if self.tau is None else exp(-self.dt / self.tau)


class Feedback(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A connection from layer `source` to layer `target` (counted from 0), one step late; its bias, too, acts from the second step on."""

    source: int
    target: int
    connection: Connection


class Skip(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A connection within the same step from layer `source` (null: from the input) to a later layer `target`, beside the chain's."""

    source: Union[int, None]
    target: int
    connection: Connection


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A chain of spiking layers: `input` feeds layer 0, `hidden[i]` joins layer i to i + 1, `readout` reads the last; `feedback` closes the loops.

    readout            null: the last layer's rates (times the spikes' amplitude) are the logits (DSR)
    weighted_readout   the readout sees leak-weighted rates (IDE, SPIDE, SAF-F), not plain spike counts over T (OTTT, SAF-E); the same where nothing leaks
    dropout            of every connection's current, but for those named in `dropout_of` ("input", "hidden.0", "feedback.0")
    trained_threshold  DSR's neuron in place of `neuron`
    skips              connections beside the chain, within the same step
    relays             layers without neurons, which pass the sum of their currents on within the same step: the stream of a residual network
    """

    name: str
    input_shape: tuple[Count, ...]
    input: Connection
    readout: Union[Connection, None]
    hidden: tuple[Connection, ...] = ()
    feedback: tuple[Feedback, ...] = ()
    neuron: Neuron = Neuron()
    time_steps: Count = 30
    feedback_steps: Count = 100
    scale_factor: float = 100.0
    dropout: float = 0.0
    normalize: Union[Normalization, None] = None
    dropout_of: dict[str, float] = {}
    weighted_readout: bool = True
    trained_threshold: Union[TrainedThreshold, None] = None
    skips: tuple[Skip, ...] = ()
    relays: tuple[int, ...] = ()

    @property
    def connections(self) -> dict[str, Connection]:
        """Every connection by its name in the state dict."""
        chain: dict[str, Connection] = {"input": self.input}
        chain |= {f"hidden.{i}": connection for i, connection in enumerate(self.hidden)}
        chain |= {f"feedback.{i}": loop.connection for i, loop in enumerate(self.feedback)}
        chain |= {f"skip.{i}": skip.connection for i, skip in enumerate(self.skips)}
        return chain if self.readout is None else {**chain, "readout": self.readout}

    @property
    def classes(self) -> int:
        """How many logits the network has."""
        shapes = layer_shapes(self)
        return prod(shapes[-1] if self.readout is None else output_shape(self.readout, shapes[-1], "the readout"))


def check(network: Network) -> None:
    """UsageError, naming the layer and the fix, unless the numbers of `network` make sense together."""
    where = f"network '{network.name}'"
    _require(network.name.isprintable(), f"network {network.name!r} has a name with characters that do not print: give it another")
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
    connections = network.connections
    for name, share in network.dropout_of.items():
        _require(name in connections, f"{where} drops out of '{name}': choose one of {', '.join(connections)}")
        _require(0 <= share < 1, f"{where} has dropout {share} of '{name}': it must lie in [0, 1)")
    if network.trained_threshold is not None:
        _check_threshold(network.trained_threshold, where)
    _require(
        1 / LARGEST <= network.scale_factor <= LARGEST,
        f"{where} has scale factor {network.scale_factor}: it must be above 0 (from {1 / LARGEST:g} to {LARGEST:g})",
    )
    for label, steps in (("time_steps", network.time_steps), ("feedback_steps", network.feedback_steps)):
        _require(1 <= steps <= LARGEST_STEPS, f"{where} has {label} {steps}: give 1 to {LARGEST_STEPS}")
    _require(
        1 <= len(network.input_shape) <= MOST_AXES and all(n >= 1 for n in network.input_shape),
        f"{where} has an input_shape with {len(network.input_shape)} axes: give 1 to {MOST_AXES}, each of length 1 or more",
    )
    _require(
        prod(network.input_shape) <= MOST_NEURONS,
        f"{where} takes {prod(network.input_shape):,} values, more than {MOST_NEURONS:,}: give less",
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
    total = 0
    for name, connection in network.connections.items():
        weights = sum(_weights(part) for part in parts_of(connection))
        total += weights
        _require(weights <= MOST_WEIGHTS, f"{where}: connection '{name}' has {weights} weights, more than {MOST_WEIGHTS}: make it smaller")
    _require(total <= MOST_WEIGHTS, f"{where} has {total} weights, more than {MOST_WEIGHTS}: make its connections smaller")


def _weights(part: Part) -> int:
    """How many weights a part has, biases and gains aside."""
    if isinstance(part, Linear):
        return part.inputs * part.outputs
    if isinstance(part, (Conv2d, ConvTranspose2d)):
        return part.inputs * part.outputs * prod(pair(part.kernel)) // part.groups
    return 0


def _outputs(part: Part) -> int:
    return part.outputs if isinstance(part, (Linear, Conv2d, ConvTranspose2d)) else 0


def _check_threshold(neuron: TrainedThreshold, where: str) -> None:
    numbers = (neuron.threshold, neuron.alpha, neuron.bound, neuron.dt, 1.0 if neuron.tau is None else neuron.tau)
    _require(
        all(isfinite(v) and v > 0 for v in numbers),
        f"{where} has a trained threshold with a setting that is not above 0: give positive numbers",
    )
    _require(neuron.alpha < 1, f"{where} fires at alpha = {neuron.alpha} thresholds: it must lie below 1")


def layer_shapes(network: Network) -> tuple[Shape, ...]:
    """The shape of each layer, without the samples; UsageError names the connection that does not fit its source."""
    where = f"network '{network.name}'"
    shapes = [output_shape(network.input, network.input_shape, f"{where}: the input connection")]
    for index, connection in enumerate(network.hidden):
        shapes.append(output_shape(connection, shapes[-1], f"{where}: hidden connection {index}"))
    return tuple(shapes)


def parts_of(connection: Connection) -> tuple[Part, ...]:
    """The parts of a connection, in order."""
    return connection.parts if isinstance(connection, Chain) else (connection,)


def output_shape(connection: Connection, shape: Shape, where: str) -> Shape:
    """What a connection makes of `shape`; UsageError starts with `where`."""
    for part in parts_of(connection):
        shape = _part_shape(part, shape, where)
        _require(prod(shape) <= MOST_NEURONS, f"{where} makes {prod(shape):,} values, more than {MOST_NEURONS:,}: make it smaller")
    return shape


def _part_shape(part: Part, shape: Shape, where: str) -> Shape:
    """A new kind of connection is one more branch."""
    if isinstance(part, Linear):
        _require(
            prod(shape) == part.inputs,
            f"{where} takes {part.inputs} values but its source of shape {shape} has {prod(shape)}: make them equal",
        )
        return (part.outputs,)
    if isinstance(part, (Scale, Gain)):
        factor = part.factor if isinstance(part, Scale) else part.start
        _require(isfinite(factor), f"{where} scales by {factor}: give a number")
        return shape
    if isinstance(part, Identity):
        return shape
    if isinstance(part, BatchNorm):
        _require(
            shape[0] == part.features, f"{where} normalises {part.features} features but its source has shape {shape}: make them equal"
        )
        _require(
            part.images == (len(shape) == 3),
            f"{where} normalises shape {shape} with BatchNorm{'2d' if part.images else '1d'}: use the other",
        )
        return shape
    _require(len(shape) == 3, f"{where} needs a source of shape (channels, height, width) but it has shape {shape}")
    if isinstance(part, (Conv2d, ConvTranspose2d)):
        _require(shape[0] == part.inputs, f"{where} takes {part.inputs} channels but its source has shape {shape}: make them equal")
        _check_convolution(part, where)
        return _positive((part.outputs, *(_convolved(part, shape[1 + axis], axis) for axis in (0, 1))), where, shape)
    if isinstance(part, Upsample):
        return (shape[0], shape[1] * part.factor, shape[2] * part.factor)
    if isinstance(part, AdaptiveAvgPool2d):
        return (shape[0], part.size, part.size)
    _require(2 * part.padding <= part.kernel, f"{where} pads by {part.padding} for squares of {part.kernel}: pad by half of that at most")
    return _positive((shape[0], *((size + 2 * part.padding - part.kernel) // part.step + 1 for size in shape[1:])), where, shape)


def pair(value: Union[int, tuple[int, ...]]) -> tuple[int, int]:
    """(height, width) of a setting that may be one number for both."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _check_convolution(part: Union[Conv2d, ConvTranspose2d], where: str) -> None:
    _require(
        min(*pair(part.kernel), *pair(part.stride), *pair(part.dilation)) >= 1 and min(pair(part.padding)) >= 0,
        f"{where} has kernel {part.kernel}, stride {part.stride}, dilation {part.dilation} and padding {part.padding}: "
        "give at least 1, and 0 for the padding",
    )
    _require(
        part.inputs % part.groups == part.outputs % part.groups == 0,
        f"{where} has {part.inputs} channels in and {part.outputs} out in {part.groups} groups: groups must divide both",
    )
    if isinstance(part, ConvTranspose2d):
        added, most = pair(part.output_padding), [max(ways) for ways in zip(pair(part.stride), pair(part.dilation), strict=True)]
        _require(
            all(0 <= extra < limit for extra, limit in zip(added, most, strict=True)),
            f"{where} has output padding {part.output_padding}, stride {part.stride} and dilation {part.dilation}: "
            "keep the output padding at 0 or more, below the larger of the others",
        )


def _convolved(part: Union[Conv2d, ConvTranspose2d], size: int, axis: int) -> int:
    """How long an image of `size` values becomes along one axis, 0 for height."""
    stride, padding = pair(part.stride)[axis], pair(part.padding)[axis]
    covered = pair(part.dilation)[axis] * (pair(part.kernel)[axis] - 1) + 1
    if isinstance(part, ConvTranspose2d):
        return (size - 1) * stride - 2 * padding + covered + pair(part.output_padding)[axis]
    return (size + 2 * padding - covered) // stride + 1


def _positive(made: Shape, where: str, shape: Shape) -> Shape:
    _require(all(size > 0 for size in made), f"{where} leaves nothing of its source of shape {shape}: make the source larger")
    return made


def has_bias(connection: Connection) -> bool:
    """Whether a connection makes a current without spikes."""
    return any(isinstance(p, BatchNorm) or (isinstance(p, (Linear, Conv2d, ConvTranspose2d)) and p.bias) for p in parts_of(connection))


def _check_shapes(network: Network, where: str) -> None:
    shapes = layer_shapes(network)
    for name, connection in network.connections.items():
        for part in parts_of(connection):
            _check_weight(part, f"{where}: connection '{name}'")
    if network.readout is not None:
        made = output_shape(network.readout, shapes[-1], f"{where}: the readout")
        _require(len(made) == 1, f"{where}: the readout makes shape {made}: end it with a Linear")
    layers = len(shapes)
    for index, loop in enumerate(network.feedback):
        name = f"{where}: feedback {index}"
        ends = (loop.source, loop.target)
        _require(
            all(0 <= end < layers for end in ends),
            f"{name} joins layers {loop.source} and {loop.target}, but the layers are 0 to {layers - 1}",
        )
        _require(
            not any(isinstance(part, BatchNorm) for part in parts_of(loop.connection)),
            f"{name} has batch normalisation: normalise the forward connections only",
        )
        _check_end(loop.connection, shapes[loop.source], loop.target, shapes, name)
    for index, skip in enumerate(network.skips):
        name = f"{where}: skip {index}"
        source = -1 if skip.source is None else skip.source
        _require(
            (skip.source is None or source >= 0) and source < skip.target < layers,
            f"{name} joins {'the input' if skip.source is None else f'layer {source}'} and layer {skip.target}: "
            f"lead to a later layer, of 0 to {layers - 1}, within the same step",
        )
        _check_end(skip.connection, network.input_shape if skip.source is None else shapes[source], skip.target, shapes, name)
    _require(
        list(network.relays) == sorted(set(network.relays)) and all(0 <= layer < layers for layer in network.relays),
        f"{where} has relays {list(network.relays)}: name layers of 0 to {layers - 1}, each once, in order",
    )
    _require(len(network.relays) < layers, f"{where} has relays only: leave at least one layer its neurons")


def _check_end(connection: Connection, source: Shape, target: int, shapes: tuple[Shape, ...], name: str) -> None:
    made, wanted = output_shape(connection, source, name), shapes[target]
    _require(
        made == wanted or (len(made) == 1 and prod(made) == prod(wanted)),
        f"{name} makes shape {made} but layer {target} has {wanted}: make them equal",
    )


class Counts(msgspec.Struct, frozen=True):
    """What a network costs.

    parameters      trained numbers: weights, biases, gains, batch normalisation's scales and shifts, thresholds
    neurons         of each layer, 0 for a relay
    multiply_adds   a sample and time step of dense computing, by connection. Weights and means count, zeros of the padding included; what only scales or
                    shifts a value (Scale, Gain, BatchNorm, biases) or moves it (Upsample, Identity) counts nothing
    """

    parameters: int
    neurons: tuple[int, ...]
    multiply_adds: dict[str, int]


def counts(network: Network) -> Counts:
    """Parameters, neurons and multiply-adds of `network`; UsageError where its parts do not fit."""
    shapes = layer_shapes(network)
    neurons = tuple(0 if layer in network.relays else prod(shape) for layer, shape in enumerate(shapes))
    sources: dict[str, Shape] = {"input": network.input_shape, "readout": shapes[-1]}
    sources |= {f"hidden.{i}": shape for i, shape in enumerate(shapes[:-1])}
    sources |= {f"feedback.{i}": shapes[loop.source] for i, loop in enumerate(network.feedback)}
    sources |= {f"skip.{i}": network.input_shape if skip.source is None else shapes[skip.source] for i, skip in enumerate(network.skips)}
    thresholds = 0 if network.trained_threshold is None else len(shapes) - len(network.relays)
    multiply_adds, parameters = {}, thresholds
    for name, connection in network.connections.items():
        shape, total = sources[name], 0
        for part in parts_of(connection):
            made = _part_shape(part, shape, f"network '{network.name}': connection '{name}'")
            parameters, total = parameters + _parameters(part), total + _multiply_adds(part, shape, made)
            shape = made
        multiply_adds[name] = total
    return Counts(parameters, neurons, multiply_adds)


def _parameters(part: Part) -> int:
    if isinstance(part, BatchNorm):
        return 2 * part.features
    if isinstance(part, Gain):
        return 1
    if not isinstance(part, (Linear, Conv2d, ConvTranspose2d)):
        return 0
    gains = part.outputs if getattr(part, "standardized", False) else int(isinstance(part.limit, Spectral))
    return _weights(part) + gains + (part.outputs if part.bias else 0)


def _multiply_adds(part: Part, source: Shape, made: Shape) -> int:
    if isinstance(part, Linear):
        return _weights(part)
    if isinstance(part, Conv2d):
        return _weights(part) * prod(made[1:])
    if isinstance(part, ConvTranspose2d):
        return _weights(part) * prod(source[1:])
    if isinstance(part, AvgPool2d):
        return prod(made) * part.kernel**2
    if isinstance(part, AdaptiveAvgPool2d):
        return source[0] * prod(sum(stop - start for start, stop in windows(size, part.size)) for size in source[1:])
    return 0


def windows(size: int, wanted: int) -> list[tuple[int, int]]:
    """What each of `wanted` means covers of `size` values, (first, behind the last), as adaptive pooling has it."""
    return [(i * size // wanted, -((i + 1) * size // -wanted)) for i in range(wanted)]


def _check_weight(part: Part, where: str) -> None:
    if getattr(part, "standardized", False) and _weights(part) == _outputs(part):
        raise UsageError(f"{where} standardises one weight for each output, which has no variance: leave standardized out")
    limit = getattr(part, "limit", None)
    if limit is None:
        return
    _require(isfinite(limit.norm) and limit.norm > 0, f"{where} is limited to norm {limit.norm}: it must be above 0")
    _require(not getattr(part, "standardized", False), f"{where} is both standardised and limited: choose one")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)
