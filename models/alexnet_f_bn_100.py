"""alexnet-f-bn-100: alexnet-f-bn with a readout of 100 classes, for CIFAR-100, trained by IDE. Everything else is in `alexnet_f_bn.py`.

From the paper's code: 5,184,165 parameters, the settings of CIFAR-10.
"""

from __future__ import annotations

import msgspec

from toolchain.layers import FeedbackSNN
from toolchain.models import alexnet_f_bn

METHOD = alexnet_f_bn.METHOD

TRAINING = msgspec.structs.replace(alexnet_f_bn.TRAINING, dataset="cifar100")


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network for 100 classes, 5,184,165 parameters and 155,648 neurons."""
    return alexnet_f_bn.network("alexnet-f-bn-100", 100, seed)
