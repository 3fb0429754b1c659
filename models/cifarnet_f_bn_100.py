"""cifarnet-f-bn-100: cifarnet-f-bn with a readout of 100 classes, for CIFAR-100, trained by IDE. Everything else is in `cifarnet_f_bn.py`.

From the paper's code: 14,789,221 parameters, the settings of CIFAR-10.
"""

from __future__ import annotations

import msgspec

from toolchain.layers import FeedbackSNN
from toolchain.models import cifarnet_f_bn

METHOD = cifarnet_f_bn.METHOD

TRAINING = msgspec.structs.replace(cifarnet_f_bn.TRAINING, dataset="cifar100")


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network for 100 classes, 14,789,221 parameters and 229,376 neurons."""
    return cifarnet_f_bn.network("cifarnet-f-bn-100", 100, seed)
