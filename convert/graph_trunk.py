"""Converts a plain ONNX model to a graph trunk: the description of its nodes, and tensors with torch's names.

Nodes keep their ONNX operators (facecls/model/graph_operators.py runs them); constants become settings, or tensors of
the node that learns them.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import defs, helper, numpy_helper
from torch import Tensor, nn

from convert.finish import FEATURES, Map
from convert.plain.network import INPUT, OPSET, Contract
from convert.plain.shapes import Shapes, upstream
from facecls.errors import UserError
from facecls.model.graph import GraphNet
from facecls.model.graph_operators import create_operator, is_known

_LEARNED = {
    "Conv": {"W": "weight", "B": "bias"},
    "Gemm": {"B": "weight", "C": "bias"},
    "MatMul": {"B": "weight"},
    "PRelu": {"slope": "weight"},
    "BatchNormalization": {
        "scale": "weight",
        "B": "bias",
        "input_mean": "running_mean",
        "input_var": "running_var",
    },
    "LayerNormalization": {"Scale": "weight", "B": "bias"},
    "InstanceNormalization": {"scale": "weight", "B": "bias"},
}
"""By operator: the formal names of its weights in ONNX, and their names in torch."""
_NUMBERS = ("min", "max", "constant_value")
"""Formal names of single floats that are settings."""
_SETTINGS = {"Clip": _NUMBERS, "Pad": _NUMBERS, "Resize": ("scales",)}
"""By operator: constants of floats that are settings; constants of integers always are."""
_NEAR_ONE = 1e-6

Constants = Mapping[str, NDArray[Any]]


class _Description:
    """The description under construction.

    Args:
        constants: All initializers by name.
        shapes: The shapes of all values.
        nodes: All nodes.
    """

    def __init__(self, constants: Constants, shapes: Shapes, nodes: Sequence[onnx.NodeProto]) -> None:
        self.constants = constants
        self.biases = _biases(nodes, constants)
        self.taken = set(dir(nn.Module()))  # names that torch can't use for a module
        self.shapes = shapes
        self.names: dict[str, str] = {INPUT: INPUT}
        self.nodes: list[dict[str, Any]] = []
        self.state: dict[str, Tensor] = {}

    def add(self, node: onnx.NodeProto) -> None:
        """Adds a node, whose inputs must have been added before."""
        kind, settings = node.op_type, _attributes(node)
        if node.output[0] in self.names:  # a sum that its product has taken over
            return
        tensors: dict[str, NDArray[Any]] = {}
        inputs: list[str] = []
        formal = [each.name for each in defs.get_schema(kind, OPSET).inputs]
        for place, value in enumerate(node.input):
            parameter = formal[min(place, len(formal) - 1)]  # the last one may be repeated
            if value not in self.constants:
                inputs += [self.names[value]] if value else []
            elif self._is_learned(node, parameter, value):
                tensors[_LEARNED[kind][parameter]] = self.constants[value]
            elif self.constants[value].dtype != np.float32 or parameter in _SETTINGS.get(kind, ()):
                constant = self.constants[value]
                settings[parameter] = constant.item() if parameter in _NUMBERS else constant.tolist()
            else:
                inputs.append(self._constant(value))
        if kind == "BatchNormalization":
            settings["rank"] = len(self.shapes[node.input[0]]) + 1
        if node.output[0] in self.biases:
            sum_, bias = self.biases[node.output[0]]
            self.names[sum_] = self._name(node.output[0])
            tensors["bias"] = self.constants[bias]
        self._append(node.output[0], *_to_torch(kind, settings, tensors, inputs))

    def _is_learned(self, node: onnx.NodeProto, parameter: str, value: str) -> bool:
        if parameter not in _LEARNED.get(node.op_type, {}):
            return False
        # a matrix on the right is a linear layer; other constants in MatMul are operands
        return node.op_type != "MatMul" or self.constants[value].ndim == 2

    def _append(
        self, value: str, kind: str, settings: dict[str, Any], tensors: Mapping[str, NDArray[Any]], inputs: list[str]
    ) -> None:
        name = self._name(value)
        try:
            if kind in _LEARNED and tensors and len(inputs) != 1:
                raise ValueError("a bias is computed" if inputs else "its input is constant")
            with torch.device("meta"):
                create_operator(kind, settings, {key: list(tensor.shape) for key, tensor in tensors.items()})
        except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
            raise UserError(
                f"Expected operators that a trunk can have, but {value} is made by {kind} in another way ({error}); "
                "name a layer before it by --output."
            ) from None
        entry: dict[str, Any] = {"name": name, "op": kind, "inputs": inputs}
        if settings:
            entry["settings"] = settings
        if tensors:
            entry["tensors"] = {key: list(tensor.shape) for key, tensor in tensors.items()}
        self.nodes.append(entry)
        self.state |= {f"nodes.{name}.{key}": torch.from_numpy(np.array(each)) for key, each in tensors.items()}
        if kind == "BatchNormalization":
            self.state[f"nodes.{name}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)

    def _constant(self, value: str) -> str:
        if value not in self.names:
            self._append(value, "Constant", {}, {"value": self.constants[value]}, [])
        return self.names[value]

    def _name(self, value: str) -> str:
        """A name for a value that torch can use for a module, and that no other has."""
        if value in self.names:
            return self.names[value]
        name = value.replace(".", "_")
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        self.names[value] = name
        return name


def _biases(nodes: Sequence[onnx.NodeProto], constants: Constants) -> dict[str, tuple[str, str]]:
    """By product of tokens with a layer's weight: the sum that alone reads it, and the bias that is added there.

    Exporters write a linear layer on tokens as two nodes; as one its bias is trained.
    """
    uses = Counter(name for node in nodes for name in node.input)
    layers = {node.output[0]: node.input[1] for node in nodes if node.op_type == "MatMul"}
    found: dict[str, tuple[str, str]] = {}
    for node in nodes:
        if node.op_type != "Add":
            continue
        for product, bias in (node.input, node.input[::-1]):
            weight, added = constants.get(layers.get(product, "")), constants.get(bias)
            if weight is None or added is None or uses[product] > 1:
                continue
            if weight.ndim == 2 and added.shape == weight.shape[1:]:
                found[product] = (node.output[0], bias)
    return found


def describe(
    model: onnx.ModelProto, shapes: Shapes, contract: Contract, found_map: Map | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Describes the part of a plain model that computes the features.

    Args:
        model: The model, finished.
        shapes: The shapes of all its values.
        contract: How it takes images.
        found_map: Its last map.

    Returns:
        The description, as facecls/model/graph.py explains it, and the tensors by their names in a ``GraphNet``.

    Raises:
        UserError: If there is an operator that a ``GraphNet`` does not have.
    """
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = upstream(model.graph, FEATURES)
    under_construction = _Description(constants, shapes, nodes)
    for node in nodes:
        if not is_known(node.op_type):
            raise UserError(
                f"Expected operators that a trunk can have, but {node.output[0]} is made by {node.op_type}; "
                "name a layer before it by --output."
            )
        under_construction.add(node)
    names = under_construction.names
    description = {
        "input": {
            "size": contract.size,
            "channels": contract.channels,
            "mean": list(contract.mean),
            "std": list(contract.std),
        },
        "nodes": under_construction.nodes,
        "map": found_map
        and {"name": names[found_map.name], "channels": found_map.channels, "prefix": found_map.prefix},
        "features": shapes[FEATURES][0],
        "any_size": True,
    }
    description["any_size"] = _takes_any_size(description, contract.size)
    # as it will be read
    read: dict[str, Any] = json.loads(json.dumps(description))
    return read, under_construction.state


