"""Trained networks as Lava processes: ours, many samples side by side, beside Lava's own synapse processes, which carry one sample at a time.

python benchmarks/lava_sim.py [--samples 1000] [--stock-samples 200] [--images 128] [--stock-images 2] [--steps 30] [--timing pipelined]

The first table is mnist-fc with the defaults of `deploy`. The second is the forward phase of ConvNet-F with its first connection on the chip (graded input), so that
its ring of stock processes is three Conv, a Sparse for the transposed convolution that feeds back, and a Dense to the readout; a second stock ring has
a Sparse for every connection. All rows of a table classify the same first images of MNIST's test set on the same graph, timed without start-up after one warm-up call
(the second table: the best of three). Spike counts of all rows are compared; a difference is an error. Every network, with stock synapses too, runs in our
runtime and its channels. Quote the ratios, not the absolute figures. The last line is the tables as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from toolchain import codec, data
from toolchain.compiler import forward_only, graph_for, lowered
from toolchain.ir import Graph
from toolchain.notation import table
from toolchain.source import find
from toolchain.target import Executable, Result, join
from toolchain.targets.lava_sim import LAVA_SIM, LavaSim
from toolchain.versions import versions

WIDE = 64
"""Samples side by side in the second table."""

REPEATS = 3


@dataclass(frozen=True)
class Row:
    """One network that is timed: how many samples it gets, how many at a time, and how often."""

    name: str
    target: LavaSim
    samples: int
    at_once: int
    repeats: int = 1


@dataclass(frozen=True)
class Timed:
    row: Row
    seconds: float

    @property
    def speed(self) -> float:
        return self.row.samples / self.seconds


def timed(run: Executable, row: Row, images: np.ndarray) -> tuple[float, Result]:
    """Seconds for all samples of a row, the least of its repeats, after one warm-up call."""
    run.run(images[: min(row.at_once, row.target.batch or row.at_once)])
    least, result = float("inf"), None
    for _ in range(row.repeats):
        began = time.perf_counter()
        results = [run.run(images[i : i + row.at_once]) for i in range(0, row.samples, row.at_once)]
        least, result = min(least, time.perf_counter() - began), join(results)
    assert result is not None
    return least, result


def measured(graph: Graph, rows: list[Row], images: np.ndarray) -> tuple[list[Timed], float]:
    """Each row's time, and the spike density of the first row, whose counts all others must have."""
    found, density = [], 0.0
    counts: dict[str, np.ndarray] = {}
    for row in rows:
        with row.target.compile(graph) as run:
            seconds, result = timed(run, row, images[: row.samples])
        for population, values in result.counts.items():
            expected = counts.setdefault(population, values)
            both = min(len(values), len(expected))
            if not np.array_equal(values[:both], expected[:both]):
                raise SystemExit(f"{row.name}: spike counts of '{population}' differ from those of {rows[0].name}")
        if not found:
            density = float(np.mean([codec.rates(graph, result, p.name).mean() for p in graph.of_kind("couple")]))
        found.append(Timed(row, seconds))
    return found, density


def dense_table(asked: argparse.Namespace) -> dict[str, Any]:
    """mnist-fc: what a person gets by default, at batch 1, and from stock synapses."""
    graph = forward_only(graph_for(find(asked.model), LAVA_SIM))
    few = min(asked.stock_samples, asked.samples)
    stock = replace(LAVA_SIM, synapses="stock")
    rows = [
        Row("our synapses, default batch", LAVA_SIM, asked.samples, asked.samples),
        Row("our synapses, batch 1", replace(LAVA_SIM, batch=1), few, few),
        Row("stock synapses, samples switched in the graph", stock, few, few),
        Row("stock synapses, one run a sample", stock, few, 1),
    ]
    found, density = measured(graph, rows, data.load("mnist-1k", samples=asked.samples).images)
    print(heading(asked.model, graph, density))
    slowest = found[-1].speed
    cells = [[t.row.name, f"{t.row.samples:,}", f"{t.speed:,.0f}", f"{t.speed / slowest:.1f}"] for t in found]
    print("\n".join(table(["processes", "n", "samples/s", "ratio to the last row"], cells)), flush=True)
    return record(asked.model, graph, density, [{} for _ in found], found)


