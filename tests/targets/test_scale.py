"""Several workers share the samples of `deploy`: the result is that of one process, a lost worker loses nothing, and nothing stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toolchain
from toolchain import crews, partial, shards
from toolchain.deploy import Deployment
from toolchain.errors import DesignRuleError, ToolchainError, UsageError
from toolchain.shards import Failure, Message, Tries, answers, dealt
from toolchain.targets.lava_sim import LAVA_SIM

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10.0

needs_joblib = pytest.mark.skipif(find_spec("joblib") is None, reason="joblib is not installed (extra 'cluster')")
needs_dask = pytest.mark.skipif(find_spec("distributed") is None, reason="dask and distributed are not installed (extra 'cluster')")
needs_lava = pytest.mark.skipif(LAVA_SIM.available() is not None, reason=str(LAVA_SIM.available()))


def digits(target: str = "lava-sim", samples: int = 40, **options: Any) -> Deployment:
    return toolchain.deploy("digits-fc", target=target, dataset="digits", samples=samples, **options)


def assert_same(found: Deployment, expected: Deployment) -> None:
    """Every number that a target made is equal, sample by sample."""
    for name in ("predictions", "labels", "logits"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert found.rates.keys() == expected.rates.keys()
    for name, rates in expected.rates.items():
        np.testing.assert_array_equal(found.rates[name], rates, err_msg=name)
    timed = {"startup_seconds", "seconds", "samples_per_second", "jobs", "retries"}
    assert {k: v for k, v in found.to_json().items() if k not in timed} == {k: v for k, v in expected.to_json().items() if k not in timed}


def children(pid: int) -> set[int]:
    with contextlib.suppress(OSError):
        return {int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()}
    return set()


def family(pid: int) -> set[int]:
    """All descendants."""
    own = children(pid)
    return own.union(*(family(child) for child in own))


def workers_of(pid: int) -> set[int]:
    """Child processes that loky started, without its resource tracker, which ends with the interpreter."""
    found = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children(pid) if alive(child)}
    return {child for child, command in found.items() if b"loky" in command and b"resource_tracker" not in command}


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


# ---- dealing, travelling, trying again


@pytest.mark.parametrize("samples", [1, 2, 7, 100, 1000, 10_000])
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("batch", [None, 1, 8, 100, 300])
@pytest.mark.parametrize("exact", [True, False])
def test_shards_are_all_samples_in_order(samples: int, workers: int, batch: int | None, exact: bool) -> None:
    parts = dealt(samples, workers, neurons=500, batch=batch, exact=exact)
    assert [number for part in parts for number in range(samples)[part]] == list(range(samples))
    sizes = {len(range(samples)[part]) for part in parts[:-1]}
    assert len(sizes) <= 1
    if exact and samples >= workers * max(batch or 1, 1):
        assert len(parts) > workers / 2
    if not exact and sizes:
        # where one process cuts its batches: every 256 samples, or every batch where that divides 256
        assert sizes.pop() % (batch if batch is not None and 256 % batch == 0 else 256) == 0


def test_shards_are_small_enough_to_see_progress_and_large_enough_to_fill_a_batch() -> None:
    def size(samples: int, workers: int, neurons: int = 500, batch: int | None = None) -> int:
        return dealt(samples, workers, neurons=neurons, batch=batch, exact=True)[0].stop

    assert size(10_000, 2) == 256
    assert size(1_000, 2) == 128
    assert size(10, 2) == 5
    assert size(50_000, 8, neurons=4_500_000) == 2
    assert size(10_000, 2, batch=64) == 256
    assert size(10_000, 2, batch=1000) == 1000


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.float32, np.float64, np.bool_])
def test_messages_arrive_as_they_were_sent(kind: type[np.generic]) -> None:
    arrays = {
        "a": np.arange(12).reshape(3, 4).astype(kind),
        "b": np.zeros((0, 3), kind),
        "c": np.ones((4, 2), kind).T,
        "d": np.array(1).astype(kind),
    }
    message = Message.unpacked(Message({"n": 1, "text": "ü", "list": [1, None, 2.5]}, arrays).packed())
    assert message.facts == {"n": 1, "text": "ü", "list": [1, None, 2.5]}
    assert message.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert message.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(message.arrays[name], array)


class Played:
    """A crew of this process: each question is answered by the next of the given lines, or with itself."""

    def __init__(self, size: int, lines: dict[int, list[Failure]]) -> None:
        self.size = size
        self.asked: list[int] = []
        self._lines = lines
        self._running: deque[tuple[int, bytes]] = deque()

    def room(self) -> bool:
        return len(self._running) < self.size

    def give(self, number: int, question: bytes) -> None:
        assert self.room()
        self.asked.append(number)
        self._running.append((number, question))

    def take(self) -> tuple[int, Message | Failure]:
        number, question = self._running.pop()  # the last comes first
        lines = self._lines.get(number, [])
        return number, lines.pop(0) if lines else Message({"echo": question.decode()})


def ask(crew: Played, count: int, tries: Tries) -> dict[int, str]:
    questions = [(lambda n=n: str(n).encode()) for n in range(count)]
    return {n: a.facts["echo"] for n, a in answers(crew, questions, [f"samples {n}" for n in range(count)], tries)}


def test_a_shard_that_failed_is_run_again_and_nothing_is_lost() -> None:
    crew, tries = Played(2, {1: [Failure("it died")] * 3, 4: [Failure("it died")]}), Tries()
    assert ask(crew, 6, tries) == {n: str(n) for n in range(6)}
    assert tries.again == 4
    assert crew.asked.count(1) == 4


def test_a_shard_that_fails_four_times_ends_the_run_with_one_sentence() -> None:
    crew = Played(2, {1: [Failure("its worker was ended: use fewer jobs", detail="Traceback")] * 9})
    with pytest.raises(
        ToolchainError, match=r"^samples 1 failed 4 times, the last time because its worker was ended: use fewer jobs$"
    ) as caught:
        ask(crew, 6, Tries())
    assert crew.asked.count(1) == 4
    assert str(caught.value.__cause__) == "Traceback"


@pytest.mark.parametrize(("code", "kind"), [(1, ToolchainError), (2, UsageError), (3, DesignRuleError)])
def test_what_would_fail_again_is_not_tried_again(code: int, kind: type[ToolchainError]) -> None:
    crew = Played(1, {0: [Failure("too large: make it smaller", exit_code=code, again=False)]})
    with pytest.raises(kind, match=rf"^{'samples 0: ' if code == 1 else ''}too large: make it smaller$"):
        ask(crew, 3, Tries())
    assert crew.asked == [0]


class Counting:
    """A session that counts what is open; a shard called "fail" raises what it is told to."""

    open = 0

    def __init__(self, job: Message) -> None:
        self._error = {"dead child": ToolchainError("a child died"), "bad option": UsageError("no such option")}.get(
            job.facts.get("error", "")
        )
        type(self).open += 1

    def greeting(self) -> Message:
        return Message({"hello": 1})

    def answer(self, question: Message) -> Message:
        if self._error is not None:
            raise self._error
        return question

    def close(self) -> None:
        type(self).open -= 1


def test_a_worker_keeps_a_job_open_until_it_fails_ends_or_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Message({"toolchain": toolchain.__version__}).packed()
    question = Message({"n": 5}).packed()
    assert Message.unpacked(shards.ask(Counting, "a", job, b"")).facts == {"hello": 1}
    for _ in range(3):
        assert Message.unpacked(shards.ask(Counting, "a", job, question)).facts == {"n": 5}
    assert Counting.open == 1
    shards.end("a")
    assert Counting.open == 0
    for error, again, code in (("dead child", True, 1), ("bad option", False, 2)):
        failing = Message({"toolchain": toolchain.__version__, "error": error}).packed()
        failure = shards.read_answer(shards.ask(Counting, "b", failing, question))
        assert isinstance(failure, Failure)
        assert (failure.again, failure.exit_code) == (again, code)
        assert Counting.open == 0
    monkeypatch.setattr(shards, "IDLE", 0.1)
    shards.ask(Counting, "c", job, question)
    assert Counting.open == 1
    assert within(2, lambda: Counting.open == 0)


def test_a_job_that_is_asked_at_the_last_moment_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next question comes just before the time is up, and takes longer than even a job's end would wait for it."""
    job = Message({"toolchain": toolchain.__version__}).packed()
    question = Message({"n": 5}).packed()
    seen = []

    class Slow(Counting):
        def answer(self, question: Message) -> Message:
            time.sleep(0.3)
            seen.append(Slow.open)
            return super().answer(question)

    stop = shards._stop_timer
    monkeypatch.setattr(shards, "PATIENCE", 0.05)
    monkeypatch.setattr(shards, "IDLE", 0.2)
    shards.ask(Slow, "e", job, b"")
    monkeypatch.setattr(shards, "IDLE", 60.0)
    monkeypatch.setattr(shards, "_stop_timer", lambda name: (time.sleep(0.4), stop(name)))
    try:
        shards.ask(Slow, "e", job, question)
        time.sleep(0.2)
        assert (seen, Slow.open) == ([1], 1)
    finally:
        shards.end("e")
    assert Slow.open == 0


