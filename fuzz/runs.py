"""Targets: what run folders hold (checkpoints, the state that --resume goes on from, metrics, answers), configurations and settings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
from hypothesis import strategies as st

from fuzz import mutate
from fuzz.artefacts import built, networks
from fuzz.target import Prepared, Target
from toolchain import metrics, network
from toolchain.errors import UsageError

LARGEST_BUILT = 1 << 16
"""Weights and neurons of a network that is built, so that accepted ones cost little: what is larger is checked only."""

TENSORS = (mutate.tensor_bytes, mutate.tensor_header, *(mutate.metadata("toolchain"),) * 4)


def configs() -> list[Any]:
    """A `Config` of each small network, the trainings as different as they can be."""
    from toolchain.config import Config, Training

    trainings = (
        Training(dataset="digits", epochs=3, batch=8, held_out=16),
        Training(dataset="mnist", optimizer="adam", schedule="steps", milestones=(1, 2), scale_factor="auto"),
        Training(dataset="fashion-mnist", schedule="constant", warmup=3, metrics=("jsonl", "csv"), early_stop=2),
    )
    return [Config(n, t, model=n.name) for n, t in zip(networks(), trainings, strict=True)]


def tiny(found: network.Network) -> bool:
    """Whether building and running it costs next to nothing."""
    counts = network.counts(found)
    return (
        counts.parameters + sum(counts.neurons) + sum(counts.multiply_adds.values()) <= LARGEST_BUILT
        and found.time_steps <= 20
        and len(found.hidden) <= 50
    )


def checkpoint(folder: Path) -> Prepared:
    """checkpoint.safetensors: loaded, its network built, given its weights, and run on two images."""
    import torch

    from toolchain import checkpoint as stored
    from toolchain.layers import describe

    file, seeds = folder / stored.NAME, []
    for module, config in zip(built(), configs(), strict=True):
        stored.write(file, module.state_dict(), stored.About(stored.FORMAT, config, 1, 0.5, {"scale_factor": 100.0}))
        seeds.append(file.read_bytes())

    def read(data: bytes) -> None:
        file.write_bytes(data)
        module = stored.load(file)
        if tiny(describe(module)):
            with torch.no_grad():
                module(torch.zeros(2, *module.input_shape))

    return Prepared(seeds, read, TENSORS)


def last(folder: Path) -> Prepared:
    """last.safetensors: what --resume takes up, weights, optimiser and random state, beside a whole metrics.jsonl."""
    import torch

    from toolchain import checkpoint as stored
    from toolchain import methods
    from toolchain.train import LAST, _check_folder, _Run

    seeds = []
    for module, config in zip(built(), configs(), strict=True):
        run = _Run(config, methods.get("spide", 100.0, {}), module, torch.device("cpu"), folder / config.model, "the samples")
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        run.optimizer.step()
        run.lines = [_line(1)]
        run._save()
        seeds.append((run.folder / LAST).read_bytes())

    def read(data: bytes) -> None:
        (folder / LAST).write_bytes(data)
        of = stored.read(folder / LAST).about.config.model
        for module, config in zip(built(), configs(), strict=True):
            if of == config.model:
                own = folder / config.model
                (own / LAST).write_bytes(data)
                _check_folder(own, config, resume=True)
                _Run(config, methods.get("spide", 100.0, {}), module, torch.device("cpu"), own, "the samples").restore()
                return
        raise UsageError("the run is none of the seeds': another network")

    return Prepared(seeds, read, TENSORS)


def _line(epoch: int) -> metrics.Epoch:
    return metrics.Epoch(epoch, 0.7, 0.5, 0.5, 0.1, 0.01, 0.0, 0.2, 100.0, 0.1, 1.5, (0.1, 0.2), (0.01, 0.0))


def lines(folder: Path) -> Prepared:
    """metrics.jsonl: the lines of a run that is resumed, and the words about the best of them."""
    seed = b"".join(msgspec.json.encode(_line(epoch)) + b"\n" for epoch in (1, 2, 3))
    file = folder / metrics.LINES

    def read(data: bytes) -> None:
        file.write_bytes(data)
        found = metrics.read(file, 2)
        metrics.sentence(metrics.best(found), 3)
        metrics.Writer(folder, ("jsonl", "csv")).write(found)

    return Prepared([seed], read, (mutate.lines_of_json,))


def configuration(folder: Path) -> Prepared:
    """CONFIG.yaml: resolved over its model's defaults, checked, written again, and its network built where it is small."""
    from toolchain import config as read_configs

    seeds = [read_configs.text(found).encode() for found in configs()]
    seeds += [b"model: digits-fc\ntrain:\n  lr: 0.02\n  epochs: 2\n  augment: {crop: 4, flip: true}\nseed: 3\n"]
    file = folder / "config.yaml"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        _configured(file, [])

    return Prepared(seeds, read, (mutate.yaml_text,) * 3, written_configs())


