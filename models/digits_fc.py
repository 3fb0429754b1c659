"""digits-fc: 64-32(F32)-10, one layer of 32 ternary couples with feedback onto itself, for the 8 x 8 digits.

        image 1 x 8 x 8 -- Fx 64 -> 32 --> [32 couples] -- readout 32 -> 10
                                            ^        |
                                            +-- Wf --+      one step late, no bias

A network of ours, not of a paper: small enough to train in seconds, for tests and first steps. Neurons and steps are those of mnist-fc. The data come with the package.
"""

from __future__ import annotations

import torch
from torch import nn

from toolchain.config import Training
from toolchain.layers import FeedbackSNN, Neuron, Normalize

INPUTS, WIDTH, CLASSES = 64, 32, 10

METHOD = "spide"
TRAINING = Training(
    dataset="digits", epochs=15, batch=32, lr=0.1, momentum=0.9, weight_decay=1e-3, schedule="cosine", warmup=30, held_out=200
)


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 3,434 parameters; input currents start with variance 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        input, feedback, readout = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, CLASSES)
        with torch.no_grad():
            nn.init.kaiming_uniform_(input.weight, a=1)
            nn.init.zeros_(input.bias)
    return FeedbackSNN(
        name="digits-fc",
        input_shape=(1, 8, 8),
        input=input,
        feedback=[(0, 0, feedback)],
        readout=readout,
        neuron=Neuron(threshold=1.0, u_rest=-1.0, threshold_back=0.5, u_rest_back=-0.5, leak=1.0),
        time_steps=30,
        feedback_steps=100,
        scale_factor=25.0,
        dropout=0.1,
        normalize=Normalize(mean=0.3, std=0.38),
    )
