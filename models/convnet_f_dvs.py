"""convnet-f-dvs: 512C9s(F512C5), one layer of 512 x 24 x 24 couples with convolutional feedback onto itself, for CIFAR10-DVS, trained by SPIDE.

        events 2 x 48 x 48 -- conv 9 x 9, stride 2, 2 -> 512 --> [512 x 24 x 24 couples] -- readout 294912 -> 10
                                                                   ^        |
                                                                   +-- Wf --+   conv 5 x 5, 512 -> 512, Frobenius norm <= 10, one step late, no bias

From the paper's code (SPIDE, Xiao et al., Neural Networks 2023): the layers (9,586,186 parameters), IF neurons with Vth 1 and u_rest -1, Vb 0.5 and u_rest_back -0.5, T 30 frames of
equally many events, T_B 250, scale factor 400, no dropout, initial weights from a normal distribution scaled by their inputs (Kaiming), no bias, 70 epochs of SGD with momentum, lr 0.05
times 0.1 after epoch 50, batch 128, frames padded by 4 and cropped at random. Their weight decay of 5e-4 meets a gradient scaled by 400: ours is on the true gradient, so it is 1.25e-6.

Ours: the feedback's Frobenius norm is exact.
"""

from __future__ import annotations

import torch
from torch import nn

from toolchain.augment import Augmentation
from toolchain.config import Training
from toolchain.layers import FeedbackSNN, Frobenius, Limited, Neuron
from toolchain.layers.initial import zero_bias

METHOD = "spide"
SCALE_FACTOR = 400.0

TRAINING = Training(
    dataset="cifar10-dvs",
    epochs=70,
    batch=128,
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4 / SCALE_FACTOR,
    schedule="steps",
    milestones=(50,),
    decay=0.1,
    held_out=0,
    augment=Augmentation(crop=4),
)


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 9,586,186 parameters and 294,912 neurons."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        input, feedback = nn.Conv2d(2, 512, 9, 2, 4), nn.Conv2d(512, 512, 5, 1, 2, bias=False)
        for connection in (input, feedback):
            nn.init.kaiming_normal_(connection.weight)
            zero_bias(connection)
        readout = nn.Linear(512 * 24 * 24, 10)
    return FeedbackSNN(
        name="convnet-f-dvs",
        input_shape=(2, 48, 48),
        input=input,
        feedback=[(0, 0, Limited(feedback, Frobenius(10.0)))],
        readout=readout,
        neuron=Neuron(threshold=1.0, u_rest=-1.0, threshold_back=0.5, u_rest_back=-0.5, leak=1.0),
        time_steps=30,
        feedback_steps=250,
        scale_factor=SCALE_FACTOR,
    )
