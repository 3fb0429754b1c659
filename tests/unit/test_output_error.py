"""The error that leaves the host: a shift without a weight counts in it as it does on the chip."""

from __future__ import annotations

import msgspec
import numpy as np

import toolchain
from toolchain import codec
from toolchain.ir import Graph, Scale
from toolchain.targets.reference import REFERENCE


def shifted_behind(graph: Graph, exponent: int) -> Graph:
    """The same graph whose readout counts in units 2^exponent times as fine, by a shift behind its weights."""
    forward = graph.phase("forward")
    synapses = tuple(
        msgspec.structs.replace(s, ops=(*s.ops, Scale(exponent=exponent))) if s.target == "readout" else s for s in forward.synapses
    )
    scale = {**graph.units.scale, "forward": {**graph.units.scale["forward"], "readout": graph.scale("forward", "readout") * 2**exponent}}
    phases = tuple(msgspec.structs.replace(p, synapses=synapses) if p.name == "forward" else p for p in graph.phases)
    return msgspec.structs.replace(graph, phases=phases, units=msgspec.structs.replace(graph.units, scale=scale))


def test_a_shifted_readout_gives_the_same_logits_and_the_same_error() -> None:
    graph = toolchain.compile("digits-fc", target="sim", time_steps=8).graph
    images, labels = np.random.default_rng(0).random((3, 64)), np.array([1, 5, 9])
    found = []
    for each in (graph, shifted_behind(graph, 3)):
        with REFERENCE.compile(each) as run:
            forward = run.run(images)
        found.append((codec.logits(each, forward), codec.output_error(each, forward, labels)))
    (logits, error), (shifted_logits, shifted_error) = found
    assert np.abs(error).max() > 0
    np.testing.assert_array_equal(shifted_logits, logits)
    np.testing.assert_allclose(shifted_error, error, rtol=1e-12)
