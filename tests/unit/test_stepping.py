"""The native kernel and torch step the same equations: every spike, count, rate and gradient, where no sum rounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from toolchain import native
from toolchain.errors import ToolchainError, UsageError
from toolchain.layers import FeedbackSNN, Frobenius, Limited, Neuron, Scale, TrainedThreshold
from toolchain.layers.connections import prepare
from toolchain.layers.maps import ChainMap, ScaleMap
from toolchain.layers.stepping import Current, Neurons, Stage, chosen
from toolchain.methods import spide

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
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set_gives_the_same_bits(instructions: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 5, 3, 1, 1).to(dtype), nn.Conv2d(5, 3, 3, 1, 1).to(dtype)
    maps = [prepare(module, shape, "a connection") for module, shape in ((first, (3, 9, 9)), (second, (5, 9, 9)))]
    found = []
    for chosen_set in (0, instructions):
        layers = [
            Neurons((3, 9, 9), 1.0, 2.0, torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1)).to(dtype)),
            Neurons((5, 9, 9), 0.3, 0.7, None),
        ]
        factor = torch.rand(2, 5, 9, 9, generator=torch.Generator().manual_seed(2)).to(dtype)
        stage = Stage(
            layers, [Current(0, 1, maps[0], factor=factor), Current(1, 0, maps[1], late=True)], 2, leak=0.9, signed=True, dtype=dtype
        )
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
    monkeypatch.setattr(native, "missing", lambda: "the native kernel is not built")
    model = convolutions()
    assert model.equilibrium(images((2, 2, 7, 7))).counts[0].any()
    with pytest.raises(UsageError, match="not built"):
        model.equilibrium(images((2, 2, 7, 7)), kernel="native")


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
