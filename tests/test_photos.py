"""Photos are predicted face by face, by the command and from Python, and what was predicted can be looked at."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from photos import background, put
from PIL import Image
from trained_model import SIZE, save_checkpoint

import facecls
from facecls.data.archives import UnreadableError
from facecls.data.store import decode
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError
from facecls.finding.detector import Detector
from facecls.finding.frame import align, measure
from facecls.predict.__main__ import main
from facecls.predict.faces import Batch
from facecls.predict.finder import COLUMNS
from facecls.predict.inputs import NO_FACE, Input, stream
from facecls.predict.outputs import journal_of
from facecls.predict.pictures import Pictures, annotate

pytestmark = pytest.mark.usefixtures("own_folder")

Pixels = npt.NDArray[np.uint8]
PLACES = [(150, 500, 110), (430, 200, 160), (700, 420, 240)]
"""x, y and size of the faces of a photo, from left to right."""


@pytest.fixture(scope="module")
def model(portraits: list[Pixels], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that knows the frame of drawn faces."""
    detector = Detector()
    frame = measure(map(detector.share_of_largest, portraits), "drawn faces")
    assert frame is not None
    return str(save_checkpoint(tmp_path_factory.mktemp("framed") / "best.ckpt", face_frame=frame.options()))


@pytest.fixture
def photos(portraits: list[Pixels]) -> list[str]:
    """A photo of three faces, one without any, an aligned face, and one that is no image."""
    Path("in").mkdir()
    three = background("texture", 900, 650)
    for face, (x, y, size) in zip(portraits, PLACES, strict=False):
        put(three, face, x, y, size)
    pictures = {"a.png": three, "b.png": background("gradient", 500, 400), "c.png": portraits[4]}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(f"in/{name}")
    Path("in/d.png").write_text("hello")
    return [f"in/{name}" for name in ("a.png", "b.png", "c.png", "d.png")]


def read(path: str) -> Pixels:
    return decode(np.fromfile(path, np.uint8))


def rows_of(out: str) -> pd.DataFrame:
    return pd.read_csv(out, keep_default_na=False, na_values={"face": "", "x": ""})


def read_table(out: Path) -> pd.DataFrame:
    return {"csv": pd.read_csv, "parquet": pd.read_parquet, "jsonl": partial(pd.read_json, lines=True)}[out.suffix[1:]](
        out
    )


