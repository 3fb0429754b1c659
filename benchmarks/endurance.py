"""Whether runs on lava-sim always end, and leave nothing: many in one process, and many ended at random moments in every way.

python benchmarks/endurance.py [--cycles 200] [--trials 60] [--seed 0]

First part: compile, run both phases and close, again and again in one process, mnist-fc and a small residual convolutional net in turn. After each
cycle: children, threads, file descriptors, files under /dev/shm, and the resident memory. The memory may not grow by more than a page a cycle.
Second part: commands that are interrupted, terminated, killed, robbed of a child, or have an exception in a process of each kind, at a moment drawn
between their first import and their end. Each must end within 10 s with one message and the right exit code, and leave no process and no shared memory.
The last line of the output is all of it as JSON; exit code 1 where anything failed. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

LIMIT = 10.0
"""Seconds in which everything must have ended."""

DONE = 0.3 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
"""Seconds after an event in which a job that was done before it may still end well, on a machine that is free; one that many share takes as many times
longer. A job that ends well later has swallowed the event."""

PATIENCE = 90.0
"""Seconds that a command may take until the event happens."""

WARM = 60
"""Cycles before memory is judged: caches and the allocator's pools fill, in steps of some MiB."""

NOISE = 4.0
"""KiB, a page: the growth a cycle that counts as none."""

APART = 30
"""Cycles between two looks at the memory that are compared."""

STEPS = 0.02
"""The part of the memory that single steps may add in all cycles."""

ONE_POOL = (-8, 1)
"""glibc's M_ARENA_MAX: threads that come and go share one pool, else each new one may take a fresh pool, and memory goes up and down by steps."""

SAMPLES = 8
"""In a cycle's run of each phase."""

EVENTS = ("Ctrl-C", "SIGTERM", "child killed", "parent killed")

MARK = """
import os
from toolchain.__main__ import main
os.write({pipe}, b".")
"""
"""What a victim does first: it says that the command begins, which then imports all it needs."""

FAULT = """
import random
from toolchain.targets.lava_sim import runtime
claim, free = os.pipe()
os.set_blocking(claim, False)
os.write(free, b"!")
live = runtime._live

def with_fault(builder, *rest):
    name, build = builder.proc_model.implements_process.__name__ if hasattr(builder, "proc_model") else "", builder.build

    def built():
        model = build()
        if name == {kind!r}:
            run_spk, left = model.run_spk, [int(2000 ** random.Random(f"{seed} {{os.getpid()}}").random())]

            def raising():
                left[0] -= 1
                if left[0] == 0:
                    try:
                        os.write({pipe}, os.read(claim, 1))
                    except BlockingIOError:
                        return run_spk()
                    raise ArithmeticError("injected on purpose")
                return run_spk()

            model.run_spk = raising
        return model

    builder.build = built
    live(builder, *rest)

runtime._live = with_fault
"""
"""The exception: `run_spk` of a process of class {kind}, whatever it does, raises at a random call, in the process that gets there first."""

COMMAND = """
import sys
sys.argv[0] = "toolchain"
main()
"""

LIBRARY = """
import sys
import numpy as np
from toolchain import artifact
from toolchain.targets.lava_sim import LAVA_SIM
with LAVA_SIM.compile(artifact.read(sys.argv[1]).graph) as run:
    for _ in range(20):
        run.run(np.random.default_rng(0).random((64, 1, 28, 28)))
        run.run(np.ones((64, 400)), phase="feedback")
print("done")
"""


@dataclass(frozen=True)
class Job:
    """What is started: a command's words (after `toolchain`), or a script of a library user (`words` is then its file's name)."""

    name: str
    words: tuple[str, ...]
    kinds: tuple[str, ...]
    """Classes of its Lava processes, in which exceptions are injected"""
    library: bool = False


@dataclass(frozen=True)
class Ending:
    """How one trial ended; `problem` is None where everything was right."""

    event: str
    job: str
    moment: float
    seconds: float
    problem: str | None
    redrawn: int
    """Trials before this one, in which the job was done before the event"""


