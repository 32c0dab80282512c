"""The command predict as users run it: every input exactly once, whatever happens on the way."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from labelled_faces import write_glasses
from PIL import Image
from test_predictor import COLUMNS
from trained_model import GLASSES, SIZE, save_checkpoint

import facecls
from facecls.data.synthetic import write_faces
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError, command
from facecls.model.predictor import TorchPredictor
from facecls.predict.__main__ import main
from facecls.predict.faces import Batch
from facecls.predict.grid import Grid, draw
from facecls.predict.inputs import Input
from facecls.predict.outputs import Journal, journal_of

pytestmark = pytest.mark.usefixtures("own_folder")

ENDINGS = ["csv", "jsonl", "parquet"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("model") / "best.ckpt"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty drawn faces with their truths as names, and three files that are none."""
    folder = tmp_path_factory.mktemp("drawn")
    write_faces(folder, 30, seed=4)
    (folder / "cut.jpg").write_bytes(next(folder.iterdir()).read_bytes()[:-9])
    (folder / "readme.txt").write_text("hello")
    (folder / "empty.png").touch()
    return folder


@pytest.fixture
def files(drawn: Path) -> list[str]:
    return sorted(path.as_posix() for path in drawn.iterdir())


WHOLE = "the detector found no faces in this model's training images: photos are taken whole\n"
"""What is said of a model that was not trained on aligned faces."""


def table_of(out: str) -> pd.DataFrame:
    """What a file of predictions holds, in the types that the library gives."""
    if out.endswith("parquet"):
        return pd.read_parquet(out)
    if out.endswith("csv"):
        with Path(out).open(newline="", encoding="utf-8") as stream:
            rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    else:
        rows = [json.loads(line) for line in Path(out).read_text().splitlines()]
    texts = pd.DataFrame(rows, columns=COLUMNS).replace("", None)
    kinds = {name: "float32" for name in COLUMNS if name == "age" or name.startswith("p_")}
    kinds |= {"age_low": "Int16", "age_high": "Int16"}
    return pd.DataFrame(
        {
            name: pd.Series(
                [None if pd.isna(cell) else float(cell) if name in kinds else cell for cell in texts[name]],
                dtype=kinds.get(name, "str"),
            )
            for name in COLUMNS
        }
    )


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_input_has_its_row_in_order(ending: str, model: str, drawn: Path, files: list[str]) -> None:
    out = f"out.{ending}"
    assert main([model, str(drawn), "gone.png", "--out", out, "--batch_size", "7"]) == 1
    table = table_of(out)
    wanted = facecls.load(model, device="cpu").predict([*files, "gone.png"], batch_size=7)
    wanted.loc[wanted["path"].str.endswith("readme.txt"), "error"] = "not a photo"  # as it is among others
    pd.testing.assert_frame_equal(table, wanted, check_exact=True)
    assert set(table["error"].dropna()) == {"truncated", "not a photo", "not an image", "missing file"}
    assert table["error"].notna().sum() == 4
    assert [path.name for path in Path().iterdir()] == [out]


def test_nothing_failed(model: str, files: list[str]) -> None:
    faces = [path for path in files if path.endswith("chip.jpg")]
    assert main([model, faces[0], "--out", "out.csv", faces[1], "--tta", "flip", *faces[:1]]) == 0
    assert table_of("out.csv")["path"].tolist() == [faces[0], faces[1], faces[0]]


def test_what_is_no_photo_among_photos_is_no_failure(model: str, files: list[str]) -> None:
    Path("in").mkdir()
    Path("in/1.jpg").write_bytes(Path(next(path for path in files if path.endswith("chip.jpg"))).read_bytes())
    for name in ("notes.txt", "labels.json", "Thumbs.db", "desktop.ini", ".DS_Store"):
        Path("in", name).write_text("hello")
    assert main([model, "in", "--out", "out.csv"]) == 0
    table = table_of("out.csv")
    assert table["path"].tolist() == ["in/1.jpg", "in/labels.json", "in/notes.txt"]
    assert table["error"].fillna("").tolist() == ["", "not a photo", "not a photo"]
    assert main([model, "in", "--out", "out.csv", "--resume"]) == 0
    Path("in/2.jpg").write_text("hello")
    assert main([model, "in", "--out", "other.csv"]) == 1


