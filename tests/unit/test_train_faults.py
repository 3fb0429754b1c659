"""A training run loses nothing: killed anywhere, on a full disk, beside another run, while it is read."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from toolchain import checkpoint, data, deploy, files, metrics
from toolchain.errors import ArtifactError, ToolchainError, UsageError
from toolchain.exchange.nir import write_run
from toolchain.train import CONFIG, LAST, train

ROOT = Path(__file__).resolve().parents[2]
training = sys.modules["toolchain.train"]  # `toolchain.train` is the function

SHORT: dict[str, Any] = {
    "train.epochs": 3,
    "train.held_out": 1137,
    "train.optimizer": "adam",
    "train.metrics": ["csv"],
    "network.time_steps": 5,
    "network.feedback_steps": 10,
    "network.dropout": 0.1,
}


class Killed(BaseException):
    """As a kill, but for what `finally` tidies up; benchmarks/endurance_training.py kills in earnest."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    begin(folder)
    return folder


def begin(folder: Path, **options: Any) -> None:
    train("digits-fc", settings=SHORT, output=folder, device="cpu", **options)


def same(folder: Path, whole: Path) -> bool:
    """Whether two folders hold the same files, but for the seconds that epochs took."""
    assert sorted(os.listdir(folder)) == sorted(os.listdir(whole))
    lines = [[{**json.loads(text), "seconds": 0} for text in (run / metrics.LINES).read_text().splitlines()] for run in (folder, whole)]
    return lines[0] == lines[1] and all(
        (folder / name).read_bytes() == (whole / name).read_bytes() for name in (CONFIG, LAST, checkpoint.NAME)
    )


