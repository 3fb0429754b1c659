"""convnet-f: 64C5s-64C5s-64C5 with feedback from the last layer to the first, for MNIST, trained by SPIDE.

        image 1 x 28 x 28 -- conv 5 x 5, stride 2 --> [64 x 14 x 14] -- conv 5 x 5, stride 2 --> [64 x 7 x 7] -- conv 5 x 5 --> [64 x 7 x 7] -- readout 3136 -> 10
                                                       ^                                                                         |
                                                       +-------------- Wf: transposed conv 3 x 3, stride 2, norm <= 2 -----------+   one step late, no bias

From the paper's code (SPIDE, Xiao et al., Neural Networks 2023): the layers (274,826 parameters), IF neurons with Vth 1 and u_rest -1, Vb 0.5 and u_rest_back -0.5, T 30, T_B 100, scale
factor 100, dropout 0.2 of every connection, initial weights from a normal distribution scaled by their inputs (Kaiming; the feedback's times 0.1), no bias, input normalised by
(0.1307, 0.3081), 100 epochs of SGD with momentum, lr 0.05 times 0.1 after epochs 30, 60 and 90, batch 128. Their weight decay of 5e-4 meets a gradient scaled by 100: ours is on
the true gradient, so it is 5e-6.

Ours: the feedback's Frobenius norm is exact.
"""

from __future__ import annotations

import torch
from torch import nn

from toolchain.config import Training
from toolchain.layers import FeedbackSNN, Frobenius, Limited, Neuron, Normalize
from toolchain.layers.initial import zero_bias

METHOD = "spide"
SCALE_FACTOR = 100.0

TRAINING = Training(
    dataset="mnist",
    epochs=100,
    batch=128,
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4 / SCALE_FACTOR,
    schedule="steps",
    milestones=(30, 60, 90),
    decay=0.1,
    held_out=0,
)


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 274,826 parameters and 18,816 neurons."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        chain = [nn.Conv2d(1, 64, 5, 2, 2), nn.Conv2d(64, 64, 5, 2, 2), nn.Conv2d(64, 64, 5, 1, 2)]
        for connection in chain:
            nn.init.kaiming_normal_(connection.weight)
            zero_bias(connection)
        feedback = nn.ConvTranspose2d(64, 64, 3, 2, 1, output_padding=1, bias=False)
        nn.init.kaiming_normal_(feedback.weight)
        with torch.no_grad():
            feedback.weight.mul_(0.1)
        readout = nn.Linear(64 * 7 * 7, 10)
    return FeedbackSNN(
        name="convnet-f",
        input_shape=(1, 28, 28),
        input=chain[0],
        hidden=chain[1:],
        feedback=[(2, 0, Limited(feedback, Frobenius(2.0)))],
        readout=readout,
        neuron=Neuron(threshold=1.0, u_rest=-1.0, threshold_back=0.5, u_rest_back=-0.5, leak=1.0),
        time_steps=30,
        feedback_steps=100,
        scale_factor=SCALE_FACTOR,
        dropout=0.2,
        normalize=Normalize(mean=0.1307, std=0.3081),
    )