def test_a_worker_of_another_version_says_so() -> None:
    failure = shards.read_answer(shards.ask(Counting, "d", Message({"toolchain": "9.9"}).packed(), b""))
    assert isinstance(failure, Failure)
    assert f"has toolchain {toolchain.__version__} and the job comes from 9.9: install the same version" in failure.message
    assert not failure.again


# ---- processes of this machine


@pytest.mark.parametrize(("options", "needed"), [({"jobs": 2}, "joblib"), ({"scheduler": "tcp://127.0.0.1:1"}, "dask and distributed")])
def test_what_is_not_installed_is_one_sentence(options: dict[str, Any], needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=rf"needs {needed}, which this environment lacks: run pip install \"fsnn-toolchain\[cluster\]\""):
        digits("sim", **options)


def test_jobs_beside_a_scheduler_are_refused() -> None:
    with pytest.raises(UsageError, match="give jobs or a scheduler"):
        digits("sim", jobs=2, scheduler="tcp://127.0.0.1:1")


@needs_joblib
@pytest.mark.lava
@needs_lava
def test_two_lava_runtimes_find_what_one_does(tmp_path: Path) -> None:
    alone = digits(batch=4)
    both = digits(batch=4, jobs=2, predictions=tmp_path / "out.npz")
    assert_same(both, alone)
    assert (both.to_json()["jobs"], alone.to_json()["jobs"]) == (2, 1)
    assert "retries" not in both.to_json()
    assert "2 jobs shared the samples" in both.to_text()
    with np.load(tmp_path / "out.npz") as written:
        np.testing.assert_array_equal(written["predictions"], alone.predictions)
    assert workers_of(os.getpid()) == set()


