"""What probes and variants add to images, what `verify` says of its coverage and of a first difference, and targets that give less than everything."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import pytest

import toolchain
from toolchain import target as targets
from toolchain.artifact import Artifact, Golden
from toolchain.compiler import compile as compile_model
from toolchain.errors import UsageError
from toolchain.ir import Dense, Dynamics, Graph, Phase, Population, Provenance, Synapse, Timing, Units, frozen
from toolchain.limits import LOIHI2
from toolchain.notation import table
from toolchain.passes import LOIHI_PIPELINE
from toolchain.target import History
from toolchain.targets.sim import SIM


def as_it_is(graph):
    return graph


def whole(result):
    return result


@dataclass(frozen=True)
class Other:
    """The simulator as another target: with a fault in its copy, with results that lack something, or with rules of its own."""

    change: Any = as_it_is
    give: Any = whole
    rule: Any = field(default=lambda graph: [])
    trace: bool = False
    name: str = "other"
    limits = LOIHI2
    pipeline = LOIHI_PIPELINE

    def available(self):
        return None

    def check(self, graph):
        return self.rule(graph)

    def compile(self, graph):
        run = replace(SIM, trace=self.trace, device="cpu").compile(self.change(graph))
        inner = run.run
        run.run = lambda inputs, *, phase="forward": self.give(inner(inputs, phase=phase))
        return run


@dataclass(frozen=True)
class Untraced:
    """A target without a history: it has no option `trace`."""

    inner: Other
    name: str = "other"
    limits = LOIHI2
    pipeline = LOIHI_PIPELINE

    def available(self):
        return None

    def check(self, graph):
        return []

    def compile(self, graph):
        return self.inner.compile(graph)


@dataclass(frozen=True)
class Entry:
    found: object
    name: str = "other"

    def load(self):
        return self.found


@pytest.fixture
def install(monkeypatch):
    return lambda found: monkeypatch.setattr(targets, "entry_points", lambda group: [Entry(found)])


@pytest.fixture(scope="module")
def made():
    return compile_model("digits-fc", time_steps=10, feedback_steps=10).artifact


def against(made, install, other, **options):
    install(other)
    options = {"targets": ("reference", "other"), "dataset": "digits", "samples": 5, **options}
    return toolchain.verify(made, **options)


def with_tensor(key, index, by):
    def change(graph: Graph) -> Graph:
        tensor = graph.tensors[key].copy()
        tensor[index] += by
        return msgspec.structs.replace(graph, tensors={**graph.tensors, key: frozen(tensor)})

    return change


def with_dynamics(phase, **fields):
    def change(graph: Graph) -> Graph:
        old = graph.phase(phase)
        hidden = msgspec.structs.replace(old.dynamics["hidden1"], **fields)
        new = msgspec.structs.replace(old, dynamics={**old.dynamics, "hidden1": hidden})
        return msgspec.structs.replace(graph, phases=tuple(new if p.name == phase else p for p in graph.phases))

    return change


def dark_pixel():
    """A pixel that no image of the test uses."""
    from toolchain import data

    return int(np.flatnonzero((data.load("digits", samples=5).images == 0).all(axis=0).reshape(-1))[0])


def test_a_weight_on_a_pixel_that_no_image_lights_is_found_by_probes_only(made, install):
    pixel = dark_pixel()
    wrong = Other(with_tensor("input.weight.scaled", (3, pixel), 1_000_000))
    assert against(made, install, wrong, probes=0).passed
    found = against(made, install, wrong)
    first = found.first_difference
    assert not found.passed
    assert (first.phase, first.population, first.neuron, first.index) == ("forward", "hidden1", 3, (3,))
    assert first.inputs == "probe"
    assert f"probe {first.sample}, population 'hidden1', neuron 3 [3], step {first.step}" in found.to_text()


def test_the_last_place_of_a_host_weight_is_found_by_a_variant_only(made, install):
    """The host rounds its sums to 13 bits: a change by one in 2^20 passes an edge where the variant has put one."""
    for by in (-1, 1):
        found = against(made, install, Other(with_tensor("input.weight.scaled", (7, 20), by)))
        assert found.pairs[0].identical
        assert found.pairs[0].first_difference is None
        assert [variant.pairs[0].identical for variant in found.variants] == [by == 1, by == -1]
        assert not found.passed
        assert (found.first_difference.population, found.first_difference.neuron) == ("hidden1", 7)
        assert found.first_difference.inputs.startswith("variant ")


def test_the_coverage_is_in_text_and_json(made, install):
    found = against(made, install, Other())
    coverage = json.loads(msgspec.json.encode(found.to_json()))["coverage"]
    assert found.passed
    assert coverage["share"] == 1
    assert coverage["weights"] == coverage["reachable"] == 1024 + 320 + 2048 + 32 + 1024
    assert coverage["exercised"]["images"] < coverage["exercised"]["probes"] < coverage["exercised"]["variants"] == coverage["weights"]
    assert (coverage["thresholds"], coverage["thresholds_met"]) == (2, 2)
    rows = {(row["phase"], row["where"]): row for row in coverage["connections"]}
    assert rows["feedback", "hidden1 -> hidden1"]["tensor"] == "feedback.0.weight"
    assert rows["forward", "host -> hidden1"]["exercised"]["variants"] == 2048
    text = found.to_text()
    assert "weights exercised, of 4,448 (each counted in both phases): " in text
    assert "100 % with variants" in text
    assert "thresholds met exactly and missed by one: 2 of 2" in text


def wrong_total(field, name, by):
    def give(result):
        totals = getattr(result, field)
        return replace(result, **{field: {**totals, name: totals[name] + np.asarray(by, totals[name].dtype)}})

    return Other(give=give)


@pytest.mark.parametrize(
    ("field", "name", "kind"),
    [
        ("counts", "hidden1", "spike count"),
        ("activity", "hidden1", "number of spikes"),
        ("traces", "hidden1", "leaky sum of spikes"),
        ("potentials", "hidden1", "last potential"),
        ("potentials", "readout", "last potential"),
    ],
)
def test_a_total_that_its_own_steps_do_not_add_up_to_is_found(made, install, field, name, kind):
    """Gates, accuracies and learning read totals, which a target adds up beside its steps."""
    found = against(made, install, wrong_total(field, name, 1), phase="forward", samples=1, probes=0)
    first = found.first_difference
    assert not found.passed
    assert (first.population, first.kind, first.step, first.neuron) == (name, kind, 10, 0)
    assert first.expected == first.a == first.b - 1


@dataclass(frozen=True)
class Late(Other):
    """Its feedback phase is gated by the forward run before the last."""

    def compile(self, graph):
        run = super().compile(graph)
        inner, kept = run.run, []

        def stale(inputs, *, phase="forward"):
            if phase == "forward":
                kept.append(inputs)
            elif len(kept) > 1 and len(kept[-2]) == len(inputs):
                inner(kept[-2])
            return inner(inputs, phase=phase)

        run.run = stale
        return run


def test_what_a_target_keeps_of_the_run_before_is_found(made, install):
    first = against(made, install, Late(), samples=3).first_difference
    assert (first.phase, first.population, first.inputs) == ("feedback", "hidden1", "probe")


def test_large_networks_get_fewer_probes_and_smaller_runs_and_the_text_says_so(made, install, monkeypatch):
    import importlib

    module = importlib.import_module("toolchain.verify")
    whole = against(made, install, Other())
    assert "16 probes\n" in whole.to_text()
    monkeypatch.setattr(module, "PROBES_WORK", 1)
    monkeypatch.setattr(module, "HISTORY_BYTES", 1)
    sizes = []
    few = against(made, install, Other(give=lambda result: sizes.append(len(result.counts["hidden1"])) or result), samples=3)
    assert set(sizes) == {1}
    assert few.passed
    assert few.probes == module.FEWEST_PROBES
    assert f"{module.FEWEST_PROBES} probes (fewer than 16, since the network is large)" in few.to_text()
    assert against(made, install, Other(), probes=6).probes == 6


def test_gates_and_saturations_that_nothing_met_are_named(made, install):
    found = against(made, install, Other())
    assert found.coverage.to_json()["gates"] == {"hidden1": ["open", "closed by silence", "closed by firing at every step"]}
    assert "gates that spikes met open, closed by silence and closed by firing at every step: 1 of 1" in found.to_text()
    assert "no potential saturated, so how targets hold them to 24 bit was not compared" in found.to_text()
    hurried = compile_model("digits-fc", time_steps=1, feedback_steps=5).artifact
    install(Other())
    few = toolchain.verify(hurried, targets=("reference", "other"), dataset="digits", samples=1)
    assert few.coverage.gates == {"hidden1": ("closed by silence", "closed by firing at every step")}  # one step opens none
    assert "  'hidden1' was never open" in few.to_text()
    assert against(made, install, Other(), phase="forward").coverage.gates == {}


def test_minus_members_meet_their_thresholds_too(made):
    from toolchain import probing

    threshold = int(made.graph.phase("feedback").dynamics["hidden1"].threshold)
    for variant in probing.variants(made.graph, 4):
        totals = probing.first_totals(variant.graph, "feedback", variant.inputs[:1], variant.errors[:1])["hidden1"].reshape(-1)
        assert (totals[0], totals[-1]) == (threshold + variant.edge, -(threshold + variant.edge))


def test_a_target_that_is_named_twice_is_refused(made):
    with pytest.raises(UsageError, match="'sim' is named twice"):
        toolchain.verify(made, targets=("sim", "sim"), dataset="digits")


def test_without_probes_the_coverage_says_how_little_images_exercise(made, install):
    found = against(made, install, Other(), probes=0)
    assert found.coverage.share < 0.6
    assert found.variants == ()
    assert "with images" in found.to_text()
    assert "variant" not in found.to_text()


def test_currents_tell_weights_from_dynamics(made, install):
    weight = against(made, install, Other(with_tensor("feedback.0.weight", (3, 5), 40)), samples=20).first_difference
    assert weight.neuron == 3
    exponent = made.graph.phase("forward").synapses[0].ops[0].exponent
    assert abs(weight.current_a - weight.current_b) == 40 << exponent
    threshold = against(made, install, Other(with_dynamics("forward", threshold=5000)), samples=20).first_difference
    assert threshold.kind == "spike"
    assert threshold.current_a == threshold.current_b
    assert threshold.expected == threshold.a
    assert "equal currents" in threshold.to_text("reference", "other")


def test_the_definition_says_which_of_two_others_is_right(made, install):
    found = against(made, install, Other(with_dynamics("feedback", threshold=5000)), targets=("sim", "other"))
    first = found.first_difference
    assert first.expected == first.a
    assert "reference has" in found.to_text()
    assert ", as sim" in found.to_text()


def skip_graph(*, events: bool = False) -> Artifact:
    """a -> b -> c and a -> c, pipelined: what a sends reaches c in an earlier step of c's own count."""
    tensors = {"w": frozen(np.full((1, 1), 100), np.int8), "readout.bias": frozen(np.zeros(1)), "in": frozen(np.full((1, 64), 20), np.int8)}
    couple = Dynamics(1.0, 150, 150, "plus")

    def joined(source, target, weight="w"):
        return Synapse(source, target, (Dense(weight),), 1)

    synapses = (joined("input", "a", "in"), joined("a", "b"), joined("b", "c"), joined("a", "c"), joined("c", "readout"))
    order = ("input", "a", "b", "c", "readout")
    timing = Timing("pipelined", 1, {name: i for i, name in enumerate(order)}, 1)
    phase = Phase("forward", 9, order, {"a": couple, "b": couple, "c": couple, "readout": Dynamics(1.0)}, synapses, timing=timing)
    populations = (
        Population("input", (64,), "input", events=events),
        *(Population(n, (1,), "couple") for n in "abc"),
        Population("readout", (1,), "readout"),
    )
    units = Units("integer", {"forward": {"input": 15.0, "a": 1.0, "b": 1.0, "c": 1.0, "readout": 1.0}})
    passes = tuple(p.name for p in LOIHI_PIPELINE.passes)
    graph = Graph(populations, (phase,), tensors, units, Provenance("skip", passes=passes))
    return Artifact(graph, None, "sim", str(LOIHI_PIPELINE), "test", Golden(1, 0, ()), {})


