"""Every allocation of the compiled part may fail: the answer is an error of ours, and the next run is as good as any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from toolchain import native

ROOT = Path(__file__).resolve().parents[2]

FAILING = """
#include <stdlib.h>
__attribute__((weak)) long long failing_at = -1;
static inline int fails(void) { return failing_at >= 0 && failing_at-- == 0; }
#define malloc(size) (fails() ? NULL : malloc(size))
#define calloc(count, size) (fails() ? NULL : calloc(count, size))
#define realloc(block, size) (fails() ? NULL : realloc(block, size))
"""
"""Before every source: allocation number `failing_at` fails, from 0, and none before or after."""

CHECK = """
import ctypes
import numpy as np
import torch
import toolchain
from toolchain import models, native
from toolchain.errors import ToolchainError
from toolchain.targets.sim import Sim

torch.set_num_threads(1)
failing_at = ctypes.c_longlong.in_dll(native.loaded(), "failing_at")
graph = toolchain.compile("digits-fc", target="sim", time_steps=4, feedback_steps=4).graph
images = np.random.default_rng(0).random((3, 64), np.float32)

def phases() -> list:
    with Sim().compile(graph) as run:
        forward = run.run(images)
        back = run.run(np.ones((3, 32)), phase="feedback")
    return [*forward.counts.values(), *forward.potentials.values(), *back.counts.values()]

def steps() -> list:
    network = models.load("digits-fc").eval()
    from toolchain.methods import spide
    found = spide.run(network, torch.from_numpy(images.reshape(3, 1, 8, 8)), torch.zeros(3, dtype=torch.int64), scale_factor=3.0)
    return [gradient.numpy() for gradient in found.gradients.values()]

for name, run in (("phases", phases), ("steps", steps)):
    failing_at.value = -1
    whole, refused = run(), 0
    for number in range(10_000):
        failing_at.value = number
        try:
            found = run()
        except ToolchainError as error:
            assert "there is not enough memory" in str(error), error
            refused += 1
            failing_at.value = -1
            found = run()
        else:
            if failing_at.value >= 0:
                break
            raise AssertionError(f"{name}: allocation {number} failed and nothing said so")
        assert all(np.array_equal(a, b) for a, b in zip(found, whole, strict=True)), (name, number)
    assert failing_at.value >= 0
    print(name, refused)
"""


@pytest.mark.slow
@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_every_allocation_that_fails_is_an_error(tmp_path: Path) -> None:
    header, built = tmp_path / "failing.h", tmp_path / "failing.so"
    header.write_text(FAILING)
    subprocess.run([sys.executable, ROOT / ".ci" / "build-native", built, "-O0", "-include", header], timeout=120, check=True)
    environment = {**os.environ, native.LIBRARY_VARIABLE: str(built), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    refused = dict(line.split() for line in done.stdout.splitlines())
    assert all(int(count) > 5 for count in refused.values()), refused
