"""ReLU networks from ONNX files: the same network in rates, at the thresholds said, and a sentence for whatever has no counterpart or is no honest file."""

from __future__ import annotations

import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import toolchain
from toolchain import cli, train
from toolchain.checkpoint import load
from toolchain.errors import ArtifactError, DesignRuleError, ToolchainError, UsageError
from toolchain.exchange import onnx_files, onnx_import, onnx_session
from toolchain.ir import Array
from toolchain.layers import FeedbackSNN, connections

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

Nodes = Sequence[Any]


def exported(net: nn.Module, path: Path, shape: tuple[int, ...], samples: int | None = None) -> Path:
    """`net` as torch.onnx.export writes it, for any number of samples or for just `samples`."""
    old: dict[str, Any] = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    dynamic = {} if samples else {"dynamic_axes": {"image": {0: "n"}, "scores": {0: "n"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch would rather have its newer exporter, which needs packages of its own
        torch.onnx.export(
            net.eval(), (torch.rand(samples or 2, *shape),), str(path), input_names=["image"], output_names=["scores"], **dynamic, **old
        )
    return path


def written(
    path: Path,
    nodes: Nodes,
    weights: dict[str, Array],
    *,
    shape: tuple[Any, ...] = ("n", 1, 8, 8),
    outputs: Sequence[str] = ("y",),
    inputs: Sequence[str] = ("x",),
    opset: int = 17,
) -> Path:
    """A file made by hand."""
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        list(nodes),
        "g",
        [onnx.helper.make_tensor_value_info(name, kind, list(shape)) for name in inputs],
        [onnx.helper.make_tensor_value_info(name, kind, ["n", "k"]) for name in outputs],
        [onnx.numpy_helper.from_array(np.asarray(values), name) for name, values in weights.items()],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.somebody", 1)], ir_version=8
    )
    path.write_bytes(model.SerializeToString())
    return path


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, inputs.split(), outputs.split(), name=f"{kind}-of-{outputs}", **attributes)


def matrix(out: int, into: int, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).normal(size=(out, into)) / np.sqrt(into)).astype(np.float32)


def scores_of(path: Path, images: Array) -> Array:
    session = onnx_session.opened(path.read_bytes(), "a test")
    return np.asarray(session.run(None, {session.get_inputs()[0].name: images})[0])


def in_rates(net: FeedbackSNN, images: Array) -> Array:
    """The network with clip(I / A, 0, 1) in place of its neurons: what firing rates come to in many time steps."""
    with torch.no_grad():
        values, _ = net.prepared(torch.from_numpy(images))
        rates: list[Tensor] = []
        for layer, arriving in enumerate(net.arriving()):
            shape = net.layer_shapes()[layer]
            currents = [connections.current(c.module, values if c.source is None else rates[c.source], c.name) for c in arriving]
            rates.append((sum(c.reshape(-1, *shape) for c in currents) / net.neuron.reset).clamp(0, 1))
        return net.logits(rates[-1]).numpy()


class Residual(nn.Module):
    """A stem, a block with an identity, a block with a strided skip, a mean over the image; normalised inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4, 4))
        self.c, self.d, self.skip = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(4, 6, 1, 2)
        self.norm, self.out = nn.BatchNorm2d(4), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - torch.tensor([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).reshape(1, 3, 1, 1)
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.relu(self.norm(self.a(x)))))
        x = torch.relu(self.skip(x) + self.d(torch.relu(self.c(x))))
        made: Tensor = self.out(x.mean((2, 3)).view(x.size(0), -1))
        return made


class Shortcut(nn.Module):
    """A residual block of four channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.b(torch.relu(self.a(x))))


