"""The networks of keras-vggface, which files of weights only do not describe.

Source: ``RESNET50``, ``SENET50`` and ``VGG16`` in github.com/rcmalli/keras-vggface, ``keras_vggface/models.py``. Names
and settings are those that Keras writes, so that these descriptions and a saved model are converted by the same code.
Layers without weights have names of our own where Keras numbers them in the order of their creation.
"""

from collections.abc import Iterator
from typing import Any

from convert.keras.graph import INPUT_KIND, Layer

CLASSIFIER = "classifier"
STAGES = ((2, 3, 64), (3, 4, 128), (4, 6, 256), (5, 3, 512))
"""By stage: its number in layer names, how many blocks it has, and the channels of its 3x3 convolutions."""
EXPANSION = 4
"""A block's output has this many times the channels of its 3x3 convolution."""

_SQUEEZE = 16
"""An SE block has one of this many channels (``compress_rate``)."""
_VGG16 = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
"""By stage: how many convolutions it has, and their channels."""
_VGG16_DENSE = 4096
"""Features of its dense layers."""
_INPUT = "input_1"


def resnet50() -> list[Layer]:
    """The layers of VGGFace2's ResNet-50 up to its last map."""
    return list(_resnet(epsilon=1e-3, squeeze=False))


def senet50() -> list[Layer]:
    """The layers of VGGFace2's SENet-50 up to its last map."""
    return list(_resnet(epsilon=1e-4, squeeze=True))


def resnet_pool(source: str) -> list[Layer]:
    """The layer after the last map ``source``, which gives the 2048 features of images of any size."""
    return [_layer("avg_pool", "GlobalAveragePooling2D", source)]


def resnet_classifier(source: str, classes: int) -> list[Layer]:
    """The classifier on the features ``source``."""
    return [_layer(CLASSIFIER, "Dense", source, units=classes, activation="softmax")]


def vgg16() -> list[Layer]:
    """The layers of VGGFace's VGG16 up to its last map."""
    layers, source = [_layer(_INPUT, INPUT_KIND)], _INPUT
    for stage, (count, filters) in enumerate(_VGG16, start=1):
        for place in range(1, count + 1):
            layers.append(_conv(f"conv{stage}_{place}", source, filters, 3, activation="relu"))
            source = layers[-1].name
        layers.append(_layer(f"pool{stage}", "MaxPooling2D", source, pool_size=[2, 2], strides=[2, 2], padding="valid"))
        source = layers[-1].name
    return layers


def vgg16_top(source: str) -> list[Layer]:
    """The two dense layers after the last map ``source``."""
    return [
        _layer("flatten", "Flatten", source),
        _layer("fc6", "Dense", "flatten", units=_VGG16_DENSE),
        _layer("fc6/relu", "Activation", "fc6", activation="relu"),
        _layer("fc7", "Dense", "fc6/relu", units=_VGG16_DENSE),
        _layer("fc7/relu", "Activation", "fc7", activation="relu"),
    ]


def vgg16_classifier(source: str, classes: int) -> list[Layer]:
    """The classifier on the features ``source``."""
    return [
        _layer("fc8", "Dense", source, units=classes),
        _layer("fc8/softmax", "Activation", "fc8", activation="softmax"),
    ]


def _resnet(epsilon: float, squeeze: bool) -> Iterator[Layer]:
    yield _layer(_INPUT, INPUT_KIND)
    stem = "conv1/7x7_s2"
    yield from _conv_bn(stem, _INPUT, STAGES[0][-1], 7, epsilon, strides=2)
    yield _relu(f"{stem}/relu", f"{stem}/bn")
    source = "max_pooling2d_1"
    yield _layer(source, "MaxPooling2D", f"{stem}/relu", pool_size=[3, 3], strides=[2, 2], padding="valid")
    for stage, blocks, width in STAGES:
        for place in range(1, blocks + 1):
            strides = 2 if place == 1 and stage > STAGES[0][0] else 1
            name = f"conv{stage}_{place}"
            yield from _residual(name, source, width, epsilon, strides)
            if squeeze:
                yield from _squeezed(name, f"{name}_1x1_increase/bn", EXPANSION * width)
            shortcut = source
            if place == 1:
                yield from _conv_bn(f"{name}_1x1_proj", source, EXPANSION * width, 1, epsilon, strides)
                shortcut = f"{name}_1x1_proj/bn"
            yield _layer(f"{name}/add", "Add", f"{name}/scaled" if squeeze else f"{name}_1x1_increase/bn", shortcut)
            yield _relu(f"{name}/relu", f"{name}/add")
            source = f"{name}/relu"


def _residual(name: str, source: str, width: int, epsilon: float, strides: int) -> Iterator[Layer]:
    for part, filters, size in (("1x1_reduce", width, 1), ("3x3", width, 3), ("1x1_increase", EXPANSION * width, 1)):
        here = f"{name}_{part}"
        yield from _conv_bn(here, source, filters, size, epsilon, strides if part == "1x1_reduce" else 1)
        if part != "1x1_increase":
            yield _relu(f"{here}/relu", f"{here}/bn")
            source = f"{here}/relu"


def _squeezed(name: str, source: str, channels: int) -> Iterator[Layer]:
    down, up = f"{name}_1x1_down", f"{name}_1x1_up"
    yield _layer(f"{name}/pool", "GlobalAveragePooling2D", source)
    yield _layer(f"{name}/reshape", "Reshape", f"{name}/pool", target_shape=[1, 1, channels])
    yield _conv(down, f"{name}/reshape", channels // _SQUEEZE, 1)
    yield _relu(f"{down}/relu", down)
    yield _conv(up, f"{down}/relu", channels, 1)
    yield _layer(f"{up}/sigmoid", "Activation", up, activation="sigmoid")
    yield _layer(f"{name}/scaled", "Multiply", source, f"{up}/sigmoid")


def _conv_bn(name: str, source: str, filters: int, size: int, epsilon: float, strides: int = 1) -> Iterator[Layer]:
    yield _conv(name, source, filters, size, strides=strides, use_bias=False)
    yield _layer(f"{name}/bn", "BatchNormalization", name, axis=3, epsilon=epsilon, momentum=0.99)


def _conv(name: str, source: str, filters: int, size: int, **settings: Any) -> Layer:
    # for 1x1 kernels "same" and "valid" are alike
    return _layer(name, "Conv2D", source, filters=filters, kernel_size=[size, size], padding="same", **settings)


def _relu(name: str, source: str) -> Layer:
    return _layer(name, "Activation", source, activation="relu")


def _layer(name: str, kind: str, *sources: str, **settings: Any) -> Layer:
    return Layer(name, kind, settings, sources, (name,))
