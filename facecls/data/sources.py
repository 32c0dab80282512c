"""Faces from anywhere: a folder, an archive, a manifest or a drawing, as one stream of records."""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from facecls.data import manifests
from facecls.data.archives import Read, archive_members
from facecls.data.folders import expanded, file_bytes, files_below
from facecls.data.manifests import open_manifest
from facecls.data.tasks import Tasks
from facecls.errors import UserError
from facecls.files import NOT_REGULAR

ACCEPTED = "a folder, a .tar, .tar.gz, .tgz or .zip, a .csv, .tsv, .txt or .parquet manifest, or synthetic:N"
"""What ``open_source`` reads, in words."""

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
_CLUTTER = (".ds_store", "thumbs.db", "desktop.ini")
_OTHER_ARCHIVES = (".7z", ".rar")
_NO_LABELS: Mapping[str, str] = MappingProxyType({})


Root = str | Path | Sequence[str | Path]
"""One source of faces or several."""


class Record(NamedTuple):
    """One file of a source, which need not be an image.

    Attributes:
        path: Relative to the folder, within the archive (with forward slashes), or as the manifest has it.
        read: Returns the file's bytes or raises ``UnreadableError``. A member of an archive must be read before the
            next record is asked for; other files can be read at any time and in any thread.
        labels: Texts as people wrote them, by task, where the source has a column for it; file names are not parsed.
        split: What a column ``split`` says; ``None`` without one.
    """

    path: str
    read: Read
    labels: Mapping[str, str] = _NO_LABELS
    split: str | None = None


def open_source(path: str | Path, tasks: Tasks = MappingProxyType({}), seed: int = 0) -> Iterator[Record]:
    """Opens a source of faces; memory does not grow with its size.

    Args:
        path: A folder (searched with its subfolders and the archives in them, sorted by path), a ``.tar``, ``.tar.gz``,
            ``.tgz`` or ``.zip`` archive (read in place), a ``.csv``, ``.tsv``, ``.txt`` or ``.parquet`` manifest with a
            column ``path`` (``open_manifest``), or ``synthetic:N`` for N drawn faces.
        tasks: The tasks whose labels are read: from the columns of a manifest, and of drawn faces
            ``glasses``, drawn only if it is named.
        seed: Of drawn faces.

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
    place = expanded(path)
    mode = _mode(place)
    if stat.S_ISDIR(mode):
        return _in_folder(place)
    if not stat.S_ISREG(mode):
        raise UserError(f"Expected {ACCEPTED}, but {path} is {NOT_REGULAR}; copy it into a file.")
    if is_archive(place):
        return (Record(*member) for member in archive_members(place))
    if is_manifest(place):
        return (Record(*row) for row in open_manifest(place, tasks))
    if place.name.lower().endswith(_OTHER_ARCHIVES):
        raise UserError(f"Expected {ACCEPTED}, got {path}; unpack it first and name the folder.")
    raise UserError(f"Expected {ACCEPTED}, got {path}.")


def _mode(place: Path) -> int:
    try:
        return place.stat().st_mode
    except (FileNotFoundError, ValueError):
        raise UserError(f"Expected {ACCEPTED}, but there is nothing at {place}.") from None
    except OSError as error:  # such as a name that is too long
        raise UserError(f"Expected {ACCEPTED}, but {place} can't be opened: {error.strerror}.") from None


def roots_of(root: Root) -> list[str]:
    """The sources that ``data.root`` names."""
    return [str(root)] if isinstance(root, str | Path) else [str(each) for each in root]


def is_drawn(path: str | Path) -> bool:
    """Whether a source is drawn faces, ``synthetic:N``."""
    return str(path).startswith("synthetic:")


def is_archive(path: str | Path) -> bool:
    """Whether a file is an archive, by its name."""
    return str(path).lower().endswith(_ARCHIVES)


def is_manifest(path: str | Path) -> bool:
    """Whether a file is a manifest, by its name."""
    return str(path).lower().endswith(manifests.ENDINGS)


def is_clutter(path: str) -> bool:
    """Whether macOS or Windows left this file behind.

    Args:
        path: With forward slashes, as in an archive.

    Examples:
        >>> [is_clutter(path) for path in ("faces/1.jpg", "faces/._1.jpg", "__MACOSX/faces/1.jpg", "a/Thumbs.db")]
        [False, True, True, True]
    """
    parts = path.split("/")
    return parts[-1].startswith("._") or parts[-1].lower() in _CLUTTER or "__MACOSX" in parts


def _drawn(count: str, seed: int, glasses: bool) -> Iterator[Record]:
    from facecls.data.synthetic import draw_faces, wears_glasses

    if not (count.isascii() and count.isdigit() and int(count)):
        raise UserError(f"Expected synthetic:N with a whole number N from 1 up, got synthetic:{count}.")
    for index, (name, encoded) in enumerate(draw_faces(int(count), seed, glasses=glasses)):
        labels = {"glasses": "with" if wears_glasses(seed, index) else "without"} if glasses else _NO_LABELS
        yield Record(name, partial(bytes, encoded), labels)


def _in_folder(folder: Path) -> Iterator[Record]:
    """The files below a folder; for an archive its members."""
    for path, problem in files_below(folder):
        if problem is not None:
            raise UserError(f"Can't read {folder / path}: {problem.strerror}; make it readable.")
        if is_archive(path):
            yield from (Record(f"{path}/{name}", read) for name, read in archive_members(folder / path))
        else:
            yield Record(path, partial(file_bytes, folder / path))


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
