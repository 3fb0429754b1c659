"""Whether deployments and comparisons that are ended at random moments go on to the very record of one that nobody disturbed.

python benchmarks/endurance_deploy.py [--trials 30] [--seed 0]

Commands on sim with two jobs, on sim, lava-sim (own and stock synapses, stock with two jobs), torch and reference, and a comparison, in turn. Each is ended at a moment drawn over its whole
length, or soon after it first saved something: the command killed (SIGKILL), one of its processes killed, Ctrl-C, or SIGTERM. Then `--resume`, which is ended again in two of three trials, and `--resume` to the end. The
record must be the undisturbed one in every field but the times and `retries`, the predictions the same file, and no process, no shared memory and no saved answer may be left. Answers are
saved every 50 ms here, not every 2 s, since these runs are short. The last line of the output is all of it as JSON; exit code 1 where anything failed. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from endurance import LIMIT, children, members, say, unused_files

from toolchain.notation import table
from toolchain.versions import versions

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 180.0
"""Seconds that a command may take."""

SOON = 0.5
"""Seconds after the first saved answer in which half of all events happen: starting takes most of the time."""

REDRAWN = 5
"""So often a moment is drawn anew where the command was done before it."""

SCRIPT = """
import os, sys
from toolchain import partial, seen, shards
from toolchain.cli import main
partial.EVERY = partial.LATEST = 0.05
seen.CHUNK = shards.FEWEST = 20
os.write(int(sys.argv.pop()), b".")
sys.argv[0] = "toolchain"
main()
"""
"""The command with short pauses between saves, and small pieces; it writes "." where it begins."""

COMMANDS = {
    "sim, 2 jobs": "deploy mnist-fc --target sim --jobs 2 --dataset mnist-1k",
    "lava-sim": "deploy mnist-fc --target lava-sim --batch 10 --dataset mnist-1k",
    "lava-sim, stock": "deploy digits-fc --target lava-sim --synapses stock --dataset digits --samples 60",
    "lava-sim, stock, 2 jobs": "deploy digits-fc --target lava-sim --synapses stock --jobs 2 --dataset digits --samples 80",
    "sim": "deploy convnet-f --target sim --dataset mnist-1k --samples 400 --device cpu",
    "torch": "deploy mnist-fc --target torch --batch 20 --dataset mnist-1k --device cpu",
    "reference": "deploy mnist-fc --target reference --dataset mnist-1k --samples 300",
    "compare": "compare digits-fc --targets torch,sim,lava-sim --dataset digits --samples 200 --budget-samples 0 --device cpu",
}
WITH_PROCESSES = tuple(name for name in COMMANDS if "jobs" in name or "lava" in name or name == "compare")
EVENTS = ("command killed", "process killed", "Ctrl-C", "SIGTERM")
TIMES = ("startup_seconds", "seconds", "samples_per_second", "retries", "report")
CODES = {"command killed": -signal.SIGKILL, "Ctrl-C": 130, "SIGTERM": 143}


@dataclass
class Trial:
    """One command, ended once or twice and resumed; `problem` is None where everything was right."""

    name: str
    events: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    problem: str | None = None
    redrawn: int = 0
    """Commands that were done before their first event"""


class Run:
    """A command in a session of its own."""

    def __init__(self, words: list[str], folder: Path) -> None:
        pipe, theirs = os.pipe()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *words, str(theirs)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment,
            pass_fds=[theirs],
            start_new_session=True,
        )
        os.close(theirs)
        os.read(pipe, 1)
        os.close(pipe)
        self.began = time.monotonic()

    def strike(self, event: str, moment: float, draw: random.Random, saved: Path | None) -> None:
        """Make `event` happen `moment` seconds after the command began, or first saved answers where there were none in `saved`, unless it has ended by then."""
        since = self.began if saved is None else None
        before = _answers(saved)
        while self.process.poll() is None and (since is None or time.monotonic() < since + moment):
            since = time.monotonic() if since is None and _answers(saved) - before else since
            time.sleep(0.002)
        if self.process.poll() is not None:
            return
        pid = self.process.pid
        victims = [child for child in children(pid) if b"resource_tracker" not in _command(child)]
        if event == "Ctrl-C":
            os.killpg(pid, signal.SIGINT)
        elif event == "SIGTERM":
            os.kill(pid, signal.SIGTERM)
        elif event == "command killed" or victims:
            os.kill(pid if event == "command killed" else draw.choice(victims), signal.SIGKILL)

    def ended(self, patience: float) -> tuple[int | None, str, str, list[int]]:
        """Exit code, streams, and the processes that were still there (they are killed)."""
        out, err, code = "", "", None
        try:
            out, err = self.process.communicate(timeout=patience)
            code = self.process.returncode
        except subprocess.TimeoutExpired:
            pass
        until = time.monotonic() + LIMIT
        while members(self.process.pid) and time.monotonic() < until:
            time.sleep(0.02)
        left = members(self.process.pid)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return code, out, err, left


def _answers(folder: Path | None) -> set[str]:
    return set() if folder is None else {path.name for path in (folder / "toolchain" / "partial").glob("*/*.answers")}


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def words_of(name: str, *, resume: bool = False) -> list[str]:
    words = [*COMMANDS[name].split(), "--json"]
    words += ["--predictions", "p.npz"] if words[0] == "deploy" else []
    return [*words, "--resume"] if resume else words


def untimed(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: untimed(value) for key, value in found.items() if key not in TIMES}
    return [untimed(value) for value in found] if isinstance(found, list) else found


def undisturbed(name: str) -> tuple[float, Any, bytes]:
    """Seconds, record and predictions of the command left alone."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(words_of(name), Path(folder))
        code, out, err, _ = run.ended(PATIENCE)
        seconds = time.monotonic() - run.began
        if code != 0:
            raise SystemExit(f"{name}: {err}")
        return seconds, untimed(json.loads(out)), _predictions(Path(folder))