@needs_joblib
@pytest.mark.parametrize("target", ["reference", "sim", "torch"])
def test_every_target_can_be_shared(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    """torch: 300 samples are two pieces of 256 and 44 either way, so sums of floats are the same too."""
    samples = 20 if target == "reference" else 300
    assert_same(digits(target, samples, jobs=2), digits(target, samples))
    assert capfd.readouterr() == ("", "")


@needs_joblib
def test_an_artefact_and_a_checkpoint_can_be_shared_a_module_of_the_program_cannot(tmp_path: Path) -> None:
    from toolchain import models

    compiled = toolchain.compile("digits-fc", target="sim", output=tmp_path / "digits.fsnn")
    options: dict[str, Any] = {"dataset": "digits", "samples": 12}
    assert compiled.output is not None
    assert_same(
        toolchain.deploy(compiled.output, target="sim", jobs=2, **options), toolchain.deploy(compiled.output, target="sim", **options)
    )
    weights = ROOT / "models" / "digits_fc.safetensors"
    assert_same(toolchain.deploy(weights, target="torch", jobs=2, **options), toolchain.deploy(weights, target="torch", **options))
    with pytest.raises(UsageError, match="workers get no pickles"):
        toolchain.deploy(models.load("digits-fc"), target="torch", jobs=2, **options)


@needs_joblib
def test_a_worker_s_user_error_is_the_user_s_own() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this error needs a machine without CUDA")
    with pytest.raises(UsageError, match="cuda") as shared:
        digits("sim", device="cuda", jobs=2)
    with pytest.raises(UsageError) as alone:
        digits("sim", device="cuda")
    assert str(shared.value) == str(alone.value)


def killing(victim: Callable[[Any], int], at: int) -> Callable[[Any], None]:
    """A `give` that kills `victim` right after it gave its question number `at` (from 1; 0: after every one)."""
    given = 0

    def watched(give: Any) -> Any:
        def then(self: Any, number: int, question: bytes) -> None:
            nonlocal given
            give(self, number, question)
            given += bool(question)
            if question and at in (0, given):
                os.kill(victim(self), signal.SIGKILL)

        return then

    return watched


def first_worker(crew: crews.LocalCrew) -> int:
    return next(iter(crew._executors[min(crew._executors)]._processes))


@needs_joblib
@pytest.mark.lava
@needs_lava
@pytest.mark.parametrize("who", ["worker", "lava child"])
def test_a_lost_worker_loses_nothing(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = first_worker if who == "worker" else lambda crew: max(children(first_worker(crew)))
    monkeypatch.setattr(crews.LocalCrew, "give", killing(victim, 4)(crews.LocalCrew.give))
    found = digits(batch=2, jobs=2)
    assert found.to_json()["retries"] >= 1
    monkeypatch.undo()
    assert_same(found, digits(batch=2))


@needs_joblib
def test_workers_that_die_every_time_end_the_run_with_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "RETRIES", 1)
    monkeypatch.setattr(crews.LocalCrew, "give", killing(first_worker, 0)(crews.LocalCrew.give))
    with pytest.raises(ToolchainError) as ended:
        digits("reference", 5, jobs=2)
    found = re.fullmatch(
        r"samples (0 to 2|3 to 4) of digits failed 2 times, the last time because its worker process was ended.*fewer jobs or a smaller batch; (.*)",
        str(ended.value),
    )
    assert found is not None, str(ended.value)
    failed, rest = found.groups()
    other = {"0 to 2": "3 to 4", "3 to 4": "0 to 2"}[failed]
    assert rest in (  # the other worker may have answered by then
        "none of the 5 samples of digits is done on reference",
        f"samples {other} of digits are done on reference and saved for --resume, samples {failed} are not done",
    )


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled once: a command that reads it starts without torch."""
    path = tmp_path_factory.mktemp("compiled") / "mnist.fsnn"
    toolchain.compile("mnist-fc", output=path)
    return path


def command(artefact: Path, folder: Path, *words: str) -> subprocess.Popen[str]:
    """It runs long enough to be ended in the middle; its cache lies in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "toolchain", "deploy", str(artefact), "--target", "lava-sim", "--synapses", "stock", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder)},
        start_new_session=True,
    )


