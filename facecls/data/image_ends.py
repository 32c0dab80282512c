"""Whether an image file is all there: downloads may be cut off, or end in zeros that were never filled."""

from collections.abc import Iterator

_JPEG = b"\xff\xd8\xff"
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = b"\xff\xd9"
"""Of JPEG and, as the end of the code stream, of JPEG 2000."""
_PNG = b"\x89PNG\r\n\x1a\n"
_J2K = b"\xff\x4f\xff\x51"
_ZEROS = 16
"""Bytes in a row that compressed pixels do not end in."""
_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"ANMF")


def is_cut(encoded: bytes) -> bool:
    """Whether the end of an image is missing or zeros.

    That is told of formats with a mark at the end (JPEG, PNG, JPEG 2000), and by zeros where compressed pixels should
    end (WebP, AVIF, HEIF). OpenCV and Pillow refuse a GIF or TIFF by themselves. The zeros of an uncompressed picture
    may be black.

    Args:
        encoded: The whole file, with anything behind the image.
    """
    if encoded.startswith(_JPEG):
        return not _jpeg_ends(encoded)
    if encoded.startswith(_PNG):
        return not _png_ends(encoded)
    if encoded.startswith(_J2K):
        return not encoded.rstrip(b"\0").endswith(_END_OF_IMAGE)
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        return _webp_is_cut(encoded)
    if encoded[4:8] in (b"ftyp", b"jP  "):
        return _boxes_are_cut(encoded)
    return False


def _jpeg_ends(encoded: bytes) -> bool:
    """Whether a JPEG has an end-of-image marker of its own, whatever follows it.

    Segments before the scan are skipped, because a thumbnail in one of them has such a marker too. Inside a scan the
    two bytes can't occur (ITU-T T.81, F.1.2.3: 0xFF is followed by a stuffed zero).
    """
    at = 2
    while 0 <= (at := encoded.find(b"\xff", at)) < len(encoded) - 3:  # decoders skip bytes that are not a marker
        if encoded[at + 1] == _START_OF_SCAN:
            return encoded.find(_END_OF_IMAGE, at) >= 0
        if encoded[at + 1] == 0xFF:  # markers may be preceded by any number of fill bytes (T.81, B.1.1.2)
            at += 1
        else:
            at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return False


def _png_ends(encoded: bytes) -> bool:
    """Whether a PNG has its last chunk, whatever follows it; a chunk is length, type, content and check sum."""
    at = len(_PNG)
    while at + 12 <= len(encoded):
        if encoded[at + 4 : at + 8] == b"IEND":
            return True
        at += 12 + int.from_bytes(encoded[at : at + 4], "big")
    return False


def _webp_is_cut(encoded: bytes) -> bool:
    """Whether one of its chunks of pixels (RFC 9649, section 2.3) ends in zeros, or is none."""
    at, end = 12, min(len(encoded), 8 + int.from_bytes(encoded[4:8], "little"))
    while at + 8 <= end:
        kind, size = encoded[at : at + 4], int.from_bytes(encoded[at + 4 : at + 8], "little")
        if kind == b"\0\0\0\0" or (kind in _WEBP_PIXELS and _ends_in_zeros(encoded[at + 8 : at + 8 + size])):
            return True
        at += 8 + size + size % 2
    return False


def _boxes_are_cut(encoded: bytes) -> bool:
    """Whether a box of compressed pixels ends in zeros, or a JPEG 2000 code stream without its mark."""
    for kind, content in _boxes(encoded):
        if kind == b"jp2c" and not content.rstrip(b"\0").endswith(_END_OF_IMAGE):
            return True
        if kind == b"mdat" and _ends_in_zeros(content):
            return True
    return False


def _boxes(encoded: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The boxes of a file of the ISO base media format (ISO/IEC 14496-12, section 4.2): kind and content."""
    at = 0
    while at + 8 <= len(encoded):
        size, start = int.from_bytes(encoded[at : at + 4], "big"), 8
        if size == 1:
            size, start = int.from_bytes(encoded[at + 8 : at + 16], "big"), 16
        if size == 0:  # to the end
            size = len(encoded) - at
        if size < start:
            return
        yield encoded[at + 4 : at + 8], encoded[at + start : at + size]
        at += size


def _ends_in_zeros(content: bytes) -> bool:
    return len(content) > _ZEROS and not any(content[-_ZEROS:])
