"""Partition: every neuron on one core, no core too full, costs as a count neuron by neuron gives them, and sentences for what cannot fit."""

from __future__ import annotations

import itertools
import time
from math import prod

import msgspec
import numpy as np
import pytest

from toolchain import fixed, limits
from toolchain.errors import DesignRuleError, GraphError, UsageError
from toolchain.ir import (
    DECAY_ONE,
    EXPONENT_LIMIT,
    MANTISSA_LIMIT,
    POTENTIAL_LIMIT,
    AvgPool2d,
    Bias,
    Conv2d,
    ConvTranspose2d,
    Core,
    Dense,
    Drive,
    Dynamics,
    Graph,
    Identity,
    Phase,
    Placement,
    Population,
    Provenance,
    Slice,
    Synapse,
    Units,
    adjoint,
    frozen,
    verify,
)
from toolchain.passes import Partition
from toolchain.utilisation import render, utilisation

change = msgspec.structs.replace
COUPLE, BOTH, READOUT, RELAY = Dynamics(1.0, 64, 64, "plus"), Dynamics(1.0, 64, 64, "both"), Dynamics(1.0), Dynamics(1.0, members="graded")


def network(layers, synapses, *, feedback=False, bits=8, relays=()):
    """An integer graph: `layers` are names with shapes (the last is the readout), `synapses` (source, target, operations, weight shapes)."""
    names = list(layers)
    couples = [name for name in names[:-1] if name not in relays]
    order = {name: i for i, name in enumerate(names)}
    tensors, made = {}, []
    for source, target, ops, shapes in synapses:
        for key, shape in shapes.items():
            tensors[key] = frozen(np.resize([2 ** (bits - 1) - 1, 1 - 2 ** (bits - 1), 1], shape), np.int16)
        made.append(Synapse(source, target, tuple(ops), 0 if order[source] < order[target] else 1))
    dynamics = {**dict.fromkeys(couples, COUPLE), **dict.fromkeys(relays, RELAY), names[-1]: READOUT}
    phases = [Phase("forward", 4, tuple(names), dynamics, tuple(made))]
    if feedback:
        inner = [s for s in made if s.target != names[-1]]
        back = tuple(
            Synapse(s.target, s.source, adjoint(s.ops), s.delay, None if s.target in relays else s.target) for s in reversed(inner)
        )
        inward = tuple(reversed(names[:-1]))
        there = {name: RELAY if name in relays else BOTH for name in inward}
        phases.append(Phase("feedback", 4, inward, there, back, drive=(Drive(inward[0], "error"),)))
    kinds = {**dict.fromkeys(couples, "couple"), **dict.fromkeys(relays, "linear"), names[-1]: "readout"}
    populations = tuple(Population(name, tuple(shape), kinds[name]) for name, shape in layers.items())
    graph = Graph(populations, tuple(phases), tensors, Units("integer", {}), Provenance("test"))
    verify(graph)
    return graph


def conv(key, out, into, kernel, **options):
    return [Conv2d(key, **options)], {key: (out, into // options.get("groups", 1), kernel, kernel)}


def images(feedback=False):
    """Convolutions with stride, padding, dilation and groups, a pool before one, upsampling, a transposed convolution in a loop, a relay's skip."""
    layers = {"a": (4, 9, 7), "b": (6, 9, 7), "c": (6, 5, 4), "d": (6, 5, 4), "e": (8, 3, 2), "out": (5,)}
    first, second = conv("ab", 6, 4, 3, padding=(1, 1)), conv("bc", 6, 6, 3, stride=(2, 2), padding=(1, 1), groups=3)
    fourth, fifth = conv("de", 8, 6, 3, padding=(1, 1), dilation=(1, 1)), conv("cd", 6, 6, 3, padding=(2, 2), dilation=(2, 2))
    synapses = [
        ("a", "b", *first),
        ("b", "c", *second),
        ("c", "d", *fifth),
        ("c", "d", [Identity()], {}),
        ("d", "e", [AvgPool2d((2, 2), (2, 2), (1, 0)), *fourth[0]], fourth[1]),
        ("c", "a", [ConvTranspose2d("ca", (2, 2), (1, 1), (0, 0))], {"ca": (6, 4, 3, 3)}),
        ("e", "out", [AvgPool2d((1, 2), (1, 2)), Dense("readout")], {"readout": (5, 8 * 3)}),
    ]
    return network(layers, synapses, feedback=feedback, relays=("d",))


@pytest.fixture
def small_chip(monkeypatch):
    """`small_chip(chip="loihi2", neurons_per_core=20, ...)`: the chip with smaller limits."""

    def shrink(chip="loihi2", **values):
        real = limits.load(chip)
        changed = {name: limits.Limit(value, "a test") for name, value in values.items()}
        monkeypatch.setattr(limits, "load", lambda name: change(real, **changed))
        return limits.load(chip)

    return shrink


def matrix(graph, synapse):
    """Which source neurons feed which target neurons, (sources, targets), by applying the operations to each source neuron alone."""
    source, target = graph.population(synapse.source).shape, graph.population(synapse.target).shape
    positive = {name: np.abs(tensor) + 1 for name, tensor in graph.tensors.items()}
    return (
        fixed.apply(synapse.ops, positive, np.eye(prod(source)).reshape(-1, *source), target, integer=True).reshape(prod(source), -1) != 0
    )


def members(graph, part):
    """The numbers of a slice's neurons within their population."""
    grid = np.arange(prod(graph.population(part.population).shape)).reshape(graph.population(part.population).shape)
    return grid[tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))].ravel()


