"""Reads a network that Keras saved: a whole model of any plain layers, or the weights of one of keras-vggface's."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from convert.keras.choice import Classifier, features_step, find_classifier, left_out, upstream
from convert.keras.emit import emit, steps
from convert.keras.graph import INPUT_KIND, Graph, Layer, parse_graph
from convert.keras.h5 import KerasFile, open_keras
from convert.keras.known import SIZE, Found, Trunk, blank, find_known, graph_of_weights
from convert.keras.layout import CLASSIFIER
from convert.keras.nodes import Arrays, Maker, Nodes, Shape
from convert.plain.network import INPUT, IR_VERSION, OPSET, Asked, Contract, Network
from facecls.errors import UserError

_CONVENTIONS = (
    "--channels rgb --mean 127.5 --std 127.5 for MobileNet, Inception, Xception and NASNet; --channels rgb --mean 0 "
    "--std 1 for EfficientNet; --channels bgr --mean 103.939,116.779,123.68 --std 1 for VGG and ResNet; --channels rgb "
    "--mean 123.675,116.28,103.53 --std 58.395,57.12,57.375 for DenseNet"
)
"""``preprocess_input`` of Keras' own networks (keras ``applications/imagenet_utils.py``)."""


def read_keras(path: Path, asked: Asked) -> Network:
    """Reads a network from a Keras file.

    Args:
        path: A whole model, ``.h5`` or ``.keras``, or weights of a network of keras-vggface, ``.h5``.
        asked: What the user says about it.

    Returns:
        The network; its model and weights are in memory.

    Raises:
        UserError: If the file is damaged, its network is not known or not plain, or how it takes images is not known.
    """
    with open_keras(path) as file:
        if file.config is None:
            graph, unknown = graph_of_weights(file, asked.size or SIZE)
        else:
            graph, unknown = parse_graph(path, file.config), ()
        own_size = _own_size(graph)
        inputs = _input_shapes(path, graph, asked.size or own_size or SIZE, asked.size is not None)
        # the shapes and the structure of everything, before any weight is read
        sketch = _nodes(file, graph)
        values = emit(path, graph.layers, inputs, sketch)
        found = find_known(file, graph, values, asked.size or own_size or SIZE)
        graph_steps = steps(graph.layers)
        features = features_step(path, graph, graph_steps, values, found, asked.output)
        contract = _contract(path, found, own_size, asked)
        classifier = find_classifier(path, graph, graph_steps, values, features) if asked.keep_classifier else None
        is_known_trunk = (
            found is not None
            and not (asked.output or asked.also)
            and contract == replace(found.known.contract, size=contract.size)
        )
        layout: Trunk = found.known.trunk if found and is_known_trunk else "graph"
        names: dict[str, str] = {}
        if found and layout != "graph":  # whose tensors are found by their names
            names = {
                name: found.names[structure] for structure, name in sketch.weighted.items() if structure in found.names
            }
            names |= {classifier.dense: CLASSIFIER} if classifier else {}
        ends = [features, *([classifier.end] if classifier else [])]
        nodes = _nodes(file, graph, names, read=True)
        try:
            model, kernel = _build(path, graph, inputs, nodes, ends, classifier)
        except UserError as error:
            if asked.size in (None, own_size) or own_size is None:
                raise
            raise UserError(
                f"Expected a network that can take images of --size {asked.size}, but {path} was made for {own_size} "
                f"and says: {error}"
            ) from None
        return Network(
            model,
            contract,
            path,
            file.sha256,
            layout,
            features,
            (*left_out(graph, graph_steps, ends), *unknown),
            _summary(file, graph, found),
            kernel,
        )


def _nodes(file: KerasFile, graph: Graph, names: Mapping[str, str] | None = None, read: bool = False) -> Nodes:
    def reader(layer: Layer, shapes: Mapping[str, Shape]) -> Arrays:
        return file.weights.read(layer.path, shapes)

    layers = frozenset(layer.name for layer in graph.layers)
    return Nodes(reader if read else blank, layers, file.version.startswith("3"), names or {})


def _own_size(graph: Graph) -> int | None:
    """Height and width of the images as the model says; ``None`` if it leaves them free."""
    for shape in graph.input_shapes.values():
        if len(shape) == 3 and shape[0] == shape[1]:
            return shape[0]
    return None


