"""The oracle of keras-vggface's networks at their full size, and of the ways in which people keep its ResNet-50.

Run as ``python tests/keras_vggface_files.py FOLDER``, in a process of its own. It leaves in the folder

- ``senet50.h5``, ``senet50_weights.h5``, ``senet50_notop.h5``, ``vgg16_notop.h5``, ``vgg16_notop_weights.h5``;
- ``vgg16.h5`` and ``vgg16_weights.h5`` with classifier, of the widths above, and ``mobilenet.h5``, HSE_FaceRec_tf's;
- of one ResNet-50 with ten classes: ``resnet50.h5``, ``resnet50.keras``, ``keras3.h5``, ``nested.h5``, ``heads.h5``,
  ``free.h5`` without a size, and weights only: ``nested_weights.h5``, ``heads_weights.h5``, ``dim_proj_weights.h5``;
- ``oracle.npz``: ``images`` (N, 3, 224, 224) uint8 RGB and what Keras gives for them: ``senet50`` and ``resnet50``
  features; for their first 64 pixels ``vgg16_notop`` (the last map averaged), ``vgg16`` and ``mobilenet`` features; and
  the classifiers' ``senet50/probabilities``, ``resnet50/probabilities``, ``vgg16/probabilities``.
"""

import sys
from pathlib import Path
from typing import Any

import keras as keras_3
import keras_files
import numpy as np
import tf_keras as keras

IMAGES = 2
VGG16 = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
NARROW_VGG16, NARROW_DENSE = ((2, 3), (2, 4), (3, 5), (3, 6), (3, 7)), 16
VERSION_1, CAFFE = (93.5940, 104.7624, 129.1863), (103.939, 116.779, 123.68)


def vgg16(size: int | None, stages: Any = VGG16, dense: int = 0, classes: int = 10) -> Any:
    """Builds keras-vggface's VGG16, with a classifier if its dense layers have a width."""
    layers = keras.layers
    x = image = layers.Input((size, size, 3))
    for stage, (count, filters) in enumerate(stages, start=1):
        for place in range(1, count + 1):
            x = layers.Conv2D(filters, 3, activation="relu", padding="same", name=f"conv{stage}_{place}")(x)
        x = layers.MaxPooling2D(2, strides=2, name=f"pool{stage}")(x)
    if dense:
        x = layers.Flatten(name="flatten")(x)
        for name in ("fc6", "fc7"):
            x = layers.Activation("relu", name=f"{name}/relu")(layers.Dense(dense, name=name)(x))
        x = layers.Activation("softmax", name="fc8/softmax")(layers.Dense(classes, name="fc8")(x))
    return keras.Model(image, x, name="vggface_vgg16")


def _mobilenet() -> Any:
    """As HSE_FaceRec_tf's, but a tenth as wide."""
    net = keras.applications.MobileNet((64, 64, 3), alpha=0.1, include_top=False, weights=None)
    return keras.Model(net.input, keras.layers.GlobalAveragePooling2D(name="global_pooling")(net.output), name="any")


def _in_keras_3(weights: list[Any]) -> Any:
    """The ResNet-50 as Keras 3 builds it, where names have no slashes."""
    layers = keras_3.layers

    def conv_bn(x: Any, name: str, filters: int, size: int, strides: int = 1) -> Any:
        x = layers.Conv2D(filters, size, strides=strides, padding="same", use_bias=False, name=name)(x)
        return layers.BatchNormalization(name=f"{name}_bn")(x)

    image = layers.Input((224, 224, 3))
    x = layers.ReLU()(conv_bn(image, "conv1_7x7_s2", 64, 7, 2))
    x = layers.MaxPooling2D(3, strides=2)(x)
    for stage, blocks in enumerate((3, 4, 6, 3), start=2):
        for block in range(1, blocks + 1):
            name, width, strides = f"conv{stage}_{block}", 16 << stage, 2 if block == 1 and stage > 2 else 1
            y = layers.ReLU()(conv_bn(x, f"{name}_1x1_reduce", width, 1, strides))
            y = layers.ReLU()(conv_bn(y, f"{name}_3x3", width, 3))
            y = conv_bn(y, f"{name}_1x1_increase", 4 * width, 1)
            shortcut = conv_bn(x, f"{name}_1x1_proj", 4 * width, 1, strides) if block == 1 else x
            x = layers.ReLU()(layers.Add()([y, shortcut]))
    model = keras_3.Model(image, layers.GlobalAveragePooling2D()(x))
    model.set_weights(weights)
    return model


