"""preactresnet-18: the pre-activation ResNet-18 of DSR, for CIFAR-10: two blocks each of 64, 128, 256 and 512 channels on a stream of graded values.

        image 3 x 32 x 32 -- conv 3 x 3 --> (64 x 32 x 32) -- 8 blocks --> (512 x 4 x 4) -- batch norm --> [512 x 4 x 4] -- pool 4 --> [512] -- 512 -> 10, batch norm --> [10]

        block:  (stream) -- batch norm --> [n1] -- conv 3 x 3, batch norm --> [n2] -- conv 3 x 3 --> (stream)
                   |                         |                                                       ^
                   +---- as it is, or -------+-- conv 1 x 1 where the size changes ------------------+        (...) relay, [...] neurons

From the paper's code (DSR, Meng et al., CVPR 2022): the layers (11,176,945 parameters, of which 19 are thresholds), the last neurons' representation as logits, LIF neurons with threshold 0.3
at first, alpha 0.3, bound 0.0005, tau 1 and dt 0.05, T 20, convolutions' initial weights from a normal distribution scaled by their outputs (Kaiming), 200 epochs of SGD with
momentum, lr 0.1 with a cosine schedule, 400 batches of warm-up, batch 128, weight decay 5e-4, images padded by 4, cropped at random and mirrored. Its IF network: --set
"network.trained_threshold={threshold: 6.0, alpha: 0.5, bound: 0.01, tau: null, dt: 0.05}". For T 5: threshold 0.6, alpha 0.5, bound 0.001, dt 0.1, lr 0.05.

Ours: what is left over from full batches waits for the next epoch, where the authors train on a last, smaller batch.
"""

from __future__ import annotations

import torch
from torch import nn

from toolchain.augment import Augmentation
from toolchain.config import Training
from toolchain.layers import FeedbackSNN, Normalize, TrainedThreshold

METHOD = "dsr"

TRAINING = Training(
    dataset="cifar10",
    epochs=200,
    batch=128,
    lr=0.1,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="cosine",
    warmup=400,
    held_out=0,
    augment=Augmentation(crop=4, flip=True),
)

STAGES = ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1))
"""Each block's channels and the stride of its first convolution."""


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network for 10 classes, 11,176,945 parameters."""
    return network("preactresnet-18", 10, Normalize(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)), seed)


def network(name: str, classes: int, normalize: Normalize, seed: int) -> FeedbackSNN:
    """The untrained network for `classes`. Block b has layers 3 b + 1 (n1), 3 b + 2 (n2) and 3 b + 3 (the stream behind it); layer 0 is the stream at first."""
    hidden: list[nn.Module] = []
    skips: list[tuple[int | None, int, nn.Module]] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        input, width = nn.Conv2d(3, 64, 3, 1, 1, bias=False), 64
        for block, (channels, stride) in enumerate(STAGES):
            hidden.append(nn.BatchNorm2d(width))
            hidden.append(nn.Sequential(nn.Conv2d(width, channels, 3, stride, 1), nn.BatchNorm2d(channels)))
            hidden.append(nn.Conv2d(channels, channels, 3, 1, 1))
            plain = stride == 1 and channels == width
            skips.append(
                (3 * block, 3 * block + 3, nn.Identity())
                if plain
                else (3 * block + 1, 3 * block + 3, nn.Conv2d(width, channels, 1, stride))
            )
            width = channels
        readout = nn.Linear(width, classes)
        nn.init.zeros_(readout.bias)
        for module in (input, *hidden, *(module for _, _, module in skips)):
            for part in module.modules():
                if isinstance(part, nn.Conv2d):
                    nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    hidden += [nn.BatchNorm2d(width), nn.AvgPool2d(4), nn.Sequential(readout, nn.BatchNorm1d(classes))]
    return FeedbackSNN(
        name=name,
        input_shape=(3, 32, 32),
        input=input,
        hidden=hidden,
        skips=skips,
        relays=range(0, 3 * len(STAGES) + 1, 3),
        readout=None,
        trained_threshold=TrainedThreshold(threshold=0.3, alpha=0.3, bound=0.0005, tau=1.0, dt=0.05),
        time_steps=20,
        normalize=normalize,
    )
