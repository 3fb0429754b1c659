"""docs/inside.md: its numbers are the code's, and what it says of the networks is so."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import toolchain
from toolchain import data
from toolchain.analysis.equilibrium import TOLERANCE
from toolchain.analysis.fidelity import SHOWN
from toolchain.analysis.settling import ANSWERS, FEEDBACK_TOLERANCE, SEEN
from toolchain.analysis.settling import TOLERANCE as RESIDUAL
from toolchain.analysis.side_by_side import LEAST_STEPS, LONGER, SAMPLES, WORK, side_by_side
from toolchain.compiler import graph_for
from toolchain.feedback import COARSE_TOLERANCE, COARSE_WORK, exact, float_graph, in_floats
from toolchain.source import find
from toolchain.target import get

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "inside.md").read_text()
SUGGESTED = re.findall(r"\| `([a-z0-9-]+)` \| (\d+) \| ([\d.]+) % \| (\d+) \| ([\d.]+) % \|", PAGE)


def test_numbers_are_those_of_the_code():
    assert (SAMPLES, WORK, LONGER, LEAST_STEPS, RESIDUAL, FEEDBACK_TOLERANCE) == (128, 2**37, 2, 50, 0.01, 0.1)
    for words in (
        "first 128\nsamples",
        "2^37 products",
        "twice the model's T and at least 50 steps",
        "stays within 0.01",
        "its tolerance is 0.1",
    ):
        assert words in PAGE
    assert ANSWERS == 0.01
    assert SHOWN == 6
    assert "the six tensors that are farthest off" in PAGE
    assert pytest.approx(0.2) == 1 - SEEN  # the last fifth
    assert (TOLERANCE, COARSE_TOLERANCE, COARSE_WORK) == (1e-10, 1e-5, 2**28)


@pytest.mark.parametrize(("name", "now", "accuracy", "suggested", "shorter"), SUGGESTED, ids=[row[0] for row in SUGGESTED])
def test_suggested_steps_are_suggested_and_hold(name, now, accuracy, suggested, shorter):
    source, images = find(name), data.load("mnist-1k", samples=SAMPLES)
    found = side_by_side(float_graph(source), graph_for(source, get("sim")), np.asarray(images.images), images.labels)
    assert found.settling.curve("forward", "integer").suggested == int(suggested)
    for steps, expected in ((now, accuracy), (suggested, shorter)):
        compiled = toolchain.compile(name, target="sim", time_steps=int(steps)).artifact
        assert f"{100 * toolchain.deploy(compiled, target='sim', device='cpu').accuracy:.2f}" == expected


def test_the_table_of_steps_is_not_empty():
    assert [row[0] for row in SUGGESTED] == ["mnist-fc", "mnist-fc2"]


def test_masks_and_cosines_of_mnist_fc_are_what_the_page_says():
    source, images = find("mnist-fc"), data.load("mnist-1k", samples=128)
    solved, _ = exact(source, images.images, images.labels)
    spide = in_floats(source, images.images, images.labels)
    share = np.mean([(spide.masks[name] != mask).mean() for name, mask in solved.masks.items()])
    assert 0.013 < share < 0.017
    one, other = spide.gradients["feedback.0.weight"].ravel(), solved.gradients["feedback.0.weight"].ravel()
    assert 0.965 < one @ other / np.linalg.norm(one) / np.linalg.norm(other) < 0.975
