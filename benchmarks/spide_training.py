"""Samples per second of SPIDE's training on ConvNet-F: ours beside the equations written plainly in PyTorch, in the same run.

python benchmarks/spide_training.py [--weights trained initial] [--batches 128 64 16] [--threads 1] [--data-dir DIR]

The network is SPIDE's for MNIST, 64C5s-64C5s-64C5 with a transposed convolution back, T 30, T_B 100, scale factor 100, dropout 0.2. Every row times
whole training passes (both stages and all gradients) on the same images, factors and weights, those that come with the package or the initial ones; passes of
all kinds take turns, so that whatever else the machine does slows all alike. Before anything is timed, gradients and spikes are compared: float64 must
agree to 1e-12; float32 sums in another order, so that a potential within rounding of its threshold may fire one step earlier or later, and the benchmark
says how many did.
The last line is the table as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from toolchain import data, models, native
from toolchain.errors import UsageError
from toolchain.layers import FeedbackSNN
from toolchain.layers.stepping import Kernel
from toolchain.methods import spide
from toolchain.notation import table
from toolchain.versions import versions

NETWORK = models.get("convnet-f")

WEIGHTS = {"trained": lambda: models.load(NETWORK.name), "initial": NETWORK.build}

SECONDS = 12.0
"""About how long each row is measured."""

LEAST_PASSES = 5

COMPARED = 16
"""Samples whose gradients are compared in float64."""


@dataclass(frozen=True)
class Found:
    """What one pass leaves: spike counts of both stages a layer, and the gradients of the scaled loss by parameter name."""

    forward: list[Tensor]
    feedback: list[Tensor]
    gradients: dict[str, Tensor]


def plainly(model: FeedbackSNN, images: Tensor, labels: Tensor, dropout: dict[str, Tensor]) -> Found:
    """The equations of SPIDE as one writes them down: convolutions of torch at every step, for all samples at once."""
    neuron, back = model.neuron, model.feedback[0]
    amount, amount_back = neuron.threshold - neuron.u_rest, neuron.threshold_back - neuron.u_rest_back
    x = model.normalize(images) if model.normalize is not None else images
    with torch.no_grad():
        weight_f = back.op.weight * (min(float(back.op.weight.norm()), 2.0) / float(back.op.weight.norm()))
        w1, w2, b1, b2 = model.hidden[0].weight, model.hidden[1].weight, model.hidden[0].bias, model.hidden[1].bias
        drop0, drop1, drop2, drop_f = (dropout[name] for name in ("input", "hidden.0", "hidden.1", "feedback.0"))
        current = functional.conv2d(x, model.input.weight, model.input.bias, 2, 2) * drop0
        shapes = [current.shape, (len(x), 64, 7, 7), (len(x), 64, 7, 7)]
        u0, u1, u2 = (current.new_zeros(shape) for shape in shapes)
        c0, c1, c2 = (current.new_zeros(shape) for shape in shapes)
        s2 = u2
        for step in range(model.time_steps):
            u0 = u0 + current
            if step > 0:
                u0 = u0 + functional.conv_transpose2d(s2, weight_f, None, 2, 1, 1) * drop_f
            s0 = (u0 >= neuron.threshold).to(u0.dtype)
            u0 = u0 - amount * s0
            u1 = u1 + functional.conv2d(s0, w1, b1, 2, 2) * drop1
            s1 = (u1 >= neuron.threshold).to(u0.dtype)
            u1 = u1 - amount * s1
            u2 = u2 + functional.conv2d(s1, w2, b2, 1, 2) * drop2
            s2 = (u2 >= neuron.threshold).to(u0.dtype)
            u2 = u2 - amount * s2
            c0, c1, c2 = c0 + s0, c1 + s1, c2 + s2
        rates = [c / model.time_steps for c in (c0, c1, c2)]
        m0, m1, m2 = (((c > 0) & (c < model.time_steps)).to(u0.dtype) for c in (c0, c1, c2))

    last = rates[2].clone().requires_grad_()
    loss = functional.cross_entropy(model.readout(last.flatten(1)), labels) * model.scale_factor
    readout = dict(model.readout.named_parameters())
    error, *grads = torch.autograd.grad(loss, [last, *readout.values()])

    with torch.no_grad():
        y0, y1, y2 = (current.new_zeros(shape) for shape in shapes)
        q0, beta0, beta1, beta2, a0, a1, a2 = (torch.zeros_like(y) for y in (y0, y0, y1, y2, y0, y1, y2))
        for step in range(model.feedback_steps):
            y2 = y2 + error
            if step > 0:
                y2 = y2 + functional.conv2d(m0 * q0 * drop_f, weight_f, None, 2, 1) / amount
            q2 = amount_back * ((y2 >= neuron.threshold_back).to(y2.dtype) - (y2 <= -neuron.threshold_back).to(y2.dtype))
            y2 = y2 - q2
            y1 = y1 + functional.conv_transpose2d(m2 * q2 * drop2, w2, None, 1, 2) / amount
            q1 = amount_back * ((y1 >= neuron.threshold_back).to(y2.dtype) - (y1 <= -neuron.threshold_back).to(y2.dtype))
            y1 = y1 - q1
            y0 = y0 + functional.conv_transpose2d(m1 * q1 * drop1, w1, None, 2, 2, 1) / amount
            q0 = amount_back * ((y0 >= neuron.threshold_back).to(y2.dtype) - (y0 <= -neuron.threshold_back).to(y2.dtype))
            y0 = y0 - q0
            beta0, beta1, beta2 = beta0 + q0, beta1 + q1, beta2 + q2
            a0, a1, a2 = a0 + q0.abs(), a1 + q1.abs(), a2 + q2.abs()
        betas = [m * beta / model.feedback_steps / amount for m, beta in ((m0, beta0), (m1, beta1), (m2, beta2))]

    found = {f"readout.{name}": grad for name, grad in zip(readout, grads, strict=True)}
    connections = {"input": (x, 0), "hidden.0": (rates[0], 1), "hidden.1": (rates[1], 2), "feedback.0": (rates[2], 0)}
    for name, (source, target) in connections.items():
        module = model.connections()[name][2]
        parameters = dict(module.named_parameters())
        made = torch.autograd.grad(module(source), list(parameters.values()), betas[target] * dropout[name])
        found |= {f"{name}.{key}": grad for key, grad in zip(parameters, made, strict=True)}
    return Found([c0, c1, c2], [a0 / amount_back, a1 / amount_back, a2 / amount_back], found)


def ours(model: FeedbackSNN, images: Tensor, labels: Tensor, dropout: dict[str, Tensor], kernel: Kernel) -> Found:
    done = spide.run(model, images, labels, model.scale_factor, dropout=dropout, kernel=kernel)
    return Found(list(done.forward.equilibrium.counts), list(done.feedback.activity), done.gradients)


def gap(a: Found, b: Found) -> tuple[float, int, int]:
    """The largest difference of a gradient, as a share of its tensor's largest value, and the neurons whose count differs, forward and feedback."""
    shares = [float((a.gradients[n] - g).abs().max() / g.abs().max().clamp_min(1e-300)) for n, g in b.gradients.items()]
    differ = [
        sum(int((x.double() != y.double()).sum()) for x, y in zip(p, q, strict=True))
        for p, q in ((a.forward, b.forward), (a.feedback, b.feedback))
    ]
    return max(shares), differ[0], differ[1]


