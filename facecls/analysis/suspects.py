"""Labels worth checking: those that a model contradicts, and duplicate pictures, above all with different labels."""

from collections.abc import Collection, Iterable, Iterator
from functools import singledispatch
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from facecls.analysis.duplicates import ImageLoader, near_identical
from facecls.analysis.labels import Numbers, column_values, label_ends, label_texts, prediction_texts
from facecls.analysis.predictions import INTERVAL
from facecls.data.tasks import Age, Classification, Task, Tasks

MODEL, DUPLICATES_DISAGREE, DUPLICATE = KINDS = ("model", "duplicates_disagree", "duplicate")
"""Kinds of suspects: labels that the model contradicts, labels that a duplicate of the picture contradicts, and other
duplicates."""
COLUMNS = ("path", "split", "task", "label", "predicted", "score", "reason", "other", "seen_in_training", "kind")
"""Columns of ``suspects``."""
OUTSIDE = 0.25
"""Distance of an age from its interval, as a share of the interval's width, at which doubt is one half.

If errors were normal, 1.4 % of the ages would lie further outside a 90 % interval; of 1,902 faces of UTKFace 0.8 % do.
"""


class _Suspect(NamedTuple):
    """A suspect: its row, how suspect it is, why, the task whose label it is about, and the row of its duplicate."""

    kind: str
    row: int
    score: float
    reason: str
    task: Task | None = None
    other: int | None = None


class _Link(NamedTuple):
    """Rows whose pictures are the same as those of other rows, how similar they are (0..1), and in words."""

    first: list[int]
    second: list[int]
    score: float
    reason: str


def suspects(
    table: pd.DataFrame,
    tasks: Tasks,
    pixels: ImageLoader | None = None,
    trusted: Collection[str] | None = None,
) -> pd.DataFrame:
    """Lists labels that look wrong, and duplicates.

    ``model``: the model contradicts the label. For a classification, another class is predicted, with a probability of
    at least one half and at least the mean probability that faces labelled with that class get for it (confident
    learning, Northcutt et al. 2021, doi:10.1613/jair.1.12125). For an age, the doubt is above one half.
    ``duplicates_disagree``: a picture with the same bytes, or nearly the same picture, upright or mirrored, has a label
    that contradicts this one. ``duplicate``: the picture is the same as an earlier one, or nearly, and is not listed
    with another label.

    Args:
        table: Predictions; or any faces with ``path``, ``sha1``, ``split`` and labels, whose predictions may be NA or
            absent, for duplicates among all faces of the data.
        tasks: The tasks.
        pixels: The faces by row number; without it, near-identical pictures are not searched for.
        trusted: Tasks whose predictions may contradict labels, by name, such as those on which the model is
            ``better_than_guessing``; ``None`` for all.

    Returns:
        ``COLUMNS``: by ``kind`` in the order of ``KINDS``, then most suspect first, among equals the one that the model
        doubts most. ``label`` and ``predicted`` are text, ``predicted`` is NA without a prediction; ``score`` is 0..1:
        the doubt, 1 for the same bytes, or the correlation of the pictures; ``reason`` is text; ``other`` is the path
        of the duplicate, NA for ``model``. ``seen_in_training`` marks labels that the model was trained with, which it
        contradicts less often than it should. ``task``, ``label`` and ``predicted`` of a plain duplicate are NA.
    """
    doubt = label_doubt(table, tasks)
    links = list(_links(table, pixels))
    disagreeing = list(_disagreeing_duplicates(table, tasks, links))
    listed = [
        *_contradicted(table, tasks.values() if trusted is None else [tasks[name] for name in trusted], doubt),
        *disagreeing,
        *_plain_duplicates(links, {suspect.row for suspect in disagreeing}),
    ]
    paths = table["path"].tolist()

    def rank(suspect: _Suspect) -> tuple[int, float, float, str]:
        doubted = 0.0 if suspect.task is None else float(np.nan_to_num(doubt[suspect.task.name].iloc[suspect.row]))
        return KINDS.index(suspect.kind), -suspect.score, -doubted, paths[suspect.row]

    return _to_table(table, tasks, sorted(listed, key=rank))


