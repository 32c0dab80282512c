"""Comparison of runs on the faces that all of them were tested on."""

from collections.abc import Mapping, Sequence
from functools import singledispatch
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from facecls.analysis.labels import Numbers, column_values, label_texts, prediction_texts
from facecls.analysis.scores import YEARS, difference_interval, resampled_sums, score_parts, scores_of
from facecls.data.tasks import Age, Classification, Task, Tasks
from facecls.errors import UserError

KEY = ["path", "sha1"]
"""Two rows are the same face if its name and its bytes are the same."""


class Comparison(NamedTuple):
    """Differences between runs.

    Attributes:
        faces: Number of faces that all runs share.
        scores: One row per score and pair of runs: ``score``, ``a``, ``b`` (names of runs), ``value_a``, ``value_b``,
            ``difference`` (b minus a), ``low``, ``high`` (its 95 % interval; NaN for one face), ``faces`` (labelled).
        disagreements: One row per face and task on which runs disagree: ``path``, ``sha1``, ``task`` (its name),
            ``label`` (text, NA without one), ``predicted/RUN`` for each run (text), ``apart`` (the largest difference
            between two runs: in the probability of a class, or in years); by task, the largest first.
    """

    faces: int
    scores: pd.DataFrame
    disagreements: pd.DataFrame


def shared_tasks(
    tables: Mapping[str, pd.DataFrame], tasks: Mapping[str, Tasks]
) -> tuple[dict[str, Task], dict[str, str]]:
    """The tasks on which runs can be compared.

    Args:
        tables: Predictions by the name of the run.
        tasks: The tasks of each run, by its name.

    Returns:
        The tasks that all runs predict with the same labels, and by the name of each other task why it is not among
        them, such as ``only in a`` or ``other classes``.
    """
    shared: dict[str, Task] = {}
    reasons: dict[str, str] = {}
    for name in dict.fromkeys(name for of_run in tasks.values() for name in of_run):
        predicting = [run for run, table in tables.items() if f"{name}_predicted" in table]
        different = {tasks[run][name] for run in predicting}
        if predicting and len(predicting) < len(tables):
            reasons[name] = f"only in {' and '.join(predicting)}"
        elif len(different) > 1:
            reasons[name] = "other ages" if all(isinstance(task, Age) for task in different) else "other classes"
        elif different:
            shared[name] = different.pop()
    return shared, reasons


def compare_runs(tables: Mapping[str, pd.DataFrame], tasks: Tasks, seed: int = 0) -> Comparison:
    """Compares runs on the faces that they share.

    Bootstrap samples are shared by all runs (percentile bootstrap over pairs, Efron & Tibshirani 1993, chapters 8 and
    13), so what is hard for all runs does not widen the intervals of their differences. Intervals are not corrected for
    the number of runs. Classes disagree when they differ, ages when they are more than five years apart.

    Args:
        tables: Predictions by the name of the run, at least two. The labels of the first run are used for all.
        tasks: The tasks.
        seed: Of the bootstrap.

    Returns:
        The comparison, on the tasks that all runs predict.

    Raises:
        UserError: If there are fewer than two runs, or they share no face.
    """
    if len(tables) < 2:
        raise UserError(f"Expected at least two runs to compare, but got {len(tables)}; name another one.")
    shared = _shared(tables, tasks)
    return Comparison(
        len(next(iter(shared.values()))), _differences(shared, tasks, seed), _disagreements(shared, tasks)
    )


def _shared(tables: Mapping[str, pd.DataFrame], tasks: Tasks) -> dict[str, pd.DataFrame]:
    """The tables on the faces of all of them, in the order and with the labels of the first."""
    keyed = {run: table.drop_duplicates(KEY).set_index(KEY) for run, table in tables.items()}
    first = next(iter(keyed.values()))
    common = np.ones(len(first), np.bool_)
    for table in keyed.values():
        common &= first.index.isin(table.index)
    faces = first.index[common]
    if not len(faces):
        raise UserError(
            f"Expected runs tested on some of the same faces, but {', '.join(tables)} share none with the same path "
            "and bytes; compare runs on the same data and split."
        )
    labels = first.loc[faces].filter(items=[column for task in tasks.values() for column in task.columns])
    return {run: table.loc[faces].assign(**labels).reset_index() for run, table in keyed.items()}


def _differences(shared: Mapping[str, pd.DataFrame], tasks: Tasks, seed: int) -> pd.DataFrame:
    parts: dict[tuple[str, str], Numbers] = {}
    for run, table in shared.items():
        parts |= {(run, name): columns for name, columns in score_parts(table, tasks).items()}
    one = np.zeros(len(next(iter(shared.values()))), np.int64)
    drawn = resampled_sums(parts, one, 1, seed)
    rows: list[dict[str, Any]] = []
    for name, score in scores_of(tasks).items():
        if any((run, name) not in parts for run in shared):
            continue
        for a, b in combinations(shared, 2):
            value_a, value_b = (float(score.value(parts[run, name].sum(0))) for run in (a, b))
            faces = int(parts[a, name][:, 0].sum())
            low, high = difference_interval(score, drawn[a, name], drawn[b, name]) if faces > 1 else (np.nan, np.nan)
            rows.append(
                {"score": name, "a": a, "b": b, "value_a": value_a, "value_b": value_b}
                | {"difference": value_b - value_a, "low": low, "high": high, "faces": faces}
            )
    columns = ["score", "a", "b", "value_a", "value_b", "difference", "low", "high", "faces"]
    return pd.DataFrame(rows, columns=columns)


def _disagreements(shared: Mapping[str, pd.DataFrame], tasks: Tasks) -> pd.DataFrame:
    tables = list(shared.values())
    parts: list[pd.DataFrame] = []
    for name, task in tasks.items():
        if any(f"{name}_predicted" not in table for table in tables):
            continue
        apart = _apart(task, tables)
        rows = np.flatnonzero(~np.isnan(apart))
        some = [table.iloc[rows] for table in tables]
        columns: dict[str, Any] = {"task": name, "label": pd.array(label_texts(some[0], task), "string")}
        for run, table in zip(shared, some, strict=True):
            columns[f"predicted/{run}"] = pd.array(prediction_texts(table, task), "string")
        part = some[0][KEY].assign(**columns, apart=apart[rows])
        parts.append(part.sort_values("apart", ascending=False, kind="stable"))
    if not parts:
        return pd.DataFrame(columns=[*KEY, "task", "label", *(f"predicted/{run}" for run in shared), "apart"])
    return pd.concat(parts, ignore_index=True)


@singledispatch
def _apart(task: Task, tables: Sequence[pd.DataFrame]) -> Numbers:
    """(N,) how far runs are apart on each face, NaN where they agree."""
    raise NotImplementedError(type(task))


@_apart.register
def _classes_apart(task: Classification, tables: Sequence[pd.DataFrame]) -> Numbers:
    spread = _spread(tables, f"{task.name}_predicted")
    p_spread = np.stack([_spread(tables, column) for column in task.probabilities])  # (C, N)
    return np.where(spread > 0, p_spread.max(0), np.nan)


@_apart.register
def _ages_apart(task: Age, tables: Sequence[pd.DataFrame]) -> Numbers:
    spread = _spread(tables, f"{task.name}_predicted")
    return np.where(spread > YEARS, spread, np.nan)


def _spread(tables: Sequence[pd.DataFrame], column: str) -> Numbers:
    """(N,) largest minus smallest value of a column over the runs."""
    return np.asarray(np.ptp(np.stack([column_values(table, column) for table in tables]), axis=0))
