"""Reads layers and weights from a Keras 2 .h5 file, whole model or weights only, with h5py and without TensorFlow.

The format is that of ``save_model_to_hdf5`` and ``save_weights_to_hdf5_group`` in Keras 2 (tf_keras,
``saving/legacy/hdf5_format.py``) in all variants since 2018: attributes are bytes or str, scalar or array, in one piece
or split into ``name0``, ``name1``, ...
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from convert.keras_graph import parse_graph
from convert.layout import CLASSIFIER, Layer, known_layers, known_shapes
from facecls.errors import UserError

_LFS = b"version https://git-lfs.github.com/spec/v1"
_ZIP = b"PK\x03\x04"
_HDF5 = b"\x89HDF\r\n\x1a\n"
_WEIGHTED = {"Conv2D", "BatchNormalization", "Dense"}
"""Keras classes whose layers have weights in this network."""
_DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError)
"""What h5py raises for a file that is damaged inside."""

Datasets = Mapping[str, Any]
"""The h5py dataset by weight name, such as ``conv1/7x7_s2/bn/gamma``."""


@dataclass(frozen=True)
class KerasFile:
    """An open file that holds every weight of the network, in float32 and the right shape.

    Attributes:
        path: The file.
        sha256: SHA-256 of its bytes, in hexadecimal.
        kind: ``whole model`` or ``weights only``.
        keras_version: The version of Keras that wrote it, according to the file.
        layers: The graph, each layer after its inputs.
        features: Name of the layer whose output is the features.
        output: Name of the last layer: of the classifier, or else the one of the features.
        parameters: Number of parameters.
        datasets: The weights, not yet read.
    """

    path: Path
    sha256: str
    kind: str
    keras_version: str
    layers: list[Layer]
    features: str
    output: str
    parameters: int
    datasets: Datasets

    @property
    def classifier(self) -> bool:
        """Whether there is a classifier on top of the features."""
        return self.features != self.output

    def read(self, weight: str) -> NDArray[np.float32]:
        """Reads one weight in Keras' layout: kernels are (H, W, in, out).

        Raises:
            UserError: If it can't be read or holds NaN or Inf.
        """
        try:
            array: NDArray[np.float32] = self.datasets[weight][()]
        except _DAMAGE as error:
            raise _damaged(self.path, error) from None
        if not np.isfinite(array).all():
            raise UserError(
                f"Expected finite weights, but {weight} in {self.path} holds NaN or Inf; get the file again."
            )
        return array


@contextmanager
def open_keras(path: Path) -> Iterator[KerasFile]:
    """Opens keras-vggface's VGGFace2 ResNet-50 as saved by Keras 2, and checks everything except the values of weights.

    Args:
        path: The .h5 file.

    Yields:
        The open file; weights are read one at a time, to save memory.

    Raises:
        UserError: If it is any other file, or a weight is missing, unknown, of another shape or not float32.
    """
    sha256 = _digest(path)
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise _damaged(path, error) from None
    with file:
        yield _read(path, file, sha256)


def _digest(path: Path) -> str:
    """The SHA-256 of a file, after a look at its first bytes."""
    if not path.is_file():
        raise UserError(
            f"Expected a Keras file at {path}, but there is none; get one with `python -m facecls.download weights`."
        )
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
            stream.seek(0)
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"Can't read {path}: {error.strerror}; check its permissions or copy it to another disk."
        ) from None
    if head.startswith(_LFS):
        raise UserError(
            f"Expected a Keras file, but {path} is only a Git LFS pointer to it; run `git lfs pull` in its repository."
        )
    if head.startswith(_ZIP):
        raise UserError(
            f"Expected a Keras 2 .h5 file, but {path} is a zip, as Keras 3 .keras files are; "
            "save the model as .h5 with Keras 2 (tf_keras)."
        )
    if not head.startswith(_HDF5):
        raise UserError(f"Expected an HDF5 file, but {path} begins with {head[:16]!r}; get the .h5 file again.")
    return sha256


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"Expected a whole HDF5 file, but {path} is cut short or damaged ({error}); get it again.")


def _read(path: Path, file: Any, sha256: str) -> KerasFile:
    try:
        group = file.get("model_weights", file)
        datasets = _datasets(path, group)
        classifier = any(name.startswith(f"{CLASSIFIER}/") for name in datasets)
        _check_shapes(path, datasets, known_shapes(classifier))
        version = "".join(_texts(group.attrs, "keras_version")) or "unknown"
        config = "".join(_texts(file.attrs, "model_config"))
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    if config:
        graph, output = parse_graph(path, config)
    else:
        graph = known_layers(classifier)
        output = graph[-1].name
    _check_weighted(path, graph, datasets)
    if graph[-1].kind == "AveragePooling2D":  # a whole model without its top ends on (N, 1, 1, 2048)
        graph.append(Layer("flatten", "Flatten", {}, (output,)))
        output = "flatten"
    by_name = {layer.name: layer for layer in graph}
    return KerasFile(
        path=path,
        sha256=sha256,
        kind="whole model" if config else "weights only",
        keras_version=version,
        layers=graph,
        features=by_name[CLASSIFIER].inputs[0] if classifier else output,
        output=output,
        parameters=sum(data.size for data in datasets.values()),
        datasets=datasets,
    )


def _texts(attributes: Any, name: str) -> list[str]:
    """The strings of an attribute, in whichever form they were written; empty if there is no such attribute."""
    parts = [name]
    if name not in attributes:
        parts = list(takewhile(attributes.__contains__, (f"{name}{part}" for part in count())))
    values = [value for part in parts for value in np.atleast_1d(attributes[part]).tolist()]
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _datasets(path: Path, group: Any) -> Datasets:
    names = _texts(group.attrs, "layer_names")
    if not names:
        raise UserError(
            f"Expected a file that Keras 2 saved, but {path} names no layers (no layer_names); "
            "Keras 3 files and other HDF5 files can't be converted."
        )
    datasets = {}
    for layer in names:
        for weight in _texts(group[layer].attrs, "weight_names"):
            # only the last part says which weight it is: Keras may have added _1 to the layer's name before it
            name = f"{layer}/{weight.rpartition('/')[2].partition(':')[0]}"
            if weight not in group[layer]:
                raise UserError(f"Weight {name} is named in {path}, but is not in it; get the file again.")
            datasets[name] = group[layer][weight]
    return datasets


def _check_shapes(path: Path, datasets: Datasets, known: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in known if name not in datasets]
    extra = [name for name in datasets if name not in known]
    if missing or extra:
        wrong = [f"{len(missing)} missing, such as {missing[0]}"] if missing else []
        wrong += [f"{len(extra)} unknown, such as {extra[0]}"] if extra else []
        raise UserError(
            f"Expected the {len(known)} weights of keras-vggface's VGGFace2 ResNet-50, but of those in {path} "
            f"{' and '.join(wrong)}; no other architecture (VGG16, SENet-50, another depth) can be converted."
        )
    for name, data in datasets.items():
        if tuple(data.shape) != known[name] or data.dtype != np.float32:
            raise UserError(
                f"Expected weight {name} to be float32 of shape {known[name]}, but in {path} it is {data.dtype} of "
                f"shape {tuple(data.shape)}; use the file of keras-vggface's VGGFace2 ResNet-50."
            )


def _check_weighted(path: Path, graph: list[Layer], datasets: Datasets) -> None:
    in_graph = {layer.name for layer in graph if layer.kind in _WEIGHTED}
    in_file = {name.rpartition("/")[0] for name in datasets}
    if in_graph != in_file:
        odd = min(in_graph ^ in_file)
        where = "has no weights there" if odd in in_graph else "is not in its graph"
        raise UserError(
            f"Expected graph and weights in {path} to have the same layers, but {odd} {where}; get the file again."
        )
