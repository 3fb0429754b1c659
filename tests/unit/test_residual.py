"""Relays, skips and biases of feedback: simulations against a plain loop, gradients against plain autograd, and what refuses them."""

from __future__ import annotations

from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import toolchain
from toolchain import checkpoint, data, native
from toolchain.config import Config
from toolchain.errors import UsageError
from toolchain.layers import FeedbackSNN, Gain, Neuron, Scale, Standardized, TrainedThreshold, build, counts, describe
from toolchain.methods import common, dsr, get, ide, ottt, saf, spide

STEPS = 7
LIF = TrainedThreshold(0.4, 0.4, bound=0.01, tau=1.0, dt=0.2)
IF = TrainedThreshold(1.1, 0.5, bound=0.01)


def conv(a: int, b: int, kernel: int = 3, norm: bool = False, bias: bool = True) -> nn.Module:
    made = nn.Conv2d(a, b, kernel, 1, kernel // 2, bias=bias)
    return nn.Sequential(made, nn.BatchNorm2d(b)) if norm else made


def network(*, norm: bool = False, feedback: bool = False, readout: bool | nn.Module = True, seed: int = 0, **changes: Any) -> FeedbackSNN:
    """On 2 x 4 x 4: relay 0 -> 1 -> 2 -> relay 3 -> 4 -> 5, an identity and a projection around the block, a skip from the input, and two loops."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "name": "residual",
        "input_shape": (2, 4, 4),
        "input": conv(2, 3),
        "hidden": [
            nn.BatchNorm2d(3) if norm else nn.Identity(),
            conv(3, 5, norm=norm),
            nn.Sequential(Scale(1.3), conv(5, 3), Gain(0.8)),
            nn.BatchNorm2d(3) if norm else Scale(0.9),
            nn.Sequential(nn.AvgPool2d(2), nn.Linear(12, 6), *([nn.BatchNorm1d(6)] if norm else [])),
        ],
        "skips": [(0, 3, nn.Identity()), (1, 3, conv(3, 3, 1)), (None, 4, conv(2, 3, 1, norm=norm))],
        "feedback": [(4, 0, conv(3, 3)), (3, 1, conv(3, 3, 1))] if feedback else [],
        "readout": readout if isinstance(readout, nn.Module) else nn.Linear(6, 4) if readout else None,
        "relays": [0, 3],
        "neuron": Neuron(0.4, -0.1, leak=0.5),
        "time_steps": STEPS,
        "weighted_readout": False,
    }
    model = FeedbackSNN(**{**settings, **changes}).double()
    for part in model.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.2, 1)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, 0, 0.5)
    with torch.no_grad():
        for module in (model.input, model.hidden[1], *([model.hidden[4]] if len(model.hidden) > 4 else [])):
            for part in module.modules():
                if isinstance(part, (nn.Conv2d, nn.Linear)):
                    part.weight.mul_(1.5)
                    part.bias.abs_()
    return model


def batch(model: FeedbackSNN, events: bool = False, samples: int = 5) -> tuple[Tensor, Tensor]:
    shape = (samples, *model.input_shape, *([model.time_steps] if events else []))
    return torch.rand(shape, dtype=torch.float64) * 2, torch.arange(samples) % 4


def connections_into(model: FeedbackSNN, layer: int) -> list[tuple[int | None, nn.Module]]:
    """(source, module), the input None."""
    chain: list[tuple[int | None, nn.Module]] = [(layer - 1, model.hidden[layer - 1])] if layer else [(None, model.input)]
    return chain + [(source, module) for (source, target), module in zip(model.shortcuts, model.skip, strict=True) if target == layer]


def flat(module: nn.Module, x: Tensor) -> Tensor:
    """The module, a Linear within it seeing one row a sample."""
    for part in module if isinstance(module, nn.Sequential) else [module]:
        x = part(x.flatten(1) if isinstance(part, nn.Linear) else x)
    return x


@torch.no_grad()
def simulated(model: FeedbackSNN, x: Tensor, events: bool) -> list[Tensor]:
    """What every layer sends at every step, (T, samples, *shape), written plainly."""
    trained = model.trained_threshold
    numbers = iter(model.thresholds)
    amplitudes, potentials, sent, trains = {}, {}, dict[int, Tensor](), [list[Tensor]() for _ in range(model.layers)]
    for layer in range(model.layers):
        if layer not in model.relays:
            amplitudes[layer] = float(next(numbers).detach()) if trained else 1.0
            potentials[layer] = torch.zeros(())
    for t in range(model.time_steps):
        before = dict(sent)
        frame = x[..., t] if events else x
        for layer in range(model.layers):
            total = sum(flat(module, frame if source is None else sent[source]) for source, module in connections_into(model, layer))
            for (source, target), module in zip(model.loops, model.feedback, strict=True):
                total = total + flat(module, before[source]) if target == layer and t else total
            if layer in model.relays:
                sent[layer] = total
            elif trained:
                v, leak = amplitudes[layer], 1.0 if trained.tau is None else exp(-trained.dt / trained.tau)
                potentials[layer] = leak * potentials[layer] + (total if trained.tau is None else (1 - leak) * total)
                fired = (potentials[layer] >= trained.alpha * v).double()
                potentials[layer] = potentials[layer] - v * fired
                sent[layer] = fired * v if trained.tau is None else fired * v / trained.dt
            else:
                potential = potentials[layer] + total
                sent[layer] = (potential >= model.neuron.threshold).double()
                potentials[layer] = model.neuron.leak * (potential - model.neuron.reset * sent[layer])
            trains[layer].append(sent[layer])
    return [torch.stack(train) for train in trains]


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"neuron": Neuron(0.6, -0.6)}, {"trained_threshold": LIF}, {"trained_threshold": IF, "weighted_readout": True}],
    ids=["LIF", "IF", "DSR LIF", "DSR IF"],
)
def test_every_spike_is_that_of_the_plain_loop(changes: dict[str, Any], norm: bool, events: bool) -> None:
    model = network(norm=norm, feedback=True, **changes).eval()
    x, _ = batch(model, events)
    found = model.equilibrium(x, trace=True)
    spikes = 0
    for layer, (ours, theirs) in enumerate(zip(found.trains, simulated(model, x, events), strict=True)):
        if layer in model.relays:
            assert (ours - theirs).abs().max() < 1e-12
            assert (found.counts[layer] - theirs.sum(0)).abs().max() < 1e-12
            continue
        assert torch.equal(ours != 0, theirs != 0)
        assert torch.equal(found.counts[layer], ours.sum(0, dtype=torch.int32))
        spikes += int((theirs != 0).sum())
    assert spikes > 200
    powers = model.leak ** torch.arange(STEPS - 1, -1, -1, dtype=torch.float64)
    mean = torch.tensordot(powers / powers.sum(), found.trains[3], 1)
    assert (mean - found.rates[3]).abs().max() < 1e-12


def test_skips_between_neurons_run_on_the_native_kernel_too() -> None:
    chain = [nn.Identity(), conv(3, 5), conv(5, 3), Scale(0.9), nn.Linear(48, 6)]
    model = network(relays=(), hidden=chain, skips=[(0, 3, nn.Identity()), (1, 3, conv(3, 3, 1))])
    x, _ = batch(model, samples=3)
    if native.missing() is None:
        found = model.equilibrium(x, trace=True, kernel="native")
        assert all(torch.equal(ours, theirs.to(torch.int8)) for ours, theirs in zip(found.trains, simulated(model, x, False), strict=True))
    with pytest.raises(UsageError, match="the native kernel cannot run 'residual': it has relays"):
        network().equilibrium(x, kernel="native")


def test_a_relay_may_be_the_last_layer_and_is_no_neuron() -> None:
    model = network(
        hidden=[nn.Identity(), conv(3, 5), conv(5, 3)],
        relays=[3],
        skips=[(0, 3, nn.Identity())],
        readout=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Linear(3, 4)),
    )
    x, y = batch(model)
    found = model.equilibrium(x, trace=True)
    assert torch.allclose(model(x), model.readout[1](found.trains[3].mean((0, 3, 4))))
    assert counts(model).neurons == (48, 48, 80, 0)
    share = sum(float(found.trains[layer].sum()) for layer in range(3)) / (5 * 176 * STEPS)
    for method in ("ottt-a", "saf-e"):
        model.zero_grad()
        assert get(method).gradients(model, x, y, torch.Generator()).forward_rate == pytest.approx(share)
    assert (ottt.run(model, x, y).logits.mean(0) - model(x)).abs().max() < 1e-12


def surrogate_fire(x: Tensor, threshold: Tensor, neuron: TrainedThreshold) -> Tensor:
    """DSR's neuron on (T, samples, ...), its gradient by autograd through the clipped mean."""
    with torch.no_grad():
        leak = 1.0 if neuron.tau is None else exp(-neuron.dt / neuron.tau)
        gain, amplitude = (1.0, 1.0) if neuron.tau is None else (1 - leak, 1 / neuron.dt)
        potential, outs = torch.zeros_like(x[0]), []
        for frame in x:
            potential = leak * potential + gain * frame
            out = threshold * (potential >= neuron.alpha * threshold)
            potential = potential - out
            outs.append(out * amplitude)
        spikes = torch.stack(outs)
        weights = leak ** torch.arange(len(x) - 1, -1, -1, dtype=x.dtype)
        weights = (weights / weights.sum()).reshape(-1, *[1] * (x.ndim - 1))
        mean = (weights * x).sum(0)
    mean = mean + x.mean(0) - x.mean(0).detach()
    top = threshold
    if neuron.tau is not None:  # the authors' gradient of the threshold has a factor dt where the clip's own is 1 / dt
        top = threshold.detach() / neuron.dt + neuron.dt * (threshold - threshold.detach())
    clipped = torch.minimum((mean if neuron.tau is None else mean / neuron.tau).clamp(min=0), top)
    return spikes + len(x) * weights * (clipped - clipped.detach())


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize(("neuron", "readout"), [(IF, False), (LIF, False), (LIF, True)])
def test_dsr_is_plain_autograd(neuron: TrainedThreshold, readout: bool, events: bool) -> None:
    model = network(norm=True, trained_threshold=neuron, weighted_readout=True, readout=readout)
    x, y = batch(model, events)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    done = dsr.run(model, x, y)
    model.load_state_dict(state)
    frames = (x.movedim(-1, 0) if events else x.expand(STEPS, *x.shape)).reshape(-1, *model.input_shape)
    sent: list[Tensor] = []
    thresholds = iter(model.thresholds)
    for layer in range(model.layers):
        total = sum(flat(module, frames if source is None else sent[source]) for source, module in connections_into(model, layer))
        if layer not in model.relays:
            fired = surrogate_fire(total.reshape(STEPS, -1, *total.shape[1:]), next(thresholds), neuron)
            total = fired.reshape(total.shape)
        sent.append(total)
    powers = model.leak ** torch.arange(STEPS - 1, -1, -1, dtype=torch.float64)
    mean = torch.tensordot(powers / powers.sum(), sent[-1].reshape(STEPS, -1, 6), 1)
    logits = model.readout(mean) if readout else mean
    loss = nn.functional.cross_entropy(logits, y)
    loss.backward()
    assert abs(float(loss.detach() - done.loss)) < 1e-12
    for name, parameter in model.named_parameters():
        assert (done.gradients[name] - parameter.grad).abs().max() < 1e-9, name
    assert float(done.gradients["hidden.2.2.gain"].abs()) > 1e-6
    assert done.forward_rate > 0.02


class Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, over: Tensor) -> Tensor:
        ctx.save_for_backward(over)
        return (over >= 0).to(over)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        sigmoid = torch.sigmoid(4 * ctx.saved_tensors[0])
        return grads[0] * 4 * sigmoid * (1 - sigmoid)


