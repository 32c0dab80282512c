"""The oracle of the conversion: real Keras 2 builds keras-vggface's ResNet-50, saves it and predicts with it.

Run as ``python tests/keras_files.py FOLDER``, in a process of its own, since TensorFlow takes seconds and gigabytes. It
leaves in the folder

- ``whole.h5``, ``weights.h5``, ``notop.h5``: the whole saved model, its weights, and those without the classifier;
- ``oracle.npz``: ``images`` (N, 3, 224, 224) uint8 RGB, and what Keras predicts for them: ``features`` (N, 2048) and
  ``probabilities`` (N, 8631), both float32;
- ``keras3.keras``: a dense layer, as Keras 3 writes it.

Written from the layer calls that github.com/rcmalli/keras-vggface (models.py) makes, so it shares nothing with convert.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras as keras3
import numpy as np
import tf_keras as keras

BGR_MEAN = (91.4953, 103.8827, 131.0912)
IMAGES = 3
SEED = 20_260


def _conv_bn(
    x: Any, name: str, filters: int, size: int, strides: int = 1, padding: str = "valid", epsilon: float = 1e-3
) -> Any:
    layers = keras.layers
    x = layers.Conv2D(filters, size, strides=strides, padding=padding, use_bias=False, name=name)(x)
    return layers.BatchNormalization(axis=3, epsilon=epsilon, name=f"{name}/bn")(x)


def _block(x: Any, stage: int, block: int, width: int, strides: int, squeeze: bool) -> Any:
    layers = keras.layers
    name = f"conv{stage}_{block}"
    epsilon = 1e-4 if squeeze else 1e-3
    y = layers.Activation("relu")(_conv_bn(x, f"{name}_1x1_reduce", width, 1, strides, epsilon=epsilon))
    y = layers.Activation("relu")(_conv_bn(y, f"{name}_3x3", width, 3, padding="same", epsilon=epsilon))
    y = _conv_bn(y, f"{name}_1x1_increase", 4 * width, 1, epsilon=epsilon)
    if squeeze:
        weights = layers.Reshape((1, 1, 4 * width))(layers.GlobalAveragePooling2D()(y))
        weights = layers.Activation("relu")(layers.Conv2D(width // 4, 1, name=f"{name}_1x1_down")(weights))
        weights = layers.Activation("sigmoid")(layers.Conv2D(4 * width, 1, name=f"{name}_1x1_up")(weights))
        y = layers.multiply([y, weights])
    shortcut = _conv_bn(x, f"{name}_1x1_proj", 4 * width, 1, strides, epsilon=epsilon) if block == 1 else x
    return layers.Activation("relu")(layers.add([y, shortcut]))


def resnet(classes: int = 8631, squeeze: bool = False) -> keras.Model:
    """Builds keras-vggface's ResNet-50, or its SENet-50."""
    layers = keras.layers
    image = layers.Input((224, 224, 3))
    x = layers.Activation("relu")(_conv_bn(image, "conv1/7x7_s2", 64, 7, 2, "same", 1e-4 if squeeze else 1e-3))
    x = layers.MaxPooling2D((3, 3), strides=(2, 2))(x)
    for place, count in enumerate((3, 4, 6, 3)):
        for block in range(1, count + 1):
            strides = 2 if place > 0 and block == 1 else 1
            x = _block(x, place + 2, block, 64 << place, strides, squeeze)
    x = layers.AveragePooling2D((7, 7), name="avg_pool")(x)
    x = layers.Dense(classes, activation="softmax", name="classifier")(layers.Flatten()(x))
    return keras.Model(image, x, name="vggface_resnet50")


def randomise(model: keras.Model, rng: np.random.Generator) -> None:
    """Sets weights with which every mistake shows and the features stay of the order of one.

    Kernels are random, so not symmetric in height and width; BatchNorm statistics are far from 0 and 1; the branches of
    a block are damped, or 16 sums would grow out of proportion.
    """
    for layer in model.layers:
        shapes = [weight.shape for weight in layer.weights]
        if isinstance(layer, keras.layers.BatchNormalization):
            (size,) = shapes[0]
            damping = 0.4 if "increase" in layer.name else 1.0
            gamma = damping * rng.uniform(0.6, 1.4, size)
            layer.set_weights([gamma, rng.normal(0, 0.2, size), rng.normal(0, 0.2, size), rng.uniform(0.5, 1.5, size)])
        elif shapes:
            kernel, *bias = shapes
            damping = {"conv1/7x7_s2": 1 / 64, "classifier": 0.1}.get(layer.name, 1.0)
            scale = damping * np.sqrt(2 / np.prod(kernel[:-1]))
            layer.set_weights(
                [rng.standard_normal(kernel, np.float32) * np.float32(scale)]
                + [rng.normal(0, 0.1, shape) for shape in bias]
            )


def main(folder: Path) -> None:
    """Writes all files to ``folder``."""
    rng = np.random.default_rng(SEED)
    model = resnet()
    randomise(model, rng)
    model.save(folder / "whole.h5")
    model.save_weights(folder / "weights.h5")
    keras.Model(model.input, model.get_layer("avg_pool").output).save_weights(folder / "notop.h5")

    images = rng.integers(0, 256, (IMAGES, 3, 224, 224), np.uint8)
    images[1] = images[1, :, ::28, ::28].repeat(28, 1).repeat(28, 2)  # not only noise: patches as well
    images[2] = 255
    both = keras.Model(model.input, [model.layers[-2].output, model.output])
    bgr = images[:, ::-1].transpose(0, 2, 3, 1) - np.array(BGR_MEAN, np.float32)
    features, probabilities = both.predict(bgr, verbose=0)
    np.savez(folder / "oracle.npz", images=images, features=features, probabilities=probabilities)

    keras3.Sequential([keras3.layers.Input((4,)), keras3.layers.Dense(3)]).save(folder / "keras3.keras")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
