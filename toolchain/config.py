"""A training run as plain, checked data: defaults from a network of the catalogue, a YAML file over them, `--set a.b=c` over both."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast

import msgspec

from toolchain.augment import Augmentation
from toolchain.errors import UsageError
from toolchain.files import read_plain
from toolchain.network import Network

LARGEST_CONFIG = 1 << 18
"""A config longer than this many bytes is another kind of file."""

LONGEST_NUMBER = 256
"""Bits: whole numbers beyond it are nobody's setting, and messages could not show what is made of them."""

DEEPEST = 50
"""Dots in the name of a setting."""

BOOL = "tag:yaml.org,2002:bool"

Fraction = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a network is trained: an optimiser on the true gradient of the method's loss.

    batch          samples of one update, over all processes together
    optimizer      sgd with `momentum`, or adam whose first beta is `momentum` (the second is 0.999)
    schedule       cosine falls to 0 over the run; steps multiplies by `decay` after each epoch in `milestones`; constant stays
    warmup         batches over which the learning rate rises to `lr`
    held_out       training images (the last ones) that choose the checkpoint and are not learned from; 0 learns from all and keeps the last epoch
    augment        what training images go through, as {crop: 4, flip: true} (see `augment.Augmentation`)
    early_stop     epochs in a row without a better accuracy on the held-out images after which the run ends; 0 never
    metrics        files beside metrics.jsonl, which is always written: csv (metrics.csv), tensorboard (the folder tensorboard)
    amp            bf16 computes the products of gradients alone in bfloat16, where the method allows it; spikes are always those of float32
    scale_factor   what SPIDE multiplies the loss by, "auto", or null for the network's own; the gradient is divided by it again
    options        settings of the method's own, as {solver: iter} for ide or {loss_lambda: 0.001} for ottt-a
    """

    dataset: str = "mnist"
    epochs: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 15
    batch: Annotated[int, msgspec.Meta(ge=1)] = 128
    lr: Positive = 0.1
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    milestones: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()
    decay: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.1
    warmup: Annotated[int, msgspec.Meta(ge=0)] = 0
    held_out: Annotated[int, msgspec.Meta(ge=0)] = 5000
    optimizer: Literal["sgd", "adam"] = "sgd"
    augment: Augmentation = Augmentation()
    early_stop: Annotated[int, msgspec.Meta(ge=0)] = 0
    metrics: tuple[Literal["jsonl", "csv", "tensorboard"], ...] = ("jsonl",)
    amp: Literal["off", "bf16"] = "off"
    scale_factor: Union[Positive, Literal["auto"], None] = None
    options: dict[str, Union[bool, int, float, str]] = {}


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a run depends on besides the data and the machine; `model` is where the defaults came from, `start` the run folder or checkpoint whose weights the run
    began with, empty where they were drawn from the seed."""

    network: Network
    train: Training = Training()
    model: str = ""
    method: str = "spide"
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] = 0
    start: str = ""


def assignments(settings: Sequence[str]) -> dict[str, Any]:
    """`["a.b=c", ...]` as {"a.b": c}, values read as YAML; UsageError for text of another form."""
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"setting '{setting}' has another form than name=value, for example train.lr=0.05")
        found[name.strip()] = _value(value, f"setting '{setting}'")
    return found


