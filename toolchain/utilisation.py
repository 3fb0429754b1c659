"""How full the cores of a placement are, what crosses between chips, and both as a picture."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import ceil, prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from toolchain import limits
from toolchain.errors import GraphError
from toolchain.files import replace_file
from toolchain.ir import Graph
from toolchain.limits import Limits
from toolchain.notation import size, table
from toolchain.wiring import INPUTS, MEMORY, NEURONS, OUTPUTS, Box, Costs, Wiring, box, image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CoreUse", "PopulationUse", "Traffic", "Utilisation", "utilisation"]

RESOURCES = ("neurons", "memory_bits", "input_axons", "output_axons")
"""In the order of `wiring`'s columns."""

WORDS = ("neurons", "memory", "input axons", "output axons")

MOST_ROWS = 12
"""Chips and pairs of chips that the text lists."""

DETAILED_CHIPS = 12
"""More chips than these are drawn as wholes, without their cores."""

FIRST, LAST = 0.08, 0.92
"""Where on the ramp of colours the first and the last population lie."""

NAMED = 16
"""More populations than these have a scale in place of a legend."""


@dataclass(frozen=True)
class CoreUse:
    """One core: neurons (of the chip) by population, and what they and their connections take."""

    chip: int
    core: int
    populations: Mapping[str, int]
    neurons: int
    memory_bits: int
    input_axons: int
    output_axons: int


@dataclass(frozen=True)
class PopulationUse:
    """One population: neurons of the chip, how many slices it is cut into, the shape of the largest, and the most that one of them takes."""

    name: str
    shape: tuple[int, ...]
    neurons: int
    slices: int
    slice_shape: tuple[int, ...]
    cores: int
    memory_bits: int
    input_axons: int
    output_axons: int


@dataclass(frozen=True)
class Traffic:
    """What one chip sends another (`source` None: the host): neurons with a target there, and the messages of a time step in which all of them fire, in
    the busier phase."""

    source: int | None
    target: int
    axons: int
    spikes: int