class Upside(nn.Module):
    """A feature map that grows again, with groups and dilation, and a sum of a skip from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 4, 2, 1), nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)
        self.wide, self.ahead = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3), nn.Conv2d(3, 6, 1)
        self.norm, self.out = nn.BatchNorm2d(6), nn.Linear(6 * 12 * 12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.up(torch.relu(self.down(x)))))
        h = torch.relu(self.wide(h) + self.ahead(x))
        made: Tensor = self.out(nn.functional.interpolate(nn.functional.avg_pool2d(h, 4), scale_factor=4.0).flatten(1))
        return made


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    made: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "rows": (nn.Sequential(nn.Linear(12, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 5), nn.LogSoftmax(1)), (12,)),
        "two matrices": (nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4), nn.Linear(4, 5)), (3, 4)),
        "norm ahead": (nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 9), nn.ReLU(), nn.BatchNorm1d(9), nn.Linear(9, 5)), (12,)),
        "images": (
            nn.Sequential(
                nn.BatchNorm2d(3),
                nn.Conv2d(3, 4, (3, 2), (1, 2), (1, 0), bias=False),
                nn.BatchNorm2d(4),
                nn.ReLU6(),
                nn.AvgPool2d(2, 1, 1),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(4, 5),
            ),
            (3, 6, 6),
        ),
        "ends in a ReLU": (nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 5), nn.ReLU()), (3, 6, 6)),
        "residual": (Residual(), (3, 8, 8)),
        "upside": (Upside(), (3, 12, 12)),
    }
    for net, _ in made.values():
        for part in net.modules():
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
                assert part.running_mean is not None
                assert part.running_var is not None
                for values, low, high in (
                    (part.weight, -1.5, 1.5),
                    (part.bias, -0.5, 0.5),
                    (part.running_mean, -0.5, 0.5),
                    (part.running_var, 0.2, 2),
                ):
                    nn.init.uniform_(values, low, high)
    return made


NETWORKS = networks()


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_in_rates_the_network_is_the_file(name: str, samples: int | None, tmp_path: Path) -> None:
    """Without calibration no activation reaches rate 1, so that nothing is cut; with neurons that follow their rate at once the class scores are the file's."""
    net, shape = NETWORKS[name]
    path = exported(net, tmp_path / "net.onnx", shape, samples)
    made: Any = toolchain.import_(path)
    images = np.random.default_rng(1).random((3, *shape), dtype=np.float32)
    wanted, found = scores_of(path, images), in_rates(made.module, images)
    if name == "rows":
        assert "LogSoftmax" in made.changes[-1]
        wanted, found = (values - values.mean(1, keepdims=True) for values in (wanted, found))
    assert np.ptp(wanted) > 0.01
    np.testing.assert_allclose(found, wanted, atol=2e-5 * max(1.0, float(np.abs(wanted).max())), rtol=1e-4)


def test_a_first_layers_rates_are_its_activations_rounded(tmp_path: Path) -> None:
    """An activation a of a layer with rate 1 for L: its couple fires within half a spike of T a / L."""
    net, shape = NETWORKS["residual"]
    made: Any = toolchain.import_(exported(net, tmp_path / "net.onnx", shape), time_steps=50)
    images = np.random.default_rng(1).random((4, *shape), dtype=np.float32)
    with torch.no_grad():
        counts = made.module.equilibrium(torch.from_numpy(images)).counts[0].numpy()
        stem = net.stem  # type: ignore[operator,union-attr]  # a Residual
        x = (torch.from_numpy(images) - torch.tensor([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).reshape(
            1, 3, 1, 1
        )
        wanted = torch.relu(stem(x)).numpy() / made.layers[0]["largest"]  # type: ignore[operator]  # a module
    assert made.module.normalize is not None
    assert counts.max() > 5
    assert np.abs(counts - 50 * wanted).max() <= 0.5 + 1e-3


def trained(folder: Path) -> Path:
    """A ReLU network that knows digits."""
    torch.manual_seed(0)
    digits = toolchain.data.load("digits", split="train")
    images, labels = torch.from_numpy(np.asarray(digits.images[:])), torch.from_numpy(np.asarray(digits.labels))
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 32), nn.ReLU6(), nn.Linear(32, 10)
    )
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(12):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    return exported(net, folder / "digits.onnx", (1, 8, 8))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("relu"))


def test_a_network_is_measured_beside_its_file(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["import", str(digits), "--calibrate", "digits", "--dataset", "digits", "-o", str(tmp_path / "run")]
    for extra in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["toolchain", *words[: None if not extra else -2], *extra])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code
    text, _, record = capsys.readouterr().out.partition("\n{")
    assert "8x8x8 of" in text
    assert f"wrote {tmp_path / 'run'}: compile, deploy and train take it" in text
    found = json.loads("{" + record)
    assert found["measured"]["relu_accuracy"] > 0.85
    assert found["measured"]["torch_agreement"] > 0.97
    assert found["measured"]["sim_agreement"] > 0.97
    assert [layer["shape"] for layer in found["layers"]] == [[8, 8, 8], [32]]
    assert found["layers"][1]["largest"] <= 6
    assert (found["calibration"], found["calibration_samples"], found["time_steps"]) == ("digits", 256, 30)
    assert found["output"] is None
    deployed = toolchain.deploy(tmp_path / "run", target="sim", dataset="digits")
    assert deployed.accuracy == found["measured"]["sim_accuracy"]


