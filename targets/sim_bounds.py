"""Whatever would lead the compiled core of `sim` outside its arrays is a ToolchainError: a connection is looked through once, when it is laid out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from toolchain.errors import ToolchainError
from toolchain.ir import Array
from toolchain.native import phases
from toolchain.native.phases import DenseClass, SynapsePlan

LARGEST_EXPONENT = 30


def check(plan: SynapsePlan, arrays: Mapping[str, Array], *, source: tuple[int, int, int], target: tuple[int, int]) -> None:
    """`plan` with the arrays that it points to, between a source of (channels, places, size) and a target of (lanes, size)."""
    channels, places, positions = source
    lanes, size = target
    _require(plan.delay >= 0 and 0 <= plan.exponent <= LARGEST_EXPONENT, "its delay or its exponent is out of range")
    _require(plan.lanes == (size if plan.form == phases.MATRIX else lanes), "its lanes are not those of its target")
    if plan.wide:
        weight = arrays["weight"]
        if plan.form == phases.MATRIX:
            _require(weight.shape == (positions, plan.slab) and plan.slab <= size, "its matrix has another size than its populations")
            return
        _require(weight.size >= (channels if plan.form == phases.DIAGONAL else channels * plan.slab), "its weights are too few")
        _check_patches(plan, arrays, places, lanes, size)
        return
    rows = arrays["rows"]
    _require(rows.dtype == np.uint8 and rows.ndim == 2 and rows.shape[1] == plan.row_bytes >= plan.lanes, "its rows are too short")
    _require(plan.targets * plan.lanes <= size, "it has more targets than its population")
    if plan.form == phases.MATRIX:
        _require(len(rows) >= positions, "its rows are too few")
        return
    begin, takes = arrays["take_begin"], arrays["takes"]
    _require(len(begin) == plan.targets + 1 and begin[0] == 0 and bool((np.diff(begin) >= 0).all()), "its lists of source places overlap")
    _require(begin[-1] <= len(takes), "its lists of source places are longer than what they hold")
    used = takes[: begin[-1]]
    _within(used[:, 0], 0, places, "a source place")
    _within(used[:, 1], 0, len(rows) - channels + 1, "a row of weights")


def check_products(
    plan: SynapsePlan, arrays: Mapping[str, Array], classes: Sequence[tuple[DenseClass, Mapping[str, Array]]], channels: int, size: int
) -> None:
    """The products of `plan`: weights, where source places lie in the image, and each class with its arrays."""
    _require(arrays["packed"].size == plan.slots * plan.quads * 4 * plan.lanes, "its products have too few weights")
    _within(arrays["image_place"], 0, plan.image_size - channels + 1, "a source place in the image")
    for one, own in classes:
        counted = len(own["base"]) == len(own["target"]) == one.targets and len(own["tap"]) == len(own["slot"]) == one.taps
        _require(counted and own["start"].size >= plan.lanes, "its products have too few windows")
        windows = own["base"].astype(np.int64)[:, None] + own["tap"].astype(np.int64)
        _within(windows, 0, plan.image_size - 4 * plan.quads + 1, "a window")
        _within(own["target"], 0, size - plan.lanes + 1, "a target")
        _within(own["slot"], 0, plan.slots, "a slot of the kernel")


def _check_patches(plan: SynapsePlan, arrays: Mapping[str, Array], places: int, lanes: int, size: int) -> None:
    begin, patches = arrays["begin"], arrays["patches"].astype(np.int64)
    _require(len(begin) == places + 1 and begin[0] == 0 and bool((np.diff(begin) >= 0).all()), "its lists of patches overlap")
    _require(begin[-1] <= len(patches), "its lists of patches are longer than what they hold")
    to, first, down, across = patches[: begin[-1]].T
    _within(down, 1, 2**31, "a patch's rows")
    _within(across, 1, 2**31, "a patch's length")
    _within(to, 0, size - ((down - 1) * plan.row_to + across * lanes) + 1, "a patch of targets")
    if plan.form == phases.WINDOW:
        _within(first, 0, plan.slab - ((down - 1) * plan.row_from + across * lanes) + 1, "a patch of weights")


def _within(found: Array, low: int, high: Array | int, what: str) -> None:
    """All of `found` from `low` to before `high`."""
    _require(bool(((found >= low) & (found < high)).all()), f"{what} lies outside")


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise ToolchainError(
            f"a connection of the compiled simulator is malformed: {fault}; this is a fault of the toolchain, please report it"
        )