@dataclass(frozen=True)
class Utilisation:
    """A placement in numbers."""

    model: str
    limits: Limits
    cores: tuple[CoreUse, ...]
    populations: tuple[PopulationUse, ...]
    traffic: tuple[Traffic, ...]
    host: tuple[str, ...]

    @property
    def most(self) -> dict[str, int]:
        """What a core holds of each resource."""
        found = self.limits
        return dict(
            zip(
                RESOURCES, (found.neurons_per_core.value, found.memory_bits, found.input_axons.value, found.output_axons.value), strict=True
            )
        )

    @property
    def chips(self) -> int:
        return 1 + max((core.chip for core in self.cores), default=-1)

    def share(self, core: CoreUse) -> dict[str, float]:
        """Each resource as a share of what a core holds."""
        return {name: getattr(core, name) / most for name, most in self.most.items()}

    def fullest(self, core: CoreUse) -> float:
        """The share of the resource that a core has least left of."""
        return max(self.share(core).values())

    def to_json(self) -> dict[str, Any]:
        return {
            "chip": self.limits.chip,
            "limits": _limits_json(self.limits),
            "totals": {
                "chips": self.chips,
                "boards": ceil(self.chips / self.limits.chips_per_board.value),
                "cores": len(self.cores),
                **{name: sum(getattr(core, name) for core in self.cores) for name in RESOURCES},
                "axons_between_chips": sum(t.axons for t in self.traffic if t.source is not None),
                "spikes_between_chips": sum(t.spikes for t in self.traffic if t.source is not None),
            },
            "on_host": list(self.host),
            "populations": [
                {
                    "name": p.name,
                    "shape": list(p.shape),
                    "neurons": p.neurons,
                    "slices": p.slices,
                    "slice_shape": list(p.slice_shape),
                    "cores": p.cores,
                    **{f"most_{name}": getattr(p, name) for name in RESOURCES[1:]},
                }
                for p in self.populations
            ],
            "chips": [self._chip_json(chip, cores) for chip, cores in enumerate(self.by_chip())],
            "cores": [
                {
                    "chip": core.chip,
                    "core": core.core,
                    "populations": dict(core.populations),
                    **{name: getattr(core, name) for name in RESOURCES},
                    "shares": self.share(core),
                }
                for core in self.cores
            ],
            "traffic": [{"source": t.source, "target": t.target, "axons": t.axons, "spikes": t.spikes} for t in self.traffic],
        }

    def to_text(self) -> str:
        boards = ceil(self.chips / self.limits.chips_per_board.value)
        neurons = sum(core.neurons for core in self.cores)
        lines = [
            f"on {self.limits.chip}: {_count(len(self.cores), 'core')} of {_count(self.chips, 'chip')} ({_count(boards, 'board')}), "
            f"{neurons:,} neurons" + "".join(f"; readout '{name}' on the host" for name in self.host),
            *table(
                ["population", "shape", "neurons", "cores", "slice", *(f"most {word}" for word in WORDS[1:])],
                map(self._row, self.populations),
            ),
            "",
            *table(["chip", "cores", *(f"{word} %" for word in WORDS), "fullest core %"], self._chip_rows()),
        ]
        left = self.chips - MOST_ROWS
        lines += [f"and {_count(left, 'more chip')}, like the others in --json"] if left > 0 else []
        return "\n".join([*lines, *self._traffic_lines()])

    def _row(self, population: PopulationUse) -> list[str]:
        shares = [f"{getattr(population, name) / self.most[name]:.0%}" for name in RESOURCES[1:]]
        return [
            population.name,
            size(population.shape),
            f"{population.neurons:,}",
            f"{population.cores:,}",
            size(population.slice_shape),
            *shares,
        ]

    def _chip_rows(self) -> list[list[str]]:
        rows = []
        for chip, cores in enumerate(self.by_chip()[:MOST_ROWS]):
            told = self._chip_json(chip, cores)
            shares = [f"{100 * told['shares'][name]:.1f}" for name in RESOURCES]
            rows.append([str(chip), str(len(cores)), *shares, f"{100 * told['fullest_core']:.1f}"])
        return rows

    def _traffic_lines(self) -> list[str]:
        between = [t for t in self.traffic if t.source is not None]
        if not between:
            return []
        busiest = sorted(between, key=lambda t: (-t.spikes, t.source, t.target))[:MOST_ROWS]
        rest = len(between) - len(busiest)
        return [
            "",
            f"between chips: {sum(t.axons for t in between):,} axons, at most {sum(t.spikes for t in between):,} spikes a time step",
            *table(
                ["from chip", "to chip", "axons", "spikes a step, at most"],
                [[str(t.source), str(t.target), f"{t.axons:,}", f"{t.spikes:,}"] for t in busiest],
            ),
            *([f"and {_count(rest, 'more pair')} of chips"] if rest > 0 else []),
        ]

    def by_chip(self) -> list[list[CoreUse]]:
        """The cores of each chip."""
        found: list[list[CoreUse]] = [[] for _ in range(self.chips)]
        for core in self.cores:
            found[core.chip].append(core)
        return found

    def _chip_json(self, chip: int, cores: Sequence[CoreUse]) -> dict[str, Any]:
        """Sums over a chip's cores, as shares of all its cores; what the fullest one has used."""
        sums = {name: sum(getattr(core, name) for core in cores) for name in RESOURCES}
        every = self.limits.cores_per_chip.value
        return {
            "chip": chip,
            "cores": len(cores),
            **sums,
            "shares": {name: value / (every * self.most[name]) for name, value in sums.items()},
            "fullest_core": max(map(self.fullest, cores), default=0.0),
        }


