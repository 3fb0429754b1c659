"""lenet: 15C5-P2-40C5-P2-300, five layers without feedback, for MNIST, trained by SPIDE.

        image 1 x 28 x 28 -- conv 5 x 5 --> [15 x 28 x 28] -- pool 2 --> [15 x 14 x 14] -- conv 5 x 5 --> [40 x 14 x 14] -- pool 2 --> [40 x 7 x 7]
                                                                                    -- 1960 -> 300 --> [300] -- readout 300 -> 10

From the paper's code (SPIDE, Xiao et al., Neural Networks 2023): the layers (606,740 parameters; means over 2 x 2 squares feed neurons of their own), IF neurons with Vth 1 and u_rest -1,
Vb 0.5 and u_rest_back -0.5, T 30, T_B 100, scale factor 100, dropout 0.5 of the fully connected layer (the script's 0.2 reaches no layer), initial weights from a normal distribution
scaled by their inputs (Kaiming), no bias, input normalised by (0.1307, 0.3081), 60 epochs of SGD with momentum, lr 0.1 times 0.1 after epochs 20 and 40, batch 128.
Their weight decay of 5e-4 meets a gradient scaled by 100: ours is on the true gradient, so it is 5e-6.

Ours: what is left over from full batches waits for the next epoch, where the authors train on a last, smaller batch.
"""

from __future__ import annotations

import torch
from torch import nn

from toolchain.config import Training
from toolchain.layers import FeedbackSNN, Neuron, Normalize
from toolchain.layers.initial import zero_bias

METHOD = "spide"
SCALE_FACTOR = 100.0

TRAINING = Training(
    dataset="mnist",
    epochs=60,
    batch=128,
    lr=0.1,
    momentum=0.9,
    weight_decay=5e-4 / SCALE_FACTOR,
    schedule="steps",
    milestones=(20, 40),
    decay=0.1,
    held_out=0,
)


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 606,740 parameters and 24,800 neurons."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second, full = nn.Conv2d(1, 15, 5, 1, 2), nn.Conv2d(15, 40, 5, 1, 2), nn.Linear(40 * 7 * 7, 300)
        for connection in (first, second, full):
            nn.init.kaiming_normal_(connection.weight)
            zero_bias(connection)
        readout = nn.Linear(300, 10)
    return FeedbackSNN(
        name="lenet",
        input_shape=(1, 28, 28),
        input=first,
        hidden=[nn.AvgPool2d(2), second, nn.AvgPool2d(2), full],
        readout=readout,
        neuron=Neuron(threshold=1.0, u_rest=-1.0, threshold_back=0.5, u_rest_back=-0.5, leak=1.0),
        time_steps=30,
        feedback_steps=100,
        scale_factor=SCALE_FACTOR,
        dropout_of={"hidden.3": 0.5},
        normalize=Normalize(mean=0.1307, std=0.3081),
    )
