"""ONNX files of our networks: onnxruntime and ONNX's own evaluator make every spike of the reference of them, in both forms, and `export` says what it wrote and measured."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import toolchain
from toolchain import cli, codec, fixed, ir
from toolchain.analysis.floats import FloatRun
from toolchain.compiler import forward_only, lowered, uncompiled
from toolchain.errors import DesignRuleError, GraphError, UsageError
from toolchain.exchange import onnx_export, onnx_nodes, onnx_session, onnx_steps, packages
from toolchain.ir import Array, Graph
from toolchain.layers import FeedbackSNN, Neuron, Normalize
from toolchain.passes import Fold
from toolchain.source import find
from toolchain.target import Result
from toolchain.targets.reference import Reference

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

ROOT = Path(__file__).resolve().parents[2]
FORMS = ("unrolled", "loop")


def _drawn() -> Any:
    """tests/property/drawn_graphs.py, whose folder is on no path."""
    spec = importlib.util.spec_from_file_location("onnx_drawn_graphs", ROOT / "tests" / "property" / "drawn_graphs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


drawn = _drawn()


def reference(graph: Graph, inputs: Array) -> Result:
    return Reference(trace=True).compile(graph).run(inputs)


def in_onnxruntime(model: Any, inputs: dict[str, Array]) -> dict[str, Array]:
    session = onnx_session.opened(model.SerializeToString(), "a test")
    names = [output.name for output in model.graph.output]
    return dict(zip(names, session.run(names, inputs), strict=True))


def in_evaluator(model: Any, inputs: dict[str, Array]) -> dict[str, Array]:
    from onnx.reference import ReferenceEvaluator

    return dict(zip([output.name for output in model.graph.output], ReferenceEvaluator(model).run(None, inputs), strict=True))


def with_trains(written: onnx_steps.Written) -> Any:
    """The file with the spikes of every population and step among its outputs."""
    model = onnx.load_model_from_string(written.content)
    kind = model.graph.output[0].type.tensor_type.elem_type
    made = {name for node in model.graph.node for name in node.output}
    names = [f"{p.name}.spikes.{t}" for p in written.graph.of_kind("couple") for t in range(written.graph.phase("forward").time_steps)]
    assert set(names) <= made
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in names)
    return model


def assert_same(found: dict[str, Array], graph: Graph, wanted: Result, numbers: str) -> None:
    """Every spike and every rate is the reference's, and so are the class scores: to the last bit in float64, in float32 as far as its last bits go."""
    for population in graph.of_kind("couple"):
        rates = codec.rates(graph, wanted, population.name)
        np.testing.assert_array_equal(found[f"rate.{population.name}"], rates.astype(numbers), err_msg=population.name)
        for step, spikes in enumerate(wanted.history[population.name].spikes):
            name = f"{population.name}.spikes.{step}"
            if name in found:
                np.testing.assert_array_equal(found[name], spikes, err_msg=name)
    scores = codec.logits(graph, wanted)
    if numbers == "float64":
        np.testing.assert_array_equal(found["logits"], scores)
    else:
        np.testing.assert_allclose(found["logits"], scores, rtol=1e-6, atol=1e-6)


def grouped(model: Any) -> bool:
    """Whether a transposed convolution has groups, which ONNX's evaluator does not compute."""
    nodes = [node for node in model.graph.node if node.op_type == "ConvTranspose"]
    return any(attribute.name == "group" and attribute.i > 1 for node in nodes for attribute in node.attribute)


