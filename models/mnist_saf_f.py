"""mnist-saf-f: the network of `mnist-ottt-a`, trained by SAF-F, which differentiates the spike representation at the last time step. Settings as there."""

from __future__ import annotations

from toolchain.layers import FeedbackSNN
from toolchain.models.mnist_ottt_a import TRAINING, network

__all__ = ["METHOD", "TRAINING", "build"]

METHOD = "saf-f"


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network, 318,010 parameters."""
    return network("mnist-saf-f", seed, weighted_readout=True)
