"""docs/compare.md: its factors are those of the code, in their order, and its example says what the page says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import toolchain
from toolchain.analysis.accuracy import EQUILIBRIUM_STEPS, LONGER, STILL_LOST
from toolchain.analysis.factors import STEPS, SWITCHES
from toolchain.analysis.intervals import Z95

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "compare.md").read_text()


def first_column(heading):
    """The first cells of the first table behind a heading."""
    rows = re.search(r"\n\|[^\n]*\n\|---[^\n]*\n((?:\|[^\n]*\n)+)", PAGE[PAGE.index(heading) :]).group(1)
    return [row.split("|")[1].strip() for row in rows.splitlines()]


def test_factors_are_those_of_the_code_in_their_order():
    assert first_column("## From what to what") == [STEPS, *SWITCHES]
    advised = [name.strip() for row in first_column("## What to try") for name in row.split(",")]
    assert advised == [STEPS, *SWITCHES]


def test_numbers_are_those_of_the_code():
    assert (EQUILIBRIUM_STEPS, LONGER) == (256, 4)
    assert "in 256 time steps, or four times the target's" in PAGE
    assert 1 - STILL_LOST == 0.9
    assert "nine tenths of its loss back" in PAGE
    assert f"{Z95**2:.2f} / (n + {Z95**2:.2f})" in PAGE


def test_the_example_loses_most_by_weights_and_the_advice_leaves_the_one_time_step():
    def budget(bits):
        artefact = toolchain.compile("digits-fc", target="sim", weight_bits=bits, time_steps=1).artifact
        return toolchain.compare(artefact, targets=("torch", "sim"), dataset="digits").budget

    coarse = budget(2)
    drops = {row.name: row.cumulative.drop for row in coarse.rows}
    assert drops["weights"] > drops[STEPS] > drops["input"]
    assert coarse.advice.options == ("--weight-bits", "8")
    better = budget(8)
    assert better.accuracy > coarse.accuracy
    assert {row.name: row.cumulative.drop for row in better.rows}["weights"] == 0
    assert better.total.drop == pytest.approx(drops[STEPS])