@st.composite
def cases(draw: Any) -> tuple[Graph, Array]:
    made = draw(drawn.graphs(host=draw(st.booleans()), raw=draw(st.booleans()), leaks=draw(st.booleans())))
    graph = forward_only(Fold()(made) if draw(st.booleans()) else made)
    inputs, _ = draw(drawn.values(made))
    return graph, inputs


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(cases())
def test_drawn_graphs_make_the_spikes_of_the_reference(case: tuple[Graph, Array]) -> None:
    """All operations, loops, relays, leaks, events, currents of the host. Numbers are such that sums are exact: in float64, and without leaks in float32, which onnxruntime computes."""
    graph, inputs = case
    wanted = reference(graph, inputs)
    leaks = any(dynamics.leak != 1 for dynamics in graph.phase("forward").dynamics.values())
    double = with_trains(onnx_steps.encoded(graph, numbers="float64", form="unrolled"))
    if not grouped(double):
        assert_same(in_evaluator(double, {"input": inputs.astype(np.float64)}), graph, wanted, "float64")
    if not leaks:
        for form in FORMS:
            written = onnx_steps.encoded(graph, form=form)
            model = with_trains(written) if form == "unrolled" else onnx.load_model_from_string(written.content)
            assert_same(in_onnxruntime(model, {"input": inputs.astype(np.float32)}), graph, wanted, "float32")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("numbers", ["plain", "extreme", "positive", "silent", "saturating"])
def test_dense_graphs_with_leaks_make_the_spikes_of_the_reference_in_onnxruntime(random_graph: Any, numbers: str, form: Any) -> None:
    """In float64, which onnxruntime has for matrices."""
    for seed in range(3):
        graph = forward_only(random_graph(seed, couples=3, integer=False, leak=seed > 0, numbers=numbers, graded=seed == 2))
        inputs = np.random.default_rng(seed).integers(0, 257, (4, 7)) / 256
        wanted = reference(graph, inputs)
        written = onnx_steps.encoded(graph, numbers="float64", form=form)
        model = with_trains(written) if form == "unrolled" else onnx.load_model_from_string(written.content)
        assert_same(in_onnxruntime(model, {"input": inputs}), graph, wanted, "float64")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(drawn.graphs(leaks=False), st.data())
def test_operations_and_their_adjoints_are_those_of_fixed(graph: Graph, data: Any) -> None:
    """An adjoint's shapes come from its target: strides that leave pixels over, paddings, dilations, groups."""
    synapse = data.draw(st.sampled_from(graph.phase("forward").synapses))
    ends = [graph.population(name).shape for name in (synapse.source, synapse.target)]
    for ops, (source, target) in ((synapse.ops, ends), (ir.adjoint(synapse.ops), ends[::-1])):
        values = np.random.default_rng(0).integers(-8, 9, (2, *source)) / 8
        sheet = onnx_nodes.Sheet("float32")
        made = onnx_nodes.connect(sheet, ops, graph.tensors, source, target, "given", "made")
        sheet.nodes.append(onnx.helper.make_node("Identity", [made], ["out"]))
        shapes = [("given", source), ("out", target)]
        infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", *shape]) for name, shape in shapes]
        constants = [onnx.numpy_helper.from_array(array, name) for name, array in sheet.constants.items()]
        body = onnx.helper.make_graph(sheet.nodes, "g", infos[:1], infos[1:], constants)
        imports = [onnx.helper.make_opsetid("", onnx_steps.OPSET)]
        model = onnx.helper.make_model(body, opset_imports=imports, ir_version=onnx_steps.IR_VERSION)
        found = in_onnxruntime(model, {"given": values.astype(np.float32)})["out"]
        wanted = fixed.apply(ops, graph.tensors, values, target, integer=False)
        np.testing.assert_array_equal(found, wanted.astype(np.float32))


