"""What goes to terminals and spreadsheets is text; what goes wrong is one line; wherever the command runs."""

import ast
import errno
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import yaml
from rich.table import Table
from run_folders import simulated_run
from simulated_predictions import simulated_labels

from facecls import compat, fit, run
from facecls.console import console
from facecls.data import parallel
from facecls.data.columns import read_columns
from facecls.data.datamodule import FacesDataModule
from facecls.data.spreadsheets import quoted, unquoted
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError, command
from facecls.files import make_folder, replacing
from facecls.predict.outputs import Journal
from facecls.predict.screen import Screen
from facecls.ranks import launched
from facecls.terminal import printable, say
from facecls.training import progress
from facecls.training.saving import claim_version

ROOT = Path(__file__).parent.parent
SRUN = {"SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
EVIL = "\x1b]52;c;cm0=\x07\x1b[2J\r\x9b31m\u202egpj[b]a[/b]:smile:\ud800\n.jpg"
"""Writes to the clipboard, clears the screen, colours, turns the direction, is markup, and is no whole text."""
SHOWN = r"\x1b]52;c;cm0=\x07\x1b[2J\r\x9b31m\u202egpj[b]a[/b]:smile:\ud800\n.jpg"


def assert_shown(text: str) -> None:
    assert SHOWN in text.replace("\n", r"\n").removesuffix(r"\n")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", text)


def test_names_move_no_cursor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    say(EVIL)
    assert_shown(capsys.readouterr().err)
    with pytest.raises(SystemExit), command("facecls"):
        raise UserError(f"Expected an image, but {EVIL.replace(chr(10), '').replace(chr(13), '')} is none.")
    assert "\x1b" not in (err := capsys.readouterr().err)
    assert r"\x1b]52;c;cm0=\x07\x1b[2J\x9b31m\u202egpj[b]a[/b]:smile:" in err
    console().print(EVIL)
    assert_shown(capsys.readouterr().out)
    table = Table("name", title=EVIL)
    table.add_row(EVIL)
    console().print(table, soft_wrap=False, width=200)
    text = capsys.readouterr().out
    assert text.count("[b]a[/b]:smile:") == 2
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", text)
    progress.LineProgress()._print_line(EVIL)
    assert_shown(capsys.readouterr().out)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Screen({}).append(pd.DataFrame({"path": [EVIL.replace("\ud800", "")], "error": ["empty file"]}))
    assert capsys.readouterr().out == f"{SHOWN}: empty file\n".replace(r"\ud800", "")


def test_other_texts_are_shown_as_they_are() -> None:
    text = "Größe\t日本語 \U0001f600 e\u0301 [b] \\x1b"
    assert printable(text) == text


FORMULAS = ["=1+1", "+cmd|'/C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''=1", "=", "-", "-a.jpg", "- 5"]
NUMBERS = ["-5", "+5", "-1.5e-3", "-.5"]
PLAIN = ["a=1.jpg", "'a'", "", "'", "1+1", "a\tb"]


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_are_quoted(text: str) -> None:
    assert quoted(text) == f"'{text}"
    assert unquoted(quoted(text)) == text


@pytest.mark.parametrize("text", NUMBERS + PLAIN)
def test_numbers_and_other_texts_are_not(text: str) -> None:
    assert quoted(text) == unquoted(text) == text


def test_quoting_is_undone_whatever_the_text() -> None:
    drawn = random.Random(0)
    for _ in range(5000):
        text = "".join(drawn.choices("'=+-@\t\r15.ea ", k=drawn.randrange(6)))
        assert unquoted(quoted(text)) == text
        assert quoted(text)[:1] not in ("=", "+", "-", "@", "\t", "\r") or float(text) is not None


def _csv_of_a_run(name: str) -> Callable[[Path, list[str]], Path]:
    def write(folder: Path, names: list[str]) -> Path:
        faces, texts = (
            simulated_labels(3, 0),
            pd.DataFrame({"path": names, "label": names, "text": names, "reason": names}),
        )
        run.write_faces(folder, faces, texts, texts, UTKFACE)
        run.write_suspects(folder, texts)
        return folder / name

    return write


def _csv_of_a_journal(folder: Path, names: list[str]) -> Path:
    with Journal(folder / "out.csv", {"path": "str", "error": "str"}, "model", []) as journal:
        journal.append(pd.DataFrame({"path": names, "error": names}))
        journal.finish()
    return folder / "out.csv"


def _csv_on_standard_output(folder: Path, names: list[str]) -> Path:
    before, sys.stdout = sys.stdout, io.StringIO()
    try:
        Screen({}).append(pd.DataFrame({"path": names, "error": names}))
        (folder / "out.csv").write_text(sys.stdout.getvalue(), encoding="utf-8", newline="")
    finally:
        sys.stdout = before
    return folder / "out.csv"


@pytest.mark.parametrize(
    "write",
    [*map(_csv_of_a_run, (run.REJECTS, run.UNREAD, run.SUSPECTS)), _csv_of_a_journal, _csv_on_standard_output],
    ids=["rejects", "unread", "suspects", "predictions", "standard output"],
)
def test_no_cell_is_run_by_a_spreadsheet_and_all_are_read_back(
    write: Callable[[Path, list[str]], Path], tmp_path: Path
) -> None:
    names = FORMULAS + [text for text in PLAIN if text]
    file = write(tmp_path, names)
    cells = pd.read_csv(file, dtype=str, keep_default_na=False)
    assert not any(re.match("[=+@\t\r-]", cell) for cell in cells.to_numpy().ravel())
    assert read_columns(file, ["path"])["path"].tolist() == names


def test_rejects_are_read_back(tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run")
    texts = pd.DataFrame({"path": FORMULAS, "reason": FORMULAS})
    run.write_faces(folder, simulated_labels(3, 0), texts, texts[:0], UTKFACE)
    rejects = run.read_run(folder).rejects
    assert rejects is not None
    assert rejects["path"].tolist() == FORMULAS


@pytest.mark.parametrize("name", [run.CONFIG, run.METRICS, run.REJECTS])
@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"\x80abc: 1\n", b"[" * 100_000], ids=["utf-16", "cp1252", "deep"]
)
def test_run_files_that_are_no_text_are_a_line(name: str, content: bytes, tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{re.escape(name)}.*; repair or delete the file"):
        run.read_run(folder)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((run.METRICS, {"seconds": value}) for value in ("long", float("nan"), [])),
        (run.METRICS, {"epochs": 1.5}),
        (run.METRICS, {"versions": []}),
        (run.METRICS, {"checkpoint": 5}),
        *((run.METRICS, {"tasks": {"age": value}}) for value in (5, "highest", [])),
        *((run.METRICS, {"tasks": {"gender": {"classes": value}}}) for value in (3, None, "ab", ["a", 1])),
        (run.CONFIG, {"seed_everything": "x"}),
        *((run.CONFIG, {"data": {"seed": value}}) for value in ("x", 1.5, [])),
        *((run.CONFIG, {"data": {"root": value}}) for value in (5, {})),
    ],
    ids=str,
)
def test_run_files_with_values_of_other_kinds_are_a_line(name: str, values: dict[str, Any], tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run")
    (folder / name).write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"^Expected .*, but got"):
        run.read_run(folder)


