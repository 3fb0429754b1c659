"""Train a network and keep the run in a folder that can be resumed, inspected and deployed.

    RUN/checkpoint.safetensors   the weights that did best on the held-out training images
    RUN/last.safetensors         weights, the optimiser's state, random state: what --resume goes on from
    RUN/config.yaml              every setting, resolved; `toolchain train RUN/config.yaml -o NEW` repeats the run
    RUN/metrics.jsonl            a line an epoch; also metrics.csv and tensorboard/ where train.metrics asks for them

Nothing here knows how a method gets its gradients. Started by torchrun, every process computes its rows of each batch and the first one writes the files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import cos, isfinite, pi, prod
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Union

import msgspec

from toolchain import augment, checkpoint, config, data, devices, methods, metrics, models, network, optimizer, processes, progress
from toolchain.batches import Batches
from toolchain.checkpoint import About
from toolchain.config import Config, Training
from toolchain.data.dataset import fingerprint
from toolchain.errors import ArtifactError, ToolchainError, UsageError
from toolchain.files import held, replace_file
from toolchain.methods import Batch, Method
from toolchain.metrics import Epoch
from toolchain.versions import versions

if TYPE_CHECKING:
    import torch

    from toolchain.layers import FeedbackSNN

LAST, CONFIG = "last.safetensors", "config.yaml"
FILES = (checkpoint.NAME, LAST, CONFIG, metrics.LINES, metrics.TABLE)
EVALUATION_BATCH = 500
LARGEST_EPOCHS = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """What a training run came to; accuracies are fractions of 1, `held_out` is the number of training images that chose the checkpoint.

    Without held-out images, `held_out_accuracy` is None and the checkpoint is the last epoch's. `stopped_early`: train.early_stop ended the run.
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
    stopped_early: bool = False
    processes: int = 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        result = (
            "no image was held out"
            if self.held_out_accuracy is None
            else f"{self.held_out_accuracy:.2%} of {self.held_out} held-out training images"
        )
        where = self.device if self.processes == 1 else f"{self.processes} processes, {self.device}"
        return (
            f"{self.model} trained by {self.method} on {self.dataset}: {result} "
            f"(epoch {self.best_epoch} of {self.epochs}{', then stopped early' if self.stopped_early else ''}), {self.seconds:.0f} s on {where}; the weights are in {self.run}/{checkpoint.NAME}"
        )


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
    """Train `model` and write the run folder `output`: a name of the catalogue or a CONFIG.yaml, or a run folder, checkpoint or module, whose weights are the starting point.

    `settings` are dotted, {"train.lr": 0.05} or ["train.lr=0.05"]; flags left at None keep the config's. A resumed run needs the same settings and
    continues bit for bit on a CPU. Where torchrun started several processes, they train together and all get the same outcome. Raises UsageError for anything that cannot be done, ToolchainError where the loss stops being a number.
    """
    with processes.together(device):
        flags = {"method": method, "seed": seed, "train.dataset": dataset, "train.epochs": epochs}
        return _train(model, configure(model, flags, settings), devices.pick(device), resume, output, data_dir)


def _train(
    model: Union[str, os.PathLike[str], FeedbackSNN],
    chosen: Config,
    device: torch.device,
    resume: bool,
    output: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None,
) -> Outcome:
    gradients_of = methods.get(chosen.method, _scale_factor(chosen), chosen.train.options)
    if not os.fspath(output):
        raise UsageError("the run folder has an empty name: give one with -o RUN")
    module = _module(model, chosen)
    gradients_of.fits(module.to(device))  # where it will train: the native kernel is for the CPU
    _check_training(chosen, device)
    folder, first = Path(output), processes.rank() == 0
    if first:
        _check_folder(folder, chosen, resume=resume)
    learn, choose = _split(chosen, data_dir)
    processes.rows(min(chosen.train.batch, len(learn)))  # refuses batches that cannot be dealt out
    samples = " ".join(fingerprint(part) for part in (learn, choose) if part is not None)
    run = _Run(chosen, gradients_of, module, device, folder, samples)
    with held(folder, FILES) if first else contextlib.nullcontext():
        if first:
            _check_folder(folder, chosen, resume=resume)  # again: another run may have been here before the folder was ours
        # nobody goes on, or reads the folder, before the first process has found it good, and all do as it does
        if processes.first_says(resume and (folder / LAST).exists()):
            run.restore()
        elif first:
            if resume:
                progress.say(f"'{folder}' has no whole epoch yet: the run begins again")
            run.files.write([])
        if first:
            replace_file(folder / CONFIG, config.text(chosen).encode())  # of a run that goes on too: somebody may have edited it
        run.fit(learn, choose)
        return run.outcome(devices.describe(device))


