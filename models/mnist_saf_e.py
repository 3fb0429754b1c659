"""mnist-saf-e: the network of `mnist-ottt-a`, trained by SAF-E, which equals OTTT_O but carries spike accumulations. Settings as there."""

from __future__ import annotations

from toolchain.layers import FeedbackSNN
from toolchain.models.mnist_ottt_a import TRAINING as TRAINING
from toolchain.models.mnist_ottt_a import network

METHOD = "saf-e"


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 318,010 parameters."""
    return network("mnist-saf-e", seed)
