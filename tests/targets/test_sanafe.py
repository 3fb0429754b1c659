"""SANA-FE's Loihi does what the reference does, spike for spike, in both phases; what it charges adds up; what it cannot do it refuses."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import replace
from importlib.resources import files

import msgspec
import numpy as np
import pytest
import yaml

import toolchain
from toolchain import codec, ir, target
from toolchain.compiler import compiled_as, forward_only, graph_for
from toolchain.doctor import list_targets
from toolchain.errors import DesignRuleError, UsageError
from toolchain.passes import Retime, expand
from toolchain.source import find
from toolchain.targets.reference import REFERENCE

pytest.importorskip("sanafe", reason="SANA-FE is not installed (extra energy)")

from toolchain.targets.sanafe import SANAFE
from toolchain.targets.sanafe.architecture import DENDRITE, loihi
from toolchain.targets.sanafe.numbers import numbers, problem


@pytest.fixture
def same(assert_identical):
    """A function: both phases of a timed graph (or the forward phase) on the reference and on SANA-FE, compared in full; the latter's executable."""

    def compare(graph, x, error=None):
        assert SANAFE.check(graph) == []
        expected, found = replace(REFERENCE, trace=True).compile(graph), replace(SANAFE, trace=True).compile(graph)
        assert_identical(found.run(x), expected.run(x))
        if error is not None:
            assert_identical(found.run(error, phase="feedback"), expected.run(error, phase="feedback"))
        return found

    return compare


def hosted(graph):
    """`graph` with the host applying the connections that leave the input: Loihi has no graded spikes."""
    forward = graph.phase("forward")
    drives, inputs = [], [s for s in forward.synapses if s.source == "input"]
    for synapse in inputs:
        ops = tuple(msgspec.structs.replace(op, exponent=0) if ir.weight_of(op) else op for op in synapse.ops)
        drives.append(ir.Drive(synapse.target, "input", ops, shift=8, exponent=1))
    kept = tuple(s for s in forward.synapses if s.source != "input")
    forward = msgspec.structs.replace(forward, order=forward.order[1:], synapses=kept, drive=tuple(drives))
    made = msgspec.structs.replace(graph, phases=(forward, *graph.phases[1:]))
    ir.verify(made)
    return made


def leaking(graph, leak, threshold=None):
    """The forward phase of `graph` with leaky couples that subtract their threshold, and a leaky readout."""
    forward = graph.phase("forward")
    dynamics = {
        name: msgspec.structs.replace(d, leak=leak, threshold=threshold or d.reset, reset=threshold or d.reset)
        for name, d in forward.dynamics.items()
    }
    return msgspec.structs.replace(graph, phases=(msgspec.structs.replace(forward, dynamics=dynamics),))


@pytest.mark.parametrize("mode", ["exact", "pipelined"])
@pytest.mark.parametrize("weights", ["plain", "extreme", "positive", "silent"])
def test_both_phases_are_the_reference(random_graph, random_inputs, same, weights, mode):
    """Skips, loops back and delayed connections forward; populations of 1 to 9 neurons, one to four of them."""
    for seed in range(3):
        graph = Retime(mode)(random_graph(seed, couples=1 + (seed + len(weights)) % 4, numbers=weights))
        same(graph, *random_inputs(graph, 2, seed))


@pytest.mark.parametrize("weights", ["plain", "extreme", "always", "silent"])
@pytest.mark.parametrize("name", ["strides", "pools"])
def test_convolutions_of_odd_sizes_are_the_reference(network_graph, network_inputs, same, name, weights):
    """Strides, groups, dilation, uneven padding, transposed convolutions, pools that overlap, upsampling, biases that begin later."""
    graph = Retime()(hosted(network_graph(name, weights)))
    same(graph, *network_inputs(graph, 2))


def test_binary_events_enter_as_spikes(network_graph, network_inputs, same):
    graph = network_graph("events", "plain")
    units = graph.units.scale | {"forward": graph.units.scale["forward"] | {"input": 1.0}}
    graph = Retime()(msgspec.structs.replace(graph, units=msgspec.structs.replace(graph.units, scale=units)))
    x, error = network_inputs(graph, 3)
    run = same(graph, np.round(x), error)
    same(graph, np.zeros_like(x), error)
    run.run(np.ones_like(x))
    assert run.charges.counts["spikes"] >= x[0].size  # input neurons fire on the chip


@pytest.mark.parametrize("leak", [0.5, 0.75, 3686 / 4096, 1 / 4096])
@pytest.mark.parametrize("mode", ["exact", "pipelined"])
def test_leaky_binary_neurons_are_the_reference(random_graph, same, leak, mode):
    """With turns (period above 1) the leak has to act once a step and not at every tick."""
    for seed in range(4):
        graph = Retime(mode)(leaking(random_graph(seed, couples=1 + seed, numbers=("plain", "extreme")[seed % 2]), leak))
        x = np.random.default_rng(seed).integers(0, 257, (3, *graph.population("input").shape)) / 256
        same(graph, x)


