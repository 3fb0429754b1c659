"""However learning ends, it goes on from there, and comes to what it would have come to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toolchain
from toolchain import data, files, lesson
from toolchain.errors import ArtifactError, ToolchainError, UsageError
from toolchain.learn import Learned

OPTIONS: dict[str, Any] = {"dataset": "digits", "samples": 40, "epochs": 2, "batch": 16, "test_samples": 10}


def learned(target: str = "sim", **options: Any) -> Learned:
    return toolchain.learn("digits-fc", target=target, **{**OPTIONS, **options})


def lines(run: Path) -> list[dict[str, Any]]:
    """The curve without its seconds."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


def assert_same(found: Learned, run: Path, whole: Learned, kept: Path) -> None:
    assert found.updates == whole.updates
    assert found.tensors.keys() == whole.tensors.keys()
    for name, values in whole.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], values, err_msg=name)
    assert lines(run) == lines(kept)
    assert (run / "learned.fsnn").read_bytes() == (kept / "learned.fsnn").read_bytes()
    assert sorted(path.name for path in run.iterdir()) == ["last.safetensors", "learned.fsnn", "metrics.jsonl"]


def ending(monkeypatch: pytest.MonkeyPatch, error: BaseException, update: int, *, saved: int | None = None) -> None:
    """`error` comes after so many updates; as where a process is killed, nothing is written then but what was `saved` before."""
    when_due = lesson.Kept.when_due

    def broken(self: lesson.Kept) -> None:
        if self.lesson.updates == saved:
            self.now()
        when_due(self)
        if self.lesson.updates == update:
            raise error

    monkeypatch.setattr(lesson.Kept, "when_due", broken)
    if saved is not None:
        monkeypatch.setattr(lesson.Kept, "at_last", lambda self: None)


