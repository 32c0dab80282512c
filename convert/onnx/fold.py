"""Replaces what an ONNX graph computes from constants and shapes alone by constants, and makes its batch free.

Exporters write shapes as arithmetic. Instead of interpreting it, the model is run with two batch sizes: what stays the
same is a constant, and an entry of a shape that follows the batch is left to ``Reshape``, which can infer one.
"""

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from convert.onnx.editor import Editor, set_nodes, settings_of
from convert.onnx.file import Runner
from convert.plain.shapes import check_sizes
from facecls.errors import UserError

_BATCHES = (2, 3)
_IDENTITIES = ("Identity", "Dropout")


def remove_identities(graph: onnx.GraphProto, with_casts: bool = False) -> None:
    """Removes nodes that do nothing, and turns constant nodes to initializers, in place.

    Args:
        graph: The graph.
        with_casts: Whether a ``Cast`` to float32 does nothing, as where only such floats are left; before that, casts
            of integers are parts of shapes.
    """
    known = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in known]  # old files list weights among the inputs
    del graph.input[:]
    graph.input.extend(inputs)
    same: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = same.get(name, name)
        if node.op_type in _IDENTITIES or (with_casts and _is_cast_to_float(node)):
            same[node.output[0]] = node.input[0]
        elif node.op_type == "Constant":
            graph.initializer.append(_constant(node))
        else:
            kept.append(node)
    set_nodes(graph, kept)
    for output in graph.output:
        output.name = same.get(output.name, output.name)


def resolve_cast_likes(model: onnx.ModelProto) -> None:
    """Turns each ``CastLike`` to a ``Cast`` to the type that it means, in place.

    Args:
        model: The model.

    Raises:
        ValueError: If a type can't be inferred.
    """
    if not any(node.op_type == "CastLike" for node in model.graph.node):
        return
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}
    for node in model.graph.node:
        if node.op_type == "CastLike":
            if not types.get(node.input[1]):
                raise ValueError(f"the type of {node.output[0]} is not known")
            cast = helper.make_node("Cast", node.input[:1], node.output, node.name, to=types[node.input[1]])
            node.CopyFrom(cast)


def _is_cast_to_float(node: onnx.NodeProto) -> bool:
    return node.op_type == "Cast" and settings_of(node).get("to") == TensorProto.FLOAT


def _constant(node: onnx.NodeProto) -> onnx.TensorProto:
    (attribute,) = node.attribute
    value = helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        tensor = onnx.TensorProto()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
        return tensor
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    return numpy_helper.from_array(np.array(value, kinds[attribute.name]), node.output[0])


def fold_constants(model: onnx.ModelProto) -> None:
    """Replaces what is computed from constants alone by its value, in place.

    Args:
        model: The model.

    Raises:
        UserError: If ONNX Runtime can't compute it.
    """
    graph = model.graph
    known = {tensor.name for tensor in graph.initializer}
    computed, rest = list[onnx.NodeProto](), list[onnx.NodeProto]()
    for node in graph.node:
        if all(name in known for name in node.input if name):
            computed.append(node)
            known.update(node.output)
        else:
            rest.append(node)
    wanted = sorted(
        {name for node in rest for name in node.input} & {name for node in computed for name in node.output}
    )
    if not computed:
        return
    twin = onnx.ModelProto(ir_version=model.ir_version)
    twin.opset_import.extend(model.opset_import)
    twin.graph.name = "constants"
    twin.graph.node.extend(computed)
    read = {name for node in computed for name in node.input}
    twin.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in read)
    twin.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
    check_sizes(twin)
    values = Runner(twin).session.run(None, {}) if wanted else []
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in zip(wanted, values, strict=True))
    set_nodes(graph, rest)


def free_batch(graph: onnx.GraphProto, batch: int) -> None:
    """Makes constants that hold a fixed batch follow the batch, in place: shapes, and values joined to each image's."""
    editor = Editor(graph)
    fixed = {name for name, tensor in editor.constants.items() if list(tensor.dims)[:1] == [batch]}
    for node in graph.node:
        if node.op_type != "Reshape":
            continue
        del node.attribute[:]  # allowzero, which would make an empty tensor of a zero
        shape = editor.array(node.input[1]) if node.input[1] in editor.constants else np.zeros(0)
        if len(shape) > 1 and shape[0] == batch:
            node.input[1] = editor.add(node.output[0], _inferring(shape[1:].tolist()))
    if batch != 1:
        return
    nodes = []
    for node in graph.node:
        if node.op_type == "Concat" and any(name not in editor.constants for name in node.input):
            for place, name in enumerate(node.input):
                if name in fixed:
                    made, node.input[place] = _for_each_image(editor, graph.input[0].name, editor.array(name), name)
                    nodes += made
        nodes.append(node)
    set_nodes(graph, nodes)


