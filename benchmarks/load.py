"""Whether long runs hold on to nothing: full passes over MNIST's test set, again and again in one process, and what the process has afterwards.

python benchmarks/load.py [--parts sim,jobs,lava,torch,report] [--dataset mnist] [--samples N] [--passes 10]

A part does one thing over and over: `deploy` on sim, on sim with two jobs, and on torch; one network of Lava processes that classifies the whole set at every pass;
and `compile`, then `compare` with its report, on images of the digits. It is opened, run once and closed to warm up (libraries load, caches fill), and opened again
for the passes that count. All of them must give one accuracy; the resident memory behind the last, once the allocator has given back what is free, may be at most
`GROWTH` more than behind the first, in this process and, the most while a pass ran, in all processes below it, and may not grow by `STEADILY` at every pass; and when it
is closed, no child process (nor a child's that has lost its parent), thread, file handle, file under /dev/shm (semaphores among them), temporary file or figure may be left. Exit code 1 where one is not so. The last line of the output is all of it as
JSON. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from operator import sub
from pathlib import Path
from typing import Any

import endurance
import numpy as np

import toolchain
from toolchain.notation import table
from toolchain.versions import processor, versions

PARTS = ("sim", "jobs", "lava", "torch", "report")

GROWTH = 0.05
"""The part by which the memory of the last pass may pass that of the first."""

STEADILY = 0.25
"""MiB: what grows by as much at every one of `ENOUGH` passes or more goes on for ever, however little it is beside the rest."""

ENOUGH = 6

FEW = {"jobs": 4, "report": 6}
"""Passes of parts that take long, where `--passes` asks for more."""

LOOK = 0.05
"""Seconds between two looks at the children's memory."""

PR_SET_CHILD_SUBREAPER = 36

KINDS = ("children", "threads", "handles", "shared memory", "temporary files", "figures")

Pass = Callable[[], float]


@dataclass
class Held:
    """What one part's passes gave and left behind, a value a pass: accuracies, MiB of this process, the most MiB of all its children together, seconds."""

    name: str
    samples: int
    accuracies: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    of_children: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """Everything that is not as it must be, a sentence each."""
        found = [f"{self.name}: {count} {what} left" for what, count in self.left.items() if count > 0]
        if len(set(self.accuracies)) != 1:
            found.append(f"{self.name}: accuracies differ: {', '.join(f'{a:.4f}' for a in self.accuracies)}")
        for whose, values in (("this process", self.memory), ("its children", self.of_children)):
            first, last = values[0], values[-1]
            if last > first * (1 + GROWTH):
                found.append(f"{self.name}: the memory of {whose} grew from {first:.1f} to {last:.1f} MiB")
            elif len(values) >= ENOUGH and min(map(sub, values[1:], values)) >= STEADILY:
                found.append(f"{self.name}: the memory of {whose} grew at every pass, from {first:.1f} to {last:.1f} MiB")
        return found

    def row(self) -> list[str]:
        spread = f"{100 * self.accuracies[0]:.2f} %" if len(set(self.accuracies)) == 1 else "differs"
        children = "-" if not any(self.of_children) else f"{self.of_children[0]:.1f} -> {self.of_children[-1]:.1f}"
        return [
            self.name,
            f"{len(self.accuracies)} x {self.samples:,}",
            spread,
            f"{self.memory[0]:.1f} -> {self.memory[-1]:.1f}",
            children,
            *(str(max(0, self.left[kind])) for kind in KINDS),
            f"{sum(self.seconds) / len(self.seconds):.1f}",
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "samples": self.samples,
            "accuracies": self.accuracies,
            "memory_mib": [round(value, 1) for value in self.memory],
            "children_mib": [round(value, 1) for value in self.of_children],
            "seconds": [round(value, 2) for value in self.seconds],
            "left": self.left,
        }


def repeated(name: str, samples: int, passes: int, start: Callable[[], AbstractContextManager[Pass]]) -> Held:
    """What `start` opens makes `passes` passes (at least 2), after it was opened, made one and was closed once to warm up. What is left is counted when it has closed."""
    held = Held(name, samples)
    with tempfile.TemporaryDirectory(prefix="load-") as folder, _temporary(folder), _adopting():
        with start() as one_pass:
            one_pass()
        gc.collect()
        files, before = set(os.listdir("/dev/shm")), _still_holding()
        with start() as one_pass:
            for _ in range(passes):
                began = time.perf_counter()
                with _most_of_children() as most:
                    held.accuracies.append(one_pass())
                held.seconds.append(time.perf_counter() - began)
                held.memory.append(_held())
                held.of_children.append(most[0])
        gc.collect()
        endurance.settled(before)
        counts = (*(now - then for now, then in zip(endurance.holding(), before, strict=True)), len(endurance.unused_files(files)))
        held.left = dict(zip(KINDS, (*counts, len(os.listdir(folder)), _figures()), strict=True))
    return held


def _still_holding() -> tuple[int, int, int]:
    """Children, threads and handles once they no longer change: threads take a moment to end."""
    before, found = None, endurance.holding()
    while found != before:
        time.sleep(LOOK)
        before, found = found, endurance.holding()
    return found


def _held() -> float:
    """MiB that this process holds, without what is free and the allocator keeps for later: it keeps some tens of MiB more now and then, which no pass adds to."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return endurance.resident()


@contextmanager
def _adopting() -> Iterator[None]:
    """Processes below this one that lose their parent become its children, and not init's, where nobody would look (Linux: prctl)."""
    adopt = partial(ctypes.CDLL(None).prctl, PR_SET_CHILD_SUBREAPER)
    adopt(1)
    try:
        yield
    finally:
        adopt(0)


