"""Converts Keras layers to an ONNX model: one node per layer, BatchNormalization kept, padding explicit.

The model computes what the Keras model does, but with channels first: its input ``images`` is (N, 3, 224, 224) float32,
BGR, 0..255 minus ``BGR_MEAN``; its outputs are ``features`` (N, 2048) and, with a classifier, ``probabilities``
(N, 8631). The model's metadata has them too. A fused activation, such as the classifier's softmax, gets its own node.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from convert.keras_h5 import KerasFile
from convert.layout import SIZE, Layer
from facecls.errors import UserError

BGR_MEAN = (91.4953, 103.8827, 131.0912)
"""Blue, green, red, 0..255: keras-vggface's ``preprocess_input(version=2)`` (keras_vggface/utils.py)."""
INPUT, FEATURES, PROBABILITIES = "images", "features", "probabilities"
"""Names of the model's input and outputs."""

_OPSET = 17  # the newest that onnx2torch 1.5.15 supports
_IR_VERSION = 8  # the one that belongs to opset 17
_ACTIVATIONS = {"relu": "Relu", "softmax": "Softmax"}
_AXES = {"Softmax": {"axis": 1}}


def to_onnx(file: KerasFile, classifier: bool) -> onnx.ModelProto:
    """Converts the layers of a Keras file to an ONNX model.

    Args:
        file: The open Keras file.
        classifier: Whether to include the classifier, which the file must then have.

    Returns:
        The model, not checked yet, the same for the same file; its input and outputs are described at the top of this
        file.

    Raises:
        UserError: If a layer has a setting that can't be converted, or a weight holds NaN or Inf.
    """
    outputs = {file.features: FEATURES} | ({file.output: PROBABILITIES} if classifier else {})
    graph = _Graph(file, outputs)
    for layer in _upstream(file.layers, outputs):
        try:
            graph.add(layer)
        except (KeyError, TypeError, ValueError) as error:
            raise _unsupported(layer, f"its settings can't be understood ({error!r})") from None
    return graph.finish()


def _unsupported(layer: Layer, what: str) -> UserError:
    return UserError(
        f"Expected layer {layer.name} to be as in VGGFace2's ResNet-50, but {what}; "
        "use the unchanged file of keras-vggface."
    )


def _upstream(layers: list[Layer], ends: Iterable[str]) -> list[Layer]:
    wanted = set(ends)
    for layer in reversed(layers):
        if layer.name in wanted:
            wanted.update(layer.inputs)
    return [layer for layer in layers if layer.name in wanted]


@dataclass(frozen=True)
class _Operator:
    """An ONNX operator: its type, output shape, attributes, and weights by name in ONNX' layout."""

    type: str
    shape: tuple[int, ...]  # (C, H, W) or (C,), without the batch
    attributes: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, NDArray[np.float32]] = field(default_factory=dict)


class _Graph:
    """The graph under construction, with the shape of every value in it."""

    def __init__(self, file: KerasFile, outputs: dict[str, str]) -> None:
        self.file = file
        self.outputs = outputs
        self.names = dict(outputs)
        self.shapes: dict[str, tuple[int, ...]] = {}
        # filled in place, since onnx.helper.make_graph and make_model each copy all weights
        self.model = onnx.ModelProto(ir_version=_IR_VERSION, producer_name="facecls")
        self.model.opset_import.add(domain="", version=_OPSET)
        self.model.graph.name = "vggface2_resnet50"

    def add(self, layer: Layer) -> None:
        """Adds one layer, whose inputs must have been added before."""
        if layer.kind == "InputLayer":
            self.shapes[layer.name] = _input_shape(layer)
            self.names[layer.name] = INPUT
            return
        operator = _operator(self.file, layer, self.shapes[layer.inputs[0]])
        self.shapes[layer.name] = operator.shape
        inputs = [self._value(name) for name in layer.inputs]
        activation = layer.config.get("activation", "linear")
        if layer.kind == "Activation" or activation == "linear":
            self._node(operator, layer.name, inputs, self._value(layer.name))
        else:
            between = f"{layer.name}/linear"
            self._node(operator, layer.name, inputs, between)
            fused = _activation(layer, operator.shape)
            self._node(fused, f"{layer.name}/{activation}", [between], self._value(layer.name))

    def _value(self, layer: str) -> str:
        return self.names.get(layer, layer)

    def _node(self, operator: _Operator, name: str, inputs: list[str], output: str) -> None:
        for weight, array in operator.weights.items():
            inputs = [*inputs, f"{name}/{weight}"]
            self.model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), inputs[-1]))
        node = helper.make_node(operator.type, inputs, [output], name, **operator.attributes)
        self.model.graph.node.append(node)

    def finish(self) -> onnx.ModelProto:
        """Adds inputs, outputs and metadata, and returns the model."""
        contract = {"channels": "BGR", "range": [0, 255], "mean_bgr": BGR_MEAN, "subtract_mean_before": True}
        helper.set_model_props(self.model, {"input": json.dumps(contract), "source_sha256": self.file.sha256})
        self.model.graph.input.append(_value_info(INPUT, (3, SIZE, SIZE), "float32 BGR, 0..255 minus mean_bgr"))
        self.model.graph.output.extend(
            _value_info(name, self.shapes[layer], "") for layer, name in self.outputs.items()
        )
        return self.model


