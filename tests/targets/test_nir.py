"""NIR files of ours: the same artefact and the same checkpoint come back, nirtorch runs them with the reference's spikes, other readers refuse them or are told and shown what they lose."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import toolchain
from toolchain import cli, codec, data, fixed
from toolchain.compiler import lowered
from toolchain.errors import ArtifactError, DesignRuleError, UsageError
from toolchain.layers import FeedbackSNN, Gain, Limited, Neuron, Normalize, Scale, Spectral, Standardized, TrainedThreshold
from toolchain.source import find
from toolchain.targets.reference import Reference

nir = pytest.importorskip("nir", reason="nir is not installed: pip install nir")
pytest.importorskip("nirtorch", reason="nirtorch is not installed: pip install nirtorch")
h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install h5py")

ROOT = Path(__file__).resolve().parents[2]


def network(kind: str) -> FeedbackSNN:
    """Small networks with all that NIR files have to carry."""
    torch.manual_seed(5)
    common = {"time_steps": 7, "feedback_steps": 5}
    if kind == "leaky":  # OTTT's: leaking neurons, a scale, standardised weights, a readout of plain counts
        return FeedbackSNN(
            name=kind,
            input_shape=(1, 6, 6),
            input=nn.Linear(36, 12),
            hidden=[nn.Sequential(Scale(2.74), Standardized(nn.Linear(12, 9)))],
            feedback=[(1, 0, nn.Linear(9, 12))],
            readout=nn.Linear(9, 4),
            neuron=Neuron(threshold=1.0, u_rest=0.0, leak=0.5),
            weighted_readout=False,
            normalize=Normalize(mean=0.2, std=0.4),
            **common,
        )
    if kind == "thresholds":  # DSR's: trained thresholds, spikes with an amplitude, no readout
        return FeedbackSNN(
            name=kind,
            input_shape=(20,),
            input=nn.Sequential(nn.Linear(20, 12), nn.BatchNorm1d(12)),
            hidden=[nn.Linear(12, 5)],
            readout=None,
            trained_threshold=TrainedThreshold(threshold=0.1, tau=1.0, dt=0.5),
            **common,
        )
    if (
        kind == "images"
    ):  # convolutions with groups, strides and padding behind normalisation, pools, a convolution that feeds its own layer
        return FeedbackSNN(
            name=kind,
            input_shape=(2, 8, 8),
            input=nn.Sequential(nn.Conv2d(2, 4, 3, 1, 1), nn.BatchNorm2d(4)),
            hidden=[nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 6, 3, 2, 1, groups=2)), nn.AvgPool2d(2)],
            feedback=[(0, 0, Limited(nn.Conv2d(4, 4, 3, 1, 1), Spectral(1.0))), (1, 1, nn.Conv2d(6, 6, 1))],
            readout=nn.Linear(6, 4),
            normalize=Normalize(mean=(0.1, 0.3), std=(0.5, 0.4)),
            **common,
        )
    return FeedbackSNN(  # relays: a residual stream
        name=kind,
        input_shape=(1, 6, 6),
        input=nn.Conv2d(1, 4, 3, 1, 1),
        hidden=[nn.Identity(), nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1, bias=False), Gain(0.5)), nn.Identity()],
        skips=[(0, 2, nn.Identity())],
        relays=(0, 2),
        readout=nn.Sequential(nn.AvgPool2d(2), nn.Linear(36, 4)),
        neuron=Neuron(threshold=0.5, u_rest=-0.5),
        **common,
    )


KINDS = ["leaky", "thresholds", "images", "relays"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of the small networks, as training leaves them."""
    from toolchain import checkpoint
    from toolchain.config import Config, Training
    from toolchain.layers import describe

    made = {}
    for kind in KINDS:
        module = network(kind).eval()
        with torch.no_grad():
            for buffer in module.buffers():
                if buffer.is_floating_point() and buffer.ndim == 1 and len(buffer) in (4, 12):
                    buffer.uniform_(0.5, 1.5)  # running statistics of batch normalisation
        folder = tmp_path_factory.mktemp(kind)
        dataset = "nmnist" if kind == "images" else "mnist"
        about = checkpoint.About(checkpoint.FORMAT, Config(describe(module), Training(dataset=dataset)), 3, 0.5)
        checkpoint.write(folder / checkpoint.NAME, module.state_dict(), about)
        made[kind] = folder
    return made


