"""NIR files of other libraries as networks of ours: a chain of spiking layers with skips, and loops that close a step late.

NIR says how potentials change in time, not how a simulator steps. Read in Euler steps of `dt`, as snnTorch and SpikingJelly write and read them:

    LIF   v = leak v + gain I,  leak = 1 - dt / tau,  gain = r dt / tau       (CubaLIF with tau_syn = dt: gain times w_in dt / tau_syn)
    IF    v = v + gain I,       gain = r dt, or 1 where r is 1

A spike of ours subtracts A = v_threshold - v_reset at once; with `reset="subtract-delayed"` A / leak, which is snnTorch's Leaky with reset_mechanism "subtract" and its default reset_delay: it subtracts the threshold
after the next leak, and leak (v - A / leak) = leak v - A. NIR cannot say which of all these its author meant, so an import always warns. Layers whose threshold differs from the first one's get weights that
make up for it. What a network of ours cannot be is refused by the name of the node.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolchain import checkpoint, network
from toolchain.checkpoint import About
from toolchain.config import Config, Training
from toolchain.errors import GraphError, UsageError, unknown
from toolchain.exchange import nir as files
from toolchain.exchange.nir_nodes import DT
from toolchain.exchange.nir_parts import Made, joined, parts_of, tensors_of, with_bias
from toolchain.ir import LARGEST_STEPS
from toolchain.network import Feedback, Network, Neuron, Skip

if TYPE_CHECKING:
    import nir
    import torch

RESETS = ("subtract", "subtract-delayed")
"""What a spike of an imported neuron does; see the module's docstring."""

MOST_LAYERS = 500
"""Spiking layers: a graph with more is a mistake."""

MOST_STEPS = 10_000
"""Nodes on all ways from one layer to the next ones."""

TIME_STEPS = 30
"""Where neither the file, which cannot, nor the user says how long to run."""

SAME = 1e-5
"""Time constants in float32 keep about seven digits: numbers that differ by less, relatively, are one."""

NEURONS = ("IF", "LIF", "CubaLIF")
INTEGRATORS = ("I", "LI")
OPERATIONS = ("Affine", "Linear", "Conv2d", "AvgPool2d", "SumPool2d", "Scale", "Flatten", "Delay")


@dataclass(frozen=True)
class Step:
    """How a layer's potential changes: v = leak v + gain I, fires at `threshold`, loses `reset`."""

    leak: float
    gain: float
    threshold: float = 0.0
    reset: float = 0.0


@dataclass(frozen=True)
class Way:
    """From one population (or the input) to another, through `nodes`."""

    source: str
    target: str
    nodes: tuple[str, ...]


def import_(
    path: Path, graph: nir.NIRGraph, output: Path | None, *, time_steps: int | None, reset: str | None, dt: float | None
) -> files.Imported:
    """Read `graph`, which `path` holds, as a network and write it to the run folder `output`; GraphError names the node that a network of ours cannot be."""
    found, tensors, warnings = read(graph, path.stem, time_steps=time_steps, reset=reset or "subtract", dt=DT if dt is None else dt)
    network.check(found)
    if output is not None:
        method = "spide" if found.weighted_readout else "ottt-a"  # whose readouts see leak-weighted rates, and plain ones
        config = Config(found, Training(dataset=_dataset(found)), method=method)
        files.write_run(output, About(checkpoint.FORMAT, config, 0, None), tensors)
    counted = network.counts(found)
    written = None if output is None else str(output)
    return files.Imported(
        str(path), found.name, "foreign", written, found.time_steps, sum(counted.neurons), counted.parameters, warnings, files.recorded()
    )


def _dataset(found: Network) -> str:
    """A data set of the network's kind, which says that its inputs are still images: no file says what a network was trained on."""
    return {64: "digits", 3072: "cifar10"}.get(prod(found.input_shape), "mnist")


def read(
    graph: nir.NIRGraph, name: str, *, time_steps: int | None = None, reset: str = "subtract", dt: float = DT
) -> tuple[Network, dict[str, torch.Tensor], tuple[str, ...]]:
    """The network of a graph, its weights by their names in the checkpoint, and what may differ from where it came from, one sentence each.

    `time_steps` is how long it runs, `reset` what a spike subtracts (see the module), `dt` how long a step is in the file's time constants, in seconds.
    """
    if reset not in RESETS:
        raise unknown("reset", reset, RESETS)
    if not (isfinite(dt) and dt > 0):
        raise UsageError(f"--dt is {dt}: give the seconds of a time step, above 0")
    return _Reader(graph, name, reset, dt).network(time_steps)


