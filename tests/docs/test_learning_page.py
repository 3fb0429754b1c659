"""What docs/learning.md shows and says of settings is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from toolchain.lesson import Rule

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "learning.md").read_text()


@pytest.mark.lava
def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command in "".join(blocks).splitlines():
        few = ["--samples", "20"] + (["--epochs", "1"] if " learn " in command else [])
        words = [sys.executable, "-m", "toolchain", *command.split()[1:], *few]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, (command, done.stderr)
    assert sorted(path.name for path in (tmp_path / "runs" / "on-chip").iterdir()) == ["last.safetensors", "learned.fsnn", "metrics.jsonl"]


def test_every_setting_and_its_default_are_listed() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    listed = re.findall(r"`([a-z_]+)` \(([^)]*)\)|`([a-z_]+)` \|", "\n".join(row.split(" | ")[0] + " |" for row in rows))
    names = {first or bare for first, _, bare in listed}
    assert names == set(Rule.__dataclass_fields__)
    told = {first: default.strip("`") for first, default, _ in listed if first}
    assert (told["lr"], told["schedule"], told["reach"]) == (str(Rule.lr), Rule.schedule, str(Rule.reach))
