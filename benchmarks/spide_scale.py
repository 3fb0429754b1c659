"""The gradient that SPIDE finds with an automatic scale factor, beside the exact implicit gradient, over a whole training run.

python benchmarks/spide_scale.py [--model mnist-fc] [--epochs N] [--every 50] [--data-dir DIR] [-o FILE.jsonl]

The network trains with its own settings (batch 128, T_B 100) but for `scale_factor: auto`. Every 50 batches the gradient of the batch about to be
learned is compared with the exact one at the same realised rates, masks and dropout: beta = g + (1/A) W^T m beta solved densely in float64, sample by
sample, then the same local updates. A line each: the cosine of all parameters together, of each alone, the factor, the shares of couples that
clipped or stayed silent. The last line sums up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.layers import FeedbackSNN, build, current, describe
from toolchain.methods import Batch, spide
from toolchain.train import train


@torch.no_grad()
def exact_gradients(model: FeedbackSNN, images: Tensor, labels: Tensor, dropout: dict[str, Tensor]) -> dict[str, Tensor]:
    """The implicit gradient at the rates and masks that the forward stage comes to, everything else in float64."""
    forward = spide.forward_stage(model, images, dropout=dropout)
    double = model_in_double(model)
    rates = tuple(rate.double() for rate in forward.equilibrium.rates)
    found = replace(forward.equilibrium, rates=rates, mean_input=double.weighted_input(images.double()))
    exact = spide.Forward(
        found, tuple(mask.double() for mask in forward.masks), {name: factor.double() for name, factor in dropout.items()}
    )
    readout = spide.readout_error(double, rates[-1], labels, 1.0)
    return spide.local_gradients(double, exact, solve(double, exact, readout.error)) | readout.gradients


def model_in_double(model: FeedbackSNN) -> FeedbackSNN:
    double = build(describe(model)).double()
    double.load_state_dict(model.state_dict())
    return double


def solve(model: FeedbackSNN, forward: spide.Forward, error: Tensor) -> tuple[Tensor, ...]:
    """beta of all layers from one dense linear system a sample: beta - (1/A) W^T (factor m beta) = g."""
    sizes = [prod(shape) for shape in model.layer_shapes()]
    starts = [sum(sizes[:layer]) for layer in range(len(sizes))]
    samples = len(error)
    system = torch.eye(sum(sizes), dtype=torch.float64).repeat(samples, 1, 1)
    for name, (source, target, module) in model.connections().items():
        if source is None:
            continue
        gate = forward.masks[target].flatten(1)
        if name in forward.dropout:
            gate = gate * forward.dropout[name].flatten(1)
        block = system[:, starts[source] : starts[source] + sizes[source], starts[target] : starts[target] + sizes[target]]
        block -= matrix(module, model.layer_shapes()[source]).t() * gate.unsqueeze(1) / model.neuron.reset
    drive = torch.cat([error.new_zeros(samples, sum(sizes[:-1])), error.flatten(1)], 1)
    beta = torch.linalg.solve(system, drive)
    return tuple(part.reshape(samples, *shape) for part, shape in zip(beta.split(sizes, 1), model.layer_shapes(), strict=True))


def matrix(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The linear part of a connection as (targets, sources)."""
    ones = torch.eye(prod(shape), dtype=torch.float64).reshape(-1, *shape)
    return (current(module, ones).flatten(1) - current(module, torch.zeros_like(ones[:1])).flatten(1)).t()


def cosine(found: Tensor, exact: Tensor) -> float:
    """Of the angle between two gradients: 0 where all of one is lost, 1 where both are zero."""
    a, b = found.double().flatten(), exact.flatten()
    lengths = float(a.norm() * b.norm())
    return float(a @ b) / lengths if lengths > 0 else float(not a.any() and not b.any())


