"""What docs/verify.md says of commands, coverage and planted faults is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import toolchain
from toolchain import probing
from toolchain.verify import FEEDBACK_SAMPLES, FEWEST_PROBES, FORWARD_SAMPLES, PROBES, PROBES_WORK

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "verify.md").read_text()


def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command in [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]:
        words = [sys.executable, "-m", "toolchain", *command.split()[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.parametrize(("name", "dataset"), [("digits-fc", "digits"), ("mnist-fc", "mnist-1k")])
def test_the_coverage_table_is_what_verify_says(name: str, dataset: str) -> None:
    (row,) = (line for line in PAGE.splitlines() if line.startswith((f"| {name} |", f"| {name},")) and "%" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
    found = toolchain.verify(name, targets=("reference", "sim"), dataset=dataset)
    assert found.passed
    assert cells[0] == f"{found.coverage.total('images')[1]:,}"
    for cell, stage in zip(cells[1:], ("images", "probes", "variants"), strict=True):
        exercised, of = found.coverage.total(stage)
        assert cell == ("100 %" if exercised == of else f"{100 * exercised / of:.2f} %")


def test_the_defaults_are_the_codes() -> None:
    assert f"| images | {FORWARD_SAMPLES} forward, {FEEDBACK_SAMPLES} of them in the feedback phase" in PAGE
    above, least = (PROBES_WORK // PROBES).bit_length() - 1, FEWEST_PROBES
    assert f"| probes | {PROBES}, of networks above 2^{above} products a sample fewer (at least {least};" in PAGE
    assert f"up to {probing.SAMPLES} where the network is small" in PAGE
    assert f"in at most {probing.VARIANT_STEPS} steps a phase" in PAGE
    assert f"by up to {probing.ROUNDS} corrections" in PAGE


def test_every_kind_of_fault_has_its_row() -> None:
    tests = (ROOT / "tests" / "unit" / "test_verify_faults.py").read_text()
    kinds = re.search(r"KINDS = \{(.*?)\}", tests, re.S)
    assert kinds is not None
    for word in re.findall(r'"(\w+)":', kinds.group(1)):
        assert re.search(rf"^\| [^|]*{word}[^|]*\|[^|]*\| 50 of 50 \|$", PAGE, re.M), word
    assert "TRIALS = 50" in tests
