"""mnist-ide: the network of `mnist-fc`, 784-400(F400)-10 of IF neurons without batch norm, trained by IDE. Settings as there.

The gradient is the exact one of the equilibrium (Broyden's method, threshold 30), where SPIDE's spikes approximate it.
"""

from __future__ import annotations

from toolchain.layers import FeedbackSNN
from toolchain.models import mnist_fc
from toolchain.models.mnist_fc import TRAINING

__all__ = ["METHOD", "TRAINING", "build"]

METHOD = "ide"


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 478,010 parameters."""
    built = mnist_fc.build(seed)
    built.name = "mnist-ide"
    return built