def slices_of(graph, name):
    return [(core, part) for core in graph.placement.cores for part in core.slices if part.population == name]


# --- limits -----------------------------------------------------------------------------------------------------------------------------------


def test_every_limit_of_every_chip_has_a_source():
    assert limits.chips() == ("loihi1", "loihi2")
    for chip in limits.chips():
        found = msgspec.structs.asdict(limits.load(chip))
        assert found.pop("chip") == chip
        assert all(isinstance(limit.value, int) and len(limit.source) > 20 for limit in found.values())
    with pytest.raises(UsageError, match="unknown chip 'loihi3': choose one of loihi1, loihi2"):
        Partition("loihi3")(images())


@pytest.mark.parametrize("chip", limits.chips())
def test_the_graph_s_arithmetic_is_that_of_every_chip(chip):
    """The widths that `ir` and `fixed` are written for are repeated in each chip's file."""
    found = limits.load(chip)
    assert found.potential_bits.value == POTENTIAL_LIMIT.bit_length() + 1 == 24
    assert 2 ** (found.current_mantissa_bits.value - 1) == MANTISSA_LIMIT == 4096
    assert 2**found.decay_bits.value == DECAY_ONE == 4096
    assert found.current_exponent.value == found.weight_exponent.value == EXPONENT_LIMIT == 7
    assert fixed.weight_range(found.weight_bits.value) == (-128, 127)


# --- placements -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chip", ["loihi1", "loihi2"])
@pytest.mark.parametrize("seed", range(6))
def test_random_networks_are_placed_whole_and_the_same_way_twice(random_graph, chip, seed):
    graph = random_graph(seed, couples=1 + seed % 4)
    placed = Partition(chip)(graph)
    verify(placed)
    assert placed.placement == Partition(chip)(graph).placement
    assert change(placed, placement=None, provenance=graph.provenance) == graph
    assert len(placed.placement.cores) == 1  # small populations share a core


TIGHT = {"neurons_per_core": 24, "input_axons": 90, "core_memory_bits": 60_000, "reserved_memory_bits": 0, "cores_per_chip": 5}


@pytest.mark.parametrize("feedback", [False, True])
def test_cut_populations_cover_every_neuron_once_and_fill_no_core(small_chip, feedback):
    chip = small_chip(**TIGHT)
    placed = Partition()(images(feedback))
    verify(placed)
    use = utilisation(placed)
    assert use.chips > 2
    assert max(core.core for core in use.cores) == 4
    assert {core.chip for core in use.cores} == set(range(use.chips))
    for core in use.cores:
        assert core.neurons <= chip.neurons_per_core.value
        assert core.memory_bits <= chip.memory_bits
        assert core.input_axons <= chip.input_axons.value
        assert use.fullest(core) <= 1
    each = {p.name: 2 if feedback and p.kind == "couple" else 1 for p in placed.populations}
    assert sum(core.neurons for core in use.cores) == sum(each[p.name] * prod(p.shape) for p in placed.populations)