def _limits_json(chip: Limits) -> dict[str, Any]:
    named = {
        **dict.fromkeys(RESOURCES),
        "neurons": chip.neurons_per_core,
        "input_axons": chip.input_axons,
        "output_axons": chip.output_axons,
    }
    told = {name: {"value": limit.value, "source": limit.source} for name, limit in named.items() if limit is not None}
    memory = {
        "value": chip.memory_bits,
        "source": f"{chip.core_memory_bits.source}; less {chip.reserved_memory_bits.value:,} bits: {chip.reserved_memory_bits.source}",
    }
    return {**told, "memory_bits": memory, "cores_per_chip": {"value": chip.cores_per_chip.value, "source": chip.cores_per_chip.source}}


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("s" if number != 1 else "")


def utilisation(graph: Graph) -> Utilisation:
    """How a graph uses the cores it is placed on; GraphError where it has no placement."""
    if graph.placement is None:
        raise GraphError(f"the graph of '{graph.provenance.model}' is on no cores: run partition")
    chip = limits.load(graph.placement.chip)
    parts: dict[str, list[Box]] = {}
    places: dict[str, list[int]] = {}
    for number, core in enumerate(graph.placement.cores):
        for part in core.slices:
            parts.setdefault(part.population, []).append(box(part))
            places.setdefault(part.population, []).append(number)
    host = tuple(population.name for population in graph.of_kind("readout") if population.name not in parts)
    costs = Costs(graph, chip, host)
    spent = costs.table(parts)
    total = np.zeros((len(graph.placement.cores), 4), np.int64)
    held: list[dict[str, int]] = [{} for _ in graph.placement.cores]
    for name, numbers in places.items():
        np.add.at(total, numbers, spent[name])
        for number, neurons in zip(numbers, spent[name][:, NEURONS].tolist(), strict=True):
            held[number][name] = held[number].get(name, 0) + neurons
    cores = tuple(
        CoreUse(core.chip, core.core, populations, *row)
        for core, populations, row in zip(graph.placement.cores, held, total.tolist(), strict=True)
    )
    chips = {name: np.array([graph.placement.cores[number].chip for number in numbers]) for name, numbers in places.items()}
    return Utilisation(
        graph.provenance.model,
        chip,
        cores,
        tuple(_population_use(graph, name, parts[name], places[name], spent[name]) for name in costs.placed),
        _Crossings(costs, parts, chips).traffic(),
        host,
    )


def _population_use(graph: Graph, name: str, parts: Sequence[Box], numbers: Sequence[int], spent: npt.NDArray[np.int64]) -> PopulationUse:
    shape = graph.population(name).shape
    largest = max(parts, key=lambda part: prod(stop - start for start, stop in part))
    lengths = tuple(stop - start for start, stop in largest)
    return PopulationUse(
        name,
        shape,
        int(spent[:, NEURONS].sum()),
        len(parts),
        (*lengths[:2], *shape[2:]) if len(shape) > 3 else lengths[: len(shape)],
        len(set(numbers)),
        int(spent[:, MEMORY].max()),
        int(spent[:, INPUTS].max()),
        int(spent[:, OUTPUTS].max()),
    )