def network(kind: str) -> FeedbackSNN:
    """Small networks with what those of the catalogue have: leaks, normalisation, strides, pools, feedback over layers, a skip, events."""
    torch.manual_seed(5)
    leaky = Neuron(threshold=1.0, u_rest=0.0, threshold_back=0.5, u_rest_back=-0.5, leak=0.9)
    common: dict[str, Any] = {"name": kind, "time_steps": 7, "feedback_steps": 9}
    channels = 2 if kind == "events" else 3
    layers = [nn.Conv2d(3, 4, 3, 2, 1, dilation=1), nn.AvgPool2d(2, 1, 1), nn.Linear(4 * 4 * 4, 6)]
    net = FeedbackSNN(
        input_shape=(channels, 6, 5),
        input=nn.Sequential(nn.Conv2d(channels, 3, 3, 1, 1), nn.BatchNorm2d(3)),
        hidden=layers,
        feedback=[(1, 0, nn.ConvTranspose2d(4, 3, 3, 2, 1, (1, 0))), (3, 3, nn.Linear(6, 6))],
        skips=[(1, 2, nn.Conv2d(4, 4, 2, 1, 1))],
        readout=nn.Linear(6, 4),
        neuron=leaky,
        normalize=None if kind == "events" else Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
        **common,
    )
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight.mul_(3.0 if name.startswith(("hidden", "input")) else 1.0)
    return net.eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["images", "events"])
def test_a_module_and_its_file_answer_alike(kind: str, form: Any) -> None:
    net = network(kind)
    graph = onnx_export.float_graph(find(net))
    shape = (5, *net.input_shape, *((net.time_steps,) if kind == "events" else ()))
    images = np.random.default_rng(3).random(shape).astype(np.float32)
    found = onnx_export.run(onnx_steps.encoded(graph, form=form), images)
    with torch.no_grad():
        scores, rates = net(torch.from_numpy(images)).numpy(), net.equilibrium(torch.from_numpy(images)).rates
    np.testing.assert_allclose(found["logits"], scores, atol=1e-5)
    assert 0 < found["rate.hidden1"].mean() < 1
    for layer, rate in enumerate(rates):
        np.testing.assert_allclose(found[f"rate.hidden{layer + 1}"], rate.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["mnist-fc2", "mnist-dsr", "mnist-ottt-a", "mnist-saf-f", "lenet"])
def test_networks_of_the_catalogue_answer_as_on_target_torch(name: str, tmp_path: Path) -> None:
    """Another order of sums may move a spike, by a rate of 1/T: on these samples it moves no answer, and few rates."""
    made: Any = toolchain.export(name, format="onnx", output=tmp_path / "net.onnx", samples=24)
    assert made.agreement == 1
    assert made.rates_compared >= 24 * 400
    assert made.rates_different <= made.rates_compared // 1000


@pytest.mark.parametrize("name", ["nmnist-conv", "convnet-f", "vgg-11-dvs", "preactresnet-18"])
def test_untrained_networks_of_the_catalogue_go_as_files(name: str) -> None:
    """With what the trained ones lack: events, feedback by transposed convolution, unequal pools, relays."""
    graph = onnx_export.float_graph(uncompiled(name)[0]).in_steps({"forward": 3})
    (source,) = graph.of_kind("input")
    inputs = np.random.default_rng(0).random((1, *source.shape, *((3,) if source.events else ()))).astype(np.float32)
    found = onnx_export.run(onnx_steps.encoded(graph), inputs)
    wanted = FloatRun(graph).forward(inputs)
    np.testing.assert_allclose(found["logits"], codec.logits(graph, wanted), atol=1e-5)
    for population in graph.of_kind("couple"):
        rates = codec.rates(graph, wanted, population.name)
        assert (np.abs(found[f"rate.{population.name}"] - rates) > onnx_export.SAME_RATE).mean() <= 0.001