def online(module: nn.Module, spikes: Tensor, trace: Tensor) -> Tensor:
    """The current of `spikes` whose parameters learn from `trace`, in two terms."""
    still = {name: parameter.detach() for name, parameter in module.named_parameters()}
    wrapped = Flat(module)
    sent = functional_call(wrapped, {f"module.{name}": value for name, value in still.items()}, spikes)
    learned = wrapped(trace.detach())
    return sent + learned - learned.detach()


class Flat(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return flat(self.module, x)


@pytest.mark.parametrize("trace_input", [False, True])
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("events", [False, True])
def test_ottt_is_plain_autograd(events: bool, feedback: bool, trace_input: bool) -> None:
    model = network(feedback=feedback)
    x, y = batch(model, events)
    done = ottt.run(model, x, y, loss_lambda=0.1, trace_input=trace_input)
    leak = model.neuron.leak
    potentials = [torch.zeros(()) for _ in range(model.layers)]
    spikes, traces = [dict[int | None, Tensor]() for _ in range(2)]
    loss = torch.zeros(())
    for t in range(STEPS):
        before, traced = dict(spikes), dict(traces)
        spikes = {None: x[..., t] if events else x}
        traces = {None: spikes[None] + (leak * traced[None] if t and trace_input else 0)}
        for layer in range(model.layers):
            total = sum(online(module, spikes[source], traces[source]) for source, module in connections_into(model, layer))
            for (source, target), module in zip(model.loops, model.feedback, strict=True):
                if target == layer and t:
                    total = total + online(module, before[source].detach(), traced[source])
            relay = layer in model.relays
            spikes[layer] = total if relay else Surrogate.apply(potentials[layer] + total - model.neuron.threshold)
            potentials[layer] = leak * (potentials[layer] + total - model.neuron.reset * spikes[layer]).detach()
            keeps = leak * traced[layer] if t and (trace_input or not relay) else 0
            traces[layer] = spikes[layer].detach() + keeps
        out = online(model.readout, spikes[5], traces[5])
        wanted = nn.functional.one_hot(y, 4).double()
        loss = loss + (0.9 * nn.functional.cross_entropy(out, y) + 0.1 * nn.functional.mse_loss(out, wanted)) / STEPS
        assert (out - done.logits[t]).abs().max() < 1e-12
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (done.gradients[name] - parameter.grad).abs().max() < 1e-9, name
        assert float(parameter.grad.abs().max()) > 1e-9, name


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_saf_e_is_ottt_o_with_traced_streams(seed: int, events: bool) -> None:
    model = network(feedback=True, seed=seed)
    x, y = batch(model, events)
    ours = saf.run_e(model, x, y)
    theirs = ottt.run(model, x, y, trace_input=True)
    found = model.equilibrium(x)
    for layer in range(model.layers):
        assert (ours.counts[layer] - found.counts[layer].double()).abs().max() < 1e-10
    assert (ours.logits - theirs.logits).abs().max() < 1e-10
    for name, gradient in theirs.gradients.items():
        assert (ours.gradients[name] - gradient).abs().max() < 1e-10, name


def test_a_loops_bias_learns_nothing_from_a_single_step() -> None:
    model = network(feedback=True, time_steps=1)
    x, y = batch(model)
    for run in (ottt.run, saf.run_e):
        assert "feedback.0.bias" not in run(model, x, y).gradients


def test_saf_f_is_the_spike_representation() -> None:
    model = network(weighted_readout=True)
    x, y = batch(model)
    ours, found = saf.run_f(model, x, y), model.equilibrium(x)
    rates: list[Tensor] = []
    for layer in range(model.layers):
        total = sum(flat(module, x if source is None else rates[source]) for source, module in connections_into(model, layer))
        free = total if layer in model.relays else (total / model.neuron.reset).clamp(0, 1)
        rates.append(free + (found.rates[layer] - free).detach())
    nn.functional.cross_entropy(model.readout(rates[5]), y).backward()
    for name, parameter in model.named_parameters():
        assert (ours.gradients[name] - parameter.grad).abs().max() < 1e-10, name


def test_ides_gradient_is_that_of_the_fixed_point() -> None:
    """Feedback from and to relays, with biases: many steps and many iterations meet."""
    model = network(norm=True, feedback=True, neuron=Neuron(2.0, 0.0), weighted_readout=True, time_steps=600).eval()
    with torch.no_grad():
        for loop in model.feedback:
            loop.weight.mul_(0.2)
    x, y = batch(model)
    done = ide.run(model, x, y, solver="iter")
    assert done.state == (3, 4, 5)
    state = dict(enumerate(torch.zeros_like(rate) for rate in done.equilibrium.rates))
    for _ in range(60):
        before, state = state, {}
        for layer in range(model.layers):
            total = sum(flat(module, x if source is None else state[source]) for source, module in connections_into(model, layer))
            for (source, target), module in zip(model.loops, model.feedback, strict=True):
                total = total + flat(module, before[source]) if target == layer else total
            state[layer] = total if layer in model.relays else (total / 2).clamp(0, 1)
    nn.functional.cross_entropy(model.readout(state[5]), y).backward()
    for layer, rate in state.items():
        assert (done.equilibrium.rates[layer] - rate).abs().max() < 5e-3
    for name, parameter in model.named_parameters():
        assert (done.gradients[name] - parameter.grad).norm() <= 0.02 * parameter.grad.norm() + 1e-12, name


@pytest.mark.parametrize("method", ["ide", "spide"])
def test_a_loops_bias_is_part_of_the_equilibrium(method: str) -> None:
    """A chain without streams, its feedback with a bias: SPIDE's and IDE's gradients agree."""
    torch.manual_seed(0)
    model = FeedbackSNN(
        name="biased",
        input_shape=(6,),
        input=nn.Linear(6, 8),
        feedback=[(0, 0, nn.Linear(8, 8))],
        readout=nn.Linear(8, 3),
        time_steps=4000,
        feedback_steps=4000,
    ).double()
    x, y = torch.rand(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    rate = torch.zeros(4, 8, dtype=torch.float64)
    for _ in range(100):
        rate = ((model.input(x) + model.feedback[0](rate)) / model.neuron.reset).clamp(0, 1)
    nn.functional.cross_entropy(model.readout(rate), y).backward()
    if method == "ide":
        found = ide.run(model, x, y).gradients
    else:
        done = spide.run(model, x, y, 4.0)
        found = {name: gradient / 4.0 for name, gradient in done.gradients.items()}
    for name, parameter in model.named_parameters():
        assert (found[name] - parameter.grad).norm() <= 0.02 * parameter.grad.norm() + 1e-9, name


def test_spide_refuses_streams_by_name() -> None:
    model = network()
    with pytest.raises(UsageError, match="method 'spide' does not fit 'residual': layer 0 is a relay"):
        spide.fits(network(weighted_readout=True))
    with pytest.raises(UsageError, match="skip 0 leads from layer 0 to layer 3, but this method knows no skips"):
        spide.fits(network(weighted_readout=True, relays=()))
    assert model.relays == (0, 3)


@pytest.mark.parametrize(
    "changes", [{"feedback": True}, {"norm": True, "trained_threshold": LIF, "weighted_readout": True, "readout": False}]
)
def test_a_checkpoint_brings_it_back(changes: dict[str, Any], tmp_path: Path) -> None:
    model = network(dropout_of={"skip.1": 0.25}, **changes).float().eval()
    about = checkpoint.About(checkpoint.FORMAT, Config(describe(model)), 1, 0.5)
    checkpoint.write(tmp_path / "it.safetensors", model.state_dict(), about)
    again = checkpoint.load(tmp_path / "it.safetensors")
    assert describe(again) == describe(model) == describe(build(describe(model)))
    x, _ = batch(model)
    assert torch.equal(again(x), model(x))
    assert counts(model).parameters == sum(p.numel() for p in model.parameters())


def test_skips_drop_out_alike() -> None:
    model = network(dropout_of={"skip.1": 0.5}).train()
    factors = common.dropout_factors(model, 5, torch.Generator().manual_seed(0))
    assert list(factors) == ["skip.1"]
    x, y = batch(model)
    zeros = {"skip.0": torch.zeros(5, 3, 4, 4), "skip.1": torch.zeros(5, 3, 4, 4), "skip.2": torch.zeros(5, 3, 4, 4)}
    without = network(skips=())
    without.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("skip")})
    runs: list[Callable[..., Any]] = [ottt.run, saf.run_e]
    for run in runs:
        assert (run(model, x, y, dropout=zeros).logits - run(without, x, y).logits).abs().max() < 1e-12
    assert torch.equal(model.equilibrium(x, dropout=zeros).counts[5], without.equilibrium(x).counts[5])


