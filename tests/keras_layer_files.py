"""The oracle of single layers: real Keras 2 and Keras 3 save models with a layer for each case, and predict with them.

Run as ``python tests/keras_layer_files.py FOLDER``, in a process of its own. For each of ``VERSIONS`` and ``SIZES`` it
leaves in the folder ``k2_13.h5``, ``k2_13.keras`` and so on, and ``k2_13.npz`` with ``images`` (2, 3, size, size)
float32 and what Keras gives for each case, channels last, by its name. Each case is a layer of that name behind
``case_``, on a common map or vector.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

VERSIONS = ("k2", "k3")
SIZES = (12, 13)
WINDOWS = [
    (kernel, strides, padding) for kernel in (1, 2, 3, (2, 5)) for strides in (1, 2, 3) for padding in ("same", "valid")
]
ACTIVATIONS = (
    *("linear", "relu", "relu6", "sigmoid", "hard_sigmoid", "tanh", "elu", "selu", "swish", "silu", "gelu", "mish"),
    *("leaky_relu", "softmax", "softplus", "softsign", "exponential", "log_softmax", "hard_silu"),
)
ONLY_KERAS_3 = ("activation_leaky_relu", "activation_log_softmax", "activation_hard_silu", "activation_silu")
CAPPED = {"max_value": 0.3}

Case = Callable[[Any, Any, Any, str], Any]
"""Makes the case's last layer, of the given name, from keras.layers, a map and a vector."""


def _layer(kind: str, *args: Any, **settings: Any) -> Case:
    """A layer on the map."""
    return lambda layers, x, v, name: getattr(layers, kind)(*args, **settings, name=name)(x)


def _on_vector(kind: str, *args: Any, **settings: Any) -> Case:
    return lambda layers, x, v, name: getattr(layers, kind)(*args, **settings, name=name)(v)


def _window_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for kernel, strides, padding in WINDOWS:
        size = kernel if isinstance(kernel, int) else "x".join(map(str, kernel))
        end = f"{size}_{strides}_{padding}"
        window = {"strides": strides, "padding": padding}
        cases[f"conv_{end}"] = _layer("Conv2D", 3, kernel, **window)
        cases[f"max_{end}"] = _layer("MaxPooling2D", kernel, **window)
        cases[f"average_{end}"] = _layer("AveragePooling2D", kernel, **window)
        if kernel == 3:
            cases[f"depthwise_{end}"] = _layer("DepthwiseConv2D", kernel, depth_multiplier=2, **window)
            cases[f"separable_{end}"] = _layer("SeparableConv2D", 5, kernel, depth_multiplier=2, **window)
    for dilation in (2, (1, 3)):
        for padding in ("same", "valid"):
            end = f"dilated_{dilation if isinstance(dilation, int) else 'x'.join(map(str, dilation))}_{padding}"
            settings = {"dilation_rate": dilation, "padding": padding}
            cases[f"conv_{end}"] = _layer("Conv2D", 3, 3, **settings)
            cases[f"depthwise_{end}"] = _layer("DepthwiseConv2D", 3, **settings)
            cases[f"separable_{end}"] = _layer("SeparableConv2D", 5, 3, **settings)
    return cases