class Watched(spide.Spide):
    """SPIDE that compares its gradient with the exact one at every `every`-th batch and hands `write` a line."""

    every = 50
    write: Callable[[dict[str, Any]], None]
    batches = 0

    def gradients(
        self, model: FeedbackSNN, images: Tensor, labels: Tensor, generator: torch.Generator, step: Callable[[], object] | None = None
    ) -> Batch:
        number = self.batches
        self.batches += 1
        if number % self.every:
            return super().gradients(model, images, labels, generator, step)
        state = generator.get_state()
        exact = exact_gradients(model, images, labels, spide.dropout_factors(model, len(images), generator))
        generator.set_state(state)
        batch = super().gradients(model, images, labels, generator, step)
        ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        line = {
            "batch": number,
            "cosine": cosine(flat(ours, exact), flat(exact, exact)),
            "by_parameter": {name: cosine(ours[name], gradient) for name, gradient in exact.items()},
            "scale_factor": self.scale_factor,
            "loss": batch.loss,
            "clipped": batch.clipped,
            "silent": batch.silent,
        }
        Watched.write(line)
        return batch


def flat(values: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """The values of these names as one vector."""
    return torch.cat([values[name].double().flatten() for name in names])


def summary(model: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the lines of a run come to."""
    cosines = [line["cosine"] for line in lines]
    apart: dict[str, list[float]] = {name: [line["by_parameter"][name] for line in lines] for name in lines[0]["by_parameter"]}
    factors = [line["scale_factor"] for line in lines]
    return {
        "model": model,
        "sampled": len(lines),
        "least_cosine": min(cosines),
        "least_at_batch": lines[cosines.index(min(cosines))]["batch"],
        "mean_cosine": sum(cosines) / len(lines),
        "share_below_0.99": sum(value < 0.99 for value in cosines) / len(lines),
        "least_by_parameter": {name: min(values) for name, values in apart.items()},
        "mean_by_parameter": {name: sum(values) / len(values) for name, values in apart.items()},
        "scale_factor": [min(factors), max(factors)],
        "most_clipped": max(line["clipped"] for line in lines),
        "silent": [min(line["silent"] for line in lines), max(line["silent"] for line in lines)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="mnist-fc")
    parser.add_argument("--epochs", type=int, help="the model's own where left out")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir")
    parser.add_argument("-o", "--output", type=Path, help="a file for the lines; printed where left out")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    lines: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        file = sys.stdout if asked.output is None else stack.enter_context(asked.output.open("w"))
        folder = stack.enter_context(tempfile.TemporaryDirectory())

        def write(line: dict[str, Any]) -> None:
            lines.append(line)
            print(json.dumps(line), file=file, flush=True)

        Watched.every, Watched.write = asked.every, staticmethod(write)  # type: ignore[assignment]  # the trainer makes its own object
        spide.Spide = Watched  # type: ignore[misc]  # the trainer asks this module for its method by name
        done = train(
            asked.model,
            method="spide",
            epochs=asked.epochs,
            seed=asked.seed,
            device="cpu",
            settings={"train.scale_factor": "auto"},
            output=Path(folder) / "run",
            data_dir=asked.data_dir,
        )
        found = {
            **summary(asked.model, lines),
            "epochs": done.epochs,
            "held_out_accuracy": done.held_out_accuracy,
            "versions": done.versions,
        }
        print(json.dumps(found), file=file)
    accuracy = "no image was held out" if done.held_out_accuracy is None else f"held-out accuracy {done.held_out_accuracy:.2%}"
    print(
        f"{asked.model}, {done.epochs} epochs, {found['sampled']} batches compared: cosine at least {found['least_cosine']:.4f} "
        f"(batch {found['least_at_batch']}), mean {found['mean_cosine']:.4f}, {found['share_below_0.99']:.1%} below 0.99; "
        f"least of any parameter {min(found['least_by_parameter'].values()):.4f}; scale factor {found['scale_factor'][0]:.0f} to "
        f"{found['scale_factor'][1]:.0f}; at most {found['most_clipped']:.2%} clipped; {accuracy}"
    )


if __name__ == "__main__":
    main()
