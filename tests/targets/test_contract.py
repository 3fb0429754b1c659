"""One suite for every target: what each must refuse, and that results do not depend on how samples are split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from toolchain import target as targets
from toolchain.errors import UsageError
from toolchain.limits import LOIHI2
from toolchain.passes import Retime

LAVA = ("lava-sim", "lava-sim-float")
EVERY = [pytest.param(name, marks=pytest.mark.lava) if name in LAVA else name for name in ("torch", "reference", "sim", "sanafe", *LAVA)]
WHOLE = ("reference", "sanafe")
"""Targets without batches: one runs all samples together, the other each by itself."""


@pytest.fixture
def running(random_graph, random_inputs):
    """A function: a running executable of the named target, on a graph it takes, with inputs and errors for five samples."""
    opened = []

    def start(name, **options):
        chosen = targets.get(name)
        graph = Retime()(random_graph(4, couples=2, integer="quantize" in str(chosen.pipeline)))
        missing = chosen.available()
        if missing is not None and name == "sanafe":
            pytest.skip(missing)
        assert missing is None
        assert chosen.check(graph) == []
        run = replace(chosen, **options).compile(graph)
        opened.append(run)
        return run, *random_inputs(graph, 5)

    yield start
    for run in opened:
        run.close()


@pytest.mark.parametrize("name", EVERY)
def test_bad_inputs_are_refused_in_one_sentence(running, name):
    run, x, error = running(name)
    with pytest.raises(UsageError, match="run phase 'forward' on the same samples first"):
        run.run(error, phase="feedback")
    for bad, message in (
        (np.full_like(x, np.nan), "NaN or infinite"),
        (x + 1, r"give it in \[0, 1\]"),
        (x[:0], "at least 1"),
        (np.zeros((2, 3)), "takes samples of 7 values"),
    ):
        with pytest.raises(UsageError, match=message):
            run.run(bad)
    run.run(x)
    for bad, message in (
        (np.full_like(error, np.inf), "NaN or infinite"),
        (error[:0], "at least 1"),
        (np.zeros((5, 99)), "takes the error of population"),
        (error[:3], "got 3 samples but the forward run before it had 5"),
    ):
        with pytest.raises(UsageError, match=message):
            run.run(bad, phase="feedback")
    assert run.run(error, phase="feedback").phase == "feedback"


@pytest.mark.parametrize("name", [p for p in EVERY if p not in WHOLE])
def test_results_do_not_depend_on_the_batch(running, assert_identical, name):
    whole, x, error = running(name, batch=5, trace=True)
    split, _, _ = running(name, batch=2, trace=True)
    for phase, inputs in (("forward", x), ("feedback", error)):
        assert_identical(whole.run(inputs, phase=phase), split.run(inputs, phase=phase))


@pytest.mark.parametrize("name", EVERY)
def test_a_second_forward_run_starts_afresh(running, assert_identical, name):
    run, x, _ = running(name)
    first = run.run(x)
    run.run(x[::-1].copy())
    assert_identical(first, run.run(x))


@pytest.mark.parametrize("graph_name", ["strides", "pools", "residual", "events"])
@pytest.mark.parametrize("name", ["sim", pytest.param("lava-sim", marks=pytest.mark.lava)])
def test_every_operation_in_batches_is_the_reference(network_graph, network_inputs, assert_identical, name, graph_name):
    """Seven samples in batches of three: convolutions, pools, relays and events, spike for spike."""
    graph = Retime()(network_graph(graph_name, "plain"))
    x, error = network_inputs(graph, 7)
    expected = replace(targets.get("reference"), trace=True).compile(graph)
    assert targets.get(name).check(graph) == []
    with replace(targets.get(name), batch=3, trace=True).compile(graph) as run:
        assert_identical(run.run(x), expected.run(x))
        assert_identical(run.run(error, phase="feedback"), expected.run(error, phase="feedback"))


def test_the_arithmetic_keeps_to_the_limits_of_the_chip():
    """The widths that `ir` and `fixed` are written for are those of the chip's file."""
    from toolchain import fixed, ir

    assert 2 ** (LOIHI2.potential_bits.value - 1) - 1 == ir.POTENTIAL_LIMIT
    assert 2**LOIHI2.decay_bits.value == ir.DECAY_ONE
    assert (-(2 ** (LOIHI2.current_mantissa_bits.value - 1)), 2 ** (LOIHI2.current_mantissa_bits.value - 1) - 1) == fixed.CURRENT_MANTISSA
    assert LOIHI2.current_exponent.value == fixed.CURRENT_EXPONENT_MAX
    assert LOIHI2.weight_exponent.value == fixed.WEIGHT_EXPONENT_MAX
    assert fixed.weight_range(LOIHI2.weight_bits.value) == (-128, 127)
