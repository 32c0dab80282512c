"""Faces on disk -> a table of faces, a table of rejects, and their images in memory."""

import hashlib
import posixpath
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from facecls.data.archives import CUT_OFF, NO_END, UnreadableError
from facecls.data.columns import CHUNK
from facecls.data.file_names import parse_name, photo_of
from facecls.data.folders import expanded
from facecls.data.manifests import stream_rows
from facecls.data.parallel import in_order
from facecls.data.parsing import MISSING, LabelError
from facecls.data.sources import Record, Root, is_archive, is_clutter, is_manifest, open_source, quiet, roots_of
from facecls.data.split import SPLITS
from facecls.data.store import ImageStore, why_unusable
from facecls.data.tasks import Tasks, ages, classifications
from facecls.errors import UserError

SAME_PHOTO = "same photo as another"
"""Why a file is no face whose photo of UTKFace is another face already."""
_Parse = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True)
class Table:
    """What a source holds.

    Attributes:
        faces: One row per face: ``path`` (str, as ``Record.path``), the columns of each task (``Task.columns``, Int16
            with NA for a missing label; those of ranges only if a face has one), ``sha1`` (of the file's bytes,
            hexadecimal), and ``split`` (one of ``SPLITS``) if a manifest has it. Numbered from 0.
        rejects: One row for each file that is not used: ``path`` and ``reason``.
        unread: One row for each label of a face that is left out, since it is not one: ``path``, ``label`` (the name of
            the task), ``text`` and ``reason``.
        store: The images; row ``i`` of ``faces`` is image ``i``.
    """

    faces: pd.DataFrame
    rejects: pd.DataFrame
    unread: pd.DataFrame
    store: ImageStore


class _Unread(NamedTuple):
    """A label that is left out."""

    path: str
    label: str
    text: str
    reason: str


class _File(NamedTuple):
    """One file of a source: why it is rejected, or its labels by column and its bytes."""

    path: str
    reason: str | None = None
    labels: tuple[int, ...] = ()
    data: bytes = b""
    split: str | None = None
    unread: tuple[_Unread, ...] = ()
    photo: tuple[str, bool] | None = None


def read_table(root: Root, seed: int, tasks: Tasks) -> Table:
    """Reads all faces of one or several sources: each file becomes a face, or a reject with its reason.

    Folders, archives and drawn faces carry labels of gender, race and age in UTKFace file names; of several files that
    show one photo of UTKFace (``photo_of``) one is a face, an aligned one if there is any. A manifest carries labels in
    the columns of the tasks; each may be absent or have empty cells, and its file names are not parsed. A label that is
    none is left out; a face none of whose labels can be read is a reject.

    Args:
        root: What ``open_source`` takes, or several; then paths begin with the source's.
        seed: Of drawn faces.
        tasks: What faces are labelled with.

    Returns:
        The table, with at least one face; rows are in the order of the source.

    Raises:
        UserError: If there is nothing at ``root`` or nothing that can be read, or not one face in it.
    """
    roots = roots_of(root)
    where = ", ".join(roots)
    if not roots:
        raise UserError("Expected faces in data.root, but it is an empty list; name a folder, archive or manifest.")
    with quiet():
        files = (file for place in roots for file in _files(place, seed, tasks, is_only=len(roots) == 1))
        table = _collect(in_order(_inspect, files, held=lambda file: len(file.data)), tasks)
    if "split" in table.faces and table.faces["split"].isna().any():
        raise UserError(f"Expected a column split in all of {where} or in none, but some lack it; add or rename it.")
    if len(table.faces):
        return table
    if len(table.rejects):
        reason = table.rejects["reason"].mode().iloc[0]
        such = table.rejects["path"][table.rejects["reason"] == reason]
        raise UserError(
            f"Expected faces in {where}, but all {len(table.rejects)} files were rejected; commonest reason: {reason} "
            f"({len(such)}, such as {such.iloc[0]}); correct that, or name other faces."
        )
    raise UserError(f"Expected faces in {where}, but there is no file in it; name another place.")


def _files(root: str, seed: int, tasks: Tasks, is_only: bool) -> Iterator[_File]:
    place = expanded(root)
    parsers = {name: lru_cache(100_000)(task.parse) for name, task in tasks.items()}  # few of the texts differ
    records = open_source(root, tasks, seed)
    if is_manifest(place) and not place.is_dir():
        for record, reason in zip(records, _repeated(place, tasks), strict=True):
            own = record if is_only else record._replace(path=(place.parent / record.path).as_posix())
            yield _File(own.path, reason) if reason else _read(own, own.labels, parsers)
        return
    for record in records:
        own = record if is_only else record._replace(path=f"{root}/{record.path}")
        name = record.path.rpartition("/")[2]
        try:
            if is_clutter(record.path):
                yield _File(own.path, "not an image")
            elif name == NO_END:
                yield _File(own.path, CUT_OFF)
            elif is_archive(record.path):
                yield _File(own.path, "archive inside an archive")
            else:
                yield _read(own, {**parse_name(name), **record.labels}, parsers)._replace(photo=photo_of(name))
        except LabelError as error:
            yield _File(own.path, str(error))


