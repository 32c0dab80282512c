"""One row per face: its truth, its probabilities, its estimated age and how far that spreads."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from facecls.data.tasks import CLASSES, TASKS, Task

INTERVAL = (0.05, 0.95)
"""Quantiles of the age distribution between which 90 % of its probability lies."""


def predictions_table(
    faces: pd.DataFrame, estimates: Mapping[str, np.ndarray], temperatures: Mapping[Task, float]
) -> pd.DataFrame:
    """Puts truth and estimates side by side.

    Args:
        faces: N rows with ``path``, ``sha1``, ``split``, ``gender``, ``race`` and ``age``.
        estimates: ``gender`` (N, 2) and ``race`` (N, 5) probabilities, ``age`` (N,) years and ``age_distribution``
            (N, 117), those that the model has.
        temperatures: By task; the estimates already follow from them.

    Returns:
        N rows with the columns above; per task ``<task>_predicted`` (a code, or years); ``p_<class>`` for each gender
        and race; ``age_low`` and ``age_high``, between which 90 % of the age distribution lies, ``age_low_raw`` and
        ``age_high_raw`` the same before its temperature; ``temperature_<task>``, the same in each row.
    """
    table = faces[["path", "sha1", "split", *TASKS]].reset_index(drop=True)
    for task, names in CLASSES.items():
        if task in estimates:
            table[f"{task}_predicted"] = estimates[task].argmax(1).astype(np.int16)
            for code, name in enumerate(names):
                table[f"p_{name}"] = estimates[task][:, code]
            table[f"temperature_{task}"] = temperatures[task]
    if "age" in estimates:
        table["age_predicted"] = estimates["age"]
    if "age_distribution" in estimates:
        distribution = estimates["age_distribution"]
        table["age_low"], table["age_high"] = age_interval(distribution)
        raw = distribution.astype(np.float64) ** temperatures["age"]
        table["age_low_raw"], table["age_high_raw"] = age_interval(raw)
        table["temperature_age"] = temperatures["age"]
    return table


def age_interval(distribution: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ages between which 90 % of each distribution lies.

    Args:
        distribution: (N, 117) shares of the ages 0..116, of any positive sum.

    Returns:
        (N,) and (N,) int16 years: the 5 % and the 95 % quantile.
    """
    cumulated = distribution.cumsum(1, dtype=np.float64)
    cumulated /= cumulated[:, -1:]
    low, high = ((cumulated < share).sum(1).astype(np.int16) for share in INTERVAL)
    return low, high
