"""Faces are cut out of photos as a training set: the right ones, aligned, with their labels, and fit learns from it."""

import re
import shutil
import signal
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from photos import background, put
from PIL import Image
from trained_model import save_checkpoint

from facecls.crop.__main__ import FACES, LEFT_OUT, MANIFEST, main
from facecls.crop.cutter import Cutter, Job
from facecls.data.store import decode
from facecls.data.synthetic import draw_faces
from facecls.data.table import read_table
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError
from facecls.finding.detector import Detector
from facecls.finding.frame import UTKFACE_FRAME, measure
from facecls.predict.inputs import NO_FACE, NO_PHOTO

pytestmark = pytest.mark.usefixtures("own_folder")

Pixels = npt.NDArray[np.uint8]


def photo(faces: list[tuple[Pixels, float, float, float]], kind: str = "texture") -> Pixels:
    """A photo of 800 x 600 pixels with faces: each with the x and y of its middle, and its size."""
    made = background(kind, 800, 600)
    for face, x, y, size in faces:
        put(made, face, x, y, size, angle=15)
    return made


def save(picture: Pixels, path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def read(path: str | Path) -> Pixels:
    return decode(np.fromfile(path, np.uint8))


def tables(out: str) -> tuple[pd.DataFrame, dict[str, str]]:
    """The manifest, and the reasons of what was left out."""
    left_out = pd.read_csv(f"{out}/{LEFT_OUT}", dtype=str).set_index("path")["reason"]
    return pd.read_csv(f"{out}/{MANIFEST}", dtype=str, keep_default_na=False), dict(left_out)


def is_of(cut: Path, face: Pixels, others: list[Pixels]) -> bool:
    """Whether a face that was cut out looks most like one of several."""

    def distance(other: Pixels) -> float:
        # both in the frame of UTKFace: the face as it was drawn, found and aligned by OpenCV alone
        found = Detector().find(other)[0].points
        matrix = cv2.estimateAffinePartial2D(found, UTKFACE_FRAME.points * 200 - 0.5, method=cv2.LMEDS)[0]
        aligned = cv2.warpAffine(other, matrix, (200, 200), borderMode=cv2.BORDER_REFLECT_101)
        middle = np.s_[40:160, 40:160]
        return float(np.abs(aligned[middle].astype(float) - read(cut)[middle]).mean())

    return min([face, *others], key=distance) is face


def test_the_largest_and_most_central_face_of_each_photo(
    portraits: list[Pixels], capsys: pytest.CaptureFixture[str]
) -> None:
    save(photo([(portraits[0], 120, 150, 150), (portraits[1], 400, 320, 260)]), "in/31_0_1_20170101000000001.jpg")
    corner = (portraits[3], 690, 110, 205)  # nearly as large
    save(photo([(portraits[2], 400, 300, 200), corner]), "in/sub/b.png")
    save(background("noise", 300, 200), "in/c.jpg")
    Path("in/d.jpg").write_text("hello")
    Path("in/notes.md").write_text("hello")
    main(["in", "out"])
    manifest, left_out = tables("out")
    assert left_out == {"in/c.jpg": NO_FACE, "in/d.jpg": "not an image", "in/notes.md": NO_PHOTO}
    assert manifest.to_dict("list") == {
        "path": [f"{FACES}/31_0_1_20170101000000001.jpg", f"{FACES}/sub/b.png.jpg"],
        "photo": ["in/31_0_1_20170101000000001.jpg", "in/sub/b.png"],
        "gender": ["male", ""],
        "race": ["black", ""],
        "age": ["31", ""],
    }
    first, second = (Path("out") / path for path in manifest["path"])
    assert is_of(first, portraits[1], [portraits[0]])
    assert is_of(second, portraits[2], [portraits[3]])
    for cut in (first, second):
        assert read(cut).shape == (200, 200, 3)
        (found,) = Detector().find(read(cut))
        assert np.abs((found.points + 0.5) / 200 - UTKFACE_FRAME.points).max() < 0.08  # drawn faces are no real ones
    said = capsys.readouterr().err
    assert said == f"2 faces; left out: 1 no face found, 1 not an image, 1 not a photo\nwrote out/{MANIFEST}\n"


def test_boxes_of_a_manifest_say_which_faces(portraits: list[Pixels]) -> None:
    three = [(portraits[0], 150, 300, 160), (portraits[1], 400, 300, 260), (portraits[2], 680, 300, 120)]
    save(photo(three), "in/a.jpg")
    save(photo([(portraits[3], 300, 300, 200)]), "in/b.jpg")
    save(photo([(portraits[4], 300, 300, 200)]), "in/unlisted.jpg")
    Path("labels.csv").write_text(
        "\ufeffFile;Age;glasses;X;Y;Width;Height;split\n"
        "in\\a.jpg;20;with;70;220;160;160;train\n"  # Windows' slashes, a spreadsheet's separator
        "in\\a.jpg;30;;620;240;120;120;val\n"
        "in\\b.jpg;40;without;;;;;test\n"
        "in\\b.jpg;41;without;600;10;50;50;test\n"
        "in\\gone.jpg;50;;;;;;train\n",
        encoding="utf-8",
    )
    main(["in", "out", "--manifest", "labels.csv"])
    manifest, left_out = tables("out")
    assert left_out == {
        "in/b.jpg": "several rows of the manifest without a box",
        "in/unlisted.jpg": "not in the manifest",
        "in\\gone.jpg": "no such photo",
    }
    assert list(manifest) == ["path", "photo", "Age", "glasses", "split"]
    assert manifest["path"].tolist() == [f"{FACES}/a.1.jpg", f"{FACES}/a.2.jpg"]
    assert manifest["Age"].tolist() == ["20", "30"]
    assert is_of(Path("out") / FACES / "a.1.jpg", portraits[0], [portraits[1], portraits[2]])
    assert is_of(Path("out") / FACES / "a.2.jpg", portraits[2], [portraits[0], portraits[1]])


def test_the_smallest_face_in_a_large_photo_is_found_in_its_box(portraits: list[Pixels]) -> None:
    large = background("gradient", 4000, 3000)
    put(large, portraits[0], 3000, 2000, 40)
    put(large, portraits[1], 1000, 1000, 900)
    save(large, "in/a.jpg")
    Path("labels.csv").write_text("path,age,x,y,width,height\na.jpg,20,2980,1980,40,40\n")
    main(["in", "out", "--manifest", "labels.csv"])
    assert tables("out")[0]["age"].tolist() == ["20"]
    assert is_of(Path("out") / FACES / "a.jpg", portraits[0], [portraits[1]])


@pytest.mark.parametrize(
    ("listed", "is_met"),
    [
        ("a.jpg", True),
        ("in/sub/a.jpg", True),
        ("C:\\Users\\Anna\\sub\\a.jpg", True),
        ("/home/anna/in/sub/a.jpg", True),
        ("other/a.jpg", False),
        ("b.jpg", False),
    ],
)
def test_a_row_belongs_to_a_photo_by_its_path(listed: str, is_met: bool, portraits: list[Pixels]) -> None:
    save(photo([(portraits[0], 400, 300, 200)]), "in/sub/a.jpg")
    Path("labels.csv").write_text(f"path,age\n{listed},20\n")
    if is_met:
        main(["in", "out", "--manifest", "labels.csv"])
    else:
        with pytest.raises(UserError, match="took none; left out: 1 not in the manifest, 1 no such photo"):
            main(["in", "out", "--manifest", "labels.csv"])
        assert not Path("out", MANIFEST).exists()
        return
    manifest, left_out = tables("out")
    assert (manifest["age"].tolist(), left_out) == (["20"], {})


@pytest.mark.parametrize("before", ["", "album/", "C:\\\\photos\\\\", "/data/in/", "./"])
def test_all_rows_begin_alike(before: str, portraits: list[Pixels]) -> None:
    """Photos of one name in two folders have rows of their own."""
    for folder in ("one", "two"):
        save(photo([(portraits[0], 400, 300, 200)]), f"in/{folder}/a.jpg")
    Path("labels.csv").write_text(f"path,age\n{before}one/a.jpg,20\n{before}two/a.jpg,30\n{before}three/a.jpg,40\n")
    main(["in", "out", "--manifest", "labels.csv"])
    manifest, left_out = tables("out")
    assert dict(zip(manifest["photo"], manifest["age"], strict=True)) == {"in/one/a.jpg": "20", "in/two/a.jpg": "30"}
    assert left_out == {f"{before}three/a.jpg": "no such photo"}


def test_rows_of_another_folder_label_no_photo(portraits: list[Pixels]) -> None:
    for name in ("a", "b", "c"):
        save(photo([(portraits[0], 400, 300, 200)]), f"photos/train/{name}.jpg")
    Path("labels.csv").write_text("path,age\ntrain/a.jpg,20\nval/a.jpg,88\nval/b.jpg,99\nval/c.jpg,77\n")
    main(["photos/train", "out", "--manifest", "labels.csv"])
    assert tables("out")[0]["age"].tolist() == ["20"]


@pytest.mark.parametrize("rows", ["x/a.jpg,20\ny/a.jpg,30", "a.jpg,20"])
def test_rows_that_may_mean_several_photos_are_refused(rows: str, portraits: list[Pixels]) -> None:
    for name in ("one/a.jpg", "two/a.jpg", "a.jpg") if "x" in rows else ("one/a.jpg", "two/a.jpg"):
        save(photo([(portraits[0], 400, 300, 200)]), f"in/{name}")
    Path("labels.csv").write_text(f"path,age\n{rows}\n")
    with pytest.raises(UserError, match=r"fit in 2 ways \(.*\); name the folder or archive that the paths begin in"):
        main(["in", "out", "--manifest", "labels.csv"])
    assert not Path("out").exists()


def test_letters_may_be_composed_in_two_ways(portraits: list[Pixels]) -> None:
    save(photo([(portraits[0], 400, 300, 200)]), f"in/{unicodedata.normalize('NFD', 'José')}.jpg")
    Path("labels.csv").write_text(f"path,age\n{unicodedata.normalize('NFC', 'José')}.jpg,20\n", encoding="utf-8")
    main(["in", "out", "--manifest", "labels.csv"])
    assert tables("out")[0]["age"].tolist() == ["20"]


def test_no_two_boxes_get_one_face(portraits: list[Pixels]) -> None:
    save(photo([(portraits[0], 400, 300, 200)]), "in/a.jpg")
    Path("labels.csv").write_text("path,age,x,y,width,height\na.jpg,70,200,150,420,300\na.jpg,20,300,200,200,200\n")
    main(["in", "out", "--manifest", "labels.csv"])
    manifest, left_out = tables("out")
    assert (manifest["age"].tolist(), left_out) == (["20"], {"in/a.jpg": "no face found in its box"})


def test_no_face_is_written_over_another(portraits: list[Pixels]) -> None:
    """Names that become one, whichever thread is done first: the face and the labels of the first photo stay."""
    save(photo([(portraits[0], 200, 300, 160), (portraits[1], 600, 300, 160)]), "in/a.jpg")
    save(photo([(portraits[2], 400, 300, 160)]), "in/a.1.jpg")
    save(photo([(portraits[3], 400, 300, 160)]), "in/b.jpg/c.jpg")
    save(photo([(portraits[4], 400, 300, 160)]), "b.jpg")
    shutil.move("b.jpg", "in/b")
    save(photo([(portraits[5], 400, 300, 160)]), "in/B.jpg")
    boxes = "a.jpg,1,120,220,160,160\na.jpg,2,520,220,160,160\na.1.jpg,3,,,,\nb.jpg/c.jpg,4,,,,\nb,5,,,,\nB.jpg,6,,,,\n"
    Path("labels.csv").write_text(f"path,age,x,y,width,height\n{boxes}")
    main(["in", "out", "--manifest", "labels.csv"])
    manifest, left_out = tables("out")
    known = dict(zip(manifest["path"], manifest["age"], strict=True))
    wanted = {"a.1.jpg": "3", "a.2.jpg": "2", "B.jpg": "6", "b.jpg_/c.jpg": "4"}
    assert known == {f"{FACES}/{name}": age for name, age in wanted.items()}
    assert left_out == {"in/a.jpg": "same name as another", "in/b": "same name as another"}
    assert is_of(Path("out", FACES, "a.1.jpg"), portraits[2], [portraits[0], portraits[1]])
    assert is_of(Path("out", FACES, "a.2.jpg"), portraits[1], [portraits[0], portraits[2]])


def test_a_damaged_archive_is_named(portraits: list[Pixels]) -> None:
    save(photo([(portraits[0], 400, 300, 200)]), "in/a.jpg")
    with tarfile.open("in/t.tar", "w") as archive:
        archive.add("in/a.jpg", "b.jpg")
    data = Path("in/t.tar").read_bytes()
    Path("in/t.tar").write_bytes(data[: len(data) // 2])
    Path("labels.csv").write_text("path,age\na.jpg,20\n")
    main(["in", "out", "--manifest", "labels.csv"])
    assert "in/t.tar" in tables("out")[1]
    assert tables("out")[1]["in/t.tar"] != "not in the manifest"


def test_names_may_be_long(portraits: list[Pixels]) -> None:
    with zipfile.ZipFile("photos.zip", "w") as archive:
        data = cv2.imencode(".png", photo([(portraits[0], 400, 300, 250)])[..., ::-1])[1]
        archive.writestr(f"{'x' * 300}/{'y' * 300}.png", data.tobytes())
    main(["photos.zip", "out"])
    assert Path("out", tables("out")[0]["path"][0]).is_file()


def test_fit_reads_what_is_written(portraits: list[Pixels]) -> None:
    names = [name for name, _ in draw_faces(6, seed=3)]
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for name, face in zip(names, portraits, strict=False):
            data = cv2.imencode(".png", photo([(face, 400, 300, 250)])[..., ::-1])[1]
            archive.writestr(f"album/{name}", data.tobytes())
    main(["photos.zip", "out", "--size", "96"])
    for root in (f"out/{MANIFEST}", f"out/{FACES}"):
        table = read_table(root, 0, UTKFACE)
        assert len(table.faces) == 6
        ages = dict(zip((Path(path).name for path in table.faces["path"]), table.faces["age"], strict=True))
        assert ages == {name: int(name.split("_")[0]) for name in names}
        assert not len(table.rejects)
    assert sorted(path.name for path in Path("out", FACES, "album").iterdir()) == sorted(names)
    assert read(next(Path("out", FACES, "album").iterdir())).shape == (96, 96, 3)


def test_an_aligned_face_stays_as_it_is(portraits: list[Pixels]) -> None:
    """A face of 200 pixels in the frame is only encoded again."""
    frame = measure(map(Detector().share_of_largest, portraits), "drawn faces")
    assert frame is not None
    save_checkpoint(Path("drawn.ckpt"), face_frame=frame.options())
    save(portraits[4], "in/a.png")
    main(["in", "out", "--like", "drawn.ckpt"])
    assert np.abs(read(f"out/{FACES}/a.png.jpg").astype(int) - portraits[4]).mean() < 3


def test_like_a_model(portraits: list[Pixels]) -> None:
    wide = UTKFACE_FRAME._replace(points=0.5 + 0.5 * (UTKFACE_FRAME.points - 0.5), source="wide")
    save_checkpoint(Path("wide.ckpt"), face_frame=wide.options())
    save_checkpoint(Path("none.ckpt"), face_frame=None)
    save(photo([(portraits[0], 400, 300, 250)]), "in/a.jpg")
    main(["in", "out", "--like", "wide.ckpt"])
    (found,) = Detector().find(read(f"out/{FACES}/a.jpg"))
    assert np.abs((found.points + 0.5) / 200 - wide.points).max() < 0.03
    with pytest.raises(UserError, match=r"none were found .* leave --like out"):
        main(["in", "other", "--like", "none.ckpt"])
    assert not Path("other").exists()


def test_run_again_it_goes_on(portraits: list[Pixels]) -> None:
    for number in range(3):
        save(photo([(portraits[number], 400, 300, 250)]), f"in/{number}.jpg")
    Path("in/2.jpg").rename("2.jpg")
    Path("in/2.jpg").write_text("not there yet")
    main(["in", "out"])
    kept = {file.name: file.stat().st_mtime_ns for file in Path("out", FACES).iterdir()}
    shutil.move("2.jpg", "in/2.jpg")  # what was left out is tried again
    main([str(Path("in").absolute()), "out"])  # the same photos
    manifest, left_out = tables("out")
    assert (manifest["path"].tolist(), left_out) == ([f"{FACES}/{number}.jpg" for number in range(3)], {})
    assert {name: Path("out", FACES, name).stat().st_mtime_ns for name in kept} == kept
    save(photo([(portraits[5], 400, 300, 250)]), "in/0.jpg")  # another photo under the same name
    main(["in", "out"])
    assert is_of(Path("out", FACES, "0.jpg"), portraits[5], [portraits[0]])
    assert Path("out", FACES, "1.jpg").stat().st_mtime_ns == kept["1.jpg"]
    main(["in", "out", "--size", "96"])
    assert read(f"out/{FACES}/1.jpg").shape == (96, 96, 3)


def test_photos_that_are_gone_cost_no_table(portraits: list[Pixels]) -> None:
    save(photo([(portraits[0], 400, 300, 250)]), "in/a.jpg")
    main(["in", "out"])
    table = Path("out", MANIFEST).read_text()
    Path("in/a.jpg").unlink()
    with pytest.raises(UserError, match="Expected faces in in, but took none"):
        main(["in", "out"])
    assert Path("out", MANIFEST).read_text() == table


def test_an_output_among_the_photos_is_no_photo(portraits: list[Pixels]) -> None:
    save(photo([(portraits[0], 400, 300, 250)]), "in/a.jpg")
    for _ in range(2):
        main(["in", "in/out"])
        assert tables("in/out")[0]["photo"].tolist() == ["in/a.jpg"]
    with pytest.raises(UserError, match=r"Expected a new or empty folder, but in holds a.jpg"):
        main(["in", "in"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "out"], "there is nothing at nowhere"),
        (["in", "out", "--size", "20"], "--size from 64 to 1024 pixels, but got 20"),
        (["in", "out", "--manifest", "no.csv"], "no.csv"),
        (["-", "out"], "Expected a folder or an archive of photos, but got -"),
        (["bad.csv", "out"], "Expected a folder or an archive of photos, but got bad.csv"),
        (["in", "out", "--manifest", "far.csv"], "in row 1 of far.csv, but got 1e308, 1, 1e308, 5"),
        (
            ["in", "out", "--manifest", "three.csv"],
            "each for x, y, width, height in three.csv, but there are",
        ),
        (
            ["in", "out", "--manifest", "twice.csv"],
            "each for x, y, width, height in twice.csv, but there are",
        ),
        (["in", "mine"], "Expected a new or empty folder, but mine holds faces.csv; name another"),
        (["in", "out", "--manifest", "bad.csv"], "Expected x, y, width and height in pixels in row 2 of bad.csv, but "),
        (["in", "out", "--like", "no.ckpt"], "Expected a checkpoint at no.ckpt"),
        (["in", "file", "--size", "100"], "Expected a folder to write to at file, but File exists"),
        (["empty", "out"], "Expected faces in empty, but took none"),
        (["in", "out", "--manifst", "no.csv"], "did you mean --manifest?"),
    ],
)
def test_mistakes(words: list[str], message: str, portraits: list[Pixels]) -> None:
    save(photo([(portraits[0], 400, 300, 250)]), "in/a.jpg")
    Path("empty").mkdir()
    Path("file").write_text("")
    Path("mine").mkdir()
    Path("mine/faces.csv").write_text("path,age\n")
    Path("far.csv").write_text("path,x,y,width,height\na.jpg,1e308,1,1e308,5\n")
    Path("three.csv").write_text("path,x,y,width\na.jpg,1,1,5\n")
    Path("twice.csv").write_text("path,x,X,y,width,height\na.jpg,1,1,1,5,5\n")
    Path("bad.csv").write_text("path,x,y,width,height\na.jpg,,,,\na.jpg,1,2,-3,4\n")
    with pytest.raises(UserError) as caught:
        main(words)
    assert message in str(caught.value)


def test_ctrl_c_keeps_the_faces(
    portraits: list[Pixels], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(60):
        save(portraits[0], f"in/{number}.jpg")
    cut = Cutter.cut

    def interrupted(self: Cutter, job: Job) -> Job:
        if job.given.path == "in/30.jpg":
            signal.default_int_handler(signal.SIGINT, None)  # a real one is ignored where tests run in the background
        return cut(self, job)

    monkeypatch.setattr(Cutter, "cut", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(["in", "out"])
    assert caught.value.code == 130
    said = capsys.readouterr().err
    assert re.fullmatch(r"facecls.crop: interrupted after \d+ faces; run it again to go on\n", said)
    assert [path.name for path in Path("out").iterdir()] == [FACES]
    kept = {file.name: file.stat().st_mtime_ns for file in Path("out", FACES).iterdir()}
    assert len(kept) > 10
    monkeypatch.setattr(Cutter, "cut", cut)
    main(["in", "out"])
    assert len(tables("out")[0]) == 60
    assert {name: Path("out", FACES, name).stat().st_mtime_ns for name in kept} == kept
