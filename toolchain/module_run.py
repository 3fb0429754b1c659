"""The torch module itself as an executable, so that target torch means what the researcher trained and not our rewriting of it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, cast

import numpy as np

from toolchain import codec, devices, fixed
from toolchain.errors import UsageError
from toolchain.ir import Array, Graph
from toolchain.target import Result, join

if TYPE_CHECKING:
    from torch import Tensor, nn

    from toolchain.layers import FeedbackSNN
    from toolchain.methods.spide import Forward


class ModuleRun:
    """Both phases of a FeedbackSNN in its own dtype. `graph` (folded, float) only names populations and decodes results.

    Membrane potentials stay inside the module: `Result.potentials` has the readout's alone.
    """

    def __init__(self, module: FeedbackSNN, graph: Graph, *, device: str = "auto", batch: int = 512) -> None:
        self.graph = graph
        self._device = devices.pick(device)
        self._module = copy.deepcopy(module).to(self._device).eval()
        self._batch = batch
        self._couples = [p.name for p in graph.of_kind("couple")]
        self._latched: list[Forward] = []

    def run(self, inputs: Array, *, phase: str = "forward") -> Result:
        if phase == "forward":
            values = codec.check_inputs(self.graph, inputs)
            self._latched = []
            return join([self._forward(values[i : i + self._batch]) for i in range(0, len(values), self._batch)])
        error = codec.check_error(self.graph, inputs)
        latched = sum(len(f.masks[0]) for f in self._latched)
        if latched != len(error):
            raise UsageError(
                f"the feedback phase got {len(error)} samples but the forward run before it had {latched}: give the errors of the same samples"
            )
        return join([self._feedback(f, error[i * self._batch : (i + 1) * self._batch]) for i, f in enumerate(self._latched)])

    def close(self) -> None:
        self._latched = []

    def __enter__(self) -> ModuleRun:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _forward(self, values: Array) -> Result:
        import torch

        from toolchain.methods import spide

        with torch.no_grad():
            stage = spide.forward_stage(self._module, torch.as_tensor(values, device=self._device))
            weight = cast("nn.Linear", self._module.readout).weight  # the graph beside it exists, so the readout is a Linear
            scores = self._module.readout_rates(stage.equilibrium).flatten(1) @ weight.T
        self._latched.append(stage)
        return self._result("forward", stage.equilibrium.counts, stage.equilibrium.counts, stage.equilibrium.rates, scores)

    def _feedback(self, stage: Forward, error: Array) -> Result:
        import torch

        from toolchain.methods import spide

        with torch.no_grad():
            dtype = stage.masks[-1].dtype
            done = spide.feedback_stage(self._module, stage, torch.as_tensor(error, dtype=dtype, device=self._device), trace=True)
            counts = tuple(train.to(torch.int32).sum(dim=0) for train in done.trains)
            rates = tuple(beta / self._module.neuron.reset_back for beta in done.beta)
        return self._result("feedback", counts, done.activity, rates, None)

    def _result(
        self, phase: str, counts: tuple[Tensor, ...], activity: tuple[Tensor, ...], rates: tuple[Tensor, ...], scores: Tensor | None
    ) -> Result:
        plan = self.graph.phase(phase)

        def arrays(values: tuple[Tensor, ...], dtype: type) -> dict[str, Array]:
            pairs = zip(self._couples, values, strict=True)
            return {name: v.cpu().numpy().astype(dtype).reshape(len(v), *self.graph.population(name).shape) for name, v in pairs}

        norms = {name: fixed.leak_sum(plan.dynamics[name].leak, plan.time_steps) for name in self._couples}
        traces = {name: rate * norms[name] for name, rate in arrays(rates, np.float64).items()}
        potentials: dict[str, Array] = {}
        if scores is not None:
            readout = self.graph.of_kind("readout")[0].name
            norm = fixed.leak_sum(plan.dynamics[readout].leak, plan.time_steps)
            potentials[readout] = scores.double().cpu().numpy() * norm
        counted = arrays(counts, np.int32)
        return Result(
            phase=phase,
            time_steps=plan.time_steps,
            counts=counted,
            activity=arrays(activity, np.int32),
            traces=traces,
            potentials=potentials,
            saturations={name: np.zeros_like(c) for name, c in counted.items()},
        )
