"""The accuracy budget where the truth is known: networks with one planted cause, which must get the drop, and advice that must help when it is taken."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import numpy as np
import pytest

from toolchain import data, models
from toolchain.analysis.accuracy import accuracy_budget
from toolchain.analysis.factors import STEPS
from toolchain.compiler import lowered
from toolchain.ir import (
    Bias,
    Dense,
    Drive,
    Dynamics,
    Graph,
    Phase,
    Population,
    Provenance,
    Synapse,
    Units,
    frozen,
)
from toolchain.passes import FLOAT_PIPELINE, LOIHI_PIPELINE, Pipeline, Quantize, Retime
from toolchain.source import find

SHARE = 0.9
"""Of the drop, what the planted cause must get, cumulatively and alone."""

PASSES = {
    "--weight-bits": ("quantize", "weight_bits", int),
    "--input": ("inject", "mode", str),
    "--timing": ("retime", "mode", str),
}


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def compiled(module, time_steps=None, **options):
    """The folded float graph and the integer graph of a module."""
    start = lowered(find(module), time_steps)
    return FLOAT_PIPELINE.until("adjoint")(start), LOIHI_PIPELINE.with_options(**options)(start)


def follow(module, options, time_steps=None, **given):
    """Compile a module anew with the flags that were advised."""
    options = list(options)
    for flag, value in zip(options[::2], options[1::2], strict=True):
        if flag == "--time-steps":
            time_steps = int(value)
        else:
            name, option, kind = PASSES[flag]
            given[name] = {**given.get(name, {}), option: kind(value)}
    return compiled(module, time_steps, **given)


def run(graphs, dataset, **more):
    return accuracy_budget(*graphs, np.asarray(dataset.images), dataset.labels, dataset=dataset.name, **more)


def assert_blamed(budget, cause, least):
    """`cause` costs at least `least` points, and has its share of the whole drop; the run ends in the integer graph."""
    assert budget.closing.passed
    assert budget.closing.compared > 0
    assert 100 * budget.total.drop >= least
    (row,) = (row for row in budget.rows if row.name == cause)
    assert row.cumulative.drop >= SHARE * budget.total.drop
    assert row.alone.drop >= SHARE * budget.total.drop
    assert row.cumulative.low > 0
    others = sum(abs(other.cumulative.drop) for other in budget.rows if other.name != cause)
    assert others <= (1 - SHARE) * budget.total.drop
    assert budget.advice.factor == cause
    assert abs(sum(row.cumulative.drop for row in budget.rows) - budget.total.drop) < 1e-12


def with_outliers():
    """digits-fc without its last couple, which gets no input and never fires; weights that leave it are four times the largest: functionless, but rounding must hold them."""
    module = models.load("digits-fc")
    weights = (module.feedback[0].weight.data, module.readout.weight.data)
    module.input.weight.data[31] = 0
    module.input.bias.data[31] = 0
    weights[0][31] = 0
    for weight in weights:
        weight[: 31 if weight is weights[0] else None, 31] = 4 * weight.abs().max()
    return module


def faint():
    """digits-fc with a tenth of the current and ten times the readout: rates so low that three steps see next to no spike."""
    module = models.load("digits-fc")
    module.input.weight.data *= 0.1
    module.input.bias.data *= 0.1
    module.readout.weight.data *= 10
    return module


def test_three_bit_weights_get_the_drop_and_eight_bits_give_it_back(digits):
    found = run(compiled(with_outliers(), quantize={"weight_bits": 3}), digits)
    assert_blamed(found, "weights", least=10)
    assert found.advice.options == ("--weight-bits", "8")
    better = run(follow(with_outliers(), found.advice.options), digits)
    assert better.accuracy > found.accuracy + SHARE * found.total.drop


def test_three_time_steps_get_the_drop_and_the_number_suggested_gives_it_back(digits):
    found = run(compiled(faint(), time_steps=3), digits)
    assert_blamed(found, STEPS, least=30)
    assert found.baseline.time_steps == 256
    assert 0 < found.baseline.residual < 0.01
    assert found.advice.options[0] == "--time-steps"
    better = run(follow(faint(), found.advice.options), digits)
    assert better.accuracy > found.accuracy + 0.5 * found.total.drop


def lifted():
    """digits-fc whose couples all get 2 more, which the last couple, always on, takes away again: what is cut of a current is what tells images apart."""
    module = models.load("digits-fc")
    feedback = module.feedback[0].weight.data
    module.input.bias.data += 2
    module.input.weight.data[31] = 0
    module.input.bias.data[31] = 4
    module.readout.weight.data[:, 31] = 0
    feedback[31] = 0
    feedback[:31, 31] = -2
    return module


def test_a_clipped_input_current_gets_the_drop_and_pixels_on_the_chip_give_it_back(digits):
    floats, integers = compiled(lifted())
    found = run((floats, tight(integers, 4)), digits)
    assert_blamed(found, "clipping", least=30)
    assert found.advice.options == ("--input", "graded")
    better = run(follow(lifted(), found.advice.options), digits)
    assert better.accuracy > found.accuracy + SHARE * found.total.drop


def tight(integers, bits):
    """The same currents in a register `bits` bits too narrow: finer steps, and large ones are cut."""
    forward = integers.phase("forward")
    (drive,) = forward.drive
    drive = msgspec.structs.replace(drive, exponent=drive.exponent - bits, shift=drive.shift - bits)
    phases = tuple(msgspec.structs.replace(p, drive=(drive,)) if p.name == "forward" else p for p in integers.phases)
    return msgspec.structs.replace(integers, phases=phases)


def loop(time_steps=6):
    """a -> b -> c -> d, and d stops a one step late: in the model's own time a fires every other step, in pipelined timing the stop comes four steps late. The
    readout says "1" where d fires in less than 9/16 of the steps. Every number is exact on the chip."""
    chain = ("a", "b", "c", "d")
    tensors = {f"{x}{y}": frozen(np.eye(8)) for x, y in pairwise(chain)}
    tensors |= {"in": frozen(np.eye(8)), "da": frozen(-np.eye(8)), "out": frozen(np.stack([np.full(8, 1 / 8), np.zeros(8)]))}
    tensors["bias"] = frozen([0.0, 0.5625])
    couple = Dynamics(1.0, 1.0, 1.0, "plus")
    synapses = tuple(Synapse(x, y, (Dense(f"{x}{y}"),)) for x, y in pairwise(chain))
    forward = Phase(
        "forward",
        time_steps,
        (*chain, "readout"),
        {**dict.fromkeys(chain, couple), "readout": Dynamics(1.0)},
        (*synapses, Synapse("d", "a", (Dense("da"),), 1), Synapse("d", "readout", (Dense("out"),))),
        bias={"readout": (Bias("bias"),)},
        drive=(Drive("a", "input", (Dense("in"),)),),
    )
    kinds = {"input": ("input", 8), **dict.fromkeys(chain, ("couple", 8)), "readout": ("readout", 2)}
    populations = tuple(Population(name, (size,), kind) for name, (kind, size) in kinds.items())
    return Graph(populations, (forward,), tensors, Units("float", {}), Provenance("loop"))


def test_pipelined_timing_gets_the_drop_and_exact_timing_gives_it_back():
    images = np.random.default_rng(0).random((300, 8)) < 0.75
    labels = np.ones(300, np.int64)
    rest = Pipeline((Retime("pipelined"), Quantize(input_levels=4)))
    found = accuracy_budget(loop(), rest(loop()), images.astype(np.float64), labels)
    assert_blamed(found, "timing", least=30)
    assert [row.name for row in found.rows] == ["timing"]
    assert found.advice.options == ("--timing", "exact")
    exact = rest.with_options(retime={"mode": found.advice.options[1]})(loop())
    better = accuracy_budget(loop(), exact, images.astype(np.float64), labels)
    assert better.accuracy == better.baseline.accuracy == 1
    assert "timing" in better.none