def inputs_of(graph, samples=3):
    population = graph.of_kind("input")[0]
    draw = np.random.default_rng(4)
    steps = (graph.phase("forward").time_steps,) * population.events
    return draw.integers(0, 17, (samples, *population.shape, *steps)) / 16


def require_identical(path, graph, inputs, *, exact):
    """Every spike of every step, and the potentials to the last bit in integers, else to rounding."""
    from toolchain.exchange import nir_torch

    made = nir_torch.run(nir_torch.load(path), inputs)
    with Reference(trace=True).compile(graph) as executable:
        expected = executable.run(inputs)
    for name, steps in expected.history.items():
        np.testing.assert_array_equal(made.spikes[name], steps.spikes, err_msg=name)
        np.testing.assert_allclose(made.potentials[name], steps.potentials, rtol=0, atol=0 if exact else 1e-9, err_msg=name)
    assert sum(counts.sum() for counts in made.counts.values()) != 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"timing": "pipelined", "float_tensors": False}, {"input": "graded", "weight_bits": 4}])
def test_an_artefact_comes_back_to_the_last_bit_and_runs_in_nirtorch(runs, tmp_path, kind, options):
    if kind == "relays":  # its skip runs ahead of the step in pipelined timing: see test_refusals
        options = options | {"timing": "exact"}
    artefact, file, back = tmp_path / "a.fsnn", tmp_path / "a.nir", tmp_path / "back.fsnn"
    graph = toolchain.compile(runs[kind], output=artefact, **options).graph
    written = toolchain.export(artefact, format="nir", output=file)
    assert written.kind == "artefact"
    assert any("reset by subtraction" in sentence for sentence in written.lost)
    toolchain.import_(file, output=back)
    assert back.read_bytes() == artefact.read_bytes()
    require_identical(file, graph, inputs_of(graph), exact=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_comes_back_and_compiles_to_the_same_bytes(runs, tmp_path, kind):
    file = tmp_path / "net.nir"
    toolchain.export(runs[kind], format="nir", output=file)
    toolchain.import_(file, output=tmp_path / "run")
    name = "checkpoint.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (runs[kind] / name).read_bytes()
    for folder, out in ((runs[kind], "a.fsnn"), (tmp_path / "run", "b.fsnn")):
        toolchain.compile(folder, output=tmp_path / out)
    assert (tmp_path / "a.fsnn").read_bytes() == (tmp_path / "b.fsnn").read_bytes()
    graph = lowered(find(runs[kind]))
    require_identical(file, graph, inputs_of(graph), exact=False)


def test_a_module_without_a_checkpoint_keeps_its_events(tmp_path):
    """Images of two channels are events where nobody says otherwise: in the file too."""
    module = FeedbackSNN(
        name="pairs", input_shape=(2, 4, 4), input=nn.Linear(32, 5), readout=nn.Linear(5, 3), time_steps=4, feedback_steps=2
    )
    graph = lowered(find(module))
    assert graph.of_kind("input")[0].events
    toolchain.export(module, format="nir", output=tmp_path / "n.nir")
    toolchain.import_(tmp_path / "n.nir", output=tmp_path / "run")
    assert lowered(find(tmp_path / "run")).of_kind("input")[0].events
    require_identical(tmp_path / "n.nir", graph, inputs_of(graph), exact=False)


@pytest.mark.parametrize("kind", KINDS)
def test_what_nir_reads_and_writes_again_is_still_the_same(runs, tmp_path, kind):
    toolchain.compile(runs[kind], output=tmp_path / "a.fsnn")
    for model, name in ((tmp_path / "a.fsnn", "artefact"), (runs[kind], "network")):
        toolchain.export(model, format="nir", output=tmp_path / f"{name}.nir")
        nir.write(tmp_path / f"{name}-again.nir", nir.read(tmp_path / f"{name}.nir"))
    toolchain.import_(tmp_path / "artefact-again.nir", output=tmp_path / "b.fsnn")
    assert (tmp_path / "b.fsnn").read_bytes() == (tmp_path / "a.fsnn").read_bytes()
    toolchain.import_(tmp_path / "network-again.nir", output=tmp_path / "run")
    name = "checkpoint.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (runs[kind] / name).read_bytes()


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("missing", r"nir is not installed: run pip install 'fsnn-toolchain\[nir\]'"),
        ("broken", r"nir is installed and does not load .*: run pip install --force-reinstall 'fsnn-toolchain\[nir\]'"),
    ],
)
def test_without_nir_one_sentence_says_how_to_get_it(monkeypatch, tmp_path, lacking, said):
    from toolchain.exchange import nir_torch, packages

    if lacking == "missing":
        monkeypatch.setattr(packages, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(packages, "find_spec", lambda name: name)
        monkeypatch.setitem(sys.modules, "nir", None)
    (tmp_path / "a.nir").write_bytes(b"")
    for ask in (
        lambda: toolchain.export("digits-fc", format="nir", output=tmp_path / "b.nir"),
        lambda: toolchain.export("digits-fc", format="nir", output=tmp_path / "b.nir", approximate=True, dataset="digits"),
        lambda: toolchain.import_(tmp_path / "a.nir"),
        lambda: nir_torch.load(tmp_path / "a.nir"),
    ):
        with pytest.raises(UsageError, match=said):
            ask()


@pytest.mark.parametrize(("model", "dataset"), [("digits-fc", "digits"), ("mnist-fc2", "mnist-1k")])
def test_networks_of_the_catalogue(tmp_path, model, dataset):
    images = np.asarray(data.load(dataset, samples=8).images[:])
    artefact, network_file, artefact_file = tmp_path / "a.fsnn", tmp_path / "n.nir", tmp_path / "a.nir"
    graph = toolchain.compile(model, output=artefact).graph
    toolchain.export(model, format="nir", output=network_file)
    toolchain.export(artefact, format="nir", output=artefact_file)
    require_identical(artefact_file, graph, images, exact=True)
    require_identical(network_file, lowered(find(model)), images, exact=False)
    toolchain.import_(network_file, output=tmp_path / "run")
    again = tmp_path / "again.fsnn"
    toolchain.compile(tmp_path / "run", output=again)
    toolchain.import_(artefact_file, output=tmp_path / "back.fsnn")
    assert again.read_bytes() == (tmp_path / "back.fsnn").read_bytes() == artefact.read_bytes()


def test_weights_are_in_the_nodes_and_the_file_is_always_the_same(tmp_path):
    for name in ("a", "b"):
        toolchain.export("digits-fc", format="nir", output=tmp_path / f"{name}.nir")
    assert (tmp_path / "a.nir").read_bytes() == (tmp_path / "b.nir").read_bytes()
    graph = nir.read(tmp_path / "a.nir")
    state = find("digits-fc").module.state_dict()
    weights = {node.weight.shape: node.weight for node in graph.nodes.values() if hasattr(node, "weight")}
    for name in ("input.weight", "feedback.0.weight", "readout.weight"):
        np.testing.assert_array_equal(weights[tuple(state[name].shape)], state[name].numpy())
    kinds = {type(node).__name__ for node in graph.nodes.values()}
    assert {"Input", "Flatten", "Affine", "Linear", "IF", "Delay", "I", "Output"} <= kinds


# Readers of NIR's own nodes.


def test_snntorch_refuses_the_exact_file_and_reads_the_approximation(runs, tmp_path):
    """What knows NIR's own neurons only stops at nodes it does not know, instead of computing something else; an approximation it runs as it was measured."""
    snntorch = pytest.importorskip("snntorch.import_nir", reason="snnTorch is not installed: pip install snntorch")
    from toolchain.exchange import nir_torch

    toolchain.export("mnist-ottt-a", format="nir", output=tmp_path / "exact.nir")
    with pytest.raises(ValueError, match="Unknown node type"):
        snntorch.import_from_nir(nir.read(tmp_path / "exact.nir"))
    outcome = toolchain.export("mnist-ottt-a", format="nir", output=tmp_path / "stock.nir", approximate=True, samples=50)
    assert outcome.accuracy > 0.9
    assert outcome.agreement > 0.9
    assert any("set to 0" in sentence for sentence in outcome.lost)
    import nirtorch

    theirs = snntorch.import_from_nir(nir.read(tmp_path / "stock.nir"))
    ours = nirtorch.nir_to_torch(nir.read(tmp_path / "stock.nir"), nir_torch.stock_map(1e-4), dtype=torch.float64)
    image = torch.from_numpy(np.asarray(data.load("mnist-1k", samples=1).images[:], np.float64)).reshape(1, 1, 28, 28)
    state = None
    with torch.no_grad():
        for _ in range(6):
            made, state = ours(image, state)
            assert torch.allclose(theirs(image.float())[0].reshape(-1).double(), made.reshape(-1), atol=1e-4)


def test_the_approximation_says_and_measures_what_it_loses(tmp_path, capsys):
    file = tmp_path / "digits.nir"
    toolchain.export("digits-fc", format="nir", output=file, approximate=True, dataset="digits", samples=100)
    graph = nir.read(file)
    assert {type(node).__name__ for node in graph.nodes.values()} <= {"Input", "Output", "Flatten", "Affine", "Linear", "IF"}
    with pytest.raises(ArtifactError, match="approximation that export --approximate wrote"):
        toolchain.import_(file)
    from toolchain.exchange import nir_torch

    with pytest.raises(UsageError, match="does not say how its neurons reset"):
        nir_torch.load(file)


# Refusals.


@pytest.mark.parametrize(
    ("model", "said"),
    [("convnet-f", "'hidden3' -> 'hidden1' has a transposed convolution"), ("vgg-f", "'hidden8' -> 'hidden1' has an upsampling")],
)
def test_what_nir_has_no_nodes_for_is_refused(tmp_path, model, said):
    from toolchain import models

    with pytest.raises(DesignRuleError, match=said):
        toolchain.export(models.get(model).build().eval(), format="nir", output=tmp_path / "x.nir")
    assert not list(tmp_path.iterdir())


def test_refusals(runs, tmp_path):
    toolchain.compile(runs["relays"], timing="pipelined", output=tmp_path / "p.fsnn")
    with pytest.raises(DesignRuleError, match="runs ahead of the model step in pipelined timing"):
        toolchain.export(tmp_path / "p.fsnn", format="nir", output=tmp_path / "x.nir")
    with pytest.raises(DesignRuleError, match="'hidden1' is a graded relay"):
        toolchain.export(runs["relays"], format="nir", output=tmp_path / "x.nir", approximate=True, samples=1)
    toolchain.compile("digits-fc", float_tensors=False, output=tmp_path / "d.fsnn")
    with pytest.raises(UsageError, match="compiled without its float tensors"):
        toolchain.export(tmp_path / "d.fsnn", format="nir", output=tmp_path / "x.nir", approximate=True, dataset="digits", samples=1)
    toolchain.export(tmp_path / "d.fsnn", format="nir", output=tmp_path / "d.nir")
    toolchain.export("digits-fc", format="nir", output=tmp_path / "n.nir")
    with pytest.raises(UsageError, match=r"give -o FILE\.fsnn"):
        toolchain.import_(tmp_path / "d.nir", output=tmp_path / "run")
    with pytest.raises(UsageError, match="is not compiled"):
        toolchain.import_(tmp_path / "n.nir", output=tmp_path / "n.fsnn")
    with pytest.raises(UsageError, match="exists and is not empty"):
        toolchain.import_(tmp_path / "n.nir", output=runs["leaky"])
    with pytest.raises(UsageError, match="--time-steps is for files of others"):
        toolchain.import_(tmp_path / "n.nir", time_steps=3)


# Damaged and hostile files.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An exported artefact."""
    folder = tmp_path_factory.mktemp("whole")
    toolchain.compile("digits-fc", output=folder / "d.fsnn")
    toolchain.export(folder / "d.fsnn", format="nir", output=folder / "d.nir")
    return folder / "d.nir"


@pytest.fixture(scope="module")
def whole_network(tmp_path_factory):
    """An exported network."""
    return Path(toolchain.export("digits-fc", format="nir", output=tmp_path_factory.mktemp("network") / "d.nir").output)


def truncated(path):
    path.write_bytes(path.read_bytes()[:5000])


def no_hdf5(path):
    path.write_bytes(b"weights")


def other_weight(path):
    with h5py.File(path, "r+") as file:
        (name,) = [name for name in file["node/nodes"] if name.startswith("n0006")]
        file[f"node/nodes/{name}/weight"][0, 0] += 8


def missing_node(path):
    with h5py.File(path, "r+") as file:
        (name,) = [name for name in file["node/nodes"] if name.startswith("n0006")]
        del file[f"node/nodes/{name}"]


def missing_field(path):
    with h5py.File(path, "r+") as file:
        (name,) = [name for name in file["node/nodes"] if name.startswith("n0006")]
        del file[f"node/nodes/{name}/weight"]


def huge(path):
    with h5py.File(path, "r+") as file:
        file.create_dataset("node/metadata/big", shape=(2**40,), dtype="f8", chunks=(2**10,), compression="gzip")


def loop(path):
    with h5py.File(path, "r+") as file:
        file["node/nodes/again"] = file["node/nodes"]


def link(path):
    with h5py.File(path, "r+") as file:
        file["node/elsewhere"] = h5py.ExternalLink("/etc/passwd", "/")


def other_kind(path):
    with h5py.File(path, "r+") as file:
        (name,) = [name for name in file["node/nodes"] if name.startswith("n0006")]
        del file[f"node/nodes/{name}/type"]
        file[f"node/nodes/{name}/type"] = "Teapot"


def entry(change):
    def damage(path):
        with h5py.File(path, "r+") as file:
            value = json.loads(file["node/metadata/fsnn"][()])
            change(value)
            del file["node/metadata/fsnn"]
            file["node/metadata/fsnn"] = json.dumps(value)

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, "is damaged or no HDF5 file"),
        (no_hdf5, "is damaged or no HDF5 file"),
        (other_weight, "does not hold tensor"),
        (missing_node, "holds no network that nir reads"),
        (missing_field, "holds no network that nir reads"),
        (huge, "unpacks to more than"),
        (loop, "has one entry twice"),
        (link, "links to another place"),
        (other_kind, "holds no network that nir reads"),
        (entry(lambda e: e.update(format=99)), "of format 99"),
        (entry(lambda e: e.update(extra=1)), "unknown field"),
        (entry(lambda e: e.update(header="{")), "damaged header"),
        (entry(lambda e: e.update(kind="teapot")), "approximation|does not know"),
        (entry(lambda e: e["places"].popitem()), "lacks tensor|digest"),
        (entry(lambda e: next(iter(e["places"].values())).update(shape=[2**62])), "does not hold tensor"),
        (entry(lambda e: next(iter(e["places"].values())).update(dtype="object")), "does not hold tensor"),
        (entry(lambda e: next(iter(e["places"].values())).update(form="teapot")), "does not hold tensor"),
        (entry(lambda e: next(iter(e["places"].values())).update(exponent=10**9)), "does not hold tensor|digest"),
        (entry(lambda e: next(iter(e["places"].values())).update(node="teapot")), "does not hold tensor"),
        (entry(lambda e: next(iter(e["places"].values())).update(field="__class__")), "does not hold tensor"),
    ],
)
def test_damaged_files_are_one_sentence(whole, tmp_path, damage, said):
    file = tmp_path / "d.nir"
    shutil.copy(whole, file)
    damage(file)
    with pytest.raises(ArtifactError, match=said) as raised:
        toolchain.import_(file, output=tmp_path / "x.fsnn")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "x.fsnn").exists()