def _prepare(images: np.ndarray, mean: tuple[float, ...], size: int = 224) -> np.ndarray:
    return images[:, ::-1, :size, :size].transpose(0, 2, 3, 1) - np.array(mean, np.float32)


def _predict(model: Any, features: Any, inputs: np.ndarray, name: str) -> dict[str, Any]:
    features, probabilities = keras.Model(model.input, [features, model.output]).predict(inputs, verbose=0)
    return {name: features, f"{name}/probabilities": probabilities}


def main(folder: Path) -> None:
    """Writes all files to ``folder``."""
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (IMAGES, 3, 224, 224), np.uint8)
    layers = keras.layers

    senet = keras_files.resnet(classes=10, squeeze=True)
    keras_files.randomise(senet, rng)
    senet.save(folder / "senet50.h5")
    senet.save_weights(folder / "senet50_weights.h5")
    keras.Model(senet.input, senet.get_layer("avg_pool").output).save_weights(folder / "senet50_notop.h5")
    inputs = _prepare(images, keras_files.BGR_MEAN)
    oracle = {"images": images} | _predict(senet, senet.layers[-2].output, inputs, "senet50")

    whole = vgg16(None)
    keras_files.randomise(whole, rng)
    whole.save(folder / "vgg16_notop.h5")
    whole.save_weights(folder / "vgg16_notop_weights.h5")
    oracle["vgg16_notop"] = whole.predict(_prepare(images, VERSION_1, 64), verbose=0).mean((1, 2))
    narrow = vgg16(64, NARROW_VGG16, NARROW_DENSE)
    keras_files.randomise(narrow, rng)
    narrow.save(folder / "vgg16.h5")
    narrow.save_weights(folder / "vgg16_weights.h5")
    oracle |= _predict(narrow, narrow.get_layer("fc7/relu").output, _prepare(images, VERSION_1, 64), "vgg16")

    mobilenet = _mobilenet()
    for layer in mobilenet.layers:  # randomise takes only BatchNorms with their names and convolutions
        if isinstance(layer, layers.BatchNormalization):
            (size,) = layer.gamma.shape
            values = rng.uniform(0.6, 1.4, size), *rng.normal(0, 0.2, (2, size)), rng.uniform(0.5, 1.5, size)
            layer.set_weights(values)
    mobilenet.save(folder / "mobilenet.h5")
    oracle["mobilenet"] = mobilenet.predict(_prepare(images, CAFFE, 64), verbose=0)

    resnet = keras_files.resnet(classes=10)
    keras_files.randomise(resnet, rng)
    resnet.save(folder / "resnet50.h5")
    resnet.save(folder / "resnet50.keras")
    oracle |= _predict(resnet, resnet.layers[-2].output, inputs, "resnet50")
    flat = keras.Model(resnet.input, resnet.layers[-2].output, name="vggface_resnet50")
    _in_keras_3(flat.get_weights()).save(folder / "keras3.h5")
    nested = keras.Sequential([flat, layers.Dense(2, activation="softmax", name="own")])
    nested.build((None, 224, 224, 3))
    nested.save(folder / "nested.h5")
    nested.save_weights(folder / "nested_weights.h5")
    hidden = layers.Dense(8, activation="relu", name="fc1")(flat.output)
    ends = [layers.Dense(1, activation="sigmoid", name="gender")(hidden), layers.Dense(1, name="age")(hidden)]
    heads = keras.Model(flat.input, ends)
    heads.save(folder / "heads.h5")
    heads.save_weights(folder / "heads_weights.h5")
    hidden = layers.Dense(512, activation="relu", name="dim_proj")(flat.output)
    classes = layers.Dense(10, use_bias=False, activation="softmax", name="classifier")(hidden)
    keras.Model(flat.input, classes).save_weights(folder / "dim_proj_weights.h5")
    last = keras.Model(flat.input, flat.layers[-3].output)
    free = layers.Input((None, None, 3))
    keras.Model(free, layers.GlobalAveragePooling2D()(last(free))).save(folder / "free.h5")
    np.savez(folder / "oracle.npz", **oracle)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
