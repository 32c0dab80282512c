"""What is named becomes a stream of faces, each once, in order and as it is, and what can't be read says why."""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image, ImageOps

from facecls.data import columns
from facecls.data.archives import UnreadableError
from facecls.data.file_names import parse_name
from facecls.data.parallel import WORKERS, in_order
from facecls.data.synthetic import draw_faces, wears_glasses
from facecls.data.tasks import UTKFACE, create_tasks
from facecls.errors import UserError
from facecls.predict.inputs import Input, check, count, stream

pytestmark = pytest.mark.usefixtures("own_folder")

Pixels = npt.NDArray[np.uint8]


def picture(seed: int = 0) -> Image.Image:
    """A smooth random picture, higher than wide."""
    noise = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    return Image.fromarray(cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 4), None, 0, 255, cv2.NORM_MINMAX))


def encoded(image: Image.Image | None = None, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    (image or picture()).save(stream, kind, **options)
    return stream.getvalue()


def paths(*words: object) -> list[str | None]:
    return [each.path for each in stream([str(word) for word in words])]


def reason(given: Input) -> str | None:
    try:
        given.load()
    except UnreadableError as error:
        return str(error)
    return None


def reasons(*words: object) -> dict[str | None, str | None]:
    return {each.path: reason(each) for each in stream([str(word) for word in words])}


@pytest.fixture
def tree() -> list[str]:
    """Files whose order by path is not the order by folder."""
    names = ["b.png", "a/1.png", "a/2.png", "a-b/1.png", "a.png", "a/deep/er/1.png", "Z/1.png", "é.png"]
    for name in names:
        file = Path("faces", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded())
    return [f"faces/{name}" for name in names]


def test_a_folder_is_all_files_below_it_sorted_by_path(tree: list[str]) -> None:
    for clutter in ("faces/.DS_Store", "faces/a/._1.png"):
        Path(clutter).write_bytes(b"x")
    assert paths("faces") == paths("./faces/") == sorted(tree)
    Path("faces/a/round").symlink_to("..")
    Path("faces/gone.png").symlink_to("nowhere.png")
    assert paths("faces") == sorted([*tree, "faces/gone.png"])
    assert reasons("faces")["faces/gone.png"] == "a link to nothing"


def test_a_folder_that_cannot_be_listed_is_one_that_cannot_be_read(
    tree: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(folder: Path) -> Any:
        if folder == Path("faces/a"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr("os.scandir", refuse)  # root, whom tests may run as, may list every folder
    errors = reasons("faces")
    assert {path: why for path, why in errors.items() if why} == {"faces/a": "unreadable (Permission denied)"}
    assert len(errors) == 6


def test_files_and_globs(tree: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert paths("faces/b.png", "./faces/a.png") == ["faces/b.png", "faces/a.png"]
    assert paths("faces/*.png") == sorted(name for name in tree if name.count("/") == 1)
    deep = sorted(name for name in tree if name.startswith("faces/a/"))
    assert paths("faces/a*") == [*deep, "faces/a-b/1.png", "faces/a.png"]  # as a shell sorts them
    assert paths("faces/**/1.png") == sorted(name for name in tree if name.endswith("/1.png"))
    assert sorted(map(str, paths("faces/**"))) == sorted(tree)  # no file twice
    Path("[1].png").write_bytes(encoded())
    assert paths("[1].png") == ["[1].png"]
    monkeypatch.setenv("HOME", str(Path("faces/a").absolute()))
    assert paths("~/*.png") == [f"{Path.home()}/{number}.png" for number in (1, 2)]
    assert paths("~/1.png") == [f"{Path.home()}/1.png"]


def test_what_is_misspelt_says_so(tree: list[str]) -> None:
    assert reasons("faces/b.png", "faces/c.png", "x*.png", "n" * 300, "no.zip") == {
        "faces/b.png": None,
        "faces/c.png": "missing file",
        "x*.png": "no file matches",
        "n" * 300: "unreadable (File name too long)",
        "no.zip": "missing file",
    }


def test_files_are_read_when_they_are_asked_for(tree: list[str]) -> None:
    inputs = list(stream(["faces"]))
    Path("faces/b.png").unlink()
    Path("faces/a.png").write_text("no image")
    Path("faces/a/1.png").write_bytes(encoded()[:-20])
    errors = {each.path: reason(each) for each in inputs}
    assert {path: why for path, why in errors.items() if why} == {
        "faces/b.png": "missing file",
        "faces/a.png": "not an image",
        "faces/a/1.png": "truncated",
    }


def pack(archive: str, members: dict[str, bytes]) -> None:
    if archive.endswith(".zip"):
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as pack:
            for name, data in members.items():
                pack.writestr(name, data)
        return
    with tarfile.open(archive, "w:gz" if archive.endswith("gz") else "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


ARCHIVES = ["faces.tar", "faces.tar.gz", "faces.TGZ", "faces.zip"]


@pytest.mark.parametrize("archive", ARCHIVES)
def test_archives_are_read_in_place_and_in_order(archive: str) -> None:
    members = {f"in/{number}.png": encoded(picture(number)) for number in (3, 1, 2)}
    pack(archive, members | {"__MACOSX/in/._3.png": b"x", "in/readme.txt": b"hello"})
    inputs = list(stream([archive]))
    assert [each.path for each in inputs] == [f"{archive}/{name}" for name in [*members, "in/readme.txt"]]
    assert reason(inputs.pop()) == "not a photo"
    for number, each in zip((3, 1, 2), inputs, strict=True):  # long after the archive was closed
        assert (each.load() == np.asarray(picture(number))).all()
    assert {path.name for path in Path().iterdir()} == {archive}


@pytest.mark.parametrize("archive", ["faces.tar", "faces.tar.gz"])
def test_the_rest_of_a_cut_archive_is_one_input_that_cannot_be_read(archive: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 300, 300, 3), np.uint8)
    pack(archive, {f"{number}.bmp": encoded(Image.fromarray(each), "BMP") for number, each in enumerate(noise)})
    Path("last.png").write_bytes(encoded())
    data = Path(archive).read_bytes()
    Path(archive).write_bytes(data[: len(data) // 2])
    check([archive])  # it can be opened
    errors = reasons(archive, "last.png")
    *whole, cut, last = errors.items()
    assert [path for path, _ in whole] == [f"{archive}/{number}.bmp" for number in range(len(whole))]
    assert len(whole) in (3, 4)
    assert cut[0] == archive
    assert "is the download complete?" in str(cut[1])
    assert last == ("last.png", None)


def test_a_damaged_member_of_a_zip_is_that_one_alone() -> None:
    pack("faces.zip", {f"{number}.png": encoded(picture(number)) for number in range(3)})
    data = bytearray(Path("faces.zip").read_bytes())
    at = data.find(encoded(picture(1))[-60:-40])
    with zipfile.ZipFile("faces.zip") as whole:
        at = whole.getinfo("1.png").header_offset + 60
    data[at : at + 9] = bytes(9)
    Path("faces.zip").write_bytes(data)
    assert list(reasons("faces.zip").values()) == [None, "damaged or encrypted in the archive", None]


@pytest.mark.parametrize("manifest", ["lists/all.csv", "lists/all.parquet"])
def test_manifests_name_files_and_truths(
    manifest: str, tree: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "CHUNK", 2)
    Path("lists").mkdir()
    rows = pd.DataFrame(
        {
            "race": ["2", "", "7", "0", "0"],
            "path": ["../faces/b.png", str(tmp_path / "faces/a.png"), "gone.png", "", "../faces/b.png"],
            "age": ["26", "x", "0", "1", "2"],
        }
    )
    rows.to_csv(manifest, index=False) if manifest.endswith("csv") else rows.to_parquet(manifest)
    inputs = list(stream([manifest], tasks=UTKFACE))
    assert [each.path for each in inputs] == [
        "lists/../faces/b.png",
        f"{tmp_path}/faces/a.png",
        "lists/gone.png",
        manifest,
        "lists/../faces/b.png",
    ]
    assert [reason(each) for each in inputs] == [None, None, "missing file", "no path", None]
    assert [each.labels for each in inputs[:3]] == [
        {"race": "2", "age": "26"},
        {"race": "", "age": "x"},
        {"race": "7", "age": "0"},
    ]
    assert [each.labels for each in stream([manifest])] == [{}] * 5


def test_a_manifest_as_others_write_it(tree: list[str]) -> None:
    Path("fairface.csv").write_text("file,age,gender,race,service_test\nfaces/b.png,20-29,Male,East Asian,True\n")
    (given,) = stream(["fairface.csv"], tasks={name: UTKFACE[name] for name in ("age", "race")})
    assert (given.path, reason(given)) == ("faces/b.png", None)
    assert given.labels == {"age": "20-29", "race": "East Asian"}


def test_a_manifest_is_read_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "CHUNK", 3)
    Path("all.csv").write_text("path\n" + "a.png\n" * 6 + 'b.png\n"cut')
    assert [each.path for each in islice(stream(["all.csv"]), 6)] == ["a.png"] * 6
    inputs = list(stream(["all.csv"]))
    assert inputs[-1].path == "all.csv"
    assert "can't be read" in str(reason(inputs[-1]))


def test_a_list_on_standard_input(tree: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pack("faces.zip", {"1.png": encoded()})
    listed = b"faces/b.png\r\n\nfaces/a\nfaces.zip\n./[x]\nodd\xff.png"

    class Stdin:
        buffer = io.BytesIO(listed)

    monkeypatch.setattr("sys.stdin", Stdin)
    listed_paths = paths("faces/a.png", "-", "faces/Z")
    deep = sorted(name for name in tree if name.startswith("faces/a/"))
    assert listed_paths == [
        "faces/a.png",
        "faces/b.png",
        *deep,
        "faces.zip/1.png",
        "[x]",
        "odd\\udcff.png",
        "faces/Z/1.png",
    ]


def test_what_is_left_out(tree: list[str]) -> None:
    out = Path("faces/out.csv")
    out.write_text("path\n")
    assert set(paths("faces")) == {*tree, "faces/out.csv"}
    for words in (["faces"], ["faces/*"], ["faces/out.csv", "faces"]):
        assert "faces/out.csv" not in [each.path for each in stream(words, {out.resolve()})]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone.png", "x*.jpg"], r"nothing at gone\.png, x\*\.jpg"),
        (["text.zip"], "archive text.zip"),
        (["faces", "text.tar.gz"], "archive text.tar.gz"),
        (["text.csv"], "Expected the columns path in text.csv"),
        (["text.parquet"], "Expected a Parquet file in text.parquet"),
        (["faces", "synthetic:x"], "Expected synthetic:N"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: list[str], said: str, tree: list[str]) -> None:
    for ending in ("zip", "tar.gz", "csv", "parquet"):
        Path(f"text.{ending}").write_text("hello\n" * 200)
    with pytest.raises(UserError, match=said):
        check(words)


def test_one_word_that_leads_somewhere_is_enough(tree: list[str]) -> None:
    for words in (["gone.png", "faces"], ["-"], ["faces/b*", "gone.png"]):
        check(words)


def test_how_many_there_are(tree: list[str]) -> None:
    Path("all.csv").write_text("path\na.png\nb.png\n")
    pack("faces.tar", {"1.png": b""})
    words = ["faces", "all.csv", "faces/*.png", "gone.png"]
    assert count(words) == len(paths(*words)) == 8 + 2 + 3 + 1
    assert count(["faces", "faces.tar"]) is None
    assert count(["-"]) is None
    assert count(["synthetic:1000000000", "faces"]) is None  # at once


@pytest.mark.parametrize("glasses", [True, False])
def test_drawn_faces(glasses: bool, tree: list[str]) -> None:
    tasks = create_tasks({"glasses": {"classes": ["without", "with"]}}) if glasses else UTKFACE
    check(["synthetic:5"])
    inputs = list(stream(["faces/b.png", "synthetic:5"], tasks=tasks))[1:]
    faces = list(draw_faces(5, seed=0, glasses=glasses))
    assert [each.path for each in inputs] == [f"synthetic:5/{name}" for name, _ in faces]
    for index, (each, (name, jpeg)) in enumerate(zip(inputs, faces, strict=True)):
        worn = {"glasses": ("without", "with")[wears_glasses(0, index)]} if glasses else {}
        assert each.labels == {**parse_name(name), **worn}
        pixels = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
        np.testing.assert_array_equal(each.load(), pixels)


def test_ranges_in_columns_of_their_own(tree: list[str]) -> None:
    Path("all.csv").write_text("path,age_from,age_to\nfaces/b.png,20,29\nfaces/a.png,,\n")
    assert [each.labels for each in stream(["all.csv"], tasks=UTKFACE)] == [{"age": "20-29"}, {"age": ""}]


def _deep() -> Image.Image:
    return Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257)


def _cv2(ending: str, pixels: npt.NDArray[Any]) -> bytes:
    return bytes(cv2.imencode(ending, pixels)[1])


def _ycck() -> bytes:
    """Pillow doesn't write YCCK, but a CMYK JPEG is one when its channels are and its Adobe marker says so."""
    cmyk = np.asarray(picture().convert("CMYK"))
    luma = np.asarray(Image.fromarray(np.ascontiguousarray(cmyk[..., :3])).convert("YCbCr"))
    four = np.dstack([255 - luma, cmyk[..., 3]])  # Pillow inverts all four on the way
    jpeg = bytearray(encoded(Image.fromarray(four, "CMYK"), "JPEG", quality=98, subsampling=0))
    jpeg[jpeg.index(b"Adobe") + 11] = 2
    return bytes(jpeg)


ALPHA = Image.fromarray(np.arange(1200, dtype=np.uint16).astype(np.uint8).reshape(40, 30))
RGB16 = np.asarray(picture())[..., ::-1].astype(np.uint16) * 257
RGB: Callable[[], Image.Image] = picture
GREY = picture().convert("L").convert("RGB")
PALETTE = picture().quantize(64)
WITH_ALPHA = picture().copy()
WITH_ALPHA.putalpha(ALPHA)
GREY_ALPHA = picture().convert("LA")
GREY_ALPHA.putalpha(ALPHA)
KINDS = {
    "grey.jpg": (encoded(GREY.convert("L"), "JPEG", quality=95), GREY),
    "grey.png": (encoded(GREY.convert("L")), GREY),
    "one bit.png": (encoded(picture().convert("1")), picture().convert("1").convert("RGB")),
    "cmyk.jpg": (encoded(picture().convert("CMYK"), "JPEG", quality=98, subsampling=0), picture()),
    "ycck.jpg": (_ycck(), picture()),
    "cmyk.tif": (encoded(picture().convert("CMYK"), "TIFF"), picture()),
    "16 bits grey.png": (encoded(_deep()), GREY),
    "16 bits grey.tif": (encoded(_deep(), "TIFF"), GREY),
    "16 bits.png": (_cv2(".png", RGB16), picture()),
    "16 bits.tif": (_cv2(".tif", RGB16), picture()),
    "16 bits alpha.png": (_cv2(".png", np.dstack([RGB16, RGB16[..., 0]])), picture()),
    "alpha.png": (encoded(WITH_ALPHA), picture()),
    "alpha.tif": (encoded(WITH_ALPHA, "TIFF"), picture()),
    "grey alpha.png": (encoded(GREY_ALPHA), GREY),
    "palette.png": (encoded(PALETTE), PALETTE.convert("RGB")),
    "transparent palette.png": (encoded(PALETTE, transparency=bytes(range(64))), PALETTE.convert("RGB")),
    "palette.gif": (encoded(PALETTE, "GIF"), PALETTE.convert("RGB")),
    "transparent.gif": (encoded(PALETTE, "GIF", transparency=3), PALETTE.convert("RGB")),
    "palette.bmp": (encoded(PALETTE, "BMP"), PALETTE.convert("RGB")),
    "lossless.webp": (encoded(picture(), "WEBP", lossless=True), picture()),
    "8 bits in 16.png": (_cv2(".png", RGB16 // 257), picture()),
    "grey.pfm": (_cv2(".pfm", np.asarray(GREY.convert("L"), np.float32)), GREY),
    "good.avif": (encoded(picture(), "AVIF", quality=95, subsampling="4:4:4"), picture()),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_comes_out_as_it_went_in(name: str) -> None:
    data, truth = KINDS[name]
    Path(name).write_bytes(data)
    (given,) = stream([name])
    pixels = given.load()
    wanted = np.asarray(truth).astype(int)
    assert pixels.shape == wanted.shape
    assert pixels.dtype == np.uint8
    lossy = name.endswith((".jpg", ".avif"))
    assert np.abs(pixels - wanted).mean() < (2.5 if lossy else 1e-9)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_pictures_are_upright_whatever_their_orientation(kind: str) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        data = encoded(picture(), kind, exif=exif, quality=95)
        Path("face").write_bytes(data)
        (given,) = stream(["face"])
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        pixels = given.load()
        assert pixels.shape == ((40, 30, 3) if orientation < 5 else (30, 40, 3))
        assert np.abs(pixels.astype(int) - np.asarray(upright)).max() <= 3


def test_threads_keep_the_order_and_take_no_more_than_they_may() -> None:
    taken = 0

    def items() -> Any:
        nonlocal taken
        while taken < 1000:
            taken += 1
            yield taken

    for given, square in enumerate(in_order(lambda item: item * item, items(), ahead=24), 1):
        assert square == given * given
        assert taken - given <= 24 + 8
    assert given == taken == 1000
    assert WORKERS >= 1


# --- lists as people write them ---


LISTS = {
    "plain": b"in/1.png\nin/b 2.png\n",
    "BOM and CRLF": b"\xef\xbb\xbfin/1.png\r\nin/b 2.png\r\n",
    "quotes": b"\"in/1.png\"\n'in/b 2.png'\n",
    "backslashes": b'in\\1.png\r\n"in\\b 2.png"\r\n',
    "spaces and empty lines": b"\n  in/1.png  \n\n\tin/b 2.png\n\n",
    "no end": b"in/1.png\nin/b 2.png",
}


@pytest.fixture
def listed(own_folder: None) -> None:
    Path("in").mkdir()
    for name in ("1.png", "b 2.png"):
        Path("in", name).write_bytes(encoded())


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize("kind", LISTS)
def test_a_list_on_standard_input_is_read_however_it_is_written(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(LISTS[kind])))
    assert reasons("-") == {"in/1.png": None, "in/b 2.png": None}


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("place", ["list.txt", "lists/list.txt", "in/../list.TXT"])
def test_a_text_file_of_paths_is_a_list(place: str, kind: str) -> None:
    Path("lists").mkdir()
    Path(place).write_bytes(LISTS[kind])
    assert reasons(place) == {"in/1.png": None, "in/b 2.png": None}
    assert count([place]) == 2


@pytest.mark.usefixtures("listed")
def test_the_paths_of_a_list_may_be_relative_to_it() -> None:
    Path("in/list.txt").write_text("1.png\nb 2.png\n3.png\n")
    assert reasons("in/list.txt") == {"in/1.png": None, "in/b 2.png": None, "3.png": "missing file"}


@pytest.mark.usefixtures("listed")
def test_a_text_file_with_a_header_is_a_manifest_and_one_of_words_is_no_image() -> None:
    Path("in/faces.txt").write_text("file\tage\n1.png\t30\n")
    assert [(each.path, dict(each.labels)) for each in stream(["in/faces.txt"], tasks=UTKFACE)] == [
        ("in/1.png", {"age": "30"})
    ]
    Path("notes.txt").write_text("Holidays in Rome\nwith Anna\n")
    assert reasons("notes.txt") == {"notes.txt": "not an image"}


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize("encoding", ["utf-16", "cp1252", "utf-8-sig"])
def test_a_list_in_another_encoding_is_read(encoding: str) -> None:
    Path("in/ä.png").write_bytes(encoded())
    Path("list.txt").write_bytes("in/1.png\r\nin/ä.png\r\n".encode(encoding))
    assert reasons("list.txt") == {"in/1.png": None, "in/ä.png": None}


def test_a_list_of_photos_that_are_gone_names_them() -> None:
    Path("list.txt").write_text("".join(f"gone/{number}.jpg\n" for number in range(30)))
    assert reasons("list.txt") == {f"gone/{number}.jpg": "missing file" for number in range(30)}


def test_a_name_that_begins_as_a_home_folder_does() -> None:
    Path("~1.png").write_bytes(encoded())
    assert reasons("~1.png", "~nosuch*.png") == {"~1.png": None, "~nosuch*.png": "no file matches"}


@pytest.mark.usefixtures("listed")
def test_a_list_may_name_folders_and_archives() -> None:
    pack("faces.zip", {"9.png": encoded()})
    Path("list.txt").write_text("in\nfaces.zip\n")
    assert paths("list.txt") == ["in/1.png", "in/b 2.png", "faces.zip/9.png"]


def test_archives_in_a_folder_are_read_with_it() -> None:
    Path("in").mkdir()
    Path("in/1.png").write_bytes(encoded())
    pack("in/a.zip", {"x\\2.png": encoded(), "Thumbs.db": b"x"})
    Path("in/cut.tar").write_bytes(b"no archive" * 100)
    found = reasons("in")
    assert list(found) == ["in/1.png", "in/a.zip/x/2.png", "in/cut.tar"]
    assert found["in/1.png"] is found["in/a.zip/x/2.png"] is None
    assert "Can't read the archive in/cut.tar" in str(found["in/cut.tar"])
