"""Shapes and order of the values of a plain ONNX model."""

import math

import onnx
from onnx import TensorProto, helper

from convert.plain.network import check_size
from facecls.errors import UserError

Shapes = dict[str, tuple[int, ...]]
"""By value: its shape without the batch."""


def value_shapes(model: onnx.ModelProto) -> Shapes:
    """Infers the shape of every value.

    Args:
        model: A plain model.

    Returns:
        Shapes by name, without the first dimension, which is usually the batch, and those of the weights in full; 0
        where a size is not known, since the batch is elsewhere.

    Raises:
        UserError: If one can't be inferred, or is too large.
    """
    graph = model.graph
    try:
        # without the weights, which are copied several times otherwise; integers are shapes and are needed
        inferred = onnx.shape_inference.infer_shapes(_without_weights(model), strict_mode=True, data_prop=True)
    except Exception as error:  # C++ code with exceptions of its own
        raise UserError(f"Expected a graph whose shapes fit together, but: {_first_line(error)}") from None
    shapes: Shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        dimensions = value.type.tensor_type.shape.dim
        if value.name not in shapes and value.type.tensor_type.HasField("shape"):
            shapes[value.name] = tuple(dimension.dim_value for dimension in dimensions[1:])
            check_size(f"the value {value.name}", [size or 1 for size in shapes[value.name]])
    if missing := [output for node in graph.node for output in node.output if output not in shapes]:
        raise UserError(
            f"Expected values of known shapes, but that of {missing[0]} is not known; use another --output."
        )
    return shapes


def upstream(graph: onnx.GraphProto, output: str) -> list[onnx.NodeProto]:
    """The nodes that compute a value, in their order."""
    wanted, nodes = {output}, []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            nodes.append(node)
    return nodes[::-1]


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    light = onnx.ModelProto()
    for field in ("ir_version", "producer_name"):
        setattr(light, field, getattr(model, field))
    light.opset_import.extend(model.opset_import)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    light.graph.output.extend(helper.make_empty_tensor_value_info(output.name) for output in model.graph.output)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and math.prod(tensor.dims) > 16:
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            light.graph.initializer.append(tensor)
    return light


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
