"""mnist-dsr: 784-400-10 of neurons with a trained threshold, for MNIST, trained by DSR.

        image 1 x 28 x 28 -- W 784 -> 400, batch norm --> [400 IF neurons, threshold V trained] -- readout 400 -> 10 of the rates

From the paper (DSR, Meng et al., CVPR 2022, its CIFAR settings for IF neurons): V starts at 6 and stays above 0.01, a neuron fires at V / 2 and loses V, T 20, lr 0.1 with a cosine schedule and 400
batches of warm-up, batch 128, momentum 0.9, weight decay 5e-4.

Ours: the topology (the paper's networks are convolutional), 15 epochs, lr 0.05, dropout 0.2, input normalised by (0.1307, 0.3081).
"""

from __future__ import annotations

import torch
from torch import nn

from toolchain.config import Training
from toolchain.layers import FeedbackSNN, Normalize
from toolchain.network import TrainedThreshold

INPUTS, WIDTH, CLASSES = 784, 400, 10

METHOD = "dsr"
TRAINING = Training(
    dataset="mnist", epochs=15, batch=128, lr=0.05, momentum=0.9, weight_decay=5e-4, schedule="cosine", warmup=400, held_out=5000
)


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 318,811 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        input, readout = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES)
    return FeedbackSNN(
        name="mnist-dsr",
        input_shape=(1, 28, 28),
        input=nn.Sequential(input, nn.BatchNorm1d(WIDTH)),
        readout=readout,
        trained_threshold=TrainedThreshold(threshold=6.0, alpha=0.5, bound=0.01),
        time_steps=20,
        dropout=0.2,
        normalize=Normalize(mean=0.1307, std=0.3081),
    )
