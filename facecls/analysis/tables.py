"""The numbers behind the figures: predictions -> small tables."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torchmetrics.functional.classification import binary_roc, multiclass_confusion_matrix

from facecls.analysis.groups import report_bands
from facecls.analysis.labels import label_ends
from facecls.analysis.scores import YEARS
from facecls.data.tasks import Age, Classification, Task, Tasks

_Floats = npt.NDArray[np.float64]

CUMULATIVE_YEARS = 15
"""Largest error on the cumulative score curve, as in papers on age (Geng et al. 2007, doi:10.1109/TPAMI.2007.70733)."""
AGE_BIN = 5
"""Width in years of the bins of true age in ``age_by_years``."""


class Roc(NamedTuple):
    """A receiver operating characteristic.

    Attributes:
        false_positive: (P,) ascending, 0..1.
        true_positive: (P,) ascending, 0..1.
        area: Area under the curve, 0..1.
    """

    false_positive: _Floats
    true_positive: _Floats
    area: float


def labelled(table: pd.DataFrame, task: Task) -> pd.DataFrame:
    """The faces that have a prediction and a label of a task, other than a range of ages."""
    if f"{task.name}_predicted" not in table:
        return table.iloc[:0]
    return table[table[task.name].notna() & table[f"{task.name}_predicted"].notna()]


def confusion(table: pd.DataFrame, task: Classification) -> pd.DataFrame:
    """Counts faces by label (rows) and prediction (columns).

    Args:
        table: Predictions.
        task: The task.

    Returns:
        (C, C) int, by names of classes in the order of their codes.
    """
    known, classes = labelled(table, task), list(task.classes)
    labels, predicted = (
        torch.tensor(known[column].to_numpy(np.int64)) for column in (task.name, f"{task.name}_predicted")
    )
    counts = multiclass_confusion_matrix(predicted, labels, len(classes))
    return pd.DataFrame(counts.numpy(), index=classes, columns=classes)


def class_scores(table: pd.DataFrame, task: Classification) -> pd.DataFrame:
    """Precision, recall and F1 of each class.

    Args:
        table: Predictions.
        task: The task.

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
    return pd.DataFrame(columns, index=list(task.classes))


def roc(table: pd.DataFrame, task: Classification) -> Roc | None:
    """How well the probability of the second class separates two classes, at every threshold.

    Args:
        table: Predictions.
        task: The task.

    Returns:
        The curve, from (0, 0) to (1, 1); ``None`` unless there are two classes, with faces of both.
    """
    known = labelled(table, task)
    labels = known[task.name].to_numpy(np.int64)
    if len(task.classes) != 2 or len(set(labels.tolist())) < 2:
        return None
    scores = torch.tensor(known[task.probabilities[1]].to_numpy(np.float64))
    false, true, _ = (values.numpy().astype(np.float64) for values in binary_roc(scores, torch.tensor(labels)))
    return Roc(false, true, float(np.trapezoid(true, false)))


def age_errors(table: pd.DataFrame, task: Age) -> pd.DataFrame:
    """Errors of the faces with a prediction and an age in years.

    Args:
        table: Predictions.
        task: The task.

    Returns:
        ``age``, ``predicted`` and ``error`` (predicted - age), years; with an age distribution also ``covered`` (the
        age lies in the 90 % interval) and ``width`` of that interval in years.
    """
    known, name = labelled(table, task), task.name
    columns = {"age": known[name].to_numpy(np.float64), "predicted": known[f"{name}_predicted"].to_numpy(np.float64)}
    columns["error"] = columns["predicted"] - columns["age"]
    if f"{name}_low" in known:
        low, high = (known[f"{name}_{end}"].to_numpy(np.float64) for end in ("low", "high"))
        columns["covered"] = ((low <= columns["age"]) & (columns["age"] <= high)).astype(np.float64)
        columns["width"] = high - low
    return pd.DataFrame(columns, index=known.index)


def age_by_band(table: pd.DataFrame, task: Age) -> pd.DataFrame:
    """The age scores of each report band.

    Args:
        table: Predictions.
        task: The task.

    Returns:
        By band name: ``faces``, ``mae_years``, ``bias_years`` (mean of predicted - true), ``cs5`` (share within five
        years), and with an age distribution ``coverage`` (share inside the 90 % interval) and ``width_years`` (mean).
    """
    bands = report_bands(task)
    return _age_summary(age_errors(table, task), list(bands), [first for first, _ in bands.values()])


def age_by_years(table: pd.DataFrame, task: Age) -> pd.DataFrame:
    """The same as ``age_by_band`` for every ``AGE_BIN`` years of true age, by the middle of each bin."""
    errors = age_errors(table, task)
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


def cumulative_score(table: pd.DataFrame, task: Age) -> pd.Series:
    """The share of faces whose age is at most 0, 1, ... ``CUMULATIVE_YEARS`` years off, by those years."""
    off = age_errors(table, task)["error"].abs().to_numpy()
    years = np.arange(CUMULATIVE_YEARS + 1)
    return pd.Series((off[:, None] <= years).sum(0) / max(1, len(off)), index=years)


def duplicates(faces: pd.DataFrame, tasks: Tasks) -> dict[str, int]:
    """Counts byte-identical faces.

    Args:
        faces: With ``sha1``, ``split`` and labels.
        tasks: The tasks.

    Returns:
        ``faces`` (those that are byte-identical to another), ``groups`` of them, groups ``disagreeing`` about a label,
        and groups ``crossing`` parts of the split.
    """
    same = faces[faces["sha1"].duplicated(keep=False)]
    groups = same.groupby("sha1")
    disagrees = np.zeros(groups.ngroups, np.bool_)
    for task in tasks.values():
        low, high = (pd.Series(ends, same.index).groupby(same["sha1"]) for ends in label_ends(same, task))
        disagrees |= (low.max() > high.min()).to_numpy()  # ranges that overlap do not contradict each other
    return {
        "faces": len(same),
        "groups": int(groups.ngroups),
        "disagreeing": int(disagrees.sum()),
        "crossing": int((groups["split"].nunique() > 1).sum()),
    }


def tested_tasks(table: pd.DataFrame, tasks: Tasks) -> list[Task]:
    """The tasks that have predictions and labels, ranges of ages included."""
    return [
        task
        for name, task in tasks.items()
        if f"{name}_predicted" in table and not np.isnan(label_ends(table, task)[0]).all()
    ]


def parts(faces: pd.DataFrame) -> dict[str, int]:
    """Number of faces in each part of the split, without empty parts, training first."""
    counts = faces["split"].value_counts()
    return {name: int(counts[name]) for name in ("train", "val", "test", "holdout") if name in counts}
