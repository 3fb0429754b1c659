"""Every network lowers and folds to a graph with the module's own spikes: one small network for every feature, and the networks of the papers.

Trains are equal spike for spike, in float64. Sums are added up in another order than torch's, so a potential within rounding of its threshold could fire a step
apart: weights are random, and their seed is one at which none comes that near.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from toolchain import codec, data, ir, models
from toolchain.ir import Graph, tensor_names, weight_of
from toolchain.layers import FeedbackSNN, Frobenius, Gain, Limited, Neuron, Normalize, Scale, Spectral, Standardized, TrainedThreshold
from toolchain.lower import lower, not_compiled, takes_events
from toolchain.methods import spide
from toolchain.passes import Adjoint, Fold
from toolchain.targets.reference import REFERENCE

LIF = Neuron(threshold=0.4, u_rest=-0.1, threshold_back=0.3, u_rest_back=-0.2, leak=0.5)
QUICK = Neuron(threshold=0.15, u_rest=-0.05, leak=0.9)
DSR_LIF = TrainedThreshold(0.4, 0.4, bound=0.01, tau=1.0, dt=0.2)
DSR_IF = TrainedThreshold(1.1, 0.5, bound=0.01)


def lively(model: FeedbackSNN, seed: int = 1, louder: float = 1.6) -> FeedbackSNN:
    """`model` in float64 and evaluation mode, every number of it random, and loud enough for all layers to fire."""
    torch.manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
                part.running_mean.normal_(0, 0.2)
                part.running_var.uniform_(0.2, 1)
                part.weight.uniform_(0.5, 1.5)
                part.bias.uniform_(0, 0.5)
            elif isinstance(part, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                part.weight.mul_(louder).add_(torch.randn_like(part.weight) * 1e-3)
                if part.bias is not None:
                    part.bias.uniform_(-0.05, 0.25)
            elif isinstance(part, Gain):
                part.gain.fill_(0.7)
            elif isinstance(part, Standardized):
                part.gain.uniform_(0.8, 1.2)
        for threshold in model.thresholds:
            threshold.mul_(float(torch.rand(())) * 0.4 + 0.8)
    return model


def canonical(synapse: ir.Synapse) -> bool:
    """One operation with weights, pools and upsampling around it."""
    weighing = [op for op in synapse.ops if weight_of(op) is not None]
    others = [op for op in synapse.ops if weight_of(op) is None]
    return (
        len(weighing) == 1
        and getattr(weighing[0], "factor", 1.0) == 1.0
        and all(isinstance(op, (ir.AvgPool2d, ir.Upsample)) for op in others)
    )


def folded(model: FeedbackSNN) -> Graph:
    """The folded float graph, in the form that `fold` promises, valid with its adjoint too."""
    graph = lower(model)
    assert {name for phase in graph.phases for name in tensor_names(phase)} == graph.tensors.keys()
    assert all(tensor.dtype == np.float64 for tensor in graph.tensors.values())
    graph = Fold()(graph)
    ir.verify(graph)
    assert [synapse for synapse in graph.phase("forward").synapses if not canonical(synapse)] == []
    assert Fold()(graph) == graph
    ir.verify(Adjoint()(graph))
    return graph


def same_spikes(model: FeedbackSNN, x: Tensor, least: int) -> Graph:
    """The folded graph, whose trains, counts and logits on `reference` are those of the module; every layer fires, all together at least `least` times."""
    with torch.no_grad():
        done = model.equilibrium(x, trace=True)
        logits = model.logits(model.readout_rates(done)).numpy()
    graph = folded(model)
    with replace(REFERENCE, trace=True).compile(graph) as executable:
        result = executable.run(x.numpy())
    spikes = 0
    for layer in range(model.layers):
        name, train = f"hidden{layer + 1}", done.trains[layer].numpy()
        if layer in model.relays:
            assert np.abs(result.history[name].spikes - train).max() < 1e-9
            continue
        assert np.array_equal(result.history[name].spikes, train), name
        assert np.array_equal(result.counts[name], done.counts[layer].numpy()), name
        assert 0 < train.mean() < 1, name
        spikes += int(train.sum())
    assert spikes >= least, spikes
    assert np.abs(codec.logits(graph, result) - logits).max() < 1e-9
    return graph


def images(model: FeedbackSNN, samples: int = 4, *, frames: bool = False, seed: int = 7) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(samples, *model.input_shape, *([model.time_steps] if frames else []), dtype=torch.float64, generator=draw)


def network(*chain: nn.Module, **settings: Any) -> FeedbackSNN:
    """A network on 3 x 7 x 9 of the connections in `chain`; a readout of 4 classes unless it is given."""
    made: dict[str, Any] = {"name": "small", "input_shape": (3, 7, 9), "neuron": LIF, "time_steps": 12, **settings}
    if "readout" not in made:
        alone = FeedbackSNN(name="alone", input_shape=made["input_shape"], input=chain[0], hidden=chain[1:], readout=None)
        made["readout"] = nn.Linear(alone.classes, 4)
    return FeedbackSNN(input=chain[0], hidden=chain[1:], **made)


def normed(*parts: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(*parts, nn.BatchNorm2d(channels))


def residual(*, norm: bool = True, **settings: Any) -> FeedbackSNN:
    """On 2 x 5 x 5: relay 1 -> 2 -> 3 -> relay 4 -> 5 -> 6, around the block as it is and projected, skips from the input, and three loops with biases."""
    chain = [
        normed(nn.Conv2d(2, 3, 3, 1, 1), channels=3) if norm else nn.Conv2d(2, 3, 3, 1, 1),
        nn.BatchNorm2d(3) if norm else nn.Identity(),
        nn.Conv2d(3, 5, 3, 1, 1),
        nn.Sequential(Scale(1.3), nn.Conv2d(5, 3, 3, 1, 1), Gain(0.8)),
        nn.BatchNorm2d(3) if norm else Scale(0.9),
        nn.Sequential(nn.AvgPool2d(2), nn.Linear(12, 6)),
    ]
    around = [(0, 3, nn.Identity()), (1, 3, nn.Conv2d(3, 3, 1)), (None, 4, normed(nn.Conv2d(2, 3, 1), channels=3))]
    loops = [(4, 0, nn.Conv2d(3, 3, 3, 1, 1)), (3, 1, nn.Conv2d(3, 3, 1)), (5, 1, nn.Linear(6, 75))]
    return network(
        *chain, **{"skips": around, "feedback": loops, "relays": [0, 3], "input_shape": (2, 5, 5), "weighted_readout": False, **settings}
    )


def looped(**settings: Any) -> FeedbackSNN:
    """On 3 x 7 x 7: 5 x 4 x 4, 4 x 2 x 2 and 11 with loops of every kind, within a layer, back and ahead."""
    loops = [
        (1, 0, Limited(nn.ConvTranspose2d(4, 5, 3, 2, 1, output_padding=1), Frobenius(2.0))),
        (2, 0, nn.Sequential(Scale(0.7), nn.Linear(11, 80))),
        (1, 0, nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 5, 3, 1, 1))),
        (0, 0, Limited(nn.Conv2d(5, 5, 3, 1, 1, bias=False), Spectral(0.9))),
        (0, 2, nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.Linear(20, 11))),
    ]
    chain = nn.Conv2d(3, 5, 3, 2, 1), nn.Conv2d(5, 4, 3, 2, 1), nn.Linear(16, 11)
    return network(*chain, feedback=loops, input_shape=(3, 7, 7), **settings)


FEATURES: dict[str, Callable[[], FeedbackSNN]] = {
    "convolutions": lambda: network(nn.Conv2d(3, 5, 3, 2, 1), nn.Conv2d(5, 4, 5, 1, 2, bias=False), normalize=Normalize(0.4, 0.3)),
    "a mean for each channel": lambda: network(nn.Conv2d(3, 5, 3, 1, 1), normalize=Normalize((0.3, 0.5, 0.6), 0.25)),
    "a deviation for each channel": lambda: network(nn.Linear(189, 20), normalize=Normalize(0.4, (0.2, 0.3, 0.25))),
    "batch norm": lambda: network(
        normed(nn.Conv2d(3, 5, 3, 2, 1), channels=5),
        nn.Sequential(nn.Linear(100, 30), nn.BatchNorm1d(30)),
        normalize=Normalize((0.3, 0.5, 0.6), (0.2, 0.3, 0.25)),
    ),
    "batch norm before, behind and alone": lambda: network(
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, 1, 1)),
        nn.Sequential(nn.BatchNorm2d(4), nn.AvgPool2d(3, 2, 1), nn.Conv2d(4, 5, 3, 1, 1), nn.AvgPool2d(2), nn.BatchNorm2d(5)),
        nn.BatchNorm2d(5),
    ),
    "pools": lambda: network(
        nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.AvgPool2d(3, 2, 1)),
        nn.AvgPool2d(2, 1),
        nn.Sequential(Scale(2.5), nn.AvgPool2d(2), nn.Identity()),
        neuron=QUICK,
    ),
    "transposed convolutions": lambda: network(
        nn.Conv2d(3, 5, 3, 2, 1), nn.ConvTranspose2d(5, 4, 3, 2, 1, output_padding=1), nn.ConvTranspose2d(4, 3, 4, 3, 2, bias=False)
    ),
    "transposed convolutions with norms": lambda: network(
        nn.Conv2d(3, 5, 3, 2, 1), nn.Sequential(nn.BatchNorm2d(5), nn.ConvTranspose2d(5, 4, 3, 2, 1), nn.BatchNorm2d(4))
    ),
    "groups, dilation and rectangles": lambda: network(
        nn.Conv2d(3, 6, 3, (2, 1), (2, 1), dilation=(2, 1), groups=3),
        nn.Sequential(Scale(1.5), nn.Conv2d(6, 4, (3, 1), 1, (1, 0), groups=2)),
        nn.ConvTranspose2d(4, 6, (2, 3), (1, 2), (1, 1), (0, 1), groups=2, dilation=(3, 1)),
        nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False),
        feedback=[
            (3, 1, nn.ConvTranspose2d(6, 4, (2, 3), 1, (0, 1), groups=2)),
            (1, 0, Limited(nn.ConvTranspose2d(4, 6, 3, 1, 2, groups=2, dilation=2), Spectral(1.2))),
        ],
        neuron=QUICK,
    ),
    "groups with norms": lambda: network(
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, 2, 1, groups=3), nn.BatchNorm2d(6)),
        nn.Sequential(nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 4, 3, 2, 1, groups=2), nn.BatchNorm2d(4)),
        nn.Sequential(nn.AvgPool2d(2), Standardized(nn.Conv2d(4, 6, (3, 1), 1, 1, dilation=(1, 2), groups=2)), nn.BatchNorm2d(6)),
    ),
    "upsampling": lambda: network(
        nn.Conv2d(3, 5, 3, 2, 1),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Sequential(Scale(1.5), nn.Upsample(scale_factor=3, mode="nearest"), nn.Conv2d(5, 3, 3, 3, 1), nn.BatchNorm2d(3)),
    ),
    "adaptive pools of equal windows": lambda: network(
        nn.Conv2d(3, 5, 3, 1, 1),
        nn.AdaptiveAvgPool2d(4),
        nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d(6), nn.Linear(180, 8)),
        input_shape=(3, 5, 5),
        neuron=QUICK,
    ),
    "adaptive pools of unequal windows": lambda: network(
        nn.Conv2d(3, 5, 3, 1, 1), nn.AdaptiveAvgPool2d(4), nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Linear(45, 8)), neuron=QUICK
    ),
    "a matrix, and images of its values": lambda: network(
        nn.Conv2d(3, 5, 3, 1, 1),
        nn.Sequential(
            *(nn.BatchNorm2d(5), nn.AvgPool2d(1), nn.AdaptiveAvgPool2d(4), nn.BatchNorm2d(5), nn.Upsample(scale_factor=2, mode="nearest")),
            *(nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(3), Scale(1.3)),
        ),
        nn.Linear(45, 9),
    ),
    "matrices in a row": lambda: network(
        nn.Linear(189, 12),
        nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 7), nn.BatchNorm1d(7), nn.Linear(7, 15), nn.BatchNorm1d(15), nn.Linear(15, 6)),
    ),
    "flatten": lambda: network(
        nn.Sequential(nn.BatchNorm2d(3), nn.Linear(189, 60)), nn.Linear(60, 20), readout=nn.Sequential(Scale(2.74), nn.Linear(20, 4))
    ),
    "restricted norms": lambda: network(
        Limited(nn.Conv2d(3, 5, 3, 2, 1), Spectral(1.5)),
        nn.Sequential(Scale(3.0), Limited(nn.ConvTranspose2d(5, 4, 3), Frobenius(3.0)), nn.BatchNorm2d(4)),
        Limited(nn.Linear(168, 12), Spectral(2.0)),
    ),
    "standardised weights": lambda: network(
        Standardized(nn.Conv2d(3, 5, 3, 2, 1)),
        nn.Sequential(Scale(2.74), nn.AvgPool2d(2), Standardized(nn.Linear(20, 30))),
        nn.Sequential(nn.Linear(30, 8), Gain(0.2), Scale(1.4)),
    ),
    "loops": looped,
    "loops of integrators": partial(looped, neuron=Neuron(0.5, -0.5), normalize=Normalize((0.3, 0.5, 0.6), 0.3)),
    "loops without leak in the readout": partial(looped, weighted_readout=False),
    "residual": residual,
    "residual without norms": partial(residual, norm=False),
    "residual with normalised inputs": partial(residual, normalize=Normalize((0.4, 0.6), (0.2, 0.3)), weighted_readout=True),
    "trained thresholds, LIF": partial(residual, trained_threshold=DSR_LIF),
    "trained thresholds, LIF, weighted": partial(residual, trained_threshold=DSR_LIF, weighted_readout=True, readout=None),
    "trained thresholds, IF": partial(residual, trained_threshold=DSR_IF, readout=nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))),
    "rates are logits": lambda: network(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 2, 3, 2, 1), readout=None),
    "a relay is read": lambda: network(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 2, 3, 2, 1), relays=[1]),
    "a readout of many parts": lambda: network(
        nn.Conv2d(3, 5, 3, 1, 1),
        readout=nn.Sequential(
            nn.BatchNorm2d(5), Scale(2.74), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Linear(5, 6), nn.BatchNorm1d(6)
        ),
    ),
    "a pool and an upsampling of one value": lambda: network(
        nn.Conv2d(3, 8, 3, 1, 0),
        readout=nn.Sequential(nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(7), nn.Linear(8 * 49, 6), nn.BatchNorm1d(6)),
        input_shape=(3, 5, 5),
    ),
}


@pytest.mark.parametrize("frames", [False, True], ids=["still", "frames"])
@pytest.mark.parametrize("feature", FEATURES)
def test_the_folded_graph_fires_the_modules_spikes(feature: str, frames: bool) -> None:
    torch.manual_seed(3)
    model = lively(FEATURES[feature]())
    model.events = frames
    same_spikes(model, images(model, frames=frames), least=300)


@pytest.mark.parametrize("feature", FEATURES)
def test_the_raw_graph_fires_them_too(feature: str) -> None:
    torch.manual_seed(3)
    model = lively(FEATURES[feature]())
    x, graph = images(model), lower(model)
    result = REFERENCE.compile(graph).run(x.numpy())
    done = model.equilibrium(x)
    for layer in model.spiking:
        assert np.array_equal(result.counts[f"hidden{layer + 1}"], done.counts[layer].numpy())


SPIDES = (
    *(
        "convolutions",
        "a mean for each channel",
        "a deviation for each channel",
        "pools",
        "transposed convolutions",
        "groups, dilation and rectangles",
        "adaptive pools of equal windows",
    ),
    *("adaptive pools of unequal windows", "standardised weights", "loops", "loops of integrators", "rates are logits"),
)
"""Features that SPIDE trains: no batch normalisation, relays or trained thresholds, and a leak-weighted readout."""


@pytest.mark.parametrize("feature", SPIDES)
def test_the_adjoint_of_the_folded_graph_fires_spides_signed_spikes(feature: str) -> None:
    torch.manual_seed(3)
    model = lively(FEATURES[feature]())
    model.events, model.feedback_steps = False, 40
    x, labels = images(model), torch.arange(4) % min(4, model.classes)
    done = spide.run(model, x, labels, model.scale_factor, trace=True)
    graph = Adjoint()(folded(model))
    with replace(REFERENCE, trace=True).compile(graph) as executable:
        forward = executable.run(x.numpy())
        feedback = executable.run(codec.output_error(graph, forward, labels.numpy()), phase="feedback")
    for layer in model.spiking:
        name = f"hidden{layer + 1}"
        assert np.array_equal(feedback.history[name].spikes, done.feedback.trains[layer].numpy()), name
        assert np.abs(codec.beta(graph, feedback, name) - done.feedback.beta[layer].numpy()).max() < 1e-9
    assert sum(int(count.sum()) for count in feedback.activity.values()) > 300


def test_feedback_of_trained_thresholds_keeps_one_reset_ratio() -> None:
    """Threshold and reset of the feedback phase follow V, so that A/Ab is the neuron's everywhere, as `adjoint` needs."""
    model = lively(residual(trained_threshold=DSR_LIF))
    graph = lower(model)
    forward, feedback = (graph.phase(name).dynamics for name in ("forward", "feedback"))
    couples = [population.name for population in graph.of_kind("couple")]
    assert len({forward[name].reset for name in couples}) == len(couples)
    for name in couples:
        assert forward[name].threshold == DSR_LIF.alpha * forward[name].reset
        assert forward[name].leak == feedback[name].leak == DSR_LIF.leak
        assert forward[name].reset / feedback[name].reset == pytest.approx(LIF.reset / LIF.reset_back, rel=1e-12)
        assert feedback[name].threshold / feedback[name].reset == pytest.approx(LIF.threshold_back / LIF.reset_back, rel=1e-12)
    assert feedback["hidden1"] == ir.Dynamics(leak=1, members="graded")
    assert graph.phase("feedback").order == tuple(f"hidden{i}" for i in (6, 5, 4, 3, 2, 1))
    assert graph.phase("feedback").drive == (ir.Drive("hidden6", "error", gain=100.0),)


