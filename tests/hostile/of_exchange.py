"""Hostile files of other libraries: NIR's HDF5 and ONNX's protocol buffers."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from of_artefacts import RUN_ME, Made

NOT_THERE = "/etc/passwd"


def hdf5(fill: Callable[[Any], object]) -> bytes:
    """An HDF5 file of the 1.10 format, without times."""
    import h5py

    stream = io.BytesIO()
    with h5py.File(stream, "w", libver=("v110", "v110"), meta_block_size=256) as file:
        fill(file)
    return stream.getvalue()


def network(file: Any) -> Any:
    """A whole NIR network: an input, weights, neurons, an output; the group of its nodes."""
    file["version"] = np.bytes_("1.0.7")
    graph = file.create_group("node")
    graph["type"] = np.bytes_("NIRGraph")
    graph["edges"] = np.array([[b"in", b"w"], [b"w", b"n"], [b"n", b"out"]], dtype="S4")
    nodes = graph.create_group("nodes")
    for name, values in {
        "in": {"type": "Input", "shape": np.array([4])},
        "w": {"type": "Linear", "weight": np.ones((3, 4), "<f4")},
        "n": {"type": "IF", "r": np.ones(3, "<f4"), "v_threshold": np.ones(3, "<f4")},
        "out": {"type": "Output", "shape": np.array([3])},
    }.items():
        node = nodes.create_group(name)
        for field, value in values.items():
            node[field] = np.bytes_(value) if isinstance(value, str) else value
    return nodes


def onnx_network(**changes: Any) -> Any:
    """A ReLU network of a matrix, a ReLU and a matrix, as a message to change."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Gemm", ["x", "a"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("Gemm", ["r", "b"], ["y"], name="second"),
    ]
    made = helper.make_graph(
        changes.get("nodes", nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [
            numpy_helper.from_array(changes.get("a", np.ones((4, 3), np.float32)), "a"),
            numpy_helper.from_array(np.ones((3, 2), np.float32), "b"),
        ],
    )
    model: onnx.ModelProto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="hand")
    return model


def files() -> Made:
    """Every file of another library."""
    yield from _nir()
    yield from _onnx()


