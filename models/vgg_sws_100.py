"""vgg-sws-100: vgg-sws with 100 classes, for CIFAR-100, trained by OTTT. Everything else is in `vgg_sws.py`."""

from __future__ import annotations

import msgspec

from toolchain.layers import FeedbackSNN
from toolchain.models import vgg_sws

METHOD = vgg_sws.METHOD

TRAINING = msgspec.structs.replace(vgg_sws.TRAINING, dataset="cifar100")


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network for 100 classes, 9,274,532 parameters."""
    return vgg_sws.network("vgg-sws-100", (3, 32, 32), 100, vgg_sws.CIFAR, seed)
