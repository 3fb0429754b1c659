"""Every network of the papers compiles, plans and comes back from its file, ImageNet's size included; where none are trained, with random weights."""

from __future__ import annotations

import numpy as np
import pytest

import toolchain
from toolchain import artifact, models

LARGE = ("nf-resnet-34", "convnet-f-dvs", "preactresnet-18", "preactresnet-18-100")
"""Written without their float tensors, which take most of the file."""


@pytest.mark.parametrize("name", models.names())
def test_it_compiles_plans_and_round_trips(name, tmp_path):
    file = tmp_path / "model.fsnn"
    made = toolchain.compile(name, output=file, float_tensors=name not in LARGE)
    found = artifact.read(file)
    assert found.graph.populations == made.graph.populations
    assert found.graph.phases == made.graph.phases
    assert found.graph.placement == made.graph.placement
    assert found.graph.provenance == made.graph.provenance
    for key, tensor in made.graph.tensors.items():
        np.testing.assert_array_equal(found.graph.tensors[key], tensor)
    assert toolchain.inspect(file).to_text().startswith(f"{name} for lava-sim")