def field(kind, name, change):
    """Changes one field of the first node of a kind."""

    def damage(path):
        with h5py.File(path, "r+") as file:
            nodes = file["node/nodes"]
            node = next(nodes[n] for n in sorted(nodes) if nodes[n]["type"][()].decode() == kind and name in nodes[n])
            value = node[name][()]
            del node[name]
            node[name] = change(value)

    return damage


def note(kind, change):
    def edited(raw):
        value = json.loads(raw)
        change(value)
        return json.dumps(value)

    return field(kind, "metadata/fsnn", edited)


def fewer_edges(path):
    with h5py.File(path, "r+") as file:
        edges = file["node/edges"][:-1]
        del file["node/edges"]
        file["node"].create_dataset("edges", data=edges, dtype=h5py.string_dtype())


def one_edge_more(path):
    with h5py.File(path, "r+") as file:
        edges, nodes = file["node/edges"][()].tolist(), file["node/nodes"]
        ends = [next(n for n in nodes if nodes[n]["type"][()] == kind) for kind in (b"Delay", b"Linear")]
        del file["node/edges"]
        file["node"].create_dataset("edges", data=[*edges, ends], dtype=h5py.string_dtype())


def one_node_more(path):
    with h5py.File(path, "r+") as file:
        file["node/nodes/z/type"] = "Threshold"
        file["node/nodes/z/threshold"] = np.ones(3)


