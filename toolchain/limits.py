"""What a chip can hold, read from `targets/limits/*.yaml`; every number there carries its public source."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import msgspec


class Limit(msgspec.Struct, frozen=True):
    """One number of a chip and where it is published."""

    value: int
    source: str


class Limits(msgspec.Struct, frozen=True):
    """The limits that passes read. Bits are signed widths; exponents are inclusive upper bounds (lower bounds are 0 by our choice)."""

    chip: str
    potential_bits: Limit
    weight_bits: Limit
    weight_exponent: Limit
    current_mantissa_bits: Limit
    current_exponent: Limit
    decay_bits: Limit


@cache
def load(chip: str) -> Limits:
    """The limits of `chip` from its YAML file."""
    text = (files("toolchain.targets") / "limits" / f"{chip}.yaml").read_bytes()
    return msgspec.yaml.decode(text, type=Limits)


LOIHI2 = load("loihi2")
