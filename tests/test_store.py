"""Encoded images are held once, come back as they were, decode to RGB, and damaged ones are told."""

import doctest
import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pillow_heif
import pytest
import torch
from PIL import ExifTags, Image
from torch.utils.data import DataLoader, Dataset

from facecls.data import store as store_module
from facecls.data.store import ImageStore, decode, why_unusable

Pixels = npt.NDArray[np.uint8]


def picture(seed: int = 0, size: int = 48) -> Pixels:
    """A smooth random picture, so that JPEG keeps it."""
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 4), None, 0, 255, cv2.NORM_MINMAX)


def encode(ending: str, image: Pixels | None = None, *options: int) -> bytes:
    done, encoded = cv2.imencode(ending, picture() if image is None else image, options)
    assert done
    return bytes(encoded)


def packed(*images: bytes) -> ImageStore:
    data = torch.frombuffer(bytearray(b"".join(images)), dtype=torch.uint8)
    return ImageStore(data, np.cumsum([len(image) for image in images]))


def with_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    """A JPEG with one more segment right after its start."""
    return jpeg[:2] + bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content + jpeg[2:]


def test_every_image_comes_back_as_it_was_and_is_not_copied() -> None:
    images = [b"first", b"", b"\x00\xff", b"last one"]
    store = packed(*images)
    assert len(store) == 4
    assert [bytes(store[index]) for index in range(4)] == images
    assert np.shares_memory(store[3], store.data.numpy())


@pytest.mark.parametrize("index", [-1, 2])
def test_an_image_that_is_not_there_is_an_index_error(index: int) -> None:
    with pytest.raises(IndexError, match="from 0 to 1"):
        packed(b"a", b"b")[index]


class Lengths(Dataset[Any]):
    """What a worker sees of a store: the bytes of an image, and whether the store is torch's shared memory."""

    def __init__(self, store: ImageStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> tuple[bytes, bool]:
        return bytes(self.store[index]), self.store.data.is_shared()


# Python 3.12 warns of fork in a process with threads: https://docs.python.org/3/library/os.html#os.fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_the_images_without_a_copy_of_their_own(start: str) -> None:
    images = [bytes([value]) * (value + 1) for value in range(9)]
    loader = DataLoader(
        Lengths(packed(*images)), batch_size=None, num_workers=1, multiprocessing_context=start, collate_fn=list
    )
    seen = list(loader)
    assert [data for data, _ in seen] == images
    assert all(shared == (start == "spawn") for _, shared in seen)  # a fork shares its pages as they are


def test_decoded_pixels_are_rgb() -> None:
    rgb = picture()
    assert (decode(np.frombuffer(encode(".png", rgb[..., ::-1]), np.uint8)) == rgb).all()


@pytest.mark.parametrize("quality", [60, 95])
def test_jpeg_decodes_as_pillow_does(quality: int) -> None:
    encoded = encode(".jpg", picture(1, 200), cv2.IMWRITE_JPEG_QUALITY, quality)
    ours = decode(np.frombuffer(encoded, np.uint8)).astype(int)
    theirs = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), dtype=int)
    assert np.abs(ours - theirs).max() <= 3  # two builds of libjpeg-turbo may round and upsample differently


def test_grey_alpha_and_16_bit_pictures_become_rgb_bytes() -> None:
    grey = np.full((9, 8), 77, np.uint8)
    clear = np.full((9, 8, 4), (10, 20, 30, 0), np.uint8)  # blue, green, red, alpha
    deep = np.full((9, 8, 3), 77 * 257, np.uint16)
    for image, expected in [(grey, (77, 77, 77)), (clear, (30, 20, 10)), (deep, (77, 77, 77))]:
        pixels = decode(np.frombuffer(encode(".png", image), np.uint8))
        assert pixels.shape == (9, 8, 3)
        assert pixels.dtype == np.uint8
        assert (pixels == expected).all()


