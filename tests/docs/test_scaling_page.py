"""What docs/scaling.md says of commands, numbers of shards and seconds is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from toolchain import crews, partial, seen, shards
from toolchain.targets.lava_sim import LAVA_SIM

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.lava
@pytest.mark.skipif(LAVA_SIM.available() is not None or find_spec("joblib") is None, reason="Lava or joblib is not installed")
def test_the_command_of_the_page_runs(tmp_path: Path) -> None:
    (line,) = (
        line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines() if line.startswith("toolchain")
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "toolchain", *line.split()[1:]]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 jobs shared the samples" in done.stdout


def test_the_page_has_the_numbers_of_the_code() -> None:
    assert f"shards of {shards.FEWEST} to {shards.MOST}" in PAGE
    assert f"the same shard fails {shards.RETRIES + 1} times" in PAGE
    assert shards.SHARDS_EACH == 4
    assert "about four" in PAGE
    assert shards.IDLE == 60
    assert "after a minute" in PAGE
    assert f"for {crews.GONE:g} s" in PAGE
    assert crews.INSTALL in PAGE
    assert f"at least {partial.EVERY:g} s apart" in PAGE
    assert f"more than {100 * partial.SHARE:g} % of the time, at most {partial.LATEST:g} s" in PAGE
    assert f"as many batches as a second takes, up to {seen.CHUNK} samples" in PAGE
    assert seen.STEP == 1
    assert f"for {partial.KEPT // 86_400} days" in PAGE