def test_each_face_has_a_row(model: str, photos: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([model, "in", "--out", "out.csv"]) == 1  # d.png can't be read
    table = rows_of("out.csv")
    assert list(table)[:7] == ["path", *COLUMNS]
    assert table["path"].tolist() == [photos[0]] * 3 + photos[1:]
    assert table["face"].fillna(0).tolist() == [1, 2, 3, 0, 1, 0]
    assert table["error"].tolist() == ["", "", "", NO_FACE, "", "not an image"]
    for row, (x, y, size) in zip(table.to_dict("records"), PLACES, strict=False):
        assert abs(int(row["x"]) + int(row["width"]) / 2 - x) < size / 4
        assert abs(int(row["y"]) + int(row["height"]) / 2 - y) < size / 4
    said = capsys.readouterr().err
    assert said.startswith("4 photos, 4 faces in ")
    assert said.endswith("; no face found in 1; 1 could not be read\nwrote out.csv\n")


def test_a_photo_without_a_face_is_no_failure(model: str, photos: list[str]) -> None:
    assert main([model, photos[1], "--out", "out.jsonl"]) == 0
    (row,) = map(json.loads, Path("out.jsonl").read_text().splitlines())
    assert (row["error"], row["gender"], row["face"]) == (NO_FACE, None, None)


def test_a_face_is_predicted_as_it_is_alone(model: str, photos: list[str], portraits: list[Pixels]) -> None:
    """What the model gives for a face of a photo is what it gives for that face brought into the frame by hand."""
    predictor = facecls.load(model, device="cpu")
    frame = predictor.predictor.frame
    assert frame is not None
    photo = read(photos[0])
    aligned = [align(photo, face, frame, SIZE) for face in Detector().find(photo)]
    alone = predictor.predict(aligned, faces="whole")
    together = predictor.predict(photos[0])
    shared = list(alone.columns[1:])
    pd.testing.assert_frame_equal(together[shared], alone[shared])
    whole = predictor.predict(photos[2], faces="whole")  # an aligned face is taken as it is
    pd.testing.assert_frame_equal(predictor.predict(photos[2])[shared], whole[shared])


@pytest.mark.parametrize("as_option", [True, False])
def test_the_largest_face_or_the_whole_photo(as_option: bool, model: str, photos: list[str]) -> None:
    def predict(faces: str) -> pd.DataFrame:
        if not as_option:
            given: Any = faces
            return facecls.load(model, device="cpu").predict(photos[:2], faces=given)
        assert main([model, *photos[:2], "--faces", faces, "--out", f"{faces}.parquet"]) == 0
        return pd.read_parquet(f"{faces}.parquet")

    largest = predict("largest")
    assert largest["path"].tolist() == photos[:2]
    assert abs(int(largest["x"][0]) + int(largest["width"][0]) / 2 - PLACES[2][0]) < 60
    assert largest["error"].fillna("").tolist() == ["", NO_FACE]
    whole = predict("whole")
    assert not set(COLUMNS) & set(whole)
    assert whole["error"].isna().all()


def test_the_command_and_python_agree(model: str, photos: list[str]) -> None:
    main([model, "in", "--out", "out.parquet"])
    wanted = facecls.load(model, device="cpu").predict(["in/*.png"])
    pd.testing.assert_frame_equal(pd.read_parquet("out.parquet"), wanted)
    pd.testing.assert_frame_equal(facecls.load(model, device="cpu").predict(Path("in")), wanted)
    assert "frame of drawn faces" in repr(facecls.load(model, device="cpu"))


@pytest.mark.parametrize(
    ("ending", "cut"), [("csv", 1), ("csv", 40), ("csv", 900), ("parquet", 40), ("jsonl", 900)], ids=str
)
def test_a_run_that_was_cut_within_a_photo_is_continued(ending: str, cut: int, model: str, photos: list[str]) -> None:
    out = Path(f"out.{ending}")
    words = [model, photos[1], photos[0], photos[0], "--out", str(out), "--batch_size", "1"]
    assert main(words) == 0
    wanted = read_table(out)
    out.unlink()
    assert main([*words[:-4], "--out", "all.jsonl"]) == 0
    rows = Path("all.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(row)["face"] for row in rows] == [None, 1, 2, 3, 1, 2, 3]
    header = {
        "model": facecls.files.sha256(Path(model)),  # type: ignore[attr-defined]
        "options": ["--tta none", "--faces all", "--threshold 0.6", "--every 1"],
        "columns": list(json.loads(rows[0])),
    }
    text = json.dumps(header) + "\n" + "".join(rows)
    journal_of(out).write_text(text[:-cut])
    assert main([*words, "--resume"]) == 0
    pd.testing.assert_frame_equal(read_table(out), wanted, rtol=1e-4)  # other batches, so other rounding
    assert main([*words, "--resume"]) == 0  # complete
    with pytest.raises(UserError, match="has whole rows for 3"):
        main([*words[:2], *words[3:], "--resume"])


def test_a_run_is_not_continued_with_other_photos(
    model: str, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("facecls.predict.outputs.Journal.finish", broken)
        with pytest.raises(SystemExit):
            main([model, photos[0], photos[1], "--out", "out.csv"])  # the last photo is looked at again
    with pytest.raises(
        UserError, match=r"out\.csv was begun with, but it has predictions for 1 others, such as in/a\.png"
    ):
        main([model, photos[2], "--out", "out.csv", "--resume"])
    assert main([model, *photos[:3], "--out", "out.csv", "--resume"]) == 0
    assert sorted(rows_of("out.csv")["path"]) == [photos[0]] * 3 + photos[1:3]


def test_a_run_is_not_continued_with_other_faces(model: str, photos: list[str]) -> None:
    words = [model, *photos, "--out", "out.csv"]
    main(words)
    Path("out.csv").unlink()
    header = {"model": facecls.files.sha256(Path(model)), "options": ["--tta none"], "columns": []}  # type: ignore[attr-defined]
    journal_of(Path("out.csv")).write_text(json.dumps(header) + "\n")
    with pytest.raises(UserError, match="the same options, but it was begun with --tta none, not --tta none, --faces"):
        main([*words, "--resume"])


def test_photos_are_turned_as_their_cameras_say(model: str, photos: list[str]) -> None:
    photo = Image.fromarray(read(photos[0]))
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter, clockwise
    photo.rotate(90, expand=True).convert("RGB").save("turned.jpg", quality=97, exif=exif)
    one, other = (facecls.load(model, device="cpu").predict(path) for path in (photos[0], "turned.jpg"))
    assert other["face"].tolist() == [1, 2, 3]
    assert (one[["x", "y", "width", "height"]] - other[["x", "y", "width", "height"]]).abs().max(axis=None) < 8


def test_a_model_that_does_not_say_its_frame_takes_utkfaces(
    photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    path = save_checkpoint(tmp_path / "old.ckpt")
    kept = torch.load(path, weights_only=True)
    del kept["hyper_parameters"]["face_frame"]
    torch.save(kept, path)
    assert main([str(path), photos[0], "--out", "out.csv"]) == 0
    assert len(rows_of("out.csv")) == 3
    assert "as UTKFace's, it is assumed" in capsys.readouterr().err


# --- pictures ---


def test_annotated_photos_and_crops(model: str, photos: list[str], portraits: list[Pixels]) -> None:
    assert main([model, "in", "--out", "out.csv", "--annotate", "seen/boxes", "--crops", "seen/faces"]) == 1
    assert sorted(path.name for path in Path("seen/boxes/in").iterdir()) == ["a.png.jpg", "c.png.jpg"]
    crops = sorted(path.name for path in Path("seen/faces/in").iterdir())
    assert crops == ["a.png.1.jpg", "a.png.2.jpg", "a.png.3.jpg", "c.png.1.jpg"]
    assert all(read(f"seen/faces/in/{name}").shape == (SIZE, SIZE, 3) for name in crops)
    drawn, photo = (read(path).astype(int) for path in ("seen/boxes/in/a.png.jpg", photos[0]))
    assert drawn.shape == photo.shape
    changed = np.abs(drawn - photo).max(2) > 60
    for row in rows_of("out.csv").to_dict("records")[:3]:
        x, y, width, height = (int(row[name]) for name in ("x", "y", "width", "height"))
        edge = changed[max(0, y) : y + height, max(0, x)]
        assert edge.mean() > 0.6  # the left side of its box
        assert changed[y + height // 4 : y + height // 2, x + width // 3 : x + 2 * width // 3].mean() < 0.05


@pytest.mark.parametrize("size", [(60, 80), (900, 700), (4000, 3000)])
def test_texts_can_be_read_at_any_size(size: tuple[int, int]) -> None:
    width, height = size
    rows = pd.DataFrame(
        [
            {"x": width * x // 10, "y": y, "width": width // 4, "height": height // 4, "gender": "female"}
            | {"race": "asian", "age": 34.2}
            for x, y in ((0, 0), (8, height // 2), (4, height * 9 // 10))
        ]
    )
    picture = annotate(background("noise", width, height), rows, UTKFACE)
    assert max(picture.shape[:2]) >= 480
    labels = (np.abs(picture.astype(int) - (255, 196, 0)).max(2) < 10).astype(np.uint8)
    opened = cv2.morphologyEx(labels, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
    count, _, boxes, _ = cv2.connectedComponentsWithStats(cv2.dilate(opened, np.ones((9, 9), np.uint8)))
    high = [box for box in boxes[1:count] if box[2] > 60]
    assert len(high) >= 3
    assert all(box[3] >= 12 for box in high)


@pytest.mark.parametrize("option", ["--annotate", "--crops"])
def test_pictures_never_replace_photos_or_become_inputs(option: str, model: str, photos: list[str]) -> None:
    Image.fromarray(read(photos[2])).convert("RGB").save("me.jpg", quality=95)
    before = Path("me.jpg").read_bytes()
    for folder in (".", "in"):
        with pytest.raises(UserError, match=rf"Expected a new or empty folder for {option}, but {folder} holds"):
            main([model, "me.jpg", option, folder])
    with pytest.raises(UserError, match=rf"Expected a folder for {option} without photos, but .*me\.jpg is an input"):
        main([model, "me.jpg", option, ".", "--out", "out.csv", "--resume"])
    assert Path("me.jpg").read_bytes() == before
    Path("file").touch()
    with pytest.raises(UserError, match=f"Expected a folder for {option} at file"):
        main([model, "me.jpg", option, "file"])
    # a folder below the photos is passed over, whether a folder or a glob leads to it
    for word in ("in", "i*"):
        main([model, word, option, "in/seen", "--out", "out.csv"])
        assert sorted(rows_of("out.csv")["path"].unique()) == photos
        Path("out.csv").unlink()
        shutil.rmtree("in/seen")


def test_pictures_of_different_photos_have_different_names(model: str, photos: list[str]) -> None:
    Path("a" * 120).mkdir()
    names = ["a/b.jpg", "a_b.jpg", "a/b.jpeg", f"{'a' * 120}/{'b' * 240}.jpg", "a/b.png"]
    Path("a").mkdir()
    for name in names:
        Image.fromarray(read(photos[2])).convert("RGB").save(name)
    assert main([model, *names, "--crops", "cr", "--annotate", "an"]) == 0
    assert len([path for path in Path("cr").rglob("*.jpg")]) == len(names)
    assert len([path for path in Path("an").rglob("*.jpg")]) == len(names)


def test_pictures_of_a_run_that_is_continued_are_all_there(
    model: str, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    words = [model, photos[0], photos[2], "--out", "out.csv", "--crops", "cr", "--batch_size", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("facecls.predict.outputs.Journal.append", broken)
        with pytest.raises(SystemExit):
            main(words)
    assert main([*words, "--resume"]) == 0
    assert len(list(Path("cr").rglob("*.jpg"))) == 4


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_the_members_of_archives_in_a_folder_are_all_read(kind: str, model: str, portraits: list[Pixels]) -> None:
    """They are read at once, since threads come back to them when the archive is long closed."""
    Path("many").mkdir()
    for number in range(150):
        Image.fromarray(cv2.resize(portraits[number % 4], (64, 64))).save(f"many/{number:03}.png")
    Path("in").mkdir()
    shutil.make_archive("in/all", kind, "many")
    Image.fromarray(portraits[0]).save("in/z.png")
    assert main([model, "in", "--faces", "whole", "--out", "out.csv"]) == 0
    assert len(rows_of("out.csv")) == 151


def test_more_faces_than_a_batch_go_through_the_model_in_pieces(model: str, photos: list[str]) -> None:
    predictor = facecls.load(model, device="cpu")
    counts = []
    estimate = predictor.predictor.estimate
    predictor.predictor.estimate = lambda images: (counts.append(len(images)), estimate(images))[1]  # type: ignore[method-assign]
    pieces = predictor.predict(photos[0], batch_size=2)
    assert counts == [2, 1]
    pd.testing.assert_frame_equal(pieces, predictor.predict(photos[0]), rtol=1e-4)


# --- videos ---


@pytest.fixture
def video(portraits: list[Pixels]) -> str:
    """Four seconds: a face that moves, none in the third."""
    writer = cv2.VideoWriter("clip.avi", cv2.VideoWriter.fourcc(*"MJPG"), 10, (640, 480))
    for number in range(40):
        frame = background("gradient", 640, 480)
        if number // 10 != 2:
            put(frame, portraits[1], 150 + 8 * number, 240, 150)
        writer.write(frame[..., ::-1])
    writer.release()
    return "clip.avi"


def test_a_video_has_a_row_for_each_face_and_time(model: str, video: str) -> None:
    assert main([model, video, "--out", "out.csv"]) == 0
    table = rows_of("out.csv")
    assert table["path"].tolist() == [f"clip.avi#t={second}" for second in range(4)]
    assert table["error"].tolist() == ["", "", NO_FACE, ""]
    middles = table["x"].astype(float) + table["width"].replace("", 0).astype(float) / 2
    for second in (0, 1, 3):
        assert abs(middles[second] - (150 + 80 * second)) < 25
    Path("in").mkdir()
    Path("clip.avi").rename("in/clip.avi")
    assert main([model, "in", "--every", "0.5", "--out", "half.csv"]) == 0
    assert rows_of("half.csv")["path"].tolist() == [f"in/clip.avi#t={number / 2:g}" for number in range(8)]


@pytest.mark.parametrize(("rate", "every", "frames"), [(30, 0.1, 30), (30, 0.2, 15), (25, 0.2, 15), (10, 1, 3)])
def test_frames_come_as_often_as_is_asked(rate: int, every: float, frames: int) -> None:
    writer = cv2.VideoWriter("clip.avi", cv2.VideoWriter.fourcc(*"MJPG"), rate, (64, 48))
    for _ in range(3 * rate):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    paths = [str(each.path) for each in stream(["clip.avi"], every=every)]
    assert len(paths) == len(set(paths)) == frames


def test_a_video_that_is_cut_says_so(video: str) -> None:
    data = Path(video).read_bytes()
    Path("cut.avi").write_bytes(data[: len(data) // 2])
    *frames, last = stream(["cut.avi"])
    assert frames
    with pytest.raises(UnreadableError, match=r"cut off after \d\.\d seconds|not a video"):
        last.load()


def test_a_damaged_video_says_so(model: str) -> None:
    Path("cut.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(2000))
    assert main([model, "cut.mp4", "--out", "out.csv"]) == 1
    assert rows_of("out.csv")["error"].tolist() == ["not a video that OpenCV reads"]
    with pytest.raises(UserError, match="--every to be more than 0 seconds, but got 0"):
        main([model, "cut.mp4", "--every", "0"])


NASTY = [
    *("a", "a.jpg", "A.jpg", "a.jpg.jpg", "a.2", "a.2.jpg", "a.png", "a.png.jpg", "a.jpg/b", "a.jpg/b.jpg", "a_b"),
    *("a/b", "a.jpg_/b", "/a/b", "../a/b", "up/a/b", "./a/c", "x" * 300, "x" * 301, "é" * 200, "a.JPG/b", "a.jpg#t=1"),
    *("a.zip/a.jpg", "a.tar/a", "b\\c.jpg", "b/c.jpg", " ", ". .jpg", "a\n.jpg", "-a.jpg", "a.gif", "a.gif.jpg"),
]  # fmt: skip


def _batch(names: list[str]) -> Batch:
    """Three faces of each photo, each in a colour of its own."""
    both = [(name, number) for name in names for number in (1, 2, 3)]
    inputs = [Input(name, lambda: np.zeros((8, 8, 3), np.uint8)) for name, _ in both]
    colours = [np.full((8, 8, 3), [40 * number, 6 * NASTY.index(name), 0], np.uint8) for name, number in both]
    return Batch(pd.DataFrame(both, columns=["path", "face"]), [*colours], inputs, len(names))


@pytest.mark.parametrize("seed", range(3))
def test_no_picture_is_written_over_that_of_another_photo(seed: int) -> None:
    """In whatever order photos come, also if the run is stopped and goes on, with one of them again."""
    names = [str(name) for name in np.random.default_rng(seed).permutation(NASTY)]
    Pictures({}, None, Path("crops")).add(_batch(names[:20]))
    Pictures({}, None, Path("crops")).add(_batch([*names[20:], names[3]]))
    files = [path for path in Path("crops").rglob("*") if path.is_file()]
    found = [tuple(np.rint(read(str(file))[4, 4, :2] / [40, 6]).astype(int).tolist()) for file in files]
    assert sorted(found) == [(number, index) for number in (1, 2, 3) for index in range(len(NASTY))]
