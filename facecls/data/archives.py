"""Members of archives, one after the other, without unpacking anything to disk."""

import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from facecls.errors import UserError

Read = Callable[[], bytes]
"""Returns the bytes of one file, or raises ``UnreadableError``."""


class UnreadableError(Exception):
    """One file among many can't be read; the message is the reason in a few words."""


def archive_members(archive: Path) -> Iterator[tuple[str, Read]]:
    """Opens a ``.zip``, or a ``.tar`` that may be gzipped.

    Args:
        archive: Its path.

    Yields:
        Name and reader of each regular file; a reader must be called before the next member is asked for.

    Raises:
        UserError: If the archive can't be read, or is damaged or cut off; readers raise it as well.
    """
    with _archive_errors(archive):
        yield from (_zip_members if archive.suffix.lower() == ".zip" else _tar_members)(archive)


def _tar_members(archive: Path) -> Iterator[tuple[str, Read]]:
    with archive.open("rb") as raw:
        # browsers decompress .tar.gz files without renaming them, so the bytes decide
        plain = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
        stream = io.BufferedReader(plain, 1 << 20)
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.isreg():
                    yield _divided(member.name), partial(_tar_bytes, archive, tar, member)
                tar.members.clear()  # type: ignore[attr-defined] # else it keeps them all, a kilobyte each
            # tarfile takes a damaged or cut header for the end; only zeros follow the true end
            stream.seek(tar.offset)
            while rest := stream.read(1 << 20):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("damaged in the middle")


def _divided(name: str) -> str:
    """A member's name with forward slashes, which some archivers of Windows don't write."""
    return name.replace("\\", "/")


def _tar_bytes(archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with _archive_errors(archive):
        file = tar.extractfile(member)
        assert file is not None  # it is a regular file
        return file.read()


def _zip_members(archive: Path) -> Iterator[tuple[str, Read]]:
    with zipfile.ZipFile(archive) as members:
        for member in members.infolist():
            if not member.is_dir():
                yield _divided(member.filename), partial(_zip_bytes, archive, members, member)


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
