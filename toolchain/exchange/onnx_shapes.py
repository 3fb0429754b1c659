"""ONNX's operators that bring values into other shapes, and those with which exporters compute shapes: on small constants."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np

from toolchain.exchange.onnx_branches import Branch, Node, Reading, Value
from toolchain.ir import Array, Shape

SMALL = 4096
"""Constants that the file computes (shapes, axes) have fewer values than this; weights are written out."""


# shapes


def flattened(reading: Reading, node: Node) -> Value:
    branches = reading.data(node)
    axis = int(node.attributes.get("axis", 1))
    if axis not in (1, -len(branches[0].seen)):
        raise node.refused(f"flattens from axis {axis}: only flattening from the first axis behind the samples has a counterpart")
    return tuple(_row(branch) for branch in branches)


def _row(branch: Branch) -> Branch:
    return replace(branch, flat=len(branch.shape) > 1)


def reshaped(reading: Reading, node: Node) -> Value:
    found = reading.values.get(node.inputs[0])
    wanted = reading.numbers(node, "shape", 1)
    if wanted is None:
        raise node.refused("does not say which shape")
    if not isinstance(found, tuple):
        try:
            return np.asarray(reading.required(node, 0)).reshape([n or np.asarray(found).shape[i] for i, n in enumerate(wanted)])
        except (ValueError, IndexError):
            raise node.refused(f"brings a constant into the shape {wanted}, which it has not the values for") from None
    return _in_shape(reading, node, found, wanted)


def _in_shape(reading: Reading, node: Node, branches: tuple[Branch, ...], wanted: list[int]) -> Value:
    seen = branches[0].seen
    given = [seen[i - 1] if n == 0 and 0 < i <= len(seen) else n for i, n in enumerate(wanted)]
    if not given or given[0] not in (-1, 0, reading.samples or 1):
        raise node.refused(f"brings values of shape {seen} into {wanted}: keep the samples as the first axis")
    rest = given[1:]
    if rest.count(-1) == 1:
        known = prod(n for n in rest if n != -1)
        rest = [prod(seen) // known if n == -1 and known > 0 else n for n in rest]
    if not rest or min(rest) < 1 or prod(rest) != prod(seen):
        raise node.refused(f"brings values of shape {seen} into {wanted}, which has not as many")
    return _as(reading, node, branches, tuple(rest))


def _as(reading: Reading, node: Node, branches: tuple[Branch, ...], shape: Shape) -> Value:
    """The same values in another shape: rows of an image, its own shape again, or what the input is given as."""
    (first, *others) = branches
    if shape == first.seen:
        return branches
    if shape == (prod(first.shape),):
        return tuple(_row(branch) for branch in branches)
    if all(branch.shape == shape for branch in branches):
        return tuple(replace(branch, flat=False) for branch in branches)
    if not others and first.source is None and not first.steps and reading.shaped in (reading.input_shape, shape):
        reading.shaped = shape
        return (Branch(None, (), shape),)
    if tuple(n for n in shape if n != 1) == tuple(n for n in first.shape if n != 1) and len(shape) == 1:
        return tuple(_row(branch) for branch in branches)
    raise node.refused(
        f"brings values of shape {first.seen} into {shape}: only flattening, and a new shape of the input itself, have a counterpart"
    )


def squeezed(reading: Reading, node: Node) -> Value:
    found, axes = reading.values.get(node.inputs[0]), reading.numbers(node, "axes", 1)
    if not isinstance(found, tuple):
        values = reading.required(node, 0)
        try:
            if node.kind == "Squeeze":
                return np.squeeze(values, None if axes is None else tuple(axes))
            return np.expand_dims(values, tuple(axes or ()))
        except ValueError:
            raise node.refused(f"changes axes {axes} of a constant of shape {values.shape}, which has not these") from None
    shape = [0, *found[0].seen]
    if node.kind == "Squeeze":
        gone = [i for i, n in enumerate(shape) if n == 1] if axes is None else [axis % len(shape) for axis in axes]
        if any(shape[axis] != 1 for axis in gone):
            raise node.refused(f"leaves out axes {axes} of values of shape {found[0].seen}, which are longer than 1")
        kept = [n for i, n in enumerate(shape) if i not in gone]
    else:
        kept = list(shape)
        for axis in sorted(axis % (len(shape) + len(axes or ())) for axis in axes or ()):
            kept.insert(axis, 1)
    if not kept or kept[0] != 0:
        raise node.refused("moves the axis of the samples: keep it first")
    return _as(reading, node, found, tuple(kept[1:]) or (1,))


def same(reading: Reading, node: Node) -> Value:
    found = reading.values.get(node.inputs[0])
    if found is None:
        raise node.refused(f"reads '{node.inputs[0]}', which nothing makes")
    return found


# constants, and what exporters compute of shapes


def constant(reading: Reading, node: Node) -> Value:
    for name, value in node.attributes.items():
        if name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
            return np.asarray(value)
    raise node.refused("holds no number")


def shape_of(reading: Reading, node: Node) -> Value:
    found = reading.values.get(node.inputs[0])
    if found is None:
        raise node.refused("reads a value that nothing makes")
    whole = [reading.samples or 1, *found[0].seen] if isinstance(found, tuple) else list(found.shape)
    return np.asarray(whole[node.attributes.get("start", 0) : node.attributes.get("end", len(whole))], np.int64)


def gathered(reading: Reading, node: Node) -> Value:
    values, index = reading.required(node, 0), reading.required(node, 1)
    if values.size > SMALL or index.size > SMALL:
        raise node.refused(f"picks from a constant of more than {SMALL:,} values: export the network with its constants folded")
    try:
        return np.asarray(np.take(values, index, axis=int(node.attributes.get("axis", 0))))
    except (IndexError, ValueError):
        raise node.refused("picks what is not there") from None


def joined(reading: Reading, node: Node) -> Value:
    if any(isinstance(reading.values.get(name), tuple) for name in node.inputs):
        raise node.refused("puts values of the network side by side: only sums have a counterpart")
    try:
        return _small(
            node, np.concatenate([reading.required(node, i) for i in range(len(node.inputs))], axis=int(node.attributes.get("axis", 0)))
        )
    except ValueError:
        raise node.refused("joins constants whose shapes do not meet") from None


def sliced(reading: Reading, node: Node) -> Value:
    values = reading.required(node, 0)
    starts, ends = (reading.numbers(node, name, i) or [] for i, name in ((1, "starts"), (2, "ends")))
    axes, steps = reading.numbers(node, "axes", 3), reading.numbers(node, "steps", 4)
    if values.ndim != 1 or len(starts) != 1 or len(ends) != 1 or axes not in (None, [0], [-1]):
        raise node.refused("cuts something other than a list of numbers")
    step = (steps or [1])[0]
    if step == 0:
        raise node.refused("cuts in steps of 0")
    return values[starts[0] : ends[0] : step]


def cast(reading: Reading, node: Node) -> Value:
    from onnx import helper

    found = same(reading, node)
    if isinstance(found, tuple):
        if int(node.attributes.get("to", 0)) not in (1, 11):
            raise node.refused("makes other numbers of the network's values than float32 or float64")
        return found
    return _small(node, found).astype(helper.tensor_dtype_to_np_dtype(int(node.attributes["to"])))


def transposed(reading: Reading, node: Node) -> Value:
    found, axes = same(reading, node), node.attributes.get("perm")
    if not isinstance(found, tuple):
        if axes is not None and sorted(axes) != list(range(found.ndim)):
            raise node.refused(f"orders the axes {axes} of a constant of shape {found.shape}")
        return np.transpose(found, axes)
    if axes is not None and list(axes) == list(range(len(found[0].seen) + 1)):
        return found
    raise node.refused("orders the axes of the network's values anew: export the network with channels first")


def computed(node: Node, first: Array, second: Array) -> Array:
    """Arithmetic on small constants, such as shapes."""
    if max(first.size, second.size) > SMALL:
        raise node.refused(f"computes a constant of more than {SMALL:,} values: export the network with its constants folded")
    by: dict[str, np.ufunc] = {
        "Add": np.add,
        "Sub": np.subtract,
        "Mul": np.multiply,
        "Div": np.floor_divide if first.dtype.kind == "i" else np.divide,
    }
    try:
        with np.errstate(all="ignore"):
            return _small(node, by[node.kind](first, second))
    except ValueError:
        raise node.refused(f"joins constants of shape {first.shape} and {second.shape}") from None


def _small(node: Node, values: Array) -> Array:
    if values.size > SMALL:
        raise node.refused(f"computes a constant of more than {SMALL:,} values: export the network with its constants folded")
    return values
