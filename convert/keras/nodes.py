"""Builds plain ONNX nodes from Keras layers: channels first, with the shape of every value.

A Keras value of four dimensions, (N, H, W, C), is (N, C, H, W) here; values of any other number keep their order.
"""

import hashlib
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from convert.keras.graph import Layer
from convert.plain.network import INPUT, MAX_WORK, check_size

Shape = tuple[int, ...]
Arrays = dict[str, NDArray[np.float32]]
Reader = Callable[[Layer, Mapping[str, Shape]], Arrays]
"""Gives a layer's weights; what it needs is named with shapes in Keras' layout and order."""
MAX_WINDOW = 4_096
"""Of kernels, strides, padding and the like, in pixels."""
_HASHED = 16
"""Constants up to this size are settings, and belong to the structure of a network; larger ones are weights."""


@dataclass(frozen=True)
class Value:
    """An output of a node.

    Attributes:
        name: Its name.
        shape: Its shape without the batch, channels first if it is a map.
        structure: A hash of all that computes it, except the values of weights.
    """

    name: str
    shape: Shape
    structure: str

    @property
    def rank(self) -> int:
        """How many dimensions it has, with the batch."""
        return len(self.shape) + 1

    @property
    def is_map(self) -> bool:
        """Whether it is (N, C, H, W)."""
        return self.rank == 4

    @property
    def keras_shape(self) -> Shape:
        """Its shape in Keras, without the batch."""
        return (*self.shape[1:], self.shape[0]) if self.is_map else self.shape

    @property
    def channels(self) -> int:
        """The size of Keras' last axis."""
        return self.keras_shape[-1]

    def axis(self, keras_axis: int) -> int:
        """Where an axis of Keras is here."""
        if not -self.rank < keras_axis < self.rank or keras_axis == 0:
            raise ValueError(f"its axis is {keras_axis}, but its input has the shape (N, {self.keras_shape})")
        axis = keras_axis % self.rank
        return (0, 2, 3, 1)[axis] if self.is_map else axis


@dataclass
class Nodes:
    """Nodes under construction.

    Attributes:
        reader: Gives weights.
        layers: Names of all layers, which no other values or nodes get.
        keras_3: Whether it is Keras 3, in which some defaults differ.
        names: Names of nodes that get other names than those of their layers, and these names.
        nodes: What was built.
        initializers: All constants by name.
        weighted: Names of the nodes with weights, by structure.
        work: Multiplications for one image.
    """

    reader: Reader
    layers: frozenset[str]
    keras_3: bool
    names: Mapping[str, str] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, NDArray[Any]] = field(default_factory=dict)
    weighted: dict[str, str] = field(default_factory=dict)
    work: int = 0
    _taken: set[str] = field(default_factory=lambda: {INPUT})
    _node_names: set[str] = field(default_factory=set)

    def finish_layer(self, name: str, value: Value, first_node: int) -> Value:
        """Gives a layer's output the layer's name, if one of its own nodes, from ``first_node`` on, makes it."""
        for node in self.nodes[first_node:]:
            if node.output[0] == value.name:
                old, new = value.name, _unique(name, self._taken)
                self._taken.add(new)
                for other in self.nodes[first_node:]:
                    for names in (other.input, other.output):
                        names[:] = [new if each == old else each for each in names]
                return Value(new, value.shape, value.structure)
        return value

    def add_work(self, multiplications: int) -> None:
        """Refuses a network that would compute for hours."""
        self.work += multiplications
        if self.work > MAX_WORK:
            raise ValueError(f"the network multiplies more than {MAX_WORK:,} times for an image")

    def node_name(self, layer: str, part: str) -> str:
        """A name for a node that no other has."""
        if part:
            name = _unique(f"{layer}/{part}", self._node_names, self.layers)
        else:
            name = _unique(self.names.get(layer, layer), self._node_names)
        self._node_names.add(name)
        return name

    def value_name(self, name: str) -> str:
        """A name for a value within a layer that no other has."""
        name = _unique(name, self._taken, self.layers)
        self._taken.add(name)
        return name


class Settings:
    """A layer's configuration, read with checks.

    Args:
        config: The configuration.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def get(self, name: str, default: Any) -> Any:
        """A setting; the default also where it is null."""
        value = self.config.get(name)
        return default if value is None else value

    def whole(self, name: str, default: int | None = None, low: int = 1, high: int = 2**28) -> int:
        """A whole number."""
        value = self.get(name, default)
        return _whole(name, value[0] if isinstance(value, list) and len(value) == 1 else value, low, high)

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"its {name} is {value!r}, not a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"its {name} is {value!r}, not true or false")
        return value

    def choice(self, name: str, *allowed: Any) -> Any:
        """One of some values, of which the first is the default."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"its {name} is {value}, not {' or '.join(map(str, allowed))}")
        return value

    def pair(self, name: str, default: Any = None, low: int = 1) -> tuple[int, int]:
        """Height and width."""
        value = self.get(name, default)
        height, width = _two(name, value)
        return _whole(name, height, low, MAX_WINDOW), _whole(name, width, low, MAX_WINDOW)

    def sides(self, name: str, default: int) -> tuple[int, int, int, int]:
        """Sizes at the top, bottom, left and right: one number, ``[height, width]`` or one pair for each of them."""
        value = self.get(name, default)
        (top, bottom), (left, right) = (_two(name, side) for side in _two(name, value))
        return tuple(_whole(name, side, 0, MAX_WINDOW) for side in (top, bottom, left, right))  # type: ignore[return-value]


