"""Labels worth a second look: those that a model contradicts, and those of equal pictures that differ."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from facecls.analysis.duplicates import Pixels, near_identical
from facecls.analysis.predictions import INTERVAL
from facecls.data.tasks import CLASSES, TASKS, Task

COLUMNS = ("path", "split", "task", "label", "predicted", "score", "reason", "other", "seen_in_training")
"""Of what ``suspects`` gives."""
OUTSIDE = 0.25
"""By what share of the width of its interval an age lies outside where doubt is one half.

If errors were normal, 1.4 % of the ages would lie further outside a 90 % interval; of 1,902 faces of UTKFace 0.8 % do.
"""


class _Suspect(NamedTuple):
    """A label that looks wrong: of which row and task, how wrong, why, and the row of its twin."""

    row: int
    task: Task
    score: float
    reason: str
    other: int | None = None


def suspects(table: pd.DataFrame, pixels: Pixels | None = None) -> pd.DataFrame:
    """Lists the labels that look wrong.

    A label is listed when (1) the model contradicts it. For gender and race, the predicted class is another one and its
    probability is at least one half and at least that class's threshold, the mean probability that the model gives it
    where it is the label (confident learning, Northcutt et al. 2021, doi:10.1613/jair.1.12125). For age, the doubt is
    above one half. (2) Another face has the same bytes and another label. (3) Another face is nearly the same picture,
    upright or mirrored, and has another label. (2) and (3) list a label once, with its nearest twin.

    Args:
        table: Predictions; or any faces with ``path``, ``sha1``, ``split`` and labels, whose predictions may be NA or
            absent, for (2) and (3) among all faces of the data.
        pixels: The faces by row number; without it (3) is left out.

    Returns:
        ``COLUMNS``, one row a suspect, most suspect first and where equal the one that the model doubts more: ``label``
        and ``predicted`` are class names or whole years as text, ``predicted`` NA without a prediction; ``score`` is
        0..1, for (1) the doubt, for (2) 1, for (3) the correlation; ``reason`` is text; ``other`` is the twin's path,
        NA for (1); ``seen_in_training`` tells that the model was trained with this label and contradicts it too seldom.
    """
    doubt = label_doubt(table)
    labels = {task: _values(table, task) for task in TASKS}
    predictions = {task: _values(table, f"{task}_predicted") for task in TASKS}
    paths, splits = table["path"].tolist(), table["split"].tolist()
    found = [*_contradicted(table, doubt), *_twins(table, pixels)]
    found.sort(key=lambda one: (-one.score, -np.nan_to_num(doubt[one.task].iloc[one.row]), paths[one.row]))
    rows = [
        (
            paths[row],
            splits[row],
            task,
            _named(task, labels[task][row]),
            _named(task, predictions[task][row]),
            score,
            reason,
            None if other is None else paths[other],
            splits[row] == "train",
        )
        for row, task, score, reason, other in found
    ]
    text = dict.fromkeys(("path", "split", "task", "label", "predicted", "reason", "other"), "str")
    return pd.DataFrame(rows, columns=COLUMNS).astype({**text, "score": float, "seen_in_training": bool})


def label_doubt(table: pd.DataFrame) -> pd.DataFrame:
    """How much the model contradicts each label; above one half it does.

    For gender and race it is half of one plus the margin between the most probable other class and the label (the
    normalised margin of Northcutt et al. 2021). For age it is d / (d + w / 4), where d is by how many years the label
    lies outside the interval and w is the interval's width. Where the table has no intervals, they are drawn around
    the predictions from the errors of all its faces.

    Args:
        table: Predictions; they may be NA or absent.

    Returns:
        Aligned with the table: ``gender``, ``race`` and ``age``, float 0..1, NaN without a label or a prediction.
    """
    return pd.DataFrame(
        {"gender": _class_doubt(table, "gender"), "race": _class_doubt(table, "race"), "age": _age_doubt(table)},
        index=table.index,
    )


def _values(table: pd.DataFrame, column: str) -> npt.NDArray[np.float64]:
    """A column as floats, NaN where it is NA or absent."""
    if column not in table:
        return np.full(len(table), np.nan)
    return np.asarray(table[column].astype("Float64").to_numpy(na_value=np.nan), np.float64)


def _probabilities(table: pd.DataFrame, task: Task) -> npt.NDArray[np.float64]:
    return np.stack([_values(table, f"p_{name}") for name in CLASSES[task]], 1)  # (N, classes)


def _named(task: Task, value: float) -> str | None:
    if np.isnan(value):
        return None
    return CLASSES[task][int(value)] if task in CLASSES else f"{value:.0f}"


def _class_doubt(table: pd.DataFrame, task: Task) -> npt.NDArray[np.float64]:
    labels, probabilities = _values(table, task), _probabilities(table, task)
    names = np.arange(probabilities.shape[1])
    is_label = names == labels[:, None]
    own = np.where(is_label, probabilities, 0).sum(1)
    best_other = np.where(is_label, 0, probabilities).max(1)
    return np.where(np.isnan(labels), np.nan, (1 + best_other - own) / 2)


def _age_doubt(table: pd.DataFrame) -> npt.NDArray[np.float64]:
    age = _values(table, "age")
    low, high = _age_bounds(table)
    outside = np.clip(np.maximum(low - age, age - high), 0, None)
    return outside / (outside + OUTSIDE * (high - low + 1))


def _age_bounds(table: pd.DataFrame) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The interval of each age, both ends included."""
    if "age_low" in table:
        return _values(table, "age_low"), _values(table, "age_high")
    predicted = _values(table, "age_predicted")
    errors = _values(table, "age") - predicted
    errors = errors[~np.isnan(errors)]
    below, above = np.quantile(errors, INTERVAL) if len(errors) else (np.nan, np.nan)
    return predicted + below, predicted + above


