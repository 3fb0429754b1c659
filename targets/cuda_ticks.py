"""`sim` on CUDA: the model step of `toolchain.ir` over static buffers, so that many ticks are recorded once as a CUDA graph and replayed without the host.

Which spikes meet which connection at which tick follows from the graph alone, so a phase is a list of moves, made once: deliver what a population emitted through a
connection into its target's waiting currents (`cuda_products`), and advance a population by a model step (`fused_step`, one kernel; torch operations where Triton is missing).
Moves read and write buffers that stay where they are: potentials, waiting currents, the last few emissions of each population, counts. Blocks of moves
that are the same share one recording. Still images make the same current at every step, so they are multiplied once a run and join drive and bias as one constant.

On other devices, and where a history is asked for, the same moves are made one by one: only the recording itself needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from math import prod
from typing import Any, NamedTuple, Protocol, Union

import numpy as np
import torch
from torch import Tensor

from toolchain import codec
from toolchain.errors import GraphError
from toolchain.fixed import EXACT_FLOAT32, EXACT_FLOAT64, INT32_SAFE, decay, largest_product, largest_total
from toolchain.ir import DECAY_ONE, POTENTIAL_LIMIT, Array, Graph, Phase, Synapse, exponent_of
from toolchain.target import Executable, History, Latch, Result, join
from toolchain.targets.cuda_products import (
    INT8,
    FloatProduct,
    Int8Product,
    Product,
    Scratch,
    agrees,
    inward,
    outward,
    unshortened,
    windows_of,
)
from toolchain.targets.torch_ticks import AT_ONCE

STEPS_RECORDED = 32
"""Model steps of one recording: more make replays rarer, and the first run slower."""

READOUT, PLUS, BOTH, RELAY = range(4)
MEMBERS = {"none": READOUT, "plus": PLUS, "both": BOTH, "graded": RELAY}

INT8_LEVELS = INT8[1]
"""Input levels that int8 holds."""


class Step(Protocol):
    """Advance a population in place; see `fused_step.integer_step` for the tensors."""

    def __call__(
        self,
        potential: Tensor,
        waiting: Tensor | None,
        constant: Tensor | None,
        spikes: Tensor,
        counts: Tensor,
        activity: Tensor,
        saturations: Tensor,
        *,
        members: int,
        threshold: int,
        reset: int,
        keep: int,
    ) -> None: ...


def supports(graph: Graph) -> str | None:
    """None where `compile` takes this graph, else why not, in a sentence."""
    if not graph.integer:
        return "target 'sim' runs integer graphs and this one is in floats: add the quantize pass, or use target 'torch'"
    for phase in graph.phases:
        widest = max((largest_product(graph, synapse)[0] for synapse in phase.synapses), default=0)
        if widest >= EXACT_FLOAT64:
            return f"a sum of phase '{phase.name}' can reach {widest}, above 2^53: lower the weights or the input levels"
    return None


def compile(graph: Graph, *, batch: int, trace: bool, device: torch.device) -> Executable:
    """An executable of an integer graph on `device`; GraphError where `supports` finds a fault. Up to `batch` samples advance together, of large networks fewer."""
    fault = supports(graph)
    if fault is not None:
        raise GraphError(fault)
    return StaticRun(graph, batch=batch, trace=trace, ways=ways_on(device))


class Ways(NamedTuple):
    """How a run computes: where, how it updates neurons, with what it records the phases of a chunk (None: it does not), and whether products are `tried` against float64
    before their first use."""

    device: torch.device
    step: Step
    recorder: Callable[[], Record] | None
    tried: bool


def ways_on(device: torch.device) -> Ways:
    """What `device` can do."""
    step = _fused_step() if neuron_update(device) is None else torch_step
    return Ways(device, step, CudaRecorder if device.type == "cuda" else None, device.type != "cpu")


def neuron_update(device: torch.device) -> str | None:
    """None where Triton's kernel updates the neurons on `device`, else why torch's operations do, exactly too but slower."""
    return "the kernel is for CUDA" if device.type != "cuda" else _unfused()


@cache
def _unfused() -> str | None:
    """What Triton lacks here; tried once on the GPU, since a missing C compiler or an old GPU shows only then."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    try:
        return None if is_right(_fused_step(), torch.device("cuda")) else "Triton's kernel computes something else here"
    except Exception as error:  # whatever a compiler says
        return f"Triton's kernel does not run here: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _fused_step() -> Step:
    from toolchain.targets import fused_step

    return fused_step.integer_step


