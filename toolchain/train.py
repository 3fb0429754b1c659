"""Train a network and keep the run in a folder that can be resumed, inspected and deployed.

    RUN/checkpoint.safetensors   the weights that did best on the held-out training images
    RUN/last.safetensors         weights, momentum, random state: what --resume goes on from
    RUN/config.yaml              every setting, resolved; `toolchain train RUN/config.yaml -o NEW` repeats the run
    RUN/metrics.jsonl            a line an epoch

Nothing here knows how a method gets its gradients.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import cos, isfinite, pi, prod
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Union

import msgspec

from toolchain import checkpoint, config, data, devices, methods, models, network, progress
from toolchain.checkpoint import About, load
from toolchain.config import Config, Training
from toolchain.errors import ArtifactError, ToolchainError, UsageError
from toolchain.files import replace_file
from toolchain.methods import Batch, Method
from toolchain.versions import versions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from toolchain.layers import FeedbackSNN

__all__ = ["Outcome", "load", "train"]

LAST, CONFIG, METRICS, LOCK = "last.safetensors", "config.yaml", "metrics.jsonl", ".lock"
EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Outcome:
    """What a training run came to; accuracies are fractions of 1, `held_out` is the number of training images that chose the checkpoint.

    Without held-out images, `held_out_accuracy` is None and the checkpoint is the last epoch's.
    """

    run: str
    model: str
    method: str
    dataset: str
    epochs: int
    best_epoch: int
    held_out: int
    held_out_accuracy: float | None
    seed: int
    device: str
    seconds: float
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        result = (
            "no image was held out"
            if self.held_out_accuracy is None
            else f"{self.held_out_accuracy:.2%} of {self.held_out} held-out training images"
        )
        return (
            f"{self.model} trained by {self.method} on {self.dataset}: {result} "
            f"(epoch {self.best_epoch} of {self.epochs}), {self.seconds:.0f} s on {self.device}; the weights are in {self.run}/{checkpoint.NAME}"
        )


class Epoch(msgspec.Struct, frozen=True):
    """A line of metrics.jsonl: means over the epoch's batches (see `methods.Batch`), and the accuracy on the held-out images, if any, after it."""

    epoch: int
    loss: float
    accuracy: float
    held_out_accuracy: Union[float, None]
    forward_rate: float
    feedback_rate: float
    clipped: float
    silent: float
    scale_factor: float
    lr: float
    seconds: float


def train(
    model: Union[str, os.PathLike[str], FeedbackSNN],
    *,
    method: str | None = None,
    dataset: str | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    settings: Union[Mapping[str, Any], Sequence[str], None] = None,
    resume: bool = False,
    output: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
) -> Outcome:
    """Train `model` (a name of the catalogue, a CONFIG.yaml, or a module, whose weights are the starting point) and write the run folder `output`.

    `settings` are dotted, {"train.lr": 0.05} or ["train.lr=0.05"]; flags left at None keep the config's. A resumed run needs the same settings and
    continues bit for bit on a CPU. Raises UsageError for anything that cannot be done, ToolchainError where the loss stops being a number.
    """
    chosen = _config(model, {"method": method, "seed": seed, "train.dataset": dataset, "train.epochs": epochs}, settings)
    gradients_of = methods.get(chosen.method, _scale_factor(chosen), chosen.train.options)
    place = devices.pick(device)
    if not os.fspath(output):
        raise UsageError("the run folder has an empty name: give one with -o RUN")
    module = _module(model, chosen)
    gradients_of.fits(module)
    folder = Path(output)
    _check_folder(folder, chosen, resume=resume)
    learn, choose = _split(chosen, data_dir)
    run = _Run(chosen, gradients_of, module, place, folder)
    with _held(folder):
        _check_folder(folder, chosen, resume=resume)  # again: another run may have been here before the folder was ours
        if resume:
            run.restore()
        else:
            replace_file(folder / CONFIG, config.text(chosen).encode())
            replace_file(folder / METRICS, b"")
        run.fit(learn, choose)
        return run.outcome(devices.describe(place))


