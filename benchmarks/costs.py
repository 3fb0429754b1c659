"""What a simulation costs, for `simulation.py`: its growth with spikes and with the batch, its memory, a whole test set, and Lava's processes beside it.

python benchmarks/costs.py memory|mnist        (one measurement in a process of its own, as JSON)
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import workloads

from toolchain import codec, data
from toolchain.compiler import forward_only, lowered
from toolchain.errors import UsageError
from toolchain.native import phases
from toolchain.passes import LOIHI_PIPELINE
from toolchain.source import find
from toolchain.target import Executable
from toolchain.targets.lava_sim import LAVA_SIM
from toolchain.targets.sim import SIM

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2)
BATCHES = (1, 16, 64, 257)
ROUNDS = 5


def cpu_seconds(run: Executable, images: np.ndarray) -> float:
    began = time.process_time()
    run.run(images)
    return time.process_time() - began


def linear() -> dict[str, Any] | str:
    """W2: the event path's time over its synaptic operations at several densities, with the line through them, and the time of a sample over the batch."""
    if phases.missing() is not None:
        print(f"\nthe event path: {phases.missing()}")
        return str(phases.missing())
    target = replace(SIM, device="cpu", kernel="native", currents="events")
    works = [workloads.random("W2", density, within=density / 2) for density in DENSITIES]
    steps = works[0].exact.phase("forward").time_steps
    runs = [target.compile(work.exact) for work in works]
    samples = 64
    results = [run.run(work.images[:samples]) for run, work in zip(runs, works, strict=True)]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for one, run, work in zip(times, runs, works, strict=True):
            one.append(cpu_seconds(run, work.images[:samples]) / samples / steps)
    operations = np.array([codec.synaptic_operations(w.exact, r).mean() / steps for w, r in zip(works, results, strict=True)])
    seconds = np.array([median(one) for one in times])
    slope, fixed = np.polyfit(operations, seconds, 1)
    off = float(np.abs(seconds - slope * operations - fixed).max() / seconds.max())
    print("\nW2, sim, events: time a step and sample over spikes\n")
    for work, result, ops, took in zip(works, results, operations, seconds, strict=True):
        spikes = sum(float(c.sum()) for c in result.counts.values()) / samples / steps
        print(
            f"  density {100 * work.density(result):4.1f} %  {spikes:6,.0f} spikes  {ops:9,.0f} synaptic operations  {1e6 * took:7.1f} us"
        )
    print(
        f"  the line: {1e6 * fixed:.1f} us + {1e9 * slope:.3f} us a thousand synaptic operations ({1e-9 / slope:.1f} G a second); largest distance {100 * off:.1f} % of the longest time"
    )
    batches = by_batch(works[DENSITIES.index(0.1)])
    return {"operations": operations.tolist(), "seconds": seconds.tolist(), "fixed": fixed, "slope": slope, "off": off, "batches": batches}


def by_batch(work: workloads.Workload) -> dict[str, float]:
    """CPU seconds of a sample by batch, `sim` as it is by default."""
    run = replace(SIM, device="cpu", batch=max(BATCHES)).compile(work.exact)
    times: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for batch in BATCHES:
        run.run(work.images[:batch])
    for _ in range(ROUNDS):
        for batch in BATCHES:
            parts = [work.images[i : i + batch] for i in range(0, max(1, 64 // batch) * batch, batch)]
            times[batch].append(sum(cpu_seconds(run, part) for part in parts) / batch / len(parts))
    found = {str(batch): median(several) for batch, several in times.items()}
    print(
        "\nW2, sim: CPU time a sample\n\n" + "\n".join(f"  batch {batch:>3}  {1e3 * took:.3f} ms" for batch, took in found.items()),
        flush=True,
    )
    return found


def lava() -> dict[str, Any] | str:
    """W2 in Lava, its first connection on the chip so that three stock Conv carry it, beside `sim` on the same graph; wall-clock seconds, in which Lava may use all cores."""
    from lava_sim import Row, measured

    missing = LAVA_SIM.available()
    if missing is not None:
        print(f"\nlava-sim: {missing}")
        return missing
    pipeline = LOIHI_PIPELINE.with_options(retime={"mode": "pipelined"}, inject={"mode": "graded"})
    graph = forward_only(pipeline(lowered(find(workloads.MODELS["W2"]), 30)))
    sim = replace(SIM, device="cpu")
    rows = [
        Row("sim, batch 64", replace(sim, batch=64), 256, 256, 3),
        Row("sim, batch 1", replace(sim, batch=1), 64, 64, 3),
        Row("lava-sim, batch 64", replace(LAVA_SIM, batch=64), 128, 128, 3),
        Row("lava-sim, batch 1", replace(LAVA_SIM, batch=1), 8, 8, 3),
        Row("lava-sim, stock processes", replace(LAVA_SIM, batch=1, synapses="stock"), 2, 2),
    ]
    found, density = measured(graph, rows, data.load("mnist-1k", samples=256).images)
    stock = found[-1].speed
    print(
        f"\nW2 convnet-f, trained, graded input, pipelined, spike density {100 * density:.1f} %, the same spike counts in all rows, wall-clock time\n"
    )
    print("| simulator | samples/s | ratio to stock |\n| --- | --- | --- |")
    print("\n".join(f"| {t.row.name} | {t.speed:,.3g} | {t.speed / stock:,.0f} |" for t in found), flush=True)
    return {
        "density": density,
        "samples_per_second": {t.row.name: t.speed for t in found},
        "ratio": {t.row.name: t.speed / stock for t in found},
    }


def memory() -> dict[str, Any]:
    """Peak memory of convnet-f at batch 256, the whole process with its libraries."""
    found = apart("memory", 1)
    print(
        f"\nconvnet-f at batch 256: peak memory {found['peak_mb']:.0f} MB (bar 600), {found['before_mb']:.0f} MB of it before the first run; by {found['by']}",
        flush=True,
    )
    return found


def mnist() -> dict[str, Any] | str:
    """MNIST's whole test set on convnet-f, on 2 threads."""
    try:
        data.load("mnist", samples=1)
    except UsageError as error:
        print(f"\nMNIST's test set: {error}")
        return str(error)
    found = apart("mnist", 2)
    print(
        f"\nMNIST's test set on convnet-f, T 30, 2 threads: {found['seconds']:.1f} s, accuracy {100 * found['accuracy']:.2f} % (bar 15 s); by {found['by']}",
        flush=True,
    )
    return found


def apart(what: str, threads: int) -> dict[str, Any]:
    """A measurement in a fresh process with so many threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, __file__, what], check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path.cwd())
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak() -> float:
    """MB that the process has ever held. Linux counts what its parent held into `ru_maxrss`, but not into VmHWM."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def inside(what: str) -> dict[str, Any]:
    whole = what == "mnist"
    found = data.load("mnist") if whole else data.load("mnist-1k", samples=256)
    graph = forward_only(LOIHI_PIPELINE(lowered(find("convnet-f"), 30)))
    with replace(SIM, device="cpu").compile(graph) as run:
        before = peak()
        began = time.perf_counter()
        result = run.run(found.images)
        seconds = time.perf_counter() - began
    right = float((codec.logits(graph, result).argmax(axis=1) == found.labels).mean())
    return {
        "before_mb": before,
        "peak_mb": peak(),
        "seconds": seconds,
        "accuracy": right,
        "by": f"torch ({phases.missing()})" if phases.missing() else "the compiled core",
    }


if __name__ == "__main__":
    print(json.dumps(inside(sys.argv[1])))
