"""Target torch runs every network that trains: the module itself, with a count of synaptic operations where there is a graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import toolchain
from toolchain import codec, data, seen
from toolchain.compiler import forward_only, lowered
from toolchain.deploy import Options, classify, sample_shape, started
from toolchain.errors import GraphError
from toolchain.layers import FeedbackSNN, Neuron, Scale
from toolchain.module_run import ModuleRun
from toolchain.network import TrainedThreshold
from toolchain.passes import Fold
from toolchain.source import find
from toolchain.targets.reference import REFERENCE
from toolchain.targets.torch_float import TORCH

NEURON = Neuron(threshold=1.0, u_rest=0.0, leak=0.9)


def two_kernels() -> FeedbackSNN:
    """Two convolutions in one connection, which no graph has."""
    torch.manual_seed(0)
    return FeedbackSNN(
        name="two-kernels",
        input_shape=(1, 8, 8),
        input=nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3)),
        readout=nn.Linear(32, 10),
        neuron=NEURON,
        time_steps=7,
    )


def relays() -> FeedbackSNN:
    """A pre-activation block on a stream of graded values, a feedback connection with a bias, and a readout of several parts."""
    torch.manual_seed(1)
    return FeedbackSNN(
        name="relays",
        input_shape=(1, 5, 5),
        input=nn.Conv2d(1, 4, 3, 1, 1),
        hidden=[nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4)],
        skips=[(0, 3, nn.Identity())],
        relays=(0, 3),
        feedback=[(4, 1, nn.Conv2d(4, 4, 3, 1, 1))],
        readout=nn.Sequential(Scale(2.0), nn.AvgPool2d(2), nn.Linear(16, 3), nn.BatchNorm1d(3)),
        neuron=NEURON,
        time_steps=6,
        weighted_readout=False,
    ).double()


def events() -> FeedbackSNN:
    torch.manual_seed(2)
    return FeedbackSNN(
        name="events",
        input_shape=(2, 7, 6),
        input=nn.Conv2d(2, 3, 3, 2),
        hidden=[nn.Linear(18, 8)],
        feedback=[(1, 0, nn.Linear(8, 18, bias=False))],
        readout=nn.Linear(8, 3),
        neuron=NEURON,
        time_steps=6,
    ).double()


def trained_thresholds() -> FeedbackSNN:
    torch.manual_seed(3)
    return FeedbackSNN(
        name="trained-thresholds",
        input_shape=(1, 6, 6),
        input=nn.Conv2d(1, 3, 3),
        hidden=[nn.AvgPool2d(2), nn.Linear(12, 3)],
        readout=None,
        trained_threshold=TrainedThreshold(threshold=0.3, alpha=0.3, bound=0.0005, tau=0.2, dt=0.1),
        time_steps=6,
    ).double()


NETWORKS = {"relays": relays, "events": events, "trained thresholds": trained_thresholds}


def samples(model: FeedbackSNN, count: int = 9) -> np.ndarray:
    draw = np.random.default_rng(0)
    frames = (model.time_steps,) if model.name == "events" else ()
    return draw.random((count, *model.input_shape, *frames))


def test_a_network_without_a_graph_runs_on_torch_and_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    model, images = two_kernels(), data.load("digits", samples=300)
    found = toolchain.deploy(model, target="torch", dataset="digits", samples=300, batch=128)
    assert "target torch runs the module all the same" in capsys.readouterr().err
    with torch.no_grad():
        stage = model.eval().equilibrium(torch.from_numpy(images.images))
        expected = model.logits(stage.rates[-1])
    assert np.array_equal(found.predictions, expected.argmax(1).numpy())
    assert found.correct == int((found.predictions == images.labels).sum())
    assert found.spikes_per_sample == pytest.approx(float(stage.counts[0].sum()) / 300)
    assert np.allclose(found.rates["hidden1"], stage.rates[0].numpy())
    assert found.synaptic_operations_per_sample is None
    assert "no count of synaptic operations" in found.to_text()


def test_other_targets_name_the_connection_that_has_no_graph() -> None:
    with pytest.raises(GraphError, match=r"connection 'input' of 'two-kernels' has several parts with weights"):
        toolchain.deploy(two_kernels(), target="sim", dataset="digits", samples=5)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_with_a_graph_is_counted_and_is_the_module(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = NETWORKS[name]().eval()
    images = samples(model)
    labels = np.arange(len(images), dtype=np.int64) % 3
    found = classify(find(model), TORCH, "torch", data.Dataset("drawn", images, labels, ("a", "b", "c")), Options(batch=4))
    assert "synaptic operations" not in capsys.readouterr().err
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found.logits, expected, rtol=0, atol=1e-12)
    assert found.spikes_per_sample > 0
    assert found.synaptic_operations_per_sample is not None
    assert found.synaptic_operations_per_sample > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_the_module_run_has_the_result_of_its_graph(name: str) -> None:
    """Counts, activity, traces and scores of every population, relays included, as the reference finds them on the folded graph."""
    model = NETWORKS[name]().eval()
    images = samples(model)
    graph = Fold()(forward_only(lowered(find(model))))
    with ModuleRun(model, graph, device="cpu", batch=4) as module, REFERENCE.compile(graph) as reference:
        ours, theirs = module.run(images), reference.run(images)
    assert ours.counts.keys() == {p.name for p in graph.populations if p.kind in ("couple", "linear")}
    for key, counts in ours.counts.items():
        assert counts.dtype == theirs.counts[key].dtype
        np.testing.assert_allclose(counts, theirs.counts[key], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(ours.activity[key], theirs.activity[key])
        np.testing.assert_allclose(ours.traces[key], theirs.traces[key], rtol=0, atol=1e-12)
    np.testing.assert_allclose(codec.logits(graph, ours), codec.logits(graph, theirs), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(
        codec.synaptic_operations(graph, ours, inputs=images), codec.synaptic_operations(graph, theirs, inputs=images)
    )


def test_a_record_keeps_the_rates_of_the_first_samples_of_large_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = events().eval()
    images, labels = samples(model), np.zeros(9, np.int64)
    dataset = data.Dataset("drawn", images, labels, ("a", "b", "c"))
    whole = classify(find(model), TORCH, "torch", dataset, Options())
    monkeypatch.setattr(seen, "RATE_VALUES", 5 * (18 + 8) + 1)
    monkeypatch.setattr(seen, "CHUNK", 4)
    cut = classify(find(model), TORCH, "torch", dataset, Options())
    np.testing.assert_array_equal(cut.logits, whole.logits)
    for name, rates in cut.rates.items():
        np.testing.assert_array_equal(rates, whole.rates[name][:5])


def test_feedback_that_the_module_cannot_run_is_run_by_its_graph(capsys: pytest.CaptureFixture[str]) -> None:
    model = relays().eval()
    with started(find(model), TORCH, Options(), ("forward", "feedback")) as run:
        forward = run.run(samples(model))
        back = run.run(codec.output_error(run.graph, forward, np.zeros(9, np.int64)), phase="feedback")
    assert "runs the graph of 'relays' instead of the module" in capsys.readouterr().err
    assert back.counts.keys() == {f"hidden{n}" for n in range(1, 6)}


def test_events_and_large_images_are_brought_to_what_a_model_or_an_artefact_takes() -> None:
    model = events()
    compiled = toolchain.compile(model, target="sim").artifact
    for source in (find(model), find(compiled)):
        assert sample_shape(source, "nmnist") == (6, None)
        assert sample_shape(source, "cifar10-dvs") == (6, 6)
