"""Makes plain ONNX nodes of the layers of a Keras graph, by a table of Keras' classes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from convert.keras import activations, layers, shapes
from convert.keras.activations import SIGMOID, SOFTMAX, activation_name
from convert.keras.graph import ARITHMETIC, INPUT_KIND, MODEL_OUTPUT, Layer, brief
from convert.keras.nodes import Maker, Nodes, Shape, Value
from convert.plain.features import Role, Step
from convert.plain.network import INPUT
from facecls.errors import UserError


@dataclass(frozen=True)
class _Kind:
    """How layers of a Keras class are converted.

    Attributes:
        make: Makes the nodes of one from its inputs.
        role: What it is for the choice of features.
        merges: Whether it takes several inputs.
    """

    make: Callable[..., Value]
    role: Role = "other"
    merges: bool = False


_IDENTITY = _Kind(shapes.identity, "identity")
_KINDS: dict[str, _Kind] = {
    "Conv2D": _Kind(layers.conv2d, "weighted"),
    "DepthwiseConv2D": _Kind(layers.depthwise_conv2d, "weighted"),
    "SeparableConv2D": _Kind(layers.separable_conv2d, "weighted"),
    "Dense": _Kind(layers.dense, "weighted"),
    "BatchNormalization": _Kind(layers.batch_normalization),
    "SyncBatchNormalization": _Kind(layers.batch_normalization),
    "Normalization": _Kind(layers.normalization),
    "Rescaling": _Kind(layers.rescaling),
    "Activation": _Kind(activations.activation),
    "ReLU": _Kind(activations.relu),
    "LeakyReLU": _Kind(activations.leaky_relu),
    "ThresholdedReLU": _Kind(activations.thresholded_relu),
    "PReLU": _Kind(activations.prelu),
    "ELU": _Kind(activations.elu),
    "Softmax": _Kind(activations.softmax, "probability"),
    "MaxPooling2D": _Kind(layers.max_pooling2d),
    "AveragePooling2D": _Kind(layers.average_pooling2d),
    "GlobalAveragePooling2D": _Kind(shapes.global_pooling("ReduceMean")),
    "GlobalMaxPooling2D": _Kind(shapes.global_pooling("ReduceMax")),
    "Flatten": _Kind(shapes.flatten, "reshape"),
    "Reshape": _Kind(shapes.reshape, "reshape"),
    "Permute": _Kind(shapes.permute),
    "ZeroPadding2D": _Kind(shapes.zero_padding2d),
    "Cropping2D": _Kind(shapes.cropping2d),
    "UpSampling2D": _Kind(shapes.up_sampling2d),
    "Concatenate": _Kind(shapes.concatenate, merges=True),
    "Add": _Kind(shapes.merged("Add"), merges=True),
    "Multiply": _Kind(shapes.merged("Mul"), merges=True),
    "Subtract": _Kind(shapes.subtract, merges=True),
    "Average": _Kind(shapes.average, merges=True),
    "Divide": _Kind(shapes.merged("Div"), merges=True),
    "TrueDivide": _Kind(shapes.merged("Div"), merges=True),
    "Maximum": _Kind(shapes.merged("Max"), merges=True),
    "Minimum": _Kind(shapes.merged("Min"), merges=True),
    MODEL_OUTPUT: _IDENTITY,
    "Dropout": _IDENTITY,
    "SpatialDropout1D": _IDENTITY,
    "SpatialDropout2D": _IDENTITY,
    "AlphaDropout": _IDENTITY,
    "GaussianDropout": _IDENTITY,
    "GaussianNoise": _IDENTITY,
    "ActivityRegularization": _IDENTITY,
    "Identity": _IDENTITY,
    "RandomFlip": _IDENTITY,
    "RandomRotation": _IDENTITY,
    "RandomTranslation": _IDENTITY,
    "RandomZoom": _IDENTITY,
    "RandomContrast": _IDENTITY,
    "RandomBrightness": _IDENTITY,
}


def steps(layers: Sequence[Layer]) -> list[Step]:
    """The layers, as far as the choice of the features needs them."""
    return [Step(layer.name, layer.inputs, _role(layer)) for layer in layers]


def _role(layer: Layer) -> Role:
    if layer.kind == INPUT_KIND:
        return "input"
    if layer.kind not in _KINDS or not layer.inputs:
        return "other"
    role = _KINDS[layer.kind].role
    if activation_name(layer.config.get("activation")) in (SOFTMAX, SIGMOID):
        return "classifier" if role == "weighted" else "probability"
    return role


def emit(
    path: Path, layers: Sequence[Layer], inputs: Mapping[str, Shape | UserError], nodes: Nodes
) -> dict[str, Value | UserError]:
    """Makes the nodes of layers.

    Args:
        path: The file they come from, for messages.
        layers: The layers, each after its inputs.
        inputs: By input: its shape (3, H, W), or why it is not one of images.
        nodes: Where the nodes go.

    Returns:
        By layer: its output, or why it can't be converted.
    """
    values: dict[str, Value | UserError] = {}
    for layer in layers:
        if layer.kind == INPUT_KIND:
            shape = inputs[layer.name]
            values[layer.name] = shape if isinstance(shape, UserError) else Value(INPUT, shape, INPUT)
            continue
        try:
            values[layer.name] = _emit_layer(path, layer, values, nodes)
        except UserError as error:
            values[layer.name] = error
    return values


def _emit_layer(path: Path, layer: Layer, values: Mapping[str, Value | UserError], nodes: Nodes) -> Value:
    for name in layer.inputs:
        if isinstance(values[name], UserError):
            raise cast(UserError, values[name])
    before = [name for name in layer.inputs[:1] if cast(Value, values[name]).name != INPUT]
    advice = f"; take the features before it by --output {before[0]}." if before else "."
    if layer.kind not in _KINDS:
        raise UserError(
            f"Expected layers of Keras that can be converted, but {layer.name} in {path} is {_an(layer.kind)}, none "
            f"of them; code in the file is never run{advice}"
        )
    kind, first_node = _KINDS[layer.kind], len(nodes.nodes)
    try:
        if layer.problem:
            raise ValueError(layer.problem)
        if layer.numbers and layer.kind not in ARITHMETIC:
            raise ValueError(f"it is called with the number {layer.numbers[0][1]:g}")
        if kind.merges != (len(layer.inputs) + len(layer.numbers) > 1) or not layer.inputs:
            raise ValueError(f"it has {len(layer.inputs)} inputs and {len(layer.numbers)} numbers")
        value = kind.make(Maker(nodes, layer), *(cast(Value, values[name]) for name in layer.inputs))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        reason = brief(error)
        if type(error) is not ValueError:
            reason = f"its settings can't be understood ({type(error).__name__}: {reason})"
        raise UserError(f"Can't convert layer {layer.name} ({layer.kind}) in {path}: {reason}{advice}") from None
    return nodes.finish_layer(layer.name, value, first_node)


def _an(noun: str) -> str:
    return f"{'an' if noun[:1] in 'AEIOU' else 'a'} {noun}"
