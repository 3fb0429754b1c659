"""Samples per second of a trained network as Lava processes: ours, many samples side by side, beside Lava's stock synapses, one sample at a time.

python benchmarks/lava_sim.py [--model mnist-fc] [--samples 1000] [--stock-samples 200]

Every row classifies the same first images, timed without start-up, in one run: quote the ratios, not the absolute figures. Spike counts of all rows
are compared; a difference is an error. The last line is the table as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import replace

import numpy as np

from toolchain import codec, data
from toolchain.compiler import forward_only, graph_for
from toolchain.notation import table
from toolchain.source import find
from toolchain.target import Executable, Result, join
from toolchain.targets.lava_sim import LAVA_SIM
from toolchain.versions import versions


def timed(run: Executable, images: np.ndarray, at_once: int) -> tuple[float, Result]:
    """Seconds for all images, handed over `at_once` at a time, after one warm-up call."""
    run.run(images[:at_once])
    began = time.perf_counter()
    results = [run.run(images[i : i + at_once]) for i in range(0, len(images), at_once)]
    return time.perf_counter() - began, join(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="mnist-fc")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--stock-samples", type=int, default=200)
    asked = parser.parse_args()
    graph = forward_only(graph_for(find(asked.model), LAVA_SIM))
    images = data.load("mnist-1k", samples=asked.samples).images
    few = min(asked.stock_samples, asked.samples)
    rows = [
        ("our synapses, default batch", LAVA_SIM, asked.samples, asked.samples),
        ("our synapses, batch 1", replace(LAVA_SIM, batch=1), few, few),
        ("stock synapses, samples switched in the graph", replace(LAVA_SIM, synapses="stock"), few, few),
        ("stock synapses, one run a sample", replace(LAVA_SIM, synapses="stock"), few, 1),
    ]
    speeds: list[tuple[str, int, float]] = []
    density = 0.0
    counts: dict[str, np.ndarray] = {}
    for name, target, samples, at_once in rows:
        with target.compile(graph) as run:
            seconds, result = timed(run, images[:samples], at_once)
        for population, values in result.counts.items():
            expected = counts.setdefault(population, values)
            if not np.array_equal(values[:few], expected[:few]):
                raise SystemExit(f"{name}: spike counts of '{population}' differ from the first row's")
        if not speeds:
            density = float(np.mean([codec.rates(graph, result, p.name).mean() for p in graph.of_kind("couple")]))
        speeds.append((name, samples, samples / seconds))
    steps = graph.phase("forward").time_steps
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
    print(
        f"{asked.model} on lava-sim, mnist-1k, trained weights (seed 0), T {steps}, spike density {100 * density:.1f} %, same spike counts in all rows"
    )
    slowest = speeds[-1][2]
    cells = [[name, f"{samples:,}", f"{speed:,.0f}", f"{speed / slowest:.1f}"] for name, samples, speed in speeds]
    rows_found = [{"row": name, "samples": samples, "samples_per_second": speed} for name, samples, speed in speeds]
    print("\n".join(table(["processes", "n", "samples/s", "ratio to the last row"], cells)))
    print(f"{machine}; " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    print(
        json.dumps(
            {
                "model": asked.model,
                "time_steps": steps,
                "spike_density": density,
                "machine": machine,
                "versions": versions(),
                "rows": rows_found,
            }
        )
    )


if __name__ == "__main__":
    main()
