"""The numbers behind the figures: predictions -> small tables."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from facecls.analysis.groups import AGE_BANDS
from facecls.analysis.scores import YEARS
from facecls.data.tasks import CLASSES, TASKS, Task

_Floats = npt.NDArray[np.float64]

CUMULATIVE_YEARS = 15
"""How far the cumulative score goes, as in papers on age (Geng et al. 2007, doi:10.1109/TPAMI.2007.70733)."""
AGE_WRONG = 6
"""Years; an age further off counts as a mistake in the gallery, as in the picture grid of the seed."""
AGE_BIN = 5
"""Years that a point of the error by true age stands for."""


class Roc(NamedTuple):
    """A receiver operating characteristic.

    Attributes:
        false_positive: (P,) ascending, 0..1.
        true_positive: (P,) ascending, 0..1.
        area: Below the curve, 0..1.
    """

    false_positive: _Floats
    true_positive: _Floats
    area: float


def labelled(table: pd.DataFrame, task: Task) -> pd.DataFrame:
    """The faces that have a label and a prediction of a task; none if the table has no such prediction."""
    if f"{task}_predicted" not in table:
        return table.iloc[:0]
    return table[table[task].notna() & table[f"{task}_predicted"].notna()]


def confusion(table: pd.DataFrame, task: Task) -> pd.DataFrame:
    """Counts faces by label (rows) and prediction (columns), both named.

    Args:
        table: Predictions.
        task: gender or race.

    Returns:
        (C, C) int, every class of the task in the order of its codes.
    """
    known = labelled(table, task)
    names = CLASSES[task]
    counts = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts, (known[task].to_numpy(int), known[f"{task}_predicted"].to_numpy(int)), 1)
    return pd.DataFrame(counts, index=list(names), columns=list(names))


def class_scores(table: pd.DataFrame, task: Task) -> pd.DataFrame:
    """Precision, recall and F1 of each class.

    Args:
        table: Predictions.
        task: gender or race.

    Returns:
        By class name: ``faces`` (with this label), ``precision``, ``recall``, ``f1`` (0..1; precision is NaN for a
        class that was never predicted, recall for one without faces, F1 for one with neither).
    """
    counts = confusion(table, task).to_numpy()
    right, labels, predictions = np.diag(counts), counts.sum(1), counts.sum(0)
    with np.errstate(invalid="ignore"):
        columns = {
            "faces": labels,
            "precision": right / predictions,
            "recall": right / labels,
            "f1": 2 * right / (labels + predictions),
        }
    return pd.DataFrame(columns, index=list(CLASSES[task]))


def roc(table: pd.DataFrame) -> Roc | None:
    """How well the probability of "female" tells women from men at every threshold.

    Args:
        table: Predictions.

    Returns:
        The curve, from (0, 0) to (1, 1); ``None`` unless there are faces of both.
    """
    known = labelled(table, "gender")
    female = known["gender"].to_numpy(int) == 1
    if not female.any() or female.all():
        return None
    score = known["p_female"].to_numpy(np.float64)
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)  # equal scores make one point
    true, false = (np.concatenate([[0.0], np.cumsum(which[order])[last] / which.sum()]) for which in (female, ~female))
    return Roc(false, true, float(np.trapezoid(true, false)))


def age_errors(table: pd.DataFrame) -> pd.DataFrame:
    """Faces with a label and a prediction of age.

    Args:
        table: Predictions.

    Returns:
        ``age``, ``predicted`` and ``error`` (predicted - age), years; with an age distribution also ``covered`` (the
        age lies in the 90 % interval) and ``width`` of that interval in years.
    """
    known = labelled(table, "age")
    columns = {"age": known["age"].to_numpy(np.float64), "predicted": known["age_predicted"].to_numpy(np.float64)}
    columns["error"] = columns["predicted"] - columns["age"]
    if "age_low" in known:
        low, high = known["age_low"].to_numpy(np.float64), known["age_high"].to_numpy(np.float64)
        columns["covered"] = ((low <= columns["age"]) & (columns["age"] <= high)).astype(np.float64)
        columns["width"] = high - low
    return pd.DataFrame(columns, index=known.index)


def age_by_band(table: pd.DataFrame) -> pd.DataFrame:
    """The age scores of each age band.

    Args:
        table: Predictions.

    Returns:
        By band name: ``faces``, ``mae_years``, ``bias_years`` (mean of predicted - true), ``cs5`` (share within five
        years), and with an age distribution ``coverage`` (share inside the 90 % interval) and ``width_years`` (mean).
    """
    return _age_summary(age_errors(table), list(AGE_BANDS), [first for first, _ in AGE_BANDS.values()])


def age_by_years(table: pd.DataFrame) -> pd.DataFrame:
    """The same for every ``AGE_BIN`` years of true age; the index is the middle of each."""
    errors = age_errors(table)
    firsts = list(range(0, int(errors["age"].max()) + 1, AGE_BIN)) if len(errors) else [0]
    return _age_summary(errors, [first + (AGE_BIN - 1) / 2 for first in firsts], firsts)


def _age_summary(errors: pd.DataFrame, names: Sequence[str] | Sequence[float], firsts: list[int]) -> pd.DataFrame:
    band = np.searchsorted(firsts, errors["age"], "right") - 1
    means = {
        "mae_years": errors["error"].abs(),
        "bias_years": errors["error"],
        "cs5": (errors["error"].abs() <= YEARS).astype(np.float64),
    }
    if "covered" in errors:
        means |= {"coverage": errors["covered"], "width_years": errors["width"]}
    summary = pd.DataFrame(means).groupby(band).mean().reindex(range(len(names)))
    summary.insert(0, "faces", np.bincount(band, minlength=len(names)))
    return summary.set_axis(pd.Index(names))


def cumulative_score(table: pd.DataFrame) -> pd.Series:
    """The share of faces whose age is at most 0, 1, ... ``CUMULATIVE_YEARS`` years off, by those years."""
    off = age_errors(table)["error"].abs().to_numpy()
    years = np.arange(CUMULATIVE_YEARS + 1)
    return pd.Series((off[:, None] <= years).sum(0) / max(1, len(off)), index=years)


def duplicates(faces: pd.DataFrame) -> dict[str, int]:
    """Counts byte-identical faces.

    Args:
        faces: With ``sha1`` and the labels; ``split`` if it has one.

    Returns:
        ``copies`` (faces that are byte-identical to another), ``groups`` of them, groups ``disagreeing`` about a label,
        and groups ``crossing`` parts of the split.
    """
    copies = faces[faces["sha1"].duplicated(keep=False)]
    groups = copies.groupby("sha1")
    disagreeing = (groups[["gender", "race", "age"]].nunique() > 1).any(axis=1)
    crossing = groups["split"].nunique() > 1
    return {
        "copies": len(copies),
        "groups": int(groups.ngroups),
        "disagreeing": int(disagreeing.sum()),
        "crossing": int(crossing.sum()),
    }


def tested_tasks(table: pd.DataFrame) -> list[Task]:
    """The tasks that have predictions and labels to compare them with."""
    return [task for task in TASKS if len(labelled(table, task))]


def why_untested(table: pd.DataFrame, task: Task) -> str:
    """Why there are no numbers about a task."""
    if f"{task}_predicted" not in table:
        return f"The model was not trained for {task}, so there is nothing to say about it."
    return f"None of the tested faces has a label of {task}, so there is nothing to compare the predictions with."


def parts(faces: pd.DataFrame) -> dict[str, int]:
    """How many faces each part of the split has, those that it has, training first."""
    counts = faces["split"].value_counts()
    return {name: int(counts[name]) for name in ("train", "val", "test", "holdout") if name in counts}