def _value_info(name: str, shape: tuple[int, ...], text: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape], text)


def _operator(file: KerasFile, layer: Layer, shape: tuple[int, ...]) -> _Operator:
    config = layer.config
    match layer.kind:
        case "Conv2D":
            _allow(layer, "data_format", "channels_last")
            _allow(layer, "dilation_rate", 1)
            _allow(layer, "groups", 1)
            kernel = file.read(f"{layer.name}/kernel").transpose(3, 2, 0, 1)  # (H, W, in, out) -> (out, in, H, W)
            window, after = _window(layer, shape, kernel.shape[2:], config["strides"])
            return _Operator("Conv", (kernel.shape[0], *after), window, {"kernel": kernel})
        case "BatchNormalization":
            _allow(layer, "axis", 3, -1)
            attributes = {"epsilon": config["epsilon"], "momentum": config["momentum"]}
            names = ("gamma", "beta", "moving_mean", "moving_variance")
            return _Operator(
                "BatchNormalization", shape, attributes, {name: file.read(f"{layer.name}/{name}") for name in names}
            )
        case "Activation":
            return _activation(layer, shape)
        case "ReLU":
            _allow(layer, "max_value", None)
            _allow(layer, "negative_slope", 0)
            _allow(layer, "threshold", 0)
            return _Operator("Relu", shape)
        case "Add":
            return _Operator("Add", shape)
        case "MaxPooling2D":
            window, after = _window(layer, shape, config["pool_size"], config["strides"])
            return _Operator("MaxPool", (shape[0], *after), window)
        case "AveragePooling2D":
            _allow(layer, "padding", "valid")  # onnx2torch only supports averages over whole windows
            window, after = _window(layer, shape, config["pool_size"], config["strides"])
            return _Operator("AveragePool", (shape[0], *after), window)
        case "GlobalAveragePooling2D":
            _allow(layer, "keepdims", False)
            return _Operator("ReduceMean", shape[:1], {"axes": [2, 3], "keepdims": 0})
        case "Flatten":
            if shape[1:] not in ((), (1, 1)):
                raise _unsupported(layer, f"it flattens {shape[1:]} places, not one")  # in another order than Keras
            return _Operator("Flatten", shape[:1], {"axis": 1})
        case "Dense":
            kernel = file.read(f"{layer.name}/kernel").T  # (in, out) -> (out, in)
            weights = {"kernel": kernel, "bias": file.read(f"{layer.name}/bias")}
            return _Operator("Gemm", kernel.shape[:1], {"transB": 1}, weights)
    raise AssertionError(f"no operator for {layer.kind}, which is in layout.KINDS")


def _activation(layer: Layer, shape: tuple[int, ...]) -> _Operator:
    activation = layer.config["activation"]
    if activation not in _ACTIVATIONS:
        raise _unsupported(layer, f"its activation is {activation}, not {' or '.join(_ACTIVATIONS)}")
    kind = _ACTIVATIONS[activation]
    return _Operator(kind, shape, _AXES.get(kind, {}))


def _allow(layer: Layer, key: str, *allowed: Any) -> None:
    """Rejects a setting, of one or several numbers, that is present and not allowed."""
    for value in np.atleast_1d(layer.config.get(key, allowed[0])).tolist():
        if value not in allowed:
            raise _unsupported(layer, f"its {key} is {value}, not {' or '.join(map(str, allowed))}")


def _input_shape(layer: Layer) -> tuple[int, int, int]:
    batch_shape = layer.config.get("batch_input_shape") or layer.config["batch_shape"]
    height, width, channels = (SIZE if size is None else size for size in batch_shape[1:])
    if (height, width, channels) != (SIZE, SIZE, 3):
        raise _unsupported(layer, f"its shape is {batch_shape}, not [None, {SIZE}, {SIZE}, 3]")
    return channels, height, width


def _window(layer: Layer, shape: tuple[int, ...], kernel: Any, stride: Any) -> tuple[dict[str, Any], list[int]]:
    """The attributes of a sliding window, with explicit padding, and the height and width of its output.

    TensorFlow's "same" has an output of ceil(size / stride); where the padding is odd, the extra row is at the end
    (tensorflow.org/api_docs/python/tf/nn, "Notes on padding").
    """
    _allow(layer, "padding", "valid", "same")
    kernels, strides = _pair(kernel), _pair(stride)
    befores, afters, sizes = [], [], []
    for size, k, s in zip(shape[1:], kernels, strides, strict=True):
        pad = max((-(-size // s) - 1) * s + k - size, 0) if layer.config["padding"] == "same" else 0
        befores.append(pad // 2)
        afters.append(pad - pad // 2)
        sizes.append((size + pad - k) // s + 1)
    return {"kernel_shape": kernels, "strides": strides, "pads": befores + afters}, sizes


def _pair(value: Any) -> list[int]:
    height, width = (value, value) if isinstance(value, int) else value
    return [height, width]
