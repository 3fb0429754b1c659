"""Three updates by every method, on this process's rows of each batch: run as one process, or as several that find each other in the environment.

python apart.py FOLDER      writes FOLDER/METHOD.safetensors, the last gradients and the weights after them (process 0 alone)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from toolchain import augment, methods, processes
from toolchain.augment import Augmentation
from toolchain.layers import FeedbackSNN, Limited, Neuron, Spectral, Standardized, TrainedThreshold

SAMPLES, STEPS = 16, 3
CASES = {
    "ide": {},
    "ide-as-published": {"as_published": True},
    "ide-iter": {"solver": "iter"},
    "spide": {},
    "spide-auto": {},
    "dsr": {},
    "ottt-a": {},
    "ottt-o": {},
    "saf-e": {},
    "saf-f": {},
}
"""What is run: names that start with that of the method, and the method's options."""


def normed(a: int, b: int) -> nn.Module:
    return nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b))


def network(method: str) -> FeedbackSNN:
    """36-20-20-4 that `method` trains, in float64, with dropout."""
    torch.manual_seed(0)
    back = (1, 0, Limited(nn.Linear(20, 20, bias=False), Spectral()))
    online = {"neuron": Neuron(1.0, 0.0, leak=0.5), "weighted_readout": False, "input": Standardized(nn.Linear(36, 20)), "feedback": [back]}
    normal = {"input": normed(36, 20), "hidden": [normed(20, 20)]}
    changes: dict[str, dict[str, Any]] = {
        "ide": {**normal, "feedback": [back], "neuron": Neuron(2.0, 0.0)},
        "spide": {"feedback": [back], "feedback_steps": 40},
        "dsr": {"input": normed(36, 20), "hidden": [normed(20, 4)], "readout": None, "trained_threshold": TrainedThreshold(2.0)},
        "ottt-a": online,
        "ottt-o": online,
        "saf-e": online,
        "saf-f": {"neuron": Neuron(1.0, 0.0, leak=0.9)},
    }
    whole: dict[str, Any] = {"input": nn.Linear(36, 20), "hidden": [nn.Linear(20, 20)], "readout": nn.Linear(20, 4), **changes[method]}
    model = FeedbackSNN(name="small", input_shape=(1, 6, 6), time_steps=8, dropout=0.2, **whole)
    with torch.no_grad():
        for module in (model.input, *model.hidden):
            for part in module.modules():
                if isinstance(part, nn.Linear):
                    part.weight.mul_(3)
    return model.double().train()


def learn(case: str) -> dict[str, torch.Tensor]:
    """Gradients and weights after three updates, and the statistics of the last batch."""
    method = next(name for name in sorted(methods.NAMES, key=len, reverse=True) if case.startswith(name))
    model, made = network(method), methods.get(method, "auto" if case == "spide-auto" else 30.0, CASES[case])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)

    def step() -> None:
        processes.add_gradients(model)
        optimizer.step()

    drawn = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        x, y = torch.rand(SAMPLES, 1, 6, 6, generator=drawn, dtype=torch.float64), torch.randint(4, (SAMPLES,), generator=drawn)
        own = processes.rows(SAMPLES)
        images = augment.apply(x[own], Augmentation(crop=1, flip=True, cutout=0.5), generator)
        made.gradients(model, images, y[own], generator, step)
        step()
    grads = {f"gradient.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**grads, **model.state_dict(), "scale_factor": torch.tensor(made.state().get("scale_factor", 1.0))}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with processes.together("cpu"):
        for case in CASES:
            found = learn(case)
            if processes.rank() == 0:
                save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / f"{case}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