def test_a_single_neuron(random_graph, random_inputs, same):
    graph = Retime()(random_graph(2, couples=1, widths=(1,), inputs=1, classes=1))
    same(graph, *random_inputs(graph, 4))
    shortest = random_graph(2, couples=2, widths=(1, 1), time_steps=1, feedback_steps=1)
    same(Retime()(shortest), *random_inputs(shortest, 4))


def test_digits_in_both_phases(same):
    """A trained network: 32 couples, T 30 and 100."""
    graph = graph_for(find("digits-fc"), SANAFE)
    assert graph.placement.chip == "loihi1"
    images = toolchain.data.load("digits", samples=6)
    same(graph, images.images, codec.output_error(graph, REFERENCE.compile(graph).run(images.images), images.labels))


def test_mnist_fc_in_the_forward_phase(same):
    graph = forward_only(graph_for(find("mnist-fc"), SANAFE))
    same(graph, toolchain.data.load("mnist-1k", samples=10).images)


@pytest.mark.slow
def test_mnist_fc_is_verified_on_a_hundred_images():
    (pair,) = toolchain.verify("mnist-fc", targets=("reference", "sanafe"), dataset="mnist-1k", samples=100, phase="forward").pairs
    assert pair.spikes_compared >= 100 * 30 * 400
    assert (pair.spike_differences, pair.potential_differences, pair.saturation_differences) == (0, 0, 0)


def test_populations_that_take_turns(same):
    """Two layers in a loop take two ticks a step: the host holds each back on the other's."""
    graph = forward_only(graph_for(find("mnist-fc2"), SANAFE))
    assert graph.phase("forward").timing.period == 2
    same(graph, toolchain.data.load("mnist-1k", samples=1).images)


def test_a_placement_of_another_chip_is_made_anew(same):
    graph = forward_only(
        compiled_as(SANAFE.pipeline, graph_for(find("digits-fc"), REFERENCE))(toolchain.compiler.lowered(find("digits-fc")))
    )
    assert graph.placement.chip == "loihi2"
    same(graph, toolchain.data.load("digits", samples=2).images)


def test_a_readout_that_no_core_holds_is_the_hosts(same):
    """Leaky and not; the spikes that it adds up come from the chip."""
    graph = forward_only(graph_for(find("digits-fc"), SANAFE))
    cores = [msgspec.structs.replace(c, slices=tuple(s for s in c.slices if s.population != "readout")) for c in graph.placement.cores]
    placement = msgspec.structs.replace(graph.placement, cores=tuple(core for core in cores if core.slices))
    graph = msgspec.structs.replace(graph, placement=placement)
    ir.verify(graph)
    images = toolchain.data.load("digits", samples=3).images
    same(graph, images)
    same(leaking(graph, 0.5), images)


def test_charges_add_up(random_graph, random_inputs):
    """Counts are those of the spikes, and each energy is its counts at the description's prices."""
    graph = Retime()(random_graph(3, couples=2, numbers="extreme"))
    x, error = random_inputs(graph, 4)
    run = SANAFE.compile(graph)
    assert run.charges is None
    result = run.run(x)
    bill, phase = run.charges, graph.phase("forward")
    assert (bill.phase, bill.samples, bill.time_steps) == ("forward", 4, 4 * phase.ticks)
    assert bill.counts["spikes"] == sum(result.activity[p.name].sum() for p in graph.of_kind("couple"))
    assert bill.counts["synapses"] == codec.synaptic_operations(graph, result).sum()
    tile = yaml.safe_load((files("sanafe.examples") / "loihi.yaml").read_text())["architecture"]["tile"][0]
    core = tile["core"][0]
    soma, synapse = core["soma"][0]["attributes"], core["synapse"][0]["attributes"]
    neurons = sum(np.prod(p.shape) for p in graph.populations if p.kind != "input") + sum(np.prod(p.shape) for p in graph.of_kind("couple"))
    expected = {
        "synapse": bill.counts["synapses"] * synapse["energy_process_spike"],
        "soma": neurons * bill.time_steps * soma["energy_access_neuron"]
        + bill.counts["updates"] * soma["energy_update_neuron"]
        + bill.counts["spikes"] * soma["energy_spike_out"],
        "dendrite": 0.0,
        "network": bill.counts["packets"] * core["axon_out"][0]["attributes"]["energy_message_out"],  # one core: no hops
    }
    assert bill.energy_joules == pytest.approx(expected | {"total": sum(expected.values())}, rel=1e-9)
    reached = sum(np.prod(p.shape) for p in graph.populations if p.kind != "input")  # the minus members rest in the forward phase
    assert bill.counts["updates"] <= reached * bill.time_steps
    assert bill.seconds_per_sample() > bill.time_steps / 4 * 0.6e-6  # every time step takes at least the barrier
    assert bill.energy_per_sample()["total"] == pytest.approx(bill.energy_joules["total"] / 4)
    back = run.run(error, phase="feedback")
    assert run.charges.phase == "feedback"
    couples = codec.synaptic_operations(graph, back, forward=result).sum()
    assert run.charges.counts["synapses"] == couples + lateral(graph, back)
    assert any("input and error currents" in sentence for sentence in bill.not_charged)


