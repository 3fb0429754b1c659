"""Commands in poor surroundings: closed streams, no home, no working directory, other encodings, names that are no text, little memory, few threads."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import toolchain
from toolchain import cli, shortage
from toolchain.errors import ArtifactError, ToolchainError

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line for the shell in which $TOOL is the command."""
    whole = {**ENVIRONMENT, "TOOL": f"{sys.executable} -m toolchain", **environment}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=whole, timeout=120, check=False)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("$TOOL models <&- >/dev/null", 0),
        ("$TOOL models | head -0; exit ${PIPESTATUS[0]}", 1),
        ("$TOOL models --json 2>&- >/dev/null", 0),
        ("$TOOL export nothing --format other -o x 2>/dev/full", 2),
        (
            "mkdir $PLACE/gone; cd $PLACE/gone; rmdir ../gone; $TOOL models 2>$PLACE/said; code=$?; grep -q 'working directory is gone' $PLACE/said; exit $code",
            2,
        ),
    ],
)
def test_streams_and_folders_that_are_not_there(line: str, code: int, tmp_path: Path) -> None:
    done = shell(line, PLACE=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


class Named:
    """A result with a name of any characters."""

    def __init__(self, name: str) -> None:
        self.name = name

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "rates": [0.5, float("nan")]}

    def to_text(self) -> str:
        return f"wrote {self.name}"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
@pytest.mark.parametrize("name", ["plain", "\u00fc\u4e2d\U0001f600", "\udcff\udcfe.fsnn"])
def test_every_stream_carries_every_name(name: str, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON keeps the name; text shows an escape."""
    for form in (True, False):
        path = tmp_path / "out"
        with path.open("w", encoding=encoding) as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            cli._open_streams()
            cli._print(Named(name), form)
        found = path.read_text(encoding)
        if form:
            assert json.loads(found) == {"name": name, "rates": [0.5, None]}
        else:
            assert found.startswith("wrote ")
            assert ("plain" in found) == (name == "plain")


def test_a_name_that_is_no_text_where_it_cannot_be_kept(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "inspect", lambda *_, **__: "\udcff".encode())
    answer = command("inspect", "x")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "toolchain: '\\udcff' in a name is no text (surrogates not allowed): rename the file or folder\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            MemoryError("Unable to allocate 9.1 GiB"),
            "deploy digits-fc ran out of memory (Unable to allocate 9.1 GiB): lower --batch or --samples, end other programs, or raise what `ulimit -v` or the container allows",
        ),
        (
            RuntimeError("can't start new thread"),
            "deploy digits-fc ran out of threads and processes (can't start new thread): lower --jobs, end other programs, or raise what `ulimit -u`, `ulimit -v` or the container allows",
        ),
    ],
)
def test_a_shortage_is_one_sentence_with_what_to_lower(command: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def short(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(toolchain, "deploy", short)
    jobs = ["--jobs", "2"] if "thread" in said else []
    answer = command("deploy", "digits-fc", "--target", "sim", *jobs)
    assert (answer.code, answer.out, answer.err) == (1, "", f"toolchain: {said}\n")


def test_no_file_is_blamed_for_a_shortage(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object, **__: object) -> None:
        try:
            raise OSError(12, "Cannot allocate memory")
        except OSError as error:
            raise ArtifactError(f"'x.fsnn' is no readable artefact ({error})") from None

    monkeypatch.setattr(toolchain, "inspect", short)
    answer = command("inspect", "x.fsnn")
    assert answer.code == 1
    assert answer.err.startswith("toolchain: inspect x.fsnn ran out of memory ([Errno 12] Cannot allocate memory): ")


def test_the_last_words_are_of_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["toolchain", "deploy", "digits-fc", "--target", "sim"])
    assert cli.last_words().startswith(
        "toolchain: deploy digits-fc was ended by a library that could not go on, most often for want of memory: lower --batch"
    )
    monkeypatch.setattr(sys, "argv", ["toolchain", "deploy", "digits-fc", "--debug"])
    assert cli.last_words() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits that the system keeps")
def test_without_room_even_for_a_sentence(shell_limits: Any) -> None:
    """From too little for NumPy up: one line each, whatever was asked."""
    for megabytes in (90, 400):
        done = shell_limits(megabytes, "doctor")
        assert (done.returncode, done.stdout) == (1, ""), (megabytes, done.stderr)
        assert done.stderr.startswith("toolchain: "), (megabytes, done.stderr)
        assert "ran out of memory" in done.stderr
        assert done.stderr.count("\n") == 1, (megabytes, done.stderr)


@pytest.fixture
def shell_limits() -> Any:
    """Gives a command with so many megabytes of addresses."""

    def give(megabytes: int, *words: str) -> subprocess.CompletedProcess[str]:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

        whole = [sys.executable, "-m", "toolchain", *words]
        return subprocess.run(whole, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False, preexec_fn=limit)

    return give


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs limits that the system keeps")
@pytest.mark.parametrize("verb", ["deploy digits-fc --target sim --dataset digits --samples 50", "compile digits-fc -o FILE"])
def test_every_limit_gives_the_result_or_one_sentence(verb: str, shell_limits: Any, tmp_path: Path) -> None:
    """Limits from where torch cannot be loaded to where all is well."""
    verb = verb.replace("FILE", str(tmp_path / "x.fsnn"))
    least, most = 1000, 16_000
    while most - least > 25:  # where the result begins, every failure on the way judged as well
        middle = (least + most) // 2
        done = shell_limits(middle, *verb.split())
        if done.returncode == 0:
            most = middle
            continue
        least = middle
        lines = done.stderr.splitlines()
        assert done.returncode == 1, (middle, done)
        assert lines[-1].startswith("toolchain: "), (middle, done)
        assert not any(line.startswith("Traceback") for line in lines), (middle, done)


def test_too_few_threads_are_said(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in shortage.THREADS:
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(shortage, "_startable", lambda most: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    answer = command("models")
    assert answer.code == 0
    assert answer.err == (
        "toolchain: there are too few threads for all cores (`ulimit -u` or the container sets how many), so every library runs in one\n"
    )


def test_an_error_of_ours_stays_what_it_is(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object, **__: object) -> None:
        try:
            raise MemoryError
        except MemoryError as error:
            raise ToolchainError("learning ran out of memory ('run' holds 4 of 6 updates: --resume goes on from there)") from error

    monkeypatch.setattr(toolchain, "inspect", short)
    answer = command("inspect", "x")
    assert (answer.code, answer.err) == (
        1,
        "toolchain: learning ran out of memory ('run' holds 4 of 6 updates: --resume goes on from there)\n",
    )
