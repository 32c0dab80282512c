"""Members of tar archives, one after the other, from a stream.

The format is POSIX.1-2017's pax (https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html) with GNU's long
names. Python's own tarfile, before 3.11.14, goes round in circles over a negative size, and takes hours over numbers in
a long pax header (CVE-2025-8194, CVE-2024-6232); it also takes a damaged header for the end.
"""

from collections.abc import Iterator
from io import BufferedReader
from typing import NamedTuple

from facecls.data.limits import NAME_BYTES

_BLOCK = 512
_REGULAR = b"0\0007"
"""Types of regular files: today's, the first Unix's, and contiguous ones."""
_FOLDER, _HARD_LINK, _SYMBOLIC_LINK, _SPARSE = b"5", b"1", b"2", b"S"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL = b"L", b"K", b"x", b"g"
_KINDS = {_HARD_LINK: "a link", _SYMBOLIC_LINK: "a link", _SPARSE: "a sparse file"}
_HEADERS = 16
"""Headers in a row that describe one member; there are two or three."""
_HEADER_BYTES = 1 << 20
"""Of a pax header or a long name."""
_PIECE = 1 << 20
_LONGEST_END = 1 << 20
"""Zeros after the last member; tar fills up to 10 kB, or what its blocking factor asks for."""


class Member(NamedTuple):
    """A member of an archive that is no folder.

    Attributes:
        name: Its name.
        size: How many bytes it has.
        problem: Why it holds no file, such as ``a link``; ``None`` if it does.
    """

    name: str
    size: int
    problem: str | None


class TarReader:
    """Reads an archive from its beginning to its end.

    Args:
        stream: The archive, not compressed; it need not seek.

    Attributes:
        has_end: Whether the zeros that end an archive are there, once ``members`` are at their end. Some programs leave
            them out, and they are missing from one that is cut off just after a member.
    """

    def __init__(self, stream: BufferedReader) -> None:
        self._stream = stream
        self._left = 0
        self._padding = 0
        self.has_end = True

    def members(self) -> Iterator[Member]:
        """Finds the members.

        Yields:
            All but folders; the bytes of one can be read until the next is asked for.

        Raises:
            ValueError: If the archive is damaged or cut off, in words.
        """
        common: dict[str, str] = {}
        own: dict[str, str] = {}
        headers = 0
        if not self._stream.peek(1):
            raise ValueError("empty file")
        while any(block := self._header(is_first=not headers)):
            _check_sum(block)
            size, kind = _number(block[124:136]), block[156:157]
            headers += 1
            if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL):
                if size > _HEADER_BYTES or headers > _HEADERS:
                    raise ValueError("a header is too long")
                content = self._content(size)
                if kind == _LONG_NAME:
                    own["path"] = _text(content)
                elif kind != _LONG_LINK:
                    (common if kind == _PAX_FOR_ALL else own).update(_records(content))
                continue
            about, own, headers = common | own, {}, 0
            if "size" in about:
                size = _decimal(about["size"])
            name = about.get("path") or _name(block)
            if len(name.encode(errors="surrogateescape")) > NAME_BYTES:
                raise ValueError(f"a name is longer than {NAME_BYTES:,} bytes")
            # old archives mark a folder by its slash alone; links and folders may tell a size, but have no content
            is_folder = kind == _FOLDER or (kind == b"\0" and name.endswith("/") and not size)
            has_content = kind in _REGULAR or kind == _SPARSE or kind not in b"123456"
            self._left, self._padding = (size, -size % _BLOCK) if has_content else (0, 0)
            if not is_folder:
                problem = None if kind in _REGULAR else _KINDS.get(kind, "no regular file")
                if any(key.startswith("GNU.sparse.") for key in about):
                    problem = _KINDS[_SPARSE]
                yield Member(name, size, problem)
            self._skip()
        self._check_end()

    def read(self) -> bytes:
        """The bytes of the present member.

        Raises:
            ValueError: If the archive is cut off.
        """
        data = self._exactly(self._left, "a member")
        self._left = 0
        return data

    def _header(self, is_first: bool) -> bytes:
        """The next block; none where the archive ends without a mark, if no header before it belongs to a member."""
        block = self._stream.read(_BLOCK)
        if len(block) < _BLOCK and (block or not is_first):
            raise ValueError("cut off before its end")
        self.has_end = bool(block)
        return block

    def _content(self, size: int) -> bytes:
        content = self._exactly(size, "a header")
        self._exactly(-size % _BLOCK, "a header")
        return content

    def _exactly(self, size: int, what: str) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise ValueError(f"cut off in {what}")
        return data

    def _skip(self) -> None:
        left = self._left + self._padding
        while left:
            left -= len(self._exactly(min(left, _PIECE), "a member"))
        self._left = self._padding = 0

    def _check_end(self) -> None:
        """Only zeros follow the end, and not many: what a download has not filled yet is zeros as well."""
        length = 0
        while rest := self._stream.read(_PIECE):
            length += len(rest)
            if rest.strip(b"\0"):
                raise ValueError("damaged in the middle")
            if length > _LONGEST_END:
                raise ValueError(f"it ends in more than {_LONGEST_END:,} zeros")


def _check_sum(block: bytes) -> None:
    """Compares a header's sum, which some programs make of signed bytes, with its bytes."""
    plain = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(plain)
    signed = unsigned - 256 * sum(byte > 127 for byte in plain)
    if _number(block[148:156]) not in (unsigned, signed):
        raise ValueError("a header is damaged")


def _number(field: bytes) -> int:
    """A number in octal digits, or in GNU's binary form, which may be negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    if field[0] == 0xFF:
        raise ValueError("a size is negative")
    digits = field.partition(b"\0")[0].strip()
    if digits.strip(b"01234567"):
        raise ValueError("a header is damaged")
    return int(digits or b"0", 8)


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError("a size is no number")
    return int(text)


def _name(block: bytes) -> str:
    name, prefix = (part.partition(b"\0")[0] for part in (block[:100], block[345:500]))
    is_posix = block[257:263] == b"ustar\0"  # GNU's own format keeps times in the place of the prefix
    return (prefix + b"/" + name if prefix and is_posix else name).decode(errors="surrogateescape")


def _text(content: bytes) -> str:
    return content.partition(b"\0")[0].decode(errors="surrogateescape")


def _records(content: bytes) -> dict[str, str]:
    """The entries of a pax header, each ``LENGTH KEY=VALUE`` and a line feed."""
    records = {}
    at = 0
    while at < len(content) and content[at]:
        length, space, _ = content[at : at + 20].partition(b" ")
        if not (space and length.isdigit() and len(length) < 8 and len(length) + 2 < int(length) <= len(content) - at):
            raise ValueError("a pax header is damaged")
        key, _, value = content[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        records[key.decode(errors="replace")] = value.decode(errors="surrogateescape")
        at += int(length)
    return records
