"""What a target is: something that checks a graph, compiles it, and runs its phases. Found by name among ours and by entry point.

A target is a frozen dataclass whose fields are its options (`dataclasses.replace(SIM, batch=64)`); the constants in `toolchain.targets` hold the
defaults. Other packages add theirs with an entry point in the group `toolchain.targets` that names such a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from toolchain.errors import UsageError, unknown
from toolchain.ir import Array, Graph

if TYPE_CHECKING:
    from toolchain.limits import Limits
    from toolchain.passes import Pipeline

__all__ = ["Executable", "History", "Result", "Target", "get", "names"]


@dataclass(frozen=True)
class History:
    """Everything a population did, a row a model step: `spikes` (int8; of a relay its graded values) and `potentials` (after reset and leak), both
    (time_steps, samples, *shape)."""

    spikes: Array
    potentials: Array


@dataclass(frozen=True)
class Result:
    """What a phase left behind, by population; every array has the samples first.

    counts       int32, signed sum of spikes (forward: the spike count); of a relay the sum of its graded values, int64 or float64
    activity     int32, number of spikes of either sign; of a relay the number of values other than 0
    traces       float64, leak-weighted sum of spikes r[T] with r <- leak * r + s (equals counts without leak)
    potentials   final membrane potential in graph units; for a readout, its (weighted) sum
    saturations  int32, how many steps clamped at 24 bit
    history      spikes and potentials of every step, where the target was built with `trace=True`
    """

    phase: str
    time_steps: int
    counts: dict[str, Array]
    activity: dict[str, npt.NDArray[np.int32]]
    traces: dict[str, npt.NDArray[np.float64]]
    potentials: dict[str, Array]
    saturations: dict[str, npt.NDArray[np.int32]]
    history: dict[str, History] = field(default_factory=dict)


def join(parts: Sequence[Result]) -> Result:
    """Results of consecutive samples as one."""
    if len(parts) == 1:
        return parts[0]

    def joined(field: str) -> dict[str, Any]:
        return {name: np.concatenate([getattr(part, field)[name] for part in parts]) for name in getattr(parts[0], field)}

    history = {
        name: History(
            *(np.concatenate([getattr(part.history[name], field) for part in parts], axis=1) for field in ("spikes", "potentials"))
        )
        for name in parts[0].history
    }
    fields = {field: joined(field) for field in ("counts", "activity", "traces", "potentials", "saturations")}
    return Result(phase=parts[0].phase, time_steps=parts[0].time_steps, history=history, **fields)


@runtime_checkable
class Executable(Protocol):
    """A compiled graph, ready to run; a context manager that always closes what it started."""

    graph: Graph

    def run(self, inputs: Array, *, phase: str = "forward") -> Result:
        """Run one phase over any number of samples.

        forward: `inputs` in [0, 1], (samples, *input shape). feedback: `inputs` is the error d(gain * loss)/d(rate) in the model's unit, (samples,
        *shape of the driven population), for the same samples as the forward run before it, whose spike counts are latched as masks.
        """

    def close(self) -> None: ...

    def __enter__(self) -> Executable: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


@runtime_checkable
class Target(Protocol):
    """Somewhere a graph can run."""

    @property
    def name(self) -> str: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def pipeline(self) -> Pipeline:
        """The passes from a lowered graph to one that this target takes."""

    def available(self) -> str | None:
        """None where the target can run here, else one sentence: what is missing and the command that installs it."""

    def check(self, graph: Graph) -> list[str]:
        """Every design rule the graph breaks on this target, a sentence each; empty where it fits."""

    def compile(self, graph: Graph) -> Executable:
        """An executable of `graph`, which `check` finds no fault with."""


GROUP = "toolchain.targets"


def names() -> list[str]:
    """All targets by name, ours first."""
    from toolchain import targets

    return [*targets.BUILTIN, *(e.name for e in entry_points(group=GROUP) if e.name not in targets.BUILTIN)]


def get(name: str) -> Target:
    """The target called `name`, built in or from an entry point; UsageError lists the known ones."""
    from toolchain import targets

    if name in targets.BUILTIN:
        return targets.load(name)
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return _loaded(entry.load(), name)
    raise unknown("target", name, names())


def _loaded(found: object, name: str) -> Target:
    if not isinstance(found, Target):
        raise UsageError(
            f"entry point '{name}' in group '{GROUP}' names a {type(found).__name__}, which has not all members of toolchain.target.Target: ask its author"
        )
    return found


class Latch:
    """The masks a feedback run needs: spike counts of the forward run before it. Every executable holds one."""

    def __init__(self) -> None:
        self._forward: Result | None = None

    def keep(self, forward: Result) -> None:
        self._forward = forward

    def forward(self, samples: int) -> Result:
        """The latched forward result; UsageError where there is none or it had another number of samples."""
        if self._forward is None:
            raise UsageError("the feedback phase needs the masks of a forward run: run phase 'forward' on the same samples first")
        latched = len(next(iter(self._forward.counts.values())))
        if latched != samples:
            raise UsageError(
                f"the feedback phase got {samples} samples but the forward run before it had {latched}: give the errors of the same samples"
            )
        return self._forward