@pytest.mark.parametrize("name", [run.PREDICTIONS, run.FACES])
@pytest.mark.parametrize(
    ("column", "value"),
    [("gender", 2), ("gender", -1), ("race", "white"), ("age", 500), ("age", "old"), ("age", 1.5)],
)
def test_tables_of_a_run_with_other_values_are_a_line(name: str, column: str, value: Any, tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run")
    table = pd.read_parquet(folder / name)
    table[column] = value
    table.to_parquet(folder / name)
    with pytest.raises(UserError, match=rf"{re.escape(name)}.*run the evaluation again"):
        run.read_run(folder)


@pytest.mark.parametrize(
    ("column", "value"), [("gender_predicted", 2), ("age_predicted", "old"), ("p_male", 7.0), ("p_white", "x")]
)
def test_predictions_that_are_none_are_a_line(column: str, value: Any, tmp_path: Path) -> None:
    folder = simulated_run(tmp_path / "run")
    table = pd.read_parquet(folder / run.PREDICTIONS)
    assert column in table
    table[column] = value
    table.to_parquet(folder / run.PREDICTIONS)
    with pytest.raises(UserError, match=rf"numbers.* under {column} in .*run the evaluation again"):
        run.read_run(folder)


def test_other_exceptions_are_bugs_with_their_traceback_in_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as ended, command("facecls.fit"):
        raise KeyError("Größe\ud800\n")
    assert ended.value.code == 70
    assert isinstance(ended.value.__cause__, KeyError)  # which a test of a command sees
    (log,) = tmp_path.iterdir()
    err = capsys.readouterr().err
    assert err.startswith(f"facecls.fit: this is a bug, please report it with {log}: KeyError: ")
    assert err.count("\n") == 1
    text = log.read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in text
    assert "test_terminal.py" in text


def test_a_long_message_is_cut_in_its_middle(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, command("facecls.fit"):
        raise UserError(f"Expected a column path, but there are {'x, ' * 100_000}y; rename one.")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert len(said) < 2_100
    assert said.startswith("facecls.fit: error: Expected a column path, but there are x, x,")
    assert said.endswith("x, y; rename one.\n")


def test_a_bug_on_a_full_disk_is_told_all_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", no_room)
    with pytest.raises(SystemExit) as ended, command("facecls.fit"):
        raise KeyError("x")
    assert ended.value.code == 70
    assert "KeyError" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EMFILE, errno.EACCES])
