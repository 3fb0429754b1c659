"""Counts of operations, sparsity and updates: by hand on small nets, by brute force over every spike and weight, and beside the neurobench package."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import prod
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from toolchain import codec
from toolchain.analysis.workload import Tally, arriving, connection_sparsity, fan_out, footprint
from toolchain.errors import GraphError
from toolchain.ir import (
    AvgPool2d,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Drive,
    Dynamics,
    Graph,
    Identity,
    Phase,
    Population,
    Provenance,
    Synapse,
    Units,
    Upsample,
    frozen,
    verify,
)
from toolchain.passes import Retime
from toolchain.targets.reference import REFERENCE

TRACED = replace(REFERENCE, trace=True)


def chain(shapes, synapses, tensors, drive, *, time_steps, threshold=4, feedback=None):
    """A net of couples in integers that fire at `threshold` and subtract it, one current of the host at the first, a readout behind the last."""
    names = [f"hidden{i + 1}" for i in range(len(shapes))]
    dynamics = {name: Dynamics(1.0, threshold, threshold, "plus") for name in names} | {"readout": Dynamics(1.0)}
    forward = Phase("forward", time_steps, (*names, "readout"), dynamics, tuple(synapses), drive=(drive,))
    phases = (forward,)
    if feedback is not None:
        both = {name: Dynamics(1.0, threshold, threshold, "both") for name in names}
        phases += (Phase("feedback", time_steps, tuple(reversed(names)), both, feedback, drive=(Drive(names[-1], "error"),)),)
    inputs = tensors["input.weight"].shape[1]
    classes = next(tensors[s.ops[-1].weight].shape[0] for s in synapses if s.target == "readout")
    units = Units("integer", {"forward": dict.fromkeys((*names, "input", "readout"), 1.0), "feedback": dict.fromkeys(names, 1.0)})
    populations = [Population("input", (inputs,), "input"), *(Population(n, s, "couple") for n, s in zip(names, shapes, strict=True))]
    graph = Graph((*populations, Population("readout", (classes,), "readout")), phases, tensors, units, Provenance("by-hand"))
    verify(graph)
    return graph


def counted(graph, images, error=None):
    with TRACED.compile(graph) as run:
        forward = run.run(images)
        tally = Tally(graph, "forward")
        tally.see(forward, images=images)
        if error is None:
            return tally.counts()
        back = Tally(graph, "feedback")
        back.see(run.run(error, phase="feedback"), forward=forward)
    return tally.counts(), back.counts()


@pytest.fixture
def recurrent():
    """Two couples. The first gets 4 at every step and fires at all three; the second gets 2 from it one step late and fires at the third."""
    tensors = {
        "input.weight": frozen([[4, 0], [0, 4]], np.int64),
        "loop.weight": frozen([[0, 0], [2, 0]], np.int8),
        "readout.weight": frozen([[1, 1]], np.int8),
    }
    synapses = [Synapse("hidden1", "hidden1", (Dense("loop.weight"),), 1), Synapse("hidden1", "readout", (Dense("readout.weight"),))]
    feedback = (Synapse("hidden1", "hidden1", (Dense("loop.weight", transpose=True),), 1, gate="hidden1"),)
    return chain([(2,)], synapses, tensors, Drive("hidden1", "input", (Dense("input.weight"),)), time_steps=3, feedback=feedback)


def test_a_recurrent_net_by_hand(recurrent):
    found = counted(recurrent, np.array([[1.0, 0.0]]))
    host, loop, readout = found.connections
    assert [c.name for c in found.connections] == ["input -> hidden1", "hidden1 -> hidden1", "hidden1 -> readout"]
    assert [c.where for c in found.connections] == ["host", "chip", "chip"]
    # one pixel that is not 0 meets one weight that is not 0; all four are products of one application
    assert (host.macs, host.acs, host.dense, host.sent, host.rate) == (0, 1, 4, 1, None)
    # the last step's spikes arrive nowhere: of the first couple's three spikes two meet the one weight, in two applications
    assert (loop.applied, loop.acs, loop.dense, loop.products, loop.zero_weights) == (2, 2, 8, 4, 3)
    assert (loop.sent, loop.met) == (4, 8)  # all spikes that are sent, zero weights too
    assert loop.rate == 4 / 6
    assert (readout.applied, readout.acs, readout.dense) == (3, 4, 6)
    assert found.spikes == 4
    assert found.activation_sparsity == 2 / 6
    # potentials after each step are 0 0 0 and 0 2 0: two neurons at the first, then the second at both
    assert found.membrane_updates == 2 + 2
    assert [(p.name, p.updates) for p in found.populations] == [("hidden1", 4), ("readout", 3)]
    assert found.synaptic_operations == 3 + 4  # of the chip: every spike sent meets its weights that are not 0


def test_the_feedback_phase_by_hand(recurrent):
    """The second couple alone is open: it fired once of three times, the first at every step."""
    _, found = counted(recurrent, np.array([[1.0, 0.0]]), np.array([[-4.0, -4.0]]))
    (loop,) = found.connections
    assert found.spikes == 6  # both fire -1 at every step
    assert loop.mask == 1 / 2  # of six spikes three pass; the weights they meet are as many
    assert (loop.sent, loop.met) == (3, 6)
    assert loop.acs == 2  # those of the first two steps, at the one weight
    assert loop.rate == 1
    assert found.synaptic_operations == 2 * 3  # at both members of the target


def test_a_phase_without_connections_counts_its_spikes(recurrent):
    phases = tuple(msgspec.structs.replace(p, synapses=()) if p.name == "feedback" else p for p in recurrent.phases)
    _, found = counted(msgspec.structs.replace(recurrent, phases=phases), np.array([[1.0, 0.0]]), np.array([[4.0, -4.0]]))
    assert (found.spikes, found.effective_acs, found.dense, found.synaptic_operations) == (6, 0, 0, 0)


def test_in_a_single_step_nothing_comes_round_a_loop(recurrent):
    found = counted(recurrent.in_steps({"forward": 1}), np.array([[1.0, 0.0]])).connections[1]
    assert (found.applied, found.acs, found.dense) == (0, 0, 0)
    assert (found.sent, found.met) == (1, 2)


def test_a_grey_pixel_makes_products(recurrent):
    units = msgspec.structs.replace(
        recurrent.units, scale={**recurrent.units.scale, "forward": dict(recurrent.units.scale["forward"], input=2.0)}
    )
    found = counted(msgspec.structs.replace(recurrent, units=units), np.array([[0.5, 0.0], [1.0, 1.0]]))
    assert (found.connections[0].macs, found.connections[0].acs) == (3 / 2, 0)


def test_a_convolution_with_stride_and_padding_by_hand():
    """3 x 3 couples that fire at both steps, 3 x 3 windows at the four corners: each lies on 2 x 2 of them, so 16 products where the formula of padded windows has 36."""
    kernel = np.arange(1, 10).reshape(1, 1, 3, 3)
    kernel[0, 0, 1, 1] = 0
    tensors = {
        "input.weight": frozen(np.full((9, 1), 4), np.int64),
        "conv.weight": frozen(kernel, np.int8),
        "readout.weight": frozen([[1, 0, 1, 0]], np.int8),
    }
    conv = Synapse("hidden1", "hidden2", (Conv2d("conv.weight", stride=(2, 2), padding=(1, 1)),))
    synapses = [conv, Synapse("hidden2", "readout", (Dense("readout.weight"),))]
    graph = chain([(1, 3, 3), (1, 2, 2)], synapses, tensors, Drive("hidden1", "input", (Dense("input.weight"),)), time_steps=2)
    found = counted(graph, np.array([[1.0]])).connections[1]
    assert found.products == found.reach == 16
    assert found.dense == 32
    assert found.acs == 2 * 12  # one weight of each window is 0
    assert found.met == 2 * 16
    assert found.rate == 1
    np.testing.assert_array_equal(fan_out(graph, conv.ops, (1, 3, 3), (1, 2, 2), zeros=True), [1, 2, 1, 2, 4, 2, 1, 2, 1])


def test_behind_a_pool_values_are_graded():
    """Four couples that fire, one pooled sum of 4, two weights: two products at each step, but eight additions where each spike goes all its ways."""
    tensors = {
        "input.weight": frozen(np.full((4, 1), 4), np.int64),
        "conv.weight": frozen(np.ones((2, 1, 1, 1)), np.int8),
        "readout.weight": frozen([[1, 1]], np.int8),
    }
    ops = (AvgPool2d((2, 2), (2, 2)), Conv2d("conv.weight"))
    synapses = [Synapse("hidden1", "hidden2", ops), Synapse("hidden2", "readout", (Dense("readout.weight"),))]
    graph = chain([(1, 2, 2), (2, 1, 1)], synapses, tensors, Drive("hidden1", "input", (Dense("input.weight"),)), time_steps=3)
    found = counted(graph, np.array([[1.0]])).connections[1]
    assert (found.macs, found.acs, found.products, found.reach) == (6, 0, 2, 8)
    assert found.met == 24
    assert found.spiking  # what is sent are spikes


def test_spikes_repeated_by_an_upsampling_stay_spikes():
    tensors = {
        "input.weight": frozen([[4]], np.int64),
        "conv.weight": frozen(np.ones((1, 1, 1, 1)), np.int8),
        "readout.weight": frozen([[1, 1, 1, 1]], np.int8),
    }
    synapses = [
        Synapse("hidden1", "hidden2", (Upsample(2), Conv2d("conv.weight"))),
        Synapse("hidden2", "readout", (Dense("readout.weight"),)),
    ]
    graph = chain([(1, 1, 1), (1, 2, 2)], synapses, tensors, Drive("hidden1", "input", (Dense("input.weight"),)), time_steps=3)
    found = counted(graph, np.array([[1.0]])).connections[1]
    assert (found.acs, found.macs, found.products, found.reach) == (12, 0, 4, 4)


def test_counts_need_a_history_or_say_that_they_have_none(recurrent):
    images = np.array([[1.0, 0.0]])
    with REFERENCE.compile(recurrent) as run:
        forward = run.run(images)
    with pytest.raises(GraphError, match="trace=True"):
        Tally(recurrent, "forward").see(forward, images=images)
    tally = Tally(recurrent, "forward", history=False)
    tally.see(forward, images=images)
    found, whole = tally.counts(), counted(recurrent, images)
    assert [(c.sent, c.met, c.rate, c.products) for c in found.connections] == [
        (c.sent, c.met, c.rate, c.products) for c in whole.connections
    ]
    assert found.synaptic_operations == whole.synaptic_operations
    assert np.isnan([found.effective_acs, found.membrane_updates]).all()


def test_what_is_seen_in_pieces_adds_up(random_graph, random_inputs):
    graph = Retime()(random_graph(3, couples=3))
    images, errors = random_inputs(graph, 6, 1)
    whole = counted(graph, images, errors)
    tallies = [Tally(graph, "forward"), Tally(graph, "feedback")]
    with TRACED.compile(graph) as run:
        for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
            forward = run.run(images[part])
            tallies[0].see(forward, images=images[part])
            tallies[1].see(run.run(errors[part], phase="feedback"), forward=forward)
    assert tuple(tally.counts() for tally in tallies) == whole


# --- by brute force, spike by spike and weight by weight ---


def landing(phase, synapse, step):
    """Whether what the source sends at model step `step` arrives by the target's last step, tick by tick."""
    start, period = phase.timing.start, phase.timing.period
    tick = start.get(synapse.source, 0) + step * period + synapse.delay
    return any(start.get(synapse.target, 0) + own * period >= tick for own in range(phase.time_steps))