def lateral(graph, result):
    """Synapses that the members of couples read to tell each other of their spikes: as many a spike as 8-bit weights make up the reset."""
    pieces = {name: len(list(expand._pieces(d.reset))) for name, d in graph.phase("feedback").dynamics.items()}
    return sum(int(spikes.sum()) * pieces[name] for name, spikes in result.activity.items())


def test_charges_do_not_depend_on_what_ran_before(random_graph, random_inputs):
    graph = Retime()(random_graph(6, couples=3))
    x, _ = random_inputs(graph, 3)
    run = SANAFE.compile(graph)
    run.run(x)
    whole = run.charges
    parts = []
    for sample in (2, 0, 1):
        run.run(x[sample : sample + 1])
        parts.append(run.charges)
    assert sum(p.counts["synapses"] for p in parts) == whole.counts["synapses"]
    assert sum(p.seconds_simulated for p in parts) == pytest.approx(whole.seconds_simulated, rel=0.01)
    assert sum(p.energy_joules["total"] for p in parts) == pytest.approx(whole.energy_joules["total"])


def test_where_spikes_wait_changes_no_charge(tmp_path):
    """Our description keeps spikes in the dendrite unit; the package's own, here without its inputs, keeps them before the soma."""
    import sanafe

    description = yaml.safe_load((files("sanafe.examples") / "loihi.yaml").read_text())
    for tile in description["architecture"]["tile"]:
        tile["core"][0]["soma"] = tile["core"][0]["soma"][:1]
    (tmp_path / "loihi.yaml").write_text(yaml.safe_dump(description, sort_keys=False))
    draw = np.random.default_rng(0)
    weights = draw.integers(-127, 128, (40, 40))
    sources, targets = (rows.tolist() for rows in np.nonzero(weights))
    told = []
    for chip, dendrite in ((sanafe.load_arch(tmp_path / "loihi.yaml"), "loihi_dendrites"), (loihi().chip, DENDRITE)):
        network = sanafe.Network()
        model = {"threshold": 500.0, "reset_mode": "soft", "leak_decay": 1.0, "input_decay": 0.0}
        units = {"default_synapse_hw_name": "loihi_dense_synapse", "default_dendrite_hw_name": dendrite, "soma_hw_name": "loihi_lif"}
        group = network.create_neuron_group("g", 40, model_attributes=model, log_potential=True, **units)
        for i, neuron in enumerate(group.neurons):
            neuron.map_to_core(chip.cores()[i // 10 * 5])
        group.connect_neurons_sparse(group, {"w": [float(w) for w in weights[sources, targets]]}, list(zip(sources, targets, strict=True)))
        with contextlib.redirect_stdout(io.StringIO()):
            running = sanafe.SpikingChip(chip)
            running.load(network)
            for i, neuron in enumerate(running.mapped_neuron_groups["g"]):
                neuron.set_attributes(model_attributes={"bias": 20.0 * (i % 9)})
            told.append(running.sim(25, processing_threads=1, potential_trace=True, perf_trace=True))
    ours, theirs = told
    assert ours["neurons_fired"] > 50
    for name in ("energy", "potential_trace", "spikes", "packets_sent", "neurons_updated", "neurons_fired"):
        assert ours[name] == theirs[name], name
    assert ours["perf_trace"]["hops"] == theirs["perf_trace"]["hops"]
    assert ours["sim_time"] == pytest.approx(
        theirs["sim_time"], rel=0.01
    )  # SANA-FE breaks ties between messages one way or another from run to run


def test_saturation_is_refused_and_never_silent(random_graph, random_inputs):
    """The chip clamps at 24 bits and SANA-FE does not; where the reference counts none, both are identical."""
    for seed in range(4):
        graph = Retime()(random_graph(seed, couples=2, numbers="saturating"))
        x, _ = random_inputs(graph, 1, seed)
        expected = REFERENCE.compile(graph).run(x)
        assert any(found.any() for found in expected.saturations.values())
        with pytest.raises(DesignRuleError, match=r"passes 24 bits at step \d+ of the forward phase.*run target sim"):
            SANAFE.compile(graph).run(x)


def test_what_does_not_fit_is_said_in_one_sentence(random_graph, network_graph):
    for graph, message in (
        (random_graph(1), "run the retime pass"),
        (Retime()(random_graph(1, graded=True)), "sends values from 0 to 255.*--input bias"),
        (Retime()(network_graph("residual", "plain")), "'stream0' is a linear relay"),
        (Retime()(random_graph(1, integer=False)), "add the quantize pass"),
        (Retime()(random_graph(1, leak=True)), "fires with both members.*verify --phase forward"),
        (forward_only(Retime()(random_graph(1, leak=True))), "subtracts its threshold"),
        (Retime()(leaking(random_graph(1), 3891 / 4096, threshold=6049)), "single precision.*train with leak 0.953125"),
        (graph_for(find("digits-fc"), SANAFE), None),
    ):
        problems = SANAFE.check(graph)
        if message is None:
            assert problems == []
            continue
        with pytest.raises(DesignRuleError, match=message):
            SANAFE.compile(graph)


def test_delays_up_to_six_ticks(random_graph, random_inputs, same):
    """Six populations in a chain, and a delayed connection that runs forward over five or six of them."""
    graph = random_graph(0, couples=6, skips=False)
    forward = graph.phase("forward")
    for name in ("couple4", "couple5"):
        sizes = [int(np.prod(graph.population(end).shape)) for end in (name, "couple0")]
        far = ir.frozen(np.random.default_rng(1).integers(-128, 128, sizes), np.int8)
        longer = ir.Synapse("couple0", name, (ir.Dense("far"),), delay=1)
        phase = msgspec.structs.replace(forward, synapses=(*forward.synapses, longer))
        made = Retime()(msgspec.structs.replace(graph, phases=(phase,), tensors=graph.tensors | {"far": far}))
        assert made.phases[0].synapses[-1].delay == int(name[-1]) + 1
        same(made, random_inputs(graph, 2)[0])
    late = msgspec.structs.replace(made.phases[0].synapses[-1], delay=7)
    phase = msgspec.structs.replace(made.phases[0], synapses=(*made.phases[0].synapses[:-1], late))
    assert [found for found in SANAFE.check(msgspec.structs.replace(made, phases=(phase,))) if "has delay 7" in found]


def test_too_many_cores_are_refused():
    with pytest.raises(DesignRuleError, match="takes 2 chips"):
        SANAFE.compile(graph_for(find("lenet"), SANAFE))


def test_numbers_keep_every_threshold_exact():
    """Where `problem` sees none, firing and cutting agree with the chip's rule for potentials around the threshold and for every residue of the leak."""
    for leak in (0.5, 0.75, 61 / 64, 3686 / 4096, 3891 / 4096):
        for threshold in (1, 2, 255, 2047, 4095, 6049, 2**18 - 1):
            dynamics = ir.Dynamics(leak, threshold, threshold, "plus")
            if problem("p", dynamics):
                assert (leak * 64) % 1
                continue
            own = numbers(dynamics)
            u = np.arange(threshold, threshold + 5000)
            assert not (threshold - 1) * own.scale > np.float32(own.threshold)
            assert (u * own.scale > np.float32(own.threshold)).all()
            left = np.trunc((u * own.scale - np.float64(np.float32(own.threshold))) * leak * 64)
            np.testing.assert_array_equal(left, ((u - threshold) * round(leak * 4096)) >> 12)


def test_nothing_reaches_stdout(random_graph, random_inputs, capfd):
    graph = Retime()(random_graph(0, couples=2))
    x, error = random_inputs(graph, 2)
    with SANAFE.compile(graph) as run:
        run.run(x)
        run.run(error, phase="feedback")
    assert capfd.readouterr().out == ""


def test_a_missing_package_is_one_sentence(random_graph, monkeypatch):
    monkeypatch.setattr("toolchain.targets.sanafe.find_spec", lambda name: None)
    sentence = SANAFE.available()
    assert sentence == 'SANA-FE is not installed: run pip install "fsnn-toolchain[energy]"'
    with pytest.raises(UsageError, match="pip install"):
        SANAFE.compile(Retime()(random_graph(0)))
    assert {row.name: row.missing for row in list_targets().targets}["sanafe"] == sentence


def test_a_package_that_does_not_load_is_one_sentence(monkeypatch):
    """Built for another C++ library, say: `estimate` gives all else."""
    monkeypatch.setattr("toolchain.targets.sanafe.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "sanafe", None)
    found = toolchain.estimate("digits-fc", dataset="digits", samples=3, chip_samples=1)
    assert "SANA-FE does not load here" in found.to_text()
    assert "fsnn-toolchain[energy]" in found.charged.missing


def test_it_is_found_by_name():
    assert target.get("sanafe") is SANAFE
