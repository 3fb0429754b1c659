"""When rates settle: how far they are from equilibrium after each time step, how many steps that suggests, and the answers after as many.

After t steps the rates a(t) are those of a run of t time steps. Their residual is |f(a) - a|, f being what rates the same sources would make in equilibrium
(`analysis.equilibrium`), of the float graph and of the integer graph each with its own f: what is left of it at the end is the 1/t of whole spikes and, with a
leak, the last potentials. The number of steps it suggests is backed by the answers: forward by the accuracy after t steps, feedback by the cosine of
m * beta(t) with the solution of the linear equation that it stands for, found without spikes (None where that did not converge).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from toolchain import codec
from toolchain.analysis.equilibrium import Precision, RateMap, feedback_equilibrium, mean_input
from toolchain.analysis.lockstep import Copy, Lockstep
from toolchain.fixed import leak_sum
from toolchain.ir import Array, Phase, Synapse
from toolchain.notation import table
from toolchain.target import Result

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 0.01
"""Mean |f(a) - a| at which the forward phase counts as settled: one spike in a hundred steps."""

FEEDBACK_TOLERANCE = 0.1
"""|f(b) - b| / |f(b)| (norms over all couples and samples) at which the feedback phase does: its rates have no size of their own, which is the scale factor's."""

ANSWERS = 0.01
"""Share of the samples by which the accuracy may still move."""

COSINE = 0.005
"""By how much the cosine of the feedback phase may still rise."""

SEEN = 0.8
"""A residual is within a tolerance for good where it is for the steps from this part of them on: a leak's wanders about."""

DENSE = 32
"""Up to so many steps every one is looked at; later ones are a twelfth apart."""

NAMES: dict[Copy, str] = {"float": "float", "entire": "integer"}


@dataclass(frozen=True)
class Curve:
    """One phase of one graph, "float" or "integer", after `steps` time steps; all tuples have their length. `leaks`: some couple does.

    residual    by population mean |f(a) - a|; of a relay in the model's unit
    whole       the mean over all couples
    relative    the norm of f(a) - a over that of f(a), all couples and samples (nothing over nothing is 0)
    rate        mean |rate| of all couples
    accuracy    forward: share of right answers after t steps
    cosine      feedback: of m * beta with the solution of the linear equation; None where that is not known, 0 where nothing has fired
    """

    phase: str
    graph: str
    time_steps: int
    samples: int
    leaks: bool
    steps: tuple[int, ...]
    residual: dict[str, tuple[float, ...]]
    whole: tuple[float, ...]
    relative: tuple[float, ...]
    rate: tuple[float, ...]
    accuracy: tuple[float, ...] | None = None
    cosine: tuple[float, ...] | None = None

    @property
    def judged(self) -> tuple[float, ...]:
        """The residual that tolerances are for."""
        return self.whole if self.phase == "forward" else self.relative

    @property
    def tolerance(self) -> float:
        return TOLERANCE if self.phase == "forward" else FEEDBACK_TOLERANCE

    def steps_to(self, tolerance: float) -> int | None:
        """The first step from which on the residual stays within `tolerance`; None where it does not for the last fifth of the steps at least."""
        return self._for_good([value <= tolerance for value in self.judged])

    def _for_good(self, holds: Sequence[bool]) -> int | None:
        found = first_for_good(self.steps, holds)
        return None if found is None or found > max(SEEN * self.steps[-1], 1) else found

    @property
    def answered(self) -> int | None:
        """The first step from which on the accuracy stays within `ANSWERS` of the last one (or a sample), in the feedback phase the cosine within `COSINE` of its
        best; None where neither is known."""
        if self.accuracy is not None:
            last = self.accuracy[-1]
            return first_for_good(self.steps, [abs(value - last) <= max(ANSWERS, 1 / self.samples) + 1e-9 for value in self.accuracy])
        if self.cosine is not None:
            best = max(self.cosine)
            return first_for_good(self.steps, [value >= best - COSINE for value in self.cosine])
        return None

    @property
    def silent(self) -> bool:
        """Whether nothing has fired."""
        return self.rate[-1] == 0

    @property
    def suggested(self) -> int | None:
        """The number of time steps: the residual within its tolerance and the answers settled; None where the residual does not come within it, and where nothing
        fires."""
        if self.silent:
            return None
        steps = self.steps_to(self.tolerance)
        return None if steps is None else max(steps, self.answered or 1)

    def at(self, step: int, values: Sequence[float]) -> float:
        """The value after `step`, or after the last step looked at before it."""
        return values[max(i for i, s in enumerate(self.steps) if s <= step)]

    @property
    def sentence(self) -> str:
        """The suggestion in words, with what backs it."""
        letter, now = ("T" if self.phase == "forward" else "T_B"), self.time_steps
        residual = f"residual {self.at(now, self.judged):.3g} at {letter} {now}"
        if self.silent:
            cure = (
                "check its currents and thresholds"
                if self.phase == "forward"
                else "raise the scale factor, or give samples with larger errors"
            )
            return f"no {letter} suggested: in the {self.graph} graph's {self.phase} phase nothing fires in {self.steps[-1]} steps ({cure})"
        if self.suggested is None:
            end = residual if self.steps[-1] == now else f"{residual}, {self.judged[-1]:.3g} at {self.steps[-1]}"
            return (
                f"no {letter} up to {self.steps[-1]} suggested: the {self.graph} graph's residual does not stay within {self.tolerance:g} ({end}"
                + (", of which a leak leaves some for good" if self.leaks else "")
                + ("; a larger scale factor resolves it finer, as do more steps" if self.phase == "feedback" else "")
                + (f"; answers settle at {letter} {self.answered}" if self.answered is not None and self.phase == "forward" else "")
                + ")"
            )
        return f"suggested {letter} {self.suggested} ({self.graph} graph: residual {self.at(self.suggested, self.judged):.3g}{self._backed(self.suggested)}; now {residual}{self._backed(now)})"

    def _backed(self, step: int) -> str:
        if self.accuracy is not None:
            return f", accuracy {100 * self.at(step, self.accuracy):.2f} %"
        return "" if self.cosine is None else f", cosine {self.at(step, self.cosine):.4f} with the equation solved"

    def to_json(self) -> dict[str, Any]:
        tolerances = (1 / self.time_steps, TOLERANCE) if self.phase == "forward" else (FEEDBACK_TOLERANCE,)
        return {
            "phase": self.phase,
            "graph": self.graph,
            "time_steps": self.time_steps,
            "suggested_steps": self.suggested,
            "steps_to_tolerance": [{"tolerance": tolerance, "steps": self.steps_to(tolerance)} for tolerance in tolerances],
            "answers_settle_at": self.answered,
            "steps": list(self.steps),
            "residual": {name: list(values) for name, values in self.residual.items()},
            "mean_residual": list(self.whole),
            "relative_residual": list(self.relative),
            "mean_rate": list(self.rate),
            "accuracy": None if self.accuracy is None else list(self.accuracy),
            "cosine": None if self.cosine is None else list(self.cosine),
        }


