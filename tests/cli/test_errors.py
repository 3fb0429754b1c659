"""Bad input is one sentence on stderr, nothing on stdout, and the right exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import toolchain
from toolchain.errors import DesignRuleError, ToleranceError, ToolchainError, UsageError
from toolchain.target import get

ROOT = Path(__file__).resolve().parents[2]

USAGE = [
    ("deploy", "MODEL"),
    ("deploy mnist-fc", "--target"),
    ("compile mnist-fc", "--output"),
    ("no-such-verb", "no-such-verb"),
    ("deploy mnist-fc --no-such-flag", "--no-such-flag"),
    ("compile mnist-fc -o x.fsnn --chip loihi9", "loihi1, loihi2"),
    ("deploy mnist-fc --target sim --samples many", "--samples"),
    ("deploy no-such-model --target sim", "no-such-model"),
    ("deploy no/such/file.fsnn --target sim", "no/such/file.fsnn"),
    ("inspect no-such-model", "mnist-fc"),
    ("estimate no-such-model", "mnist-fc"),
    ("estimate digits-fc --dataset digits --weight-bits 8", "--weight-bits would not be used by estimate without --pareto"),
    ("estimate digits-fc --dataset digits --pareto --batch 4", "--batch would not be used by --pareto"),
    ("estimate digits-fc --dataset digits --pareto --time-steps many", "--time-steps"),
    ("estimate digits-fc --dataset digits --pareto --weight-bits 9", "2 to 8"),
    ("estimate digits-fc --dataset digits --mac-pj 0", "mac_pj"),
    ("deploy mnist-fc --target no-such-target", "lava-sim"),
    ("deploy mnist-fc --target sim --fallback no-such-target", "no-such-target"),
    ("deploy mnist-fc --target sim --dataset no-such-data", "mnist-1k"),
    ("deploy mnist-fc --target sim --dataset cifar10", "cifar10"),
    ("deploy mnist-fc --target sim --samples 1001", "1,?000"),
    ("deploy mnist-fc --target sim --samples 0", "samples"),
    ("deploy mnist-fc --target sim --batch many", "--batch"),
    ("deploy mnist-fc --target sim --batch 0", "batch"),
    ("deploy mnist-fc --target sim --scheduler tcp://127.0.0.1:1 --jobs 2", "--jobs would not be used by --scheduler"),
    ("deploy mnist-fc --target sim --synapses stock", "synapses"),
    ("compile mnist-fc -o x.fsnn --input other", "unknown input 'other'.*bias, graded"),
    ("deploy mnist-fc --target torch --device tpu", "cuda"),
    ("deploy mnist-fc --target sim --dataset digits", "64|8"),
    ("compare mnist-fc --targets torch,no-such-target", "no-such-target"),
    ("compare mnist-fc --targets ,", "leaves a place empty"),
    ("verify mnist-fc --targets reference,,sim", "'reference,,sim' leaves a place empty"),
    ("compare mnist-fc --budget-samples -1", "how many samples"),
    ("verify mnist-fc --phase sideways", "sideways"),
    ("verify mnist-fc --targets sim --replay", "fsnn"),
    ("verify mnist-fc --targets sim", "two|2"),
    ("compile mnist-fc -o x.fsnn --weight-bits 1", "bits"),
    ("compile mnist-fc -o x.fsnn --time-steps 0", "0"),
    ("compile mnist-fc -o x.fsnn --timing later", "unknown timing 'later'.*exact, pipelined"),
    ("compile mnist-fc -o x.fsnn --set no-dot", "no-dot"),
    ("compile mnist-fc -o x.fsnn --set quantize.no_such=1", "no_such"),
    ("compile mnist-fc -o x.fsnn --dump-after no-such-pass", "no-such-pass"),
    ("compile mnist-fc -o x.fsnn --weight-bits 9", "bits"),
    ("compile mnist-fc -o x.fsnn --calibrate digits", "784.*64|8, 8"),
    ("compile mnist-fc -o x.fsnn --calibrate no-such-data", "mnist-1k"),
    ("compile mnist-fc -o x.fsnn --data-dir .", "--data-dir would not be used by compile without --calibrate"),
    ("compile mnist-fc -o x.fsnn --chip loihi3", "loihi1, loihi2"),
    ("compile mnist-fc -o x.fsnn --chip loihi1 --set partition.chip=loihi2", "contradicts the flag that says loihi1"),
    ("compile mnist-fc -o x.txt", "fsnn"),
    ("inspect mnist-fc --after no-such-pass", "lower, partition, quantize, retime"),
    ("inspect mnist-fc --after fold --processes", "ticks yet.*retime"),
    ("inspect mnist-fc --svg graph.png", "graph.png.*ending .svg"),
    ("inspect mnist-fc --chip-svg chips", "chips.*ending .svg"),
    ("inspect mnist-fc --after retime --chip-svg chips.svg", "partition"),
    ("train no-such-model -o run", "no-such-model"),
    ("train mnist-fc --set no.such=1 -o run", "no"),
    ("train mnist-fc --method no-such-method -o run", "no-such-method"),
    ("train mnist-fc --method dsr -o run", "'dsr' does not fit 'mnist-fc': every layer"),
    ("train mnist-fc --method saf-f -o run", "'saf-f' does not fit 'mnist-fc': feedback 0"),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """No command of this file may write into the source tree."""
    monkeypatch.chdir(tmp_path)


def assert_one_sentence(answer, code, word):
    assert (answer.code, answer.out) == (code, ""), answer
    assert answer.err.startswith("toolchain: "), answer.err
    assert answer.err.count("\n") == 1, answer.err
    assert re.search(word, answer.err), answer.err
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(("words", "named"), USAGE)
def test_bad_input_is_a_usage_error(command, words, named):
    assert_one_sentence(command(*words.split()), 2, named)


@pytest.mark.lava
def test_unknown_synapses_list_the_known_ones(command):
    assert_one_sentence(command("deploy", "mnist-fc", "--target", "lava-sim", "--synapses", "other"), 2, "own.*stock")


def test_a_missing_target_says_how_to_get_it_and_how_to_go_on(command, monkeypatch):
    monkeypatch.setattr(type(get("lava-sim")), "available", lambda self: "Lava is not installed: pip install lava-nc")
    assert_one_sentence(command("deploy", "mnist-fc", "--target", "lava-sim"), 2, "pip install lava-nc.*--fallback sim")


def test_verify_offers_other_targets_for_a_missing_one_and_no_fallback(command, monkeypatch):
    monkeypatch.setattr(type(get("lava-sim")), "available", lambda self: "Lava is not installed: pip install lava-nc")
    answer = command("verify", "mnist-fc")
    assert_one_sentence(answer, 2, "pip install lava-nc.*--targets reference,sim")
    assert "--fallback" not in answer.err


def test_a_fallback_is_said_and_recorded(command, monkeypatch):
    monkeypatch.setattr(type(get("lava-sim")), "available", lambda self: "Lava is not installed: pip install lava-nc")
    answer = command("deploy", "mnist-fc", "--target", "lava-sim", "--fallback", "sim", "--samples", 2, "--json")
    found = json.loads(answer.out)
    assert (answer.code, found["target"], found["ran_on"]) == (0, "lava-sim", "sim")
    assert answer.err.count("\n") == 1
    assert "sim" in answer.err
    assert "pip install lava-nc" in answer.err


def test_a_missing_data_folder_is_named(command):
    assert_one_sentence(
        command("deploy", "mnist-fc", "--target", "sim", "--dataset", "mnist", "--data-dir", "no/such/folder"), 2, "no/such/folder"
    )


@pytest.mark.parametrize("content", [b"", b"\x08", b"not a safetensors file, though long enough to be one"])
def test_a_damaged_file_is_named(command, tmp_path_factory, content):
    path = tmp_path_factory.mktemp("damaged") / "damaged.fsnn"
    path.write_bytes(content)
    assert_one_sentence(command("deploy", path, "--target", "sim"), 2, "damaged.fsnn")


@pytest.mark.parametrize(("error", "code"), [(ToolchainError, 1), (UsageError, 2), (DesignRuleError, 3), (ToleranceError, 4)])
def test_each_error_has_its_exit_code(command, monkeypatch, error, code):
    monkeypatch.setattr(toolchain, "inspect", _raising(error("population 'hidden' is\n too wide")))
    assert_one_sentence(command("inspect", "mnist-fc"), code, "toolchain: population 'hidden' is too wide$")


def test_every_reason_has_a_line(command, monkeypatch):
    monkeypatch.setattr(
        toolchain, "inspect", _raising(DesignRuleError("'net' does not fit, for 2 reasons:\n- one is\ttoo wide\n- two is too deep"))
    )
    answer = command("inspect", "mnist-fc")
    assert (answer.code, answer.out) == (3, "")
    assert answer.err == "toolchain: 'net' does not fit, for 2 reasons:\n  - one is too wide\n  - two is too deep\n"


def test_an_unexpected_error_is_one_sentence_that_names_debug(command, monkeypatch):
    monkeypatch.setattr(toolchain, "inspect", _raising(ZeroDivisionError("division by zero")))
    assert_one_sentence(command("inspect", "mnist-fc"), 1, "ZeroDivisionError: division by zero.*--debug")


@pytest.mark.parametrize("words", ["--debug inspect mnist-fc", "inspect mnist-fc --debug"])
def test_debug_shows_the_traceback(command, monkeypatch, words):
    monkeypatch.setattr(toolchain, "inspect", _raising(UsageError("no")))
    answer = command(*words.split())
    assert (answer.code, answer.out) == (2, "")
    assert "Traceback" in answer.err


def test_an_interrupt_is_not_a_traceback(command, monkeypatch):
    monkeypatch.setattr(toolchain, "inspect", _raising(KeyboardInterrupt()))
    answer = command("inspect", "mnist-fc")
    assert (answer.code, answer.out) == (130, "")
    assert "Traceback" not in answer.err


def test_termination_runs_every_finally():
    code = """
import sys, time, toolchain
def inspect(*_, **__):
    try:
        print("started", flush=True)
        time.sleep(60)
    finally:
        print("stopped", flush=True)
toolchain.inspect = inspect
sys.argv = ["toolchain", "inspect", "mnist-fc"]
from toolchain.cli import main
main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=20)
    assert (rest, process.returncode) == ("stopped\n", 143)


def test_a_reader_that_leaves_is_not_an_error_message():
    process = subprocess.Popen(
        [sys.executable, "-m", "toolchain", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait(timeout=20)


def _raising(error):
    def function(*_, **__):
        raise error

    return function
