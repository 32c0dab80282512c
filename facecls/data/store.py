"""The encoded images of a table, held once in memory, and how they are decoded."""

import io
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
import torch
from PIL.AvifImagePlugin import AvifImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, TILELENGTH, TILEWIDTH, TiffImageFile
from pillow_heif import HeifImageFile

from facecls.data.image_ends import is_cut
from facecls.data.image_sizes import scans_of, size_of
from facecls.data.limits import IMAGE_PIXELS, LIMITS, too_large
from facecls.data.parallel import claim_pixels

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH = 24
"""Where a PNG says how many bits a value has."""
_JP2 = b"\0\0\0\x0cjP  "
_DEEP = (b"P2", b"P3", b"P5", b"P6", _JP2)
"""How files of PNM and JPEG 2000 begin, whose values may have more bits than 8."""
_TIFF_PIXELS = 1 << 26
"""Pillow warns about a TIFF of 1.3 times as many and refuses one of 2.7 times as many."""
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), AvifImageFile),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), HeifImageFile),
}
"""What is in a file of the ISO base media format, by the brands that it names (ISO/IEC 23008-12, annex B; AV1 Image
File Format, section 6)."""
_ANY_BRAND = (b"mif1", b"msf1")
"""Brands of both; without one of the others it is HEIF."""
_BITS = (8, 10, 12)
"""What files of 16 bits may hold: all of a picture's values are small then."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "JPEG2000")
"""What Pillow reads of what is too large for OpenCV."""
_START = 256
"""Bytes that tell the format."""
_SCANS = 100
"""Of a JPEG; progressive ones have some ten. Each takes time for all pixels, also one of a hundred bytes."""


@dataclass(frozen=True, eq=False)
class ImageStore:
    """Encoded images, concatenated in one tensor so that all workers of a loader share one copy.

    Forked workers share its pages, which no reference count ever touches. Spawned workers receive it through torch's
    shared memory, as any tensor that ``torch.multiprocessing`` pickles.

    Attributes:
        data: The bytes of all images, uint8 ``(B,)``.
        ends: Where each image ends in ``data``, int64 ``(N,)``, ascending.

    Examples:
        >>> store = ImageStore(torch.tensor([7, 8, 9], dtype=torch.uint8), np.array([1, 3]))
        >>> len(store), store[1]
        (2, array([8, 9], dtype=uint8))
    """

    data: torch.Tensor
    ends: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.ends)

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        """The bytes of one image, a view.

        Args:
            index: From 0 to ``len(self) - 1``; a table's row number.

        Returns:
            uint8 ``(b,)``.

        Raises:
            IndexError: If there is no such image.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Expected an image from 0 to {len(self) - 1}, got {index}.")
        start = self.ends[index - 1] if index else 0
        view: npt.NDArray[np.uint8] = self.data.numpy()[start : self.ends[index]]
        return view

    def without(self, left_out: Collection[int]) -> "ImageStore":
        """A store of the other images, which are copied.

        Args:
            left_out: Numbers of images.
        """
        kept = sorted(set(range(len(self))) - set(left_out))
        images = [self[index] for index in kept]
        data = torch.from_numpy(np.concatenate(images)) if images else torch.empty(0, dtype=torch.uint8)
        return ImageStore(data, np.cumsum([len(image) for image in images], dtype=np.int64))


