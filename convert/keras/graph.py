"""Reads the description of a Keras model as a list of layer calls, each after those whose outputs it takes.

Functional and Sequential models nest to any depth; nested models are flattened. A layer that is called several times
gives a step for each call. Formats: Keras 2 (``inbound_nodes`` of ``[name, node, tensor, arguments]``) and Keras 3
(``keras_history`` in tensors).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from facecls.errors import UserError

INPUT_KIND = "InputLayer"
_FUNCTIONAL = ("Functional", "Model")
_SEQUENTIAL = "Sequential"
MODEL_OUTPUT = "output of a nested model"
"""The kind of the step that stands for a nested model's output, so that it can be named."""
_OWN_BEFORE_KERAS = ("DepthwiseConv2D",)
"""Classes that MobileNets brought along before Keras had them."""
_MAX_STEPS = 5_000
"""Keras' NASNetLarge has 1,041 layers."""
_MAX_DEPTH = 50
_MAX_TEXT = 300
"""Characters of an error that are shown."""


@dataclass(frozen=True)
class Layer:
    """One call of a layer.

    Attributes:
        name: Its name, which may contain slashes, and is unique.
        kind: Its Keras class; with a package in front if it is not Keras' own.
        config: Its Keras configuration.
        inputs: Names of the steps that it takes, in order.
        path: Where its weights are: its own name, after those of the models in which it is nested.
        numbers: Numbers among the arguments of the call, as in ``x + 3``, each with its place among them.
        problem: What else was passed to it, so that it computes something else than on its inputs alone.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    inputs: tuple[str, ...]
    path: tuple[str, ...]
    numbers: tuple[tuple[int, float], ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Graph:
    """The layers of a model.

    Attributes:
        name: The model's name.
        layers: The steps, each after those that it takes.
        outputs: Names of the steps whose outputs are the model's.
        input_shapes: By input: (H, W, C) as the model says, with ``None`` for what is free; empty if it says nothing.
    """

    name: str
    layers: tuple[Layer, ...]
    outputs: tuple[str, ...]
    input_shapes: Mapping[str, tuple[int | None, ...]]

    @property
    def aliases(self) -> frozenset[str]:
        """Names of steps that only stand for the output of a nested model."""
        return frozenset(layer.name for layer in self.layers if layer.kind == MODEL_OUTPUT)


Ref = tuple[str, int, int]
"""A layer's name, the number of its call, and the number of the output."""
_CONSTANT = "_CONSTANT_VALUE"
"""Stands for the name of a layer where a number is the first argument (tf_keras engine/base_layer.py)."""
_OPERANDS = ("", "args", "x1", "x2", "y")
"""Names of arguments whose numbers are operands; the first two are those without a name."""
_OPERATIONS = {
    "__operators__.add": "Add",
    "math.add": "Add",
    "math.subtract": "Subtract",
    "math.multiply": "Multiply",
    "math.truediv": "Divide",
    "math.divide": "Divide",
    "math.maximum": "Maximum",
    "math.minimum": "Minimum",
}
"""Functions of TensorFlow in a ``TFOpLambda``, and the layers that do the same."""
ARITHMETIC = ("Add", "Subtract", "Multiply", "Divide", "TrueDivide", "Maximum", "Minimum")
"""Operations of Keras 3 that do what the layers of these names do."""


