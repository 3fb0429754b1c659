"""`deploy` and `compare` that fail or are ended save what they found; --resume goes on from it to the record of an uninterrupted run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

import toolchain
from toolchain import crews, files, partial, seen, shards
from toolchain.deploy import Deployment
from toolchain.errors import ToolchainError, UsageError
from toolchain.questions import digest as digest_of
from toolchain.shards import Message
from toolchain.targets.lava_sim import LAVA_SIM
from toolchain.versions import versions

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = import_module("toolchain.deploy")
SAMPLES = 300
needs_joblib = pytest.mark.skipif(find_spec("joblib") is None, reason="joblib is not installed (extra 'cluster')")
needs_lava = pytest.mark.skipif(LAVA_SIM.available() is not None, reason=str(LAVA_SIM.available()))
TIMED = {"startup_seconds", "seconds", "samples_per_second", "retries"}


Fail = Callable[..., None]


@pytest.fixture(autouse=True)
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where answers are saved."""
    monkeypatch.setattr(partial, "_root", lambda: tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """`fail(after, error)`: from now on the pieces after so many raise; `fail(None)`: none does."""
    see, left = seen.Watch.see, [10**9]
    raised: list[BaseException] = [Exception()]

    def seeing(watch: seen.Watch, images: Any, first: int) -> seen.Seen:
        left[0] -= 1
        if left[0] < 0:
            raise raised[0]
        return see(watch, images, first)

    def set_(after: int | None, error: BaseException | None = None) -> None:
        left[0] = 10**9 if after is None else after
        raised[0] = error or ToolchainError("a process died: run again")

    monkeypatch.setattr(seen.Watch, "see", seeing)
    return set_


def files_of(saved: Path) -> list[str]:
    return sorted(path.name for path in saved.glob("*/*"))


def untimed(found: Any) -> Any:
    """JSON without what takes time."""
    if isinstance(found, dict):
        return {name: untimed(value) for name, value in found.items() if name not in TIMED}
    return [untimed(value) for value in found] if isinstance(found, list) else found


def digits(target: str = "reference", samples: int = SAMPLES, **options: Any) -> Deployment:
    return toolchain.deploy("digits-fc", target=target, dataset="digits", samples=samples, **options)


def record(found: Deployment) -> dict[str, Any]:
    """All of a record but its timings; `retries` too, since the two runs have their own."""
    arrays = {f"rates.{name}": rates for name, rates in found.rates.items()} | {
        name: getattr(found, name) for name in ("predictions", "labels", "logits")
    }
    sums = {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}
    return {name: value for name, value in found.to_json().items() if name not in TIMED} | sums


def ended(fail: Fail, after: int, **options: Any) -> str:
    """What a run says that fails after so many pieces."""
    fail(after)
    with pytest.raises(ToolchainError) as caught:
        digits(**options)
    fail(None)
    return str(caught.value)


PIECE = 100


@pytest.fixture(autouse=True)
def _small_pieces_saved_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """How slow the machine is decides nothing here."""
    monkeypatch.setattr(seen, "CHUNK", PIECE)
    monkeypatch.setattr(partial, "EVERY", float("inf"))


@pytest.fixture(scope="module")
def whole() -> Deployment:
    return digits()


@pytest.mark.parametrize("target", ["reference", "sim", "torch", pytest.param("lava-sim", marks=[pytest.mark.lava, needs_lava])])
def test_a_run_that_failed_goes_on_to_the_result_of_one_that_did_not(
    target: str, fail: Fail, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = digits(target, predictions=tmp_path / "whole.npz")
    assert not saved.exists()
    capsys.readouterr()
    assert ended(fail, 1, target=target, predictions=tmp_path / "parts.npz") == (
        f"a process died: run again; samples 0 to 99 of digits are done on {target} and saved for --resume, samples 100 to 299 are not done"
    )
    assert not (tmp_path / "parts.npz").exists()
    assert capsys.readouterr().err == ""
    parts = digits(target, predictions=tmp_path / "parts.npz", resume=True)
    assert capsys.readouterr().err == f"toolchain: digits-fc on {target} goes on with 100 of 300 samples done\n"
    assert record(parts) == record(uninterrupted)
    assert (tmp_path / "parts.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not any(saved.iterdir())


def test_a_run_resumes_as_often_as_it_takes_and_costs_what_all_of_them_took(fail: Fail, whole: Deployment) -> None:
    for done in (1, 1, 0):
        ended(fail, done, resume=True)
    fail(0)  # only the third piece is left, and it is not asked for twice
    with pytest.raises(ToolchainError, match="samples 0 to 199 of digits are done on reference and saved"):
        digits(resume=True)
    fail(1)
    assert record(digits(resume=True)) == record(whole)


def test_a_run_that_starts_anew_says_what_is_saved_and_loses_none_of_it(
    fail: Fail, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(fail, 2)
    assert ended(fail, 1).endswith(
        "samples 0 to 99 of digits are done on reference (as many are saved for --resume by an earlier run), samples 100 to 299 are not done"
    )
    assert capsys.readouterr().err == (
        "toolchain: 200 of the 300 samples on digits-fc on reference are saved from an earlier run; --resume goes on from them\n"
    )
    assert files_of(saved) == ["000000-200.answers", "question.json"]
    digits()
    assert not any(saved.iterdir())


def test_what_came_is_saved_every_few_seconds_and_new_files_take_the_place_of_old_ones(
    fail: Fail, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(fail, 1)
    monkeypatch.setattr(partial, "EVERY", 0.0)
    monkeypatch.setattr(partial, "LATEST", 0.0)
    found = []
    monkeypatch.setattr(DEPLOY, "write_predictions", lambda *_: found.append(files_of(saved)))
    digits(predictions="never.npz")
    assert found == [[".lock", "000001-200.answers", "000002-100.answers", "question.json"]]


def test_saving_takes_its_share_of_the_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(partial, "EVERY", 2.0)
    answer = Message({}, {"logits": np.zeros(int(partial.BYTES_PER_SECOND * 0.1) // 8)})
    asked = partial.Question("a", "b", "c", 10, dict, lambda part: np.zeros(0), lambda part, found: True, 0)
    kept = partial.Partial(asked, saves=True)
    monkeypatch.setattr(kept, "save", lambda: saves.append(now[0]))
    saves: list[float] = []
    for now[0] in (0.1, 1.9, 2.1, 4.9, 5.1):  # a tenth of a second of saving is due after five
        kept._unsaved = []
        kept.add(slice(0, 1), answer, np.zeros(0))
    assert saves == [5.1]


def test_predictions_that_cannot_be_written_cost_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Fail, whole: Deployment
) -> None:
    def full(*_: object) -> None:
        raise ToolchainError("cannot write 'p.npz' (No space left on device): make room there, then give the command again")

    with monkeypatch.context() as patch:
        patch.setattr(DEPLOY, "write_predictions", full)
        with pytest.raises(ToolchainError, match=r"all 300 samples of digits are done on reference and saved for --resume$"):
            digits(predictions=tmp_path / "p.npz")
    fail(0)
    assert record(digits(predictions=tmp_path / "p.npz", resume=True)) == record(whole)


def test_another_question_gets_none_of_the_answers(
    fail: Fail, saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(fail, 1)
    coarser: Any = toolchain.compile("digits-fc", target="sim", weight_bits=6).artifact
    newer = {**versions(), "toolchain": "9.9"}
    for model, samples, found, differs in (
        ("digits-fc", 299, versions(), "number of samples"),
        (coarser, SAMPLES, versions(), "network"),
        ("digits-fc", SAMPLES, newer, "version of toolchain"),
    ):
        monkeypatch.setattr(DEPLOY, "versions", lambda found=found: found)
        capsys.readouterr()
        toolchain.deploy(model, target="reference", dataset="digits", samples=samples, resume=True)
        said = capsys.readouterr().err
        assert said == f"toolchain: nothing is saved of digits-fc on reference with this {differs}: it starts with the first sample\n"
    assert files_of(saved) == ["000000-100.answers", "question.json"]


def test_a_question_without_an_answer_is_none(fail: Fail, saved: Path, whole: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    """As where the disk took no more than the question, or the process was killed right after it."""
    ended(fail, 1)
    (file,) = saved.glob("*/*.answers")
    file.rename(file.with_name(".000000-100.answers.77.part"))
    assert record(digits(resume=True)) == record(whole)
    assert capsys.readouterr().err == "toolchain: nothing is saved of digits-fc on reference: it starts with the first sample\n"


def test_every_weight_and_setting_of_a_module_counts() -> None:
    from toolchain import models
    from toolchain.compiler import lowered
    from toolchain.source import find

    def digest(change: Any = None) -> str:
        module = models.load("digits-fc")
        if change is not None:
            change(module)
        source = find(module)
        return digest_of(lowered(find("digits-fc")), source)

    def nudge(module: Any) -> None:
        module.readout.weight.data[3, 4] += 2**-20

    assert digest() == digest()
    assert (
        len(
            {
                digest(),
                digest(nudge),
                digest(lambda m: setattr(m, "time_steps", 29)),
                digest(lambda m: setattr(m, "weighted_readout", False)),
            }
        )
        == 4
    )


def forged(rows: Any) -> bytes:
    body = msgspec.msgpack.encode((1.0, rows))
    return hashlib.sha256(body).digest() + body


def packed(**arrays: Any) -> bytes:
    return msgspec.msgpack.encode(({"spikes": 0.0, "operations": 0.0, "saturations": 0, "clipped_currents": 0, "seconds": 0.0}, arrays))


HOSTILE = {
    "empty": b"",
    "garbage": b"\x80\x04\x95" * 1000,
    "other rows": forged([[0, 100]]),
    "outside": forged([(0, 10**12, b"", packed())]),
    "negative": forged([(-5, 5, b"", packed())]),
    "objects": forged([(0, 100, b"", packed(logits=("|O", (100, 10), b"\0" * 8000)))]),
    "huge": forged([(0, 100, b"", packed(logits=("<f8", (2**40, 2**40), b"")))]),
    "no kind": forged([(0, 100, b"", packed(logits=("(1,", (100, 10), b"")))]),
    "other shape": forged([(0, 100, b"", packed(logits=("<f8", (100, 11), b"\0" * 8800)))]),
    "no facts": forged([(0, 100, b"", msgspec.msgpack.encode(({}, {})))]),
    "nested": forged([(0, 100, b"", b"\x91" * 100_000)]),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_damaged_or_hostile_file_is_left_out_with_a_sentence(
    content: bytes, fail: Fail, saved: Path, whole: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(fail, 1)
    (file,) = saved.glob("*/*.answers")
    file.write_bytes(content)
    assert record(digits(resume=True)) == record(whole)
    assert capsys.readouterr().err.splitlines() == [
        f"toolchain: '{file}' is damaged or answers other inputs: samples in it run again",
        "toolchain: digits-fc on reference goes on with 0 of 300 samples done",
    ]


def test_a_flipped_bit_and_other_inputs_are_left_out(fail: Fail, saved: Path, whole: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    ended(fail, 1)
    (file,) = saved.glob("*/*.answers")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert record(digits(resume=True)) == record(whole)
    ended(fail, 1)
    load = DEPLOY.data.load

    def changed(*names: Any, **options: Any) -> Any:
        found = load(*names, **options)
        found.images[17] = 0
        return found

    monkeypatch.setattr(DEPLOY.data, "load", changed)
    assert record(digits(resume=True)) == record(digits())


def test_a_second_run_that_resumes_is_refused(
    fail: Fail, saved: Path, monkeypatch: pytest.MonkeyPatch, whole: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(partial, "PATIENCE", 0.0)
    ended(fail, 1)
    (folder,) = saved.iterdir()
    with files.held(folder):
        with pytest.raises(UsageError, match=rf"another run is writing '{folder}' \(process {os.getpid()} on .*\): wait for its end"):
            digits(resume=True)
        assert record(digits()) == record(whole)  # a run that starts anew does not need it
        capsys.readouterr()
        said = ended(fail, 2)
        assert "toolchain: the answers so far are not saved: another run is writing" in capsys.readouterr().err
        assert "saved for --resume" not in said
    assert files_of(saved) == ["000000-100.answers", "question.json"]


def test_a_run_whose_answers_cannot_be_saved_ends_all_the_same(
    fail: Fail, tmp_path: Path, whole: Deployment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "saved").write_text("a file where the folder should be")
    monkeypatch.setattr(partial, "EVERY", 0.0)
    monkeypatch.setattr(partial, "LATEST", 0.0)
    assert record(digits()) == record(whole)
    said = capsys.readouterr().err
    assert said.startswith("toolchain: the answers so far are not saved: ")
    assert said.count("\n") == 1
    assert ended(fail, 1).endswith("samples 0 to 99 of digits are done on reference, samples 100 to 299 are not done")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_a_shortage_says_what_is_done_and_what_to_do(error: Exception, fail: Fail, whole: Deployment) -> None:
    fail(2, error)
    with pytest.raises(ToolchainError) as caught:
        digits()
    assert "digits-fc on reference ran out of " in str(caught.value)
    less = "" if "threads" in str(caught.value) else "lower --batch or --samples, "
    assert f": {less}end other programs, or raise what `ulimit -" in str(caught.value)
    assert str(caught.value).endswith(
        "samples 0 to 199 of digits are done on reference and saved for --resume, samples 200 to 299 are not done"
    )
    assert caught.value.exit_code == 1
    fail(None)
    assert record(digits(resume=True)) == record(whole)


def test_ctrl_c_says_what_is_saved(fail: Fail, capsys: pytest.CaptureFixture[str]) -> None:
    for after, said in (
        (0, ""),
        (1, "toolchain: samples 0 to 99 of digits are done on reference and saved for --resume, samples 100 to 299 are not done\n"),
    ):
        fail(after, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            digits()
        assert capsys.readouterr().err == said


def test_what_nobody_went_on_with_is_removed_after_a_month(fail: Fail, saved: Path) -> None:
    ended(fail, 1)
    (old,) = saved.iterdir()
    os.utime(old, (0, time.time() - partial.KEPT - 60))
    ended(fail, 1, samples=250)
    assert not old.exists()
    assert len(list(saved.iterdir())) == 1


def test_compare_goes_on_with_the_rows_it_has(fail: Fail, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {"targets": ("torch", "reference", "sim"), "dataset": "digits", "samples": 250, "budget_samples": 0}
    uninterrupted = toolchain.compare("digits-fc", **asked)
    fail(4)
    with pytest.raises(ToolchainError) as caught:
        toolchain.compare("digits-fc", **asked)
    assert str(caught.value) == (
        "a process died: run again; all 250 samples of digits are done on torch and saved for --resume; samples 0 to 99 of digits are done on reference and saved for "
        "--resume, samples 100 to 249 are not done"
    )
    capsys.readouterr()
    fail(5)
    found = toolchain.compare("digits-fc", resume=True, **asked)
    assert [record(row.deployment) for row in found.rows] == [record(row.deployment) for row in uninterrupted.rows]
    assert untimed(found.to_json()) == untimed(uninterrupted.to_json())
    assert capsys.readouterr().err.splitlines() == [
        "toolchain: digits-fc on torch goes on with 250 of 250 samples done",
        "toolchain: digits-fc on reference goes on with 100 of 250 samples done",
        "toolchain: nothing is saved of digits-fc on sim: it starts with the first sample",
    ]
    assert not any(saved.iterdir())


def test_a_target_that_runs_in_place_of_another_is_no_second_question(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolchain.targets.lava_sim import LavaSim

    monkeypatch.setattr(LavaSim, "available", lambda self: "Lava is not here")
    asked: dict[str, Any] = {"targets": ("sim", "lava-sim"), "fallback": "sim", "dataset": "digits", "samples": 250, "budget_samples": 0}
    fail(4)
    with pytest.raises(ToolchainError, match=r"all 250 samples of digits are done on sim and saved for --resume$"):
        toolchain.compare("digits-fc", **asked)
    fail(None)
    assert toolchain.compare("digits-fc", resume=True, **asked).passed


# ---- workers


class Dying:
    """A crew whose workers are killed from their n-th shard on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 10**9
        give = crews.LocalCrew.give

        def giving(crew: crews.LocalCrew, number: int, question: bytes) -> None:
            give(crew, number, question)
            self.left -= bool(question)
            if question and self.left < 0:
                with contextlib.suppress(ProcessLookupError):  # it is dead from last time, and not replaced yet
                    os.kill(next(iter(next(iter(crew._executors.values()))._processes)), signal.SIGKILL)

        monkeypatch.setattr(crews.LocalCrew, "give", giving)


@needs_joblib
def test_workers_that_die_every_time_leave_what_was_answered(
    monkeypatch: pytest.MonkeyPatch, whole: Deployment, saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One worker of its own kind: what it did before it first died is certain. Another process goes on, and a run with other jobs too."""
    dying = Dying(monkeypatch)
    monkeypatch.setattr(shards, "RETRIES", 1)
    monkeypatch.setattr(shards, "FEWEST", 50)
    dying.left = 2
    with pytest.raises(ToolchainError) as caught:
        digits("sim", jobs=2)
    dying.left = 10**9
    found = re.fullmatch(
        r"samples .* of digits failed 2 times, the last time because its worker process was ended .*; samples (.*) of digits are done on sim and saved for --resume, "
        r"samples (.*) are not done",
        str(caught.value),
    )
    assert found is not None, caught.value
    resumed = digits("sim", jobs=2, resume=True)
    assert record(resumed) == record(whole) | {"target": "sim", "ran_on": "sim", "jobs": 2}
    assert resumed.to_json()["jobs"] == 2
    assert not any(saved.iterdir())


@pytest.mark.slow
@needs_joblib
def test_one_process_goes_on_with_what_workers_did_and_the_other_way_round(
    fail: Fail, whole: Deployment, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended(fail, 1, target="sim")
    assert record(digits("sim", jobs=2, resume=True)) == record(whole) | {"target": "sim", "ran_on": "sim", "jobs": 2}
    assert "goes on with 100 of 300 samples done" in capfd.readouterr().err


@pytest.mark.slow
@needs_joblib
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_the_program_that_ends_deployments_at_random_moments() -> None:
    """Its short form: `make endurance-deploy` ends thirty, on every target."""
    words = [str(ROOT / "benchmarks" / "endurance_deploy.py"), "--trials", "2", "--only", "sim, 2 jobs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["problems"] == []


class Short:
    """A session that has no memory for its shard."""

    def __init__(self, job: Message) -> None:
        pass

    def greeting(self) -> Message:
        return Message({})

    def answer(self, question: Message) -> Message:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")

    def close(self) -> None:
        pass


def test_a_worker_that_is_short_of_memory_says_so_and_is_tried_again() -> None:
    job = Message({"toolchain": toolchain.__version__}).packed()
    failure = shards.read_answer(shards.ask(Short, "short", job, Message({}).packed()))
    assert isinstance(failure, shards.Failure)
    assert failure.again
    assert "ran out of memory ([enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator" in failure.message
    assert "lower --jobs or --batch or --samples, end other programs" in failure.message


@needs_joblib
def test_an_answer_that_can_never_come_is_a_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "LOOK", 0.05)
    ended: list[str] = []
    worker = subprocess.Popen(["sleep", "60"])
    executor = SimpleNamespace(
        _executor_manager_thread=threading.Thread(),  # it never started, so it is as dead as one that failed
        _processes={worker.pid: None},
        shutdown=lambda **how: ended.append("executor"),
    )
    with crews.LocalCrew(Short, 2) as crew:
        crew._executors = {0: executor}
        crew._answered.put((7, 0, _answered(b"")))
        with pytest.raises(msgspec.DecodeError):  # what was still said is looked at first
            crew.take()
        crew._free.clear()
        with pytest.raises(MemoryError, match="a worker is watched no more"):
            crew.take()
    assert worker.wait(10) == -signal.SIGKILL
    assert ended == ["executor"]


def _answered(content: bytes) -> Future[bytes]:
    future: Future[bytes] = Future()
    future.set_result(content)
    return future


@needs_joblib
def test_a_shard_that_cannot_be_sent_is_a_shortage_of_memory() -> None:
    from joblib.externals.loky.process_executor import PicklingError

    crew = crews.LocalCrew(Short, 1)
    future: Future[bytes] = Future()
    future.set_exception(PicklingError("Could not pickle the task to send it to the workers."))
    crew._answered.put((0, 0, future))
    with pytest.raises(MemoryError, match="a shard could not be sent to its worker"):
        crew.take()
