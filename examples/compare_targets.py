"""One network on several targets: accuracy, agreement, rates, and the implicit gradient, side by side.

python examples/compare_targets.py [samples]
"""

import sys

import toolchain

samples = int(sys.argv[1]) if len(sys.argv) > 1 else 200
comparison = toolchain.compare("mnist-fc", targets=("torch", "sim", "reference"), samples=samples)
print(comparison.to_text())
for row in comparison.rows:
    print(f"{row.deployment.target}: {100 * row.agreement:.1f} % of the predictions of {comparison.reference}")
