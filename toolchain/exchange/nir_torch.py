"""The nodes of a NIR file that `export` wrote, run in nirtorch: soft reset, integers and delays as the file's metadata say.

    from toolchain.exchange import nir_torch

    network = nir_torch.load("mnist-fc.nir")
    result = nir_torch.run(network, images)          # (samples, *input shape) in [0, 1]
    result.counts["hidden1"], result.potentials["readout"][-1].argmax(axis=1)

`load` is `nirtorch.nir_to_torch(nir.read(path), node_map())`, a torch.fx module that makes one model step a call and hands its state on. `node_map` works with any nirtorch
code of one's own; nodes without our metadata (of other files) are refused where NIR and this project mean different things by them.

nirtorch closes a loop with what its last node made in the call before, which is the model's one step of delay: a Delay of one step adds nothing, one of n keeps n - 1 more.
Everything is computed in float64, in which an integer graph's numbers are exact. Floats may differ from the reference's in the last place, where sums are added up in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from toolchain.errors import GraphError, UsageError
from toolchain.exchange import nir, nir_files, packages
from toolchain.exchange.nir_nodes import KEY, Note
from toolchain.fixed import CURRENT_MANTISSA, decay
from toolchain.ir import DECAY_ONE, POTENTIAL_LIMIT, Array, Shape

if TYPE_CHECKING:
    import nir as nir_package

__all__ = ["Loaded", "Run", "SoftReset", "load", "node_map", "run", "stock_map"]

State = dict[str, Any]


def require() -> None:
    """UsageError where files cannot be run here."""
    packages.require("nir", "nir", "h5py", "nirtorch")


class SoftReset(nn.Module):
    """Neurons that subtract: v = u + I; s = 1[v >= threshold]; u = leak (v - reset s). Integers are held to 24 bits, and leaks round towards zero.

    With `members="none"` a readout: u = leak u + I, which is what it gives. The state after a call has `potential`, `spikes` and `step`.
    """

    def __init__(self, note: Note, biases: tuple[tuple[int, Array], ...] = ()) -> None:
        super().__init__()
        self.note = note
        self.starts = tuple(start for start, _ in biases)
        self.biases = nn.ParameterList(
            nn.Parameter(torch.from_numpy(np.array(values, np.float64)), requires_grad=False) for _, values in biases
        )

    def forward(self, current: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        step = 0 if state is None else state["step"]
        for start, bias in zip(self.starts, self.biases, strict=True):
            current = current + bias if step >= start else current
        potential = torch.zeros_like(current) if state is None else state["potential"]
        if self.note.members == "none":
            potential = self._held(self._leaked(potential) + current)
            return potential, {"potential": potential, "step": step + 1}
        potential = self._held(potential + current)
        spikes = (potential >= self.note.threshold).to(potential.dtype)
        potential = self._leaked(potential - self.note.reset * spikes)
        return spikes, {"potential": potential, "spikes": spikes, "step": step + 1}

    def _held(self, potential: Tensor) -> Tensor:
        return potential.clamp(-POTENTIAL_LIMIT, POTENTIAL_LIMIT) if self.note.integer else potential

    def _leaked(self, potential: Tensor) -> Tensor:
        if self.note.leak == 1 or not self.note.integer:
            return potential * self.note.leak
        keep = DECAY_ONE - decay(self.note.leak)
        return potential.sign() * (potential.abs() * keep / DECAY_ONE).floor()  # below 2^36: exact in float64


class HardReset(nn.Module):
    """NIR's own IF and LIF in Euler steps: v = decay v + gain I + rest; a spike where v > threshold, and v = reset there."""

    def __init__(self, decay: Array, gain: Array, rest: Array, threshold: Array, reset: Array) -> None:
        super().__init__()
        self.numbers = nn.ParameterList(
            nn.Parameter(torch.from_numpy(np.array(values, np.float64)), requires_grad=False)
            for values in (decay, gain, rest, threshold, reset)
        )

    def forward(self, current: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        decay, gain, rest, threshold, reset = self.numbers
        potential = torch.zeros_like(current) if state is None else state
        potential = decay * potential + gain * current + rest
        fired = potential > threshold
        return fired.to(potential.dtype), torch.where(fired, reset, potential)


class Relay(nn.Module):
    """What arrives, passed on within the step; integers held to 24 bits."""

    def __init__(self, note: Note, biases: tuple[tuple[int, Array], ...] = ()) -> None:
        super().__init__()
        self.neurons = SoftReset(msgspec.structs.replace(note, members="none", leak=0.0), biases)

    def forward(self, current: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        kept = None if state is None else {**state, "potential": torch.zeros_like(state["potential"])}
        made, after = self.neurons(current, kept)
        return made, {**after, "spikes": made}


class HostCurrent(nn.Module):
    """What the host makes of its exact sum: 2^-shift of it, in integer graphs as 13-bit mantissas of one exponent, rounded half up."""

    def __init__(self, note: Note, biases: tuple[tuple[int, Array], ...] = ()) -> None:
        super().__init__()
        self.note = note
        self.biases = nn.ParameterList(
            nn.Parameter(torch.from_numpy(np.array(values, np.float64)), requires_grad=False) for _, values in biases
        )

    def forward(self, total: Tensor) -> Tensor:
        for bias in self.biases:
            total = total + bias
        if not self.note.integer:
            return total
        half = 2.0 ** (self.note.shift - 1) if self.note.shift else 0.0
        mantissa = ((total + half) / 2.0**self.note.shift).floor().clamp(*CURRENT_MANTISSA)
        return mantissa * 2.0**self.note.exponent


class Encode(nn.Module):
    """Inputs in [0, 1] as an integer graph's whole numbers 0 to `levels`."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, values: Tensor) -> Tensor:
        return (values * self.levels).round().clamp(0, self.levels)


class Later(nn.Module):
    """What arrived `steps` calls ago, nothing before."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, values: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        waiting = [*([torch.zeros_like(values)] * self.steps if state is None else state["waiting"]), values]
        return waiting[0], {"waiting": waiting[1:]}


class Product(nn.Module):
    """W x + b; a bias that belongs to the logits waits for them."""

    def __init__(self, weight: Array, bias: Array | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(np.array(weight, np.float64)), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(torch.from_numpy(np.array(bias, np.float64)), requires_grad=False)

    def forward(self, values: Tensor) -> Tensor:
        return nn.functional.linear(values, self.weight, self.bias)


class Convolution(nn.Module):
    """A convolution of images (samples, channels, height, width)."""

    def __init__(self, node: nir_package.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(np.array(node.weight, np.float64)), requires_grad=False)
        self.bias = nn.Parameter(torch.from_numpy(np.array(node.bias, np.float64)), requires_grad=False)
        self.grid = {name: _sides(getattr(node, name)) for name in ("stride", "padding", "dilation")}
        self.groups = int(node.groups)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.conv2d(images, self.weight, self.bias, groups=self.groups, **self.grid)


class Pool(nn.Module):
    """Means over windows, or `sums`, zeros of the padding counted."""

    def __init__(self, node: nir_package.AvgPool2d, *, sums: bool) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = _sides(node.kernel_size), _sides(node.stride), _sides(node.padding)
        self.sums = sums

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, self.kernel, self.stride, self.padding, divisor_override=1 if self.sums else None)


class Factors(nn.Module):
    """Values times a factor each."""

    def __init__(self, factors: Array) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.from_numpy(np.array(factors, np.float64)), requires_grad=False)

    def forward(self, values: Tensor) -> Tensor:
        return values * self.factors


def _sides(value: Any) -> tuple[int, int]:
    down, across = np.broadcast_to(np.asarray(value), (2,)).tolist()
    return int(down), int(across)


def _note(node: nir_package.NIRNode) -> Note | None:
    raw = node.metadata.get(KEY)
    return None if raw is None else msgspec.json.decode(raw, type=Note)


def _ours(node: nir_package.NIRNode) -> tuple[Note, tuple[tuple[int, Array], ...]]:
    note = _note(node)
    if note is None:
        raise GraphError(
            f"a node of type {type(node).__name__} has no entry '{KEY}' in its metadata, which says how it resets: run files that toolchain export wrote"
        )
    return note, tuple((start, np.asarray(node.metadata[f"bias{index}"])) for index, start in enumerate(note.starts))


def _neurons(node: nir_package.NIRNode) -> nn.Module:
    return SoftReset(*_ours(node))


def _scale(node: nir_package.Scale) -> nn.Module:
    note = _note(node)
    if note is None:
        return Factors(node.scale)
    if note.kind == "levels":
        return Encode(note.levels)
    return HostCurrent(*_ours(node)) if note.kind == "host" else Relay(*_ours(node))


def _affine(node: nir_package.Affine) -> nn.Module:
    note = _note(node)
    return Product(node.weight, None if note is not None and note.kind == "logits" else node.bias)


def _delay(node: nir_package.Delay) -> nn.Module:
    note = _ours(node)[0]
    steps = note.steps - int(note.loop)
    return Later(steps) if steps else nn.Identity()


def _flatten(node: nir_package.Flatten) -> nn.Module:
    """NIR counts axes without the samples, torch with them."""
    start, end = int(node.start_dim), int(node.end_dim)
    return nn.Flatten(start + 1 if start >= 0 else start, end + 1 if end >= 0 else end)


def node_map() -> dict[type, Callable[[Any], nn.Module]]:
    """Every node that `export` writes as a module, for `nirtorch.nir_to_torch(graph, node_map(), dtype=torch.float64)`.

    nirtorch's own Affine (2.6) leaves the bias at torch's random one, and its Flatten and SumPool2d take the samples for an axis and no padding, so none of them is used.
    """
    import nir

    return {
        nir.Affine: _affine,
        nir.Linear: lambda node: Product(node.weight, None),
        nir.Conv2d: Convolution,
        nir.AvgPool2d: lambda node: Pool(node, sums=False),
        nir.SumPool2d: lambda node: Pool(node, sums=True),
        nir.Flatten: _flatten,
        nir.Scale: _scale,
        nir.Delay: _delay,
        nir.IF: _neurons,
        nir.LIF: _neurons,
        nir.I: _neurons,
        nir.LI: _neurons,
    }


def stock_map(dt: float) -> dict[type, Callable[[Any], nn.Module]]:
    """NIR's own nodes by NIR's equations, in Euler steps of `dt` seconds; loops are closed a step late, as nirtorch does."""
    import nir

    def integrate(node: nir_package.IF) -> nn.Module:
        zeros = np.zeros_like(node.r, np.float64)
        return HardReset(zeros + 1, dt * node.r, zeros, node.v_threshold, node.v_reset)

    def leak(node: nir_package.LIF) -> nn.Module:
        share = dt / np.asarray(node.tau, np.float64)
        return HardReset(1 - share, share * node.r, share * node.v_leak, node.v_threshold, node.v_reset)

    return node_map() | {nir.IF: integrate, nir.LIF: leak}


@dataclass(frozen=True)
class Run:
    """What a network made of its inputs: `spikes` (of a relay what it passed on) and `potentials` by population, (time steps, samples, *shape); `counts` are
    the spikes' sums. The last potentials of the readout are class scores up to their unit and the bias of the logits, as those of any target (`codec.logits`)."""

    spikes: dict[str, Array]
    potentials: dict[str, Array]
    counts: dict[str, Array]


class Loaded(nn.Module):
    """nirtorch's module `steps` of one file, its number of time steps, the shape of an input, whether inputs are events, and which node is which population."""

    def __init__(self, steps: nn.Module, time_steps: int, shape: Shape, nodes: dict[str, Note], *, events: bool) -> None:
        super().__init__()
        self.steps, self.time_steps, self.shape, self.nodes, self.events = steps, time_steps, shape, nodes, events

    def forward(self, values: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One model step: `values` (samples, *input shape) in [0, 1]; the readout's potential, and the state for the next."""
        return cast("tuple[Tensor, State]", self.steps(values, state))


def load(path: str | Path) -> Loaded:
    """The network of a NIR file that `export` wrote, as nirtorch runs it; UsageError for any other, or where nirtorch is missing."""
    require()
    import nir as package
    import nirtorch

    file = Path(path)
    graph = nir_files.read(file)
    entry = nir.entry_of(graph, file)
    if entry is None or entry.kind == "approximation":
        raise UsageError(f"'{file}' does not say how its neurons reset: give a file that toolchain export wrote without --approximate")
    nir.whole_network(file, graph, entry)  # the nodes are still those that were exported
    doors = [[node for node in graph.nodes.values() if isinstance(node, kind)] for kind in (package.Input, package.Output)]
    notes = {name: note for name, node in graph.nodes.items() if (note := _note(node)) is not None}
    (entries, exits), inputs = doors, [note for note in notes.values() if note.kind == "input"]
    if len(entries) != 1 or len(exits) != 1 or len(inputs) != 1:
        raise UsageError(
            f"'{file}' has {len(entries)} inputs and {len(exits)} outputs: nirtorch runs one of each, so export the network again"
        )
    shape = tuple(int(n) for n in np.asarray(entries[0].input_type["input"]).reshape(-1))
    populations = {name: note for name, note in notes.items() if note.kind in ("couple", "linear", "readout")}
    steps = nirtorch.nir_to_torch(graph, node_map(), dtype=torch.float64)
    return Loaded(steps, entry.time_steps, shape, populations, events=inputs[0].events)


@torch.no_grad()
def run(network: Loaded, inputs: Array) -> Run:
    """`network` for its time steps on `inputs` (samples, *input shape) in [0, 1], flat or not, of events with time as the last axis; UsageError where the size is another."""
    values = torch.from_numpy(np.array(inputs, np.float64))
    frames = (network.time_steps,) * network.events
    if values.ndim < 2 or prod(values.shape[1:]) != prod((*network.shape, *frames)):
        raise UsageError(
            f"the network takes samples of shape {(*network.shape, *frames)}, but the input has shape {tuple(values.shape)}: one sample a row"
        )
    values = values.reshape(len(values), *network.shape, *frames)
    state: State | None = None
    rows: dict[str, list[tuple[Array, Array]]] = {note.population: [] for note in network.nodes.values()}
    for step in range(network.time_steps):
        _, state = network(values[..., step] if network.events else values, state)
        for name, note in network.nodes.items():
            kept = state[name]
            fired = kept.get("spikes", torch.zeros_like(kept["potential"]))
            rows[note.population].append((fired.numpy(), kept["potential"].numpy()))
    spikes = {name: np.stack([s for s, _ in row]) for name, row in rows.items()}
    potentials = {name: np.stack([u for _, u in row]) for name, row in rows.items()}
    return Run(spikes, potentials, {name: train.sum(axis=0) for name, train in spikes.items()})