def is_right(step: Step, device: torch.device) -> bool:
    """Whether `step` does to some neurons on `device` what `torch_step` does."""
    shape = (3, 700)
    random = torch.Generator().manual_seed(0)

    def drawn(low: int, high: int, kind: torch.dtype) -> Tensor:
        return torch.randint(low, high, shape, generator=random).to(kind)

    for members in MEMBERS.values():
        given = [
            drawn(-POTENTIAL_LIMIT, POTENTIAL_LIMIT, torch.int32),
            drawn(-(2**24), 2**24, torch.int32),
            drawn(-9, 9, torch.int32)[0].contiguous(),
            drawn(0, 1, torch.int32 if members == RELAY else torch.int8),
            drawn(0, 9, torch.int64 if members == RELAY else torch.int32),
            drawn(0, 9, torch.int32),
            drawn(0, 9, torch.int32),
        ]
        ours, theirs = ([t.to(device, copy=True) for t in given] for _ in range(2))
        for form, tensors in ((step, ours), (torch_step, theirs)):
            form(*tensors, members=members, threshold=2**20, reset=2**19, keep=3000)
        if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            return False
    return True


def torch_step(
    potential: Tensor,
    waiting: Tensor | None,
    constant: Tensor | None,
    spikes: Tensor,
    counts: Tensor,
    activity: Tensor,
    saturations: Tensor,
    *,
    members: int,
    threshold: int,
    reset: int,
    keep: int,
) -> None:
    """`fused_step.integer_step` in torch operations."""
    if members == RELAY:
        potential.zero_()
    if members == READOUT:
        _leak(potential, keep)
    for part in (waiting, constant):
        if part is not None:
            potential.add_(part)
    saturations.add_(potential.abs() > POTENTIAL_LIMIT)
    potential.clamp_(-POTENTIAL_LIMIT, POTENTIAL_LIMIT)
    if members == READOUT:
        return
    if members == RELAY:
        fired = potential
    else:
        fired = (potential >= threshold).to(torch.int8)
        if members == BOTH:
            fired -= (potential <= -threshold).to(torch.int8)
        potential.sub_(fired, alpha=reset)
        _leak(potential, keep)
    spikes.copy_(fired)
    counts.add_(fired)
    if members != PLUS:
        activity.add_(fired != 0)


def _leak(potential: Tensor, keep: int) -> None:
    if keep != DECAY_ONE:
        size = potential.abs()
        # |u| * keep passes 32 bits: taken apart, nothing does
        potential.sign_().mul_((size >> 12) * keep + (((size & (DECAY_ONE - 1)) * keep) >> 12))


class Deliver(NamedTuple):
    """What the source of a synapse keeps in `slot` arrives at its target, as the `first` since the target's last step or not."""

    synapse: int
    slot: int
    first: bool


class Advance(NamedTuple):
    """A population makes a model step and emits into `slot`. `waits`: something arrived; `biases` have started, and the `still` synapses each brought a still image."""

    population: str
    slot: int
    waits: bool
    biases: tuple[int, ...]
    still: tuple[int, ...]


Move = Union[Deliver, Advance]
Block = tuple[Move, ...]
Constant = tuple[tuple[int, ...], tuple[int, ...]]
Form = Callable[[], Product]
Record = Callable[[Callable[[], None]], Callable[[], None]]


