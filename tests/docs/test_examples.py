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
from msgspec.structs import replace

import toolchain
from toolchain import artifact, cli

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {
    "own_network.py": [],
    "compare_targets.py": ["10"],
    "feedback_gradient.py": [],
    "import_relu.py": [],
    "learn_on_target.py": ["1"],
    "train_and_deploy.py": [],
}
README = (ROOT / "README.md").read_text()


def run(*words: str, code: int = 0) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=250, env=environment, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout
    return done.stdout


def test_every_example_is_tested():
    others = {"digits.yaml", "tutorial.ipynb", "verify_in_ci.sh"}
    assert {path.name for path in (ROOT / "examples").iterdir() if path.is_file()} == EXAMPLES.keys() | others


def test_every_example_is_on_its_page():
    page = (ROOT / "docs" / "examples.md").read_text()
    links = re.findall(r"\]\(\.\./examples/([^)]+)\)", page)
    assert sorted(links) == sorted(path.name for path in (ROOT / "examples").iterdir() if path.is_file())


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path):
    run(str(ROOT / "examples" / name), *(EXAMPLES[name] or ([str(tmp_path)] if name == "train_and_deploy.py" else [])))


def gate(artefact: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """The gate's script, with this Python's toolchain as `toolchain`."""
    command = tmp_path / "toolchain"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m toolchain "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["sh", str(ROOT / "examples" / "verify_in_ci.sh"), str(artefact)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_gate_opens_for_a_whole_artefact_and_not_for_one_with_a_changed_weight(tmp_path):
    made = toolchain.compile("digits-fc", target="sim").artifact
    artifact.write(made, tmp_path / "whole.fsnn")
    weights = made.graph.tensors["feedback.0.weight"].copy()
    weights[0, 0] += 1 if weights[0, 0] < 127 else -1
    graph = replace(made.graph, tensors={**made.graph.tensors, "feedback.0.weight": weights})
    artifact.write(replace(made, graph=graph), tmp_path / "changed.fsnn")
    assert gate(tmp_path / "whole.fsnn", tmp_path).returncode == 0
    refused = gate(tmp_path / "changed.fsnn", tmp_path)
    assert refused.returncode == 4, refused.stderr
    assert "first difference" in refused.stdout


@pytest.mark.filterwarnings("default")  # jupyter_client's and its event loop's own
def test_the_notebook_runs_and_is_kept_without_output(monkeypatch, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "tutorial.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in cells if cell.outputs or cell.execution_count] == []
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1


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
