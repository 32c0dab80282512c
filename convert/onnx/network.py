"""Reads any ONNX file as a plain network, up to the layer whose output is the features."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, version_converter

from convert.onnx.editor import rewrite, set_nodes
from convert.onnx.file import Runner, damaged, load, widen
from convert.onnx.fold import fold, fold_constants, free_batch, remove_identities, resolve_cast_likes
from convert.onnx.opsets import DOWN, OLD
from convert.onnx.rewrite import PLAIN, set_squeezed_axes
from convert.plain.features import Role, Step, choose_features, downstream
from convert.plain.network import INPUT, IR_VERSION, OPSET, PLAIN_OPERATORS, Asked, Contract, Network
from convert.plain.shapes import check_work, free_names, has_channels_last, rename, upstream, value_shapes
from facecls.errors import UserError

_CONVENTIONS = (
    "--channels rgb --mean 127.5 --std 127.5 for ArcFace and most of InsightFace; --channels bgr --mean "
    "91.4953,103.8827,131.0912 --std 1 for VGGFace2; --channels rgb --mean 123.675,116.28,103.53 --std "
    "58.395,57.12,57.375 for ImageNet"
)
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("Conv", "Gemm", "MatMul"), "weighted"),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Sigmoid"), "probability"),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), "reshape"),
    **dict.fromkeys(("Identity", "Dropout", "Cast"), "identity"),
}
_HALF_PIXEL_SINCE = 11
"""The opset since which ``Resize`` says how it aligns pixels."""
_REFUSED_ABOVE = 21
"""The newest opset whose changes are known here."""


def read_onnx(path: Path, asked: Asked) -> Network:
    """Reads a network from an ONNX file.

    Args:
        path: The file; its weights may be in files beside it.
        asked: What the user says about it; at least how images are prepared, which no ONNX file says.

    Returns:
        The network.

    Raises:
        UserError: If the file can't be read, how it takes images is not known, or it is not plain up to the features.
    """
    if asked.keep_classifier:
        raise UserError("Expected a Keras file with --keep-classifier; of an ONNX file only the features are kept.")
    return read_model(path, *load(path), asked)


def read_model(path: Path, model: onnx.ModelProto, sha256: str, asked: Asked) -> Network:
    """Makes a network of a model, which it changes; as ``read_onnx``.

    Args:
        path: The file that it comes from, for messages.
        model: The model, with all its weights.
        sha256: SHA-256 of the file.
        asked: As for ``read_onnx``.

    Returns:
        The network.

    Raises:
        UserError: As ``read_onnx``.
    """
    opset = _opset(path, model)
    summary = {
        "kind": f"ONNX, opset {opset}" + (f", made by {model.producer_name[:40]}" if model.producer_name else ""),
        "size": f"{len(model.graph.node):,} nodes, {len(model.graph.initializer):,} constants",
    }
    if widened := widen(model):
        summary["precision"] = f"{', '.join(widened)}, computed in float32 here"
    constants = {tensor.name for tensor in model.graph.initializer}
    constants.update(node.output[0] for node in model.graph.node if node.op_type == "Constant" and node.output)
    steps = _steps(path, model, constants)
    ends = [output.name for output in model.graph.output]
    features = choose_features(path, steps, ends, _value_of(model, asked.output))
    image = _image(path, model, features)
    shape, batch, size = _image_shape(path, image, asked.size)
    contract = _contract(path, size, asked)
    is_last = shape[0] != 3
    left_out = tuple(name for name in downstream(steps, features) if name not in constants)
    _keep_upstream(model, features)
    _refuse(path, model)
    original = Runner(model)
    plain = _plain(path, model, features, image.name, shape, batch, opset)
    return Network(
        model=plain,
        contract=contract,
        source=path,
        sha256=sha256,
        layout="graph",
        features=features,
        left_out=left_out,
        summary=summary,
        reference=_reference(
            original, image.name, is_last, batch, has_channels_last(plain.graph, plain.graph.output[0].name)
        ),
    )


def _opset(path: Path, model: onnx.ModelProto) -> int:
    versions = [each.version for each in model.opset_import if each.domain in ("", "ai.onnx")]
    if not versions:
        raise damaged(path, "it does not say which opset it has")
    if not 1 <= versions[0] <= _REFUSED_ABOVE:
        raise UserError(
            f"Expected opset 1 to {_REFUSED_ABOVE}, but {path} has {versions[0]}; export it with an older one."
        )
    return int(versions[0])


def _steps(path: Path, model: onnx.ModelProto, constants: set[str]) -> list[Step]:
    """The nodes as steps, one for each output; a bias that is added to a product is part of its layer."""
    graph = model.graph
    steps = [Step(value.name, (), "input") for value in graph.input if value.name not in constants]
    known = {step.name: step for step in steps}
    for node in graph.node:
        inputs = [name for name in node.input if name and name not in constants]
        if not node.output or not node.output[0]:
            raise damaged(path, f"a node {node.op_type} has no output")
        if missing := [name for name in inputs if name not in known]:
            raise damaged(path, f"{node.output[0]} reads {missing[0]}, which is not there")
        role = _ROLES.get(node.op_type, "other")
        if node.op_type == "Add" and len(inputs) == 1 and known[inputs[0]].role == "weighted":
            role, inputs = "weighted", list(known[inputs[0]].inputs)
        for output in node.output:
            if output and output not in constants:
                if output in known:
                    raise damaged(path, f"{output} is computed twice")
                known[output] = Step(output, tuple(inputs), role)
                steps.append(known[output])
    if missing := [value.name for value in graph.output if value.name not in known]:
        raise damaged(path, f"its output {missing[0]} is not there")
    if not graph.output:
        raise damaged(path, "it has no output")
    return steps


def _value_of(model: onnx.ModelProto, asked: str | None) -> str | None:
    """The value that the user named, directly or by its node."""
    by_node = {node.name: node.output[0] for node in model.graph.node if node.name and node.output}
    values = {name for node in model.graph.node for name in node.output}
    return by_node.get(asked, asked) if asked is not None and asked not in values else asked


def _image(path: Path, model: onnx.ModelProto, features: str) -> onnx.ValueInfoProto:
    """The one input that the features need."""
    read = {name for node in upstream(model.graph, features) for name in node.input}
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs: list[onnx.ValueInfoProto] = [each for each in model.graph.input if each.name in read - constants]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise UserError(f"Expected features of one image, but {features} in {path} needs the inputs {names}.")
    kind = inputs[0].type.tensor_type.elem_type
    if kind != TensorProto.FLOAT:
        known = {number: name for name, number in TensorProto.DataType.items()}
        raise UserError(
            f"Expected an input of floats, but {inputs[0].name} in {path} takes {known.get(kind, f'type {kind}')}; "
            "export the network without its preprocessing."
        )
    return inputs[0]


def _image_shape(path: Path, image: onnx.ValueInfoProto, asked: int | None) -> tuple[tuple[int, ...], int, int]:
    """The shape of an image, the fixed batch or 0, and the size."""
    sizes = [dimension.dim_value for dimension in image.type.tensor_type.shape.dim]  # 0 for those left free
    if len(sizes) != 4 or (3 not in (sizes[1], sizes[3]) and any(sizes[1:])):
        raise UserError(
            f"Expected an input (N, 3, H, W) or (N, H, W, 3), but {image.name} in {path} has the shape {sizes}."
        )
    is_last = sizes[3] == 3 and sizes[1] != 3
    height, width = sizes[1:3] if is_last else sizes[2:]
    own = {size for size in (height, width) if size > 0}
    if len(own) > 1:
        raise UserError(f"Expected square images, but {path} takes {height} x {width}; no such network can be a trunk.")
    size = asked or next(iter(own), None)
    if size is None:
        raise UserError(f"{path} does not say how large its images are; give --size as the network was trained.")
    if own and own != {size}:
        raise UserError(f"Expected --size {next(iter(own))}, the only one that {path} takes, but got {size}.")
    return ((size, size, 3) if is_last else (3, size, size)), max(sizes[0], 0), size


def _contract(path: Path, size: int, asked: Asked) -> Contract:
    if asked.channels is None or asked.mean is None or asked.std is None:
        missing = [f"--{name}" for name in ("channels", "mean", "std") if getattr(asked, name) is None]
        raise UserError(
            f"{path} does not say how its images are prepared; give {', '.join(missing)} as the network was trained; "
            f"usual are {_CONVENTIONS}."
        )
    return Contract(size, asked.channels, asked.mean, asked.std)


def _reference(
    original: Runner, name: str, is_last: bool, batch: int, map_is_last: bool
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Computes features by the file itself, pooled and flattened as ``finish`` does it."""

    def compute(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        inputs = inputs.transpose(0, 2, 3, 1) if is_last else inputs
        parts = [inputs] if not batch else [np.repeat(each[None], batch, 0) for each in inputs]
        found = [original.run(name, np.ascontiguousarray(part))[0] for part in parts]
        values = found[0] if not batch else np.concatenate([each[:1] for each in found])
        values = values.mean((1, 2) if map_is_last else (2, 3)) if values.ndim == 4 else values
        return values.reshape(len(inputs), -1).astype(np.float32)

    return compute


def _plain(
    path: Path, model: onnx.ModelProto, features: str, image: str, shape: tuple[int, ...], batch: int, opset: int
) -> onnx.ModelProto:
    """The part of a model that computes the features, in the form of a plain model."""
    try:
        resolve_cast_likes(model)
        if opset < OPSET:
            if opset < _HALF_PIXEL_SINCE:
                rewrite(model.graph, OLD, {})
            model = version_converter.convert_version(model, OPSET)
        else:
            remove_identities(model.graph)
            fold_constants(model)  # axes may be computed
            rewrite(model.graph, DOWN, {})
        del model.opset_import[:]
        model.opset_import.add(domain="", version=OPSET)
        model.ir_version = IR_VERSION
        del model.graph.value_info[:]
        remove_identities(model.graph)
        _set_input(model, image, shape)
        fold_constants(model)
        free_batch(model.graph, batch)
        fold(model, shape)
        remove_identities(model.graph, with_casts=True)
        _keep_upstream(model, model.graph.output[0].name)
        _refuse_rest(path, model, PLAIN_OPERATORS | PLAIN.keys())
        _channels_first(model, shape)
        set_squeezed_axes(model)
        rewrite(model.graph, PLAIN, value_shapes(model))
        features = model.graph.output[0].name
        _keep_upstream(model, features)
        _name_nodes(model.graph)
        shapes = value_shapes(model)
        check_work(model, shapes)
        _check_order(path, model, shapes[features])
        onnx.checker.check_model(_typed(model, shapes[features]))
    except UserError:
        raise
    except ValueError as error:  # of the rewrites
        raise UserError(f"Can't convert {path}: {error}; take a value before it by --output.") from None
    except Exception as error:  # of the version converter and of the checker
        raise damaged(path, error) from None
    _refuse_rest(path, model, PLAIN_OPERATORS)
    return model


def _check_order(path: Path, model: onnx.ModelProto, shape: tuple[int, ...]) -> None:
    """Refuses features whose channels seem to be last, though nothing puts them there."""
    value = model.graph.output[0].name
    if len(shape) == 3 and shape[0] == shape[1] != shape[2] and not has_channels_last(model.graph, value):
        raise UserError(
            f"Expected a map (N, C, H, W), but {value} in {path} has the shape (N, {', '.join(map(str, shape))}), as "
            "if its channels were last; name a value before it by --output."
        )


def _keep_upstream(model: onnx.ModelProto, value: str) -> None:
    """Drops what a value does not need."""
    graph = model.graph
    set_nodes(graph, upstream(graph, value))
    read = {name for node in graph.node for name in node.input} | {value}
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    inputs = [each for each in graph.input if each.name in read]
    for field, kept in ((graph.initializer, tensors), (graph.input, inputs)):
        copied: list[Any] = [type(each).FromString(each.SerializeToString()) for each in kept]
        del field[:]
        field.extend(copied)
    del graph.output[:]
    graph.output.append(helper.make_empty_tensor_value_info(value))


def _typed(model: onnx.ModelProto, shape: tuple[int, ...]) -> onnx.ModelProto:
    """The model, with the shape of its output."""
    del model.graph.output[1:]
    name = model.graph.output[0].name
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape]))
    return model


