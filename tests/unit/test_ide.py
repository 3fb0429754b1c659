"""IDE where no golden array reaches: general feedback, events, evaluation, restricted weights, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from toolchain.errors import UsageError
from toolchain.layers import FeedbackSNN, Frobenius, Limited, Neuron, Spectral
from toolchain.methods import get, ide


def network(loops: tuple[tuple[int, int], ...] = ((2, 0),), time_steps: int = 30, leak: float = 1.0, norm: bool = True) -> FeedbackSNN:
    """6-9-8-7 with batch normalisation and the given feedback, float64, weak enough to settle."""
    torch.manual_seed(3)
    widths = (9, 8, 7)
    connections = [nn.Sequential(nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else [])) for a, b in ((6, 9), (9, 8), (8, 7))]
    with torch.no_grad():
        for connection in connections:
            connection[-1].bias += 0.9
            connection[-1].weight *= 0.6
    return FeedbackSNN(
        name="small",
        input_shape=(6,),
        input=connections[0],
        hidden=connections[1:],
        feedback=[(a, b, Limited(nn.Linear(widths[a], widths[b], bias=False), Spectral(0.8))) for a, b in loops],
        readout=nn.Linear(7, 3),
        neuron=Neuron(2.0, 0.0, leak=leak),
        time_steps=time_steps,
    ).double()


X, Y = torch.rand(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize("solver", ["broyden", "iter"])
@pytest.mark.parametrize("loops", [((2, 0),), ((2, 0), (1, 1)), ((0, 2), (2, 1), (0, 0)), ((0, 0),), ()])
def test_the_gradient_is_that_of_the_fixed_point(loops: tuple[tuple[int, int], ...], solver: str) -> None:
    model = network(loops, 4000).eval()
    done = ide.run(model, X, Y, solver=solver)
    state = {layer: torch.zeros_like(rate) for layer, rate in enumerate(done.equilibrium.rates)}
    for _ in range(400):  # the rate equations, with autograd through every iteration
        state = dict(enumerate(ide.rate_map(model, X, state, {}, ("running", "running"))))
    nn.functional.cross_entropy(model.readout(state[2]), Y).backward()
    for layer, rate in state.items():
        assert (done.equilibrium.rates[layer] - rate).abs().max() < 2e-3
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (done.gradients[name] - parameter.grad).norm() <= 0.01 * parameter.grad.norm() + 1e-12, name


def test_a_threshold_of_zero_is_the_phantom_gradient() -> None:
    done = ide.run(network().eval(), X, Y, threshold=0)
    assert torch.equal(done.beta[0], done.error[0])


def test_constant_events_are_the_constant_input_in_evaluation() -> None:
    model = network(leak=0.9).eval()
    still, moving = (ide.run(model, inputs, Y) for inputs in (X, X.unsqueeze(-1).repeat(1, 1, 30)))
    assert torch.equal(still.equilibrium.counts[2], moving.equilibrium.counts[2])
    for name, gradient in still.gradients.items():
        assert torch.allclose(gradient, moving.gradients[name], atol=1e-12)


def test_events_are_normalised_by_the_statistics_of_their_mean() -> None:
    model = network(leak=0.9)
    events = torch.rand(5, 6, 30, dtype=torch.float64)
    weights = 0.9 ** torch.arange(29, -1, -1, dtype=torch.float64)
    linear, norm = model.input
    response = linear((events * weights).sum(-1) / weights.sum())
    frames = torch.stack([linear(events[..., t]) for t in range(30)])
    currents = (frames - response.mean(0)) / (response.var(0, unbiased=True) + 1e-8).sqrt() * norm.weight + norm.bias
    potential, spikes = torch.zeros(5, 9, dtype=torch.float64), torch.zeros(5, 9, dtype=torch.float64)
    without = network((), leak=0.9)
    without.load_state_dict({k: v for k, v in model.state_dict().items() if "feedback" not in k})
    for frame in currents:
        potential = potential + frame
        fired = (potential >= 2).double()
        potential, spikes = 0.9 * (potential - 2 * fired), spikes + fired
    assert torch.equal(without.equilibrium(events).counts[0].double(), spikes)


def test_the_method_leaves_gradients_and_updates_statistics_once() -> None:
    model = network()
    before = model.input[1].running_mean.clone()
    with torch.no_grad():
        mean = model.input[0](X).mean(0)
    batch = get("ide", options={"solver": "iter"}).gradients(model, X, Y, torch.Generator())
    assert torch.allclose(model.input[1].running_mean, 0.9 * before + 0.1 * mean)
    assert int(model.input[1].num_batches_tracked) == 1
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert 0 < batch.forward_rate < 1


@pytest.mark.parametrize("shape", ["linear", "conv", "transposed"])
def test_a_spectral_limit_is_exact_in_evaluation(shape: str) -> None:
    torch.manual_seed(1)
    op = {"linear": nn.Linear(9, 5, bias=False), "conv": nn.Conv2d(3, 4, 3, bias=False), "transposed": nn.ConvTranspose2d(3, 4, 3)}[shape]
    limited = Limited(op, Spectral(0.7)).double()
    with torch.no_grad():
        limited.gain.fill_(5.0)

    def norm() -> Tensor:
        return torch.linalg.matrix_norm(limited.effective().detach().flatten(1), 2)

    assert norm() >= 0.7
    assert float(norm()) != pytest.approx(0.7, rel=1e-12)
    limited.eval()
    assert float(norm()) == pytest.approx(0.7, rel=1e-12)


def test_a_frobenius_limit_leaves_small_weights_alone() -> None:
    limited = Limited(nn.Linear(4, 4, bias=False), Frobenius(1.0))
    with torch.no_grad():
        limited.op.weight.fill_(0.5)
        assert float(limited.effective().norm()) == pytest.approx(1.0)
        limited.measured = 4.0
        assert float(limited.effective().norm()) == pytest.approx(0.5)
        limited.measured = None
        limited.op.weight.fill_(0.1)
        assert torch.equal(limited.effective(), limited.op.weight)


def test_what_does_not_fit_is_explained() -> None:
    with pytest.raises(UsageError, match="unknown solver 'newton'"):
        get("ide", options={"solver": "newton"})
    with pytest.raises(UsageError, match="no option 'tau': it has solver, threshold"):
        get("ide", options={"tau": 1})
    with pytest.raises(UsageError, match=r"'spide' does not fit 'small': connection 'input' has batch normalisation"):
        get("spide", 1.0).gradients(network(), X, Y, torch.Generator())
