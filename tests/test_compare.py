"""Comparisons of runs against SciPy's paired bootstrap and against planted differences."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulated_predictions import FAIRFACE, predicted, simulated, simulated_labels, with_ranges, without_some_labels
from sklearn.metrics import f1_score

from facecls.analysis.compare import compare_runs, shared_tasks
from facecls.analysis.scores import score, scores_of
from facecls.data.tasks import UTKFACE, Age
from facecls.errors import UserError


def related_runs(faces: int, seed: int) -> dict[str, pd.DataFrame]:
    """Two runs that mostly err on the same faces: run b is a, with a tenth of the wrong races put right."""
    a = simulated(faces, seed, gender=0.85, race=0.7, age=6.0)
    rng = np.random.default_rng(seed)
    mended = (rng.random(faces) < 0.1) & (a.race_predicted != a.race).to_numpy(bool)
    b = a.assign(
        race_predicted=np.where(mended, a.race.to_numpy(int), a.race_predicted).astype(np.int16),
        age_predicted=a.age_predicted + rng.normal(0, 1, faces).astype(np.float32),
    )
    return {"a": a, "b": b}


def difference(table: pd.DataFrame, name: str) -> pd.Series:
    (row,) = [row for _, row in table.iterrows() if row.score == name]
    return row


def test_values_are_those_of_each_run_on_the_shared_faces_in_any_order() -> None:
    labels = simulated_labels(400, 1)
    a, b = without_some_labels(predicted(labels, 1), 1), predicted(labels, 2)
    b = b.assign(gender=a.gender, race=a.race, age=a.age)
    found = compare_runs({"a": a, "b": b[100:].sample(frac=1, random_state=0)}, UTKFACE)
    assert found.faces == 300
    assert found.scores.score.to_list() == [name for name in scores_of(UTKFACE) if name != "age/band_accuracy"]
    for row in found.scores.itertuples():
        wanted_a, wanted_b = score(a[100:], UTKFACE)[row.score], score(b[100:], UTKFACE)[row.score]
        assert (row.value_a, row.value_b) == pytest.approx((wanted_a.value, wanted_b.value))
        assert row.difference == pytest.approx(wanted_b.value - wanted_a.value)
        assert row.faces == wanted_a.faces
        assert row.low <= row.difference <= row.high
    kept = found.scores
    other = compare_runs({"a": a, "b": b[100:]}, UTKFACE)
    pd.testing.assert_frame_equal(kept, other.scores)
    pd.testing.assert_frame_equal(found.disagreements, other.disagreements)


def test_intervals_are_those_of_scipys_paired_bootstrap() -> None:
    runs = related_runs(400, 2)
    found = compare_runs(runs, UTKFACE).scores
    race, a, b = (
        column.to_numpy(int) for column in (runs["a"].race, runs["a"].race_predicted, runs["b"].race_predicted)
    )
    age = runs["a"].age.to_numpy(float)
    error_a, error_b = (abs(run.age_predicted.to_numpy(float) - age) for run in runs.values())
    cases = {
        "race/f1_macro": (
            (race, a, b),
            lambda r, a, b: f1_score(r, b, average="macro") - f1_score(r, a, average="macro"),
        ),
        "age/mae_years": ((error_a, error_b), lambda a, b: np.mean(b - a)),
    }
    for name, (data, statistic) in cases.items():
        low, high = stats.bootstrap(
            data,
            statistic,
            paired=True,
            vectorized=False,
            n_resamples=600,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        row = difference(found, name)
        assert (row.low, row.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_a_paired_interval_is_narrower_than_two_apart_when_errors_go_together() -> None:
    runs = related_runs(1500, 3)
    found = compare_runs(runs, UTKFACE).scores
    apart = {run: score(table, UTKFACE) for run, table in runs.items()}
    for name in ("race/accuracy", "race/f1_macro", "age/mae_years"):
        row = difference(found, name)
        unpaired = np.hypot(*(apart[run][name].high - apart[run][name].low for run in runs))
        assert row.high - row.low < 0.5 * unpaired
    race = difference(found, "race/accuracy")
    assert race.low > 0  # shown to be better, though the runs' own intervals overlap
    assert apart["a"]["race/accuracy"].high > apart["b"]["race/accuracy"].low


def test_intervals_cover_the_planted_difference_as_often_as_they_claim() -> None:
    covered = []
    for seed in range(100):
        labels = simulated_labels(400, seed)
        runs = {
            run: predicted(labels, 2 * seed + number, race=chance).drop(columns=["gender_predicted", "age_predicted"])
            for number, (run, chance) in enumerate((("a", 0.8), ("b", 0.85)))
        }
        row = difference(compare_runs(runs, UTKFACE).scores, "race/accuracy")
        covered.append(row.low <= 0.05 <= row.high)
    assert stats.binomtest(sum(covered), 100, 0.95).pvalue > 0.005


def test_a_run_against_itself_differs_in_nothing() -> None:
    table = simulated(100, 4)
    found = compare_runs({"a": table, "b": table.copy()}, UTKFACE)
    assert (found.scores[["difference", "low", "high"]] == 0).all(axis=None)
    assert found.disagreements.empty
    assert found.disagreements.columns.to_list() == [
        "path",
        "sha1",
        "task",
        "label",
        "predicted/a",
        "predicted/b",
        "apart",
    ]


def test_disagreements_are_named_and_sorted_within_their_task() -> None:
    labels = simulated_labels(6, 5).assign(
        race=pd.array([0, 1, 2, 3, 4, pd.NA], dtype="Int16"), age=pd.array([10, 20, 30, 40, 50, 60], dtype="Int16")
    )
    a = predicted(labels.assign(race=labels.race.fillna(0)), 5, gender=1.0, race=1.0, age=1e-9).assign(race=labels.race)
    b = a.copy()
    b.loc[3, "age_predicted"] += 6.0
    b.loc[1, "age_predicted"] -= 20.4
    b.loc[0, "age_predicted"] += 5.0
    b.loc[[0, 5], "race_predicted"] = 2
    b.loc[[0, 5], ["p_white", "p_asian"]] = [[0.4, 0.3], [0.1, 0.6]]
    found = compare_runs({"a": a, "b": b}, UTKFACE).disagreements
    assert found.task.to_list() == ["race", "race", "age", "age"]
    assert found.path.to_list() == ["5.jpg", "0.jpg", "1.jpg", "3.jpg"]
    assert found.apart.to_list() == pytest.approx([0.5, 0.2, 20.4, 6.0], abs=1e-5)
    assert found["predicted/a"].to_list() == ["white", "white", "20", "40"]
    assert found["predicted/b"].to_list() == ["asian", "asian", "0", "46"]
    assert found.label.isna().to_list() == [True, False, False, False]
    assert found.label[1:].to_list() == ["white", "20", "40"]


def test_faces_are_shared_by_path_and_bytes_and_labels_are_the_first_runs() -> None:
    a = simulated(50, 6, race=1.0)
    b = a.copy()
    b.loc[0, "sha1"] = "0" * 39 + "f"
    b.loc[1, "path"] = "elsewhere.jpg"
    b["race"] = pd.array([0] * 50, dtype="Int16")
    found = compare_runs({"a": a, "b": pd.concat([b, b[5:6]])}, UTKFACE)  # one of the faces listed twice
    assert found.faces == 48
    race = difference(found.scores, "race/accuracy")
    assert (race.value_a, race.value_b) == (1, 1)


def test_three_runs_are_compared_two_by_two_on_tasks_that_all_have() -> None:
    labels = simulated_labels(100, 7)
    runs = {name: predicted(labels, seed) for seed, name in enumerate(("x", "y", "path"))}
    runs["y"] = runs["y"].drop(columns=["age_predicted"])
    found = compare_runs(runs, UTKFACE)
    assert set(found.scores.score) == {"gender/accuracy", "gender/f1_macro", "race/accuracy", "race/f1_macro"}
    pairs = found.scores[found.scores.score == "race/accuracy"][["a", "b"]].to_numpy().tolist()
    assert pairs == [["x", "y"], ["x", "path"], ["y", "path"]]
    race = found.disagreements[found.disagreements.task == "race"]
    votes = np.stack([table.race_predicted for table in runs.values()])
    assert len(race) == (np.ptp(votes, axis=0) > 0).sum()
    assert set(race["predicted/path"]) <= {"white", "black", "asian", "indian", "others"}
    assert "age" not in set(found.disagreements.task)


def test_runs_are_compared_on_further_tasks_and_on_ranges() -> None:
    labels = simulated_labels(300, 10, FAIRFACE)
    runs = {run: with_ranges(predicted(labels, seed, FAIRFACE)) for seed, run in enumerate("ab")}
    found = compare_runs(runs, FAIRFACE)
    assert found.scores.score.to_list() == [
        name for name in scores_of(FAIRFACE) if name[:7] not in ("age/mae", "age/cs5")
    ]
    for row in found.scores.itertuples():
        assert (row.value_a, row.value_b) == pytest.approx(
            tuple(score(runs[run], FAIRFACE)[row.score].value for run in "ab")
        )
    glasses = found.disagreements[found.disagreements.task == "glasses"]
    assert len(glasses) == (runs["a"].glasses_predicted != runs["b"].glasses_predicted).sum()
    assert {*glasses["label"], *glasses["predicted/a"]} == {"without", "with"}
    ages = found.disagreements[found.disagreements.task == "age"]
    spread = abs(runs["a"].age_predicted.to_numpy(float) - runs["b"].age_predicted.to_numpy(float))
    assert sorted(ages.apart) == pytest.approx(sorted(spread[spread > 5]))
    assert set(ages.label) <= {"0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "70+"}


def test_a_task_that_the_first_run_has_no_labels_of_is_compared_without_them() -> None:
    labels = simulated_labels(200, 11, FAIRFACE)
    a, b = predicted(labels, 1, FAIRFACE), predicted(labels, 2, FAIRFACE)
    found = compare_runs({"a": a.drop(columns="glasses"), "b": b}, FAIRFACE)
    assert "glasses/accuracy" not in set(found.scores.score)
    glasses = found.disagreements[found.disagreements.task == "glasses"]
    assert len(glasses) == (a.glasses_predicted != b.glasses_predicted).sum()
    assert glasses.label.isna().all()


def test_a_single_face_has_differences_without_an_interval() -> None:
    labels = simulated_labels(1, 8)
    found = compare_runs({"a": predicted(labels, 1), "b": predicted(labels, 2)}, UTKFACE)
    assert found.faces == 1
    assert found.scores[["low", "high"]].isna().all(axis=None)


def test_tasks_that_are_not_compared_are_named_with_the_reason() -> None:
    a = simulated(20, 12, FAIRFACE)
    b = simulated(20, 13).drop(columns="gender_predicted")
    older = {name: task for name, task in UTKFACE.items() if name != "age"} | {"age": Age("age", 90)}
    shared, reasons = shared_tasks({"a": a, "b": b}, {"a": FAIRFACE, "b": UTKFACE})
    assert shared == {"age": UTKFACE["age"]}
    assert reasons == {"gender": "only in a", "race": "other classes", "glasses": "only in a"}
    shared, reasons = shared_tasks({"a": a, "b": a, "c": b}, {"a": FAIRFACE, "b": FAIRFACE, "c": older})
    assert (shared, reasons["glasses"], reasons["age"]) == ({}, "only in a and b", "other ages")
    labelled = {"glasses": FAIRFACE["glasses"]}
    assert shared_tasks({"a": a[["path", "glasses"]], "b": b}, {"a": labelled, "b": {}}) == (
        {},
        {},
    )  # what nobody predicts is no news


def test_mistakes_are_told_in_one_line() -> None:
    table = simulated(10, 9)
    with pytest.raises(UserError, match="at least two runs to compare, but got 1"):
        compare_runs({"a": table}, UTKFACE)
    with pytest.raises(UserError, match="a, b share none with the same path and bytes"):
        compare_runs({"a": table, "b": table.assign(sha1="f" * 40)}, UTKFACE)