def decode(encoded: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Decodes an image.

    Grey, palette and CMYK images become RGB, the latter by the plain formula without a colour profile. Of 16 bits the
    upper 8 are kept, or of the lower 8, 10 or 12 if no value needs more. Transparency is dropped, leaving the colour
    that is stored beneath it. The EXIF orientation is applied. Of several frames the first is taken.

    Args:
        encoded: uint8 ``(b,)``, any format that OpenCV reads, GIF, AVIF or HEIF.

    Returns:
        RGB, uint8 ``(H, W, 3)``, 0..255.

    Raises:
        ValueError: If the bytes are not an image, or one beyond the limit, for which nothing is allocated, or a JPEG of
            more than 100 scans, each of which would be decoded over all its pixels.
    """
    try:
        image = _decoded(encoded)
    except _TooLargeError:
        raise
    except Exception:  # for damaged files Pillow raises anything from SyntaxError to struct.error
        image = None
    if image is None:
        raise ValueError("not an image")
    return image


class _TooLargeError(ValueError):
    """An image has too many pixels."""


def _claim(width: int, height: int) -> None:
    if width * height > LIMITS.image_pixels:
        raise _TooLargeError(too_large(width * height, "image_pixels", "pixels"))
    claim_pixels(width * height)


def _decoded(encoded: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8] | None:
    start = encoded[:_START].tobytes()
    if LIMITS.image_pixels > IMAGE_PIXELS:
        PIL.Image.MAX_IMAGE_PIXELS = None  # Pillow's own limits are below
    create = _pillow_class(start)
    if create is not None:
        with create(io.BytesIO(encoded.tobytes())) as opened:
            _claim(*opened.size)
            if isinstance(opened, TiffImageFile):
                _claim(opened.tag_v2.get(TILEWIDTH, 0), opened.tag_v2.get(TILELENGTH, 0))
                _claim(*opened.size)
            return _deep(encoded) if _is_beyond_pillow(opened) else pillow_pixels(opened)
    if (scans := scans_of(encoded.tobytes())) > _SCANS:
        raise _TooLargeError(f"too large ({scans:,} scans; the limit is {_SCANS})")
    # without a size that is found here, OpenCV's own limit applies, which facecls/__init__.py sets
    width, height = size_of(encoded.tobytes()) or (min(IMAGE_PIXELS, LIMITS.image_pixels), 1)
    _claim(width, height)
    if width * height > IMAGE_PIXELS:
        return _beyond_opencv(encoded)
    if start.startswith(_DEEP) or (start.startswith(_PNG) and start[_PNG_DEPTH : _PNG_DEPTH + 1] == b"\x10"):
        return _deep(encoded)
    image: npt.NDArray[np.uint8] | None = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)
    # OpenCV 5.0 gives a grey PFM as it is
    return np.stack([image] * 3, axis=2) if image is not None and image.ndim == 2 else image


def _beyond_opencv(encoded: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Decodes, by Pillow, what has more pixels than OpenCV was told to allow when it was imported."""
    with PIL.Image.open(io.BytesIO(encoded.tobytes()), formats=_FORMATS) as opened:
        _claim(*opened.size)
        return pillow_pixels(opened)


def _pillow_class(start: bytes) -> Callable[[io.BytesIO], PIL.Image.Image] | None:
    """What reads a format that Pillow reads better; ``None`` for all others.

    OpenCV 5.0 blends transparent pixels of TIFF and GIF onto a background and ignores the orientation of AVIF; OpenCV
    4.11 reads neither GIF nor AVIF; none reads HEIF, as telephones write. The classes are called themselves, since
    ``PIL.Image.open`` refuses images that OpenCV would read in another format.
    """
    if start.startswith((b"II*\0", b"MM\0*")):
        return TiffImageFile
    if start.startswith(b"GIF8"):
        return GifImageFile
    if start[4:8] != b"ftyp":
        return None
    end = min(len(start), int.from_bytes(start[:4], "big"))
    brands = [start[8:12], *(start[at : at + 4] for at in range(16, end - 3, 4))]
    known = (_BRANDS[brand] for brand in brands if brand in _BRANDS)
    return next(known, HeifImageFile if brands[0] in _ANY_BRAND else None)


def _is_beyond_pillow(opened: PIL.Image.Image) -> bool:
    """Whether it is a TIFF that Pillow refuses, or of whose three channels of 16 bits it would keep the upper 8."""
    if not isinstance(opened, TiffImageFile) or math.prod(opened.size) > IMAGE_PIXELS:  # nor does OpenCV read it then
        return False
    return math.prod(opened.size) > _TIFF_PIXELS or opened.tag_v2.get(BITSPERSAMPLE) == (16, 16, 16)


def _deep(encoded: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8] | None:
    # for a TIFF of 16 bits OpenCV 5.0 gives nonsense in the order RGB
    image = cv2.imdecode(encoded, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if image is None:
        return None
    deep = image if image.dtype == np.uint8 else _of_16_bits(image, _bits_said(encoded[:_START].tobytes()))
    return np.ascontiguousarray(deep[..., ::-1])


def _bits_said(start: bytes) -> int | None:
    """How many bits values have, as PNM, JPEG 2000 and some PNG files say."""
    if maximum := re.match(rb"P[2356](?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+(\d+)\s", start):
        bits = int(maximum[1]).bit_length()
        return bits if bits < 16 else None  # what programs write of any array of 16 bits
    for first, mark, further, more in ((_PNG, b"sBIT", 4, 0), (_JP2, b"ihdr", 14, 1)):  # of the first channel
        if start.startswith(first) and 0 <= (at := start.find(mark)) < len(start) - further:
            return (start[at + further] & 0x7F) + more
    return None


def _of_16_bits(values: npt.NDArray[Any], bits: int | None = None) -> npt.NDArray[np.uint8]:
    """The upper 8 of the bits that are used.

    Some programs write values of 8, 10 or 12 bits into 16 and do not say so; a picture whose values are all so small
    would be black otherwise.
    """
    highest = int(values.max(initial=0))
    if bits is None or not (8 <= bits <= 16 and highest < 1 << bits):
        bits = next((bits for bits in _BITS if highest < 1 << bits), 16)
    return (values >> (bits - 8)).clip(0, 255).astype(np.uint8)


def pillow_pixels(image: PIL.Image.Image) -> npt.NDArray[np.uint8]:
    """Converts a Pillow image to pixels, as ``decode`` does with its file.

    Args:
        image: A Pillow image of any mode.

    Returns:
        RGB, uint8 ``(H, W, 3)``, 0..255.

    Raises:
        OSError: If its file, which Pillow reads late, is damaged.
    """
    upright = PIL.ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        return np.stack([_of_16_bits(np.asarray(upright))] * 3, axis=2)
    if "transparency" in upright.info:
        upright = upright.convert("RGBA")  # without this step Pillow warns about transparent palettes
    return np.asarray(upright.convert("RGB"))


def read_image(encoded: bytes) -> npt.NDArray[np.uint8]:
    """Decodes a complete image file.

    Its end is checked before decoding, since OpenCV before 5 decodes a truncated JPEG silently and fills the rest of
    the picture with grey or with the previous picture (https://github.com/opencv/opencv/issues/26488).

    Args:
        encoded: The whole file.

    Returns:
        RGB, uint8 ``(H, W, 3)``, as ``decode`` gives it.

    Raises:
        ValueError: ``"truncated"`` for an image without its end, ``"not an image"`` if it does not decode, or that it
            has too many pixels.
    """
    if is_cut(encoded):
        raise ValueError("truncated")
    return decode(np.frombuffer(encoded, np.uint8))


def why_unusable(encoded: bytes) -> str | None:
    """Says what is wrong with an image file, if anything.

    Args:
        encoded: The whole file.

    Returns:
        What ``read_image`` raises, if it does.
    """
    try:
        read_image(encoded)
    except ValueError as error:
        return str(error)
    return None
