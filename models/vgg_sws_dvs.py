"""vgg-sws-dvs: vgg-sws for CIFAR10-DVS, trained by OTTT. The layers are in `vgg_sws.py`.

From the paper's code: frames of 2 x 48 x 48, T 10, a loss of 0.999 CE + 0.001 MSE, dropout 0.1, inputs normalised by (0.2728, 0.1295) and (0.2225, 0.1290), padded by 4 and cropped at
random; 300 epochs, lr 0.1 with a cosine schedule, batch 128, no weight decay.

Ours: dropout acts on currents, theirs on spikes, both with one mask for all steps.
"""

from __future__ import annotations

import msgspec

from toolchain.augment import Augmentation
from toolchain.layers import FeedbackSNN, Normalize
from toolchain.models import vgg_sws

METHOD = vgg_sws.METHOD

TRAINING = msgspec.structs.replace(vgg_sws.TRAINING, dataset="cifar10-dvs", augment=Augmentation(crop=4), options={"loss_lambda": 0.001})


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network for 10 classes, 9,227,786 parameters."""
    normalize = Normalize(mean=(0.2728, 0.1295), std=(0.2225, 0.1290))
    return vgg_sws.network("vgg-sws-dvs", (2, 48, 48), 10, normalize, seed, time_steps=10, dropout=0.1)
