"""What this machine can do, and how to get what it cannot: the verbs doctor, models and targets."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Any

import toolchain
from toolchain import native, target
from toolchain.errors import ToolchainError
from toolchain.native import phases
from toolchain.versions import installed, versions

PACKAGES = ("torch", "numpy", "lava-nc", "lava-dl", "msgspec", "safetensors", "matplotlib", "sanafe")


@dataclass(frozen=True)
class ModelRow:
    """A network of the catalogue."""

    name: str
    description: str


@dataclass(frozen=True)
class TargetRow:
    """A target; `missing` says what it lacks here and the command that installs it."""

    name: str
    available: bool
    missing: str | None


@dataclass(frozen=True)
class Models:
    """Every network of the catalogue."""

    models: tuple[ModelRow, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "device": "cpu", "versions": versions()}

    def to_text(self) -> str:
        return _columns([(row.name, row.description) for row in self.models])


@dataclass(frozen=True)
class Targets:
    """Every target, ours first."""

    targets: tuple[TargetRow, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "device": "cpu", "versions": versions()}

    def to_text(self) -> str:
        return _columns([(row.name, row.missing or "ready") for row in self.targets])


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found. `packages` maps a distribution to its version, or None where it is not installed; `native` is the instruction set that the
    compiled kernel uses, or what it lacks (torch serves instead); `cuda` names the GPUs; `datasets` says of each data set whether it can be read here."""

    toolchain: str
    python: str
    platform: str
    packages: dict[str, str | None]
    native: str
    cuda: tuple[str, ...]
    targets: tuple[TargetRow, ...]
    datasets: dict[str, bool]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "device": self.device, "versions": versions()}

    @property
    def device(self) -> str:
        """What `--device auto` picks: the first GPU, else the CPU."""
        return self.cuda[0] if self.cuda else "cpu"

    def to_text(self) -> str:
        facts = [
            ("toolchain", self.toolchain),
            ("python", self.python),
            ("platform", self.platform),
            *((name, found or "not installed") for name, found in self.packages.items()),
            ("native kernel", self.native),
            ("cuda", ", ".join(self.cuda) or "no GPU found"),
        ]
        found = [
            (name, "found" if here else "not found: name its folder with --data-dir or $TOOLCHAIN_DATA, or let it be downloaded")
            for name, here in self.datasets.items()
        ]
        return "\n".join([_columns(facts), "", "targets", Targets(self.targets).to_text(), "", "data sets", _columns(found)])


def doctor() -> Diagnosis:
    """What this machine can do. Nothing is installed, started or downloaded; a damaged installation is a line of the result, not an error."""
    return Diagnosis(
        toolchain=toolchain.__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages={name: installed(name) for name in PACKAGES},
        native=_native(),
        cuda=_gpus(),
        targets=list_targets().targets,
        datasets=_datasets(),
    )


def list_models() -> Models:
    """The networks that come with the package."""
    from toolchain import models

    return Models(tuple(ModelRow(name, models.get(name).description) for name in models.names()))


def list_targets() -> Targets:
    """The targets by name, and what those that cannot run here lack."""
    return Targets(tuple(_target_row(name) for name in target.names()))


def _target_row(name: str) -> TargetRow:
    try:
        missing = target.get(name).available()
    except (ToolchainError, ImportError) as error:  # somebody else's entry point may be broken: say so and go on
        missing = f"cannot be loaded: {error}"
    return TargetRow(name, missing is None, missing)


def _native() -> str:
    named = native.other_library()
    return phases.missing() or phases.INSTRUCTION_SETS[phases.widest()] + (f", from {native.LIBRARY_VARIABLE}={named}" if named else "")


def _gpus() -> tuple[str, ...]:
    import torch

    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _datasets() -> dict[str, bool]:
    from toolchain import data

    return {name: data.found(name) for name in data.names()}


def _columns(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max((len(left) for left, _ in rows), default=0)
    return "\n".join(f"{left:<{width}}  {right}" for left, right in rows)