def schedule(graph: Graph, phase: Phase) -> list[Block]:
    """The moves of each tick of `phase`."""
    place = {name: i for i, name in enumerate(phase.order)}
    kinds = {name: graph.population(name) for name in phase.order}
    incoming = {name: [(i, s) for i, s in enumerate(phase.synapses) if s.target == name] for name in phase.order}
    slots = kept(phase)
    waits = dict.fromkeys(phase.order, False)
    still: dict[str, list[int]] = {name: [] for name in phase.order}
    made = []
    for tick in range(phase.ticks - phase.timing.flush):
        moves: list[Move] = []
        for name in phase.order:
            if kinds[name].kind == "input":
                continue
            for index, synapse in incoming[name]:
                source = kinds[synapse.source]
                emitted = phase.step_at(synapse.source, tick - synapse.delay)
                if emitted is None or (synapse.delay == 0 and place[synapse.source] > place[name]):
                    continue
                if source.kind == "input" and not source.events:
                    still[name].append(index)
                else:
                    moves.append(Deliver(index, emitted if source.events else emitted % slots[synapse.source], not waits[name]))
                    waits[name] = True
            step = phase.step_at(name, tick)
            if step is not None:
                biases = () if kinds[name].kind == "readout" else phase.bias.get(name, ())
                started = tuple(i for i, bias in enumerate(biases) if step >= bias.start)
                moves.append(Advance(name, step % slots[name], waits[name], started, tuple(sorted(still[name]))))
                waits[name], still[name] = False, []
        made.append(tuple(moves))
    return made