@dataclass(frozen=True)
class Settling:
    """The curves of both graphs, phase after phase, on the first `samples` samples."""

    curves: tuple[Curve, ...]
    samples: int

    def curve(self, phase: str, graph: str) -> Curve | None:
        return next((c for c in self.curves if (c.phase, c.graph) == (phase, graph)), None)

    def sentence(self, phase: str = "forward") -> str | None:
        """The suggestion for a phase, of the integer graph where there is one; None without that phase."""
        found = self.curve(phase, "integer") or self.curve(phase, "float")
        return None if found is None else found.sentence

    def to_text(self) -> str:
        title = f"settling: mean |f(a) - a| of couples after t steps (feedback: norm relative to f's), {self.samples:,} samples"
        head = ["phase", "graph", "steps now", "residual", "1/T within", "0.01 within", "answers settle", "suggested"]
        cells = [
            [
                c.phase,
                c.graph,
                str(c.time_steps),
                f"{c.at(c.time_steps, c.judged):.4f}",
                _shown(c.steps_to(1 / c.time_steps)) if c.phase == "forward" else "-",
                _shown(c.steps_to(TOLERANCE)) if c.phase == "forward" else f"{_shown(c.steps_to(FEEDBACK_TOLERANCE))} (0.1)",
                _shown(c.answered),
                _shown(c.suggested),
            ]
            for c in self.curves
        ]
        phases = dict.fromkeys(c.phase for c in self.curves)
        return "\n".join([title, *table(head, cells, left=2), *(f"{phase}: {self.sentence(phase)}" for phase in phases)])

    def to_json(self) -> dict[str, Any]:
        return {"samples": self.samples, "curves": [curve.to_json() for curve in self.curves]}


def _shown(steps: int | None) -> str:
    return "-" if steps is None else str(steps)


def first_for_good(steps: Sequence[int], holds: Sequence[bool]) -> int | None:
    """The first of `steps` from which on all hold; None where the last does not."""
    found = None
    for step, held in zip(reversed(steps), reversed(holds), strict=True):
        if not held:
            break
        found = step
    return found