def test_the_first_difference_is_the_earliest_in_ticks(install):
    """A skip lets a later population differ in an earlier step of its own than the one that is at fault."""
    late = frozen(np.full((1,), 200), np.int16)

    def change(graph):
        phase = graph.phase("forward")
        bias = {**phase.bias, "a": (*phase.bias.get("a", ()), toolchain.ir.Bias("late", 0, 5))}
        changed = msgspec.structs.replace(phase, bias=bias)
        return msgspec.structs.replace(graph, phases=(changed,), tensors={**graph.tensors, "late": late})

    first = against(skip_graph(), install, Other(change), phase="forward", probes=0, samples=1).first_difference
    assert first.population == "a"
    assert first.step == 6


def without(field_name):
    def give(result):
        empty = {
            name: History(*(np.zeros(0) if f == field_name else getattr(h, f) for f in ("spikes", "potentials")))
            for name, h in result.history.items()
        }
        totals = {"potentials": {}} if field_name == "potentials" else {}
        return replace(result, history=empty, **totals)

    return give


def test_what_a_target_does_not_give_is_said(made, install):
    found = against(made, install, Other(give=without("potentials")))
    pair = found.pairs[0]
    assert pair.identical
    assert pair.spikes_compared > 0
    assert "'other' gives no potentials of 'hidden1' in the forward phase" in pair.not_compared
    assert "not compared: 'other' gives no potentials of 'readout' in the forward phase" in found.to_text()
    assert found.coverage.share == 0, "no potential was compared, so nothing counts as exercised"


