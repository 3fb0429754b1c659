"""Built-in targets, each imported only when asked for: listing them imports neither torch nor Lava. `toolchain.target` finds them by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from toolchain.errors import unknown

if TYPE_CHECKING:
    from toolchain.target import Target

_WHERE = {
    "torch": ("toolchain.targets.torch_float", "TORCH"),
    "reference": ("toolchain.targets.reference", "REFERENCE"),
    "sim": ("toolchain.targets.sim", "SIM"),
    "lava-sim": ("toolchain.targets.lava_sim", "LAVA_SIM"),
    "lava-sim-float": ("toolchain.targets.lava_sim", "LAVA_SIM_FLOAT"),
    "sanafe": ("toolchain.targets.sanafe", "SANAFE"),
}

BUILTIN: tuple[str, ...] = tuple(_WHERE)


def load(name: str) -> Target:
    """The built-in target called `name`; UsageError lists the known ones."""
    if name not in _WHERE:
        raise unknown("target", name, BUILTIN)
    module, constant = _WHERE[name]
    target: Target = getattr(import_module(module), constant)
    return target