class Maker:
    """Makes the nodes of one layer.

    Args:
        nodes: Where they go.
        layer: The layer.
    """

    def __init__(self, nodes: Nodes, layer: Layer) -> None:
        self.nodes = nodes
        self.layer = layer
        self.settings = Settings(layer.config)
        self.keras_3 = nodes.keras_3
        self.weighted = ""

    def with_settings(self, config: Mapping[str, Any]) -> "Maker":
        """A maker of further nodes of the same layer, which have other settings and no weights."""
        return Maker(self.nodes, replace(self.layer, config=config))

    def read(self, **shapes: Shape) -> Arrays:
        """Reads the layer's weights, of given shapes in Keras' layout, in Keras' order."""
        for name, shape in shapes.items():
            check_size(f"weight {self.layer.name}/{name}", shape)
        # Keras 3 allows no slashes
        self.weighted = f"{self.layer.path[-1].replace('/', '_')} {shapes}"
        return self.nodes.reader(self.layer, shapes)

    def node(
        self,
        kind: str,
        inputs: Sequence[Value],
        shape: Sequence[int],
        constants: Mapping[str, NDArray[Any] | None] | None = None,
        part: str = "",
        **attributes: Any,
    ) -> Value:
        """Adds a node.

        Args:
            kind: Its ONNX operator.
            inputs: Its inputs.
            shape: The shape of its output without the batch.
            constants: Its further inputs, by name; ``None`` for one that is left out.
            part: What is added to the layer's name to name the node.
            **attributes: Its attributes.

        Returns:
            Its output.
        """
        shape = tuple(int(size) for size in shape)
        constants = constants or {}
        check_size(f"the output of layer {self.layer.name}", shape)
        self.nodes.add_work(math.prod(shape) * _multiplications(constants, attributes))
        structure = self._structure(kind, inputs, constants, attributes)
        named = self.nodes.node_name(self.layer.name, part)
        if self.weighted:
            self.nodes.weighted[structure] = named
        values = [value.name for value in inputs]
        for constant, array in constants.items():
            if array is None:
                values.append("")
                continue
            values.append(_unique(f"{named}/{constant}", self.nodes.initializers))
            self.nodes.initializers[values[-1]] = array
        value = Value(self.nodes.value_name(f"{self.layer.name}/{part or 'linear'}"), shape, structure)
        self.nodes.nodes.append(helper.make_node(kind, values, [value.name], named, **attributes))
        return value

    def _structure(
        self,
        kind: str,
        inputs: Sequence[Value],
        constants: Mapping[str, NDArray[Any] | None],
        attributes: Mapping[str, Any],
    ) -> str:
        described = [
            (
                name,
                array if array is None else (array.shape, array.tolist() if array.size <= _HASHED else self.weighted),
            )
            for name, array in constants.items()
        ]
        what = (kind, [value.structure for value in inputs], described, sorted(attributes.items()), self.weighted)
        return hashlib.sha256(repr(what).encode()).hexdigest()

    # Common parts

    def check_map(self, value: Value) -> None:
        """Refuses an input that is no map, and settings for another order of axes."""
        self.settings.choice("data_format", "channels_last")
        if not value.is_map:
            raise ValueError(f"its input has {value.rank} dimensions, not 4")

    def activate(self, value: Value, kind: str, part: str, **attributes: Any) -> Value:
        """Adds an operator of one input that keeps the shape."""
        return self.node(kind, [value], value.shape, part=part, **attributes)

    def scaled(self, value: Value, factor: float, part: str) -> Value:
        """Multiplies by a number."""
        return self.node("Mul", [value], value.shape, {"factor": number(factor)}, part)

    def to_keras_order(self, value: Value) -> Value:
        """Brings a map to Keras' order, (N, H, W, C)."""
        if not value.is_map or value.shape[1:] == (1, 1):
            return value
        return self.node("Transpose", [value], value.keras_shape, part="channels_last", perm=[0, 2, 3, 1])

    def reshaped(self, value: Value, keras_shape: Sequence[int]) -> Value:
        """Reshapes as Keras does, in its order of values."""
        target = tuple(keras_shape)
        if target == value.keras_shape:
            return value
        value = self.to_keras_order(value)
        if len(target) == 1:
            return self.node("Flatten", [value], target, part="flatten", axis=1)
        if len(target) != 3 or target[:2] == (1, 1):
            if len(target) == 3:
                target = (target[2], 1, 1)
            return self.node("Reshape", [value], target, {"shape": np.array([0, *target])}, "reshape")
        value = self.node("Reshape", [value], target, {"shape": np.array([0, *target])}, "reshape")
        height, width, channels = target
        return self.node("Transpose", [value], (channels, height, width), part="channels_first", perm=[0, 3, 1, 2])


def _multiplications(constants: Mapping[str, NDArray[Any] | None], attributes: Mapping[str, Any]) -> int:
    """How many each number of an operator's output takes."""
    for array in constants.values():
        if array is not None and array.ndim > 1:
            return array.size // len(array)  # (out, in, H, W)
    return math.prod(attributes.get("kernel_shape", ()))


def number(value: float) -> NDArray[np.float32]:
    """A constant of one number."""
    return np.array(value, np.float32)


def pads_of_map(top: int, left: int, bottom: int, right: int) -> NDArray[np.int64]:
    """The padding of a map; negative numbers crop it."""
    return np.array([0, 0, top, left, 0, 0, bottom, right], np.int64)


def _two(name: str, value: Any) -> Sequence[Any]:
    """One thing for both height and width, or two."""
    if isinstance(value, int):
        return value, value
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"its {name} is {value!r}, not one number or two")
    return value


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"its {name} is {value!r}, not a whole number from {low} to {high:,}")
    return value


def _unique(name: str, *taken: Container[str]) -> str:
    while any(name in names for names in taken):
        name += "_"
    return name
