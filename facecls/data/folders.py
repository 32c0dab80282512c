"""Files on disk: those below a folder, and their bytes."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from facecls.data.archives import UnreadableError
from facecls.data.limits import LIMITS, raised, too_large
from facecls.files import open_regular

IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".hif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Endings of images, in lower case."""


def expanded(path: str | Path) -> Path:
    """A path with ``~`` replaced by the home folder; one that only begins so, such as ``~1.jpg``, as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user
        return Path(path)


def file_bytes(file: Path) -> bytes:
    """Reads a file on disk.

    Raises:
        UnreadableError: If it can't be read, is no regular file or is too large.
    """
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            data = stream.read(LIMITS.file_bytes + 1) if size <= LIMITS.file_bytes else b""
    except FileNotFoundError:
        raise UnreadableError("a link to nothing" if file.is_symlink() else "missing file") from None
    except OSError as error:
        raise UnreadableError(f"unreadable ({error.strerror})") from None
    except ValueError:  # a path with a zero byte in it
        raise UnreadableError("missing file") from None
    if max(size, len(data)) > LIMITS.file_bytes:
        raise UnreadableError(too_large(max(size, len(data)), "file_bytes", "bytes"))
    return data


def files_below(folder: Path) -> Iterator[tuple[str, OSError | None]]:
    """Lists all below a folder that is no folder, sorted by path as text; linked folders too, but each folder once.

    Only the names in one folder and in those above it are held at a time.

    Args:
        folder: The folder.

    Yields:
        Paths relative to it, with forward slashes, also of links to nothing and of what is no regular file; a folder
        that can't be listed comes with its error.
    """
    return _walk(folder, "", set(), LIMITS.folders)


def _walk(folder: Path, prefix: str, seen: set[str], depth: int) -> Iterator[tuple[str, OSError | None]]:
    if (real := os.path.realpath(folder)) in seen:
        return
    seen.add(real)
    try:
        if not depth:
            raise OSError(
                errno.ELOOP,
                f"more than {LIMITS.folders} folders inside one another; {raised('folders', 10 * LIMITS.folders)}",
            )
        with os.scandir(folder) as entries:
            # with its slash a folder stands where its files' paths belong: a-b/1 < a.jpg < a/1
            names = sorted(entry.name + "/" * _is_folder(entry) for entry in entries)
    except OSError as error:
        yield prefix.removesuffix("/"), error
        return
    for name in names:
        if name.endswith("/"):
            yield from _walk(folder / name, prefix + name, seen, depth - 1)
        else:
            yield prefix + name, None


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself, which reading will tell
        return False
