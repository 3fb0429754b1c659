"""Samples per second of mnist-fc as Lava processes: ours, many samples side by side, beside Lava's stock synapses, one after another.

python examples/bench_lava_sim.py [samples] [samples for the stock synapses]
"""

import sys

import toolchain

ours, stock = (int(word) for word in (*sys.argv[1:], *("1000", "200")[len(sys.argv) - 1 :]))
rows = [toolchain.deploy("mnist-fc", target="lava-sim", samples=n, synapses=s) for s, n in (("own", ours), ("stock", stock))]
for name, row in zip(("our synapses", "Lava's stock synapses"), rows, strict=True):
    print(
        f"{name:<22} {row.samples_per_second:8.1f} samples/s   n {row.samples:>5}   accuracy {100 * row.accuracy:.2f} %   start-up {row.startup_seconds:.1f} s"
    )
print(f"{'ratio':<22} {rows[0].samples_per_second / rows[1].samples_per_second:8.1f}")
