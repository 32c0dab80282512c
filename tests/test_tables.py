"""Small tables and columns of predictions against scikit-learn, NumPy and cases done by hand."""

import numpy as np
import pandas as pd
import pytest
from simulated_predictions import FAIRFACE, simulated, simulated_labels, with_ranges, without_some_labels
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score, roc_curve

from facecls.analysis import tables
from facecls.analysis.labels import column_values, label_texts, prediction_texts
from facecls.analysis.predictions import age_interval, estimate_columns, predictions_table
from facecls.analysis.tables import (
    age_by_band,
    age_by_years,
    age_errors,
    class_scores,
    confusion,
    cumulative_score,
    duplicates,
    parts,
    roc,
)
from facecls.data.tasks import UTKFACE, Age, Classification, classifications
from facecls.report.sections.untested import untested

AGE = Age("age")


@pytest.mark.parametrize("task", classifications(FAIRFACE.values()), ids=lambda task: task.name)
def test_classes_are_counted_as_scikit_learn_counts_them(task: Classification) -> None:
    table = without_some_labels(simulated(500, 1, FAIRFACE), 1, FAIRFACE)
    known = table.dropna(subset=task.name)
    pair = known[task.name].to_numpy(int), known[f"{task.name}_predicted"].to_numpy(int)
    counts = confusion(table, task)
    assert counts.to_numpy().tolist() == confusion_matrix(*pair).tolist()
    assert tuple(counts.index) == tuple(counts.columns) == task.classes
    found = class_scores(table, task)
    for column, wanted in zip(
        ("precision", "recall", "f1", "faces"), precision_recall_fscore_support(*pair), strict=True
    ):
        assert found[column].to_numpy() == pytest.approx(wanted)
    assert confusion(table[:0], task).to_numpy().sum() == 0


@pytest.mark.parametrize("task", [FAIRFACE["gender"], FAIRFACE["glasses"]], ids=["gender", "glasses"])
def test_the_curve_is_scikit_learns_for_any_two_classes(task: Classification) -> None:
    rng = np.random.default_rng(2)
    table = without_some_labels(simulated(800, 2, FAIRFACE), 2, FAIRFACE)
    p = (1 / (1 + np.exp(-rng.normal(2 * column_values(table, task.name) - 1, 1.5)))).round(2)  # with ties
    p = np.nan_to_num(p, nan=0.5).astype(np.float32)
    table = table.assign(**dict(zip(task.probabilities, (1 - p, p), strict=True)))
    known = table.dropna(subset=task.name)
    labels, scores = known[task.name].to_numpy(int), known[task.probabilities[1]]
    found = roc(table, task)
    assert found is not None
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert found.false_positive == pytest.approx(false, abs=1e-6)
    assert found.true_positive == pytest.approx(true, abs=1e-6)
    assert found.area == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert roc(known[labels == 1], task) is None
    assert roc(table, FAIRFACE["race"]) is None


def test_ages_are_summarised_by_band_and_by_years() -> None:
    table = without_some_labels(simulated(800, 3), 3)
    table = with_ranges(table, np.arange(800) % 4 == 0)  # they count nowhere here
    known = table.dropna(subset="age")
    error = known.age_predicted.to_numpy(float) - known.age.to_numpy(float)
    assert age_errors(table, AGE).error.to_numpy() == pytest.approx(error)
    bands = age_by_band(table, AGE)
    assert list(bands.index) == ["0-9", "10-19", "20-29", "30-39", "40-59", "60+"]
    inside = known.age.between(40, 59).to_numpy(bool)
    wanted = [inside.sum(), abs(error[inside]).mean(), error[inside].mean(), (abs(error[inside]) <= 5).mean()]
    assert bands.loc["40-59"].to_list() == pytest.approx(wanted)
    years = age_by_years(table, AGE)
    assert years.faces.sum() == bands.faces.sum() == len(known)
    inside = known.age.between(30, 34).to_numpy(bool)
    assert years.loc[32.0, "mae_years"] == pytest.approx(abs(error[inside]).mean())
    shares = cumulative_score(table, AGE)
    assert shares.to_list() == pytest.approx([(abs(error) <= off).mean() for off in range(16)])


def test_byte_identical_faces_are_counted() -> None:
    labels = simulated_labels(8, 4, FAIRFACE).assign(gender=0, race=1, glasses=0, age=30)
    labels["sha1"] = [*"aabbcc", "d", "e"]
    labels["split"] = ["train", "test", "train", "train", "val", "val", "test", "test"]
    counts = {"faces": 6, "groups": 3, "crossing": 1}
    assert duplicates(labels, FAIRFACE) == counts | {"disagreeing": 0}
    labels["glasses"] = [0, 1, 0, 0, 0, 0, 1, 0]
    assert duplicates(labels, FAIRFACE) == counts | {"disagreeing": 1}
    assert duplicates(labels, UTKFACE) == counts | {"disagreeing": 0}
    labels["age"] = pd.array([30, 30, 30, None, None, None, 1, 2], "Int16")
    labels["age_from"] = pd.array([None, None, None, 20, 20, 25, None, None], "Int16")
    labels["age_to"] = pd.array([None, None, None, 29, 29, 32, None, None], "Int16")
    assert duplicates(labels, UTKFACE) == counts | {"disagreeing": 1}  # 30 and 20-29; not 20-29 and 25-32
    assert duplicates(labels[6:], UTKFACE) == dict.fromkeys(("faces", "groups", "disagreeing", "crossing"), 0)
    assert parts(labels) == {"train": 3, "val": 2, "test": 3}