def _takes_any_size(description: Mapping[str, Any], size: int) -> bool:
    """Whether the network gives features of the same length for images of other sizes."""
    with torch.device("meta"):
        net = GraphNet(description).eval()
        try:
            shapes = {tuple(net(torch.empty(2, 3, other, other)).shape) for other in (size, size + 32, 2 * size)}
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
    return len(shapes) == 1


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    values = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    return {
        name: value.decode() if isinstance(value, bytes) else list(value) if isinstance(value, list | tuple) else value
        for name, value in values.items()
    }


def _to_torch(
    kind: str, settings: dict[str, Any], tensors: dict[str, NDArray[Any]], inputs: list[str]
) -> tuple[str, dict[str, Any], dict[str, NDArray[Any]], list[str]]:
    """Brings weights to torch's layouts, and drops settings that their shapes say."""
    if "weight" in tensors and (kind == "MatMul" or (kind == "Gemm" and not settings.pop("transB", 0))):
        tensors["weight"] = tensors["weight"].T
    if kind == "PRelu":
        tensors["weight"] = tensors["weight"].reshape(-1)
    if kind == "BatchNormalization" and _has_no_statistics(settings, tensors):
        return "ScaleAndShift", {}, {name: tensors[name] for name in ("weight", "bias")}, inputs
    return kind, settings, tensors, inputs


def _has_no_statistics(settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> bool:
    """Whether a BatchNorm only scales and shifts, because its statistics were folded into weight and bias.

    Trained as a BatchNorm, it would normalise by the statistics of each batch, which its weights already do.
    """
    variance = tensors["running_var"] + settings.get("epsilon", 1e-5)
    return not tensors["running_mean"].any() and bool(np.abs(variance - 1).max() <= _NEAR_ONE)
