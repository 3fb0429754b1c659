"""preactresnet-18-100: preactresnet-18 with 100 classes, for CIFAR-100, trained by DSR. Everything else is in `preactresnet_18.py`.

From the paper's code: the settings of CIFAR-10 with CIFAR-100's own normalisation.
"""

from __future__ import annotations

import msgspec

from toolchain.layers import FeedbackSNN, Normalize
from toolchain.models import preactresnet_18

METHOD = preactresnet_18.METHOD

TRAINING = msgspec.structs.replace(preactresnet_18.TRAINING, dataset="cifar100")


def build(seed: int = 0) -> FeedbackSNN:
    """The untrained network for 100 classes, 11,223,295 parameters."""
    normalize = Normalize(mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761))
    return preactresnet_18.network("preactresnet-18-100", 100, normalize, seed)
