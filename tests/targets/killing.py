"""Kills commands, or the Lava processes they start, at random moments, and looks at how they end. Commands are forked, so that each starts at once.

python tests/targets/killing.py learn TARGET KILLS FOLDER            the command itself is killed, and resumed until it is done
python tests/targets/killing.py children VERB KILLS FOLDER [stop]    one of its children is killed, or stopped, which must end it in one sentence
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from toolchain.targets import lava_sim

LEARN = "--dataset digits --samples 80 --epochs 2 --test-samples 20 --batch 8"
VERBS = {
    "learn": f"learn digits-fc --target lava-sim {LEARN}",
    "deploy": "deploy digits-fc --target lava-sim --dataset digits --samples 500 --batch 8",
    "compare": "compare digits-fc --targets sim,lava-sim --dataset digits --samples 100",
    "verify": "verify digits-fc --targets reference,lava-sim --dataset digits --samples 4 --phase both",
}
LONGEST = 60.0
"""Seconds in which everything ends on a busy machine."""

DEADLINE = 2.0
"""Seconds without a tick, here, until a network counts as stuck."""


def started(words: str, folder: Path) -> int:
    """A forked process that runs the command; its streams go to files."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["toolchain", *words.split()]
    from toolchain.__main__ import main

    try:
        main()
    finally:
        os._exit(99)


def ended(pid: int, seconds: float) -> int | None:
    """The exit code of a child, negative for a signal; None where it has not ended in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def awaited(file: Path, pid: int) -> int | None:
    """None when `file` is there, or the exit code of a child that ended before."""
    while not file.exists():
        if (code := ended(pid, 0.001)) is not None:
            return code
    return None


def session_of(leader: int) -> list[int]:
    """The processes that a command started and that still run; its own is not among them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = path.read_text().rsplit(")", 1)[1].split()[:4]
            if int(session) == leader and state != "Z" and int(path.parent.name) != leader:
                found.append(int(path.parent.name))
    return found


def shared_files() -> set[str]:
    """Shared memory and semaphores of multiprocessing, as Lava makes them, that no living process has in its memory."""
    mapped: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped |= {line.rpartition("/dev/shm/")[2] for line in maps.read_text().splitlines() if "/dev/shm/" in line}
    return {name for name in os.listdir("/dev/shm") if name.startswith(("sem.mp-", "psm_"))} - mapped


def left_behind(leader: int, files: set[str]) -> str:
    """What outlives a command after some seconds: processes, shared memory, semaphores."""
    until = time.monotonic() + 5
    while time.monotonic() < until and (session_of(leader) or shared_files() - files):
        time.sleep(0.02)
    orphans, shared = session_of(leader), shared_files() - files
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    return f"orphans {orphans} shared {shared}" if orphans or shared else ""


def kill_learning(target: str, kills: int, folder: Path, draw: random.Random) -> list[str]:
    """The command killed at random moments until so many kills are done, each run resumed to its end; what differs from a run in one go."""
    from toolchain import lesson

    lesson.EVERY = 0.0
    words = f"learn digits-fc --target {target} {LEARN} --weights {'float' if target == 'torch' else 'int8'} -o"
    whole = folder / "whole"
    began = time.monotonic()
    pid = started(f"{words} {whole}", folder)
    awaited(whole / "last.safetensors", pid)
    learns = time.monotonic()
    assert ended(pid, LONGEST) == 0, (folder / "err").read_text()
    takes, lasts = time.monotonic() - began, time.monotonic() - learns
    problems, done = [], 0
    at: Counter[str] = Counter()
    files = shared_files()
    while done < kills:
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        while True:
            resume = (run / "last.safetensors").exists()
            pid = started(f"{words} {run}{' --resume' if resume else ''}", folder)
            early = draw.random() < 0.2
            code = None if early else awaited(run / "last.safetensors", pid)
            code = ended(pid, draw.uniform(0, takes if early else lasts) if done < kills else LONGEST) if code is None else code
            if code is not None:
                break
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            done += 1
            at["updates saved" if (run / "last.safetensors").exists() else "nothing saved"] += 1
            problems += [left] if (left := left_behind(pid, files)) else []
        if code != 0:
            problems.append(f"code {code}: {(folder / 'err').read_text()}")
        elif (run / "learned.fsnn").read_bytes() != (whole / "learned.fsnn").read_bytes() or lines(run) != lines(whole):
            problems.append(f"another result after {done} kills")
    print(f"{done} kills of learn on {target} ({takes:.2f} s in one go, of which {lasts:.2f} s with something saved): {dict(at)}")
    return problems


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


def kill_children(verb: str, kills: int, folder: Path, draw: random.Random, number: signal.Signals) -> list[str]:
    """A random child of the command killed or stopped at a random moment; how the command ended where that was no good end."""
    object.__setattr__(lava_sim.LAVA_SIM, "deadline", DEADLINE)
    files = shared_files()
    began = time.monotonic()
    assert ended(started(VERBS[verb], folder), LONGEST) == 0, (folder / "err").read_text()
    takes = time.monotonic() - began
    problems: list[str] = []
    outcomes: Counter[str] = Counter()
    slowest, done = 0.0, 0
    while done < kills:
        pid = started(VERBS[verb], folder)
        code = ended(pid, draw.uniform(0, takes))
        children = session_of(pid) if code is None else []
        hit = None
        if children:
            with contextlib.suppress(ProcessLookupError):
                hit = draw.choice(children)
                os.kill(hit, number)
                done += 1
        at = time.monotonic()
        if code is None:
            code = ended(pid, LONGEST)
        slowest = max(slowest, time.monotonic() - at)
        lines = (folder / "err").read_text().splitlines()
        said = lines[-1] if lines else ""
        if code is None:
            problems.append(f"hangs: {said}")
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        elif code not in (0, 1) or not all(line.startswith("toolchain: ") for line in lines):
            problems.append(f"code {code}: {lines}")
        if hit is not None:
            kind = (
                "the full result" if code == 0 else " ".join(word for word in said.split() if "'" not in word and not word.isdigit())[:90]
            )
            outcomes[kind] += 1
        problems += [f"after {said!r}: {left}"] if (left := left_behind(pid, files)) else []
    print(f"{done} x {number.name} in {verb} ({takes:.2f} s in one go; at most {slowest:.1f} s until it ended):")
    for outcome, count in outcomes.most_common():
        print(f"  {count:3} {outcome}")
    return problems


def main() -> None:
    import torch

    import toolchain.cli
    import toolchain.compare
    import toolchain.deploy
    import toolchain.learn
    import toolchain.verify

    torch.set_num_threads(1)
    lava_sim.allow_fork()
    import toolchain.targets.lava_sim.learning
    import toolchain.targets.lava_sim.processes.plastic_models
    import toolchain.targets.lava_sim.processes.population_models  # noqa: F401

    what, which, kills, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    draw = random.Random(os.environ.get("SEED", "0"))
    number = signal.SIGSTOP if sys.argv[5:] == ["stop"] else signal.SIGKILL
    problems = kill_learning(which, kills, folder, draw) if what == "learn" else kill_children(which, kills, folder, draw, number)
    for problem in problems:
        print(f"BAD {problem}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