def test_tasks_are_tested_with_labels_of_any_kind() -> None:
    table = simulated(20, 5).drop(columns="race_predicted")
    assert tables.tested_tasks(table, UTKFACE) == [UTKFACE["gender"], UTKFACE["age"]]
    assert tables.tested_tasks(with_ranges(table), UTKFACE) == [UTKFACE["gender"], UTKFACE["age"]]
    none = table.assign(age=pd.array([None] * 20, "Int16"))
    assert tables.tested_tasks(none, UTKFACE) == [UTKFACE["gender"]]
    assert "was not trained for race" in untested(table, UTKFACE["race"]).text
    assert "None of the tested faces is labelled for age" in untested(none, AGE).text


def test_labels_and_predictions_in_words() -> None:
    table = pd.DataFrame(
        {
            "race": pd.array([3, None, 0], "Int16"),
            "age": pd.array([34, None, None], "Int16"),
            "age_from": pd.array([None, 20, None], "Int16"),
            "age_to": pd.array([None, 29, None], "Int16"),
            "age_predicted": [34.6, -0.2, np.nan],
            "race_predicted": pd.array([6, 0, None], "Int16"),
        }
    )
    assert label_texts(table, FAIRFACE["race"]) == ["East Asian", None, "White"]
    assert label_texts(table, AGE) == ["34", "20-29", None]
    assert prediction_texts(table, AGE) == ["35", "0", None]
    assert prediction_texts(table, FAIRFACE["race"]) == ["Middle Eastern", "White", None]
    assert label_texts(table, FAIRFACE["glasses"]) == [None] * 3


def estimates_of(faces: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = {task.name: len(task.classes) for task in classifications(FAIRFACE.values())}
    found = {name: rng.dirichlet([1] * size, faces).astype(np.float32) for name, size in sizes.items()}
    found["age_distribution"] = rng.dirichlet([0.1] * 117, faces).astype(np.float32)
    return found | {"age": (found["age_distribution"] @ np.arange(117)).astype(np.float32)}


def test_estimates_become_the_columns_that_tasks_promise() -> None:
    estimates = estimates_of(50, 6)
    for task in FAIRFACE.values():
        columns = estimate_columns(task, estimates)
        assert list(columns) == list(task.prediction_columns)
        assert {len(values) for values in columns.values()} == {50}
    assert list(estimate_columns(AGE, {"age": estimates["age"]})) == ["age"]
    race = estimate_columns(FAIRFACE["race"], estimates)
    assert race["race"].tolist() == estimates["race"].argmax(1).tolist()
    assert race["p_east_asian"].tolist() == estimates["race"][:, 3].tolist()


def test_intervals_are_the_quantiles_of_samples() -> None:
    distribution = estimates_of(20, 7)["age_distribution"].astype(np.float64)
    low, high = age_interval(distribution)
    for weights, first, last in zip(distribution, low, high, strict=True):
        ages = np.repeat(np.arange(117), np.round(1e6 * weights / weights.sum()).astype(int))
        wanted = np.quantile(ages, [0.05, 0.95], method="inverted_cdf")
        assert (first, last) == pytest.approx(tuple(wanted), abs=0)


def test_predictions_keep_labels_and_what_calibration_needs() -> None:
    faces, estimates = with_ranges(simulated_labels(30, 8, FAIRFACE), np.arange(30) < 10), estimates_of(30, 8)
    temperatures = {"gender": 1.5, "race": 2.0, "age": 3.0, "glasses": 0.7}
    del estimates["gender"]
    table = predictions_table(faces.set_index(pd.Index(range(100, 130))), estimates, temperatures, FAIRFACE)
    assert list(table) == [
        *("path", "sha1", "split", "gender", "race", "age", "age_from", "age_to", "glasses"),
        *("race_predicted", *FAIRFACE["race"].probabilities, "temperature_race"),
        *("age_predicted", "age_low", "age_high", "age_low_raw", "age_high_raw", "temperature_age"),
        *("glasses_predicted", "p_glasses_without", "p_glasses_with", "temperature_glasses"),
    ]
    assert table.index.tolist() == list(range(30))
    assert table["temperature_glasses"].eq(0.7).all()
    low, high = age_interval(estimates["age_distribution"].astype(float) ** 3)  # sharper, as before scaling
    assert table["age_low_raw"].tolist() == low.tolist()
    assert table["age_high_raw"].tolist() == high.tolist()
    assert (high - low).mean() < (table["age_high"] - table["age_low"]).mean()
    del estimates["age_distribution"]
    regression = predictions_table(faces, estimates, temperatures, FAIRFACE)
    assert [name for name in regression if name.startswith("age_p") or name.endswith("_age")] == ["age_predicted"]
