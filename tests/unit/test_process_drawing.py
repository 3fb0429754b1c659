"""The picture of the process graph: every process and every connection is there, nothing lies on anything else, all text fits."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from functools import cache
from itertools import combinations, pairwise

import matplotlib
import msgspec
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

import toolchain
from toolchain import ir
from toolchain.compiler import lowered, uncompiled
from toolchain.describe import Inspection, processes
from toolchain.errors import UsageError
from toolchain.layers import FeedbackSNN
from toolchain.passes import FLOAT_PIPELINE, LOIHI_PIPELINE
from toolchain.process_drawing import LINE, Box, Picture, draw, layout

NETWORKS = ["mnist-fc", "mnist-fc2", "convnet-f", "lenet", "vgg-sws-dvs", "preactresnet-18"]
SVG = "{http://www.w3.org/2000/svg}"


@cache
def timed(name: str) -> ir.Graph:
    return FLOAT_PIPELINE(lowered(uncompiled(name)[0]))


def chain(layers: int, loops: tuple[tuple[int, int], ...], skips: tuple[tuple[int, int], ...], mode: str) -> ir.Graph:
    net = FeedbackSNN(
        name="chain",
        input_shape=(4,),
        input=nn.Linear(4, 4),
        hidden=[nn.Linear(4, 4) for _ in range(layers - 1)],
        feedback=[(a, b, nn.Linear(4, 4, bias=False)) for a, b in loops],
        skips=[(a, b, nn.Linear(4, 4, bias=False)) for a, b in skips],
        readout=nn.Linear(4, 3),
        time_steps=3,
        feedback_steps=2,
    )
    return FLOAT_PIPELINE.with_options(retime={"mode": mode})(lowered(uncompiled(net.eval())[0]))


def meets(box: Box, left: float, top: float, right: float, bottom: float) -> bool:
    return min(box.x + box.width, right) - max(box.x, left) > 0.1 and min(box.y + box.height, bottom) - max(box.y, top) > 0.1


def assert_legible(picture: Picture) -> None:
    for a, b in combinations(picture.boxes, 2):
        assert not meets(a, b.x - 8, b.y - 8, b.x + b.width + 8, b.y + b.height + 8), (a.name, b.name)
    for box in picture.boxes:
        assert box.x >= 20
        assert box.x + box.width <= picture.width - 20
        assert 20 <= box.y < box.y + box.height <= picture.height - 20
    upright: dict[tuple[str, float], list[tuple[float, float, int]]] = {}
    for i, wire in enumerate(picture.wires):
        for (x1, y1), (x2, y2) in pairwise(wire.points):
            assert x1 == x2 or y1 == y2
            low, high, top, bottom = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
            assert [b.name for b in picture.boxes if meets(b, low - 0.04, top - 0.04, high + 0.04, bottom + 0.04)] == [], wire
            if x1 == x2:
                upright.setdefault((wire.phase, x1), []).append((top, bottom, i))
    for pieces in upright.values():  # no line lies on another where it turns into a lane
        for (_, end, i), (start, _, j) in pairwise(sorted(pieces)):
            assert end < start, (picture.wires[i], picture.wires[j])


def assert_complete(graph: ir.Graph, picture: Picture) -> None:
    """A box for each process; into and out of each synapse's a line that ends at the edge of the right box."""
    found = processes(graph)
    assert sorted(box.name for box in picture.boxes) == sorted(process.name for process in found)
    wanted = []
    for process in found:
        if process.connects is not None:
            source, target = (port.rsplit(".", 1)[0] for port in process.connects)
            wanted += [(source, process.name), (process.name, target)]
    assert sorted((wire.source, wire.target) for wire in picture.wires) == sorted(wanted)
    for wire in picture.wires:
        for name, (x, y) in ((wire.source, wire.points[0]), (wire.target, wire.points[-1])):
            assert any(on_edge(box, x, y) for box in picture.boxes if box.name == name), name


def on_edge(box: Box, x: float, y: float) -> bool:
    across, down = box.x <= x <= box.x + box.width, box.y <= y <= box.y + box.height
    return across and down and (x in (box.x, box.x + box.width) or y in (box.y, box.y + box.height))