def checkpoints(time_steps: int, horizon: int) -> tuple[int, ...]:
    """The steps that are looked at: every one up to `DENSE`, then a twelfth apart, with `time_steps` and the last."""
    found, step = set(range(1, min(DENSE, horizon) + 1)) | {min(time_steps, horizon), horizon}, float(DENSE)
    while step < horizon:
        found.add(int(step))
        step *= 13 / 12
    return tuple(sorted(found))


@dataclass
class _Sums:
    """Of one copy after one number of steps, over all samples so far."""

    apart: dict[str, float]
    squares: float = 0.0
    expected: float = 0.0
    rates: float = 0.0
    correct: int = 0
    along: float = 0.0
    own: float = 0.0
    solved: float = 0.0


@dataclass(frozen=True)
class _Chunk:
    """What a chunk of samples gives a copy: its constant currents, its encoded input, its masks, and the solved equation (None: not converged)."""

    held: Mapping[str, Tensor]
    encoded: Array | None
    masks: Mapping[str, Tensor]
    solved: Mapping[str, Tensor] | None


class Residuals:
    """Looks on while the copies run a phase, chunk after chunk, and adds up what is left after each number of steps."""

    def __init__(self, run: Lockstep, phase: str, horizon: int) -> None:
        self._run, self._phase, self._steps = run, phase, checkpoints(run.floats.phase(phase).time_steps, horizon)
        self._copies: tuple[Copy, ...] = tuple(copy for copy in run.copies if copy != "single")
        self._maps = {copy: RateMap(run.graph(copy), phase, "float32") for copy in self._copies}
        self._leaks = {copy: _leaks(run.graph(copy).phase(phase)) for copy in self._copies}
        inner = self._maps["float"].inner
        self._sums = {copy: {step: _Sums(dict.fromkeys(inner, 0.0)) for step in self._steps} for copy in self._copies}
        self._samples, self._all_solved = 0, True
        self._labels: Array = np.zeros(0, np.int64)
        self._chunks: dict[Copy, _Chunk] = {}
        self._made: dict[tuple[Copy, str], int] = {}
        self._traces: dict[tuple[Copy, str, float], Tensor] = {}
        self._seen: dict[tuple[Copy, int], dict[tuple[str, float], Tensor]] = {}

    def begin_forward(self, inputs: Array, labels: Array) -> None:
        """The next samples: `inputs` (samples, *input shape)."""
        self._begin(len(inputs))
        self._labels = labels
        for copy in self._copies:
            graph = self._run.graph(copy)
            encoded = codec.encode_input(graph, inputs)
            currents = {d.population: codec.input_current(graph, d, encoded) for d in graph.phase("forward").drive}
            self._chunks[copy] = _Chunk(self._maps[copy].held(currents), encoded, {}, None)

    def begin_feedback(self, forward: Mapping[Copy, Result], errors: Mapping[Copy, Array]) -> None:
        """The next samples: what the forward phase left in each copy, and each copy's error. The equation that is solved is the float graph's."""
        self._begin(len(errors["float"]))
        for copy in self._copies:
            graph, rates = self._run.graph(copy), self._maps[copy]
            gates = {s.gate for s in rates.phase.synapses if s.gate is not None}
            couples = {p.name for p in graph.of_kind("couple") if p.name in rates.phase.order}
            masks = {name: codec.mask(graph, forward[copy], name) for name in gates | couples}
            held = rates.held({d.population: codec.error_current(graph, errors[copy]) for d in rates.phase.drive})
            if copy == "float":
                _, solution = feedback_equilibrium(graph, masks, errors[copy], Precision("float32", 1e-5))
                self._all_solved &= solution.converged
                solved = {n: r.float() * rates.tensor(masks[n]) for n, r in solution.rates.items() if n in couples}
            self._chunks[copy] = _Chunk(
                held, None, {n: rates.tensor(mask) for n, mask in masks.items()}, solved if self._all_solved else None
            )

    def _begin(self, samples: int) -> None:
        self._samples += samples
        for kept in (self._made, self._traces, self._seen, self._chunks):
            kept.clear()

    def watch(self, copy: Copy, name: str, potential: Tensor, emitted: Tensor) -> None:
        if copy == "single":
            return
        step = self._made[copy, name] = self._made.get((copy, name), 0) + 1
        readout = self._run.floats.population(name).kind == "readout"
        for leak in () if readout else self._leaks[copy][name]:
            key, sent = (copy, name, leak), emitted.float()
            self._traces[key] = sent if step == 1 else self._traces[key] * leak + sent
        if step not in self._sums[copy]:
            return
        if readout:
            self._answer(copy, step, potential)
            return
        found = self._seen.setdefault((copy, step), {})
        found |= {(name, leak): self._traces[copy, name, leak] / leak_sum(leak, step) for leak in self._leaks[copy][name]}
        if {seen for seen, _ in found} >= set(self._maps[copy].inner):
            self._look(copy, step, self._seen.pop((copy, step)))

    def _answer(self, copy: Copy, step: int, potential: Tensor) -> None:
        """Answers after `step` steps, as `codec.logits` reads them."""
        graph = self._run.graph(copy).in_steps({"forward": step})
        readout = graph.of_kind("readout")[0].name
        held = potential.numpy().reshape(len(potential), -1)
        scores = codec.logits(graph, Result("forward", step, {}, {}, {}, {readout: held}, {}))
        self._sums[copy][step].correct += int((scores.argmax(axis=1) == self._labels).sum())

    def _look(self, copy: Copy, step: int, means: Mapping[tuple[str, float], Tensor]) -> None:
        """Every population's rates beside what they would be in equilibrium."""
        rates, chunk, sums = self._maps[copy], self._chunks[copy], self._sums[copy][step]
        graph, phase = rates.graph, rates.phase

        def sent(synapse: Synapse) -> Tensor:
            leak = phase.dynamics[synapse.target].leak
            if chunk.encoded is not None and graph.population(synapse.source).kind == "input":
                return rates.tensor(mean_input(graph, chunk.encoded, leak, step))
            values = means[synapse.source, leak]
            return values if synapse.gate is None else values * chunk.masks[synapse.gate]

        for name in rates.inner:
            own = means[name, phase.dynamics[name].leak]
            expected = rates.rate(name, rates.total(name, sent, chunk.held, len(own)))
            unit = graph.scale(self._phase, name) if graph.population(name).kind == "linear" else 1.0
            sums.apart[name] += float((expected - own).abs().sum()) / unit
            if graph.population(name).kind == "couple":
                sums.rates += float(own.abs().sum())
                sums.squares += float((expected - own).square().sum())
                sums.expected += float(expected.square().sum())
                if chunk.solved is not None:
                    size = codec.amplitude(graph, "feedback", name)
                    ours, theirs = own * chunk.masks[name] * size, chunk.solved[name] * codec.amplitude(self._run.floats, "feedback", name)
                    sums.along += float((ours * theirs).sum())
                    sums.own += float(ours.square().sum())
                    sums.solved += float(theirs.square().sum())

    def curves(self) -> tuple[Curve, ...]:
        return tuple(self._curve(copy) for copy in self._copies)

    def _curve(self, copy: Copy) -> Curve:
        graph, sums = self._run.graph(copy), [self._sums[copy][step] for step in self._steps]
        sizes = {name: self._samples * prod(graph.population(name).shape) for name in self._maps[copy].inner}
        couples = [name for name in sizes if graph.population(name).kind == "couple"]
        all_couples = sum(sizes[name] for name in couples)
        known = self._phase == "feedback" and self._all_solved
        return Curve(
            phase=self._phase,
            graph=NAMES[copy],
            time_steps=graph.phase(self._phase).time_steps,
            samples=self._samples,
            leaks=any(graph.phase(self._phase).dynamics[name].leak != 1 for name in couples),
            steps=self._steps,
            residual={name: tuple(s.apart[name] / size for s in sums) for name, size in sizes.items()},
            whole=tuple(sum(s.apart[name] for name in couples) / all_couples for s in sums),
            relative=tuple(sqrt(s.squares / s.expected) if s.expected > 0 else float(s.squares > 0) for s in sums),
            rate=tuple(s.rates / all_couples for s in sums),
            accuracy=tuple(s.correct / self._samples for s in sums) if self._phase == "forward" else None,
            cosine=tuple(_cosine(s) for s in sums) if known else None,
        )


def _cosine(sums: _Sums) -> float:
    lengths = sqrt(sums.own * sums.solved)
    return sums.along / lengths if lengths > 0 else float(sums.own == sums.solved)


def _leaks(phase: Phase) -> dict[str, set[float]]:
    """By population the leaks that a mean of what it sends is weighted with: its own, and those of its targets."""
    found = {name: {dynamics.leak} for name, dynamics in phase.dynamics.items()}
    for synapse in phase.synapses:
        if synapse.source in found:
            found[synapse.source].add(phase.dynamics[synapse.target].leak)
    return found
