"""What commands write is there completely or not at all, is lost by nobody, and belongs to one process."""

import errno
import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from run_folders import without_drawing
from simulated_predictions import simulated_labels

from facecls import fit, run
from facecls.crop import __main__ as crop
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError
from facecls.files import check_no_input, remove_parts, replacing
from facecls.locks import locked
from facecls.model.checkpoint import write_checkpoint
from facecls.model.trunk import save_trunk
from facecls.predict import __main__ as predict
from facecls.predict.grid import Grid
from facecls.predict.outputs import Journal, journal_of
from facecls.predict.pictures import check_folder, check_replaceable, save
from facecls.report.page import write_page
from facecls.training.cli import create_logger
from facecls.training.probe import write_features
from facecls.training.saving import WholeCheckpointIO, claim_version

ROOM = 30_000
"""Bytes that a file may have on the full disk."""
FACES = simulated_labels(10_000, 1)
TENSORS = {"a": torch.rand(30_000), "b": torch.rand(30_000)}


@contextmanager
def full_disk(room: int = ROOM) -> Iterator[None]:
    """Lets the kernel refuse to write more than some bytes of any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _journal(dest: Path) -> None:
    """Finishes a journal; that it is written itself is another test's."""
    names = [f"{number}.jpg" for number in np.random.default_rng(0).integers(0, 2**63, 5000)]
    with Journal(dest, {"path": "str", "error": "str"}, "model", []) as journal:
        with full_disk(10 * ROOM):
            journal.append(pd.DataFrame({"path": names, "error": None}))
        journal.finish()


def _grid(dest: Path) -> None:
    grid = Grid(UTKFACE)
    grid.pictures, grid.titles = [PIXELS], [("", False)]
    grid.write(dest)


