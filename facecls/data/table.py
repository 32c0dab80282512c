"""Faces on disk -> a table of faces, a table of rejects, and their images in memory."""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice, starmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from facecls.data.columns import CHUNK, read_columns
from facecls.data.parallel import in_order
from facecls.data.sources import Read, UnreadableError, file_bytes, is_clutter, quiet, tar_members, walk, zip_members
from facecls.data.split import SPLITS
from facecls.data.store import ImageStore, why_unusable
from facecls.data.tasks import MISSING, LabelError, Tasks, parse_name
from facecls.errors import UserError

ACCEPTED = "a folder, a .tar, .tar.gz, .tgz or .zip, a .csv or .parquet manifest, or synthetic:N"
"""What ``read_table`` reads, in words."""


@dataclass(frozen=True)
class Table:
    """What was found at a place.

    Attributes:
        faces: One row a face: ``path`` (str, as in the archive or manifest, or relative to the folder), ``age``
            (years), ``gender`` and ``race`` (codes; all three Int16 with NA for a missing label), ``sha1`` (of the
            file's bytes, hexadecimal), and ``split`` (one of ``SPLITS``) if a manifest gives it. Numbered from 0.
        rejects: One row for each file that is not used: ``path`` and ``reason``.
        store: The images; row ``i`` of ``faces`` is image ``i``.
    """

    faces: pd.DataFrame
    rejects: pd.DataFrame
    store: ImageStore


class _File(NamedTuple):
    """One file of a source: why it is rejected unseen, or its labels (``MISSING`` where there is none) and bytes."""

    path: str
    reason: str | None = None
    labels: Mapping[str, str] = {}
    data: bytes = b""
    split: str | None = None


def read_table(root: str | Path, seed: int, tasks: Tasks) -> Table:
    """Reads all faces of a place: each file becomes a face, or a reject with its reason.

    Folders, archives and drawn faces carry their labels in UTKFace file names. Manifests carry them in columns ``age``,
    ``gender`` and ``race``; each may be absent or have empty cells, and file names are not looked at then. The rows of
    ``faces`` are sorted by path for a folder, else in the order of the source.

    Args:
        root: A folder (searched with its subfolders), a ``.tar``, ``.tar.gz``, ``.tgz`` or ``.zip`` archive (nothing is
            unpacked to disk), a ``.csv`` or ``.parquet`` manifest with a ``path`` column (absolute, or relative to the
            manifest's folder), or ``synthetic:N`` for N drawn faces.
        seed: Of the drawn faces.
        tasks: What the faces are labelled with.

    Returns:
        The table, with one face at least.

    Raises:
        UserError: If there is nothing at ``root`` or nothing that can be read, or not one face in it.
    """
    try:
        with quiet():
            table = _collect(in_order(_inspect, _files(str(root), seed, tasks)), tasks)
    except OSError as error:
        raise UserError(f"Can't read {root}: {error}; make it readable.") from None
    if len(table.faces):
        return table
    if len(table.rejects):
        reason = table.rejects["reason"].mode().iloc[0]
        such = table.rejects["path"][table.rejects["reason"] == reason]
        raise UserError(
            f"Expected faces in {root}, but all {len(table.rejects)} files were rejected; commonest reason: {reason} "
            f"({len(such)}, such as {such.iloc[0]})."
        )
    raise UserError(f"Expected faces in {root}, but there is no file in it.")


def _files(root: str, seed: int, tasks: Tasks) -> Iterator[_File]:
    kind, _, count = root.partition(":")
    if kind == "synthetic":
        return _drawn(count, seed)
    source = Path(root).expanduser()
    if source.is_dir():
        return _in_folder(source)
    if not source.exists():
        raise UserError(f"Expected {ACCEPTED}, but there is nothing at {root}.")
    for endings, reader in _READERS.items():
        if source.name.lower().endswith(endings):
            return reader(source, tasks) if reader is _in_manifest else reader(source)
    raise UserError(f"Expected {ACCEPTED}, got {root}.")


def _drawn(count: str, seed: int) -> Iterator[_File]:
    from facecls.data.synthetic import draw_faces

    if not (count.isascii() and count.isdigit() and int(count)):
        raise UserError(f"Expected synthetic:N with a whole number N from 1 up, got synthetic:{count}.")
    for name, data in draw_faces(int(count), seed):
        yield _named(name, partial(bytes, data))


def _in_folder(folder: Path) -> Iterator[_File]:
    for path, error in walk(folder):
        if error is not None:
            raise error
        yield _named(path, partial(file_bytes, folder / path))


def _in_tar(archive: Path) -> Iterator[_File]:
    return starmap(_named, tar_members(archive))


def _in_zip(archive: Path) -> Iterator[_File]:
    return starmap(_named, zip_members(archive))


