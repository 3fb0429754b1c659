"""mnist-conv: 64C5s(F64C5), one layer of 64 x 14 x 14 couples with convolutional feedback onto itself, for MNIST, trained by IDE.

        image 1 x 28 x 28 -- conv 5 x 5, stride 2, 1 -> 64, batch norm --> [64 x 14 x 14 couples] -- readout 12544 -> 10
                                                                             ^        |
                                                                             +-- Wf --+   conv 5 x 5, 64 -> 64, spectral norm <= 1, one step late, no bias

From the paper (IDE, Xiao et al., NeurIPS 2021) and its code: the layers (229,643 parameters), LIF neurons with leak 0.95, Vth 2, resting at 0, T 30, dropout 0.2 of
both connections, initial weights U(-1, 1) with each output's norm made 1 and no bias, input normalised by (0.1307, 0.3081), Broyden's method with threshold 30,
100 epochs of SGD with momentum, lr 0.05 times 0.1 after epochs 30, 60 and 90, batch 128, weight decay 5e-4.

Ours: what is left over from full batches waits for the next epoch, where the authors train on a last, smaller batch. `--set network.neuron.leak=1` makes the paper's IF network.
"""

from __future__ import annotations

import torch
from torch import nn

from toolchain.config import Training
from toolchain.layers import FeedbackSNN, Limited, Neuron, Normalize, Spectral
from toolchain.layers.initial import unit_rows, zero_bias

METHOD = "ide"

TRAINING = Training(
    dataset="mnist",
    epochs=100,
    batch=128,
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="steps",
    milestones=(30, 60, 90),
    decay=0.1,
    held_out=0,
    options={"solver": "broyden", "threshold": 30},
)


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 229,643 parameters and 12,544 neurons."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        input, feedback = nn.Conv2d(1, 64, 5, 2, 2), nn.Conv2d(64, 64, 5, 1, 2, bias=False)
        unit_rows(input.weight)
        unit_rows(feedback.weight)
        zero_bias(input)
        limited = Limited(feedback, Spectral(1.0))
        readout = nn.Linear(64 * 14 * 14, 10)
    return FeedbackSNN(
        name="mnist-conv",
        input_shape=(1, 28, 28),
        input=nn.Sequential(input, nn.BatchNorm2d(64)),
        feedback=[(0, 0, limited)],
        readout=readout,
        neuron=Neuron(threshold=2.0, u_rest=0.0, leak=0.95),
        time_steps=30,
        dropout=0.2,
        normalize=Normalize(mean=0.1307, std=0.3081),
    )