def _configured(file: Path, settings: list[str]) -> None:
    from toolchain import config, methods
    from toolchain.layers import build
    from toolchain.train import configure

    found = configure(file, {"train.epochs": 2}, settings)
    methods.get(found.method, 1.0, found.train.options)
    if config.resolve({}, config.plain(found), "again") != found:
        raise AssertionError("a config is not what its own text says")
    if tiny(found.network):
        build(found.network)


def settings(folder: Path) -> Prepared:
    """--set NAME=VALUE, a setting a line, over a configuration and for the passes of a compilation."""
    from toolchain import config as read_configs
    from toolchain.compiler import _options
    from toolchain.passes import LOIHI_PIPELINE

    file = folder / "config.yaml"
    file.write_text(read_configs.text(configs()[0]))
    seeds = [
        b"train.lr=0.05\ntrain.milestones=[1, 2]\nnetwork.time_steps=7",
        b"network.neuron.leak=0.9\nnetwork.hidden=[]\nnetwork.readout={type: linear, inputs: 5, outputs: 2}\nnetwork.feedback=[]",
        b"train.options={solver: iter}\nseed=5\nmethod=ide\ntrain.augment.crop=2",
        b"quantize.input_levels=255\npartition.split=true\nretime.mode=exact",
        b"quantize.weight_bits=6\npartition.split=false",
    ]

    def read(data: bytes) -> None:
        asked = data.decode("utf-8", "surrogateescape").split("\n")
        if any(asked_ for asked_ in asked if asked_.startswith(("quantize", "partition", "retime", "fold"))):
            LOIHI_PIPELINE.with_options(**_options(8, "exact", "bias", "loihi2", asked, LOIHI_PIPELINE))
        else:
            _configured(file, asked)

    def values(data: bytes, random: Random) -> bytes:
        asked = data.split(b"\n")
        at = random.randrange(len(asked))
        name = asked[at].partition(b"=")[0]
        value = random.choice(
            (*mutate.YAML, json.dumps(mutate.extreme(random)).encode(), random.choice(mutate.WORDS).encode("utf-8", "surrogatepass"))
        )
        asked[at] = name + b"=" + value
        return b"\n".join(asked)

    def names(data: bytes, random: Random) -> bytes:
        asked = data.split(b"\n")
        at = random.randrange(len(asked))
        field = random.choice(FIELDS)
        asked[at] = (
            random.choice((field, field + ".x", field.rpartition(".")[0], "..", "", "." + field)).encode()
            + asked[at][asked[at].find(b"=") :]
        )
        return b"\n".join(asked)

    return Prepared(seeds, read, (values, values, names))