TINY = ["--model.trunk=test_resnet", "--name=tiny", "--data.root=synthetic:60", "--data.image_size=64"]
TINY += ["--data.batch_size=8", "--data.num_workers=0", "--trainer.accelerator=cpu"]
TINY += ["--trainer.precision=32-true"]
PIXELS = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
WRITERS: dict[str, Callable[[Path], Any]] = {
    "best.ckpt": lambda dest: write_checkpoint(TENSORS, dest),
    "last.ckpt": lambda dest: WholeCheckpointIO().save_checkpoint(TENSORS, dest),
    "config.yaml": lambda dest: run.write_config(dest.parent, "a: b\n" * ROOM),
    "metrics.json": lambda dest: run.write_results(dest.parent, {str(n): n for n in range(ROOM)}, FACES[:1], UTKFACE),
    "predictions.parquet": lambda dest: run.write_results(dest.parent, {}, FACES, UTKFACE),
    "faces.parquet": lambda dest: run.write_faces(dest.parent, FACES, FACES[:0], FACES[:0], UTKFACE),
    "rejects.csv": lambda dest: run.write_faces(dest.parent, FACES[:1], FACES, FACES[:0], UTKFACE),
    "unread_labels.csv": lambda dest: run.write_faces(dest.parent, FACES[:1], FACES[:0], FACES, UTKFACE),
    "suspects.csv": lambda dest: run.write_suspects(dest.parent, FACES),
    "features.safetensors": lambda dest: write_features(dest, "key", TENSORS["a"], "torch"),
    "trunk.safetensors": lambda dest: save_trunk(dest, TENSORS, {}),
    "grid.png": _grid,
    "report.html": lambda dest: write_page(dest, "title " * ROOM, []),
    "face.jpg": lambda dest: save(dest, PIXELS),
    "out.csv": _journal,
    "out.jsonl": _journal,
    "out.parquet": _journal,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_a_line_and_leaves_the_file_before(name: str, tmp_path: Path) -> None:
    dest = tmp_path / name
    if name == "face.jpg":
        save(dest, PIXELS[:8, :8])  # other files are no pictures to replace
    else:
        dest.write_text("before")
    before = dest.read_bytes()
    with pytest.raises(UserError) as caught, full_disk():
        WRITERS[name](dest)
    assert re.fullmatch(
        rf"Can't write {re.escape(str(dest))}: .*File too large.*; free some space .*", str(caught.value)
    )
    assert dest.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def interrupting(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal that raises KeyboardInterrupt, whatever a shell has made of it where it started the tests."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_a_checkpoint_is_written_to_its_end_before_the_command_is_interrupted(
    interrupting: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {f"tensor {number}": torch.full((300,), float(number)) for number in range(20)}
    write, opened, whole = io.BufferedWriter.write, Path.open, tmp_path / "whole.ckpt"
    write_checkpoint(content, whole)
    writes = 0

    class Stream(io.BufferedWriter):
        def write(self, data: Any) -> int:
            nonlocal writes
            writes += 1
            if writes == interrupted:
                signal.raise_signal(interrupting)
            return write(self, data)

    def open_path(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return Stream(io.FileIO(path, mode)) if mode == "wb" else opened(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", open_path)
    interrupted = 0
    write_checkpoint(content, tmp_path / "counted.ckpt")
    for interrupted in range(1, writes + 1):
        writes, path = 0, tmp_path / f"{interrupted}.ckpt"
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(content, path)
        assert path.read_bytes() == whole.read_bytes()
    assert signal.getsignal(interrupting) is signal.default_int_handler
    assert not list(tmp_path.glob(".*"))


def test_metrics_are_logged_to_their_end_before_the_command_is_interrupted(
    interrupting: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, notify, woken = create_logger(str(tmp_path), "run"), threading.Condition.notify, []
    assert logger.experiment

    def interrupted(condition: threading.Condition, n: int = 1) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(interrupting)
            woken.append(condition)
        notify(condition, n)

    monkeypatch.setattr(threading.Condition, "notify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        logger.log_metrics({"loss": 1.0}, 1)
    monkeypatch.undo()
    assert woken  # TensorBoard's thread
    logger.finalize("success")


def test_a_journal_that_finds_no_room_goes_on_when_there_is_some(tmp_path: Path) -> None:
    out, columns = tmp_path / "out.csv", {"path": "str", "error": "str"}
    rows = [pd.DataFrame({"path": [f"{part}/{n}.jpg" for n in range(50)], "error": None}) for part in range(3)]
    with full_disk(4000), Journal(out, columns, "model", []) as journal:
        journal.append(rows[0])
        with pytest.raises(UserError, match="File too large; free some space and continue with --resume"):
            journal.append(pd.concat(rows[1:]))
    assert journal_of(out).stat().st_size == 4000
    with Journal(out, columns, "model", []) as journal:
        assert 50 < journal.rows < 150
        everything = pd.concat(rows)
        journal.append(everything[journal.rows :])
        journal.finish()
    assert pd.read_csv(out)["path"].tolist() == everything["path"].tolist()


def test_what_a_disk_says_late_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="quota"), replacing(tmp_path / "a") as part:
        part.write_text("text")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [250, 255, 300])
def test_long_names(length: int, tmp_path: Path) -> None:
    dest = tmp_path / ("a" * length)
    if length <= 255:
        with replacing(dest) as part:
            part.write_text("text")
        assert dest.read_text() == "text"
    else:
        with pytest.raises(UserError, match="File name too long"), replacing(dest):
            pass


def _be_killed_writing(dest: str) -> None:
    with replacing(Path(dest)):
        os._exit(1)  # as SIGKILL ends it


@pytest.mark.parametrize("name", ["out.csv", "a[1].csv", "x" * 40, "run/checkpoints/best.ckpt", f"run/{'x' * 50}.jpg"])
def test_what_a_killed_process_half_wrote_is_removed(name: str, tmp_path: Path) -> None:
    dest = tmp_path / name
    dest.parent.mkdir(parents=True, exist_ok=True)
    theirs = tmp_path / ".other.csv.abcdefgh.part"
    theirs.touch()
    dest.touch()
    process = get_context("fork").Process(target=_be_killed_writing, args=(str(dest),))
    process.start()
    process.join()
    assert len(list(tmp_path.rglob(".*.part"))) == 2
    remove_parts(dest if dest.parent == tmp_path else tmp_path / "run")
    assert list(tmp_path.rglob(".*.part")) == [theirs]
    assert dest.exists()


def test_half_written_files_of_names_that_are_cut_are_left(tmp_path: Path) -> None:
    theirs = tmp_path / f".{'x' * 40}.abcdefgh.part"  # perhaps of another file whose name begins so
    theirs.touch()
    remove_parts(tmp_path / ("x" * 50))
    assert theirs.exists()


def test_runs_that_start_at_once_have_their_own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version_3").mkdir()
    listed = Path.glob

    def listed_before_another_run_claims(*args: Any) -> list[Path]:
        found = list(listed(*args))
        (tmp_path / "version_4").mkdir()
        return found

    monkeypatch.setattr(Path, "glob", listed_before_another_run_claims)
    assert claim_version(tmp_path) == "version_5"
    monkeypatch.undo()
    assert claim_version(tmp_path) == "version_6"
    assert claim_version(tmp_path / "new") == "version_0"


def _hold(lock: str, is_held: Any, may_end: Any) -> None:
    with locked(Path(lock), "out.csv"):
        is_held.set()
        may_end.wait(60)
        os._exit(1)  # as SIGKILL ends it


def test_a_lock_is_one_process_s_until_it_ends(tmp_path: Path) -> None:
    lock, context = tmp_path / "out.csv.lock", get_context("fork")
    is_held, may_end = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(lock), is_held, may_end))
    process.start()
    is_held.wait(60)
    says = rf"one that writes out\.csv, but process {process.pid} on .* does, as .*lock"
    with pytest.raises(UserError, match=says), locked(lock, "out.csv"):
        pass
    may_end.set()
    process.join()
    assert lock.exists()  # of a process that is no more
    with locked(lock, "out.csv"):
        assert json.loads(lock.read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


OWN = {"machine": socket.gethostname(), "process": os.getpid()}


@pytest.mark.parametrize(
    ("content", "taken"),
    [
        (json.dumps({**OWN, "started": 1}), True),  # the number was given again
        (json.dumps({**OWN, "process": 2**22 + 1, "started": 1}), True),  # more than Linux gives
        (json.dumps({**OWN, "machine": "another", "process": 2**22 + 1, "started": 1}), False),
        (json.dumps(OWN), False),
        (json.dumps({**OWN, "process": "x"}), False),
        ("", False),
        ("[]", False),
        ("\xff", False),
    ],
    ids=range(8),  # since each process of pytest has a number of its own
)
def test_locks_of_ended_processes_are_taken_over(content: str, taken: bool, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text(content, encoding="latin-1")
    if taken:
        with locked(lock, "out.csv"):
            assert json.loads(lock.read_text())["started"] > 1
        assert not list(tmp_path.iterdir())
    else:
        with pytest.raises(UserError, match="delete that file if there is no such process"), locked(lock, "out.csv"):
            pass
        assert lock.read_text(encoding="latin-1") == content


def _predict(folder: Path) -> None:
    (folder / "best.ckpt").touch()
    predict.main([str(folder / "best.ckpt"), "synthetic:5", "--out", str(folder / "out.csv")])


def _fit(folder: Path) -> None:
    fit.main([*TINY, "--trainer.logger=false", f"--trainer.default_root_dir={folder}"])


def _crop(folder: Path) -> None:
    PIL.Image.fromarray(PIXELS).save(folder / "1_0_0_1.jpg")
    (folder / "out").mkdir()
    lock, place = folder / "crop.lock", folder / "out/crop.lock"
    lock.rename(place)
    (folder / "out/crop.json").write_text("{}")
    try:
        with patch.object(crop, "_begin"):
            crop.main([str(folder), str(folder / "out")])
    finally:
        place.rename(lock)


@pytest.mark.parametrize(
    ("act", "name"), [(_predict, "out.csv.lock"), (_fit, run.LOCK), (_crop, crop.LOCK)], ids=["predict", "fit", "crop"]
)
def test_commands_do_not_write_what_another_process_writes(
    act: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    theirs = json.dumps({**OWN, "machine": "another"})
    (tmp_path / name).write_text(theirs)
    with pytest.raises(UserError, match=r"process \d+ on another does"):
        act(tmp_path)
    assert (tmp_path / name).read_text() == theirs
    assert not [each for each in tmp_path.rglob("*") if each.suffix in (".csv", ".jsonl", ".parquet", ".yaml")]


def test_a_lock_that_was_taken_over_meanwhile_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, theirs = tmp_path / "lock", json.dumps({**OWN, "machine": "another"})
    lock.write_text(json.dumps({**OWN, "started": 1}))
    rename = Path.rename

    def later(self: Path, target: Path) -> Path:
        if self == lock:
            lock.write_text(theirs)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", later)
    with pytest.raises(UserError, match=r"process .* on another does"), locked(lock, "out.csv"):
        pass
    assert lock.read_text() == theirs


def test_inputs_are_no_outputs(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "hard").hardlink_to(tmp_path / "a")
    for name in ("a", "link", "hard", "x/../a"):
        with pytest.raises(UserError, match="name another"):
            check_no_input(tmp_path / name, ["missing", tmp_path / "a"])
    check_no_input(tmp_path / "b", ["missing", tmp_path / "a", "a" * 300])


@pytest.mark.parametrize("name", ["1.jpg", "1.png", "out.csv"])
def test_pictures_replace_pictures_only(name: str, tmp_path: Path) -> None:
    dest = tmp_path / name
    PIL.Image.fromarray(PIXELS[:8, :8]).save(dest, "PNG" if name == "1.png" else "JPEG")
    before = dest.read_bytes()
    for write in (lambda: save(dest, PIXELS), lambda: check_replaceable(dest)):
        with pytest.raises(UserError, match="may be one; name another"):
            write()
    assert dest.read_bytes() == before
    dest.unlink()
    if name == "1.png":
        _grid(dest)
    else:
        save(dest, PIXELS)
    check_replaceable(dest)


def test_a_resumed_run_writes_no_pictures_among_photos(tmp_path: Path) -> None:
    (tmp_path / "photos/old").mkdir(parents=True)
    (tmp_path / "photos/1.jpg").touch()
    for inputs in (["photos"], ["photos/1.jpg"], ["other", "photos/old"]):
        with pytest.raises(UserError, match="is an input; name another"):
            check_folder("--crops", tmp_path / "photos", True, [str(tmp_path / each) for each in inputs])
    check_folder("--crops", tmp_path / "photos", True, [str(tmp_path / "other")])


def _start_fit(folder: Path) -> subprocess.Popen[bytes]:
    # a shell may have started the tests in the background, where Ctrl-C is ignored, and children inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-m", "facecls.fit", *TINY, "--trainer.max_epochs=1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder)
    signal.signal(signal.SIGINT, before)
    return process


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_is_saved_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``fit 2>&1 | tee log``, where Ctrl-C ends tee first, or ``| head``."""
    process = _start_fit(tmp_path)
    assert process.stdout is not None
    lines = []
    while not lines or not lines[-1].startswith(b"epoch 1/"):
        lines.append(process.stdout.readline())
        assert lines[-1], b"".join(lines).decode()
    process.stdout.close()
    last = tmp_path / "runs/tiny/version_0" / run.LAST_CHECKPOINT
    before = last.stat().st_mtime_ns
    while last.stat().st_mtime_ns == before:  # training goes on
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    stopped = torch.load(last, weights_only=True)
    assert stopped["epoch"] >= 1
    assert not (tmp_path / "runs/tiny/version_0" / run.LOCK).exists()
    epochs = stopped["epoch"] + 2
    monkeypatch.chdir(tmp_path)
    without_drawing(monkeypatch)
    fit.main([*TINY, f"--trainer.max_epochs={epochs}", f"--ckpt_path={last}"])
    assert torch.load(last, weights_only=True)["epoch"] == epochs - 1
    assert (tmp_path / "runs/tiny/version_0" / run.METRICS).is_file()
