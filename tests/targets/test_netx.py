"""netx files: lava-dl's own reader finds our weights in them, Lava runs them as a hard-reset simulation of this file does, and what they cannot carry is refused."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import toolchain
from toolchain import cli, data, fixed
from toolchain.compiler import forward_only, uncompiled
from toolchain.errors import DesignRuleError, GraphError, UsageError
from toolchain.exchange import lava_dl, netx
from toolchain.ir import Array, AvgPool2d, Conv2d, Dense, Graph, Provenance, Scale, Synapse, Units, Upsample, frozen
from toolchain.ir import Population as Neurons
from toolchain.layers import FeedbackSNN, Neuron, Normalize
from toolchain.passes import Retime
from toolchain.source import Source, find
from toolchain.target import get

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "exchange.md").read_text().partition("## A netx file")[2].partition("\n## ")[0]
lava = pytest.mark.skipif(lava_dl.missing() is not None, reason=str(lava_dl.missing()))


def network(kind: str) -> FeedbackSNN:
    """Small networks whose neurons fire at some steps and not at others: leaking and not, threshold and reset equal and not."""
    torch.manual_seed(3)
    soft = Neuron(threshold=1.0, u_rest=-1.0, threshold_back=0.5, u_rest_back=-0.5, leak=1.0)
    leaky = Neuron(threshold=1.0, u_rest=0.0, threshold_back=0.5, u_rest_back=-0.5, leak=0.9)
    common: dict[str, Any] = {"name": kind, "time_steps": 7, "feedback_steps": 9, "scale_factor": 5.0}
    if kind == "dense":
        net = FeedbackSNN(
            input_shape=(12,), input=nn.Linear(12, 9), hidden=[nn.Linear(9, 8)], readout=nn.Linear(8, 4), neuron=leaky, **common
        )
    elif kind == "dense_rec":
        loop = [(0, 0, nn.Linear(9, 9, bias=False))]
        net = FeedbackSNN(input_shape=(1, 3, 4), input=nn.Linear(12, 9), feedback=loop, readout=nn.Linear(9, 4), neuron=soft, **common)
    else:
        channels = 2 if kind == "events" else 3
        norm = None if kind == "events" else Normalize(mean=0.4, std=0.5)
        first, pool, second = nn.Conv2d(channels, 3, (3, 2), (1, 1), (1, 1)), nn.AvgPool2d(2), nn.Conv2d(3, 4, 3, 1, 1)
        layers: dict[str, Any] = {"input": first, "hidden": [pool, second, nn.Linear(4 * 3 * 2, 6)], "readout": nn.Linear(6, 4)}
        net = FeedbackSNN(input_shape=(channels, 6, 3), **layers, neuron=soft, normalize=norm, **common)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight.mul_(4.0 if name.startswith("hidden") else 2.5 if name.startswith("input") else 1.0)
            if name.endswith("bias"):
                weight.abs_()
    return net.eval()


def written(model: Any, folder: Path) -> tuple[netx.Chain, Path]:
    made = netx.chain(model if isinstance(model, Source) else find(model))
    path = folder / "network.net"
    path.write_bytes(netx.encoded(made))
    return made, path


def images_for(made: netx.Chain, samples: int = 4) -> Array:
    """Distinct samples but for the last, which is the first again: whatever a sample leaves behind would show."""
    frames = (made.time_steps,) if made.events else ()
    drawn = np.random.default_rng(5).random((samples, *made.input_shape, *frames)).astype(np.float32)
    drawn[-1] = drawn[0]
    return drawn


# a simulation of LIF neurons with hard reset, written from the file alone


def layers_of(path: Path) -> tuple[int, list[dict[str, Any]]]:
    import h5py

    layers: list[dict[str, Any]] = []
    with h5py.File(path) as file:
        for i in range(len(file["layer"])):
            group = file[f"layer/{i}"]
            layers.append({name: item[()] for name, item in group.items() if name != "neuron"})
            layers[-1] |= {name: item[()] for name, item in group["neuron"].items() if name != "type"} if "neuron" in group else {}
        return int(file.attrs["time_steps"]), layers


def simulated(path: Path, messages: Array, *, events: bool = False) -> tuple[list[Array], Array]:
    """Spikes (samples, time_steps, *shape) of every block that fires, and the last block's potentials, for whole messages (samples, *shape), events with time last."""
    steps, layers = layers_of(path)
    blocks = [layer for layer in layers if layer["type"] not in (b"input", b"flatten")]
    trains: list[list[Array]] = [[] for _ in blocks]
    potentials = [np.zeros((len(messages), *block["shape"]), np.int64) for block in blocks]
    before = [np.zeros_like(u) for u in potentials]
    for step in range(steps):
        sent = messages[..., step] if events else messages
        for i, block in enumerate(blocks):
            current = connected(block, sent)
            if "weight_rec" in block:
                current = current + before[i] @ block["weight_rec"].T.astype(np.int64)
            bias = block["bias"].astype(np.int64)
            kept = np.sign(potentials[i]) * (np.abs(potentials[i]) * (4096 - int(block["vDecay"])) >> 12)
            potentials[i] = np.clip(kept + 64 * (current + (bias.transpose(2, 1, 0) if bias.ndim == 3 else bias)), -(2**23) + 1, 2**23 - 1)
            assert np.abs(current).max() < 2**17  # Lava's current would wrap
            sent = (potentials[i] > 64 * int(block["vThMant"])).astype(np.int64)
            potentials[i][sent == 1] = 0
            before[i] = sent
            trains[i].append(sent)
    return [np.stack(train, axis=1) for train in trains[:-1]], potentials[-1]