def _predictions(folder: Path) -> bytes:
    path = folder / "p.npz"
    return path.read_bytes() if path.exists() else b""


def trial(name: str, events: list[str], expected: tuple[float, Any, bytes], draw: random.Random) -> Trial:
    """The command, ended by each of `events` in turn, then resumed to the end."""
    length, record, predictions = expected
    found = Trial(name)
    files = set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory() as folder:
        for event in [*events, None]:
            run = Run(words_of(name, resume=bool(found.events)), Path(folder))
            if event is not None:
                running = draw.random() < 1 / 2
                run.strike(event, draw.uniform(0, SOON if running else length), draw, Path(folder) if running else None)
            code, out, err, left = run.ended(PATIENCE)
            found.saved += re.findall(r"goes on with ([\d,]+ of [\d,]+) samples done", err)
            found.problem = _wrong(event, code, err, left)
            if found.problem is not None:
                return found
            if code == 0:
                break
            found.events.append(str(event))
        if untimed(json.loads(out)) != record:
            found.problem = f"another record: {out}"
        elif _predictions(Path(folder)) != predictions:
            found.problem = "other predictions"
        kept = list((Path(folder) / "toolchain" / "partial").glob("*/*"))
        if kept and found.problem is None:
            found.problem = f"answers are still saved: {kept}"
    lost = unused_files(files)
    if lost and found.problem is None and "process killed" not in found.events and "command killed" not in found.events:
        found.problem = f"left {', '.join(sorted(lost))} in /dev/shm"
    return found


def _wrong(event: str | None, code: int | None, err: str, left: list[int]) -> str | None:
    """What is wrong with how a command ended; it may have been done before `event`, or have got over it."""
    if code is None or left:
        return f"{len(left)} processes were still there {LIMIT:g} s after {event}"
    if "Traceback" in err and code >= 0:
        return f"said {err[-2000:]}"
    if code == 0:
        return None
    if event is None:
        return f"exit code {code}: {err[-2000:]}"
    if event == "process killed":
        lines = [line for line in err.splitlines() if not re.search(r"goes on with|nothing is saved", line)]
        told = len(lines) == 1 and re.search(r"^toolchain: .*(samples? .* (are|is) (not )?done|was ended|could not|failed)", lines[0])
        return None if code == 1 and told else f"exit code {code} after {event}: {err[-2000:]}"
    return None if code == CODES[event] else f"exit code {code} after {event}: {err[-2000:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(COMMANDS), choices=list(COMMANDS))
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    plan = [(name, event) for event in EVENTS for name in asked.only if event != "process killed" or name in WITH_PROCESSES]
    draw.shuffle(plan)
    known = {name: undisturbed(name) for name in asked.only}
    found: list[Trial] = []
    for name, event in islice(cycle(plan), asked.trials):
        events = [event, draw.choice(EVENTS)] if draw.random() < 2 / 3 else [event]
        redrawn, last = 0, trial(name, events, known[name], draw)
        while not last.events and last.problem is None and redrawn < REDRAWN:
            redrawn, last = redrawn + 1, trial(name, events, known[name], draw)
        last.redrawn = redrawn
        found.append(last)
        say(
            f"{len(found)}/{asked.trials} {name}: {', '.join(last.events) or 'done before'}; went on with {last.saved or 'nothing'}: {last.problem or 'the same record'}"
        )
    rows = []
    for name in asked.only:
        mine = [each for each in found if each.name == name]
        ended, went_on = sum(len(each.events) for each in mine), sum(len(each.saved) for each in mine)
        rows.append([name, str(len(mine)), str(ended), str(went_on), str(sum(each.problem is not None for each in mine))])
    print("\n".join(table(["command", "runs", "ended", "went on with saved samples", "wrong"], rows)))
    events_seen = Counter(event for each in found for event in each.events)
    redrawn = sum(each.redrawn for each in found)
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, seed {asked.seed}; {dict(events_seen)}; {redrawn} more were done before their event"
    )
    problems = [f"{each.name}, {each.events}: {each.problem}" for each in found if each.problem]
    print("\n".join(problems))
    print(json.dumps({"seed": asked.seed, "versions": versions(), "trials": [vars(each) for each in found], "problems": problems}))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
