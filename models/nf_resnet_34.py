"""nf-resnet-34: the normaliser-free ResNet-34 of OTTT, for ImageNet: 3, 4, 6 and 3 blocks of 64, 128, 256 and 512 channels on a stream of graded values.

        image 3 x 224 x 224 -- conv 7 x 7, stride 2, means over 3 x 3 squares 2 apart --> (64 x 56 x 56) -- 16 blocks --> (512 x 7 x 7) -- mean of all --> readout 512 -> 1000

        block:  (stream) -- / beta --> [n1] -- conv 3 x 3 --> [n2] -- conv 3 x 3, gain, x 0.2 --> (stream)
                   |                    |                                                         ^
                   +--- as it is, or ---+-- conv 1 x 1 where the size changes --------------------+        (...) relay, [...] neurons
        all convolutions have standardised weights and, but for the first, see spikes times 2.74

From the paper's code (OTTT, Xiao et al., NeurIPS 2022; the blocks are those of Brock et al., ICLR 2021): the layers (21,797,688 parameters), beta the root of the stream's expected variance, which
grows by 0.2 squared a block and starts again at 1 where the size changes; a trained gain of 0 at first ends each branch; LIF neurons with leak 0.5, Vth 1, resting at 0, T 6;
convolutions' initial weights from a normal distribution scaled by their outputs (Kaiming), no bias, the readout's weights 0, plain cross entropy, 100 epochs of SGD with momentum,
lr 0.1 with a cosine schedule, batch 256, weight decay 2e-5, images cropped at random sizes to 224 x 224 and mirrored, inputs normalised by (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225).

Ours: a gain learns from the trace of its spikes, as the weights before it do (from the spikes alone there).
"""

from __future__ import annotations

import torch
from torch import nn

from toolchain.config import Training
from toolchain.layers import FeedbackSNN, Gain, Neuron, Normalize, Scale, Standardized
from toolchain.layers.initial import zero_bias

METHOD = "ottt-a"

TRAINING = Training(
    dataset="imagenet",
    epochs=100,
    batch=256,
    lr=0.1,
    momentum=0.9,
    weight_decay=2e-5,
    schedule="cosine",
    held_out=0,
    options={"loss_lambda": 0.0},
)

CLASSES = 1000
SCALE, BRANCH = 2.74, 0.2
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
"""Channels and number of blocks."""


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 21,797,688 parameters. Block b has layers 3 b + 1 (n1), 3 b + 2 (n2) and 3 b + 3 (the stream behind it); layer 0 is the stream at first."""
    hidden: list[nn.Module] = []
    skips: list[tuple[int | None, int, nn.Module]] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width, variance = 64, 1.0
        input = nn.Sequential(_standardized(3, width, 7, 2), nn.AvgPool2d(3, 2, 1))
        for stage, (channels, blocks) in enumerate(STAGES):
            for block in range(blocks):
                start, stride = len(hidden), 2 if stage and not block else 1
                hidden.append(Scale(variance**-0.5))
                hidden.append(nn.Sequential(Scale(SCALE), _standardized(width, channels, 3, stride)))
                hidden.append(nn.Sequential(Scale(SCALE), _standardized(channels, channels, 3), Gain(0.0), Scale(BRANCH)))
                changed = channels != width
                smaller = nn.Sequential(Scale(SCALE), _standardized(width, channels, 1, stride)) if changed else nn.Identity()
                skips.append((start + 1 if changed else start, start + 3, smaller))
                variance = (1.0 if changed else variance) + BRANCH**2
                width = channels
        readout = nn.Linear(width, CLASSES)
        nn.init.zeros_(readout.weight)
    return FeedbackSNN(
        name="nf-resnet-34",
        input_shape=(3, 224, 224),
        input=input,
        hidden=hidden,
        skips=skips,
        relays=range(0, len(hidden) + 1, 3),
        readout=nn.Sequential(nn.AdaptiveAvgPool2d(1), readout),
        neuron=Neuron(threshold=1.0, u_rest=0.0, leak=0.5),
        time_steps=6,
        normalize=Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        weighted_readout=False,
    )


def _standardized(inputs: int, outputs: int, kernel: int, stride: int = 1) -> Standardized:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    zero_bias(conv)
    return Standardized(conv)