def recounted(graph, phase, result, masks):
    """Additions, and weights met by what is sent, of every connection between couples or to the readout (all are dense here)."""
    found = []
    for synapse in phase.synapses:
        (op,) = synapse.ops
        weight = graph.tensors[op.weight].T if op.transpose else graph.tensors[op.weight]
        additions = met = 0
        spikes = result.history[synapse.source].spikes
        for step, sample in itertools.product(range(phase.time_steps), range(spikes.shape[1])):
            for neuron, spike in enumerate(spikes[step, sample].reshape(-1)):
                if spike == 0 or (synapse.gate is not None and not masks[synapse.gate][sample].reshape(-1)[neuron]):
                    continue
                met += len(weight)
                additions += sum(1 for w in weight[:, neuron] if w != 0) if landing(phase, synapse, step) else 0
        found.append((additions, met))
    return found


@pytest.mark.parametrize("mode", ["step", "exact", "pipelined"])
@pytest.mark.parametrize("seed", range(6))
def test_a_recount_by_brute_force(random_graph, random_inputs, seed, mode):
    graph = random_graph(seed, couples=1 + seed % 4, leak=seed % 2 == 1)
    graph = graph if mode == "step" else Retime(mode)(graph)
    images, errors = random_inputs(graph, 3, seed)
    forward, feedback = counted(graph, images, errors)
    with TRACED.compile(graph) as run:
        first = run.run(images)
        second = run.run(errors, phase="feedback")
    masks = {p.name: codec.mask(graph, first, p.name) for p in graph.of_kind("couple")}
    for counts, result in ((forward, first), (feedback, second)):
        phase = graph.phase(counts.phase)
        chip = [c for c in counts.connections if c.where == "chip"]
        assert [(round(c.acs * 3, 6), round(c.met * 3, 6)) for c in chip] == recounted(graph, phase, result, masks)
        assert [c.applied for c in chip] == [sum(landing(phase, s, k) for k in range(phase.time_steps)) for s in phase.synapses]
        changed = spikes = 0
        for population in graph.of_kind("couple"):
            history = result.history[population.name]
            rows = history.potentials.reshape(phase.time_steps, -1)
            changed += rows.shape[1] + sum(
                int(a != b) for before, after in itertools.pairwise(rows) for a, b in zip(before, after, strict=True)
            )
            spikes += int(np.abs(history.spikes.astype(int)).sum())
        assert (counts.membrane_updates * 3, counts.spikes * 3) == pytest.approx((changed, spikes), rel=1e-12)
        neurons = sum(prod(p.shape) for p in graph.of_kind("couple"))
        assert counts.activation_sparsity == pytest.approx(1 - spikes / (3 * neurons * phase.time_steps), rel=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_what_a_convolution_meets_by_brute_force(seed):
    """Every kernel entry at every place of every window, border or not."""
    draw = np.random.default_rng(seed)
    groups = int(draw.integers(1, 3))
    into, out = groups * int(draw.integers(1, 3)), groups * int(draw.integers(1, 3))
    (kh, kw), (sy, sx), (py, px), (dy, dx) = (
        tuple(map(int, draw.integers(low, high, 2))) for low, high in ((1, 4), (1, 4), (0, 3), (1, 3))
    )
    height, width = (int(n) for n in draw.integers(5, 9, 2))
    kernel = draw.integers(-1, 2, (out, into // groups, kh, kw)).astype(np.int8)
    made = ((height + 2 * py - dy * (kh - 1) - 1) // sy + 1, (width + 2 * px - dx * (kw - 1) - 1) // sx + 1)
    met, present = np.zeros((into, height, width)), np.zeros((into, height, width))
    received = np.zeros((out, *made))
    for o, i, y, x, ky, kx in itertools.product(*map(range, (out, into // groups, *made, kh, kw))):
        row, column = y * sy - py + ky * dy, x * sx - px + kx * dx
        if 0 <= row < height and 0 <= column < width:
            channel = o // (out // groups) * (into // groups) + i
            met[channel, row, column] += 1
            present[channel, row, column] += kernel[o, i, ky, kx] != 0
            received[o, y, x] += 1
    graph = SimpleNamespace(tensors={"w": kernel})
    op = Conv2d("w", (sy, sx), (py, px), (dy, dx), groups)
    np.testing.assert_array_equal(fan_out(graph, (op,), met.shape, received.shape, zeros=True), met.reshape(-1))
    np.testing.assert_array_equal(fan_out(graph, (op,), met.shape, received.shape, zeros=False), present.reshape(-1))
    back = msgspec.structs.replace(op, transpose=True)
    np.testing.assert_array_equal(fan_out(graph, (back,), received.shape, met.shape, zeros=True), received.reshape(-1))


def test_a_transposed_convolution_loses_what_padding_cuts():
    """2 x 2 to 4 x 4 with a 3 x 3 kernel, stride 2, padding 1, output padding 1: of 36 places 25 lie in the image."""
    graph = SimpleNamespace(tensors={"w": np.ones((1, 1, 3, 3), np.int8)})
    op = ConvTranspose2d("w", (2, 2), (1, 1), (1, 1))
    np.testing.assert_array_equal(fan_out(graph, (op,), (1, 2, 2), (1, 4, 4), zeros=True), [4, 6, 6, 9])


def test_a_skip_has_one_way():
    graph = SimpleNamespace(tensors={})
    np.testing.assert_array_equal(fan_out(graph, (Identity(),), (3,), (3,), zeros=True), [1, 1, 1])


def test_spikes_that_come_too_late_are_of_delayed_connections(recurrent):
    for mode in ("exact", "pipelined"):
        phase = Retime(mode)(recurrent).phase("forward")
        assert [arriving(phase, s) for s in phase.synapses] == [2, 3]


# --- beside the neurobench package, on the same network as a torch module ---


def neurobench_parts():
    for name in ("snntorch", "neurobench"):
        pytest.importorskip(name, reason=f"{name} is not installed: the cross-check with NeuroBench needs it")
    import snntorch
    from neurobench.metrics.static import ConnectionSparsity, Footprint
    from neurobench.metrics.workload import ActivationSparsity, MembraneUpdates, SynapticOperations
    from neurobench.models import TorchModel

    class Couple(snntorch.SpikingNeuron):
        """The model step of a couple in float64, as a spiking neuron of snnTorch."""

        def __init__(self, dynamics):
            super().__init__()
            self.dynamics, self.mem = dynamics, None

        def forward(self, current):
            total = current if self.mem is None else self.mem + current
            spikes = (total >= self.dynamics.threshold).double()
            if self.dynamics.members == "both":
                spikes = spikes - (total <= -self.dynamics.threshold).double()
            self.mem = total - self.dynamics.reset * spikes
            return spikes, self.mem

    static = SimpleNamespace(sparsity=ConnectionSparsity(), footprint=Footprint())
    workload = SimpleNamespace(activations=ActivationSparsity(), updates=MembraneUpdates(), operations=SynapticOperations())
    return SimpleNamespace(couple=Couple, activation=snntorch.SpikingNeuron, model=TorchModel, static=static, workload=workload)


class Unrolled(nn.Module):
    """One phase of an integer graph in step timing, its connections torch's own modules, its couples `couple`s."""

    def __init__(self, graph, phase, couple):
        super().__init__()
        self.graph, self.phase = graph, graph.phase(phase)
        self.neurons = nn.ModuleDict({name: couple(d) for name, d in self.phase.dynamics.items() if d.members in ("plus", "both")})
        self.synapses = nn.ModuleList(self.module(s.ops[-1], graph.population(s.source).shape) for s in self.phase.synapses)
        self.host = nn.ModuleList(self.module(d.ops[-1], graph.of_kind("input")[0].shape) for d in self.phase.drive if d.ops)

    def module(self, op, shape):
        weight = torch.from_numpy(self.graph.tensors[op.weight].astype(np.float64))
        if isinstance(op, Dense):
            weight = weight.T if op.transpose else weight
            made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
        else:
            made = nn.Conv2d(shape[0], len(weight), weight.shape[2:], op.stride, op.padding, bias=False, dtype=torch.float64)
        made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        return made

    def applied(self, module, ops, values, shape):
        if isinstance(module, nn.Linear):
            values = values.reshape(len(values), -1)
        for op in ops[:-1]:
            values = nn.functional.avg_pool2d(values, op.kernel, op.stride, op.padding) * prod(op.kernel)
        return (module(values) * 2.0 ** ops[-1].exponent).reshape(len(values), *shape)

    def forward(self, currents, images=None, masks=None):
        graph, phase = self.graph, self.phase
        if images is not None:
            encoded = torch.from_numpy(codec.encode_input(graph, images).astype(np.float64))
            for module, drive in zip(self.host, (d for d in phase.drive if d.ops), strict=True):
                self.applied(module, drive.ops, encoded, graph.population(drive.population).shape)
        bias = codec.bias_currents(graph, phase)
        before, total = {}, dict.fromkeys(self.neurons, 0)
        for step in range(phase.time_steps):
            now = {}
            for name in phase.order:
                shape = graph.population(name).shape
                current = torch.zeros(len(next(iter(currents.values()))), *shape, dtype=torch.float64)
                current = current + torch.from_numpy(np.asarray(currents.get(name, 0), np.float64))
                current = current + sum(torch.from_numpy(c.astype(np.float64)) for start, c in bias.get(name, ()) if step >= start)
                for module, synapse in zip(self.synapses, phase.synapses, strict=True):
                    sent = (before if synapse.delay else now).get(synapse.source)
                    if synapse.target == name and sent is not None:
                        gated = sent if synapse.gate is None else sent * torch.from_numpy(masks[synapse.gate].astype(np.float64))
                        current = current + self.applied(module, synapse.ops, gated, shape)
                if name in self.neurons:
                    now[name], _ = self.neurons[name](current)
                    total[name] = total[name] + now[name].abs()
            before = now
        return total


def beside_neurobench(graph, images, errors):
    """Both phases by our counts and by the package's, which must be equal."""
    parts = neurobench_parts()
    counts = counted(graph, images, errors)
    with TRACED.compile(graph) as run:
        forward = run.run(images)
    masks = {p.name: codec.mask(graph, forward, p.name) for p in graph.of_kind("couple")}
    encoded = codec.encode_input(graph, codec.check_inputs(graph, images))
    for ours, given in zip(counts, (images, None), strict=True):
        phase = graph.phase(ours.phase)
        forwards = ours.phase == "forward"
        currents = {
            d.population: codec.input_current(graph, d, encoded) if forwards else codec.error_current(graph, errors) for d in phase.drive
        }
        net = Unrolled(graph, ours.phase, parts.couple)
        model = parts.model(net)
        model.add_activation_module(parts.activation)
        model.register_hooks()
        total = net(currents, given, masks)
        assert sum(float(t.sum()) for t in total.values()) / len(images) == ours.spikes  # it is the same network
        data = (torch.zeros(len(images)), None)
        operations = parts.workload.operations(model, None, data)
        assert operations == {"Effective_MACs": ours.effective_macs, "Effective_ACs": ours.effective_acs, "Dense": ours.dense}
        assert parts.workload.activations(model, None, data) == ours.activation_sparsity
        assert parts.workload.updates(model, None, data) == ours.membrane_updates
        model.cleanup_hooks()
        for metric in vars(parts.workload).values():
            getattr(metric, "reset", lambda: None)()
    return counts


@pytest.mark.parametrize("seed", range(5))
def test_neurobench_counts_the_same_on_dense_nets(random_graph, random_inputs, seed):
    graph = random_graph(seed, couples=1 + seed % 3)
    forward, feedback = beside_neurobench(graph, *random_inputs(graph, 4, seed))
    assert forward.effective_acs > 0
    assert feedback.spikes > 0
    net = Unrolled(graph, "forward", neurobench_parts().couple)
    assert round(connection_sparsity(graph), 4) == neurobench_parts().static.sparsity(neurobench_parts().model(net))


def test_neurobench_counts_the_same_on_convolutions():
    """Stride, padding, a pool and a loop; NeuroBench has no transposed convolutions, so the feedback phase here is dense."""
    draw = np.random.default_rng(5)
    tensors = {
        "input.weight": frozen(draw.integers(-3, 9, (50, 6)), np.int64),
        "conv.weight": frozen(draw.integers(-2, 3, (3, 2, 3, 3)), np.int8),
        "pooled.weight": frozen(draw.integers(-2, 3, (2, 2, 3, 3)), np.int8),
        "same.weight": frozen(draw.integers(-1, 2, (50, 50)), np.int8),
        "readout.weight": frozen(draw.integers(-2, 3, (4, 8)), np.int8),
    }
    # hidden1 (2, 5, 5) -> hidden2 (3, 3, 3) by a strided convolution; hidden1 -> hidden3 (2, 2, 2) through a pool; hidden1 onto itself
    synapses = [
        Synapse("hidden1", "hidden1", (Dense("same.weight"),), 1),
        Synapse("hidden1", "hidden2", (Conv2d("conv.weight", stride=(2, 2), padding=(1, 1), exponent=1),)),
        Synapse("hidden1", "hidden3", (AvgPool2d((2, 2), (2, 2)), Conv2d("pooled.weight", padding=(1, 1), exponent=1))),
        Synapse("hidden3", "readout", (Dense("readout.weight"),)),
    ]
    feedback = (Synapse("hidden1", "hidden1", (Dense("same.weight", transpose=True),), 1, gate="hidden1"),)
    shapes = [(2, 5, 5), (3, 3, 3), (2, 2, 2)]
    graph = chain(shapes, synapses, tensors, Drive("hidden1", "input", (Dense("input.weight"),)), time_steps=6, feedback=feedback)
    back = graph.phase("feedback")
    back = msgspec.structs.replace(back, drive=(Drive("hidden1", "error"),))
    graph = msgspec.structs.replace(graph, phases=(graph.phase("forward"), back))
    units = msgspec.structs.replace(graph.units, scale={**graph.units.scale, "forward": dict(graph.units.scale["forward"], input=8.0)})
    graph = msgspec.structs.replace(graph, units=units)
    images, errors = draw.integers(0, 9, (3, 6)) / 8, draw.integers(-3, 4, (3, 2, 5, 5)).astype(np.float64)
    forward, _ = beside_neurobench(graph, images, errors)
    assert forward.connections[2].acs > 0
    assert forward.connections[3].macs > 0


def test_neurobench_has_the_same_footprint(random_graph):
    parts = neurobench_parts()
    graph = random_graph(2, couples=2)
    held = nn.ParameterDict(
        {name.replace(".", "_"): nn.Parameter(torch.from_numpy(t.copy()), requires_grad=False) for name, t in graph.tensors.items()}
    )
    assert parts.static.footprint(parts.model(held)) == footprint(graph).total
    assert footprint(graph).potentials == sum(prod(p.shape) for p in graph.populations if p.kind != "input")
