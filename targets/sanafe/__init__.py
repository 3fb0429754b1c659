"""SANA-FE's Loihi as a target: spikes identical to the reference, and the energy and time that the simulated chip charges for them.

SANA-FE (GPL-3) is used as it is installed and is imported nowhere else; docs/targets/sanafe.md says what is exact and what is not charged.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import msgspec

from toolchain import limits
from toolchain.errors import DesignRuleError, UsageError
from toolchain.fixed import largest_total
from toolchain.ir import Graph, Phase, Placement
from toolchain.limits import Limits
from toolchain.passes import LOIHI_PIPELINE, Partition, Pipeline
from toolchain.targets.sanafe.architecture import LARGEST_DELAY
from toolchain.targets.sanafe.charges import Charges as Charges
from toolchain.targets.sanafe.numbers import LARGEST_SUM, problem

if TYPE_CHECKING:
    from toolchain.targets.sanafe.run import Run

CHIP = "loihi1"


@dataclass(frozen=True)
class SanaFe:
    """One Loihi, one sample at a time; with `trace` every spike and potential is kept. Populations of an artefact for another chip are placed anew."""

    trace: bool = False
    name: str = "sanafe"
    limits: Limits = limits.load(CHIP)
    pipeline: Pipeline = LOIHI_PIPELINE.with_options(partition={"chip": CHIP})

    def available(self) -> str | None:
        """None where SANA-FE can run here, else what is missing and the command that installs it. Imports nothing."""
        if find_spec("sanafe") is None or find_spec("sanafecpp") is None:
            return 'SANA-FE is not installed: run pip install "fsnn-toolchain[energy]"'
        return None

    def check(self, graph: Graph) -> list[str]:
        """Every rule of this target that the graph breaks, a sentence each."""
        if not graph.integer:
            return ["target 'sanafe' runs integer graphs and this one is in floats: add the quantize pass, or use target 'torch'"]
        problems = [*_population_problems(graph), *(found for phase in graph.phases for found in _phase_problems(graph, phase))]
        if problems:
            return problems
        try:
            _placement(graph)
        except DesignRuleError as error:
            problems += str(error).splitlines()
        return problems

    def compile(self, graph: Graph) -> Run:
        """The chip, programmed for the forward phase. UsageError where SANA-FE is missing, DesignRuleError with every problem `check` finds."""
        missing = self.available()
        if missing is not None:
            raise UsageError(missing)
        problems = self.check(graph)
        if problems:
            raise DesignRuleError("; ".join(problems))
        from toolchain.targets.sanafe.run import Run

        try:
            import_module("sanafe")
        except ImportError as error:  # built for another Python or C++ library
            raise UsageError(
                f'SANA-FE does not load here ({error}): install it again with pip install --force-reinstall "fsnn-toolchain[energy]"'
            ) from None
        return Run(graph, _placement(graph), trace=self.trace)


def _placement(graph: Graph) -> Placement:
    """The graph's own placement on a single Loihi, or a new one. DesignRuleError where it takes more than one chip, or fits none."""
    placement = graph.placement
    if placement is None or placement.chip != CHIP:
        placement = Partition(chip=CHIP)(msgspec.structs.replace(graph, placement=None)).placement
    chips = 0 if placement is None else 1 + max(core.chip for core in placement.cores)
    if placement is None or chips > 1:
        raise DesignRuleError(
            f"'{graph.provenance.model}' takes {chips} chips, and SANA-FE describes one Loihi of {limits.load(CHIP).cores_per_chip.value} cores: lower the width of its populations"
        )
    return placement


def _population_problems(graph: Graph) -> list[str]:
    problems = [
        f"population '{population.name}' is a linear relay, and Loihi's spikes are binary: use target sim or lava-sim"
        for population in graph.of_kind("linear")
    ]
    for population in graph.of_kind("input"):
        levels = int(graph.scale("forward", population.name))
        if levels > 1 and any(synapse.source == population.name for synapse in graph.phase("forward").synapses):
            problems.append(
                f"input '{population.name}' sends values from 0 to {levels}, and Loihi's spikes are binary: let the host send currents (--input bias), or use target sim"
            )
    return problems


def _phase_problems(graph: Graph, phase: Phase) -> list[str]:
    if phase.timing.mode == "step":
        return [f"phase '{phase.name}' is in model steps, not in ticks: run the retime pass"]
    problems = [found for name in phase.order if name in phase.dynamics and (found := problem(name, phase.dynamics[name]))]
    for synapse in phase.synapses:
        where = f"synapse '{synapse.source}' -> '{synapse.target}' in phase '{phase.name}'"
        if not 1 <= synapse.delay <= LARGEST_DELAY:
            problems.append(
                f"{where} has delay {synapse.delay}: SANA-FE's dendrites hold spikes back for 1 to {LARGEST_DELAY} ticks, so connect nearer populations"
            )
    problems += [
        f"population '{name}' can add up more than {LARGEST_SUM:,} in phase '{phase.name}', which SANA-FE cannot count: lower the width of what feeds it"
        for name in phase.order
        if graph.population(name).kind != "input" and largest_total(graph, phase, name) > LARGEST_SUM
    ]
    return problems


SANAFE = SanaFe()
