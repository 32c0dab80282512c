"""Reading regular files alone, writing files so that nothing half written is ever seen, never over an input."""

import errno
import glob
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from facecls.errors import UNSUPPORTED, UserError

_LONGEST = 40
"""Characters of a file's name that its temporary file repeats; a name may have 255 bytes in all."""
NOT_REGULAR = "a device, pipe or socket"
"""Why something that has a path is no file."""


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading, without waiting for a writer as a named pipe would.

    Args:
        path: A regular file, or a link to one.

    Returns:
        A buffered stream of its bytes.

    Raises:
        OSError: If it can't be opened, or is a folder, device, pipe or socket; ``strerror`` says which.
        ValueError: If there is a zero byte in the path.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device that is not there
            raise OSError(errno.ENXIO, NOT_REGULAR, str(path)) from None
        raise
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.ENXIO, NOT_REGULAR, str(path))


@contextmanager
def replacing(dest: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``dest`` to write to, and renames it to ``dest`` if the body succeeds.

    If the body fails, the temporary file is removed and ``dest`` stays as it was.

    Args:
        dest: The file to create or replace; its folder must exist.

    Yields:
        The temporary path, on the same file system as ``dest``; it exists and is empty.

    Raises:
        UserError: If the folder is missing or not writable, or the disk is full.
    """
    try:
        if dest.is_dir():
            raise UserError(f"Expected a file to write to, but {dest} is a folder; name a file in it.")
        part = _create_beside(dest)
    except OSError as error:
        raise UserError(f"Can't write {dest}: {error.strerror}; name a folder that exists and is writable.") from None
    try:
        yield part
        with part.open("r+b") as stream:
            sync(stream)
        with _where_supported():
            part.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        part.replace(dest)
    except OSError as error:
        raise UserError(
            f"Can't write {dest}: {error.strerror or error}; free some space or name another place."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def remove_parts(place: Path) -> None:
    """Removes what processes that were killed had half written; for the one process that holds the place's lock.

    Args:
        place: A file that is written by way of ``replacing``, or a folder of such files, at any depth.
    """
    if place.is_dir():
        parts = place.rglob(".*.part")
    elif len(place.name) <= _LONGEST:  # else it could be another file's, whose name begins as this one's
        parts = place.parent.glob(f".{glob.escape(place.name)}.*.part")
    else:
        return
    for part in parts:
        with suppress(OSError):  # what can't be removed harms nobody
            part.unlink()


def make_folder(folder: Path) -> None:
    """Creates a folder and those above it, unless it is there.

    Args:
        folder: The folder.

    Raises:
        UserError: If it can't be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Can't create the folder {folder}: {error.strerror}; name a place that is writable.") from None


def check_no_input(dest: Path, inputs: Iterable[str | Path]) -> None:
    """Refuses to write over an input.

    Args:
        dest: The file to write.
        inputs: What the command reads; any of it may be missing.

    Raises:
        UserError: If ``dest`` is one of them, by whatever name.
    """
    for each in map(Path, inputs):
        if resolved(each) == resolved(dest) or (_exists(each) and _exists(dest) and each.samefile(dest)):
            raise UserError(
                f"Expected another file to write than those that are read, but {dest} is both; name another."
            )


def resolved(path: str | Path) -> Path:
    """A path without links in it; one of links in a circle, at which ``Path.resolve`` fails, as far as that goes."""
    return Path(os.path.realpath(path))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long
        return False


def sync(stream: BinaryIO) -> None:
    """Waits until a file is on the disk: some file systems say only now that they are full.

    Args:
        stream: Open for writing, and flushed.

    Raises:
        OSError: If it can't be written.
    """
    with _where_supported():
        os.fsync(stream.fileno())


def _create_beside(dest: Path) -> Path:
    """An empty file for what will become another one."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{dest.name[:_LONGEST]}.", suffix=".part", dir=dest.parent)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        # no file can be created exclusively here, so the number of the process must keep it apart
        part = dest.with_name(f".{dest.name[:_LONGEST]}.{os.getpid()}.part")
        part.touch()
        return part
    os.close(handle)
    return Path(name)


@contextmanager
def _where_supported() -> Iterator[None]:
    """Does without a call that a file system does not have."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
