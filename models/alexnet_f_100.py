"""alexnet-f-100: alexnet-f with a readout of 100 classes, for CIFAR-100, trained by SPIDE. Everything else is in `alexnet_f.py`.

From the paper's code: 5,181,412 parameters, the settings of CIFAR-10 but for scale factor 500.
"""

from __future__ import annotations

import msgspec

from toolchain.layers import FeedbackSNN
from toolchain.models import alexnet_f

METHOD = alexnet_f.METHOD
SCALE_FACTOR = 500.0

TRAINING = msgspec.structs.replace(alexnet_f.TRAINING, dataset="cifar100", weight_decay=5e-4 / SCALE_FACTOR)


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network for 100 classes, 5,181,412 parameters and 155,648 neurons."""
    return alexnet_f.network("alexnet-f-100", 100, SCALE_FACTOR, seed)