def test_export_says_what_it_wrote_and_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, again = tmp_path / "new" / "digits.onnx", tmp_path / "again.onnx"
    monkeypatch.setattr(
        sys, "argv", ["toolchain", "export", "digits-fc", "--format", "onnx", "--dataset", "digits", "--samples", "50", "-o", str(path)]
    )
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    said = capsys.readouterr().out
    for part in ("opset 17, T 30 unrolled", "note: inference only", "50 samples of digits", "logits, rate.hidden1", "of target torch"):
        assert part in said
    made: Any = toolchain.export("digits-fc", format="onnx", output=again, dataset="digits", samples=50)
    assert again.read_bytes() == path.read_bytes()
    record = json.loads(json.dumps(made.to_json()))
    assert record["accuracy"] == record["torch_accuracy"] == record["correct"] / 50
    assert record["versions"]["onnxruntime"] != "not installed"
    model = onnx.load(again)
    onnx.checker.check_model(model, full_check=True)
    assert (model.opset_import[0].version, model.ir_version) == (17, 8)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert (facts["toolchain"], facts["model"], facts["time_steps"]) == (toolchain.__version__, "digits-fc", "30")
    assert len(facts["source_sha256"]) == 64
    assert "inference only" in facts["carries"]
    weights = [tuple(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) > 1]
    assert sorted(weights) == [(10, 32), (32, 32), (32, 64)]  # every one once
    for samples in (1, 3):
        scores = in_onnxruntime(model, {"input": np.zeros((samples, 1, 8, 8), np.float32)})
        assert scores["logits"].shape == (samples, 10)


def test_an_artefact_is_exported_in_its_own_time_steps(tmp_path: Path) -> None:
    made = toolchain.compile("digits-fc", time_steps=6, output=tmp_path / "short.fsnn")
    found: Any = toolchain.export(tmp_path / "short.fsnn", format="onnx", output=tmp_path / "short.onnx", dataset="digits", samples=40)
    assert (found.time_steps, found.agreement) == (6, 1)
    toolchain.compile("digits-fc", float_tensors=False, output=tmp_path / "bare.fsnn")
    with pytest.raises(UsageError, match="compile it again without --no-float"):
        toolchain.export(tmp_path / "bare.fsnn", format="onnx", output=tmp_path / "bare.onnx", dataset="digits")
    with pytest.raises(GraphError, match="give the model"):
        onnx_steps.encoded(forward_only(made.graph))
    assert not (tmp_path / "bare.onnx").exists()


def test_long_phases_become_a_loop(tmp_path: Path) -> None:
    graph = onnx_export.float_graph(find("digits-fc"))
    long = onnx_steps.encoded(graph.in_steps({"forward": 5000}))
    assert (long.form, long.nodes < 100) == ("loop", True)
    assert len(long.content) < 2 * len(onnx_steps.encoded(graph).content)
    images = np.random.default_rng(0).random((3, 1, 8, 8)).astype(np.float32)
    by_form = [onnx_export.run(onnx_steps.encoded(graph, form=form), images) for form in FORMS]
    for name, values in by_form[0].items():
        np.testing.assert_allclose(by_form[1][name], values, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"approximate": True}, "leave --approximate out"),
        ({"calibrate": "digits"}, "leave it out"),
        ({"dataset": "mnist-1k"}, "64 values"),
        ({"output": "digits-fc"}, "belongs to the model"),
    ],
)
def test_what_cannot_be_exported_is_explained(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"dataset": "digits", "samples": 5, "output": tmp_path / "x.onnx", **options}
    model: Any = "digits-fc"
    if given["output"] == "digits-fc":
        model = given["output"] = tmp_path / "run"
        toolchain.train("digits-fc", epochs=1, settings=["train.held_out=1200"], output=model, device="cpu")
        given["output"] = model / "checkpoint.safetensors"
    with pytest.raises(UsageError, match=message):
        toolchain.export(model, format="onnx", **given)
    assert not (tmp_path / "x.onnx").exists()


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"onnx is not installed: run pip install 'fsnn-toolchain\[onnx\]'"):
        toolchain.export("digits-fc", format="onnx", output=tmp_path / "x.onnx")


def test_a_file_beyond_two_gib_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = forward_only(Fold()(lowered(find("digits-fc"))))
    monkeypatch.setattr(onnx_steps, "LARGEST_FILE", 1000)
    with pytest.raises(DesignRuleError, match="2 GiB"):
        onnx_steps.encoded(graph)


def test_nothing_is_left_where_the_folder_cannot_be_written(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("")
    with pytest.raises(UsageError, match="writable"):
        toolchain.export("digits-fc", format="onnx", output=place / "x.onnx", dataset="digits", samples=5)
    assert os.listdir(tmp_path) == ["file"]