def told(err: str) -> list[str]:
    """What an ended command said, but for the samples that it may have done by then."""
    return [
        line
        for line in err.splitlines()
        if not re.fullmatch(r"toolchain: samples .* are done on lava-sim and saved for --resume, samples .*", line)
    ]


@needs_joblib
@pytest.mark.lava
@needs_lava
@pytest.mark.parametrize(
    ("sent", "code", "moment"),
    [(signal.SIGINT, 130, "starting"), (signal.SIGINT, 130, "running"), (signal.SIGTERM, 143, "running"), (signal.SIGKILL, -9, "running")],
    ids=["ctrl-c-at-the-start", "ctrl-c", "term", "kill"],
)
def test_a_signal_ends_the_command_and_all_its_workers(
    sent: signal.Signals, code: int, moment: str, artefact: Path, tmp_path: Path
) -> None:
    """Ctrl-C goes to the whole group, as a terminal sends it; the others to the command alone."""
    process = command(artefact, tmp_path, "--jobs", "2")
    least = 2 if moment == "starting" else 12
    try:
        assert within(60, lambda: len(workers_of(process.pid)) == 2 and len(family(process.pid)) >= least), process.communicate()
        time.sleep(0.2)
        started = family(process.pid)
        before = time.monotonic()
        (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
        out, err = process.communicate(timeout=SECONDS + 5)
    finally:
        process.kill()
    assert process.returncode == code
    assert within(SECONDS - (time.monotonic() - before), lambda: not any(alive(pid) for pid in started))
    assert out == ""
    if sent != signal.SIGKILL:  # after which loky's resource tracker says what it tidied up
        assert told(err) == [{130: "toolchain: interrupted", 143: "toolchain: terminated"}[code]]


# ---- a cluster


class Cluster:
    """A Dask scheduler and workers on the loopback interface, as a user starts them: processes of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []
        facts = folder / "scheduler.json"
        self.start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(facts))
        self.address = ""

        def answers() -> bool:
            with contextlib.suppress(OSError, ValueError):
                self.address = json.loads(facts.read_text())["address"]
            return bool(self.address)

        assert within(30, answers)

    def start(self, what: str, *options: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "distributed.cli.dask_scheduler" if what == "scheduler" else "distributed.cli.dask_worker",
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (self._folder / f"{len(self._started)}.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, *options], env=environment, stdout=log, stderr=log, cwd=self._folder, start_new_session=True
            )
        self._started.append(process)
        return process

    def worker(self, *options: str) -> subprocess.Popen[bytes]:
        """A worker with one thread; it has joined the scheduler when this returns."""
        before = self.workers()
        process = self.start("worker", self.address, "--nthreads", "1", "--no-dashboard", "--local-directory", str(self._folder), *options)
        assert within(30, lambda: self.workers() > before), process.poll()
        return process

    def workers(self) -> int:
        return (self._folder / "0.log").read_text().count("Register worker")

    def close(self) -> None:
        """Workers first. How Dask ends on a request is not ours to test, and takes long; Python's resource trackers stay to unlink a Nanny's semaphores."""
        for process in reversed(self._started):
            for pid in (process.pid, *family(process.pid)):
                with contextlib.suppress(OSError):
                    if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def pair(cluster: Cluster) -> tuple[int, int]:
    """Two workers, by process: one that Dask's Nanny watches over, which makes it a daemonic process, and one by itself."""
    nanny, single = cluster.worker(), cluster.worker("--no-nanny")
    return max(children(nanny.pid), key=lambda pid: len(Path(f"/proc/{pid}/maps").read_text())), single.pid


@needs_dask
def test_a_scheduler_without_workers_is_one_sentence(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "ANSWER", 1.0)
    with pytest.raises(
        UsageError, match=rf"the scheduler at '{cluster.address}' has no workers: start some with `dask worker {cluster.address}"
    ):
        digits("sim", scheduler=cluster.address)


@needs_dask
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "127.0.0.1:1", "nowhere.invalid:8786", "http://127.0.0.1:1", "no address", ""])
def test_a_scheduler_that_does_not_answer_is_one_sentence(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "ANSWER", 1.0)
    before = time.monotonic()
    with pytest.raises(
        UsageError, match=r"no Dask scheduler answers at '.*' \(.*\): start one with `dask scheduler`, or correct --scheduler$"
    ) as caught:
        digits("sim", scheduler=address)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - before < SECONDS


