"""What is known of the faces in a photo: the rows of a manifest that belong to it, or the labels in its name."""

from collections.abc import Mapping
from pathlib import Path, PurePath, PureWindowsPath
from typing import NamedTuple

import numpy as np
import pandas as pd

from facecls.data.columns import read_table
from facecls.data.file_names import parse_name
from facecls.data.manifests import common_ending
from facecls.data.parsing import LabelError
from facecls.data.tasks import UTKFACE
from facecls.errors import UserError

NOT_LISTED = "not in the manifest"
"""Why no face is taken from a photo."""
_BOX = ("x", "y", "width", "height")
"""Columns of a manifest that together say which face is meant, in pixels."""
Box = tuple[float, float, float, float]
"""x and y of the upper left corner, width and height, in pixels."""


class LabelledFace(NamedTuple):
    """A face of a photo, as far as it is known.

    Attributes:
        labels: Texts by column.
        box: Where it is; ``None`` if that is not said.
    """

    labels: Mapping[str, str]
    box: Box | None = None


class NameLabels:
    """Labels in the file names of UTKFace; other photos have none.

    Attributes:
        columns: Names of the labels.
    """

    def __init__(self) -> None:
        self.columns = list(UTKFACE)

    def of(self, photo: str, inside: str) -> list[LabelledFace]:
        """As ``ManifestLabels.of``, always one face."""
        try:
            return [LabelledFace(parse_name(PurePath(photo).name))]
        except LabelError:
            return [LabelledFace({})]

    def missing(self) -> list[str]:
        """Nothing is listed."""
        return []


class ManifestLabels:
    """The rows of a manifest.

    A row belongs to a photo if either path is the end of the other; of several such rows those with the longest path.

    Args:
        manifest: Its path. Columns x, y, width and height are taken as a box if all are there.

    Attributes:
        columns: Names of the labels: all columns but path and box.

    Raises:
        UserError: If it can't be read or lacks a path.
    """

    def __init__(self, manifest: Path) -> None:
        rows = read_table(manifest, "path")
        self._paths = [PureWindowsPath(path) for path in rows.pop("path")]  # which knows both kinds of slashes
        rows = rows.rename(columns={name: name.lower() for name in map(str, rows) if name.lower() in _BOX})
        self._boxes = None
        if set(_BOX) <= set(rows):
            self._boxes = _numbers(rows[list(_BOX)], manifest)
            rows = rows.drop(columns=list(_BOX))
        self.columns = [str(name) for name in rows]
        self._rows = rows
        self._by_name: dict[str, list[int]] = {}
        for row, path in enumerate(self._paths):
            self._by_name.setdefault(path.name, []).append(row)
        self._is_met = np.zeros(len(rows), bool)

    def of(self, photo: str, inside: str) -> list[LabelledFace]:
        """Finds the faces that are known in a photo.

        Args:
            photo: Its path, absolute or relative to the working directory.
            inside: The same, relative to the folder or archive that was named.

        Returns:
            One or more faces.

        Raises:
            ValueError: With the reason, if none of its faces shall be taken.
        """
        full, short = Path(photo).absolute().parts, PurePath(inside).parts
        lengths = {}
        for row in self._by_name.get(full[-1], ()):
            parts = self._paths[row].relative_to(self._paths[row].anchor).parts
            length = common_ending(parts, full)
            if length in (len(parts), len(short)) or length > len(short):
                lengths[row] = length
        longest = [row for row, length in lengths.items() if length == max(lengths.values())]
        if not longest:
            raise ValueError(NOT_LISTED)
        if len({self._paths[row] for row in longest}) > 1:
            raise ValueError("rows with different paths of the manifest may be its own")
        self._is_met[longest] = True
        if len(longest) > 1 and (self._boxes is None or np.isnan(self._boxes[longest]).any()):
            raise ValueError("several rows of the manifest without a box")
        return [self._face(row) for row in longest]

    def missing(self) -> list[str]:
        """The paths of photos that are listed and were never asked for."""
        return [str(self._paths[row]) for row in np.flatnonzero(~self._is_met)]

    def _face(self, row: int) -> LabelledFace:
        labels = {str(name): text for name, text in self._rows.iloc[row].items()}
        if self._boxes is None or np.isnan(self._boxes[row]).any():
            return LabelledFace(labels)
        x, y, width, height = self._boxes[row].tolist()
        return LabelledFace(labels, (x, y, width, height))


def _numbers(boxes: pd.DataFrame, manifest: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Boxes (N, 4); NaN where a row has none.

    Raises:
        UserError: If one is no box.
    """
    is_given = (boxes != "").any(axis=1).to_numpy()
    numbers = boxes.apply(pd.to_numeric, errors="coerce").to_numpy(float)
    is_box = np.isfinite(numbers).all(axis=1) & (numbers[:, 2:] > 0).all(axis=1)
    if (is_given & ~is_box).any():
        row = int(np.argmax(is_given & ~is_box))
        raise UserError(
            f"Expected x, y, width and height in pixels in row {row + 1} of {manifest}, but got "
            f"{', '.join(boxes.iloc[row]) or 'nothing'}; correct the row or leave the four cells empty."
        )
    return np.where(is_box[:, None], numbers, np.nan)


Labels = NameLabels | ManifestLabels
