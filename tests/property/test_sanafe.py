"""SANA-FE's Loihi equals the reference on drawn networks: every operation, skips, loops, delays, extreme weights, in both phases and both timings."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolchain.errors import DesignRuleError
from toolchain.passes import Retime
from toolchain.targets.reference import REFERENCE
from toolchain.targets.sanafe import SANAFE

pytest.importorskip("sanafe", reason="SANA-FE is not installed (extra energy)")


@settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), extreme=st.booleans(), mode=st.sampled_from(["exact", "pipelined"]))
def test_sanafe_equals_reference_or_refuses(drawn, assert_identical, data, extreme, mode):
    """It refuses exactly those runs in which the reference counts a saturation."""
    graph = data.draw(drawn.graphs(integer=True, extreme=extreme, host=True, leaks=False, relays=False))
    x, error = data.draw(drawn.values(graph))
    graph = Retime(mode)(graph)
    assert SANAFE.check(graph) == []
    with replace(REFERENCE, trace=True).compile(graph) as defined, replace(SANAFE, trace=True).compile(graph) as run:
        for phase, values in (("forward", x), ("feedback", error)):
            expected = defined.run(values, phase=phase)
            if any(found.any() for found in expected.saturations.values()):
                with pytest.raises(DesignRuleError, match="passes 24 bits"):
                    run.run(values, phase=phase)
                return
            assert_identical(run.run(values, phase=phase), expected)
