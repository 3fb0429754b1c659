"""No file can run code: nothing here unpickles, evaluates, imports or unpacks what a file says. Each place that comes near it is listed with its reason.

What a command does with a file that tries is watched in tests/hostile.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("toolchain", "targets", "models", "benchmarks", "examples", "fuzz")

PICKLES = {"pickle", "_pickle", "cPickle", "pickletools", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "copyreg", "dbm"}
LOADERS = {"runpy", "imp", "code", "codeop", "zipimport", "pkgutil", "pty"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
ALWAYS = {
    "os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "os.execl", "os.spawnl", "os.spawnv", "os.posix_spawn",
    "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all", "yaml.load_all",
    "torch.hub.load", "torch.jit.load", "torch.package", "joblib.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "numpy.fromregex", "pandas.read_pickle",
    "shutil.unpack_archive", "importlib.metadata.entry_points", "ctypes.CDLL", "importlib.import_module", "import_module",
}  # fmt: skip
METHODS = {"extractall", "extract", "find_class", "exec_module", "load_module", "spec_from_file_location"}

EXCEPTIONS = {
    ("toolchain/__init__.py", "import_module of a name"): "the public names' own modules, from a table in that file",
    ("toolchain/exchange/packages.py", "import_module of a name"): "the libraries of a format, named where it is called",
    ("toolchain/methods/__init__.py", "import_module of a name"): "the methods' own modules, from a table in that file",
    ("models/__init__.py", "import_module of a name"): "the catalogue's own modules, from a table in that file",
    ("targets/__init__.py", "import_module of a name"): "the targets' own modules, from a table in that file",
    ("toolchain/native/__init__.py", "ctypes.CDLL"): "the kernel that the installation built, in the package's own folder",
    ("targets/lava_sim/runtime.py", "ctypes.CDLL"): "the library of semaphores that Python's own module has loaded",
    ("benchmarks/endurance.py", "ctypes.CDLL"): "the C library of the process itself",
    ("benchmarks/load.py", "ctypes.CDLL"): "the C library of the process itself",
    ("fuzz/data.py", "import pickle"): "writes pickles for the reader of CIFAR to refuse; loading one would be listed by itself",
    ("toolchain/target.py", "importlib.metadata.entry_points"): "targets of other packages that somebody installed here",
}


def scanned() -> Iterator[tuple[str, ast.Module]]:
    """Every source file of ours, once: two of the folders are also seen inside `toolchain`."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if not name.startswith(("toolchain/models/", "toolchain/targets/")):
                yield name, ast.parse(path.read_text(), name)


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`np.load` as numpy.load: a name as its import says it, "" for what is no plain name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        left = dotted(node.value, names)
        return f"{left}.{node.attr}" if left else ""
    return ""


def imported(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                (alias.asname or alias.name.partition(".")[0]): (alias.name if alias.asname else alias.name.partition(".")[0])
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            found |= {(alias.asname or alias.name): f"{node.module}.{alias.name}" for alias in node.names}
    return found


def told(call: ast.Call, keyword: str) -> object:
    """The constant that a call gives for a keyword, None where it gives none."""
    return next((k.value.value for k in call.keywords if k.arg == keyword and isinstance(k.value, ast.Constant)), None)


def _of_import(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    for module in modules:
        if module.partition(".")[0] in PICKLES | LOADERS:
            yield f"import {module}"


def _of_call(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    called = dotted(call.func, names)
    last = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if isinstance(call.func, ast.Name) and called in BUILTINS:
        yield called
    elif called in ("importlib.import_module", "import_module"):
        if not (call.args and isinstance(call.args[0], ast.Constant)):
            yield "import_module of a name"
    elif called in ALWAYS:
        yield called
    elif called == "torch.load" and told(call, "weights_only") is not True:
        yield "torch.load without weights_only=True"
    elif called == "numpy.load" and told(call, "allow_pickle") is not False:
        yield "numpy.load without allow_pickle=False"
    elif called == "yaml.load" and "_loader()" not in ast.unparse(call):
        yield "yaml.load without the loader of toolchain.config"
    elif last in METHODS and not called.startswith("re."):
        yield f".{last}()"
    if told(call, "shell") not in (None, False) or told(call, "allow_pickle") is True:
        yield "shell=True or allow_pickle=True"


def near_code(tree: ast.Module) -> set[str]:
    """What in a source file could run what another file says."""
    names, found = imported(tree), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update(_of_import(node))
        elif isinstance(node, ast.Call):
            found.update(_of_call(node, names))
    return found


def test_no_source_runs_what_a_file_says() -> None:
    found = {(name, what) for name, tree in scanned() for what in near_code(tree)}
    assert found == set(EXCEPTIONS)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "import pickle"),
        ("from dill import load", "import dill"),
        ("eval('1')", "eval"),
        ("import os\nos.system('true')", "os.system"),
        ("from os import system as s\ns('true')", "os.system"),
        ("import torch\ntorch.load('x')", "torch.load without weights_only=True"),
        ("import torch\ntorch.load('x', weights_only=False)", "torch.load without weights_only=True"),
        ("import numpy as np\nnp.load('x')", "numpy.load without allow_pickle=False"),
        ("import yaml\nyaml.load('x', Loader=yaml.Loader)", "yaml.load without the loader of toolchain.config"),
        ("import subprocess\nsubprocess.run('x', shell=True)", "shell=True or allow_pickle=True"),
        ("import tarfile\ntarfile.open('x').extractall()", ".extractall()"),
        ("from importlib import import_module\nimport_module(name)", "import_module of a name"),
    ],
)
def test_the_scan_sees(source: str, what: str) -> None:
    assert near_code(ast.parse(source)) == {what}


def test_the_scan_lets_through_what_is_bounded() -> None:
    source = """
        import re, torch, numpy as np
        torch.load("x", weights_only=True)
        np.load("x", allow_pickle=False)
        re.compile("x")
        model.eval()
    """
    assert near_code(ast.parse(textwrap.dedent(source))) == set()