def speeds(works: Mapping[str, Callable[[], object]], samples: int) -> dict[str, float]:
    """Samples per second of process CPU time: the medians of passes in turn for about SECONDS, after a warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in works}
    began, passes = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS or passes < LEAST_PASSES + 1:
        for name, work in works.items():
            start = time.process_time()
            work()
            times[name].append(time.process_time() - start)
        passes += 1
    return {name: samples / median(found[1:]) for name, found in times.items()}


def measured(model: FeedbackSNN, x: Tensor, y: Tensor, kernels: Sequence[Kernel]) -> dict[str, Any]:
    """A row: the share of couples that fire at a step, how far each kernel is from the plain equations, and the speeds. SystemExit where float64 differs."""
    samples = len(x)
    dropout = spide.dropout_factors(model, samples, torch.Generator().manual_seed(1))
    few = min(samples, COMPARED)
    exact = {key: value[:few].double() for key, value in dropout.items()}
    double = NETWORK.build().double()
    double.load_state_dict(model.state_dict())
    reference = plainly(double, x[:few].double(), y[:few], exact)
    single = plainly(model, x, y, dropout)
    row: dict[str, Any] = {
        "batch": samples,
        "forward_density": density(single.forward, model.time_steps),
        "feedback_density": density(single.feedback, model.feedback_steps),
    }
    works: dict[str, Callable[[], object]] = {"plain": partial(plainly, model, x, y, dropout)}
    for kernel in kernels:
        share, *spikes = gap(ours(double, x[:few].double(), y[:few], exact, kernel), reference)
        if share > 1e-12 or any(spikes):
            raise SystemExit(f"{kernel}: float64 gradients differ by {share:.1e} of their largest value, {spikes} neurons in their spikes")
        share32, forward, feedback = gap(ours(model, x, y, dropout, kernel), single)
        row |= {f"{kernel}_gap64": share, f"{kernel}_gap32": share32, f"{kernel}_neurons32": (forward, feedback)}
        works[kernel] = partial(ours, model, x, y, dropout, kernel)
    found = speeds(works, samples)
    return row | found | {f"{kernel}_ratio": found[kernel] / found["plain"] for kernel in kernels}


def density(counts: Sequence[Tensor], steps: int) -> float:
    """Spikes of either sign a couple and time step, over all layers."""
    return sum(float(c.double().sum()) for c in counts) / sum(c.numel() for c in counts) / steps


def shown(rows: Sequence[Mapping[str, Any]], kernels: Sequence[Kernel]) -> str:
    cells = [
        [
            row["weights"],
            str(row["batch"]),
            f"{100 * row['forward_density']:.1f} / {100 * row['feedback_density']:.2f}",
            f"{row['plain']:.1f}",
            *(f"{row[k]:.1f} = {row[f'{k}_ratio']:.1f} x" for k in kernels),
            *(
                f"{row[f'{k}_gap64']:.0e}, {row[f'{k}_gap32']:.0e}, {row[f'{k}_neurons32'][0]} + {row[f'{k}_neurons32'][1]}"
                for k in kernels
            ),
        ]
        for row in rows
    ]
    heads = [f"kernel {k}" for k in kernels] + [f"{k}: gap float64, float32, neurons that differ in float32" for k in kernels]
    return "\n".join(table(["weights", "batch", "density % fwd / fb", "plain torch", *heads], cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--weights", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--batches", nargs="+", type=int, default=[128, 64, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    try:
        dataset = data.load("mnist", split="train", data_dir=asked.data_dir)
    except UsageError as error:
        print(f"{error}; using mnist-1k instead")
        dataset = data.load("mnist-1k")
    images, labels = torch.from_numpy(dataset.images), torch.from_numpy(dataset.labels)
    kernels: list[Kernel] = ["torch"] if native.missing() else ["native", "torch"]
    if native.missing():
        print(native.missing())
    rows = []
    for name in asked.weights:
        model = WEIGHTS[name]()
        for samples in asked.batches:
            rows.append({"weights": name, **measured(model, images[-samples:], labels[-samples:], kernels)})
            print(json.dumps(rows[-1]), flush=True)
    print("ConvNet-F by SPIDE, T 30, T_B 100, samples per second of CPU time (both stages and all gradients)")
    print(shown(rows, kernels))
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {asked.threads} thread(s)"
    if not native.missing():
        machine += f", {native.INSTRUCTION_SETS[native.widest()]}"
    print(f"{machine}; " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    print(json.dumps({"machine": machine, "versions": versions(), "rows": rows}))


if __name__ == "__main__":
    main()