@pytest.mark.parametrize(
    ("target", "weights"),
    [
        ("sim", "int8"),
        ("torch", "float"),
        pytest.param("lava-sim", "int8", marks=pytest.mark.lava),
        pytest.param("lava-sim", "float", marks=[pytest.mark.lava, pytest.mark.slow]),
        pytest.param("reference", "float", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_killed_goes_on_to_the_same_weights(
    target: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second epoch, some updates after the last writing, and again in the resumed run."""
    run, kept = tmp_path / "run", tmp_path / "whole"
    whole = learned(target, weights=weights, output=kept)
    for resume, saved, update in ((False, 4, 5), (True, 5, 6)):
        with monkeypatch.context() as patch:
            ending(patch, KeyboardInterrupt(), update, saved=saved)
            with pytest.raises(KeyboardInterrupt):
                learned(target, weights=weights, output=run, resume=resume)
    begun = lesson._begun_in(run / "last.safetensors", 2**20)[0]
    assert (begun.updates, len(begun.curve), len(begun.seen)) == (5, 2, 2)
    assert_same(learned(target, weights=weights, output=run, resume=True), run, whole, kept)


def test_an_interruption_loses_no_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, kept = tmp_path / "run", tmp_path / "whole"
    with monkeypatch.context() as patch:
        ending(patch, KeyboardInterrupt(), 2)
        with pytest.raises(KeyboardInterrupt):
            learned(output=run)
    assert lesson._begun_in(run / "last.safetensors", 2**20)[0].updates == 2
    whole = learned(output=kept)
    assert_same(learned(output=run, resume=True), run, whole, kept)
    assert_same(learned(output=run, resume=True), run, whole, kept)  # and a run that is done stays as it is


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ToolchainError("Lava process 'couple1' was ended by signal 9: run again"),
            r"^Lava process 'couple1' was ended by signal 9: run again ",
        ),
        (MemoryError("no room"), r"^learning ran out of memory \(no room\): lower --batch or --samples, .* "),
    ],
)
def test_a_target_that_fails_says_what_was_done(error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ending(monkeypatch, error, 4)
    run = tmp_path / "run"
    with pytest.raises(ToolchainError, match=rf"{said}\('{run}' holds 4 of 6 updates: --resume goes on from there\)$"):
        learned(output=run)
    with pytest.raises(ToolchainError, match=rf"{said}\(4 of 6 updates were done, and are lost: give -o RUN to keep them\)$"):
        learned()


def test_a_full_disk_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence says how much that is, and the run goes on where there is room again."""
    run, kept = tmp_path / "run", tmp_path / "whole"
    replace_file: Callable[[Path, bytes], None] = files.replace_file

    def full(path: Path, content: bytes) -> None:
        if path.name == "last.safetensors" and len(written) == 3:
            raise files.unwritten(path, OSError(28, "No space left on device"))
        written.append(path.name)
        replace_file(path, content)

    written: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(lesson, "replace_file", full)
        patch.setattr(lesson, "EVERY", 0.0)
        patch.setattr("time.monotonic", lambda: 0.0)  # every time is long ago
        with pytest.raises(ToolchainError, match=r"make room there, then give the command again \('.*' holds 1 of 6 updates: --resume"):
            learned(output=run)
    whole = learned(output=kept)
    assert_same(learned(output=run, resume=True), run, whole, kept)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seed": 1}, "has first weights (sha256) = "),
        ({"settings": ["learn.lr=0.5"]}, "has learn.lr = 1.0, not 0.5: go on with its own settings, or choose another folder"),
        ({"epochs": 3}, "has epochs = 2, not 3: "),
        ({"samples": 30}, "has samples = 40, not 30: "),
        ({"target": "reference"}, "has target = sim, not reference: "),
    ],
)
def test_another_run_is_not_gone_on_with(options: dict[str, Any], sentence: str, finished: Path) -> None:
    with pytest.raises(UsageError) as error:
        learned(**{"output": finished, "resume": True, **options})
    assert sentence in str(error.value)


def test_another_network_of_the_same_name_and_other_images_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in (10, 12):
        toolchain.compile("digits-fc", time_steps=steps, output=tmp_path / str(steps) / "net.fsnn")

    def learned_by(steps: int, **options: Any) -> None:
        toolchain.learn(tmp_path / str(steps) / "net.fsnn", target="sim", output=tmp_path / "run", **{**OPTIONS, **options})

    learned_by(10)
    with pytest.raises(UsageError, match=r"has network \(sha256\) = \w+, not \w+: go on with its own settings"):
        learned_by(12, resume=True)
    load = data.load

    def changed(*arguments: Any, **options: Any) -> data.Dataset:
        found = load(*arguments, **options)
        images = np.array(found.images)
        images[-1, ..., 0] += 0.5
        return replace(found, images=images)

    monkeypatch.setattr(data, "load", changed)
    with pytest.raises(UsageError, match=r"has training samples \(sha256\) = \w+, not \w+: "):
        learned_by(10, resume=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    learned(output=run)
    return run


def test_what_cannot_be_gone_on_with_is_said(finished: Path, tmp_path: Path) -> None:
    state, network = finished / "last.safetensors", finished / "learned.fsnn"
    with pytest.raises(UsageError, match=r"--resume goes on with a run folder: name it with -o RUN"):
        learned(resume=True)
    with pytest.raises(UsageError, match=r"holds no last.safetensors to resume from: start without --resume"):
        learned(output=tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    with pytest.raises(UsageError, match=r"already holds a run .*: go on with --resume, or choose another folder"):
        learned(output=finished)
    content, learnt = state.read_bytes(), network.read_bytes()
    try:
        for damaged, said in (
            (content[:100], "is no lesson that can go on"),
            (content.replace(b'"updates\\":6', b'"updates\\":5'), "counts 5 updates in a way that no lesson does"),
            (content.replace(b'"format\\":1', b'"format\\":7'), "has format 7 and this version reads 1"),
            (learnt, "is no lesson that can go on"),
        ):
            assert damaged != content
            state.write_bytes(damaged)
            with pytest.raises(ArtifactError) as error:
                learned(output=finished, resume=True)
            assert said in str(error.value)
            assert "\n" not in str(error.value)
        state.write_bytes(content)
        for damaged in (b"", learnt[:-1], learnt[:-1] + bytes([learnt[-1] ^ 1]), content):
            network.write_bytes(damaged)
            with pytest.raises(
                ArtifactError,
                match=r"^'.*learned\.fsnn' is no artefact that can be read: restore the file, or learn again into another folder$",
            ):
                learned(output=finished, resume=True)
        network.unlink()
        with pytest.raises(UsageError, match=r"lacks learned\.fsnn: restore the file"):
            learned(output=finished, resume=True)
    finally:
        state.write_bytes(content)
        network.write_bytes(learnt)


def test_one_run_at_a_time_writes_a_folder(finished: Path) -> None:
    with files.held(finished), pytest.raises(UsageError, match="another run is writing"):
        learned(output=finished, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sim", pytest.param("lava-sim", marks=pytest.mark.lava)])
def test_real_kills_at_random_moments(target: str, tmp_path: Path) -> None:
    """`killing.py` kills the learning process again and again, and compares what it comes to in the end."""
    command = [sys.executable, str(Path(__file__).parent / "killing.py"), "learn", target, "8", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
