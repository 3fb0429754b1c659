"""What the tests of this folder share: drawn graphs, and a second spelling of the model step."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _beside(name: str) -> ModuleType:
    """The module NAME.py of this folder; test folders are no packages, so nothing else finds it."""
    spec = importlib.util.spec_from_file_location(f"property_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def drawn() -> ModuleType:
    """The strategies of `drawn_graphs`: `data.draw(drawn.graphs())`."""
    return _beside("drawn_graphs")


@pytest.fixture(scope="session")
def independent() -> ModuleType:
    """The model step of `independent`, which shares no code with the toolchain's arithmetic."""
    return _beside("independent")
