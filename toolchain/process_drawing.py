"""The process graph as a picture: one box for each process that runs, a population or a synapse, as on the chip, both phases side by side.

Populations stand in a column, in the order of the forward phase. Left of them are the synapses of the forward phase, right of them those of the feedback
phase; a synapse stands in a lane of its own between the populations that it joins. Lines that leave one port run together until each turns off at a dot;
lines that reach one port join before it. `layout` decides where everything goes, in plain numbers that a test can check; `draw` writes that as SVG, with
colours for light and for dark pages. Lengths are pixels, y grows downwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from toolchain.describe import Process, out_port, phase_ticks, processes
from toolchain.ir import Graph, Phase, Synapse
from toolchain.notation import cut, geometry, wrapped

Point = tuple[float, float]

BOX_WIDTH, BOX_HEIGHT = 208.0, 92.0
SYNAPSE_WIDTH, SYNAPSE_HEIGHT = 168.0, 62.0
PITCH = 136.0
"""From one population to the next: lines to outer lanes pass between the synapses of inner ones."""
LANE = SYNAPSE_WIDTH + 18.0
ROOM = {"forward": 52.0, "feedback": 92.0}
"""Between the populations and the first lane: a port's name is written there."""
PORT = 15.0
"""How far above and below the middle of its box a port lies."""
TURN = 14.0
"""Half the distance between the two lines of a synapse that leads from a population to itself."""
MARGIN, HEAD, FOOT = 26.0, 56.0, 30.0

LINE, LETTER, NAME_LETTER = 13.0, 6.2, 7.3
"""Height of a line of text; width of a letter of 10 px and of a bold one of 11 px, at most, on average."""
NAME_LETTERS, BOX_LETTERS, SYNAPSE_LETTERS = 26, 32, 25


@dataclass(frozen=True)
class Box:
    """A process: its left upper corner, its size, and what is written in it, the name first. `kind` is couple, relay, input, readout or synapse."""

    name: str
    kind: str
    phase: str | None
    text: tuple[str, ...]
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Wire:
    """From a port of one process to a port of another: a chain of upright and level pieces."""

    source: str
    target: str
    phase: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Word:
    """One line of text; `anchor` says whether (x, y) is its start, middle or end. `kind` is a class of `STYLE`."""

    text: str
    x: float
    y: float
    anchor: str
    kind: str


@dataclass(frozen=True)
class Picture:
    """Everything in its place. `dots` mark where lines of one port part, or join: the x, the y, and the phase."""

    title: str
    width: float
    height: float
    boxes: tuple[Box, ...]
    wires: tuple[Wire, ...]
    dots: tuple[tuple[float, float, str], ...]
    words: tuple[Word, ...]


@dataclass(frozen=True)
class _Route:
    """A synapse in its lane: y of the port it leaves and of the one it enters, y of the middle of its box; `turns` where its source is its target."""

    synapse: Synapse
    process: Process
    leaves: float
    enters: float
    middle: float
    turns: bool

    @property
    def reach(self) -> tuple[float, float]:
        """The piece of its lane that it takes."""
        half = SYNAPSE_HEIGHT / 2
        return min(self.leaves, self.enters, self.middle - half), max(self.leaves, self.enters, self.middle + half)


