"""The house itself: what is packaged, what is pinned, and what the Makefile offers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def test_every_package_folder_is_packaged():
    folders = {path.parent.relative_to(ROOT) for top in ("targets", "models") for path in (ROOT / top).rglob("*.py")}
    folders |= {path.parent.relative_to(ROOT) for path in (ROOT / "toolchain").rglob("*.py")}
    names = {".".join(folder.parts if folder.parts[0] == "toolchain" else ("toolchain", *folder.parts)) for folder in folders}
    assert names | {"toolchain.targets.limits"} == set(SETUPTOOLS["packages"])


def test_every_data_file_is_packaged():
    carried = set()
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT / "toolchain" / Path(*package.split(".")[1:])
        carried |= {path.resolve() for pattern in patterns for path in folder.glob(pattern)}
    tops = [ROOT / "targets", ROOT / "models", *(p for p in (ROOT / "toolchain").iterdir() if not p.is_symlink())]
    files = {path for top in tops for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()}
    files = {path for path in files if path.suffix not in (".py", ".pyc", ".so")}  # .so: built in place
    assert {str(path.relative_to(ROOT)) for path in files - carried} == set()


@pytest.mark.parametrize("name", ["targets", "models"])
def test_the_symlinks_show_the_same_tree(name):
    assert os.readlink(ROOT / "toolchain" / name) == f"../{name}"


@pytest.mark.parametrize("path", sorted((ROOT / "constraints").glob("*.txt")), ids=lambda path: path.name)
def test_constraints_are_names_and_versions_only(path):
    assert [line for line in pins(path) if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*", line)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "constraints").glob("py3*.txt")), ids=lambda path: path.name)
def test_constraints_pin_every_dependency(path):
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [Requirement(line) for line in (*PROJECT["project"]["dependencies"], *extras["dev"], *extras["lava"])]
    python = {"python_version": f"3.{path.stem.removeprefix('py3')}"}
    names = {canonical(requirement.name) for requirement in wanted if requirement.marker is None or requirement.marker.evaluate(python)}
    assert names - {canonical(line.partition("==")[0]) for line in pins(path)} == set()


def test_there_are_constraints_for_every_python_and_the_other_simulators():
    pythons = {f"py{version}.txt" for version in (310, 311, 312, 313)}
    assert {path.name for path in (ROOT / "constraints").iterdir()} == {
        *pythons,
        "oldest.txt",
        "peers.txt",
        "audit.txt",
        "accepted.toml",
        "build.txt",
    }


def test_the_oldest_versions_are_those_that_are_declared():
    held = dict(line.split("==") for line in pins(ROOT / "constraints" / "oldest.txt"))
    held = {canonical(name): Version(version) for name, version in held.items()}
    for requirement in map(Requirement, PROJECT["project"]["dependencies"]):
        (lowest,) = requirement.specifier
        assert (lowest.operator, Version(lowest.version)) == (">=", held[canonical(requirement.name)]), requirement


# a torch for CPUs asks for no CUDA; older pips and Pythons bring these two themselves
CUDA = re.compile(r"nvidia-|cuda-|triton$")
BOOTSTRAP = {"pip", "setuptools", "wheel", "fsnn-toolchain"}


@pytest.mark.skipif(Path(sys.prefix).parent != ROOT, reason="not an environment that make built")
def test_what_is_installed_is_what_is_pinned():
    """Every package of this environment at its pinned version, and no pin that nothing installs."""
    name = "oldest" if Path(sys.prefix).name == ".venv-oldest" else f"py3{sys.version_info.minor}"
    held = {canonical(package): version for package, version in (line.split("==") for line in pins(ROOT / "constraints" / f"{name}.txt"))}
    paths = [path for path in sys.path if Path(path).is_relative_to(sys.prefix)]  # Lava's own folders are none of packages
    here = {canonical(found.name): found.version.partition("+")[0] for found in distributions(path=paths)}
    unlike = {package: version for package, version in here.items() if package not in BOOTSTRAP and held.get(package) != version}
    assert unlike == {}, f"not as constraints/{name}.txt has them: remove {Path(sys.prefix).name} and run make again, or pin them"
    assert {package for package in held.keys() - here.keys() - BOOTSTRAP if not CUDA.match(package)} == set(), (
        "pinned, and installed by nothing"
    )


def test_make_without_a_goal_lists_every_goal():
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    listed = re.findall(r"^  make ([a-z0-9-]+) +\S", done.stdout, re.M)
    benchmarks = [
        "bench",
        "bench-lava",
        "bench-spide",
        "bench-scale",
        "bench-gradient",
        "bench-saf",
        "bench-quantization",
        "bench-budget",
        "bench-learning",
        "bench-netx",
    ]
    assert listed == [
        "help",
        "demo",
        "test",
        "test-slow",
        "test-core",
        "test-oldest",
        "test-312",
        "test-newest",
        "lint",
        "types",
        "audit",
        "docs",
        "sanitize",
        "fuzz",
        "package",
        "endurance",
        "endurance-deploy",
        "endurance-training",
        "load",
        "peers",
        *benchmarks,
    ]


@pytest.fixture
def pythons(tmp_path):
    """A folder of stand-ins: `pythons({"python3": "3.12", "python3.10": None})`, None for one that fails as a shim does."""

    def make(versions):
        for name, version in versions.items():
            script = tmp_path / name
            script.write_text(f"#!/bin/sh\necho {version}\n" if version else "#!/bin/sh\necho not here >&2; exit 127\n")
            script.chmod(0o755)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("here", "asked", "found"),
    [
        ({"python3": "3.10", "python3.10": "3.10"}, ["3.10"], "python3"),
        ({"python3": "3.12", "python3.10": "3.10"}, ["3.10"], "python3.10"),
        ({"python3": "3.12", "python3.10": None}, ["3.10"], None),
        ({"python3": None, "python3.11": "3.11", "python3.13": "3.13"}, ["3.13", "3.12", "3.11"], "python3.13"),
        ({"python3": "3.9"}, ["3.13", "3.12", "3.11"], None),
    ],
)
def test_find_python_runs_each_candidate(pythons, here, asked, found):
    folder = pythons(here)
    environment = {"PATH": f"{folder}:/nowhere", "HOME": str(folder), "PYENV_ROOT": str(folder)}
    done = subprocess.run(
        ["/bin/sh", str(ROOT / ".ci" / "find-python"), *asked], env=environment, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.stdout.strip() == ("" if found is None else str(folder / found))
    assert done.returncode == (1 if found is None else 0)


@pytest.mark.parametrize(("kind", "version"), [("oldest", "3.10"), ("312", "3.12"), ("newest", "3.13")])
def test_an_environment_whose_python_is_missing_is_one_sentence(kind, version, pythons, tmp_path):
    folder = pythons({"python3": "3.9"})
    (folder / "dirname").symlink_to(shutil.which("dirname"))
    command = ["/bin/sh", str(ROOT / ".ci" / "make-venv"), kind, str(tmp_path / "made")]
    environment = {"PATH": str(folder), "HOME": str(folder), "PYENV_ROOT": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)
    said = f"fsnn-toolchain: found no Python here that {tmp_path / 'made'} can be made with: install python{version} with its venv module, or uv, and run make again\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert not (tmp_path / "made").exists()