def fold(model: onnx.ModelProto, image_shape: tuple[int, ...]) -> None:
    """Replaces what follows from constants and shapes, in place.

    Args:
        model: The model, with a free batch.
        image_shape: Shape of an image as its input takes it.

    Raises:
        UserError: If ONNX Runtime can't run it, or something else than shapes depends on the batch.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    from_shapes = _computed_from_shapes(graph, constants)
    wanted = sorted(
        {name for node in graph.node if node.output[0] not in from_shapes for name in node.input if name in from_shapes}
    )
    if not wanted:
        return
    measured = _measure(model, wanted, image_shape)
    editor = Editor(graph)
    for name, (two, three) in measured.items():
        if two.shape == three.shape and np.array_equal(two, three):
            graph.initializer.append(numpy_helper.from_array(two, name))
            editor.constants[name] = graph.initializer[-1]
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.output[0] in from_shapes:
            continue
        for place, name in enumerate(node.input):
            if name in measured and name not in editor.constants:
                made, node.input[place] = _follow_batch(editor, graph, node, place, measured[name])
                nodes += made
        nodes.append(node)
    set_nodes(graph, nodes)


def _computed_from_shapes(graph: onnx.GraphProto, constants: set[str]) -> set[str]:
    found: set[str] = set()
    for node in graph.node:
        inputs = [name for name in node.input if name]
        if node.op_type in ("Shape", "Size") or all(name in found or name in constants for name in inputs):
            found.update(node.output)
    return found


def _measure(
    model: onnx.ModelProto, wanted: list[str], image_shape: tuple[int, ...]
) -> Mapping[str, tuple[NDArray[np.generic], NDArray[np.generic]]]:
    """The values of some names for each of two batch sizes."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    del twin.graph.output[:]
    twin.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
    check_sizes(twin)
    runner = Runner(twin)
    rng = np.random.default_rng(0)
    name = model.graph.input[0].name
    two, three = (runner.run(name, rng.standard_normal((batch, *image_shape)).astype(np.float32)) for batch in _BATCHES)
    return dict(zip(wanted, zip(two, three, strict=True), strict=True))


def _follow_batch(
    editor: Editor,
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    place: int,
    values: tuple[NDArray[np.generic], NDArray[np.generic]],
) -> tuple[list[onnx.NodeProto], str]:
    """What an input becomes whose value depends on the batch: nodes to add before, and its name."""
    two, three = values
    name = node.input[place]
    if two.shape == three.shape and two.ndim == 1 and place == 1:
        changing = np.flatnonzero(two != three).tolist()
        if node.op_type == "Reshape" and changing == [0] and 3 * two[0] == 2 * three[0]:
            return [], editor.add(name, _inferring(two[1:].tolist()))
        if node.op_type == "Reshape" and len(changing) == 1 and -1 not in two:
            return [], editor.add(name, np.where(two == three, two, -1))
        if node.op_type == "Expand" and changing == [0] and (two[0], three[0]) == _BATCHES:
            return [], editor.add(name, np.array([1, *two[1:]], np.int64))  # what is expanded has the batch already
    if two.ndim == three.ndim > 0 and (len(two), len(three)) == _BATCHES and two.dtype == np.float32:
        row = two[:1]
        if np.array_equal(two, np.repeat(row, 2, 0)) and np.array_equal(three, np.repeat(row, 3, 0)):
            return _for_each_image(editor, graph.input[0].name, row, name)
    raise UserError(
        f"Expected only shapes to depend on how many images are in a batch, but {name} does, which {node.output[0]} "
        "reads; export the network with a free batch, or name a layer before it by --output."
    )


def _inferring(rest: list[int]) -> NDArray[np.int64]:
    """A shape for ``Reshape`` that begins with the batch, or a multiple of it."""
    return np.array([0 if -1 in rest else -1, *rest], np.int64)  # 0 is the input's, and only one can be inferred


def _for_each_image(
    editor: Editor, image: str, value: NDArray[np.generic], name: str
) -> tuple[list[onnx.NodeProto], str]:
    """A constant (1, ...) repeated for each image of the batch: it is added to zeros that are made of the images."""
    output = editor.unused(f"{name}/each")
    zero = editor.add(name, np.float32(0))
    shape = editor.add(name, np.array([0] + [1] * (value.ndim - 1), np.int64))
    nodes = editor.chain(
        image,
        output,
        ("ReduceMean", [], {"axes": [1, 2, 3], "keepdims": 1}),
        ("Mul", [zero], {}),
        ("Reshape", [shape], {}),
        ("Add", [editor.add(name, value)], {}),
    )
    return nodes, output
