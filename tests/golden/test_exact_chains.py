"""The bit-exact chains of the golden files through the compiler: integer graphs have the authors' spikes, one by one, on every integer target."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from toolchain import codec
from toolchain.ir import Bias, Dense, Drive, Dynamics, Graph, Phase, Population, Provenance, Synapse, Units, frozen, verify
from toolchain.passes import Adjoint, Fold, Pipeline, Quantize, Retime
from toolchain.targets.reference import REFERENCE
from toolchain.targets.sim import SIM

change = msgspec.structs.replace
GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"


def case(name):
    if not GOLDEN.exists():
        pytest.skip("the golden files are not beside this checkout")
    arrays = np.load(GOLDEN / f"{name}.npz")
    return arrays, json.loads(str(arrays["meta_json"]))


def graph_of_sample(arrays, meta, sample) -> Graph:
    """The chain as a float graph; the sample's input current, constant in time, is the first population's bias."""
    dims = meta["dims"][1:]
    layers = len(dims)
    names = [f"layer{i}" for i in range(layers)]
    tensors = {f"s{i}": frozen(arrays[f"W.s{i}"]) for i in range(layers)}
    tensors["current"] = frozen(arrays["W.x"] @ arrays["x"][sample] + arrays["b.x"])
    tensors |= {f"b{i + 1}": frozen(arrays[f"b.s{i}"]) for i in range(layers - 1)}
    tensors["readout"] = frozen(np.eye(dims[-1]))
    reset, reset_back = meta["vth"] - meta["u_rest"], meta["vth_back"] - meta["u_rest_back"]
    synapses = [Synapse(names[i], names[i + 1], (Dense(f"s{i}"),)) for i in range(layers - 1)]
    synapses.append(Synapse(names[-1], names[0], (Dense(f"s{layers - 1}"),), delay=1))
    synapses.append(Synapse(names[-1], "readout", (Dense("readout"),)))
    forward = Phase(
        "forward",
        meta["T"],
        (*names, "readout"),
        {n: Dynamics(1.0, meta["vth"], reset, "plus") for n in names} | {"readout": Dynamics(1.0)},
        tuple(synapses),
        bias={names[0]: (Bias("current"),)} | {names[i]: (Bias(f"b{i}"),) for i in range(1, layers)},
    )
    feedback = Phase(
        "feedback",
        meta["TB"],
        tuple(reversed(names)),
        {n: Dynamics(1.0, meta["vth_back"], reset_back, "both") for n in names},
        (),
        drive=(Drive(names[-1], "error"),),
    )
    populations = (Population("input", (1,), "input"), *(Population(n, (d,), "couple") for n, d in zip(names, dims, strict=True)))
    readout = Population("readout", (dims[-1],), "readout")
    return Graph((*populations, readout), (forward, feedback), tensors, Units("float", {}), Provenance("golden"))


def compiled(arrays, meta, sample) -> Graph:
    """Through the compiler; where a weight needs more than 8 bits (k/64 with |k| > 127) the integers are written down by hand instead."""
    graph = Pipeline((Fold(), Adjoint(), Retime()))(graph_of_sample(arrays, meta, sample))
    largest = max(np.abs(arrays[f"W.s{i}"]).max() for i in range(len(meta["dims"]) - 1))
    return Quantize()(graph) if largest <= 127 / 64 else by_hand(graph)


def by_hand(graph) -> Graph:
    """The same graph in units of 1/512: weights k/64 are k << 3, currents are multiples of 1/512."""
    currents = {bias.tensor for biases in graph.phase("forward").bias.values() for bias in biases}
    tensors = {n: frozen(t * (512 if n in currents else 1 if n == "readout" else 64), np.int16) for n, t in graph.tensors.items()}

    def synapse(s):
        return change(s, ops=(change(s.ops[0], exponent=0 if s.target == "readout" else 3),))

    def dynamics(d):
        return d if d.members == "none" else change(d, threshold=int(d.threshold * 512), reset=int(d.reset * 512))

    phases = tuple(
        change(p, synapses=tuple(synapse(s) for s in p.synapses), dynamics={n: dynamics(d) for n, d in p.dynamics.items()})
        for p in graph.phases
    )
    scale = {
        phase: {n: 1.0 if n == "readout" else 512.0 * graph.scale(phase, n) for n in graph.phase(phase).order}
        for phase in ("forward", "feedback")
    }
    made = change(graph, phases=phases, tensors=tensors, units=Units("integer", {**scale, "forward": {**scale["forward"], "input": 1.0}}))
    verify(made)
    return made


def assert_golden(arrays, meta, target, graph, sample):
    with replace(target, trace=True).compile(graph) as run:
        forward = run.run(np.zeros((1, 1)))
        feedback = run.run(arrays["grad_z"][sample : sample + 1], phase="feedback")
    for i in range(len(meta["dims"]) - 1):
        name = f"layer{i}"
        np.testing.assert_array_equal(forward.history[name].spikes[:, 0], arrays[f"train_fwd.{i}"][:, sample])
        np.testing.assert_array_equal(feedback.history[name].spikes[:, 0], arrays[f"train_bwd.{i}"][:, sample])
        np.testing.assert_array_equal(codec.rates(graph, forward, name)[0], arrays[f"rate.{i}"][sample])
        np.testing.assert_allclose(codec.beta(graph, feedback, name)[0], arrays[f"beta.{i}"][sample], rtol=0, atol=1e-15)
        np.testing.assert_array_equal(codec.mask(graph, forward, name)[0], arrays[f"mask.{i}"][sample] == 1)
        assert forward.saturations[name].sum() == feedback.saturations[name].sum() == 0


@pytest.mark.parametrize("name", ["spide_exact_fc1_if", "spide_exact_fc3_if"])
@pytest.mark.parametrize("target", [REFERENCE, SIM], ids=lambda t: t.name)
def test_integer_graphs_have_the_golden_spikes(name, target):
    arrays, meta = case(name)
    for sample in range(len(arrays["x"])):
        assert_golden(arrays, meta, target, compiled(arrays, meta, sample), sample)


@pytest.mark.lava
@pytest.mark.parametrize(
    ("name", "synapses"), [("spide_exact_fc1_if", "own"), ("spide_exact_fc1_if", "stock"), ("spide_exact_fc3_if", "own")]
)
def test_lava_has_the_golden_spikes(name, synapses):
    """Stock synapses hold 8-bit weights only, so the chain with wider ones runs on ours."""
    from toolchain.targets.lava_sim import LAVA_SIM

    arrays, meta = case(name)
    assert_golden(arrays, meta, replace(LAVA_SIM, synapses=synapses), compiled(arrays, meta, 0), 0)


@pytest.mark.lava
@pytest.mark.parametrize("name", ["spide_exact_fc1_if", "spide_exact_fc3_if"])
def test_floating_point_lava_has_the_golden_spikes(name):
    from toolchain.targets.lava_sim import LAVA_SIM_FLOAT

    arrays, meta = case(name)
    assert_golden(arrays, meta, LAVA_SIM_FLOAT, Pipeline((Fold(), Adjoint(), Retime()))(graph_of_sample(arrays, meta, 0)), 0)
