"""Calibration: fitting temperatures, reliability, calibration error, and the coverage of age intervals."""

from functools import singledispatch
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from facecls.analysis.labels import Numbers, column_values
from facecls.data.parsing import MISSING
from facecls.data.tasks import Age, Classification, Task, Tasks

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]

BINS = 15
"""Number of equal-width confidence bins, as in Guo et al. 2017."""
TEMPERATURES = (0.05, 20.0)
"""Range searched for a temperature; Guo et al. 2017 report 0.6 to 3 across architectures."""
_HALVINGS = 40
"""Bisection steps, which determine the logarithm of the temperature to 1e-11."""


def fit_temperature(logits: Floats, labels: Integers) -> float:
    """Fits the temperature T that minimises the negative log likelihood of softmax(logits / T).

    See Guo et al. 2017 (arXiv:1706.04599), section 4.2. The loss is convex in 1 / T, so bisection on the sign of its
    slope finds the minimum.

    Args:
        logits: (N, C).
        labels: (N,) codes 0..C-1, or years of an age; ``MISSING`` where a face has none.

    Returns:
        A value within ``TEMPERATURES``. 1 where there is no minimum: without labels, and when no face has a logit above
        that of its label, so that lower temperatures are always more likely.

    Examples:
        >>> fit_temperature(np.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0]]), np.array([0, 0, 1])).__round__(2)
        5.77
    """
    known = labels != MISSING
    values = np.asarray(logits[known], np.float64)
    values = values - values.max(1, keepdims=True, initial=-np.inf)
    of_label = values[np.arange(len(values)), labels[known]]
    if not (of_label < 0).any():
        return 1.0
    low, high = (float(np.log(1 / temperature)) for temperature in reversed(TEMPERATURES))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        shares = np.exp(np.exp(middle) * values)
        slope = ((shares * values).sum(1) / shares.sum(1) - of_label).mean()  # of the loss, by 1 / T
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))


def uncalibrated(p: Floats, temperature: float) -> Numbers:
    """Undoes temperature scaling: softmax(z) from softmax(z / T).

    Args:
        p: (N, C) probabilities after scaling.
        temperature: T.

    Returns:
        (N, C) float64 probabilities before scaling.
    """
    logs = temperature * np.log(_positive(p))
    shares = np.exp(logs - logs.max(1, keepdims=True))
    return np.asarray(shares / shares.sum(1, keepdims=True))


def reliability(confidence: Floats, right: Floats, bins: int = BINS) -> pd.DataFrame:
    """Accuracy by confidence.

    Args:
        confidence: (N,) probability of the predicted class, 0..1.
        right: (N,) 1 or True where the prediction is right, else 0.
        bins: Number of equal-width bins. A bin includes its upper edge but not its lower one; the first includes 0.

    Returns:
        A row per bin: its edges ``low`` and ``high``, number of ``faces``, and their mean ``confidence`` and
        ``accuracy``, NaN for a bin without faces.
    """
    edges = np.linspace(0, 1, bins + 1)
    which = np.searchsorted(edges[1:-1], confidence)
    faces = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(which, weights=values, minlength=bins) / faces for values in (confidence, right)]
    return pd.DataFrame(
        {"low": edges[:-1], "high": edges[1:], "faces": faces, "confidence": means[0], "accuracy": means[1]}
    )


def expected_calibration_error(confidence: Floats, right: Floats, bins: int = BINS) -> float:
    """The mean distance between accuracy and confidence over bins, weighted by faces (ECE, Guo et al. 2017, eq. 3).

    Args:
        confidence: (N,) probability of the predicted class, 0..1.
        right: (N,) 1 or True where the prediction is right, else 0.
        bins: As for ``reliability``.

    Returns:
        0..1; NaN without faces.
    """
    if not len(confidence):
        return float("nan")
    table = reliability(confidence, right, bins)
    return float(((table.accuracy - table.confidence).abs() * table.faces).sum() / table.faces.sum())


def negative_log_likelihood(p: Floats, labels: Integers) -> float:
    """The mean of -log p(label), in nats.

    Args:
        p: (N, C) probabilities.
        labels: (N,) codes 0..C-1.

    Returns:
        0 or above; NaN without faces.
    """
    if not len(labels):
        return float("nan")
    return float(-np.log(_positive(p[np.arange(len(labels)), labels])).mean())


def class_probabilities(table: pd.DataFrame, task: Classification) -> tuple[Numbers, npt.NDArray[np.int64]]:
    """Probabilities, after temperature scaling, and labels of the faces that have a label.

    Args:
        table: Predictions of the task.
        task: The task.

    Returns:
        (N, C) probabilities, (N,) codes.
    """
    labels = column_values(table, task.name)
    known = ~np.isnan(labels)
    p = table.loc[known, list(task.probabilities)].to_numpy(np.float64)
    return p, labels[known].astype(np.int64)


def calibration_table(table: pd.DataFrame, tasks: Tasks) -> pd.DataFrame:
    """Calibration before and after temperature scaling.

    Args:
        table: Predictions.
        tasks: The tasks.

    Returns:
        Two rows per task that has a temperature and a labelled face: ``task`` (its name), ``stage`` (``before``,
        ``after``), ``faces`` (with a label), ``temperature`` (1 before); ``ece`` and ``nll`` for classifications;
        ``coverage`` (share of the ages within the 90 % interval, ends included) and ``width`` (its mean, in years) for
        ages; NaN where a column does not apply.
    """
    rows: list[dict[str, Any]] = []
    for name, task in tasks.items():
        if f"temperature_{name}" in table and table[name].notna().any():
            temperature = float(table[f"temperature_{name}"].iloc[0])
            before, after = _calibration(task, table, temperature)
            rows.append({"task": name, "stage": "before", "temperature": 1.0} | before)
            rows.append({"task": name, "stage": "after", "temperature": temperature} | after)
    columns = ["task", "stage", "faces", "temperature", "ece", "nll", "coverage", "width"]
    return pd.DataFrame(rows, columns=columns)


@singledispatch
def _calibration(task: Task, table: pd.DataFrame, temperature: float) -> list[dict[str, Any]]:
    """The measures of a task before and after scaling."""
    raise NotImplementedError(type(task))


@_calibration.register
def _class_calibration(task: Classification, table: pd.DataFrame, temperature: float) -> list[dict[str, Any]]:
    after, labels = class_probabilities(table, task)
    return [
        {
            "faces": len(labels),
            "ece": expected_calibration_error(p.max(1), (p.argmax(1) == labels).astype(np.float64)),
            "nll": negative_log_likelihood(p, labels),
        }
        for p in (uncalibrated(after, temperature), after)
    ]


@_calibration.register
def _age_calibration(task: Age, table: pd.DataFrame, temperature: float) -> list[dict[str, Any]]:
    ages = column_values(table, task.name)
    known = ~np.isnan(ages)
    stages: list[dict[str, Any]] = []
    for ending in ("_raw", ""):
        low, high = (column_values(table, f"{task.name}_{end}{ending}")[known] for end in ("low", "high"))
        inside = (low <= ages[known]) & (ages[known] <= high)
        stages.append(
            {"faces": int(known.sum()), "coverage": float(inside.mean()), "width": float((high - low).mean())}
        )
    return stages


def _positive(p: Floats) -> Numbers:
    return np.maximum(p, np.finfo(np.float32).tiny, dtype=np.float64)  # a float32 softmax can underflow to 0