def test_archives_and_lists(model: str, drawn: Path, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open("faces.tar.gz", "w:gz") as tar:
        tar.add(drawn, "in", filter=lambda member: None if member.name.endswith((".txt", ".png")) else member)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(files[:3]).encode())))
    assert main([model, "faces.tar.gz", "-", "--out", "out.csv"]) == 1  # cut.jpg
    table = table_of("out.csv")
    assert sorted(table["path"][:31]) == sorted(
        f"faces.tar.gz/in/{Path(path).name}" for path in files if path.endswith("jpg")
    )
    assert table["path"][31:].tolist() == files[:3]
    rows = table.set_index("path")
    for path in files[:3]:
        packed = rows.loc[f"faces.tar.gz/in/{Path(path).name}"]
        assert packed["p_male"] == pytest.approx(rows.loc[path, "p_male"], abs=1e-5)


def test_its_own_files_are_no_inputs(model: str, files: list[str]) -> None:
    Path("in").mkdir()
    Path("in/1.jpg").write_bytes(Path(files[0]).read_bytes())
    words = [model, "in", "in/*", "--out", "in/out.parquet", "--grid", "in/grid.png"]
    assert main(words) == 0
    journal_of(Path("in/out.parquet")).touch()
    assert main([*words, "--resume"]) == 0
    assert table_of("in/out.parquet")["path"].tolist() == ["in/1.jpg"] * 2
    assert {path.name for path in Path("in").iterdir()} == {"1.jpg", "out.parquet", "grid.png"}


