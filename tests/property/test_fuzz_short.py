"""A short form of `make fuzz`, in this process: a few hundred mutated and drawn files through every reader; and whether the campaign would see what it looks for."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from random import Random

import hypothesis
import pytest

from fuzz import table
from fuzz.__main__ import Campaign, main, replay
from fuzz.judge import Judge, unsound
from fuzz.mutate import made
from fuzz.planted import PLANTED
from fuzz.target import Prepared, Target
from toolchain.errors import ToolchainError

NEEDS = {"nir-bytes": ("nir", "nirtorch"), "nir-values": ("nir", "nirtorch"), "onnx": ("onnx", "onnxruntime")}

INPUTS, SECONDS = 150, 0.25
"""Of each target: so many inputs, or as many as it reads in this time."""


@pytest.mark.parametrize("target", table.TARGETS, ids=lambda target: target.name)
def test_every_input_is_read_or_refused_in_one_sentence(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.get(target.name, ()):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prepared = target.prepare(tmp_path)
    judge = Judge(prepared)
    for seed in prepared.seeds:
        assert judge(seed) is None
    assert judge.tally.accepted == len(prepared.seeds)
    until = time.process_time() + SECONDS
    for number in range(INPUTS):
        data = made(prepared, Random(f"short/{target.name}/{number}"))
        assert judge(data) is None, data
        if time.process_time() > until:
            break
    assert judge.tally.refused > 0
    if prepared.drawn is not None:

        @hypothesis.settings(
            max_examples=5, database=None, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
        )
        @hypothesis.given(data=prepared.drawn)
        def each(data: bytes) -> None:
            assert judge(data) is None

        each()


def test_inputs_depend_on_seed_target_and_number_alone(tmp_path: Path) -> None:
    prepared = Prepared([b"model: digits-fc\n" * 5], lambda data: None)
    assert [made(prepared, Random(f"0/x/{n}")) for n in range(50)] == [made(prepared, Random(f"0/x/{n}")) for n in range(50)]
    assert len({made(prepared, Random(f"0/x/{n}")) for n in range(50)}) > 40


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ("", "an empty sentence"),
        ("x" * 3000, "a sentence of 3000 characters"),
        ("one\ntwo", "a sentence of several lines"),
        ("'a' is damaged: restore it", None),
        ("'\x1b[2J' is damaged: restore it", None),  # the command line shows it as an escape
        ("'net' is no plain network:\n- reason\n- reason", None),
    ],
)
def test_what_a_sentence_must_be(message: str, what: str | None) -> None:
    found = unsound(ToolchainError(message))
    assert (found.what if found else None) == what


def test_a_warning_is_seen_where_the_reader_refuses_whatever_a_library_raises() -> None:
    def read(data: bytes) -> None:
        try:
            warnings.warn("it divides by 0", RuntimeWarning, stacklevel=1)
        except Exception as error:
            raise ToolchainError("it is damaged: restore it") from error

    found = Judge(Prepared([], read))(b"")
    assert found is not None
    assert found.what == "RuntimeWarning: 'it divides by 0'"


def test_the_campaign_sees_what_it_looks_for(tmp_path: Path) -> None:
    """As `python -m fuzz` reads, in processes: what crashes, computes without end or swells is found, kept, and gone behind."""
    tried = Campaign([PLANTED], 30, 32, tmp_path)
    tried.run(1)
    (row,) = tried.rows.values()
    assert row.inputs == 30
    assert row.accepted + row.refused + row.findings.total() >= 30
    for what in ("KeyError", "UserWarning", "ended with -N", "took more than N.N s", "MemoryError", "wrote to stderr", "several lines"):
        assert what in tried.text()
    assert {b"raises", b"crashes", b"computes", b"swells"} <= {path.read_bytes() for path in tmp_path.glob("*.input")}


def test_a_campaign_that_is_interrupted_says_so_and_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Campaign, "_piece", interrupted)
    monkeypatch.setattr(sys, "argv", ["fuzz", "--target", table.TARGETS[0].name, "--inputs", "10", "--out", str(tmp_path)])
    assert main() == 130
    assert capsys.readouterr().out.startswith("interrupted: 0 of 10 inputs, 0 findings, seed 0")


def test_a_finding_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.input").write_bytes(b"raises")
    assert replay(PLANTED, tmp_path / "a.input") == 1
    assert "KeyError" in capsys.readouterr().out


def test_what_a_target_changes_for_itself_is_as_before_outside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other readers in this process keep their bounds."""
    pytest.importorskip("nir", reason="nir is not installed")
    pytest.importorskip("nirtorch", reason="nirtorch is not installed")
    from toolchain import apart

    monkeypatch.chdir(tmp_path)
    bounded = apart.run
    prepared = next(target for target in table.TARGETS if target.name == "nir-values").prepare(tmp_path)
    assert apart.run is bounded
    prepared.read(prepared.seeds[0])
    assert apart.run is bounded
