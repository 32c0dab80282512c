"""Runs side by side, on the faces that all of them were tested on."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from facecls.analysis.scores import CONFIDENCE, SCORES, YEARS, Numbers, resampled_sums, score_parts
from facecls.data.tasks import CLASSES, TASKS, Task
from facecls.errors import UserError

KEY = ["path", "sha1"]
"""What makes two rows the same face: its name and its bytes."""


class Comparison(NamedTuple):
    """What ``paired`` finds.

    Attributes:
        faces: How many faces all runs share.
        scores: One row per score and pair of runs: ``score``, ``a``, ``b`` (names of runs), ``value_a``, ``value_b``,
            ``difference`` (b minus a), ``low``, ``high`` (95 % interval on it; NaN for one face), ``faces`` (labelled).
        disagreements: One row per face and task on which runs disagree: ``path``, ``sha1``, ``task``, ``label`` (name
            of a class, or years; NA without one), ``predicted/RUN`` for each run (the same), ``apart`` (the largest
            difference between two runs: of the probability of a class, or of the age in years); by task, the furthest
            apart first.
    """

    faces: int
    scores: pd.DataFrame
    disagreements: pd.DataFrame


def paired(tables: Mapping[str, pd.DataFrame], seed: int = 0) -> Comparison:
    """Compares runs on the faces that they share.

    Faces are drawn once for all runs (percentile bootstrap over pairs, Efron & Tibshirani 1993, chapters 8 and 13), so
    what is hard for all runs does not widen the intervals of their differences. Intervals are not corrected for the
    number of runs. Classes disagree when they are not the same, ages when they are more than five years apart.

    Args:
        tables: Predictions by the name of the run, at least two. The labels of the first run count for all.
        seed: Of the bootstrap.

    Returns:
        See ``Comparison``; of the tasks that all runs predict.

    Raises:
        UserError: If there are fewer than two runs, or they share no face.
    """
    if len(tables) < 2:
        raise UserError(f"Expected at least two runs to compare, but got {len(tables)}; name another one.")
    shared = _shared(tables)
    return Comparison(len(next(iter(shared.values()))), _differences(shared, seed), _disagreements(shared))


def _shared(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
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
    labels = first.loc[faces, list(TASKS)]
    return {run: table.loc[faces].assign(**labels).reset_index() for run, table in keyed.items()}


def _differences(shared: Mapping[str, pd.DataFrame], seed: int) -> pd.DataFrame:
    parts: dict[tuple[str, str], Numbers] = {}
    for run, table in shared.items():
        parts |= {(run, name): columns for name, columns in score_parts(table).items()}
    one = np.zeros(len(next(iter(shared.values()))), np.int64)
    drawn = resampled_sums(parts, one, 1, seed)
    tail = (1 - CONFIDENCE) / 2
    rows: list[dict[str, Any]] = []
    for name, score in SCORES.items():
        if any((run, name) not in parts for run in shared):
            continue
        for a, b in combinations(shared, 2):
            of_a, of_b = (a, name), (b, name)
            value_a, value_b = (float(score.value(parts[of].sum(0))) for of in (of_a, of_b))
            faces = int(parts[of_a][:, 0].sum())
            ends = np.nanquantile(score.value(drawn[of_b]) - score.value(drawn[of_a]), [tail, 1 - tail])
            low, high = ends if faces > 1 else (np.nan, np.nan)
            rows.append(
                {"score": name, "a": a, "b": b, "value_a": value_a, "value_b": value_b}
                | {"difference": value_b - value_a, "low": low, "high": high, "faces": faces}
            )
    columns = ["score", "a", "b", "value_a", "value_b", "difference", "low", "high", "faces"]
    return pd.DataFrame(rows, columns=columns)


def _disagreements(shared: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    found: list[pd.DataFrame] = []
    for task in TASKS:
        if any(f"{task}_predicted" not in table for table in shared.values()):
            continue
        predicted = np.stack(
            [table[f"{task}_predicted"].to_numpy(np.float64) for table in shared.values()]
        )  # (runs, N)
        spread = np.ptp(predicted, axis=0)
        rows = np.flatnonzero(spread > (YEARS if task == "age" else 0))
        apart = (spread if task == "age" else _probabilities_apart(shared, task))[rows]
        first = next(iter(shared.values())).iloc[rows]
        columns: dict[str, Any] = {"task": task, "label": _words(task, first[task])}
        for run, values in zip(shared, predicted, strict=True):
            columns[f"predicted/{run}"] = _words(task, pd.Series(values[rows], first.index))
        part = first[KEY].assign(**columns, apart=apart)
        found.append(part.sort_values("apart", ascending=False, kind="stable"))
    if not found:
        return pd.DataFrame(columns=[*KEY, "task", "label", *(f"predicted/{run}" for run in shared), "apart"])
    return pd.concat(found, ignore_index=True)


def _probabilities_apart(shared: Mapping[str, pd.DataFrame], task: Task) -> npt.NDArray[np.float64]:
    names = [f"p_{name}" for name in CLASSES[task]]
    p = np.stack([table[names].to_numpy(np.float64) for table in shared.values()])  # (runs, N, classes)
    return np.asarray(np.ptp(p, axis=0).max(1))


def _words(task: Task, values: pd.Series) -> pd.Series:
    """Codes or years as text."""
    if task == "age":
        return values.round().astype("Int64").astype("string")
    return values.astype("Int64").map(dict(enumerate(CLASSES[task])), na_action="ignore").astype("string")
