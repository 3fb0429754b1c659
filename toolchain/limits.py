"""What a chip can hold, read from `targets/limits/*.yaml`; every number there carries its public source."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

import msgspec

from toolchain.errors import unknown

if TYPE_CHECKING:
    from importlib.abc import Traversable

__all__ = ["Limit", "Limits", "chips", "load"]


class Limit(msgspec.Struct, frozen=True):
    """One number of a chip and where it is published."""

    value: int
    source: str


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The limits that passes read. Bits are signed widths; exponents are inclusive upper bounds (lower bounds are 0 by our choice); what a chip can or
    cannot do is 1 or 0.

    neurons_per_core          neurons (Loihi 1: compartments) that a core holds
    members_with_subtraction  of these, what one neuron with reset by subtraction takes
    core_memory_bits          what synapses, and on Loihi 2 neurons and output axons, share; `reserved_memory_bits` of it is not theirs
    neuron_state_bits         what a neuron's state takes of it
    memory_word_bits          a list of synapses is stored in whole words, in blocks of up to `list_synapses` with `list_header_bits` each
    shared_kernels            a convolution's kernel is stored once a core, whatever borders cut off
    input_axons               lists of synapses (by axon) that a core holds; one population axon serves up to `axon_sources` source neurons
    output_axons              entries for the cores that a core's neurons send to, `output_axon_bits` of memory each; a population axon takes
                              `population_axon_slots`
    shared_fan_out            neurons that send to the same cores share their entries
    broadcast                 a spike crosses to another chip once, however many of its cores want it
    graded_spike_bits         payload of a spike, 0 where a spike is only a spike
    """

    chip: str
    potential_bits: Limit
    weight_bits: Limit
    weight_exponent: Limit
    current_mantissa_bits: Limit
    current_exponent: Limit
    decay_bits: Limit
    graded_spike_bits: Limit
    neurons_per_core: Limit
    members_with_subtraction: Limit
    core_memory_bits: Limit
    reserved_memory_bits: Limit
    neuron_state_bits: Limit
    memory_word_bits: Limit
    list_header_bits: Limit
    list_synapses: Limit
    shared_kernels: Limit
    input_axons: Limit
    axon_sources: Limit
    output_axons: Limit
    output_axon_bits: Limit
    population_axon_slots: Limit
    shared_fan_out: Limit
    broadcast: Limit
    cores_per_chip: Limit
    chips_per_board: Limit
    largest_system: Limit

    @property
    def memory_bits(self) -> int:
        """What is left of a core's memory for synapses, neurons and output axons."""
        return self.core_memory_bits.value - self.reserved_memory_bits.value


def chips() -> tuple[str, ...]:
    """The chips whose limits are known."""
    return tuple(sorted(path.name[: -len(".yaml")] for path in _folder().iterdir() if path.name.endswith(".yaml")))


@cache
def load(chip: str) -> Limits:
    """The limits of `chip` from its YAML file; UsageError lists the known chips."""
    if chip not in chips():
        raise unknown("chip", chip, chips())
    return msgspec.yaml.decode((_folder() / f"{chip}.yaml").read_bytes(), type=Limits)


def _folder() -> Traversable:
    return files("toolchain.targets") / "limits"


LOIHI2 = load("loihi2")
