"""Labels and predictions of a table, as numbers and as text."""

import numpy as np
import numpy.typing as npt
import pandas as pd

from facecls.data.tasks import Task

Numbers = npt.NDArray[np.float64]
"""Any array of float64."""


def column_values(table: pd.DataFrame, column: str) -> Numbers:
    """A column as numbers.

    Args:
        table: N rows.
        column: Its name; the table need not have it.

    Returns:
        (N,) float64, NaN where the column is NA or absent.
    """
    if column not in table:
        return np.full(len(table), np.nan)
    return np.asarray(table[column].astype("Float64").to_numpy(na_value=np.nan), np.float64)


def label_ends(table: pd.DataFrame, task: Task) -> tuple[Numbers, Numbers]:
    """The lowest and the highest value that each label allows; they differ only for ranges of ages.

    Args:
        table: N faces with labels.
        task: The task.

    Returns:
        (N,) and (N,) codes or years, NaN without a label.

    Examples:
        >>> from facecls.data.tasks import UTKFACE
        >>> faces = pd.DataFrame({"age": [34, None], "age_from": [None, 20], "age_to": [None, 29]})
        >>> label_ends(faces, UTKFACE["age"])
        (array([34., 20.]), array([34., 29.]))
    """
    label, *ends = (column_values(table, column) for column in task.columns)
    first, last = ends or (label, label)
    return np.where(np.isnan(label), first, label), np.where(np.isnan(label), last, label)


def label_texts(table: pd.DataFrame, task: Task) -> list[str | None]:
    """The labels in words, such as ``female``, ``34``, ``20-29`` or ``70+``; ``None`` without a label."""
    return [
        None if np.isnan(low) else task.text(low) if low == high else task.range_text(low, high)
        for low, high in zip(*label_ends(table, task), strict=True)
    ]


def prediction_texts(table: pd.DataFrame, task: Task) -> list[str | None]:
    """The predictions in words, such as ``female`` or ``34``; ``None`` without a prediction."""
    return [
        None if np.isnan(value) else task.text(round(value))
        for value in column_values(table, f"{task.name}_predicted").tolist()
    ]
