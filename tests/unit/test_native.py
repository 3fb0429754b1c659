"""The native kernel is there where it can be built, and one that was built from other sources is refused."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator

import pytest

from toolchain import native

compiler = shutil.which("cc") or shutil.which("gcc")


@pytest.fixture
def looked_for_anew() -> Iterator[None]:
    native._library.cache_clear()
    yield
    native._library.cache_clear()


@pytest.mark.skipif(compiler is None, reason="no C compiler here")
def test_where_a_compiler_is_the_kernel_is_built() -> None:
    """Otherwise every test of the kernel would skip, and nobody would know."""
    assert native.missing() is None


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
@pytest.mark.parametrize("name", ["Layer", "Edge", "Connection", "Couples"])
def test_a_library_with_other_structs_is_refused(name: str, looked_for_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = getattr(native, name)
    monkeypatch.setattr(native, name, type(name, (found,), {"_fields_": (("added", ctypes.c_int64),)}))
    said = native.missing()
    assert said is not None
    assert "other sources" in said
    assert "install the package again" in said
