"""However a lava-sim run ends, it ends: one message, within seconds, and nothing stays behind."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import msgspec
import pytest

from toolchain.describe import processes
from toolchain.errors import ToolchainError, UsageError
from toolchain.passes.retime import Retime
from toolchain.targets.lava_sim import LAVA_SIM, LavaSim

pytestmark = [pytest.mark.lava, pytest.mark.skipif(LAVA_SIM.available() is not None, reason=str(LAVA_SIM.available()))]

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10.0 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
"""In which everything ends on a machine that is free; one that many share takes as many times longer."""


def _alive(pid: int) -> bool:
    """Whether a process still runs; one that ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _children_of(pid: int) -> set[int]:
    return {int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()}


def _gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(_alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(_alive(pid) for pid in pids)


def _shared_files() -> set[str]:
    return set(os.listdir("/dev/shm")) - _mapped()


def _mapped() -> set[str]:
    """What a process that lives has in its memory, such as the semaphores of tests beside this one: nobody has left that behind."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            found |= {line.rpartition("/dev/shm/")[2] for line in maps.read_text().splitlines() if "/dev/shm/" in line}
    return found


def _nothing_new(before: set[str]) -> bool:
    """Semaphores have a name for an instant while anybody makes one: look again for a while."""
    end = time.monotonic() + 2
    while _shared_files() - before and time.monotonic() < end:
        time.sleep(0.05)
    return not _shared_files() - before


@pytest.fixture
def network(random_graph: Any, random_inputs: Any) -> tuple[Any, Any, Any]:
    graph = Retime()(random_graph(3, couples=2))
    return (graph, *random_inputs(graph, 4))


def test_an_exception_in_a_process_is_one_message(network: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from toolchain.targets.lava_sim.processes import population_models

    graph, inputs, _ = network
    run_spk = population_models.CoupleFixed.run_spk

    def broken(self: Any) -> None:
        if multiprocessing.current_process().name == "couple1" and self.tick == 3:
            raise ValueError("injected on purpose")
        run_spk(self)

    monkeypatch.setattr(population_models.CoupleFixed, "run_spk", broken)
    run = LAVA_SIM.compile(graph)
    children = [child.pid for child in run._network._runtime.children]
    before = time.monotonic()
    with pytest.raises(ToolchainError, match=r"^Lava process 'couple1' raised ValueError: injected on purpose") as caught:
        run.run(inputs)
    assert "\n" not in str(caught.value)
    assert "in broken" in str(caught.value.__cause__)
    assert time.monotonic() - before < SECONDS
    assert _gone(children, 1)
    with pytest.raises(ToolchainError, match="injected on purpose"):
        run.run(inputs)
    run.close()
    assert capfd.readouterr().out == ""


def test_an_exception_in_a_synapse_and_in_the_building_of_one(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolchain.targets.lava_sim.processes import synapse_models

    graph, inputs, _ = network

    def broken(self: Any, *parameters: Any) -> None:
        raise MemoryError("injected on purpose")

    for method in ("run_spk", "__init__"):
        with monkeypatch.context() as patch:
            patch.setattr(synapse_models._SynapseModel, method, broken)
            with (
                LAVA_SIM.compile(graph) as run,
                pytest.raises(ToolchainError, match=r"-> .* ran out of memory \(injected on purpose\): lower --batch, end other"),
            ):
                run.run(inputs)


@pytest.mark.parametrize("which", [0, 3, -1])
def test_a_killed_process_is_one_message(network: Any, which: int) -> None:
    """Also the runtime service, which is the last."""
    graph, inputs, _ = network
    with LavaSim(batch=2).compile(graph) as run:
        run.run(inputs)
        children = [child.pid for child in run._network._runtime.children]
        threading.Timer(0.3, os.kill, (children[which], signal.SIGKILL)).start()
        before = time.monotonic()
        with pytest.raises(ToolchainError, match="was ended by signal 9"):
            run.run(inputs.repeat(5000, axis=0))
        assert time.monotonic() - before < SECONDS
        assert _gone(children, 1)


def test_a_process_killed_between_runs(network: Any) -> None:
    graph, inputs, _ = network
    with LAVA_SIM.compile(graph) as run:
        run.run(inputs)
        os.kill(run._network._runtime.children[1].pid, signal.SIGKILL)
        with pytest.raises(ToolchainError, match="was ended by signal 9"):
            run.run(inputs)


def test_a_network_that_stands_still_passes_its_deadline(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolchain.targets.lava_sim.processes import synapse_models

    graph, inputs, _ = network
    monkeypatch.setattr(synapse_models._SynapseModel, "run_spk", lambda self: time.sleep(600))
    with LavaSim(deadline=0.5).compile(graph) as run, pytest.raises(ToolchainError, match=r"stood still for 0\.5 s"):
        run.run(inputs)


def test_closing_twice_and_running_after(network: Any) -> None:
    graph, inputs, _ = network
    run = LAVA_SIM.compile(graph)
    children = [child.pid for child in run._network._runtime.children]
    run.close()
    run.close()
    assert _gone(children, 1)
    with pytest.raises(ToolchainError, match="closed: compile the graph again"):
        run.run(inputs)


@pytest.mark.parametrize("synapses", ["own", "stock"])
def test_an_error_names_one_of_two_synapses_that_join_the_same_populations(
    network: Any, synapses: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolchain.targets.lava_sim import runtime

    graph, inputs, _ = network
    forward = graph.phase("forward")
    (twice,) = (synapse for synapse in forward.synapses if synapse.target == "readout")
    doubled = msgspec.structs.replace(forward, synapses=(*forward.synapses, twice))
    graph = msgspec.structs.replace(graph, phases=(doubled, *graph.phases[1:]))
    one, two = (f"{twice.source} -> readout (forward) {number}" for number in (1, 2))
    names = [process.name for process in processes(graph)]
    assert {one, two} < set(names)
    assert len(set(names)) == len(names)
    live = runtime._live

    def broken(*parameters: Any) -> None:
        if multiprocessing.current_process().name == two:
            monkeypatch.setattr(runtime, "one_blas_thread", lambda: 1 / 0)  # in this child
        live(*parameters)

    monkeypatch.setattr(runtime, "_live", broken)
    with LavaSim(synapses=synapses).compile(graph) as run, pytest.raises(ToolchainError) as caught:
        run.run(inputs[:1])
    assert str(caught.value).startswith(f"Lava process '{two}' raised ZeroDivisionError")


def test_ctrl_c_while_a_network_fails_to_start_is_not_lost(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both at once: the user's wish to end comes before the error."""
    from toolchain.targets.lava_sim import runtime

    @contextlib.contextmanager
    def failing() -> Iterator[None]:
        os.kill(os.getpid(), signal.SIGINT)
        raise OSError(24, "Too many open files")
        yield

    monkeypatch.setattr(runtime, "forking", failing)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            LAVA_SIM.compile(network[0])
        assert isinstance(caught.value.__context__, OSError)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_nothing_is_left_open(network: Any) -> None:
    """File descriptors, threads, shared memory files, and Lava's own list of processes stay as they were."""
    from lava.magma.core.process.process import ProcessServer

    graph, inputs, _ = network

    def held() -> tuple[int, int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count(), len(ProcessServer().processes)

    def once() -> None:
        with LAVA_SIM.compile(graph) as run:
            run.run(inputs)

    once()
    time.sleep(0.2)
    gc.collect()  # what the errors of other tests held
    before, files = held(), _shared_files()
    for _ in range(3):
        once()
    time.sleep(0.2)
    assert held() == before
    assert _nothing_new(files)


def _victim(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).parent / "lava_victim.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("to_group", [False, True])
def test_a_signal_ends_the_command_and_its_children(signum: signal.Signals, to_group: bool) -> None:
    """Ctrl-C goes to the whole group, other signals to the command alone: both ways for each."""
    files = _shared_files()
    victim = _victim("forever")
    assert victim.stdout is not None
    children = [int(word) for word in victim.stdout.readline().split()]
    assert len(children) > 3
    time.sleep(0.1)
    before = time.monotonic()
    (os.killpg if to_group else os.kill)(victim.pid, signum)
    try:
        out, err = victim.communicate(timeout=SECONDS)
    finally:
        for pid in [victim.pid, *children] if victim.poll() is None else []:  # what did not end would take the cores from every other test
            os.kill(pid, signal.SIGKILL)
    assert time.monotonic() - before < SECONDS
    assert victim.returncode in (-signum, 1, 130)
    assert _gone(children, 2)
    assert out == ""
    assert err.count("KeyboardInterrupt") == (1 if signum == signal.SIGINT else 0), err
    assert _nothing_new(files)


def test_an_unclosed_network_does_not_keep_the_interpreter() -> None:
    victim = _victim("unclosed")
    out, err = victim.communicate(timeout=SECONDS + 10)
    assert (victim.returncode, out, err) == (0, "ran\n", "")


def test_another_start_method_is_refused(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.get_start_method", lambda allow_none: "spawn")
    with pytest.raises(UsageError, match="start method 'fork'"):
        LAVA_SIM.compile(network[0])


def test_a_fork_of_the_program_leaves_the_network_alone(network: Any) -> None:
    """A process forked by somebody else (a data loader, a pool) holds the same objects; its end must not be theirs."""
    graph, inputs, _ = network
    with LAVA_SIM.compile(graph) as run:
        before = run.run(inputs)
        forked = os.fork()
        if forked == 0:
            run.close()
            os._exit(0)
        os.waitpid(forked, 0)
        again = run.run(inputs)
    assert all((again.counts[name] == counts).all() for name, counts in before.counts.items())


def test_a_daemonic_process_can_run_a_network(network: Any) -> None:
    """Workers of pools and clusters are daemonic, and multiprocessing lets those have no children."""
    graph, inputs, _ = network
    ours, theirs = multiprocessing.get_context("fork").Pipe()

    def work() -> None:
        with LAVA_SIM.compile(graph) as run:
            theirs.send(run.run(inputs).counts)

    worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    worker.start()
    assert ours.poll(SECONDS)
    counts = ours.recv()
    worker.join(SECONDS)
    assert worker.exitcode == 0
    with LAVA_SIM.compile(graph) as run:
        assert all((run.run(inputs).counts[name] == found).all() for name, found in counts.items())


def test_in_threads_at_once_after_torch_ran_in_several(network: Any) -> None:
    """Notebook servers and web applications run code in other threads than the main one; torch's own threads are there when processes are forked."""
    import torch

    graph, inputs, _ = network
    with LAVA_SIM.compile(graph) as run:
        expected = run.run(inputs).counts
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(600, 600) @ torch.ones(600, 600)
        busy = threading.Event()
        spinning = threading.Thread(target=lambda: all(not busy.wait(0.001) for _ in iter(lambda: sum(range(1000)), -1)), daemon=True)
        spinning.start()

        def once(_: int) -> list[bool]:
            with LAVA_SIM.compile(graph) as run:
                torch.ones(600, 600) @ torch.ones(600, 600)
                return [bool((run.run(inputs).counts[name] == counts).all()) for name, counts in expected.items()]

        with ThreadPoolExecutor(2) as pool:
            assert all(all(same) for same in pool.map(once, range(2)))
    finally:
        busy.set()
        spinning.join()
        torch.set_num_threads(threads)


def test_multiprocessing_may_still_look_at_the_children_of_a_network_that_has_ended(network: Any) -> None:
    """It does where another thread starts a process meanwhile: it asks every child that it has met whether it lives."""
    graph, _, _ = network
    with LAVA_SIM.compile(graph) as run:
        children = list(run._network._runtime.children)
    assert {child.exitcode for child in children} == {-signal.SIGKILL}
    assert not any(child.is_alive() for child in children)


def test_two_networks_at_once_and_one_ends(network: Any, random_graph: Any, random_inputs: Any) -> None:
    graph, inputs, _ = network
    other = Retime()(random_graph(5, couples=1))
    theirs, _ = random_inputs(other, 3)
    with LAVA_SIM.compile(graph) as run:
        expected = run.run(inputs).counts
        with LAVA_SIM.compile(other) as second:
            second.run(theirs)
            os.kill(second._network._runtime.children[0].pid, signal.SIGKILL)
            with pytest.raises(ToolchainError, match="was ended by signal 9"):
                second.run(theirs)
        assert all((run.run(inputs).counts[name] == counts).all() for name, counts in expected.items())


def test_where_the_machine_gives_no_more_processes(network: Any) -> None:
    """One sentence, and what had started is gone."""
    import resource

    graph, _, _ = network
    before = _children_of(os.getpid())
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, limit[1]))
    try:
        with pytest.raises(ToolchainError, match=r"^cannot start the \d+ processes of this Lava network \(Too many open files\)") as caught:
            LAVA_SIM.compile(graph)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert "\n" not in str(caught.value)
    assert _children_of(os.getpid()) == before


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(28, "No space left on device"), "make room in /dev/shm, where semaphores are"),
        (OSError(12, "Cannot allocate memory"), "raise what `ulimit -n` and `ulimit -u` allow, or free memory"),
    ],
)
def test_what_processes_cannot_start_without_is_named(network: Any, error: OSError, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolchain.targets.lava_sim import runtime

    @contextlib.contextmanager
    def failing() -> Iterator[None]:
        raise error
        yield

    monkeypatch.setattr(runtime, "forking", failing)
    with pytest.raises(ToolchainError, match=r"^cannot start the \d+ processes of this Lava network \(.*\): " + remedy):
        LAVA_SIM.compile(network[0])


def test_the_log_of_the_program_is_left_alone(network: Any) -> None:
    """Each process of Lava adds a printer to the root logger: every message would come out once more for each."""
    graph, _, _ = network
    before = list(logging.getLogger().handlers)
    LAVA_SIM.compile(graph).close()
    assert logging.getLogger().handlers == before


def test_an_exception_in_the_last_tick_is_not_taken_for_the_end(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for this process any more: Lava answers the host, which must not take that for a result."""
    from toolchain.targets.lava_sim.processes import population_models

    graph, inputs, _ = network

    def broken(self: Any) -> None:
        if self.role is not None and self.role.name == "readout":
            raise ValueError("injected on purpose")

    monkeypatch.setattr(population_models._Integrating, "_end_sample", broken)
    for target in (LAVA_SIM, LavaSim(synapses="stock")):
        with target.compile(graph) as run, pytest.raises(ToolchainError, match="'readout' raised ValueError: injected on purpose"):
            run.run(inputs[:1])


def _endurance() -> Any:
    spec = spec_from_file_location("endurance", ROOT / "benchmarks" / "endurance.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["endurance"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_program_that_measures_endurance() -> None:
    """Its short form: `make endurance` takes 200 cycles and 60 trials."""
    command = [sys.executable, str(ROOT / "benchmarks" / "endurance.py"), "--cycles", "6", "--trials", "3", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, last = done.stdout.splitlines()
    record = json.loads(last)
    assert record["problems"] == []
    assert len(record["endings"]) == 3
    assert f"3 runs ended at random moments, seed 1; {sum(ending['redrawn'] for ending in record['endings'])} more" in done.stdout
    assert {name: record["runs"][name] for name in ("cycles", "children", "threads_more", "descriptors_more", "files")} == {
        "cycles": 6,
        "children": 0,
        "threads_more": 0,
        "descriptors_more": 0,
        "files": 0,
    }


def test_a_job_that_swallows_a_signal_is_counted_as_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    endurance = _endurance()
    monkeypatch.setattr(endurance, "DONE", 0.3)
    monkeypatch.setattr(
        endurance, "MARK", "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.write({pipe}, b'.')\n"
    )
    monkeypatch.setattr(endurance, "LIBRARY", "time.sleep(1.2)\nprint('done')\n")
    ending = endurance.trial("SIGTERM", endurance.Job("deaf", (), (), library=True), 0.2, "done\n", random.Random(0))
    assert (ending.problem, ending.redrawn) == ("exit code 0 and not -15: done\n", 0)
    assert endurance.before(False, 90.0, 0, "")
    assert endurance.before(True, 0.1, 0, "toolchain: epoch 1 of 2\n")
    assert not endurance.before(True, 0.1, 0, "toolchain: interrupted\n")
    assert not endurance.before(True, 0.1, 130, "")


def test_what_is_measured_of_memory() -> None:
    """A leak is told from noise, and from a step."""
    growth = _endurance().growth
    noise = [400 + 0.2 * (i % 3) for i in range(100)]
    assert growth(noise)[0] == pytest.approx(0, abs=0.001)
    assert growth([value + 5 * (i > 60) for i, value in enumerate(noise)])[0] == pytest.approx(0, abs=0.004)
    assert growth([value + 0.05 * i for i, value in enumerate(noise)])[0] == pytest.approx(0.05, abs=0.002)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("deploy", "6"), ("learn", "6"), ("deploy", "3", "stop")], ids=" ".join)
def test_processes_killed_or_stopped_at_random_moments(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """`killing.py` does it, and judges how commands end: with the whole result or one sentence, and nothing left behind."""
    verb, kills, *how = arguments
    command = [sys.executable, str(Path(__file__).parent / "killing.py"), "children", verb, kills, str(tmp_path / "streams"), *how]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
