"""vgg-11-dvs: the VGG-11 of DSR, for CIFAR10-DVS.

        events 2 x 48 x 48 --> [64 x 48 x 48] -- M --> [128 x 24 x 24] -- M --> [256 x 12 x 12] --> [256 x 12 x 12] -- M --> [512 x 6 x 6] --> [512 x 6 x 6] -- M
                           --> [512 x 3 x 3] --> [512 x 3 x 3] -- M, then 1 x 1 repeated to 7 x 7, 25088 -> 10, batch norm --> [10]
        arrows: conv 3 x 3 and batch norm; M: means over 2 x 2 squares

From the paper's code (DSR, Meng et al., CVPR 2022): the layers (9,476,327 parameters, of which 9 are thresholds), the last neurons' representation as logits, LIF neurons with threshold 0.3
at first, alpha 0.3, bound 0.0005, tau 1 and dt 0.05, T 20 frames of equally many events, convolutions' initial weights from a normal distribution scaled by their outputs (Kaiming), the
classifier's N(0, 0.01), no bias, 300 epochs of SGD with momentum, lr 0.05 with a cosine schedule, 400 batches of warm-up, batch 128, weight decay 5e-4, frames padded by 4 and cropped
at random, dropout 0.1. Its IF network: --set "network.trained_threshold={threshold: 6.0, alpha: 0.5, bound: 0.01, tau: null, dt: 0.05}".

Ours: dropout acts on the current that follows a layer, theirs on its spikes (one mask for all steps here, a mask a step there).
"""

from __future__ import annotations

import torch
from torch import nn

from toolchain.augment import Augmentation
from toolchain.config import Training
from toolchain.layers import FeedbackSNN, TrainedThreshold
from toolchain.layers.initial import zero_bias

METHOD = "dsr"

TRAINING = Training(
    dataset="cifar10-dvs",
    epochs=300,
    batch=128,
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="cosine",
    warmup=400,
    held_out=0,
    augment=Augmentation(crop=4),
)

CLASSES = 10
LAYERS = ((64, False), (128, True), (256, True), (256, False), (512, True), (512, False), (512, True), (512, False))
"""Each layer's channels, and whether means over 2 x 2 squares come first."""


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 9,476,327 parameters."""
    chain: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = 2
        for channels, pooled in LAYERS:
            conv = nn.Conv2d(width, channels, 3, 1, 1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            zero_bias(conv)
            chain.append(nn.Sequential(*([nn.AvgPool2d(2)] if pooled else []), conv, nn.BatchNorm2d(channels)))
            width = channels
        classifier = nn.Linear(width * 7 * 7, CLASSES)
        nn.init.normal_(classifier.weight, 0, 0.01)
        zero_bias(classifier)
    chain.append(nn.Sequential(nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(7), classifier, nn.BatchNorm1d(CLASSES)))
    return FeedbackSNN(
        name="vgg-11-dvs",
        input_shape=(2, 48, 48),
        input=chain[0],
        hidden=chain[1:],
        readout=None,
        trained_threshold=TrainedThreshold(threshold=0.3, alpha=0.3, bound=0.0005, tau=1.0, dt=0.05),
        time_steps=20,
        dropout=0.1,
        dropout_of={"input": 0.0},
    )