def parse_graph(path: Path, model: Any) -> Graph:
    """Reads the description of a model.

    Args:
        path: The file it comes from, for messages.
        model: The description, as JSON gives it.

    Returns:
        The graph.

    Raises:
        UserError: If it is not the description of a functional or sequential model.
    """
    try:
        if not _is_model(model):
            raise ValueError(
                f"the model's class is {_kind(model)}, not Functional or Sequential; where it was loaded, "
                "keras.Model(model.input, model.output) is the same network without the class"
            )
        parser = _Parser(model)
        inputs = parser.add_inputs(model)
        outputs = parser.add_model(model, (), inputs)
        if not outputs:
            raise ValueError("it has no outputs")
        shapes = {name: _input_shape(model, name) for name in inputs}
        name = model["config"].get("name") if isinstance(model["config"], dict) else None
        return Graph(str(name or _SEQUENTIAL.lower()), tuple(parser.layers), tuple(dict.fromkeys(outputs)), shapes)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        reason = brief(error) if type(error) is ValueError else brief(error, type(error).__name__)
        raise UserError(
            f"Expected the description of a functional or sequential Keras model in {path}, but it can't be "
            f"understood: {reason}; save the model whole with the Keras that made it."
        ) from None


def brief(error: Exception, kind: str = "") -> str:
    """What an error says, as a part of a line; a file decides how long it is.

    Args:
        error: The error.
        kind: Its kind, if that says more than the text.
    """
    text = " ".join(str(error).split())
    text = text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."
    return f"{kind}: {text}" if kind else text


class _Parser:
    """Collects steps.

    Args:
        model: The whole model.
    """

    def __init__(self, model: Any) -> None:
        self.layers: list[Layer] = []
        self.names: set[str] = set()
        self.models = 0
        paths = list(islice(_paths(model, ()), _MAX_STEPS + 1))
        _check_count(len(paths))
        self.top = {path[0] for path in paths if len(path) == 1}
        self.counts = Counter(path[-1] for path in paths)

    def add_inputs(self, model: Any) -> list[str]:
        """Adds the model's own inputs."""
        if _kind(model) == _SEQUENTIAL:
            first = _layers(model)[0]
            name = first["config"]["name"] if _kind(first) == INPUT_KIND else "input"
            return [self._add(INPUT_KIND, {}, (), (_text(name),))]
        return [
            self._add(INPUT_KIND, {}, (), (_text(name),)) for name, _, _ in _references(model["config"]["input_layers"])
        ]

    def add_model(self, model: Any, path: tuple[str, ...], inputs: list[str], problem: str = "") -> list[str]:
        """Adds the layers of a model that is called on some steps, and returns the steps of its outputs."""
        if len(path) > _MAX_DEPTH:
            raise ValueError(f"models are nested {_MAX_DEPTH} deep")
        self.models += 1
        _check_count(self.models)  # calls of models multiply with each level
        if _kind(model) == _SEQUENTIAL:
            return self._add_sequential(model, path, inputs, problem)
        return self._add_functional(model, path, inputs, problem)

    def _add_sequential(self, model: Any, path: tuple[str, ...], inputs: list[str], problem: str) -> list[str]:
        for entry in _layers(model):
            if _kind(entry) != INPUT_KIND:
                inputs = self._call(entry, path, inputs, (), problem)
        return inputs

    def _add_functional(self, model: Any, path: tuple[str, ...], inputs: list[str], problem: str) -> list[str]:
        entries = {_own_name(entry): entry for entry in _layers(model)}
        if len(entries) < len(_layers(model)):
            raise ValueError("two layers have the same name")
        own = [name for name, _, _ in _references(model["config"]["input_layers"])]
        values: dict[tuple[str, int], list[str]] = {}
        for name, step in zip(own, inputs, strict=True):
            values[name, 0] = [step]
        calls = {
            (name, index): node
            for name, entry in entries.items()
            if name not in own
            for index, node in enumerate(entry["inbound_nodes"])
        }
        outputs = list(_references(model["config"]["output_layers"]))
        arguments = {call: list(_arguments(node)) for call, node in calls.items()}
        sources = {call: [each for each in given if isinstance(each, tuple)] for call, given in arguments.items()}
        shift = _first_calls([ref for refs in (*sources.values(), outputs) for ref in refs], entries)
        for call in _ordered({call: [(n, i - shift[n]) for n, i, _ in refs] for call, refs in sources.items()}, values):
            name, _ = call
            steps = [values[n, i - shift[n]][tensor] for n, i, tensor in sources[call]]
            given = [each for each in arguments[call] if not isinstance(each, str)]
            numbers = tuple((place, each) for place, each in enumerate(given) if not isinstance(each, tuple))
            problems = [each for each in arguments[call] if isinstance(each, str)]
            values[call] = self._call(entries[name], path, steps, numbers, problem or next(iter(problems), ""))
        return [values[name, index - shift[name]][tensor] for name, index, tensor in outputs]

    def _call(
        self,
        entry: Any,
        path: tuple[str, ...],
        steps: list[str],
        numbers: tuple[tuple[int, float], ...],
        problem: str,
    ) -> list[str]:
        """Adds a call of a layer or a nested model."""
        here = (*path, _own_name(entry))
        if _kind(entry) == INPUT_KIND:
            raise ValueError(f"{here[-1]} is an input that takes the output of a layer")
        if not _is_model(entry):
            config = entry["config"] if isinstance(entry["config"], dict) else {}
            return [self._add(_kind(entry), config, tuple(steps), here, numbers, problem)]
        outputs = self.add_model(entry, here, steps, problem)
        if len(outputs) == 1:
            self._add(MODEL_OUTPUT, {}, tuple(outputs), here)
        return outputs

    def _add(
        self,
        kind: str,
        config: Mapping[str, Any],
        inputs: tuple[str, ...],
        path: tuple[str, ...],
        numbers: tuple[tuple[int, float], ...] = (),
        problem: str = "",
    ) -> str:
        _check_count(len(self.layers) + 1)
        own = path[-1]
        plain = len(path) == 1 or (own not in self.top and self.counts[own] == 1)
        name = first = own if plain else "/".join(path)
        call = 1
        while name in self.names:
            call += 1
            name = f"{first}/{call}"
        self.names.add(name)
        self.layers.append(Layer(name, kind, config, inputs, path, numbers, problem))
        return name


