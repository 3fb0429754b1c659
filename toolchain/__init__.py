"""Deployment toolchain for feedback spiking neural networks: every command of `toolchain --help` is the function of the same name here
(`import_` for `import`, which is Python's own word).

    import toolchain

    toolchain.train("mnist-fc", method="spide", output="runs/mnist-fc")
    toolchain.compile("mnist-fc", output="mnist-fc.fsnn")
    print(toolchain.compare("mnist-fc", targets=("torch", "sim"), dataset="mnist-1k").to_text())

The functions are loaded when first used, so `import toolchain` costs nothing. A module that has the name of a function is reached by
`from toolchain.compare import ...`; the attribute `toolchain.compare` is always the function.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolchain.compare import compare as compare
    from toolchain.compiler import compile as compile
    from toolchain.deploy import deploy as deploy
    from toolchain.doctor import doctor as doctor
    from toolchain.estimate import estimate as estimate
    from toolchain.exchange import export as export
    from toolchain.exchange import import_ as import_
    from toolchain.feedback import feedback as feedback
    from toolchain.inspection import inspect as inspect
    from toolchain.learn import learn as learn
    from toolchain.train import train as train
    from toolchain.tune import tune as tune
    from toolchain.verify import verify as verify

__version__ = "0.1.0"

_HOME = {
    "compare": "toolchain.compare",
    "compile": "toolchain.compiler",
    "deploy": "toolchain.deploy",
    "doctor": "toolchain.doctor",
    "estimate": "toolchain.estimate",
    "export": "toolchain.exchange",
    "import_": "toolchain.exchange",
    "feedback": "toolchain.feedback",
    "inspect": "toolchain.inspection",
    "learn": "toolchain.learn",
    "train": "toolchain.train",
    "tune": "toolchain.tune",
    "verify": "toolchain.verify",
}

__all__ = ["__version__", *sorted(_HOME)]  # pyright: ignore[reportUnsupportedDunderAll]


class _Package(ModuleType):
    """A package whose public functions are loaded on first use and never hidden by the module that holds them."""

    def __getattr__(self, name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        return getattr(import_module(_HOME[name]), name)

    def __setattr__(self, name: str, value: object) -> None:
        # importing `toolchain.compare` makes the import system bind that module here, over the function
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOME})


sys.modules[__name__].__class__ = _Package
