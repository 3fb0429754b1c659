"""The native kernel and torch step the same equations: every spike, count, rate and gradient, where no sum rounds."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import toolchain
from toolchain import devices, native
from toolchain.errors import ToolchainError, UsageError
from toolchain.layers import FeedbackSNN, Frobenius, Limited, Neuron, Scale, TrainedThreshold
from toolchain.layers.connections import prepare
from toolchain.layers.maps import ChainMap, ScaleMap
from toolchain.layers.stepping import Current, Neurons, Stage, chosen
from toolchain.methods import get, spide
from toolchain.native.steps import State, Steps, Way

needs_kernel = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
INSTRUCTIONS = range(1 + (native.widest() if native.missing() is None else 0))


def dyadic(model: FeedbackSNN, scale: float = 1.0) -> FeedbackSNN:
    """The same network with weights that are multiples of 1/64, so that float64 and float32 sums are exact in any order."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * scale * 64).round() / 64)
    return model


def images(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randint(-64, 128, shape, generator=torch.Generator().manual_seed(0)).to(dtype) / 32


def convolutions(side: int = 7, dropout: float = 0.0, neuron: Neuron | None = None, scale: float = 4.0) -> FeedbackSNN:
    """Strides, an odd size, a pool, an upsampling, feedback by a transposed convolution, a convolution and onto a layer's own."""
    torch.manual_seed(5)
    small = (side + 1) // 2
    back = nn.ConvTranspose2d(4, 3, 3, 2, 1, output_padding=1 - side % 2, bias=False)
    hidden = [
        nn.Conv2d(3, 5, 5, 2, 2),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.AvgPool2d(2),
        nn.Conv2d(5, 4, 3, 1, 1),
        nn.Linear(4 * small**2, 9),
    ]
    with torch.no_grad():
        hidden[4].bias += 0.5
    return dyadic(
        FeedbackSNN(
            name="mixed",
            input_shape=(2, side, side),
            input=nn.Conv2d(2, 3, 3, 1, 1),
            hidden=hidden,
            feedback=[
                (4, 0, back),
                (3, 1, nn.Conv2d(5, 5, 3, 1, 1, bias=False)),
                (5, 5, nn.Linear(9, 9, bias=False)),
                (0, 4, nn.Conv2d(3, 4, 3, 2, 1, bias=False)),
            ],
            readout=nn.Linear(9, 4),
            neuron=neuron or Neuron(),
            time_steps=20,
            feedback_steps=25,
            dropout=dropout,
        ).double(),
        scale,
    )


def assert_same(model: FeedbackSNN, x: Tensor, error: Tensor, dropout: dict[str, Tensor] | None = None, spikes: bool = True) -> None:
    """Both stages, spike for spike, step by step and all at once."""
    forwards = [spide.forward_stage(model, x, dropout=dropout, trace=True, kernel=kernel) for kernel in ("torch", "native")]
    at_once = spide.forward_stage(model, x, dropout=dropout, kernel="native")
    for plain, fast, whole in zip(*(f.equilibrium.trains for f in forwards), at_once.equilibrium.counts, strict=True):
        assert torch.equal(plain, fast)
        assert torch.equal(whole, plain.sum(0, dtype=torch.int32))
    for plain, fast in zip(*(f.equilibrium.rates for f in forwards), strict=True):
        assert torch.equal(plain, fast)
    assert not spikes or all(train.any() for train in forwards[0].equilibrium.trains)
    for leak_back in (True, False):
        backs = [
            spide.feedback_stage(model, forwards[0], error, leak_back=leak_back, trace=True, kernel=kernel)
            for kernel in ("torch", "native")
        ]
        whole = spide.feedback_stage(model, forwards[0], error, leak_back=leak_back, kernel="native")
        for layer in range(model.layers):
            assert torch.equal(backs[0].trains[layer], backs[1].trains[layer])
            assert torch.equal(backs[0].beta[layer], whole.beta[layer])
            assert torch.equal(backs[0].activity[layer], whole.activity[layer])
        assert not spikes or all(train.any() for train in backs[0].trains)


@needs_kernel
@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_connection_in_both_directions(samples: int, side: int, dropout: float) -> None:
    model = convolutions(side, dropout)
    factors = spide.dropout_factors(model, samples, torch.Generator().manual_seed(4))
    assert_same(model, images((samples, 2, side, side)), 8 * images((samples, 9)), factors)


@needs_kernel
def test_leaky_neurons() -> None:
    assert_same(convolutions(neuron=Neuron(leak=0.9)), images((3, 2, 7, 7)), 8 * images((3, 9)))


@needs_kernel
def test_in_float32() -> None:
    assert_same(convolutions(8).float(), images((3, 2, 8, 8), torch.float32), 8 * images((3, 9), torch.float32))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_of_many_channels(dtype: torch.dtype) -> None:
    """Runs of targets as long as several vectors, and as long as none."""
    torch.manual_seed(3)
    model = FeedbackSNN(
        name="wide",
        input_shape=(1, 8, 8),
        input=nn.Conv2d(1, 67, 3, 1, 1),
        hidden=[nn.Conv2d(67, 64, 5, 2, 2), nn.Linear(1024, 251), nn.Linear(251, 13)],
        feedback=[(1, 0, nn.ConvTranspose2d(64, 67, 3, 2, 1, output_padding=1, bias=False)), (2, 2, nn.Linear(251, 251, bias=False))],
        readout=nn.Linear(13, 3),
        time_steps=8,
        feedback_steps=12,
    )
    assert_same(dyadic(model.to(dtype), 6.0), images((3, 1, 8, 8), dtype), 8 * images((3, 13), dtype))


@needs_kernel
def test_silent_and_saturated_layers() -> None:
    model = convolutions()
    assert_same(model, images((2, 2, 7, 7)), torch.zeros(2, 9, dtype=torch.float64), spikes=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(-9.0)
    assert_same(model, images((2, 2, 7, 7)), 8 * images((2, 9)), spikes=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(99.0)
    assert_same(model, images((2, 2, 7, 7)), 8 * images((2, 9)), spikes=False)
    assert int(model.equilibrium(images((2, 2, 7, 7)), kernel="native").counts[0].min()) == model.time_steps


@needs_kernel
def test_frames_of_events_and_limited_weights() -> None:
    torch.manual_seed(2)
    limited = Limited(nn.Conv2d(4, 4, 5, 1, 2, bias=False), Frobenius(2.0))
    model = FeedbackSNN(
        name="frames",
        input_shape=(2, 6, 6),
        input=nn.Conv2d(2, 4, 3, 1, 1),
        feedback=[(0, 0, limited)],
        readout=nn.Linear(144, 3),
        neuron=Neuron(leak=0.9),
        time_steps=9,
    ).double()
    frames = images((4, 2, 6, 6, 9))
    plain, fast = (spide.run(model, frames, torch.tensor([0, 1, 2, 0]), 9.0, trace=True, kernel=kernel) for kernel in ("torch", "native"))
    assert plain.forward.equilibrium.trains[0].any()
    assert torch.equal(plain.forward.equilibrium.trains[0], fast.forward.equilibrium.trains[0])
    assert torch.equal(plain.forward.equilibrium.mean_input, fast.forward.equilibrium.mean_input)
    assert torch.equal(plain.feedback.trains[0], fast.feedback.trains[0])
    for name, gradient in plain.gradients.items():
        assert (gradient - fast.gradients[name]).abs().max() < 1e-12


@needs_kernel
@pytest.mark.parametrize("tau", [None, 1.0])
def test_trained_thresholds(tau: float | None) -> None:
    torch.manual_seed(1)
    trained = TrainedThreshold(threshold=1.0, alpha=0.5, bound=0.01, tau=tau, dt=0.25)
    layers = [nn.Linear(5, 8), nn.Linear(8, 6)]
    model = FeedbackSNN(
        name="trained",
        input_shape=(5,),
        input=layers[0],
        hidden=layers[1:],
        readout=nn.Linear(6, 2),
        time_steps=25,
        trained_threshold=trained,
    ).double()
    plain, fast = (model.equilibrium(images((3, 5)) * 4, trace=True, kernel=kernel) for kernel in ("torch", "native"))
    for a, b in zip(plain.trains, fast.trains, strict=True):
        assert a.any()
        assert torch.equal(a, b)


@needs_kernel
def test_threads_share_out_the_samples() -> None:
    model, x = convolutions(), images((11, 2, 7, 7))
    alone = model.equilibrium(x, kernel="native")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = model.equilibrium(x, kernel="native")
    finally:
        torch.set_num_threads(before)
    for a, b in zip(alone.counts, together.counts, strict=True):
        assert torch.equal(a, b)


@needs_kernel
@pytest.mark.parametrize("samples", [0, 1, 2, 3, 40])
@pytest.mark.parametrize("allowed", [1, 3])
def test_no_more_threads_start_than_torch_may_use_nor_than_there_are_samples(
    samples: int, allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage([Neurons((3,), 1.0, 1.0, torch.ones(samples, 3))], [], samples, leak=1.0, signed=False, dtype=torch.float32)
    ran = set[int]()
    run, meet = Steps.run, threading.Barrier(min(samples, allowed) or 1)

    def noticed(steps: Steps, *given: Any) -> None:
        if threading.get_ident() not in ran:  # each thread waits in its first piece for the others, so that none does the work of two
            ran.add(threading.get_ident())
            meet.wait(timeout=10)
        run(steps, *given)

    monkeypatch.setattr(Steps, "run", noticed)
    monkeypatch.setattr(torch, "get_num_threads", lambda: allowed)
    stage.run(4)
    assert len(ran) == (min(samples, allowed) or 1)
    assert (threading.get_ident() in ran) == (min(samples, allowed) < 2)
    assert stage.counts[0].eq(4).all()


@needs_kernel
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [(3, 5), (33, 65)])
def test_every_instruction_set_gives_the_same_bits(instructions: int, dtype: torch.dtype, channels: tuple[int, int]) -> None:
    torch.manual_seed(0)
    shapes = [(count, 9, 9) for count in channels]
    modules = [nn.Conv2d(*ends, 3, 1, 1).to(dtype) for ends in (channels, channels[::-1])]
    maps = [prepare(module, shape, "a connection") for module, shape in zip(modules, shapes, strict=True)]
    found = []
    for chosen_set in (0, instructions):
        layers = [
            Neurons(shapes[0], 1.0, 2.0, torch.randn(2, *shapes[0], generator=torch.Generator().manual_seed(1)).to(dtype)),
            Neurons(shapes[1], 0.3, 0.7, None),
        ]
        factor = torch.rand(2, *shapes[1], generator=torch.Generator().manual_seed(2)).to(dtype)
        amplitude = torch.rand(2, *shapes[1], generator=torch.Generator().manual_seed(3)).to(dtype)
        currents = [Current(0, 1, maps[0], factor=factor), Current(1, 0, maps[1], late=True, amplitude=amplitude)]
        stage = Stage(layers, currents, 2, leak=0.9, signed=True, dtype=dtype)
        stage.run(30, chosen_set)
        assert stage.counts[1].any()
        found.append([*stage.potentials, *stage.sums, *stage.counts, *stage.spikes])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_auto_takes_torch_where_the_kernel_cannot() -> None:
    step = ChainMap((ScaleMap(1.0), ScaleMap(2.0)), ((4,), (4,)))
    assert not chosen("auto", [step], torch.zeros(1))
    assert not chosen("auto", [], torch.zeros(1, dtype=torch.float16))
    with pytest.raises(UsageError, match="ChainMap"):
        chosen("native", [step], torch.zeros(1))
    with pytest.raises(UsageError, match="float16"):
        chosen("native", [], torch.zeros(1, dtype=torch.float16))
    with pytest.raises(UsageError, match="auto, native, torch"):
        chosen("fast", [], torch.zeros(1))
    two = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(1, 2, 3), Scale(2.0))
    model = FeedbackSNN(name="chain", input_shape=(1, 8, 8), input=nn.Conv2d(1, 1, 1), hidden=[two], readout=nn.Linear(8, 2))
    assert model.equilibrium(torch.rand(2, 1, 8, 8)).counts[1].shape == (2, 2, 2, 2)


def test_without_a_library_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", lambda: "the native kernel is not built: install a compiler")
    model = convolutions()
    assert model.equilibrium(images((2, 2, 7, 7))).counts[0].any()
    get("spide", 100.0).fits(model)
    with pytest.raises(UsageError) as refused:
        model.equilibrium(images((2, 2, 7, 7)), kernel="native")
    assert str(refused.value) == "the native kernel is not built: install a compiler, or leave kernel at 'auto'"


@pytest.mark.parametrize(
    ("kernel", "module", "said"),
    [
        ("fast", nn.Conv2d(4, 4, 3, 1, 1, bias=False), "unknown kernel 'fast': choose one of auto, native, torch"),
        ("native", nn.Conv2d(4, 4, 3, 1, 1, groups=2, bias=False), "it has no convolution with groups"),
        ("fast", nn.Conv2d(4, 4, 3, 1, 1), "unknown kernel 'fast': choose one of auto, native, torch"),
        ("native", nn.Conv2d(4, 4, 3, 1, 1), "it has relays, skips from the input or feedback with a bias"),
    ],
)
def test_spide_refuses_a_kernel_that_cannot_run_before_it_trains(kernel: str, module: nn.Module, said: str) -> None:
    model = FeedbackSNN(
        name="looped", input_shape=(1, 5, 5), input=nn.Conv2d(1, 4, 3, 1, 1), feedback=[(0, 0, module)], readout=nn.Linear(100, 2)
    )
    with pytest.raises(UsageError, match=said):
        get("spide", 100.0, {"kernel": kernel}).fits(model)
    with pytest.raises(UsageError, match=said):
        model.equilibrium(torch.rand(2, 1, 5, 5), kernel=kernel)  # type: ignore[arg-type]
    get("spide", 100.0, {"kernel": "torch"}).fits(model)


def test_training_refuses_the_native_kernel_on_another_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch's device without memory stands for a GPU."""
    monkeypatch.setattr(devices, "pick", lambda _: torch.device("meta"))
    with pytest.raises(UsageError, match="it runs on the CPU and the network is on meta: move it, or leave kernel at 'auto'"):
        toolchain.train("digits-fc", method="spide", settings={"train.options.kernel": "native"}, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@needs_kernel
def test_the_switch_leaves_the_same_gradients_whatever_steps_the_stages() -> None:
    """Weights that round nowhere, so that every spike is the same; SPIDE's gradients then are, bit for bit, in the native kernel and in torch."""
    model, x = convolutions(dropout=0.5), images((6, 2, 7, 7))
    found = []
    for kernel in ("native", "torch", "auto"):
        get("spide", 100.0, {"kernel": kernel}).gradients(model, x, torch.arange(6) % 4, torch.Generator().manual_seed(2))
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient.any()
        assert all(torch.equal(gradient, other[name]) for other in found[1:])


def test_parts_that_contradict_each_other_never_reach_the_kernel() -> None:
    step = prepare(nn.Conv2d(3, 5, 3, 1, 1), (3, 9, 9), "a connection")
    layers = [
        Neurons((3, 9, 9), 1.0, 1.0, None),
        Neurons((5, 9, 9), 1.0, 1.0, None),
        Neurons((5, 9, 8), 1.0, 1.0, None),
        Neurons((4, 9, 9), 1.0, 1.0, None),
    ]

    def stage(*currents: Current, samples: int = 2) -> Stage:
        return Stage(layers, currents, samples, leak=1.0, signed=False, dtype=torch.float32)

    stage(Current(0, 1, step))
    for current in (Current(0, 3, step), Current(1, 0, step, late=True)):
        with pytest.raises(ToolchainError, match="cannot lead"):
            stage(current)
    with pytest.raises(ToolchainError, match="before its source has fired"):
        stage(Current(1, 0, step, transposed=True))
    with pytest.raises(ToolchainError, match="meet a layer"):
        stage(Current(0, 1, step, factor=torch.ones(2, 5, 9, 8)))
    with pytest.raises(ToolchainError, match="3 samples"):
        stage().drive(0, torch.ones(3, 3, 9, 9))


def parts(samples: int = 2) -> tuple[list[State], list[Way]]:
    """12 neurons, 3 channels in 2 rows and columns, and 20, 5 channels likewise; a 2 x 2 kernel between them, and back a weight a channel."""
    states = [
        State(
            1.0,
            1.0,
            potential=np.zeros((samples, neurons), np.float32),
            sum=np.zeros((samples, neurons), np.float32),
            count=np.zeros((samples, neurons), np.int32),
            spikes=np.zeros((samples, neurons), np.int8),
            drive=np.ones((samples, neurons), np.float32),
        )
        for neurons in (12, 20)
    ]
    axis = np.array([[0, 0, 2], [1, 0, 1]], np.int32)
    factor, amplitude = np.ones((samples, 20), np.float32), np.ones((samples, 12), np.float32)
    there = Way(0, 1, axis, axis, np.ones((3, 2, 2, 5), np.float32), 2, amplitude=amplitude, factor=factor)
    return states, [there, Way(1, 1, axis, axis, np.ones(5, np.float32), 2, late=True)]


def of(*shape: int, kind: str = "f4") -> np.ndarray[Any, Any]:
    return np.zeros(shape, kind)


def fixed(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


def runs(*changed: list[int]) -> np.ndarray[Any, Any]:
    return np.array(changed, np.int32)


@needs_kernel
def test_parts_that_fit_run() -> None:
    states, ways = parts()
    steps = Steps(states, ways, leak=1.0, signed=True)
    steps.run(0, 2, 3)
    assert states[0].count.tolist() == [[3] * 12] * 2
    assert (states[1].count > 0).all()
    steps.run(1, 1, 5)
    steps.run(0, 2, 0)
    assert states[0].count.tolist() == [[3] * 12] * 2
    steps.drive(0, np.zeros((1, 12), np.float32))
    steps.run(1, 2, 2)
    assert states[0].count.tolist() == [[3] * 12] * 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"potential": of(20)}, r"are not \(samples, neurons\)"),
        ({"potential": of(2, 0)}, "has no neurons"),
        ({"potential": of(3, 20)}, r"'potential' must be an array of float32 \(2, 20\).*not float32 \(3, 20\)"),
        ({"potential": of(2, 20, kind="f8")}, "'potential' must be .* and not float64"),
        ({"potential": of(2, 20, kind=">f4")}, "'potential' must be .* and not >f4"),
        ({"potential": fixed(of(2, 20))}, "'potential' must be .* writable"),
        ({"potential": of(2, 40)[:, ::2]}, "'potential' must be .* in one piece"),
        ({"sum": of(2, 19)}, "'sum' must be .* and not float32"),
        ({"sum": of(20, 2).T}, "'sum' must be .* in one piece"),
        ({"sum": of(2, 20).tolist()}, "'sum' must be .* and not list"),
        ({"count": of(2, 20, kind="i8")}, "'count' must be .* and not int64"),
        ({"count": of(2, 10, kind="i4")}, "'count' must be .* and not int32"),
        ({"spikes": of(2, 20, kind="u1")}, "'spikes' must be .* and not uint8"),
        ({"spikes": fixed(of(2, 20, kind="i1"))}, "'spikes' must be .* writable"),
        ({"spikes": None}, "'spikes' must be .* and not NoneType"),
        ({"drive": of(3, 20)}, "'drive' must be"),
        ({"drive": of(1, 19)}, r"'drive' must be an array of float32 \(1, 20\)"),
        ({"drive": of(2, 20, kind="f2")}, "'drive' must be .* and not float16"),
    ],
)
def test_state_that_is_not_what_the_kernel_takes_it_for_is_refused(change: dict[str, Any], said: str) -> None:
    states, ways = parts()
    with pytest.raises(ToolchainError, match=said):
        Steps([states[0], replace(states[1], **change)], ways, leak=1.0, signed=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": 2}, "layer 2 is none of 2"),
        ({"source": -1}, "layer -1 is none of 2"),
        ({"target": 2}, "layer 2 is none of 2"),
        ({"target": -1, "late": True}, "layer -1 is none of 2"),
        ({"target": 0}, "before its source has fired"),
        ({"weight": of(3, 2, 2, 5, kind="f8")}, "'weight' must be .* and not float64"),
        ({"weight": of(3, 2, 5, 2).swapaxes(2, 3)}, "'weight' must be .* in one piece"),
        ({"weight": of(4, 2, 2, 5)}, "cannot lead from 12 neurons in 2 rows and 2 columns to 20 neurons in 2 columns"),
        ({"weight": of(3, 2, 2, 4)}, "cannot lead"),
        ({"weight": of(3, 2, 2, 0)}, "cannot lead"),
        ({"weight": of(3)}, "cannot lead"),
        ({"weight": of(3, 1, 2, 5)}, r"neither \(channels,\) nor"),
        ({"weight": None}, r"neither \(channels,\) nor"),
        ({"made_width": 0}, "cannot lead"),
        ({"made_width": -2}, "cannot lead"),
        ({"made_width": 3}, "cannot lead"),
        ({"made_width": 4}, "its rows reach leaves the 1 of the target"),
        ({"made_width": 1}, "its columns reach leaves the 1 of the target"),
        ({"rows": runs([0, 0, 2])}, "cannot lead"),
        ({"rows": runs([0, 0, 2], [1, 0, 2])}, "its rows reach leaves the 2 of the target or the 2 of the kernel"),
        ({"rows": runs([0, 1, 2], [1, 0, 1])}, "its rows reach leaves"),
        ({"rows": runs([0, 0, 2], [-1, 0, 1])}, "its rows reach leaves"),
        ({"rows": runs([0, 0, 2], [1, -1, 1])}, "its rows reach leaves"),
        ({"rows": runs([0, 0, 2], [1, 0, -1])}, "its rows reach leaves"),
        ({"rows": runs([2**31 - 1, 0, 2], [1, 0, 1])}, "its rows reach leaves"),
        ({"rows": runs([0, 0, 2], [1, 0, 1]).astype(np.int64)}, "'rows' must be .* and not int64"),
        ({"rows": runs([0, 1], [0, 0], [2, 1]).T}, "'rows' must be .* in one piece"),
        ({"rows": runs([0, 0, 2, 0], [1, 0, 1, 0])}, r"'rows' must be an array of int32 \(2, 3\)"),
        ({"rows": None}, "cannot lead"),
        ({"columns": runs([0, 0, 2], [1, 0, 2])}, "its columns reach leaves"),
        ({"columns": runs([0, 0, 3], [1, 0, 1])}, "its columns reach leaves"),
        ({"amplitude": of(2, 20)}, r"'amplitude' must be an array of float32 \(2, 12\)"),
        ({"amplitude": of(1, 12)}, "'amplitude' must be"),
        ({"amplitude": of(2, 12, kind="f8")}, "'amplitude' must be .* and not float64"),
        ({"factor": of(2, 12)}, r"'factor' must be an array of float32 \(2, 20\)"),
        ({"factor": of(2, 20, kind="i4")}, "'factor' must be .* and not int32"),
    ],
)
def test_a_way_that_would_leave_its_arrays_is_refused(change: dict[str, Any], said: str) -> None:
    states, (there, back) = parts()
    with pytest.raises(ToolchainError, match=said):
        Steps(states, [replace(there, **change), back], leak=1.0, signed=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": of(4)}, "cannot lead"),
        ({"weight": of(5, kind="f8")}, "'weight' must be"),
        ({"rows": runs([0, 9, 2], [1, 9, 2])}, "leaves the 2 of the target"),
        ({"columns": runs([0, 9, 2], [3, 9, 1])}, "leaves the 2 of the target"),
    ],
)
def test_a_way_of_a_weight_a_channel_stays_within_its_arrays(change: dict[str, Any], said: str) -> None:
    states, (there, back) = parts()
    with pytest.raises(ToolchainError, match=said):
        Steps(states, [there, replace(back, **change)], leak=1.0, signed=True)