def _check_count(layers: int) -> None:
    if layers > _MAX_STEPS:
        raise ValueError(f"it has more than {_MAX_STEPS:,} layers")


def _is_model(entry: Any) -> bool:
    return isinstance(entry, dict) and _kind(entry) in (*_FUNCTIONAL, _SEQUENTIAL) and "config" in entry


def _kind(entry: Any) -> str:
    """The class of a layer; the module and the registered name tell others' classes and functions from Keras' own."""
    kind, module, registered = (_text(entry.get(key) or "") for key in ("class_name", "module", "registered_name"))
    if kind == "TFOpLambda":
        function = _text(entry["config"]["function"])
        return _OPERATIONS.get(function, f"{kind} of {function}")
    if ".ops" in module:
        return kind if kind in ARITHMETIC else f"{module}.{kind}"
    is_own = ">" in registered or (registered and not is_of_keras(module))
    return f"{registered} of your own" if is_own and kind not in _OWN_BEFORE_KERAS else kind


def is_of_keras(module: str) -> bool:
    """Whether what a module has is Keras' own."""
    return re.match(r"(keras|tf_keras|tensorflow)\b", module) is not None


def _layers(model: Any) -> list[Any]:
    config = model["config"]
    layers = config if isinstance(config, list) else config["layers"]  # a list in Keras before 2.2.3
    if not isinstance(layers, list) or not layers:
        raise ValueError("a model has no layers")
    return layers


def _own_name(entry: Any) -> str:
    return _text(entry.get("name") or entry["config"]["name"])


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1_000:
        raise ValueError(f"{str(value)[:50]!r} is no name")
    return value


