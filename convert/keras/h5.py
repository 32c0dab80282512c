"""Opens the files that Keras saves, with h5py and without TensorFlow: what they describe, and where their weights are.

Formats: ``save_model_to_hdf5`` and ``save_weights_to_hdf5_group`` of Keras 2 and 3 (tf_keras
``saving/legacy/hdf5_format.py``, keras ``legacy/saving/legacy_h5_format.py``) in all variants since 2018, where
attributes are bytes or str, scalar or array, in one piece or split into ``name0``, ``name1``, ...; and the ``.keras``
zip (``saving/saving_lib.py``).
"""

import errno
import io
import json
import math
import os
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from convert.keras.graph import brief
from convert.keras.weights import DAMAGE, GroupedWeights, NumberedWeights, Weights, child, damaged, largest
from convert.plain.source import digest
from facecls.errors import UserError

_ZIP = b"PK\x03\x04"
_HDF5 = b"\x89HDF\r\n\x1a\n"
_MAX_CONFIG = 2**25
"""Bytes of the JSON; Keras' NASNetLarge has 500,000."""
_MAX_TEXTS = 2**17
"""In an attribute, and weights of a file; one can declare any number, and HDF5 would take memory for them."""
_MAX_MEMBER = 2**30
"""Bytes of weights in a zip, which are read into memory; Keras' largest network, VGG16, has 580 million."""
_SECONDS, _BYTES_A_SECOND = 15, 2**24
"""How long a file may take to be read, at least ten times what it takes."""
_ZIP_DAMAGE = (*DAMAGE, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


@dataclass(frozen=True)
class KerasFile:
    """An open file.

    Attributes:
        path: The file.
        sha256: SHA-256 of its bytes, in hexadecimal.
        version: The version of Keras that wrote it, according to the file.
        config: The description of the model; ``None`` in a file of weights only.
        weights: The weights, not yet read.
    """

    path: Path
    sha256: str
    version: str
    config: dict[str, Any] | None
    weights: Weights


@contextmanager
def open_keras(path: Path) -> Iterator[KerasFile]:
    """Opens a file that Keras saved.

    Args:
        path: A whole model as ``.h5`` or ``.keras``, or weights only as ``.h5``.

    Yields:
        The open file; weights are read one at a time, to save memory.

    Raises:
        UserError: If it is no such file, or is damaged, or another program writes to it.
    """
    _check_is_file(path)
    sha256, head = digest(path, "a Keras file")
    if head.startswith((_ZIP, _HDF5)):
        _probe(path, sha256)
    if head.startswith(_ZIP):
        with _open_zip(path, sha256) as file:
            yield file
        return
    if not head.startswith(_HDF5):
        raise UserError(
            f"Expected an HDF5 file, but {path} begins with {head[:16]!r}; get the .h5 or .keras file again."
        )
    with _open_hdf5(path) as hdf5:
        yield _read_hdf5(path, hdf5, sha256)


def _check_is_file(path: Path) -> None:
    whole = "load it with the Keras that wrote it and save the model whole, model.save('model.h5')"
    if path.is_dir():
        what = "a folder"
        if (path / "saved_model.pb").exists():
            what = "a SavedModel folder"
        elif any(path.glob("*.index")):
            what = "a folder with a TensorFlow checkpoint, which does not describe its network"
        raise UserError(
            f"Expected a Keras file, but {path} is {what}; {whole}, or make an ONNX file of it with tf2onnx."
        )
    index = path.with_name(f"{path.name}.index")
    if path.suffix == ".index" or re.search(r"\.data-\d+-of-\d+$", path.name) or (not path.exists() and index.exists()):
        raise UserError(
            f"Expected a Keras file, but {path} is a TensorFlow checkpoint, which does not describe its network; "
            f"{whole}."
        )
    if not path.is_file():
        raise UserError(
            f"Expected a Keras file at {path}, but there is none; is it misspelt? `python -m facecls.download weights` "
            "(or vgg2_mobilenet) gets one."
        )


@cache
def _probe(path: Path, sha256: str) -> None:
    """Lets another process read a file first (probe.py), once for each content."""
    size = path.stat().st_size
    command = [sys.executable, "-I", str(Path(__file__).with_name("probe.py")), str(path), str(largest(size))]
    seconds = _SECONDS + size / _BYTES_A_SECOND
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # its threads reserve memory
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise damaged(path, OSError(f"HDF5 is not done with it in {seconds:.0f} seconds")) from None
    if done.returncode == 1:
        raise damaged(path, OSError(done.stdout or done.stderr))
    if done.returncode:
        raise damaged(path, OSError("HDF5 crashes over it"))


def _open_hdf5(path: Path) -> Any:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        reason = str(error)
        if "unable to lock file" not in reason and "already open" not in reason:
            raise damaged(path, error) from None
        if error.errno in (errno.EAGAIN, errno.EACCES) or "already open" in reason:
            raise UserError(
                f"Can't read {path}: it is locked, since another program has it open for writing; wait until that has "
                "finished or end it, then try again."
            ) from None
    try:
        return h5py.File(path, "r", locking=False)  # a file system without locks, such as some network drives
    except OSError as error:
        raise damaged(path, error) from None


def _read_hdf5(path: Path, file: Any, sha256: str) -> KerasFile:
    try:
        group = child(path, file, "model_weights") if file.get("model_weights", getlink=True) else file
        names = _texts(group.attrs, "layer_names")
        version = "".join(_texts(group.attrs, "keras_version") or _texts(file.attrs, "keras_version"))
        config = "".join(_texts(file.attrs, "model_config"))
        if not names:
            raise _no_names(path, file)
        weights = GroupedWeights(path, path.stat().st_size, _entries(path, group, names))
    except DAMAGE as error:
        raise damaged(path, error) from None
    return KerasFile(path, sha256, version or "of unknown version", _parse(path, config) if config else None, weights)


def _no_names(path: Path, file: Any) -> UserError:
    if "layers" in file or "_layer_checkpoint_dependencies" in file:
        return UserError(
            f"Expected a whole model, but {path} holds weights only (.weights.h5), which do not describe their "
            "network; save the model whole, model.save('model.keras')."
        )
    return UserError(
        f"Expected a file that Keras saved, but {path} names no layers (no layer_names); save the model whole, "
        "model.save('model.h5')."
    )


def _entries(path: Path, group: Any, names: list[str]) -> dict[str, list[tuple[str, Any]]]:
    """For each layer, the names of its weights, such as ``conv1/7x7_s2/bn/gamma:0``, and their datasets."""
    entries: dict[str, list[tuple[str, Any]]] = {}
    total = 0
    for layer in names:
        holder = child(path, group, layer)
        weights = _texts(holder.attrs, "weight_names")
        total += 1 + len(weights)
        if total > _MAX_TEXTS:
            raise ValueError(f"more than {_MAX_TEXTS:,} weights")
        entries[layer] = [(weight, child(path, holder, weight)) for weight in weights]
    return entries


def _texts(attributes: Any, name: str) -> list[str]:
    """The strings of an attribute, in whichever form they were written; empty if there is no such attribute."""
    parts = [name]
    if name not in attributes:
        parts = list(takewhile(attributes.__contains__, (f"{name}{part}" for part in count())))
    values: list[Any] = []
    for part in parts:
        stored = attributes.get_id(part)
        size, texts = stored.get_type().get_size(), math.prod(stored.shape)
        if texts > _MAX_TEXTS or texts * size > _MAX_CONFIG:
            raise ValueError(f"{part} has the shape {stored.shape}")
        if texts and not isinstance(stored.get_type(), h5py.h5t.TypeStringID):  # h5py crashes reading some others
            raise ValueError(f"{part} is no text")
        values += np.atleast_1d(attributes[part]).tolist() if texts else []
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _parse(path: Path, config: str | bytes) -> dict[str, Any]:
    try:
        if len(config) > _MAX_CONFIG:
            raise ValueError(f"{len(config):,} characters")
        parsed = json.loads(config)
        if not isinstance(parsed, dict):
            raise ValueError(f"it is {config[:20]!r}")
        return parsed
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"Expected a description of the model in {path}, but it can't be understood ({brief(error)}); get the file "
            "again."
        ) from None


@contextmanager
def _open_zip(path: Path, sha256: str) -> Iterator[KerasFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            if not {"config.json", "model.weights.h5"} <= set(archive.namelist()):
                raise UserError(
                    f"Expected config.json and model.weights.h5, as in a .keras file, but {path} is a zip without "
                    "them; save the model whole, model.save('model.keras')."
                )
            config = _parse(path, _member(path, archive, "config.json"))
            metadata = (
                _parse(path, _member(path, archive, "metadata.json")) if "metadata.json" in archive.namelist() else {}
            )
            content = io.BytesIO(_member(path, archive, "model.weights.h5"))
        version = metadata.get("keras_version")
        file = h5py.File(content, "r")
    except _ZIP_DAMAGE as error:
        raise damaged(path, error) from None
    with file:
        weights = NumberedWeights(path, path.stat().st_size, file, config)
        yield KerasFile(path, sha256, str(version or "of unknown version"), config, weights)


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > min(_MAX_MEMBER, largest(path.stat().st_size)):
        raise UserError(f"Expected contents that fit the file, but {name} in {path} unpacks to {size:,} bytes.")
    with archive.open(name) as stream:
        return stream.read(size)