def words_as_tensor(path):
    with h5py.File(path, "r+") as file:
        file["node/metadata/tensors/words"] = "words"


def elsewhere(path):
    shutil.copy(path, path.with_name("other.nir"))
    with h5py.File(path, "r+") as file:
        del file["node"]
        file["node"] = h5py.ExternalLink("other.nir", "/node")


@pytest.mark.parametrize("kind", ["artefact", "network"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (field("IF", "v_threshold", lambda v: v / 2), "is not that of its network"),
        (field("Delay", "delay", lambda v: v * 3), "is not that of its network"),
        (note("IF", lambda n: n.update(reset=0)), "is not that of its network"),
        (note("IF", lambda n: n.update(members="both")), "is not that of its network"),
        (field("IF", "metadata/fsnn", lambda _: "{"), "is not that of its network"),
        (field("Affine", "bias", lambda v: v + 1), "is not that of its network|digest|sha256"),
        (field("Affine", "weight", lambda v: v * np.nan), "does not hold tensor"),
        (field("Affine", "weight", lambda v: v + 1j), "neither real numbers nor texts"),
        (fewer_edges, "is not that of its network"),
        (one_edge_more, "its edges are not those of its network"),
        (one_node_more, "is not that of its network"),
        (words_as_tensor, "holds values of type"),
        (elsewhere, "links to another place at 'node'"),
        (entry(lambda e: e.update(time_steps=10**12)), "was changed after it was exported"),
        (entry(lambda e: [place.update(form="spread", shape=[2**29]) for place in e["places"].values()]), "no bias of shape"),
    ],
)
def test_edited_nodes_are_found_before_they_run(whole, whole_network, tmp_path, kind, damage, said):
    from toolchain.exchange import nir_torch

    file = tmp_path / "d.nir"
    shutil.copy(whole if kind == "artefact" else whole_network, file)
    damage(file)
    for read in (toolchain.import_, nir_torch.load):
        with pytest.raises(ArtifactError, match=said) as raised:
            read(file)
        assert "\n" not in str(raised.value)