def test_training_starts_from_an_imported_network(digits: Path, tmp_path: Path) -> None:
    """Its feedback connection is silent until it is trained."""
    plain: Any = toolchain.import_(digits, calibrate="digits", output=tmp_path / "plain")
    looped: Any = toolchain.import_(digits, calibrate="digits", feedback=True, output=tmp_path / "looped")
    assert looped.module.loops == ((1, 0),)
    assert looped.parameters == plain.parameters + 32 * 512
    few = {"dataset": "digits", "samples": 60}
    runs = [toolchain.deploy(tmp_path / name, target="sim", **few) for name in ("plain", "looped")]
    np.testing.assert_array_equal(runs[0].logits, runs[1].logits)
    toolchain.compile(tmp_path / "looped", output=tmp_path / "looped.fsnn")
    settings = {"train.lr": 0.002, "network.time_steps": 10, "network.feedback_steps": 20}
    outcome = train(tmp_path / "looped", epochs=1, settings=settings, output=tmp_path / "tuned", device="cpu")
    assert outcome.held_out_accuracy is not None
    assert outcome.held_out_accuracy > 0.9
    weight = load(tmp_path / "tuned").feedback[0].weight
    assert isinstance(weight, Tensor)
    assert weight.abs().max() > 0
    with pytest.raises(UsageError, match="is not empty"):
        toolchain.import_(digits, output=tmp_path / "plain")


def test_training_a_residual_network_starts_by_a_method_that_knows_skips(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), Shortcut(), nn.Flatten(), nn.Linear(256, 10))
    made: Any = toolchain.import_(
        exported(net, tmp_path / "net.onnx", (1, 8, 8)), calibrate="digits", time_steps=5, output=tmp_path / "run"
    )
    assert made.module.shortcuts == ((0, 2),)
    assert train(tmp_path / "run", epochs=1, output=tmp_path / "tuned", device="cpu").method == "ide"


def test_images_normalised_outside_the_file(tmp_path: Path) -> None:
    path = exported(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), tmp_path / "net.onnx", (1, 8, 8))
    made: Any = toolchain.import_(path, normalize="0.3/0.35")
    images = np.random.default_rng(2).random((3, 1, 8, 8), dtype=np.float32)
    np.testing.assert_allclose(in_rates(made.module, images), scores_of(path, (images - np.float32(0.3)) / np.float32(0.35)), atol=1e-5)
    for text in ("0.3", "0.3/0", "a/b", "0.3/0.35,0.3", "nan/1", "/", "0.1/-1"):
        with pytest.raises(UsageError, match="normalize"):
            toolchain.import_(path, normalize=text)


def test_layers_of_silent_neurons_and_a_clip_below_what_is_seen(tmp_path: Path) -> None:
    weights = {
        "a": matrix(6, 64),
        "b": -np.ones(6, np.float32) * 99,
        "c": matrix(10, 6, 1),
        "low": np.float32(0),
        "top": np.float32(0.5),
        "d": np.full(10, 9, np.float32),
    }
    nodes = [
        node("Flatten", "x", "f"),
        node("Gemm", "f a b", "g", transB=1),
        node("Relu", "g", "r"),
        node("Gemm", "r c d", "h", transB=1),
        node("Clip", "h low top", "y"),
    ]
    made: Any = toolchain.import_(written(tmp_path / "net.onnx", nodes, weights), calibrate="digits")
    assert [layer["largest"] for layer in made.layers] == [1.0, 0.5]


# files made by hand: what exporters of other libraries write


def hidden(*nodes: Any, weights: dict[str, Array] | None = None, **options: Any) -> Callable[[Path], Path]:
    """A network of one hidden layer of 6 with `nodes` between it ('r') and its readout, which takes 's'."""
    start = [node("Flatten", "x", "f"), node("Gemm", "f a b", "g", transB=1), node("Relu", "g", "r")]
    end = [node("Gemm", "s c", "y", transB=1)]
    own = {"a": matrix(6, 64), "b": np.zeros(6, np.float32), "c": matrix(10, 6, 1), **(weights or {})}
    return lambda path: written(path, [*start, *nodes, *end], own, **options)