def test_more_room_never_takes_more_cores(small_chip):
    small_chip(**TIGHT)
    tight = Partition()(images())
    small_chip(**{**TIGHT, "neurons_per_core": 200, "core_memory_bits": 200_000, "input_axons": 400})
    assert len(Partition()(images()).placement.cores) < len(tight.placement.cores)


# --- costs, counted neuron by neuron ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("chip", ["loihi1", "loihi2"])
def test_axons_are_those_of_the_matrices(small_chip, chip, feedback):
    """Positions that feed a slice, entries for all pairs of a position and a slice it feeds, from the full matrices."""
    found = small_chip(chip, **TIGHT, graded_spike_bits=32)
    graph = images(feedback)
    placed = Partition(chip)(graph)
    use = utilisation(placed)
    inputs = np.zeros(len(placed.placement.cores), int)
    outputs = inputs.copy()
    number = {(core.chip, core.core): i for i, core in enumerate(placed.placement.cores)}
    for phase in graph.phases:
        for synapse in phase.synapses:
            wired = matrix(graph, synapse)
            source = graph.population(synapse.source)
            positions = np.arange(prod(source.shape)) % prod(source.shape[1:])
            both = phase.dynamics[synapse.target].members == "both"
            for core, part in slices_of(placed, synapse.target):
                fed = wired[:, members(graph, part)].any(axis=1)
                listens = len(set(positions[fed])) if len(source.shape) > 1 else fed.sum()
                inputs[number[core.chip, core.core]] += listens * (2 if both else 1)
                for sender, piece in slices_of(placed, synapse.source):
                    own = members(graph, piece)
                    sends = len(set(positions[own][fed[own]]))
                    outputs[number[sender.chip, sender.core]] += sends * found.population_axon_slots.value * (2 if both else 1)
    assert [core.input_axons for core in use.cores] == inputs.tolist()
    assert [core.output_axons for core in use.cores] == outputs.tolist()


@pytest.mark.parametrize("broadcast", [0, 1])
@pytest.mark.parametrize("feedback", [False, True])
def test_traffic_is_that_of_the_matrices(small_chip, feedback, broadcast):
    small_chip(**TIGHT, broadcast=broadcast)
    graph = images(feedback)
    placed = Partition()(graph)
    expected: dict[tuple[int, int], dict[str, int]] = {}
    axons: dict[tuple[int, int], int] = {}
    for phase, synapse in [(p, s) for p in graph.phases for s in p.synapses]:
        wired = matrix(graph, synapse)
        senders = 2 if phase.dynamics[synapse.source].members == "both" else 1
        home = {n: core.chip for core, part in slices_of(placed, synapse.source) for n in members(graph, part)}
        for neuron, chip in home.items():
            reached = [core.chip for core, part in slices_of(placed, synapse.target) if wired[neuron, members(graph, part)].any()]
            for other in set(reached) - {chip}:
                messages = 1 if broadcast else reached.count(other)
                tally = expected.setdefault((chip, other), {})
                tally[phase.name] = tally.get(phase.name, 0) + messages
                axons[chip, other] = axons.get((chip, other), 0) + senders
    found = utilisation(placed).traffic
    assert {(t.source, t.target): t.axons for t in found} == axons
    assert {(t.source, t.target): t.spikes for t in found} == {pair: max(tally.values()) for pair, tally in expected.items()}


