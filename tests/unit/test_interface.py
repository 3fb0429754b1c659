"""The public interface: what is documented exists, nothing else is exported, nothing changes unseen, and the documents use nothing else."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typing_extensions import deprecated

import toolchain

ROOT = Path(__file__).resolve().parents[2]
GOING = r"deprecated since \d+\.\d+, gone in \d+\.\d+: use .+"


def _interface() -> ModuleType:
    spec = spec_from_file_location("interface", ROOT / "docs" / "hooks" / "interface.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


interface = _interface()


def _needs(module: str) -> None:
    for package in interface.OPTIONAL.get(module, ()):
        pytest.importorskip(package, reason=f"{package} is not installed")


def test_the_list_is_what_the_code_says() -> None:
    for module in interface.OPTIONAL:
        _needs(module)
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "hooks" / "interface.py"], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == (ROOT / "docs" / "interface.txt").read_text(), (
        "the public interface changed: write docs/interface.txt anew (see docs/hooks/interface.py), say it in CHANGELOG.md, "
        "and deprecate first what is taken away (docs/versions.md)"
    )


@pytest.mark.parametrize("module", interface.modules())
def test_every_name_exists_and_says_what_it_is(module: str) -> None:
    _needs(module)
    found = import_module(module)
    assert len(set(found.__all__)) == len(found.__all__)
    for name in interface.names(module):
        thing = getattr(found, name)
        if interface.is_function(thing) or (interface.is_class(thing) and thing.__module__.startswith("toolchain")):
            assert inspect.getdoc(thing), f"{module}.{name}"
            if not (inspect.isclass(thing) and issubclass(thing, Exception)):
                assert thing.__doc__, f"{module}.{name}"
                assert not thing.__doc__.startswith(f"{thing.__name__}("), f"{module}.{name}: dataclass's own words"


def _exporting() -> Iterator[str]:
    for top in ("toolchain", "targets", "models"):
        for path in sorted((ROOT / top).rglob("*.py")):
            if any(part.is_symlink() for part in path.parents if part != ROOT):
                continue
            if any(
                isinstance(target, ast.Name) and target.id == "__all__"
                for node in ast.parse(path.read_text("utf-8")).body
                if isinstance(node, ast.Assign)
                for target in node.targets
            ):
                parts = path.relative_to(ROOT).with_suffix("").parts
                parts = parts if top == "toolchain" else ("toolchain", *parts)
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_other_module_exports() -> None:
    assert sorted(_exporting()) == sorted(interface.modules())


def test_a_star_import_takes_the_public_names_alone() -> None:
    taken: dict[str, Any] = {}
    exec("from toolchain import *", taken)
    assert taken.keys() - {"__builtins__"} == set(toolchain.__all__)


def _shown() -> Iterator[tuple[str, str]]:
    """Python that a person copies: examples, the notebook's cells, and the blocks of the documents."""
    for path in sorted((ROOT / "examples").glob("*.py")):
        yield path.name, path.read_text("utf-8")
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        for number, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                yield f"{path.name}, cell {number}", "".join(cell["source"])
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "models").glob("*.md"))):
        for number, block in enumerate(re.findall(r"^```python\b[^\n]*\n(.*?)^```", path.read_text("utf-8"), re.M | re.S)):
            yield f"{path.name}, block {number}", block


def test_what_people_copy_uses_the_public_interface_alone() -> None:
    public = set(interface.modules())
    wrong, seen = [], 0
    for where, code in _shown():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "toolchain":
                for alias in node.names:
                    seen += 1
                    path = f"{node.module}.{alias.name}"
                    if path not in public and not (node.module in public and alias.name in import_module(node.module).__all__):
                        wrong.append(f"{where}: {path}")
            if isinstance(node, ast.Import):
                wrong += [f"{where}: {a.name}" for a in node.names if a.name.startswith("toolchain.") and a.name not in public]
    assert wrong == []
    assert seen > 20


def test_the_version_is_semantic_and_the_same_everywhere() -> None:
    assert re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?", toolchain.__version__)
    assert version("fsnn-toolchain") == toolchain.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest[1] == toolchain.__version__


@pytest.mark.parametrize("module", interface.modules())
def test_what_is_deprecated_says_since_when_until_when_and_what_instead(module: str) -> None:
    _needs(module)
    for name in interface.names(module):
        text = getattr(getattr(import_module(module), name), "__deprecated__", None)
        if text is not None:
            assert re.fullmatch(GOING, text), f"{module}.{name}: {text}"
            gone = re.search(r"gone in (\d+)\.(\d+)", text)
            assert gone is not None
            assert tuple(map(int, gone.groups())) > tuple(map(int, toolchain.__version__.split(".")[:2])), f"{module}.{name} should be gone"


def test_a_deprecated_function_warns_and_is_listed_as_such() -> None:
    @deprecated("deprecated since 0.2, gone in 0.3: use toolchain.verify")
    def check(model: str) -> int:
        return len(model)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert check("four") == 4
    assert [(w.category, str(w.message)) for w in said] == [(DeprecationWarning, "deprecated since 0.2, gone in 0.3: use toolchain.verify")]
    assert list(interface._described("toolchain.check", check)) == [
        "def toolchain.check(model: str) -> int (deprecated since 0.2, gone in 0.3: use toolchain.verify)"
    ]


def test_what_a_constructor_takes_is_listed() -> None:
    class Gain:
        def __init__(self, start: float = 0.0) -> None:
            self.start = start

    assert list(interface._described("toolchain.Gain", Gain)) == ["class toolchain.Gain", "    def __init__(start: float = 0.0)"]


def test_optional_modules_are_there_or_say_what_to_install() -> None:
    for module, packages in interface.OPTIONAL.items():
        assert find_spec(module) is not None
        assert packages
