"""A graph as a table, as JSON and as a picture: at every stage, for every form of a model, and legible however large."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib
import msgspec
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

import toolchain
from toolchain import artifact, drawing, ir, models
from toolchain.compiler import Compiled, golden_vectors, lowered, uncompiled
from toolchain.describe import Inspection, processes
from toolchain.drawing import BOX_HEIGHT, BOX_WIDTH, LETTER, LINE, Box, Label, Panel, layout
from toolchain.errors import UsageError
from toolchain.layers import FeedbackSNN, Neuron
from toolchain.notation import geometry, operation, operations, products
from toolchain.passes import FLOAT_PIPELINE, LOIHI_PIPELINE

STAGES = ["lower", *(p.name for p in LOIHI_PIPELINE.passes)]
NETWORKS = ["mnist-fc", "mnist-fc2", "lenet", "alexnet-f", "vgg-f", "vgg-sws-dvs", "preactresnet-18", "nf-resnet-34"]


def chain(layers: int, loops: Iterable[tuple[int, int]] = (), skips: Iterable[tuple[int | None, int]] = ()) -> FeedbackSNN:
    """A chain of 6 x 5 images, with the loops and skips wanted."""
    torch.manual_seed(0)
    return FeedbackSNN(
        name="chain",
        input_shape=(1, 6, 5),
        input=nn.Conv2d(1, 2, 3, 1, 1),
        hidden=[nn.Conv2d(2, 2, 3, 1, 1) for _ in range(layers - 1)],
        feedback=[(source, target, nn.Conv2d(2, 2, 1, bias=False)) for source, target in loops],
        skips=[(source, target, nn.Identity() if source is not None else nn.Conv2d(1, 2, 1)) for source, target in skips],
        readout=nn.Linear(60, 4),
        neuron=Neuron(threshold=1.0, u_rest=0.0),
        time_steps=3,
        feedback_steps=4,
    ).eval()


@cache
def folded(name: str) -> ir.Graph:
    source, _ = uncompiled(name)
    return FLOAT_PIPELINE.until("adjoint")(lowered(source))


@cache
def compiled() -> Compiled:
    return toolchain.compile("digits-fc", target="sim")


# ---- the table


CONV = ir.Conv2d("w", stride=(2, 2), padding=(1, 1), exponent=3)


@pytest.mark.parametrize(
    ("op", "shape", "text"),
    [
        (CONV, (4, 3, 3, 3), "conv 3x3/2 p1 w << 3"),
        (ir.Conv2d("w"), (4, 3, 1, 1), "conv 1x1 w"),
        (ir.Conv2d("w", padding=(1, 2), dilation=(2, 2), groups=3, transpose=True), (6, 1, 3, 5), "conv^T 3x5 p1x2 d2 g3 w"),
        (ir.ConvTranspose2d("w", stride=(2, 1), output_padding=(1, 0)), (4, 3, 3, 3), "deconv 3x3/2x1 op1x0 w"),
        (ir.Dense("w", transpose=True, exponent=1), (4, 3), "dense^T w << 1"),
        (ir.AvgPool2d((2, 2), (2, 2)), None, "pool 2x2"),
        (ir.AvgPool2d((3, 3), (2, 2), (1, 1), transpose=True), None, "pool^T 3x3/2 p1"),
        (ir.AvgPool2d((3, 3), (1, 1)), None, "pool 3x3/1"),
        (ir.Upsample(8), None, "up x8"),
        (ir.Scale(0.5), None, "times 0.5"),
        (ir.Scale(weight="w", exponent=2), (4,), "scale w << 2"),
        (ir.Identity(), None, "as it is"),
    ],
)
def test_operations_are_written_as_people_do(op, shape, text):
    tensors = {} if shape is None else {"w": np.zeros(shape)}
    graph = msgspec.structs.replace(compiled().graph, tensors=tensors)
    assert operation(graph, op) == text
    assert text.startswith(geometry(graph, op))


def test_operations_in_json_read_as_in_the_table():
    shown = Inspection(toolchain.compile("digits-fc", target="sim").graph, "sim")
    synapses = shown.to_json()["phases"][0]["synapses"]
    written = [", ".join(op["text"] for op in synapse["operations"]) for synapse in synapses]
    assert written == [operations(shown.graph, synapse.ops) for synapse in shown.graph.phase("forward").synapses]
    assert all(words in shown.to_text() for words in written)
    assert any("feedback.0.weight" in words for words in written)


@pytest.mark.parametrize(
    ("ops", "source", "target"),
    [
        ((CONV,), (3, 7, 6), (4, 4, 3)),
        ((ir.AvgPool2d((2, 2), (2, 2)), ir.Conv2d("w", padding=(1, 1))), (3, 8, 6), (4, 4, 3)),
        ((ir.Upsample(2), ir.Conv2d("w", padding=(1, 1))), (3, 3, 2), (4, 6, 4)),
        ((ir.Scale(2.0),), (3, 5, 5), (3, 5, 5)),
    ],
)
def test_a_connection_and_its_adjoint_take_as_many_products(ops, source, target):
    """Counted by hand: outputs times the values that each is made of."""
    graph = msgspec.structs.replace(compiled().graph, tensors={"w": np.zeros((4, 3, 3, 3))})
    made, expected = source, 0
    for op in ops:
        made = ir.output_shape(op, made, graph.tensors)
        window = {ir.Conv2d: 3 * 9, ir.AvgPool2d: 4, ir.Upsample: 1, ir.Scale: 1}[type(op)]
        expected += int(np.prod(made)) * window
    assert made == target
    assert products(graph, ops, source, target) == expected
    assert products(graph, ir.adjoint(ops), target, source) == expected


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_of_a_convolutional_network_is_shown(stage):
    shown = toolchain.inspect("lenet", after=stage)
    text, found = shown.to_text(), shown.to_json()
    assert (found["stage"], found["passes"]) == (stage, STAGES[1 : STAGES.index(stage) + 1])
    assert found["numbers"] == ("integer" if "quantize" in found["passes"] else "float")
    assert "conv 5x5" in text
    assert "pool 2x2" in text
    assert json.loads(msgspec.json.encode(found)).keys() == found.keys()


def test_tables_and_json_say_what_the_graph_holds():
    graph = compiled().graph
    shown = Inspection(graph, "sim")
    text, found = shown.to_text(), shown.to_json()
    forward = found["phases"][0]
    assert found["neurons"] == 32
    assert found["weights"] == 64 * 32 + 32 * 32 + 32 * 10
    assert forward["dynamics"]["hidden1"]["threshold"] == graph.phase("forward").dynamics["hidden1"].threshold
    assert f"{graph.phase('forward').dynamics['hidden1'].threshold:,}" in text
    (loop,) = (s for s in forward["synapses"] if s["source"] == s["target"])
    assert (loop["delay"], loop["products"], loop["operations"][0]["makes"]) == (1, 1024, [32])
    assert {entry["tensor"] for entry in forward["bias"]} == {b.tensor for several in graph.phase("forward").bias.values() for b in several}
    assert [drive["source"] for phase in found["phases"] for drive in phase["drive"]] == ["input", "error"]
    assert found["rounding"].keys() == graph.provenance.rounding.keys()


def test_relays_and_events_and_late_biases_are_named():
    relays = Inspection(folded("preactresnet-18"), "sim").to_text()
    assert "hidden1  " in relays
    assert " relay " in relays
    assert " graded " in relays
    assert "input, events" in Inspection(folded("vgg-sws-dvs"), "sim").to_text()
    loop = chain(1)
    loop = FeedbackSNN(
        name="late",
        input_shape=(1, 6, 5),
        input=loop.input,
        feedback=[(0, 0, nn.Conv2d(2, 2, 1))],
        readout=loop.readout,
        time_steps=3,
    )
    rows = toolchain.inspect(loop.eval(), after="fold").to_json()["phases"][0]["bias"]
    assert sorted(row["start"] for row in rows if row["population"] == "hidden1") == [0, 1]


def test_an_artefact_shows_the_stages_that_it_holds(tmp_path):
    path = tmp_path / "digits.fsnn"
    toolchain.compile("digits-fc", target="sim", timing="pipelined", output=path)
    for stage in ("adjoint", "inject", "retime", LOIHI_PIPELINE.passes[-1].name):
        shown = toolchain.inspect(path, after=stage)
        assert shown.stage == stage
    assert toolchain.inspect(path, after="retime").graph.phase("forward").timing.mode == "pipelined"
    assert toolchain.inspect(path).to_json() == shown.to_json()
    for stage in ("lower", "fold"):
        with pytest.raises(UsageError, match=f"does not hold the graph after '{stage}': inspect the model"):
            toolchain.inspect(path, after=stage)
    with pytest.raises(UsageError, match=r"unknown pass 'unfold'.*lower"):
        toolchain.inspect(path, after="unfold")
    toolchain.compile("digits-fc", target="sim", float_tensors=False, output=path)
    with pytest.raises(UsageError, match="does not hold the graph after 'retime'"):
        toolchain.inspect(path, after="retime")


# ---- processes


def test_processes_have_their_ticks():
    graph = FLOAT_PIPELINE(lowered(uncompiled("mnist-fc2")[0]))
    found = {process.name: process for process in processes(graph)}
    assert found["hidden2"].ticks == {
        "forward": {"start": 1, "period": 2, "time_steps": 30},
        "feedback": {"start": 0, "period": 2, "time_steps": 100},
    }
    assert "input" not in found  # its connection runs on the host
    assert found["hidden2 -> hidden1 (forward)"].ticks == {"forward": {"delay": 1}}
    assert len(found) == 3 + sum(len(phase.synapses) for phase in graph.phases)
    text = Inspection(graph, "sim", with_processes=True).to_text()
    assert f"{len(found)} processes" in text
    assert "start 1, period 2, 30 steps" in text
    with pytest.raises(UsageError, match="from pass retime on"):
        toolchain.inspect("digits-fc", after="inject", processes=True)


@pytest.mark.lava
def test_lava_has_these_processes(monkeypatch):
    from toolchain.targets.lava_sim import LAVA_SIM, compile

    running = set()

    class Watched(compile.Network):
        def __init__(self, processes, *rest):
            running.update(process.name for process in processes)
            super().__init__(processes, *rest)

    monkeypatch.setattr(compile, "Network", Watched)
    graph = toolchain.inspect("digits-fc").graph
    with LAVA_SIM.compile(graph):
        assert running == {process.name for process in processes(graph)}


# ---- dumps


@pytest.mark.parametrize("stage", STAGES)
def test_compile_dumps_any_stage(stage):
    made = toolchain.compile("digits-fc", target="sim", dump_after=stage)
    assert made.to_text().startswith(f"after {stage}:\n")
    assert made.to_json()["dumped"]["stage"] == stage
    assert made.to_json()["stage"] == STAGES[-1]
    assert "dumped" not in compiled().to_json()


# ---- golden vectors


def test_small_networks_run_all_golden_steps_on_the_reference():
    made = compiled().artifact
    assert made.golden.time_steps == {phase.name: phase.time_steps for phase in made.graph.phases}
    assert made.golden.samples == 16


def test_large_networks_run_fewer_golden_steps_and_replay_them(tmp_path, monkeypatch):
    """The budgets are lowered instead of the network grown."""
    monkeypatch.setattr("toolchain.compiler.GOLDEN_WORK", 400_000)
    short = toolchain.compile("digits-fc", target="sim", output=tmp_path / "short.fsnn")
    assert short.artifact.golden.samples == 1
    steps = short.artifact.golden.time_steps
    assert 1 < steps["feedback"] < short.graph.phase("feedback").time_steps
    assert toolchain.verify(tmp_path / "short.fsnn", targets=("reference", "sim"), replay=True).passed
    monkeypatch.setattr("toolchain.compiler.REFERENCE_WORK", 0)
    golden, tensors = golden_vectors(short.graph)
    assert golden == short.artifact.golden
    assert all(np.array_equal(tensors[name], kept) for name, kept in short.artifact.golden_tensors.items())


def test_a_convolutional_network_compiles_to_the_same_bytes(tmp_path, monkeypatch):
    """Also where the simulator makes the golden vectors in place of the reference."""
    for name, work in (("one", 2**62), ("two", 2**62), ("three", 0)):
        monkeypatch.setattr("toolchain.compiler.REFERENCE_WORK", work)
        toolchain.compile("lenet", target="sim", time_steps=4, feedback_steps=6, output=tmp_path / f"{name}.fsnn")
    one, two, three = ((tmp_path / f"{name}.fsnn").read_bytes() for name in ("one", "two", "three"))
    assert one == two
    assert one == three


def test_a_whole_number_in_place_of_a_float_reads_back(tmp_path):
    made = compiled().artifact
    (readout,) = made.graph.of_kind("readout")
    forward = made.graph.phase("forward")
    whole = {**forward.dynamics, readout.name: ir.Dynamics(leak=1)}
    graph = msgspec.structs.replace(made.graph, phases=(msgspec.structs.replace(forward, dynamics=whole), made.graph.phase("feedback")))
    artifact.write(msgspec.structs.replace(made, graph=graph), tmp_path / "whole.fsnn")
    assert artifact.read(tmp_path / "whole.fsnn").graph.phases == made.graph.phases


def test_golden_events_have_a_frame_for_each_step():
    graph = LOIHI_PIPELINE(lowered(uncompiled("nmnist-conv")[0]).in_steps({"forward": 2, "feedback": 2}))
    golden, tensors = golden_vectors(graph)
    assert tensors["inputs"].shape == (golden.samples, 2, 34, 34, 2)


# ---- pictures


@dataclass(frozen=True)
class Rectangle:
    """What may not be painted over."""

    what: str
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Rectangle, slack: float = 0.01) -> bool:
        across = min(self.right, other.right) - max(self.left, other.left)
        return across > slack and min(self.bottom, other.bottom) - max(self.top, other.top) > slack


def of_box(box: Box) -> Rectangle:
    return Rectangle(box.name, box.x, box.y, box.x + box.width, box.y + box.height)


def of_label(label: Label) -> Rectangle:
    return Rectangle(" ".join(label.text), label.x, label.y, label.x + label.width, label.y + label.height)


def assert_legible(panel: Panel) -> None:
    """No box on a box, no label on a box or a label, no line through a box, all inside."""
    boxes = [of_box(box) for box in panel.boxes]
    labels = [of_label(label) for wire in panel.wires for label in wire.labels]
    assert [(a.what, b.what) for a, b in combinations(boxes + labels, 2) if a.meets(b)] == []
    page = Rectangle("page", 0, 0, panel.width, panel.height)
    assert [r.what for r in boxes + labels if r.left < 0 or r.top < 0 or r.right > page.right or r.bottom > page.bottom] == []
    for wire in panel.wires:
        for (x1, y1), (x2, y2) in pairwise(wire.points):
            assert 0 <= min(x1, x2) <= max(x1, x2) <= panel.width
            assert 0 <= min(y1, y2) <= max(y1, y2) <= panel.height
            if wire.kind == "chain" and y1 != y2 and x1 != x2:
                continue  # a slanted arrow between two columns, where no boxes are
            line = Rectangle("line", min(x1, x2) - 0.1, min(y1, y2) - 0.1, max(x1, x2) + 0.1, max(y1, y2) + 0.1)
            assert [b.what for b in boxes if b.meets(line, 0.15)] == [], (wire.source, wire.target)


@pytest.mark.parametrize("name", NETWORKS)
def test_pictures_of_the_papers_networks_are_legible(name):
    for panel in layout(folded(name)):
        assert_legible(panel)
        assert panel.width < 10 * (BOX_WIDTH + drawing.GAP) + 200
    forward = layout(folded(name))[0]
    assert [box.name for box in forward.boxes] == list(folded(name).phase("forward").order)
    assert len(forward.wires) == len(folded(name).phase("forward").synapses)


@pytest.mark.parametrize(
    ("layers", "loops", "skips"),
    [
        (1, [(0, 0)], []),
        (3, [(0, 0), (1, 1), (2, 2), (2, 0), (1, 0), (2, 1)], [(None, 2), (0, 2)]),
        (23, [(22, 0), (21, 3), (12, 12), (15, 2), (9, 8)], [(0, 22), (1, 12), (None, 9), (None, 22), (3, 5), (4, 6)]),
        (70, [(69, 0)], [(i, i + 3) for i in range(0, 66, 3)]),
    ],
)
def test_pictures_of_any_chain_are_legible(layers, loops, skips):
    graph = FLOAT_PIPELINE(lowered(uncompiled(chain(layers, loops, skips))[0]))
    forward, feedback = layout(graph)
    assert_legible(forward)
    assert_legible(feedback)
    kinds = [wire.kind for wire in forward.wires]
    assert (kinds.count("loop"), kinds.count("skip")) == (len(loops), sum(source is not None for source, _ in skips))
    assert "host -> hidden1" in {box.name for box in forward.boxes}
    assert all(
        "gated" in " ".join(" ".join(label.text) for label in wire.labels)
        for wire in feedback.wires
        if wire.source in graph.phase("forward").dynamics
    )


def test_a_graph_with_branches_stacks_them_in_one_column():
    graph = folded("mnist-fc2")
    forward = graph.phase("forward")
    twins = tuple(ir.Population(f"twin{i}", (300,), "couple") for i in range(3))
    second = next(s for s in forward.synapses if (s.source, s.target) == ("hidden1", "hidden2"))
    added = [msgspec.structs.replace(second, **{end: twin.name}) for twin in twins for end in ("target", "source")]
    order = ("input", "hidden1", *(t.name for t in twins), "hidden2", "readout")
    dynamics = {**forward.dynamics, **{t.name: forward.dynamics["hidden1"] for t in twins}}
    wide = msgspec.structs.replace(forward, order=order, dynamics=dynamics, synapses=(*forward.synapses, *added))
    branched = msgspec.structs.replace(graph, populations=(*graph.populations, *twins), phases=(wide,))
    ir.verify(branched)
    (panel,) = layout(branched)
    assert_legible(panel)
    columns = {box.name: box.column for box in panel.boxes}
    assert columns["twin0"] == columns["twin1"] == columns["twin2"] == columns["hidden1"] + 1
    assert columns["hidden2"] == columns["hidden1"] + 2


def test_text_takes_no_more_room_than_the_layout_gives_it():
    """Measured in the font that is painted: labels of all networks, and what is written in boxes."""
    figure = Figure()
    paint = FigureCanvasAgg(figure).get_renderer()
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "text.parse_math": False}):

        def extent(text: str, fontsize: float, weight: str = "normal") -> tuple[float, float]:
            box = figure.text(0, 0, text, fontsize=fontsize, weight=weight).get_window_extent(paint)
            return box.width * 72 / figure.dpi, box.height * 72 / figure.dpi

        panels = [panel for name in NETWORKS for panel in layout(folded(name))] + list(layout(compiled().graph))
        for line in {line for panel in panels for wire in panel.wires for label in wire.labels for line in label.text}:
            width, height = extent(line, drawing.LABEL_SIZE)
            assert width <= LETTER * len(line), line
            assert height <= LINE + 1, line
        for box in {box.text for panel in panels for box in panel.boxes}:
            assert extent(box[0], drawing.NAME_SIZE, "bold")[0] < BOX_WIDTH
            assert max(extent(line, drawing.LABEL_SIZE)[0] for line in box[1:]) < BOX_WIDTH
            assert len(box) * LINE < BOX_HEIGHT


def test_a_placed_graph_shows_its_cores(tmp_path):
    shown = toolchain.inspect("lenet", chip_svg=tmp_path / "chips.svg")
    text, found = shown.to_text(), shown.to_json()
    assert shown.stage == "partition"
    assert "\non loihi2: " in text
    assert sum(population["neurons"] for population in found["placement"]["populations"]) >= found["neurons"]
    assert len(found["placement"]["cores"]) == len(shown.graph.placement.cores)
    assert (tmp_path / "chips.svg").read_bytes().startswith(b"<?xml")
    written = {box.name: box.text[-1] for box in layout(shown.graph)[0].boxes}
    rows = {population["name"]: population["cores"] for population in found["placement"]["populations"]}
    assert {name: int(line.split()[0].replace(",", "")) for name, line in written.items() if line.split()[-1].startswith("core")} == rows
    assert toolchain.inspect("lenet", after="quantize").to_json()["placement"] is None
    with pytest.raises(UsageError, match="on no cores yet"):
        toolchain.inspect("lenet", after="quantize", chip_svg=tmp_path / "none.svg")


def test_the_same_graph_gives_the_same_bytes(tmp_path):
    paths = [tmp_path / f"{i}.svg" for i in range(2)]
    for path in paths:
        shown = toolchain.inspect("mnist-fc2", svg=path)
        assert shown.to_json()["pictures"] == {"svg": str(path)}
        assert shown.to_text().endswith(f"wrote {path}")
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert first.startswith(b"<?xml")
    assert b"dc:date" not in first


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="choose a writable place"):
        toolchain.inspect("digits-fc", svg=tmp_path / "file" / "graph.svg")
    with pytest.raises(UsageError, match=r"needs the ending \.svg"):
        toolchain.inspect("digits-fc", svg=tmp_path / "graph.pdf")
    assert [path.name for path in Path(tmp_path).iterdir()] == ["file"]


def test_every_network_of_the_catalogue_has_a_source():
    untrained = [name for name in models.names() if not models.get(name).shipped]
    assert "vgg-f" in untrained
    random = toolchain.inspect("mnist-conv", after="lower").to_text()
    assert "note: no trained weights are shipped for 'mnist-conv': these are random (seed 0)" in random
    source, notes = uncompiled("digits-fc")
    assert notes == ()
    assert source.module is not None
    assert not source.module.training


def test_the_analysis_is_of_the_compiled_graph(tmp_path):
    shown = toolchain.inspect("digits-fc", analysis=True)
    text, found = shown.to_text(), shown.to_json()["analysis"]
    assert "largest singular value" in text
    assert set(found) == {"saturation", "contraction", "budget"}
    assert found["budget"] is not None
    file = tmp_path / "digits.fsnn"
    toolchain.compile("digits-fc", output=file, float_tensors=False)
    assert toolchain.inspect(file, analysis=True).to_json()["analysis"]["budget"] is None
    with pytest.raises(UsageError, match="--analysis is of the compiled graph beside the float one: leave --after out"):
        toolchain.inspect("digits-fc", analysis=True, after="fold")