def words(synapses, width):
    """Bits of a list of synapses: blocks of 64 with a header of 10 bits, in words of 64 bits."""
    return sum(-(-(min(64, synapses - i) * width + 10) // 64) * 64 for i in range(0, synapses, 64))


@pytest.mark.parametrize(("bits", "stored"), [(8, 8), (7, 8), (4, 4), (2, 2)])
def test_memory_of_a_dense_connection(bits, stored):
    graph = network(
        {"a": (70,), "out": (3,)}, [("a", "a", [Dense("aa")], {"aa": (70, 70)}), ("a", "out", [Dense("r")], {"r": (3, 70)})], bits=bits
    )
    (core,) = utilisation(Partition("loihi1")(graph)).cores
    assert core.memory_bits == 70 * words(70, stored) + 70 * words(3, stored)
    assert (core.neurons, core.input_axons, core.output_axons) == (
        2 * 70 + 3,
        140,
        140,
    )  # on Loihi 1 a soft reset takes a second compartment
    (core,) = utilisation(Partition("loihi2")(graph)).cores
    assert core.memory_bits == 70 * words(70, stored) + 70 * words(3, stored) + 73 * 128 + 140 * 16
    assert (core.neurons, core.input_axons, core.output_axons) == (73, 140, 140)


def test_loihi_2_stores_a_kernel_once_and_loihi_1_once_for_each_border():
    layers = {"a": (4, 10, 10), "b": (6, 10, 10), "out": (2,)}
    graph = network(layers, [("a", "b", *conv("ab", 6, 4, 3, padding=(1, 1))), ("b", "out", [Dense("r")], {"r": (2, 600)})])
    readout = 100 * words(6 * 2, 8)
    (core,) = utilisation(Partition("loihi2")(graph)).cores
    assert core.memory_bits == words(4 * 6 * 9, 8) + readout + 1002 * 128 + core.output_axons * 16
    use = utilisation(Partition("loihi1")(change(graph, populations=graph.populations)))
    b = next(p for p in use.populations if p.name == "b")
    assert b.slices > 1
    # Lists are cut by the borders of the image and of the slice, with an index of a target each: more than one kernel, fewer than one a position.
    channels = b.slice_shape[0]
    assert words(4 * channels * 9, 8) < b.memory_bits < 100 * words(4 * channels * 9, 8 + 10)


def test_the_feedback_phase_stores_its_transposes_and_doubles_couples():
    layers, dense = (
        {"a": (50,), "b": (40,), "out": (3,)},
        [("a", "b", [Dense("ab")], {"ab": (40, 50)}), ("b", "out", [Dense("r")], {"r": (3, 40)})],
    )
    (alone,) = utilisation(Partition()(network(layers, dense))).cores
    (both,) = utilisation(Partition()(network(layers, dense, feedback=True))).cores
    assert (alone.neurons, both.neurons) == (93, 183)
    assert both.input_axons == alone.input_axons + 2 * 40  # plus and minus members listen
    assert both.output_axons == alone.output_axons + 2 * 2 * 40  # plus and minus members send, each to both
    assert both.memory_bits - alone.memory_bits == 40 * words(50, 8) + 90 * 128 + 160 * 16
    (first,) = utilisation(Partition("loihi1")(network(layers, dense, feedback=True))).cores
    assert first.neurons == 4 * 90 + 3
    assert first.memory_bits == 50 * words(40, 8) + 40 * words(3, 8) + 2 * 40 * words(50, 8)  # W and -W


@pytest.mark.parametrize("chip", ["loihi1", "loihi2"])
@pytest.mark.parametrize("tight", [{}, TIGHT])
@pytest.mark.parametrize("feedback", [False, True])
def test_a_flattened_image_is_counted_never_below_its_matrices(small_chip, chip, tight, feedback):
    """Flat populations that meet images without a fully connected operation: convolved and pooled into, upsampled and convolved out of, grouped."""
    found = small_chip(chip, **{"input_axons": 300, **tight, "graded_spike_bits": 32})
    layers = {"a": (4, 6, 6), "flat": (24,), "image": (4, 3, 2), "wide": (6, 4), "out": (6,)}
    synapses = [
        ("a", "flat", [*conv("af", 6, 4, 3, padding=(1, 1), groups=2)[0], AvgPool2d((3, 3), (3, 3))], {"af": (6, 2, 3, 3)}),
        ("flat", "image", [Identity()], {}),
        ("image", "wide", [AvgPool2d((1, 1), (1, 1))], {}),
        ("image", "a", [ConvTranspose2d("ia", (2, 3))], {"ia": (4, 4, 2, 3)}),
        ("a", "out", [Conv2d("r", (2, 2)), AvgPool2d((2, 2), (2, 2))], {"r": (6, 4, 3, 3)}),
    ]
    graph = network(layers, synapses, feedback=feedback)
    placed = Partition(chip)(graph)
    verify(placed)
    use = utilisation(placed)
    inputs = np.zeros(len(use.cores), int)
    stored = inputs.copy()
    number = {(core.chip, core.core): i for i, core in enumerate(placed.placement.cores)}
    for phase in graph.phases:
        for synapse in phase.synapses:
            wired = matrix(graph, synapse)
            shape = graph.population(synapse.source).shape
            positions = np.arange(prod(shape)) % prod(shape[1:])
            both = phase.dynamics[synapse.target].members == "both"
            flattens = len(shape) == 1 or len(graph.population(synapse.target).shape) < 3
            for core, part in slices_of(placed, synapse.target):
                fed = wired[:, members(graph, part)].any(axis=1)
                listens = len(set(positions[fed])) if len(shape) > 1 else fed.sum()
                inputs[number[core.chip, core.core]] += listens * (2 if both else 1)
                if flattens:  # at least 2 bits a weight
                    stored[number[core.chip, core.core]] += 2 * wired[:, members(graph, part)].sum()
    assert all(core.input_axons >= least for core, least in zip(use.cores, inputs, strict=True))
    assert all(core.memory_bits >= least for core, least in zip(use.cores, stored, strict=True))
    for core in use.cores:
        assert core.input_axons <= found.input_axons.value
        assert core.memory_bits <= found.memory_bits


def test_channels_that_stay_apart_are_counted_apart():
    """Flattening keeps the order of channels: a flat population reads each channel's positions from its own channel only."""
    layers = {"a": (4, 6, 6), "flat": (16,), "out": (2,)}
    graph = network(layers, [("a", "flat", [AvgPool2d((3, 3), (3, 3))], {}), ("flat", "out", [Dense("r")], {"r": (2, 16)})])
    (core,) = utilisation(Partition("loihi1")(graph)).cores
    # 36 positions with lists of 4 channels and 4 weights each; 16 lists of 2.
    assert core.memory_bits == 36 * words(4 * 4, 2) + 16 * words(2, 8)
    assert core.input_axons == 36 + 16


# --- what does not fit --------------------------------------------------------------------------------------------------------------------------


def test_a_population_larger_than_a_core_needs_partition():
    layers = {"hidden": (64, 14, 14), "out": (10,)}
    graph = network(
        layers,
        [("hidden", "hidden", *conv("w", 64, 64, 1)), ("hidden", "out", [AvgPool2d((14, 14), (14, 14)), Dense("r")], {"r": (10, 64)})],
    )
    sentence = (
        "population 'hidden' has 12,544 neurons; loihi2 holds 8,192 per core: partition it (--set partition.split=true) or lower the width"
    )
    with pytest.raises(DesignRuleError) as raised:
        Partition(split=False)(graph)
    assert sentence in str(raised.value)
    assert len(slices_of(Partition()(graph), "hidden")) > 1


def test_all_violations_are_said_at_once():
    layers = {"a": (5000,), "b": (20,), "stream": (20,), "out": (4,)}
    synapses = [
        ("a", "b", [Dense("wide")], {"wide": (20, 5000)}),
        ("b", "stream", [Identity()], {}),
        ("stream", "out", [Dense("readout")], {"readout": (4, 20)}),
    ]
    graph = network(layers, synapses, relays=("stream",), bits=9)
    with pytest.raises(DesignRuleError) as raised:
        Partition("loihi1")(graph)
    head, *sentences = str(raised.value).splitlines()
    assert head == "'test' does not fit loihi1, for 4 reasons:"
    assert sentences == [
        "- population 'b' gets weights of 9 bits ('wide'); loihi1 stores 8: quantize to fewer (--weight-bits 8)",
        "- population 'out' gets weights of 9 bits ('readout'); loihi1 stores 8: quantize to fewer (--weight-bits 8)",
        (
            "- population 'stream' is a relay, whose spikes carry graded values; loihi1 has binary spikes only: compile for loihi2 (--chip loihi2), "
            "or train a network without residual streams"
        ),
        (
            "- a single neuron of population 'b' takes 5,000 input axons; loihi1 holds 4,096 per core, and no partition helps: "
            "lower the width of what feeds it ('a')"
        ),
    ]


def test_weights_of_one_neuron_beyond_a_core_are_named():
    graph = network(
        {"a": (512, 20, 20), "b": (4,), "out": (4,)},
        [("a", "b", [Dense("w")], {"w": (4, 204_800)}), ("b", "out", [Dense("r")], {"r": (4, 4)})],
    )
    with pytest.raises(
        DesignRuleError, match=r"a single neuron of population 'b' takes 1,\d+,\d+ bits of memory; loihi1 holds 1,048,576 per core"
    ):
        Partition("loihi1")(graph)


def test_graded_input_needs_graded_spikes():
    populations = (Population("input", (6,), "input"), Population("a", (6,), "couple"), Population("out", (2,), "readout"))
    synapses = (Synapse("input", "a", (Dense("in"),)), Synapse("a", "out", (Dense("r"),)))
    forward = Phase("forward", 4, ("input", "a", "out"), {"a": COUPLE, "out": READOUT}, synapses)
    tensors = {"in": frozen(np.ones((6, 6)), np.int8), "r": frozen(np.ones((2, 6)), np.int8)}
    graph = Graph(populations, (forward,), tensors, Units("integer", {"forward": {"input": 255.0}}), Provenance("test"))
    with pytest.raises(
        DesignRuleError, match=r"input 'input' sends graded spikes of 8 bits; loihi1 has binary spikes only: .*--input bias"
    ):
        Partition("loihi1")(graph)
    placed = Partition("loihi2")(graph)
    assert [(t.source, t.target, t.axons, t.spikes) for t in utilisation(placed).traffic] == [(None, 0, 6, 6)]
    binary = change(graph, units=Units("integer", {"forward": {"input": 1.0}}))
    assert Partition("loihi1")(binary).placement is not None


def test_currents_beyond_the_chip_are_named(small_chip):
    graph = network({"a": (3,), "out": (2,)}, [("a", "out", [Dense("r")], {"r": (2, 3)})])
    forward = change(graph.phase("forward"), bias={"a": (Bias("bias", exponent=6),)})
    graph = change(graph, phases=(forward,), tensors={**graph.tensors, "bias": frozen(np.ones(3), np.int16)})
    small_chip(current_exponent=5)
    with pytest.raises(DesignRuleError, match="population 'a' gets a current with exponent 6 in the forward phase; loihi2 has 0 to 5"):
        Partition()(graph)


def test_a_readout_that_fits_no_core_stays_on_the_host():
    layers = {"a": (512, 20, 20), "out": (4,)}
    graph = network(layers, [("a", "out", [Dense("r")], {"r": (4, 204_800)})])
    placed = Partition("loihi1")(graph)
    verify(placed)
    assert slices_of(placed, "out") == []
    (note,) = placed.provenance.notes
    assert "readout 'out' stays on the host" in note
    assert utilisation(placed).host == ("out",)
    assert "readout 'out' on the host" in utilisation(placed).to_text()


def test_more_chips_than_were_ever_built_are_refused(small_chip):
    small_chip(**{**TIGHT, "cores_per_chip": 1, "largest_system": 3})
    with pytest.raises(DesignRuleError, match=r"'test' takes \d+ chips; the largest system of loihi2 has 3"):
        Partition()(images())


def test_floats_are_on_no_chip(random_graph):
    with pytest.raises(GraphError, match="quantize it before partition"):
        Partition()(random_graph(0, integer=False))


# --- what makes a placement valid ---------------------------------------------------------------------------------------------------------------


def placed_by_hand(*cores):
    graph = network({"a": (4, 6), "out": (2,)}, [("a", "out", [Dense("r")], {"r": (2, 24)})])
    made = tuple(Core(chip, core, tuple(Slice(*part) for part in parts)) for chip, core, parts in cores)
    return change(graph, placement=Placement("loihi2", made))


OUT = ("out", (0,), (2,))


@pytest.mark.parametrize(
    ("cores", "said"),
    [
        ([(0, 0, [OUT])], "population 'a' has 24 neurons and the placement holds 0"),
        ([(0, 0, [OUT, ("a", (0, 0), (4, 5))])], "has 24 neurons and the placement holds 20"),
        (
            [(0, 0, [OUT, ("a", (0, 0), (3, 6))]), (0, 1, [("a", (2, 0), (3, 6))])],
            r"holds neurons of population 'a' from \(2, 0\) to \(3, 6\) twice",
        ),
        ([(0, 0, [OUT, ("a", (0, 0), (4, 7))])], r"core 0 of chip 0 holds population 'a' from \(0, 0\) to \(4, 7\), which is no box"),
        ([(0, 0, [OUT, ("a", (0,), (24,))])], "which is no box"),
        ([(0, 0, [OUT, ("a", (2, 0), (2, 6))])], "which is no box"),
        ([(0, 0, [OUT]), (0, 0, [("a", (0, 0), (4, 6))])], "core 0 of chip 0 twice"),
        ([(0, -1, [OUT, ("a", (0, 0), (4, 6))])], "numbered from 0"),
        ([(0, 0, [OUT, ("z", (0, 0), (4, 6))])], "unknown population 'z'"),
        ([(0, 0, [("out", (0,), (1,)), ("a", (0, 0), (4, 6))])], "population 'out' has 2 neurons and the placement holds 1"),
    ],
)
def test_placements_that_miss_or_repeat_neurons_are_invalid(cores, said):
    with pytest.raises(GraphError, match=said):
        verify(placed_by_hand(*cores))


def test_a_placement_by_hand_is_told_like_any_other():
    graph = placed_by_hand((0, 3, [OUT]), (1, 0, [("a", (0, 0), (4, 2))]), (1, 1, [("a", (0, 2), (4, 6))]))
    verify(graph)
    use = utilisation(graph)
    assert [(core.chip, core.core, dict(core.populations)) for core in use.cores] == [
        (0, 3, {"out": 2}),
        (1, 0, {"a": 8}),
        (1, 1, {"a": 16}),
    ]
    assert [(t.source, t.target, t.axons) for t in use.traffic] == [(1, 0, 24)]


# --- text, JSON and pictures --------------------------------------------------------------------------------------------------------------------


def test_utilisation_adds_up(small_chip):
    small_chip(**TIGHT)
    use = utilisation(Partition()(images(feedback=True)))
    told = use.to_json()
    for name in ("neurons", "memory_bits", "input_axons", "output_axons"):
        assert told["totals"][name] == sum(core[name] for core in told["cores"]) == sum(chip[name] for chip in told["chips"])
    assert told["totals"]["cores"] == len(told["cores"]) == sum(chip["cores"] for chip in told["chips"])
    assert told["totals"]["axons_between_chips"] == sum(pair["axons"] for pair in told["traffic"])
    assert all(0 <= share <= 1 for core in told["cores"] for share in core["shares"].values())
    assert all(told["limits"][name]["source"] for name in told["limits"])
    assert {p["name"]: p["neurons"] for p in told["populations"]}["a"] == 2 * 4 * 9 * 7
    text = use.to_text()
    assert f"{told['totals']['cores']} cores of {told['totals']['chips']} chips" in text
    assert "between chips" in text
    assert "more chips" in text  # the text lists the first ones


def test_a_graph_without_placement_has_no_utilisation():
    with pytest.raises(GraphError, match="on no cores: run partition"):
        utilisation(images())


@pytest.mark.parametrize("limit", [{}, {"cores_per_chip": 40}])
def test_the_picture_is_the_same_twice(small_chip, limit):
    """With few chips every core is drawn, with many every chip."""
    small_chip(**{**TIGHT, **limit})
    use = utilisation(Partition()(images()))
    picture = render(use)
    assert picture == render(use)
    assert b"<svg" in picture
    assert b"<dc:date>" not in picture
    assert render(use, "png").startswith(b"\x89PNG")


# --- size ---------------------------------------------------------------------------------------------------------------------------------------


def test_a_network_of_cifarnet_f_s_size_is_planned_in_two_seconds():
    """11.8 million weights, 217,088 couples, a loop from the last to the first, both phases."""
    widths = (128, 256, 512, 1024, 512)
    sides = (16, 16, 8, 8, 8)
    names = [f"hidden{i + 1}" for i in range(5)]
    layers = {name: (n, side, side) for name, n, side in zip(names, widths, sides, strict=True)} | {"readout": (10,)}
    synapses = [
        (a, b, *conv(f"{a}-{b}", layers[b][0], layers[a][0], 3, padding=(1, 1), stride=(2, 2) if layers[a][1] > layers[b][1] else (1, 1)))
        for a, b in itertools.pairwise(names)
    ]
    synapses.append(("hidden5", "hidden1", [ConvTranspose2d("loop", (2, 2), (1, 1), (1, 1))], {"loop": (512, 128, 3, 3)}))
    synapses.append(("hidden5", "readout", [Dense("readout")], {"readout": (10, 512 * 64)}))
    graph = network(layers, synapses, feedback=True)
    start = time.process_time()
    placed = Partition()(graph)
    use = utilisation(placed)
    assert time.process_time() - start < 2
    assert use.chips <= 8
    assert max(map(use.fullest, use.cores)) <= 1
    verify(placed)
