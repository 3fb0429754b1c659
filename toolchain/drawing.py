"""A graph as a picture: populations as boxes in the order in which they act, what connects them as lines, a panel for each phase.

`layout` decides where everything goes, in plain numbers that a test can check; `draw` paints that. Columns are depths (the longest way within the time
step), which wrap into rows like lines of text. A connection to the next column is a straight arrow; one that skips columns runs above its row, one
that leads back runs below, and one that leaves its row goes on in another: right of the rows where it leads on, left of them where it leads back.
Every such connection has a lane of its own, wide enough for its label. Lengths are points (1/72 inch), y grows downwards.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from math import ceil, inf
from typing import TYPE_CHECKING, Any

from toolchain.ir import Graph, Op, Phase
from toolchain.notation import cut, geometry, size, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]

BOX_WIDTH, BOX_HEIGHT = 96.0, 54.0
GAP = 92.0
"""Between two columns: room for an arrow and its label."""
STACK_GAP = 16.0
"""Between boxes of one column."""
LANE = 17.0
"""Height of a lane: its label and its line."""
MARGIN = 26.0
SIDE = 9.0
"""Distance of the lines that run from row to row, right and left of the rows."""
TITLE, TITLE_LETTER = 26.0, 8.2
PITCH = BOX_WIDTH + GAP
FEWEST, MOST, FEWEST_LAST = 6, 10, 3
"""Columns of a row, where a phase needs more than one."""

LETTER, LINE = 5.1, 9.2
"""At most so wide is a letter of a label on average, and so high a line of it (7.5 point type)."""
LABEL_SIZE, NAME_SIZE = 7.5, 8.5
GAP_LETTERS, GAP_LINES = 16, 6
LANE_LETTERS = 60
PANEL_LETTER = 6.8
NAME_LETTERS = 16

INK, QUIET = "#333333", "#666666"
FILL = {"couple": "#d6e6f4", "relay": "#ffffff", "input": "#e8e8e8", "readout": "#d8efd9", "host": "#ffffff"}
EDGE = {"couple": "#0072B2", "relay": "#D55E00", "input": "#666666", "readout": "#009E73", "host": "#999999"}
LINES = {"chain": "#333333", "skip": "#D55E00", "loop": "#0072B2"}
"""Okabe and Ito's colours, told apart with every kind of colour vision; where a line runs says the same."""


@dataclass(frozen=True)
class Box:
    """A population, or what the host sends (`kind` "host"): its left upper corner, its size, and what is written in it, the name first."""

    name: str
    kind: str
    text: tuple[str, ...]
    x: float
    y: float
    row: int
    column: int
    width: float = BOX_WIDTH
    height: float = BOX_HEIGHT


