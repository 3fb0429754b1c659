"""What ran is read from the packages' metadata, and every result records it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError

import numpy as np
import torch

import toolchain
from toolchain import versions as module
from toolchain.models import digits_fc
from toolchain.versions import installed, versions


def test_versions_are_those_of_the_imported_libraries():
    found = versions()
    assert list(found) == ["toolchain", "python", "machine", "torch", "numpy", "lava-nc"]
    assert found["toolchain"] == toolchain.__version__
    assert found["python"] == platform.python_version()
    assert found["numpy"] == np.__version__
    assert torch.__version__.startswith(found["torch"])


def test_what_is_missing_is_said(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", missing)
    assert installed("lava-nc") is None
    assert versions()["lava-nc"] == "not installed"


def test_a_compilation_records_them():
    found = toolchain.compile(digits_fc.build(0)).to_json()
    assert (found["device"], found["versions"]) == ("cpu", versions())
