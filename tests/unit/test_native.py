"""The native kernel is there where it can be built; one built from other sources is refused, and so are arguments that would leave their arrays."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toolchain
from toolchain import native
from toolchain.errors import ToolchainError
from toolchain.native import phases, ticks

ROOT = Path(__file__).resolve().parents[2]
compiler = shutil.which("cc") or shutil.which("gcc")
compiled = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


@pytest.fixture
def looked_for_anew() -> Iterator[None]:
    native._library.cache_clear()
    yield
    native._library.cache_clear()


@pytest.mark.skipif(compiler is None, reason="no C compiler here")
def test_where_a_compiler_is_the_kernel_is_built() -> None:
    """Otherwise every test of the kernel would skip, and nobody would know."""
    assert native.missing() is None


@compiled
@pytest.mark.parametrize("name", ["Layer", "Edge", "Connection", "Couples"])
def test_a_library_with_other_structs_is_refused(name: str, looked_for_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = getattr(native, name)
    monkeypatch.setattr(native, name, type(name, (found,), {"_fields_": (("added", ctypes.c_int64),)}))
    said = native.missing()
    assert said is not None
    assert "other sources" in said
    assert "install the package again" in said or native.LIBRARY_VARIABLE in said


@compiled
def test_the_environment_may_name_another_build(looked_for_anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "copy.so"
    shutil.copy(native.loaded()._name, copy)
    native._library.cache_clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(native.LIBRARY_VARIABLE, "copy.so")
    assert native.loaded()._name == str(copy)
    assert toolchain.doctor().native == f"{phases.INSTRUCTION_SETS[phases.widest()]}, from {native.LIBRARY_VARIABLE}={copy}"


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF and nothing more"])
def test_a_named_build_that_is_none_is_no_reason_to_take_another(
    content: bytes | None, looked_for_anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named = tmp_path / "other.so"
    if content is not None:
        named.write_bytes(content)
    monkeypatch.setenv(native.LIBRARY_VARIABLE, str(named))
    said = native.missing()
    assert said is not None
    assert str(named) in said
    assert f"give {native.LIBRARY_VARIABLE} the path of a build of these sources, or unset it" in said
    assert toolchain.doctor().native == said
    with pytest.raises(ToolchainError, match="cannot be loaded"):
        native.widest()


def test_without_the_library_everything_loads_and_doctor_says_how_to_get_it(looked_for_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(native, "EXTENSION_SUFFIXES", [".nothing-built"])
    said = "the native kernel is not built: install a C compiler (gcc or clang), then the package again"
    assert native.missing() == said
    assert toolchain.doctor().native == said
    assert said in toolchain.doctor().to_text()


# A convolution of 3 x 3 with padding 1 on (2, 4, 5), to (3, 4, 5): what `lava-sim` gives the kernel, spelt out.


def _arguments() -> dict[str, Any]:
    def axis(size: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        runs, begin = [], [0]
        for place in range(size):
            first, last = max(place - 1, 0), min(place + 1, size - 1)
            runs.append((first, first - place + 1, last - first + 1))
            begin.append(len(runs))
        return np.array(begin, np.int32), np.array(runs, np.int32)

    row, column = (part.ravel().astype(np.int32) for part in np.indices((4, 5)))
    weight = np.random.default_rng(0).integers(-128, 128, (2, 3, 3, 3)).astype(np.int16)
    return {
        "source": (2, 20),
        "made": (3, 4, 5),
        "slots": (3, 3),
        "rows": axis(4),
        "columns": axis(5),
        "places": (row, column, np.arange(20, dtype=np.int32)),
        "weight": weight,
        "exponent": 2,
    }


def _changed(array: Any, place: Any, value: int) -> Any:
    copy = array.copy()
    copy[place] = value
    return copy


Change = Callable[[dict[str, Any]], dict[str, Any]]

WAYS: dict[str, tuple[Change, str]] = {
    "no channels": (lambda a: {"source": (0, 20)}, "above 0"),
    "fewer than no places": (lambda a: {"source": (2, -20)}, "above 0"),
    "no slots": (lambda a: {"slots": (3, 0)}, "above 0"),
    "neurons beyond 32 bits": (lambda a: {"made": (3, 2**20, 2**20)}, "32 bits"),
    "more source channels than weights": (lambda a: {"source": (3, 20)}, r"'weight' must be an array of int16 \(3, 3, 3, 3\)"),
    "more target channels than weights": (lambda a: {"made": (4, 4, 5)}, "'weight' must be"),
    "more slots than weights": (lambda a: {"slots": (3, 4)}, "'weight' must be"),
    "weights of 32 bits": (lambda a: {"weight": a["weight"].astype(np.int32)}, "and not int32"),
    "weights in pieces": (lambda a: {"weight": np.asfortranarray(a["weight"])}, "in one piece"),
    "weights in a list": (lambda a: {"weight": a["weight"].tolist()}, "and not list"),
    "weights of the other byte order": (lambda a: {"weight": a["weight"].astype(">i2")}, "and not >i2"),
    "a negative exponent": (lambda a: {"exponent": -1}, "exponent -1 is not within 0 to 30"),
    "an exponent of 31": (lambda a: {"exponent": 31}, "exponent 31"),
    "a factor a channel to other channels": (lambda a: {"weight": np.ones(2, np.int16)}, "2 channels to 3"),
    "too few places": (lambda a: {"places": tuple(part[:-1] for part in a["places"])}, r"must be an array of int32 \(20,\)"),
    "places of 64 bits": (lambda a: {"places": tuple(part.astype(np.int64) for part in a["places"])}, "and not int64"),
    "a row outside": (lambda a: {"places": (_changed(a["places"][0], 7, 4), *a["places"][1:])}, "place's row is not within 0 to 3"),
    "a negative row": (lambda a: {"places": (_changed(a["places"][0], 7, -1), *a["places"][1:])}, "place's row"),
    "a column outside": (lambda a: {"places": (a["places"][0], a["places"][1] + 1, a["places"][2])}, "place's column"),
    "an order that leaves the places": (lambda a: {"places": (*a["places"][:2], a["places"][2] + 1)}, "order of places"),
    "runs that begin nowhere": (lambda a: {"rows": (a["rows"][0][:1], a["rows"][1])}, "begin nowhere"),
    "runs that begin below 0": (lambda a: {"rows": (_changed(a["rows"][0], 0, -1), a["rows"][1])}, "begin outside 4 runs"),
    "runs that begin backwards": (lambda a: {"rows": (_changed(a["rows"][0], 1, 3), a["rows"][1])}, "begin outside"),
    "runs that begin behind the last": (lambda a: {"columns": (a["columns"][0] + 1, a["columns"][1])}, "begin outside 5 runs"),
    "runs of two numbers": (lambda a: {"rows": (a["rows"][0], a["rows"][1][:, :2].copy())}, "'rows' must be"),
    "a run behind the target's rows": (lambda a: {"rows": (a["rows"][0], _changed(a["rows"][1], (3, 0), 3))}, "leaves the 4 of the target"),
    "a run behind the kernel's rows": (lambda a: {"rows": (a["rows"][0], _changed(a["rows"][1], (3, 1), 2))}, "the 3 of the kernel"),
    "a run that is too long": (
        lambda a: {"columns": (a["columns"][0], _changed(a["columns"][1], (2, 2), 4))},
        "leaves the 5 of the target",
    ),
    "a run that wraps 32 bits": (
        lambda a: {"columns": (a["columns"][0], _changed(a["columns"][1], (2, 2), 2**31 - 1))},
        "leaves the 5 of the target",
    ),
    "a negative target": (lambda a: {"columns": (a["columns"][0], _changed(a["columns"][1], (2, 0), -1))}, "a run of its columns leaves"),
    "a negative slot": (lambda a: {"columns": (a["columns"][0], _changed(a["columns"][1], (2, 1), -1))}, "a run of its columns leaves"),
    "a negative length": (lambda a: {"rows": (a["rows"][0], _changed(a["rows"][1], (2, 2), -1))}, "a run of its rows leaves"),
}


@compiled
@pytest.mark.parametrize("name", WAYS)
def test_a_connection_that_would_leave_its_arrays_is_refused(name: str) -> None:
    ticks.Way(**_arguments())
    change, said = WAYS[name]
    arguments = _arguments()
    with pytest.raises(ToolchainError, match=f"^the native kernel cannot take this: .*{said}"):
        ticks.Way(**{**arguments, **change(arguments)})


DELIVERIES: dict[str, tuple[dict[str, Any], str]] = {
    "one sample fewer": ({"values": np.zeros((2, 40), np.int8)}, r"'values' must be an array of int8 \(3, 40\)"),
    "one neuron fewer": ({"values": np.zeros((3, 39), np.int8)}, "'values'"),
    "an image": ({"values": np.zeros((3, 2, 20), np.int8)}, "'values'"),
    "spikes of 64 bits": ({"values": np.zeros((3, 40), np.int64)}, "and not int64"),
    "every second spike": ({"values": np.zeros((3, 80), np.int8)[:, ::2]}, "in one piece"),
    "channels last": ({"values": np.zeros((40, 3), np.int8).T}, "in one piece"),
    "no array": ({"values": None}, "and not NoneType"),
    "too little room": ({"out": np.zeros((3, 59), np.int16)}, r"'currents' must be an array of int8 or int16 or int32 \(3, 60\)"),
    "currents in floats": ({"out": np.zeros((3, 60), np.float32)}, "and not float32"),
    "currents of 64 bits": ({"out": np.zeros((3, 60), np.int64)}, "and not int64"),
    "currents in pieces": ({"out": np.zeros((60, 3), np.int16).T}, "in one piece and writable"),
    "currents that are not to be written": ({"out": np.frombuffer(bytes(360), np.int16).reshape(3, 60)}, "writable"),
    "currents between addresses": ({"out": np.frombuffer(bytearray(361), np.int16, 180, 1).reshape(3, 60)}, "in one piece"),
    "no currents": ({"out": np.zeros((), np.int16)}, "'values'"),
    "sums of 3 bytes": ({"sums": 3}, "sums of 3 bytes"),
    "an instruction set below the first": ({"instructions": -1}, "instruction set -1"),
    "an instruction set this machine lacks": ({"instructions": len(native.INSTRUCTION_SETS)}, "instruction set"),
}


@compiled
@pytest.mark.parametrize("name", DELIVERIES)
def test_spikes_and_currents_that_do_not_fit_their_connection_are_refused(name: str) -> None:
    way = ticks.Way(**_arguments())
    arguments: dict[str, Any] = {"values": np.ones((3, 40), np.int8), "out": np.zeros((3, 60), np.int16), "sums": 4, "instructions": 0}
    assert way.deliver(**arguments) == 120
    assert arguments["out"].any()
    changes, said = DELIVERIES[name]
    with pytest.raises(ToolchainError, match=f"^the native kernel cannot take this: .*{said}"):
        way.deliver(**{**arguments, **changes})


@compiled
def test_no_samples_make_no_currents() -> None:
    way = ticks.Way(**_arguments())
    assert way.deliver(np.zeros((0, 40), np.int8), np.zeros((0, 60), np.int32), sums=2, instructions=native.widest()) == 0


SHAPE = (2, 5)


def _state() -> dict[str, Any]:
    arrays = {name: np.zeros(SHAPE, np.int32) for name in ("potential", "counts", "saturations", "activity", "drive")}
    signs = {name: np.zeros(SHAPE, np.int8) for name in ("spikes", "sent")}
    return {"threshold": 3, "reset": 2, "both": True, "mask": np.ones(SHAPE, np.bool_), **arrays, **signs}


STATES: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"{name} of another shape": ({name: np.zeros((2, 4), np.int8 if name in ("spikes", "sent", "mask") else np.int32)}, f"'{name}'")
        for name in ("counts", "saturations", "activity", "drive", "spikes", "sent", "mask")
    },
    **{
        f"{name} of 64 bits": ({name: np.zeros(SHAPE, np.int64)}, "and not int64")
        for name in ("potential", "counts", "saturations", "activity", "drive", "spikes", "sent", "mask")
    },
    **{
        f"{name} in pieces": ({name: np.zeros((5, 2), np.int8 if name in ("spikes", "sent") else np.int32).T}, "in one piece")
        for name in ("potential", "counts", "saturations", "activity", "drive", "spikes", "sent")
    },
    "potentials of one sample": ({"potential": np.zeros(10, np.int32)}, "potentials are"),
    "a threshold of 0": ({"threshold": 0}, "threshold 0"),
    "a threshold beyond 32 bits": ({"threshold": 2**31}, "threshold 2147483648"),
    "a negative reset": ({"reset": -1}, "reset -1"),
    "a reset beyond 32 bits": ({"reset": 2**40}, "reset"),
}


@compiled
@pytest.mark.parametrize("name", STATES)
def test_a_state_that_would_leave_its_arrays_is_refused(name: str) -> None:
    ticks.State(**_state())
    changes, said = STATES[name]
    with pytest.raises(ToolchainError, match=f"^the native kernel cannot take this: .*{said}"):
        ticks.State(**{**_state(), **changes})


ADVANCES: dict[str, tuple[dict[str, Any], str]] = {
    "a message too short": ({"messages": [np.zeros((2, 4), np.int8)]}, r"'message' must be .*\(2, 5\)"),
    "a message in floats": ({"messages": [np.zeros(SHAPE, np.float32)]}, "and not float32"),
    "a message of 64 bits": ({"messages": [np.zeros(SHAPE, np.int64)]}, "and not int64"),
    "a message in pieces": ({"messages": [np.zeros((2, 10), np.int8)[:, ::2]]}, "in one piece"),
    "nine messages": ({"messages": [np.zeros(SHAPE, np.int8)] * 9}, "9 messages"),
    "what waits in another shape": ({"waiting": np.zeros(10, np.int32)}, "'waiting'"),
    "what waits in 16 bits": ({"waiting": np.zeros(SHAPE, np.int16)}, "and not int16"),
    "a bias for each sample": ({"bias": np.zeros(SHAPE, np.int32)}, r"'bias' must be an array of int32 \(5,\)"),
    "a short bias": ({"bias": np.zeros(4, np.int32)}, "'bias'"),
    "an instruction set this machine lacks": ({"instructions": 99}, "instruction set 99"),
}


@compiled
@pytest.mark.parametrize("name", ADVANCES)
def test_what_does_not_fit_a_step_s_state_is_refused(name: str) -> None:
    state = _state()
    couples = ticks.State(**state)
    arguments: dict[str, Any] = {
        "messages": [np.ones(SHAPE, np.int8)] * 8,
        "waiting": np.ones(SHAPE, np.int32),
        "bias": np.ones(5, np.int32),
        "instructions": 0,
    }
    assert couples.advance(**arguments) == 10
    assert (state["potential"] == 8).all()
    changes, said = ADVANCES[name]
    with pytest.raises(ToolchainError, match=f"^the native kernel cannot take this: .*{said}"):
        couples.advance(**{**arguments, **changes})
    assert (state["potential"] == 8).all()


@compiled
@pytest.mark.parametrize(
    ("waiting", "message", "said"),
    [
        (np.zeros(4, np.int32), np.zeros(5, np.int8), "'waiting'"),
        (np.zeros(5, np.int16), np.zeros(5, np.int8), "and not int16"),
        (np.zeros(10, np.int32)[::2], np.zeros(5, np.int8), "in one piece"),
        (np.zeros(5, np.int32), np.zeros(5, np.int64), "and not int64"),
        (np.zeros(5, np.int32), np.zeros(10, np.int8)[::2], "in one piece"),
    ],
)
def test_a_message_that_does_not_fit_what_waits_is_refused(waiting: Any, message: Any, said: str) -> None:
    with pytest.raises(ToolchainError, match=f"^the native kernel cannot take this: .*{said}"):
        ticks.collect(waiting, message, instructions=0)


@compiled
def test_arrays_live_as_long_as_what_points_into_them() -> None:
    """Nobody else holds them: a kernel that kept addresses alone would read what is no more."""
    way, state, currents = ticks.Way(**_arguments()), ticks.State(**_state()), []
    for _ in range(20):
        rubbish = [np.full(n, -1, np.int32) for n in (5, 6, 10, 12, 15, 20, 54, 60)]
        out = np.zeros((1, 60), np.int32)
        way.deliver(np.ones((1, 40), np.int8), out, sums=4, instructions=0)
        currents.append(out)
        assert state.advance([], instructions=0) == 0
        del rubbish
    assert all(np.array_equal(out, currents[0]) for out in currents)


@pytest.mark.skipif(compiler is None, reason="no C compiler here")
def test_the_script_builds_what_the_package_builds(tmp_path: Path) -> None:
    """`.ci/build-native` knows the sources by pyproject.toml, so it cannot forget one; its flags come last."""
    built = tmp_path / "built.so"
    subprocess.run([sys.executable, ROOT / ".ci" / "build-native", built, "-O0"], timeout=120, check=True)
    environment = {**os.environ, native.LIBRARY_VARIABLE: str(built)}
    code = "from toolchain import native; print(native.loaded()._name, native.missing())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(built), "None"]


@pytest.mark.parametrize(
    ("samples", "threads", "at_most"), [(0, 2, None), (1, 8, None), (37, 1, None), (37, 1, 5), (37, 3, None), (37, 3, 2), (5, 64, 1)]
)
def test_samples_are_shared_out_once_each_in_spans_that_end_soon(samples: int, threads: int, at_most: int | None) -> None:
    spans: list[tuple[int, int]] = []
    native.in_pieces(samples, threads, lambda first, last: spans.append((first, last)), at_most=at_most)
    assert sorted(sample for first, last in spans for sample in range(first, last)) == list(range(samples))
    assert all(last - first <= (at_most or samples) for first, last in spans)


def test_an_interruption_of_one_thread_is_heard_between_spans() -> None:
    begun: list[int] = []

    def interrupted(first: int, last: int) -> None:
        begun.append(first)
        if first >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        native.in_pieces(100, 1, interrupted, at_most=10)
    assert begun == [0, 10]