def _nir() -> Made:
    import h5py

    good = hdf5(network)
    yield "text.nir", "text", b"node: !!python/object/apply:os.system ['touch canary']\n"
    yield "pickle.nir", "a pickle that runs a command", RUN_ME
    yield "empty.nir", "no byte at all", b""
    yield "cut.nir", "the first half of a good file", good[: len(good) // 2]
    yield "no-node.nir", "HDF5 of something else", hdf5(lambda file: file.create_group("model"))

    def changed(change: Callable[[Any], object]) -> bytes:
        return hdf5(lambda file: change(network(file)))

    def outside(nodes: Any) -> None:
        nodes["w"]["bias"] = h5py.ExternalLink(NOT_THERE, "/")

    def itself(nodes: Any) -> None:
        nodes["w"]["again"] = h5py.SoftLink("/node/nodes")

    def circle(nodes: Any) -> None:
        nodes["w"]["again"] = nodes

    def stored(nodes: Any) -> None:
        del nodes["w"]["weight"]
        nodes["w"].create_dataset("weight", (3, 4), "u1", external=[(NOT_THERE, 0, 12)])

    def virtual(nodes: Any) -> None:
        del nodes["w"]["weight"]
        layout = h5py.VirtualLayout((3, 4), "u1")
        layout[:] = h5py.VirtualSource(NOT_THERE, "data", (3, 4))
        nodes["w"].create_virtual_dataset("weight", layout)

    def huge(nodes: Any) -> None:
        del nodes["w"]["weight"]
        nodes["w"].create_dataset("weight", (2**25, 2**25), "<f4", chunks=(64, 64), compression="gzip")

    def filtered(nodes: Any) -> None:
        del nodes["w"]["weight"]
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((3, 4))
        plan.set_filter(32_000, h5py.h5z.FLAG_OPTIONAL, ())
        h5py.h5d.create(nodes["w"].id, b"weight", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((3, 4)), plan)

    def deep(nodes: Any) -> None:
        group = nodes
        for _ in range(20):
            group = group.create_group("g")

    def kind(name: str) -> Callable[[Any], None]:
        def change(nodes: Any) -> None:
            del nodes["n"]["type"]
            nodes["n"]["type"] = np.bytes_(name)

        return change

    def objects(nodes: Any) -> None:
        del nodes["w"]["weight"]
        nodes["w"]["weight"] = np.array([[nodes.ref]], dtype=h5py.ref_dtype)

    def value(node: str, field: str, found: Any) -> Callable[[Any], None]:
        def change(nodes: Any) -> None:
            del nodes[node][field]
            nodes[node][field] = found

        return change

    yield "link-outside.nir", "a link to a file of this machine", changed(outside)
    yield "link-to-itself.nir", "a soft link to a group around it", changed(itself)
    yield "circle.nir", "a group that holds itself", changed(circle)
    yield "stored-outside.nir", "values that are the bytes of a file of this machine", changed(stored)
    yield "virtual.nir", "values that are put together from another file", changed(virtual)
    yield "huge.nir", "4 PiB of fill values in a few bytes", changed(huge)
    yield "filter.nir", "values packed by a filter, which HDF5 would load as a plug-in", changed(filtered)
    yield "deep.nir", "groups 20 deep", changed(deep)
    yield "references.nir", "references where weights belong", changed(objects)
    yield "node-python.nir", "a node whose type is a function", changed(kind("os.system"))
    yield "node-class.nir", "a node whose type is a name of the library that is no node", changed(kind("NIRNode"))
    yield "node-escapes.nir", "a node whose type steers the terminal", changed(kind("\u001b[2JIF"))
    yield "weights-nan.nir", "weights that are NaN", changed(value("w", "weight", np.full((3, 4), np.nan, "<f4")))
    yield "weights-other-shape.nir", "weights for other neurons", changed(value("w", "weight", np.ones((7, 4), "<f4")))
    yield "threshold-0.nir", "neurons that fire for ever", changed(value("n", "v_threshold", np.zeros(3, "<f4")))
    yield "shape-negative.nir", "an input of -4", changed(value("in", "shape", np.array([-4])))


def _onnx() -> Made:
    from onnx import AttributeProto, TensorProto, helper

    good = onnx_network().SerializeToString(deterministic=True)
    yield "text.onnx", "text", b"import os; os.system('touch canary')\n"
    yield "pickle.onnx", "a pickle that runs a command", RUN_ME
    yield "empty.onnx", "no byte at all", b""
    yield "cut.onnx", "the first half of a good file", good[: len(good) // 2]
    for name, what, where in (
        ("data-absolute.onnx", "weights that lie in a file of this machine", NOT_THERE),
        ("data-outside.onnx", "weights that lie in a folder above", "../../../../etc/passwd"),
    ):
        model = onnx_network()
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=where)
        yield name, what, model.SerializeToString(deterministic=True)
    model = onnx_network()
    model.graph.initializer[0].dims[:] = (2**40, 2**40)
    yield "dims-2-to-80.onnx", "weights of 2^40 x 2^40", model.SerializeToString(deterministic=True)
    model = onnx_network()
    model.graph.initializer[0].dims[:] = (-4, 3)
    yield "dims-negative.onnx", "weights of -4 x 3", model.SerializeToString(deterministic=True)
    model = onnx_network()
    model.graph.initializer[0].data_type = 99
    yield "dtype-unknown.onnx", "weights of a type that nobody has", model.SerializeToString(deterministic=True)
    yield (
        "weights-nan.onnx",
        "weights that are NaN",
        onnx_network(a=np.full((4, 3), np.nan, np.float32)).SerializeToString(deterministic=True),
    )
    model = onnx_network()
    model.graph.node[0].input[0] = "r"
    yield "cyclic.onnx", "a node that takes what comes of it", model.SerializeToString(deterministic=True)
    model = onnx_network()
    model.graph.node[1].op_type, model.graph.node[1].domain = "system", "os"
    yield "operator-python.onnx", "an operator of nobody's", model.SerializeToString(deterministic=True)
    model = onnx_network()
    model.graph.node[1].op_type, model.graph.node[1].name = "Tanh", "\u001b]0;owned\u0007"
    yield "name-escapes.onnx", "a node whose name steers the terminal", model.SerializeToString(deterministic=True)
    model = onnx_network()
    inner = model.graph
    for _ in range(60):
        made = helper.make_node("If", ["c"], ["y"])
        attribute = AttributeProto(name="then_branch", type=AttributeProto.GRAPH)
        made.attribute.append(attribute)
        inner.node.append(made)
        inner = inner.node[-1].attribute[0].g
    yield "deep.onnx", "graphs within graphs, 60 deep", model.SerializeToString(deterministic=True)
    del model.graph.node[:]
    yield "no-nodes.onnx", "a graph of no nodes", model.SerializeToString(deterministic=True)