class _Crossings:
    """Counts what crosses between chips: of every synapse, the source positions that feed each chip's part of the target."""

    def __init__(self, costs: Costs, parts: Mapping[str, Sequence[Box]], chips: Mapping[str, npt.NDArray[np.int64]]) -> None:
        self.costs, self.parts, self.chips = costs, parts, chips
        self.axons: dict[tuple[int, int], int] = {}
        self.spikes: dict[tuple[str, int, int], int] = {}

    def traffic(self) -> tuple[Traffic, ...]:
        for wiring in self.costs.wirings:
            self._count(wiring)
        found = []
        for source, target in sorted(self.axons):
            spikes = max(self.spikes.get((phase.name, source, target), 0) for phase in self.costs.graph.phases)
            found.append(Traffic(None if source < 0 else source, target, self.axons[source, target], spikes))
        return tuple(found)

    def _count(self, wiring: Wiring) -> None:
        """Add one synapse. What the host sends comes from chip -1, in one piece."""
        sources, at = self.parts.get(wiring.source), self.chips.get(wiring.source)
        if sources is None or at is None:
            sources, at = [Box(*((0, n) for n in image(self.costs.graph.population(wiring.source).shape)))], np.array([-1])
        by_chip: dict[int, list[Box]] = {}
        for part, there in zip(self.parts[wiring.target], self.chips[wiring.target].tolist(), strict=True):
            by_chip.setdefault(there, []).append(part)
        # Where channels have groups, slices of different channels feed different ones.
        bands: dict[tuple[int, int] | None, list[int]] = {}
        for i, part in enumerate(sources):
            bands.setdefault(part.channels if wiring.groups > 1 else None, []).append(i)
        for band, chosen in bands.items():
            for chip, targets in by_chip.items():
                listening = [part for part in targets if band is None or _meets(wiring.sources(part.channels), band)]
                if listening:
                    self._add(wiring, [sources[i] for i in chosen], at[chosen], chip, _listened(wiring, listening))

    def _add(self, wiring: Wiring, sources: Sequence[Box], at: npt.NDArray[np.int64], chip: int, listened: npt.NDArray[np.int64]) -> None:
        """Add the neurons of `sources` that feed `chip`; `listened` counts slices there by source position."""
        neurons = _sums(listened > 0, sources)
        messages = neurons if self.costs.limits.broadcast.value else _sums(listened, sources)
        for source in np.unique(at).tolist():
            if source != chip and (axons := int(neurons[at == source].sum())):
                self.axons[source, chip] = self.axons.get((source, chip), 0) + axons * wiring.senders
                key = (wiring.phase, source, chip)
                self.spikes[key] = self.spikes.get(key, 0) + int(messages[at == source].sum())


def _meets(first: tuple[int, int], second: tuple[int, int]) -> bool:
    return first[0] < second[1] and second[0] < first[1]


def _listened(wiring: Wiring, targets: Sequence[Box]) -> npt.NDArray[np.int64]:
    """How many of `targets` listen to each source position, (rows, columns)."""
    down = np.stack([wiring.rows.reached(part.rows) for part in targets]).astype(np.float64)
    across = np.stack([wiring.columns.reached(part.columns) for part in targets]).astype(np.float64)
    found: npt.NDArray[np.int64] = np.rint(down.T @ across).astype(np.int64)
    return found


def _sums(listened: npt.NDArray[Any], sources: Sequence[Box]) -> npt.NDArray[np.int64]:
    """The sum over the positions of each source slice, times its channels."""
    sums = np.zeros((listened.shape[0] + 1, listened.shape[1] + 1), np.int64)
    sums[1:, 1:] = listened.cumsum(axis=0).cumsum(axis=1)
    (top, bottom), (left, right), (first, last) = (np.array([part[axis] for part in sources]).T for axis in (1, 2, 0))
    found: npt.NDArray[np.int64] = (sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]) * (last - first)
    return found


def draw(use: Utilisation, path: Path) -> None:
    """Write the picture of a placement to `path`, in the format of its ending (.svg or .png)."""
    replace_file(path, render(use, path.suffix.lstrip(".") or "svg"))