def test_faults_of_the_machine_are_no_bugs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, command("facecls.fit"):
        raise OSError(number, os.strerror(number), "some/file")
    assert ended.value.code == 2
    assert f"Can't go on with some/file: {os.strerror(number)}" in capsys.readouterr().err


def _script(body: str, **options: Any) -> Any:
    text = f"from facecls.errors import command\nwith command('facecls.x'):\n    {body}\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return [sys.executable, *options.pop("flags", []), "-c", text], {"env": environment, **options}


def test_a_debugger_sees_the_exception(tmp_path: Path) -> None:
    words, options = _script("raise KeyError('x')", flags=["-X", "dev"], cwd=tmp_path)
    ended = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_command_goes_on_when_nobody_reads_it(stream: str, tmp_path: Path) -> None:
    body = (
        f"import sys; [print('x' * 1000, file=sys.{stream}, flush=True) for _ in range(500)]; open('done', 'w').close()"
    )
    words, options = _script(body, cwd=tmp_path)
    read, write = os.pipe()
    process = subprocess.Popen(
        words, **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, stream: write}, **options
    )
    os.close(read)
    os.close(write)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 0, err
    assert (tmp_path / "done").exists()
    assert not err


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_good_as_empty_ones(closed: str, tmp_path: Path) -> None:
    body = (
        "import os, sys; assert not sys.stdin.buffer.read(); handle = os.open('done', os.O_CREAT); assert handle > 2; "
        "print('x'); print('y', file=sys.stderr)"
    )
    words, options = _script(body, cwd=tmp_path, stdin=subprocess.DEVNULL)
    ended = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *words], capture_output=True, text=True, check=False, **options
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "done").exists()
    assert ended.stdout == ("" if ">&-" in closed.replace("2>&-", "") else "x\n")
    assert ended.stderr == ("" if "2>&-" in closed else "y\n")


def test_a_full_disk_below_standard_output_ends_no_training(tmp_path: Path) -> None:
    words, options = _script("print('x' * 10_000, flush=True); open('done', 'w').close()", cwd=tmp_path)
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, check=False, **options)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert (tmp_path / "done").exists()


