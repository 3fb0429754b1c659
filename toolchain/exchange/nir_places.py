"""Where in a NIR file's nodes the tensors of a network lie, and how they come out again to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import msgspec
import numpy as np

from toolchain.ir import Array

LARGEST_TENSOR = 2**29
"""Values of a tensor that a node holds."""

LARGEST_SPREAD = 2**24
"""Values that one a channel is repeated to: of a population's bias."""


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where a tensor is found: field `field` of node `node`, divided by 2^`exponent`, as numbers of NumPy type `dtype` in `shape`. `form` says how a node has it:
    `same`, `groups` (of a convolution in `groups` groups, whose node has none), `channels` (one value a channel, repeated over the image in the node), `spread` (one a
    channel in the node, repeated in the tensor)."""

    node: str
    field: str
    dtype: str
    shape: tuple[int, ...]
    form: str = "same"
    exponent: int = 0
    groups: int = 1


def taken(place: Place, field: Array) -> Array:
    """The tensor at `place`, of the node's `field`; ValueError where its shape does not fit, or a value is none of the tensor's type."""
    dtype = np.dtype(place.dtype)
    if dtype.kind not in "iuf" or not 0 < prod(place.shape) <= LARGEST_TENSOR or place.groups < 1:
        raise ValueError(f"no tensor has type {dtype} and shape {place.shape}")
    given = np.asarray(field)
    if given.dtype.kind not in "biuf":
        raise ValueError(f"it holds values of type {given.dtype}")
    values = _FORMS[place.form](place, np.ldexp(given.astype(np.float64), -place.exponent)).reshape(place.shape)
    with np.errstate(invalid="ignore"):  # what no such number is, is found below
        found = np.ascontiguousarray(values.astype(dtype))
    if not np.array_equal(found.astype(np.float64), values):
        raise ValueError(f"its values are none of type {dtype}")
    return found


def _from_groups(place: Place, values: Array) -> Array:
    out, into = place.shape[0], place.shape[1]
    rows = [slice(g * out // place.groups, (g + 1) * out // place.groups) for g in range(place.groups)]
    return np.concatenate([values[row, g * into : (g + 1) * into] for g, row in enumerate(rows)])


def _from_channels(place: Place, values: Array) -> Array:
    return np.asarray(values.reshape(len(values), -1)[:, 0])


def _from_spread(place: Place, values: Array) -> Array:
    if values.ndim != 1 or prod(place.shape) > LARGEST_SPREAD:
        raise ValueError(f"no bias of shape {place.shape} has one value a channel of {values.shape}")
    return np.repeat(values, prod(place.shape) // len(values))


_FORMS: dict[str, Callable[[Place, Array], Array]] = {
    "same": lambda _, values: values,
    "groups": _from_groups,
    "channels": _from_channels,
    "spread": _from_spread,
}