def _input_shapes(path: Path, graph: Graph, size: int, is_asked: bool) -> dict[str, Shape | UserError]:
    """The shape (3, H, W) of each input, or why it is not one of images."""
    inputs: dict[str, Shape | UserError] = {}
    for name, shape in graph.input_shapes.items():
        height, width, channels = shape if len(shape) == 3 else (None, None, None if not shape else 0)
        is_square = is_asked or (height or size) == (width or size)
        if channels in (None, 3) and is_square:
            inputs[name] = (3, size, size)
        else:
            inputs[name] = UserError(
                f"Expected square images of three channels, but the input {name} of {path} has the shape {shape}, "
                "height, width, channels."
            )
    return inputs


def _contract(path: Path, found: Found | None, own_size: int | None, asked: Asked) -> Contract:
    known = found.known.contract if found else None
    size = asked.size or own_size or (known and known.size)
    channels = asked.channels or (known and known.channels)
    mean, std = asked.mean or (known and known.mean), asked.std or (known and known.std)
    if size and channels and mean and std:
        return Contract(size, channels, mean, std)
    told = {"--channels": channels, "--mean": mean, "--std": std, "--size": size}
    missing = [option for option, value in told.items() if not value]
    if missing == ["--size"]:
        raise UserError(f"{path} does not say how large its images are; give --size as the network was trained.")
    raise UserError(
        f"{path} does not say how its images are prepared; give {', '.join(missing)} as the network was trained; usual "
        f"in Keras are {_CONVENTIONS}."
    )


def _build(
    path: Path,
    graph: Graph,
    inputs: Mapping[str, Shape | UserError],
    nodes: Nodes,
    ends: Sequence[str],
    classifier: Classifier | None,
) -> tuple[onnx.ModelProto, tuple[NDArray[np.float32], NDArray[np.float32]] | None]:
    """Makes the model that computes the outputs of some steps, and the classifier's kernel (C, D) and bias (C,)."""
    layers = upstream(graph.layers, ends)
    needed = [layer.name for layer in layers if layer.kind == INPUT_KIND]
    if len(needed) != 1:
        raise UserError(
            f"Expected features of one image, but {ends[0]} in {path} needs the inputs {', '.join(needed) or 'none'}; "
            "name another layer by --output."
        )
    values = emit(path, layers, inputs, nodes)
    outputs = []
    for end in ends:
        value = values[end]
        if isinstance(value, UserError):
            raise value
        outputs.append(value)
    kernel = None
    if classifier:
        by_name = {layer.name: layer for layer in layers}
        outputs[1] = Maker(nodes, by_name[classifier.end]).reshaped(outputs[1], (outputs[1].channels,))
        kernel = _with_bias(nodes, nodes.names.get(classifier.dense, classifier.dense))
    # filled in place, since onnx.helper.make_graph and make_model each copy all weights
    model = onnx.ModelProto(ir_version=IR_VERSION, producer_name="facecls")
    model.opset_import.add(domain="", version=OPSET)
    model.graph.name = graph.name
    model.graph.node.extend(nodes.nodes)
    size = cast(Shape, inputs[needed[0]])
    model.graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", *size]))
    for value in outputs:
        model.graph.output.append(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, ["N", *value.shape]))
    for name in list(nodes.initializers):  # one by one, or there would be two copies of all weights
        array = np.ascontiguousarray(nodes.initializers.pop(name))
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model, kernel


def _with_bias(nodes: Nodes, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The kernel and bias of the classifier's node, which gets zeros as its bias if it has none."""
    (node,) = (node for node in nodes.nodes if node.name == name)
    kernel = nodes.initializers[node.input[1]]
    if len(node.input) == 2:
        node.input.append(f"{name}/bias")
        nodes.initializers[node.input[2]] = np.zeros(len(kernel), np.float32)
    return kernel.reshape(len(kernel), -1), nodes.initializers[node.input[2]]


def _summary(file: KerasFile, graph: Graph, found: Found | None) -> dict[str, str]:
    count = len(graph.layers) - len(graph.aliases)
    rows = {
        "format": f"{'whole model' if file.config is not None else 'weights only'}, Keras {file.version}",
        "network": found.known.name if found else graph.name,
        "layers": f"{count} layers, {file.weights.parameters:,} parameters",
    }
    if file.weights.types != "float32":
        rows["weights"] = f"{file.weights.types}, converted to float32"
    if policies := sorted({_policy(layer) for layer in graph.layers} - {"float32"}):
        rows["precision"] = f"{', '.join(policies)} in Keras; here all is computed in float32"
    return rows


def _policy(layer: Layer) -> str:
    """The precision in which a layer computes."""
    dtype = layer.config.get("dtype") or "float32"
    if isinstance(dtype, dict):  # a policy, as newer versions write it
        config = dtype.get("config")
        dtype = config.get("name") if isinstance(config, dict) else None
    return str(dtype or "float32")