def _check_training(chosen: Config, device: torch.device) -> None:
    """UsageError for settings that no epoch could use."""
    import torch

    settings = chosen.train
    if settings.amp == "bf16":
        methods.check_amp(chosen.method)
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            raise UsageError(f"'{devices.describe(device)}' has no bfloat16: leave train.amp off")
    metrics.check(settings.metrics)
    if settings.early_stop and not settings.held_out:
        raise UsageError(
            "train.early_stop watches the accuracy on held-out images, but train.held_out is 0: hold some out, or leave it out"
        )


def configure(
    model: Union[str, os.PathLike[str], FeedbackSNN], flags: Mapping[str, Any], settings: Union[Mapping[str, Any], Sequence[str], None]
) -> Config:
    """The resolved config: the model's defaults on the data set asked for, then the file, then flags, then settings."""
    changes = settings if isinstance(settings, Mapping) else config.assignments(settings or [])
    if any(name.split(".")[0] == "model" for name in changes):
        raise UsageError("'model' is no setting: name the network to train instead, as in `toolchain train mnist-fc -o RUN`")
    base = _base(model, changes.get("train.dataset", flags.get("train.dataset")))
    base = config.with_settings(base, {name: value for name, value in flags.items() if value is not None}, "flags")
    resolved = config.with_settings(base, changes)
    network.check(resolved.network)
    if isinstance(model, (str, os.PathLike)) or resolved.network == base.network:
        return resolved
    raise UsageError("a module's network settings are its own: change the module, and use --set for train.* only")


def _base(model: Union[str, os.PathLike[str], FeedbackSNN], dataset: object) -> Config:
    from toolchain.layers import describe

    if not isinstance(model, (str, os.PathLike)):
        return Config(network=describe(model), model=model.name)
    name = os.fspath(model)
    if name in models.names():
        return _catalogued(name, dataset)
    path = Path(name)
    if path.suffix == ".safetensors" or os.path.isfile(path / checkpoint.NAME):  # False, too, for a name that no file system takes
        return msgspec.structs.replace(checkpoint.read(_weights(path)).about.config, start=name)
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(
            f"'{name}' is neither a network ({', '.join(models.names())}) nor a CONFIG.yaml, run folder or checkpoint: give one of them"
        )
    written = config.read(path)
    where = f"config '{path}'"
    described = written.get("network")
    if isinstance(described, Mapping) and "name" in described:
        return config.resolve({}, {"model": "", **written}, where)
    if "model" not in written:
        raise UsageError(f"{where} names no model and describes no network: add 'model: mnist-fc' or a network section with a name")
    if not isinstance(written["model"], str):
        raise UsageError(f"{where} has a model that is no name: write it as 'model: mnist-fc'")
    training = written.get("train")
    named = training.get("dataset") if isinstance(training, Mapping) else None
    return config.resolve(config.plain(_catalogued(written["model"], dataset or named)), written, where)


def _catalogued(name: str, dataset: object) -> Config:
    from toolchain.layers import describe

    spec = models.get(name)
    training = spec.training_on(dataset if isinstance(dataset, str) else None)
    return Config(network=describe(spec.build()), train=training, model=name, method=spec.method)


def _module(model: Union[str, os.PathLike[str], FeedbackSNN], chosen: Config) -> FeedbackSNN:
    """The module to start from: the one given, one with the weights of an earlier run, or one with initial weights drawn from the seed."""
    import torch

    from toolchain.layers import build

    if not isinstance(model, (str, os.PathLike)):
        return model
    if chosen.start:
        started = build(chosen.network)
        earlier = _weights(Path(chosen.start))
        checkpoint.load_weights(started, checkpoint.read(earlier).tensors, earlier)
        return started
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        built = build(chosen.network)
    if chosen.model in models.names():
        initial = models.get(chosen.model).build(chosen.seed).state_dict()
        own = built.state_dict()
        if {k: v.shape for k, v in initial.items()} == {k: v.shape for k, v in own.items()}:
            thresholds = {k: v for k, v in own.items() if k.startswith("thresholds.")}  # a setting of the network, not drawn
            built.load_state_dict({**initial, **thresholds})
    return built


