"""`toolchain.compare` is the function, whichever was imported first; importing the package costs nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import FunctionType

import pytest

import toolchain

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = [name for name in toolchain.__all__ if name != "__version__"]


def python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_neither_torch_nor_numpy():
    python("import sys, toolchain; assert not {'torch', 'numpy', 'msgspec'} & set(sys.modules)")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_name_is_a_documented_function(name):
    function = getattr(toolchain, name)
    assert isinstance(function, FunctionType)
    assert function.__name__ == name
    assert function.__doc__


@pytest.mark.parametrize("name", ["compare", "doctor", "verify"])
def test_importing_the_module_first_does_not_hide_the_function(name):
    python(f"import toolchain.{name}\nfrom toolchain.{name} import {name} as inner\nimport toolchain\nassert toolchain.{name} is inner")


@pytest.mark.parametrize("name", ["compare", "doctor", "verify"])
def test_importing_the_module_later_does_not_hide_the_function(name):
    python(
        f"import toolchain\nouter = toolchain.{name}\nimport toolchain.{name}\nfrom toolchain.{name} import {name} as inner\nassert outer is inner is toolchain.{name}"
    )


def test_the_module_stays_reachable():
    module = import_module("toolchain.doctor")
    assert module.doctor is toolchain.doctor
    assert module.PACKAGES


def test_other_submodules_are_bound_as_always():
    import toolchain.errors

    assert toolchain.errors is sys.modules["toolchain.errors"]


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = toolchain.nonsense


def test_dir_lists_the_functions():
    assert set(FUNCTIONS) <= set(dir(toolchain))