def connected(block: dict[str, Any], sent: Array) -> Array:
    if block["type"] != b"conv":
        return np.asarray(sent.reshape(len(sent), -1) @ block["weight"].T.astype(np.int64))
    grid = {name: tuple(int(n) for n in block[name]) for name in ("stride", "padding", "dilation")}
    weight = torch.from_numpy(block["weight"].astype(np.float64))
    made = nn.functional.conv2d(torch.from_numpy(sent.astype(np.float64)), weight, groups=int(block["groups"]), **grid)  # type: ignore[call-overload]
    return np.asarray(made.numpy().round().astype(np.int64))


@lava
@pytest.mark.parametrize("kind", ["dense", "dense_rec", "conv", "events"])
def test_lava_runs_the_file_spike_for_spike_as_a_hard_reset_simulation(kind: str, tmp_path: Path) -> None:
    made, path = written(network(kind), tmp_path)
    images = images_for(made)
    messages = np.rint(images * made.levels).astype(np.int64)
    trains, potentials = simulated(path, messages, events=made.events)
    options: dict[str, Any] = {"time_steps": made.time_steps, "message_bits": made.message_bits, "events": made.events}
    assert made.events == (kind == "events")
    assert made.events or kind in [block.type for block in made.blocks]
    for number in sorted({1, len(trains)}):
        train = trains[number - 1]
        with lava_dl.Reading(path, blocks=number, **options) as reading:
            found = np.stack(list(reading.samples(made.frames(images))))
        found = np.moveaxis(found, (2, 4), (4, 2)) if found.ndim == 5 else found  # lava-dl's order is width, height, channels
        assert 0 < train.mean() < 1
        np.testing.assert_array_equal(found, train)
    with lava_dl.Reading(path, **options) as reading:
        first = np.stack(list(reading.samples(made.frames(images))))
        np.testing.assert_array_equal(first, potentials)
        again = np.stack(list(reading.samples(made.frames(images[::-1]))))
    np.testing.assert_array_equal(again, potentials[::-1])