def ring_table(asked: argparse.Namespace) -> dict[str, Any]:
    """ConvNet-F: ours at batch 1 and side by side, beside the two rings of stock processes."""
    name = "convnet-f"
    pipeline = LAVA_SIM.pipeline.with_options(retime={"mode": asked.timing}, inject={"mode": "graded"})
    graph = forward_only(pipeline(lowered(find(name), asked.steps)))
    few = asked.stock_images
    rows = [
        Row(f"our synapses, batch {WIDE}", replace(LAVA_SIM, batch=WIDE), asked.images, asked.images, REPEATS),
        Row("our synapses, batch 1", replace(LAVA_SIM, batch=1), 8 * few, 8 * few, REPEATS),
        Row("stock ring, Sparse for all", replace(LAVA_SIM, batch=1, synapses="sparse"), 2 * few, 2 * few, REPEATS),
        Row("stock ring, three Conv and a Sparse", replace(LAVA_SIM, batch=1, synapses="stock"), few, few, REPEATS),
    ]
    found, density = measured(graph, rows, data.load("mnist-1k", samples=max(row.samples for row in rows)).images)
    ticks = graph.phase("forward").ticks
    sparse, full = found[-2].speed, found[-1].speed
    more = [
        {
            "batch": t.row.target.batch or 1,
            "ms_a_step": 1000 * t.seconds / (-(-t.row.samples // (t.row.target.batch or 1)) * ticks),
            "ratio_to_full_ring": t.speed / full,
            "ratio_to_sparse_ring": t.speed / sparse,
        }
        for t in found
    ]
    print(f"\n{heading(name, graph, density)}, graded input, {ticks} steps of the hardware a sample")
    cells = [
        [
            t.row.name,
            f"{t.row.samples:,}",
            f"{m['ms_a_step']:.2f}",
            f"{t.speed:,.2f}",
            ratio(m["ratio_to_full_ring"]),
            ratio(m["ratio_to_sparse_ring"]),
        ]
        for t, m in zip(found, more, strict=True)
    ]
    print("\n".join(table(["processes", "n", "ms a step", "samples/s", "to the full ring", "to the Sparse ring"], cells)), flush=True)
    return record(name, graph, density, more, found)


def ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def heading(model: str, graph: Graph, density: float) -> str:
    phase = graph.phase("forward")
    return (
        f"{model} on lava-sim, mnist-1k, trained weights (seed 0), T {phase.time_steps}, {phase.timing.mode}, "
        f"spike density {100 * density:.1f} %, same spike counts in all rows"
    )


def record(model: str, graph: Graph, density: float, more: list[dict[str, float]], found: list[Timed]) -> dict[str, Any]:
    phase = graph.phase("forward")
    rows = [
        {"row": t.row.name, "samples": t.row.samples, "samples_per_second": t.speed, **extra} for t, extra in zip(found, more, strict=True)
    ]
    return {"model": model, "time_steps": phase.time_steps, "timing": phase.timing.mode, "spike_density": density, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="mnist-fc", help="network of the first table")
    parser.add_argument("--samples", type=int, default=1000, help="samples of the first table")
    parser.add_argument("--stock-samples", type=int, default=200, help="samples of its stock rows")
    parser.add_argument("--images", type=int, default=2 * WIDE, help="samples of the second table side by side")
    parser.add_argument("--stock-images", type=int, default=2, help="samples of its slowest row; the faster ones get more")
    parser.add_argument("--steps", type=int, default=30, help="time steps of the second table")
    parser.add_argument("--timing", choices=["pipelined", "exact"], default="pipelined", help="timing of the second table")
    asked = parser.parse_args()
    tables = [dense_table(asked), ring_table(asked)]
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
    print(f"{machine}; " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    print(json.dumps({"machine": machine, "versions": versions(), "tables": tables}))


if __name__ == "__main__":
    main()