def _config(
    model: Union[str, os.PathLike[str], FeedbackSNN], flags: Mapping[str, Any], settings: Union[Mapping[str, Any], Sequence[str], None]
) -> Config:
    """The resolved config: the model's defaults, then the file, then flags, then settings."""
    base = _base(model)
    base = config.with_settings(base, {name: value for name, value in flags.items() if value is not None}, "flags")
    changes = settings if isinstance(settings, Mapping) else config.assignments(settings or [])
    if any(name.split(".")[0] == "model" for name in changes):
        raise UsageError("'model' is no setting: name the network to train instead, as in `toolchain train mnist-fc -o RUN`")
    resolved = config.with_settings(base, changes)
    network.check(resolved.network)
    if isinstance(model, (str, os.PathLike)) or resolved.network == base.network:
        return resolved
    raise UsageError("a module's network settings are its own: change the module, and use --set for train.* only")


def _base(model: Union[str, os.PathLike[str], FeedbackSNN]) -> Config:
    from toolchain.layers import describe

    if not isinstance(model, (str, os.PathLike)):
        return Config(network=describe(model), model=model.name)
    name = os.fspath(model)
    if name in models.names():
        return _catalogued(name)
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"'{name}' is neither a network ({', '.join(models.names())}) nor a CONFIG.yaml: give one of them")
    written = config.read(path)
    where = f"config '{path}'"
    described = written.get("network")
    if isinstance(described, Mapping) and "name" in described:
        return config.resolve({}, {"model": "", **written}, where)
    if "model" not in written:
        raise UsageError(f"{where} names no model and describes no network: add 'model: mnist-fc' or a network section with a name")
    return config.resolve(config.plain(_catalogued(str(written["model"]))), written, where)


def _catalogued(name: str) -> Config:
    from toolchain.layers import describe

    spec = models.get(name)
    return Config(network=describe(spec.build()), train=spec.training, model=name, method=spec.method)


def _module(model: Union[str, os.PathLike[str], FeedbackSNN], chosen: Config) -> FeedbackSNN:
    """The module to start from: the one given, or one with initial weights drawn from the seed."""
    import torch

    from toolchain.layers import build

    if not isinstance(model, (str, os.PathLike)):
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        built = build(chosen.network)
    if chosen.model in models.names():
        initial = models.get(chosen.model).build(chosen.seed).state_dict()
        if {k: v.shape for k, v in initial.items()} == {k: v.shape for k, v in built.state_dict().items()}:
            built.load_state_dict(initial)
    return built


def _scale_factor(chosen: Config) -> Union[float, str]:
    return chosen.network.scale_factor if chosen.train.scale_factor is None else chosen.train.scale_factor


