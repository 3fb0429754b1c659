"""nmnist-conv: 64C5s(F64C5), one layer of 64 x 16 x 16 couples with convolutional feedback onto itself, for N-MNIST, trained by IDE.

        events 2 x 34 x 34 -- conv 5 x 5, stride 2, 2 -> 64, batch norm --> [64 x 16 x 16 couples] -- readout 16384 -> 10
                                                                              ^        |
                                                                              +-- Wf --+   conv 5 x 5, 64 -> 64, spectral norm <= 1, one step late, no bias

From the paper (IDE, Xiao et al., NeurIPS 2021) and its code: the layers with padding 1 (269,643 parameters; the README's 291K and 21K neurons would be 17 x 17 maps, padding 2),
LIF neurons with leak 0.95, Vth 2, resting at 0, T 30, dropout 0.2 of both connections, initial weights U(-1, 1) with each output's norm made 1 and no bias,
100 epochs of SGD with momentum, lr 0.05 times 0.1 after epochs 30, 60 and 90, batch 128, weight decay 5e-4. Batch normalisation of the input uses the statistics of the mean event.

Ours: solver `iter` solves the system it is meant to solve (theirs ends at another one: --set train.options.solver=iter-compat).
"""

from __future__ import annotations

import torch
from torch import nn

from toolchain.config import Training
from toolchain.layers import FeedbackSNN, Limited, Neuron, Spectral
from toolchain.layers.initial import unit_rows, zero_bias

METHOD = "ide"

TRAINING = Training(
    dataset="nmnist",
    epochs=100,
    batch=128,
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="steps",
    milestones=(30, 60, 90),
    decay=0.1,
    held_out=0,
    options={"solver": "iter", "threshold": 30},
)


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 269,643 parameters and 16,384 neurons."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        input, feedback = nn.Conv2d(2, 64, 5, 2, 1), nn.Conv2d(64, 64, 5, 1, 2, bias=False)
        unit_rows(input.weight)
        unit_rows(feedback.weight)
        zero_bias(input)
        limited = Limited(feedback, Spectral(1.0))
        readout = nn.Linear(64 * 16 * 16, 10)
    return FeedbackSNN(
        name="nmnist-conv",
        input_shape=(2, 34, 34),
        input=nn.Sequential(input, nn.BatchNorm2d(64)),
        feedback=[(0, 0, limited)],
        readout=readout,
        neuron=Neuron(threshold=2.0, u_rest=0.0, leak=0.95),
        time_steps=30,
        dropout=0.2,
    )
