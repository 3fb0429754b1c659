"""The torch front end: connections, the network that they make, and the time steps that take it to its forward equilibrium."""

from __future__ import annotations

from toolchain.layers.connections import advance, current
from toolchain.layers.maps import DenseMap, Map
from toolchain.layers.model import Equilibrium, FeedbackSNN, Normalize, build, counts, describe
from toolchain.layers.weights import Gain, Limited, Scale, Standardized
from toolchain.network import Frobenius, Neuron, Spectral, TrainedThreshold

__all__ = [
    "DenseMap",
    "Equilibrium",
    "FeedbackSNN",
    "Frobenius",
    "Gain",
    "Limited",
    "Map",
    "Neuron",
    "Normalize",
    "Scale",
    "Spectral",
    "Standardized",
    "TrainedThreshold",
    "advance",
    "build",
    "counts",
    "current",
    "describe",
]
