"""The import rule of the house, read from the source: who may import whom, what is heavy, which words are not ours."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A module imports from its own rank or below; `torch` marks the torch side, which imports nothing else of ours but what is named there.
RANKS = [
    {"errors"},
    {"ir", "native", "network", "files", "endings", "versions", "children", "apart", "shortage"},
    {"notation"},
    {"fixed", "limits", "metrics", "progress", "processes", "devices", "config", "data", "augment", "wiring", "planning", "shards"},
    {"artifact", "passes", "utilisation"},
    {"describe", "drawing"},
    {"process_drawing"},
    {"target"},
    {"codec", "crews", "partial"},
    {"probing", "seen"},
    {"coverage", "differences"},
    {"plasticity"},
    {"targets"},
    {"analysis"},
    {"layers", "methods", "lower"},
    {"checkpoint"},
    {"models", "batches", "optimizer"},
    {"train"},
    {"source"},
    {"compiler", "inspection", "questions"},
    {"module_run"},
    {"deploy"},
    {"lesson"},
    {"feedback", "learn"},
    {"comparison", "report", "sweep", "estimation"},
    {"compare", "verify", "tune", "exchange", "estimate", "tradeoff"},
    {"doctor"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
TORCH_SIDE = {"layers", "methods", "models", "lower"}
TORCH_SIDE_MAY = TORCH_SIDE | {"errors", "ir", "native", "network", "config", "augment", "checkpoint", "processes"}
LIGHT = (
    "errors",
    "ir",
    "fixed",
    "limits",
    "passes",
    "artifact",
    "target",
    "codec",
    "targets",
    "targets.reference",
    "analysis",
    "native",
    "network",
    "config",
    "data",
    "augment",
    "cli",
    "doctor",
    "progress",
    "shards",
    "crews",
    "partial",
    "seen",
    "versions",
)
HEAVY = ("torch", "lava", "matplotlib", "rich", "scipy", "safetensors.torch", "torchvision")
BANNED = ("backend", "engine", "manager", "helper", "util", "utils", "handler")


def sources() -> list[Path]:
    """Every module of ours, each once (not again through the symlinks)."""
    own = [path for path in (ROOT / "toolchain").rglob("*.py") if not any(part.is_symlink() for part in path.parents)]
    return sorted([*own, *(ROOT / "targets").rglob("*.py"), *(ROOT / "models").rglob("*.py")])


def part_of(path: Path) -> str:
    """The part of the house a file belongs to: toolchain/passes/fold.py is of `passes`, targets/sim.py of `targets`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "toolchain" else parts[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of what runs as an import, at the top or in a function; imports for type checkers only do not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imported(node)


def parts_imported(path: Path) -> set[str]:
    names = (name.split(".") for name in imported(ast.parse(path.read_text())))
    return {name[1] for name in names if name[0] == "toolchain" and len(name) > 1}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    part = part_of(path)
    if part == "__init__":
        assert list(imported(ast.parse(path.read_text()))) == [
            "__future__.annotations",
            "sys",
            "importlib.import_module",
            "types.ModuleType",
            "typing.TYPE_CHECKING",
        ]
        return
    assert part in RANK, f"give '{part}' its place in RANKS"
    found = parts_imported(path) & RANK.keys()
    # found by name at run time: the registry lists what is above it
    found -= {"targets"} if part == "target" else set()
    assert {name for name in found if RANK[name] > RANK[part]} == set()
    if part in TORCH_SIDE:
        assert found <= TORCH_SIDE_MAY


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_absolute_imports_and_never_the_bare_folders(path):
    tree = ast.parse(path.read_text())
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level] == []
    assert {name.split(".")[0] for name in imported(tree)} & {"targets", "models", "tests"} == set()


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_nothing_heavy(name):
    code = f"import sys, toolchain.{name}\nfound = [h for h in {HEAVY!r} if h in sys.modules]\nassert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_names_use_the_words_of_the_field(path):
    tree = ast.parse(path.read_text())
    names = {path.stem}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    words = {word.lower() for name in names for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}
    assert words & set(BANNED) == set()