def _refuse(path: Path, model: onnx.ModelProto) -> None:
    """Refuses what is no plain arithmetic, before any library runs it."""
    graphs = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)  # of loops and conditions
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or any(each.type in graphs for each in node.attribute):
            raise _not_plain(path, node)


def _refuse_rest(path: Path, model: onnx.ModelProto, allowed: Collection[str]) -> None:
    for node in model.graph.node:
        if node.op_type not in allowed:
            raise _not_plain(path, node)


def _not_plain(path: Path, node: onnx.NodeProto) -> UserError:
    before = f"--output {node.input[0]}" if node.input and node.input[0] != INPUT else "--output"
    return UserError(
        f"Expected operators that a trunk can have, but {node.output[0]} in {path} is made by "
        f"{node.op_type}; take a value before it, such as {before}."
    )


def _set_input(model: onnx.ModelProto, image: str, shape: tuple[int, ...]) -> None:
    del model.graph.input[:]
    model.graph.input.append(helper.make_tensor_value_info(image, TensorProto.FLOAT, ["N", *shape]))


def _channels_first(model: onnx.ModelProto, shape: tuple[int, ...]) -> None:
    """Gives the input its plain name and order, in place."""
    graph = model.graph
    is_last = shape[0] != 3
    name = f"{INPUT}/channels_last" if is_last else INPUT
    free_names(graph, (INPUT, name))
    rename(graph, graph.input[0].name, name)
    if is_last:
        nodes = [helper.make_node("Transpose", [INPUT], [name], name, perm=[0, 2, 3, 1]), *graph.node]
        set_nodes(graph, nodes)
    size = max(shape)
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", 3, size, size]))


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Names each node after its output, which is unique."""
    for node in graph.node:
        node.name = node.output[0]