def test_standardised_branches_start_silent() -> None:
    """Skip-init: a gain of 0 leaves the stream alone, and learns at once."""
    branch = nn.Sequential(Scale(2.74), Standardized(nn.Conv2d(5, 3, 3, 1, 1)), Gain(), Scale(0.2))
    model = network(hidden=[nn.Identity(), conv(3, 5), branch], skips=[(0, 3, nn.Identity())], readout=nn.Linear(48, 4))
    x, y = batch(model)
    found = model.equilibrium(x, trace=True)
    assert torch.equal(found.trains[3], found.trains[0])
    assert float(ottt.run(model, x, y).gradients["hidden.2.2.gain"].abs()) > 0


def test_target_torch_counts_the_spikes_of_neurons_only() -> None:
    model = (
        network(input_shape=(1, 8, 8), input=nn.Conv2d(1, 3, 3, 2, 1), skips=[(0, 3, nn.Identity())], readout=nn.Linear(6, 10))
        .float()
        .eval()
    )
    done = toolchain.deploy(model, target="torch", dataset="digits", samples=20)
    assert list(done.rates) == ["hidden2", "hidden3", "hidden5", "hidden6"]
    images = torch.from_numpy(data.load("digits", samples=20).images)
    found = model.equilibrium(images)
    assert done.spikes_per_sample * 20 == sum(int(found.counts[layer].sum()) for layer in (1, 2, 4, 5))
