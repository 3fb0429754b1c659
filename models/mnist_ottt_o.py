"""mnist-ottt-o: the network of `mnist-ottt-a`, trained by OTTT_O, which steps the optimiser at every time step. Settings as there."""

from __future__ import annotations

from toolchain.layers import FeedbackSNN
from toolchain.models.mnist_ottt_a import TRAINING as TRAINING
from toolchain.models.mnist_ottt_a import network

METHOD = "ottt-o"


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 318,010 parameters."""
    return network("mnist-ottt-o", seed)
