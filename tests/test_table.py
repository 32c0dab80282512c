"""Each file of a source becomes a face or a reject with its reason; a user's mistakes are told in one line."""

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from labelled_faces import FAIRFACE_RACES, write_fairface

from facecls.data import table as table_module
from facecls.data.file_names import parse_name
from facecls.data.store import decode
from facecls.data.synthetic import draw_faces, wears_glasses
from facecls.data.table import Table
from facecls.data.tasks import UTKFACE, Tasks, create_tasks
from facecls.errors import UserError

LABELS = ["gender", "race", "age"]


def read_table(root: str | Path, seed: int, tasks: Tasks = UTKFACE) -> Table:
    return table_module.read_table(root, seed, tasks)


def face(seed: int, ending: str = ".jpg") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return bytes(cv2.imencode(ending, cv2.GaussianBlur(noise, (0, 0), 2))[1])


FACES = {
    "UTKFace/26_1_2_20170116174525125.jpg.chip.jpg": (face(0), (1, 2, 26)),
    "UTKFace/0_0_4_20161219200650636.jpg.chip.jpg": (face(1), (0, 4, 0)),
    "UTKFace/24_0_1_20170116220224657 .jpg.chip.jpg": (face(2), (0, 1, 24)),
    "UTKFace/55_0_0_20170116232725357jpg.chip.jpg": (face(3), (0, 0, 55)),
    "UTKFace/part 2/116_1_3_20170120134921760.png": (face(4, ".png"), (1, 3, 116)),
    "UTKFace/part 2/30_1_0_20170120134921761.jpg": (face(0), (1, 0, 30)),  # the first one's bytes, another label
}
REJECTS = {
    "README.txt": (b"faces", "malformed name"),
    "UTKFace/39_1_20170116174525125.jpg.chip.jpg": (face(5), "malformed name"),
    "UTKFace/117_1_2_20170116174525125.jpg": (face(6), "age out of range"),
    "UTKFace/26_2_2_20170116174525125.jpg": (face(6), "gender out of range"),
    "UTKFace/26_1_5_20170116174525125.jpg": (face(6), "race out of range"),
    "UTKFace/27_1_2_20170116174525125.jpg": (face(6)[:-40], "truncated"),
    "UTKFace/27_1_2_20170116174525126.png": (face(6, ".png")[:-40], "truncated"),
    "UTKFace/27_1_2_20170116174525127.jpg": (b"<html>not found</html>", "not an image"),
    "UTKFace/27_1_2_20170116174525128.jpg": (b"", "not an image"),
    "UTKFace/.DS_Store": (b"\0\0\0\x01Bud1", "not an image"),
    "UTKFace/._26_1_2_20170116174525125.jpg.chip.jpg": (b"\0\x05\x16\x07", "not an image"),
    "__MACOSX/UTKFace/26_1_2_20170116174525125.jpg.chip.jpg": (face(7), "not an image"),
}
FILES = {path: data for path, (data, _) in (FACES | REJECTS).items()}


def as_folder(place: Path) -> Path:
    for path, data in FILES.items():
        file = place / "data" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return place / "data"


def as_tar(place: Path, name: str = "data.tar") -> Path:
    with tarfile.open(place / name, "w:gz" if name.endswith("gz") else "w") as archive:
        for path, data in FILES.items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return place / name


def as_tar_gz(place: Path) -> Path:
    return as_tar(place, "data.tar.gz")


def as_tgz(place: Path) -> Path:
    return as_tar(place, "DATA.TGZ")


def as_unpacked_by_the_browser(place: Path) -> Path:
    return as_tar(place).rename(place / "data.tar.gz")


def as_zip(place: Path) -> Path:
    with zipfile.ZipFile(place / "data.zip", "w") as archive:
        archive.mkdir("UTKFace")
        for path, data in FILES.items():
            archive.writestr(path, data)
    return place / "data.zip"


def reasons(table: Table) -> dict[str, str]:
    return dict(zip(table.rejects["path"], table.rejects["reason"], strict=True))


