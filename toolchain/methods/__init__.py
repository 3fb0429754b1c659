"""Training methods: each one file, each usable by a trainer that does not know it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from math import inf
from typing import TYPE_CHECKING, Any, Protocol, Union, cast

from toolchain.errors import UsageError, unknown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from toolchain.layers import FeedbackSNN

__all__ = ["Batch", "Method", "get"]


@dataclass(frozen=True)
class Batch:
    """What one batch left behind, gradients aside: fractions of 1; firing rates are spikes (of either sign) per neuron and step.

    Only SPIDE has a feedback rate, and clipped and silent couples. The last two have a rate for each layer.
    """

    loss: float
    correct: float
    forward_rate: float
    feedback_rate: float = 0.0
    clipped: float = 0.0
    silent: float = 0.0
    forward_rates: tuple[float, ...] = ()
    feedback_rates: tuple[float, ...] = ()


class Method(Protocol):
    """A way to get gradients. Its state (SPIDE's adaptive scale factor) is plain numbers that a checkpoint can hold."""

    def fits(self, model: FeedbackSNN) -> None:
        """UsageError, naming the layer and why, where the method cannot train `model`."""

    def gradients(
        self, model: FeedbackSNN, images: Tensor, labels: Tensor, generator: torch.Generator, step: Callable[[], object] | None = None
    ) -> Batch:
        """Set `.grad` of every parameter to the gradient of the method's loss over the batch; random draws come from `generator`.

        A method that learns at every time step (OTTT_O, SAF-E) calls `step`, which changes the weights, after each of its steps but the last; the
        caller steps after the last. Without `step` it adds its gradients up, so that nobody need know which method it is.

        Where several processes train together (see `processes`), `images` are this process's rows of the batch and the gradients its share: their sum over
        the processes is the whole batch's gradient. What is in the returned Batch concerns these rows alone.
        """

    def state(self) -> dict[str, float]: ...

    def restore(self, state: dict[str, float]) -> None: ...


FILES = {
    "ide": ("ide", "Ide"),
    "spide": ("spide", "Spide"),
    "dsr": ("dsr", "Dsr"),
    "ottt-a": ("ottt", "OtttA"),
    "ottt-o": ("ottt", "OtttO"),
    "saf-e": ("saf", "SafE"),
    "saf-f": ("saf", "SafF"),
}
"""Each method's file in this package, and its class there."""

NAMES = tuple(FILES)


FLOAT32 = {
    "ide": "its implicit equation multiplies rounding",
    "spide": "its feedback stage counts the spikes that sums of currents make",
    "dsr": "the products that make its gradients make its spikes",
    "saf-e": "the products that make its gradients make its spikes",
    "saf-f": "rounding would decide which of its clipped rates pass a gradient on",
}
"""Why a method is not trained with products in bfloat16; measured in docs/training.md. OTTT computes the current of spikes apart from that of traces."""


def check_amp(name: str) -> None:
    """UsageError where the method must not meet bfloat16."""
    if name in FLOAT32:
        raise UsageError(f"method '{name}' needs float32, since {FLOAT32[name]}: leave train.amp off (ottt-a and ottt-o take it)")


LARGEST = {"loss_lambda": 1.0}
"""Options that have an upper bound; none is negative."""


def _check_option(name: str, option: str, value: object, default: object) -> None:
    """UsageError unless `value` is of the kind of the option's default, and in its range."""
    where = f"option '{option}' of method '{name}' is {value!r}"
    kinds = (int, float) if type(default) is float else (type(default),)
    if type(value) not in kinds:
        raise UsageError(f"{where}: give a value of the kind of its default, {default!r}")
    if isinstance(value, (int, float)) and not 0 <= value <= LARGEST.get(option, inf):
        raise UsageError(f"{where}: give a number from 0{f' to {LARGEST[option]:g}' if option in LARGEST else ' up'}")


def get(name: str, scale_factor: Union[float, str] = 1.0, options: Mapping[str, Any] | None = None) -> Method:
    """The method called `name`, `options` being settings of its own; UsageError lists what there is. Only SPIDE has a scale factor."""
    if name not in FILES:
        raise unknown("method", name, NAMES)
    file, kind = FILES[name]
    made = getattr(import_module(f"toolchain.methods.{file}"), kind)
    chosen = {**(options or {}), **({"scale_factor": scale_factor} if name == "spide" else {})}
    defaults = {key: parameter.default for key, parameter in signature(made).parameters.items() if key != "scale_factor"}
    for option, value in (options or {}).items():
        if option not in defaults:
            raise UsageError(f"method '{name}' has no option '{option}': it has {', '.join(defaults) or 'none'}")
        _check_option(name, option, value, defaults[option])
    return cast(Method, made(**chosen))
