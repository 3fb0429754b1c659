"""Targets: .fsnn files, read, shown and run. What an edited file says of itself is signed again, so that the digest does not end every story."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
from hypothesis import strategies as st

from fuzz import mutate
from fuzz.target import Prepared, Target
from toolchain import artifact
from toolchain.artifact import Artifact
from toolchain.ir import Graph

LARGEST_RUN = 4096
"""Neurons, ticks, and products of a step: what is larger is read and shown, but not run."""

SAMPLES = 2


def networks() -> list[Any]:
    """Small networks of every kind of connection, as `network.Network`."""
    from toolchain.network import (
        AvgPool2d,
        Chain,
        Conv2d,
        Feedback,
        Identity,
        Linear,
        Network,
        Skip,
    )

    flat = Network(
        "flat",
        (6,),
        Linear(6, 5),
        Linear(3, 2),
        hidden=(Linear(5, 3),),
        feedback=(Feedback(1, 0, Linear(3, 5, bias=False)),),
        time_steps=4,
        feedback_steps=5,
    )
    image = Network(
        "image",
        (1, 5, 5),
        Conv2d(1, 2, 3, padding=1),
        Linear(8, 2),
        hidden=(Chain((AvgPool2d(2), Conv2d(2, 2, 1, bias=False))), Identity()),
        feedback=(Feedback(1, 1, Conv2d(2, 2, 3, padding=1)),),
        skips=(Skip(1, 2, Conv2d(2, 2, 1)),),
        relays=(1,),
        time_steps=3,
        feedback_steps=3,
    )
    leaky = msgspec.structs.replace(
        flat, name="leaky", neuron=msgspec.structs.replace(flat.neuron, leak=0.9), feedback=(Feedback(0, 0, Linear(5, 5)),)
    )
    return [flat, msgspec.structs.replace(image, feedback=(Feedback(2, 2, Conv2d(2, 2, 3, padding=1)),)), leaky]


def built(seed: int = 0) -> list[Any]:
    """Modules of `networks`, with weights drawn from `seed`."""
    import torch

    from toolchain.layers import build

    torch.manual_seed(seed)
    return [build(network).eval() for network in networks()]


def fsnn(folder: Path) -> Prepared:
    """Read, inspected, run on `reference` and on the compiled core of `sim`, which must agree to the last bit."""
    import contextlib
    import io

    from toolchain.compiler import compile

    path = folder / "seed.fsnn"
    seeds = []
    with contextlib.redirect_stderr(io.StringIO()):
        for module, timing, input in zip(built(), ("exact", "pipelined", "exact"), ("bias", "bias", "graded"), strict=True):
            for floats in (True, False):
                compile(module, timing=timing, input=input, float_tensors=floats, output=path)
                seeds.append(path.read_bytes())
    file = folder / "net.fsnn"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        use(artifact.read(file))

    mutators = (
        *(mutate.metadata("fsnn", signed),) * 5,
        mutate.then(mutate.tensor_bytes, signed),
        mutate.then(mutate.tensor_header, signed),
        mutate.tensor_header,
    )
    return Prepared(seeds, read, mutators, edited(seeds))


def edited(seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Seeds with one to three values of their headers drawn anew: numbers of a graph's size, names that the graph has, whole operations on its tensors."""
    headers = [json.loads(found[0]["__metadata__"]["fsnn"]) for seed in seeds if (found := mutate.parts(seed)) is not None]
    count = st.one_of(st.integers(0, 6), st.integers(0, 6), st.integers(-1, 2**33))
    both = st.one_of(st.tuples(count, count), st.just((1, 1)), st.just((0, 0)))

    @st.composite
    def draw(draw: Callable[..., Any]) -> bytes:
        number = draw(st.integers(0, len(seeds) - 1))
        header = json.loads(json.dumps(headers[number]))
        file = mutate.parts(seeds[number])
        assert file is not None
        names = sorted({population["name"] for population in header["graph"]["populations"]})
        tensors = sorted(name.partition("/")[2] for name in file[0] if name.startswith("graph/"))
        placed = {
            "weight": st.sampled_from(tensors),
            "stride": both,
            "padding": both,
            "dilation": both,
            "groups": count,
            "exponent": st.integers(-1, 9),
        }
        turned = {"transpose": st.booleans()}

        def operation(kind: str, *fields: str, **more: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
            return st.fixed_dictionaries(
                {"op": st.just(kind), **{name: placed[name] for name in fields}, **more},
                optional={} if kind in ("scale", "identity") else turned,
            )

        op = st.one_of(
            operation("dense", "weight", "exponent"),
            operation("conv2d", "weight", "stride", "padding", "dilation", "groups", "exponent"),
            operation("conv_transpose2d", "weight", "stride", "padding", "dilation", "groups", "exponent", output_padding=both),
            operation("avg_pool2d", "stride", "padding", kernel=both),
            operation("upsample", factor=count),
            operation("scale", "weight", "exponent", factor=st.sampled_from([1.0, 2.0])),
            operation("identity"),
        )
        synapse = st.fixed_dictionaries(
            {"source": st.sampled_from(names), "target": st.sampled_from(names), "ops": st.lists(op, min_size=1, max_size=3)},
            optional={"delay": st.integers(0, 6), "gate": st.sampled_from(names)},
        )
        for _ in range(draw(st.integers(1, 3))):
            places: list[tuple[Any, Any]] = []
            mutate.walk(header[draw(st.sampled_from(["graph", "graph", "graph", "golden"]))], places)
            parent, key = places[draw(st.integers(0, len(places) - 1))]
            old = parent[key]
            if key in ("ops", "synapses"):
                parent[key] = draw(st.lists(op if key == "ops" else st.one_of(synapse, st.sampled_from(old or [{}])), max_size=4))
            elif isinstance(old, bool) or not isinstance(old, (int, float, str)):
                parent[key] = draw(st.one_of(st.booleans(), st.just(old), st.just([]), st.just([old, old])))
            elif isinstance(old, str):
                parent[key] = draw(st.sampled_from([*names, *tensors]))
            else:
                parent[key] = draw(st.one_of(st.integers(-1, 8), st.integers(0, 2**33), st.just(old + 1)))
        file[0]["__metadata__"]["fsnn"] = json.dumps(header)
        return signed(mutate.joined(mutate.text_of_exactly(file[0]), file[1]))

    return draw()


def signed(data: bytes) -> bytes:
    """`data` with the digest that its header and tensors have now; as it is where it is too damaged to have one."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    found = mutate.parts(data)
    if found is None:
        return data
    try:
        raw = found[0]["__metadata__"]["fsnn"]
        header = msgspec.json.decode(raw, type=artifact._Header)
        tensors = load(data)
        about = json.loads(raw)
        about["digest"] = artifact._digest(msgspec.structs.replace(header, digest=""), tensors)
    except (msgspec.MsgspecError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        return data
    found[0]["__metadata__"]["fsnn"] = json.dumps(about)
    return mutate.joined(mutate.text_of_exactly(found[0]), found[1])


def use(read: Artifact) -> None:
    """What commands do with an artefact: show it, and run it where it is small."""
    from toolchain.describe import Inspection

    shown = Inspection(read.graph, read.target)
    shown.to_text()
    json.dumps(shown.to_json())
    if small(read.graph):
        run(read.graph)


def small(graph: Graph) -> bool:
    neurons = sum(prod(population.shape) for population in graph.populations)
    entries = sum(tensor.size for tensor in graph.tensors.values())
    return neurons <= LARGEST_RUN and entries <= 16 * LARGEST_RUN and all(phase.ticks <= 400 for phase in graph.phases) and _products(graph)


def _products(graph: Graph) -> bool:
    """Whether what lies between two populations is small too: an upsampling before a pool, say."""
    from toolchain.ir import shapes_along

    shapes = {population.name: population.shape for population in graph.populations}
    inputs = [population.shape for population in graph.of_kind("input")]
    chains = [(s.ops, shapes[s.source], shapes[s.target]) for phase in graph.phases for s in phase.synapses]
    chains += [(d.ops, inputs[0], shapes[d.population]) for phase in graph.phases for d in phase.drive if d.source == "input"]
    return all(prod(shape) <= LARGEST_RUN for ops, source, target in chains for shape in shapes_along(ops, source, target, graph.tensors))


def run(graph: Graph) -> None:
    from dataclasses import replace

    from toolchain import codec
    from toolchain.compiler import executable
    from toolchain.target import Target as Chip
    from toolchain.targets.reference import REFERENCE
    from toolchain.targets.sim import SIM

    draw = np.random.default_rng(0)
    population = graph.of_kind("input")[0]
    shape = (SAMPLES, *population.shape, *(graph.phase("forward").time_steps,) * population.events)
    inputs = draw.integers(0, 256, shape) / 255
    results = []
    targets: list[Chip] = [REFERENCE, *(replace(SIM, device="cpu", currents=currents) for currents in ("events", "dense"))]
    for target in targets:
        with executable(target, graph) as open_:
            found = [open_.run(inputs)]
            codec.logits(graph, found[0])
            if graph.has_phase("feedback"):
                driven = graph.population(codec.error_drive(graph).population)
                error = np.random.default_rng(1).uniform(-1, 1, (SAMPLES, *driven.shape))
                found.append(open_.run(error, phase="feedback"))
            results.append(found)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            for field in ("counts", "activity", "potentials", "saturations"):
                for name, values in getattr(first, field).items():
                    if not np.array_equal(values, getattr(second, field)[name]):
                        raise AssertionError(f"sim and reference differ in {field} of '{name}' in the {first.phase} phase")


def raw_header(folder: Path) -> Prepared:
    """The first bytes of a .fsnn file: lengths that promise more than there is, tables of tensors that overlap."""
    whole = fsnn(folder)

    def small_header(data: bytes, random: Random) -> bytes:
        size = random.choice((0, 1, 2, 8, len(data), max(0, len(data) - 8), 2**31, 2**60, 2**63, 2**64 - 1, 100_000_000, 100_000_001))
        return struct.pack("<Q", size) + data[8:]

    return Prepared(whole.seeds, whole.read, (small_header, mutate.tensor_header, mutate.tensor_header))


TARGETS = (Target("fsnn", fsnn, share=6), Target("fsnn-header", raw_header, share=2))