def _named(path: str, read: Read) -> _File:
    """A file whose name holds its labels; it is read only if the name is right."""
    if is_clutter(path):
        return _File(path, "not an image")
    try:
        return _File(path, None, parse_name(path.rpartition("/")[2]), read())
    except (LabelError, UnreadableError) as error:
        return _File(path, str(error))


def _in_manifest(manifest: Path, tasks: Tasks) -> Iterator[_File]:
    rows = read_columns(manifest, ["path"], [*tasks, "split"])
    reasons = np.full(len(rows), None, object)
    for task in tasks.values():
        if task.name in rows:
            for text in rows[task.name].unique():
                try:
                    task.parse(text)
                except LabelError as error:
                    reasons[rows[task.name] == text] = str(error)
    reasons[rows["path"].duplicated()] = "listed twice"
    differing = rows["path"][~rows.duplicated()]
    reasons[rows["path"].isin(differing[differing.duplicated()])] = "listed twice with different values"
    reasons[rows["path"] == ""] = "no path"
    splits = _checked_splits(rows["split"], manifest) if "split" in rows else [None] * len(rows)
    folder = manifest.parent
    labels: Any = rows[[name for name in tasks if name in rows]].to_dict("records")
    for path, reason, values, split in zip(rows["path"].tolist(), reasons, labels, splits, strict=True):
        yield _listed(folder, _File(path, reason, values, split=split))


def _checked_splits(splits: pd.Series, manifest: Path) -> list[str]:
    if empty := int((splits == "").sum()):
        raise UserError(f"Expected a split in every row of {manifest}, but {empty} of {len(splits)} have none.")
    if len(others := splits[~splits.isin(SPLITS)]):
        raise UserError(f"Expected {', '.join(SPLITS)} under split in {manifest}, got {others.iloc[0]!r}.")
    return list(splits)


def _listed(folder: Path, row: _File) -> _File:
    """Reads the image that a row of a manifest names."""
    if row.reason is not None:
        return row
    file = folder / row.path
    if not file.is_file():
        return row._replace(reason="missing file")
    try:
        return row._replace(data=file_bytes(file))
    except UnreadableError as error:
        return row._replace(reason=str(error))


_READERS: dict[tuple[str, ...], Callable[..., Iterator[_File]]] = {
    (".tar", ".tar.gz", ".tgz"): _in_tar,
    (".zip",): _in_zip,
    (".csv", ".parquet"): _in_manifest,
}


def _inspect(file: _File) -> tuple[_File, str]:
    """Looks into a file that isn't rejected yet: gives it with its SHA-1, or with a reason after all."""
    file = _with_reason(file)
    return file, hashlib.sha1(file.data).hexdigest()


def _with_reason(file: _File) -> _File:
    if file.reason is None and (reason := why_unusable(file.data)):
        return file._replace(reason=reason)
    return file


def _collect(inspected: Iterator[tuple[_File, str]], tasks: Tasks) -> Table:
    images, ends = bytearray(), array("q")
    rejects = list[tuple[str, str]]()

    def rows() -> Iterator[tuple[str | int | None, ...]]:
        for file, sha1 in inspected:
            path = file.path.encode(errors="backslashreplace").decode()  # names on disk may hold bytes that are no text
            if file.reason is not None:
                rejects.append((path, file.reason))
                continue
            images.extend(file.data)
            ends.append(len(images))
            values = [value for task in tasks.values() for value in task.parse(file.labels.get(task.name, ""))]
            yield path, *values, sha1, file.split

    columns = [column for task in tasks.values() for column in task.columns]
    faces = pd.concat(_frames(rows(), columns), ignore_index=True)
    for column in columns:
        faces[column] = faces[column].mask(faces[column] == MISSING)
        if column not in tasks and faces[column].isna().all():
            del faces[column]
    if faces["split"].isna().all():
        del faces["split"]
    return Table(
        faces,
        pd.DataFrame(rejects, columns=["path", "reason"], dtype="str"),
        ImageStore(
            torch.frombuffer(images, dtype=torch.uint8) if images else torch.empty(0, dtype=torch.uint8),
            np.array(ends, np.int64),
        ),
    )


def _frames(rows: Iterator[tuple[str | int | None, ...]], columns: list[str]) -> Iterator[pd.DataFrame]:
    """Puts rows into columns, some at a time: a million take 100 MB there, and 300 as Python's own objects."""
    types = {"path": "str", **dict.fromkeys(columns, "Int16"), "sha1": "str", "split": "str"}
    yield pd.DataFrame(columns=list(types)).astype(types)
    while some := list(islice(rows, CHUNK)):
        yield pd.DataFrame(some, columns=list(types)).astype(types)
