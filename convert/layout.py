"""The layers of keras-vggface's VGGFace2 ResNet-50, which a weights-only file does not describe.

Source: ``RESNET50`` in github.com/rcmalli/keras-vggface, ``keras_vggface/models.py``. Names and settings are those that
Keras writes into ``model_config``, so that this description and a saved model are converted by the same code.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SIZE = 224
"""Height and width of the input in pixels."""
CLASSES = 8631
"""Identities in the training set of VGGFace2."""
CLASSIFIER = "classifier"
STAGES = ((2, 3, 64), (3, 4, 128), (4, 6, 256), (5, 3, 512))
"""By stage: its number in layer names, how many blocks it has, and the channels of its 3x3 convolutions."""
EXPANSION = 4
"""A block's output has this many times the channels of its 3x3 convolution."""
FEATURES = EXPANSION * STAGES[-1][-1]

KINDS = (
    "InputLayer",
    "Conv2D",
    "BatchNormalization",
    "Activation",
    "ReLU",
    "Add",
    "MaxPooling2D",
    "AveragePooling2D",
    "GlobalAveragePooling2D",
    "Flatten",
    "Dense",
)
"""Keras classes of layers that can be converted."""


@dataclass(frozen=True)
class Layer:
    """One layer of a Keras graph.

    Attributes:
        name: Its name, which may contain slashes.
        kind: Its Keras class.
        config: Its Keras configuration.
        inputs: Names of its input layers, in order.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class _Conv:
    """A convolution with its BatchNorm: name, kernel size, stride, input and output channels, and input layer."""

    name: str
    size: int
    stride: int
    channels: int
    filters: int
    source: str


_STEM = _Conv("conv1/7x7_s2", 7, 2, 3, STAGES[0][-1], "input_1")


@dataclass(frozen=True)
class _Block:
    """A residual block: its name, its convolutions, and its input layer."""

    name: str
    reduce: _Conv
    middle: _Conv
    increase: _Conv
    projection: _Conv | None
    source: str


def _blocks() -> Iterator[_Block]:
    channels, source = STAGES[0][-1], "max_pooling2d_1"
    for stage, blocks, width in STAGES:
        for place in range(1, blocks + 1):
            name, wide = f"conv{stage}_{place}", EXPANSION * width
            stride = 2 if place == 1 and stage > STAGES[0][0] else 1
            yield _Block(
                name,
                reduce=_Conv(f"{name}_1x1_reduce", 1, stride, channels, width, source),
                middle=_Conv(f"{name}_3x3", 3, 1, width, width, f"{name}_1x1_reduce/relu"),
                increase=_Conv(f"{name}_1x1_increase", 1, 1, width, wide, f"{name}_3x3/relu"),
                projection=_Conv(f"{name}_1x1_proj", 1, stride, channels, wide, source) if place == 1 else None,
                source=source,
            )
            channels, source = wide, f"{name}/relu"


def _convolutions() -> Iterator[_Conv]:
    yield _STEM
    for block in _blocks():
        yield from (block.reduce, block.middle, block.increase)
        if block.projection:
            yield block.projection


def known_shapes(classifier: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights of the network.

    Args:
        classifier: Whether the file has the classifier.

    Returns:
        Shapes in Keras' layout, kernels (H, W, in, out), by weight name, such as ``conv1/7x7_s2/bn/gamma``.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for conv in _convolutions():
        shapes[f"{conv.name}/kernel"] = (conv.size, conv.size, conv.channels, conv.filters)
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            shapes[f"{conv.name}/bn/{name}"] = (conv.filters,)
    if classifier:
        shapes[f"{CLASSIFIER}/kernel"] = (FEATURES, CLASSES)
        shapes[f"{CLASSIFIER}/bias"] = (CLASSES,)
    return shapes


def known_layers(classifier: bool) -> list[Layer]:
    """The layers of the network.

    Args:
        classifier: Whether the file has the classifier.

    Returns:
        The layers, each after its inputs. Layers without weights have names of our own, since Keras numbers them in the
        order of their creation.
    """
    graph = [
        Layer("input_1", "InputLayer", {"batch_input_shape": [None, SIZE, SIZE, 3]}, ()),
        *_conv_bn_relu(_STEM),
        Layer(
            "max_pooling2d_1",
            "MaxPooling2D",
            {"pool_size": 3, "strides": 2, "padding": "valid"},
            (f"{_STEM.name}/relu",),
        ),
    ]
    for block in _blocks():
        graph += [*_conv_bn_relu(block.reduce), *_conv_bn_relu(block.middle), *_conv_bn(block.increase)]
        shortcut = block.source
        if block.projection:
            graph += _conv_bn(block.projection)
            shortcut = f"{block.projection.name}/bn"
        graph.append(Layer(f"{block.name}/add", "Add", {}, (f"{block.increase.name}/bn", shortcut)))
        graph.append(_relu(f"{block.name}/relu", f"{block.name}/add"))
    pool = {"pool_size": 7, "strides": 7, "padding": "valid"}
    graph.append(Layer("avg_pool", "AveragePooling2D", pool, (graph[-1].name,)))
    graph.append(Layer("flatten_1", "Flatten", {}, ("avg_pool",)))
    if classifier:
        graph.append(Layer(CLASSIFIER, "Dense", {"activation": "softmax"}, ("flatten_1",)))
    return graph


def _conv_bn(conv: _Conv) -> list[Layer]:
    # for 1x1 kernels "same" and "valid" are alike; epsilon and momentum are Keras' defaults
    return [
        Layer(conv.name, "Conv2D", {"strides": conv.stride, "padding": "same", "activation": "linear"}, (conv.source,)),
        Layer(f"{conv.name}/bn", "BatchNormalization", {"axis": 3, "epsilon": 1e-3, "momentum": 0.99}, (conv.name,)),
    ]


def _conv_bn_relu(conv: _Conv) -> list[Layer]:
    return [*_conv_bn(conv), _relu(f"{conv.name}/relu", f"{conv.name}/bn")]


def _relu(name: str, source: str) -> Layer:
    return Layer(name, "Activation", {"activation": "relu"}, (source,))