def resolve(base: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> Config:
    """A checked Config: `changes` (nested mappings) over `base`; UsageError names the key and lists the known ones."""
    merged = _merged(dict(base), changes, "", where)
    _require_finite(merged, "", where)
    try:
        return msgspec.convert(merged, Config, strict=True)
    except msgspec.ValidationError as error:
        raise UsageError(f"{where}: {_plain(str(error))}") from None
    except OverflowError:
        raise UsageError(f"{where} has a number too large to compute with: give a smaller one") from None


def with_settings(config: Config, settings: Mapping[str, Any], where: str = "--set") -> Config:
    """`config` with dotted settings replaced: {"train.lr": 0.05}."""
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        *path, last = name.split(".")
        if len(path) > DEEPEST:
            raise UsageError(f"{where}: setting '{name}' has {len(path)} dots: settings have a few")
        level = nested
        for key in path:
            level = level.setdefault(key, {})
            if not isinstance(level, dict):
                raise UsageError(f"{where}: setting '{name}' reaches into '{key}', which another setting replaces: give one of the two")
        level[last] = value
    return resolve(plain(config), nested, where)


def plain(config: Config) -> dict[str, Any]:
    """`config` as nested dictionaries and lists, every field present."""
    return cast("dict[str, Any]", msgspec.to_builtins(config))


def read(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; UsageError where it is no mapping, too long, or not plain YAML."""
    import yaml

    try:
        found = _numbers(yaml.load(read_plain(path, LARGEST_CONFIG).decode(), Loader=_loader()))
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(f"config '{path}' is not plain YAML ({' '.join(str(error).split())}): correct it") from None
    except OSError as error:
        raise UsageError(f"config '{path}' cannot be read ({error.strerror}): check the path") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UsageError(f"config '{path}' holds no mapping of names to values: start with 'model: mnist-fc'")
    return found


def text(config: Config) -> str:
    """`config` as YAML that `read` takes again."""
    import yaml

    return yaml.safe_dump(plain(config), sort_keys=False)


def _loader() -> Any:
    """PyYAML's safe loader without aliases, which can unfold a small file into a huge one, without tags, which some values break, without keys given twice, whose
    last would win, and without on and off for true and false."""
    import yaml

    class Plain(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [(tag, form) for tag, form in found if tag != BOOL or first not in "oO"]
            for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases are not taken")
            if getattr(self.peek_event(), "tag", None) is not None:  # type: ignore[no-untyped-call]
                raise yaml.YAMLError("tags are not taken")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = next((name for name, count in Counter(names).items() if count > 1), None)
            if twice is not None:
                raise yaml.YAMLError(f"'{twice}' is given twice")
            return super().construct_mapping(node, deep)

    return Plain


def _value(written: str, where: str) -> Any:
    import yaml

    try:
        return _numbers(yaml.load(written, Loader=_loader()))
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        raise UsageError(f"{where} has a value that is not plain YAML: write a number, a word or [a, list]") from None


def _numbers(found: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a word; people mean the number. ValueError where text is none."""
    if isinstance(found, dict):
        return {_whole(key): _numbers(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_numbers(value) for value in found]
    if isinstance(_whole(found), str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", found):
        return float(found)
    return found


def _whole(found: Any) -> Any:
    """`found`; ValueError where it is text with half a character, as "\\ud800" is: nothing could write it."""
    if isinstance(found, str):
        found.encode()
    return found


def _merged(base: dict[str, Any], changes: Mapping[str, Any], prefix: str, where: str) -> dict[str, Any]:
    """`changes` over a copy of `base`, key by key (a connection of another type replaces the whole); a key that `base` lacks is unknown (an empty base leaves the judgement to the types)."""
    merged = deepcopy(base)
    for key, value in changes.items():
        if base and key not in base:
            raise UsageError(
                f"{where}: unknown setting '{prefix}{key}': choose one of {', '.join(prefix + known for known in sorted(base))}"
            )
        old = base.get(key)
        merged[key] = value
        if isinstance(old, dict) and isinstance(value, Mapping) and value.get("type", old.get("type")) == old.get("type"):
            merged[key] = _merged(old, value, f"{prefix}{key}.", where)
    return merged


def _require_finite(found: Any, place: str, where: str) -> None:
    if isinstance(found, dict):
        for key, value in found.items():
            _require_finite(value, f"{place}.{key}" if place else str(key), where)
    elif isinstance(found, (list, tuple)):
        for value in found:
            _require_finite(value, place, where)
    elif isinstance(found, float) and not isfinite(found):
        raise UsageError(f"{where}: '{place}' is {found}: give a finite number")
    elif isinstance(found, int) and found.bit_length() > LONGEST_NUMBER:
        raise UsageError(f"{where}: a whole number of {found.bit_length():,} bits, in '{place}': give a smaller one")


def _plain(message: str) -> str:
    """msgspec's message in the words of the file: `$.train.lr` is train.lr, and unknown fields list the known ones."""
    sentence = message.replace("Object contains unknown field", "unknown setting").replace(
        "Object missing required field", "missing setting"
    )
    place = re.search(r" - at `\$\.?([^`]*)`", sentence)
    if place is None:
        return f"{sentence}: correct it"
    return f"{sentence[: place.start()]}, in '{place.group(1) or 'the config'}': correct it"
