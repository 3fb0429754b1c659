"""Every network of the papers compiles, plans and comes back from its file, ImageNet's size included; where none are trained, with random weights."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest

import toolchain
from toolchain import artifact, models

LARGE = ("nf-resnet-34", "convnet-f-dvs", "preactresnet-18", "preactresnet-18-100")
"""Written without their float tensors, which take most of the file."""

SLOW = ("nf-resnet-34", "convnet-f-dvs", "preactresnet-18-100", "vgg-sws-dvs")
"""Others of their kind run by default."""

SMALL = "mnist-fc"
"""Runs its golden inputs again."""


def assert_placed(graph):
    """Every neuron of couples, relays and readouts is on a core, of a readout unless a note says that it stays on the host."""
    held = dict.fromkeys((population.name for population in graph.populations), 0)
    assert graph.placement.cores
    for core in graph.placement.cores:
        assert core.slices, f"core {core.core} of chip {core.chip} holds nothing"
        for part in core.slices:
            held[part.population] += prod(stop - start for start, stop in zip(part.start, part.stop, strict=True))
    for population in graph.populations:
        on_host = any(note.startswith(f"readout '{population.name}' stays on the host") for note in graph.provenance.notes)
        off_chip = population.kind == "input" or (population.kind == "readout" and on_host)
        assert held[population.name] == (0 if off_chip else prod(population.shape)), population.name


def assert_same_tensors(found, made):
    assert found.keys() == made.keys()
    for key, tensor in made.items():
        assert found[key].dtype == tensor.dtype, key
        np.testing.assert_array_equal(found[key], tensor, err_msg=key)


def assert_same_graph(found, made):
    for part in ("populations", "phases", "units", "placement", "provenance"):
        assert getattr(found, part) == getattr(made, part), part
    assert_same_tensors(found.tensors, made.tensors)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in models.names()])
def test_it_compiles_plans_and_round_trips(name, tmp_path):
    file = tmp_path / "model.fsnn"
    made = toolchain.compile(name, output=file, float_tensors=name not in LARGE).artifact
    found = artifact.read(file)
    assert_placed(found.graph)
    assert_same_graph(found.graph, made.graph)
    assert found.golden == made.golden
    assert found.golden_tensors
    assert_same_tensors(found.golden_tensors, made.golden_tensors)
    if name in LARGE:
        assert found.float_graph is None
    else:
        assert_same_graph(found.float_graph, made.float_graph)
    assert toolchain.inspect(file).to_text().startswith(f"{name} for lava-sim")


def test_a_small_one_replays_its_golden_inputs(tmp_path):
    file = tmp_path / "model.fsnn"
    toolchain.compile(SMALL, output=file)
    outcome = toolchain.verify(file, targets=["sim"], replay=True)
    assert outcome.passed
    assert outcome.pairs
    assert all(pair.identical and pair.spikes_compared > 0 for pair in outcome.pairs)