@needs_dask
def test_something_else_that_listens_is_no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(crews, "ANSWER", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(UsageError, match="no Dask scheduler answers"):
        digits("sim", scheduler=f"tcp://127.0.0.1:{server.getsockname()[1]}")


@needs_dask
@pytest.mark.lava
@needs_lava
def test_two_workers_of_a_cluster_host_a_lava_runtime_each(
    cluster: Cluster, pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second job finds them as the first did."""
    hosting = []
    take = crews.DaskCrew.take
    monkeypatch.setattr(crews.DaskCrew, "take", lambda crew: hosting.append([len(children(pid)) for pid in pair]) or take(crew))
    alone = digits(batch=4)
    for _ in range(2):
        found = digits(scheduler=cluster.address, batch=4)
        assert_same(found, alone)
        assert found.to_json()["jobs"] == 2
        assert "retries" not in found.to_json()
        assert within(2, lambda: not any(children(pid) for pid in pair))  # the job is over and its runtimes closed
    assert min(min(each) for each in hosting) > 3


@needs_dask
@pytest.mark.lava
@needs_lava
def test_a_worker_without_a_shard_starts_nothing(cluster: Cluster, pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    hosting = []
    take = crews.DaskCrew.take
    monkeypatch.setattr(crews.DaskCrew, "take", lambda crew: hosting.append(sorted(len(children(pid)) for pid in pair)) or take(crew))
    assert digits(scheduler=cluster.address, samples=1).to_json()["jobs"] == 1
    ((idle, busy),) = hosting
    assert idle == 0
    assert busy > 3


@needs_dask
def test_workers_of_another_version_are_refused(cluster: Cluster, pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "__version__", "9.9")
    with pytest.raises(UsageError, match=r"worker on .* has toolchain .* and the job comes from 9\.9: install the same version on both"):
        digits("sim", scheduler=cluster.address)


@needs_dask
def test_a_job_on_a_cluster_that_failed_goes_on(
    cluster: Cluster, pair: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(partial, "_root", lambda: tmp_path)
    monkeypatch.setattr(shards, "FEWEST", 20)
    add = partial.Partial.add

    def failing(kept: partial.Partial, *answer: Any) -> None:
        add(kept, *answer)
        if kept.done == 120:
            raise ToolchainError("the scheduler is gone: look at what it prints")

    with monkeypatch.context() as patch:
        patch.setattr(partial.Partial, "add", failing)
        with pytest.raises(
            ToolchainError, match=r"gone: look at what it prints; samples .* of digits are done on sim and saved for --resume, samples"
        ):
            digits("sim", samples=320, scheduler=cluster.address)
    assert_same(digits("sim", samples=320, scheduler=cluster.address, resume=True), digits("sim", samples=320))
    assert capsys.readouterr().err == "toolchain: digits-fc on sim goes on with 120 of 320 samples done\n"
    assert not any(tmp_path.iterdir())


@needs_dask
@pytest.mark.lava
@needs_lava
def test_ctrl_c_ends_a_job_on_a_cluster_and_leaves_the_cluster(
    cluster: Cluster, pair: tuple[int, int], artefact: Path, tmp_path: Path
) -> None:
    process = command(artefact, tmp_path, "--scheduler", cluster.address)
    try:
        assert within(60, lambda: all(len(children(pid)) > 3 for pid in pair)), process.communicate()
        time.sleep(0.5)
        before = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS + 5)
    finally:
        process.kill()
    assert (process.returncode, out, told(err)) == (130, "", ["toolchain: interrupted"])
    assert within(SECONDS - (time.monotonic() - before), lambda: not any(children(pid) for pid in pair))
    assert all(alive(pid) for pid in pair)


@needs_dask
@pytest.mark.lava
@needs_lava
def test_a_lost_worker_of_a_cluster_loses_nothing(cluster: Cluster, pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last test of this cluster: one of its two workers is killed in the middle."""

    def busy(crew: crews.DaskCrew) -> int:
        """The second worker, as soon as it has begun with a shard."""
        address = next(address for address, pid in crew._client.run(os.getpid).items() if pid == pair[1])
        end = time.monotonic() + SECONDS
        while all(event["worker"] != address for _, event in crew._client.get_events(crew._name)):
            assert time.monotonic() < end
        return pair[1]

    monkeypatch.setattr(crews.DaskCrew, "give", killing(busy, 4)(crews.DaskCrew.give))
    found = digits(scheduler=cluster.address, samples=240, batch=1)
    assert not alive(pair[1])
    assert found.to_json()["retries"] >= 1
    assert_same(found, digits(samples=240, batch=1))
