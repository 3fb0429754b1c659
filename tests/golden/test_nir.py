"""NIR files that SpikingJelly 2.0 wrote, imported: the spikes of its own networks, which reset by subtraction, at every step. `nir/make.py` made the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import toolchain
from toolchain import codec
from toolchain.compiler import lowered
from toolchain.source import find
from toolchain.targets.reference import Reference

pytest.importorskip("nir", reason="nir is not installed: pip install nir")

FILES = Path(__file__).with_name("nir")


@pytest.mark.parametrize("name", ["if", "lif", "lif-decayed-input", "conv"])
def test_spikes_of_spikingjelly(tmp_path, name):
    kept = np.load(FILES / "expected.npz")
    inputs = kept[f"{name}.inputs"]
    outcome = toolchain.import_(FILES / f"{name}.nir", output=tmp_path / "run", time_steps=len(kept[f"{name}.output"]))
    assert any("soft reset may have been lost" in sentence for sentence in outcome.warnings)
    graph = lowered(find(tmp_path / "run"))
    with Reference(trace=True).compile(graph) as run:
        result = run.run(inputs)
    trains = sorted(key for key in kept.files if key.startswith(f"{name}.spikes"))
    for layer, key in enumerate(trains):
        assert 0 < kept[key].mean() < 1
        np.testing.assert_array_equal(result.history[f"hidden{layer + 1}"].spikes, kept[key])
    np.testing.assert_allclose(codec.logits(graph, result), kept[f"{name}.output"].mean(axis=0), rtol=1e-9, atol=1e-9)


def test_an_imported_network_compiles_and_deploys(tmp_path):
    toolchain.import_(FILES / "conv.nir", output=tmp_path / "run", time_steps=6)
    toolchain.compile(tmp_path / "run", output=tmp_path / "conv.fsnn")
    record = toolchain.verify(tmp_path / "conv.fsnn", targets=("reference", "sim"), replay=True)
    assert record.passed
