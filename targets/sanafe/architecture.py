"""SANA-FE's description of Loihi, as its package brings it, fitted with what our networks need. The energies and times are the package's own."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from toolchain.errors import ToolchainError
from toolchain.versions import installed

DESCRIPTION = "loihi.yaml"

SOURCE = (
    "the file's own energies and times: SPICE simulations of Loihi in M. Davies et al., 'Loihi: a neuromorphic manycore processor with on-chip learning', "
    "IEEE Micro 38(1), 2018, as J. A. Boyle et al., 'SANA-FE: Simulating Advanced Neuromorphic Architectures for Fast Exploration', IEEE TCAD 44(8), 2025, "
    "doi:10.1109/TCAD.2025.3537971, use them"
)

NEURON = "loihi_lif"
"""The soma of couples and readouts."""

HOST_INPUT = "host_input"
"""Our soma for input neurons: it sends what the host writes and costs nothing, as the description's own inputs."""

DENDRITE = "loihi_dendrites_delay"
DENSE, SPARSE, CONVOLUTION = "loihi_dense_synapse", "loihi_sparse_synapse", "loihi_conv_synapse"

LARGEST_DELAY = 6
"""Ticks that a spike can be under way: the dendrite holds back up to five after the one that every spike takes (found by trying, SANA-FE 2.2.9)."""

FREE = dict.fromkeys(
    (f"{what}_{where}" for what in ("energy", "latency") for where in ("access_neuron", "update_neuron", "spike_out")), 0.0
)


@dataclass(frozen=True)
class Architecture:
    """`chip` is SANA-FE's own object; `name` says which description of which version it is."""

    chip: Any
    name: str


def loihi() -> Architecture:
    """One Loihi of 128 cores.

    Two things differ from the package's description, and neither changes a charge (a test compares them). Spikes wait in the dendrite unit and not before
    the soma, for else that unit does not hold them back as long as their delay says. The 1,024 input units of each core become one of ours.
    """
    import sanafe

    description = yaml.safe_load((files("sanafe.examples") / DESCRIPTION).read_text())
    try:
        for tile in description["architecture"]["tile"]:
            for core in tile["core"]:
                _fit(core)
    except (KeyError, StopIteration, TypeError) as error:
        raise ToolchainError(
            f"SANA-FE {installed('sanafe')} describes Loihi in another way than version 2.2.9 did ({error}): run pip install sanafe==2.2.9"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / DESCRIPTION
        path.write_text(yaml.safe_dump(description, sort_keys=False))
        chip = sanafe.load_arch(path)
    return Architecture(chip, f"SANA-FE {installed('sanafe')}, {DESCRIPTION}: one Loihi, {len(chip.cores())} cores")


def _fit(core: dict[str, Any]) -> None:
    core["attributes"] |= {"buffer_position": "dendrite", "buffer_inside_unit": True}
    neuron = _named(core["soma"], NEURON)
    core["soma"] = [neuron, {"name": HOST_INPUT, "attributes": {"model": "leaky_integrate_fire", **FREE}}]
    core["dendrite"] = [_named(core["dendrite"], DENDRITE)]
    core["synapse"] = [_named(core["synapse"], name) for name in (DENSE, SPARSE, CONVOLUTION)]


def _named(units: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(unit for unit in units if unit["name"] == name)
