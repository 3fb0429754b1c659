"""The feedback phase of quantized trained networks gives float SPIDE's gradient: batch 128, T_B 250, a scale factor at which no couple clips."""

from __future__ import annotations

import numpy as np
import pytest

import toolchain
from toolchain import data


@pytest.mark.parametrize(
    ("name", "dataset", "scale_factor"),
    [
        ("digits-fc", "digits", 32),
        ("mnist-fc", "mnist-1k", 64),
        ("mnist-fc2", "mnist-1k", 64),
        pytest.param("convnet-f", "mnist-1k", 256, marks=pytest.mark.slow),
    ],
)
def test_eight_bits_keep_the_direction_of_every_gradient(name, dataset, scale_factor, tmp_path):
    loaded = data.load(dataset, samples=128)
    file = tmp_path / "model.fsnn"
    toolchain.compile(name, target="sim", feedback_steps=250, output=file)
    integer, exact = (
        toolchain.feedback(file, loaded.images, loaded.labels, target=target, scale_factor=scale_factor, device="cpu")
        for target in ("sim", "torch")
    )
    assert integer.clipped == exact.clipped == 0
    assert integer.clipped_errors == 0
    for parameter, gradient in exact.gradients.items():
        found = integer.gradients[parameter]
        assert np.linalg.norm(gradient) > 0
        assert float(found.ravel() @ gradient.ravel()) >= 0.99 * float(np.linalg.norm(found) * np.linalg.norm(gradient)), parameter