FIELDS = tuple(
    f"{section}.{name}"
    for section, names in {
        "network": (
            "name",
            "input_shape",
            "input",
            "readout",
            "hidden",
            "feedback",
            "neuron",
            "neuron.leak",
            "normalize",
            "skips",
            "relays",
            "dropout_of",
        ),
        "train": (
            "dataset",
            "epochs",
            "batch",
            "lr",
            "options",
            "options.a",
            "augment",
            "augment.crop",
            "metrics",
            "scale_factor",
            "milestones",
        ),
    }.items()
    for name in names
)


def answers(folder: Path) -> Prepared:
    """N-COUNT.answers, the partial results that deploy --resume goes on from, with the digest mended."""
    import numpy as np

    from toolchain.partial import Partial, Question
    from toolchain.shards import Message

    os.environ["XDG_CACHE_HOME"] = str(folder)
    images = np.arange(32, dtype=np.float32).reshape(8, 4)

    def fits(part: slice, message: Message) -> bool:
        found = message.arrays.get("logits")
        return found is not None and found.shape == (part.stop - part.start, 2) and found.dtype == np.float64

    question = Question(
        "net", "sim", "digits", 8, lambda: {"model": "net", "target": "sim", "dataset": "digits"}, lambda part: images[part], fits, 1 << 20
    )
    first = Partial(question, saves=True)
    first.begin(resume=False)
    first._saved_at = float("inf")  # no save is due before both are there, however slow the machine is
    for start in (0, 4):
        part = slice(start, start + 4)
        first.add(part, Message({"spikes": 1.0, "seconds": 0.5}, {"logits": np.ones((4, 2))}), images[part])
    first.save()
    first.close()
    (saved,) = first._folder.glob("*.answers")
    seed = saved.read_bytes()

    def read(data: bytes) -> None:
        saved.write_bytes(data)
        again = Partial(question, saves=True)
        try:
            again.begin(resume=True)
            for answer in again.answers():
                answer.arrays["logits"].sum()
            again.said()
            if again.done == 0:
                raise UsageError("nothing is taken over")
        finally:
            again.close()

    def signed(data: bytes) -> bytes:
        return hashlib.sha256(data[32:]).digest() + data[32:]

    def inside(data: bytes, random: Random) -> bytes:
        """A change in what MessagePack holds, packed again."""
        try:
            found = msgspec.msgpack.decode(data[32:])
            rows = found[1]
            at = random.randrange(len(rows))
            row = list(rows[at])
            if random.random() < 0.5:
                facts, arrays = msgspec.msgpack.decode(row[3])
                name = random.choice(list(arrays))
                entry = list(arrays[name])
                entry[random.randrange(3)] = random.choice(
                    ("<f8", "|O", "<U3", "xyz", "<f8,<i4", "V0", [4, 2], [2**40, 2**40], [-1, 2], [0], b"", b"\x00" * 64, 7)
                )
                row[3] = msgspec.msgpack.encode((facts, {**arrays, name: entry}))
            else:
                row[random.randrange(4)] = random.choice((0, -1, 3, 8, 9, 2**63, b"", "x", None, 1.5))
            rows[at] = row
            return signed(data[:32] + msgspec.msgpack.encode(found))
        except (msgspec.MsgspecError, ValueError, TypeError, IndexError, OverflowError):
            return data

    return Prepared([seed], read, (inside, inside, *(mutate.then(each, signed) for each in mutate.BYTES)))


