"""From training to the chip: train a small network, compile it to integers, run it, and prove that every target computes the same. Takes seconds.

python examples/train_and_deploy.py [folder]
"""

import sys
import tempfile
from pathlib import Path

import toolchain
from toolchain import target

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
targets = [name for name in ("reference", "sim", "lava-sim") if target.get(name).available() is None]

trained = toolchain.train("digits-fc", epochs=5, output=folder / "run")
print(trained.to_text())

toolchain.compile(folder / "run", calibrate="digits", output=folder / "digits.fsnn")
in_floats = toolchain.deploy(folder / "run", target="torch", dataset="digits")
in_integers = toolchain.deploy(folder / "digits.fsnn", target=targets[-1], dataset="digits")
print(in_floats.to_text())
print(in_integers.to_text())

verified = toolchain.verify(folder / "digits.fsnn", targets=targets, dataset="digits", samples=10)
print(verified.to_text())
assert verified.passed
print(f"what was made is in {folder}")
