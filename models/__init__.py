"""The networks of the papers: one complete file each, found here by name. A new network is one file and one line below."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from toolchain.errors import unknown

if TYPE_CHECKING:
    from toolchain.config import Training
    from toolchain.layers import FeedbackSNN

CATALOGUE = {
    "fashion-fc": ("fashion_fc", "784-400(F400)-10 with batch norm for Fashion-MNIST, trained by IDE; LIF, T 5"),
    "mnist-fc": ("mnist_fc", "784-400(F400)-10 for MNIST, trained by SPIDE; T 30, T_B 100"),
    "mnist-fc2": ("mnist_fc2", "784-300-300 with feedback last to first, for MNIST, trained by SPIDE; T 30, T_B 100"),
    "digits-fc": ("digits_fc", "64-32(F32)-10 for the 8 x 8 digits, trained by SPIDE in seconds; T 30, T_B 100"),
}


@dataclass(frozen=True)
class Spec:
    """A network of the catalogue; `module` is its file in this package. Nothing heavy is imported before `build` or `training` is used."""

    name: str
    module: str
    description: str

    @property
    def weights(self) -> Path:
        """The trained weights that are shipped."""
        return Path(__file__).parent / f"{self.module}.safetensors"

    @property
    def training(self) -> Training:
        """How it is trained by default."""
        return cast("Training", import_module(f"toolchain.models.{self.module}").TRAINING)

    def training_on(self, dataset: str | None) -> Training:
        """How it is trained on `dataset`: the file's TRAINING_ON where it has an entry, else `training`, whatever its data set."""
        found = getattr(import_module(f"toolchain.models.{self.module}"), "TRAINING_ON", {})
        return cast("Training", found.get(dataset, self.training))

    @property
    def method(self) -> str:
        """The method that trains it by default."""
        return cast(str, import_module(f"toolchain.models.{self.module}").METHOD)

    def build(self, seed: int = 0) -> FeedbackSNN:
        """The untrained network; the same seed gives the same weights."""
        return cast("FeedbackSNN", import_module(f"toolchain.models.{self.module}").build(seed))


def names() -> list[str]:
    """Every network of the catalogue."""
    return list(CATALOGUE)


def get(name: str) -> Spec:
    """The network called `name`; UsageError lists the known ones."""
    if name not in CATALOGUE:
        raise unknown("model", name, CATALOGUE)
    return Spec(name, *CATALOGUE[name])


def load(name: str) -> FeedbackSNN:
    """The network called `name` with its trained weights, in float32 and in evaluation mode."""
    from toolchain.checkpoint import load as load_checkpoint

    return load_checkpoint(get(name).weights)
