"""Counts of operations on drawn networks: every operation and composition, relays, events, any timing, recounted through the connections applied forwards."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import msgspec
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolchain import codec, fixed
from toolchain.analysis.workload import WEIGHTED, Tally
from toolchain.ir import Identity, Scale, Upsample, weight_of
from toolchain.notation import route
from toolchain.passes import Retime
from toolchain.targets.reference import REFERENCE


def ones_and_zeros(graph, ops):
    """1 for every weight that is not 0, by name."""
    return {name: (graph.tensors[name] != 0).astype(np.int64) for op in ops if (name := weight_of(op)) is not None}


def unshifted(op):
    return msgspec.structs.replace(op, exponent=0) if getattr(op, "exponent", 0) else op


def effective(graph, ops, source, target, sent):
    """Products of what is not 0 with weights that are not 0, `sent` (batch, *source), spikes or not, one weighted operation after the other: (ACs, MACs)."""
    shapes, found = route(graph, ops, source, target), [0, 0]
    for place, op in enumerate(ops if len(sent) else ()):
        if isinstance(op, WEIGHTED):
            before = ops[:place]
            values = fixed.apply(before, graph.tensors, sent, shapes[place], integer=True) if before else sent
            nonzero = (values != 0).astype(np.int64).reshape(len(sent), *shapes[place])
            made = fixed.apply((unshifted(op),), ones_and_zeros(graph, (op,)), nonzero, shapes[place + 1], integer=True)
            spikes = all(isinstance(b, Identity) or (isinstance(b, Upsample) and not b.transpose) for b in before)
            found[0 if spikes else 1] += int(made.sum())
    return tuple(found)


def arrived(phase, synapse, history):
    """What a source sent, step by step, as far as it arrives by the target's last step, (steps, samples, ...)."""
    start, period = phase.timing.start, phase.timing.period
    last = start.get(synapse.target, 0) + (phase.time_steps - 1) * period
    kept = [k for k in range(len(history)) if start.get(synapse.source, 0) + k * period + synapse.delay <= last]
    return history[kept]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), host=st.booleans(), mode=st.sampled_from(["step", "exact", "pipelined"]))
def test_counts_are_those_of_every_value_that_arrives(drawn, data, host, mode):
    graph = data.draw(drawn.graphs(integer=True, host=host))
    graph = graph if mode == "step" else Retime(mode)(graph)
    images, errors = data.draw(drawn.values(graph))
    with replace(REFERENCE, trace=True).compile(graph) as run:
        results = {"forward": run.run(images)}
        if graph.has_phase("feedback"):
            results["feedback"] = run.run(errors, phase="feedback")
    encoded = codec.encode_input(graph, codec.check_inputs(graph, images))
    shape = {p.name: p.shape for p in graph.populations}
    for name, result in results.items():
        phase, tally = graph.phase(name), Tally(graph, name)
        tally.see(result, images=images if name == "forward" else None, forward=results["forward"])
        counts, samples = tally.counts(), len(images)
        chip = [c for c in counts.connections if c.where == "chip"]
        assert len(chip) == len(phase.synapses)
        sends = 0.0
        for found, synapse in zip(chip, phase.synapses, strict=True):
            source = graph.population(synapse.source)
            if source.kind == "input":
                steps = np.moveaxis(encoded, -1, 0) if source.events else np.repeat(encoded[None], phase.time_steps, axis=0)
            else:
                steps = result.history[synapse.source].spikes.astype(np.int64)
                steps = steps if synapse.gate is None else steps * codec.mask(graph, results["forward"], synapse.gate)
            arriving = arrived(phase, synapse, steps)
            assert found.applied == len(arriving)
            acs, macs = effective(graph, synapse.ops, source.shape, shape[synapse.target], arriving.reshape(-1, *source.shape))
            graded = source.kind == "linear" or (source.kind == "input" and not found.spiking)
            assert (found.acs, found.macs) == ((0, (acs + macs) / samples) if graded else (acs / samples, macs / samples))
            assert found.sent == np.count_nonzero(steps) / samples
            assert found.acs + found.macs <= found.dense
            # every value on its own, through weights of 1 and windows that add up: all ways it goes
            every = np.eye(prod(source.shape), dtype=np.int64).reshape(-1, *source.shape)
            ways = tuple(
                unshifted(op) if not isinstance(op, Scale) else msgspec.structs.replace(op, factor=1.0, exponent=0) for op in synapse.ops
            )
            one = {key: np.ones_like(value) for key, value in ones_and_zeros(graph, synapse.ops).items()}
            reach = fixed.apply(ways, one, every, shape[synapse.target], integer=True).reshape(len(every), -1).sum(axis=1)
            assert found.reach == reach.sum()
            assert found.met == (np.count_nonzero(steps.reshape(-1, len(every)), axis=0) @ reach) / samples
            members = 2 if phase.dynamics[synapse.target].members == "both" else 1
            sends += members * found.met if found.zero_weights == 0 else np.nan
        if not np.isnan(sends):
            np.testing.assert_allclose(counts.synaptic_operations, sends, rtol=1e-12)