@pytest.mark.parametrize(
    "make", [as_folder, as_tar, as_tar_gz, as_tgz, as_unpacked_by_the_browser, as_zip], ids=lambda make: make.__name__
)
def test_every_file_of_a_source_is_a_face_or_a_reject(make: Callable[[Path], Path], tmp_path: Path) -> None:
    table = read_table(make(tmp_path), seed=0)
    order = sorted(FACES) if make is as_folder else list(FACES)
    assert list(table.faces.columns) == ["path", *LABELS, "sha1"]
    assert list(table.faces["path"]) == order
    assert list(table.faces[LABELS].itertuples(index=False, name=None)) == [FACES[path][1] for path in order]
    assert list(table.faces["sha1"]) == [hashlib.sha1(FILES[path]).hexdigest() for path in order]
    assert [bytes(table.store[row]) for row in range(len(table.store))] == [FILES[path] for path in order]
    assert reasons(table) == {path: reason for path, (_, reason) in REJECTS.items()}
    assert list(table.rejects["path"]) == (sorted(REJECTS) if make is as_folder else list(REJECTS))


def test_columns_have_the_types_that_are_promised(tmp_path: Path) -> None:
    faces = read_table(as_tar(tmp_path), seed=0).faces
    assert all(faces[column].dtype == "Int16" for column in LABELS)
    assert all(isinstance(value, str) for column in ("path", "sha1") for value in faces[column])
    assert faces.index.equals(pd.RangeIndex(len(FACES)))


def test_rows_stay_in_order_and_with_their_images_when_many_are_looked_at_at_once(tmp_path: Path) -> None:
    expected = []
    with tarfile.open(tmp_path / "many.tar", "w") as archive:
        for number in range(1000):
            name = f"{number % 117}_0_0_{20170116174525000 + number}.jpg"
            data = b"no image" if number % 7 == 0 else face(number)[: None if number % 5 else -9]
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
            if number % 7 and number % 5:
                expected.append((name, number % 117, data))
    table = read_table(tmp_path / "many.tar", seed=0)
    images = [bytes(table.store[row]) for row in range(len(table.store))]
    assert list(zip(table.faces["path"], table.faces["age"], images, strict=True)) == expected
    assert len(table.rejects) == 1000 - len(expected)


def test_screen_stays_clean_and_works_afterwards(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = face(1)
    damaged = whole[:-20] + whole[-2:]  # has its end, so that libjpeg itself meets the gap
    noisy_png = bytearray(face(1, ".png"))
    noisy_png[60:90] = bytes(30)
    (tmp_path / "1_0_0_20170116174525125.jpg").write_bytes(damaged)
    (tmp_path / "1_0_0_20170116174525126.png").write_bytes(noisy_png)
    decode(np.frombuffer(damaged, np.uint8))
    assert "Corrupt JPEG data" in capfd.readouterr().err  # it is a noisy one
    table = read_table(tmp_path, seed=0)
    assert reasons(table) == {"1_0_0_20170116174525126.png": "not an image"}
    os.write(2, b"heard again")
    assert capfd.readouterr() == ("", "heard again")


def test_folders_that_are_links_are_searched_once_each(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "5_0_0_20170116174525125.jpg").write_bytes(face(1))
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "6_0_0_20170116174525125.jpg").write_bytes(face(2))
    (root / "a" / "linked").symlink_to(elsewhere)
    (root / "a" / "loop").symlink_to(root)
    assert list(read_table(root, seed=0).faces["path"]) == [
        "6_0_0_20170116174525125.jpg",
        "a/linked/5_0_0_20170116174525125.jpg",
    ]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scandir = as_folder(tmp_path), os.scandir

    def refuse(place: Path) -> object:
        if place.name == "part 2":
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr("os.scandir", refuse)  # root, whom tests may run as, may list every folder
    with pytest.raises(UserError, match=r"Can't read .*/part 2: Permission denied; make it readable"):
        read_table(folder, seed=0)


def test_what_is_no_regular_file_is_a_reject(tmp_path: Path) -> None:
    folder = as_folder(tmp_path)
    os.mkfifo(folder / "5_0_0_20170116174525125.jpg")
    (folder / "6_0_0_20170116174525125.jpg").symlink_to("nowhere")
    table = read_table(folder, seed=0)
    assert len(table.faces) == len(FACES)
    assert reasons(table)["5_0_0_20170116174525125.jpg"] == "unreadable (a device, pipe or socket)"
    assert reasons(table)["6_0_0_20170116174525125.jpg"] == "a link to nothing"

    archive = as_tar(tmp_path)
    with tarfile.open(archive, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("5_0_0_20170116174525125.jpg")
            member.type, member.linkname = kind, next(iter(FACES))
            tar.addfile(member)
    table = read_table(archive, seed=0)
    assert len(table.faces) == len(FACES)
    assert len(table.rejects) == len(REJECTS) + 3  # a folder is none


def test_file_names_that_are_no_text_can_still_be_written(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"5_0_0_20170116174525125\xff.jpg")).write_bytes(face(1))
    assert list(read_table(tmp_path, seed=0).faces["path"]) == ["5_0_0_20170116174525125\\udcff.jpg"]


