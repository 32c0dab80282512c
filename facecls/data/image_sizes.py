"""How large an image is, and in how many scans, from its bytes, before anything is allocated for it."""

import re
from struct import error as StructError
from struct import unpack_from

_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of a JPEG's segment with its size (ITU-T T.81, table B.1)."""
_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})
"""Markers without a segment."""
_SCAN, _END = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff[^\x00\xff]")
"""A marker, but for the fill bytes before it; a zero behind 0xFF is part of a scan."""
_FEW_SCANS = 64
"""Fewer are not counted exactly, but with those of thumbnails and of what follows the image, which is faster."""
_PNM = re.compile(rb"P[1-6Ff](?:\s|#[^\n]*\n)+(\d{1,10})(?:\s|#[^\n]*\n)+(\d{1,10})")
_PAM = re.compile(rb"P7\s[^\0]*?WIDTH (\d{1,10})\s+HEIGHT (\d{1,10})")
_RADIANCE = re.compile(rb"\n[+-]Y (\d{1,10}) [+-]X (\d{1,10})\n")
_JP2 = re.compile(rb"ihdr(.{8})", re.DOTALL)
_J2K = b"\xff\x4f\xff\x51"
_EXR = re.compile(rb"dataWindow\0box2i\0\x10\0\0\0(.{16})", re.DOTALL)
_START = 1 << 16
"""Bytes in which the size of all formats but JPEG stands."""


def size_of(encoded: bytes) -> tuple[int, int] | None:
    r"""Reads an image's width and height in pixels from its header.

    Args:
        encoded: The file, in a format that OpenCV decodes by itself; TIFF, GIF, AVIF and HEIF are Pillow's.

    Returns:
        Width and height; ``None`` if they are not found.

    Examples:
        >>> size_of(b"P6 # drawn\n640 480 255\n"), size_of(b"BM")
        ((640, 480), None)
    """
    if encoded.startswith(b"\xff\xd8"):
        return _of_jpeg(encoded)
    start = encoded[:_START]
    try:
        if start.startswith(b"\x89PNG"):
            return _pair(">II", start, 16)
        if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
            return _of_webp(start)
        if start.startswith(b"BM"):
            return _of_bmp(start)
        if start.startswith(b"\x59\xa6\x6a\x95"):  # Sun's raster
            return _pair(">II", start, 4)
        if start.startswith(_J2K):
            right, bottom, left, top = unpack_from(">IIII", start, 8)
            return max(0, right - left), max(0, bottom - top)
        if start[4:8] == b"jP  " and (header := _JP2.search(start)):
            height, width = unpack_from(">II", header[1])
            return width, height
        if start.startswith(b"v/1\x01") and (window := _EXR.search(start)):
            left, top, right, bottom = unpack_from("<iiii", window[1])
            return max(0, right - left + 1), max(0, bottom - top + 1)
    except StructError:  # it ends before its size
        return None
    if start.startswith(b"#?") and (lines := _RADIANCE.search(start)):
        return int(lines[2]), int(lines[1])
    if found := _PAM.match(start) or _PNM.match(start):
        return int(found[1]), int(found[2])
    return None


def scans_of(encoded: bytes) -> int:
    """Counts the scans of a JPEG; 0 for another format.

    Args:
        encoded: The file, with anything behind the image.
    """
    if not encoded.startswith(b"\xff\xd8"):
        return 0
    if (most := encoded.count(b"\xff\xda")) < _FEW_SCANS:
        return most
    count, at = 0, 2
    while (found := _MARKER.search(encoded, at)) and (marker := encoded[found.start() + 1]) != _END:
        count += marker == _SCAN
        at = found.end()
        if marker not in _ALONE:
            at += max(2, int.from_bytes(encoded[at : at + 2], "big"))
    return count


def _pair(form: str, data: bytes, at: int) -> tuple[int, int]:
    first, second = unpack_from(form, data, at)
    return first, second


def _of_jpeg(encoded: bytes) -> tuple[int, int] | None:
    """The largest size that it names; decoders take the first or the last."""
    at, width, height = 2, 0, 0
    while 0 <= (at := encoded.find(b"\xff", at)) < len(encoded) - 9:
        marker = encoded[at + 1]
        if marker in _JPEG_SIZES:
            rows, columns = unpack_from(">HH", encoded, at + 5)
            width, height = max(width, columns), max(height, rows)
        if marker == _SCAN:
            break
        if marker == 0xFF:
            at += 1
        else:
            at += 2 if marker in _ALONE else 2 + max(2, unpack_from(">H", encoded, at + 2)[0])
    return (width, height) if width else None


def _of_webp(start: bytes) -> tuple[int, int] | None:
    """As in RFC 9649, sections 2.5 to 2.7."""
    kind = start[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(start[24:27], "little"), 1 + int.from_bytes(start[27:30], "little")
    if kind == b"VP8L":
        bits = unpack_from("<I", start, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = unpack_from("<HH", start, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _of_bmp(start: bytes) -> tuple[int, int]:
    if unpack_from("<I", start, 14)[0] == 12:  # the header of OS/2
        return _pair("<HH", start, 18)
    width, height = unpack_from("<ii", start, 18)
    return abs(width), abs(height)