@pytest.mark.parametrize("name", NETWORKS)
def test_processes_of_the_papers_networks_are_legible(name):
    graph = timed(name)
    picture = layout(graph)
    assert_complete(graph, picture)
    assert_legible(picture)
    assert picture.width < 1600
    forward = [box.y for box in picture.boxes if box.kind != "synapse"]
    assert forward == sorted(forward)


@pytest.mark.parametrize(
    ("layers", "loops", "skips"),
    [
        (1, ((0, 0),), ()),
        (1, (), ()),
        (3, ((0, 0), (1, 1), (2, 2), (2, 0), (1, 0), (2, 1)), ((0, 2),)),
        (12, ((11, 0), (10, 3), (5, 5), (8, 2), (4, 3)), ((0, 11), (1, 6), (3, 5), (4, 6), (3, 6))),
        (4, ((3, 0), (3, 0)), ((0, 2), (0, 2))),
    ],
)
def test_processes_of_any_chain_are_legible(layers, loops, skips):
    for mode in ("exact", "pipelined"):
        graph = chain(layers, loops, skips, mode)
        assert_complete(graph, layout(graph))
        assert_legible(layout(graph))


def test_inputs_on_the_chip_and_a_phase_alone_are_drawn():
    graph = LOIHI_PIPELINE.with_options(inject={"mode": "graded"}).until("quantize")(lowered(uncompiled("digits-fc")[0]))
    picture = layout(graph)
    assert_complete(graph, picture)
    assert_legible(picture)
    assert picture.boxes[0].name == "input"
    assert "feedback: idle" in picture.boxes[0].text
    alone = msgspec.structs.replace(graph, phases=graph.phases[:1])
    assert_complete(alone, layout(alone))
    assert_legible(layout(alone))
    assert layout(alone).width < picture.width
    assert {wire.phase for wire in layout(alone).wires} == {"forward"}


def test_the_picture_says_ports_ticks_gates_and_who_is_idle():
    picture = layout(timed("mnist-fc2"))
    boxes = {box.name: box for box in picture.boxes}
    assert boxes["hidden2"].text == (
        "hidden2",
        "couple 300",
        "forward: ticks 1, 3, … 59",
        "feedback: ticks 0, 2, … 198",
        "feedback: the host adds the error",
    )
    assert "feedback: idle" in boxes["readout"].text
    assert boxes["hidden2 -> hidden1 (feedback)"].text == ("hidden2 → hidden1", "dense^T", "delay 1 tick, gated")
    words = [word.text for word in picture.words]
    assert (words.count("s_out"), words.count("b_out * mask"), words.count("a_in")) == (2, 2, 5)
    assert "forward phase (left, 30 time steps): exact timing, period 2, 62 ticks, the last 1 for flush" in words
    relayed = [word.text for word in layout(timed("preactresnet-18")).words]
    assert {"b_out", "b_out * mask"} <= set(relayed)


def test_lines_of_one_port_part_at_a_dot():
    """hidden2 sends to the readout and back to hidden1: one line, which the nearer synapse leaves."""
    picture = layout(timed("mnist-fc2"))
    ((x, y, phase),) = picture.dots
    assert phase == "forward"
    out = [wire for wire in picture.wires if wire.source == "hidden2" and wire.phase == "forward"]
    assert len(out) == 2
    assert {wire.points[0] for wire in out} == {out[0].points[0]}
    assert (x, y) in {wire.points[1] for wire in out}


def test_all_text_fits_its_place():
    """Measured in DejaVu Sans, the widest of the fonts that the picture asks for."""
    figure = Figure(dpi=72)
    paint = FigureCanvasAgg(figure).get_renderer()
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "text.parse_math": False}):

        def wide(text: str, size: float, weight: str = "normal") -> float:
            return float(figure.text(0, 0, text, fontsize=size, weight=weight).get_window_extent(paint).width)

        for picture in [layout(timed(name)) for name in NETWORKS]:
            for box in picture.boxes:
                named = box.kind != "synapse"
                assert wide(box.text[0], 11 if named else 10, "bold" if named else "normal") < box.width - 4, box
                assert max(wide(line, 10) for line in box.text[1:]) < box.width - 4, box
                assert LINE * len(box.text) <= box.height, box
            places = []
            for word in picture.words:
                width = wide(word.text, 15, "bold") if word.kind == "title" else wide(word.text, 10)
                left = word.x - width if word.anchor == "end" else word.x
                assert left >= 0, word
                assert left + width <= picture.width, word
                assert not [b.name for b in picture.boxes if meets(b, left, word.y - 8, left + width, word.y + 2)], word
                places.append((left, word.y - 8, left + width, word.y + 2))
            for a, b in combinations(places, 2):
                assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