def label_doubt(table: pd.DataFrame, tasks: Tasks) -> pd.DataFrame:
    """How strongly the model contradicts each label; above one half it prefers another.

    For a classification, one half plus half the margin between the most probable other class and the label (the
    normalised margin of Northcutt et al. 2021). For an age, d / (d + w / 4), where d is the distance of the label from
    the predicted interval in years and w the width of the interval. Where a table has no intervals, they are drawn
    around the predictions from the errors of all its faces.

    Args:
        table: Predictions; they may be NA or absent.
        tasks: The tasks.

    Returns:
        Aligned with the table, by task, 0..1; NaN without a label or a prediction.
    """
    return pd.DataFrame({name: _doubt(task, table) for name, task in tasks.items()}, index=table.index)


@singledispatch
def _doubt(task: Task, table: pd.DataFrame) -> Numbers:
    """(N,) how strongly the model contradicts each label."""
    raise NotImplementedError(type(task))


@_doubt.register
def _class_doubt(task: Classification, table: pd.DataFrame) -> Numbers:
    labels, probabilities = column_values(table, task.name), _probabilities(table, task)
    is_label = np.arange(len(task.classes)) == labels[:, None]
    own = np.where(is_label, probabilities, 0).sum(1)
    best_other = np.where(is_label, 0, probabilities).max(1)
    return np.where(np.isnan(labels), np.nan, (1 + best_other - own) / 2)


@_doubt.register
def _age_doubt(task: Age, table: pd.DataFrame) -> Numbers:
    first, last = label_ends(table, task)
    low, high = _age_bounds(table, task)
    outside = np.clip(np.maximum(low - last, first - high), 0, None)
    return outside / (outside + OUTSIDE * (high - low + 1))


def _probabilities(table: pd.DataFrame, task: Classification) -> Numbers:
    return np.stack([column_values(table, column) for column in task.probabilities], 1)  # (N, C)


def _age_bounds(table: pd.DataFrame, task: Age) -> tuple[Numbers, Numbers]:
    """The interval of each age, both ends included."""
    if f"{task.name}_low" in table:
        return column_values(table, f"{task.name}_low"), column_values(table, f"{task.name}_high")
    predicted = column_values(table, f"{task.name}_predicted")
    errors = column_values(table, task.name) - predicted
    errors = errors[~np.isnan(errors)]
    below, above = np.quantile(errors, INTERVAL) if len(errors) else (np.nan, np.nan)
    return predicted + below, predicted + above


def _contradicted(table: pd.DataFrame, tasks: Iterable[Task], doubt: pd.DataFrame) -> Iterator[_Suspect]:
    for task in tasks:
        of_task = doubt[task.name].to_numpy(np.float64)
        for row, reason in _contradictions(task, table, of_task > 0.5):
            yield _Suspect(MODEL, row, float(of_task[row]), reason, task)


@singledispatch
def _contradictions(task: Task, table: pd.DataFrame, doubted: npt.NDArray[np.bool_]) -> Iterator[tuple[int, str]]:
    """Rows whose label the model contradicts with confidence, and why; among the doubted (N,) ones."""
    raise NotImplementedError(type(task))


@_contradictions.register
def _class_contradictions(
    task: Classification, table: pd.DataFrame, doubted: npt.NDArray[np.bool_]
) -> Iterator[tuple[int, str]]:
    labels, probabilities = column_values(table, task.name), _probabilities(table, task)
    codes = np.arange(len(task.classes))
    thresholds = [_threshold(probabilities[labels == code, code]) for code in codes]
    confident = (codes != labels[:, None]) & (probabilities >= thresholds) & doubted[:, None]
    for row, code in np.argwhere(confident).tolist():
        yield row, f'predicted "{task.classes[code]}" ({100 * probabilities[row, code]:.0f} %)'