def _check_folder(folder: Path, chosen: Config, *, resume: bool) -> None:
    """Refuse to overwrite a run or to resume another one; nothing is written."""
    begun = (folder / LAST).exists() or (folder / checkpoint.NAME).exists()
    if begun and not resume:
        raise UsageError(f"'{folder}' already holds a run: go on with --resume, or choose another folder")
    if resume:
        _same_config(folder, chosen)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make the folder and keep every other run out of it until the block or the process ends."""
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = path.open("a")
    except OSError as error:
        raise UsageError(f"'{folder}' cannot be written ({error.strerror}): choose another folder") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another run is writing '{folder}': wait for its end, or choose another folder") from None
        except OSError as error:
            raise UsageError(f"'{folder}' cannot be locked ({error.strerror}): choose a folder on another file system") from error
        if not _is_open(stream.fileno(), path):
            raise UsageError(f"another run has just left '{folder}': give the command again")
        try:
            yield
        finally:
            # removed while still locked: a run that opened it meanwhile sees that its file is no longer the folder's
            path.unlink(missing_ok=True)


def _is_open(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has the name `path` now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _same_config(folder: Path, chosen: Config) -> None:
    if not (folder / LAST).exists():
        raise UsageError(f"'{folder}' holds no {LAST} to resume from: start without --resume")
    if not (folder / checkpoint.NAME).exists():
        raise UsageError(f"'{folder}' lacks {checkpoint.NAME}, its best weights: restore the file, or train again into another folder")
    earlier = checkpoint.read(folder / LAST).about.config
    for name in ("model", "method", "seed"):
        _same(name, getattr(earlier, name), getattr(chosen, name), folder)
    for section in ("train", "network"):
        before, now = getattr(earlier, section), getattr(chosen, section)
        for field in msgspec.structs.fields(before):
            _same(f"{section}.{field.name}", getattr(before, field.name), getattr(now, field.name), folder)


def _same(name: str, before: object, now: object, folder: Path) -> None:
    if before != now:
        raise UsageError(
            f"the run in '{folder}' has {name} = {before}, not {now}: resume it with its own settings ({folder / CONFIG}), or start another"
        )


def _split(chosen: Config, data_dir: str | os.PathLike[str] | None) -> tuple[data.Dataset, data.Dataset | None]:
    """(to learn from, to choose by, if anything), both of the training split; UsageError where the images do not fit the network."""
    whole = data.load(chosen.train.dataset, split="train", data_dir=data_dir)
    takes = chosen.network
    if whole.images[0].size != prod(takes.input_shape):
        raise UsageError(
            f"images of '{whole.name}' have shape {whole.images.shape[1:]} but '{takes.name}' takes {takes.input_shape}: choose another data set or network"
        )
    if len(whole.classes) > takes.classes:
        raise UsageError(f"'{whole.name}' has {len(whole.classes)} classes but the readout of '{takes.name}' has {takes.classes}: widen it")
    return data.hold_out(whole, chosen.train.held_out) if chosen.train.held_out else (whole, None)


class _Run:
    """A training run between its files: module, optimiser, random state, and the lines so far."""

    def __init__(self, chosen: Config, method: Method, module: FeedbackSNN, device: torch.device, folder: Path) -> None:
        import torch

        self.config, self.method, self.folder, self.device = chosen, method, folder, device
        self.module = module.to(device)
        settings = chosen.train
        self.optimizer = torch.optim.SGD(
            self.module.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self.generator = torch.Generator().manual_seed(chosen.seed)
        self.lines: list[Epoch] = []

    def fit(self, learn: data.Dataset, choose: data.Dataset | None) -> None:
        """Train the epochs that are left, writing the folder after each."""
        images, labels = self._tensors(learn)
        held_out = None if choose is None else self._tensors(choose)
        for epoch in range(len(self.lines) + 1, self.config.train.epochs + 1):
            start = perf_counter()
            batches = self._epoch(epoch, images, labels)
            accuracy = None if held_out is None else self._accuracy(*held_out)
            self.lines.append(self._line(epoch, batches, accuracy, perf_counter() - start))
            self._save()
            progress.say(_sentence(self.lines[-1], self.config.train.epochs))

    def _tensors(self, dataset: data.Dataset) -> tuple[Tensor, Tensor]:
        import torch

        return torch.from_numpy(dataset.images).to(self.device), torch.from_numpy(dataset.labels).to(self.device)

    def _epoch(self, epoch: int, images: Tensor, labels: Tensor) -> list[Batch]:
        """One pass over the training images in a random order; what is left over from full batches waits for another epoch's order."""
        import torch

        size = min(self.config.train.batch, len(images))
        order = torch.randperm(len(images), generator=self.generator).to(self.device)
        count = len(images) // size
        done: list[Batch] = []
        self.module.train()
        for index in progress.track(range(count), f"epoch {epoch}/{self.config.train.epochs}", count):
            rate = learning_rate(self.config.train, (epoch - 1) * count + index, count)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            chosen = order[index * size : (index + 1) * size]
            batch = self.method.gradients(self.module, images[chosen], labels[chosen], self.generator, self.optimizer.step)
            if not isfinite(batch.loss):
                raise ToolchainError(
                    f"the loss is {batch.loss} in epoch {epoch}, batch {index + 1}: lower train.lr (it is {rate:.3g} there)"
                )
            self.optimizer.step()
            done.append(batch)
        self.module.eval()
        return done

    def _accuracy(self, images: Tensor, labels: Tensor) -> float:
        import torch

        with torch.no_grad():
            chunks = zip(torch.split(images, EVALUATION_BATCH), torch.split(labels, EVALUATION_BATCH), strict=True)
            correct = sum(int((self.module(x).argmax(1) == y).sum()) for x, y in chunks)
        return correct / len(labels)

    def _line(self, epoch: int, batches: list[Batch], accuracy: float | None, seconds: float) -> Epoch:
        mean = {field.name: sum(getattr(b, field.name) for b in batches) / len(batches) for field in fields(Batch)}
        mean["accuracy"] = mean.pop("correct")
        rate: float = self.optimizer.param_groups[0]["lr"]
        return Epoch(
            epoch=epoch,
            **mean,
            held_out_accuracy=accuracy,
            scale_factor=self.method.state().get("scale_factor", 1.0),
            lr=rate,
            seconds=seconds,
        )

    @property
    def best(self) -> Epoch:
        """The first epoch with the highest held-out accuracy; the last epoch where nothing is held out."""
        chosen = [line for line in self.lines if line.held_out_accuracy is not None]
        return max(chosen, key=lambda line: (line.held_out_accuracy, -line.epoch)) if chosen else self.lines[-1]

    def _save(self) -> None:
        """The best weights, then everything to resume from, then the lines: a crash in between repeats an epoch, never loses one."""
        now = self.lines[-1]
        weights = self.module.state_dict()
        about = About(checkpoint.FORMAT, self.config, now.epoch, now.held_out_accuracy, self.method.state())
        if self.best is now:
            checkpoint.write(self.folder / checkpoint.NAME, weights, about)
        momentum = {name: self.optimizer.state[p].get("momentum_buffer") for name, p in self.module.named_parameters()}
        state = {f"model.{name}": tensor for name, tensor in weights.items()}
        state |= {f"momentum.{name}": tensor for name, tensor in momentum.items() if tensor is not None}
        checkpoint.write(self.folder / LAST, {**state, "random": self.generator.get_state()}, about)
        replace_file(self.folder / METRICS, b"".join(msgspec.json.encode(line) + b"\n" for line in self.lines))

    def restore(self) -> None:
        """Take up the run where its folder stopped; ArtifactError where the folder's files contradict each other."""
        path = self.folder / LAST
        last = checkpoint.read(path)
        parts = {kind: {k.removeprefix(kind): t for k, t in last.tensors.items() if k.startswith(kind)} for kind in ("model.", "momentum.")}
        checkpoint.load_weights(self.module, parts["model."], path)
        for name, parameter in self.module.named_parameters():
            if name in parts["momentum."]:
                self.optimizer.state[parameter]["momentum_buffer"] = parts["momentum."][name].to(parameter)
        if "random" not in last.tensors:
            raise ArtifactError(f"'{path}' lacks the random state: start the run again without --resume")
        self.generator.set_state(last.tensors["random"])
        self.method.restore(last.about.progress)
        self.lines = _lines(self.folder / METRICS, last.about.epoch)

    def outcome(self, device: str) -> Outcome:
        best = self.best
        return Outcome(
            run=str(self.folder),
            model=self.config.network.name,
            method=self.config.method,
            dataset=self.config.train.dataset,
            epochs=len(self.lines),
            best_epoch=best.epoch,
            held_out=self.config.train.held_out,
            held_out_accuracy=best.held_out_accuracy,
            seed=self.config.seed,
            device=device,
            seconds=sum(line.seconds for line in self.lines),
            versions=versions(),
        )


