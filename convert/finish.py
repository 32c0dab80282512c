"""Ends a plain ONNX model in a feature vector, and finds its last map."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

from convert.plain.network import Network
from convert.plain.shapes import Shapes, free_names, has_channels_last, rename, unused, upstream, value_shapes
from facecls.errors import UserError
from facecls.model.graph import cut_points

FEATURES, PROBABILITIES = "features", "probabilities"
"""Names of the model's outputs."""


@dataclass(frozen=True)
class Map:
    """The last value with locations.

    Attributes:
        name: Of the value.
        shape: (C, h, w), or (L, C) for tokens.
        prefix: Tokens that have no location.
    """

    name: str
    shape: tuple[int, ...]
    prefix: int

    @property
    def channels(self) -> int:
        """Its channels C."""
        return self.shape[0 if len(self.shape) == 3 else 1]


def finish(network: Network, also: Sequence[str] = ()) -> Shapes:
    """Pools features that are a map, flattens them to a vector, and names the outputs ``FEATURES``, ``PROBABILITIES``.

    Args:
        network: As a reader returns it; its model is changed in place.
        also: Layers before it whose outputs are pooled alike and joined to the features, in this order.

    Returns:
        The shapes of all values.

    Raises:
        UserError: If the shape of a value is not known or too large, or the features are no map and no vector.
    """
    graph = network.model.graph
    shapes = value_shapes(network.model)
    ends = [output.name for output in graph.output]
    layers = {ends[0]: network.features} | {_existing(name, network): name for name in also}
    if len(layers) != 1 + len(also):
        raise UserError(
            f"Expected --also with other layers than the features, each once, but got {', '.join(also)} beside "
            f"{network.features}; leave out what is there already."
        )
    vectors = [
        _vector(network, shapes, value, layer, f"features/{place}")
        for place, (value, layer) in enumerate(layers.items())
    ]
    joined = vectors[0] if len(vectors) == 1 else _append(graph, "Concat", vectors, "features/joined", axis=1)
    sizes = [sum(_channels(graph, shapes, value) for value in layers), *(shapes[end][0] for end in ends[1:])]
    for value, name in zip((joined, *ends[1:]), (FEATURES, PROBABILITIES), strict=False):
        if value != name:
            free_names(graph, (name,))
            rename(graph, value, name)
    del graph.output[:]
    for name, size in zip((FEATURES, PROBABILITIES), sizes, strict=False):
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]))
    return value_shapes(network.model)


def last_map(model: onnx.ModelProto, shapes: Shapes) -> Map | None:
    """Finds the last value with locations on which alone the features depend.

    Args:
        model: A plain model whose first output is the features, finished.
        shapes: The shapes of all values.

    Returns:
        The map; ``None`` if there is none.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    steps = [
        (node.output[0], [name for name in node.input if name and name not in constants])
        for node in upstream(model.graph, FEATURES)
    ]
    for step in reversed(cut_points(steps)):
        name = steps[step][0]
        shape = shapes[name]
        if 0 in shape:
            continue
        if len(shape) == 3 and math.prod(shape[1:]) > 1 and not has_channels_last(model.graph, name):
            return Map(name, shape, 0)
        if len(shape) == 2:
            for prefix in (0, 1):
                if math.isqrt(shape[0] - prefix) ** 2 == shape[0] - prefix > 1:
                    return Map(name, shape, prefix)
    return None


def _existing(name: str, network: Network) -> str:
    """The name, if something in the model computes it."""
    computed = [output for node in network.model.graph.node for output in node.output]
    if name not in computed:
        near = difflib.get_close_matches(name, computed, n=3) or computed[-3:]
        raise UserError(
            f"Expected --also with the name of a layer before the features in {network.source}, but got {name}; did "
            f"you mean {', '.join(near)}?"
        )
    return name


def _channels(graph: onnx.GraphProto, shapes: Shapes, value: str) -> int:
    """Channels of a vector or a map."""
    return shapes[value][-1 if has_channels_last(graph, value) else 0]


def _vector(network: Network, shapes: Shapes, value: str, layer: str, name: str) -> str:
    """Appends what makes a vector of a layer's output."""
    graph, shape = network.model.graph, shapes[value]
    if len(shape) not in (1, 3) or 0 in shape:
        option = "output" if layer == network.features else "also"
        raise UserError(
            f"Expected a vector or a map as features, but the output of {layer} in {network.source} has the shape "
            f"(N, {', '.join(map(str, shape))}); name another layer by --{option}."
        )
    if len(shape) == 1:
        return value
    if has_channels_last(graph, value):
        value = _append(graph, "Transpose", [value], f"{name}/map", perm=[0, 3, 1, 2])
        shape = (shape[2], *shape[:2])
    if shape[1:] != (1, 1):
        value = _append(graph, "GlobalAveragePool", [value], f"{name}/pool")
    return _append(graph, "Flatten", [value], f"{name}/flatten")


def _append(graph: onnx.GraphProto, kind: str, values: Sequence[str], name: str, **attributes: Any) -> str:
    name = unused(graph, name)
    graph.node.append(helper.make_node(kind, values, [name], name, **attributes))
    return name