def test_targets_without_a_history_are_compared_in_total(made, install):
    found = against(made, install, Untraced(Other()))
    assert found.passed
    assert "'other' gives no spikes of 'hidden1' by step in the forward phase" in found.pairs[0].not_compared
    found = against(made, install, Untraced(Other(with_dynamics("forward", threshold=5000))), samples=20)
    assert not found.passed
    assert found.first_difference.kind in ("spike count", "last potential")
    assert found.first_difference.population == "hidden1"


def forward_rule(graph):
    return ["this target has no feedback phase"] if graph.has_phase("feedback") else []


def test_a_target_without_the_feedback_phase_is_compared_forward_and_said_so(made, install):
    found = against(made, install, Other(rule=forward_rule), targets=("reference", "sim", "other"))
    assert found.passed
    both, forward = found.pairs
    assert both.not_compared == ()
    assert forward.not_compared == ("'other' has no feedback phase here (this target has no feedback phase)",)
    assert forward.spikes_compared < both.spikes_compared
    assert against(made, install, Other(rule=forward_rule), phase="forward").pairs[0].not_compared == ()
    with pytest.raises(UsageError, match="target 'other' cannot be compared in the feedback phase"):
        against(made, install, Other(rule=forward_rule), targets=("other", "sim"))
    with pytest.raises(UsageError, match="target 'other' cannot be compared in the feedback phase"):
        against(made, install, Other(rule=forward_rule), phase="feedback")


