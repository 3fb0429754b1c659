"""NIR files give back the same artefact, and run in nirtorch with the reference's spikes and potentials: random graphs in every timing, leaks, loops, skips, relays, pools, extreme weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import toolchain
from toolchain import artifact
from toolchain.artifact import Artifact, Golden
from toolchain.exchange import nir_nodes
from toolchain.passes import Retime
from toolchain.targets.reference import Reference

pytest.importorskip("nir", reason="nir is not installed: pip install nir")
pytest.importorskip("nirtorch", reason="nirtorch is not installed: pip install nirtorch")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.*:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nir")


def require_same(graph, inputs, folder):
    """Out as NIR and back: the same bytes as an artefact. In nirtorch: every spike and potential of the reference."""
    from toolchain.exchange import nir_torch

    golden = {"inputs": np.asarray(inputs), "error": np.zeros((len(inputs), 1))}
    whole = Artifact(graph, None, "sim", "drawn", toolchain.__version__, Golden(len(inputs), 0, ("forward",)), golden)
    first, file, second = folder / "first.fsnn", folder / "drawn.nir", folder / "second.fsnn"
    artifact.write(whole, first)
    toolchain.export(first, format="nir", output=file)
    toolchain.import_(file, output=second)
    assert second.read_bytes() == first.read_bytes()
    made = nir_torch.run(nir_torch.load(file), inputs)
    with Reference(trace=True).compile(graph) as executable:
        expected = executable.run(inputs)
    assert made.spikes.keys() == expected.history.keys()
    for name, steps in expected.history.items():
        np.testing.assert_array_equal(made.spikes[name], steps.spikes, err_msg=f"spikes of '{name}'")
        np.testing.assert_array_equal(made.potentials[name], steps.potentials, err_msg=f"potentials of '{name}'")


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    seed=st.integers(0, 2**16),
    couples=st.integers(1, 4),
    leak=st.booleans(),
    numbers=st.sampled_from(["plain", "extreme", "positive", "saturating"]),
    graded=st.booleans(),
    mode=st.sampled_from(["step", "exact", "pipelined"]),
)
def test_dense_graphs(random_graph, random_inputs, folder, seed, couples, leak, numbers, graded, mode):
    graph = random_graph(seed=seed, couples=couples, leak=leak, numbers=numbers, graded=graded)
    graph = graph if mode == "step" else Retime(mode)(graph)
    assume(not nir_nodes.problems(graph))
    require_same(graph, random_inputs(graph, 3)[0], folder)


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(data=st.data(), extreme=st.booleans(), host=st.booleans(), integer=st.booleans())
def test_every_operation_that_nir_has(drawn, folder, data, extreme, host, integer):
    graph = data.draw(drawn.graphs(integer=integer, extreme=extreme and integer, host=host and integer))
    assume(not nir_nodes.problems(graph))
    require_same(Retime("exact")(graph) if integer else graph, data.draw(drawn.values(graph))[0], folder)