# The command line.


def test_commands(tmp_path, monkeypatch, capsys):
    def command(line):
        monkeypatch.setattr("sys.argv", ["toolchain", *line.split()])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    code, out, _ = command("export digits-fc --format nir -o d.nir --json")
    record = json.loads(out)
    assert code in (0, None)
    assert (record["format"], record["kind"], record["output"]) == ("nir", "network", "d.nir")
    code, out, _ = command("import d.nir -o run --json")
    record = json.loads(out)
    assert (record["kind"], record["output"], record["warnings"]) == ("network", "run", [])
    assert "nothing was written" in command("import d.nir")[1]
    for line, said in (
        ("import d.nir --dt 0.1", "--dt is for files of others"),
        ("import nothing.nir", "there is no file 'nothing.nir'"),
        ("import run/config.yaml", "does not end in .nir or .onnx"),
        ("import d.nir -o d.nir", "is the file that is read"),
        ("export digits-fc --format nir --calibrate digits -o x.nir", "leave it out"),
        ("export digits-fc --format nir --approximate -o x.nir", "takes samples of 64 values"),
        ("export run/checkpoint.safetensors --format nir -o run/config.yaml", "belongs to the model itself"),
    ):
        code, _, error = command(line)
        assert (code, said in error) == (2, True), error