class _Reader:
    def __init__(self, graph: nir.NIRGraph, name: str, reset: str, dt: float) -> None:
        self.name, self.reset, self.dt = name, reset, dt
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self._inline(graph, "")
        self.warnings: list[str] = []
        self.steps = {node: self._step(node) for node in self.nodes if self._kind(node) in (*NEURONS, *INTEGRATORS)}
        self.targets: dict[str, list[str]] = {node: [] for node in self.nodes}
        self.sources: dict[str, list[str]] = {node: [] for node in self.nodes}
        for source, target in self.edges:
            self.targets[source].append(target)
            self.sources[target].append(source)

    # the graph, flat

    def _inline(self, graph: nir.NIRGraph, prefix: str) -> None:
        """All nodes and edges, those of graphs within it by their path; an inner graph's Input and Output become a pass from edge to edge."""
        kinds = {name: type(node).__name__ for name, node in graph.nodes.items()}
        for name, node in graph.nodes.items():
            if kinds[name] == "NIRGraph":
                self._inline(node, f"{prefix}{name}.")
            else:
                self.nodes[f"{prefix}{name}"] = node
        for source, target in dict.fromkeys((str(a), str(b)) for a, b in graph.edges):
            ends = []
            for end, wanted in ((source, "Output"), (target, "Input")):
                if end not in graph.nodes:
                    raise GraphError(f"edge '{source}' -> '{target}' ends at '{end}', which is no node: write the file again")
                inner = graph.nodes[end]
                if kinds[end] == "NIRGraph":
                    found = [name for name, node in inner.nodes.items() if type(node).__name__ == wanted]
                    if len(found) != 1:
                        raise GraphError(
                            f"the graph '{prefix}{end}' has {len(found)} nodes of type {wanted}: networks of one input and one output are imported"
                        )
                    ends.append(f"{prefix}{end}.{found[0]}")
                else:
                    ends.append(f"{prefix}{end}")
            self.edges.append((ends[0], ends[1]))

    def _kind(self, node: str) -> str:
        return type(self.nodes[node]).__name__

    def _passes(self, node: str) -> bool:
        """Whether a node is an inner graph's Input or Output."""
        return "." in node and self._kind(node) in ("Input", "Output") and bool(self.sources[node]) and bool(self.targets[node])

    def _one(self, kind: str) -> str:
        found = [node for node in self.nodes if self._kind(node) == kind and not self._passes(node)]
        if len(found) != 1:
            raise GraphError(
                f"the graph has {len(found)} nodes of type {kind} ({', '.join(found) or 'none'}): networks of one input and one output are imported"
            )
        return found[0]

    @contextmanager
    def _values(self, node: str) -> Iterator[None]:
        """Where a node's values are read: nir does not check what they are."""
        try:
            yield
        except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            said = " ".join(str(error).split())[:200]
            raise GraphError(
                f"node '{node}' holds other values than a node of type {self._kind(node)} has ({said}): correct the file"
            ) from None

    # neurons

    def _numbers(self, node: str) -> dict[str, float]:
        """The parameters of a node, one number each; GraphError where they differ from neuron to neuron."""
        found = {}
        for field in ("tau", "tau_mem", "tau_syn", "r", "v_leak", "v_threshold", "v_reset", "w_in"):
            if not hasattr(self.nodes[node], field):
                continue
            with self._values(node):
                values = np.asarray(getattr(self.nodes[node], field), np.float64).reshape(-1)
            if values.size == 0 or not np.isfinite(values).all():
                raise GraphError(f"node '{node}' has no finite {field}: correct the file")
            if values.max() - values.min() > SAME * max(1e-30, np.abs(values).max()):
                raise GraphError(
                    f"node '{node}' has {field} from {values.min():g} to {values.max():g}: neurons of one layer are alike here, so give them one value"
                )
            found[field] = float(values[0])
        return found

    def _step(self, node: str) -> Step:
        p = self._numbers(node)
        kind = self._kind(node)
        tau = p.get("tau", p.get("tau_mem"))
        if tau is None:
            leak, gain = 1.0, p["r"] * self.dt
            if abs(p["r"] - 1) <= SAME:
                gain = 1.0
        else:
            if tau <= 0:
                raise GraphError(f"node '{node}' has tau {tau:g}: correct the file")
            leak, gain = 1 - self.dt / tau, p["r"] * self.dt / tau
        if kind == "CubaLIF":
            share = self.dt / p["tau_syn"] if p["tau_syn"] > 0 else 0.0
            if abs(share - 1) > SAME:
                raise GraphError(
                    f"node '{node}' is a CubaLIF whose current lasts (tau_syn {p['tau_syn']:g} s, a step is {self.dt:g} s): our neurons keep no current, so train with LIF"
                )
            gain *= p["w_in"] * share
        leak, gain = _snapped(leak), 1.0 if abs(gain - 1) <= SAME else gain
        if not 0 < leak <= 1:
            raise GraphError(
                f"node '{node}' keeps {leak:g} of its potential in a step of {self.dt:g} s (tau {tau:g} s): give the file's own time step with --dt"
            )
        rest = p.get("v_leak", 0.0)
        if kind in INTEGRATORS:
            if rest:
                raise GraphError(f"node '{node}' leaks to {rest:g}: readouts leak to 0 here")
            return Step(leak, gain)
        if rest and abs(rest - p["v_reset"]) > SAME:
            raise GraphError(
                f"node '{node}' leaks to {rest:g} and is reset to {p['v_reset']:g}: potentials of ours rest at 0, so give it v_leak 0, or both the same"
            )
        threshold, amount = p["v_threshold"] - rest, p["v_threshold"] - p["v_reset"]
        if threshold <= 0 or amount <= 0:
            raise GraphError(
                f"node '{node}' fires at {p['v_threshold']:g} and is reset to {p['v_reset']:g}: a threshold lies above rest and reset"
            )
        return Step(leak, gain, threshold, amount if self.reset == "subtract" else amount / leak)

    # connections

    def _ways(self, start: str) -> Iterator[Way]:
        """All ways from a population to the next ones."""
        waiting: list[tuple[str, tuple[str, ...]]] = [(target, ()) for target in self.targets[start]]
        looked = 0
        while waiting:
            node, trail = waiting.pop(0)
            looked += 1
            if looked > MOST_STEPS:
                raise GraphError(
                    f"more than {MOST_STEPS:,} ways begin at node '{start}': sums are made in neurons here, so branch less often before them"
                )
            kind = self._kind(node)
            if kind in (*NEURONS, *INTEGRATORS) or (kind == "Output" and not self._passes(node)):
                yield Way(start, node, tuple(passed for passed in trail if not self._passes(passed)))
                continue
            if not self._passes(node):
                if kind not in OPERATIONS:
                    raise GraphError(
                        f"node '{node}' is of type {kind}, which networks of ours do not have: they have {', '.join((*NEURONS, *INTEGRATORS, *OPERATIONS))}"
                    )
                if len(self.sources[node]) > 1:
                    raise GraphError(
                        f"node '{node}' adds up {len(self.sources[node])} sources before {kind}: sums are made in neurons here, so give each source its own connection"
                    )
            if node in trail:
                raise GraphError(f"node '{node}' is in a loop without neurons: correct the file")
            waiting += [(target, (*trail, node)) for target in self.targets[node]]

    def _order(self, start: str, ways: list[Way]) -> list[str]:
        """The spiking layers from the input on: a loop is cut where it comes back to a layer on its way."""
        targets: dict[str, list[str]] = {}
        for way in ways:
            targets.setdefault(way.source, []).append(way.target)
        finished: list[str] = []
        on_way: list[str] = []

        def visit(node: str) -> None:
            on_way.append(node)
            for target in targets.get(node, []):
                if target not in finished and target not in on_way:
                    visit(target)
            finished.append(on_way.pop())

        visit(start)
        order = [node for node in reversed(finished) if self._kind(node) in NEURONS]
        left = [node for node in self.steps if node not in finished]
        if left:
            raise GraphError(f"nothing leads from the input to node '{left[0]}': correct the file")
        for before, after in pairwise(order):
            if after not in targets.get(before, []):
                raise GraphError(
                    f"nodes '{before}' and '{after}' lie side by side: the layers of a network of ours are one chain, with skips and feedback"
                )
        return order

    def network(self, time_steps: int | None) -> tuple[Network, dict[str, torch.Tensor], tuple[str, ...]]:
        """The network, its weights and the warnings."""
        import torch

        entry, end = self._one("Input"), self._one("Output")
        starts = [entry, *(node for node in self.steps if self._kind(node) in NEURONS)]
        if len(starts) > MOST_LAYERS:
            raise GraphError(f"the graph has {len(starts) - 1:,} nodes with neurons: networks of up to {MOST_LAYERS} layers are imported")
        ways = [way for start in starts for way in self._ways(start)]
        layers = self._order(entry, ways)
        if not layers:
            raise GraphError("the graph has no spiking neurons (IF, LIF or CubaLIF): import networks that spike")
        first = self._neuron(layers)
        factors = {node: self.steps[node].gain * first.threshold / self.steps[node].threshold for node in layers}
        place = {node: i for i, node in enumerate(layers)} | {entry: -1}
        input_shape = tuple(int(n) for n in np.asarray(self.nodes[entry].output_type["output"]).reshape(-1))
        forward: dict[int, list[Made]] = {}
        skips: list[tuple[int, int, list[Made]]] = []
        loops: list[tuple[int, int, list[Made]]] = []
        readouts = []
        for way in ways:
            if way.target not in place:
                readouts.append(way)
                continue
            source, target = place[way.source], place[way.target]
            made = self._connection(way, factors[way.target], delayed=source >= target)
            if source >= target:
                loops.append((source, target, made))
            elif source == target - 1 and target not in forward:
                forward[target] = made
            else:
                skips.append((source, target, made))
        readout, weighted = self._readout(readouts, layers, end)
        self._say_unused(entry, end, ways)
        weighted = weighted or first.leak == 1  # the same where nothing leaks, and what SPIDE trains
        self._move_biases(loops, forward)
        if len(forward) < len(layers):
            raise GraphError(f"nothing leads from the input to node '{layers[0]}' directly: the layers of a network of ours are one chain")
        for node, factor in factors.items():
            if factor != 1:
                self.warnings.append(
                    f"weights into '{node}' were multiplied by {factor:g}, for its gain and its threshold of {self.steps[node].threshold:g}"
                )
        steps = self._time_steps(time_steps)
        found = Network(
            name=self.name,
            input_shape=input_shape,
            input=joined(forward[0]),
            hidden=tuple(joined(forward[i]) for i in range(1, len(layers))),
            readout=None if readout is None else joined(readout),
            feedback=tuple(Feedback(source, target, joined(made)) for source, target, made in loops),
            skips=tuple(Skip(None if source < 0 else source, target, joined(made)) for source, target, made in skips),
            neuron=first,
            time_steps=steps,
            weighted_readout=weighted,
        )
        named = {"input": forward[0]} | {f"hidden.{i - 1}": forward[i] for i in range(1, len(layers))}
        named |= {f"feedback.{i}": made for i, (_, _, made) in enumerate(loops)} | {
            f"skip.{i}": made for i, (_, _, made) in enumerate(skips)
        }
        named |= {} if readout is None else {"readout": readout}
        tensors = {f"{path}.{field}": value for name, made in named.items() for path, field, value in tensors_of(name, made)}
        with np.errstate(over="ignore"):  # found below
            narrow = {name: np.array(value, np.float32) for name, value in tensors.items()}
        for name, value in narrow.items():
            if not np.isfinite(value).all():
                raise GraphError(f"'{name}' holds NaN, infinite values or some beyond float32: correct the file")
        return (
            found,
            {name: torch.from_numpy(value) for name, value in narrow.items()},
            tuple(self._cautions(first) + self.warnings),
        )

    def _say_unused(self, entry: str, end: str, ways: list[Way]) -> None:
        """Warn of nodes that lie on no way from the input to the output, such as one that is joined to itself alone."""
        used = {entry, end, *self.steps, *(node for way in ways for node in way.nodes)}
        self.warnings += [
            f"node '{node}' was left out: no way from the input to the output leads through it"
            for node in self.nodes
            if node not in used and not self._passes(node)
        ]

    def _neuron(self, layers: list[str]) -> Neuron:
        first = self.steps[layers[0]]
        for node in layers[1:]:
            step = self.steps[node]
            if abs(step.leak - first.leak) > SAME:
                raise GraphError(
                    f"node '{node}' keeps {step.leak:g} of its potential a step and '{layers[0]}' {first.leak:g}: the neurons of a network of ours leak alike"
                )
            if abs(step.reset / step.threshold - first.reset / first.threshold) > SAME:
                raise GraphError(
                    f"node '{node}' resets by {step.reset / step.threshold:g} thresholds and '{layers[0]}' by {first.reset / first.threshold:g}: the neurons of a network of ours reset alike"
                )
        threshold, amount = first.threshold, first.reset
        return Neuron(threshold, threshold - amount, threshold / 2, threshold / 2 - amount / 2, first.leak)

    def _readout(self, ways: list[Way], layers: list[str], end: str) -> tuple[list[Made] | None, bool]:
        """The readout's connection, None where the last layer's spikes are the answer, and whether it leaks as the neurons do."""
        if len(ways) != 1 or ways[0].source != layers[-1]:
            names = ", ".join(f"'{way.source}' -> '{way.target}'" for way in ways)
            raise GraphError(
                f"the output is fed by {names or 'nothing'}: one connection from the last layer, '{layers[-1]}', is a readout here"
            )
        way, weighted, gain = ways[0], False, 1.0
        if way.target != end:
            after = list(self._ways(way.target))
            if len(after) != 1 or after[0].target != end or after[0].nodes:
                raise GraphError(f"node '{way.target}' is not followed by the output: a potential is read out at the end here")
            step, leak = self.steps[way.target], self.steps[layers[-1]].leak
            if step.leak != 1 and abs(step.leak - leak) > SAME:
                raise GraphError(
                    f"node '{way.target}' keeps {step.leak:g} of its potential a step and the neurons {leak:g}: a readout leaks as the neurons do, or not at all"
                )
            weighted, gain = step.leak != 1, step.gain
        made = self._connection(way, gain, delayed=False)
        if not way.nodes and gain == 1:
            return None, weighted
        return made, weighted

    def _connection(self, way: Way, factor: float, *, delayed: bool) -> list[Made]:
        """The parts between two populations, with all weights times `factor`."""
        made: list[Made] = []
        late = 0.0
        for node in way.nodes:
            if self._kind(node) == "Delay":
                with self._values(node):
                    late += float(np.max(np.asarray(self.nodes[node].delay, np.float64)))
                continue
            with self._values(node):
                parts = parts_of(node, self.nodes[node])
                if any(np.asarray(value).dtype.kind not in "biuf" for part in parts for value in part.tensors.values()):
                    raise ValueError("they are no real numbers")
                made += parts
        if late and (not delayed or abs(late / self.dt - 1) > 1e-3):
            named = next(node for node in way.nodes if self._kind(node) == "Delay")
            raise GraphError(f"node '{named}' delays by {late / self.dt:g} steps of {self.dt:g} s: only loops are late here, by one step")
        if delayed and not late:
            self.warnings.append(f"the loop '{way.source}' -> '{way.target}' has no Delay: it is closed one step late")
        if factor == 1:
            return made or [Made(network.Identity(), {})]
        last = max((i for i, part in enumerate(made) if "weight" in part.tensors), default=None)
        if last is None:
            return [*made, Made(network.Scale(factor), {})]
        made[last] = replace(
            made[last], tensors={name: np.asarray(value, np.float64) * factor for name, value in made[last].tensors.items()}
        )
        return made

    def _move_biases(self, loops: list[tuple[int, int, list[Made]]], forward: dict[int, list[Made]]) -> None:
        """A loop's bias acts from the first step on in NIR, from the second on here: it moves into the connection before, where that takes it."""
        for _, target, made in loops:
            last = made[-1]
            if "bias" not in last.tensors or target not in forward:
                continue
            before = forward[target][-1]
            part: Any = before.part
            if "weight" not in before.tensors or part.outputs != np.size(last.tensors["bias"]):
                self.warnings.append(f"the bias of a loop into layer {target + 1} acts from the second step on")
                continue
            total = np.asarray(before.tensors.get("bias", 0.0), np.float64) + np.asarray(last.tensors["bias"], np.float64)
            forward[target][-1] = Made(with_bias(part, True), {**before.tensors, "bias": total})
            made[-1] = Made(with_bias(last.part, False), {name: value for name, value in last.tensors.items() if name != "bias"})

    def _time_steps(self, wanted: int | None) -> int:
        if wanted is None:
            self.warnings.append(
                f"NIR does not say for how many time steps a network runs: {TIME_STEPS} were taken, give others with --time-steps"
            )
            return TIME_STEPS
        if not 1 <= wanted <= LARGEST_STEPS:
            raise UsageError(f"--time-steps is {wanted}: give 1 to {LARGEST_STEPS:,}")
        return wanted

    def _cautions(self, neuron: Neuron) -> list[str]:
        """What no NIR file tells."""
        other = (
            "--reset subtract-delayed is snnTorch's default, and with reset_delay=False it subtracts once more where a potential is still above its threshold"
            if self.reset == "subtract"
            else "--reset subtract does so at once"
        )
        leak = "" if neuron.leak == 1 else f"; the leak is {neuron.leak:g} a step of {self.dt:g} s"
        lost = f"those imported lose {neuron.reset:g} at a threshold of {neuron.threshold:g} ({other}), so a network trained with a reset to zero gives other spikes"
        return [
            f"a soft reset may have been lost: NIR's neurons are set to v_reset where they fire; {lost}{leak}",
            "NIR's neurons fire above their threshold, ours from it on: a potential that meets it exactly differs",
            "inputs are still images in [0, 1], the same at every step: spikes that a program made of them are not part of the file",
        ]


def _snapped(leak: float) -> float:
    """A leak whose float32 time constant lost its last digits, put right where it was a number of four decimals."""
    near = round(leak, 4)
    return near if abs(leak - near) < 1e-6 else leak
