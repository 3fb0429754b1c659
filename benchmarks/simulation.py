"""How fast `sim` is beside other simulators, on one core, and whether it is exact: the tables of "Simulation speed" in docs/results.md.

python benchmarks/simulation.py [--parts table,lava,linear,memory] [--full] [--workloads W1,W2,W3] [--weights random,trained] [--density 10,6] [--batches 1,64]
                                [--rounds 5] [--seconds 0.3] [--peers .venv-peers] [--json FILE]

W1 is mnist-fc, 784-400 with dense feedback onto itself; W2 convnet-f; W3 alexnet-f: IF neurons, soft reset, constant input, T 30, 8-bit weights, 24-bit membrane. Every
simulator runs the same integers of the same graph, the peers as float32 and step by step, which is `sim` in exact timing. A row is timed in CPU seconds of its
process, from images to spike counts; the rows of a table take turns, and the median of the rounds counts. Quote the ratios, not the absolute figures.

Before it is timed, every form of `sim` is compared with `reference`, spike by spike, and its spike counts with those of the peers. A difference from `reference` makes
the exit code 1; times never do. The last line is everything as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import costs
import numpy as np
import torch
import workloads
from peers import Peers
from workloads import Workload

from toolchain.errors import UsageError
from toolchain.ir import Array, Graph
from toolchain.native import phases
from toolchain.target import Executable, Result
from toolchain.targets.reference import REFERENCE
from toolchain.targets.sim import SIM, Sim
from toolchain.versions import versions

PARTS = ("table", "lava", "linear", "memory", "mnist")
WEIGHTS = ("random", "trained")
COMPARED = {"W1": 8, "W2": 2, "W3": 1}
"""Samples that run on `reference`, which is slow."""

COUNTED = {"W1": 64, "W2": 64, "W3": 8}
"""Samples whose spike counts the peers must give too."""

SLOW = 2.0
"""CPU seconds of a run."""

PEER = "SpikingJelly"
"""The row that ratios are to."""

GOALS = {"W1": {1: 10, 64: 6}, "W2": {1: 10, 64: 6}, "W3": {1: 5, 64: 5}}
"""Times as fast as PEER that `sim` shall be, by batch; on W1 and W2 12 at either is hoped for at 7 % spike density and below."""


@dataclass(frozen=True)
class Row:
    """A simulator: `seconds(batch, calls)` are what so many runs take it; `ours` where it is a form of `sim`."""

    name: str
    seconds: Callable[[int, int], float]
    ours: bool = False


Form = tuple[Sim, Graph]

CPU = replace(SIM, device="cpu")
FORMS = {
    "sim": CPU,
    "sim, events": replace(CPU, kernel="native", currents="events"),
    "sim, dense": replace(CPU, kernel="native", currents="dense"),
    "sim, torch path": replace(CPU, kernel="torch"),
}
"""What is timed in exact timing; the first is what a person gets."""


def compiled(forms: dict[str, Form]) -> tuple[dict[str, Executable], dict[str, str]]:
    """Executables by name, and why there is none of others."""
    runs, reasons = {}, {}
    for name, (target, graph) in forms.items():
        try:
            runs[name] = target.compile(graph)
        except UsageError as error:
            reasons[name] = str(error)
    return runs, reasons


def our_row(name: str, run: Executable, images: Array) -> Row:
    def seconds(batch: int, calls: int) -> float:
        parts = [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]
        began = time.process_time()
        for call in range(calls):
            run.run(parts[call % len(parts)])
        return time.process_time() - began

    return Row(name, seconds, ours=True)


def measured(rows: Sequence[Row], batch: int, rounds: int, least: float) -> dict[str, float | str]:
    """Samples per CPU second of every row, or why there are none: medians over rounds in which the rows take turns, each for about `least` seconds; over 3 rounds at
    most where a single run takes longer than SLOW."""
    calls: dict[str, int] = {}
    slowest = 0.0
    found: dict[str, float | str] = {}
    for row in rows:
        try:
            row.seconds(batch, 1)  # the first run compiles
            once = row.seconds(batch, 1)
            calls[row.name], slowest = max(1, min(4096, round(least / once))), max(slowest, once)
        except RuntimeError as error:
            found[row.name] = str(error)
    times: dict[str, list[float]] = {row.name: [] for row in rows if row.name in calls}
    for _ in range(min(3, rounds) if slowest > SLOW else rounds):
        for row in rows:
            if row.name in calls:
                times[row.name].append(row.seconds(batch, calls[row.name]))
    found |= {name: batch * calls[name] / median(several) for name, several in times.items()}
    return {row.name: found[row.name] for row in rows}


def differences(a: Result, b: Result) -> dict[str, int]:
    """How many values differ: counts, final potentials and saturations, and where both kept them the spikes and potentials of every step."""
    found = {
        field: sum(int((getattr(a, field)[name] != values).sum()) for name, values in getattr(b, field).items())
        for field in ("counts", "potentials", "saturations")
    }
    if a.history and b.history:
        for field in ("spikes", "potentials"):
            found[f"{field} of every step"] = sum(
                int((getattr(a.history[n], field) != getattr(h, field)).sum()) for n, h in b.history.items()
            )
    return found


def compared(forms: dict[str, Form], images: Array) -> dict[str, dict[str, int]]:
    """Each form beside `reference` on the same images, with and without what it keeps of every step."""
    expected: dict[int, Result] = {}
    found = {}
    for name, (target, graph) in forms.items():
        if id(graph) not in expected:
            with replace(REFERENCE, trace=True).compile(graph) as run:
                expected[id(graph)] = run.run(images)
        with replace(target, trace=True).compile(graph) as run:
            found[name] = differences(run.run(images), expected[id(graph)])
        with target.compile(graph) as run:
            for field, number in differences(run.run(images), expected[id(graph)]).items():
                found[name][field] += number
    return found


def counted(work: Workload, peers: Peers, expected: Result, samples: int, folder: Path) -> dict[str, dict[str, int] | str]:
    """How many spike counts of each peer differ from those of `sim`, of how many."""
    names = [p.name for p in work.exact.of_kind("couple")]
    found: dict[str, dict[str, int] | str] = {}
    for peer in peers.names:
        answer = peers.ask("count", peer=peer, samples=samples, to=str(folder / "counts.npz"))
        if "error" in answer:
            found[peer] = answer["error"]
            continue
        with np.load(folder / "counts.npz", allow_pickle=False) as file:
            pairs = [(file[place], expected.counts[names[int(place)]][:samples]) for place in file.files]
        found[peer] = {"differ": sum(int((a != b).sum()) for a, b in pairs), "of": sum(a.size for a, _ in pairs)}
    return found


def speed_table(work: Workload, peers: Peers, asked: argparse.Namespace) -> dict[str, Any]:
    """One workload: exactness, then the speed of every row at every batch."""
    batches = [int(size) for size in asked.batches.split(",")]
    images = work.images[: max(64, *batches)]
    few = images[: COMPARED[work.name]]
    forms: dict[str, Form] = {name: (target, work.exact) for name, target in FORMS.items()} | {"sim, pipelined": (CPU, work.pipelined)}
    runs, reasons = compiled(forms)
    exactness = compared({name: forms[name] for name in runs}, few)
    whole = runs["sim"].run(images[:64])
    rows = [our_row(name, run, images) for name, run in runs.items()]
    counts: dict[str, dict[str, int] | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        if peers.missing is None:
            workloads.write(work, Path(folder, "workload.npz"), len(images))
            peers.ask("load", path=str(Path(folder, "workload.npz")))
            counts = counted(work, peers, whole, COUNTED[work.name], Path(folder))
            rows += [Row(name, partial(peers.seconds, name)) for name in peers.names]
        speeds = {batch: measured(rows, batch, asked.rounds, asked.seconds) for batch in batches}
    for run in runs.values():
        run.close()
    made = {
        "workload": work.name,
        "model": work.exact.provenance.model,
        "weights": work.weights,
        "gains": work.gains,
        "density": work.density(whole),
        "densities": work.densities(whole),
        "compared_samples": len(few),
        "differences": exactness,
        "not_run": reasons,
        "peer_differences": counts if peers.missing is None else peers.missing,
        "samples_per_second": {str(batch): found for batch, found in speeds.items()},
    }
    print_speeds(made, speeds, peers)
    return made


def print_speeds(made: dict[str, Any], speeds: dict[int, dict[str, float | str]], peers: Peers) -> None:
    each = ", ".join(f"{100 * value:.1f}" for value in made["densities"].values())
    print(f"\n{made['workload']} {made['model']}, {made['weights']}: spike density {100 * made['density']:.1f} % (by population {each})\n")
    head = ["simulator", *(f"batch {batch}" for batch in speeds), "differences"]
    names = list(next(iter(speeds.values())))
    cells = [[name, *(cell(found, name) for found in speeds.values()), exact_cell(made, name)] for name in names]
    reasons = made["not_run"] | ({"SpikingJelly, snnTorch, plain torch": peers.missing} if peers.missing else {})
    cells += [[name, *["not run"] * len(speeds), ""] for name in reasons]
    print(markdown(head, cells))
    for name, reason in reasons.items():
        print(f"\n{name}: {reason}")
    goals = []
    for batch, found in speeds.items():
        if isinstance(found["sim"], float) and isinstance(found.get(PEER), float):
            goals.append(f"{found['sim'] / found[PEER]:.1f} at batch {batch} (goal {GOALS[made['workload']].get(batch, 'none')})")
    if goals:
        print(f"\n`sim` beside {PEER}: {', '.join(goals)}", flush=True)


def print_summary(tables: list[dict[str, Any]]) -> None:
    """All workloads in one table, as docs/results.md has it."""
    shown = {"sim": "sim", PEER: PEER, "snnTorch": "snnTorch", "plain torch": "plain torch", "plain torch, compiled": "compiled"}
    rows = []
    for made in tables:
        for batch, found in made["samples_per_second"].items():
            speeds = {name: found[name] for name in shown if isinstance(found.get(name), float)}
            theirs = [speed for name, speed in speeds.items() if name != "sim"]
            ratios = [
                f"{speeds['sim'] / speeds[PEER]:.1f}" if PEER in speeds else "",
                f"{speeds['sim'] / max(theirs):.1f}" if theirs else "",
            ]
            title = [f"{made['workload']} {made['model']}, {made['weights'].split(',')[0]}", f"{100 * made['density']:.1f}", batch]
            rows.append([*title, *(figure(speeds[name]) if name in speeds else "" for name in shown), *ratios])
    print("\n" + markdown(["workload", "spikes, %", "batch", *shown.values(), f"to {PEER}", "to the fastest"], rows), flush=True)


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cell(found: dict[str, float | str], name: str) -> str:
    """Samples per second, and the ratio to PEER."""
    value, base = found[name], found.get(PEER)
    if isinstance(value, str):
        return value
    ratio = f" = {value / base:.3g} x" if isinstance(base, float) else ""
    return figure(value) + ratio


def exact_cell(made: dict[str, Any], name: str) -> str:
    if name in made["differences"]:
        return f"{sum(made['differences'][name].values())}"
    found = made["peer_differences"][name]
    return found if isinstance(found, str) else f"{found['differ']} of {found['of']:,} counts"


def markdown(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *cells))


def chosen(asked: argparse.Namespace) -> list[Callable[[], Workload]]:
    """The workloads asked for, each built when its turn comes."""
    made: list[Callable[[], Workload]] = []
    weights = asked.weights.split(",")
    for name in asked.workloads.split(","):
        if "random" in weights:
            densities = [float(percent) / 100 for percent in asked.density.split(",")]
            made += [partial(workloads.random, name, density) for density in (densities[:1] if name == "W3" else densities)]
        if "trained" in weights and name != "W3":
            made.append(partial(workloads.trained, name))
    return made


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", default="table,lava,linear,memory", help=f"which of {', '.join(PARTS)}")
    parser.add_argument("--full", action="store_true", help="also MNIST's whole test set on convnet-f (from $TOOLCHAIN_DATA)")
    parser.add_argument("--workloads", default="W1,W2,W3")
    parser.add_argument("--weights", default="random,trained", help="random, trained, or both; none are trained for W3")
    parser.add_argument("--density", default="10,6", help="spike densities of the random weights in percent; W3 has the first only")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="how long a row is timed in a round, at least one run")
    parser.add_argument("--peers", type=Path, default=Path(__file__).resolve().parents[1] / ".venv-peers")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    asked = parser.parse_args()
    if not all(size.isdigit() and 1 <= int(size) <= workloads.IMAGES for size in asked.batches.split(",")):
        parser.error(f"--batches is {asked.batches}: give whole numbers from 1 to {workloads.IMAGES}, with commas")
    return asked


def machine() -> dict[str, Any]:
    found = {"cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    return found | {"instructions": phases.missing() or phases.INSTRUCTION_SETS[phases.widest()]}


def said(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def main() -> int:
    asked = options()
    if os.environ.get("OMP_NUM_THREADS") != "1":  # read when torch is loaded: a second thread that waits would count as CPU time
        return subprocess.call([sys.executable, *sys.argv], env={**os.environ, "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    parts = [*asked.parts.split(","), *(["mnist"] if asked.full else [])]
    choices = {
        "part": (parts, PARTS),
        "workload": (asked.workloads.split(","), workloads.MODELS),
        "weights": (asked.weights.split(","), WEIGHTS),
    }
    for what, (given, known) in choices.items():
        for name in given:
            if name not in known:
                print(f"unknown {what} '{name}': choose from {', '.join(known)}", file=sys.stderr)
                return 2
    made: dict[str, Any] = {"machine": machine(), "versions": versions(), "seed": workloads.SEED}
    if "table" in parts:
        peers = Peers(asked.peers)
        made |= {"peer_versions": peers.versions}
        print(
            "samples per CPU second, one thread; ratios are to SpikingJelly; differences are from `reference`, spike by spike, and of the peers from `sim`"
        )
        made["tables"] = [speed_table(build(), peers, asked) for build in chosen(asked)]
        peers.close()
        print_summary(made["tables"])
    for part in parts:
        if part != "table":
            made[part] = getattr(costs, part)()
    theirs = made.get("peer_versions", {})
    print(f"\n{said(made['machine'])}; {said(made['versions'])}" + (f"; peers: {said(theirs)}" if theirs else ""))
    text = json.dumps(made)
    if asked.json:
        asked.json.write_text(text + "\n")
    print(text)
    return int(any(sum(found.values()) for table in made.get("tables", []) for found in table["differences"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