def test_the_page(tmp_path):
    """Its commands of networks that come with the package, and its Python."""
    page = (ROOT / "docs" / "exchange.md").read_text()
    commands = page.partition("```bash\n")[2].partition("```")[0].splitlines()
    script = page.partition("### In nirtorch")[2].partition("```python\n")[2].partition("```")[0]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for words in (*(["-m", *shlex.split(command)] for command in commands if " nir " in command or ".nir" in command), ["-c", script]):
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(30, 100, 32) ")


@pytest.mark.parametrize("kind", ["leaky", "thresholds", "images"])
def test_an_approximation_is_the_network_where_its_neurons_reset_softly(runs, tmp_path, kind):
    """The nodes with our reset in place of NIR's, at our thresholds: the network's own spike sums, but for what bias differs within a channel."""
    import nirtorch

    from toolchain.exchange import nir_stock, nir_torch
    from toolchain.exchange.nir_nodes import Note

    made = nir_stock.stock(find(runs[kind]))
    path = tmp_path / "stock.nir"
    nir.write(path, nir.NIRGraph(made.sheet().nodes, made.sheet().edges))
    graph = made.graph  # folded, with each channel's mean bias
    forward = graph.phase("forward")

    def soft(node):
        halfway = node.v_threshold.reshape(-1)[0]
        own = next(d for d in forward.dynamics.values() if d.members == "plus" and (d.threshold + d.reset) / 2 == halfway)
        return nir_torch.SoftReset(Note("couple", threshold=own.threshold, reset=own.reset, leak=own.leak, members="plus"))

    network = nirtorch.nir_to_torch(nir.read(path), nir_torch.node_map() | {nir.IF: soft, nir.LIF: soft}, dtype=torch.float64)
    inputs = inputs_of(graph)
    values = torch.from_numpy(inputs)
    total, state = 0.0, None
    with torch.no_grad():
        for step in range(forward.time_steps):
            out, state = network(values[..., step] if graph.of_kind("input")[0].events else values, state)
            total = total * forward.dynamics["readout"].leak + out
    with Reference().compile(graph) as executable:
        result = executable.run(inputs)
    logits = total.numpy() / fixed.leak_sum(forward.dynamics["readout"].leak, forward.time_steps)
    np.testing.assert_allclose(logits, codec.logits(graph, result), atol=1e-9)