def test_names_of_any_length_and_letters_are_drawn():
    graph = timed("mnist-fc2")
    long = "<a&b> " + 40 * "wide "
    renamed = msgspec.json.decode(
        msgspec.json.encode(msgspec.structs.replace(graph, tensors={})).replace(b'"hidden2"', msgspec.json.encode(long))
    )
    other = msgspec.structs.replace(msgspec.convert(renamed, ir.Graph), tensors=graph.tensors)
    assert_legible(layout(other))
    root = ET.fromstring(draw(other))
    assert any("…" in (text.text or "") and "<a&b>" in (text.text or "") for text in root.iter(f"{SVG}text"))


def test_the_same_graph_gives_the_same_bytes_for_light_and_dark_pages():
    first, again = (draw(timed("convnet-f")) for _ in range(2))
    assert first == again
    root = ET.fromstring(first)
    assert len(root.findall(f"{SVG}rect")) == 1 + len(processes(timed("convnet-f")))
    style = root.findtext(f"{SVG}style") or ""
    assert "prefers-color-scheme: dark" in style
    assert root.findtext(f"{SVG}title") == "convnet-f as processes: 4 populations, 7 synapses"


def test_inspect_draws_processes_where_it_lists_them(tmp_path):
    file = tmp_path / "processes.svg"
    shown = toolchain.inspect("digits-fc", processes=True, svg=file)
    assert file.read_bytes() == draw(shown.graph)
    toolchain.inspect("digits-fc", svg=tmp_path / "graph.svg")
    assert b"s_out" not in (tmp_path / "graph.svg").read_bytes()
    with pytest.raises(UsageError, match="from pass retime on"):
        toolchain.inspect("digits-fc", after="inject", processes=True, svg=tmp_path / "early.svg")
    assert not (tmp_path / "early.svg").exists()


def test_the_table_says_what_is_joined_and_when():
    text = Inspection(timed("mnist-fc2"), "lava-sim", with_processes=True).to_text()
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "hidden2.b_out -> hidden1.a_in" in rows["hidden2 -> hidden1 (feedback)"]
    assert rows["hidden2 -> hidden1 (feedback)"].endswith("delay 1, gated by hidden2")
    assert rows["hidden1 -> hidden2 (forward)"].endswith("idle")
    assert "a_in, s_out, b_out" in rows["hidden1"]
    assert "feedback phase: exact timing, period 2, 201 ticks, the last 1 for flush" in text
    found = {row["name"]: row for row in Inspection(timed("mnist-fc2"), "lava-sim", with_processes=True).to_json()["processes"]}
    assert found["readout"]["idle"] == ("feedback",)
    assert found["hidden2 -> hidden1 (feedback)"]["gate"] == "hidden2"
    assert found["hidden1"]["connects"] is None


@pytest.mark.lava
@pytest.mark.parametrize("name", ["mnist-fc2", "lenet"])
def test_lava_runs_what_the_picture_shows(monkeypatch, name):
    """Every port of every Lava process is joined to the ports that the table names, and to no other."""
    from toolchain.targets.lava_sim import LAVA_SIM_FLOAT, compile

    running = []

    class Watched(compile.Network):
        def __init__(self, made, *rest):
            running.extend(made)
            super().__init__(made, *rest)

    monkeypatch.setattr(compile, "Network", Watched)
    graph = timed(name)
    with LAVA_SIM_FLOAT.compile(graph):
        joined = sorted(
            (port.process.name, port.name, far.process.name, far.name)
            for process in running
            for port in process.out_ports
            for far in port.out_connections
        )
    wanted = []
    for process in processes(graph):
        if process.connects is not None:
            (source, out), (target, into) = (port.rsplit(".", 1) for port in process.connects)
            wanted += [(source, out, process.name, process.ports[0]), (process.name, process.ports[1], target, into)]
    assert joined == sorted(wanted)
    ports = {process.name: {port.name for port in [*process.in_ports, *process.out_ports]} for process in running}
    assert ports == {process.name: set(process.ports) for process in processes(graph)}