def _weights(start: Path) -> Path:
    """The file of weights of a run folder, or the checkpoint itself."""
    return start / checkpoint.NAME if start.is_dir() else start


def _scale_factor(chosen: Config) -> Union[float, str]:
    return chosen.network.scale_factor if chosen.train.scale_factor is None else chosen.train.scale_factor


def _check_folder(folder: Path, chosen: Config, *, resume: bool) -> None:
    """Refuse to overwrite a run or to resume another one; nothing is written."""
    begun = (folder / LAST).exists() or (folder / checkpoint.NAME).exists()
    if begun and not resume:
        raise UsageError(f"'{folder}' already holds a run: go on with --resume, or choose another folder")
    if resume:
        _same_config(folder, chosen)


def _same_config(folder: Path, chosen: Config) -> None:
    earlier = _begun_with(folder)
    for name in ("model", "method", "seed", "start"):
        _same(name, getattr(earlier, name), getattr(chosen, name), folder)
    for section in ("train", "network"):
        before, now = getattr(earlier, section), getattr(chosen, section)
        for field in msgspec.structs.fields(before):
            _same(f"{section}.{field.name}", getattr(before, field.name), getattr(now, field.name), folder)


def _begun_with(folder: Path) -> Config:
    """The config of the run to resume; UsageError where there is none."""
    if (folder / LAST).exists():
        if not (folder / checkpoint.NAME).exists():
            raise UsageError(f"'{folder}' lacks {checkpoint.NAME}, its best weights: restore the file, or train again into another folder")
        return checkpoint.read(folder / LAST).about.config
    lines = folder / metrics.LINES
    if (folder / CONFIG).exists() and lines.exists() and lines.read_bytes().count(b"\n") <= 1:  # ended in its first epoch
        return config.resolve({}, config.read(folder / CONFIG), f"config '{folder / CONFIG}'")
    raise UsageError(f"'{folder}' holds no {LAST} to resume from: start without --resume")


def _same(name: str, before: object, now: object, folder: Path) -> None:
    if before != now:
        raise UsageError(
            f"the run in '{folder}' has {name} = {before}, not {now}: resume it with its own settings ({folder / CONFIG}), or start another"
        )


def _split(chosen: Config, data_dir: str | os.PathLike[str] | None) -> tuple[data.Dataset, data.Dataset | None]:
    """(to learn from, to choose by, if anything), both of the training split; UsageError where the images do not fit the network."""
    takes, name = chosen.network, chosen.train.dataset
    whole = data.load(
        name, split="train", data_dir=data_dir, time_steps=takes.time_steps, image_size=data.size_for(name, takes.input_shape)
    )
    shape = whole.images.shape[1:]
    events = len(shape) == len(takes.input_shape) + 1 and shape[:-1] == takes.input_shape
    if not events and prod(shape) != prod(takes.input_shape):
        raise UsageError(
            f"images of '{whole.name}' have shape {shape} but '{takes.name}' takes {takes.input_shape}: choose another data set or network"
        )
    if len(whole.classes) > takes.classes:
        raise UsageError(f"'{whole.name}' has {len(whole.classes)} classes but the readout of '{takes.name}' has {takes.classes}: widen it")
    return data.hold_out(whole, chosen.train.held_out) if chosen.train.held_out else (whole, None)


