"""The first faces of a prediction as one picture, as the notebook that this project started from shows them."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from facecls.analysis.tables import AGE_WRONG
from facecls.data.tasks import CLASSES, MISSING, LabelError, Labels, parse_name
from facecls.files import replacing
from facecls.predict.faces import Batch

MOST = 64
"""Faces of a grid at most."""
_COLUMNS = 8


class Grid:
    """Collects the first faces of a stream of predictions, and draws them.

    What is predicted stands above each face, and the truth above that where a manifest or a UTKFace file name tells it;
    in red where gender or race is wrong, or age by more than 6 years.
    """

    def __init__(self) -> None:
        self.faces: list[tuple[npt.NDArray[np.uint8], Mapping[Hashable, Any], Labels | None]] = []

    def add(self, batch: Batch) -> None:
        """Takes faces as long as there is room.

        Args:
            batch: Predictions; those that can't be read are passed over.
        """
        for pixels, row, labels in zip(batch.pixels, batch.table.to_dict("records"), batch.labels, strict=True):
            if pixels is not None and len(self.faces) < MOST:
                self.faces.append((pixels, row, labels))

    def figure(self) -> Figure:
        """Draws the faces."""
        titles = [title(row, labels or _labels_in_name(str(row["path"]))) for _, row, labels in self.faces]
        return draw([pixels for pixels, _, _ in self.faces], titles)

    def write(self, dest: Path) -> None:
        """Draws the faces into a PNG file.

        Args:
            dest: The file to be made or replaced.

        Raises:
            UserError: If it can't be written.
        """
        with replacing(dest) as part:
            self.figure().savefig(part, format="png", dpi=150)


def draw(pictures: Sequence[npt.NDArray[np.uint8]], titles: Sequence[tuple[str, bool]]) -> Figure:
    """Draws faces side by side.

    Args:
        pictures: Of each face, RGB (H, W, 3).
        titles: Of each face, as ``title`` gives them; red where something is wrong.

    Returns:
        The figure.
    """
    columns = min(len(pictures), _COLUMNS)
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(1.7 * columns, 2.1 * rows), layout="constrained")
    for place, (pixels, (text, is_wrong)) in enumerate(zip(pictures, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(pixels)
        axes.set_axis_off()
        axes.set_title(text, fontsize=7, color="red" if is_wrong else "black")
    return figure


def title(row: Mapping[Hashable, Any], labels: Labels | None) -> tuple[str, bool]:
    """What stands above a face, and whether something in it is wrong.

    Args:
        row: Of the table of predictions.
        labels: The truth, ``MISSING`` where it is not known; None if nothing is known.

    Returns:
        One line, or two with the truth first; and whether the prediction is wrong where the truth is known.
    """
    told, truth, is_wrong = list[str](), list[str](), False
    for task, names in CLASSES.items():
        if task in row:
            told.append(row[task])
            if labels is not None and (code := getattr(labels, task)) != MISSING:
                truth.append(names[code])
                is_wrong |= names[code] != row[task]
    if "age" in row:
        told.append(f"{row['age']:.0f}")
        if labels is not None and labels.age != MISSING:
            truth.append(str(labels.age))
            is_wrong |= abs(labels.age - row["age"]) > AGE_WRONG
    return "\n".join([f"true: {', '.join(truth)}"] * bool(truth) + [", ".join(told)]), is_wrong


def _labels_in_name(path: str) -> Labels | None:
    try:
        return parse_name(PurePosixPath(path).name)
    except LabelError:
        return None
