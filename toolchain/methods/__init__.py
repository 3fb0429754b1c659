"""Training methods: each one file, each usable by a trainer that does not know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Union

from toolchain.errors import UsageError, unknown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from toolchain.layers import FeedbackSNN

NAMES = ("ide", "spide", "dsr", "ottt-a", "ottt-o", "saf-e", "saf-f")
"""Every method of the plan; `get` says which exist."""


@dataclass(frozen=True)
class Batch:
    """What one batch left behind, gradients aside: fractions of 1; firing rates are spikes (of either sign) per neuron and step."""

    loss: float
    correct: float
    forward_rate: float
    feedback_rate: float
    clipped: float
    silent: float


class Method(Protocol):
    """A way to get gradients. Its state (here: an adaptive scale factor) is plain numbers that a checkpoint can hold."""

    def gradients(self, model: FeedbackSNN, images: Tensor, labels: Tensor, generator: torch.Generator) -> Batch:
        """Set `.grad` of every parameter to the gradient of the mean cross entropy over the batch; random draws come from `generator`."""

    def state(self) -> dict[str, float]: ...

    def restore(self, state: dict[str, float]) -> None: ...


def get(name: str, scale_factor: Union[float, str]) -> Method:
    """The method called `name`; UsageError lists what there is."""
    if name not in NAMES:
        raise unknown("method", name, NAMES)
    if name != "spide":
        raise UsageError(f"method '{name}' is not trained by this version: use --method spide")
    from toolchain.methods.spide import Spide

    return Spide(scale_factor)
