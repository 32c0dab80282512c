"""Faces from anywhere: a folder, an archive, a manifest or a drawing, as one stream of records."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, NoReturn

import pandas as pd

from facecls.data.archives import Read, UnreadableError, archive_members
from facecls.data.columns import stream_columns
from facecls.data.tasks import UNKNOWN, Age, Task, Tasks
from facecls.errors import UserError

ACCEPTED = "a folder, a .tar, .tar.gz, .tgz or .zip, a .csv or .parquet manifest, or synthetic:N"
"""What ``open_source`` reads, in words."""

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
_MANIFESTS = (".csv", ".parquet")
_NO_LABELS: Mapping[str, str] = MappingProxyType({})


class Record(NamedTuple):
    """One file of a source, which need not be an image.

    Attributes:
        path: Relative to the folder, within the archive, or as the manifest has it.
        read: Returns the file's bytes or raises ``UnreadableError``. A member of an archive must be read before the
            next record is asked for; other files can be read at any time and in any thread.
        labels: Texts as people wrote them, by task, where the source has a column for it; file names are not parsed.
        split: What a column ``split`` says; ``None`` without one.
    """

    path: str
    read: Read
    labels: Mapping[str, str] = _NO_LABELS
    split: str | None = None


def open_source(
    path: str | Path, tasks: Tasks = MappingProxyType({}), seed: int = 0, skip_unreadable: bool = False
) -> Iterator[Record]:
    """Opens a source of faces; memory does not grow with its size.

    Args:
        path: A folder (searched with its subfolders, sorted by path), a ``.tar``, ``.tar.gz``, ``.tgz`` or ``.zip``
            archive (read in place), a ``.csv`` or ``.parquet`` manifest with a column ``path`` (absolute, or relative
            to the manifest's folder), or ``synthetic:N`` for N drawn faces.
        tasks: The tasks whose labels are read: from the columns of a manifest (``label_columns``), and of drawn faces
            ``glasses``, drawn only if it is named.
        seed: Of drawn faces.
        skip_unreadable: Whether a folder that can't be listed is a record that can't be read, rather than an error.

    Yields:
        The files, in the order of the source.

    Raises:
        UserError: If there is nothing at ``path``, it is no such source, or it can't be read.

    Examples:
        >>> from facecls.data.tasks import create_tasks
        >>> tasks = create_tasks({"glasses": {"classes": ["without", "with"]}})
        >>> record = next(open_source("synthetic:3", tasks))
        >>> record.path, record.labels["glasses"], len(record.read()) > 1000
        ('30_0_0_20170101000000785.jpg.chip.jpg', 'with', True)
    """
    if is_drawn(path):
        return _drawn(str(path).partition(":")[2], seed, "glasses" in tasks)
    place = Path(path).expanduser()
    if place.is_dir():
        return _in_folder(place, skip_unreadable)
    if not place.exists():
        raise UserError(f"Expected {ACCEPTED}, but there is nothing at {path}.")
    if is_archive(place):
        return (Record(*member) for member in archive_members(place))
    if is_manifest(place):
        return _in_manifest(place, tasks)
    raise UserError(f"Expected {ACCEPTED}, got {path}.")


def is_drawn(path: str | Path) -> bool:
    """Whether a source is drawn faces, ``synthetic:N``."""
    return str(path).startswith("synthetic:")


def is_archive(path: str | Path) -> bool:
    """Whether a file is an archive, by its name."""
    return str(path).lower().endswith(_ARCHIVES)


def is_manifest(path: str | Path) -> bool:
    """Whether a file is a manifest, by its name."""
    return str(path).lower().endswith(_MANIFESTS)


def label_columns(tasks: Tasks) -> list[str]:
    """The columns of a manifest that can hold labels: those of each task, ranges of ages included."""
    return [column for task in tasks.values() for column in task.columns]


def is_clutter(path: str) -> bool:
    """Whether macOS left this file behind.

    Args:
        path: With forward slashes, as in an archive.

    Examples:
        >>> [is_clutter(path) for path in ("faces/1.jpg", "faces/._1.jpg", "__MACOSX/faces/1.jpg", ".DS_Store")]
        [False, True, True, True]
    """
    parts = path.split("/")
    return parts[-1].startswith("._") or parts[-1] == ".DS_Store" or "__MACOSX" in parts


def file_bytes(file: Path) -> bytes:
    """Reads a file on disk.

    Raises:
        UnreadableError: If it can't be read.
    """
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise UnreadableError("missing file") from None
    except OSError as error:
        raise UnreadableError(f"unreadable ({error.strerror})") from None
    except ValueError:  # a path with a zero byte in it
        raise UnreadableError("missing file") from None


def _drawn(count: str, seed: int, glasses: bool) -> Iterator[Record]:
    from facecls.data.synthetic import draw_faces, wears_glasses

    if not (count.isascii() and count.isdigit() and int(count)):
        raise UserError(f"Expected synthetic:N with a whole number N from 1 up, got synthetic:{count}.")
    for index, (name, encoded) in enumerate(draw_faces(int(count), seed, glasses=glasses)):
        labels = {"glasses": "with" if wears_glasses(seed, index) else "without"} if glasses else _NO_LABELS
        yield Record(name, partial(bytes, encoded), labels)


def _in_folder(folder: Path, skip_unreadable: bool) -> Iterator[Record]:
    for path, error in _walk(folder, "", set()):
        if error is None:
            yield Record(path, partial(file_bytes, folder / path))
        elif skip_unreadable:
            yield Record(path, partial(_fail, f"unreadable ({error.strerror})"))
        else:
            raise UserError(f"Can't read {folder / path}: {error.strerror}; make it readable.")


def _walk(folder: Path, prefix: str, seen: set[Path]) -> Iterator[tuple[str, OSError | None]]:
    """Regular files below a folder, sorted by path as text; linked folders too, but each folder once.

    Only the names in one folder and in those above it are held at a time. A folder that can't be listed comes with
    its error.
    """
    if (real := folder.resolve()) in seen:
        return
    seen.add(real)
    try:
        with os.scandir(folder) as entries:
            # with its slash a folder stands where its files' paths belong: a-b/1 < a.jpg < a/1
            names = sorted(e.name + "/" * e.is_dir() for e in entries if e.is_dir() or e.is_file())
    except OSError as error:
        yield prefix.removesuffix("/"), error
        return
    for name in names:
        if name.endswith("/"):
            yield from _walk(folder / name, prefix + name, seen)
        else:
            yield prefix + name, None


def _in_manifest(manifest: Path, tasks: Tasks) -> Iterator[Record]:
    folder = manifest.parent
    for rows in stream_columns(manifest, ["path"], [*label_columns(tasks), "split"]):
        columns = {name: texts for name, task in tasks.items() if (texts := _label_texts(rows, task)) is not None}
        splits = rows["split"].tolist() if "split" in rows else [None] * len(rows)
        labels = zip(*columns.values(), strict=True) if columns else [()] * len(rows)
        for path, own, split in zip(rows["path"].tolist(), labels, splits, strict=True):
            read = partial(file_bytes, folder / path) if path else partial(_fail, "no path")
            yield Record(path, read, dict(zip(columns, own, strict=True)), split)


def _label_texts(rows: pd.DataFrame, task: Task) -> list[str] | None:
    """The labels of a task; an age that is not known gives way to the range in two columns of its own."""
    texts = rows.get(task.name)
    if isinstance(task, Age) and rows.columns.isin(task.range).sum() == 2:
        # whole numbers with gaps are floats in Parquet files: 20.0
        first, last = (rows[end].str.replace(r"\.0*$", "", regex=True) for end in task.range)
        ranges = (first + "-" + last).mask(_are_unknown(first) & _are_unknown(last), "")
        texts = ranges if texts is None else texts.mask(_are_unknown(texts), ranges)
    return None if texts is None else texts.tolist()


def _are_unknown(texts: pd.Series) -> pd.Series:
    return texts.str.lower().isin(UNKNOWN)


def _fail(reason: str) -> NoReturn:
    raise UnreadableError(reason)


@contextmanager
def quiet() -> Iterator[int]:
    """Silences libjpeg, libpng and OpenCV about damaged files; they write past ``sys.stderr``.

    Yields:
        A file descriptor of the real standard error, valid inside only.
    """
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield kept
    finally:
        os.dup2(kept, 2)
        os.close(kept)