def start(*words: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "facecls.predict", *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_after_a_kill_it_resumes_without_loss_and_without_doubling(
    ending: str, model: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(f"out.{ending}")
    journal, limit = journal_of(out), time.monotonic() + 60
    assert journal.name == f"out.{ending}.journal.jsonl"
    with start(model, "-", "--out", str(out), "--batch_size", "4") as process:
        assert process.stdin is not None
        process.stdin.write("".join(f"{path}\n" for path in files[:23]).encode())
        process.stdin.flush()  # and it waits for more
        while not journal.exists() or journal.read_bytes().count(b"\n") < 9:
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.02)
        process.kill()
    assert not out.exists()
    with journal.open("ab") as stream:
        stream.write(b'{"path": "cut')  # as a full disk may leave it
    Path(f".out.{ending}.abcdefgh.part").touch()  # as if it had been killed while it wrote the table
    backwards = files[::-1]
    with pytest.raises(UserError, match=rf"out.{ending}.journal.jsonl exists; continue with --resume"):
        main([model, *backwards, "--out", str(out)])
    assert main([model, *backwards, "--out", str(out), "--resume"]) == 1
    table = table_of(str(out))
    assert sorted(table["path"]) == files
    wanted = facecls.load(model, device="cpu").predict(table["path"].tolist())
    pd.testing.assert_frame_equal(table, wanted, rtol=1e-4)
    before = out.read_bytes()
    capsys.readouterr()
    assert main([model, *files, "--out", str(out), "--resume"]) == 0
    assert capsys.readouterr().err == (
        f"facecls.predict: out.{ending} is complete; for further inputs name another file\n"
    )
    assert out.read_bytes() == before
    assert [path.name for path in Path().iterdir()] == [str(out)]


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_input_that_is_named_twice_has_two_rows_after_a_resume_too(
    ending: str, model: str, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = [files[1], files[0], files[0], files[2], files[1]]
    words = [model, *named, "--out", f"out.{ending}", "--batch_size", "1", "--resume"]  # with nothing there it begins
    for calls in (2, 3):
        with monkeypatch.context() as patch:
            interrupt(patch, calls)
            with pytest.raises(SystemExit):
                main(words)
    main(words)
    assert table_of(f"out.{ending}")["path"].tolist() == named


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_that_ended_while_it_converted_resumes(
    ending: str, model: str, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [model, *files, "--out", f"out.{ending}"]
    main(words)
    whole = Path(f"out.{ending}").read_bytes()
    Path(f"out.{ending}").unlink()

    def full(source: object, *_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        for place in ("_write_csv", "_write_parquet", "shutil.copyfileobj"):
            patch.setattr(f"facecls.predict.outputs.{place}", full)
        with pytest.raises(UserError, match="No space left"):
            main(words)
    assert [path.name for path in Path().iterdir()] == [f"out.{ending}.journal.jsonl"]
    assert main([*words, "--resume"]) == 1
    assert Path(f"out.{ending}").read_bytes() == whole
    # or between the file and the journal's end
    Path(f"out.{ending}.journal.jsonl").write_bytes(b"")
    assert main([*words, "--resume"]) == 1
    assert Path(f"out.{ending}").read_bytes() == whole
    assert [path.name for path in Path().iterdir()] == [f"out.{ending}"]


TYPES = {"path": "str", "p_male": "float32", "age_low": "Int16", "error": "str"}
ODD = ["a.png", 'qu"ote,.png', "new\nline.png", "é\\udcff.png", "last.png"]


def journal_to(out: Path, **others: Any) -> Journal:
    return Journal(out, **{"columns": TYPES, "model": "1f", "options": ["--tta none"]} | others)


def rows_of(paths: Sequence[str]) -> pd.DataFrame:
    count = len(paths)
    return pd.DataFrame(
        {
            "path": pd.Series(paths, dtype="str"),
            "p_male": np.arange(count, dtype=np.float32) / 3,
            "age_low": pd.array([None, *range(1, count)], "Int16"),
            "error": pd.Series(["why", *[None] * (count - 1)], dtype="str"),
        }
    )


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_journal_that_was_cut_anywhere_keeps_its_whole_rows(ending: str) -> None:
    out = Path(f"out.{ending}")
    file = journal_of(out)
    with journal_to(out) as journal:
        journal.append(rows_of(ODD))
    whole = file.read_bytes()
    kept = set()
    for length in range(len(whole) + 1):
        file.write_bytes(whole[:length])
        with journal_to(out) as journal:
            kept.add(journal.rows)
            assert list(journal.done.elements()) == ODD[: journal.rows]
            assert journal.failed == min(journal.rows, 1)
            journal.append(rows_of(ODD)[journal.rows :])
        assert file.read_bytes() == whole
    assert kept == {0, 1, 2, 3, 4, 5}


def test_a_parquet_file_has_the_rows_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facecls.predict.outputs._GROUP", 2)
    out = Path("out.parquet")
    table = rows_of(ODD)
    with journal_to(out) as journal:
        journal.append(table[:3])
    with journal_to(out) as journal:
        journal.append(table[3:])
        journal.finish()
    assert not journal_of(out).exists()
    pd.testing.assert_frame_equal(pd.read_parquet(out), table, check_exact=True)


def test_a_csv_file_has_the_rows_exactly() -> None:
    with journal_to(Path("out.csv")) as journal:
        journal.append(rows_of(ODD))
        journal.finish()
    table = pd.read_csv("out.csv", dtype=TYPES, encoding="utf-8")
    pd.testing.assert_frame_equal(table, rows_of(ODD), check_exact=True)


HEADER = b'{"model": "1f", "options": ["--tta none"], "columns": ["path", "p_male", "age_low", "error"]}\n'


def test_the_first_line_says_what_was_run() -> None:
    with journal_to(Path("out.csv")) as journal:
        journal.append(rows_of(ODD)[:1])
    assert journal_of(Path("out.csv")).read_bytes() == (
        HEADER + b'{"path": "a.png", "p_male": 0.0, "age_low": null, "error": "why"}\n'
    )


@pytest.mark.parametrize(
    "data",
    [
        b"path,p_male,age_low,error\nx,0.5,3,\n",
        b'{"path": "x", "p_male": 0.5, "age_low": 3, "error": null}\n',
        b'["model", "options", "columns"]\n',
        b"7\n",
        b"hello\n",
        HEADER + b'{"path": "x", "p_male": 0.5}\n',
        HEADER + b'{"path": "x", "p_male": 0.5, "age_low": 3, "error": null}\n{}\n',
        HEADER + b'["path", "p_male", "age_low", "error"]\n',
        HEADER + b'{"path": ["x"], "p_male": 0.5, "age_low": 3, "error": null}\n',
        HEADER + b'"path"\n',
        HEADER + b"null\n",
        HEADER + b"hello\n",
        HEADER + b"\xff\n",
    ],
)
def test_other_files_are_refused_and_left_alone(data: bytes) -> None:
    file = journal_of(Path("other.csv"))
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"Expected .* in other.csv.journal.jsonl, but"):
        journal_to(Path("other.csv"))
    assert file.read_bytes() == data
    assert [path.name for path in Path().iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"model": "2e"}, r"the same model \(SHA-256\), but it was begun with 1f, not 2e; repeat the first command"),
        ({"options": ["--tta flip"]}, "the same options, but it was begun with --tta none, not --tta flip; "),
        (
            {"columns": {"path": "str", "error": "str"}},
            "the same columns, .* path, p_male, age_low, error, not path, e",
        ),
    ],
)
def test_a_run_is_not_continued_as_another(now: dict[str, Any], said: str) -> None:
    out = Path("out.csv")
    with journal_to(out) as journal:
        journal.append(rows_of(ODD))
    before = journal_of(out).read_bytes()
    with pytest.raises(UserError, match=said):
        journal_to(out, **now)
    assert journal_of(out).read_bytes() == before


