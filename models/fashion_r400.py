"""fashion-r400: 784-400-10, one layer of 400 leaky neurons that feed back onto themselves, for Fashion-MNIST, trained by OTTT.

        image 1 x 28 x 28 -- W 784 -> 400 --> [400 LIF neurons] -- readout 400 -> 10, summed over the time steps
                                               ^        |
                                               +-- Wf --+      one step late, no bias

From the paper (OTTT, Xiao et al., NeurIPS 2022, its "R400" row for Fashion-MNIST): the topology and T 5; its neurons (leak 0.5, Vth 1, u_rest 0), batch 128, 100 epochs, lr 0.1 with a cosine schedule.

Ours, as the paper's script for this row is not public: dropout 0.2, loss (1 - l) CE + l MSE with l 0.05, no weight decay, the initial weights (input currents start with variance 1, feedback as torch
draws it), input normalised by (0.1307, 0.3081).
"""

from __future__ import annotations

import torch
from torch import nn

from toolchain.config import Training
from toolchain.layers import FeedbackSNN, Neuron, Normalize

INPUTS, WIDTH, CLASSES = 784, 400, 10

METHOD = "ottt-a"
TRAINING = Training(dataset="fashion-mnist", epochs=100, batch=128, lr=0.1, momentum=0.9, weight_decay=0.0, schedule="cosine", held_out=0)


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 478,010 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        input, feedback, readout = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, CLASSES)
        with torch.no_grad():
            nn.init.kaiming_uniform_(input.weight, a=1)
            nn.init.zeros_(input.bias)
    return FeedbackSNN(
        name="fashion-r400",
        input_shape=(1, 28, 28),
        input=input,
        feedback=[(0, 0, feedback)],
        readout=readout,
        neuron=Neuron(threshold=1.0, u_rest=0.0, leak=0.5),
        time_steps=5,
        dropout=0.2,
        normalize=Normalize(mean=0.1307, std=0.3081),
        weighted_readout=False,
    )