def small_net() -> Any:
    """Untrained: 4 channels of 7 x 7 on a stream of relays, with one convolutional loop."""
    import torch
    from torch import nn

    from toolchain.layers import FeedbackSNN

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loop = nn.Conv2d(4, 4, 3, 1, 1)
        nn.init.uniform_(loop.weight, -0.1, 0.1)
        return FeedbackSNN(
            name="small-residual",
            input_shape=(1, 28, 28),
            input=nn.Conv2d(1, 4, 5, 4, 2),
            hidden=[nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4)],
            skips=[(0, 2, nn.Identity())],
            relays=(0, 2),
            feedback=[(3, 1, loop)],
            readout=nn.Linear(4 * 7 * 7, 10),
            time_steps=12,
            feedback_steps=12,
        ).eval()


def state(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; None where there is no such process, or only what its parent has yet to collect."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields


def members(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for name in os.listdir("/proc"):
        fields = state(int(name)) if name.isdigit() else None
        if fields is not None and int(fields[3]) == session:
            found.append(int(name))
    return found


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return found


def unused_files(since: set[str]) -> set[str]:
    """Files of Python's multiprocessing and of joblib's under /dev/shm that were not there and that no living process has mapped: somebody left them.

    A file that is being made is there for a moment, and one of a killed process until its tracker has tidied up: look again, for `LIMIT` seconds at most.
    """
    fresh = {name for name in set(os.listdir("/dev/shm")) - since if name.startswith(("sem.mp-", "sem.loky-", "psm_", "pym-"))}
    until = time.monotonic() + LIMIT
    while fresh and time.monotonic() < until:
        time.sleep(0.1)
        maps = "".join(text for pid in os.listdir("/proc") if pid.isdigit() for text in _maps(int(pid)))
        fresh = {name for name in fresh & set(os.listdir("/dev/shm")) if name not in maps}
    return fresh


def _maps(pid: int) -> Iterator[str]:
    try:
        yield "".join(line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/dev/shm" in line)
    except OSError:
        return


# ---- many cycles in one process


def cycles(count: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """`count` networks compiled, run and closed; what was found, and what is wrong with it."""
    import numpy as np

    from toolchain.compiler import graph_for
    from toolchain.source import find
    from toolchain.targets.lava_sim import LAVA_SIM

    ctypes.CDLL(None).mallopt(*ONE_POOL)
    draw = np.random.default_rng(seed)
    graphs = [graph_for(find("mnist-fc"), LAVA_SIM), graph_for(find(small_net()), LAVA_SIM)]
    files = set(os.listdir("/dev/shm"))
    memory: list[float] = []
    held: list[tuple[int, int, int]] = []
    began = time.perf_counter()
    for graph in islice(cycle(graphs), count):
        with LAVA_SIM.compile(graph) as run:
            run.run(draw.random((SAMPLES, 1, 28, 28)))
            run.run(draw.normal(size=(SAMPLES, *graph.population(graph.phase("feedback").drive[0].population).shape)), phase="feedback")
        del run
        gc.collect()
        settled(held[0] if held else None)
        held.append(holding())
        memory.append(resident())
    seconds = time.perf_counter() - began
    judged = memory[WARM:] or memory
    slope, whole = growth(judged)
    left = {"children": held[-1][0], "threads_more": held[-1][1] - held[0][1], "descriptors_more": held[-1][2] - held[0][2]}
    left["files"] = len(unused_files(files))
    found = {
        "cycles": count,
        "seconds": round(seconds, 1),
        **left,
        "memory_mib": [round(memory[0], 1), round(memory[-1], 1)],
        "every_20th_mib": [round(value, 1) for value in memory[::20]],
        "growth_kib_a_cycle": round(1024 * slope, 2),
        "with_steps_kib_a_cycle": round(1024 * whole, 2),
    }
    problems = [f"{number} {what} left after {count} cycles" for what, number in left.items() if number > 0]
    if count >= 2 * WARM and (1024 * slope > NOISE or whole * len(judged) > STEPS * memory[-1]):  # fewer cycles say nothing
        problems.append(f"the memory grows by {1024 * slope:.1f} KiB a cycle, with its steps {1024 * whole:.1f} KiB: see every_20th_mib")
    return found, problems


def holding() -> tuple[int, int, int]:
    """Children, threads, file descriptors of this process."""
    return len(children(os.getpid())), threading.active_count(), len(os.listdir("/proc/self/fd"))


def settled(first: tuple[int, int, int] | None) -> None:
    """Threads take a moment to end."""
    until = time.monotonic() + 2
    while first is not None and holding() > first and time.monotonic() < until:
        time.sleep(0.01)


def resident() -> float:
    """MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(memory: list[float]) -> tuple[float, float]:
    """MiB a cycle: the median of the slopes over `APART` cycles, and the slope from the first to the last.

    A leak is in both. What grows by a step of some MiB now and then (the allocator's pools, the interpreter's tables) is in the second only.
    """
    slopes = [(after - before) / APART for before, after in zip(memory, memory[APART:], strict=False)]
    return (statistics.median(slopes), (memory[-1] - memory[0]) / (len(memory) - 1)) if slopes else (0.0, 0.0)


# ---- endings


def jobs(folder: Path) -> list[Job]:
    """What is ended: every kind of process is in one of them."""
    import toolchain

    chain, residual = folder / "chain.fsnn", folder / "residual.fsnn"
    toolchain.compile("mnist-fc", output=chain, time_steps=12, feedback_steps=12)
    toolchain.compile(small_net(), input="graded", output=residual)
    lava = ("--target", "lava-sim")
    return [
        Job("deploy, own synapses", ("deploy", str(residual), *lava, "--batch", "16"), ("Couple", "Relay", "Readout", "Input", "Synapse")),
        Job("deploy, stock synapses", ("deploy", str(chain), *lava, "--synapses", "stock", "--samples", "300"), ("Dense", "Couple")),
        Job("verify, both phases", ("verify", str(chain), "--targets", "sim,lava-sim", "--samples", "300"), ("Couple", "Synapse")),
        Job("learn", ("learn", "digits-fc", *lava, "--dataset", "digits", "--epochs", "2", "--samples", "320"), ("Plastic", "Couple")),
        Job("library", (str(chain),), ("Couple", "Synapse"), library=True),
    ]


def endings(count: int, seed: int) -> list[Ending]:
    """`count` trials: each event on each job and an exception in each kind of process in turn, in a random order, as often as it takes."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        known = jobs(Path(name))
        plan = [(event, job) for job in known for event in EVENTS] + [(f"exception in {kind}", job) for job in known for kind in job.kinds]
        draw.shuffle(plan)
        whole_runs = {job.name: undisturbed(job) for job in dict.fromkeys(job for _, job in islice(cycle(plan), count))}
        found: list[Ending] = []
        for event, job in islice(cycle(plan), count):
            found.append(trial(event, job, *whole_runs[job.name], draw))
            last = found[-1]
            say(f"{len(found)}/{count} {event}, {job.name}, after {last.moment:.2f} s: {last.problem or f'ended in {last.seconds:.2f} s'}")
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Victim:
    """A job started as a session of its own; it writes "." into a pipe before its first import and "!" where it raises on purpose."""

    def __init__(self, job: Job, kind: str | None, seed: int) -> None:
        self.pipe, theirs = os.pipe()
        script = MARK + ("" if kind is None else FAULT) + (LIBRARY if job.library else COMMAND)
        script = (
            script.replace("{pipe}", str(theirs))
            .replace("{kind!r}", repr(kind))
            .replace("{seed}", str(seed))
            .replace("{{", "{")
            .replace("}}", "}")
        )
        self.folder = tempfile.TemporaryDirectory()  # what it saves for --resume goes with it
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": self.folder.name}
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *job.words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            pass_fds=[theirs],
            start_new_session=True,
        )
        os.close(theirs)
        self.began = time.monotonic()
        self.heard(PATIENCE)
        self.began = time.monotonic()

    def heard(self, seconds: float) -> bool:
        """Whether something comes through the pipe in time; not where all ended."""
        ready, _, _ = select.select([self.pipe], [], [], seconds)
        return bool(ready) and bool(os.read(self.pipe, 1))

    def ended(self, since: float) -> tuple[float, int | None, str, str, list[int]]:
        """Seconds until all processes were gone, exit code, streams, and who was still there at the limit (they are killed)."""
        out, err, code = "", "", None
        try:
            out, err = self.process.communicate(timeout=max(0.1, since + LIMIT - time.monotonic()))
            code = self.process.returncode
        except subprocess.TimeoutExpired:
            pass
        while members(self.process.pid) and time.monotonic() < since + LIMIT:
            time.sleep(0.02)
        seconds, left = time.monotonic() - since, members(self.process.pid)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        if code is None:
            self.process.communicate()
        os.close(self.pipe)
        self.folder.cleanup()
        return seconds, code, out, err, left


def undisturbed(job: Job) -> tuple[float, str]:
    """Seconds that a job takes when nobody disturbs it, and what it prints."""
    victim = Victim(job, None, 0)
    out, err = victim.process.communicate(timeout=PATIENCE)
    os.close(victim.pipe)
    if victim.process.returncode != 0:
        raise SystemExit(f"endurance: '{job.name}' fails even when nobody disturbs it: {err or out}")
    return time.monotonic() - victim.began, out


def trial(event: str, job: Job, length: float, printed: str, draw: random.Random) -> Ending:
    """One event at one moment of `length` seconds; drawn anew where the job was done before it. Undisturbed it prints `printed`."""
    redrawn = 0
    while True:
        files, seed = set(os.listdir("/dev/shm")), draw.randrange(2**31)
        moment = draw.uniform(0, length)
        victim = Victim(job, event.removeprefix("exception in ") if event.startswith("exception") else None, seed)
        happened = strike(event, victim, moment, draw)
        since = time.monotonic()
        seconds, code, out, err, left = victim.ended(since if happened else since + PATIENCE)
        # a child that had nothing left to do: the whole result is there (only a job that prints no times prints the same twice)
        whole = event == "child killed" and code == 0 and out == printed and not spoken(err)
        if left or not (whole or before(happened, seconds, code, err)):
            problem = verdict(event, job, code, out, err, left)
            lost = unused_files(files)
            problem = problem or (f"left {', '.join(sorted(lost))} in /dev/shm" if lost else None)
            return Ending(event, job.name, since - victim.began, seconds, problem, redrawn)
        redrawn += 1


def before(happened: bool, seconds: float, code: int | None, err: str) -> bool:
    """Whether a job that ended so was done before its event: it never came, or found the job about to leave, `seconds` later."""
    return code == 0 and (not happened or (seconds < DONE and not spoken(err)))


def strike(event: str, victim: Victim, moment: float, draw: random.Random) -> bool:
    """Make the event happen `moment` seconds after the first import (an exception comes by itself); False where the job was done before."""
    process = victim.process
    if event.startswith("exception"):
        return victim.heard(PATIENCE)
    until = victim.began + moment
    while time.monotonic() < until and process.poll() is None:
        time.sleep(0.002)
    while event == "child killed" and process.poll() is None and not children(process.pid):
        time.sleep(0.01)
    if process.poll() is not None:
        return False
    try:
        if event == "child killed":
            os.kill(draw.choice(children(process.pid)), signal.SIGKILL)
        elif event == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGTERM if event == "SIGTERM" else signal.SIGKILL)
    except (IndexError, ProcessLookupError):
        return False
    return True


def verdict(event: str, job: Job, code: int | None, out: str, err: str, left: list[int]) -> str | None:
    """What is wrong with an ending; None where nothing is."""
    if left or code is None:
        return f"{len(left)} processes were still there after {LIMIT:g} s"
    expected, message = expectation(event, job.library)
    if code != expected:
        return f"exit code {code} and not {expected}: {out[-200:]}{err[-2000:]}"
    if out and event != "parent killed":
        return f"printed a result all the same: {out[:200]}"
    said = spoken(err)
    if job.library:  # a traceback, or a chain of them, each with its own last line
        said = [line for line in said if re.match(r"KeyboardInterrupt|toolchain\.errors\.", line)]
    if message is None and said:
        return f"said something: {err[-2000:]}"
    if message is not None and (len(said) != 1 or not re.search(message, said[0])):
        return f"did not say '{message}' once and nothing else: {err[-2000:]}"
    return None


def spoken(err: str) -> list[str]:
    """What a job said, but for what `learn` reports as it goes, and `deploy` of what is saved."""
    beside = re.compile(r"toolchain: (epoch |(all [\d,]+ )?samples .* are done on \S+ and saved for --resume)")
    return [line for line in err.splitlines() if line and not beside.match(line)]


def expectation(event: str, library: bool) -> tuple[int, str | None]:
    """Exit code and message. In a library nobody catches signals: Python's own ways to end."""
    if event == "parent killed":
        return -signal.SIGKILL, None
    if event == "SIGTERM":
        return (-signal.SIGTERM, None) if library else (143, "^toolchain: terminated$")
    if event == "Ctrl-C":
        return (-signal.SIGINT, "^KeyboardInterrupt$") if library else (130, "^toolchain: interrupted$")
    start = "^toolchain.errors.ToolchainError: " if library else "^toolchain: "
    if event == "child killed":
        return 1, start + "Lava process '.*' was ended by signal 9"
    return 1, start + "Lava process '.*' raised ArithmeticError: injected on purpose"


def tabulated(found: list[Ending]) -> list[list[str]]:
    rows = []
    for event in sorted({ending.event for ending in found}):
        mine = [ending for ending in found if ending.event == event]
        worst = max(mine, key=lambda ending: ending.seconds)
        wrong = sum(ending.problem is not None for ending in mine)
        seconds = [ending.seconds for ending in mine]
        rows.append([event, str(len(mine)), f"{statistics.median(seconds):.2f}", f"{worst.seconds:.2f}", worst.job, str(wrong)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    from toolchain.notation import table
    from toolchain.versions import versions

    machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
    ended = endings(asked.trials, asked.seed) if asked.trials else []  # first: this process is small then
    found, problems = cycles(asked.cycles, asked.seed) if asked.cycles else ({}, [])
    problems += [f"{ending.event}, {ending.job}, after {ending.moment:.2f} s: {ending.problem}" for ending in ended if ending.problem]
    if found:
        print(
            f"{asked.cycles} networks compiled, run (both phases, {SAMPLES} samples) and closed in one process, mnist-fc and small-residual in turn"
        )
        print("\n".join(table(["left behind", "found"], [[name.replace("_", " "), str(value)] for name, value in found.items()])))
    if ended:
        redrawn = sum(ending.redrawn for ending in ended)
        print(f"\n{len(ended)} runs ended at random moments, seed {asked.seed}; {redrawn} more were done before their event")
        head = ["event", "n", "median s", "slowest s", "slowest in", "wrong"]
        print("\n".join(table(head, tabulated(ended))))
    print("\n".join([f"{machine}; " + ", ".join(f"{name} {version}" for name, version in versions().items()), *problems]))
    record = {
        "seed": asked.seed,
        "machine": machine,
        "versions": versions(),
        "runs": found,
        "endings": [vars(ending) for ending in ended],
        "problems": problems,
    }
    print(json.dumps(record))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
