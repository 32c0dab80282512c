"""Images that would take all memory, images whose end is missing, and paths that are no file."""

import io
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pillow_heif
import pytest
from PIL import Image

import facecls.export.__main__ as export
import facecls.predict.__main__ as predict
from facecls import fit
from facecls.data import limits as limits_module
from facecls.data import parallel, store
from facecls.data.archives import UnreadableError
from facecls.data.folders import file_bytes, files_below
from facecls.data.image_sizes import scans_of, size_of
from facecls.data.limits import IMAGE_PIXELS, LIMITS, PIXELS_AT_ONCE, set_limits
from facecls.data.parallel import claim_pixels, in_order
from facecls.data.store import decode, why_unusable
from facecls.data.table import read_table
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError
from facecls.files import check_no_input
from facecls.predict.inputs import stream

WIDTH, HEIGHT = 61, 47
NAMES = ["1_0_0_20170116174525125.jpg", "2_0_0_20170116174525125.jpg"]


def picture(width: int = WIDTH, height: int = HEIGHT) -> npt.NDArray[np.uint8]:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX)


def by_opencv(ending: str) -> bytes:
    image = picture().astype(np.float32) if ending in (".hdr", ".pfm") else picture()
    image = image[..., 0] if ending in (".pgm", ".pbm") else image
    return bytes(cv2.imencode(ending, image)[1])


