"""Members of zip archives; what their directory says is checked before anything is unpacked.

The format is PKWARE's (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3.7 to 4.3.16).
"""

import os
import zipfile
from collections.abc import Iterator
from struct import calcsize, unpack
from typing import BinaryIO, NamedTuple

from facecls.data.limits import LIMITS, raised

_END = "<4s4H2LH"
_END_64, _LOCATOR_64 = "<4sQ2H2L4Q", "<4sLQL"
_LOCAL = 30
"""Bytes of the header before a member, without its name."""
_TYPICAL_ENTRY = 100
"""Bytes of a member in the directory, with its name."""
_FURTHEST_END = (1 << 16) + calcsize(_END)
"""From the end of the file to that of the directory, with a comment of any length."""


class Member(NamedTuple):
    """A member of an archive that is no folder.

    Attributes:
        name: Its name.
        info: What the directory says of it.
        is_overlapping: Whether its bytes begin within another's.
    """

    name: str
    info: zipfile.ZipInfo
    is_overlapping: bool


def open_zip(stream: BinaryIO) -> zipfile.ZipFile:
    """Opens an archive.

    Args:
        stream: Its bytes.

    Raises:
        ValueError: If the directory is not what the end of the archive says.
        zipfile.BadZipFile: If there is none.
    """
    count, is_exact, size = _announced(stream)
    if (most := max(count, size // _TYPICAL_ENTRY)) > LIMITS.names:
        limit = f"the limit is {LIMITS.names:,} files, {raised('names', most)}"
        raise ValueError(f"its directory has {count:,} files and {size:,} bytes; {limit}")
    archive = zipfile.ZipFile(stream)
    found = len(archive.infolist())
    # archives of more than 65,535 files without the larger form keep the rest of the division by 65,536
    if found != count if is_exact else (found - count) % (1 << 16):
        archive.close()
        raise ValueError(f"its directory lists {found:,} files where {count:,} are announced")
    return archive


def members(archive: zipfile.ZipFile) -> Iterator[Member]:
    """The members of an archive, without empty folders, in its order."""
    infos = archive.infolist()
    overlapping = set()
    furthest = -1
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < furthest:
            overlapping.add(id(info))
        furthest = max(furthest, info.header_offset + _LOCAL + len(info.orig_filename) + info.compress_size)
    for info in infos:
        if not info.is_dir() or info.file_size:  # a name that a zero byte cuts may end as a folder's
            yield Member(info.filename, info, id(info) in overlapping)


def _announced(stream: BinaryIO) -> tuple[int, bool, int]:
    """How many files the end of an archive announces, whether that is exact, and the bytes of the directory."""
    length = stream.seek(0, os.SEEK_END)
    start = stream.seek(max(0, length - _FURTHEST_END))
    tail = stream.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < calcsize(_END):
        raise zipfile.BadZipFile("it has no directory")
    _, _, _, _, count, size, _, _ = unpack(_END, tail[at : at + calcsize(_END)])
    locator = start + at - calcsize(_LOCATOR_64)
    if locator < 0:
        return count, False, size
    stream.seek(locator)
    signature, _, place, _ = unpack(_LOCATOR_64, stream.read(calcsize(_LOCATOR_64)))
    if signature != b"PK\6\7":
        return count, False, size
    # as zipfile does, just before its locator: something may have been put before the archive
    stream.seek(max(0, locator - calcsize(_END_64)))
    record = unpack(_END_64, stream.read(calcsize(_END_64)))
    if record[0] != b"PK\6\6" or place > length:
        return count, False, size
    return record[7], True, record[8]