def learning_rate(settings: Training, batch: int, batches: int) -> float:
    """The learning rate of batch number `batch` (from 0, over the whole run) where an epoch has `batches`."""
    warm = min(1.0, (batch + 1) / settings.warmup) if settings.warmup else 1.0
    if settings.schedule == "constant":
        return settings.lr * warm
    if settings.schedule == "steps":
        return settings.lr * warm * settings.decay ** sum(batch >= milestone * batches for milestone in settings.milestones)
    return settings.lr * warm * (1 + cos(pi * batch / (settings.epochs * batches))) / 2


def _lines(path: Path, epochs: int) -> list[Epoch]:
    """The first `epochs` lines of metrics.jsonl."""
    try:
        lines = [msgspec.json.decode(line, type=Epoch) for line in path.read_bytes().splitlines()]
    except (OSError, msgspec.DecodeError) as error:
        raise ArtifactError(f"'{path}' cannot be read ({error}): restore it, or start the run again without --resume") from None
    if len(lines) < epochs:
        raise ArtifactError(
            f"'{path}' has {len(lines)} epochs but the run has done {epochs}: restore it, or start the run again without --resume"
        )
    return lines[:epochs]


def _sentence(line: Epoch, epochs: int) -> str:
    accuracy = f"accuracy {line.accuracy:.2%}" if line.held_out_accuracy is None else f"held-out accuracy {line.held_out_accuracy:.2%}"
    said = f"epoch {line.epoch}/{epochs}: loss {line.loss:.4f}, {accuracy}, firing rates {line.forward_rate:.3f} forward"
    if line.feedback_rate:
        said += f" and {line.feedback_rate:.4f} feedback, {line.clipped:.2%} of couples clipped, {line.silent:.1%} silent"
    return f"{said}, {line.seconds:.0f} s"