def failing(name: str, number: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `number`-th time (from 1) that a file `name` is written, `error` is raised when all of it is in the temporary file."""
    settle, seen = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        seen[0] += f"/.{name}." in os.readlink(f"/proc/self/fd/{descriptor}")
        if seen[0] == number:
            raise error
        settle(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def endurance(*words: str) -> dict[str, Any]:
    """What the program found that kills and resumes training runs."""
    command = [sys.executable, str(ROOT / "benchmarks" / "endurance_training.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_killed_run_resumes_to_the_same_files() -> None:
    """The short form of `make endurance-training`, which kills more than two hundred times."""
    found = endurance("--kills", "3", "--writes", "5", "--together", "0", "--commands", "0", "--seed", "3")
    assert found["problems"] == []
    assert sum(len(trial["killed"]) for trial in found["trials"]) == 8


@pytest.mark.slow
def test_killed_runs_of_every_method_and_of_two_processes_resume_to_the_same_files() -> None:
    found = endurance("--kills", "16", "--writes", "16", "--together", "4", "--commands", "1", "--seed", "4")
    assert found["problems"] == []
    assert {trial["kind"] for trial in found["trials"]} == {"kill", "write", "together", "command"}


WRITES = [(metrics.LINES, 1), (CONFIG, 1), (checkpoint.NAME, 1), (metrics.LINES, 2), (LAST, 1), (metrics.TABLE, 3), (LAST, 2)]
"""In the order in which a run writes them."""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
@pytest.mark.parametrize(("name", "number"), WRITES)
def test_a_run_that_ends_before_any_of_its_files_resumes(name: str, number: int, whole: Path, tmp_path: Path, monkeypatch: Any) -> None:
    failing(name, number, Killed(), monkeypatch)
    with pytest.raises(Killed):
        begin(tmp_path / "run")
    monkeypatch.undo()
    begun = (tmp_path / "run" / CONFIG).exists()
    if not begun:
        with pytest.raises(UsageError, match=r"holds no last.safetensors to resume from: start without --resume"):
            begin(tmp_path / "run", resume=True)
    begin(tmp_path / "run", resume=begun)
    assert same(tmp_path / "run", whole)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
@pytest.mark.parametrize(("name", "number", "kept"), [(CONFIG, 1, None), (checkpoint.NAME, 1, 0), (metrics.LINES, 3, 1), (LAST, 2, 1)])
def test_a_full_disk_keeps_the_last_whole_epoch(
    name: str, number: int, kept: int | None, whole: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    run = tmp_path / "run"
    failing(name, number, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), monkeypatch)
    with pytest.raises(ToolchainError, match=f"cannot write '{run / name}' \\(No space left on device\\): make room there") as raised:
        begin(run)
    assert raised.value.exit_code == 1
    if kept is not None:
        assert (f"after epoch {kept}; --resume goes on" if kept else "no epoch is done; --resume goes on") in str(raised.value)
    assert not list(run.glob(".*"))
    if kept:
        assert checkpoint.read(run / LAST).about.epoch == kept
        checkpoint.load(run)
    monkeypatch.undo()
    begin(run, resume=kept is not None)
    assert same(run, whole)


@contextmanager
def no_larger_file_than(size: int) -> Iterator[None]:
    """The kernel refuses to write more into a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_does_not_fit_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    files.replace_file(path, b"before")
    with no_larger_file_than(50_000), pytest.raises(ToolchainError, match=f"cannot write '{path}' .*: make room there") as raised:
        files.replace_file(path, bytes(100_000))
    assert raised.value.exit_code == 1
    assert (os.listdir(tmp_path), path.read_bytes()) == (["answers"], b"before")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_place_that_nobody_may_write_is_the_users(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        UsageError, match=f"cannot write '{tmp_path / 'run'}' \\({os.strerror(number)}\\): choose a writable place"
    ) as raised:
        begin(tmp_path / "run")
    assert raised.value.exit_code == 2


HOLD = "import sys, time; from pathlib import Path; from toolchain.files import held\nwith held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_the_second_of_two_runs_is_told_of_the_first_which_may_be_killed(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        for resume in (False, True):
            if resume:
                for path in whole.iterdir():
                    (run / path.name).write_bytes(path.read_bytes())
            with pytest.raises(UsageError, match=rf"another run is writing '{run}' \(process {first.pid} on .+\): wait for its end"):
                begin(run, resume=resume)
        assert checkpoint.load(run).name == "digits-fc"  # who only reads is not held up
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    (run / f".{LAST}.123.part").write_text("half of it")
    (run / ".mine.123.part").write_text("none of the run's files")
    (run / LAST).unlink()
    (run / metrics.LINES).write_text("")
    begin(run, resume=True)
    assert sorted(path.name for path in run.glob(".*")) == [".mine.123.part"]


def test_a_run_of_mixed_files_does_not_go_on(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    begin(other, seed=1)
    kept = {name: (whole / name).read_bytes() for name in (CONFIG, LAST, checkpoint.NAME, metrics.LINES)}
    first, *rest = kept[metrics.LINES].splitlines(keepends=True)
    better = json.dumps({**json.loads(first), "held_out_accuracy": 0.999}).encode() + b"\n"
    for name, content, said in (
        (checkpoint.NAME, (other / checkpoint.NAME).read_bytes(), r"is of another run than last\.safetensors beside it: restore it"),
        (checkpoint.NAME, kept[checkpoint.NAME][:-8], r"checkpoint\.safetensors' is damaged"),
        (metrics.LINES, b"".join([better, *rest]), r"metrics\.jsonl' tells of other accuracies than checkpoint\.safetensors"),
        (metrics.LINES, (other / metrics.LINES).read_bytes(), r"metrics\.jsonl' tells of other accuracies than checkpoint\.safetensors"),
    ):
        shutil.copytree(whole, run, dirs_exist_ok=True)
        (run / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=said):
            begin(run, resume=True)
    shutil.copytree(whole, run, dirs_exist_ok=True)
    (run / CONFIG).write_text("seed: 5\n")
    begin(run, resume=True)
    assert same(run, whole)
    load = data.load
    monkeypatch.setattr(data, "load", lambda *a, **o: replace(load(*a, **o), images=load(*a, **o).images[::-1]))
    with pytest.raises(UsageError, match="has seen other samples of 'digits' than are there now"):
        begin(run, resume=True)


def test_an_import_keeps_out_of_a_held_folder(whole: Path, tmp_path: Path) -> None:
    best = checkpoint.read(whole / checkpoint.NAME)
    with files.held(tmp_path / "run"), pytest.raises(UsageError, match="another run is writing"):
        write_run(tmp_path / "run", best.about, best.tensors)
    write_run(tmp_path / "run", best.about, best.tensors)
    assert sorted(os.listdir(tmp_path / "run")) == [checkpoint.NAME, CONFIG]


def test_a_run_is_read_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, found = training.progress.track, []

    def reads(items: Any, label: str, total: int | None = None) -> Any:
        if label.startswith("epoch 2/"):
            found.append(deploy(tmp_path / "run", target="torch", dataset="digits", samples=20, device="cpu").to_json()["samples"])
        yield from original(items, label, total)

    monkeypatch.setattr(training.progress, "track", reads)
    begin(tmp_path / "run")
    assert found == [20]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to /dev/full")
def test_a_run_outlives_those_who_read_its_messages(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as log, Path(os.devnull).open("w") as null, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", log)
        begin(tmp_path / "run")
        os.dup2(null.fileno(), log.fileno())  # what the stream still has goes there when it is closed
    assert same(tmp_path / "run", whole)


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UsageError, match=r"cannot be locked \(No locks available\): choose a folder on another file system"):
        begin(tmp_path / "run")


def test_links_that_wait_in_a_folder_lead_nowhere(tmp_path: Path) -> None:
    other, run = tmp_path / "other", tmp_path / "run"
    other.write_text("not ours")
    run.mkdir()
    (run / ".lock").symlink_to(other)
    with pytest.raises(UsageError, match="cannot write"), files.held(run):
        pass
    (run / ".lock").unlink()
    (run / f".answers.{os.getpid()}.part").symlink_to(other)
    files.replace_file(run / "answers", b"ours")
    assert (other.read_text(), (run / "answers").read_bytes(), os.listdir(run)) == ("not ours", b"ours", ["answers"])