@lava
@pytest.mark.parametrize("kind", ["dense", "dense_rec", "conv", "events"])
def test_calibrated_populations_fire_nearly_as_often_as_in_the_exact_graph(kind: str, tmp_path: Path) -> None:
    made = netx.chain(find(network(kind)))
    images = images_for(made, 40)
    with get("sim").compile(Retime()(forward_only(made.graph))) as run:
        exact = run.run(images).counts
    better = netx.calibrated(made, images, "drawn")
    assert "on 40 training samples of drawn" in better.lost[0]
    path = tmp_path / "network.net"
    apart = []
    for tried in (made, better):
        path.write_bytes(netx.encoded(tried))
        trains, _ = simulated(path, np.rint(images * made.levels).astype(np.int64), events=made.events)
        wanted = [int(exact[block.population].sum()) for block in made.blocks[:-1]]
        apart.append([(count - int(train.sum())) / count for train, count in zip(trains, wanted, strict=True)])
    assert min(apart[1]) >= 0  # never more often; behind a pool spikes come in few sizes, and the next lower threshold would be too low
    assert sum(apart[1]) < np.abs(apart[0]).sum()
    assert [block.threshold for block in better.blocks] != [block.threshold for block in made.blocks]


@lava
@pytest.mark.parametrize("name", ["digits-fc", "mnist-dsr"])
def test_lava_dl_reads_our_weights(name: str, tmp_path: Path) -> None:
    made, path = written(find(name), tmp_path)
    with lava_dl.Reading(path, time_steps=made.time_steps, message_bits=made.message_bits) as reading:
        layers = reading.network.layers
    phase = made.graph.phase("forward")
    assert [type(layer).__name__ for layer in layers] == [{"dense_rec": "RecurrentDense", "dense": "Dense"}[b.type] for b in made.blocks]
    for block, layer in zip(made.blocks, layers, strict=True):
        assert int(layer.neuron.vth.init) == block.threshold
        for loop, process in ((False, layer.synapse), (True, getattr(layer, "synapse_rec", None))):
            if process is None:
                continue
            read = np.ldexp(process.weights.init.astype(np.float64), process.proc_params["weight_exp"])
            (op,) = (s.ops[0] for s in phase.synapses if s.target == block.population and (s.source == s.target) == loop)
            assert isinstance(op, Dense)
            np.testing.assert_array_equal(
                read, np.rint(np.ldexp(made.graph.tensors[op.weight].astype(np.float64), op.exponent - block.exponent))
            )


@lava
def test_the_printed_accuracy_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "made" / "digits.net"
    words = [
        "export",
        "digits-fc",
        "--format",
        "netx",
        "--approximate",
        "--dataset",
        "digits",
        "--samples",
        "60",
        "-o",
        str(path),
        "--json",
    ]
    done = subprocess.run([sys.executable, "-m", "toolchain", *words], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    test = data.load("digits", samples=60)
    _, potentials = simulated(path, np.rint(test.images.reshape(60, -1) * told["input_levels"]).astype(np.int64))
    exact = toolchain.deploy("digits-fc", target="sim", dataset="digits", samples=60)
    answers = potentials.argmax(axis=1)
    assert told["correct"] == (answers == test.labels).sum() == round(told["accuracy"] * 60)
    assert (told["exact_correct"], told["exact_accuracy"]) == (exact.correct, exact.accuracy)
    assert told["agreement"] == (answers == exact.predictions).mean()
    assert told["accuracy"] > 0.8
    assert told["approximation"] == "hard-reset approximation"
    assert any("reset by subtraction" in sentence for sentence in told["lost"])
    assert any("feedback phase" in sentence for sentence in told["lost"])
    assert [entry.name for entry in path.parent.iterdir()] == ["digits.net"]


@lava
def test_the_same_bytes_whenever_it_is_written() -> None:
    made = netx.chain(find(network("conv")))
    first = netx.encoded(made)
    time.sleep(1.1)  # HDF5 keeps whole seconds where it keeps times
    assert netx.encoded(made) == first


@lava
def test_an_artefact_gives_the_file_of_its_model(tmp_path: Path) -> None:
    toolchain.compile("digits-fc", output=tmp_path / "digits.fsnn")
    made, compiled = netx.chain(find("digits-fc")), netx.chain(find(tmp_path / "digits.fsnn"))
    assert netx.encoded(compiled) == netx.encoded(made)
    toolchain.compile("digits-fc", weight_bits=4, output=tmp_path / "small.fsnn")
    small = netx.chain(find(tmp_path / "small.fsnn"))
    assert max(np.abs(block.weight).max() for block in small.blocks) <= 8
    toolchain.compile("digits-fc", float_tensors=False, output=tmp_path / "bare.fsnn")
    with pytest.raises(UsageError, match="--no-float"):
        netx.chain(find(tmp_path / "bare.fsnn"))


def test_without_approximate_nothing_is_written_and_what_would_be_lost_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"--approximate to write a hard-reset approximation, which loses(.|\n)*reset by subtraction(.|\n)*the feedback phase",
    ):
        toolchain.export("digits-fc", format="netx", output=tmp_path / "digits.net")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "pickle"}, "netx, nir, onnx"),
        ({"output": "."}, "no file name"),
    ],
)
def test_bad_options_are_refused(options: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=said):
        toolchain.export("digits-fc", **{"format": "netx", "output": "digits.net", "approximate": True, **options})
    assert not list(tmp_path.iterdir())


