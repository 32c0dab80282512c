"""Networks whose files don't say how their images are prepared, but which can be recognised."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from convert.keras import layout
from convert.keras.emit import emit
from convert.keras.graph import Graph, Layer
from convert.keras.h5 import KerasFile
from convert.keras.nodes import Arrays, Nodes, Shape, Value
from convert.plain.network import Contract
from facecls.errors import UserError

SIZE = 224
"""Height and width of the images that all networks here were trained with."""
_VERSION_1 = (93.5940, 104.7624, 129.1863)
_VERSION_2 = (91.4953, 103.8827, 131.0912)
"""Blue, green, red: keras-vggface's ``preprocess_input`` (keras_vggface/utils.py)."""
_IMAGENET = (103.939, 116.779, 123.68)
"""Blue, green, red of ImageNet, which HSE_FaceRec_tf subtracts (github.com/av-savchenko/HSE_FaceRec_tf,
facial_analysis.py)."""
_MOBILENET = {
    "conv1",
    *(f"conv_{kind}_{block}{part}" for kind in ("dw", "pw") for block in range(1, 14) for part in ("", "_bn", "_relu")),
}

Layers = list[Layer]
Trunk = Literal["vggface2_resnet50", "graph"]
"""Layouts of trunk files."""


@dataclass(frozen=True)
class Known:
    """A network that is known.

    Attributes:
        name: What it is called.
        mean: Blue, green, red, subtracted from 0..255.
        trunk: The layout of its trunk file.
        body: Its layers up to the last map, if it is known by its structure; then ``None`` if it is by names.
        pool: The layers after that which give the features; its features are always those of the map, averaged.
        top: The layers from the last map to other features.
        classifier: The layers of the classifier, on given features, for a number of classes.
        by_name: Whether a graph is this network, if it is known by names.
    """

    name: str
    mean: tuple[float, float, float]
    trunk: Trunk = "graph"
    body: Callable[[], Layers] | None = None
    pool: Callable[[str], Layers] | None = None
    top: Callable[[str], Layers] | None = None
    classifier: Callable[[str, int], Layers] | None = None
    by_name: Callable[[Graph], bool] | None = None

    @property
    def contract(self) -> Contract:
        """How it takes its images."""
        return Contract(SIZE, "bgr", self.mean, (1.0, 1.0, 1.0))


def _is_vgg2_mobilenet(graph: Graph) -> bool:
    names = {layer.name for layer in graph.layers}
    return names >= _MOBILENET and (graph.name == "vgg2_mobilenet" or "global_pooling" in graph.outputs)


KNOWN = (
    # SENet-50 has all weights of ResNet-50 and more, so it comes first
    Known(
        "keras-vggface's SENet-50 (VGGFace2)",
        _VERSION_2,
        body=layout.senet50,
        pool=layout.resnet_pool,
        classifier=layout.resnet_classifier,
    ),
    Known(
        "keras-vggface's ResNet-50 (VGGFace2)",
        _VERSION_2,
        "vggface2_resnet50",
        body=layout.resnet50,
        pool=layout.resnet_pool,
        classifier=layout.resnet_classifier,
    ),
    Known(
        "keras-vggface's VGG16 (VGGFace)",
        _VERSION_1,
        body=layout.vgg16,
        top=layout.vgg16_top,
        classifier=layout.vgg16_classifier,
    ),
    Known("HSE_FaceRec_tf's MobileNet (VGGFace2)", _IMAGENET, by_name=_is_vgg2_mobilenet),
)


@dataclass(frozen=True)
class Found:
    """A known network in a graph.

    Attributes:
        known: Which.
        end: Name of the step of its last map; ``None`` if it is known by names.
        names: The names of the nodes with weights up to there, by their structures, as keras-vggface has them.
    """

    known: Known
    end: str | None
    names: Mapping[str, str]


