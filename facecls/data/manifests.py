"""Manifests: tables that list images with their labels, as people write them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import pandas as pd

from facecls.data.archives import Read, UnreadableError
from facecls.data.columns import describe, stream_columns
from facecls.data.folders import file_bytes, files_below
from facecls.data.parsing import UNKNOWN
from facecls.data.tasks import Age, Task, Tasks

ENDINGS = (".csv", ".tsv", ".parquet", ".txt")
_ADIENCE = ("user_id", "original_image", "face_id")
"""Columns of Adience's fold files (Eidinger et al. 2014), which together say where a face lies."""
_ADIENCE_PATHS = {"faces": "coarse_tilt_aligned_face", "aligned": "landmark_aligned_face"}
"""Adience's folders, and how the names of the images in them begin."""
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What people call the parts, in lower case."""


class Row(NamedTuple):
    """One row of a manifest.

    Attributes:
        path: As the manifest has it.
        read: Returns the bytes of its file, at any time and in any thread, or raises ``UnreadableError``.
        labels: Texts as people wrote them, by task, where there is a column.
        split: ``train``, ``val`` or ``test``, or any other text; ``None`` without a column.
    """

    path: str
    read: Read
    labels: Mapping[str, str]
    split: str | None


def label_columns(tasks: Tasks) -> list[str]:
    """The columns of a manifest that can hold labels: those of each task, ranges of ages included."""
    return [column for task in tasks.values() for column in task.columns]


def open_manifest(manifest: Path, tasks: Tasks) -> Iterator[Row]:
    """Reads a manifest row by row.

    A path is absolute, or relative to the manifest's folder; backslashes may divide it. An absolute path that leads
    nowhere, as one of another machine does, stands for the file below the manifest's folder whose path has the longest
    ending in common with it, if there is one such file and, where only its name is the same, one such row.

    Args:
        manifest: Its path.
        tasks: The tasks whose labels are read.

    Yields:
        Its rows.

    Raises:
        UserError: If it can't be read or lacks a path.
    """
    files = _Files(manifest)
    for rows in stream_rows(manifest, tasks):
        columns = {name: rows[name].tolist() for name in tasks if name in rows}
        splits = rows["split"].tolist() if "split" in rows else [None] * len(rows)
        labels = zip(*columns.values(), strict=True) if columns else [()] * len(rows)
        for path, own, split in zip(rows["path"].tolist(), labels, splits, strict=True):
            yield Row(path, partial(files.read, path), dict(zip(columns, own, strict=True)), split)


def stream_rows(manifest: Path, tasks: Tasks) -> Iterator[pd.DataFrame]:
    """Reads path, labels and split of a manifest, some rows at a time.

    Args:
        manifest: Its path.
        tasks: The tasks whose labels are read.

    Yields:
        Successive rows, all columns str: ``path``; by name of the task its labels, where there is a column; ``split``
        if there is one, in the words of this project where they are known. First a frame without rows.

    Raises:
        UserError: If it can't be read or lacks a path.
    """
    for rows in stream_columns(manifest, [], _wanted(tasks)):
        if "path" not in rows:
            if not set(_ADIENCE) <= set(rows):
                next(stream_columns(manifest, ["path"]))  # says what is missing
            rows["path"] = _adience_paths(rows, manifest.parent)
        labels = {name: texts for name, task in tasks.items() if (texts := _label_texts(rows, task)) is not None}
        frame = pd.DataFrame({"path": rows["path"], **labels})
        if "split" in rows:
            frame["split"] = rows["split"].map(lambda text: _SPLITS.get(text.lower(), text)).astype("str")
        yield frame


def describe_manifest(manifest: Path, tasks: Tasks) -> str:
    """Says how a manifest is read, in one line.

    Args:
        manifest: Its path.
        tasks: The tasks whose labels are read.

    Raises:
        UserError: If it can't be read.
    """
    return describe(manifest, _wanted(tasks))


def _wanted(tasks: Tasks) -> list[str]:
    return ["path", *label_columns(tasks), "split", *_ADIENCE]


def _adience_paths(rows: pd.DataFrame, folder: Path) -> "pd.Series[str]":
    inside = next((name for name in _ADIENCE_PATHS if (folder / name).is_dir()), "faces")
    start = f"/{_ADIENCE_PATHS[inside]}."
    return f"{inside}/" + rows["user_id"] + start + rows["face_id"] + "." + rows["original_image"]


def _label_texts(rows: pd.DataFrame, task: Task) -> "pd.Series[str] | None":
    """The labels of a task; an age that is not known gives way to the range in two columns of its own."""
    texts = rows.get(task.name)
    if isinstance(task, Age) and rows.columns.isin(task.range).sum() == 2:
        # whole numbers with gaps are floats in Parquet files: 20.0
        first, last = (rows[end].str.replace(r"\.0*$", "", regex=True) for end in task.range)
        ranges = (first + "-" + last).mask(_are_unknown(first) & _are_unknown(last), "")
        texts = ranges if texts is None else texts.mask(_are_unknown(texts), ranges)
    return texts


def _are_unknown(texts: "pd.Series[str]") -> "pd.Series[bool]":
    return texts.str.lower().isin(UNKNOWN)


class _Files:
    """The files that a manifest lists.

    Args:
        manifest: Its path.
    """

    def __init__(self, manifest: Path) -> None:
        self.manifest = manifest
        self.folder = manifest.parent

    def read(self, path: str) -> bytes:
        """Returns the bytes of a file, or raises ``UnreadableError``."""
        if not path:
            raise UnreadableError("no path")
        return file_bytes(self._find(path))

    def _find(self, path: str) -> Path:
        file = self.folder / path
        if _exists(file):
            return file
        divided = PureWindowsPath(path)  # which knows both kinds of slashes
        if not divided.anchor:
            return self.folder / divided.as_posix()
        return self._by_ending(divided.parts[1:]) or file

    def _by_ending(self, parts: tuple[str, ...]) -> Path | None:
        """The file whose path has the longest ending in common with the parts of another.

        A name alone is enough if no other row of the manifest has it, and so is a path as long as the file's own.
        """
        if not parts:
            return None
        common = {file: _common_ending(tuple(file.split("/")), parts) for file in self._by_name.get(parts[-1], ())}
        longest = [file for file, length in common.items() if length == max(common.values())]
        if len(longest) > 1:
            raise UnreadableError(f"missing file, and {len(longest)} files have the same ending")
        if not longest or (common[longest[0]] == 1 and "/" in longest[0] and parts[-1] in self._repeated_names):
            return None
        return self.folder / longest[0]

    @cached_property
    def _repeated_names(self) -> frozenset[str]:
        """File names that several rows of the manifest have."""
        paths = (path for rows in stream_rows(self.manifest, {}) for path in rows["path"].tolist())
        counts = Counter(PureWindowsPath(path).name for path in paths)
        return frozenset(name for name, count in counts.items() if count > 1)

    @cached_property
    def _by_name(self) -> Mapping[str, list[str]]:
        named: dict[str, list[str]] = {}
        for path, error in files_below(self.folder):
            if error is None:
                named.setdefault(path.rpartition("/")[2], []).append(path)
        return named


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except (OSError, ValueError):  # too long a name, or a zero byte in it
        return False


def _common_ending(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    count = 0
    for mine, its in zip(reversed(one), reversed(other), strict=False):
        if mine != its:
            break
        count += 1
    return count