def test_a_variant_that_a_target_refuses_is_said(made, install):
    def few_biases(graph):
        return ["population 'hidden1' has biases, and this target has none"] if "hidden1" in graph.phase("forward").bias else []

    found = against(made, install, Other(rule=few_biases))
    assert found.passed
    assert all("this target has none" in variant.not_run["other"] for variant in found.variants)
    assert all(variant.pairs == () for variant in found.variants)
    assert "not run on other" in found.to_text()
    assert found.coverage.thresholds_met == 0
    assert found.coverage.share < 1
    three = against(made, install, Other(rule=few_biases), targets=("reference", "sim", "other"))
    assert [len(variant.pairs) for variant in three.variants] == [1, 1]


def test_float_targets_are_refused_however_many(made):
    with pytest.raises(UsageError, match="computes in floats"):
        toolchain.verify(made, targets=("torch", "torch"), dataset="digits", samples=2)
    with pytest.raises(UsageError, match="-1 probes are asked for: give 0 to 10,000"):
        toolchain.verify(made, targets=("reference", "sim"), dataset="digits", samples=2, probes=-1)


@pytest.mark.parametrize("phase", ["forward", "feedback", "both"])
def test_phases_are_compared_as_asked(made, phase):
    found = toolchain.verify(made, targets=("reference", "sim"), dataset="digits", samples=4, phase=phase, probes=4)
    assert set(found.samples) == ({"forward", "feedback"} if phase == "both" else {phase})
    assert {row.phase for row in found.coverage.rows} == set(found.samples)
    assert found.coverage.share == 1


