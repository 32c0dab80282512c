"""Whether probabilities mean what they say: temperatures, reliability, calibration error, coverage of age intervals."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from facecls.analysis.scores import Numbers, task_labels
from facecls.data.tasks import CLASSES, MISSING, Task

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]

BINS = 15
"""Of confidence, of equal width, as in Guo et al. 2017."""
TEMPERATURES = (0.05, 20.0)
"""Between these a temperature is looked for; Guo et al. 2017 report 0.6 to 3 for networks of all kinds."""
_HALVINGS = 40
"""Of the interval in which the temperature lies: to 1e-11 of its logarithm."""


def fit_temperature(logits: Floats, labels: Integers) -> float:
    """The temperature T that makes softmax(logits / T) most likely (Guo et al. 2017, arXiv:1706.04599, section 4.2).

    The negative log likelihood is convex in 1 / T, so halving an interval by the sign of its slope finds the minimum.
    Classes of age are its years.

    Args:
        logits: (N, C).
        labels: (N,) codes 0..C-1; faces with ``MISSING`` count for nothing.

    Returns:
        Within ``TEMPERATURES``. 1 where there is no minimum: without a label, and when no face has a logit above that
        of its label, since then any lower temperature would be likelier still.
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
    """The probabilities before temperature scaling, from those after it: softmax(z) from softmax(z / T).

    Args:
        p: (N, C) probabilities.
        temperature: T.

    Returns:
        (N, C) float64 probabilities.
    """
    logs = temperature * np.log(_positive(p))
    shares = np.exp(logs - logs.max(1, keepdims=True))
    return np.asarray(shares / shares.sum(1, keepdims=True))


def reliability(confidence: Floats, right: Floats, bins: int = BINS) -> pd.DataFrame:
    """How often predictions of each confidence are right.

    Args:
        confidence: (N,) probability of the predicted class, 0..1.
        right: (N,) 1 or True where the prediction is right, else 0.
        bins: How many, of equal width; a bin has its upper edge, not its lower one, and the first has 0.

    Returns:
        A row per bin: its edges ``low`` and ``high``, how many ``faces``, and their mean ``confidence`` and
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
    """The mean distance of accuracy from confidence over the bins, weighted by their faces (Guo et al. 2017, eq. 3).

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
        0 and more; NaN without faces.
    """
    if not len(labels):
        return float("nan")
    return float(-np.log(_positive(p[np.arange(len(labels)), labels])).mean())


def class_probabilities(table: pd.DataFrame, task: Task) -> tuple[Numbers, npt.NDArray[np.int64]]:
    """The calibrated probabilities and labels of the faces that have a label.

    Args:
        table: Predictions, of gender or race.
        task: ``gender`` or ``race``.

    Returns:
        (N, C) probabilities, (N,) codes.
    """
    labels = task_labels(table, task)
    known = ~np.isnan(labels)
    p = table.loc[known, [f"p_{name}" for name in CLASSES[task]]].to_numpy(np.float64)
    return p, labels[known].astype(np.int64)


def calibration_table(table: pd.DataFrame) -> pd.DataFrame:
    """Calibration before and after temperature scaling.

    Args:
        table: Predictions.

    Returns:
        Two rows per task that has probabilities and a labelled face: ``task``, ``stage`` (``before``, ``after``),
        ``faces`` (with a label), ``temperature`` (1 before); ``ece`` and ``nll`` for gender and race; ``coverage``
        (share of the ages within the 90 % interval, its ends included) and ``width`` (its mean, years) for age; NaN
        for what a task does not have.
    """
    rows: list[dict[str, Any]] = []
    for task in CLASSES:
        if f"temperature_{task}" in table and table[task].notna().any():
            p, labels = class_probabilities(table, task)
            temperature = float(table[f"temperature_{task}"].iloc[0])
            rows.append(_of_classes(uncalibrated(p, temperature), labels) | _stage(task, "before", 1.0))
            rows.append(_of_classes(p, labels) | _stage(task, "after", temperature))
    if "temperature_age" in table and table["age"].notna().any():
        temperature = float(table["temperature_age"].iloc[0])
        rows.append(_of_ages(table, "_raw") | _stage("age", "before", 1.0))
        rows.append(_of_ages(table, "") | _stage("age", "after", temperature))
    columns = ["task", "stage", "faces", "temperature", "ece", "nll", "coverage", "width"]
    return pd.DataFrame(rows, columns=columns)


def _stage(task: Task, stage: str, temperature: float) -> dict[str, Any]:
    return {"task": task, "stage": stage, "temperature": temperature}


def _of_classes(p: Numbers, labels: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {
        "faces": len(labels),
        "ece": expected_calibration_error(p.max(1), (p.argmax(1) == labels).astype(np.float64)),
        "nll": negative_log_likelihood(p, labels),
    }


def _of_ages(table: pd.DataFrame, ending: str) -> dict[str, Any]:
    ages = task_labels(table, "age")
    known = ~np.isnan(ages)
    low, high = (table[f"age_{end}{ending}"].to_numpy(np.float64)[known] for end in ("low", "high"))
    inside = (low <= ages[known]) & (ages[known] <= high)
    return {"faces": int(known.sum()), "coverage": float(inside.mean()), "width": float((high - low).mean())}


def _positive(p: Floats) -> Numbers:
    return np.maximum(p, np.finfo(np.float32).tiny, dtype=np.float64)  # a float32 softmax can underflow to 0
