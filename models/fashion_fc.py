"""fashion-fc: 784-400(F400)-10, one layer of 400 neurons with feedback onto itself, for Fashion-MNIST.

        image 1 x 28 x 28 -- Fx 784 -> 400, batch norm --> [400 neurons] -- readout 400 -> 10
                                                            ^        |
                                                            +-- Wf --+      one step late, no bias, spectral norm at most 1

Everything is from the paper's published code (IDE, Xiao et al., NeurIPS 2021, whose Fashion-MNIST row is 90.07 % with these LIF neurons and 90.04 % with IF): leak 0.95, Vth 2 and
u_rest 0, T 5, Broyden's method with threshold 30, dropout 0.2, batch 128, 100 epochs, lr 0.05 times 0.1 at epochs 30, 60 and 90, momentum 0.9, weight decay 5e-4, input normalised
by (0.1307, 0.3081), weights drawn from U(-1, 1) with rows of norm 1 (the readout as torch draws it), biases 0, all 60,000 images learned from and the last epoch reported.
Ours: what is left over from full batches waits for the next epoch, where the authors train on a last, smaller batch.

IF neurons: `--set network.neuron.leak=1`. The feedback phase of the couples (Vb 0.5, u_rest_back -0.5, T_B 100) is SPIDE's; IDE solves for it instead.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from toolchain.config import Training
from toolchain.layers import FeedbackSNN, Limited, Neuron, Normalize
from toolchain.network import Spectral

INPUTS, WIDTH, CLASSES = 784, 400, 10

METHOD = "ide"
TRAINING = Training(
    dataset="fashion-mnist",
    epochs=100,
    batch=128,
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="steps",
    milestones=(30, 60, 90),
    held_out=0,
)


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 478,811 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        input, feedback, readout = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, CLASSES)
        with torch.no_grad():
            for linear in (input, feedback):
                linear.weight.copy_(functional.normalize(torch.empty_like(linear.weight).uniform_(-1, 1), dim=1))
            input.bias.zero_()
        limited = Limited(feedback, Spectral(norm=1.0))
    return FeedbackSNN(
        name="fashion-fc",
        input_shape=(1, 28, 28),
        input=nn.Sequential(input, nn.BatchNorm1d(WIDTH)),
        feedback=[(0, 0, limited)],
        readout=readout,
        neuron=Neuron(threshold=2.0, u_rest=0.0, leak=0.95),
        time_steps=5,
        dropout=0.2,
        normalize=Normalize(mean=0.1307, std=0.3081),
    )
