"""A network of your own: describe it, build the torch module, and prove that the integer simulators compute the same. Takes seconds.

python examples/own_network.py
"""

import torch

import toolchain
from toolchain import data
from toolchain.layers import build
from toolchain.network import Feedback, Linear, Network, Neuron

network = Network(
    name="mine",
    input_shape=(1, 8, 8),
    input=Linear(64, 32),
    hidden=(Linear(32, 24),),
    feedback=(Feedback(source=1, target=0, connection=Linear(24, 32, bias=False)),),
    readout=Linear(24, 10),
    neuron=Neuron(leak=0.95),
    time_steps=20,
    feedback_steps=40,
)
torch.manual_seed(0)
model = build(network)

digits = data.load("digits", samples=16)
gradient = toolchain.feedback(model, digits.images, digits.labels, target="sim")
print(f"loss {gradient.loss:.3f} of the untrained network; its implicit gradient, by signed spikes on the integer simulator:")
for name, value in gradient.gradients.items():
    print(f"  {name:<20} {value.shape}")

result = toolchain.verify(model, targets=("reference", "sim"), dataset="digits", samples=16)
print(result.to_text())
assert result.passed