@dataclass(frozen=True)
class Label:
    """Lines of text in the rectangle with left upper corner (x, y)."""

    text: tuple[str, ...]
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Wire:
    """A connection: a chain of straight pieces that ends in an arrow head. `kind` is chain, skip or loop."""

    source: str
    target: str
    kind: str
    points: tuple[Point, ...]
    labels: tuple[Label, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One phase, drawn from (0, 0) on."""

    title: str
    width: float
    height: float
    boxes: tuple[Box, ...]
    wires: tuple[Wire, ...]


@dataclass(frozen=True)
class _Edge:
    """A connection before it has a place."""

    source: str
    target: str
    words: tuple[str, ...]
    back: bool


def layout(graph: Graph) -> tuple[Panel, ...]:
    """Where everything goes: a panel a phase, the forward phase first."""
    return tuple(_Panel(graph, phase).made() for phase in graph.phases)


class _Panel:
    """One phase, placed step by step: columns, rows, lanes, heights, lines."""

    def __init__(self, graph: Graph, phase: Phase) -> None:
        self.graph, self.phase = graph, phase
        self.hosts = {drive.population: f"host -> {drive.population}" for drive in phase.drive}
        self.names = [name for p in phase.order for name in ([self.hosts[p]] if p in self.hosts else []) + [p]]
        self.edges = self._edges()
        self.column = self._columns()
        stacks: dict[int, list[str]] = defaultdict(list)
        for name in self.names:
            stacks[self.column[name]].append(name)
        self.stacks = [stacks[depth] for depth in range(len(stacks))]
        self.starts = _rows(len(self.stacks), [(self.column[e.source], self.column[e.target]) for e in self.edges])
        self.row = {name: sum(start <= self.column[name] for start in self.starts) - 1 for name in self.names}
        self.straight = self._straight()
        self.lanes: dict[tuple[str, int], list[list[tuple[float, float]]]] = defaultdict(list)
        self.exits: dict[tuple[str, str], int] = defaultdict(int)

    def made(self) -> Panel:
        routes = [None if i in self.straight else self._route(edge) for i, edge in enumerate(self.edges)]
        left = MARGIN + SIDE * len(self.lanes["left", 0])
        tops = self._tops()
        boxes = {name: self._box(name, left, tops) for name in self.names}
        wires = [
            self._arrow(edge, boxes) if route is None else self._around(edge, route, left, tops, boxes)
            for edge, route in zip(self.edges, routes, strict=True)
        ]
        inner = max([self._row_width(), *(label.x + label.width - left for wire in wires for label in wire.labels)])
        bottom = tops[-1] + self._row_height(len(self.starts) - 1) + LANE * len(self.lanes["below", len(self.starts) - 1])
        width = max(left + inner + SIDE * len(self.lanes["right", 0]) + MARGIN, 2 * MARGIN + PANEL_LETTER * len(self._title()))
        return Panel(self._title(), width, bottom + MARGIN, tuple(boxes.values()), tuple(wires))

    def _title(self) -> str:
        timing = self.phase.timing
        ticks = "" if timing.mode == "step" else f", {timing.mode} timing, {self.phase.ticks:,} ticks"
        return f"{self.phase.name} phase, {self.phase.time_steps} time steps{ticks}"

    def _edges(self) -> list[_Edge]:
        place = {name: i for i, name in enumerate(self.phase.order)}
        found = []
        for drive in self.phase.drive:
            words = _words(self.graph, drive.ops) if drive.ops else ("the error",)
            found.append(_Edge(self.hosts[drive.population], drive.population, words, False))
        for synapse in self.phase.synapses:
            back = place[synapse.source] >= place[synapse.target]
            words = _words(self.graph, synapse.ops)
            timed = self.phase.timing.mode != "step"
            words += ("1 step late",) if back or (synapse.delay and not timed) else ()
            words += (f"{synapse.delay} ticks",) if timed and synapse.delay > 1 else ()
            words += ("gated",) if synapse.gate is not None else ()
            found.append(_Edge(synapse.source, synapse.target, words, back))
        return found

    def _columns(self) -> dict[str, int]:
        """The longest way to each population along connections that lead on; what the host sends stands right before its population."""
        depth = dict.fromkeys(self.names, 0)
        for name in self.names:
            for edge in self.edges:
                if edge.target == name and not edge.back:
                    depth[name] = max(depth[name], depth[edge.source] + 1)
        for population, host in self.hosts.items():
            depth[host] = depth[population] - 1
        present = {d: i for i, d in enumerate(sorted(set(depth.values())))}
        return {name: present[d] for name, d in depth.items()}

    def _straight(self) -> set[int]:
        """Connections that are drawn as one arrow to the next column: at most one leaves a box so, and one enters it."""
        taken: set[tuple[str, str]] = set()
        found = set()
        last = len(self.hosts)  # what the host sends gives way: its edges come first, and are looked at last
        for i, edge in [*enumerate(self.edges)][last:] + [*enumerate(self.edges)][:last]:
            near = (
                not edge.back
                and self.row[edge.source] == self.row[edge.target]
                and self.column[edge.target] == self.column[edge.source] + 1
            )
            ends = {("out", edge.source), ("in", edge.target)}
            if near and not ends & taken:
                taken |= ends
                found.add(i)
        return found

    # ---- lanes

    def _route(self, edge: _Edge) -> _Route:
        """Lanes for a connection that runs around boxes, and the places where it leaves and enters."""
        rows = self.row[edge.source], self.row[edge.target]
        band = "below" if edge.back else "above"
        leaves, enters = self._port(edge.source, edge, band, "out"), self._port(edge.target, edge, band, "in")
        text = cut(", ".join(edge.words), LANE_LETTERS)
        wide = LETTER * len(text) + 12
        if rows[0] == rows[1]:
            low, high = sorted((leaves, enters))
            middle = max((low + high) / 2, wide / 2 - MARGIN / 2)
            lane = self._lane(band, rows[0], min(low, middle - wide / 2), max(high, middle + wide / 2))
            return _Route(band, (lane,), leaves, enters, text, middle, None)
        side = "left" if edge.back else "right"
        beside = self._lane(side, 0, min(rows), max(rows), 0.5)
        first = self._lane(band, rows[0], *self._reach(leaves, side, 0))
        place = self.column[edge.target] - self.starts[rows[1]]
        beyond = PITCH * place + BOX_WIDTH + 6  # behind the box, where nothing else comes down
        before = side == "left" or place == len(self._stacks_of(rows[1])) - 1
        middle = max(enters - wide / 2, wide / 2 - MARGIN / 2) if before else beyond + wide / 2
        low, high = self._reach(enters, side, wide)
        second = self._lane(band, rows[1], min(low, middle - wide / 2), max(high, middle + wide / 2))
        return _Route(band, (first, second), leaves, enters, text, middle, 1 + beside)

    def _reach(self, at: float, side: str, wide: float) -> tuple[float, float]:
        """The piece of a lane between `at` and the side of the rows, at least as wide as a label."""
        if side == "left":
            return -inf, max(at, wide)
        return at, inf

    def _lane(self, band: str, row: int, low: float, high: float, apart: float = 16) -> int:
        """The first lane (counted from the boxes) in which nothing lies between `low` and `high`, nor nearer than `apart`."""
        lanes = self.lanes[band, row]
        for i, taken in enumerate(lanes):
            if all(high + apart < a or b + apart < low for a, b in taken):
                taken.append((low, high))
                return i
        lanes.append([(low, high)])
        return len(lanes) - 1

    def _port(self, name: str, edge: _Edge, band: str, way: str) -> float:
        """Where (from the left end of the rows) a connection leaves or enters: at the box where it is the outermost of its column, else beside the column."""
        stack = self.stacks[self.column[name]]
        at = PITCH * (self.column[name] - self.starts[self.row[name]])
        self.exits[name, band + way] += 1
        turn = self.exits[name, band + way] - 1
        if name == (stack[0] if band == "above" else stack[-1]):
            share = min(0.12 + 0.11 * turn, 0.45)
            return at + BOX_WIDTH * (1 - share if way == "out" else share)
        return at + BOX_WIDTH + 8 + 5 * (turn % 4) if way == "out" else at - 8 - 5 * (turn % 4)

    # ---- places

    def _row_height(self, row: int) -> float:
        highest = max(len(stack) for stack in self._stacks_of(row))
        return highest * BOX_HEIGHT + (highest - 1) * STACK_GAP

    def _stacks_of(self, row: int) -> list[list[str]]:
        end = self.starts[row + 1] if row + 1 < len(self.starts) else len(self.stacks)
        return self.stacks[self.starts[row] : end]

    def _row_width(self) -> float:
        return max(PITCH * len(self._stacks_of(row)) for row in range(len(self.starts))) - GAP

    def _tops(self) -> list[float]:
        """The upper edge of each row's boxes."""
        tops: list[float] = []
        below = MARGIN + TITLE
        for row in range(len(self.starts)):
            tops.append(below + LANE * len(self.lanes["above", row]))
            below = tops[-1] + self._row_height(row) + LANE * len(self.lanes["below", row]) + 1.5 * LANE
        return tops

    def _box(self, name: str, left: float, tops: Sequence[float]) -> Box:
        row, column = self.row[name], self.column[name]
        stack = self.stacks[column]
        spare = self._row_height(row) - len(stack) * BOX_HEIGHT - (len(stack) - 1) * STACK_GAP
        x = left + PITCH * (column - self.starts[row])
        y = tops[row] + spare / 2 + stack.index(name) * (BOX_HEIGHT + STACK_GAP)
        return Box(name, *self._writing(name), x, y, row, column)

    def _writing(self, name: str) -> tuple[str, tuple[str, ...]]:
        """The kind of box, and what is written in it."""
        for drive in self.phase.drive:
            if name == self.hosts[drive.population]:
                shape = self.graph.of_kind("input")[0].shape if drive.source == "input" else self.graph.population(drive.population).shape
                return "host", (drive.source, size(shape), "sent by the host")
        population = self.graph.population(name)
        kind = "relay" if population.kind == "linear" else population.kind
        signed = kind == "couple" and self.phase.dynamics[name].members == "both"
        lines = [cut(name, NAME_LETTERS), size(population.shape), kind + ", events" * population.events + ", signed" * signed]
        if self.graph.placement is not None and kind != "input":
            cores = sum(any(part.population == name for part in core.slices) for core in self.graph.placement.cores)
            lines.append(f"{cores:,} core{'s' * (cores != 1)}" if cores else "on the host")
        return kind, tuple(lines)

    def _arrow(self, edge: _Edge, boxes: Mapping[str, Box]) -> Wire:
        """A straight arrow to the next column, its label half above and half below it."""
        one, two = boxes[edge.source], boxes[edge.target]
        start, end = (one.x + one.width, one.y + one.height / 2), (two.x, two.y + two.height / 2)
        lines = wrapped(edge.words, GAP_LETTERS, GAP_LINES)
        above = ceil(len(lines) / 2)
        middle, centre = end[1], two.x - GAP / 2  # at the height of its target: no two arrows end at one
        labels = []
        for part, y in ((lines[:above], middle - 3 - LINE * above), (lines[above:], middle + 3)):
            if part:
                wide = LETTER * max(map(len, part))
                labels.append(Label(part, centre - wide / 2, y, wide, LINE * len(part)))
        return Wire(edge.source, edge.target, "chain", (start, end), tuple(labels))

    def _around(self, edge: _Edge, route: _Route, left: float, tops: Sequence[float], boxes: Mapping[str, Box]) -> Wire:
        """A connection along its lanes."""
        rows = self.row[edge.source], self.row[edge.target]
        heights = [
            self._height(route.band, row, lane, tops) for row, lane in zip(rows if route.side else rows[:1], route.lanes, strict=True)
        ]
        out, into = left + route.leaves, left + route.enters
        points = [*self._end(boxes[edge.source], out, route.band, "out"), (out, heights[0])]
        if route.side is not None:
            x = left + self._row_width() + SIDE * route.side if route.band == "above" else left - SIDE * route.side
            points += [(x, heights[0]), (x, heights[1])]
        points += [(into, heights[-1]), *reversed(self._end(boxes[edge.target], into, route.band, "in"))]
        wide = LETTER * len(route.text)
        label = Label((route.text,), left + route.middle - wide / 2, heights[-1] + (3 if edge.back else -3 - LINE), wide, LINE)
        following = route.side and self.column[edge.target] == self.column[edge.source] + 1
        kind = "loop" if edge.back else "chain" if following or edge.source in self.hosts.values() else "skip"
        return Wire(edge.source, edge.target, kind, tuple(points), (label,))

    def _height(self, band: str, row: int, lane: int, tops: Sequence[float]) -> float:
        if band == "above":
            return tops[row] - 5 - LANE * lane
        return tops[row] + self._row_height(row) + 8 + LANE * lane

    def _end(self, box: Box, x: float, band: str, way: str) -> list[Point]:
        """From a box to the vertical piece at `x`: from its edge, or out of its side first."""
        if box.x < x < box.x + box.width:
            return [(x, box.y if band == "above" else box.y + box.height)]
        y = box.y + box.height * (0.25 if band == "above" else 0.75)
        return [(box.x + box.width if way == "out" else box.x, y), (x, y)]


@dataclass(frozen=True)
class _Route:
    """Lanes of a connection, in the source's and the target's row where these differ; x from the left end of the rows; `side` counts lines beside them."""

    band: str
    lanes: tuple[int, ...]
    leaves: float
    enters: float
    text: str
    middle: float
    side: int | None


def _rows(columns: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """The first column of each row: of `FEWEST` to `MOST` columns (the last from `FEWEST_LAST`), so that they cut the fewest connections, then the fewest rows."""
    if columns <= MOST:
        return [0]
    severed = [sum(min(a, b) < start <= max(a, b) for a, b in edges) for start in range(columns)]
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [])}
    for start in range(1, columns + 1):
        least = FEWEST_LAST if start == columns else FEWEST
        options = [(*best[before][:2], before) for before in range(start - MOST, start - least + 1) if before in best]
        if options:
            cost, rows, before = min(options)
            best[start] = (cost + (severed[start] if start < columns else 0), rows + 1, [*best[before][2], before])
    return best[columns][2]


