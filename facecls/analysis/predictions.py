"""Estimates of a model -> columns, and a table with one row per face: its labels beside its predictions."""

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from facecls.data.tasks import Age, Classification, Task, Tasks
from facecls.errors import UserError

Array = npt.NDArray[Any]

INTERVAL = (0.05, 0.95)
"""Quantiles of an age distribution that bound 90 % of its probability."""


@singledispatch
def estimate_columns(task: Task, estimates: Mapping[str, Array]) -> dict[str, Array]:
    """Turns the estimates of one task into columns.

    Args:
        task: The task.
        estimates: Of N faces, as ``FaceModel.estimate`` returns them; those of this task among them.

    Returns:
        (N,) by the names of ``prediction_columns``: under the name of the task the code of the most probable class
        (int16) or the age in years (float32); then probabilities, or the ends of the 90 % interval of an age (int16)
        if the model knows its distribution.

    Examples:
        >>> from facecls.data.tasks import UTKFACE
        >>> estimate_columns(UTKFACE["gender"], {"gender": np.array([[0.25, 0.75]])})
        {'gender': array([1], dtype=int16), 'p_male': array([0.25]), 'p_female': array([0.75])}
    """
    raise NotImplementedError(type(task))


@estimate_columns.register
def _class_columns(task: Classification, estimates: Mapping[str, Array]) -> dict[str, Array]:
    p = estimates[task.name]
    return {task.name: p.argmax(1).astype(np.int16)} | dict(zip(task.probabilities, p.T, strict=True))


@estimate_columns.register
def _age_columns(task: Age, estimates: Mapping[str, Array]) -> dict[str, Array]:
    columns = {task.name: estimates[task.name]}
    if (distribution := estimates.get(f"{task.name}_distribution")) is not None:
        columns[f"{task.name}_low"], columns[f"{task.name}_high"] = age_interval(distribution)
    return columns


def check_finite(estimates: Mapping[str, Array], paths: Sequence[str]) -> None:
    """Rejects estimates that are no numbers, which a sound model gives for no picture.

    Args:
        estimates: Of N faces, by name.
        paths: (N,) of the faces.

    Raises:
        UserError: If there is one, with its face.
    """
    for name, values in estimates.items():
        is_finite = np.isfinite(values).reshape(len(values), -1).all(1)
        if not is_finite.all():
            raise UserError(
                f"Expected finite predictions, but {name} of {paths[int(is_finite.argmin())]} is not; the weights of "
                "the model are damaged, or its training went astray: take another checkpoint or a lower learning rate."
            )


def predictions_table(
    faces: pd.DataFrame, estimates: Mapping[str, Array], temperatures: Mapping[str, float], tasks: Tasks
) -> pd.DataFrame:
    """Puts labels and predictions side by side.

    Args:
        faces: N rows with ``path``, ``sha1``, ``split`` and the label columns of the tasks.
        estimates: Of the N faces, as ``FaceModel.estimate`` returns them.
        temperatures: By task; the estimates are those after scaling.
        tasks: The tasks that faces are labelled with; the model need not have learned all of them.

    Returns:
        N rows with the columns above; then for each predicted task the columns of ``estimate_columns``, its own as
        ``<task>_predicted``; for tasks with a distribution ``temperature_<task>``, the same in each row, and for ages
        ``<task>_low_raw`` and ``<task>_high_raw``, the interval before temperature scaling.
    """
    labels = [column for task in tasks.values() for column in task.columns if column in faces]
    columns: dict[str, Any] = {}
    for name, task in tasks.items():
        if name in estimates:
            values = estimate_columns(task, estimates)
            columns |= {f"{name}_predicted": values.pop(name)} | values
            columns |= _scaling_columns(task, estimates, temperatures[name])
    return faces[["path", "sha1", "split", *labels]].reset_index(drop=True).assign(**columns)


@singledispatch
def _scaling_columns(task: Task, estimates: Mapping[str, Array], temperature: float) -> dict[str, Any]:
    """What is needed to compare predictions with those before temperature scaling."""
    raise NotImplementedError(type(task))


@_scaling_columns.register
def _class_scaling(task: Classification, estimates: Mapping[str, Array], temperature: float) -> dict[str, Any]:
    return {f"temperature_{task.name}": temperature}


@_scaling_columns.register
def _age_scaling(task: Age, estimates: Mapping[str, Array], temperature: float) -> dict[str, Any]:
    if (distribution := estimates.get(f"{task.name}_distribution")) is None:
        return {}
    low, high = age_interval(distribution.astype(np.float64) ** temperature)
    return {f"{task.name}_low_raw": low, f"{task.name}_high_raw": high, f"temperature_{task.name}": temperature}


def age_interval(distribution: Array) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int16]]:
    """The ages that bound 90 % of each distribution.

    Args:
        distribution: (N, A) weights of the ages from 0 up, of any positive sum.

    Returns:
        (N,) and (N,) years: the 5 % and the 95 % quantile.

    Examples:
        >>> age_interval(np.array([[1, 8, 90, 1]]))
        (array([1], dtype=int16), array([2], dtype=int16))
    """
    cumulated = distribution.cumsum(1, dtype=np.float64)
    cumulated /= cumulated[:, -1:]
    low, high = ((cumulated < share).sum(1).astype(np.int16) for share in INTERVAL)
    return low, high