@pytest.mark.parametrize("ending", [".png", ".tif", ".ppm"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [1, 4, 16, 257])
def test_16_bits_that_hold_fewer_are_not_black(ending: str, channels: int, scale: int) -> None:
    """Some programs write values of 8, 10 or 12 bits into files of 16 bits, others 0..65535."""
    values = np.random.default_rng(0).integers(0, 256, (40, 30, channels)).astype(np.uint16)
    values.flat[:2] = 0, 255
    data = cv2.imencode(ending if channels == 3 else ending.replace("ppm", "pgm"), (scale * values)[..., ::-1])[1]
    np.testing.assert_array_equal(decode(data), np.broadcast_to(values, (40, 30, 3)))


@pytest.mark.parametrize("side", [False, True])
def test_what_telephones_write_is_read(side: bool) -> None:
    image = Image.fromarray(picture(size=200)[:120])
    stream = io.BytesIO()
    written = pillow_heif.from_pillow(image.rotate(90, expand=True) if side else image)
    if side:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # to be turned by a quarter, clockwise
        written.info["exif"] = exif.tobytes()
    written.save(stream, quality=95)
    pixels = decode(np.frombuffer(stream.getvalue(), np.uint8))
    assert pixels.shape == (120, 200, 3)
    assert np.abs(pixels.astype(int) - np.asarray(image)).mean() < 3


@pytest.mark.parametrize("highest", [255, 1000, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6", "PNG", "JP2"])
def test_what_a_file_says_of_its_bits_counts(kind: str, highest: int) -> None:
    """A dark picture stays dark: its values are all small, and its file says that they could be larger."""
    bits = highest.bit_length()
    values = np.linspace(0, highest // 3, 64 * 48).astype(np.uint16).reshape(48, 64)
    colour = np.stack([values] * 3, axis=2)
    if kind == "PNG":
        data = encode(".png", colour)
        said = b"sBIT" + bytes([bits] * 3)
        data = data[:33] + struct.pack(">I", 3) + said + struct.pack(">I", zlib.crc32(said)) + data[33:]
    elif kind == "JP2":
        data = encode(".jp2", colour.astype(np.uint8 if highest == 255 else np.uint16))
        at = data.index(b"ihdr") + 14
        assert data[at] == (7 if highest == 255 else 15)
        bits = data[at] + 1  # OpenCV writes no others
    else:
        cells = colour if kind in ("P3", "P6") else values
        body = cells.astype(">u2" if highest > 255 else np.uint8).tobytes()
        if kind in ("P2", "P3"):
            body = f"{' '.join(map(str, cells.ravel()))}\n".encode()
        data = f"{kind}\n# a comment\n64 48\n{highest}\n".encode() + body
    found = decode(np.frombuffer(data, np.uint8))
    assert np.abs(found[..., 0].astype(int) - (values >> (bits - 8))).max() <= (2 if kind == "JP2" else 0)


@pytest.mark.parametrize("brand", [b"heic", b"heim", b"heis", b"mif1"])
def test_heif_is_known_by_any_of_its_brands(brand: bytes) -> None:
    stream = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(picture(size=200))).save(stream, quality=95)
    data = stream.getvalue()
    assert data[8:12] == b"heic"
    pixels = decode(np.frombuffer(data[:8] + brand + data[12:], np.uint8))
    assert np.abs(pixels.astype(int) - picture(size=200)).mean() < 3


@pytest.mark.parametrize("brand", [b"avif", b"mif1", b"msf1"])
def test_avif_is_known_by_any_of_its_brands(brand: bytes) -> None:
    stream = io.BytesIO()
    Image.fromarray(picture(size=200)).save(stream, "AVIF", quality=95)
    data = stream.getvalue()
    assert b"avif" in data[16:40]
    pixels = decode(np.frombuffer(data[:8] + brand + data[12:], np.uint8))
    assert np.abs(pixels.astype(int) - picture(size=200)).mean() < 3


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "I;16"])
def test_a_tiff_may_be_larger_than_pillow_likes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(picture())
    image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else image
    stream = io.BytesIO()
    image.convert(mode).save(stream, "TIFF")
    data = np.frombuffer(stream.getvalue(), np.uint8)
    wanted = decode(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # and refuses twice as many
    with pytest.raises(ValueError, match="not an image"):
        decode(data)
    monkeypatch.setattr(store_module, "_TIFF_PIXELS", 100)
    np.testing.assert_array_equal(decode(data), wanted)


def test_pictures_lying_on_their_side_are_set_upright() -> None:
    sixth = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # orientation 6
    lying = encode(".jpg", picture(2)[:24], cv2.IMWRITE_JPEG_QUALITY, 95)
    upright = decode(np.frombuffer(with_segment(lying, 0xE1, sixth), np.uint8))
    assert (upright == np.rot90(decode(np.frombuffer(lying, np.uint8)), -1)).all()


@pytest.mark.parametrize("junk", [b"", b"no image", b"\xff\xd8\xff" + b"x" * 99])
def test_what_is_no_image_does_not_decode(junk: bytes) -> None:
    with pytest.raises(ValueError, match="not an image"):
        decode(np.frombuffer(junk, np.uint8))


@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp", ".bmp"])
def test_whole_images_are_usable_with_or_without_padding(ending: str) -> None:
    whole = encode(ending)
    assert why_unusable(whole) is None
    assert why_unusable(whole + bytes(9999)) is None


JPEG = encode(".jpg", picture(3, 24))
THUMBNAIL = with_segment(JPEG, 0xE1, b"Exif\0\0" + JPEG)  # holds an end-of-image marker of its own
WHOLE = {
    "baseline": JPEG,
    "progressive": encode(".jpg", picture(3, 24), cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "restart markers": encode(".jpg", picture(3, 24), cv2.IMWRITE_JPEG_RST_INTERVAL, 1),
    "thumbnail": THUMBNAIL,
    "fill byte": THUMBNAIL[:2] + b"\xff" + THUMBNAIL[2:],
    "stray bytes": JPEG[:20] + b"stray" + JPEG[20:],  # after the first segment
    "png": encode(".png", picture(3, 24)),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_cut_is_seen_wherever_it_is(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    whole = WHOLE[kind]
    assert why_unusable(whole) is None
    assert {why_unusable(whole[:length]) for length in range(8, len(whole))} == {"truncated"}
    assert why_unusable(whole[: len(whole) // 2] + bytes(9999)) == "truncated"  # as a broken download leaves it
    capfd.readouterr()


@pytest.mark.parametrize("ending", [".webp", ".bmp"])
def test_other_formats_must_decode(ending: str, capfd: pytest.CaptureFixture[str]) -> None:
    whole = encode(ending)
    assert why_unusable(whole[: len(whole) // 2]) == "not an image"
    capfd.readouterr()


@pytest.mark.parametrize("data", [b"", b"# readme", b"\0\0\0\x01Bud1" + bytes(6000)])
def test_other_files_are_no_images(data: bytes) -> None:
    assert why_unusable(data) == "not an image"


def test_examples_run() -> None:
    assert doctest.testmod(store_module) == (0, 2)
