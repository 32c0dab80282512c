"""Replaces nodes of an ONNX graph, in place."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Shapes = Mapping[str, tuple[int, ...]]
"""By value: its shape without the batch, and those of constants in full."""


class Editor:
    """A graph whose nodes are replaced one after the other.

    Args:
        graph: The graph, changed in place.

    Attributes:
        constants: All initializers by name.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self._values = {name for node in graph.node for name in node.output} | set(self.constants)

    def array(self, value: str) -> NDArray[Any]:
        """A constant."""
        found: NDArray[Any] = numpy_helper.to_array(self.constants[value])
        return found

    def add(self, near: str, array: Any) -> str:
        """Adds a constant, named after a value near it."""
        name = self.unused(f"{near}/constant")
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        self.constants[name] = self.graph.initializer[-1]
        return name

    def unused(self, name: str) -> str:
        """A name that no value has."""
        while name in self._values:
            name += "_"
        self._values.add(name)
        return name

    def chain(self, value: str, output: str, *parts: tuple[Any, ...]) -> list[onnx.NodeProto]:
        """Nodes that are applied one after the other.

        Args:
            value: What the first one reads.
            output: The value of the last one.
            *parts: For each its operator, its further inputs, and its attributes.

        Returns:
            The nodes.
        """
        nodes = []
        for number, (kind, inputs, attributes) in enumerate(parts, start=1):
            end = output if number == len(parts) else self.unused(f"{output}/{kind.lower()}")
            nodes.append(helper.make_node(kind, [value, *inputs], [end], **attributes))
            value = end
        return nodes


Rewrite = Callable[[Editor, onnx.NodeProto, Shapes], "Sequence[onnx.NodeProto] | None"]
"""Returns the nodes that take the place of one, or ``None`` to leave it."""


def rewrite(graph: onnx.GraphProto, rewrites: Mapping[str, Rewrite], shapes: Shapes) -> None:
    """Replaces nodes, in place.

    Args:
        graph: The graph.
        rewrites: What to do, by operator.
        shapes: The shapes of all values; empty if no rewrite needs them.

    Raises:
        ValueError: If a node has a setting that can't be rewritten.
    """
    editor = Editor(graph)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        apply = rewrites.get(node.op_type)
        replaced = apply(editor, node, shapes) if apply else None
        nodes.extend([node] if replaced is None else replaced)
    set_nodes(graph, nodes)


def set_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Gives a graph other nodes, some of which may be its own."""
    copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]  # deleting empties its own
    del graph.node[:]
    graph.node.extend(copied)


def settings_of(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node by name."""
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def set_attributes(node: onnx.NodeProto, **settings: Any) -> None:
    """Sets attributes; ``None`` removes one."""
    kept = [each for each in node.attribute if each.name not in settings]
    made = [helper.make_attribute(name, value) for name, value in settings.items() if value is not None]
    del node.attribute[:]
    node.attribute.extend([*kept, *made])


REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare")
