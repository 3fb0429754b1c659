"""A process that reads inputs of one target within bounds, and tells the campaign line by line (JSON) how it goes. Started by `python -m fuzz`.

python -m fuzz.worker TARGET SEED FIRST STOP FOLDER

Inputs number FIRST to STOP - 1 are made of (SEED, TARGET, number) alone. The input that is being read lies in FOLDER/current, so that one that kills
the process can be told.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from random import Random

from fuzz import table
from fuzz.judge import Finding, Judge, Tally, held
from fuzz.mutate import made
from fuzz.target import MIB, Prepared, Target

CURRENT, NUMBER, TRACE = "current", "number", "trace"
DRAWN = 5
"""One input in so many is drawn by hypothesis, where the target has a strategy."""

WAIT = 120.0
"""Seconds of wall-clock time after which a process that waits, rather than computes, is ended."""

EVERY = 0.5
"""Seconds between two lines to the campaign."""


class Bounded:
    """The judge within the target's bounds of memory and time; `step` judges one input and reports."""

    def __init__(self, target: Target, prepared: Prepared, folder: Path, say: Callable[[dict[str, object]], None]) -> None:
        self.target, self.folder, self.say = target, folder, say
        self.judge = Judge(prepared)
        for seed in prepared.seeds:
            found = self.judge(seed)
            if found is not None or self.judge.tally.refused:
                raise SystemExit(f"a seed of {target.name} is not accepted: {found}")
        self.judge.tally = Tally()
        self.errors = os.open(folder / "stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(self.errors, 2)
        self.trace = (folder / TRACE).open("w")
        faulthandler.register(signal.SIGPROF, self.trace, chain=True)  # also where it computes in C: the traceback, then the end
        self.before = held()
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + target.memory + 64 * MIB, resource.RLIM_INFINITY))  # libraries still to be loaded
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self.report()

    def begin(self, number: int) -> None:
        """Where the campaign looks for what was under way when this process died: also while an input is made."""
        (self.folder / NUMBER).write_text(f"{number} {self.judge.tally.accepted} {self.judge.tally.refused}")

    def step(self, number: int, data: bytes) -> None:
        (self.folder / CURRENT).write_bytes(data)
        self.begin(number)
        signal.setitimer(signal.ITIMER_PROF, self.target.seconds)
        found = self.judge(data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        found = found or self._printed() or self._swollen()
        if found is not None:
            self.say({"finding": asdict(found), "number": number, "data": data.hex()})
        if time.monotonic() - self.said > EVERY:
            self.report()

    def report(self) -> None:
        self.said = time.monotonic()
        faulthandler.dump_traceback_later(WAIT, exit=True, file=self.trace)
        self.say({"tally": asdict(self.judge.tally), "grown": max(0, held() - self.before)})

    def _printed(self) -> Finding | None:
        """Anything on stderr but what the toolchain itself says there."""
        if not os.fstat(self.errors).st_size:
            return None
        text = (self.folder / "stderr").read_text(errors="replace")
        os.ftruncate(self.errors, 0)
        os.lseek(self.errors, 0, os.SEEK_SET)
        strange = [line for line in text.splitlines() if line.strip() and not line.startswith("toolchain: ")]
        return Finding(f"it wrote to stderr: {strange[0][:100]!r}", text) if strange else None

    def _swollen(self) -> Finding | None:
        grown = held() - self.before
        if grown <= self.target.memory:
            return None
        self.before += grown
        return Finding(f"memory {grown // MIB} MiB above the start", "")


def run(target: Target, seed: int, first: int, stop: int, folder: Path, say: Callable[[dict[str, object]], None]) -> None:
    prepared = target.prepare(folder)
    bounded = Bounded(target, prepared, folder, say)
    drawn = (stop - first) // DRAWN if prepared.drawn is not None else 0
    for number in range(first, stop - drawn):
        bounded.begin(number)
        bounded.step(number, made(prepared, Random(f"{seed}/{target.name}/{number}")))
    if drawn:
        draw(bounded, prepared, seed, stop - drawn, stop)
    bounded.report()


def draw(bounded: Bounded, prepared: Prepared, seed: int, first: int, stop: int) -> None:
    """Inputs that hypothesis draws; what it draws depends on the seed and on where the row begins."""
    import hypothesis

    assert prepared.drawn is not None
    numbers = iter(range(first, stop))

    @hypothesis.seed(seed * 2**32 + first)
    @hypothesis.settings(max_examples=stop - first, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(data=prepared.drawn)
    def each(data: bytes) -> None:
        number = next(numbers, None)
        if number is not None:
            bounded.step(number, data)

    each()


def main() -> None:
    name, seed, first, stop, folder = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a reader prints is no line of ours

    def say(line: dict[str, object]) -> None:
        print(json.dumps(line), file=out, flush=True)

    run(table.target(name), int(seed), int(first), int(stop), Path(folder), say)
    say({"done": True})


if __name__ == "__main__":
    main()
