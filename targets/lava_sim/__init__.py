"""Lava 0.10 as a target: the graph's processes under Loihi2SimCfg, in fixed point (integer graphs) or floating point (float graphs)."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from toolchain.errors import DesignRuleError, UsageError, unknown
from toolchain.fixed import EXACT_FLOAT64, WEIGHT_EXPONENT_MAX, largest_product
from toolchain.ir import Graph, Phase, Synapse
from toolchain.limits import LOIHI2, Limits
from toolchain.passes import FLOAT_PIPELINE, LOIHI_PIPELINE, Pipeline
from toolchain.targets.lava_sim.stock import Stock

if TYPE_CHECKING:
    from toolchain.plasticity import Plastic
    from toolchain.targets.lava_sim.compile import Run
    from toolchain.targets.lava_sim.learning import LearningRun


@dataclass(frozen=True)
class LavaSim:
    """Lava processes, one a population and one a synapse.

    batch     copies of the network that advance side by side (None: 128, or 1 with stock synapses)
    synapses  "own": our connection with a batch axis; "stock": Lava's Dense, Conv, Sparse and their delayed forms, which have none (`stock` says which
              carries what); "sparse": Lava's Sparse for every connection, faster than its Conv by far
    trace     keep every spike and potential
    phases    which phases to build (None: all the graph has); without "feedback" the network has about half the processes
    deadline  seconds without a tick after which the network counts as stuck
    """

    batch: int | None = None
    synapses: Literal["own", "stock", "sparse"] = "own"
    trace: bool = False
    phases: tuple[str, ...] | None = None
    deadline: float = 60.0
    name: str = "lava-sim"
    limits: Limits = LOIHI2
    pipeline: Pipeline = LOIHI_PIPELINE

    def __post_init__(self) -> None:
        if self.synapses not in ("own", "stock", "sparse"):
            raise unknown("synapses", self.synapses, ("own", "stock", "sparse"))
        if self.batch is not None and self.batch < 1:
            raise UsageError(f"a batch of {self.batch} samples is none: give at least 1")
        if self.stock and (self.batch or 1) > 1:
            raise UsageError(
                f"Lava's stock synapses carry one sample at a time and the batch is {self.batch}: use batch 1, or synapses own"
            )
        if self.deadline <= 0:
            raise UsageError(f"a deadline of {self.deadline:g} s leaves no time: give more than 0")

    @property
    def stock(self) -> bool:
        """Whether Lava's own synapse processes carry the connections."""
        return self.synapses != "own"

    def available(self) -> str | None:
        """None where Lava can run here, else what is missing and the command that installs it. Imports nothing."""
        if sys.version_info >= (3, 11):
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            return f"Lava 0.10 needs Python 3.10 and this is {version}: make an environment with python3.10 and run pip install lava-nc==0.10.0 there"
        if find_spec("lava") is None or find_spec("lava.magma") is None:
            return "Lava is not installed: run pip install lava-nc==0.10.0"
        return None

    def phases_of(self, graph: Graph) -> tuple[str, ...]:
        return self.phases or tuple(phase.name for phase in graph.phases)

    def check(self, graph: Graph) -> list[str]:
        """Every rule of this target that the graph breaks, a sentence each."""
        problems = self._option_problems(graph)
        built = [graph.phase(name) for name in self.phases_of(graph) if graph.has_phase(name)]
        problems += [problem for phase in built for problem in self._phase_problems(graph, phase)]
        apart = _unreached(built)
        if apart:
            problems.append(
                f"population '{apart}' has no connection to '{built[0].order[0]}': Lava runs connected processes only, so connect it or remove it"
            )
        return problems

    def compile(self, graph: Graph) -> Run:
        """The network, started. UsageError where Lava is missing, DesignRuleError with every problem `check` finds."""
        self._require_fit(graph)
        from toolchain.targets.lava_sim.compile import Run

        return Run(graph, self)

    def learner(self, graph: Graph, plastics: Sequence[Plastic], *, batch: int, seed: int) -> LearningRun:
        """A network that learns, started: up to `batch` samples at a time, random numbers from `seed`. Errors as of `compile`."""
        if self.stock:
            raise UsageError("Lava's stock synapses do not learn by this rule: use synapses own")
        self._require_fit(graph)
        from toolchain.targets.lava_sim.learning import LearningRun

        return LearningRun(graph, replace(self, batch=batch, phases=None), plastics, seed)

    def _require_fit(self, graph: Graph) -> None:
        """Lava is here and can carry the graph; from now on it may be imported."""
        missing = self.available()
        if missing is not None:
            raise UsageError(missing)
        problems = self.check(graph)
        if problems:
            raise DesignRuleError("; ".join(problems))
        allow_fork()

    def _option_problems(self, graph: Graph) -> list[str]:
        problems = [
            f"the graph of '{graph.provenance.model}' has no {name} phase to build: leave it out of phases"
            for name in self.phases_of(graph)
            if not graph.has_phase(name)
        ]
        if "forward" not in self.phases_of(graph):
            problems.append("the forward phase is not among the phases to build: the feedback phase needs its masks")
        return problems

    def _phase_problems(self, graph: Graph, phase: Phase) -> list[str]:
        if phase.timing.mode == "step":
            return [f"phase '{phase.name}' is in model steps, not in ticks: run the retime pass"]
        problems = [problem for synapse in phase.synapses for problem in self._synapse_problems(graph, phase, synapse)]
        if self.stock:
            problems += Stock(graph, phase, sparse=self.synapses == "sparse").problems()
        gates: dict[str, set[str | None]] = {}
        for synapse in phase.synapses:
            gates.setdefault(synapse.source, set()).add(synapse.gate)
        problems += [
            f"population '{source}' feeds gated and ungated synapses in phase '{phase.name}', and its process emits one kind: gate all of them or none"
            for source, kinds in gates.items()
            if len(kinds) > 1
        ]
        return problems

    def _synapse_problems(self, graph: Graph, phase: Phase, synapse: Synapse) -> list[str]:
        where = f"synapse '{synapse.source}' -> '{synapse.target}' in phase '{phase.name}'"
        problems = []
        if synapse.delay < 1:
            problems.append(f"{where} has delay {synapse.delay}: Lava's connections take at least one tick, run the retime pass")
        if synapse.gate is not None and (phase.name == "forward" or synapse.gate != synapse.source):
            problems.append(f"{where} is gated by '{synapse.gate}': a Lava process can only gate its own spikes, in the feedback phase")
        if phase.name == "feedback" and graph.population(synapse.source).kind == "input":
            problems.append(f"{where} leaves the input population, which emits in the forward phase only: remove it")
        if graph.integer:
            exponents = [op.exponent for op in synapse.ops if hasattr(op, "exponent")]
            problems += [
                f"{where} has weight exponent {exponent}: it must lie in 0..{WEIGHT_EXPONENT_MAX}"
                for exponent in exponents
                if not 0 <= exponent <= WEIGHT_EXPONENT_MAX
            ]
            bound, delivered = largest_product(graph, synapse)
            if max(bound, delivered) >= EXACT_FLOAT64:
                problems.append(f"{where} can reach sums of {max(bound, delivered)}, beyond exact arithmetic: use fewer weight bits")
        return problems


def _unreached(phases: list[Phase]) -> str | None:
    """A population that no path of synapses joins to the first one, if any."""
    names = [name for phase in phases for name in phase.order]
    edges = [(synapse.source, synapse.target) for phase in phases for synapse in phase.synapses]
    reached: set[str] = set()
    fresh = set(names[:1])
    while fresh:
        reached |= fresh
        fresh = {b for edge in edges for a, b in (edge, edge[::-1]) if a in reached} - reached
    return next((name for name in names if name not in reached), None)


def allow_fork() -> None:
    """To be called before Lava is imported: it sets multiprocessing's start method to fork then, and fails where any is set already.

    UsageError where this program has set another one.
    """
    method = multiprocessing.get_start_method(allow_none=True)
    if method not in (None, "fork"):
        raise UsageError(f"Lava needs multiprocessing's start method 'fork' and this program has set '{method}': remove that call")
    if method == "fork" and "lava.magma" not in sys.modules:
        multiprocessing.set_start_method(None, force=True)


LAVA_SIM = LavaSim()
LAVA_SIM_FLOAT = LavaSim(name="lava-sim-float", pipeline=FLOAT_PIPELINE)
