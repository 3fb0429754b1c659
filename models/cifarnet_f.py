"""cifarnet-f: CIFARNet-F, 128C3s-256C3-512C3s-1024C3-512C3, with feedback from the last layer to the first, for CIFAR-10, trained by SPIDE.

        image 3 x 32 x 32 -- s2 --> [128 x 16 x 16] ----> [256 x 16 x 16] -- s2 --> [512 x 8 x 8] ----> [1024 x 8 x 8] ----> [512 x 8 x 8] -- readout 32768 -> 10
                                      ^                                                                                        |
                                      +----------------------- Wf: transposed conv, stride 2, norm <= 2 -----------------------+   one step late, no bias
        all convolutions 3 x 3, s2: stride 2

From the paper's code (SPIDE, Xiao et al., Neural Networks 2023): the layers (11,835,146 parameters), IF neurons with Vth 1 and u_rest -1, Vb 0.5 and u_rest_back -0.5, T 30, T_B 250,
scale factor 400, dropout 0.25 of every connection, initial weights U(-1, 1) with each output's norm made 1 (the feedback's then times 0.1), no bias, 100 epochs of SGD with momentum,
lr 0.05 times 0.1 after epochs 50 and 75, 400 batches of warm-up, batch 128, images padded by 4, cropped at random and mirrored. Their weight decay of 5e-4 meets a gradient scaled
by 400: ours is on the true gradient, so it is 1.25e-6.

Ours: the feedback's Frobenius norm is exact.
"""

from __future__ import annotations

import torch
from torch import nn

from toolchain.augment import Augmentation
from toolchain.config import Training
from toolchain.layers import FeedbackSNN, Frobenius, Limited, Neuron, Normalize
from toolchain.layers.initial import unit_rows, zero_bias

METHOD = "spide"
SCALE_FACTOR = 400.0

TRAINING = Training(
    dataset="cifar10",
    epochs=100,
    batch=128,
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4 / SCALE_FACTOR,
    schedule="steps",
    milestones=(50, 75),
    decay=0.1,
    warmup=400,
    held_out=0,
    augment=Augmentation(crop=4, flip=True),
)

WIDTHS = (128, 256, 512, 1024, 512)


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network for 10 classes, 11,835,146 parameters and 229,376 neurons."""
    return network("cifarnet-f", 10, SCALE_FACTOR, seed)


def network(name: str, classes: int, scale_factor: float, seed: int) -> FeedbackSNN:
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
        with torch.no_grad():
            feedback.weight.mul_(0.1)
        readout = nn.Linear(e * 8 * 8, classes)
    return FeedbackSNN(
        name=name,
        input_shape=(3, 32, 32),
        input=chain[0],
        hidden=chain[1:],
        feedback=[(4, 0, Limited(feedback, Frobenius(2.0)))],
        readout=readout,
        neuron=Neuron(threshold=1.0, u_rest=-1.0, threshold_back=0.5, u_rest_back=-0.5, leak=1.0),
        time_steps=30,
        feedback_steps=250,
        scale_factor=scale_factor,
        dropout=0.25,
        normalize=Normalize(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
    )
