"""Keras layers without weights that merge, reshape, pad, crop and pool whole maps, as ONNX nodes."""

import math
from collections.abc import Callable

import numpy as np

from convert.keras.nodes import Maker, Value, number, pads_of_map


def flatten(make: Maker, x: Value) -> Value:
    """``Flatten``."""
    make.settings.choice("data_format", "channels_last")
    return make.reshaped(x, (math.prod(x.shape),))


def reshape(make: Maker, x: Value) -> Value:
    """``Reshape``; one size may be -1."""
    target = make.settings.get("target_shape", [])
    if not isinstance(target, list) or any(not isinstance(size, int) or size < -1 or size == 0 for size in target):
        raise ValueError(f"its target_shape is {target}")
    known, total = math.prod(size for size in target if size != -1), math.prod(x.shape)
    shape = tuple(total // known if size == -1 else size for size in target)
    if target.count(-1) > 1 or math.prod(shape) != total:
        raise ValueError(f"its target_shape is {target}, but its input has the shape (N, {x.keras_shape})")
    return make.reshaped(x, shape)


def permute(make: Maker, x: Value) -> Value:
    """``Permute``."""
    dims = make.settings.get("dims", [])
    if not isinstance(dims, list) or sorted(dims) != list(range(1, x.rank)):
        raise ValueError(f"its dims are {dims}, but its input has the shape (N, {x.keras_shape})")
    here = [0, *(x.axis(axis) for axis in dims)]  # Keras' order -> order of x
    shape = tuple(x.keras_shape[axis - 1] for axis in dims)
    if x.is_map:
        here = [here[axis] for axis in (0, 3, 1, 2)]
        shape = (shape[2], *shape[:2])
    return x if here == list(range(x.rank)) else make.node("Transpose", [x], shape, perm=here)


def concatenate(make: Maker, *xs: Value) -> Value:
    """``Concatenate``."""
    axis = xs[0].axis(make.settings.whole("axis", -1, low=-5))
    rest = {(*x.shape[: axis - 1], *x.shape[axis:]) for x in xs}
    if len({x.rank for x in xs}) > 1 or len(rest) > 1:
        raise ValueError(f"its inputs have the shapes {', '.join(str(x.keras_shape) for x in xs)}")
    shape = list(xs[0].shape)
    shape[axis - 1] = sum(x.shape[axis - 1] for x in xs)
    return make.node("Concat", xs, shape, axis=axis)


def merged(kind: str) -> Callable[..., Value]:
    """``Add``, ``Multiply`` and the like, of any number of inputs of shapes that fit, or of one and a number."""

    def merge(make: Maker, *xs: Value) -> Value:
        if make.layer.numbers:
            return _with_number(make, kind, *xs)
        rank = max(x.rank for x in xs)
        values = [_expanded(make, x, rank) for x in xs]
        x = values[0]
        for place, value in enumerate(values[1:], start=1):
            so_far = np.broadcast_shapes(x.shape, value.shape)
            x = make.node(kind, [x, value], so_far, part="" if place == 1 else f"with_{place}")
        return x

    return merge


def _with_number(make: Maker, kind: str, *xs: Value) -> Value:
    (place, operand), *others = make.layer.numbers
    if others or len(xs) > 1:
        raise ValueError(f"it has {len(xs)} inputs and {len(make.layer.numbers)} numbers")
    (x,) = xs
    if place == 0 and kind == "Sub":
        x, kind = make.scaled(x, -1, "negative"), "Add"
    if place == 0 and kind == "Div":
        x, kind = make.node("Reciprocal", xs, x.shape, part="reciprocal"), "Mul"
    return make.node(kind, [x], x.shape, {"number": number(operand)})


def average(make: Maker, *xs: Value) -> Value:
    """``Average``."""
    if "trainable" not in make.settings.config and "dtype" not in make.settings.config:
        raise ValueError("it is not the layer, but the operation of that name")  # which averages over axes
    return make.scaled(merged("Add")(make, *xs), 1 / len(xs), "average")


def subtract(make: Maker, *xs: Value) -> Value:
    """``Subtract``."""
    if len(xs) + len(make.layer.numbers) != 2:
        raise ValueError(f"it has {len(xs)} inputs, not 2")
    return merged("Sub")(make, *xs)


def _expanded(make: Maker, x: Value, rank: int) -> Value:
    """Gives a value more dimensions as Keras does when it merges: after the batch (tf_keras layers/merging)."""
    if x.rank == rank:
        return x
    missing = (1,) * (rank - x.rank)
    if rank != 4:
        axes = list(range(1, 1 + len(missing)))
        return make.node("Unsqueeze", [x], (*missing, *x.shape), {"axes": np.array(axes)}, "expanded")
    if x.rank == 2:
        return make.node("Unsqueeze", [x], (*x.shape, 1, 1), {"axes": np.array([2, 3])}, "expanded")
    length, channels = x.shape
    x = make.node("Transpose", [x], (channels, length), part="channels_first", perm=[0, 2, 1])
    return make.node("Unsqueeze", [x], (channels, 1, length), {"axes": np.array([2])}, "expanded")


def global_pooling(kind: str) -> Callable[[Maker, Value], Value]:
    """``GlobalAveragePooling2D`` and ``GlobalMaxPooling2D``."""

    def pool(make: Maker, x: Value) -> Value:
        make.check_map(x)
        keep = make.settings.flag("keepdims", False)
        shape = (x.channels, 1, 1) if keep else (x.channels,)
        return make.node(kind, [x], shape, axes=[2, 3], keepdims=int(keep))

    return pool


def zero_padding2d(make: Maker, x: Value) -> Value:
    """``ZeroPadding2D``."""
    return _padded(make, x, *make.settings.sides("padding", 1))


def cropping2d(make: Maker, x: Value) -> Value:
    """``Cropping2D``; as a negative padding, since onnx2torch's slices rest on what torch deprecates."""
    return _padded(make, x, *(-side for side in make.settings.sides("cropping", 0)))


def _padded(make: Maker, x: Value, top: int, bottom: int, left: int, right: int) -> Value:
    make.check_map(x)
    shape = (x.channels, x.shape[1] + top + bottom, x.shape[2] + left + right)
    return make.node("Pad", [x], shape, {"pads": pads_of_map(top, left, bottom, right)}) if shape != x.shape else x


_RESIZING = {
    "nearest": {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    "bilinear": {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
}


def up_sampling2d(make: Maker, x: Value) -> Value:
    """``UpSampling2D``."""
    make.check_map(x)
    height, width = make.settings.pair("size", 2)
    how = _RESIZING[make.settings.choice("interpolation", *_RESIZING)]
    scales = {"roi": None, "scales": np.array([1, 1, height, width], np.float32)}
    return make.node("Resize", [x], (x.channels, x.shape[1] * height, x.shape[2] * width), scales, **how)


def identity(make: Maker, x: Value) -> Value:
    """A layer that does nothing at inference."""
    return x