def image(*nodes: Any, weights: dict[str, Array] | None = None, **options: Any) -> Callable[[Path], Path]:
    """`nodes` on the image 'x', of 1 x 8 x 8 unless said otherwise; they make 'y' of 'x', with 'w' a kernel of 3 x 3 and 'm' a matrix for 64 values."""
    kernel = np.random.default_rng(4).normal(size=(2, 1, 3, 3)).astype(np.float32)
    return lambda path: written(path, nodes, {"w": kernel, "m": matrix(10, 64, 2), **(weights or {})}, **options)


REST = (node("Relu", "c", "r"), node("Flatten", "r", "f"), node("Gemm", "f m", "y", transB=1))
WHOLE = np.array([0, -1], np.int64)

COUNTERPARTS = {
    "MatMul and Add, the constant first": image(
        node("Reshape", "x to", "f"),
        node("MatMul", "f a", "g"),
        node("Add", "b g", "h"),
        node("Relu", "h", "r"),
        node("Gemm", "r c", "y", alpha=0.5),
        weights={"to": WHOLE, "a": matrix(64, 6), "b": matrix(1, 6, 3)[0], "c": matrix(6, 10, 1)},
    ),
    "padding by name": image(
        node("Conv", "x w", "c", auto_pad="SAME_UPPER"),
        node("Relu", "c", "r"),
        node("GlobalAveragePool", "r", "p"),
        node("Squeeze", "p ax", "f"),
        node("MatMul", "f q", "y"),
        weights={"ax": np.array([2, 3]), "q": matrix(2, 10)},
    ),
    "an image made of rows": image(
        node("Reshape", "x to", "i"),
        node("Conv", "i w", "c", pads=[1, 1, 1, 1]),
        node("Relu", "c", "r"),
        node("Reshape", "r flat", "f"),
        node("Gemm", "f q", "y"),
        weights={"to": np.array([-1, 1, 8, 8]), "flat": WHOLE, "q": matrix(128, 10)},
        shape=("n", 64),
    ),
    "shapes computed from the input": image(
        node("Conv", "x w", "c"),
        node("Relu", "c", "r"),
        node("Shape", "x", "s"),
        node("Gather", "s zero", "n", axis=0),
        node("Unsqueeze", "n ax", "n1"),
        node("Concat", "n1 rest", "to", axis=0),
        node("Reshape", "r to", "f"),
        node("MatMul", "f q", "y"),
        weights={"zero": np.int64(0), "ax": np.array([0]), "rest": np.array([-1]), "q": matrix(72, 10)},
    ),
    "a difference, a product, a quotient": hidden(
        node("Sub", "one r", "u"),
        node("Mul", "u two", "v"),
        node("Div", "v two", "s"),
        weights={"one": np.float32(1), "two": np.full((1, 6), 2, np.float32)},
    ),
    "a sum of two branches before a matrix": hidden(
        node("Mul", "r two", "u"),
        node("Sub", "u r", "v"),
        node("Gemm", "v e", "w"),
        node("Relu", "w", "s"),
        weights={"two": np.float32(3), "e": matrix(6, 6)},
    ),
    "ReLU of ReLU": hidden(node("Relu", "r", "q"), node("Relu", "q", "s")),
    "an old Clip": lambda path: written(
        path,
        [
            node("Flatten", "x", "f"),
            node("Gemm", "f a b", "g", transB=1),
            node("Clip", "g", "r", min=0.0, max=0.7),
            node("Gemm", "r c b2", "y", transB=1),
        ],
        {"a": matrix(6, 64), "b": np.zeros(6, np.float32), "c": matrix(10, 6, 1), "b2": np.zeros(10, np.float32)},
        opset=9,
    ),
    "means over the image": image(
        node("Conv", "x w", "c"),
        node("Relu", "c", "r"),
        node("ReduceMean", "r", "f", axes=[-2, -1], keepdims=0),
        node("MatMul", "f q", "y"),
        weights={"q": matrix(2, 10)},
    ),
    "nodes that lead nowhere": hidden(node("Identity", "r", "s"), node("MaxPool", "x", "unused", kernel_shape=[2, 2])),
}


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_files_of_other_exporters(name: str, tmp_path: Path) -> None:
    path = COUNTERPARTS[name](tmp_path / "net.onnx")
    made: Any = toolchain.import_(path)
    images = np.random.default_rng(1).random((3, *made.module.input_shape), dtype=np.float32)
    wanted = scores_of(path, images.reshape(3, -1) if name == "an image made of rows" else images)
    assert np.ptp(wanted) > 0.01
    np.testing.assert_allclose(in_rates(made.module, images), wanted, atol=1e-5, rtol=1e-4)