def _read(record: Record, labels: Mapping[str, str], parsers: Mapping[str, _Parse]) -> _File:
    """Reads the file and parses its labels; it is a reject if that fails, or if no label of some can be parsed."""
    codes: tuple[int, ...] = ()
    unread: list[_Unread] = []
    for name, parse in parsers.items():
        text = labels.get(name, "")
        try:
            codes += parse(text)
        except LabelError as error:
            codes += parse("")
            unread.append(_Unread(record.path, name, text, str(error)))
    if unread and set(codes) == {MISSING}:
        return _File(record.path, unread[0].reason)
    try:
        return _File(record.path, None, codes, record.read(), record.split, tuple(unread))
    except UnreadableError as error:
        return _File(record.path, str(error))


def _repeated(manifest: Path, tasks: Tasks) -> list[str | None]:
    """Why each row is rejected (empty or repeated path), or ``None``."""
    rows = pd.concat(stream_rows(manifest, tasks), ignore_index=True)
    if "split" in rows:
        _check_splits(rows["split"], manifest)
    _check_codes(rows, tasks, manifest)
    rows["path"] = rows["path"].map(lambda path: posixpath.normpath(path.replace("\\", "/")) if path else "")
    reasons = np.full(len(rows), None, object)
    reasons[rows["path"].duplicated()] = "listed twice"
    differing = rows["path"][~rows.duplicated()]
    reasons[rows["path"].isin(differing[differing.duplicated()])] = "listed twice with different values"
    reasons[rows["path"] == ""] = "no path"
    return reasons.tolist()


def _check_splits(splits: pd.Series, manifest: Path) -> None:
    remedy = "correct the column, or leave it out for a split by data.val_fraction and data.test_fraction"
    if empty := int((splits == "").sum()):
        raise UserError(
            f"Expected a split in every row of {manifest}, but {empty} of {len(splits)} have none; {remedy}."
        )
    if len(others := splits[~splits.isin(SPLITS)]):
        raise UserError(
            f"Expected {', '.join(SPLITS)} under split in {manifest}, but got {others.iloc[0]!r}; {remedy}."
        )


def _check_codes(rows: pd.DataFrame, tasks: Tasks, manifest: Path) -> None:
    """Rejects a column in which most labels would be taken for others, and the last left out."""
    for task in classifications(tasks.values()):
        if task.name in rows and task.counts_from_one(rows[task.name].unique()):
            raise UserError(
                f"Expected {task.expected} under {task.name} in {manifest}, but its numbers run from 1 to "
                f"{len(task.classes)}; count them from 0, or write words."
            )


def _inspect(file: _File) -> tuple[_File, str]:
    """Decodes a file that isn't rejected yet and returns it with its SHA-1, or with a reason."""
    if file.reason is None and (reason := why_unusable(file.data)):
        file = _File(file.path, reason)
    return file, hashlib.sha1(file.data).hexdigest()


def _collect(inspected: Iterator[tuple[_File, str]], tasks: Tasks) -> Table:
    images, ends = bytearray(), array("q")
    rejects, unread = list[tuple[str, str]](), list[_Unread]()
    photos = _Photos()

    def rows() -> Iterator[tuple[str | int | None, ...]]:
        for file, sha1 in inspected:
            path = file.path.encode(errors="backslashreplace").decode()  # names on disk may hold bytes that are no text
            reason = file.reason or photos.why_left_out(file, len(ends))
            if reason is not None:
                rejects.append((path, reason))
                continue
            unread.extend(each._replace(path=path) for each in file.unread)
            images.extend(file.data)
            ends.append(len(images))
            yield path, *file.labels, sha1, file.split

    labels = [column for task in tasks.values() for column in task.columns]
    faces = pd.concat(_frames(rows(), labels), ignore_index=True)
    faces[labels] = faces[labels].mask(faces[labels] == MISSING)
    unused = [end for task in ages(tasks.values()) for end in task.range] + ["split"]
    store = ImageStore(
        torch.frombuffer(images, dtype=torch.uint8) if images else torch.empty(0, dtype=torch.uint8),
        np.array(ends, np.int64),
    )
    if photos.replaced:
        rejects += [(path, SAME_PHOTO) for path in faces.loc[photos.replaced, "path"]]
        faces, store = faces.drop(index=photos.replaced).reset_index(drop=True), store.without(photos.replaced)
    return Table(
        faces.drop(columns=[column for column in unused if faces[column].isna().all()]),
        pd.DataFrame(rejects, columns=["path", "reason"], dtype="str"),
        pd.DataFrame(unread, columns=_Unread._fields, dtype="str"),
        store,
    )


class _Photos:
    """The photos of UTKFace that were met, each of which is one face.

    Attributes:
        replaced: Rows whose photo came again, aligned.
    """

    def __init__(self) -> None:
        self.replaced: list[int] = []
        self._rows: dict[str, tuple[int, bool]] = {}

    def why_left_out(self, file: _File, row: int) -> str | None:
        """Says why a file that would be the next row is no face, if its photo is one already."""
        if file.photo is None:
            return None
        photo, is_aligned = file.photo
        earlier, was_aligned = self._rows.get(photo, (None, False))
        if earlier is not None:
            if was_aligned or not is_aligned:
                return SAME_PHOTO
            self.replaced.append(earlier)
        self._rows[photo] = row, is_aligned
        return None


def _frames(rows: Iterator[tuple[str | int | None, ...]], labels: list[str]) -> Iterator[pd.DataFrame]:
    """Puts rows into columns, some at a time: a million take 100 MB there, and 300 as Python's own objects."""
    types = {"path": "str", **dict.fromkeys(labels, "Int16"), "sha1": "str", "split": "str"}
    yield pd.DataFrame(columns=list(types)).astype(types)
    while some := list(islice(rows, CHUNK)):
        yield pd.DataFrame(some, columns=list(types)).astype(types)