FOREIGN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_texts_are_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    """A run with names in German and Japanese is written, and read and printed again, where the locale is ASCII."""
    folder = simulated_run(tmp_path / "run")
    config = tmp_path / "options.yaml"
    config.write_text("model:\n  trunk: größe\n", encoding="utf-8")
    body = f"""
from facecls.errors import command
with command('facecls.x'):
    import locale, sys
    from pathlib import Path
    import pandas as pd
    from facecls import run
    from facecls.console import console
    from facecls.training.renames import rename_options
    assert 'utf' not in locale.getpreferredencoding(False).lower(), locale.getpreferredencoding(False)
    folder = Path({str(folder)!r})
    run.write_config(folder, 'data: {{root: Grö日}}')
    faces = pd.read_parquet(folder / run.FACES)
    from facecls.data.tasks import UTKFACE
    texts = pd.DataFrame({{'path': ['Grö日.jpg'], 'reason': ['ä']}})
    run.write_faces(folder, faces, texts, texts[:0], UTKFACE)
    found = run.read_run(folder)
    assert found.data['root'] == 'Grö日' and found.rejects['path'].tolist() == ['Grö日.jpg']
    print(found.data['root'])
    console().print(found.config_text)
    print(rename_options(['--config', {str(config)!r}])[0][1])
"""
    script, environment = tmp_path / "script.py", {**os.environ, "PYTHONPATH": str(ROOT), **FOREIGN}
    script.write_text(body, encoding="utf-8")
    ended = subprocess.run([sys.executable, script], capture_output=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr.decode()
    lines = ended.stdout.decode("utf-8").splitlines()
    assert lines[0] == "Grö日"
    assert lines[1] == "data: {root: Grö日}"
    assert lines[2].isascii()
    assert yaml.safe_load(lines[2]) == {"model": {"trunk": "größe"}}


@pytest.mark.parametrize(
    "path", sorted([*(ROOT / "facecls").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]), ids=str
)
def test_every_text_file_has_its_encoding(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(each.arg == "encoding" for each in node.keywords):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        modes = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        owner = ast.unparse(node.func).rpartition(".")[0]
        opens_text = name == "open" and modes in (["r"], ["w"], ["x"], ["a"], [])
        known = owner in ("os", "PIL.Image", "Image", "tarfile") or owner.startswith(
            ("archive", "self._archive", "opened")
        )
        assert not (name in ("read_text", "write_text") and not node.args[name == "write_text" :]), ast.unparse(node)
        assert not opens_text or known, ast.unparse(node)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"SLURM_PROCID": "x"}, "Expected SLURM_PROCID .* from 0 up.*got 'x'"),
        ({"WORLD_SIZE": "0"}, "Expected WORLD_SIZE .* from 1 up.*got '0'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "Expected WORLD_SIZE"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "Expected RANK"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "Expected RANK"),
        ({"LOCAL_RANK": "1.0"}, "Expected LOCAL_RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "Expected RANK below WORLD_SIZE .*got 2, 2 and 0"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "LOCAL_RANK not above it, but got 0, 2 and 1"),
        ({**SRUN, "SLURM_PROCID": "4", "SLURM_NTASKS": "4"}, "Expected SLURM_PROCID below SLURM_NTASKS"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_NODEID": "0"}, "Expected SLURM_LOCALID in the environment"),
        ({"SLURM_NTASKS_PER_NODE": "4(x2)"}, "Expected SLURM_NTASKS_PER_NODE .* from 1 up"),
        ({"SLURM_JOB_ID": "x"}, "Expected SLURM_JOB_ID"),
        ({"MASTER_PORT": "http"}, "Expected MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "Expected RANK in the environment beside what else torchrun sets"),
        ({"RANK": "0"}, "Expected WORLD_SIZE in the environment"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"},
            "Expected LOCAL_RANK, MASTER_ADDR, MASTER_PORT in",
        ),
        ({"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, "Expected RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in"),
    ],
)
def test_ranks_that_make_no_sense_are_a_line(environment: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        launched(environment)


@pytest.mark.parametrize(
    "words", [["-m", "facecls.fit"], ["-m", "facecls", "fit"], ["-m", "facecls.predict", "a", "b"]]
)
def test_ranks_are_looked_at_before_lightning_is(words: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_PROCID": "x"}
    ended = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert ended.returncode == 2
    assert re.fullmatch(r"facecls.*: error: Expected SLURM_PROCID[^\n]*\n", ended.stderr), ended.stderr


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook_find_unused_parameters_true"])
def test_strategies_that_copy_the_process_are_refused(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="use ddp"):
        fit.main(["--data.root=synthetic:20", f"--trainer.strategy={strategy}", "--trainer.max_epochs=0"])


def test_systems_that_lack_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """MacOS and Windows can't say which cores a process may use, and Windows has no SIGKILL."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert parallel.available_cores() == 3
    assert FacesDataModule("synthetic:20").num_workers == 3
    monkeypatch.delattr(signal, "SIGKILL")
    killed: list[int] = []
    launcher = SimpleNamespace(procs=[1], kill=killed.append)
    compat.kill_launched_processes(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)))  # type: ignore[arg-type]
    assert killed == [signal.SIGTERM]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_folders_that_can_t_be_written_are_a_line(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    for act in (
        lambda: claim_version(tmp_path),
        lambda: make_folder(tmp_path / "a"),
        lambda: run.write_config(tmp_path / "a", ""),
        lambda: replacing(tmp_path / "a").__enter__(),
    ):
        with pytest.raises(UserError, match=os.strerror(number)):
            act()
