"""cifarnet-f-100: cifarnet-f with a readout of 100 classes, for CIFAR-100, trained by SPIDE. Everything else is in `cifarnet_f.py`.

From the paper's code: 14,784,356 parameters, the settings of CIFAR-10 but for scale factor 500.
"""

from __future__ import annotations

import msgspec

from toolchain.layers import FeedbackSNN
from toolchain.models import cifarnet_f

METHOD = cifarnet_f.METHOD
SCALE_FACTOR = 500.0

TRAINING = msgspec.structs.replace(cifarnet_f.TRAINING, dataset="cifar100", weight_decay=5e-4 / SCALE_FACTOR)


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network for 100 classes, 14,784,356 parameters and 229,376 neurons."""
    return cifarnet_f.network("cifarnet-f-100", 100, SCALE_FACTOR, seed)