def render(use: Utilisation, form: str = "svg") -> bytes:
    """Every core as a square, as high filled as its scarcest resource is used, in the colours of its populations; of many chips each chip as a square,
    filled with the mean of its cores. Equal placements give equal bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"font.family": "DejaVu Sans", "font.size": 9, "svg.hashsalt": "fsnn-toolchain", "text.parse_math": False}
        )
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        _draw(figure, use)
        made = BytesIO()
        metadata: dict[str, Any] = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
        figure.savefig(made, format=form, dpi=110, metadata=metadata)
    return made.getvalue()


def _draw(figure: Figure, use: Utilisation) -> None:
    colours = _colours(use)
    cells = [[_cell(use, colours, [core]) for core in cores] for cores in use.by_chip()]
    wide = ceil(sqrt(use.limits.cores_per_chip.value * 1.2))
    if use.chips > DETAILED_CHIPS:
        cells = [[_cell(use, colours, cores, use.limits.cores_per_chip.value) for cores in use.by_chip()]]
        wide = ceil(sqrt(use.chips * 2))
    used = max(map(len, cells), default=1)
    wide = min(wide, max(8, used))
    high = ceil(used / wide)
    across = min(4, len(cells))
    down = ceil(len(cells) / across)
    figure.set_size_inches(max(6.0, across * wide * 0.21 + 2.4), max(2.4, down * (high * 0.21 + 0.35) + 0.9))
    panels = figure.subplots(down, across, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for chip, (axes, shown) in enumerate(zip(panels.flat, cells, strict=False)):
        _grid(axes, shown, wide, high)
        if len(cells) > 1:
            axes.set_title(f"chip {chip}", fontsize=9, loc="left")
    what = "a square is a core" if use.chips <= DETAILED_CHIPS else "a square is a chip"
    figure.suptitle(
        f"{use.model} on {use.limits.chip}: {_count(len(use.cores), 'core')} of {_count(use.chips, 'chip')}\n{what}, filled as far as its scarcest resource is used",
        fontsize=9.5,
        x=0.01,
        ha="left",
    )
    _legend(figure, colours)


def _colours(use: Utilisation) -> dict[str, Any]:
    """A colour a population, in the network's order along one ramp."""
    from matplotlib import colormaps

    names = [population.name for population in use.populations]
    places = np.linspace(FIRST, LAST, len(names)) if len(names) > 1 else [0.4]
    ramp = {name: np.array(colormaps["viridis"](float(place))[:3]) for name, place in zip(names, places, strict=True)}
    # Of many populations every other one is paler, so that neighbours are told apart.
    pale = 0.35 if len(names) > MOST_ROWS else 0.0
    return {name: tuple(colour + (1 - colour) * pale * (i % 2)) for i, (name, colour) in enumerate(ramp.items())}


def _cell(use: Utilisation, colours: Mapping[str, Any], cores: Sequence[CoreUse], every: int = 1) -> list[tuple[Any, float]]:
    """Colours and heights of one square: how far the cores are used, shared out among populations by their neurons."""
    heights = dict.fromkeys(colours, 0.0)
    for core in cores:
        for name, neurons in core.populations.items():
            heights[name] += use.fullest(core) * neurons / max(1, core.neurons) / every
    return [(colours[name], height) for name, height in heights.items() if height > 0]


def _grid(axes: Axes, cells: Sequence[list[tuple[Any, float]]], wide: int, high: int) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    frames, fills, colours = [], [], []
    for number, cell in enumerate(cells):
        x, y = number % wide, high - 1 - number // wide
        frames.append(Rectangle((x + 0.06, y + 0.06), 0.88, 0.88))
        bottom = y + 0.06
        for colour, height in cell:
            fills.append(Rectangle((x + 0.06, bottom), 0.88, 0.88 * height))
            colours.append(colour)
            bottom += 0.88 * height
    axes.add_collection(PatchCollection(frames, facecolor="#f0f0f0", edgecolor="#bbbbbb", linewidth=0.4))
    axes.add_collection(PatchCollection(fills, facecolor=colours, edgecolor="none"))
    axes.set_xlim(0, wide)
    axes.set_ylim(0, high)
    axes.set_aspect("equal", anchor="NW")


def _legend(figure: Figure, colours: Mapping[str, Any]) -> None:
    from matplotlib.patches import Patch

    names = list(colours)
    if len(names) > NAMED:  # every so many of them: the ramp tells the ones between
        step = ceil(len(names) / (NAMED - 1))
        names = [*names[:-1:step], names[-1]]
    handles = [Patch(facecolor=colours[name], edgecolor="none", label=name if len(name) <= 24 else name[:23] + "…") for name in names]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8, handlelength=1, handleheight=1)