@needs_kernel
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((-1, 2, 1), "samples -1 to 2 are no span of 2"),
        ((0, 3, 1), "samples 0 to 3 are no span of 2"),
        ((2, 1, 1), "samples 2 to 1 are no span of 2"),
        ((0, 2, -1), "-1 time steps"),
        ((0, 2, 2**31), "time steps"),
        ((0, 2, 1, -1), "instruction set -1"),
        ((0, 2, 1, 3), "instruction set 3"),
    ],
)
def test_samples_and_steps_that_there_are_not_are_refused(asked: tuple[int, ...], said: str) -> None:
    states, ways = parts()
    laid = Steps(states, ways, leak=1.0, signed=True)
    with pytest.raises(ToolchainError, match=said):
        laid.run(*asked)
    assert not states[0].count.any()


def test_a_stage_of_nothing_and_another_drive_of_another_kind_are_refused() -> None:
    states, ways = parts()
    with pytest.raises(ToolchainError, match="there is no layer"):
        Steps([], [], leak=1.0, signed=True)
    with pytest.raises(ToolchainError, match="float16 are neither"):
        Steps([replace(states[0], potential=of(2, 12, kind="f2"))], [], leak=1.0, signed=True)
    laid = Steps(states, ways, leak=1.0, signed=True)
    for place in (2, -1):
        with pytest.raises(ToolchainError, match=f"layer {place} is none of 2"):
            laid.drive(place, of(2, 12))
    for drive in (of(2, 20), of(12), of(3, 12), of(2, 12, kind="f8")):
        with pytest.raises(ToolchainError, match="'drive' must be"):
            laid.drive(0, drive)


def test_torch_leaves_out_samples_that_cannot_fire_and_goes_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convolutions()
    forward = spide.forward_stage(model, images((6, 2, 7, 7)), kernel="torch")
    error = images((6, 9)) * torch.tensor([8.0, 1 / 256, 0.0, 2.0, 1 / 64, 8.0], dtype=torch.float64).unsqueeze(1)
    found = spide.feedback_stage(model, forward, error, trace=True, kernel="torch")
    monkeypatch.setattr(spide, "AT_ONCE", 1)
    monkeypatch.setattr(spide, "SURELY_SILENT", 0.0)
    whole = spide.feedback_stage(model, forward, error, trace=True, kernel="torch")
    assert whole.trains[-1].any(0).flatten(1).any(1).tolist() == [True, False, False, True, True, True]
    for layer in range(model.layers):
        assert torch.equal(found.trains[layer], whole.trains[layer])
        assert torch.equal(found.beta[layer], whole.beta[layer])
        assert torch.equal(found.activity[layer], whole.activity[layer])
