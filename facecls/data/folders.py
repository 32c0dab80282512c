"""Files on disk: those below a folder, and their bytes."""

import os
from collections.abc import Iterator
from pathlib import Path

from facecls.data.archives import UnreadableError

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
        UnreadableError: If it can't be read.
    """
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise UnreadableError("missing file") from None
    except OSError as error:
        raise UnreadableError(f"unreadable ({error.strerror})") from None
    except ValueError:  # a path with a zero byte in it
        raise UnreadableError("missing file") from None


def files_below(folder: Path) -> Iterator[tuple[str, OSError | None]]:
    """Lists the regular files below a folder, sorted by path as text; linked folders too, but each folder once.

    Only the names in one folder and in those above it are held at a time.

    Args:
        folder: The folder.

    Yields:
        Paths relative to it, with forward slashes; a folder that can't be listed comes with its error.
    """
    return _walk(folder, "", set())


def _walk(folder: Path, prefix: str, seen: set[Path]) -> Iterator[tuple[str, OSError | None]]:
    if (real := folder.resolve()) in seen:
        return
    seen.add(real)
    try:
        with os.scandir(folder) as entries:
            # with its slash a folder stands where its files' paths belong: a-b/1 < a.jpg < a/1
            names = sorted(e.name + "/" * e.is_dir() for e in entries if e.is_dir() or e.is_file())
    except OSError as error:
        yield prefix.removesuffix("/"), error
        return
    for name in names:
        if name.endswith("/"):
            yield from _walk(folder / name, prefix + name, seen)
        else:
            yield prefix + name, None