def lesson(folder: Path) -> Prepared:
    """The state that learn --resume goes on from: read, and taken up by a lesson of two connections."""
    from types import SimpleNamespace

    import numpy as np
    from safetensors.numpy import save

    from toolchain import lesson as lessons

    first: dict[str, Any] = {"hidden.weight": np.ones((3, 2), np.int8), "readout.weight": np.ones((2, 3), np.float64)}
    lines = tuple(lessons.Epoch(epoch, 2 * epoch, 0.5, 0.7 if epoch else None) for epoch in (0, 1))
    begun = lessons.Begun(lessons.FORMAT, {"model": "net", "lr": 0.5}, 3, lines, (dict.fromkeys(lessons.SEEN, 0.5),), 1.5)
    seed = save(first, {"lesson": msgspec.json.encode(begun).decode()})
    file = folder / "lesson.safetensors"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        under_way: Any = lessons.Lesson.__new__(lessons.Lesson)
        bounds = {"hidden.weight": (-128, 127), "readout.weight": None}
        under_way.__dict__.update(
            _began=0.0,
            plastics=[SimpleNamespace(tensor=name, bounds=bounds[name]) for name in first],
            done=lessons.Done(0, first),
            each=2,
            last=4,
        )
        found, tensors = lessons._begun_in(file, 2**20)
        lessons._require_same(found.terms, begun.terms, folder)
        under_way.restore(found, tensors, file)
        for line in (*under_way.curve, *((under_way._line(2, 0.5),) if found.seen else ())):
            lessons.sentence(line)

    return Prepared([seed], read, (mutate.tensor_bytes, mutate.tensor_header, *(mutate.metadata("lesson"),) * 3))


def names(folder: Path) -> Prepared:
    """MODEL as somebody may write it: a name, a path, or neither."""
    from toolchain import source

    (folder / "empty").mkdir()
    (folder / "empty.fsnn").touch()
    (folder / "text.safetensors").write_text("text")
    os.chdir(folder)

    def read(data: bytes) -> None:
        source.find(data.decode("utf-8", "surrogateescape"))

    return Prepared(
        [b"digits-fc", b"mnist-fc"],
        read,
        (
            mutate.chosen(
                [
                    w.encode("utf-8", "surrogatepass")
                    for w in (*mutate.WORDS, "empty", "empty.fsnn", "text.safetensors", ".", "/dev/null", "x" * 5000)
                ]
            ),
        ),
    )


# ---- drawn by hypothesis

LITTLE = st.integers(0, 9)
COUNT = st.one_of(LITTLE, LITTLE, st.sampled_from([-1, 2**31, 10**12, 2**63, 2**64]))
NUMBER = st.one_of(st.floats(0, 2), st.floats(), st.sampled_from([0, 1, -1, 1e30, 1e-30, 1e300]))
SIDES = st.one_of(COUNT, st.lists(COUNT, min_size=1, max_size=3))


def _part(kind: str, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"type": st.just(kind)}, optional=fields)


LIMIT = st.one_of(st.none(), _part("spectral", norm=NUMBER), _part("frobenius", norm=NUMBER))
CONVOLUTION: dict[str, st.SearchStrategy[Any]] = {
    "inputs": COUNT,
    "outputs": COUNT,
    "kernel": SIDES,
    "stride": SIDES,
    "padding": SIDES,
    "bias": st.booleans(),
    "limit": LIMIT,
    "groups": COUNT,
    "dilation": SIDES,
}
PART = st.one_of(
    _part("linear", inputs=COUNT, outputs=COUNT, bias=st.booleans(), standardized=st.booleans(), limit=LIMIT),
    _part("conv2d", **CONVOLUTION, standardized=st.booleans()),
    _part("conv-transpose2d", **CONVOLUTION, output_padding=SIDES),
    _part("avg-pool2d", kernel=COUNT, stride=COUNT, padding=COUNT),
    _part("adaptive-avg-pool2d", size=COUNT),
    _part("upsample", factor=COUNT),
    _part("scale", factor=NUMBER),
    _part("gain", start=NUMBER),
    _part("identity"),
    _part("batch-norm", features=COUNT, images=st.booleans(), eps=NUMBER, momentum=NUMBER),
)
CONNECTION = st.one_of(PART, st.fixed_dictionaries({"type": st.just("chain"), "parts": st.lists(PART, max_size=3)}))
LOOP = st.fixed_dictionaries({"source": LITTLE, "target": LITTLE, "connection": CONNECTION})


