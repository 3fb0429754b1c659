"""What docs/targets/lava-sim.md shows runs, and what it says of limits is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "targets" / "lava-sim.md").read_text()


@pytest.mark.lava
def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command in block.splitlines():
        words = [sys.executable, "-m", "toolchain", *command.split()[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, (command, done.stderr)
    assert (tmp_path / "processes.svg").read_text().startswith("<?xml")


def test_the_limits_of_stock_synapses_are_those_of_the_code() -> None:
    from toolchain.targets.lava_sim import stock
    from toolchain.targets.lava_sim.compile import AUTO_BATCH

    assert f"{AUTO_BATCH} by default" in PAGE
    assert int(re.search(r"delays above\s+(\d+) ticks", PAGE)[1]) == stock.DELAY_LIMIT
    assert 2 ** int(re.search(r"matrices beyond 2\^(\d+) weights", PAGE)[1]) == stock.MATRIX_LIMIT


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_no_page_waits_for_its_numbers(page: Path) -> None:
    assert not re.findall(r"^[A-Z_]{4,}$", page.read_text(), re.M)
