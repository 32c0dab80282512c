"""Shapes and order of the values of a plain ONNX model."""

import math
from collections.abc import Iterable

import onnx
from onnx import TensorProto, helper

from convert.plain.network import MAX_WORK, check_size
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


def check_sizes(model: onnx.ModelProto) -> None:
    """Refuses a model that computes a value too large to be one of a network, as far as its shapes can be inferred.

    Args:
        model: Any ONNX model.

    Raises:
        UserError: If a value is larger than ``MAX_ELEMENTS``.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(_without_weights(model), data_prop=True)
    except Exception as error:  # C++ code with exceptions of its own
        raise UserError(f"Expected a graph whose shapes fit together, but: {_first_line(error)}") from None
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        sizes = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        check_size(f"the value {value.name}", [size for size in sizes if size > 0])


def upstream(graph: onnx.GraphProto, output: str) -> list[onnx.NodeProto]:
    """The nodes that compute a value, in their order."""
    wanted, nodes = {output}, []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            nodes.append(node)
    return nodes[::-1]


def rename(graph: onnx.GraphProto, value: str, name: str) -> None:
    """Renames a value everywhere, in place."""
    for node in graph.node:
        for names in (node.input, node.output):
            for place, each in enumerate(names):
                if each == value:
                    names[place] = name
    for tensor in (*graph.initializer, *graph.input, *graph.output):
        if tensor.name == value:
            tensor.name = name


def free_names(graph: onnx.GraphProto, names: Iterable[str]) -> None:
    """Renames values that have names which others get, in place."""
    for name in names:
        if name in value_names(graph):
            rename(graph, name, unused(graph, f"{name}_inside"))


def unused(graph: onnx.GraphProto, name: str) -> str:
    """The name, with as many underscores after it as no value of the graph has."""
    taken = value_names(graph)
    while name in taken:
        name += "_"
    return name


def value_names(graph: onnx.GraphProto) -> set[str]:
    """The names of all values: inputs, constants and what nodes compute."""
    given = {value.name for value in (*graph.initializer, *graph.input)}
    return given.union(*(node.output for node in graph.node))


def has_channels_last(graph: onnx.GraphProto, value: str) -> bool:
    """Whether a map (N, H, W, C) is turned to Keras' order of axes, and since then only computed value by value."""
    by_output = {output: node for node in graph.node for output in node.output}
    while value in by_output:
        node = by_output[value]
        if node.op_type == "Transpose":
            perms: list[list[int]] = [list(each.ints) for each in node.attribute if each.name == "perm"]
            return perms == [[0, 2, 3, 1]]
        made = [name for name in node.input if name in by_output]
        if node.op_type not in _BY_VALUE or not made:
            return False
        value = made[0]
    return False


_BY_VALUE = frozenset(
    (
        *("Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh"),
        *("Softplus", "Softsign", "Erf", "Exp", "Log", "Sqrt", "Abs", "Neg", "Pow", "Add", "Sub", "Mul", "Div", "Min"),
        "Max",
    )
)
"""Operators that leave the order of axes."""


def check_work(model: onnx.ModelProto, shapes: Shapes) -> None:
    """Refuses a network that would compute for hours, or fill the memory.

    Args:
        model: A plain model.
        shapes: The shapes of all its values.

    Raises:
        UserError: If it multiplies more than ``MAX_WORK`` times for an image.
    """
    constants = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    work = 0
    for node in model.graph.node:
        weights = [constants[name] for name in node.input if name in constants]
        each = max((math.prod(dims[1:]) for dims in weights if len(dims) > 1), default=1)
        work += sum(math.prod(shapes[output]) for output in node.output) * each
    if work > MAX_WORK:
        raise UserError(f"Expected a network that multiplies at most {MAX_WORK:,} times for an image, not {work:,}.")


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
