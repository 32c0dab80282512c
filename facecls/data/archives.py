"""Members of archives, one after the other, without unpacking anything to disk."""

import gzip
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, NoReturn

from facecls.data import tars, zips
from facecls.data.limits import ARCHIVE_ALLOWANCE, LIMITS, NAME_BYTES, raised, too_large
from facecls.errors import UserError
from facecls.files import open_regular

Read = Callable[[], bytes]
"""Returns the bytes of one file, or raises ``UnreadableError``."""

NO_END = "(no end)"
"""Stands, among the members, for the end that a tar should have; the reader says so."""
CUT_OFF = "the archive has no end marks and may be cut off"
"""Why that is no file."""

_PIECES = {zipfile.ZIP_BZIP2: 4096, zipfile.ZIP_LZMA: 4096}
"""Bytes of members that are read at a time, where Python unpacks any number of bytes from so many packed ones."""


class UnreadableError(Exception):
    """One file among many can't be read; the message is the reason in a few words."""


def archive_members(archive: Path) -> Iterator[tuple[str, Read]]:
    """Opens a ``.zip``, or a ``.tar`` that may be gzipped.

    Args:
        archive: Its path.

    Yields:
        Name and reader of each member that is no folder; a reader must be called before the next member is asked for.
        ``NO_END`` last, if a tar has none of the blocks that end it.

    Raises:
        UserError: If the archive can't be read, is damaged or cut off, or unpacks to too much; readers raise it too.
    """
    with _archive_errors(archive), open_regular(archive) as stream:
        yield from (_zip_members if archive.suffix.lower() == ".zip" else _tar_members)(archive, stream)


class _Total:
    """Counts what an archive has unpacked to.

    Args:
        stream: The archive.
    """

    def __init__(self, stream: BinaryIO) -> None:
        own = os.fstat(stream.fileno()).st_size
        for_size = LIMITS.archive_growth * own + ARCHIVE_ALLOWANCE
        self._most = min(LIMITS.archive_bytes, for_size)
        self._name = "archive_bytes" if LIMITS.archive_bytes <= for_size else "archive_growth"
        self._sum = self._count = 0

    def add(self, size: int) -> None:
        """Counts bytes."""
        self._sum += size
        if self._sum > self._most:
            how = raised(self._name, 10 * getattr(LIMITS, self._name))
            raise ValueError(f"it unpacks to more than {self._most:,} bytes, the limit for its size; {how}")

    def add_name(self) -> None:
        """Counts a member."""
        self._count += 1
        if self._count > LIMITS.names:
            how = raised("names", 10 * LIMITS.names)
            raise ValueError(f"it has more than {LIMITS.names:,} members, the limit; {how}")


class _Counted(io.RawIOBase):
    """A stream that counts what is read from it.

    Args:
        inner: What it reads.
        total: The count.
    """

    def __init__(self, inner: BinaryIO, total: _Total) -> None:
        self._inner, self._total = inner, total

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: "memoryview[int]") -> int:  # type: ignore[override]
        """Fills a buffer, and returns how much of it."""
        data = self._inner.read(len(buffer))
        self._total.add(len(data))
        buffer[: len(data)] = data
        return len(data)


def _tar_members(archive: Path, raw: BinaryIO) -> Iterator[tuple[str, Read]]:
    # browsers decompress .tar.gz files without renaming them, so the bytes decide
    is_packed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    plain: BinaryIO = gzip.GzipFile(fileobj=raw) if is_packed else raw  # type: ignore[assignment]
    total = _Total(raw)
    reader = tars.TarReader(io.BufferedReader(_Counted(plain, total), 1 << 20))
    for member in reader.members():
        total.add_name()
        if member.problem is not None:
            yield _divided(member.name), partial(_refuse, f"{member.problem} in the archive")
        elif member.size > LIMITS.file_bytes:
            yield _divided(member.name), partial(_refuse, too_large(member.size, "file_bytes", "bytes"))
        else:
            yield _divided(member.name), partial(_tar_bytes, archive, reader)
    if not reader.has_end:
        yield NO_END, partial(_refuse, CUT_OFF)


def _divided(name: str) -> str:
    """A member's name with forward slashes, which some archivers of Windows don't write."""
    return name.replace("\\", "/")


def _refuse(reason: str) -> NoReturn:
    raise UnreadableError(reason)


def _tar_bytes(archive: Path, reader: tars.TarReader) -> bytes:
    with _archive_errors(archive):
        return reader.read()


def _zip_members(archive: Path, stream: BinaryIO) -> Iterator[tuple[str, Read]]:
    total = _Total(stream)
    with zips.open_zip(stream) as opened:
        for member in zips.members(opened):
            name = _divided(member.name)
            if len(name.encode(errors="replace")) > NAME_BYTES:
                yield f"{name[:80]}...", partial(_refuse, f"a name longer than {NAME_BYTES:,} bytes")
            elif member.info.is_dir():
                yield f"{name}?", partial(_refuse, "damaged: a folder that has content")
            elif member.is_overlapping:
                yield name, partial(_refuse, "damaged: it overlaps another member of the archive")
            elif member.info.file_size > LIMITS.file_bytes:
                yield name, partial(_refuse, too_large(member.info.file_size, "file_bytes", "bytes"))
            else:
                yield name, partial(_zip_bytes, archive, opened, member.info, total)


def _zip_bytes(archive: Path, opened: zipfile.ZipFile, info: zipfile.ZipInfo, total: _Total) -> bytes:
    with _archive_errors(archive):
        total.add(info.file_size)
    try:
        with opened.open(info) as stream:
            # whatever the directory says, no more is unpacked at a time than from one piece
            return b"".join(iter(partial(stream.read, _PIECES.get(info.compress_type, 1 << 20)), b""))
    except Exception:  # damaged, encrypted or a rare compression: zipfile and its libraries raise anything
        raise UnreadableError("damaged or encrypted in the archive") from None


@contextmanager
def _archive_errors(archive: Path) -> Iterator[None]:
    """Turns what the libraries raise over a damaged archive into a ``UserError``; they raise many kinds."""
    try:
        yield
    except (UserError, UnreadableError):
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise UserError(f"Can't read the archive {archive}: {reason}; is the download complete?") from None
