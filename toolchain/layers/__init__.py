"""The torch front end: connections, the network that they make, and the time steps that take it to its forward equilibrium."""

from __future__ import annotations

from toolchain.layers.connections import advance, current, kind_of
from toolchain.layers.maps import DenseMap, Map
from toolchain.layers.model import Equilibrium, FeedbackSNN, Normalize, build, describe
from toolchain.layers.weights import Limited, Scale, Standardized
from toolchain.network import Frobenius, Neuron, Spectral, TrainedThreshold

__all__ = [
    "DenseMap",
    "Equilibrium",
    "FeedbackSNN",
    "Frobenius",
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
    "current",
    "describe",
    "kind_of",
]