@_contradictions.register
def _age_contradictions(task: Age, table: pd.DataFrame, doubted: npt.NDArray[np.bool_]) -> Iterator[tuple[int, str]]:
    low, high = _age_bounds(table, task)
    for row in np.flatnonzero(doubted).tolist():
        yield row, f"outside the interval {low[row]:.0f} to {high[row]:.0f}"


def _threshold(own: Numbers) -> float:
    """The probability from which a class counts as confidently predicted, given that of faces labelled with it.

    At least one half, since a class that the model hardly knows would otherwise contradict all others.
    """
    own = own[~np.isnan(own)]
    return max(0.5, own.mean()) if len(own) else 0.5


def _disagreeing_duplicates(table: pd.DataFrame, tasks: Tasks, links: Iterable[_Link]) -> Iterator[_Suspect]:
    """Labels that the label of a duplicate contradicts; each once, with the most similar duplicate."""
    for task in tasks.values():
        labels = list(zip(*(ends.tolist() for ends in label_ends(table, task)), strict=True))
        texts = label_texts(table, task)
        listed = set[int]()
        for link in links:
            for faces, others in ((link.first, link.second), (link.second, link.first)):
                # one face for each label is enough, since a file may have thousands of duplicates
                shown = {labels[other]: other for other in reversed(others) if texts[other] is not None}
                for face in faces:
                    if face in listed or texts[face] is None:
                        continue
                    low, high = labels[face]
                    twin = next((other for (first, last), other in shown.items() if last < low or high < first), None)
                    if twin is not None:
                        listed.add(face)
                        label = f'"{texts[twin]}"' if isinstance(task, Classification) else texts[twin]
                        reason = f"{link.reason}, labelled {label}"
                        yield _Suspect(DUPLICATES_DISAGREE, face, link.score, reason, task, twin)


def _plain_duplicates(links: Iterable[_Link], excluded: Collection[int]) -> Iterator[_Suspect]:
    """Duplicates of earlier pictures; each once, with the most similar one."""
    listed = set(excluded)
    for link in links:
        for face in link.second:
            if face not in listed and face != link.first[0]:
                listed.add(face)
                yield _Suspect(DUPLICATE, face, link.score, link.reason, other=link.first[0])


def _links(table: pd.DataFrame, pixels: ImageLoader | None) -> Iterator[_Link]:
    """Duplicates, the most similar first."""
    files = [np.asarray(rows).tolist() for rows in table.groupby("sha1", sort=False).indices.values()]
    for rows in files:
        if len(rows) > 1:
            yield _Link(rows, rows, 1.0, "same file")
    if pixels is None:
        return
    of_first = {rows[0]: rows for rows in files}
    for first, second, correlation, mirrored in near_identical(pixels, of_first).itertuples(index=False):
        reason = f"nearly the same picture{' mirrored' if mirrored else ''} (correlation {correlation:.2f})"
        yield _Link(of_first[first], of_first[second], correlation, reason)


def _to_table(table: pd.DataFrame, tasks: Tasks, listed: Iterable[_Suspect]) -> pd.DataFrame:
    labels = {name: label_texts(table, task) for name, task in tasks.items()}
    predictions = {name: prediction_texts(table, task) for name, task in tasks.items()}
    paths, splits = table["path"].tolist(), table["split"].tolist()
    rows = [
        (
            paths[row],
            splits[row],
            None if task is None else task.name,
            None if task is None else labels[task.name][row],
            None if task is None else predictions[task.name][row],
            score,
            reason,
            None if other is None else paths[other],
            splits[row] == "train",
            kind,
        )
        for kind, row, score, reason, task, other in listed
    ]
    types = dict.fromkeys(COLUMNS, "str") | {"score": "float64", "seen_in_training": "bool"}
    return pd.DataFrame(rows, columns=COLUMNS).astype(types)
