"""The fixed workloads of `simulation.py`: random networks of a stated spike density and the trained ones, compiled as the product compiles them, and as files for `peers.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolchain import codec, data, models
from toolchain.compiler import forward_only, lowered
from toolchain.errors import UsageError
from toolchain.ir import Array, Conv2d, ConvTranspose2d, Dense, Graph, Op
from toolchain.layers import FeedbackSNN
from toolchain.passes import LOIHI_PIPELINE
from toolchain.source import Source
from toolchain.target import Result
from toolchain.targets.sim import SIM

SEED = 0
"""Of the random weights, and of the random images where no real ones come with the package."""

IMAGES = 257

MODELS = {"W1": "mnist-fc", "W2": "convnet-f", "W3": "alexnet-f"}

DENSITY_SAMPLES = 16
"""How many samples the gains are found on."""


@dataclass(frozen=True)
class Workload:
    """A network in integers, in both timings and with its first connection on the host, images for it, and the gains its random weights were drawn with."""

    name: str
    weights: str
    exact: Graph
    pipelined: Graph
    images: Array
    gains: dict[str, float]

    def densities(self, result: Result) -> dict[str, float]:
        """Spikes a neuron and time step, by population."""
        steps = self.exact.phase("forward").time_steps
        return {p.name: float(result.counts[p.name].mean()) / steps for p in self.exact.of_kind("couple")}

    def density(self, result: Result) -> float:
        """Spikes a neuron and time step, over all populations."""
        neurons = {p.name: int(np.prod(p.shape)) for p in self.exact.of_kind("couple")}
        found = self.densities(result)
        return sum(found[name] * size for name, size in neurons.items()) / sum(neurons.values())


def trained(name: str, steps: int = 30) -> Workload:
    """The trained network that is shipped; UsageError where none is."""
    return _workload(name, "trained", models.load(MODELS[name]), {}, images(name), steps)


def random(name: str, density: float, steps: int = 30, within: float = 0.02) -> Workload:
    """Weights drawn with SEED, and for each connection a gain such that every population spikes about as often as `density` says, a fraction; UsageError where there is none.

    One gain for the input alone would leave the deep populations of W3, whose connections cost most, nearly silent.
    """
    pictures = images(name)
    gains = dict.fromkeys(_forward(models.get(MODELS[name]).build(SEED)), 1.0)
    for _ in range(40):
        model = _scaled(models.get(MODELS[name]).build(SEED), gains)
        made = _workload(name, f"random, seed {SEED}", model, gains, pictures, steps)
        with SIM.compile(made.exact) as run:
            result = run.run(pictures[:DENSITY_SAMPLES])
        found = list(made.densities(result).values())
        if abs(made.density(result) - density) < within / 4 and all(abs(one - density) < within for one in found):
            return made
        for key, one in zip(gains, found, strict=True):
            gains[key] *= min(2.0, (density / max(one, density / 100)) ** 0.7)
    raise UsageError(f"found no gains with which '{MODELS[name]}' spikes in {100 * density:g} % of its steps: choose another --density")


def images(name: str) -> Array:
    """The first images of MNIST's test set; for W3, whose data do not come with the package, uniform noise."""
    if name != "W3":
        return data.load("mnist-1k", samples=IMAGES).images
    return np.random.default_rng(SEED).random((IMAGES, 3, 32, 32), np.float32)


def _forward(model: FeedbackSNN) -> dict[str, torch.nn.Module]:
    """The connection into each population from the one before it, in their order."""
    return {key: module for key, (_, _, module) in model.connections().items() if not key.startswith("feedback")}


def _scaled(model: FeedbackSNN, gains: dict[str, float]) -> FeedbackSNN:
    with torch.no_grad():
        for key, module in _forward(model).items():
            module.weight.mul_(gains[key])
    return model


def _workload(name: str, weights: str, model: FeedbackSNN, gains: dict[str, float], pictures: Array, steps: int) -> Workload:
    graph = lowered(Source(MODELS[name], model.eval(), None), steps)
    exact, pipelined = (forward_only(LOIHI_PIPELINE.with_options(retime={"mode": mode})(graph)) for mode in ("exact", "pipelined"))
    return Workload(name, weights, exact, pipelined, pictures, dict(gains))


def write(work: Workload, path: Path, samples: int) -> None:
    """The workload for the peers: weights with their exponents, as floats, the first `samples` images as whole numbers, and the host's currents of these."""
    graph, phase = work.exact, work.exact.phase("forward")
    couples = graph.of_kind("couple")
    order = {p.name: place for place, p in enumerate(couples)}
    arrays: dict[str, Array] = {}
    encoded = codec.encode_input(graph, codec.check_inputs(graph, work.images[:samples]))
    (drive,) = phase.drive
    first = _connection(drive.ops, graph, arrays, 2.0 ** (drive.exponent - drive.shift))
    # of full shape: it holds what the normalisation of the image makes, which differs at padded borders
    offset = np.zeros(graph.population(drive.population).shape) if drive.bias is None else graph.tensors[drive.bias].astype(float)
    arrays["offset"] = np.ldexp(offset, drive.exponent - drive.shift)
    connections, readout = [], {}
    for synapse in phase.synapses:
        made = _connection(synapse.ops, graph, arrays)
        if synapse.target not in order:
            readout = made
            continue
        made |= {"source": order[synapse.source], "target": order[synapse.target]}
        if order[synapse.source] < order[synapse.target]:
            made |= _bias(graph, synapse.target, arrays)
        connections.append(made)
    plan = {
        "populations": [
            {"shape": p.shape, "threshold": phase.dynamics[p.name].threshold, "reset": phase.dynamics[p.name].reset} for p in couples
        ],
        "connections": connections,
        "first": first,
        "readout": readout,
        "time_steps": phase.time_steps,
    }
    floats = {name: array.astype(np.float32) for name, array in arrays.items()}
    currents = codec.input_current(graph, drive, encoded).astype(np.float32)
    np.savez(path, plan=json.dumps(plan), images=encoded.astype(np.float32), currents=currents, **floats)


def _connection(ops: Sequence[Op], graph: Graph, arrays: dict[str, Array], factor: float = 1.0) -> dict[str, Any]:
    """A connection of one operation, which is all that the workloads have."""
    (op,) = ops
    assert isinstance(op, (Dense, Conv2d, ConvTranspose2d))
    arrays[op.weight] = graph.tensors[op.weight] * (factor * 2.0**op.exponent)
    made: dict[str, Any] = {"kind": "dense", "weight": op.weight, "bias": None}
    if not isinstance(op, Dense):
        made |= {"kind": "conv", "stride": op.stride, "padding": op.padding, "groups": op.groups}
    if isinstance(op, ConvTranspose2d):
        made |= {"kind": "conv_transpose", "output_padding": op.output_padding}
    return made


def _bias(graph: Graph, population: str, arrays: dict[str, Array]) -> dict[str, Any]:
    """The bias of a population as that of the connection into it."""
    found = codec.bias_currents(graph, graph.phase("forward")).get(population, [])
    if not found:
        return {}
    ((start, current),) = found
    assert start == 0
    arrays[f"{population}.bias"] = _by_channel(current)
    return {"bias": f"{population}.bias"}


def _by_channel(current: Array) -> Array:
    """One value a channel of a current of full shape."""
    values = current.reshape(len(current), -1)
    assert (values == values[:, :1]).all()
    return values[:, 0]