def test_weights_keep_their_names_and_what_is_folded_says_so() -> None:
    model = lively(
        network(
            normed(nn.Conv2d(3, 5, 3, 2, 1), channels=5),
            Limited(nn.Conv2d(5, 4, 3, 1, 1), Frobenius(1.0)),
            nn.AvgPool2d(2),
            feedback=[(1, 0, nn.Conv2d(4, 5, 3, 1, 1))],
            skips=[(0, 2, nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(5, 4, 1)))],
        )
    )
    raw, graph = lower(model), Fold()(lower(model))
    assert np.array_equal(raw.tensors["input.0.weight"], model.input[0].weight.detach().numpy())
    assert np.array_equal(graph.tensors["hidden.0.weight"], model.hidden[0].effective().detach().numpy())
    assert np.array_equal(graph.tensors["feedback.0.weight"], model.feedback[0].weight.detach().numpy())
    assert sorted(graph.tensors) == [
        *("feedback.0.bias", "feedback.0.weight", "hidden.0.bias", "hidden.0.weight", "hidden2.hidden3.scale"),
        *("input.0.weight.scaled", "input.bias", "readout.bias", "readout.weight", "skip.0.1.weight", "skip.0.bias"),
    ]
    assert graph.phase("forward").bias["hidden1"] == (ir.Bias("input.bias"), ir.Bias("feedback.0.bias", start=1))
    assert np.array_equal(graph.tensors["hidden2.hidden3.scale"], np.ones(4))
    pool = next(s for s in graph.phase("forward").synapses if (s.source, s.target) == ("hidden2", "hidden3"))
    assert pool.ops == (ir.AvgPool2d((2, 2), (2, 2)), ir.Scale(weight="hidden2.hidden3.scale"))