def layout(graph: Graph) -> Picture:
    """Where every process, line and word goes; UsageError before `retime`."""
    found = processes(graph)
    rows = [process for process in found if process.connects is None]
    place = {process.name: MARGIN + HEAD + PITCH * (i + 0.5) for i, process in enumerate(rows)}
    pending = iter(process for process in found if process.connects is not None)
    routes: dict[str, list[_Route]] = {
        phase.name: [_route(phase.name, synapse, next(pending), place) for synapse in phase.synapses] for phase in graph.phases
    }
    lanes = {phase: _lanes(of_phase) for phase, of_phase in routes.items()}
    most: dict[str, int] = {phase: 1 + max(numbers, default=-1) for phase, numbers in lanes.items()}
    left = MARGIN + _side("forward", most)
    boxes = [_population(graph, process, left, place[process.name]) for process in rows]
    wires: list[Wire] = []
    for phase, of_phase in routes.items():
        for route, lane in zip(of_phase, lanes[phase], strict=True):
            boxes.append(_synapse(graph, route, phase, _lane_x(phase, lane, left)))
            wires += _wires(route, phase, _lane_x(phase, lane, left), left)
    words = [*_ports(rows, routes, place, left), *_heads(graph, most, left)]
    legend = _legend(graph)
    lowest = max(box.y + box.height for box in boxes)
    words += [Word(line, MARGIN, lowest + FOOT + LINE * i, "start", "quiet") for i, line in enumerate(legend)]
    title = f"{graph.provenance.model} as processes: {len(rows)} populations, {len(found) - len(rows)} synapses"
    words.append(Word(cut(title, 90), MARGIN, MARGIN + 8, "start", "title"))
    ends = [word.x + LETTER * len(word.text) for word in words if word.anchor == "start" and word.kind != "title"]
    width = max([left + BOX_WIDTH + _side("feedback", most), MARGIN + 9.5 * len(cut(title, 90)), *ends]) + MARGIN
    return Picture(title, width, lowest + FOOT + LINE * len(legend) + MARGIN, tuple(boxes), tuple(wires), _dots(wires), tuple(words))


def _side(phase: str, lanes: Mapping[str, int]) -> float:
    """Room for the synapses of a phase beside the populations."""
    return ROOM[phase] + LANE * lanes[phase] if lanes.get(phase) else 0.0


def _lane_x(phase: str, lane: int, left: float) -> float:
    """The middle of a lane, counted from the populations."""
    away = ROOM[phase] + LANE * lane + SYNAPSE_WIDTH / 2
    return left - away if phase == "forward" else left + BOX_WIDTH + away