def by_pillow(form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    pillow_heif.register_heif_opener()
    Image.fromarray(picture()).save(stream, form, **options)
    return stream.getvalue()


BY_OPENCV = {
    ending: by_opencv(ending)
    for ending in (*(".jpg", ".png", ".webp", ".bmp", ".jp2", ".hdr", ".sr", ".pfm"), ".pam", ".ppm", ".pgm", ".pbm")
}
IMAGES = BY_OPENCV | {
    "progressive": by_pillow("JPEG", progressive=True),
    "lossless": by_pillow("WEBP", lossless=True),
    "extended": by_pillow("WEBP", exif=Image.Exif().tobytes() + b"\0" * 40),
    "j2k": by_pillow("JPEG2000", no_jp2=True),
    "gif": by_pillow("GIF"),
    "tiff": by_pillow("TIFF"),
    "lzw": by_pillow("TIFF", compression="tiff_lzw"),
    "avif": by_pillow("AVIF"),
    "heif": by_pillow("HEIF"),
}


UNCOMPRESSED = {".bmp", ".sr", ".pfm", ".pam", ".ppm", ".pgm", ".pbm", "tiff"}
"""Where zeros are black."""


@pytest.mark.parametrize("name", IMAGES)
def test_whole_images_are_read_and_headers_say_their_size(name: str) -> None:
    assert why_unusable(IMAGES[name]) is None
    assert decode(np.frombuffer(IMAGES[name], np.uint8)).shape == (HEIGHT, WIDTH, 3)
    if name in BY_OPENCV or name in ("progressive", "lossless", "extended", "j2k"):
        assert size_of(IMAGES[name]) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("kept", [0.4, 0.8, 0.97])
@pytest.mark.parametrize("name", sorted(IMAGES.keys() - UNCOMPRESSED))
def test_an_image_that_ends_in_zeros_is_no_whole_one(name: str, kept: float) -> None:
    whole = IMAGES[name].rstrip(b"\0")
    length = int(len(whole) * kept)
    assert why_unusable(whole[:length] + bytes(max(64, len(whole) - length))) in ("truncated", "not an image")


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def png(width: int, height: int) -> bytes:
    rows = zlib.compress(bytes(1_000_000), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def put(name: str, pattern: str, at: int, width: int, height: int) -> bytes:
    data = bytearray(IMAGES[name])
    struct.pack_into(pattern, data, at, width, height)
    return bytes(data)


def jpeg(width: int, height: int) -> bytes:
    at = next(found.start() for found in re.finditer(rb"\xff\xc0", IMAGES[".jpg"]))
    return put(".jpg", ">HH", at + 5, height, width)


SIDE = 16_000
TOO_LARGE = {
    "jpg": jpeg(SIDE, SIDE),
    "png": png(SIDE, SIDE),
    "webp": b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f" + ((SIDE - 1) | (SIDE - 1) << 14).to_bytes(4, "little") + bytes(9),
    "webp extended": b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + ((SIDE - 1).to_bytes(3, "little")) * 2 + bytes(9),
    "bmp": put(".bmp", "<ii", 18, SIDE, -SIDE),
    "ppm": b"P6\n# large\n16000 16000\n255\n",
    "pgm": b"P5 16000 16000 65535 ",
    "pam": b"P7\nWIDTH 16000\nHEIGHT 16000\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n",
    "pfm": b"PF\n16000 16000\n-1.0\n",
    "sr": put(".sr", ">II", 4, SIDE, SIDE),
    "hdr": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 16000 +X 16000\n",
    "jp2": IMAGES[".jp2"].replace(struct.pack(">II", HEIGHT, WIDTH), struct.pack(">II", SIDE, SIDE)),
    "j2k": IMAGES["j2k"].replace(struct.pack(">II", WIDTH, HEIGHT), struct.pack(">II", SIDE, SIDE)),
    "exr": b"v/1\x01\2\0\0\0dataWindow\0box2i\0\x10\0\0\0" + struct.pack("<iiii", 0, 0, SIDE - 1, SIDE - 1),
    "gif": put("gif", "<HH", 6, SIDE, SIDE),
    "tiff": IMAGES["tiff"]
    .replace(struct.pack("<HHIHH", 256, 4, 1, WIDTH, 0), struct.pack("<HHII", 256, 4, 1, SIDE))
    .replace(struct.pack("<HHIHH", 257, 4, 1, HEIGHT, 0), struct.pack("<HHII", 257, 4, 1, SIDE)),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_an_image_of_too_many_pixels_is_refused_by_its_header(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for library, function in ((cv2, "imdecode"), (Image.Image, "load")):
        monkeypatch.setattr(library, function, lambda *_: pytest.fail("it was decoded"))
    assert why_unusable(TOO_LARGE[name].ljust(64) + b"\xff\xd9") in (
        f"too large ({SIDE**2:,} pixels; the limit is {IMAGE_PIXELS:,}, --limits.image_pixels={SIDE**2} raises it)",
    )


@pytest.mark.parametrize("between", [b"", b"\xff\xfe\0\x04\xff\xd9", b"\xff"])
def test_a_jpeg_whose_last_scan_comes_again_and_again_is_refused(between: bytes) -> None:
    data = by_pillow("JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    scans = data.count(b"\xff\xda")
    assert scans_of(data) == scans
    assert why_unusable(data[:-2] + (between + scan) * (100 - scans) + data[-2:]) is None
    reason = why_unusable(data[:-2] + (between + scan) * (101 - scans) + data[-2:])
    assert reason == "too large (101 scans; the limit is 100)"


def test_scans_of_other_images_in_a_jpeg_are_not_its_own() -> None:
    thumbnail = b"\xff\xe1\x01\x02" + b"\xff\xda" * 128
    data = IMAGES[".jpg"]
    assert scans_of(data[:2] + thumbnail + data[2:] + data * 99) == 1


def test_opencv_has_the_same_limit_for_what_has_no_known_header() -> None:
    with pytest.raises(cv2.error, match="PIXELS"):
        cv2.imdecode(np.frombuffer(png(SIDE, SIDE), np.uint8), cv2.IMREAD_COLOR)


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_large_photos_are_read(form: str) -> None:
    stream = io.BytesIO()
    Image.new("L" if form == "TIFF" else "RGB", (10_000, 9_000) if form == "TIFF" else (6_000, 4_000)).save(
        stream, form
    )
    assert why_unusable(stream.getvalue()) is None


@pytest.fixture
def limits() -> Iterator[Callable[..., None]]:
    """Sets limits, and afterwards the defaults; Pillow's too."""
    before = Image.MAX_IMAGE_PIXELS
    yield set_limits
    set_limits()
    Image.MAX_IMAGE_PIXELS = before


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "JPEG2000", "TIFF", "GIF"])
def test_a_raised_limit_is_passed_by_all_decoders(
    form: str, limits: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if OpenCV and Pillow had lower limits of their own, like those for images that would take long to test."""
    data = np.frombuffer(by_pillow(form), np.uint8)
    wanted = decode(data)
    monkeypatch.setattr(store, "IMAGE_PIXELS", 1_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
    limits(image_pixels=2_000)
    with pytest.raises(ValueError, match=r"the limit is 2,000, --limits.image_pixels=2867 raises it"):
        decode(data)
    limits(image_pixels=2867)
    assert np.abs(decode(data).astype(int) - wanted).max() <= (3 if form in ("JPEG", "WEBP") else 0)


def test_limits_are_inherited(limits: Callable[..., None]) -> None:
    """As by the processes of a loader that begin anew, and then given back."""
    limits(image_pixels=5, names=7)
    code = "from facecls.data.limits import *; print(LIMITS.image_pixels, LIMITS.names, LIMITS.folders)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "5 7 100\n"
    limits(names=8)
    assert (LIMITS.image_pixels, LIMITS.names) == (IMAGE_PIXELS, 8)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"unknown": 1}', "3"])
def test_what_another_program_left_in_the_environment_is_no_limit(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACECLS_LIMITS", text)
    assert limits_module._inherited() == limits_module.Limits()


def test_threads_decode_only_so_many_pixels_together() -> None:
    lock = threading.Lock()
    at_once, most = 0, 0

    def work(pixels: int) -> None:
        nonlocal at_once, most
        claim_pixels(pixels)
        with lock:
            at_once += pixels
            most = max(most, at_once)
        np.zeros(100_000).sort()
        with lock:
            at_once -= pixels

    sizes = np.random.default_rng(0).integers(1, IMAGE_PIXELS, 100).tolist()
    list(in_order(work, iter([*sizes, 3 * IMAGE_PIXELS])))
    assert IMAGE_PIXELS < most <= max(PIXELS_AT_ONCE, 3 * IMAGE_PIXELS)
    assert parallel._claimed == 0


def _decode_in_a_fork() -> bool:
    """Whether a forked process can use the threads; it is ended if it waits for ever."""
    if not (child := os.fork()):
        signal.alarm(20)
        os._exit(list(in_order(claim_pixels, iter([IMAGE_PIXELS] * 3))) != [None] * 3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("is_locked", [False, True], ids=["pixels are claimed", "the lock is held"])
def test_a_process_that_is_forked_while_threads_decode_waits_for_none_of_them(is_locked: bool) -> None:
    is_claimed, may_end = threading.Event(), threading.Event()

    def hold(_: int) -> None:
        claim_pixels(PIXELS_AT_ONCE)
        with parallel._CHANGED if is_locked else nullcontext():
            is_claimed.set()
            may_end.wait()

    thread = threading.Thread(target=lambda: list(in_order(hold, iter([0]))))
    thread.start()
    is_claimed.wait()
    try:
        assert _decode_in_a_fork()
    finally:
        may_end.set()
        thread.join()
    assert parallel._claimed == 0  # here they were given back


def test_threads_hold_only_so_many_bytes_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "BYTES_AHEAD", 1_000)
    taken = 0

    def items() -> "object":
        nonlocal taken
        for _ in range(500):
            taken += 1
            yield 100

    for given, _ in enumerate(in_order(lambda item: item, items(), held=int)):  # type: ignore[arg-type]
        assert taken - given <= 1_000 / 100 + 2 * 8 + 2


def odd(kind: str, path: Path) -> None:
    """Makes what has a path but is no file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            before = Path.cwd()
            os.chdir(path.parent)  # such names may have 108 bytes
            opened.bind(path.name)
            os.chdir(before)
    else:
        path.symlink_to({"link to nothing": "nowhere", "link to itself": path.name, "device": "/dev/zero"}[kind])


REASONS = {
    "pipe": r"unreadable \(a device, pipe or socket\)",
    "socket": r"unreadable \(a device, pipe or socket\)",
    "device": r"unreadable \(a device, pipe or socket\)",
    "folder": r"unreadable \(Is a directory\)",
    "link to nothing": "a link to nothing",
    "link to itself": r"unreadable \(.*symbolic links\)",
}


@pytest.mark.parametrize("kind", REASONS)
@pytest.mark.parametrize("named", ["in a folder", "in a manifest", "in a list", "itself"])
def test_what_is_no_file_has_its_reason_everywhere(kind: str, named: str, tmp_path: Path) -> None:
    folder = tmp_path / "faces"
    folder.mkdir()
    (folder / NAMES[0]).write_bytes(IMAGES[".jpg"])
    odd(kind, folder / NAMES[1])
    if kind == "folder" and named != "in a manifest":
        (folder / NAMES[1] / NAMES[1]).write_bytes(b"")  # to be listed
        assert [path for path, _ in files_below(folder)] == [NAMES[0], f"{NAMES[1]}/{NAMES[1]}"]
        return
    given = folder
    if named == "in a manifest":
        given = folder / "faces.csv"
        given.write_text("path,age\n" + "".join(f"{name},30\n" for name in NAMES))
    if named == "in a list":
        given = folder / "faces.txt"
        given.write_text("".join(f"{name}\n" for name in NAMES))
    if named in ("in a folder", "in a manifest"):
        table = read_table(given, 0, UTKFACE)
        assert len(table.faces) == 1
        assert re.fullmatch(REASONS[kind], dict(table.rejects.itertuples(index=False))[NAMES[1]])
    if named == "itself":
        given = folder / NAMES[1]
    *_, odd_one = stream([str(given)])
    with pytest.raises(UnreadableError, match=f"^{REASONS[kind]}$"):
        odd_one.load()


@pytest.mark.parametrize("ending", [".tar", ".zip", ".csv", ".parquet", ".txt"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link to nothing"])
def test_a_source_that_is_no_file_is_one_line(ending: str, kind: str, tmp_path: Path) -> None:
    odd(kind, tmp_path / f"x{ending}")
    with pytest.raises(UserError, match=r"a device, pipe or socket|there is nothing at"):
        read_table(tmp_path / f"x{ending}", 0, UTKFACE)


def test_a_file_is_read_only_up_to_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "sparse.jpg"
    with file.open("wb") as stream:
        stream.truncate(6 << 30)
    with pytest.raises(
        UnreadableError,
        match=r"too large \(6,442,450,944 bytes; the limit is 256,000,000, --limits.file_bytes=6442450944 raises it\)",
    ):
        file_bytes(file)


def test_folders_are_followed_only_so_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LIMITS, "folders", 5)
    deep = tmp_path.joinpath(*"abcdef")
    deep.mkdir(parents=True)
    (deep.parents[1] / "1.jpg").touch()
    (deep / "2.jpg").touch()
    found = dict(files_below(tmp_path))
    assert found["a/b/c/d/1.jpg"] is None
    assert "5 folders" in str(found["a/b/c/d/e"])


def test_links_in_circles_are_one_line(tmp_path: Path) -> None:
    for one, other in (("a.jpg", "b.jpg"), ("b.jpg", "a.jpg"), ("itself.ckpt", "itself.ckpt")):
        (tmp_path / one).symlink_to(other)
    (tmp_path / "out").mkdir()
    given = list(stream([str(tmp_path)], [tmp_path / "out", tmp_path / "a.jpg"]))
    for each in given:
        with pytest.raises(UnreadableError, match=r"unreadable \(.*symbolic links\)"):
            each.load()
    assert [Path(str(each.path)).name for each in given] == ["b.jpg", "itself.ckpt"]
    loop = tmp_path / "itself.ckpt"
    for act in (
        lambda: predict.main([str(loop), str(tmp_path)]),
        lambda: export.main([str(loop), str(tmp_path / "x.onnx")]),
        lambda: fit.main(["--data.root=synthetic:20", f"--ckpt_path={loop}"]),
        lambda: check_no_input(tmp_path / "a.jpg", [tmp_path / "a.jpg"]),
    ):
        with pytest.raises(UserError):
            act()


@pytest.mark.parametrize("room", ["facecls", "convert"])
def test_no_path_is_resolved_that_may_lead_in_circles(room: str) -> None:
    for file in (Path(__file__).parent.parent / room).rglob("*.py"):
        assert ".resolve()" not in file.read_text(encoding="utf-8"), file


@pytest.mark.parametrize("name", ["x" * 300, "/".join("x" * 200 for _ in range(30)), "a\0b"])
def test_long_and_impossible_names_are_one_line(name: str) -> None:
    with pytest.raises(UserError, match="Expected a folder, "):
        read_table(name, 0, UTKFACE)