def test_the_model_itself_is_not_overwritten(tmp_path: Path) -> None:
    own = tmp_path / "own.fsnn"
    toolchain.compile("digits-fc", target="sim", output=own)
    before = own.read_bytes()
    with pytest.raises(UsageError, match="belongs to the model itself: write the export to another file"):
        toolchain.export(own, format="netx", approximate=True, output=own, dataset="digits")
    assert own.read_bytes() == before


def test_other_samples_are_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lava_dl, "missing", lambda: None)
    with pytest.raises(UsageError, match="64 values"):
        toolchain.export("digits-fc", format="netx", output=tmp_path / "digits.net", approximate=True, dataset="mnist-1k")
    assert not list(tmp_path.iterdir())


def test_a_missing_lava_dl_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lava_dl, "missing", lambda: "lava-dl is not installed: run pip install lava-dl==0.6.0")
    with pytest.raises(UsageError, match="pip install lava-dl"):
        toolchain.export("digits-fc", format="netx", output=tmp_path / "digits.net", approximate=True, dataset="digits")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mnist-fc2", "feedback connection 'hidden2' -> 'hidden1' leads back over 1 layer,"),
        ("convnet-f", "feedback connection 'hidden3' -> 'hidden1' leads back over 2 layers.*has a transposed convolution"),
        ("mnist-conv", "feedback connection 'hidden1' -> 'hidden1' is not dense"),
        ("vgg-f", "starts at step 1.*has an upsampling"),
        ("preactresnet-18", "population 'hidden1' is a graded relay.*and 10 more"),
    ],
)
def test_what_netx_cannot_carry_is_refused_by_name(name: str, said: str) -> None:
    with pytest.raises(DesignRuleError, match=f"'{name}' cannot be written as netx: .*{said}.*--target lava-sim"):
        netx.chain(uncompiled(name)[0])


def test_two_loops_and_a_skip_are_refused() -> None:
    loops = [(i, i, nn.Linear(5, 5, bias=False)) for i in (0, 1)]
    twice = FeedbackSNN(
        name="twice", input_shape=(4,), input=nn.Linear(4, 5), hidden=[nn.Linear(5, 5)], feedback=loops, readout=nn.Linear(5, 2)
    )
    with pytest.raises(DesignRuleError, match=r"'hidden1' -> 'hidden1' is one of 2.*'hidden2' -> 'hidden2' is one of 2"):
        netx.chain(find(twice))


@pytest.mark.parametrize(("words", "code"), [("mnist-fc2 --approximate", 3), ("digits-fc", 2)])
def test_exit_codes(words: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["toolchain", "export", *words.split(), "--format", "netx", "-o", str(tmp_path / "x.net")])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (code, "")
    assert err.startswith("toolchain: ")
    assert not list(tmp_path.iterdir())