# The first member's header takes bytes 0 to 511, its 1 or 2 KB of data follow.
@pytest.mark.parametrize("make", [as_tar, as_tar_gz])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.2, 0.5, 0.77, 0.9, 0.999])
def test_a_cut_archive_is_an_error(make: Callable[[Path], Path], kept: float, tmp_path: Path) -> None:
    archive = make(tmp_path)
    whole = archive.read_bytes()
    end = (
        len(whole.rstrip(b"\0")) if make is as_tar else len(whole)
    )  # of a plain one's two blocks of zeros none matters
    archive.write_bytes(whole[: int(end * kept)])
    with pytest.raises(UserError, match="archive"):
        read_table(archive, seed=0)


@pytest.mark.parametrize("cut", [1, 100, 511])
def test_an_archive_cut_within_a_header_is_an_error(cut: int, tmp_path: Path) -> None:
    archive = as_tar(tmp_path)
    with tarfile.open(archive) as tar:
        header = tar.getmembers()[4].offset
    archive.write_bytes(archive.read_bytes()[: header + cut])
    with pytest.raises(UserError, match="archive"):  # tarfile itself takes this for the end
        read_table(archive, seed=0)


@pytest.mark.parametrize("make", [as_tar, as_tar_gz])
def test_a_damaged_archive_is_an_error(make: Callable[[Path], Path], tmp_path: Path) -> None:
    archive = make(tmp_path)
    data = bytearray(archive.read_bytes())
    with tarfile.open(archive) as tar:
        at = tar.getmembers()[4].offset if make is as_tar else len(data) // 2
    data[at + 3] ^= 0xFF
    archive.write_bytes(data)
    with pytest.raises(UserError, match="archive"):
        read_table(archive, seed=0)


def test_a_damaged_or_encrypted_member_of_a_zip_is_a_reject(tmp_path: Path) -> None:
    archive = as_zip(tmp_path)
    data = bytearray(archive.read_bytes())
    damaged, encrypted = list(FACES)[:2]
    data[data.index(FILES[damaged]) + 5] ^= 0xFF
    central = data.rindex(encrypted.encode()) - 46  # the central directory's record, APPNOTE.TXT 4.3.12
    data[central + 8] |= 1
    archive.write_bytes(data)
    table = read_table(archive, seed=0)
    assert reasons(table)[damaged] == reasons(table)[encrypted] == "damaged or encrypted in the archive"
    assert list(table.faces["path"]) == list(FACES)[2:]


GLASSES = create_tasks({"glasses": {"classes": ["without", "with"]}})


def test_drawn_faces_wear_glasses_where_that_is_a_task() -> None:
    table = read_table("synthetic:20", 3, GLASSES)
    assert list(table.faces.columns) == ["path", *LABELS, "glasses", "sha1"]
    assert table.faces["glasses"].tolist() == [int(wears_glasses(3, index)) for index in range(20)]
    assert [bytes(table.store[row]) for row in range(20)] == [data for _, data in draw_faces(20, 3, glasses=True)]
    assert list(read_table("synthetic:2", 3).faces.columns) == ["path", *LABELS, "sha1"]


def test_file_names_say_nothing_about_further_tasks(tmp_path: Path) -> None:
    table = read_table(as_tar(tmp_path), 0, GLASSES)
    assert table.faces["glasses"].isna().all()
    assert list(table.faces["gender"]) == [FACES[path][1][0] for path in FACES]


def test_file_names_give_classes_and_not_codes(tmp_path: Path) -> None:
    tasks = create_tasks({"race": {"classes": ["Indian", "Black", "White"]}, "age": {"highest": 60}})
    table = read_table(as_tar(tmp_path), 0, tasks)
    races, ages = table.faces["race"].astype(object), table.faces["age"].astype(object)
    named = [parse_name(path.rpartition("/")[2])["race"] for path in table.faces["path"]]
    codes = {"indian": 0, "black": 1, "white": 2}
    assert races.where(races.notna(), None).tolist() == [codes.get(race) for race in named]
    assert "asian" in named
    assert ages.max() <= 60
    assert dict(zip(table.unread["label"], table.unread["reason"], strict=True)) == {
        "race": "race is not 0 (Indian), 1 (Black), 2 (White)",
        "age": "age is not a whole number of years from 0 to 60 or a range of them",
    }