def _plain_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {f"activation_{name}": _layer("Activation", name) for name in ACTIVATIONS}
    cases |= {
        "conv_groups": _layer("Conv2D", 6, 3, groups=2, use_bias=False),
        "conv_fused": _layer("Conv2D", 6, 3, activation="relu"),
        "depthwise_fused": _layer("DepthwiseConv2D", 3, activation="tanh", use_bias=False),
        "separable_fused": _layer("SeparableConv2D", 4, 3, activation="elu", use_bias=False),
        "norm": _layer("BatchNormalization", epsilon=0.01),
        "norm_no_scale": _layer("BatchNormalization", scale=False),
        "norm_no_center": _layer("BatchNormalization", center=False),
        "norm_bare": _layer("BatchNormalization", scale=False, center=False, axis=3),
        "norm_vector": _on_vector("BatchNormalization"),
        "relu_capped": _layer("ReLU", **CAPPED),
        "relu_leaky": _layer("ReLU", negative_slope=0.2),
        "relu_leaky_capped": _layer("ReLU", negative_slope=0.2, **CAPPED),
        "relu_threshold": _layer("ReLU", threshold=0.1),
        "relu_threshold_capped": _layer("ReLU", threshold=0.1, **CAPPED),
        "relu_all": _layer("ReLU", threshold=0.1, negative_slope=0.3, **CAPPED),
        "leaky_relu": _layer("LeakyReLU"),
        "leaky_relu_slope": _layer("LeakyReLU", 0.1),
        "elu": _layer("ELU", alpha=0.5),
        "prelu": _layer("PReLU"),
        "prelu_channels": _layer("PReLU", shared_axes=[1, 2]),
        "prelu_rows": _layer("PReLU", shared_axes=[2, 3]),
        "prelu_one": _layer("PReLU", shared_axes=[1, 2, 3]),
        "prelu_vector": _on_vector("PReLU"),
        "softmax": _layer("Softmax"),
        "softmax_rows": _layer("Softmax", axis=1),
        "softmax_vector": _on_vector("Softmax"),
        "upsampling": _layer("UpSampling2D", (2, 3)),
        "upsampling_bilinear": _layer("UpSampling2D", (3, 2), interpolation="bilinear"),
        "padding": _layer("ZeroPadding2D", ((1, 2), (3, 0))),
        "padding_pair": _layer("ZeroPadding2D", (1, 2)),
        "padding_one": _layer("ZeroPadding2D", 1),
        "cropping": _layer("Cropping2D", ((1, 2), (3, 0))),
        "cropping_one": _layer("Cropping2D", 1),
        "global_average": _layer("GlobalAveragePooling2D"),
        "global_average_kept": _layer("GlobalAveragePooling2D", keepdims=True),
        "global_max": _layer("GlobalMaxPooling2D"),
        "global_max_kept": _layer("GlobalMaxPooling2D", keepdims=True),
        "dense_vector": _on_vector("Dense", 5),
        "dense_no_bias": _on_vector("Dense", 5, use_bias=False, activation="sigmoid"),
        "dense_map": _layer("Dense", 5, activation="relu"),
        "dense_flat": lambda layers, x, v, name: layers.Dense(5, name=name)(layers.Flatten()(x)),
        "dense_tokens": lambda layers, x, v, name: layers.Dense(5, name=name)(layers.Reshape((-1, 4))(x)),
        "norm_tokens": lambda layers, x, v, name: layers.BatchNormalization(name=name)(layers.Reshape((-1, 4))(x)),
        "softmax_tokens": lambda layers, x, v, name: layers.Softmax(name=name)(layers.Reshape((-1, 4))(x)),
        "dropout": lambda layers, x, v, name: layers.ReLU(name=name)(layers.Dropout(0.5)(x)),
        "flatten": _layer("Flatten"),
        "flatten_vector": lambda layers, x, v, name: layers.ReLU(name=name)(layers.Flatten()(v)),
        "reshape_vector": _on_vector("Reshape", (1, 1, 6)),
        "reshape_image": _on_vector("Reshape", (1, 2, 3)),
        "reshape_tokens": _layer("Reshape", (-1, 4)),
        "reshape_shuffled": _layer("Reshape", (4, -1)),
        "reshape_map": lambda layers, x, v, name: layers.Reshape((-1, 2, 2), name=name)(layers.Reshape((-1, 4))(x)),
        "shuffle": lambda layers, x, v, name: layers.Reshape((13, 13, 4), name=name)(
            layers.Permute((1, 2, 4, 3))(layers.Reshape((13, 13, 2, 2))(x))
        ),
        "permute": _layer("Permute", (3, 1, 2)),
        "permute_sides": _layer("Permute", (2, 1, 3)),
        "permute_tokens": lambda layers, x, v, name: layers.Permute((2, 1), name=name)(layers.Reshape((-1, 4))(x)),
        "concatenate": lambda layers, x, v, name: layers.Concatenate(name=name)([x, layers.ReLU()(x), x]),
        "concatenate_rows": lambda layers, x, v, name: layers.Concatenate(axis=1, name=name)([x, layers.ReLU()(x)]),
        "concatenate_last_but_one": lambda layers, x, v, name: layers.Concatenate(axis=-2, name=name)([x, x]),
        "concatenate_vectors": lambda layers, x, v, name: layers.Concatenate(name=name)([v, layers.ReLU()(v)]),
        "rescaling": _layer("Rescaling", 0.5, offset=-1.0),
        "rescaling_channels": _layer("Rescaling", [1.0, 0.5, 2.0, 3.0], offset=[0.0, 1.0, 2.0, 3.0]),
        "normalization": _layer("Normalization", mean=[0.1, 0.2, 0.3, 0.4], variance=[1.0, 2.0, 3.0, 0.0]),
        "normalization_one": _layer("Normalization", axis=None, mean=0.5, variance=2.0),
        "normalization_weights": _layer("Normalization"),
        "twice": _twice,
    }
    for kind in ("Add", "Multiply", "Subtract", "Average", "Maximum", "Minimum"):
        cases |= _merging_cases(kind)
    return cases


