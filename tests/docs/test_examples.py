"""Every example runs, and so does the README's Python; every command it shows exists with its flags."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from toolchain import cli

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {"own_network.py": [], "compare_targets.py": ["10"]}
README = (ROOT / "README.md").read_text()


def run(*words: str, code: int = 0) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=250, env=environment, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout
    return done.stdout


def test_every_example_is_tested():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name):
    run(str(ROOT / "examples" / name), *EXAMPLES[name])


@pytest.mark.lava
def test_the_benchmark_prints_every_row_and_its_ratio():
    few = ("--samples", "16", "--stock-samples", "2", "--images", "3", "--stock-images", "1", "--steps", "2")
    made = run(str(ROOT / "benchmarks" / "lava_sim.py"), *few)
    dense, ring = json.loads(made.splitlines()[-1])["tables"]
    assert [row["samples"] for row in dense["rows"]] == [16, 2, 2, 2]
    assert [(row["samples"], row["batch"]) for row in ring["rows"]] == [(3, 64), (8, 1), (2, 1), (1, 1)]
    assert all(row["samples_per_second"] > 0 for row in (*dense["rows"], *ring["rows"]))
    assert ring["rows"][-1]["ratio_to_full_ring"] == ring["rows"][-2]["ratio_to_sparse_ring"] == 1
    assert all(row["row"] in made for row in ring["rows"])


@pytest.mark.lava
def test_the_learning_benchmark_compares_every_arm(tmp_path):
    picture = tmp_path / "learning.png"
    few = ("--samples", "40", "--test-samples", "20", "--epochs", "1", "--seeds", "1", "--lr", "0.001", "--json", "--picture", str(picture))
    made = json.loads(run(str(ROOT / "benchmarks" / "learning.py"), *few, code=4))  # nobody learns much at that rate
    assert [len(arm["runs"][0]) for arm in made["arms"]] == [2, 2, 2, 2]
    assert made["arms"][1]["runs"][0][0] == pytest.approx(made["arms"][3]["runs"][0][0], abs=0.05)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_config_trains_and_its_run_deploys(tmp_path):
    run("-m", "toolchain", "train", str(ROOT / "examples" / "digits.yaml"), "-o", str(tmp_path / "run"))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["epochs"] == 3
    run("-m", "toolchain", "deploy", str(tmp_path / "run"), "--target", "sim", "--dataset", "digits", "--samples", "20")


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_the_python_of_the_readme_runs(block):
    run("-c", block)


def commands() -> list[str]:
    lines = re.findall(r"^    (toolchain [a-z].*)$", README, re.M)
    return [line.partition("#")[0].strip() for line in lines]


def test_the_readme_shows_every_verb():
    assert {line.split()[1] for line in commands()} == {c.name or c.callback.__name__ for c in cli.app.registered_commands if not c.hidden}


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_readme_exists_with_its_flags(line, monkeypatch, capsys):
    _, verb, *rest = shlex.split(line)
    monkeypatch.setattr(sys, "argv", ["toolchain", verb, "--help"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    text = capsys.readouterr().out
    assert [word for word in rest if word.startswith("-") and f"{word} " not in text] == []


def test_the_readme_shows_what_the_demo_prints_and_a_table_of_accuracies():
    places = {name: re.search(rf"<!-- {name}.*?-->(.*)<!-- /{name} -->", README, re.S) for name in ("demo-output", "demo-table")}
    assert [name for name, found in places.items() if found is None] == []
    assert "accuracy" in places["demo-output"][1]
    assert len(re.findall(r"^\|.*\d.*\|$", places["demo-table"][1], re.M)) >= 2


def test_every_link_of_the_readme_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://")]
    assert links
    assert [path for path in links if not (ROOT / path).exists()] == []


def test_the_readme_says_what_each_file_is():
    table = README.partition("## What each file is")[2].partition("\n## ")[0]
    named = set()
    for row in re.findall(r"^\| (`.*?`) \|", table, re.M):
        first, *others = re.findall(r"`([^`]+)`", row)
        named |= {first.rstrip("/"), *(f"{first.partition('/')[0]}/{other.rstrip('/')}" for other in others)}
    assert [path for path in named if not (ROOT / path).exists()] == []
    parts = [
        path
        for top in ("toolchain", "targets")
        for path in (ROOT / top).iterdir()
        if path.suffix == ".py" or (path.is_dir() and not path.is_symlink())
    ]
    parts = {str(path.relative_to(ROOT)) for path in parts if not path.name.startswith("__")}
    assert parts - named - {"toolchain/samples"} == set()
