"""Looks for the pieces into which populations are cut, so that each fits a core, and for a core for each."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from math import inf, prod

import numpy as np
import numpy.typing as npt

from toolchain.ir import Core, Population, Slice
from toolchain.wiring import MEMORY, OUTPUTS, Box, Costs, Cut, Wiring, cut, image

Pieces = tuple[int, int, int]
"""Into how many pieces channels, rows and columns are cut."""

WHOLE: Pieces = (1, 1, 1)

ROUNDS = 40
"""Pieces only get smaller from round to round; a plan that has not settled by then never will."""

SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65)
"""Shares of a core's memory that may be kept for output axons, where they take memory."""

SPARES = (2.0, 1.25, 1.0)
"""How many more pieces of channels than the fewest a plan may choose."""

OPEN_CORES = 12
"""So many of the latest cores may take a further slice."""


class Sizes:
    """What a piece costs at most, by the number of pieces: products of what channels, rows and columns come to, each counted once."""

    def __init__(self, costs: Costs) -> None:
        self.costs, chip = costs, costs.limits
        self.chip = chip
        self.shapes = {name: image(population.shape) for name, population in costs.placed.items()}
        self.most = np.array([chip.neurons_per_core.value, chip.memory_bits, chip.input_axons.value, chip.output_axons.value], np.int64)
        self._known: dict[tuple[object, ...], int] = {}

    def finest(self, name: str) -> Pieces:
        """The most pieces that a population can be cut into: single neurons, but only the first three axes are ever cut."""
        channels, rows, columns = self.shapes[name]
        return channels, rows, 1 if len(self.costs.placed[name].shape) > 3 else columns

    def own(self, name: str, pieces: Pieces) -> tuple[int, int, int]:
        """The most neurons, memory (without output axons) and input axons of a piece."""
        neurons = prod(-(-n // k) for n, k in zip(self.shapes[name], pieces, strict=True)) * self.costs.neurons[name]
        memory, inputs = neurons * self.chip.neuron_state_bits.value, 0
        for wiring in self.costs.into[name]:
            memory += self._memory(wiring, pieces)
            inputs += self._listened(wiring, pieces)
        return neurons, memory, inputs

    def sent(self, name: str, pieces: Pieces, others: Mapping[str, Pieces]) -> int:
        """The most output axons of a piece, for those targets whose pieces are known."""
        known = [(wiring, others[wiring.target]) for wiring in self.costs.out_of[name] if wiring.target in others]
        return sum(
            self._entries(w, pieces[0], to[0]) * self._fed(w, 1, pieces[1], to[1]) * self._fed(w, 2, pieces[2], to[2]) for w, to in known
        )

    def asked(self, name: str, pieces: Pieces) -> int:
        """Output axons that all sources together take for a population."""
        into = [wiring for wiring in self.costs.into[name] if wiring.source in self.costs.placed]
        return sum(self._wanted(w, pieces[0]) * self._heard(w, 1, pieces[1]) * self._heard(w, 2, pieces[2]) for w in into)

    def worst(self, name: str, pieces: Pieces, others: Mapping[str, Pieces]) -> npt.NDArray[np.int64]:
        """The most that a piece costs of each of NEURONS .. OUTPUTS."""
        neurons, memory, inputs = self.own(name, pieces)
        sent = self.sent(name, pieces, others)
        return np.array([neurons, memory + sent * self.chip.output_axon_bits.value, inputs, sent], np.int64)

    def _once(self, key: tuple[object, ...], count: Callable[[], int]) -> int:
        if key not in self._known:
            self._known[key] = count()
        return self._known[key]

    def _cut(self, name: str, axis: int, pieces: int) -> Cut:
        return cut(self.shapes[name][axis], pieces)

    def _listened(self, wiring: Wiring, pieces: Pieces) -> int:
        """The most input axons of a piece."""
        down, across = (self._most_heard(wiring, axis, pieces[axis]) for axis in (1, 2))
        deep = self._once(("axons", wiring, pieces[0]), lambda: max(map(wiring.axons, self._cut(wiring.target, 0, pieces[0]))))
        return down * across * deep

    def _most_heard(self, wiring: Wiring, axis: int, pieces: int) -> int:
        return self._once(
            ("most heard", wiring, axis, pieces), lambda: max(map(wiring.line(axis).positions, self._cut(wiring.target, axis, pieces)))
        )

    def _heard(self, wiring: Wiring, axis: int, pieces: int) -> int:
        return self._once(
            ("heard", wiring, axis, pieces), lambda: sum(map(wiring.line(axis).positions, self._cut(wiring.target, axis, pieces)))
        )

    def _wanted(self, wiring: Wiring, pieces: int) -> int:
        """Output axons of one source position for all channel pieces of the target."""
        whole = (0, self.shapes[wiring.source][0])
        return self._once(("wanted", wiring, pieces), lambda: int(wiring.entries((whole,), self._cut(wiring.target, 0, pieces)).sum()))

    def _entries(self, wiring: Wiring, own: int, others: int) -> int:
        """The most output axons that a position of a source piece takes for all channel pieces of the target."""
        return self._once(
            ("entries", wiring, own, others),
            lambda: int(wiring.entries(self._cut(wiring.source, 0, own), self._cut(wiring.target, 0, others)).sum(axis=1).max()),
        )

    def _fed(self, wiring: Wiring, axis: int, own: int, others: int) -> int:
        """The most pairs of a position in a source piece and a target piece that it feeds, along one axis."""

        def count() -> int:
            sums = np.concatenate(([0], np.cumsum(wiring.line(axis).fed(self._cut(wiring.target, axis, others)))))
            return max(int(sums[stop] - sums[start]) for start, stop in self._cut(wiring.source, axis, own))

        return self._once(("fed", wiring, axis, own, others), count)

    def _memory(self, wiring: Wiring, pieces: Pieces) -> int:
        """The most memory that the synapses of a piece take."""
        if wiring.shared:  # the whole kernel, wherever the piece lies
            pieces = (pieces[0], 1, 1)

        def count() -> int:
            deep, down, across = (self._cut(wiring.target, axis, n) for axis, n in enumerate(pieces))
            return max(
                wiring.memory(Box(channels, rows, columns))
                for channels in wiring.unlike(0, deep)
                for rows in wiring.unlike(1, down)
                for columns in wiring.unlike(2, across)
            )

        return self._once(("memory", wiring, *pieces), count)


class Plan:
    """Pieces of every population, settled together: what a piece sends depends on its targets' pieces.

    `share` of a core's memory is kept for output axons, where they take memory: else synapses would fill it, and cutting them further would ask for still
    more axons. Channels are cut into at most `spare` times the fewest pieces of which single positions fit: each piece of channels is one more place to send to.
    """

    def __init__(self, sizes: Sizes, share: float = SHARES[0], spare: float = inf) -> None:
        self.sizes, self.costs, self.chip = sizes, sizes.costs, sizes.chip
        self.spare = spare
        self.pieces: dict[str, Pieces] = {}
        self.hopeless: dict[str, npt.NDArray[np.int64]] = {}
        self.budget = sizes.most.copy()
        axon = self.chip.output_axon_bits.value
        if axon:
            self.budget[OUTPUTS] = int(share * self.chip.memory_bits) // axon
            self.budget[MEMORY] = self.chip.memory_bits - self.budget[OUTPUTS] * axon
        self._cost_of_axon = 1 / int(self.budget[OUTPUTS])

    @property
    def slices(self) -> int:
        return sum(map(prod, self.pieces.values()))

    def settle(self) -> Plan:
        """Cut every population, targets before their sources, until nothing changes."""
        answered: dict[str, object] = {}
        for _ in range(ROUNDS):
            before = dict(self.pieces)
            for name in reversed(self.costs.placed):
                question = [self.pieces.get(wiring.target) for wiring in self.costs.out_of[name]]
                if name not in self.hopeless and answered.get(name) != question:
                    answered[name] = question
                    self.pieces[name] = self._best(name)
            if before == self.pieces:
                break
        return self

    def _best(self, name: str) -> Pieces:
        """The pieces of the fewest cores, none larger than before; output axons of the sources count as the share of a core that they fill."""
        least, finest = self.pieces.get(name, WHOLE), self.sizes.finest(name)
        best, lowest, most = None, inf, inf
        for channels in steps(finest[0], least[0]):
            if channels > most:
                break
            if most == inf and self._fits(name, (channels, *finest[1:])):
                most = channels * self.spare
            for rows in steps(finest[1], least[1]):
                if channels * rows * least[2] >= lowest:
                    break
                columns = self._columns(name, channels, rows, steps(finest[2], least[2]))
                if columns is not None:
                    found = (channels, rows, columns)
                    cores = prod(found) + self.sizes.asked(name, found) * self._cost_of_axon
                    best, lowest = (found, cores) if cores < lowest else (best, lowest)
            if channels * least[1] * least[2] >= lowest:
                break
        if best is None:
            self.hopeless[name] = self.sizes.worst(name, finest, self.pieces)
        return best or least

    def _columns(self, name: str, channels: int, rows: int, choices: list[int]) -> int | None:
        """The fewest pieces along columns that fit: the more, the more surely."""
        if not self._fits(name, (channels, rows, choices[-1])):
            return None
        return choices[bisect_left(choices, True, hi=len(choices) - 1, key=lambda n: self._fits(name, (channels, rows, n)))]

    def _fits(self, name: str, pieces: Pieces) -> bool:
        neurons, memory, inputs = self.sizes.own(name, pieces)
        most = self.budget
        if neurons > most[0] or memory > most[1] or inputs > most[2]:
            return False
        return bool(self.sizes.sent(name, pieces, self.pieces) <= most[3])


def best_plan(sizes: Sizes) -> Plan:
    """The plan with the fewest slices, of all that fit."""
    shares = SHARES if sizes.chip.output_axon_bits.value else SHARES[:1]
    plans = (Plan(sizes, share, spare).settle() for spare in SPARES for share in shares)
    return min(plans, key=lambda plan: (len(plan.hopeless), plan.slices))


def uncut(sizes: Sizes) -> Plan:
    """Every population in one piece, whether it fits or not."""
    plan = Plan(sizes)
    plan.pieces = dict.fromkeys(plan.costs.placed, WHOLE)
    return plan


def steps(length: int, least: int) -> list[int]:
    """Numbers of pieces, from `least` on, that make the largest piece of `length` smaller."""
    return [n for n in range(least, length + 1) if n == least or -(-length // n) < -(-length // (n - 1))]


def cores(plan: Plan) -> tuple[Core, ...]:
    """Every slice on a core, in the network's order: rows, columns, then channels, so that what is near in the image is near on the chips."""
    boxes = {name: _boxes(plan, name) for name in plan.costs.placed}
    table = plan.costs.table(boxes)
    used: list[npt.NDArray[np.int64]] = []
    held: list[list[Slice]] = []
    for name, parts in boxes.items():
        population = plan.costs.placed[name]
        for part, cost in zip(parts, table[name], strict=True):
            first = max(0, len(used) - OPEN_CORES)
            place = next((i for i in range(first, len(used)) if (used[i] + cost <= plan.sizes.most).all()), len(used))
            if place == len(used):
                used.append(np.zeros(4, np.int64))
                held.append([])
            used[place] += cost
            held[place].append(slice_of(population, part))
    per_chip = plan.chip.cores_per_chip.value
    return tuple(Core(i // per_chip, i % per_chip, tuple(slices)) for i, slices in enumerate(held))


def _boxes(plan: Plan, name: str) -> list[Box]:
    channels, rows, columns = (cut(n, pieces) for n, pieces in zip(plan.sizes.shapes[name], plan.pieces[name], strict=True))
    return [Box(deep, down, across) for down in rows for across in columns for deep in channels]


def slice_of(population: Population, part: Box) -> Slice:
    """A box along the axes of the population's own shape."""
    axes = len(population.shape)
    if axes > 3:
        further = population.shape[2:]
        return Slice(population.name, (part.channels[0], part.rows[0], *[0] * len(further)), (part.channels[1], part.rows[1], *further))
    return Slice(population.name, tuple(start for start, _ in part[:axes]), tuple(stop for _, stop in part[:axes]))
