"""Learning where the network runs: both equilibria as spikes, 8-bit weights that change by what reaches their own two ends. On Lava processes where Lava is installed.

python examples/learn_on_target.py [epochs]
"""

import sys

import toolchain
from toolchain import target

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
place = "lava-sim" if target.get("lava-sim").available() is None else "sim"  # the same weights, bit for bit
for parts in ({"readout_only": True}, {}):
    learned = toolchain.learn("digits-fc", target=place, dataset="digits", epochs=epochs, **parts)
    print(learned.to_text(), end="\n\n")
