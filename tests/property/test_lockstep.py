"""Two graphs in one loop, on drawn networks: branches, relays, events, leaks, several loops. Each copy is the run it stands for, and everything said of it is a number."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from toolchain.analysis.lockstep import Kept, Lockstep, alike
from toolchain.analysis.side_by_side import error, side_by_side
from toolchain.errors import DesignRuleError
from toolchain.passes import Adjoint, Fold, Inject, Pipeline, Quantize, Retime
from toolchain.targets.reference import REFERENCE


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.data(),
    bits=st.sampled_from([2, 8]),
    mode=st.sampled_from(["bias", "graded"]),
    timing=st.sampled_from(["exact", "pipelined", None]),
)
def test_drawn_networks(drawn, data, bits, mode, timing):
    declared = data.draw(drawn.graphs())
    inputs, _ = data.draw(drawn.values(declared))
    folded = Pipeline((Fold(), Adjoint()))(declared)
    try:
        integers = Pipeline((Inject(mode), *(() if timing is None else (Retime(timing),)), Quantize(weight_bits=bits)))(folded)
    except DesignRuleError:
        reject()
    floats = alike(folded, integers)
    labels = np.zeros(len(inputs), int)
    run = Lockstep(floats, integers)
    kept = {name: Kept(run, name) for name in ("forward", "feedback")}
    run.forward(inputs, kept["forward"].watch, floats.phase("forward").time_steps)
    results = {copy: kept["forward"].result(copy) for copy in ("float", "entire")}
    errors = {copy: error(run.graph(copy), result, labels) for copy, result in results.items()}
    run.feedback(results, errors, kept["feedback"].watch, floats.phase("feedback").time_steps)
    for copy, graph in (("float", floats), ("entire", integers)):
        with REFERENCE.compile(graph) as reference:
            same(kept["forward"].result(copy), reference.run(inputs), exactly=graph.integer)
            same(kept["feedback"].result(copy), reference.run(errors[copy], phase="feedback"), exactly=graph.integer)
    found = side_by_side(folded, integers, inputs, labels)
    numbers = [
        v for row in found.populations.rows for gap in (row.single, row.entire) for v in (gap.difference, gap.relative, gap.potential)
    ]
    numbers += [
        v for curve in found.settling.curves for v in (*curve.whole, *curve.relative, *(curve.accuracy or ()), *(curve.cosine or ()))
    ]
    assert np.isfinite(numbers).all()


def same(found, expected, *, exactly):
    """Floats add up in another order."""
    for field in ("counts", "traces", "potentials"):
        for name, theirs in getattr(expected, field).items():
            tolerance = 0 if exactly else 1e-9 * max(1.0, float(np.abs(theirs).max()))
            np.testing.assert_allclose(getattr(found, field)[name], theirs, rtol=0, atol=tolerance, err_msg=f"{field} of '{name}'")