@lava
def test_the_command_of_the_page_and_its_script_for_lava_dl_run(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (command,), (script,) = (re.findall(rf"```{kind}\n(.*?)```", PAGE, re.S) for kind in ("bash", "python"))
    for words in (["-m", *shlex.split(command)], ["-c", script]):
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
    assert re.search(r"^7 is 7$", done.stdout, re.M), done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["mnist-dsr.net"]


@lava
def test_the_page_names_the_attributes_of_a_file() -> None:
    import h5py

    made = netx.chain(find("digits-fc"))
    with h5py.File(io.BytesIO(netx.encoded(made))) as file:
        assert {f"`{name}`" for name in file.attrs} == set(
            re.findall("`[a-z_]+`", PAGE.partition("| attributes of the file | ")[2].partition("|")[0])
        )
        assert [sentence.decode() for sentence in file.attrs["lost"]] == list(made.lost)
        assert file.attrs["approximation"] == "hard-reset approximation"


# operations that become one block


def connection(ops: tuple[Any, ...], source: tuple[int, ...], target: tuple[int, ...], tensors: dict[str, Array]) -> tuple[Graph, Synapse]:
    populations = (Neurons("a", source, "couple"), Neurons("b", target, "couple"))
    graph = Graph(populations, (), tensors, Units("integer", {}), Provenance("test"))
    return graph, Synapse("a", "b", ops)


POOL = AvgPool2d((2, 2), (2, 2))


@pytest.mark.parametrize(
    ("ops", "target", "kernel"),
    [
        ((POOL, Conv2d("k", padding=(1, 1), exponent=3)), (4, 3, 4), (6, 6)),
        ((POOL, Conv2d("k", stride=(2, 1), dilation=(1, 2), padding=(1, 2))), (4, 2, 4), (6, 10)),
        ((Conv2d("k", padding=(1, 1)), POOL), (4, 3, 4), (4, 4)),
        ((Conv2d("k", stride=(1, 2)), AvgPool2d((2, 1), (1, 1))), (4, 3, 3), (4, 3)),
        ((Conv2d("grouped", groups=2), POOL), (4, 2, 3), (4, 4)),
        ((AvgPool2d((3, 2), (1, 2)), Conv2d("grouped", groups=2)), (4, 2, 2), (5, 6)),
        ((Scale(weight="s"), POOL), (2, 3, 4), (2, 2)),
        ((POOL, Dense("w")), (5,), None),
        ((POOL, Scale(exponent=2), Dense("w", exponent=1)), (5,), None),
        ((Scale(exponent=3), Conv2d("k", padding=(1, 1))), (4, 6, 8), (3, 3)),
        ((Dense("back", transpose=True),), (5,), None),
    ],
)
def test_pools_scales_and_weights_become_one_connection(
    ops: tuple[Any, ...], target: tuple[int, ...], kernel: tuple[int, int] | None
) -> None:
    draw = np.random.default_rng(1)
    shapes = {"k": (4, 2, 3, 3), "grouped": (4, 1, 3, 3), "s": (2,), "w": (5, 24), "back": (96, 5)}
    tensors = {name: frozen(draw.integers(-9, 10, shape)) for name, shape in shapes.items()}
    graph, synapse = connection(ops, (2, 6, 8), target, tensors)
    made = netx.joined(synapse, graph)
    values = draw.integers(0, 5, (3, 2, 6, 8))
    wanted = fixed.apply(ops, tensors, values, target, integer=True)
    if kernel is None:
        found = values.reshape(3, -1) @ made.weight.T
    else:
        assert made.grid is not None
        assert made.weight.shape[2:] == kernel
        found = fixed.convolve(values, made.weight, made.grid, target)
    np.testing.assert_array_equal(found << made.exponent, wanted.reshape(found.shape))


@pytest.mark.parametrize(
    ("ops", "target", "said"),
    [
        ((POOL, Conv2d("k", padding=(1, 1))), (4, 3, 3), "odd size"),
        ((Conv2d("k"), Conv2d("again")), (4, 2, 3), "two convolutions"),
        ((Upsample(2), Conv2d("k")), (4, 12, 12), "Upsample"),
    ],
)
def test_what_is_no_single_connection_is_refused(ops: tuple[Any, ...], target: tuple[int, ...], said: str) -> None:
    tensors = {"k": frozen(np.ones((4, 2, 3, 3), np.int64)), "again": frozen(np.ones((4, 4, 3, 3), np.int64))}
    graph, synapse = connection(ops, (2, 6, 7), target, tensors)
    with pytest.raises(GraphError, match=said):
        netx.joined(synapse, graph)
