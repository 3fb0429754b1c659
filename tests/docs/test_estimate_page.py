"""What docs/estimate.md shows is what comes out: its Python runs, its commands have their flags, and its examples are printed again, number for number."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from toolchain import cli, estimate

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "estimate.md").read_text()
EXAMPLES = dict(re.findall(r"`toolchain estimate ([^`]+)`, [^\n]*:\n\n```text\n(.*?)\n```", PAGE, re.S))


def test_the_python_on_the_page_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(block.replace("samples=50", "samples=10"), "estimate.md", "exec"), {})
    assert "hidden1 -> readout" in capsys.readouterr().out


@pytest.mark.parametrize("line", re.findall(r"^toolchain (estimate .*)$", PAGE, re.M))
def test_commands_have_their_flags(line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toolchain", "estimate", "--help"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    text = capsys.readouterr().out
    assert [word for word in shlex.split(line) if word.startswith("-") and f"{word} " not in text] == []


def test_the_page_has_both_examples():
    assert set(EXAMPLES) == {"mnist-fc", "convnet-f --samples 100"}


@pytest.mark.parametrize("words", EXAMPLES)
def test_an_example_is_what_is_printed(words):
    model, *rest = words.split()
    said = estimate(model, samples=int(rest[-1]) if rest else None, chip_samples=0, device="cpu").to_text().splitlines()
    quoted = EXAMPLES[words].splitlines()
    shown = quoted[: next(i for i, line in enumerate(quoted) if line.startswith(("energy by unit", "SANA-FE:")))]
    assert len(shown) > 30
    assert said[: len(shown)] == shown


def test_the_middle_connection_of_convnet_f_is_counted_at_its_border():
    found = estimate("convnet-f", samples=1, chip_samples=0, device="cpu").forward.connections[2]
    assert f"convnet-f's middle connection has {found.products:,} products, not 64 · 64 · 25 · 49 = {64 * 64 * 25 * 49:,}" in PAGE