def _words(graph: Graph, ops: Sequence[Op]) -> tuple[str, ...]:
    return tuple(geometry(graph, op) for op in ops) or ("as it is",)


def draw(graph: Graph) -> bytes:
    """The picture as SVG; the same graph gives the same bytes."""
    return render(graph, "svg")


def render(graph: Graph, form: str) -> bytes:
    """The picture as "svg" or "png"."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = layout(graph)
    title = f"{graph.provenance.model}: {graph.units.numbers} graph, {' -> '.join(graph.provenance.passes) or 'lowered'}"
    width = max([*(panel.width for panel in panels), 2 * MARGIN + TITLE_LETTER * len(title)])
    height = sum(panel.height for panel in panels) + TITLE
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.family": "DejaVu Sans", "svg.hashsalt": "fsnn-toolchain", "text.parse_math": False})
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script the font lacks is drawn as boxes, not refused
        figure = Figure(figsize=(width / 72, height / 72))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.text(MARGIN, TITLE, title, fontsize=12, color=INK, weight="bold")
        top = TITLE
        for panel in panels:
            _paint(axes, panel, top)
            top += panel.height
        made = BytesIO()
        metadata: dict[str, Any] = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
        figure.savefig(made, format=form, dpi=100, metadata=metadata)
    return made.getvalue()


def _paint(axes: Axes, panel: Panel, top: float) -> None:
    """One panel, `top` points below the upper edge: lines first, then boxes, then what is written."""
    from matplotlib.patches import FancyBboxPatch

    axes.text(MARGIN, top + TITLE, panel.title, fontsize=10, color=QUIET)
    for wire in panel.wires:
        _paint_wire(axes, wire, top)
    for box in panel.boxes:
        style = "round,pad=0,rounding_size=12" if box.kind == "relay" else "round,pad=0,rounding_size=3"
        dashed = (0, (3, 2)) if box.kind == "host" else "solid"
        axes.add_patch(
            FancyBboxPatch(
                (box.x, box.y + top),
                box.width,
                box.height,
                style,
                facecolor=FILL[box.kind],
                edgecolor=EDGE[box.kind],
                linestyle=dashed,
                linewidth=1.2,
                zorder=3,
            )
        )
        for i, line in enumerate(box.text):
            y = top + box.y + box.height * (i + 0.75) / (len(box.text) + 0.5)
            weight, fontsize, colour = ("bold", NAME_SIZE, INK) if i == 0 else ("normal", LABEL_SIZE, QUIET)
            axes.text(box.x + box.width / 2, y, line, ha="center", va="center", weight=weight, fontsize=fontsize, color=colour, zorder=4)


def _paint_wire(axes: Axes, wire: Wire, top: float) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    colour = LINES[wire.kind]
    path = Path(*_rounded([(x, y + top) for x, y in wire.points], Path))
    axes.add_patch(FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=8, linewidth=1.1, color=colour, fill=False, zorder=1))
    for label in wire.labels:
        for i, line in enumerate(label.text):
            axes.text(
                label.x + label.width / 2,
                top + label.y + LINE * (i + 0.5),
                line,
                ha="center",
                va="center",
                fontsize=LABEL_SIZE,
                color=colour,
                zorder=2,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.9},
            )


def _rounded(points: Sequence[Point], path: Any, radius: float = 7.0) -> tuple[list[Point], list[int]]:
    """A chain of pieces with its corners rounded off, as matplotlib's vertices and codes."""
    vertices, codes = [points[0]], [path.MOVETO]
    for (before, corner), (_, after) in pairwise(pairwise(points)):
        vertices += [_towards(corner, before, radius), corner, _towards(corner, after, radius)]
        codes += [path.LINETO, path.CURVE3, path.CURVE3]
    return [*vertices, points[-1]], [*codes, path.LINETO]


def _towards(start: Point, end: Point, length: float) -> Point:
    """The point `length` from `start` on the way to `end`, at most half way."""
    whole = abs(end[0] - start[0]) + abs(end[1] - start[1])
    share = min(length / whole, 0.5) if whole else 0.0
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])
