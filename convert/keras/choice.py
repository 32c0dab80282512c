"""Which step of a Keras graph gives the features, and which is the classifier on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.keras.activations import SOFTMAX, activation_name
from convert.keras.graph import INPUT_KIND, Graph, Layer
from convert.keras.known import Found
from convert.keras.nodes import Value
from convert.plain.features import Step, choose_features, downstream
from convert.plain.network import INPUT
from facecls.errors import UserError

Values = Mapping[str, Value | UserError]
_POOLS = ("AveragePooling2D", "GlobalAveragePooling2D", "Flatten", "Reshape")
"""Layers that may stand between the last map and the pooled features."""
_TRANSPARENT = ("identity", "reshape")


@dataclass(frozen=True)
class Classifier:
    """A classifier on the features.

    Attributes:
        dense: The step of its dense layer.
        end: The step of its probabilities.
    """

    dense: str
    end: str


def features_step(
    path: Path, graph: Graph, steps: Sequence[Step], values: Values, found: Found | None, asked: str | None
) -> str:
    """Chooses the step whose output is the features.

    Args:
        path: The file, for messages.
        graph: Its layers.
        steps: The same, for ``choose_features``.
        values: Their outputs.
        found: The known network that it is or contains.
        asked: The name that the user asked for.

    Returns:
        The name of the step, whose output can be computed.

    Raises:
        UserError: If there is none, or it can't be computed.
    """
    if found and found.known.pool and found.end and asked is None:
        features = _pooled(graph, values, found.end)
    else:
        features = choose_features(path, steps, graph.outputs, asked)
    value = values[features]
    if isinstance(value, UserError):
        raise value
    if value.name == INPUT:
        raise UserError(f"Expected a network in {path}, but {features} gives the images as they are.")
    return features


def _pooled(graph: Graph, values: Values, name: str) -> str:
    """The last of the steps that only average and reshape a map."""
    for layer in graph.layers:
        value = values[layer.name]
        if layer.inputs != (name,) or layer.kind not in _POOLS or isinstance(value, UserError):
            continue
        if (value.rank == 2 or value.shape[1:] == (1, 1)) and value.channels == _channels(values[name]):
            name = layer.name
    return name


def _channels(value: Value | UserError) -> int:
    return 0 if isinstance(value, UserError) else value.shape[0]


def find_classifier(path: Path, graph: Graph, steps: Sequence[Step], values: Values, features: str) -> Classifier:
    """Finds the classifier: one dense layer, or a convolution with one pixel, with softmax directly on the features.

    Args:
        path: The file, for messages.
        graph: Its layers.
        steps: The same, with their roles.
        values: Their outputs.
        features: The step of the features.

    Returns:
        The classifier.

    Raises:
        UserError: If there is none.
    """
    by_name = {step.name: step for step in steps}
    layers = {layer.name: layer for layer in graph.layers}
    for end in graph.outputs:
        name, is_softmax = end, False
        while by_name[name].role in ("probability", *_TRANSPARENT) and len(by_name[name].inputs) == 1:
            is_softmax |= by_name[name].role == "probability" and _is_softmax(layers[name])
            name = by_name[name].inputs[0]
        is_softmax |= _is_softmax(layers[name])
        source = by_name[name].inputs[0] if by_name[name].inputs else name
        while source != features and by_name[source].role in _TRANSPARENT and len(by_name[source].inputs) == 1:
            source = by_name[source].inputs[0]
        if is_softmax and source == features and _is_linear(layers[name], values[name], values[features]):
            value = values[end]
            if isinstance(value, UserError):
                raise value
            return Classifier(name, end)
    raise UserError(
        f"There is no classifier to keep in {path}: expected one dense layer with softmax directly on the features, "
        f"the output of {features}; leave --keep-classifier out."
    )


def _is_softmax(layer: Layer) -> bool:
    return layer.kind == "Softmax" or activation_name(layer.config.get("activation")) == SOFTMAX


def _is_linear(layer: Layer, output: Value | UserError, features: Value | UserError) -> bool:
    """Whether a layer is a matrix on a vector of features."""
    if isinstance(output, UserError) or isinstance(features, UserError):
        return False
    return layer.kind in ("Dense", "Conv2D") and all(
        value.rank == 2 or value.shape[1:] == (1, 1) for value in (output, features)
    )


def upstream(layers: Sequence[Layer], ends: Sequence[str]) -> list[Layer]:
    """The layers that are needed to compute the outputs of some steps."""
    wanted = set(ends)
    for layer in reversed(layers):
        if layer.name in wanted:
            wanted.update(layer.inputs)
    return [layer for layer in layers if layer.name in wanted]


def left_out(graph: Graph, steps: Sequence[Step], ends: Sequence[str]) -> tuple[str, ...]:
    """Names of the layers that are not needed to compute the outputs of some steps."""
    unneeded = set.intersection(*(set(downstream(steps, end)) for end in ends)) - graph.aliases
    return tuple(layer.name for layer in graph.layers if layer.name in unneeded and layer.kind != INPUT_KIND)
