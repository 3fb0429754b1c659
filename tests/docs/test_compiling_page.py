"""Every command of docs/compiling.md runs, and the page names every stage, every entry of the JSON and nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import toolchain
from toolchain.passes import LOIHI_PIPELINE

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "compiling.md").read_text()


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def named(table: str) -> set[str]:
    """The names in the first column of a table."""
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    commands = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
    assert len(commands) == 4
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = []
    for command in commands:
        words = [sys.executable, "-m", "toolchain", *command.split()[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, (command, done.stderr)
        said.append(done.stdout)
    assert said[0].startswith("after adjoint:\n")
    assert "processes, one a population and one a synapse" in said[1]
    assert "conv 5x5" in said[2]
    assert json.loads(said[3])["stage"] == LOIHI_PIPELINE.passes[-1].name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.fsnn", "digits.svg"]


def test_every_stage_is_explained() -> None:
    assert named(section("The pipeline")) >= {"lower", *(p.name for p in LOIHI_PIPELINE.passes)}


def test_every_entry_of_the_json_is_explained() -> None:
    made = toolchain.compile("digits-fc", target="sim", dump_after="lower").to_json()
    found = toolchain.inspect("digits-fc", processes=True, analysis=True).to_json()
    explained = named(section("JSON"))
    assert {name for name in explained if "[" not in name} == made.keys() | found.keys()
    nested = {name.removeprefix("phases[].") for name in explained if "[" in name}
    phase = found["phases"][0]
    text = section("JSON").replace("[].", "` `")
    assert {name for name in phase if isinstance(phase[name], (list, dict)) and name != "order"} == nested
    for entry in (
        phase["synapses"][0],
        next(iter(phase["dynamics"].values())),
        phase["bias"][0],
        phase["drive"][0],
        found["populations"][0],
    ):
        assert [name for name in entry if f"`{name}`" not in text] == []
