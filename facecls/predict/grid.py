"""The first faces of a prediction as one picture, as the original notebook shows them."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from facecls.data.tasks import MISSING, LabelError, Task, Tasks, parse_name
from facecls.files import replacing
from facecls.predict.faces import Batch

MOST_FACES = 64
_COLUMNS = 8


class Grid:
    """Collects the first faces of a stream of predictions, and draws them.

    The prediction stands above each face, and above that the truth if a manifest or a UTKFace file name tells it; in
    red where the prediction counts as a mistake (``Task.is_wrong``).

    Args:
        tasks: What is predicted.
    """

    def __init__(self, tasks: Tasks) -> None:
        self.tasks = tasks
        self.pictures: list[npt.NDArray[np.uint8]] = []
        self.titles: list[tuple[str, bool]] = []

    def add(self, batch: Batch) -> None:
        """Takes faces as long as there is room.

        Args:
            batch: Predictions; those that can't be read are passed over.
        """
        if len(self.pictures) == MOST_FACES:
            return
        for pixels, row, labels in zip(batch.pixels, batch.table.to_dict("records"), batch.labels, strict=True):
            if pixels is not None and len(self.pictures) < MOST_FACES:
                truth = _values(self.tasks, labels or _labels_in_name(str(row["path"])))
                self.pictures.append(pixels)
                self.titles.append(title(self.tasks, _values(self.tasks, row), truth))

    def write(self, dest: Path) -> None:
        """Draws the faces into a PNG file.

        Args:
            dest: The file to be made or replaced.

        Raises:
            UserError: If it can't be written.
        """
        with replacing(dest) as part:
            draw(self.pictures, self.titles).savefig(part, format="png", dpi=150)


def draw(pictures: Sequence[npt.NDArray[np.uint8]], titles: Sequence[tuple[str, bool]]) -> Figure:
    """Draws faces side by side.

    Args:
        pictures: RGB (H, W, 3) each.
        titles: As ``title`` returns them; red where something is wrong.

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


def title(tasks: Tasks, predicted: Mapping[str, float], truth: Mapping[str, float]) -> tuple[str, bool]:
    r"""What stands above a face, and whether something in it is wrong.

    Args:
        tasks: What is predicted.
        predicted: Codes of classes and years, by task.
        truth: The same, as far as it is known.

    Returns:
        One line, or two with the truth first; and whether the prediction is wrong where the truth is known.

    Examples:
        >>> from facecls.data.tasks import UTKFACE
        >>> title(UTKFACE, {"gender": 1, "race": 2, "age": 30.6}, {"gender": 0})
        ('true: male\nfemale, asian, 31', True)
    """
    told = [task.text(predicted[name]) for name, task in tasks.items() if name in predicted]
    known = [task for name, task in tasks.items() if name in predicted and name in truth]
    lines = [", ".join(told)]
    if known:
        lines.insert(0, f"true: {', '.join(task.text(truth[task.name]) for task in known)}")
    return "\n".join(lines), any(task.is_wrong(truth[task.name], predicted[task.name]) for task in known)


def _values(tasks: Tasks, row: Mapping[Any, Any]) -> dict[str, float]:
    """Codes of classes and years by task, of a row of predictions or of labels, as far as there are any."""
    values = {name: _value(task, row[name]) for name, task in tasks.items() if name in row}
    return {name: value for name, value in values.items() if value != MISSING}


def _value(task: Task, cell: str | float) -> float:
    if not isinstance(cell, str):
        return cell
    try:
        return task.parse(cell)[0]
    except LabelError:
        return MISSING


def _labels_in_name(path: str) -> Mapping[str, str]:
    try:
        return parse_name(PurePosixPath(path).name)
    except LabelError:
        return {}
