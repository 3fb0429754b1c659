"""docs/dependencies.md lists what pyproject.toml declares and what is installed, with the licences that the packages state; and the code imports nothing else."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PAGE = (ROOT / "docs" / "dependencies.md").read_text()

FAMILIES = {
    "Apache": "Apache",
    "BSD": "BSD",
    "GNU Lesser": "LGPL",
    "GPL-3": "GPL-3",
    "HPND": "MIT-CMU",
    "Historical Permission": "MIT-CMU",
    "ISC": "ISC",
    "MIT": "MIT",
    "MPL": "MPL",
    "Mozilla": "MPL",
    "NVIDIA": "LicenseRef-NVIDIA",
    "PSF": "PSF",
    "Python Software Foundation": "PSF",
}
"""What packages write, and what the SPDX identifier on the page starts with. Pillow's licence has been called by both names."""


def rows(heading: str) -> list[list[str]]:
    """The cells of the one table below a heading."""
    section = re.split(r"^#+ ", PAGE.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.M)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


CORE = {row[0]: row for row in rows("The core")}
BROUGHT = {row[0]: row for row in rows("What these bring in turn")}
OPTIONAL = {row[1]: row for row in rows("Optional")}
DEVELOPMENT = {row[0]: row for row in rows("For development")}
LICENCES = {
    **{name: row[2] for name, row in CORE.items()},
    **{name: row[2] for name, row in BROUGHT.items() if name != "nvidia-*"},
    **{name: row[2] for name, row in OPTIONAL.items()},
    **{name: row[1] for name, row in DEVELOPMENT.items()},
}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(file: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / file).read_text().splitlines()
    return {canonical(name): version for name, version in (line.split("==") for line in lines if line and not line.startswith("#"))}


def test_the_core_is_what_is_declared_with_its_lowest_versions():
    declared = {canonical(found.name): str(found.specifier) for found in map(Requirement, PROJECT["dependencies"])}
    assert {name: f">={row[1]}" for name, row in CORE.items()} == declared


def test_the_optional_packages_are_those_of_the_extras():
    declared = [(extra, canonical(Requirement(line).name)) for extra, lines in EXTRAS.items() if extra != "dev" for line in lines]
    assert sorted((row[0], row[1]) for row in OPTIONAL.values()) == sorted(declared)
    assert {canonical(Requirement(line).name) for line in EXTRAS["dev"]} == DEVELOPMENT.keys() | (OPTIONAL.keys() - {"lava-nc", "lava-dl"})


def test_everything_that_is_brought_is_listed_and_nothing_that_never_is():
    done = subprocess.run([sys.executable, ROOT / ".ci" / "licences"], capture_output=True, text=True, timeout=60, check=True)
    here = {line.split("\t")[0] for line in done.stdout.splitlines()}
    assert {"numpy", "torch", "pydantic"} <= here
    assert {name for name in here if not name.startswith("nvidia-")} - CORE.keys() - BROUGHT.keys() == set()
    anywhere = {name for file in ("oldest.txt", "py310.txt", "py311.txt", "py313.txt") for name in pinned(file)}
    assert BROUGHT.keys() - anywhere == {"nvidia-*"}


@pytest.mark.parametrize("name", sorted(LICENCES))
def test_a_licence_is_what_the_package_says(name):
    try:
        found = metadata(name)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed here")
    classifiers = [line for line in found.get_all("Classifier") or [] if line.startswith("License ::")]
    stated = " ".join([found.get("License-Expression") or "", (found.get("License") or "").split("\n")[0], *classifiers])
    said = {spdx for words, spdx in FAMILIES.items() if words in stated}
    if name == "cuda-toolkit":
        assert said == set()  # an empty package that names NVIDIA's; it states nothing
        return
    wanted = re.split(" AND | OR ", LICENCES[name])
    agreed = [identifier for identifier in wanted if any(identifier.startswith(family) for family in said)]
    assert agreed == wanted or (agreed and " OR " in LICENCES[name]), f"{name} states: {stated}"
    assert all(any(identifier.startswith(family) for identifier in wanted) for family in said if "GPL" in family), (
        f"{name} states: {stated}"
    )


def test_the_core_and_what_it_brings_is_free_of_the_gpl():
    assert {name for name, licence in LICENCES.items() if "GPL" in licence} == {"sanafe", "lava-nc"}
    assert not {"sanafe", "lava-nc"} & (CORE.keys() | BROUGHT.keys())


IMPORTED = {"PIL": "pillow", "yaml": "pyyaml", "lava": "lava-nc"}
ELSEWHERE = {"scipy": "targets/lava_sim/", "triton": "targets/", "tensorboard": "toolchain/metrics.py"}
"""What is imported and declared nowhere, for the page says with what it comes."""


def test_the_code_imports_what_is_declared_and_nothing_else():
    found: dict[str, set[str]] = {}
    for path in (path for folder in ("toolchain", "targets", "models") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(str(path.resolve().relative_to(ROOT)))
    outside = {name: places for name, places in found.items() if name not in sys.stdlib_module_names and name != "toolchain"}
    for name, places in outside.items():
        if name in ELSEWHERE:
            assert all(place.startswith(ELSEWHERE[name]) for place in places), (name, places)
        else:
            assert IMPORTED.get(name, name) in CORE.keys() | OPTIONAL.keys(), (
                f"{sorted(places)} import {name}, which pyproject.toml does not declare"
            )
    assert {IMPORTED.get(name, name) for name in outside} >= CORE.keys(), "a core dependency that nothing imports"
    assert {place.rpartition("/")[0] for place in outside["sanafe"]} == {"targets/sanafe"}
    assert all(place.startswith("targets/lava_sim/") or place == "toolchain/exchange/lava_dl.py" for place in outside["lava"]), outside[
        "lava"
    ]


def test_the_table_of_versions_is_that_of_the_pins():
    table = rows("Versions")
    assert [row[0] for row in table] == ["oldest.txt", "py310.txt", "py311.txt", "py312.txt", "py313.txt"]
    for file, python, numpy, torch, _ in table:
        assert (pinned(file)["numpy"], pinned(file)["torch"]) == (numpy, torch)
        assert file == "oldest.txt" or file == f"py{python.replace('.', '')}.txt"
    assert {row[1] for row in table} == {line.split(" :: ")[-1] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
