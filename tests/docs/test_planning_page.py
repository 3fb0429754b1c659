"""What docs/planning.md says of commands, limits and small networks is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import toolchain
from toolchain import limits
from toolchain.utilisation import utilisation

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "planning.md").read_text()


def row(first: str) -> list[str]:
    (found,) = (line for line in PAGE.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in found.strip("|").split("|")][1:]


def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command in block.splitlines():
        words = [sys.executable, "-m", "toolchain", *command.split()[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, (command, done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chips.svg", "digits-loihi1.fsnn", "digits-whole.fsnn"]


@pytest.mark.parametrize(("column", "chip"), [(0, "loihi1"), (1, "loihi2")])
def test_the_limits_are_those_of_the_files(column: int, chip: str) -> None:
    found = limits.load(chip)
    for name, value in (("neurons", found.neurons_per_core), ("input axons", found.input_axons)):
        assert row(f"{name} a core")[column].startswith(f"{value.value:,}")
    assert row("cores a chip")[column].startswith(f"{found.cores_per_chip.value}")
    assert row("memory a core")[column].startswith(f"{found.core_memory_bits.value // 8192} KB")
    assert ("binary" in row("spikes")[column]) == (found.graded_spike_bits.value == 0)


@pytest.mark.parametrize("name", ["mnist-fc", "mnist-conv"])
def test_small_networks_take_what_the_page_says(name: str) -> None:
    told = utilisation(toolchain.compile(name, target="sim").graph).to_json()["totals"]
    _, neurons, cores, chips, axons = row(name)
    assert [told["neurons"], told["cores"], told["chips"], told["axons_between_chips"]] == [
        int(cell.replace(",", "")) for cell in (neurons, cores, chips, axons)
    ]