def test_drawn_faces_carry_their_names_labels() -> None:
    table = read_table("synthetic:6", seed=3)
    assert len(table.faces) == len(table.store) == 6
    for row in table.faces.itertuples():
        words = {task.name: task.text(getattr(row, task.name)) for task in UTKFACE.values()}
        assert words == parse_name(row.path)
    assert list(read_table(Path("synthetic:6"), seed=3).faces["sha1"]) == list(table.faces["sha1"])
    assert list(read_table("synthetic:6", seed=4).faces["sha1"]) != list(table.faces["sha1"])


# --- manifests ---


def manifest(place: Path, columns: dict[str, list[object]], ending: str) -> Path:
    for number in range(4):
        (place / f"{number}.jpg").write_bytes(face(number))
    path = place / f"faces{ending}"
    if ending == ".csv":
        pd.DataFrame(columns).to_csv(path, index=False)
    else:
        pd.DataFrame(columns).to_parquet(path)
    return path


def labels_of(table: Table) -> list[tuple[int | None, ...]]:
    labels = table.faces[LABELS].astype(object)
    return [tuple(row) for row in labels.where(labels.notna(), None).itertuples(index=False, name=None)]


both_kinds = pytest.mark.parametrize("ending", [".csv", ".parquet"])


@both_kinds
def test_a_manifest_gives_labels_where_it_has_them(ending: str, tmp_path: Path) -> None:
    columns = {
        "extra": ["x", "y", "z"],
        "race": [4, None, 0],
        "path": ["0.jpg", str(tmp_path / "1.jpg"), "2.jpg"],
        "age": [None, 116, 0],
    }
    table = read_table(manifest(tmp_path, columns, ending), seed=0)
    assert list(table.faces.columns) == ["path", *LABELS, "sha1"]
    assert list(table.faces["path"]) == columns["path"]
    assert labels_of(table) == [(None, 4, None), (None, None, 116), (None, 0, 0)]
    assert [bytes(table.store[row]) for row in range(3)] == [face(number) for number in range(3)]
    assert not len(table.rejects)


@both_kinds
def test_labels_are_not_read_from_the_names_in_a_manifest(ending: str, tmp_path: Path) -> None:
    (tmp_path / "26_1_2_20170116174525125.jpg").write_bytes(face(9))
    table = read_table(manifest(tmp_path, {"path": ["26_1_2_20170116174525125.jpg"]}, ending), seed=0)
    assert labels_of(table) == [(None, None, None)]


NO_GENDER = "gender is not 0 (male), 1 (female)"
NO_RACE = "race is not 0 (white), 1 (black), 2 (asian), 3 (indian), 4 (others)"
NO_AGE = "age is not a whole number of years from 0 to 116 or a range of them"