REFUSED = {
    "MaxPool": (
        image(node("Conv", "x w", "k"), node("MaxPool", "k", "c", kernel_shape=[2, 2]), *REST),
        r"'MaxPool-of-c' \(MaxPool\) takes maxima.*AveragePool",
    ),
    "Sigmoid": (hidden(node("Sigmoid", "r", "s")), r"'Sigmoid-of-s' \(Sigmoid\) is no ReLU"),
    "several": (hidden(node("Tanh", "r", "t"), node("Exp", "t", "s")), r"Tanh-of-t(.|\n)*Exp-of-s"),
    "Clip from -1": (hidden(node("Clip", "r low", "s"), weights={"low": np.float32(-1)}), "begin at 0"),
    "two convolutions": (
        image(
            node("Conv", "x w", "k"),
            node("Conv", "k w2", "c"),
            *REST,
            weights={"w2": np.ones((1, 2, 1, 1), np.float32), "m": matrix(10, 36)},
        ),
        "have no ReLU between them",
    ),
    "Concat": (hidden(node("Concat", "r r", "s", axis=1), weights={"c": matrix(10, 12)}), "side by side"),
    "sizes left open": (image(node("Conv", "x w", "c"), *REST, shape=("n", 1, "h", 8)), r"\(n, 1, h, 8\): give all sizes"),
    "no first axis": (image(node("Relu", "x", "y"), shape=(64,)), "give all sizes"),
    "two outputs": (hidden(node("Identity", "r", "s"), outputs=("y", "s")), "the outputs 'y', 's'"),
    "two inputs": (hidden(node("Add", "r z", "s"), inputs=("x", "z")), "the inputs 'x', 'z'"),
    "pads on one side": (image(node("Conv", "x w", "c", pads=[0, 0, 1, 1]), *REST), "both sides"),
    "windows rounded up": (
        image(node("AveragePool", "x", "c", kernel_shape=[3, 3], strides=[3, 3], ceil_mode=1), *REST, weights={"m": matrix(10, 9)}),
        "ceil_mode",
    ),
    "means without the padding": (image(node("AveragePool", "x", "c", kernel_shape=[3, 3], pads=[1, 1, 1, 1]), *REST), "count_include_pad"),
    "channels last": (image(node("Transpose", "x", "t", perm=[0, 2, 3, 1]), node("Relu", "t", "c"), *REST), "channels first"),
    "no ReLU": (image(node("Flatten", "x", "f"), node("Gemm", "f m", "y", transB=1)), "has no ReLU"),
    "an operator of somebody": (hidden(node("Gelu", "r", "s", domain="com.somebody")), r"'Gelu-of-s'"),
    "a readout of two layers": (
        hidden(node("Gemm", "r e", "k"), node("Relu", "k", "q"), node("Add", "q r", "s"), weights={"e": matrix(6, 6)}),
        "from the last ReLU only",
    ),
    "a layer that reads another than the one before": (
        hidden(node("Gemm", "f a", "k", transB=1), node("Relu", "k", "q"), node("Add", "q r", "p"), node("Relu", "p", "s")),
        "a chain of layers",
    ),
    "values multiplied": (hidden(node("Mul", "r r", "s")), "with each other"),
    "a constant for every pixel": (
        image(node("Add", "x v", "k"), node("Relu", "k", "c"), *REST, weights={"v": np.ones((1, 1, 8, 8), np.float32)}),
        "one a channel",
    ),
    "a matrix that does not fit": (hidden(node("Identity", "r", "s"), weights={"c": matrix(10, 7)}), r"takes 7 values and gets \(6,\)"),
    "Softmax inside": (hidden(node("Softmax", "r", "s")), "inside the network"),
    "weights that are no numbers": (
        hidden(node("Identity", "r", "s"), weights={"a": np.full((6, 64), np.nan, np.float32)}),
        "correct the network's weights",
    ),
    "a loop": (
        hidden(
            node(
                "Loop",
                "many yes r",
                "s",
                body=onnx.helper.make_graph(
                    [onnx.helper.make_node("Identity", ["t"], ["u"]), onnx.helper.make_node("Identity", ["on"], ["go"])],
                    "b",
                    [
                        onnx.helper.make_tensor_value_info("i", 7, []),
                        onnx.helper.make_tensor_value_info("on", 9, []),
                        onnx.helper.make_tensor_value_info("t", 1, ["n", 6]),
                    ],
                    [onnx.helper.make_tensor_value_info("go", 9, []), onnx.helper.make_tensor_value_info("u", 1, ["n", 6])],
                ),
            ),
            weights={"many": np.int64(3), "yes": np.bool_(True)},
        ),
        r"'Loop-of-s' \(Loop\) has no counterpart",
    ),
    "complex constants": (hidden(node("Add", "r j", "s"), weights={"j": np.complex64(1j)}), "no real numbers"),
    "numbers of no type": (hidden(node("Cast", "r", "s", to=999)), "other numbers"),
    "a constant of no type": (hidden(node("Cast", "b", "t", to=999), node("Add", "r t", "s")), "settings that make no sense"),
    "five thousand samples at a time": (hidden(node("Identity", "r", "s"), shape=(5000, 1, 8, 8)), "takes 5,000 samples at a time"),
    "a sum that doubles": (hidden(*(node("Add", f"{a} {a}", b) for a, b in zip("rtuvw", "tuvws", strict=True))), "more than 16 branches"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_named(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    with pytest.raises(UsageError, match=message):
        toolchain.import_(make(tmp_path / "net.onnx"), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_network_that_is_refused_while_it_is_measured_leaves_no_folder(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise DesignRuleError("it does not fit")

    monkeypatch.setattr(onnx_import, "deploy", refused)
    with pytest.raises(DesignRuleError, match="it does not fit"):
        toolchain.import_(digits, calibrate="digits", dataset="digits", samples=3, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_a_run_is_refused_before_the_work(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    monkeypatch.setattr(onnx_session, "outputs", lambda *_, **__: pytest.fail("it began to work"))
    with pytest.raises(UsageError, match="exists and is not empty"):
        toolchain.import_(digits, calibrate="digits", dataset="digits", output=tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "mnist-1k"}, "choose another data set"),
        ({"calibrate": "mnist-1k"}, "test images only"),
        ({"samples": 5}, "give both"),
        ({"time_steps": 0}, "time_steps 0"),
        ({"reset": "subtract"}, "--reset would not be used for onnx files"),
        ({"format": "netx"}, "nir, onnx"),
        ({"format": "nir"}, "which NIR files are"),
        ({"output": "self"}, "is the file that is read"),
    ],
)
def test_options_that_do_not_fit_are_explained(digits: Path, options: dict[str, Any], message: str) -> None:
    given = {**options, **({"output": digits} if options.get("output") == "self" else {})}
    with pytest.raises(ToolchainError, match=message):
        toolchain.import_(digits, **given)


def test_feedback_that_would_be_too_large_is_refused(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "c"),
        node("Relu", "c", "r"),
        node("Conv", "r v", "d"),
        node("Relu", "d", "q"),
        node("Flatten", "q", "f"),
        node("Gemm", "f m", "y"),
    ]
    weights = {
        "w": np.ones((4, 1, 1, 1), np.float32),
        "v": np.ones((4, 4, 1, 1), np.float32),
        "m": np.ones((4 * 1600, 2), np.float32) / 100,
    }
    path = written(tmp_path / "net.onnx", nodes, weights, shape=("n", 1, 40, 40))
    with pytest.raises(UsageError, match="40,960,000 weights"):
        toolchain.import_(path, feedback=True)


def test_our_own_exports_say_where_to_go(tmp_path: Path) -> None:
    toolchain.export("digits-fc", format="onnx", output=tmp_path / "own.onnx", dataset="digits", samples=5)
    with pytest.raises(UsageError, match="export it with --format nir"):
        toolchain.import_(tmp_path / "own.onnx")


# files that are not honest


def whole(path: Path) -> Any:
    return onnx.load(COUNTERPARTS["ReLU of ReLU"](path))


def external(model: Any, **entries: str) -> Any:
    """The first weight moved to another file."""
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return model


@pytest.mark.parametrize("length", [{"length": "1536"}, {}])  # ONNX leaves it out where the rest of the file is meant
def test_weights_beside_the_file_are_read(tmp_path: Path, length: dict[str, str]) -> None:
    model = whole(tmp_path / "plain.onnx")
    values = model.graph.initializer[0].raw_data
    (tmp_path / "net.onnx.data").write_bytes(b"12345678" + values)
    (tmp_path / "net.onnx").write_bytes(external(model, location="net.onnx.data", offset="8", **length).SerializeToString())
    both: Any = [toolchain.import_(tmp_path / name) for name in ("net.onnx", "plain.onnx")]
    assert torch.equal(both[0].module.input.weight, both[1].module.input.weight)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../secret"}, "only 'net.onnx.data' is read"),
        ({"location": "/etc/passwd"}, "only 'net.onnx.data' is read"),
        ({"location": "other.data"}, "only 'net.onnx.data' is read"),
        ({}, "only 'net.onnx.data' is read"),
        ({"location": "net.onnx.data", "offset": "-8", "length": "1536"}, "should lie at byte -8"),
        ({"location": "net.onnx.data", "offset": "0", "length": "99999999999"}, "which has 2,000"),
        ({"location": "net.onnx.data", "offset": "0", "length": "16"}, "needs 1,536 bytes"),
        ({"location": "net.onnx.data", "offset": "many"}, "does not say where"),
        ({"location": "net.onnx.data"}, "needs 1,536 bytes and has 2,000"),
        ({"location": "net.onnx.data", "offset": "3000"}, "should lie at byte 3,000"),
        ({"location": "net.onnx.data", "length": "-1"}, "-1 bytes long"),
    ],
)
def test_weights_elsewhere_are_not_read(tmp_path: Path, entries: dict[str, str], message: str) -> None:
    model = external(whole(tmp_path / "net.onnx"), **entries)
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "net.onnx.data").write_bytes(bytes(2000))
    with pytest.raises(ArtifactError, match=message):
        toolchain.import_(tmp_path / "net.onnx")


