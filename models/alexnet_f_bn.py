"""alexnet-f-bn: AlexNet-F, 96C3s-256C3-384C3s-384C3-256C3, with batch normalisation and feedback from the last layer to the first, for CIFAR-10, trained by IDE.

        image 3 x 32 x 32 -- s2 --> [96 x 16 x 16] ----> [256 x 16 x 16] -- s2 --> [384 x 8 x 8] ----> [384 x 8 x 8] ----> [256 x 8 x 8] -- readout 16384 -> 10
                                      ^                                                                                      |
                                      +----------------- Wf: transposed conv, stride 2, spectral norm <= 1 ------------------+   one step late, no bias
        all convolutions 3 x 3, s2: stride 2

From the paper (IDE, Xiao et al., NeurIPS 2021) and its code: the layers (3,709,515 parameters), LIF neurons with leak 0.99, Vth 2, resting at 0, T 100 (also 30), dropout 0.2 of every
connection, initial weights U(-1, 1) with each output's norm made 1, no bias at first, Broyden's method with threshold 30, 100 epochs of SGD with momentum, lr 0.05 times 0.1 after
epochs 50 and 75, 400 batches of warm-up, batch 128, weight decay 5e-4, images padded by 4, cropped at random and mirrored.

Ours: J uses the running statistics of batch normalisation, as the simulation does.
`--set network.neuron.leak=1` makes the paper's IF network.
"""

from __future__ import annotations

import torch
from torch import nn

from toolchain.augment import Augmentation
from toolchain.config import Training
from toolchain.layers import FeedbackSNN, Limited, Neuron, Normalize, Spectral
from toolchain.layers.initial import unit_rows, zero_bias

METHOD = "ide"

TRAINING = Training(
    dataset="cifar10",
    epochs=100,
    batch=128,
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="steps",
    milestones=(50, 75),
    decay=0.1,
    warmup=400,
    held_out=0,
    augment=Augmentation(crop=4, flip=True),
    options={"solver": "broyden", "threshold": 30},
)

WIDTHS = (96, 256, 384, 384, 256)


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network for 10 classes, 3,709,515 parameters and 155,648 neurons."""
    return network("alexnet-f-bn", 10, seed)


def network(name: str, classes: int, seed: int) -> FeedbackSNN:
    """The untrained network for `classes`."""
    a, b, c, d, e = WIDTHS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        chain = [
            nn.Conv2d(3, a, 3, 2, 1),
            nn.Conv2d(a, b, 3, 1, 1),
            nn.Conv2d(b, c, 3, 2, 1),
            nn.Conv2d(c, d, 3, 1, 1),
            nn.Conv2d(d, e, 3, 1, 1),
        ]
        for connection in chain:
            unit_rows(connection.weight)
            zero_bias(connection)
        feedback = nn.ConvTranspose2d(e, a, 3, 2, 1, output_padding=1, bias=False)
        unit_rows(feedback.weight, axis=1)
        limited = Limited(feedback, Spectral(1.0))
        readout = nn.Linear(e * 8 * 8, classes)
    normed = [nn.Sequential(connection, nn.BatchNorm2d(connection.out_channels)) for connection in chain]
    return FeedbackSNN(
        name=name,
        input_shape=(3, 32, 32),
        input=normed[0],
        hidden=normed[1:],
        feedback=[(4, 0, limited)],
        readout=readout,
        neuron=Neuron(threshold=2.0, u_rest=0.0, leak=0.99),
        time_steps=100,
        dropout=0.2,
        normalize=Normalize(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
    )
