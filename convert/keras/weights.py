"""Finds and reads the weights of one layer, in each of the ways in which Keras stores them."""

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from convert.keras.graph import brief
from convert.plain.network import MAX_WEIGHTS, check_size
from facecls.errors import UserError

Array = NDArray[np.float32]
Scopes = dict[str, dict[str, Any]]
"""By the name of a layer, with what Keras puts before it: datasets by name."""
_OLD_NAMES = {"depthwise_kernel": "kernel", "moving_mean": "running_mean", "moving_variance": "running_std"}
"""Other names of weights: in Keras 3, and in Keras 1, whose ``running_std`` holds the variance."""
_COUNT = "count"
"""How many images the statistics of ``Normalization`` come from, an integer that inference does not need."""
_MAX_PARTS = 8
"""Parts, between slashes, of a layer's name."""
_MAX_EXPANSION, _ALLOWANCE = 32, 2**26
"""HDF5 files can declare weights that they don't store. Trained weights, compressed, are far from 32 times smaller."""
DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError)
"""What h5py raises for a file that is damaged inside."""


class Weights(ABC):
    """The weights of a file.

    Args:
        path: The file.
        file_size: Its bytes.
    """

    def __init__(self, path: Path, file_size: int) -> None:
        self.path = path
        self.limit = largest(file_size)
        self.taken = 0

    @abstractmethod
    def find(self, layer: tuple[str, ...]) -> dict[str, Any]:
        """The datasets of a layer.

        Args:
            layer: Its name, after those of the models in which it is nested.

        Returns:
            Datasets by the names of the weights, or by their numbers, 0, 1, ..., where the file has no names.
        """

    @abstractmethod
    def _all(self) -> Iterator[tuple[str, Any]]:
        """All datasets, each with the name of its layer."""

    @cached_property
    def _found(self) -> list[tuple[str, int, str]]:
        """Of each weight the name of its layer, how many numbers it has, and their type."""
        try:
            return [(layer, math.prod(data.shape), str(data.dtype)) for layer, data in self._all()]
        except DAMAGE as error:
            raise damaged(self.path, error) from None

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all layers that have weights."""
        return tuple(dict.fromkeys(layer for layer, _, _ in self._found))

    @property
    def parameters(self) -> int:
        """How many numbers the file holds as weights."""
        return sum(size for _, size, _ in self._found)

    @property
    def types(self) -> str:
        """The most frequent type of the weights, such as ``float32``."""
        types = Counter(kind for _, _, kind in self._found)
        return types.most_common(1)[0][0] if types else "none"

    def shapes(self, layer: str) -> dict[str, tuple[int, ...]]:
        """The shapes of a layer's weights by name."""
        try:
            found = self.find((layer,))
            return {name: tuple(data.shape) for name, data in found.items() if isinstance(data, h5py.Dataset)}
        except DAMAGE as error:
            raise damaged(self.path, error) from None

    def read(self, layer: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
        """Reads the weights of a layer.

        Args:
            layer: As in ``find``.
            shapes: What the layer needs: the shape by name, in Keras' order.

        Returns:
            The weights by the same names, in Keras' layout: kernels are (H, W, in, out).

        Raises:
            UserError: If one is missing, left over, of another shape, no float, too large, or not finite.
        """
        name = "/".join(layer)
        try:
            found = _named(self.find(layer), tuple(shapes))
            if found.keys() != shapes.keys():
                raise UserError(
                    f"Expected layer {name} to have the weights {', '.join(shapes) or 'none'}, but in {self.path} it "
                    f"has {', '.join(found) or 'none'}; get the file again."
                )
            return {
                weight: self._read(f"{name}/{weight}", found[weight], shape)
                for weight, shape in shapes.items()
                if weight != _COUNT
            }
        except DAMAGE as error:
            raise damaged(self.path, error) from None

    def _read(self, name: str, data: Any, shape: tuple[int, ...]) -> Array:
        check_size(f"weight {name}", shape)
        if not isinstance(data, h5py.Dataset) or tuple(data.shape) != shape or data.dtype.kind != "f":
            what = f"{data.dtype} of shape {data.shape}" if isinstance(data, h5py.Dataset) else "none"
            raise UserError(
                f"Expected weight {name} to be floats of shape {shape}, but in {self.path} it is {what}; get the file "
                "again."
            )
        if data.is_virtual or data.external:
            raise UserError(f"Expected weight {name} in {self.path} itself, but it lies in another file.")
        self.taken += data.size * data.dtype.itemsize
        if self.taken > self.limit:
            raise UserError(
                f"Expected weights of at most {self.limit:,} bytes in a file such as {self.path}, but {name} makes "
                "them more; get the file again."
            )
        with np.errstate(over="ignore"):  # the result is infinite, and is refused
            array: Array = np.asarray(data[()]).astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise UserError(f"Expected finite weights, but {name} in {self.path} holds NaN or Inf; get the file again.")
        return array


def _named(found: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The datasets by the names that are wanted."""
    if all(name.isdigit() for name in found):
        numbered = [found[name] for name in sorted(found, key=int)]
        return dict(zip(names, numbered, strict=True)) if len(numbered) == len(names) else found
    old = {_OLD_NAMES[name]: name for name in names if name in _OLD_NAMES and name not in found}
    return {old.get(name, name): data for name, data in found.items()}


class GroupedWeights(Weights):
    """Weights in one group for each layer of the model, with the names of the variables.

    A nested model has one group, in which the names begin with those of its own layers.

    Args:
        path: The file.
        file_size: Its bytes.
        groups: For each layer of the model, names such as ``conv1/7x7_s2/bn/gamma:0``, and datasets.
    """

    def __init__(self, path: Path, file_size: int, groups: Mapping[str, list[tuple[str, Any]]]) -> None:
        super().__init__(path, file_size)
        self.groups: dict[str, Scopes] = {}
        self.indices: dict[str | None, dict[tuple[str, bool], list[str]]] = {}
        for layer, weights in groups.items():
            scopes = self.groups.setdefault(layer, {})
            for weight, data in weights:
                scope, _, name = weight.rpartition("/")
                scopes.setdefault(scope, {})[name.partition(":")[0]] = data

    def find(self, layer: tuple[str, ...]) -> dict[str, Any]:
        """As in ``Weights``; in a file of weights only, ``layer`` is a single name, and may be nested."""
        scopes = self.groups.get(layer[0])
        if scopes is not None and len(layer) == 1:
            # only the last part says which weight it is: Keras may have added _1 to the layer's name before it
            return {name: data for scope in scopes.values() for name, data in scope.items()}
        if scopes is None:
            scopes = self._all_scopes
        name = layer[-1]
        index = self._index(layer[0], scopes)
        for matches in ([name] if name in scopes else [], index.get((name, False), []), index.get((name, True), [])):
            if len(matches) > 1:
                raise UserError(
                    f"Expected one layer {name} in {self.path}, but there are {' and '.join(matches[:2])}; give its "
                    "layers different names."
                )
            if matches:
                return scopes[matches[0]]
        return {}

    @cached_property
    def _all_scopes(self) -> Scopes:
        return {scope: datas for group in self.groups.values() for scope, datas in group.items()}

    def _index(self, group: str, scopes: Scopes) -> Mapping[tuple[str, bool], list[str]]:
        """Scopes by the names that their layers may have, and whether a number behind the name is left out."""
        key = group if group in self.groups else None
        if key not in self.indices:
            index = self.indices.setdefault(key, {})
            for scope in scopes:
                parts = scope.split("/")[-_MAX_PARTS:]
                for start in range(len(parts)):
                    name = "/".join(parts[start:])
                    index.setdefault((name, False), []).append(scope)
                    plain, _, number = name.rpartition("_")
                    if number.isdigit():
                        index.setdefault((plain, True), []).append(scope)
        return self.indices[key]

    def _all(self) -> Iterator[tuple[str, Any]]:
        """As in ``Weights``."""
        for layer, scopes in self.groups.items():
            for scope, datas in scopes.items():
                name = layer if len(scopes) == 1 else scope
                yield from ((name, data) for data in datas.values() if isinstance(data, h5py.Dataset))


class NumberedWeights(Weights):
    """Weights of a ``.keras`` file: layers are known by their classes and order, weights by their order.

    Args:
        path: The file.
        file_size: Its bytes.
        file: The open HDF5 file inside.
        config: The description of the model.
    """

    def __init__(self, path: Path, file_size: int, file: Any, config: Any) -> None:
        super().__init__(path, file_size)
        self.file = file
        self.places: dict[tuple[str, ...], str] = {(): ""}
        self.entries: dict[tuple[str, ...], Any] = {(): config}

    def find(self, layer: tuple[str, ...]) -> dict[str, Any]:
        """As in ``Weights``."""
        variables = child(self.path, self.file, f"{self._place(layer)}vars")
        return {name: child(self.path, variables, name) for name in variables}

    def _place(self, layer: tuple[str, ...]) -> str:
        """The group of a layer or a model."""
        if layer and layer not in self.places:
            model = layer[:-1]
            before = self._place(model)
            counts: Counter[str] = Counter()
            for entry in self.entries[model]["config"]["layers"]:
                path, kind = (*model, entry["config"]["name"]), _snake_case(entry["class_name"])
                self.places[path] = (
                    f"{before}layers/{kind}_{counts[kind]}/" if counts[kind] else f"{before}layers/{kind}/"
                )
                self.entries[path] = entry
                counts[kind] += 1
        return self.places[layer]

    def _all(self) -> Iterator[tuple[str, Any]]:
        """As in ``Weights``."""
        found: list[tuple[str, Any]] = []
        self.file.visititems(lambda name, data: found.append((name, data)))
        for name, data in found:
            if isinstance(data, h5py.Dataset) and name.startswith("layers/"):
                yield name, data


def largest(file_size: int) -> int:
    """The most bytes of weights that are expected in a file.

    Args:
        file_size: Its bytes.
    """
    return min(MAX_WEIGHTS, _MAX_EXPANSION * file_size + _ALLOWANCE)


def damaged(path: Path, error: Exception) -> UserError:
    """Says that a file is damaged.

    Args:
        path: The file.
        error: What a library says about it.
    """
    return UserError(f"Expected a whole file, but {path} is cut short or damaged ({brief(error)}); get it again.")


def child(path: Path, group: Any, name: str) -> Any:
    """What lies in a group of HDF5; links that lead elsewhere are not followed.

    Args:
        path: The file, for messages.
        group: The group.
        name: The name, which may have slashes.

    Raises:
        UserError: If there is nothing of that name, or only a link.
    """
    for part in name.split("/"):
        if part in ("", "."):
            continue
        link = group.get(part, getlink=True) if isinstance(group, h5py.Group) else None
        if link is None:
            raise UserError(f"{name} is named in {path}, but is not in it; get the file again.")
        if not isinstance(link, h5py.HardLink):
            raise UserError(f"Expected {name} in {path} itself, but there is a link to it; copy it into one file.")
        group = group[part]
    return group


def _snake_case(kind: str) -> str:
    """How Keras makes a name of a class (``to_snake_case`` in tf_keras ``utils/generic_utils.py``)."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", kind))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
