"""Run the campaign: `python -m fuzz` reads mutated and drawn files of every kind in bounded processes, and prints what it found.

An input is fine when its reader returns or raises ToolchainError with one plain sentence. Findings (another exception, a warning, words on stderr, a hang, a crash, memory
beyond the bound) lie in out/fuzz/, each input beside what it did; `--replay FILE --target NAME` reads one again here. Exit 1 where there are findings, 130 where it was
interrupted before there were any.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz import table, worker
from fuzz.judge import Judge
from fuzz.target import MIB, Target
from toolchain.progress import say
from toolchain.versions import versions

INPUTS = 200_000
ROW = 5_000
"""Inputs that one process reads at most: what one leaves behind does not pile up."""

OUT = Path("out/fuzz")
MOST_SAVED = 20
"""Files kept of findings of one kind and target."""

QUIET = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PYTHONWARNINGS": "default"}


@dataclass
class Row:
    """What is known of one target."""

    target: Target
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    milliseconds: float = 0.0
    grown: int = 0
    seconds: float = 0.0
    findings: Counter[str] = field(default_factory=Counter)


class Campaign:
    """Rows of inputs, each read by a process of its own; a process that dies is a finding, and another one goes on behind the input that killed it."""

    def __init__(self, targets: Sequence[Target], inputs: int, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        self.rows = {target.name: Row(target) for target in targets}
        shares = sum(target.share for target in targets)
        self.counts = {target.name: -(-inputs * target.share // shares) for target in targets}
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[str]] = set()
        self.stopped = False

    def run(self, jobs: int) -> None:
        pieces: list[tuple[str, int, int]] = []
        for name, count in self.counts.items():
            size = min(ROW, -(-count // jobs))
            pieces += [(name, first, min(first + size, count)) for first in range(0, count, size)]
        pieces.sort(key=lambda piece: piece[1])  # all targets have their turn, also in a campaign that is interrupted
        ended = threading.Event()
        watch = threading.Thread(target=self._show, args=(ended,), daemon=True)
        watch.start()
        try:
            with ThreadPoolExecutor(jobs) as pool:
                try:
                    for future in [pool.submit(self._piece, *piece) for piece in pieces]:
                        future.result()
                except BaseException:
                    self.stopped = True
                    for child in list(self._children):
                        child.kill()
                    raise
        finally:
            ended.set()
            watch.join()

    def _piece(self, name: str, first: int, stop: int) -> None:
        row, began = self.rows[name], time.monotonic()
        try:
            while first < stop and not self.stopped:
                first = self._process(row, first, stop)
        finally:
            with self._lock:
                row.seconds += time.monotonic() - began

    def _process(self, row: Row, first: int, stop: int) -> int:
        """Read inputs until the process ends; the number to go on from."""
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "fuzz.worker", row.target.name, str(self.seed), str(first), str(stop), scratch]
            errors = Path(scratch) / "start"
            with (
                errors.open("w") as stream,
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=stream, text=True, env={**os.environ, **QUIET}, stdin=subprocess.DEVNULL
                ) as child,
            ):
                self._children.add(child)
                last, done = Counter[str](), False
                try:
                    assert child.stdout is not None
                    for text in child.stdout:
                        line = json.loads(text)
                        done = done or "done" in line
                        self._take(row, line, last)
                except BaseException:
                    child.kill()
                    raise
            self._children.discard(child)
            if self.stopped or (done and child.returncode == 0):
                return stop
            number = Path(scratch) / worker.NUMBER
            said = [
                path.read_text(errors="replace") for name in ("start", "stderr", worker.TRACE) if (path := Path(scratch) / name).exists()
            ]
            trace = "".join(said)
            if not number.exists():
                raise SystemExit(f"the reader of {row.target.name} did not start, it ended with {child.returncode}: {trace[-2000:]}")
            at, accepted, refused = map(int, number.read_text().split())
            slow = child.returncode == -signal.SIGPROF
            what = (
                f"took more than {row.target.seconds:g} s"
                if slow
                else "waited without end"
                if "Timeout" in trace
                else f"the process ended with {child.returncode}"
            )
            self._keep(row, what, trace, at, current.read_bytes() if (current := Path(scratch) / worker.CURRENT).exists() else b"")
            with self._lock:
                row.inputs += at + 1 - first - last["inputs"]
                row.accepted += accepted - last["accepted"]
                row.refused += refused - last["refused"]
            return at + 1

    def _take(self, row: Row, line: dict[str, Any], last: Counter[str]) -> None:
        if "finding" in line:
            self._keep(row, line["finding"]["what"], line["finding"]["detail"], line["number"], bytes.fromhex(line["data"]))
        if "tally" not in line:
            return
        with self._lock:
            for name in ("inputs", "accepted", "refused"):
                setattr(row, name, getattr(row, name) + line["tally"][name] - last[name])
                last[name] = line["tally"][name]
            row.milliseconds = max(row.milliseconds, line["tally"]["milliseconds"])
            row.grown = max(row.grown, line["grown"])

    def _keep(self, row: Row, what: str, detail: str, number: int, data: bytes) -> None:
        kind = re.sub(r"[0-9]+", "N", what)
        with self._lock:
            row.findings[kind] += 1
            if row.findings[kind] > MOST_SAVED:
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{row.target.name}-{self.seed}-{number}"
            path.with_suffix(".input").write_bytes(data)
            path.with_suffix(".txt").write_text(f"{what}\n\n{detail}\n", errors="backslashreplace")

    def _show(self, ended: threading.Event) -> None:
        """A progress bar where stderr is a terminal, else a line a minute."""
        if not sys.stderr.isatty():
            while not ended.wait(60):
                say(self.said())
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        total = sum(self.counts.values())
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=total)
            while not ended.wait(0.5):
                progress.update(task, completed=sum(row.inputs for row in self.rows.values()), description=self.said())

    def said(self) -> str:
        read = sum(row.inputs for row in self.rows.values())
        return f"{read:,} of {sum(self.counts.values()):,} inputs, {sum(row.findings.total() for row in self.rows.values())} findings"

    def text(self) -> str:
        lines = [
            "| target | inputs | accepted | refused | findings | worst ms | memory bound, MiB | worst MiB | inputs/s |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {row.inputs:,} | {row.accepted:,} | {row.refused:,} | {row.findings.total():,} | {row.milliseconds:,.0f} "
            f"| {row.target.memory // MIB} | {row.grown / MIB:,.0f} | {row.inputs / max(row.seconds, 1e-9):,.0f} |"
            for name, row in self.rows.items()
        ]
        found = [f"{name}: {count} x {kind}" for name, row in self.rows.items() for kind, count in row.findings.most_common()]
        return "\n".join([*lines, *([""] if found else []), *found])


def replay(target: Target, path: Path) -> int:
    """Read one input again, in this process and without bounds, so that a debugger can look."""
    with tempfile.TemporaryDirectory() as folder:
        found = Judge(target.prepare(Path(folder)))(path.read_bytes())
    print("fine" if found is None else f"{found.what}\n\n{found.detail}")
    return 0 if found is None else 1


def guided(target: Target, inputs: int, seed: int, out: Path) -> int:
    """Inputs of `target` guided by coverage, in a process of its own, since its modules are imported with instruments."""
    command = [sys.executable, "-m", "fuzz.guided", target.name, "--inputs", str(inputs), "--seed", str(seed), "--out", str(out)]
    return subprocess.run(command, env={**os.environ, **QUIET}, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=INPUTS, help=f"of all targets together ({INPUTS:,})")
    parser.add_argument("--target", action="append", metavar="NAME", help="only this one; may be given again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that read")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="read one input again; needs --target")
    parser.add_argument("--list", action="store_true", help="the targets")
    parser.add_argument("--atheris", action="store_true", help="inputs guided by coverage, where atheris is installed (see fuzz/guided.py)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"where findings go ({OUT})")
    asked = parser.parse_args()
    targets = [table.target(name) for name in asked.target] if asked.target else list(table.TARGETS)
    if asked.list:
        print("\n".join(f"{target.name:16} {' '.join((target.prepare.__doc__ or '').split())}" for target in targets))
        return 0
    if asked.replay is not None:
        if not asked.target or len(targets) != 1:
            parser.error("--replay needs one --target")
        return replay(targets[0], asked.replay)
    if asked.atheris:
        return max(guided(target, -(-asked.inputs // len(targets)), asked.seed, asked.out) for target in targets)
    campaign, began = Campaign(targets, asked.inputs, asked.seed, asked.out), time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        campaign.run(max(1, asked.jobs))
    print(
        f"{'interrupted: ' if campaign.stopped else ''}{campaign.said()}, seed {asked.seed}, {asked.jobs} processes, {time.monotonic() - began:,.0f} s; {machine()}\n"
    )
    print(campaign.text())
    if any(row.findings for row in campaign.rows.values()):
        return 1
    return 130 if campaign.stopped else 0


def machine() -> str:
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{platform.machine()}, {os.cpu_count()} cores, {known}"


if __name__ == "__main__":
    sys.exit(main())
