"""What a file claims is compared with bounds before anything is made of it, and an error about it stays one sentence that can be read."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from toolchain import ir, metrics, network
from toolchain.config import Config, assignments, with_settings
from toolchain.errors import ArtifactError, DesignRuleError, GraphError, UsageError
from toolchain.files import require_short_numbers
from toolchain.ir import Core, Placement, Population, Slice
from toolchain.network import Linear, Network

FLAT = Network("flat", (6,), Linear(6, 5), Linear(5, 2))


def refused_without_memory(call: Callable[[], object], message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=message):
            call()
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input": Linear(6, 10**12)}, "has 6000000000000 weights, more than 2147483648"),
        ({"hidden": (Linear(5, 5), *(Linear(5, 40_000), Linear(40_000, 40_000), Linear(40_000, 5)) * 2)}, "has 3200800065 weights"),
        ({"input_shape": (10**5, 10**5)}, "takes 10,000,000,000 values"),
        (
            {"input_shape": (1, 1, 1), "input": network.Upsample(10**6), "readout": None},
            "the input connection makes 1,000,000,000,000 values, more than 2,147,483,648",
        ),
        ({"time_steps": 10**9}, "has time_steps 1000000000"),
    ],
)
def test_networks_of_any_size_are_refused_before_they_are_built(changed: dict[str, object], message: str) -> None:
    refused_without_memory(lambda: network.check(msgspec.structs.replace(FLAT, **changed)), message)


def test_a_checkpoint_of_a_huge_network_is_refused_by_what_it_holds(tmp_path: Path) -> None:
    import torch

    from toolchain import checkpoint

    path = tmp_path / "checkpoint.safetensors"
    huge = msgspec.structs.replace(FLAT, input=Linear(6, 10**6), readout=Linear(10**6, 2))
    checkpoint.write(path, {"input.weight": torch.ones(3)}, checkpoint.About(checkpoint.FORMAT, Config(huge), 1, None))
    refused_without_memory(lambda: checkpoint.load(path), "holds 3 numbers but its network has 9,000,002 weights")


def test_graphs_of_any_size_are_refused(random_graph) -> None:
    graph = random_graph(1)
    for shape, message in (((2**16, 2**16), "has 4,294,967"), ((1,) * 9, "give 1 to 8 axes")):
        bigger = (*graph.populations, Population("more", shape, "couple"))
        refused_without_memory(lambda: ir.verify(msgspec.structs.replace(graph, populations=bigger)), message)  # noqa: B023


def placed(graph: ir.Graph, *cores: Core) -> ir.Graph:
    return msgspec.structs.replace(graph, placement=Placement("loihi2", cores))


@pytest.mark.parametrize(
    ("chip", "core", "cuts", "message"),
    [
        (0, 0, [((0, 0), (4, 2))], None),
        (0, 0, [((0, 0), (1, 2)), ((1, 0), (4, 1)), ((1, 1), (4, 2))], None),
        (0, 0, [((0, 0), (2, 2)), ((0, 0), (2, 2))], "twice"),
        (0, 0, [((0, 0), (3, 1)), ((2, 0), (4, 2)), ((0, 1), (1, 2))], "twice"),
        (2**40, 0, [((0, 0), (4, 2))], "of 1 cores in all: number chips one after another"),
        (0, 2**16, [((0, 0), (4, 2))], "cores below 65,536"),
    ],
)
def test_placements_are_checked_without_room_for_every_neuron(random_graph, chip, core, cuts, message: str | None) -> None:
    graph = random_graph(3, couples=1, widths=(8,))
    shape = graph.population("couple0").shape
    graph = msgspec.structs.replace(graph, placement=None)
    assert shape == (4, 2)
    found = placed(graph, Core(chip, core, tuple(Slice("couple0", start, stop) for start, stop in cuts)))
    if message is None:
        ir.verify(found)
        return
    with pytest.raises(GraphError, match=message):
        ir.verify(found)


def test_long_sentences_keep_their_beginning_and_their_end() -> None:
    said = str(UsageError("'" + "x" * 5000 + "' is unknown: choose another"))
    assert len(said) <= 2000
    assert said.startswith("'xxx")
    assert re.search(r"x \[and 3,\d+ more characters\] x", said)
    assert said.endswith("x' is unknown: choose another")
    assert str(ArtifactError("a library\n  said this\nin lines")) == "a library said this in lines"
    assert str(UsageError("no:\n- one\n- two")) == "no:\n- one\n- two"  # a list of reasons
    assert len(str(DesignRuleError("rule; " * 1000))) == 6000  # every violation is told


def test_numbers_without_end_are_refused(tmp_path: Path) -> None:
    require_short_numbers({"a": [1, 2**64 - 1, -(2**63), 1e300, True]}, tmp_path)
    with pytest.raises(ArtifactError, match="a whole number of 67 bits"):
        require_short_numbers({"a": [{"b": [10**20]}]}, tmp_path)
    with pytest.raises(UsageError, match=r"a whole number of 1,329 bits, in 'network.time_steps'"):
        with_settings(Config(FLAT), {"network.time_steps": 10**400})
    with pytest.raises(UsageError, match="has 99 dots"):
        with_settings(Config(FLAT), {".".join("a" * 100): 1})


@pytest.mark.parametrize("value", ["!!int ''", "!!bool x", "!!timestamp x", r'"\ud800"', "[!!set {a}]", "!x y"])
def test_values_that_break_a_yaml_reader_are_no_settings(value: str) -> None:
    with pytest.raises(UsageError, match="a value that is not plain YAML"):
        assignments([f"train.lr={value}"])


def test_a_table_takes_epochs_of_other_layers(tmp_path: Path) -> None:
    one = metrics.Epoch(1, 0.7, 0.5, None, 0.1, 0.0, 0.0, 0.2, 1.0, 0.1, 1.5, (0.1,))
    metrics.Writer(tmp_path, ("csv",)).write([one, msgspec.structs.replace(one, epoch=2, forward_rates=(0.1, 0.2))])
    head, *rows = (tmp_path / metrics.TABLE).read_text().splitlines()
    assert head.endswith("forward_rate/0,forward_rate/1")
    assert [row.split(",")[-2:] for row in rows] == [["0.1", ""], ["0.1", "0.2"]]
