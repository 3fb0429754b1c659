"""The implicit gradient three ways: signed spikes on the integer simulator, signed spikes in PyTorch, and autograd through the equation of the rates.

The rates of digits-fc settle where a = clamp((W x + b + F a) / A, 0, 1). Autograd follows that iteration for 300 rounds; the feedback phase finds the same gradient by
spikes (SPIDE, Xiao et al., Neural Networks 2023): in floats on target torch, and in 8-bit integers on sim, spike for spike as on lava-sim. It works with the rates and masks
that T = 30 steps really made, so the cosines are near 1 and not 1.

python examples/feedback_gradient.py [samples]
"""

import sys

import numpy as np
import torch

import toolchain
from toolchain import data, models

samples = int(sys.argv[1]) if len(sys.argv) > 1 else 64
digits = data.load("digits", samples=samples)
model = models.load("digits-fc").double()
parameters = dict(model.named_parameters())

inputs = model.normalize(torch.tensor(digits.images, dtype=torch.float64)).reshape(samples, -1)
current = inputs @ parameters["input.weight"].T + parameters["input.bias"]
amount = model.neuron.reset  # A, what a spike subtracts
rates = torch.zeros_like(current)
for _ in range(300):
    rates = torch.clamp((current + rates @ parameters["feedback.0.weight"].T) / amount, 0, 1)
logits = rates @ parameters["readout.weight"].T + parameters["readout.bias"]
torch.nn.functional.cross_entropy(logits, torch.tensor(digits.labels)).backward()

print(f"digits-fc, {samples} digits: cosine of each gradient with autograd's, and quotient of their norms")
for target in ("torch", "sim"):
    found = toolchain.feedback("digits-fc", digits.images, digits.labels, target=target)
    for name, gradient in found.gradients.items():
        exact = parameters[name].grad.numpy()
        lengths = np.linalg.norm(gradient), np.linalg.norm(exact)
        cosine = float((gradient * exact).sum() / (lengths[0] * lengths[1]))
        print(f"  {target:<6} {name:<18} cosine {cosine:.4f}  norm {lengths[0] / lengths[1]:.3f}")
        assert cosine > 0.9
