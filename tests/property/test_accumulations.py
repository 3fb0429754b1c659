"""SAF's two theorems over random networks: its spikes are the LIF network's, SAF-E's gradient is OTTT_O's, SAF-F's is that of the spike representation."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from toolchain.layers import FeedbackSNN, Neuron, Scale, Standardized
from toolchain.methods import ottt, saf

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)


def network(seed: int, layers: int, leak: float, images: bool, feedback: bool, weighted_readout: bool) -> FeedbackSNN:
    """A random network of fully connected layers, or of standardised convolutions with pooling, with rates away from 0 and 1."""
    torch.manual_seed(seed)
    if images:
        first: nn.Module = Standardized(nn.Conv2d(2, 3, 3, 1, 1))
        hidden: list[nn.Module] = [nn.Sequential(Scale(1.7), Standardized(nn.Conv2d(3, 3, 3, 1, 1))) for _ in range(layers - 1)]
        readout: nn.Module = nn.Sequential(nn.AvgPool2d(2), nn.Linear(12, 4))
        back: nn.Module = nn.Conv2d(3, 3, 3, 1, 1, bias=False)
    else:
        first = nn.Linear(6, 9)
        hidden = [nn.Linear(9, 9) for _ in range(layers - 1)]
        readout, back = nn.Linear(9, 4), nn.Linear(9, 9, bias=False)
    with torch.no_grad():
        for module in [first, *hidden]:
            for name, parameter in module.named_parameters():
                parameter += torch.rand_like(parameter) * 0.5 if name.endswith("bias") else 0.0
    return FeedbackSNN(
        name="random",
        input_shape=(2, 4, 4) if images else (6,),
        input=first,
        hidden=hidden,
        feedback=[(layers - 1, 0, back)] if feedback else [],
        readout=readout,
        neuron=Neuron(0.7, -0.1, leak=leak),
        time_steps=6,
        weighted_readout=weighted_readout,
    ).double()


def batch(model: FeedbackSNN, events: bool) -> tuple[Tensor, Tensor]:
    shape = (5, *model.input_shape, model.time_steps) if events else (5, *model.input_shape)
    return torch.rand(shape, dtype=torch.float64) * 2, torch.randint(0, 4, (5,))


@given(
    st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([1.0, 0.9, 0.5]), st.booleans(), st.booleans(), st.booleans(), st.floats(0, 1)
)
@SETTINGS
def test_saf_e_is_ottt_o(seed: int, layers: int, leak: float, images: bool, feedback: bool, events: bool, loss_lambda: float) -> None:
    model = network(seed, layers, leak, images, feedback, weighted_readout=False)
    x, y = batch(model, events)
    ours = saf.run_e(model, x, y, loss_lambda=loss_lambda)
    theirs = ottt.run(model, x, y, loss_lambda=loss_lambda, trace_input=True)
    plain = model.equilibrium(x)
    for accumulated, traced, counted in zip(ours.counts, theirs.counts, plain.counts, strict=True):
        assert torch.equal(accumulated, traced)
        assert torch.equal(accumulated, counted.double())
    assert (ours.logits - theirs.logits).abs().max() < 1e-10
    assert (ours.logits.mean(0) - model(x)).abs().max() < 1e-10
    for name, gradient in theirs.gradients.items():
        assert (ours.gradients[name] - gradient).abs().max() < 1e-10, name


@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([1.0, 0.9, 0.5]), st.booleans(), st.booleans())
@SETTINGS
def test_saf_f_is_the_spike_representation(seed: int, layers: int, leak: float, images: bool, events: bool) -> None:
    model = network(seed, layers, leak, images, False, weighted_readout=True)
    x, y = batch(model, events)
    ours = saf.run_f(model, x, y)
    found = model.equilibrium(x)
    rate = model.weighted_input(x)
    for layer, module in enumerate([model.input, *model.hidden]):
        free = module(rate) / model.neuron.reset
        clipped = torch.minimum(torch.maximum(free, torch.zeros_like(free)), torch.ones_like(free))
        rate = clipped + (found.rates[layer] - clipped).detach()
        assert (ours.rates[layer] - found.rates[layer]).abs().max() < 1e-12
        assert torch.equal(ours.counts[layer], found.counts[layer].double())
    loss = nn.functional.cross_entropy(model.logits(rate), y)
    loss.backward()
    assert (ours.logits - model(x)).abs().max() < 1e-10
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (ours.gradients[name] - parameter.grad).abs().max() < 1e-10, name