def _merging_cases(kind: str) -> dict[str, Case]:
    def same(layers: Any, x: Any, v: Any, name: str) -> Any:
        more = [] if kind == "Subtract" else [layers.Activation("tanh")(x)]
        return getattr(layers, kind)(name=name)([x, layers.Activation("elu")(x), *more])

    def pixels(layers: Any, x: Any, v: Any, name: str) -> Any:
        return getattr(layers, kind)(name=name)([x, layers.Reshape((1, 1, 4))(layers.Dense(4)(v))])

    def channels(layers: Any, x: Any, v: Any, name: str) -> Any:
        return getattr(layers, kind)(name=name)([layers.Dense(4)(v), x])

    def tokens(layers: Any, x: Any, v: Any, name: str) -> Any:
        return getattr(layers, kind)(name=name)([x, layers.Reshape((1, 4))(layers.Dense(4)(v))])

    name = kind.lower()
    return {name: same, f"{name}_pixel": pixels, f"{name}_channels": channels, f"{name}_tokens": tokens}


def _twice(layers: Any, x: Any, v: Any, name: str) -> Any:
    """A layer called twice."""
    shared = layers.Conv2D(4, 3, padding="same", activation="tanh", name="shared")
    return layers.ReLU(name=name)(shared(shared(x)))


def cases(version: str, size: int) -> dict[str, Case]:
    """The cases of a version of Keras and a size of images."""
    found = _window_cases() | (_plain_cases() if size == SIZES[1] else {})
    return {
        name: case
        for name, case in found.items()
        if version == "k3" or name not in ONLY_KERAS_3
        if version == "k2" or not name.endswith(("_channels", "_tokens")) or "prelu" in name or "rescaling" in name
    }


def _randomise(keras: Any, model: Any, rng: Any) -> None:
    for layer in model.layers:
        values = []
        for weight in layer.weights:
            shape = tuple(weight.shape)
            if "variance" in weight.name:
                values.append(rng.uniform(0.5, 1.5, shape))
            elif "count" in weight.name:
                values.append(np.zeros(shape, np.int64))
            else:
                values.append(rng.normal(0, 0.4, shape))
        layer.set_weights(values)
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()


def _write(folder: Path, keras: Any, version: str, size: int) -> None:
    rng = np.random.default_rng(size)
    layers = keras.layers
    image = layers.Input((size, size, 3), name="image")
    x = layers.Conv2D(4, 1, name="base")(image)
    v = layers.Dense(6, name="vector")(layers.GlobalAveragePooling2D(name="pooled")(x))
    outputs = {name: case(layers, x, v, f"case_{name}") for name, case in cases(version, size).items()}
    model = keras.Model(image, list(outputs.values()), name="cases")
    _randomise(keras, model, rng)
    name = f"{version}_{size}"
    model.save(folder / f"{name}.h5")
    model.save(folder / f"{name}.keras")
    images = rng.normal(0, 1, (2, size, size, 3)).astype(np.float32)
    predicted = dict(zip(outputs, model(images), strict=True))
    np.savez(folder / f"{name}.npz", images=images.transpose(0, 3, 1, 2), **predicted)


def main(folder: Path) -> None:
    """Writes all files to ``folder``."""
    import keras as keras_3
    import tf_keras as keras_2

    for version, keras in zip(VERSIONS, (keras_2, keras_3), strict=True):
        for size in SIZES:
            _write(folder, keras, version, size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
