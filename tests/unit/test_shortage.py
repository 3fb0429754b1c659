"""Whatever says that the machine gives no more is recognised, and nothing else is."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from toolchain import shortage
from toolchain.errors import ToolchainError


def raised(make: object) -> BaseException:
    try:
        make()  # type: ignore[operator]
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def of_numpy() -> None:
    np.empty(2**62, np.uint8)


def of_torch() -> None:
    import torch

    torch.empty(2**62, dtype=torch.uint8)


def wrapped() -> None:
    try:
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")
    except ImportError as error:
        raise ImportError("you should not try to import numpy from its source directory") from error


@pytest.mark.parametrize("make", [of_numpy, of_torch, wrapped])
def test_what_libraries_say_of_memory(make: object) -> None:
    found = shortage.found(raised(make))
    assert found is not None
    assert found.of == "memory"
    assert "\n" not in found.sentence
    assert found.sentence.startswith("ran out of memory (")


@pytest.mark.parametrize(
    ("error", "of"),
    [
        (MemoryError(), "memory"),
        (MemoryError("std::bad_alloc"), "memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
        (OSError("libgomp.so.1: cannot allocate memory in static TLS block"), "memory"),
        (RuntimeError("can't start new thread"), "threads and processes"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "threads and processes"),
        (BlockingIOError(errno.EAGAIN, "write could not complete without blocking"), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (RuntimeError("shapes (3,4) and (5,6) differ"), None),
        (ValueError("out of memory"), None),
        (ToolchainError("there is not enough memory for the results: run fewer at a time"), None),
        (None, None),
    ],
)
def test_every_name_of_a_shortage(error: BaseException | None, of: str | None) -> None:
    found = shortage.found(error)
    assert (found.of if found is not None else None) == of


def test_an_error_that_hides_its_cause_is_judged_by_its_own_words() -> None:
    def make() -> None:
        try:
            raise MemoryError
        except MemoryError:
            raise ValueError("a size is wrong") from None

    assert shortage.found(raised(make)) is None


def test_the_remedy_names_what_to_lower() -> None:
    memory = shortage.found(MemoryError())
    threads = shortage.found(OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)))
    assert memory is not None
    assert threads is not None
    assert memory.sentence == "ran out of memory"
    assert memory.remedy(["--batch", "--jobs"]).startswith("lower --batch or --jobs, end other programs, or raise what `ulimit -v`")
    assert threads.remedy([]) == "end other programs, or raise what `ulimit -u` or the container allows"