def fitting() -> st.SearchStrategy[dict[str, Any]]:
    """Networks whose connections fit, so that what is behind the check of shapes is reached: widths drawn, then joined."""

    @st.composite
    def draw(draw: Callable[..., Any]) -> dict[str, Any]:
        widths = draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))

        def linear(a: int, b: int) -> dict[str, Any]:
            return {
                "type": "linear",
                "inputs": widths[a],
                "outputs": widths[b],
                **draw(st.fixed_dictionaries({}, optional={"bias": st.booleans(), "limit": LIMIT, "standardized": st.booleans()})),
            }

        layers = len(widths) - 1
        ends = draw(st.lists(st.tuples(st.integers(0, layers - 1), st.integers(0, layers - 1)), max_size=3))
        return {
            "name": draw(st.text(max_size=5)),
            "input_shape": [widths[0]],
            "input": linear(0, 1),
            "hidden": [linear(i, i + 1) for i in range(1, layers)],
            "readout": {"type": "linear", "inputs": widths[-1], "outputs": draw(COUNT)},
            "feedback": [{"source": a, "target": b, "connection": linear(a + 1, b + 1)} for a, b in ends],
            **draw(
                st.fixed_dictionaries(
                    {},
                    optional={
                        "neuron": st.fixed_dictionaries(
                            {}, optional=dict.fromkeys(("threshold", "u_rest", "threshold_back", "leak"), NUMBER)
                        ),
                        "time_steps": COUNT,
                        "scale_factor": NUMBER,
                        "dropout": NUMBER,
                        "relays": st.lists(LITTLE, max_size=2),
                        "normalize": st.fixed_dictionaries({"mean": st.lists(NUMBER, max_size=2), "std": st.lists(NUMBER, max_size=2)}),
                        "dropout_of": st.dictionaries(st.sampled_from(["input", "hidden.0", "x", ""]), NUMBER, max_size=2),
                        "trained_threshold": st.fixed_dictionaries(
                            {}, optional=dict.fromkeys(("threshold", "alpha", "bound", "tau", "dt"), NUMBER)
                        ),
                    },
                )
            ),
        }

    return draw()


def written_configs() -> st.SearchStrategy[bytes]:
    """Configs as YAML: networks of all parts, most of which do not fit together, and some that do."""
    loose = st.fixed_dictionaries(
        {
            "name": st.text(max_size=8),
            "input_shape": st.lists(COUNT, max_size=4),
            "input": CONNECTION,
            "readout": st.one_of(st.none(), CONNECTION),
        },
        optional={
            "hidden": st.lists(CONNECTION, max_size=3),
            "feedback": st.lists(LOOP, max_size=2),
            "skips": st.lists(LOOP, max_size=2),
            "relays": st.lists(LITTLE),
        },
    )
    training = st.fixed_dictionaries(
        {},
        optional={
            "lr": NUMBER,
            "epochs": COUNT,
            "batch": COUNT,
            "milestones": st.lists(COUNT, max_size=2),
            "scale_factor": st.one_of(st.none(), st.just("auto"), NUMBER),
            "options": st.dictionaries(st.sampled_from(["solver", "loss_lambda", "x"]), st.one_of(NUMBER, st.text(max_size=3)), max_size=2),
        },
    )
    whole = st.fixed_dictionaries(
        {"network": st.one_of(loose, fitting(), fitting())},
        optional={
            "train": training,
            "seed": COUNT,
            "method": st.sampled_from(["ide", "spide", "dsr", "ottt-a", "x"]),
            "model": st.text(max_size=3),
        },
    )
    return whole.map(lambda found: json.dumps(found).encode())


TARGETS = (
    Target("checkpoint", checkpoint, share=3),
    Target("last", last, share=3),
    Target("metrics", lines, share=1),
    Target("config", configuration, share=3),
    Target("settings", settings, share=2),
    Target("answers", answers, share=1),
    Target("lesson", lesson, share=1),
    Target("names", names, share=1),
)
