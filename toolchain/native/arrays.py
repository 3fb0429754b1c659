"""What the compiled steps (`steps`) and ticks (`ticks`) may be given: an array or a number that would lead them outside their arrays is a ToolchainError. No torch here."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain.errors import ToolchainError

Array = npt.NDArray[Any]

INT8, INT16, INT32 = (np.dtype(kind) for kind in (np.int8, np.int16, np.int32))
LARGEST = 2**31 - 1
"""The largest whole number of 32 bits."""


def require(true: bool, otherwise: str) -> None:
    """ToolchainError that says `otherwise` unless it is `true`."""
    if not true:
        raise ToolchainError(f"the native kernel cannot take this: {otherwise}")


def checked(name: str, array: Any, shape: tuple[int, ...], *kinds: np.dtype[Any], written: bool = False) -> Array:
    """The array, if it is what the kernel takes it for: in one piece, of this shape and one of these types, and writable where it is `written`."""
    if isinstance(array, np.ndarray) and array.shape == shape and array.dtype in kinds:
        flags = array.flags
        if flags.carray if written else flags.c_contiguous and flags.aligned:
            return array
    wanted = " or ".join(str(kind) for kind in kinds)
    given = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
    lies = "in one piece and writable" if written else "in one piece"
    raise ToolchainError(f"the native kernel cannot take this: '{name}' must be an array of {wanted} {shape}, {lies}, and not {given}")


def address(name: str, array: Any, shape: tuple[int, ...], *kinds: np.dtype[Any], written: bool = False) -> int:
    """Where the array lies, if it is what the kernel takes it for."""
    return checked(name, array, shape, *kinds, written=written).ctypes.data
