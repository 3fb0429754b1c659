"""`verify --replay`: the golden vectors of an artefact on any machine, without data sets and without Lava; artefacts that were edited or cut are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import toolchain
from toolchain import artifact
from toolchain.compiler import compile as compile_model
from toolchain.errors import ArtifactError, UsageError
from toolchain.ir import frozen

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("timing", ["exact", "pipelined"])
@pytest.mark.parametrize("input", ["bias", "graded"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_artefacts_of_every_form_replay(tmp_path, timing, input, bits):
    file = tmp_path / "digits.fsnn"
    toolchain.compile("digits-fc", timing=timing, input=input, weight_bits=bits, time_steps=10, feedback_steps=10, output=file)
    found = toolchain.verify(file, targets=("reference", "sim"), replay=True)
    assert found.passed
    assert found.samples == {"forward": 16, "feedback": 16}
    assert [(pair.a, pair.b) for pair in found.pairs] == [("golden", "reference"), ("golden", "sim")]
    assert found.pairs[0].spikes_compared == 2 * 16 * 32
    assert found.pairs[0].not_compared == ()
    assert found.coverage is None


@pytest.mark.parametrize("name", ["lenet", "convnet-f", "nmnist-conv"])
def test_convolutions_and_events_replay(name):
    """nmnist-conv takes events; random weights are enough."""
    made = compile_model(name, time_steps=4, feedback_steps=4).artifact
    assert toolchain.verify(made, targets=("sim",), replay=True).passed


def test_it_needs_neither_data_nor_lava(tmp_path):
    file = tmp_path / "digits.fsnn"
    toolchain.compile("digits-fc", time_steps=6, feedback_steps=6, output=file)
    code = (
        "import sys; sys.modules['lava'] = None; import toolchain, toolchain.data; toolchain.data.load = None; "
        f"found = toolchain.verify({str(file)!r}, targets=('reference', 'sim'), replay=True); print(found.to_text()); sys.exit(not found.passed)"
    )
    environment = {**os.environ, "TOOLCHAIN_DATA": str(tmp_path / "none"), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "golden = sim: 0 of" in done.stdout


@pytest.fixture(scope="module")
def made():
    return compile_model("digits-fc", time_steps=6, feedback_steps=6).artifact


@pytest.mark.parametrize(
    ("key", "kind", "phase"),
    [
        ("forward.counts.hidden1", "spike count", "forward"),
        ("forward.potentials.readout", "last potential", "forward"),
        ("feedback.potentials.hidden1", "last potential", "feedback"),
        ("feedback.saturations.hidden1", "saturations", "feedback"),
    ],
)
def test_a_golden_number_that_is_not_what_targets_compute_is_named(made, key, kind, phase):
    """As where the program that replays computes otherwise than the one that compiled."""
    tensor = made.golden_tensors[key].copy()
    tensor[5].reshape(-1)[3] += 1
    other = msgspec.structs.replace(made, golden_tensors={**made.golden_tensors, key: frozen(tensor)})
    found = toolchain.verify(other, targets=("sim",), replay=True)
    first = found.first_difference
    assert not found.passed
    assert (first.phase, first.population, first.sample, first.neuron, first.inputs) == (phase, key.split(".")[2], 5, 3, "golden input")
    assert first.kind == kind
    assert first.a == first.b + 1
    assert "golden input 5" in found.to_text()


def test_a_fault_upstream_is_named_before_what_follows_from_it(made):
    """Golden vectors keep totals only, so the order of update decides."""
    changed = {}
    for key in ("forward.counts.hidden1", "forward.potentials.readout"):
        tensor = made.golden_tensors[key].copy()
        tensor += 1
        changed[key] = frozen(tensor)
    other = msgspec.structs.replace(made, golden_tensors={**made.golden_tensors, **changed})
    assert toolchain.verify(other, targets=("sim",), replay=True).first_difference.population == "hidden1"


def test_missing_golden_numbers_are_said(made):
    fewer = {key: tensor for key, tensor in made.golden_tensors.items() if key != "forward.counts.hidden1"}
    with pytest.raises(UsageError, match=r"lack 'forward\.counts\.hidden1' in shape \(16, 32\): compile it again"):
        toolchain.verify(msgspec.structs.replace(made, golden_tensors=fewer), targets=("sim",), replay=True)


def test_an_edited_or_cut_file_is_refused_before_anything_runs(tmp_path, made):
    file = tmp_path / "digits.fsnn"
    artifact.write(made, file)
    whole = file.read_bytes()
    middle = len(whole) - len(whole) // 4
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], b""):
        file.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            toolchain.verify(file, targets=("sim",), replay=True)
    at = whole.index(b'"threshold"') if b'"threshold"' in whole else whole.index(b"threshold")
    digits = next(i for i in range(at, at + 40) if 48 <= whole[i] <= 57)
    other = b"1" if whole[digits : digits + 1] != b"1" else b"2"
    file.write_bytes(whole[:digits] + other + whole[digits + 1 :])
    with pytest.raises(ArtifactError, match="was changed after it was compiled"):
        toolchain.verify(file, targets=("sim",), replay=True)


def test_floats_are_refused(made):
    with pytest.raises(UsageError, match="computes in floats"):
        toolchain.verify(made, targets=("torch",), replay=True)
