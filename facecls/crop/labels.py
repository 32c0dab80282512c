"""What is known of the faces in photos: the rows of a manifest that belong to them, or the labels in their names."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import NamedTuple

import numpy as np
import pandas as pd

from facecls.data.columns import read_all_columns
from facecls.data.file_names import parse_name
from facecls.data.parsing import UNKNOWN, LabelError
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError

NOT_LISTED = "not in the manifest"
"""Why no face is taken from a photo that no row belongs to."""
_BOX = ("x", "y", "width", "height")
"""Columns of a manifest that together say which face is meant, in pixels."""
Box = tuple[float, float, float, float]
"""x and y of the upper left corner, width and height, in pixels of the upright photo."""
_FAR = 1e6
"""Pixels; no photo has as many a side."""
_Parts = tuple[str, ...]
_TRIED = 2_000
"""Photos by which it is found out where the paths of a manifest begin."""


class LabelledFace(NamedTuple):
    """A face of a photo, as far as it is known.

    Attributes:
        labels: Texts by column.
        box: Where it is; ``None`` if that is not said.
    """

    labels: Mapping[str, str]
    box: Box | None = None


class NotMeantError(Exception):
    """No face of a photo is to be taken; the message is the reason."""


class NameLabels:
    """Labels in the file names of UTKFace; other photos have none.

    Attributes:
        columns: Names of the labels.
    """

    def __init__(self) -> None:
        self.columns = list(UTKFACE)

    def take(self, inside: str) -> list[LabelledFace]:
        """As ``ManifestLabels.take``, always one face."""
        try:
            return [LabelledFace(parse_name(PurePath(inside).name))]
        except LabelError:
            return [LabelledFace({})]

    def left(self) -> list[str]:
        """Nothing is listed."""
        return []


class ManifestLabels:
    """The rows of a manifest.

    Its paths may begin above or below the folder of the photos, and on another machine: what they have before or lack
    is the same for all of them, and is found out by the first photos.

    Args:
        manifest: Its path. Columns x, y, width and height are taken as a box if all are there.
        photos: Paths of photos relative to their folder or archive.
        root: That folder or archive.

    Attributes:
        columns: Names of the labels: all columns but path and box.
        has_boxes: Whether there are boxes.

    Raises:
        UserError: If it can't be read, lacks a path, has a box that is none, or may mean several folders.
    """

    def __init__(self, manifest: Path, photos: Iterable[str], root: Path) -> None:
        self._rows = read_all_columns(manifest, "path")
        self._paths = self._rows.pop("path").tolist()
        self._boxes = _take_boxes(self._rows, manifest)
        self.has_boxes = self._boxes is not None
        self.columns = [str(name) for name in self._rows]
        parts = [_parts(path) for path in self._paths]
        before, lacking = _beginning(parts, photos, root, manifest)
        self._by_photo: dict[_Parts, list[int]] = {}
        for row, own in enumerate(parts):
            if own[: len(before)] == before:
                self._by_photo.setdefault(lacking + own[len(before) :], []).append(row)
        self._is_left = np.ones(len(parts), bool)

    def take(self, inside: str) -> list[LabelledFace]:
        """The faces that are known in a photo, whose rows are not left any more.

        Args:
            inside: Its path, relative to the folder or archive of the photos.

        Returns:
            One or more faces.

        Raises:
            NotMeantError: If none of its faces shall be taken.
        """
        rows = self._by_photo.get(_parts(inside))
        if rows is None:
            raise NotMeantError(NOT_LISTED)
        self._is_left[rows] = False
        if len(rows) > 1 and any(self._box(row) is None for row in rows):
            raise NotMeantError("several rows of the manifest without a box")
        return [LabelledFace(self._labels(row), self._box(row)) for row in rows]

    def left(self) -> list[str]:
        """The paths whose photos were not asked for, as they are written."""
        return [self._paths[row] for row in np.flatnonzero(self._is_left)]

    def _labels(self, row: int) -> dict[str, str]:
        return {str(name): text for name, text in self._rows.iloc[row].items()}

    def _box(self, row: int) -> Box | None:
        if self._boxes is None or np.isnan(self._boxes[row]).any():
            return None
        x, y, width, height = self._boxes[row].tolist()
        return x, y, width, height


Labels = NameLabels | ManifestLabels


def _parts(path: str) -> _Parts:
    """The parts of a path, however it is divided and its letters are composed."""
    plain: list[str] = []
    for part in PureWindowsPath(unicodedata.normalize("NFC", path)).parts:  # which knows both kinds of slashes
        if part == ".." and plain:
            plain.pop()
        else:
            plain.append(part)
    return tuple(plain)


def _beginning(rows: Sequence[_Parts], photos: Iterable[str], root: Path, manifest: Path) -> tuple[_Parts, _Parts]:
    """What all rows have before the path of a photo, and what they lack of it, by a vote of photos.

    What ends as the folder of the photos is called goes first: in a manifest of ``train/1.jpg`` and ``val/1.jpg`` both
    would fit the photos in ``val``.
    """
    by_name: dict[str, list[_Parts]] = {}
    for row in set(rows):
        by_name.setdefault(row[-1] if row else "", []).append(row)
    votes: Counter[tuple[_Parts, _Parts]] = Counter()
    for photo, _ in zip(map(_parts, photos), range(_TRIED), strict=False):
        for row in by_name.get(photo[-1], ()):
            if row[-len(photo) :] == photo:
                votes[row[: -len(photo)], ()] += 1
            elif photo[-len(row) :] == row:
                votes[(), photo[: -len(row)]] += 1
    if not votes:
        return (), ()
    folder = _parts(root.absolute().as_posix())

    def rank(each: tuple[_Parts, _Parts]) -> tuple[bool, int]:
        before, lacking = each
        return not before + lacking or bool(before and before[-1] == folder[-1]), votes[each]

    best = max(map(rank, votes))
    if len(chosen := [each for each in votes if rank(each) == best]) > 1:
        several = " and ".join("/".join(before + lacking) or "." for before, lacking in chosen[:2])
        raise UserError(
            f"Expected the paths in {manifest} to be those of the photos in {root}, but they fit in {len(chosen)} ways "
            f"({several}); name the folder or archive that the paths begin in."
        )
    return chosen[0]


def _take_boxes(rows: pd.DataFrame, manifest: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None:
    """Removes the columns of boxes, and returns them (N, 4), NaN where a row has none; ``None`` without them."""
    names = {plain: [name for name in map(str, rows) if name.lower() == plain] for plain in _BOX}
    if not (names["x"] and names["y"]):
        return None
    if any(len(found) != 1 for found in names.values()):
        raise UserError(
            f"Expected one column each for {', '.join(_BOX)} in {manifest}, but there are "
            f"{', '.join(name for found in names.values() for name in found)}; rename or remove some."
        )
    boxes = rows[[name for (name,) in names.values()]]
    for name in boxes:
        del rows[name]
    is_given = ~boxes.apply(lambda cells: cells.str.lower().isin(UNKNOWN)).all(axis=1).to_numpy()
    numbers = boxes.apply(pd.to_numeric, errors="coerce").to_numpy(float)
    with np.errstate(invalid="ignore"):
        is_box = (np.abs(numbers) < _FAR).all(axis=1) & (numbers[:, 2:] > 0).all(axis=1)
    if (is_given & ~is_box).any():
        row = int(np.argmax(is_given & ~is_box))
        raise UserError(
            f"Expected x, y, width and height in pixels in row {row + 1} of {manifest}, but got "
            f"{', '.join(boxes.iloc[row])}; correct the row or leave the four cells empty."
        )
    return np.where((is_given & is_box)[:, None], numbers, np.nan)
