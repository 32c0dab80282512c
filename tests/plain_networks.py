"""Plain ONNX networks for tests, built node by node with ``onnx.helper``."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from convert.finish import finish, last_map
from convert.graph_trunk import describe
from convert.plain.network import INPUT, IR_VERSION, OPSET, Contract, Network
from facecls.model.graph import GRAPH
from facecls.model.trunk import save_trunk

Node = tuple[str, list[str], dict[str, Any]]
"""Operator, its inputs, its attributes; its output is called after its place: ``n0``, ``n1``, ..."""


def build(nodes: list[Node], constants: dict[str, NDArray[Any]], size: int) -> onnx.ModelProto:
    """Builds a plain model; the outputs of its last node are the network's."""
    made = []
    for place, (kind, inputs, attributes) in enumerate(nodes):
        made.append(helper.make_node(kind, inputs, [f"n{place}"], f"n{place}", **attributes))
    image = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", 3, size, size])
    ends = [helper.make_empty_tensor_value_info(made[-1].output[0])]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(made, "plain", [image], ends, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def network_of(model: onnx.ModelProto, size: int, channels: Any = "bgr") -> Network:
    """What a reader would make of a plain model."""
    contract = Contract(size, channels, (90.0, 100.0, 110.0), (50.0, 60.0, 70.0))
    return Network(model, contract, Path("small.onnx"), "0" * 64, "graph", model.graph.output[0].name, (), {})


def small_network(size: int = 64, seed: int = 0) -> onnx.ModelProto:
    """A residual network with a depthwise convolution and PReLU: three layers, 16 features."""
    random = np.random.default_rng(seed)

    def weights(*shape: int) -> NDArray[Any]:
        scale = np.sqrt(2 / np.prod(shape[1:]))
        return (scale * random.standard_normal(shape)).astype(np.float32)

    def norm(name: str, channels: int) -> dict[str, NDArray[Any]]:
        uniform = random.uniform(0.5, 1.5, (2, channels)).astype(np.float32)
        normal = (0.2 * random.standard_normal((2, channels))).astype(np.float32)
        return {f"{name}_g": uniform[0], f"{name}_b": normal[0], f"{name}_m": normal[1], f"{name}_v": uniform[1]}

    def names(norm: str) -> list[str]:
        return [f"{norm}_{part}" for part in "gbmv"]

    constants = {
        "w0": weights(8, 3, 3, 3),
        **norm("b0", 8),
        "slope": np.full((8, 1, 1), 0.25, np.float32),
        "w1": weights(8, 1, 3, 3),
        "w2": weights(16, 8, 1, 1),
        **norm("b2", 16),
        "w3": weights(16, 16, 3, 3),
        "bias3": weights(16, 1)[:, 0],
    }
    nodes: list[Node] = [
        ("Conv", [INPUT, "w0"], {"strides": [2, 2], "pads": [0, 0, 1, 1]}),
        ("BatchNormalization", ["n0", *names("b0")], {"epsilon": 1e-3, "momentum": 0.99}),
        ("PRelu", ["n1", "slope"], {}),
        ("Conv", ["n2", "w1"], {"group": 8, "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("Conv", ["n3", "w2"], {}),
        ("BatchNormalization", ["n4", *names("b2")], {}),
        ("Relu", ["n5"], {}),
        ("Conv", ["n6", "w3", "bias3"], {"pads": [1, 1, 1, 1]}),
        ("Add", ["n7", "n6"], {}),
        ("Relu", ["n8"], {}),
        ("GlobalAveragePool", ["n9"], {}),
    ]
    return build(nodes, constants, size)


def write_trunk(dest: Path, model: onnx.ModelProto, size: int) -> Path:
    """Writes a plain model as a trunk file."""
    network = network_of(model, size)
    shapes = finish(network)
    description, state = describe(network.model, shapes, network.contract, last_map(network.model, shapes))
    save_trunk(dest, state, {"architecture": GRAPH, "input": description["input"], GRAPH: description})
    return dest


def write_small_trunk(dest: Path, size: int = 64, seed: int = 0) -> Path:
    """Writes ``small_network`` as a trunk file."""
    return write_trunk(dest, small_network(size, seed), size)


def write_folded_trunk(dest: Path, size: int = 64) -> Path:
    """Writes ``small_network`` with BatchNorms that were folded into scale and shift as a trunk file."""
    model = small_network(size)
    for tensor in model.graph.initializer:
        if tensor.name in ("b0_m", "b2_m", "b0_v", "b2_v"):
            value = np.full(tensor.dims, tensor.name.endswith("v"), np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("epsilon", 0.0))
    return write_trunk(dest, model, size)
