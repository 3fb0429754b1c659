"""Makes the NIR files and spikes of this folder with SpikingJelly 2.0 (Python 3.11, torch; pip install spikingjelly nir nirtorch): python tests/golden/nir/make.py

Each network runs with reset by subtraction (v_reset None) on still inputs, and its spikes are kept. NIR has no such neurons, and SpikingJelly refuses to export them, so what is exported has the same
weights and v_reset 0: what a user has to do, and what an import has to make up for.
"""

from __future__ import annotations

from pathlib import Path

import nir
import numpy as np
import torch
from spikingjelly.activation_based import functional, layer, neuron, nir_exchange
from torch import nn

HERE = Path(__file__).parent
STEPS, SAMPLES = 12, 4


def networks(v_reset: float | None) -> dict[str, tuple[tuple[int, ...], nn.Module]]:
    """Input shapes and networks by name; the same weights each time."""

    def fires(threshold: float = 1.0) -> nn.Module:
        return neuron.IFNode(v_threshold=threshold, v_reset=v_reset)

    def leaks(*, decay_input: bool) -> nn.Module:
        return neuron.LIFNode(tau=4.0, decay_input=decay_input, v_reset=v_reset)

    torch.manual_seed(7)
    return {
        "if": ((16,), nn.Sequential(layer.Linear(16, 12), fires(), layer.Linear(12, 5, bias=False), fires(0.5))),
        "lif": ((16,), nn.Sequential(layer.Linear(16, 12), leaks(decay_input=False), layer.Linear(12, 5), leaks(decay_input=False))),
        "lif-decayed-input": ((16,), nn.Sequential(layer.Linear(16, 12), leaks(decay_input=True), layer.Linear(12, 5))),
        "conv": (
            (1, 8, 8),
            nn.Sequential(layer.Conv2d(1, 4, 3, padding=1), fires(), layer.AvgPool2d(2), layer.Flatten(), layer.Linear(64, 5), fires()),
        ),
    }


def main() -> None:
    kept: dict[str, np.ndarray] = {}
    for name, (shape, network) in networks(None).items():
        for part in network:
            if hasattr(part, "weight"):
                part.weight.data *= 3  # so that neurons fire
        hard = networks(0.0)[name][1]
        hard.load_state_dict(network.state_dict())
        inputs = torch.randint(0, 17, (SAMPLES, *shape)) / 16
        nir.write(HERE / f"{name}.nir", nir_exchange.export_to_nir(hard, inputs[:1]))
        functional.reset_net(network.double())
        trains = []
        with torch.no_grad():
            for _ in range(STEPS):
                values, fired = inputs.double(), []
                for part in network:
                    values = part(values)
                    if isinstance(part, neuron.BaseNode):
                        fired.append(values.numpy().astype(np.int8))
                trains.append((*fired, values.numpy()))
        kept[f"{name}.inputs"] = inputs.numpy()
        for index, train in enumerate(zip(*trains, strict=True)):
            last = index == len(trains[0]) - 1
            kept[f"{name}.{'output' if last else f'spikes{index}'}"] = np.stack(train)
    np.savez_compressed(HERE / "expected.npz", **kept)


if __name__ == "__main__":
    main()