@pytest.mark.parametrize("make", [lambda place: place.symlink_to("/etc/hostname"), lambda place: None, lambda place: place.mkdir()])
def test_weights_behind_a_link_are_not_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    model = external(whole(tmp_path / "net.onnx"), location="net.onnx.data", offset="0", length="4")
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    make(tmp_path / "net.onnx.data")
    with pytest.raises(ArtifactError, match=r"cannot be read|should lie"):
        toolchain.import_(tmp_path / "net.onnx")


def swollen(model: Any) -> None:
    model.graph.initializer[0].dims[0] = 2**40


def shrunk(model: Any) -> None:
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]


def negative(model: Any) -> None:
    model.graph.initializer[0].dims[0] = -6


def listed(model: Any) -> None:
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].float_data.extend([1.0, 2.0])


def strange(model: Any) -> None:
    model.graph.initializer[0].data_type = 999


def circular(model: Any) -> None:
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def wide(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2**50


def whole_numbers(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8


def filled(model: Any) -> None:
    """An array that a node would make of nothing."""
    shape = onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [1], [2**40])
    model.graph.initializer.append(shape)
    model.graph.node.insert(0, onnx.helper.make_node("ConstantOfShape", ["shape"], ["huge"], name="huge"))
    model.graph.node[-1].input.append("huge")


def many(model: Any) -> None:
    model.graph.node.extend([model.graph.node[0]] * (onnx_files.MOST_NODES + 1))


def referring(model: Any) -> None:
    """A setting that only a function's nodes can have."""
    made = onnx.helper.make_attribute("axis", 1)
    made.ref_attr_name = "somewhere"
    model.graph.node[-1].attribute.append(made)


def redefined(model: Any) -> None:
    """A file whose own Relu is another function."""
    body = [onnx.helper.make_node("Sigmoid", ["x"], ["y"])]
    model.functions.append(onnx.helper.make_function("", "Relu", ["x"], ["y"], body, [onnx.helper.make_opsetid("", 17)]))


@pytest.mark.parametrize(
    "spoil", [swollen, shrunk, negative, listed, strange, circular, wide, whole_numbers, filled, many, redefined, referring]
)
def test_dishonest_files_are_refused_in_a_sentence(tmp_path: Path, spoil: Callable[[Any], None]) -> None:
    model = whole(tmp_path / "net.onnx")
    spoil(model)
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UsageError) as told:
        toolchain.import_(tmp_path / "net.onnx", output=tmp_path / "run")
    assert "net.onnx" in str(told.value)
    assert not (tmp_path / "run").exists()