class _Run:
    """A training run between its files: module, optimiser, random state, and the lines so far."""

    def __init__(self, chosen: Config, method: Method, module: FeedbackSNN, device: torch.device, folder: Path, samples: str) -> None:
        """`samples` tells the data from others (`fingerprint`)."""
        import torch

        self.config, self.method, self.folder, self.device = chosen, method, folder, device
        self.samples = torch.tensor(list(samples.encode()), dtype=torch.uint8)
        self.module = module
        self.optimizer = optimizer.make(chosen.train, self.module)
        self.generator = torch.Generator().manual_seed(chosen.seed)
        self.files = metrics.Writer(folder, chosen.train.metrics)
        self.lines: list[Epoch] = []

    def fit(self, learn: data.Dataset, choose: data.Dataset | None) -> None:
        """Train the epochs that are left, writing the folder after each."""
        processes.share_weights(self.module)
        images = Batches(learn, self.device)
        held_out = None if choose is None else Batches(choose, self.device)
        with contextlib.closing(self.files):
            while len(self.lines) < self.config.train.epochs and not self.stopped:
                start, epoch = perf_counter(), len(self.lines) + 1
                batches = self._epoch(epoch, images.seen(self._seed(epoch)))
                accuracy = None if held_out is None else self._accuracy(held_out)
                self.lines.append(self._line(epoch, batches, accuracy, perf_counter() - start))
                if processes.rank() == 0:
                    self._keep()
                    progress.say(metrics.sentence(self.lines[-1], self.config.train.epochs))
        processes.wait()

    def _epoch(self, epoch: int, learn: Batches) -> list[Batch]:
        """One pass over the training images in a random order; what is left over from full batches waits for another epoch's order."""
        import torch

        size = min(self.config.train.batch, len(learn))
        own = processes.rows(size)
        order = torch.randperm(len(learn), generator=self.generator)
        count = len(learn) // size
        done: list[Batch] = []
        self.module.train()
        numbers = range(count)
        for index in progress.track(numbers, f"epoch {epoch}/{self.config.train.epochs}", count) if processes.rank() == 0 else numbers:
            rate = learning_rate(self.config.train, (epoch - 1) * count + index, count)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            images, labels = learn.get(order[index * size : (index + 1) * size][own])
            images = augment.apply(images, self.config.train.augment, self.generator)
            with self._precision():
                batch = self.method.gradients(self.module, images, labels, self.generator, self._step)
            if not isfinite(batch.loss):
                raise ToolchainError(
                    f"the loss is {batch.loss} in epoch {epoch}, batch {index + 1}: lower train.lr (it is {rate:.3g} there)"
                )
            self._step()
            done.append(batch)
        for name, weight in self.module.named_parameters():  # the last step has no loss yet that would tell
            if not bool(torch.isfinite(weight).all()):
                raise ToolchainError(f"'{name}' holds NaN or infinite values after epoch {epoch}: lower train.lr (it is {rate:.3g} there)")
        self.module.eval()
        return done

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        """Where methods compute; no weight is cached in bfloat16, since an online method changes it within a batch."""
        import torch

        reduced = self.config.train.amp == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=reduced, cache_enabled=False)

    def _seed(self, epoch: int) -> int:
        """What the crops of images decoded in this epoch are drawn from."""
        return self.config.seed % 2**32 * LARGEST_EPOCHS + epoch

    def _step(self) -> None:
        """Update the weights by the gradient that all processes' shares add up to."""
        processes.add_gradients(self.module)
        self.optimizer.step()

    def _accuracy(self, held_out: Batches) -> float:
        """The share of the held-out images that is classified right, each process looking at some."""
        import torch

        own = torch.arange(processes.rank(), len(held_out), processes.size())
        correct = 0
        with torch.no_grad():
            for numbers in torch.split(own, EVALUATION_BATCH) if len(own) else ():
                images, labels = held_out.get(numbers)
                correct += int((self.module(images).argmax(1) == labels).sum())
        return processes.total_number(correct) / len(held_out)

    def _line(self, epoch: int, batches: list[Batch], accuracy: float | None, seconds: float) -> Epoch:
        mean = {field.name: _mean([getattr(batch, field.name) for batch in batches]) for field in fields(Batch)}
        mean["accuracy"] = mean.pop("correct")
        rate: float = self.optimizer.param_groups[0]["lr"]
        line = Epoch(
            epoch=epoch,
            **mean,
            held_out_accuracy=accuracy,
            scale_factor=self.method.state().get("scale_factor", 1.0),
            lr=rate,
            seconds=seconds,
        )
        settings = self.config.train
        waited = epoch - metrics.best([*self.lines, line]).epoch
        stopped = 0 < settings.early_stop <= waited and epoch < settings.epochs
        return msgspec.structs.replace(line, stopped=stopped)

    @property
    def stopped(self) -> bool:
        """Whether train.early_stop has ended the run."""
        return bool(self.lines) and self.lines[-1].stopped

    def _keep(self) -> None:
        """Write the folder after an epoch; where that fails, say what it still holds."""
        try:
            self._save()
        except ToolchainError as error:
            done = len(self.lines) - 1
            kept = f"the folder keeps what it had after epoch {done}" if done else "no epoch is done"
            raise type(error)(f"{error} ({kept}; --resume goes on from there)") from None

    def _save(self) -> None:
        """The best weights, then the lines, then everything to resume from, which alone says that the epoch is done: ended in between, a run repeats it."""
        now = self.lines[-1]
        weights = self.module.state_dict()
        about = About(checkpoint.FORMAT, self.config, now.epoch, now.held_out_accuracy, self.method.state())
        if metrics.best(self.lines) is now:
            checkpoint.write(self.folder / checkpoint.NAME, weights, about)
        self.files.write(self.lines)
        state = {f"model.{name}": tensor for name, tensor in weights.items()} | optimizer.tensors(self.optimizer, self.module)
        checkpoint.write(self.folder / LAST, {**state, "random": self.generator.get_state(), "samples": self.samples}, about)

    def restore(self) -> None:
        """Take up the run where its folder stopped; ArtifactError where the folder's files contradict each other."""
        import torch

        path = self.folder / LAST
        last = checkpoint.read(path)
        weights = {name.removeprefix("model."): tensor for name, tensor in last.tensors.items() if name.startswith("model.")}
        checkpoint.load_weights(self.module, weights, path)
        optimizer.restore(self.optimizer, self.module, last.tensors, path)
        if "random" not in last.tensors:
            raise ArtifactError(f"'{path}' lacks the random state: train again into another folder")
        try:
            self.generator.set_state(last.tensors["random"])
        except (RuntimeError, TypeError) as error:
            raise ArtifactError(f"'{path}' holds no random state of torch's ({error}): train again into another folder") from None
        learned = last.about.progress
        if not all(1 / network.LARGEST <= learned.get(name, 1.0) <= network.LARGEST for name in self.method.state()) or (
            "scale_factor" in self.method.state() and "scale_factor" not in learned
        ):
            raise ArtifactError(f"'{path}' holds no state of method {self.config.method} ({learned}): train again into another folder")
        if last.about.epoch < 1:
            raise ArtifactError(f"'{path}' is of epoch {last.about.epoch}, and epochs count from 1: train again into another folder")
        self.method.restore(learned)
        if not torch.equal(last.tensors.get("samples", self.samples), self.samples):  # earlier versions did not keep it
            raise UsageError(
                f"the run in '{self.folder}' has seen other samples of '{self.config.train.dataset}' than are there now: bring its own back, or train into another folder"
            )
        self.lines = metrics.read(self.folder / metrics.LINES, last.about.epoch)
        self._require_agreement(last.about)

    def _require_agreement(self, last: About) -> None:
        """ArtifactError where the lines, the best weights and the state to go on from are not of one run."""
        path = self.folder / checkpoint.NAME
        best, kept = metrics.best(self.lines), checkpoint.read(path).about
        if kept.config != last.config:
            raise ArtifactError(f"'{path}' is of another run than {LAST} beside it: restore it, or train again into another folder")
        # a run that was ended between two files has the weights of the epoch that it repeats, on a GPU not always to the same bits
        ahead = kept.epoch == last.epoch + 1 or self.device.type != "cpu"
        same = (kept.epoch, kept.held_out_accuracy) == (best.epoch, best.held_out_accuracy)
        if self.lines[-1].held_out_accuracy != last.held_out_accuracy or not (ahead or same):
            raise ArtifactError(
                f"'{self.folder / metrics.LINES}' tells of other accuracies than {checkpoint.NAME} and {LAST} beside it: restore the three, or train again into another folder"
            )

    def outcome(self, device: str) -> Outcome:
        best = metrics.best(self.lines)
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
            stopped_early=self.stopped,
            processes=processes.size(),
        )


def _mean(values: Sequence[Any]) -> Any:
    """The mean over batches and processes of numbers, or of tuples place by place."""
    if isinstance(values[0], tuple):
        return tuple(_mean(place) for place in zip(*values, strict=True))
    return processes.total_number(sum(values) / len(values)) / processes.size()


def learning_rate(settings: Training, batch: int, batches: int) -> float:
    """The learning rate of batch number `batch` (from 0, over the whole run) where an epoch has `batches`."""
    warm = min(1.0, (batch + 1) / settings.warmup) if settings.warmup else 1.0
    if settings.schedule == "constant":
        return settings.lr * warm
    if settings.schedule == "steps":
        return settings.lr * warm * settings.decay ** sum(batch >= milestone * batches for milestone in settings.milestones)
    return settings.lr * warm * (1 + cos(pi * batch / (settings.epochs * batches))) / 2
