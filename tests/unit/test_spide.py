"""SPIDE where no golden array reaches: the equilibrium it approximates, general feedback, dropout, events, the scale factor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from toolchain.errors import UsageError
from toolchain.layers import FeedbackSNN, Neuron, build, describe
from toolchain.methods import get, spide


def network(
    time_steps: int = 30,
    feedback_steps: int = 100,
    neuron: Neuron | None = None,
    dropout: float = 0.0,
    loops: tuple[tuple[int, int], ...] = ((2, 0),),
    seed: int = 3,
) -> FeedbackSNN:
    """6-9-8-7 with the given feedback, float64, weak enough to settle, with rates inside (0, 1)."""
    torch.manual_seed(seed)
    widths = (9, 8, 7)
    feedback = [(source, target, nn.Linear(widths[source], widths[target], bias=False)) for source, target in loops]
    input, *hidden = nn.Linear(6, 9), nn.Linear(9, 8), nn.Linear(8, 7)
    with torch.no_grad():
        for connection in (input, *hidden):
            connection.bias += 0.8
    return FeedbackSNN(
        name="small",
        input_shape=(6,),
        input=input,
        hidden=hidden,
        feedback=feedback,
        readout=nn.Linear(7, 3),
        neuron=neuron or Neuron(),
        time_steps=time_steps,
        feedback_steps=feedback_steps,
        dropout=dropout,
    ).double()


@pytest.mark.parametrize("loops", [((2, 0),), ((2, 0), (1, 1)), ((0, 2), (2, 1), (0, 0))])
def test_long_runs_reach_the_gradient_of_the_fixed_point(loops: tuple[tuple[int, int], ...]) -> None:
    model = network(4000, 4000, loops=loops)
    x = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 0])
    done = spide.run(model, x, y, 6.0)

    rates = [torch.zeros(4, n, dtype=torch.float64) for n in (9, 8, 7)]
    for _ in range(300):  # the rate equations, with autograd through every iteration
        incoming = [model.input(x), model.hidden[0](rates[0]), model.hidden[1](rates[1])]
        for (source, target), module in zip(model.loops, model.feedback, strict=True):
            incoming[target] = incoming[target] + module(rates[source])
        free = [current / model.neuron.reset for current in incoming]
        rates = [torch.where(mask > 0, rate, rate.detach().clamp(0, 1)) for rate, mask in zip(free, done.forward.masks, strict=True)]
    loss = nn.functional.cross_entropy(model.readout(rates[-1]), y)
    loss.backward()

    for layer, rate in enumerate(rates):
        assert (done.forward.equilibrium.rates[layer] - rate).abs().max() < 1e-2
    assert all(not clipped.any() for clipped in done.feedback.clipped)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        error = (done.gradients[name] / 6.0 - parameter.grad).norm() / parameter.grad.norm()
        assert error < 0.02, f"{name}: {error:.3f}"


def test_dropped_synapses_learn_nothing_unless_as_published() -> None:
    model = network(dropout=0.5)
    x, y = torch.full((1, 6), 0.5, dtype=torch.float64), torch.tensor([1])
    factors = spide.dropout_factors(model, 1, torch.Generator().manual_seed(2))
    assert {float(v) for f in factors.values() for v in f.unique()} == {0.0, 2.0}
    dropped = factors["input"][0] == 0
    ours = spide.run(model, x, y, 50.0, dropout=factors)
    theirs = spide.run(model, x, y, 50.0, dropout=factors, as_published=True)
    assert not ours.gradients["input.weight"][dropped].any()
    assert theirs.gradients["input.weight"][dropped].any()
    assert torch.equal(ours.feedback.beta[0], theirs.feedback.beta[0])


def test_dropout_of_a_current_equals_a_scaled_weight() -> None:
    model = network(dropout=0.5)
    x = torch.rand(1, 6, dtype=torch.float64)
    factors = spide.dropout_factors(model, 1, torch.Generator().manual_seed(1))
    dropped = spide.run(model, x, torch.tensor([2]), 50.0, dropout=factors, trace=True)
    with torch.no_grad():
        for name, (_, _, module) in model.connections().items():
            for parameter in module.parameters():
                parameter *= factors[name][0].reshape(-1, *[1] * (parameter.ndim - 1))
    scaled = spide.run(model, x, torch.tensor([2]), 50.0, trace=True)
    for layer in range(3):
        assert torch.equal(dropped.forward.equilibrium.trains[layer], scaled.forward.equilibrium.trains[layer])
        assert torch.equal(dropped.feedback.trains[layer], scaled.feedback.trains[layer])


def test_constant_events_are_the_constant_input() -> None:
    model = network(neuron=Neuron(leak=0.9))
    x = torch.rand(3, 6, dtype=torch.float64)
    events = x.unsqueeze(-1).repeat(1, 1, 30)
    still, moving = (spide.run(model, inputs, torch.tensor([0, 1, 2]), 8.0, trace=True) for inputs in (x, events))
    for layer in range(3):
        assert torch.equal(still.forward.equilibrium.trains[layer], moving.forward.equilibrium.trains[layer])
    assert torch.allclose(still.gradients["input.weight"], moving.gradients["input.weight"], atol=1e-12)


def test_events_of_leaky_neurons_are_weighted_by_the_leak() -> None:
    model = network(neuron=Neuron(leak=0.9))
    events = torch.rand(2, 6, 30, dtype=torch.float64)
    weights = 0.9 ** torch.arange(29, -1, -1, dtype=torch.float64)
    assert torch.allclose(spide.forward_stage(model, events).equilibrium.mean_input, (events * weights).sum(-1) / weights.sum())
    assert torch.equal(spide.forward_stage(model, events, as_published=True).equilibrium.mean_input, events.mean(-1))


def test_events_of_another_length_are_refused() -> None:
    with pytest.raises(UsageError, match="29 frames"):
        network()(torch.rand(2, 6, 29))


def test_inputs_of_another_size_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(6,\).*\(2, 5\)"):
        network()(torch.rand(2, 5))


def test_few_spikes_are_added_as_a_dense_product_would() -> None:
    from toolchain.layers import DenseMap

    torch.manual_seed(0)
    weight = torch.randint(-9, 9, (40, 50)).double()
    spikes = (torch.rand(16, 50) < 0.01).double()
    total = torch.ones(16, 40, dtype=torch.float64)
    DenseMap(weight, weight.t().contiguous()).add(total, spikes)
    assert torch.equal(total, 1 + spikes @ weight.t())


def test_the_method_leaves_the_true_gradient() -> None:
    model = network()
    x, y = torch.rand(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    scaled = spide.run(model, x, y, 64.0)
    batch = get("spide", 64.0).gradients(model, x, y, torch.Generator())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, scaled.gradients[name] / 64.0)
    assert batch.loss == pytest.approx(float(scaled.readout.loss))
    assert 0 < batch.forward_rate < 1
    assert 0 <= batch.clipped <= batch.silent + 1


def test_the_automatic_scale_factor_fits_from_the_first_batch_on() -> None:
    model = network()
    torch.manual_seed(0)
    x, y = torch.rand(64, 6, dtype=torch.float64), torch.randint(0, 3, (64,))
    method = get("spide", "auto")
    batches = [method.gradients(model, x, y, torch.Generator()) for _ in range(50)]
    assert method.state()["scale_factor"] > 20
    assert max(batch.clipped for batch in batches) <= 0.001
    assert max(batch.silent for batch in batches) < get("spide", 1.0).gradients(model, x, y, torch.Generator()).silent / 2


def test_the_automatic_scale_factor_follows_an_error_that_shrinks() -> None:
    model = network()
    torch.manual_seed(0)
    x, y = torch.rand(64, 6, dtype=torch.float64), torch.randint(0, 3, (64,))
    method = get("spide", "auto")
    for _ in range(60):
        method.gradients(model, x, y, torch.Generator())
    before = method.state()["scale_factor"]
    with torch.no_grad():
        model.readout.weight /= 8
    batch = method.gradients(model, x, y, torch.Generator())
    assert method.state()["scale_factor"] == pytest.approx(8 * before, rel=0.15)  # at once, not after many batches
    assert batch.clipped == 0


def test_the_automatic_scale_factor_leaves_room_where_beta_exceeds_the_error() -> None:
    """A strong loop takes beta several times beyond g; the factor comes to leave room for it, and nothing clips from then on."""
    model = network()
    torch.manual_seed(0)
    x, y = torch.rand(64, 6, dtype=torch.float64), torch.randint(0, 3, (64,))
    with torch.no_grad():
        for module in model.hidden:
            module.weight *= 6
    method = get("spide", "auto")
    batches = [method.gradients(model, x, y, torch.Generator()) for _ in range(80)]
    assert method.state()["reach"] > 2
    assert max(batch.clipped for batch in batches[40:]) == 0


def test_a_resumed_automatic_scale_factor_goes_on() -> None:
    model = network()
    x, y = torch.rand(8, 6, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)
    first, resumed = get("spide", "auto"), get("spide", "auto")
    first.gradients(model, x, y, torch.Generator())
    resumed.restore(first.state())
    for method in (first, resumed):
        method.gradients(model, x, y, torch.Generator())
    assert first.state() == resumed.state()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), loops=st.sampled_from([(), ((2, 0),), ((2, 0), (1, 1)), ((0, 2), (2, 1))]))
def test_without_leak_leaky_couples_carry_the_exact_gradient(seed: int, loops: tuple[tuple[int, int], ...]) -> None:
    model = network(30, 2000, neuron=Neuron(leak=0.9), loops=loops, seed=seed)
    x = torch.rand(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    forward = spide.forward_stage(model, x)
    error = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 10
    found = spide.feedback_stage(model, forward, error, leak_back=False, trace=True)
    assert torch.equal(found.trains[0].double().mean(0) * model.neuron.reset_back, found.beta[0])

    sizes, ends = (9, 8, 7), {name: (source, target) for name, (source, target, _) in model.connections().items()}
    whole = torch.eye(24, dtype=torch.float64).repeat(3, 1, 1)
    for name, (source, target) in ends.items():
        if source is None:
            continue
        weight = model.connections()[name][2].weight
        rows, columns = (slice(sum(sizes[:layer]), sum(sizes[: layer + 1])) for layer in (source, target))
        whole[:, rows, columns] -= weight.t() * forward.masks[target].unsqueeze(1) / model.neuron.reset
    exact = torch.linalg.solve(whole, torch.cat([torch.zeros(3, 17, dtype=torch.float64), error], 1)).split(sizes, 1)
    for ours, theirs in zip(found.beta, exact, strict=True):
        assert (ours - theirs).abs().max() < 2e-3


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(UsageError, match="dsr, ide, ottt-a"):
        get("backprop", 1.0)


def test_a_description_builds_the_same_network() -> None:
    model = network(neuron=Neuron(leak=0.95, threshold_back=0.7), loops=((2, 0), (0, 1)), dropout=0.1)
    again = build(describe(model))
    assert describe(again) == describe(model)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feedback": [(0, 1, nn.Linear(4, 4, bias=False))]}, "layers are 0 to 0"),
        ({"feedback": [(0, 0, nn.Linear(4, 5, bias=False))]}, r"makes shape \(5,\) but layer 0 has \(4,\)"),
        ({"hidden": [nn.Linear(5, 4)]}, "hidden connection 0 takes 5"),
        ({"readout": nn.Linear(9, 2)}, "readout takes 9"),
        ({"input_shape": (2, 2)}, r"source of shape \(2, 2\) has 4"),
        ({"neuron": Neuron(leak=1.5)}, "leak 1.5"),
        ({"neuron": Neuron(u_rest=1.0)}, "subtracts 0.0"),
        ({"neuron": Neuron(threshold=float("nan"))}, "NaN"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"input": nn.Bilinear(1, 1, 1)}, "Bilinear, which is not supported yet: use Linear"),
    ],
)
def test_parts_that_do_not_fit_are_named(change: dict[str, object], message: str) -> None:
    parts: dict[str, object] = {"name": "wrong", "input_shape": (3,), "input": nn.Linear(3, 4), "readout": nn.Linear(4, 2)}
    with pytest.raises(UsageError, match=message):
        FeedbackSNN(**{**parts, **change})  # type: ignore[arg-type]  # the values vary on purpose
