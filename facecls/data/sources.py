"""Files in folders and archives: their names in order, and their bytes one by one."""

import gzip
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from facecls.errors import UserError

Read = Callable[[], bytes]
"""Gives the bytes of one file, or raises ``UnreadableError``."""


class UnreadableError(Exception):
    """Why one file among many can't be read, in a few words."""


def walk(folder: Path) -> Iterator[tuple[str, OSError | None]]:
    """The regular files below a folder, sorted by their path as text; linked folders too, but each folder once.

    Only the names in one folder and in those above it are held at a time.

    Args:
        folder: Where to look.

    Yields:
        Each file's path relative to ``folder`` and None, or the path of a folder that can't be listed and why not.
    """
    yield from _below(folder, "", set())


def _below(folder: Path, prefix: str, seen: set[Path]) -> Iterator[tuple[str, OSError | None]]:
    if (real := folder.resolve()) in seen:
        return
    seen.add(real)
    try:
        with os.scandir(folder) as found:
            # with its slash a folder stands where its files' paths belong: a-b/1 < a.jpg < a/1
            names = sorted(entry.name + "/" * entry.is_dir() for entry in found if entry.is_dir() or entry.is_file())
    except OSError as error:
        yield prefix.removesuffix("/"), error
        return
    for name in names:
        if name.endswith("/"):
            yield from _below(folder / name, prefix + name, seen)
        else:
            yield prefix + name, None


def is_clutter(path: str) -> bool:
    """Whether macOS left this file behind.

    Args:
        path: With forward slashes, as in an archive.

    Examples:
        >>> [is_clutter(path) for path in ("faces/1.jpg", "faces/._1.jpg", "__MACOSX/faces/1.jpg", ".DS_Store")]
        [False, True, True, True]
    """
    parts = path.split("/")
    return parts[-1].startswith("._") or parts[-1] == ".DS_Store" or "__MACOSX" in parts


def file_bytes(file: Path) -> bytes:
    """Reads a file.

    Args:
        file: Its path.

    Returns:
        All of it.

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


def tar_members(archive: Path) -> Iterator[tuple[str, Read]]:
    """The regular files in a ``.tar``, gzipped or not, without unpacking it to disk.

    Args:
        archive: Its path.

    Yields:
        Each member's name, and what reads it; that must be called before the next member is asked for.

    Raises:
        UserError: If the archive can't be read, or is damaged or cut; ``Read`` raises it as well.
    """
    with _archive_errors(archive), archive.open("rb") as raw:
        # browsers unpack .tar.gz files without changing their names, so the bytes say what it is
        plain = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
        stream = io.BufferedReader(plain, 1 << 20)
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.isreg():
                    yield member.name, partial(_tar_bytes, archive, tar, member)
                tar.members.clear()  # type: ignore[attr-defined] # else it keeps them all, a kilobyte each
            # tarfile takes a damaged or cut header for the end; what follows the true end is zeros
            stream.seek(tar.offset)
            while rest := stream.read(1 << 20):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("damaged in the middle")


def _tar_bytes(archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with _archive_errors(archive):
        file = tar.extractfile(member)
        assert file is not None  # it is regular
        return file.read()


def zip_members(archive: Path) -> Iterator[tuple[str, Read]]:
    """The files in a ``.zip``, without unpacking it to disk.

    Args:
        archive: Its path.

    Yields:
        Each member's name, and what reads it; that must be called before the next member is asked for.

    Raises:
        UserError: If the archive can't be read.
    """
    with _archive_errors(archive), zipfile.ZipFile(archive) as members:
        for member in members.infolist():
            if not member.is_dir():
                yield member.filename, partial(_zip_bytes, archive, members, member)


def _zip_bytes(archive: Path, members: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    with _archive_errors(archive):
        try:
            return members.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError):  # the last: encrypted or a rare compression
            raise UnreadableError("damaged or encrypted in the archive") from None


@contextmanager
def _archive_errors(archive: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(f"Can't read the archive {archive}: {error}; is the download complete?") from None


@contextmanager
def quiet() -> Iterator[int]:
    """Keeps what libjpeg, libpng and OpenCV say about damaged files off the screen; they write past ``sys.stderr``.

    Yields:
        A file descriptor of what standard error was, for those who have something to say; valid inside only.
    """
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield kept
    finally:
        os.dup2(kept, 2)
        os.close(kept)
