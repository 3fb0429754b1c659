"""The shipped networks, in both timing modes: reference, simulator and Lava processes agree on every spike, potential and saturation."""

from __future__ import annotations

import pytest

import toolchain


@pytest.mark.slow
@pytest.mark.lava
@pytest.mark.parametrize("timing", ["exact", "pipelined"])
@pytest.mark.parametrize("name", ["mnist-fc", "mnist-fc2"])
def test_trained_networks_are_identical_on_every_integer_target(name, timing):
    found = toolchain.verify(toolchain.compile(name, timing=timing).artifact)
    assert found.samples == {"forward": 100, "feedback": 20}
    assert [pair.b for pair in found.pairs] == ["sim", "lava-sim"]
    for pair in found.pairs:
        assert (pair.spike_differences, pair.potential_differences, pair.saturation_differences) == (0, 0, 0)
    assert found.activity["forward"] > 100_000
    assert found.activity["feedback"] > 10_000


@pytest.mark.slow
@pytest.mark.lava
@pytest.mark.parametrize("name", ["mnist-fc", "mnist-fc2"])
def test_trained_networks_are_as_accurate_on_lava_as_in_torch(name):
    """Within 0.2 points on the same 1,000 images."""
    torch_row, lava_row = (toolchain.deploy(name, target=target) for target in ("torch", "lava-sim"))
    assert lava_row.samples == 1000
    assert abs(torch_row.accuracy - lava_row.accuracy) <= 0.002