def test_graded_inputs_are_probed(install):
    graded = compile_model("digits-fc", input="graded", time_steps=6, feedback_steps=6).artifact
    (key,) = [s.ops[0].weight for s in graded.graph.phase("forward").synapses if s.source == "input"]
    for change in (with_tensor(key, (0, 0), 1), with_tensor(key, (31, 63), -1)):
        first = against(graded, install, Other(change)).first_difference
        assert (first.population, first.neuron) in (("hidden1", 0), ("hidden1", 31))


def test_events_are_probed(install):
    """Every probe has other events at every step; images are held for all of them."""
    found = against(skip_graph(events=True), install, Other(with_tensor("in", (0, dark_pixel()), 1)), phase="forward")
    assert (found.first_difference.population, found.first_difference.inputs) == ("a", "probe")
    assert found.coverage.total("images")[0] < found.coverage.total("probes")[0]
    assert found.coverage.share == 1


@pytest.mark.lava
@pytest.mark.parametrize("timing", ["exact", "pipelined"])
def test_lava_runs_probes_and_variants(timing):
    made = compile_model("digits-fc", timing=timing, chip="loihi1", time_steps=6, feedback_steps=6).artifact
    found = toolchain.verify(made, targets=("reference", "lava-sim"), dataset="digits", samples=3, probes=4)
    assert found.passed
    assert found.coverage.share == 1
    assert [len(variant.pairs) for variant in found.variants] == [1, 1]


def test_the_table_of_the_text_is_aligned(made):
    found = toolchain.verify(made, targets=("reference", "sim"), dataset="digits", samples=2, probes=2)
    lines = found.to_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:2] == ["phase", "connection"])
    assert len({len(line) for line in lines[head : head + 6]}) <= 2
    assert table(["a"], [["b"]]) == ["a", "b"]


@pytest.mark.parametrize("timing", ["exact", "pipelined"])
def test_sanafe_runs_probes_and_variants(timing):
    pytest.importorskip("sanafe", reason="SANA-FE is an optional target")
    made = compile_model("digits-fc", timing=timing, time_steps=6, feedback_steps=6).artifact
    found = toolchain.verify(made, targets=("reference", "sanafe"), dataset="digits", samples=2, probes=3)
    assert found.passed
    assert found.pairs[0].not_compared == ()
    assert found.coverage.share == 1