@contextmanager
def _temporary(folder: str) -> Iterator[None]:
    """Temporary files of this process and its children go to `folder`."""
    known = os.environ.get("TMPDIR"), tempfile.tempdir
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    try:
        yield
    finally:
        os.environ.pop("TMPDIR", None)
        if known[0] is not None:
            os.environ["TMPDIR"] = known[0]
        tempfile.tempdir = known[1]


@contextmanager
def _most_of_children() -> Iterator[list[float]]:
    """In the list's one place: the most MiB that all processes below this one had together, shared pages counted for each."""
    most, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(LOOK):
            most[0] = max(most[0], sum(map(_resident_of, _below(os.getpid()))))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def _below(pid: int) -> list[int]:
    found = endurance.children(pid)
    return found + [grandchild for child in found for grandchild in _below(child)]


def _resident_of(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, IndexError):  # it has ended
        return 0.0


def _figures() -> int:
    """Figures of matplotlib that are still alive."""
    if "matplotlib.figure" not in sys.modules:
        return 0
    kind = sys.modules["matplotlib.figure"].Figure
    return sum(issubclass(type(found), kind) for found in gc.get_objects())  # isinstance would wake lazy modules


def deployed(target: str, dataset: str, samples: int | None, jobs: int = 1) -> Callable[[], AbstractContextManager[Pass]]:
    """A pass is one `deploy` of mnist-fc: data read, network compiled, all of it closed again."""

    def one_pass() -> float:
        return toolchain.deploy("mnist-fc", target=target, dataset=dataset, samples=samples, jobs=jobs, device="cpu").accuracy

    return lambda: nullcontext(one_pass)


def on_lava(dataset: str, samples: int | None) -> Callable[[], AbstractContextManager[Pass]]:
    """A pass is the whole set on one network of Lava processes, which stays open."""
    from toolchain import codec, data
    from toolchain.compiler import forward_only, graph_for
    from toolchain.source import find
    from toolchain.targets.lava_sim import LAVA_SIM

    loaded = data.load(dataset, samples=samples)
    images = np.asarray(loaded.images)
    graph = forward_only(graph_for(find("mnist-fc"), LAVA_SIM))

    @contextmanager
    def start() -> Iterator[Pass]:
        with LAVA_SIM.compile(graph) as run:
            yield lambda: float((codec.logits(graph, run.run(images)).argmax(axis=1) == loaded.labels).mean())

    return start


def reported(samples: int) -> Callable[[], AbstractContextManager[Pass]]:
    """A pass compiles digits-fc, compares it with its float self, and writes the report with all its pictures."""

    def one_pass() -> float:
        with tempfile.TemporaryDirectory() as folder:
            artefact = Path(folder) / "digits.fsnn"
            toolchain.compile("digits-fc", target="sim", output=artefact)
            found = toolchain.compare(
                artefact, targets=("torch", "sim"), dataset="digits", samples=samples, device="cpu", report=Path(folder) / "report"
            )
            return found.rows[1].deployment.accuracy

    return lambda: nullcontext(one_pass)


def part(name: str, dataset: str, samples: int | None, passes: int) -> Held:
    """One part of the table."""
    from toolchain import data

    passes = min(passes, FEW.get(name, passes))
    if name == "report":
        count = min(samples or 100, 100)
        return repeated("compile, compare and report", count, passes, reported(count))
    count = len(data.load(dataset, samples=samples))
    if name == "lava":
        return repeated("lava-sim, one network", count, passes, on_lava(dataset, samples))
    if name == "jobs":
        return repeated("sim, deploy with 2 jobs", count, passes, deployed("sim", dataset, samples, jobs=2))
    return repeated(f"{name}, deploy", count, passes, deployed(name, dataset, samples))


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether long runs hold on to memory, handles, processes or files.")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--samples", type=int, help="of the test set (all)")
    parser.add_argument("--passes", type=int, default=10)
    asked = parser.parse_args()
    chosen = asked.parts.split(",")
    if not set(chosen) <= set(PARTS) or asked.passes < 2:
        parser.error(f"--parts takes {', '.join(PARTS)}, and --passes 2 or more")
    ctypes.CDLL(None).mallopt(*endurance.ONE_POOL)
    found = []
    for name in chosen:
        found.append(part(name, asked.dataset, asked.samples, asked.passes))
        print(f"{found[-1].name}: {len(found[-1].accuracies)} passes in {sum(found[-1].seconds):.0f} s", file=sys.stderr)
    ran = versions()
    head = ["part", "passes x samples", "accuracy", "MiB, first -> last", "MiB of children", *KINDS, "s a pass"]
    print(
        f"mnist-fc on {asked.dataset}, no random numbers drawn (its weights: seed 0); {processor()}, {os.cpu_count()} processors; "
        f"toolchain {ran['toolchain']}, Python {ran['python']}, torch {ran['torch']}, NumPy {ran['numpy']}, Lava {ran['lava-nc']}"
    )
    print()
    print("\n".join(table(head, [held.row() for held in found])))
    problems = [problem for held in found for problem in held.problems()]
    print("\n".join(["", *problems]) if problems else "\nsteady: nothing grew by more than 5 % or at every pass, and nothing was left")
    print(json.dumps({"parts": [held.to_json() for held in found], "problems": problems, "versions": ran}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
