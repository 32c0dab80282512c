"""Calibration against scikit-learn and SciPy, and against planted temperatures."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from simulated_predictions import FAIRFACE, simulated, simulated_labels, without_some_labels
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from facecls.analysis.calibration import (
    calibration_table,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    uncalibrated,
)
from facecls.data.parsing import MISSING
from facecls.data.tasks import UTKFACE, Tasks, classifications


def drawn(faces: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from their softmax: calibrated at temperature 1."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (faces, classes))
    return logits, (logits + rng.gumbel(size=logits.shape)).argmax(1)


@pytest.mark.parametrize("classes", [2, 5, 117])
@pytest.mark.parametrize("planted", [0.6, 1.0, 2.5])
def test_a_planted_temperature_is_found(classes: int, planted: float) -> None:
    logits, labels = drawn(5000, classes, seed=classes)
    found = fit_temperature((planted * logits).astype(np.float32), labels)
    assert found == pytest.approx(planted, rel=0.05)


@pytest.mark.parametrize("classes", [2, 5, 117])
def test_the_temperature_is_where_scipy_finds_the_minimum_of_scikit_learns_loss(classes: int) -> None:
    logits, labels = drawn(300, classes, seed=1)
    logits *= 3
    wanted = minimize_scalar(
        lambda log: log_loss(labels, softmax(logits / np.exp(log), 1), labels=range(classes)),
        bounds=(-3, 3),
        method="bounded",
        options={"xatol": 1e-8},
    )
    assert fit_temperature(logits, labels) == pytest.approx(np.exp(wanted.x), rel=1e-4)


def test_faces_without_a_label_do_not_move_the_temperature() -> None:
    logits, labels = drawn(200, 5, seed=2)
    some = np.where(np.arange(200) % 3 == 0, MISSING, labels)
    assert fit_temperature(logits, some) == fit_temperature(logits[some != MISSING], labels[some != MISSING])


def test_without_a_minimum_nothing_is_fitted() -> None:
    logits, _ = drawn(50, 5, seed=3)
    assert fit_temperature(logits, logits.argmax(1)) == 1  # all right: the colder, the likelier
    assert fit_temperature(logits, np.full(50, MISSING)) == 1
    assert fit_temperature(logits[:0], np.zeros(0, np.int64)) == 1
    assert fit_temperature(logits, logits.argmin(1)) == pytest.approx(20)  # all wrong: the hotter, the likelier
    assert fit_temperature(np.array([[1e4, -1e4], [0.0, 30.0]]), np.array([0, 0])) == pytest.approx(20)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_uncalibrated_undoes_the_temperature(temperature: float) -> None:
    logits, _ = drawn(100, 5, seed=4)
    p = softmax(logits / temperature, 1).astype(np.float32)
    assert uncalibrated(p, temperature) == pytest.approx(softmax(logits, 1), rel=1e-5)


def test_uncalibrated_survives_probabilities_of_zero() -> None:
    found = uncalibrated(np.array([[1, 0], [0.5, 0.5]], np.float32), 20.0)
    assert found == pytest.approx(np.array([[1, 0], [0.5, 0.5]]))


def test_reliability_is_scikit_learns_curve() -> None:
    rng = np.random.default_rng(5)
    confidence = np.append(rng.beta(3, 1, 500), [0, 1 / 15, 0.4, 1])  # edges too
    confidence = confidence[(confidence < 0.7) | (confidence > 0.8)]  # an empty bin
    right = rng.random(len(confidence)) < confidence**2
    found = reliability(confidence, right)
    accuracy, mean = calibration_curve(right, confidence, n_bins=15)
    full = found.faces > 0
    assert 0 < (~full).sum() < 15
    assert found.accuracy[full].to_numpy() == pytest.approx(accuracy)
    assert found.confidence[full].to_numpy() == pytest.approx(mean)
    assert found.loc[~full, ["accuracy", "confidence"]].isna().all(axis=None)
    assert found.faces.sum() == len(confidence)
    inside = [((found.low[b] < confidence) & (confidence <= found.high[b])).sum() for b in range(1, 15)]
    assert found.faces[1:].to_list() == inside
    wanted = np.average(np.abs(accuracy - mean), weights=found.faces[full])
    assert expected_calibration_error(confidence, right) == pytest.approx(wanted)


def test_calibration_error_of_a_case_done_by_hand() -> None:
    confidence, right = np.array([0.9, 0.9, 0.9, 0.9, 0.3]), np.array([1, 1, 0, 1, 0])
    assert expected_calibration_error(confidence, right, bins=2) == pytest.approx((4 * 0.15 + 0.3) / 5)


def test_likelihood_is_scikit_learns_loss() -> None:
    logits, labels = drawn(200, 5, seed=6)
    p = softmax(logits, 1)
    assert negative_log_likelihood(p, labels) == pytest.approx(log_loss(labels, p))
    assert np.isfinite(negative_log_likelihood(np.array([[1.0, 0.0]]), np.array([1])))


def test_no_face_has_no_calibration() -> None:
    none = np.zeros(0)
    assert np.isnan(expected_calibration_error(none, none))
    assert np.isnan(negative_log_likelihood(np.zeros((0, 2)), np.zeros(0, np.int64)))


def overconfident(planted: dict[str, float], tasks: Tasks = UTKFACE) -> pd.DataFrame:
    """Predictions whose logits were too large by the planted temperatures, which have been fitted."""
    table = simulated_labels(5000, 7, tasks)
    for task in classifications(tasks.values()):
        name, classes = task.name, len(task.classes)
        logits, labels = drawn(5000, classes, seed=classes + 10)
        temperature = fit_temperature(logits * planted[name], labels)
        p = softmax(logits * planted[name] / temperature, 1).astype(np.float32)
        table[name] = pd.array(labels, dtype="Int16")
        table[f"{name}_predicted"] = p.argmax(1)
        table[list(task.probabilities)] = p
        table[f"temperature_{name}"] = temperature
    return table


@pytest.mark.parametrize("tasks", [UTKFACE, FAIRFACE], ids=["utkface", "seven races and glasses"])
def test_planted_overconfidence_is_shown_before_and_gone_after(tasks: Tasks) -> None:
    planted = {name: value for name, value in {"gender": 2.0, "race": 3.0, "glasses": 2.5}.items() if name in tasks}
    table = overconfident(planted, tasks)
    found = calibration_table(without_some_labels(table, 8, tasks), tasks).set_index(["task", "stage"])
    assert found.index.to_list() == [(task, stage) for task in planted for stage in ("before", "after")]
    whole = calibration_table(table, tasks).set_index(["task", "stage"])
    for task in classifications(tasks.values()):
        temperature, classes = planted[task.name], len(task.classes)
        before, after = found.loc[(task.name, "before")], found.loc[(task.name, "after")]
        assert (before.temperature, after.temperature) == (1, pytest.approx(temperature, rel=0.05))
        assert after.ece < 0.025
        assert after.nll < before.nll
        assert np.isnan([before.coverage, after.width]).all()
        logits, labels = drawn(5000, classes, seed=classes + 10)
        stated, true = softmax(logits * temperature, 1), softmax(logits, 1)
        of_all = whole.loc[(task.name, "before")]
        assert of_all.nll == pytest.approx(log_loss(labels, stated), rel=1e-4)
        # stated confidence is too high in every bin, so the mean excess over the true one is the expected error
        assert of_all.ece == pytest.approx((stated.max(1) - true.max(1)).mean(), abs=0.02)
        assert (of_all.faces, before.faces) == (5000, pytest.approx(4000, rel=0.05))


def test_coverage_counts_ages_on_the_ends_and_not_those_without_a_label() -> None:
    table = simulated(5, 9).assign(
        age=pd.array([10, 30, 31, pd.NA, 9], dtype="Int16"),
        age_low=np.int16(10),
        age_high=np.int16(30),
        age_low_raw=np.array([15, 30, 15, 15, 5], np.int16),
        age_high_raw=np.array([20, 35, 20, 90, 9], np.int16),
        temperature_age=1.7,
    )
    found = calibration_table(table, UTKFACE)
    assert found[["task", "stage", "faces", "temperature", "coverage", "width"]].to_numpy().tolist() == [
        ["age", "before", 4, 1.0, 0.5, pytest.approx(4.75)],
        ["age", "after", 4, 1.7, 0.5, 20.0],
    ]


def test_tasks_without_probabilities_or_labels_have_no_rows() -> None:
    table = overconfident({"gender": 2.0, "race": 2.0})
    one = table.drop(columns=["temperature_race", "race_predicted", *UTKFACE["race"].probabilities])
    assert calibration_table(one, UTKFACE).task.to_list() == ["gender", "gender"]
    assert calibration_table(one.assign(gender=pd.array([pd.NA] * 5000, dtype="Int16")), UTKFACE).empty
    assert calibration_table(table[:1], UTKFACE).nll.notna().all()
    assert calibration_table(table[:0], UTKFACE).empty
