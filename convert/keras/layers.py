"""Keras layers with weights, and those that slide a window, as ONNX nodes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.keras.activations import activated
from convert.keras.nodes import Maker, Value, number, pads_of_map


def conv2d(make: Maker, x: Value) -> Value:
    """``Conv2D``."""
    settings = make.settings
    filters, groups = settings.whole("filters"), settings.whole("groups", 1)
    kernel = settings.pair("kernel_size")
    make.check_map(x)
    if x.channels % groups:
        raise ValueError(f"its groups are {groups}, but its input has {x.channels} channels")
    weights = make.read(kernel=(*kernel, x.channels // groups, filters), **_bias(make, filters))
    weights["kernel"] = weights["kernel"].transpose(3, 2, 0, 1)  # (H, W, in, out) -> (out, in, H, W)
    return activated(make, _convolution(make, x, filters, weights, groups))


def depthwise_conv2d(make: Maker, x: Value) -> Value:
    """``DepthwiseConv2D``."""
    kernel, multiplier = make.settings.pair("kernel_size"), make.settings.whole("depth_multiplier", 1)
    make.check_map(x)
    filters = x.channels * multiplier
    weights = make.read(depthwise_kernel=(*kernel, x.channels, multiplier), **_bias(make, filters))
    weights["depthwise_kernel"] = _depthwise(weights["depthwise_kernel"])
    return activated(make, _convolution(make, x, filters, weights, x.channels))


def separable_conv2d(make: Maker, x: Value) -> Value:
    """``SeparableConv2D``: a depthwise convolution, then one of 1 x 1."""
    settings = make.settings
    kernel, multiplier, filters = (
        settings.pair("kernel_size"),
        settings.whole("depth_multiplier", 1),
        settings.whole("filters"),
    )
    make.check_map(x)
    between = x.channels * multiplier
    weights = make.read(
        depthwise_kernel=(*kernel, x.channels, multiplier),
        pointwise_kernel=(1, 1, between, filters),
        **_bias(make, filters),
    )
    depthwise = {"depthwise_kernel": _depthwise(weights.pop("depthwise_kernel"))}
    x = _convolution(make, x, between, depthwise, x.channels, "depthwise")
    weights["pointwise_kernel"] = weights["pointwise_kernel"].transpose(3, 2, 0, 1)
    return activated(
        make, make.node("Conv", [x], (filters, *x.shape[1:]), weights, kernel_shape=[1, 1], strides=[1, 1], group=1)
    )


def dense(make: Maker, x: Value) -> Value:
    """``Dense``; on a map or on tokens it is a convolution with one pixel."""
    units = make.settings.whole("units")
    weights = make.read(kernel=(x.channels, units), **_bias(make, units))
    weights["kernel"] = weights["kernel"].T  # (in, out) -> (out, in)
    if x.rank == 2:
        return activated(make, make.node("Gemm", [x], (units,), weights, transB=1))
    if x.is_map:
        weights["kernel"] = weights["kernel"][:, :, None, None]
        return activated(make, make.node("Conv", [x], (units, *x.shape[1:]), weights, kernel_shape=[1, 1]))
    if x.rank != 3:
        raise ValueError(f"its input has {x.rank} dimensions")
    weights["kernel"] = weights["kernel"][:, :, None]
    length, channels = x.shape
    x = make.node("Transpose", [x], (channels, length), part="channels_first", perm=[0, 2, 1])
    x = make.node("Conv", [x], (units, length), weights, kernel_shape=[1])
    return activated(make, make.node("Transpose", [x], (length, units), part="channels_last", perm=[0, 2, 1]))


def batch_normalization(make: Maker, x: Value) -> Value:
    """``BatchNormalization``, over the last axis."""
    settings = make.settings
    axis = settings.whole("axis", -1, low=-5)
    if axis % x.rank != x.rank - 1:
        raise ValueError(f"its axis is {axis}, not the last")
    settings.choice("renorm", False)
    size = (x.channels,)
    names = {"gamma": settings.flag("scale", True), "beta": settings.flag("center", True)}
    shapes = {name: size for name, present in names.items() if present}
    weights = make.read(**shapes, moving_mean=size, moving_variance=size)
    ones, zeros = np.ones(size, np.float32), np.zeros(size, np.float32)
    weights = {"gamma": ones, "beta": zeros} | weights
    attributes: dict[str, Any] = {
        "epsilon": settings.number("epsilon", 1e-3),
        "momentum": settings.number("momentum", 0.99),
    }
    if x.rank != 3:
        return make.node("BatchNormalization", [x], x.shape, weights, **attributes)
    length, channels = x.shape
    x = make.node("Transpose", [x], (channels, length), part="channels_first", perm=[0, 2, 1])
    x = make.node("BatchNormalization", [x], x.shape, weights, **attributes)
    return make.node("Transpose", [x], (length, channels), part="channels_last", perm=[0, 2, 1])


def normalization(make: Maker, x: Value) -> Value:
    """``Normalization``, by channel or by one number, with statistics as weights or as settings."""
    settings = make.settings
    settings.choice("invert", False)
    axis = settings.config.get("axis", -1)
    axes = [axis] if isinstance(axis, int) else list(axis or [])
    if [each % x.rank for each in axes] not in ([], [x.rank - 1]):
        raise ValueError(f"its axis is {axis}, not the last")
    size = (x.channels,) if axes else ()
    if settings.config.get("mean") is not None:
        statistics = {name: _constants(make, name, x.channels) for name in ("mean", "variance")}
    else:
        statistics = make.read(mean=size, variance=size, count=())
    mean = _by_channel(statistics["mean"], x)
    # as tf_keras computes it (layers/preprocessing/normalization.py)
    deviation = _by_channel(np.maximum(np.sqrt(statistics["variance"]), np.float32(1e-7)), x)
    x = make.node("Sub", [x], x.shape, {"mean": mean}, "centred")
    return make.node("Div", [x], x.shape, {"deviation": deviation})


def rescaling(make: Maker, x: Value) -> Value:
    """``Rescaling``; what does nothing is left out."""
    scale, offset = (_constants(make, name, x.channels, default) for name, default in (("scale", 1.0), ("offset", 0.0)))
    if (scale != 1).any():
        x = make.node("Mul", [x], x.shape, {"scale": _by_channel(scale, x)}, "scaled")
    if (offset != 0).any():
        x = make.node("Add", [x], x.shape, {"offset": _by_channel(offset, x)}, "shifted")
    return x


def max_pooling2d(make: Maker, x: Value) -> Value:
    """``MaxPooling2D``."""
    kernel, strides = _pool(make, x)
    pads, sizes = _window(make, x, kernel, strides, (1, 1))
    return make.node("MaxPool", [x], (x.channels, *sizes), kernel_shape=kernel, strides=strides, pads=pads)


def average_pooling2d(make: Maker, x: Value) -> Value:
    """``AveragePooling2D``; like Keras, it averages real pixels only, not the padding."""
    kernel, strides = _pool(make, x)
    pads, sizes = _window(make, x, kernel, strides, (1, 1))
    shape = (x.channels, *sizes)
    if pads[:2] == pads[2:]:
        attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "pads": pads}
        return make.node("AveragePool", [x], shape, count_include_pad=0, **attributes)
    # onnx2torch has no average with different padding at both sides: with zeros, divided by the share of real pixels
    ones = make.node("Clip", [x], x.shape, {"min": number(1), "max": number(1)}, "ones")
    average = _zero_padded_average(make, x, kernel, strides, pads, shape, "average")
    share = _zero_padded_average(make, ones, kernel, strides, pads, shape, "share")
    return make.node("Div", [average, share], shape)


def _zero_padded_average(
    make: Maker, x: Value, kernel: list[int], strides: list[int], pads: list[int], shape: Sequence[int], part: str
) -> Value:
    top, left, bottom, right = pads
    padded = (x.channels, x.shape[1] + top + bottom, x.shape[2] + left + right)
    x = make.node("Pad", [x], padded, {"pads": pads_of_map(top, left, bottom, right)}, f"{part}_padded")
    return make.node("AveragePool", [x], shape, part=part, kernel_shape=kernel, strides=strides, pads=[0, 0, 0, 0])


def _pool(make: Maker, x: Value) -> tuple[list[int], list[int]]:
    make.check_map(x)
    kernel = make.settings.pair("pool_size", 2)
    return list(kernel), list(make.settings.pair("strides", kernel))


def _convolution(
    make: Maker, x: Value, filters: int, weights: dict[str, NDArray[np.float32]], groups: int, part: str = ""
) -> Value:
    settings = make.settings
    strides, dilations = list(settings.pair("strides", 1)), list(settings.pair("dilation_rate", 1))
    kernel = list(next(iter(weights.values())).shape[2:])
    pads, sizes = _window(make, x, kernel, strides, dilations)
    attributes: dict[str, Any] = {"dilations": dilations} if max(dilations) > 1 else {}
    attributes |= {"group": groups} if groups > 1 else {}
    return make.node(
        "Conv", [x], (filters, *sizes), weights, part, kernel_shape=kernel, strides=strides, pads=pads, **attributes
    )


def _window(
    make: Maker, x: Value, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The padding of a sliding window, and the height and width of its output.

    TensorFlow's "same" has an output of ceil(size / stride); where the padding is odd, the extra row is at the end
    (tensorflow.org/api_docs/python/tf/nn, "Notes on padding").
    """
    same = make.settings.choice("padding", "valid", "same") == "same"
    befores, afters, sizes = [], [], []
    for size, k, stride, dilation in zip(x.shape[1:], kernel, strides, dilations, strict=True):
        extent = dilation * (k - 1) + 1
        pad = max((math.ceil(size / stride) - 1) * stride + extent - size, 0) if same else 0
        befores.append(pad // 2)
        afters.append(pad - pad // 2)
        sizes.append((size + pad - extent) // stride + 1)
    return befores + afters, sizes


def _bias(make: Maker, filters: int) -> dict[str, tuple[int, ...]]:
    return {"bias": (filters,)} if make.settings.flag("use_bias", True) else {}


def _depthwise(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    """(H, W, in, multiplier) -> (in * multiplier, 1, H, W), the outputs of each channel side by side."""
    height, width, channels, multiplier = kernel.shape
    return kernel.transpose(2, 3, 0, 1).reshape(channels * multiplier, 1, height, width)


def _constants(make: Maker, name: str, channels: int, default: float = 0.0) -> NDArray[np.float32]:
    """One number or one for each channel, from the configuration, in which they may be nested."""
    value = make.settings.get(name, default)
    value = value.get("config", {}).get("value") if isinstance(value, dict) else value
    numbers = np.array(value, np.float32).reshape(-1)
    if numbers.size not in (1, channels) or not np.isfinite(numbers).all():
        raise ValueError(f"its {name} is {value}, not one number or one for each of {channels} channels")
    return numbers


def _by_channel(numbers: NDArray[np.float32], x: Value) -> NDArray[np.float32]:
    """Numbers in a shape that fits the channels of a value."""
    return numbers.reshape((-1, 1, 1) if x.is_map else (-1,))
