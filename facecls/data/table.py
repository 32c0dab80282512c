"""Faces on disk -> a table of faces, a table of rejects, and their images in memory."""

import hashlib
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

from facecls.data.archives import UnreadableError
from facecls.data.columns import CHUNK, read_columns
from facecls.data.parallel import in_order
from facecls.data.sources import Record, is_clutter, is_manifest, label_columns, open_source, quiet
from facecls.data.split import SPLITS
from facecls.data.store import ImageStore, why_unusable
from facecls.data.tasks import MISSING, LabelError, Tasks, ages, parse_name
from facecls.errors import UserError

_Parse = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True)
class Table:
    """What a source holds.

    Attributes:
        faces: One row per face: ``path`` (str, as ``Record.path``), the columns of each task (``Task.columns``, Int16
            with NA for a missing label; those of ranges only if a face has one), ``sha1`` (of the file's bytes,
            hexadecimal), and ``split`` (one of ``SPLITS``) if a manifest has it. Numbered from 0.
        rejects: One row for each file that is not used: ``path`` and ``reason``.
        store: The images; row ``i`` of ``faces`` is image ``i``.
    """

    faces: pd.DataFrame
    rejects: pd.DataFrame
    store: ImageStore


class _File(NamedTuple):
    """One file of a source: why it is rejected, or its labels by column and its bytes."""

    path: str
    reason: str | None = None
    labels: tuple[int, ...] = ()
    data: bytes = b""
    split: str | None = None


def read_table(root: str | Path, seed: int, tasks: Tasks) -> Table:
    """Reads all faces of a source: each file becomes a face, or a reject with its reason.

    Folders, archives and drawn faces carry labels of gender, race and age in UTKFace file names. A manifest carries
    labels in the columns of the tasks; each may be absent or have empty cells, and its file names are not parsed.

    Args:
        root: What ``open_source`` takes.
        seed: Of drawn faces.
        tasks: What faces are labelled with.

    Returns:
        The table, with at least one face; rows are in the order of the source.

    Raises:
        UserError: If there is nothing at ``root`` or nothing that can be read, or not one face in it.
    """
    with quiet():
        table = _collect(in_order(_inspect, _files(root, seed, tasks)), tasks)
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


def _files(root: str | Path, seed: int, tasks: Tasks) -> Iterator[_File]:
    parsers = {name: lru_cache(100_000)(task.parse) for name, task in tasks.items()}  # few of the texts differ
    records = open_source(root, tasks, seed)
    place = Path(root).expanduser()
    if is_manifest(place) and not place.is_dir():
        for record, reason in zip(records, _repeated(place, tasks), strict=True):
            yield _File(record.path, reason) if reason else _read(record, record.labels, parsers)
        return
    for record in records:
        try:
            if is_clutter(record.path):
                yield _File(record.path, "not an image")
            else:
                named = parse_name(record.path.rpartition("/")[2])
                yield _read(record, {**named, **record.labels}, parsers)
        except LabelError as error:
            yield _File(record.path, str(error))


def _read(record: Record, labels: Mapping[str, str], parsers: Mapping[str, _Parse]) -> _File:
    """Parses the labels and reads the file; a failure of either is a reject."""
    codes: tuple[int, ...] = ()
    try:
        for name, parse in parsers.items():
            codes += parse(labels.get(name, ""))
        return _File(record.path, None, codes, record.read(), record.split)
    except (LabelError, UnreadableError) as error:
        return _File(record.path, str(error))


def _repeated(manifest: Path, tasks: Tasks) -> list[str | None]:
    """Why each row is rejected (empty or repeated path), or ``None``."""
    rows = read_columns(manifest, ["path"], [*label_columns(tasks), "split"])
    if "split" in rows:
        _check_splits(rows["split"], manifest)
    reasons = np.full(len(rows), None, object)
    reasons[rows["path"].duplicated()] = "listed twice"
    differing = rows["path"][~rows.duplicated()]
    reasons[rows["path"].isin(differing[differing.duplicated()])] = "listed twice with different values"
    reasons[rows["path"] == ""] = "no path"
    return reasons.tolist()


def _check_splits(splits: pd.Series, manifest: Path) -> None:
    if empty := int((splits == "").sum()):
        raise UserError(f"Expected a split in every row of {manifest}, but {empty} of {len(splits)} have none.")
    if len(others := splits[~splits.isin(SPLITS)]):
        raise UserError(f"Expected {', '.join(SPLITS)} under split in {manifest}, got {others.iloc[0]!r}.")


def _inspect(file: _File) -> tuple[_File, str]:
    """Decodes a file that isn't rejected yet and returns it with its SHA-1, or with a reason."""
    if file.reason is None and (reason := why_unusable(file.data)):
        file = _File(file.path, reason)
    return file, hashlib.sha1(file.data).hexdigest()


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
            yield path, *file.labels, sha1, file.split

    labels = [column for task in tasks.values() for column in task.columns]
    faces = pd.concat(_frames(rows(), labels), ignore_index=True)
    faces[labels] = faces[labels].mask(faces[labels] == MISSING)
    unused = [end for task in ages(tasks.values()) for end in task.range] + ["split"]
    return Table(
        faces.drop(columns=[column for column in unused if faces[column].isna().all()]),
        pd.DataFrame(rejects, columns=["path", "reason"], dtype="str"),
        ImageStore(
            torch.frombuffer(images, dtype=torch.uint8) if images else torch.empty(0, dtype=torch.uint8),
            np.array(ends, np.int64),
        ),
    )


def _frames(rows: Iterator[tuple[str | int | None, ...]], labels: list[str]) -> Iterator[pd.DataFrame]:
    """Puts rows into columns, some at a time: a million take 100 MB there, and 300 as Python's own objects."""
    types = {"path": "str", **dict.fromkeys(labels, "Int16"), "sha1": "str", "split": "str"}
    yield pd.DataFrame(columns=list(types)).astype(types)
    while some := list(islice(rows, CHUNK)):
        yield pd.DataFrame(some, columns=list(types)).astype(types)
