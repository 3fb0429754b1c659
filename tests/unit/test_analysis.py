"""What is said of a network before it runs: calibration, saturation, contraction, error budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain import codec
from toolchain.analysis import calibrate, training_samples
from toolchain.analysis.calibration import full_errors
from toolchain.data import Dataset
from toolchain.errors import GraphError, UsageError
from toolchain.passes import Quantize, Retime
from toolchain.targets.reference import REFERENCE


def samples_of(graph, random_inputs, count=6):
    images, _ = random_inputs(graph, count)
    classes = graph.of_kind("readout")[0].shape[0]
    return Dataset("drawn", images.astype(np.float32), np.arange(count) % classes, ())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), couples=st.integers(1, 3), graded=st.booleans(), retimed=st.booleans())
def test_calibration_sees_every_potential_before_it_fires(random_graph, random_inputs, seed, couples, graded, retimed):
    graph = random_graph(seed, couples=couples, graded=graded, integer=False)
    graph = Retime()(graph) if retimed else graph
    dataset = samples_of(graph, random_inputs)
    found = calibrate(graph, dataset)
    assert (found.dataset, found.samples) == ("drawn", 6)
    with replace(REFERENCE, trace=True).compile(graph) as run:
        forward = run.run(dataset.images)
        error = full_errors(graph, forward, dataset.labels)
        results = (forward, run.run(error, phase="feedback"))
    for result in results:
        for name, history in result.history.items():
            before = history.potentials + graph.phase(result.phase).dynamics[name].reset * history.spikes
            np.testing.assert_allclose(found.potential[result.phase][name], np.abs(before).max(), rtol=1e-5, atol=1e-6)
    encoded = codec.encode_input(graph, dataset.images)
    assert found.current == {
        drive.population: pytest.approx(np.abs(codec.input_current(graph, drive, encoded)).max()) for drive in graph.phase("forward").drive
    }


def test_calibration_gives_errors_of_any_size_the_same_room(random_graph, random_inputs):
    graph = random_graph(3, integer=False)
    dataset = samples_of(graph, random_inputs)
    with REFERENCE.compile(graph) as run:
        error = full_errors(graph, run.run(dataset.images), dataset.labels)
    np.testing.assert_allclose(np.abs(error).reshape(6, -1).max(axis=1), codec.error_bound(graph))


def test_calibrated_units_have_room_for_what_was_seen(random_graph, random_inputs):
    graph = Retime()(random_graph(5, integer=False))
    dataset = samples_of(graph, random_inputs)
    quantized = Quantize(calibration=calibrate(graph, dataset))(graph)
    assert quantized.provenance.calibration.samples == 6
    with REFERENCE.compile(quantized) as run:
        result = run.run(dataset.images)
    assert sum(int(saturated.sum()) for saturated in result.saturations.values()) == 0
    assert codec.clipped_currents(quantized, dataset.images) == 0


def test_calibration_runs_floats_on_training_samples_only(random_graph, random_inputs):
    graph = random_graph(1)
    with pytest.raises(GraphError, match="integers"):
        calibrate(graph, samples_of(graph, random_inputs))
    with pytest.raises(UsageError, match="test images only"):
        training_samples(graph, "mnist-1k")
    with pytest.raises(UsageError, match="1,297"):
        training_samples(graph, "digits", samples=2000)
    assert len(training_samples(graph, "digits", samples=20)) == 20
    assert len(training_samples(graph, "digits")) == 256
