"""The first faces of a prediction as one picture, as the original notebook shows them."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure

from facecls.analysis.labels import label_ends, label_texts
from facecls.data.file_names import parse_name
from facecls.data.parsing import MISSING, LabelError
from facecls.data.tasks import Classification, Task, Tasks
from facecls.files import replacing
from facecls.predict.faces import Batch
from facecls.predict.pictures import MARK

MOST_FACES = 64
_COLUMNS = 8


class Grid:
    """Collects the first faces of a stream of predictions, and draws them.

    Above each face is its prediction, and above that the label if a manifest or a UTKFace file name has one; in red
    where the prediction counts as a mistake (``Task.is_wrong``).

    Args:
        tasks: What is predicted.
    """

    def __init__(self, tasks: Tasks) -> None:
        self.tasks = tasks
        self.pictures: list[npt.NDArray[np.uint8]] = []
        self.titles: list[tuple[str, bool]] = []

    def add(self, batch: Batch) -> None:
        """Adds faces until the grid is full.

        Args:
            batch: Predictions; unreadable inputs are skipped.
        """
        if len(self.pictures) == MOST_FACES:
            return
        for pixels, row, given in zip(batch.pixels, batch.table.to_dict("records"), batch.inputs, strict=True):
            if pixels is not None and len(self.pictures) < MOST_FACES:
                known = _known(self.tasks, given.labels or _labels_in_name(str(row["path"])))
                self.pictures.append(pixels)
                self.titles.append(title(self.tasks, _predicted(self.tasks, row), known))

    def write(self, dest: Path) -> None:
        """Draws the faces into a PNG file.

        Args:
            dest: The file to create or replace.

        Raises:
            UserError: If it can't be written.
        """
        with replacing(dest) as part:
            draw(self.pictures, self.titles).savefig(part, format="png", dpi=150, metadata={"Comment": MARK})


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


def title(tasks: Tasks, predicted: Mapping[str, float], labels: Mapping[str, float]) -> tuple[str, bool]:
    r"""The title of a face, and whether a prediction is wrong.

    Args:
        tasks: What is predicted.
        predicted: Codes of classes and years, by task.
        labels: The same by column (``Task.columns``), as far as they are known.

    Returns:
        One line, or two with the labels first; and whether a prediction is wrong where its label is known. An age
        whose label is a range is compared with the nearest end.

    Examples:
        >>> from facecls.data.tasks import UTKFACE
        >>> title(UTKFACE, {"gender": 1, "race": 2, "age": 30.6}, {"gender": 0, "age_from": 20, "age_to": 29})
        ('true: male, 20-29\nfemale, asian, 31', True)
    """
    shown = [task for name, task in tasks.items() if name in predicted]
    face = pd.DataFrame([labels])
    lines = [", ".join(task.text(predicted[task.name]) for task in shown)]
    known = [(task, text) for task in shown if (text := label_texts(face, task)[0]) is not None]
    if known:
        lines.insert(0, f"true: {', '.join(text for _, text in known)}")
    return "\n".join(lines), any(_is_wrong(face, task, predicted[task.name]) for task, _ in known)


def _is_wrong(face: pd.DataFrame, task: Task, predicted: float) -> bool:
    (low,), (high,) = label_ends(face, task)
    return task.is_wrong(min(max(predicted, low), high), predicted)


def _predicted(tasks: Tasks, row: Mapping[Any, Any]) -> dict[str, float]:
    """Codes of classes and years by task, of a row of predictions."""
    return {
        name: task.parse(row[name])[0] if isinstance(task, Classification) else row[name]
        for name, task in tasks.items()
    }


def _known(tasks: Tasks, texts: Mapping[str, str]) -> dict[str, float]:
    """Codes and years by column, of labels as people write them; invalid ones are left out."""
    values: dict[str, float] = {}
    for name, task in tasks.items():
        try:
            values |= zip(task.columns, task.parse(texts.get(name, "")), strict=True)
        except LabelError:
            continue
    return {column: value for column, value in values.items() if value != MISSING}


def _labels_in_name(path: str) -> Mapping[str, str]:
    try:
        return parse_name(PurePosixPath(path).name)
    except LabelError:
        return {}