def kept(phase: Phase) -> dict[str, int]:
    """How many emissions of each population are kept, so that none is overwritten while a synapse still carries it."""
    longest = {name: max((s.delay for s in phase.synapses if s.source == name), default=0) for name in phase.order}
    return {name: delay // phase.timing.period + 1 for name, delay in longest.items()}


def blocks(graph: Graph, phase: Phase) -> list[Block]:
    """The moves of a phase in blocks that repeat once all populations have started."""
    ticks = schedule(graph, phase)
    turns = int(np.lcm.reduce(list(kept(phase).values())))
    length = phase.timing.period * turns * -(-STEPS_RECORDED // turns)
    found = [tuple(move for moves in ticks[i : i + length] for move in moves) for i in range(0, len(ticks), length)]
    return [block for block in found if block]


class CudaRecorder:
    """Records what functions do on the GPU, and makes of each one that replays it. Its recordings share the memory of their temporaries, as no two play at once."""

    def __init__(self) -> None:
        self._cuda: Any = torch.cuda  # untyped
        self._pool = self._cuda.graph_pool_handle()

    def __call__(self, make: Callable[[], None]) -> Callable[[], None]:
        cuda, stream = self._cuda, _side_stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            make()  # compiles kernels and lets cuBLAS choose and reserve, which a recording must not
        cuda.current_stream().wait_stream(stream)
        recorded = cuda.CUDAGraph()
        with cuda.graph(recorded, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            make()
        replay: Callable[[], None] = recorded.replay
        return replay


@cache
def _side_stream() -> Any:
    """One for all recordings: cuBLAS keeps tens of MiB for each stream it has seen."""
    cuda: Any = torch.cuda
    return cuda.Stream()


class StaticRun:
    """An executable on static buffers. Samples run in chunks of `batch`, the last one padded to a power of two; each size is laid out and recorded once."""

    def __init__(self, graph: Graph, *, batch: int, trace: bool, ways: Ways) -> None:
        self.graph = graph
        neurons = sum(prod(population.shape) for population in graph.populations)
        self._batch = max(1, min(batch, AT_ONCE.get(ways.device.type, AT_ONCE["cpu"]) // neurons))
        self._trace, self._ways = trace, ways
        self._weights = Weights(graph, ways.device)
        self._chunks: dict[tuple[str, int], Chunk] = {}
        self._latch = Latch()

    def run(self, inputs: Array, *, phase: str = "forward") -> Result:
        graph, plan = self.graph, self.graph.phase(phase)
        if phase == "forward":
            values = codec.check_inputs(graph, inputs)
            forward = None
        else:
            values = codec.check_error(graph, inputs)
            forward = self._latch.forward(len(values))
        parts = []
        with torch.inference_mode(), unshortened(), _on(self._ways.device):
            for start in range(0, len(values), self._batch):
                part = values[start : start + self._batch]
                chunk = self._chunk(plan, len(part))
                chunk.load(part, forward, start)
                chunk.play()
                parts.append(chunk.result(len(part)))
        result = join(parts)
        if phase == "forward":
            self._latch.keep(result)
        return result

    def _chunk(self, plan: Phase, samples: int) -> Chunk:
        size = min(self._batch, 1 << (samples - 1).bit_length())
        if (plan.name, size) not in self._chunks:
            self._chunks[plan.name, size] = Chunk(self.graph, plan, size, self._weights, self._ways, trace=self._trace)
        return self._chunks[plan.name, size]

    def close(self) -> None:
        """Let go of all buffers and recordings; a later run makes them anew."""
        self._chunks.clear()
        self._weights = Weights(self.graph, self._ways.device)

    def __enter__(self) -> StaticRun:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _State:
    """The buffers of one population, (samples, neurons), images channels last."""

    def __init__(self, graph: Graph, phase: Phase, name: str, samples: int, slots: int, device: torch.device) -> None:
        dynamics = phase.dynamics[name]
        shape = (samples, prod(graph.population(name).shape))

        def zeros(kind: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        self.members = MEMBERS[dynamics.members]
        self.threshold, self.reset, self.leak = int(dynamics.threshold), int(dynamics.reset), dynamics.leak
        self.keep = DECAY_ONE - decay(dynamics.leak)
        self.wide = torch.int32 if largest_total(graph, phase, name) <= INT32_SAFE else torch.int64
        self.potential = zeros(self.wide)
        self.waiting = zeros(self.wide)
        self.slots = [zeros(self.wide if self.members == RELAY else torch.int8) for _ in range(slots)]
        self.counts = zeros(torch.int64 if self.members == RELAY else torch.int32)
        self.activity = self.counts if self.members == PLUS else zeros(torch.int32)
        self.saturations = zeros(torch.int32)
        self.trace = zeros(torch.float64) if dynamics.leak != 1 and self.members != READOUT else None
        self.constants: dict[Constant, Tensor] = {}
        self.history: list[tuple[Tensor, Tensor]] = []

    def clear(self) -> None:
        for buffer in (self.potential, self.counts, self.activity, self.saturations, self.trace):
            if buffer is not None:
                buffer.zero_()
        self.history = []


def _put(buffer: Tensor, values: Array) -> None:
    """`values` of the first samples into `buffer`, and 0 behind them."""
    held = values.astype(np.int8) if values.dtype == np.bool_ else values
    buffer.zero_()
    buffer[: len(values)].copy_(inward(torch.as_tensor(held), values.shape[1:]))


class Weights:
    """Mantissas as floats, each tensor once for all that read it in one type."""

    def __init__(self, graph: Graph, device: torch.device) -> None:
        self._graph, self._device = graph, device
        self._found: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, kind: torch.dtype) -> Callable[[str], Tensor]:
        return lambda name: self._held(name, kind)

    def _held(self, name: str, kind: torch.dtype) -> Tensor:
        if (name, kind) not in self._found:
            self._found[name, kind] = torch.as_tensor(self._graph.tensors[name].astype(np.float64), dtype=kind, device=self._device)
        return self._found[name, kind]


class Chunk:
    """One phase over `samples` samples: `load` what they are, `play` the phase, take the `result`."""

    def __init__(self, graph: Graph, phase: Phase, samples: int, weights: Weights, ways: Ways, *, trace: bool) -> None:
        device = ways.device
        self._graph, self._phase, self._samples, self._device = graph, phase, samples, device
        self._step, self._trace, self._weights = ways.step, trace, weights
        self._injected: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        slots = kept(phase)
        neurons = [name for name in phase.order if graph.population(name).kind != "input"]
        self._states = {name: _State(graph, phase, name, samples, slots[name], device) for name in neurons}
        self._frames: list[Tensor] = []
        gates = dict.fromkeys(s.gate for s in phase.synapses if s.gate is not None)
        self._masks = {gate: torch.zeros((samples, _size(graph, gate)), dtype=torch.int8, device=device) for gate in gates}
        self._blocks = blocks(graph, phase)
        self._lay_out_inputs()
        self._lay_out_constants()
        self._products = self._prepared(ways.tried)
        record = None if trace or ways.recorder is None else ways.recorder()
        # what the buffers hold after recording means nothing: `load` starts anew
        self._plays = {block: self._playable(block, record) for block in dict.fromkeys(self._blocks)}

    def _lay_out_inputs(self) -> None:
        """Buffers of what input populations emit: one frame, of events one for each step."""
        graph, phase = self._graph, self._phase
        found = [graph.population(name) for name in phase.order if graph.population(name).kind == "input"]
        if not found:
            return
        levels = graph.scale("forward", found[0].name)
        kind = torch.int8 if levels <= INT8_LEVELS else torch.float32 if levels < EXACT_FLOAT32 else torch.float64
        shape = (self._samples, prod(found[0].shape))
        count = phase.time_steps if found[0].events else 1
        self._frames = [torch.zeros(shape, dtype=kind, device=self._device) for _ in range(count)]

    def _lay_out_constants(self) -> None:
        """Buffers of what a step adds besides what arrives: (neurons,) where it is the same for all samples, hence final, else (samples, neurons)."""
        graph, phase = self._graph, self._phase
        driven = {drive.population for drive in phase.drive}
        biases = codec.bias_currents(graph, phase)
        for move in (move for block in self._blocks for move in block):
            if not isinstance(move, Advance) or not (move.biases or move.still or move.population in driven):
                continue
            state, name, key = self._states[move.population], move.population, (move.biases, move.still)
            if key in state.constants:
                continue
            total = np.zeros((1, *graph.population(name).shape), np.int64)
            for index in move.biases:
                total = total + biases[name][index][1]
            self._injected[name, move.biases] = inward(torch.as_tensor(total), total.shape[1:])[0].to(self._device, state.wide)
            own = self._injected[name, move.biases]
            state.constants[key] = own.repeat(self._samples, 1) if move.still or name in driven else own

    def _prepared(self, tried: bool) -> dict[int, Product]:
        """The products of all synapses, those of int8 with one scratch for all. Where `tried`, each is compared with float64 before its first use."""
        scratch = Scratch(self._device)
        moving = {move.synapse for block in self._blocks for move in block if isinstance(move, Deliver)}
        forms = {i: self._forms(s, scratch, moving=i in moving) for i, s in enumerate(self._phase.synapses)}
        found = {index: ways[0]() for index, ways in forms.items()}
        scratch.allocate()
        return {i: self._right(self._phase.synapses[i], made, forms[i][1:]) for i, made in found.items()} if tried else found

    def _forms(self, synapse: Synapse, scratch: Scratch, *, moving: bool) -> list[Form]:
        """The ways to compute a synapse's product, the fastest first; the last one is sure."""
        graph, device = self._graph, self._device
        partial, _ = largest_product(graph, synapse)
        forms: list[Form] = [lambda: FloatProduct(graph, synapse, torch.float64, self._weights(torch.float64), device)]
        if partial < EXACT_FLOAT32:
            forms.insert(0, lambda: FloatProduct(graph, synapse, torch.float32, self._weights(torch.float32), device))
        windows = windows_of(graph, synapse) if moving and partial <= INT32_SAFE and self._emitted(synapse.source) == torch.int8 else None
        if windows is None:
            return forms
        found, exponent, masked = windows, exponent_of(synapse.ops), synapse.gate is not None

        def whole(columns: bool) -> Product:
            return Int8Product(found, self._samples, exponent, scratch, device, columns=columns, masked=masked)

        return [lambda: whole(True), lambda: whole(False), *forms]

    def _right(self, synapse: Synapse, first: Product, others: Sequence[Form]) -> Product:
        """The first form that makes what the last makes of random spikes, the largest values that the source can send among them."""
        if not others:
            return first
        sure, source = others[-1](), self._graph.population(synapse.source)
        top = {"input": int(self._graph.scale("forward", source.name)), "linear": POTENTIAL_LIMIT}.get(source.kind, 1)
        random = torch.Generator().manual_seed(0)
        drawn = torch.randint(-1, 2, (self._samples, prod(source.shape)), generator=random)
        drawn[0] = 1
        spikes, waiting = (drawn * top).to(self._device, self._emitted(source.name)), self._states[synapse.target].waiting
        tries = (first, *(form() for form in others[:-1]))
        return next((form for form in tries if agrees(form, sure, spikes, waiting)), sure)

    def _emitted(self, name: str) -> torch.dtype:
        return self._states[name].slots[0].dtype if name in self._states else self._frames[0].dtype

    def load(self, values: Array, forward: Result | None, first: int) -> None:
        """Take the inputs of up to `samples` samples, or their errors with the masks of the forward run from its sample `first` on; everything else starts anew."""
        graph, phase = self._graph, self._phase
        if forward is None:
            encoded = codec.encode_input(graph, values)
            currents = {drive.population: codec.input_current(graph, drive, encoded) for drive in phase.drive}
            events = graph.of_kind("input")[0].events
            for step, frame in enumerate(self._frames):
                _put(frame, encoded[..., step] if events else encoded)
        else:
            currents = {drive.population: codec.error_current(graph, values) for drive in phase.drive}
            for gate, buffer in self._masks.items():
                _put(buffer, codec.mask(graph, forward, gate)[first : first + len(values)])
        for state in self._states.values():
            state.clear()
        self._load_constants(currents)

    def _load_constants(self, currents: dict[str, Array]) -> None:
        """Drive, biases that have started and still images, added up."""
        still: dict[int, Tensor] = {}
        for name, state in self._states.items():
            for key, buffer in state.constants.items():
                if buffer.ndim == 1:
                    continue
                if name in currents:
                    _put(buffer, currents[name])
                else:
                    buffer.zero_()
                buffer.add_(self._injected[name, key[0]])
                for index in key[1]:
                    if index not in still:
                        still[index] = torch.zeros_like(buffer)
                        self._products[index](self._frames[0], None, still[index], first=True)
                    buffer.add_(still[index])

    def play(self) -> None:
        """Run the whole phase."""
        for block in self._blocks:
            self._plays[block]()

    def _playable(self, block: Block, record: Record | None) -> Callable[[], None]:
        def make() -> None:
            self._make(block)

        return make if record is None else record(make)

    def _make(self, block: Block) -> None:
        for move in block:
            if isinstance(move, Deliver):
                self._deliver(move)
            else:
                self._advance(move)

    def _deliver(self, move: Deliver) -> None:
        synapse = self._phase.synapses[move.synapse]
        source = self._states[synapse.source].slots if synapse.source in self._states else self._frames
        mask = None if synapse.gate is None else self._masks[synapse.gate]
        self._products[move.synapse](source[move.slot], mask, self._states[synapse.target].waiting, first=move.first)

    def _advance(self, move: Advance) -> None:
        state = self._states[move.population]
        sent = state.slots[move.slot]
        self._step(
            state.potential,
            state.waiting if move.waits else None,
            state.constants.get((move.biases, move.still)),
            sent,
            state.counts,
            state.activity,
            state.saturations,
            members=state.members,
            threshold=state.threshold,
            reset=state.reset,
            keep=state.keep,
        )
        if state.trace is not None:  # two roundings, as the definition has them: never one kernel that may fuse them
            state.trace.mul_(state.leak)
            state.trace.add_(sent)
        if self._trace:
            state.history.append((sent.clone(), state.potential.clone()))

    def result(self, samples: int) -> Result:
        """What the phase left of the first `samples` samples."""
        states = self._states

        def array(name: str, values: Tensor, kind: Any) -> Array:
            shape = self._graph.population(name).shape
            found: Array = outward(values[:samples], shape).to("cpu", copy=True).numpy().astype(kind, copy=False)
            return found.reshape(samples, *shape)

        def steps(name: str, which: int, kind: Any) -> Array:
            return np.stack([array(name, row[which], kind) for row in states[name].history])

        def sent(name: str) -> Any:
            return np.int64 if states[name].members == RELAY else np.int8

        return Result(
            phase=self._phase.name,
            time_steps=self._phase.time_steps,
            counts={name: array(name, s.counts, np.int64 if s.members == RELAY else np.int32) for name, s in states.items()},
            activity={name: array(name, s.activity, np.int32) for name, s in states.items()},
            traces={name: array(name, s.counts if s.trace is None else s.trace, np.float64) for name, s in states.items()},
            potentials={name: array(name, s.potential, np.int64) for name, s in states.items()},
            saturations={name: array(name, s.saturations, np.int32) for name, s in states.items()},
            history={name: History(steps(name, 0, sent(name)), steps(name, 1, np.int64)) for name, s in states.items() if s.history},
        )


def _size(graph: Graph, name: str) -> int:
    return prod(graph.population(name).shape)
