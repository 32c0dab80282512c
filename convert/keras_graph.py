"""Reads ``model_config``, the JSON that Keras 2 saves with a whole model, as a list of layers in order."""

import json
from pathlib import Path
from typing import Any

from convert.layout import KINDS, Layer
from facecls.errors import UserError


def parse_graph(path: Path, model_config: str) -> tuple[list[Layer], str]:
    """Reads the graph of a functional Keras 2 model.

    Args:
        path: The file it comes from, for messages.
        model_config: The JSON.

    Returns:
        The layers, each after its inputs, and the name of the layer whose output is the model's output.

    Raises:
        UserError: If a layer is of an unknown class, or the graph is not that of a functional Keras 2 model with one
            output and every layer used once.
    """
    try:
        model = json.loads(model_config)
        if model["class_name"] not in ("Functional", "Model"):
            raise _not_functional(path, f"the model's class is {model['class_name']}")
        layers = [_layer(path, entry) for entry in model["config"]["layers"]]
        outputs = _names(path, model["config"]["output_layers"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _not_functional(path, f"it can't be understood ({error!r})") from None
    if len(outputs) != 1:
        raise _not_functional(path, f"it has the {len(outputs)} outputs {', '.join(outputs)}")
    _check_order(path, layers, outputs[0])
    return layers, outputs[0]


def _not_functional(path: Path, what: str) -> UserError:
    return UserError(
        f"Expected the graph of a functional Keras 2 model with one output in {path}, but {what}; "
        "save keras-vggface's model with Keras 2 (tf_keras)."
    )


def _layer(path: Path, entry: dict[str, Any]) -> Layer:
    kind, config, name = entry["class_name"], entry["config"], entry.get("name") or entry["config"]["name"]
    if kind not in KINDS:
        raise UserError(
            f"Expected layers of the classes {', '.join(KINDS)}, but {name} in {path} is a {kind}; "
            "only keras-vggface's VGGFace2 ResNet-50 can be converted."
        )
    dtype = config.get("dtype", "float32")
    if isinstance(dtype, dict):  # a policy, as newer versions write it
        dtype = dtype["config"]["name"]
    if dtype != "float32":
        raise _not_functional(path, f"layer {name} computes in {dtype}, not float32")
    return Layer(name, kind, config, tuple(_names(path, entry["inbound_nodes"])))


def _names(path: Path, nodes: Any) -> list[str]:
    """The layer names in references such as ``[[["conv1", 0, 0, {}]]]``, however deeply nested."""
    if not isinstance(nodes, list):
        raise _not_functional(path, f"{nodes!r} is not how Keras 2 refers to layers")
    if nodes and isinstance(nodes[0], str):
        name, node, tensor = nodes[:3]
        if (node, tensor) != (0, 0):
            raise _not_functional(path, f"layer {name} is used more than once")
        return [name]
    return [name for inner in nodes for name in _names(path, inner)]


def _check_order(path: Path, layers: list[Layer], output: str) -> None:
    seen: set[str] = set()
    for layer in layers:
        expected = {"InputLayer": 0, "Add": 2}.get(layer.kind, 1)
        if len(layer.inputs) != expected:
            raise _not_functional(path, f"layer {layer.name} has {len(layer.inputs)} inputs, not {expected}")
        if late := [name for name in layer.inputs if name not in seen]:
            raise _not_functional(
                path, f"layer {layer.name} takes its input from {late[0]}, which does not come before it"
            )
        if layer.name in seen:
            raise _not_functional(path, f"layer {layer.name} is there twice")
        seen.add(layer.name)
    if output not in seen:
        raise _not_functional(path, f"its output {output} is no layer")
