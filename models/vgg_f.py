"""vgg-f: the VGG of OTTT with standardised weights and feedback from the last layer to the first, for CIFAR-100.

        image 3 x 32 x 32 --> [64 x 32 x 32] --> [128 x 32 x 32] -- M --> [256 x 16 x 16] --> [256 x 16 x 16] -- M --> [512 x 8 x 8] --> [512 x 8 x 8]
                               ^          -- M --> [512 x 4 x 4] --> [512 x 4 x 4] -- mean of all --> readout 512 -> 100
                               |                                          |
                               +-- conv 3 x 3, of each value repeated ----+    8 x 8 times; one step late, with a bias
        arrows: conv 3 x 3 with standardised weights, of spikes times 2.74; M: means over 2 x 2 squares

From the paper's code (OTTT, Xiao et al., NeurIPS 2022): the layers (9,569,508 parameters), LIF neurons with leak 0.5, Vth 1, resting at 0, T 6, convolutions' initial weights from a normal
distribution scaled by their outputs (Kaiming), the readout's N(0, 0.01), the feedback's 0, no bias, a loss of 0.95 CE + 0.05 MSE, 300 epochs of SGD with momentum, lr 0.1 with a cosine
schedule, batch 128, no weight decay, images padded by 4, cropped at random, cut out and mirrored. The paper's row is OTTT_O's: `--method ottt-o` learns at every step.

Ours: what is left over from full batches waits for the next epoch, where the authors train on a last, smaller batch.
"""

from __future__ import annotations

import torch
from torch import nn

from toolchain.augment import Augmentation
from toolchain.config import Training
from toolchain.layers import FeedbackSNN, Neuron, Normalize, Scale, Standardized
from toolchain.layers.initial import zero_bias

METHOD = "ottt-a"

TRAINING = Training(
    dataset="cifar100",
    epochs=300,
    batch=128,
    lr=0.1,
    momentum=0.9,
    weight_decay=0.0,
    schedule="cosine",
    held_out=0,
    augment=Augmentation(crop=4, flip=True, cutout=0.5),
    options={"loss_lambda": 0.05},
)

CLASSES = 100
SCALE = 2.74
LAYERS = ((64, False), (128, False), (256, True), (256, False), (512, True), (512, False), (512, True), (512, False))
"""Each layer's channels, and whether means over 2 x 2 squares come first."""


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 9,569,508 parameters."""
    chain: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = 3
        for layer, (channels, pooled) in enumerate(LAYERS):
            conv = nn.Conv2d(width, channels, 3, 1, 1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            zero_bias(conv)
            before = [Scale(SCALE), *([nn.AvgPool2d(2)] if pooled else [])] if layer else []
            chain.append(nn.Sequential(*before, Standardized(conv)))
            width = channels
        feedback, readout = nn.Conv2d(width, LAYERS[0][0], 3, 1, 1), nn.Linear(width, CLASSES)
        nn.init.zeros_(feedback.weight)
        nn.init.normal_(readout.weight, 0, 0.01)
        zero_bias(feedback)
        zero_bias(readout)
    return FeedbackSNN(
        name="vgg-f",
        input_shape=(3, 32, 32),
        input=chain[0],
        hidden=chain[1:],
        feedback=[(len(LAYERS) - 1, 0, nn.Sequential(Scale(SCALE), nn.Upsample(scale_factor=8, mode="nearest"), feedback))],
        readout=nn.Sequential(Scale(SCALE), nn.AdaptiveAvgPool2d(1), readout),
        neuron=Neuron(threshold=1.0, u_rest=0.0, leak=0.5),
        time_steps=6,
        normalize=Normalize(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
        weighted_readout=False,
    )