def blank(layer: Layer, shapes: Mapping[str, Shape]) -> Arrays:
    """Stands for a layer's weights where only their shapes matter; takes no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def find_known(file: KerasFile, graph: Graph, values: Mapping[str, Value | UserError], size: int) -> Found | None:
    """Recognises a network.

    Args:
        file: The file.
        graph: Its layers.
        values: Their outputs, for images of ``size``.
        size: Height and width of the images.

    Returns:
        What was found; ``None`` if it is not known.
    """
    structures = {value.structure: name for name, value in reversed(list(values.items())) if isinstance(value, Value)}
    for known in KNOWN:
        if known.by_name is not None and known.by_name(graph):
            return Found(known, None, {})
        if known.body is not None:
            end, names = _reference(known, size)
            if end in structures:
                return Found(known, structures[end], names)
    return None


@cache
def _reference(known: Known, size: int) -> tuple[str, Mapping[str, str]]:
    """The structure of a network's last map, and the names of its nodes with weights by their structures."""
    nodes = Nodes(blank, frozenset(), keras_3=False)
    layers = known.body() if known.body else []
    end = emit(Path(known.name), layers, {layers[0].name: (3, size, size)}, nodes)[layers[-1].name]
    return end.structure if isinstance(end, Value) else "", nodes.weighted


def graph_of_weights(file: KerasFile, size: int) -> tuple[Graph, tuple[str, ...]]:
    """The graph of a file of weights only, which must be that of a known network.

    Args:
        file: The file.
        size: Height and width of the images.

    Returns:
        The graph, and names of layers that are in the file but not in it.

    Raises:
        UserError: If it is no known network, or a weight is missing.
    """
    problems = []
    for known in KNOWN:
        if known.body is None:
            continue
        layers = known.body()
        problem = _first_problem(file, layers, size)
        if problem is None:
            layers = _with_top(file, known, layers, size)
            known_names = {layer.name for layer in layers}
            left = tuple(name for name in file.weights.layers if name not in known_names)
            if not (strange := [name for name in left if re.match(r"conv\d", name)]):
                inputs = {layers[0].name: (None, None, 3)}
                return Graph(known.name, tuple(layers), (layers[-1].name,), inputs), left
            problem = f"unlike it, there is {strange[0]}"
        problems.append(f"{known.name}: {problem}")
    raise UserError(
        f"{file.path} holds weights only, which do not describe their network, and is none of those that are known "
        f"({'; '.join(problems)}); save the model whole, model.save('model.h5')."
    )


def _with_top(file: KerasFile, known: Known, layers: Layers, size: int) -> Layers:
    """Adds the layers after the last map whose weights the file has."""
    layers = layers + (known.pool(layers[-1].name) if known.pool else [])
    if known.top:
        more = layers + known.top(layers[-1].name)
        if _first_problem(file, more, size) is not None:
            return layers
        layers = more
    if known.classifier:
        dense = known.classifier(layers[-1].name, 1)[0].name
        kernel = file.weights.shapes(dense).get("kernel", ())
        classes = kernel[-1] if len(kernel) == 2 else 0
        more = layers + known.classifier(layers[-1].name, classes)
        if classes and _first_problem(file, more, size) is None:
            return more
    return layers


def _first_problem(file: KerasFile, layers: Layers, size: int) -> str | None:
    """What is wrong with the weights of layers, in words; ``None`` if nothing is."""
    needed: dict[str, Mapping[str, Shape]] = {}

    def record(layer: Layer, shapes: Mapping[str, Shape]) -> Arrays:
        needed[layer.name] = shapes
        return blank(layer, shapes)

    for value in emit(file.path, layers, {layers[0].name: (3, size, size)}, Nodes(record, frozenset(), False)).values():
        if isinstance(value, UserError):
            return str(value)
    missing, wrong = [], []
    for name, shapes in needed.items():
        found = file.weights.shapes(name)
        for weight, shape in shapes.items():
            if weight not in found:
                missing.append(f"{name}/{weight}")
            elif found[weight] != shape:
                wrong.append(f"{name}/{weight} has the shape {found[weight]}, not {shape}")
    count = sum(map(len, needed.values()))
    if missing:
        return f"{len(missing)} of its {count} weights missing, such as {missing[0]}"
    return wrong[0] if wrong else None