@both_kinds
@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("gender", "femal", NO_GENDER),
        ("gender", "2", NO_GENDER),
        ("gender", "True", NO_GENDER),
        ("race", "5", NO_RACE),
        ("age", "117", NO_AGE),
        ("age", "young", NO_AGE),
        ("age", "inf", NO_AGE),
    ],
)
def test_a_bad_label_costs_that_label_alone(ending: str, column: str, value: str, reason: str, tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {"path": ["0.jpg", "1.jpg"], "age": ["1", "2"], "gender": ["0", "1"]}
    columns |= {"race": ["0", "1"]}
    columns[column][1] = value
    table = read_table(manifest(tmp_path, columns, ending), seed=0)
    expected: list[int | None] = [1, 1, 2]
    expected[LABELS.index(column)] = None
    assert labels_of(table) == [(0, 0, 1), tuple(expected)]
    assert not len(table.rejects)
    assert table.unread.to_dict("records") == [{"path": "1.jpg", "label": column, "text": value, "reason": reason}]


def test_a_face_whose_labels_are_all_bad_is_a_reject(tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {"path": ["0.jpg", "1.jpg"], "age": ["1", "young"], "race": ["?", ""]}
    table = read_table(manifest(tmp_path, columns, ".csv"), seed=0)
    assert labels_of(table) == [(None, None, 1)]
    assert reasons(table) == {"1.jpg": NO_AGE}
    assert not len(table.unread)


@both_kinds
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("4.jpg", "missing file"),
        (".", "unreadable (Is a directory)"),
        ("", "no path"),
        ("text.jpg", "not an image"),
        ("cut.jpg", "truncated"),
    ],
)
def test_a_bad_file_of_a_manifest_is_a_reject(ending: str, value: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_bytes(b"no image")
    (tmp_path / "cut.jpg").write_bytes(face(1)[:-9])
    table = read_table(manifest(tmp_path, {"path": ["0.jpg", value], "age": ["1", "2"]}, ending), seed=0)
    assert labels_of(table) == [(None, None, 1)]
    assert reasons(table) == {value: reason}


@pytest.mark.parametrize("empty", ["", " ", "NA", "nan", "None", "NULL", "<NA>"])
def test_empty_cells_are_no_labels(empty: str, tmp_path: Path) -> None:
    path = manifest(tmp_path, {"path": ["0.jpg", "1.jpg"], "age": [empty, " 7 "], "race": ["3.0", empty]}, ".csv")
    assert labels_of(read_table(path, seed=0)) == [(None, 3, None), (None, None, 7)]


def test_every_sensible_type_of_a_parquet_column_is_read(tmp_path: Path) -> None:
    manifest(tmp_path, {"path": []}, ".csv")
    columns = {
        "path": pd.Index(["0.jpg", "1.jpg", "2.jpg"], name="path"),
        "age": pd.array([26, None, 3], "Int16"),
        "gender": [1.0, None, 0.0],
        "race": pd.Categorical(["4", None, "0"]),
    }
    pd.DataFrame(columns).set_index("path").to_parquet(tmp_path / "indexed.parquet")
    table = read_table(tmp_path / "indexed.parquet", seed=0)
    assert labels_of(table) == [(1, 4, 26), (None, None, None), (0, 0, 3)]
    pq.write_table(pa.table({"path": ["0.jpg"], "gender": [True]}), tmp_path / "bool.parquet")
    with pytest.raises(UserError, match=r"gender is not 0 \(male\), 1 \(female\)"):
        read_table(tmp_path / "bool.parquet", seed=0)


@both_kinds
def test_a_file_listed_twice_counts_once_and_not_at_all_when_its_rows_differ(ending: str, tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {
        "path": ["0.jpg", "1.jpg", "0.jpg", "2.jpg", "1.jpg"],
        "age": [5, 6, 5, 7, 8],
    }
    table = read_table(manifest(tmp_path, columns, ending), seed=0)
    assert list(table.faces["path"]) == ["0.jpg", "2.jpg"]
    assert list(table.rejects.itertuples(index=False, name=None)) == [
        ("1.jpg", "listed twice with different values"),
        ("0.jpg", "listed twice"),
        ("1.jpg", "listed twice with different values"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffpath,age\n0.jpg,5\n1.jpg,6\n",  # a spreadsheet's byte order mark
        "path, age\n0.jpg, 5\n1.jpg, 6\n",
        "path,age\n0.jpg  ,  5\n  1.jpg,6  \n",
        "path,age,note\n0.jpg,5,a,\n1.jpg,6,b,\n",  # pandas would take the paths for an index
        'path,age,note\r\n0.jpg,5,"a, b"\r\n\r\n1.jpg,6,\r\n',
        "age,path\n5,0.jpg\n6,1.jpg",
    ],
)
def test_csv_as_people_write_it(text: str, tmp_path: Path) -> None:
    path = manifest(tmp_path, {"path": []}, ".csv")
    path.write_text(text, encoding="utf-8", newline="")
    table = read_table(path, seed=0)
    assert list(table.faces["path"]) == ["0.jpg", "1.jpg"]
    assert list(table.faces["age"]) == [5, 6]


@both_kinds
def test_a_split_column_is_passed_on(ending: str, tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {
        "path": ["0.jpg", "9.jpg", "1.jpg", "2.jpg"],
        "split": ["val", "test", "train", "test"],
    }
    table = read_table(manifest(tmp_path, columns, ending), seed=0)
    assert list(table.faces["split"]) == ["val", "train", "test"]
    assert reasons(table) == {"9.jpg": "missing file"}


@both_kinds
@pytest.mark.parametrize(
    ("splits", "message"),
    [(["train", "dev", None, "val"], "1 of 4 have none"), (["train", "1", "Test", "val"], "got '1'")],
)
def test_a_split_column_must_be_complete_and_known(
    ending: str, splits: list[object], message: str, tmp_path: Path
) -> None:
    path = manifest(tmp_path, {"path": [f"{number}.jpg" for number in range(4)], "split": splits}, ending)
    with pytest.raises(UserError, match=message):
        read_table(path, seed=0)


def test_fairfaces_own_file_works_as_it_is(tmp_path: Path) -> None:
    tasks = create_tasks({"race": {"classes": FAIRFACE_RACES}})
    path = write_fairface(tmp_path, 60, seed=1, size=32)
    assert path.read_text().startswith("file,age,gender,race,service_test\ntrain/1.jpg,")
    table = read_table(path, 0, tasks)
    assert list(table.faces.columns) == ["path", *LABELS, "age_from", "age_to", "sha1"]
    assert all(table.faces[name].dtype == "Int16" for name in ("age", "age_from", "age_to"))
    rows = pd.read_csv(path)
    assert table.faces["path"].tolist() == rows["file"].tolist()
    assert [("Male", "Female")[code] for code in table.faces["gender"]] == rows["gender"].tolist()
    assert [FAIRFACE_RACES[code] for code in table.faces["race"]] == rows["race"].tolist()
    assert table.faces["age"].isna().all()
    ends = table.faces[["age_from", "age_to"]].itertuples(index=False, name=None)
    assert ["more than 70" if low == 70 else f"{low}-{high}" for low, high in ends] == rows["age"].tolist()
    assert set(table.faces["age_to"][rows["age"] == "more than 70"]) == {116}
    assert len(table.faces["race"].unique()) == 7


@both_kinds
def test_the_table_of_a_run_is_a_manifest(ending: str, tmp_path: Path) -> None:
    """Ages known as ranges come back from the columns that such a table has for them."""
    ages = ["20-29", 31, None, "more than 70", "0-2", 116]
    for number in range(len(ages)):
        (tmp_path / f"{number}.jpg").write_bytes(face(number))
    columns: dict[str, list[object]] = {"path": [f"{number}.jpg" for number in range(len(ages))], "age": ages}
    faces = read_table(manifest(tmp_path, columns, ".csv"), seed=0).faces
    assert faces[["age", "age_from", "age_to"]].astype("object").where(faces.notna(), None).to_numpy().tolist() == [
        [None, 20, 29],
        [31, None, None],
        [None, None, None],
        [None, 70, 116],
        [None, 0, 2],
        [116, None, None],
    ]
    path = tmp_path / f"faces{ending}"
    faces.to_csv(path, index=False) if ending == ".csv" else faces.to_parquet(path)
    again = read_table(path, seed=0)
    pd.testing.assert_frame_equal(again.faces, faces)
    assert again.rejects.empty
    # by the ranges alone, and with NA as others write it
    faces = faces.drop(columns="age")
    path.unlink()
    faces.to_csv(tmp_path / "faces.csv", index=False, na_rep="NA")
    alone = read_table(tmp_path / "faces.csv", seed=0).faces
    pd.testing.assert_frame_equal(alone[["age_from", "age_to"]], faces[["age_from", "age_to"]])
    assert alone["age"].isna().all()


def test_ranges_that_are_none_are_rejects(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(face(number))
    columns: dict[str, list[object]] = {
        "path": ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "4.jpg"],
        "age": ["", "", "", "25", "", ""],
        "age_from": ["20", "29", "20", "20", "20", "20"],
        "age_to": ["", "20", "29", "x", "29", "39"],
    }
    table = read_table(manifest(tmp_path, columns, ".csv"), seed=0)
    assert table.faces["path"].tolist() == ["2.jpg", "3.jpg"]
    assert table.faces["age"].tolist() == [pd.NA, 25]
    assert dict(table.rejects.to_numpy().tolist()) == {
        "0.jpg": f"age is not {UTKFACE['age'].expected}",
        "1.jpg": f"age is not {UTKFACE['age'].expected}",
        "4.jpg": "listed twice with different values",
    }


@both_kinds
def test_columns_are_found_under_the_names_people_give_them(ending: str, tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(face(1))
    columns: dict[str, list[object]] = {
        "Image": ["1.jpg"],
        "Sex": ["F"],
        "ETHNICITY": ["Asian"],
        "Age": ["30+"],
        "Glasses": ["With"],
        "Split": ["val"],
    }
    table = read_table(manifest(tmp_path, columns, ending), 0, GLASSES)
    row = table.faces.iloc[0]
    assert row.drop(["age", "sha1"]).astype(str).to_dict() == {
        "path": "1.jpg",
        "gender": "1",
        "race": "2",
        "age_from": "30",
        "age_to": "116",
        "glasses": "1",
        "split": "val",
    }


@both_kinds
def test_an_exact_name_wins(ending: str, tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {
        "file": ["no.jpg"],
        "Path": ["no.jpg"],
        "path": ["1.jpg"],
        "sex": ["male"],
        "GENDER": ["female"],
    }
    table = read_table(manifest(tmp_path, columns, ending), seed=0)
    assert labels_of(table) == [(1, None, None)]
    tasks = create_tasks(
        {"sex": {"classes": ["male", "female"]}}
    )  # then it is that task's and not another name of gender
    del columns["GENDER"]
    table = read_table(manifest(tmp_path, columns, ending), 0, tasks)
    assert table.faces["sex"].tolist() == [0]
    assert labels_of(table) == [(None, None, None)]


# --- mistakes ---


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere", None, "folder, a .tar.*there is nothing at .*nowhere"),
        ("faces.rar", b"Rar!", r"folder, a \.tar.*got .*faces\.rar; unpack it"),
        ("faces.tar", b"", "archive .*faces.tar: empty file"),
        ("faces.tar", bytes(10240), "no file in it"),
        ("faces.tar", b"<html>" * 200, "archive .*faces.tar"),
        ("faces.tar.gz", b"\x1f\x8b<html>" * 200, "archive .*faces.tar.gz"),
        ("faces.zip", b"PK<html>", "archive .*faces.zip"),
        ("faces.csv", b"", "CSV .*faces.csv"),
        ("faces.csv", b"path,age\n", "no file in it"),
        ("faces.csv", b"name;age\nx;1\n", "columns path .*path is missing among name, age"),
        ("faces.7z", b"7z\xbc\xaf", r"folder, a \.tar.*got .*faces\.7z; unpack it"),
        ("faces.csv", b"path,age,path\nx,1,y\n", "one column for path .* path and path could both be it"),
        ("faces.csv", b"file,image\nx,y\n", "file and image could both be it; rename the right one to path"),
        ("faces.csv", b"path,AGE,Age\nx,1,2\n", "one column for age .* AGE and Age"),
        ("faces.csv", b"path,sex,Sex\nx,1,2\n", "one column for gender .* sex and Sex"),
        ("faces.csv", b'path\n"x', "CSV .*faces.csv"),
        ("faces.csv", face(0), "CSV .*faces.csv"),
        ("faces.csv", b"path\nx.jpg\ny.jpg\n", r"all 2 files were rejected.*missing file \(2, such as x.jpg\)"),
        ("faces.parquet", b"path,age\n", "Parquet .*faces.parquet"),
    ],
)
def test_a_source_that_gives_nothing_is_a_users_error(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / name, seed=0)


@pytest.mark.parametrize("count", ["", "0", "-5", "many", "1.5", "\u0663"])
def test_a_number_of_drawn_faces_must_be_one(count: str) -> None:
    with pytest.raises(UserError, match="synthetic:N with a whole number"):
        read_table(f"synthetic:{count}", seed=0)


def test_an_archive_inside_an_archive_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.writestr("all/inner.zip", b"PK\x05\x06" + bytes(18))
        archive.writestr("all/26_1_2_20170116174525125.jpg", next(draw_faces(1, seed=0))[1])
    table = read_table(tmp_path / "outer.zip", seed=0)
    assert table.rejects.values.tolist() == [["all/inner.zip", "archive inside an archive"]]
    assert len(table.faces) == 1


def test_a_folder_without_faces_names_the_commonest_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file in it"):
        read_table(tmp_path, seed=0)
    for name in ("a.jpg", "b.jpg", "1_0_9_20170116174525125.jpg"):
        (tmp_path / name).write_bytes(face(0))
    with pytest.raises(UserError, match=r"all 3 files were rejected; .*malformed name \(2, such as a.jpg\)"):
        read_table(tmp_path, seed=0)