def test_a_file_that_unfolds_into_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bytes of an empty node are hundreds in memory, and this process does not look at them: a child with a bound does."""
    read, here = onnx_files._read, []
    monkeypatch.setattr(onnx_files, "_read", lambda content, path: [here.append(path), read(content, path)][1])
    monkeypatch.setattr(onnx_files, "ROOM", 2**24)
    (tmp_path / "net.onnx").write_bytes(b"\x08\x08" + b"\x3a" + bytes([0x80, 0x80, 0x20]) + b"\x0a\x00" * 2**18)
    with pytest.raises(ArtifactError, match=r"memory|fail|damaged|nodes"):
        toolchain.import_(tmp_path / "net.onnx")
    assert here == []


def test_a_crash_of_the_library_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole(tmp_path / "net.onnx")
    monkeypatch.setattr(onnx_files, "_read", lambda content, path: os.abort())
    with pytest.raises(ArtifactError, match="makes the ONNX library fail"):
        toolchain.import_(tmp_path / "net.onnx")


def test_weights_beside_the_file_of_more_than_a_file_holds_are_not_read(tmp_path: Path) -> None:
    model = external(whole(tmp_path / "net.onnx"), location="net.onnx.data")
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with (tmp_path / "net.onnx.data").open("wb") as stream:
        stream.truncate(2**40)  # it takes no room on the disk
    with pytest.raises(ArtifactError, match="more than 2 GiB"):
        toolchain.import_(tmp_path / "net.onnx")


def test_weights_that_are_signalling_nan_are_refused_without_a_warning(tmp_path: Path) -> None:
    model = whole(tmp_path / "net.onnx")
    values = bytearray(model.graph.initializer[0].raw_data)
    values[:4] = b"\x01\x00\xa0\x7f"
    model.graph.initializer[0].raw_data = bytes(values)
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match=r"nan|NaN"):
        toolchain.import_(tmp_path / "net.onnx")


def test_onnxruntime_sees_only_nodes_that_were_read(digits: Path, tmp_path: Path) -> None:
    """A node that the scores do not need could make it fill the memory."""
    model = onnx.load(digits)
    model.graph.initializer.append(onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [1], [2**40]))
    model.graph.node.append(onnx.helper.make_node("ConstantOfShape", ["shape"], ["huge"], name="huge"))
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    told = toolchain.import_(tmp_path / "net.onnx", calibrate="digits")
    assert told.to_json()["layers"] == toolchain.import_(digits, calibrate="digits").to_json()["layers"]


def test_a_file_that_runs_too_many_samples_together_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_import, "MOST_AT_ONCE", 100)
    path = exported(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)), tmp_path / "net.onnx", (1, 8, 8), samples=16
    )
    with pytest.raises(UsageError, match="runs 16 samples together, which have 128 activations"):
        toolchain.import_(path, calibrate="digits")


def test_damaged_files_end_in_a_sentence(tmp_path: Path) -> None:
    """Cut anywhere, or with bytes changed, a file is read or refused; nothing else happens."""
    path = COUNTERPARTS["a difference, a product, a quotient"](tmp_path / "net.onnx")
    content, random = path.read_bytes(), np.random.default_rng(0)
    spoiled = [b"", b"not a network", os.urandom(300), *(content[: int(n)] for n in random.integers(0, len(content), 15))]
    for _ in range(60):
        changed = bytearray(content)
        for place in random.integers(0, min(len(changed), 700) if random.random() < 0.7 else len(changed), int(random.integers(1, 4))):
            changed[place] = int(random.integers(256))
        spoiled.append(bytes(changed))
    refused = 0
    for part in spoiled:
        path.write_bytes(part)
        try:
            toolchain.import_(path)
        except ToolchainError:
            refused += 1
    assert refused > 25