def test_one_step_has_no_late_bias() -> None:
    model = lively(looped(time_steps=1))
    assert all(bias.start == 0 for biases in lower(model).phase("forward").bias.values() for bias in biases)
    x = images(model)
    result = REFERENCE.compile(Fold()(lower(model))).run(x.numpy())
    assert np.array_equal(result.counts["hidden1"], model.equilibrium(x).counts[0].numpy())


def test_training_mode_and_float32_lower_to_the_evaluated_weights() -> None:
    model = lively(FEATURES["restricted norms"]())
    graph = lower(model)
    assert all(np.array_equal(tensor, graph.tensors[name]) for name, tensor in lower(model.train()).tensors.items())
    assert model.training
    single = lower(model.float())
    assert all(np.abs(tensor - graph.tensors[name]).max() < 1e-5 for name, tensor in single.tensors.items())
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", models.names())
def test_every_network_of_the_papers_lowers_and_folds(name: str) -> None:
    spec = models.get(name)
    model = spec.build()
    assert not_compiled(model) is None
    assert takes_events(model) == (spec.training.dataset in data.EVENTS)
    graph = folded(model)
    assert graph.population("readout").shape == (model.classes,)


@pytest.mark.parametrize("name", models.names())
def test_every_network_of_the_papers_fires_its_own_spikes(name: str) -> None:
    """With random statistics, biases and gains, one sample, three steps: layers, loops, skips and readout at the size of the papers."""
    spec = models.get(name)
    model = spec.build()
    model.time_steps = 3
    model = lively(model)
    same_spikes(model, images(model, 1, frames=spec.training.dataset in data.EVENTS), least=20)
