"""mnist-ide: the network of `mnist-fc`, 784-400(F400)-10 of IF neurons without batch norm, trained by IDE.

The gradient is the exact one of the equilibrium (Broyden's method, threshold 30), where SPIDE's spikes approximate it. Settings as for `mnist-fc`, but for 8 epochs of training images that are
moved by up to one pixel.
"""

from __future__ import annotations

import msgspec

from toolchain.augment import Augmentation
from toolchain.layers import FeedbackSNN
from toolchain.models import mnist_fc

METHOD = "ide"
TRAINING = msgspec.structs.replace(mnist_fc.TRAINING, epochs=8, augment=Augmentation(crop=1))


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 478,010 parameters."""
    built = mnist_fc.build(seed)
    built.name = "mnist-ide"
    return built
