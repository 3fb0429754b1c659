"""The networks of the papers: one complete file each, found here by name. A new network is one file and one line below."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from toolchain.errors import UsageError, unknown

if TYPE_CHECKING:
    from toolchain.config import Training
    from toolchain.layers import FeedbackSNN

__all__ = ["Spec", "get", "load", "names"]

CATALOGUE = {
    "fashion-fc": ("fashion_fc", "784-400(F400)-10 with batch norm for Fashion-MNIST, trained by IDE; LIF, T 5"),
    "mnist-fc": ("mnist_fc", "784-400(F400)-10 for MNIST, trained by SPIDE; T 30, T_B 100"),
    "mnist-fc2": ("mnist_fc2", "784-300-300 with feedback last to first, for MNIST, trained by SPIDE; T 30, T_B 100"),
    "fashion-r400": ("fashion_r400", "784-400(F400)-10 of leaky neurons for Fashion-MNIST, trained by OTTT; T 5"),
    "mnist-ide": ("mnist_ide", "784-400(F400)-10 for MNIST, trained by IDE; T 30"),
    "mnist-dsr": ("mnist_dsr", "784-400-10 with trained thresholds for MNIST, trained by DSR; T 20"),
    "mnist-ottt-a": ("mnist_ottt_a", "784-400-10 of leaky neurons for MNIST, trained by OTTT_A; T 6"),
    "mnist-ottt-o": ("mnist_ottt_o", "784-400-10 of leaky neurons for MNIST, trained by OTTT_O; T 6"),
    "mnist-saf-e": ("mnist_saf_e", "784-400-10 of leaky neurons for MNIST, trained by SAF-E; T 6"),
    "mnist-saf-f": ("mnist_saf_f", "784-800-10 for MNIST, trained by SAF-F; T 15"),
    "digits-fc": ("digits_fc", "64-32(F32)-10 for the 8 x 8 digits, trained by SPIDE in seconds; T 30, T_B 100"),
    "mnist-conv": ("mnist_conv", "64C5s(F64C5) for MNIST, trained by IDE; T 30"),
    "nmnist-conv": ("nmnist_conv", "64C5s(F64C5) for N-MNIST, trained by IDE; T 30"),
    "lenet": ("lenet", "15C5-P2-40C5-P2-300 for MNIST, without feedback, trained by SPIDE; T 30, T_B 100"),
    "convnet-f": ("convnet_f", "64C5s-64C5s-64C5 with feedback last to first, for MNIST, trained by SPIDE; T 30, T_B 100"),
    "convnet-f-dvs": ("convnet_f_dvs", "512C9s(F512C5) for CIFAR10-DVS, trained by SPIDE; T 30, T_B 250"),
    "alexnet-f": ("alexnet_f", "AlexNet-F for CIFAR-10, trained by SPIDE; T 30, T_B 250"),
    "alexnet-f-100": ("alexnet_f_100", "AlexNet-F for CIFAR-100, trained by SPIDE; T 30, T_B 250"),
    "alexnet-f-bn": ("alexnet_f_bn", "AlexNet-F with batch normalisation for CIFAR-10, trained by IDE; T 100"),
    "alexnet-f-bn-100": ("alexnet_f_bn_100", "AlexNet-F with batch normalisation for CIFAR-100, trained by IDE; T 100"),
    "cifarnet-f": ("cifarnet_f", "CIFARNet-F for CIFAR-10, trained by SPIDE; T 30, T_B 250"),
    "cifarnet-f-100": ("cifarnet_f_100", "CIFARNet-F for CIFAR-100, trained by SPIDE; T 30, T_B 250"),
    "cifarnet-f-bn": ("cifarnet_f_bn", "CIFARNet-F with batch normalisation for CIFAR-10, trained by IDE; T 100"),
    "cifarnet-f-bn-100": ("cifarnet_f_bn_100", "CIFARNet-F with batch normalisation for CIFAR-100, trained by IDE; T 100"),
    "preactresnet-18": ("preactresnet_18", "pre-activation ResNet-18 for CIFAR-10, trained by DSR; T 20"),
    "preactresnet-18-100": ("preactresnet_18_100", "pre-activation ResNet-18 for CIFAR-100, trained by DSR; T 20"),
    "vgg-11-dvs": ("vgg_11_dvs", "VGG-11 for CIFAR10-DVS, trained by DSR; T 20"),
    "vgg-sws": ("vgg_sws", "VGG with standardised weights for CIFAR-10, trained by OTTT; T 6"),
    "vgg-sws-100": ("vgg_sws_100", "VGG with standardised weights for CIFAR-100, trained by OTTT; T 6"),
    "vgg-sws-dvs": ("vgg_sws_dvs", "VGG with standardised weights for CIFAR10-DVS, trained by OTTT; T 10"),
    "vgg-f": ("vgg_f", "VGG with standardised weights and feedback last to first, for CIFAR-100, trained by OTTT; T 6"),
    "nf-resnet-34": ("nf_resnet_34", "normaliser-free ResNet-34 for ImageNet, trained by OTTT; T 6"),
}


@dataclass(frozen=True)
class Spec:
    """A network of the catalogue; `module` is its file in this package. Nothing heavy is imported before `build` or `training` is used."""

    name: str
    module: str
    description: str

    @property
    def weights(self) -> Path:
        """Where the trained weights that are shipped lie; see `shipped`."""
        return Path(__file__).parent / f"{self.module}.safetensors"

    @property
    def shipped(self) -> bool:
        """Whether trained weights come with the package."""
        return self.weights.is_file()

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
    """The network called `name` with its trained weights, in float32 and in evaluation mode; UsageError where none are shipped."""
    from toolchain.checkpoint import load as load_checkpoint

    spec = get(name)
    if not spec.shipped:
        raise UsageError(f"no trained weights are shipped for '{name}': train it with `toolchain train {name} -o RUN` and give RUN instead")
    return load_checkpoint(spec.weights)
