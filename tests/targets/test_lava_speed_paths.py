"""The fast paths of lava-sim give the integers of `toolchain.fixed`: event-driven currents, couples in one pass, channels that read messages where they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from toolchain import fixed, native
from toolchain.ir import (
    POTENTIAL_LIMIT,
    Array,
    AvgPool2d,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Dynamics,
    Graph,
    Identity,
    Op,
    Phase,
    Population,
    Provenance,
    Scale,
    Synapse,
    Units,
    Upsample,
)
from toolchain.passes.retime import Retime
from toolchain.targets.lava_sim import LAVA_SIM, LavaSim
from toolchain.targets.lava_sim.composition import Composition
from toolchain.targets.lava_sim.couples import Couples
from toolchain.targets.lava_sim.events import Events
from toolchain.targets.lava_sim.plan import Board, Part, Record, Role, shared
from toolchain.targets.reference import Reference

compiled = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
lava = pytest.mark.skipif(LAVA_SIM.available() is not None, reason=str(LAVA_SIM.available()))

TWO, ONE, NONE = (2, 2), (1, 1), (0, 0)

OPERATIONS: dict[str, tuple[tuple[Op, ...], tuple[int, ...], tuple[int, ...], dict[str, tuple[int, ...]]]] = {
    "conv, stride 2": ((Conv2d("w", TWO, TWO, exponent=4),), (3, 7, 9), (5, 4, 5), {"w": (5, 3, 5, 5)}),
    "conv, stride 1": ((Conv2d("w", ONE, ONE),), (2, 6, 5), (33, 6, 5), {"w": (33, 2, 3, 3)}),
    "conv, written in squares": ((Conv2d("w", ONE, ONE, exponent=5),), (2, 6, 5), (33, 6, 5), {"w": (33, 2, 3, 3)}),
    "conv, stride 3 by 2, dilated": ((Conv2d("w", (3, 2), (2, 1), (1, 2)),), (2, 11, 10), (4, 4, 4), {"w": (4, 2, 4, 3)}),
    "conv, dilated": ((Conv2d("w", ONE, NONE, TWO),), (1, 8, 7), (2, 4, 3), {"w": (2, 1, 3, 3)}),
    "conv, one place": ((Conv2d("w", ONE, NONE),), (2, 3, 3), (1, 1, 1), {"w": (1, 2, 3, 3)}),
    "conv's adjoint, stride 2": ((Conv2d("w", TWO, TWO, exponent=3, transpose=True),), (5, 4, 5), (3, 7, 9), {"w": (5, 3, 5, 5)}),
    "transposed conv": (
        (ConvTranspose2d("w", TWO, ONE, output_padding=ONE, exponent=2),),
        (3, 4, 3),
        (4, 8, 6),
        {"w": (3, 4, 3, 3)},
    ),
    "transposed conv's adjoint": (
        (ConvTranspose2d("w", TWO, ONE, output_padding=ONE, transpose=True),),
        (4, 8, 6),
        (3, 4, 3),
        {"w": (3, 4, 3, 3)},
    ),
    "dense": ((Dense("w", exponent=1),), (2, 3, 3), (37,), {"w": (37, 18)}),
    "dense's adjoint": ((Dense("w", transpose=True),), (37,), (2, 3, 3), {"w": (37, 18)}),
    "single neurons": ((Dense("w"),), (1,), (1,), {"w": (1, 1)}),
    "pool": ((AvgPool2d((3, 2), TWO, (1, 0)),), (3, 7, 6), (3, 4, 3), {}),
    "pool's adjoint": ((AvgPool2d((3, 2), TWO, (1, 0), transpose=True),), (3, 4, 3), (3, 7, 6), {}),
    "upsampling": ((Upsample(2),), (2, 3, 4), (2, 6, 8), {}),
    "upsampling's adjoint": ((Upsample(2, transpose=True),), (2, 6, 8), (2, 3, 4), {}),
    "factors": ((Scale(1.0, "w", exponent=5),), (3, 2, 5), (3, 2, 5), {"w": (3,)}),
    "factors of a row": ((Scale(1.0, "w"),), (7,), (7,), {"w": (7,)}),
    "shift": ((Scale(exponent=3),), (3, 2, 5), (3, 2, 5), {}),
    "shift, then dense": ((Scale(exponent=3), Dense("w", exponent=2)), (19,), (7,), {"w": (7, 19)}),
    "dense, then shift": ((Dense("w", transpose=True), Identity(), Scale(exponent=7)), (7,), (19,), {"w": (7, 19)}),
    "pool, then conv": ((AvgPool2d(TWO, TWO, NONE), Identity(), Conv2d("w", ONE, TWO)), (2, 8, 6), (3, 4, 3), {"w": (3, 2, 5, 5)}),
    "its adjoint": (
        (Conv2d("w", ONE, TWO, transpose=True), AvgPool2d(TWO, TWO, NONE, transpose=True)),
        (3, 4, 3),
        (2, 8, 6),
        {"w": (3, 2, 5, 5)},
    ),
}
CHAINED_IN_NUMPY = ("its adjoint", "dense, then shift")
"""Between its operations values leave int8."""


def _graph(name: str, weights: str, members: str = "both") -> Graph:
    ops, source, target, tensors = OPERATIONS[name]
    rng = np.random.default_rng(len(name))
    values = {
        "drawn": lambda shape: rng.integers(-128, 128, shape),
        "largest": lambda shape: np.full(shape, 127),
        "smallest": lambda shape: np.full(shape, -128),
        "none": lambda shape: np.zeros(shape, np.int64),
    }[weights]
    synapse = Synapse("a", "b", ops, delay=1)
    dynamics = {name: Dynamics(1.0, 10, 20, members) for name in "ab"}  # type: ignore[arg-type]
    return Graph(
        (Population("a", source, "couple"), Population("b", target, "couple")),
        (Phase("forward", 3, ("a", "b"), dynamics, (synapse,)),),
        {key: values(shape).astype(np.int8) for key, shape in tensors.items()},
        Units("integer", {"forward": {"a": 1.0, "b": 1.0}}),
        Provenance("test"),
    )


def _spikes(kind: str, batch: int, neurons: int, signed: bool) -> Array:
    rng = np.random.default_rng(batch + neurons)
    density = {"none": 0.0, "few": 0.1, "all": 1.0}[kind]
    spikes = (rng.random((batch, neurons)) < density).astype(np.int8)
    if signed:
        spikes *= rng.choice(np.array([-1, 1], np.int8), spikes.shape)
    if kind == "few" and batch > 1:
        spikes[batch // 2] = 0
    return spikes


def _expected(graph: Graph, spikes: Array) -> Array:
    (synapse,) = graph.phase("forward").synapses
    source, target = (graph.population(name).shape for name in "ab")
    made = fixed.apply(synapse.ops, graph.tensors, spikes.reshape(-1, *source), target, integer=True)
    return np.asarray(made.reshape(len(spikes), -1))


@compiled
@pytest.mark.parametrize("weights", ["drawn", "largest", "smallest", "none"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_event_driven_currents_are_the_definition_s(name: str, weights: str) -> None:
    for members in ("plus", "both"):
        graph = _graph(name, weights, members)
        (synapse,) = graph.phase("forward").synapses
        composition = Composition(graph, synapse)
        events = composition._events
        assert (events is None) == (name in CHAINED_IN_NUMPY and weights != "none")
        if events is None:
            continue
        for kind in ("none", "few", "all"):
            for batch in (1, 2, 65):
                spikes = _spikes(kind, batch, composition.inputs, members == "both")
                expected = _expected(graph, spikes)
                for instructions in range(native.widest() + 1):
                    events._instructions = instructions
                    currents = np.full((batch, composition.outputs), 99, composition.message)
                    events(spikes, currents)
                    np.testing.assert_array_equal(currents, expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_without_a_compiler_numpy_gives_the_same_currents(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", lambda: "no compiler")
    graph = _graph(name, "largest")
    (synapse,) = graph.phase("forward").synapses
    composition = Composition(graph, synapse)
    assert composition._events is None
    for kind in ("none", "few", "all"):
        for batch in (1, 2, 65):
            spikes = _spikes(kind, batch, composition.inputs, True)
            made = composition(spikes)
            assert made.dtype == composition.message
            np.testing.assert_array_equal(made, _expected(graph, spikes))


def test_currents_of_an_image_are_kept_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _graph("conv, stride 2", "drawn")
    populations = (Population("a", graph.population("a").shape, "input"), graph.population("b"))
    graph = Graph(populations, graph.phases, graph.tensors, Units("integer", {"forward": {"a": 15.0, "b": 1.0}}), graph.provenance)
    (synapse,) = graph.phase("forward").synapses
    composition = Composition(graph, synapse)
    products = []
    through = composition._through
    monkeypatch.setattr(composition, "_through", lambda values: products.append(len(values)) or through(values))
    first, second = np.random.default_rng(0).integers(0, 16, (2, 3, composition.inputs), np.int32)
    for image in (first, first, second, second, first):
        given = image.copy()
        np.testing.assert_array_equal(composition(given), _expected(graph, image))
        given[...] = 7  # the message's slot is used again
    assert len(products) == 3


@compiled
@pytest.mark.parametrize(("fan", "last", "sums"), [(258, 1, 2), (258, 2, 4), (300, 127, 4)])
def test_sums_of_16_bits_stop_where_they_could_overflow(fan: int, last: int, sums: int) -> None:
    """258 weights of 127 and one of 1 make 32767, which 16 bits hold; one more and they do not."""
    graph = _graph("dense", "drawn")
    weight = np.full((2, fan + 1), 127, np.int8)
    weight[:, -1] = last
    weight[1] *= -1
    populations = (Population("a", (fan + 1,), "couple"), Population("b", (2,), "couple"))
    synapse = Synapse("a", "b", (Dense("w"),), delay=1)
    phase = Phase("forward", 3, ("a", "b"), graph.phase("forward").dynamics, (synapse,))
    graph = Graph(populations, (phase,), {"w": weight}, graph.units, graph.provenance)
    composition = Composition(graph, synapse)
    assert composition._events is not None
    assert [stage.sums for stage in composition._events._stages] == [sums]
    spikes = np.ones((3, fan + 1), np.int8)
    spikes[1] = -1
    currents = np.empty((3, 2), composition.message)
    composition._events(spikes, currents)
    np.testing.assert_array_equal(currents, spikes.astype(np.int64) @ weight.T.astype(np.int64))


@compiled
def test_many_spikes_take_products_and_few_take_events() -> None:
    graph = _graph("dense", "drawn")
    (synapse,) = graph.phase("forward").synapses
    composition = Composition(graph, synapse)
    events = composition._events
    assert events is not None
    spikes = _spikes("few", 4, composition.inputs, False)
    assert events.worth(spikes, 1)
    assert not events.worth(spikes, spikes.size)
    assert not events.worth(np.asfortranarray(spikes), 1)


def _part(dynamics: Dynamics, batch: int, neurons: int, driven: bool, biases: tuple[tuple[int, Array], ...]) -> tuple[Part, Role]:
    phase = Phase("forward", 6, ("a",), {"a": dynamics}, ())
    record = Record.of(2, batch, neurons, np.int64, 6, False)
    role = Role(phase, "a", dynamics, biases, shared((2, batch, neurons), np.int64) if driven else None, record, False, False)
    return Part(Board(1), 0, (batch, neurons), True, (6, 0), (role, None), latches=False, narrow=True), role


class _Messages:
    """Ports that bring given messages."""

    def __init__(self, message: Array | None) -> None:
        self.message, self.finished = message, 0

    def take(self) -> Array | None:
        return self.message

    def done(self) -> None:
        self.finished += 1


@compiled
@pytest.mark.parametrize("members", ["plus", "both"])
@pytest.mark.parametrize(("batch", "neurons"), [(1, 1), (2, 1023), (3, 1025), (65, 17)])
@pytest.mark.parametrize("ports", [0, 1, 3, 11])
def test_couples_in_one_pass_are_the_definition_s(members: Any, batch: int, neurons: int, ports: int) -> None:
    """Steps with potentials at the threshold and beyond 24 bits, messages of every width, a drive, biases that start one after the other, and a mask."""
    rng = np.random.default_rng(neurons + ports)
    shape = (batch, neurons)
    biases = tuple((start, rng.integers(-300, 300, (1, neurons))) for start in (0, 2))
    dynamics = Dynamics(1.0, 100, 150, members)
    part, role = _part(dynamics, batch, neurons, True, biases)
    assert Couples.serve(part)
    assert role.drive is not None
    assert role.record is not None
    role.drive[1] = rng.integers(-50, 50, shape)
    mask = rng.random(shape) < 0.5 if members == "both" else None
    for instructions in range(native.widest() + 1):
        couples = Couples(part)
        couples._instructions = instructions
        for counter in (role.record.counts, role.record.activity, role.record.saturations):
            counter[1] = 0
        couples.begin(role, 1, mask)
        potential = np.zeros(shape, np.int64)
        saturated, counts, activity = np.zeros((3, *shape), np.int64)
        kinds = [np.int8, np.int16, np.int32, np.int64]
        for step in range(6):
            limits = {np.int8: 127, np.int16: 2**15 - 1, np.int32: POTENTIAL_LIMIT if step > 3 else 100, np.int64: 50}
            messages = [rng.integers(-limits[kinds[i % 4]], limits[kinds[i % 4]] + 1, shape).astype(kinds[i % 4]) for i in range(ports)]
            early = rng.integers(-60, 61, shape).astype(np.int16)
            couples.collect(early)
            brought = [_Messages(message) for message in messages] + [_Messages(None)]
            sent = couples.step(step, brought)  # type: ignore[arg-type]  # ports of a test
            current = sum((message.astype(np.int64) for message in messages), early.astype(np.int64)) + role.drive[1]
            current = current + sum(bias for start, bias in biases if step >= start)
            after = fixed.step(potential, current, dynamics, integer=True)
            potential = after.potential
            saturated, counts, activity = saturated + after.saturated, counts + after.spikes, activity + (after.spikes != 0)
            gated = after.spikes if mask is None else after.spikes * mask
            np.testing.assert_array_equal(couples.potential, potential)
            np.testing.assert_array_equal(couples.spikes, after.spikes)
            np.testing.assert_array_equal(couples.sent, gated)
            assert sent == np.count_nonzero(gated)
            assert all(port.finished == 1 for port in brought)
        np.testing.assert_array_equal(role.record.counts[1], counts)
        np.testing.assert_array_equal(role.record.saturations[1], saturated)
        assert saturated.any() or ports < 3 or neurons == 1  # the test went to the limits
        if members == "both":
            np.testing.assert_array_equal(role.record.activity[1], activity)


@compiled
def test_what_waits_is_forgotten_on_a_phase_s_first_tick() -> None:
    part, role = _part(Dynamics(1.0, 100, 150, "plus"), 2, 5, False, ())
    couples = Couples(part)
    couples.begin(role, 0, None)
    couples.collect(np.full((2, 5), 99, np.int8))
    couples.forget()
    couples.step(0, [])
    assert not couples.potential.any()
    couples.collect(np.full((2, 5), 99, np.int8))
    couples.step(1, [])
    assert (couples.potential == 99).all()


def test_leaks_relays_and_wide_sums_are_not_for_the_kernel() -> None:
    assert not Couples.serve(_part(Dynamics(0.5, 100, 150, "plus"), 2, 5, False, ())[0])
    assert not Couples.serve(_part(Dynamics(1.0, 0, 0, "none"), 2, 5, False, ())[0])
    assert not Couples.serve(_part(Dynamics(1.0, members="graded"), 2, 5, False, ())[0])
    part, _ = _part(Dynamics(1.0, 100, 150, "plus"), 2, 5, False, ())
    assert not Couples.serve(Part(part.board, 0, part.shape, True, part.ticks, part.roles, latches=False))


@lava
def test_a_channel_keeps_order_silence_and_types() -> None:
    from toolchain.targets.lava_sim.channel import LightChannel, _Memory

    channel = LightChannel("out", "in", _Memory((2, 3), np.dtype(np.int64), 3, None))
    out, into = channel.src_port, channel.dst_port
    assert not into.probe()
    out.silence()
    out.room(np.int16, 4)[...] = 7
    out.post()
    out.post()
    assert into.probe()
    assert into.take() is None
    into.done()
    taken = into.take()
    assert taken is not None
    assert taken.dtype == np.int16
    assert (taken == 7).all()
    assert into.count() == 4
    into.done()
    out.send(np.full((2, 3), -5.0))  # as Lava's port: in the type of the channel
    assert (into.peek() == -5).all()
    received = into.recv()
    assert received.dtype == np.int64
    assert (received == -5).all()
    for value in range(3):
        assert out.probe()
        out.send(np.full((2, 3), value))
    assert not out.probe()
    assert [int(into.recv()[0, 0]) for _ in range(3)] == [0, 1, 2]
    out.silence()
    out.post()
    silence = into.recv()
    assert silence.dtype == np.int64
    assert not silence.any()
    for _ in range(out.size):  # in slots that had messages of other counts
        out.room(np.int8, 6)[...] = 1
        out.post()
        assert into.take() is not None
        into.done()
        out.silence()
        out.post()
        assert into.take() is None
        assert into.count() == 0
        into.done()
    with pytest.raises(ValueError, match=r"\(2, 3\), not \(3,\)"):
        out.send(np.zeros(3))


@lava
def test_a_channel_carries_thousands_of_messages_to_another_process() -> None:
    from multiprocessing import get_context

    from toolchain.targets.lava_sim.channel import LightChannel, _Memory

    channel = LightChannel("out", "in", _Memory((5, 3), np.dtype(np.int64), 3, None))
    out, into, messages = channel.src_port, channel.dst_port, 4000
    kinds = (np.int8, np.int16, np.int32, np.int64)

    def receive() -> None:
        for number in range(messages):
            message = into.take()
            if number % 5 == 4:
                assert message is None
                assert into.count() == 0
            else:
                assert message is not None
                assert message.dtype == kinds[number % 5]
                assert (message == number % 100).all()
                assert into.count() == (None if number % 2 else number)
            into.done()

    child = get_context("fork").Process(target=receive, daemon=True)
    child.start()
    try:
        for number in range(messages):
            while not out.probe():
                assert child.is_alive(), "the receiver found a wrong message"
            if number % 5 == 4:
                out.silence()
            else:
                out.room(kinds[number % 5], None if number % 2 else number)[...] = number % 100
            out.post()
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()


@lava
@pytest.mark.lava
def test_phases_take_turns_over_synapses_of_several_ticks(random_graph: Any, random_inputs: Any, assert_identical: Any) -> None:
    graph = Retime("exact")(random_graph(3, couples=3))
    assert all(max(synapse.delay for synapse in phase.synapses) >= 2 for phase in graph.phases)
    expected = Reference(trace=True).compile(graph)
    with LavaSim(batch=2, trace=True).compile(graph) as run:
        for seed in range(4):
            inputs, errors = random_inputs(graph, 3, seed)
            assert_identical(run.run(inputs), expected.run(inputs))
            assert_identical(run.run(errors, phase="feedback"), expected.run(errors, phase="feedback"))


@lava
@pytest.mark.lava
@pytest.mark.parametrize("mode", ["exact", "pipelined"])
@pytest.mark.parametrize("name", ["strides", "pools"])
def test_without_a_compiler_networks_are_identical(
    name: str, mode: Any, network_graph: Any, network_inputs: Any, assert_identical: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "missing", lambda: "no compiler")
    graph = Retime(mode)(network_graph(name, "extreme"))
    inputs, errors = network_inputs(graph, 5)
    expected = Reference(trace=True).compile(graph)
    with LavaSim(batch=2, trace=True).compile(graph) as run:
        assert_identical(run.run(inputs), expected.run(inputs))
        assert_identical(run.run(errors, phase="feedback"), expected.run(errors, phase="feedback"))


@compiled
@lava
@pytest.mark.lava
def test_networks_take_the_fast_paths_and_a_fault_there_shows(
    network_graph: Any, network_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that forgets the last sample of a batch: potentials differ from the reference's."""
    from toolchain.native import ticks

    graph = Retime()(network_graph("strides", "extreme"))
    inputs, _ = network_inputs(graph, 5)
    whole = ticks.Way.deliver

    def faulty(way: ticks.Way, values: Array, out: Array, **widths: Any) -> int:
        return whole(way, values[:-1], out[:-1], **widths)

    monkeypatch.setattr(ticks.Way, "deliver", faulty)
    monkeypatch.setattr(Events, "worth", lambda events, spikes, count: True)
    expected = Reference().compile(graph).run(inputs)
    with LavaSim(batch=5).compile(graph) as run:
        made = run.run(inputs)
    assert any(not np.array_equal(made.potentials[name], potentials) for name, potentials in expected.potentials.items())