def test_models_are_not_mixed_in_one_file(
    model: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(SystemExit):
            main([model, *files, "--out", "out.csv", "--batch_size", "5"])
    before = journal_of(Path("out.csv")).read_bytes()
    others = [
        (str(save_checkpoint(tmp_path / "other.ckpt", tasks=["age"])), []),
        (str(save_checkpoint(tmp_path / "same.ckpt", dropout=0.3)), []),  # the same columns
        (model, ["--tta", "flip"]),
    ]
    for (other, options), said in zip(others, ("model", "model", "options"), strict=True):
        with pytest.raises(UserError, match=f"Expected to continue out.csv.journal.jsonl with the same {said}"):
            main([other, *files, "--out", "out.csv", "--resume", *options])
        assert journal_of(Path("out.csv")).read_bytes() == before
    Path("moved.ckpt").write_bytes(Path(model).read_bytes())  # a file's content counts, not its name
    assert main(["moved.ckpt", *files, "--out", "out.csv", "--resume"]) == 1
    assert table_of("out.csv")["path"].tolist() == files


@pytest.fixture(scope="module")
def finished(model: str, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Finished predictions of the drawn faces, by ending."""
    folder = tmp_path_factory.mktemp("finished")
    for ending in ENDINGS:
        main([model, str(drawn), "--out", str(folder / f"out.{ending}")])
    return {ending: (folder / f"out.{ending}").read_bytes() for ending in ENDINGS}


def wrong_outputs(finished: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    for ending in ("csv", "jsonl"):
        data = finished[ending]
        lines = data.splitlines(keepends=True)
        yield ending, b"".join(lines[:-1])  # as version 0.1 left it
        yield ending, data[:-1]
        yield ending, data[:-20]
        yield ending, data + lines[-1]
        yield ending, data.replace(b"p_male", b"p_man")
        yield ending, b""
        yield ending, b"hello\n" * len(lines)
        yield ending, b"\xff\n" * len(lines)
    yield "csv", finished["csv"].replace(b"p_male,", b"", 1)
    yield "csv", finished["csv"][:-1] + b',"cut\n'
    yield "parquet", finished["parquet"][:-1]
    yield "parquet", b"hello"
    yield "parquet", b""


def test_only_what_holds_all_rows_is_called_complete(
    model: str, drawn: Path, finished: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [model, str(drawn), "--resume", "--out"]
    for ending in ENDINGS:
        Path(f"out.{ending}").write_bytes(finished[ending])
        assert main([*words, f"out.{ending}"]) == 0
        assert f"out.{ending} is complete" in capsys.readouterr().err
        with pytest.raises(UserError, match=rf"Expected out\.{ending}, .*\(34\), but it has whole rows for 33; "):
            main([*words, f"out.{ending}", "gone.png"])  # one input more
        assert Path(f"out.{ending}").read_bytes() == finished[ending]
    for ending, data in wrong_outputs(finished):
        out = Path(f"wrong.{ending}")
        out.write_bytes(data)
        with pytest.raises(UserError, match=rf"Expected {out}, which has no journal .* \(33\), but "):
            main([*words, str(out)])
        assert out.read_bytes() == data, data
        assert not journal_of(out).exists()
    pd.read_parquet("out.parquet").rename(columns={"age": "years"}).to_parquet("other.parquet")
    with pytest.raises(UserError, match="other columns; delete it or name another file"):
        main([*words, "other.parquet"])


def test_a_complete_run_over_archives_and_lists_ends_with_0(
    model: str, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open("faces.tar", "w") as tar:
        tar.add(files[0], "1.jpg")
    words = [model, "faces.tar", "-", "synthetic:3", "--out", "out.csv", "--resume"]
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(files[1:3]).encode())))
        assert main(words) == 0
    assert len(table_of("out.csv")) == 6


@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_what_version_0_1_left_unfinished_is_named(options: list[str], model: str, files: list[str]) -> None:
    Path("out.parquet.part.jsonl").write_text("hello")
    with pytest.raises(UserError, match=r"but out\.parquet\.part\.jsonl is an unfinished run of version 0\.1"):
        main([model, *files, "--out", "out.parquet", *options])
    assert [path.name for path in Path().iterdir()] == ["out.parquet.part.jsonl"]


def test_drawn_faces_are_predicted(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "glasses.ckpt", task_options=GLASSES)
    assert main([str(model), "synthetic:5", "--out", "out.csv", "--grid", "grid.png"]) == 0
    table = pd.read_csv("out.csv")
    write_glasses(Path("written"), 5, seed=0)
    wanted = facecls.load(model, device="cpu").predict([f"written/{number}.jpg" for number in range(5)])
    pd.testing.assert_series_equal(table["p_glasses_with"], wanted["p_glasses_with"], check_dtype=False, rtol=1e-5)
    with Image.open("grid.png") as image:
        assert image.width > image.height


def test_a_full_disk_is_said_and_the_run_can_be_resumed(
    model: str, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def sync(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", sync)
    with pytest.raises(UserError, match=r"Can't write out\.csv\.journal\.jsonl: No space left on device; .* --resume"):
        main([model, *files, "--out", "out.csv", "--batch_size", "5"])
    main([model, *files, "--out", "out.csv", "--resume"])
    assert table_of("out.csv")["path"].tolist() == files


def interrupt(monkeypatch: pytest.MonkeyPatch, when: int) -> None:
    estimate, calls = TorchPredictor.estimate, 0

    def interrupted(self: TorchPredictor, images: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls == when:
            signal.default_int_handler(signal.SIGINT, None)  # a real one is ignored where tests run in the background
        return estimate(self, images)

    monkeypatch.setattr(TorchPredictor, "estimate", interrupted)


@pytest.mark.parametrize("ending", ENDINGS)
def test_ctrl_c_says_how_to_resume(
    ending: str, model: str, files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(monkeypatch, 3)
    out = f"out.{ending}"
    with pytest.raises(SystemExit) as end:
        main([model, *files, "--out", out, "--batch_size", "5"])
    assert end.value.code == 130
    assert capsys.readouterr().err == (
        f"{WHOLE}facecls.predict: interrupted after 10 rows; run the same command with --resume to continue\n"
    )
    main([model, *files, "--out", out, "--resume"])
    assert table_of(out)["path"].tolist() == files


def test_without_out_a_program_reads_csv(
    model: str, files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([model, *files, "--batch_size", "6"]) == 1
    said = capsys.readouterr()
    Path("out.csv").write_text(said.out)
    assert table_of("out.csv")["path"].tolist() == files
    assert said.err.startswith(WHOLE)
    assert said.err.endswith(" faces/s by torch); 3 could not be read\n")
    assert said.err.count("\n") == 2
    interrupt(monkeypatch, 1)
    with pytest.raises(SystemExit):
        main([model, *files])
    assert capsys.readouterr().err == f"{WHOLE}facecls.predict: interrupted; use --out to make a run resumable\n"


def test_without_out_a_person_reads_lines(
    model: str, files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    main([model, files[0], "gone.png"])
    row = facecls.load(model, device="cpu").predict(files[0]).iloc[0]
    line, failed = capsys.readouterr().out.splitlines()
    assert line.split() == [
        row["gender"],
        f"{100 * row['p_' + row['gender']]:.0f}",
        "%",
        row["race"],
        f"{100 * row['p_' + row['race']]:.0f}",
        "%",
        f"{row['age']:.0f}",
        f"({row['age_low']}-{row['age_high']})",
        files[0],
    ]
    assert failed == "gone.png: missing file"


def test_a_reader_who_has_enough_is_no_error(model: str, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert main([model, *files]) == 1


def test_standard_error_is_only_ours(model: str, files: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """The JPEG library writes of its own accord about a JPEG with stray bytes."""
    jpeg = Path(next(path for path in files if path.endswith("chip.jpg"))).read_bytes()
    Path("stray.jpg").write_bytes(jpeg[:20] + b"stray" + jpeg[20:])
    facecls.load(model, device="cpu").predict("stray.jpg")
    assert "JPEG" in capfd.readouterr().err
    assert main([model, "stray.jpg", "--out", "out.csv"]) == 0
    assert capfd.readouterr().err.startswith(f"{WHOLE}1 photo, 1 face in ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone.ckpt", "in"], "Expected a model at gone.ckpt"),
        (["{model}", "gone", "x*"], "nothing at gone, x*"),
        (["{model}", "nothing"], "no file in nothing"),
        (["{model}", "text.zip"], "Can't read the archive text.zip"),
        (["{model}", "in", "--out", "out.txt"], "end in .csv, .parquet, .jsonl, but got out.txt"),
        (["{model}", "in", "--out", "gone/out.csv"], "none at gone"),
        (["{model}", "in", "--out", "folder.csv"], "folder.csv is a folder"),
        (["{model}", "in", "--out", "old.csv"], "old.csv exists; delete it, or name another file"),
        (["{model}", "in", "--out", "old.parquet"], "old.parquet.journal.jsonl exists"),
        (["{model}", "in", "--grid", "grid.gif"], "--grid to be a .png"),
        (["{model}", "in", "--grid", "gone/grid.png"], "--grid to be a .png in a folder that exists"),
        (["{model}", "in", "--batch_size", "0"], "--batch_size to be at least 1, but got 0"),
        (["{model}", "in", "--resume"], "Expected --out with --resume"),
        (["{model}", "in", "--device", "cuda"], "Expected a GPU"),
    ],
)
def test_misuse_is_one_line_and_status_2(
    words: list[str], said: str, model: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("in", "nothing", "folder.csv"):
        Path(folder).mkdir()
    for name in ("text.zip", "old.csv", "old.parquet.journal.jsonl"):
        Path(name).write_text("hello")
    Path("in/1.jpg").write_bytes(Path(files[0]).read_bytes())
    with pytest.raises(SystemExit) as end, command("facecls.predict"):
        main([word.format(model=model) for word in words])
    shown = capsys.readouterr()
    assert (end.value.code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert said in shown.err


@pytest.mark.parametrize(
    "words", [[], ["best.ckpt"], ["best.ckpt", "x", "--tta", "rotate"], ["best.ckpt", "x", "--no"]]
)
def test_wrong_options_have_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, command("facecls.predict"):
        main(words)
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("facecls.predict: error: ")
    assert shown.count("\n") == 1


ROW = {"path": "x.jpg", "gender": "female", "race": "asian", "age": 30.6}


@pytest.mark.parametrize(
    ("labels", "text", "is_wrong"),
    [
        ({}, "female, asian, 31", False),
        ({"gender": "", "race": "?", "age": "old"}, "female, asian, 31", False),
        ({"age": "20-29"}, "true: 20-29\nfemale, asian, 31", False),
        ({"age": "30s"}, "true: 30-39\nfemale, asian, 31", False),
        ({"age": "20-24"}, "true: 20-24\nfemale, asian, 31", True),
        ({"age": "37+", "gender": "F"}, "true: female, 37+\nfemale, asian, 31", True),
        ({"gender": "F", "race": "2", "age": "25"}, "true: female, asian, 25\nfemale, asian, 31", False),
        ({"gender": "1", "race": "Asian", "age": "24"}, "true: female, asian, 24\nfemale, asian, 31", True),
        ({"gender": "1", "race": "2", "age": "37"}, "true: female, asian, 37\nfemale, asian, 31", True),
        ({"gender": "0", "glasses": "with"}, "true: male\nfemale, asian, 31", True),
        ({"race": "indian"}, "true: indian\nfemale, asian, 31", True),
    ],
)
def test_titles_of_the_grid(labels: dict[str, str], text: str, is_wrong: bool) -> None:
    grid = Grid(UTKFACE)
    grid.add(Batch(pd.DataFrame([ROW]), [np.zeros((SIZE, SIZE, 3), np.uint8)], [labelled(labels)], 1))
    assert grid.titles == [(text, is_wrong)]


def labelled(labels: dict[str, str]) -> Input:
    return Input("x.jpg", lambda: np.zeros((1, 1, 3), np.uint8), labels)


def batch_of(count: int, draw: Callable[[int], Any]) -> Batch:
    rows = [ROW | {"path": f"25_1_2_2017011617452512{number}.jpg"} for number in range(count)]
    return Batch(pd.DataFrame(rows), [draw(number) for number in range(count)], [labelled({})] * count, count)


def test_the_grid_shows_the_first_faces_that_can_be_read() -> None:
    grid = Grid(UTKFACE)
    drawn = [np.full((SIZE, SIZE, 3), number, np.uint8) for number in range(70)]
    grid.add(batch_of(10, lambda number: drawn[number] if number else None))
    grid.add(
        Batch(pd.DataFrame([ROW | {"age": 99.0}]), [drawn[9]], [labelled({"gender": "1", "race": "2", "age": "26"})], 1)
    )
    axes = draw(grid.pictures, grid.titles).axes
    assert len(axes) == 10
    assert [int(each.get_images()[0].get_array().max()) for each in axes] == [*range(1, 10), 9]  # type: ignore[union-attr]
    assert {each.get_title() for each in axes[:9]} == {"true: female, asian, 25\nfemale, asian, 31"}
    assert [each.title.get_color() for each in axes] == ["black"] * 9 + ["red"]
    grid.add(batch_of(70, drawn.__getitem__))
    assert len(draw(grid.pictures, grid.titles).axes) == 64


def test_the_grid_is_a_picture(model: str, drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([model, str(drawn), "--out", "out.csv", "--grid", "grid.png"])
    with Image.open("grid.png") as image:
        assert image.format == "PNG"
        assert image.width > image.height > 500  # 30 faces in four rows of eight
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 1000
    Path("grid.png").unlink()
    main([model, str(drawn / "cut.jpg"), "--out", "cut.csv", "--grid", "grid.png"])
    assert "no face was predicted, so there is no grid.png" in capsys.readouterr().err
    assert not Path("grid.png").exists()
