"""Loihi's arithmetic against an independent spelling of it in plain Python integers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from toolchain import fixed
from toolchain.ir import POTENTIAL_LIMIT, Dynamics

potentials = st.integers(-POTENTIAL_LIMIT, POTENTIAL_LIMIT)
currents = st.one_of(st.integers(-(2**26), 2**26), st.sampled_from([0, POTENTIAL_LIMIT, -POTENTIAL_LIMIT, 2 * POTENTIAL_LIMIT]))


def by_hand(u: int, current: int, threshold: int, reset: int, decay: int, both: bool) -> tuple[int, int, bool]:
    total = u + current
    clamped = max(-POTENTIAL_LIMIT, min(POTENTIAL_LIMIT, total))
    spike = 1 if clamped >= threshold else -1 if both and clamped <= -threshold else 0
    after = clamped - reset * spike
    magnitude = (abs(after) * (4096 - decay)) // 4096
    return (magnitude if after >= 0 else -magnitude), spike, clamped != total


@given(
    u=potentials,
    current=currents,
    threshold=st.integers(1, POTENTIAL_LIMIT),
    reset=st.integers(0, POTENTIAL_LIMIT),
    decay=st.integers(0, 4095),
    both=st.booleans(),
)
def test_a_couple_steps_as_by_hand(u, current, threshold, reset, decay, both):
    dynamics = Dynamics((4096 - decay) / 4096, threshold, reset, "both" if both else "plus")
    found = fixed.step(np.array([u]), np.array([current]), dynamics, integer=True)
    assert (int(found.potential[0]), int(found.spikes[0]), bool(found.saturated[0])) == by_hand(u, current, threshold, reset, decay, both)


@given(u=potentials, current=currents, decay=st.integers(0, 4095))
def test_a_readout_leaks_before_it_adds(u, current, decay):
    found = fixed.step(np.array([u]), np.array([current]), Dynamics((4096 - decay) / 4096), integer=True)
    leaked = (abs(u) * (4096 - decay)) // 4096 * (1 if u >= 0 else -1)
    assert int(found.potential[0]) == max(-POTENTIAL_LIMIT, min(POTENTIAL_LIMIT, leaked + current))
    assert not found.spikes.any()


@given(u=potentials, arriving=currents, integer=st.booleans())
def test_a_relay_emits_what_arrives_and_keeps_nothing(u, arriving, integer):
    kind = np.int64 if integer else np.float64
    found = fixed.step(np.array([u], kind), np.array([arriving], kind), Dynamics(1.0, members="graded"), integer=integer)
    expected = max(-POTENTIAL_LIMIT, min(POTENTIAL_LIMIT, arriving)) if integer else arriving
    assert found.spikes.tolist() == found.potential.tolist() == [expected]
    assert found.spikes.dtype == kind
    assert found.saturated.tolist() == [integer and abs(arriving) > POTENTIAL_LIMIT]


@given(st.integers(2**51, 2**56), st.integers(-3, 3), st.booleans())
def test_products_are_exact_on_both_sides_of_what_float64_holds(large, small, sign):
    """The last bit survives where sums pass 2^53, stacked or not."""
    rows = np.array([[large, 1 if sign else -1]])
    matrix = np.array([[1], [small]])
    expected = large + (small if sign else -small)
    assert int(fixed.product(rows, matrix)[0, 0]) == expected
    assert int(fixed.product(rows[None], matrix[None])[0, 0, 0]) == expected


def test_thresholds_are_met_at_equality_on_both_sides():
    dynamics = Dynamics(1.0, 10, 20, "both")
    found = fixed.step(np.array([0, 0, 0, 0]), np.array([10, 9, -10, -9]), dynamics, integer=True)
    assert found.spikes.tolist() == [1, 0, -1, 0]
    assert found.potential.tolist() == [-10, 9, 10, -9]


@given(st.integers(-(2**40), 2**40), st.integers(0, 20), st.integers(0, 7))
def test_host_currents_round_half_up_and_saturate(total, shift, exponent):
    found = fixed.host_current(np.array([total]), shift, exponent)
    rounded = (2 * total + 2**shift) // 2 ** (shift + 1)
    assert int(found.mantissa[0]) == max(-4096, min(4095, rounded))
    assert found.clipped == (not -4096 <= rounded <= 4095)


@given(st.floats(1e-3, 1))
def test_the_nearest_leak_is_within_half_a_step(leak):
    assert abs(fixed.nearest_leak(leak) - leak) <= max(0.5 / 4096, 0)


@given(st.floats(0, 1e6), st.integers(1, 4095), st.integers(0, 30))
def test_exponents_are_the_smallest_that_fit(bound, high, largest):
    exponent = fixed.exponent_for(bound, high, largest)
    assert bound <= high * 2.0**exponent or exponent == largest
    assert exponent == 0 or bound > high * 2.0 ** (exponent - 1)


def test_what_diffusion_rounds_away_it_makes_up_for_nearby():
    """A grey image over any few neighbouring pixels: the sum of the rounded weights stays near the exact one, where nearest rounding drifts."""
    draw = np.random.default_rng(0)
    weights = draw.uniform(-3, 3, (20, 1, 16, 16))
    near, spread = (fixed.mantissas(weights, 0, -8, 7), fixed.diffused(weights, 0, -8, 7))
    assert spread.clipped == 0
    assert np.abs(spread.mantissa - weights).max() < 2
    windows = [np.s_[..., y : y + 8, x : x + 8] for y in (0, 8) for x in (0, 8)]
    drift = [np.sqrt(np.mean([((made.mantissa[w] - weights[w]).sum((-2, -1)) ** 2).mean() for w in windows])) for made in (near, spread)]
    assert drift[1] < drift[0] / 2


def test_diffusion_leaves_whole_numbers_and_cuts_what_is_too_large():
    whole = np.arange(-8, 8, dtype=np.float64).reshape(1, 4, 4)
    assert (fixed.diffused(whole, 0, -8, 7).mantissa == whole).all()
    large = fixed.diffused(np.full((1, 2, 2), 9.0), 0, -8, 7)
    assert (large.mantissa == 7).all()
    assert large.clipped == 4