def _paths(model: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The names of all layers and nested models, each after those in which it is nested."""
    if len(path) > _MAX_DEPTH:
        raise ValueError(f"models are nested {_MAX_DEPTH} deep")
    for entry in _layers(model):
        here = (*path, _own_name(entry))
        yield here
        if _is_model(entry):
            yield from _paths(entry, here)


def _references(node: Any) -> Iterator[Ref]:
    """The tensors that are named, in their order, however they are nested."""
    return (each for each in _arguments(node) if isinstance(each, tuple))


def _arguments(node: Any) -> Iterator[Ref | float | str]:
    """What a call takes, in its order, however it is nested: tensors, numbers, and what can't be told in a graph."""
    stack = [("", node)]
    while stack:
        key, node = stack.pop()
        if isinstance(node, dict):
            if "keras_history" in node:
                yield _reference(node["keras_history"])
            elif "class_name" in node:
                stack.append((key, node.get("config")))
            elif "kwargs" in node:  # of Keras 3, which at inference overrides what is told by training
                named = {name: value for name, value in (node["kwargs"] or {}).items() if name != "training"}
                stack += [("", named), ("args", node.get("args"))]
            else:
                stack += [(str(name), value) for name, value in reversed(node.items())]
        elif isinstance(node, list):
            if _is_reference(node):
                yield _reference(node)
                node = node[3:]  # other arguments
            elif node[:2] == [_CONSTANT, -1]:
                node = node[2:]
            stack += [(key, each) for each in reversed(node)]
        elif isinstance(node, int | float) and not isinstance(node, bool) and key in _OPERANDS:
            yield float(node)
        elif key == "training" and node is True:
            yield "it is called with training=True"
        elif key not in ("name", "training") and node is not None and node is not False:  # 0 counts
            yield f"it is called with {key or 'the argument'} {brief(ValueError(node))}"


def _is_reference(node: list[Any]) -> bool:
    return len(node) >= 3 and isinstance(node[0], str) and isinstance(node[1], int) and node[1] >= 0


def _reference(node: Any) -> Ref:
    name, index, tensor = node[:3]
    if not isinstance(index, int) or not isinstance(tensor, int) or min(index, tensor) < 0:
        raise ValueError(f"{node!r} does not name a tensor")
    return _text(name), index, tensor


def _first_calls(refs: list[Ref], entries: Mapping[str, Any]) -> dict[str, int]:
    """The number of the first call of each layer: a nested model was called once when it was made."""
    models = {name for name, entry in entries.items() if _is_model(entry)}
    first = {name: int(name in models) for name in entries}
    for name, index, _ in refs:
        if name in models:
            first[name] = min(first[name], index)
    return first


def _ordered(
    sources: Mapping[tuple[str, int], list[tuple[str, int]]], known: Mapping[tuple[str, int], Any]
) -> Iterator[tuple[str, int]]:
    """Calls in the order of the file, but each after those whose outputs it takes."""
    done, entered = set(known), set[tuple[str, int]]()
    for start in sources:
        stack = [start]
        while stack:
            call = stack[-1]
            if call in done:
                stack.pop()
            elif call in entered:
                if any(source not in done for source in sources[call]):
                    raise ValueError(f"layer {call[0]} takes its own output")
                done.add(stack.pop())
                yield call
            else:
                entered.add(call)
                stack += [source for source in reversed(sources[call]) if source not in done]


def _input_shape(model: Any, name: str) -> tuple[int | None, ...]:
    """(H, W, C) of an input as the model says; empty if it does not."""
    entries = _layers(model)
    if _kind(model) != _SEQUENTIAL:
        entries = [entry for entry in entries if _own_name(entry) == name]
    first = entries[0]
    shape = first["config"].get("batch_input_shape") or first["config"].get("batch_shape")
    if shape is None and _is_model(first):
        return _input_shape(first, _own_name(_layers(first)[0]))
    if shape is None and isinstance(model["config"], dict):
        shape = model["config"].get("build_input_shape") or (model.get("build_config") or {}).get("input_shape")
    if shape is None:
        return ()
    if not all(size is None or (isinstance(size, int) and size > 0) for size in shape):
        raise ValueError(f"{shape!r} is no shape of images")
    return tuple(shape[1:])
