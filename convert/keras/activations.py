"""Keras' activations as ONNX nodes, whether they are layers, or named by other layers."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convert.keras.graph import is_of_keras
from convert.keras.nodes import Maker, Value, number

Activation = Callable[[Maker, Value], Value]
SOFTMAX, SIGMOID, LINEAR = "softmax", "sigmoid", "linear"
_HUGE = 1e38
"""Turns a positive number into more than 1; float32 ends at 3.4e38."""


def activation_name(setting: Any) -> str:
    """The name of an activation, as it is spelt in a configuration.

    It is a name, alone or with a package in front, or a description of a function or of a layer; ``relu6``, which old
    MobileNets write as their own function, is known in any package, other own functions are not.
    """
    if setting is None:
        return LINEAR
    own = False
    if isinstance(setting, dict):
        if is_layer(setting):
            return SOFTMAX if setting["class_name"] == "Softmax" else f"layer {setting['class_name']}"
        module, registered = str(setting.get("module") or "keras"), str(setting.get("registered_name"))
        own = ">" in registered or not is_of_keras(module)
        kind, setting = setting.get("class_name", "function"), setting.get("config")
        if isinstance(setting, dict):
            setting = setting.get("name") if kind == "function" else f"layer {kind}"
        if not isinstance(setting, str):  # as the bytes of a lambda
            return "an own function"
    package, _, name = str(setting).rpartition(">")
    package, _, name = name.rpartition(".") if not package else (package, "", name)
    own |= bool(package) and not is_of_keras(package)
    return f"own function {name}" if own and name != "relu6" else name.lower()


def is_layer(setting: Mapping[str, Any]) -> bool:
    """Whether an activation is a layer with settings of its own."""
    return setting.get("class_name") in _LAYERS and isinstance(setting.get("config"), Mapping)


def activated(make: Maker, x: Value, default: str = LINEAR) -> Value:
    """Applies the activation that a layer names."""
    setting = make.settings.get("activation", default)
    if isinstance(setting, Mapping) and is_layer(setting):
        return _LAYERS[setting["class_name"]](make.with_settings(setting["config"]), x)
    name = activation_name(setting)
    if name == LINEAR:
        return x
    if name not in _ACTIVATIONS:
        raise ValueError(f"its activation is {name}, not {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name](make, x)


def _plain(kind: str, **attributes: Any) -> Activation:
    return lambda make, x: make.activate(x, kind, kind.lower(), **attributes)


def _softmax(make: Maker, x: Value, axis: int = -1) -> Value:
    return make.node("Softmax", [x], x.shape, part="softmax", axis=x.axis(axis))


def _log_softmax(make: Maker, x: Value) -> Value:
    return make.node("LogSoftmax", [x], x.shape, part="log_softmax", axis=x.axis(-1))


def _clip(make: Maker, x: Value, low: float, high: float, part: str) -> Value:
    return make.node("Clip", [x], x.shape, {"min": number(low), "max": number(high)}, part)


def _product(make: Maker, x: Value, factor: Value, part: str) -> Value:
    return make.node("Mul", [x, factor], x.shape, part=part)


def _swish(make: Maker, x: Value) -> Value:
    return _product(make, x, _plain("Sigmoid")(make, x), "swish")


def _hard_swish(make: Maker, x: Value) -> Value:
    return _product(make, x, _hard_sigmoid(1 / 6)(make, x), "hard_swish")


def _mish(make: Maker, x: Value) -> Value:
    return _product(make, x, _plain("Tanh")(make, _plain("Softplus")(make, x)), "mish")


def _gelu(make: Maker, x: Value) -> Value:
    normal = make.activate(make.scaled(x, 2**-0.5, "scaled"), "Erf", "erf")
    above = make.node("Add", [normal], x.shape, {"one": number(1)}, "above")
    return make.scaled(_product(make, x, above, "doubled"), 0.5, "gelu")


def _hard_sigmoid(slope: float) -> Activation:
    return lambda make, x: make.node(
        "HardSigmoid", [x], x.shape, part="hard_sigmoid", alpha=float(np.float32(slope)), beta=0.5
    )


def _keras_hard_sigmoid(make: Maker, x: Value) -> Value:
    # 0.2 x + 0.5 until Keras 2 (tf_keras backend.py), relu6(x + 3) / 6 since Keras 3 (keras activations.py)
    return _hard_sigmoid(1 / 6 if make.keras_3 else 0.2)(make, x)


def _keras_leaky_relu(make: Maker, x: Value) -> Value:
    # the default slope of activations.leaky_relu in both, not that of the layer
    return make.activate(x, "LeakyRelu", "leaky_relu", alpha=0.2)


_ACTIVATIONS: dict[str, Activation] = {
    "relu": _plain("Relu"),
    "relu6": lambda make, x: _clip(make, x, 0, 6, "relu6"),
    SIGMOID: _plain("Sigmoid"),
    "hard_sigmoid": _keras_hard_sigmoid,
    "tanh": _plain("Tanh"),
    "elu": _plain("Elu", alpha=1.0),
    "selu": _plain("Selu"),
    "swish": _swish,
    "silu": _swish,
    "hard_swish": _hard_swish,
    "hard_silu": _hard_swish,
    "mish": _mish,
    "gelu": _gelu,
    "leaky_relu": _keras_leaky_relu,
    SOFTMAX: _softmax,
    "log_softmax": _log_softmax,
    "softplus": _plain("Softplus"),
    "softsign": _plain("Softsign"),
    "exponential": _plain("Exp"),
}


# Layers


def activation(make: Maker, x: Value) -> Value:
    """``Activation``."""
    return activated(make, x)


def softmax(make: Maker, x: Value) -> Value:
    """``Softmax``."""
    return _softmax(make, x, make.settings.whole("axis", -1, low=-5))


def elu(make: Maker, x: Value) -> Value:
    """``ELU``."""
    return make.activate(x, "Elu", "", alpha=make.settings.number("alpha", 1.0))


def leaky_relu(make: Maker, x: Value) -> Value:
    """``LeakyReLU``, whose slope is called alpha in Keras 2 and negative_slope in Keras 3."""
    slope = make.settings.number("negative_slope", make.settings.number("alpha", 0.3))
    return make.activate(x, "LeakyRelu", "", alpha=slope)


def prelu(make: Maker, x: Value) -> Value:
    """``PReLU``, with a slope for each channel, or, if no axes are shared, for each place."""
    shared = make.settings.get("shared_axes", [])
    if any(not isinstance(axis, int) or not 1 <= axis < x.rank for axis in shared):
        raise ValueError(f"its shared_axes are {shared}")
    shape = tuple(1 if axis in shared else size for axis, size in enumerate(x.keras_shape, start=1))
    slope = make.read(alpha=shape)["alpha"]
    if x.is_map:
        slope = slope.transpose(2, 0, 1)  # (H, W, C) -> (C, H, W)
    if slope.size == 1 or (slope.shape[0] == x.shape[0] and slope.size == slope.shape[0]):
        return make.node("PRelu", [x], x.shape, {"slope": slope})
    below = make.node("Min", [x], x.shape, {"zero": number(0)}, "below")
    sloped = make.node("Mul", [below], x.shape, {"slope": slope}, "sloped")
    return make.node("Add", [_plain("Relu")(make, x), sloped], x.shape)


def relu(make: Maker, x: Value) -> Value:
    """``ReLU``, as ``backend.relu`` computes it in tf_keras (backend.py)."""
    settings = make.settings
    slope, threshold = settings.number("negative_slope", 0.0), settings.number("threshold", 0.0)
    highest = settings.config.get("max_value")
    top = None if highest is None else settings.number("max_value", 0.0)
    if slope and not threshold and top is None:
        return make.activate(x, "LeakyRelu", "", alpha=slope)
    if threshold:
        above = _thresholded(make, x, threshold)
        positive = above if top is None else _clip(make, above, 0, top, "clip")
    else:
        positive = make.activate(x, "Relu", "") if top is None else _clip(make, x, 0, top, "")
    if not slope:
        return positive
    below = make.node("Sub", [x], x.shape, {"threshold": number(threshold)}, "shifted")
    below = make.node("Min", [below], x.shape, {"zero": number(0)}, "below")
    return make.node("Add", [positive, make.scaled(below, slope, "sloped")], x.shape, part="sum")


def thresholded_relu(make: Maker, x: Value) -> Value:
    """``ThresholdedReLU``."""
    return _thresholded(make, x, make.settings.number("theta", 1.0))


def _thresholded(make: Maker, x: Value, threshold: float) -> Value:
    """X where it is above the threshold, 0 elsewhere; ONNX' comparisons have no gradient."""
    above = make.node("Sub", [x], x.shape, {"threshold": number(threshold)}, "above")
    step = _clip(make, make.scaled(above, _HUGE, "huge"), 0, 1, "step")
    return _product(make, x, step, "thresholded")


_LAYERS: dict[str, Activation] = {
    "ReLU": relu,
    "LeakyReLU": leaky_relu,
    "ThresholdedReLU": thresholded_relu,
    "ELU": elu,
    "Softmax": softmax,
}
"""Layers that people give as activations of others; those with weights are none of them."""
