"""Help is fast, loads nothing heavy, and shows every verb with its flags and an example."""

from __future__ import annotations

import time

import pytest

import toolchain

FLAGS = {
    "doctor": "--json",
    "models": "--json",
    "targets": "--json",
    "train": "--method --dataset --epochs --seed --device --set --resume -o",
    "compile": "--target --chip --weight-bits --time-steps --feedback-steps --timing --input --calibrate --set --dump-after --no-float --data-dir --json -o",
    "inspect": "--after --processes --svg --chip-svg --analysis --json",
    "deploy": "--target --dataset --samples --batch --jobs --scheduler --synapses --device --fallback --predictions --resume --json",
    "compare": "--targets --dataset --samples --device --max-drop --budget-samples --report --fallback --resume --json",
    "verify": "--targets --dataset --samples --phase --replay --json",
    "estimate": "--dataset --samples --batch --chip-samples --mac-pj --ac-pj --pareto --weight-bits --time-steps --picture --device --data-dir --json",
    "tune": "--dataset --max-drop --samples --input --device --picture --json -o",
}


def test_help_takes_less_than_300_ms(shell):
    def seconds():
        start = time.perf_counter()
        assert shell("--help").code == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(8)) < 0.3  # the least, for other tests run beside


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["deploy", "--help"], ["deploy", "mnist-fc", "--target", "sim", "--jobs", "0"]]
)
def test_help_and_refusals_load_nothing_heavy(shell, words):
    code = f"""
import sys
sys.argv = ["toolchain", *{words!r}]
from toolchain.cli import main
try:
    main()
except SystemExit:
    pass
heavy = {{"torch", "numpy", "lava", "matplotlib", "rich", "scipy"}} & set(sys.modules)
assert not heavy, heavy
"""
    answer = shell(code=code)
    assert answer.code == 0, answer.err


def test_no_arguments_print_the_help(command):
    assert command() == command("--help")


def test_help_lists_every_verb(command):
    listed = command("--help").out
    assert all(f"  {verb} " in listed for verb in FLAGS)


@pytest.mark.parametrize("verb", FLAGS)
def test_help_of_a_verb_has_an_example_and_every_flag(command, verb):
    text = command(verb, "--help").out
    assert f"Examples:\n    toolchain {verb}" in text
    assert [flag for flag in FLAGS[verb].split() if f"{flag} " not in text and f"{flag}," not in text] == []


@pytest.mark.parametrize("verb", FLAGS)
def test_the_examples_of_a_verb_use_its_own_flags(command, verb):
    text = command(verb, "--help").out
    options = text.partition("Options:")[2].partition("Examples:")[0]
    lines = [line.split() for line in text.splitlines() if line.startswith("    toolchain ")]
    assert {line[1] for line in lines} == {verb}
    assert [
        word for line in lines for word in line if word.startswith("-") and f"{word} " not in options and f"{word}," not in options
    ] == []


def test_version(command):
    assert command("--version").out == f"toolchain {toolchain.__version__}\n"
