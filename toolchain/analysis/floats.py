"""A float graph run with something changed or watched: the same loop as target torch, its numbers wrapped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING, Literal

from toolchain import codec
from toolchain.errors import GraphError
from toolchain.ir import Array, Drive, Graph, Phase
from toolchain.target import Result, join

if TYPE_CHECKING:
    from torch import Tensor

    from toolchain.targets.torch_ticks import Arithmetic

    Wrap = Callable[[Phase, Arithmetic], Arithmetic]

Dtype = Literal["float32", "float64"]

Inject = Callable[[Drive, Array], Array]
"""What becomes of an injected current, (samples, *shape) in graph units."""

AT_ONCE = 2**24
"""Neurons, of all samples together, that advance side by side."""


class FloatRun:
    """Both phases of a float graph on the CPU, batch after batch. `wrap` replaces a phase's arithmetic, `inject` what drives inject."""

    def __init__(
        self,
        graph: Graph,
        *,
        wrap: Wrap | None = None,
        inject: Inject | None = None,
        dtype: Dtype = "float32",
    ) -> None:
        import torch

        from toolchain.targets.torch_float import Floats

        if graph.integer:
            raise GraphError("the graph is in integers and its float graph is what is run here: give that one")
        self.graph = graph
        self._inject = inject
        plain: dict[str, Arithmetic] = {phase.name: Floats(graph, phase, torch.device("cpu"), dtype) for phase in graph.phases}
        self._arithmetic = plain if wrap is None else {phase.name: wrap(phase, plain[phase.name]) for phase in graph.phases}
        self._at_once = max(1, AT_ONCE // sum(prod(population.shape) for population in graph.populations))

    def forward(self, inputs: Array) -> Result:
        """The forward phase on `inputs` (samples, *input shape), in [0, 1]."""
        values = codec.check_inputs(self.graph, inputs)
        return join([self._forward(values[i : i + self._at_once]) for i in range(0, len(values), self._at_once)])

    def _forward(self, values: Array) -> Result:
        encoded = codec.encode_input(self.graph, values)
        plan = self.graph.phase("forward")
        return self._phase(plan, encoded, {drive: codec.input_current(self.graph, drive, encoded) for drive in plan.drive}, {}, len(values))

    def feedback(self, forward: Result, error: Array) -> Result:
        """The feedback phase with `error` (samples, *shape of the driven population), behind a forward run on the same samples."""
        plan, values = self.graph.phase("feedback"), codec.check_error(self.graph, error)
        gates = {synapse.gate for synapse in plan.synapses if synapse.gate is not None}
        masks = {gate: codec.mask(self.graph, forward, gate) for gate in gates}
        parts = []
        for i in range(0, len(values), self._at_once):
            rows = slice(i, i + self._at_once)
            currents = {drive: codec.error_current(self.graph, values[rows]) for drive in plan.drive}
            parts.append(self._phase(plan, None, currents, {gate: mask[rows] for gate, mask in masks.items()}, len(values[rows])))
        return join(parts)

    def _phase(
        self, plan: Phase, encoded: Array | None, currents: Mapping[Drive, Array], masks: Mapping[str, Array], samples: int
    ) -> Result:
        import torch

        from toolchain.targets.torch_ticks import simulate

        arithmetic = self._arithmetic[plan.name]
        made = {drive.population: current if self._inject is None else self._inject(drive, current) for drive, current in currents.items()}
        with torch.inference_mode():
            injected = {name: _rows(arithmetic.current(current, name)) for name, current in made.items()}
            gates = {name: _rows(arithmetic.emitted(mask, name)) for name, mask in masks.items()}
            return simulate(self.graph, plan, arithmetic, samples, encoded, injected, gates, trace=False)


def _rows(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)