def _contradicted(table: pd.DataFrame, doubt: pd.DataFrame) -> Iterator[_Suspect]:
    for task, names in CLASSES.items():
        labels, probabilities = _values(table, task), _probabilities(table, task)
        thresholds = [_threshold(probabilities[labels == code, code]) for code in range(len(names))]
        other = np.arange(len(names)) != labels[:, None]
        confident = other & (probabilities >= thresholds) & (doubt[[task]] > 0.5).to_numpy()
        for row, code in np.argwhere(confident).tolist():
            reason = f"predicted {names[code]} with {probabilities[row, code]:.0%}"
            yield _Suspect(row, task, doubt[task].iloc[row], reason)
    low, high = _age_bounds(table)
    for row in np.flatnonzero(doubt["age"] > 0.5).tolist():
        yield _Suspect(row, "age", doubt["age"].iloc[row], f"outside the interval {low[row]:.0f} to {high[row]:.0f}")


def _threshold(given: npt.NDArray[np.float64]) -> float:
    """From which probability on a class is predicted with confidence, by the probabilities of those labelled with it.

    Never below one half, since a class that the model hardly knows would contradict all others otherwise.
    """
    given = given[~np.isnan(given)]
    return max(0.5, given.mean()) if len(given) else 0.5


def _twins(table: pd.DataFrame, pixels: Pixels | None) -> Iterator[_Suspect]:
    """Equal pictures with different labels; each label once, with its nearest twin."""
    links = list(_links(table, pixels))
    for task in TASKS:
        labels = _values(table, task).tolist()
        listed = set[int]()
        for faces, others, score, what in links:
            # one face for each label is enough, and a file may have thousands of copies
            shown = {labels[other]: other for other in reversed(others) if not np.isnan(labels[other])}
            for face in faces:
                if face in listed or np.isnan(labels[face]):
                    continue
                twin = next((other for label, other in shown.items() if label != labels[face]), None)
                if twin is not None:
                    listed.add(face)
                    yield _Suspect(face, task, score, f"{what}, labelled {_named(task, labels[twin])}", twin)


def _links(table: pd.DataFrame, pixels: Pixels | None) -> Iterator[tuple[list[int], list[int], float, str]]:
    """Rows whose pictures equal those of other rows, how much and in words; nearest first, both ways round."""
    copies = [np.asarray(rows).tolist() for rows in table.groupby("sha1", sort=False).indices.values()]
    for rows in copies:
        if len(rows) > 1:
            yield rows, rows, 1.0, "same file"
    if pixels is None:
        return
    of_first = {rows[0]: rows for rows in copies}
    for first, second, correlation, mirrored in near_identical(pixels, of_first).itertuples(index=False):
        what = f"nearly the same picture{' mirrored' if mirrored else ''} (correlation {correlation:.2f})"
        yield of_first[first], of_first[second], correlation, what
        yield of_first[second], of_first[first], correlation, what
