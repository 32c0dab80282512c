"""Reads an HDF5 file, or the one in a .keras file, as convert will, in a process of its own.

HDF5's C code can crash, hang or take gigabytes where a file is damaged. Then it is this process that ends, and
``h5`` says what is wrong. Run as a script by its path, so it imports nothing of this package:
``python -I probe.py FILE BYTES``, where BYTES are the most that a tensor may have. Ends with status 0 if all
can be read, with 1 and a line on standard output if not.
"""

import errno
import io
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py

_MEMORY = 2**31
"""Bytes for all but the weights; the interpreter and its libraries take half a gigabyte of addresses."""

_WEIGHTS = "model.weights.h5"
"""In a .keras file."""


def main(path: Path, most: int) -> None:
    """Reads a file.

    Args:
        path: The file.
        most: The most bytes that are read at once.
    """
    _limit_memory(_MEMORY + 2 * most)
    if not zipfile.is_zipfile(path):
        with _open(path) as file:
            _read(file, most)
        return
    with zipfile.ZipFile(path) as archive:
        if _WEIGHTS not in archive.namelist() or archive.getinfo(_WEIGHTS).file_size > most:
            return  # which convert will refuse
        content = archive.read(_WEIGHTS)
    with h5py.File(io.BytesIO(content), "r") as file:
        _read(file, most)


def _limit_memory(size: int) -> None:
    with suppress(ImportError, ValueError, OSError):  # there is no such limit on Windows, nor always on macOS
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _open(path: Path) -> Any:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            sys.exit()  # locked by another program, as convert will find
    return h5py.File(path, "r", locking=False)  # a file system without locks


def _read(file: Any, most: int) -> None:
    _read_texts(file)
    group = file
    if isinstance(file.get("model_weights", getlink=True), h5py.HardLink):  # convert will refuse another link
        group = file["model_weights"]
    _read_texts(group)
    group.visititems(lambda _, found: _read_weights(found, most))


def _read_weights(found: Any, most: int) -> None:
    if isinstance(found, h5py.Group):
        _read_texts(found)
    elif isinstance(found, h5py.Dataset) and found.nbytes <= most and not found.is_virtual and not found.external:
        found[()]


def _read_texts(holder: Any) -> None:
    for name in holder.attrs:
        # h5py crashes reading some other types
        if isinstance(holder.attrs.get_id(name).get_type(), h5py.h5t.TypeStringID):
            holder.attrs[name]


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]))
    except Exception as error:
        print(error)
        sys.exit(1)
