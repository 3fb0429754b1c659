"""`sim` on CUDA computes what the reference computes. Its buffers, moves, products and arithmetic are tested here on the CPU, a recording by a tape that plays torch's calls
again as a CUDA graph does; tests marked `cuda` need a GPU for the recording itself."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from toolchain import fixed
from toolchain.errors import GraphError
from toolchain.fixed import Grid
from toolchain.ir import DECAY_ONE, POTENTIAL_LIMIT, Conv2d, ConvTranspose2d, Dense, Dynamics, Population, Scale, Synapse, frozen
from toolchain.passes.retime import Retime
from toolchain.targets import cuda_products, cuda_ticks
from toolchain.targets.cuda_ticks import MEMBERS, StaticRun, torch_step, ways_on
from toolchain.targets.reference import Reference

NAMES = ("strides", "pools", "residual", "relay at the end", "events", "single")
NUMBERS = ("plain", "extreme", "positive", "negative", "always", "saturating", "silent")
CPU = torch.device("cpu")


class Tape(TorchDispatchMode):
    """Torch's calls with the tensors they were made on, to be made again on the same ones. A call that waits for the device to read a number fails, as in a CUDA graph."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        assert call not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)
        made = call(*args, **(kwargs or {}))
        self.calls.append((call, args, kwargs or {}, made))
        return made

    def play(self):
        for call, args, kwargs, made in self.calls:
            again = call(*args, **kwargs)
            for old, new in zip(_tensors(made), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(made):
    return [made] if isinstance(made, torch.Tensor) else [t for t in made if isinstance(t, torch.Tensor)]


class Recorder:
    """What `CudaRecorder` does, with a tape."""

    def __init__(self):
        self.recordings = 0

    def __call__(self, make):
        make()
        with Tape() as tape:
            make()
        self.recordings += 1
        return tape.play


def static(graph, *, batch=3, trace=False, record=None, tried=False):
    return StaticRun(graph, batch=batch, trace=trace, ways=ways_on(CPU)._replace(recorder=record and (lambda: record), tried=tried))


def both_phases(run, x, error):
    return run.run(x), run.run(error, phase="feedback")


def assert_same(assert_identical, run, graph, x, error, *, trace=False):
    with Reference(trace=trace).compile(graph) as sure:
        for a, b in zip(both_phases(run, x, error), both_phases(sure, x, error), strict=True):
            assert_identical(a, b)


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", NAMES)
def test_static_buffers_give_the_reference(network_graph, network_inputs, assert_identical, name, numbers):
    """Ragged last chunks (3 of 7 samples at once), both timings and model steps, leaks; with histories and without; products tried before their use."""
    for leak, mode, trace in ((1.0, "exact", False), (0.75, "pipelined", True), (0.75, "exact", False), (1.0, None, True)):
        graph = network_graph(name, numbers, leak=leak)
        x, error = network_inputs(graph, 7)
        graph = graph if mode is None else Retime(mode)(graph)
        with static(graph, trace=trace, tried=numbers == "extreme") as run:
            assert_same(assert_identical, run, graph, x, error, trace=trace)


@pytest.mark.parametrize("mode", ["exact", "pipelined"])
@pytest.mark.parametrize("name", NAMES)
def test_a_recording_plays_again_with_other_inputs(network_graph, network_inputs, assert_identical, name, mode):
    """The tape knows addresses, not values: the same recordings serve every chunk and every run, whatever is loaded."""
    graph = network_graph(name, "plain", leak=0.75 if mode == "exact" else 1.0)
    record = Recorder()
    inputs = [network_inputs(graph, samples, seed) for samples, seed in ((7, 0), (7, 1), (2, 2))]
    graph = Retime(mode)(graph)
    with static(graph, batch=4, record=record) as run:
        for x, error in inputs:
            assert_same(assert_identical, run, graph, x, error)
            made = record.recordings
        assert_same(assert_identical, run, graph, *inputs[0])
        assert record.recordings == made


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_graphs_give_the_reference(drawn, assert_identical, data):
    graph = data.draw(drawn.graphs(integer=True, extreme=data.draw(st.booleans()), host=data.draw(st.booleans())))
    x, error = data.draw(drawn.values(graph, samples=5))
    mode = data.draw(st.sampled_from(["exact", "pipelined", None]))
    graph = graph if mode is None else Retime(mode)(graph)
    with static(graph, batch=data.draw(st.sampled_from([1, 2, 5])), record=Recorder()) as run:
        assert_same(assert_identical, run, graph, x, error)


@pytest.mark.parametrize("samples", [1, 33, 257])
def test_any_number_of_samples(random_graph, random_inputs, assert_identical, samples):
    """Also where the rows of a product are a population's own buffer: 32 samples and more, 16 neurons."""
    graph = Retime()(random_graph(3, widths=(16, 32), couples=2, numbers="extreme"))
    x, error = random_inputs(graph, samples, 1)
    with static(graph, batch=64) as run:
        assert_same(assert_identical, run, graph, x, error)


def test_a_long_phase_is_recorded_once_for_all_its_middle(network_graph, network_inputs, assert_identical):
    graph = Retime()(network_graph("strides", "plain", time_steps=200, feedback_steps=400))
    x, error = network_inputs(graph, 2)
    record = Recorder()
    with static(graph, record=record) as run:
        assert_same(assert_identical, run, graph, x, error)
    assert record.recordings <= 6  # of each phase the start, the middle and the end
    assert len(cuda_ticks.blocks(graph, graph.phase("feedback"))) >= 12


def test_emissions_are_kept_until_every_synapse_has_carried_them(network_graph):
    phase = Retime()(network_graph("residual", "plain")).phase("forward")
    kept = cuda_ticks.kept(phase)
    for synapse in phase.synapses:
        assert kept[synapse.source] * phase.timing.period > synapse.delay
    assert max(kept.values()) <= 3


def delivered_twice(ops, tensors, source, target, samples, exponent=0, masked=False):
    """What an int8 product (None where there is none) makes of random spikes, the second time added to the first, and what the definition makes."""
    graph = _graph(ops, tensors, source, target)
    windows = cuda_products.windows_of(graph, graph.phases[0].synapses[0])
    draw = np.random.default_rng(0)
    spikes, mask = draw.integers(-1, 2, (samples, *source)), draw.integers(0, 2, (samples, *source))
    spikes[0] = 1
    expected = fixed.apply(ops, tensors, spikes * mask if masked else spikes, target, integer=True)
    if windows is None:
        return None, expected
    found = []
    for columns in (True, False):
        scratch = cuda_products.Scratch(CPU)
        product = cuda_products.Int8Product(windows, samples, exponent, scratch, CPU, columns=columns, masked=masked)
        scratch.allocate()
        waiting = torch.full((samples, int(np.prod(target))), 5, dtype=torch.int32)
        given = cuda_products.inward(torch.tensor(spikes, dtype=torch.int8), source).contiguous()
        gate = cuda_products.inward(torch.tensor(mask, dtype=torch.int8), source).contiguous() if masked else None
        product(given, gate, waiting, first=True)
        product(given, gate, waiting, first=False)
        found.append(cuda_products.outward(waiting, target).numpy().reshape(expected.shape))
    np.testing.assert_array_equal(found[0], found[1])
    return found[0], 2 * expected


def _graph(ops, tensors, source, target):
    from toolchain.ir import Graph, Phase, Provenance, Units

    populations = (Population("a", source, "couple"), Population("b", target, "couple"))
    phase = Phase("forward", 1, ("a", "b"), {}, (Synapse("a", "b", ops),))
    return Graph(populations, (phase,), tensors, Units("integer", {}), Provenance("pair"))


GRIDS = [
    Grid((1, 1), (0, 0), (1, 1), 1),
    Grid((1, 1), (2, 1), (1, 1), 1),
    Grid((2, 1), (1, 1), (1, 2), 2),
    Grid((3, 2), (0, 2), (2, 1), 4),
]


@pytest.mark.parametrize("values", ["all 127", "all -128", "random"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2), (5, 5)])
def test_int8_convolutions_are_exact(monkeypatch, kernel, turned, grid, values):
    """Both ways round, masks, exponents, several samples at once and all, as the definition has them."""
    draw = np.random.default_rng(1)
    channels, out = (8, 4) if grid.groups == 4 else (6, 4)
    shape = (channels, 9, 7)
    weight = draw.integers(-128, 128, (out, channels // grid.groups, *kernel))
    weight = weight if values == "random" else np.full_like(weight, int(values.split()[1]))
    made = tuple((shape[1 + i] + 2 * grid.padding[i] - grid.dilation[i] * (kernel[i] - 1) - 1) // grid.stride[i] + 1 for i in (0, 1))
    tensors = {"w": frozen(weight, np.int8)}
    op = Conv2d("w", grid.stride, grid.padding, grid.dilation, grid.groups, transpose=turned, exponent=2)
    source, target = ((out, *made), shape) if turned else (shape, (out, *made))
    for masked in (False, True):
        for at_once in (2**27, 1):
            monkeypatch.setattr(cuda_products, "ROWS_AT_ONCE", at_once)
            found, expected = delivered_twice((op,), tensors, source, target, 5, exponent=2, masked=masked)
            np.testing.assert_array_equal(found, expected)


def test_int8_transposed_convolutions_with_output_padding():
    draw = np.random.default_rng(2)
    for op, target in (
        (ConvTranspose2d("w", (1, 2), (1, 1), (3, 4)), (3, 6, 9)),
        (ConvTranspose2d("w", (3, 1), (2, 0), (0, 5), (1, 2)), (3, 5, 12)),
        (ConvTranspose2d("w", (2, 2), (3, 3), (1, 1)), (3, 2, 2)),
    ):
        tensors = {"w": frozen(draw.integers(-128, 128, (2, 3, 3, 3)), np.int8)}
        found, expected = delivered_twice((op,), tensors, (2, 3, 3), target, 4)
        np.testing.assert_array_equal(found, expected)
        back = msgspec.structs.replace(op, transpose=True)
        found, expected = delivered_twice((back,), tensors, target, (2, 3, 3), 4)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("source", "target"), [((16,), (32,)), ((3, 4, 5), (7,)), ((7,), (2, 3, 4)), ((3, 2), (2, 2, 2))])
def test_int8_dense_connections_are_exact(source, target, transpose):
    draw = np.random.default_rng(3)
    shape = (int(np.prod(target)), int(np.prod(source)))
    tensors = {"w": frozen(draw.integers(-128, 128, shape[::-1] if transpose else shape), np.int8)}
    for samples in (1, 40):
        found, expected = delivered_twice(
            (Scale(exponent=1), Dense("w", transpose=transpose)), tensors, source, target, samples, exponent=1
        )
        np.testing.assert_array_equal(found, expected)


def test_what_int8_does_not_hold_is_left_to_floats():
    wide = {"w": frozen(np.full((2, 3), 200), np.int16)}
    assert delivered_twice((Dense("w"),), wide, (3,), (2,), 2)[0] is None
    narrow = {"w": frozen(np.full((2, 3), 100), np.int16)}
    assert delivered_twice((Dense("w"),), narrow, (3,), (2,), 2)[0] is not None
    groups = {"w": frozen(np.ones((32, 1, 3, 3)), np.int8)}
    assert delivered_twice((Conv2d("w", padding=(1, 1), groups=32),), groups, (32, 4, 4), (32, 4, 4), 2)[0] is None


def test_a_wrong_product_is_found_before_its_first_use(network_graph, network_inputs, assert_identical, monkeypatch):
    """int16 sums without a flush: caught by the trial, after which the next form serves; untried, the results differ."""

    def short(rows, matrix, made):
        torch.mm(rows.int(), matrix.int(), out=made)
        made.copy_(made.to(torch.int16))

    monkeypatch.setattr(cuda_products, "multiply", short)
    graph = Retime()(_wide())
    x = np.ones((3, 300))
    error = np.ones((3, 4))
    with static(graph, tried=True) as run:
        assert_same(assert_identical, run, graph, x, error)
    with static(graph) as run, pytest.raises(AssertionError):
        assert_same(assert_identical, run, graph, x, error)


def test_a_product_that_the_gpu_refuses_falls_back(network_graph, network_inputs, assert_identical, monkeypatch):
    def refused(rows, matrix, made):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(cuda_products, "multiply", refused)
    graph = Retime()(network_graph("strides", "plain"))
    with static(graph, tried=True) as run:
        assert_same(assert_identical, run, graph, *network_inputs(graph, 3))


def _wide():
    """300 couples that fire at every step into 4, all weights 127: sums of 38,100."""
    from toolchain.ir import Bias, Drive, Graph, Phase, Provenance, Units

    tensors = {
        "in": frozen(np.full((300, 300), 1), np.int8),
        "w": frozen(np.full((4, 300), 127), np.int8),
        "out": frozen(np.full((2, 4), 1), np.int8),
        "one": frozen(np.full(300, 1), np.int16),
        "logits": frozen(np.zeros(2)),
    }
    forward = Phase(
        "forward",
        4,
        ("a", "b", "readout"),
        {"a": Dynamics(1.0, 1, 0, "plus"), "b": Dynamics(1.0, 30000, 300, "plus"), "readout": Dynamics(1.0)},
        (Synapse("a", "b", (Dense("w"),)), Synapse("b", "readout", (Dense("out"),))),
        {"a": (Bias("one"),), "readout": (Bias("logits"),)},
        (Drive("a", "input", (Dense("in"),), shift=8),),
    )
    feedback = Phase(
        "feedback",
        4,
        ("b", "a"),
        {"a": Dynamics(1.0, 1, 0, "both"), "b": Dynamics(1.0, 1, 0, "both")},
        (Synapse("b", "a", (Dense("w", transpose=True),), gate="b"),),
        drive=(Drive("b", "error", gain=1.0),),
    )
    populations = (Population("input", (300,), "input"), Population("a", (300,), "couple"), Population("b", (4,), "couple"))
    units = Units("integer", {"forward": {"input": 255.0, "a": 1.0, "b": 1.0, "readout": 1.0}, "feedback": {"a": 1.0, "b": 1.0}})
    return Graph((*populations, Population("readout", (2,), "readout")), (forward, feedback), tensors, units, Provenance("wide"))


def adversarial(members, leak, threshold, reset, kind):
    """Potentials, arrivals and constants at every limit, and what `fixed.step` makes of them."""
    draw = np.random.default_rng(4)
    limit = POTENTIAL_LIMIT
    top = 2**31 - 1 - limit - 5 if kind == torch.int32 else 2**52
    edges = [limit, -limit, 0, 1, -1, threshold, -threshold, threshold - 1, 1 - threshold]
    u = draw.choice(np.concatenate([draw.integers(-limit, limit + 1, 60), edges]), (5, 301))
    w = draw.choice(np.concatenate([draw.integers(-900, 900, 60), edges, [top, -top, limit + 1, -limit - 1, 0, 0, 0]]), (5, 301))
    c = draw.integers(-5, 6, 301)
    before = np.zeros_like(u) if members == "graded" else u
    return u, w, c, fixed.step(before, w + c, Dynamics(leak, threshold, reset, members), integer=True)


CASES = [
    (members, leak, threshold, reset, kind)
    for members in MEMBERS
    for leak in ((1.0,) if members == "graded" else (1.0, 0.75, 1 / DECAY_ONE, 1 - 1 / DECAY_ONE))
    for threshold, reset in ((1, 0), (300, 700), (POTENTIAL_LIMIT, POTENTIAL_LIMIT))
    for kind in (torch.int32, torch.int64)
]


def assert_steps(step):
    """`step` does what `fixed.step` does, in place, and counts."""
    for members, leak, threshold, reset, kind in CASES:
        u, w, c, expected = adversarial(members, leak, threshold, reset, kind)
        relay = members == "graded"
        potential, waiting, constant = (torch.tensor(values, dtype=kind) for values in (u, w, c))
        spikes = torch.zeros(u.shape, dtype=kind if relay else torch.int8)
        counts = torch.full(u.shape, 3, dtype=torch.int64 if relay else torch.int32)
        activity, saturations = torch.full(u.shape, 5, dtype=torch.int32), torch.full(u.shape, 7, dtype=torch.int32)
        numbers = {"members": MEMBERS[members], "threshold": threshold, "reset": reset, "keep": round(leak * DECAY_ONE)}
        step(potential, waiting, constant, spikes, counts, activity, saturations, **numbers)
        what = f"{members} {leak} {threshold} {reset} {kind}"
        np.testing.assert_array_equal(potential.numpy(), expected.potential, err_msg=what)
        np.testing.assert_array_equal(spikes.numpy(), expected.spikes, err_msg=what)
        np.testing.assert_array_equal(saturations.numpy(), 7 + expected.saturated, err_msg=what)
        np.testing.assert_array_equal(counts.numpy(), 3 + expected.spikes.astype(np.int64), err_msg=what)
        counted = members in ("both", "graded")
        np.testing.assert_array_equal(activity.numpy(), 5 + (expected.spikes != 0) * counted, err_msg=what)
        assert expected.saturated.any()


def test_the_step_in_torch_is_the_definition():
    assert_steps(torch_step)


def unclamped(potential, waiting, constant, spikes, counts, activity, saturations, **numbers):
    potential.add_(waiting).add_(constant)
    torch_step(potential.clamp_(-(2**24), 2**24), None, None, spikes, counts, activity, saturations.clone(), **numbers)


def test_a_wrong_kernel_is_not_taken():
    assert cuda_ticks.is_right(torch_step, CPU)
    assert not cuda_ticks.is_right(unclamped, CPU)
    with pytest.raises(AssertionError):
        assert_steps(unclamped)


INTERPRETED = """
import importlib.util, sys
import torch, triton.language as tl
from triton.runtime import interpreter
if hasattr(interpreter, "Builder"):  # the interpreter of Triton 2.3 does not know all types of integers
    for kind in ("int8", "int32"):
        if not hasattr(interpreter.Builder, f"get_{kind}_ty"):
            setattr(interpreter.Builder, f"get_{kind}_ty", lambda self, kind=getattr(tl, kind): kind)
spec = importlib.util.spec_from_file_location("cuda_tests", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
sys.modules["cuda_tests"] = tests
spec.loader.exec_module(tests)
for check in (tests.check_kernel, tests.check_without_currents, tests.check_run):
    check()
print("interpreted")
"""


def check_kernel():
    from toolchain.targets.fused_step import integer_step

    assert_steps(integer_step)
    assert cuda_ticks.is_right(integer_step, CPU)


def check_without_currents():
    """What is not there is not read: no arrivals, no constants, or one for each sample."""
    from toolchain.targets.fused_step import integer_step

    draw = np.random.default_rng(5)
    for members in MEMBERS.values():
        for waits in (False, True):
            for constant in (None, torch.tensor(draw.integers(-900, 900, (4, 50)), dtype=torch.int32)):
                relay = members == 3
                given = [
                    torch.tensor(draw.integers(-900, 900, (4, 50)), dtype=torch.int32),
                    torch.tensor(draw.integers(-900, 900, (4, 50)), dtype=torch.int32) if waits else None,
                    constant,
                    torch.zeros((4, 50), dtype=torch.int32 if relay else torch.int8),
                    torch.zeros((4, 50), dtype=torch.int64 if relay else torch.int32),
                    torch.zeros((4, 50), dtype=torch.int32),
                    torch.zeros((4, 50), dtype=torch.int32),
                ]
                ours, theirs = ([None if t is None else t.clone() for t in given] for _ in range(2))
                for step, tensors in ((integer_step, ours), (torch_step, theirs)):
                    step(*tensors, members=members, threshold=300, reset=200, keep=3000)
                for a, b in zip(ours, theirs, strict=True):
                    assert a is b is None or torch.equal(a, b)


def check_run():
    """The kernel where it belongs, both phases."""
    from toolchain.targets.fused_step import integer_step

    graph = Retime()(_wide())
    found = []
    for step in (integer_step, torch_step):
        with StaticRun(graph, batch=2, trace=False, ways=ways_on(CPU)._replace(step=step)) as run:
            found.append(both_phases(run, np.ones((3, 300)), np.ones((3, 4))))
    for ours, theirs in zip(*found, strict=True):
        for field in ("counts", "activity", "potentials", "saturations"):
            for name, values in getattr(ours, field).items():
                np.testing.assert_array_equal(values, getattr(theirs, field)[name], err_msg=f"{field} of {name}")
    assert all(int(result.activity["b"].sum()) > 0 for result in found[0])


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_is_the_definition():
    """By Triton's interpreter, which needs no GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, __file__], capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    assert (done.returncode, done.stdout.strip()) == (0, "interpreted"), done.stderr


def test_what_does_not_run_is_said(network_graph, random_graph):
    graph = network_graph("strides", "plain")
    assert cuda_ticks.supports(graph) is None
    assert "floats" in str(cuda_ticks.supports(random_graph(integer=False)))
    huge = {**graph.tensors, **{name: frozen(np.full(t.shape, 2**50)) for name, t in graph.tensors.items() if t.ndim == 4}}
    wide = msgspec.structs.replace(graph, tensors={k: v.astype(np.int64) if v.ndim == 4 else v for k, v in huge.items()})
    with pytest.raises(GraphError, match=r"above 2\^53"):
        cuda_ticks.compile(wide, batch=4, trace=False, device=CPU)
    assert cuda_ticks.neuron_update(CPU) is not None


def test_the_public_way_in(network_graph, network_inputs, assert_identical):
    graph = Retime()(network_graph("events", "plain"))
    x, error = network_inputs(graph, 5)
    with cuda_ticks.compile(graph, batch=2, trace=True, device=CPU) as run:
        assert_same(assert_identical, run, graph, x, error, trace=True)


def test_products_of_floats_are_not_shortened(network_graph, network_inputs, assert_identical):
    """Whatever the user has allowed, and allowed again afterwards."""
    graph = Retime()(network_graph("pools", "extreme"))
    x, error = network_inputs(graph, 3)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with static(graph) as run:
            assert_same(assert_identical, run, graph, x, error)
        assert torch.get_float32_matmul_precision() == "medium"
        with cuda_products.unshortened():
            if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
                assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.cuda
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", NAMES)
def test_recorded_on_a_gpu_it_is_the_reference(network_graph, network_inputs, assert_identical, name, numbers):
    """Twice: the second run plays the recordings of the first."""
    for leak, mode in ((1.0, "exact"), (0.75, "pipelined")):
        graph = network_graph(name, numbers, leak=leak)
        x, error = network_inputs(graph, 20)
        graph = Retime(mode)(graph)
        with cuda_ticks.compile(graph, batch=16, trace=False, device=torch.device("cuda")) as run:
            for _ in range(2):
                assert_same(assert_identical, run, graph, x, error)
        with cuda_ticks.compile(graph, batch=16, trace=True, device=torch.device("cuda")) as run:
            assert_same(assert_identical, run, graph, x, error, trace=True)


@pytest.mark.cuda
def test_the_kernel_on_a_gpu_is_the_definition():
    assert cuda_ticks.neuron_update(torch.device("cuda")) is None

    from toolchain.targets.fused_step import integer_step

    def step(*tensors, **numbers):
        there = [t.cuda() for t in tensors]
        integer_step(*there, **numbers)
        for here, made in zip(tensors, there, strict=True):
            here.copy_(made)

    assert_steps(step)


@pytest.mark.cuda
@pytest.mark.parametrize("samples", [17, 64, 300])
def test_wide_convolutions_on_a_gpu(assert_identical, samples):
    """Sums of 38,100 and rows by the hundred: what cuBLAS chooses for shapes of real networks."""
    graph = Retime()(_wide())
    with cuda_ticks.compile(graph, batch=256, trace=False, device=torch.device("cuda")) as run:
        for _ in range(2):
            assert_same(assert_identical, run, graph, np.ones((samples, 300)), np.ones((samples, 4)))
