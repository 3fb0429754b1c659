"""mnist-ottt-a: 784-400-10 of leaky neurons for MNIST, trained by OTTT_A. `mnist-ottt-o` and `mnist-saf-e` are the same network for the other methods.

        image 1 x 28 x 28 -- W 784 -> 400 --> [400 LIF neurons] -- readout 400 -> 10, summed over the time steps

From the papers (OTTT, Xiao et al., NeurIPS 2022; SAF, arXiv 2310.02772, uses the same neurons): leak 0.5 (tau 2), Vth 1, u_rest 0, T 6, loss (1 - l) CE + l MSE with l 0.05, lr 0.1 with a cosine
schedule, batch 128, momentum 0.9, no weight decay.

Ours: the topology (the papers' networks are convolutional; weights here are neither standardised nor scaled), 10 epochs, 200 batches of warm-up, dropout 0.2, training images moved by up to one pixel,
the initial weights (input currents start with variance 1), input normalised by (0.1307, 0.3081).
"""

from __future__ import annotations

import torch
from torch import nn

from toolchain.augment import Augmentation
from toolchain.config import Training
from toolchain.layers import FeedbackSNN, Neuron, Normalize

INPUTS, WIDTH, CLASSES = 784, 400, 10

METHOD = "ottt-a"
TRAINING = Training(
    dataset="mnist",
    epochs=10,
    batch=128,
    lr=0.1,
    momentum=0.9,
    weight_decay=0.0,
    schedule="cosine",
    warmup=200,
    held_out=5000,
    augment=Augmentation(crop=1),
)


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 318,010 parameters."""
    return network("mnist-ottt-a", seed)


def network(name: str, seed: int) -> FeedbackSNN:
    """The network under `name`. The loss sums the logits of all steps, so the readout sees plain spike counts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        input, readout = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES)
        with torch.no_grad():
            nn.init.kaiming_uniform_(input.weight, a=1)
            nn.init.zeros_(input.bias)
    return FeedbackSNN(
        name=name,
        input_shape=(1, 28, 28),
        input=input,
        readout=readout,
        neuron=Neuron(threshold=1.0, u_rest=0.0, leak=0.5),
        time_steps=6,
        dropout=0.2,
        normalize=Normalize(mean=0.1307, std=0.3081),
        weighted_readout=False,
    )
