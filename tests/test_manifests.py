"""Tables and sets of faces as people have them: each kind gives the labels that were written."""

import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from facecls.data.columns import writing_of
from facecls.data.datamodule import FacesDataModule
from facecls.data.manifests import describe_manifest, stream_rows
from facecls.data.synthetic import draw_faces
from facecls.data.table import SAME_PHOTO, Table, read_table
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError

DRAWN = dict(sorted(draw_faces(6, seed=1, size=32)))
LABELS = ["gender", "race", "age"]
ROWS = [("imgs/0.jpg", 34, 1, 3), ("imgs/1.jpg", 48, 0, 0), ("imgs/2.jpg", 11, 0, 4)]
WANTED = [(1, 3, 34), (0, 0, 48), (0, 4, 11)]


def _write_images(folder: Path, names: list[str]) -> None:
    for name, data in zip(names, DRAWN.values(), strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _labels(table: Table) -> list[tuple[int | None, ...]]:
    labels = table.faces[LABELS].astype(object)
    return [tuple(row) for row in labels.where(labels.notna(), None).itertuples(index=False, name=None)]


def _text(header: str = "path,age,gender,race", separator: str = ",", end: str = "\n") -> str:
    lines = [header.replace(",", separator), *(separator.join(map(str, row)) for row in ROWS)]
    return "".join(line + end for line in lines)


WRITTEN: dict[str, tuple[str, bytes]] = {
    "plain": ("f.csv", _text().encode()),
    "semicolons": ("f.csv", _text(separator=";").encode()),
    "semicolons with BOM and CRLF": ("f.csv", b"\xef\xbb\xbf" + _text(separator=";", end="\r\n").encode()),
    "tabs in a CSV": ("f.csv", _text(separator="\t").encode()),
    "TSV": ("f.tsv", _text(separator="\t").encode()),
    "commas in a TSV": ("f.tsv", _text().encode()),
    "bars": ("f.csv", _text(separator="|").encode()),
    "text": ("f.txt", _text(separator="\t").encode()),
    "sep= of a spreadsheet": ("f.csv", b"sep=;\r\n" + _text(separator=";", end="\r\n").encode()),
    "sep= after a BOM": ("f.csv", b"\xef\xbb\xbfsep=\t\r\n" + _text(separator="\t", end="\r\n").encode()),
    "sep= in quotes": ("f.csv", b'"sep=;"\r\n' + _text(separator=";", end="\r\n").encode()),
    "empty lines first": ("f.csv", b"\n\n" + _text().encode()),
    "a separator at the end": ("f.csv", _text().replace("\n", ",\n").encode()),
    "sep= with a rare separator": ("f.csv", b"sep=:\n" + _text(separator=":").encode()),
    "UTF-16": ("f.csv", _text(separator="\t").encode("utf-16")),
    "UTF-16, big end first": ("f.csv", b"\xfe\xff" + _text().encode("utf-16-be")),
    "UTF-16 without BOM": ("f.csv", _text().encode("utf-16-le")),
    "UTF-16, big end first, without BOM": ("f.csv", _text().encode("utf-16-be")),
    "old Mac's line ends": ("f.csv", _text(end="\r").encode()),
    "spaces in the header": ("f.csv", _text(" path , age , gender , race ").encode()),
    "capitals": ("f.csv", _text("Path,AGE,Gender,Race").encode()),
    "file, sex, ethnicity": ("f.csv", _text("file,age,sex,ethnicity").encode()),
    "filename": ("f.csv", _text("filename,age,gender,race").encode()),
    "img_path": ("f.csv", _text("img_path,age,Sex,race").encode()),
    "image": ("f.csv", _text("Image,age,sex,Ethnicity").encode()),
    "an index without a name": (
        "f.csv",
        "".join(f"{n},{line}\n" for n, line in zip(["", *"012"], _text().splitlines(), strict=True)).encode(),
    ),
    "Unnamed: 0": (
        "f.csv",
        "".join(f"{n},{line}\n" for n, line in zip(["Unnamed: 0", *"012"], _text().splitlines(), strict=True)).encode(),
    ),
    "backslashes": ("f.csv", _text().replace("imgs/", "imgs\\").encode()),
    "an absolute path of Windows": ("f.csv", _text().replace("imgs/", "C:\\Users\\Anna\\faces\\imgs\\").encode()),
    "an absolute path of a share": ("f.csv", _text().replace("imgs/", "\\\\server\\share\\imgs\\").encode()),
    "an absolute path with a drive": ("f.csv", _text().replace("imgs/", "D:/faces/").encode()),
    "an absolute path elsewhere": ("f.csv", _text().replace("imgs/", "/home/anna/faces/imgs/").encode()),
    "quotes": ("f.csv", b'"path","age","gender","race"\n"imgs/0.jpg","34","1","3"\n"imgs/1.jpg","48","0","0"\n'
               b'"imgs/2.jpg","11","0","4"\n'),
    "decimal ages": ("f.csv", _text().replace(",34,", ",34.7,").replace(",48,", ",48.0,").encode()),
    "decimal commas": ("f.csv", _text(separator=";").replace(";34;", ";34,7;").encode()),
    "decimal commas in codes": (
        "f.csv",
        b"path;age;gender;race\nimgs/0.jpg;34,0;1,0;3,0\nimgs/1.jpg;48,00;0,0;0,\nimgs/2.jpg;11;0,0;4,0\n",
    ),
    "words": ("f.csv", b"path,age,gender,race\nimgs/0.jpg,34,Female,Indian\nimgs/1.jpg,48,Male,White\n"
              b"imgs/2.jpg,11,m,Latino_Hispanic\n"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_manifest_is_read_however_it_is_written(kind: str, tmp_path: Path) -> None:
    _write_images(tmp_path, [row[0] for row in ROWS])
    name, data = WRITTEN[kind]
    (tmp_path / name).write_bytes(data)
    table = read_table(tmp_path / name, 0, UTKFACE)
    assert _labels(table) == WANTED
    assert not len(table.rejects) + len(table.unread)
    assert [bytes(table.store[row]) for row in range(3)] == list(DRAWN.values())[:3]


@pytest.mark.parametrize("missing", ["", "-1", "-1.0", "unknown", "Unknown", "?", "NaN", "n/a"])
def test_what_stands_for_no_label_is_none(missing: str, tmp_path: Path) -> None:
    _write_images(tmp_path, ["0.jpg", "1.jpg"])
    (tmp_path / "f.csv").write_text(f"path,age,gender,race\n0.jpg,{missing},1,{missing}\n1.jpg,5,{missing},2\n")
    table = read_table(tmp_path / "f.csv", 0, UTKFACE)
    assert _labels(table) == [(1, None, None), (None, 2, 5)]
    assert not len(table.unread)


@pytest.mark.parametrize(("column", "codes"), [("sex", "12"), ("race", "12345"), ("ethnicity", ["1.0", "5", "", "-1"])])
def test_codes_that_begin_at_1_are_not_taken_for_their_neighbours(
    column: str, codes: list[str], tmp_path: Path
) -> None:
    rows = "".join(f"{number}.jpg,{code}\n" for number, code in enumerate(codes))
    (tmp_path / "f.csv").write_text(f"path,{column}\n{rows}")
    with pytest.raises(UserError, match=r"run from 1 to \d; count them from 0, or write words"):
        read_table(tmp_path / "f.csv", 0, UTKFACE)


@pytest.mark.parametrize(
    "cell", [["a.jpg"], {"bytes": b"1", "path": "a.jpg"}, [("a", "b")]], ids=["list", "struct", "map"]
)
@pytest.mark.parametrize("column", ["path", "age"])
def test_a_parquet_column_of_several_values_a_cell_is_named(column: str, cell: object, tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.string()) if isinstance(cell, list) and isinstance(cell[0], tuple) else None
    columns = {"path": ["a.jpg"], "age": [5]} | {column: pa.array([cell], kind)}
    pq.write_table(pa.table(columns), tmp_path / "f.parquet")
    with pytest.raises(UserError, match=rf"a text or a number in each cell of {column} in .*f.parquet, but it holds"):
        read_table(tmp_path / "f.parquet", 0, UTKFACE)


def test_names_in_the_code_page_of_windows_lead_to_their_files(tmp_path: Path) -> None:
    _write_images(tmp_path, ["Zoë.jpg", "Jürgen.jpg"])
    (tmp_path / "f.csv").write_bytes("path;age\r\nZoë.jpg;5\r\nJürgen.jpg;6\r\n".encode("cp1252"))
    table = read_table(tmp_path / "f.csv", 0, UTKFACE)
    assert table.faces["path"].tolist() == ["Zoë.jpg", "Jürgen.jpg"]
    assert table.faces["age"].tolist() == [5, 6]
    assert describe_manifest(tmp_path / "f.csv", UTKFACE) == "f.csv (cp1252, semicolons): path, age"


def test_what_was_matched_is_said(tmp_path: Path) -> None:
    _write_images(tmp_path, [row[0] for row in ROWS])
    (tmp_path / "f.csv").write_text(_text(" File ,AGE,sex,ethnicity", ";").replace(";34;", ";old;"))
    data = FacesDataModule(str(tmp_path / "f.csv"), image_size=64, val_fraction=0.3, test_fraction=0.3)
    data.setup()
    said = data.describe().splitlines()
    assert said[0] == "f.csv (semicolons): path from File, gender from sex, race from ethnicity, age from AGE"
    assert said[1].startswith("3 faces (1 train, 1 val, 1 test); 0 rejects")
    assert said[2].startswith(
        "labels left out: 1 (age is not a whole number of years from 0 to 116 or a range of them: 1)"
    )


@pytest.mark.parametrize(
    ("words", "part"),
    [(["Train", "TRAINING"], "train"), (["Val", "valid", "Validation", "DEV"], "val"), (["Test", "testing"], "test")],
)
def test_the_parts_are_known_by_their_usual_names(words: list[str], part: str, tmp_path: Path) -> None:
    _write_images(tmp_path, [f"{number}.jpg" for number in range(len(words))])
    rows = "".join(f"{number}.jpg,{word}\n" for number, word in enumerate(words))
    (tmp_path / "f.csv").write_text("path,split\n" + rows)
    assert read_table(tmp_path / "f.csv", 0, UTKFACE).faces["split"].tolist() == [part] * len(words)


@pytest.mark.parametrize(
    ("text", "line", "cells"),
    [
        ("path,age\nDoe, John.jpg,25\n", 2, "Doe, John.jpg, 25"),
        ("path,age,gender,race\n0.jpg,5,1,2\n\n1.jpg,(25, 32),1,2\n", 4, "1.jpg, (25, 32), 1, 2"),
        ("sep=;\npath;age\n0.jpg;5;6\n", 3, "0.jpg, 5, 6"),
    ],
)
def test_a_row_with_too_many_cells_is_not_cut(text: str, line: int, cells: str, tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        read_table(tmp_path / "f.csv", 0, UTKFACE)
    assert f"but line {line} has {cells.count(',') + 1} ({cells}); put texts" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('path\tage\tname\n0.jpg\t5\t"Anna\n1.jpg\t6\tBert\n', 2),  # never closed
        ('path,age,name\n0.jpg,5,Anna\n1.jpg,6,"Bert\n2.jpg,7,Carl"\n', 3),  # closed in the next row
        ('sep=;\nname;path;age\n"Anna;0.jpg;5\nBert;1.jpg;6\nCarl;2.jpg;"7"\n', 3),
    ],
)
def test_a_stray_quotation_mark_swallows_no_rows(text: str, line: int, tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text(text)
    with pytest.raises(UserError, match=f"closed in its row in .*, but that of line {line} swallows the next rows"):
        read_table(tmp_path / "f.csv", 0, UTKFACE)


def test_texts_may_have_several_lines(tmp_path: Path) -> None:
    _write_images(tmp_path, ["0.jpg", "1.jpg"])
    (tmp_path / "f.csv").write_text('path,age,caption\n0.jpg,5,"one, two\nthree, four, five"\n1.jpg,6,"a\n\nb"\n')
    assert read_table(tmp_path / "f.csv", 0, UTKFACE).faces["age"].tolist() == [5, 6]


def test_a_path_may_be_written_in_several_ways_and_is_one_face(tmp_path: Path) -> None:
    _write_images(tmp_path, ["a/0.jpg", "a/1.jpg"])
    (tmp_path / "f.csv").write_text("path,age\na/0.jpg,5\n./a/0.jpg,5\na\\0.jpg,5\na/b/../1.jpg,6\na/1.jpg,7\n")
    table = read_table(tmp_path / "f.csv", 0, UTKFACE)
    assert table.faces["path"].tolist() == ["a/0.jpg"]
    assert Counter(table.rejects["reason"]) == {"listed twice": 2, "listed twice with different values": 2}


def test_commas_in_a_table_of_one_column_divide_nothing(tmp_path: Path) -> None:
    _write_images(tmp_path, ["a,b.jpg", "c.jpg"])
    (tmp_path / "f.csv").write_text("path\na,b.jpg\nc.jpg\n")
    assert read_table(tmp_path / "f.csv", 0, UTKFACE).faces["path"].tolist() == ["a,b.jpg", "c.jpg"]


def test_a_name_alone_does_not_lead_to_another_folders_file(tmp_path: Path) -> None:
    """Two rows would show one file, with the labels of two."""
    _write_images(tmp_path, ["train/0.jpg", "train/1.jpg"])
    rows = ["/data/train/0.jpg,20", "/data/test/0.jpg,60", "/data/test/1.jpg,70"]
    (tmp_path / "f.csv").write_text("path,age\n" + "".join(f"{row}\n" for row in rows))
    table = read_table(tmp_path / "f.csv", 0, UTKFACE)
    assert table.faces[["path", "age"]].to_numpy().tolist() == [["/data/train/0.jpg", 20], ["/data/test/1.jpg", 70]]
    assert table.rejects.to_numpy().tolist() == [["/data/test/0.jpg", "missing file"]]


def test_a_foreign_path_must_have_one_longest_ending(tmp_path: Path) -> None:
    """Of two files with the same name the one in the folder of the same name is meant, and none if there is none."""
    _write_images(tmp_path, ["a/train/1.jpg", "a/test/1.jpg"])
    paths = [r"E:\set\test\1.jpg", r"E:\set\other\1.jpg", r"E:\set\test\2.jpg", "train/1.jpg"]
    (tmp_path / "f.csv").write_text("path,age\n" + "".join(f"{path},5\n" for path in paths))
    table = read_table(tmp_path / "f.csv", 0, UTKFACE)
    assert [bytes(image) for image in (table.store[0],)] == [list(DRAWN.values())[1]]
    assert dict(table.rejects.to_numpy().tolist()) == {
        paths[1]: "missing file, and 2 files have the same ending",
        paths[2]: "missing file",
        paths[3]: "missing file",  # a relative path means what it says
    }


ADIENCE = (
    "user_id\toriginal_image\tface_id\tage\tgender\tx\ty\tdx\tdy\ttilt_ang\tfiducial_yaw_angle\tfiducial_score\n"
    "30601258@N03\t10399646885_67c7d20df9_o.jpg\t1\t(25, 32)\tf\t0\t414\t1086\t1383\t-115\t30\t17\n"
    "30601258@N03\t10424815813_e94629b1ec_o.jpg\t2\t35\tm\t301\t105\t640\t641\t0\t0\t94\n"
    "9@N03\t1_o.jpg\t3\tNone\tu\t2395\t876\t771\t771\t175\t-30\t74\n"
)


@pytest.mark.parametrize(("folder", "start"), [("faces", "coarse_tilt_aligned"), ("aligned", "landmark_aligned")])
def test_adiences_fold_files_are_read(folder: str, start: str, tmp_path: Path) -> None:
    names = [
        f"{folder}/30601258@N03/{start}_face.1.10399646885_67c7d20df9_o.jpg",
        f"{folder}/30601258@N03/{start}_face.2.10424815813_e94629b1ec_o.jpg",
        f"{folder}/9@N03/{start}_face.3.1_o.jpg",
    ]
    _write_images(tmp_path, names)
    (tmp_path / "fold_0_data.txt").write_text(ADIENCE)
    table = read_table(tmp_path / "fold_0_data.txt", 0, UTKFACE)
    assert table.faces["path"].tolist() == names
    assert _labels(table) == [(1, None, None), (0, None, 35), (None, None, None)]
    assert table.faces[["age_from", "age_to"]].iloc[0].tolist() == [25, 32]
    assert not len(table.rejects) + len(table.unread)


def test_fairfaces_classes_are_utkfaces_unless_others_are_declared(tmp_path: Path) -> None:
    races = ["White", "Black", "Latino_Hispanic", "East Asian", "Southeast Asian", "Indian", "Middle Eastern"]
    names = [f"train/{number}.jpg" for number in range(len(races))]
    _write_images(tmp_path, names[:6])
    shutil.copy(tmp_path / names[0], tmp_path / names[6])
    rows = [f"{name},3-9,Male,{race},True\n" for name, race in zip(names, races, strict=True)]
    (tmp_path / "fairface_label_train.csv").write_text("file,age,gender,race,service_test\n" + "".join(rows))
    table = read_table(tmp_path / "fairface_label_train.csv", 0, UTKFACE)
    assert [UTKFACE["race"].text(code) for code in table.faces["race"]] == [
        "white", "black", "others", "asian", "asian", "indian", "others",
    ]  # fmt: skip
    assert not len(table.rejects) + len(table.unread)


# --- UTKFace in pieces and copies ---


def _as_folder(place: Path, names: list[str]) -> Path:
    place.mkdir()
    for name in names:
        (place / name).write_bytes(DRAWN[name])
    return place


def _as_tar(place: Path, names: list[str]) -> Path:
    folder = _as_folder(place.with_name(f"{place.name}-unpacked"), names)
    archive = place.with_name(f"{place.name}.tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, place.name)
    shutil.rmtree(folder)
    return archive


def _as_windows_zip(place: Path, names: list[str]) -> Path:
    archive = place.with_name(f"{place.name}.zip")
    with zipfile.ZipFile(archive, "w") as file:
        for name in names:
            member = zipfile.ZipInfo("x")
            member.filename = f"{place.name}\\{name}"  # ZipInfo would put slashes
            file.writestr(member, DRAWN[name])
    return archive


@pytest.mark.parametrize("make", [_as_folder, _as_tar, _as_windows_zip])
@pytest.mark.parametrize("is_list", [True, False])
def test_parts_are_read_as_one_set(make: Callable[[Path, list[str]], Path], is_list: bool, tmp_path: Path) -> None:
    names = list(DRAWN)
    parts = [make(tmp_path / f"part{number}", names[2 * number : 2 * number + 2]) for number in range(3)]
    table = read_table([str(part) for part in parts] if is_list else tmp_path, 0, UTKFACE)
    assert [path.rpartition("/")[2] for path in table.faces["path"]] == names
    assert all("part0" in path for path in table.faces["path"][:2])
    assert not len(table.rejects)


def test_copies_of_a_photo_are_one_face_and_the_aligned_one_is_taken(tmp_path: Path) -> None:
    """As in the copies on Kaggle: the same faces in three folders, and the photos that they were cut from."""
    names = list(DRAWN)
    wild = [name.removesuffix(".chip.jpg") for name in names]
    assert all(name.endswith(".jpg") for name in wild)
    for folder, files in (("UTKFace", names), ("crop_part1", names[:3]), ("utkface_aligned_cropped/UTKFace", names)):
        (tmp_path / folder).mkdir(parents=True)
        for name in files:
            (tmp_path / folder / name).write_bytes(DRAWN[name])
    (tmp_path / "a_part1").mkdir()  # before the others in the order of paths
    for name, data in zip(wild, reversed(DRAWN.values()), strict=True):
        (tmp_path / "a_part1" / name).write_bytes(data)
    table = read_table(tmp_path, 0, UTKFACE)
    assert table.faces["path"].tolist() == [f"UTKFace/{name}" for name in names]
    assert [bytes(table.store[row]) for row in range(6)] == [DRAWN[name] for name in names]
    assert table.rejects["reason"].tolist() == [SAME_PHOTO] * 15
    assert sorted(table.rejects["path"].str.partition("/")[0].unique()) == [
        "a_part1", "crop_part1", "utkface_aligned_cropped",
    ]  # fmt: skip


def test_sources_of_several_kinds_are_one_set(tmp_path: Path) -> None:
    names = list(DRAWN)
    folder = _as_folder(tmp_path / "one", names[:2])
    _write_images(tmp_path / "two", ["x/7.jpg"])
    (tmp_path / "two/f.csv").write_text("path,age\nx/7.jpg,77\n")
    table = read_table([folder, tmp_path / "two/f.csv"], 0, UTKFACE)
    assert table.faces["path"].tolist() == [*(f"{folder}/{name}" for name in names[:2]), f"{tmp_path}/two/x/7.jpg"]
    assert table.faces["age"].tolist()[2] == 77
    (tmp_path / "two/f.csv").write_text("path,age,split\nx/7.jpg,77,test\n")
    with pytest.raises(UserError, match=r"a column split in all of .* or in none"):
        read_table([folder, tmp_path / "two/f.csv"], 0, UTKFACE)


def test_names_that_begin_as_a_home_folder_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write_images(tmp_path, ["1.jpg"])
    (tmp_path / "~x.csv").write_text("path,age\n1.jpg,5\n")
    assert read_table("~x.csv", 0, UTKFACE).faces["age"].tolist() == [5]
    with pytest.raises(UserError, match="it is an empty list"):
        read_table([], 0, UTKFACE)


def test_a_table_in_parquet_is_said_like_others(tmp_path: Path) -> None:
    pd.DataFrame({"img_name": ["0.jpg"], "Age": [5]}).to_parquet(tmp_path / "f.parquet")
    assert describe_manifest(tmp_path / "f.parquet", UTKFACE) == "f.parquet: path from img_name, age from Age"


def test_other_bytes_are_no_text(tmp_path: Path) -> None:
    for data in (bytes(range(256)), b"path,age\n1.jpg,\0\n", b"\xff\xd8\xff\xe0\0\x10JFIF\0"):
        (tmp_path / "f.csv").write_bytes(data)
        with pytest.raises(ValueError, match="zero bytes"):
            writing_of(tmp_path / "f.csv")
        with pytest.raises(UserError, match="Expected a CSV file in"):
            read_table(tmp_path / "f.csv", 0, UTKFACE)


def test_a_text_that_a_small_parquet_file_repeats_without_end_is_refused(tmp_path: Path) -> None:
    paths = pa.DictionaryArray.from_arrays(pa.array([0] * 60_000, pa.int32()), pa.array(["x" * 1_000_000]))
    pq.write_table(pa.table({"path": paths}), tmp_path / "faces.parquet", compression="zstd")
    assert (tmp_path / "faces.parquet").stat().st_size < 10_000
    with pytest.raises(UserError, match=r"too large \(60,000,000,000 bytes of text"):
        read_table(tmp_path / "faces.parquet", 0, UTKFACE)


def test_a_parquet_file_with_repeated_texts_is_read_as_written(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"path": ["a.jpg", "b.jpg", "a.jpg"], "gender": pd.Categorical(["m", None, "f"]), "age": [1, 2, 3]}
    )
    table.to_parquet(tmp_path / "faces.parquet")
    rows = pd.concat(stream_rows(tmp_path / "faces.parquet", UTKFACE))
    assert rows.to_dict("list") == {
        "path": ["a.jpg", "b.jpg", "a.jpg"],
        "gender": ["m", "", "f"],
        "age": ["1", "2", "3"],
    }