def _route(phase: str, synapse: Synapse, process: Process, place: dict[str, float]) -> _Route:
    """Forward synapses leave below and arrive above the middle of a population, since most lead down; in the feedback phase it is the other way round."""
    source, target = place[synapse.source], place[synapse.target]
    down = PORT if phase == "forward" else -PORT
    steps = round(abs(source - target) / PITCH)
    middle = min(source, target) + PITCH * (max(steps - 1, 0) // 2 + 0.5)
    return _Route(synapse, process, source + down, target - down, middle, source == target)


def _lanes(routes: Sequence[_Route]) -> list[int]:
    """A lane for each synapse, the shortest ones next to the populations; two in one lane never meet."""
    taken: list[list[tuple[float, float]]] = []
    found = dict.fromkeys(range(len(routes)), 0)
    for i in sorted(found, key=lambda i: (routes[i].reach[1] - routes[i].reach[0], routes[i].reach[0])):
        low, high = routes[i].reach
        free = (n for n, pieces in enumerate(taken) if all(high + 4 < a or b + 4 < low for a, b in pieces))
        found[i] = next(free, len(taken))
        if found[i] == len(taken):
            taken.append([])
        taken[found[i]].append((low, high))
    return list(found.values())


def _wires(route: _Route, phase: str, x: float, left: float) -> list[Wire]:
    """Into the synapse's process, and out of it: through its upper and lower edge, or both through the upper one where it leads back to its source."""
    edge = left if phase == "forward" else left + BOX_WIDTH
    inward = TURN if phase == "forward" else -TURN
    upper, lower = route.middle - SYNAPSE_HEIGHT / 2, route.middle + SYNAPSE_HEIGHT / 2
    if route.turns:
        # the port nearer to the synapse has the line nearer to the population, so that the two do not cross
        near, far = x + inward, x - inward
        out, into = (near, far) if route.leaves > route.enters else (far, near)
        ends = upper, upper
    else:
        out = into = x
        ends = (upper, lower) if route.leaves < route.middle else (lower, upper)
    name = route.process.name
    return [
        Wire(route.synapse.source, name, phase, ((edge, route.leaves), (out, route.leaves), (out, ends[0]))),
        Wire(name, route.synapse.target, phase, ((into, ends[1]), (into, route.enters), (edge, route.enters))),
    ]


def _dots(wires: Sequence[Wire]) -> tuple[tuple[float, float, str], ...]:
    """Where a line turns off another of the same port, which goes on."""
    ports: dict[tuple[str, float], list[float]] = {}
    for wire in wires:
        corner = wire.points[1]
        ports.setdefault((wire.phase, corner[1]), []).append(corner[0])
    found = []
    for (phase, y), corners in ports.items():
        farthest = min(corners) if phase == "forward" else max(corners)
        found += [(x, y, phase) for x in sorted(set(corners)) if x != farthest]
    return tuple(found)


def _population(graph: Graph, process: Process, x: float, middle: float) -> Box:
    lines = [cut(process.name, NAME_LETTERS), cut(_kind(graph, process), BOX_LETTERS)]
    lines += [cut(f"{phase.name}: {_own_ticks(phase, process)}", BOX_LETTERS) for phase in graph.phases]
    lines += [f"{phase.name}: the host adds the {d.source}" for phase in graph.phases for d in phase.drive if d.population == process.name]
    return Box(process.name, process.kind, None, tuple(lines), x, middle - BOX_HEIGHT / 2, BOX_WIDTH, BOX_HEIGHT)


def _kind(graph: Graph, process: Process) -> str:
    return f"{process.kind} {process.shape}" + ", events" * graph.population(process.name).events


def _own_ticks(phase: Phase, process: Process) -> str:
    """The ticks on which a population makes its steps."""
    if phase.name in process.idle:
        return "idle"
    first, period = phase.timing.start.get(process.name, 0), phase.timing.period
    last = first + (phase.time_steps - 1) * period
    if phase.time_steps <= 2:
        return "ticks " + ", ".join(str(tick) for tick in range(first, last + 1, period)) if last > first else f"tick {first}"
    return f"ticks {first}, {first + period}, … {last}"


def _synapse(graph: Graph, route: _Route, phase: str, x: float) -> Box:
    ops = [geometry(graph, op) for op in route.synapse.ops] or ["as it is"]
    delay = f"delay {route.synapse.delay} tick" + "s" * (route.synapse.delay != 1)
    between = cut(f"{route.synapse.source} → {route.synapse.target}", SYNAPSE_LETTERS)
    text = (between, *wrapped(ops, SYNAPSE_LETTERS - 2, 2), delay + ", gated" * (route.synapse.gate is not None))
    corner = x - SYNAPSE_WIDTH / 2, route.middle - SYNAPSE_HEIGHT / 2
    return Box(route.process.name, "synapse", phase, text, *corner, SYNAPSE_WIDTH, SYNAPSE_HEIGHT)


def _ports(rows: Sequence[Process], routes: Mapping[str, Sequence[_Route]], place: Mapping[str, float], left: float) -> list[Word]:
    """The names of the ports that something is connected to, beside the population."""
    words = []
    for phase, of_phase in routes.items():
        x, anchor = (left - 9, "end") if phase == "forward" else (left + BOX_WIDTH + 9, "start")
        down = PORT if phase == "forward" else -PORT
        for process in rows:
            out = [route for route in of_phase if route.synapse.source == process.name]
            gated = any(route.synapse.gate is not None for route in out)
            if out:
                words.append(Word(out_port(phase) + " * mask" * gated, x, place[process.name] + down - 5, anchor, phase))
            if any(route.synapse.target == process.name for route in of_phase):
                words.append(Word("a_in", x, place[process.name] - down - 5, anchor, phase))
    return words


def _heads(graph: Graph, lanes: Mapping[str, int], left: float) -> list[Word]:
    """What each phase is, over everything."""
    words = []
    for i, phase in enumerate(graph.phases):
        side = "left" if phase.name == "forward" else "right"
        where = f"{side}, " if lanes[phase.name] else ""
        text = f"{phase.name} phase ({where}{phase.time_steps} time steps): {phase_ticks(phase)}"
        words.append(Word(text, MARGIN, MARGIN + 30 + (LINE + 3) * i, "start", phase.name))
    return words


def _legend(graph: Graph) -> list[str]:
    lines = [
        "A population makes its time steps on the ticks written in it and only collects on all others; the ports a_in on both sides are one.",
        "A synapse sends on what its source fired so many ticks before. What arrives at one port adds up.",
    ]
    if graph.has_phase("feedback"):
        lines += [
            "In the forward phase nothing leaves by b_out, in the feedback phase nothing by s_out: the synapses behind it are idle then.",
            "The mask is 1 where a couple fired in some but not in all time steps of the forward phase.",
        ]
    return lines


STYLE = """
text { font-family: "DejaVu Sans", Verdana, sans-serif; font-size: 10px; fill: #4d4d4d }
.page { fill: #ffffff } .title { font-size: 15px; font-weight: bold; fill: #222222 } .name { font-size: 11px; font-weight: bold; fill: #222222 }
.box { fill: #f3f6f9; stroke: #5f6b76; stroke-width: 1.3 } .relay { fill: #ffffff }
.synapse { fill: #ffffff } .wire { fill: none; stroke-width: 1.4 } .forward { stroke: #0072B2 } .feedback { stroke: #C04F00 }
text.forward { fill: #005b8e; stroke: none } text.feedback { fill: #a34300; stroke: none } .dot.forward, .head.forward { fill: #0072B2; stroke: none }
.dot.feedback, .head.feedback { fill: #C04F00; stroke: none }
@media (prefers-color-scheme: dark) {
text { fill: #b9c1c9 } .page { fill: #14181d } .title, .name { fill: #f0f2f4 } .box { fill: #222b34; stroke: #8b98a5 }
.relay, .synapse { fill: #14181d } .forward { stroke: #56B4E9 } .feedback { stroke: #F0A050 } text.forward { fill: #7cc6f0 } text.feedback { fill: #f3b478 }
.dot.forward, .head.forward { fill: #56B4E9 } .dot.feedback, .head.feedback { fill: #F0A050 } }
"""
"""Okabe and Ito's blue and vermilion, told apart with every kind of colour vision; the side of the picture says the same."""


def draw(graph: Graph) -> bytes:
    """The picture as SVG; the same graph gives the same bytes."""
    picture = layout(graph)
    size = f'width="{picture.width:g}" height="{picture.height:g}" viewBox="0 0 {picture.width:g} {picture.height:g}"'
    parts = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{escape(picture.title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{picture.width:g}" height="{picture.height:g}"/>',
        *(_painted_wire(wire) for wire in picture.wires),
        *(f'<circle class="dot {phase}" cx="{x:g}" cy="{y:g}" r="2.8"/>' for x, y, phase in picture.dots),
        *(_painted_box(box) for box in picture.boxes),
        *(_painted_word(word) for word in picture.words),
        "</svg>\n",
    ]
    return "\n".join(parts).encode()


def _painted_wire(wire: Wire) -> str:
    """A line that ends in an arrow head."""
    (x0, y0), (x, y) = wire.points[-2:]
    along = 1 if x + y > x0 + y0 else -1
    tip = (
        [(x, y), (x - 7 * along, y - 3.2), (x - 7 * along, y + 3.2)]
        if y == y0
        else [(x, y), (x - 3.2, y - 7 * along), (x + 3.2, y - 7 * along)]
    )
    line = " ".join(f"{a:g},{b:g}" for a, b in wire.points)
    head = " ".join(f"{a:g},{b:g}" for a, b in tip)
    return f'<polyline class="wire {wire.phase}" points="{line}"/><polygon class="head {wire.phase}" points="{head}"/>'


def _painted_box(box: Box) -> str:
    round_corner = 16 if box.kind == "relay" else 4
    kinds = f"box {box.kind}" + (f" {box.phase}" if box.phase else "")
    shape = f'<rect class="{kinds}" x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" rx="{round_corner}"/>'
    first = box.y + (box.height - LINE * len(box.text)) / 2 + LINE - 3
    middle = box.x + box.width / 2
    words = [
        Word(line, middle, first + LINE * i, "middle", "name" if i == 0 and box.kind != "synapse" else box.phase or "plain")
        for i, line in enumerate(box.text)
    ]
    return shape + "".join(map(_painted_word, words))


def _painted_word(word: Word) -> str:
    return f'<text class="{word.kind}" x="{word.x:g}" y="{word.y:g}" text-anchor="{word.anchor}">{escape(word.text)}</text>'
